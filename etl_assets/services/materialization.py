"""一次物化的骨架：数据事务从哪里开始、到哪里结束，冲突怎样重试，结果怎样上报。"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec

import psycopg.errors
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import DATABASE_ERRORS, driver_error, translate
from etl_assets.core.interruption import check_interruption
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, target_tables
from etl_assets.services import ledger
from etl_assets.services.accounting import DayAccount
from etl_assets.services.leases import assert_lease_held
from etl_assets.services.ledger import Revisions
from etl_assets.services.outbox import Completion, add_completion
from etl_assets.services.rollout import Share, read_share
from etl_assets.services.table_contract import assert_table_contract
from etl_assets.services.vectorized_queries import WriteCounts

logger = get_logger(__name__)
P = ParamSpec("P")

_CONFLICT_ATTEMPTS = 5
_CONFLICTS = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure, psycopg.errors.UniqueViolation)


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """这次物化属于哪个运行，以及那个运行还做哪些资产。"""

    run_id: str
    assets: frozenset[str]
    allow_deletes: bool = False


@dataclass(frozen=True, kw_only=True)
class AssetReport:
    """一次物化的结果。"""

    asset: str
    days: DayRange
    rejected: int
    written: WriteCounts
    duration_seconds: float
    accounts: Sequence[DayAccount] = ()


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

    @property
    def target(self) -> str:
        return self.settings.target_schema

    def keep_alive(self) -> None:
        """数据在别的连接上读得久时，让这个事务不因为闲着而被服务器切断；冻住的工人不会调用它。"""
        self.connection.execute(sa.select(1))

    def read_revisions(self) -> Revisions:
        """读数据之前调用；交给 complete。"""
        return ledger.read_revisions(self.connection, self.target, self.asset, self.days)

    def complete(self, revisions: Revisions, *, written: WriteCounts, rejected: int = 0) -> AssetReport:
        """记台账、写完成事件；都在这个事务里，一起提交或一起消失。"""
        finished = ledger.mark_materialized(self.connection, self.target, self.asset, self.days, revisions, run_id=self.run.run_id)
        duration_seconds = time.monotonic() - self.started_at
        included = any(name in self.run.assets for name in ledger.after(self.asset))
        add_completion(
            self.connection,
            self.target,
            Completion(
                asset=self.asset,
                days=self.days,
                run_id=self.run.run_id,
                status="partial_success" if rejected else "success",
                downstream="included" if included else "pending",
                import_ids=finished,
                success_count=written.rows,
                error_count=rejected,
                duration_seconds=duration_seconds,
            ),
        )
        return AssetReport(asset=self.asset, days=self.days, rejected=rejected, written=written, duration_seconds=duration_seconds)


@contextmanager
def data_transaction(
    engine: sa.Engine, settings: EtlSettings, *, asset: str, days: DayRange, run: RunContext, started_at: float | None = None
) -> Iterator[DataTransaction]:
    """READ COMMITTED 事务：先锁后读，每条语句看到锁住之后的最新数据；提交前查租约。

    表的约定在最前面核对；同一运行的上游刚核对过全部的表，就不再核对。

    :param started_at: 物化早先开始的时刻（time.monotonic），给分成两个事务的资产。
    """
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection, connection.begin():
        if started_at is None and ledger.before(asset) not in run.assets:
            assert_table_contract(connection, settings.target_schema)
        yield DataTransaction(
            connection=connection,
            settings=settings,
            tables=target_tables(settings.target_schema),
            share=read_share(connection, settings),
            asset=asset,
            days=days,
            run=run,
            started_at=time.monotonic() if started_at is None else started_at,
        )
        assert_lease_held(connection)


def retry_conflicts(materialize: Callable[P, AssetReport]) -> Callable[P, AssetReport]:
    """死锁与并发插入的冲突：事务已回滚，随机等一会儿重来；其他数据库错误翻译成会说话的错误。"""

    @wraps(materialize)
    def retried(*args: P.args, **kwargs: P.kwargs) -> AssetReport:
        for attempt in range(1, _CONFLICT_ATTEMPTS + 1):
            try:
                return materialize(*args, **kwargs)
            except DATABASE_ERRORS as error:
                check_interruption()
                cause = driver_error(error)
                if not isinstance(cause, _CONFLICTS) or attempt == _CONFLICT_ATTEMPTS:
                    raise translate(cause) from error
                logger.warning("conflict with another run, trying again", attempt=attempt, cause=type(cause).__name__)
                time.sleep(random.uniform(0.02, 0.1) * 2**attempt)  # noqa: S311  # 只为错开时间
        raise AssertionError("unreachable")

    return retried
