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
from playwright.sync_api import Page, expect
from structlog.testing import capture_logs

from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from tests.acceptance.chromium import needs_chromium, open_page
from tests.acceptance.conftest import Query, asking
from tests.acceptance.dagster_ui import DagsterUi
from tests.acceptance.test_main_flow import write_csv

ROOT = Path(__file__).parents[2]
SYNTAX_ERROR = "\ndef broken(:\n"


class Code:
    """一份可以弄坏的 etl_assets；bridge 还是这里的。"""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(ROOT / "etl_assets", folder / "etl_assets", ignore=shutil.ignore_patterns("__pycache__"))
        self.python_path = os.pathsep.join([str(folder), str(ROOT)])
        self.folder = folder / "etl_assets"
        self.file = self.folder / "leads" / "etl.py"
        self._whole: dict[Path, str] = {}

    def append(self, text: str) -> None:
        self._write(self.file, self.file.read_text(encoding="utf-8") + text)

    def replace(self, file: str, old: str, new: str) -> None:
        text = (self.folder / file).read_text(encoding="utf-8")
        assert old in text
        self._write(self.folder / file, text.replace(old, new))

    def repair(self) -> None:
        for file, text in self._whole.items():
            file.write_text(text, encoding="utf-8")

    def _write(self, file: Path, text: str) -> None:
        self._whole.setdefault(file, file.read_text(encoding="utf-8"))
        file.write_text(text, encoding="utf-8")


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
    return asking(stack.ui_url)


@pytest.fixture(scope="module")
def kill(state_dir: Path) -> Callable[[str], None]:
    """`kill("bridge.cli.main worker")`：这个栈的、命令里有这几个字的那个子进程；监督者会再启动它。"""

    def find_and_kill(words: str) -> None:
        commands = [
            Path(f"/proc/{child['pid']}/cmdline")
            for child in json.loads((state_dir / "pids.json").read_text())["children"]
        ]
        found = [
            path for path in commands if path.exists() and words in path.read_bytes().replace(b"\0", b" ").decode()
        ]
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


def etl(stack: StackAddresses, code: Code, *arguments: str) -> str:
    command = [sys.executable, "-P", "-m", "bridge.cli.main", *arguments]
    environment = worker_environment(stack, code)
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=90, check=True).stdout


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
        pytest.param(
            "\nfrom etl_assets.orchestration.graph import weekly\n",
            "ImportError: cannot import name 'weekly'",
            id="import",
        ),
        pytest.param("\nraise ValueError('no such stage')\n", "ValueError: no such stage", id="raises"),
    ],
)
def test_worker_names_the_line_that_is_wrong_and_ends(
    stack: StackAddresses, code: Code, added: str, problem: str
) -> None:
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

        kill("code_server api grpc")
        eventually(lambda: "SyntaxError: invalid syntax" in load_error(query))
        assert ui.run(run_id)["status"] == "QUEUED"
        delays = [
            entry["restart_in_seconds"]
            for entry in logs
            if entry.get("name") == "worker-1" and "restart_in_seconds" in entry
        ]
        assert delays == sorted(delays)
        assert delays[-1] > delays[0]
    code.repair()
    run = ui.wait(run_id, timeout_seconds=120)
    assert run["status"] == "SUCCESS", ui.messages(run_id)
    kill("code_server api grpc")
    eventually(lambda: not load_error(query))


BAD_GRAPHS = {
    "a cycle": (
        "customers/asset.py",
        'deps=["orders"]',
        'deps=["orders", "leads"]',
        "the assets depend on each other in a cycle: customers -> leads -> customers",
    ),
    "two of one name": (
        "customers/asset.py",
        "@daily_asset(",
        "from etl_assets.leads.asset import leads\n\n\n@lambda _: leads\n@daily_asset(",
        "two assets are named leads: rename one of them",
    ),
    "a function named otherwise": (
        "customers/asset.py",
        "def customers(",
        "def leads(",
        "etl_assets/customers/asset.py has no asset customers: name its function like the folder",
    ),
    "an unknown upstream": (
        "leads/asset.py",
        'deps=["customers"]',
        'deps=["customer"]',
        "asset leads depends on customer, which does not exist: correct its deps",
    ),
    "no partitions": (
        "leads/asset.py",
        "from etl_assets.orchestration.daily_asset import daily_asset",
        "from dagster import asset as daily_asset",
        "asset leads has no daily partitions: give it partitions_def=daily_partitions(...)",
    ),
}


@needs_chromium
@pytest.mark.timeout(600)
def test_page_of_the_code_location_says_in_one_sentence_why_a_graph_does_not_hold(
    stack: StackAddresses, code: Code, query: Query, kill: Callable[[str], None], tmp_path: Path
) -> None:
    """一句话不用滚动就看得见；工人照旧做着它载入过的代码。"""
    rows = [("A", "旗舰店", "张三", "大货订单", "completed", "10.00", "1", "2026-01-05 12:00:00")]
    with open_page(stack.ui_url, timezone="UTC") as page:
        for file, old, new, says in BAD_GRAPHS.values():
            code.replace(file, old, new)
            kill("code_server api grpc")
            eventually(lambda says=says: says in load_error(query))
            page.goto("/locations")
            eventually(lambda says=says: is_seen_in_the_dialog(page, says), timeout_seconds=30)
            if file == "leads/asset.py":
                file_path = str(write_csv(tmp_path / "orders.csv", rows))
                imported = json.loads(etl(stack, code, "import", file_path, "--create-shops", "--again", "--json"))
                etl(stack, code, "wait", "--import-id", imported["import_id"], "--timeout", "60")
            code.repair()
    kill("code_server api grpc")
    eventually(lambda: not load_error(query))


def is_seen_in_the_dialog(page: Page, says: str) -> bool:
    """代码服务器刚回来时网页会再载入一次这一行，打开着的对话框随之关上：像人那样再点一次。"""
    dialog = page.get_by_role("dialog")
    if not dialog.is_visible():
        page.get_by_text("View error").click()
    try:
        expect(dialog.get_by_text(says)).to_be_in_viewport(timeout=5_000)
    except AssertionError:
        return False
    return True


def load_error(query: Query) -> str:
    """网页上这个代码位置的错误；载入了的是空串。"""
    text = """{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename
        ... on PythonError { message stack causes { message } } } } } } }"""
    (entry,) = query(text)["workspaceOrError"]["locationEntries"]
    found = entry["locationOrLoadError"]
    if found is None or found["__typename"] != "PythonError":
        return ""
    return "\n".join([found["message"], *found["stack"], *[cause["message"] for cause in found["causes"]]])
