"""原样的 Dagster：缺省是同一个代码位置，同一个数据库，缺省的协调者与启动者，照它自己的文档分别起网页、守护进程与代码服务器。"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bridge.stack.addresses import StackAddresses
from bridge.stack.dagster_home import build_dagster_postgres_url, create_dagster_storage, write_workspace
from bridge.stack.readiness import Attempt, ReadinessCheck, listens_on, started
from bridge.stack.supervisor import Service, Supervisor
from bridge.warm_dagster.code_location_name import CODE_MODULE, LOCATION_NAME
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.child_process import launch
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.embedded.private_folder import create_private_folder, write_private_file

SCHEMA = "stock_dagster"
_READY_SECONDS = 120


def _answers_http(url: str) -> ReadinessCheck:
    """GET 返回 200。"""

    def check(_attempt: Attempt) -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310 地址由我们拼成，只指向本机
                return bool(response.status == 200)
        except OSError:
            return False

    return check


@contextmanager
def stock_dagster(
    folder: Path, addresses: StackAddresses, environment: dict[str, str], *, code_module: str = CODE_MODULE
) -> Iterator[str]:
    """与我们的栈并排的一套；给出它的网页地址。"""
    home = folder / "home"
    create_private_folder(home)
    storage = {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}}
    write_private_file(home / "dagster.yaml", json.dumps({"storage": storage, "telemetry": {"enabled": False}}))
    url = build_dagster_postgres_url(addresses.database_url, schema=SCHEMA)
    environment = environment | {"DAGSTER_HOME": str(home), "DAGSTER_POSTGRES_URL": url}
    engine = build_engine(EtlSettings(database_url=addresses.database_url))
    create_dagster_storage(engine, schema=SCHEMA, environment=environment, log_path=folder / "storage.log")
    engine.dispose()
    code_port, ui_port = find_free_port(), find_free_port()
    workspace = folder / "workspace.yaml"
    write_workspace(workspace, code_server_port=code_port)

    local = ("--host", "127.0.0.1", "--port")
    code = (
        "dagster",
        "api",
        "grpc",
        *local,
        str(code_port),
        "--module-name",
        code_module,
        "--location-name",
        LOCATION_NAME,
    )
    web = ("dagster_webserver", *local, str(ui_port), "--workspace", str(workspace))
    daemon = ("dagster._daemon", "run", "--workspace", str(workspace))
    ui_url = f"http://127.0.0.1:{ui_port}"

    def service(
        name: str, arguments: tuple[str, ...], is_ready: ReadinessCheck = started, after: tuple[str, ...] = ()
    ) -> Service:
        command = [sys.executable, "-P", "-m", *arguments]
        return Service(name, partial(launch, command, env=environment), is_ready, after=after)

    supervisor = Supervisor(folder / "state")
    supervisor.start()
    try:
        supervisor.supervise(
            [
                service("code-server", code, listens_on(code_port)),
                service("webserver", web, _answers_http(f"{ui_url}/server_info"), after=("code-server",)),
                service("daemon", daemon, after=("code-server",)),
            ]
        )
        supervisor.wait_until_ready(timeout_seconds=_READY_SECONDS)
        yield ui_url
    finally:
        supervisor.stop()
