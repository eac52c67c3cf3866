"""etl profiles：列出随包的配置，印出一个，给新文件起草一个。"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from bridge.cli.commands import run_command
from bridge.imports.files.source import open_source
from bridge.imports.orders.builder import OrderBuilder
from bridge.imports.orders.mapping import map_columns
from bridge.imports.orders.proposals import propose_columns
from bridge.imports.rules.profile import FileFormat, load_profile, shipped_platforms, shipped_profiles

from .platform_exports import SHAPES

Etl = Callable[..., int]
EXPORTS = Path(__file__).parents[1] / "exports"


@pytest.fixture
def etl() -> Etl:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            run_command(["profiles", *arguments])
        return int(ended.value.code or 0)

    return run


def imported(path: Path, profile_path: Path) -> tuple[int, Decimal, int, int]:
    """照这个配置读出的订单数、金额、件数、客户数。"""
    profile = load_profile(profile_path)
    source = open_source(path, profile.file)
    builder = OrderBuilder(source, map_columns(source, profile, overrides={}, shop=None), "Asia/Shanghai")
    orders = pl.concat([builder.build(block).orders for block in source.blocks])
    return orders.height, orders["amount"].sum(), orders["quantity"].sum(), orders["customer_name"].n_unique()


def test_the_profiles_are_listed_with_what_identifies_them_and_where_that_is_from(
    etl: Etl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etl("--format", "json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(shipped_profiles())
    assert rows["douyin"]["platform"] == "抖店"
    assert rows["shopee"]["headers"].startswith("Order ID or 訂單編號, Order Status or 訂單狀態, ")
    assert all(rows[name]["source"] for name in shipped_platforms())
    assert rows["cdnow"]["headers"] is None
    assert etl() == 0
    assert "woocommerce_lines" in capsys.readouterr().out


def test_a_shipped_profile_is_printed_as_it_is(etl: Etl, capsys: pytest.CaptureFixture[str]) -> None:
    assert etl("show", "etsy") == 0
    assert capsys.readouterr().out == shipped_profiles()["etsy"].read_text(encoding="utf-8")
    assert etl("show", "nothing") == 2
    assert "there is no shipped profile 'nothing': it is one of alibaba_1688, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "shop", "right"),
    [
        ("german.csv", "Laden", (6, "1005710.52", 18, 4)),
        ("mac_cr.csv", None, (20, "658.30", 50, 6)),
        ("shopify_orders_export.csv", "店", (12, "7070.75", 24, 6)),
        ("taobao.csv", None, (8, "409.47", 30, 5)),
    ],
)
def test_what_is_written_for_a_file_imports_it(
    etl: Etl,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    shop: str | None,
    right: tuple[int, str, int, int],
) -> None:
    written = tmp_path / "mine.toml"
    assert etl("new", str(EXPORTS / file), "--output", str(written), *(["--shop", shop] if shop else [])) == 0
    assert capsys.readouterr().err == f"wrote {written}\n"
    orders, amount, quantity, customers = right
    assert imported(EXPORTS / file, written) == (orders, Decimal(amount), quantity, customers)
    assert etl("new", str(EXPORTS / file), "--output", str(written)) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_one_sentence(
    etl: Etl, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nowhere = tmp_path / "no such folder" / "mine.toml"
    assert etl("new", str(EXPORTS / "douyin.csv"), "--output", str(nowhere)) == 2
    printed = capsys.readouterr().err
    assert printed == f"error: cannot write {nowhere} (No such file or directory): choose another path with --output\n"


def test_lines_of_one_order_are_grouped_and_every_column_has_its_reason(
    etl: Etl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.csv"
    rows = [
        "A-1,Ann,2026-03-02 09:05,Mug,2,10.50,21.00",
        "A-1,Ann,2026-03-02 09:05,Cup,1,10.50,10.50",
        "B-2,Bob,2026-03-03 10:00,Mug,1,9.00,9.00",
    ]
    path.write_text(
        "Order no.,Customer,Order date,Product,Qty,Unit price,Line total amount\n" + "\n".join(rows) + "\n",
        encoding="utf-8",
    )
    assert etl("new", str(path), "--shop", 'the "shop"') == 0
    text = capsys.readouterr().out
    assert "# Several lines share one 'Order no.': they become one order.\n[group]\nby = [\"Order no.\"]\n" in text
    assert 'shop = { constant = "the \\"shop\\"" }' in text
    assert 'amount = { column = "Line total amount", aggregate = "sum" } # such as "21.00"' in text
    assert 'order_status = { column = "…" } # nothing looks like it: stored as unknown' in text
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    assert imported(path, tmp_path / "mine.toml") == (2, Decimal("40.50"), 4, 2)


def test_a_line_break_in_the_name_of_the_file_stays_in_the_comment(
    etl: Etl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "orders\nkey = 1\x1b.csv"
    path.write_text("order_id,shop,customer_name,ordered_at\n1,s,x,2026-01-01\n", encoding="utf-8")
    assert etl("new", str(path)) == 0
    assert capsys.readouterr().out.startswith("# For files such as orders key = 1 .csv, read as ")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a,b\n1,x\n2,y\n", "nothing in the file looks like order_id, shop, customer_name, ordered_at"),
        (
            "order_id,customer_name,ordered_at\n1,x,2026-01-01\n",
            "nothing in the file looks like shop: give --shop NAME",
        ),
        (
            "order_id,shop,customer_name,ordered_at\n1,s,x,03/04/2026\n",
            "say --day-first or --month-first (in a profile: date_order of ordered_at)",
        ),
        (
            "order_id,shop,customer_name,ordered_at\n1,s,x,2026-01-01\n2,s,x,2026-02-30\n",
            "'2026-02-30' is not a possible date",
        ),
    ],
)
def test_what_would_not_import_is_said_and_the_exit_code_is_2(
    etl: Etl, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, problem: str
) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(content, encoding="utf-8")
    assert etl("new", str(path)) == 2
    captured = capsys.readouterr()
    assert "[orders]" in captured.out
    assert captured.err.startswith("error: the profile does not import orders.csv yet: ")
    assert problem in captured.err


@pytest.mark.parametrize(
    ("file", "proposed"),
    [
        (
            "shopify_orders_export.csv",
            {"order_id": "Id", "amount": "Total", "quantity": "Lineitem quantity", "ordered_at": "Created at"},
        ),
        (
            "amazon_jp.txt",
            {
                "order_id": "order-id",
                "quantity": "quantity-purchased",
                "ordered_at": "purchase-date",
                "amount": "item-price",
            },
        ),
        (
            "pdd.xlsx",
            {
                "order_id": "订单号",
                "order_status": "订单状态",
                "quantity": "商品数量(件)",
                "ordered_at": "订单成交时间",
            },
        ),
        (
            "etsy.csv",
            {"order_id": "Order ID", "amount": "Order Total", "quantity": "Number of Items", "ordered_at": "Sale Date"},
        ),
        ("lazada.xlsx", {"customer_name": "customerName", "amount": "paidPrice", "ordered_at": "createTime"}),
    ],
)
def test_proposals_look_at_names_and_values(file: str, proposed: dict[str, str]) -> None:
    found = propose_columns(open_source(EXPORTS / file, FileFormat()))
    assert {name: found.get(name) for name in proposed} == proposed


def test_a_column_without_values_is_never_proposed(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("Order ID,Order No.,Total\n,1,2.50\n,2,3.50\n", encoding="utf-8")
    assert propose_columns(open_source(path, FileFormat())) == {"order_id": "Order No.", "amount": "Total"}


def test_every_sample_file_has_the_header_of_its_shape() -> None:
    for name in ("taobao", "etsy", "ebay", "woocommerce", "youzan"):
        path = EXPORTS / f"{name}.csv"
        source = open_source(path, load_profile(name).file)
        assert [column for column in source.columns if column not in source.added] == [
            column.strip() for column in SHAPES[name].header
        ]
