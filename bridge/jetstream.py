"""怎样与 JetStream 说话：连接、流、发布、确认、死信；监听器、任务队列与发布者共用。"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, ConsumerInfo, PubAck, StreamConfig, StreamState

from bridge.errors import (
    BridgeError,
    NatsRefusedError,
    NatsUnavailableError,
    PayloadTooLargeError,
    StreamConflictError,
    StreamFullError,
    StreamMissingError,
)
from bridge.settings import BridgeSettings
from etl_assets.core.errors import SettingsError
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

OLDEST_SERVER = (2, 10)
"""一个消费者带几个 filter_subjects 始于 2.10。"""
PUBLISH_SECONDS = 15.0
NO_STREAM_SECONDS = 2.0
ANSWER_SECONDS = 2.0
CONFIRM_ATTEMPTS = 3

# 服务器的错误码：jetstream/errors.json
_STREAM_FULL = 10077
_MESSAGE_TOO_LARGE = 10054
_SEQUENCE_NOT_FOUND = 10043
_AWAY = (
    nats.errors.TimeoutError,
    nats.errors.NoRespondersError,
    nats.errors.OutboundBufferLimitError,
    nats.js.errors.NoStreamResponseError,
    nats.js.errors.ServiceUnavailableError,
)


def header_text(value: object, limit: int = 300) -> str:
    """能放进消息头的一行：空白折叠，控制字符去掉，超长截断。"""
    line = " ".join(str(value).split())
    return "".join(char for char in line if char.isprintable())[:limit]


def header_bytes(headers: Mapping[str, str]) -> int:
    """消息头在线上的长度；服务器的 max_payload 把它也算进去，超过就断开连接。"""
    return len("NATS/1.0\r\n\r\n") + sum(len(f"{name}: {value}\r\n".encode()) for name, value in headers.items())


def subject_covers(pattern: str, subject: str) -> bool:
    """流的主题模式（含 * 与 >）是否包括这个主题。"""
    wanted = pattern.split(".")
    given = subject.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(token in ("*", part) for token, part in zip(wanted, given, strict=True))


class JetStreamConnection:
    """一条断了就永远重连的连接；只有开头连不上才是错误。"""

    def __init__(self, settings: BridgeSettings, *, name: str, client: Client | None = None) -> None:
        self.client = client or Client()
        self.context: JetStreamContext
        self._settings = settings
        self._name = name
        self._server = settings.nats_address
        self._started = False
        self._opening = False
        self._cause: Exception | None = None
        self._trouble = RepeatedWarning(logger, "nats trouble")
        self._cannot_beat = RepeatedWarning(logger, "cannot tell NATS that the work goes on")
        self._usable = asyncio.Event()
        self._on_disconnect: list[Callable[[], None]] = []

    # ---- 连接 ----------------------------------------------------------------

    async def open(self) -> None:
        """连上并确认有 JetStream；否则一句 NatsUnavailableError 或 NatsRefusedError。"""
        if not self._settings.nats_servers:
            raise SettingsError("ETL_NATS_URL is not set: start the stack with `etl up`, or set it to your NATS")
        self._started = self._opening = True
        try:
            await self._connect()
            await self._check_server()
        except BaseException:
            await self.close()
            raise
        finally:
            self._opening = False
        self._usable.set()

    async def _connect(self) -> None:
        seconds = self._settings.connect_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.client.connect(
                    self._settings.nats_servers,
                    name=self._name,
                    error_cb=self._report,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                    closed_cb=self._closed,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                    connect_timeout=2,
                    ping_interval=5,  # 与 2 次：哑了的连接 15 秒之内换掉
                    max_outstanding_pings=2,
                )
        except TimeoutError as error:
            raise NatsUnavailableError(
                f"cannot reach NATS at {self._server} within {seconds} s ({header_text(self._cause or 'no answer')}): "
                "start it, or correct ETL_NATS_URL"
            ) from (self._cause or error)

    async def _check_server(self) -> None:
        version = self.client.connected_server_version
        if (version.major, version.minor) < OLDEST_SERVER:
            raise NatsRefusedError(f"NATS at {self._server} is version {version}: upgrade it to 2.10 or newer")
        self.context = self.client.jetstream(timeout=5)
        try:
            await self.context.account_info()
        except (nats.js.errors.APIError, nats.errors.NoRespondersError) as error:
            raise NatsRefusedError(f"NATS at {self._server} offers no JetStream: start nats-server with -js, or allow this user") from error
        except nats.errors.TimeoutError as error:
            raise NatsUnavailableError(
                f"JetStream at {self._server} does not answer ({header_text(self._cause or 'no reason given')}): "
                "look into the server's log, and at this user's permissions"
            ) from error

    async def close(self) -> None:
        """断开，不再重连；没连过也可以调。"""
        if self._started:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                await asyncio.wait_for(self.client.close(), 5)

    async def until_usable(self) -> None:
        """等到连接可用；连接已关闭就抛错，让进程结束、由看护者重启。"""
        await self._usable.wait()
        if self.client.is_closed:
            raise NatsUnavailableError(f"the connection to NATS at {self._server} was closed ({header_text(self.client.last_error)})")

    async def _report(self, error: Exception) -> None:
        if self._opening:
            self._cause = error
            if "authorization" in str(error).lower():
                raise NatsRefusedError(f"NATS at {self._server} refuses the user or password: correct ETL_NATS_URL") from error
            return
        cause = header_text(error) or type(error).__name__
        self._trouble.say(cause, connection=self._name, cause=cause)

    async def _disconnected(self) -> None:
        if self._opening or self.client.is_closed:
            return
        self._usable.clear()
        logger.warning("nats disconnected", connection=self._name, server=self._server)
        self._interrupt()

    async def _reconnected(self) -> None:
        self._usable.set()
        logger.info("nats reconnected", connection=self._name, server=self._server)

    async def _closed(self) -> None:
        self._usable.set()
        self._interrupt()

    def _interrupt(self) -> None:
        for notify in self._on_disconnect:
            notify()

    def call_on_disconnect(self, notify: Callable[[], None]) -> None:
        """断线或关闭时调用 notify。"""
        self._on_disconnect.append(notify)

    # ---- 流与消费者 ------------------------------------------------------------

    async def ensure_stream(self, config: StreamConfig) -> None:
        """我们自己的流：没有就建，有就改成这样；运维加的副本与安置不动。"""
        name = str(config.name)
        with self._managing(name):
            existing = await self._stream_config(name)
            if existing is None:
                await self.context.add_stream(config=config)
            else:
                await self.context.update_stream(config=config, num_replicas=existing.num_replicas, placement=existing.placement)

    async def adopt_stream(self, config: StreamConfig, subjects: Sequence[str]) -> None:
        """别人的流：只在没有时建，从不修改；它不收我们要的主题就报错。"""
        name = str(config.name)
        with self._managing(name):
            existing = await self._stream_config(name)
            if existing is None:
                await self.context.add_stream(config=config)
                return
        stored = existing.subjects or []
        missing = [subject for subject in subjects if not any(subject_covers(pattern, subject) for pattern in stored)]
        if missing:
            raise StreamConflictError(
                name,
                f"it stores {', '.join(stored) or 'no subjects'}, which does not cover {', '.join(missing)}",
                f"add these subjects to it (`nats stream edit {name}`)",
            )

    async def ensure_consumer(self, stream: str, config: ConsumerConfig) -> ConsumerInfo:
        """建立或更新一个拉取消费者。"""
        with self._managing(stream):
            return await self.context.add_consumer(stream, config=config)

    async def stream_state(self, name: str) -> StreamState | None:
        """流里有多少、从几号到几号；没有这个流就是 None。"""
        with self._managing(name):
            try:
                return (await self.context.stream_info(name)).state
            except nats.js.errors.NotFoundError:
                return None

    async def subject_counts(self, stream: str, subjects: str) -> dict[str, int]:
        """流里这些主题（可含通配符）各有几条，做着的也算；没有这个流就是空的。"""
        with self._managing(stream):
            try:
                return (await self.context.stream_info(stream, subjects_filter=subjects)).state.subjects or {}
            except nats.js.errors.NotFoundError:
                return {}

    async def stored_at(self, stream: str, sequence: int) -> datetime | None:
        """流存下这一条的时刻；已经不在了就是 None。"""
        with self._managing(stream):
            try:
                return (await self.context.get_msg(stream, sequence)).time
            except nats.js.errors.NotFoundError:
                return None

    async def delete_message(self, stream: str, sequence: int) -> None:
        """从流里删去一条；已经不在了也算删了。"""
        with self._managing(stream):
            try:
                await self.context.delete_msg(stream, sequence)
            except nats.js.errors.APIError as error:
                if error.err_code != _SEQUENCE_NOT_FOUND:
                    raise

    async def _stream_config(self, name: str) -> StreamConfig | None:
        try:
            return (await self.context.stream_info(name)).config
        except nats.js.errors.NotFoundError:
            return None

    @contextlib.contextmanager
    def _managing(self, stream: str) -> Iterator[None]:
        try:
            yield
        except (*_AWAY, nats.errors.ConnectionClosedError) as error:
            raise NatsUnavailableError(
                f"JetStream at {self._server} did not answer about stream {stream}: is it still starting?"
            ) from error
        except nats.js.errors.APIError as error:
            raise StreamConflictError(
                stream, header_text(error.description), "rename or remove what is in the way, or raise the server's limits"
            ) from error

    # ---- 发布与确认 -------------------------------------------------------------

    async def publish(self, subject: str, data: bytes, *, message_id: str, headers: Mapping[str, str] | None = None) -> PubAck:
        """存进流里才返回；NATS 不在时以同一个编号重试，限期内等不到就抛错（迟到的那份会被去重）。"""
        self._require_open()
        fields = {"Nats-Msg-Id": message_id, **(headers or {})}
        size = len(data) + header_bytes(fields)
        if size > self.client.max_payload:
            raise PayloadTooLargeError(subject, size_bytes=size, limit_bytes=self.client.max_payload)
        start = time.monotonic()
        delay = 0.1
        while True:
            try:
                return await self.context.publish(subject, data, timeout=ANSWER_SECONDS, headers=fields)
            except nats.js.errors.APIError as error:
                # 流满了也是 503，与服务器还没准备好同一个状态码
                if refusal := _refusal(subject, size, error):
                    raise refusal from error
                cause: Exception = error
            except _AWAY as error:
                cause = error
            except nats.errors.ConnectionClosedError as error:
                raise NatsUnavailableError(f"the connection to NATS at {self._server} was closed: start the program again") from error
            waited = time.monotonic() - start
            if isinstance(cause, nats.js.errors.NoStreamResponseError) and waited > NO_STREAM_SECONDS:
                raise StreamMissingError(subject) from cause
            if waited > PUBLISH_SECONDS:
                raise NatsUnavailableError(
                    f"NATS at {self._server} did not store a message for {subject} for {waited:.0f} s: check that it runs"
                ) from cause
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)

    def _require_open(self) -> None:
        if self.client.is_closed or not hasattr(self, "context"):
            raise NatsUnavailableError(f"the connection to NATS at {self._server} is not open: start it first")

    async def confirm(self, message: Msg, verdict: bytes) -> None:
        """了结一条消息，等服务器答应：丢掉的确认就是第二次执行。

        断线期间一直等；连着却几次没有回答就抛错：崩溃过的服务器会忘掉最近的投递，过了 ack_wait 它会重投。
        """
        unanswered = 0
        while unanswered < CONFIRM_ATTEMPTS:
            try:
                await self.client.request(message.reply, verdict, timeout=ANSWER_SECONDS)
            except _AWAY:
                unanswered += self.client.is_connected
                await asyncio.sleep(0.2)
            except nats.errors.ConnectionClosedError:
                break
            else:
                return
        raise NatsUnavailableError(f"NATS at {self._server} did not confirm an acknowledgement: the message will be delivered again")

    async def postpone(self, message: Msg, delay_seconds: float) -> None:
        """还给队列，过 delay_seconds 再投递。"""
        delay = json.dumps({"delay": int(delay_seconds * 1e9)})
        await self.confirm(message, f"-NAK {delay}".encode() if delay_seconds > 0 else b"-NAK")

    @contextlib.asynccontextmanager
    async def in_progress(self, messages: Sequence[Msg], *, ack_wait_seconds: float) -> AsyncIterator[None]:
        """处理期间按时报平安，服务器才不会把消息投给别人。"""
        beating = asyncio.create_task(self._beat(messages, ack_wait_seconds / 3))
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.wait([beating])

    async def _beat(self, messages: Sequence[Msg], interval_seconds: float) -> None:
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                for message in messages:
                    await self.client.publish(message.reply, Msg.Ack.Progress)
            except Exception as error:  # noqa: BLE001  # 报平安的死了，长任务就会做两遍：什么错都不能让它停
                self._cannot_beat.say(type(error).__name__, error=header_text(error))

    # ---- 死信 -------------------------------------------------------------------

    async def bury(self, message: Msg, *, subject: str, reason: str, attempts: int, labels: Mapping[str, str] | None = None) -> None:
        """原文存进死信流之后才终结原消息；中途崩溃会再来一次，编号相同所以只存一份。"""
        origin = message.metadata
        headers = {
            DeadLetterHeader.REASON: header_text(reason),
            DeadLetterHeader.SUBJECT: message.subject,
            DeadLetterHeader.STREAM: origin.stream,
            DeadLetterHeader.SEQUENCE: str(origin.sequence.stream),
            DeadLetterHeader.ATTEMPTS: str(attempts),
            **(labels or {}),
        }
        # 带上发布时刻：流重建之后序号会重来
        message_id = f"{origin.stream}-{origin.sequence.stream}-{origin.timestamp.timestamp():.6f}"
        data = message.data
        truncated = {**headers, DeadLetterHeader.ORIGINAL_BYTES: str(len(data))}
        room = self.client.max_payload - header_bytes({"Nats-Msg-Id": message_id, **truncated})
        if len(data) > room:
            data, headers = data[:room], truncated
        await self.publish(subject, data, message_id=message_id, headers=headers)
        await self.confirm(message, b"+TERM dead-lettered")


class DeadLetterHeader(StrEnum):
    """死信的消息头：为什么、从哪里来。"""

    REASON = "Etl-Reason"
    SUBJECT = "Etl-Subject"
    STREAM = "Etl-Stream"
    SEQUENCE = "Etl-Sequence"
    ATTEMPTS = "Etl-Attempts"
    TASK = "Etl-Task"
    ORIGINAL_BYTES = "Etl-Original-Bytes"
    """只在正文放不下、被截短时才有。"""


def _refusal(subject: str, size_bytes: int, error: nats.js.errors.APIError) -> BridgeError | None:
    """服务器不肯存的原因；None 表示只是暂时不行。"""
    if error.err_code == _STREAM_FULL:
        return StreamFullError(subject)
    if error.err_code == _MESSAGE_TOO_LARGE:
        return PayloadTooLargeError(subject, size_bytes=size_bytes, limit_bytes=None)
    if isinstance(error, nats.js.errors.ServiceUnavailableError):
        return None
    return StreamConflictError(subject, header_text(error.description), "look into the stream's settings and the server's log")
