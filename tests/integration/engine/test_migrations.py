"""init-db：空库里建全部表；已有应用表的库里只建 schema etl，别的一概不动。"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa

from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, PermanentError
from etl_assets.core.postgres_binaries import find_binaries
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application, etl, installation
from etl_assets.migrations import upgrade
from etl_assets.migrations.upgrade import missing_migrations, upgrade_database
from etl_assets.testing.databases import cloned_database

APPLICATION_TABLES = {table.name for table in application.tables.values()}
ETL_TABLES = {table.name for table in etl.tables.values()} | {"schema_version"}


@pytest.fixture
def empty_database(postgres_url: str) -> Iterator[sa.Engine]:
    """什么也没有的数据库。"""
    with cloned_database(postgres_url, "template0") as url:
        engine = build_engine(EtlSettings(database_url=url))
        yield engine
        engine.dispose()


def dump(engine: sa.Engine) -> str:
    """pg_dump 说的一切：schema etl 以外的结构、权限、注释与数据。"""
    url = engine.url
    server = f"host={url.host} port={url.port} user={url.username} dbname={url.database}"
    # 不加 --restrict-key，每次的输出里就有一个随机的记号
    options = ["--exclude-schema=etl", "--restrict-key=same", "--inserts", f"--dbname={server}"]
    environment = os.environ | {"PGPASSWORD": url.password or ""}
    return subprocess.run([find_binaries(None) / "pg_dump", *options], env=environment, check=True, capture_output=True, text=True).stdout


def row_versions(engine: sa.Engine, table: str) -> list[str]:
    """每一行与写它的事务：原样重写过的，pg_dump 看不出来。"""
    with engine.connect() as connection:
        return list(connection.scalars(sa.text(f'SELECT concat(xmin, t) FROM "{table}" t ORDER BY 1')))  # noqa: S608  # 表名是本文件里的


def table_names(engine: sa.Engine, schema: str) -> set[str]:
    return set(sa.inspect(engine).get_table_names(schema))


def installations(engine: sa.Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(installation.c.installation_id)))


def create_application(engine: sa.Engine) -> None:
    """外围应用自己的库：有数据，比契约多一列、少一个索引，还有自己的表、视图、触发器与注释。"""
    application.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            DROP INDEX ix_raw_orders_ordered_at;
            ALTER TABLE orders ADD COLUMN colour text DEFAULT 'red';
            ALTER TABLE customers ALTER COLUMN customer_nickname SET NOT NULL;
            COMMENT ON TABLE raw_orders IS 'hands off';
            CREATE TABLE accounts (account_id serial PRIMARY KEY, name text CHECK (name <> ''));
            CREATE VIEW recent AS SELECT order_id FROM orders;
            CREATE FUNCTION noop() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
            CREATE TRIGGER watch BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION noop();
            INSERT INTO accounts (name) VALUES ('a');
            INSERT INTO raw_orders (order_id, shop) VALUES ('A-1', 'x');
            INSERT INTO shop_configs VALUES ('00000000-0000-4000-8000-000000000001', 'x', 'y');
        """)


def test_empty_database_gets_all_tables(empty_database: sa.Engine) -> None:
    assert upgrade_database(empty_database) is True
    assert table_names(empty_database, "public") == APPLICATION_TABLES
    assert table_names(empty_database, "etl") == ETL_TABLES
    assert len(installations(empty_database)) == 1


def test_second_time_changes_nothing(empty_database: sa.Engine) -> None:
    upgrade_database(empty_database)
    before = (dump(empty_database), installations(empty_database))
    assert upgrade_database(empty_database) is False
    assert (dump(empty_database), installations(empty_database)) == before
    assert table_names(empty_database, "etl") == ETL_TABLES


def test_database_of_a_newer_version_is_one_sentence(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE etl.schema_version SET version_num = '9999'")
    for look in (upgrade_database, missing_migrations):
        with pytest.raises(PermanentError, match=r"made by a newer version .*install that version again"):
            look(engine)


def test_existing_application_keeps_every_detail_and_only_schema_etl_is_added(empty_database: sa.Engine) -> None:
    create_application(empty_database)
    before = (dump(empty_database), row_versions(empty_database, "raw_orders"))
    assert "hands off" in before[0]
    assert upgrade_database(empty_database) is False
    assert (dump(empty_database), row_versions(empty_database, "raw_orders")) == before
    assert table_names(empty_database, "etl") == ETL_TABLES
    assert set(sa.inspect(empty_database).get_schema_names()) == {"public", "etl", "information_schema"}


def test_partly_existing_application_is_refused_and_nothing_is_created(empty_database: sa.Engine) -> None:
    create_application(empty_database)
    with empty_database.begin() as connection:
        connection.exec_driver_sql("DROP TABLE shop_configs, business_leads")
    before = dump(empty_database)
    with pytest.raises(PermanentError, match="but not business_leads, shop_configs: create the missing application tables"):
        upgrade_database(empty_database)
    assert dump(empty_database) == before
    assert "etl" not in sa.inspect(empty_database).get_schema_names()


def test_two_at_once_create_everything_once(empty_database: sa.Engine) -> None:
    start = Barrier(2)

    def initialize(_: int) -> bool:
        start.wait(timeout=20)
        return upgrade_database(empty_database)

    with ThreadPoolExecutor(2) as pool:
        created = list(pool.map(initialize, range(2)))
    assert sorted(created) == [False, True]
    assert table_names(empty_database, "etl") == ETL_TABLES
    assert len(installations(empty_database)) == 1


def test_role_that_may_not_create_is_told_what_it_needs(empty_database: sa.Engine) -> None:
    role, password = f"reader_{uuid4().hex[:12]}", uuid4().hex
    with empty_database.begin() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    url = empty_database.url.set(username=role, password=password).render_as_string(hide_password=False)
    reader = build_engine(EtlSettings(database_url=url))
    try:
        with pytest.raises(PermanentError, match="the role needs CREATE on the database"):
            upgrade_database(reader)
    finally:
        reader.dispose()
        with empty_database.begin() as connection:
            connection.exec_driver_sql(f"DROP ROLE {role}")
    assert table_names(empty_database, "public") == set()


def test_server_that_is_too_old_is_named_with_the_version_it_needs(empty_database: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "MINIMUM_SERVER_VERSION", 990000)
    with pytest.raises(DatabaseUnavailableError, match="is too old: version 99 or newer is needed"):
        upgrade_database(empty_database)
    assert table_names(empty_database, "public") == set()


def test_read_only_database_is_one_sentence(empty_database: sa.Engine) -> None:
    @sa.event.listens_for(empty_database, "connect")
    def _connect(connection: psycopg.Connection, _record: object) -> None:
        connection.execute("SET default_transaction_read_only = on")
        connection.commit()

    empty_database.dispose()
    with pytest.raises(DatabaseRefusedError, match="PostgreSQL is read-only"):
        upgrade_database(empty_database)


def test_missing_database_is_one_sentence_without_the_password(postgres_url: str) -> None:
    url = normalize_url(postgres_url).set(database="no_such_database")
    engine = build_engine(EtlSettings(database_url=url.render_as_string(hide_password=False)))
    with pytest.raises(DatabaseRefusedError, match=r"create it or correct the address: .*no_such_database") as caught:
        upgrade_database(engine)
    assert "\n" not in str(caught.value)
    assert url.password is None or url.password not in str(caught.value)
