"""每个角色只做得了自己的事：`etl nats-accounts` 的用户与 `etl grants` 的角色，彼此的主题与表都试过；合起来走得完一遍。"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import structlog
from nats.js.api import StreamConfig

from bridge.cli.commands import run_command
from bridge.errors import NatsRefusedError
from bridge.events.history import read_completions
from bridge.events.streams import DEAD_LETTERS
from bridge.jetstream.connection import JetStreamConnection
from bridge.jetstream.streams import store, subject_covers
from bridge.queue.doorbell import ring_workers
from bridge.queue.streams import forgiven_deliveries, task_letters
from bridge.roles.database import grants
from bridge.roles.nats import NatsRole, nats_roles
from bridge.settings import BridgeSettings
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import build_engine, normalize_url
from etl_assets.core.errors import DatabaseRefusedError
from etl_assets.core.etl_tables import etl as etl_tables
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application_tables
from etl_assets.definitions import graph
from etl_assets.services.copy_out import driver_of
from etl_assets.testing.fixtures import ReadTable

from .conftest import NatsServer
from .host import etl, eventually, host_environment, running

ROLES = ("importer", "listener", "worker", "ui", "operator")
DATABASE_ROLES = ("etl", "importer", "reader", "operator")
CSV = (
    "order_id,shop,customer_name,order_type,order_status,amount,quantity,ordered_at\n"
    "A1,旗舰店,张三,大货,已完成,12.50,2,2026-01-05 08:05:06\n"
)


@dataclass(frozen=True)
class Accounts:
    """有了角色的服务器，与 `etl nats-accounts` 写下的文件夹。"""

    server: NatsServer
    folder: Path

    def environment(self, role: str) -> dict[str, str]:
        lines = (self.folder / f"{role}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def settings(self, role: str) -> BridgeSettings:
        given = {name.removeprefix("ETL_").lower(): value for name, value in self.environment(role).items()}
        return BridgeSettings.model_validate(given)


@pytest.fixture
def accounts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Accounts]:
    folder = tmp_path / "accounts"
    server_folder = tmp_path / "nats"
    server_folder.mkdir()
    server = NatsServer(server_folder, config='include "accounts.conf"\n')
    with pytest.raises(SystemExit) as ended:
        run_command(["nats-accounts", str(folder), "--url", f"nats://127.0.0.1:{server.port}"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    seeds = [path.read_text().strip() for path in folder.glob("*.nk")]
    assert len(seeds) == len(ROLES)
    config = (folder / "accounts.conf").read_text()
    assert not any(seed in printed.out + printed.err + config for seed in seeds)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    (server_folder / "accounts.conf").write_text(config)
    server.start()
    yield Accounts(server, folder)
    server.kill()


def concrete(subject: str) -> str:
    """这个模式里的一个主题。"""
    return subject.replace("*", "x").replace(">", "x")


def subjects_of_others(role: NatsRole) -> list[str]:
    given = {concrete(subject) for each in nats_roles(BridgeSettings()) for subject in each.publish}
    given |= {"orders.created", "$JS.API.STREAM.DELETE.EVENTS", "$JS.API.STREAM.CREATE.MINE", "$SYS.REQ.SERVER.PING"}
    return sorted(subject for subject in given if not any(subject_covers(own, subject) for own in role.publish))


@pytest.mark.parametrize("role", nats_roles(BridgeSettings()), ids=lambda role: role.name)
async def test_role_cannot_publish_to_what_is_others_and_hears_nothing_of_theirs(
    role: NatsRole, accounts: Accounts
) -> None:
    connection = JetStreamConnection(accounts.settings(role.name), name="test")
    await connection.open(only_publishes=True)
    foreign = subjects_of_others(role)
    assert foreign
    with structlog.testing.capture_logs() as logs:
        refused = await asyncio.gather(
            *(connection.publish(subject, b"{}", message_id=subject) for subject in foreign), return_exceptions=True
        )
        for subject, error in zip(foreign, refused, strict=True):
            assert isinstance(error, NatsRefusedError), (subject, error)
            assert f"does not let this user publish to {subject}: " in str(error)
            assert "\n" not in str(error)
        others = [each.inbox_prefix for each in nats_roles(BridgeSettings()) if each != role]
        listening = [f"{prefix}.>" for prefix in others] + ["_INBOX.>", "tasks.>", ">", "$JS.API.>"]
        for subject in listening:
            await connection.client.subscribe(subject)
        async with asyncio.timeout(10):
            while not all(is_refused(subject, logs) for subject in listening):
                await asyncio.sleep(0.05)
    await connection.close()


def is_refused(subject: str, logs: list[Any]) -> bool:
    sentence = f'permissions violation for subscription to "{subject}"'.lower()
    return any(sentence in str(line.get("cause", "")).lower() for line in logs)


@pytest.mark.parametrize(
    ("role", "stream", "subject"),
    [
        ("listener", lambda _settings: DEAD_LETTERS, "events_dlq.data_import.completed"),
        ("worker", task_letters, "tasks_dlq.bulk"),
        ("worker", forgiven_deliveries, "tasks_forgiven.1"),
    ],
)
async def test_stream_that_is_not_there_is_made_by_who_stores_into_it(
    accounts: Accounts, role: str, stream: Callable[[BridgeSettings], StreamConfig], subject: str
) -> None:
    settings = accounts.settings(role)
    async with JetStreamConnection(settings, name="test") as connection:
        await store(connection, stream(settings), subject, b"{}", message_id="1")


async def test_missing_inbox_prefix_is_one_sentence(accounts: Accounts) -> None:
    settings = accounts.settings("operator").model_copy(update={"nats_inbox_prefix": "_INBOX"})
    with pytest.raises(NatsRefusedError, match="set ETL_NATS_INBOX_PREFIX to what its permissions name"):
        await JetStreamConnection(settings, name="test").open()


def test_command_with_the_credentials_of_another_role_ends_with_one_line(accounts: Accounts, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "ETL_STATE_DIR": str(tmp_path / "state"),
        "ETL_DATABASE_URL": "postgresql://127.0.0.1:1/x",
    }
    for role, command in (
        ("importer", ["listen"]),
        ("ui", ["listen"]),
        ("listener", ["worker"]),
        ("ui", ["dlq", "list"]),
    ):
        result = subprocess.run(
            etl(*command),
            env={**environment, **accounts.environment(role)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode == 2, (role, command, result.stderr)
        assert len(errors) == 1
        assert "does not let this user publish to $JS.API." in errors[0]


def test_secrets_stay_when_the_accounts_are_written_again(accounts: Accounts) -> None:
    before = {path.name: path.read_text() for path in accounts.folder.iterdir()}
    with pytest.raises(SystemExit):
        run_command(["nats-accounts", str(accounts.folder), "--url", f"nats://127.0.0.1:{accounts.server.port}"])
    assert {path.name: path.read_text() for path in accounts.folder.iterdir()} == before


# ---- PostgreSQL -----------------------------------------------------------------------------


@pytest.fixture
def prefix(engine: sa.Engine) -> Iterator[str]:
    """角色属于整台服务器：每个测试有自己的。"""
    name = f"least_{engine.url.database}"
    yield name
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        found = connection.scalars(sa.text("SELECT rolname FROM pg_roles WHERE rolname LIKE :own"), {"own": f"{name}%"})
        for role in found.all():
            connection.exec_driver_sql(f'DROP OWNED BY "{role}"')
            connection.exec_driver_sql(f'DROP ROLE "{role}"')


def give(engine: sa.Engine, prefix: str) -> Mapping[str, EtlSettings]:
    """执行 `etl grants` 印出来的（两遍），各建一个登录的；角色 → 它的设置。"""
    password = secrets.token_hex(8)
    found = {}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for _ in range(2):
            driver_of(connection).execute(grants(prefix, "public", "dagster").encode())
        for role in DATABASE_ROLES:
            login = f"{prefix}_login_{role}"
            connection.exec_driver_sql(f"CREATE ROLE {login} LOGIN PASSWORD '{password}' IN ROLE {prefix}_{role}")
            connection.exec_driver_sql(f"GRANT {login}, {prefix}_{role} TO CURRENT_USER")
            url = engine.url.set(username=login, password=password)
            found[role] = EtlSettings(database_url=url.render_as_string(hide_password=False))
    return found


def attempts(table: sa.Table) -> dict[str, str]:
    """每种权限一条什么也不改的语句：权限先看。"""
    column = next(iter(table.c)).name
    statements = {
        "SELECT": "SELECT FROM {} WHERE false",
        "INSERT": "INSERT INTO {} TABLE {} LIMIT 0",
        "UPDATE": "UPDATE {} SET {column} = {column} WHERE false",
        "DELETE": "DELETE FROM {} WHERE false",
        "TRUNCATE": "TRUNCATE {}",
        "ALTER": "ALTER TABLE {} ADD COLUMN mine text",
        "DROP": "DROP TABLE {}",
    }
    return {
        right: statement.replace("{}", table.fullname).replace("{column}", column)
        for right, statement in statements.items()
    }


RESULTS = {"public.orders", "public.customers", "public.business_leads"}
BOOKKEEPING = {table.fullname for table in etl_tables.tables.values()}
READ = {"SELECT"}
WRITE = {"SELECT", "INSERT", "UPDATE", "DELETE"}


def expected(role: str, table: str) -> set[str]:
    if role == "reader":
        return READ
    if role == "importer":
        return {
            "public.import_tasks": {"SELECT", "INSERT", "UPDATE"},
            "public.raw_orders": {"SELECT", "INSERT"},
            "public.shop_configs": READ,
            "etl.imported_files": {"SELECT", "INSERT"},
        }.get(table, set())
    of_etl = WRITE if table in RESULTS | BOOKKEEPING else READ
    if role == "etl":
        return of_etl
    own = {"public.order_type_mappings": WRITE, "public.shop_configs": {"SELECT", "INSERT"}}.get(table, set())
    return of_etl | own | expected("importer", table)


@pytest.mark.parametrize("role", DATABASE_ROLES)
def test_role_does_with_each_table_what_it_may_and_nothing_else(engine: sa.Engine, prefix: str, role: str) -> None:
    own = build_engine(give(engine, prefix)[role])
    refused = 0
    for table in [*application_tables(), *etl_tables.tables.values()]:
        for right, statement in attempts(table).items():
            error = attempt(own, statement)
            if right in expected(role, table.fullname):
                assert error is None, (role, statement, error)
            else:
                refused += 1
                assert error is not None, f"{role} may {statement}"
                assert error.startswith("the role of ETL_DATABASE_URL lacks a right, grant it: "), (statement, error)
                assert "\n" not in error
    assert refused
    for statement in ("CREATE TABLE public.mine ()", "CREATE SCHEMA mine", "CREATE ROLE mine"):
        assert attempt(own, statement), f"{role} may {statement}"
    own.dispose()


def attempt(engine: sa.Engine, statement: str) -> str | None:
    """在一个不提交的事务里试；不许的那一句。"""
    try:
        with translated_errors(), engine.connect() as connection:
            connection.exec_driver_sql(statement)
    except DatabaseRefusedError as error:
        return str(error)
    return None


# ---- 合起来 -----------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_whole_flow_runs_with_every_role_at_least_privilege(
    engine: sa.Engine, prefix: str, accounts: Accounts, read_table: ReadTable, tmp_path: Path
) -> None:
    """导入、监听、执行、完成事件：各用各的用户，没有一个是表的主人。"""
    made = host_environment(engine, "", tmp_path)
    roles = give(engine, prefix)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO shop_configs VALUES (gen_random_uuid(), '旗舰店', 'x')")
        connection.exec_driver_sql("INSERT INTO order_type_mappings VALUES ('大货', 'BULK')")

    def environment(nats: str, database: str) -> dict[str, str]:
        storage = normalize_url(made["DAGSTER_POSTGRES_URL"]).set(
            drivername="postgresql+psycopg2",
            username=(own := normalize_url(roles[database].database_url)).username,
            password=own.password,
        )
        return {
            **made,
            **accounts.environment(nats),
            "ETL_DATABASE_URL": roles[database].database_url,
            "DAGSTER_POSTGRES_URL": storage.render_as_string(hide_password=False),
        }

    file = tmp_path / "orders.csv"
    file.write_text(CSV)
    with ExitStack() as stack:
        for role, command in (("listener", "listen"), ("worker", "worker")):
            log = tmp_path / f"{role}.log"
            stack.enter_context(running(etl(command), environment=environment(role, "etl"), log=log))
        eventually(lambda: '"ready"' in (tmp_path / "listener.log").read_text(), "the listener is not ready")
        imported = run(["import", str(file), "--json"], environment("importer", "importer"))
        import_id = json.loads(imported)["import_id"]
        run(["wait", "--import-id", import_id, "--timeout", "400"], environment("operator", "operator"))
        completions = eventually(
            lambda: (
                len(found := asyncio.run(read_completions(accounts.settings("operator")))) >= len(graph.names) and found
            ),
            "the completion events do not arrive",
        )
        asyncio.run(ring_workers(accounts.settings("ui"), "interactive"))
        assert "all well" in run(["status"], environment("operator", "operator"))
    assert {asset for asset, _ in completions} == set(graph.names)
    assert read_table("business_leads").height == 1
    assert "张三" in run(["show", "orders"], environment("operator", "reader"))
    for role in ("listener", "worker"):
        assert "permission" not in (tmp_path / f"{role}.log").read_text().lower()


def run(command: list[str], environment: Mapping[str, str]) -> str:
    result = subprocess.run(
        etl(*command), env={**os.environ, **environment}, capture_output=True, text=True, timeout=500, check=False
    )
    assert result.returncode == 0, (command, result.stdout, result.stderr)
    return result.stdout
