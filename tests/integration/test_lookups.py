"""应用自己建的表上缺的索引：看计划说缺哪个，`etl init-db --create-indexes` 一个一个建起来。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from uuid import uuid4

import psycopg.errors
import pytest
import sqlalchemy as sa

from etl_assets.core.database_sync import build_engine
from etl_assets.core.errors import PermanentError
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application_tables, order_id_key, raw_orders
from etl_assets.reports import index_building
from etl_assets.reports.index_building import create_indexes
from etl_assets.reports.lookups import IndexWork, find_index_work, lookups
from etl_assets.services.target_schema import prepare_target

OURS = {
    "ix_raw_orders_import_id",
    "ix_raw_orders_ordered_at",
    "ix_raw_orders_order",
    "ix_import_tasks_completed_at",
    "ix_public_orders_order_date",
    "ix_business_leads_unclosed",
    "ix_business_leads_left_behind",
}
KEY = str(order_id_key(raw_orders.c.order_id).compile(compile_kwargs={"literal_binds": True})).replace(
    "public.raw_orders.", ""
)
SIZES = {
    "empty": "",
    "vacuumed": "VACUUM ANALYZE import_tasks, raw_orders, orders, business_leads",
    "one row": """
        INSERT INTO import_tasks (import_id, status, completed_at) VALUES (gen_random_uuid(), 'completed', now());
        INSERT INTO raw_orders (import_id, order_id, shop, ordered_at) VALUES (gen_random_uuid(), 'A', 'x', now());
        INSERT INTO orders (shop_id, order_id, order_date) VALUES (gen_random_uuid(), 'A', '2026-01-05');
        INSERT INTO business_leads (lead_id, customer_global_id, lead_no, current_stage, last_order_at)
        VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'OPEN', now());
        ANALYZE import_tasks, raw_orders, orders, business_leads""",
    "many rows": """
        INSERT INTO raw_orders (import_id, order_id, shop, ordered_at)
        SELECT gen_random_uuid(), n, 'x', now() - n * interval '1 minute' FROM generate_series(1, 5000) n;
        ANALYZE import_tasks, raw_orders, orders, business_leads""",
}


@pytest.fixture
def merchant(engine: sa.Engine, execute: Callable[[str], None]) -> Iterator[sa.Engine]:
    """一个普通角色：读得了应用的表，建得了自己的。"""
    role, password = f"merchant_{uuid4().hex[:12]}", uuid4().hex
    execute(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'; GRANT {role} TO CURRENT_USER")
    execute(f"GRANT CREATE, USAGE ON SCHEMA public TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    own = build_engine(
        EtlSettings(database_url=engine.url.set(username=role, password=password).render_as_string(hide_password=False))
    )
    yield own
    own.dispose()
    execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def execute(engine: sa.Engine) -> Callable[[str], None]:
    """一条一条地，不在事务里。"""

    def run(statements: str) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for statement in filter(str.strip, statements.split(";")):
                connection.exec_driver_sql(statement)

    return run


def look(engine: sa.Engine, settings: EtlSettings) -> dict[str, IndexWork]:
    with engine.connect() as connection:
        return {str(work.lookup.index.name): work for work in find_index_work(connection, settings)}


def invalid_indexes(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        return set(
            connection.scalars(
                sa.text("SELECT relname FROM pg_index JOIN pg_class ON oid = indexrelid WHERE NOT indisvalid")
            )
        )


def abort_build(engine: sa.Engine, statement: str) -> None:
    """中断了的 CONCURRENTLY：等一个没有结束的事务，等不及了。"""
    with engine.connect() as blocker:
        blocker.execute(sa.text("LOCK TABLE raw_orders IN ROW EXCLUSIVE MODE"))
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.detach()
            connection.exec_driver_sql("SET statement_timeout = '300ms'")
            with pytest.raises(sa.exc.OperationalError) as caught:
                connection.exec_driver_sql(statement)
            assert isinstance(caught.value.orig, psycopg.errors.QueryCanceled)


def test_every_index_declared_on_tables_of_the_application_serves_a_lookup(etl_settings: EtlSettings) -> None:
    """声明了一个新的，就要有一种查找，否则没有人去看应用的表上有没有它。"""
    declared = {index.name for table in application_tables() for index in table.indexes}
    assert declared == {lookup.index.name for lookup in lookups(etl_settings)} == OURS


def test_indexes_of_init_db_are_found_and_missing_ones_named_whatever_the_size(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    for size, name in product(SIZES, sorted(OURS)):
        execute(SIZES[size])
        assert look(engine, etl_settings) == {}
        with engine.begin() as connection:
            (definition,) = connection.scalars(sa.text("SELECT pg_get_indexdef(to_regclass(:name))"), {"name": name})
        execute(f"DROP INDEX {name}")
        assert list(look(engine, etl_settings)) == [name], size
        execute(str(definition))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("ix_raw_orders_import_id", "CREATE INDEX ON raw_orders (import_id, raw_id) INCLUDE (shop)"),
        ("ix_raw_orders_import_id", "CREATE INDEX ON raw_orders USING hash (import_id)"),
        ("ix_raw_orders_import_id", "CREATE INDEX ON raw_orders (import_id) WHERE import_id IS NOT NULL"),
        ("ix_raw_orders_ordered_at", "CREATE INDEX ON raw_orders (ordered_at DESC, shop)"),
        ("ix_raw_orders_order", f"CREATE INDEX ON raw_orders ({KEY}, shop)"),
        (
            "ix_import_tasks_completed_at",
            "CREATE INDEX ON import_tasks (completed_at) WHERE status IN ('completed', 'failed')",
        ),
        ("ix_import_tasks_completed_at", "CREATE INDEX ON import_tasks (status, completed_at)"),
        ("ix_public_orders_order_date", "CREATE INDEX ON orders (order_date, shop_id)"),
        ("ix_business_leads_unclosed", "CREATE INDEX ON business_leads (closed_at, current_stage, last_order_at)"),
    ],
)
def test_index_of_another_name_that_serves_the_lookup_is_fine(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None], name: str, instead: str
) -> None:
    execute(f"DROP INDEX {name}; {instead}")
    for size in SIZES:
        execute(SIZES[size])
        assert look(engine, etl_settings) == {}, size


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("ix_raw_orders_import_id", "ON raw_orders (raw_id, import_id)"),
        ("ix_raw_orders_import_id", "ON raw_orders USING brin (import_id)"),
        ("ix_raw_orders_import_id", "ON raw_orders (import_id) WHERE ordered_at > '2026-01-01'"),
        ("ix_raw_orders_ordered_at", "ON raw_orders (ordered_at) WHERE ordered_at > '2026-01-01'"),
        ("ix_raw_orders_ordered_at", "ON raw_orders (shop, ordered_at)"),
        ("ix_raw_orders_order", "ON raw_orders (order_id)"),
        ("ix_raw_orders_order", "ON raw_orders (btrim(order_id))"),
        ("ix_raw_orders_order", f'ON raw_orders (({KEY}) COLLATE "C")'),
        ("ix_import_tasks_completed_at", "ON import_tasks (completed_at) WHERE status = 'failed'"),
        ("ix_import_tasks_completed_at", "ON import_tasks (created_at, completed_at)"),
        ("ix_business_leads_unclosed", "ON business_leads (current_stage) WHERE closed_at IS NULL"),
        ("ix_business_leads_unclosed", "ON business_leads (last_order_at, current_stage) WHERE closed_at IS NULL"),
        ("ix_business_leads_left_behind", "ON business_leads (customer_global_id) WHERE lead_no IS NOT NULL"),
    ],
)
def test_index_of_the_right_name_that_does_not_serve_is_not_enough(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None], name: str, instead: str
) -> None:
    """它归别人，名字让给它；两个都在，也看得出有一个走得成。"""
    execute(f"DROP INDEX {name}; CREATE INDEX {name} {instead}")
    for size in SIZES:
        execute(SIZES[size])
        (work,) = look(engine, etl_settings).values()
        assert (work.lookup.index.name, work.name) == (name, f"{name}_2"), size
        execute("; ".join(work.statements))
        assert look(engine, etl_settings) == {}, size
        execute(f"DROP INDEX {name}_2")


def test_columns_of_the_application_may_be_varchar_or_have_a_collation_of_their_own(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    execute("""
        ALTER TABLE raw_orders ALTER order_id TYPE varchar(600);
        ALTER TABLE import_tasks ALTER status TYPE varchar(20);
        ALTER TABLE business_leads ALTER current_stage TYPE varchar(20)""")
    assert look(engine, etl_settings) == {}
    execute('ALTER TABLE raw_orders ALTER order_id TYPE text COLLATE "C"')
    assert look(engine, etl_settings) == {}
    execute("DROP INDEX ix_raw_orders_order, ix_business_leads_unclosed")
    assert create_indexes(engine, etl_settings, [].append) == 2


def test_everything_missing_is_built_one_after_the_other(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    execute(f"DROP INDEX {', '.join(OURS)}")
    assert set(look(engine, etl_settings)) == OURS
    said: list[str] = []
    assert create_indexes(engine, etl_settings, said.append) == len(OURS)
    assert said[0] == "1 of 7: CREATE INDEX CONCURRENTLY ix_raw_orders_import_id ON public.raw_orders (import_id)"
    assert "3 of 7: ANALYZE public.raw_orders" in said
    assert look(engine, etl_settings) == {}
    assert create_indexes(engine, etl_settings, said.append) == 0


def test_tables_of_another_target_schema_are_looked_at_instead(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    shadow = etl_settings.model_copy(update={"target_schema": "Trial 1"})
    prepare_target(engine, shadow)
    assert look(engine, shadow) == {}
    execute("DROP INDEX ix_public_orders_order_date, ix_business_leads_unclosed")
    assert look(engine, shadow) == {}
    execute('DROP INDEX "Trial 1"."ix_Trial 1_orders_order_date", "Trial 1".ix_business_leads_left_behind')
    assert set(look(engine, shadow)) == {"ix_Trial 1_orders_order_date", "ix_business_leads_left_behind"}
    assert create_indexes(engine, shadow, [].append) == 2
    assert look(engine, shadow) == {}
    assert set(look(engine, etl_settings)) == {"ix_public_orders_order_date", "ix_business_leads_unclosed"}


def test_index_of_an_aborted_build_is_dropped_and_built_again(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    execute("DROP INDEX ix_raw_orders_import_id")
    abort_build(engine, "CREATE INDEX CONCURRENTLY ix_raw_orders_import_id ON raw_orders (import_id)")
    (work,) = look(engine, etl_settings).values()
    assert "ix_raw_orders_import_id on public.raw_orders is INVALID" in work.says
    assert work.statements == (
        "DROP INDEX CONCURRENTLY public.ix_raw_orders_import_id",
        "CREATE INDEX CONCURRENTLY ix_raw_orders_import_id ON public.raw_orders (import_id)",
    )
    assert create_indexes(engine, etl_settings, [].append) == 1
    assert (look(engine, etl_settings), invalid_indexes(engine)) == ({}, set())


def test_invalid_index_beside_one_that_serves_is_only_dropped(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    execute("ALTER INDEX ix_raw_orders_import_id RENAME TO by_import")
    abort_build(engine, "CREATE INDEX CONCURRENTLY ix_raw_orders_import_id ON raw_orders (import_id)")
    (work,) = look(engine, etl_settings).values()
    assert "no index" not in work.says
    assert work.statements == ("DROP INDEX CONCURRENTLY public.ix_raw_orders_import_id",)
    create_indexes(engine, etl_settings, [].append)
    assert invalid_indexes(engine) == set()


def test_index_that_is_being_built_is_left_alone_and_progress_is_said(
    engine: sa.Engine,
    merchant: sa.Engine,
    etl_settings: EtlSettings,
    execute: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """一个在建，等着一个没有结束的事务：说等着谁；第二个不等也不动它。看的人只是普通角色。"""
    monkeypatch.setattr(index_building, "PROGRESS_SECONDS", 0.05)
    execute("DROP INDEX ix_raw_orders_import_id")
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool, engine.connect() as blocker:
        blocker.execute(sa.text("LOCK TABLE raw_orders IN ROW EXCLUSIVE MODE"))
        pid = blocker.scalar(sa.text("SELECT pg_backend_pid()"))
        building = pool.submit(create_indexes, engine, etl_settings, said.append)
        while not any(f"(process {pid})" in text for text in said):
            assert not building.done()
        (work,) = look(merchant, etl_settings).values()
        assert "one is being built on that table now" in work.says
        assert work.statements == ()
        with pytest.raises(PermanentError, match="another `etl init-db --create-indexes` is at work"):
            create_indexes(engine, etl_settings, [].append)
        blocker.rollback()
        assert building.result(timeout=30) == 1
    assert look(engine, etl_settings) == {}


def test_role_that_does_not_own_the_table_is_told_what_its_owner_has_to_run(
    engine: sa.Engine, merchant: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    """别的表的照样建。"""
    execute(
        f"DROP INDEX ix_raw_orders_ordered_at, ix_public_orders_order_date; ALTER TABLE orders OWNER TO {merchant.url.username}"
    )
    said: list[str] = []
    with pytest.raises(PermanentError, match="1 indexes are still missing or INVALID"):
        create_indexes(merchant, etl_settings, said.append)
    statement = "CREATE INDEX CONCURRENTLY ix_raw_orders_ordered_at ON public.raw_orders (ordered_at)"
    assert any(
        f"must be owner of table raw_orders): let {engine.url.username} run, one by one: {statement}" in text
        for text in said
    )
    assert list(look(engine, etl_settings)) == ["ix_raw_orders_ordered_at"]


def test_partitioned_table_and_view_are_told_what_fits_them(
    engine: sa.Engine, etl_settings: EtlSettings, execute: Callable[[str], None]
) -> None:
    execute(
        """
        ALTER TABLE raw_orders RENAME TO old_raw_orders;
        CREATE TABLE public.raw_orders (LIKE old_raw_orders) PARTITION BY RANGE (ordered_at);
        CREATE TABLE public.raw_2025 PARTITION OF raw_orders FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
        CREATE TABLE public.raw_2026 PARTITION OF raw_orders FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
        CREATE INDEX ON raw_2025 (import_id)"""
    )
    found = look(engine, etl_settings)
    assert set(found) == {"ix_raw_orders_import_id", "ix_raw_orders_ordered_at", "ix_raw_orders_order"}
    with pytest.raises(PermanentError, match="3 indexes are still missing"):
        create_indexes(engine, etl_settings, [].append)
    assert found["ix_raw_orders_import_id"].name == "ix_raw_orders_import_id_2"
    for work in found.values():
        assert "in a quiet hour" in work.says
        execute("; ".join(work.statements))
    assert look(engine, etl_settings) == {}
    execute(
        "DROP TABLE raw_orders;"
        "CREATE VIEW public.raw_orders AS SELECT * FROM old_raw_orders JOIN (SELECT count(*) FROM shop_configs) s ON true"
    )
    assert look(engine, etl_settings) == {}
    execute("DROP INDEX ix_raw_orders_import_id")
    (work,) = look(engine, etl_settings).values()
    assert "give the tables behind it such an index" in work.says
    assert work.statements == ()


def test_looking_changes_no_setting_of_the_session(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    with engine.connect() as connection:
        find_index_work(connection, etl_settings)
        assert connection.scalar(sa.text("SELECT current_setting('enable_seqscan')")) == "on"
        assert connection.scalar(sa.text("SELECT count(*) FROM raw_orders")) == 0
