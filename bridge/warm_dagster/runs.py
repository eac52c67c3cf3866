"""Dagster 的一个运行：它要做什么、谁要的、走到哪一步。"""

from __future__ import annotations

from dataclasses import dataclass

from dagster import (
    AssetKey,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    RunRecord,
    RunsFilter,
)

from etl_assets.core.business_day import DayRange
from etl_assets.ledger.graph import AssetGraph
from etl_assets.orchestration.asset_runs import tagged_days
from etl_assets.orchestration.run_tags import read_tag


@dataclass(frozen=True)
class RunScope:
    """一个运行要做的：资产，图里的在前、上游在前；它的分区区间（没有分区、或分区不是日子的是 None）。"""

    assets: tuple[str, ...]
    days: DayRange | None


def scope_of(run: DagsterRun, graph: AssetGraph) -> RunScope:
    """由选择与标签得出；读不懂的分区留给执行它时报错。

    图里没有的也算：升级到一半，旧的工人给新资产的运行收尾，它们失败了、搁置了照样要记。
    """
    selected = {key.to_user_string() for key in run.asset_selection or ()}
    known = graph.ordered(selected)
    return RunScope(assets=(*known, *sorted(selected.difference(known))), days=tagged_days(run.tags))


def enqueue(instance: DagsterInstance, run: DagsterRun) -> None:
    """标成 QUEUED：在队列里，随时可以取消。"""
    instance.report_dagster_event(DagsterEvent.job_enqueue(run), run_id=run.run_id)


def report_starting(instance: DagsterInstance, run: DagsterRun) -> None:
    """由执行者来标 STARTING：等在队列里的运行不该看上去像正在启动。"""
    starting = DagsterEvent(event_type_value=DagsterEventType.PIPELINE_STARTING.value, job_name=run.job_name)
    instance.report_dagster_event(starting, run_id=run.run_id)


def unfinished_runs(instance: DagsterInstance, *, tag: str) -> list[RunRecord]:
    """有这个标签、已提交而没有结束的运行，先建的在前。"""
    statuses = [
        DagsterRunStatus.QUEUED,
        DagsterRunStatus.STARTING,
        DagsterRunStatus.STARTED,
        DagsterRunStatus.CANCELING,
    ]
    records = instance.get_run_records(RunsFilter(statuses=statuses))
    return [record for record in reversed(records) if read_tag(record.dagster_run.tags, tag) is not None]


def has_begun(instance: DagsterInstance, run_id: str) -> bool:
    """开始做过这个运行没有。"""
    record = instance.get_run_record_by_id(run_id)
    return record is not None and record.start_time is not None


def finished_assets(instance: DagsterInstance, run_id: str) -> frozenset[AssetKey]:
    """这个运行里整步做完的资产。"""
    entries = instance.all_logs(run_id, of_type={DagsterEventType.ASSET_MATERIALIZATION, DagsterEventType.STEP_SUCCESS})
    events = [entry.dagster_event for entry in entries if entry.dagster_event]
    finished = {event.step_key for event in events if event.event_type == DagsterEventType.STEP_SUCCESS}
    return frozenset(event.asset_key for event in events if event.asset_key and event.step_key in finished)
