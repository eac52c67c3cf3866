"""从 JetStream 的消费者拉取：有人要才要，能接多少要多少，收回请求时不丢已在路上的消息。"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bridge.jetstream import ANSWER_SECONDS, JetStreamConnection, header_text
from etl_assets.core.errors import TransientError
from etl_assets.core.log import get_logger

logger = get_logger(__name__)

_DISCONNECTED = "disconnected"


class Puller:
    """从一个流的消费者拉取；只在有人要的时候才向服务器要，收回请求时不丢已在路上的消息。"""

    EXPIRES_SECONDS = 30.0
    HEARTBEAT_SECONDS = 5.0

    def __init__(self, connection: JetStreamConnection, stream: str, *, restore: Callable[[], Awaitable[None]]) -> None:
        """:param restore: 流或消费者不见了（存储被清空）时把它们建回来。"""
        self._connection = connection
        self._stream = stream
        self._restore = restore
        self._leftovers: list[Msg] = []

    async def take(self, consumer: str) -> Msg | None:
        """现在就有的一条；没有就是 None，不等。"""
        messages = await self._request([consumer], {"batch": 1, "no_wait": True}, limit=1, linger_seconds=0)
        return messages[0] if messages else None

    async def wait(self, consumers: Sequence[str], *, batch: int = 1, linger_seconds: float = 0.0) -> list[Msg]:
        """等到第一条，再收 linger_seconds；每个消费者至多 batch 条。请求到期或断线时返回空，再来一次即可。"""
        request = {"batch": batch, "expires": int(self.EXPIRES_SECONDS * 1e9), "idle_heartbeat": int(self.HEARTBEAT_SECONDS * 1e9)}
        return await self._request(consumers, request, limit=batch * len(consumers), linger_seconds=linger_seconds)

    def take_leftovers(self) -> list[Msg]:
        """上一次拉取被取消时已经到手的消息：主人要么处理，要么归还。"""
        messages, self._leftovers = self._leftovers, []
        return messages

    async def _request(self, consumers: Sequence[str], request: dict[str, Any], *, limit: int, linger_seconds: float) -> list[Msg]:
        await self._connection.until_usable()
        # 没有心跳的请求（no_wait）本该立刻有回答
        silence_seconds = self.HEARTBEAT_SECONDS * 2.5 if "idle_heartbeat" in request else ANSWER_SECONDS
        inbox = _Inbox(self._connection.client, limit=limit)
        try:
            with self._connection.on_disconnect(lambda: inbox.end(_DISCONNECTED)):
                await inbox.exchange(self._stream, consumers, request, silence_seconds=silence_seconds, linger_seconds=linger_seconds)
        except nats.errors.Error as error:
            logger.warning("pull failed", stream=self._stream, cause=header_text(error))
        except asyncio.CancelledError:
            self._leftovers += inbox.messages
            raise
        if not inbox.messages:
            await self._recover(inbox.ended)
        return inbox.messages

    async def _recover(self, ended: str | None) -> None:
        """404、408 是没有消息；消费者不见了就建回来；别的稍等再问。"""
        if ended is None or ended.startswith(("404", "408")) or ended == _DISCONNECTED:
            return
        logger.warning("pull ended", stream=self._stream, status=ended)
        if ended.startswith("503") or "Consumer Deleted" in ended:
            try:
                await self._restore()
            except TransientError as error:
                logger.warning("cannot restore the consumer yet", stream=self._stream, cause=header_text(error))
        await asyncio.sleep(0.5)


class _Inbox:
    """一次拉取的收件箱；退订就是收回请求。"""

    def __init__(self, client: Client, *, limit: int) -> None:
        self._client = client
        self._limit = limit
        self._requests = 0
        self._news = asyncio.Event()
        self._subscription: Subscription | None = None
        self.messages: list[Msg] = []
        self.ended: str | None = None

    async def exchange(
        self, stream: str, consumers: Sequence[str], request: dict[str, Any], *, silence_seconds: float, linger_seconds: float
    ) -> None:
        """向每个消费者要一次，收，收回请求；被取消时也收回。"""
        try:
            await self._open(stream, consumers, json.dumps(request).encode())
            await self._collect(silence_seconds=silence_seconds, linger_seconds=linger_seconds)
        finally:
            await self._close()

    async def _open(self, stream: str, consumers: Sequence[str], request: bytes) -> None:
        client = self._client
        subject = client.new_inbox()
        self._subscription = await client.subscribe(subject, cb=self._receive)
        for consumer in consumers:
            self._requests += 1
            await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", request, reply=subject)

    async def _collect(self, *, silence_seconds: float, linger_seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            while not self.messages and self.ended is None:
                async with asyncio.timeout(silence_seconds):
                    await self._next()
            async with asyncio.timeout(linger_seconds):
                while len(self.messages) < self._limit and self.ended is None:
                    await self._next()

    async def _close(self) -> None:
        """退订，并等服务器把已经发出的都送到。"""
        if self._subscription is None or self._client.is_closed:
            return
        answered = len(self.messages) >= self._limit or (self.ended is not None and self._requests == 1)
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            if answered or not self._client.is_connected:
                await self._subscription.unsubscribe()
            else:
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._subscription.drain()  # type: ignore[no-untyped-call]  # nats-py 没有标注它

    def end(self, status: str) -> None:
        self.ended = self.ended or status
        self._news.set()

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _receive(self, message: Msg) -> None:
        if message.reply:
            self.messages.append(message)
            self._news.set()
            return
        # 没有回执地址的是服务器的状态；100 是空闲心跳，只说明请求还在
        headers = message.headers or {}
        status = headers.get("Status", "?")
        if status == "100":
            self._news.set()
        else:
            self.end(f"{status} {headers.get('Description', '')}".strip())
