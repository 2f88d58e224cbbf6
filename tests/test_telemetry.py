"""Spans of tasks and groups: attributes, status, links, events, parents, contexts, broken telemetry."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import baggage, metrics, trace
from opentelemetry import context as otel_context
from opentelemetry.metrics import _internal as metrics_internal
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import SpanKind, StatusCode

import otel_tasks
from otel_tasks import (
    CancelCause,
    CancelKind,
    RetryPolicy,
    TaskGroup,
    TaskManager,
    TaskPriority,
    create_task,
)
from otel_tasks._core import coroutines, telemetry
from otel_tasks._core.coroutines import code_name
from otel_tasks._core.request_group import RequestGroup
from otel_tasks._core.telemetry import errors, providers
from otel_tasks.testing import run
from tests.helpers import give

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_tasks import ManagedTask
    from otel_tasks.testing import SpanRecorder

CAUSED_BY = {"otel_tasks.link": "cancelled_by"}
here = contextvars.ContextVar("here", default="outside")


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    """A manager that reports to the recorder, and to nothing global."""
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


@pytest.fixture
def tracer(spans: SpanRecorder) -> trace.Tracer:
    """The tracer of an application that uses the same provider."""
    return spans.provider.get_tracer("application")


async def work() -> str:
    """Wait one second."""
    await asyncio.sleep(1)
    return "done"


async def fail(error: BaseException) -> None:
    """Wait one second and raise."""
    await asyncio.sleep(1)
    raise error


async def ignore() -> str:
    """Swallow a cancellation and return."""
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return "went on"
    return "never cancelled"


async def stay(release: asyncio.Event) -> None:
    """Swallow cancellations until released."""
    while not release.is_set():
        try:
            await release.wait()
        except asyncio.CancelledError:
            continue


async def started(*tasks: asyncio.Task[Any]) -> None:
    """Let tasks run their first step."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Wait for tasks, whatever becomes of them, and fetch their exceptions."""
    await asyncio.gather(*tasks, return_exceptions=True)
    # A task is done one turn before its end is recorded; since 3.12 gather() may not wait for that.
    await asyncio.sleep(0)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """A span's attributes without those that it was started with."""
    at_start = {
        "otel_tasks.task.id",
        "otel_tasks.task.priority",
        "otel_tasks.group.name",
        "otel_tasks.group.id",
        "otel_tasks.manager.name",
        "code.function.name",
    }
    return {key: value for key, value in (span.attributes or {}).items() if key not in at_start}


def events(span: ReadableSpan) -> list[str]:
    """The names of a span's events."""
    return [event.name for event in span.events]


def links(span: ReadableSpan) -> list[tuple[int, dict[str, Any]]]:
    """The span ids that a span links to, with the links' attributes."""
    return [(link.context.span_id, dict(link.attributes or {})) for link in span.links]


def origin(span: ReadableSpan) -> tuple[Any, Any]:
    """The trace id and the span id of the parent that caused a cancellation, as attributes have them."""
    assert span.links == ()
    found = attributes(span)
    return found["otel_tasks.cancel.origin.trace_id"], found["otel_tasks.cancel.origin.span_id"]


def ids(span: ReadableSpan) -> tuple[str, str]:
    """A span's trace id and its own id, in hex."""
    return f"{trace_id(span):032x}", f"{span_id(span):016x}"


def span_id(span: ReadableSpan) -> int:
    """A span's own id."""
    assert span.context is not None
    own: int = span.context.span_id
    return own


def parent_id(span: ReadableSpan) -> int | None:
    """The id of a span's parent."""
    return None if span.parent is None else span.parent.span_id


def trace_id(span: ReadableSpan) -> int:
    """The id of the trace that a span belongs to."""
    assert span.context is not None
    own: int = span.context.trace_id
    return own


def current_span_id() -> int:
    """The id of the span that is current here."""
    return trace.get_current_span().get_span_context().span_id


# -- at the start -------------------------------------------------------------------------------


class NotingSampler(Sampler):
    """Samples everything and keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, dict[str, Any]]] = []

    def should_sample(
        self,
        parent_context: Any,
        trace_id: int,
        name: str,
        kind: Any = None,
        attributes: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.told.append((name, kind, dict(attributes or {})))
        return ALWAYS_ON.should_sample(parent_context, trace_id, name, kind, attributes)

    def get_description(self) -> str:
        return "notes what it is told"


def own_provider(sampler: Sampler | None = None, *processors: SpanProcessor) -> TracerProvider:
    """A provider apart from the recorder's."""
    provider = TracerProvider(sampler=sampler or ALWAYS_ON, shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    return provider


async def test_sampler_gets_all_start_attributes() -> None:
    """A sampler sees task, group, priority, manager, and function, with these types and no others."""
    sampler = NotingSampler()
    manager = TaskManager("shop", tracer_provider=own_provider(sampler))

    await manager.create_task(work(), name="fetch-17", group="ingest.fetch", priority=TaskPriority.HIGH)

    assert sampler.told == [
        (
            "fetch",
            SpanKind.INTERNAL,
            {
                "otel_tasks.task.id": "fetch-17",
                "otel_tasks.task.priority": 2,
                "otel_tasks.group.name": "ingest.fetch",
                "otel_tasks.manager.name": "shop",
                "code.function.name": f"{__name__}.work",
            },
        )
    ]


async def test_sampler_gets_the_id_of_a_scoped_group() -> None:
    """In a scoped group the ids carry the group's number, and the names do not."""
    sampler = NotingSampler()
    manager = TaskManager(tracer_provider=own_provider(sampler))

    async with manager.group("load") as group:
        task = group.create_task(work(), name="first")

    [(name, _, told)] = sampler.told
    assert name == "first"
    assert told["otel_tasks.group.name"] == "load"
    assert told["otel_tasks.group.id"] == group.id != "load"
    assert told["otel_tasks.task.id"] == task.id == f"{group.id}/first"


async def test_no_attribute_repeats_another_or_the_name_of_the_span() -> None:
    """The task's name is the span's, a labeled group's id its name; the default manager goes without."""
    sampler = NotingSampler()

    await TaskManager(tracer_provider=own_provider(sampler)).create_task(work(), name="fetch", group="ingest")

    [(name, _, told)] = sampler.told
    assert name == "fetch"
    assert told == {
        "otel_tasks.task.id": "fetch",
        "otel_tasks.task.priority": 1,
        "otel_tasks.group.name": "ingest",
        "code.function.name": f"{__name__}.work",
    }


async def test_sampler_gets_the_attributes_of_a_group_span() -> None:
    """A group's span starts with the group's and the manager's attributes."""
    sampler = NotingSampler()
    manager = TaskManager("shop", tracer_provider=own_provider(sampler))

    async with manager.group("load", span=True) as group:
        pass

    told = {"otel_tasks.group.name": "load", "otel_tasks.group.id": group.id}
    assert sampler.told == [("load", SpanKind.INTERNAL, {**told, "otel_tasks.manager.name": "shop"})]


async def test_instrumentation_scope_is_the_package(manager: TaskManager, spans: SpanRecorder) -> None:
    """Spans come from the scope otel_tasks with the version of the package."""
    await manager.create_task(work(), name="work")

    scope = spans.span("work").instrumentation_scope
    assert scope is not None
    assert (scope.name, scope.version) == ("otel_tasks", otel_tasks.__version__)


async def test_span_starts_at_creation_and_ends_with_the_task(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The span exists before the first step, and has ended when the task's awaiter continues."""
    task = manager.create_task(work(), name="work")
    assert [span.name for span in spans.open] == ["work"]

    await task
    assert spans.names == ["work"]
    assert spans.open == ()


async def test_span_of_an_unnamed_task_has_no_number(manager: TaskManager, spans: SpanRecorder) -> None:
    """Tasks that are named after their function all have the function's name on their spans."""
    tasks = [manager.create_task(work()) for _ in range(3)]
    await asyncio.gather(*tasks)

    assert spans.names == ["work"] * 3
    assert len({task.name for task in tasks}) == 3


async def test_suffix_of_a_conflict_is_not_on_the_span(manager: TaskManager, spans: SpanRecorder) -> None:
    """The second and third of a name share the first one's span name."""
    await asyncio.gather(*(manager.create_task(work(), name="sync") for _ in range(3)))

    assert spans.names == ["sync"] * 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fetch", "fetch"),
        ("fetch-17", "fetch"),
        ("order_4711", "order"),
        ("job:9f8b7c6d-1e2f-4a3b-8c4d-5e6f7a8b9c0d", "job"),
        ("job-9f8b7c6d1e2f4a3b8c4d5e6f7a8b9c0d", "job"),
        ("page 3.14", "page"),
        ("import/2026/11", "import"),
        ("load#5-2", "load"),
        ("order-4711-pay", "order-pay"),
        ("job-9f8b7c6d", "job"),
        ("job-deadbeef", "job-deadbeef"),
        ("GET /report/{id}", "GET /report/{id}"),
        ("GET /v/2/users", "GET /v/2/users"),
        ("17", "17"),
        ("utf8", "utf8"),
        ("decade", "decade"),
    ],
)
def test_low_cardinality_cuts_numbers_and_ids(name: str, expected: str) -> None:
    """Numbers, UUIDs and hexadecimal ids that are a part of their own are cut; what is nothing else stays."""
    assert telemetry.low_cardinality(name) == expected


