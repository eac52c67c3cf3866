"""事件走的路上，每两步之间都杀一次：每个资产恰好提交一次，三个完成事件各送到一次，不用人管。"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bridge.demo.reference import find_differences
from etl_assets.definitions import graph
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import RawData
from tests.chaos.installation import ROLES, Installation, running_installation
from tests.chaos.mortal import LISTENER_STEPS, STEPS
from tests.integration.conftest import NatsServer

FIRST = datetime(2026, 1, 5, 4, tzinfo=UTC)
DAILY_FORM = ("ledger asked", "days claimed", "orders committed", "run succeeded", "completion events published")
"""平日只杀这几处；`pdm run test-chaos` 处处都杀。"""


@pytest.fixture
def installation(postgres_url: str, database_template: str, nats_server: NatsServer, tmp_path: Path) -> Iterator[Installation]:
    commands = {role: [sys.executable, "-m", "tests.chaos.mortal", role, str(tmp_path / f"{role}.armed")] for role in ROLES}
    with (
        cloned_database(postgres_url, database_template) as url,
        running_installation(tmp_path, database_url=url, nats_url=nats_server.url, commands=commands) as installation,
    ):
        yield installation


@pytest.mark.timeout(900)
def test_kill_between_any_two_steps_loses_and_doubles_nothing(installation: Installation, is_deep: bool) -> None:
    raw_data = RawData(installation.engine)
    for number, step in enumerate(STEPS if is_deep else DAILY_FORM):
        ordered_at = FIRST + timedelta(days=number)
        import_id = raw_data.add_import([{"order_id": f"A-{number}", "ordered_at": ordered_at}])
        armed = installation.folder / f"{'listen' if step in LISTENER_STEPS else 'worker'}.armed"
        armed.write_text(step)
        installation.announce(import_id)
        installation.eventually(lambda armed=armed: not armed.exists(), f"nobody came past {step!r}")  # type: ignore[misc]
        installation.eventually(lambda made=import_id: installation.is_done(made), f"killed at {step!r}, not in the tables")  # type: ignore[misc]
        assert installation.completions(ordered_at.date().isoformat()) == dict.fromkeys(graph.names, 1), f"killed at {step!r}"
    assert find_differences(installation.engine, installation.settings) == []
    assert installation.unfinished_runs() == []
