"""生成的 DAGSTER_HOME：Dagster 自己能读懂，而且里面没有口令。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml
from dagster._core.instance.config import dagster_instance_config

from bridge.stack.dagster_home import build_dagster_postgres_url, write_dagster_home


def test_dagster_accepts_the_generated_settings(tmp_path: Path) -> None:
    write_dagster_home(tmp_path)

    config, _ = dagster_instance_config(str(tmp_path))

    assert config["storage"] == {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}}
    assert config["telemetry"] == {"enabled": False}
    assert config["local_artifact_storage"]["config"]["base_dir"].startswith(str(tmp_path))
    assert config["run_coordinator"]["module"] == "bridge.run_coordinator"
    assert config["run_launcher"]["module"] == "bridge.run_launcher"


@pytest.mark.parametrize("page", ["operate.md", "operate.zh-CN.md"])
def test_page_gives_operators_the_settings_of_the_stack(tmp_path: Path, page: str) -> None:
    write_dagster_home(tmp_path)
    generated = yaml.safe_load((tmp_path / "dagster.yaml").read_text(encoding="utf-8"))
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")

    (shown,) = [yaml.safe_load(each) for each in re.findall(r"```yaml\n(storage:.*?)```", text, re.DOTALL)]

    assert shown == {name: generated[name] for name in shown}
    assert {"storage", "run_coordinator", "run_launcher", "compute_logs"} <= shown.keys()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("postgres://etl:p%40ss@db:5432/shop", ""),
        ("postgresql+psycopg://etl:p%40ss@db:5432/shop?options=-cwork_mem%3D8MB", "-cwork_mem=8MB "),
    ],
)
def test_dagster_uses_its_own_schema_of_the_same_database(given: str, kept: str) -> None:
    url = sa.make_url(build_dagster_postgres_url(given))

    assert (url.drivername, url.password, url.host, url.database) == ("postgresql+psycopg2", "p@ss", "db", "shop")
    own = r'-cclient_encoding=UTF8 -cdatestyle=ISO -ctimezone=UTC -cdefault_transaction_isolation=read\ committed -csearch_path="dagster"'
    assert url.query["options"] == kept + own


def test_dagster_processes_give_up_a_silent_server_as_the_address_says_or_by_our_patience() -> None:
    url = sa.make_url(build_dagster_postgres_url("postgresql://etl@db/shop?keepalives_idle=60"))

    assert {name: value for name, value in url.query.items() if name != "options"} == {
        "connect_timeout": "5",
        "keepalives": "1",
        "keepalives_idle": "60",
        "keepalives_interval": "2",
        "keepalives_count": "3",
        "tcp_user_timeout": "30000",
    }
