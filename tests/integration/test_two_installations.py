"""正式的一套与影子的一套用同一台 NATS：事件两边都收到，任务各归各的，互不把对方的完成事件当成别的 ETL 的。"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from bridge.events import DataImportCompleted, EtlCompleted, EventPublisher, handlers
from bridge.events.event_task_utils import Decision, Done, ReceivedEvent, event_task_handler
from bridge.events.listener import Listener
from bridge.events.subjects import DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.operations.queues import read_queue_depths
from bridge.queue.broker import SafeJetStreamBroker
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.graph import write_graph
from etl_assets.ledger.outbox import installation_id
from tests.the_three import graph

from .conftest import NatsServer


class Installation:
    """一套安装：监听器记下收到的导入，敲自己的门铃。"""

    def __init__(self, nats_url: str, schema: str) -> None:
        self.settings = BridgeSettings(nats_url=nats_url, target_schema=schema)
        self.broker = SafeJetStreamBroker(self.settings)
        self.received: list[UUID] = []
        self.stop = asyncio.Event()

        @event_task_handler(subject=DATA_IMPORT_COMPLETED, event_type=DataImportCompleted, task_name="task")
        async def remember(events: Sequence[ReceivedEvent[DataImportCompleted]]) -> Sequence[Decision]:
            self.received += [received.event.import_id for received in events]
            return [Done() for _ in events]

        self._listener = Listener(self.settings, handlers=[remember], ring=self.broker.ring)

    async def __aenter__(self) -> Installation:
        self.broker.is_worker_process = True
        await self.broker.startup()
        self._running = asyncio.create_task(self._listener.run(self.stop))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop.set()
        await self._running
        await self.broker.shutdown()

    async def depths(self) -> dict[str, int | None]:
        return {row["queue"]: row["waiting"] for row in await read_queue_depths(self.settings)}


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_both_get_every_event_and_each_rings_its_own_workers(nats_server: NatsServer) -> None:
    import_ids = [uuid4() for _ in range(20)]
    async with (
        Installation(nats_server.url, "public") as main,
        Installation(nats_server.url, "Shadow 影.1") as shadow,
        EventPublisher(main.settings) as publisher,
    ):
        for import_id in import_ids:
            await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
        await eventually(lambda: len(main.received) >= 20 and len(shadow.received) >= 20)
        assert sorted(main.received) == sorted(shadow.received) == sorted(import_ids)
        before = await shadow.depths()
        await main.broker.ring("task", "interactive")
        depths = await main.depths()
        assert depths["TASKS.interactive"] == 1
        assert (await shadow.depths())[f"{shadow.settings.own_name('TASKS')}.interactive"] == 0
        assert before.keys() & depths.keys() == {"EVENTS", "EVENTS_DLQ"}


@pytest.mark.parametrize(
    ("schema", "name"),
    [("public", "TASKS"), ("shadow", "TASKS-shadow"), ("DLQ", "TASKS-DLQ")],
)
def test_names_tell_the_schema(schema: str, name: str) -> None:
    assert BridgeSettings(target_schema=schema).own_name("TASKS") == name


def test_names_that_differ_only_in_what_nats_forbids_stay_apart() -> None:
    schemas = ["a.b", "a b", "a>b", "a_b", "影", "子", "x" * 63, "x" * 62 + "y"]
    names = {BridgeSettings(target_schema=schema).own_name("TASKS") for schema in schemas}
    assert len(names) == len(schemas)
    assert all(name.replace("-", "").replace("_", "").isalnum() and name.isascii() and len(name) < 64 for name in names)


@pytest.mark.parametrize(
    ("own", "extra", "asks"),
    [
        ("public", {}, True),
        ("shadow", {}, True),
        ("public", {"target": "public"}, True),
        ("public", {"target": "shadow"}, False),
        ("shadow", {"target": "public"}, False),
        ("public", {"target": "public", "installation": "own"}, False),
    ],
)
async def test_completion_asks_only_those_whose_schema_it_wrote(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    extra: dict[str, str],
    asks: bool,
) -> None:
    """没有 target 的是旧系统的，它不知道影子：谁都当真，多做一次无妨。"""
    if "installation" in extra:
        with engine.connect() as connection:
            extra = extra | {"installation": str(installation_id(connection))}
    with engine.begin() as transaction:
        write_graph(transaction, own, graph)
    monkeypatch.setattr(handlers, "get_engine", lambda: engine)
    monkeypatch.setattr(handlers, "get_settings", lambda: etl_settings.model_copy(update={"target_schema": own}))
    event = EtlCompleted.model_validate({"status": "success", "partitions": ["2026-01-05"], "run_id": "r"} | extra)
    received = ReceivedEvent(event, ORDERS_ETL_COMPLETED, 1, event.occurred_at, 1)
    assert await handlers.on_etl_completed("orders")([received]) == [Done(ring=asks)]
    with engine.connect() as connection:
        due = connection.scalars(sa.select(ledger.c.target).where(ledger.c.requested > ledger.c.materialized)).all()
    assert due == ([own] if asks else [])
