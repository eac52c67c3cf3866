"""换版本、重启，都在负载当中：一个导入也不丢，一个运行也不做两遍，不用停下来。"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from bridge.demo.reference import find_differences
from bridge.events import DataImportCompleted
from bridge.events.publish import EventPublisher, publish_event_sync
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.settings import BridgeSettings
from bridge.stack.dagster_home import build_dagster_postgres_url
from bridge.stack.local import Stack
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.core.tables import import_tasks, raw_orders
from etl_assets.definitions import graph
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.migrations.upgrade import missing_migrations
from etl_assets.testing.databases import cloned_database, initialize_database
from etl_assets.testing.raw_data import SAMPLE_ORDER, RawData
from tests.chaos.installation import ROLES, running_installation
from tests.chaos.verdict import held_days, runs_by_status
from tests.integration.conftest import NatsServer
from tests.integration.host import eventually
from tests.integration.old_version import OldProcess, run_old, unpack

FIRST = datetime(2026, 1, 5, 4, tzinfo=UTC)
COMMANDS = {role: [sys.executable, "-m", "bridge.cli.main", role] for role in ROLES}
WORKERS = ("worker", "worker-2")
# 0.1.0 的 Dagster 与它的存储：用它自己的代码建
OLD_HOME = """
import os, sys
from pathlib import Path
from bridge.stack.dagster_home import DAGSTER_SCHEMA, create_dagster_storage, write_dagster_home
from etl_assets.core.database_sync import get_engine
write_dagster_home(Path(os.environ["DAGSTER_HOME"]))
log = Path(sys.argv[1])
create_dagster_storage(get_engine(), schema=DAGSTER_SCHEMA, environment=dict(os.environ), log_path=log)
"""

# 0.1.0 的一整个栈：导入一个订单，进了表就停下
OLD_STACK = """
import sys, time
from pathlib import Path
import sqlalchemy as sa
from bridge.events.publish import publish_event_sync
from bridge.events import DataImportCompleted
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.settings import BridgeSettings
from bridge.stack.local import Stack
from etl_assets.core.database_sync import build_engine
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData
folder, port = Path(sys.argv[1]), int(sys.argv[2])
settings, nats = EtlSettings(database_url=""), BridgeSettings(nats_url="")
with Stack(folder, settings=settings, bridge_settings=nats, port=port, workers=1, durable=False) as addresses:
    engine = build_engine(EtlSettings(database_url=addresses.database_url))
    import_id = RawData(engine).add_import([{"order_id": "before"}])
    event, nats = DataImportCompleted(import_id=import_id), BridgeSettings(nats_url=addresses.nats_url)
    publish_event_sync(DATA_IMPORT_COMPLETED, event, settings=nats)
    done = sa.text("SELECT EXISTS (SELECT FROM business_leads) AND NOT EXISTS (SELECT FROM etl.outbox)")
    deadline = time.monotonic() + 120
    while True:
        with engine.connect() as connection:
            if connection.scalar(done):
                break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    engine.dispose()
