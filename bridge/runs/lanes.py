"""一个运行排在哪条车道：人的点击先于定时与传感器，先于回填。"""

from __future__ import annotations

from dagster import DagsterInstance, DagsterRun

from bridge.settings import LANES, Lane
from bridge.warm_dagster.internals import RETRY_NUMBER_TAG
from bridge.warm_dagster.runs import origin_of
from etl_assets.orchestration.asset_runs import EVENT, TRIGGER_TAG

LANE_TAG = "etl/lane"
"""经队列执行的运行都带着它；没有它的（dagster dev、别的程序）不归我们管。"""

PERSON = "person"
RETRY_TAG = "etl/retry"
"""第几次重来；由收尾的工人写。"""

_LANES: dict[str, Lane] = {"person": "interactive", "automation": "event", "backfill": "bulk"}


def lane_of(run: DagsterRun) -> Lane:
    """标签里写明的，否则看谁要的。"""
    chosen = next((lane for lane in LANES if lane == run.tags.get(LANE_TAG)), None)
    return chosen or _LANES[origin_of(run)]


def is_of_event(run: DagsterRun) -> bool:
    """事件要的：它的日子由台账重来。"""
    return run.tags.get(TRIGGER_TAG) == EVENT


def submission_tags(instance: DagsterInstance, run: DagsterRun) -> dict[str, str]:
    """提交的运行要补的标签。

    人重新执行一个运行，Dagster 连标签一起抄：它是人的点击，不排事件或回填的队，死了的由我们重来，次数重新数。
    另写了车道的照他写的；机器的重来（Dagster 的自动重试）不改来历。
    """
    if run.parent_run_id is None or RETRY_NUMBER_TAG in run.tags:
        return {LANE_TAG: lane_of(run)}
    parent = instance.get_run_by_id(run.parent_run_id)
    is_copied = parent is None or parent.tags.get(LANE_TAG) == run.tags.get(LANE_TAG)
    return {LANE_TAG: _LANES[PERSON] if is_copied else lane_of(run), TRIGGER_TAG: PERSON, RETRY_TAG: "0"}
