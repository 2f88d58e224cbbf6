"""The spans of tasks and of scoped groups: one start, one end, and what stands on them.

A span is made current in the context that ends with its task, so no token is ever detached.
"""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanContext, StatusCode, Tracer

from otel_tasks._core.clock import rounded
from otel_tasks._core.log import text_of
from otel_tasks._core.state import Outcome
from otel_tasks._core.telemetry.context import ids_in_hex, span_context
from otel_tasks._core.telemetry.conventions import (
    CANCEL_DURATION,
    CANCEL_IGNORED,
    CANCEL_MESSAGE,
    CANCEL_REASON,
    CANCEL_REQUESTED,
    ERROR_TYPE,
    LINK,
    ORIGIN_SPAN_ID,
    ORIGIN_TRACE_ID,
    QUEUE_DURATION,
    RETRY,
    RETRY_DELAY,
    STARTED,
    TASK_ATTEMPT,
    TASK_OUTCOME,
    error_type,
)
from otel_tasks._core.telemetry.errors import log_otel_error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from otel_tasks._core.state import CancelKind

# By name: before Python 3.12, reading a member of an enumeration takes as long as calling a method.
_SUCCESS, _ERROR = Outcome.SUCCESS, Outcome.ERROR
_ERRONEOUS = (Outcome.ERROR, Outcome.TIMEOUT, Outcome.ABANDONED)

# In the context of a service's next attempt, or of the next periodic run: the span of the previous one, and
# its relation to that.
_PREDECESSOR = otel_context.create_key("otel_tasks.predecessor")
# In the context of a service's next attempt: _NEXT. In that of the attempt: _RUNNING; each task that it
# starts has a trace of its own. Below such a task: None.
_SERVICE = otel_context.create_key("otel_tasks.service")
_NEXT = "next"
_RUNNING = "running"
_DESCRIPTION_LIMIT = 256


class Cause(Protocol):
    """What a span says of a ``CancelCause``."""

    @property
    def kind(self) -> CancelKind:
        """Why."""
        ...

    @property
    def message(self) -> str | None:
        """The requester's message."""
        ...

    @property
    def at(self) -> float | None:
        """The time of the request."""
        ...

    @property
    def origin(self) -> SpanContext | None:
        """The span that caused it."""
        ...


# -- start ---------------------------------------------------------------------------


def start_span(
    tracer: Tracer,
    name: str,
    attributes: Mapping[str, Any],
    *,
    parent: Span | None,
    new_trace: bool | None,
    start_time: int | None = None,
) -> Span:
    """Start a span and make it current in the context that this runs in.

    Call it by ``contextvars.Context.run`` in the context made for the task: nothing is ever detached, because
    that context ends with its task.

    Args:
        tracer: The manager's.
        name: The span's name, of low cardinality.
        attributes: The attributes that samplers may read.
        parent: The parent; None is the current span.
        new_trace: Start a new trace, with a link to the span that would have been the parent, or to the one
            that ``link_next`` has set. None: only what an attempt of a service starts outside of a group
            with a span, because the attempt's own trace may have no end.
        start_time: Nanoseconds since the epoch; None is now.

    Raises:
        Exception: The tracer's or the context's own.
    """
    surroundings = otel_context.get_current()
    if parent is not None:
        surroundings = trace.set_span_in_context(parent, surroundings)
    links = None
    if _SERVICE in surroundings:
        service = otel_context.get_value(_SERVICE, surroundings)
        if new_trace is None:
            new_trace = service is not None and parent is None
        surroundings = otel_context.set_value(_SERVICE, _RUNNING if service is _NEXT else None, surroundings)
    if new_trace:
        links = _links_of_root(surroundings)
        # Only the task itself has the predecessor, not what it starts in turn.
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
        # Only this frame knows the span.
        span.end()
        raise
    return span


