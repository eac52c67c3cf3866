"""内嵌的本地栈：把各部分组合起来，一起启动、一起停下。

命令行只用这里的 `Stack`（`run` 给 `etl up`，with 语句给 `etl demo`）与 bridge.stack.addresses 的
`default_state_dir`、`read_addresses`。
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from bridge.roles.nats import nats_roles
from bridge.settings import LOGIN_VARIABLES, BridgeSettings
from bridge.stack.addresses import StackAddresses, remove_addresses, write_addresses
from bridge.stack.application import FORKSERVER, ROLES, ApplicationPlan, ApplicationServices, application_services
from bridge.stack.dagster_home import (
    DAGSTER_SCHEMA,
    build_dagster_postgres_url,
    write_dagster_home,
    write_workspace,
)
from bridge.stack.embedded_nats import EmbeddedNats
from bridge.stack.forkserver import Forkserver
from bridge.stack.preparation import Order, Preparation
from bridge.stack.readiness import logged_ready
from bridge.stack.supervisor import Service, Supervisor
from etl_assets.core.errors import SettingsError
from etl_assets.core.log import get_logger
from etl_assets.core.settings import EtlSettings
from etl_assets.embedded.child_process import identify
from etl_assets.embedded.embedded_postgres import EmbeddedPostgres
from etl_assets.embedded.embedded_server import EmbeddedServer
from etl_assets.embedded.loopback_port import listen_on, reserve_port

logger = get_logger(__name__)

_DEFAULT_UI_PORT = 3000
_SERVER_TIMEOUT_SECONDS = 60
_APPLICATION_TIMEOUT_SECONDS = 180  # 全新的环境里第一次导入还要编译字节码


class Stack:
    """一个状态文件夹里的栈：PostgreSQL 与 NATS（没有给出外面的地址时）、Dagster、监听者、工人。"""

    def __init__(
        self,
        state_dir: Path,
        *,
        settings: EtlSettings,
        bridge_settings: BridgeSettings,
        port: int | None = None,
        workers: int = 2,
        durable: bool = True,
        services: ApplicationServices = application_services,
    ) -> None:
        """
        :param settings: `database_url` 非空就用它，不内嵌 PostgreSQL。
        :param bridge_settings: `nats_url` 非空就用它，不内嵌 NATS。
        :param port: 网页的端口；None 表示 3000，被占了就另找。
        """
        self._state_dir = state_dir.absolute()
        self._settings = settings
        self._bridge_settings = bridge_settings
        self._dagster_home = self._state_dir / "dagster"
        self._dagster_schema = bridge_settings.own_name(DAGSTER_SCHEMA)  # 影子的运行不该混进正式的网页
        self._port = port
        self._workers = workers
        self._services = services
        self._held = ExitStack()
        """停下时要放开的，后占的先放。"""
        self._supervisor = Supervisor(self._state_dir)
        self._postgres = (
            None if settings.database_url else EmbeddedPostgres(self._state_dir / "postgres", durable=durable)
        )
        self._nats = (
            None
            if bridge_settings.nats_url
            else EmbeddedNats(self._state_dir / "nats", durable=durable, roles=nats_roles(bridge_settings))
        )

    def start(self) -> StackAddresses:
        """全部就绪才返回；失败则什么也不留下。

        :raises EtlError: 一句话，说明怎么办。
        """
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """停下所有进程；可以多次调用。"""
        self._held.close()

    def kill(self) -> None:
        """不等收尾，马上结束所有进程：文件夹反正要扔掉。可以从别的线程调。"""
        self._supervisor.stop(at_once=True)

    def run(self, announce: Callable[[StackAddresses], None]) -> None:
        """在前台运行，直到 SIGINT、SIGTERM 或 SIGHUP；全部就绪时调用一次 `announce`。只能在主线程里用。"""
        with _stop_signals_interrupt():
            try:
                announce(self.start())
                threading.Event().wait()
            except KeyboardInterrupt:
                logger.info("stopping the stack")
            finally:
                self.stop()

    def __enter__(self) -> StackAddresses:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _embedded(self) -> list[EmbeddedServer]:
        return [server for server in (self._postgres, self._nats) if server]

    def _start(self) -> StackAddresses:
        listener = self._held.enter_context(self._listen())
        # gRPC 用 SO_REUSEPORT：两个栈撞在一个端口上谁也不报错，请求随机落到哪一个；所以一直占着
        code_server = self._held.enter_context(reserve_port())
        for server in self._embedded:
            self._held.callback(server.release)
        forkserver = Forkserver(self._own_environment(), inherited_fds=(listener.fileno(),))
        self._held.callback(forkserver.close)
        # 启动之前就登记：起到一半失败也停得下来；比端口、文件夹后登记，所以进程先停
        self._held.callback(self._supervisor.stop)
        self._supervisor.start()
        # 两个进程装载自己要的，都要一两秒 CPU：这时就开始，与建库同时做
        preparation = Preparation()
        self._held.callback(preparation.stop)
        self._supervisor.supervise([Service(FORKSERVER, forkserver.launch, logged_ready)])
        if self._nats is None:
            asyncio.run(_check_nats(self._bridge_settings))
        for server in self._embedded:
            server.prepare()
        self._supervisor.supervise([_as_service(server) for server in self._embedded])
        servers = [server.name for server in self._embedded]
        self._supervisor.wait_until_ready(*servers, timeout_seconds=_SERVER_TIMEOUT_SECONDS)

        addresses = self._find_addresses(listener.getsockname()[1])
        write_dagster_home(self._dagster_home)
        preparation.run(self._order(addresses))
        services = self._plan_services(addresses, forkserver, listener, code_server_port=code_server.getsockname()[1])
        self._supervisor.supervise(services)
        names = [*servers, *(service.name for service in services)]
        self._supervisor.wait_until_ready(*names, timeout_seconds=_APPLICATION_TIMEOUT_SECONDS)

        # 全部就绪才写：别的命令看见它就来连；先登记删去，写到一半出错也不留下
        self._held.callback(remove_addresses, self._state_dir)
        write_addresses(self._state_dir, addresses)
        return addresses

    def _listen(self) -> socket.socket:
        """网页的端口从这一刻起就是我们的；网页进程换了一个，连接在这里等着。"""
        try:
            return listen_on(self._port, preferred=_DEFAULT_UI_PORT)
        except OSError as error:
            advice = "choose another one with --port, or leave the choice to `etl up`"
            raise SettingsError(f"port {self._port} is not free: {advice}") from error

    def _find_addresses(self, ui_port: int) -> StackAddresses:
        """内嵌的服务器就绪以后，它们的端口才定下来。"""
        database_url = self._postgres.url if self._postgres else self._settings.database_url
        nats_url = self._nats.url if self._nats else self._bridge_settings.nats_url
        own = identify(os.getpid())
        return StackAddresses(
            database_url=database_url,
            nats_url=nats_url,
            dagster_home=str(self._dagster_home),
            dagster_postgres_url=build_dagster_postgres_url(database_url, schema=self._dagster_schema),
            ui_url=f"http://127.0.0.1:{ui_port}",
            pid=os.getpid(),
            started_ticks=own.started_ticks if own else 0,
        )

    def _plan_services(
        self, addresses: StackAddresses, forkserver: Forkserver, listener: socket.socket, *, code_server_port: int
    ) -> list[Service]:
        workspace = self._state_dir / "workspace.yaml"
        write_workspace(workspace, code_server_port=code_server_port)
        plan = ApplicationPlan(
            forkserver=forkserver,
            environment=self._environment(addresses),
            workspace=workspace,
            code_server_port=code_server_port,
            ui_descriptor=listener.fileno(),
            workers=self._workers,
            logins=self._logins(),
        )
        servers = tuple(server.name for server in self._embedded)
        return [replace(service, after=(*service.after, *servers)) for service in self._services(plan)]

    def _logins(self) -> dict[str, dict[str, str]]:
        """进程各以自己的角色登录内嵌的服务器，谁也不是应用的表的主人；外面的服务器，给的是谁就是谁。"""
        database = {}
        if self._postgres:
            storage = build_dagster_postgres_url(self._postgres.service_url, schema=self._dagster_schema)
            database = {"ETL_DATABASE_URL": self._postgres.service_url, "DAGSTER_POSTGRES_URL": storage}
        nats = self._nats.logins() if self._nats else {}
        return {role: {**database, **nats.get(role, {})} for role in ROLES}

    def _environment(self, addresses: StackAddresses) -> dict[str, str]:
        return self._own_environment() | addresses.environment()

    def _own_environment(self) -> dict[str, str]:
        """还不知道服务器的地址时就定了的。"""
        return {
            # 线程多的进程里，glibc 给每个线程一块自己的堆；栈的进程都不靠它快，三十 MB 就白占着
            "MALLOC_ARENA_MAX": "2",
            **os.environ,
            **(dict.fromkeys(LOGIN_VARIABLES, "") if self._nats else {}),  # 别处的登录，不是内嵌的这一台的
            "ETL_STATE_DIR": str(self._state_dir),
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "PYTHONUNBUFFERED": "1",
            # Dagster 装载代码时去掉 sys.path 的第一项，以为那是当前文件夹；用 `-P` 启动时要有一项给它去掉
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self._dagster_home), os.environ.get("PYTHONPATH")])),
        }

    def _order(self, addresses: StackAddresses) -> Order:
        return Order(
            settings=self._settings.model_copy(update={"database_url": addresses.database_url}),
            dagster_schema=self._dagster_schema,
            environment=self._environment(addresses),
            log_path=self._state_dir / "logs" / "dagster-storage.log",
            service_url=self._postgres.service_url if self._postgres else "",
        )


def _as_service(server: EmbeddedServer) -> Service:
    return Service(
        server.name,
        server.launch,
        lambda attempt: server.is_ready(attempt.process),
        stop_signal=server.stop_signal,
        stop_timeout_seconds=server.stop_timeout_seconds,
        after_exit=server.clear_leftovers,
        is_sick=server.is_sick,
    )


async def _check_nats(settings: BridgeSettings) -> None:
    from bridge.jetstream.connection import JetStreamConnection  # 内嵌 NATS 的用不着它，那要 10 MB

    async with JetStreamConnection(settings, name="stack"):
        pass


def wait_for_stop_signal() -> None:
    with _stop_signals_interrupt(), suppress(KeyboardInterrupt):
        threading.Event().wait()


@contextmanager
def _stop_signals_interrupt() -> Iterator[None]:
    """三个停止信号都变成一次 KeyboardInterrupt；停下的过程中再来的不理会：停下本身有期限。"""
    interrupted = threading.Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
