"""打印出来的行：数据是数据，不是排版的标记。"""

from __future__ import annotations

import json

import pytest

from bridge.cli.options import print_rows

NASTY = [{"customer": "[red]张三[/red] [/] :smile:", "orders": 2}]


def test_brackets_in_data_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(NASTY, ["customer", "orders"], "table")
    assert "[red]张三[/red] [/] :smile:" in capsys.readouterr().out


def test_json_keeps_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(NASTY, ["customer", "orders"], "json")
    assert json.loads(capsys.readouterr().out) == NASTY
