"""外围的应用：不停地导入、公布、撤回；数据库或 NATS 不在就一直再试，直到两边都存下。"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from bridge.errors import BridgeError
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.settings import BridgeSettings
from etl_assets.core.tables import import_tasks, raw_orders
from tests.chaos.house import HISTORY, MAPPED_TYPES, SHOPS, UNMAPPED_TYPE, order_of_history

FIRST_DAY = datetime(2026, 1, 5, tzinfo=UTC)
DAYS = 25
EVENTS_PER_SECOND = 40
_CUSTOMERS = 400
_NAMESPACE = UUID("5f2d1a52-6a0e-4c0f-9a35-0f3f5a3f8c11")
_LONGEST_BATCH = 120
_EVENTS_PER_WITHDRAWAL = 60  # 等着的导入撤回了，那些天就整天重做：太密就没有只做变了的
_RETRY_SECONDS = 0.3

Row = dict[str, Any]


class Generator:
    """一个线程；`stop` 之后做完手里的一批才停。"""

    def __init__(
        self,
        engine: sa.Engine,
        bridge_settings: BridgeSettings,
        *,
        seed: int,
        events_per_second: int = EVENTS_PER_SECOND,
    ) -> None:
        self.stored: dict[UUID, UUID] = {}
        """流答应存下了的事件 → 它的导入。"""
        self.doubled = 0
        self.withdrawn = 0
        self.retries = 0
        self._engine = engine
        self._bridge_settings = bridge_settings
        self._chance = random.Random(f"{seed} generator")  # noqa: S311  # 不关安全
        self._seed = seed
        self._events_per_second = events_per_second
        self._orders: dict[int, Row] = {}
        self._orders_of_history: dict[int, Row] = {}
        self._imports: list[UUID] = []
        self._numbered = 0
        self._error: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generator", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def changed_history(self) -> int:
        """历史的订单里有了新版本的。"""
        return len(self._orders_of_history)

    def stop(self, *, timeout_seconds: float) -> None:
        self._stopping.set()
        self._thread.join(timeout_seconds)
        if self._error is not None:
            raise self._error
        assert not self._thread.is_alive(), "the generator cannot store its last imports and events"

    # ---- 线程里 -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._generate())
        except BaseException as error:  # noqa: BLE001  # 交给 stop 抛出
            self._error = error

    async def _generate(self) -> None:
        started = time.monotonic()
        async with EventPublisher(self._bridge_settings) as publisher:
            while not self._stopping.is_set():
                wanted = int((time.monotonic() - started) * self._events_per_second) - len(self.stored)
                if wanted < self._events_per_second // 2:
                    await asyncio.sleep(0.1)
                    continue
                await self._publish_a_batch(publisher, min(wanted, _LONGEST_BATCH))

    async def _publish_a_batch(self, publisher: EventPublisher, size: int) -> None:
        """几十次导入在一个事务里，然后是它们的事件；撤回的是先前的导入。"""
        odds = size / (_EVENTS_PER_WITHDRAWAL * max(len(self._imports), 1))
        withdrawals = [import_id for import_id in self._imports if self._chance.random() < odds]
        for import_id in withdrawals:
            self._imports.remove(import_id)
        imports = {self._number(): self._make_rows() for _ in range(size - len(withdrawals))}
        await self._until_done(lambda: self._store(imports, withdrawals))
        self._imports += imports
        self.withdrawn += len(withdrawals)
        events = [self._event(import_id, "completed") for import_id in imports]
        events += [self._event(import_id, "failed") for import_id in withdrawals]
        twice = [event for event in events if self._chance.random() < 0.05]
        self.doubled += len(twice)
        everything = [*events, *twice]
        self._chance.shuffle(everything)
        await asyncio.gather(*[self._publish(publisher, event) for event in everything])

    async def _publish(self, publisher: EventPublisher, event: DataImportCompleted) -> None:
        while True:
            try:
                await publisher.publish(DATA_IMPORT_COMPLETED, event)
            except BridgeError:
                self.retries += 1
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self.stored[event.event_id] = event.import_id
                return

    async def _until_done(self, work: Callable[[], None]) -> None:
        while True:
            with suppress(sa.exc.DBAPIError):
                await asyncio.to_thread(work)
                return
            self.retries += 1
            await asyncio.sleep(_RETRY_SECONDS)

    def _store(self, imports: dict[UUID, list[Row]], withdrawals: list[UUID]) -> None:
        """再来一次无妨：提交了却没听到回答的，导入的行已经在那里。"""
        with self._engine.begin() as connection:
            tasks = [
                {"import_id": import_id, "source_name": "chaos", "status": "completed", "row_count": len(rows)}
                for import_id, rows in imports.items()
            ]
            insert = pg.insert(import_tasks).values(completed_at=sa.func.clock_timestamp()).on_conflict_do_nothing()
            inserted = set(connection.scalars(insert.returning(import_tasks.c.import_id), tasks)) if tasks else set()
            rows = [{**row, "import_id": import_id} for import_id in inserted for row in imports[import_id]]
            if rows:
                connection.execute(sa.insert(raw_orders), rows)
            withdrawn = sa.update(import_tasks).where(
                import_tasks.c.import_id == sa.any_(sa.cast(withdrawals, sa.ARRAY(sa.Uuid)))
            )
            connection.execute(withdrawn.values(status="failed"))

    # ---- 内容 -------------------------------------------------------------------

    def _number(self) -> UUID:
        self._numbered += 1
        return uuid5(_NAMESPACE, f"{self._seed} {self._numbered}")

    def _event(self, import_id: UUID, status: str) -> DataImportCompleted:
        return DataImportCompleted(event_id=self._number(), import_id=import_id, status=status)

    def _make_rows(self) -> list[Row]:
        return [
            self._new_version() if self._orders and self._chance.random() < 0.4 else self._new_order()
            for _ in range(self._pick(1, 3))
        ]

    def _new_order(self) -> Row:
        order = {
            "order_id": f"C-{len(self._orders):06}",
            "shop": self._chance.choice(SHOPS),
            "customer_name": self._customer(),
            "order_type": self._chance.choice([*MAPPED_TYPES, UNMAPPED_TYPE]),
            "order_status": self._chance.choice(["待发货", "已发货", "交易成功"]),
            "amount": self._amount(),
            "quantity": self._pick(1, 50),
            "ordered_at": self._moment(),
        }
        self._orders[len(self._orders)] = order
        return order

    def _new_version(self) -> Row:
        """改名、挪了日子、退款、取消、改价；偶尔是一行坏数据。一半是历史的订单。"""
        if self._chance.random() < 0.5:
            orders, which = self._orders_of_history, self._pick(0, HISTORY.orders - 1)
            orders.setdefault(which, order_of_history(which))
        else:
            orders, which = self._orders, self._pick(0, len(self._orders) - 1)
        changes: list[Row] = [
            {"customer_name": self._customer()},
            {"ordered_at": self._moment()},
            {"order_status": "已退款", "amount": f"-{self._amount()}"},
            {"order_status": "已取消"},
            {"order_status": "交易成功", "amount": self._amount()},
            {"quantity": -1},
        ]
        version = orders[which] | self._chance.choices(changes, weights=[4, 4, 3, 3, 5, 1])[0]
        if version["quantity"] >= 0:
            orders[which] = version
        return version

    def _customer(self) -> str:
        """多半是那几百个老主顾，不然是历史的随便哪一个。"""
        return f"客户{self._pick(1, _CUSTOMERS if self._chance.random() < 0.7 else HISTORY.customers - 1)}"

    def _amount(self) -> str:
        return f"{self._pick(1, 500_000) / 100:.2f}"

    def _moment(self) -> datetime:
        """多半是最后的几十天，不然是历史的随便哪一天。"""
        days = self._pick(0, DAYS - 1) if self._chance.random() < 0.9 else -self._pick(1, HISTORY.days - DAYS)
        return FIRST_DAY + timedelta(days=days, seconds=self._pick(0, 86_399))

    def _pick(self, first: int, last: int) -> int:
        return self._chance.randint(first, last)
