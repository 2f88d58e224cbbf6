"""Cancellation for code outside a manager: causes, one-way events, and waiting that ends with an event."""

from otel_tasks._core.cancellation import WaitOutcome, propagate_cancellation, wait_with_cancellation
from otel_tasks._core.events import CancelCause, CancelEvent

__all__ = [
    "CancelCause",
    "CancelEvent",
    "WaitOutcome",
    "propagate_cancellation",
    "wait_with_cancellation",
]
