"""nats-py 的客户端，在它不够的地方：说了要 TLS 就不明着连；凭据过期了一直再试；证书每次连接重新读。

碰到 nats-py 内部的只有这里，由 test_nats_credentials 看守。
"""

from __future__ import annotations

import ssl
from typing import Any

import nats.errors
from nats.aio.client import Client

from bridge.jetstream.login import NatsLogin, tls_context, wants_tls
from bridge.settings import BridgeSettings
from etl_assets.core.errors import SettingsError

_PASSING_LOGIN = ("authentication expired", "authentication revoked", "authorization violation")


class NatsClient(Client):
    """一条断了就永远重连的连接。"""

    _settings: BridgeSettings | None = None

    def answer_to(self, inbox_prefix: str) -> None:
        """收回答的前缀；connect 才设它，而拉取的人在那之前就起了自己的。"""
        self._inbox_prefix = bytearray(inbox_prefix, "ascii")

    def log_in_with(self, settings: BridgeSettings, login: NatsLogin) -> None:
        """connect 之前：它自己没有这些选项。"""
        self._settings = settings
        self._public_nkey = login.public_key

    @property
    def ssl_context(self) -> ssl.SSLContext:
        if self._settings is None:
            raise TypeError("log_in_with comes before connect")
        try:
            return tls_context(self._settings)
        except SettingsError as error:
            # 换了一半的证书：客户端只对自己的错误再试
            raise nats.errors.Error(f"nats: {error}") from error

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._settings is not None and wants_tls(self._settings):
            # 它只看 tls_required：服务器也可以随客户端要不要；中间的人抹掉了这两项，口令就会明着发出去
            info["tls_required"] = info.get("tls_required") or info.get("tls_available")
            if not info["tls_required"] and not self._settings.nats_tls_first:
                raise nats.errors.SecureConnWantedError
        await super()._process_info(info, initial_connection)

    async def _process_connect_init(self) -> None:
        try:
            await super()._process_connect_init()
            if not self.is_connected:
                # TLS 1.3 里服务器看过客户端的证书才断开，nats-py 当作连上了
                raise nats.errors.Error("nats: the server closed the connection at the login")
        except BaseException:
            self._drop_half_open()
            raise

    def _drop_half_open(self) -> None:
        """没登录成的这条，nats-py 不关：再试一次就多占一个描述符。"""
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None:
                task.cancel()
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]  # nats-py 没有标注它

    async def _process_err(self, err_msg: str) -> None:
        """用着用着过期了、被撤了的：它当作该关闭了；换上新的凭据就好，所以一直再连。"""
        if any(text in err_msg.lower() for text in _PASSING_LOGIN):
            await self._process_op_err(nats.errors.Error(f"nats: {err_msg}"))
        else:
            await super()._process_err(err_msg)
