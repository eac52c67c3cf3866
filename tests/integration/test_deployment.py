"""deploy/ 里的部署：每个部分的命令、设置与健康检查，当作进程真的跑一遍。"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
import yaml

from bridge.settings import BridgeSettings
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.testing.databases import cloned_database, database_url
from tests.acceptance.conftest import asking
from tests.acceptance.dagster_ui import DagsterUi
from tests.integration.conftest import NatsServer
from tests.integration.host import eventually, running

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
IMAGE = (DEPLOY / "container" / "Containerfile").read_text()
CONFIGURATION = "/etc/dayline"
"""映像里的 deploy/dagster。"""
PARTS = ("listener", "clicks", "worker", "webserver", "daemon")
ORDERS = "订单编号,店铺名称,买家昵称,订单类型,订单状态,实付金额,数量,下单时间\nA-1,云锦,张三,大货订单,交易成功,9.5,1,2026-03-02 10:15\n"


class Containers(NamedTuple):
    """compose.yaml 的各个部分，换成这台机器上的进程：只有地址与端口不同。"""

    environment: dict[str, str]
    ui_port: int

    def run(self, *command: str) -> str:
        """一个部分里的一条命令；退出码必须是 0。"""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def command(self, words: list[str]) -> list[str]:
        own = {"3000": str(self.ui_port), "0.0.0.0": "127.0.0.1"}  # noqa: S104 容器里的网页应答代理，这里不
        return [own.get(word, word.replace(CONFIGURATION, str(DEPLOY / "dagster"))) for word in words]

    def part(self, name: str) -> list[str]:
        return self.command(COMPOSE["services"][name]["command"])

    def health(self, name: str) -> list[str]:
        """自己的健康检查；没有写的就是映像的。"""
        written = COMPOSE["services"][name].get("healthcheck", {}).get("test")
        own: list[str] = written or json.loads(re.search(r"HEALTHCHECK.*?CMD (\[.*?\])$", IMAGE, re.S | re.M)[1])  # type: ignore[index]
        return [word.replace(":3000/", f":{self.ui_port}/") for word in own if word != "CMD"]


@pytest.fixture
def databases(postgres_url: str) -> Iterator[tuple[str, str]]:
    """空的数据库，与还没有的 Dagster 的数据库。"""
    with cloned_database(postgres_url, "template1") as data:
        name = f"{sa.make_url(data).database}_dagster"
        yield data, database_url(postgres_url, name)
        engine = sa.create_engine(sa.make_url(data), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@pytest.fixture
def containers(databases: tuple[str, str], nats_server: NatsServer, tmp_path: Path) -> Iterator[Containers]:
    data, dagster = databases
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ETL_", "DAGSTER_"))}
    written = re.search(r"^ENV (PATH.*?)^USER", IMAGE, re.S | re.M)[1].replace("\\\n", "")  # type: ignore[index]
    of_image = dict(pair.split("=", 1) for pair in shlex.split(written))
    of_parts = {
        "ETL_DATABASE_URL": data,
        "DAGSTER_POSTGRES_URL": sa.make_url(dagster)
        .set(drivername="postgresql+psycopg2")
        .render_as_string(hide_password=False),
        "ETL_NATS_URL": nats_server.url,
        "ETL_TIMEZONE": "Asia/Shanghai",
        "ETL_ALERT_URLS": "",
    }
    assert of_parts.keys() == COMPOSE["x-part"]["environment"].keys()
    environment = {
        **inherited,
        **of_image,
        **of_parts,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}",
        "DAGSTER_HOME": str(DEPLOY / "dagster"),
        "ETL_STATE_DIR": str(tmp_path / "state"),
        "ETL_METRICS_PORT": str(find_free_port()),
    }
    made = Containers(environment, find_free_port())
    made.run(*made.part("migrate"))
    with ExitStack() as parts:
        for name in PARTS:
            parts.enter_context(running(made.part(name), environment=environment, log=tmp_path / f"{name}.log"))
        yield made


@pytest.mark.timeout(600)
def test_parts_of_the_compose_file_work_together(
    containers: Containers, databases: tuple[str, str], tmp_path: Path
) -> None:
    before = sorted(path.name for path in (DEPLOY / "dagster").iterdir())
    (tmp_path / "orders.csv").write_text(ORDERS)
    made = containers.run("etl", "import", "--create-shops", str(tmp_path / "orders.csv")).strip()
    containers.run("etl", "wait", "--import-id", made, "--timeout", "200")
    engine = build_engine(EtlSettings(database_url=databases[0]))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT order_id FROM orders").scalars().all() == ["A-1"]
    engine.dispose()

    ui = DagsterUi(asking(f"http://127.0.0.1:{containers.ui_port}"))
    run_id = eventually(lambda: ui.launch(day="2026-03-02"), "the webserver does not answer", 200)
    assert ui.wait(run_id, timeout_seconds=200)["status"] == "SUCCESS"

    for name in PARTS:
        eventually(lambda name=name: healthy(containers, name), f"{name} is not healthy", 200)
    nobody = containers._replace(
        environment={**containers.environment, "ETL_METRICS_PORT": str(find_free_port())}, ui_port=find_free_port()
    )
    assert not healthy(nobody, "worker")
    assert not healthy(nobody, "webserver")
    # DAGSTER_HOME 在只读的文件系统里
    assert sorted(path.name for path in (DEPLOY / "dagster").iterdir()) == before


def healthy(containers: Containers, name: str) -> bool:
    found = subprocess.run(
        containers.health(name), env=containers.environment, capture_output=True, timeout=60, check=False
    )
    return found.returncode == 0


def test_every_setting_in_the_files_exists() -> None:
    known = {f"ETL_{name.upper()}" for model in (EtlSettings, BridgeSettings) for name in model.model_fields}
    named = {
        (str(path.relative_to(DEPLOY)), found)
        for folder in ("compose", "container", "kubernetes", "systemd")
        for path in (DEPLOY / folder).rglob("*")
        if path.is_file()
        for found in re.findall(r"\bETL_[A-Z_]+", path.read_text())
    }
    assert {found for _, found in named} - known == {"ETL_STATE_DIR"}


def commands_of_kubernetes() -> dict[str, Any]:
    documents = [
        document
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]
    return {
        container["name"]: container["command"]
        for document in documents
        if document["kind"] in ("Deployment", "Job")
        for container in document["spec"]["template"]["spec"]["containers"]
    }


def test_kubernetes_and_systemd_run_what_the_compose_file_runs() -> None:
    of_compose = {name: COMPOSE["services"][name]["command"] for name in ("migrate", *PARTS)}
    # 那里一个 pod 一个工人，多少个由队列定
    assert commands_of_kubernetes() == {**of_compose, "worker": ["etl", "worker"]}
    units = {
        path.stem: re.search(r"^ExecStart=/opt/dayline/.venv/bin/(.*)$", path.read_text(), re.M)[1]  # type: ignore[index]
        for path in (DEPLOY / "systemd").glob("*.service")
    }
    shown = {name: shlex.join(command).replace("0.0.0.0", "127.0.0.1") for name, command in of_compose.items()}  # noqa: S104 只是比较
    assert units == {
        "dayline-listener": shown["listener"],
        "dayline-clicks": shown["clicks"],
        "dayline-workers": "etl worker --processes 4",
        "dayline-webserver": shown["webserver"],
        "dayline-daemon": shown["daemon"],
    }
