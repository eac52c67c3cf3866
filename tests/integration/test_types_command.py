"""etl types：列出、改掉、去掉订单类型的对应。"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.cli.commands import run_command
from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.materialization import RunContext
from etl_assets.testing.fixtures import ReadTable
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands

Types = Callable[..., tuple[int, str, str]]
DAY = date(2026, 1, 5)


@pytest.fixture
def types(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Types:
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path))
    use_in_commands(monkeypatch, engine=engine, settings=etl_settings)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_command(["types", *arguments])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_types_are_set_changed_and_removed(types: Types) -> None:
    assert types("set", " 打样=单 = sample", "大货订单=BULK") == (
        0,
        "打样=单: not in the list -> SAMPLE\n大货订单: not in the list -> BULK\n",
        "",
    )
    assert types("set", "大货订单=PROOF")[1] == "大货订单: BULK -> PROOF\n"
    assert types("set", "大货订单=PROOF")[1] == "nothing to change\n"
    assert json.loads(types("--format", "json")[1]) == [
        {"order_type": "大货订单", "counts_as": "PROOF"},
        {"order_type": "打样=单", "counts_as": "SAMPLE"},
    ]
    assert types("remove", "打样=单")[1] == "打样=单: SAMPLE -> not in the list\n"
    code, _, said = types("remove", "打样=单", "大货订单")
    assert (code, said.splitlines()[-1]) == (2, "Error: '打样=单' is not in the list: `etl types` shows it")
    assert json.loads(types("--format", "json")[1]) == [{"order_type": "大货订单", "counts_as": "PROOF"}]


@pytest.mark.parametrize("pair", ["打样", "=BULK", "打样=大货", "打样=", " =SAMPLE"])
def test_a_pair_that_is_none_changes_nothing(types: Types, pair: str) -> None:
    code, _, said = types("set", "大货订单=BULK", pair)
    assert (code, said.splitlines()[-1]) == (2, f"Error: {pair!r} is not TYPE=KIND with a KIND of SAMPLE, PROOF, BULK")
    assert json.loads(types("--format", "json")[1]) == []


def test_days_that_are_done_are_named_and_take_it_when_made_again(
    types: Types, engine: sa.Engine, etl_settings: EtlSettings, raw_data: RawData, read_table: ReadTable
) -> None:
    raw_data.add_import([{"order_type": "新品样衣", "ordered_at": datetime(2026, 1, 5, 4, tzinfo=UTC)}])
    materialize_orders(engine, etl_settings, DayRange(DAY, DAY), RunContext(run_id="run", assets=frozenset()))
    assert read_table("orders")["system_order_type"].to_list() == ["BULK"]
    assert f"etl backfill --from {DAY} --to {DAY}" in types("set", "新品样衣=SAMPLE")[2]
    materialize_orders(engine, etl_settings, DayRange(DAY, DAY), RunContext(run_id="run", assets=frozenset()))
    assert read_table("orders")["system_order_type"].to_list() == ["SAMPLE"]
