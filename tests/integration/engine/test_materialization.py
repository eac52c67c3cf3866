"""物化：幂等、搬动、删除、人的列、并发；结果都与参照实现比较。"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime
from threading import Event
from time import monotonic, sleep
from typing import Any
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa

from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import PermanentError, TooManyDeletesError, TransientError
from etl_assets.core.etl_tables import ledger, order_index, rejected_rows, stale_customers
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TIMESTAMP, raw_orders, shop_configs, target_tables
from etl_assets.customers import etl as customers_etl
from etl_assets.leads import etl as leads_etl
from etl_assets.ledger.requests import request_days
from etl_assets.orders import etl as orders_etl
from etl_assets.orders import versions as orders_versions
from etl_assets.services import batch
from etl_assets.services.customer_orders import read_customer_orders
from etl_assets.services.vectorized_queries import WriteCounts
from etl_assets.testing.raw_data import SAMPLE_SHOP, SAMPLE_SHOP_NAME, RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.interleaving import giving_way, wait_until

DAY = date(2026, 1, 5)
NEXT = date(2026, 1, 6)
TABLES = target_tables("public")
ORDERS, CUSTOMERS, LEADS = TABLES.orders, TABLES.customers, TABLES.leads
LEGACY_ID = UUID("11111111-1111-4111-8111-111111111111")
NOTHING_WRITTEN = (0, 0, 0)


def at(day: int, *, month: int = 1, hour: int = 4) -> datetime:
    return datetime(2026, month, day, hour, tzinfo=UTC)


def later(hour: int) -> datetime:
    """导入完成的时刻：越大越新。"""
    return datetime(2026, 6, 1, hour, tzinfo=UTC)


def counts(written: WriteCounts) -> tuple[int, int, int]:
    return written.inserted, written.updated, written.deleted


def close_lead(chain: Chain, lead_no: int, closed_at: datetime | sa.Cast[datetime], *, stage: str = "LOST") -> None:
    """人关闭一个商机。"""
    closing = {"closed_by": "user", "closed_at": closed_at, "current_stage": stage}
    chain.execute(sa.update(LEADS).where(LEADS.c.lead_no == lead_no).values(**closing))


def nicknames(chain: Chain) -> list[str]:
    return [
        nickname
        for (nickname,) in chain.rows(sa.select(CUSTOMERS.c.customer_nickname).order_by(CUSTOMERS.c.customer_nickname))
    ]


def lead_rows(chain: Chain, *columns: str) -> list[tuple[Any, ...]]:
    return chain.rows(
        sa.select(*[LEADS.c[name] for name in columns]).order_by(LEADS.c.customer_global_id, LEADS.c.lead_no)
    )


def marks(chain: Chain) -> list[tuple[str, str]]:
    statement = sa.select(stale_customers.c.asset, stale_customers.c.customer_key).order_by(stale_customers.c.asset)
    return [(asset, key.partition(":")[2]) for asset, key in chain.rows(statement)]


# ---- 再做一次 --------------------------------------------------------------------


def test_unchanged_rerun_writes_no_row(chain: Chain, raw_data: RawData) -> None:
    rows: list[dict[str, Any]] = [
        {"order_id": "A", "amount": None, "order_type": None, "order_status": None, "quantity": None},
        {"order_id": "B", "order_status": "cancelled", "customer_name": "李四"},
        {"order_id": "C", "ordered_at": at(6), "amount": "-3.10"},
        {"order_id": "D", "quantity": -1},
    ]
    raw_data.add_import(rows)
    chain.run(DAY, NEXT)
    close_lead(chain, 2, at(8))
    chain.run(DAY, NEXT)
    before = row_versions(chain)
    reports = chain.run(DAY, NEXT)
    assert [counts(report.written) for report in reports] == [NOTHING_WRITTEN] * 3
    assert row_versions(chain) == before
    chain.assert_converged()


def row_versions(chain: Chain) -> list[list[tuple[Any, ...]]]:
    """每一行的物理版本与 updated_at：写过就变，值相同也变。"""
    place, writer = sa.literal_column("ctid", sa.Text), sa.literal_column("xmin::text", sa.Text)
    targets = [
        chain.rows(sa.select(place, writer, table.c.updated_at).order_by(place)) for table in (ORDERS, CUSTOMERS, LEADS)
    ]
    own = [
        chain.rows(sa.select(place, writer).select_from(table).order_by(place))
        for table in (order_index, rejected_rows)
    ]
    assert all([*targets, *own])
    return [*targets, *own]


def test_rows_that_change_are_the_only_ones_written(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(
        [{"order_id": str(number), "customer_name": f"客户{number}"} for number in range(5)], completed_at=later(1)
    )
    chain.run(DAY)
    raw_data.add_import(
        [{"order_id": "3", "customer_name": "客户3", "order_status": "cancelled"}], completed_at=later(2)
    )
    reports = chain.run(DAY)
    assert [counts(report.written) for report in reports] == [(0, 1, 0), (0, 1, 0), (0, 0, 1)]
    chain.assert_converged()


def test_number_of_statements_does_not_grow_with_the_rows(
    chain: Chain, raw_data: RawData, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """新来的与原样的、几行与几百行：语句一样多；最新的业务日没有变，不必独占地清扫。"""
    raw_data.add_import([{"order_id": "newest", "ordered_at": at(6)}], completed_at=later(0))
    chain.run(DAY, NEXT)
    for hour in (0, 1):  # 两个版本，所以也有被取代的行，还有坏行
        raw_data.add_import(versions(orders=5, completed_hour=hour), completed_at=later(hour))
    with counted_statements(engine, monkeypatch) as statements:
        few = [statements(lambda: chain.run(DAY, NEXT)) for _ in range(2)]
        for hour in (2, 3):
            raw_data.add_import(versions(orders=150, completed_hour=hour), completed_at=later(hour))
        many = [statements(lambda: chain.run(DAY, NEXT)) for _ in range(2)]
    assert many == few
    assert few[0] > 20
    chain.assert_converged()


def versions(*, orders: int, completed_hour: int) -> list[dict[str, Any]]:
    """每个订单一个版本，隔一个换一天，三单一个客户，每五单一条坏行。"""
    return [
        {
            "order_id": f"A-{number}",
            "customer_name": f"客户{number // 3}",
            "ordered_at": at(5 + (number + completed_hour) % 2, hour=number % 12),
            "amount": f"{number}.{completed_hour:02}",
            "quantity": -1 if number % 5 == 4 else 1,
        }
        for number in range(orders)
    ]


@contextmanager
def counted_statements(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[], object]], int]]:
    """数 SQLAlchemy 执行的语句，与绕过它的：COPY，与几行的暂存。"""
    executed = 0

    def count(*_: Any) -> None:
        nonlocal executed
        executed += 1

    def counted(execute: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            count()
            return execute(*arguments, **options)

        return counting

    def during(action: Callable[[], object]) -> int:
        before = executed
        action()
        return executed - before

    monkeypatch.setattr(psycopg.Cursor, "copy", counted(psycopg.Cursor.copy))
    monkeypatch.setattr(psycopg.ClientCursor, "execute", counted(psycopg.ClientCursor.execute))
    sa.event.listen(engine, "before_cursor_execute", count)
    yield during
    sa.event.remove(engine, "before_cursor_execute", count)


def test_customers_are_done_in_batches_that_fit_in_memory(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    write = customers_etl.write_customers

    def observed(*arguments: Any) -> WriteCounts:
        result = write(*arguments)
        sizes.append(result.rows)
        return result

    monkeypatch.setattr(batch, "CUSTOMERS_PER_BITE", 3)
    monkeypatch.setattr(customers_etl, "write_customers", observed)
    raw_data.add_import([{"order_id": str(number), "customer_name": f"客户{number // 2}"} for number in range(14)])
    chain.run(DAY)
    assert sizes == [3, 3, 1]
    chain.assert_converged()


# ---- 搬动 ------------------------------------------------------------------------


def test_order_that_moves_to_another_day_is_never_lost(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"ordered_at": at(5)}], completed_at=later(1))
    chain.run(DAY)
    raw_data.add_import([{"ordered_at": at(9)}], completed_at=later(2))
    chain.run(DAY, assets=["orders"])
    assert chain.rows(sa.select(ORDERS.c.order_date)) == [(date(2026, 1, 9),)]
    chain.run(date(2026, 1, 9))
    chain.assert_converged()


def test_order_that_moves_back_when_an_import_is_withdrawn(chain: Chain, raw_data: RawData) -> None:
    chain.announce(raw_data.add_import([{"ordered_at": at(5)}], completed_at=later(1)))
    newer = raw_data.add_import([{"ordered_at": at(9), "amount": "7.00"}], completed_at=later(2))
    chain.announce(newer)
    chain.run_due()
    assert chain.rows(sa.select(ORDERS.c.order_date)) == [(date(2026, 1, 9),)]
    raw_data.set_status(newer, "failed")
    assert chain.announce(newer) == [DAY, date(2026, 1, 9)]
    chain.run_due()
    assert chain.rows(sa.select(ORDERS.c.order_date)) == [(DAY,)]
    chain.assert_converged()


def test_withdrawn_import_takes_its_orders_customers_leads_and_rejected_rows_along(
    chain: Chain, raw_data: RawData
) -> None:
    rows: list[dict[str, Any]] = [{}, {"order_id": "B", "quantity": -1}, {"order_id": "C", "ordered_at": None}]
    withdrawn = raw_data.add_import(rows)
    chain.announce(withdrawn)
    chain.run_due()
    assert len(chain.expected().rejected) == 2
    chain.assert_converged()
    raw_data.set_status(withdrawn, "failed")
    chain.announce(withdrawn)
    chain.run_due()
    chain.assert_converged()
    assert [
        chain.rows(sa.select(sa.func.count()).select_from(table)) for table in (ORDERS, CUSTOMERS, LEADS, rejected_rows)
    ] == [[(0,)]] * 4


def test_withdrawn_import_that_left_only_rejected_rows_takes_them_along(chain: Chain, raw_data: RawData) -> None:
    """没有事件，只是有人重算了那一天：orders 里没有它的行，拒收记录里有。"""
    withdrawn = raw_data.add_import([{"quantity": -1}])
    chain.run(DAY)
    chain.assert_converged()
    raw_data.set_status(withdrawn, "failed")
    assert chain.announce(withdrawn) == [DAY]
    chain.run_due()
    assert chain.rows(sa.select(rejected_rows.c.raw_id)) == []


def test_order_that_moves_to_another_customer_repairs_both(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"order_id": "A"}, {"order_id": "B", "ordered_at": at(8)}], completed_at=later(1))
    chain.run(DAY, date(2026, 1, 8))
    raw_data.add_import([{"order_id": "A", "customer_name": "李四"}], completed_at=later(2))
    chain.run(DAY)
    assert nicknames(chain) == ["张三", "李四"]
    chain.assert_converged()


def test_each_asset_keeps_its_own_marks_until_it_has_used_them(chain: Chain, raw_data: RawData) -> None:
    """张三的订单全归了李四，区间里再没有张三：customers 与 leads 各凭自己的标记找到他。"""
    raw_data.add_import([{}], completed_at=later(1))
    chain.run(DAY)
    raw_data.add_import([{"customer_name": "李四"}], completed_at=later(2))
    chain.run(DAY, assets=["orders"])
    assert marks(chain) == [("customers", "张三"), ("leads", "张三")]
    chain.run(DAY, assets=["customers"])
    assert marks(chain) == [("leads", "张三")]
    chain.run(DAY, assets=["leads"])
    assert marks(chain) == []
    chain.assert_converged()


def test_leads_of_a_customer_that_an_order_left_are_repaired_after_customers_used_its_marks(
    chain: Chain, raw_data: RawData
) -> None:
    """张三还有别的日子的订单，所以 customers 不会删他的商机：leads 得自己来。"""
    raw_data.add_import(
        [{"order_id": "A", "ordered_at": at(8)}, {"order_id": "B", "ordered_at": at(5)}], completed_at=later(1)
    )
    chain.run(DAY, date(2026, 1, 8))
    raw_data.add_import([{"order_id": "B", "ordered_at": at(5), "customer_name": "李四"}], completed_at=later(2))
    for asset in ("orders", "customers", "leads"):
        chain.run(DAY, assets=[asset])
    chain.assert_converged()


def test_failed_run_gives_its_marks_back(chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch) -> None:
    raw_data.add_import([{}], completed_at=later(1))
    chain.run(DAY)
    raw_data.add_import([{"customer_name": "李四"}], completed_at=later(2))
    chain.run(DAY, assets=["orders"])

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patched:
        patched.setattr("etl_assets.services.materialization.judge_fence", refuse)
        with pytest.raises(RuntimeError, match="no"):
            chain.run(DAY, assets=["customers"])
    assert marks(chain) == [("customers", "张三"), ("leads", "张三")]
    chain.run(DAY, assets=["customers", "leads"])
    chain.assert_converged()


def test_mark_that_comes_while_a_run_works_survives_it(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """customers 读完之后订单离开了张三：那个标记得留给下一次运行。"""
    raw_data.add_import([{}, {"order_id": "B"}], completed_at=later(1))
    chain.run(DAY)

    def read_then_move(*arguments: Any) -> Any:
        frames = list(read_customer_orders(*arguments))
        monkeypatch.undo()
        raw_data.add_import(
            [{"customer_name": "李四"}, {"order_id": "B", "customer_name": "李四"}], completed_at=later(2)
        )
        chain.run(DAY, assets=["orders"])
        return iter(frames)

    monkeypatch.setattr(customers_etl, "read_customer_orders", read_then_move)
    chain.run(DAY, assets=["customers"])
    assert marks(chain) == [("customers", "张三"), ("leads", "张三")]
    chain.run(DAY, assets=["customers", "leads"])
    assert nicknames(chain) == ["李四"]
    chain.assert_converged()


def test_order_changed_by_a_run_of_another_day_reaches_its_customer(chain: Chain, raw_data: RawData) -> None:
    """版本在两天：类型映射改了，只重跑没有赢家的那一天。"""
    raw_data.add_import([{"ordered_at": at(5)}], completed_at=later(1))
    raw_data.add_import([{"ordered_at": at(9)}], completed_at=later(2))
    chain.run(DAY, date(2026, 1, 9))
    chain.execute(
        sa.text("UPDATE order_type_mappings SET system_order_type = 'SAMPLE' WHERE raw_order_type = '大货订单'")
    )
    chain.run(DAY)
    assert chain.rows(sa.select(CUSTOMERS.c.sample_count, CUSTOMERS.c.bulk_count)) == [(1, 0)]
    chain.assert_converged()


# ---- 删除 ------------------------------------------------------------------------


def many_orders(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [{"order_id": f"M-{number}", **changes} for number in range(count)]


def rename_shop(chain: Chain) -> None:
    chain.execute(sa.text("UPDATE shop_configs SET shop_name = 'renamed'"))


def test_too_many_deletes_are_refused_and_nothing_is_written(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(many_orders(30))
    chain.run(DAY)
    before = row_versions_of_orders(chain)
    rename_shop(chain)
    with pytest.raises(TooManyDeletesError, match="refusing to delete 30 of 30 orders of 2026-01-05") as caught:
        chain.run(DAY)
    assert "etl backfill --from 2026-01-05 --to 2026-01-05 --allow-deletes" in str(caught.value)
    assert isinstance(caught.value, PermanentError)
    assert row_versions_of_orders(chain) == before
    assert chain.rows(sa.select(rejected_rows.c.raw_id)) == []


def row_versions_of_orders(chain: Chain) -> list[tuple[Any, ...]]:
    return chain.rows(
        sa.select(ORDERS.c.order_id, sa.literal_column("xmin::text"), sa.literal_column("xmax::text")).order_by(
            ORDERS.c.order_id
        )
    )


def test_many_deletes_are_done_by_a_run_that_was_allowed_to(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(many_orders(30))
    chain.run(DAY)
    rename_shop(chain)
    assert counts(chain.run(DAY, allow_deletes=True)[0].written) == (0, 0, 30)
    chain.assert_converged()


def test_many_deletes_are_done_on_a_day_that_was_requested_with_permission(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(many_orders(30))
    chain.run(DAY)
    rename_shop(chain)
    with chain.engine.begin() as connection:
        request_days(connection, "public", [NEXT], deletes_allowed_on=[NEXT])
    with pytest.raises(TooManyDeletesError):
        chain.run(DAY, NEXT)
    with chain.engine.begin() as connection:
        request_days(connection, "public", [DAY], deletes_allowed_on=[DAY])
    chain.run(DAY, NEXT)
    chain.assert_converged()


@pytest.mark.parametrize(
    ("total", "gone", "refused"), [(20, 20, False), (21, 21, True), (105, 21, False), (104, 21, True)]
)
def test_twenty_deletes_or_a_fifth_of_the_range_pass(
    chain: Chain, raw_data: RawData, total: int, gone: int, refused: bool
) -> None:
    raw_data.add_import(many_orders(total)[gone:])
    withdrawn = raw_data.add_import(many_orders(total)[:gone])
    chain.run(DAY)
    raw_data.set_status(withdrawn, "failed")
    if refused:
        with pytest.raises(TooManyDeletesError):
            chain.run(DAY)
    else:
        chain.run(DAY)
        chain.assert_converged()


# ---- 店铺改了名 ------------------------------------------------------------------


def test_one_order_of_a_renamed_shop_is_not_deleted_and_the_sentence_names_the_shop(
    chain: Chain, raw_data: RawData
) -> None:
    raw_data.add_import([{"shop": f"{SAMPLE_SHOP_NAME}\u3000"}], completed_at=later(1))
    chain.run(DAY)
    before = row_versions_of_orders(chain)
    rename_shop(chain)
    with pytest.raises(TooManyDeletesError) as caught:
        chain.run(DAY)
    assert str(caught.value) == (
        "refusing to delete 1 of 1 orders of 2026-01-05..2026-01-05: shop_configs no longer knows '旗舰店', "
        "whose raw rows are still in scope; name it there again, or if it is meant, run "
        "`etl backfill --from 2026-01-05 --to 2026-01-05 --allow-deletes`"
    )
    assert isinstance(caught.value, PermanentError)
    assert row_versions_of_orders(chain) == before


def test_both_ways_out_of_a_renamed_shop(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}, {"order_id": "B", "ordered_at": at(6)}], completed_at=later(1))
    chain.run(DAY, NEXT)
    rename_shop(chain)
    with chain.engine.begin() as connection:
        request_days(connection, "public", [DAY], deletes_allowed_on=[DAY])
    chain.run(DAY)
    assert chain.rows(sa.select(ORDERS.c.order_id)) == [("B",)]
    with pytest.raises(TooManyDeletesError, match="'旗舰店'"):
        chain.run(NEXT)
    chain.execute(sa.update(shop_configs).values(shop_name=SAMPLE_SHOP_NAME))
    chain.run(DAY, NEXT)
    assert sorted(chain.rows(sa.select(ORDERS.c.order_id))) == [("A-1",), ("B",)]
    chain.assert_converged()


def test_older_version_that_is_still_in_scope_protects_the_order_of_a_renamed_shop(
    chain: Chain, raw_data: RawData
) -> None:
    """赢家那次导入撤回了，早先的版本还在，只是店名不认得了。"""
    raw_data.add_import([{"order_id": " A-1", "ordered_at": at(9)}], completed_at=later(1))
    newest = raw_data.add_import([{}], completed_at=later(2))
    chain.run(DAY)
    rename_shop(chain)
    raw_data.set_status(newest, "failed")
    with pytest.raises(TooManyDeletesError, match="'旗舰店'"):
        chain.run(DAY)


def test_withdrawn_order_of_a_renamed_shop_is_deleted(chain: Chain, raw_data: RawData) -> None:
    """同一个订单号在一家从来不认得的店里，不是它的版本。"""
    withdrawn = raw_data.add_import([{}], completed_at=later(1))
    raw_data.add_import([{"shop": "没有这家"}], completed_at=later(2))
    chain.run(DAY)
    rename_shop(chain)
    raw_data.set_status(withdrawn, "failed")
    chain.run(DAY)
    assert chain.rows(sa.select(ORDERS.c.order_id)) == []
    chain.assert_converged()


# ---- 赢家在区间之外 --------------------------------------------------------------


def test_new_order_whose_winner_lies_outside_the_range_reaches_its_customer(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}], completed_at=later(1))
    raw_data.add_import([{"ordered_at": at(9)}], completed_at=later(2))
    chain.run(DAY)
    assert chain.rows(sa.select(CUSTOMERS.c.customer_nickname, CUSTOMERS.c.order_count)) == [("张三", 1)]
    assert len(lead_rows(chain, "lead_no")) == 1
    chain.assert_converged()


@pytest.mark.parametrize("name", ["李四", "张 三"])
def test_order_that_moves_to_a_customer_outside_the_range_reaches_him(
    chain: Chain, raw_data: RawData, name: str
) -> None:
    raw_data.add_import(
        [{}, {"order_id": "B", "customer_name": "张\u3000三", "ordered_at": at(8)}], completed_at=later(1)
    )
    raw_data.add_import([{"ordered_at": at(9)}], completed_at=later(2))
    chain.run(DAY, date(2026, 1, 9))
    raw_data.add_import([{"ordered_at": at(9), "customer_name": name}], completed_at=later(3))
    chain.run(DAY)
    chain.assert_converged()


def test_order_that_only_changes_the_spelling_of_its_name_outside_the_range_reaches_its_customer(
    chain: Chain, raw_data: RawData
) -> None:
    raw_data.add_import([{}], completed_at=later(1))
    raw_data.add_import([{"ordered_at": at(9), "customer_name": "ABC"}], completed_at=later(2))
    chain.run(DAY, date(2026, 1, 9))
    raw_data.add_import([{"ordered_at": at(9), "customer_name": "ＡＢＣ"}], completed_at=later(3))
    chain.run(DAY)
    assert nicknames(chain) == ["ＡＢＣ"]
    chain.assert_converged()


# ---- 没有编号的商机 --------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [{"owner": "王五"}, {"closed_by": "user", "closed_at": at(4), "current_stage": "LOST"}, {}]
)
def test_lead_that_a_person_inserted_without_a_number_is_left_alone(
    chain: Chain, raw_data: RawData, values: dict[str, Any]
) -> None:
    raw_data.add_import([{}, {"order_id": "B", "ordered_at": at(6)}], completed_at=later(1))
    chain.run(DAY, NEXT)
    (customer_id,) = chain.rows(sa.select(CUSTOMERS.c.customer_global_id))[0]
    for number in (1, 2):
        lead = {
            "lead_id": UUID(int=number),
            "customer_global_id": customer_id,
            "current_stage": "mine",
            "bulk_count": 7,
            **values,
        }
        chain.execute(sa.insert(LEADS).values(**lead))
    before = unnumbered_leads(chain)
    raw_data.add_import([{"order_id": "C", "ordered_at": at(7), "order_status": "new"}], completed_at=later(2))
    wanted = chain.expected()
    chain.run(DAY, date(2026, 1, 7))
    assert unnumbered_leads(chain) == before
    assert [lead_no for (lead_no,) in lead_rows(chain, "lead_no") if lead_no] == [1, 2, 3]
    chain.assert_converged(wanted)


def test_customer_with_a_lead_without_a_number_stays_when_the_orders_go(chain: Chain, raw_data: RawData) -> None:
    import_id = raw_data.add_import([{}], completed_at=later(1))
    chain.run(DAY)
    (customer_id,) = chain.rows(sa.select(CUSTOMERS.c.customer_global_id))[0]
    chain.execute(sa.insert(LEADS).values(lead_id=UUID(int=1), customer_global_id=customer_id, current_stage="mine"))
    before = unnumbered_leads(chain)
    raw_data.set_status(import_id, "failed")
    wanted = chain.expected()
    chain.run(DAY)
    assert unnumbered_leads(chain) == before
    assert nicknames(chain) == ["张三"]
    chain.assert_converged(wanted)


def unnumbered_leads(chain: Chain) -> list[tuple[Any, ...]]:
    return chain.rows(sa.select(*LEADS.c).where(LEADS.c.lead_no.is_(None)).order_by(LEADS.c.lead_id))


def test_customer_without_orders_is_deleted_with_its_leads(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}, {"order_id": "B", "ordered_at": at(6)}], completed_at=later(1))
    chain.run(DAY, NEXT)
    assert len(lead_rows(chain, "lead_no")) == 2
    raw_data.add_import(
        [{"customer_name": "李四"}, {"order_id": "B", "ordered_at": at(6), "customer_name": "李四"}],
        completed_at=later(2),
    )
    chain.run(DAY, NEXT)
    assert nicknames(chain) == ["李四"]
    chain.assert_converged()


@pytest.mark.parametrize(
    "people",
    [{"owner": "王五"}, {"notes": " 电话 "}, {"closed_by": "user", "closed_at": at(7), "current_stage": "LOST"}],
    ids=["owner", "notes", "closing"],
)
def test_customer_without_orders_stays_with_the_leads_that_a_person_touched(
    chain: Chain, raw_data: RawData, people: dict[str, Any]
) -> None:
    raw_data.add_import([{}, {"order_id": "B", "ordered_at": at(6), "order_status": "new"}], completed_at=later(1))
    chain.run(DAY, NEXT)
    chain.execute(sa.update(LEADS).where(LEADS.c.lead_no == 1).values(**people))
    raw_data.add_import(
        [{"customer_name": "李四"}, {"order_id": "B", "ordered_at": at(6), "customer_name": "李四"}],
        completed_at=later(2),
    )
    wanted = chain.expected()
    chain.run(DAY, NEXT)
    chain.assert_converged(wanted)
    assert nicknames(chain) == ["张三", "李四"]
    zhang = sa.select(CUSTOMERS.c.customer_global_id).where(CUSTOMERS.c.customer_nickname == "张三").scalar_subquery()
    columns = (LEADS.c.lead_no, LEADS.c.bulk_count, LEADS.c.opened_at, LEADS.c.current_stage)
    left = chain.rows(sa.select(*columns).where(LEADS.c.customer_global_id == zhang))
    assert left == [(1, 0, None, people.get("current_stage", "OPEN"))]


@pytest.mark.parametrize("people", [{"owner": " \u3000"}, {"notes": ""}, {"closed_by": "user"}], ids=repr)
def test_blank_people_columns_do_not_keep_a_lead(chain: Chain, raw_data: RawData, people: dict[str, Any]) -> None:
    raw_data.add_import([{"order_status": "new"}], completed_at=later(1))
    chain.run(DAY)
    chain.execute(sa.update(LEADS).values(**people))
    raw_data.add_import([{"customer_name": "李四"}], completed_at=later(2))
    chain.run(DAY)
    assert nicknames(chain) == ["李四"]
    chain.assert_converged()


# ---- 人的列与既有的编号 ----------------------------------------------------------


def test_people_columns_are_never_written(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(
        [{"order_status": "new"}, {"order_id": "B", "ordered_at": at(9), "order_status": "new"}], completed_at=later(1)
    )
    chain.run(DAY, date(2026, 1, 9))
    close_lead(chain, 1, at(7), stage="老板说算了")
    chain.execute(sa.update(LEADS).values(owner="王五", notes=" 备注 "))
    wanted = chain.expected()
    chain.run(DAY, date(2026, 1, 9))
    chain.assert_converged(wanted)
    columns = ("lead_no", "current_stage", "closed_by", "closed_at", "owner", "notes", "bulk_count")
    assert lead_rows(chain, *columns) == [
        (1, "老板说算了", "user", at(7), "王五", " 备注 ", 1),
        (2, "OPEN", None, None, None, None, 1),
    ]


def test_closing_without_a_moment_means_nothing(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"order_status": "new"}])
    chain.run(DAY)
    chain.execute(sa.update(LEADS).values(closed_by="user", current_stage="WON"))
    chain.run(DAY)
    assert lead_rows(chain, "current_stage", "closed_by", "closed_at") == [("OPEN", None, None)]


@pytest.mark.parametrize("moment", ["infinity", "-infinity"])
def test_closing_at_infinity_takes_all_orders_or_none(chain: Chain, raw_data: RawData, moment: str) -> None:
    raw_data.add_import([{}, {"order_id": "B"}])
    chain.run(DAY)
    close_lead(chain, 1, sa.cast(moment, TIMESTAMP))
    wanted = chain.expected()
    chain.run(DAY)
    chain.assert_converged(wanted)
    assert lead_rows(chain, "lead_no", "bulk_count")[0] == (1, 2 if moment == "infinity" else 0)


def test_closing_that_commits_between_read_and_write_survives(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{"order_status": "new"}], completed_at=later(1))
    chain.run(DAY)
    raw_data.add_import([{"order_status": "completed"}], completed_at=later(2))
    after_reading(monkeypatch, leads_etl, "transform", lambda: close_lead(chain, 1, at(8)))
    chain.run(DAY)
    assert lead_rows(chain, "current_stage", "closed_by", "closed_at") == [("LOST", "user", at(8))]
    wanted = chain.expected()
    chain.run(DAY)
    chain.assert_converged(wanted)


def test_closing_that_is_taken_back_between_read_and_write_does_not_return(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{"order_status": "new"}])
    chain.run(DAY)
    close_lead(chain, 1, at(8))
    reopen = sa.update(LEADS).values(closed_by=None, closed_at=None, current_stage="OPEN")
    after_reading(monkeypatch, leads_etl, "transform", lambda: chain.execute(reopen))
    chain.run(DAY)
    assert lead_rows(chain, "current_stage", "closed_by", "closed_at") == [("OPEN", None, None)]
    chain.assert_converged()


@pytest.mark.parametrize(
    "change", [{"customer_name": "李四"}, {"order_status": "cancelled"}], ids=["customer goes", "orders go"]
)
def test_lead_that_a_person_is_touching_while_it_is_deleted_stays(
    chain: Chain, raw_data: RawData, change: dict[str, Any]
) -> None:
    """人先改了还没提交，运行的 DELETE 让着他；他提交之后，条件要对新的那一行再看一遍。"""
    raw_data.add_import([{"order_status": "new"}], completed_at=later(1))
    chain.run(DAY)
    raw_data.add_import([change], completed_at=later(2))
    with ThreadPoolExecutor(1) as pool:
        with chain.engine.begin() as person:
            person.execute(sa.update(LEADS).where(LEADS.c.lead_no == 1).values(owner="王五"))
            with giving_way(chain.engine) as has_given_way:
                running = pool.submit(chain.run, DAY)
                wait_until(lambda: running.done() or has_given_way())
            assert not running.done()
        running.result(timeout=30)
    assert ("王五",) in lead_rows(chain, "owner")
    wanted = chain.expected()
    chain.run(DAY)
    chain.assert_converged(wanted)


def after_reading(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, act: Callable[[], None]) -> None:
    """数据读完、`function` 还没开始：人在另一个连接上做一件事并提交。"""
    original = getattr(module, function)

    def interrupted(*arguments: Any) -> Any:
        act()
        return original(*arguments)

    monkeypatch.setattr(module, function, interrupted)


def test_ids_of_an_older_system_are_kept(chain: Chain, raw_data: RawData) -> None:
    key = f"{SAMPLE_SHOP}:张三"
    lead_id = UUID("22222222-2222-4222-8222-222222222222")
    chain.execute(sa.insert(CUSTOMERS).values(customer_global_id=LEGACY_ID, customer_key=key, shop_id=SAMPLE_SHOP))
    chain.execute(sa.insert(LEADS).values(lead_id=lead_id, customer_global_id=LEGACY_ID, lead_no=2, owner="王五"))
    raw_data.add_import([{}, {"order_id": "B", "ordered_at": at(6)}])
    wanted = chain.expected()
    chain.run(DAY, NEXT)
    chain.assert_converged(wanted)
    assert chain.rows(sa.select(CUSTOMERS.c.customer_global_id)) == [(LEGACY_ID,)]
    assert lead_rows(chain, "lead_no", "lead_id")[1] == (2, lead_id)


def test_orders_of_an_older_system_are_taken_in_with_their_customers(chain: Chain, raw_data: RawData) -> None:
    """旧系统写的订单不在索引里：customers 第一次跑到那一天就收进来。"""
    raw_data.add_import([{}, {"order_id": "B", "customer_name": "李四"}])
    chain.run(DAY, assets=["orders"])
    chain.execute(sa.delete(order_index))
    chain.run(DAY, assets=["customers", "leads"])
    chain.assert_converged()


def test_order_that_an_older_system_changed_or_removed_is_noticed(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}, {"order_id": "B", "customer_name": "李四"}])
    chain.run(DAY)
    chain.execute(sa.update(ORDERS).where(ORDERS.c.order_id == "A-1").values(customer_nickname="王五"))
    chain.execute(sa.delete(ORDERS).where(ORDERS.c.order_id == "B"))
    chain.run(DAY, assets=["customers", "leads"])
    assert nicknames(chain) == ["王五"]
    assert lead_rows(chain, "lead_no") == [(1,)]
    chain.run(DAY)
    chain.assert_converged()


# ---- COLD 清扫 -------------------------------------------------------------------


def test_leads_of_other_customers_turn_cold_and_back_as_the_newest_day_moves(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"order_status": "new"}])
    chain.run(DAY)
    newest = raw_data.add_import(
        [{"order_id": "B", "customer_name": "李四", "ordered_at": at(6, month=4), "order_status": "cancelled"}]
    )
    chain.run(date(2026, 4, 6))
    assert (date(2026, 4, 6) - DAY).days == 91
    assert lead_rows(chain, "current_stage") == [("COLD",)]
    chain.assert_converged()
    raw_data.set_status(newest, "failed")
    chain.run(date(2026, 4, 6))
    assert lead_rows(chain, "current_stage") == [("OPEN",)]
    chain.assert_converged()


def test_ninety_days_are_not_cold(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(
        [{"order_status": "new"}, {"order_id": "B", "customer_name": "李四", "ordered_at": at(5, month=4)}]
    )
    chain.run(date(2026, 4, 5))
    chain.run(DAY)
    assert ("OPEN",) in lead_rows(chain, "current_stage")
    chain.assert_converged()


# ---- 并发 ------------------------------------------------------------------------


class Pause:
    """一个函数在别的线程里停在入口，直到放行。"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> None:
        self._reached, self._released = Event(), Event()
        original = getattr(module, function)

        def paused(*arguments: Any) -> Any:
            if not self._reached.is_set():  # 只停第一个到的
                self._reached.set()
                assert self._released.wait(timeout=30)
            return original(*arguments)

        monkeypatch.setattr(module, function, paused)

    def wait_until_reached(self) -> None:
        assert self._reached.wait(timeout=30)

    def release(self) -> None:
        self._released.set()


