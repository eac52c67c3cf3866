"""xlsx 工作簿的格式里，改变一个数是什么意思的：日子从 1904 年数起，号码的前导零只在显示里。"""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree.ElementTree import Element

_ZEROS = re.compile("0{2,}")


def starts_1904(workbook: Element) -> bool:
    """老 Mac 的工作簿从 1904 年 1 月 1 日数日子。"""
    return any(
        part.tag.endswith("}workbookPr") and part.get("date1904", "0") in ("1", "true") for part in workbook.iter()
    )


def padded_styles(styles: Element) -> Mapping[str, int]:
    """样式的编号 → 补零补到几位：格式是 00000000 那样的。"""
    codes = {part.get("numFmtId"): part.get("formatCode", "") for part in styles.iter() if part.tag.endswith("}numFmt")}
    used = next((part for part in styles.iter() if part.tag.endswith("}cellXfs")), ())
    widths = {str(number): codes.get(style.get("numFmtId"), "") for number, style in enumerate(used)}
    return {number: len(code) for number, code in widths.items() if _ZEROS.fullmatch(code)}
