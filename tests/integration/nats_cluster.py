"""三个节点的 nats-server 集群，要口令；杀得掉某个流的领导者，也能让它回来。"""

from __future__ import annotations

import json
import socket
import subprocess
import sysconfig
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .host import eventually

PASSWORD = "s3cret"
_NODES = 3
_READY_SECONDS = 40.0


class Place(Protocol):
    """一个节点在哪里：它听的地址，以及怎样在那里跑一条命令。"""

    @property
    def address(self) -> str: ...

    def command(self, words: Sequence[str | Path]) -> list[str]: ...


class _Loopback:
    address = "127.0.0.1"

    def command(self, words: Sequence[str | Path]) -> list[str]:
        return [*map(str, words)]


class NatsCluster:
    """三个进程，彼此有路由，都开着 JetStream；`url` 写着全部三个。死了的节点由 `restart` 补上。

    :param places: 三个节点各在哪里；不给就都在回环地址上。
    """

    def __init__(self, folder: Path, places: Sequence[Place] = (_Loopback(),) * _NODES) -> None:
        self._folder = folder
        ports = _free_ports(3 * _NODES)
        self.names = [f"n{number}" for number in range(_NODES)]
        self._places = dict(zip(self.names, places, strict=True))
        self._ports = dict(zip(self.names, ports[:_NODES], strict=True))
        self._routes = dict(zip(self.names, ports[_NODES : 2 * _NODES], strict=True))
        self._monitors = dict(zip(self.names, ports[2 * _NODES :], strict=True))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = ",".join(f"nats://etl:{PASSWORD}@{self._at(name, self._ports)}" for name in self.names)

    @property
    def dead(self) -> list[str]:
        """现在没有在跑的节点。"""
        return [name for name in self.names if not self._is_alive(name)]

    def start(self) -> None:
        """三个都起来、选出了元数据的领导者才返回。"""
        self.restart()
        eventually(self._has_meta_leader, "the cluster elects no meta leader", _READY_SECONDS)

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
        self._processes.clear()

    def restart(self) -> None:
        """死了的节点带着自己的存储回来；不等它们追上。"""
        for name in self.dead:
            self._launch(name)
        for name in self.names:
            self._until_listening(name)

    def kill(self, name: str) -> None:
        """kill -9 一个节点。"""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def kill_leader(self, stream: str) -> str:
        """kill -9 这个流此刻的领导者，返回它的名字。"""
        name = self.leader(stream)
        self.kill(name)
        return name

    def leader(self, stream: str) -> str:
        """这个流此刻的领导者；正在选就等。"""
        return str(eventually(lambda: self._leader(stream), f"stream {stream} has no leader", _READY_SECONDS))

    def _at(self, name: str, ports: dict[str, int]) -> str:
        return f"{self._places[name].address}:{ports[name]}"

    def _is_alive(self, name: str) -> bool:
        process = self._processes.get(name)
        return process is not None and process.poll() is None

    def _launch(self, name: str) -> None:
        """nats-server 的配置语法包含 JSON。"""
        config = {
            "server_name": name,
            "listen": self._at(name, self._ports),
            "http": self._at(name, self._monitors),  # 谁是领导者，问它
            "jetstream": {"store_dir": str(self._folder / name), "max_file_store": 1 << 34},
            "authorization": {"users": [{"user": "etl", "password": PASSWORD}]},
            "cluster": {
                "name": "dayline",
                "listen": self._at(name, self._routes),
                "routes": [f"nats-route://{self._at(other, self._routes)}" for other in self.names],
            },
        }
        config_file = self._folder / f"{name}.conf"
        config_file.write_text(json.dumps(config))
        program = Path(sysconfig.get_path("scripts")) / "nats-server"
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                self._places[name].command([program, "--config", config_file]), stdout=log, stderr=log
            )

    def _until_listening(self, name: str) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                socket.create_connection((self._places[name].address, self._ports[name]), timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline, (self._folder / f"{name}.log").read_text()
                time.sleep(0.02)
            else:
                return

    def _has_meta_leader(self) -> bool:
        """三个节点都认同一个，另外两个都跟上了它。"""
        seen = {name: self._monitor(name).get("meta_cluster", {}) for name in self.names}
        leaders = {meta.get("leader") for meta in seen.values()}
        if len(leaders) > 1 or not (leader := leaders.pop()):
            return False
        followers = seen[leader].get("replicas") or []
        return len(followers) == _NODES - 1 and all(follower.get("current") for follower in followers)

    def _leader(self, stream: str) -> str | None:
        """活着的节点都认的那一个；正在选就是 None。"""
        for name in self.names:
            if not self._is_alive(name):
                continue
            for account in self._monitor(name).get("account_details") or []:
                for detail in account.get("stream_detail") or []:
                    leader = detail.get("cluster", {}).get("leader")
                    if detail["name"] == stream and leader and self._is_alive(leader):
                        return str(leader)
        return None

    def _monitor(self, name: str) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(
                f"http://{self._at(name, self._monitors)}/jsz?streams=true", timeout=2
            ) as answer:
                content: dict[str, Any] = json.load(answer)
        except OSError:
            return {}
        return content


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