def wait_until_blocked(chain: Chain, running: Future[Any]) -> None:
    """等到有连接在等锁；那个运行若先结束了，就说明没有人拦它。"""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = monotonic() + 30
    with chain.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while connection.execute(waiting).scalar_one() == 0:
            assert not running.done(), "the second run did not wait for the first"
            assert monotonic() < deadline
            sleep(0.01)


@pytest.mark.parametrize("second_day", [DAY, NEXT], ids=["same day", "day of another version"])
def test_older_snapshot_never_overwrites_a_newer_one(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, second_day: date
) -> None:
    """第一个运行读完就停；新导入来了，第二个运行要么等它，要么看到它写的。"""
    raw_data.add_import([{"ordered_at": at(5)}], completed_at=later(1))
    raw_data.add_import([{"ordered_at": at(6)}], completed_at=later(2))
    pause = Pause(monkeypatch, orders_versions, "transform")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(chain.run, DAY, assets=["orders"])
        pause.wait_until_reached()
        raw_data.add_import([{"ordered_at": at(6), "amount": "3.00"}], completed_at=later(3))
        second = pool.submit(chain.run, second_day, assets=["orders"])
        try:
            wait_until_blocked(chain, second)
        finally:
            pause.release()
        first.result(timeout=30)
        second.result(timeout=30)
    assert chain.rows(sa.select(ORDERS.c.amount)) == [(3,)]


