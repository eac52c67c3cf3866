"""栈里除数据库与 NATS 以外的子进程：代码服务器、网页、守护进程、监听者、工人。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from bridge.stack.forkserver import ForkedProcess, Forkserver
from bridge.stack.readiness import listens_on, logged_ready
from bridge.stack.supervisor import Service
from bridge.warm_dagster.code_location_name import CODE_MODULE, LOCATION_NAME

CODE_SERVER = "code-server"
FORKSERVER = "forkserver"
ROLES = ("ui", "listener", "worker")
"""子进程们的角色（bridge.roles.nats）；在 PostgreSQL 里都是 dayline_etl。"""
_PATIENT_SECONDS = 30.0
"""停下自己要好几秒的：闲着时守护进程四五秒、代码服务器三秒，机器忙时几倍；工人还要收尾。到时才杀，正常停下就没有吓人的一行。"""


@dataclass(frozen=True)
class ApplicationPlan:
    """各子进程要知道的：由哪个模子 fork、环境变量、端口、网页在哪个（监督者的）描述符上应答、工人的个数。

    environment 里的地址是主人的；logins 是角色 → 换成它自己的登录的那几个变量，只有内嵌的服务器有。
    """

    forkserver: Forkserver
    environment: Mapping[str, str]
    workspace: Path
    code_server_port: int
    ui_descriptor: int
    workers: int
    logins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def as_role(self, role: str) -> ApplicationPlan:
        return replace(self, environment={**self.environment, **self.logins.get(role, {})})


ApplicationServices = Callable[[ApplicationPlan], list[Service]]


def application_services(plan: ApplicationPlan) -> list[Service]:
    """都由模子 fork。网页与守护进程等代码服务器，免得它们空连。"""
    code = ("--module-name", CODE_MODULE, "--location-name", LOCATION_NAME, "--empty-working-directory")
    # 代码有错时 lazy 的服务器照样起来，网页上看得见是什么错
    options = ("--use-python-environment-entry-point", "--lazy-load-user-code", "--log-format", "json")
    ui, listener, worker = map(plan.as_role, ROLES)
    code_server = ("api", "grpc", "--host", "127.0.0.1", "--port", str(plan.code_server_port), *code, *options)
    ui_descriptor = str(plan.ui_descriptor)
    services = [
        Service(
            CODE_SERVER,
            _python(ui, "bridge.warm_dagster.code_server", *code_server),
            listens_on(plan.code_server_port),
            stop_timeout_seconds=_PATIENT_SECONDS,
        ),
        Service("listener", _python(listener, "bridge.cli.main", "listen"), logged_ready),
        *(
            Service(
                f"worker-{number}",
                _python(worker, "bridge.cli.main", "worker", *lanes),
                logged_ready,
                stop_timeout_seconds=_PATIENT_SECONDS,
            )
            for number, lanes in enumerate(_worker_lanes(plan.workers), start=1)
        ),
        Service(
            "webserver",
            _python(
                ui,
                "bridge.warm_dagster.webserver",
                ui_descriptor,
                str(plan.workspace),
                inherited_fds=(plan.ui_descriptor,),
            ),
            logged_ready,
            after=(CODE_SERVER,),
        ),
        Service(
            "daemon",
            # 代码服务器重新起来的那几秒，资产图是空的：做着的回填等它，不就此失败
            _python(
                replace(ui, environment={**ui.environment, "DAGSTER_BACKFILL_RETRY_DEFINITION_CHANGED_ERROR": "1"}),
                "bridge.warm_dagster.daemon",
                str(plan.workspace),
            ),
            after=(CODE_SERVER,),
            stop_timeout_seconds=_PATIENT_SECONDS,
        ),
    ]
    return [replace(service, after=(FORKSERVER, *service.after)) for service in services]


def _worker_lanes(workers: int) -> list[tuple[str, ...]]:
    """有两个以上的工人时，第一个留给人的点击：再长的队伍也不让人等；闲着时它做小的日子，事件也就不等大的运行。"""
    reserved = [("--lanes", "interactive,small")] if workers > 1 else []
    return [*reserved, *([()] * (workers - len(reserved)))]


def _python(
    plan: ApplicationPlan, module: str, *arguments: str, inherited_fds: Sequence[int] = ()
) -> Callable[[IO[bytes]], ForkedProcess]:
    """`python -P -m module`。`-P`：当前文件夹里碰巧同名的文件不会顶替我们的模块。"""
    fork = plan.forkserver.fork
    return lambda log: fork(log, module, *arguments, environment=plan.environment, inherited_fds=inherited_fds)
