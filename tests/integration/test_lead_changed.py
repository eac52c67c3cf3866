"""events.lead.changed 的一路：应用发布，监听器要求，工人做成一个 leads 的运行；坏的进死信，放得回去，也重放得了。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from dagster import AssetKey, DagsterRunStatus
from nats.js.api import StreamConfig

from bridge.cli.commands import cli
from bridge.events import handlers as handlers_module
from bridge.events import publish_event
from bridge.events.listener import Listener
from bridge.runs.worker import RunWorker
from bridge.settings import BridgeSettings, Lane
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import outbox
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.leads.events import LeadChanged
from etl_assets.ledger.graph import AssetGraph, write_graph
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.the_three import graph

from .commands import use_in_commands
from .conftest import NatsServer
from .listening import Bridge, open_bridge
from .warm_runs import status

SUBJECT = "events.lead.changed"
DAY = date(2026, 1, 6)
LEADS = target_tables("public").leads
CLOSED = {"closed_by": "user", "closed_at": datetime(2026, 1, 5, 12, tzinfo=UTC), "current_stage": "LOST"}
Etl = Callable[..., Awaitable[Result]]


@pytest.fixture
async def bridge(
    nats_server: NatsServer, engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bridge]:
    for name, value in (("engine", engine), ("settings", etl_settings)):
        monkeypatch.setattr(f"bridge.operations.replay.get_{name}", lambda value=value: value)
    settings = BridgeSettings(nats_url=nats_server.url, event_ack_wait_seconds=2, event_retry_delay_seconds=0.02)
    async with open_bridge(settings, engine, etl_settings, monkeypatch) as made:
        await made.connection.context.add_stream(
            StreamConfig(name="EVENTS", subjects=["events.>"], duplicate_window=600)
        )
        yield made


@pytest.fixture
def chain(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> Chain:
    """张三两天各一单，没有成交，一个商机；都做完了，然后人把它关在两单之间。"""
    chain = Chain(engine, etl_settings)
    orders = [
        {"order_id": f"A-{day}", "order_status": "new", "ordered_at": datetime(2026, 1, day, 4, tzinfo=UTC)}
        for day in (5, 6)
    ]
    chain.announce(raw_data.add_import(orders))
    chain.run_due()
    chain.execute(sa.delete(outbox))
    chain.execute(sa.update(LEADS).values(**CLOSED))
    return chain


@pytest.fixture
def etl(bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Etl:
    """`await etl("publish", …)`：像在终端里那样，自己的线程、自己的事件循环。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, bridge_settings=bridge.settings)
    return lambda *arguments: asyncio.to_thread(CliRunner().invoke, cli, arguments)


def lead_id_of(chain: Chain) -> UUID:
    ((lead_id,),) = chain.rows(sa.select(LEADS.c.lead_id).where(LEADS.c.lead_no == 1))
    return lead_id  # type: ignore[no-any-return]  # 一列 uuid


def assert_dealt_again(chain: Chain) -> None:
    assert chain.rows(sa.select(LEADS.c.lead_no, LEADS.c.bulk_count).order_by(LEADS.c.lead_no)) == [(1, 1), (2, 1)]
    chain.assert_converged()


async def test_it_becomes_a_run_of_leads_as_any_event(bridge: Bridge, chain: Chain, worker: RunWorker) -> None:
    async with bridge.listening():
        await publish_event(SUBJECT, LeadChanged(lead_ids=(lead_id_of(chain),)), settings=bridge.settings)
        await bridge.eventually(chain.due_days)
    claim = await asyncio.to_thread(worker.claim, small=True)
    assert claim is not None
    assert (claim.days, claim.assets) == (DayRange(DAY, DAY), ("leads",))
    taken = await asyncio.to_thread(worker.start, claim)
    assert (await asyncio.to_thread(worker.execute, taken)).succeeded
    assert_dealt_again(chain)
    run = worker.instance.get_run_by_id(taken.run.run_id)
    assert run is not None
    assert status(worker, run.run_id) is DagsterRunStatus.SUCCESS
    assert (run.tags["dagster/dayline/trigger"], run.tags["dagster/partition"], run.asset_selection) == (
        "event",
        str(DAY),
        {AssetKey("leads")},
    )
    materialization = worker.instance.get_latest_materialization_event(AssetKey("leads"))
    assert materialization is not None
    assert materialization.asset_materialization is not None
    metadata = {name: value.value for name, value in materialization.asset_materialization.metadata.items()}
    assert (metadata["scope"], metadata["rows"], metadata["inserted"]) == ("changed", 2, 1)
    ((payload,),) = chain.rows(sa.select(outbox.c.payload))
    assert (payload["status"], payload["partitions"], payload["run_id"]) == ("success", [str(DAY)], run.run_id)


