"""存下一个事件要多久：一台每条都落盘的 NATS（`etl up` 的），三个节点上一份的流，三个节点上三份的流。"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from benchmarks.burst.bench import publish_imports
from benchmarks.scale.parts import make_streams
from bridge.settings import BridgeSettings
from bridge.stack.embedded_nats import EmbeddedNats
from tests.integration.nats_cluster import NatsCluster

_EVENTS = 10_000
_WARM_UP = 500


def measure_replicas(events: int = _EVENTS) -> dict[str, float]:
    """一秒存下几个，总有 256 个在等确认；名字说在哪里。"""
    rates = {}
    for name, replicas, servers in (
        ("one server, sync always", 1, _one_server),
        ("a cluster of three, one copy", 1, _three_servers),
        ("a cluster of three, three copies", 3, _three_servers),
    ):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder, servers(Path(folder)) as url:
            settings = BridgeSettings(nats_url=url, nats_replicas=replicas)
            asyncio.run(make_streams(settings))
            _store(settings, _WARM_UP)
            rates[name] = events / _store(settings, events)
    return rates


def _store(settings: BridgeSettings, events: int) -> float:
    import_ids = [uuid4() for _ in range(events)]
    started = time.perf_counter()
    asyncio.run(publish_imports(settings, import_ids))
    return time.perf_counter() - started


@contextmanager
def _one_server(folder: Path) -> Iterator[str]:
    with EmbeddedNats(folder / "nats") as url:
        yield url


@contextmanager
def _three_servers(folder: Path) -> Iterator[str]:
    """落盘是 nats-server 缺省的：两分钟一次，靠另外两份。"""
    cluster = NatsCluster(folder)
    try:
        cluster.start()
        yield cluster.url
    finally:
        cluster.stop()