def test_event_does_not_wait_for_a_run_over_days_that_the_ledger_does_not_know(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """一批事件里有一个正好说到其中一天，等到期限的是整批。"""
    raw_data.add_import([{"ordered_at": at(5)}], completed_at=later(1))
    pause = Pause(monkeypatch, orders_versions, "transform")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(chain.run, DAY, NEXT)
        pause.wait_until_reached()
        try:
            with chain.engine.begin() as connection:
                connection.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
                request_days(connection, "public", [DAY])
        finally:
            pause.release()
        running.result(timeout=30)
    assert chain.due_days("orders") == [DAY]
    chain.run_due()
    chain.assert_converged()


@pytest.mark.parametrize("asset", ["customers", "leads"])
def test_two_runs_that_share_a_customer_follow_one_another(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, asset: str
) -> None:
    """同一个客户、不同的日子，客户那一行还不存在。"""
    raw_data.add_import([{"order_status": "new"}], completed_at=later(1))
    chain.run(DAY, assets=["orders"])
    pause = Pause(monkeypatch, {"customers": customers_etl, "leads": leads_etl}[asset], "transform")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(chain.run, DAY, assets=[asset])
        pause.wait_until_reached()
        raw_data.add_import([{"order_id": "B", "ordered_at": at(6), "order_status": "new"}], completed_at=later(2))
        chain.run(NEXT, assets=["orders"])
        second = pool.submit(chain.run, NEXT, assets=[asset])
        try:
            wait_until_blocked(chain, second)
        finally:
            pause.release()
        first.result(timeout=30)
        second.result(timeout=30)
    if asset == "leads":
        assert lead_rows(chain, "bulk_count") == [(2,)]
    else:
        assert chain.rows(sa.select(CUSTOMERS.c.order_count)) == [(2,)]


def test_runs_at_the_same_time_converge(chain: Chain, raw_data: RawData) -> None:
    """三个线程反复物化互相重叠的区间，导入同时到来；全部停下之后再把到期的做完。"""
    for hour in (1, 2):
        chain.announce(raw_data.add_import(versions(orders=40, completed_hour=hour), completed_at=later(hour)))

    def materialize_repeatedly(first: date, last: date) -> None:
        for _ in range(3):
            chain.run(first, last)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(materialize_repeatedly, *days) for days in ((DAY, DAY), (DAY, NEXT), (NEXT, NEXT))]
        for hour in (3, 4):
            chain.announce(raw_data.add_import(versions(orders=40, completed_hour=hour), completed_at=later(hour)))
        failed = [error for run in running if (error := run.exception(timeout=60))]
    if failed:  # 全都说出来：等不到锁的那个不知道，是谁、为什么占着
        raise BaseExceptionGroup("of the runs at the same time", failed)
    chain.run_due()
    chain.assert_converged()


