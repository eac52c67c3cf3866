"""引擎的测试共用一个数据库与一个引擎，每个测试开头清空：比每次克隆快得多，语句也只编译一次。"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor

import pytest
import sqlalchemy as sa

from etl_assets.core.settings import EtlSettings
from tests.integration.engine.chain import Chain, cloned_chain
from tests.integration.engine.workers import start_workers


@pytest.fixture(scope="session")
def shared_chain(postgres_url: str, database_template: str) -> Iterator[Chain]:
    with cloned_chain(postgres_url, database_template) as chain:
        yield chain


@pytest.fixture
def chain(shared_chain: Chain) -> Chain:
    """空数据库上的资产链。"""
    shared_chain.empty_database()
    return shared_chain


@pytest.fixture
def engine(chain: Chain) -> sa.Engine:
    return chain.engine


@pytest.fixture
def etl_settings(chain: Chain) -> EtlSettings:
    return chain.settings


@pytest.fixture(scope="session")
def worker_processes(shared_chain: Chain) -> Iterator[Executor]:  # noqa: ARG001  # 只为先后
    """两个工人进程；`shared_chain` 的数据库比它们活得久。"""
    with start_workers(2) as processes:
        yield processes
