"""参照实现自己的规则：小例子，结果都是照 DOMAIN.md 用手算的。"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest

from tests.reference.customers import StoredCustomer, build_customer, build_left_customer, count_in
from tests.reference.identities import build_customer_key, new_customer_id, new_lead_id
from tests.reference.instants import Instant, business_day, to_datetime, to_instant
from tests.reference.leads import StoredLead, build_leads, deal
from tests.reference.oracle import Result, differences
from tests.reference.orders import Order, build_order
from tests.reference.raw_orders import JudgedRow, RawRow, clean, judge, pick_winners
from tests.reference.settings import ReferenceSettings
from tests.reference.text import WHITE_SPACE, normalize_name, trim, trim_or_missing

SHOP = UUID("00000000-0000-4000-8000-000000000001")
IMPORT = UUID("10000000-0000-4000-8000-000000000001")
CUSTOMER = UUID("20000000-0000-4000-8000-000000000001")
KEY = f"{SHOP}:张三"
SETTINGS = ReferenceSettings(today=date(2024, 6, 30))
NOON = datetime(2024, 3, 1, 4, tzinfo=UTC)  # 上海的正午
INFINITY = Decimal("Infinity")


def raw_row(**changes: Any) -> RawRow:
    row = RawRow(
        raw_id=1,
        import_id=IMPORT,
        completed_at=to_instant(NOON),
        order_id="A1",
        shop="店",
        customer_name="张三",
        order_type="大货",
        order_status="待发货",
        amount=Decimal("10.00"),
        quantity=2,
        ordered_at=to_instant(NOON),
    )
    return replace(row, **changes)


def judged(settings: ReferenceSettings = SETTINGS, **changes: Any) -> JudgedRow:
    return judge(clean(raw_row(**changes)), SHOP, settings)


def order(
    day: float,
    *,
    order_id: str = "A",
    status: str = "待发货",
    kind: str = "BULK",
    amount: str = "1.00",
    name: str = "张三",
) -> Order:
    """2024-03-01 正午以后第 `day` 天的订单。"""
    moment = NOON + timedelta(days=day)
    return Order(
        shop_id=SHOP,
        order_id=order_id,
        customer_nickname=name,
        latest_status=status,
        raw_order_type=None,
        system_order_type=kind,
        amount=Decimal(amount),
        quantity=1,
        ordered_at=to_instant(moment),
        order_date=moment.date(),  # 上海的正午，UTC 也是同一天
        import_id=IMPORT,
        raw_id=1,
    )


def at(day: float) -> Instant:
    return to_instant(NOON + timedelta(days=day))


def stored_lead(lead_no: int, **changes: Any) -> StoredLead:
    lead = StoredLead(
        lead_id=UUID(int=lead_no),
        customer_global_id=CUSTOMER,
        lead_no=lead_no,
        current_stage="OPEN",
        closed_at=None,
        closed_by=None,
        owner=None,
        notes=None,
    )
    return replace(lead, **changes)


def dealt_days(orders: list[Order], closings: dict[int, Instant]) -> dict[int, list[float]]:
    """商机号 → 它的订单各在第几天。"""
    dealt = deal(orders, closings, SETTINGS)
    return {number: [float((one.ordered_at - at(0)) / 86_400) for one in lead.orders] for number, lead in dealt.items()}


def leads_of(
    orders: list[Order], *stored: StoredLead, newest_day: date = date(2024, 3, 1)
) -> dict[int, dict[str, Any]]:
    rows = build_leads(CUSTOMER, KEY, orders, stored, newest_day, SETTINGS)
    return {row["lead_no"]: row for row in rows}


# ---- 文字与编号 ------------------------------------------------------------------


def test_ids_are_those_of_the_contract() -> None:
    assert build_customer_key(SHOP, "张三") == KEY
    assert new_customer_id(KEY) == UUID("fa55f60f-e32c-5a53-a54e-925cf73a97da")
    assert new_lead_id(KEY, 1) == UUID("fd4ef8d1-2684-5631-8acd-3c839ea84862")


def test_trim_removes_the_25_white_space_characters_and_no_other() -> None:
    assert len(set(WHITE_SPACE)) == 25
    assert trim(f"{WHITE_SPACE}a b{WHITE_SPACE}") == "a b"
    assert trim("\x1c\u200ba\ufeff") == "\x1c\u200ba\ufeff"
    assert trim_or_missing("\u3000\x85 ") is None
    assert trim_or_missing(None) is None


@pytest.mark.parametrize(
    ("nickname", "normal"),
    [
        ("\uff21\uff22\u3000 \u2003c", "AB c"),
        ("\ufb01x", "fix"),
        ("e\u0301", "\u00e9"),
        ("\u00a0a\u2028\tb\u00a0", "a b"),
        ("Aa", "Aa"),
    ],
)
def test_customer_names_that_look_alike_have_one_key(nickname: str, normal: str) -> None:
    assert normalize_name(nickname) == normal


# ---- 时刻与业务日 ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        (datetime(2024, 2, 28, 15, 59, 59, tzinfo=UTC), date(2024, 2, 28)),
        (datetime(2024, 2, 28, 16, 0, 0, tzinfo=UTC), date(2024, 2, 29)),
        (datetime(9999, 12, 31, 15, 59, 59, 999999, tzinfo=UTC), date(9999, 12, 31)),
    ],
)
def test_business_day_is_the_local_calendar_day(moment: datetime, day: date) -> None:
    assert business_day(to_instant(moment), SETTINGS.zone) == day


def test_business_day_exists_exactly_in_the_local_years_1_to_9999() -> None:
    year_one = to_instant(datetime(1, 1, 1, tzinfo=UTC))
    year_end = to_instant(datetime(9999, 12, 31, 16, tzinfo=UTC))
    local_mean_time = 8 * 3600 + 5 * 60 + 43  # 1901 年以前的上海
    assert business_day(year_one - local_mean_time, SETTINGS.zone) == date(1, 1, 1)
    assert business_day(year_one - local_mean_time - 1, SETTINGS.zone) is None
    assert business_day(year_end, SETTINGS.zone) is None
    assert business_day(year_end + 8 * 3600, ZoneInfo("America/New_York")) == date(9999, 12, 31)
    assert business_day(INFINITY, SETTINGS.zone) is None
    assert business_day(-INFINITY, SETTINGS.zone) is None


def test_instants_keep_microseconds_and_infinity() -> None:
    moment = datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert to_instant(moment) == Decimal("-0.000001")
    assert to_datetime(Decimal("-0.000001")) == moment
    assert to_datetime(INFINITY) == "infinity"
    assert to_datetime(-INFINITY) == "-infinity"


# ---- 判定 ------------------------------------------------------------------------


def test_rules_hit_in_the_order_of_the_contract() -> None:
    """一行违反全部规则；照规则的次序一样一样改好，每次露出下一条。"""
    row = raw_row(order_id=" ", shop=None, customer_name="\u3000", ordered_at=None, amount=Decimal("NaN"), quantity=-1)
    shop_id: UUID | None = None
    seen = []
    for fix in (
        {"order_id": "x" * 501},
        {"shop": "店"},
        {"known": True},
        {"customer_name": "张三"},
        {"ordered_at": INFINITY},
        {"ordered_at": to_instant(datetime(1999, 12, 31, 15, 59, 59, tzinfo=UTC))},
        {"ordered_at": to_instant(NOON)},
        {"amount": Decimal("-3")},
        {"quantity": 0},
        {"order_id": "x" * 500},
    ):
        seen.append(judge(clean(row), shop_id, SETTINGS).rule)
        if "known" in fix:
            shop_id = SHOP
        else:
            row = replace(row, **fix)
    assert seen == [
        "missing_order_id",
        "missing_shop",
        "unknown_shop",
        "missing_customer_name",
        "missing_ordered_at",
        "bad_ordered_at",
        "outside_partitions",
        "bad_amount",
        "negative_quantity",
        "text_too_long",
    ]
    assert judge(clean(row), shop_id, SETTINGS).rule is None


@pytest.mark.parametrize(
    ("moment", "rule"),
    [
        (datetime(1999, 12, 31, 15, 59, 59, tzinfo=UTC), "outside_partitions"),
        (datetime(1999, 12, 31, 16, 0, 0, tzinfo=UTC), None),
        (datetime(2024, 6, 30, 15, 59, 59, tzinfo=UTC), None),
        (datetime(2024, 6, 30, 16, 0, 0, tzinfo=UTC), "outside_partitions"),
    ],
)
def test_first_and_last_partition_are_inside(moment: datetime, rule: str | None) -> None:
    assert judged(ordered_at=to_instant(moment)).rule == rule


def test_rejected_row_keeps_the_business_day_it_has() -> None:
    assert judged(order_id=None).day == date(2024, 3, 1)
    assert judged(order_id=None, ordered_at=-INFINITY).day is None
    assert judged(ordered_at=to_instant(datetime(1990, 1, 1, tzinfo=UTC))).day == date(1990, 1, 1)


def test_length_counts_code_points_of_the_trimmed_text() -> None:
    assert judged(customer_name="\u3000" + "\U0001f600" * 500 + " ").rule is None
    assert judged(customer_name="\U0001f600" * 501).rule == "text_too_long"


# ---- 赢家与订单的值 --------------------------------------------------------------


def test_newest_import_wins_before_the_higher_raw_id() -> None:
    rows = [judged(raw_id=1, completed_at=at(1)), judged(raw_id=2, completed_at=at(0), order_id=" A1\u3000")]
    assert [winner.raw.raw_id for winner in pick_winners(rows)] == [1]


def test_higher_raw_id_wins_within_an_import() -> None:
    rows = [judged(raw_id=2), judged(raw_id=1)]
    assert [winner.raw.raw_id for winner in pick_winners(rows)] == [2]


def test_missing_completed_at_is_older_than_minus_infinity() -> None:
    rows = [judged(raw_id=9, completed_at=None), judged(raw_id=1, completed_at=-INFINITY)]
    assert [winner.raw.raw_id for winner in pick_winners(rows)] == [1]


def test_rejected_row_never_wins() -> None:
    rows = [judged(raw_id=1), judged(raw_id=2, quantity=-1)]
    assert [winner.raw.raw_id for winner in pick_winners(rows)] == [1]


def test_missing_values_have_defaults() -> None:
    built = build_order(judged(order_type="\t", order_status=" ", amount=None, quantity=None), None)
    assert (built.raw_order_type, built.latest_status, built.amount, built.quantity) == (None, "unknown", Decimal(0), 1)
    assert built.system_order_type == "BULK"


@pytest.mark.parametrize(
    ("mapped", "system"),
    [("SAMPLE", "SAMPLE"), ("PROOF", "PROOF"), ("bulk", "BULK"), ("OTHER", "BULK"), (None, "BULK")],
)
def test_type_mapped_to_anything_but_the_three_is_bulk(mapped: str | None, system: str) -> None:
    assert build_order(judged(), mapped).system_order_type == system


# ---- 客户 ------------------------------------------------------------------------


def test_cancelled_status_is_compared_trimmed_and_case_folded() -> None:
    settings = ReferenceSettings(
        cancelled_statuses=[" ReFunded\u3000", "STRASSE"], completed_statuses=["refunded", "Done"]
    )
    statuses = ["REFUNDED", "refunded ", "straße", "done", "unknown"]
    counted = count_in([order(0, status=status) for status in statuses], settings)
    assert [one.latest_status for one in counted] == ["done", "unknown"]
    assert settings.is_completed("DONE")
    assert not settings.is_completed("refunded")


def test_customer_figures_leave_cancelled_orders_out_but_the_newest_of_all_names_him() -> None:
    orders = [
        order(5, order_id="3", amount="100.00", status="已取消", name="张三\u3000"),
        order(2, order_id="2", amount="-2.50", kind="PROOF"),
        order(1, order_id="1", amount="4.00", kind="SAMPLE"),
        order(3, order_id="4", amount="8.00", kind="BULK"),
        order(3, order_id="5", amount="0.50", kind="BULK"),
    ]
    assert build_customer(CUSTOMER, KEY, orders, SETTINGS) == {
        "customer_global_id": CUSTOMER,
        "customer_key": KEY,
        "shop_id": SHOP,
        "customer_nickname": "张三\u3000",
        "first_order_at": NOON + timedelta(days=1),
        "last_order_at": NOON + timedelta(days=3),
        "order_count": 4,
        "total_amount": Decimal("10.00"),
        "sample_count": 1,
        "sample_amount": Decimal("4.00"),
        "proof_count": 1,
        "proof_amount": Decimal("-2.50"),
        "bulk_count": 2,
        "bulk_amount": Decimal("8.50"),
    }


def test_newest_order_is_decided_by_order_id_in_code_point_order() -> None:
    orders = [
        order(1, order_id="\uffff", name="B"),
        order(1, order_id="\U0001f600", name="C"),
        order(1, order_id="Z", name="A"),
    ]
    assert build_customer(CUSTOMER, KEY, orders, SETTINGS)["customer_nickname"] == "C"


def test_customer_with_only_cancelled_orders_keeps_a_row_of_zeros() -> None:
    row = build_customer(CUSTOMER, KEY, [order(0, status="closed")], SETTINGS)
    assert (row["order_count"], row["total_amount"], row["first_order_at"], row["last_order_at"]) == (
        0,
        Decimal(0),
        None,
        None,
    )
    assert row["customer_nickname"] == "张三"


def test_customer_without_orders_takes_his_name_from_the_key() -> None:
    stored = StoredCustomer(customer_global_id=CUSTOMER, customer_key=f"{SHOP}:a:b", shop_id=SHOP)
    row = build_left_customer(stored)
    assert (row["customer_nickname"], row["order_count"], row["first_order_at"]) == ("a:b", 0, None)


# ---- 商机 ------------------------------------------------------------------------


def test_orders_join_the_open_lead_until_a_completed_bulk_order_wins_it() -> None:
    orders = [
        order(0, kind="SAMPLE", status="completed"),
        order(1),
        order(2, status=" Delivered "),
        order(3, kind="PROOF"),
        order(4, status="已完成"),
        order(5, status="交易成功"),
    ]
    assert dealt_days(orders, {}) == {1: [0, 1, 2], 2: [3, 4], 3: [5]}
    leads = leads_of(orders)
    assert [(lead["current_stage"], lead["closed_at"], lead["closed_by"]) for lead in leads.values()] == [
        ("WON", NOON + timedelta(days=2), "etl"),
        ("WON", NOON + timedelta(days=4), "etl"),
        ("WON", NOON + timedelta(days=5), "etl"),
    ]
    assert leads[1]["lead_id"] == new_lead_id(KEY, 1)
    assert (leads[1]["opened_at"], leads[1]["last_order_at"]) == (NOON, NOON + timedelta(days=2))
    assert (leads[1]["sample_count"], leads[1]["bulk_count"], leads[1]["bulk_amount"]) == (1, 2, Decimal("2.00"))


def test_order_exactly_at_closed_at_belongs_to_the_closed_lead() -> None:
    assert dealt_days([order(0), order(1), order(1.000001)], {1: at(1)}) == {1: [0, 1], 2: [1.000001]}


def test_completed_bulk_order_does_not_end_a_lead_that_a_person_closed() -> None:
    assert dealt_days([order(0, status="completed"), order(1), order(3)], {1: at(2)}) == {1: [0, 1], 2: [3]}


def test_closing_on_a_later_number_does_not_cut_an_earlier_lead() -> None:
    assert dealt_days([order(0), order(5), order(6)], {2: at(3)}) == {1: [0, 5, 6]}


def test_closed_leads_that_no_order_reaches_are_passed_over() -> None:
    orders = [order(4, status="completed"), order(5), order(9)]
    assert dealt_days(orders, {1: at(1), 2: at(3), 4: at(2), 5: at(7)}) == {3: [4], 5: [5], 6: [9]}


def test_infinite_closings_are_earlier_and_later_than_every_order() -> None:
    assert dealt_days([order(0), order(999)], {1: -INFINITY, 2: INFINITY}) == {2: [0, 999]}


def test_closing_stays_as_the_person_made_it() -> None:
    closed = stored_lead(1, current_stage="LOST", closed_at=at(2), closed_by="user", owner="李四", notes=" ")
    leads = leads_of([order(0, status="completed"), order(3)], closed)
    assert leads[1]["lead_id"] == UUID(int=1)
    assert (leads[1]["current_stage"], leads[1]["closed_at"], leads[1]["closed_by"]) == (
        "LOST",
        NOON + timedelta(days=2),
        "user",
    )
    assert (leads[1]["owner"], leads[1]["notes"], leads[1]["bulk_count"]) == ("李四", " ", 1)
    assert (leads[2]["current_stage"], leads[2]["closed_at"], leads[2]["owner"]) == ("OPEN", None, None)


def test_closing_without_closed_at_means_nothing() -> None:
    leads = leads_of([order(0)], stored_lead(1, current_stage="LOST", closed_by="user"))
    assert (leads[1]["current_stage"], leads[1]["closed_at"], leads[1]["closed_by"]) == ("OPEN", None, None)


def test_lead_without_orders_stays_only_if_a_person_touched_it() -> None:
    leads = leads_of(
        [],
        stored_lead(1, current_stage="WON", closed_at=at(0), closed_by="etl"),
        stored_lead(2, current_stage="COLD", closed_by="user", owner="\u3000", notes="\t"),
        stored_lead(3, current_stage="LOST", closed_at=at(0), closed_by="user"),
        stored_lead(4, current_stage="WON", closed_at=at(0), closed_by="etl", notes="打电话"),
        stored_lead(5, current_stage="COLD", closed_by="user", owner="李四"),
    )
    assert {
        number: (lead["current_stage"], lead["closed_at"], lead["closed_by"]) for number, lead in leads.items()
    } == {
        3: ("LOST", NOON, "user"),
        4: ("OPEN", None, None),
        5: ("OPEN", None, None),
    }
    assert {
        (lead["opened_at"], lead["last_order_at"], lead["bulk_count"], lead["bulk_amount"]) for lead in leads.values()
    } == {(None, None, 0, Decimal(0))}


def test_lead_turns_cold_after_more_than_90_days() -> None:
    last_day = NOON.date() + timedelta(days=1)
    orders = [order(0), order(1)]
    assert leads_of(orders, newest_day=last_day + timedelta(days=90))[1]["current_stage"] == "OPEN"
    assert leads_of(orders, newest_day=last_day + timedelta(days=91))[1]["current_stage"] == "COLD"


def test_won_and_closed_leads_never_turn_cold() -> None:
    closed = stored_lead(2, current_stage="OPEN", closed_at=at(5), closed_by="user")
    leads = leads_of([order(0, status="completed"), order(1)], closed, newest_day=date(2030, 1, 1))
    assert [leads[number]["current_stage"] for number in (1, 2)] == ["WON", "OPEN"]


# ---- 差别 ------------------------------------------------------------------------


def rejected_row(raw_id: int, day: date | None = None) -> dict[str, Any]:
    return {"raw_id": raw_id, "import_id": IMPORT, "rule": "missing_shop", "day": day}


def left_customer(amount: str, moment: datetime) -> dict[str, Any]:
    return {
        "customer_global_id": CUSTOMER,
        "customer_key": KEY,
        "total_amount": Decimal(amount),
        "first_order_at": moment,
    }


def test_equal_results_have_no_differences_whatever_the_scale_and_the_zone() -> None:
    local = NOON.astimezone(ZoneInfo("Asia/Shanghai"))
    left = Result(
        orders=[], customers=[left_customer("0", NOON)], leads=[], rejected=[rejected_row(2), rejected_row(1)]
    )
    right = Result(
        orders=[], customers=[left_customer("0.00", local)], leads=[], rejected=[rejected_row(1), rejected_row(2)]
    )
    assert differences(left, right) == []


def test_differences_name_the_missing_the_extra_and_the_column() -> None:
    left = Result(
        orders=[], customers=[left_customer("1.00", NOON)], leads=[], rejected=[rejected_row(1), rejected_row(2)]
    )
    right = Result(
        orders=[],
        customers=[left_customer("1.01", NOON)],
        leads=[],
        rejected=[rejected_row(2, date(2024, 1, 1)), rejected_row(3)],
    )
    assert differences(left, right) == [
        f"customers {CUSTOMER}: total_amount is Decimal('1.01'), expected Decimal('1.00')",
        f"rejected 1: missing, expected raw_id=1, import_id={IMPORT}, rule='missing_shop', day=None",
        "rejected 2: day is datetime.date(2024, 1, 1), expected None",
        f"rejected 3: extra, found raw_id=3, import_id={IMPORT}, rule='missing_shop', day=None",
    ]


def test_long_lists_of_differences_are_cut_with_a_count() -> None:
    empty = Result(orders=[], customers=[], leads=[], rejected=[])
    full = Result(orders=[], customers=[], leads=[], rejected=[rejected_row(number) for number in range(15)])
    found = differences(full, empty)
    assert len(found) == 11
    assert found[-1] == "rejected: 5 more differences"


def test_repeated_keys_are_a_difference() -> None:
    once = Result(orders=[], customers=[], leads=[], rejected=[rejected_row(1)])
    twice = Result(orders=[], customers=[], leads=[], rejected=[rejected_row(1), rejected_row(1)])
    assert differences(once, twice) == ["rejected: 1 actual rows repeat the key of another"]
