"""Spans, links and metrics of tasks: the only module that imports OpenTelemetry.

The library reports through the API package alone and never configures an SDK. Where none is
set up (the global provider is still OpenTelemetry's placeholder) no span work is done.
"""

from __future__ import annotations

import contextvars
import os
import re
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet, finalize, ref

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, MeterProvider, NoOpMeterProvider, Observation
from opentelemetry.metrics import _internal as metrics_internal
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    NoOpTracer,
    NoOpTracerProvider,
    Span,
    SpanContext,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
)

from otel_tasks._log import logger
from otel_tasks._state import CancelKind, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from otel_tasks.cancellation import CancelCause

# What the rest of the package needs of OpenTelemetry, it takes from here.
__all__ = ["MeterProvider", "Span", "SpanContext", "Tracer", "TracerProvider", "metrics_internal", "trace"]

K = TypeVar("K")

# By name: asking an enumeration for a member takes as long as calling a method, before Python 3.12.
_ERROR = Outcome.ERROR
_ERRONEOUS = (Outcome.ERROR, Outcome.TIMEOUT, Outcome.ABANDONED)

VERSION = version("otel-tasks")
SCOPE = "otel_tasks"

TASK_NAME = "otel_tasks.task.name"
TASK_ID = "otel_tasks.task.id"
TASK_PRIORITY = "otel_tasks.task.priority"
TASK_STATE = "otel_tasks.task.state"
TASK_OUTCOME = "otel_tasks.task.outcome"
GROUP_NAME = "otel_tasks.group.name"
GROUP_ID = "otel_tasks.group.id"
MANAGER_NAME = "otel_tasks.manager.name"
CODE_FUNCTION = "code.function.name"
CANCEL_REASON = "otel_tasks.cancel.reason"
CANCEL_MESSAGE = "otel_tasks.cancel.message"
CANCEL_DURATION = "otel_tasks.cancel.duration"
CANCEL_IGNORED = "otel_tasks.cancel.ignored"
CANCEL_COUNT = "otel_tasks.cancel.count"
REQUEST_OUTCOME = "otel_tasks.request.outcome"
ERROR_TYPE = "error.type"
LINK = "otel_tasks.link"
QUEUE_DURATION = "otel_tasks.task.queue.duration"
STARTED = "otel_tasks.started"
CANCEL_REQUESTED = "otel_tasks.cancel_requested"

# Where the context of a task that is to be started again says which span was the one before.
_PREDECESSOR = otel_context.create_key("otel_tasks.predecessor")
_READABLE = hasattr(trace, "_TRACER_PROVIDER")
_METERS_READABLE = hasattr(metrics_internal, "_METER_PROVIDER")
_DESCRIPTION_LIMIT = 256
# A number or an id as a part of a name of its own: "fetch-17", "order_4711_pay", "job:9f8b7c6d".
_ID = r"(?:[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}|\d+|(?=[a-fA-F]*\d)[0-9a-fA-F]{8,})"
# A slash only at the end: routes have numbers of their own ("/v/2/users").
_ID_PART = re.compile(rf"[-_:#. ]{_ID}(?=[-_:#. ]|$)|(?:/{_ID})+$")
# Seconds; tasks are often far shorter than requests, so finer than the convention's for HTTP.
_DURATION_BUCKETS = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0]


@lru_cache(maxsize=1024)
def low_cardinality(name: str) -> str:
    """Cut numbers and ids out of a name, as span names and metrics must not have any.

    Back-ends make one operation of each span name (https://opentelemetry.io/docs/specs/otel/trace/api/#span).
    """
    return _ID_PART.sub("", name) or name


def error_type(error: BaseException) -> str:
    """Name an exception's class as the semantic conventions want it in ``error.type``."""
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def text_of(error: BaseException, text: Callable[[object], str] = str) -> str:
    """``str(error)``, or its ``repr``, also of an exception that breaks when it is asked for it."""
    try:
        return text(error)
    except Exception as broken:
        return f"<{type(error).__name__} without text: {type(broken).__name__}>"


def current_span_context(context: contextvars.Context | None = None) -> SpanContext | None:
    """Give the identity of the span current in ``context`` (None: here), None if there is none."""
    # A copy, for one that is entered already, be it by another thread, refuses.
    span = trace.get_current_span() if context is None else context.copy().run(trace.get_current_span)
    span_context = span.get_span_context()
    return span_context if span_context.is_valid else None


