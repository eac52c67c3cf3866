"""一天的结果除了它的行还取决于什么：店铺、类型映射、DOMAIN 点名的设置、表还是不是那张表。变了，这一天就要整天重做。"""

from __future__ import annotations

import json
from functools import lru_cache

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import DIALECT, import_tasks, order_type_mappings, raw_orders, shop_configs, target_tables
from etl_assets.ledger.marking import Fingerprint

RULES = 1
"""评判与换算的规则改了，就加一：先前做完的日子都要整天重做。"""

_SETTINGS = {"timezone", "partitions_start", "cancelled_statuses", "completed_statuses", "cold_after_days", "rollout"}


def fingerprint(settings: EtlSettings) -> Fingerprint:
    """此刻的指纹。"""
    text = json.dumps([RULES, settings.model_dump(mode="json", include=_SETTINGS)], sort_keys=True)
    return Fingerprint(_fingerprint(settings.target_schema), {"settings": text})


@lru_cache(maxsize=8)
def _fingerprint(schema: str) -> sa.ScalarSelect[str]:
    """表的文件换了也算变：那是从备份里恢复的、清空了再装的，不是我们写的。"""
    tables = target_tables(schema)
    written = (tables.orders, tables.customers, tables.leads)
    names = [DIALECT.identifier_preparer.format_table(table) for table in (raw_orders, import_tasks, *written)]
    files = [sa.func.pg_relation_filenode(sa.func.to_regclass(name)) for name in names]
    mappings = order_type_mappings.c
    shops = _rows(shop_configs.c.shop_id, shop_configs.c.shop_name)
    types = _rows(mappings.raw_order_type, mappings.system_order_type)
    parts = [sa.bindparam("settings", type_=sa.Text), shops, types, *files]
    return sa.select(sa.func.md5(sa.func.concat_ws("\n", *parts), type_=sa.Text())).scalar_subquery()


def _rows(key: sa.ColumnElement[object], value: sa.ColumnElement[object]) -> sa.ScalarSelect[str]:
    """小表的全部行写成一串文字。"""
    # 要排序：不然同样的行换个物理次序，指纹就变，每一天都整天重做
    return sa.select(
        sa.cast(sa.func.array_agg(pg.aggregate_order_by(sa.func.row(key, value), key)), sa.Text)
    ).scalar_subquery()
