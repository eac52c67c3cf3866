"""基准里的同类做法：每个阶段以后，各自的表都与产品的一样——比的是同一件事——而且没有变化的行不重写。"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import pytest
import sqlalchemy as sa

from benchmarks.etl import dlt_merge, product, read_write_database, row_by_row
from benchmarks.etl.dataset import Dataset, fill_database, set_changed
from etl_assets.comparison.comparing import ComparisonRequest, compare_schemas
from etl_assets.core.settings import EtlSettings

RAW_ROWS = 1_000

Load = Callable[[sa.Engine, EtlSettings], None]


class Race:
    """一个填好的数据库：产品与一方各做同样的阶段。"""

    def __init__(self, engine: sa.Engine, settings: EtlSettings, dataset: Dataset) -> None:
        self.engine = engine
        self.settings = settings
        self.dataset = dataset

    def run(self, load: Load) -> None:
        for step in (product.load_orders, product.load_customers, product.load_leads, load):
            step(self.engine, self.settings)

    def assert_equal(self, schema: str, tables: Sequence[str]) -> None:
        comparison = compare_schemas(
            self.engine, self.settings, ComparisonRequest(left="public", right=schema, tables=tables)
        )
        assert comparison.equal, comparison.tables
        assert comparison.tables[0].rows_left == self.dataset.orders

    def assert_peer_equals_product(
        self, load: Load, schema: str, tables: Sequence[str], *, compared: str | None = None
    ) -> None:
        """首次装入、原样重跑、改了一成。"""
        self.run(load)
        self.assert_equal(compared or schema, tables)
        written = self.row_versions(schema, tables)
        self.run(load)
        assert self.row_versions(schema, tables) == written
        set_changed(self.engine, in_scope=True)
        self.run(load)
        self.assert_equal(compared or schema, tables)
        assert self.row_versions(schema, tables) != written

    def row_versions(self, schema: str, tables: Sequence[str]) -> dict[str, list[str]]:
        """每张表各行的物理位置与写下它的事务：重写过就不同。"""
        names = {"orders": "orders", "customers": "customers", "leads": "business_leads"}
        version = sa.literal_column("ctid::text || ' ' || xmin", sa.Text)
        with self.engine.connect() as connection:
            return {
                table: sorted(connection.scalars(sa.select(version).select_from(sa.table(names[table], schema=schema))))
                for table in tables
            }


@pytest.fixture
def race(engine: sa.Engine, etl_settings: EtlSettings) -> Race:
    return Race(engine, etl_settings, fill_database(engine, RAW_ROWS))


@pytest.mark.parametrize("load", [read_write_database.load_orders, read_write_database.load_orders_by_copy])
@pytest.mark.skipif(
    importlib.util.find_spec("pandas") is None, reason="pandas is not installed: python3 run.py bench --help does it"
)
def test_read_and_write_database_end_in_the_same_orders(race: Race, load: Load) -> None:
    read_write_database.prepare(race.engine)
    race.assert_peer_equals_product(load, read_write_database.SCHEMA, ["orders"])


# 只看装没装，不导入：dlt 一导入就读环境变量，而关掉遥测的变量由被测的函数设
@pytest.mark.skipif(
    importlib.util.find_spec("dlt") is None, reason="dlt is not installed: python3 run.py bench --help does it"
)
def test_dlt_merge_ends_in_the_same_orders(race: Race) -> None:
    dlt_merge.prepare(race.engine)
    race.run(dlt_merge.load_orders)
    with race.engine.begin() as connection:  # dlt 没有 uuid，列序与名字以外的列也由它定
        connection.exec_driver_sql("CREATE SCHEMA dlt_as_agreed")
        connection.exec_driver_sql(
            "CREATE VIEW dlt_as_agreed.orders AS SELECT shop_id::uuid, order_id, customer_nickname, latest_status, raw_order_type,"
            " system_order_type, amount, quantity, ordered_at, order_date, import_id::uuid, raw_id FROM dlt_merge.orders"
        )
    race.assert_peer_equals_product(dlt_merge.load_orders, dlt_merge.SCHEMA, ["orders"], compared="dlt_as_agreed")


def test_row_by_row_ends_in_the_same_three_tables(race: Race) -> None:
    row_by_row.prepare(race.engine)
    race.assert_peer_equals_product(row_by_row.load_all, row_by_row.SCHEMA, ["orders", "customers", "leads"])
