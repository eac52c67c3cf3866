"""终端上有颜色与进度条；NO_COLOR 时没有颜色；不在终端里两样都没有。"""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from uuid import uuid4

import pytest
import sqlalchemy as sa

from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders

from .terminal import on_a_terminal

IMPORT_ID = str(uuid4())
NO_NATS = "nats://127.0.0.1:1"
COMMANDS = {
    "doctor": ["-m", "bridge.cli.main", "doctor"],
    "status": ["-m", "bridge.cli.main", "status"],
    "wait": ["-m", "bridge.cli.main", "wait", "--import-id", IMPORT_ID, "--timeout", "0.5"],
    "why": ["-m", "bridge.cli.main", "why", "order", "A-1"],
    "log": [
        "-c",
        "from etl_assets.core.log import *; configure_logging('x'); get_logger('x').warning('one line', key='value')",
    ],
}
ESCAPE = "\x1b"
CURSOR_UP, SHOW_CURSOR = b"\x1b[1A", b"\x1b[?25h"


@pytest.fixture
def environment(engine: sa.Engine, etl_settings: EtlSettings) -> dict[str, str]:
    """一个导入等着处理，而没有人来：`etl wait` 有得等。"""
    with engine.begin() as connection:
        connection.execute(
            sa.insert(import_tasks).values(import_id=IMPORT_ID, status="completed", completed_at=datetime.now(UTC))
        )
        connection.execute(sa.insert(raw_orders).values(import_id=IMPORT_ID, order_id="A-1"))
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return plain | {
        "ETL_DATABASE_URL": etl_settings.database_url,
        "ETL_NATS_URL": NO_NATS,
        "ETL_CONNECT_TIMEOUT_SECONDS": "1",
        "TERM": "xterm-256color",
    }


def has_colour(text: str) -> bool:
    """粗体、暗淡不算颜色。"""
    parameters = [number for codes in re.findall(r"\x1b\[([\d;]*)m", text) for number in codes.split(";") if number]
    return any(30 <= int(number) % 100 <= 48 or 90 <= int(number) <= 107 for number in parameters if number != "39")


@pytest.mark.parametrize("name", COMMANDS)
def test_terminal_gets_colour_unless_no_color_is_set(name: str, environment: dict[str, str]) -> None:
    assert has_colour(on_a_terminal(COMMANDS[name], environment))
    assert not has_colour(on_a_terminal(COMMANDS[name], environment | {"NO_COLOR": "1"}))


@pytest.mark.parametrize("name", COMMANDS)
def test_pipe_gets_text_and_no_progress_bar(name: str, environment: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, *COMMANDS[name]], env=environment, capture_output=True, text=True, check=False
    )
    assert result.stdout + result.stderr
    assert ESCAPE not in result.stdout + result.stderr


def test_status_is_drawn_again_in_place_until_ctrl_c(environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [sys.executable, *COMMANDS["status"], "--watch"], env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    received, deadline = b"", time.monotonic() + 60
    while received.count(b"nats: cannot reach NATS") < 2 or CURSOR_UP not in received:
        assert time.monotonic() < deadline, received
        received += os.read(ours, 65536)
    command.send_signal(signal.SIGINT)
    with suppress(OSError):
        while block := os.read(ours, 65536):
            received += block
    os.close(ours)
    assert command.wait(10) == 130
    assert received.endswith(b"aborted\r\n")
    assert SHOW_CURSOR in received[received.rindex(b"nats: cannot") :]
