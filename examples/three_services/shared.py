"""Code that all three services share: OpenTelemetry, calls to each other, and a list of their tasks.

Only the last function uses the library: set up OpenTelemetry as for any other service, and the tasks have
their spans.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from fastapi import APIRouter
from fastapi.telemetry import TelemetryConfig
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from otel_tasks import TaskManager

# The stable names of HTTP attributes, as in FastAPI's own spans; httpx's spans have the old ones by default.
os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")

NOT_FOUND = 404

# FastAPI records the span of each request itself, and takes the caller's `traceparent` for its parent. Its
# spans per dependency and endpoint are left out, to keep the picture to requests and tasks.
TELEMETRY: TelemetryConfig = {
    "operation_spans": False,
    "exclude": lambda scope: scope["path"].startswith("/debug/"),
}


def set_up_telemetry(service: str) -> Callable[[], Awaitable[None]]:
    """Send spans and metrics by OTLP over HTTP if `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

    Returns:
        A function that sends the rest when the service stops. `atexit` is not enough: uvicorn ends by the
        signal that stopped it, and then nothing runs at exit.
    """
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return _nothing_to_send
    resource = Resource.create({"service.name": service})
    tracer_provider = TracerProvider(resource=resource)
    tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracer_provider)
    meter_provider = None
    # Jaeger takes only traces: with it, the variable is `none`.
    if os.environ.get("OTEL_METRICS_EXPORTER") != "none":
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        meter_provider = MeterProvider([reader], resource=resource)
        metrics.set_meter_provider(meter_provider)

    def flush() -> None:
        tracer_provider.force_flush(3000)
        if meter_provider is not None:
            meter_provider.force_flush(3000)

    async def send_the_rest() -> None:
        # In a thread, because it waits for the network.
        await asyncio.to_thread(flush)

    return send_the_rest


async def _nothing_to_send() -> None:
    pass


def connect(url: str) -> httpx.AsyncClient:
    """Return a client of the service at `url`; each call has a span and passes the trace on.

    A call whose task is cancelled closes its connection, which is how the other service learns of it.
    """
    client = httpx.AsyncClient(base_url=url, timeout=60.0)
    HTTPXClientInstrumentor().instrument_client(client)
    return client


def debug_routes(manager: TaskManager) -> APIRouter:
    """``GET /debug/tasks``: what runs now. A service that is reachable from outside would not have it."""
    router = APIRouter()

    @router.get("/debug/tasks", include_in_schema=False)
    async def live_tasks() -> list[dict[str, Any]]:
        known = manager.get_all_task_info().values()
        return [info.to_dict() for info in known if not info.status.is_final]

    return router
