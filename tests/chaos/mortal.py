"""子进程里的 `etl listen` 或 `etl worker`，会在指定的一步之前或之后被 kill -9：故障点都装在这里，产品代码里没有。

用法：python -m tests.chaos.mortal listen|worker ARM_FILE。ARM_FILE 里写着哪一个故障点，死一次就删去它。
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

STEPS = {
    # 监听器：事件到手 → 台账 → 门铃 → 确认
    "event received": ("bridge.events.listener:Listener._handle_batch", "before"),
    "ledger asked": ("bridge.events.handlers:request_imports", "after"),
    "asset asked": ("bridge.events.handlers:_handle", "after"),
    "doorbell rung": ("bridge.queue.broker:SafeJetStreamBroker.ring", "after"),
    "event acknowledged": ("bridge.events.settling:Settler.settle", "after"),
    # 工人：任务到手 → 领取 → 运行建好 → 三个资产 → 运行结束 → 租约释放 → 完成事件 → 任务了结
    "task taken": ("bridge.runs.worker:RunWorker.claim", "before"),
    "days claimed": ("bridge.runs.worker:RunWorker.claim", "after"),
    "run created": ("bridge.runs.worker:RunWorker.start", "after"),
    "orders about to commit": ("etl_assets.services.materialization:judge_fence", "before"),
    "orders committed": ("etl_assets.orders.asset:materialize_orders", "after"),
    "customers committed": ("etl_assets.customers.asset:materialize_customers", "after"),
    "leads committed": ("etl_assets.leads.asset:materialize_leads", "after"),
    "run succeeded": ("bridge.warm_dagster.code_location:CodeLocation.execute_run", "after"),
    "lease released": ("bridge.runs.worker:RunWorker.execute", "after"),
    "completion events published": ("bridge.events.outbox_publisher:delete_published", "before"),
    "completion events deleted": ("bridge.runs.tasks:publish_outbox", "after"),
    "task about to be settled": ("bridge.queue.delivery:Delivery.settle", "before"),
    "task settled": ("bridge.queue.delivery:Delivery.settle", "after"),
}
LISTENER_STEPS = tuple(STEPS)[:5]
OF_IMPORTS = tuple(step for step in STEPS if step != "asset asked")
OF_LEADS = tuple(step for step in STEPS if not step.startswith(("ledger", "orders", "customers")))
"""导入的事件、人改了商机的事件，各经过哪几处。"""


def install(arm_file: Path) -> None:
    """把每个故障点包在它的函数外面。"""
    for step, (place, when) in STEPS.items():
        module, _, path = place.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, import_module(module))
        setattr(owner, name, _mortal(getattr(owner, name), functools.partial(_die_if_armed, arm_file, step), when))


def _mortal(function: Callable[..., Any], die: Callable[[], None], when: str) -> Callable[..., Any]:
    @functools.wraps(function)
    async def asynchronous(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            die()
        result = await function(*arguments, **named)
        if when == "after":
            die()
        return result

    @functools.wraps(function)
    def synchronous(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            die()
        result = function(*arguments, **named)
        if when == "after":
            die()
        return result

    return asynchronous if inspect.iscoroutinefunction(function) else synchronous


def _die_if_armed(arm_file: Path, step: str) -> None:
    with suppress(FileNotFoundError):
        if arm_file.read_text() == step:
            arm_file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    role, arm_path = sys.argv[1:]
    install(Path(arm_path))
    from bridge.cli.commands import run_command

    run_command([role])
