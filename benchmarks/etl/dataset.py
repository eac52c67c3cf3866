"""基准的原始数据：一个月、两次导入，外加改了一成订单的第三次；同样的行数总是同样的数据。"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from uuid import UUID

import polars as pl
import sqlalchemy as sa

from etl_assets.core.business_day import DayRange
from etl_assets.core.tables import import_tasks, order_type_mappings, raw_orders, shop_configs
from etl_assets.services.vectorized_queries import copy_into

DAYS = DayRange(date(2026, 1, 1), date(2026, 1, 30))
SHOPS = {UUID(int=number): f"基准店{number}" for number in (1, 2, 3)}
FIRST, REVISED, CHANGED = UUID(int=101), UUID(int=102), UUID(int=103)

_REVISED_SHARE = 10
"""每这么多行里，有一行是同一订单较新的版本。"""
_ORDERS_PER_CUSTOMER = 4
_SEED = 20260101


@dataclass(frozen=True)
class Dataset:
    """raw_orders 里的数据；第三次导入放进去时还是 pending。"""

    raw_rows: int
    orders: int


def fill_database(engine: sa.Engine, raw_rows: int) -> Dataset:
    """放进 `raw_rows` 行原始数据（九成是首次导入的订单，一成是较新的版本），再放一成待生效的改动。"""
    orders = raw_rows - raw_rows // _REVISED_SHARE
    first = _orders(orders)
    revised = _versions(first, raw_rows - orders, seed=1)
    changed = _versions(first, orders // 10, seed=2).with_columns(pl.col("amount") + 1)
    with engine.begin() as connection:
        connection.execute(
            sa.insert(shop_configs), [{"shop_id": key, "shop_name": name} for key, name in SHOPS.items()]
        )
        connection.execute(
            sa.insert(order_type_mappings),
            [
                {"raw_order_type": raw_type, "system_order_type": system_type}
                for raw_type, system_type in {"打样订单": "SAMPLE", "产前样订单": "PROOF", "大货订单": "BULK"}.items()
            ],
        )
        for number, (import_id, rows) in enumerate({FIRST: first, REVISED: revised, CHANGED: changed}.items()):
            connection.execute(
                sa.insert(import_tasks).values(
                    import_id=import_id,
                    source_name="benchmark",
                    status="pending" if import_id == CHANGED else "completed",
                    row_count=rows.height,
                    completed_at=datetime(2026, 2, 1, number, tzinfo=UTC),
                )
            )
            copy_into(connection, rows.select(pl.lit(str(import_id)).alias("import_id"), *rows.columns), raw_orders)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")
    return Dataset(raw_rows=raw_rows, orders=orders)


def set_changed(engine: sa.Engine, *, in_scope: bool) -> None:
    """让第三次导入生效，或收回。"""
    status = "completed" if in_scope else "pending"
    with engine.begin() as connection:
        connection.execute(sa.update(import_tasks).where(import_tasks.c.import_id == CHANGED).values(status=status))


def _orders(count: int) -> pl.DataFrame:
    """一行一个订单，像平台导出的那样按时间排列，订单号随时间增长。"""
    number = pl.int_range(count)

    def pick(values: Sequence[str], of: pl.Expr, seed: int) -> pl.Expr:
        return (of.hash(_SEED + seed) % len(values)).replace_strict(dict(enumerate(values)), return_dtype=pl.String)

    customer = number.hash(_SEED) % max(1, count // _ORDERS_PER_CUSTOMER)
    start_us = int(datetime(2025, 12, 31, 16, tzinfo=UTC).timestamp()) * 1_000_000
    span_us = len(DAYS) * 24 * 3600 * 1_000_000
    moment_us = start_us + number * span_us // count
    return pl.select(
        pl.format("XS{}", number + 10_000_000_000).alias("order_id"),
        pick(tuple(SHOPS.values()), customer, 2).alias("shop"),
        pl.format("客户{}", customer).alias("customer_name"),
        pick(("打样订单", "产前样订单", "大货订单", "其他"), number, 3).alias("order_type"),
        pick(("new", "completed", "completed", "交易成功", "cancelled"), number, 4).alias("order_status"),
        ((number.hash(_SEED + 5) % 1_000_000).cast(pl.Int64) / 100).cast(pl.Decimal(14, 2)).alias("amount"),
        (number.hash(_SEED + 6) % 200).cast(pl.Int32).alias("quantity"),
        moment_us.cast(pl.Datetime("us", "UTC")).alias("ordered_at"),
    )


def _versions(orders: pl.DataFrame, count: int, *, seed: int) -> pl.DataFrame:
    """随机若干订单各一个较新的版本：状态变了，时刻晚一小时以内（可能换到下一天）。"""
    chosen = orders.sample(count, seed=_SEED + seed, shuffle=True)
    last_moment = pl.lit(datetime(2026, 1, 30, 15, tzinfo=UTC), pl.Datetime("us", "UTC"))
    return chosen.with_columns(
        order_status=pl.lit("delivered" if seed == 1 else "refunded"),
        ordered_at=pl.min_horizontal(pl.col("ordered_at") + pl.duration(minutes=30), last_moment),
    )
