"""验收测试的夹具：一个真的栈，全部验收测试共用，之后的测试不再背着它；命令行像用户那样调。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa

from bridge.settings import BridgeSettings
from bridge.stack.addresses import StackAddresses
from bridge.stack.local import Stack
from etl_assets.core.business_day import DayRange
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders, shop_configs
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.ledger.locks import lock_days

DATA = Path(__file__).parents[3] / "shared" / "data"
PARTITIONS_START = "1997-01-01"
Etl = Callable[..., subprocess.CompletedProcess[str]]
Query = Callable[..., dict[str, Any]]
AddOrders = Callable[..., None]


@pytest.fixture(scope="package")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack") / "state"


@pytest.fixture(scope="package")
def stack(state_dir: Path) -> Iterator[StackAddresses]:
    """PostgreSQL、NATS、Dagster 网页与守护进程、监听器、两个工人；分区从 1997 年起，样例文件才都进得去。"""
    local = Stack(
        state_dir,
        settings=EtlSettings(database_url=""),
        bridge_settings=BridgeSettings(nats_url=""),
        port=find_free_port(),  # 几个测试进程同时起栈；都要 3000 的话，后绑定的那个起不来
        durable=False,
        workers=2,
    )
    with pytest.MonkeyPatch.context() as patch:  # 子进程启动时带走环境变量；别的测试看不到它
        patch.setenv("ETL_PARTITIONS_START", PARTITIONS_START)
        patch.setenv("ETL_UNANNOUNCED_AFTER_SECONDS", "86400")  # 有的测试写下导入而不宣布，由自己要求日子
        addresses = local.start()
    yield addresses
    local.stop()
    assert_nothing_secret_is_logged(state_dir, addresses)


def assert_nothing_secret_is_logged(state_dir: Path, addresses: StackAddresses) -> None:
    """全部验收测试里这个栈的每个进程、两台服务器写下的。"""
    owners = {
        password
        for url in (addresses.database_url, addresses.nats_url, addresses.dagster_postgres_url)
        if (password := urllib.parse.urlsplit(url).password)
    }
    secrets = {path.read_text() for server in ("postgres", "nats") for path in (state_dir / server).glob("password*")}
    assert owners
    assert owners < secrets
    logs = state_dir / "logs"
    written = {log.name: log.read_text(encoding="utf-8", errors="replace") for log in logs.iterdir() if log.is_file()}
    assert written
    assert [name for name, text in written.items() if any(secret in text for secret in secrets)] == []


@pytest.fixture(scope="package")
def stack_settings(stack: StackAddresses) -> EtlSettings:
    return EtlSettings(database_url=stack.database_url, partitions_start=date.fromisoformat(PARTITIONS_START))


@pytest.fixture(scope="package")
def stack_engine(stack_settings: EtlSettings) -> Iterator[sa.Engine]:
    engine = build_engine(stack_settings)
    yield engine
    engine.dispose()


@pytest.fixture(scope="package")
def etl(stack: StackAddresses) -> Etl:
    """`etl("wait", "--import-id", …)`：在子进程里运行命令，检查退出码（缺省 0）。"""
    state_dir = str(Path(stack.dagster_home).parent)

    def run(*arguments: str, exit_code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETL_")}
        command = [sys.executable, "-m", "bridge.cli.main", *arguments]
        result = subprocess.run(
            command,
            env={**environment, "ETL_STATE_DIR": state_dir, "ETL_PARTITIONS_START": PARTITIONS_START},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == exit_code, result.stderr
        return result

    return run


@pytest.fixture(scope="package")
def query(stack: StackAddresses) -> Query:
    return asking(stack.ui_url)


def asking(ui_url: str) -> Query:
    """向 Dagster 网页发一个 GraphQL 查询。"""

    def ask(text: str, **variables: Any) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310  # 地址是自己的栈
            f"{ui_url}/graphql",
            json.dumps({"query": text, "variables": variables}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  # 同上
            answer: dict[str, Any] = json.load(response)
        assert "errors" not in answer, answer
        data: dict[str, Any] = answer["data"]
        return data

    return ask


@pytest.fixture(scope="package")
def shop(stack_engine: sa.Engine) -> str:
    with stack_engine.begin() as connection:
        connection.execute(sa.insert(shop_configs).values(shop_id=uuid4(), shop_name="网页店", platform="test"))
    return "网页店"


@pytest.fixture
def add_orders(stack_engine: sa.Engine, shop: str) -> AddOrders:
    """一次完成的导入，没有事件：`add_orders(日子, *订单号, amount=金额, customer=客户)`。"""

    def add(day: date, *order_ids: str, amount: int = 1, customer: str = "网页客户") -> None:
        import_id = uuid4()
        ordered_at = datetime.combine(day, time(4), UTC)
        row = {
            "import_id": import_id,
            "shop": shop,
            "customer_name": customer,
            "ordered_at": ordered_at,
            "amount": amount,
        }
        with stack_engine.begin() as connection:
            connection.execute(
                sa.insert(import_tasks).values(import_id=import_id, status="completed", completed_at=datetime.now(UTC))
            )
            connection.execute(sa.insert(raw_orders), [row | {"order_id": order_id} for order_id in order_ids])

    return add


@contextmanager
def held_day(engine: sa.Engine, day: date) -> Iterator[None]:
    """占住一天的锁：做这一天的运行在第一条要锁的语句上等着。"""
    with engine.connect() as connection, connection.begin():
        lock_days(connection, "public", DayRange(day, day))
        yield
