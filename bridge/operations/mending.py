"""`etl doctor --fix`：修起来不会弄坏什么的，问过就修。"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa

from bridge.events.envelope import DataImportCompleted
from bridge.events.handlers import handlers_of
from bridge.events.publish import EventPublisher
from bridge.events.streams import ensure_event_streams
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.queue.broker import SafeJetStreamBroker
from bridge.settings import BridgeSettings
from etl_assets.core.database_sync import transact
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.graph import read_graph
from etl_assets.reports import health
from etl_assets.reports.index_building import create_indexes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Installation:
    engine: sa.Engine
    settings: EtlSettings
    bridge_settings: BridgeSettings


@dataclass(frozen=True)
class Mending:
    """:param question: 先问的那一句。
    :param mend: 修，说做了什么。
    """

    question: str
    mend: Callable[[Installation, Say], None]


def _build_indexes(of: Installation, say: Say) -> None:
    built = create_indexes(of.engine, of.settings, say)
    say(f"built {built} indexes")


def _ensure_streams(of: Installation, say: Say) -> None:
    graph = transact(of.engine, read_graph, of.settings.target_schema)

    async def ensure() -> None:
        subjects = [handler.subject for handler in handlers_of(graph)]
        broker = SafeJetStreamBroker(of.bridge_settings)
        await broker.startup()  # 任务的流与每条车道的消费者
        try:
            await ensure_event_streams(broker.connection, of.bridge_settings, subjects)
        finally:
            await broker.shutdown()

    asyncio.run(ensure())
    say("the streams and their consumers are there, with the settings that matter")


def _announce(of: Installation, say: Say) -> None:
    silent = transact(of.engine, health.unannounced_imports, of.settings)

    async def announce() -> None:
        async with EventPublisher(of.bridge_settings) as publisher:
            for import_id in silent:
                await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=UUID(import_id)))

    asyncio.run(announce())
    say(f"announced {len(silent)} imports")


MENDINGS: Mapping[str, Mending] = {
    "indexes": Mending("Build the missing indexes (CREATE INDEX CONCURRENTLY, nobody is locked out)?", _build_indexes),
    "streams": Mending("Create the missing streams and consumers, and set right what differs?", _ensure_streams),
    "announcements": Mending(f"Publish {DATA_IMPORT_COMPLETED} for each of these imports?", _announce),
}
