"""由模子（bridge.stack.fork_template）起进程：监督者这一边。

fork 出来的进程隔了一代，中间那个一结束就过继给监督者：与它自己启动的一样看管、收尸，模子死了也不碍它们。
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from bridge.stack.fork_template import TITLE_SPACE
from etl_assets.embedded.child_process import launch

_PR_SET_CHILD_SUBREAPER = 36
_ANSWER_SECONDS = 10.0
_one_adoption = threading.Lock()
"""这个约定是整个进程的：两个栈的监督者一次一个。"""


@dataclass
class ForkedProcess:
    """像 subprocess.Popen 的那一点：等它结束。"""

    pid: int
    returncode: int | None = None

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class Forkserver:
    """一个栈的模子。

    :param environment: 它的环境；装载别人的库时要读的都在里面。
    :param inherited_fds: 由它传给要它们的进程。
    """

    def __init__(self, environment: Mapping[str, str], *, inherited_fds: Sequence[int] = ()) -> None:
        self._environment = environment
        self._inherited = tuple(inherited_fds)
        self._connection: socket.socket | None = None

    def launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """起模子本身；要在 `fork` 所在的线程里，孩子才随同一个进程死。"""
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER_SECONDS)
        self._connection = ours
        with theirs:
            descriptors = (theirs.fileno(), *self._inherited)
            command = [sys.executable, "-P", "-m", "bridge.stack.fork_template", *map(str, descriptors), TITLE_SPACE]
            return launch(command, log, env=self._environment, inherited_fds=descriptors)

    def fork(
        self,
        log: IO[bytes],
        module: str,
        *arguments: str,
        environment: Mapping[str, str],
        inherited_fds: Sequence[int] = (),
    ) -> ForkedProcess:
        """像 `python -P -m module arguments…` 那样启动一个进程，自成会话，输出都进 `log`。

        :raises OSError: 模子死了，或者没有回音；监督者会再起一个，再来要。
        """
        order = {
            "module": module,
            "arguments": arguments,
            "environment": dict(environment),
            "keep": tuple(inherited_fds),
            "parent": os.getpid(),
        }
        if self._connection is None:
            raise ConnectionError("the process that the others are forked from is not there")
        try:
            with _adopting():
                socket.send_fds(self._connection, [json.dumps(order).encode()], [log.fileno()])
                answer = self._connection.recv(16)
        except OSError:
            self.close()
            raise
        if not answer:
            self.close()
            raise ConnectionError("the process that the others are forked from has gone")
        return ForkedProcess(int(answer))

    def close(self) -> None:
        """放开连接：模子自己结束；它 fork 出来的不受影响。"""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def _adopting() -> Iterator[None]:
    """只在这一会儿收养：别的孤儿照旧归 init，不在这里变成没人收的僵尸。"""
    prctl = ctypes.CDLL(None).prctl
    with _one_adoption:
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            yield
        finally:
            prctl(_PR_SET_CHILD_SUBREAPER, 0)
