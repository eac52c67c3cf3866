"""几台主机：三节点的 NATS、一对 PostgreSQL、两个监听器、四个工人、网页与守护进程，各在自己的主机上。

断网、断电、升备库、换领导者，有的钟快三十秒有的慢三十秒；最后什么也没丢，什么也没做两遍，表等于参照。
平日半分钟、两个工人、小的历史，没有网页；`pdm run test-chaos` 十分钟，按种子轮到谁算谁，最后在网页上点一下。
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.nats_names import EVENTS_STREAM, TASKS_STREAM
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import DAGSTER_SCHEMA
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.postgres_binaries import unprivileged_account
from etl_assets.testing.databases import initialize_database
from tests.acceptance.conftest import asking
from tests.acceptance.dagster_ui import DagsterUi
from tests.chaos import verdict
from tests.chaos.generator import Generator
from tests.chaos.hosts import Host, hosts, why_no_hosts
from tests.chaos.house import HISTORY, SMALL_HISTORY, furnish
from tests.chaos.installation import REPOSITORY, Installation, running_installation
from tests.chaos.postgres_pair import PostgresPair
from tests.chaos.verdict import say
from tests.integration.host import eventually
from tests.integration.nats_cluster import NatsCluster

NATS = ("nats-1", "nats-2", "nats-3")
POSTGRES = ("postgres-1", "postgres-2")
LISTENERS = ("listener-1", "listener-2")
WORKERS = ("worker-1", "worker-2", "worker-3", "worker-4")
UI = ("webserver", "daemon")
UI_PORT = 3000
CLOCKS = {"listener-2": "-30s", "worker-2": "+30s", "worker-3": "-30s"}
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
SUCCEEDED = f"{DAGSTER_SCHEMA}.runs WHERE status = 'SUCCESS'"
DRAIN_SECONDS = 240
SHORT_MINUTES = 0.5
SHORT_EVENTS_PER_SECOND, EVENTS_PER_SECOND = 4, 20


@contextmanager
def postgres_pair(rack: dict[str, Host]) -> Iterator[PostgresPair]:
    """不在 tmp_path 里：运行 PostgreSQL 的账户走不进去。"""
    with tempfile.TemporaryDirectory(prefix="etl-hosts-") as parent:
        os.chmod(parent, 0o711)  # noqa: S103, PTH101
        folder = Path(parent) / "data"
        folder.mkdir(0o700)
        if account := unprivileged_account():
            os.chown(folder, account.pw_uid, account.pw_gid)
        pair = PostgresPair(folder, [rack[name] for name in POSTGRES])
        pair.start()
        yield pair
        pair.stop()


def command(host: Host) -> list[str]:
    """监听器或工人；装了 faketime，有几台的钟不准。"""
    role = "listen" if host.name in LISTENERS else "worker"
    words = [sys.executable, "-P", "-m", "bridge.cli.main", role]
    if FAKETIME.exists() and host.name in CLOCKS:
        skewed = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": CLOCKS[host.name], "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        words = ["env", *(f"{name}={value}" for name, value in skewed.items()), *words]
    return host.command(words)


def ui_command(host: Host) -> list[str]:
    """Dagster 自己的命令，像 deploy/ 里那样。"""
    words = {
        "webserver": ["dagster-webserver", "--host", host.address, "--port", str(UI_PORT)],
        "daemon": ["dagster-daemon", "run"],
    }[host.name]
    program = Path(sys.executable).with_name(words[0])
    return host.command([program, *words[1:], "--workspace", REPOSITORY / "deploy" / "dagster" / "workspace.yaml"])


class Weather:
    """对主机做的事；其间死了的进程有人补上，没电的主机上的除外。"""

    def __init__(
        self, installation: Installation, rack: dict[str, Host], cluster: NatsCluster, pair: PostgresPair
    ) -> None:
        self._installation = installation
        self._rack = rack
        self._cluster = cluster
        self._pair = pair

    def pass_by(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._installation.keep()
            time.sleep(0.1)

    def cut_link(self, name: str, seconds: float) -> None:
        """两台服务器主机的也剪：那时没有多数的、没有主库的那一边只能等。"""
        self._rack[name].unplug()
        self.pass_by(seconds)
        self._rack[name].plug()

    def cut_power(self, name: str, seconds: float) -> None:
        """一台只有我们的进程的主机。"""
        words = self._installation.commands.pop(name)
        self._rack[name].kill()
        self.pass_by(seconds)
        self._rack[name].plug()
        self._installation.commands[name] = words

    def cut_power_of_leader(self, stream: str, seconds: float) -> None:
        leader = self._rack[NATS[self._cluster.names.index(self._cluster.leader(stream))]]
        leader.kill()
        self.pass_by(seconds)
        leader.plug()
        self._cluster.restart()

    def fail_over(self, seconds: float) -> None:
        """主库断电，备库升上来；又有运行做成了，旧的那一台的地址才有回音。"""
        self._pair.fail_over()
        started, before = time.monotonic(), self._pair.count(SUCCEEDED)
        while self._pair.count(SUCCEEDED) == before:
            assert time.monotonic() < started + DRAIN_SECONDS, "no run succeeds on the promoted standby"
            self.pass_by(1)
        say(f"{time.monotonic() - started:.0f} s after the primary vanished a run succeeds on the promoted standby")
        self.pass_by(seconds)
        self._pair.rejoin()


def short(weather: Weather) -> None:
    weather.pass_by(3)
    weather.cut_link("worker-1", 8)
    weather.fail_over(2)
    weather.cut_power_of_leader(EVENTS_STREAM, 5)


def long(weather: Weather, minutes: float, seed: int) -> None:
    chance = random.Random(f"{seed} hosts")  # noqa: S311 不关安全
    deadline = time.monotonic() + minutes * 60
    while time.monotonic() < deadline:
        weather.pass_by(chance.uniform(1, 10))
        seconds = chance.uniform(2, 20)
        which = chance.random()
        if which < 0.4:
            weather.cut_link(chance.choice([*NATS, *POSTGRES, *LISTENERS, *WORKERS, *UI]), seconds)
        elif which < 0.7:
            weather.cut_power(chance.choice([*LISTENERS, *WORKERS, *UI]), seconds)
        elif which < 0.85:
            weather.cut_power_of_leader(chance.choice([EVENTS_STREAM, TASKS_STREAM]), seconds)
        else:
            weather.fail_over(seconds)


def click(address: str) -> None:
    """网页那台主机什么都经历过了：点一下，工人照样做完；守护进程还有心跳。"""
    query = asking(f"http://{address}:{UI_PORT}")
    ui = DagsterUi(query)
    run_id = eventually(lambda: ui.launch(day=HISTORY.last_day.isoformat()), "the webserver does not answer", 120)
    assert ui.wait(run_id, timeout_seconds=120)["status"] == "SUCCESS"
    health = "{ instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } } }"

    def is_healthy() -> bool:
        found = query(health)["instance"]["daemonHealth"]["allDaemonStatuses"]
        return all(daemon["healthy"] for daemon in found if daemon["required"])

    eventually(is_healthy, "a daemon is not healthy", 120)


@pytest.mark.timeout(2_400)
def test_hosts_that_lose_link_power_and_clock_lose_no_data(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if reason := why_no_hosts():
        pytest.skip(reason)
    minutes, seed = request.config.getoption("--minutes"), request.config.getoption("--seed")
    seed = random.SystemRandom().randrange(10**9) if seed is None else seed
    say(f"seed {seed}; {'clocks differ by 30 s' if FAKETIME.exists() else 'no libfaketime: all clocks agree'}")
    applications = [*LISTENERS, *(WORKERS if minutes else WORKERS[:2])]
    with (
        hosts([*NATS, *POSTGRES, *applications, *(UI if minutes else ())]) as rack,
        postgres_pair(rack) as pair,
        ExitStack() as cleanup,
    ):
        cluster = NatsCluster(tmp_path, [rack[name] for name in NATS])
        cleanup.callback(cluster.stop)
        cluster.start()
        settings = EtlSettings(database_url=pair.url)
        engine = build_engine(settings)
        cleanup.callback(engine.dispose)
        initialize_database(engine)
        with running_installation(
            tmp_path,
            database_url=pair.url,
            nats_url=cluster.url,
            commands={name: command(rack[name]) for name in applications},
            reroute=lambda environment: {**environment, "ETL_NATS_REPLICAS": "3"},
        ) as installation:
            furnish(engine, settings, HISTORY if minutes else SMALL_HISTORY)
            bridge_settings = BridgeSettings(nats_url=cluster.url, nats_replicas=3)
            events_per_second = EVENTS_PER_SECOND if minutes else SHORT_EVENTS_PER_SECOND
            generator = Generator(engine, bridge_settings, seed=seed, events_per_second=events_per_second)
            generator.start()
            weather = Weather(installation, rack, cluster, pair)
            if minutes is None:
                short(weather)
            else:
                installation.commands |= {name: ui_command(rack[name]) for name in UI}
                long(weather, minutes, seed)
                click(rack["webserver"].address)
            generator.stop(timeout_seconds=60)
            draining = verdict.wait_until_drained(
                engine, bridge_settings, since=time.monotonic(), limit_seconds=DRAIN_SECONDS
            )
            say(f"{len(generator.stored)} events, drained in {asyncio.run(draining):.1f} s")
            assert len(generator.stored) >= (minutes or SHORT_MINUTES) * 60 * events_per_second / 2  # 换主库时存不下
            asyncio.run(judge(engine, settings, bridge_settings, generator))


async def judge(
    engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings, generator: Generator
) -> None:
    letters = await verdict.explain_dead_letters(bridge_settings)
    assert {stream: dict(found) for stream, found in letters.items() if found} == {}
    events = await verdict.read_events(bridge_settings)
    assert verdict.announced_twice(events) == []
    verdict.assert_nothing_is_lost(engine, settings, events, generator.stored)
