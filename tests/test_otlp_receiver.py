from __future__ import annotations

import base64
import gzip
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from google.protobuf import json_format
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from examples.otlp_receiver import Point, Received, receiver
from examples.trace_tree import Span
from otel_tasks import TaskManager, TaskPriority
from otel_tasks.testing import run
from tests.helpers import fail, give, rest
from tests.jaeger import fetch_traces
from tests.outline import compare, metrics_outline, outline

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

RESOURCE = Resource.create({"service.name": "shop"})
PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture
def received() -> Iterator[Received]:
    """A receiver for one test."""
    with receiver() as received:
        yield received


def export(
    endpoint: str,
    work: Callable[[TaskManager, Callable[[], object]], Coroutine[Any, Any, object]],
    *,
    compression: Compression = Compression.NoCompression,
) -> None:
    """Run the work with a manager that exports its spans and metrics, and with what sends the latter."""
    spans = OTLPSpanExporter(f"{endpoint}/v1/traces", compression=compression)
    tracer_provider = TracerProvider(resource=RESOURCE)
    tracer_provider.add_span_processor(SimpleSpanProcessor(spans))
    metrics = OTLPMetricExporter(f"{endpoint}/v1/metrics", compression=compression)
    meter_provider = MeterProvider([PeriodicExportingMetricReader(metrics)], resource=RESOURCE)
    manager = TaskManager(
        "work", max_concurrency=2, tracer_provider=tracer_provider, meter_provider=meter_provider
    )
    try:
        run(work(manager, meter_provider.force_flush))
        meter_provider.force_flush()
    finally:
        meter_provider.shutdown()
        tracer_provider.shutdown()


