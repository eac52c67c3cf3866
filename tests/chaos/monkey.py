"""捣乱的猴子：按种子决定什么时候、对谁、做什么；走的时候把一切还原。"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import sqlalchemy as sa

from bridge.errors import BridgeError
from bridge.nats_names import EVENTS_STREAM, TASKS_STREAM
from bridge.settings import BridgeSettings
from etl_assets.embedded.child_process import send_group_signal, send_signal
from tests.chaos import verdict
from tests.chaos.disks import Disk
from tests.chaos.floods import Floods
from tests.chaos.house import MAPPED_TYPES, SHOPS, UNMAPPED_TYPE
from tests.chaos.network import Network
from tests.chaos.processes import StackProcesses
from tests.chaos.read_only import ReadOnlySwitch
from tests.chaos.references import References
from tests.integration.nats_cluster import NatsCluster
from tests.integration.old_version import OldProcess

KILL_PAUSE_SECONDS = (1.2, 3.6)
FREEZE_PAUSE_SECONDS = (1.0, 8.0)
PARTITION_PAUSE_SECONDS = (1.0, 12.0)
SILENCE_PAUSE_SECONDS = (3.0, 20.0)
FULL_DISK_PAUSE_SECONDS = (10.0, 30.0)
READ_ONLY_PAUSE_SECONDS = (10.0, 40.0)
PURGE_PAUSE_SECONDS = (10.0, 40.0)
FLOOD_PAUSE_SECONDS = (10.0, 40.0)
LEADER_PAUSE_SECONDS = (5.0, 25.0)
OLD_VERSION_PAUSE_SECONDS = (20.0, 60.0)
REFERENCES_PAUSE_SECONDS = (20.0, 240.0)  # 每改一次，三百天都要整天重做：太密就没有只做变了的
_LONGEST_FREEZE_SECONDS = 15.0
_LONGEST_PARTITION_SECONDS = 20.0
_LONGEST_FULL_DISK_SECONDS = 8.0
_LONGEST_READ_ONLY_SECONDS = 8.0
_LONGEST_LEADERLESS_SECONDS = 12.0
_LONGEST_OLD_VERSION_SECONDS = 30.0
_LONGEST_RENAMED_SECONDS = 10.0
_LARGEST_FLOOD = 500  # 十分钟的死信要装得下：满了的 EVENTS_DLQ 拒收，就排不完
_VICTIMS = {
    "worker": 4,
    "manager": 2,
    "listener": 3,
    "webserver": 1,
    "daemon": 1,
    "code-server": 1,
    "nats": 3,
    "postgres": 2,
    "postgres backend": 3,
}
_STOP_SIGNALS = {"postgres": signal.SIGINT}  # SIGTERM 让 postmaster 等到每个会话自己走
_FROZEN = {"worker": 5, "listener": 3, "webserver": 1, "daemon": 1, "code-server": 1, "nats": 2, "postgres": 2}


@dataclass(frozen=True)
class Reach:
    """猴子够得着的东西。"""

    processes: StackProcesses
    network: Network
    disks: Sequence[Disk]
    read_only: ReadOnlySwitch
    floods: Floods
    old_listener: OldProcess
    references: References
    bridge_settings: BridgeSettings
    cluster: NatsCluster | None = None
    """NATS 的第二种形式：三个节点，没有内嵌的那一个。"""


class Monkey:
    """一样乱一个线程：杀、冻住、断网、让连接哑掉、占满磁盘、只读、清空任务、两种急流、旧版本、改店铺与映射，随时撞在一起。"""

    def __init__(self, reach: Reach, *, seed: int) -> None:
        self.kills: Counter[str] = Counter()
        self.troubles: Counter[str] = Counter()
        self.history: list[str] = []
        self._reach = reach
        self._seed = seed
        self._stopping = threading.Event()
        self._old_or_read_only = threading.Lock()
        self._errors: list[Exception] = []
        deeds = [
            (self._kill, KILL_PAUSE_SECONDS),
            (self._freeze, FREEZE_PAUSE_SECONDS),
            (self._partition, PARTITION_PAUSE_SECONDS),
            (self._silence, SILENCE_PAUSE_SECONDS),
            (self._make_read_only, READ_ONLY_PAUSE_SECONDS),
            (self._purge_tasks, PURGE_PAUSE_SECONDS),
            (self._flood_with_waiting, FLOOD_PAUSE_SECONDS),
            (self._flood_with_garbage, FLOOD_PAUSE_SECONDS),
            (self._run_old_version, OLD_VERSION_PAUSE_SECONDS),
            (self._change_references, REFERENCES_PAUSE_SECONDS),
            *([(self._fill, FULL_DISK_PAUSE_SECONDS)] if reach.disks else []),
            *([(partial(self._kill_leader, reach.cluster), LEADER_PAUSE_SECONDS)] if reach.cluster else []),
        ]
        self._threads = [
            threading.Thread(target=self._repeat, args=deed, name=f"monkey-{number}", daemon=True)
            for number, deed in enumerate(deeds)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """正捣着的乱立刻还原；可以多次调用。"""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def kill_a_last_worker(self) -> float:
        """返回那一刻（单调时钟）。"""
        while not (workers := self._reach.processes.leaders("worker")):
            time.sleep(0.1)
        return self._send(workers[-1], signal.SIGKILL, "worker")

    def _repeat(self, deed: Callable[[random.Random], None], pause_seconds: tuple[float, float]) -> None:
        chance = random.Random(f"{self._seed} {threading.current_thread().name}")  # noqa: S311  # 不关安全
        try:
            while not self._stopping.wait(chance.uniform(*pause_seconds)):
                deed(chance)
        except Exception as error:  # noqa: BLE001  # 交给 stop 抛出
            self._errors.append(error)

    # ---- 杀 --------------------------------------------------------------------

    def _kill(self, chance: random.Random) -> None:
        victim = _pick(chance, _VICTIMS)
        number = _STOP_SIGNALS.get(victim, signal.SIGTERM) if chance.random() < 0.15 else signal.SIGKILL
        pids = (
            self._reach.processes.backends() if victim == "postgres backend" else self._reach.processes.leaders(victim)
        )
        if not pids:  # 正在重启，或者 NATS 是集群：这一回算了
            return
        self._send(chance.choice(pids), number, victim)

    def _send(self, pid: int, number: signal.Signals, victim: str) -> float:
        send_signal(pid, number)
        self.kills[f"{victim} {number.name}"] += 1
        self._note(f"{number.name} {victim} {pid}")
        return time.monotonic()

    # ---- 别的乱 ----------------------------------------------------------------

    def _freeze(self, chance: random.Random) -> None:
        """冻住整个进程组；冻住服务器，就像它的磁盘慢得没有回音。"""
        part = _pick(chance, _FROZEN)
        seconds = chance.uniform(1, _LONGEST_FREEZE_SECONDS)
        leaders = self._reach.processes.leaders(part)
        if not leaders:
            return
        leader = chance.choice(leaders)
        backends = self._reach.processes.backends() if part == "postgres" else []
        with self._for_a_while(f"freeze {part}", seconds):
            for pid in (leader, *backends):
                send_group_signal(pid, signal.SIGSTOP)
            self._stopping.wait(seconds)
            for pid in (leader, *backends):
                send_group_signal(pid, signal.SIGCONT)

    def _partition(self, chance: random.Random) -> None:
        link = chance.choice(self._reach.network.links)
        seconds = chance.uniform(1, _LONGEST_PARTITION_SECONDS)
        is_reset = chance.random() < 0.5
        with self._for_a_while(f"partition {link.name}", seconds):
            self._reach.network.cut(link)
            self._stopping.wait(seconds)
            self._reach.network.heal(link, is_reset=is_reset)

    def _silence(self, chance: random.Random) -> None:
        """此刻的连接都哑掉；没有什么要还原：醒不过来的，要由它们自己换掉。"""
        link = chance.choice(self._reach.network.links)
        self._reach.network.drop(link)
        self.troubles[f"silence {link.name}"] += 1
        self._note(f"silence {link.name}")

    def _fill(self, chance: random.Random) -> None:
        disk = chance.choice(self._reach.disks)
        seconds = chance.uniform(1, _LONGEST_FULL_DISK_SECONDS)
        with self._for_a_while(f"full disk {disk.server}", seconds):
            disk.fill()
            self._stopping.wait(seconds)
            disk.free()

    def _make_read_only(self, chance: random.Random) -> None:
        """新旧会话都写不了；窗口里开的会话，关上以后还是只读。"""
        seconds = chance.uniform(1, _LONGEST_READ_ONLY_SECONDS)
        with self._old_or_read_only, self._for_a_while("read-only database", seconds):
            try:
                with suppress(sa.exc.DBAPIError):  # 服务器正好不在
                    self._reach.read_only.turn_on()
                self._stopping.wait(seconds)
            finally:
                self._reach.read_only.turn_off()

    def _kill_leader(self, cluster: NatsCluster, chance: random.Random) -> None:
        """一次只死一个：剩下的两个还选得出领导者。"""
        stream = chance.choice([EVENTS_STREAM, TASKS_STREAM])
        seconds = chance.uniform(1, _LONGEST_LEADERLESS_SECONDS)
        with self._for_a_while(f"leader of {stream} killed", seconds):
            self.kills[f"nats SIGKILL, leader of {stream}"] += 1
            cluster.kill_leader(stream)
            self._stopping.wait(seconds)
            cluster.restart()

    def _run_old_version(self, chance: random.Random) -> None:
        """升级到一半：0.1.0 的监听器也在听。只读的窗口里不开：那里它埋掉好事件，正是 0.2 修好的。"""
        seconds = chance.uniform(5, _LONGEST_OLD_VERSION_SECONDS)
        with self._old_or_read_only, self._for_a_while("listener of 0.1.0", seconds):
            self._reach.old_listener.start()
            try:
                self._stopping.wait(seconds)
            finally:
                self._reach.old_listener.kill()

    def _change_references(self, chance: random.Random) -> None:
        """映射改了就留着；店铺改了名又改回来，其间整天的运行宁可失败也不删它的订单。"""
        references, shop = self._reach.references, chance.choice(SHOPS)
        if chance.random() < 0.5:
            raw_type, system_type = (
                chance.choice([*MAPPED_TYPES, UNMAPPED_TYPE]),
                chance.choice(["SAMPLE", "PROOF", "BULK", None]),
            )
            self.troubles["mapping changed"] += 1
            self._note(f"map {raw_type} to {system_type}")
            references.map_type(raw_type, system_type)
        else:
            seconds = chance.uniform(1, _LONGEST_RENAMED_SECONDS)
            with self._for_a_while(f"{shop} renamed", seconds):
                references.rename_shop(shop, f"{shop}（新）")
                self._stopping.wait(seconds)
                references.rename_shop(f"{shop}（新）", shop)
        references.ask_for_whole_days()
        self._note("whole days are asked for")

    def _purge_tasks(self, _chance: random.Random) -> None:
        """门铃都没了；台账还在。"""
        self.troubles["TASKS purged"] += 1
        self._note("purge TASKS")
        with suppress(BridgeError):
            asyncio.run(verdict.purge(self._reach.bridge_settings, TASKS_STREAM))

    def _flood_with_waiting(self, chance: random.Random) -> None:
        count = chance.randint(100, _LARGEST_FLOOD)
        self.troubles["flood of waiting events"] += 1
        self._note(f"{count} events without an import")
        self._reach.floods.pour_waiting(count)

    def _flood_with_garbage(self, chance: random.Random) -> None:
        count = chance.randint(100, _LARGEST_FLOOD)
        self.troubles["flood of garbage"] += 1
        self._note(f"{count} pieces of garbage")
        self._reach.floods.pour_garbage(count)

    @contextmanager
    def _for_a_while(self, trouble: str, seconds: float) -> Iterator[None]:
        self.troubles[trouble] += 1
        self._note(f"{trouble} for {seconds:.1f} s")
        yield
        self._note(f"{trouble} is over")

    def _note(self, what: str) -> None:
        self.history.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")


def _pick(chance: random.Random, weights: dict[str, int]) -> str:
    return chance.choices(list(weights), weights=list(weights.values()))[0]
