"""一次测量自己的一套进程与服务器，用完就没有了。"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port


@contextmanager
def own_addresses() -> Iterator[StackAddresses]:
    """跑着的一套的地址。"""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stack = Stack(
            Path(folder),
            settings=EtlSettings(database_url=""),
            bridge_settings=BridgeSettings(nats_url=""),
            port=find_free_port(),
        )
        with stack as addresses:
            yield addresses


@contextmanager
def own_stack() -> Iterator[tuple[sa.Engine, EtlSettings, BridgeSettings]]:
    """跑着的一套，连同它的引擎与设置。"""
    with own_addresses() as addresses:
        settings = EtlSettings(database_url=addresses.database_url)
        engine = build_engine(settings)
        yield engine, settings, BridgeSettings(nats_url=addresses.nats_url)
        engine.dispose()
