"""The current span: in this context, in another one, and in none."""

from __future__ import annotations

import contextvars

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags

from otel_tasks._core.telemetry.errors import log_otel_error


def current_span_context(context: contextvars.Context | None = None) -> SpanContext | None:
    """Return the identity of the current span of ``context`` (None: this one); None without a span."""
    try:
        # Vendors patch this function: New Relic's looks for a span of its own.
        span = trace.get_current_span() if context is None else current_span_in(context)
    except Exception:
        log_otel_error("looking for the current span")
        return None
    return span_context(span)


def current_span_in(context: contextvars.Context) -> Span:
    """Return the current span of ``context``.

    Raises:
        Exception: OpenTelemetry's own.
    """
    # In a copy: a context that is entered already, even by another thread, refuses to run anything.
    return context.copy().run(trace.get_current_span)


def span_context(span: Span) -> SpanContext | None:
    """Return a span's identity; None if it has none."""
    try:
        identity = span.get_span_context()
        return identity if identity.is_valid else None
    except Exception:
        log_otel_error("reading a span's identity")
        return None


def span_ids(span: Span | None) -> tuple[str | None, str | None]:
    """Return a span's trace id and span id in hex, as tracing back ends show them."""
    return (None, None) if span is None else ids_in_hex(span_context(span))


def ids_in_hex(span: SpanContext | None) -> tuple[str | None, str | None]:
    """Return trace id and span id in hex; None for a span without an identity."""
    try:
        if span is None or not span.is_valid:
            return None, None
        return f"{span.trace_id:032x}", f"{span.span_id:016x}"
    except Exception:
        log_otel_error("reading a span's identity")
        return None, None


def span_from_hex(trace_id: str | None, span_id: str | None) -> SpanContext | None:
    """Return the identity of a span of another process; None unless both ids are valid, in hex."""
    if not trace_id or not span_id:
        return None
    try:
        span = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True)
        return span if span.is_valid else None
    except ValueError:
        return None


def quiet_context() -> contextvars.Context:
    """Create a context for work that no request caused: it has no foreign trace and starts no spans.

    Instrumentations wrap ``receive`` and start a span in it. Below an unsampled parent, every sampler that
    asks the parent drops that span.
    """
    context = contextvars.Context()
    parent = NonRecordingSpan(SpanContext(trace_id=1, span_id=1, is_remote=False, trace_flags=TraceFlags(0)))
    try:
        context.run(otel_context.attach, trace.set_span_in_context(parent, otel_context.Context()))
    except Exception:
        log_otel_error("attaching a context")
    return context
