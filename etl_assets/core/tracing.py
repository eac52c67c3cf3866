"""追踪：一个事件从发布到各资产提交是一条 trace。只在这里碰 OpenTelemetry；没有开的进程什么也不做，也不载入它。

开关与去处是 OpenTelemetry 自己的环境变量：设了 OTEL_EXPORTER_OTLP_ENDPOINT 就开，要装 dayline[otel]。
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import structlog

from etl_assets.core.log import get_logger

logger = get_logger(__name__)

HEADER = "traceparent"
"""W3C Trace Context：版本-trace-span-标志。"""
_WANTED = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_EXPORT_SECONDS = 2

_tracers: list[Any] = []
"""空的：没有开。"""


def start_tracing(component: str) -> None:
    """本进程从此把它的 span 送去；没有装就只说一声。

    :param component: 进程的角色；OTEL_SERVICE_NAME 盖过它。
    """
    if not any(os.environ.get(name) for name in _WANTED):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no traces: install dayline[otel]", error=str(error))
        return
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"dayline-{component}"}
    provider = TracerProvider(resource=Resource.create(named))
    # 收的人不在，命令也不在结束时久等；OTEL_EXPORTER_OTLP_TIMEOUT 盖过它
    timeout_seconds = None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else _EXPORT_SECONDS
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=timeout_seconds)))
    _tracers.append(provider.get_tracer("dayline"))


def is_tracing() -> bool:
    return bool(_tracers)


@contextmanager
def span(name: str, *, parent: str | None = None, links: Sequence[str] = (), **attributes: str | int) -> Iterator[None]:
    """期间的一个 span；里面抛的错记在它上面，里面的日志带着它的 trace_id。

    :param parent: 上游的 traceparent；None 就接着此刻的。
    :param links: 也与它有关的 traceparent。
    """
    if not _tracers:
        yield
        return
    from opentelemetry.trace import Link

    linked, context = [Link(_span_context_of(each)) for each in links], _context_of(parent)
    with _tracers[0].start_as_current_span(name, context=context, links=linked, attributes=attributes) as started:
        trace_id = f"{started.get_span_context().trace_id:032x}"
        with structlog.contextvars.bound_contextvars(trace_id=trace_id):
            yield


def record_span(name: str, *, parent: str, started_at: datetime, ended_at: datetime, **attributes: str | int) -> None:
    """已经过去的一个 span。"""
    start_time, end_time = (int(moment.timestamp() * 1e9) for moment in (started_at, ended_at))
    for tracer in _tracers:
        tracer.start_span(name, context=_context_of(parent), start_time=start_time, attributes=attributes).end(end_time)


def current_headers() -> dict[str, str]:
    """随消息带走的头：此刻的 span，我们的，或者应用自己的；没有谁载入过 OpenTelemetry 就是空的。"""
    headers: dict[str, str] = {}
    if "opentelemetry.trace" in sys.modules:
        _propagator().inject(headers)
    return headers


def traceparent_in(headers: Mapping[str, str] | None) -> str | None:
    """消息头里的；没有、写得不对的是 None。只在开着时问。"""
    found = (headers or {}).get(HEADER)
    return found if found is not None and _span_context_of(found).is_valid else None


def trace_id_of(traceparent: str) -> str:
    """:param traceparent: 从 `traceparent_in` 来的。"""
    return traceparent.split("-")[1]


def _context_of(traceparent: str | None) -> Any:
    """None 是此刻的。"""
    return None if traceparent is None else _propagator().extract({HEADER: traceparent})


def _span_context_of(traceparent: str) -> Any:
    from opentelemetry.trace import get_current_span

    return get_current_span(_context_of(traceparent)).get_span_context()


def _propagator() -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator()