def quiet_context() -> contextvars.Context:
    """Make a context for work on nobody's behalf: no stranger's trace, and no spans of its own.

    Instrumentations wrap ``receive`` and start a span in it; below an unsampled parent it is
    dropped by every sampler that asks the parent.
    """
    context = contextvars.Context()
    parent = NonRecordingSpan(SpanContext(trace_id=1, span_id=1, is_remote=False, trace_flags=TraceFlags(0)))
    context.run(otel_context.attach, trace.set_span_in_context(parent, otel_context.Context()))
    return context


def annotate_request(context: contextvars.Context, cancelled: int) -> None:
    """Say on the span current in ``context`` that the client left, and how many tasks were cancelled."""
    span = context.run(trace.get_current_span)
    span.set_attributes({REQUEST_OUTCOME: str(CancelKind.CLIENT_DISCONNECT), CANCEL_COUNT: cancelled})


class MetricsSource(Protocol):
    """What the observable instruments read, on the metric reader's thread."""

    # Cancelled tasks by group name and reason, since the start.
    cancelled_by: dict[tuple[str, str], int]

    def active(self) -> Mapping[tuple[str, str], int]:
        """Live tasks by group name and state, ``active`` or ``queued``."""
        ...


class _Instruments:
    """The instruments of one meter provider, shared by all managers that report to it."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter(SCOPE, VERSION)
        # Weak: a provider lives as long as the process, a manager need not. Replaced and never
        # changed: the metric reader's thread may be walking it.
        self._sources: tuple[tuple[ref[MetricsSource], dict[tuple[str, str], int]], ...] = ()
        # What managers had counted that are gone, or report elsewhere: a counter never goes back.
        self._past: dict[tuple[str, str], int] = {}
        self.duration = meter.create_histogram(
            "otel_tasks.task.duration",
            unit="s",
            description="From the creation of a task to its end.",
            explicit_bucket_boundaries_advisory=_DURATION_BUCKETS,
        )
        self.queue_duration = meter.create_histogram(
            QUEUE_DURATION,
            unit="s",
            description="From the creation of a task to the place that it had to wait for.",
            explicit_bucket_boundaries_advisory=_DURATION_BUCKETS,
        )
        meter.create_observable_up_down_counter(
            "otel_tasks.task.active",
            callbacks=[self._observe_active],
            unit="{task}",
            description="Tasks that are live.",
        )
        meter.create_observable_counter(
            "otel_tasks.task.cancellations",
            callbacks=[self._observe_cancellations],
            unit="{cancellation}",
            description="Tasks that ended cancelled.",
        )

    def watch(self, source: MetricsSource) -> Callable[[], object]:
        """Read ``source`` from now on; call what this gives to end it."""
        # What it counted while it reported elsewhere stays there.
        before = source.cancelled_by.copy()
        self._sources = (*(entry for entry in self._sources if entry[0]() is not None), (ref(source), before))
        settle = finalize(source, _settle, self._past, source.cancelled_by, before)
        # Not at the interpreter's exit, when the source is still read by the last export.
        settle.atexit = False

        def stop() -> None:
            self._sources = tuple(entry for entry in self._sources if entry[1] is not before)
            settle()

        return stop

    def _alive(self) -> list[tuple[MetricsSource, dict[tuple[str, str], int]]]:
        return [(source, before) for link, before in self._sources if (source := link()) is not None]

    def _observe_active(self, _: CallbackOptions) -> Iterable[Observation]:
        totals: dict[tuple[str, str], int] = {}
        for source, _before in self._alive():
            _add_up(totals, source.active())
        return [
            Observation(count, {GROUP_NAME: group, TASK_STATE: state})
            for (group, state), count in totals.items()
        ]

    def _observe_cancellations(self, _: CallbackOptions) -> Iterable[Observation]:
        totals = self._past.copy()
        for source, before in self._alive():
            _settle(totals, source.cancelled_by.copy(), before)
        return [
            Observation(count, {GROUP_NAME: group, CANCEL_REASON: reason})
            for (group, reason), count in totals.items()
        ]


def _add_up(totals: dict[K, int], counts: Mapping[K, int]) -> None:
    for key, count in counts.items():
        totals[key] = totals.get(key, 0) + count


def _settle(totals: dict[K, int], counts: Mapping[K, int], before: Mapping[K, int]) -> None:
    """Add up what has been counted since it was ``before``."""
    _add_up(totals, {key: count - before.get(key, 0) for key, count in counts.items()} if before else counts)


# One set of instruments for each injected provider, and one (None) for the global provider, whose
# placeholder passes on what was made of it before an SDK was set up.
_instruments: WeakKeyDictionary[MeterProvider, _Instruments] = WeakKeyDictionary()
_global_instruments: list[_Instruments] = []


def _instruments_of(provider: MeterProvider | None) -> _Instruments:
    if provider is None or provider is metrics.get_meter_provider():
        if not _global_instruments:
            current = metrics.get_meter_provider()
            # It may have been injected somewhere before it became the global one.
            _global_instruments.append(_instruments.get(current) or _Instruments(current))
        return _global_instruments[0]
    if provider not in _instruments:
        _instruments[provider] = _Instruments(provider)
    return _instruments[provider]


class Providers(NamedTuple):
    """Where spans and metrics go; None is the global provider, also one that is set up later."""

    tracer: TracerProvider | None = None
    meter: MeterProvider | None = None


def _default_providers() -> Providers:
    """Where managers without providers of their own report: nowhere, if the environment says so.

    The variable is that of ``opentelemetry-instrument``, which starts no instrumentation that is named there.
    This library needs no starting, so it has to look itself. ``*`` says that none is to be started: a library
    that traces itself is not meant.
    """
    named = os.environ.get("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "").split(",")
    if any(name.strip() == SCOPE for name in named):
        return Providers(NoOpTracerProvider(), NoOpMeterProvider())
    return Providers()


_default = _default_providers()
# All of this process, to be told when the default changes.
_everyone: WeakSet[Telemetry] = WeakSet()


def set_default_providers(providers: Providers | None) -> None:
    """Let all managers that were given no providers of their own report to these; None is as at the start."""
    global _default
    _default = _default_providers() if providers is None else providers
    for telemetry in list(_everyone):
        telemetry.follow_default()


class Telemetry:
    """What one manager reports, and where to.

    Args:
        manager_name: The value of ``otel_tasks.manager.name``.
        tracer_provider: Where spans go; None is the global provider, also one that is set up later.
        meter_provider: Where metrics go; None is the global provider, also one that is set up later.
    """

    def __init__(
        self,
        manager_name: str,
        tracer_provider: TracerProvider | None,
        meter_provider: MeterProvider | None,
    ) -> None:
        self.manager_name = manager_name
        # OpenTelemetry's placeholder stands for the global provider.
        is_placeholder = isinstance(tracer_provider, trace.ProxyTracerProvider)
        self._own = Providers(None if is_placeholder else tracer_provider, meter_provider)
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._metrics: _Instruments | None = None
        self._source: ref[MetricsSource] | None = None
        self._unwatch: Callable[[], object] | None = None
        self.follow_default()
        _everyone.add(self)

    def follow_default(self) -> None:
        """Report to the providers that the manager was given, and where it was given none, to the default."""
        chosen = _default.tracer if self._own.tracer is None else self._own.tracer
        self._injected = chosen is not None
        self._use(chosen)
        self._meter_provider = meter = _default.meter if self._own.meter is None else self._own.meter
        # It reports where OpenTelemetry's two globals say, and nowhere while they say nothing: to be
        # seen without a call, of which one at each end of a task costs 2 % of it.
        self.is_global = _READABLE and _METERS_READABLE and chosen is None and meter is None
        if self._unwatch is not None and self._source is not None:
            self._unwatch()
            self._unwatch = self._metrics = None
            source = self._source()
            if source is not None:
                self.watch(source)

    def tracer(self) -> Tracer | None:
        """Give the tracer, None where no SDK is set up."""
        if not self._injected:
            # The public get_tracer_provider() reads os.environ each time (1.2 us, half a task);
            # this is the name that it reads. Absent in a later version: the public way.
            provider = trace._TRACER_PROVIDER if _READABLE else trace.get_tracer_provider()
            if provider is not self._provider:
                self._use(provider)
        return self._tracer

    def _use(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        placeholder = provider is None or isinstance(provider, trace.ProxyTracerProvider | NoOpTracerProvider)
        self._tracer = None
        if provider is not None and not placeholder:
            try:
                tracer = provider.get_tracer(SCOPE, VERSION)
            except Exception:
                # Asked again when another provider is set, not for each task.
                logger.exception("tracer provider %r gave no tracer; tasks have no spans", provider)
            else:
                # With OTEL_SDK_DISABLED=true the SDK gives these.
                self._tracer = None if isinstance(tracer, NoOpTracer) else tracer

    def watch(self, source: MetricsSource) -> None:
        """Let the observable instruments read ``source`` from now on."""
        if self._metrics is None:
            # Where the environment names a provider, it is this call that loads it.
            trace.get_tracer_provider()
            self._metrics = _instruments_of(self._meter_provider)
            self._unwatch = self._metrics.watch(source)
            self._source = ref(source)

    def metered(self) -> bool:
        """True where a task's duration would be recorded by somebody."""
        if self._meter_provider is not None:
            return not isinstance(self._meter_provider, NoOpMeterProvider)
        # As for the tracer; the placeholder of metrics has no public name at all.
        return _METERS_READABLE and metrics_internal._METER_PROVIDER is not None

    def record(
        self,
        name: str,
        group: str,
        outcome: Outcome,
        error: BaseException | None,
        seconds: float,
        span: Span | None,
    ) -> None:
        """Record one ended task in ``otel_tasks.task.duration``."""
        if self._metrics is None:
            return
        attributes = {
            TASK_NAME: low_cardinality(name),
            GROUP_NAME: low_cardinality(group),
            TASK_OUTCOME: str(outcome),
        }
        if error is not None:
            attributes[ERROR_TYPE] = str(outcome) if outcome is Outcome.TIMEOUT else error_type(error)
        # The done-callback runs in nobody's context; the span in it makes an exemplar of the sample.
        context = None if span is None else trace.set_span_in_context(span, otel_context.Context())
        self._metrics.duration.record(seconds, attributes, context)

    def record_queue(self, group: str, priority: int, seconds: float) -> None:
        """Record in ``otel_tasks.task.queue.duration`` how long a task waited for its place."""
        if self._metrics is not None:
            attributes: dict[str, str | int] = {
                GROUP_NAME: low_cardinality(group),
                TASK_PRIORITY: priority,
            }
            self._metrics.queue_duration.record(seconds, attributes)


