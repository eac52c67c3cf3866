"""COLD 清扫按一段时刻去找要改判的商机；哪一天算冷，仍然照当地的日历，钟往回拨的那天也是。"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from etl_assets.core.tables import target_tables
from tests.integration.engine.chain import Chain

TABLES = target_tables("public")
LEADS = TABLES.leads
STAGES = ("OPEN", "COLD", None, "ABANDONED", "LOST", "WON", "open")


@pytest.mark.parametrize(
    ("timezone", "last_warm"),
    [
        ("Asia/Shanghai", date(2026, 1, 5)),
        ("America/St_Johns", date(2006, 10, 29)),  # 零点零一分拨回前一天
        ("America/Sao_Paulo", date(2018, 2, 18)),  # 零点拨回前一天
        ("America/Sao_Paulo", date(2018, 11, 4)),  # 没有零点
        ("America/Havana", date(2025, 11, 2)),  # 零点过两次
        ("Pacific/Apia", date(2011, 12, 30)),  # 没有这一天
    ],
)
def test_leads_are_cold_before_the_first_moment_of_the_local_day(chain: Chain, timezone: str, last_warm: date) -> None:
    settings = chain.settings.model_copy(update={"timezone": timezone, "cold_after_days": 0})
    midnight = datetime.combine(last_warm, time(), ZoneInfo(timezone)).astimezone(UTC)
    moments = [midnight + timedelta(minutes=minutes) for minutes in range(-26 * 60, 26 * 60, 10)]
    edges = [midnight + offset * timedelta(microseconds=1) for offset in (-1, 0, 1)]
    given = [*moments, *edges, None]
    put_leads(chain, given, newest_day=last_warm)
    Chain(chain.engine, settings).run(last_warm, assets=["leads"])
    found = dict(
        chain.rows(
            sa.select(LEADS.c.last_order_at, sa.func.array_agg(LEADS.c.current_stage.distinct())).group_by(
                LEADS.c.last_order_at
            )
        )
    )
    assert found == {moment: [stage_of(moment, ZoneInfo(timezone), last_warm)] for moment in given}


def test_without_orders_nothing_is_cold(chain: Chain) -> None:
    put_leads(chain, [datetime(2020, 1, 1, tzinfo=UTC), None], newest_day=None)
    chain.run(date(2026, 1, 5), assets=["leads"])
    assert set(chain.rows(sa.select(LEADS.c.current_stage))) == {("OPEN",)}


def put_leads(chain: Chain, moments: Sequence[datetime | None], *, newest_day: date | None) -> None:
    """每个时刻、每种阶段一个没有关闭的商机；人写了字，所以留得下来。"""
    leads = [
        {
            "lead_id": uuid4(),
            "customer_global_id": uuid4(),
            "lead_no": 1,
            "current_stage": stage,
            "last_order_at": moment,
            "owner": "王五",
        }
        for moment in moments
        for stage in STAGES
    ]
    chain.execute(sa.insert(LEADS).values(leads))
    if newest_day is not None:
        chain.execute(sa.insert(TABLES.orders).values(shop_id=uuid4(), order_id="A", order_date=newest_day))


def stage_of(moment: datetime | None, zone: ZoneInfo, last_warm: date) -> str:
    return "COLD" if moment is not None and moment.astimezone(zone).date() < last_warm else "OPEN"
