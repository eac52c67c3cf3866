"""Ctrl-C（SIGTERM、SIGHUP）在任何时刻结束一个命令：取消服务器上的语句，说一句话，退出码 128 加信号的编号。

不靠 KeyboardInterrupt：它要等主线程回到 Python，而主线程可能正等着一把锁（psycopg 的，写 COPY 的线程占着；导入 Polars 之后信号
不再打断等锁）、在 Polars 里、在导入模块。C 层的处理程序立刻往管道里写信号的编号，一个线程读着它。
自己装了处理程序的命令（up、listen、worker）自己管。
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LONGEST_SECONDS = 2.5
"""收拾到这时也走：人按了 Ctrl-C，三秒之内要有结果。"""
_CLEAR_LINE = b"\r\x1b[2K\x1b[?25h"
"""擦掉进度条与 ^C，光标再现。"""


class _Command:
    """这个进程的命令：被打断时说什么、收拾什么。"""

    def __init__(self) -> None:
        self.says = "aborted"
        self.clean_ups: list[Callable[[], object]] = []
        self.is_listening = False
        self.is_stopping = False
        self.step = threading.Lock()


_command = _Command()


def listen() -> None:
    """从此刻起听着。要在导入重的模块之前；父进程让忽略的信号照旧忽略。"""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _leave_to_the_thread)
    _command.is_listening = True
    threading.Thread(target=_read, args=[reading], name="stop-signals", daemon=True).start()


def on_abort(clean_up: Callable[[], object]) -> None:
    """被打断时要做的，后说的先做；主线程这时还在走。"""
    _command.clean_ups.append(clean_up)


def say_on_abort(text: str) -> None:
    """从此刻起被打断时说的话。"""
    _command.says = text


@contextmanager
def finished_first(*, meanwhile: str, afterwards: str) -> Iterator[None]:
    """提交这样的一步：开始了就等它做完才停，停在它之前就不再开始。

    :param meanwhile: 等不到它做完时说的话。
    :param afterwards: 做完以后被打断时说的话。
    """
    with _command.step:
        _command.says = meanwhile
        yield
        _command.says = afterwards
    if _command.is_stopping:
        wait_for_the_end()


def wait_for_the_end() -> None:
    """正在结束的命令，主线程不再往下走。没有听着（测试）就返回。"""
    if _command.is_listening:
        time.sleep(2 * _LONGEST_SECONDS)


def is_stopping() -> bool:
    return _command.is_stopping


def _leave_to_the_thread(_number: int, _frame: FrameType | None) -> None:
    """有了它，C 层的处理程序才往管道里写。"""


def _read(pipe: int) -> None:
    while True:
        (number,) = os.read(pipe, 1)
        if signal.getsignal(number) is _leave_to_the_thread:
            _stop(number)


def _stop(number: int) -> None:
    _command.is_stopping = True
    stderr = os.dup(2)
    silence = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # 别的线程因此得到的错误，没有人要看
        os.dup2(silence, descriptor)

    def leave() -> None:
        text = _command.says.encode() + b"\n"
        with suppress(OSError):
            os.write(stderr, _CLEAR_LINE + text if os.isatty(stderr) else text)
        os._exit(128 + number)

    limit = threading.Timer(_LONGEST_SECONDS, leave)
    limit.daemon = True
    limit.start()
    _command.step.acquire()  # 不再放开：没有开始的提交不会开始
    for clean_up in reversed(_command.clean_ups):
        with suppress(Exception):
            clean_up()
    leave()
