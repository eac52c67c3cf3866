"""别人在角色或数据库上设的（ALTER ROLE … SET、ALTER DATABASE … SET，数据库的语言）：结果一样，领取照样互斥。"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import polars as pl
import pytest
import sqlalchemy as sa

from bridge.stack.dagster_home import build_dagster_postgres_url
from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded import embedded_postgres
from etl_assets.ledger.claims import Claim, claim_due_days
from etl_assets.services.vectorized_queries import copy_into, create_staging, read_frame
from etl_assets.testing.databases import database_url, initialize_database
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.interleaving import is_anyone_waiting, wait_until
from tests.the_three import graph

HOLDERS = {"database": "ALTER DATABASE {name}", "role": "ALTER ROLE CURRENT_USER IN DATABASE {name}"}
ISOLATION = "default_transaction_isolation"
FOREIGN: dict[str, dict[str, str]] = {
    "SQL dates": {"datestyle": "'SQL, DMY'"},
    "German dates": {"datestyle": "'German'"},
    "Latin text": {"client_encoding": "'LATIN1'"},
    "bytes for text": {"client_encoding": "'SQL_ASCII'"},
    "repeatable read": {ISOLATION: "'repeatable read'"},
    "serializable": {ISOLATION: "'serializable'"},
    "all at once": {
        "datestyle": "'Postgres, DMY'",
        "intervalstyle": "'sql_standard'",
        "client_encoding": "'GBK'",
        "timezone": "'America/New_York'",
        "timezone_abbreviations": "'Australia'",
        "extra_float_digits": "-15",
        "bytea_output": "'escape'",
        "standard_conforming_strings": "off",
        "backslash_quote": "off",
        "array_nulls": "off",
        "transform_null_equals": "on",
        "quote_all_identifiers": "on",
        "search_path": "'nowhere, pg_temp'",
        "client_min_messages": "'debug1'",
        "work_mem": "'64kB'",
        "plan_cache_mode": "'force_generic_plan'",
        "statement_timeout": "1",
        "lock_timeout": "1",
        ISOLATION: "'serializable'",
    },
}
ROWS = [
    {
        "order_id": f"订单-{number}",
        "customer_name": '引号"逗号,反斜杠\\',
        "amount": "-0.10",
        "ordered_at": datetime(2026, 1, 5, 4, 0, 0, number, UTC),
    }
    for number in range(200)
]


@contextmanager
def with_settings(chain: Chain, holder: str, settings: dict[str, str]) -> Iterator[Chain]:
    """同一个数据库，设置换了之后才连上的资产链。"""
    alter = HOLDERS[holder].format(name=chain.engine.url.database)
    statements = [f"{alter} SET {name} = {value}" for name, value in settings.items()]
    execute(chain.engine, *statements)
    engine = build_engine(chain.settings)
    try:
        yield Chain(engine, chain.settings)
    finally:
        engine.dispose()
        execute(chain.engine, f"{alter} RESET ALL")


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_result_is_the_same_under_settings_of_the_role_or_the_database(
    chain: Chain, raw_data: RawData, holder: str, kind: str
) -> None:
    """一两行与几百行各有一种读法。"""
    import_id = raw_data.add_import(ROWS if holder == "database" else ROWS[:2])
    wanted = chain.expected()
    with with_settings(chain, holder, FOREIGN[kind]) as foreign:
        foreign.announce(import_id)
        foreign.run_due()
    chain.assert_converged(wanted)


LOCALE = "tr_TR.UTF-8"
"""不按码位排，大写的 I 也不变成 i。"""
UNORDERED = [
    {"order_id": order_id, "customer_name": customer, "order_status": status, "ordered_at": ROWS[number]["ordered_at"]}
    for number, (order_id, customer, status) in enumerate(
        zip(
            ["a-1", "A-1", "B 2", "b-2", "ä", "Z", "i", "I", "İ", "ı", "-", "_9", "订单", "单"],
            ["Ida", "IDA", "ida", "İda", "ıda", "Zoe", "ärger", "zoe", "B", "a", "A b", "a-b", "张三", "李四"],
            ["CANCELLED", "cancelled", "CLOSED", "COMPLETED", "Delivered", "paid", "REFUNDED"] * 2,
            strict=True,
        )
    )
]


@pytest.fixture
def turkish_chain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chain]:
    """自己的服务器，数据库的语言是土耳其语；语言的数据临时编译，别的账户也要读得到。"""
    compiler = shutil.which("localedef")
    if compiler is None or not Path("/usr/share/i18n/locales/tr_TR").exists():
        pytest.skip("there is no localedef, or no source of the locale tr_TR")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        subprocess.run([compiler, "-i", "tr_TR", "-f", "UTF-8", str(folder / LOCALE)], check=True)
        monkeypatch.setitem(embedded_postgres._ENVIRONMENT, "LOCPATH", name)
        with embedded_postgres.EmbeddedPostgres(folder / "server", durable=False) as url:
            server = sa.create_engine(normalize_url(url), isolation_level="AUTOCOMMIT", poolclass=sa.pool.NullPool)
            with server.connect() as connection:
                connection.exec_driver_sql(
                    f"CREATE DATABASE turkish TEMPLATE template0 LOCALE_PROVIDER libc LOCALE '{LOCALE}'"
                )
            settings = EtlSettings(database_url=database_url(url, "turkish"))
            engine = build_engine(settings)
            initialize_database(engine, graph)
            yield Chain(engine, settings)
            engine.dispose()


def test_result_is_the_same_in_a_database_of_another_language(turkish_chain: Chain) -> None:
    """次序、大小写都不照码位的数据库，再加上角色的那些设置。"""
    with turkish_chain.engine.connect() as connection:
        odd = connection.exec_driver_sql("SELECT 'a' < 'B', lower('I')").one()
    assert tuple(odd) == (True, "ı")
    raw_data = RawData(turkish_chain.engine)
    imports = [raw_data.add_import(UNORDERED), raw_data.add_import(UNORDERED[::2])]
    with with_settings(turkish_chain, "role", FOREIGN["all at once"]) as foreign:
        for import_id in imports:
            foreign.announce(import_id)
        foreign.run_due()
    turkish_chain.assert_converged()


@pytest.mark.parametrize(("kind", "holder"), [("repeatable read", "database"), ("serializable", "role")])
def test_two_workers_never_claim_the_same_days(chain: Chain, raw_data: RawData, kind: str, holder: str) -> None:
    chain.announce(raw_data.add_import([{}]))
    with (
        with_settings(chain, holder, FOREIGN[kind]) as foreign,
        ThreadPoolExecutor(1) as pool,
        foreign.engine.connect() as connection,
        chain.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as observer,
    ):
        with connection.begin():
            first = claim(connection)
            other = pool.submit(in_transaction, foreign.engine, claim)
            wait_until(lambda: other.done() or is_anyone_waiting(observer))
        second = other.result(timeout=30)
    assert first is not None
    assert first.days.first == date(2026, 1, 5)
    assert second is None


@pytest.mark.parametrize("count", [1, 2_000], ids=["a few rows", "many rows"])
def test_frames_come_back_as_they_went_under_settings_of_the_database(chain: Chain, count: int) -> None:
    """每种类型的值，经 COPY 去、经 COPY 回来。"""
    frame = pl.DataFrame(
        {
            "text": ['张三 "\\N"\r\n,'] * count,
            "ratio": [0.1 + 0.2] * count,
            "day": [date(2026, 3, 4)] * count,
            "at": [datetime(2026, 3, 4, 5, 6, 7, 8, UTC)] * count,
            "local": [datetime(2026, 3, 4, 5, 6, 7, 8)] * count,  # noqa: DTZ001  # 没有时区的列
        },
        schema_overrides={"at": pl.Datetime("us", "UTC"), "local": pl.Datetime("us")},
    )
    types = [sa.Text(), sa.Float(), sa.Date(), sa.DateTime(timezone=True), sa.DateTime()]
    columns: list[sa.Column[Any]] = [sa.Column(name, kind) for name, kind in zip(frame.columns, types, strict=True)]
    with with_settings(chain, "database", FOREIGN["all at once"]) as foreign, foreign.engine.begin() as connection:
        table = create_staging(connection, "frames", columns)
        copy_into(connection, frame, table)
        assert read_frame(connection, sa.select(table)).equals(frame)


def test_storage_of_dagster_is_under_the_same_settings(chain: Chain) -> None:
    """同一个角色，同一个数据库：栈给 Dagster 的地址也写明它们。"""
    names = ("client_encoding", "timezone", ISOLATION)
    with with_settings(
        chain, "role", {"client_encoding": "'LATIN1'", "timezone": "'Asia/Tokyo'", ISOLATION: "'serializable'"}
    ):
        dagster = sa.create_engine(build_dagster_postgres_url(chain.settings.database_url), poolclass=sa.pool.NullPool)
        with dagster.connect() as connection:
            found = [connection.scalar(sa.text("SELECT current_setting(:name)"), {"name": name}) for name in names]
    assert found == ["UTF8", "UTC", "read committed"]


def claim(connection: sa.Connection) -> Claim | None:
    return claim_due_days(connection, "public", run_id=str(uuid4()), owner="test", lease_seconds=60)


def in_transaction(engine: sa.Engine, action: Callable[[sa.Connection], Claim | None]) -> Claim | None:
    with engine.begin() as connection:
        return action(connection)
