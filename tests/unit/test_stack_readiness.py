"""就绪检查只认这一次启动写下的那一行。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bridge.stack.readiness import Attempt, logged_ready


@pytest.mark.parametrize(
    ("lines", "ready"),
    [
        (['{"message": "ready", "component": "worker"}'], True),
        (["some warning", '{"component": "worker", "message": "ready"}', "more"], True),
        (['{"message": "not ready yet"}'], False),
        (["ready"], False),
        (['"ready"'], False),
        (['{"message": "rea'], False),
        ([], False),
    ],
)
def test_ready_is_a_json_line_that_says_so(tmp_path: Path, lines: list[str], ready: bool) -> None:
    earlier = '{"message": "ready"}\n'
    log = tmp_path / "worker.log"
    log.write_text(earlier + "\n".join(lines))
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        assert logged_ready(Attempt(process, log, log_start=len(earlier))) is ready
