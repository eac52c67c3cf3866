"""读 CSV、TSV 与空白分隔的文本：一切先当文字，行号是记录开始的那一行。

不用 read_csv：它不告诉记录在第几行，也分不清少了的字段与空的字段。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import polars as pl

from bridge.imports.files.cells import (
    HEADER_ROWS,
    SHORT_ROWS,
    CellBlock,
    Shape,
    Source,
    check_width,
    drop_empty_rows,
    find_bad_cells,
    find_header,
    leave_out,
    name_columns,
    name_positions,
)
from bridge.imports.files.content import Content
from bridge.imports.files.encoding import (
    MAX_RECORD_BYTES,
    Encoding,
    TextBlock,
    check_encoding,
    detect_encoding,
    read_text_blocks,
)
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import find_problems
from bridge.imports.rules.profile import ROW_NUMBER, FileFormat

# 一样好时取前面的
_SEPARATORS = (",", "\t", ";", "|")
_SAMPLE_CHARACTERS = 256 << 10
# 开头这么多字段都好好地括在引号里，引号就是引号
_ENOUGH_QUOTES = 100
_LINE_END = r"\r*\n|\r"
_OPEN_QUOTE = r'^"(?:[^"]|"")*$'
_CLOSED_QUOTE = r'^"(?:[^"]|"")*"$'
_SEPARATOR_LINE = re.compile(r'[ \t]*"?sep=([^\r\n])"?[ \t;,]*(?:\r*\n|\r)', re.IGNORECASE)


@dataclass(frozen=True)
class Dialect:
    """怎样切记录与字段。引号只在字段开头才是引号（RFC 4180，与表格软件一样）；separator 为 None 是空白分隔。"""

    separator: str | None
    quotes: bool = True

    @property
    def record(self) -> str:
        field = rf'(?:"(?:[^"]|"")*"?)?[^{self._escaped}\r\n]*'
        return rf"{field}(?:{self._escaped}{field})*(?:{_LINE_END})"

    @property
    def quoted_field(self) -> str:
        return rf'"(?:[^"]|"")*"?[^{self._escaped}]*|[^{self._escaped}]*'

    @property
    def well_formed_line(self) -> str:
        """引号都在一行之内合上的一行。"""
        field = rf'(?:"(?:[^"]|"")*"|[^"{self._escaped}][^{self._escaped}]*)?'
        return rf"^{field}(?:{self._escaped}{field})*$"

    @property
    def _escaped(self) -> str:
        return rf"\x{{{ord(self.separator or ','):x}}}"


@dataclass(frozen=True)
class _Records:
    """一块记录：行号与字段列表；quoted：块里有引号；unfinished：最后一条是文件末尾没有行尾的。"""

    rows: pl.Series
    fields: pl.Series
    quoted: bool
    broken: bool
    end_byte: int
    unfinished: bool


@dataclass(frozen=True)
class _Table:
    """怎样把记录变成单元格；header 是表头的原文，没有表头时是 None，header_row 是 0。"""

    content: Content
    encoding: Encoding
    columns: tuple[str, ...]
    header: list[str] | None
    header_row: int
    file: FileFormat
    shape: Shape


def open_text_table(content: Content, file: FileFormat) -> Source:
    """打开文本表格，认出样子，读出表头。

    :raises ImportFileError: 没有一行，表头不能用，或有两种读法。
    """
    encoding = check_encoding(content, file.encoding) if file.encoding else detect_encoding(content)
    dialect = _choose_dialect(content, encoding, file)
    records = _read_records(content, encoding, dialect)
    head = _peek(records)
    if not head:
        raise ImportFileError(content.path, "the file is empty")
    rows = [
        (row, [*map(str, fields)])
        for part in head
        for row, fields in zip(part.rows.head(HEADER_ROWS), part.fields.head(HEADER_ROWS), strict=True)
    ][:HEADER_ROWS]
    row, header = _pick_header(content, rows, file)
    check_width(content.path, len(header))
    if any("\0" in name for name in header):
        raise ImportFileError(content.path, "the first row contains a NUL byte: this is not a text file", row=row)
    repeated: frozenset[str] = frozenset()
    if file.header:
        if encoding.first_bad_byte is not None and any("\ufffd" in name for name in header):
            raise ImportFileError(
                content.path,
                f"the header contains bytes that are not {encoding.label} (byte {encoding.first_bad_byte})",
                row=row,
            )
        header = [_unquote_name(name) if dialect.quotes else name for name in header]
        columns, repeated = name_columns(header)
    else:
        columns = name_positions(len(header), file.columns, content.path)
    separator = dialect.separator
    shape = Shape(
        "text", content.member, encoding.label, separator, dialect.quotes, header_row=row if file.header else None
    )
    table = _Table(content, encoding, columns, header if file.header else None, row if file.header else 0, file, shape)
    blocks = (_to_cells(part, table) for part in chain(head, records))
    return Source(content.path, columns, repeated, False, blocks, content.size, shape)


def _peek(records: Iterator[_Records]) -> list[_Records]:
    """够找表头的头几块。"""
    head: list[_Records] = []
    while sum(part.rows.len() for part in head) < HEADER_ROWS and (part := next(records, None)):
        head.append(part)
    return head


def _pick_header(content: Content, rows: list[tuple[int, list[str]]], file: FileFormat) -> tuple[int, list[str]]:
    if not file.header:
        return rows[0]
    if file.header_row is None:
        return rows[find_header([fields for _, fields in rows])]
    found = next((record for record in rows if record[0] == file.header_row), None)
    if found is None:
        raise ImportFileError(content.path, f"there is no header in row {file.header_row}: no record begins there")
    return found


def _to_cells(records: _Records, table: _Table) -> CellBlock:
    columns = table.columns
    rows, lists = records.rows, records.fields
    if rows[0] <= table.header_row:
        rows, lists = rows.filter(rows > table.header_row), lists.filter(rows > table.header_row)
    fields = lists.list.to_struct(fields=list(columns)).struct.unnest()
    cells = fields.select(rows.alias(ROW_NUMBER), pl.all())
    # 去引号之前找：去掉了就看不出哪一个没有好好合上
    malformed = [_find_malformed_quotes(cells, name) for name in columns if records.quoted]
    if records.quoted:
        cells = cells.with_columns(_unquote(cells[name]) for name in columns)
    # 去了引号才把空的当作没有：写成 "" 的也是空的
    cells = cells.with_columns(pl.when(pl.col(name) != "").then(pl.col(name)) for name in columns)
    cells = leave_out(cells, table.header, table.file, table.shape)
    wide = (
        pl.DataFrame({ROW_NUMBER: rows, "fields": lists}).join(
            cells.select(ROW_NUMBER), on=ROW_NUMBER, how="semi", maintain_order="left"
        )
        if cells.height < rows.len()
        else pl.DataFrame({ROW_NUMBER: rows, "fields": lists})
    )
    count = pl.col("fields").list.len()
    extra = pl.col("fields").list.slice(len(columns)).list.join(" | ")
    too_much = find_problems(
        wide.filter(count > len(columns)),
        # 行尾多出来的分隔符不算
        extra.str.contains(r"[^| \t\r]"),
        column="",
        problem=pl.format(f"is too much: the row has {{}} fields instead of {len(columns)}", count),
        value=extra,
    )
    cells = drop_empty_rows(cells)
    encoding = table.encoding
    short_rows = wide.filter(count < len(columns)).select(ROW_NUMBER, count.alias("fields")).cast(SHORT_ROWS)
    bad_cells = find_bad_cells(
        cells, broken=records.broken, encoding=encoding.label, first_bad_byte=encoding.first_bad_byte
    )
    return CellBlock(
        cells,
        [*_find_cut_off(records, short_rows, columns), too_much, *malformed, *bad_cells],
        records.end_byte,
        short_rows,
    )


def _find_cut_off(records: _Records, short_rows: pl.DataFrame, columns: tuple[str, ...]) -> list[pl.DataFrame]:
    """文件在一行的中间就完了：最后那个字段也许只有一半。"""
    if not records.unfinished:
        return []
    last = short_rows.filter(pl.col(ROW_NUMBER) == records.rows[-1])
    column = pl.lit(pl.Series(columns)).gather(pl.col("fields") - 1)
    return [
        find_problems(
            last, pl.lit(value=True), column=column, problem="is cut off: the file ends before the row does", value=None
        )
    ]


def _find_malformed_quotes(cells: pl.DataFrame, name: str) -> pl.DataFrame:
    text = pl.col(name)
    quoted = cells.lazy().filter(text.str.starts_with('"')).select(ROW_NUMBER, name).collect()
    return find_problems(
        quoted, ~text.str.contains(_CLOSED_QUOTE), column=name, problem="has text after its closing quote", value=text
    )


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


def _read_records(content: Content, encoding: Encoding, dialect: Dialect) -> Iterator[_Records]:
    """逐块切出记录，空行略去；一个引号内的换行可以跨块。"""
    line = 1
    pending = ""
    pending_broken = False
    first = True
    for block in read_text_blocks(content, encoding):
        text = pending + block.text
        broken = pending_broken or block.broken
        if first and (marked := _SEPARATOR_LINE.match(text)):
            text = text[marked.end() :]
            line += 1
        first = False
        if "\r" in text and (not dialect.quotes or '"' not in text):
            text = re.sub(_LINE_END, "\n", text)
        records, lines = _cut(text, dialect)
        pending = _open_record(records, dialect)
        pending_broken = broken and bool(pending)
        if pending:
            if len(pending) > MAX_RECORD_BYTES:
                raise _never_closed(content, line + lines - _count_lines(pending))
            records = records[:-1]
            lines -= _count_lines(pending)
        rows = _number_rows(records, line, lines)
        line += lines
        if records.len():
            yield from _split(records, rows, dialect, block, broken)
    if pending:
        raise _never_closed(content, line)


def _cut(text: str, dialect: Dialect) -> tuple[pl.Series, int]:
    """切成记录，与共有几行；没有引号时一行就是一条。"""
    if not text:
        return pl.Series("record", [], pl.String), 0
    if dialect.separator is None or not dialect.quotes or '"' not in text:
        records = pl.Series("record", [text.removesuffix("\n")]).str.split("\n").explode()
        return records, records.len()
    return pl.Series("record", [text]).str.extract_all(dialect.record).explode(), _count_lines(text)


def _count_lines(text: str) -> int:
    carriage_returns = text.count("\r")
    if carriage_returns == text.count("\r\n"):
        return text.count("\n")
    return sum(1 for _ in re.finditer(_LINE_END, text))


def _never_closed(content: Content, row: int) -> ImportFileError:
    return ImportFileError(
        content.path,
        "a quote is opened and never closed",
        row=row,
        advice="correct the file, or give --no-quotes if quotes mean nothing in it",
    )


def _split(records: pl.Series, rows: pl.Series, dialect: Dialect, block: TextBlock, broken: bool) -> Iterator[_Records]:
    table = pl.DataFrame({"record": records.str.strip_chars_end("\r\n"), "row": rows})
    table = table.filter(pl.col("record").str.contains(r"\S"))
    if not table.height:
        return
    text, rows = table["record"], table["row"]
    with_quotes = text.str.contains('"', literal=True)
    quoted = False
    if dialect.separator is None:
        fields = text.str.extract_all(r"\S+")
    elif dialect.quotes and with_quotes.any():
        fields, quoted = _split_quoted(text, with_quotes, dialect), True
    else:
        fields = text.str.split(dialect.separator)
    yield _Records(rows, fields, quoted, broken, block.end_byte, block.unfinished)


def _split_quoted(records: pl.Series, with_quotes: pl.Series, dialect: Dialect) -> pl.Series:
    """正则慢，只给有引号的行用：别的行先换成 NULL。"""
    by_pattern = pl.when(with_quotes).then(records).str.extract_all(dialect.quoted_field)
    by_separator = pl.when(~with_quotes).then(records).str.split(dialect.separator or "")
    return pl.select(pl.coalesce(by_pattern, by_separator)).to_series()


def _number_rows(records: pl.Series, first_line: int, line_count: int) -> pl.Series:
    """每条记录开始的行号；没有跨行的记录时就是连续的整数。"""
    if records.len() == line_count:
        return pl.int_range(first_line, first_line + line_count, eager=True)
    lines = records.str.count_matches(_LINE_END).cast(pl.Int64)
    return first_line + lines.cum_sum() - lines


def _open_record(records: pl.Series, dialect: Dialect) -> str:
    """最后一条记录若停在引号里面，它还没完，归下一块。"""
    last = str(records[-1]) if records.len() else ""
    if dialect.separator is None or not dialect.quotes or '"' not in last:
        return ""
    field = pl.Series([last]).str.extract_all(dialect.quoted_field).explode().tail(1)
    return last if field.str.contains(_OPEN_QUOTE).item() else ""


def _choose_dialect(content: Content, encoding: Encoding, file: FileFormat) -> Dialect:
    """分隔符由开头的一段认出，引号由整个文件认出。"""
    if file.format == "whitespace":
        return Dialect(None, quotes=False)
    sample = _read_sample(content, encoding)
    marked = _SEPARATOR_LINE.match(sample)
    separators = (file.separator or (marked and marked[1]),) if file.separator or marked else _SEPARATORS
    body = sample[marked.end() :] if marked else sample
    readings = {
        (separator, quotes): _split_sample(body, Dialect(separator, quotes))
        for separator in separators
        for quotes in ((file.quotes,) if file.quotes is not None else (True, False) if '"' in body else (True,))
        if separator
    }
    separator, quotes = max(readings, key=lambda reading: _regularity(readings[reading]))
    if file.quotes is not None:
        return Dialect(separator, file.quotes)
    width, _ = _usual_width(readings[separator, quotes])
    return Dialect(separator, _choose_quotes(content, encoding, separator, width, body))


def _read_sample(content: Content, encoding: Encoding) -> str:
    sample = ""
    for block in read_text_blocks(content, encoding):
        sample += block.text
        if len(sample) >= _SAMPLE_CHARACTERS:
            break
    return sample[: max(_SAMPLE_CHARACTERS, sample.find("\n") + 1)]


def _split_sample(text: str, dialect: Dialect) -> pl.Series:
    """每条记录的字段。"""
    records, _ = _cut(text if dialect.quotes and '"' in text else re.sub(_LINE_END, "\n", text), dialect)
    parts = _split(records, records.is_null(), dialect, TextBlock(text, broken=False, end_byte=0), broken=False)
    return pl.concat([part.fields for part in parts] or [pl.Series([[""]])])


def _regularity(fields: pl.Series) -> float:
    """有同样多字段的记录的比例；字段多的分法更可信，表头也有这么多的更可信（数里的逗号不在表头里）。"""
    width, records = _usual_width(fields)
    head = fields.head(HEADER_ROWS).to_list()
    named = min(len(head[find_header(head)]), width)
    return records / fields.len() * (1 - 1 / width) * named / width


def _usual_width(fields: pl.Series) -> tuple[int, int]:
    """多数记录有几个字段，几条是这样；只有一个字段的不算。一样多时取宽的：标题比表窄。"""
    widths = fields.list.len().alias("width")
    usual = widths.filter(widths > 1).value_counts().sort("count", "width").rows()
    return usual[-1] if usual else (1, 0)


def _choose_quotes(content: Content, encoding: Encoding, separator: str, width: int, sample: str) -> bool:
    """引号算不算数：看整个文件，两种读法各有多少条对不上。

    不算数，要不算数时处处对得上、算数时对不上、而且合不上的引号比合得上的多；不然坏行照样是坏行。

    :raises ImportFileError: 两种读法都对得上，读出来却不同。
    """
    starts = pl.Series(re.split(rf"[\r\n{re.escape(separator)}]", sample))
    starts = starts.filter(starts.str.starts_with('"'))
    closed = starts.str.contains(_CLOSED_QUOTE)
    if (
        (closed.all() and closed.len() >= _ENOUGH_QUOTES)
        or not _has_quotes(content)
        or not _doubtful(content, encoding, separator, width)
    ):
        return True
    quoted, plain = (_count_faults(content, encoding, Dialect(separator, quotes), width) for quotes in (True, False))
    if plain.faults or (quoted.faults and plain.closed >= plain.open):
        return True
    if not quoted.faults and quoted.records != plain.records:
        raise ImportFileError(
            content.path,
            f"with quotes around fields the file has {quoted.records:,} records, without {plain.records:,}, and both fit",
            advice="say which is right with --quotes or --no-quotes",
        )
    return not quoted.faults


def _has_quotes(content: Content) -> bool:
    with content.open() as file:
        return any(b'"' in chunk for chunk in iter(lambda: file.read(1 << 20), b""))


def _doubtful(content: Content, encoding: Encoding, separator: str, width: int) -> bool:
    """有没有这样的行：引号合不上，字段却不少。多数文件没有，就不必把两种读法都试一遍。"""
    well_formed = Dialect(separator).well_formed_line
    for block in read_text_blocks(content, encoding):
        if '"' not in block.text:
            continue
        lines = pl.Series(
            re.sub(_LINE_END, "\n", block.text).split("\n") if "\r" in block.text else block.text.split("\n")
        )
        quoted = lines.filter(lines.str.contains('"', literal=True))
        odd = quoted.filter(~quoted.str.contains(well_formed))
        if (odd.str.count_matches(separator, literal=True) >= width - 1).any():
            return True
    return False


@dataclass
class _Reading:
    """一种读法：records 条记录，其中 faults 条有引号而对不上；字段以引号开头的，closed 个合上了，open 个没有。"""

    records: int = 0
    faults: int = 0
    closed: int = 0
    open: int = 0


def _count_faults(content: Content, encoding: Encoding, dialect: Dialect, width: int) -> _Reading:
    reading = _Reading()
    try:
        for part in _read_records(content, encoding, dialect):
            counts = part.fields.list.len()
            table = pl.DataFrame({"fields": part.fields, "regular": counts == width, "row": part.rows})
            fields = table.explode("fields").filter(pl.col("fields").str.contains('"', literal=True))
            starts = pl.col("fields").str.starts_with('"')
            fields = fields.with_columns(
                starts.alias("starts"), pl.col("fields").str.contains(_CLOSED_QUOTE).alias("closed")
            )
            reading.records += counts.len()
            reading.closed += fields.filter("starts", "closed").height
            reading.open += fields.filter("starts", ~pl.col("closed")).height
            fault = ~pl.col("regular") | (pl.col("starts") & ~pl.col("closed") & dialect.quotes)
            reading.faults += fields.filter(fault)["row"].n_unique()
    except ImportFileError:
        reading.faults += 1
    return reading