async def test_function_name_of_a_method_is_qualified(manager: TaskManager, spans: SpanRecorder) -> None:
    """code.function.name has module, class and method."""

    class Shop:
        async def sell(self) -> None:
            pass

    await manager.create_task(Shop().sell(), timeout=5)

    name = (spans.span("sell").attributes or {})["code.function.name"]
    assert name == f"{__name__}.{Shop.sell.__qualname__}"


async def test_spans_name_functions_that_resemble_each_other(spans: SpanRecorder) -> None:
    """Functions of one name, wrappers of one decorator, and a function after a coroutine that has ended."""

    def wrapped(name: str) -> Callable[[], Coroutine[Any, Any, None]]:
        async def wrapper() -> None:
            pass

        wrapper.__name__ = wrapper.__qualname__ = name
        return wrapper

    from_helpers = functools.partial(give, None)
    functions: list[Callable[[], Coroutine[Any, Any, None]]] = [
        wrapped("give"),
        from_helpers,
        wrapped("sell"),
        wrapped("give"),
        from_helpers,
    ]
    ended = functions[0]()
    ended.close()
    assert code_name(ended) == "give"
    manager = TaskManager(tracer_provider=spans.provider)
    for function in functions:
        await manager.create_task(function())

    assert [(span.attributes or {})["code.function.name"] for span in spans.finished] == [
        f"{__name__}.give",
        "tests.helpers.give",
        f"{__name__}.sell",
        f"{__name__}.give",
        "tests.helpers.give",
    ]


def test_names_of_functions_that_are_made_for_each_task_are_dropped() -> None:
    """A program that makes a function for each task keeps a bounded number of names."""

    def made(number: int) -> Coroutine[Any, Any, None]:
        async def function() -> None:
            pass

        function.__qualname__ = f"made_{number}"
        return function()

    for number in range(3000):
        coro = made(number)
        assert code_name(coro) == f"{__name__}.made_{number}"
        coro.close()
    assert len(coroutines._code_names) <= 1024


# -- at the end ---------------------------------------------------------------------------------


async def test_success_leaves_status_unset(manager: TaskManager, spans: SpanRecorder) -> None:
    """A successful task has its outcome, and nothing else: no status, event, link or cancel attribute."""
    await manager.create_task(work(), name="work")

    span = spans.span("work")
    assert attributes(span) == {"otel_tasks.task.outcome": "success"}
    assert span.status.status_code is StatusCode.UNSET
    assert span.status.description is None
    assert events(span) == []
    assert span.links == ()


async def test_error_has_status_description_type_and_event(manager: TaskManager, spans: SpanRecorder) -> None:
    """A failed task is ERROR with the exception's text, its type, and one exception event."""
    await ended(manager.create_task(fail(ValueError("bad input")), name="work"))

    span = spans.span("work")
    assert attributes(span) == {"otel_tasks.task.outcome": "error", "error.type": "ValueError"}
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "bad input"
    assert events(span) == ["exception"]
    assert (span.events[0].attributes or {})["exception.message"] == "bad input"


