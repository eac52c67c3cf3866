"""演示的步骤：样例的订单类型、导入并公布、汇总。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bridge.demo.dataset import ORDER_TYPES
from bridge.events import DataImportCompleted, publish_event_sync
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.imports.loading import import_file
from bridge.imports.reading import ImportReport
from bridge.imports.rules.profile import Profile
from etl_assets.core.etl_tables import rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import order_type_mappings, target_tables


def map_order_types(engine: sa.Engine) -> None:
    """样例里的订单类型；“现货订单”故意不映射。"""
    rows = [{"raw_order_type": raw, "system_order_type": system} for raw, system in ORDER_TYPES.items()]
    with engine.begin() as connection:
        connection.execute(sa.insert(order_type_mappings), rows)


def import_and_publish(
    engine: sa.Engine, settings: EtlSettings, path: Path, *, profile: Profile | None, create_shops: bool
) -> ImportReport:
    """一批：导入，再公布。"""
    report = import_file(engine, path, settings=settings, profile=profile, create_shops=create_shops)
    if report.import_id is not None:
        publish_event_sync(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=report.import_id))
    return report


def summarize(
    engine: sa.Engine, settings: EtlSettings, completions: Sequence[tuple[str, dict[str, Any]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """每个资产一行，商机每个阶段一行。表里的行数来自数据库；运行、天数与秒数来自完成事件（资产、事件内容）。"""
    tables = target_tables(settings.target_schema)
    with engine.connect() as connection:
        rejected = connection.scalar(sa.select(sa.func.count()).select_from(rejected_rows))
        counts = {
            name: connection.scalar(sa.select(sa.func.count()).select_from(table))
            for name, table in tables.of_asset.items()
        }
        stages = connection.execute(
            sa.select(tables.leads.c.current_stage.label("stage"), sa.func.count().label("leads"))
            .group_by(tables.leads.c.current_stage)
            .order_by(tables.leads.c.current_stage)
        )
        lead_stages = [dict(row) for row in stages.mappings()]
    done = [(asset, event) for asset, event in completions if event["status"] != "failed"]
    assets = [
        {
            "asset": name,
            "rows": rows,
            "rejected": rejected if name == "orders" else 0,
            "runs": sum(asset == name for asset, _ in done),
            "days": sum(len(event["partitions"]) for asset, event in done if asset == name),
            "seconds": round(sum(event["duration_seconds"] for asset, event in done if asset == name), 2),
        }
        for name, rows in counts.items()
    ]
    return assets, lead_stages
