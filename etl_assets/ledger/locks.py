"""代表业务日、客户、导入与领取的锁行；COLD 清扫的锁见末尾。

总是按序加锁，所以两个运行之间不会死锁；只有补一天、一个导入第一次用到的键时才可能，那由 retry_conflicts 重来。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from etl_assets.core.arrays import array
from etl_assets.core.database_sync import execute_together
from etl_assets.core.etl_tables import TARGET, locks
from etl_assets.core.tables import customer_hash

LockKind = Literal["day", "import", "claim"]

# 客户与导入按散列的低位分到固定数目的锁行（2 的幂）：锁的行数有界，新的也有行可锁
STRIPES = 1024
CUSTOMER_STRIPES = 65_536
"""客户要细得多：一个运行有几百个客户，条少了，互不相干的运行也总会相遇。"""


def acquire_locks(connection: sa.Connection, target: str, kind: LockKind, keys: Iterable[int]) -> None:
    """锁住这些行直到事务结束；READ COMMITTED 下，此后的语句能看到前一个持有者提交的一切。"""
    wanted = sorted(set(keys))
    if not wanted:
        return
    parameters = lock_parameters(target, kind, wanted)
    if len(connection.execute(_LOCK, parameters).all()) < len(wanted):  # 第一次用到的键才有得补；散列的一次补齐
        connection.execute(_ADD, parameters | ({"keys": list(range(STRIPES))} if kind == "import" else {}))
        connection.execute(_LOCK, parameters).all()


def lock_statements() -> Sequence[sa.ClauseElement]:
    """`acquire_locks` 的语句，给要与别的一起发的：先补上没有的键。"""
    # 一条消息发出去就不能看着结果再决定，所以总是先补；acquire_locks 先锁，几乎总是省下这条 INSERT
    return _ADD, _LOCK


def lock_parameters(target: str, kind: LockKind, keys: Iterable[int]) -> dict[str, object]:
    return {"of_target": target, "of_kind": kind, "keys": sorted(set(keys))}


_KEYS = array("keys", sa.Integer)
_OF_KIND = sa.bindparam("of_kind", type_=sa.Text)
_LOCK = sa.text("""
    SELECT key FROM etl.locks WHERE target = :of_target AND kind = :of_kind AND key = ANY (:keys) ORDER BY key FOR UPDATE
""").bindparams(_KEYS)
_ADD = sa.text("""
    INSERT INTO etl.locks (target, kind, key) SELECT :of_target, :of_kind, key FROM unnest(:keys) AS key ORDER BY key
    ON CONFLICT DO NOTHING
""").bindparams(_KEYS)


def lock_days(connection: sa.Connection, target: str, days: Iterable[date]) -> None:
    """锁住业务日；键是公历序数。"""
    acquire_locks(connection, target, "day", (day.toordinal() for day in days))


def lock_customers(
    connection: sa.Connection,
    target: str,
    customers: sa.Table,
    *,
    then: Sequence[sa.ClauseElement],
    parameters: Mapping[str, object],
) -> list[Sequence[tuple[Any, ...]]]:
    """锁住 `customers.customer_key` 所在的散列行，再执行 `then`，返回它们的行；一次往返。customers 与 leads 两个 ETL 用同一组锁。"""
    # 次序要紧：then 在锁之后才取快照，读得到上一个持有者提交的订单与标记。
    # 先补后锁也是：手里的锁都在补过之后拿，等着别人的新行时就没有谁在等我们
    statements = (_add_stripes(customers), _lock_stripes(customers, _OLD), _lock_stripes(customers, _OWN), *then)
    _, _, _, *found = execute_together(connection, *statements, parameters={**parameters, "of_target": target})
    return found


def stripe_of(customer_key: sa.ColumnElement[str]) -> sa.ColumnElement[int]:
    """SQL：这个客户在第几条锁行上；按它排好的客户，任何一段都只占相邻的几条。"""
    # 按位与，不取模：散列有一半是负的，取模会得出没有的锁行
    low = customer_hash(customer_key).op("&")(CUSTOMER_STRIPES - 1)
    return sa.cast(low % STRIPES * _PARTS + low // STRIPES, sa.Integer)


_OLD, _OWN = "customer", "customer stripe"
"""客户的锁行的两种 kind：0.1.0 的工人独占前一种，1,024 条；我们共用它们，与它仍然彼此等着，而我们彼此只等自己的。"""
_PARTS = CUSTOMER_STRIPES // STRIPES
"""一条旧的分成这么多条。"""


def _stripes(customers: sa.Table) -> Mapping[str, sa.Select[tuple[int]]]:
    """kind → 这些客户的。"""
    stripe = stripe_of(customers.c.customer_key)
    return {_OLD: sa.select((stripe // _PARTS).label("key")), _OWN: sa.select(stripe.label("key"))}


@lru_cache(maxsize=16)
def _add_stripes(customers: sa.Table) -> sa.Insert:
    kinds = [keys.add_columns(sa.literal(kind).label("kind")) for kind, keys in _stripes(customers).items()]
    wanted = sa.union(*kinds).subquery("wanted").c
    is_there = sa.exists().where(locks.c.target == TARGET, locks.c.kind == wanted.kind, locks.c.key == wanted.key)
    missing = sa.select(TARGET, wanted.kind, wanted.key).where(~is_there).order_by(wanted.kind, wanted.key)
    return pg.insert(locks).from_select(["target", "kind", "key"], missing).on_conflict_do_nothing()


@lru_cache(maxsize=32)
def _lock_stripes(customers: sa.Table, kind: str) -> sa.Select[tuple[int]]:
    wanted = sa.and_(locks.c.target == TARGET, locks.c.kind == kind, locks.c.key.in_(_stripes(customers)[kind]))
    is_shared = kind == _OLD
    rows = sa.select(locks.c.key).where(wanted).order_by(locks.c.key)
    return rows.with_for_update(of=locks, read=is_shared, key_share=is_shared)


def lock_imports(connection: sa.Connection, target: str, import_ids: Iterable[UUID]) -> None:
    """锁住导入：同一个导入的两个事件依次处理，晚到的看得见先到的做了什么。"""
    acquire_locks(connection, target, "import", (import_id.int % STRIPES for import_id in import_ids))


def lock_cold_stages(connection: sa.Connection, target: str, *, exclusive: bool) -> None:
    """写 OPEN 与 COLD 的共用一把锁，直到事务结束；换一个最新业务日的独占它，只在换的那一刻。

    用咨询锁：它排队，独占的不会被源源不断的共用者饿死，而行锁会。
    """
    statement, parameters = cold_stages_lock(target, exclusive=exclusive)
    connection.execute(statement, parameters)


def cold_stages_lock(target: str, *, exclusive: bool) -> tuple[sa.Select[Any], Mapping[str, object]]:
    """`lock_cold_stages` 的语句与参数，给要与别的一起发的。"""
    return _LOCK_COLD_STAGES[exclusive], {"name": f"etl cold stages {target}"}


_COLD_STAGES = sa.func.hashtextextended(sa.bindparam("name", type_=sa.Text), 0, type_=sa.BigInteger())
_LOCK_COLD_STAGES = {
    True: sa.select(sa.func.pg_advisory_xact_lock(_COLD_STAGES)),
    False: sa.select(sa.func.pg_advisory_xact_lock_shared(_COLD_STAGES)),
}
