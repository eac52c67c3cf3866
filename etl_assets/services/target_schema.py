"""目标 schema 的准备，在第一次运行之前：没有就建结果表；已有的结果是旧系统写的，它的订单先收进索引。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.database_errors import first_line, translated_errors
from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import TargetTables, target_tables
from etl_assets.services.order_index import adopt_all_orders
from etl_assets.services.table_contract import assert_table_contract

_PREPARE_LOCK = 0x45544D  # 两个 init-db 同时跑时排队


@dataclass(frozen=True)
class Preparation:
    """做了什么：建了哪些表，收进索引几个订单。"""

    created_tables: Sequence[str]
    adopted_orders: int


def prepare_target(engine: sa.Engine, settings: EtlSettings) -> Preparation:
    """可以重复做；改了 ETL_TARGET_SCHEMA 或 ETL_ROLLOUT 之后都要做一次。

    :raises PermanentError: 没有建表的权限，或已有的表与约定不符。
    """
    tables = target_tables(settings.target_schema)
    with translated_errors():
        with engine.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_PREPARE_LOCK)))
            created = create_missing_tables(connection, tables)
            assert_table_contract(connection, tables.schema)
        return Preparation(created_tables=created, adopted_orders=adopt_all_orders(engine, settings))


def create_missing_tables(connection: sa.Connection, tables: TargetTables) -> Sequence[str]:
    """ETL 自己的表缺哪张建哪张；应用的一张也没有才建，有一部分的由表的约定点名。"""
    there = set(sa.inspect(connection).get_table_names(tables.schema))
    given = [tables.of_asset[asset] for asset, description in descriptions().items() if description.application_table]
    left_to_the_application = given if any(table.name in there for table in given) else []
    missing = [
        table for table in tables.of_asset.values() if table.name not in there and table not in left_to_the_application
    ]
    if not missing:
        return ()
    try:
        if not sa.inspect(connection).has_schema(tables.schema):
            connection.execute(sa.schema.CreateSchema(tables.schema))
        tables.metadata.create_all(connection, tables=missing)
    except sa.exc.ProgrammingError as error:
        raise PermanentError(
            f"cannot create the result tables in ETL_TARGET_SCHEMA={tables.schema}: {first_line(error.orig)}; "
            "let a role with CREATE on the database run `etl init-db`, or create that schema and grant this role CREATE on it"
        ) from error
    return [table.name for table in missing]
