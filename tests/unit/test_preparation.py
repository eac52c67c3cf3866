"""备数据库的进程：它的错误到了监督者那里，还是那一句话，也还分得出是哪一类。"""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from bridge.stack.preparation import Order, error_to_json, raise_error
from etl_assets.core.errors import (
    DatabaseRefusedError,
    EtlError,
    PermanentError,
    SettingsError,
    TableContractError,
    TableDeviation,
    TooManyDeletesError,
)
from etl_assets.core.settings import EtlSettings

DEVIATION = TableDeviation("public.orders.amount", "integer", "numeric(14,2)")
DELETES = TooManyDeletesError(deletes=30, orders=40, first_day="2026-01-05", last_day="2026-01-06")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TableContractError([DEVIATION]), DatabaseRefusedError),
        (DELETES, PermanentError),
        (SettingsError("ETL_POOL_SIZE is wrong"), SettingsError),
        (EtlError("unlike the others"), EtlError),
    ],
)
def test_an_error_arrives_as_the_same_sentence(error: EtlError, kind: type[EtlError]) -> None:
    with pytest.raises(EtlError) as arrived:
        raise_error(error_to_json(error))
    assert (arrived.type, str(arrived.value)) == (kind, str(error))


def test_no_error_raises_nothing() -> None:
    raise_error(error_to_json(None))


def test_an_order_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = EtlSettings(database_url="postgresql://u:p%40@h/d", rollout="10%", partitions_start=date(2025, 1, 1))
    order = Order(settings, "dagster", {"A": "1"}, tmp_path, "postgresql://s:p%40@h/d")
    monkeypatch.setenv("ETL_ROLLOUT", "50%")
    assert Order.from_json(order.to_json()) == order
