"""打印出来的：数据是数据，不是排版的标记，不是终端的命令，也不是表格软件的公式。"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import unicodedata
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import structlog
from rich.cells import cell_len
from rich.console import Console

from bridge.cli.commands import run_command
from bridge.cli.options import Format, print_rows
from bridge.cli.output import say, say_json
from bridge.cli.tables import table_of
from etl_assets.core.errors import EtlError
from etl_assets.core.log import configure_logging, get_logger
from etl_assets.core.text import escape_in_json, escape_invisible

NASTY = [{"customer": "[red]张三[/red] [/] :smile:", "orders": 2}]
COMMANDS = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u200b\u2066\ufeff\r\x08"
ESCAPED = r"\x1b]0;title\x07\x1b[2J\x9b31m\u202e\u200b\u2066\ufeff\r\x08"


def test_brackets_in_data_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(NASTY, ["customer", "orders"], "table")
    assert "[red]张三[/red] [/] :smile:" in capsys.readouterr().out


def test_json_keeps_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(NASTY, ["customer", "orders"], "json")
    assert json.loads(capsys.readouterr().out) == NASTY


def test_times_in_json_are_iso_8601(capsys: pytest.CaptureFixture[str]) -> None:
    say_json({"at": datetime(2026, 1, 5, 1, 2, 3, tzinfo=UTC), "day": date(2026, 1, 5), "amount": Decimal("1.50")})
    assert json.loads(capsys.readouterr().out) == {
        "at": "2026-01-05T01:02:03+00:00",
        "day": "2026-01-05",
        "amount": "1.50",
    }


def test_every_character_that_a_terminal_may_obey_is_escaped_and_no_other() -> None:
    invisible = {
        char for char in map(chr, range(0x110000)) if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }
    assert {char for char in map(chr, range(0x110000)) if escape_invisible(char) != char} >= invisible
    assert escape_invisible("旗舰店\u3000张三 é 😀 [x] \\x1b") == "旗舰店\u3000张三 é 😀 [x] \\x1b"


def test_table_shows_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([{"customer": COMMANDS, "note": "two\nlines"}], ["customer", "note"], "table")
    printed = capsys.readouterr().out
    assert ESCAPED in printed
    assert r"two\nlines" in printed
    assert not set(COMMANDS) & set(printed) - set("[]02titleJ;1m3")


def test_json_of_it_has_the_same_value_and_nothing_to_obey(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"customer": COMMANDS + "\U000e0041\ud800"}
    print_rows([record], ["customer"], "json")
    printed = capsys.readouterr().out
    assert json.loads(printed) == [record]
    assert escape_invisible(printed, keep="\n") == printed
    assert json.loads(escape_in_json(json.dumps(record, ensure_ascii=False))) == record


def test_sentence_keeps_its_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"held: {COMMANDS}\n\tsecond line", err=True)
    assert capsys.readouterr().err == f"held: {ESCAPED}\n\tsecond line\n"


def test_error_of_a_command_is_escaped(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise EtlError(f"row of {COMMANDS} is refused")

    monkeypatch.setattr("bridge.cli.commands.cli.main", fail)
    with pytest.raises(SystemExit):
        run_command([])
    assert capsys.readouterr().err == f"error: row of {ESCAPED} is refused\n"


@pytest.mark.parametrize("console", [True, False])
def test_log_is_escaped_for_people_and_for_programs(capsys: pytest.CaptureFixture[str], console: bool) -> None:
    configure_logging("test", console=console)
    try:
        try:
            raise EtlError(f"why: {COMMANDS}")
        except EtlError:
            get_logger("test").warning("refused", reason=COMMANDS, exc_info=True)
    finally:
        structlog.reset_defaults()
    printed = capsys.readouterr().err
    own_colours = printed if not console else printed.replace("\x1b[", "")
    assert not set(own_colours) & set("\x1b\x07\x9b\u202e\u200b\u2066\ufeff\r\x08")
    assert console or json.loads(printed)["reason"] == COMMANDS


@pytest.mark.parametrize(
    "text", ['=HYPERLINK("http://x")', "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "=x\r=1", "＝1+1", "＠x"]
)
def test_formula_in_a_csv_cell_is_text(capsys: pytest.CaptureFixture[str], text: str) -> None:
    print_rows([{"customer": text}], ["customer"], "csv")
    assert list(csv.reader(io.StringIO(capsys.readouterr().out, newline=""))) == [["customer"], [f"'{text}"]]


def test_numbers_and_ordinary_text_in_csv_are_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    values = [
        Decimal("-12.50"),
        -3,
        "-12.50",
        "+8613800138000",
        "张三",
        "a=b",
        None,
        "'quoted'",
    ]
    print_rows([{"value": value} for value in values], ["value"], "csv")
    printed = [row[0] if row else "" for row in csv.reader(io.StringIO(capsys.readouterr().out))]
    assert printed == ["value", *("" if value is None else str(value) for value in values)]


@pytest.mark.parametrize(("how", "shown"), [("csv", "2026-01-05 08:00:00+08:00"), ("table", "2026-01-05 08:00:00 ")])
def test_times_are_those_of_the_business_zone(capsys: pytest.CaptureFixture[str], how: Format, shown: str) -> None:
    print_rows([{"at": datetime(2026, 1, 5, tzinfo=UTC)}], ["at"], how)
    assert shown in capsys.readouterr().out


def test_commands_have_one_way_out() -> None:
    folder = Path(__file__).parents[2] / "bridge" / "cli"
    direct = [
        f"{path.name}:{node.lineno}"
        for path in sorted(folder.rglob("*.py"))
        if path.name != "output.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("click.echo", "click.secho", "print", "sys.stdout.write")
    ]
    # etl env 与 etl completion 印的是给 shell 执行的，自己加引号
    assert [place.partition(":")[0] for place in direct] == ["completion.py", "stack.py"], (
        "write with say, say_json, say_csv or print_rows: they escape per medium"
    )


LEAD = {
    "customer_nickname": "云锦定制的张三",
    "lead_no": 1,
    "opened_at": datetime(2026, 3, 2, 2, 15, tzinfo=UTC),
    "closed_at": datetime(2026, 3, 20, 1, tzinfo=UTC),
    "closed_by": "etl",
    "owner": None,
    "lead_id": "7bec5775-e9e5-5257-a0b5-30903bb11865",
}


def drawn(records: list[dict[str, object]], columns: list[str], *, width: int) -> list[str]:
    out = Console(file=io.StringIO(), width=width)
    out.print(table_of(records, columns, title="leads"))
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_a_row_can_be_read_in_a_terminal_of_any_width(width: int) -> None:
    lines = drawn([LEAD, LEAD], list(LEAD), width=width)
    assert max(map(cell_len, lines)) <= width
    for shown in ("云锦定制的张三", "2026-03-02", "10:15:00", "2026-03-20", "etl", LEAD["lead_id"]):
        assert sum(str(shown) in line for line in lines) == 2
    for name in LEAD:
        assert name == "owner" or any(name in line for line in lines)


def test_a_table_that_fits_is_a_table_and_one_that_does_not_gives_each_row_a_paragraph() -> None:
    assert len([line for line in drawn([LEAD, LEAD], list(LEAD), width=120) if "云锦" in line and "etl" in line]) == 2
    narrow = drawn([LEAD, LEAD], list(LEAD), width=80)
    assert narrow[:2] == ["leads", "customer_nickname  云锦定制的张三"]
    assert narrow.count("") == 1
    assert drawn([], list(LEAD), width=60) == ["leads", "no rows"]


def test_columns_give_way_where_words_end() -> None:
    queue = {"queue": "EVENTS.etl-bridge_data_import-completed", "waiting": 0, "last taken": LEAD["opened_at"]}
    lines = drawn([queue], list(queue), width=56)
    assert any(re.search(r"│ +0 │ 2026-03-02 +│$", line) for line in lines)
    assert any(re.search(r"│ 10:15:00 +│$", line) for line in lines)
    assert max(map(cell_len, lines)) <= 56
