"""网页前的门：什么请求到得了 Dagster，什么得到一句话。"""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message

from bridge.warm_dagster.ui_guard import UiGuard

HOST = {"host": "127.0.0.1:3000"}
JSON = {"content-type": "application/json"}
OWN = {**HOST, "origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-origin"}
MUTATION = quote("mutation { x }")
TWO = quote("query A { y } mutation B { x }")


def ask(
    method: str, target: str, headers: dict[str, str], *, hosts: tuple[str, ...] = (), read_only: bool = False
) -> tuple[int, str, dict[str, str]]:
    """状态码、正文、回答的头；到了应用是 200。"""
    path, _, query_string = target.partition("?")
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query_string.encode(),
        "headers": raw,
    }
    return asyncio.run(_converse(scope, hosts, read_only))


async def _converse(scope: dict[str, Any], hosts: tuple[str, ...], read_only: bool) -> tuple[int, str, dict[str, str]]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        sent.append(message)

    await UiGuard(PlainTextResponse("reached"), hosts=hosts, read_only=read_only)(scope, receive, send)
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], sent[1]["body"].decode(), answered


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        pytest.param("POST", "/graphql", OWN | JSON, id="the UI"),
        pytest.param("POST", "/graphql", HOST | JSON, id="a program"),
        pytest.param(
            "POST", "/graphql", HOST | {"content-type": "application/json; charset=utf-8"}, id="with a charset"
        ),
        pytest.param(
            "POST",
            "/graphql",
            {"host": "localhost:8080", "origin": "http://localhost:8080"} | JSON,
            id="through a tunnel",
        ),
        pytest.param("POST", "/graphql", {"host": "[::1]:3000", "origin": "http://[::1]:3000"} | JSON, id="IPv6"),
        pytest.param("GET", f"/graphql?query={quote('{ y }')}", HOST, id="a query by GET"),
        pytest.param("GET", "/graphql?query=%7Bbroken", HOST, id="what is not GraphQL is answered by Dagster"),
        pytest.param(
            "GET",
            "/runs/1",
            HOST | {"sec-fetch-site": "cross-site", "origin": "http://evil.example"},
            id="a link elsewhere",
        ),
        pytest.param("POST", "/report_asset_materialization/x?partition=1", HOST, id="an external materialization"),
    ],
)
def test_own_and_harmless_requests_reach_the_ui(method: str, target: str, headers: dict[str, str]) -> None:
    status, _, answered = ask(method, target, headers)
    assert status == 200
    assert answered["x-frame-options"] == "SAMEORIGIN"


@pytest.mark.parametrize(
    ("status", "method", "target", "headers"),
    [
        pytest.param(421, "GET", "/", {"host": "evil.example:3000"}, id="a name that resolves to 127.0.0.1"),
        pytest.param(
            421,
            "POST",
            "/graphql",
            {"host": "evil.example:3000", "origin": "http://evil.example:3000"} | JSON,
            id="rebinding",
        ),
        pytest.param(421, "GET", "/", {"host": "127.0.0.1.evil.example"}, id="a name that begins like ours"),
        pytest.param(421, "GET", "/", {"host": "[broken"}, id="a broken host"),
        pytest.param(421, "GET", "/", {}, id="no host"),
        pytest.param(403, "POST", "/graphql", HOST | JSON | {"origin": "http://evil.example"}, id="another origin"),
        pytest.param(403, "POST", "/graphql", HOST | JSON | {"origin": "http://127.0.0.1:3001"}, id="another port"),
        pytest.param(403, "POST", "/graphql", HOST | JSON | {"origin": "null"}, id="a sandboxed frame"),
        pytest.param(403, "POST", "/graphql", HOST | JSON | {"origin": "http://[broken"}, id="a broken origin"),
        pytest.param(403, "POST", "/graphql", HOST | JSON | {"sec-fetch-site": "cross-site"}, id="another site"),
        pytest.param(
            403, "POST", "/graphql", HOST | JSON | {"sec-fetch-site": "same-site"}, id="another port, without an origin"
        ),
        pytest.param(
            403, "POST", "/report_asset_check/x", HOST | {"origin": "http://evil.example"}, id="another endpoint"
        ),
        pytest.param(403, "POST", "/graphql", HOST | {"content-type": "text/plain"}, id="as text"),
        pytest.param(
            403,
            "POST",
            "/graphql",
            HOST | {"content-type": "text/plain; application/json"},
            id="as text that claims to be JSON",
        ),
        pytest.param(
            403,
            "POST",
            f"/graphql?query={MUTATION}",
            HOST | {"content-type": "application/x-www-form-urlencoded"},
            id="a form",
        ),
        pytest.param(403, "POST", f"/graphql?query={MUTATION}", HOST, id="without a type"),
        pytest.param(403, "GET", f"/graphql?query={MUTATION}", HOST, id="a mutation by GET"),
        pytest.param(403, "GET", f"/graphql?query={TWO}&operationName=A", HOST, id="a mutation beside a query"),
        pytest.param(403, "GET", f"/graphql?query=%7By%7D&query={MUTATION}", HOST, id="a mutation after a query"),
    ],
)
def test_others_get_one_sentence(status: int, method: str, target: str, headers: dict[str, str]) -> None:
    found, body, _ = ask(method, target, headers)
    assert (found, body.count("\n")) == (status, 1)
    assert "reached" not in body


def test_reverse_proxy_is_known_by_its_name_whether_it_hands_on_the_host_or_not() -> None:
    handed_on = {"host": "dagster.example", "origin": "https://dagster.example", "sec-fetch-site": "same-origin"} | JSON
    rewritten = HOST | JSON | {"origin": "https://dagster.example", "sec-fetch-site": "same-origin"}
    for headers in (handed_on, rewritten):
        assert ask("POST", "/graphql", headers, hosts=("Dagster.example",))[0] == 200
    assert ask("POST", "/graphql", handed_on)[0] == 421
    assert ask("POST", "/graphql", rewritten)[0] == 403


@pytest.mark.parametrize(
    ("headers", "code"),
    [(OWN, 0), (HOST, 0), (HOST | {"origin": "http://evil.example"}, 1008), ({"host": "evil.example"}, 1008)],
)
def test_websocket_of_another_page_is_closed_before_it_opens(headers: dict[str, str], code: int) -> None:
    opened: list[str] = []

    async def app(scope: Any, _receive: Any, send: Any) -> None:
        opened.append(scope["type"])
        await send({"type": "websocket.accept"})

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "websocket", "path": "/graphql", "query_string": b"", "headers": raw}
    asyncio.run(UiGuard(app, hosts=())(scope, receive, send))
    assert (sent[0].get("code", 0), opened) == (code, [] if code else ["websocket"])


def test_read_only_ui_takes_no_reports() -> None:
    """GraphQL 的改动由 Dagster 自己拒绝；这几个地址它不问。"""
    target = "/report_asset_materialization/x?partition=1"
    assert ask("POST", target, HOST, read_only=True)[:2] == (403, "this UI is read-only (ETL_UI_READ_ONLY)\n")
    assert ask("POST", "/graphql", OWN | JSON, read_only=True)[0] == 200
    assert ask("GET", "/runs", HOST, read_only=True)[0] == 200
