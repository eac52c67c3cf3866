"""日子做到了哪里，与一天的来历：哪些导入要求过它，账上怎样，拒收了什么。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array
from etl_assets.core.business_day import partition_range
from etl_assets.core.settings import EtlSettings
from etl_assets.reports.why.imports import read_imports

Record = dict[str, Any]

SHOWN_IMPORTS = 20
SHOWN_DAYS = 10
MOST_REJECTED = 10_000


def read_day(connection: sa.Connection, settings: EtlSettings, day: date) -> Record | None:
    """一天的来历；台账、导入、拒收记录里都没有它就是 None。"""
    parameters = {"target": settings.target_schema, "day": day}
    asked = connection.execute(_ASKED, parameters | {"limit": SHOWN_IMPORTS + 1}).all()
    rows_of = {row.import_id: row.rows for row in asked[:SHOWN_IMPORTS]}
    imports = {task["import_id"]: task for task in read_imports(connection, settings, rows_of)}
    assets = read_ledger(connection, settings, [day])
    found: Record = {
        "day": day,
        "is_partition": partition_range(settings).first <= day <= partition_range(settings).last,
        "assets": assets,
        "running": read_running(connection, settings, [day]),
        "imports": [imports[import_id] | {"rows_of_day": rows} for import_id, rows in rows_of.items()],
        "more_imports": len(asked) > SHOWN_IMPORTS,
        "account": _account(connection.scalar(_ACCOUNT, parameters), assets),
        "rejected": count_rejected(connection, settings, day=day),
    }
    return found if any(found[name] for name in ("assets", "running", "imports", "rejected")) else None


def read_ledger(connection: sa.Connection, settings: EtlSettings, days: Iterable[date]) -> list[Record]:
    """这些天（最晚的 SHOWN_DAYS 个）在台账里，一行一个资产的一天。

    state：done，idle（从没做过，也还没有人要求），due（到期，since 起），retry（失败过，retry_at 再试），held（搁置，缘由 held_reason）；
    run_id 与 made_at 是上次做成的，failed_run_id 是上次失败的。
    """
    wanted = sorted(set(days))[-SHOWN_DAYS:]
    rows = connection.execute(_LEDGER, {"target": settings.target_schema, "days": wanted}).mappings()
    return [dict(row) for row in rows]


def read_running(connection: sa.Connection, settings: EtlSettings, days: Iterable[date]) -> list[Record]:
    """正做着这些天的运行。"""
    rows = connection.execute(_RUNNING, {"target": settings.target_schema, "days": sorted(set(days))}).mappings()
    return [dict(row) for row in rows]


def count_rejected(
    connection: sa.Connection, settings: EtlSettings, *, day: date | None = None, import_id: UUID | None = None
) -> list[Record]:
    """一天或一次导入拒收的，一行一条规则：rows 行，examples 其中几个订单号；至多数 MOST_REJECTED 行。"""
    which = "day = :day" if import_id is None else "import_id = :import_id"
    statement = sa.text(_REJECTED.format(which=which))
    parameters = {"target": settings.target_schema, "limit": MOST_REJECTED}
    parameters |= {"day": day} if import_id is None else {"import_id": import_id}
    return [dict(row) for row in connection.execute(statement, parameters).mappings()]


def _account(stored: Mapping[str, Any] | None, assets: Iterable[Record]) -> Record | None:
    """存着的账；后来又由不记账的旧版本做过的，不作数。"""
    if stored is None or stored["run_id"] not in {asset["run_id"] for asset in assets}:
        return None
    counts = {name: stored.get(name, 0) for name in ("raw", "loaded", "superseded", "outside")}
    return counts | {"rejected": sum(stored["rejected"].values())}


# 账上有几行未必知道：只做变了的、还没有做过的
_ASKED = sa.text("""
    SELECT r.import_id, c.rows FROM (
        SELECT import_id, revision FROM etl.import_requests WHERE target = :target AND day = :day
        ORDER BY revision DESC LIMIT :limit
    ) AS r
    LEFT JOIN etl.counted_imports c ON c.target = :target AND c.day = :day AND c.import_id = r.import_id
    ORDER BY r.revision DESC, r.import_id""")
_ACCOUNT = sa.text("SELECT account FROM etl.day_accounts WHERE target = :target AND day = :day").columns(
    account=pg.JSONB
)
_LEDGER = sa.text("""
    SELECT l.day, l.asset,
           CASE WHEN l.requested <= l.materialized THEN CASE WHEN l.run_id IS NULL THEN 'idle' ELSE 'done' END
                WHEN l.held_reason IS NOT NULL THEN 'held'
                WHEN l.retry_at > now() THEN 'retry' ELSE 'due' END AS state,
           l.materialized_at AS made_at, l.run_id, l.scope,
           CASE WHEN l.requested > l.materialized THEN l.requested_at END AS since,
           l.failures, l.retry_at, l.failed_run_id, l.held_reason
    FROM unnest(:days) AS wanted (day)
    JOIN etl.assets a ON a.target = :target
    JOIN etl.ledger l ON l.target = :target AND l.asset = a.asset AND l.day = wanted.day
    ORDER BY l.day, a.position""").bindparams(array("days", sa.Date))
_RUNNING = sa.text("""
    SELECT run_id, owner AS worker, first_day, last_day, acquired_at FROM etl.leases s
    WHERE target = :target AND expires_at > clock_timestamp()
          AND EXISTS (SELECT FROM unnest(:days) AS wanted (day) WHERE wanted.day BETWEEN s.first_day AND s.last_day)
    ORDER BY acquired_at""").bindparams(array("days", sa.Date))
_REJECTED = """
    SELECT rejected.rule, count(*) AS rows,
           coalesce((array_agg(DISTINCT left(raw.order_id, 60)) FILTER (WHERE raw.order_id IS NOT NULL))[1:3], '{{}}') AS examples
    FROM (SELECT rule, raw_id FROM etl.rejected_rows WHERE target = :target AND {which} LIMIT :limit) AS rejected
    LEFT JOIN public.raw_orders raw ON raw.raw_id = rejected.raw_id
    GROUP BY rejected.rule ORDER BY rows DESC, rejected.rule"""
