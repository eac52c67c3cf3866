"""商机 ETL：手头客户的订单 → 一行一个商机，再清扫所有未关闭商机的 COLD。规则见 DOMAIN 第 5 节。"""

from __future__ import annotations

from datetime import date
from functools import lru_cache, partial
from typing import Any

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import order_index
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, closed_by_person, own_columns, touched
from etl_assets.leads.cold_sweep import complete_if_swept, lock_sweep, sweep_cold
from etl_assets.leads.dealing import deal_orders
from etl_assets.leads.description import WRITTEN_BY_PEOPLE, define_leads
from etl_assets.services.batch import transform_batches
from etl_assets.services.customer_keys import with_lead_ids
from etl_assets.services.customer_orders import Computed, compute_in_bites, read_customer_orders
from etl_assets.services.figures import FIGURES, aggregate_figures
from etl_assets.services.materialization import AssetReport, DataTransaction, RunContext, data_transaction
from etl_assets.services.order_index import insert_marks, of_customer
from etl_assets.services.people import PROTECTED_COLUMNS, give_way
from etl_assets.services.vectorized_queries import (
    Upsert,
    WriteCounts,
    read_frame,
    release_staging,
    sized,
    stage_frame,
    upsert_text,
)

_WRITTEN = [
    column.name for column in own_columns(define_leads(sa.MetaData(), "public")) if column.name not in WRITTEN_BY_PEOPLE
]
LEAD_UPSERT = Upsert(
    key=("customer_global_id", "lead_no"), insert_only=("lead_id",), protected=PROTECTED_COLUMNS, touch="updated_at"
)


