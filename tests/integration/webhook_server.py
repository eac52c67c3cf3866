"""一台真的 HTTP 服务器，像那些 webhook 一样收消息；要它慢、拒收、转走、一个字节一个字节地答，它就那样。"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Answer:
    """怎样答；dripping 是答不完。"""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    dripping: bool = False


class WebhookServer:
    """`received` 是收到的 (路径, JSON)；`answers` 是各路径怎样答，没有写的都收下。"""

    def __init__(self) -> None:
        self.received: list[tuple[str, Any]] = []
        self.answers: dict[str, Answer] = {}
        self.let_go = threading.Event()
        self.let_go.set()
        """放下它，收到了也先不答。"""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()

    def titles(self, path: str = "/") -> list[str]:
        return [body["title"] for at, body in self.received if at == path]

    def wait_for(self, count: int, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while len(self.received) < count:
            assert time.monotonic() < deadline, self.received
            time.sleep(0.02)


def _handler(server: WebhookServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            server.received.append((path, json.loads(body)))
            server.let_go.wait(60)
            answer = server.answers.get(path, Answer())
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(1_000 if answer.dripping else len(answer.body)))
            self.end_headers()
            if answer.dripping:
                for _ in range(1_000):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            self.wfile.write(answer.body)

        do_GET = do_POST  # noqa: N815  # 跟着 302 走的变成 GET

        def log_message(self, *_: object) -> None:
            """不往 stderr 写。"""

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # 来的人不等了
                return

    return Handler
