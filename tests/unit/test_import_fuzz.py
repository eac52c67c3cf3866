"""样子随机的文件：分隔符 × 编码 × 引号 × 行尾 × 标题、合计与省略的字段。读得一字不差，或者拒绝；从不悄悄读错。

文件由这里的几行代码写成，不经过我们的读法，也不经过 csv 模块。
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.imports.files import encoding
from bridge.imports.files.source import open_source
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.problems import merge_problems
from bridge.imports.rules.profile import FileFormat

# 平时 200 个例子；--hypothesis-profile=deep 时 2,000 个
EXAMPLES = max(200, settings().max_examples)

WORDS = {
    "zh": ["王伟", "李娜", "张敏", "尽快发货", "周末送到", "杭州西湖区", "丝绸围巾", "备注：无", "𠮷野", "高峰"],
    "tw": ["陳怡君", "林志明", "請盡快出貨", "週末送達", "台北市", "訂製禮盒", "張雅婷"],
    "jp": ["佐藤 花子", "ﾔﾏﾀﾞ", "ギフト", "急ぎでお願いします", "東京都", "髙橋", "マグカップ"],
    "eu": ["Jörg Maß", "Ümit Çelik", "Hélène Lefèvre", "für 5 €", "Straße 7", "José Núñez", "Anke"],
    "en": ["Anna", "Lumen Ltd", "gift", "Main Street 5"],
}
HEADERS = {
    "zh": ["订单编号", "买家", "金额", "备注"],
    "tw": ["訂單編號", "買家", "金額", "備註"],
    "jp": ["注文番号", "購入者", "金額", "備考"],
    "eu": ["Bestellnummer", "Käufer", "Betrag", "Notiz"],
    "en": ["order_id", "customer", "amount", "note"],
}
CODECS = {
    "zh": ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"],
    "tw": ["utf-8", "utf-16", "big5"],
    "jp": ["utf-8", "cp932", "iso2022_jp_ext"],
    "eu": ["utf-8", "utf-16", "cp1252"],
    "en": ["utf-8", "gb18030", "cp932"],
}
TOTALS = {"zh": "合计", "tw": "總計", "jp": "合計", "eu": "Summe", "en": "Total"}


@dataclass(frozen=True)
class File:
    content: bytes
    header: list[str]
    rows: list[list[str | None]]
    totals: int


@st.composite
def files(draw: st.DrawFn) -> File:
    language = draw(st.sampled_from(list(WORDS)))
    codec = draw(st.sampled_from(CODECS[language]))
    separator = draw(st.sampled_from([",", "\t", ";", "|"]))
    quoting = draw(st.sampled_from(["minimal", "all", "none"]))
    line_end = draw(st.sampled_from(["\n", "\r\n", "\r", "\r\r\n"]))
    header = draw(st.sampled_from([HEADERS[language], HEADERS["en"]]))
    word = st.sampled_from(
        [word for word in WORDS[language] + WORDS["en"] if word == word.encode(codec, "replace").decode(codec)]
    )
    breaks = ['"', "'", " ", '5"', *([] if quoting == "none" else [separator, line_end, ",", ";", '""'])]
    note = st.lists(st.one_of(word, st.sampled_from(breaks)), max_size=4).map("".join)
    rows = [
        [
            f"A{number}",
            draw(word),
            draw(st.sampled_from(["12.50", "8", "1.234,50" if separator != "," else "1234.5"])),
            draw(note),
        ]
        for number in range(draw(st.integers(1, 8)))
    ]
    if quoting == "none":
        # 整个括在引号里的字段，谁也看不出引号是不是它的一部分
        rows = [
            [*row[:3], row[3].strip('"') + '"' if row[3].startswith('"') and row[3].endswith('"') else row[3]]
            for row in rows
        ]

    def field(text: str) -> str:
        needed = quoting == "all" or (
            quoting == "minimal" and any(char in text for char in (separator, '"', "\n", "\r"))
        )
        return '"' + text.replace('"', '""') + '"' if needed else text

    def line(fields: list[str]) -> str:
        return separator.join(field(text) for text in fields)

    lines = [line(header), *(line(row) for row in rows)]
    if draw(st.booleans()):
        lines = [
            line(row).rstrip(separator) if not row[3] and quoting != "all" else text
            for row, text in zip([header, *rows], lines, strict=True)
        ]
    totals = draw(st.integers(0, 1))
    lines += [separator.join([TOTALS[language], "", "20.50", ""])] * totals
    titles = draw(
        st.lists(st.sampled_from([WORDS[language][0], f"{WORDS[language][0]}{separator * 3}", ""]), max_size=2)
    )
    marked = draw(st.booleans()) and not codec.startswith("utf-16")
    text = line_end.join([*([f"sep={separator}"] if marked else []), *titles, *lines])
    text += line_end if draw(st.booleans()) else ""
    return File(text.encode(codec), header, [[cell or None for cell in row] for row in rows], totals)


@pytest.mark.timeout(1800)
def test_a_file_of_any_shape_is_read_exactly_or_refused(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    path = tmp_path / "orders.csv"

    @settings(max_examples=EXAMPLES)
    @given(file=files(), block_bytes=st.sampled_from([64, 1 << 20]))
    def check(file: File, block_bytes: int) -> None:
        path.write_bytes(file.content)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
                source = open_source(path, FileFormat())
                blocks = list(source.blocks)
        except ImportFileError:
            outcomes["refused"] += 1
            return
        problems = [
            problem
            for block in blocks
            for problem in [*block.problems, block.find_missing(source.columns, source.columns[:3])]
        ]
        if merge_problems(problems).height:
            outcomes["bad rows"] += 1
            return
        read = [list(row[1:]) for block in blocks for row in block.cells.rows()]
        assert (list(source.columns), read) == (file.header, file.rows)
        assert source.shape.total_rows == file.totals
        outcomes["read"] += 1

    check()
    # 什么都拒绝，也就从不读错；那不算数
    assert outcomes["read"] > 0.85 * outcomes.total(), outcomes
