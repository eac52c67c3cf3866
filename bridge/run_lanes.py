"""一个运行排在哪条车道：人的点击先于定时与感应器，先于回填。"""

from __future__ import annotations

from dagster import DagsterRun

from bridge.dagster_adapter import origin_of
from bridge.settings import LANES, Lane

LANE_TAG = "etl/lane"
"""经队列执行的运行都带着它；没有它的（dagster dev、别的程序）不归我们管。"""

_LANES: dict[str, Lane] = {"person": "interactive", "automation": "event", "backfill": "bulk"}


def lane_of(run: DagsterRun) -> Lane:
    """标签里写明的，否则看谁要的。"""
    chosen = next((lane for lane in LANES if lane == run.tags.get(LANE_TAG)), None)
    return chosen or _LANES[origin_of(run)]
