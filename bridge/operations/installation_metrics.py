"""指标：一套安装此刻的样子，由 PostgreSQL 与 NATS 说；有人来取才问，问得不多，也不久等。"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import sqlalchemy as sa
from prometheus_client import Metric as Family
from prometheus_client.core import GaugeMetricFamily

from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import stream_use
from bridge.nats_names import EVENTS_DLQ_STREAM, EVENTS_STREAM, TASKS_DLQ_STREAM, TASKS_STREAM
from bridge.operations.queues import read_queue_states
from bridge.settings import BridgeSettings
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.log import RepeatedWarning, get_logger, redact
from etl_assets.core.metrics import Metric
from etl_assets.core.settings import EtlSettings
from etl_assets.reports import reports

logger = get_logger(__name__)

_CONNECT_SECONDS, _STATEMENT_SECONDS, _NATS_SECONDS = 2, 3, 4.0
"""加起来不到 Prometheus 缺省等的十秒。"""

_ASSET: Mapping[str, tuple[str, ...]] = {"asset": ()}
INSTALLATION = (
    Metric("gauge", "etl_build_info", "Always 1; the version of the process that serves the metrics.", {"version": ()}),
    Metric("gauge", "etl_database_up", "1 if PostgreSQL answered this scrape, else 0."),
    Metric("gauge", "etl_nats_up", "1 if NATS answered this scrape, else 0."),
    Metric("gauge", "etl_partitions_due", "Days that are to be made and not held.", _ASSET),
    Metric("gauge", "etl_partitions_waiting_to_retry", "Due days that wait after a failure.", _ASSET),
    Metric("gauge", "etl_partitions_held", "Days that are not tried again until somebody asks for them.", _ASSET),
    Metric("gauge", "etl_lag_seconds", "How long the longest waiting due day has waited; 0 if none is due.", _ASSET),
    Metric("gauge", "etl_last_materialized_timestamp_seconds", "When a day was materialized last, Unix time.", _ASSET),
    Metric("gauge", "etl_runs_in_progress", "Runs that hold a live lease."),
    Metric("gauge", "etl_events_waiting", "Events that wait in the ledger for their import."),
    Metric("gauge", "etl_outbox_events", "Completion events that are not published yet."),
    Metric("gauge", "etl_outbox_events_set_aside", "Completion events that could not be published."),
    Metric("gauge", "etl_recent_rejected_rows", "Rules of the newest 1,000 rejected rows.", {"rule": ()}),
    Metric("gauge", "etl_database_connections", "Connections of all processes to this database.", {"state": ()}),
    Metric("gauge", "etl_database_connections_limit", "max_connections of the server."),
    Metric(
        "gauge",
        "etl_queue_messages",
        "Messages of a queue: waiting, or taken and not acknowledged.",
        {"queue": (), "state": ("waiting", "in_progress")},
    ),
    Metric(
        "gauge",
        "etl_queue_takers",
        "Requests for messages that wait now, plus messages being worked on: 0 for a minute is nobody.",
        {"queue": ()},
    ),
    Metric(
        "gauge",
        "etl_stream_messages",
        "Messages in a stream; of EVENTS_DLQ and TASKS_DLQ, dead letters.",
        {"stream": ()},
    ),
    Metric("gauge", "etl_stream_fill_ratio", "How full a stream is, 0 to 1; without a limit 0.", {"stream": ()}),
)


@dataclass
class Seen:
    """看到的：指标的名字 → 标签的值 → 数。"""

    values: dict[str, dict[tuple[str, ...], float]] = field(default_factory=lambda: defaultdict(dict))

    def set(self, name: str, value: float, *labels: str) -> None:
        self.values[name][labels] = value

    def families(self) -> Iterator[Family]:
        """没有看到的不说；说成零，就是没有到期的、没有死信。"""
        for metric in INSTALLATION:
            family = GaugeMetricFamily(metric.name, metric.help, labels=list(metric.labels))
            for labels, value in self.values.get(metric.name, {}).items():
                family.add_metric(labels, value)
            yield family


class InstallationMetrics:
    """prometheus_client 的收集器。几个人同时来取，一个一个地问。"""

    def __init__(self, settings: Callable[[], tuple[EtlSettings, BridgeSettings]]) -> None:
        """:param settings: 每次来取时的设置：栈的地址要到它起来才有。"""
        self._settings = settings
        self._engines: dict[str, sa.Engine] = {}
        self._lock = threading.Lock()
        self._cannot_read = RepeatedWarning(logger, "cannot read for the metrics now")

    def collect(self) -> Iterable[Family]:
        seen = Seen()
        seen.set("etl_build_info", 1, version("dayline"))
        with self._lock:
            settings, bridge_settings = self._settings()
            seen.set("etl_database_up", self._succeeds(lambda: self._ask_database(settings, seen)))
            seen.set("etl_nats_up", self._succeeds(lambda: asyncio.run(_ask_nats(bridge_settings, seen))))
        return list(seen.families())

    def _succeeds(self, read: Callable[[], None]) -> bool:
        try:
            read()
        except Exception as error:  # noqa: BLE001  # 一边不在，别的照样给出
            self._cannot_read.say(type(error).__name__, error=redact(str(error)))
            return False
        return True

    def _ask_database(self, settings: EtlSettings, seen: Seen) -> None:
        transact(self._engine(settings), read_database_state, settings, seen)

    def _engine(self, settings: EtlSettings) -> sa.Engine:
        """自己的一个连接，不久等；栈的地址换了就换。"""
        if settings.database_url not in self._engines:
            for old in self._engines.values():
                old.dispose()
            own = settings.model_copy(
                update={
                    "pool_size": 1,
                    "connect_timeout_seconds": _CONNECT_SECONDS,
                    "statement_timeout_seconds": _STATEMENT_SECONDS,
                    "lock_timeout_seconds": _STATEMENT_SECONDS,
                }
            )
            self._engines = {settings.database_url: build_engine(own, longest_wait_seconds=_STATEMENT_SECONDS)}
        return self._engines[settings.database_url]


def read_database_state(connection: sa.Connection, settings: EtlSettings, seen: Seen) -> None:
    """台账、租约、发件箱、连接；语句是 `etl status` 的。"""
    now = connection.execute(_NOW).scalar_one()
    for row in reports.ledger_summary(connection, settings):
        since, last = row["oldest_due_since"], row["last_materialized_at"]
        seen.set("etl_partitions_due", row["due"], row["asset"])
        seen.set("etl_partitions_waiting_to_retry", row["waiting_to_retry"], row["asset"])
        seen.set("etl_partitions_held", row["held"], row["asset"])
        seen.set("etl_lag_seconds", (now - since).total_seconds() if since else 0.0, row["asset"])
        if last:
            seen.set("etl_last_materialized_timestamp_seconds", last.timestamp(), row["asset"])
    seen.set("etl_runs_in_progress", len(reports.running_leases(connection, settings)))
    seen.set("etl_events_waiting", reports.count_waiting_events(connection, settings).events)
    seen.set("etl_outbox_events", reports.unpublished_events(connection))
    seen.set("etl_outbox_events_set_aside", reports.set_aside_events(connection).events)
    for row in reports.rejected_by_rule(connection, settings):
        seen.set("etl_recent_rejected_rows", row["rows"], row["rule"])
    for state, count in connection.execute(_CONNECTIONS).tuples():
        seen.set("etl_database_connections", count, state)
    seen.set("etl_database_connections_limit", int(connection.execute(_CONNECTIONS_LIMIT).scalar_one()))


_NOW = sa.text("SELECT clock_timestamp()")
# 没有权限看的别人的会话，state 是 NULL
_CONNECTIONS = sa.text("""
    SELECT coalesce(state, 'unknown'), count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() GROUP BY 1""")
_CONNECTIONS_LIMIT = sa.text("SELECT current_setting('max_connections')")


async def read_nats_state(connection: JetStreamConnection, seen: Seen) -> None:
    """队列、流、死信。"""
    for queue, info in (await read_queue_states(connection)).items():
        waiting, in_progress, requests = info.num_pending or 0, info.num_ack_pending or 0, info.num_waiting or 0
        seen.set("etl_queue_messages", waiting, queue, "waiting")
        seen.set("etl_queue_messages", in_progress, queue, "in_progress")
        seen.set("etl_queue_takers", requests + in_progress, queue)
    own_name = connection.settings.own_name
    for stream in (EVENTS_STREAM, EVENTS_DLQ_STREAM, own_name(TASKS_STREAM), own_name(TASKS_DLQ_STREAM)):
        if use := await stream_use(connection, stream):
            seen.set("etl_stream_messages", use.messages, stream)
            seen.set("etl_stream_fill_ratio", use.share, stream)


async def _ask_nats(settings: BridgeSettings, seen: Seen) -> None:
    own = settings.model_copy(update={"connect_timeout_seconds": _CONNECT_SECONDS})
    async with asyncio.timeout(_NATS_SECONDS), JetStreamConnection(own, name="metrics") as connection:
        await read_nats_state(connection, seen)
