"""监督者：按依赖启动子进程，死了的重启，停下时按相反的顺序，不留下任何进程。"""

from __future__ import annotations

import contextvars
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from bridge.stack.leftovers import forget_children, kill_leftovers, record_children
from bridge.stack.readiness import Attempt, ReadinessCheck, started
from etl_assets.core.backoff import Backoff, failures_in_a_row
from etl_assets.core.errors import EtlError
from etl_assets.core.log import get_logger
from etl_assets.embedded.child_log import ChildStartError, open_log, read_last_line, rotate_log
from etl_assets.embedded.child_process import (
    ChildProcess,
    ProcessIdentity,
    has_exited,
    identify,
    send_group_signal,
    send_signal,
)
from etl_assets.embedded.private_folder import create_private_folder, lock_folder

_TICK_SECONDS = 0.05
_RESTART = Backoff(first_seconds=0.2, longest_seconds=30.0)
# 起来过的，多半是被杀的，或者在等数据库、NATS：久等只会让活儿没人做
_RESTART_ONCE_READY = Backoff(first_seconds=0.2, longest_seconds=3.0)
_CHECKUP_SECONDS = 2.0
_SICK_CHECKUPS = 3  # 连着几次都坏才算：正在建一个流的 nats-server 有一瞬也说它坏了
_CRASH_LOOP = 3

logger = get_logger(__name__)


@dataclass(frozen=True)
class Service:
    """一个受监督的子进程。"""

    name: str
    launch: Callable[[IO[bytes]], ChildProcess]
    is_ready: ReadinessCheck = started
    after: tuple[str, ...] = ()
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_seconds: float = 10.0
    after_exit: Callable[[], None] = lambda: None
    is_sick: Callable[[], bool] = lambda: False
    """活着却坏了，只有重启才会好。"""


@dataclass
class _Child:
    service: Service
    attempt: Attempt | None = None
    identity: ProcessIdentity | None = None
    ready: bool = False
    was_ready: bool = False
    checked_at: float = 0.0
    sick_checkups: int = 0
    failures: int = 0
    launched_at: float = 0.0
    not_before: float = 0.0
    kill_at: float | None = None
    last_words: str = ""


