"""etl publish、etl wait。"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import click
import sqlalchemy as sa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from bridge.cli.abort import say_on_abort
from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import timeout_option, transaction, with_stack
from bridge.cli.output import say
from bridge.settings import get_bridge_settings
from etl_assets.core.database_sync import get_engine, transact
from etl_assets.core.errors import DatabaseUnavailableError, EtlError, PermanentError
from etl_assets.core.log import configure_logging
from etl_assets.core.settings import get_settings
from etl_assets.core.tracing import start_tracing
from etl_assets.reports.progress import Progress, handled_sequence, import_progress

_POLL_SECONDS = 0.05
_EAGER_SECONDS = 3.0
"""等得久的不差这半秒：过了这么久，问得稀一些。"""
_CALM_POLL_SECONDS = 0.5


@click.command("publish")
@click.argument("subject")
@click.argument("event_json", metavar="JSON")
@with_stack
def publish_command(subject: str, event_json: str) -> None:
    """Publish one event on SUBJECT; event_id, event_version and occurred_at are filled in when missing.

    For example: etl publish events.data_import.completed '{"status": "completed", "import_id": "…"}'
    """
    from pydantic import ValidationError

    from bridge.errors import InvalidEventError
    from bridge.events.envelope import event_type
    from bridge.events.publish import publish_event
    from bridge.events.streams import read_subjects
    from bridge.jetstream.streams import subject_covers

    try:
        event = event_type(subject).model_validate_json(event_json)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InvalidEventError(f"{'.'.join(map(str, problem['loc'])) or 'JSON'}: {problem['msg']}") from error
    configure_logging("publish", level="WARNING")
    start_tracing("publish")
    settings = get_bridge_settings()
    stored = asyncio.run(publish_event(subject, event, settings=settings))
    say(
        f"{event.event_id} stored in {stored.stream} as sequence {stored.sequence}"
        + (" (it was there already)" if stored.duplicate else "")
    )
    read = asyncio.run(read_subjects(settings, stored.stream))
    if read is not None and not any(subject_covers(pattern, subject) for pattern in read):
        known = f"; read are {', '.join(read)}" if read else ": is the listener running (`etl status`)?"
        say(f"warning: nobody reads {subject}{known}", err=True)


@click.command("wait")
@click.option("--import-id", type=click.UUID, required=True, help="The import that `etl import` printed.")
@timeout_option(300.0)
@with_stack
def wait_command(import_id: UUID, timeout_seconds: float) -> None:
    """Wait until every day of an import is materialized: exit 0 when done, 1 when it failed or does not exist, 2 on timeout."""
    from etl_assets.reports.reports import is_awaited, read_status

    say_on_abort("stopped waiting; the workers go on")
    # 流里可能有它的又一个事件，先等监听器处理了，台账才说了算
    with _newest_event(import_id) as (is_handled, has_event):
        with transaction() as connection:
            status = read_status(connection, import_id)
            if status is None and not has_event and not is_awaited(connection, get_settings(), import_id):
                raise PermanentError(f"there is no import {import_id}, and no event of it: `etl imports` lists them")
        if status == "failed":
            raise PermanentError(
                f"import {import_id} failed in the application that made it: nothing of it is in the tables"
            )
        if status == "withdrawn":
            say(f"import {import_id} is withdrawn", err=True)

        def read_progress(connection: sa.Connection) -> Progress:
            progress = import_progress(connection, get_settings(), import_id)
            # 没有入过表就撤回的，台账不记
            return replace(progress, handled=True) if status == "withdrawn" else progress

        code = wait_until_done(
            f"import {import_id}", read_progress, timeout_seconds=timeout_seconds, caught_up=is_handled
        )
    sys.exit(code)


@contextmanager
def _newest_event(import_id: UUID) -> Iterator[tuple[Callable[[], bool], bool]]:
    """流里此刻这次导入最新的事件，监听器处理了没有，始终用一条连接问；NATS 不在就说一声，只看台账。也说流里有没有。"""
    from bridge.events.handled_events import handled_up_to, newest_unhandled
    from bridge.events.subjects import DATA_IMPORT_COMPLETED
    from bridge.jetstream.connection import JetStreamConnection

    settings, newest = get_bridge_settings(), 0
    link = JetStreamConnection(settings, name="wait")

    async def find_newest() -> int:
        await link.open()
        return await newest_unhandled(link, settings, import_id)

    def ask(question: Coroutine[Any, Any, int]) -> int:
        """流里的序号；问不成的以后不等它，是 0。"""
        nonlocal newest
        try:
            return runner.run(question)
        except EtlError as error:
            say(
                f"warning: cannot see whether events are still to be handled, going by the ledger alone: {error}",
                err=True,
            )
            newest = 0
            return 0

    def is_handled() -> bool:
        """台账记到了它；不必记的（重复的、没有入过表就撤回的）看确认到了哪里。"""
        if newest == 0:
            return True
        in_ledger = transact(get_engine(), handled_sequence, get_settings(), import_id)
        return in_ledger >= newest or ask(handled_up_to(link, settings, DATA_IMPORT_COMPLETED)) >= newest

    with asyncio.Runner() as runner:
        try:
            newest = ask(find_newest())
            yield is_handled, newest > 0
        finally:
            runner.run(link.close())


def wait_until_done(
    what: str,
    read_progress: Callable[[sa.Connection], Progress],
    *,
    timeout_seconds: float,
    caught_up: Callable[[], bool] = lambda: True,
) -> ExitCode:
    """等到每一天都做完，终端上显示进度条。数据库暂时不在就接着等。

    :param caught_up: 为真之前，台账说什么都不算数。
    """
    start = time.monotonic()
    deadline = start + timeout_seconds
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("days"),
        TimeElapsedColumn(),
    )
    problem = "its event has not been handled yet: is the listener running (`etl status`)?"
    with ProgressBar(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        is_complete = False
        while True:
            try:
                is_complete = is_complete or caught_up()
                progress = transact(get_engine(), read_progress)
            except DatabaseUnavailableError as error:
                problem = str(error)
            else:
                bar.update(task, total=progress.days or None, completed=progress.done)
                if not is_complete:
                    problem = "its newest event has not been handled yet: is the listener running (`etl status`)?"
                elif progress.handled and progress.done == progress.days:
                    return ExitCode.DONE
                elif progress.held:
                    say(f"error: {progress.held} days of {what} failed for good: {progress.held_reason}", err=True)
                    return ExitCode.FAILED
                elif progress.handled:
                    problem = f"{progress.done} of {progress.days} days are materialized"
            now = time.monotonic()
            if now > deadline:
                say(f"error: {what} is not in the tables after {timeout_seconds:g} s: {problem}", err=True)
                return ExitCode.NO_ANSWER
            time.sleep(_POLL_SECONDS if now - start < _EAGER_SECONDS else _CALM_POLL_SECONDS)
