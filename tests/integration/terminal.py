"""伪终端：命令以为对面有人。"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress


def on_a_terminal(arguments: list[str], environment: dict[str, str]) -> str:
    """在伪终端里运行，返回终端收到的一切。"""
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    received = b""
    with suppress(OSError):  # 那一头都关了，Linux 说 EIO
        while block := os.read(ours, 65536):
            received += block
    os.close(ours)
    command.wait()
    return received.decode()
