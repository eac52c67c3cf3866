"""内嵌服务器的共同形状：准备文件夹、启动、等到就绪、停下。监督者只用其中的各步，测试用 start/stop。"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, ClassVar

from etl_assets.embedded.child_log import ChildStartError, open_log, read_last_line
from etl_assets.embedded.child_process import ChildProcess, has_exited
from etl_assets.embedded.loopback_port import find_free_port, is_free
from etl_assets.embedded.private_folder import create_private_folder, lock_folder, read_private_file, write_private_file

_START_TIMEOUT_SECONDS = 60
_POLL_SECONDS = 0.01


class EmbeddedServer(ABC):
    """一个服务器进程和它的文件夹。

    从一个活得够久的线程里启动：那个线程结束时，服务器也会被内核结束。
    端口记在文件夹里，下次还用它；起来过一次，地址就有人知道了，不再换，此前被别人抢走就换一个。
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    stop_timeout_seconds: ClassVar[float]

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        """:param durable: 断电也不丢已确认的写入；测试用 False，快得多。"""
        self.folder = folder
        self.durable = durable
        self._lock = ExitStack()
        self._port = 0
        self._is_known = False
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """占住文件夹，备好数据。"""
        create_private_folder(self.folder, guests=self._guests())
        # 先占住，再清理：没有占住就清，结束的可能是别人正用着的服务器
        self._lock.enter_context(lock_folder(self.folder))
        self._is_known = False
        try:
            self.clear_leftovers()
            self._prepare()
        except BaseException:
            self._lock.close()
            raise

    @property
    @abstractmethod
    def url(self) -> str:
        """带口令的地址；就绪以后才不再变。"""

    def launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """启动一次进程；之前要 `prepare`。"""
        if not self._is_known:
            self._choose_port()
        return self._launch(log)

    def is_ready(self, process: ChildProcess) -> bool:
        """刚启动的这个进程已能接受连接。"""
        ready = self._answers(process)
        self._is_known = self._is_known or ready
        return ready

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def _launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]: ...

    @abstractmethod
    def _answers(self, process: ChildProcess) -> bool: ...

    def _guests(self) -> Mapping[str, int]:
        """文件夹里哪一项属于别的账户。"""
        return {}

    def _choose_port(self) -> None:
        port_file = self.folder / "port"
        try:
            remembered = int(read_private_file(port_file))
        except (FileNotFoundError, ValueError):
            remembered = None
        self._port = find_free_port(remembered)
        write_private_file(port_file, str(self._port))

    @abstractmethod
    def clear_leftovers(self) -> None:
        """结束服务器进程死后还留着的进程。"""

    def is_sick(self) -> bool:
        """活着却坏了，只有重启才会好；没有回音不算，它可能只是忙。"""
        return False

    def release(self) -> None:
        """进程停下之后，放开文件夹。"""
        self._lock.close()

    def start(self) -> str:
        self.prepare()
        log_path = self.folder / f"{self.name}.log"
        try:
            while not self._becomes_ready(log_path):
                pass
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if not has_exited(process):
                process.send_signal(self.stop_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(self.stop_timeout_seconds)
            if not has_exited(process):
                process.kill()
            process.wait()
            self.clear_leftovers()
        self.release()

    def __enter__(self) -> str:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _becomes_ready(self, path: Path) -> bool:
        """启动一次，等到就绪；假的是端口被别人抢走了。"""
        with open_log(path) as log:
            log_start = log.tell()
            process = self._process = self.launch(log)
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while not self.is_ready(process):
            is_over = has_exited(process)
            if is_over and not is_free(self._port):
                process.wait()
                return False
            if is_over or time.monotonic() > deadline:
                reason = read_last_line(path, log_start) if is_over else f"not ready after {_START_TIMEOUT_SECONDS} s"
                raise ChildStartError(name=self.name, log=path, reason=reason)
            time.sleep(_POLL_SECONDS)
        return True
