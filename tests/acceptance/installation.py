"""一个状态文件夹里用 `etl up` 起的栈；用哪一份代码可以换。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bridge.stack.addresses import StackAddresses, read_addresses
from etl_assets.embedded.loopback_port import find_free_port


class Installation:
    """code 是此刻用的代码；换了，下一次 `up` 才用它。"""

    def __init__(self, state_dir: Path, code: Path) -> None:
        self.state_dir = state_dir
        self.code = code

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_"))}
        return {**kept, "PYTHONPATH": str(self.code), "ETL_STATE_DIR": str(self.state_dir)}

    @contextmanager
    def up(self, *, port: int | None = None, workers: int = 1) -> Iterator[StackAddresses]:
        chosen = ("--port", str(port or find_free_port()), "--workers", str(workers))
        command = [sys.executable, "-m", "bridge.cli.main", "up", *chosen]
        self.state_dir.parent.mkdir(parents=True, exist_ok=True)
        with (self.state_dir.parent / "up.log").open("ab") as log:
            process = subprocess.Popen(command, cwd=self.code, env=self.environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 180
            while (addresses := read_addresses(self.state_dir)) is None:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            yield addresses
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)

    def run(self, *arguments: str, exit_code: int = 0) -> str:
        addresses = read_addresses(self.state_dir)
        environment = self.environment | (addresses.environment() if addresses else {})
        command = [sys.executable, *arguments]
        result = subprocess.run(
            command, cwd=self.code, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == exit_code, result.stdout + result.stderr
        return result.stdout

    def etl(self, *arguments: str, exit_code: int = 0) -> str:
        return self.run("-m", "bridge.cli.main", *arguments, exit_code=exit_code)
