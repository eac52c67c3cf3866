"""什么都不丢：真的栈在不停的导入之下，被随时杀死、冻住、断网、占满磁盘、改成只读、灌满垃圾，店铺与映射也改来改去，最后一切都做完，表等于参照。

平日一分钟；`pdm run test-chaos` 十分钟，`--seed` 重放一次失败的，`--minutes` 另定长短。重放的是谁在什么时候遭殃，
机器的快慢重放不了。
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.application import ApplicationPlan, application_services
from bridge.stack.local import Stack
from bridge.stack.readiness import logged_ready
from bridge.stack.supervisor import Service
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.child_process import launch
from etl_assets.embedded.loopback_port import accepts_connections
from etl_assets.ledger.marking import Scope
from tests.chaos import verdict
from tests.chaos.disks import Disk, small_disks
from tests.chaos.floods import Floods
from tests.chaos.generator import Generator
from tests.chaos.house import HISTORY, furnish
from tests.chaos.monkey import Monkey, Reach
from tests.chaos.network import Network
from tests.chaos.processes import SERVERS, StackProcesses
from tests.chaos.read_only import ReadOnlySwitch
from tests.chaos.references import References
from tests.chaos.verdict import say
from tests.integration.nats_cluster import NatsCluster
from tests.integration.old_version import OldProcess
from tests.the_three import graph

WORKERS = 2
MANAGER = "manager"
BEHIND_LINKS = ("worker-2", MANAGER, "listener")
# 等不到导入的事件早些进死信，才排得完；别的都是缺省值
ENVIRONMENT = {"ETL_EVENT_RETRY_SECONDS": "20", "ETL_EVENT_RETRY_DELAY_MAX_SECONDS": "5"}
OF_CLUSTER = {"ETL_NATS_REPLICAS": "3"}
DRAIN_SECONDS = 60
PATIENT_DRAIN_SECONDS = 240
KILLS_PER_MINUTE = 20
EVENTS_PER_MINUTE = 2_000


@dataclass(frozen=True)
class Form:
    """一次折腾：多久、哪个种子、NATS 是不是集群；平日的短形式在又忙又慢的机器上也跑，不计较快慢。"""

    minutes: float
    seed: int
    is_strict: bool
    on_cluster: bool

    def __str__(self) -> str:
        options = f"--seed {self.seed} --minutes {self.minutes:g}{' --cluster' if self.on_cluster else ''}"
        return f"seed {self.seed}, {self.minutes:g} minutes; again: pdm run test-chaos {options}"


@pytest.fixture
def form(request: pytest.FixtureRequest) -> Form:
    minutes, seed = request.config.getoption("--minutes"), request.config.getoption("--seed")
    return Form(
        minutes=1.0 if minutes is None else minutes,
        seed=random.SystemRandom().randrange(10**9) if seed is None else seed,
        is_strict=minutes is not None,
        on_cluster=request.config.getoption("--cluster"),
    )


@pytest.fixture
def cluster(form: Form, tmp_path: Path) -> Iterator[NatsCluster | None]:
    if not form.on_cluster:
        yield None
        return
    cluster = NatsCluster(tmp_path)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def disks(form: Form, state_dir: Path) -> Iterator[list[Disk]]:
    with small_disks(state_dir, [server for server in SERVERS if server != "nats" or not form.on_cluster]) as disks:
        yield disks


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


# 服务器在连上的那一刻被杀，nats-py 重连时留下没关的套接字，垃圾回收才收走
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_nothing_is_lost(
    form: Form,
    state_dir: Path,
    disks: list[Disk],
    network: Network,
    cluster: NatsCluster | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (ENVIRONMENT | (OF_CLUSTER if cluster else {})).items():
        monkeypatch.setenv(name, value)

    def services(plan: ApplicationPlan) -> list[Service]:
        return [
            _behind_links(network, plan, service) if service.name in BEHIND_LINKS else service
            for service in _services(plan)
        ]

    say(str(form))
    if not disks:
        say("full disks are left out: this user may not mount file systems")
    processes = StackProcesses(state_dir)
    bridge_settings = BridgeSettings(nats_url=cluster.url if cluster else "")
    stack = Stack(
        state_dir,
        settings=EtlSettings(database_url=""),
        bridge_settings=bridge_settings,
        workers=WORKERS,
        services=services,
    )
    try:
        with stack as addresses:
            assert [link.name for link in network.links if not link.is_used] == []
            bridge_settings = BridgeSettings(nats_url=addresses.nats_url)
            read_only, floods = ReadOnlySwitch(addresses.database_url), Floods(bridge_settings)
            old_listener = OldProcess(
                state_dir.parent / "old", ETL_DATABASE_URL=addresses.database_url, ETL_NATS_URL=addresses.nats_url
            )
            references = References(addresses.database_url, bridge_settings)
            reach = Reach(
                processes, network, disks, read_only, floods, old_listener, references, bridge_settings, cluster
            )
            monkey = Monkey(reach, seed=form.seed)
            try:
                _live_through(form, addresses, monkey, floods)
            except BaseException:
                say("\n".join(["what the monkey did:", *monkey.history]))
                raise
        assert processes.survivors() == []
        assert [port for port in _ports(addresses, state_dir) if accepts_connections(port)] == []
    except BaseException as error:
        error.add_note(f"seed {form.seed}; the logs are in {state_dir / 'logs'}")
        raise


def _live_through(form: Form, addresses: StackAddresses, monkey: Monkey, floods: Floods) -> None:
    settings = EtlSettings(database_url=addresses.database_url)
    bridge_settings = BridgeSettings(nats_url=addresses.nats_url)
    with ExitStack() as cleanup:
        engine = build_engine(settings)
        cleanup.callback(engine.dispose)
        furnish(engine, settings)
        say(f"{HISTORY.orders:,} orders of {HISTORY.days} days are in place")
        generator = Generator(engine, bridge_settings, seed=form.seed)
        generator.start()
        monkey.start()
        cleanup.callback(monkey.stop)
        time.sleep(form.minutes * 60)
        monkey.stop()
        last_kill_at = monkey.kill_a_last_worker()
        generator.stop(timeout_seconds=60)
        draining = verdict.wait_until_drained(
            engine, bridge_settings, since=last_kill_at, limit_seconds=PATIENT_DRAIN_SECONDS
        )
        seconds = asyncio.run(draining)  # 太慢也要失败，不过先核对：慢是慢，错是错
        events, kills, scopes = len(generator.stored), sum(monkey.kills.values()), verdict.assets_by_scope(engine)
        say(
            f"{events} events ({generator.doubled} published twice, {generator.withdrawn} withdrawals, {generator.retries} retries), "
            f"new versions of {generator.changed_history} orders of the history\n"
            f"{kills} kills: {_counts(monkey.kills)}\ntroubles: {_counts(monkey.troubles)}\n"
            f"{len(floods.waiting)} events without an import, {len(floods.garbage)} pieces of garbage, a letter for each\n"
            f"drained {seconds:.1f} s after the last kill\nruns: {_counts(verdict.runs_by_status(engine))}\n"
            f"materialized: {_counts(scopes)}"
        )
        asyncio.run(_judge(engine, settings, bridge_settings, generator, floods))
        if form.is_strict:
            assert events >= form.minutes * EVENTS_PER_MINUTE
            assert kills >= form.minutes * KILLS_PER_MINUTE
            assert seconds <= DRAIN_SECONDS
            assert all(
                any(name.startswith(f"{asset} {scope}") for name in scopes)
                for asset in graph.names
                for scope in get_args(Scope)
            )


async def _judge(
    engine: sa.Engine, settings: EtlSettings, bridge_settings: BridgeSettings, generator: Generator, floods: Floods
) -> None:
    letters = await verdict.explain_dead_letters(bridge_settings)
    say("\n".join(f"dead letters in {stream}: {dict(reasons)}" for stream, reasons in letters.items()))
    assert await verdict.misjudged(bridge_settings, floods, generator.stored.values()) == []
    events = await verdict.read_events(bridge_settings)
    verdict.assert_nothing_is_lost(engine, settings, events, generator.stored)


def _behind_links(network: Network, plan: ApplicationPlan, service: Service) -> Service:
    own = plan.as_role("listener" if service.name == "listener" else "worker")
    rerouted = replace(own, environment=network.reroute(service.name, own.environment), logins={})
    return next(same for same in _services(rerouted) if same.name == service.name)


def _services(plan: ApplicationPlan) -> list[Service]:
    """栈的那些，加上一个带着两个工人的管理者。"""
    command = [sys.executable, "-P", "-m", "bridge.cli.main", "worker", "--processes", "2"]
    environment = plan.as_role("worker").environment
    manager = Service(MANAGER, partial(launch, command, env=environment), logged_ready, stop_timeout_seconds=30)
    return [*application_services(plan), manager]


def _ports(addresses: StackAddresses, state_dir: Path) -> list[int]:
    code_server = json.loads((state_dir / "workspace.yaml").read_text())["load_from"][0]["grpc_server"]["port"]
    own = [addresses.database_url, addresses.ui_url, *([] if "," in addresses.nats_url else [addresses.nats_url])]
    return [code_server, *[urlsplit(url).port or 0 for url in own]]


def _counts(counted: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counted.items(), key=lambda item: -item[1]))