# ---- 冲突与超时 ------------------------------------------------------------------


def test_conflict_with_another_run_is_tried_again(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    failures = iter([psycopg.errors.DeadlockDetected("deadlock"), psycopg.errors.UniqueViolation("duplicate")])
    load = orders_etl.load

    def conflict_twice(*arguments: Any) -> Any:
        written = load(*arguments)
        for error in failures:
            raise error
        return written

    monkeypatch.setattr(orders_etl, "load", conflict_twice)
    chain.run(DAY)
    chain.assert_converged()


def test_conflict_that_does_not_end_is_a_transient_error(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_data.add_import([{}])
    attempts = 0

    def always_conflict(*_: Any) -> Any:
        nonlocal attempts
        attempts += 1
        raise psycopg.errors.DeadlockDetected("deadlock")

    monkeypatch.setattr(orders_etl, "load", always_conflict)
    monkeypatch.setattr("random.uniform", lambda *_: 0)
    with pytest.raises(TransientError, match="other runs were in the way"):
        chain.run(DAY)
    assert attempts == 5


def test_lock_that_another_holds_too_long_is_a_transient_error_that_names_him(
    chain: Chain, raw_data: RawData, etl_settings: EtlSettings
) -> None:
    raw_data.add_import([{}])
    chain.run(DAY)
    impatient = build_engine(etl_settings.model_copy(update={"lock_timeout_seconds": 1}))
    with chain.engine.begin() as holder:
        holder.exec_driver_sql("SET LOCAL application_name = 'psql'")
        holder.execute(sa.text("SELECT * FROM etl.locks WHERE kind = 'day' FOR UPDATE")).all()
        pid = holder.scalar(sa.text("SELECT pg_backend_pid()"))
        with pytest.raises(TransientError, match="ETL_LOCK_TIMEOUT_SECONDS") as caught:
            Chain(impatient, etl_settings.model_copy(update={"lock_timeout_seconds": 1})).run(DAY)
    impatient.dispose()
    named = re.search(
        rf"session {pid} \(psql of etl\) has held locks for (\d+) s, idle in transaction: ", str(caught.value)
    )
    assert named, caught.value
    assert int(named[1]) >= 1


def test_person_who_holds_a_lead_too_long_is_named(chain: Chain, raw_data: RawData, etl_settings: EtlSettings) -> None:
    raw_data.add_import([{}])
    chain.run(DAY)
    settings = etl_settings.model_copy(update={"lock_timeout_seconds": 1})
    raw_data.add_import([{"amount": "7.00"}], completed_at=later(2))
    with chain.engine.begin() as person:
        person.execute(sa.update(LEADS).values(notes="电话"))
        pid = person.scalar(sa.text("SELECT pg_backend_pid()"))
        with pytest.raises(TransientError, match=f"session {pid} .* SELECT pg_terminate_backend"):
            Chain(chain.engine, settings).run(DAY)
    chain.run(DAY)
    chain.assert_converged()


# ---- 影子结果 --------------------------------------------------------------------


@pytest.fixture
def shadow(chain: Chain) -> Iterator[Chain]:
    """同一个数据库，结果写到 schema shadow。"""
    chain.execute(sa.schema.CreateSchema("shadow"))
    with chain.engine.begin() as connection:
        target_tables("shadow").orders.metadata.create_all(connection)
    shadow = Chain(chain.engine, chain.settings.model_copy(update={"target_schema": "shadow"}))
    shadow.use_graph(chain.graph)
    yield shadow
    chain.execute(sa.schema.DropSchema("shadow", cascade=True))


def test_shadow_schema_gets_its_own_result_and_its_own_ledger(chain: Chain, shadow: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}], completed_at=later(1))
    chain.run(DAY)
    raw_data.add_import([{"customer_name": "李四"}], completed_at=later(2))
    shadow.run(DAY)
    assert nicknames(chain) == ["张三"]
    assert chain.rows(sa.select(target_tables("shadow").customers.c.customer_nickname)) == [("李四",)]
    entries = (
        sa.select(ledger.c.target, ledger.c.asset)
        .where(ledger.c.materialized > 0)
        .order_by(ledger.c.target, ledger.c.asset)
    )
    assert chain.rows(entries) == [
        (target, asset) for target in ("public", "shadow") for asset in ("customers", "leads", "orders")
    ]


def test_raw_rows_are_never_changed(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}, {"order_id": None}, {"shop": f" {SAMPLE_SHOP_NAME} "}])
    version = sa.select(raw_orders.c.raw_id, sa.literal_column("xmin::text"), sa.literal_column("xmax::text")).order_by(
        raw_orders.c.raw_id
    )
    before = chain.rows(version)
    chain.run(DAY)
    assert chain.rows(version) == before
