"""给人看的查询：导入的去向、台账的现状。只读；都是整批的一条语句。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import (
    import_events,
    import_requests,
    import_tasks,
    leases,
    ledger,
    order_index,
    outbox,
    raw_orders,
    rejected_rows,
    shop_configs,
    target_tables,
    trimmed,
    waiting_events,
)
from etl_assets.services.figures import has_status, status_spellings
from etl_assets.services.ledger import ASSETS
from etl_assets.services.vectorized_queries import read_frame


@dataclass(frozen=True)
class Progress:
    """一次导入或一段日子走到哪里：handled 是要求进了台账没有，days、done、held 是要做的、做完的、搁置的天数。"""

    handled: bool
    days: int
    done: int
    held: int
    held_reason: str | None


def import_accounting(connection: sa.Connection, settings: EtlSettings, *, limit: int | None = None) -> Sequence[sa.RowMapping]:
    """每次导入一行，新的在前：raw = loaded + superseded + rejected + waiting。

    superseded 是同一订单另有赢家的行；waiting 是还没有哪次运行处理过的行。不在范围的导入只有 raw。
    """
    orders = target_tables(settings.target_schema).orders
    target = settings.target_schema
    tasks = import_tasks.c
    chosen = sa.select(import_tasks).order_by(tasks.created_at.desc().nulls_last(), tasks.import_id).limit(limit).subquery("chosen")
    rejected = sa.and_(rejected_rows.c.raw_id == raw_orders.c.raw_id, rejected_rows.c.target == target)
    winner = sa.and_(orders.c.shop_id == shop_configs.c.shop_id, orders.c.order_id == trimmed(raw_orders.c.order_id))
    in_scope = chosen.c.status == "completed"
    is_rejected = rejected_rows.c.raw_id.is_not(None)
    is_loaded = sa.and_(~is_rejected, orders.c.raw_id == raw_orders.c.raw_id)
    is_superseded = sa.and_(~is_rejected, orders.c.raw_id.is_not(None), orders.c.raw_id != raw_orders.c.raw_id)

    def count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.count(raw_orders.c.raw_id).filter(sa.and_(in_scope, condition))

    loaded, superseded, refused = count(is_loaded), count(is_superseded), count(is_rejected)
    statement = (
        sa.select(
            chosen.c.import_id,
            chosen.c.source_name,
            chosen.c.status,
            chosen.c.completed_at,
            sa.func.count(raw_orders.c.raw_id).label("raw"),
            loaded.label("loaded"),
            superseded.label("superseded"),
            refused.label("rejected"),
            (count(sa.true()) - loaded - superseded - refused).label("waiting"),
        )
        .select_from(chosen)
        .outerjoin(raw_orders, raw_orders.c.import_id == chosen.c.import_id)
        .outerjoin(shop_configs, shop_configs.c.shop_name == trimmed(raw_orders.c.shop))
        .outerjoin(orders, winner)
        .outerjoin(rejected_rows, rejected)
        .group_by(chosen.c.import_id, chosen.c.source_name, chosen.c.status, chosen.c.completed_at, chosen.c.created_at)
        .order_by(chosen.c.created_at.desc().nulls_last(), chosen.c.import_id)
    )
    return connection.execute(statement).mappings().all()


def import_progress(connection: sa.Connection, settings: EtlSettings, import_id: UUID, *, since: datetime | None = None) -> Progress:
    """一次导入要求的日子做到了没有；链末的资产做到了那个版本，就是全程都做到了。

    :param since: 数据库的钟；在那之前处理的事件不算，有了之后的才看日子。
    """
    target = settings.target_schema
    # 先看事件进了台账没有：反过来，两条语句之间进来的事件会显得没有一天要做
    event = sa.select(import_events.c.event_id).where(import_events.c.target == target, import_events.c.import_id == import_id)
    handled = connection.execute(event if since is None else event.where(import_events.c.handled_at >= since)).first()
    if since is not None and handled is None:
        return Progress(handled=False, days=0, done=0, held=0, held_reason=None)
    last = ledger.alias("last")
    held = ledger.alias("held")
    reason = (
        sa.select(held.c.held_reason)
        .where(held.c.target == target, held.c.day == import_requests.c.day, held.c.held_reason.is_not(None))
        .limit(1)
        .scalar_subquery()
    )
    days = (
        sa.select((last.c.materialized >= import_requests.c.revision).label("is_done"), reason.label("reason"))
        .join(last, sa.and_(last.c.target == target, last.c.day == import_requests.c.day, last.c.asset == ASSETS[-1]))
        .where(import_requests.c.target == target, import_requests.c.import_id == import_id)
        .subquery("days")
    )
    waiting_in_vain = sa.and_(~days.c.is_done, days.c.reason.is_not(None))
    total, done, held_days, held_reason = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(days.c.is_done),
            sa.func.count().filter(waiting_in_vain),
            sa.func.max(days.c.reason).filter(waiting_in_vain),
        ).select_from(days)
    ).one()
    return Progress(handled=handled is not None, days=total, done=done, held=held_days, held_reason=held_reason)


def handled_sequence(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> int:
    """这次导入最新处理的事件在流里的序号；没有就是 0。"""
    known = sa.select(import_events.c.stream_sequence).where(
        import_events.c.target == settings.target_schema, import_events.c.import_id == import_id
    )
    return connection.scalar(known) or 0


def range_progress(connection: sa.Connection, settings: EtlSettings, days: DayRange) -> Progress:
    """一段日子走到哪里：整条链都没有到期的日子算做完。"""
    due = ledger.c.requested > ledger.c.materialized
    by_day = (
        sa.select(sa.func.bool_or(due).label("is_due"), sa.func.max(ledger.c.held_reason).filter(due).label("reason"))
        .where(ledger.c.target == settings.target_schema, days.includes(ledger.c.day))
        .group_by(ledger.c.day)
        .subquery("by_day")
    )
    total, done, held, reason = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.count().filter(~by_day.c.is_due),
            sa.func.count(by_day.c.reason),
            sa.func.max(by_day.c.reason),
        ).select_from(by_day)
    ).one()
    return Progress(handled=True, days=total, done=done, held=held, held_reason=reason)


def ledger_summary(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """每个资产一行：天数、到期、等着重试、搁置、等得最久的一天。"""
    due = ledger.c.requested > ledger.c.materialized
    held = ledger.c.held_reason.is_not(None)
    position = sa.func.array_position(sa.cast(list(ASSETS), sa.ARRAY(sa.Text)), ledger.c.asset)
    statement = (
        sa.select(
            ledger.c.asset,
            sa.func.count().label("days"),
            sa.func.count().filter(due, ~held).label("due"),
            sa.func.count().filter(due, ledger.c.retry_at > sa.func.now()).label("waiting_to_retry"),
            sa.func.count().filter(due, held).label("held"),
            sa.func.min(ledger.c.requested_at).filter(due, ~held).label("oldest_due_since"),
            sa.func.max(ledger.c.materialized_at).label("last_materialized_at"),
        )
        .where(ledger.c.target == settings.target_schema)
        .group_by(ledger.c.asset)
        .order_by(position)
    )
    return connection.execute(statement).mappings().all()


def held_days(connection: sa.Connection, settings: EtlSettings, *, limit: int = 20) -> Sequence[sa.RowMapping]:
    """搁置的日子与缘由。"""
    statement = (
        sa.select(ledger.c.asset, ledger.c.day, ledger.c.held_reason)
        .where(ledger.c.target == settings.target_schema, ledger.c.held_reason.is_not(None), ledger.c.requested > ledger.c.materialized)
        .order_by(ledger.c.day)
        .limit(limit)
    )
    return connection.execute(statement).mappings().all()


def running_leases(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """正在执行的运行。"""
    statement = (
        sa.select(leases.c.run_id, leases.c.owner, leases.c.first_day, leases.c.last_day, leases.c.acquired_at)
        .where(leases.c.target == settings.target_schema, leases.c.expires_at > sa.func.clock_timestamp())
        .order_by(leases.c.acquired_at)
    )
    return connection.execute(statement).mappings().all()


def rejected_by_rule(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """每条拒收规则的行数。"""
    statement = (
        sa.select(rejected_rows.c.rule, sa.func.count().label("rows"))
        .where(rejected_rows.c.target == settings.target_schema)
        .group_by(rejected_rows.c.rule)
        .order_by(sa.func.count().desc(), rejected_rows.c.rule)
    )
    return connection.execute(statement).mappings().all()


def unpublished_events(connection: sa.Connection) -> int:
    """发件箱里还没发布的完成事件。"""
    return connection.execute(sa.select(sa.func.count()).select_from(outbox)).scalar_one()


def set_aside_events(connection: sa.Connection) -> sa.Row[tuple[int, str | None]]:
    """发件箱里发不了、放在一边的：events 几个，problem 最早那个的原因。"""
    first = sa.select(outbox.c.problem).where(outbox.c.problem.is_not(None)).order_by(outbox.c.outbox_id).limit(1)
    return connection.execute(
        sa.select(sa.func.count(outbox.c.problem).label("events"), first.scalar_subquery().label("problem")).select_from(outbox)
    ).one()


def count_waiting_events(connection: sa.Connection, settings: EtlSettings) -> sa.Row[tuple[int, datetime | None]]:
    """等着导入的事件：events 几个，oldest 最早的是何时发布的。"""
    waiting = waiting_events.c
    return connection.execute(
        sa.select(sa.func.count().label("events"), sa.func.min(waiting.stored_at).label("oldest")).where(
            waiting.target == settings.target_schema
        )
    ).one()


def show_rows(
    connection: sa.Connection, settings: EtlSettings, table: str, *, customer: str | None, day: Any, limit: int
) -> Sequence[sa.RowMapping]:
    """一张结果表的行，新的在前；customer 按昵称或 customer_key 的一部分找，day 是业务日。"""
    tables = target_tables(settings.target_schema)
    customers = tables.customers
    at = {"orders": tables.orders.c.ordered_at, "customers": customers.c.last_order_at, "leads": tables.leads.c.last_order_at}[table]
    pattern = None if customer is None else "%" + customer.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    if table == "leads":
        statement = sa.select(customers.c.customer_nickname, tables.leads).join_from(
            tables.leads, customers, customers.c.customer_global_id == tables.leads.c.customer_global_id, isouter=True
        )
        nickname = customers.c.customer_nickname
    else:
        source = tables.orders if table == "orders" else customers
        statement = sa.select(source)
        nickname = source.c.customer_nickname
    if pattern is not None:
        statement = statement.where(nickname.like(pattern))
    if day is not None:
        statement = statement.where(sa.cast(sa.func.timezone(settings.timezone, at), sa.Date) == day)
    return connection.execute(statement.order_by(at.desc().nulls_last()).limit(limit)).mappings().all()


def show_rejected(
    connection: sa.Connection,
    settings: EtlSettings,
    *,
    import_id: UUID | None,
    rule: str | None,
    customer: str | None,
    day: Any,
    limit: int,
) -> Sequence[sa.RowMapping]:
    """被拒收的原始行与缘由，新的在前；值照原样，时刻是文本，因为它可能正是装不下的那个。"""
    raw, rejected = raw_orders.c, rejected_rows.c
    conditions = [rejected.target == settings.target_schema]
    if import_id is not None:
        conditions.append(rejected.import_id == import_id)
    if rule is not None:
        conditions.append(rejected.rule == rule)
    if day is not None:
        conditions.append(rejected.day == day)
    if customer is not None:
        conditions.append(raw.customer_name.contains(customer, autoescape=True))
    columns = (raw.order_id, raw.shop, raw.customer_name, raw.order_type, raw.order_status, raw.amount, raw.quantity)
    statement = (
        sa.select(
            rejected.day,
            rejected.rule,
            rejected.raw_id,
            rejected.import_id,
            import_tasks.c.source_name,
            *columns,
            sa.cast(raw.ordered_at, sa.Text).label("ordered_at"),
        )
        .select_from(rejected_rows)
        .outerjoin(raw_orders, raw.raw_id == rejected.raw_id)
        .outerjoin(import_tasks, import_tasks.c.import_id == rejected.import_id)
        .where(*conditions)
    )
    return connection.execute(statement.order_by(rejected.raw_id.desc()).limit(limit)).mappings().all()


def show_lead_orders(connection: sa.Connection, settings: EtlSettings, lead_id: UUID) -> list[dict[str, Any]]:
    """一个商机的订单，按先后排好。

    客户计数的订单依次分给 1、2… 号商机，所以它的订单就是排在前面各号的笔数之后的那一段。

    :raises PermanentError: 没有这个商机。
    """
    tables = target_tables(settings.target_schema)
    wanted, customers, orders = tables.leads.alias("wanted"), tables.customers, tables.orders
    earlier = tables.leads.alias("earlier")
    before = sa.select(sa.func.coalesce(sa.func.sum(_order_count(earlier)), 0)).where(
        earlier.c.customer_global_id == wanted.c.customer_global_id, earlier.c.lead_no < wanted.c.lead_no
    )
    lead = connection.execute(
        sa.select(customers.c.customer_key, before.scalar_subquery().label("orders_before"), _order_count(wanted).label("orders"))
        .join_from(wanted, customers, customers.c.customer_global_id == wanted.c.customer_global_id)
        .where(wanted.c.lead_id == lead_id)
    ).one_or_none()
    if lead is None:
        raise PermanentError(f"there is no lead {lead_id}: `etl show leads` lists them with their lead_id")
    theirs = (
        sa.select(orders)
        .join(order_index, sa.and_(order_index.c.shop_id == orders.c.shop_id, order_index.c.order_id == orders.c.order_id))
        .where(order_index.c.target == settings.target_schema, order_index.c.customer_key == lead.customer_key)
    )
    frame = read_frame(connection, theirs)
    counted = frame.filter(~has_status(status_spellings(frame["latest_status"]), settings.cancelled_statuses)).sort(
        "ordered_at", "order_id"
    )
    return counted.slice(lead.orders_before, lead.orders).to_dicts()


def _order_count(leads: sa.FromClause) -> sa.ColumnElement[int]:
    counts = [sa.func.coalesce(leads.c[f"{kind}_count"], 0) for kind in ("sample", "proof", "bulk")]
    return counts[0] + counts[1] + counts[2]