def materialize_leads(engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """让同样那些客户的商机正确，并按最新的业务日清扫全部未关闭的商机。

    写商机时按 `etl.cold_sweeps` 里的那一天判 OPEN 与 COLD。最新的业务日没有变，别人的商机就都还对，台账接着就记下；
    变了，先清扫，台账记在清扫的最后一个事务，所以死在半途时这些天仍然到期。
    """
    begin = partial(data_transaction, engine, settings, asset="leads", days=days, run=run)
    done = compute_in_bites(begin, write=write_leads, complete=complete_if_swept)
    return sweep_cold(begin, settings, done) if isinstance(done, Computed) else done


def write_leads(transaction: DataTransaction, at_hand: sa.Table, known: pl.DataFrame) -> WriteCounts:
    """读、算、写锁住的客户的商机。"""
    customer_ids = known.drop("is_known")
    customers = stage_frame(
        transaction.connection, customer_ids, name="customer_ids", like=transaction.tables.customers
    )
    people = read_people(transaction, customers, customer_ids.height)
    summarized = transform_batches(
        read_customer_orders(transaction, at_hand), lambda orders: summarize_leads(orders, people)
    )
    # 读完订单才锁：清扫的人等着它，读一个大客户的订单却要很久
    sweep, _ = lock_sweep(transaction)
    written = load(
        transaction, transform(summarized, customer_ids, people, sweep.last_warm_day), customers, customer_ids.height
    )
    release_staging(transaction.connection, customers)
    return written


def read_people(transaction: DataTransaction, customers: sa.Table, customer_count: int) -> pl.DataFrame:
    """一行一个人碰过的、有编号的商机；people_closed_at 只有人关闭的才有值。

    无穷大的 closed_at 夹进 Polars 装得下的年份：与订单时刻比较的结果不变，而它只读不写。
    """
    return read_frame(transaction.connection, _people(transaction.tables.leads, customers), {"rows": customer_count})


@lru_cache(maxsize=16)
def _people(leads: sa.Table, customers: sa.Table) -> sa.Select[Any]:
    earliest = sa.cast("0002-01-01 00:00:00+00", sa.TIMESTAMP(timezone=True))
    latest = sa.cast("9998-01-01 00:00:00+00", sa.TIMESTAMP(timezone=True))
    clamped = sa.func.least(sa.func.greatest(leads.c.closed_at, earliest), latest, type_=leads.c.closed_at.type)
    closed, theirs = closed_by_person(leads), sized(customers)
    return (
        sa.select(theirs.c.customer_key, leads.c.lead_no, sa.case((closed, clamped)).label("people_closed_at"))
        .join(leads, leads.c.customer_global_id == theirs.c.customer_global_id)
        .where(touched(leads), leads.c.lead_no.is_not(None))
    )


def summarize_leads(orders: pl.DataFrame, people: pl.DataFrame) -> pl.DataFrame:
    """若干客户的全部订单 → 一行一个有订单的商机：它的订单的时刻与汇总，won_at 是赢下它的那一单。

    :param orders: 一行一个订单，按 (customer_key, ordered_at, order_id) 排好；一个客户的订单都在。
    :param people: `read_people` 的结果，可以多于这些客户的。
    """
    counted = orders.filter("is_counted").with_columns(
        wins=pl.col("is_completed") & (pl.col("system_order_type") == "BULK")
    )
    closings = people.filter(pl.col("people_closed_at").is_not_null(), pl.col("lead_no") >= 1)
    dealt = deal_orders(counted, closings.select("customer_key", "lead_no", closed_at="people_closed_at"))
    return dealt.group_by("customer_key", "lead_no").agg(
        pl.col("ordered_at").min().alias("opened_at"),
        pl.col("ordered_at").max().alias("last_order_at"),
        pl.col("order_date").max().alias("last_order_date"),
        pl.col("ordered_at").filter("wins").max().alias("won_at"),
        *aggregate_figures(),
    )


def transform(
    summarized: pl.DataFrame, customer_ids: pl.DataFrame, people: pl.DataFrame, last_warm: date | None
) -> pl.DataFrame:
    """有订单的商机与人碰过的商机 → 一行一个商机（business_leads 的列，owner 与 notes 除外）。

    人关闭的商机在这里当作没有关闭：写入时关闭的各列受保护；人若在读写之间收回了关闭，也不会把它写回去。

    :param summarized: `summarize_leads` 的结果。
    :param people: `read_people` 的结果。
    :param last_warm: 最后一单早于这一天的商机是 COLD；没有订单时是 None。
    """
    won = pl.col("won_at").is_not_null() & pl.col("people_closed_at").is_null()
    is_cold = (pl.col("last_order_date") < pl.lit(last_warm, pl.Date)).fill_null(value=False)
    leads = (
        summarized.join(people, on=["customer_key", "lead_no"], how="full", coalesce=True)
        .with_columns(pl.col(FIGURES).fill_null(0))
        .join(customer_ids, on="customer_key", how="left")
        .with_columns(
            current_stage=pl.when(won).then(pl.lit("WON")).when(is_cold).then(pl.lit("COLD")).otherwise(pl.lit("OPEN")),
            closed_at=pl.when(won).then("won_at"),
            closed_by=pl.when(won).then(pl.lit("etl")),
        )
    )
    return with_lead_ids(leads).select(_WRITTEN)


def load(transaction: DataTransaction, leads: pl.DataFrame, customers: sa.Table, customer_count: int) -> WriteCounts:
    """写商机；手头客户剩下的、没人碰过的商机没有订单了，删去。"""
    connection, table = transaction.connection, transaction.tables.leads
    staging = stage_frame(connection, leads, name="staged_leads", like=table)
    rows = {"rows": customer_count}

    upsert = upsert_text(connection, staging, table, LEAD_UPSERT, staged_rows=leads.height)
    delete = _delete_orderless(table, customers, staging)
    # 写与删同在一个保存点里：有一个商机锁不到，锁住的就都放开，再来时一起再做
    ((inserted, updated),), ((orderless, deleted),) = give_way(
        connection, transaction.settings, upsert, delete, parameters=rows
    )
    # 读过之后有人碰了，就是按他动手之前的样子算的：留个标记，下一个运行再看他们一眼
    if orderless:
        connection.execute(
            insert_marks(transaction.target, _to_look_at_again(transaction.tables, customers, staging)), rows
        )
    release_staging(connection, staging)
    return WriteCounts(rows=leads.height, inserted=inserted, updated=updated, deleted=deleted)


@lru_cache(maxsize=16)
def _delete_orderless(leads: sa.Table, customers: sa.Table, staging: sa.Table) -> sa.Select[tuple[int, int]]:
    """语句：没有订单、读的时候也没人碰过的商机有几个，删了几个；其余的是读过之后有人碰的。先全锁住（NOWAIT），见 `give_way`。"""
    theirs = leads.c.customer_global_id == sized(customers).c.customer_global_id
    found = sa.select(leads.c.lead_id).where(theirs, _is_orderless(leads, staging))
    orderless = found.with_for_update(nowait=True, of=leads).cte("orderless")
    untouched = sa.and_(leads.c.lead_id == orderless.c.lead_id, ~touched(leads))
    delete = sa.delete(leads).where(untouched).returning(leads.c.lead_id).cte("deleted")
    return sa.select(
        *[sa.select(sa.func.count()).select_from(which).scalar_subquery() for which in (orderless, delete)]
    )


def _is_orderless(leads: sa.Table, staging: sa.Table) -> sa.ColumnElement[bool]:
    kept = sa.select(staging.c.lead_no).where(
        staging.c.customer_global_id == leads.c.customer_global_id, staging.c.lead_no == leads.c.lead_no
    )
    return sa.and_(leads.c.lead_no.is_not(None), ~kept.exists())


@lru_cache(maxsize=16)
def _to_look_at_again(tables: TargetTables, customer_ids: sa.Table, staging: sa.Table) -> sa.Select[tuple[str]]:
    """人在我们读过之后才动手的客户：他的商机有人碰了，没有删，也没有归零；或者 customers 因为商机才留下他，商机刚删完。"""
    customers, leads, at_hand = tables.customers, tables.leads, sized(customer_ids)
    has_orders = (
        sa.select(order_index.c.order_id)
        .where(of_customer(at_hand.c.customer_key), order_index.c.target == tables.schema)
        .exists()
    )
    theirs = leads.c.customer_global_id == at_hand.c.customer_global_id
    has_leads = sa.select(leads.c.lead_id).where(theirs).exists()
    remains = sa.select(customers.c.customer_key).where(customers.c.customer_key == at_hand.c.customer_key).exists()
    has_orderless = sa.select(leads.c.lead_id).where(theirs, _is_orderless(leads, staging)).exists()
    return sa.select(at_hand.c.customer_key).where(sa.or_(has_orderless, sa.and_(remains, ~has_orders, ~has_leads)))
