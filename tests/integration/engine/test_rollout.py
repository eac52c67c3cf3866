"""放量：份额之内与参照实现一样，份额之外一个字节也不动；份额来回变，旧系统的编号不变。"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import polars as pl
import pytest
import sqlalchemy as sa

from etl_assets.core.errors import SettingsError, TooManyDeletesError
from etl_assets.core.etl_tables import order_index, rejected_rows, stale_customers
from etl_assets.core.tables import target_tables
from etl_assets.ledger.graph import Asset, AssetGraph
from etl_assets.services import customer_orders
from etl_assets.services.accounting import AccountingError
from etl_assets.services.order_index import adopt_orders
from etl_assets.services.rollout import Share
from etl_assets.services.target_schema import prepare_target
from etl_assets.services.vectorized_queries import read_frame, stage_frame
from etl_assets.testing.raw_data import SAMPLE_SHOP, SAMPLE_SHOP_NAME, RawData
from tests.integration.engine.chain import Chain
from tests.reference.identities import build_customer_key

FIRST, LAST = date(2026, 1, 1), date(2026, 1, 6)
OTHER_SHOP = UUID("00000000-0000-4000-8000-0000000000ff")
TABLES = target_tables("public")
ORDERS, CUSTOMERS, LEADS = TABLES.orders, TABLES.customers, TABLES.leads
AFTER_PRODUCTS = AssetGraph.of(
    [
        Asset("orders"),
        Asset("products", frozenset(["orders"])),
        Asset("customers", frozenset(["orders", "products"]), by_customer=True),
        Asset("leads", frozenset(["customers"]), by_customer=True),
    ]
)
LONG_AGO = datetime(2020, 2, 2, tzinfo=UTC)

Key = tuple[Any, ...]
Row = Mapping[str, Any]


def bucket(key: str) -> int:
    return int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()[:8], 16) % 100


def key_of(name: str, shop: UUID = SAMPLE_SHOP) -> str:
    return build_customer_key(shop, name)


def names(low: int, high: int) -> Iterator[str]:
    """昵称，它们的客户的散列落在 [low, high)。"""
    return (name for number in range(100_000) if low <= bucket(key_of(name := f"客户🙂{number}")) < high)


def with_rollout(chain: Chain, rollout: int | tuple[str, ...]) -> Chain:
    return Chain(chain.engine, chain.settings.model_copy(update={"rollout": rollout}))


def at(day: int, hour: int = 4) -> datetime:
    return datetime(2026, 1, day, hour, tzinfo=UTC)


def read_rows(chain: Chain, table: sa.Table) -> dict[Key, Row]:
    """每一列，包括 updated_at；按主键。"""
    with chain.engine.connect() as connection:
        rows = connection.execute(sa.select(table)).mappings().all()
    return {tuple(row[column.name] for column in table.primary_key.columns): dict(row) for row in rows}


def read_all(chain: Chain) -> dict[str, dict[Key, Row]]:
    return {table.name: read_rows(chain, table) for table in (ORDERS, CUSTOMERS, LEADS)}


def insert(chain: Chain, table: sa.Table, rows: Iterable[Row]) -> None:
    with chain.engine.begin() as connection:
        connection.execute(sa.insert(table), [dict(row) for row in rows])


# ---- 一份原始数据，与旧系统算出的、处处不同的结果 --------------------------------------


def fill_raw(raw_data: RawData) -> None:
    """两个店、几十个客户；有的订单换了日子，有的换了客户，有的被撤回，有的行是坏的。"""
    raw_data.add_shop(OTHER_SHOP, "二店")
    shops = (SAMPLE_SHOP_NAME, "二店")
    first = [
        {
            "order_id": f"O-{number}",
            "shop": shops[number % 2],
            "customer_name": f"客户 {number % 37}",
            "ordered_at": at(1 + number % 6, number % 5),
            "amount": f"{number}.05",
            "order_status": ("completed", "待发货", "已取消")[number % 3],
            "order_type": ("大货订单", "打样订单", None)[number % 3],
        }
        for number in range(120)
    ]
    raw_data.add_import(first, completed_at=datetime(2026, 6, 1, tzinfo=UTC))
    changed = [
        {**row, "customer_name": f"客户 {(number * 7) % 41}", "ordered_at": at(1 + (number * 5) % 6)}
        for number, row in enumerate(first)
        if number % 4 == 0
    ]
    raw_data.add_import([*changed, {"order_id": "bad", "quantity": -1}], completed_at=datetime(2026, 6, 2, tzinfo=UTC))


def fill_old_system(chain: Chain, *, is_faithful: bool = False) -> None:
    """旧系统：编号都是它自己的，金额都不对，还有原始数据里没有的订单、客户与商机；不忠实的连状态与客户也不对。"""
    wanted = chain.expected()
    stamps = {"created_at": LONG_AGO, "updated_at": LONG_AGO}
    orders = [{**row, "amount": row["amount"] + 1, **stamps} for row in wanted.orders]
    for number, row in enumerate(orders):
        if not is_faithful:
            row["latest_status"] = "旧"
            row["customer_nickname"] = row["customer_nickname"] if number % 10 else f"只在旧系统 {number}"
    extra = [
        {**orders[number], "order_id": f"extra-{number}", "customer_nickname": f"只在旧系统 {number % 15}"}
        for number in range(0, 60, 2)
    ]
    insert(chain, ORDERS, [*orders, *extra])
    ids = {row["customer_global_id"]: uuid4() for row in wanted.customers}
    customers = [
        {**row, "customer_global_id": ids[row["customer_global_id"]], "total_amount": row["total_amount"] + 1, **stamps}
        for row in wanted.customers
    ]
    only_old = {
        row["customer_nickname"]: row for row in [*orders, *extra] if row["customer_nickname"].startswith("只在旧系统")
    }
    ghosts = [
        {
            **customers[0],
            "customer_global_id": uuid4(),
            "customer_key": key_of(name, row["shop_id"]),
            "customer_nickname": name,
        }
        for name, row in only_old.items()
    ]
    insert(chain, CUSTOMERS, [*customers, *ghosts])
    leads = [
        {
            **row,
            "lead_id": uuid4(),
            "customer_global_id": ids[row["customer_global_id"]],
            "current_stage": "COLD" if row["current_stage"] == "OPEN" else row["current_stage"],
            "bulk_count": 99,
            **stamps,
        }
        for row in wanted.leads
    ]
    ghost_leads = [
        {**leads[0], "lead_id": uuid4(), "customer_global_id": ghost["customer_global_id"], "lead_no": 1}
        for ghost in ghosts
    ]
    insert(chain, LEADS, [*leads, *ghost_leads])


@pytest.fixture
def old_system(chain: Chain, raw_data: RawData) -> dict[str, dict[Key, Row]]:
    """旧系统写下的全部行。"""
    fill_raw(raw_data)
    fill_old_system(chain)
    prepare_target(chain.engine, chain.settings)
    return read_all(chain)


class Split:
    """应当是什么：份额之内的由参照实现给出，其余照旧。"""

    def __init__(self, chain: Chain, covers: Any) -> None:
        self.covers = covers
        self.wanted = chain.expected()
        self.before = read_all(chain)
        self.key_of_id = {row["customer_global_id"]: row["customer_key"] for row in self.before["customers"].values()}
        self.key_of_id |= {row["customer_global_id"]: row["customer_key"] for row in self.wanted.customers}

    def owner(self, table: str, row: Row) -> str:
        match table:
            case "orders":
                return build_customer_key(row["shop_id"], row["customer_nickname"])
            case "customers":
                return str(row["customer_key"])
            case _:
                return str(self.key_of_id[row["customer_global_id"]])

    def expected(self, table: str, wanted: Iterable[Row], primary_key: tuple[str, ...]) -> dict[Key, Row]:
        by_key = {tuple(row[name] for name in primary_key): row for row in wanted}
        ours = {key: row for key, row in by_key.items() if self.covers(self.owner(table, row))}
        theirs = {
            key: row
            for key, row in self.before[table].items()
            if not self.covers(self.owner(table, by_key.get(key, row)))
        }
        assert not ours.keys() & theirs.keys()
        return ours | theirs

    def assert_holds(self, chain: Chain) -> None:
        for table, wanted in (
            (ORDERS, self.wanted.orders),
            (CUSTOMERS, self.wanted.customers),
            (LEADS, self.wanted.leads),
        ):
            primary_key = tuple(column.name for column in table.primary_key.columns)
            expected = self.expected(table.name, wanted, primary_key)
            found = read_rows(chain, table)
            assert found.keys() == expected.keys(), table.name
            for key, row in expected.items():
                assert {name: found[key][name] for name in row} == row, f"{table.name} {key}"
        rejected = chain.rows(sa.select(rejected_rows.c.raw_id).order_by(rejected_rows.c.raw_id))
        assert rejected == [(row["raw_id"],) for row in self.wanted.rejected]


def assert_percent(chain: Chain, percent: int) -> None:
    """重做全部日子之后，正好这么多客户归我们。"""
    split = Split(chain, lambda key: bucket(key) < percent)
    with_rollout(chain, percent).run(FIRST, LAST, allow_deletes=True)
    split.assert_holds(chain)


# ---- 份额本身 --------------------------------------------------------------------


def test_polars_and_postgresql_agree_with_md5(chain: Chain) -> None:
    keys = [
        key_of(name)
        for name in (
            "张三",
            "ＡＢＣ",
            "🙂👩‍👩‍👧",
            "שלום",
            "é",
            "e\u0301",
            "a b",
            "ß",
            "x" * 2_000,
            "'; DROP TABLE x --%s",
            *names(0, 100),
        )
    ][:2_000]
    frame = pl.DataFrame({"customer_key": keys})
    with chain.engine.begin() as connection:
        staging = stage_frame(connection, frame, name="keys", like=order_index)
        for percent in (1, 10, 50, 99):
            share = Share(percent=percent)
            expected = sorted(key for key in keys if bucket(key) < percent)
            assert sorted(frame.filter(share.covers())["customer_key"]) == expected
            in_sql = read_frame(
                connection, sa.select(staging.c.customer_key).where(share.covers_key(staging.c.customer_key))
            )
            assert sorted(in_sql["customer_key"]) == expected
            assert 0 < len(expected) < len(keys)


def test_share_of_a_customer_never_changes() -> None:
    """写死的数：换了实现、换了库的版本，已经放量的客户也不能换边。"""
    assert bucket("00000000-0000-4000-8000-000000000001:张三") == 60
    frame = pl.DataFrame({"customer_key": ["00000000-0000-4000-8000-000000000001:张三"]})
    assert [frame.select(Share(percent=percent).covers()).item() for percent in (60, 61)] == [False, True]


# ---- 按百分比 --------------------------------------------------------------------


@pytest.mark.usefixtures("old_system")
def test_ten_percent_then_fifty_then_all(chain: Chain) -> None:
    for percent in (10, 50, 100):
        assert_percent(chain, percent)
    chain.assert_converged()


def test_days_one_by_one_end_the_same(chain: Chain, raw_data: RawData) -> None:
    """索引先收齐了旧系统的订单：哪怕一天一天做，商机也不会先删掉、再以新的编号建起来。"""
    fill_raw(raw_data)
    fill_old_system(chain, is_faithful=True)
    assert prepare_target(chain.engine, chain.settings).adopted_orders == len(read_rows(chain, ORDERS))
    assert prepare_target(chain.engine, chain.settings).adopted_orders == 0
    split = Split(chain, lambda key: bucket(key) < 50)
    half = with_rollout(chain, 50)
    for day in (4, 0, 5, 2, 1, 3, 0, 4):
        half.run(FIRST + timedelta(days=day), allow_deletes=True)
    split.assert_holds(chain)


def test_customers_and_leads_of_the_old_system_keep_their_ids(
    chain: Chain, old_system: dict[str, dict[Key, Row]]
) -> None:
    with_rollout(chain, 50).run(FIRST, LAST, allow_deletes=True)
    chain.run(FIRST, LAST, allow_deletes=True)
    after = read_all(chain)
    assert after["customers"].keys() <= old_system["customers"].keys()
    assert after["business_leads"].keys() <= old_system["business_leads"].keys()
    assert len(after["customers"]) > 30


@pytest.mark.usefixtures("old_system")
def test_back_to_ten_percent_leaves_the_rest_to_the_old_system(chain: Chain) -> None:
    assert_percent(chain, 50)
    outside = ~Share(percent=10).covers_key(CUSTOMERS.c.customer_key)
    theirs = sa.select(CUSTOMERS.c.customer_global_id).where(outside)
    their_orders = sa.select(order_index.c.order_id).where(~Share(percent=10).covers_key(order_index.c.customer_key))
    chain.execute(
        sa.update(LEADS).where(LEADS.c.customer_global_id.in_(theirs)).values(bulk_count=77, updated_at=LONG_AGO)
    )
    chain.execute(sa.update(CUSTOMERS).where(outside).values(customer_nickname="旧系统又写了", updated_at=LONG_AGO))
    chain.execute(sa.update(ORDERS).where(ORDERS.c.order_id.in_(their_orders)).values(quantity=5, updated_at=LONG_AGO))
    assert_percent(chain, 10)
    assert_percent(chain, 100)


# ---- 一个客户一个客户地看 -----------------------------------------------------------

IN, OUT = next(names(0, 10)), next(names(90, 100))


def order(order_id: str, name: str, day: int = 5, **changes: Any) -> dict[str, Any]:
    return {"order_id": order_id, "customer_name": name, "ordered_at": at(day), **changes}


def figures(chain: Chain) -> dict[str, tuple[int, Any]]:
    rows = chain.rows(sa.select(CUSTOMERS.c.customer_nickname, CUSTOMERS.c.order_count, CUSTOMERS.c.total_amount))
    return {name: (count, total) for name, count, total in rows}


def order_names(chain: Chain) -> dict[str, str]:
    return dict(chain.rows(sa.select(ORDERS.c.order_id, ORDERS.c.customer_nickname)))


def add_newer(raw_data: RawData, *rows: dict[str, Any]) -> UUID:
    return raw_data.add_import(rows, completed_at=datetime(2026, 7, 1, tzinfo=UTC))


def test_order_that_leaves_for_a_customer_outside(chain: Chain, raw_data: RawData) -> None:
    """行不动，等旧系统来写；数字里已经没有它，别的运行单独重算客户也不会把它数回来。"""
    ten = with_rollout(chain, 10)
    raw_data.add_import([order("A", IN), order("B", IN)])
    ten.run(date(2026, 1, 5))
    before = read_rows(chain, ORDERS)
    add_newer(raw_data, order("A", OUT, 6))
    ten.run(date(2026, 1, 6))
    for assets in (("orders", "customers", "leads"), ("customers", "leads"), ("leads",)):
        ten.run(date(2026, 1, 5), assets=assets)
        assert read_rows(chain, ORDERS) == before
        assert figures(chain) == {IN: (1, pytest.approx(120.50))}
    chain.run(date(2026, 1, 5), date(2026, 1, 6))
    chain.assert_converged()


def test_order_that_comes_from_a_customer_outside(chain: Chain, raw_data: RawData) -> None:
    ten = with_rollout(chain, 10)
    raw_data.add_import([order("A", OUT)])
    ten.run(date(2026, 1, 5))
    assert not order_names(chain)
    add_newer(raw_data, order("A", IN, 6))
    ten.run(date(2026, 1, 5), date(2026, 1, 6))
    assert order_names(chain) == {"A": IN}
    assert figures(chain).keys() == {IN}


def test_withdrawn_orders_are_deleted_in_the_share_only(chain: Chain, raw_data: RawData) -> None:
    import_id = raw_data.add_import([order("A", IN), order("B", OUT)])
    chain.run(date(2026, 1, 5))
    raw_data.set_status(import_id, "failed")
    with_rollout(chain, 10).run(date(2026, 1, 5))
    assert order_names(chain) == {"B": OUT}
    assert figures(chain).keys() == {OUT}
    chain.run(date(2026, 1, 5))
    chain.assert_converged()


def test_order_without_a_name_is_deleted_by_whoever_has_its_share(chain: Chain, raw_data: RawData) -> None:
    """旧系统的行可以没有客户；名字算作空，所以它也属于某个份额，全量时总归删掉。"""
    raw_data.add_import([order("A", IN)])
    chain.run(date(2026, 1, 5))
    chain.execute(sa.update(ORDERS).values(customer_nickname=None, order_id="old"))
    chain.execute(sa.delete(order_index))
    chain.run(date(2026, 1, 5), allow_deletes=True)
    chain.assert_converged()


def test_guard_counts_the_share_only(chain: Chain, raw_data: RawData) -> None:
    """份额之内的订单全没了，在全部里只占一成：照样要人允许；份额之外的没了，与我们无关。"""
    inside = raw_data.add_import([order(f"I-{number}", IN) for number in range(21)])
    outside = raw_data.add_import([order(f"O-{number}", OUT) for number in range(200)])
    chain.run(date(2026, 1, 5))
    ten = with_rollout(chain, 10)
    raw_data.set_status(outside, "failed")
    ten.run(date(2026, 1, 5))
    assert len(order_names(chain)) == 221
    raw_data.set_status(inside, "failed")
    with pytest.raises(TooManyDeletesError, match="refusing to delete 21 of 21 orders"):
        ten.run(date(2026, 1, 5))


def test_cold_sweep_leaves_the_leads_of_others_alone(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([order("A", IN, order_status="待发货"), order("B", OUT, order_status="待发货")])
    chain.run(date(2026, 1, 5))
    outside = sa.select(CUSTOMERS.c.customer_global_id).where(CUSTOMERS.c.customer_nickname == OUT)
    leads = sa.select(LEADS).where(LEADS.c.customer_global_id.in_(outside))
    before = chain.rows(leads)
    later = datetime(2026, 6, 1, tzinfo=UTC)
    add_newer(raw_data, order("C", next(name for name in names(0, 10) if name != IN), ordered_at=later))
    with_rollout(chain, 10).run(date(2026, 6, 1))
    assert chain.rows(leads) == before
    assert sorted(chain.rows(sa.select(LEADS.c.current_stage))) == [("COLD",), ("OPEN",), ("WON",)]
    chain.run(date(2026, 6, 1))
    chain.assert_converged()


def test_stale_marks_of_others_wait_until_the_share_grows(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([order("A", OUT), order("B", OUT)])
    chain.run(date(2026, 1, 5))
    add_newer(raw_data, order("A", IN))
    with_rollout(chain, 10).run(date(2026, 1, 5))
    assert figures(chain)[OUT][0] == 2
    assert {key for (key,) in chain.rows(sa.select(stale_customers.c.customer_key))} == {key_of(OUT)}
    chain.run(date(2026, 1, 5), assets=["customers", "leads"])
    assert figures(chain)[OUT][0] == 1
    assert not chain.rows(sa.select(stale_customers.c.mark_id))
    chain.assert_converged()


def test_order_that_the_old_system_writes_is_adopted_in_the_share_only(chain: Chain, raw_data: RawData) -> None:
    """旧系统的完成事件只让客户与商机重做：份额之外的行不算进来，被它改走的行不再算我们的。"""
    raw_data.add_import([order("A", IN), order("B", IN)])
    ten = with_rollout(chain, 10)
    ten.run(date(2026, 1, 5))
    chain.execute(sa.update(ORDERS).where(ORDERS.c.order_id == "A").values(customer_nickname=OUT))
    (row,) = [row for row in read_rows(chain, ORDERS).values() if row["order_id"] == "B"]
    insert(chain, ORDERS, [{**row, "order_id": "C"}, {**row, "order_id": "D", "customer_nickname": OUT}])
    ten.run(date(2026, 1, 5), assets=["customers", "leads"])
    assert figures(chain) == {IN: (2, pytest.approx(241.00))}
    indexed = dict(chain.rows(sa.select(order_index.c.order_id, order_index.c.customer_key)))
    assert indexed == {"A": key_of(OUT), "B": key_of(IN), "C": key_of(IN)}


@pytest.mark.parametrize(
    ("made", "adopts"),
    [
        ({"products", "customers"}, 1),
        ({"customers", "leads"}, 1),
        ({"products", "customers", "leads"}, 1),
        ({"orders", "customers", "leads"}, 0),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_orders_that_no_upstream_in_the_run_has_indexed_are_adopted(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, made: set[str], adopts: int
) -> None:
    """跟在一个不碰索引的资产后面，不等于上游已经收进来了；写订单的、按客户算的上游才是，那就不再看一遍。"""
    raw_data.add_import([order("A", IN)])
    chain.run(date(2026, 1, 5))
    chain.use_graph(AFTER_PRODUCTS)
    (row,) = read_rows(chain, ORDERS).values()
    insert(chain, ORDERS, [{**row, "order_id": "B"}])
    adopted: list[int] = []
    monkeypatch.setattr(customer_orders, "adopt_orders", lambda *arguments: adopted.append(adopt_orders(*arguments)))
    chain.run(date(2026, 1, 5), assets=made)
    assert adopted == [1] * adopts
    if adopts:
        assert figures(chain)[IN][0] == 2


# ---- 账 --------------------------------------------------------------------------


def test_rows_of_others_have_their_own_place_in_the_account(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([order("A", IN), order("B", OUT), order("C", OUT), order("D", IN, quantity=-1), order("E", IN)])
    add_newer(raw_data, order("B", OUT), order("E", IN), order("A", IN, 6))
    (report,) = with_rollout(chain, 10).run(date(2026, 1, 5), date(2026, 1, 6), assets=["orders"])
    splits = [(a.raw, a.loaded, a.superseded, a.rejected_count, a.outside) for a in report.accounts]
    assert splits == [(7, 1, 2, 1, 3), (1, 1, 0, 0, 0)]
    assert (
        str(report.accounts[0])
        == "7 raw rows in scope on 2026-01-05, 1 loaded + 2 superseded + 1 rejected + 3 outside the share"
    )
    assert report.written.rows == 2


def test_rows_outside_the_share_are_not_warned_of(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(
        [order(name, who, order_type="定制") for name, who in (("A", IN), ("A", IN), ("B", OUT), ("B", OUT))]
    )
    (report, *_) = with_rollout(chain, 10).run(date(2026, 1, 5))
    assert report.warnings[date(2026, 1, 5)].rows == {"repeated_in_import": 1, "unmapped_type": 1}


def test_lost_order_of_the_share_is_found(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([order("B", OUT), order("A", IN)])
    chain.execute(
        sa.text("""
            CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
            CREATE TRIGGER swallow BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION swallow();
        """)
    )
    try:
        with pytest.raises(
            AccountingError, match=r"0 loaded \+ 0 superseded \+ 0 rejected \+ 1 outside the share \(look at raw_id 2\)"
        ):
            with_rollout(chain, 10).run(date(2026, 1, 5))
    finally:
        chain.execute(sa.text("DROP FUNCTION swallow() CASCADE"))


# ---- 按店 ------------------------------------------------------------------------


@pytest.mark.usefixtures("old_system")
def test_shops_by_name(chain: Chain) -> None:
    split = Split(chain, lambda key: key.startswith(str(OTHER_SHOP)))
    with_rollout(chain, ("二店",)).run(FIRST, LAST, allow_deletes=True)
    split.assert_holds(chain)
    with_rollout(chain, ("二店", SAMPLE_SHOP_NAME)).run(FIRST, LAST, allow_deletes=True)
    chain.assert_converged()


@pytest.mark.usefixtures("old_system")
def test_unknown_shop_is_refused_before_anything_is_written(chain: Chain) -> None:
    before = read_all(chain)
    with pytest.raises(
        SettingsError, match="ETL_ROLLOUT names '没有的店', which shop_configs does not have, so nothing was written"
    ):
        with_rollout(chain, ("二店", "没有的店")).run(FIRST, LAST)
    assert read_all(chain) == before
    assert not chain.rows(sa.select(rejected_rows.c.raw_id))
