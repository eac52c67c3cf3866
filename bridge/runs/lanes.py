"""一个运行排在哪条车道：人的点击先于定时与传感器，先于回填。"""

from __future__ import annotations

from dagster import DagsterInstance, DagsterRun

from bridge.settings import LANES, Lane
from bridge.warm_dagster.internals import (
    BACKFILL_ID_TAG,
    RETRY_NUMBER_TAG,
    SCHEDULE_NAME_TAG,
    SENSOR_NAME_TAG,
    USER_TAG,
)
from etl_assets.core.business_day import DayRange
from etl_assets.orchestration.asset_runs import tagged_days
from etl_assets.orchestration.run_tags import EVENT, PREFIX, TRIGGER_TAG, read_tag, renamed

LANE_TAG = f"{PREFIX}lane"
"""经队列执行的运行都带着它；没有它的（dagster dev、别的程序）不归我们管。"""

PERSON = "person"
RETRY_TAG = f"{PREFIX}retry"
"""第几次重来；由收尾的工人写。"""

DAYS_TAG = "days"


def lane_of(run: DagsterRun) -> Lane:
    """标签里写明的，否则看谁要的：人、定时与传感器，还是回填。"""
    if chosen := next((lane for lane in LANES if lane == read_tag(run.tags, LANE_TAG)), None):
        return chosen
    if BACKFILL_ID_TAG in run.tags:
        return "bulk"
    return "event" if run.tags.keys() & {SCHEDULE_NAME_TAG, SENSOR_NAME_TAG} else "interactive"


def is_of_event(run: DagsterRun) -> bool:
    """事件要的：它的日子由台账重来。"""
    return read_tag(run.tags, TRIGGER_TAG) == EVENT


def submission_tags(instance: DagsterInstance, run: DagsterRun) -> dict[str, str]:
    """提交的运行要补的标签。

    人重新执行一个运行，Dagster 连标签一起抄：它是人的点击，不排事件或回填的队，死了的由我们重来，次数重新数。
    另写了车道的照他写的；机器的重来（Dagster 的自动重试）不改来历。
    """
    if run.parent_run_id is None or RETRY_NUMBER_TAG in run.tags:
        return {LANE_TAG: lane_of(run), **shown_days(tagged_days(run.tags))}
    parent = instance.get_run_by_id(run.parent_run_id)
    is_copied = parent is None or read_tag(parent.tags, LANE_TAG) == read_tag(run.tags, LANE_TAG)
    origin = {LANE_TAG: "interactive" if is_copied else lane_of(run), TRIGGER_TAG: PERSON, RETRY_TAG: "0"}
    launched_by = {USER_TAG: PERSON} if is_of_event(run) and USER_TAG in run.tags else {}
    return {**renamed(run.tags, origin), **launched_by}


def shown_days(days: DayRange | None) -> dict[str, str]:
    """运行列表只列得出一天的分区，一段日子的由我们说。"""
    return {DAYS_TAG: str(days)} if days is not None and len(days) > 1 else {}