"""


class Load:
    """一个线程：一天一次导入，一天接着一天，隔一会儿一次。"""

    def __init__(self, engine: sa.Engine, nats_url: str, *, pause_seconds: float) -> None:
        self.imports: dict[UUID, str] = {}
        """导入 → 它的那一天。"""
        self._raw_data = RawData(engine)
        self._settings = BridgeSettings(nats_url=nats_url)
        self._pause_seconds = pause_seconds
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

    def has_made(self, count: int) -> Callable[[], bool]:
        """此后又做了这么多次。"""
        wanted = len(self.imports) + count
        return lambda: len(self.imports) >= wanted or self._error is not None

    def _run(self) -> None:
        try:
            asyncio.run(self._announce())
        except BaseException as error:  # noqa: BLE001  # 交给主线程抛出
            self._error = error

    async def _announce(self) -> None:
        async with EventPublisher(self._settings) as publisher:
            while not self._stopping.is_set():
                ordered_at = FIRST + timedelta(days=len(self.imports))
                row = {
                    "order_id": f"U-{len(self.imports)}",
                    "ordered_at": ordered_at,
                    "customer_name": f"客户{len(self.imports) % 7}",
                }
                import_id = self._raw_data.add_import([row], completed_at=datetime.now(UTC))
                self.imports[import_id] = ordered_at.date().isoformat()
                await publisher.publish(DATA_IMPORT_COMPLETED, DataImportCompleted(import_id=import_id))
                await asyncio.sleep(self._pause_seconds)


@pytest.mark.timeout(900)
def test_workers_restarted_one_after_the_other_lose_and_double_nothing(
    postgres_url: str, database_template: str, nats_server: NatsServer, tmp_path: Path, is_deep: bool
) -> None:
    """像 Deployment 换版本那样：一个好好停下，新的就绪了才轮到下一个。"""
    commands = {**COMMANDS, **dict.fromkeys(WORKERS, COMMANDS["worker"])}
    with (
        cloned_database(postgres_url, database_template) as url,
        running_installation(tmp_path, database_url=url, nats_url=nats_server.url, commands=commands) as installation,
    ):
        load = Load(installation.engine, nats_server.url, pause_seconds=0.5)
        with load.going_on():
            for round_number in range(12 if is_deep else 2):
                for worker in WORKERS:
                    eventually(load.has_made(3), "no load")
                    installation.processes[worker].terminate()
                    installation.eventually(
                        lambda worker=worker, wanted=round_number + 2: (
                            installation.log(worker).count('"ready"') >= wanted
                        ),  # type: ignore[misc]
                        f"{worker} is not ready again",
                        timeout_seconds=240,
                    )
        for import_id in load.imports:
            installation.eventually(lambda made=import_id: installation.is_done(made), "not in the tables")  # type: ignore[misc]
        made = {day: installation.completions(day) for day in load.imports.values()}
        assert made == dict.fromkeys(load.imports.values(), dict.fromkeys(graph.names, 1))
        assert runs_by_status(installation.engine).keys() == {"SUCCESS"}
        assert find_differences(installation.engine, installation.settings) == []


@pytest.mark.timeout(900)
def test_upgrade_from_the_version_before_under_load_loses_nothing(
    postgres_url: str, nats_server: NatsServer, tmp_path: Path, is_deep: bool
) -> None:
    """0.1.0 建的数据库，它的监听器与工人；init-db 在它们做着的时候；两个版本并排；然后旧的停下。"""
    size = 60 if is_deep else 6
    with cloned_database(postgres_url, "template0") as url:
        old = tmp_path / "old"
        unpack(old)
        environment = {
            "ETL_DATABASE_URL": url,
            "ETL_NATS_URL": nats_server.url,
            "DAGSTER_HOME": str(old / "home"),
            "DAGSTER_POSTGRES_URL": build_dagster_postgres_url(url),
            "ETL_LEASE_SECONDS": "3",
        }
        run_old(old, "-m", "bridge.cli.main", "init-db", environment=environment)
        run_old(old, "-c", OLD_HOME, str(old / "migrate.log"), environment=environment)
        engine = build_engine(EtlSettings(database_url=url))
        processes = [OldProcess(old, command=role, **environment) for role in ROLES]
        load = Load(engine, nats_server.url, pause_seconds=0.2)
        try:
            for process in processes:
                process.start()
            eventually(lambda: all(process.is_ready for process in processes), "0.1.0 does not become ready")
            with ExitStack() as cleanup:
                with load.going_on():
                    eventually(load.has_made(size), "no load")
                    initialize_database(engine)
                    assert missing_migrations(engine) == []
                    eventually(load.has_made(size), "no load")
                    installation = cleanup.enter_context(
                        running_installation(
                            tmp_path, database_url=url, nats_url=nats_server.url, commands=dict(COMMANDS)
                        )
                    )
                    eventually(load.has_made(size), "no load")
                    for process in processes:
                        process.stop()
                    eventually(load.has_made(size), "no load")
                for import_id in load.imports:
                    installation.eventually(lambda made=import_id: installation.is_done(made), "not in the tables")  # type: ignore[misc]
                assert held_days(engine) == []
                assert installation.unfinished_runs() == []
                assert find_differences(engine, installation.settings) == []
        finally:
            for process in processes:
                process.kill()
            engine.dispose()


@pytest.mark.timeout(600)
def test_state_folder_of_the_version_before_starts_and_goes_on(tmp_path: Path) -> None:
    """数据库、消息、Dagster 的历史都是 0.1.0 留下的：起得来，原来的都在，新的接着做。"""
    old, state_dir = tmp_path / "old", tmp_path / "state"
    unpack(old)
    run_old(old, "-c", OLD_STACK, str(state_dir), str(find_free_port()), environment={})
    stack = Stack(
        state_dir,
        settings=EtlSettings(database_url=""),
        bridge_settings=BridgeSettings(nats_url=""),
        port=find_free_port(),
        workers=1,
        durable=False,
    )
    with stack as addresses:
        settings = EtlSettings(database_url=addresses.database_url)
        engine = build_engine(settings)
        assert missing_migrations(engine) == []
        runs_before = runs_by_status(engine)
        assert runs_before["SUCCESS"] >= 1
        assert find_differences(engine, settings) == []
        with engine.begin() as connection:
            import_id = uuid4()
            row = {**SAMPLE_ORDER, "order_id": "after", "import_id": import_id, "amount": "7.00"}
            connection.execute(
                sa.insert(import_tasks).values(import_id=import_id, status="completed", completed_at=sa.func.now())
            )
            connection.execute(sa.insert(raw_orders).values(row))
        event = DataImportCompleted(import_id=import_id)
        publish_event_sync(DATA_IMPORT_COMPLETED, event, settings=BridgeSettings(nats_url=addresses.nats_url))
        eventually(lambda: find_differences(engine, settings) == [], "the new import is not in the tables")
        eventually(lambda: runs_by_status(engine)["SUCCESS"] > runs_before["SUCCESS"], "no run has ended")
        assert held_days(engine) == []
        engine.dispose()
