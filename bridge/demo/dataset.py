"""样例数据：同一个种子总得到同样的四批导出文件。约五千个订单，有改版、取消、退款与几行坏数据。"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

SEED = 20250101
ORDERS = 5_000
BATCHES = 4
SHOPS = ("云锦定制旗舰店", "木石手作专营店", "Lumen 礼品店")
ORDER_TYPES = {"打样订单": "SAMPLE", "产前样订单": "PROOF", "大货订单": "BULK"}

_FIRST_DAY = datetime(2025, 1, 1)  # noqa: DTZ001  # 平台导出的时刻没有时区
_DAYS = 180
_SURNAMES = "王李张刘陈杨黄赵周吴徐孙马朱胡郭何高林罗"
_GIVEN_NAMES = (
    "伟",
    "芳",
    "娜",
    "秀英",
    "敏",
    "静",
    "丽",
    "强",
    "磊",
    "军",
    "洋",
    "勇",
    "艳",
    "杰",
    "娟",
    "涛",
    "明",
    "超",
    "秀兰",
    "霞",
)
_STATUSES = ("待发货", "已发货", "交易成功", "交易成功", "交易成功", "已取消", "已退款")
_FULL_WIDTH = {ord("0") + digit: ord("０") + digit for digit in range(10)}
_HEADERS = ("订单编号", "店铺名称", "买家昵称", "订单类型", "订单状态", "实付金额", "数量", "下单时间")


@dataclass(frozen=True)
class ExportedOrder:
    """平台导出的一行。"""

    order_id: str
    shop: str
    customer_name: str
    order_type: str
    status: str
    amount: str
    quantity: str
    ordered_at: str


def write_batches(folder: Path) -> list[Path]:
    """写出四个 CSV 文件（UTF-8，带 BOM，像电子表格导出的那样）。"""
    batches: list[list[ExportedOrder]] = [[] for _ in range(BATCHES)]
    for batch, order in _export(random.Random(SEED)):  # noqa: S311  # 要的是可重复
        batches[batch].append(order)
    paths = []
    for number, orders in enumerate(batches, start=1):
        path = folder / f"导出-{number}.csv"
        frame = pl.DataFrame(list(map(astuple, orders)), schema=list(_HEADERS), orient="row")
        frame.write_csv(path, include_bom=True)
        paths.append(path)
    return paths


def _export(chance: random.Random) -> Iterator[tuple[int, ExportedOrder]]:
    """每个订单先在某一批里出现，五分之一以后还有一个新版本。"""
    customers = [
        chance.choice(_SURNAMES) + chance.choice(_GIVEN_NAMES) + chance.choice(("", "", str(n))) for n in range(900)
    ]
    for number in range(ORDERS):
        order = _first_version(chance, number, chance.choice(customers))
        batch = chance.randrange(BATCHES)
        yield batch, order
        if batch + 1 < BATCHES and chance.random() < 0.2:
            yield chance.randrange(batch + 1, BATCHES), _next_version(chance, order, customers)
    yield from _bad_rows()


def _first_version(chance: random.Random, number: int, customer: str) -> ExportedOrder:
    at = _FIRST_DAY + timedelta(days=chance.randrange(_DAYS), seconds=chance.randrange(86_400))
    is_refund = chance.random() < 0.02
    return ExportedOrder(
        order_id=f"D{at:%Y%m%d}{number:05d}",
        shop=chance.choice(SHOPS),
        customer_name=chance.choice((customer, customer, customer, f" {customer} ", customer.translate(_FULL_WIDTH))),
        order_type=chance.choice((*ORDER_TYPES, *ORDER_TYPES, "现货订单", "")),
        status=chance.choice(_STATUSES),
        amount=f"{'-' if is_refund else ''}{chance.randrange(100, 500_000) / 100:.2f}",
        quantity=str(chance.randrange(1, 500)),
        ordered_at=f"{at:%Y-%m-%d %H:%M:%S}",
    )


def _next_version(chance: random.Random, order: ExportedOrder, customers: list[str]) -> ExportedOrder:
    match chance.randrange(5):
        case 0:
            return replace(order, status="已取消")
        case 1:
            return replace(order, customer_name=chance.choice(customers))
        case 2:
            at = datetime.fromisoformat(order.ordered_at) + timedelta(days=chance.randrange(1, 20))
            return replace(order, ordered_at=f"{at:%Y-%m-%d %H:%M:%S}")
        case 3:
            return replace(order, amount=f"{chance.randrange(100, 500_000) / 100:.2f}")
        case _:
            return replace(order, status="交易成功")


def _bad_rows() -> Iterator[tuple[int, ExportedOrder]]:
    """文件读得进、规则却拒收的行。"""
    good = ExportedOrder("D-BAD", SHOPS[0], "坏行", "大货订单", "交易成功", "1.00", "1", "2025-03-03 03:03:03")
    yield 0, replace(good, order_id="")
    yield 1, replace(good, customer_name="   ")
    yield 1, replace(good, shop="不认识的店")
    yield 2, replace(good, quantity="-3")
    yield 2, replace(good, order_id="D-BAD-2", ordered_at="")
    yield 3, replace(good, ordered_at="1998-01-01 00:00:00")
