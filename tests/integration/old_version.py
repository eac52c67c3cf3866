"""0.1.0 的监听器：真的轮子，另一个进程。"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = Path(__file__).parent / "wheels" / "dayline-0.1.0-py3-none-any.whl"


class OldListener:
    """`etl listen` 的 0.1.0；就绪与否看它的日志。"""

    def __init__(self, folder: Path, *, database_url: str, nats_url: str) -> None:
        with zipfile.ZipFile(WHEEL) as wheel:
            wheel.extractall(folder)
        self._log = folder / "listen.log"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "PYTHON"))},
            "PYTHONPATH": str(folder),
            "ETL_DATABASE_URL": database_url,
            "ETL_NATS_URL": nats_url,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_ready(self) -> bool:
        return self._log.exists() and '"ready"' in self._log.read_text()

    def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "bridge.cli.main", "listen"],
                env=self._environment,
                cwd=self._log.parent,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
