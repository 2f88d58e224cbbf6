"""Spans and metrics: the only package that imports OpenTelemetry.

The library reports through the API package alone and never configures an SDK. Without an SDK (the global
provider is still OpenTelemetry's placeholder), it does no span work.

Providers, tracers, spans, meters, and instruments are foreign code. A provider may be unhashable, not weakly
referenceable, a proxy, or replaced later, and any call may raise. None of this breaks an application: the
error is logged once and the report is dropped. A function that may raise says so, and its caller logs the
error; every other function logs it itself (``errors.log_otel_error``).
"""

from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import Span, SpanContext, Tracer, TracerProvider

from otel_tasks._core.telemetry.context import (
    current_span_context,
    ids_in_hex,
    quiet_context,
    span_context,
    span_from_hex,
    span_ids,
)
from otel_tasks._core.telemetry.conventions import (
    CODE_FUNCTION,
    TASK_ATTEMPT,
    TASK_ID,
    TASK_PRIORITY,
    VERSION,
    error_type,
    group_attributes,
    low_cardinality,
)
from otel_tasks._core.telemetry.providers import Providers, Telemetry, set_default_providers
from otel_tasks._core.telemetry.request import annotate_request, note_disconnect, route_in
from otel_tasks._core.telemetry.spans import (
    GroupSpan,
    end_group_span,
    end_span,
    link_next,
    note_cancel_requested,
    note_retry,
    note_started,
    prepare_attempts,
    start_group_span,
    start_span,
)

# Everything that the rest of the package needs, OpenTelemetry's own types included.
__all__ = [
    "CODE_FUNCTION",
    "TASK_ATTEMPT",
    "TASK_ID",
    "TASK_PRIORITY",
    "VERSION",
    "GroupSpan",
    "MeterProvider",
    "Providers",
    "Span",
    "SpanContext",
    "Telemetry",
    "Tracer",
    "TracerProvider",
    "annotate_request",
    "current_span_context",
    "end_group_span",
    "end_span",
    "error_type",
    "group_attributes",
    "ids_in_hex",
    "link_next",
    "low_cardinality",
    "note_cancel_requested",
    "note_disconnect",
    "note_retry",
    "note_started",
    "prepare_attempts",
    "quiet_context",
    "route_in",
    "set_default_providers",
    "span_context",
    "span_from_hex",
    "span_ids",
    "start_group_span",
    "start_span",
]
