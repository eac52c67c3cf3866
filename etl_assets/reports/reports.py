"""给人看的查询：导入的去向、台账的现状。只读；都是整批的一条语句。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from etl_assets.core.etl_tables import outbox, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs, target_tables, trimmed

RECENT_REJECTED = 1_000


def import_accounting(connection: sa.Connection, settings: EtlSettings, *, limit: int | None = None) -> Sequence[sa.RowMapping]:
    """每次导入一行，新的在前：raw = loaded + superseded + rejected + waiting。

    superseded 是同一订单另有赢家的行；waiting 是还没有哪次运行处理过的行。不在范围的导入只有 raw。
    """
    orders = target_tables(settings.target_schema).orders
    chosen = _newest_imports(limit)
    rejected = sa.and_(rejected_rows.c.raw_id == raw_orders.c.raw_id, rejected_rows.c.target == settings.target_schema)
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
            *chosen.c["import_id", "source_name", "status", "completed_at"],
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
        .group_by(chosen.c.import_id, chosen.c.source_name, chosen.c.status, chosen.c.completed_at, chosen.c.at)
        .order_by(chosen.c.at.desc().nulls_last(), chosen.c.import_id)
    )
    return connection.execute(statement).mappings().all()


def _newest_imports(limit: int | None) -> sa.Subquery:
    """按完成的时刻，没有完成的按建立的时刻（at）；前者有索引，后者不多：不必把全部导入排一遍。"""
    tasks = import_tasks.c
    completed = sa.select(import_tasks, tasks.completed_at.label("at")).where(tasks.completed_at.is_not(None))
    others = sa.select(import_tasks, tasks.created_at.label("at")).where(tasks.completed_at.is_(None))
    newest = sa.union_all(
        completed.order_by(tasks.completed_at.desc(), tasks.import_id).limit(limit),
        others.order_by(tasks.created_at.desc().nulls_last(), tasks.import_id).limit(limit),
    ).subquery("newest")
    return sa.select(newest).order_by(newest.c.at.desc().nulls_last(), newest.c.import_id).limit(limit).subquery("chosen")


def ledger_summary(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """每个资产一行：台账里最后的一天、到期、等着重试、搁置、等得最久的一天，最近一次做的是整天还是变了的。只看到期的日子：做完的有几千个。"""
    return connection.execute(_LEDGER_SUMMARY, {"target": settings.target_schema}).mappings().all()


_LEDGER_SUMMARY = sa.text("""
    SELECT a.asset, days.last_day,
           coalesce(of_due.due, 0) AS due, coalesce(of_due.waiting_to_retry, 0) AS waiting_to_retry,
           coalesce(of_due.held, 0) AS held, of_due.oldest_due_since, last.materialized_at AS last_materialized_at, last.scope AS last_scope
    FROM etl.assets a
    LEFT JOIN (
        SELECT asset,
               count(*) FILTER (WHERE held_reason IS NULL) AS due,
               count(*) FILTER (WHERE retry_at > now()) AS waiting_to_retry,
               count(*) FILTER (WHERE held_reason IS NOT NULL) AS held,
               min(requested_at) FILTER (WHERE held_reason IS NULL) AS oldest_due_since
        FROM etl.ledger WHERE target = :target AND requested > materialized GROUP BY asset
    ) AS of_due ON of_due.asset = a.asset
    JOIN LATERAL (
        SELECT max(day) AS last_day FROM etl.ledger WHERE target = :target AND asset = a.asset
    ) AS days ON days.last_day IS NOT NULL
    LEFT JOIN LATERAL (
        SELECT materialized_at, scope FROM etl.ledger
        WHERE target = :target AND asset = a.asset AND materialized_at IS NOT NULL ORDER BY materialized_at DESC LIMIT 1
    ) AS last ON true
    WHERE a.target = :target ORDER BY a.position""")


def held_days(connection: sa.Connection, settings: EtlSettings, *, limit: int = 20) -> Sequence[sa.RowMapping]:
    """搁置的日子与缘由。"""
    return connection.execute(_HELD, {"target": settings.target_schema, "limit": limit}).mappings().all()


_HELD = sa.text("""
    SELECT l.asset, l.day, l.held_reason FROM etl.ledger l JOIN etl.assets a ON a.target = l.target AND a.asset = l.asset
    WHERE l.target = :target AND l.held_reason IS NOT NULL AND l.requested > l.materialized
    ORDER BY l.day LIMIT :limit""")


def running_leases(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """正在执行的运行。"""
    return connection.execute(_RUNNING, {"target": settings.target_schema}).mappings().all()


_RUNNING = sa.text("""
    SELECT run_id, owner, first_day, last_day, acquired_at FROM etl.leases
    WHERE target = :target AND expires_at > clock_timestamp() ORDER BY acquired_at""")


def rejected_by_rule(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """最近拒收的 RECENT_REJECTED 行里，每条规则各几行。"""
    return connection.execute(_REJECTED, {"target": settings.target_schema, "limit": RECENT_REJECTED}).mappings().all()


_REJECTED = sa.text("""
    SELECT rule, count(*) AS rows FROM (
        SELECT rule FROM etl.rejected_rows WHERE target = :target ORDER BY raw_id DESC LIMIT :limit
    ) AS recent
    GROUP BY rule ORDER BY rows DESC, rule""")


def unpublished_events(connection: sa.Connection) -> int:
    """发件箱里还没发布的完成事件。"""
    return connection.execute(sa.select(sa.func.count()).select_from(outbox)).scalar_one()


def set_aside_events(connection: sa.Connection) -> sa.Row[tuple[int, str | None]]:
    """发件箱里发不了、放在一边的：events 几个，problem 最早那个的原因。"""
    return connection.execute(_SET_ASIDE).one()


_SET_ASIDE = sa.text("""
    SELECT count(problem) AS events, (
        SELECT problem FROM etl.outbox WHERE problem IS NOT NULL ORDER BY outbox_id LIMIT 1
    ) AS problem FROM etl.outbox""")


def count_waiting_events(connection: sa.Connection, settings: EtlSettings) -> sa.Row[tuple[int, datetime | None]]:
    """等着导入的事件：events 几个，oldest 最早的是何时发布的。"""
    return connection.execute(_WAITING, {"target": settings.target_schema}).one()


_WAITING = sa.text("SELECT count(*) AS events, min(stored_at) AS oldest FROM etl.waiting_events WHERE target = :target")
