"""pgbouncer 在我们与 PostgreSQL 之间：按会话分的照常用；按事务分的、不让带设置的认出来，一句话拒绝，什么也不写。"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from bridge.operations.doctor import examine
from bridge.operations.findings import Finding
from bridge.settings import BridgeSettings
from etl_assets.core.database_sync import build_engine, transact
from etl_assets.core.errors import DatabaseRefusedError
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.testing.raw_data import RawData
from tests.integration.engine.chain import Chain
from tests.integration.engine.test_foreign_settings import FOREIGN, ROWS, execute

IGNORED = "ignore_startup_parameters = options,extra_float_digits"
Start = Callable[..., EtlSettings]


@pytest.fixture
def pooled(etl_settings: EtlSettings) -> Iterator[Start]:
    """起一个 pgbouncer，给出经过它的设置。"""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    url = sa.make_url(etl_settings.database_url)
    with contextlib.ExitStack() as cleanup:

        def start(mode: str, *options: str) -> EtlSettings:
            port = find_free_port()
            # 它不肯以 root 的身份跑，而 pytest 的文件夹只有 root 进得去
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
            (folder / "users.txt").write_text(f'"{url.username}" "{url.password}"\n')
            lines = [
                "[databases]",
                f"{url.database} = host={url.host} port={url.port}",
                "[pgbouncer]",
                "listen_addr = 127.0.0.1",
                f"listen_port = {port}",
                "auth_type = plain",
                f"auth_file = {folder / 'users.txt'}",
                f"pool_mode = {mode}",
                "unix_socket_dir =",
                *options,
            ]
            (folder / "pgbouncer.ini").write_text("\n".join(lines))
            for path in (folder, *folder.iterdir()):
                path.chmod(0o755)
            account = ["--user", "nobody"] if os.geteuid() == 0 else []
            process = subprocess.Popen([str(program), "--quiet", *account, str(folder / "pgbouncer.ini")])
            cleanup.callback(process.wait)
            cleanup.callback(process.terminate)
            with contextlib.closing(socket.socket()) as probe:
                deadline = time.monotonic() + 30
                while probe.connect_ex(("127.0.0.1", port)):
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.1)
            address = url.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
            return etl_settings.model_copy(update={"database_url": address})

        yield start


def refusal(settings: EtlSettings) -> str:
    engine = build_engine(settings)
    try:
        with pytest.raises(DatabaseRefusedError) as caught:
            transact(engine, lambda connection: connection.exec_driver_sql("SELECT 1"))
    finally:
        engine.dispose()
    return str(caught.value)


def findings(settings: EtlSettings, folder: Path) -> dict[str, Finding]:
    engine = build_engine(settings)
    try:
        nowhere = BridgeSettings(nats_url="nats://127.0.0.1:1", connect_timeout_seconds=1)
        return {finding.check: finding for finding in examine(engine, settings, nowhere, state_dir=folder)}
    finally:
        engine.dispose()


def test_pooler_by_transaction_is_refused_in_one_sentence(pooled: Start, tmp_path: Path) -> None:
    settings = pooled("transaction", IGNORED)
    said = refusal(settings)
    assert said.startswith("a connection pooler is between us and PostgreSQL and pools by transaction")
    assert "pool_mode = session" in said
    found = findings(settings, tmp_path)["postgres"]
    assert (found.state, found.says) == ("error", said)


def test_pooler_by_transaction_is_recognised_among_other_users_and_keeps_nothing_of_ours(
    pooled: Start, engine: sa.Engine
) -> None:
    """别人也在用它，它手里有几个会话；拒绝之后，没有一个带着我们的设置。"""
    settings = pooled("transaction", IGNORED, "server_round_robin = 1")
    others = sa.create_engine(
        sa.make_url(settings.database_url).set(drivername="postgresql+psycopg"),
        connect_args={"prepare_threshold": None},
    )
    with contextlib.ExitStack() as cleanup:
        for connection in [cleanup.enter_context(others.connect()) for _ in range(4)]:
            connection.exec_driver_sql("SELECT 1")
    assert "pools by transaction" in refusal(settings)
    with contextlib.ExitStack() as cleanup:
        for connection in [cleanup.enter_context(others.connect()) for _ in range(5)]:
            name, timeout = connection.exec_driver_sql(
                "SELECT current_setting('application_name'), current_setting('statement_timeout')"
            ).one()
            assert (name, timeout) == ("", "0")
    others.dispose()
    with engine.connect() as direct:
        locks = direct.exec_driver_sql("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")
        assert locks.scalar_one() == 0


def test_pooler_that_does_not_let_our_settings_through_is_said(pooled: Start) -> None:
    said = refusal(pooled("session"))
    assert said.startswith("a connection pooler refuses the settings that we connect with")
    assert "ignore_startup_parameters = options" in said


@pytest.mark.parametrize("holder", ["DATABASE {name}", "ROLE CURRENT_USER IN DATABASE {name}"])
def test_result_is_the_same_through_a_pooler_by_session(
    pooled: Start, engine: sa.Engine, raw_data: RawData, tmp_path: Path, holder: str
) -> None:
    """它丢了我们的 options，角色与数据库上设着奇怪的值：每个连接自己再设一遍。"""
    settings = pooled("session", IGNORED)
    import_id = raw_data.add_import(ROWS)
    settings_of_others = FOREIGN["all at once"] | {"statement_timeout": "'5s'", "lock_timeout": "'5s'"}
    alter = f"ALTER {holder.format(name=engine.url.database)}"
    execute(engine, *[f"{alter} SET {name} = {value}" for name, value in settings_of_others.items()])
    through = build_engine(settings)
    try:
        chain = Chain(through, settings)
        chain.announce(import_id)
        chain.run_due()
        Chain(engine, settings).assert_converged()
        with through.connect() as connection:
            found = connection.exec_driver_sql(
                "SELECT setting FROM pg_settings WHERE name IN ('application_name', 'lock_timeout', 'TimeZone') ORDER BY name"
            )
            assert found.scalars().all() == ["UTC", "etl", str(1000 * settings.lock_timeout_seconds)]
    finally:
        through.dispose()
    assert findings(settings, tmp_path)["pooler"].says == (
        "a connection pooler is between us and PostgreSQL, it pools by session"
    )


def test_our_settings_reach_postgresql_itself_without_a_statement(
    etl_settings: EtlSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    execute_of_driver = psycopg.Connection.execute

    def execute(self: psycopg.Connection[Any], query: Any, *of: Any, **given: Any) -> Any:
        said.append(str(query))
        return execute_of_driver(self, query, *of, **given)

    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    engine = build_engine(etl_settings)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT current_setting('application_name')").scalar_one() == "etl"
    engine.dispose()
    assert said
    assert not [query for query in said if "set_config" in query]