def _links_of_root(surroundings: otel_context.Context) -> list[Link] | None:
    predecessor: Any = otel_context.get_value(_PREDECESSOR, surroundings)
    if predecessor is not None:
        span, relation = predecessor
        return [Link(span, {LINK: relation})]
    creator = span_context(trace.get_current_span(surroundings))
    return None if creator is None else [Link(creator, {LINK: "spawned_by"})]


def prepare_attempts(context: contextvars.Context) -> None:
    """Let a task that starts in a copy of ``context`` give each task that it starts a trace of its own."""
    _set_in(context, _SERVICE, _NEXT)


def link_next(context: contextvars.Context, predecessor: Span, relation: str) -> None:
    """Let the next span that starts a new trace in ``context`` link to the span before it."""
    identity = span_context(predecessor)
    _set_in(context, _PREDECESSOR, None if identity is None else (identity, relation))


def make_current(context: contextvars.Context, span: Span) -> None:
    """Make a span, which may have ended, the current one of ``context``."""
    _attach_in(context, lambda: trace.set_span_in_context(span))


def _set_in(context: contextvars.Context, key: str, value: object) -> None:
    _attach_in(context, lambda: otel_context.set_value(key, value))


def _attach_in(context: contextvars.Context, make: Callable[[], otel_context.Context]) -> None:
    def attach() -> None:
        otel_context.attach(make())

    try:
        context.run(attach)
    except Exception:
        log_otel_error("attaching a context")


# -- events ---------------------------------------------------------------------------


def note_cancel_requested(span: Span, cause: Cause) -> None:
    """Add an event for the moment of a cancel request."""
    _add_event(span, CANCEL_REQUESTED, {CANCEL_REASON: str(cause.kind)})


def note_started(span: Span) -> None:
    """Add an event for the moment a queued task got its place."""
    # New Relic's span raises for an event without attributes.
    _add_event(span, STARTED, {})


def note_retry(span: Span, attempt: int, delay: float, error: str) -> None:
    """Add an event for a failed attempt that another one follows.

    Args:
        span: The task's span.
        attempt: The number of the failed attempt.
        delay: Seconds until the next one.
        error: The type of the failure.
    """
    _add_event(span, RETRY, {TASK_ATTEMPT: attempt, RETRY_DELAY: rounded(delay), ERROR_TYPE: error})


def _add_event(span: Span, name: str, attributes: Mapping[str, str | int | float]) -> None:
    try:
        if span.is_recording():
            span.add_event(name, attributes)
    except Exception:
        log_otel_error("adding an event to a task's span")


# -- end ---------------------------------------------------------------------------


def end_span(
    span: Span,
    outcome: Outcome,
    error: BaseException | None,
    cause: Cause | None,
    *,
    ignored: bool = False,
    now: float = 0.0,
    queued: float | None = None,
) -> SpanContext | None:
    """Write the end of a task to its span, and end the span; one that has ended is left alone.

    Args:
        span: The task's span.
        outcome: How the task ended.
        error: What it raised.
        cause: Why it was cancelled, if it was.
        ignored: It was cancelled and completed anyway.
        now: Seconds on the clock of ``cause.at``, for the duration of the cancellation.
        queued: Seconds for which it waited for a place.

    Returns:
        The span's identity.

    Raises:
        Exception: The span's own, from the first call that failed. The remaining writes are dropped; the
            least important one comes last. The span is ended.
    """
    recording = True
    try:
        recording = span.is_recording()
        if recording:
            # By itself, because the SDK takes one attribute at half the price of a dictionary with one.
            span.set_attribute(TASK_OUTCOME, str(outcome))
            if outcome is not _SUCCESS or cause is not None or queued is not None:
                _describe_end(span, outcome, error, cause, ignored=ignored, now=now, queued=queued)
        return span.get_span_context()
    finally:
        if recording:
            span.end()


def _describe_end(
    span: Span,
    outcome: Outcome,
    error: BaseException | None,
    cause: Cause | None,
    *,
    ignored: bool,
    now: float,
    queued: float | None,
) -> None:
    attributes: dict[str, Any] = {}
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
        _name_origin(span, cause)
    if outcome is _ERROR and error is not None:
        # Last: the SDK asks the exception for its text, which may raise.
        span.record_exception(error)


