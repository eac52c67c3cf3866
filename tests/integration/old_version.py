"""0.1.0：真的轮子，另外的进程。"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = Path(__file__).parent / "wheels" / "dayline-0.1.0-py3-none-any.whl"


class OldProcess:
    """一条命令的 0.1.0，缺省是 `etl listen`；就绪与否看它的日志。"""

    def __init__(self, folder: Path, *, command: str = "listen", **environment: str) -> None:
        """:param environment: ETL_ 打头的，以及 Dagster 的；外面的一个也不带进去。"""
        unpack(folder)
        self._command = command
        self._log = folder / f"{command}.log"
        self._environment = old_environment(folder) | environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_ready(self) -> bool:
        return '"ready"' in self.log

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bridge.cli.main", self._command],
                env=self._environment,
                cwd=self._log.parent,
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """好好停下：手里的做完。"""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def unpack(folder: Path) -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(folder)


def old_environment(folder: Path) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "PYTHON", "DAGSTER_"))}
    return {**outside, "PYTHONPATH": str(folder)}


def run_old(folder: Path, *arguments: str, environment: dict[str, str]) -> None:
    """用 0.1.0 的代码跑到完：`-m bridge.cli.main init-db`、`-c …`。"""
    subprocess.run(
        [sys.executable, "-P", *arguments],
        env=old_environment(folder) | environment,
        cwd=folder,
        check=True,
        timeout=120,
    )
