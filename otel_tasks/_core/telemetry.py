"""Spans, links and metrics of tasks: the only module that imports OpenTelemetry.

The library reports through the API package alone and never configures an SDK. Where none is
set up (the global provider is still OpenTelemetry's placeholder) no span work is done.

Providers, tracers, spans, meters and instruments are other people's code. A provider may be
unhashable, not weakly referenceable, a proxy, or replaced later, and any call may raise. None of
it breaks an application: the error is logged once and the report is dropped. Functions that may
raise say so, and their callers log; all others log here.
"""

from __future__ import annotations

import contextvars
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet, finalize, ref

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.metrics import (
    CallbackOptions,
    Histogram,
    Meter,
    MeterProvider,
    NoOpHistogram,
    NoOpMeter,
    NoOpMeterProvider,
    Observation,
)
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

from otel_tasks._core.clock import rounded
from otel_tasks._core.log import logger
from otel_tasks._core.state import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_tasks._core.cancellation import CancelCause

# What the rest of the package needs of OpenTelemetry, it takes from here.
__all__ = ["MeterProvider", "Span", "SpanContext", "Tracer", "TracerProvider", "metrics_internal", "trace"]

K = TypeVar("K")
T = TypeVar("T")

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
ORIGIN_TRACE_ID = "otel_tasks.cancel.origin.trace_id"
ORIGIN_SPAN_ID = "otel_tasks.cancel.origin.span_id"
CANCEL_IGNORED = "otel_tasks.cancel.ignored"
CANCEL_COUNT = "otel_tasks.cancel.count"
REQUEST_OUTCOME = "otel_tasks.request.outcome"
REQUEST_HANDLER = "otel_tasks.request.handler"
REQUEST_CLOSE_CODE = "otel_tasks.request.close_code"
CLIENT_DISCONNECT = "otel_tasks.client_disconnect"
ERROR_TYPE = "error.type"
LINK = "otel_tasks.link"
QUEUE_DURATION = "otel_tasks.task.queue.duration"
STARTED = "otel_tasks.started"
CANCEL_REQUESTED = "otel_tasks.cancel_requested"

# Where the context of a task that is to be started again says which span was the one before.
_PREDECESSOR = otel_context.create_key("otel_tasks.predecessor")
_READABLE = hasattr(trace, "_TRACER_PROVIDER")
_METERS_READABLE = hasattr(metrics_internal, "_METER_PROVIDER")
# The placeholder of metrics has no public name at all.
_METER_PLACEHOLDER: object = getattr(metrics_internal, "_PROXY_METER_PROVIDER", None)
_DESCRIPTION_LIMIT = 256
# New Relic's span raises for an event without.
_NO_ATTRIBUTES: Mapping[str, str] = {}
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


# What has been logged, by what was being done.
_logged: set[str] = set()


def log_once(doing: str) -> None:
    """Log the exception being handled, the first time for each thing that the library does."""
    if doing not in _logged:
        _logged.add(doing)
        logger.exception("OpenTelemetry raised while %s; further errors of this kind are not logged", doing)


def _is_a(value: object, *kinds: type) -> bool:
    """``isinstance()`` for a proxy too that raises when it stands for nothing yet."""
    try:
        return isinstance(value, kinds)
    except Exception:
        log_once("looking at a provider")
        return False


def _global_provider(ask: Callable[[], T]) -> T | None:
    """Ask OpenTelemetry for a global provider, which it loads where the environment names one."""
    try:
        return ask()
    except Exception:
        log_once("loading the provider that the environment names")
        return None


def span_context(span: Span) -> SpanContext | None:
    """Give a span's identity, None if it has none."""
    try:
        identity = span.get_span_context()
        return identity if identity.is_valid else None
    except Exception:
        log_once("reading a span's identity")
        return None


