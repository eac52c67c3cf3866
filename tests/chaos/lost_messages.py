"""弄丢流里的消息的各种办法，与其间照常导入、撤回的应用。"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from nats.js.api import StreamConfig

from bridge.errors import BridgeError
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from etl_assets.testing.raw_data import RawData
from tests.integration.conftest import NatsServer

FIRST = datetime(2026, 1, 5, 4, tzinfo=UTC)
DAYS, ORDERS, CUSTOMERS = 4, 30, 8
WITHDRAWALS = 0.3


class Application:
    """导入、又撤回；事件发不成就算了，像死在发布之前。"""

    def __init__(self, raw_data: RawData, publisher: EventPublisher, chance: random.Random) -> None:
        self._raw_data = raw_data
        self._publisher = publisher
        self._chance = chance
        self._standing: list[UUID] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def act(self) -> None:
        if self._standing and self._chance.random() < WITHDRAWALS:
            import_id = self._standing.pop(self._chance.randrange(len(self._standing)))
            await asyncio.to_thread(self._raw_data.set_status, import_id, "failed")
            event = DataImportCompleted(import_id=import_id, status="failed")
        else:
            import_id = await asyncio.to_thread(self._add_import)
            self._standing.append(import_id)
            event = DataImportCompleted(import_id=import_id)
        sending = asyncio.create_task(self._publish(event))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def finish(self) -> None:
        await asyncio.gather(*self._sending)

    async def _publish(self, event: DataImportCompleted) -> None:
        with suppress(BridgeError):
            await self._publisher.publish(DATA_IMPORT_COMPLETED, event)

    def _add_import(self) -> UUID:
        """订单就那么些，一再有新的版本：撤回了的要露出前一个。"""
        chance = self._chance
        rows = [
            {
                "order_id": f"L-{chance.randrange(ORDERS)}",
                "customer_name": f"客户{chance.randrange(CUSTOMERS)}",
                "ordered_at": FIRST + timedelta(days=chance.randrange(DAYS)),
                "amount": f"{chance.randrange(100_000) / 100:.2f}",
            }
            for _ in range(chance.randint(1, 3))
        ]
        return self._raw_data.add_import(rows, completed_at=datetime.now(UTC))


@dataclass
class Victim:
    """要遭殃的流。

    :param config: 像运维那样重建它时用的。
    :param folder: 放快照的地方。
    """

    stream: str
    config: StreamConfig
    server: NatsServer
    connection: JetStreamConnection
    folder: Path

    async def take_snapshot(self) -> None:
        await self._while_stopped(lambda: _copy(self._stored, self._snapshot))

    async def delete(self) -> None:
        await self.connection.context.delete_stream(self.stream)

    async def purge(self) -> None:
        await self.connection.context.purge_stream(self.stream)

    async def recreate(self) -> None:
        """序号从头来；消费者没有了。进程抢先建好了也一样。"""
        await self.delete()
        with suppress(Exception):
            await self.connection.context.add_stream(self.config)

    async def roll_back(self) -> None:
        await self._while_stopped(lambda: _copy(self._snapshot, self._stored))

    async def roll_back_messages(self) -> None:
        """断了电：消息没有落盘，消费者的进度落了。"""
        await self._while_stopped(lambda: _copy(self._snapshot / "msgs", self._stored / "msgs"))

    async def _while_stopped(self, work: Callable[[], None]) -> None:
        await asyncio.to_thread(self.server.stop)
        work()
        await asyncio.to_thread(self.server.start)

    @property
    def _stored(self) -> Path:
        (found,) = self.server.store.rglob(f"streams/{self.stream}")
        return found

    @property
    def _snapshot(self) -> Path:
        return self.folder / self.stream


def _copy(source: Path, destination: Path) -> None:
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(source, destination)


WAYS: dict[str, Callable[[Victim], Awaitable[None]]] = {
    "deleted": Victim.delete,
    "purged": Victim.purge,
    "recreated": Victim.recreate,
    "rolled back": Victim.roll_back,
    "its messages rolled back": Victim.roll_back_messages,
}
