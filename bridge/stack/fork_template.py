"""栈的各个 Python 进程的模子（`python -m`）：Dagster 等别人的库只装载一次，然后每要一个进程就 fork 一个，内存大半共用。

自己的代码从不在这里装载：改了代码，重新起来的进程做的是新的。也不装载 Polars：导入它就起线程，而有线程的进程不能放心地 fork。
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from etl_assets.embedded.child_launcher import die_with

PRELOADED = (
    *("dagster", "dagster._cli", "dagster._daemon.controller", "dagster._grpc.server", "dagster_postgres"),
    *("dagster_webserver.app", "uvicorn", "nats", "taskiq", "taskiq_nats", "psycopg", "sqlalchemy.dialects.postgresql"),
    *("pydantic_settings", "structlog", "click"),
)
TITLE_SPACE = "-" * 4096
"""命令行的末尾：进程改名要用的地方。"""
_MESSAGE_BYTES = 1 << 20
_ARGUMENTS_FIELD = 45  # /proc/self/stat 里 comm 之后的第 46、47 项：命令行在内存里的起止


def main(connection: socket.socket, inherited: Sequence[int]) -> None:
    """对每个要求 fork 一个进程，答它的 pid；对面关了就结束。

    :param inherited: 监督者留给某个进程的描述符，别的进程不要。
    """
    gc.disable()
    for module in PRELOADED:
        import_module(module)
    gc.collect()
    gc.freeze()  # 装载好的都不会死：垃圾回收不去碰它们，那些页才一直共用
    _show_as(sys.orig_argv[:4])
    sys.stderr.write('{"message": "ready"}\n')
    order = _serve(connection, inherited)
    gc.enable()
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


def _serve(connection: socket.socket, inherited: Sequence[int]) -> dict[str, Any]:
    """只在 fork 出来的进程里返回：它要做什么。"""
    while True:
        message, [*descriptors], _flags, _address = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
        if not message:
            sys.exit()
        order: dict[str, Any] = json.loads(message)
        pid = _fork_away()
        if pid == 0:
            connection.close()
            _become(order, log=descriptors[0], unwanted=[each for each in inherited if each not in order["keep"]])
            return order
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            connection.send(str(pid).encode())
        except OSError:  # 没有人等着它了
            os.kill(pid, signal.SIGKILL)
            sys.exit()


def _fork_away() -> int:
    """隔一代 fork：中间那个一结束，内核把孩子过继给监督者，由它看管、收尸。孩子里返回 0，那时已经过继了。"""
    receiving, sending = os.pipe()
    middle = os.fork()
    if middle == 0:
        own = os.getpid()
        child = os.fork()
        if child:
            os.write(sending, str(child).encode())
            os._exit(0)
        os.close(receiving)
        os.close(sending)
        while os.getppid() == own:
            time.sleep(0.001)
        return 0
    os.close(sending)
    os.waitpid(middle, 0)
    with os.fdopen(receiving, "rb") as pipe:
        return int(pipe.read())


def _become(order: dict[str, Any], *, log: int, unwanted: Sequence[int]) -> None:
    """换上自己的会话、日志、环境与命令，约定随监督者死。"""
    os.setsid()
    for standard in (1, 2):
        os.dup2(log, standard)
    for descriptor in (log, *unwanted):
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    if not die_with(order["parent"], signal.SIGKILL):
        os._exit(1)
    sys.argv = [order["module"], *order["arguments"]]
    sys.orig_argv = [sys.executable, "-P", "-m", *sys.argv]  # 工人照它从头再来
    _show_as(sys.orig_argv)


def _show_as(command: Sequence[str]) -> None:
    """在 `ps` 里的样子，与直接启动的一样；写在原来的命令行那里，写不下的截去。"""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    start, end = (int(field) for field in fields[_ARGUMENTS_FIELD : _ARGUMENTS_FIELD + 2])
    shown = "\0".join(command).encode()[: max(0, end - start - 1)]
    if shown:
        ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), [int(number) for number in sys.argv[2:-1]])