def current_span_context(context: contextvars.Context | None = None) -> SpanContext | None:
    """Give the identity of the span current in ``context`` (None: here), None if there is none."""
    try:
        # Vendors patch this function: New Relic's looks for a span of its own.
        span = trace.get_current_span() if context is None else _current_span_in(context)
    except Exception:
        log_once("looking for the current span")
        return None
    return span_context(span)


def quiet_context() -> contextvars.Context:
    """Make a context for work on nobody's behalf: no stranger's trace, and no spans of its own.

    Instrumentations wrap ``receive`` and start a span in it; below an unsampled parent it is
    dropped by every sampler that asks the parent.
    """
    context = contextvars.Context()
    parent = NonRecordingSpan(SpanContext(trace_id=1, span_id=1, is_remote=False, trace_flags=TraceFlags(0)))
    try:
        context.run(otel_context.attach, trace.set_span_in_context(parent, otel_context.Context()))
    except Exception:
        log_once("attaching a context")
    return context


def annotate_request(
    context: contextvars.Context, outcome: str, cancelled: int, handler: str, close_code: int | None
) -> None:
    """Say on the span current in ``context`` how its client left and what became of its work.

    Args:
        context: The request's.
        outcome: ``client_disconnect``, or how its WebSocket was closed.
        cancelled: How many of its tasks were cancelled.
        handler: What the handler did: ``cancelled``, ``ran_on`` or ``finished``.
        close_code: That of a WebSocket.
    """
    attributes: dict[str, str | int] = {
        REQUEST_OUTCOME: outcome,
        REQUEST_HANDLER: handler,
        CANCEL_COUNT: cancelled,
    }
    if close_code is not None:
        attributes[REQUEST_CLOSE_CODE] = close_code
    try:
        _current_span_in(context).set_attributes(attributes)
    except Exception:
        log_once("writing onto a request's span")


def note_disconnect(context: contextvars.Context) -> None:
    """Mark the moment at which the client left on the span current in ``context``."""
    try:
        span = _current_span_in(context)
        if span.is_recording():
            span.add_event(CLIENT_DISCONNECT, _NO_ATTRIBUTES)
    except Exception:
        log_once("writing onto a request's span")


def route_in(context: contextvars.Context) -> str | None:
    """The route's template, where the framework has put it on the span current in ``context``."""
    # The API's spans are write-only; the SDK's can be read.
    try:
        attributes: object = getattr(_current_span_in(context), "attributes", None)
        route = attributes.get("http.route") if isinstance(attributes, Mapping) else None
    except Exception:
        log_once("reading the route from a request's span")
        return None
    return route if isinstance(route, str) else None


def _current_span_in(context: contextvars.Context) -> Span:
    # A copy, for one that is entered already, be it by another thread, refuses.
    return context.copy().run(trace.get_current_span)


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
        meter = _meter_of(provider)
        # Weak: a provider lives as long as the process, a manager need not. Replaced and never
        # changed: the metric reader's thread may be walking it.
        self._sources: tuple[tuple[ref[MetricsSource], dict[tuple[str, str], int]], ...] = ()
        # What managers had counted that are gone, or report elsewhere: a counter never goes back.
        self._past: dict[tuple[str, str], int] = {}
        self.duration = _histogram(
            meter, "otel_tasks.task.duration", "From the creation of a task to its end."
        )
        self.queue_duration = _histogram(
            meter, QUEUE_DURATION, "From the creation of a task to the place that it had to wait for."
        )
        # Each for itself: a meter that knows no observable instruments still has histograms.
        try:
            meter.create_observable_up_down_counter(
                "otel_tasks.task.active",
                callbacks=[self._observe_active],
                unit="{task}",
                description="Tasks that are live.",
            )
        except Exception:
            log_once("creating instrument otel_tasks.task.active")
        try:
            meter.create_observable_counter(
                "otel_tasks.task.cancellations",
                callbacks=[self._observe_cancellations],
                unit="{cancellation}",
                description="Tasks that ended cancelled.",
            )
        except Exception:
            log_once("creating instrument otel_tasks.task.cancellations")

    def watch(self, source: MetricsSource, before: dict[tuple[str, str], int]) -> Callable[[], object]:
        """Read what ``source`` counts beyond ``before``; call what this gives to end it."""
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


