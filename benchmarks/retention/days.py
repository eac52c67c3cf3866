"""过去的一天天：一个真的导入与它的运行，照样再来许多份，连同 Dagster 的事件、检查、传感器的记录与流里的消息。"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import Stretch, read_stored
from bridge.jetstream.streams import stream_state
from bridge.nats_names import EVENTS_STREAM

_AT_ONCE = 50
_EVENT_ID = re.compile(rb'"event_id": ?"[0-9a-f-]{36}"')


@dataclass(frozen=True)
class Model:
    """照着来的那一个：它的运行、业务日、导入，与它在流里的四条消息（主题与正文）。"""

    run_id: str
    day: date
    import_id: UUID
    messages: tuple[tuple[str, bytes], ...]


async def read_model(engine: sa.Engine, connection: JetStreamConnection, import_id: UUID, day: date) -> Model:
    with engine.connect() as database:
        run_id = database.exec_driver_sql("SELECT run_id FROM dagster.runs ORDER BY id DESC LIMIT 1").scalar_one()
    state = await stream_state(connection, EVENTS_STREAM)
    last = state.last_seq if state else 0
    messages = [
        (message.subject, message.data)
        async for batch in read_stored(connection, EVENTS_STREAM, Stretch(1, last))
        for message in batch
    ]
    return Model(run_id, day, import_id, tuple(messages))


def begin(engine: sa.Engine, first_day: date) -> None:
    """监听器像是从那时起就看着导入；记下每个分区最新的运行该是哪个。"""
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE etl.import_watches SET watched_from = :at"), {"at": _midnight(first_day)})
        connection.exec_driver_sql("CREATE TABLE public.expected (day date PRIMARY KEY, run_id text NOT NULL)")


def add_day(engine: sa.Engine, model: Model, today: date, imports: int) -> list[tuple[UUID, UUID]]:
    """那一天的导入、运行与记录；返回 (import_id, event_id)。十个里七个是当天的，两个是昨天的，一个是两个月里的哪一天。"""
    given = {"at": _midnight(today), "today": today, "imports": imports, "run": model.run_id, "day": str(model.day)}
    with engine.begin() as connection:
        for statement in _DAY:
            text = sa.text(statement)
            connection.execute(text, {name: given[name] for name in text.compile().params})
        return [(row.import_id, row.event_id) for row in connection.execute(sa.text("SELECT * FROM simulated"))]


async def publish_day(connection: JetStreamConnection, model: Model, imports: list[tuple[UUID, UUID]]) -> int:
    """那一天的导入事件与完成事件；返回此后的序号。"""
    messages = [
        (subject, data.replace(str(model.import_id).encode(), str(import_id).encode()), event_id)
        for import_id, event_id in imports
        for subject, data in model.messages
    ]
    for first in range(0, len(messages), _AT_ONCE):
        await asyncio.gather(*(_publish(connection, *message) for message in messages[first : first + _AT_ONCE]))
    state = await stream_state(connection, EVENTS_STREAM)
    return state.last_seq + 1 if state else 0


async def _publish(connection: JetStreamConnection, subject: str, data: bytes, event_id: UUID) -> None:
    identity = event_id if subject == DATA_IMPORT_COMPLETED else uuid4()
    data = _EVENT_ID.sub(b'"event_id": "%s"' % str(identity).encode(), data, count=1)
    await connection.publish(subject, data, message_id=str(identity))


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def vacuum(engine: sa.Engine) -> None:
    """一天里 autovacuum 也会做的。"""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")


def table_sizes(engine: sa.Engine) -> dict[str, tuple[int, int]]:
    """每张表的字节（连同索引与大字段）与行数。"""
    with engine.connect() as connection:
        rows: Any = connection.exec_driver_sql("""
            SELECT n.nspname || '.' || c.relname, pg_total_relation_size(c.oid), c.reltuples::bigint
            FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind = 'r' AND n.nspname IN ('dagster', 'etl')""").all()
    return {name: (size, rows) for name, size, rows in rows}


_DAY = (
    """CREATE TEMPORARY TABLE simulated ON COMMIT DROP AS
       SELECT n, gen_random_uuid() AS import_id, gen_random_uuid() AS event_id, gen_random_uuid()::text AS run_id,
              CAST(:today AS date) - CASE WHEN n % 10 < 7 THEN 0 WHEN n % 10 < 9 THEN 1 ELSE 2 + (n * 37) % 60 END AS day,
              CAST(:at AS timestamptz) + n * interval '1 day' / :imports AS at
       FROM generate_series(1, :imports) n""",
    """INSERT INTO import_tasks (import_id, source_name, status, row_count, created_at, completed_at)
       SELECT import_id, 'simulated', 'completed', 1, at, at FROM simulated""",
    """INSERT INTO etl.import_events (target, import_id, event_id, handled_at, stream_sequence)
       SELECT 'public', import_id, event_id, at, 1 FROM simulated""",
    """INSERT INTO etl.import_requests (target, import_id, day, revision) SELECT 'public', import_id, day, 1 FROM simulated""",
    """INSERT INTO etl.ledger (target, asset, day, requested, materialized, requested_at, materialized_at, run_id)
       SELECT DISTINCT ON (day, asset) 'public', asset, day, 1, 1, at, at, run_id
       FROM simulated, unnest(ARRAY['orders', 'customers', 'leads']) asset ORDER BY day, asset, at DESC
       ON CONFLICT (target, asset, day) DO UPDATE SET materialized_at = excluded.materialized_at, run_id = excluded.run_id""",
    """INSERT INTO public.expected SELECT DISTINCT ON (day) day, run_id FROM simulated ORDER BY day, n DESC
       ON CONFLICT (day) DO UPDATE SET run_id = excluded.run_id""",
    """INSERT INTO dagster.runs (run_id, snapshot_id, pipeline_name, status, run_body, partition, partition_set, create_timestamp,
                                 update_timestamp, start_time, end_time)
       SELECT s.run_id, m.snapshot_id, m.pipeline_name, m.status, replace(replace(m.run_body, m.run_id, s.run_id), :day, s.day::text),
              s.day::text, m.partition_set, s.at AT TIME ZONE 'UTC', s.at AT TIME ZONE 'UTC',
              extract(epoch FROM s.at), extract(epoch FROM s.at)
       FROM simulated s, dagster.runs m WHERE m.run_id = :run ORDER BY s.n""",
    """INSERT INTO dagster.run_tags (run_id, key, value) SELECT s.run_id, key, replace(value, :day, s.day::text)
       FROM simulated s, dagster.run_tags m WHERE m.run_id = :run ORDER BY s.n, m.id""",
    # 编号先占好：检查要指着它的物化
    """CREATE TEMPORARY TABLE numbered ON COMMIT DROP AS
       SELECT s.n, s.run_id, s.day, s.at, m.id AS model_id, nextval('dagster.event_logs_id_seq') AS id
       FROM simulated s, (SELECT id FROM dagster.event_logs WHERE run_id = :run ORDER BY id) m ORDER BY s.n, m.id""",
    """INSERT INTO dagster.event_logs (id, run_id, event, dagster_event_type, timestamp, step_key, asset_key, partition)
       SELECT e.id, e.run_id, replace(replace(m.event, m.run_id, e.run_id), :day, e.day::text), m.dagster_event_type,
              e.at AT TIME ZONE 'UTC', m.step_key, m.asset_key, CASE WHEN m.partition IS NOT NULL THEN e.day::text END
       FROM numbered e JOIN dagster.event_logs m ON m.id = e.model_id ORDER BY e.id""",
    """INSERT INTO dagster.asset_event_tags (event_id, asset_key, key, value, event_timestamp)
       SELECT e.id, t.asset_key, t.key, t.value, e.at AT TIME ZONE 'UTC'
       FROM numbered e JOIN dagster.asset_event_tags t ON t.event_id = e.model_id ORDER BY e.id""",
    """INSERT INTO dagster.asset_check_executions (asset_key, check_name, partition, run_id, execution_status, evaluation_event,
              evaluation_event_timestamp, evaluation_event_storage_id, materialization_event_storage_id, create_timestamp)
       SELECT m.asset_key, m.check_name, e.day::text, e.run_id, m.execution_status,
              replace(replace(m.evaluation_event, m.run_id, e.run_id), :day, e.day::text), e.at AT TIME ZONE 'UTC', e.id,
              made.id, e.at AT TIME ZONE 'UTC'
       FROM dagster.asset_check_executions m JOIN numbered e ON e.model_id = m.evaluation_event_storage_id
       JOIN numbered made ON made.model_id = m.materialization_event_storage_id AND made.run_id = e.run_id
       WHERE m.run_id = :run ORDER BY e.id, m.id""",
    # 一个传感器一分钟看一次，两个定时一天一次
    """INSERT INTO dagster.job_ticks (job_origin_id, selector_id, status, type, timestamp, tick_body, create_timestamp)
       SELECT name, name, 'SKIPPED', kind, at, repeat('x', 900), at
       FROM (VALUES ('overdue_days', 'SENSOR', 1440), ('yesterday_again', 'SCHEDULE', 1), ('tables_checked', 'SCHEDULE', 1))
            AS ticking (name, kind, times),
            LATERAL (SELECT (CAST(:at AS timestamptz) AT TIME ZONE 'UTC') + n * interval '1 day' / times AS at
                     FROM generate_series(1, times) n) moments""",
)
