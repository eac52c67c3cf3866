"""图里另外的资产：一张表、一行一天，内容由它的上游这一天的内容算出，所以看得出它有没有跟上。"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from hashlib import md5

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.ledger.graph import AssetGraph
from etl_assets.services.materialization import AssetReport, RunContext, data_transaction, retry_conflicts
from etl_assets.services.vectorized_queries import WriteCounts
from tests.the_three import graph

extras = sa.Table(
    "extras",
    sa.MetaData(schema="public"),
    sa.Column("asset", sa.Text, primary_key=True),
    sa.Column("day", sa.Date, primary_key=True),
    sa.Column("content", sa.Text),
)
_ORDERS = target_tables("public").orders.c


def materialize_extra(asset: str) -> Callable[[sa.Engine, EtlSettings, DayRange, RunContext], AssetReport]:
    return partial(_materialize, asset)


@retry_conflicts
def _materialize(asset: str, engine: sa.Engine, settings: EtlSettings, days: DayRange, run: RunContext) -> AssetReport:
    """先锁住这些天，再读台账与上游。"""
    with data_transaction(engine, settings, asset=asset, days=days, run=run, locked=days) as transaction:
        revisions = transaction.read_revisions()
        contents = [
            {"asset": asset, "day": day, "content": _content(transaction.connection, run.upstreams, day)}
            for day in days
        ]
        insert = pg.insert(extras)
        transaction.connection.execute(
            insert.on_conflict_do_update(index_elements=["asset", "day"], set_={"content": insert.excluded.content}),
            contents,
        )
        return transaction.complete(revisions, scope="whole", written=WriteCounts(rows=len(contents)))


def _content(connection: sa.Connection, upstreams: frozenset[str], day: date) -> str:
    own = dict(
        connection.execute(sa.select(extras.c.asset, extras.c.content).where(extras.c.day == day)).tuples().all()
    )
    of_orders = _orders_of(connection, day)
    return _digest(
        {upstream: of_orders if upstream in graph.names else own.get(upstream, "nothing") for upstream in upstreams}
    )


def _orders_of(connection: sa.Connection, day: date) -> str:
    """三个真的资产这一天的内容都是它的订单：客户与商机看全部历史，哪一天变了说不准。"""
    columns = (_ORDERS.order_id, _ORDERS.customer_nickname, _ORDERS.latest_status, _ORDERS.amount)
    rows = connection.execute(
        sa.select(*columns).where(_ORDERS.order_date == day).order_by(_ORDERS.shop_id, _ORDERS.order_id)
    ).all()
    return repr([tuple(row) for row in rows])


def _digest(contents: Mapping[str, str]) -> str:
    return md5(repr(sorted(contents.items())).encode()).hexdigest()  # noqa: S324  # 只为比较


def expected_extras(connection: sa.Connection, wider: AssetGraph, days: list[date]) -> dict[tuple[str, date], str]:
    """这些天该有的：照现在的订单，上游在前地算一遍。"""
    found: dict[tuple[str, date], str] = {}
    for day in days:
        of_orders = _orders_of(connection, day)
        for asset in wider.assets:
            if asset.name not in graph.names:
                upstreams = {name: found.get((name, day), of_orders) for name in asset.upstreams}
                found[asset.name, day] = _digest(upstreams)
    return found
