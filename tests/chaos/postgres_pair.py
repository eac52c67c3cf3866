"""两台主机上的 PostgreSQL：一台是主库，一台是同步的备库；主库断了电，备库升上来。"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psycopg

from etl_assets.embedded.child_process import with_launcher
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.embedded.postgres_binaries import find_binaries, unprivileged_account
from tests.chaos.hosts import Host
from tests.integration.host import eventually

_PASSWORD = "s3cret"
_SETTINGS = ("max_connections=200", "fsync=off", "timezone=UTC", "unix_socket_directories=")  # 进程死了，机器没有
_READY_SECONDS = 60.0


class PostgresPair:
    """folder 归运行 PostgreSQL 的账户。同步的：应用听到提交成功的，升上来的备库都有。"""

    def __init__(self, folder: Path, hosts: Sequence[Host]) -> None:
        self.primary, self.standby = hosts
        self._account = unprivileged_account()
        self._folder = folder
        self._port = find_free_port()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = (
            f"postgresql://etl:{_PASSWORD}@{','.join(f'{host.address}:{self._port}' for host in hosts)}/etl"
            "?target_session_attrs=read-write"
        )
        """两台都写着，像文档说的那样：谁能写就连谁。"""

    def start(self) -> None:
        password_file = self._folder / "password"
        password_file.write_text(_PASSWORD)
        self._give(password_file)
        data = self._data(self.primary)
        arguments = ["--username=etl", "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
        self._run(self.primary, "initdb", "-D", data, *arguments, "--locale=C", "--no-sync")
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all,replication all samenet scram-sha-256\n")
        self._launch(self.primary)
        self._execute(self.primary, "CREATE DATABASE etl", database="postgres")
        self._attach_standby()

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def fail_over(self) -> None:
        """主库的主机断电，备库升为主库；返回时它已能写。"""
        self.primary.kill()
        self._processes.pop(self.primary.name).wait()
        self.primary, self.standby = self.standby, self.primary
        self._execute(self.primary, f"SELECT pg_promote(true, {_READY_SECONDS:.0f})")

    def rejoin(self) -> None:
        """断了电的那一台回来：从新的主库拷一份，做它的备库。"""
        self.standby.plug()
        shutil.rmtree(self._data(self.standby))
        self._attach_standby()

    def count(self, rows: str) -> int:
        """主库里有几行，直接问它。"""
        return self._execute(self.primary, f"SELECT FROM {rows}")

    def _attach_standby(self) -> None:
        source = f"host={self.primary.address} port={self._port} user=etl password={_PASSWORD}"
        copied = ["--dbname", source, "--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        program = Path(find_binaries(None)) / "pg_basebackup"
        command = self.standby.command([program, "-D", self._data(self.standby), *copied])
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        self._give(self._data(self.standby))
        self._launch(self.standby)
        streaming = "SELECT FROM pg_stat_replication WHERE state = 'streaming'"
        eventually(lambda: self._execute(self.primary, streaming), "the standby does not stream", _READY_SECONDS)
        # 拷贝之后才设：备库升上来时没有它，不会等一个不在的备库
        self._execute(self.primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        self._execute(self.primary, "SELECT pg_reload_conf()")

    def _launch(self, host: Host) -> None:
        options = [f"listen_addresses={host.address}", f"port={self._port}", *_SETTINGS]
        words = [word for option in options for word in ("-c", option)]
        with (self._folder.parent / f"{host.name}.log").open("ab") as log:
            self._processes[host.name] = subprocess.Popen(
                self._command(host, "postgres", "-D", self._data(host), *words), cwd="/", stdout=log, stderr=log
            )
        eventually(lambda: self._answers(host), f"{host.name} does not answer", _READY_SECONDS)

    def _answers(self, host: Host) -> bool:
        with suppress(psycopg.OperationalError):  # 还没起来
            return self._execute(host, "SELECT", database="postgres") == 1
        return False

    def _execute(self, host: Host, statement: str, *, database: str = "etl") -> int:
        """返回行数。"""
        login = {"user": "etl", "password": _PASSWORD, "dbname": database}
        with psycopg.connect(host=host.address, port=self._port, autocommit=True, **login) as connection:
            return connection.execute(statement.encode()).rowcount

    def _data(self, host: Host) -> Path:
        return self._folder / host.name

    def _run(self, host: Host, program: str, *arguments: str | Path) -> None:
        subprocess.run(self._command(host, program, *arguments), cwd="/", check=True, capture_output=True)

    def _command(self, host: Host, program: str, *arguments: str | Path) -> list[str]:
        words = [str(find_binaries(self._account) / program), *map(str, arguments)]
        return host.command(with_launcher(words, death_signal=signal.SIGQUIT, account=self._account))

    def _give(self, path: Path) -> None:
        if self._account:
            for each in [path, *path.rglob("*")]:
                os.chown(each, self._account.pw_uid, self._account.pw_gid)
