"""停不下来的测试：印出它卡在哪里，结束这个进程，xdist 就报出它的名字，整轮到此为止。

pytest-timeout 到时只叫一次：叫声落在 asyncio 的别的任务里就没人听见，测试失败以后的收尾它也不再看。
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Generator
from typing import TextIO

import pytest

_EXIT_CODE = 70
_STDERR = pytest.StashKey[TextIO]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "hung_after", "Seconds after its timeout at which a test that still runs ends the process", default="120"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")  # 测试里的 2 号接到 pytest 的捕获那里去了


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_STDERR].close()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout")) + float(
        item.config.getini("hung_after")
    )
    watch = threading.Timer(seconds, _give_up, [item.nodeid, seconds, item.config.stash[_STDERR]])
    watch.daemon = True
    watch.start()
    try:
        return (yield)
    finally:
        watch.cancel()


def _give_up(test: str, seconds: float, stderr: TextIO) -> None:
    print(f"\n{test} has not ended after {seconds:.0f} s; its threads:", file=stderr, flush=True)
    faulthandler.dump_traceback(file=stderr)
    os._exit(_EXIT_CODE)
