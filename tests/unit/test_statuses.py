"""状态的比较就是 Python 的 strip 与 casefold，对每一个有大小写的 Unicode 字都是。"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import polars as pl

from etl_assets.services.figures import has_status, status_spellings

CASED = [
    letter
    for letter in map(chr, range(1, sys.maxunicode + 1))
    if letter.upper() != letter or letter.casefold() != letter
]


def found(texts: Sequence[str | None], wanted: Sequence[str]) -> list[bool]:
    frame = pl.DataFrame({"latest_status": texts})
    return frame.select(has_status(status_spellings(frame["latest_status"]), wanted)).to_series().to_list()


def test_every_letter_is_folded_as_python_folds_it() -> None:
    """词尾与词中各一遍；一帧里没有罕见的字时走的是另一条路，所以也单独放。"""
    texts = [text for letter in CASED for text in (f"A{letter}", f"A{letter}B")]
    wanted = sorted({text.strip().casefold() for text in texts if text.casefold() != text.lower()})
    expected = [text.strip().casefold() in set(wanted) for text in texts]
    assert found(texts, wanted) == expected


def test_usual_letters_are_folded_without_the_table() -> None:
    texts = ["Completed", " REFUNDED　", "ÀÉÎ", "交易成功", None]
    assert found(texts, ["completed", "refunded", "àéî"]) == [True, True, True, False, False]


def test_final_sigma_is_folded_like_any_other() -> None:
    assert found(["ΤΕΛΟΣ", "ΤΕΛΟς"], ["τελοσ"]) == [True, True]