def _meter_of(provider: MeterProvider) -> Meter:
    try:
        return provider.get_meter(SCOPE, VERSION)
    except Exception:
        log_once("asking the meter provider for a meter")
        return NoOpMeter(SCOPE)


def _histogram(meter: Meter, name: str, description: str) -> Histogram:
    """Create a histogram of seconds; one that records nothing where the meter raises."""
    try:
        return meter.create_histogram(
            name, unit="s", description=description, explicit_bucket_boundaries_advisory=_DURATION_BUCKETS
        )
    except Exception:
        log_once(f"creating instrument {name}")
        return NoOpHistogram(name)


def _add_up(totals: dict[K, int], counts: Mapping[K, int]) -> None:
    for key, count in counts.items():
        totals[key] = totals.get(key, 0) + count


def _settle(totals: dict[K, int], counts: Mapping[K, int], before: Mapping[K, int]) -> None:
    """Add up what has been counted since it was ``before``."""
    _add_up(totals, {key: count - before.get(key, 0) for key, count in counts.items()} if before else counts)


# One set of instruments for each provider, by its identity: it need not be hashable, and two that are
# equal are still two. With what gives the provider, for another may come to have the same id.
_instruments: dict[int, tuple[Callable[[], MeterProvider | None], _Instruments]] = {}
# Reentrant: a provider may create tasks, or be dropped, while it is asked for a meter.
_creating = RLock()


def _instruments_of(provider: MeterProvider) -> _Instruments:
    with _creating:
        link, instruments = _instruments.get(id(provider), (None, None))
        if link is None or instruments is None or link() is not provider:
            instruments = _Instruments(provider)
            _instruments[id(provider)] = (_link_to(provider), instruments)
        return instruments


