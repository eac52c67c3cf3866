"""NATS 答应存下的，断电之后还在不在：连接上看不见它多久落一次盘，只有它的监控口说。"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from bridge.jetstream.connection import JetStreamConnection
from bridge.operations.findings import Finding
from bridge.stack.embedded_nats import is_name_of_embedded

MONITOR_PORT = 8222
"""监控口惯用的端口；连接上的消息不说它在哪里。"""
_PATIENCE_SECONDS = 2.0
_CHECK = "nats sync"
_REMEDY = (
    "set `sync_interval: always` in the jetstream section of its configuration; "
    "imports that it loses are found again, other events are not"
)
_WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def look_at_durability(connection: JetStreamConnection) -> Finding:
    """我们自己起的那一个每次都落盘，不必问。"""
    client = connection.client
    server = client._server_info  # nats-py 没有别的门
    if is_name_of_embedded(server["server_name"]):
        return Finding(_CHECK, "ok", "the embedded server syncs each message to disk")
    url = client.connected_url
    config = _jetstream_config(str(url.hostname) if url else "", server_id=server["server_id"])
    if config is None:
        says = f"whether it syncs each message to disk is not to be seen from here (its monitoring port {MONITOR_PORT} does not answer)"
        return Finding(_CHECK, "ok", f"{says}: it should, {_REMEDY}")
    if config.get("sync_always"):
        return Finding(_CHECK, "ok", "it syncs each message to disk")
    seconds = config.get("sync_interval", 0) / 1e9
    says = f"it syncs to disk every {seconds:.0f} s only, a power failure loses what it has acknowledged since"
    return Finding(_CHECK, "warning", f"{says}: {_REMEDY}")


def _jetstream_config(host: str, *, server_id: str) -> dict[str, Any] | None:
    """监控口说的设置；没有人应、应的是别的服务器，是 None。"""
    address = f"[{host}]" if ":" in host else host
    try:
        with _WITHOUT_PROXY.open(f"http://{address}:{MONITOR_PORT}/varz", timeout=_PATIENCE_SECONDS) as answer:
            said = json.load(answer)
        found: dict[str, Any] | None = said["jetstream"]["config"] if said["server_id"] == server_id else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found