class GroupSpan(NamedTuple):
    """The span of a scoped group, and the span that was current around its block."""

    span: Span
    around: Span

    def parent(self) -> Span | None:
        """The group's span for work that the block itself starts; None below any other span.

        It is not current in the block: making it so would mean a token to detach, possibly in
        another context, and what the block does itself is not the group's.
        """
        return self.span if trace.get_current_span() is self.around else None


def start_group_span(
    tracer: Tracer, name: str, attributes: Mapping[str, Any], outer: GroupSpan | None
) -> GroupSpan:
    """Start the span of a scoped group; below ``outer``, the span of a group around it."""
    around = trace.get_current_span()
    span = contextvars.copy_context().run(
        start_span, tracer, name, attributes, parent=None if outer is None else outer.parent(), detached=False
    )
    return GroupSpan(span, around)


def start_span(
    tracer: Tracer,
    name: str,
    attributes: Mapping[str, Any],
    *,
    parent: Span | None,
    detached: bool,
    start_time: int | None = None,
) -> Span:
    """Start a span and make it current in the context that this runs in.

    To be called by ``contextvars.Context.run`` in the context made for the task: nothing is
    ever detached, the context ends with its task.

    Args:
        tracer: Where from.
        name: The span's name, of low cardinality.
        attributes: What samplers may ask for.
        parent: The parent; None is the current span.
        detached: Begin a new trace, with a link to the span that would have been the parent, or to the
            one that ``link_restart`` has named.
        start_time: Nanoseconds since the epoch; None is now.
    """
    surroundings = otel_context.get_current()
    if parent is not None:
        surroundings = trace.set_span_in_context(parent, surroundings)
    links = None
    if detached:
        links = _links_of_detached(surroundings)
        # The predecessor is the task's own, and none of what the task starts in its turn.
        surroundings = otel_context.set_value(_PREDECESSOR, None, surroundings)
        surroundings = trace.set_span_in_context(INVALID_SPAN, surroundings)
    span = tracer.start_span(
        name,
        surroundings,
        attributes=attributes,
        links=links,
        start_time=start_time,
        record_exception=False,
        set_status_on_exception=False,
    )
    otel_context.attach(trace.set_span_in_context(span, surroundings))
    return span


