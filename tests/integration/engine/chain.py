"""不经 Dagster 跑资产链，并与参照实现比较：引擎的集成测试共用。"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.asset_events import Asked
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_errors import translated_errors
from etl_assets.core.database_sync import build_engine
from etl_assets.core.etl_tables import etl, installation, ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application, target_tables
from etl_assets.customers.etl import materialize_customers
from etl_assets.intake.imports import ImportEvent, request_imports
from etl_assets.leads.etl import materialize_leads
from etl_assets.leads.events import LeadChanged, deal_again
from etl_assets.ledger.graph import AssetGraph, catch_up, read_graph, write_graph
from etl_assets.ledger.marking import Revisions, Scope, marking, prepare_marking, read_revisions
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.fingerprints import fingerprint
from etl_assets.services.materialization import AssetReport, RunContext
from etl_assets.testing.databases import cloned_database
from tests.integration.engine.extra_assets import expected_extras, extras, materialize_extra
from tests.reference.oracle import ReferenceSettings, Result, actual, differences, expected
from tests.the_three import graph

MATERIALIZE: dict[str, Callable[..., AssetReport]] = {
    "orders": materialize_orders,
    "customers": materialize_customers,
    "leads": materialize_leads,
}

ASSETS = graph.names

ONE_DAY = timedelta(days=1)


def mark_materialized(
    connection: sa.Connection,
    target: str,
    asset: str,
    days: DayRange,
    revisions: Revisions,
    *,
    run_id: str,
    scope: Scope,
) -> list[UUID]:
    """记下一次物化，没有数据；返回因此完成的导入。"""
    made = prepare_marking(connection, target, asset, days, revisions, run_id=run_id, scope=scope)
    return list(connection.scalars(marking(), made))


def read_and_mark(connection: sa.Connection, target: str, asset: str, days: DayRange) -> list[UUID]:
    """读台账，马上整天做完：两步之间没有别的事。"""
    revisions = read_revisions(connection, target, asset, days, fingerprint(EtlSettings()))
    return mark_materialized(connection, target, asset, days, revisions, run_id="run", scope="whole")


class Chain:
    """一个数据库上的资产链。"""

    def __init__(self, engine: sa.Engine, settings: EtlSettings, *, allow_deletes: bool = False) -> None:
        self.engine = engine
        self.settings = settings
        self.allow_deletes = allow_deletes
        self.reports: list[AssetReport] = []

    def empty_database(self) -> None:
        """像刚 init-db 那样：只留下安装的身份。小表上 DELETE 比 TRUNCATE 快十倍。"""
        results = target_tables(self.settings.target_schema).of_asset.values()
        everything = (extras, *application.tables.values(), *results, *etl.tables.values())
        tables = [table for table in everything if table is not installation]
        numbered = [(table, column) for table in tables for column in table.columns if column.identity is not None]
        sequences = [sa.func.pg_get_serial_sequence(table.fullname, column.name) for table, column in numbered]
        with self.engine.begin() as connection:
            connection.exec_driver_sql("; ".join(str(sa.delete(table)) for table in tables))
            connection.execute(
                sa.select(*[sa.func.setval(sequence, 1, sa.false()) for sequence in sequences])
            )  # 下一个就是 1
            write_graph(connection, self.settings.target_schema, graph)

    @property
    def graph(self) -> AssetGraph:
        """此刻写在库里的图。"""
        with translated_errors(), self.engine.connect() as connection:
            return read_graph(connection, self.settings.target_schema)

    def use_graph(self, wider: AssetGraph) -> None:
        """像载入了这样的代码。"""
        with self.engine.begin() as connection:
            write_graph(connection, self.settings.target_schema, wider)

    def run(
        self,
        first: date,
        last: date | None = None,
        *,
        assets: Collection[str] | None = None,
        allow_deletes: bool = False,
        is_of_event: bool = False,
    ) -> list[AssetReport]:
        """像一个运行那样，上游在前地物化这些天；缺省是全部资产，图里没有的不管。"""
        wider = self.graph
        made = wider.ordered(wider.names if assets is None else assets)
        run = RunContext(
            run_id=str(uuid4()),
            assets=frozenset(made),
            allow_deletes=allow_deletes or self.allow_deletes,
            is_of_event=is_of_event,
        )
        days = DayRange(first, last or first)
        reports = [
            MATERIALIZE.get(asset, materialize_extra(asset))(
                self.engine, self.settings, days, replace(run, upstreams=wider.upstreams(asset))
            )
            for asset in made
        ]
        self.reports += reports
        return reports

    def announce(self, *import_ids: UUID) -> list[date]:
        """这些导入的事件到了，一批处理；返回因此到期的日子。"""
        request_imports(self.engine, self.settings, [ImportEvent(import_id, uuid4()) for import_id in import_ids])
        return self.due_days()

    def tell(self, *events: LeadChanged) -> list[Asked]:
        """人改了商机的事件到了，一批处理。"""
        with self.engine.begin() as connection:
            return list(deal_again(connection, self.settings, events))

    def run_due(self) -> None:
        """像工人那样，物化到没有一天到期为止：连续而要做的资产相同的日子一个运行，没有到期的上游不碰。"""
        while runs := self.due_runs():
            first = last = min(runs)
            while runs.get(last + ONE_DAY) == runs[first]:
                last += ONE_DAY
            self.run(first, last, assets=runs[first], is_of_event=True)

    def run_from(
        self, asset: str, first: date, last: date | None = None, *, is_of_event: bool = False
    ) -> list[AssetReport]:
        """这个资产与它后面的。"""
        return self.run(first, last, assets={asset} | self.graph.descendants(asset), is_of_event=is_of_event)

    def due_runs(self) -> dict[date, frozenset[str]]:
        """到期的日子 → 一个运行要做的：前面没有到期的那些，与它们后面的。"""
        wider = self.graph
        due: dict[date, set[str]] = {}
        for day, asset in self.rows(
            sa.select(ledger.c.day, ledger.c.asset).where(ledger.c.requested > ledger.c.materialized)
        ):
            if asset in wider.names:
                due.setdefault(day, set()).add(asset)
        return {
            day: frozenset().union(
                *({name} | wider.descendants(name) for name in names if not wider.ancestors(name) & names)
            )
            for day, names in due.items()
        }

    def due_days(self, asset: str | None = None) -> list[date]:
        """到期的日子；不给资产就是有任何资产到期的。"""
        due = ledger.c.requested > ledger.c.materialized
        own = sa.true() if asset is None else ledger.c.asset == asset
        with self.engine.connect() as connection:
            return list(connection.scalars(sa.select(ledger.c.day.distinct()).where(due, own).order_by(ledger.c.day)))

    def expected(self) -> Result:
        """参照实现的结果；既有的编号与人的列要在运行之前读。"""
        with self.engine.connect() as connection:
            return expected(connection, self.reference_settings)

    def assert_converged(self, wanted: Result | None = None) -> None:
        """三张表与拒收记录都与参照实现一样，台账里没有谁被落下。"""
        with self.engine.connect() as connection:
            assert not catch_up(connection, self.settings.target_schema)
            found = differences(wanted or expected(connection, self.reference_settings), actual(connection))
            wider = self.graph
            made = (
                {(row.asset, row.day): row.content for row in connection.execute(sa.select(extras))}
                if wider != graph
                else {}
            )
            # 订单从没做过的日子，不在人重跑的那个后面的也不必做
            of_orders = sa.and_(ledger.c.asset == "orders", ledger.c.run_id.is_not(None))
            days = list(connection.scalars(sa.select(ledger.c.day).where(of_orders)))
            wanted_extras = expected_extras(connection, wider, days)
        assert not found, "\n".join(found)
        behind = sorted(
            f"{asset} of {day}" for (asset, day), content in wanted_extras.items() if made.get((asset, day)) != content
        )
        assert not behind, f"expected otherwise: {behind}"

    def execute(self, statement: sa.Executable) -> None:
        """像外围应用或人那样改一下数据。"""
        with self.engine.begin() as connection:
            connection.execute(statement)

    def rows(self, statement: sa.Select[Any]) -> list[tuple[Any, ...]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(statement)]

    @property
    def reference_settings(self) -> ReferenceSettings:
        """参照实现用同样的设置；`today` 是产品此刻的最后一个分区。"""
        return ReferenceSettings.like(self.settings)


@contextmanager
def cloned_chain(server_url: str, template: str) -> Iterator[Chain]:
    """自己的数据库上的资产链。"""
    with cloned_database(server_url, template) as url:
        settings = EtlSettings(database_url=url)
        engine = build_engine(settings)
        extras.create(engine)
        yield Chain(engine, settings)
        engine.dispose()
