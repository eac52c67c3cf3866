"""一个工人进程一秒做几个运行：像工人那样接手、执行一个又一个三资产的运行，并说出时间花在哪里。"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from uuid import uuid4

from dagster import DagsterEventType

from bridge.runs.lanes import LANE_TAG
from bridge.runs.worker import RunWorker
from bridge.settings import get_bridge_settings
from bridge.warm_dagster.code_location_name import JOB_NAME
from etl_assets.core.business_day import DayRange


@dataclass(frozen=True)
class RunRate:
    """每个运行的毫秒数：建、接手（租约与状态）、执行；执行之中三个 ETL 自己用去的。"""

    runs_per_second: float
    create_ms: float
    take_ms: float
    execute_ms: float
    etl_ms: float


def measure_run_rate(environment: Mapping[str, str], days: Sequence[date], warm_up: int) -> RunRate:
    """在本进程里做 `days` 各一个运行；前 `warm_up` 个不计。"""
    os.environ.update(environment)
    worker = RunWorker.load(get_bridge_settings())
    spent = [0.0, 0.0, 0.0, 0.0]
    for number, day in enumerate(days):
        if number == warm_up:
            spent = [0.0, 0.0, 0.0, 0.0]
        times = [time.perf_counter()]
        run = worker.location.create_run(
            worker.instance,
            job_name=JOB_NAME,
            run_id=str(uuid4()),
            assets=worker.location.graph.names,
            days=DayRange(day, day),
            tags={LANE_TAG: "event"},
        )
        times.append(time.perf_counter())
        held = worker.take(run.run_id)
        times.append(time.perf_counter())
        if held is None or not worker.execute(held).succeeded:
            raise RuntimeError(f"run {run.run_id} of {day} did not succeed")
        times.append(time.perf_counter())
        for position in range(3):
            spent[position] += times[position + 1] - times[position]
        spent[3] += _etl_seconds(worker, run.run_id)
    count = len(days) - warm_up
    create, take, execute, etl = (seconds / count * 1000 for seconds in spent)
    return RunRate(
        runs_per_second=1000 / (create + take + execute), create_ms=create, take_ms=take, execute_ms=execute, etl_ms=etl
    )


def _etl_seconds(worker: RunWorker, run_id: str) -> float:
    """三次物化自己报告的时间之和。"""
    records = worker.instance.get_records_for_run(run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION).records
    materializations = [record.event_log_entry.asset_materialization for record in records]
    return sum(float(str(made.metadata["duration_seconds"].value)) for made in materializations if made)