def _links_of_detached(surroundings: otel_context.Context) -> list[Link] | None:
    predecessor = otel_context.get_value(_PREDECESSOR, surroundings)
    if isinstance(predecessor, SpanContext):
        return [Link(predecessor, {LINK: "restart_of"})]
    creator = trace.get_current_span(surroundings).get_span_context()
    return [Link(creator, {LINK: "spawned_by"})] if creator.is_valid else None


def link_restart(context: contextvars.Context, predecessor: Span) -> None:
    """Let the next detached span that begins in ``context`` link to the one that it takes the place of."""

    def note() -> None:
        otel_context.attach(otel_context.set_value(_PREDECESSOR, predecessor.get_span_context()))

    context.run(note)


def note_cancel_requested(span: Span, cause: CancelCause) -> None:
    """Mark the moment at which a cancellation was asked for."""
    if span.is_recording():
        span.add_event(CANCEL_REQUESTED, {CANCEL_REASON: str(cause.kind)})


def note_started(span: Span) -> None:
    """Mark the moment at which a task that had to wait got its place."""
    if span.is_recording():
        span.add_event(STARTED)


def end_span(
    span: Span,
    outcome: Outcome,
    error: BaseException | None,
    cause: CancelCause | None,
    *,
    ignored: bool = False,
    now: float = 0.0,
    queued: float | None = None,
) -> None:
    """Write the end of a task onto its span, and end it; a span that has ended is left alone.

    Args:
        span: The task's span.
        outcome: How the task ended.
        error: What it raised.
        cause: Why it was cancelled, if it was.
        ignored: It was cancelled and completed all the same.
        now: Seconds on the loop's clock, for how long the cancellation took.
        queued: Seconds for which it waited for a place.
    """
    if not span.is_recording():
        return
    attributes: dict[str, Any] = {TASK_OUTCOME: str(outcome)}
    if cause is not None:
        _describe_cancel(span, attributes, cause, now)
    if ignored:
        attributes[CANCEL_IGNORED] = True
    if queued is not None:
        attributes[QUEUE_DURATION] = queued
    raised = error if outcome is _ERROR else None
    if outcome in _ERRONEOUS:
        attributes[ERROR_TYPE] = str(outcome) if raised is None else error_type(raised)
        description = str(outcome) if error is None else text_of(error)
        span.set_status(StatusCode.ERROR, description[:_DESCRIPTION_LIMIT])
    span.set_attributes(attributes)
    try:
        if raised is not None:
            span.record_exception(raised)
    finally:
        # The SDK asks the exception for its text, which may be broken.
        span.end()


