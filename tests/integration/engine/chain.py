"""不经 Dagster 跑资产链，并与参照实现比较：引擎的集成测试共用。"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import date, timedelta
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import application, etl, installation, ledger
from etl_assets.customers.etl import materialize_customers
from etl_assets.leads.etl import materialize_leads
from etl_assets.orders.etl import materialize_orders
from etl_assets.services.intake import ImportEvent, request_imports
from etl_assets.services.ledger import ASSETS
from etl_assets.services.materialization import AssetReport, RunContext
from tests.reference.oracle import ReferenceSettings, Result, actual, differences, expected

MATERIALIZE: dict[str, Callable[..., AssetReport]] = {
    "orders": materialize_orders,
    "customers": materialize_customers,
    "leads": materialize_leads,
}


ONE_DAY = timedelta(days=1)


class Chain:
    """一个数据库上的资产链。"""

    def __init__(self, engine: sa.Engine, settings: EtlSettings) -> None:
        self.engine = engine
        self.settings = settings

    def empty_database(self) -> None:
        """像刚 init-db 那样：只留下安装的身份。小表上 DELETE 比 TRUNCATE 快十倍。"""
        tables = [table for table in (*application.tables.values(), *etl.tables.values()) if table is not installation]
        numbered = [(table, column) for table in tables for column in table.columns if column.identity is not None]
        sequences = [sa.func.pg_get_serial_sequence(table.fullname, column.name) for table, column in numbered]
        with self.engine.begin() as connection:
            connection.exec_driver_sql("; ".join(str(sa.delete(table)) for table in tables))
            connection.execute(sa.select(*[sa.func.setval(sequence, 1, sa.false()) for sequence in sequences]))  # 下一个就是 1

    def run(
        self, first: date, last: date | None = None, *, assets: Collection[str] = ASSETS, allow_deletes: bool = False
    ) -> list[AssetReport]:
        """像一个运行那样，按链的次序物化这些天。"""
        run = RunContext(run_id=str(uuid4()), assets=frozenset(assets), allow_deletes=allow_deletes)
        days = DayRange(first, last or first)
        return [MATERIALIZE[asset](self.engine, self.settings, days, run) for asset in ASSETS if asset in assets]

    def announce(self, *import_ids: UUID) -> list[date]:
        """这些导入的事件到了，一批处理；返回因此到期的日子。"""
        request_imports(self.engine, self.settings, [ImportEvent(import_id, uuid4()) for import_id in import_ids])
        return self.due_days()

    def run_due(self) -> None:
        """像工人那样，物化到没有一天到期为止：连续而起点相同的日子一个运行，没有到期的上游不碰。"""
        while starts := self.first_due_assets():
            first = last = min(starts)
            while starts.get(last + ONE_DAY) == starts[first]:
                last += ONE_DAY
            self.run_from(starts[first], first, last)

    def run_from(self, asset: str, first: date, last: date | None = None) -> None:
        """从这个资产做到链尾。"""
        self.run(first, last, assets=ASSETS[ASSETS.index(asset) :])

    def first_due_assets(self) -> dict[date, str]:
        """到期的日子 → 链上第一个到期的资产。"""
        due = sa.select(ledger.c.day, ledger.c.asset).where(ledger.c.requested > ledger.c.materialized)
        starts: dict[date, str] = {}
        for day, asset in sorted(self.rows(due), key=lambda row: ASSETS.index(row[1])):
            starts.setdefault(day, asset)
        return starts

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
        """三张表与拒收记录都与参照实现一样。"""
        with self.engine.connect() as connection:
            found = differences(wanted or expected(connection, self.reference_settings), actual(connection))
        assert not found, "\n".join(found)

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
