"""打开来源文件：内容说它是什么，名字不算数。"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from bridge.imports.files.cells import Source
from bridge.imports.files.completing import complete
from bridge.imports.files.content import DAMAGED, Content, file_content
from bridge.imports.files.markup import is_markup, read_markup
from bridge.imports.files.spreadsheet import open_sheet
from bridge.imports.files.text_table import open_text_table
from bridge.imports.files.workbook import read_workbook
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.profile import FileFormat

_ZIP_MARK = b"PK\x03\x04"  # xlsx、xlsb、ods，也可能只是压缩包
_OLE_MARK = b"\xd0\xcf\x11\xe0"  # xls，也可能是有密码的 xlsx
_BIFF_MARKS = (b"\x09\x08\x10\x00\x00\x06\x05\x00", b"\x09\x04\x06\x00", b"\x09\x02\x06\x00", b"\x09\x00\x04\x00")
_GZIP_MARK = b"\x1f\x8b"
_OTHERS = {
    b"%PDF": "a PDF document",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3": "an SQLite database",
    b"PAR1": "a Parquet file",
    b"{\\rtf": "an RTF document",
    b"MIME-Version:": "a web archive (MHTML)",
    **dict.fromkeys(_BIFF_MARKS, "a workbook of Excel 4 or older"),
}
_WORKBOOK_PARTS = {"xl/workbook.xml", "xl/workbook.bin", "content.xml"}
TABLES = {".csv", ".txt", ".tsv", ".tab", ".xls", ".xlsx", ".xlsm", ".xlsb", ".ods", ".htm", ".html", ".xml"}
# 解开后比压缩着大这么多倍，又超过这么多字节的，不是表格
_MAX_RATIO = 200
_ALLOWED_BYTES = 100 << 20


def open_source(path: Path, file: FileFormat) -> Source:
    """按 format 打开；没写就看内容。

    :raises ImportFileError: 没有这个文件、读不了、是空的，或表头不能用。
    """
    try:
        source = replace(_open(file_content(path), file), reread=lambda: _open(file_content(path), file).blocks)
    except OSError as error:
        raise unreadable(path, error) from error
    return complete(source, file)


def unreadable(path: Path, error: OSError) -> ImportFileError:
    return ImportFileError(path, f"the file cannot be read ({error.strerror})", advice=f"check the path {path}")


def _open(content: Content, file: FileFormat) -> Source:
    head = content.head(4096)
    if file.format in ("csv", "whitespace"):
        return open_text_table(content, file)
    if head.startswith((_ZIP_MARK, _GZIP_MARK)) and (inside := _unpack(content, head)):
        return _open(inside, file)
    if head.startswith((_ZIP_MARK, _OLE_MARK)) or file.format == "excel":
        return open_sheet(content, read_workbook(content, file.sheet), file)
    kind = next((kind for mark, kind in _OTHERS.items() if head.startswith(mark)), None)
    if kind is not None:
        raise ImportFileError(
            content.path, f"the file is {kind}, not a table", advice="export the orders as CSV or .xlsx"
        )
    if is_markup(head):
        return open_sheet(content, read_markup(content, file.sheet), file)
    return open_text_table(content, file)


def _unpack(content: Content, head: bytes) -> Content | None:
    """压缩包里的那一个表；是工作簿时是 None。"""
    if content.member is not None and (head.startswith(_GZIP_MARK) or not _is_workbook(content)):
        raise ImportFileError(
            content.path, f"there is an archive inside it ({content.member!r})", advice="unpack it first"
        )
    if head.startswith(_GZIP_MARK):
        return _check(content, lambda: io.BufferedReader(gzip.open(content.path)), content.size, content.path.stem)
    if _is_workbook(content):
        return None
    try:
        with zipfile.ZipFile(content.path) as archive:
            files = [member for member in archive.infolist() if not member.is_dir() and _is_table(member.filename)]
    except DAMAGED as error:
        raise _damaged(content.path, error) from error
    if len(files) != 1:
        names = ", ".join(repr(_name(member)) for member in files[:20])
        problem = f"the archive holds {len(files)} tables: {names}" if files else "there is no table in the archive"
        raise ImportFileError(content.path, problem, advice="unpack it and import them one by one" if files else "")
    member = files[0]
    return _check(content, lambda: zipfile.ZipFile(content.path).open(member), member.compress_size, _name(member))


def _is_workbook(content: Content) -> bool:
    try:
        with content.open() as file, zipfile.ZipFile(file) as archive:
            return bool(_WORKBOOK_PARTS & set(archive.namelist()))
    except DAMAGED:
        return True


def _name(member: zipfile.ZipInfo) -> str:
    """没有 UTF-8 标志的名字，zipfile 当作 CP437；中文 Windows 写的其实是 GBK。"""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("gb18030")
    except UnicodeError:
        return member.filename


def _is_table(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in TABLES and not path.name.startswith("._") and "__MACOSX" not in path.parts


def _check(content: Content, opener: Callable[[], IO[bytes]], packed: int, member: str) -> Content:
    """解到底一遍：坏的、有密码的、炸弹，现在就说；以后再读不会出错。"""
    size, limit = 0, max(_ALLOWED_BYTES, packed * _MAX_RATIO)
    try:
        with opener() as file:
            while chunk := file.read(1 << 20):
                size += len(chunk)
                if size > limit:
                    raise ImportFileError(
                        content.path, f"{packed:,} bytes in it unpack to more than {limit:,}: this is no table"
                    )
    except DAMAGED as error:
        raise _damaged(content.path, error) from error
    return Content(content.path, size, opener, member)


def _damaged(path: Path, error: Exception) -> ImportFileError:
    return ImportFileError(
        path, f"the archive cannot be unpacked ({error})", advice="unpack it and import the file inside"
    )
