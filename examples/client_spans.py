"""The spans of a demo's own client: without them, its traces would have no root.

A service that gets a `traceparent` puts its span below the caller's. When the caller exports nothing, that
parent is missing, and Jaeger shows the trace as incomplete. So the demos' clients record and send their spans
too, as a traced front end does.
"""

import json
import os
import re
from collections.abc import Callable, Sequence

import httpx
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor, RequestInfo
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import Span as OpenSpan

from examples.trace_tree import Span

# The stable names of HTTP attributes, which FastAPI's own spans have.
os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")

# Seconds for sending what is kept.
SEND_TIMEOUT = 2.0


class ClientSpans:
    """Records the calls of HTTP clients and keeps their spans until they are sent.

    Args:
        service: The client's `service.name`.
        routes: The paths that it calls, with their parameters in braces. Spans are named after them.
    """

    def __init__(self, service: str, routes: Sequence[str]) -> None:
        self.service = service
        self._routes = {route: re.compile(re.sub(r"\{\w+\}", "[^/]+", route)) for route in routes}
        self._kept = InMemorySpanExporter()
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=Resource.create({"service.name": service}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(SimpleSpanProcessor(self._kept))

    def record(self, client: httpx.AsyncClient, started: Callable[[str], None] | None = None) -> None:
        """Give each call of `client` a span and pass the trace on; `started` gets the trace's id."""

        async def name_after_route(span: OpenSpan, request: RequestInfo) -> None:
            method, path = request.method.decode(), httpx.URL(str(request.url)).path
            span.update_name(f"{method} {self._route(path)}")
            if started is not None:
                started(f"{span.get_span_context().trace_id:032x}")

        HTTPXClientInstrumentor().instrument_client(
            client, tracer_provider=self._provider, request_hook=name_after_route
        )

    def _route(self, path: str) -> str:
        return next(route for route, pattern in self._routes.items() if pattern.fullmatch(path))

    def ended(self) -> list[Span]:
        """The spans of calls that have ended."""
        return [Span.from_json(json.loads(span.to_json())) for span in self._kept.get_finished_spans()]

    def send(self, endpoint: str) -> bool:
        """Send them by OTLP over HTTP, waiting for the network; False where the collector takes none."""
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=SEND_TIMEOUT)
        try:
            return exporter.export(self._kept.get_finished_spans()) is SpanExportResult.SUCCESS
        finally:
            exporter.shutdown()  # type: ignore[no-untyped-call]  # the exporter has no annotation there
