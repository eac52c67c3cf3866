"""别的网页打开着的时候：它发来的请求什么也改不了；真的服务器，真的浏览器。"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, urlsplit

import pytest
from playwright.sync_api import sync_playwright
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from bridge.stack.addresses import StackAddresses
from tests.acceptance.chromium import CHROMIUM, QUIET, needs_chromium
from tests.acceptance.conftest import Query
from tests.acceptance.dagster_ui import REPOSITORY

DAY = "1999-11-03"
LAUNCH = "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename } }"
VARIABLES = {
    "p": {
        "selector": {**REPOSITORY, "jobName": "__ASSET_JOB", "assetSelection": [{"path": ["orders"]}]},
        "runConfigData": {},
        "mode": "default",
        "executionMetadata": {
            "tags": [{"key": "dagster/partition", "value": DAY}, {"key": "from", "value": "elsewhere"}]
        },
    }
}
BODY = json.dumps({"query": LAUNCH, "variables": VARIABLES})
TARGET = f"/graphql?query={quote(LAUNCH)}&variables={quote(json.dumps(VARIABLES))}"
LAUNCHED = 'query { runsOrError(filter: { tags: [{ key: "from", value: "elsewhere" }] }) { ... on Runs { results { runId } } } }'


def launched(query: Query) -> int:
    return len(query(LAUNCHED)["runsOrError"]["results"])


@pytest.mark.parametrize(
    ("status", "method", "target", "headers"),
    [
        pytest.param(403, "GET", TARGET, {}, id="GET"),
        pytest.param(403, "POST", TARGET, {}, id="POST with the mutation in the address"),
        pytest.param(
            403, "POST", "/graphql", {"Content-Type": "text/plain; application/json"}, id="text that claims to be JSON"
        ),
        pytest.param(
            403,
            "POST",
            "/graphql",
            {"Content-Type": "application/json", "Origin": "https://evil.example"},
            id="other origin",
        ),
        pytest.param(
            421, "POST", "/graphql", {"Content-Type": "application/json", "Host": "evil.example:3000"}, id="other host"
        ),
    ],
)
def test_mutation_of_a_foreign_page_is_refused_in_one_sentence(
    stack: StackAddresses, query: Query, status: int, method: str, target: str, headers: dict[str, str]
) -> None:
    connection = http.client.HTTPConnection(urlsplit(stack.ui_url).netloc, timeout=60)
    connection.request(method, target, BODY if target == "/graphql" else None, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert (answer.status, text.count("\n")) == (status, 1)
    assert launched(query) == 0


def test_subscriptions_are_for_the_ui_alone(stack: StackAddresses) -> None:
    address = f"{stack.ui_url.replace('http', 'ws')}/graphql"
    protocols = [Subprotocol("graphql-ws")]
    with connect(address, origin=Origin(stack.ui_url), subprotocols=protocols) as own:
        own.send(json.dumps({"type": "connection_init"}))
        assert json.loads(own.recv(timeout=30)) == {"type": "connection_ack"}
    with pytest.raises(InvalidStatus, match="403"):
        connect(address, origin=Origin("https://evil.example"), subprotocols=protocols)


PAGE = """<!doctype html><title>elsewhere</title>
<iframe name="sink"></iframe><iframe id="framed" src="{ui}/runs"></iframe>
<form id="form" method="post" target="sink" action="{ui}{target}"><input name="a" value="b"></form>
<form id="text" method="post" target="sink" enctype="text/plain" action="{ui}/graphql"></form>
<script>
const ui = {ui_json}, body = {body_json}, target = {target_json};
async function attack() {{
  const outcomes = [];
  const attempt = async (name, promise) => outcomes.push([name, await promise.then(r => r.type, e => e.name)]);
  await attempt("get", fetch(ui + target, {{mode: "no-cors", credentials: "include"}}));
  await attempt("text", fetch(ui + "/graphql", {{method: "POST", mode: "no-cors", body, headers: {{"Content-Type": "text/plain"}}}}));
  await attempt("json", fetch(ui + "/graphql", {{method: "POST", body, headers: {{"Content-Type": "application/json"}}}}));
  outcomes.push(["socket", await new Promise(done => {{
    const socket = new WebSocket(ui.replace("http", "ws") + "/graphql", "graphql-ws");
    socket.onopen = () => done("open"); socket.onerror = () => done("refused");
  }})]);
  document.getElementById("form").submit();
  await new Promise(done => document.getElementsByName("sink")[0].onload = done);
  return outcomes;
}}
</script>"""


@pytest.fixture
def elsewhere(stack: StackAddresses) -> Iterator[str]:
    """另一个来源的网页；localhost 与 127.0.0.1 连同一个站点都不是。"""
    html = PAGE.format(
        ui=stack.ui_url,
        target=TARGET,
        ui_json=json.dumps(stack.ui_url),
        body_json=json.dumps(BODY),
        target_json=json.dumps(TARGET),
    )

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # 标准库规定的名字
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: object) -> None:
            """不出声。"""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_address[1]}/"
        server.shutdown()


@needs_chromium
def test_page_of_another_origin_launches_nothing_in_a_browser(query: Query, elsewhere: str) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        page = browser.new_page()
        statuses: list[int] = []
        page.on("response", lambda response: statuses.append(response.status) if "/graphql" in response.url else None)
        page.goto(elsewhere)
        outcomes = dict(page.evaluate("attack()"))
        framed = page.frame_locator("#framed").get_by_text("Runs").count()
        browser.close()
    assert outcomes == {"get": "opaque", "text": "opaque", "json": "TypeError", "socket": "refused"}
    assert set(statuses) <= {403, 405}
    assert framed == 0
    assert launched(query) == 0
