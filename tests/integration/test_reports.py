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
from datetime import UTC, date, datetime, timedelta
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
from etl_assets.core.tables import import_tasks, target_tables
from etl_assets.customers.etl import materialize_customers
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.leads.etl import materialize_leads
from etl_assets.orders.etl import materialize_orders
from etl_assets.orders.of_lead import read_of_lead
from etl_assets.reports.progress import Progress, import_progress
from etl_assets.reports.reports import import_accounting
from etl_assets.reports.shown_rows import show_rejected, show_rows
from etl_assets.services.materialization import RunContext
from etl_assets.services.raw_rows import reject_rows_without_partition
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands

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


def test_every_row_of_an_import_is_accounted_for(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
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
    environment = {
        **os.environ,
        "ETL_DATABASE_URL": etl_settings.database_url,
        "COLUMNS": "250",
        "ETL_STATE_DIR": "/nonexistent",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "bridge.cli.main", *arguments], stdout=slave, stderr=slave, env=environment
    ):
        os.close(slave)
        written = b""
        with contextlib.suppress(OSError):  # 另一头关了
            while part := os.read(master, 65536):
                written += part
    os.close(master)
    return written


@pytest.mark.parametrize("how", ["table", "csv", "json"])
def test_name_of_a_buyer_does_nothing_to_the_terminal(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, how: str
) -> None:
    raw_data.add_import([{"customer_name": NASTY}])
    materialize_orders(engine, etl_settings, DAY, RUN)
    written = run_on_a_terminal(etl_settings, "show", "orders", "--format", how)
    assert b"HYPERLINK" in written
    assert [part for part in (b"\x1b]", b"\x07", "\u202e".encode()) if part in written] == []


def test_csv_for_a_spreadsheet_holds_no_formula(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show
) -> None:
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
    use_in_commands(monkeypatch, engine=engine, settings=etl_settings)
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


def test_rejected_rows_are_listed_with_their_values(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
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


def test_time_of_a_rejected_row_is_of_the_business_zone_as_its_day_is(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show
) -> None:
    times = ("2026-01-04 16:30:00+00", "294276-12-31 23:59:59+00", "4713-01-02 00:00:00+00 BC")
    import_id = raw_data.add_import([{"order_id": None, "ordered_at": at} for at in times])
    materialize_orders(engine, etl_settings, DAY, RUN)
    with engine.begin() as connection:
        reject_rows_without_partition(connection, etl_settings, [import_id])
    rows = json.loads(show("rejected", "--format", "json").output)
    assert (rows[-1]["day"], rows[-1]["ordered_at"]) == ("2026-01-05", "2026-01-05 00:30:00+08")
    assert len(rows) == 3


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


@pytest.mark.parametrize("limit", [1, 3, 20, 100])
@pytest.mark.parametrize("table", ["orders", "customers", "leads"])
def test_newest_rows_are_those_of_a_sort_of_the_whole_table(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, table: str, limit: int
) -> None:
    """不排整张表找出来的，还是那几行：最新的订单取消了的、一个人下了许多单的、没有时刻的都在内。"""
    morning = datetime(2026, 1, 5, 4, tzinfo=UTC)
    once = [
        {"order_id": f"A-{n}", "customer_name": f"客户{n}", "ordered_at": morning + timedelta(seconds=n)}
        for n in range(60)
    ]
    again = [
        {"order_id": f"B-{n}", "customer_name": "客户9", "ordered_at": morning + timedelta(hours=1, seconds=n)}
        for n in range(60)
    ]
    cancelled = [
        {"order_id": f"C-{n}", "customer_name": f"客户{n}", "order_status": "cancelled"} for n in range(50, 62)
    ]
    raw_data.add_import([*once, *again, *cancelled])
    for materialize in (materialize_orders, materialize_customers, materialize_leads):
        materialize(engine, etl_settings, DAY, RUN)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO orders (shop_id, order_id) VALUES ('00000000-0000-4000-8000-000000000001', 'of others')"
        )
        source, at = {
            "orders": ("orders", "ordered_at"),
            "customers": ("customers", "last_order_at"),
            "leads": ("business_leads", "last_order_at"),
        }[table]
        newest = f"SELECT {at} FROM {source} ORDER BY 1 DESC NULLS LAST LIMIT {limit}"  # noqa: S608 都是本测试的常量
        wanted = connection.exec_driver_sql(newest).scalars().all()
        rows = show_rows(connection, etl_settings, table, customer=None, day=None, limit=limit)
        assert [row[at] for row in rows] == wanted
        of_day = show_rows(connection, etl_settings, table, customer=None, day=DAY.first, limit=limit)
        assert [row[at] for row in of_day] == [moment for moment in wanted if moment is not None]
        assert not show_rows(connection, etl_settings, table, customer=None, day=date(2026, 1, 6), limit=limit)
        named = show_rows(connection, etl_settings, table, customer="户9", day=None, limit=limit)
        assert {row["customer_nickname"] for row in named} == {"客户9"}


def test_imports_that_did_not_complete_are_listed_by_when_they_were_made(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    at = [datetime(2026, 6, day, tzinfo=UTC) for day in range(1, 6)]
    done = [raw_data.add_import([], completed_at=moment) for moment in at]
    pending = [raw_data.add_import([], status="pending", completed_at=None) for _ in range(2)]
    with engine.begin() as connection:
        for import_id, moment in zip(pending, (at[2] + timedelta(hours=1), None), strict=True):
            connection.execute(
                sa.update(import_tasks).where(import_tasks.c.import_id == import_id).values(created_at=moment)
            )
        newest = [done[4], done[3], pending[0], done[2], done[1], done[0], pending[1]]
        for limit in (1, 3, None):
            assert [row["import_id"] for row in import_accounting(connection, etl_settings, limit=limit)] == newest[
                :limit
            ]


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
        mine = sa.select(leads.c.lead_no, leads.c.lead_id).where(
            leads.c.customer_global_id == UUID("fa55f60f-e32c-5a53-a54e-925cf73a97da")
        )
        return {row.lead_no: row.lead_id for row in connection.execute(mine)}


def test_orders_of_a_lead_are_those_it_was_dealt(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    leads = build_leads(engine, etl_settings, raw_data)
    with engine.connect() as connection:
        dealt = {
            no: [row["order_id"] for row in read_of_lead(connection, etl_settings, lead_id)]
            for no, lead_id in leads.items()
        }
    assert dealt == {1: ["C", "a"], 2: ["D"]}
    with engine.connect() as connection, pytest.raises(PermanentError, match="there is no lead 00000000"):
        read_of_lead(connection, etl_settings, UUID(int=0))


def test_show_orders_of_a_lead(engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, show: Show) -> None:
    leads = build_leads(engine, etl_settings, raw_data)
    listed = show("leads", "--format", "json")
    assert str(leads[1]) in listed.output
    rows = json.loads(show("orders", "--lead", str(leads[1]), "--format", "json").output)
    assert [(row["order_id"], row["amount"]) for row in rows] == [("C", "120.50"), ("a", "120.50")]
    assert "│ D" in show("orders", "--lead", str(leads[2])).output
