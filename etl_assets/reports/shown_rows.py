"""结果表与拒收记录给人看的行，新的在前。只读。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.business_day import local_day
from etl_assets.core.errors import PermanentError
from etl_assets.core.etl_tables import rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, target_tables
from etl_assets.services.day_rows import OnDays, customers_with_orders

_ORDERS_PER_ROW, _LOOK_FURTHER, _LOOKS = 5, 20, 3
"""找最新的客户：一行先看这么多订单，不够就看这么多倍，至多几回。"""
_NICKNAME = "customer_nickname"


def show_rows(
    connection: sa.Connection, settings: EtlSettings, asset: str, *, customer: str | None, day: date | None, limit: int
) -> Sequence[sa.RowMapping]:
    """一张结果表的行，新的在前；customer 按昵称的一部分找，day 是业务日（按客户的，是最后一单的）。

    :raises PermanentError: 按客户找，而这张表没有客户。
    """
    if not descriptions()[asset].by_customer:
        return _show_of_days(connection, settings, asset, customer=customer, day=day, limit=limit)
    read = partial(_show_of_customers, connection, settings, asset, customer=customer, limit=limit)
    return (
        read(lambda its_day: its_day == day)
        if day is not None
        else _show_newest(connection, settings, read, limit=limit)
    )


def _show_of_days(
    connection: sa.Connection, settings: EtlSettings, asset: str, *, customer: str | None, day: date | None, limit: int
) -> Sequence[sa.RowMapping]:
    """业务日有索引，时刻没有：先按日子倒着走；没有业务日的（别的程序写的）排在最后。"""
    table, description = target_tables(settings.target_schema).of_asset[asset], descriptions()[asset]
    if customer is not None and _NICKNAME not in table.c:
        raise PermanentError(f"{asset} has no {_NICKNAME}: leave --customer out")
    ours = sa.select(table) if customer is None else sa.select(table).where(_is_named(table.c[_NICKNAME], customer))
    dated_by = table.c[description.dated_by]

    def in_day(rows: sa.FromClause) -> list[sa.ColumnElement[Any]]:
        if description.then_by is None:
            return [rows.c[part.name] for part in table.primary_key]
        return [rows.c[description.then_by].desc().nulls_last()]

    if day is not None:
        return connection.execute(ours.where(dated_by == day).order_by(*in_day(table)).limit(limit)).mappings().all()
    dated = ours.where(dated_by.is_not(None)).order_by(dated_by.desc(), *in_day(table)).limit(limit)
    undated = ours.where(dated_by.is_(None)).order_by(*in_day(table)).limit(limit)
    found = sa.union_all(dated, undated).subquery("found")
    in_order = sa.select(found).order_by(found.c[description.dated_by].desc().nulls_last(), *in_day(found))
    return connection.execute(in_order.limit(limit)).mappings().all()


def _show_newest(
    connection: sa.Connection, settings: EtlSettings, read: Callable[..., Sequence[sa.RowMapping]], *, limit: int
) -> Sequence[sa.RowMapping]:
    """最后一单最晚的：他们就在最新的一些日子里，看到够了为止；哪些日子都看了还不够，才读整张表。

    customers 为它多一个索引的话，每个客户每来一单都要改它。
    """
    orders = target_tables(settings.target_schema).orders
    days = sa.select(orders.c.order_date).where(orders.c.order_date.is_not(None)).order_by(orders.c.order_date.desc())
    looked_at = _ORDERS_PER_ROW * limit
    for _ in range(_LOOKS):
        oldest = connection.scalar(days.offset(looked_at).limit(1))
        if oldest is None:
            break
        rows = read(lambda its_day, oldest=oldest: its_day >= oldest)
        if len(rows) >= limit:
            return rows
        looked_at *= _LOOK_FURTHER
    return read()


def _show_of_customers(
    connection: sa.Connection,
    settings: EtlSettings,
    asset: str,
    on_days: OnDays | None = None,
    *,
    customer: str | None,
    limit: int,
) -> Sequence[sa.RowMapping]:
    """客户，或他们的行，带着他们的昵称。

    :param on_days: 只要最后一单在这些日子的。
    """
    tables = target_tables(settings.target_schema)
    customers, shown = tables.customers, tables.of_asset[asset]
    columns = [shown] if shown is customers else [customers.c[_NICKNAME], shown]
    theirs = shown.c.customer_global_id == customers.c.customer_global_id
    source: sa.FromClause = shown if shown is customers else shown.outerjoin(customers, theirs)
    if on_days is not None:
        named = customers_with_orders(tables, on_days(tables.orders.c.order_date)).distinct().subquery("named")
        source = named.join(customers, customers.c.customer_key == named.c.customer_key)
        source = source if shown is customers else source.join(shown, theirs)
    dated_by = shown.c[descriptions()[asset].dated_by]
    wanted = sa.true() if on_days is None else on_days(local_day(dated_by, settings.timezone))
    statement = sa.select(*columns).select_from(source).where(_is_named(customers.c[_NICKNAME], customer), wanted)
    return connection.execute(statement.order_by(dated_by.desc().nulls_last()).limit(limit)).mappings().all()


def _is_named(nickname: sa.ColumnElement[str], part: str | None) -> sa.ColumnElement[bool]:
    return sa.true() if part is None else nickname.contains(part, autoescape=True)


def show_rejected(
    connection: sa.Connection,
    settings: EtlSettings,
    *,
    import_id: UUID | None,
    rule: str | None,
    customer: str | None,
    day: date | None,
    limit: int,
) -> Sequence[sa.RowMapping]:
    """被拒收的原始行与缘由，新的在前；值照原样，时刻是文本，因为它可能正是装不下的那个。

    文本按会话的时区写：在这个事务里换成业务时区，旁边的 day 才对得上。换算（AT TIME ZONE）不行，两端的时刻会出界。
    """
    connection.execute(sa.select(sa.func.set_config("TimeZone", settings.timezone, True)))  # SQL 的参数
    raw, rejected = raw_orders.c, rejected_rows.c
    wanted = {rejected.import_id: import_id, rejected.rule: rule, rejected.day: day}
    statement = (
        sa.select(
            *rejected["day", "rule", "raw_id", "import_id"],
            import_tasks.c.source_name,
            *raw["order_id", "shop", "customer_name", "order_type", "order_status", "amount", "quantity"],
            sa.cast(raw.ordered_at, sa.Text).label("ordered_at"),
        )
        .select_from(rejected_rows)
        .outerjoin(raw_orders, raw.raw_id == rejected.raw_id)
        .outerjoin(import_tasks, import_tasks.c.import_id == rejected.import_id)
        .where(rejected.target == settings.target_schema, _is_named(raw.customer_name, customer))
        .where(*[column == value for column, value in wanted.items() if value is not None])
    )
    return connection.execute(statement.order_by(rejected.raw_id.desc()).limit(limit)).mappings().all()
