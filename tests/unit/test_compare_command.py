"""etl compare 的用法：写错了，比之前就说，退出码 2。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bridge.cli.compare import compare_command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Missing option '--left'"),
        (["--left", "old", "--right", "old"], "'old' is also --left: name two schemas"),
        (
            ["--left", "old", "--right", "new", "--table", "raw_orders"],
            "'raw_orders' is not one of 'orders', 'customers'",
        ),
        (
            ["--left", "old", "--right", "new", "--ignore", "order_id"],
            "'order_id' is not compared anyway; choose from customer_nickname,",
        ),
        (
            ["--left", "old", "--right", "new", "--table", "orders", "--ignore", "notes"],
            "'notes' is not compared anyway",
        ),
        (["--left", "old", "--right", "new", "--tolerance", "NaN"], "'NaN' is not a number of 0 or more"),
        (["--left", "old", "--right", "new", "--tolerance", "one cent"], "'one cent' is not a number of 0 or more"),
        (["--left", "old", "--right", "new", "--time-tolerance", "-1"], "'-1' is not a number of 0 or more"),
        (["--left", "old", "--right", "new", "--since", "yesterday"], "'yesterday' is not a day"),
        (["--left", "old", "--right", "new", "--html", "no/such/folder.html"], "the folder 'no/such' does not exist"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_compared(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("ETL_DATABASE_URL", "postgresql://127.0.0.1:1/nowhere")
    result = CliRunner().invoke(compare_command, arguments)
    assert result.exit_code == 2
    assert sentence in re.sub(r"\s+", " ", result.output)
