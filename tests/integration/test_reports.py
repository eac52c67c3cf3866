"""给人看的查询：导入的进度与去向，拒收的行，一个商机的订单；以及 `etl show`。"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from bridge.cli.show import show_command
from etl_assets.core.business_day import DayRange
from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import target_tables
from etl_assets.customers.etl import materialize_customers
from etl_assets.leads.etl import materialize_leads
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.intake import ImportEvent, request_imports
from etl_assets.services.materialization import RunContext
from etl_assets.services.raw_rows import reject_rows_without_partition
from etl_assets.services.reports import Progress, import_accounting, import_progress, show_lead_orders, show_rejected
from etl_assets.testing.raw_data import RawData

DAY = DayRange(date(2026, 1, 5), date(2026, 1, 5))
RUN = RunContext(run_id="run", assets=frozenset())


def test_event_that_arrives_while_progress_is_read_is_not_taken_for_done(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    import_id = raw_data.add_import([{}])
    with engine.connect() as connection:
        statements = 0

        def arrive_after_the_first(*_: object) -> None:
            nonlocal statements
            statements += 1
            if statements == 1:
                request_imports(other, etl_settings, [ImportEvent(import_id, uuid4())])

        other = sa.create_engine(engine.url, poolclass=sa.pool.NullPool)
        sa.event.listen(connection, "after_cursor_execute", arrive_after_the_first)
        progress = import_progress(connection, etl_settings, import_id)
    assert statements > 1
    assert not (progress.handled and progress.done == progress.days)


def test_import_is_done_when_the_last_asset_is(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    import_id = raw_data.add_import([{}, {"order_id": None}])
    request_imports(engine, etl_settings, [ImportEvent(import_id, uuid4())])
    seen = []
    for materialize in (materialize_orders, materialize_customers, materialize_leads):
        materialize(engine, etl_settings, DAY, RUN)
        with engine.connect() as connection:
            seen.append(import_progress(connection, etl_settings, import_id))
    assert [progress.done for progress in seen] == [0, 0, 1]
    assert seen[-1] == Progress(handled=True, days=1, done=1, held=0, held_reason=None)


def test_every_row_of_an_import_is_accounted_for(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    first = raw_data.add_import([{}, {"order_id": None}, {"order_id": "B"}])
    second = raw_data.add_import([{"order_status": "cancelled"}])
    materialize_orders(engine, etl_settings, DAY, RUN)
    with engine.connect() as connection:
        rows = {row["import_id"]: row for row in import_accounting(connection, etl_settings)}
    split = ("raw", "loaded", "superseded", "rejected", "waiting")
    assert [rows[first][name] for name in split] == [3, 1, 1, 1, 0]
    assert [rows[second][name] for name in split] == [1, 1, 0, 0, 0]


# ---- 买家的文字 ------------------------------------------------------------------

NASTY = '\x1b]0;owned\x07=HYPERLINK("http://evil.example")\u202e'


def run_on_a_terminal(etl_settings: EtlSettings, *arguments: str) -> bytes:
    """命令在一个真的（伪）终端上写了什么。"""
    master, slave = pty.openpty()
    environment = {**os.environ, "ETL_DATABASE_URL": etl_settings.database_url, "COLUMNS": "250", "ETL_STATE_DIR": "/nonexistent"}
    with subprocess.Popen([sys.executable, "-m", "bridge.cli.main", *arguments], stdout=slave, stderr=slave, env=environment):
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # 另一头关了
            while part := os.read(master, 65536):
                written += part
    os.close(master)
    return written


@pytest.mark.parametrize("how", ["table", "csv", "json"])
def test_name_of_a_buyer_does_nothing_to_the_terminal(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, how: str) -> None:
    raw_data.add_import([{"customer_name": NASTY}])
    materialize_orders(engine, etl_settings, DAY, RUN)
    written = run_on_a_terminal(etl_settings, "show", "orders", "--format", how)
    assert b"HYPERLINK" in written
    assert [part for part in (b"\x1b]", b"\x07", "\u202e".encode()) if part in written] == []


def test_csv_for_a_spreadsheet_holds_no_formula(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show) -> None:
    raw_data.add_import([{"customer_name": "=1+1"}])
    materialize_orders(engine, etl_settings, DAY, RUN)
    (row,) = csv.DictReader(io.StringIO(show("orders", "--format", "csv").stdout))
    assert row["customer_nickname"] == "'=1+1"


# ---- 拒收的行 --------------------------------------------------------------------

Show = Callable[..., Result]


@pytest.fixture
def show(engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Show:
    """`show("rejected", "--rule", …)`：像在终端里那样。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    monkeypatch.setattr("etl_assets.core.database_sync.get_engine", lambda: engine)
    monkeypatch.setattr("etl_assets.core.settings.get_settings", lambda: etl_settings)
    return lambda *arguments: CliRunner().invoke(show_command, arguments)


def reject(engine: sa.Engine, settings: EtlSettings, raw_data: RawData) -> list[UUID]:
    """两次导入，各有几条坏行。"""
    first = raw_data.add_import([{}, {"order_id": None}, {"order_id": "B", "amount": "NaN"}])
    second = raw_data.add_import(
        [{"order_id": "C", "quantity": -1, "customer_name": "李_四"}, {"order_id": "D", "ordered_at": "-infinity"}]
    )
    materialize_orders(engine, settings, DAY, RUN)
    with engine.begin() as connection:
        reject_rows_without_partition(connection, settings, [second])
    return [first, second]


