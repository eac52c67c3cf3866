"""集成测试共用的：真的 nats-server，载入了代码的工人。"""

from __future__ import annotations

import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance

from bridge.code_location import CODE_MODULE, LOCATION_NAME
from bridge.dagster_adapter import CodeLocation
from bridge.run_worker import RunWorker
from etl_assets.core.settings import EtlSettings

PASSWORD = "s3cret"


class NatsServer:
    """一个可以杀掉再起来的 nats-server：只听回环地址，要口令，存储在给定的文件夹。"""

    def __init__(self, folder: Path, *, jetstream: bool = True) -> None:
        self._folder = folder
        self._jetstream = ["--jetstream", "--store_dir", str(folder / "store")] if jetstream else []
        self._process: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"nats://etl:{PASSWORD}@127.0.0.1:{self.port}"

    def start(self) -> None:
        program = Path(sysconfig.get_path("scripts")) / "nats-server"
        address = ["--addr", "127.0.0.1", "--port", str(self.port), "--user", "etl", "--pass", PASSWORD]
        with (self._folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen([program, *address, *self._jetstream], stdout=log, stderr=log)
        self._wait_until_listening()

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
    location: CodeLocation, engine: sa.Engine, etl_settings: EtlSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunWorker]:
    """一个工人：代码位置、Dagster 实例（SQLite）、引擎。"""
    monkeypatch.setattr("etl_assets.resources.get_engine", lambda: engine)
    monkeypatch.setattr("etl_assets.resources.get_settings", lambda: etl_settings)
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        worker = RunWorker(instance=instance, location=location, engine=engine, settings=etl_settings, lease_seconds=30)
        yield worker
        worker.heartbeats.dispose()
