"""etl dlq：死信，看、重试、丢弃。"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from bridge.cli.exit_codes import ExitCode
from bridge.cli.options import confirm, print_rows, with_stack
from bridge.cli.output import say, say_json
from bridge.cli.tables import readable
from bridge.settings import get_bridge_settings

if TYPE_CHECKING:
    from bridge.operations.dead_letters import DeadLetter, DeadLetters

_COLUMNS = ["letter_id", "stored_at", "subject", "attempts", "reason"]

_ids_argument = click.argument("letter_ids", metavar="[ID]...", nargs=-1)
_all_option = click.option("--all", "everything", is_flag=True, help="Every letter.")
_reason_option = click.option("--reason-contains", metavar="TEXT", help="Only letters whose reason contains this.")


@click.group("dlq")
def dlq_command() -> None:
    """Dead letters: events and tasks that could not be handled, with the reason. Nothing is lost until you drop it."""


@dlq_command.command("list")
@_reason_option
@click.option(
    "--limit",
    type=click.IntRange(1, 100_000),
    default=20,
    show_default=True,
    help="At most this many letters, the newest.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_stack
def list_command(reason_contains: str | None, limit: int, as_json: bool) -> None:
    """List dead letters, newest last."""
    from bridge.jetstream.dead_letters import LETTERS_FULL_REMEDY
    from bridge.operations.dead_letters import DeadLetters

    async def read() -> tuple[Sequence[DeadLetter], list[dict[str, Any]], list[tuple[str, float]]]:
        async with DeadLetters(get_bridge_settings()) as letters:
            found = await letters.matching(reason_contains=reason_contains)
            return found, [_row(letters, letter) for letter in found[-limit:]], await letters.nearly_full()

    found, rows, nearly_full = asyncio.run(read())
    print_rows(rows, _COLUMNS, "json" if as_json else "table", cut="reason")
    if len(found) > limit:
        say(f"{len(found) - limit} older letters are not shown: --limit {len(found)} shows all", err=True)
    for stream, share in nearly_full:
        say(f"{stream} is {share * 100:.0f} % full, then what belongs there waits: {LETTERS_FULL_REMEDY}", err=True)


def _row(letters: DeadLetters, letter: DeadLetter) -> dict[str, Any]:
    """不是我们写的，缘由那一格说这个：它自己的消息头不可信。"""
    row = {column: getattr(letter, column) for column in _COLUMNS}
    if problem := letters.problem(letter):
        row["reason"] = f"not a letter of ours: {problem}"
    return row


@dlq_command.command("show")
@click.argument("letter_id", metavar="ID")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_stack
def show_command(letter_id: str, as_json: bool) -> None:
    """Show one dead letter: its headers and its body."""
    from pydantic_core import from_json

    from bridge.operations.dead_letters import DeadLetters

    async def read() -> tuple[DeadLetter, str | None]:
        async with DeadLetters(get_bridge_settings()) as letters:
            letter = await letters.find(letter_id)
            return letter, letters.problem(letter)

    letter, problem = asyncio.run(read())
    body: Any
    try:
        body = from_json(letter.body)
        text = json.dumps(body, ensure_ascii=False, indent=2)
    except ValueError:
        body = text = letter.body.decode(errors="backslashreplace")
    if as_json:
        fields = {"letter_id": letter.letter_id, "stored_at": letter.stored_at, "headers": letter.headers}
        content = fields | {"problem": problem, "body": body, "original_bytes": letter.original_bytes}
        say_json(content)
        return
    say(f"{letter.letter_id}, stored at {readable(letter.stored_at)}")
    if problem is not None:
        say(f"This is not a letter of ours and cannot be retried: {problem}")
    for name, value in letter.headers.items():
        say(f"{name}: {value}")
    if letter.original_bytes is not None:
        say(f"The body was cut when it was buried: the first {len(letter.body)} of {letter.original_bytes} bytes.")
    say()
    say(text)


@dlq_command.command("retry")
@_ids_argument
@_all_option
@_reason_option
@with_stack
def retry_command(letter_ids: tuple[str, ...], everything: bool, reason_contains: str | None) -> None:
    """Put dead letters back on their subjects; each is deleted once the stream has stored its message again.

    Exit 1 when some could not be put back: those stay.
    """
    from bridge.errors import LetterError
    from bridge.operations.dead_letters import DeadLetters

    _check_choice(letter_ids, everything, reason_contains)

    async def retry() -> int:
        refused = 0
        async with DeadLetters(get_bridge_settings()) as letters:
            chosen = await _choose(letters, letter_ids, reason_contains)
            for letter in chosen:
                try:
                    stored = await letters.retry(letter.letter_id)
                except LetterError as error:
                    refused += 1
                    say(f"error: {error}", err=True)
                else:
                    say(f"{letter.letter_id} is back on {letter.subject}: {stored.stream} sequence {stored.seq}")
        say(f"{len(chosen) - refused} of {len(chosen)} letters put back", err=True)
        return refused

    if asyncio.run(retry()):
        sys.exit(ExitCode.FAILED)


@dlq_command.command("drop")
@_ids_argument
@_all_option
@_reason_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@with_stack
def drop_command(letter_ids: tuple[str, ...], everything: bool, reason_contains: str | None, yes: bool) -> None:
    """Delete dead letters for good."""
    from bridge.operations.dead_letters import DeadLetters

    _check_choice(letter_ids, everything, reason_contains)

    async def choose() -> list[DeadLetter]:
        async with DeadLetters(get_bridge_settings()) as letters:
            return await _choose(letters, letter_ids, reason_contains)

    async def drop(chosen: Sequence[DeadLetter]) -> None:
        async with DeadLetters(get_bridge_settings()) as letters:
            for letter in chosen:
                await letters.drop(letter)
                say(f"dropped {letter.letter_id}: {letter.subject}: {letter.reason}")

    chosen = asyncio.run(choose())
    confirm(f"Delete {len(chosen)} dead letters for good?", yes=yes or not chosen)
    asyncio.run(drop(chosen))
    say(f"{len(chosen)} letters dropped", err=True)


def _check_choice(letter_ids: tuple[str, ...], everything: bool, reason_contains: str | None) -> None:
    if bool(letter_ids) == everything:
        raise click.UsageError("name letters by their ids, or choose --all")
    if letter_ids and reason_contains is not None:
        raise click.UsageError("--reason-contains goes with --all")


async def _choose(letters: DeadLetters, letter_ids: Sequence[str], reason_contains: str | None) -> list[DeadLetter]:
    """先把点名的都找到：有一个不认识，就一封也不动。"""
    if letter_ids:
        return [await letters.find(letter_id) for letter_id in dict.fromkeys(letter_ids)]
    return await letters.matching(reason_contains=reason_contains)
