"""坏的与怪的输入走完全程：该拒的拒，该装的原样装下，结果与参照实现一样。"""

from __future__ import annotations

import random
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from unicodedata import normalize
from uuid import UUID

import polars as pl
import pytest
import sqlalchemy as sa
from polars.exceptions import InvalidOperationError

from etl_assets.core.etl_tables import rejected_rows
from etl_assets.core.tables import target_tables
from etl_assets.services.figures import total_amount
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

DAY = date(2026, 1, 5)
TABLES = target_tables("public")
ORDERS, CUSTOMERS = TABLES.orders, TABLES.customers
MEGABYTE = 1_000_000
LARGEST_AMOUNT = Decimal("999999999999.99")

TEXTS = [
    # CSV 与 COPY 的记号
    "\\.", "\\.\n", "a\n\\.\nb", "a\r\n\\.\r\nb", "\\N", "\\", "\\n", "\\x41", '"', '""', '"a"', 'a"b', '"a,b"\n"c"', "'", ",", ",,", "a,b",
    "a\nb", "a\r\nb", "a\rb", "a\tb", "a;b|c",
    # 像别的类型
    "NULL", "null", "None", "nan", "NaN", "inf", "true", "t", "0", "-1", "1e5", "007", "2026-01-05", "{}", "[]", "{a}",
    # SQL 与格式串
    "%", "%s", "%%", "%(x)s", "{0}", ":x", "$1", "'; DROP TABLE orders; --", "x' OR 1=1 --", "public:orders", "a:b:c", "#1",
    # 看不见的字、方向、组合
    "\ufeff", "\ufeffA", "A\ufeff", "\ufeff\ufeffA", "\u200b", "\u200bA", "\u2060", "\u180e",
    "\u202eabc\u202c", "\u2066abc\u2069", "\u200e1\u200f",
    "שלום עולם", "مرحبا بالعالم", "ﷺ", "أَلِف", "e\u0301", "\u0301", "e" + "\u0301" * 60, "ที่นี่", "각", "\u1100\u1161\u11a8", "ﬁ", "①", "㌖",
    "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇨🇳", "👍🏽", "\U0001f600", "𠮷野家", "\U0010ffff", "\U000e0041", "\ufffd", "\ufffe", "\uffff", "\ue000",
    # 控制字符与大小写
    "\x01", "\x02a\x03", "\x1b[31m", "\x1f", "\x7f", "\x80", "\x9f", "İ", "ı", "ſ", "ß", "ẞ", "Σς", "ǅ",
    # 白字在中间与两端
    "a b", "a  b", "a\u3000b", "a\u2028b", "\u2029a\u2029", "\x0ba\x0c", "\x85a\x85", "\xa0a\xa0",
]  # fmt: skip
BLANKS = ["", " ", "\t\n\r", "\u3000\u2003", "\x85\xa0", None]


def random_text(length: int) -> str:
    """压缩不了的文字：来自四字节的各个平面；每次都一样。"""
    source = random.Random(length)  # noqa: S311  # 只要重复得出来
    return "".join(map(chr, source.choices(range(0x10000, 0x110000), k=length)))


def load(chain: Chain, raw_data: RawData, rows: list[dict[str, Any]]) -> None:
    """导入、做完；再做一次一行也不写；结果要与参照实现一样。"""
    chain.announce(raw_data.add_import(rows))
    wanted = chain.expected()
    chain.run_due()
    again = chain.run(DAY)
    assert [(report.written.inserted, report.written.updated, report.written.deleted) for report in again] == [
        (0, 0, 0)
    ] * 3
    chain.assert_converged(wanted)


def orders(chain: Chain, *columns: str) -> list[tuple[Any, ...]]:
    return chain.rows(sa.select(*[ORDERS.c[name] for name in columns]).order_by(ORDERS.c.order_id))


def rules(chain: Chain) -> list[str]:
    return [rule for (rule,) in chain.rows(sa.select(rejected_rows.c.rule).order_by(rejected_rows.c.raw_id))]


# ---- 文字 ------------------------------------------------------------------------


