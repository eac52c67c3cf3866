"""平台与同事的 Excel 写出来的文件（tests/exports，名字都是编的）：各有一个对的结果。"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bridge.cli.commands import run_command
from bridge.imports.loading import import_file
from bridge.imports.rules.profile import Profile, load_profile, shipped_platforms
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders

from .commands import use_in_commands

Etl = Callable[..., int]
PAGES = b"<table><tr><td>order_id</td><td>customer_name</td></tr><tr><td>1</td><td>a</td></tr></table>" * 2
EXPORTS = Path(__file__).parents[1] / "exports"
PINDUODUO = Profile.model_validate(
    {
        "orders": {
            "order_id": {"column": "订单号"},
            "shop": {"constant": "拼多多"},
            "customer_name": {"column": "订单号"},
            "order_status": {"column": "订单状态"},
            "amount": {"column": "用户实付金额(元)"},
            "quantity": {"column": "商品数量(件)"},
            "ordered_at": {"column": "订单成交时间"},
        }
    }
)
AMAZON = Profile.model_validate(
    {
        "orders": {
            "order_id": {"column": "order-id"},
            "shop": {"constant": "Amazon"},
            "customer_name": {"column": "buyer-name"},
            "amount": {"column": "item-price"},
            "quantity": {"column": "quantity-purchased"},
            "ordered_at": {"column": "purchase-date"},
        }
    }
)
# 没有时间的行照样进 raw_orders，由 ETL 拒收
VALID = raw_orders.c.ordered_at.is_not(None)


def sums(engine: sa.Engine) -> tuple[Any, ...]:
    columns = raw_orders.c
    distinct = sa.func.count(columns.customer_name.distinct())
    statement = sa.select(sa.func.count(), sa.func.sum(columns.amount), sa.func.sum(columns.quantity), distinct).where(
        VALID
    )
    with engine.connect() as connection:
        return tuple(connection.execute(statement).one())


def names(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.scalars(sa.select(raw_orders.c.customer_name).distinct()))


def days(engine: sa.Engine, time_zone: str) -> dict[str, Decimal]:
    day = sa.func.to_char(sa.func.timezone(time_zone, raw_orders.c.ordered_at), "MM-DD")
    with engine.connect() as connection:
        found = connection.execute(sa.select(day, sa.func.sum(raw_orders.c.amount)).where(VALID).group_by(day))
        return {row[0]: row[1] for row in found}


@pytest.mark.parametrize(
    ("file", "profile", "right", "read_as"),
    [
        (
            "amazon_jp.txt",
            "amazon_jp.toml",
            (10, "64070.00", 74, 5),
            "text, Shift_JIS, tab, no quotes, header in row 1",
        ),
        (
            "shift_jis_that_looks_like_gb18030.txt",
            AMAZON,
            (3, "8480.00", 4, 2),
            "text, Shift_JIS, tab, header in row 1",
        ),
        ("german.csv", "german.toml", (6, "1005710.52", 18, 4), "text, Windows-1252, semicolon, header in row 2"),
        ("mac_cr.csv", None, (20, "658.30", 50, 6), "text, UTF-8, comma, header in row 1"),
        ("trailing_left_out.csv", None, (20, "658.30", 50, 6), "text, UTF-8, comma, header in row 1"),
        (
            "pdd.xlsx",
            PINDUODUO,
            (14, "466.35", 28, 14),
            "workbook, sheet '订单明细', header in row 2, 1 total row left out",
        ),
        (
            "far_right.xlsx",
            None,
            (12, "519.78", 30, 5),
            "workbook, sheet 'Sheet', header in row 1, far from the table and left out: XFD3",
        ),
        ("html.xls", None, (8, "293.24", 20, 5), "HTML, GB18030, header in row 1"),
        ("orders.zip", None, (8, "293.24", 20, 5), "text, from '订单导出.csv', UTF-8, comma, header in row 1"),
    ],
)
def test_an_export_gives_its_right_result(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    file: str,
    profile: str | Profile | None,
    right: tuple[Any, ...],
    read_as: str,
) -> None:
    loaded = load_profile(EXPORTS / profile) if isinstance(profile, str) else profile
    report = import_file(engine, EXPORTS / file, settings=etl_settings, profile=loaded)
    orders, amount, quantity, customers = right
    assert sums(engine) == (orders, Decimal(amount), quantity, customers)
    assert str(report.read_as) == read_as
    if file == "amazon_jp.txt":
        assert names(engine) == {"佐藤 花子", "山﨑 美咲", "鈴木 次郎", "髙橋 一郎", "ﾔﾏﾀﾞ ﾀﾛｳ"}
        expected = {"06-05": Decimal("16530.00"), "06-06": Decimal("28720.00"), "06-07": Decimal("18820.00")}
        assert days(engine, etl_settings.timezone) == expected
    if file == "shift_jis_that_looks_like_gb18030.txt":
        assert names(engine) == {"佐藤 花子", "田中 一郎"}
    if file == "german.csv":
        assert days(engine, etl_settings.timezone) == {
            "07-01": Decimal("4711.98"),
            "07-02": Decimal("-2.50"),
            "07-03": Decimal("1001001.04"),
        }
    if file == "pdd.xlsx":
        assert report.rows == 16


@pytest.fixture
def etl(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Etl:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, engine=engine, settings=etl_settings)

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            run_command(["import", *arguments])
        return int(ended.value.code or 0)

    return run


def test_how_a_file_was_read_is_reported(etl: Etl, capsys: pytest.CaptureFixture[str]) -> None:
    assert etl(str(EXPORTS / "mac_cr.csv"), "--dry-run") == 0
    assert "read as text, UTF-8, comma, header in row 1\n" in capsys.readouterr().err
    assert etl(str(EXPORTS / "mac_cr.csv"), "--dry-run", "--json") == 0
    shape = json.loads(capsys.readouterr().out)["read_as"]
    assert (shape["encoding"], shape["separator"], shape["header_row"], shape["total_rows"]) == ("UTF-8", ",", 1, 0)


# 每个平台一个样子的文件，由表头认出；和是照写文件的人的账算的
SAMPLES = [
    (
        "taobao.csv",
        "taobao",
        (8, "409.47", 30, 5),
        {"买家已付款，等待卖家发货", "交易关闭", "交易成功", "等待买家付款"},
    ),
    ("jingdong.csv", "jd", (8, "409.47", 30, 5), {"(锁定)等待出库", "已取消", "已完成", "等待出库", "等待确认收货"}),
    ("pdd.xlsx", "pinduoduo", (14, "466.35", 28, 14), {"已完成", "已发货，待收货", "退款成功"}),
    ("douyin.csv", "douyin", (9, "2630.25", 35, 6), {"已完成", "已发货", "待发货", "已关闭"}),
    (
        "alibaba_1688.xlsx",
        "alibaba_1688",
        (8, "459.47", 30, 5),
        {"交易关闭", "交易成功", "等待买家付款", "等待卖家发货"},
    ),
    ("xiaohongshu.xlsx", "xiaohongshu", (8, "378.61", 29, 5), {"已发货", "已完成", "待配货", "退款成功"}),
    ("youzan.csv", "youzan", (8, "409.47", None, 5), {"交易关闭", "已完成", "已退款", "待发货"}),
    (
        "shopify_orders_export.csv",
        "shopify",
        (12, "7070.75", 24, 6),
        {"paid", "pending", "refunded", "partially_refunded", "cancelled"},
    ),
    ("woocommerce.csv", "woocommerce", (8, "409.47", 30, 5), {"cancelled", "completed", "on-hold", "processing"}),
    (
        "woocommerce_lines.csv",
        "woocommerce_lines",
        (8, "459.47", 30, 5),
        {"cancelled", "completed", "on-hold", "processing"},
    ),
    ("amazon_jp.txt", "amazon_jp", (10, "64070.00", 74, 5), set()),
    ("amazon_us.txt", "amazon_us", (8, "459.47", 30, 8), {"Cancelled", "Pending", "Shipped", "delivered"}),
    ("amazon_eu.txt", "amazon_eu", (8, "459.47", 30, 8), {"Cancelled", "Pending", "Shipped", "delivered"}),
    ("etsy.csv", "etsy", (8, "459.47", 30, 5), {"Canceled", "Completed"}),
    ("etsy_items.csv", "etsy_items", (8, "465.47", 30, 5), set()),
    ("ebay.csv", "ebay", (8, "459.47", 30, 5), set()),
    ("shopee.xlsx", "shopee", (8, "459.47", 30, 5), {"Cancelled", "Completed", "Shipping", "To ship", "refunded"}),
    ("lazada.xlsx", "lazada", (8, "378.61", 14, 5), {"canceled", "completed", "delivered", "pending", "shipped"}),
]


@pytest.mark.parametrize(("file", "profile", "right", "states"), SAMPLES)
def test_the_export_of_a_platform_is_imported_by_its_headers(
    etl: Etl,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    capsys: pytest.CaptureFixture[str],
    file: str,
    profile: str,
    right: tuple[int, str, int | None, int],
    states: set[str],
) -> None:
    assert etl(str(EXPORTS / file), "--shop", "店", "--dry-run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["profile"], report["profile_chosen"]) == (profile, True)
    import_file(engine, EXPORTS / file, settings=etl_settings, shop="店", choose_profile=True)
    orders, amount, quantity, customers = right
    assert sums(engine) == (orders, Decimal(amount), quantity, customers)
    with engine.connect() as connection:
        stored = set(
            connection.scalars(
                sa.select(raw_orders.c.order_status).where(VALID, raw_orders.c.order_status.is_not(None))
            )
        )
    assert stored == states


def test_every_platform_has_a_sample() -> None:
    assert {profile for _, profile, _, _ in SAMPLES} == set(shipped_platforms())


def test_the_choice_is_said_declined_and_forced(etl: Etl, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(EXPORTS / "taobao.csv")
    assert etl(path, "--dry-run") == 0
    assert (
        "profile taobao, chosen by the headers (--profile none reads the file without it)\n" in capsys.readouterr().err
    )
    assert etl(path, "--dry-run", "--profile", "none", "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"] is None
    assert etl(path, "--dry-run", "--profile", "taobao", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["profile"], report["profile_chosen"]) == ("taobao", False)
    assert etl(str(EXPORTS / "shopify_orders_export.csv"), "--dry-run") == 2
    assert "there is no column for shop: the profile shopify does not say which shop it is" in capsys.readouterr().err
    assert etl(str(EXPORTS / "mac_cr.csv"), "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["profile"] is None


DECLINED = [
    word for name in ("shop", "order_status", "amount", "quantity", "ordered_at") for word in ("--map", f"{name}=")
]


@pytest.mark.parametrize(
    ("content", "options", "read_as"),
    [
        (
            "order_id,customer_name\n1,高峰\n".encode("gb18030"),
            ["--encoding", "gb18030"],
            "text, GB18030, comma, header in row 1",
        ),
        (b'order_id\tcustomer_name\n1\t"a\n2\tb"\n', ["--no-quotes"], "text, UTF-8, tab, no quotes, header in row 1"),
        (
            b"x;y\norder_id:customer_name\n1:a;b\n",
            ["--separator", ":", "--header-row", "2"],
            "text, UTF-8, ':', header in row 2",
        ),
        (b"order_id\tcustomer_name\n1\ta\n", ["--separator", "tab", "--quotes"], "text, UTF-8, tab, header in row 1"),
        (b"order_id,customer_name\n1,a\nTotal,\n", [], "text, UTF-8, comma, header in row 1, 1 total row left out"),
        (b"order_id,customer_name\n1,a\nTotal,\n", ["--keep-totals"], "text, UTF-8, comma, header in row 1"),
        (PAGES, ["--sheet", "2"], "HTML, UTF-8, sheet '2', header in row 1"),
    ],
)
def test_every_finding_has_its_option(
    etl: Etl, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, options: list[str], read_as: str
) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(content)
    assert etl(str(path), "--dry-run", *DECLINED, *options) == 0
    assert f"read as {read_as}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        ("order_id,customer_name\n1,高峰\n".encode("gb18030"), [], "can be read as GB18030 ('高峰') and as EUC-KR"),
        (
            b'order_id\tcustomer_name\n1\t"a\n2\tb"\n3\tc\n',
            [],
            "with quotes around fields the file has 3 records, without 4",
        ),
        (b"order_id,customer_name\n1,a\n2,", ["--header-row", "7"], "there is no header in row 7"),
        (
            b"order_id,customer_name,note\n1,a,b\n2,c",
            [],
            "row 3, column 'customer_name': is cut off: the file ends before",
        ),
        (
            b"order_id,customer_name\n1,a\n2\n",
            [],
            "row 3, column 'customer_name': is missing: the row has 1 fields instead of 2",
        ),
        (b"order_id,customer_name\n1,a\0b\n", [], "row 2, column 'customer_name': 'a\\x00b' contains a NUL byte"),
        (b"a,b\n1,2\n", ["--encoding", "klingon"], "the options do not fit: encoding: must be a text encoding such as"),
        (
            b"a,b\n1,2\n",
            ["--separator", ",,"],
            "the options do not fit: separator: String should have at most 1 character",
        ),
        (b"%PDF-1.4", [], "the file is a PDF document, not a table"),
        (b"PK\x03\x04 rubbish", [], "the workbook cannot be read"),
        (b"\xd0\xcf\x11\xe0 rubbish", [], "the workbook cannot be read"),
        (b"\x1f\x8b rubbish", [], "the archive cannot be unpacked"),
        (PAGES, [], "several sheets hold something: '1', '2'"),
        (PAGES, ["--sheet", "3"], "there is no sheet '3'; the file has '1', '2'"),
        (b"", [], "the file is empty"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_and_nothing_is_imported(
    etl: Etl,
    engine: sa.Engine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    options: list[str],
    problem: str,
) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(content)
    assert etl(str(path), *DECLINED, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert problem in error
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(import_tasks)) == 0
