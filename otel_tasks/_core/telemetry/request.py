"""The server span of a request, which is not the library's: what is read from it and written to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from otel_tasks._core.telemetry.context import current_span_in
from otel_tasks._core.telemetry.conventions import (
    CANCEL_COUNT,
    CLIENT_DISCONNECT,
    REQUEST_CLOSE_CODE,
    REQUEST_HANDLER,
    REQUEST_OUTCOME,
)
from otel_tasks._core.telemetry.errors import log_otel_error

if TYPE_CHECKING:
    from contextvars import Context


def annotate_request(
    context: Context, outcome: str, cancelled: int, handler: str, close_code: int | None
) -> None:
    """Write how the client left, and what became of the request's work, to the current span of ``context``.

    Args:
        context: The request's.
        outcome: ``client_disconnect``, or how its WebSocket was closed.
        cancelled: The number of its tasks that were cancelled.
        handler: What the handler did: ``cancelled``, ``ran_on``, or ``finished``.
        close_code: The WebSocket's; None for HTTP.
    """
    attributes: dict[str, str | int] = {
        REQUEST_OUTCOME: outcome,
        REQUEST_HANDLER: handler,
        CANCEL_COUNT: cancelled,
    }
    if close_code is not None:
        attributes[REQUEST_CLOSE_CODE] = close_code
    try:
        current_span_in(context).set_attributes(attributes)
    except Exception:
        log_otel_error("writing to a request's span")


def note_disconnect(context: Context) -> None:
    """Add an event for the moment the client left to the current span of ``context``."""
    try:
        span = current_span_in(context)
        if span.is_recording():
            # New Relic's span raises for an event without attributes.
            span.add_event(CLIENT_DISCONNECT, {})
    except Exception:
        log_otel_error("writing to a request's span")


def route_in(context: Context) -> str | None:
    """Return the route template that the framework has put on the current span of ``context``, if any."""
    # The API's spans are write-only; the SDK's can be read.
    try:
        attributes: object = getattr(current_span_in(context), "attributes", None)
        route = attributes.get("http.route") if isinstance(attributes, Mapping) else None
    except Exception:
        log_otel_error("reading the route from a request's span")
        return None
    return route if isinstance(route, str) else None
