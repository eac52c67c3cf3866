"""栈里除数据库与 NATS 以外的子进程：代码服务器、网页、守护进程、监听者、工人。"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from subprocess import Popen

from bridge.stack.readiness import listens_on, logged_ready
from bridge.stack.supervisor import Service
from bridge.warm_dagster.code_location_name import CODE_MODULE, LOCATION_NAME
from etl_assets.embedded.child_process import launch

CODE_SERVER = "code-server"


@dataclass(frozen=True)
class ApplicationPlan:
    """各子进程要知道的：环境变量、端口、网页在哪个（监督者的）描述符上应答、工人的个数。"""

    environment: Mapping[str, str]
    workspace: Path
    code_server_port: int
    ui_descriptor: int
    workers: int


ApplicationServices = Callable[[ApplicationPlan], list[Service]]


def application_services(plan: ApplicationPlan) -> list[Service]:
    """导入 Dagster 要两到五秒 CPU：代码服务器与工人先占满核，网页与守护进程等代码服务器，免得它们空连。"""
    code = ("--module-name", CODE_MODULE, "--location-name", LOCATION_NAME, "--empty-working-directory")
    json_log = ("--log-format", "json")
    # 代码有错时 lazy 的服务器照样起来，网页上看得见是什么错
    options = ("--use-python-environment-entry-point", "--lazy-load-user-code", *json_log)
    code_server = ("api", "grpc", "--host", "127.0.0.1", "--port", str(plan.code_server_port), *code, *options)
    ui_descriptor = str(plan.ui_descriptor)
    return [
        Service(CODE_SERVER, _python(plan, "dagster", *code_server), listens_on(plan.code_server_port)),
        Service("listener", _python(plan, "bridge.cli.main", "listen"), logged_ready),
        *(
            Service(f"worker-{number}", _python(plan, "bridge.cli.main", "worker", *lanes), logged_ready, stop_timeout_seconds=30)
            for number, lanes in enumerate(_worker_lanes(plan.workers), start=1)
        ),
        Service(
            "webserver",
            _python(plan, "bridge.warm_dagster.webserver", ui_descriptor, str(plan.workspace), inherited_fds=(plan.ui_descriptor,)),
            logged_ready,
            after=(CODE_SERVER,),
        ),
        Service("daemon", _python(plan, "dagster._daemon", "run", "--workspace", str(plan.workspace), *json_log), after=(CODE_SERVER,)),
    ]


def _worker_lanes(workers: int) -> list[tuple[str, ...]]:
    """有两个以上的工人时，第一个留给人的点击：再长的队伍也不让人等；闲着时它做小的日子，事件也就不等大的运行。"""
    reserved = [("--lanes", "interactive,small")] if workers > 1 else []
    return [*reserved, *([()] * (workers - len(reserved)))]


def _python(plan: ApplicationPlan, module: str, *arguments: str, inherited_fds: Sequence[int] = ()) -> partial[Popen[bytes]]:
    """`-P`：当前文件夹里碰巧同名的文件不会顶替我们的模块。"""
    return partial(launch, [sys.executable, "-P", "-m", module, *arguments], env=plan.environment, inherited_fds=inherited_fds)
