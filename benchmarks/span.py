"""A span for each task: by hand, by contrib's asyncio instrumentation, and by this library."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from opentelemetry.instrumentation.asyncio import AsyncioInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from benchmarks import peers
from benchmarks.measure import Effort, Table, cpu_clock, tabulate, take_turns
from benchmarks.peers import work
from otel_tasks import TaskManager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Tracer

    from benchmarks.measure import Side
    from benchmarks.peers import Work

BY_HAND = "by hand"
BY_HAND_FULL = "by hand, same attributes"
CONTRIB = "contrib asyncio"
# Fewer than the batch processor's queue takes (2048): no span is dropped, which would be cheap.
COUNT = 1_000


class Discard(SpanExporter):
    """An exporter that costs nothing."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Forget them."""
        return SpanExportResult.SUCCESS


def run(effort: Effort) -> list[Table]:
    """Measure with three kinds of provider."""
    share = effort.less(1 / 3)
    return [
        asyncio.run(_measure("span-batch", "batch processor, discarding exporter", _batching(), share)),
        asyncio.run(_measure("span-plain", "no processor", TracerProvider(sampler=ALWAYS_ON), share)),
        asyncio.run(_measure("span-unsampled", "sampled out", TracerProvider(sampler=ALWAYS_OFF), share)),
    ]


def _batching() -> TracerProvider:
    provider = TracerProvider(sampler=ALWAYS_ON)
    provider.add_span_processor(BatchSpanProcessor(Discard()))
    return provider


async def _measure(table_id: str, what: str, provider: TracerProvider, effort: Effort) -> Table:
    tracer = provider.get_tracer("benchmarks")
    create_traced = _instrumented(provider)
    works: dict[str, Work] = {
        BY_HAND: _creating(lambda: by_hand(tracer)),
        BY_HAND_FULL: _creating(lambda: by_hand_full(tracer)),
        CONTRIB: _creating(work, create_traced),
        **peers.batch_ours(TaskManager(tracer_provider=provider)),
    }
    sides = {name: _flushed(each, provider) for name, each in works.items()}
    title = f"A task with a span: {what}"
    try:
        return tabulate(Table(table_id, title, "µs per task", BY_HAND, 0), await take_turns(sides, effort))
    finally:
        provider.shutdown()


def _flushed(each: Work, provider: TracerProvider) -> Side:
    async def side() -> float:
        begin = cpu_clock()
        await each(COUNT)
        # Inside the measured time, so that the exporter's work counts toward the side that made the spans.
        provider.force_flush()
        return (cpu_clock() - begin) / COUNT

    return side


async def by_hand(tracer: Tracer) -> None:
    """The code without any library."""
    with tracer.start_as_current_span("work"):
        await work()


async def by_hand_full(tracer: Tracer) -> None:
    """The same, with the attributes that this library records."""
    attributes: dict[str, str | int] = {
        "otel_tasks.task.id": "work-1",
        "otel_tasks.task.priority": 1,
        "otel_tasks.group.name": "batch",
        "code.function.name": "benchmarks.peers.work",
    }
    with tracer.start_as_current_span("work", attributes=attributes) as span:
        await work()
        span.set_attribute("otel_tasks.task.outcome", "success")


def _creating(make: Callable[[], Any], create: Callable[[Any], Any] = asyncio.create_task) -> Work:
    async def batch(count: int) -> None:
        for task in [create(make()) for _ in range(count)]:
            await task

    return batch


def _instrumented(provider: TracerProvider) -> Callable[[Any], Any]:
    """contrib's ``asyncio.create_task``, while everybody else's stays as it was."""
    os.environ["OTEL_PYTHON_ASYNCIO_COROUTINE_NAMES_TO_TRACE"] = "work"
    instrumentor: Any = AsyncioInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    traced: Callable[[Any], Any] = asyncio.create_task
    instrumentor.uninstrument()
    return traced
