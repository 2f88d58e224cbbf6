"""A receiver of OTLP over HTTP that keeps what it is sent: Jaeger's place in the demo and in the tests.

It takes what OpenTelemetry's exporters send (``POST /v1/traces`` and ``/v1/metrics``, protobuf, with gzip or
without), and refuses what it cannot read as a collector does, with a reason.
"""

import contextlib
import gzip
import http.server
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, TypeAlias, TypeVar

import httpx
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1 import trace_pb2

from examples.trace_tree import Span

T = TypeVar("T")
ExportRequest: TypeAlias = ExportTraceServiceRequest | ExportMetricsServiceRequest

_REQUESTS: dict[str, type[ExportRequest]] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
}
_RESPONSES: dict[str, type[Message]] = {
    "/v1/traces": ExportTraceServiceResponse,
    "/v1/metrics": ExportMetricsServiceResponse,
}
_PROTOBUF = "application/x-protobuf"
_SIZE_LIMIT = 64 * 2**20
# Seconds for passing on one request.
_FORWARD_TIMEOUT = 2.0


@dataclass(frozen=True)
class Point:
    """One number of a metric, with its attributes; for a histogram, the count."""

    service: str
    scope: str
    name: str
    unit: str
    kind: str
    attributes: dict[str, Any]
    value: float


