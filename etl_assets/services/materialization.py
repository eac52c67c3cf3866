"""一次物化的骨架：数据事务从哪里开始、到哪里结束，冲突怎样重试，结果怎样上报。"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache, wraps
from typing import Any, ParamSpec, Protocol, TypeVar
from uuid import UUID

import psycopg.errors
import sqlalchemy as sa

from etl_assets.core import metrics
from etl_assets.core.backoff import Backoff
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import DATABASE_ERRORS, driver_error, translate
from etl_assets.core.database_sync import autocommitting, execute_together
from etl_assets.core.idle_transactions import kept_alive
from etl_assets.core.interruption import check_interruption
from etl_assets.core.lock_holders import naming_holder
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, target_tables
from etl_assets.ledger.leases import fence, judge_fence
from etl_assets.ledger.locks import lock_parameters, lock_statements
from etl_assets.ledger.marking import (
    Revisions,
    Scope,
    marking,
    parse_revisions,
    prepare_marking,
    read_revisions,
    revisions_query,
)
from etl_assets.ledger.outbox import Completion, add_completion, announcement, announcing
from etl_assets.services.accounting import DayAccount
from etl_assets.services.fingerprints import fingerprint
from etl_assets.services.previews import Previews, has_previews, parse_previews, preview_parameters, previewing
from etl_assets.services.rollout import Share, read_share
from etl_assets.services.table_contract import READ_CATALOG, assert_table_contract, catalog_parameters, judge_catalog
from etl_assets.services.vectorized_queries import WriteCounts
from etl_assets.services.warned_rows import DayWarnings

logger = get_logger(__name__)
P = ParamSpec("P")
Result = TypeVar("Result")

_CONFLICT_ATTEMPTS = 5
_CONFLICT_RETRY = Backoff(first_seconds=0.12, longest_seconds=2.0, spread=0.7)
# 唯一约束也算冲突：写入不用 ON CONFLICT，别的系统恰好插进同一个键时就是它，再来一遍会看见那一行
_CONFLICTS = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.errors.UniqueViolation)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """这次物化属于哪个运行，那个运行还做哪些资产，这个资产紧跟在哪些后面。is_of_event：事件要的，可以只做变了的。"""

    run_id: str
    assets: frozenset[str]
    upstreams: frozenset[str] = frozenset()
    allow_deletes: bool = False
    is_of_event: bool = False

    @property
    def follows(self) -> bool:
        """它的上游也在这个运行里，刚做过。"""
        return bool(self.upstreams & self.assets)


@dataclass(frozen=True, kw_only=True)
class AssetReport:
    """一次物化的结果。"""

    asset: str
    days: DayRange
    scope: Scope
    rejected: int
    written: WriteCounts
    duration_seconds: float
    whole_because: str | None = None
    accounts: Sequence[DayAccount] = ()
    warnings: Mapping[date, DayWarnings] = field(default_factory=dict)
    previews: Previews | None = None
    """已经看过的：只做变了的、一天的。"""


@dataclass
class DataTransaction:
    """一个开着的数据事务，连同这次物化要用的一切。"""

    connection: sa.Connection
    settings: EtlSettings
    tables: TargetTables
    share: Share
    asset: str
    days: DayRange
    run: RunContext
    started_at: float
    is_fenced: bool = False
    """租约已经查过、锁着，直到提交。"""
    deferred: list[sa.ClauseElement] = field(default_factory=list)
    revisions: Revisions | None = None
    of_deferred: dict[str, object] = field(default_factory=dict)
    written: WriteCounts = field(default_factory=WriteCounts)
    """这个事务写下的，提交了才算数。"""
    newly_rejected: int = 0

    @property
    def target(self) -> str:
        return self.settings.target_schema

    def read_revisions(self) -> Revisions:
        """读数据之前的台账，交给 complete。头一个事务开始时已经读过，在锁住之后。"""
        return self.revisions or read_revisions(
            self.connection, self.target, self.asset, self.days, fingerprint(self.settings)
        )

    def scope(self, revisions: Revisions) -> Scope:
        """事件要的运行只做变了的，除非台账说要整天；人点的、定时的、回填的总是整天。"""
        return "changed" if self.run.is_of_event and revisions.whole is None else "whole"

    def defer(self, statement: sa.ClauseElement, parameters: Mapping[str, object]) -> None:
        """不急着发、也不要它的行：与这个事务最后的语句一起发。"""
        self.deferred.append(statement)
        self.of_deferred |= parameters

    def send_last(
        self, *statements: sa.ClauseElement, parameters: Mapping[str, object]
    ) -> list[Sequence[tuple[Any, ...]]]:
        """推迟的、这几条与栅栏一次往返，栅栏在最后；返回这几条的行。

        :raises LeaseLostError: 租约不在了，事务随之回滚。
        """
        locked, of_lease = fence()
        # 栅栏在最后：它之后只剩提交，前面不论等了多久都查得到；锁着租约时心跳也续不了，所以越短越好
        together = [*self.deferred, *statements, *locked]
        if not together:
            return []
        found = execute_together(self.connection, *together, parameters={**self.of_deferred, **parameters, **of_lease})
        judge_fence(found[-1])
        self.is_fenced = True
        first = len(self.deferred)
        self.deferred, self.of_deferred = [], {}
        return found[first : first + len(statements)]

    def complete(self, revisions: Revisions, *, scope: Scope, written: WriteCounts, rejected: int = 0) -> AssetReport:
        """记台账、写完成事件、查租约；都在这个事务里，一起提交或一起消失。"""
        marked = prepare_marking(
            self.connection,
            self.target,
            self.asset,
            self.days,
            revisions,
            run_id=self.run.run_id,
            scope=scope,
        )
        duration_seconds = time.monotonic() - self.started_at
        included = bool(revisions.downstreams) and revisions.downstreams <= self.run.assets
        completion = Completion(
            asset=self.asset,
            days=self.days,
            run_id=self.run.run_id,
            status="partial_success" if rejected else "success",
            downstream="included" if included else "pending",
            success_count=written.rows,
            error_count=rejected,
            duration_seconds=duration_seconds,
        )
        is_previewed = scope == "changed" and has_previews(self.asset, self.days, scope)
        looks = [previewing(self.target, self.asset)] if is_previewed else []
        of_look = preview_parameters(self.target, self.days, scope)
        announced = announcement(self.target, completion)
        *seen, finished = self.send_last(*looks, _mark_and_announce(), parameters={**marked, **announced, **of_look})
        if len(finished) > announced["most_imports"]:  # 一份装不下的，另写
            add_completion(
                self.connection, self.target, replace(completion, import_ids=[import_id for (import_id,) in finished])
            )
            # 又写了东西，栅栏也再问一遍：它总要是提交前的最后一句
            self.send_last(parameters={})
        return AssetReport(
            asset=self.asset,
            days=self.days,
            scope=scope,
            rejected=rejected,
            written=written,
            duration_seconds=duration_seconds,
            previews=parse_previews(self.asset, self.days, scope, seen[0]) if seen else None,
        )


@lru_cache(maxsize=1)
def _mark_and_announce() -> sa.Select[tuple[UUID]]:
    """一条语句：记台账，连同因此完成的导入写进发件箱；返回它们。"""
    finished = marking().cte("finished")
    return sa.select(finished.c.import_id).add_cte(announcing(finished))


@contextmanager
def data_transaction(
    engine: sa.Engine,
    settings: EtlSettings,
    *,
    asset: str,
    days: DayRange,
    run: RunContext,
    started_at: float | None = None,
    locked: Iterable[date] = (),
) -> Iterator[DataTransaction]:
    """一个事务（引擎的 READ COMMITTED）：先锁后读，每条语句看到锁住之后的最新数据；提交前查租约。

    表的约定在最前面核对；同一运行的上游刚核对过全部的表，就不再核对。

    BEGIN、核对、锁与台账一次往返：它由我们自己发，驱动自己的 BEGIN 是单独的一次。

    :param started_at: 物化早先开始的时刻（time.monotonic），给分成几个事务的资产。
    :param locked: 先锁住的业务日。
    """
    with (
        naming_holder(engine, settings),
        autocommitting(engine) as connection,
        connection.begin(),
        kept_alive(connection, settings),
    ):
        # 后来的各个事务（一口一个）不再读台账：算数的是选客户之前的版本，此后的要求由下一次运行做
        revisions = _begin(connection, settings, asset, days, run, locked) if started_at is None else None
        if revisions is None:
            connection.exec_driver_sql(_BEGIN)
        transaction = DataTransaction(
            connection=connection,
            settings=settings,
            tables=target_tables(settings.target_schema),
            share=read_share(connection, settings),
            asset=asset,
            days=days,
            run=run,
            started_at=time.monotonic() if started_at is None else started_at,
            revisions=revisions,
        )
        yield transaction
        if not transaction.is_fenced:
            transaction.send_last(parameters={})
    written = transaction.written
    metrics.rows_committed(
        asset,
        inserted=written.inserted,
        updated=written.updated,
        deleted=written.deleted,
        rejected=transaction.newly_rejected,
    )


_BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"


def _begin(
    connection: sa.Connection,
    settings: EtlSettings,
    asset: str,
    days: DayRange,
    run: RunContext,
    locked: Iterable[date],
) -> Revisions:
    target, is_checked = settings.target_schema, not run.follows
    read, parameters = revisions_query(target, asset, days, fingerprint(settings))
    lock = lock_parameters(target, "day", (day.toordinal() for day in locked))
    statements = [*([READ_CATALOG] if is_checked else []), *(lock_statements() if lock["keys"] else []), read]
    try:
        found = execute_together(
            connection, _BEGIN, *statements, parameters={**catalog_parameters(target), **lock, **parameters}
        )
    except sa.exc.ProgrammingError:
        # 事务已经废了，不先回滚，下面那一问也只会得到“事务已中止”
        connection.connection.rollback()
        assert_table_contract(connection, target)  # 缺表少列，台账那一条就读不了：说是哪里
        raise
    if is_checked:
        judge_catalog(target, found[1])
    return parse_revisions(days, found[-1])


class Begin(Protocol):
    """开始这次物化的一个数据事务：`data_transaction`，除了 started_at 都定了。"""

    def __call__(self, *, started_at: float | None = None) -> AbstractContextManager[DataTransaction]: ...


def retry_conflicts(transact: Callable[P, Result]) -> Callable[P, Result]:
    """一个数据事务，死锁与并发插入的冲突：已回滚，随机等一会儿重来；其他数据库错误翻译成会说话的错误。"""

    @wraps(transact)
    def retried(*args: P.args, **kwargs: P.kwargs) -> Result:
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                return transact(*args, **kwargs)
            except DATABASE_ERRORS as error:
                # 人要取消时，正执行的语句也是出错收场（57014）：先看这个，不当作超时，更不再试
                check_interruption()
                cause = driver_error(error)
                if not isinstance(cause, _CONFLICTS) or attempt == _CONFLICT_ATTEMPTS:
                    raise translate(cause) from error
                metrics.transaction_retried()
                logger.warning("conflict with another run, trying again", attempt=attempt, cause=type(cause).__name__)
                time.sleep(_CONFLICT_RETRY.seconds(attempt))
        raise AssertionError("unreachable")

    return retried