async def test_error_type_of_a_foreign_class_has_its_module(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """error.type is the bare name for built-in exceptions only."""
    await ended(manager.create_task(fail(json.JSONDecodeError("x", "y", 0)), name="work"))

    assert attributes(spans.span("work"))["error.type"] == "json.decoder.JSONDecodeError"


async def test_error_description_is_cut_at_256(manager: TaskManager, spans: SpanRecorder) -> None:
    """A long message does not go into the status as a whole."""
    await ended(manager.create_task(fail(ValueError("x" * 1000)), name="work"))

    assert spans.span("work").status.description == "x" * 256


async def test_text_that_is_not_unicode_costs_no_batch(manager: TaskManager, spans: SpanRecorder) -> None:
    """The description of an error that names a file whose name is not UTF-8 can be encoded."""
    await ended(manager.create_task(fail(FileNotFoundError("a\udcff.txt")), name="work"))

    assert spans.span("work").status.description == "a?.txt"


async def test_exception_without_text_still_ends_its_span(
    manager: TaskManager, spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception whose __str__ raises loses its description, not its span."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    await ended(manager.create_task(fail(Mute()), name="work"))

    span = spans.span("work")
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["otel_tasks.task.outcome"] == "error"


async def test_own_timeout_is_an_error_without_event(manager: TaskManager, spans: SpanRecorder) -> None:
    """A task that runs into its timeout is ERROR with error.type timeout, and no exception event."""
    await ended(manager.create_task(asyncio.sleep(60), name="work", timeout=5))

    span = spans.span("work")
    assert attributes(span)["otel_tasks.task.outcome"] == "timeout"
    assert attributes(span)["otel_tasks.cancel.reason"] == "timeout"
    assert attributes(span)["error.type"] == "timeout"
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "the task ran into its timeout of 5 s"
    assert "exception" not in events(span)


async def test_timeout_of_the_work_itself_is_an_error(manager: TaskManager, spans: SpanRecorder) -> None:
    """A TimeoutError that is not ours is an error like any other."""
    await ended(manager.create_task(fail(TimeoutError("database")), name="work", timeout=5))

    span = spans.span("work")
    assert attributes(span) == {"otel_tasks.task.outcome": "error", "error.type": "TimeoutError"}
    assert span.status.description == "database"
    assert events(span) == ["exception"]


async def test_cancelled_leaves_status_unset(manager: TaskManager, spans: SpanRecorder) -> None:
    """A cancelled task says reason, message and duration; it is no error and has no exception event."""
    task = manager.create_task(work(), name="work")
    await started(task)
    task.cancel("no longer wanted")
    await ended(task)

    span = spans.span("work")
    assert attributes(span) == {
        "otel_tasks.task.outcome": "cancelled",
        "otel_tasks.cancel.reason": "explicit",
        "otel_tasks.cancel.message": "no longer wanted",
        "otel_tasks.cancel.duration": 0.0,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert events(span) == ["otel_tasks.cancel_requested"]


async def test_cancel_without_reason_has_no_message(manager: TaskManager, spans: SpanRecorder) -> None:
    """The span gets no empty message."""
    task = manager.create_task(work(), name="work")
    task.cancel()
    await ended(task)

    assert "otel_tasks.cancel.message" not in attributes(spans.span("work"))


async def test_cancel_duration_is_from_request_to_end(manager: TaskManager, spans: SpanRecorder) -> None:
    """The clean-up of a cancelled task is the duration of its cancellation, in seconds of the loop."""

    async def tidy() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(2.5)

    task = manager.create_task(tidy(), name="work")
    await asyncio.sleep(10)
    task.cancel()
    await ended(task)

    assert attributes(spans.span("work"))["otel_tasks.cancel.duration"] == pytest.approx(2.5)


async def test_cancel_event_has_the_time_of_the_request(manager: TaskManager, spans: SpanRecorder) -> None:
    """The event is on the span while the task still cleans up, and says why."""
    release = asyncio.Event()
    task = manager.create_task(stay(release), name="work")
    await started(task)
    task.cancel()
    [event] = spans.open[0].events
    assert (event.name, dict(event.attributes or {})) == (
        "otel_tasks.cancel_requested",
        {"otel_tasks.cancel.reason": "explicit"},
    )
    release.set()
    await ended(task)


async def test_ignored_cancellation_is_visible(manager: TaskManager, spans: SpanRecorder) -> None:
    """A task that swallows its cancellation is a success with cancel.ignored and the reason."""
    task = manager.create_task(ignore(), name="work")
    await started(task)
    task.cancel()
    await task

    span = spans.span("work")
    assert attributes(span) == {
        "otel_tasks.task.outcome": "success",
        "otel_tasks.cancel.ignored": True,
        "otel_tasks.cancel.reason": "explicit",
        "otel_tasks.cancel.duration": 0.0,
    }
    assert span.status.status_code is StatusCode.UNSET


async def test_task_that_cancels_itself_keeps_its_reason(manager: TaskManager, spans: SpanRecorder) -> None:
    """Its reason is explicit, with the message; there is no span to link to."""

    async def give_up() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("gave up")
        await asyncio.sleep(1)

    await ended(manager.create_task(give_up(), name="work"))

    span = spans.span("work")
    assert attributes(span)["otel_tasks.task.outcome"] == "cancelled"
    assert attributes(span)["otel_tasks.cancel.reason"] == "explicit"
    assert attributes(span)["otel_tasks.cancel.message"] == "gave up"
    assert span.links == ()


async def test_failing_cleanup_is_an_error_with_its_reason(manager: TaskManager, spans: SpanRecorder) -> None:
    """A task that raises while it is cancelled is an error, with the reason for its cancellation."""

    async def tidy() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("disk full")

    task = manager.create_task(tidy(), name="work")
    await started(task)
    task.cancel()
    await ended(task)

    span = spans.span("work")
    assert attributes(span)["otel_tasks.task.outcome"] == "error"
    assert attributes(span)["error.type"] == "OSError"
    assert attributes(span)["otel_tasks.cancel.reason"] == "explicit"
    assert "otel_tasks.cancel.ignored" not in attributes(span)
    assert events(span) == ["otel_tasks.cancel_requested", "exception"]


async def test_foreign_cancellation_has_no_event(manager: TaskManager, spans: SpanRecorder) -> None:
    """A CancelledError without a request is cancelled by "foreign", with neither event nor link."""
    await ended(manager.create_task(fail(asyncio.CancelledError()), name="work"))

    span = spans.span("work")
    assert attributes(span)["otel_tasks.task.outcome"] == "cancelled"
    assert attributes(span)["otel_tasks.cancel.reason"] == "foreign"
    assert "otel_tasks.cancel.duration" not in attributes(span)
    assert events(span) == []
    assert span.links == ()


@pytest.mark.parametrize("timeout", [None, 5.0])
async def test_cancelled_before_its_start_ends_its_span(
    manager: TaskManager, spans: SpanRecorder, timeout: float | None
) -> None:
    """A task that never runs a step is cancelled like any other, and its span ends."""
    task = manager.create_task(work(), name="work", timeout=timeout)
    task.cancel()
    await ended(task)

    assert attributes(spans.span("work"))["otel_tasks.task.outcome"] == "cancelled"


async def test_abandoned_task_ends_its_span_at_shutdown(manager: TaskManager, spans: SpanRecorder) -> None:
    """The span of a task that would not stop is ended as abandoned; its late end changes nothing."""
    release = asyncio.Event()
    task = manager.create_task(stay(release), name="stubborn")
    await started(task)
    await manager.shutdown(grace=0, timeout=1)

    span = spans.span("stubborn")
    before = attributes(span)
    assert before["otel_tasks.task.outcome"] == "abandoned"
    assert before["error.type"] == "abandoned"
    assert before["otel_tasks.cancel.reason"] == "shutdown"
    assert before["otel_tasks.cancel.ignored"] is True
    assert before["otel_tasks.cancel.duration"] == pytest.approx(1.0)
    assert span.status.status_code is StatusCode.ERROR
    assert "exception" not in events(span)
    release.set()
    await ended(task)
    assert attributes(span) == before
    assert len(spans.finished) == 1


async def test_abandoned_task_may_be_cancelled_again(manager: TaskManager, spans: SpanRecorder) -> None:
    """A cancellation after the span has ended writes nothing onto it, and OpenTelemetry logs nothing."""
    release = asyncio.Event()

    async def forgetful() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                task.uncancel()

    task = manager.create_task(forgetful(), name="stubborn")
    await started(task)
    await manager.shutdown(grace=0, timeout=1)
    task.cancel("once more")
    release.set()
    await ended(task)

    assert spans.complaints == []


async def test_timeout_inside_a_task_is_no_cancellation_of_it(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """asyncio.timeout() cancels the task for itself: the span shows a success and no request."""

    async def patient() -> None:
        try:
            async with asyncio.timeout(1):
                await asyncio.sleep(60)
        except TimeoutError:
            pass

    await manager.create_task(patient(), name="work")

    span = spans.span("work")
    assert attributes(span) == {"otel_tasks.task.outcome": "success"}
    assert events(span) == []


async def test_span_that_the_work_ended_is_left_alone(manager: TaskManager, spans: SpanRecorder) -> None:
    """Work that ends the current span itself, as use_span(end_on_exit=True) does, causes no complaint."""

    async def tactless() -> None:
        trace.get_current_span().end()
        await asyncio.sleep(60)

    task = manager.create_task(tactless(), name="work")
    await started(task)
    task.cancel()
    await ended(task)

    assert len(spans.finished) == 1
    assert spans.complaints == []


# -- what cancelled it --------------------------------------------------------------------------


async def test_cancelled_span_links_to_the_cancelling_task(manager: TaskManager, spans: SpanRecorder) -> None:
    """The link goes to the span of the managed task that called cancel()."""
    victim = manager.create_task(work(), name="victim")

    async def ask() -> None:
        victim.cancel()

    await manager.create_task(ask(), name="asker")
    await ended(victim)

    assert links(spans.span("victim")) == [(span_id(spans.span("asker")), CAUSED_BY)]


@pytest.mark.parametrize("way", ["task", "group", "cancel_task", "cancel_group", "cancel_all_tasks"])
async def test_cancelled_span_links_to_the_span_current_at_the_call(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer, way: str
) -> None:
    """Every way of cancelling notes the application's span that is current where it is called."""
    task = manager.create_task(work(), name="victim", group="jobs")
    await started(task)
    with tracer.start_as_current_span("operator"):
        if way == "task":
            task.cancel("enough")
        elif way == "group":
            manager.get_group("jobs").cancel("enough")
        elif way == "cancel_task":
            await manager.cancel_task("victim", "enough")
        elif way == "cancel_group":
            await manager.cancel_group("jobs", "enough")
        else:
            await manager.cancel_all_tasks("enough")
    await ended(task)

    span = spans.span("victim")
    assert links(span) == [(span_id(spans.span("operator")), CAUSED_BY)]
    assert attributes(span)["otel_tasks.cancel.reason"] == "explicit"
    assert attributes(span)["otel_tasks.cancel.message"] == "enough"
    assert events(span) == ["otel_tasks.cancel_requested"]


async def test_sibling_links_to_the_one_that_failed(manager: TaskManager, spans: SpanRecorder) -> None:
    """In a scoped group the cancelled siblings name the failing task and link to its span."""
    with pytest.raises(BaseExceptionGroup):
        async with manager.group("load") as group:
            group.create_task(fail(ValueError("broken")), name="bad")
            group.create_task(asyncio.sleep(60), name="good")

    span = spans.span("good")
    assert attributes(span)["otel_tasks.cancel.reason"] == "sibling_failed"
    assert attributes(span)["otel_tasks.cancel.message"] == "bad failed: ValueError('broken')"
    assert attributes(span)["otel_tasks.cancel.duration"] == 0.0
    assert links(span) == [(span_id(spans.span("bad")), CAUSED_BY)]
    assert events(span) == ["otel_tasks.cancel_requested"]
    assert spans.span("bad").links == ()


async def test_shutdown_links_to_the_span_that_shut_down(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """Tasks that a shutdown cancels link to the span current at shutdown()."""
    task = manager.create_task(asyncio.sleep(60), name="victim")
    with tracer.start_as_current_span("stop"):
        await manager.shutdown(grace=2)
    await ended(task)

    span = spans.span("victim")
    assert attributes(span)["otel_tasks.cancel.reason"] == "shutdown"
    assert links(span) == [(span_id(spans.span("stop")), CAUSED_BY)]


@pytest.mark.parametrize("way", ["create_task", "start_task"])
async def test_replaced_task_links_to_the_span_of_its_replacement(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer, way: str
) -> None:
    """The old task is cancelled as replaced, with a link to the span in which the new one was created."""
    old = manager.create_task(asyncio.sleep(60), name="sync")
    await started(old)
    with tracer.start_as_current_span("restart"):
        if way == "create_task":
            new: asyncio.Task[Any] = manager.create_task(work(), name="sync", on_conflict="replace")
        else:
            new = await manager.start_task("sync", work, cancel_existing=True)
    await ended(old, new)

    first, second = spans.spans("sync")
    assert attributes(first)["otel_tasks.cancel.reason"] == "replaced"
    assert links(first) == [(span_id(spans.span("restart")), CAUSED_BY)]
    assert attributes(second) == {"otel_tasks.task.outcome": "success"}


async def test_timeout_of_a_group_cancels_its_tasks(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """Tasks of a group that ran out are cancelled (not timed out), and name the block's span."""
    with tracer.start_as_current_span("caller"), pytest.raises(TimeoutError):
        async with manager.group("load", timeout=3) as group:
            group.create_task(asyncio.sleep(60), name="slow")

    span = spans.span("slow")
    assert attributes(span)["otel_tasks.task.outcome"] == "cancelled"
    assert attributes(span)["otel_tasks.cancel.reason"] == "timeout"
    assert span.status.status_code is StatusCode.UNSET
    assert origin(span) == ids(spans.span("caller"))


async def test_raising_block_cancels_its_tasks(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """Tasks of a block that raised are cancelled with scope_ended, and name the block's span."""
    with tracer.start_as_current_span("caller"), pytest.raises(BaseExceptionGroup):
        async with manager.group("load") as group:
            group.create_task(asyncio.sleep(60), name="slow")
            raise ValueError("body")

    span = spans.span("slow")
    assert attributes(span)["otel_tasks.cancel.reason"] == "scope_ended"
    assert origin(span) == ids(spans.span("caller"))


async def test_cause_goes_down_with_its_first_origin(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """Tasks of a block whose task was cancelled link to what cancelled that task, not to the task."""

    async def host() -> None:
        async with manager.group("inner") as group:
            group.create_task(asyncio.sleep(60), name="leaf")
            await asyncio.sleep(60)

    task = manager.create_task(host(), name="host")
    await started(task)
    with tracer.start_as_current_span("operator"):
        task.cancel("enough")
    await ended(task)

    for name in ("host", "leaf"):
        assert links(spans.span(name)) == [(span_id(spans.span("operator")), CAUSED_BY)]
        assert attributes(spans.span(name))["otel_tasks.cancel.message"] == "enough"


async def test_awaited_task_links_to_the_span_that_cancelled_its_awaiter(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """asyncio hands a cancellation on to the task that is awaited, and the cause goes with it."""
    inner = manager.create_task(asyncio.sleep(60), name="inner")

    async def outer() -> None:
        await inner

    task = manager.create_task(outer(), name="outer")
    await started(task)
    with tracer.start_as_current_span("operator"):
        task.cancel()
    await ended(task, inner)

    for name in ("outer", "inner"):
        assert links(spans.span(name)) == [(span_id(spans.span("operator")), CAUSED_BY)]


async def test_disconnect_names_the_request(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """A cause made with a request's context has the request's span as its origin, wherever it is made."""
    with tracer.start_as_current_span("GET /report"):
        request = contextvars.copy_context()
        group = RequestGroup.open(manager, "GET /report", binding=None, host=None)
        task = group.create_task(asyncio.sleep(60), name="query")
    await started(task)
    cause = CancelCause.make(CancelKind.CLIENT_DISCONNECT, context=request)
    group._signal_cancel(cause)
    group._cancel_tasks(cause)
    group._seal(cause)
    await ended(task)

    span = spans.span("query")
    assert attributes(span)["otel_tasks.cancel.reason"] == "client_disconnect"
    assert origin(span) == ids(spans.span("GET /report"))


async def test_no_link_where_no_span_is_current(manager: TaskManager, spans: SpanRecorder) -> None:
    """Code without a span that cancels leaves the reason, and no link to nowhere."""
    task = manager.create_task(work(), name="victim")
    await started(task)
    task.cancel("enough")
    await ended(task)

    assert spans.span("victim").links == ()


async def test_task_that_cancels_its_own_group_does_not_link_to_itself(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The others link to the cancelling task; a link on its own span would say nothing."""

    async def revolt() -> None:
        await asyncio.sleep(1)
        manager.get_group("jobs").cancel("enough")
        await asyncio.sleep(1)

    tasks = [
        manager.create_task(revolt(), name="rebel", group="jobs"),
        manager.create_task(asyncio.sleep(60), name="other", group="jobs"),
    ]
    await ended(*tasks)

    assert links(spans.span("other")) == [(span_id(spans.span("rebel")), CAUSED_BY)]
    assert spans.span("rebel").links == ()


async def test_task_that_its_parent_cancels_has_attributes_and_no_link(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """Jaeger shows no link to a parent, so two ids on the span name it; a task below it has a link."""

    async def leaf() -> None:
        await asyncio.sleep(60)

    async def middle() -> None:
        async with manager.group("inner") as inner:
            inner.create_task(leaf(), name="leaf")

    async def top() -> None:
        task = manager.create_task(middle(), name="middle")
        await asyncio.sleep(1)
        task.cancel()
        await ended(task)

    await manager.create_task(top(), name="top")

    assert origin(spans.span("middle")) == ids(spans.span("top"))
    assert links(spans.span("leaf")) == [(span_id(spans.span("top")), CAUSED_BY)]
    assert "otel_tasks.cancel.origin.span_id" not in attributes(spans.span("leaf"))


async def test_origin_above_a_group_with_a_span_is_a_link_for_its_tasks(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The group's span is below the origin and has attributes; its tasks are one level further down."""
    with tracer.start_as_current_span("caller"), pytest.raises(TimeoutError):
        async with manager.group("load", timeout=3, span=True) as group:
            group.create_task(asyncio.sleep(60), name="slow")

    assert origin(spans.span("load")) == ids(spans.span("caller"))
    assert links(spans.span("slow")) == [(span_id(spans.span("caller")), CAUSED_BY)]


async def test_origin_is_a_link_where_the_task_has_a_trace_of_its_own(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The creator is no parent then, although the task is linked to it already."""
    with tracer.start_as_current_span("request") as request:
        task = manager.create_task(work(), name="mail", trace="new")
        await started(task)
        task.cancel()
    await ended(task)

    span = spans.span("mail")
    assert {target for target, _ in links(span)} == {request.get_span_context().span_id}
    assert "otel_tasks.cancel.origin.span_id" not in attributes(span)


async def test_origin_in_another_process_is_named_like_any_parent(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """Without a server span of its own, a request's tasks are below the caller's span."""
    caller = trace.SpanContext(0x0AF7, 0xB7AD, is_remote=True, trace_flags=trace.TraceFlags(1))
    token = otel_context.attach(trace.set_span_in_context(trace.NonRecordingSpan(caller)))
    task = manager.create_task(work(), name="work")
    await started(task)
    task.cancel()
    otel_context.detach(token)
    await ended(task)

    assert origin(spans.span("work")) == (f"{0x0AF7:032x}", f"{0xB7AD:016x}")


async def test_first_cause_stays(manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer) -> None:
    """A task that is cancelled twice has one event and one link, those of the first request."""
    release = asyncio.Event()
    task = manager.create_task(stay(release), name="victim")
    await started(task)
    for asker in ("first", "second"):
        with tracer.start_as_current_span(asker):
            task.cancel(asker)
        await started(task)
    release.set()
    await ended(task)

    span = spans.span("victim")
    assert events(span) == ["otel_tasks.cancel_requested"]
    assert links(span) == [(span_id(spans.span("first")), CAUSED_BY)]
    assert attributes(span)["otel_tasks.cancel.message"] == "first"


async def test_cause_tells_the_ids_of_its_origin(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The cause on the task has the origin as data, in hex as Jaeger shows it."""
    task = manager.create_task(work(), name="victim")
    await started(task)
    with tracer.start_as_current_span("operator"):
        task.cancel()
    await ended(task)

    operator = spans.span("operator")
    assert task.cause is not None
    told = task.cause.to_dict()
    assert told["trace_id"] == f"{trace_id(operator):032x}"
    assert told["span_id"] == f"{span_id(operator):016x}"


# -- parents ------------------------------------------------------------------------------------


async def test_task_is_a_child_of_the_current_span(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """Created inside a span, the task's span is its child, even if it outlives it."""
    with tracer.start_as_current_span("request"):
        task = manager.create_task(work(), name="work")
    await task

    span = spans.span("work")
    assert parent_id(span) == span_id(spans.span("request"))
    assert trace_id(span) == trace_id(spans.span("request"))


async def test_task_without_a_current_span_is_a_root(manager: TaskManager, spans: SpanRecorder) -> None:
    """Each task that is created outside of any span begins a trace."""
    await asyncio.gather(*(manager.create_task(work(), name=name) for name in ("a", "b")))

    assert parent_id(spans.span("a")) is None
    assert trace_id(spans.span("a")) != trace_id(spans.span("b"))


async def test_task_in_a_given_context_is_a_child_of_that_ones_span(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """With context= the parent is the span current there, not here."""
    with tracer.start_as_current_span("there"):
        context = contextvars.copy_context()
    with tracer.start_as_current_span("here"):
        await manager.create_task(work(), name="work", context=context)

    assert parent_id(spans.span("work")) == span_id(spans.span("there"))


async def test_nested_tasks_nest_their_spans(manager: TaskManager, spans: SpanRecorder) -> None:
    """A task that a task creates is its child, in every way of creating one."""

    async def outer() -> None:
        await create_task(work(), name="by function")
        await manager.create_task(work(), name="by manager", group="elsewhere")
        await manager.start_task("by name", work)
        async with manager.group("load") as group:
            group.create_task(work(), name="by group")

    await manager.create_task(outer(), name="outer")
    await manager.join()

    inner = {span.name for span in spans.children(spans.span("outer"))}
    assert inner == {"by function", "by manager", "by name", "by group"}


async def test_group_span_stands_between_caller_and_tasks(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """With span=True the group is a child of the caller and the tasks are children of the group."""
    with tracer.start_as_current_span("request"):
        async with manager.group("load-3", span=True) as group:
            group.create_task(work(), name="first")
            assert trace.get_current_span().get_span_context().span_id == span_id(spans.open[0])

    group_span = spans.span("load")
    assert parent_id(group_span) == span_id(spans.span("request"))
    assert parent_id(spans.span("first")) == span_id(group_span)
    assert spans.names == ["first", "load", "request"]
    assert group_span.status.status_code is StatusCode.UNSET


async def test_group_span_is_given_through_the_constructor_too(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """TaskGroup(span=True, manager=...) has its span where that manager's tasks have theirs."""
    async with TaskGroup("load", span=True, manager=manager) as group:
        group.create_task(work(), name="first")

    assert parent_id(spans.span("first")) == span_id(spans.span("load"))


async def test_group_span_has_the_cause_of_its_cancellation(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """A cancelled group's span has reason, message and link, and no error status."""
    async with manager.group("load", span=True) as group:
        group.create_task(asyncio.sleep(60), name="slow")
        with tracer.start_as_current_span("operator"):
            group.cancel("enough")

    span = spans.span("load")
    assert (span.attributes or {})["otel_tasks.cancel.reason"] == "explicit"
    assert (span.attributes or {})["otel_tasks.cancel.message"] == "enough"
    assert links(span) == [(span_id(spans.span("operator")), CAUSED_BY)]
    assert span.status.status_code is StatusCode.UNSET


async def test_open_group_has_a_span_on_request(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The span of a group without a block, as a request's, ends when the group is sealed and empty."""
    with tracer.start_as_current_span("GET"):
        group = RequestGroup.open(manager, "GET /report", binding=None, host=None, span=True)
        task = group.create_task(work(), name="query")
        group._seal()
        await task
    await group.join()

    assert parent_id(spans.span("GET /report")) == span_id(spans.span("GET"))
    assert parent_id(spans.span("query")) == span_id(spans.span("GET /report"))


async def test_group_has_no_span_by_default(manager: TaskManager, spans: SpanRecorder) -> None:
    """A scoped group has no span of its own by default."""
    async with manager.group("load") as group:
        group.create_task(work(), name="first")

    assert spans.names == ["first"]


async def test_nested_group_spans_nest(manager: TaskManager, spans: SpanRecorder) -> None:
    """A group inside a group's block hangs below that group in the trace, with or without a span."""
    async with manager.group("outer", span=True) as outer:
        async with outer.group("inner", span=True) as inner:
            inner.create_task(work(), name="leaf")
        async with manager.group("plain") as plain:
            plain.create_task(work(), name="second leaf")

    assert parent_id(spans.span("inner")) == span_id(spans.span("outer"))
    assert parent_id(spans.span("leaf")) == span_id(spans.span("inner"))
    assert parent_id(spans.span("second leaf")) == span_id(spans.span("outer"))


async def test_task_of_a_task_is_its_child_also_below_a_group_span(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The creator is the parent: a group's span takes its place for tasks of the block only."""

    async def outer() -> None:
        await create_task(work(), name="nested")
        await group.create_task(work(), name="by group")

    async with manager.group("load", span=True) as group:
        group.create_task(outer(), name="outer")

    assert parent_id(spans.span("outer")) == span_id(spans.span("load"))
    assert parent_id(spans.span("nested")) == span_id(spans.span("outer"))
    assert parent_id(spans.span("by group")) == span_id(spans.span("outer"))


async def test_span_that_the_block_opens_is_the_parent_of_its_tasks(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """A span of the application inside the block is nearer than the group's."""
    async with manager.group("load", span=True) as group:
        with tracer.start_as_current_span("prepare"):
            group.create_task(work(), name="first")

    assert parent_id(spans.span("first")) == span_id(spans.span("prepare"))


async def test_task_with_own_trace_links_back(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """trace="new": a new trace, with a spawned_by link to the creator."""
    with tracer.start_as_current_span("request"):
        task = manager.create_task(work(), name="mail", trace="new")
    await task

    request, mail = spans.span("request"), spans.span("mail")
    assert parent_id(mail) is None
    assert trace_id(mail) != trace_id(request)
    assert links(mail) == [(span_id(request), {"otel_tasks.link": "spawned_by"})]


async def test_task_with_own_trace_without_creator_has_no_link(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """With no span current there is nothing to link to."""
    await manager.create_task(work(), name="mail", trace="new")

    assert spans.span("mail").links == ()


async def test_task_with_own_trace_keeps_baggage_and_variables(
    manager: TaskManager, tracer: trace.Tracer
) -> None:
    """A new trace is all that is new: baggage and context variables are the creator's."""

    async def look() -> tuple[object, str]:
        return baggage.get_baggage("tenant"), here.get()

    token = otel_context.attach(baggage.set_baggage("tenant", "acme"))
    here.set("creator")
    with tracer.start_as_current_span("request"):
        task = manager.create_task(look(), trace="new")
    otel_context.detach(token)

    assert await task == ("acme", "creator")


async def test_cancelled_task_with_own_trace_has_both_links(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """spawned_by and cancelled_by stand side by side."""
    with tracer.start_as_current_span("request"):
        task = manager.create_task(work(), name="mail", trace="new")
        task.cancel()
    await ended(task)

    kinds = [attributes["otel_tasks.link"] for _, attributes in links(spans.span("mail"))]
    assert kinds == ["spawned_by", "cancelled_by"]


# -- contexts -----------------------------------------------------------------------------------


async def test_span_is_current_inside_the_task_alone(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """Inside the task its span is current, across awaits; its creator keeps its own."""
    seen: list[int] = []

    async def look() -> None:
        seen.append(current_span_id())
        await asyncio.sleep(1)
        seen.append(current_span_id())

    with tracer.start_as_current_span("request") as request:
        task = manager.create_task(look(), name="look")
        assert trace.get_current_span() is request
        await task
        assert trace.get_current_span() is request
    assert seen == [span_id(spans.span("look"))] * 2
    assert not trace.get_current_span().get_span_context().is_valid


async def test_spans_of_the_work_are_children_of_the_task(
    manager: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The application's spans inside a task are children of the task's span."""

    async def query() -> None:
        with tracer.start_as_current_span("SELECT"):
            await asyncio.sleep(1)

    await manager.create_task(query(), name="query")

    assert parent_id(spans.span("SELECT")) == span_id(spans.span("query"))


async def test_given_context_is_copied_when_traced(manager: TaskManager) -> None:
    """The task sees the variables of the user's context, and neither it nor its span changes it."""

    async def look() -> str:
        before = here.get()
        here.set("inside")
        return before

    context = contextvars.Context()
    context.run(here.set, "given")
    assert await manager.create_task(look(), context=context) == "given"
    assert context.run(here.get) == "given"
    assert not context.run(trace.get_current_span).get_span_context().is_valid


async def test_context_that_is_running_can_be_given(manager: TaskManager, spans: SpanRecorder) -> None:
    """A task may pass the context that it is itself running in."""
    context = contextvars.copy_context()

    async def inside() -> None:
        await manager.create_task(work(), name="work", context=context)

    await asyncio.create_task(inside(), context=context)

    assert spans.names == ["work"]


async def test_task_tells_its_ids(manager: TaskManager, spans: SpanRecorder) -> None:
    """trace_id and span_id are in hex, live, ended and remembered."""
    task = manager.create_task(work(), name="work")
    live = task.info()
    await task

    span = spans.span("work")
    assert task.trace_id == f"{trace_id(span):032x}"
    remembered = manager.get_task_info("work")
    assert remembered is not None
    for info in (live, remembered):
        assert (info.trace_id, info.span_id) == (f"{trace_id(span):032x}", f"{span_id(span):016x}")


async def test_failure_is_logged_with_the_trace_id(
    manager: TaskManager, spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line of an unawaited error leads to its trace."""
    manager.create_task(fail(ValueError("broken")), name="work")
    await manager.join()

    [record] = caplog.records
    assert f"{trace_id(spans.span('work')):032x}" in record.getMessage()


def test_quiet_context_samples_nothing(spans: SpanRecorder, tracer: trace.Tracer) -> None:
    """A span that is started in a quiet context is not recorded, and has no stranger for a parent."""
    with tracer.start_as_current_span("request"):
        quiet = telemetry.quiet_context()
        span = quiet.run(tracer.start_span, "http receive")
        assert not span.is_recording()
        span.end()

    assert spans.names == ["request"]


def test_annotate_request_writes_onto_the_span_of_its_context(
    spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The server's span learns of the disconnect, and its status stays as it is."""
    with tracer.start_as_current_span("GET /report"):
        request = contextvars.copy_context()
        contextvars.Context().run(telemetry.annotate_request, request, "client_disconnect", 3, "ran_on", 1006)

    span = spans.span("GET /report")
    assert dict(span.attributes or {}) == {
        "otel_tasks.request.outcome": "client_disconnect",
        "otel_tasks.request.handler": "ran_on",
        "otel_tasks.request.close_code": 1006,
        "otel_tasks.cancel.count": 3,
    }
    assert span.status.status_code is StatusCode.UNSET


# -- tasks that had to wait for a place ---------------------------------------------------------


@pytest.fixture
def narrow(spans: SpanRecorder) -> TaskManager:
    """A manager with one place."""
    return TaskManager(
        "test",
        max_concurrency=1,
        tracer_provider=spans.provider,
        meter_provider=spans.meter_provider,
    )


def seconds_from_start(span: ReadableSpan, stamp: int | None) -> float:
    """How far into a span a moment is: the virtual clock's part of it, as no real time passes."""
    assert stamp is not None
    assert span.start_time is not None
    return round((stamp - span.start_time) / 1e9)


async def test_queued_task_is_one_span_from_its_creation(
    narrow: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """It begins when the task was created, has the wait on it, and an event where it was over."""
    for _ in range(3):
        narrow.create_task(work(), name="before")
    with tracer.start_as_current_span("caller") as caller:
        task = narrow.create_task(work(), name="work-7", group="ingest", priority=TaskPriority.LOW)
    await asyncio.sleep(0.5)
    assert [span.name for span in spans.open] == ["before"]
    assert (task.trace_id, task.info().span_id) == (None, None)
    await asyncio.sleep(3)
    assert task.trace_id == f"{caller.get_span_context().trace_id:032x}"
    await task

    span = spans.span("work")
    assert seconds_from_start(span, span.events[0].timestamp) == 3
    assert seconds_from_start(span, span.end_time) == 3  # the virtual second in which it ran is no real one
    assert events(span) == ["otel_tasks.started"]
    assert attributes(span) == {
        "otel_tasks.task.outcome": "success",
        "otel_tasks.task.queue.duration": 3.0,
    }
    assert span.attributes is not None
    assert span.attributes["otel_tasks.task.priority"] == 0
    assert span.attributes["otel_tasks.group.name"] == "ingest"
    assert str(span.attributes["code.function.name"]).endswith("test_telemetry.work")
    assert parent_id(span) == caller.get_span_context().span_id


async def test_durations_on_spans_are_rounded_to_the_microsecond(
    narrow: TaskManager, spans: SpanRecorder
) -> None:
    """Smaller digits are noise, and a trace viewer shows all of them."""

    async def slow_to_stop() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1 + 0.2)

    busy = narrow.create_task(slow_to_stop(), name="busy")
    queued = narrow.create_task(work(), name="queued")
    await asyncio.sleep(1 / 3)
    busy.cancel()
    await ended(busy, queued)
    await ended(narrow.create_task(_fail_at_once, retry=RetryPolicy(max_attempts=2, delay=1 / 3, jitter=0)))

    assert attributes(spans.span("busy"))["otel_tasks.cancel.duration"] == 0.3
    assert attributes(spans.span("queued"))["otel_tasks.task.queue.duration"] == 0.633333
    delays = [
        (event.attributes or {})["otel_tasks.retry.delay"]
        for span in spans.finished
        for event in span.events
        if event.name == "otel_tasks.retry"
    ]
    assert delays == [0.333333]


async def _fail_at_once() -> None:
    raise OSError("gone")


async def test_task_with_a_place_has_no_queue_attributes(narrow: TaskManager, spans: SpanRecorder) -> None:
    """A task that did not have to wait has neither the attribute nor the event."""
    await narrow.create_task(work(), name="work")

    span = spans.span("work")
    assert attributes(span) == {"otel_tasks.task.outcome": "success"}
    assert events(span) == []


async def test_queued_span_is_current_inside_the_task_alone(
    narrow: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """The task's own spans are below it, and it has the context variables of its creation."""

    async def look() -> str:
        with tracer.start_as_current_span("inside"):
            return here.get()

    first = narrow.create_task(work())
    here.set("creator")
    task = narrow.create_task(look(), name="queued")
    here.set("afterwards")
    await ended(first, task)

    assert task.result() == "creator"
    assert parent_id(spans.span("inside")) == span_id(spans.span("queued"))
    assert current_span_id() == 0


async def test_queued_task_of_a_block_is_a_child_of_its_span(
    narrow: TaskManager, spans: SpanRecorder
) -> None:
    """The parent is that of its creation: the block's, also if it gets its place after others have come."""
    async with narrow.group("load", span=True) as group:
        group.create_task(work(), name="first")
        group.create_task(work(), name="queued")
        victim = group.create_task(work(), name="victim")
        await started()
        victim.cancel()

    children = {span.name for span in spans.children(spans.span("load"))}
    assert children == {"first", "queued", "victim"}


async def test_queued_task_with_own_trace_links_to_its_creator(
    narrow: TaskManager, spans: SpanRecorder, tracer: trace.Tracer
) -> None:
    """It has a trace of its own, like a task that need not wait."""
    first = narrow.create_task(work())
    with tracer.start_as_current_span("caller") as caller:
        task = narrow.create_task(work(), name="queued", trace="new")
    await ended(first, task)

    span = spans.span("queued")
    assert parent_id(span) is None
    assert links(span) == [(caller.get_span_context().span_id, {"otel_tasks.link": "spawned_by"})]


@pytest.mark.parametrize("turns", [0, 3])
async def test_task_cancelled_in_the_queue_has_its_span(
    narrow: TaskManager, spans: SpanRecorder, tracer: trace.Tracer, turns: int
) -> None:
    """The span lasts from creation to end, with the cause and its origin, and without a start event."""
    first = narrow.create_task(fail(ValueError("bad")))
    with tracer.start_as_current_span("creator") as creator:
        task = narrow.create_task(work(), name="queued")
    for _ in range(turns):
        await asyncio.sleep(0)
    if turns:
        await asyncio.sleep(0.5)
    with tracer.start_as_current_span("canceller") as canceller:
        task.cancel("not needed")
    await ended(task)

    span = spans.span("queued")
    assert attributes(span) == {
        "otel_tasks.task.outcome": "cancelled",
        "otel_tasks.cancel.reason": "explicit",
        "otel_tasks.cancel.message": "not needed",
        "otel_tasks.cancel.duration": 0.0,
        "otel_tasks.task.queue.duration": 0.5 if turns else 0.0,
    }
    assert span.status.status_code is StatusCode.UNSET
    assert events(span) == ["otel_tasks.cancel_requested"]
    assert links(span) == [(canceller.get_span_context().span_id, CAUSED_BY)]
    assert parent_id(span) == creator.get_span_context().span_id
    await ended(first)


async def test_task_dropped_at_shutdown_has_its_span(narrow: TaskManager, spans: SpanRecorder) -> None:
    """Tasks that waited for a place are in the trace, too."""
    narrow.create_task(work(), name="running")
    narrow.create_task(work(), name="queued")
    await narrow.shutdown(grace=10)

    assert attributes(spans.span("running")) == {"otel_tasks.task.outcome": "success"}
    assert attributes(spans.span("queued"))["otel_tasks.cancel.reason"] == "shutdown"


async def test_queue_timeout_is_a_timeout(narrow: TaskManager, spans: SpanRecorder) -> None:
    """Its outcome is that of any timeout, with the time in the queue on it."""
    first = narrow.create_task(asyncio.sleep(60))
    task = narrow.create_task(work(), name="late", queue_timeout=5)
    await ended(task)

    span = spans.span("late")
    assert attributes(span) == {
        "otel_tasks.task.outcome": "timeout",
        "otel_tasks.cancel.reason": "timeout",
        "otel_tasks.cancel.message": "queue timeout of 5 s",
        "otel_tasks.task.queue.duration": 5.0,
        "error.type": "timeout",
    }
    assert span.status.description == "the task ran into its queue timeout of 5 s"
    assert "otel_tasks.started" not in events(span)
    first.cancel()
    await ended(first)


async def test_queued_task_that_fails_is_an_error(narrow: TaskManager, spans: SpanRecorder) -> None:
    """The exception comes after the start."""
    await ended(narrow.create_task(work()), narrow.create_task(fail(ValueError("bad")), name="bad"))

    span = spans.span("bad")
    assert events(span) == ["otel_tasks.started", "exception"]
    assert attributes(span)["otel_tasks.task.queue.duration"] == 1.0
    assert span.status.description == "bad"


async def test_queued_task_that_is_sampled_out() -> None:
    """The sampler runs when the span is made; a task that is sampled out works and has its ids."""
    sampler = NotingSampler()
    for provider in (own_provider(ALWAYS_OFF), own_provider(sampler)):
        manager = TaskManager(max_concurrency=1, tracer_provider=provider)
        first = manager.create_task(work(), name="first")
        task, victim = manager.create_task(work(), name="queued"), manager.create_task(work(), name="victim")
        await started()
        assert [name for name, _, _ in sampler.told] in ([], ["first"])
        victim.cancel()
        await ended(first, task, victim)
        assert (task.result(), victim.cancelled()) == ("done", True)
        assert task.trace_id is not None
    assert [name for name, _, _ in sampler.told] == ["first", "victim", "queued"]
    assert sampler.told[-1][2]["otel_tasks.task.id"] == "queued"


async def test_queued_task_without_an_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no span and no error; an SDK that is set up while it waits is used from then on."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    manager = TaskManager(max_concurrency=1)
    tasks = [manager.create_task(work()) for _ in range(2)]
    victim = manager.create_task(work())
    await started()
    victim.cancel()
    await ended(*tasks, victim)
    assert [task.trace_id for task in (*tasks, victim)] == [None] * 3

    tasks = [manager.create_task(work(), name="work") for _ in range(2)]
    victim = manager.create_task(work())
    await started()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", own_provider())
    victim.cancel()
    await ended(*tasks, victim)
    assert [task.trace_id is None for task in (*tasks, victim)] == [True, False, False]
    assert current_span_id() == 0


# -- sampled out, broken, absent ----------------------------------------------------------------


async def test_sampled_out_span_costs_no_attributes() -> None:
    """A task whose span is not sampled works, has its ids, and passes the decision on."""
    manager = TaskManager(tracer_provider=own_provider(ALWAYS_OFF))

    async def look() -> bool:
        return trace.get_current_span().get_span_context().trace_flags.sampled

    task = manager.create_task(look())
    victim = manager.create_task(work())
    victim.cancel("enough")
    await ended(task, victim)

    assert task.result() is False
    assert task.trace_id is not None
    assert victim.cause is not None


class Broken(SpanProcessor):
    """Raises at the start or at the end of each span."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_start(self, span: object, parent_context: object = None) -> None:
        if self.where == "on_start":
            raise RuntimeError("broken processor")

    def on_end(self, span: object) -> None:
        if self.where == "on_end":
            raise RuntimeError("broken processor")


class BrokenSampler(NotingSampler):
    """Raises whenever it is asked."""

    def should_sample(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken sampler")


@pytest.fixture(autouse=True)
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test logs what a fresh process logs."""
    monkeypatch.setattr(errors, "_logged", set())


@pytest.fixture(params=["on_start", "on_end", "sampler"])
def broken(request: pytest.FixtureRequest) -> TaskManager:
    """A manager whose telemetry raises."""
    where: str = request.param
    sampler = BrokenSampler() if where == "sampler" else None
    return TaskManager("test", tracer_provider=own_provider(sampler, Broken(where)))


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The library's log lines that have the traceback of the broken telemetry."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "otel_tasks" and record.exc_info and "broken" in str(record.exc_info[1])
    ]


async def test_broken_telemetry_breaks_no_task(broken: TaskManager, caplog: pytest.LogCaptureFixture) -> None:
    """Tasks run, fail, and are cancelled as usual; the fault is logged once, not for each task."""
    good = [broken.create_task(work()) for _ in range(3)]
    bad = broken.create_task(fail(ValueError("bad")))
    victim = broken.create_task(work())
    victim.cancel()
    await ended(*good, bad, victim)

    assert [task.result() for task in good] == ["done"] * 3
    assert victim.cancelled()
    assert broken.stats().live == 0
    assert len(complaints(caplog)) == 1


@pytest.mark.parametrize("limit", [None, 1])
async def test_global_provider_without_a_tracer_breaks_no_task(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    """A provider that raises when it is asked for a tracer counts as none: logged once, and tasks run."""

    class NoTracer(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
            raise RuntimeError("broken provider")

    monkeypatch.setattr(trace, "_TRACER_PROVIDER", NoTracer(shutdown_on_exit=False))
    manager = TaskManager("test", max_concurrency=limit)
    tasks = [manager.create_task(work()) for _ in range(2)]  # bug A-17
    await ended(*tasks)
    assert [task.result() for task in tasks] == ["done"] * 2
    assert len(complaints(caplog)) == 1


async def test_broken_telemetry_breaks_no_queue(
    broken: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Queued tasks get their places, run, and are cancelled as usual."""
    broken.max_concurrency = 1
    good = [broken.create_task(work()) for _ in range(3)]
    victim = broken.create_task(work())
    await started()
    victim.cancel()
    await ended(*good, victim)

    assert [task.result() for task in good] == ["done"] * 3
    assert victim.cancelled()
    assert (broken.stats().live, broken._ledger.places.limiter.used) == (0, 0)
    assert len(complaints(caplog)) == 1


async def test_broken_telemetry_breaks_no_group(
    broken: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A block with a span of its own is entered and left as usual, and leaves the tree."""
    async with broken.group("load", span=True) as group:
        task = group.create_task(work())

    assert task.result() == "done"
    assert broken._ledger.scopes == {}
    assert len(complaints(caplog)) == 1


async def test_broken_telemetry_breaks_no_shutdown(
    broken: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Abandoning several tasks reports them all."""
    release = asyncio.Event()
    tasks = [broken.create_task(stay(release)) for _ in range(2)]
    await started(*tasks)
    report = await broken.shutdown(grace=0, timeout=1)
    release.set()
    await ended(*tasks)

    assert len(report.still_running) == 2
    assert len(complaints(caplog)) == 1


@pytest.fixture
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No global provider, whatever other tests or the environment may have set up."""
    monkeypatch.delenv("OTEL_PYTHON_TRACER_PROVIDER", raising=False)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", None)


@pytest.mark.usefixtures("no_sdk")
async def test_without_an_sdk_no_span_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracer, no span, no context copied, no outcome looked up for one."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("span work without an SDK")

    monkeypatch.setattr("otel_tasks._core.creation.copy_context", never)
    for name in ("start_span", "code_name"):
        monkeypatch.setattr(f"otel_tasks._core.task_spans.{name}", never)
    for name in ("end_span", "outcome_of"):
        monkeypatch.setattr(f"otel_tasks._core.ending.{name}", never)
    manager = TaskManager()
    task = manager.create_task(work())
    async with manager.group("load", span=True) as group:
        group.create_task(work())

    assert await task == "done"
    assert manager._ledger.telemetry.tracer() is None
    assert not manager._ledger.telemetry.metered()
    assert (task._span, task._extras, task.trace_id) == (None, None, None)


@pytest.mark.usefixtures("no_sdk")
async def test_without_an_sdk_a_given_context_is_used_as_it_is() -> None:
    """As for any asyncio task: what the task sets is seen in the context that was passed."""

    async def change() -> None:
        here.set("inside")

    context = contextvars.Context()
    await TaskManager().create_task(change(), context=context)

    assert context.run(here.get) == "inside"


async def test_no_op_provider_counts_as_no_sdk() -> None:
    """OpenTelemetry's own placeholder, injected, is not traced to."""
    manager = TaskManager(
        tracer_provider=trace.NoOpTracerProvider(), meter_provider=metrics.NoOpMeterProvider()
    )
    await manager.create_task(work())

    assert manager._ledger.telemetry.tracer() is None
    assert not manager._ledger.telemetry.metered()


def test_private_names_of_opentelemetry_are_still_there() -> None:
    """The installed version has the names that are read instead of the slow public functions.

    Without them everything works, at 1.2 us more for each task. If this fails, fix `telemetry`.
    """
    assert hasattr(trace, "_TRACER_PROVIDER")
    assert hasattr(metrics_internal, "_METER_PROVIDER")


async def test_private_names_may_go_away(spans: SpanRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a version that lacks the private name, the public function is used."""
    monkeypatch.setattr(providers, "_READABLE", False)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: spans.provider)
    await TaskManager("test").create_task(work(), name="work")

    assert spans.names == ["work"]


async def test_tasks_need_no_private_names_of_opentelemetry(
    spans: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a version that has none of the names, tasks start and end as usual, with a span."""
    monkeypatch.setattr(providers, "_READABLE", False)
    monkeypatch.setattr(providers, "_METERS_READABLE", False)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: spans.provider)
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: spans.meter_provider)
    monkeypatch.delattr(trace, "_TRACER_PROVIDER")
    monkeypatch.delattr(metrics_internal, "_METER_PROVIDER")
    manager = TaskManager("test")
    await manager.create_task(work())
    cancelled = manager.create_task(asyncio.sleep(60))
    await manager.cancel_all_tasks()

    assert cancelled.cancelled()
    assert manager.stats().live == 0
    assert spans.names == ["work", "sleep"]


# -- the global providers, each in a separate process: they can be set only once --------------------


PREAMBLE = """
import asyncio, logging
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from otel_tasks import TaskManager, global_task_manager
logging.basicConfig(level="WARNING")
async def work():
    return trace.get_current_span().get_span_context().is_valid
"""


def run_script(script: str, *, preamble: str = PREAMBLE, **environ: str) -> str:
    """Run Python code in a fresh process; anything on stderr is a failure."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    # Absolute, as the package may not be installed where the tests run.
    root = os.path.dirname(os.path.dirname(os.path.abspath(otel_tasks.__file__)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", preamble + script],
        env={**clean, "PYTHONPATH": root, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.strip()


def test_global_provider_may_be_set_after_first_use() -> None:
    """A manager that ran tasks without an SDK traces as soon as one is set up."""
    script = """
async def main():
    manager = TaskManager()
    before = await manager.create_task(work()), await global_task_manager.create_task(work())
    trace.set_tracer_provider(TracerProvider())
    after = await manager.create_task(work()), await global_task_manager.create_task(work())
    print(before, after)
asyncio.run(main())
"""
    assert run_script(script) == "(False, False) (True, True)"


def test_global_provider_may_come_from_the_environment() -> None:
    """The provider named in the environment is used even if nothing else reads the global one."""
    script = """
async def main():
    print(await TaskManager().create_task(work()))
asyncio.run(main())
"""
    assert run_script(script, OTEL_PYTHON_TRACER_PROVIDER="sdk_tracer_provider") == "True"


def test_injected_placeholder_becomes_the_provider_that_is_set_later() -> None:
    """trace.get_tracer_provider(), passed before the SDK is set up, means the global provider."""
    script = """
async def main():
    manager = TaskManager(tracer_provider=trace.get_tracer_provider())
    before = await manager.create_task(work())
    trace.set_tracer_provider(TracerProvider())
    print(before, await manager.create_task(work()))
asyncio.run(main())
"""
    assert run_script(script) == "False True"


def test_library_is_imported_without_an_sdk() -> None:
    """Importing the package loads the API alone, and sets no provider."""
    script = """
import sys
import otel_tasks
from opentelemetry import trace
print(trace._TRACER_PROVIDER, [name for name in sys.modules if name.startswith("opentelemetry.sdk")])
"""
    assert run_script(script, preamble="") == "None []"


def test_recorder_runs_outside_of_pytest(spans: SpanRecorder) -> None:
    """The tools are public: a user's test needs no plugin to run a task and look at its span."""
    manager = TaskManager(tracer_provider=spans.provider)

    async def main() -> ManagedTask[str]:
        task = manager.create_task(work(), name="work")
        await task
        return task

    assert run(main()).trace_id == f"{trace_id(spans.span('work')):032x}"
