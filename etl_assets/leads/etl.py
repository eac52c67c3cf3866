"""商机 ETL：手头客户的订单 → 一行一个商机，再清扫所有未关闭商机的 COLD。规则见 DOMAIN 第 5 节。"""

from __future__ import annotations

from datetime import date, timedelta
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, cold_sweeps
from etl_assets.leads.dealing import deal_orders
from etl_assets.services.batch import transform_batches, write_batches
from etl_assets.services.customer_keys import with_lead_ids
from etl_assets.services.customer_orders import lock_customers_at_hand, read_customer_ids, read_customer_orders
from etl_assets.services.figures import FIGURES, aggregate_figures
from etl_assets.services.locks import lock_cold_stages
from etl_assets.services.materialization import AssetReport, DataTransaction, RunContext, data_transaction, retry_conflicts
from etl_assets.services.order_index import consume_marks
from etl_assets.services.people import PROTECTED_COLUMNS, closed_by_person, touched
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import Upsert, WriteCounts, read_frame, release_staging, stage_frame, upsert_staged

LEAD_UPSERT = Upsert(key=("customer_global_id", "lead_no"), insert_only=("lead_id",), protected=PROTECTED_COLUMNS, touch="updated_at")


@retry_conflicts
def materialize_leads(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """让同样那些客户的商机正确，并按最新的业务日清扫全部未关闭的商机。

    表里的 OPEN 与 COLD 总是按 `etl.cold_sweeps` 里的那一天判的。最新的业务日没有变，一个事务就够；变了，
    第二个事务独占地改那一天、把全部商机重判一遍。写商机的事务从不等独占的锁，所以不会与清扫互相等。
    台账与完成事件写在最后的事务，所以两步之间崩溃时这些天仍然到期。
    """
    with data_transaction(engine, settings, asset="leads", days=days, run=run) as transaction:
        started_at = transaction.started_at
        at_hand = lock_customers_at_hand(transaction)
        written = write_batches(at_hand.batches, lambda number: write_leads(transaction, at_hand.batch(number)))
        consume_marks(transaction.connection, transaction.tables, at_hand.marks)
        lock_cold_stages(transaction.connection, transaction.target, exclusive=False)
        last_warm = read_last_warm_day(transaction)
        if read_sweep(transaction) == (last_warm, str(settings.rollout)):
            swept = judge_stages(transaction, last_warm, skip_locked=True)
            return transaction.complete(at_hand.revisions, written=written + WriteCounts(updated=swept))
    with data_transaction(engine, settings, asset="leads", days=days, run=run, started_at=started_at) as transaction:
        swept = sweep_cold(transaction)
        return transaction.complete(at_hand.revisions, written=written + WriteCounts(updated=swept))


def write_leads(transaction: DataTransaction, at_hand: sa.FromClause) -> WriteCounts:
    """读、算、写一批客户的商机。"""
    customer_ids = read_customer_ids(transaction, at_hand).drop("is_known")
    customers = stage_frame(transaction.connection, customer_ids, name="customer_ids", like=transaction.tables.customers)
    people = read_people(transaction, customers)
    held = transform_batches(read_customer_orders(transaction, at_hand), lambda orders: hold_orders(orders, people))
    lock_cold_stages(transaction.connection, transaction.target, exclusive=False)
    swept_day, _ = read_sweep(transaction)
    written = load(transaction, transform(held, customer_ids, people, swept_day), customers)
    release_staging(transaction.connection, customers)
    return written


def read_people(transaction: DataTransaction, customers: sa.Table) -> pl.DataFrame:
    """一行一个人碰过的商机；people_closed_at 只有人关闭的才有值。

    无穷大的 closed_at 夹进 Polars 装得下的年份：与订单时刻比较的结果不变，而它只读不写。
    """
    return read_frame(transaction.connection, _people(transaction.tables.leads, customers))


@lru_cache(maxsize=16)
def _people(leads: sa.Table, customers: sa.Table) -> sa.Select[Any]:
    earliest = sa.cast("0002-01-01 00:00:00+00", sa.TIMESTAMP(timezone=True))
    latest = sa.cast("9998-01-01 00:00:00+00", sa.TIMESTAMP(timezone=True))
    clamped = sa.func.least(sa.func.greatest(leads.c.closed_at, earliest), latest, type_=leads.c.closed_at.type)
    closed = closed_by_person(leads)
    return (
        sa.select(customers.c.customer_key, leads.c.lead_no, sa.case((closed, clamped)).label("people_closed_at"))
        .join(leads, leads.c.customer_global_id == customers.c.customer_global_id)
        .where(touched(leads))
    )


def hold_orders(orders: pl.DataFrame, people: pl.DataFrame) -> pl.DataFrame:
    """若干客户的全部订单 → 一行一个有订单的商机：它的订单的时刻与汇总，won_at 是赢下它的那一单。

    :param orders: 一行一个订单，按 (customer_key, ordered_at, order_id) 排好；一个客户的订单都在。
    :param people: `read_people` 的结果，可以多于这些客户的。
    """
    counted = orders.filter("is_counted").with_columns(wins=pl.col("is_completed") & (pl.col("system_order_type") == "BULK"))
    closings = people.filter(pl.col("people_closed_at").is_not_null(), pl.col("lead_no") >= 1)
    dealt = deal_orders(counted, closings.select("customer_key", "lead_no", closed_at="people_closed_at"))
    return dealt.group_by("customer_key", "lead_no").agg(
        pl.col("ordered_at").min().alias("opened_at"),
        pl.col("ordered_at").max().alias("last_order_at"),
        pl.col("order_date").max().alias("last_order_date"),
        pl.col("ordered_at").filter("wins").max().alias("won_at"),
        *aggregate_figures(),
    )


def transform(held: pl.DataFrame, customer_ids: pl.DataFrame, people: pl.DataFrame, last_warm: date | None) -> pl.DataFrame:
    """有订单的商机与人碰过的商机 → 一行一个商机（business_leads 的列，owner 与 notes 除外）。

    人关闭的商机在这里当作没有关闭：写入时关闭的各列受保护；人若在读写之间收回了关闭，也不会把它写回去。

    :param held: `hold_orders` 的结果。
    :param people: `read_people` 的结果。
    :param last_warm: 最后一单早于这一天的商机是 COLD；没有订单时是 None。
    """
    won = pl.col("won_at").is_not_null() & pl.col("people_closed_at").is_null()
    is_cold = (pl.col("last_order_date") < pl.lit(last_warm, pl.Date)).fill_null(value=False)
    leads = (
        held.join(people, on=["customer_key", "lead_no"], how="full", coalesce=True)
        .with_columns(pl.col(FIGURES).fill_null(0))
        .join(customer_ids, on="customer_key", how="left")
        .with_columns(
            current_stage=pl.when(won).then(pl.lit("WON")).when(is_cold).then(pl.lit("COLD")).otherwise(pl.lit("OPEN")),
            closed_at=pl.when(won).then("won_at"),
            closed_by=pl.when(won).then(pl.lit("etl")),
        )
    )
    return with_lead_ids(leads).select(
        "lead_id",
        "customer_global_id",
        "lead_no",
        "current_stage",
        "opened_at",
        "last_order_at",
        "closed_at",
        "closed_by",
        *FIGURES,
    )


def load(transaction: DataTransaction, leads: pl.DataFrame, customers: sa.Table) -> WriteCounts:
    """写商机；手头客户剩下的、没人碰过的商机没有订单了，删去。"""
    connection, table = transaction.connection, transaction.tables.leads
    staging = stage_frame(connection, leads, name="staged_leads", like=table)
    written = upsert_staged(connection, staging, table, LEAD_UPSERT)
    deleted = connection.execute(_delete_orderless(table, customers, staging))
    release_staging(connection, staging)
    return written + WriteCounts(rows=leads.height, deleted=deleted.rowcount)


@lru_cache(maxsize=16)
def _delete_orderless(leads: sa.Table, customers: sa.Table, staging: sa.Table) -> sa.Delete:
    kept = sa.select(staging.c.lead_no).where(
        staging.c.customer_global_id == leads.c.customer_global_id, staging.c.lead_no == leads.c.lead_no
    )
    theirs = leads.c.customer_global_id == customers.c.customer_global_id
    return sa.delete(leads).where(theirs, ~kept.exists(), ~touched(leads))


def read_last_warm_day(transaction: DataTransaction) -> date | None:
    """最新业务日往前 ETL_COLD_AFTER_DAYS 天；最后一单早于它的商机是 COLD。"""
    newest = transaction.connection.scalar(_newest_day(transaction.tables.orders))
    return newest - timedelta(days=transaction.settings.cold_after_days) if newest else None


@lru_cache(maxsize=16)
def _newest_day(orders: sa.Table) -> sa.Select[tuple[date | None]]:
    return sa.select(sa.func.max(orders.c.order_date))


def read_sweep(transaction: DataTransaction) -> tuple[date | None, str | None]:
    """上一次清扫：表里的 OPEN 与 COLD 是按哪一天、哪个份额判的。共用的锁在手，它就不会变。"""
    row = transaction.connection.execute(_READ_SWEEP, {"of_target": transaction.target}).first()
    return (row.last_warm_day, row.rollout) if row else (None, None)


_READ_SWEEP = sa.select(cold_sweeps.c.last_warm_day, cold_sweeps.c.rollout).where(cold_sweeps.c.target == sa.bindparam("of_target"))


def sweep_cold(transaction: DataTransaction) -> int:
    """最新业务日会前移也会后退：独占地换成它，份额之内所有没有 closed_at 的商机两个方向都改对。返回改了的行数。"""
    lock_cold_stages(transaction.connection, transaction.target, exclusive=True)
    last_warm = read_last_warm_day(transaction)
    values = {"target": transaction.target, "last_warm_day": last_warm, "rollout": str(transaction.settings.rollout)}
    execute_compiled(transaction.connection, _REMEMBER_SWEEP, values)
    return judge_stages(transaction, last_warm, skip_locked=False)


_SWEPT = {column.name: sa.bindparam(column.name, type_=column.type) for column in cold_sweeps.c["target", "last_warm_day", "rollout"]}
_REMEMBER_SWEEP = pg.insert(cold_sweeps).values(_SWEPT).on_conflict_do_update(index_elements=["target"], set_=_SWEPT)


def judge_stages(transaction: DataTransaction, last_warm: date | None, *, skip_locked: bool) -> int:
    """把没有 closed_at 的商机判成 OPEN 或 COLD。

    :param skip_locked: 跳过别人正锁着的行：那是写商机的别的运行，它按同一天判。
    """
    statement = _judge_stages(transaction.tables, transaction.settings.timezone, transaction.share, skip_locked)
    return transaction.connection.execute(statement, {"last_warm": last_warm}).rowcount


@lru_cache(maxsize=16)
def _judge_stages(tables: TargetTables, timezone: str, share: Share, skip_locked: bool) -> sa.Update:
    leads = tables.leads
    last_day = sa.cast(sa.func.timezone(timezone, leads.c.last_order_at), sa.Date)
    is_cold = sa.func.coalesce(last_day < sa.bindparam("last_warm", type_=sa.Date), sa.false())
    stage = sa.case((is_cold, "COLD"), else_="OPEN")
    is_wrong = sa.and_(leads.c.closed_at.is_(None), leads.c.current_stage.is_distinct_from(stage), *_leads_of_share(tables, share))
    wrong = sa.select(leads.c.lead_id).where(is_wrong).with_for_update(skip_locked=skip_locked).cte("wrong")
    return sa.update(leads).where(leads.c.lead_id == wrong.c.lead_id).values(current_stage=stage, updated_at=sa.func.now())


def _leads_of_share(tables: TargetTables, share: Share) -> list[sa.ColumnElement[bool]]:
    """SQL 条件：商机属于份额之内的客户；全部客户时没有条件，也就不必去找客户。"""
    if share.is_whole:
        return []
    customers = tables.customers
    in_share = sa.select(customers.c.customer_global_id).where(share.covers_key(customers.c.customer_key))
    return [tables.leads.c.customer_global_id.in_(in_share)]
