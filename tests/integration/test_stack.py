"""内嵌的栈作为整体：真的 PostgreSQL 与 NATS，其余用小脚本代替，一秒就能起停。"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import nats
import psycopg
import pytest
from nats.js import JetStreamContext

from bridge.errors import NatsRefusedError, NatsUnavailableError
from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses, read_addresses
from bridge.stack.application import ApplicationPlan, application_services
from bridge.stack.embedded_nats import EmbeddedNats
from bridge.stack.forkserver import Forkserver
from bridge.stack.local import Stack
from bridge.stack.readiness import logged_ready
from bridge.stack.supervisor import Service
from etl_assets.core.errors import DatabaseRefusedError, DatabaseUnavailableError, SettingsError
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.child_log import ChildStartError
from etl_assets.embedded.child_process import identify, launch
from etl_assets.embedded.loopback_port import find_free_port, listen_on
from etl_assets.testing.databases import cloned_database
from tests.chaos.disks import small_disks

REPORT_ENVIRONMENT = """
import json, os, sys, time
environment = {name: value for name, value in os.environ.items() if name.startswith(("ETL_", "DAGSTER_"))}
print(json.dumps({"message": "environment", "pid": os.getpid(), **environment}), file=sys.stderr)
print(json.dumps({"message": "ready"}), file=sys.stderr, flush=True)
time.sleep(600)
"""
RUN_IN_FOREGROUND = """
import os, sys
from functools import partial
from pathlib import Path
from bridge.settings import BridgeSettings
from bridge.stack.local import Stack
from bridge.stack.supervisor import Service
from etl_assets.embedded.child_process import launch
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import EtlSettings
configure_logging("stack")
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
slow_to_stop = Service("slow", partial(launch, [sys.executable, "-c", stubborn], env=dict(os.environ)), stop_timeout_seconds=1)
stack = Stack(
    Path(sys.argv[1]),
    settings=EtlSettings(database_url=sys.argv[2]),
    bridge_settings=BridgeSettings(nats_url=""),
    durable=False,
    services=lambda plan: [slow_to_stop],
)
stack.run(lambda addresses: print("up", addresses.pid, flush=True))
print("down", flush=True)
"""


def one_service(plan: ApplicationPlan) -> list[Service]:
    return [
        Service(
            "reporter", partial(launch, [sys.executable, "-c", REPORT_ENVIRONMENT], env=plan.environment), logged_ready
        )
    ]


def wait_until(condition: Callable[[], bool], *, timeout_seconds: float = 10) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def no_services(_plan: ApplicationPlan) -> list[Service]:
    return []


def read_report(state_dir: Path) -> dict[str, Any]:
    lines = (state_dir / "logs" / "reporter.log").read_text().splitlines()
    report: dict[str, Any] = next(event for line in lines if (event := json.loads(line))["message"] == "environment")
    return report


def build_stack(state_dir: Path, *, database_url: str = "", nats_url: str = "", port: int | None = None) -> Stack:
    return Stack(
        state_dir,
        settings=EtlSettings(database_url=database_url),
        bridge_settings=BridgeSettings(nats_url=nats_url, connect_timeout_seconds=1),
        port=port,
        durable=False,
        services=no_services,
    )


async def publish_and_count(url: str) -> int:
    client = await nats.connect(url)
    jetstream = client.jetstream()
    await jetstream.add_stream(name="TEST", subjects=["test"])
    await jetstream.publish("test", b"x")
    messages = (await jetstream.stream_info("TEST")).state.messages
    await client.close()
    return int(messages)


@pytest.fixture(scope="module")
def nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedNats(tmp_path_factory.mktemp("nats"), durable=False) as url:
        yield url


@pytest.fixture(scope="module")
def database_url(postgres_url: str, database_template: str) -> Iterator[str]:
    """一个「外面的」数据库；各测试共用，Dagster 的表只建一次。"""
    with cloned_database(postgres_url, database_template) as url:
        yield url


# ---- NATS ------------------------------------------------------------------------


def test_nats_keeps_messages_and_address_over_a_restart(tmp_path: Path) -> None:
    with EmbeddedNats(tmp_path / "nats") as first:
        assert asyncio.run(publish_and_count(first)) == 1
    with EmbeddedNats(tmp_path / "nats") as second:
        assert second == first
        assert asyncio.run(publish_and_count(second)) == 2


def test_nats_password_is_in_private_files_and_on_no_command_line(tmp_path: Path) -> None:
    with EmbeddedNats(tmp_path / "nats", durable=False) as url:
        password = url.split(":")[2].split("@")[0].encode()
        holders = [path for path in tmp_path.rglob("*") if path.is_file() and password in path.read_bytes()]
        assert {path.name: oct(path.stat().st_mode & 0o777) for path in holders} == {
            "password": "0o600",
            "nats.conf": "0o600",
        }
        server = (tmp_path / "nats" / "nats.log").read_bytes()
        pid = int(server.partition(b"]")[0].removeprefix(b"["))
        assert password not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_nats_tells_nothing_to_pages_and_takes_no_proxy_for_its_own_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """监控口不问口令，也答别处来的网页；http_proxy 说的 503 不是它病了。"""
    server = EmbeddedNats(tmp_path / "nats", durable=False)
    with HTTPServer(("127.0.0.1", 0), _Unavailable) as proxy, server:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert not server.is_sick()
        proxy.shutdown()
        monkeypatch.delenv("http_proxy")
        monitor = json.loads((tmp_path / "nats" / "nats.conf").read_text())["http"]
        for page in ("varz", "jsz?streams=true", "healthz"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"http://{monitor}/{page}", timeout=5)


class _Unavailable(BaseHTTPRequestHandler):
    """够不着目标的代理。"""

    def do_GET(self) -> None:
        self.send_error(503)


def test_durable_nats_writes_through_to_the_disk(tmp_path: Path) -> None:
    with EmbeddedNats(tmp_path / "nats"):
        config = json.loads((tmp_path / "nats" / "nats.conf").read_text())
    assert config["jetstream"]["sync_interval"] == "always"
    assert config["listen"].startswith("127.0.0.1:")


def test_nats_is_ready_only_when_it_is_our_own_server_that_answers(tmp_path: Path, nats_url: str) -> None:
    server = EmbeddedNats(tmp_path / "nats", durable=False)
    server.prepare()
    try:
        port = int(nats_url.rpartition(":")[2])
        server._port = port  # 端口被别的 NATS 抢走了
        with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
            ready = server.is_ready(process)
            process.kill()
        assert not ready
    finally:
        server.release()


# ---- 整个栈 ------------------------------------------------------------------------


async def publish_until(url: str, *, is_stored: bool) -> None:
    client = await nats.connect(url, error_cb=ignore_error, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    try:
        async with asyncio.timeout(60):
            while await stores_a_message(client.jetstream(timeout=1)) is not is_stored:
                await asyncio.sleep(0.05)
    finally:
        await client.close()


async def ignore_error(_error: Exception) -> None:
    """断线由重连处理。"""


async def stores_a_message(stream: JetStreamContext) -> bool:
    try:
        await stream.publish("test", b"x" * 10_000)
    except (nats.errors.Error, nats.js.errors.Error):
        return False
    return True


def test_nats_stores_again_after_its_disk_was_full(tmp_path: Path, database_url: str) -> None:
    with small_disks(tmp_path / "state", ["nats"]) as disks:
        if not disks:
            pytest.skip("this user may not mount file systems")
        with build_stack(tmp_path / "state", database_url=database_url) as addresses:
            asyncio.run(publish_and_count(addresses.nats_url))
            disks[0].fill()
            asyncio.run(publish_until(addresses.nats_url, is_stored=False))
            disks[0].free()
            asyncio.run(publish_until(addresses.nats_url, is_stored=True))


def test_stack_comes_up_ready_and_leaves_nothing(tmp_path: Path) -> None:
    state_dir = tmp_path / '张三 的 "状态"'  # 家里的文件夹叫什么都行
    stack = Stack(
        state_dir,
        settings=EtlSettings(database_url=""),
        bridge_settings=BridgeSettings(nats_url=""),
        durable=False,
        services=one_service,
    )
    with stack as addresses:
        assert read_addresses(state_dir) == addresses
        with psycopg.connect(addresses.database_url) as connection:
            schemas = "SELECT schemaname, count(*) FROM pg_tables WHERE schemaname IN ('public', 'etl', 'dagster') GROUP BY 1 ORDER BY 1"
            tables: dict[str, int] = dict(connection.execute(schemas).fetchall())
        assert set(tables) == {"dagster", "etl", "public"}
        assert tables["dagster"] > 10
        assert asyncio.run(publish_and_count(addresses.nats_url)) == 1
        environment = read_report(state_dir)
        assert {
            **environment,
            **addresses.environment(),
            "ETL_STATE_DIR": str(state_dir),
            "DAGSTER_DISABLE_TELEMETRY": "1",
        } == environment
        children = [child["pid"] for child in json.loads((state_dir / "pids.json").read_text())["children"]]
        assert len(children) == 4  # PostgreSQL、NATS、模子、reporter
    assert [pid for pid in children if identify(pid)] == []
    assert read_addresses(state_dir) is None
    assert not (state_dir / "stack.json").exists()


def test_two_stacks_run_side_by_side(tmp_path: Path, database_url: str) -> None:
    with (
        build_stack(tmp_path / "one", database_url=database_url) as one,
        build_stack(tmp_path / "two", database_url=database_url) as two,
    ):
        assert one.nats_url != two.nats_url
        assert asyncio.run(publish_and_count(one.nats_url)) == asyncio.run(publish_and_count(two.nats_url)) == 1


def test_two_stacks_that_start_in_the_same_moment_have_ports_of_their_own(
    tmp_path: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.stack.local._DEFAULT_UI_PORT", find_free_port())  # 3000 也许有人在用
    stacks = [build_stack(tmp_path / str(number), database_url=database_url) for number in range(4)]
    try:
        with ThreadPoolExecutor(len(stacks)) as pool:
            found = list(pool.map(Stack.start, stacks))
    finally:
        for stack in stacks:
            stack.stop()
    ports = [urlsplit(url).port for addresses in found for url in (addresses.ui_url, addresses.nats_url)]
    assert len(set(ports)) == 2 * len(stacks)


def test_nats_gives_up_a_port_that_somebody_takes_while_it_starts(tmp_path: Path, database_url: str) -> None:
    stack = build_stack(tmp_path, database_url=database_url)
    assert stack._nats is not None
    launch, taken = stack._nats._launch, []

    def launch_too_late(log: IO[bytes]) -> subprocess.Popen[bytes]:
        if not taken:
            taken.append(listen_on(nats_server._port, preferred=0))
        return launch(log)

    nats_server = stack._nats
    nats_server._launch = launch_too_late  # type: ignore[method-assign]
    with stack as addresses:
        assert urlsplit(addresses.nats_url).port != taken[0].getsockname()[1]
        assert asyncio.run(publish_and_count(addresses.nats_url)) == 1
    taken[0].close()


def test_second_stack_on_a_folder_is_refused_and_the_first_stays(tmp_path: Path, database_url: str) -> None:
    with build_stack(tmp_path, database_url=database_url) as addresses:
        with pytest.raises(SettingsError, match="another process is using the state folder"):
            build_stack(tmp_path, database_url=database_url).start()
        assert read_addresses(tmp_path) == addresses


def test_given_servers_replace_the_embedded_ones(tmp_path: Path, nats_url: str, database_url: str) -> None:
    with build_stack(tmp_path, database_url=database_url, nats_url=nats_url) as addresses:
        assert (addresses.database_url, addresses.nats_url) == (database_url, nats_url)
        assert not (tmp_path / "postgres").exists()
        assert not (tmp_path / "nats").exists()


def test_occupied_port_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port} is not free: choose another one with --port"):
            build_stack(tmp_path, port=port).start()


def test_unusable_servers_are_refused_in_one_sentence(tmp_path: Path, nats_url: str, database_url: str) -> None:
    wrong_database = database_url.replace("@", "x@")
    with pytest.raises(DatabaseRefusedError, match="password authentication failed"):
        build_stack(tmp_path, database_url=wrong_database, nats_url=nats_url).start()
    with pytest.raises(DatabaseUnavailableError, match="Connection refused"):
        build_stack(tmp_path, database_url="postgresql://etl:x@127.0.0.1:1/etl", nats_url=nats_url).start()
    with pytest.raises(NatsRefusedError, match="correct ETL_NATS_URL"):
        build_stack(tmp_path, database_url=database_url, nats_url=nats_url.replace("@", "x@")).start()
    with pytest.raises(NatsUnavailableError, match="cannot reach NATS"):
        build_stack(tmp_path, database_url=database_url, nats_url="nats://127.0.0.1:1").start()
    assert not (tmp_path / "stack.json").exists()


def test_failed_start_leaves_nothing_running(tmp_path: Path, database_url: str) -> None:
    def failing(plan: ApplicationPlan) -> list[Service]:
        broken = partial(launch, [sys.executable, "-c", "raise SystemExit('broken')"], env=plan.environment)
        return [*one_service(plan), Service("listener", broken, logged_ready)]

    stack = Stack(
        tmp_path,
        settings=EtlSettings(database_url=database_url),
        bridge_settings=BridgeSettings(nats_url=""),
        durable=False,
        services=failing,
    )
    with pytest.raises(ChildStartError, match="listener does not start: broken"):
        stack.start()

    assert identify(read_report(tmp_path)["pid"]) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_signal_ends_the_foreground_stack_in_order(
    tmp_path: Path, database_url: str, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", RUN_IN_FOREGROUND, str(tmp_path), database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"up {process.pid}\n"
            nats_pid = json.loads((tmp_path / "pids.json").read_text())["children"][0]["pid"]
            process.send_signal(number)
            wait_until(lambda: not (tmp_path / "stack.json").exists())
            process.send_signal(number)  # 终端与上层工具可能各发一次：第二次不能打断停下的过程
            assert process.stdout.readline() == "down\n"
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert identify(nats_pid) is None
    assert read_addresses(tmp_path) is None


def test_addresses_of_a_killed_stack_do_not_count(tmp_path: Path, database_url: str) -> None:
    command = [sys.executable, "-c", RUN_IN_FOREGROUND, str(tmp_path), database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("up")
        first = read_addresses(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
    assert isinstance(first, StackAddresses)
    assert (tmp_path / "stack.json").exists()
    assert read_addresses(tmp_path) is None

    with build_stack(tmp_path, database_url=database_url) as second:
        assert second.nats_url == first.nats_url


def planned(tmp_path: Path, *, workers: int) -> ApplicationPlan:
    return ApplicationPlan(
        forkserver=Forkserver({}),
        environment={},
        workspace=tmp_path / "workspace.yaml",
        code_server_port=1,
        ui_descriptor=2,
        workers=workers,
    )


def test_real_application_is_one_code_server_ui_daemon_listener_and_workers(tmp_path: Path) -> None:
    services = {service.name: service.after for service in application_services(planned(tmp_path, workers=3))}

    assert services == {
        "code-server": ("forkserver",),
        "listener": ("forkserver",),
        "worker-1": ("forkserver",),
        "worker-2": ("forkserver",),
        "worker-3": ("forkserver",),
        "webserver": ("forkserver", "code-server"),
        "daemon": ("forkserver", "code-server"),
    }


def test_what_takes_seconds_to_stop_is_not_killed_in_a_normal_stop(tmp_path: Path) -> None:
    services = application_services(planned(tmp_path, workers=2))
    patience = {service.name: service.stop_timeout_seconds for service in services}
    assert min(patience["daemon"], patience["code-server"], patience["worker-1"]) >= 30
