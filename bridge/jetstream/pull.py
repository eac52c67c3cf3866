"""从 JetStream 的消费者拉取：等待的请求一直开着，到手的消息有人要就交出去、没人要就归还。"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bridge.errors import tolerate
from bridge.jetstream.connection import ANSWER_SECONDS, JetStreamConnection
from bridge.jetstream.headers import header_text
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

_ENOUGH_BYTES = "Message Size Exceeds MaxBytes"
"""别的也提到 MaxBytes：消费者不许我们要这么多（Exceeded MaxRequestMaxBytes），那要说出来。"""


@dataclass
class _Request:
    """服务器那里还开着的一次请求。"""

    subject: str
    remaining: int
    silence_seconds: float
    deadline: float
    """事件循环的时刻；到那时还毫无声息，就当它不在了。"""


class Puller:
    """从一个流的消费者拉取；每个消费者至多一个开着的请求。

    请求从不收回：退订的那一刻服务器正在投的消息会落空，要等 ack_wait 才重投。它满了、到期了、断线了才算完；
    其间没人等着的时候到的消息交给 `unwanted`，没有它就留给下一次。
    """

    BATCH_BYTES = 16 << 20
    """一次请求至多这么多字节：一千条各 256 KB 的就是 256 MB，客户端还会因此丢消息。"""
    EXPIRES_SECONDS = 10.0
    HEARTBEAT_SECONDS = 2.5

    def __init__(
        self,
        connection: JetStreamConnection,
        stream: str,
        *,
        restore: Callable[[], Awaitable[None]],
        unwanted: Callable[[Msg], None] | None = None,
    ) -> None:
        """:param restore: 流或消费者不见了（存储被清空）时把它们建回来。"""
        self._connection = connection
        self._stream = stream
        self._restore = restore
        self._unwanted = unwanted
        self._inbox = connection.client.new_inbox()
        self._subscription: Subscription | None = None
        self._requests: dict[str, _Request] = {}
        self._asked = 0
        self._wanted = False
        self._arrived: list[Msg] = []
        self._news = asyncio.Event()
        self._trouble: str | None = None
        self._failed = RepeatedWarning(logger, "pull failed")
        self._ended = RepeatedWarning(logger, "pull ended")
        self._cannot_restore = RepeatedWarning(logger, "cannot restore the consumer yet")
        connection.on_disconnect.append(self._forget_requests)

    async def take(self, consumer: str) -> Msg | None:
        """现在就有的一条；没有就是 None，不等。"""
        await self._restore_what_is_gone()
        async with self._wanting():
            if consumer not in self._requests:
                await self._ask(consumer, {"batch": 1, "no_wait": True}, silence_seconds=ANSWER_SECONDS)
                await self._until(lambda: consumer not in self._requests)
        for message in self._arrived:
            if message.metadata.consumer == consumer:
                self._arrived.remove(message)
                return message
        return None

    async def wait(self, consumers: Sequence[str], *, batch: int = 1, linger_seconds: float = 0.0) -> list[Msg]:
        """等到第一条，再收 linger_seconds；请求到期或断线时返回空，再来一次即可。"""
        # 比一条还小的上限，那一条就永远取不到
        max_bytes = max(self.BATCH_BYTES, 2 * self._connection.client.max_payload)
        request = {
            "batch": batch,
            "max_bytes": max_bytes,
            "expires": int(self.EXPIRES_SECONDS * 1e9),
            "idle_heartbeat": int(self.HEARTBEAT_SECONDS * 1e9),
        }
        await self._restore_what_is_gone()
        async with self._wanting():
            for consumer in consumers:
                if consumer not in self._requests and not self._arrived:
                    # 漏了两次心跳才算没有声息
                    await self._ask(consumer, request, silence_seconds=self.HEARTBEAT_SECONDS * 2.5)
            await self._until(lambda: bool(self._arrived) or not self._all_open(consumers))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(linger_seconds):
                    await self._until(lambda: not self._all_open(consumers))
        messages = self.take_leftovers()
        if not messages:
            await self._recover()
        return messages

    def take_leftovers(self) -> list[Msg]:
        """已经到手、还没交出去的：别的消费者的，或者等的人被取消了。主人要么处理，要么归还。"""
        messages, self._arrived = self._arrived, []
        return messages

    async def close(self) -> None:
        """不再要；等服务器把已经发出的都送到。"""
        self._wanted = False
        if self._subscription is not None and self._connection.client.is_connected:
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._subscription.drain()  # type: ignore[no-untyped-call]  # nats-py 没有标注它

    @contextlib.asynccontextmanager
    async def _wanting(self) -> AsyncIterator[None]:
        """在此期间到的消息有人要；NATS 的错误只说一声，下一次再来。"""
        await self._connection.until_usable()
        self._wanted = True
        try:
            yield
        except nats.errors.Error as error:
            self._failed.say(type(error).__name__, stream=self._stream, cause=header_text(error))
        finally:
            self._wanted = False

    async def _ask(self, consumer: str, request: dict[str, Any], *, silence_seconds: float) -> None:
        client = self._connection.client
        if self._subscription is None:
            self._subscription = await client.subscribe(f"{self._inbox}.*", cb=self._receive)
        self._asked += 1
        # 一次请求一个主题：服务器的状态没有别的记号，早已不算数的请求说的，只有这样才分得出
        subject = f"{self._inbox}.{self._asked}"
        deadline = asyncio.get_running_loop().time() + silence_seconds
        # 先记下再发：回答可能比 publish 返回得还早
        self._requests[consumer] = _Request(subject, request["batch"], silence_seconds, deadline)
        await client.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{consumer}", json.dumps(request).encode(), reply=subject
        )

    def _all_open(self, consumers: Sequence[str]) -> bool:
        return all(consumer in self._requests for consumer in consumers)

    async def _until(self, met: Callable[[], bool]) -> None:
        """等到 met；毫无声息的请求到时候就当它完了。"""
        while not met():
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(
                    min((request.deadline for request in self._requests.values()), default=None)
                ):
                    await self._news.wait()
            now = asyncio.get_running_loop().time()
            self._requests = {
                consumer: request for consumer, request in self._requests.items() if request.deadline > now
            }

    async def _receive(self, message: Msg) -> None:
        if message.reply:
            self._deliver(message)
        else:
            # 没有回执地址的是服务器的状态
            self._note_status(message)
        self._news.set()

    def _deliver(self, message: Msg) -> None:
        consumer = message.metadata.consumer
        if request := self._requests.get(consumer):
            request.remaining -= 1
            self._extend(request)
            if request.remaining == 0:
                del self._requests[consumer]
        if self._wanted or self._unwanted is None:
            self._arrived.append(message)
        else:
            self._unwanted(message)

    def _note_status(self, message: Msg) -> None:
        """100 是空闲心跳，404 与 408 是没有消息，_ENOUGH_BYTES 是字节给够了，别的是出了事；早已不算数的请求说什么都不听。"""
        consumer = next((name for name, request in self._requests.items() if request.subject == message.subject), None)
        if consumer is None:
            return
        headers = message.headers or {}
        status = headers.get("Status", "?")
        if status == "100":
            self._extend(self._requests[consumer])
            return
        del self._requests[consumer]
        if status in ("404", "408") or headers.get("Description") == _ENOUGH_BYTES:
            return
        # 别的消费者的一句盖不住一个消费者不见了
        if self._trouble is None or not _is_gone(self._trouble):
            self._trouble = f"{status} {headers.get('Description', '')}".strip()

    def _extend(self, request: _Request) -> None:
        request.deadline = asyncio.get_running_loop().time() + request.silence_seconds

    def _forget_requests(self) -> None:
        """拉取请求活不过断线：叫醒正在等的，重新去要。"""
        self._requests.clear()
        self._news.set()

    async def _restore_what_is_gone(self) -> None:
        """在要之前：别的消费者一直有消息，也轮得到它；这时手里没有消息等着。"""
        if self._trouble is not None and _is_gone(self._trouble):
            await self._recover()

    async def _recover(self) -> None:
        """上一回要的时候出了事：消费者不见了就建回来；别的稍等再问。"""
        trouble, self._trouble = self._trouble, None
        if trouble is None:
            return
        self._ended.say(trouble, stream=self._stream, status=trouble)
        if _is_gone(trouble):
            try:
                await self._restore()
            except Exception as error:  # noqa: BLE001  # 不是自己的错才忍：别人正重建它，建得不对的也要等人改好
                tolerate(error, self._cannot_restore, stream=self._stream)
        await asyncio.sleep(0.5)


def _is_gone(trouble: str) -> bool:
    return trouble.startswith("503") or "Consumer Deleted" in trouble
