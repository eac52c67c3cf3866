"""读文档的人面前的那个 shell：命令一条接一条，变量与文件夹留着，`etl` 在 PATH 上。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_WIDE = "200"


class Printed(NamedTuple):
    """一条命令印出的（stdout 与 stderr 按印出的次序）与退出码。"""

    text: str
    exit_code: int


class Shell:
    """folder 是起初的工作文件夹。`python3 run.py …` 就是 `etl …`，run.py 自己有 tests/unit/test_bootstrap.py。"""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._script = folder.with_name(f"{folder.name}.command")
        self._output = folder.with_name(f"{folder.name}.output")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._bash = subprocess.Popen(
            ["/bin/bash", "--norc", "--noprofile"],
            cwd=folder,
            env={**environment, "PATH": path, "COLUMNS": _WIDE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.killpg(self._bash.pid, signal.SIGKILL)  # 也许有一条命令还没有结束
        self._bash.communicate()

    def run(self, command: str) -> Printed:
        self._script.write_text(command.replace("python3 run.py ", "etl "), encoding="utf-8")
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f". '{self._script}' </dev/null >'{self._output}' 2>&1; echo $?\n")
        self._bash.stdin.flush()
        exit_code = self._bash.stdout.readline()
        return Printed(self._output.read_text(encoding="utf-8"), int(exit_code))