class Received:
    """The data received so far. Any thread may read it while more arrives.

    Args:
        endpoint: Where the receiver listens, as ``OTEL_EXPORTER_OTLP_ENDPOINT`` wants it.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        # Of each request the headers too: tests look at them.
        self.headers: list[dict[str, str]] = []
        self.undelivered = ""
        self._news = threading.Condition()
        self.requests: list[ExportRequest] = []

    def spans(self, trace_id: str | None = None) -> list[Span]:
        """All spans, or those of one trace, in the order of arrival."""
        with self._news:
            requests = list(self.requests)
        spans = (
            span for request in requests if isinstance(request, ExportTraceServiceRequest)
            for span in spans_of(request)
        )  # fmt: skip
        return [span for span in spans if trace_id in (None, span.trace_id)]

    def points(self) -> list[Point]:
        """All points of all metrics, repeated as each export sends them again."""
        with self._news:
            requests = [each for each in self.requests if isinstance(each, ExportMetricsServiceRequest)]
        return list(chain.from_iterable(map(points_of, requests)))

    def wait_for(self, look: Callable[["Received"], T], *, timeout: float = 10.0) -> T:
        """Look at once and whenever something has come, until `look` gives something true.

        Raises:
            TimeoutError: It has not, in so many seconds.
        """
        end = time.monotonic() + timeout
        # Held while looking too: it is a lock that its owner may take again, and nothing comes unseen.
        with self._news:
            while not (found := look(self)):
                if not self._news.wait(end - time.monotonic()):
                    came = len(self.requests)
                    raise TimeoutError(f"not among the {came} requests that came within {timeout} s")
            return found

    def take(self, request: ExportRequest, headers: dict[str, str]) -> None:
        """Keep a request."""
        with self._news:
            self.requests.append(request)
            self.headers.append(headers)
            self._news.notify_all()


@contextlib.contextmanager
def receiver(*, forward_to: str = "") -> Iterator[Received]:
    """Receive on a free port of the loopback interface, until the block is left.

    Args:
        forward_to: The OTLP endpoint of another collector, to which all is passed on as it came. What that
            one does not take is not lost here, and the sender does not hear of it: see
            ``Received.undelivered``.
    """
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.forward_to = forward_to.rstrip("/")
        server.received = Received(f"http://127.0.0.1:{server.server_port}")
        # It looks that often whether it is to end.
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="otlp receiver")
        thread.start()
        try:
            yield server.received
        finally:
            server.shutdown()
            thread.join()


class _Refusal(NamedTuple):
    status: int
    reason: str


class _Server(http.server.ThreadingHTTPServer):
    # Requests that are being answered are waited for when it closes, that no batch is cut in two.
    daemon_threads = False
    forward_to: str
    received: Received


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 10.0  # seconds for a sender that does not go on

    @property
    def owner(self) -> _Server:
        """The server, as what it is."""
        assert isinstance(self.server, _Server)
        return self.server

    def do_POST(self) -> None:
        answer = self._take()
        if isinstance(answer, _Refusal):
            self._send(answer.status, "text/plain; charset=utf-8", answer.reason.encode())
        else:
            self._send(200, _PROTOBUF, answer)

    def _take(self) -> bytes | _Refusal:
        """Read, decode and keep one request; gives the body of the answer."""
        size = self.headers.get("content-length", "")
        if not size.isdecimal() or int(size) > _SIZE_LIMIT:
            return _Refusal(411, f"content-length must be given, and at most {_SIZE_LIMIT}")
        # Read in any case: a sender that is answered before it has sent all sees a broken connection.
        raw = self.rfile.read(int(size))
        if self.path not in _REQUESTS:
            return _Refusal(404, f"no such path, known are {', '.join(_REQUESTS)}")
        if self.headers.get_content_type() != _PROTOBUF:
            return _Refusal(415, f"content-type must be {_PROTOBUF}, got {self.headers['content-type']}")
        try:
            body = _unpack(raw, self.headers.get("content-encoding", "identity"))
            request = _REQUESTS[self.path].FromString(body)
        except (DecodeError, ValueError, EOFError, OSError, zlib.error) as error:
            return _Refusal(400, f"not to be read: {error}")
        self._forward(raw)
        self.owner.received.take(request, {name.lower(): value for name, value in self.headers.items()})
        return _RESPONSES[self.path]().SerializeToString()

    def _forward(self, raw: bytes) -> None:
        received = self.owner.received
        if not self.owner.forward_to or received.undelivered:
            return  # one complaint is enough, and no sender is to wait for each
        names = ("content-type", "content-encoding")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        try:
            answer = httpx.post(
                self.owner.forward_to + self.path, content=raw, headers=headers, timeout=_FORWARD_TIMEOUT
            )
            # Jaeger knows no metrics.
            if answer.is_error and not (answer.status_code == 404 and self.path == "/v1/metrics"):
                received.undelivered = f"{self.path}: {answer.status_code} {answer.text}".strip()
        except httpx.HTTPError as error:
            received.undelivered = f"{self.path}: {error}"

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _unpack(raw: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.decompress(raw)
    if encoding == "identity":
        return raw
    raise ValueError(f"content-encoding must be gzip or none, got {encoding}")


# --- decoding --------------------------------------------------------------------------------------------


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Span]:
    """The spans of a request, with the resource that each is of."""
    for resource in request.resource_spans:
        attributes = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _span(span, attributes)


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex() or None,
        name=span.name,
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes=_attributes(span.attributes),
        description=span.status.message,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        service=resource.get("service.name", ""),
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        links=tuple(
            (str(_attributes(link.attributes).get("otel_tasks.link", "")), link.span_id.hex())
            for link in span.links
        ),
        events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
        resource=resource,
    )


def points_of(request: ExportMetricsServiceRequest) -> Iterator[Point]:
    """The points of a request's metrics, with the service that each is of."""
    for resource in request.resource_metrics:
        service = _attributes(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                kind, numbers = _numbers(metric)
                for attributes, value in numbers:
                    yield Point(
                        service,
                        scope.scope.name,
                        metric.name,
                        metric.unit,
                        kind,
                        _attributes(attributes),
                        value,
                    )


def _numbers(metric: Metric) -> tuple[str, list[tuple[Iterable[KeyValue], float]]]:
    kind = metric.WhichOneof("data")
    if kind == "histogram":
        return kind, [(point.attributes, point.count) for point in metric.histogram.data_points]
    if kind == "sum":
        name = "counter" if metric.sum.is_monotonic else "up-down counter"
        return name, [(point.attributes, point.as_int + point.as_double) for point in metric.sum.data_points]
    if kind == "gauge":
        return kind, [(p.attributes, p.as_int + p.as_double) for p in metric.gauge.data_points]
    return str(kind), []


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)
