"""对收敛测试的测试：把一处保护拿掉，同一个性质、同一个生成器就该找到反例。

保护是在数据库里拿掉的（插进那张表的行都消失），所以不认得产品里的函数名。
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import FlakyFailure

from etl_assets.core.etl_tables import locks, stale_customers
from etl_assets.services.accounting import AccountingError
from tests.integration.engine.chain import Chain
from tests.integration.engine.history import HISTORIES, History
from tests.integration.engine.world import World

FOUND = (AssertionError, FlakyFailure, AccountingError)
"""与参照不同；或者还没写完，账就不平了。"""


def search_for_a_counterexample(chain: Chain, processes: Executor, *, first_seed: int) -> None:
    """与 test_any_history_ends_as_the_reference_says 一样，找到第一个反例就停。"""

    @seed(first_seed)
    @settings(
        phases=[Phase.generate],
        max_examples=200,
        derandomize=False,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(history=HISTORIES)
    def any_history_ends_as_the_reference_says(history: History) -> None:
        World(chain, processes).live_through(history)

    any_history_ends_as_the_reference_says()


@pytest.mark.parametrize(
    ("protection", "first_seed"),
    [(locks, 1), (stale_customers, 8)],
    ids=["a lost update without locks", "a stale customer without marks"],
)
def test_missing_protection_is_found(
    chain: Chain, worker_processes: Executor, protection: sa.Table, first_seed: int
) -> None:
    with rows_vanishing(chain, protection), pytest.raises(FOUND, match=r"expected|extra|do not add up"):
        search_for_a_counterexample(chain, worker_processes, first_seed=first_seed)


def test_changed_customer_that_is_not_marked_is_found(chain: Chain, worker_processes: Executor) -> None:
    """只做变了的运行，下游全靠标记；离开了的客户的标记还在，丢的是还有订单的。"""
    has_orders = "EXISTS (SELECT FROM etl.order_index i WHERE i.customer_key = NEW.customer_key)"
    with (
        rows_vanishing(chain, stale_customers, when=has_orders),
        pytest.raises(FOUND, match=r"expected|extra|do not add up"),
    ):
        search_for_a_counterexample(chain, worker_processes, first_seed=1)


@contextmanager
def rows_vanishing(chain: Chain, table: sa.Table, *, when: str = "true") -> Iterator[None]:
    """写进这张表的行都悄悄丢掉：锁没有行可锁，标记没有记下。"""
    body = f"BEGIN IF {when} THEN RETURN NULL; END IF; RETURN NEW; END"
    chain.execute(sa.text(f"CREATE FUNCTION etl.lose_row() RETURNS trigger LANGUAGE plpgsql AS '{body}'"))
    chain.execute(
        sa.text(
            f"CREATE TRIGGER lose_row BEFORE INSERT ON {table.fullname} FOR EACH ROW EXECUTE FUNCTION etl.lose_row()"
        )
    )
    try:
        yield
    finally:
        chain.execute(sa.text("DROP FUNCTION etl.lose_row() CASCADE"))
