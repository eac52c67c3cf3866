"""从外面来的字节：事件、任务、文件、命令行。什么样的都只有一句话：不崩、不挂、不做别的事。

平时约一万个例子，每轮都一样；`--hypothesis-profile=deep` 时约一百万个，每轮都是新的，失败时印出种子。
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any

import click
import pytest
from hypothesis import settings
from taskiq import AckableMessage, InMemoryBroker
from taskiq.receiver import Receiver

from bridge.cli.commands import _COMMANDS, cli, run_command
from bridge.errors import InvalidEventError
from bridge.events.handlers import handlers_of
from bridge.imports.files.source import open_source
from bridge.imports.rules.errors import ImportFileError
from bridge.imports.rules.profile import FileFormat
from bridge.queue.task_names import EXECUTE_RUN, MATERIALIZE_DUE
from tests.the_three import graph

DEEP = settings().max_examples >= 2_000
pytestmark = pytest.mark.timeout(4 * 3_600 if DEEP else 7_200)
HANDLERS = handlers_of(graph)
MISUSE = 2
"""click 的退出码。"""
SERVERS = {"up", "listen", "worker", "demo"}
"""一直运行到有人停下它们的。"""
CHARACTERS = "a0 -.,\"'\\\n\t{}[]:%$;\x00\x1b\u202e\ufeff订单¥𠮷"


def examples(normal: int, deep: int) -> Iterator[Random]:
    """每个例子一个随机数；种子写在它的 seed 里。"""
    seed = Random().randrange(1 << 32) if DEEP else 0  # noqa: S311 不是密码
    for number in range(deep if DEEP else normal):
        random = Random(f"{seed}:{number}")  # noqa: S311 不是密码
        random.name = f"{seed}:{number}"  # type: ignore[attr-defined]
        yield random


def text(random: Random, most: int = 12) -> str:
    return "".join(random.choices(CHARACTERS, k=random.randrange(most)))


def json_value(random: Random, depth: int = 2) -> Any:
    kinds = ["leaf", "leaf", "list", "object"] if depth else ["leaf"]
    match random.choice(kinds):
        case "list":
            return [json_value(random, depth - 1) for _ in range(random.randrange(3))]
        case "object":
            return {text(random): json_value(random, depth - 1) for _ in range(random.randrange(3))}
        case _:
            known = [None, True, 0, -1, 2**70, 1e308, float("nan"), float("inf"), "success", "failed", "1.0", "0" * 36]
            return random.choice([*known, "2026-03-02", "2026-03-02T00:00:00+08:00", text(random, 40)])


def mutated(random: Random, whole: bytes) -> bytes:
    """一条好的，几处换成别的字节。"""
    for _ in range(random.randrange(5)):
        at, other = random.randrange(len(whole) + 1), random.randbytes(random.randrange(8))
        whole = whole[:at] + other + whole[at + len(other) :]
    return whole


def encoded(random: Random, fields: dict[str, Any]) -> bytes:
    whole = json.dumps(fields).encode(random.choice(["utf-8", "utf-8", "utf-16", "utf-8-sig"]))
    return random.choice([whole, mutated(random, whole), random.randbytes(random.randrange(200))])


def test_event_is_read_or_refused_with_a_sentence() -> None:
    whole = {
        "event_id": "5b2cbd0e-9fd0-4d43-9bb2-4c6c6c6a3b3e",
        "event_version": "1.0",
        "occurred_at": "2026-03-02T10:15:00+08:00",
        "status": "completed",
        "import_id": "6b2cbd0e-9fd0-4d43-9bb2-4c6c6c6a3b3e",
        "partitions": ["2026-03-02"],
        "run_id": "r",
        "lead_ids": ["l"],
    }
    read = 0
    for random in examples(4_000, 500_000):
        handler = random.choice(HANDLERS)
        names = random.choices([*whole, "allow_deletes", "part", "任意"], k=random.randrange(4))
        data = encoded(random, whole | {name: json_value(random) for name in names})
        with suppress(InvalidEventError):
            event = handler.parse(data)
            read += 1
            written = event.model_dump_json()
            assert handler.parse(written.encode()).model_dump_json() == written, (random.name, data)  # type: ignore[attr-defined]
    assert read


class Tasks(InMemoryBroker):
    """只有产品的两个任务，参数同样；真做的事换成记下参数。"""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, ...]] = []

        @self.task(task_name=MATERIALIZE_DUE)
        def materialize_due() -> None:
            self.done.append(())

        @self.task(task_name=EXECUTE_RUN)
        def execute_run(run_id: str) -> None:
            self.done.append((run_id,))


def test_task_is_done_or_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest 留着每条日志与它的栈：三十万条就是几 GB
    monkeypatch.setattr(logging.getLogger("taskiq.receiver.receiver"), "disabled", True)
    whole: dict[str, Any] = {"task_id": "1", "task_name": MATERIALIZE_DUE, "labels": {}, "args": [], "kwargs": {}}

    async def receive_all() -> list[tuple[Any, ...]]:
        broker = Tasks()
        receiver = Receiver(broker, max_async_tasks=1)
        for random in examples(2_500, 300_000):
            fields = dict(whole)
            for name in random.choices([*whole, "labels_types"], k=random.randrange(3)):
                likely = [EXECUTE_RUN, ["r"], {"run_id": "r"}, {"timeout": "x"}, json_value(random)]
                fields[name] = random.choice(likely)
            await receiver.callback(AckableMessage(data=encoded(random, fields), ack=lambda: None))
        return broker.done

    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # TaskIQ 为读不懂的消息发警告
        done = asyncio.run(receive_all())
    assert done
    assert {len(arguments) for arguments in done} <= {0, 1}


def read_all(path: Path) -> None:
    with suppress(ImportFileError):
        for _ in open_source(path, FileFormat()).blocks:
            pass


def test_file_is_read_or_refused(tmp_path: Path) -> None:
    table = '订单编号,金额\nA-1,"1\n2"\nA-2,¥3\n'.encode()
    for random in examples(2_500, 200_000):
        path = tmp_path / random.choice(["a.csv", "a.txt", "a.tsv", "a.xlsx", "a.xls", "a.zip", "a"])
        contents = (mutated(random, table), text(random, 200).encode(), random.randbytes(random.randrange(400)))
        path.write_bytes(random.choice(contents))
        read_all(path)


WORKBOOK = (Path(__file__).parents[1] / "exports" / "formulas.xlsx").read_bytes()


def with_odd_part(random: Random) -> bytes:
    """压缩得好好的工作簿，里面的一部分换了几处。"""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WORKBOOK)) as old, zipfile.ZipFile(made, "w") as new:
        odd = random.choice(old.namelist())
        for part in old.namelist():
            new.writestr(part, mutated(random, old.read(part)) if part == odd else old.read(part))
    return made.getvalue()


def test_workbook_is_read_or_refused(tmp_path: Path) -> None:
    """好的一个要一个子进程来读，半秒。"""
    for random in examples(40, 2_000):
        path = tmp_path / "a.xlsx"
        path.write_bytes(random.choice([mutated(random, WORKBOOK), with_odd_part(random)]))
        read_all(path)


def test_workbook_that_does_not_unpack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.xlsx"
    path.write_bytes(WORKBOOK[:2945] + b"\x00" + WORKBOOK[2946:])
    with pytest.raises(ImportFileError, match="the workbook cannot be read"):
        open_source(path, FileFormat())


def words_of(name: str) -> list[str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    within = command.commands if isinstance(command, click.Group) else {}
    options = [word for each in (command, *within.values()) for parameter in each.params for word in parameter.opts]
    return [*options, *within]


ODD_WORDS = (
    *("", "-", "--", "0", "-1", "1e309", "2026-03-02", "2026-13-45", "99999-01-01", "订单", "orders", "no-such.csv"),
    *("'; DROP TABLE orders; --", "$(id)", "a" * 5_000, "6b2cbd0e-9fd0-4d43-9bb2-4c6c6c6a3b3e", "%s{0}\x1b[31m"),
)


def test_command_line_ends_with_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """连不上的服务器：走到哪一步都只是一句话。"""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("ETL_", "DAGSTER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ETL_DATABASE_URL", "postgresql://etl:s3cret@127.0.0.1:1/none")
    monkeypatch.setenv("ETL_NATS_URL", "nats://etl:s3cret@127.0.0.1:1")
    monkeypatch.setenv("ETL_CONNECT_TIMEOUT_SECONDS", "1")
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path / "state"))
    words = {name: words_of(name) for name in _COMMANDS if name not in SERVERS}
    for random in examples(1_000, 10_000):
        name = random.choice(sorted(words))
        likely = [*words[name], *ODD_WORDS, text(random).replace("\x00", "")]
        code, said = run([name, *random.choices(likely, k=random.randrange(6))], monkeypatch)
        assert code in (None, 0, 1, MISUSE), (random.name, said)  # type: ignore[attr-defined]
        assert "Traceback" not in said
        assert "s3cret" not in said


def run(line: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[object, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            run_command(line)
        except SystemExit as end:
            return end.code, said.getvalue()
    return 0, said.getvalue()
