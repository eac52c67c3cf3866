"""代码有错：工人说出是哪一行，运行在队列里等，网页显示 Dagster 自己的错误；改好了就接着做。

栈的代码是一份拷贝，坏的是它。
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from tests.acceptance.conftest import Query, asking
from tests.acceptance.dagster_ui import DagsterUi

ROOT = Path(__file__).parents[2]
SYNTAX_ERROR = "\ndef broken(:\n"


class Code:
    """一份可以弄坏的 etl_assets；bridge 还是这里的。"""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(ROOT / "etl_assets", folder / "etl_assets", ignore=shutil.ignore_patterns("__pycache__"))
        self.python_path = os.pathsep.join([str(folder), str(ROOT)])
        self.file = folder / "etl_assets" / "leads" / "etl.py"
        self._text = self.file.read_text(encoding="utf-8")

    def append(self, text: str) -> None:
        self.file.write_text(self._text + text, encoding="utf-8")

    def repair(self) -> None:
        self.append("")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Code:
    return Code(tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack") / "state"


@pytest.fixture(scope="module")
def stack(state_dir: Path, code: Code) -> Iterator[StackAddresses]:
    local = Stack(
        state_dir,
        settings=EtlSettings(database_url=""),
        bridge_settings=BridgeSettings(nats_url=""),
        port=find_free_port(),
        durable=False,
        workers=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", code.python_path)
        addresses = local.start()
    yield addresses
    local.stop()


@pytest.fixture(scope="module")
def query(stack: StackAddresses) -> Query:
    return asking(stack)


@pytest.fixture(scope="module")
def kill(state_dir: Path) -> Callable[[str], None]:
    """`kill("bridge.cli.main worker")`：这个栈的、命令里有这几个字的那个子进程；监督者会再启动它。"""

    def find_and_kill(words: str) -> None:
        commands = [Path(f"/proc/{child['pid']}/cmdline") for child in json.loads((state_dir / "pids.json").read_text())["children"]]
        found = [path for path in commands if path.exists() and words in path.read_bytes().replace(b"\0", b" ").decode()]
        assert len(found) == 1, found
        os.kill(int(found[0].parent.name), signal.SIGKILL)

    return find_and_kill


def eventually(condition: Callable[[], Any], *, timeout_seconds: float = 90) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.1)
    return found


def worker_environment(stack: StackAddresses, code: Code, **settings: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ETL_")}
    return {**environment, **stack.environment(), **settings, "PYTHONPATH": code.python_path}


def start_worker(stack: StackAddresses, code: Code, **settings: str) -> subprocess.CompletedProcess[str]:
    """`etl worker`，代码是那份拷贝；它自己结束。"""
    return subprocess.run(
        [sys.executable, "-P", "-m", "bridge.cli.main", "worker"],
        env=worker_environment(stack, code, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("added", "problem"),
    [
        pytest.param(SYNTAX_ERROR, "SyntaxError: invalid syntax", id="syntax"),
        pytest.param("\nfrom etl_assets.orchestration.graph import weekly\n", "ImportError: cannot import name 'weekly'", id="import"),
        pytest.param("\nraise ValueError('no such stage')\n", "ValueError: no such stage", id="raises"),
    ],
)
def test_worker_names_the_line_that_is_wrong_and_ends(stack: StackAddresses, code: Code, added: str, problem: str) -> None:
    code.append(added)
    try:
        ended = start_worker(stack, code)
    finally:
        code.repair()
    sentence = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2
    assert sentence.startswith(f"error: the code of etl_assets.definitions cannot be loaded: {problem}")
    assert f"{code.file.parent}/" in sentence
    assert sentence.endswith("correct it and start the workers again, until then runs stay queued")
    assert "\nTraceback" not in ended.stderr


def test_unusable_setting_ends_the_worker_with_its_name(stack: StackAddresses, code: Code) -> None:
    ended = start_worker(stack, code, ETL_PARTITIONS_START="soon")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: ETL_PARTITIONS_START='soon' is not usable: ")
    assert "\nTraceback" not in ended.stderr


def test_processes_that_cannot_start_are_tried_again_at_growing_intervals(stack: StackAddresses, code: Code) -> None:
    environment = worker_environment(stack, code, ETL_PARTITIONS_START="soon")
    command = [sys.executable, "-P", "-m", "bridge.cli.main", "worker", "--processes", "2"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as workers:
        assert workers.stderr is not None
        restarts = (json.loads(line) for line in workers.stderr if '"restart_in_seconds"' in line)
        try:
            delays = [next(restarts)["restart_in_seconds"] for _ in range(4)]
        finally:
            workers.terminate()
    assert sorted(delays) == [2, 2, 4, 4]
    assert workers.returncode == 0


@pytest.mark.timeout(600)
def test_runs_wait_for_the_repair(code: Code, query: Query, kill: Callable[[str], None]) -> None:
    ui = DagsterUi(query)
    code.append(SYNTAX_ERROR)
    with capture_logs() as logs:
        kill("bridge.cli.main worker")
        run_id = ui.launch(day="2026-01-05")

        def given_up() -> list[Any]:
            return [entry for entry in logs if entry["event"] == "child stops again and again"]

        entry = eventually(given_up)[0]
        assert entry["name"] == "worker-1"
        assert f"SyntaxError: invalid syntax ({code.file}, line " in entry["last_line"]
        assert ui.run(run_id)["status"] == "QUEUED"

        kill("dagster api grpc")
        eventually(lambda: "SyntaxError: invalid syntax" in load_error(query))
        assert ui.run(run_id)["status"] == "QUEUED"
        delays = [entry["restart_in_seconds"] for entry in logs if entry.get("name") == "worker-1" and "restart_in_seconds" in entry]
        assert delays == sorted(delays)
        assert delays[-1] > delays[0]
    code.repair()
    run = ui.wait(run_id, timeout_seconds=120)
    assert run["status"] == "SUCCESS", ui.messages(run_id)
    kill("dagster api grpc")
    eventually(lambda: not load_error(query))


def load_error(query: Query) -> str:
    """网页上这个代码位置的错误；载入了的是空串。"""
    text = """{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename
        ... on PythonError { message stack causes { message } } } } } } }"""
    (entry,) = query(text)["workspaceOrError"]["locationEntries"]
    found = entry["locationOrLoadError"]
    if found is None or found["__typename"] != "PythonError":
        return ""
    return "\n".join([found["message"], *found["stack"], *[cause["message"] for cause in found["causes"]]])
