"""`pdm run bench rush`：库里已有一百万个订单；新的一天来十万个，分在一千次导入里，来得多快就多快，别的三天照样一秒一个事件。

那三天慢了多少，最后一次导入之后多久这一天全对，一个订单用多少 CPU。
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import count
from uuid import UUID, uuid4, uuid5

import click as cli
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from benchmarks.history import LAST_DAY, fill_ordinary
from benchmarks.own_stack import own_stack
from benchmarks.processes import cpu_seconds
from benchmarks.raw_imports import add_imports, new_order
from benchmarks.report import Bar, Spread, print_bars, write_results
from benchmarks.verification import count_wrong
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.settings import BridgeSettings
from etl_assets.core.etl_tables import ledger
from etl_assets.core.tables import import_tasks, target_tables
from etl_assets.services.customer_keys import NAMESPACE
from etl_assets.testing.raw_data import SAMPLE_SHOP, SAMPLE_SHOP_NAME

_OTHER_DAYS = tuple(LAST_DAY - timedelta(days=10 * number) for number in (1, 2, 3))
"""不相邻：一个运行不会把几天连在一起做。"""
_ORDERS_PER_CUSTOMER = 5
_WARM_UP = 6
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 900.0

_FILL_IMPORT = sa.text("""
    INSERT INTO raw_orders (import_id, order_id, shop, customer_name, order_type, order_status, amount, quantity, ordered_at)
    SELECT CAST(:import_id AS uuid), :prefix || n, :shop, :prefix || n % :customers, '大货订单', 'paid', n % 99991 / 100.0, 1, :noon
    FROM generate_series(CAST(:first AS integer), :last) AS n
""")
_OF_RAW_ROWS = sa.text("SELECT count(*), sum(amount) FROM raw_orders WHERE ordered_at = :noon")
_OF_TABLES = sa.text("""
    SELECT (SELECT ROW(count(*), sum(amount)) FROM orders WHERE order_date = :day)
               IS NOT DISTINCT FROM ROW(CAST(:orders AS bigint), CAST(:amount AS numeric))
       AND (SELECT ROW(sum(order_count), sum(total_amount)) FROM customers WHERE starts_with(customer_nickname, :prefix))
               IS NOT DISTINCT FROM ROW(CAST(:orders AS bigint), CAST(:amount AS numeric))
       AND (SELECT ROW(sum(l.bulk_count), sum(l.bulk_amount)) FROM business_leads AS l JOIN customers USING (customer_global_id)
            WHERE starts_with(customer_nickname, :prefix))
               IS NOT DISTINCT FROM ROW(CAST(:orders AS bigint), CAST(:amount AS numeric))
