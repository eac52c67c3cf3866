"""读 Excel 与 OpenDocument 工作簿：先看 xlsx 的 XML 里有什么不寻常的，再由子进程读出文字。"""

from __future__ import annotations

import io
import json
import posixpath
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import polars as pl

from bridge.imports.files.cells import MAX_COLUMNS, check_width
from bridge.imports.files.content import DAMAGED, Content
from bridge.imports.files.sheet import LOST_CELLS, MAX_CELLS, Merge, Sheet, check_size, choose_sheet
from bridge.imports.files.workbook_cells import CellSearch, column_position, place_cells
from bridge.imports.files.workbook_formats import padded_styles, starts_1904
from bridge.imports.rules.errors import ImportFileError

# 工作簿解开后至多这么大：一百万行、二十列的约是它的一半
MAX_UNPACKED_BYTES = 1 << 30
_CHUNK_BYTES = 8 << 20
# 与表格隔着这么多空列或空行的，不是表格的一部分
_FAR_COLUMNS = 100
_FAR_ROWS = 10_000
_MAX_STRAY_CELLS = 10
# 解得开，写的却不是工作簿里该有的：缺了一部分、数大得不是行号、不是 UTF-8
_ODD_CONTENT = (ElementTree.ParseError, KeyError, ValueError, ArithmeticError, pl.exceptions.PolarsError, OSError)

_WORKBOOK = "xl/workbook.xml"
_STYLES = "xl/styles.xml"
_TAG = r"<(?:\w+:)?"
# 有内容的单元格；只有样式的里面没有标签，读取器当作没有
_CELL = r"""\br=["']([A-Z]{1,3})([0-9]+)["'][^>/]*>\s*<[^/]"""
_HIDDEN_ROW = rf"""{_TAG}row\s[^>]*\bhidden=["'](?:1|true)["'][^>/]*>""".encode()
_MERGE = rf"""{_TAG}mergeCell\s[^>]*ref=["']([A-Z]+)([0-9]+):([A-Z]+)([0-9]+)["']"""


@dataclass
class _Facts:
    """一张 xlsx 工作表的 XML 里看到的；行与列都从 0 数。"""

    rows: int = 0
    columns: int = 0
    first_column: int = MAX_COLUMNS
    hidden_rows: int = 0
    merges: list[Merge] = field(default_factory=list)
    unread: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=LOST_CELLS))
    padded: list[tuple[int, int, int]] = field(default_factory=list)
    starts_1904: bool = False


def read_workbook(content: Content, wanted: str | None) -> Sheet:
    """打开工作簿，读一张工作表。

    :raises ImportFileError: 打不开（有密码、损坏、太大），没有这张表，或说不准是哪一张。
    """
    path = content.path
    if content.size > MAX_UNPACKED_BYTES:
        raise _too_large(path, "is", content.size)
    with content.open() as file:
        data = file.read()
    facts, stray_cells = _Facts(), list[str]()
    scanned: str | None = None
    if zipfile.is_zipfile(io.BytesIO(data)):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(member.file_size for member in archive.infolist())
                if size > MAX_UNPACKED_BYTES:
                    raise _too_large(path, "unpacks to", size)
                if parts := _find_sheets(archive):
                    wanted = choose_sheet(
                        path, list(parts), [name for name, part in parts.items() if _is_filled(archive, part)], wanted
                    )
                    styles = padded_styles(_parse(archive, _STYLES)) if _STYLES in archive.namelist() else {}
                    facts = _scan(archive, parts[wanted].name, styles)
                    facts.starts_1904 = starts_1904(_parse(archive, _WORKBOOK))
                    scanned = parts[wanted].name
                    if facts.columns > MAX_COLUMNS or facts.rows * facts.columns > MAX_CELLS:
                        data, stray_cells = _without_strays(path, archive, parts[wanted].name, facts)
        except (*DAMAGED, *_ODD_CONTENT) as error:
            raise _unreadable(path, str(error)) from error
    cells, name = _read(path, data, wanted)
    check_size(path, cells.height, cells.width)
    # 读取器略去左边的空列
    left = facts.first_column
    merges = [
        Merge(merge.first_row, merge.first_column - left, merge.last_row, merge.last_column - left)
        for merge in facts.merges
        if merge.first_row < cells.height and left <= merge.first_column < left + cells.width
    ]
    cells = _pad(cells, facts.padded, left)
    unread = facts.unread.with_columns(pl.col("position") - left)

    def numeric_rows(column: int) -> Collection[int]:
        return _find_numeric_rows(content, scanned, left + column) if scanned else ()

    return Sheet(
        "workbook", name, cells, merges, unread, facts.hidden_rows, stray_cells, numeric_rows, facts.starts_1904
    )


