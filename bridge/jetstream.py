"""怎样与 JetStream 说话：连接、流、发布、确认、死信；监听器、任务队列与发布者共用。"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, ConsumerInfo, PubAck, StreamConfig, StreamState

from bridge.errors import (
    BridgeError,
    InvalidSubjectError,
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
MANAGE_SECONDS = 15.0
"""问流与消费者的事，这么久没有回答才算没有；集群选一个领导者要 4 到 7 秒。"""
CONFIRM_SECONDS = 8.0
"""一次确认，连着却没有回答的工夫。"""
GARBAGE_HEAD_BYTES = 4_096
"""不是事件也不是任务的，死信里只留这么多：一千条 1 MB 的垃圾挤不满死信流。"""

NEARLY_FULL = 0.8
LETTERS_FULL_REMEDY = "look with `etl dlq list`; retry or drop some, or raise its max_bytes with `nats stream edit`"

# 服务器的错误码：nats-server 的 server/errors.json
_STORE_FAILED = 10077
# 账号的、服务器的上限到了
_NO_ROOM = (10002, 10028, 10047)
_MESSAGE_TOO_LARGE = 10054
_SEQUENCE_NOT_FOUND = 10043
MESSAGE_NOT_FOUND = 10037
_NAME_IN_USE = 10058
_NOT_CLUSTERED = 10074
_NO_JETSTREAM = (10035, 10039, 10076)
# 集群正在选领导者、在等不在的节点、忙不过来：过一会儿就好，谁也没说"没有"
_PASSING = (10004, 10005, 10007, 10008, 10009, 10041, 10118, 10119, 10167)
_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")
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


@dataclass(frozen=True)
class StoredMessage:
    """流里存着的一条消息。"""

    stream: str
    sequence: int
    stored_at: datetime
    subject: str
    data: bytes


def corrected_config(existing: Mapping[str, Any], wanted: StreamConfig) -> dict[str, Any]:
    """已有的配置，只改对错攸关的：收我们的主题、保留方式、满了拒收、去重的时间够长、不该过期的不过期。

    从服务器给的原样改起：大小、副本、压缩、安置、镜像、我们不认识的字段都照旧。
    """
    ours = wanted.as_dict()
    subjects = wanted.subjects or []
    others = [subject for subject in existing.get("subjects") or [] if not any(subject_covers(pattern, subject) for pattern in subjects)]
    is_covered = all(any(subject_covers(pattern, subject) for pattern in existing.get("subjects") or []) for subject in subjects)
    max_age = existing.get("max_age", 0) if wanted.max_age else 0
    corrected = dict(existing) | {"max_age": max_age, "discard": ours["discard"], "retention": ours.get("retention", "limits")}
    if not is_covered:
        corrected["subjects"] = [*subjects, *others]
    window = int(wanted.duplicate_window * 1e9)
    corrected["duplicate_window"] = max(existing.get("duplicate_window", 0), min(window, max_age) if max_age else window)
    return corrected


@dataclass(frozen=True)
class StreamUse:
    """一个流的现状。"""

    messages: int
    share: float
    """占了上限（字节或条数，取多的）的几成；没有上限是零。"""
    has_one_copy: bool
    """服务器是集群，它却只在一个节点上。"""


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

    async def open(self, *, only_publishes: bool = False) -> None:
        """连上并确认有 JetStream；否则一句 NatsUnavailableError 或 NatsRefusedError。

        :param only_publishes: 不问账号：只发事件的用户不必有 $JS.API 的权限。
        """
        if not self._settings.nats_servers:
            raise SettingsError("ETL_NATS_URL is not set: start the stack with `etl up`, or set it to your NATS")
        self._started = self._opening = True
        try:
            await self._connect()
            self._check_version()
            if not only_publishes:
                await self._check_account()
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
                    **self._settings.nats_login,
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
                f"cannot reach NATS at {self._server} within {seconds} s ({header_text(self._cause or '') or 'no answer'}): "
                "start it, or correct ETL_NATS_URL"
            ) from (self._cause or error)

    def _check_version(self) -> None:
        version = self.client.connected_server_version
        if (version.major, version.minor) < OLDEST_SERVER:
            raise NatsRefusedError(f"NATS at {self._server} is version {version}: upgrade it to 2.10 or newer")
        self.context = self.client.jetstream(timeout=5)

    async def _check_account(self) -> None:
        try:
            await self._ask("INFO")
        except nats.errors.Error as error:
            if _is_passing(error) or self.client.is_closed:
                raise NatsUnavailableError(
                    f"JetStream at {self._server} does not answer ({header_text(self._cause or '') or 'no reason given'}): "
                    "look into the server's log, and at this user's permissions"
                ) from error
            raise NatsRefusedError(f"NATS at {self._server} offers no JetStream: start nats-server with -js, or allow this user") from error

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
        """我们自己的流：没有就建，有就只改对错攸关的；大小、副本、安置归运维，改了的不改回去。"""
        name = str(config.name)
        with self._managing(name):
            if existing := await self._found_or_created(config):
                corrected = corrected_config(existing, config)
                if corrected != existing:
                    await self._ask(f"STREAM.UPDATE.{name}", corrected)

    async def adopt_stream(self, config: StreamConfig, subjects: Sequence[str]) -> None:
        """别人的流：只在没有时建，从不修改；它不收我们要的主题就报错。"""
        name = str(config.name)
        with self._managing(name):
            existing = await self._found_or_created(config)
        if existing is None:
            return
        stored = existing.get("subjects") or []
        missing = [subject for subject in subjects if not any(subject_covers(pattern, subject) for pattern in stored)]
        if missing:
            raise StreamConflictError(
                name,
                f"it stores {', '.join(stored) or 'no subjects'}, which does not cover {', '.join(missing)}",
                f"add these subjects to it (`nats stream edit {name}`)",
            )

    async def _found_or_created(self, config: StreamConfig) -> dict[str, Any] | None:
        """已有的流现在的配置；None 表示没有，刚建了。别的进程抢先建好的也是已有的。"""
        name = str(config.name)
        if existing := await self.stream_config(name):
            return existing
        try:
            await self._ask(f"STREAM.CREATE.{name}", config.evolve(num_replicas=self._settings.nats_replicas).as_dict())
        except nats.js.errors.APIError as error:
            if error.err_code != _NAME_IN_USE:
                raise
            return await self.stream_config(name)
        return None

    async def ensure_consumer(self, stream: str, config: ConsumerConfig) -> ConsumerInfo:
        """建立一个拉取消费者；已有的照 config 改，从哪里开始读的不动（服务器也不许动）。"""
        with self._managing(stream):
            if config.durable_name is None:
                return await self._create_consumer(stream, config)
            existing = await self._consumer_info(stream, config.durable_name)
            if existing is None:
                with contextlib.suppress(nats.js.errors.BadRequestError, nats.js.errors.ServerError):
                    return await self._create_consumer(stream, config)
                # 两个进程同时建，起点算得不一样：以先建好的为准；不是这回事，下面再错一次
                existing = await self._consumer_info(stream, config.durable_name)
            begun = existing.config if existing else config
            return await self._create_consumer(
                stream,
                config.evolve(deliver_policy=begun.deliver_policy, opt_start_seq=begun.opt_start_seq, opt_start_time=begun.opt_start_time),
            )

    async def _create_consumer(self, stream: str, config: ConsumerConfig) -> ConsumerInfo:
        where = f"DURABLE.CREATE.{stream}.{config.durable_name}" if config.durable_name else f"CREATE.{stream}.{config.name}"
        answer = await self._ask(f"CONSUMER.{where}", {"stream_name": stream, "config": config.as_dict()})
        return _consumer_info(answer)

    async def consumer_info(self, stream: str, consumer: str) -> ConsumerInfo | None:
        """消费者的现状；没有这个流或消费者就是 None。"""
        with self._managing(stream):
            return await self._consumer_info(stream, consumer)

    async def consumer_names(self, stream: str) -> list[str]:
        """这个流的消费者；没有这个流就是空的。"""
        with self._managing(stream):
            try:
                return [str(name) for name in (await self._ask(f"CONSUMER.NAMES.{stream}"))["consumers"] or []]
            except nats.js.errors.NotFoundError:
                return []

    async def stream_config(self, name: str) -> dict[str, Any] | None:
        """服务器那里的配置，一个字段不少（nats-py 丢掉它不认识的）；没有这个流就是 None。"""
        info = await self._stream_info(name)
        return None if info is None else info["config"]

    async def stream_state(self, name: str) -> StreamState | None:
        """流里有多少、从几号到几号；没有这个流就是 None。"""
        info = await self._stream_info(name)
        return None if info is None else StreamState.from_response(info["state"])

    async def stream_use(self, name: str) -> StreamUse | None:
        """流里有多少、占了上限的几成；没有这个流就是 None。"""
        info = await self._stream_info(name)
        if info is None:
            return None
        state, config = info["state"], info["config"]
        shares = [state[held] / config[limit] for held, limit in (("bytes", "max_bytes"), ("messages", "max_msgs")) if config[limit] > 0]
        is_clustered = bool(info.get("cluster", {}).get("name"))
        return StreamUse(state["messages"], max(shares, default=0.0), is_clustered and config["num_replicas"] == 1)

    async def subject_counts(self, stream: str, subjects: str) -> dict[str, int]:
        """流里这些主题（可含通配符）各有几条，做着的也算；没有这个流就是空的。"""
        info = await self._stream_info(stream, {"subjects_filter": subjects})
        return {} if info is None else info["state"].get("subjects") or {}

    async def stored_message(self, stream: str, sequence: int) -> StoredMessage | None:
        """流里的这一条；已经不在了就是 None。"""
        return await self._message(stream, {"seq": sequence})

    async def last_message(self, stream: str, subject: str) -> StoredMessage | None:
        """这个主题最新的一条；没有就是 None。"""
        return await self._message(stream, {"last_by_subj": subject})

    async def stored_at(self, stream: str, sequence: int) -> datetime | None:
        """流存下这一条的时刻；已经不在了就是 None。"""
        found = await self.stored_message(stream, sequence)
        return None if found is None else found.stored_at

    async def first_message(self, stream: str, subject: str, *, after: int) -> StoredMessage | None:
        """这个主题在 after 之后的第一条；没有就是 None。"""
        return await self._message(stream, {"seq": after + 1, "next_by_subj": subject})

    async def _message(self, stream: str, which: Mapping[str, Any]) -> StoredMessage | None:
        with self._managing(stream):
            try:
                found = (await self._ask(f"STREAM.MSG.GET.{stream}", which))["message"]
            except nats.js.errors.NotFoundError:
                return None
        stored_at = datetime.fromisoformat(found["time"])
        return StoredMessage(stream, found["seq"], stored_at, found["subject"], base64.b64decode(found.get("data") or ""))

    async def delete_message(self, stream: str, sequence: int) -> None:
        """从流里删去一条；已经不在了也算删了。"""
        with self._managing(stream):
            try:
                await self._ask(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence})
            except nats.js.errors.APIError as error:
                if error.err_code != _SEQUENCE_NOT_FOUND:
                    raise

    async def _stream_info(self, name: str, content: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        with self._managing(name):
            try:
                return await self._ask(f"STREAM.INFO.{name}", content)
            except nats.js.errors.NotFoundError:
                return None

    async def _consumer_info(self, stream: str, consumer: str) -> ConsumerInfo | None:
        try:
            return _consumer_info(await self._ask(f"CONSUMER.INFO.{stream}.{consumer}"))
        except nats.js.errors.NotFoundError:
            return None

    async def _ask(self, what: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """问 JetStream 的接口；没有回答（集群在选领导者）就再问，直到 MANAGE_SECONDS。问的都经得起重复。"""
        start = time.monotonic()
        while True:
            try:
                return await self._ask_once(what, content)
            except nats.errors.Error as error:
                if not _is_passing(error) or self.client.is_closed or time.monotonic() - start > MANAGE_SECONDS:
                    raise
            await asyncio.sleep(0.2)

    async def _ask_once(self, what: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = b"" if content is None else json.dumps(content).encode()
        answer: dict[str, Any] = json.loads((await self.client.request(f"$JS.API.{what}", body, timeout=ANSWER_SECONDS)).data)
        if "error" in answer:
            raise nats.js.errors.APIError.from_error(answer["error"])
        return answer

    @contextlib.contextmanager
    def _managing(self, stream: str) -> Iterator[None]:
        try:
            yield
        except (*_AWAY, nats.errors.ConnectionClosedError) as error:
            raise NatsUnavailableError(
                f"JetStream at {self._server} did not answer about stream {stream}: is it still starting?"
            ) from error
        except nats.js.errors.APIError as error:
            if error.err_code in _PASSING:
                raise NatsUnavailableError(
                    f"JetStream at {self._server} cannot manage stream {stream} now ({header_text(error.description)}): "
                    "is the cluster electing a leader, or a node away?"
                ) from error
            remedy = "rename or remove what is in the way, or raise the server's limits"
            if error.err_code == _NOT_CLUSTERED:
                remedy = "set ETL_NATS_REPLICAS to 1, or ETL_NATS_URL to a cluster"
            raise StreamConflictError(stream, header_text(error.description), remedy) from error

    # ---- 发布与确认 -------------------------------------------------------------

    async def publish(self, subject: str, data: bytes, *, message_id: str, headers: Mapping[str, str] | None = None) -> PubAck:
        """存进流里才返回；NATS 不在时以同一个编号重试，限期内等不到就抛错（迟到的那份会被去重）。"""
        self._require_open()
        if not _SUBJECT.fullmatch(subject):
            raise InvalidSubjectError(subject)
        fields = {"Nats-Msg-Id": message_id, **(headers or {})}
        size = len(data) + header_bytes(fields)
        if size > self.client.max_payload:
            raise PayloadTooLargeError(subject, size_bytes=size, limit=f"max_payload of NATS, {self.client.max_payload} bytes")
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
            if (
                isinstance(cause, nats.js.errors.NoStreamResponseError)
                and waited > NO_STREAM_SECONDS
                and await self._has_no_stream(subject)
            ):
                raise StreamMissingError(subject) from cause
            if waited > PUBLISH_SECONDS:
                raise NatsUnavailableError(
                    f"NATS at {self._server} did not store a message for {subject} for {waited:.0f} s "
                    f"({header_text(cause)}): check that it runs, and that the stream has a leader"
                ) from cause
            await asyncio.sleep(delay)
            delay = min(delay * 2, 1.0)

    async def _has_no_stream(self, subject: str) -> bool:
        """服务器亲口说没有流收这个主题才算；选领导者期间谁也不答，那不是没有。"""
        try:
            return not (await self._ask_once("STREAM.NAMES", {"subject": subject}))["streams"]
        except nats.errors.Error:
            return False

    def _require_open(self) -> None:
        if self.client.is_closed or not hasattr(self, "context"):
            raise NatsUnavailableError(f"the connection to NATS at {self._server} is not open: start it first")

    async def confirm(self, message: Msg, verdict: bytes) -> None:
        """了结一条消息，等服务器答应：丢掉的确认就是第二次执行。

        断线期间一直等；连着却许久没有回答就抛错：崩溃过的服务器会忘掉最近的投递，过了 ack_wait 它会重投。
        """
        left_seconds = CONFIRM_SECONDS
        while left_seconds > 0:
            start = time.monotonic()
            try:
                await self.client.request(message.reply, verdict, timeout=ANSWER_SECONDS)
            except _AWAY:
                await asyncio.sleep(0.2)
                if self.client.is_connected:
                    left_seconds -= time.monotonic() - start
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

    async def bury(
        self,
        message: Msg,
        *,
        letters: StreamConfig,
        subject: str,
        reason: str,
        attempts: int,
        is_garbage: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """原文存进死信流之后才终结原消息；中途崩溃会再来一次，编号相同所以只存一份。

        :param is_garbage: 重试没有用的：大的只留开头。
        :raises StreamFullError: 死信流满了；原消息没有动。
        """
        origin = message.metadata
        stored = StoredMessage(origin.stream, origin.sequence.stream, origin.timestamp, message.subject, message.data)
        await self.store_letter(
            stored, letters=letters, subject=subject, reason=reason, attempts=attempts, is_garbage=is_garbage, labels=labels
        )
        await self.confirm(message, b"+TERM dead-lettered")

    async def store_letter(
        self,
        message: StoredMessage,
        *,
        letters: StreamConfig,
        subject: str,
        reason: str,
        attempts: int,
        is_garbage: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """原文存进死信流 letters，它不见了就建回来；再来一次编号相同，所以只存一份。"""
        headers = {
            DeadLetterHeader.REASON: header_text(reason),
            DeadLetterHeader.SUBJECT: message.subject,
            DeadLetterHeader.STREAM: message.stream,
            DeadLetterHeader.SEQUENCE: str(message.sequence),
            DeadLetterHeader.ATTEMPTS: str(attempts),
            **(labels or {}),
        }
        # 带上发布时刻：流重建之后序号会重来
        message_id = f"{message.stream}-{message.sequence}-{message.stored_at.timestamp():.6f}"
        data = message.data
        cut = {
            **headers,
            DeadLetterHeader.ORIGINAL_BYTES: str(len(data)),
            DeadLetterHeader.SHA256: hashlib.sha256(data).hexdigest(),
        }
        room = self.client.max_payload - header_bytes({"Nats-Msg-Id": message_id, **cut})
        if len(data) > (room := min(room, GARBAGE_HEAD_BYTES) if is_garbage else room):
            data, headers = data[:room], cut
        try:
            await self.publish(subject, data, message_id=message_id, headers=headers)
        except StreamMissingError:
            await self.ensure_stream(letters)
            await self.publish(subject, data, message_id=message_id, headers=headers)


class DeadLetterHeader(StrEnum):
    """死信的消息头：为什么、从哪里来。"""

    REASON = "Etl-Reason"
    SUBJECT = "Etl-Subject"
    STREAM = "Etl-Stream"
    SEQUENCE = "Etl-Sequence"
    ATTEMPTS = "Etl-Attempts"
    TASK = "Etl-Task"
    ORIGINAL_BYTES = "Etl-Original-Bytes"
    SHA256 = "Etl-Sha256"
    """这两个只在正文被截短时才有：原来多长、全文的散列。"""


def _consumer_info(answer: dict[str, Any]) -> ConsumerInfo:
    info: ConsumerInfo = ConsumerInfo.from_response(answer)
    return info


def _is_passing(error: nats.errors.Error) -> bool:
    """没有回答，或者答的是现在不行：不是"没有"，也不是"不许"。没有 JetStream 的服务器立刻就说。"""
    if isinstance(error, nats.js.errors.APIError):
        is_away = isinstance(error, nats.js.errors.ServiceUnavailableError) and error.err_code not in _NO_JETSTREAM
        return is_away or error.err_code in _PASSING
    return isinstance(error, _AWAY) and not isinstance(error, nats.errors.NoRespondersError)


def _refusal(subject: str, size_bytes: int, error: nats.js.errors.APIError) -> BridgeError | None:
    """服务器不肯存的原因；None 表示只是暂时不行。"""
    if error.err_code in _NO_ROOM or (error.err_code == _STORE_FAILED and "exceeded" in (error.description or "")):
        return StreamFullError(subject)
    if error.err_code == _MESSAGE_TOO_LARGE:
        return PayloadTooLargeError(subject, size_bytes=size_bytes, limit="the max_msg_size of its stream")
    if _is_passing(error):
        return None
    return StreamConflictError(subject, header_text(error.description), "look into the stream's settings and the server's log")
