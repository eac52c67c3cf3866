"""账：每天的原始行 = 装入 + 被取代 + 被拒收，写完再数；数不对就什么也不提交。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any
from uuid import UUID

import polars as pl
import pytest
import sqlalchemy as sa

from etl_assets.core.etl_tables import ledger, rejected_rows
from etl_assets.core.tables import target_tables
from etl_assets.orders import etl as orders_etl
from etl_assets.orders import versions, winners
from etl_assets.reports.reports import import_accounting
from etl_assets.services.accounting import AccountingError, DayAccount
from etl_assets.testing.raw_data import SAMPLE_SHOP, SAMPLE_SHOP_NAME, RawData
from tests.integration.engine.chain import Chain
from tests.reference.oracle import Split, accounting

DAY = date(2026, 1, 5)
NEXT = date(2026, 1, 6)
AFTER = date(2026, 1, 7)
ORDERS = target_tables("public").orders
PADDED = "\u2003A-1\u3000\x85"
SPLIT = ("raw", "loaded", "superseded", "rejected", "waiting")


def at(day: int) -> datetime:
    return datetime(2026, 1, day, 4, tzinfo=UTC)


def completed(hour: int) -> datetime:
    """导入完成的时刻：越大越新。"""
    return datetime(2026, 6, 1, hour, tzinfo=UTC)


def accounts_of(chain: Chain, first: date, last: date | None = None) -> Sequence[DayAccount]:
    (report,) = chain.run(first, last, assets=["orders"])
    return report.accounts


def splits(accounts: Sequence[DayAccount]) -> list[tuple[int, int, int, int]]:
    return [(account.raw, account.loaded, account.superseded, account.rejected_count) for account in accounts]


# ---- 平的账 ----------------------------------------------------------------------


def test_every_day_has_its_own_account(chain: Chain, raw_data: RawData) -> None:
    """一个订单从 5 日搬到 7 日：旧版本算 5 日被取代；6 日空着。"""
    old: list[dict[str, Any]] = [
        {"ordered_at": at(5)},
        {"order_id": "B", "ordered_at": at(5), "quantity": -1},
        {"order_id": None, "shop": None, "ordered_at": at(5)},
        {"order_id": None, "ordered_at": at(5)},
        {"order_id": None, "ordered_at": None},
    ]
    raw_data.add_import(old, completed_at=completed(1))
    raw_data.add_import(
        [{"order_id": PADDED, "ordered_at": at(7)}, {"order_id": "C", "ordered_at": at(7)}], completed_at=completed(2)
    )
    accounts = accounts_of(chain, DAY, AFTER)
    assert [account.day for account in accounts] == [DAY, NEXT, AFTER]
    assert splits(accounts) == [(4, 0, 1, 3), (0, 0, 0, 0), (2, 2, 0, 0)]
    assert accounts[0].rejected == {"missing_order_id": 2, "negative_quantity": 1}
    assert accounts[0].rejected_examples == {"missing_order_id": [3, 4], "negative_quantity": [2]}


def test_examples_of_rejected_rows_are_few(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"quantity": -1}] * 8)
    (account,) = accounts_of(chain, DAY)
    assert account.rejected == {"negative_quantity": 8}
    assert account.rejected_examples == {"negative_quantity": [1, 2, 3, 4, 5]}


def test_winner_on_a_day_that_is_not_run_explains_the_superseded_row(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"ordered_at": at(5)}], completed_at=completed(1))
    raw_data.add_import([{"ordered_at": at(9)}], completed_at=completed(2))
    assert splits(accounts_of(chain, DAY)) == [(1, 0, 1, 0)]


def test_accounts_agree_with_the_reference(chain: Chain, raw_data: RawData) -> None:
    """版本、坏行、撤回的导入、没有分区的行，连同夏令时切换那天的零点。"""
    local = Chain(chain.engine, chain.settings.model_copy(update={"timezone": "America/St_Johns"}))
    moments = [
        datetime(2005, 10, 30, hour, minute, tzinfo=UTC) for hour in (2, 3) for minute in (0, 29, 30, 31, 32, 59)
    ]
    for hour in range(3):
        rows = [
            {"order_id": f"{number % 4}", "ordered_at": moment, "quantity": -1 if (number + hour) % 5 == 0 else 1}
            for number, moment in enumerate(moments)
        ]
        raw_data.add_import([*rows, {"order_id": "x", "ordered_at": "infinity"}], completed_at=completed(hour))
    raw_data.add_import([{"ordered_at": moments[0]}], status="failed")
    first, last = date(2005, 10, 28), date(2005, 10, 31)
    accounts = accounts_of(local, first, last)
    with chain.engine.connect() as connection:
        reference = accounting(connection, local.reference_settings).by_day
    found = {
        account.day: Split(loaded=account.loaded, superseded=account.superseded, rejected=account.rejected_count)
        for account in accounts
        if account.raw
    }
    assert found == reference
    assert len(found) == 2


# ---- 警告 ------------------------------------------------------------------------


def warnings_of(chain: Chain, first: date, last: date | None = None) -> dict[date, dict[str, list[int]]]:
    """有警告的日子 → 缘由 → raw_id；数目总是与例子一样多，除非超过五个。"""
    (report,) = chain.run(first, last, assets=["orders"])
    for warnings in report.warnings.values():
        assert {rule: min(rows, 5) for rule, rows in warnings.rows.items()} == {
            rule: len(ids) for rule, ids in warnings.examples.items()
        }
    return {
        day: {rule: list(ids) for rule, ids in warnings.examples.items()} for day, warnings in report.warnings.items()
    }


def test_repeated_row_is_warned_of_on_its_own_day_whatever_day_is_run(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import(
        [{"ordered_at": at(5)}, {"order_id": PADDED, "ordered_at": at(6)}, {"ordered_at": at(7)}],
        completed_at=completed(1),
    )
    raw_data.add_import([{"ordered_at": at(7)}], completed_at=completed(2))
    first, second = {"repeated_in_import": [1]}, {"repeated_in_import": [2]}
    assert warnings_of(chain, DAY, AFTER) == {DAY: first, NEXT: second}
    assert warnings_of(chain, NEXT) == {NEXT: second}
    assert warnings_of(chain, AFTER) == {}


def test_imports_of_one_moment_do_not_repeat_each_other(chain: Chain, raw_data: RawData) -> None:
    for moment in (None, completed(1)):
        for _ in range(2):
            raw_data.add_import([{}], completed_at=moment)
    assert warnings_of(chain, DAY) == {}


def test_rejected_row_repeats_nothing_and_only_loaded_rows_have_unmapped_types(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{"order_type": "旧的"}, {"order_type": "旧的", "quantity": -1}], completed_at=completed(1))
    raw_data.add_import(
        [{}, *[{"order_id": f"B-{number}", "order_type": "定制"} for number in range(7)]], completed_at=completed(2)
    )
    assert warnings_of(chain, DAY) == {DAY: {"unmapped_type": [4, 5, 6, 7, 8]}}


# ---- 不平的账 --------------------------------------------------------------------


def swallow(chain: Chain, table: str, condition: str, *, event: str = "INSERT") -> None:
    """一个触发器，悄悄丢掉某些行的写入。"""
    chain.execute(
        sa.text(f"""
            CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
            CREATE TRIGGER swallow BEFORE {event} ON {table} FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION swallow();
        """)
    )


@pytest.fixture
def chain(chain: Chain) -> Any:
    """库是共用的：测试留下的触发器在这里拆掉。"""
    yield chain
    chain.execute(sa.text("DROP FUNCTION IF EXISTS swallow() CASCADE"))


def assert_nothing_written(chain: Chain) -> None:
    for table in (ORDERS, rejected_rows):
        assert chain.rows(sa.select(sa.func.count()).select_from(table)) == [(0,)]
    assert chain.rows(sa.select(sa.func.count()).where(ledger.c.materialized > 0)) == [(0,)]


def test_lost_order_is_found_and_nothing_is_written(chain: Chain, raw_data: RawData) -> None:
    rows: list[dict[str, Any]] = [
        {},
        {"order_id": "B", "ordered_at": at(6)},
        {"order_id": "C", "ordered_at": at(6)},
        {"order_id": "D", "quantity": -1},
    ]
    chain.announce(raw_data.add_import(rows))
    swallow(chain, "orders", "NEW.order_id = 'B'")
    with pytest.raises(AccountingError) as caught:
        chain.run(DAY, AFTER)
    (account,) = caught.value.accounts
    assert (account.day, account.raw, account.loaded, account.difference, account.lost_examples) == (NEXT, 2, 1, 1, [2])
    assert str(caught.value) == (
        "the rows do not add up, so nothing was written: 2 raw rows in scope on 2026-01-06, 1 loaded + 0 superseded + 0 rejected "
        "(look at raw_id 2); find the trigger, rule or program that changes orders or etl.rejected_rows"
    )
    assert_nothing_written(chain)
    assert chain.due_days() == [DAY, NEXT]


def test_day_is_done_once_the_cause_is_gone(chain: Chain, raw_data: RawData) -> None:
    chain.announce(raw_data.add_import([{}]))
    swallow(chain, "orders", "true")
    with pytest.raises(AccountingError):
        chain.run(DAY)
    chain.execute(sa.text("DROP FUNCTION swallow() CASCADE"))
    chain.run_due()
    chain.assert_converged()


def test_lost_rejected_row_is_found(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}, {"order_id": None}, {"quantity": -1}])
    swallow(chain, "etl.rejected_rows", "NEW.rule = 'negative_quantity'")
    with pytest.raises(
        AccountingError,
        match=r"3 raw rows in scope on 2026-01-05, 1 loaded \+ 0 superseded \+ 1 rejected \(look at raw_id 3\)",
    ):
        chain.run(DAY)
    assert_nothing_written(chain)


def test_order_whose_versions_are_all_superseded_is_lost(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """选赢家时把订单的每个版本都当作输家：输家的订单不在 orders 里，就不算被取代。"""
    for hour in (1, 2):
        raw_data.add_import([{}], completed_at=completed(hour))
    raw_data.add_import([{"order_id": "B"}], completed_at=completed(1))
    pick_winners = winners.pick_winners
    monkeypatch.setattr(
        winners, "pick_winners", lambda versions: pick_winners(versions).filter(pl.col("order_id") != "A-1")
    )
    with pytest.raises(
        AccountingError,
        match=r"3 raw rows in scope on 2026-01-05, 1 loaded \+ 0 superseded \+ 0 rejected \(look at raw_id 1, 2\)",
    ):
        chain.run(DAY)
    assert_nothing_written(chain)


def test_row_that_never_reached_the_transform_is_lost(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """读的时候丢了一整次导入的行。"""
    raw_data.add_import([{}])
    raw_data.add_import([{"order_id": "B"}])
    transform = versions.transform
    monkeypatch.setattr(
        versions, "transform", lambda rows, *arguments: transform(rows.filter(pl.col("order_id") != "B"), *arguments)
    )
    with pytest.raises(AccountingError, match=r"2 raw rows in scope on 2026-01-05, 1 loaded .* \(look at raw_id 2\)"):
        chain.run(DAY)


def test_lost_update_is_found(chain: Chain, raw_data: RawData) -> None:
    """订单还是旧版本：旧版本不能又算装入、又算被取代。"""
    raw_data.add_import([{}], completed_at=completed(1))
    chain.run(DAY)
    raw_data.add_import([{"amount": "7.00"}], completed_at=completed(2))
    swallow(chain, "orders", "true", event="UPDATE")
    with pytest.raises(
        AccountingError, match=r"2 raw rows in scope on 2026-01-05, 1 loaded \+ 0 superseded .* \(look at raw_id 2\)"
    ):
        chain.run(DAY)


def test_order_that_should_have_been_deleted_is_one_too_many(chain: Chain, raw_data: RawData) -> None:
    withdrawn = raw_data.add_import([{}])
    chain.run(DAY)
    raw_data.set_status(withdrawn, "failed")
    swallow(chain, "orders", "true", event="DELETE")
    with pytest.raises(AccountingError, match="0 raw rows in scope on 2026-01-05, 1 loaded"):
        chain.run(DAY)


# ---- 并发：此刻才完成、才撤回的导入 ---------------------------------------------------


@pytest.mark.parametrize("change", ["completes", "is withdrawn", "completes unannounced"])
def test_import_that_changes_while_a_run_works_does_not_upset_its_account(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    chain.announce(raw_data.add_import([{}], completed_at=completed(1)))
    other = raw_data.add_import(
        [{"amount": "7.00"}, {"order_id": "B"}, {"order_id": "C", "quantity": -1}],
        status="completed" if change == "is withdrawn" else "pending",
        completed_at=completed(2),
    )
    load = orders_etl.load

    def load_after_the_change(*arguments: Any) -> Any:
        monkeypatch.undo()
        raw_data.set_status(other, "failed" if change == "is withdrawn" else "completed")
        if change != "completes unannounced":
            chain.announce(other)
        return load(*arguments)

    monkeypatch.setattr(orders_etl, "load", load_after_the_change)
    assert splits(accounts_of(chain, DAY)) == ([(4, 2, 1, 1)] if change == "is withdrawn" else [(1, 1, 0, 0)])
    assert splits(accounts_of(chain, DAY)) == ([(1, 1, 0, 0)] if change == "is withdrawn" else [(4, 2, 1, 1)])
    chain.run(DAY, assets=["customers", "leads"])
    chain.assert_converged()


def test_shop_that_is_renamed_while_a_run_works_does_not_upset_its_account(
    chain: Chain, raw_data: RawData, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hour in (1, 2):
        raw_data.add_import([{}], completed_at=completed(hour))
    load = orders_etl.load

    def load_after_renaming(*arguments: Any) -> Any:
        chain.execute(sa.text("UPDATE shop_configs SET shop_name = 'renamed'"))
        return load(*arguments)

    monkeypatch.setattr(orders_etl, "load", load_after_renaming)
    assert splits(accounts_of(chain, DAY)) == [(2, 1, 1, 0)]


# ---- 视图 ------------------------------------------------------------------------


def view_rows(chain: Chain, target: str) -> dict[UUID, tuple[Any, ...]]:
    view = sa.table("accounting", *map(sa.column, ("target", "import_id", *SPLIT)), schema="etl")
    rows = chain.rows(sa.select(view.c["import_id"], *view.c[*SPLIT]).where(view.c.target == target))
    return {row[0]: row[1:] for row in rows}


def test_view_gives_the_split_of_every_import(chain: Chain, raw_data: RawData) -> None:
    imports = [
        raw_data.add_import([{}, {"order_id": None}, {"order_id": "B", "ordered_at": None}], completed_at=completed(1)),
        raw_data.add_import([{"order_id": PADDED, "shop": f"\t{SAMPLE_SHOP_NAME} "}], completed_at=completed(2)),
        raw_data.add_import([{"order_id": "C", "ordered_at": at(20)}], completed_at=completed(3)),
        raw_data.add_import([{"order_id": "D"}], status="failed"),
        raw_data.add_import([], status="completed"),
    ]
    chain.announce(*imports[:2])
    chain.run_due()
    expected = [(3, 0, 1, 2, 0), (1, 1, 0, 0, 0), (1, 0, 0, 0, 1), (1, 0, 0, 0, 0), (0, 0, 0, 0, 0)]
    assert view_rows(chain, "public") == dict(zip(imports, expected, strict=True))
    with chain.engine.connect() as connection:
        listed = {
            row["import_id"]: tuple(row[name] for name in SPLIT)
            for row in import_accounting(connection, chain.settings)
        }
    assert listed == dict(zip(imports, expected, strict=True))


def test_view_covers_every_target_schema_and_leaves_the_application_its_columns(
    chain: Chain, raw_data: RawData
) -> None:
    """影子结果有自己的一份；应用改自己的表，视图不拦；表没有了，视图里就没有它。"""
    chain.execute(sa.schema.CreateSchema("Shadow 1"))
    with chain.engine.begin() as connection:
        target_tables("Shadow 1").orders.metadata.create_all(connection)
    shadow = Chain(chain.engine, chain.settings.model_copy(update={"target_schema": "Shadow 1"}))
    shadow.use_graph(chain.graph)
    try:
        import_id = raw_data.add_import([{}])
        shadow.run(DAY)
        assert view_rows(chain, "public") == {import_id: (1, 0, 0, 0, 1)}
        assert view_rows(chain, "Shadow 1") == {import_id: (1, 1, 0, 0, 0)}
        chain.execute(sa.text('ALTER TABLE "Shadow 1".orders ALTER order_id TYPE varchar(600), DROP quantity'))
        assert view_rows(chain, "Shadow 1") == {import_id: (1, 1, 0, 0, 0)}
    finally:
        chain.execute(sa.schema.DropSchema("Shadow 1", cascade=True))
    assert view_rows(chain, "Shadow 1") == {}
    assert view_rows(chain, "public") == {import_id: (1, 0, 0, 0, 1)}


def test_accounting_holds_for_a_shop_with_odd_names(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_shop(UUID(int=SAMPLE_SHOP.int + 1), "o'Brien; DROP TABLE %s :x \\")
    rows = [{"shop": "o'Brien; DROP TABLE %s :x \\", "order_id": f"%I-{number % 2}"} for number in range(3)]
    raw_data.add_import(rows)
    assert splits(accounts_of(chain, DAY)) == [(3, 2, 1, 0)]
