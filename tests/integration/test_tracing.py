"""一条 trace：从发布，经 NATS 的消息头，到三个资产提交；真的进程，真的 OTLP 接收者。"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest
import sqlalchemy as sa

from bridge.events import DataImportCompleted
from bridge.events.subjects import DATA_IMPORT_COMPLETED
from bridge.jetstream.connection import JetStreamConnection
from bridge.settings import BridgeSettings
from etl_assets.definitions import graph
from etl_assets.testing.raw_data import RawData

from .conftest import NatsServer
from .host import etl, eventually, host_environment, running

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

STEPS = {f"materialize {asset}" for asset in graph.names}
OF_THE_APPLICATION = "0af7651916cd43dd8448eb211c80319c"


class ReceivedSpan(NamedTuple):
    """收到的一个：谁送的，叫什么，属于哪条 trace，在谁之下。"""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str


class Collector(ThreadingHTTPServer):
    """收 OTLP/HTTP 的人。"""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def trace(self, trace_id: str) -> dict[str, ReceivedSpan]:
        return {span.name: span for span in self.spans if span.trace_id == trace_id}


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = trace_service.ExportTraceServiceRequest()
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request.ParseFromString(body)
        for resource in request.resource_spans:
            (service,) = [one.value.string_value for one in resource.resource.attributes if one.key == "service.name"]
            self.server.spans += [
                ReceivedSpan(service, span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """不说话。"""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


async def publish_as_an_application(settings: BridgeSettings, event: DataImportCompleted) -> None:
    async with JetStreamConnection(settings, name="application") as connection:
        headers = {"traceparent": f"00-{OF_THE_APPLICATION}-b7ad6b7169203331-01"}
        data = event.model_dump_json(exclude_none=True).encode()
        await connection.publish(DATA_IMPORT_COMPLETED, data, message_id=str(event.event_id), headers=headers)


def trace_ids_of_runs(engine: sa.Engine) -> set[str]:
    with engine.connect() as connection:
        statement = """
            SELECT value FROM dagster.run_tags JOIN dagster.runs USING (run_id)
            WHERE key = 'dagster/dayline/trace_id' AND status = 'SUCCESS'"""
        return set(connection.exec_driver_sql(statement).scalars())


@pytest.mark.timeout(300)
def test_an_event_is_one_trace_from_its_publication_to_the_three_commits(
    collector: Collector,
    engine: sa.Engine,
    raw_data: RawData,
    nats_server: NatsServer,
    tmp_path: Path,
) -> None:
    environment = {
        **host_environment(engine, nats_server.url, tmp_path),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    settings, log = BridgeSettings(nats_url=nats_server.url), tmp_path / "worker.log"
    first = raw_data.add_import([{"order_id": "A-1"}])
    second = raw_data.add_import([{"order_id": "A-2", "ordered_at": datetime(2026, 3, 5, 4, tzinfo=UTC)}])
    with (
        running(etl("listen"), environment=environment, log=tmp_path / "listener.log"),
        running(etl("worker"), environment=environment, log=log),
    ):
        eventually(lambda: '"ready"' in log.read_text(), "the worker does not become ready", 120)
        content = json.dumps({"status": "completed", "import_id": str(first)})
        published = etl("publish", DATA_IMPORT_COMPLETED, content)
        subprocess.run(published, env={**os.environ, **environment}, check=True, stdout=subprocess.DEVNULL)
        eventually(lambda: len(trace_ids_of_runs(engine)) == 1, "no run has a trace")
        (trace_id,) = trace_ids_of_runs(engine)
        names = {f"publish {DATA_IMPORT_COMPLETED}", f"handle {DATA_IMPORT_COMPLETED}", "run", *STEPS}
        eventually(lambda: collector.trace(trace_id).keys() == names, "the trace is not complete")
        found = collector.trace(trace_id)
        root = found[f"publish {DATA_IMPORT_COMPLETED}"]
        assert (root.parent_id, root.service) == ("", "dayline-publish")
        assert found[f"handle {DATA_IMPORT_COMPLETED}"].parent_id == found["run"].parent_id == root.span_id
        assert {found[step].parent_id for step in STEPS} == {found["run"].span_id}
        assert found["run"].service == "dayline-worker"

        event = DataImportCompleted(
            event_id=uuid4(), import_id=second, occurred_at=datetime.now(UTC), status="completed"
        )
        asyncio.run(publish_as_an_application(settings, event))
        eventually(lambda: OF_THE_APPLICATION in trace_ids_of_runs(engine), "the trace of the application is lost")
        eventually(lambda: collector.trace(OF_THE_APPLICATION).keys() >= {"run", *STEPS}, "the trace is not complete")
    finished = [json.loads(line) for line in log.read_text().splitlines() if '"run finished"' in line]
    assert [line["trace_id"] for line in finished] == [trace_id, OF_THE_APPLICATION]


def test_without_the_extra_it_is_one_warning() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk.trace'] = None;"
        "from etl_assets.core import log, tracing; log.configure_logging('test', console=False);"
        "tracing.start_tracing('test')\n"
        "with tracing.span('nothing'): print(tracing.is_tracing(), tracing.current_headers())"
    )
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert [json.loads(line)["message"] for line in result.stderr.splitlines()] == ["no traces: install dayline[otel]"]
    assert result.stdout == "False {}\n"