def test_any_text_arrives_as_it_is(chain: Chain, raw_data: RawData) -> None:
    """BOM、COPY 的结束符、引号、换行、零宽与从右到左的字，在每一列里：一个也不少，一个也不变。"""
    for number, text in enumerate(TEXTS):
        raw_data.add_shop(UUID(int=number + 1), text)
        if number % 2:
            raw_data.map_type(text, "SAMPLE")
    columns = ("order_id", "shop", "customer_name", "order_type", "order_status")
    load(
        chain,
        raw_data,
        [{"order_id": f"{column} {text}", column: text} for column in columns for text in [*TEXTS, *BLANKS]],
    )
    assert ("\\.",) in orders(chain, "order_id")
    assert ("a\n\\.\nb",) in orders(chain, "latest_status")
    assert ("\ufeff\ufeffA",) in orders(chain, "customer_nickname")


def test_megabyte_texts_load_where_no_rule_limits_them(chain: Chain, raw_data: RawData) -> None:
    long = random_text(MEGABYTE // 4)
    load(chain, raw_data, [{"order_type": long, "order_status": long}, {"order_id": "B"}])
    assert orders(chain, "raw_order_type", "latest_status", "system_order_type") == [
        (long, long, "BULK"),
        ("大货订单", "completed", "BULK"),
    ]


def test_megabyte_names_are_rejected_and_the_others_load(chain: Chain, raw_data: RawData) -> None:
    load(
        chain,
        raw_data,
        [{"customer_name": "张" * MEGABYTE}, {"customer_name": random_text(MEGABYTE // 4)}, {"order_id": "B"}],
    )
    assert rules(chain) == ["text_too_long"] * 2
    assert orders(chain, "order_id") == [("B",)]


def test_megabyte_order_id_or_shop_is_rejected_and_the_others_load(chain: Chain, raw_data: RawData) -> None:
    long = random_text(MEGABYTE // 4)
    load(chain, raw_data, [{"order_id": long}, {"shop": long}, {"order_id": "B"}])
    assert rules(chain) == ["text_too_long", "unknown_shop"]
    assert orders(chain, "order_id") == [("B",)]


def test_texts_of_500_characters_that_do_not_compress_load(chain: Chain, raw_data: RawData) -> None:
    long = random_text(500)
    load(chain, raw_data, [{"order_id": long, "customer_name": long}, {"customer_name": "ﷺ" * 500}])
    assert orders(chain, "order_id", "customer_nickname") == [("A-1", "ﷺ" * 500), (long, long)]


def test_name_whose_key_no_index_holds_does_not_stop_the_others(chain: Chain, raw_data: RawData) -> None:
    """300 个字各变成几个，其余压缩不了：customer_key 有三千多字节，超过 B 树的 2704。"""
    expanding = sorted(map(chr, range(0x80, 0xD800)), key=lambda character: -len(normalize("NFKC", character).encode()))
    name = "".join(expanding[:300]) + random_text(200)
    chain.announce(raw_data.add_import([{"customer_name": name}, {"order_id": "B"}]))
    chain.run_due()
    assert orders(chain, "order_id") == [("B",)]
    assert rules(chain) == ["text_too_long"]


# ---- 数 --------------------------------------------------------------------------


def test_largest_numbers_add_up_exactly(chain: Chain, raw_data: RawData) -> None:
    rows = [{"order_id": f"{number:02}", "amount": LARGEST_AMOUNT, "quantity": 2**31 - 1} for number in range(20)]
    refunds = [
        {"order_id": f"R{number:02}", "amount": -LARGEST_AMOUNT, "quantity": 0, "customer_name": "退"}
        for number in range(20)
    ]
    load(chain, raw_data, [*rows, *refunds, {"quantity": -(2**31)}])
    assert rules(chain) == ["negative_quantity"]
    totals = sa.select(CUSTOMERS.c.total_amount, CUSTOMERS.c.bulk_amount).order_by(CUSTOMERS.c.total_amount)
    assert chain.rows(totals) == [
        (-20 * LARGEST_AMOUNT, -20 * LARGEST_AMOUNT),
        (20 * LARGEST_AMOUNT, 20 * LARGEST_AMOUNT),
    ]


def test_total_that_its_column_cannot_hold_is_an_error_and_not_another_number() -> None:
    """要一百万个最大的订单才到得了 numeric(20,2) 的边；到了就报错。"""
    largest = pl.DataFrame({"amount": pl.repeat(LARGEST_AMOUNT, 1_000_000, dtype=pl.Decimal(14, 2), eager=True)})
    assert largest.select(total_amount()).item() == 1_000_000 * LARGEST_AMOUNT
    with pytest.raises(InvalidOperationError, match=r"conversion .* failed"):
        pl.concat([largest, largest[:1]]).select(total_amount())


# ---- 时刻 ------------------------------------------------------------------------

MOMENTS = [
    "-infinity", "4714-11-24 00:00:00+00 BC", "0001-01-01 00:00:00+00 BC", "0001-12-31 12:00:00+00 BC", "0001-12-31 23:59:59.999999+00 BC",
    "0001-01-01 00:00:00+00", "0001-01-01 12:00:00+00", "0001-01-02 12:00:00+00", "1899-12-30 12:00:00+00", "1899-12-31 09:59:59.999999+00",
    "1899-12-31 15:54:16.999999+00", "1899-12-31 15:54:17+00", "1899-12-31 23:59:59.999999+00", "1900-01-01 00:00:00+00",
    "1900-01-01 04:56:01.999999+00", "1900-01-01 04:56:02+00", "1900-01-01 12:00:00.000001+00", "9999-12-30 12:00:00+00",
    "9999-12-31 09:59:59.999999+00", "9999-12-31 10:00:00+00", "9999-12-31 15:59:59.999999+00", "9999-12-31 16:00:00+00",
    "9999-12-31 23:59:59.999999+00", "10000-01-01 00:00:00+00", "10000-01-01 04:59:59.999999+00", "10000-01-01 05:00:00+00",
    "294276-12-31 23:59:59.999999+00", "infinity", None,
]  # fmt: skip


@pytest.mark.parametrize("timezone", ["Asia/Shanghai", "UTC", "America/New_York", "Pacific/Kiritimati"])
def test_moments_at_the_ends_of_time_are_judged_by_their_local_day(
    chain: Chain, raw_data: RawData, timezone: str
) -> None:
    """分区从最早允许的一天开始；一年与 9999 年的边界在各个时区的当地时间。"""
    local = Chain(
        chain.engine, chain.settings.model_copy(update={"timezone": timezone, "partitions_start": date(1900, 1, 1)})
    )
    local.announce(
        raw_data.add_import(
            [{"order_id": f"{number:02}", "ordered_at": moment} for number, moment in enumerate(MOMENTS)]
        )
    )
    assert local.due_days() == [date(1900, 1, 1)]
    local.run_due()
    local.assert_converged()
    found = set(rules(chain))
    assert found == {"missing_ordered_at", "bad_ordered_at", "outside_partitions"}
    assert chain.rows(sa.select(ORDERS.c.order_date).distinct()) == [(date(1900, 1, 1),)]


def test_infinite_completion_moments_are_the_newest_and_the_oldest_but_none(chain: Chain, raw_data: RawData) -> None:
    imports: list[tuple[str, Any]] = [
        ("newest", "infinity"),
        ("later", datetime(2026, 6, 1, tzinfo=UTC)),
        ("ancient", "4714-11-24 00:00:00+00 BC"),
        ("oldest", "-infinity"),
        ("none", None),
    ]
    import_ids = [raw_data.add_import([{"order_status": status}], completed_at=moment) for status, moment in imports]
    for (status, _), import_id in zip(imports, import_ids, strict=True):
        chain.run(DAY, assets=["orders"])
        assert (
            orders(chain, "latest_status")
            == [(status,)]
            == [(row["latest_status"],) for row in chain.expected().orders]
        )
        raw_data.set_status(import_id, "failed")
