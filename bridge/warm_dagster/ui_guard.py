"""网页前的一道门：别的网页不能借人的浏览器来启动、取消、删除。

浏览器替任何网页发请求，只拦着不给它看回答；Dagster 的网页什么来源都照办。这里只认：
自己的主机名（别的域名可以解析到 127.0.0.1）、同源的改动与 WebSocket、不能由表单发出的 POST。
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import parse_qs, urlsplit

from graphql import GraphQLError, OperationDefinitionNode, OperationType, parse
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
# 表单也能发的三种不在内：别的来源要发这两种，浏览器会先来问，而没有人答应
_GRAPHQL_TYPES = frozenset({"application/json", "application/graphql"})
_GRAPHQL = "/graphql"
_DEFAULT_PORTS = {"http": 80, "https": 443}


class UiGuard:
    """包住 Dagster 的 ASGI 应用；拒绝时回答一句话。"""

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], read_only: bool = False) -> None:
        """
        :param hosts: 反向代理用的主机名；本机的名字总在内。
        :param read_only: GraphQL 的改动由 Dagster 自己拒绝；它别的 POST（报告物化）不问，所以在这里拒绝。
        """
        self._app = app
        self._read_only = read_only
        self._proxied = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        refusal = self._refuse(scope, Headers(scope=scope))
        if refusal is None:
            return await self._app(scope, receive, _without_frames(send))
        if scope["type"] == "websocket":
            # 先收下 connect：ASGI 里，拒绝握手是对它的回答
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        status, sentence = refusal
        return await PlainTextResponse(f"{sentence}\n", status)(scope, receive, send)

    def _refuse(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """状态码与一句话；没有什么可拒绝的是 None。"""
        host = headers.get("host", "")
        if (name := _host_name(host)) not in LOOPBACK_NAMES | self._proxied:
            return 421, f"this UI does not answer to the host name {name!r}: add it to ETL_UI_HOSTS if it is meant to"
        reads = scope["type"] == "http" and scope["method"] in _READING
        if not reads and not self._is_same_origin(headers, host):
            return (
                403,
                "a page of another origin may not change anything here: open the UI itself, or add its host name to ETL_UI_HOSTS",
            )
        if self._read_only and scope["type"] == "http" and not reads and scope["path"] != _GRAPHQL:
            return 403, "this UI is read-only (ETL_UI_READ_ONLY)"
        if scope["type"] == "http" and scope["path"] == _GRAPHQL:
            if scope["method"] == "POST" and _media_type(headers) not in _GRAPHQL_TYPES:
                return 403, "GraphQL is posted as application/json, not as a form or as text"
            if reads and _holds_mutation(scope["query_string"]):
                return 403, "a GET request only reads: post the mutation as application/json"
        return None

    def _is_same_origin(self, headers: Headers, host: str) -> bool:
        """浏览器说的来源；不是浏览器就都不说。反向代理改写了 Host 的，看来源是不是它的名字。"""
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        if origin is None:
            return True
        try:
            parts = urlsplit(origin)
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
            own = urlsplit(f"{parts.scheme}://{host}")
            same = (parts.hostname, port) == (own.hostname, own.port or _DEFAULT_PORTS.get(parts.scheme))
        except ValueError:
            return False
        return parts.scheme in _DEFAULT_PORTS and (same or parts.hostname in self._proxied)


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _media_type(headers: Headers) -> str:
    """分号以前的：`text/plain; application/json` 是 text/plain，Dagster 却当它是 JSON。"""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _holds_mutation(query_string: bytes) -> bool:
    """地址里的 GraphQL 有不是查询的操作；读不懂的由 Dagster 去回答。"""
    for text in parse_qs(query_string.decode("latin-1")).get("query", []):
        try:
            operations = [node for node in parse(text).definitions if isinstance(node, OperationDefinitionNode)]
        except GraphQLError:
            continue
        if any(node.operation is not OperationType.QUERY for node in operations):
            return True
    return False


def _without_frames(send: Send) -> Send:
    """别的网页也不能把它放在框里，骗人去点。"""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["X-Frame-Options"] = "SAMEORIGIN"
        await send(message)

    return sending
