"""raw_orders 的页面写着最近的导入：一个传感器记下的观察，变了才记。"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import dagster as dg
import sqlalchemy as sa

from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks
from etl_assets.orchestration.automation import SHOWN_IMPORTS, imports_shown
from etl_assets.orchestration.resources import EtlDatabase
from etl_assets.orders.asset import orders
from etl_assets.testing.fixtures import MaterializeDays
from etl_assets.testing.raw_data import RawData

AT = datetime(2026, 6, 1, tzinfo=UTC)


def look(engine: sa.Engine, settings: EtlSettings, cursor: str | None) -> Any:
    database = EtlDatabase(engine, settings)
    return imports_shown(dg.build_sensor_context(cursor=cursor, resources={"database": database}))


def records_of(result: dg.SensorResult) -> list[dict[str, Any]]:
    (event,) = result.asset_events
    table: Any = event.metadata["newest_imports"].value
    return [dict(record.data) for record in table.records]


def test_newest_imports_are_noted_when_they_change(
    engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData
) -> None:
    assert isinstance(look(engine, etl_settings, None), dg.SkipReason)
    for number in range(SHOWN_IMPORTS + 5):
        newest = raw_data.add_import([{}] * 2, completed_at=AT + timedelta(minutes=number))
    with engine.begin() as connection:
        connection.execute(
            sa.update(import_tasks).where(import_tasks.c.import_id == newest).values(source_name="四月\u202e.csv")
        )
    first = look(engine, etl_settings, None)
    shown = records_of(first)
    assert (len(shown), shown[0]["import_id"]) == (SHOWN_IMPORTS, str(newest))
    assert (shown[0]["source_name"], shown[0]["rows"], shown[0]["status"]) == (r"四月\u202e.csv", 2, "completed")
    assert isinstance(look(engine, etl_settings, first.cursor), dg.SkipReason)
    raw_data.set_status(newest, "failed")
    assert records_of(look(engine, etl_settings, first.cursor))[0]["status"] == "withdrawn"


def test_observation_makes_nothing_stale_and_is_on_the_page(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    raw_data: RawData,
    materialize_days: MaterializeDays,
    dagster_instance: dg.DagsterInstance,
) -> None:
    raw_data.add_import([{}])
    (event,) = look(engine, etl_settings, None).asset_events
    dagster_instance.report_runless_asset_event(event)
    (observed,) = dagster_instance.fetch_observations(dg.AssetKey("raw_orders"), limit=1).records
    assert observed.asset_observation is not None
    assert observed.asset_observation.metadata["newest_rows"].value == 1
    (made,) = materialize_days([orders], date(2026, 1, 5)).get_asset_materialization_events()
    assert made.materialization.tags is not None
    assert made.materialization.tags["dagster/input_data_version/raw_orders"] == "INITIAL"
