"""栈的各部分与服务器之间的网线：小小的 TCP 代理，可以切断再接上，也可以只让此刻的连接哑掉，或者一直很长。"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from etl_assets.embedded.loopback_port import find_free_port


class Link:
    """一条网线；切断时两头都以为它还在，只是没有回音。"""

    def __init__(self, name: str, upstream_port: int, delay_seconds: float = 0.0) -> None:
        """:param delay_seconds: 单程要走多久。"""
        self.name = name
        self.port = find_free_port()
        self._upstream_port = upstream_port
        self._delay_seconds = delay_seconds
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._silent: set[asyncio.StreamWriter] = set()

    @property
    def is_used(self) -> bool:
        """走着连接；没有的话，切断它什么也不证明。"""
        return bool(self._writers)

    async def serve(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", self.port)

    def close(self) -> None:
        self._server.close()
        self.heal(is_reset=True)

    def cut(self) -> None:
        self._passing.clear()

    def heal(self, *, is_reset: bool) -> None:
        """:param is_reset: 断得太久，两头的连接都断开；否则接着传。"""
        if is_reset:
            for writer in self._writers:
                writer.transport.abort()
        self._passing.set()

    def drop(self) -> None:
        """此刻的连接从此有去无回，也永不断开；新来的照常。"""
        self._silent |= self._writers

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passing.wait()
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, upstream_writer}
        self._writers |= both
        try:
            await asyncio.gather(self._pump(reader, upstream_writer), self._pump(upstream_reader, writer))
        except asyncio.CancelledError:
            return  # 网收了；再往外抛，asyncio 会当作错误印出来
        finally:
            self._writers -= both
            self._silent -= both
            for end in both:
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._passing.wait()
                if writer in self._silent:
                    continue
                if self._delay_seconds:  # 路上同时走着许多段，一段不等一段
                    asyncio.get_running_loop().call_later(self._delay_seconds, writer.write, data)
                else:
                    writer.write(data)
                    await writer.drain()
        if self._delay_seconds:
            await asyncio.sleep(self._delay_seconds)  # 还在路上的先到
        if writer not in self._silent:
            writer.close()


class Network:
    """所有的网线，在一个线程的事件循环里；哪一部分先要改道，就给它拉两条线。"""

    def __init__(self, *, delay_seconds: float = 0.0) -> None:
        """:param delay_seconds: 每条网线的单程要走多久。"""
        self.links: list[Link] = []
        self._delay_seconds = delay_seconds
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def reroute(self, name: str, environment: Mapping[str, str]) -> dict[str, str]:
        """同样的环境变量，只是服务器的地址换成这一部分自己的网线；集群有几个地址，客户端自己会绕开，不拉线。"""
        rerouted = dict(environment)
        for server, variables in {
            "postgres": ("ETL_DATABASE_URL", "DAGSTER_POSTGRES_URL"),
            "nats": ("ETL_NATS_URL",),
        }.items():
            if "," in environment[variables[0]]:
                continue
            port = urlsplit(environment[variables[0]]).port
            link = self.lay(f"{name}-{server}", int(port or 0))
            for variable in variables:
                rerouted[variable] = environment[variable].replace(f":{port}", f":{link.port}")
        return rerouted

    def cut(self, link: Link) -> None:
        self._loop.call_soon_threadsafe(link.cut)

    def drop(self, link: Link) -> None:
        """返回时已经哑了：此后的回答一个也到不了。"""
        dropped = threading.Event()
        self._loop.call_soon_threadsafe(link.drop)
        self._loop.call_soon_threadsafe(dropped.set)
        assert dropped.wait(10)

    def heal(self, link: Link, *, is_reset: bool) -> None:
        self._loop.call_soon_threadsafe(lambda: link.heal(is_reset=is_reset))

    async def _close(self) -> None:
        for link in self.links:
            link.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def lay(self, name: str, upstream_port: int) -> Link:
        """一条新的网线，通到这个端口上的服务器。"""
        link = Link(name, upstream_port, self._delay_seconds)
        asyncio.run_coroutine_threadsafe(link.serve(), self._loop).result(10)
        self.links.append(link)
        return link
