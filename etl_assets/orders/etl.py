"""订单 ETL：读出手头订单的全部版本，选出赢家，整批写入，数清每天的账。规则见 DOMAIN 第 3 节。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.idle_transactions import kept_alive
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.marking import Revisions
from etl_assets.orders.carrying import carry_forward
from etl_assets.orders.changed import WholeDaysNeededError, read_changed
from etl_assets.orders.load import load
from etl_assets.orders.transform import read_references
from etl_assets.orders.versions import MoreDaysNeededError, StagedOrders, stage_changed_orders, stage_whole_days
from etl_assets.services.accounting import verify_days
from etl_assets.services.day_accounts import StoredDay, forget_days, store_counted_days
from etl_assets.services.materialization import (
    AssetReport,
    DataTransaction,
    RunContext,
    data_transaction,
    retry_conflicts,
)
from etl_assets.services.parts import in_parts
from etl_assets.services.vectorized_queries import WriteCounts
from etl_assets.services.warned_rows import warn_by_day


# in_parts 在外：一段冲突了只重来这一段，前面几段已经提交
@in_parts
@retry_conflicts
def materialize_orders(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """让这些天有有效版本、或在 orders 里有行的每个订单都正确；事件要的，只做变了的订单。

    锁住手头订单所有版本的业务日，与它们在 orders 里此刻的业务日，才读；读出的若落在没锁的日子，就放开，连那些天一起锁了重来：
    否则一个较旧的快照可能盖过较新的，或正被别的运行挪走、删去。

    :raises TooManyDeletesError: 要删的订单太多，或因店铺改名才要删，而没人允许；什么也没写。
    :raises AccountingError: 写完一数，有行不知去向；什么也没写。
    """
    locked = frozenset(days)
    while True:
        try:
            return materialize_locked(engine, settings, days, run, locked)
        except MoreDaysNeededError as more:
            locked |= more.days


def materialize_locked(
    engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext, locked: frozenset[date]
) -> AssetReport:
    """:raises MoreDaysNeededError: 要连别的日子一起锁住；什么也没写。"""
    with data_transaction(engine, settings, asset="orders", days=days, run=run, locked=locked) as transaction:
        revisions = transaction.read_revisions()
        staged = extract(engine, transaction, revisions, locked)
        written, after = load(transaction, staged)
        # 先数账，后记台账：不平就整个回滚，这些天仍然到期；提交之后再数，会数到其间才来的行
        accounts = account(transaction, staged, written, after, locked)
        report = transaction.complete(revisions, scope=staged.scope, written=written, rejected=staged.rejected.height)
        return replace(
            report,
            whole_because=staged.whole_because,
            accounts=[day.account for day in accounts],
            warnings={day.account.day: day.warnings for day in accounts if day.warnings},
        )


def extract(
    engine: sa.Engine, transaction: DataTransaction, revisions: Revisions, locked: frozenset[date]
) -> StagedOrders:
    """读、换算、暂存手头的订单，选出赢家。

    :param revisions: 开快照之前读的台账：之后才要求的，做完了也仍然到期。
    """
    with open_snapshot(engine, transaction.settings) as source:
        references = read_references(source)
        try:
            changed = read_changed(transaction, source, references, revisions)
        except WholeDaysNeededError as reason:
            return stage_whole_days(transaction, source, references, locked, str(reason))
        return stage_changed_orders(transaction, source, changed, references, locked)


@contextmanager
def open_snapshot(engine: sa.Engine, settings: EtlSettings) -> Iterator[sa.Connection]:
    """另一个连接，整段读取是同一个快照；锁在写的连接上，所以在锁住之后打开。"""
    with (
        engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection,
        connection.begin(),
        kept_alive(connection, settings),
    ):
        yield connection


def account(
    transaction: DataTransaction,
    staged: StagedOrders,
    written: WriteCounts,
    after: pl.DataFrame,
    locked: frozenset[date],
) -> list[StoredDay]:
    """写完之后：每天一本账，按日子排好；也存下来，下一个只做变了的运行接着算。

    :raises AccountingError: 有一天不平。
    """
    if staged.changed is not None:
        return carry_forward(transaction, staged.changed, staged.superseded, after)
    connection, target, days = transaction.connection, transaction.target, transaction.days
    accounts = verify_days(
        connection,
        transaction.settings,
        days,
        share=transaction.share,
        raw=staged.raw,
        superseded=staged.superseded,
        aside=staged.aside,
        outside=staged.outside,
    )
    warnings = warn_by_day(days, staged.superseded, staged.unmapped)
    stored = [StoredDay(account, warnings.get(account.day), transaction.run.run_id) for account in accounts]
    store_counted_days(connection, target, days, stored, staged.raw)
    elsewhere = locked - set(days)  # 手头的订单有版本、或者写之前有行的别的日子
    if elsewhere and written != WriteCounts(rows=written.rows):  # 写下的也许改了那些天的账
        forget_days(connection, target, elsewhere)
    return stored
