"""与 JetStream 的一条连接：连着、问它、发布、确认；监听器、任务队列与发布者共用。"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import PubAck

from bridge.cancelling import cancel_all
from bridge.errors import (
    InvalidSubjectError,
    NatsRefusedError,
    NatsUnavailableError,
    PayloadTooLargeError,
    StreamConflictError,
    StreamMissingError,
)
from bridge.jetstream.client import NatsClient
from bridge.jetstream.headers import header_bytes, header_text
from bridge.jetstream.login import NatsLogin, login_of, servers_without_login, tls_context, wants_tls
from bridge.jetstream.server_errors import AWAY, NOT_CLUSTERED, PASSING, is_passing, refusal
from bridge.settings import BridgeSettings
from etl_assets.core.backoff import Backoff
from etl_assets.core.errors import SettingsError
from etl_assets.core.log import RepeatedWarning, get_logger

logger = get_logger(__name__)

OLDEST_SERVER = (2, 10)
"""一个消费者带几个 filter_subjects 始于 2.10。"""
PUBLISH_SECONDS = 15.0
_PUBLISH_RETRY = Backoff(first_seconds=0.1, longest_seconds=1.0)
# 集群选领导者时，发布的人得到的也是没有流：沉默了这么久才去问清楚
NO_STREAM_SECONDS = 2.0
ANSWER_SECONDS = 2.0
MANAGE_SECONDS = 15.0
"""问流与消费者的事，这么久没有回答才算没有；集群选一个领导者要 4 到 7 秒。"""
CONFIRM_SECONDS = 8.0
"""一次确认，连着却没有回答的工夫。"""
_DENIED = re.compile(r"permissions violation for (?:publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)
_SUBJECT = re.compile(r"[^\s.*>]+(\.[^\s.*>]+)*")


class JetStreamConnection:
    """一条断了就永远重连的连接；只有开头连不上才是错误。`async with` 打开它，离开时断开。"""

    def __init__(self, settings: BridgeSettings, *, name: str, client: NatsClient | None = None) -> None:
        self.client = client or NatsClient()
        self.client.answer_to(settings.nats_inbox_prefix)
        self.context: JetStreamContext = self.client.jetstream(timeout=5)
        self.settings = settings
        self._name = name
        self._server = settings.nats_address
        self._started = False
        self._opening = False
        self._cause: Exception | None = None
        self._login = NatsLogin()
        self._forbidden: set[str] = set()
        self._trouble = RepeatedWarning(logger, "nats trouble")
        self._cannot_beat = RepeatedWarning(logger, "cannot tell NATS that the work goes on")
        self._usable = asyncio.Event()
        self.on_disconnect: list[Callable[[], None]] = []
        """断线或关闭时要调用的。"""

    # ---- 连接 ----------------------------------------------------------------

    async def open(self, *, only_publishes: bool = False) -> None:
        """连上并确认有 JetStream；否则一句 NatsUnavailableError 或 NatsRefusedError。

        :param only_publishes: 不问账号：只发事件的用户不必有 $JS.API 的权限。
        """
        if not self.settings.nats_servers:
            raise SettingsError(
                "ETL_NATS_URL is not set: start the stack with `etl up` and wait until it says ready, or set it to your NATS"
            )
        self._login = login_of(self.settings)
        if wants_tls(self.settings):
            tls_context(self.settings)
        self._started = self._opening = True
        try:
            await self._connect()
            self._check_version()
            if not only_publishes:
                await self._check_account()
        except BaseException:
            # 取消的也要关：永远重连的客户端，没有人要了也还在连
            await self.close()
            raise
        finally:
            self._opening = False
        # 到这里才算可用：开头连不上是错误，中途断开只是等
        self._usable.set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _connect(self) -> None:
        seconds = self.settings.connect_timeout_seconds
        self.client.log_in_with(self.settings, self._login)
        try:
            async with asyncio.timeout(seconds):
                await self.client.connect(
                    servers_without_login(self.settings),
                    name=self._name,
                    **self._login.options,
                    tls_handshake_first=self.settings.nats_tls_first,
                    inbox_prefix=self.settings.nats_inbox_prefix,
                    # 永远重连的客户端里，口令不对也只是连不上、超时：真正的缘由只有它听得到
                    error_cb=self._report,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                    closed_cb=self._closed,
                    # 缺省试 60 次就放弃：NATS 停得久一点，进程活着却再也连不上
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

    async def _check_account(self) -> None:
        try:
            await self.ask("INFO")
        except nats.errors.Error as error:
            if is_passing(error) or self.client.is_closed:
                raise NatsUnavailableError(
                    f"JetStream at {self._server} does not answer ({header_text(self._cause or '') or 'no reason given'}): "
                    "look into the server's log, and at this user's permissions"
                ) from error
            raise NatsRefusedError(
                f"NATS at {self._server} offers no JetStream: start nats-server with -js, or allow this user"
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
            raise NatsUnavailableError(
                f"the connection to NATS at {self._server} was closed ({header_text(self.client.last_error)})"
            )

    async def _report(self, error: Exception) -> None:
        if self._opening:
            self._cause = error
            if reason := login_refusal(error, self._login):
                raise NatsRefusedError(f"NATS at {self._server} {reason}") from error
        if denied := _DENIED.search(str(error)):
            self._forbidden.add(denied[1])
        if self._opening:
            return
        cause = header_text(error) or type(error).__name__
        self._trouble.say(cause, connection=self._name, cause=cause)

    async def _disconnected(self) -> None:
        if self._opening or self.client.is_closed:
            return
        # 先标不可用再叫醒：被叫醒的马上会来问能不能用
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
        for notify in self.on_disconnect:
            notify()

    # ---- 问 ---------------------------------------------------------------------

    async def ask(self, what: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """问 JetStream 的接口；没有回答（集群在选领导者）就再问，直到 MANAGE_SECONDS。问的都经得起重复。"""
        start = time.monotonic()
        while True:
            try:
                return await self._ask_once(what, content)
            except nats.errors.Error as error:
                self._refuse_forbidden(f"$JS.API.{what}", error)
                if not is_passing(error) or self.client.is_closed or time.monotonic() - start > MANAGE_SECONDS:
                    raise
            await asyncio.sleep(0.2)

    async def _ask_once(self, what: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        body = b"" if content is None else json.dumps(content).encode()
        answer: dict[str, Any] = json.loads(
            (await self.client.request(f"$JS.API.{what}", body, timeout=ANSWER_SECONDS)).data
        )
        if "error" in answer:
            raise nats.js.errors.APIError.from_error(answer["error"])
        return answer

    @contextlib.contextmanager
    def managing(self, stream: str) -> Iterator[None]:
        try:
            yield
        except (*AWAY, nats.errors.ConnectionClosedError) as error:
            raise NatsUnavailableError(
                f"JetStream at {self._server} did not answer about stream {stream}: is it still starting?"
            ) from error
        except nats.js.errors.APIError as error:
            if error.err_code in PASSING:
                raise NatsUnavailableError(
                    f"JetStream at {self._server} cannot manage stream {stream} now ({header_text(error.description)}): "
                    "is the cluster electing a leader, or a node away?"
                ) from error
            remedy = "rename or remove what is in the way, or raise the server's limits"
            if error.err_code == NOT_CLUSTERED:
                remedy = "set ETL_NATS_REPLICAS to 1, or ETL_NATS_URL to a cluster"
            raise StreamConflictError(stream, header_text(error.description), remedy) from error

    # ---- 发布与确认 -------------------------------------------------------------

    async def publish(
        self, subject: str, data: bytes, *, message_id: str, headers: Mapping[str, str] | None = None
    ) -> PubAck:
        """存进流里才返回；NATS 不在时以同一个编号重试，限期内等不到就抛错（迟到的那份会被去重）。"""
        if self.client.is_closed or not self._started:
            raise NatsUnavailableError(f"the connection to NATS at {self._server} is not open: start it first")
        if not _SUBJECT.fullmatch(subject):
            raise InvalidSubjectError(subject)
        fields = {"Nats-Msg-Id": message_id, **(headers or {})}
        # 超过 max_payload 的，服务器断开连接：别的发布也跟着失败
        size = len(data) + header_bytes(fields)
        if size > self.client.max_payload:
            raise PayloadTooLargeError(
                subject, size_bytes=size, limit=f"max_payload of NATS, {self.client.max_payload} bytes"
            )
        start = time.monotonic()
        failures = 0
        while True:
            try:
                return await self.context.publish(subject, data, timeout=ANSWER_SECONDS, headers=fields)
            except nats.js.errors.APIError as error:
                # 流满了也是 503，与服务器还没准备好同一个状态码
                if reason := refusal(subject, size, error):
                    raise reason from error
                cause: Exception = error
            except AWAY as error:
                self._refuse_forbidden(subject, error)
                cause = error
            except nats.errors.ConnectionClosedError as error:
                raise NatsUnavailableError(
                    f"the connection to NATS at {self._server} was closed: start the program again"
                ) from error
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
                    f"({header_text(cause)}): check that it runs, and that the stream is there and has a leader"
                ) from cause
            failures += 1
            await asyncio.sleep(_PUBLISH_RETRY.seconds(failures))

    def _refuse_forbidden(self, subject: str, error: nats.errors.Error) -> None:
        """没有回答，是因为服务器不许：它另外说了一声。

        :raises NatsRefusedError: 不许的是哪个主题。
        """
        if any(name.startswith(f"{self.settings.nats_inbox_prefix.lower()}.") for name in self._forbidden):
            raise NatsRefusedError(
                f"NATS at {self._server} does not let this user receive answers on {self.settings.nats_inbox_prefix}: "
                "set ETL_NATS_INBOX_PREFIX to what its permissions name"
            ) from error
        # 服务器的那一句，nats-py 变成小写才给
        if subject.lower() in self._forbidden:
            self._forbidden.discard(subject.lower())
            raise NatsRefusedError(
                f"NATS at {self._server} does not let this user publish to {subject}: "
                "use the credentials of the role that may, or grant it (`etl nats-accounts` shows who may what)"
            ) from error

    async def _has_no_stream(self, subject: str) -> bool:
        """服务器亲口说没有流收这个主题才算；选领导者期间谁也不答，那不是没有。"""
        try:
            return not (await self._ask_once("STREAM.NAMES", {"subject": subject}))["streams"]
        except nats.errors.Error:
            return False

    async def confirm(self, message: Msg, verdict: bytes) -> None:
        """了结一条消息，等服务器答应：丢掉的确认就是第二次执行。

        断线期间一直等；连着却许久没有回答就抛错：崩溃过的服务器会忘掉最近的投递，过了 ack_wait 它会重投。
        """
        left_seconds = CONFIRM_SECONDS
        while left_seconds > 0:
            start = time.monotonic()
            try:
                await self.client.request(message.reply, verdict, timeout=ANSWER_SECONDS)
            except AWAY:
                await asyncio.sleep(0.2)
                if self.client.is_connected:
                    left_seconds -= time.monotonic() - start
            except nats.errors.ConnectionClosedError:
                break
            else:
                return
        raise NatsUnavailableError(
            f"NATS at {self._server} did not confirm an acknowledgement: the message will be delivered again"
        )

    async def postpone(self, message: Msg, delay_seconds: float) -> None:
        """还给队列，过 delay_seconds 再投递。"""
        delay = json.dumps({"delay": int(delay_seconds * 1e9)})
        await self.confirm(message, f"-NAK {delay}".encode() if delay_seconds > 0 else b"-NAK")

    @contextlib.asynccontextmanager
    async def in_progress(self, messages: Sequence[Msg], *, ack_wait_seconds: float) -> AsyncIterator[None]:
        """处理期间按时报平安，服务器才不会把消息投给别人。"""
        # 三分之一：丢了一次、迟了一次，都还赶得上
        beating = asyncio.create_task(self._beat(messages, ack_wait_seconds / 3))
        try:
            yield
        finally:
            await cancel_all(beating)

    async def _beat(self, messages: Sequence[Msg], interval_seconds: float) -> None:
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                for message in messages:
                    await self.client.publish(message.reply, Msg.Ack.Progress)
            except Exception as error:  # noqa: BLE001  # 报平安的死了，长任务就会做两遍：什么错都不能让它停
                self._cannot_beat.say(type(error).__name__, error=header_text(error))


def login_refusal(error: Exception, login: NatsLogin) -> str | None:
    """开头就不成的：什么不成，改哪里；None 是再试也许就成。"""
    text = header_text(error)
    if isinstance(error, nats.errors.SecureConnWantedError):
        return "offers no TLS and nothing was sent: let it, or correct ETL_NATS_URL and ETL_NATS_CA"
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message.rstrip(".")
        return f"has a certificate that is refused ({reason}): correct ETL_NATS_CA, ETL_NATS_URL or the server's certificate"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "").lower().replace("_", " ")
        if "alert" in reason:
            return f"refuses our client certificate ({reason}): correct ETL_NATS_CERT and ETL_NATS_KEY"
        if "wrong version" in reason or "record layer" in reason:
            return "does not begin with TLS: correct ETL_NATS_TLS_FIRST"
    if "authorization violation" in text.lower() or "authentication expired" in text.lower():
        expired = " (expired)" if "expired" in text.lower() else ""
        return f"refuses {login.what}{expired}: correct {login.setting}"
    return None
