"""网线哑了：进程的每条连接都有去无回，也不断开，新的连接照常；什么也不用人做，进程也不必换。"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from bridge.demo.reference import find_differences
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData
from tests.chaos.installation import ROLES, running_installation
from tests.chaos.network import Network
from tests.integration.conftest import NatsServer

FIRST = datetime(2026, 1, 5, 4, tzinfo=UTC)
SECONDS = 40
"""NATS 的客户端 15 秒看出来，PostgreSQL 的 8 秒；加上重投，与一台忙的机器。"""


@pytest.mark.timeout(200)
def test_connections_that_all_fall_silent_are_replaced_by_themselves(
    etl_settings: EtlSettings, nats_server: NatsServer, tmp_path: Path
) -> None:
    commands = {role: [sys.executable, "-m", "bridge.cli.main", role] for role in ROLES}
    with (
        Network() as network,
        running_installation(
            tmp_path,
            database_url=etl_settings.database_url,
            nats_url=nats_server.url,
            commands=commands,
            reroute=partial(network.reroute, "all"),
        ) as installation,
    ):
        raw_data = RawData(installation.engine)
        before, during = (
            raw_data.add_import([{"order_id": f"A-{day}", "ordered_at": FIRST + timedelta(days=day)}])
            for day in range(2)
        )
        installation.announce(before)
        installation.eventually(lambda: installation.is_done(before), "the first import is not in the tables")
        pids = {role: process.pid for role, process in installation.processes.items()}

        for link in network.links:
            network.drop(link)
        installation.announce(during)
        installation.eventually(
            lambda: installation.is_done(during), "not in the tables after the silence", timeout_seconds=SECONDS
        )

        assert {role: process.pid for role, process in installation.processes.items() if process.poll() is None} == pids
        assert find_differences(installation.engine, installation.settings) == []
        assert installation.unfinished_runs() == []
