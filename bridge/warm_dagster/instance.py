"""常驻进程的 Dagster 实例：DAGSTER_HOME 指的那个，改成适合工人、适合网页的样子。"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from dagster import DagsterInstance, EventLogEntry

from bridge.warm_dagster.internals import ConfigurableClassData, InstanceRef, context_creation_job
from bridge.warm_dagster.lean_events import LeanEventLogStorage
from bridge.warm_dagster.lean_storage import LeanStorage
from etl_assets.core.errors import SettingsError

_CONSOLE_LOGGERS = "default_system_loggers"
_STOCK = ["PostgresRunStorage", "PostgresEventLogStorage", "PostgresScheduleStorage"]


def open_lean_instance() -> DagsterInstance:
    """DAGSTER_HOME 指的实例，存储换成我们的。"""
    home = Path(os.environ.get("DAGSTER_HOME", "")).expanduser()
    if not os.environ.get("DAGSTER_HOME") or not home.is_dir():
        raise SettingsError(
            f"DAGSTER_HOME={str(home)!r} is not a folder: take it from `etl env`, or point it at the folder of your dagster.yaml"
        )
    return DagsterInstance.from_ref(_with_lean_storage(InstanceRef.from_dir(str(home.absolute()))))


def open_instance() -> DagsterInstance:
    """工人的：存储共用一个连接池，运行不再各自往终端打日志。"""
    instance = open_lean_instance()
    # 都要在第一个运行之前：它一开始就设日志、建处理器
    # 运行的日志在 Dagster 里；进程自己的日志只有一种格式，不夹进每个事件一行的彩色文字
    setattr(context_creation_job, _CONSOLE_LOGGERS, lambda _instance: [])
    # Dagster 每个运行都重设一遍标准库的日志：拿着日志的锁去等别的运行的处理器，同一进程里两个运行会死锁
    handlers = instance.get_yaml_python_handlers()
    instance.get_yaml_python_handlers = lambda: handlers  # type: ignore[method-assign]  # 实例上的，盖住类里的
    instance._subscribers = _NoSubscribers()
    return instance


def _with_lean_storage(ref: InstanceRef) -> InstanceRef:
    """dagster.yaml 写的是 dagster-postgres 的（一处写的、三处分开写的），换成我们的自定义存储；别的存储照旧。"""
    parts = [ref.run_storage_data, ref.event_storage_data, ref.schedule_storage_data]
    if [part.class_name if part else None for part in parts] != _STOCK or parts[0] is None:
        return ref
    return ref._replace(
        storage_data=ConfigurableClassData(LeanStorage.__module__, LeanStorage.__name__, parts[0].config_yaml)
    )


def deferring_events(instance: DagsterInstance, *, is_continued: bool = False) -> AbstractContextManager[None]:
    """期间的事件攒着写；别的存储（测试里的 SQLite）照旧。"""
    storage = instance.event_log_storage
    return storage.deferring(is_continued=is_continued) if isinstance(storage, LeanEventLogStorage) else nullcontext()


def flush_events(instance: DagsterInstance) -> None:
    """攒着的事件现在就写：做得久的一步，网页上也看得见它已经开始。"""
    storage = instance.event_log_storage
    if isinstance(storage, LeanEventLogStorage):
        storage.flush()


class _NoSubscribers(dict[str, list[Callable[[EventLogEntry], object]]]):
    """Dagster 给每个写过事件的运行留一个空的名单，从不删去；工人里没有人订阅。"""

    def __missing__(self, _run_id: str) -> list[Callable[[EventLogEntry], object]]:
        return []