async def shopping(manager: TaskManager, send_metrics: Callable[[], object]) -> None:
    """A task of each end, one that had to wait for its place; metrics are sent while one is still live."""
    async with manager:
        group = manager.get_group("orders")
        stays = manager.create_task(rest(), name="order-17", group=group)
        await manager.create_task(give(1), name="count", group=group)
        failing = manager.create_task(fail(ValueError("no stock")), name="reserve", group=group)
        queued = manager.create_task(give(2), name="mail", group=group, priority=TaskPriority.LOW)
        with pytest.raises(ValueError, match="no stock"):
            await failing
        await queued
        send_metrics()
        await manager.cancel_task(stays.name, reason="sold out")


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip])
def test_spans_and_metrics_of_real_exporters_are_decoded(
    received: Received, compression: Compression
) -> None:
    """The SDK's data, compressed or not, is decoded unchanged; no id is on a metric."""
    export(received.endpoint, shopping, compression=compression)
    packed = {headers.get("content-encoding") for headers in received.headers}
    assert packed == ({"gzip"} if compression is Compression.Gzip else {None})
    assert len({span.trace_id for span in received.spans()}) == 4
    assert outline(received.spans()) == (
        "shop  count  normal task of orders, status unset, success\n"
        "shop  mail  low task of orders, status unset, success\n"
        "shop  order  normal task of orders, status unset, cancelled because explicit\n"
        "shop  reserve  normal task of orders, status error, error with ValueError 'no stock'\n"
    )
    points = received.points()
    live = [point for point in points if point.name == "otel_tasks.task.active"]
    states = {"otel_tasks.group.name": "orders", "otel_tasks.task.state": "active"}
    assert Point("shop", "otel_tasks", live[0].name, "{task}", "up-down counter", states, 1) in live
    assert metrics_outline(point for point in points if point not in live) == (
        "shop  otel_tasks.task.cancellations  counter, {cancellation}  "
        "cancel.reason=explicit, group.name=orders: 1\n"
        "shop  otel_tasks.task.duration  histogram, s  "
        "error.type=ValueError, group.name=orders, task.name=reserve, task.outcome=error: 1\n"
        "shop  otel_tasks.task.duration  histogram, s  "
        "group.name=orders, task.name=count, task.outcome=success: 1\n"
        "shop  otel_tasks.task.duration  histogram, s  "
        "group.name=orders, task.name=mail, task.outcome=success: 1\n"
        "shop  otel_tasks.task.duration  histogram, s  "
        "group.name=orders, task.name=order, task.outcome=cancelled: 1\n"
        "shop  otel_tasks.task.queue.duration  histogram, s  group.name=orders, task.priority=0: 1\n"
    )


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/v1/logs", PROTOBUF, b"", 404),
        ("/v1/traces", {"content-type": "application/json"}, b"{}", 415),
        ("/v1/traces", PROTOBUF, b"\xff\xff", 400),
        ("/v1/metrics", PROTOBUF | {"content-encoding": "gzip"}, b"not packed", 400),
        (
            "/v1/metrics",
            PROTOBUF | {"content-encoding": "gzip"},
            gzip.compress(b"cut short", mtime=0)[:-9],
            400,
        ),
        ("/v1/metrics", PROTOBUF | {"content-encoding": "br"}, b"", 400),
    ],
)
def test_unreadable_request_is_refused_and_not_kept(
    received: Received, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    """A wrong path, type, encoding or body gets the status that a collector gives, and a reason."""
    answer = httpx.post(received.endpoint + path, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.text
    assert received.spans() == []
    assert received.headers == []


def test_a_request_without_a_length_is_refused(received: Received) -> None:
    """No exporter sends one, and the receiver does not wait for what may never end."""
    answer = httpx.post(f"{received.endpoint}/v1/traces", content=iter([b""]), headers=PROTOBUF)
    assert answer.status_code == 411


def test_an_empty_request_is_answered_as_the_specification_wants(received: Received) -> None:
    """The answer is protobuf, and an empty message."""
    answer = httpx.post(f"{received.endpoint}/v1/traces", content=b"", headers=PROTOBUF)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "application/x-protobuf"


def test_everything_is_forwarded_to_another_collector() -> None:
    """With `forward_to`, what came is there as well as here."""
    with receiver() as other, receiver(forward_to=other.endpoint) as received:
        export(received.endpoint, shopping, compression=Compression.Gzip)
        assert received.undelivered == ""
        assert outline(other.spans()) == outline(received.spans())
        assert metrics_outline(other.points()) == metrics_outline(received.points())


def test_request_that_another_collector_refuses_is_kept_and_reported() -> None:
    """The sender does not notice; a collector that takes no metrics has not failed."""
    with receiver() as gone:
        endpoint = gone.endpoint
    with receiver(forward_to=endpoint) as received:
        export(received.endpoint, shopping)
        assert len(received.spans()) == 4
        assert received.undelivered
    with receiver() as other, receiver(forward_to=f"{other.endpoint}/jaeger") as received:
        httpx.post(f"{received.endpoint}/v1/metrics", content=b"", headers=PROTOBUF)
        assert received.undelivered == ""
        httpx.post(f"{received.endpoint}/v1/traces", content=b"", headers=PROTOBUF)
        assert received.undelivered.startswith("/v1/traces: 404 no such path")


def test_received_data_can_be_waited_for(received: Received) -> None:
    """`wait_for` gives what its look finds, and says how little came when it finds nothing."""
    export(received.endpoint, shopping)
    assert received.wait_for(lambda so_far: len(so_far.spans())) == 4
    with pytest.raises(TimeoutError, match=r"not among the \d requests that came within 0 s"):
        received.wait_for(lambda so_far: so_far.spans("0" * 32), timeout=0)


# --- what the tests compare with ---------------------------------------------------------------------------


def test_a_trace_that_differs_from_its_file_fails_with_the_difference(
    received: Received, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message shows missing and surplus lines; on request, the file is written."""
    monkeypatch.setattr("tests.outline.EXPECTED", tmp_path / "expected")
    monkeypatch.delenv("UPDATE_EXPECTED", raising=False)
    with pytest.raises(pytest.fail.Exception, match=r"\+shop  order  cancelled"):
        compare("shop  order  cancelled\n", "shop.txt")
    monkeypatch.setenv("UPDATE_EXPECTED", "1")
    compare("shop  order  cancelled\n", "shop.txt")
    monkeypatch.delenv("UPDATE_EXPECTED")
    compare("shop  order  cancelled\n", "shop.txt")
    with pytest.raises(pytest.fail.Exception, match=r"-shop  order  cancelled\n\+shop  order  success"):
        compare("shop  order  success\n", "shop.txt")


def test_outline_says_where_a_root_is_missing() -> None:
    """A demo that no longer exports its roots differs from its file, whatever else is the same."""
    task = {"otel_tasks.task.priority": 1, "otel_tasks.group.name": "jobs", "otel_tasks.task.id": "work"}
    span = Span("t", "2", "1", "work", 0.0, 1.0, task, service="shop")
    assert outline([span]) == "no root span\n  shop  work  normal task of jobs, status unset\n"
    assert outline([replace(span, parent_id=None)]) == "shop  work  normal task of jobs, status unset\n"


def test_traces_are_read_from_jaegers_interface(received: Received, monkeypatch: pytest.MonkeyPatch) -> None:
    """OTLP's JSON, with ids in hex and enums as numbers, gives the same spans, also those that come late."""
    export(received.endpoint, shopping)
    spans = received.spans()
    sent = {span.trace_id: span for span in spans}
    asked: list[str] = []
    monkeypatch.setattr("tests.jaeger.PAUSE", 0.0)

    def jaeger(request: httpx.Request) -> httpx.Response:
        assert request.url.path.startswith("/api/v3/traces/")
        asked.append(trace_id := request.url.path.rpartition("/")[2])
        if len(asked) <= 1:
            return httpx.Response(404, json={"error": {"httpCode": 404, "message": "No traces found"}})
        return httpx.Response(200, json={"result": as_jaeger_gives_it(received, trace_id)})

    found = fetch_traces("http://jaeger", list(sent), transport=httpx.MockTransport(jaeger))
    assert outline(found) == outline(spans)
    assert {span.span_id for span in found} == {span.span_id for span in spans}


def as_jaeger_gives_it(received: Received, trace_id: str) -> dict[str, Any]:
    """One trace in OTLP's own JSON."""
    (request,) = [
        request
        for request in received.requests
        if any(
            span.trace_id.hex() == trace_id
            for resource in getattr(request, "resource_spans", ())
            for scope in resource.scope_spans
            for span in scope.spans
        )
    ]
    found: dict[str, Any] = with_hex(json_format.MessageToDict(request, use_integers_for_enums=True))
    return found


def with_hex(node: Any) -> Any:
    """Ids as OTLP's JSON has them."""
    if isinstance(node, list):
        return [with_hex(item) for item in node]
    if not isinstance(node, dict):
        return node
    ids = ("traceId", "spanId", "parentSpanId")
    return {
        key: base64.b64decode(value).hex() if key in ids else with_hex(value) for key, value in node.items()
    }