def _describe_cancel(attributes: dict[str, Any], cause: Cause, now: float) -> None:
    attributes[CANCEL_REASON] = str(cause.kind)
    if cause.message:
        attributes[CANCEL_MESSAGE] = cause.message
    if cause.at is not None:
        attributes[CANCEL_DURATION] = rounded(max(0.0, now - cause.at))


def _describe_error(
    span: Span, attributes: dict[str, Any], outcome: Outcome, error: BaseException | None
) -> None:
    raised = error if outcome is _ERROR else None
    attributes[ERROR_TYPE] = str(outcome) if raised is None else error_type(raised)
    description = str(outcome) if error is None else text_of(error)[:_DESCRIPTION_LIMIT]
    # A lone surrogate, as in the name of a file that is not UTF-8, would cost the exporter its whole batch.
    span.set_status(StatusCode.ERROR, description.encode("utf-8", "replace").decode())


def _name_origin(span: Span, cause: Cause) -> None:
    """Name the span that caused a cancellation: by a link, or by attributes where a link would be lost."""
    origin = cause.origin
    # A task may cancel its own group: then it is its own origin.
    if origin is None or _is_same(origin, span.get_span_context()):
        return
    # Jaeger shows no link to a span's parent: the link only turns the parent reference into FOLLOWS_FROM
    # (makeJaegerProtoReferences in opentelemetry-collector-contrib/pkg/translator/jaeger). It would be the
    # most common link: a disconnect's origin is the request's span, the parent of the request's tasks.
    if _is_same(origin, getattr(span, "parent", None)) or not _takes_links(span):
        trace_id, span_id = ids_in_hex(origin)
        span.set_attributes({ORIGIN_TRACE_ID: str(trace_id), ORIGIN_SPAN_ID: str(span_id)})
    else:
        span.add_link(origin, {LINK: "cancelled_by"})


def _is_same(origin: SpanContext, other: object) -> bool:
    # The API's spans have no parent, and that of another SDK's may be of any type.
    return origin.span_id == getattr(other, "span_id", None) and origin.trace_id == getattr(
        other, "trace_id", None
    )


def _takes_links(span: Span) -> bool:
    """Datadog's span takes links only at its start, and the API's own method only warns of that."""
    add_link = getattr(span, "add_link", None)
    return add_link is not None and getattr(add_link, "__func__", None) is not Span.add_link


# -- scoped groups ---------------------------------------------------------------------------


class GroupSpan(NamedTuple):
    """The span of a scoped group, and the span that was current around its block."""

    span: Span
    around: Span

    def parent(self) -> Span | None:
        """The group's span for tasks that the block itself starts; None below any other span.

        The span is not current in the block: that would need a token to detach, possibly in another context,
        and what the block itself does is not work of the group.
        """
        return self.span if trace.get_current_span() is self.around else None


def start_group_span(
    tracer: Tracer, name: str, attributes: Mapping[str, Any], outer: GroupSpan | None
) -> GroupSpan:
    """Start the span of a scoped group, below ``outer``, the span of the group around it."""
    around = trace.get_current_span()
    span = contextvars.copy_context().run(
        start_span,
        tracer,
        name,
        attributes,
        parent=None if outer is None else outer.parent(),
        new_trace=False,
    )
    return GroupSpan(span, around)


def end_group_span(span: Span, cause: Cause | None) -> None:
    """End the span of a scoped group: it has the group's cause; errors are on the spans of its tasks.

    Raises:
        Exception: The span's own; the span is ended.
    """
    try:
        if cause is not None and span.is_recording():
            message = {CANCEL_MESSAGE: cause.message} if cause.message else {}
            span.set_attributes({CANCEL_REASON: str(cause.kind), **message})
            _name_origin(span, cause)
    finally:
        span.end()
