"""Dagster 代码位置的入口：找到各资产的文件夹，合并。"""

from __future__ import annotations

from dagster import AssetsDefinition, Definitions, in_process_executor

from etl_assets.core.asset_folders import asset_folders, import_of
from etl_assets.ledger.graph import GraphError
from etl_assets.orchestration.automation import (
    checks_job,
    etl_job,
    imports_shown,
    overdue_days,
    tables_checked,
    yesterday_again,
)
from etl_assets.orchestration.check_step import table_checks
from etl_assets.orchestration.graph import graph_of
from etl_assets.orchestration.resources import etl_database
from etl_assets.orchestration.table_metadata import SOURCES


def _asset_of(folder: str) -> AssetsDefinition:
    """:raises GraphError: 函数与文件夹不同名，例如照抄了别的文件夹。"""
    found = getattr(import_of(folder, "asset"), folder, None)
    if not isinstance(found, AssetsDefinition):
        raise GraphError(f"etl_assets/{folder}/asset.py has no asset {folder}: name its function like the folder")
    return found


_assets = [_asset_of(folder) for folder in asset_folders()]

defs = Definitions(
    assets=[*SOURCES, *_assets],
    asset_checks=[table_checks],
    jobs=[etl_job, checks_job],
    schedules=[yesterday_again, tables_checked],
    sensors=[overdue_days, imports_shown],
    resources={"database": etl_database},
    # 缺省的执行器给每一步起一个进程：工人里代码已经载入，就在它自己里面做
    executor=in_process_executor,
)
graph = graph_of(defs.assets or ())
"""台账走的图；不成立的在载入时就说，不等到哪个运行。"""