def _link_to(provider: MeterProvider) -> Callable[[], MeterProvider | None]:
    """Refer to a provider, weakly if it lets itself; its instruments are dropped with it."""
    key = id(provider)

    def forget(link: object) -> None:
        if key in _instruments and _instruments[key][0] is link:
            _instruments.pop(key, None)

    try:
        return ref(provider, forget)
    except TypeError:
        return lambda: provider


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
        # OpenTelemetry's placeholders stand for the global providers.
        self._own = Providers(
            None if _is_a(tracer_provider, trace.ProxyTracerProvider) else tracer_provider,
            None if meter_provider is _METER_PLACEHOLDER else meter_provider,
        )
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        self._meter_provider: MeterProvider | None = None
        self._metrics: _Instruments | None = None
        self._source: ref[MetricsSource] | None = None
        # What the source had counted while it reported elsewhere: that stays there.
        self._before: dict[tuple[str, str], int] = {}
        self._unwatch: Callable[[], object] | None = None
        self.follow_default()
        _everyone.add(self)

    def follow_default(self) -> None:
        """Report to the providers that the manager was given, and where it was given none, to the default."""
        chosen = _default.tracer if self._own.tracer is None else self._own.tracer
        self._injected = chosen is not None
        self._use(chosen)
        meter = _default.meter if self._own.meter is None else self._own.meter
        self._follows_meters = meter is None and _METERS_READABLE
        # It reports where OpenTelemetry's two globals say, and nowhere while they say nothing: to be
        # seen without a call, of which one at each end of a task costs 2 % of it.
        self.is_global = _READABLE and _METERS_READABLE and chosen is None and meter is None
        source = None if self._source is None else self._source()
        if source is not None:
            self._before = source.cancelled_by.copy()
        self._measure_with(meter)

    def tracer(self) -> Tracer | None:
        """Give the tracer, None where no SDK is set up."""
        if not self._injected:
            # The public get_tracer_provider() reads os.environ each time (1.2 us, half a task);
            # this is the name that it reads. Absent in a later version: the public way.
            provider = trace._TRACER_PROVIDER if _READABLE else _global_provider(trace.get_tracer_provider)
            if provider is not self._provider:
                self._use(provider)
                # Who sets up the one sets up the other: its gauges show tasks that have not ended, too.
                self.metered()
        return self._tracer

    def _use(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = None
        if provider is None or _is_a(provider, trace.ProxyTracerProvider, NoOpTracerProvider):
            return
        try:
            tracer = provider.get_tracer(SCOPE, VERSION)
        except Exception:
            # Asked again when another provider is set, not for each task.
            log_once("asking the tracer provider for a tracer")
        else:
            # With OTEL_SDK_DISABLED=true the SDK gives these.
            self._tracer = None if _is_a(tracer, NoOpTracer) else tracer

    def watch(self, source: MetricsSource) -> None:
        """Let the observable instruments read ``source`` from now on."""
        if self._source is not None:
            return
        self._source = ref(source)
        # Where the environment names providers, it is these calls that load them.
        _global_provider(trace.get_tracer_provider)
        current = _global_provider(metrics.get_meter_provider)
        if self._meter_provider is None and not _METERS_READABLE:
            self._measure_with(current)
        elif not self.metered():
            self._measure_with(self._meter_provider)

    def metered(self) -> bool:
        """True where somebody would record a task's duration."""
        if self._follows_meters and metrics_internal._METER_PROVIDER is not self._meter_provider:
            self._measure_with(metrics_internal._METER_PROVIDER)
        return self._metrics is not None

    def _measure_with(self, provider: MeterProvider | None) -> None:
        """Let the instruments of this provider read the source, and those of the last no more."""
        self._meter_provider = provider
        source = None if self._source is None else self._source()
        if self._unwatch is not None:
            self._unwatch()
            if source is not None:
                self._before = source.cancelled_by.copy()
        self._unwatch = self._metrics = None
        if source is not None and provider is not None and not _is_a(provider, NoOpMeterProvider):
            self._metrics = _instruments_of(provider)
            self._unwatch = self._metrics.watch(source, self._before)

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
    try:
        otel_context.attach(trace.set_span_in_context(span, surroundings))
    except Exception:
        # Nobody else knows of it.
        span.end()
        raise
    return span


def _links_of_detached(surroundings: otel_context.Context) -> list[Link] | None:
    predecessor = otel_context.get_value(_PREDECESSOR, surroundings)
    if isinstance(predecessor, SpanContext):
        return [Link(predecessor, {LINK: "restart_of"})]
    creator = span_context(trace.get_current_span(surroundings))
    return None if creator is None else [Link(creator, {LINK: "spawned_by"})]


def link_restart(context: contextvars.Context, predecessor: Span) -> None:
    """Let the next span in ``context`` that begins a new trace link to the one that it takes the place of."""

    def note() -> None:
        otel_context.attach(otel_context.set_value(_PREDECESSOR, span_context(predecessor)))

    try:
        context.run(note)
    except Exception:
        log_once("attaching a context")


def note_cancel_requested(span: Span, cause: CancelCause) -> None:
    """Mark the moment at which a cancellation was asked for."""
    try:
        if span.is_recording():
            span.add_event(CANCEL_REQUESTED, {CANCEL_REASON: str(cause.kind)})
    except Exception:
        log_once("adding an event to a task's span")


def note_started(span: Span) -> None:
    """Mark the moment at which a task that had to wait got its place."""
    try:
        if span.is_recording():
            span.add_event(STARTED, _NO_ATTRIBUTES)
    except Exception:
        log_once("adding an event to a task's span")


def end_span(
    span: Span,
    outcome: Outcome,
    error: BaseException | None,
    cause: CancelCause | None,
    *,
    ignored: bool = False,
    now: float = 0.0,
    queued: float | None = None,
) -> SpanContext | None:
    """Write the end of a task onto its span, and end it; a span that has ended is left alone.

    Args:
        span: The task's span.
        outcome: How the task ended.
        error: What it raised.
        cause: Why it was cancelled, if it was.
        ignored: It was cancelled and completed all the same.
        now: Seconds on the clock of ``cause.at``, for how long the cancellation took.
        queued: Seconds for which it waited for a place.

    Returns:
        The span's identity.

    Raises:
        Exception: The span's own, from the first call that failed. What was still to be written is dropped,
            the least important last; the span is ended.
    """
    recording = True
    try:
        recording = span.is_recording()
        if recording:
            attributes: dict[str, Any] = {TASK_OUTCOME: str(outcome)}
            if cause is not None:
                _describe_cancel(attributes, cause, now)
            if ignored:
                attributes[CANCEL_IGNORED] = True
            if queued is not None:
                attributes[QUEUE_DURATION] = rounded(queued)
            if outcome in _ERRONEOUS:
                _describe_error(span, attributes, outcome, error)
            span.set_attributes(attributes)
            if cause is not None:
                _link(span, cause)
            if outcome is _ERROR and error is not None:
                # Last: the SDK asks the exception for its text, which may be broken.
                span.record_exception(error)
        return span.get_span_context()
    finally:
        if recording:
            span.end()


def _describe_error(
    span: Span, attributes: dict[str, Any], outcome: Outcome, error: BaseException | None
) -> None:
    raised = error if outcome is _ERROR else None
    attributes[ERROR_TYPE] = str(outcome) if raised is None else error_type(raised)
    description = str(outcome) if error is None else text_of(error)
    span.set_status(StatusCode.ERROR, description[:_DESCRIPTION_LIMIT])


def end_group_span(span: Span, cause: CancelCause | None) -> None:
    """End the span of a scoped group; what cancelled it stands on it, what failed on the tasks'."""
    try:
        if cause is not None:
            span.set_attributes(
                {CANCEL_REASON: str(cause.kind), **({CANCEL_MESSAGE: cause.message} if cause.message else {})}
            )
            _link(span, cause)
    finally:
        span.end()


def _describe_cancel(attributes: dict[str, Any], cause: CancelCause, now: float) -> None:
    attributes[CANCEL_REASON] = str(cause.kind)
    if cause.message:
        attributes[CANCEL_MESSAGE] = cause.message
    if cause.at is not None:
        attributes[CANCEL_DURATION] = rounded(max(0.0, now - cause.at))


def _link(span: Span, cause: CancelCause) -> None:
    # A task may cancel its own group: it then is its own cause.
    if cause.origin is None or cause.origin.span_id == span.get_span_context().span_id:
        return
    add_link = getattr(span, "add_link", None)
    if add_link is None or getattr(add_link, "__func__", None) is Span.add_link:
        # Datadog's takes links at its start alone, and the API's own method only warns of it.
        trace_id, span_id = ids_in_hex(cause.origin)
        span.set_attributes({ORIGIN_TRACE_ID: str(trace_id), ORIGIN_SPAN_ID: str(span_id)})
    else:
        add_link(cause.origin, {LINK: "cancelled_by"})


def span_ids(span: Span | None) -> tuple[str | None, str | None]:
    """Give a span's trace id and span id in hex, as tracing back-ends show them."""
    return (None, None) if span is None else ids_in_hex(span_context(span))


def ids_in_hex(span: SpanContext | None) -> tuple[str | None, str | None]:
    """Give trace id and span id in hex; None for a span that has no identity."""
    try:
        if span is None or not span.is_valid:
            return None, None
        return f"{span.trace_id:032x}", f"{span.span_id:016x}"
    except Exception:
        log_once("reading a span's identity")
        return None, None
