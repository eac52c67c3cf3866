"""给人看的查询：导入的去向、台账的现状。只读；都是整批的一条语句。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from uuid import UUID

import sqlalchemy as sa

from etl_assets.core.etl_tables import outbox, rejected_rows, waiting_events
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs, target_tables, trimmed

RECENT_REJECTED = 1_000
RECENT_DAYS = 500


def import_accounting(
    connection: sa.Connection, settings: EtlSettings, *, limit: int | None = None, import_id: UUID | None = None
) -> Sequence[sa.RowMapping]:
    """每次导入一行，新的在前：raw = loaded + superseded + rejected + waiting。

    superseded 是同一订单另有赢家的行；waiting 是还没有哪次运行处理过的行。不在范围的导入只有 raw。

    :param import_id: 只要这一次。
    """
    orders = target_tables(settings.target_schema).orders
    chosen = _newest_imports(limit) if import_id is None else _one_import(import_id)
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
            *chosen.c["import_id", "source_name"],
            shown_status(chosen).label("status"),
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
        .group_by(chosen.c.import_id, chosen.c.source_name, chosen.c.status, chosen.c.completed_at, chosen.c.at)
        .order_by(chosen.c.at.desc().nulls_last(), chosen.c.import_id)
    )
    return connection.execute(statement).mappings().all()


def shown_status(imports: sa.FromClause) -> sa.ColumnElement[str]:
    """import_tasks.status，而撤回了的叫 withdrawn：表里撤回的与没有导成的都是 failed，完成过的才撤回得了。"""
    is_withdrawn = sa.and_(imports.c.status == "failed", imports.c.completed_at.is_not(None))
    return sa.case((is_withdrawn, "withdrawn"), else_=imports.c.status)


def read_status(connection: sa.Connection, import_id: UUID) -> str | None:
    """一次导入给人看的状态；没有它就是 None。"""
    return connection.scalar(sa.select(shown_status(import_tasks)).where(import_tasks.c.import_id == import_id))


def is_awaited(connection: sa.Connection, settings: EtlSettings, import_id: UUID) -> bool:
    """它的事件到了，它自己还没有提交。"""
    of_import = sa.and_(waiting_events.c.target == settings.target_schema, waiting_events.c.import_id == import_id)
    return bool(connection.scalar(sa.select(sa.exists().where(of_import))))


def _one_import(import_id: UUID) -> sa.Subquery:
    of_import = import_tasks.c.import_id == import_id
    return sa.select(import_tasks, import_tasks.c.completed_at.label("at")).where(of_import).subquery("chosen")


def oldest_day(connection: sa.Connection, target: str) -> date | None:
    """台账里最早的一天；每个没有上游的资产走一次索引。"""
    oldest: date | None = connection.scalar(_OLDEST_DAY, {"target": target})
    return oldest


_OLDEST_DAY = sa.text("""
    SELECT min(of_asset.day) FROM etl.assets a,
    LATERAL (SELECT min(l.day) AS day FROM etl.ledger l WHERE l.target = a.target AND l.asset = a.asset) AS of_asset
    WHERE a.target = :target AND cardinality(a.upstreams) = 0""")


def newest_imports(connection: sa.Connection, limit: int) -> Sequence[sa.RowMapping]:
    """最近的几次导入，一行一次；行数是导入的人写下的，不去数原始行。"""
    newest = _newest_imports(limit)
    columns = (
        newest.c.completed_at,
        newest.c.source_name,
        newest.c.row_count.label("rows"),
        shown_status(newest).label("status"),
    )
    statement = sa.select(*columns, newest.c.import_id).order_by(newest.c.at.desc().nulls_last(), newest.c.import_id)
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
    return (
        sa.select(newest).order_by(newest.c.at.desc().nulls_last(), newest.c.import_id).limit(limit).subquery("chosen")
    )


def ledger_summary(connection: sa.Connection, settings: EtlSettings) -> Sequence[sa.RowMapping]:
    """每个资产一行：台账里最后的一天、做过的最新的一天、到期、等着重试、搁置、等得最久的一天，最近一次做的是整天还是变了的。

    只看到期的日子：做完的有几千个。
    """
    return connection.execute(_LEDGER_SUMMARY, {"target": settings.target_schema}).mappings().all()


_LEDGER_SUMMARY = sa.text("""
    SELECT a.asset, days.last_day, newest.day AS newest_materialized_day,
           coalesce(of_due.due, 0) AS due, coalesce(of_due.waiting_to_retry, 0) AS waiting_to_retry,
           coalesce(of_due.held, 0) AS held, of_due.oldest_due_since, last.materialized_at AS last_materialized_at, last.scope AS last_scope,
           extract(epoch FROM now() - of_due.oldest_due_since)::float8 AS oldest_due_seconds,
           extract(epoch FROM now() - last.materialized_at)::float8 AS last_materialized_seconds
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
        SELECT day FROM etl.ledger
        WHERE target = :target AND asset = a.asset AND materialized_at IS NOT NULL ORDER BY day DESC LIMIT 1
    ) AS newest ON true
    LEFT JOIN LATERAL (
        SELECT materialized_at, scope FROM etl.ledger
        WHERE target = :target AND asset = a.asset AND materialized_at IS NOT NULL ORDER BY materialized_at DESC LIMIT 1
    ) AS last ON true
    WHERE a.target = :target ORDER BY a.position""")


def held_days(connection: sa.Connection, settings: EtlSettings, *, limit: int = 20) -> Sequence[sa.RowMapping]:
    """搁置的日子、缘由与补上的命令。"""
    return connection.execute(_HELD, {"target": settings.target_schema, "limit": limit}).mappings().all()


_HELD = sa.text("""
    SELECT l.asset, l.day, l.held_reason,
           format('etl backfill --asset %s --from %s --to %s', l.asset, l.day, l.day) AS remedy
    FROM etl.ledger l JOIN etl.assets a ON a.target = l.target AND a.asset = l.asset
    WHERE l.target = :target AND l.held_reason IS NOT NULL AND l.requested > l.materialized
    ORDER BY l.day LIMIT :limit""")


def event_lag(connection: sa.Connection, settings: EtlSettings) -> sa.RowMapping:
    """从事件进流到最后的资产做完：最近一小时做的日子，各看它最新的一个导入。days 几天，p50_seconds、p99_seconds；没有就是 NULL。

    最新的那个等得不比别的久：一天来了许多导入时，别的等了多久看不出来。人点的、回填的日子不算。
    """
    return connection.execute(_LAG, {"target": settings.target_schema, "limit": RECENT_DAYS}).mappings().one()


_LAG = sa.text("""
    WITH ends AS (
        SELECT asset FROM etl.assets a WHERE target = :target AND NOT EXISTS (
            SELECT FROM etl.assets other WHERE other.target = :target AND a.asset = ANY (other.upstreams)
        )
    ), lags AS (
        SELECT greatest(extract(epoch FROM max(made.materialized_at) - newest.stored_at), 0)::float8 AS seconds
        FROM ends CROSS JOIN LATERAL (
            SELECT day, materialized, materialized_at FROM etl.ledger
            WHERE target = :target AND asset = ends.asset AND materialized_at > now() - interval '1 hour'
            ORDER BY materialized_at DESC LIMIT :limit
        ) AS made CROSS JOIN LATERAL (
            SELECT r.revision, e.stored_at FROM (
                SELECT import_id, revision FROM etl.import_requests
                WHERE target = :target AND day = made.day ORDER BY revision DESC LIMIT 1
            ) AS r JOIN etl.import_events e ON e.target = :target AND e.import_id = r.import_id
        ) AS newest
        WHERE newest.revision = made.materialized AND newest.stored_at IS NOT NULL
        GROUP BY made.day, newest.stored_at
    )
    SELECT count(*) AS days,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY seconds) AS p50_seconds,
           percentile_cont(0.99) WITHIN GROUP (ORDER BY seconds) AS p99_seconds
    FROM lags""")


def failed_runs(connection: sa.Connection, settings: EtlSettings, *, limit: int = 10) -> Sequence[sa.RowMapping]:
    """最近一天失败的运行与缘由的头一句，新的在前；still_due 是它的日子还有没做成的。"""
    return connection.execute(_FAILED, {"target": settings.target_schema, "limit": limit}).mappings().all()


_FAILED = sa.text("""
    SELECT failed_at, run_id, asset, first_day, last_day, reason, EXISTS (
        SELECT FROM etl.ledger l WHERE l.target = failed.target AND l.asset = failed.asset
                                       AND l.day BETWEEN failed.first_day AND failed.last_day AND l.requested > l.materialized
    ) AS still_due
    FROM etl.failed_runs failed
    WHERE target = :target AND failed_at > now() - interval '1 day' ORDER BY failed_at DESC LIMIT :limit""")


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
