"""发件箱到 NATS：一个发不了的不挡后面的，放在一边，看得见，过一会儿再试。"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import DiscardPolicy, StreamConfig

from bridge.errors import StreamFullError
from bridge.events.envelope import EtlCompleted
from bridge.events.outbox_publisher import publish_outbox
from bridge.events.subjects import CUSTOMERS_ETL_COMPLETED, LEADS_ETL_COMPLETED, ORDERS_ETL_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.stored_messages import stored_message
from bridge.jetstream.streams import stream_state
from bridge.settings import BridgeSettings
from etl_assets.core.business_day import DayRange
from etl_assets.core.etl_tables import outbox
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.outbox import Completion, add_completion
from etl_assets.ledger.requests import request_days
from etl_assets.reports.reports import set_aside_events, unpublished_events
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain

from .conftest import NatsServer

DAY = date(2026, 1, 5)
MIN_EVENT_BYTES = 65_536


@pytest.fixture
def small_server(tmp_path: Path) -> Iterator[NatsServer]:
    """消息连同消息头至多 64 KiB 多一点。"""
    server = NatsServer(tmp_path, config={"max_payload": MIN_EVENT_BYTES + 200})
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def connection(small_server: NatsServer) -> AsyncIterator[JetStreamConnection]:
    link = JetStreamConnection(BridgeSettings(nats_url=small_server.url), name="test")
    await link.open()
    await link.context.add_stream(StreamConfig(name="EVENTS", subjects=["events.>"]))
    yield link
    await link.close()


def complete(engine: sa.Engine, asset: str = "orders", **fields: Any) -> None:
    given = {"days": DayRange(DAY, DAY), "run_id": str(uuid4()), "status": "success", "downstream": "pending"} | fields
    with engine.begin() as transaction:
        add_completion(transaction, "public", Completion(asset=asset, **given))


async def stored(connection: JetStreamConnection) -> list[tuple[str, dict[str, Any]]]:
    state = await stream_state(connection, "EVENTS")
    assert state is not None
    messages = [await stored_message(connection, "EVENTS", number) for number in range(1, state.last_seq + 1)]
    return [(message.subject, json.loads(message.data)) for message in messages if message is not None]


def counts(engine: sa.Engine) -> tuple[int, int, str | None]:
    with engine.connect() as reading:
        return (unpublished_events(reading), *set_aside_events(reading))


async def test_twenty_eight_thousand_imports_of_one_day_are_announced_in_parts_that_fit(
    connection: JetStreamConnection, engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    raw_data.add_import([{}])
    with engine.begin() as transaction:
        request_days(transaction, "public", [DAY])
        transaction.exec_driver_sql(
            "INSERT INTO etl.import_requests (target, import_id, day, revision)"
            " SELECT 'public', gen_random_uuid(), '2026-01-05', 1 FROM generate_series(1, 28000)"
        )
        imports = transaction.exec_driver_sql("SELECT import_id FROM etl.import_requests").scalars().all()
    await asyncio.to_thread(Chain(engine, etl_settings).run, DAY)
    assert await publish_outbox(engine, connection) == 3 * 28
    assert counts(engine) == (0, 0, None)
    events = await stored(connection)
    for subject in (ORDERS_ETL_COMPLETED, CUSTOMERS_ETL_COMPLETED, LEADS_ETL_COMPLETED):
        parts = [event for stored_on, event in events if stored_on == subject]
        assert [(event["part"], event["parts"]) for event in parts] == [(number, 28) for number in range(1, 29)]
        assert sorted(one for event in parts for one in event["import_ids"]) == sorted(map(str, imports))
        assert len({event["event_id"] for event in parts}) == 28
        assert {(event["run_id"], event["success_count"], tuple(event["partitions"])) for event in parts} == {
            (parts[0]["run_id"], parts[0]["success_count"], ("2026-01-05",))
        }


async def test_longest_part_fits_into_the_smallest_allowed_event(
    connection: JetStreamConnection, engine: sa.Engine
) -> None:
    longest = Completion(
        asset="customers",
        days=DayRange(date(2000, 1, 1), date(2002, 9, 26)),
        run_id=str(uuid4()),
        status="failed",
        downstream="included",
        import_ids=[uuid4() for _ in range(1_001)],
        success_count=2**63 - 1,
        error_count=2**63 - 1,
        duration_seconds=1e9 / 3,
        error="\x01" * 5_000,
    )
    with engine.begin() as transaction:
        add_completion(transaction, "影" * 63, longest)
    assert await publish_outbox(engine, connection) == 2
    sizes = [len(message.data) for number in (1, 2) if (message := await stored_message(connection, "EVENTS", number))]
    assert max(sizes) <= MIN_EVENT_BYTES
    for _, event in await stored(connection):
        assert len(EtlCompleted.model_validate_json(json.dumps(event), strict=True).partitions) == 1_000


async def test_days_and_imports_beyond_one_part_are_all_named_together(
    connection: JetStreamConnection, engine: sa.Engine
) -> None:
    days = DayRange(date(2000, 1, 1), date(2004, 1, 1))
    imports = [uuid4() for _ in range(1_500)]
    complete(engine, days=days, import_ids=imports)
    assert await publish_outbox(engine, connection) == 4
    pairs = [(event["partitions"], event["import_ids"]) for _, event in await stored(connection)]
    assert sum(len(partitions) * len(import_ids) for partitions, import_ids in pairs) == len(days) * len(imports)


@pytest.mark.parametrize("error", ["half \ud800 pair", "nul \x00 byte", "长" * 9_000])
async def test_any_error_text_is_announced(connection: JetStreamConnection, engine: sa.Engine, error: str) -> None:
    complete(engine, status="failed", error=error)
    assert await publish_outbox(engine, connection) == 1
    ((_, event),) = await stored(connection)
    assert event["error"][:4] == error[:4]
    assert len(event["error"]) <= 2_000


async def test_event_that_cannot_be_sent_is_set_aside_and_the_rest_goes_on(
    connection: JetStreamConnection, engine: sa.Engine
) -> None:
    complete(engine, "orders")
    for asset, note in (("orders", "x" * 100_000), ("stock", "new asset"), ("leads", "")):
        complete(engine, asset)
        with engine.begin() as transaction:
            newest = sa.select(sa.func.max(outbox.c.outbox_id)).scalar_subquery()
            grown = outbox.c.payload.concat(sa.func.jsonb_build_object("note", sa.literal(note)))
            transaction.execute(sa.update(outbox).where(outbox.c.outbox_id == newest).values(payload=grown))
    with structlog.testing.capture_logs() as logs:
        assert await publish_outbox(engine, connection) == 3
        assert await publish_outbox(engine, connection) == 0
    subjects = [subject for subject, _ in await stored(connection)]
    assert subjects == [ORDERS_ETL_COMPLETED, "events.etl.stock.completed", LEADS_ETL_COMPLETED]
    unpublished, aside, problem = counts(engine)
    assert (unpublished, aside) == (1, 1)
    assert problem is not None
    assert "exceeds max_payload of NATS" in problem
    assert {line["asset"] for line in logs} == {"orders"}
    with engine.begin() as transaction:
        transaction.execute(sa.update(outbox).values(retry_at=sa.func.now(), asset="customers", payload={}))
    assert await publish_outbox(engine, connection) == 1
    assert counts(engine) == (0, 0, None)


async def test_full_stream_stops_the_round_and_keeps_the_order(
    connection: JetStreamConnection, engine: sa.Engine
) -> None:
    await connection.context.update_stream(
        config=StreamConfig(name="EVENTS", subjects=["events.>"]), max_msgs=1, discard=DiscardPolicy.NEW
    )
    for run_id in "abc":
        complete(engine, run_id=run_id)
    with pytest.raises(StreamFullError):
        await publish_outbox(engine, connection)
    assert counts(engine) == (2, 0, None)
    await connection.context.update_stream(config=StreamConfig(name="EVENTS", subjects=["events.>"]), max_msgs=-1)
    assert await publish_outbox(engine, connection) == 2
    assert [event["run_id"] for _, event in await stored(connection)] == ["a", "b", "c"]
