"""一个世界：真数据库上发生一段历史，然后与参照实现比较；一路上看到了什么也记下来。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.etl_tables import order_index
from etl_assets.core.tables import import_tasks, target_tables
from etl_assets.leads.events import LeadChanged
from etl_assets.ledger.graph import AssetGraph
from etl_assets.orders.recount import find_wrong_days
from etl_assets.reports.reports import import_accounting
from etl_assets.testing.raw_data import RawData
from tests.integration.engine import workers
from tests.integration.engine.chain import Chain
from tests.integration.engine.history import (
    COLD_AFTER_DAYS,
    DAYS,
    FIRST_DAY,
    LAST_DAY,
    OTHER_SHOP,
    OTHER_SHOP_NAME,
    Announce,
    Change,
    Configure,
    Event,
    Finish,
    History,
    Import,
    Materialize,
    Overtake,
    Together,
    Touch,
    Withdraw,
    Work,
)
from tests.integration.engine.interleaving import WorkerDied, interleaved, nth_statement, writes_to
from tests.reference.identities import build_customer_key
from tests.reference.oracle import Split, accounting
from tests.the_three import graph

TABLES = target_tables("public")
ORDERS, CUSTOMERS, LEADS = TABLES.orders, TABLES.customers, TABLES.leads


def shapes(wider: AssetGraph) -> set[str]:
    """图里有没有分叉、有没有汇合。"""
    forks = {"a fork" for name in wider.names if len(wider.downstreams(name)) > 1}
    return forks | {"a join" for asset in wider.assets if len(asset.upstreams) > 1}


class World:
    """一个数据库，以及到现在为止的导入。"""

    def __init__(self, chain: Chain, processes: Executor) -> None:
        chain.empty_database()
        settings = chain.settings.model_copy(update={"cold_after_days": COLD_AFTER_DAYS})
        self.chain = Chain(chain.engine, settings, allow_deletes=True)  # 店铺会改名，而收敛与要不要人允许无关
        self.processes = processes
        self.raw_data = RawData(chain.engine)
        self.raw_data.add_shop(OTHER_SHOP, OTHER_SHOP_NAME)
        self.imports: list[UUID] = []
        self.unannounced: set[UUID] = set()
        self.touched_customers: set[UUID] = set()
        self.is_configured = False
        self.sightings: set[str] = set()

    # ---- 发生 --------------------------------------------------------------------

    def live_through(self, history: History) -> None:
        """发生这段历史，把到期的做完，再与参照实现比较。"""
        try:
            self.chain.use_graph(AssetGraph.of([*graph.assets, *history.extras]))
            self.sightings |= {f"graph with {shape}" for shape in shapes(self.chain.graph)}
            self.happen(history.first)
            self.chain.run_due()
            for change in history.changes:
                with self._watching():
                    self.happen(change)
            with self._watching():
                self.settle_and_compare(history.finish)
        except Exception as error:
            error.add_note(f"in the history {history!r}")  # 并发的例子未必能原样重放
            raise

    def happen(self, change: Change) -> None:
        match change:
            case Import():
                self._import(change)
            case Withdraw(which) if self.imports:
                self._withdraw_or_restore(self.imports[which % len(self.imports)])
            case Announce(which) if self.imports:
                self._announce(self.imports[which % len(self.imports)])
            case Touch():
                self._touch(change)
            case Configure(statement):
                self.is_configured = True
                self.chain.execute(sa.text(statement))
            case Materialize():
                self.chain.run(*change.days, assets=change.assets)
            case Work():
                self.chain.run_due()
            case Overtake():
                self._overtake(change)
            case Together(events, in_processes):
                self.sightings.add("processes at once" if in_processes else "threads at once")
                with ThreadPoolExecutor(len(events)) as pool:
                    for running in [pool.submit(self._start(event, in_process=in_processes)) for event in events]:
                        running.result()

    def _happen_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.happen(event)

    def _import(self, new: Import) -> None:
        import_id = uuid4()
        self.raw_data.add_import(new.rows, completed_at=new.completed_at, import_id=import_id)
        self.imports.append(import_id)
        self.unannounced.add(import_id)
        if new.is_announced:
            self._announce(import_id)

    def _announce(self, import_id: UUID) -> None:
        self.chain.announce(import_id)
        self.unannounced.discard(import_id)

    def _withdraw_or_restore(self, import_id: UUID) -> None:
        self.unannounced.add(import_id)
        self.chain.execute(
            sa.update(import_tasks)
            .where(import_tasks.c.import_id == import_id)
            .values(status=sa.case((import_tasks.c.status == "completed", "failed"), else_="completed"))
        )
        self.sightings.add("withdrawn or restored import")
        self._announce(import_id)

    def _touch(self, touch: Touch) -> None:
        leads = self.chain.rows(
            sa.select(LEADS.c.lead_id, LEADS.c.customer_global_id).order_by(LEADS.c.customer_global_id, LEADS.c.lead_no)
        )
        if leads:
            lead_id, customer_id = leads[touch.which % len(leads)]
            self.chain.execute(sa.update(LEADS).where(LEADS.c.lead_id == lead_id).values(**touch.change))
            if touch.told is None:
                self.touched_customers.add(customer_id)
            else:
                self.sightings.add("change of a lead that was told of")
                named = lead_id if touch.told == "lead_ids" else customer_id
                self.chain.tell(LeadChanged.model_validate({touch.told: [named]}))

    def _overtake(self, change: Overtake) -> None:
        stop = nth_statement(change.stop) if isinstance(change.stop, int) else writes_to(change.stop)
        with interleaved(self.chain.engine, before=stop) as both:
            is_paused = both.begin(lambda: self.happen(change.paused))
            other = both.meanwhile(lambda: self._happen_all(change.meanwhile))
            if is_paused:
                self.sightings.add("worker overtaken by another" if other.done() else "worker waited for by another")
                self.sightings |= {"worker died"} if change.dies else set()
            with suppress(WorkerDied):
                both.resume(dies=change.dies)

    def _start(self, event: Change, *, in_process: bool) -> Callable[[], Any]:
        settings = self.chain.settings
        match event:
            case Materialize() if in_process:
                return lambda: self.processes.submit(workers.materialize, settings, *event.days, event.assets).result()
            case Work() if in_process:
                return lambda: self.processes.submit(workers.work, settings).result()
            case _:
                return partial(self.happen, event)

    # ---- 结束 --------------------------------------------------------------------

    def settle_and_compare(self, finish: Finish) -> None:
        """最后一次改动之后，受影响的日子各跑一遍。"""
        for import_id in sorted(self.imports if self.is_configured else self.unannounced):
            self._announce(import_id)
        wanted = self.chain.expected()
        if self.is_configured and finish.by_person:
            self.chain.run(FIRST_DAY, LAST_DAY)
        elif finish.day_by_day:
            position = {FIRST_DAY + timedelta(days=number): position for number, position in enumerate(finish.order)}
            for day, assets in sorted(
                self.chain.due_runs().items(), key=lambda due: position.get(due[0], DAYS)
            ):  # 或者是今天
                self.chain.run(day, assets=assets, is_of_event=True)
        self.chain.run_due()
        for day in self._days_of_touched_customers():
            self.chain.run(day, assets=["leads"])
        if self.touched_customers:  # 没有订单的客户没有日子：哪一天的运行都看得到人对他的改动
            self.chain.run_from("customers", LAST_DAY)
        self.chain.run_due()
        self.sightings |= {f"run of {report.scope} {report.asset}" for report in self.chain.reports}
        self._look_at_the_result()
        self.chain.assert_converged(wanted)
        self._assert_all_rows_accounted_for()

    def _days_of_touched_customers(self) -> list[date]:
        """没有人说一声的改动：影响他的客户有订单的日子。"""
        if not self.touched_customers:
            return []
        same_customer = order_index.c.customer_key == CUSTOMERS.c.customer_key
        days = sa.select(order_index.c.order_date.distinct()).join(CUSTOMERS, same_customer)
        return [
            day for (day,) in self.chain.rows(days.where(CUSTOMERS.c.customer_global_id.in_(self.touched_customers)))
        ]

    def _assert_all_rows_accounted_for(self) -> None:
        """每次导入的行数对得上：在范围内的 = 入表 + 被取代 + 被拒。"""
        with self.chain.engine.connect() as connection:
            reported = {row["import_id"]: row for row in import_accounting(connection, self.chain.settings)}
            reference = accounting(connection, self.chain.reference_settings).by_import
            wrong = find_wrong_days(connection, self.chain.settings)
        assert not wrong, f"the stored accounts do not add up on {wrong}"
        for import_id in self.imports:
            row = reported[import_id]
            split = Split(loaded=row["loaded"], superseded=row["superseded"], rejected=row["rejected"])
            assert split == reference.get(import_id, Split())
            assert row["waiting"] == 0
            assert (
                row["status"] in ("failed", "withdrawn")
                or split.loaded + split.superseded + split.rejected == row["raw"]
            )

    # ---- 看到了什么 --------------------------------------------------------------

    @contextmanager
    def _watching(self) -> Iterator[None]:
        before = self._orders()
        yield
        after = self._orders()
        for order, (customer, day) in before.items():
            new_customer, new_day = after.get(order, (None, None))
            self.sightings |= {"order moved to another day"} if new_day not in (None, day) else set()
            self.sightings |= {"order left its customer"} if new_customer != customer else set()

    def _orders(self) -> dict[tuple[UUID, str], tuple[str, date]]:
        columns = (ORDERS.c.shop_id, ORDERS.c.order_id, ORDERS.c.customer_nickname, ORDERS.c.order_date)
        rows = self.chain.rows(sa.select(*columns))
        return {
            (shop_id, order_id): (build_customer_key(shop_id, nickname), day)
            for shop_id, order_id, nickname, day in rows
        }

    def _look_at_the_result(self) -> None:
        leads = self.chain.rows(
            sa.select(LEADS.c.current_stage, LEADS.c.closed_by, LEADS.c.closed_at, LEADS.c.opened_at)
        )
        for stage, closed_by, closed_at, opened_at in leads:
            self.sightings.add(f"{stage} lead")
            self.sightings |= {"closing by a person"} if closed_by == "user" and closed_at is not None else set()
            self.sightings |= {"lead without orders"} if opened_at is None else set()
