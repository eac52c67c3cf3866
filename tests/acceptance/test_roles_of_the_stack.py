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
    """新的资产的表也是这样建的。"""
    with stack_engine.begin() as connection:
        connection.exec_driver_sql("REVOKE ALL ON orders FROM dayline_etl")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        service.execute("SELECT FROM orders")
    service.rollback()
    etl("init-db")
    service.execute("SELECT FROM orders")
