"""docs/faults.md 的表 "What you see"：每一种故障真的弄出来，五个地方各说了表里的话；弄好了，`etl status` 又说一切都好。"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import get_args
from uuid import uuid4

import pytest

from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from etl_assets.core.business_day import DayRange
from etl_assets.ledger.locks import lock_days
from tests.acceptance.test_broken_code import SYNTAX_ERROR, load_error
from tests.acceptance.watched_stack import PATIENCE_SECONDS, Place, WatchedStack
from tests.integration.host import eventually
from tests.integration.webhook_server import Answer

ROOT = Path(__file__).parents[2]
PLACES: Sequence[Place] = get_args(Place)
_HEADINGS = {"docs/faults.md": "## What you see", "docs/faults.zh-CN.md": "## 看得见什么"}
_SAID = re.compile(r"`([^`]+)`")
_EVENTS, _TASKS = "EVENTS.etl-bridge_data_import-completed", "TASKS.event"


@dataclass(frozen=True)
class Line:
    """表的一行；说的话各在哪里，没有的是空的。"""

    fault: str
    said: dict[Place, list[str]]

    @property
    def said_elsewhere(self) -> dict[Place, list[str]]:
        """告警随语言而不同。"""
        return {place: said for place, said in self.said.items() if place != "alert"}


def read_table(page: str) -> list[Line]:
    """这一节的表；以 — 开头的格子是什么也没有说，别的都要引着什么。"""
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{_HEADINGS[page]}\n")[2].partition("\n## ")[0]
    lines = []
    for row in [row for row in section.splitlines() if row.startswith("| ")][1:]:
        fault, *cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == len(PLACES), row
        said = {
            place: [] if cell.startswith("—") else _SAID.findall(cell)
            for place, cell in zip(PLACES, cells, strict=True)
        }
        assert [cell for cell, found in zip(cells, said.values(), strict=True) if not found and cell[0] != "—"] == []
        lines.append(Line(fault, said))
    return lines


ENGLISH, CHINESE = (read_table(page) for page in _HEADINGS)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WatchedStack]:
    with ExitStack() as parts:
        yield WatchedStack(tmp_path_factory.mktemp("watched"), parts)


FIRST_DAY = date(2026, 1, 5)


# ---- 弄出来，yield，弄好 ------------------------------------------------------------


def nobody_listens(here: WatchedStack, day: date) -> Iterator[None]:
    with here.frozen("listener", queue=_EVENTS):
        here.announce(here.add_import(day))
        yield
    here.wait_until_made(day)


def no_worker(here: WatchedStack, day: date) -> Iterator[None]:
    with here.frozen("worker", queue=_TASKS):
        run_id = here.click(day)
        yield
    assert run_id
    assert here.ui.wait(run_id, timeout_seconds=PATIENCE_SECONDS)["status"] == "SUCCESS"


def due_for_too_long(here: WatchedStack, day: date) -> Iterator[None]:
    with here.frozen("worker", queue=_TASKS):
        here.announce(here.add_import(day))
        yield
    here.wait_until_made(day)


def event_without_its_import(here: WatchedStack, day: date) -> Iterator[None]:
    import_id = uuid4()
    here.announce(import_id)
    yield
    here.add_import(day, import_id=import_id)
    here.wait_until_made(day)


def import_without_its_event(here: WatchedStack, day: date) -> Iterator[None]:
    here.add_import(day)
    yield
    here.wait_until_made(day)


def unusable_event(here: WatchedStack, _day: date) -> Iterator[None]:
    publish_garbage(here)
    yield
    purge(here, "EVENTS_DLQ")


def dead_letters_are_full(here: WatchedStack, _day: date) -> Iterator[None]:
    publish_garbage(here)
    eventually(lambda: here.metric('etl_stream_messages{stream="EVENTS_DLQ"}') == 1, "there is no dead letter")
    limit(here, "EVENTS_DLQ", max_msgs=1)
    publish_garbage(here)
    yield
    limit(here, "EVENTS_DLQ", max_msgs=-1)
    purge(here, "EVENTS", "EVENTS_DLQ")


def completion_event_cannot_be_published(here: WatchedStack, day: date) -> Iterator[None]:
    here.add_import(day)
    limit(here, "EVENTS", max_msg_size=200)
    here.click(day)
    yield
    limit(here, "EVENTS", max_msg_size=here.bridge_settings.event_max_bytes)
    here.execute("UPDATE etl.outbox SET retry_at = now()")
    here.wait_until_made(day)


def queue_is_full(here: WatchedStack, day: date) -> Iterator[None]:
    limit(here, "EVENTS", max_msgs=int(here.metric('etl_stream_messages{stream="EVENTS"}')))
    here.add_import(day)
    here.click(day)
    yield
    limit(here, "EVENTS", max_msgs=-1)
    here.wait_until_made(day)


def rejected_rows(here: WatchedStack, day: date) -> Iterator[None]:
    here.announce(here.add_import(day, shop="没有的店"))
    here.wait_until_made(day)
    yield


def run_that_is_tried_again(here: WatchedStack, day: date) -> Iterator[None]:
    with here.waiting() as another:
        another.exec_driver_sql("LOCK TABLE orders IN SHARE ROW EXCLUSIVE MODE")
        here.announce(here.add_import(day))
        yield
    here.wait_until_made(day)


def run_that_cannot_succeed(here: WatchedStack, day: date) -> Iterator[None]:
    here.execute(f"ALTER TABLE orders ADD CONSTRAINT not_that_day CHECK (order_date <> '{day}')")
    here.announce(here.add_import(day))
    yield
    here.execute("ALTER TABLE orders DROP CONSTRAINT not_that_day")
    ask_again(here, day)


def run_that_is_cancelled(here: WatchedStack, day: date) -> Iterator[None]:
    with here.waiting() as another:
        lock_days(another, "public", DayRange(day, day))
        here.announce(here.add_import(day))
        (run,) = eventually(here.new_runs, "nothing runs")
        here.ui.wait(run["runId"], "STARTED", timeout_seconds=PATIENCE_SECONDS)
        here.ui.terminate(run["runId"])
        here.ui.wait(run["runId"], timeout_seconds=PATIENCE_SECONDS)  # 早放开，它也许就做完了
    yield
    ask_again(here, day)


def rows_that_do_not_add_up(here: WatchedStack, day: date) -> Iterator[None]:
    here.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$",
        "CREATE TRIGGER swallow BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION swallow()",
    )
    here.announce(here.add_import(day))
    yield
    here.execute("DROP TRIGGER swallow ON orders", "DROP FUNCTION swallow")
    ask_again(here, day)


def worker_that_dies(here: WatchedStack, day: date) -> Iterator[None]:
    with here.waiting() as another:
        lock_days(another, "public", DayRange(day, day))
        here.click(day)
        eventually(lambda: here.holds("etl_runs_in_progress > 0"), "nothing runs")
        here.kill("worker")
    yield
    here.wait_until_made(day)


def missing_index(here: WatchedStack, _day: date) -> Iterator[None]:
    here.execute("DROP INDEX ix_raw_orders_import_id")
    here.kill("worker")
    yield
    here.command("init-db", "--create-indexes")


def code_that_cannot_be_loaded(here: WatchedStack, _day: date) -> Iterator[None]:
    here.code.append(SYNTAX_ERROR)
    here.kill("code-server")
    here.kill("worker")
    yield
    here.code.repair()
    here.kill("code-server")
    eventually(lambda: not load_error(here.query), "the code is not loaded again", PATIENCE_SECONDS)


def process_that_ends(here: WatchedStack, _day: date) -> Iterator[None]:
    here.kill("listener")
    yield


def database_that_refuses(here: WatchedStack, day: date) -> Iterator[None]:
    import_id = here.add_import(day)
    with here.read_only():
        here.announce(import_id)
        # 头一次点击也许还在断开的会话上
        eventually(lambda: here.click(day) is None and "read-only" in here.shown_in_ui(), "a click is not refused")
        yield
    here.wait_until_made(day)


def database_that_is_away(here: WatchedStack, day: date) -> Iterator[None]:
    here.postgres.stop()
    here.click(day)
    yield
    here.postgres.start()


def nats_that_is_away(here: WatchedStack, day: date) -> Iterator[None]:
    here.nats.stop()
    run_id = here.click(day)
    yield
    here.nats.start()
    assert run_id
    assert here.ui.wait(run_id, timeout_seconds=PATIENCE_SECONDS)["status"] == "SUCCESS"


def disk_that_is_nearly_full(here: WatchedStack, _day: date) -> Iterator[None]:
    folder = str(here.looked_from)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here, so no disk is small")
    yield
    subprocess.run(["umount", folder], check=True)  # noqa: S607  # 系统的命令


def webhook_that_takes_nothing(here: WatchedStack, _day: date) -> Iterator[None]:
    here.webhook.answers["/"] = Answer(status=500)
    publish_garbage(here)
    here.wait_until_seen("alert", "封死信")
    here.execute("UPDATE etl.alerts SET since = since - interval '10 minutes'")
    yield
    del here.webhook.answers["/"]
    purge(here, "EVENTS_DLQ")


FAULTS: dict[str, Callable[[WatchedStack, date], Iterator[None]]] = {
    "nobody listens to events": nobody_listens,
    "no worker takes tasks": no_worker,
    "a day is due for longer than `ETL_ALERT_LAG_SECONDS`": due_for_too_long,
    "an event comes before its import": event_without_its_import,
    "an import is completed and no event says so": import_without_its_event,
    "an event is not usable": unusable_event,
    "the dead letters are full": dead_letters_are_full,
    "a completion event cannot be published": completion_event_cannot_be_published,
    "a queue is full": queue_is_full,
    "rows are rejected": rejected_rows,
    "a run fails for a reason that may pass": run_that_is_tried_again,
    "a run cannot succeed, its days are held": run_that_cannot_succeed,
    "a person cancels a run": run_that_is_cancelled,
    "the rows of a day do not add up": rows_that_do_not_add_up,
    "a worker dies in the middle of a run": worker_that_dies,
    "a process of `etl up` ends": process_that_ends,
    "an index is missing": missing_index,
    "the code cannot be loaded": code_that_cannot_be_loaded,
    "PostgreSQL refuses: it is read-only": database_that_refuses,
    "PostgreSQL is away": database_that_is_away,
    "NATS is away": nats_that_is_away,
    "the disk is nearly full": disk_that_is_nearly_full,
    "no webhook takes an alert": webhook_that_takes_nothing,
}
"""表的第一列 → 怎样弄出来、弄好。"""


def publish_garbage(here: WatchedStack) -> None:
    async def publish(connection: JetStreamConnection) -> None:
        await connection.publish(DATA_IMPORT_COMPLETED, b"no event", message_id=str(uuid4()))

    here.ask_nats(publish)


def purge(here: WatchedStack, *streams: str) -> None:
    for stream in streams:
        here.ask_nats(lambda connection, stream=stream: connection.ask(f"STREAM.PURGE.{stream}"))


def limit(here: WatchedStack, stream: str, **limits: int) -> None:
    async def update(connection: JetStreamConnection) -> None:
        info = await connection.context.stream_info(stream)
        await connection.context.update_stream(info.config, **limits)

    here.ask_nats(update)


def ask_again(here: WatchedStack, day: date) -> None:
    """`etl status` 给的命令。"""
    here.command("backfill", "--asset", "orders", "--from", f"{day}", "--to", f"{day}")
    here.wait_until_made(day)


# ---- 表的每一行 -----------------------------------------------------------------


def test_both_languages_have_the_same_table() -> None:
    assert [line.said_elsewhere for line in CHINESE] == [line.said_elsewhere for line in ENGLISH]
    assert [len(line.said["alert"]) for line in CHINESE] == [len(line.said["alert"]) for line in ENGLISH]


def test_every_line_is_made() -> None:
    assert [line.fault for line in ENGLISH] == list(FAULTS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("english", "chinese"), list(zip(ENGLISH, CHINESE, strict=True)), ids=list(FAULTS))
def test_operator_sees(here: WatchedStack, english: Line, chinese: Line) -> None:
    eventually(lambda: here.status().startswith("all well"), f"it is not all well:\n{here.status()}", PATIENCE_SECONDS)
    here.begin()
    # 每种一天，谁也不碰谁的
    fault = FAULTS[english.fault](here, FIRST_DAY + timedelta(days=ENGLISH.index(english)))
    next(fault)
    try:
        for place, fragments in english.said_elsewhere.items():
            for fragment in fragments:
                here.wait_until_seen(place, fragment)
        # 告警说的是 `etl status` 说的，两种语言
        for fragment in english.said["alert"]:
            here.wait_until_seen("status", fragment)
        for fragment in chinese.said["alert"]:
            here.wait_until_seen("alert", fragment)
    finally:
        next(fault, None)  # 没有看见的，也弄好它：后面的还要用这一套
