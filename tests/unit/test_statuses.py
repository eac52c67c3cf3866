"""状态的比较就是 Python 的 strip 与 casefold，对每一个有大小写的 Unicode 字都是。"""

from __future__ import annotations

import sys

import polars as pl

from etl_assets.services.figures import has_status

CASED = [letter for letter in map(chr, range(1, sys.maxunicode + 1)) if letter.upper() != letter or letter.casefold() != letter]


def test_every_letter_is_folded_as_python_folds_it() -> None:
    """词尾与词中各一遍；一帧里没有罕见的字时走的是另一条路，所以也单独放。"""
    texts = [text for letter in CASED for text in (f"A{letter}", f"A{letter}B")]
    wanted = sorted({text.strip().casefold() for text in texts if text.casefold() != text.lower()})
    frame = pl.DataFrame({"latest_status": texts})
    expected = [text.strip().casefold() in set(wanted) for text in texts]
    assert frame.select(has_status(frame, wanted)).to_series().to_list() == expected


def test_usual_letters_are_folded_without_the_table() -> None:
    texts = ["Completed", " REFUNDED　", "ÀÉÎ", "交易成功", None]
    frame = pl.DataFrame({"latest_status": texts})
    assert frame.select(has_status(frame, ("completed", "refunded", "àéî"))).to_series().to_list() == [True, True, True, False, False]


def test_final_sigma_is_folded_like_any_other() -> None:
    frame = pl.DataFrame({"latest_status": ["ΤΕΛΟΣ", "ΤΕΛΟς"]})
    assert frame.select(has_status(frame, ("τελοσ",))).to_series().to_list() == [True, True]
