"""etl import 读一单有几行的文件：没有说那是什么，什么也不导入；说了就对，也说出是怎样合的。"""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bridge.imports.files import encoding
from etl_assets.core.tables import import_tasks, raw_orders

from .etl_import import Import

EXPORTS = Path(__file__).parents[1] / "exports"
HEADER = "order_id,shop,customer_name,order_status,amount,quantity,ordered_at,item\n"
DOUYIN = ("douyin.csv", "--profile", "none", "--map", "customer_name=收件人", "--shop", "抖店")
JD = ("jd.csv", "--profile", "none", "--shop", "京东")
SHOPIFY = (
    *("shopify_orders_export.csv", "--profile", "none", "--shop", "Shopify"),
    *("--map", "order_id=Name", "--map", "customer_name=Billing Name", "--map", "order_status=Financial Status"),
    *("--map", "amount=Total", "--map", "quantity=Lineitem quantity", "--map", "ordered_at=Created at"),
)


@pytest.fixture
def import_export(etl_import: Import) -> Import:
    return lambda file, *arguments: etl_import(EXPORTS / file, "--create-shops", *arguments)


def sums(engine: sa.Engine) -> tuple[Any, ...]:
    columns = raw_orders.c
    figures = (
        sa.func.sum(columns.amount),
        sa.func.sum(columns.quantity),
        sa.func.count(columns.customer_name.distinct()),
    )
    with engine.connect() as connection:
        return tuple(connection.execute(sa.select(sa.func.count(), *figures)).one())


def is_empty(engine: sa.Engine) -> bool:
    with engine.connect() as connection:
        return all(
            connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0
            for table in (raw_orders, import_tasks)
        )


@pytest.mark.parametrize(
    ("arguments", "saw", "example"),
    [
        (DOUYIN, "5 of 9 order numbers come in several lines", "Order '692001100000000701' is in rows 2, 3, 4, "),
        (JD, "2 of 5 order numbers come in several lines", "Order '307100000101' is in rows 2, 3, 4, "),
        (SHOPIFY, "4 of 12 order numbers come in several lines", "Order '#2001' is in rows 2, 3, "),
    ],
)
def test_a_line_per_item_is_refused_with_three_ways_on(
    engine: sa.Engine, import_export: Import, arguments: tuple[str, ...], saw: str, example: str
) -> None:
    said = import_export(*arguments)
    assert (said.exit_code, said.out) == (2, "")
    assert said.err.startswith(f"error: {arguments[0]}: {saw}")
    assert example in said.err
    assert all(
        way in said.err
        for way in ("--lines-are-items  ", "[group]\n", "--newest-line-wins  ", "; nothing was imported: ")
    )
    assert is_empty(engine)


AMOUNT_OF_THE_ORDER = (
    "the same on all lines of an order (2 orders), taken once; if they are items of one price, say aggregate"
)


@pytest.mark.parametrize(
    ("arguments", "right", "taken"),
    [
        (DOUYIN, (9, "2630.25", 35, 6), ["'订单应付金额': summed over", "'商品数量': summed over"]),
        (
            JD,
            (5, "1043.70", 14, 4),
            [f"'应付金额': {AMOUNT_OF_THE_ORDER}", "'订购数量': summed over", "'下单帐号': the same on all lines"],
        ),
        (
            SHOPIFY,
            (12, "7070.75", 24, 6),
            ["'Total': on one line of an order only, taken once", "'Lineitem quantity': summed over"],
        ),
    ],
)
def test_said_to_be_items_the_lines_become_orders(
    engine: sa.Engine, import_export: Import, arguments: tuple[str, ...], right: tuple[Any, ...], taken: list[str]
) -> None:
    said = import_export(*arguments, "--lines-are-items")
    assert said.exit_code == 0
    orders, amount, quantity, customers = right
    assert sums(engine) == (orders, Decimal(amount), quantity, customers)
    assert all(f"column {text}" in said.err for text in taken)


def test_the_report_has_what_was_read(import_export: Import) -> None:
    said = import_export(*DOUYIN, "--lines-are-items", "--dry-run")
    assert (
        "days 2026-09-20 to 2026-09-24; sum of amounts 2,630.25; "
        "statuses 已完成 5 (completed), 已发货 2, 已关闭 1 (cancelled, not counted), 待发货 1\n"
    ) in said.err
    assert "\n9 orders from 15 rows of douyin.csv in " in said.err
    report = json.loads(import_export(*DOUYIN, "--lines-are-items", "--json").out)
    assert {name: report[name] for name in ("rows", "source_rows", "orders", "repeated_orders", "amount")} == {
        "rows": 9,
        "source_rows": 15,
        "orders": 9,
        "repeated_orders": 0,
        "amount": "2630.25",
    }
    assert report["statuses"][0] == {"status": "已完成", "rows": 5, "counts_as": "completed"}
    assert {"column": "商品数量", "aggregate": "sum", "taken": "summed over the lines of an order"} in report["merged"]


def test_said_to_be_versions_all_lines_are_stored_and_it_is_said(engine: sa.Engine, import_export: Import) -> None:
    said = import_export(*DOUYIN, "--newest-line-wins")
    assert (said.exit_code, sums(engine)[0]) == (0, 15)
    assert "5 order numbers come more than once: the last line of each is the order\n" in said.err
    assert "sum of amounts 2,630.25, all versions; " in said.err
    assert "\n15 versions of 9 orders from 15 rows of douyin.csv in " in said.err


@pytest.mark.parametrize("block_bytes", [512, 1 << 20])
def test_what_was_sent_before_the_lines_were_seen_is_taken_back(
    engine: sa.Engine, import_export: Import, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    rows = [f"A{n},店,张三,done,5,1,2026-03-02,x\n" for n in range(200)]
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + "".join(rows) + rows[7].replace("done", "closed"), encoding="utf-8")
    assert import_export(path).exit_code == 0
    assert sums(engine)[0] == 201
    path.write_text(HEADER + "".join(rows) + rows[7].replace(",x", ",y"), encoding="utf-8")
    said = import_export(path)
    assert said.exit_code == 2
    assert "1 of 200 order numbers comes in several lines that differ in more than their status" in said.err
    assert "Order 'A7' is in rows 9, 202, the columns that differ are 'item'; nothing was imported" in said.err
    assert sums(engine)[0] == 201


def test_a_profile_that_groups_takes_no_option(engine: sa.Engine, import_export: Import) -> None:
    said = import_export("douyin.csv", "--profile", str(EXPORTS / "douyin.toml"), "--lines-are-items")
    assert said.exit_code == 2
    assert "--lines-are-items (lines under [file]) and [group] both say" in said.err
    assert is_empty(engine)
