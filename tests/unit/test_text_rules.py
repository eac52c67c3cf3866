"""文字规则：空白、状态的大小写折叠、客户的键与编号。"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from uuid import UUID, uuid5

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from etl_assets.core.text import WHITE_SPACE
from etl_assets.services.customer_keys import NAMESPACE, customer_id, customer_key, nickname_of_key, with_lead_ids
from etl_assets.services.figures import has_status, status_spellings

SHOP = "00000000-0000-4000-8000-000000000001"
ZHANG = f"{SHOP}:张三"


def keys_of(*nicknames: str) -> list[str]:
    frame = pl.DataFrame({"shop_id": [SHOP] * len(nicknames), "customer_nickname": nicknames})
    return frame.select(customer_key())["customer_key"].to_list()


def matching(statuses: Sequence[str | None], listed: Sequence[str]) -> list[bool]:
    frame = pl.DataFrame({"latest_status": statuses}, schema={"latest_status": pl.String})
    return frame.select(found=has_status(status_spellings(frame["latest_status"]), listed))["found"].to_list()


# ---- 空白 ------------------------------------------------------------------------


def test_white_space_is_what_polars_strips() -> None:
    every = pl.Series([chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF])
    stripped = every.filter(every.str.strip_chars() == "")
    assert "".join(stripped) == WHITE_SPACE
    assert len(WHITE_SPACE) == 25


# ---- 状态 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "listed"),
    [
        ("Completed", "completed"),
        ("  COMPLETED\u3000", "completed"),
        ("已完成\x85", "已完成"),
        ("GROẞ", "gross"),  # 大写 ẞ 折成 ss，to_lowercase 只给 ß
        ("groß", "GROSS"),
        ("ΤΈΛΟΣ", "τέλος"),  # 词尾 σ
        ("İptal", "i\u0307ptal"),  # 土耳其的 İ 折成两个字符
        ("ﬁn", "FIN"),  # 连字
        ("ᏸ", "Ᏸ"),  # 切罗基字母折成大写
    ],
)
def test_statuses_are_compared_trimmed_and_case_folded(status: str, listed: str) -> None:
    assert matching([status], [listed.casefold()]) == [True]


def test_statuses_that_only_look_alike_differ() -> None:
    assert matching(["ıptal", "iptal", "com pleted", "completed.", "\u200bcompleted", None, ""], ["iptal", "completed"]) == [
        False, True, False, False, False, False, False,
    ]  # fmt: skip


def test_every_character_folds_as_python_folds_it() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF]
    changed = [f"x{character}x" for character in characters if character.casefold() != character]
    unchanged = [f"x{character}x" for character in characters[:0x3000] if character.casefold() == character]
    assert len(changed) > 1000
    assert all(matching(changed, [status.casefold() for status in changed]))
    assert not any(matching(changed, changed))
    assert all(matching(unchanged, unchanged))


# ---- 客户的键 --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nickname", "name"),
    [
        ("张三", "张三"),
        ("\u3000张三 ", "张三"),
        ("ＡＢＣ　公司", "ABC 公司"),
        ("a\t\u2003 \xa0b", "a b"),
        ("①号", "1号"),
        ("e\u0301", "é"),
        ("㈱", "(株)"),
        ("\u2000x", "x"),
        ("\u200bx", "\u200bx"),
        ("a:b", "a:b"),
        ("\U0001f600", "\U0001f600"),
    ],
)
def test_nicknames_are_normalized_trimmed_and_folded_to_single_blanks(nickname: str, name: str) -> None:
    assert keys_of(nickname) == [f"{SHOP}:{name}"]


def test_white_space_that_normalization_brings_to_the_ends_is_trimmed() -> None:
    assert unicodedata.normalize("NFKC", "\xb4x") == " \u0301x"
    assert keys_of("\xb4x", f"x{WHITE_SPACE}y{WHITE_SPACE}") == [f"{SHOP}:\u0301x", f"{SHOP}:x y"]


def test_case_tells_customers_apart() -> None:
    assert keys_of("Anna", "anna") == [f"{SHOP}:Anna", f"{SHOP}:anna"]


def test_name_of_a_key_is_what_follows_the_first_colon() -> None:
    frame = pl.DataFrame({"customer_key": [ZHANG, f"{SHOP}:a:b", f"{SHOP}:"]})
    assert frame.select(nickname_of_key()).to_series().to_list() == ["张三", "a:b", ""]


# ---- 编号 ------------------------------------------------------------------------


def test_ids_are_those_of_the_contract() -> None:
    frame = pl.DataFrame({"customer_key": [ZHANG], "lead_no": [1]}, schema_overrides={"lead_no": pl.Int32})
    assert keys_of("张三") == [ZHANG]
    assert frame.select(customer_id())["customer_key"].to_list() == ["fa55f60f-e32c-5a53-a54e-925cf73a97da"]
    expected = frame.with_columns(lead_id=pl.lit("fd4ef8d1-2684-5631-8acd-3c839ea84862"))
    assert_frame_equal(with_lead_ids(frame), expected)


def test_ids_are_uuid5_of_key_and_number() -> None:
    names = [f"{SHOP}:", f"{SHOP}:a#1", f"{SHOP}:\U0001f600" * 100]
    frame = pl.DataFrame(
        {"customer_key": names, "lead_no": [1, 12, 2_000_000_000]}, schema_overrides={"lead_no": pl.Int32}
    )
    assert frame.select(customer_id())["customer_key"].to_list() == [
        str(uuid5(UUID(NAMESPACE), name)) for name in names
    ]
    assert with_lead_ids(frame)["lead_id"].to_list() == [
        str(uuid5(UUID(NAMESPACE), f"{name}#{number}")) for name, number in zip(names, frame["lead_no"], strict=True)
    ]
