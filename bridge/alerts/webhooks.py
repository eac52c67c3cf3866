"""把一条消息交给一个地址，用 apprise：钉钉、企业微信、飞书、Slack、邮件、webhook……碰到它内部的都在这里，由 test_alerts 看守。

地址里有令牌，除了交给 apprise，哪里也不写；称呼它用 `dingtalk-1`：种类与它在 ETL_ALERT_URLS 里的次序。
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any

from bridge.alerts.messages import Message
from etl_assets.core.errors import SettingsError, TransientError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0
DEADLINE_SECONDS = 20.0
"""一次至多这么久：一个字节一个字节地答的，上面两个都管不住它。"""


class NotTakenError(TransientError):
    """地址没有收下消息；只说为什么，不说地址。"""


@dataclass
class Channel:
    """一个地址。"""

    name: str
    url: str = field(repr=False)
    _sending: threading.Thread | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """给人看的地址：主机、路径里也可能有令牌，都不写。"""
        return f"{self.url.partition('://')[0]}://***"

    def check(self) -> None:
        """:raises SettingsError: apprise 不认识这个地址。"""
        _ = self._service

    @cached_property
    def _service(self) -> Any:
        apprise = _load_apprise()
        # 别人的重定向不跟：消息与令牌不该去不是我们写下的地方
        asset = apprise.AppriseAsset(app_id="dayline", http_redirects=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 头一个地址导入全部插件，其中有 imghdr
            service = apprise.Apprise.instantiate(self.url, asset=asset)
        if service is None:
            raise SettingsError(
                f"ETL_ALERT_URLS: {self.name} ({self.shown}) is no address that apprise understands: "
                "see https://appriseit.com/services/ for how each service is written"
            )
        service.socket_connect_timeout, service.socket_read_timeout = CONNECT_SECONDS, ANSWER_SECONDS
        return service

    def send(self, message: Message) -> None:
        """交出去，等它收下，至多 DEADLINE_SECONDS；没有答完的由它去，不再等。

        :raises NotTakenError: 没有收下，或者不知道收下没有。
        :raises SettingsError: 不认识这个地址。
        """
        service, problems = self._service, list[str]()
        if self._sending is not None and self._sending.is_alive():
            raise NotTakenError("the answer to the message before is still awaited")
        taken = threading.Event()

        def deliver() -> None:
            with _noting(problems):
                if _notify(service, message):
                    taken.set()

        self._sending = threading.Thread(target=deliver, name="alert", daemon=True)
        self._sending.start()
        self._sending.join(DEADLINE_SECONDS)
        if not taken.is_set():
            why = problems[0] if problems else f"it gave no answer within {DEADLINE_SECONDS:.0f} s"
            raise NotTakenError(self._without_secrets(why))

    def _without_secrets(self, text: str) -> str:
        """别人的回答里也许抄着令牌。"""
        for part in _LIKE_A_TOKEN.findall(self.url.partition("://")[2]):
            text = text.replace(part, "***")
        return text


def channels_of(urls: Sequence[str]) -> list[Channel]:
    return [
        Channel(f"{url.partition('://')[0].lower()[:20]}-{number}", url) for number, url in enumerate(urls, start=1)
    ]


def _notify(service: Any, message: Message) -> bool:
    kind = _load_apprise().NotifyType
    try:
        return bool(
            service.notify(
                title=message.title, body=message.body, notify_type=kind.SUCCESS if message.is_over else kind.FAILURE
            )
        )
    except Exception as error:  # noqa: BLE001  # 几百种插件，抛什么都不能拖住别的地址
        _problems.of_thread.append(type(error).__name__)
        return False


# ---- apprise 只说成不成，缘由在它的日志里；它的日志里也有地址 ----------------------------


class _Problems(threading.local):
    of_thread: list[str]


_problems = _Problems()
_LIKE_A_TOKEN = re.compile(r"[\w-]{6,}")
_STATUS = re.compile(r"error=(\d{3})\b")


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """期间本线程里 apprise 说的缘由，记进 problems，只取不含地址的那一点。"""
    _problems.of_thread = problems
    yield
    del _problems.of_thread


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        problems: list[str] | None = getattr(_problems, "of_thread", None)
        if problems is None or record.levelno < logging.WARNING:
            return
        text = record.getMessage()
        if found := _STATUS.search(text):
            problems.append(f"it answered HTTP {found[1]}")
        elif "onnection error" in text:
            problems.append("it cannot be reached, or did not answer in time")
        else:
            problems.append("it was refused")


@lru_cache(maxsize=1)
def _load_apprise() -> ModuleType:
    """用到才载入：`etl --help` 与没有设 ETL_ALERT_URLS 的进程不必等它。"""
    import apprise
    from apprise.plugins import dingtalk, wecombot

    logger = logging.getLogger("apprise")
    logger.handlers, logger.propagate = [_Listener()], False
    for plugin in (dingtalk, wecombot):
        vars(plugin)["requests"] = _Strict(vars(plugin)["requests"])
    return apprise


class _Strict:
    """钉钉与企业微信拒收也答 200，缘由在正文的 errcode 里；apprise 不看，关键词不合的就无声地丢了。"""

    def __init__(self, requests: Any) -> None:
        self._requests = requests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._requests, name)

    def post(self, *args: Any, **options: Any) -> Any:
        response = self._requests.post(*args, **options)
        try:
            answer = response.json()
        except ValueError:
            return response
        if isinstance(answer, dict) and (code := answer.get("errcode")):
            said = " ".join(str(answer.get("errmsg", "")).split())[:200]
            _problems.of_thread.append(f"it refused the message: {code} {said}".strip())
            raise self._requests.RequestException("refused")
        return response
