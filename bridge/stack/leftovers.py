"""上一个监督者留下的进程：`pids.json` 记着 pid 与启动时刻，下次启动时只结束这些，不碰别的。"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from etl_assets.core.log import get_logger
from etl_assets.embedded.child_process import ProcessIdentity, identify, send_signal, session_members
from etl_assets.embedded.private_folder import read_private_file, write_private_file

_FILE_NAME = "pids.json"
_TIMEOUT_SECONDS = 10

logger = get_logger(__name__)


def record_children(state_dir: Path, children: Iterable[ProcessIdentity]) -> None:
    document = {"boot_id": _boot_id(), "children": list(map(asdict, children))}
    write_private_file(state_dir / _FILE_NAME, json.dumps(document))


def forget_children(state_dir: Path) -> None:
    (state_dir / _FILE_NAME).unlink(missing_ok=True)


def kill_leftovers(state_dir: Path) -> None:
    """结束记下的每个进程和它那个会话里的其余进程，等到它们都不在。"""
    recorded = _read_recorded(state_dir)
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    killed: set[int] = set()
    while leftovers := [process for leader in recorded for process in _session_of(leader, state_dir)]:
        if time.monotonic() > deadline:
            logger.warning("leftover processes do not die", pids=[process.pid for process in leftovers])
            break
        for process in leftovers:
            send_signal(process.pid, signal.SIGKILL)
            killed.add(process.pid)
        time.sleep(0.02)
    if killed:
        logger.info("killed leftover processes of an earlier stack", pids=sorted(killed))
    forget_children(state_dir)


def _session_of(leader: ProcessIdentity, state_dir: Path) -> list[ProcessIdentity]:
    """子进程各自是一个会话的首领，会话号就是它的 pid。"""
    current = identify(leader.pid)
    if current is not None and current != leader:
        return []  # pid 已经是别人的，那个会话也就不是我们的了
    if current == leader:
        return list(session_members(leader.pid))
    # 首领不在了：环境里有我们的状态文件夹才是我们的
    return [member for member in session_members(leader.pid) if _belongs_to(member, state_dir)]


def _belongs_to(process: ProcessIdentity, state_dir: Path) -> bool:
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"ETL_STATE_DIR={state_dir}".encode() in environment


def _read_recorded(state_dir: Path) -> list[ProcessIdentity]:
    try:
        document = json.loads(read_private_file(state_dir / _FILE_NAME))
    except (FileNotFoundError, ValueError):  # 没有，或断电时没写完
        return []
    if document["boot_id"] != _boot_id():  # 重启过：记下的进程都不在了，号码可能是别人的
        return []
    return [ProcessIdentity(**child) for child in document["children"]]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
