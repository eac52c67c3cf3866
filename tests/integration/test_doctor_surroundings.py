"""etl doctor：数据库周围会害人的，都说出来；`--fix` 修得了的，修好了再看一遍。"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from nats.js.api import StreamConfig

from bridge.jetstream.connection import JetStreamConnection
from bridge.operations import durability
from bridge.operations.doctor import examine
from bridge.operations.findings import Finding
from bridge.settings import BridgeSettings
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.reports import surroundings
from etl_assets.testing.raw_data import RawData

from .conftest import NatsServer
from .test_doctor import Doctor, doctor, imported

__all__ = ["doctor", "imported"]  # 夹具
Look = Callable[..., dict[str, Finding]]


@pytest.fixture
def look(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path) -> Look:
    """在本进程里看一遍，没有 NATS。"""

    def run(own: sa.Engine = engine) -> dict[str, Finding]:
        nowhere = BridgeSettings(nats_url="nats://127.0.0.1:1", connect_timeout_seconds=1)
        return {finding.check: finding for finding in examine(own, etl_settings, nowhere, state_dir=tmp_path)}

    return run


def test_ordinary_surroundings_are_no_trouble(look: Look) -> None:
    found = look()
    assert found["clock"].state == "ok"
    assert not {"pooler", "row security", "statistics", "surroundings"} & found.keys()


@pytest.mark.parametrize(("hours", "said"), [(1, "3600.0 s ahead of"), (-1, "3600.0 s behind")])
def test_a_clock_that_is_off_is_said(look: Look, monkeypatch: pytest.MonkeyPatch, hours: int, said: str) -> None:
    class Shifted(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(surroundings, "datetime", Shifted)
    found = look()["clock"]
    assert (found.state, said in found.says.replace("3599.9", "3600.0")) == ("warning", True)


def test_rows_that_are_hidden_from_us_are_an_error(look: Look, engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE raw_orders ENABLE ROW LEVEL SECURITY; ALTER TABLE raw_orders FORCE ROW LEVEL SECURITY;"
            "CREATE POLICY own_shop ON raw_orders USING (shop = 'mine')"
        )
    found = look()["row security"]
    assert found.state == "error"
    assert "row-level security is on for our role on public.raw_orders" in found.says
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE POLICY all_shops ON raw_orders USING (true)")
    assert "row security" not in look()


def test_a_table_that_nobody_analyzed_is_said(look: Look, engine: sa.Engine, raw_data: RawData) -> None:
    import_id = raw_data.add_import([{}])
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE raw_orders SET (autovacuum_enabled = off)")
        connection.execute(
            sa.text(
                "INSERT INTO raw_orders (import_id, order_id, shop, customer_name, ordered_at)"
                " SELECT :import_id, n, repeat('x', 100), repeat('y', 100), now() FROM generate_series(1, 40000) n"
            ),
            {"import_id": import_id},
        )
    assert look()["statistics"].says == "never analyzed: run `ANALYZE public.raw_orders`"


@pytest.mark.parametrize(
    ("interval", "state", "said"),
    [
        ("2m", "warning", "it syncs to disk every 120 s only, a power failure loses what it has acknowledged since"),
        ("always", "ok", "it syncs each message to disk"),
    ],
)
def test_nats_that_does_not_sync_is_warned_of_where_it_can_be_seen(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interval: str,
    state: str,
    said: str,
) -> None:
    port = find_free_port()
    server = NatsServer(tmp_path, config={"http": f"127.0.0.1:{port}", "jetstream": {"sync_interval": interval}})
    server.start()
    try:
        settings = BridgeSettings(nats_url=server.url)

        def look() -> Finding:
            return {found.check: found for found in examine(engine, etl_settings, settings, state_dir=tmp_path)}[
                "nats sync"
            ]

        monkeypatch.setattr(durability, "MONITOR_PORT", port)
        seen = look()
        monkeypatch.setattr(durability, "MONITOR_PORT", find_free_port())
        unseen = look()
    finally:
        server.kill()
    assert (seen.state, seen.says.startswith(said)) == (state, True)
    assert (unseen.state, "is not to be seen from here" in unseen.says) == ("ok", True)


def test_monitoring_port_of_another_server_says_nothing_about_ours(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    tmp_path: Path,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = find_free_port()
    (tmp_path / "other").mkdir()
    other = NatsServer(tmp_path / "other", config={"http": f"127.0.0.1:{port}"})
    other.start()
    monkeypatch.setattr(durability, "MONITOR_PORT", port)
    try:
        found = examine(engine, etl_settings, BridgeSettings(nats_url=nats_server.url), state_dir=tmp_path)
        (sync,) = [each for each in found if each.check == "nats sync"]
    finally:
        other.kill()
    assert (sync.state, "is not to be seen from here" in sync.says) == ("ok", True)


async def test_stream_of_events_that_does_not_keep_the_promise_is_said(doctor: Doctor, nats_server: NatsServer) -> None:
    async with JetStreamConnection(BridgeSettings(nats_url=nats_server.url), name="test") as connection:
        await connection.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"], max_msgs_per_subject=1))
        refused = await asyncio.to_thread(doctor, nats_server.url, exit_code=1)
    state, says = refused["promise of EVENTS"]
    assert (state, says.startswith("it keeps 1 messages per subject")) == ("error", True)


@pytest.mark.usefixtures("imported")
def test_what_can_be_mended_is_mended_and_looked_at_again(
    doctor: Doctor, nats_server: NatsServer, engine: sa.Engine
) -> None:
    damage = "DELETE FROM etl.import_events; DROP INDEX ix_import_tasks_completed_at"
    with engine.begin() as connection:
        connection.exec_driver_sql(damage)
    before = doctor(nats_server.url, exit_code=1)
    missing = {"stream EVENTS", "stream TASKS", "announced imports", "index ix_import_tasks_completed_at"}
    assert {before[check][0] for check in missing} == {"error", "warning"}
    after = doctor(nats_server.url, "--fix", "--yes", exit_code=1)  # 没有监听器、没有工人：那不归它
    assert {after["stream EVENTS"][0], after["stream TASKS"][0], after["indexes"][0]} == {"ok"}
    assert after["listeners"] == (
        "error",
        "no listener is running, 1 messages wait for it: start `etl listen` (`etl up` starts it, too)",
    )


def test_nothing_is_mended_without_being_asked_for(doctor: Doctor, nats_server: NatsServer) -> None:
    with pytest.raises(AssertionError, match="there is no terminal to ask on: add --yes"):
        doctor(nats_server.url, "--fix", exit_code=0)
    assert doctor(nats_server.url, exit_code=1)["stream EVENTS"][0] == "error"
