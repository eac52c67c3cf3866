"""哪些运行物化过一个资产的一天，哪个写下了某一行：从 Dagster 的历史里读，只读最新的一些。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from dagster import AssetKey, AssetRecordsFilter, DagsterInstance

from bridge.warm_dagster.internals import BACKFILL_ID_TAG, SCHEDULE_NAME_TAG, SENSOR_NAME_TAG
from etl_assets.orchestration.asset_runs import WORKER
from etl_assets.orchestration.run_tags import TRIGGER_TAG, read_tag

_MOST = 100
"""一天里最新的这么多次物化：再往前的不找。"""
_ASKED_BY = {SCHEDULE_NAME_TAG: "schedule", SENSOR_NAME_TAG: "sensor", BACKFILL_ID_TAG: "backfill"}


@dataclass(frozen=True)
class Materialization:
    """一个运行物化了一个资产的一天；metadata 是它报的。"""

    asset: str
    day: date
    run_id: str
    made_at: datetime
    metadata: Mapping[str, Any]

    @property
    def worker(self) -> str | None:
        return self.metadata.get(WORKER)


def read_materializations(
    instance: DagsterInstance, asset: str, day: date, *, limit: int = _MOST
) -> list[Materialization]:
    """一天里最新的几次，新的在前。一次问一天：那样才走得成索引。"""
    of_day = AssetRecordsFilter(AssetKey.from_user_string(asset), [day.isoformat()])
    found = []
    for record in instance.fetch_materializations(of_day, limit=limit).records:
        made = record.asset_materialization
        metadata = {name: entry.value for name, entry in made.metadata.items()} if made else {}
        at = datetime.fromtimestamp(record.timestamp, UTC)
        found.append(Materialization(asset, day, record.run_id, at, metadata))
    return found


def find_writer(
    instance: DagsterInstance, asset: str, days: Iterable[date], written_at: datetime
) -> Materialization | None:
    """写下一行的运行：written_at（它的事务开始的时刻）之后的第一次物化。

    改了日子的订单，也许是原来那一天的运行写的，所以哪些天都看；都有界，太久以前的找不到。
    """
    found = [made for day in days for made in read_materializations(instance, asset, day)]
    return min((made for made in found if made.made_at >= written_at), key=lambda made: made.made_at, default=None)


def describe_run(instance: DagsterInstance, run_id: str) -> dict[str, str | None]:
    """一个运行此刻怎样（status），谁要的（trigger）；Dagster 里没有它了，都是 None。"""
    run = instance.get_run_by_id(run_id)
    if run is None:
        return {"status": None, "trigger": None}
    by_machine = next((f"{kind} {run.tags[tag]}" for tag, kind in _ASKED_BY.items() if tag in run.tags), None)
    return {"status": run.status.value, "trigger": read_tag(run.tags, TRIGGER_TAG) or by_machine or "person"}
