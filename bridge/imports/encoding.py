"""文本文件的字节与编码：按整行切块，认出 UTF-8 或 GB18030。"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bridge.imports.errors import ImportFileError

BLOCK_BYTES = 8 << 20
# 一条记录最长这么多；更长的不是表格，或引号没有合上
MAX_RECORD_BYTES = 64 << 20
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Encoding:
    """文件的编码；first_bad_byte 是第一个不合编码的字节的位置（从 0 数），没有时是 None。"""

    name: str
    first_bad_byte: int | None = None


@dataclass(frozen=True)
class TextBlock:
    """若干整行文字，以换行结尾。broken：坏字节已换成 U+FFFD。"""

    text: str
    broken: bool
    end_byte: int


def read_text_blocks(path: Path, encoding: Encoding) -> Iterator[TextBlock]:
    """逐块给出文字，内存只占一块；开头的字节顺序标记去掉。"""
    for offset, block in _read_byte_blocks(path):
        text, bad_byte = _decode(block, encoding.name)
        text = text.removeprefix("\ufeff") if offset == 0 else text
        yield TextBlock(text if text.endswith("\n") else text + "\n", bad_byte is not None, offset + len(block))


def detect_encoding(path: Path) -> Encoding:
    """整个文件是 UTF-8 就是 UTF-8，否则整个文件是 GB18030 就是 GB18030；都不是时给出更像的那个与第一个坏字节。

    坏了几个字节的 UTF-8 中文常常也能当 GB18030 解出乱码，所以先看它像谁。

    :raises ImportFileError: 是 UTF-16，或根本不是分行的文字。
    """
    utf8 = check_encoding(path, "utf-8")
    if utf8.first_bad_byte is None or _looks_like_utf8(path, utf8.first_bad_byte):
        return utf8
    gb18030 = check_encoding(path, "gb18030")
    return gb18030 if gb18030.first_bad_byte is None else max(utf8, gb18030, key=lambda tried: tried.first_bad_byte or 0)


def check_encoding(path: Path, name: str) -> Encoding:
    """用给定的编码，只找第一个坏字节。"""
    for offset, block in _read_byte_blocks(path):
        if offset == 0 and block.startswith(UTF16_MARKS):
            raise ImportFileError(path, "the file is UTF-16", advice="save it as CSV UTF-8")
        _, bad_byte = _decode(block, name)
        if bad_byte is not None:
            return Encoding(name, offset + bad_byte)
    return Encoding(name)


def _decode(block: bytes, name: str) -> tuple[str, int | None]:
    try:
        return block.decode(name), None
    except UnicodeDecodeError as error:
        return block.decode(name, "replace"), error.start


def _looks_like_utf8(path: Path, first_bad_byte: int) -> bool:
    """有标记，或坏字节所在的一块里解得出的非 ASCII 字符比解不出的多。"""
    for offset, block in _read_byte_blocks(path):
        if offset == 0 and block.startswith(UTF8_MARK):
            return True
        if first_bad_byte < offset + len(block):
            text = block.decode("utf-8", "replace")
            bad = text.count(REPLACEMENT)
            good = len(text) - len(text.encode("ascii", "ignore")) - bad
            return good > bad
    return False


def _read_byte_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """在换行处切开的块与它的起点；UTF-8 与 GB18030 的多字节字符里都没有 0x0A，所以不会切断字符。"""
    offset = 0
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            cut = chunk.rfind(b"\n") + 1
            if not cut and len(rest) > MAX_RECORD_BYTES:
                raise ImportFileError(path, f"no line break within {MAX_RECORD_BYTES >> 20} MiB after byte {offset}: this is not a table")
            if not cut:
                rest += chunk
                continue
            block = rest + chunk[:cut]
            yield offset, block
            offset += len(block)
            rest = chunk[cut:]
    if rest:
        yield offset, rest
