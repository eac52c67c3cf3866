"""客户的锁：同一个客户的两个运行依次来，互不相干的不等；0.1.0 的工人还在旁边时，它与新的彼此等着。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import psycopg
import pytest
import sqlalchemy as sa

from etl_assets.core.etl_tables import locks
from etl_assets.core.tables import customer_hash
from etl_assets.ledger.locks import STRIPES, lock_customers, stripe_of

NAMES = sa.select(sa.cast(sa.func.generate_series(1, 5000), sa.Text).label("customer_key")).subquery("names")
KEY = NAMES.c.customer_key
OLD = sa.cast(customer_hash(KEY).op("&")(STRIPES - 1), sa.Integer)
WANTED = sa.table("wanted", sa.column("customer_key", sa.Text))


@pytest.fixture
def first(engine: sa.Engine) -> Iterator[sa.Connection]:
    """库里还没有锁行，像刚升级的那样。"""
    with engine.connect() as connection:
        connection.execute(sa.delete(locks))
        connection.commit()
        yield connection


@pytest.fixture
def second(engine: sa.Engine) -> Iterator[sa.Connection]:
    """等不到锁就算了。"""
    with engine.connect() as connection:
        connection.exec_driver_sql("SET lock_timeout = '100ms'")
        connection.commit()
        yield connection
        # 连接池是大家的：不放回去，后来的测试也等不到 100 毫秒以上
        connection.rollback()
        connection.exec_driver_sql("RESET lock_timeout")
        connection.commit()


@pytest.fixture
def neighbours(first: sa.Connection) -> list[str]:
    """同在 0.1.0 的第一条锁行上的客户，在新的锁行上各是各的。"""
    keys = first.execute(sa.select(sa.func.min(KEY)).where(OLD == 0).group_by(stripe_of(KEY))).scalars().all()
    assert len(keys) > 1
    return list(keys)


def lock(connection: sa.Connection, *customer_keys: str) -> bool:
    """像一个运行那样锁住他们；别人占着就是假。"""
    connection.exec_driver_sql("CREATE TEMPORARY TABLE IF NOT EXISTS wanted (customer_key text) ON COMMIT DELETE ROWS")
    connection.execute(sa.insert(WANTED), [{"customer_key": key} for key in customer_keys])
    return has_got(connection, lambda: lock_customers(connection, "public", WANTED, then=(), parameters={}))


def lock_as_0_1_0(connection: sa.Connection, key: int) -> bool:
    own = sa.and_(locks.c.target == "public", locks.c.kind == "customer", locks.c.key == key)
    statement = sa.select(locks.c.key).where(own).with_for_update()
    return has_got(connection, lambda: connection.execute(statement).one())


def has_got(connection: sa.Connection, lock_them: Callable[[], object]) -> bool:
    try:
        lock_them()
    except sa.exc.OperationalError as error:
        connection.rollback()
        if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise
        return False
    return True


def test_unrelated_customers_do_not_wait_and_the_same_one_does(
    first: sa.Connection, second: sa.Connection, neighbours: list[str]
) -> None:
    assert lock(second, *neighbours)
    second.commit()
    assert lock(first, neighbours[0])
    assert lock(second, neighbours[1])
    second.rollback()
    assert not lock(second, *neighbours)
    first.commit()
    assert lock(second, *neighbours)


def test_worker_of_0_1_0_and_ours_wait_for_each_other(
    first: sa.Connection, second: sa.Connection, neighbours: list[str]
) -> None:
    assert lock(second, *neighbours)
    second.commit()
    assert lock(first, neighbours[0])
    assert not lock_as_0_1_0(second, 0)
    first.commit()
    assert lock_as_0_1_0(first, 0)
    assert not lock(second, neighbours[1])
    first.commit()
    assert lock(second, neighbours[1])


def test_every_customer_has_a_stripe_and_its_neighbours_share_the_old_one(first: sa.Connection) -> None:
    stripes = sa.select(stripe_of(KEY).label("stripe"), OLD.label("old")).subquery()
    assert first.execute(sa.select(sa.func.count()).where(stripes.c.stripe // 64 != stripes.c.old)).scalar() == 0
    low, high = first.execute(sa.select(sa.func.min(stripes.c.stripe), sa.func.max(stripes.c.stripe))).one()
    assert (low >= 0, high < 65_536, high > 60_000) == (True, True, True)


def test_runs_that_add_the_same_rows_do_not_deadlock(engine: sa.Engine, first: sa.Connection) -> None:
    """库里还没有锁行，几个运行各有一百个客户，大半相同，次序各不相同。"""
    keys = list(first.execute(sa.select(KEY).limit(300)).scalars())
    first.rollback()

    def run(seed: int) -> None:
        chosen = Random(seed)  # noqa: S311  # 不关安全
        with engine.connect() as connection:
            for _ in range(20):
                assert lock(connection, *chosen.sample(keys, 100))
                connection.commit()

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(run, range(6)))
