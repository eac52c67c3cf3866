"""租约：领到的日子不重叠，过期的有人接手，接手之后原来的工人提交不了。"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import LeaseLostError
from etl_assets.core.etl_tables import leases, ledger, outbox
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.intake.named_customers import request_customers
from etl_assets.ledger.claims import (
    MAX_DAYS_PER_RUN,
    RUSH_IMPORTS,
    RUSH_PATIENCE_SECONDS,
    RUSH_QUIET_SECONDS,
    RUSH_ROWS,
    SMALL_ROWS,
    Claim,
    claim_due_days,
    has_claimable_days,
    has_days_in_a_rush,
)
from etl_assets.ledger.leases import (
    Lease,
    LeaseState,
    acquire_lease,
    current_lease,
    delete_expired_lease,
    extend_lease,
    judge_fence,
    read_expired_leases,
    release_lease,
    request_cancel,
)
from etl_assets.ledger.requests import request_days
from etl_assets.orders import etl as orders_etl
from etl_assets.services import materialization
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import ASSETS, Chain, read_and_mark

DAY = date(2026, 1, 5)
TARGET = "public"


def days_from(first: date, count: int) -> list[date]:
    return [first + timedelta(days=offset) for offset in range(count)]


def request(engine: sa.Engine, days: Sequence[date]) -> None:
    with engine.begin() as connection:
        request_days(connection, TARGET, days)


def claim(engine: sa.Engine, run_id: str, *, lease_seconds: float = 60, small: bool = False) -> Claim | None:
    with engine.begin() as connection:
        return claim_due_days(connection, TARGET, run_id=run_id, owner="test", lease_seconds=lease_seconds, small=small)


def claim_all(engine: sa.Engine, name: str) -> list[Claim]:
    claims: list[Claim] = []
    while (claimed := claim(engine, f"{name}-{len(claims)}")) is not None:
        claims.append(claimed)
    return claims


def expire(engine: sa.Engine, run_id: str) -> None:
    """时候到了：不等，直接把到期时刻改成过去。"""
    with engine.begin() as connection:
        past = sa.func.clock_timestamp() - timedelta(seconds=1)
        connection.execute(sa.update(leases).where(leases.c.run_id == run_id).values(expires_at=past))


def done(engine: sa.Engine, asset: str, days: DayRange) -> None:
    with engine.begin() as connection:
        read_and_mark(connection, TARGET, asset, days)


def held_leases(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(leases.c.run_id).order_by(leases.c.run_id)))


# ---- 领取 ------------------------------------------------------------------------


def test_nothing_due_means_nothing_claimed(engine: sa.Engine) -> None:
    assert claim(engine, "run") is None
    assert held_leases(engine) == []


def test_contiguous_days_are_claimed_together_and_a_gap_starts_another_run(engine: sa.Engine) -> None:
    early, late = days_from(DAY, 3), days_from(DAY + timedelta(days=4), 2)
    request(engine, [*late, *early])
    first, second = claim_all(engine, "run")
    assert (list(first.days), first.more) == (early, True)
    assert (list(second.days), second.more) == (late, False)


def test_run_takes_at_most_30_days(engine: sa.Engine) -> None:
    days = days_from(DAY, 2 * MAX_DAYS_PER_RUN + 3)
    request(engine, days)
    claims = claim_all(engine, "run")
    assert [len(claimed.days) for claimed in claims] == [30, 30, 3]
    assert [day for claimed in claims for day in claimed.days] == days


def test_days_that_waited_longest_are_claimed_first(engine: sa.Engine) -> None:
    request(engine, [DAY])
    request(engine, [DAY - timedelta(days=10)])
    first, second = claim_all(engine, "run")
    assert (first.days.first, second.days.first) == (DAY, DAY - timedelta(days=10))


def test_days_asked_for_after_an_import_of_ten_years_do_not_wait_for_all_of_it(engine: sa.Engine) -> None:
    request(engine, days_from(date(2001, 1, 1), 3_650))
    small = [date(2020, 1, 1), date(2020, 3, 1), date(2020, 5, 1)]
    for day in small:
        request(engine, [day])
    claimed = [claim(engine, f"worker-{number}") for number in range(10)]
    turns = [turn.days.first for turn in claimed if turn is not None]
    assert turns[0] == date(2001, 1, 1)
    assert set(small) < set(turns)


def test_neighbouring_days_with_different_next_assets_are_different_runs(engine: sa.Engine) -> None:
    days = days_from(DAY, 3)
    request(engine, days)
    done(engine, "orders", DayRange(days[1], days[1]))
    claims = {claimed.days.first: claimed for claimed in claim_all(engine, "run")}
    assert {day: (len(claimed.days), claimed.assets) for day, claimed in claims.items()} == {
        days[0]: (1, ASSETS),
        days[1]: (1, ("customers", "leads")),
        days[2]: (1, ASSETS),
    }


def test_claimed_days_are_not_claimed_again_until_they_are_released(engine: sa.Engine) -> None:
    request(engine, [DAY])
    claimed = claim(engine, "one")
    assert claimed is not None
    request(engine, [DAY])
    assert claim(engine, "two") is None
    with engine.begin() as connection:
        assert not has_claimable_days(connection, TARGET)
        release_lease(connection, claimed.lease)
    assert claim(engine, "two") is not None


def test_claimers_at_the_same_time_never_overlap(engine: sa.Engine) -> None:
    days = [day for month in range(6) for day in days_from(DAY + timedelta(days=50 * month), 40)]
    request(engine, days)
    workers = 4
    barrier = Barrier(workers)

    def work(name: str) -> list[Claim]:
        barrier.wait(timeout=20)
        return claim_all(engine, name)

    with ThreadPoolExecutor(workers) as pool:
        claims = [claimed for found in pool.map(work, "abcd") for claimed in found]
    assert sorted(day for claimed in claims for day in claimed.days) == sorted(days)


# ---- 过期与心跳 ------------------------------------------------------------------


def test_days_of_an_expired_lease_are_claimed_once_its_run_is_buried(engine: sa.Engine) -> None:
    request(engine, [DAY])
    assert claim(engine, "dead") is not None
    with engine.begin() as connection:
        delete_expired_lease(connection, "dead")
    assert held_leases(engine) == ["dead"]
    expire(engine, "dead")
    assert claim(engine, "next") is None
    with engine.begin() as connection:
        assert read_expired_leases(connection, TARGET) == [("dead", False)]
        delete_expired_lease(connection, "dead")
    taken = claim(engine, "next")
    assert taken is not None
    assert taken.days == DayRange(DAY, DAY)
    assert held_leases(engine) == ["next"]


def test_lease_of_zero_seconds_is_expired_by_the_database_clock(engine: sa.Engine) -> None:
    request(engine, [DAY])
    assert claim(engine, "dead", lease_seconds=0) is not None
    with engine.connect() as connection:
        assert read_expired_leases(connection, TARGET) == [("dead", False)]


def test_heartbeat_extends_a_lease_that_is_held(engine: sa.Engine) -> None:
    request(engine, [DAY])
    claimed = claim(engine, "run", lease_seconds=30)
    assert claimed is not None
    with engine.begin() as connection:
        before = connection.scalar(sa.select(leases.c.expires_at))
        assert extend_lease(connection, claimed.lease, lease_seconds=300) is LeaseState.VALID
        after = connection.scalar(sa.select(leases.c.expires_at))
    assert before is not None
    assert after is not None
    assert after - before > timedelta(seconds=200)


def test_heartbeat_cannot_revive_an_expired_lease(engine: sa.Engine) -> None:
    request(engine, [DAY])
    claimed = claim(engine, "run")
    assert claimed is not None
    expire(engine, "run")
    with engine.begin() as connection:
        assert extend_lease(connection, claimed.lease, lease_seconds=300) is LeaseState.LOST


def test_cancel_is_seen_by_the_next_heartbeat_and_by_the_release(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert not request_cancel(connection, "run")
        lease = acquire_lease(connection, TARGET, None, run_id="run", owner="test", lease_seconds=60)
        assert lease is not None
        assert extend_lease(connection, lease, lease_seconds=60) is LeaseState.VALID
        assert request_cancel(connection, "run")
        assert extend_lease(connection, lease, lease_seconds=60) is LeaseState.CANCEL_REQUESTED
        assert release_lease(connection, lease) is LeaseState.CANCEL_REQUESTED


def test_a_run_has_one_lease(engine: sa.Engine) -> None:
    """同一条消息投递两次：第二个工人拿不到。"""
    with engine.begin() as connection:
        assert acquire_lease(connection, TARGET, None, run_id="run", owner="one", lease_seconds=60)
        assert acquire_lease(connection, TARGET, None, run_id="run", owner="two", lease_seconds=60) is None


def test_worker_with_an_old_token_can_neither_extend_nor_release(engine: sa.Engine) -> None:
    """同一个运行交给了别的工人：run_id 相同，token 不同。"""
    request(engine, [DAY])
    claimed = claim(engine, "run")
    assert claimed is not None
    stranger = Lease(run_id="run", token=UUID(int=1))
    with engine.begin() as connection:
        assert extend_lease(connection, stranger, lease_seconds=300) is LeaseState.LOST
        assert release_lease(connection, stranger) is LeaseState.LOST
    assert held_leases(engine) == ["run"]


# ---- 栅栏 ------------------------------------------------------------------------


def run_orders_under(lease: Lease, chain: Chain) -> None:
    token = current_lease.set(lease)
    try:
        chain.run(DAY, assets=["orders"])
    finally:
        current_lease.reset(token)


def written(chain: Chain) -> tuple[int, int, int]:
    """订单数、完成事件数、做过的台账行数。"""
    orders = sa.select(sa.func.count()).select_from(sa.table("orders"))
    marked = sa.select(sa.func.count()).select_from(ledger).where(ledger.c.materialized > 0)
    (row,) = chain.rows(
        sa.select(
            orders.scalar_subquery(),
            sa.select(sa.func.count(outbox.c.outbox_id)).scalar_subquery(),
            marked.scalar_subquery(),
        )
    )
    return row[0], row[1], row[2]


@pytest.fixture
def claimed(engine: sa.Engine, chain: Chain, raw_data: RawData) -> Claim:
    """一个有一天订单要做、已经领到它的工人。"""
    chain.announce(raw_data.add_import([{}]))
    claimed = claim(engine, "run")
    assert claimed is not None
    return claimed


def test_worker_that_holds_its_lease_commits(chain: Chain, claimed: Claim) -> None:
    run_orders_under(claimed.lease, chain)
    assert written(chain) == (1, 1, 1)


def test_worker_whose_lease_is_gone_before_it_starts_writes_nothing(chain: Chain, claimed: Claim) -> None:
    expire(chain.engine, "run")
    with pytest.raises(LeaseLostError, match="the lease of run run has expired") as caught:
        run_orders_under(claimed.lease, chain)
    assert caught.value.run_id == "run"
    assert written(chain) == (0, 0, 0)


def test_worker_that_loses_its_lease_while_it_writes_is_rolled_back(
    chain: Chain, claimed: Claim, monkeypatch: pytest.MonkeyPatch, read_table: ReadTable
) -> None:
    load = orders_etl.load

    def load_slowly(*arguments: Any) -> Any:
        """数据已经写下、还没提交：租约过期，别人接手。"""
        result = load(*arguments)
        expire(chain.engine, "run")
        with chain.engine.begin() as connection:
            delete_expired_lease(connection, "run")
        return result

    monkeypatch.setattr(orders_etl, "load", load_slowly)
    with pytest.raises(LeaseLostError):
        run_orders_under(claimed.lease, chain)
    assert written(chain) == (0, 0, 0)
    monkeypatch.undo()
    successor = claim(chain.engine, "next")
    assert successor is not None
    run_orders_under(successor.lease, chain)
    assert read_table("orders").height == 1


def test_lease_stays_in_place_until_the_data_is_committed(
    chain: Chain, claimed: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """查过租约之后到提交之前，收租约的人要等：不会两个人都以为自己是主人。"""
    blocked: list[str] = []

    def commit_after_the_fence(held: Sequence[object]) -> None:
        judge_fence(held)
        with chain.engine.begin() as other:
            other.exec_driver_sql("SET LOCAL lock_timeout = '100ms'")
            try:
                other.execute(sa.delete(leases))
            except sa.exc.OperationalError as error:
                blocked.append(type(error.orig).__name__)
                other.rollback()

    monkeypatch.setattr(materialization, "judge_fence", commit_after_the_fence)
    run_orders_under(claimed.lease, chain)
    assert blocked == ["LockNotAvailable"]
    assert written(chain) == (1, 1, 1)


def test_run_without_a_lease_needs_none(chain: Chain, raw_data: RawData) -> None:
    raw_data.add_import([{}])
    chain.run(DAY, assets=["orders"])
    assert written(chain) == (1, 1, 1)


# ---- 急雨 ------------------------------------------------------------------------


class Rush:
    """DAY 刚做完一次，又来了几个导入；台账里的时刻由测试拨，机器再慢也还在急雨里。"""

    def __init__(self, engine: sa.Engine, settings: EtlSettings, raw_data: RawData, chain: Chain) -> None:
        self._engine = engine
        self._settings = settings
        self._raw_data = raw_data
        chain.run(DAY)

    def bring(self, imports: int) -> None:
        events = [
            ImportEvent(self._raw_data.add_import([{"order_id": f"R-{number}"}]), uuid4()) for number in range(imports)
        ]
        assert set(request_imports(self._engine, self._settings, events)) == {"requested"}
        for column in ("requested_at", "materialized_at"):
            self.put_back(column, -3600)

    def put_back(self, column: str, seconds: float) -> None:
        earlier = sa.func.clock_timestamp() - timedelta(seconds=seconds)
        with self._engine.begin() as connection:
            connection.execute(sa.update(ledger).where(ledger.c.day == DAY).values({column: earlier}))

    def is_claimable(self) -> bool:
        """能不能领；不能领的只因为急雨。"""
        with self._engine.connect() as connection:
            claimable = has_claimable_days(connection, TARGET)
            assert has_days_in_a_rush(connection, TARGET) is not claimable
        assert (claim(self._engine, str(uuid4())) is not None) is claimable
        return claimable


@pytest.fixture
def rush(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, chain: Chain) -> Rush:
    return Rush(engine, etl_settings, raw_data, chain)


def test_day_in_a_rush_waits_until_it_is_quiet(rush: Rush) -> None:
    rush.bring(RUSH_IMPORTS + 1)
    assert not rush.is_claimable()
    rush.put_back("requested_at", RUSH_QUIET_SECONDS)
    assert rush.is_claimable()


def test_day_in_an_endless_rush_is_claimed_in_the_end(rush: Rush) -> None:
    rush.bring(RUSH_IMPORTS + 1)
    assert not rush.is_claimable()
    rush.put_back("materialized_at", RUSH_PATIENCE_SECONDS)
    assert rush.is_claimable()


def test_few_imports_do_not_wait(rush: Rush) -> None:
    rush.bring(RUSH_IMPORTS)
    assert rush.is_claimable()


def test_day_in_a_rush_with_rows_enough_for_a_run_does_not_wait(rush: Rush, chain: Chain) -> None:
    rush.bring(RUSH_IMPORTS + 1)
    chain.execute(sa.update(import_tasks).values(row_count=RUSH_ROWS // RUSH_IMPORTS))
    assert rush.is_claimable()


def test_small_day_is_a_few_small_imports(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    request_imports(engine, etl_settings, [ImportEvent(raw_data.add_import([{}]), uuid4())])
    claimed = claim(engine, "small", small=True)
    assert claimed is not None
    assert claimed.days == DayRange(DAY, DAY)
    assert claimed.assets == ASSETS


@pytest.mark.parametrize("row_count", [SMALL_ROWS, None])
def test_large_import_and_one_of_unknown_size_are_not_small(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, chain: Chain, row_count: int | None
) -> None:
    import_id = raw_data.add_import([{}])
    chain.execute(sa.update(import_tasks).values(row_count=row_count))
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4())])
    assert claim(engine, "small", small=True) is None
    assert claim(engine, "one") is not None


def test_whole_day_and_many_imports_are_not_small(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    request(engine, [DAY])
    later = datetime(2026, 1, 6, 4, tzinfo=UTC)
    events = [
        ImportEvent(raw_data.add_import([{"order_id": f"M-{number}", "ordered_at": later}]), uuid4())
        for number in range(RUSH_IMPORTS + 1)
    ]
    request_imports(engine, etl_settings, events)
    assert claim(engine, "small", small=True) is None
    assert claim(engine, "one") is not None


@pytest.mark.parametrize(("customers", "is_small"), [(1, True), (SMALL_ROWS - 1, True), (SMALL_ROWS, False)])
def test_day_of_a_few_named_customers_is_small(
    engine: sa.Engine, etl_settings: EtlSettings, chain: Chain, customers: int, is_small: bool
) -> None:
    read_and_mark_all(chain, DAY)
    with engine.begin() as connection:
        named: dict[str, date | None] = {f"customer {number}": DAY for number in range(customers)}
        assert request_customers(connection, etl_settings, "leads", named) == DAY
    claimed = claim(engine, "small", small=True)
    assert (claimed is not None) is is_small
    claimed = claimed or claim(engine, "one")
    assert claimed is not None
    assert (claimed.days, claimed.assets) == (DayRange(DAY, DAY), ("leads",))


def test_asset_asked_for_as_a_whole_is_not_small(engine: sa.Engine, chain: Chain) -> None:
    read_and_mark_all(chain, DAY)
    with engine.begin() as connection:
        request_days(connection, TARGET, [DAY], asset="leads")
    assert claim(engine, "small", small=True) is None
    assert claim(engine, "one") is not None


def read_and_mark_all(chain: Chain, day: date) -> None:
    """这一天做完了，没有数据。"""
    request(chain.engine, [day])
    for asset in ASSETS:
        with chain.engine.begin() as connection:
            read_and_mark(connection, TARGET, asset, DayRange(day, day))


def test_day_that_was_never_materialized_does_not_wait(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    events = [
        ImportEvent(raw_data.add_import([{"order_id": f"R-{number}"}]), uuid4()) for number in range(RUSH_IMPORTS + 1)
    ]
    request_imports(engine, etl_settings, events)
    assert claim(engine, "one") is not None
