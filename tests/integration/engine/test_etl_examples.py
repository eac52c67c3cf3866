"""DOMAIN 各条规则的例子：从 raw_orders 到三张表，结果写成字面值，也与参照实现比较。"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from etl_assets.core.etl_tables import rejected_rows
from etl_assets.core.tables import raw_orders, target_tables
from etl_assets.core.text import WHITE_SPACE
from etl_assets.reports.reports import import_accounting
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import SAMPLE_SHOP, SAMPLE_SHOP_NAME, RawData
from tests.integration.engine.chain import Chain
from tests.reference.oracle import ReferenceSettings

DAY = date(2026, 1, 5)
OTHER_SHOP = UUID("00000000-0000-4000-8000-000000000002")
ZHANG = f"{SAMPLE_SHOP}:张三"
ZHANG_ID = "fa55f60f-e32c-5a53-a54e-925cf73a97da"
TABLES = target_tables("public")
ORDERS, CUSTOMERS, LEADS = TABLES.orders, TABLES.customers, TABLES.leads


def at(day: int, *, month: int = 1, hour: int = 4, minute: int = 0) -> datetime:
    return datetime(2026, month, day, hour, minute, tzinfo=UTC)


def completed(hour: int) -> datetime:
    return datetime(2026, 6, 1, hour, tzinfo=UTC)


def load(chain: Chain, raw_data: RawData, *imports: list[dict[str, Any]]) -> None:
    """依次完成的几次导入，每次都把到期的日子做完；结果要与参照实现一样。"""
    for hour, rows in enumerate(imports):
        chain.announce(raw_data.add_import(rows, completed_at=completed(hour)))
        wanted = chain.expected()
        chain.run_due()
        chain.assert_converged(wanted)


def with_settings(chain: Chain, **changes: Any) -> Chain:
    return Chain(chain.engine, chain.settings.model_copy(update=changes))


def leads_of(chain: Chain, *columns: str) -> list[tuple[Any, ...]]:
    return chain.rows(sa.select(*[LEADS.c[name] for name in ("lead_no", *columns)]).order_by(LEADS.c.lead_no))


def close_lead(chain: Chain, lead_no: int, closed_at: datetime) -> None:
    closing = {"closed_by": "user", "closed_at": closed_at, "current_stage": "LOST"}
    chain.execute(sa.update(LEADS).where(LEADS.c.lead_no == lead_no).values(**closing))


# ---- 评判与账目 ------------------------------------------------------------------


def test_every_rule_rejects_its_row_and_every_row_is_accounted_for(chain: Chain, raw_data: RawData) -> None:
    rejected: list[tuple[str, dict[str, Any]]] = [
        ("missing_order_id", {"order_id": WHITE_SPACE}),
        ("missing_order_id", {"order_id": None, "shop": None, "ordered_at": None}),
        ("missing_shop", {"shop": ""}),
        ("unknown_shop", {"shop": f"{SAMPLE_SHOP_NAME}2"}),
        ("missing_customer_name", {"customer_name": "\u3000"}),
        ("missing_ordered_at", {"ordered_at": None}),
        ("bad_ordered_at", {"ordered_at": "infinity"}),
        ("bad_ordered_at", {"ordered_at": "-infinity"}),
        ("bad_ordered_at", {"ordered_at": "0001-12-31 12:00:00+00 BC"}),
        ("bad_ordered_at", {"ordered_at": "9999-12-31 16:00:00+00"}),  # 上海已是 10000 年
        ("bad_ordered_at", {"ordered_at": "294276-01-01 00:00:00+00"}),
        ("outside_partitions", {"ordered_at": "9999-12-31 15:59:59.999999+00"}),
        ("outside_partitions", {"ordered_at": "0001-12-31 15:54:17+00 BC"}),  # 上海当时比 UTC 早 8:05:43
        ("outside_partitions", {"ordered_at": "1999-12-31 15:59:59.999999+00"}),
        ("bad_amount", {"amount": "NaN"}),
        ("negative_quantity", {"quantity": -1}),
        ("text_too_long", {"order_id": "x" * 501}),
        ("text_too_long", {"customer_name": "张" * 501}),
    ]
    valid: list[dict[str, Any]] = [
        {"order_id": "first partition", "ordered_at": "1999-12-31 16:00:00+00"},
        {"order_id": f"{WHITE_SPACE}padded{WHITE_SPACE}", "shop": f" {SAMPLE_SHOP_NAME}\u3000"},
        {"order_id": "'; DROP TABLE orders; --", "customer_name": 'a"b\\c\r\nd,e%s'},
        {"order_id": "x" * 500, "customer_name": "\U0001f600" * 500, "amount": "-0.01", "quantity": 0},
    ]
    superseded = [{"order_id": "padded", "order_status": "old"}]
    chain.announce(raw_data.add_import(superseded, completed_at=completed(1)))
    import_id = raw_data.add_import([row for _, row in rejected] + valid, completed_at=completed(2))
    chain.announce(import_id)
    chain.run_due()
    chain.assert_converged()
    found = Counter(rule for (rule,) in chain.rows(sa.select(rejected_rows.c.rule)))
    assert found == Counter(rule for rule, _ in rejected)
    with chain.engine.connect() as connection:
        newest, oldest = import_accounting(connection, chain.settings)
    assert [newest[name] for name in ("raw", "loaded", "superseded", "rejected", "waiting")] == [22, 4, 0, 18, 0]
    assert [oldest[name] for name in ("raw", "loaded", "superseded", "rejected", "waiting")] == [1, 0, 1, 0, 0]


def test_today_is_the_last_partition(chain: Chain, raw_data: RawData) -> None:
    zone = chain.settings.zone
    today = chain.settings.today()
    last_moment = datetime.combine(today, time.max, zone)
    rows: list[dict[str, Any]] = [
        {"ordered_at": last_moment},
        {"order_id": "B", "ordered_at": last_moment + timedelta(microseconds=1)},
    ]
    chain.announce(raw_data.add_import(rows))
    chain.run_due()
    assert chain.rows(sa.select(ORDERS.c.order_id, ORDERS.c.order_date)) == [("A-1", today)]
    assert chain.rows(sa.select(rejected_rows.c.rule, rejected_rows.c.day)) == [
        ("outside_partitions", today + timedelta(days=1))
    ]


def test_only_completed_imports_are_in_scope(chain: Chain, raw_data: RawData) -> None:
    for status in ("pending", "failed", "COMPLETED"):
        raw_data.add_import([{"order_id": status}], status=status)
    raw_data.add_import([{"order_id": "completed"}])
    chain.run(DAY)
    assert chain.rows(sa.select(ORDERS.c.order_id)) == [("completed",)]
    chain.assert_converged()


# ---- 业务日 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timezone", "moment", "day"),
    [
        ("Asia/Shanghai", datetime(2026, 1, 4, 15, 59, 59, 999999, UTC), date(2026, 1, 4)),
        ("Asia/Shanghai", datetime(2026, 1, 4, 16, 0, 0, 0, UTC), date(2026, 1, 5)),
        ("UTC", datetime(2026, 1, 4, 16, 0, 0, 0, UTC), date(2026, 1, 4)),
        (
            "America/New_York",
            datetime(2026, 3, 9, 3, 59, 59, 999999, UTC),
            date(2026, 3, 8),
        ),  # 夏令时的第一天只有 23 小时
        ("America/New_York", datetime(2026, 3, 9, 4, 0, 0, 0, UTC), date(2026, 3, 9)),
        ("Pacific/Kiritimati", datetime(2026, 1, 4, 10, 0, 0, 0, UTC), date(2026, 1, 5)),
    ],
)
def test_business_day_is_the_calendar_day_of_the_time_zone(
    chain: Chain, raw_data: RawData, timezone: str, moment: datetime, day: date
) -> None:
    local = with_settings(chain, timezone=timezone)
    raw_data.add_import([{"ordered_at": moment}])
    local.run(day - timedelta(days=1))
    local.run(day + timedelta(days=1))
    assert chain.rows(sa.select(ORDERS.c.order_date)) == []
    local.run(day)
    assert chain.rows(sa.select(ORDERS.c.order_date)) == [(day,)]
    local.assert_converged()


def test_changed_time_zone_takes_effect_on_the_days_that_are_materialized_again(
    chain: Chain, raw_data: RawData
) -> None:
    raw_data.add_import([{"ordered_at": at(4, hour=20)}])
    chain.run(DAY)
    utc = with_settings(chain, timezone="UTC")
    utc.run(date(2026, 1, 4), DAY)
    assert chain.rows(sa.select(ORDERS.c.order_date)) == [(date(2026, 1, 4),)]
    utc.assert_converged()


# ---- 赢家与值 --------------------------------------------------------------------


def test_import_without_a_completion_moment_is_older_than_any_other(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"order_status": "old"}], completed_at=datetime(1970, 1, 1, tzinfo=UTC))
    raw_data.add_import([{"order_status": "no moment"}], completed_at=None)
    chain.run(DAY)
    assert chain.rows(sa.select(ORDERS.c.latest_status)) == [("old",)]
    chain.assert_converged()


def test_among_imports_of_one_moment_the_later_row_wins(chain: Chain, raw_data: RawData) -> None:
    for moment in (None, completed(1)):
        for number in range(3):
            raw_data.add_import([{"order_status": f"{number}a"}, {"order_status": f"{number}b"}], completed_at=moment)
    chain.run(DAY)
    assert chain.rows(sa.select(ORDERS.c.latest_status)) == [("2b",)]
    chain.assert_converged()


def test_order_has_the_values_of_its_winner(chain: Chain, raw_data: RawData, read_table: ReadTable) -> None:
    old = {"order_id": "A", "order_status": "new", "amount": "9.99"}
    new = {
        "order_id": " A\t",
        "customer_name": " 张三 ",
        "order_type": " 打样订单",
        "order_status": None,
        "amount": None,
        "quantity": None,
    }
    load(chain, raw_data, [old], [new])
    import_id, raw_id = chain.rows(
        sa.select(raw_orders.c.import_id, raw_orders.c.raw_id).order_by(raw_orders.c.raw_id)
    )[-1]
    assert read_table("orders").to_dicts() == [
        {
            "shop_id": str(SAMPLE_SHOP),
            "order_id": "A",
            "customer_nickname": "张三",
            "latest_status": "unknown",
            "raw_order_type": "打样订单",
            "system_order_type": "SAMPLE",
            "amount": Decimal("0.00"),
            "quantity": 1,
            "ordered_at": at(5),
            "order_date": DAY,
            "import_id": str(import_id),
            "raw_id": raw_id,
        }
    ]


def test_same_file_twice_differs_only_in_import_and_raw_id(
    chain: Chain, raw_data: RawData, read_table: ReadTable
) -> None:
    rows: list[dict[str, Any]] = [
        {"order_id": "A"},
        {"order_id": "B", "order_status": "cancelled", "amount": None},
        {"order_id": "C", "quantity": -1},
    ]
    load(chain, raw_data, rows)
    first = [read_table(name) for name in ("orders", "customers", "business_leads")]
    load(chain, raw_data, rows)
    second = [read_table(name) for name in ("orders", "customers", "business_leads")]
    assert not first[0].equals(second[0])
    assert first[0].drop("import_id", "raw_id").equals(second[0].drop("import_id", "raw_id"))
    assert all(before.equals(after) for before, after in zip(first[1:], second[1:], strict=True))


def test_changed_type_mapping_takes_effect_when_the_day_is_materialized_again(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"order_type": "定制"}])
    chain.run(DAY)
    raw_data.map_type("定制", "PROOF")
    chain.run(DAY)
    assert chain.rows(sa.select(ORDERS.c.system_order_type)) == [("PROOF",)]
    assert chain.rows(sa.select(CUSTOMERS.c.proof_count)) == [(1,)]
    chain.assert_converged()


# ---- 客户 ------------------------------------------------------------------------


def test_names_that_normalize_to_one_key_are_one_customer(chain: Chain, raw_data: RawData) -> None:
    names = ["ＡＢＣ　公司", "ABC 公司", " ABC\t\u2003公司\x85"]
    load(chain, raw_data, [{"order_id": str(number), "customer_name": name} for number, name in enumerate(names)])
    assert chain.rows(sa.select(CUSTOMERS.c.customer_key, CUSTOMERS.c.customer_nickname, CUSTOMERS.c.order_count)) == [
        (f"{SAMPLE_SHOP}:ABC 公司", "ABC\t\u2003公司", 3)
    ]


def test_same_name_in_two_shops_is_two_customers(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_shop(OTHER_SHOP, "二店")
    load(chain, raw_data, [{}, {"shop": "二店"}])
    keys = chain.rows(sa.select(CUSTOMERS.c.customer_key).order_by(CUSTOMERS.c.customer_key))
    assert keys == [(ZHANG,), (f"{OTHER_SHOP}:张三",)]


def test_customer_is_computed_over_the_whole_history_whatever_the_day(
    chain: Chain, raw_data: RawData, read_table: ReadTable
) -> None:
    rows: list[dict[str, Any]] = [
        {"order_id": "1", "order_type": "打样订单", "amount": "1.00", "ordered_at": at(1)},
        {"order_id": "2", "order_type": "产前样订单", "amount": "2.00", "ordered_at": at(3)},
        {"order_id": "3", "amount": "-0.50", "ordered_at": at(5)},
        {"order_id": "4", "amount": "1000.00", "ordered_at": at(9), "order_status": "已退款", "customer_name": "张三 "},
    ]
    raw_data.add_import(rows)
    chain.run(date(2026, 1, 1), date(2026, 1, 9), assets=["orders"])
    chain.run(date(2026, 1, 3), assets=["customers"])
    assert read_table("customers").to_dicts() == [
        {
            "customer_global_id": ZHANG_ID,
            "customer_key": ZHANG,
            "shop_id": str(SAMPLE_SHOP),
            "customer_nickname": "张三",
            "first_order_at": at(1),
            "last_order_at": at(5),
            "order_count": 3,
            "total_amount": Decimal("2.50"),
            "sample_count": 1,
            "proof_count": 1,
            "bulk_count": 1,
            "sample_amount": Decimal("1.00"),
            "proof_amount": Decimal("2.00"),
            "bulk_amount": Decimal("-0.50"),
        }
    ]


def test_orders_of_one_moment_are_ordered_by_code_point(chain: Chain, raw_data: RawData) -> None:
    """\U0001f600 在 UTF-16 里排在 \uff5e 之前，按码点在后；语言排序则会把 a 排在 B 之前。"""
    ids = ["\U0001f600", "\uff5e", "中", "a", "B"]
    load(
        chain,
        raw_data,
        [{"order_id": name, "customer_name": f"ABC{' ' * number}X"} for number, name in enumerate(ids, start=1)],
    )
    assert chain.rows(sa.select(CUSTOMERS.c.customer_nickname)) == [("ABC X",)]
    load(chain, raw_data, [{"order_id": "\U0001f600", "order_status": "已退款", "customer_name": "别人"}])
    nickname = sa.select(CUSTOMERS.c.customer_nickname).where(CUSTOMERS.c.customer_key.like("%ABC X"))
    assert chain.rows(nickname) == [("ABC  X",)]


def test_status_in_both_lists_counts_as_cancelled(chain: Chain, raw_data: RawData) -> None:
    both = with_settings(chain, cancelled_statuses=("void", "done"), completed_statuses=("done", "gross"))
    raw_data.add_import(
        [
            {"order_id": "1", "order_status": " DONE\u3000", "ordered_at": at(5, hour=1)},
            {"order_id": "2", "order_status": "cancelled", "ordered_at": at(5, hour=2)},
            {"order_id": "3", "order_status": "GROẞ", "ordered_at": at(5, hour=3)},
            {"order_id": "4", "order_status": "completed", "ordered_at": at(5, hour=4)},
        ]
    )
    both.run(DAY)
    assert chain.rows(sa.select(CUSTOMERS.c.order_count)) == [(3,)]
    assert leads_of(chain, "current_stage", "bulk_count") == [(1, "WON", 2), (2, "OPEN", 1)]
    both.assert_converged()


def test_what_platforms_call_a_cancelled_order_does_not_count(chain: Chain, raw_data: RawData) -> None:
    names = ["交易关闭", "交易取消", "退款成功", "VOIDED", "wc-cancelled", "Wc-Refunded\u3000", "已取消", "交易成功"]
    load(chain, raw_data, [{"order_id": str(number), "order_status": name} for number, name in enumerate(names)])
    assert chain.rows(sa.select(CUSTOMERS.c.order_count)) == [(1,)]
    assert ReferenceSettings().cancelled_statuses == chain.settings.cancelled_statuses


def test_customer_whose_orders_are_all_cancelled_keeps_zeros_and_has_no_lead(chain: Chain, raw_data: RawData) -> None:
    load(chain, raw_data, [{}], [{"order_status": "closed"}])
    columns = (CUSTOMERS.c.order_count, CUSTOMERS.c.total_amount, CUSTOMERS.c.first_order_at, CUSTOMERS.c.last_order_at)
    assert chain.rows(sa.select(*columns)) == [(0, Decimal("0.00"), None, None)]
    assert leads_of(chain) == []


# ---- 商机 ------------------------------------------------------------------------


def test_sample_proof_and_bulk_order_make_one_lead_and_the_next_order_another(
    chain: Chain, raw_data: RawData, read_table: ReadTable
) -> None:
    rows: list[dict[str, Any]] = [
        {"order_id": "1", "order_type": "打样订单", "amount": "1.00", "ordered_at": at(1)},
        {"order_id": "2", "order_type": "产前样订单", "amount": "2.00", "ordered_at": at(2)},
        {"order_id": "3", "amount": "300.00", "ordered_at": at(3), "order_status": "交易成功"},
        {"order_id": "4", "order_type": "打样订单", "amount": "4.00", "ordered_at": at(3, hour=5)},
    ]
    load(chain, raw_data, rows)
    won, opened = read_table("business_leads").sort("lead_no").to_dicts()
    assert won == {
        "lead_id": "fd4ef8d1-2684-5631-8acd-3c839ea84862",
        "customer_global_id": ZHANG_ID,
        "lead_no": 1,
        "current_stage": "WON",
        "opened_at": at(1),
        "last_order_at": at(3),
        "closed_at": at(3),
        "closed_by": "etl",
        "sample_count": 1,
        "proof_count": 1,
        "bulk_count": 1,
        "sample_amount": Decimal("1.00"),
        "proof_amount": Decimal("2.00"),
        "bulk_amount": Decimal("300.00"),
        "owner": None,
        "notes": None,
    }
    assert (opened["lead_no"], opened["current_stage"], opened["opened_at"], opened["closed_at"]) == (
        2,
        "OPEN",
        at(3, hour=5),
        None,
    )


def test_late_order_changes_which_orders_a_number_holds(chain: Chain, raw_data: RawData) -> None:
    load(
        chain,
        raw_data,
        [{"order_id": "1", "ordered_at": at(5)}, {"order_id": "2", "ordered_at": at(9), "order_status": "new"}],
    )
    assert leads_of(chain, "current_stage", "opened_at") == [(1, "WON", at(5)), (2, "OPEN", at(9))]
    chain.execute(sa.update(LEADS).where(LEADS.c.lead_no == 2).values(owner="王五"))
    load(chain, raw_data, [{"order_id": "0", "ordered_at": at(2)}])
    assert leads_of(chain, "current_stage", "opened_at", "owner") == [
        (1, "WON", at(2), None),
        (2, "WON", at(5), "王五"),
        (3, "OPEN", at(9), None),
    ]


def test_won_lead_opens_again_when_its_bulk_order_is_refunded(chain: Chain, raw_data: RawData) -> None:
    sample = {"order_id": "1", "order_type": "打样订单", "ordered_at": at(4)}
    load(chain, raw_data, [sample, {"order_id": "2"}], [{"order_id": "2", "order_status": "refunded"}])
    assert leads_of(chain, "current_stage", "closed_at", "closed_by") == [(1, "OPEN", None, None)]


def test_closings_of_a_person_cut_the_history_and_stay(chain: Chain, raw_data: RawData) -> None:
    load(
        chain, raw_data, [{"order_id": str(day), "ordered_at": at(day), "order_status": "new"} for day in (1, 3, 5, 7)]
    )
    close_lead(chain, 1, at(3))
    load(chain, raw_data, [{"order_id": "6", "ordered_at": at(6), "order_status": "new"}])
    assert leads_of(chain, "current_stage", "opened_at", "last_order_at", "bulk_count") == [
        (1, "LOST", at(1), at(3), 2),
        (2, "OPEN", at(5), at(7), 3),
    ]
    close_lead(chain, 2, at(4))
    load(chain, raw_data, [{"order_id": "2", "ordered_at": at(2)}, {"order_id": "8", "ordered_at": at(8)}])
    assert leads_of(chain, "current_stage", "opened_at", "last_order_at", "bulk_count") == [
        (1, "LOST", at(1), at(3), 3),
        (2, "LOST", None, None, 0),
        (3, "WON", at(5), at(8), 4),
    ]


def test_cold_is_judged_by_business_days_not_by_utc_days(chain: Chain, raw_data: RawData) -> None:
    """最后一单在上海的 1 月 6 日（UTC 还是 5 日），最新的一天是 4 月 6 日：正好 90 天，不冷。"""
    old = {"order_id": "1", "order_status": "new", "ordered_at": at(5, hour=16, minute=30)}
    load(chain, raw_data, [old])
    load(
        chain,
        raw_data,
        [{"order_id": "2", "customer_name": "李四", "order_type": "打样订单", "ordered_at": at(6, month=4)}],
    )
    assert {stage for _, stage in leads_of(chain, "current_stage")} == {"OPEN"}
    load(
        chain,
        raw_data,
        [{"order_id": "3", "customer_name": "李四", "order_type": "打样订单", "ordered_at": at(7, month=4)}],
    )
    assert sorted(stage for _, stage in leads_of(chain, "current_stage")) == ["COLD", "OPEN"]


def test_order_that_comes_while_a_lead_is_cold_joins_it(chain: Chain, raw_data: RawData) -> None:
    load(
        chain,
        raw_data,
        [
            {"order_id": "1", "order_status": "new"},
            {"order_id": "2", "customer_name": "李四", "ordered_at": at(5, month=6)},
        ],
    )
    assert ("COLD",) in [row[1:] for row in leads_of(chain, "current_stage")]
    load(chain, raw_data, [{"order_id": "3", "order_status": "new", "ordered_at": at(6, month=6)}])
    zhang = sa.select(LEADS.c.current_stage, LEADS.c.bulk_count).where(LEADS.c.customer_global_id == UUID(ZHANG_ID))
    assert chain.rows(zhang) == [("OPEN", 2)]