def test_rejected_rows_are_listed_with_their_values(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    _, second = reject(engine, etl_settings, raw_data)
    with engine.connect() as connection:
        rows = show_rejected(connection, etl_settings, import_id=None, rule=None, customer=None, day=None, limit=10)
    assert [(row["raw_id"], row["rule"], row["day"]) for row in rows] == [
        (5, "bad_ordered_at", None),
        (4, "negative_quantity", DAY.first),
        (3, "bad_amount", DAY.first),
        (2, "missing_order_id", DAY.first),
    ]
    assert (rows[0]["ordered_at"], rows[0]["import_id"], rows[0]["source_name"]) == ("-infinity", second, "test")
    assert str(rows[2]["amount"]) == "NaN"


def test_show_rejected_filters_by_rule_import_customer_and_day(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show
) -> None:
    first, second = reject(engine, etl_settings, raw_data)

    def shown(*arguments: str) -> list[int]:
        result = show("rejected", "--format", "json", *arguments)
        assert result.exit_code == 0, result.output
        return [row["raw_id"] for row in json.loads(result.output)]

    assert shown() == [5, 4, 3, 2]
    assert shown("--limit", "1") == [5]
    assert shown("--rule", "bad_amount") == [3]
    assert shown("--import-id", str(first)) == [3, 2]
    assert shown("--import-id", str(second), "--day", "2026-01-05") == [4]
    assert shown("--customer", "_") == [4]
    assert shown("--customer", "nobody") == []


def test_show_rejected_cuts_long_text_in_the_table_only(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show
) -> None:
    raw_data.add_import([{"customer_name": "长" * 5000}])
    materialize_orders(engine, etl_settings, DAY, RUN)
    table = show("rejected")
    assert table.exit_code == 0
    assert 60 <= table.output.count("长") < 70
    assert "text_too_long" in table.output
    assert show("rejected", "--format", "csv").output.count("长") == 5000


@pytest.mark.parametrize(
    "arguments",
    [("orders", "--rule", "x"), ("leads", "--import-id", str(uuid4())), ("leads", "--lead", str(uuid4()))],
)
def test_option_that_does_not_fit_the_table_is_refused(show: Show, arguments: tuple[str, ...]) -> None:
    result = show(*arguments)
    assert result.exit_code == 2
    assert "etl show" in result.output


# ---- 一个商机的订单 --------------------------------------------------------------


def build_leads(engine: sa.Engine, settings: EtlSettings, raw_data: RawData) -> dict[int, UUID]:
    """同一时刻的订单按订单号分；取消的不算；人关闭的商机从关闭之后另起一号。返回编号 → lead_id。"""
    noon, later = datetime(2026, 1, 5, 4, tzinfo=UTC), datetime(2026, 1, 5, 8, tzinfo=UTC)
    rows: list[dict[str, Any]] = [
        {"order_id": "a"},
        {"order_id": "B", "order_status": " Refunded "},
        {"order_id": "C", "order_type": "打样订单", "order_status": "new"},
        {"order_id": "D", "order_status": "new", "ordered_at": later},
        {"order_id": "E", "order_status": "new", "customer_name": "李四"},
    ]
    raw_data.add_import(rows)
    leads = target_tables(settings.target_schema).leads
    for _ in range(2):
        for materialize in (materialize_orders, materialize_customers, materialize_leads):
            materialize(engine, settings, DAY, RUN)
        with engine.begin() as connection:
            connection.execute(
                sa.update(leads)
                .where(leads.c.lead_no == 1, leads.c.opened_at == noon, leads.c.bulk_count + leads.c.sample_count > 1)
                .values(closed_by="user", closed_at=noon, current_stage="LOST")
            )
    with engine.connect() as connection:
        mine = sa.select(leads.c.lead_no, leads.c.lead_id).where(leads.c.customer_global_id == UUID("fa55f60f-e32c-5a53-a54e-925cf73a97da"))
        return {row.lead_no: row.lead_id for row in connection.execute(mine)}


def test_orders_of_a_lead_are_those_it_was_dealt(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData) -> None:
    leads = build_leads(engine, etl_settings, raw_data)
    with engine.connect() as connection:
        dealt = {no: [row["order_id"] for row in show_lead_orders(connection, etl_settings, lead_id)] for no, lead_id in leads.items()}
    assert dealt == {1: ["C", "a"], 2: ["D"]}
    with engine.connect() as connection, pytest.raises(PermanentError, match="there is no lead 00000000"):
        show_lead_orders(connection, etl_settings, UUID(int=0))


def test_show_orders_of_a_lead(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show) -> None:
    leads = build_leads(engine, etl_settings, raw_data)
    listed = show("leads", "--format", "json")
    assert str(leads[1]) in listed.output
    rows = json.loads(show("orders", "--lead", str(leads[1]), "--format", "json").output)
    assert [(row["order_id"], row["amount"]) for row in rows] == [("C", "120.50"), ("a", "120.50")]
    assert "│ D" in show("orders", "--lead", str(leads[2])).output
