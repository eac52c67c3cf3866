"""文件里的订单与库里已有的版本相比：往前走，还是往回走；样本怎样取。"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import polars as pl
import pytest

from bridge.imports import earlier_versions
from bridge.imports.earlier_versions import OrderSample, clean, compare
from etl_assets.core.settings import EtlSettings

Version = tuple[str, str | None, int | None]


def frame(*versions: Version) -> pl.DataFrame:
    """一行一个版本：号、状态、金额；raw_id 是先后。"""
    rows = [
        {
            "order_id": order_id,
            "shop": "店",
            "order_status": status,
            "amount": Decimal(amount) if amount is not None else None,
        }
        for order_id, status, amount in versions
    ]
    columns: dict[str, Any] = {
        "order_id": pl.String,
        "shop": pl.String,
        "order_status": pl.String,
        "amount": pl.Decimal(14, 2),
    }
    cleaned = clean(pl.DataFrame(rows, schema=columns).with_columns(quantity=pl.lit(1)))
    return cleaned.with_columns(raw_id=pl.int_range(pl.len()))


PAID, DONE, CLOSED, REFUNDING = "已付款", " 交易成功 ", "CLOSED", "退款中"


@pytest.mark.parametrize(
    ("versions", "new", "backward", "forward"),
    [
        pytest.param([("A", DONE, 1)], ("A", PAID, 1), 1, 0, id="final to not"),
        pytest.param([("A", CLOSED, 1)], ("A", None, 1), 1, 0, id="final to none"),
        pytest.param([("A", PAID, 1)], ("A", DONE, 1), 0, 1, id="not to final"),
        pytest.param([("A", DONE, 1)], ("A", CLOSED, 1), 0, 0, id="final to final"),
        pytest.param([("A", PAID, 1)], ("A", REFUNDING, 1), 0, 0, id="nobody knows"),
        pytest.param([("A", PAID, 1)], ("A", PAID, 2), 0, 0, id="another amount"),
        pytest.param([("A", DONE, None)], ("A", DONE, None), 0, 0, id="the same"),
        pytest.param([("A", PAID, 2), ("A", PAID, 1)], ("A", PAID, 2), 1, 0, id="the amount of before"),
        pytest.param([("A", PAID, None), ("A", PAID, 1)], ("A", PAID, None), 1, 0, id="the missing amount of before"),
        pytest.param([("A", DONE, 1), ("A", REFUNDING, 1)], ("A", DONE, 1), 1, 0, id="the final status of before"),
        pytest.param([("A", DONE, 1)], ("B", PAID, 1), 0, 0, id="a new order"),
    ],
)
def test_an_order_goes_back_or_forward(versions: list[Version], new: Version, backward: int, forward: int) -> None:
    known = frame(*versions)
    current = known.unique(["order_id", "shop"], keep="last", maintain_order=True)
    back, ahead = compare(frame(new).drop("raw_id"), current, known, EtlSettings())
    assert (back.height, ahead) == (backward, forward)


def test_a_sample_is_whole_orders_spread_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(earlier_versions, "MOST_ORDERS", 100)
    sample = OrderSample()
    for start in range(0, 10_000, 500):
        ids = [f" A{n // 2} " for n in range(start, start + 500)]
        sample.add(pl.DataFrame({"order_id": ids, "shop": "店", "order_status": [f"{n % 2}" for n in range(500)]}))
    assert sample.is_partial
    assert 20 < sample.orders.height <= 100
    assert sample.orders["order_id"].n_unique() == sample.orders.height
    assert set(sample.orders["order_status"]) == {"1"}
    numbers = sample.orders["order_id"].str.slice(1).cast(pl.Int64)
    assert numbers.min() < 1_000 < 4_000 < numbers.max()  # type: ignore[operator]  # 都是整数


def test_rows_without_an_order_are_not_in_the_sample() -> None:
    sample = OrderSample()
    sample.add(pl.DataFrame({"order_id": ["A", " ", None, "B"], "shop": ["店", "店", "店", ""]}))
    assert sample.orders["order_id"].to_list() == ["A"]
    assert not sample.is_partial


def test_an_order_number_on_every_row_is_one_order() -> None:
    sample = OrderSample()
    sample.add(pl.DataFrame({"order_id": ["-"] * 50_000, "shop": ["店"] * 50_000}))
    assert sample.orders.height == 1
