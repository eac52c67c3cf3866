"""init-db：空库里建全部表；已有应用表的库里只建 schema etl，别的一概不动。"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa

from etl_assets.core.backoff import Backoff
from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, PermanentError
from etl_assets.core.etl_tables import etl, installation, order_index
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application_tables, import_tasks
from etl_assets.embedded.postgres_binaries import find_binaries
from etl_assets.intake.waiting_events import Patience, look_after_waiting_events
from etl_assets.migrations import upgrade
from etl_assets.migrations.upgrade import missing_migrations, upgrade_database
from etl_assets.reports.progress import import_progress
from etl_assets.services.target_schema import prepare_target
from etl_assets.testing.databases import cloned_database
from tests.integration.engine.chain import Chain
from tests.integration.engine.extra_assets import extras
from tests.the_three import graph

APPLICATION_TABLES = {table.name for table in application_tables()}
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
    return subprocess.run(
        [find_binaries(None) / "pg_dump", *options], env=environment, check=True, capture_output=True, text=True
    ).stdout


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
    with engine.begin() as connection:
        for table in application_tables():
            table.create(connection)
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


def test_database_of_version_0005_gets_the_new_indexes_where_the_tables_are_its_own(
    empty_database: sa.Engine, etl_settings: EtlSettings
) -> None:
    """结果表是应用自己的 public 与 init-db 建的影子：只有影子加索引。客户的名字再长也换得成。"""
    engine = empty_database
    upgrade_database(engine)
    prepare_target(engine, etl_settings.model_copy(update={"target_schema": "trial"}))
    wanted = index_definitions(engine, "etl"), index_definitions(engine, "trial")
    insert = sa.insert(order_index).values(target="public", shop_id=uuid4(), order_id="A", customer_key="客" * 9000)
    with engine.begin() as connection:
        connection.execute(insert)
        connection.exec_driver_sql("""
            DROP INDEX etl.ix_order_index_customer, public.ix_public_orders_order_date;
            DROP INDEX public.ix_business_leads_unclosed, public.ix_business_leads_left_behind;
            DROP INDEX etl.ix_ledger_materialized_at, etl.ix_order_index_order_date;
            DROP INDEX trial.ix_business_leads_unclosed, trial.ix_business_leads_left_behind;
            CREATE INDEX ix_order_index_customer ON etl.order_index USING hash (customer_key);
            ALTER TABLE etl.ledger DROP COLUMN changed_since, DROP COLUMN changed_until, DROP COLUMN fingerprint, DROP COLUMN scope;
            ALTER TABLE etl.stale_customers DROP COLUMN day;
            CREATE INDEX ix_stale_customers ON etl.stale_customers (target, asset);
            DROP TABLE etl.day_accounts, etl.counted_imports, etl.assets, etl.graphs, etl.absent_assets, etl.imported_files, etl.retention;
            DROP TABLE etl.failed_runs, etl.alerts, etl.alert_watches;
            ALTER TABLE etl.import_events DROP COLUMN stored_at, DROP COLUMN import_status;
            UPDATE etl.schema_version SET version_num = '0005';
        """)
    own = index_definitions(engine, "public")
    upgrade_database(engine)
    assert (index_definitions(engine, "etl"), index_definitions(engine, "trial")) == wanted
    assert index_definitions(engine, "public") == own


def test_database_of_the_version_before_goes_on_where_it_was(
    empty_database: sa.Engine, etl_settings: EtlSettings
) -> None:
    """0009.sql 是那一版真的写下的：1 月 6 日的客户、7 日的订单到期，一个事件等着它的导入。还没有工人载入过新的代码。"""
    engine = empty_database
    written = (Path(__file__).parent / "versions" / "0009.sql").read_bytes()  # 里面有 CR，一个也不能换
    with psycopg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False)) as connection:
        connection.execute(written)
    upgrade_database(engine)
    prepare_target(engine, etl_settings)
    extras.create(engine)
    chain = Chain(engine, etl_settings)
    assert chain.graph == graph
    chain.execute(sa.update(import_tasks).where(import_tasks.c.import_id == UUID(int=4)).values(status="completed"))
    look = look_after_waiting_events(engine, etl_settings, Patience(Backoff(1, 1), limit_seconds=1e9))
    assert (look.requested, look.waiting) == (1, 0)
    chain.use_graph(graph)  # 这时一个工人载入了代码
    chain.run_due()
    made = sorted((report.days.first.day, report.days.last.day, report.asset) for report in chain.reports)
    assert made == [
        (5, 5, "customers"),
        (5, 5, "leads"),
        (5, 5, "orders"),
        (6, 6, "customers"),
        (6, 6, "leads"),
        (7, 8, "customers"),
        (7, 8, "leads"),
        (7, 8, "orders"),
    ]
    chain.assert_converged()
    with engine.connect() as reading:
        progress = [import_progress(reading, etl_settings, UUID(int=number)) for number in (1, 2, 3, 4)]
    assert [(one.handled, one.days, one.done, one.held) for one in progress] == [
        (True, 2, 2, 0),
        (True, 1, 1, 0),
        (True, 1, 1, 0),
        (True, 2, 2, 0),
    ]


def test_upgrade_that_meets_a_deadlock_with_a_working_process_is_done_again(empty_database: sa.Engine) -> None:
    """旧版本的进程还做着：它读着迁移要改的表，又来要迁移已经锁住的。"""
    engine = empty_database
    written = (Path(__file__).parent / "versions" / "0009.sql").read_bytes()
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    waiting = "SELECT FROM pg_locks WHERE relation = 'etl.import_events'::regclass AND NOT granted"
    with (
        psycopg.connect(url) as working,
        psycopg.connect(url, autocommit=True) as looking,
        ThreadPoolExecutor() as pool,
    ):
        working.execute(written)
        working.commit()
        working.execute("SELECT FROM etl.import_events")
        upgrading = pool.submit(upgrade_database, engine)
        while not looking.execute(waiting).rowcount:
            assert not upgrading.done(), upgrading.result()
            time.sleep(0.01)
        working.execute("LOCK TABLE etl.schema_version")  # 它先等的，先看出死锁的也是它
        working.commit()
        assert upgrading.result(60) is False
    assert missing_migrations(engine) == []


def index_definitions(engine: sa.Engine, schema: str) -> list[str]:
    definitions = sa.text("SELECT indexdef FROM pg_indexes WHERE schemaname = :schema ORDER BY indexdef")
    with engine.connect() as connection:
        return list(connection.scalars(definitions, {"schema": schema}))


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
    with pytest.raises(
        PermanentError, match="but not business_leads, shop_configs: create the missing application tables"
    ):
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


def test_server_that_is_too_old_is_named_with_the_version_it_needs(
    empty_database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
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
