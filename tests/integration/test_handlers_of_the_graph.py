"""监听器有哪些处理器，由写下的图定；还没有人写下就等。"""

from __future__ import annotations

import asyncio

import pytest
import sqlalchemy as sa

from bridge.events import handlers
from bridge.events.handlers import handlers_of, handlers_once_known
from bridge.events.subjects import CUSTOMERS_ETL_COMPLETED, DATA_IMPORT_COMPLETED, ORDERS_ETL_COMPLETED
from etl_assets.core.etl_tables import assets, graphs
from etl_assets.core.settings import EtlSettings
from etl_assets.ledger.graph import Asset, AssetGraph, write_graph
from tests.the_three import graph

WIDER = AssetGraph.of(
    [
        *graph.assets,
        Asset("products", frozenset(["orders"])),
        Asset("daily_report", frozenset(["customers", "products"])),
    ]
)


@pytest.fixture
def without_a_graph(engine: sa.Engine, etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch) -> sa.Engine:
    """迁移过，还没有工人载入过代码。"""
    with engine.begin() as connection:
        connection.execute(sa.delete(assets))
        connection.execute(sa.delete(graphs))
    monkeypatch.setattr(handlers, "get_engine", lambda: engine)
    monkeypatch.setattr(handlers, "get_settings", lambda: etl_settings)
    monkeypatch.setattr(handlers, "_LOOK_SECONDS", 0.05)
    return engine


def test_every_asset_that_something_follows_has_a_handler_and_every_event_of_an_asset() -> None:
    own = "events.lead.changed"
    assert [each.subject for each in handlers_of(graph)] == [
        DATA_IMPORT_COMPLETED,
        ORDERS_ETL_COMPLETED,
        CUSTOMERS_ETL_COMPLETED,
        own,
    ]
    assert [each.subject for each in handlers_of(WIDER)][-2:] == ["events.etl.products.completed", own]


async def test_listener_waits_until_a_worker_has_written_the_graph_down(without_a_graph: sa.Engine) -> None:
    waiting = asyncio.create_task(handlers_once_known(asyncio.Event()))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    with without_a_graph.begin() as connection:
        assert write_graph(connection, "public", WIDER, if_new=True)
    async with asyncio.timeout(20):
        assert len(await waiting) == 5


async def test_listener_that_is_stopped_while_it_waits_has_none(without_a_graph: sa.Engine) -> None:  # noqa: ARG001
    stop = asyncio.Event()
    waiting = asyncio.create_task(handlers_once_known(stop))
    await asyncio.sleep(0.1)
    stop.set()
    async with asyncio.timeout(20):
        assert await waiting == ()
