"""文本文件的字节与编码：认出编码，按整行切块；认不准时停下来，两种读法都给人看。"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from charset_normalizer import from_bytes

from bridge.imports.files.content import Content
from bridge.imports.rules.errors import ImportFileError, shorten

BLOCK_BYTES = 2 << 20
# 一条记录最长这么多；更长的不是表格，或引号没有合上
MAX_RECORD_BYTES = 64 << 20
REPLACEMENT = "\ufffd"
_BYTE_ORDER_MARK = "\ufeff"
# 先长后短：UTF-32 的标记以 UTF-16 的开头
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_LABELS = {
    "cp932": "Shift_JIS",
    "big5hkscs": "Big5",
    "cp1252": "Windows-1252",
    "cp949": "EUC-KR",
    "euc_jp": "EUC-JP",
    "iso2022_jp_ext": "ISO-2022-JP",
}

# 判断用的样本：有非 ASCII 字节的行，够判断就行；选中的编码仍要通读全文件来核对
_SAMPLE_BYTES = 256 << 10
# 常用字占这么多才像话；比最像的差不到这么多，就分不出真假
_PLAUSIBLE = 0.75
_MARGIN = 0.15
# 说不准：只有标点、没有一个字
_UNSURE = 0.9

# 认不出时，可以向人提议的
_GUESSES = [
    "gb18030",
    "big5hkscs",
    "cp932",
    "euc_jp",
    "cp949",
    "cp874",
    "koi8_r",
    *(f"cp125{number}" for number in range(9)),
]


@dataclass(frozen=True)
class Encoding:
    """文件的编码；first_bad_byte 是第一个不合编码的字节的位置（从 0 数），没有时是 None。"""

    name: str
    first_bad_byte: int | None = None

    @property
    def label(self) -> str:
        return _LABELS.get(self.name, self.name.upper())


@dataclass(frozen=True)
class TextBlock:
    """若干整行文字，以行尾结尾。broken：坏字节已换成 U+FFFD；unfinished：文件最后一行没有行尾，补了一个。"""

    text: str
    broken: bool
    end_byte: int
    unfinished: bool = False


def read_text_blocks(content: Content, encoding: Encoding) -> Iterator[TextBlock]:
    """逐块给出文字，内存只占一块；字节顺序标记去掉，中间的也是：几个文件首尾相接时带来的。在 \\n 之后切；没有 \\n 的（老 Mac）在 \\r 之后切。"""
    rest, broken, end = "", False, 0
    for part, bad_byte, end in _decode(content, encoding.name):
        text = rest + part.replace(_BYTE_ORDER_MARK, "")
        broken = broken or bad_byte is not None
        # 末尾的 \r 后面也许还有 \n
        cut = text.rfind("\n") + 1 or text.rfind("\r", 0, -1) + 1
        if not cut and len(text) > MAX_RECORD_BYTES:
            raise ImportFileError(
                content.path,
                f"no line break within {MAX_RECORD_BYTES >> 20} MiB before byte {end}: this is not a table",
            )
        if cut:
            yield TextBlock(text[:cut], broken, end)
            broken = broken and REPLACEMENT in text[cut:]
        rest = text[cut:]
    if rest:
        finished = rest.endswith("\r")
        yield TextBlock(rest if finished else rest + "\n", broken, end, unfinished=not finished)


def check_encoding(content: Content, name: str) -> Encoding:
    """用给定的编码，只找第一个坏字节。

    :raises ImportFileError: 字节的先后要由标记来说，而文件没有标记。
    """
    head = content.head(4)
    if (
        head
        and codecs.lookup(name).name in ("utf-16", "utf-32")
        and not any(head.startswith(mark) for mark, _ in _MARKS)
    ):
        raise ImportFileError(
            content.path,
            f"the file is no text in {name.upper()}: it does not begin with a byte order mark",
            advice=f"give another encoding, such as {name}-le",
        )
    return Encoding(name, next((bad_byte for _, bad_byte, _ in _decode(content, name) if bad_byte is not None), None))


def detect_encoding(content: Content) -> Encoding:
    """先看标记，再看整个文件是不是 UTF-8；都不是，就看解出来的字像不像话。

    坏了几个字节的 UTF-8 中文常常也能当 GB18030 解出乱码，所以先看它像谁。

    :raises ImportFileError: 两种编码都像话而读法不同，或没有一种像话。
    """
    head = content.head(4096)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return check_encoding(content, name)
    # 在 UTF-8 之前看：没有标记的 UTF-16，英文数字连同 NUL 也是合法的 UTF-8
    if b"\0" in head and (wide := _find_unmarked_utf16(head)):
        return check_encoding(content, wide)
    # 这一种全是 ASCII 字节，当作 UTF-8 也没有坏字节，读出来却是乱码
    if re.search(rb"\x1b[$(][@BIJ]", head):
        return check_encoding(content, "iso2022_jp_ext")
    utf8 = check_encoding(content, "utf-8")
    if utf8.first_bad_byte is None or _looks_like_utf8(sample := _collect_sample(content)):
        return utf8
    return check_encoding(content, _choose(content, sample))


def _decode(content: Content, name: str) -> Iterator[tuple[str, int | None, int]]:
    """一段段文字、这一段里第一个坏字节的位置、读到了第几个字节。"""
    decoder = codecs.getincrementaldecoder(name)()
    end = 0
    with content.open() as file:
        while True:
            chunk = file.read(BLOCK_BYTES)
            state, bad_byte = decoder.getstate(), None
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                bad_byte = end - len(state[0]) + error.start
                # 从这一块的开头重来：严格的那一遍已经吃掉了一截
                decoder.setstate(state)
                decoder.errors = "replace"
                text = decoder.decode(chunk, final=not chunk)
                # 换回来：下一块的第一个坏字节在哪里，还要它来说
                decoder.errors = "strict"
            end += len(chunk)
            yield text, bad_byte, end
            if not chunk:
                return


def _find_unmarked_utf16(head: bytes) -> str | None:
    """ASCII 字符在 UTF-16 里有一半是 NUL，总在同一侧；解出来还得有行尾。"""
    even, odd = head[::2].count(0), head[1::2].count(0)
    name = "utf-16-le" if odd > 10 * even else "utf-16-be" if even > 10 * odd else None
    return name if name and re.search(r"[\r\n]", head[: len(head) // 2 * 2].decode(name, "replace")) else None


def _collect_sample(content: Content) -> bytes:
    found: list[bytes] = []
    size = 0
    with content.open() as file:
        rest = b""
        while size < _SAMPLE_BYTES and (chunk := file.read(1 << 20)):
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            for line in lines:
                if not line.isascii() and size < _SAMPLE_BYTES:
                    found.append(line)
                    size += len(line)
            rest = rest[-_SAMPLE_BYTES:]
    return b"\n".join([*found, rest])


def _looks_like_utf8(sample: bytes) -> bool:
    """解得出的非 ASCII 字符比解不出的多。"""
    text = sample.decode("utf-8", "replace")
    bad = text.count(REPLACEMENT)
    return sum(not char.isascii() for char in text) - bad > bad


def _choose(content: Content, sample: bytes) -> str:
    scores = {name: score(sample.decode(name, "replace")) for name, score in _SCORES.items()}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] < _PLAUSIBLE:
        raise _unclear(content, sample, best)
    rivals = [
        name
        for name in scores
        if name != best and scores[name] >= max(_PLAUSIBLE, scores[best] - _MARGIN) and _fits(sample, name)
    ]
    for rival in rivals:
        raise _differ(content, sample, best, rival)
    return best


def _fits(sample: bytes, name: str) -> bool:
    return REPLACEMENT not in sample.decode(name, "replace")


def _unclear(content: Content, sample: bytes, best: str) -> ImportFileError:
    """没有一种常见的编码读得通：说出 charset-normalizer 的猜测，由人决定。"""
    guess = from_bytes(sample, cp_isolation=_GUESSES).best()
    name = guess.encoding if guess else best
    return ImportFileError(
        content.path,
        f"the encoding of the text is not clear; as {Encoding(name).label} it begins {_first_word(sample, name)}",
        advice=f"if that is right, give --encoding {name}, otherwise the right one",
    )


def _differ(content: Content, sample: bytes, first: str, second: str) -> ImportFileError:
    words = zip_longest(_words(sample, first), _words(sample, second), fillvalue="")
    one, other = next((pair for pair in words if pair[0] != pair[1]), ("", ""))
    return ImportFileError(
        content.path,
        f"the text can be read as {Encoding(first).label} ({shorten(one)}) and as {Encoding(second).label} ({shorten(other)})",
        advice=f"say which is right with --encoding {first} or --encoding {second}",
    )


def _first_word(sample: bytes, name: str) -> str:
    return shorten(next(iter(_words(sample, name)), ""))


def _words(sample: bytes, name: str) -> list[str]:
    """有非 ASCII 字符的字段。"""
    return [word.strip() for word in re.split(r'[,;|\t\n"]', sample.decode(name, "replace")) if not word.isascii()]


def _score_by_bytes(name: str, judge: Callable[[int, int], float | None]) -> Callable[[str], float]:
    """非 ASCII 字符里常用字的比例；judge 看一个字的首尾字节，None 是标点之类，不算。"""

    def score(text: str) -> float:
        judged: list[float] = []
        for char in text:
            if not char.isascii():
                encoded = b"" if char == REPLACEMENT else char.encode(name, "ignore")
                value = judge(encoded[0], encoded[-1]) if len(encoded) in (1, 2) else 0.0
                judged += [] if value is None else [value]
        return sum(judged) / len(judged) if judged else _UNSURE

    return score


def _judge_gb18030(lead: int, trail: int) -> float | None:
    """GB 2312 一级字（按拼音排的 3755 个）最常用，二级字少用，GBK 扩充的罕见。"""
    if trail < 0xA1 or lead < 0xA1:
        return 0.0
    if lead in (0xA1, 0xA3):
        return None
    return 1.0 if 0xB0 <= lead <= 0xD7 else 0.5 if 0xD8 <= lead <= 0xF7 else 0.0


def _judge_big5(lead: int, trail: int) -> float | None:
    """常用字 5401 个里，大陆一级字或日本第一水准也有的才真的常用；乱码落在其余的里。"""
    if 0xA1 <= lead <= 0xA3:
        return None
    if not 0xA4 <= lead <= 0xC6:
        return -0.5
    char = bytes([lead, trail]).decode("big5hkscs", "replace")
    simplified, japanese = char.encode("gb2312", "ignore"), char.encode("shift_jis", "ignore")
    return (
        1.0 if b"\xb0" <= simplified < b"\xd8" or b"\x88" <= japanese < b"\x98" else 0.6 if len(japanese) == 2 else 0.3
    )


def _judge_cp932(lead: int, _trail: int) -> float | None:
    """平假名、片假名与第一水准汉字常用；半角片假名与第二水准少用。"""
    if lead == 0x81:
        return None
    return 1.0 if lead in (0x82, 0x83) or 0x88 <= lead <= 0x97 else 0.5


def _score_cp932(text: str) -> float:
    """只有半角片假名时说不准：两个两个地看，它们也是汉字。"""
    foreign = [char for char in text if not char.isascii()]
    if all("\uff61" <= char <= "\uff9f" for char in foreign):
        return _UNSURE
    return _score_by_bytes("cp932", _judge_cp932)(text)


def _judge_cp949(lead: int, trail: int) -> float | None:
    """谚文；中文当作它来读，总有一些落在汉字区里，韩国人的订单里却几乎没有汉字。"""
    if lead in (0xA1, 0xA3) and trail >= 0xA1:
        return None
    return 1.0 if 0xB0 <= lead <= 0xC8 and trail >= 0xA1 else -1.0


def _score_euc_jp(text: str) -> float:
    """与 GB 2312 同一个区段，所以没有假名就不当作日文。"""
    foreign = [char for char in text if not char.isascii()]
    if sum("\u3041" <= char <= "\u30fe" for char in foreign) * 20 < len(foreign):
        return 0.0
    return _score_by_bytes("euc_jp", lambda lead, _: 1.0 if lead <= 0xCF else 0.2)(text)


def _score_latin(text: str) -> float:
    """西文的重音字母夹在 ASCII 字母之间；成串的重音字母，与贴着字母的符号，都是乱码。"""
    judged: list[bool] = []
    for word in re.findall(r"[^\s,;|\"]*[^\x00-\x7f][^\s,;|\"]*", text):
        for letters in re.findall(r"[^\W\d_]+", word):
            accented = sum(not char.isascii() for char in letters)
            judged += [accented * 2 <= len(letters)] * accented
        judged += [False] * len(
            re.findall(r"[A-Za-z][^\w\s\x00-\x7f’‘]|[^\w\s\x00-\x7f’‘][A-Za-z]|\ufffd|[ªºƒ²³¹¼½¾]", word)
        )
    return sum(judged) / len(judged) if judged else _UNSURE


_SCORES: dict[str, Callable[[str], float]] = {
    "gb18030": _score_by_bytes("gb18030", _judge_gb18030),
    "big5hkscs": _score_by_bytes("big5hkscs", _judge_big5),
    "cp932": _score_cp932,
    "cp949": _score_by_bytes("cp949", _judge_cp949),
    "euc_jp": _score_euc_jp,
    "cp1252": _score_latin,
}
