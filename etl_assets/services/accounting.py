"""行的账：一天的原始行各去了哪里（装入、被取代、被拒收），数目对不对得上。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import Any

import polars as pl
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.business_day import FIRST_DAY, LAST_DAY, DayRange, bound, local_day, may_fall_on_days
from etl_assets.core.errors import DO_NOT_ADD_UP, EtlError
from etl_assets.core.etl_tables import order_index, rejected_rows
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs, target_tables, trimmed
from etl_assets.services.order_index import same_order
from etl_assets.services.raw_rows import IN_SCOPE
from etl_assets.services.rollout import Share
from etl_assets.services.vectorized_queries import read_frame, sized

EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class DayAccount:
    """一天的账；行记在它自己的业务日上。

    :param outside: 有效、而订单归份额（ETL_ROLLOUT）之外的客户的行数。
    :param rejected: 规则 → 行数。
    :param rejected_examples: 规则 → 最小的几个 raw_id。
    :param lost_examples: 几个不知去向的 raw_id。
    """

    day: date
    raw: int
    loaded: int
    superseded: int
    outside: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    rejected_examples: Mapping[str, Sequence[int]] = field(default_factory=dict)
    lost_examples: Sequence[int] = ()

    @property
    def rejected_count(self) -> int:
        return sum(self.rejected.values())

    @property
    def difference(self) -> int:
        """应当是 0；正的是不知去向的行数，负的是多出来的行数。"""
        return self.raw - self.loaded - self.superseded - self.rejected_count - self.outside

    def __str__(self) -> str:
        split = f"{self.loaded} loaded + {self.superseded} superseded + {self.rejected_count} rejected"
        split += f" + {self.outside} outside the share" if self.outside else ""
        return f"{self.raw} raw rows in scope on {self.day}, {split}"


class AccountingError(EtlError):
    """写完之后账不平，数据事务必须回滚。

    说不准的一类：别的程序恰好同时改了 orders 或拒收记录，再做一次就平了；真丢了行的，试过几次由台账搁置。
    """

    def __init__(self, accounts: Sequence[DayAccount]) -> None:
        self.accounts = list(accounts)
        first = self.accounts[0]
        lost = f" (look at raw_id {', '.join(map(str, first.lost_examples))})" if first.lost_examples else ""
        super().__init__(
            f"{DO_NOT_ADD_UP}, so nothing was written: {first}{lost}; "
            "find the trigger, rule or program that changes orders or etl.rejected_rows"
        )


def count_raw_rows(snapshot: sa.Connection, settings: EtlSettings, days: DayRange) -> pl.DataFrame:
    """范围之内的原始行数，一行一天的一次导入：day（自己的业务日）、import_id、rows。

    与数据读在同一个快照里，所以此刻才完成、才撤回的导入两边都不算。
    """
    counted = read_frame(snapshot, _count_raw_rows(settings.timezone), bound(days))
    # 条件两边各放宽了一天，好走索引；多读的那两天在这里去掉
    return counted.filter(pl.col("day").is_between(days.first, days.last))


def verify_days(
    connection: sa.Connection,
    settings: EtlSettings,
    days: DayRange,
    *,
    share: Share,
    raw: pl.DataFrame,
    superseded: pl.DataFrame,
    aside: sa.Table | None,
    outside: pl.DataFrame,
) -> list[DayAccount]:
    """数据事务里、写完之后：每天一本账，按日子排好。

    三张表各数各的：原始行数在读的快照里（`raw`），orders 与拒收记录此刻有业务日的锁护着，所以并发的导入与别的运行改不了这些数。

    :param raw: `count_raw_rows` 的结果。
    :param superseded: 输掉的版本，一行一个：raw_id、order_date；它的订单确实以别的版本在 orders 里才算数。
    :param aside: 同样那些行的暂存表，也有 shop_id、order_id；一行也没有时是 None。
    :param outside: 订单归份额之外的有效版本，一行一个：raw_id、order_date；不是我们写的，没有表可核对。
    :raises AccountingError: 有一天不平。
    """
    # 数的是表里此刻的行，不是我们以为写下的：触发器吞掉的、别的程序改掉的，才看得见
    counts = connection.execute(_count_written(settings.target_schema, share), bound(days)).all()
    losers = _count_superseded(connection, settings, days, aside, rows=superseded.height)
    elsewhere = dict(outside["order_date"].value_counts().iter_rows())
    arrived = dict(raw.group_by("day").agg(pl.col("rows").sum()).iter_rows())
    accounts = [
        DayAccount(
            day=day,
            raw=arrived.get(day, 0),
            loaded=sum(row.rows for row in counts if row.day == day and row.rule is None),
            superseded=losers.get(day, 0),
            outside=elsewhere.get(day, 0),
            rejected={row.rule: row.rows for row in counts if row.day == day and row.rule is not None},
            rejected_examples={row.rule: row.examples for row in counts if row.day == day and row.rule is not None},
        )
        for day in days
    ]
    if unbalanced := [account for account in accounts if account.difference]:
        lost = _find_lost(connection, settings, unbalanced[0].day, superseded, outside)
        raise AccountingError([replace(unbalanced[0], lost_examples=lost), *unbalanced[1:]])
    return accounts


def _count_superseded(
    connection: sa.Connection, settings: EtlSettings, days: DayRange, aside: sa.Table | None, *, rows: int
) -> Mapping[date, int]:
    if aside is None:
        return {}
    orders = target_tables(settings.target_schema).orders
    losers = sized(aside)
    by_day = (
        sa.select(losers.c.order_date, sa.func.count().label("rows"))
        # 输了而订单不在表里的不算数：赢家若被触发器吞了，两行都不知去向，账才不平
        .join(orders, sa.and_(same_order(orders, losers), orders.c.raw_id != losers.c.raw_id))
        .where(days.includes(losers.c.order_date))
        .group_by(losers.c.order_date)
    )
    return {row.order_date: row.rows for row in connection.execute(by_day, {"rows": rows})}


def _find_lost(
    connection: sa.Connection, settings: EtlSettings, day: date, superseded: pl.DataFrame, outside: pl.DataFrame
) -> Sequence[int]:
    """只为错误消息：这一天几个既没装入、也没拒收、没被取代、也不归别人的原始行。"""
    orders, schema = target_tables(settings.target_schema).orders, settings.target_schema
    loaded = sa.select(orders.c.raw_id).where(orders.c.order_date == day, orders.c.raw_id == raw_orders.c.raw_id)
    is_rejected = sa.and_(rejected_rows.c.target == schema, rejected_rows.c.raw_id == raw_orders.c.raw_id)
    rejected = sa.select(rejected_rows.c.raw_id).where(is_rejected)
    winner = (
        sa.select(orders.c.raw_id)
        .join(shop_configs, shop_configs.c.shop_id == orders.c.shop_id)
        .where(
            shop_configs.c.shop_name == trimmed(raw_orders.c.shop), orders.c.order_id == trimmed(raw_orders.c.order_id)
        )
    )
    losers = superseded.filter(pl.col("order_date") == day)["raw_id"].to_list()
    lost = sa.or_(raw_orders.c.raw_id != sa.all_(sa.cast(losers, sa.ARRAY(sa.BigInteger))), ~winner.exists())
    of_others = sa.cast(outside.filter(pl.col("order_date") == day)["raw_id"].to_list(), sa.ARRAY(sa.BigInteger))
    statement = (
        sa.select(raw_orders.c.raw_id)
        .join(import_tasks, import_tasks.c.import_id == raw_orders.c.import_id)
        .where(
            IN_SCOPE,
            may_fall_on_days(raw_orders.c.ordered_at),
            local_day(raw_orders.c.ordered_at, settings.timezone) == day,
        )
        .where(~loaded.exists(), ~rejected.exists(), lost, raw_orders.c.raw_id != sa.all_(of_others))
        .order_by(raw_orders.c.raw_id)
        .limit(EXAMPLES)
    )
    return connection.scalars(statement, bound(DayRange(day, day))).all()


# ---- 每个运行都要的语句：建一次就留着，拼它们比执行它们还久 --------------------------


@lru_cache(maxsize=8)
def _count_raw_rows(timezone: str) -> sa.Select[Any]:
    day = local_day(raw_orders.c.ordered_at, timezone).label("day")
    return (
        sa.select(day, raw_orders.c.import_id, sa.func.count().label("rows"))
        .join(import_tasks, import_tasks.c.import_id == raw_orders.c.import_id)
        .where(IN_SCOPE, may_fall_on_days(raw_orders.c.ordered_at))
        .group_by(sa.text("1, 2"))
    )


@lru_cache(maxsize=8)
def _count_written(schema: str, share: Share) -> sa.CompoundSelect[Any]:
    """orders 一天一行，只数份额之内的；拒收的一天一条规则一行。"""
    orders, rejected = target_tables(schema).orders.c, rejected_rows.c
    no_rule, no_examples = sa.cast(sa.null(), sa.Text), sa.cast(sa.null(), sa.ARRAY(sa.BigInteger))
    smallest = sa.func.array_agg(pg.aggregate_order_by(rejected.raw_id, rejected.raw_id))[1:EXAMPLES]
    rows = sa.func.count().label("rows")
    loaded = sa.select(orders.order_date.label("day"), no_rule.label("rule"), rows, no_examples.label("examples"))
    if not share.is_whole:
        ours = sa.and_(order_index.c.target == schema, share.covers_key(order_index.c.customer_key))
        loaded = loaded.join(order_index, same_order(target_tables(schema).orders)).where(ours)
    return sa.union_all(
        loaded.where(orders.order_date.between(FIRST_DAY, LAST_DAY)).group_by(orders.order_date),
        sa.select(rejected.day, rejected.rule, rows, smallest)
        .where(rejected.target == schema, rejected.day.between(FIRST_DAY, LAST_DAY))
        .group_by(rejected.day, rejected.rule),
    )