def end_group_span(span: Span, cause: CancelCause | None) -> None:
    """End the span of a scoped group; what cancelled it stands on it, what failed on the tasks'."""
    if cause is not None:
        span.set_attributes(
            {CANCEL_REASON: str(cause.kind), **({CANCEL_MESSAGE: cause.message} if cause.message else {})}
        )
        _link(span, cause)
    span.end()


def _describe_cancel(span: Span, attributes: dict[str, Any], cause: CancelCause, now: float) -> None:
    attributes[CANCEL_REASON] = str(cause.kind)
    if cause.message:
        attributes[CANCEL_MESSAGE] = cause.message
    if cause.at is not None:
        attributes[CANCEL_DURATION] = max(0.0, now - cause.at)
    _link(span, cause)


def _link(span: Span, cause: CancelCause) -> None:
    # A task may cancel its own group: it then is its own cause.
    if cause.origin is not None and cause.origin.span_id != span.get_span_context().span_id:
        span.add_link(cause.origin, {LINK: "cancelled_by"})


def span_ids(span: Span | None) -> tuple[str | None, str | None]:
    """Give a span's trace id and span id in hex, as tracing back-ends show them."""
    return ids_in_hex(None if span is None else span.get_span_context())


def ids_in_hex(span: SpanContext | None) -> tuple[str | None, str | None]:
    """Give trace id and span id in hex."""
    return (None, None) if span is None else (f"{span.trace_id:032x}", f"{span.span_id:016x}")
