"""给人看的查询：导入的进度与去向。"""

from __future__ import annotations

from datetime import date
from uuid import uuid4

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.customers.etl import materialize_customers
from etl_assets.leads.etl import materialize_leads
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.intake import ImportEvent, request_imports
from etl_assets.services.materialization import RunContext
from etl_assets.services.reports import Progress, import_accounting, import_progress
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
