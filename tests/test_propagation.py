"""The current span as text: what goes into a carrier, and what a process makes of it."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any

from opentelemetry import baggage, propagate, trace
from opentelemetry import context as otel_context
from opentelemetry.propagators.composite import CompositePropagator

from otel_tasks import TaskManager
from otel_tasks._core.telemetry.propagation import extract, inject
from tests.helpers import give

if TYPE_CHECKING:
    import pytest

    from otel_tasks.testing import SpanRecorder

here = contextvars.ContextVar("here", default="outside")


def sent(recorder: SpanRecorder) -> tuple[dict[str, str], trace.SpanContext]:
    """What a span of another process wrote, and its identity."""
    carrier: dict[str, str] = {}
    with recorder.provider.get_tracer("remote").start_as_current_span("remote") as span:
        inject(carrier)
    return carrier, span.get_span_context()


def test_the_current_span_is_written(spans: SpanRecorder) -> None:
    """W3C trace context, by default, with the baggage."""
    with spans.provider.get_tracer("app").start_as_current_span("call") as span:
        token = otel_context.attach(baggage.set_baggage("tenant", "acme"))
        carrier: dict[str, str] = {}
        inject(carrier)
        otel_context.detach(token)
    identity = span.get_span_context()
    assert carrier == {
        "traceparent": f"00-{identity.trace_id:032x}-{identity.span_id:016x}-01",
        "baggage": "tenant=acme",
    }


def test_nothing_is_written_without_a_span() -> None:
    """A process without an SDK sends no header."""
    carrier: dict[str, str] = {}
    inject(carrier)
    assert carrier == {}


async def test_a_task_in_the_extracted_context_is_a_child(spans: SpanRecorder) -> None:
    """The remote span is the parent, and the context variables are those of the code that received it."""
    carrier, remote = sent(spans)
    manager = TaskManager(tracer_provider=spans.provider)
    here.set("inside")
    context = extract(carrier)
    assert context[here] == "inside"
    assert await manager.create_task(give(1), name="render", context=context) == 1

    span = spans.span("render")
    assert span.parent is not None
    assert span.context is not None
    assert (span.parent.span_id, span.context.trace_id) == (remote.span_id, remote.trace_id)


async def test_a_task_in_a_new_trace_links_to_the_remote_span(spans: SpanRecorder) -> None:
    """With ``trace="new"``, it starts a trace of its own and names the span that sent it."""
    carrier, remote = sent(spans)
    manager = TaskManager(tracer_provider=spans.provider)
    await manager.create_task(give(1), name="render", context=extract(carrier), trace="new")

    span = spans.span("render")
    assert span.parent is None
    assert [(link.context.span_id, dict(link.attributes or {})) for link in span.links] == [
        (remote.span_id, {"otel_tasks.link": "spawned_by"})
    ]


def test_without_a_remote_span_none_is_current(spans: SpanRecorder) -> None:
    """A message without a trace is not the work of the span that is current where it arrives."""
    with spans.provider.get_tracer("app").start_as_current_span("receive"):
        context = extract({})
    assert not context.run(trace.get_current_span).get_span_context().is_valid


class Broken(CompositePropagator):
    """Raises for whatever it is asked."""

    def __init__(self) -> None:
        super().__init__([])

    def inject(self, *args: Any, **kwargs: Any) -> None:
        """Raise."""
        raise RuntimeError("no inject")

    def extract(self, *args: Any, **kwargs: Any) -> otel_context.Context:
        """Raise."""
        raise RuntimeError("no extract")


def test_a_broken_propagator_breaks_nothing(
    spans: SpanRecorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its errors are logged; the message goes out without a trace, and arrives without one."""
    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", Broken())
    carrier, _ = sent(spans)
    assert carrier == {}
    assert extract(carrier) is not None
