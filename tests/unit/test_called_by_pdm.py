"""`pdm run` 先去项目的根：文件名仍从人所在的文件夹说；他的脚本自己换过文件夹的，从那里说。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("stands_in", "found"), [("project", "caller"), ("elsewhere", "elsewhere")])
def test_file_is_looked_for_where_the_name_was_given(tmp_path: Path, stands_in: str, found: str) -> None:
    for folder in ("project", "caller", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / found / "orders.csv").touch()
    printed = subprocess.run(
        [sys.executable, "-m", "bridge.cli.main", "profiles", "new", "orders.csv"],
        cwd=tmp_path / stands_in,
        env=os.environ
        | {"PDM_RUN_CWD": str(tmp_path / "caller"), "PDM_PROJECT_ROOT": str(tmp_path / "project")}
        | {"PYTHONPATH": str(Path(__file__).parents[2]), "ETL_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert "orders.csv: the file is empty" in printed
