"""代表业务日、客户、导入与领取的锁行；COLD 清扫的锁见末尾。

总是按序加锁，所以两个运行之间不会死锁；只有补一个第一次用到的键时才可能，那由 retry_conflicts 重来。
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from typing import Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.database_sync import execute_compiled
from etl_assets.core.tables import locks

LockKind = Literal["day", "customer", "import", "claim"]

# 客户与导入按散列的低位分到固定数目的锁行（2 的幂）：锁的行数有界，新的也有行可锁
STRIPES = 1024


def acquire_locks(connection: sa.Connection, target: str, kind: LockKind, keys: Iterable[int]) -> None:
    """锁住这些行直到事务结束；READ COMMITTED 下，此后的语句能看到前一个持有者提交的一切。"""
    wanted = sorted(set(keys))
    if not wanted:
        return
    parameters = {"of_target": target, "of_kind": kind, "keys": wanted}
    if len(connection.execute(_LOCK, parameters).all()) < len(wanted):  # 第一次用到的键才有得补
        execute_compiled(connection, _ADD, parameters)
        connection.execute(_LOCK, parameters).all()


_KEYS = sa.bindparam("keys", type_=sa.ARRAY(sa.Integer))
_OF_TARGET, _OF_KIND = (sa.bindparam(name, type_=sa.Text) for name in ("of_target", "of_kind"))
_LOCK = (
    sa.select(locks.c.key)
    .where(locks.c.target == _OF_TARGET, locks.c.kind == _OF_KIND, locks.c.key == sa.any_(_KEYS))
    .order_by(locks.c.key)
    .with_for_update()
)
_NEW_KEY = sa.func.unnest(_KEYS).column_valued("key")
_ADD = (
    pg.insert(locks)
    .from_select(["target", "kind", "key"], sa.select(_OF_TARGET, _OF_KIND, _NEW_KEY).order_by(_NEW_KEY))
    .on_conflict_do_nothing()
)


def lock_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """锁住业务日；键是公历序数。"""
    acquire_locks(connection, target, "day", (day.toordinal() for day in days))


def lock_customers(connection: sa.Connection, target: str, customers: sa.Table) -> None:
    """锁住 `customers.customer_key` 所在的散列行；customers 与 leads 两个 ETL 用同一组锁。

    散列由服务器计算：各台机器上的 Polars 版本可能不同，服务器只有一个。
    """
    acquire_locks(connection, target, "customer", connection.scalars(_stripes(customers)).all())


@lru_cache(maxsize=16)
def _stripes(customers: sa.Table) -> sa.Select[tuple[int]]:
    hashed = sa.func.hashtextextended(customers.c.customer_key, 0, type_=sa.BigInteger())
    return sa.select(sa.cast(hashed.op("&")(STRIPES - 1), sa.Integer).distinct())


def lock_imports(connection: sa.Connection, target: str, import_ids: Iterable[UUID]) -> None:
    """锁住导入：同一个导入的两个事件依次处理，晚到的看得见先到的做了什么。"""
    acquire_locks(connection, target, "import", (import_id.int % STRIPES for import_id in import_ids))


def lock_cold_stages(connection: sa.Connection, target: str, *, exclusive: bool) -> None:
    """写 OPEN 与 COLD 的共用一把锁，直到事务结束；换一个最新业务日、全部重判的独占它。

    用咨询锁：它排队，独占的不会被源源不断的共用者饿死，而行锁会。
    """
    connection.execute(_LOCK_COLD_STAGES[exclusive], {"name": f"etl cold stages {target}"})


_COLD_STAGES = sa.func.hashtextextended(sa.bindparam("name", type_=sa.Text), 0, type_=sa.BigInteger())
_LOCK_COLD_STAGES = {
    True: sa.select(sa.func.pg_advisory_xact_lock(_COLD_STAGES)),
    False: sa.select(sa.func.pg_advisory_xact_lock_shared(_COLD_STAGES)),
}
