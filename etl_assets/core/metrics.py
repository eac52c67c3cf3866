"""指标：一个进程数的数。只在这里碰 prometheus_client；没有 `start_recording` 的进程什么也不记，也不载入它。

每个进程占一个席位，数写在席位的内存映射文件里：kill -9 也在，后来的进程占了同一个席位就接着数。
所以文件至多与同时活着的进程一样多，数只增不减。由 bridge/operations/metrics_endpoint.py 合起来给出。
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

import sqlalchemy as sa

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
_FILE_BYTES = 1 << 20
"""装得下几千个序列；先占住磁盘：映射着的稀疏文件遇上磁盘满了，写它的进程会被 SIGBUS 杀掉。"""
_MOST_SEATS = 1_024

Kind = Literal["counter", "histogram", "gauge"]


@dataclass(frozen=True)
class Metric:
    """一个指标的声明；labels 是标签与它的值，值说不全的是空的。"""

    kind: Kind
    name: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


Trigger = Literal["event", "person"]
RunOutcome = Literal["success", "failure", "canceled"]

RECORDED = (
    Metric(
        "counter",
        "etl_events_total",
        "Events that are done with: handled, ignored, or refused as a dead letter.",
        {"subject": (), "outcome": ("handled", "ignored", "refused")},
    ),
    Metric(
        "counter",
        "etl_event_retries_total",
        "Deliveries of events that are tried again later.",
        {"subject": (), "reason": ("not_yet", "counted", "passing", "away", "refused", "letters")},
    ),
    Metric(
        "counter",
        "etl_imports_total",
        "Imports taken into the ledger: announced by their event, after their event had waited, or never announced.",
        {"how": ("announced", "waited", "unannounced")},
    ),
    Metric(
        "counter",
        "etl_tasks_total",
        "Deliveries of tasks: done, tried again later, given back to the queue, or dead letters.",
        {"task": (), "lane": (), "outcome": ("done", "retried", "returned", "dead_lettered")},
    ),
    Metric("counter", "etl_dead_letters_total", "Messages stored as dead letters.", {"stream": ()}),
    Metric(
        "counter",
        "etl_runs_total",
        "Dagster runs that ended in a worker, or were buried after their worker had died.",
        {"trigger": get_args(Trigger), "outcome": get_args(RunOutcome)},
    ),
    Metric(
        "counter",
        "etl_asset_runs_total",
        "Steps of runs, each makes the days of one asset.",
        {"asset": (), "outcome": ("success", "failure")},
    ),
    Metric(
        "counter",
        "etl_rows_total",
        "Rows written to an asset's own table by committed transactions; unchanged rows are not written.",
        {"asset": (), "action": ("inserted", "updated", "deleted")},
    ),
    Metric("counter", "etl_rejected_rows_total", "Raw rows that runs rejected and that were not rejected before."),
    Metric("counter", "etl_transaction_retries_total", "Data transactions repeated after a conflict with another one."),
    Metric("counter", "etl_leases_lost_total", "Leases that expired because their worker died, froze or was cut off."),
    Metric(
        "histogram",
        "etl_event_stored_to_handled_seconds",
        "From an event's storage in the stream to its acknowledgement by the listener.",
        {"subject": ()},
    ),
    Metric(
        "histogram",
        "etl_handled_to_claimed_seconds",
        "From the last request of the longest waiting day of a claim to the claim, pauses between tries included.",
    ),
    Metric(
        "histogram",
        "etl_claimed_to_ended_seconds",
        "From the claim of its days to the end of a run.",
        {"outcome": get_args(RunOutcome)},
    ),
    Metric(
        "histogram",
        "etl_event_stored_to_tables_seconds",
        "From the storage of the oldest event that a successful run names (at most its ten newest) to the end of the run.",
    ),
    Metric("histogram", "etl_asset_run_seconds", "Duration of the successful steps of an asset.", {"asset": ()}),
    Metric("gauge", "etl_database_pool_in_use", "Connections that a process has taken from its pool now."),
    Metric("gauge", "etl_database_pool_limit", "Connections that the pool of a process may open."),
)

_recorded: dict[str, Any] = {}
"""空的：没有开。"""


def start_recording(folder: Path) -> None:
    """本进程从此记下它的数，写进 folder；占着席位直到进程结束。

    :raises OSError: 文件夹不能写，磁盘满了。
    """
    import prometheus_client
    from prometheus_client import values

    seat = _take_seat(folder)
    for kind in ("counter", "histogram", "gauge_liveall"):
        with (folder / f"{kind}_{seat}.db").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, _FILE_BYTES)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: seat)  # type: ignore[no-untyped-call]
    kinds = {"counter": prometheus_client.Counter, "histogram": prometheus_client.Histogram}
    for metric in RECORDED:
        options: dict[str, Any] = {"buckets": _SECONDS} if metric.kind == "histogram" else {}
        make: Any = kinds.get(metric.kind)
        if make is None:
            make, options = prometheus_client.Gauge, {"multiprocess_mode": "liveall"}
        made = make(metric.name, metric.help, list(metric.labels), registry=None, **options)
        _recorded[metric.name] = made
        # 从零数起：头一次就有一个增量，rate 才看得见它。标签的值说不全的，用到时才有
        for known in itertools.product(*metric.labels.values()) if metric.labels else ():
            made.labels(*known)


def _take_seat(folder: Path) -> int:
    """头一个没有活着的进程占着的；内核在进程结束时放开，不论怎样结束。"""
    for seat in range(_MOST_SEATS):
        if (held := hold_seat(folder, seat)) is not None:
            _held.append(held)
            # 上一个占着它的进程此刻的样子，不是我们的
            for gauges in folder.glob(f"gauge_*_{seat}.db"):
                gauges.unlink()
            return seat
    raise OSError(f"{_MOST_SEATS} processes record metrics in {folder}")


_held: list[int] = []
"""席位的描述符，到进程结束。"""


def hold_seat(folder: Path, seat: int) -> int | None:
    """占住一个席位，返回它的描述符；有活着的进程占着就是 None。"""
    descriptor = os.open(folder / f"{seat}.seat", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def drop_gauges_of_the_dead(folder: Path) -> None:
    """死了的进程此刻没有借着连接；它数过的留着。"""
    for gauges in folder.glob("gauge_*.db"):
        if (held := hold_seat(folder, int(gauges.stem.rpartition("_")[2]))) is not None:
            gauges.unlink(missing_ok=True)
            os.close(held)


def discard_unreadable(folder: Path) -> None:
    """断电之后，文件也许只写下一半：读不了的从头数，不该让整份指标都给不出。正用着的是自己写的，不看。"""
    for path in folder.glob("*.db"):
        if (held := hold_seat(folder, int(path.stem.rpartition("_")[2]))) is not None:
            if not _is_readable(path):
                path.unlink(missing_ok=True)
            os.close(held)


def _is_readable(path: Path) -> bool:
    from prometheus_client.mmap_dict import MmapedDict

    try:
        for key, *_ in MmapedDict.read_all_values_from_file(path):  # type: ignore[no-untyped-call]
            json.loads(key)
    except (ValueError, RuntimeError, struct.error):
        return False
    return True


def is_recording() -> bool:
    return bool(_recorded)


# ---- 数 -----------------------------------------------------------------------------


def event_done(subject: str, outcome: Literal["handled", "ignored", "refused"], *, stored_at: datetime) -> None:
    """事件确认了，或者进了死信。"""
    if not _recorded:
        return
    _count("etl_events_total", subject, outcome)
    if outcome == "handled":
        _observe("etl_event_stored_to_handled_seconds", _since(stored_at), subject)


def event_retried(subject: str, reason: str) -> None:
    _count("etl_event_retries_total", subject, reason)


def imports_taken_in(how: Literal["announced", "waited", "unannounced"], imports: int) -> None:
    """要求了它们的日子，已经提交。"""
    if imports:
        _count("etl_imports_total", how, amount=imports)


def task_settled(task: str, lane: str, outcome: Literal["done", "retried", "returned", "dead_lettered"]) -> None:
    _count("etl_tasks_total", task, lane, outcome)


def letter_stored(stream: str) -> None:
    _count("etl_dead_letters_total", stream)


def days_claimed(*, waited_seconds: float) -> None:
    _observe("etl_handled_to_claimed_seconds", waited_seconds)


def run_ended(trigger: Trigger, outcome: RunOutcome, *, seconds: float | None = None) -> None:
    """谁删去了租约谁数，所以只数一次。

    :param seconds: 从占有它的日子算起；死了的运行说不出。
    """
    _count("etl_runs_total", trigger, outcome)
    if seconds is not None:
        _observe("etl_claimed_to_ended_seconds", seconds, outcome)


def event_in_tables(*, seconds: float) -> None:
    _observe("etl_event_stored_to_tables_seconds", seconds)


def asset_made(asset: str, *, seconds: float) -> None:
    _count("etl_asset_runs_total", asset, "success")
    _observe("etl_asset_run_seconds", seconds, asset)


def asset_failed(asset: str) -> None:
    _count("etl_asset_runs_total", asset, "failure")


def rows_committed(asset: str, *, inserted: int, updated: int, deleted: int, rejected: int) -> None:
    """一个数据事务提交了。"""
    for action, rows in (("inserted", inserted), ("updated", updated), ("deleted", deleted)):
        if rows:
            _count("etl_rows_total", asset, action, amount=rows)
    if rejected:
        _count("etl_rejected_rows_total", amount=rejected)


def transaction_retried() -> None:
    _count("etl_transaction_retries_total")


def lease_lost() -> None:
    _count("etl_leases_lost_total")


def watch_pool(engine: sa.Engine, *, limit: int) -> None:
    """借出、归还时各记一下；没有开就不听。"""
    if not _recorded:
        return
    in_use, pool = _recorded["etl_database_pool_in_use"], cast("sa.QueuePool", engine.pool)
    _recorded["etl_database_pool_limit"].set(limit)
    # 问连接池，不自己加减：作废的、脱离了连接池的，不是每个都有借有还
    sa.event.listen(engine, "checkout", lambda *_: in_use.set(pool.checkedout()))
    sa.event.listen(engine, "checkin", lambda *_: in_use.set(pool.checkedout() - 1))


def _count(name: str, *labels: str, amount: float = 1.0) -> None:
    if _recorded:
        metric = _recorded[name]
        (metric.labels(*labels) if labels else metric).inc(amount)


def _observe(name: str, seconds: float, *labels: str) -> None:
    if _recorded:
        metric = _recorded[name]
        (metric.labels(*labels) if labels else metric).observe(max(seconds, 0.0))


def _since(moment: datetime) -> float:
    """别的机器的时钟可能快一点：那就是零。"""
    return (datetime.now(UTC) - moment).total_seconds()
