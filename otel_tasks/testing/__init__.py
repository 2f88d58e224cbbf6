"""Tools for testing code that uses this library; its own tests use them too.

``run()`` runs a coroutine on a ``VirtualClockLoop``, where sleeping costs no time, and where a test that
waits forever fails with the names of the waiting tasks. ``FakeConnection`` plays an ASGI server for one
request or WebSocket, with the quirks of real servers. ``SpanRecorder`` keeps the spans and metrics of a test
in memory and checks that each span has ended exactly once.

Only ``SpanRecorder`` needs the OpenTelemetry SDK, and imports it when you create one.
"""

from otel_tasks.testing.clock import DeadlockError, VirtualClockLoop, assert_no_tasks_left, run
from otel_tasks.testing.connection import FakeConnection
from otel_tasks.testing.spans import SpanRecorder

__all__ = [
    "DeadlockError",
    "FakeConnection",
    "SpanRecorder",
    "VirtualClockLoop",
    "assert_no_tasks_left",
    "run",
]
