"""进程旁边的活没有一件会无声地结束：错写进日志与 etl.troubles，`etl status` 与 `etl doctor` 说得出来，它又起来了。"""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog
from click.testing import CliRunner

from bridge import side_tasks
from bridge.cli.status import status_command
from bridge.events.due_bell import DueBell
from bridge.operations.doctor import _side_tasks
from bridge.queue.broker import SafeJetStreamBroker
from bridge.runs import reconciler
from bridge.runs.reconciler import reconcile
from bridge.settings import BridgeSettings
from bridge.side_tasks import supervised
from etl_assets.core.backoff import Backoff
from etl_assets.core.etl_tables import troubles
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.troubles import note_trouble, recent_troubles
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands
from .conftest import NatsServer
from .warm_runs import announce


@pytest.fixture(autouse=True)
def short_pauses(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_tasks, "RESTART", Backoff(first_seconds=0.01, longest_seconds=60))
    monkeypatch.setattr(side_tasks, "get_engine", lambda: engine)


async def test_task_that_ends_or_fails_is_written_down_and_started_again(engine: sa.Engine) -> None:
    starts: list[int] = []
    alive = asyncio.Event()

    async def work() -> None:
        starts.append(1)
        if len(starts) == 1:
            raise KeyError("unknown asset")
        if len(starts) == 2:
            return
        alive.set()
        await asyncio.Event().wait()

    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(supervised("publish", work))
        await asyncio.wait_for(alive.wait(), 10)
        task.cancel()
        await asyncio.wait([task])
    assert [(line["log_level"], line["task"], line["error"]) for line in logs] == [
        ("error", "publish", "KeyError: 'unknown asset'"),
        ("error", "publish", "it ended without an error"),
    ]
    with engine.connect() as connection:
        (trouble,) = recent_troubles(connection)
    assert (trouble["task"], trouble["times"], trouble["message"]) == ("publish", 2, "it ended without an error")
    (finding,) = _side_tasks(engine)
    assert finding.state == "error"
    assert finding.says.startswith("'publish' of process@")
    assert "ended 2 times" in finding.says


async def test_task_in_which_something_else_was_cancelled_is_started_again() -> None:
    """等着的东西被别人取消了（客户端关掉时 NATS 就这样做），不是要这件活停下。"""
    starts: list[int] = []
    alive = asyncio.Event()

    async def work() -> None:
        starts.append(1)
        if len(starts) == 1:
            waiting = asyncio.get_running_loop().create_future()
            waiting.cancel()
            await waiting
        alive.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(supervised("publish", work))
    await asyncio.wait_for(alive.wait(), 10)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


def test_status_shows_the_troubles_of_the_last_hour(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine.begin() as connection:
        note_trouble(connection, process="listener@here", task="publish", message="KeyError: 'unknown asset'")
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(
        monkeypatch, engine=engine, settings=etl_settings, bridge_settings=BridgeSettings(nats_url=nats_server.url)
    )
    printed, as_json = (CliRunner().invoke(status_command, arguments) for arguments in ([], ["--json"]))
    assert "listener@here" in printed.output
    (trouble,) = json.loads(as_json.output)["troubles"]
    assert (trouble["process"], trouble["task"], trouble["message"]) == (
        "listener@here",
        "publish",
        "KeyError: 'unknown asset'",
    )


async def test_task_goes_on_though_its_trouble_cannot_be_written_down(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE etl.troubles")
    starts: list[int] = []

    async def work() -> None:
        starts.append(1)
        raise KeyError("unknown asset")

    task = asyncio.create_task(supervised("publish", work))
    async with asyncio.timeout(10):
        while len(starts) < 3:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.wait([task])


async def test_task_that_was_told_to_stop_ends_without_a_word(engine: sa.Engine) -> None:
    stop = asyncio.Event()

    async def work() -> None:
        stop.set()

    await asyncio.wait_for(supervised("publish", work, stop=stop), 10)
    with engine.connect() as connection:
        assert recent_troubles(connection) == []


def test_old_troubles_disappear_and_secrets_and_long_texts_are_not_kept(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        note_trouble(connection, process="worker@a", task="old", message="it was")
        connection.execute(sa.update(troubles).values(last_at=sa.func.now() - timedelta(hours=2)))
        note_trouble(
            connection, process="worker@a", task="new", message="postgresql://etl:s3cret@db/x\0 " + "x" * 5_000
        )
        (recent,) = recent_troubles(connection)
        connection.execute(
            sa.update(troubles).where(troubles.c.task == "old").values(last_at=sa.func.now() - timedelta(days=2))
        )
        note_trouble(connection, process="worker@a", task="new", message="again")
        assert connection.scalars(sa.select(troubles.c.task)).all() == ["new"]
    assert recent["message"].startswith("postgresql://etl:***@db/x\ufffd xxx")
    assert len(recent["message"]) == 500


async def test_doorbell_is_rung_again_though_the_outbox_cannot_be_published(
    raw_data: RawData,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """监听器旁边的对账：一件事出了谁也没料到的错，不耽误另一件，自己也还在试。"""
    published: list[int] = []

    async def publish(*_arguments: object) -> int:
        published.append(1)
        raise KeyError("unknown asset")

    monkeypatch.setattr(reconciler, "publish_outbox", publish)
    monkeypatch.setattr(reconciler, "INTERVAL_SECONDS", 0.05)
    announce(engine, etl_settings, raw_data.add_import([{}]))
    broker = SafeJetStreamBroker(BridgeSettings(nats_url=nats_server.url))
    await broker.startup()
    stop = asyncio.Event()
    bell = DueBell(broker, engine, etl_settings)
    reconciling = asyncio.create_task(reconcile(stop, bell))
    try:
        async with asyncio.timeout(10):
            while len(published) < 2 or not (await broker.lane_depths())["event"]:
                await asyncio.sleep(0.02)
    finally:
        stop.set()
        await asyncio.wait_for(reconciling, 10)
        await broker.shutdown()
    with engine.connect() as connection:
        assert [trouble["task"] for trouble in recent_troubles(connection)] == ["publish completion events"]
