"""一台机器装作几台：每台是一个网络命名空间，有自己的地址，由 veth 接到同一个交换机上。

命名空间靠占着它的进程活着，测试进程死了它们也死：机器上什么也不留下。
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_TOOLS = ("ip", "nsenter", "setpriv", "unshare")
_PORT = "etl0"
"""主机的网卡；交换机上的一头叫主机的名字。"""
_numbers = itertools.count()


class Host:
    """一台主机；`command` 把一条命令变成在它上面跑的。"""

    def __init__(self, name: str, address: str, *, pid: int, switch: int) -> None:
        self.name = name
        self.address = address
        self._pid = pid
        self._switch = switch

    def command(self, words: Sequence[str | Path]) -> list[str]:
        return _inside(self._pid, *words)

    def unplug(self) -> None:
        """网线拔了：两头都以为它还在，只是没有回音。"""
        _run(_inside(self._switch, "ip", "link", "set", "dev", self.name, "nomaster"))

    def plug(self) -> None:
        _run(_inside(self._switch, "ip", "link", "set", "dev", self.name, "master", "switch"))

    def kill(self) -> None:
        """断电：先没了网，再没了进程，别人连一个 FIN 也收不到。`plug` 让它带着空的内存回来。"""
        self.unplug()
        while pids := [pid for pid in self._processes() if pid != self._pid]:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _processes(self) -> Iterator[int]:
        own = Path(f"/proc/{self._pid}/ns/net").readlink()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # 刚刚结束
                if entry.name.isdigit() and (entry / "ns" / "net").readlink() == own and not _is_zombie(entry):
                    yield int(entry.name)


def why_no_hosts() -> str:
    """这台机器上为什么装不出几台；装得出就是空的。"""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(missing)}"
    with suppress(OSError, subprocess.CalledProcessError), hosts(["one"]):
        return ""
    return "this user may not make network namespaces, or the kernel has no bridge or veth"


@contextmanager
def hosts(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """名字 → 主机；本进程也接在交换机上，连得到每一台。离开时它们上面的进程全部结束。"""
    pid, which = os.getpid(), next(_numbers)  # 前一个交换机的网卡，内核过一会儿才收走
    network = f"10.{200 + pid % 50}.{(pid // 50 + which) % 256}"
    with ExitStack() as cleanup:
        switch = cleanup.enter_context(_namespace())
        _run(_inside(switch, "ip", "link", "add", "switch", "up", "type", "bridge"))
        _lay_cable(switch, "tester", f"etl{pid}-{which}", pid, f"{network}.254")
        made: dict[str, Host] = {}
        for number, name in enumerate(names, start=1):
            holder = cleanup.enter_context(_namespace())
            made[name] = Host(name, f"{network}.{number}", pid=holder, switch=switch)
            cleanup.callback(made[name].kill)
            _run(_inside(holder, "ip", "link", "set", "dev", "lo", "up"))
            _lay_cable(switch, name, _PORT, holder, made[name].address)
        yield made


def _lay_cable(switch: int, port: str, own_port: str, pid: int, address: str) -> None:
    """一条 veth：一头插在交换机上，一头是 pid 那个命名空间的网卡。"""
    cable = [
        "link",
        "add",
        "name",
        port,
        "up",
        "master",
        "switch",
        "type",
        "veth",
        "peer",
        "name",
        own_port,
        "netns",
        str(pid),
    ]
    _run(_inside(switch, "ip", *cable))
    _run(_inside(pid, "ip", "address", "add", f"{address}/24", "dev", own_port))
    _run(_inside(pid, "ip", "link", "set", "dev", own_port, "up"))


@contextmanager
def _namespace() -> Iterator[int]:
    """一个新的网络命名空间；给出占着它的进程。"""
    holder = subprocess.Popen(
        [shutil.which("setpriv") or "", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
    )
    try:
        deadline = time.monotonic() + 10
        while Path(f"/proc/{holder.pid}/comm").read_text() != "sleep\n":
            if holder.poll() is not None or time.monotonic() > deadline:
                raise OSError("no network namespace")
            time.sleep(0.01)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def _inside(pid: int, *words: str | Path) -> list[str]:
    return ["nsenter", f"--net=/proc/{pid}/ns/net", *map(str, words)]


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _is_zombie(process: Path) -> bool:
    return ") Z " in (process / "stat").read_text()
