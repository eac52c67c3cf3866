"""PostgreSQL 的角色：谁可以读、写哪些表，写成一段 SQL。谁也不是表的主人：改不了结构。"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import sqlalchemy as sa
from psycopg import sql

from etl_assets.core.database_errors import translated_errors
from etl_assets.core.etl_tables import etl, imported_files
from etl_assets.core.tables import (
    application_tables,
    import_tasks,
    order_type_mappings,
    raw_orders,
    shop_configs,
    target_tables,
)
from etl_assets.embedded.postgres_roles import SERVICE
from etl_assets.reports.readiness import rights_of_etl
from etl_assets.services.copy_out import driver_of

Rights = Mapping[str, Sequence[str]]

PREFIX = "dayline"
_GRANT_LOCK = 0x475241  # "GRA"
_READ = ("SELECT",)
_WRITE = ("SELECT", "INSERT", "UPDATE", "DELETE")
_IS_OWNER_OF_EMBEDDED = sa.text("""
    SELECT count(DISTINCT role.oid) = 2 FROM pg_auth_members AS member JOIN pg_roles AS role ON role.oid = member.roleid
    WHERE role.rolname IN (:service, :etl_role) AND member.member = CAST(current_user AS regrole) AND member.admin_option""")
_MAY_GIVE_MONITOR = sa.text("SELECT pg_has_role('pg_monitor', 'USAGE WITH ADMIN OPTION')")
_MEMBERS_OF_OPERATOR = ("etl", "importer", "reader")


def grants(prefix: str, target: str, dagster_schema: str) -> str:
    """可以重复执行的 SQL；由表的主人（执行 `etl init-db` 的）在数据库里执行。

    :param prefix: 角色名字的开头；角色属于整台服务器，两套安装要两个。
    """
    roles = _rights(target)
    statements = [
        *(_create_role(_role(prefix, name)) for name in roles),
        _on_database([_role(prefix, name) for name in roles]),
        *(statement for name, rights in roles.items() for statement in _on_tables(_role(prefix, name), rights)),
        *_of_later_tables(prefix),
        _on_dagster(_role(prefix, "etl"), dagster_schema),
        sql.SQL("GRANT {} TO {}").format(
            sql.SQL(", ").join(sql.Identifier(_role(prefix, name)) for name in _MEMBERS_OF_OPERATOR),
            sql.Identifier(_role(prefix, "operator")),
        ),
    ]
    return "".join(f"{statement.as_string()};\n" for statement in statements)


def renew_rights(engine: sa.Engine, *, target: str, dagster_schema: str) -> None:
    """内嵌的 PostgreSQL 里有了新的结果表，各进程也要用得到；别的服务器上由人执行 `etl grants`。"""
    with translated_errors(), engine.begin() as connection:
        if connection.scalar(_IS_OWNER_OF_EMBEDDED, {"service": SERVICE, "etl_role": _role(PREFIX, "etl")}):
            _grant(connection, target, dagster_schema)


def give_rights(engine: sa.Engine, login: sa.URL, *, target: str, dagster_schema: str) -> None:
    """让 login 的用户能登录，权限是 dayline_etl 的；由表的主人做，可以重复。别人的表 PostgreSQL 只警告一声，assert_rights 看得到。"""
    user, password = login.username or "", login.password or ""
    name, etl_role = sql.Identifier(user), sql.Identifier(_role(PREFIX, "etl"))
    with translated_errors(), engine.begin() as connection:
        _grant(connection, target, dagster_schema)
        driver = driver_of(connection)
        driver.execute(_create_role(user).as_bytes())
        # 口令不出现在语句里：出了错，服务器把语句记进日志
        secret = driver.pgconn.encrypt_password(password.encode(), user.encode(), b"scram-sha-256")
        driver.execute(sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(name, sql.Literal(secret.decode())))
        # 主人叫 etl，它没写 schema 的表在 schema etl 里：用这些表的模块照样找得到
        driver.execute(sql.SQL("ALTER ROLE {} SET search_path = etl, public").format(name))
        driver.execute(sql.SQL("GRANT {} TO {}").format(etl_role, name))
        # 放回来的旧数据文件夹里给不了；少的只是看不到别人的会话占着锁多久了
        if connection.scalar(_MAY_GIVE_MONITOR):
            driver.execute(sql.SQL("GRANT pg_monitor TO {}").format(name))


def _grant(connection: sa.Connection, target: str, dagster_schema: str) -> None:
    """两个 init-db 同时做会说 tuple concurrently updated，所以排队。"""
    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_GRANT_LOCK)))
    driver_of(connection).execute(grants(PREFIX, target, dagster_schema).encode())


def _role(prefix: str, name: str) -> str:
    return f"{prefix}_{name}"


def _rights(target: str) -> Mapping[str, Rights]:
    """角色 → 表 → 权限；operator 另外有前三个的。"""
    tables = [*application_tables(), *target_tables(target).of_asset.values(), *etl.tables.values()]
    return {
        "etl": rights_of_etl(target),
        "importer": {
            import_tasks.fullname: ("SELECT", "INSERT", "UPDATE"),
            raw_orders.fullname: ("SELECT", "INSERT"),
            # 只有 `etl import` 要：店铺认得吗，这份内容导入过吗
            shop_configs.fullname: _READ,
            imported_files.fullname: ("SELECT", "INSERT"),
        },
        "reader": {table.fullname: _READ for table in tables},
        "operator": {order_type_mappings.fullname: _WRITE, shop_configs.fullname: ("SELECT", "INSERT")},
    }


def _create_role(role: str) -> sql.Composed:
    return sql.SQL(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {name}) THEN CREATE ROLE {role} NOLOGIN; END IF; END $$"
    ).format(name=sql.Literal(role), role=sql.Identifier(role))


def _on_database(roles: Sequence[str]) -> sql.Composed:
    """临时表是 COPY 进来的第一站。"""
    return sql.SQL(
        "DO $$ BEGIN EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO {}', current_database()); END $$"
    ).format(sql.SQL(", ").join(map(sql.Identifier, roles)))


def _on_tables(role: str, rights: Rights) -> Iterator[sql.Composed]:
    for schema in sorted({name.partition(".")[0] for name in rights}):
        yield sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), sql.Identifier(role))
    together = defaultdict(list)
    for name, wanted in rights.items():
        together[tuple(wanted)].append(name)
    for wanted, names in together.items():
        yield sql.SQL("GRANT {} ON {} TO {}").format(
            sql.SQL(", ".join(wanted)),
            sql.SQL(", ").join(sql.Identifier(*name.split(".", 1)) for name in sorted(names)),
            sql.Identifier(role),
        )


def _of_later_tables(prefix: str) -> Iterator[sql.Composed]:
    """以后的迁移由同一个主人建的，与读版本的那一张。"""
    for name, wanted in (("etl", _WRITE), ("reader", _READ)):
        role = sql.Identifier(_role(prefix, name))
        yield sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA etl TO {}").format(role)
        yield sql.SQL("ALTER DEFAULT PRIVILEGES IN SCHEMA etl GRANT {} ON TABLES TO {}").format(
            sql.SQL(", ".join(wanted)), role
        )


def _on_dagster(role: str, schema: str) -> sql.Composed:
    """Dagster 的存储在这个数据库里时；在别的数据库里的，那里另做一遍。"""
    given = {"role": sql.Identifier(role), "schema": sql.Identifier(schema), "name": sql.Literal(schema)}
    return sql.SQL(
        "DO $$ BEGIN IF EXISTS (SELECT FROM pg_namespace WHERE nspname = {name}) THEN "
        "GRANT USAGE ON SCHEMA {schema} TO {role}; "
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}; "
        "GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role}; "
        "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role}; "
        "ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT USAGE, SELECT ON SEQUENCES TO {role}; END IF; END $$"
    ).format(**given)
