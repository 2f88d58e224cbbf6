"""Telemetry that raises at every call in turn, and providers that are unlike OpenTelemetry's own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import Histogram, Meter, MeterProvider, NoOpMeterProvider
from opentelemetry.metrics import _internal as metrics_internal
from opentelemetry.trace import NoOpTracerProvider, Span, Tracer, TracerProvider

from otel_tasks import RestartPolicy, RetryPolicy, TaskManager, current_task
from otel_tasks._core.telemetry import errors, providers
from otel_tasks._core.telemetry import metrics as instruments
from otel_tasks._core.telemetry.providers import Providers, set_default_providers
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.logs import TaskContextFilter
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.helpers import fail, give, ignore_cancels, rest, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Scenario = Callable[[TaskManager], Awaitable[object]]


# -- an SDK that raises at one of its calls ---------------------------------------------------------


class HostileError(RuntimeError):
    """The error of the hostile SDK."""


class Trap:
    """Counts the calls to a hostile SDK, and raises at one kind of them."""

    def __init__(self, call: str | None) -> None:
        self.call = call
        self.calls: Counter[str] = Counter()

    def __call__(self, call: str) -> None:
        self.calls[call] += 1
        if call == self.call:
            raise HostileError(call)


class HostileSpan(Span):
    """A span of the SDK behind a trap."""

    def __init__(self, trap: Trap, span: Span) -> None:
        self._trap = trap
        self._span = span

    def get_span_context(self) -> Any:
        self._trap("get_span_context")
        return self._span.get_span_context()

    @property
    def attributes(self) -> Any:
        """Not of the API: what the SDK's own spans have."""
        self._trap("attributes")
        return getattr(self._span, "attributes", None)

    def is_recording(self) -> bool:
        self._trap("is_recording")
        return self._span.is_recording()

    def set_attributes(self, *args: Any, **kwargs: Any) -> None:
        self._trap("set_attributes")
        self._span.set_attributes(*args, **kwargs)

    def set_attribute(self, *args: Any, **kwargs: Any) -> None:
        self._trap("set_attribute")
        self._span.set_attribute(*args, **kwargs)

    def set_status(self, *args: Any, **kwargs: Any) -> None:
        self._trap("set_status")
        self._span.set_status(*args, **kwargs)

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        self._trap("add_event")
        # As New Relic's, which does not allow for None.
        self._span.add_event(name, dict(attributes), timestamp)

    def add_link(self, *args: Any, **kwargs: Any) -> None:
        self._trap("add_link")
        self._span.add_link(*args, **kwargs)

    def record_exception(self, *args: Any, **kwargs: Any) -> None:
        self._trap("record_exception")
        self._span.record_exception(*args, **kwargs)

    def update_name(self, name: str) -> None:
        self._trap("update_name")
        self._span.update_name(name)

    def end(self, *args: Any, **kwargs: Any) -> None:
        self._trap("end")
        self._span.end(*args, **kwargs)


