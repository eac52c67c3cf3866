"""读 CSV、TSV 与空白分隔的文本：一切先当文字，行号是记录开始的那一行。

不用 read_csv：它不告诉记录在第几行，也分不清少了的字段与空的字段。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import polars as pl

from bridge.imports.cells import CellBlock, Source, drop_empty_rows, find_bad_cells, name_columns, name_positions
from bridge.imports.encoding import MAX_RECORD_BYTES, Encoding, check_encoding, detect_encoding, read_text_blocks
from bridge.imports.errors import ImportFileError
from bridge.imports.problems import find_problems
from bridge.imports.profile import ROW_NUMBER, FileFormat

# 写出分隔符之后，第一行里最多的那个就是；一样多时取前面的
_SEPARATORS = (",", "\t", ";", "|")
_OPEN_QUOTE = r'^"(?:[^"]|"")*$'
_CLOSED_QUOTE = r'^"(?:[^"]|"")*"$'


@dataclass(frozen=True)
class Dialect:
    """怎样切记录与字段。引号只在字段开头才是引号（RFC 4180，与表格软件一样）；separator 为 None 是空白分隔。"""

    separator: str | None

    @property
    def record(self) -> str:
        if self.separator is None:
            return r"[^\n]*\n"
        field = rf'(?:"(?:[^"]|"")*"?)?[^{self._escaped}\n]*'
        return rf"{field}(?:{self._escaped}{field})*\n"

    @property
    def quoted_field(self) -> str:
        return rf'"(?:[^"]|"")*"?[^{self._escaped}]*|[^{self._escaped}]*'

    @property
    def _escaped(self) -> str:
        return rf"\x{{{ord(self.separator or ','):x}}}"


@dataclass(frozen=True)
class _Records:
    """一块记录：行号与字段列表；quoted：块里有引号。"""

    rows: pl.Series
    fields: pl.Series
    quoted: bool
    broken: bool
    end_byte: int


def open_text_table(path: Path, file: FileFormat) -> Source:
    """打开文本表格，读出表头。

    :raises ImportFileError: 没有一行，或表头不能用。
    """
    encoding = check_encoding(path, file.encoding) if file.encoding else detect_encoding(path)
    records = _read_records(path, encoding, file)
    first = next(records, None)
    if first is None:
        raise ImportFileError(path, "the file is empty")
    row, header = int(first.rows[0]), [str(name) for name in first.fields[0]]
    repeated: frozenset[str] = frozenset()
    if any("\0" in name for name in header):
        raise ImportFileError(path, "the first row contains a NUL byte: this is not a text file", row=row)
    if file.header:
        if first.broken and any("\ufffd" in name for name in header):
            raise ImportFileError(
                path, f"the header contains bytes that are not {encoding.name.upper()} (byte {encoding.first_bad_byte})", row=row
            )
        columns, repeated = name_columns([_unquote_name(name) for name in header])
        first = replace(first, rows=first.rows[1:], fields=first.fields[1:])
    else:
        columns = name_positions(len(header), file.columns, path)
    blocks = (_to_cells(block, columns, encoding) for block in chain([first], records))
    return Source(path, columns, repeated, False, blocks)


def _to_cells(records: _Records, columns: tuple[str, ...], encoding: Encoding) -> CellBlock:
    wide = pl.DataFrame({ROW_NUMBER: records.rows, "fields": records.fields})
    count = pl.col("fields").list.len()
    ragged = [
        find_problems(
            wide,
            count < len(columns),
            column=pl.lit(pl.Series(columns)).gather(count),
            problem=pl.format(f"is missing: the row has {{}} fields instead of {len(columns)}", count),
            value=None,
        ),
        find_problems(
            wide,
            count > len(columns),
            column="",
            problem=pl.format(f"is too much: the row has {{}} fields instead of {len(columns)}", count),
            value=pl.col("fields").list.slice(len(columns)).list.join(" | "),
        ),
    ]
    fields = records.fields.list.to_struct(fields=list(columns)).struct.unnest()
    cells = fields.select(records.rows.alias(ROW_NUMBER), pl.all())
    malformed = [_find_malformed_quotes(cells, name) for name in columns if records.quoted]
    if records.quoted:
        cells = cells.with_columns(_unquote(cells[name]) for name in columns)
    cells = drop_empty_rows(cells.with_columns(pl.when(pl.col(name) != "").then(pl.col(name)) for name in columns))
    bad_cells = find_bad_cells(cells, broken=records.broken, encoding=encoding.name.upper(), first_bad_byte=encoding.first_bad_byte)
    return CellBlock(cells, [*ragged, *malformed, *bad_cells], records.end_byte)


def _find_malformed_quotes(cells: pl.DataFrame, name: str) -> pl.DataFrame:
    text = pl.col(name)
    quoted = cells.lazy().filter(text.str.starts_with('"')).select(ROW_NUMBER, name).collect()
    return find_problems(quoted, ~text.str.contains(_CLOSED_QUOTE), column=name, problem="has text after its closing quote", value=text)


def _unquote(text: pl.Series) -> pl.Series:
    """去掉引号；="0012" 是平台防止表格软件改写长号码的写法，取里面的 0012。"""
    quoted = text.str.starts_with('"')
    if quoted.any():
        inner = text.str.strip_prefix('"').str.strip_suffix('"')
        if inner.str.contains('""', literal=True).any():
            inner = inner.str.replace_all('""', '"', literal=True)
        text = inner.zip_with(quoted, text)
    if text.str.starts_with('="').any():
        protected = text.str.contains(r'^="[^"]*"$')
        text = text.str.strip_prefix('="').str.strip_suffix('"').zip_with(protected, text)
    return text


def _unquote_name(name: str) -> str:
    return name[1:-1].replace('""', '"') if name.startswith('"') and name.endswith('"') and len(name) > 1 else name


def _read_records(path: Path, encoding: Encoding, file: FileFormat) -> Iterator[_Records]:
    """逐块切出记录，空行略去；一个引号内的换行可以跨块。"""
    dialect: Dialect | None = None
    line = 1
    pending = ""
    pending_broken = False
    for block in read_text_blocks(path, encoding):
        text = pending + block.text
        broken = pending_broken or block.broken
        if dialect is None:
            dialect = _choose_dialect(text, file)
        records = pl.Series("record", [text]).str.extract_all(dialect.record).explode()
        pending = _open_record(records, dialect)
        pending_broken = broken and bool(pending)
        if pending:
            if len(pending) > MAX_RECORD_BYTES:
                raise _never_closed(path, line + text[: -len(pending)].count("\n"))
            records = records[:-1]
            text = text[: -len(pending)]
        rows = _number_rows(records, line, text.count("\n"))
        line += text.count("\n")
        if records.len():
            yield from _split(records, rows, dialect, broken, block.end_byte)
    if pending:
        raise _never_closed(path, line)


def _never_closed(path: Path, row: int) -> ImportFileError:
    return ImportFileError(
        path, "a quote is opened and never closed", row=row, advice="correct the file: the rows after it cannot be told apart"
    )


def _split(records: pl.Series, rows: pl.Series, dialect: Dialect, broken: bool, end_byte: int) -> Iterator[_Records]:
    table = pl.DataFrame({"record": records.str.strip_suffix("\n").str.strip_suffix("\r"), "row": rows})
    table = table.filter(pl.col("record").str.strip_chars() != "")
    if not table.height:
        return
    text, rows = table["record"], table["row"]
    with_quotes = text.str.contains('"', literal=True)
    if dialect.separator is None:
        yield _Records(rows, text.str.extract_all(r"\S+"), False, broken, end_byte)
    elif with_quotes.any():
        yield _Records(rows, _split_quoted(text, with_quotes, dialect), True, broken, end_byte)
    else:
        yield _Records(rows, text.str.split(dialect.separator), False, broken, end_byte)


def _split_quoted(records: pl.Series, with_quotes: pl.Series, dialect: Dialect) -> pl.Series:
    """正则慢，只给有引号的行用：别的行先换成 NULL。"""
    by_pattern = pl.when(with_quotes).then(records).str.extract_all(dialect.quoted_field)
    by_separator = pl.when(~with_quotes).then(records).str.split(dialect.separator or "")
    return pl.select(pl.coalesce(by_pattern, by_separator)).to_series()


def _number_rows(records: pl.Series, first_line: int, line_count: int) -> pl.Series:
    """每条记录开始的行号；没有跨行的记录时就是连续的整数。"""
    if records.len() == line_count:
        return pl.int_range(first_line, first_line + line_count, eager=True)
    lines = records.str.count_matches("\n", literal=True).cast(pl.Int64)
    return first_line + lines.cum_sum() - lines


def _open_record(records: pl.Series, dialect: Dialect) -> str:
    """最后一条记录若停在引号里面，它还没完，归下一块。"""
    last = str(records[-1])
    if dialect.separator is None or '"' not in last:
        return ""
    field = pl.Series([last]).str.extract_all(dialect.quoted_field).explode().tail(1)
    return last if field.str.contains(_OPEN_QUOTE).item() else ""


def _choose_dialect(text: str, file: FileFormat) -> Dialect:
    if file.format == "whitespace":
        return Dialect(None)
    if file.separator:
        return Dialect(file.separator)
    header = text.lstrip().partition("\n")[0]
    return Dialect(max(_SEPARATORS, key=header.count))
