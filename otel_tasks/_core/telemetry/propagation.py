"""Carries the current span to another process, as text, by the configured propagators."""

from __future__ import annotations

import contextvars
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import propagate

from otel_tasks._core.telemetry.context import current_span_context
from otel_tasks._core.telemetry.errors import log_otel_error

if TYPE_CHECKING:
    from collections.abc import Mapping


def inject(carrier: dict[str, str]) -> None:
    """Write the current span, with the baggage around it, into ``carrier``; nothing without a span."""
    if current_span_context() is None:
        return
    try:
        propagate.inject(carrier)
    except Exception:
        log_otel_error("injecting the current span into a message")


def extract(carrier: Mapping[str, str]) -> contextvars.Context:
    """Return a copy of this context in which the span that ``carrier`` names is the current one.

    Spans that start there are its children, or link to it if they start a new trace. If ``carrier`` names no
    span, none is current there: what a message causes belongs to no span of the process that receives it.
    """
    context = contextvars.copy_context()
    try:
        # Not below the current context: where `carrier` has no span, that would leave the local one.
        remote = otel_context.Context()
        if carrier:
            remote = propagate.extract(dict(carrier), remote)
        context.run(otel_context.attach, remote)
    except Exception:
        log_otel_error("extracting the remote span from a message")
    return context
