"""Dagster 自己的存储测试在原样的与我们的存储上结果一样；只由 `pdm run test-deep` 跑。

测试在钉住的版本的源码包里，不抄进来：用 pip 取来，留在 pytest 的缓存里。换了 Dagster 的版本，这里先看出什么变了。
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import pytest
import sqlalchemy as sa

from bridge.stack.dagster_home import build_dagster_postgres_url
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.databases import cloned_database

HERE = Path(__file__).parent
SUITES = {"dagster": "dagster_tests", "dagster-postgres": "dagster_postgres_tests"}
_UNASKED = "what an event writes beside itself is one message: how many rows it met is not asked"
INTENDED: Mapping[str, Mapping[str, str]] = {
    "lean": {"TestEventLog::test_duplicate_asset_check_planned_events": _UNASKED},
    "batched": {"TestEventLog::test_duplicate_asset_check_planned_events": _UNASKED},
}
"""有意的不同：测试的名字、为什么。"""
_SCHEMA = "suites"
_RUN_FACTORY = """
from uuid import uuid4
from dagster import DagsterRun

def dagster_run(**values):
    return DagsterRun(**{"job_name": "test-job", "run_id": str(uuid4()), **values})
"""


@pytest.fixture(scope="module")
def suites(pytestconfig: pytest.Config) -> Path:
    """可以放上 PYTHONPATH 的文件夹。没有网络就跳过。"""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir(f"dagster-suites-{version('dagster')}")
    done = folder / "complete"
    if not done.exists():
        pip = shutil.which("pip") or pytest.skip(
            "there is no pip on the PATH that could fetch Dagster's source packages"
        )
        for package, suite in SUITES.items():
            fetch(
                pip,
                [
                    "download",
                    "--no-deps",
                    "--no-binary",
                    ":all:",
                    "--dest",
                    str(folder),
                    f"{package}=={version(package)}",
                ],
            )
            (archive,) = folder.glob(f"{package.replace('-', '_')}-{version(package)}.tar.gz")
            extract(archive, suite, folder)
        fetch(pip, ["install", "--no-deps", "--target", str(folder), "objgraph"])
        # dagster_test 不在源码包里，测试只用它的这一个函数
        factory = folder / "dagster_test" / "utils" / "data_factory.py"
        factory.parent.mkdir(parents=True, exist_ok=True)
        factory.write_text(_RUN_FACTORY)
        done.touch()
    return folder


@pytest.fixture(scope="module")
def stock(
    suites: Path, postgres_url: str, database_template: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    return run_suites("stock", suites, postgres_url, database_template, tmp_path_factory.mktemp("stock"))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("storage", INTENDED)
def test_lean_storages_differ_from_the_stock_ones_only_where_it_is_intended(
    storage: str,
    stock: dict[str, str],
    suites: Path,
    postgres_url: str,
    database_template: str,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    lean = run_suites(storage, suites, postgres_url, database_template, tmp_path)
    passed = {name for name, outcome in stock.items() if outcome == "passed"}
    both = {name for name in passed if lean.get(name) == "passed"}
    pytestconfig.get_terminal_writer().line(
        f"{len(passed)} of {len(stock)} tests pass on the stock storage, {len(both)} of them on {storage}"
    )
    assert len(passed) > 200, "the suites did not run: look at output.log of the stock side"
    assert passed - both == INTENDED[storage].keys(), "output.log of this side says why"


def run_suites(storage: str, suites: Path, postgres_url: str, template: str, folder: Path) -> dict[str, str]:
    """每个测试的结果：passed、failed、error 或 skipped。"""
    results, settings = folder / "results.xml", folder / "pytest.ini"
    settings.write_text("[pytest]\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-c",
        str(settings),
        "--tb=short",
    ]
    # 那里的 test_load_from_config 要一台在 5432 端口上的服务器
    command += [f"--junitxml={results}", "--timeout=120", "-k", "not load_from_config", str(HERE / "storages.py")]
    with cloned_database(postgres_url, template) as url, (folder / "output.log").open("wb") as output:
        create_schema(url)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(suites)]),
            "STORAGE": storage,
            "STORAGE_URL": build_dagster_postgres_url(url, schema=_SCHEMA),
        }
        subprocess.run(command, env=environment, cwd=folder, stdout=output, stderr=output, check=False)
    assert results.exists(), (folder / "output.log").read_text()[-3000:]
    return {
        f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}": outcome_of(case)
        for case in read_cases(results)
    }


def create_schema(url: str) -> None:
    engine = build_engine(EtlSettings(database_url=url))
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(_SCHEMA))
    engine.dispose()


def read_cases(results: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(results).iter("testcase"))  # noqa: S314  # 自己的 pytest 写的


def outcome_of(case: ElementTree.Element) -> str:
    outcomes = {"failure": "failed", "error": "error", "skipped": "skipped"}
    return next((outcomes[child.tag] for child in case if child.tag in outcomes), "passed")


def fetch(pip: str, arguments: list[str]) -> None:
    done = subprocess.run([pip, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"Dagster's source packages cannot be fetched: {done.stderr.strip().splitlines()[-1]}")


def extract(archive: Path, suite: str, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        root = archive.name.removesuffix(".tar.gz")
        members = [member for member in packed.getmembers() if member.name.startswith(f"{root}/{suite}/")]
        for member in members:
            member.name = member.name.removeprefix(f"{root}/")
        packed.extractall(folder, members, filter="data")
    archive.unlink()
