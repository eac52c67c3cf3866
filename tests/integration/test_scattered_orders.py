"""占位的订单号（`-`、`合计`）在每个文件里：影响的日子照约定，一天不少；读得有限，人看得见。"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from bridge.cli.status import status_command
from bridge.operations.doctor import examine
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import import_requests, ledger, troubles
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.intake.imports import ImportEvent, read_affected_days, request_imports
from etl_assets.ledger.troubles import note_trouble, troubles_of_imports
from etl_assets.testing.raw_data import SAMPLE_SHOP_NAME, RawData
from tests.integration.test_intake import nodes, recorded_plans

from .commands import use_in_commands

FIRST = date(2025, 1, 1)
SAID = f"order id '-' of shop '{SAMPLE_SHOP_NAME}' is in 40 imports, over 40 days"

# 每天一个文件：一个订单，加上合计的一行
_COPIED = ("import_id", "order_id", "shop", "customer_name", "order_status", "ordered_at")
_FILES = """
    INSERT INTO import_tasks (import_id, source_name, status, completed_at)
    SELECT md5('file ' || n)::uuid, 'file', 'completed', date '2025-01-01' + n + time '12:00' FROM generate_series(0, :files - 1) n;
    INSERT INTO raw_orders (import_id, order_id, shop, customer_name, order_status, amount, quantity, ordered_at)
    SELECT md5('file ' || n)::uuid, id, :shop, '客户', 'new', 1, 1, date '2025-01-01' + n + time '04:00'
    FROM generate_series(0, :files - 1) n CROSS JOIN LATERAL (VALUES ('-'), ('A-' || n)) AS ids (id);
"""


def add_files(engine: sa.Engine, count: int) -> list[UUID]:
    """一天一个，旧的在前。"""
    with engine.begin() as connection:
        for statement in _FILES.split(";")[:2]:
            connection.execute(
                sa.text(statement), {"files": count} | ({"shop": SAMPLE_SHOP_NAME} if ":shop" in statement else {})
            )
        return list(connection.scalars(sa.select(import_tasks.c.import_id).order_by(import_tasks.c.completed_at)))


def announce(engine: sa.Engine, settings: EtlSettings, import_ids: Sequence[UUID]) -> None:
    events = [ImportEvent(import_id, uuid4(), sequence=number) for number, import_id in enumerate(import_ids, 1)]
    assert set(request_imports(engine, settings, events)) == {"requested"}


def said(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(troubles_of_imports(connection, "public"))


@pytest.mark.usefixtures("raw_data")
def test_each_import_asks_for_all_days_of_the_id_and_status_and_doctor_say_so(
    engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imports = add_files(engine, 40)
    announce(engine, etl_settings, imports[-1:])
    with engine.connect() as connection:
        days = connection.scalars(sa.select(ledger.c.day).where(ledger.c.requested > 0).order_by(ledger.c.day)).all()
    assert days == [FIRST + timedelta(days=n) for n in range(40)]
    assert said(engine) == [SAID]
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    bridge_settings = BridgeSettings(nats_url="nats://127.0.0.1:1")
    use_in_commands(monkeypatch, engine=engine, settings=etl_settings, bridge_settings=bridge_settings)
    printed, as_json = (CliRunner().invoke(status_command, arguments).output for arguments in ([], ["--json"]))
    assert f"{SAID}: each import that names it makes all these days again; " in printed
    report = json.loads(as_json)
    assert (report["scattered_orders"], report["troubles"]) == ([SAID], [])
    findings = {
        finding.check: finding for finding in examine(engine, etl_settings, bridge_settings, state_dir=tmp_path)
    }
    assert (findings["order ids"].state, SAID in findings["order ids"].says) == ("warning", True)
    assert findings["side tasks"].state == "ok"


@pytest.mark.usefixtures("raw_data")
def test_what_is_said_is_found_once_an_hour_and_kept_a_week(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    imports = add_files(engine, 42)
    announce(engine, etl_settings, imports[-1:])
    announce(engine, etl_settings, imports[-2:-1])

    def age(days: float) -> None:
        with engine.begin() as connection:
            connection.execute(sa.update(troubles).values(last_at=sa.func.now() - timedelta(days=days)))
            note_trouble(connection, process="worker@a", task="other", message="it was")

    def times() -> list[int]:
        with engine.connect() as connection:
            return list(connection.scalars(sa.select(troubles.c.times).where(troubles.c.process == "intake")))

    assert times() == [1]
    age(0.1)
    announce(engine, etl_settings, imports[-3:-2])
    assert times() == [2]
    age(6.9)
    assert len(said(engine)) == 1
    age(7.1)
    assert said(engine) == times() == []


def test_days_that_an_import_brings_itself_and_orders_that_move_are_nothing_to_say(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    """一整季的文件又来一次，日期都改早了一天：每个订单只在两天。"""
    start = date(2025, 1, 1)
    for shift in (0, -1):
        rows = [
            {"order_id": f"A-{n}", "ordered_at": f"{start + timedelta(days=n + shift)} 04:00+00"} for n in range(90)
        ]
        announce(engine, etl_settings, [raw_data.add_import(rows)])
    assert said(engine) == []


@pytest.mark.usefixtures("raw_data")
def test_versions_of_an_id_that_is_in_every_import_of_a_batch_are_read_once(
    engine: sa.Engine, etl_settings: EtlSettings
) -> None:
    """每个文件三十行没有号的：一批一百个事件，版本读三千个，不是一百乘三千；要求的日子还是每个导入的全部。"""
    files = 100
    imports = add_files(engine, files)
    again = sa.select(*[raw_orders.c[name] for name in _COPIED], sa.func.generate_series(2, 30)).where(
        raw_orders.c.order_id == "-"
    )
    with engine.begin() as connection:
        connection.execute(sa.insert(raw_orders).from_select([*_COPIED, "quantity"], again))
        connection.exec_driver_sql("ANALYZE raw_orders")
    with engine.connect() as connection, recorded_plans(connection) as plans:
        assert len(read_affected_days(connection, etl_settings, imports)) == files * files
    read = [node["Actual Rows"] * node["Actual Loops"] for plan in plans for node in nodes(plan)]
    assert max(read) <= 3 * files * files
    announce(engine, etl_settings, imports)
    with engine.connect() as connection:
        requests = sa.select(sa.func.count(), sa.func.count(import_requests.c.day.distinct())).select_from(
            import_requests
        )
        assert tuple(connection.execute(requests).one()) == (files * files, files)
