"""`bench scale` 量的是它说的：远处的服务器真的远，一次领取是到期那么多天时的领取，量过就像没有来过。"""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa

from benchmarks.history import LAST_DAY, History, fill_history
from benchmarks.scale.partitions import claim_milliseconds, due_days
from etl_assets.core.etl_tables import leases, ledger
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData
from tests.chaos.network import Network

ONE_WAY_SECONDS = 0.02


def test_far_away_server_answers_after_the_round_trip(engine: sa.Engine) -> None:
    port = engine.url.port
    assert port is not None
    with Network(delay_seconds=ONE_WAY_SECONDS) as network:
        link = network.lay("far", port)
        far = sa.create_engine(engine.url.set(port=link.port))
        with far.connect() as connection:
            connection.scalar(sa.text("SELECT 1"))
            started = time.perf_counter()
            # 比一段网线一次传的还长：次序不乱
            text = connection.scalar(sa.text("SELECT string_agg(n::text, ' ') FROM generate_series(1, 50000) AS n"))
            elapsed = time.perf_counter() - started
        far.dispose()
    assert text == " ".join(map(str, range(1, 50_001)))
    assert elapsed >= 2 * ONE_WAY_SECONDS


def rows_of(engine: sa.Engine, table: sa.Table) -> list[sa.Row[Any]]:
    with engine.connect() as connection:
        return list(connection.execute(sa.select(table).order_by(*table.primary_key)))


def test_claims_of_due_days_leave_nothing_behind(engine: sa.Engine, etl_settings: EtlSettings) -> None:
    RawData(engine)
    fill_history(engine, etl_settings, History(LAST_DAY, days=5, imports=5, orders=50, customers=5))
    before = rows_of(engine, ledger)
    with due_days(engine, 3) as connection:
        due = sa.select(sa.func.count()).select_from(ledger).where(ledger.c.requested > ledger.c.materialized)
        assert connection.scalar(due) == 3 * 3
        assert claim_milliseconds(connection) > 0
    assert rows_of(engine, ledger) == before
    assert rows_of(engine, leases) == []
