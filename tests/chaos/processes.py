"""从外面认出栈的进程，像运维用 ps 那样；只认这个状态文件夹的。"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from etl_assets.embedded.child_process import ProcessIdentity, identify, running_pids, session_members

PARTS = {
    "worker": "bridge.cli.main worker",
    "manager": "bridge.cli.main worker --processes",
    "listener": "bridge.cli.main listen",
    "webserver": "bridge.warm_dagster.webserver",
    "daemon": "warm_dagster.daemon",
    "code-server": "code_server api grpc",
    "nats": "nats-server",
    "postgres": "/postgres -D",
}
"""栈的一部分 → 它的命令行里的字。"""
SERVERS = ("nats", "postgres")


class StackProcesses:
    """一个栈的进程：各部分的首领（监督者启动的），以及 PostgreSQL 的后端。"""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._seen: set[ProcessIdentity] = set()

    def leaders(self, part: str) -> list[int]:
        """这一部分现在活着的首领。"""
        found = {process.pid: command_line(process.pid) for process in self._recorded()}
        return [
            pid
            for pid, line in found.items()
            if PARTS[part] in line and (part != "worker" or PARTS["manager"] not in line)
        ]

    def backends(self) -> list[int]:
        """PostgreSQL 的后端与它的辅助进程，不含 postmaster。"""
        return [pid for pid in self._postgres() if command_line(pid).startswith("postgres: ")]

    def survivors(self) -> list[str]:
        """栈停下以后还活着的：首领会话里的、环境里有这个状态文件夹的，以及 PostgreSQL 的。"""
        pids = {member.pid for leader in self._seen for member in session_members(leader.pid)}
        pids.update(self._postgres(), self._of_stack())
        return [f"{pid} {command_line(pid)}" for pid in sorted(pids)]

    def _of_stack(self) -> Iterator[int]:
        """工人的管理者死了，它的孩子不在任何首领的会话里。"""
        wanted = f"ETL_STATE_DIR={self._state_dir}".encode()
        for pid in running_pids():
            with suppress(OSError):
                if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and identify(pid):
                    yield pid

    def _recorded(self) -> list[ProcessIdentity]:
        try:
            children = json.loads((self._state_dir / "pids.json").read_text())["children"]
        except (FileNotFoundError, ValueError):
            return []
        alive = [
            found
            for child in children
            if (found := identify(child["pid"])) and found.started_ticks == child["started_ticks"]
        ]
        self._seen.update(alive)
        return alive

    def _postgres(self) -> Iterator[int]:
        """标题里有这个数据文件夹的名字。"""
        status = (self._state_dir / "postgres" / "data").stat()
        marker = f"dayline-{status.st_dev:x}-{status.st_ino:x}"
        return (pid for pid in running_pids() if marker in command_line(pid) and identify(pid))


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
