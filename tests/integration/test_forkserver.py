"""由模子 fork 出来的进程与直接启动的一样：命令、环境、会话、日志、结局；装载过的只有别人的库。"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge.stack.forkserver import ForkedProcess, Forkserver
from bridge.stack.readiness import Attempt, logged_ready
from etl_assets.embedded.child_log import open_log
from etl_assets.embedded.child_process import identify

REPORT = """
import json, os, sys
report = {
    "arguments": sys.argv[1:], "again": sys.orig_argv[1:], "wanted": os.environ.get("WANTED"), "home": os.environ.get("HOME"),
    "session": os.getsid(0), "parent": os.getppid(), "loaded": sorted(sys.modules), "threads": len(os.listdir("/proc/self/task")),
    "command": open("/proc/self/cmdline").read().rstrip(chr(0)).split(chr(0)), "kept": os.path.exists(f"/proc/self/fd/{sys.argv[1]}"),
}
print(json.dumps(report), flush=True)
"""
LIVE_ON = "import time; print('alive', flush=True); time.sleep(600)"
HOLD = """
import os, sys, time
from pathlib import Path
from bridge.stack.forkserver import Forkserver
from bridge.stack.readiness import Attempt, logged_ready
from etl_assets.embedded.child_log import open_log
folder = Path(sys.argv[1])
forkserver = Forkserver({**os.environ, "PYTHONPATH": str(folder)})
with open_log(folder / "template.log") as log:
    template = forkserver.launch(log)
while not logged_ready(Attempt(template, folder / "template.log", 0)):
    time.sleep(0.05)
with open_log(folder / "child.log") as log:
    child = forkserver.fork(log, "live_on", environment=dict(os.environ))
print(child.pid, template.pid, flush=True)
time.sleep(600)
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


class Template:
    """起好了的模子；在它的文件夹里写模块，fork 出来做。"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.kept, self._other = os.pipe()
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        self.forkserver = Forkserver(environment, inherited_fds=(self.kept, self._other))
        with open_log(folder / "template.log") as log:
            self.process = self.forkserver.launch(log)
        attempt = Attempt(self.process, folder / "template.log", 0)
        wait_until(lambda: logged_ready(attempt))

    def fork(self, module: str, code: str, *arguments: str, **environment: str) -> tuple[ForkedProcess, Path]:
        (self._folder / f"{module}.py").write_text(code)
        path = self._folder / f"{module}.log"
        path.unlink(missing_ok=True)
        with open_log(path) as log:
            wanted = {"PATH": os.environ["PATH"], **environment}
            kept = (self.kept,)
            process = self.forkserver.fork(log, module, *arguments, environment=wanted, inherited_fds=kept)
        return process, path

    def close(self) -> None:
        self.forkserver.close()
        self.process.wait()
        os.close(self.kept)
        os.close(self._other)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    template = Template(tmp_path_factory.mktemp("template"))
    yield template
    template.close()


def test_forked_process_is_like_one_that_was_started_by_its_command(template: Template) -> None:
    process, log = template.fork("report", REPORT, str(template.kept), "two words", WANTED="yes")

    assert process.wait() == 0
    report = json.loads(log.read_text())
    arguments = [str(template.kept), "two words"]
    assert report["arguments"] == arguments
    assert report["again"] == ["-P", "-m", "report", *arguments]
    assert report["command"] == [sys.executable, *report["again"]]
    assert (report["wanted"], report["home"]) == ("yes", None)
    assert (report["session"], report["parent"], report["threads"]) == (process.pid, os.getpid(), 1)
    assert report["kept"]


def test_descriptor_that_it_did_not_ask_for_is_closed(template: Template) -> None:
    process, log = template.fork("report", REPORT, str(template._other))

    assert process.wait() == 0
    assert not json.loads(log.read_text())["kept"]


def test_only_the_code_of_others_is_loaded_before_and_ours_is_read_each_time(template: Template) -> None:
    _, log = template.fork("report", REPORT, "0")
    wait_until(log.read_text)
    loaded = set(json.loads(log.read_text())["loaded"])
    assert {"dagster", "dagster_webserver.app", "dagster._daemon", "nats", "taskiq", "sqlalchemy"} <= loaded
    ours = {name for name in loaded if name.split(".")[0] in ("bridge", "etl_assets")}
    assert ours == {"bridge", "bridge.stack", "etl_assets", "etl_assets.embedded", "etl_assets.embedded.child_launcher"}
    # 导入就起线程，或者按环境变量定下自己的：要在 fork 之后
    assert not loaded & {"polars", "prometheus_client", "opentelemetry"}

    first, log = template.fork("changing", "print('first')")
    assert (first.wait(), log.read_text()) == (0, "first\n")
    second, log = template.fork("changing", "print('the second, longer')")
    assert (second.wait(), log.read_text()) == (0, "the second, longer\n")


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("import atexit; atexit.register(print, 'farewell'); raise ValueError('oops')", 1, "ValueError: oops"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_it_ends_as_python_ends(template: Template, code: str, exit_code: int, said: str) -> None:
    process, log = template.fork("ending", code)

    assert process.wait() == exit_code
    assert said in log.read_text()
    assert ("farewell" in log.read_text()) == ("atexit" in code)


def test_death_of_the_template_harms_nobody_and_is_said_to_who_asks(tmp_path: Path) -> None:
    template = Template(tmp_path)
    process, log = template.fork("live_on", LIVE_ON)
    wait_until(log.read_text)

    template.process.kill()
    template.process.wait()

    with pytest.raises(OSError, match=r"forked from|Broken pipe|reset"):
        template.fork("live_on", LIVE_ON)
    assert identify(process.pid) is not None
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    template.close()


def test_all_die_with_the_process_that_supervises_them(tmp_path: Path) -> None:
    (tmp_path / "live_on.py").write_text(LIVE_ON)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    pids = [int(word) for word in holder.stdout.readline().split()]
    assert all(map(identify, pids))

    holder.kill()
    holder.wait()
    holder.stdout.close()

    wait_until(lambda: not any(map(identify, pids)))
