"""NATS 弄丢了它答应存下的：流被删、被清空、重建后序号更小、退回旧的快照，都在负载当中；一个导入也不丢，一行也不错，不用人管。"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.events.publish import EventPublisher
from bridge.events.streams import events_stream
from bridge.jetstream.connection import JetStreamConnection
from bridge.nats_names import EVENTS_STREAM, TASKS_STREAM
from bridge.queue.streams import task_streams
from bridge.settings import BridgeSettings
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import RawData
from tests.chaos.installation import ROLES, Installation, running_installation
from tests.chaos.lost_messages import WAYS, Application, Victim
from tests.chaos.verdict import held_days
from tests.integration.conftest import NatsServer

SEEDS = (1, 2, 3)
PATIENCE_SECONDS = 120
EARLY = {"ETL_UNANNOUNCED_AFTER_SECONDS": "2", "ETL_EVENT_RETRY_DELAY_MAX_SECONDS": "5"}
PAUSE_SECONDS = 0.15
# 台账没有管的导入，或者管了以后又变了的
NOT_HANDLED = sa.text("""
    SELECT t.import_id, t.status, e.import_status FROM import_tasks t
    LEFT JOIN etl.import_events e ON e.import_id = t.import_id
    WHERE e.import_status IS DISTINCT FROM t.status""")


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def installation(
    postgres_url: str, database_template: str, nats: NatsServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """一套给全部的灾难：每次之后都要回到安静，下一次从那里接着。"""
    commands = {role: [sys.executable, "-m", "bridge.cli.main", role] for role in ROLES}
    with (
        cloned_database(postgres_url, database_template) as url,
        running_installation(
            tmp_path_factory.mktemp("installation"),
            database_url=url,
            nats_url=nats.url,
            commands=commands,
            reroute=lambda environment: environment | EARLY,
        ) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def raw_data(installation: Installation) -> RawData:
    return RawData(installation.engine)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stream", [EVENTS_STREAM, TASKS_STREAM])
@pytest.mark.parametrize("way", WAYS)
def test_stream_that_lost_its_messages_in_mid_load_loses_no_import(
    installation: Installation,
    raw_data: RawData,
    nats: NatsServer,
    tmp_path: Path,
    is_deep: bool,
    way: str,
    stream: str,
) -> None:
    pids = {role: process.pid for role, process in installation.processes.items()}
    settings = BridgeSettings(nats_url=nats.url)
    configs = {str(config.name): config for config in (events_stream(settings), *task_streams(settings))}
    for seed in SEEDS if is_deep else SEEDS[:1]:
        chance = random.Random(f"{way} {stream} {seed}")  # noqa: S311  # 不关安全

        async def live_through(chance: random.Random = chance) -> None:
            async with (
                EventPublisher(settings) as publisher,
                JetStreamConnection(settings, name="test") as connection,
            ):
                victim = Victim(stream, configs[stream], nats, connection, tmp_path)
                application = Application(raw_data, publisher, chance)
                steps = 60 if is_deep else 18
                snapshot_at, harm_at = sorted(chance.sample(range(2, steps - 2), 2))
                for step in range(steps):
                    if step == snapshot_at:
                        await victim.take_snapshot()
                    if step == harm_at:
                        await WAYS[way](victim)
                    await application.act()
                    await asyncio.sleep(chance.uniform(0, 2 * PAUSE_SECONDS))
                await application.finish()

        asyncio.run(live_through())
        installation.eventually(
            lambda: not not_handled(installation) and installation.is_quiet(),
            f"seed {seed}: not all is done",
            timeout_seconds=PATIENCE_SECONDS,
        )
        assert held_days(installation.engine) == [], f"seed {seed}"
        assert find_differences(installation.engine, installation.settings) == [], f"seed {seed}"
    assert installation.unfinished_runs() == []
    assert {role: process.pid for role, process in installation.processes.items()} == pids


def not_handled(installation: Installation) -> list[tuple[object, ...]]:
    with installation.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(NOT_HANDLED)]
