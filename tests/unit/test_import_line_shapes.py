"""随机的订单写成一行一件商品的文件，三种写法；说了一行是一件，读回来一分不差，没说就不导入。

文件由这里的几行代码写成，不经过我们的读法。
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bridge.imports.files import encoding

from .import_lines import read, refusal, write

BLOCKS = st.sampled_from([200, 1 << 20])
START = datetime(2026, 3, 1)  # noqa: DTZ001  # 平台导出的时刻没有时区
# item：金额是那一行的；repeated：订单的金额每行都写；first：订单的各列只在第一行写
Shape = Literal["item", "repeated", "first"]


@dataclass(frozen=True)
class Order:
    order_id: str
    customer: str
    status: str
    ordered_at: datetime
    items: list[tuple[Decimal, int]]

    @property
    def amount(self) -> Decimal:
        return sum((amount for amount, _ in self.items), Decimal())

    @property
    def quantity(self) -> int:
        return sum(quantity for _, quantity in self.items)

    def lines(self, shape: Shape) -> list[tuple[str, ...]]:
        rows = []
        for number, (amount, quantity) in enumerate(self.items):
            has_order = shape != "first" or number == 0
            shown = str(amount if shape == "item" else self.amount) if has_order else ""
            order = (self.customer, self.status) if has_order else ("", "")
            rows.append((self.order_id, *order, shown, str(quantity), f"{self.ordered_at}", f"item {number}"))
        return rows


@st.composite
def orders(draw: st.DrawFn) -> list[Order]:
    amounts = st.decimals("-20", "500", places=2)
    items = st.lists(st.tuples(amounts, st.integers(1, 5)), min_size=1, max_size=4)
    return [
        Order(
            order_id=f"N{number}",
            customer=draw(st.sampled_from(["张三", "李四", "O'Hara"])),
            status=draw(st.sampled_from(["done", "shipped", "closed"])),
            ordered_at=START + timedelta(minutes=draw(st.integers(0, 90_000))),
            items=found,
        )
        for number, found in enumerate(draw(st.lists(items, min_size=1, max_size=12)))
    ]


def tells_items(found: list[Order], shape: Shape) -> bool:
    """值看得出件数是商品的（总是）、金额是商品的（item）；碰巧都相同的，谁也看不出。"""
    several = [order for order in found if len(order.items) > 1]
    quantities = [[quantity for _, quantity in order.items] for order in several]
    amounts = [[amount for amount, _ in order.items] for order in several]
    count_tells = any(len(set(counts)) > 1 or counts[0] < len(counts) for counts in quantities)
    return count_tells and (shape != "item" or any(len(set(each)) > 1 for each in amounts))


def scatter(draw: st.DataObject, found: list[Order], shape: Shape) -> list[tuple[str, ...]]:
    """各单的行混在一起；一单之内先后不变。"""
    waiting = [order.lines(shape) for order in found]
    rows = []
    while waiting := [lines for lines in waiting if lines]:
        rows.append(waiting[draw.draw(st.integers(0, len(waiting) - 1))].pop(0))
    return rows


def read_back(path: Path, **options: Any) -> dict[str, tuple[Any, ...]]:
    frame, report = read(path, **options)
    assert report.rows == report.orders == frame.height
    columns = ("order_id", "customer_name", "order_status", "amount", "quantity", "ordered_at")
    return {row[0]: (*row[1:5], row[5].replace(tzinfo=None)) for row in frame.select(columns).rows()}


def expected(found: list[Order]) -> dict[str, tuple[Any, ...]]:
    return {
        order.order_id: (order.customer, order.status, order.amount, order.quantity, order.ordered_at)
        for order in found
    }


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape", ["item", "repeated", "first"])
def test_orders_written_line_by_line_come_back_exactly_or_are_refused(tmp_path: Path, shape: Shape) -> None:
    @given(found=orders(), data=st.data(), block_bytes=BLOCKS)
    def check(found: list[Order], data: st.DataObject, block_bytes: int) -> None:
        assume(tells_items(found, shape))
        path = write(tmp_path, scatter(data, found, shape))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
            assert read_back(path, lines="items") == expected(found)
            several = sum(len(order.items) > 1 for order in found)
            assert refusal(path).startswith(f"orders.csv: {several} of {len(found)} order numbers come")

    check()


@pytest.mark.timeout(3600)
def test_a_line_per_order_is_never_refused(tmp_path: Path) -> None:
    @given(found=orders(), block_bytes=BLOCKS, weak_hash=st.booleans())
    def check(found: list[Order], block_bytes: int, weak_hash: bool) -> None:
        single = [
            Order(order.order_id, order.customer, order.status, order.ordered_at, order.items[:1]) for order in found
        ]
        path = write(tmp_path, [row for order in single for row in order.lines("item")])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
            assert read_back(path) == read_back(path, lines="items") == expected(single)
            if weak_hash:
                patch.setattr("bridge.imports.orders.lines._hash", lambda rows: rows.hash_rows() % 5)
                assert read(path)[0].height == len(single)

    check()


@pytest.mark.timeout(3600)
def test_versions_that_differ_in_status_alone_are_imported_in_the_order_of_the_file(tmp_path: Path) -> None:
    @given(found=orders(), data=st.data(), block_bytes=BLOCKS)
    def check(found: list[Order], data: st.DataObject, block_bytes: int) -> None:
        statuses = st.lists(st.sampled_from(["done", "shipped", "closed", "", " done"]), min_size=1, max_size=3)
        rows = [
            (*line[:2], status, *line[3:])
            for order in found
            for line in [Order(order.order_id, order.customer, "", order.ordered_at, order.items[:1]).lines("item")[0]]
            for status in data.draw(statuses)
        ]
        rows = data.draw(st.permutations(rows))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
            frame, report = read(write(tmp_path, rows))
        assert frame.select("order_id", "order_status").rows() == [(row[0], row[2] or None) for row in rows]
        ids = [row[0] for row in rows]
        assert (report.orders, report.repeated_orders) == (len(set(ids)), sum(ids.count(name) > 1 for name in set(ids)))

    check()