""")


@dataclass(frozen=True)
class Rush:
    """一天的急雨，秒：导入都写好、都发布用了多久；此后多久全对；其间各程序的 CPU。quiet 与 during 是别的三天的延迟，毫秒。"""

    orders: int
    importing_seconds: float
    right_after_seconds: float
    cpu_seconds: dict[str, float]
    quiet: list[float]
    during: list[float]

    @property
    def cpu_ms_per_order(self) -> float:
        return 1000 * sum(self.cpu_seconds.values()) / self.orders


@cli.command()
@cli.option(
    "--orders", default=100_000, show_default=True, type=cli.IntRange(1_000, 10_000_000), help="Orders of the day."
)
@cli.option(
    "--imports", default=1_000, show_default=True, type=cli.IntRange(10, 100_000), help="Imports that bring them."
)
@cli.option(
    "--quiet-seconds",
    default=20,
    show_default=True,
    type=cli.IntRange(5, 600),
    help="The other days alone, before each rush.",
)
@cli.option(
    "--rushes",
    default=2,
    show_default=True,
    type=cli.IntRange(1, 10),
    help="Days that get a rush, one after the other.",
)
def bench_rush(orders: int, imports: int, quiet_seconds: int, rushes: int) -> None:
    """11.11: a day gets 100,000 orders as fast as they come; what does it do to other days, and how soon is it right?"""
    with own_stack() as (engine, settings, bridge_settings):
        fill_ordinary(engine, settings)
        measured = asyncio.run(
            measure(
                engine,
                bridge_settings,
                [Plan(LAST_DAY + timedelta(days=number), orders, imports) for number in range(1, rushes + 1)],
                quiet_seconds=quiet_seconds,
            )
        )
        wrong = count_wrong(engine)
    quiet = Spread.of([latency for rush in measured for latency in rush.quiet])
    during = Spread.of([latency for rush in measured for latency in rush.during])
    print_figures(measured, quiet, during)
    bars = [
        Bar(
            "events of other days in the rush, median",
            during.median / quiet.median,
            "times as long as without",
            2,
            "most",
        ),
        Bar(
            "the day is right after its last import",
            max(rush.right_after_seconds for rush in measured),
            "s",
            10,
            "most",
        ),
        Bar("rows that one statement over all raw rows finds wrong", sum(wrong.values()), "rows", 0, "most"),
    ]
    print_bars(bars)
    path = write_results(
        "rush", bars, {"figures": {"quiet_ms": quiet, "during_ms": during, "rushes": measured}, "wrong": wrong}
    )
    cli.echo(f"written to {path}")
    sys.exit(0 if all(bar.ok for bar in bars) else 1)


@dataclass(frozen=True)
class Plan:
    """哪一天，多少个订单，分在多少次导入里。"""

    day: date
    orders: int
    imports: int

    @property
    def prefix(self) -> str:
        """它的订单号与客户的名字都这样开头。"""
        return f"R{self.day:%m%d}-"

    @property
    def noon(self) -> datetime:
        return datetime(self.day.year, self.day.month, self.day.day, 4, tzinfo=UTC)


async def measure(engine: sa.Engine, settings: BridgeSettings, plans: list[Plan], *, quiet_seconds: int) -> list[Rush]:
    """每一场之前先量没有急雨的时候。"""
    measured = []
    async with EventPublisher(settings) as publisher, Arrivals.watched(engine) as arrivals:
        others = OtherDays(engine, publisher, arrivals)
        await others.publish_until(_after(_WARM_UP))
        for number, plan in enumerate(plans, start=1):
            cli.echo(f"rush {number} of {len(plans)}", err=True)
            quiet = await others.publish_until(_after(quiet_seconds))
            measured.append(await _rush(engine, publisher, others, plan, quiet))
    return measured


async def _rush(
    engine: sa.Engine, publisher: EventPublisher, others: OtherDays, plan: Plan, quiet: list[float]
) -> Rush:
    over = asyncio.Event()
    during = asyncio.create_task(others.publish_until(over.is_set))
    cpu_before, started = await asyncio.to_thread(cpu_seconds), time.monotonic()
    for number in range(plan.imports):
        import_id = await asyncio.to_thread(_add_import, engine, plan, number)
        await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
    imported = time.monotonic()
    right = await asyncio.to_thread(_wait_until_right, engine, plan)
    cpu_after = await asyncio.to_thread(cpu_seconds)
    over.set()
    return Rush(
        orders=plan.orders,
        importing_seconds=imported - started,
        right_after_seconds=right - imported,
        cpu_seconds={program: spent - cpu_before.get(program, 0) for program, spent in cpu_after.items()},
        quiet=quiet,
        during=await during,
    )


def _add_import(engine: sa.Engine, plan: Plan, number: int) -> UUID:
    """第 number 次导入：它那一份订单，各是一个新订单；客户也都是新的，每人几单，分在几次导入里。"""
    import_id = uuid4()
    first, last = (plan.orders * edge // plan.imports for edge in (number, number + 1))
    values = {
        "import_id": import_id,
        "prefix": plan.prefix,
        "shop": SAMPLE_SHOP_NAME,
        "customers": max(1, plan.orders // _ORDERS_PER_CUSTOMER),
        "noon": plan.noon,
        "first": first,
        "last": last - 1,
    }
    task = {"import_id": import_id, "status": "completed", "row_count": last - first, "completed_at": datetime.now(UTC)}
    with engine.begin() as connection:
        connection.execute(sa.insert(import_tasks).values(task))
        connection.execute(_FILL_IMPORT, values)
    return import_id


def _wait_until_right(engine: sa.Engine, plan: Plan) -> float:
    """三张表都与原始行另算的一样的时刻；台账说做完了才去比，比一次要读不少行。

    :raises RuntimeError: 太久了。
    """
    due = (
        sa.select(sa.func.count())
        .select_from(ledger)
        .where(ledger.c.day == plan.day, ledger.c.requested > ledger.c.materialized)
    )
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        orders, amount = connection.execute(_OF_RAW_ROWS, {"noon": plan.noon}).one()
        if orders != plan.orders:
            raise RuntimeError(f"{orders:,} raw rows on {plan.day}, not {plan.orders:,}")
        expected = {"day": plan.day, "prefix": plan.prefix, "orders": orders, "amount": amount}
        while time.monotonic() < deadline:
            looked = time.monotonic()
            if not connection.scalar(due) and connection.scalar(_OF_TABLES, expected):
                return looked
            time.sleep(_LOOK_SECONDS)
    raise RuntimeError(f"{plan.day} was not right after {_PATIENCE_SECONDS:g} s: look into the logs of the stack")


class Arrivals:
    """等商机进表的事件：一条语句看全部还没到的，事件再多也只看这么勤。"""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._waiting: dict[UUID, asyncio.Future[float]] = {}

    @classmethod
    @asynccontextmanager
    async def watched(cls, engine: sa.Engine) -> AsyncIterator[Arrivals]:
        arrivals = cls(engine)
        watching = asyncio.create_task(arrivals._watch())
        try:
            yield arrivals
        finally:
            watching.cancel()

    async def of(self, lead_id: UUID) -> float:
        """看见它的时刻（time.monotonic）。三张表里它最后提交。"""
        self._waiting[lead_id] = asyncio.get_running_loop().create_future()
        return await asyncio.wait_for(self._waiting[lead_id], _PATIENCE_SECONDS)

    async def _watch(self) -> None:
        leads = target_tables("public").leads
        of_waiting = sa.select(leads.c.lead_id).where(
            leads.c.lead_id == sa.any_(sa.bindparam("lead_ids", type_=sa.ARRAY(sa.Uuid)))
        )
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while True:
                wanted = {"lead_ids": list(self._waiting)}
                found = (await asyncio.to_thread(connection.scalars, of_waiting, wanted)).all() if self._waiting else []
                for lead_id in found:
                    self._waiting.pop(lead_id).set_result(time.monotonic())
                await asyncio.sleep(_LOOK_SECONDS)


class OtherDays:
    """一秒一个事件，轮流落在那三天，各是一个新客户的一个新订单。"""

    def __init__(self, engine: sa.Engine, publisher: EventPublisher, arrivals: Arrivals) -> None:
        self._engine = engine
        self._publisher = publisher
        self._arrivals = arrivals
        self._numbers = count()

    async def publish_until(self, is_over: Callable[[], bool]) -> list[float]:
        """按时刻表发，不等前一个做完；都进了表才返回：从发布到商机进表的毫秒数。"""
        started = time.monotonic()
        sent: list[asyncio.Task[float]] = []
        while not is_over():
            sent.append(asyncio.create_task(self._publish()))
            await asyncio.sleep(max(0.0, started + len(sent) - time.monotonic()))
        return list(await asyncio.gather(*sent))

    async def _publish(self) -> float:
        order = new_order(_OTHER_DAYS[next(self._numbers) % len(_OTHER_DAYS)])
        (import_id,) = await asyncio.to_thread(add_imports, self._engine, [order])
        arrived = asyncio.create_task(self._arrivals.of(uuid5(UUID(NAMESPACE), f"{SAMPLE_SHOP}:{order.customer}#1")))
        published = time.monotonic()
        await self._publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
        return (await arrived - published) * 1000


def _after(seconds: float) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline


def print_figures(measured: list[Rush], quiet: Spread, during: Spread) -> None:
    table = Table("events of the other days, published -> in the three tables", "median ms", "min - max", "events")
    for name, spread in (("without a rush", quiet), ("in the rush", during)):
        table.add_row(name, f"{spread.median:.0f}", f"{spread.min:.0f} - {spread.max:.0f}", str(spread.runs))
    Console().print(table)
    for rush in measured:
        programs = ", ".join(
            f"{program} {spent:.1f} s" for program, spent in sorted(rush.cpu_seconds.items()) if spent >= 0.05
        )
        cli.echo(
            f"{rush.orders:,} orders imported in {rush.importing_seconds:.1f} s, right {rush.right_after_seconds:.1f} s after the last"
        )
        cli.echo(f"CPU {rush.cpu_ms_per_order:.3f} ms an order: {programs}")
