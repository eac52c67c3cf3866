"""全部测试共用的夹具：就是提供给用户的那一套；以及 Hypothesis 试多少例子。"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

from etl_assets.testing.databases import template_database
from tests.the_three import graph

pytest_plugins = ["etl_assets.testing.fixtures", "tests.hung_tests"]

# 平时：每轮都一样的例子，不会偶尔红
settings.register_profile("normal", max_examples=50, derandomize=True, deadline=None, database=None)
# --hypothesis-profile=deep：每轮都是新的例子；失败时印出怎样重放
settings.register_profile("deep", max_examples=2000, derandomize=False, deadline=None, database=None, print_blob=True)
settings.load_profile("normal")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "tests/chaos")
    group.addoption(
        "--minutes", type=float, help="how long the chaos lasts, with its full limits [default: one minute, patiently]"
    )
    group.addoption("--seed", type=int, help="seed of the chaos [default: a new one, printed]")
    group.addoption("--cluster", action="store_true", help="NATS is a cluster of three nodes, whose leaders are killed")


@pytest.fixture(scope="session")
def database_template(postgres_url: str) -> Iterator[str]:
    """像给用户的那个，但台账只走三个资产。"""
    with template_database(postgres_url, graph) as name:
        yield name


@pytest.fixture(scope="session", autouse=True)
def _loggers_can_be_captured() -> Iterator[None]:
    """在本进程里跑命令的测试会设置日志；设置之后用过的日志器若记住了它，`capture_logs` 就再也看不见那个日志器。"""
    configure = structlog.configure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structlog, "configure", lambda **given: configure(**given | {"cache_logger_on_first_use": False}))
        yield


@pytest.fixture(autouse=True)
def _nobody_elses_logging() -> Iterator[None]:
    """这个测试给日志的设置、起的名字，后面的测试不该带着。"""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()
