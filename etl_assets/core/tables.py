"""外围应用已有的、我们只读的表（`application`），与几处共用的 SQL 表达式；结果表由各资产定义，ETL 自己的在 etl_tables。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.asset_folders import descriptions
from etl_assets.core.text import WHITE_SPACE

# 写明 schema：角色若也叫 etl，search_path 里的 "$user" 会让没写 schema 的表落进 schema etl
APPLICATION_SCHEMA = "public"
application = sa.MetaData(schema=APPLICATION_SCHEMA)

DIALECT: sa.Dialect = pg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy 没给它注解
TIMESTAMP = sa.DateTime(timezone=True)
EARLY, LATE = (sa.literal(datetime(year, 1, 1, tzinfo=UTC), TIMESTAMP) for year in (2, 9998))
AMOUNT = sa.Numeric(14, 2)
TOTAL = sa.Numeric(20, 2)


def trimmed(column: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """SQL 里的修剪，与 Polars 的 strip_chars() 去掉同样的字符；索引与查询共用这一个表达式。"""
    return sa.func.btrim(
        column, sa.literal_column("E'" + "".join(f"\\u{ord(char):04X}" for char in WHITE_SPACE) + "'"), type_=sa.Text()
    )


def order_id_key(order_id: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """SQL：订单号修剪之后的前 501 个字，按它找版本。

    有效的订单号最多 500 个字，与它相等就是整个相等；而再长的坏值也放得进索引。
    """
    return sa.func.left(trimmed(order_id), sa.text("501"), type_=sa.Text())


def customer_hash(customer_key: sa.ColumnElement[str]) -> sa.ColumnElement[int]:
    """SQL：customer_key 的定长散列，按它找客户的订单、分客户的锁；由服务器计算，各台机器上的 Polars 版本可能不同。"""
    # 种子写成文字：索引与查询共用这个表达式，而 DDL 里带不了参数
    return sa.func.hashtextextended(customer_key, sa.text("0"), type_=sa.BigInteger())


def closed_by_person(leads: sa.Table) -> sa.ColumnElement[bool]:
    """人关闭的商机；只有 closed_by 而没有 closed_at 不算。"""
    return sa.and_(sa.func.coalesce(leads.c.closed_by, "") == "user", leads.c.closed_at.is_not(None))


def written_by_person(leads: sa.Table) -> sa.ColumnElement[bool]:
    """人关闭过，或写了 owner、notes 的商机。"""
    written = [sa.func.coalesce(trimmed(leads.c[name]), "") != "" for name in ("owner", "notes")]
    return sa.or_(closed_by_person(leads), *written)


def touched(leads: sa.Table) -> sa.ColumnElement[bool]:
    """人碰过的商机：关闭过，写了 owner、notes，或没有编号（ETL 写的都有）。"""
    return sa.or_(written_by_person(leads), leads.c.lead_no.is_(None))


def left_behind(leads: sa.Table) -> sa.ColumnElement[bool]:
    """不是 ETL 留下的样子的商机：人收回了关闭、删了字、改了阶段。未必有哪一天的订单会带到它，所以按这个条件找。"""
    stage = sa.func.coalesce(leads.c.current_stage, "")
    is_unclosed = sa.and_(leads.c.closed_at.is_(None), stage != "OPEN", stage != "COLD")
    stays_open = sa.and_(
        written_by_person(leads), stage == "OPEN", leads.c.closed_at.is_(None), leads.c.closed_by.is_(None)
    )
    is_released = sa.and_(leads.c.last_order_at.is_(None), ~sa.or_(closed_by_person(leads), stays_open))
    return sa.and_(leads.c.lead_no.is_not(None), sa.or_(is_unclosed, is_released))


# ---- 只读：平台导出与配置 -------------------------------------------------------

import_tasks = sa.Table(
    "import_tasks",
    application,
    sa.Column("import_id", sa.Uuid, primary_key=True),
    sa.Column("source_name", sa.Text),
    sa.Column("status", sa.Text),
    sa.Column("row_count", sa.Integer),
    sa.Column("created_at", TIMESTAMP, server_default=sa.func.now()),
    sa.Column("completed_at", TIMESTAMP),
)
sa.Index("ix_import_tasks_completed_at", import_tasks.c.completed_at)

raw_orders = sa.Table(
    "raw_orders",
    application,
    sa.Column("raw_id", sa.BigInteger, sa.Identity(), primary_key=True),
    sa.Column("import_id", sa.Uuid),
    sa.Column("order_id", sa.Text),
    sa.Column("shop", sa.Text),
    sa.Column("customer_name", sa.Text),
    sa.Column("order_type", sa.Text),
    sa.Column("order_status", sa.Text),
    sa.Column("amount", AMOUNT),
    sa.Column("quantity", sa.Integer),
    sa.Column("ordered_at", TIMESTAMP),
    sa.Column("extra", pg.JSONB(none_as_null=True)),
)
sa.Index("ix_raw_orders_import_id", raw_orders.c.import_id)
sa.Index("ix_raw_orders_ordered_at", raw_orders.c.ordered_at)
sa.Index("ix_raw_orders_order", order_id_key(raw_orders.c.order_id))

shop_configs = sa.Table(
    "shop_configs",
    application,
    sa.Column("shop_id", sa.Uuid, primary_key=True),
    sa.Column("shop_name", sa.Text, unique=True),
    sa.Column("platform", sa.Text),
)

SYSTEM_ORDER_TYPES = ("SAMPLE", "PROOF", "BULK")

order_type_mappings = sa.Table(
    "order_type_mappings",
    application,
    sa.Column("raw_order_type", sa.Text, primary_key=True),
    sa.Column("system_order_type", sa.Text),
)


# ---- 写入：结果表，各在自己资产的文件夹里定义 ------------------------------------


def figure_columns() -> list[sa.Column[Any]]:
    """按系统订单类型的笔数与金额；客户与商机两张表同形。"""
    counts = [sa.Column(f"{kind}_count", sa.Integer) for kind in ("sample", "proof", "bulk")]
    amounts = [sa.Column(f"{kind}_amount", TOTAL) for kind in ("sample", "proof", "bulk")]
    return [*counts, *amounts]


SOURCES_OF_FIGURES = dict.fromkeys(
    (column.name for column in figure_columns()), ("orders.system_order_type", "orders.amount", "orders.latest_status")
)


_TIMESTAMPS = ("created_at", "updated_at")


def timestamp_columns() -> list[sa.Column[Any]]:
    return [sa.Column(name, TIMESTAMP, server_default=sa.func.now()) for name in _TIMESTAMPS]


def own_columns(table: sa.Table) -> list[sa.Column[Any]]:
    """一张表里除了 `timestamp_columns` 的列：一行是什么样，由它们说。"""
    return [column for column in table.c if column.name not in _TIMESTAMPS]


# eq=False：按身份散列，缓存着的语句拿它当键，而里面的 Mapping 散列不了
@dataclass(frozen=True, eq=False)
class TargetTables:
    """一个目标 schema 里的结果表，资产的名字就是属性：`tables.orders`；schema 名也是台账的 target。"""

    schema: str
    metadata: sa.MetaData
    of_asset: Mapping[str, sa.Table]

    def __getattr__(self, asset: str) -> sa.Table:
        try:
            return self.of_asset[asset]
        except KeyError:
            raise AttributeError(f"no asset {asset!r}: there are {', '.join(self.of_asset)}") from None


@lru_cache(maxsize=8)
def target_tables(schema: str) -> TargetTables:
    """目标 schema 里各资产的结果表。"""
    metadata = sa.MetaData()
    return TargetTables(
        schema, metadata, {asset: each.define_table(metadata, schema) for asset, each in descriptions().items()}
    )


def application_tables() -> list[sa.Table]:
    """应用的表：只读的，与它已有的结果表。"""
    targets = target_tables(APPLICATION_SCHEMA).of_asset
    written = [targets[asset] for asset, each in descriptions().items() if each.application_table]
    return [*application.tables.values(), *written]
