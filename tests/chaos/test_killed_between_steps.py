"""事件走的路上，每两步之间都杀一次：每个资产恰好提交一次，三个完成事件各送到一次，不用人管。"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from etl_assets.core.tables import target_tables
from etl_assets.definitions import graph
from etl_assets.leads.events import LeadChanged
from etl_assets.testing.databases import cloned_database
from etl_assets.testing.raw_data import RawData
from tests.chaos.installation import ROLES, Installation, running_installation
from tests.chaos.mortal import LISTENER_STEPS, OF_IMPORTS, OF_LEADS
from tests.integration.conftest import NatsServer

FIRST = datetime(2026, 1, 5, 4, tzinfo=UTC)
DAILY_FORM = ("ledger asked", "days claimed", "orders committed", "run succeeded", "completion events published")
"""平日只杀这几处；`pdm run test-chaos` 处处都杀。"""
DAILY_FORM_OF_LEADS = ("asset asked", "leads committed")
LEADS = target_tables("public").leads


@pytest.fixture
def installation(
    postgres_url: str, database_template: str, nats_server: NatsServer, tmp_path: Path
) -> Iterator[Installation]:
    commands = {
        role: [sys.executable, "-m", "tests.chaos.mortal", role, str(tmp_path / f"{role}.armed")] for role in ROLES
    }
    with (
        cloned_database(postgres_url, database_template) as url,
        running_installation(tmp_path, database_url=url, nats_url=nats_server.url, commands=commands) as installation,
    ):
        yield installation


@pytest.mark.timeout(900)
def test_kill_between_any_two_steps_loses_and_doubles_nothing(installation: Installation, is_deep: bool) -> None:
    raw_data = RawData(installation.engine)
    for number, step in enumerate(OF_IMPORTS if is_deep else DAILY_FORM):
        ordered_at = FIRST + timedelta(days=number)
        import_id = raw_data.add_import([{"order_id": f"A-{number}", "ordered_at": ordered_at}])
        armed = arm(installation, step)
        installation.announce(import_id)
        installation.eventually(lambda armed=armed: not armed.exists(), f"nobody came past {step!r}")  # type: ignore[misc]
        installation.eventually(
            lambda made=import_id: installation.is_done(made), f"killed at {step!r}, not in the tables"
        )  # type: ignore[misc]
        assert installation.completions(ordered_at.date().isoformat()) == dict.fromkeys(graph.names, 1), (
            f"killed at {step!r}"
        )
    assert find_differences(installation.engine, installation.settings) == []
    assert installation.unfinished_runs() == []


@pytest.mark.timeout(900)
def test_kill_on_the_way_of_a_changed_lead_loses_nothing(installation: Installation, is_deep: bool) -> None:
    """人一再关闭、收回同一个商机；重投的事件也许多做一遍，表里一样。"""
    rows = [
        {"order_id": f"A-{day}", "order_status": "new", "ordered_at": FIRST + timedelta(days=day)} for day in range(3)
    ]
    import_id = RawData(installation.engine).add_import(rows)
    installation.announce(import_id)
    installation.eventually(lambda: installation.is_done(import_id), "not in the tables")
    closing = {"closed_by": "user", "closed_at": FIRST + timedelta(hours=1), "current_stage": "LOST"}
    reopening = {"closed_by": None, "closed_at": None, "current_stage": "OPEN"}
    for number, step in enumerate(OF_LEADS if is_deep else DAILY_FORM_OF_LEADS):
        change, dealt = (reopening, [(1, 3)]) if number % 2 else (closing, [(1, 1), (2, 2)])
        with installation.engine.begin() as connection:
            first = sa.update(LEADS).where(LEADS.c.lead_no == 1).values(**change).returning(LEADS.c.lead_id)
            event = LeadChanged(lead_ids=(connection.execute(first).scalar_one(),))
        armed = arm(installation, step)
        installation.publish("events.lead.changed", event)
        installation.eventually(lambda armed=armed: not armed.exists(), f"nobody came past {step!r}")  # type: ignore[misc]
        installation.eventually(
            lambda dealt=dealt: orders_of_leads(installation) == dealt, f"killed at {step!r}, not dealt again"
        )  # type: ignore[misc]
        installation.eventually(installation.is_quiet, f"killed at {step!r}, not at rest")
    assert find_differences(installation.engine, installation.settings) == []
    assert installation.unfinished_runs() == []


def arm(installation: Installation, step: str) -> Path:
    """下一个走到这一步的进程死在那里，文件随之不见。"""
    armed = installation.folder / f"{'listen' if step in LISTENER_STEPS else 'worker'}.armed"
    armed.write_text(step)
    return armed


def orders_of_leads(installation: Installation) -> list[tuple[int, int]]:
    with installation.engine.connect() as connection:
        rows = connection.execute(sa.select(LEADS.c.lead_no, LEADS.c.bulk_count).order_by(LEADS.c.lead_no))
        return [(row.lead_no, row.bulk_count) for row in rows]
