"""集成测试共用的：真的 nats-server，载入了代码的工人。"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from bridge.cli.commands import run_command
from bridge.runs.worker import RunWorker, TakenRun
from bridge.warm_dagster.code_location import CodeLocation
from bridge.warm_dagster.code_location_name import CODE_MODULE, LOCATION_NAME
from etl_assets.core.settings import EtlSettings
from etl_assets.testing.raw_data import RawData

from .commands import use_in_commands
from .etl_import import Import, Said
from .nats_cluster import NatsCluster
from .warm_runs import announce, begin, warm_worker

PASSWORD = "s3cret"


class NatsServer:
    """一个可以杀掉再起来的 nats-server：只听回环地址，要口令，存储在给定的文件夹。"""

    def __init__(self, folder: Path, *, jetstream: bool = True, config: dict[str, Any] | str | None = None) -> None:
        """:param config: 没有命令行选项的设置，例如 max_payload；不止 etl 一个用户时有 authorization 或 accounts。也可以是写好的一段。"""
        self._folder = folder
        self._config = config or {}
        self._jetstream = ["--jetstream", "--store_dir", str(folder / "store")] if jetstream else []
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.password = PASSWORD
        """改了它，下一次 start 就用新的。"""

    @property
    def url(self) -> str:
        return f"nats://etl:{self.password}@127.0.0.1:{self.port}"

    @property
    def store(self) -> Path:
        return self._folder / "store"

    def start(self) -> None:
        program = Path(sysconfig.get_path("scripts")) / "nats-server"
        address = ["--addr", "127.0.0.1", "--port", str(self.port), *self._options()]
        with (self._folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen([program, *address, *self._jetstream], stdout=log, stderr=log)
        self._wait_until_listening()

    def _options(self) -> list[str]:
        config = self._folder / "nats.conf"
        if isinstance(self._config, str):
            config.write_text(self._config)
            return ["--config", str(config)]
        config.write_text(json.dumps(self._config, ensure_ascii=False))  # 它不认 \u
        has_users = self._config.keys() & {"authorization", "accounts", "operator"}
        return ["--config", str(config), *([] if has_users else ["--user", "etl", "--pass", self.password])]

    def stop(self) -> None:
        """好好停下：消费者的状态写盘。"""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """kill -9：最近的消费者状态可能没写盘。"""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def _wait_until_listening(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline, (self._folder / "nats.log").read_text()
                time.sleep(0.01)
            else:
                return


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """这个测试自己的服务器：空的，可以杀。"""
    server = NatsServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def location() -> CodeLocation:
    return CodeLocation(module=CODE_MODULE, attribute="defs", location_name=LOCATION_NAME)


@pytest.fixture
def worker(
    location: CodeLocation,
    engine: sa.Engine,
    etl_settings: EtlSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RunWorker]:
    """一个工人：代码位置、Dagster 实例（SQLite）、引擎。"""
    with warm_worker(location, engine, etl_settings, tmp_path, monkeypatch) as worker:
        yield worker


@pytest.fixture
def of_event(worker: RunWorker, raw_data: RawData, engine: sa.Engine, etl_settings: EtlSettings) -> TakenRun:
    """一个事件要的运行，刚开始做。"""
    announce(engine, etl_settings, raw_data.add_import([{}]))
    claim = worker.claim()
    assert claim is not None
    held = worker.start(claim)
    begin(worker, held.run.run_id)
    return held


@pytest.fixture
def nats_cluster(tmp_path: Path) -> Iterator[NatsCluster]:
    """这个测试自己的三节点集群。"""
    cluster = NatsCluster(tmp_path)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def etl_import(
    engine: sa.Engine,
    etl_settings: EtlSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Import:
    """`etl import` 在本进程里跑，写进这个测试的数据库，不宣布。"""
    monkeypatch.setenv("ETL_STATE_DIR", str(tmp_path / "state"))
    use_in_commands(monkeypatch, engine=engine, settings=etl_settings)
    monkeypatch.setattr("bridge.cli.importing.files.announce", lambda _: None)

    def run(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as ended:
            run_command(["import", *map(str, arguments)])
        captured = capsys.readouterr()
        return Said(int(ended.value.code or 0), captured.out, captured.err)

    return run
