"""五段历史，与在每一段上发生的事件。"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import click
import sqlalchemy as sa

from benchmarks.dagster.bench import fill_days
from benchmarks.history import LAST_DAY, ORDINARY, History, changes_of_product, fill_history
from benchmarks.raw_imports import ImportedOrder, new_order
from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.testing.databases import cloned_database, template_database
from etl_assets.testing.raw_data import RawData

_APART = 7_919
"""质数：事件散在历史各处。"""


@dataclass(frozen=True)
class Case:
    """一段历史；gains_customers：事件也会带来新客户。"""

    key: str
    title: str
    history: History
    gains_customers: bool = True

    def order(self, number: int) -> ImportedOrder:
        """第 number 个事件的订单，依次是：新客户的、老客户的、已有订单的又一个版本；新订单一半在最新的一天，一半在历史的某一天。"""
        place = number * _APART % self.history.orders
        customer, day = self.history.customer_of(place), self.history.day_of(place)
        if number % 3 == 2:
            return ImportedOrder(f"H-{place}", customer, day, status="delivered")
        is_newcomer = number % 3 == 0 and self.gains_customers
        return new_order(LAST_DAY if number % 2 else day, None if is_newcomer else customer)


EMPTY = Case(
    "a", "almost empty: 100 orders over 100 days", History(LAST_DAY, days=100, imports=100, orders=100, customers=100)
)
"""不是一个也没有：老客户与已有的订单，别的历史上有，这里也要有。"""
TENTH_YEAR = Case(
    "c",
    "10,000,000 orders in 100,000 imports over 3,650 days",
    History(LAST_DAY, 3_650, 100_000, orders=10_000_000, customers=2_000_000),
)
BUSIEST_CUSTOMER = Case(
    "e", "a customer with 100,000 orders", History(LAST_DAY, 1_000, 1_000, 100_000, customers=1), gains_customers=False
)
CASES = (
    EMPTY,
    Case("b", "1,000,000 orders in 10,000 imports over 1,000 days", ORDINARY),
    TENTH_YEAR,
    Case("d", "a day with 100,000 orders", History(LAST_DAY, days=1, imports=1_000, orders=100_000, customers=20_000)),
    BUSIEST_CUSTOMER,
)


@dataclass
class House:
    """一段历史上的一整套：自己的数据库、NATS、监听器、工人与网页。"""

    case: Case
    engine: sa.Engine
    addresses: StackAddresses
    bridge_settings: BridgeSettings


@dataclass
class Filled:
    """填好了的数据库；changes 是产品重做几天时改了的，应当没有。"""

    case: Case
    url: str
    size_bytes: int = 0
    changes: list[str] = field(default_factory=list)


@contextmanager
def filled_databases(server_url: str, cases: list[Case], clicks: int) -> Iterator[list[Filled]]:
    """每段历史一个数据库，都在一台服务器上；最大的一段与其余的同时填。"""
    with ExitStack() as cleanup, ThreadPoolExecutor(2) as two:
        template = cleanup.enter_context(template_database(server_url))
        filled = [Filled(case, cleanup.enter_context(cloned_database(server_url, template))) for case in cases]
        largest_first = sorted(filled, key=lambda one: one.case.history.orders, reverse=True)
        list(two.map(lambda one: _fill(one, clicks), largest_first))
        yield filled


def _fill(filled: Filled, clicks: int) -> None:
    """填历史，也放好要点击的日子；再让产品把头、中、尾三天重做一遍。"""
    case, settings = filled.case, EtlSettings(database_url=filled.url)
    history = case.history
    engine = build_engine(settings)
    RawData(engine)
    fill_history(engine, settings, history)
    fill_days(engine, clicks)
    sample = {history.first_day, history.first_day + timedelta(days=history.days // 2), history.last_day}
    filled.changes = list(changes_of_product(engine, settings, [DayRange(day, day) for day in sorted(sample)]))
    with engine.connect() as connection:
        filled.size_bytes = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()
    engine.dispose()
    click.echo(f"({case.key}) {case.title}: filled", err=True)


@contextmanager
def running_houses(folder: Path, filled: list[Filled]) -> Iterator[list[House]]:
    """都开着，才好一个事件一个事件地轮流量；闲着的一套用百分之几的核。"""
    with ExitStack() as cleanup:
        houses = []
        for one in filled:
            settings = EtlSettings(database_url=one.url)
            stack = Stack(
                folder / one.case.key,
                settings=settings,
                bridge_settings=BridgeSettings(nats_url=""),
                port=find_free_port(),
            )
            addresses = cleanup.enter_context(stack)
            engine = build_engine(settings)
            cleanup.callback(engine.dispose)
            houses.append(House(one.case, engine, addresses, BridgeSettings(nats_url=addresses.nats_url)))
        yield houses


def in_turn(houses: list[House], number: int) -> list[House]:
    """第 number 轮的次序：每轮往后挪一位。"""
    first = number % len(houses)
    return houses[first:] + houses[:first]
