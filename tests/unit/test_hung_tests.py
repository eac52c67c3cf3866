"""一个停不下来的测试不会让整轮没有声音地停住：说出它的名字和卡住的地方，整轮就此结束。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HANGS_AFTER_A_FAILURE = """
import time

import pytest


@pytest.fixture
def server():
    yield
    time.sleep(600)


def test_fails_and_never_ends(server):
    raise AssertionError("first")"""


def test_hung_test_is_named_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(HANGS_AFTER_A_FAILURE)
    settings = ["-o", "timeout=1", "-o", "hung_after=1", "-n", "1", "--max-worker-restart=0"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.hung_tests",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        *settings,
    ]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "crashed while running 'test_sample.py::test_fails_and_never_ends'" in done.stdout
    assert "test_fails_and_never_ends has not ended after 2 s" in done.stderr
    assert "in server" in done.stderr
    assert "worker restarting disabled" in done.stdout