def _too_large(path: Path, how: str, size: int) -> ImportFileError:
    problem = f"the workbook {how} {size:,} bytes; at most {MAX_UNPACKED_BYTES:,} are read"
    return ImportFileError(path, problem, advice="save the sheet as CSV")


def _unreadable(path: Path, reason: str) -> ImportFileError:
    return ImportFileError(
        path, f"the workbook cannot be read ({reason})", advice="save it without a password as .xlsx or CSV"
    )


def _read(path: Path, data: bytes, wanted: str | None) -> tuple[pl.DataFrame, str]:
    """由子进程读：它就是死了，也只是这个文件读不了。"""
    command = [sys.executable, "-m", "bridge.imports.files.sheet_reader", *([wanted] if wanted is not None else [])]
    ended = subprocess.run(command, input=data, capture_output=True, check=False)
    first, _, table = ended.stdout.partition(b"\n")
    if not first or (ended.returncode and not table):
        raise _unreadable(path, "the reader failed on it: it is damaged, or far too large")
    answer: Mapping[str, list[str]] = json.loads(first)
    if "error" in answer:
        raise _unreadable(path, str(answer["error"]))
    name = choose_sheet(path, answer["names"], answer["filled"], wanted)
    if ended.returncode or not table:
        raise _unreadable(path, "the reader failed on it: it is damaged, or far too large")
    return pl.read_ipc(io.BytesIO(table)), name


@dataclass(frozen=True)
class _Part:
    name: str
    hidden: bool


def _find_sheets(archive: zipfile.ZipFile) -> dict[str, _Part]:
    """xlsx 的工作表的名字与它在包里的位置；别的工作簿没有。"""
    if _WORKBOOK not in archive.namelist():
        return {}
    relations = {
        relation.get("Id"): posixpath.normpath(posixpath.join("/xl", relation.get("Target", ""))).lstrip("/")
        for relation in _parse(archive, "xl/_rels/workbook.xml.rels").iter()
        if relation.tag.endswith("}Relationship")
    }
    sheets = {}
    for sheet in _parse(archive, _WORKBOOK).iter():
        identifier = next((value for key, value in sheet.attrib.items() if key.endswith("}id")), None)
        if sheet.tag.endswith("}sheet") and relations.get(identifier) in archive.namelist():
            sheets[sheet.get("name", "")] = _Part(relations[identifier], sheet.get("state", "visible") != "visible")
    return sheets


def _parse(archive: zipfile.ZipFile, name: str) -> ElementTree.Element:
    text = archive.read(name)
    if b"<!" in text.replace(b"<!--", b""):
        raise zipfile.BadZipFile(f"{name} declares entities")
    return ElementTree.fromstring(text)  # noqa: S314 没有 DOCTYPE，就没有实体


def _is_filled(archive: zipfile.ZipFile, part: _Part) -> bool:
    return not part.hidden and any(re.search(_CELL.encode(), chunk) for chunk in _chunks(archive, part.name))


def _chunks(archive: zipfile.ZipFile, part: str) -> Iterator[bytes]:
    """在一行结束的地方切开的 XML，单元格都写着位置。"""
    return place_cells(_whole_rows(archive, part))


def _whole_rows(archive: zipfile.ZipFile, part: str) -> Iterator[bytes]:
    rest = b""
    with archive.open(part) as file:
        while chunk := file.read(_CHUNK_BYTES):
            chunk = rest + chunk
            cut = chunk.rfind(b"row>") + 4
            if cut < 4:
                rest = chunk
                continue
            yield chunk[:cut]
            rest = chunk[cut:]
    yield rest


def _references(chunk: bytes) -> pl.DataFrame:
    """有内容的单元格的列名与行号。"""
    cells = pl.Series("cell", [chunk.decode(errors="replace")]).str.extract_all(_CELL).explode().drop_nulls()
    return pl.select(
        cells.str.extract(_CELL, 1).alias("column"), cells.str.extract(_CELL, 2).cast(pl.Int64).alias("row")
    )