class Supervisor:
    """一个状态文件夹的监督者。

    子进程都由它自己的线程启动：内核在启动者的 *线程* 结束时结束子进程，而这个线程活到最后一个子进程停下。
    """

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._logs = state_dir / "logs"
        self._lock = ExitStack()
        self._children: dict[str, _Child] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._kills = False
        # 带上调用者的上下文：日志里的 component 在里面
        run = partial(contextvars.copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="supervisor", daemon=True)

    def start(self) -> None:
        """占住状态文件夹，结束上一个监督者留下的进程。

        :raises SettingsError: 另一个栈正在使用这个文件夹。
        """
        create_private_folder(self._state_dir)
        self._lock.enter_context(lock_folder(self._state_dir))
        create_private_folder(self._logs)
        # 占住了才清：没占住就清，杀的也许是别人正用着的栈
        kill_leftovers(self._state_dir)
        self._thread.start()

    def supervise(self, services: Sequence[Service]) -> None:
        """开始看管这些子进程；`after` 里的都就绪以后才启动它。"""
        with self._changed:
            self._children.update({service.name: _Child(service) for service in services})

    def wait_until_ready(self, *names: str, timeout_seconds: float) -> None:
        """等到这些就绪；一个也不说，就是看管着的全部。

        :raises ChildStartError: 有一个反复起不来，或到时还没就绪。
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            wanted = names or tuple(self._children)
            while waiting := [child for name in wanted if not (child := self._children[name]).ready]:
                hopeless = next((child for child in waiting if child.failures >= _CRASH_LOOP), None)
                if hopeless or time.monotonic() > deadline:
                    failed = hopeless or waiting[0]
                    reason = failed.last_words if hopeless else f"not ready after {timeout_seconds:.0f} s"
                    raise ChildStartError(name=failed.service.name, log=self._log_path(failed), reason=reason)
                self._changed.wait(_TICK_SECONDS)

    def stop(self, *, at_once: bool = False) -> None:
        """停下所有子进程，放开状态文件夹；可以多次调用。

        :param at_once: 不等它们收尾，马上杀；别的线程正在停也一样。
        """
        if self._stopping.is_set() and not at_once:
            return
        # 先定怎么停再叫停：那个线程一醒就要看它
        self._kills = at_once
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
            # 都停了才忘：停到一半被杀，下一个监督者要靠它找到剩下的
            forget_children(self._state_dir)
        # 最后才放：放早了，另一个栈就来清还没停完的
        self._lock.close()

    # ---- 以下在监督者的线程里 -----------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(_TICK_SECONDS):
            with self._changed:
                for child in self._children.values():
                    try:
                        self._advance(child)
                    except Exception as error:  # noqa: BLE001 监督者的线程一死，所有子进程都会跟着死：一个出错不能连累别的
                        self._back_off(child, f"{type(error).__name__}: {error}", exit_code=None)
                self._changed.notify_all()
        self._stop_all()

    def _advance(self, child: _Child) -> None:
        if time.monotonic() < child.not_before:
            return
        if child.attempt is None:
            if all(self._children[name].ready for name in child.service.after):
                self._launch(child)
        elif has_exited(child.attempt.process):
            self._handle_death(child, child.attempt)
        elif not child.ready and child.service.is_ready(child.attempt):
            child.ready = child.was_ready = True
            logger.info(
                "child ready",
                name=child.service.name,
                duration_ms=round((time.monotonic() - child.launched_at) * 1000),
            )
        elif child.ready and time.monotonic() > child.checked_at + _CHECKUP_SECONDS:
            self._check_up(child, child.attempt)

    def _check_up(self, child: _Child, attempt: Attempt) -> None:
        child.checked_at = time.monotonic()
        if rotate_log(attempt.log):
            attempt = child.attempt = replace(attempt, log_start=0)
        child.sick_checkups = child.sick_checkups + 1 if child.service.is_sick() else 0
        # 杀了也不清零：没死成的，下一次检查再杀
        if child.sick_checkups >= _SICK_CHECKUPS:
            logger.error(
                "child is sick, starting it again",
                name=child.service.name,
                last_line=read_last_line(attempt.log, attempt.log_start),
            )
            send_group_signal(attempt.process.pid, signal.SIGKILL)

    def _launch(self, child: _Child) -> None:
        path = self._log_path(child)
        child.launched_at = time.monotonic()
        child.sick_checkups = 0
        with open_log(path) as log:
            start = log.tell()
            process = child.service.launch(log)
        child.attempt = Attempt(process, path, start)
        child.identity = identify(process.pid)
        with suppress(OSError):  # 磁盘满了：它活着，只是监督者若被杀，下一个认不出它
            record_children(self._state_dir, [child.identity for child in self._children.values() if child.identity])

    def _handle_death(self, child: _Child, attempt: Attempt) -> None:
        exit_code = self._bury(child, attempt)
        # 没就绪过的不算活过：起得再久，也是起不来，下次该隔得更久
        lived_seconds = time.monotonic() - child.launched_at if child.ready else 0.0
        child.ready = False
        self._back_off(
            child, read_last_line(attempt.log, attempt.log_start), exit_code=exit_code, lived_seconds=lived_seconds
        )

    def _back_off(self, child: _Child, last_words: str, *, exit_code: int | None, lived_seconds: float = 0.0) -> None:
        child.failures = failures_in_a_row(child.failures, lived_seconds=lived_seconds)
        child.last_words = last_words
        delay = (_RESTART_ONCE_READY if child.was_ready else _RESTART).seconds(child.failures)
        child.not_before = time.monotonic() + delay
        crashes = child.failures >= _CRASH_LOOP
        # 就绪过、自己以 0 结束的，是有意的：代码服务器看见头一批数据，就停下重新载入
        harmless = exit_code == 0 and lived_seconds > 0
        report = logger.error if crashes else logger.info if harmless else logger.warning
        report(
            "child stops again and again" if crashes else "child stopped, starting it again",
            name=child.service.name,
            exit_code=exit_code,
            last_line=last_words,
            log=str(self._log_path(child)),
            restart_in_seconds=delay,
        )

    def _bury(self, child: _Child, attempt: Attempt) -> int:
        """先结束它的整个进程组再收尸：收尸之前，组号不会被别人重用。"""
        send_group_signal(attempt.process.pid, signal.SIGKILL)
        exit_code = attempt.process.wait()
        child.attempt = child.identity = None
        try:
            child.service.after_exit()
        except EtlError as error:
            logger.error("cleaning up after a child failed", name=child.service.name, reason=str(error))
        return exit_code

    def _stop_all(self) -> None:
        """先停没有别人依赖的；过了期限的整组 SIGKILL。"""
        while running := [(child, child.attempt) for child in self._children.values() if child.attempt]:
            needed = {name for child, _ in running for name in child.service.after}
            for child, attempt in running:
                self._stop_step(child, attempt, may_stop=child.service.name not in needed)
            time.sleep(0.01)

    def _stop_step(self, child: _Child, attempt: Attempt, *, may_stop: bool) -> None:
        if has_exited(attempt.process):
            self._bury(child, attempt)
        elif self._kills:
            send_group_signal(attempt.process.pid, signal.SIGKILL)
        elif child.kill_at is None:
            if may_stop:
                send_signal(attempt.process.pid, child.service.stop_signal)
                child.kill_at = time.monotonic() + child.service.stop_timeout_seconds
        elif time.monotonic() > child.kill_at:
            logger.warning(
                "child does not stop, killing it",
                name=child.service.name,
                after_seconds=child.service.stop_timeout_seconds,
            )
            send_group_signal(attempt.process.pid, signal.SIGKILL)
            child.kill_at = math.inf  # 被杀的也要一会儿才没了

    def _log_path(self, child: _Child) -> Path:
        return self._logs / f"{child.service.name}.log"
