"""台账知道一百、一千、一万天时，一个事件、一次点击、一次领取各要多久；订单、导入与客户一样多，不同的只有天数。"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from unittest.mock import patch
from uuid import uuid4

import sqlalchemy as sa

from benchmarks.growth.bench import Measured, measure
from benchmarks.growth.cases import Case, House, filled_databases, running_houses
from benchmarks.growth.server_log import ServerLog
from benchmarks.history import LAST_DAY, History
from benchmarks.report import Spread
from etl_assets.core.etl_tables import ledger
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.ledger.claims import claim_due_days

_ROUNDS = 12
_CLAIMS = 7
_EARLIEST = date(1998, 1, 1)
"""一万天之前。"""


def _case(key: str, days: int) -> Case:
    history = History(LAST_DAY, days, imports=10_000, orders=100_000, customers=20_000)
    return Case(key, f"{days:,} days", history)


FEW, SOME, MANY = CASES = (_case("a", 100), _case("b", 1_000), _case("c", 10_000))


@dataclass(frozen=True)
class Partitions:
    """claims：台账有一万天、其中这么多天到期时，一次领取的毫秒。"""

    measured: Mapping[str, Measured]
    claims: Mapping[int, Spread]

    def times(self, stage: str) -> float:
        """最多的天数要最少的几倍。"""
        most, least = (self.measured[case.key].spreads()[stage].median for case in (MANY, FEW))
        return most / least


def measure_partitions(rounds: int = _ROUNDS, cases: Sequence[Case] = CASES) -> Partitions:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        patch.dict(os.environ, {"ETL_PARTITIONS_START": _EARLIEST.isoformat()}),
        EmbeddedPostgres(Path(folder) / "postgres") as url,
        filled_databases(url, list(cases), clicks=rounds * 2) as filled,
        running_houses(Path(folder), filled) as houses,
    ):
        measured = asyncio.run(measure(houses, ServerLog(Path(folder) / "postgres"), rounds))
        return Partitions(measured, dict(_claims(houses[-1])))


def _claims(house: House) -> Iterator[tuple[int, Spread]]:
    for due in (1, 100, 1_000, house.case.history.days):
        with due_days(house.engine, due) as connection:
            yield due, Spread.of([claim_milliseconds(connection) for _ in range(_CLAIMS)])


@contextmanager
def due_days(engine: sa.Engine, count: int) -> Iterator[sa.Connection]:
    """最新的这么多天到期，只在这个事务里；工人这时领不了，等它。"""
    newest = ledger.c.day > LAST_DAY - timedelta(days=count)
    with engine.connect() as connection:
        connection.execute(sa.update(ledger).where(newest).values(requested=ledger.c.requested + 1))
        yield connection
        connection.rollback()


def claim_milliseconds(connection: sa.Connection) -> float:
    with connection.begin_nested() as savepoint:
        started = time.perf_counter()
        claim = claim_due_days(connection, "public", run_id=str(uuid4()), owner="benchmark", lease_seconds=10)
        elapsed = time.perf_counter() - started
        savepoint.rollback()
    if claim is None:
        raise RuntimeError("nothing was claimed")
    return elapsed * 1000