class HostileTracer(Tracer):
    """A tracer of the SDK behind a trap."""

    def __init__(self, trap: Trap, tracer: Tracer) -> None:
        self._trap = trap
        self._tracer = tracer

    def start_span(self, *args: Any, **kwargs: Any) -> Span:
        self._trap("start_span")
        return HostileSpan(self._trap, self._tracer.start_span(*args, **kwargs))

    def start_as_current_span(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the library does not call it")


class HostileHistogram(Histogram):
    """A histogram of the SDK behind a trap."""

    def __init__(self, trap: Trap, histogram: Histogram) -> None:
        self._trap = trap
        self._histogram = histogram

    def record(self, *args: Any, **kwargs: Any) -> None:
        self._trap("record")
        self._histogram.record(*args, **kwargs)


class HostileMeter:
    """A meter of the SDK behind a trap; it shares no class with OpenTelemetry's."""

    def __init__(self, trap: Trap, meter: Meter) -> None:
        self._trap = trap
        self._meter = meter

    def create_histogram(self, *args: Any, **kwargs: Any) -> Histogram:
        self._trap("create_histogram")
        return HostileHistogram(self._trap, self._meter.create_histogram(*args, **kwargs))

    def create_observable_up_down_counter(self, *args: Any, **kwargs: Any) -> object:
        self._trap("create_observable_up_down_counter")
        return self._meter.create_observable_up_down_counter(*args, **kwargs)

    def create_observable_counter(self, *args: Any, **kwargs: Any) -> object:
        self._trap("create_observable_counter")
        return self._meter.create_observable_counter(*args, **kwargs)


class HostileProvider:
    """Both providers of the SDK behind a trap: unhashable, and not weakly referenceable."""

    __slots__ = ("_meters", "_tracers", "_trap")
    __hash__ = None  # type: ignore[assignment]  # as a dataclass has it

    def __init__(self, trap: Trap, tracers: TracerProvider, meters: MeterProvider) -> None:
        self._trap = trap
        self._tracers = tracers
        self._meters = meters

    def __eq__(self, other: object) -> bool:
        raise HostileError("compared")

    def __repr__(self) -> str:
        raise HostileError("shown")

    def get_tracer(self, *args: Any, **kwargs: Any) -> Tracer:
        self._trap("get_tracer")
        return HostileTracer(self._trap, self._tracers.get_tracer(*args, **kwargs))

    def get_meter(self, *args: Any, **kwargs: Any) -> Any:
        self._trap("get_meter")
        return HostileMeter(self._trap, self._meters.get_meter(*args, **kwargs))


# Every call that the library makes; `test_each_call_is_made` keeps the list whole.
CALLS = [
    "get_tracer",
    "start_span",
    "get_span_context",
    "attributes",
    "is_recording",
    "set_attribute",
    "set_attributes",
    "set_status",
    "add_event",
    "add_link",
    "record_exception",
    "end",
    "get_meter",
    "create_histogram",
    "create_observable_up_down_counter",
    "create_observable_counter",
    "record",
]
# A span whose start or end raises is lost, and the SDK starts none below one whose identity it cannot read.
WITHOUT_SPANS = {"get_tracer", "start_span", "end", "get_span_context"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test finds what a fresh process finds: nothing logged, and no instruments."""
    monkeypatch.setattr(errors, "_logged", set())
    monkeypatch.setattr(instruments, "_instruments", {})


@pytest.fixture
def recorder() -> Iterator[SpanRecorder]:
    """The data that gets through the trap; a span may stay open."""
    with SpanRecorder() as recorder:
        yield recorder


@pytest.fixture
def loop_errors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The errors of callbacks and tasks that reached the loop's exception handler."""
    found: list[str] = []

    def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        found.append(f"{context['message']}: {context.get('exception')!r}")

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_exception_handler", note)
    return found


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The library's log lines about the hostile SDK, without their arguments; prints each line."""
    return [
        str(record.msg) if "%r" in str(record.msg) else record.getMessage()
        for record in caplog.records
        if record.name == "otel_tasks" and record.exc_info and isinstance(record.exc_info[1], HostileError)
    ]


# -- what an application does -------------------------------------------------------------------------


async def ended(*tasks: asyncio.Task[Any]) -> list[str]:
    """How tasks ended, once their ends are recorded."""
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    return ["cancelled" if task.cancelled() else repr(task.exception() or task.result()) for task in tasks]


async def tasks(manager: TaskManager) -> object:
    """Tasks that return, fail, are cancelled, run into a timeout, and ignore a cancellation."""
    stubborn = manager.create_task(ignore_cancels(2))
    every: list[asyncio.Task[Any]] = [
        manager.create_task(give(1)),
        manager.create_task(fail(ValueError("bad"))),
        manager.create_task(rest(), timeout=1),
        manager.create_task(rest(), name="victim", group="jobs"),
        manager.create_task(give(2), trace="new"),
        stubborn,
    ]
    await settle()
    await manager.cancel_group("jobs")
    stubborn.cancel("enough")
    return await ended(*every)


async def queue(manager: TaskManager) -> object:
    """Tasks that wait for a place, one of which is cancelled there."""
    manager.max_concurrency = 1
    every = [manager.create_task(asyncio.sleep(1, number)) for number in range(3)]
    victim = manager.create_task(rest())
    await settle()
    victim.cancel()
    return await ended(*every, victim)


async def blocks(manager: TaskManager) -> object:
    """Blocks with a span of their own: one is left, in one a task fails, one runs into its timeout."""
    seen: list[object] = []
    async with manager.group("load", span=True) as group:
        task = group.create_task(give(1))
    seen.append(task.result())
    try:
        async with manager.group("fails", span=True) as group, manager.group("inner", span=True) as inner:
            sibling = inner.create_task(rest())
            inner.create_task(fail(ValueError("bad")))
    except* ValueError as errors:
        seen.append([repr(error) for error in errors.exceptions])
    try:
        async with manager.group("slow", timeout=1, span=True) as group:
            group.create_task(rest())
    except TimeoutError:
        seen.append("timeout")
    return seen, sibling.cause is not None and sibling.cause.kind


async def service(manager: TaskManager) -> object:
    """A service that fails once and is started again."""
    attempts: list[int] = []

    async def attempt() -> str:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise ValueError("bad")
        return "served"

    running = await manager.start_service("prices", attempt, restart=RestartPolicy(delay=1))
    return await running, attempts


async def retries(manager: TaskManager) -> object:
    """A task that fails once and tries again, and one whose attempts are cancelled."""
    attempts: list[int] = []

    async def attempt() -> str:
        attempts.append(len(attempts))
        if len(attempts) == 1:
            raise OSError("bad")
        return "served"

    retried = manager.create_task(attempt, retry=RetryPolicy(delay=1))
    cancelled = manager.create_task(rest, retry=RetryPolicy())
    await settle()
    cancelled.cancel()
    return await ended(retried, cancelled), attempts, retried.info().attempt


async def shutdown(manager: TaskManager) -> object:
    """A shutdown that has to abandon a task."""
    stubborn = manager.create_task(ignore_cancels(10), name="stubborn")
    await settle()
    report = await manager.shutdown(grace=0, timeout=1)
    return list(report.still_running), await ended(stubborn)


async def facts(manager: TaskManager) -> object:
    """All that tells about tasks, live, ended and remembered, and log records in a task."""
    record = logging.LogRecord("app", logging.INFO, __file__, 1, "hello", (), None)

    async def look() -> str:
        task = current_task()
        assert task is not None
        assert TaskContextFilter().filter(record)
        return task.info().status

    task = manager.create_task(look(), name="look")
    waiting = manager.create_task(rest(), name="wait")
    await settle()
    live = waiting.info().status, str(manager.tree()), len(manager.get_all_task_info())
    waiting.cancel()
    how = await ended(task, waiting)
    remembered = manager.get_task_info("look")
    assert remembered is not None
    assert waiting.cause is not None
    waiting.cause.to_dict()
    told = [info.to_dict()["status"] for info in (remembered, task.info(), waiting.info())]
    return live[0], live[2], how, told, record.__dict__["task_name"]


async def request(manager: TaskManager) -> object:
    """Two requests with groups that have a span, below the server's span: one ends, one client leaves."""
    seen: list[object] = []
    tracer = manager._ledger.telemetry.tracer()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = manager.create_task(give(1)) if scope["path"] == "/other" else None
        from otel_tasks import create_task

        inner = create_task(rest() if scope["path"] == "/long" else give(2), name="work")
        try:
            seen.append((await inner, task and await task))
        except asyncio.CancelledError:
            seen.append(inner.cause is not None and inner.cause.kind)
            raise
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    wrapped = TaskGroupMiddleware(app, manager=manager, span=True)

    async def served(connection: FakeConnection) -> None:
        if tracer is not None:
            make_current(tracer)
        await connection.run(wrapped)

    for path in ("/short", "/other", "/long"):
        connection = FakeConnection(path=path)
        serving = asyncio.create_task(served(connection), context=contextvars.Context())
        await asyncio.sleep(0.2)
        if path == "/long":
            connection.disconnect()
        await serving
        seen.append(connection.status)
    return seen


def make_current(tracer: Tracer) -> None:
    """Start the server's span in this context, where that can be had, as its instrumentation does."""
    with contextlib.suppress(HostileError):
        otel_context.attach(trace.set_span_in_context(tracer.start_span("GET")))


SCENARIOS: list[Scenario] = [tasks, queue, blocks, service, retries, shutdown, facts, request]


async def healthy(scenario: Scenario) -> object:
    """The result of the scenario without telemetry."""
    manager = TaskManager("app", tracer_provider=NoOpTracerProvider(), meter_provider=NoOpMeterProvider())
    return await scenario(manager), manager.stats()


def hostile(recorder: SpanRecorder, call: str | None) -> tuple[TaskManager, Trap]:
    """A manager whose SDK raises at each ``call``."""
    trap = Trap(call)
    provider: Any = HostileProvider(trap, recorder.provider, recorder.meter_provider)
    return TaskManager("app", tracer_provider=provider, meter_provider=provider), trap


# -- one call after another raises ----------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_raising_call_changes_nothing_and_is_logged_once(
    scenario: Scenario,
    call: str,
    recorder: SpanRecorder,
    caplog: pytest.LogCaptureFixture,
    loop_errors: list[str],
) -> None:
    """The application does what it does without telemetry, and the log has each error once."""
    manager, trap = hostile(recorder, call)
    came_to = await scenario(manager), manager.stats()

    assert came_to == await healthy(scenario)
    assert loop_errors == []
    logged = lines(caplog)
    assert len(logged) == len(set(logged))
    assert bool(logged) == bool(trap.calls[call])


async def test_each_call_is_made(recorder: SpanRecorder, caplog: pytest.LogCaptureFixture) -> None:
    """The scenarios together make every call of the list, none that is not there, and none that raises."""
    made: set[str] = set()
    for scenario in SCENARIOS:
        manager, trap = hostile(recorder, None)
        await scenario(manager)
        made |= set(trap.calls)

    assert made == set(CALLS)
    assert [message for message in caplog.messages if "not logged" in message] == []


@pytest.mark.parametrize("call", sorted(set(CALLS) - WITHOUT_SPANS))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_span_is_exported_whatever_else_raises(
    scenario: Scenario, call: str, recorder: SpanRecorder
) -> None:
    """A call that raises loses what it would have written, and never the span."""
    manager, _ = hostile(recorder, call)
    await scenario(manager)
    names = sorted(span.name for span in recorder.finished)
    with SpanRecorder() as other:
        manager, _ = hostile(other, None)
        await scenario(manager)

        assert names == sorted(span.name for span in other.finished)


@pytest.mark.parametrize("call", ["add_event", "add_link", "get_span_context", "record_exception"])
async def test_outcome_is_written_whatever_else_raises(call: str, recorder: SpanRecorder) -> None:
    """The attributes of the end come first, and a broken event, link or exception takes none of them away."""
    manager, _ = hostile(recorder, call)
    await tasks(manager)

    outcomes = {str((span.attributes or {})["otel_tasks.task.outcome"]) for span in recorder.finished}
    assert outcomes == {"success", "error", "timeout", "cancelled"}


@pytest.mark.parametrize("call", ["start_span", "end", "set_attributes", "create_observable_counter"])
async def test_duration_is_recorded_whatever_else_raises(call: str, recorder: SpanRecorder) -> None:
    """Spans and metrics fail each for itself."""
    manager, _ = hostile(recorder, call)
    await tasks(manager)

    counted = sum(point.count for point in recorder.metrics()["otel_tasks.task.duration"])
    assert counted == 6


async def test_second_manager_of_a_raising_provider_logs_for_itself(
    recorder: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged once per manager, however many tasks there are."""
    for _ in range(2):
        manager, _ = hostile(recorder, "start_span")
        await ended(*(manager.create_task(give(1)) for _ in range(10)))

    assert lines(caplog) == ["starting a span for task %r raised; further ones are not logged"] * 2


class NoLinks(HostileSpan):
    """As Datadog's: links are taken at the start alone, and the method is the API's own, which warns."""

    add_link = Span.add_link


class NoLinksTracer(HostileTracer):
    def start_span(self, *args: Any, **kwargs: Any) -> Span:
        return NoLinks(self._trap, self._tracer.start_span(*args, **kwargs))


class NoLinksProvider(TracerProvider):
    def __init__(self, inner: TracerProvider) -> None:
        self._inner = inner

    def get_tracer(self, *args: Any, **kwargs: Any) -> Tracer:
        return NoLinksTracer(Trap(None), self._inner.get_tracer("links"))


async def test_span_that_takes_no_links_has_its_origin_as_attributes(
    recorder: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no link can be added, two ids on the span name the origin of its cancellation; nothing warns."""
    manager = TaskManager(tracer_provider=NoLinksProvider(recorder.provider))
    task = manager.create_task(rest(), name="work")
    await settle()
    with recorder.provider.get_tracer("app").start_as_current_span("operator") as operator:
        task.cancel()
    await ended(task)

    origin = operator.get_span_context()
    attributes = recorder.span("work").attributes or {}
    assert attributes["otel_tasks.cancel.origin.trace_id"] == f"{origin.trace_id:032x}"
    assert attributes["otel_tasks.cancel.origin.span_id"] == f"{origin.span_id:016x}"
    assert caplog.records == []


# -- spans of others --------------------------------------------------------------------------------------


class NoIdentity(trace.NonRecordingSpan):
    """A span without what identifies one."""

    def __init__(self) -> None:
        pass

    def get_span_context(self) -> Any:
        return None


@pytest.mark.parametrize("own_trace", [False, True])
async def test_current_span_without_identity_breaks_no_task(
    recorder: SpanRecorder, caplog: pytest.LogCaptureFixture, own_trace: bool
) -> None:
    """Tasks below it run and are cancelled; one with its own trace has its span, and no link."""
    manager = TaskManager(tracer_provider=recorder.provider)
    with trace.use_span(NoIdentity()):
        task = manager.create_task(rest(), name="work", trace="new" if own_trace else "child")
        await settle()
        task.cancel()
    await ended(task)

    assert task.cause is not None
    assert task.cause.to_dict()["trace_id"] is None
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records)
    if own_trace:
        assert recorder.span("work").links == ()


class OddContext:
    """A span's identity whose ids are no numbers."""

    is_valid = True
    trace_id = span_id = "abc"


async def test_ids_that_are_no_numbers_are_none(
    caplog: pytest.LogCaptureFixture, recorder: SpanRecorder
) -> None:
    """An identity that cannot be shown in hex is as none, and the snapshot is taken."""

    class OddSpan(NoIdentity):
        def get_span_context(self) -> Any:
            return OddContext()

    class OddTracer(HostileTracer):
        def start_span(self, *args: Any, **kwargs: Any) -> Span:
            return OddSpan()

    class OddProvider(trace.NoOpTracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            return OddTracer(Trap(None), recorder.provider.get_tracer("odd"))

    class Provider(TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> Any:
            return OddProvider().get_tracer()

    manager = TaskManager(tracer_provider=Provider())
    task = manager.create_task(give(1), name="work")
    live = task.info()
    await ended(task)
    remembered = manager.get_task_info("work")

    assert remembered is not None
    assert (live.trace_id, remembered.trace_id, task.trace_id) == (None, None, None)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize("function", ["get_current_span", "set_span_in_context", "get_current", "attach"])
async def test_raising_function_of_the_api_changes_nothing_and_is_logged_once(
    scenario: Scenario,
    function: str,
    recorder: SpanRecorder,
    caplog: pytest.LogCaptureFixture,
    loop_errors: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Vendors patch the API's functions, and replace the context behind them; every started span is ended."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise HostileError(function)

    expected = await healthy(scenario)
    manager, _ = hostile(recorder, None)
    with monkeypatch.context() as patched:
        patched.setattr(otel_context if function in ("get_current", "attach") else trace, function, broken)
        came_to = await scenario(manager), manager.stats()

    assert came_to == expected
    assert loop_errors == []
    assert len(lines(caplog)) == len(set(lines(caplog)))
    assert [span.name for span in recorder.open if span.name != "GET"] == []


# -- providers of others ------------------------------------------------------------------------------------


class Unhashable(MeterProvider):
    """As Logfire's, a dataclass: equal to its like, and without a hash."""

    __hash__ = None  # type: ignore[assignment]  # as a dataclass has it

    def __init__(self, inner: MeterProvider) -> None:
        self.inner = inner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unhashable)

    def get_meter(self, *args: Any, **kwargs: Any) -> Meter:
        return self.inner.get_meter(*args, **kwargs)


class Slotted:
    """Not weakly referenceable, and no subclass of OpenTelemetry's."""

    __slots__ = ("inner",)

    def __init__(self, inner: MeterProvider) -> None:
        self.inner = inner

    def get_meter(self, *args: Any, **kwargs: Any) -> Meter:
        return self.inner.get_meter(*args, **kwargs)


def completed(recorder: SpanRecorder) -> int:
    """How many tasks the duration metric has seen."""
    return sum(point.count for point in recorder.metrics().get("otel_tasks.task.duration", []))


@pytest.mark.parametrize("kind", [Unhashable, Slotted])
@pytest.mark.parametrize("injected", [True, False])
async def test_provider_of_a_strange_class_is_measured_with(
    kind: Any, injected: bool, recorder: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two managers share its instruments: OpenTelemetry complains of no duplicate."""
    provider = kind(recorder.meter_provider)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", None if injected else provider)
    for _ in range(2):
        await TaskManager(meter_provider=provider if injected else None).create_task(give(1))
        await settle()

    assert completed(recorder) == 2
    assert recorder.complaints == []


async def test_equal_providers_are_still_two(recorder: SpanRecorder, spans: SpanRecorder) -> None:
    """Equality of providers means nothing: each has instruments of its own."""
    first, second = Unhashable(recorder.meter_provider), Unhashable(spans.meter_provider)
    for provider in (first, second, second):
        await TaskManager(meter_provider=provider).create_task(give(1))
        await settle()

    assert (completed(recorder), completed(spans)) == (1, 2)


async def test_instruments_are_dropped_with_their_provider() -> None:
    """When a provider is freed, its entry in the table is dropped."""
    provider = Unhashable(metrics.NoOpMeterProvider())
    link = weakref.ref(provider)
    manager = TaskManager(meter_provider=provider)
    await manager.create_task(give(1))
    assert len(instruments._instruments) == 1
    del provider, manager
    await settle()
    gc.collect()

    assert link() is None
    assert instruments._instruments == {}


async def test_provider_with_the_id_of_another_has_its_own_instruments(recorder: SpanRecorder) -> None:
    """Python gives the id of a dropped object to a new one; an entry is for the object, not for its id."""
    provider = Unhashable(recorder.meter_provider)
    stale = instruments.Instruments(NoOpMeterProvider())
    instruments._instruments[id(provider)] = (lambda: None, stale)
    await TaskManager(meter_provider=provider).create_task(give(1))
    await settle()

    assert completed(recorder) == 1


async def test_global_providers_that_are_replaced_are_followed(
    recorder: SpanRecorder, spans: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spans, durations and gauges go to the providers that are global when a task is created and ends."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", None)
    manager = TaskManager()
    await ended(manager.create_task(give(0), name="nowhere"))
    for place in (recorder, spans, recorder):
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", place.provider)
        monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", place.meter_provider)
        victim = manager.create_task(rest(), name="victim", group="jobs")
        # A gauge shows tasks that have not ended yet.
        assert [point.value for point in place.metrics()["otel_tasks.task.active"] if point.value] == [1]
        await manager.cancel_group("jobs")
        await ended(victim)

    assert (recorder.names, spans.names) == (["victim"] * 2, ["victim"])
    assert (completed(recorder), completed(spans)) == (2, 1)
    cancelled = [
        sum(point.value for point in place.metrics()["otel_tasks.task.cancellations"])
        for place in (recorder, spans)
    ]
    assert cancelled == [2, 1]


class Unbound:
    """A proxy that stands for nothing yet, and says so whatever it is asked."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        raise HostileError("stands for nothing yet")


@pytest.mark.parametrize("way", ["injected", "default", "global"])
async def test_proxy_that_stands_for_nothing_breaks_no_task(
    way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks run without spans and metrics, and the log says once why."""
    nothing: Any = Unbound()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", nothing if way == "global" else None)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", nothing if way == "global" else None)
    if way == "default":
        set_default_providers(Providers(nothing, nothing))
    try:
        own = nothing if way == "injected" else None
        manager = TaskManager(tracer_provider=own, meter_provider=own)
        how = await ended(manager.create_task(give(1)), manager.create_task(fail(ValueError("bad"))))
    finally:
        set_default_providers(None)

    assert how == ["1", "ValueError('bad')"]
    logged = lines(caplog)
    assert logged
    assert len(set(logged)) == len(logged)


@pytest.mark.parametrize("readable", [True, False])
async def test_environment_that_names_no_provider_breaks_no_task(
    readable: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt name in the environment is logged, and tasks run without spans and metrics."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", None)
    monkeypatch.setattr(providers, "_READABLE", readable)
    monkeypatch.setattr(providers, "_METERS_READABLE", readable)
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "misspelt")
    monkeypatch.setenv("OTEL_PYTHON_METER_PROVIDER", "misspelt")
    manager = TaskManager()
    how = await ended(*(manager.create_task(give(1)) for _ in range(3)))

    assert how == ["1"] * 3
    ours = [record.getMessage() for record in caplog.records if record.name == "otel_tasks"]
    assert ours == [
        "OpenTelemetry raised while loading the provider that the environment names; "
        "further errors of this kind are not logged"
    ]


async def test_placeholder_of_metrics_stands_for_the_global_provider(
    recorder: SpanRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.get_meter_provider(), passed before the SDK is set up, means the global provider."""
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", None)
    manager = TaskManager(meter_provider=metrics.get_meter_provider())
    await ended(manager.create_task(give(1)))
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", recorder.meter_provider)
    await ended(manager.create_task(give(1)))

    assert completed(recorder) == 1
