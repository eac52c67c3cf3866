"""数据库让不让我们做：可写、该有的表、权限、表的约定。只看；监听器与工人撞上的墙，doctor 与 status 由此说出来。"""

from __future__ import annotations

import sqlalchemy as sa

from etl_assets.core.database_errors import READ_ONLY
from etl_assets.core.errors import DatabaseRefusedError
from etl_assets.core.etl_tables import etl
from etl_assets.core.tables import import_tasks, order_type_mappings, raw_orders, shop_configs, target_tables
from etl_assets.embedded.postgres_roles import SERVICE
from etl_assets.services.table_contract import assert_table_contract

_READ = ["SELECT"]
_WRITE = ["SELECT", "INSERT", "UPDATE", "DELETE"]
_SHOWN = 5


def assert_usable(connection: sa.Connection, target: str) -> None:
    """:raises DatabaseRefusedError: 第一个不让做的原因，与怎么办。"""
    assert_runnable(connection, target)
    assert_rights(connection, target)


def assert_runnable(connection: sa.Connection, target: str) -> None:
    """工人起来时、撞过墙之后看的：能写，表都在。权限不看：缺的那一个可能从来用不着。

    :raises DatabaseRefusedError: 领了日子也做不成。
    """
    assert_writable(connection)
    there = set(connection.scalars(_TABLES, {"names": sorted(etl.tables)}))
    if missing := [name for name in sorted(etl.tables) if name not in there]:
        raise DatabaseRefusedError(
            f"{_listed(missing)} {'is' if len(missing) == 1 else 'are'} missing: run `etl init-db`"
        )
    assert_table_contract(connection, target)


def assert_writable(connection: sa.Connection) -> None:
    """:raises DatabaseRefusedError: 新的事务只能读；这个会话过后还会是只读，所以不还给连接池。"""
    is_standby, is_read_only = connection.execute(_WRITABLE).one()
    if is_standby or is_read_only:
        connection.invalidate()
    if is_standby:
        raise DatabaseRefusedError("the server is a read-only standby: point ETL_DATABASE_URL at the primary")
    if is_read_only:
        raise DatabaseRefusedError(READ_ONLY)


def assert_rights(connection: sa.Connection, target: str) -> None:
    """ETL 写的表、读的表，这个角色能不能用；内嵌的服务器上，栈的进程的角色也要能用。

    :raises DatabaseRefusedError: 点名缺的。
    """
    own = str(connection.scalar(sa.text("SELECT current_user")))
    if lacking := _lacking(connection, own, target):
        raise DatabaseRefusedError(f"the role of ETL_DATABASE_URL lacks {_listed(lacking)}: grant it")
    assert_rights_of_service(connection, target)


def assert_rights_of_service(connection: sa.Connection, target: str) -> None:
    """内嵌的服务器上，栈的进程不以主人登录；别的服务器上没有这个角色。

    :raises DatabaseRefusedError: 点名缺的。
    """
    if connection.scalar(_HAS_SERVICE, {"service": SERVICE}) and (lacking := _lacking(connection, SERVICE, target)):
        raise DatabaseRefusedError(
            f"{SERVICE}, as whom the stack's processes log in, lacks {_listed(lacking)}: run `etl init-db`; "
            "where that does not help, the owner of the table grants it to dayline_etl"
        )


def _lacking(connection: sa.Connection, role: str, target: str) -> list[str]:
    wanted = rights_of_etl(target)
    asked = {"role": role, "schemas": sorted({name.partition(".")[0] for name in wanted})}
    lacking = [f"USAGE on schema {name}" for name in connection.scalars(_LACKING_SCHEMAS, asked)]
    found = {row.name: row.rights for row in connection.execute(_RIGHTS, asked)}
    lacking += [
        f"{', '.join(rights)} on {name}"
        for name, wanted_rights in wanted.items()
        if name in found and (rights := [right for right in wanted_rights if right not in found[name]])
    ]
    if not connection.scalar(_MAY_STAGE, asked):
        lacking.append("TEMPORARY on the database")
    return lacking


def rights_of_etl(target: str) -> dict[str, list[str]]:
    """监听器与工人的角色要的：表 → 权限。应用的表只读。"""
    return {
        **{table.fullname: _READ for table in (raw_orders, import_tasks, shop_configs, order_type_mappings)},
        **{table.fullname: _WRITE for table in target_tables(target).of_asset.values()},
        **{table.fullname: _WRITE for table in etl.tables.values()},
    }


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


_WRITABLE = sa.text("SELECT pg_is_in_recovery(), current_setting('transaction_read_only')::bool")
_TABLES = sa.text("SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(name) IS NOT NULL")
_HAS_SERVICE = sa.text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :service)")
_MAY_STAGE = sa.text("SELECT has_database_privilege(CAST(:role AS name), current_database(), 'TEMPORARY')")
_LACKING_SCHEMAS = sa.text("""
    SELECT nspname FROM pg_namespace
    WHERE nspname = ANY (:schemas) AND NOT has_schema_privilege(CAST(:role AS name), oid, 'USAGE') ORDER BY nspname""")
_RIGHTS = sa.text("""
    SELECT n.nspname || '.' || c.relname AS name,
           ARRAY(
               SELECT wanted FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS wanted
               WHERE has_table_privilege(CAST(:role AS name), c.oid, wanted)
           ) AS rights
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = ANY (:schemas) AND c.relkind IN ('r', 'p', 'v', 'm', 'f')""")