def _pad(cells: pl.DataFrame, padded: list[tuple[int, int, int]], left: int) -> pl.DataFrame:
    """人看见的是补了零的：00012345。表格外面的不管。"""
    rows = pl.DataFrame(padded, schema={"row": pl.Int64, "position": pl.Int64, "width": pl.Int64}, orient="row")
    for (position,), of_column in rows.filter(
        pl.col("row") < cells.height, pl.col("position").is_between(left, left + cells.width - 1)
    ).group_by("position"):
        column = cells.columns[int(str(position)) - left]
        widths = (
            pl.Series([0], dtype=pl.Int64).new_from_index(0, cells.height).scatter(of_column["row"], of_column["width"])
        )
        cells = cells.with_columns(pl.col(column).str.zfill(widths))
    return cells


def _scan(archive: zipfile.ZipFile, part: str, padded: Mapping[str, int]) -> _Facts:
    facts = _Facts()
    lost: list[pl.DataFrame] = []
    search: CellSearch | None = None
    for chunk in _chunks(archive, part):
        search = search or CellSearch(chunk)
        cells = _references(chunk)
        if cells.height:
            facts.rows = max(facts.rows, int(cells["row"].max()))  # type: ignore[arg-type]
            used = [column_position(name) for name in cells["column"].unique()]
            facts.columns, facts.first_column = max(facts.columns, max(used) + 1), min(facts.first_column, *used)
        facts.hidden_rows += len(re.findall(_HIDDEN_ROW, chunk))
        facts.merges += [
            Merge(int(top) - 1, column_position(left), int(bottom) - 1, column_position(right))
            for left, top, right, bottom in re.findall(
                _MERGE, chunk.decode(errors="replace") if b"mergeCell" in chunk else ""
            )
        ]
        if padded:
            facts.padded += search.find_padded(chunk, padded)
        lost.append(pl.DataFrame(list(search.find_lost(chunk)), schema=LOST_CELLS, orient="row"))
    facts.unread = pl.concat(lost)
    return facts


def _find_numeric_rows(content: Content, part: str, position: int) -> frozenset[int]:
    """一列里单元格是数的那些行；要看才看，所以再读一遍。"""
    rows: set[int] = set()
    search: CellSearch | None = None
    with content.open() as file, zipfile.ZipFile(file) as archive:
        for chunk in _chunks(archive, part):
            search = search or CellSearch(chunk)
            rows.update(search.find_numeric_rows(chunk, position))
    return frozenset(rows)


def _without_strays(path: Path, archive: zipfile.ZipFile, part: str, facts: _Facts) -> tuple[bytes, list[str]]:
    """去掉离表格很远的几个单元格；不止几个就不动它。

    :raises ImportFileError: 表真的有这么大。
    """
    cells = pl.concat([_references(chunk) for chunk in _chunks(archive, part)])
    names = cells["column"].unique()
    cells = cells.with_columns(
        pl.col("column").replace_strict(names, [column_position(name) for name in names]).alias("position")
    )
    last_column, last_row = _end(cells["position"], _FAR_COLUMNS), _end(cells["row"], _FAR_ROWS)
    strays = cells.filter((pl.col("position") > last_column) | (pl.col("row") > last_row))
    if strays.height > _MAX_STRAY_CELLS or not strays.height:
        check_width(path, facts.columns)
        check_size(path, facts.rows, facts.columns)
    names_of_strays = [f"{column}{row}" for column, row in strays.select("column", "row").rows()]
    text = archive.read(part).decode(errors="replace")
    for name in names_of_strays:
        text = re.sub(
            rf"""{_TAG}c\s[^>]*\br=["']{name}["'][^>/]*>.*?</(?:\w+:)?c>""", "", text, count=1, flags=re.DOTALL
        )
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as copy:
        for member in archive.namelist():
            copy.writestr(member, text if member == part else archive.read(member))
    return target.getvalue(), names_of_strays


def _end(values: pl.Series, gap: int) -> int:
    """到第一个大空当为止。"""
    used = values.unique().sort()
    steps = used.diff().fill_null(0)
    after = (steps > gap).arg_true()
    return int(used[int(after[0]) - 1]) if after.len() else int(used[-1])
