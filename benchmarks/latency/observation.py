"""一个事件的各个时刻，取自系统自己留下的记录；都在一台机器上，同一个钟。"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa
from nats.aio.msg import Msg

from benchmarks.dagster.stock import SCHEMA as STOCK_SCHEMA
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED, LEADS_ETL_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.nats_names import EVENTS_STREAM
from bridge.stack.dagster_home import DAGSTER_SCHEMA
from etl_assets.core.etl_tables import leases, ledger

POLL_SECONDS = 0.01
_TIMEOUT_SECONDS = 120.0
Found = TypeVar("Found")


@dataclass(frozen=True)
class Observation:
    """一个事件，时刻是 Unix 秒，按发生的次序，与做它的工人；stored 由流记下，rung 与 announced 是门铃、leads 的完成事件到达旁听者。

    claimed 是租约的 acquired_at，created 是运行的 create_timestamp，requested 与三个 materialized 来自台账（在各自的事务里、
    提交之前），succeeded 是 Dagster 的成功事件；seen 是每 10 毫秒看一眼的客户端看见运行 SUCCESS。
    """

    published: float
    stored: float
    requested: float
    rung: float
    claimed: float
    created: float
    orders: float
    customers: float
    leads: float
    succeeded: float
    seen: float
    announced: float
    worker_pid: int


class Bystander:
    """旁听门铃与 leads 的完成事件：到达的时刻。普通的订阅，不动两个流。"""

    def __init__(self) -> None:
        self._rung: list[float] = []
        self._announced: dict[str, float] = {}

    async def listen(self, connection: JetStreamConnection) -> None:
        await connection.client.subscribe("tasks.event", cb=self._note_doorbell)
        await connection.client.subscribe(LEADS_ETL_COMPLETED, cb=self._note_completion)

    def first_doorbell_after(self, moment: float) -> float | None:
        return min((rung for rung in self._rung if rung > moment), default=None)

    def announced_at(self, run_id: str) -> float | None:
        return self._announced.get(run_id)

    async def _note_doorbell(self, _message: Msg) -> None:
        self._rung.append(time.time())

    async def _note_completion(self, message: Msg) -> None:
        self._announced[json.loads(message.data)["run_id"]] = time.time()


async def publish_and_observe(
    engine: sa.Engine,
    publisher: EventPublisher,
    nats: JetStreamConnection,
    bystander: Bystander,
    import_id: UUID,
    day: date,
) -> Observation:
    """发一个事件，等它的运行成功，收集各个时刻。"""
    with watching(engine) as connection:
        published = time.time()
        placed = await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
        await asyncio.to_thread(_until_found, lambda: bystander.first_doorbell_after(published))
        run_id, claimed, worker_pid = await asyncio.to_thread(
            _until_found, lambda: _read_lease(connection, day, published)
        )
        seen = await asyncio.to_thread(_until_found, lambda: _seen_succeeded(connection, run_id))
        moments = await asyncio.to_thread(_read_moments, connection, run_id, day)
    rung = bystander.first_doorbell_after(moments["requested"])
    if rung is None:
        raise RuntimeError(f"no doorbell was heard for the event of {day}")
    return Observation(
        published=published,
        stored=await _stored_at(nats, placed.sequence),
        rung=rung,
        claimed=claimed,
        seen=seen,
        announced=await asyncio.to_thread(_until_found, lambda: bystander.announced_at(run_id)),
        worker_pid=worker_pid,
        **moments,
    )


@contextmanager
def watching(engine: sa.Engine) -> Iterator[sa.Connection]:
    """一条一直开着、一眼一条语句的连接：看得勤，也不占多少 CPU。"""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        yield connection


def wait_for_stock(engine: sa.Engine, day: date) -> float:
    """原样的 Dagster 做完这一天（它只做一次）：看见运行 SUCCESS 的时刻。"""
    runs = sa.table("runs", sa.column("status"), sa.column("partition"), schema=STOCK_SCHEMA)
    wanted = sa.select(runs.c.status).where(runs.c.partition == day.isoformat())
    with watching(engine) as connection:
        return _until_found(lambda: _seen(connection, wanted))


def _until_found(look: Callable[[], Found | None]) -> Found:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing for {_TIMEOUT_SECONDS:g} s: look into the logs of the stack")
        time.sleep(POLL_SECONDS)
    return found


def _read_lease(connection: sa.Connection, day: date, published: float) -> tuple[str, float, int] | None:
    """做这一天的租约与它的工人，在发出之后领的：运行一结束它就不在了，所以要守着看。"""
    wanted = sa.select(leases.c.run_id, leases.c.acquired_at, leases.c.owner).where(
        leases.c.first_day <= day, leases.c.last_day >= day
    )
    row = connection.execute(wanted).first()
    if row is None or row.acquired_at.timestamp() < published:
        return None
    return row.run_id, row.acquired_at.timestamp(), int(row.owner.rpartition(":")[2])


def _seen_succeeded(connection: sa.Connection, run_id: str) -> float | None:
    runs = sa.table("runs", sa.column("status"), sa.column("run_id"), schema=DAGSTER_SCHEMA)
    return _seen(connection, sa.select(runs.c.status).where(runs.c.run_id == run_id))


def _seen(connection: sa.Connection, statuses: sa.Select[Any]) -> float | None:
    """:raises RuntimeError: 运行没有成功。"""
    status = connection.scalar(statuses)
    if status in ("FAILURE", "CANCELED"):
        raise RuntimeError(f"a run ended as {status}: look into the logs of the stack")
    return time.time() if status == "SUCCESS" else None


def _read_moments(connection: sa.Connection, run_id: str, day: date) -> dict[str, float]:
    """Dagster 的时刻没有时区，是 UTC。"""
    created = sa.text(f"SELECT create_timestamp FROM {DAGSTER_SCHEMA}.runs WHERE run_id = :run_id")
    ended = sa.text(
        f"SELECT timestamp FROM {DAGSTER_SCHEMA}.event_logs WHERE run_id = :run_id AND dagster_event_type = 'PIPELINE_SUCCESS'"
    )
    of_day = sa.select(ledger.c.asset, ledger.c.requested_at, ledger.c.materialized_at).where(
        ledger.c.target == "public", ledger.c.day == day
    )
    rows = {row.asset: row for row in connection.execute(of_day)}
    naive = {
        name: connection.execute(text, {"run_id": run_id}).scalar_one()
        for name, text in (("created", created), ("succeeded", ended))
    }
    return {
        "requested": rows["orders"].requested_at.timestamp(),
        **{name: moment.replace(tzinfo=UTC).timestamp() for name, moment in naive.items()},
        **{asset: row.materialized_at.timestamp() for asset, row in rows.items()},
    }


async def _stored_at(connection: JetStreamConnection, sequence: int) -> float:
    message = await connection.context.get_msg(EVENTS_STREAM, sequence)
    return _moment(message.time)


def _moment(given: datetime | None) -> float:
    if given is None:
        raise RuntimeError("the stream gives no time for a message: use a newer nats-server")
    return given.timestamp()


def milliseconds(observations: Sequence[Observation], first: str, last: str) -> list[float]:
    """每个事件从一个时刻到另一个的毫秒数。"""
    return [(getattr(observation, last) - getattr(observation, first)) * 1000 for observation in observations]
