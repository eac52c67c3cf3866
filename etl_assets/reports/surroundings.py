"""数据库周围会害人的：时钟、行级安全、没有统计的表。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from etl_assets.core.etl_tables import etl
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, order_type_mappings, raw_orders, shop_configs, target_tables
from etl_assets.services.table_contract import HIDES_ROWS

_MOST_BYTES_WITHOUT_STATISTICS = 8 << 20


def clock_skew(connection: sa.Connection) -> timedelta:
    """这台机器的时钟比数据库的快多少；一问一答的一半算在里面。"""
    asked_at = datetime.now(UTC)
    theirs: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
    answered_at = datetime.now(UTC)
    return asked_at + (answered_at - asked_at) / 2 - theirs


def tables_with_row_security(connection: sa.Connection, settings: EtlSettings) -> Sequence[str]:
    """我们的角色也许看不见全部的行的那些表。"""
    return connection.scalars(_HIDING, {"names": _names(settings)}).all()


def tables_without_statistics(connection: sa.Connection, settings: EtlSettings) -> Sequence[str]:
    """不小，却从没有 ANALYZE 过的。"""
    return connection.scalars(_UNANALYZED, {"names": _names(settings), "bytes": _MOST_BYTES_WITHOUT_STATISTICS}).all()


def _names(settings: EtlSettings) -> list[str]:
    sources = (raw_orders, import_tasks, shop_configs, order_type_mappings)
    targets = target_tables(settings.target_schema).of_asset.values()
    return [table.fullname for table in (*sources, *targets, *etl.tables.values())]


_TABLES = """
    SELECT name FROM unnest(CAST(:names AS text[])) WITH ORDINALITY AS wanted (name, position)
    JOIN pg_class c ON c.oid = to_regclass(name)"""
_HIDING = sa.text(f"{_TABLES} WHERE {HIDES_ROWS} ORDER BY position")
_UNANALYZED = sa.text(
    f"{_TABLES} WHERE c.relkind = 'r' AND c.reltuples < 0 AND pg_relation_size(c.oid) > :bytes ORDER BY position"
)