async def test_event_delivered_again_asks_again_and_the_tables_stay(bridge: Bridge, chain: Chain) -> None:
    """要求提交了，门铃没有存下，监听器死在确认之前：又投来一次。"""
    rings: list[str] = []

    async def ring(task_name: str, _lane: Lane) -> None:
        rings.append(task_name)
        if len(rings) == 1:
            await asyncio.to_thread(chain.run_due)  # 别的门铃引来的工人做完了
            raise OSError("no doorbell")

    stop = asyncio.Event()
    listening = asyncio.create_task(
        Listener(bridge.settings, handlers=handlers_module.handlers_of(graph), ring=ring).run(stop)
    )
    await publish_event(SUBJECT, LeadChanged(lead_ids=(lead_id_of(chain),)), settings=bridge.settings)
    await bridge.eventually(lambda: len(rings) == 2)
    stop.set()
    await listening
    assert_dealt_again(chain)
    assert chain.due_days() == [DAY]
    chain.run_due()
    assert_dealt_again(chain)


async def test_wrong_events_are_dead_lettered_and_the_others_pass(bridge: Bridge, chain: Chain, etl: Etl) -> None:
    lead_id = str(lead_id_of(chain))
    async with bridge.listening():
        for fields in ({}, {"lead_ids": []}, {"lead_ids": [lead_id], "customer_global_ids": [lead_id]}):
            content = {
                "event_id": str(uuid4()),
                "event_version": "1.0",
                "occurred_at": "2026-01-05T10:00:00Z",
                "status": "closed",
            }
            await bridge.connection.publish(SUBJECT, json.dumps(content | fields).encode(), message_id=str(uuid4()))
        await publish_event(SUBJECT, LeadChanged(lead_ids=(lead_id_of(chain),)), settings=bridge.settings)
        letters = await bridge.letters(3)
        await bridge.eventually(chain.due_days)
        reasons = sorted((letter.headers or {})["Etl-Reason"] for letter in letters)
        one_kind = "exactly one of customer_global_ids and lead_ids must be given"
        assert reasons == [
            one_kind,
            one_kind,
            "field lead_ids: Tuple should have at least 1 item after validation, not 0",
        ]
        assert {letter.subject for letter in letters} == {"events_dlq.lead.changed"}
    retried = await etl("dlq", "retry", "events-1")
    assert f"events-1 is back on {SUBJECT}" in retried.stdout


async def test_letter_stays_where_nobody_has_the_asset(bridge: Bridge, engine: sa.Engine, etl: Etl) -> None:
    async with bridge.listening():
        await bridge.connection.publish(SUBJECT, b"{}", message_id="bad")
        await bridge.letters(1)
    with engine.begin() as connection:
        write_graph(connection, "public", AssetGraph.of(asset for asset in graph.assets if asset.name != "leads"))
    refused = await etl("dlq", "retry", "events-1")
    assert (refused.exit_code, f"nothing listens to {SUBJECT}" in refused.stderr) == (1, True)
    assert len(await bridge.letters(1)) == 1


async def test_published_by_hand_and_replayed(chain: Chain, etl: Etl) -> None:
    """台账不记哪个做完了：重放的都再要求一遍，没有害处；不在这里的编号什么也不要求。"""
    refused = await etl("publish", SUBJECT, "{}")
    assert "JSON: exactly one of customer_global_ids and lead_ids must be given" in str(refused.exception)
    for lead_id in (uuid4(), lead_id_of(chain)):
        assert (await etl("publish", SUBJECT, json.dumps({"lead_ids": [str(lead_id)]}))).exit_code == 0

    async def replay(*arguments: str) -> dict[str, Any]:
        result = await etl("replay", "--seq", "1", "--subject", SUBJECT, "--json", *arguments)
        assert result.exit_code == 0, result.output
        content: dict[str, Any] = json.loads(result.stdout)
        return content

    dry = await replay("--dry-run")
    assert chain.due_days() == []
    for report in (dry, await replay()):
        assert (report["events"], report["requested"], report["ignored"]) == (2, 1, 1)
        assert report["partitions"] == {"orders": [], "customers": [], "leads": [str(DAY)]}
    assert chain.due_days() == [DAY]
    chain.run_due()
    assert_dealt_again(chain)
