"""栈的进程各以自己的角色登录内嵌的两台服务器：做得了自己的事（别的验收测试），做不了别人的。"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from bridge.errors import NatsRefusedError
from bridge.jetstream.connection import JetStreamConnection
from bridge.nats_names import DATA_IMPORT_COMPLETED
from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from etl_assets.embedded.postgres_roles import SERVICE
from tests.acceptance.conftest import Etl

OWNER = "etl"


@pytest.fixture
def service(state_dir: Path, stack: StackAddresses) -> Iterator[psycopg.Connection]:
    """以各进程的那个角色登录。"""
    url = sa.make_url(stack.database_url)
    password = (state_dir / "postgres" / "password-service").read_text()
    with psycopg.connect(host=url.host, port=url.port, user=SERVICE, password=password, dbname=url.database) as opened:
        yield opened


def connections(state_dir: Path) -> dict[str, set[str]]:
    """NATS 的连接：登录的用户 → 它们的名字。"""
    config = json.loads((state_dir / "nats" / "nats.conf").read_text())
    url = f"http://{config['http']}{config['http_base_path']}/connz?auth=1"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: dict[str, set[str]] = {}
        for each in json.load(answer)["connections"]:
            found.setdefault(each["authorized_user"], set()).add(each["name"])
    return found


def test_each_process_logs_in_with_its_role(state_dir: Path, service: psycopg.Connection) -> None:
    others = "SELECT application_name FROM pg_stat_activity WHERE usename = current_user AND pid <> pg_backend_pid()"
    assert {name for (name,) in service.execute(others)} == {"etl", ""}, "the data's sessions, and those of Dagster"
    users = connections(state_dir)
    assert {"listener", "worker"} <= set(users)
    assert OWNER not in users


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM raw_orders",
        "UPDATE import_tasks SET status = 'x'",
        "INSERT INTO shop_configs VALUES (gen_random_uuid(), 'x', 'x')",
        "DELETE FROM order_type_mappings",
        "ALTER TABLE orders ADD COLUMN mine text",
        "DROP TABLE etl.ledger",
        "TRUNCATE dagster.runs",
        "CREATE TABLE mine ()",
        "SET ROLE etl",
    ],
)
def test_processes_change_nothing_of_the_application_and_no_structure(
    service: psycopg.Connection, statement: str
) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service.execute(statement)


async def test_worker_announces_no_import(state_dir: Path, stack: StackAddresses) -> None:
    password = (state_dir / "nats" / "password-worker").read_text()
    host = stack.nats_url.rpartition("@")[2]
    settings = BridgeSettings(nats_url=f"nats://worker:{password}@{host}", nats_inbox_prefix="_INBOX_worker")
    async with JetStreamConnection(settings, name="test") as connection:
        with pytest.raises(NatsRefusedError, match="does not let this user publish to events"):
            await connection.publish(DATA_IMPORT_COMPLETED, b"{}", message_id="x")


@pytest.mark.usefixtures("stack")
def test_secrets_of_the_roles_are_private(state_dir: Path) -> None:
    found = [path for server in ("postgres", "nats") for path in (state_dir / server).glob("password*")]
    assert len(found) == len({path.read_text() for path in found}) == 8
    assert {path.stat().st_mode & 0o777 for path in [*found, state_dir / "nats" / "nats.conf"]} == {0o600}


def test_result_table_made_by_init_db_is_given_to_the_processes(
    stack_engine: sa.Engine, service: psycopg.Connection, etl: Etl
) -> None:
    """新的资产的表也是这样建的；在那之前 doctor 与 status 点名缺的，虽然它们自己以主人登录。"""
    with stack_engine.begin() as connection:
        connection.exec_driver_sql("REVOKE ALL ON orders FROM dayline_etl")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service.execute("SELECT FROM orders")
    service.rollback()
    lacks = f"{SERVICE}, as whom the stack's processes log in, lacks SELECT, INSERT, UPDATE, DELETE on public.orders: run `etl init-db`"
    assert lacks in etl("doctor", exit_code=1).stdout
    assert lacks in etl("status").stdout.splitlines()[0]
    etl("init-db")
    service.execute("SELECT FROM orders")
    assert "all well" in etl("status").stdout


@pytest.fixture
def table_of_another(stack_engine: sa.Engine) -> Iterator[str]:
    """应用的一张表属于应用自己的角色：栈的主人读得了，给不了别人。"""
    table = "order_type_mappings"
    with stack_engine.begin() as connection:
        for statement in (
            "CREATE ROLE shop_app",
            "GRANT shop_app TO etl WITH INHERIT TRUE, SET TRUE",
            "GRANT USAGE, CREATE ON SCHEMA public TO shop_app",
            f"REVOKE ALL ON {table} FROM dayline_etl",
            f"ALTER TABLE {table} OWNER TO shop_app",
            f"GRANT ALL ON {table} TO etl",
            "GRANT shop_app TO etl WITH INHERIT FALSE",
        ):
            connection.exec_driver_sql(statement)
    yield table
    with stack_engine.begin() as connection:
        for statement in (
            "GRANT shop_app TO etl WITH INHERIT TRUE",
            f"ALTER TABLE {table} OWNER TO etl",
            f"GRANT SELECT ON {table} TO dayline_etl",
            "DROP OWNED BY shop_app",
            "DROP ROLE shop_app",
        ):
            connection.exec_driver_sql(statement)


def test_table_that_the_owner_cannot_give_away_is_named(table_of_another: str, etl: Etl) -> None:
    refused = etl("init-db", exit_code=2).stderr
    assert f"lacks SELECT on public.{table_of_another}: " in refused
    assert "where that does not help, the owner of the table grants it to dayline_etl" in refused


def test_table_of_the_house_is_found_by_the_name_that_its_maker_gave_it(
    stack_engine: sa.Engine, service: psycopg.Connection
) -> None:
    """主人叫 etl，没写 schema 的表落在 schema etl 里。"""
    with stack_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE product_costs (a int)")
    try:
        service.execute("SELECT FROM product_costs")
    finally:
        service.rollback()
        with stack_engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE product_costs")
