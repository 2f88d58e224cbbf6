"""Shared by the served applications: a journal of events for the tests, and ways to wait for them.

What happens in a request is written to the file named by `E2E_JOURNAL`, one JSON line per event: it can be
read while the server is busy, and after it has ended. A handler waits until the test lets it go on
(`POST /release/{key}`), never for a span of time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace import format_trace_id

from otel_tasks import TaskManager, current_task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.middleware.base import RequestResponseEndpoint
    from starlette.requests import Request
    from starlette.responses import Response

# Servers give only their own loggers a handler; what asyncio, OpenTelemetry and the library log must
# reach the log that the tests read as well.
logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def _end_with_the_tests() -> None:
    """End the server and its workers, one process group, when the tests that started it are gone."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=_end_with_the_tests, daemon=True).start()

PATIENCE = 60.0
"""Seconds that a handler waits to be let go on, so that a failed test leaves no request behind."""

manager = TaskManager("e2e")

# --- the journal ---------------------------------------------------------------------------------

_journal = os.open(os.environ["E2E_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def note(key: str, what: str, **details: object) -> None:
    """Write one event to the journal; one `write` call, so that lines never mix."""
    os.write(_journal, (json.dumps({"key": key, "what": what, **details}) + "\n").encode())


def note_trace(key: str) -> None:
    """Note the id of the current trace: FastAPI's span of a WebSocket has no path to find it by."""
    note(key, "trace", id=format_trace_id(trace.get_current_span().get_span_context().trace_id))


@contextlib.contextmanager
def noted(key: str, what: str = "handler") -> Iterator[None]:
    """Note how a block of a handler begins and how it ends."""
    note(key, f"{what} entered")
    try:
        yield
    except asyncio.CancelledError:
        note(key, f"{what} cancelled")
        raise
    except BaseException as exc:
        note(key, f"{what} raised", error=type(exc).__name__)
        raise
    else:
        note(key, f"{what} returned")


_releases: dict[str, asyncio.Event] = {}


def release_of(key: str) -> asyncio.Event:
    """The event that lets `key` go on."""
    return _releases.setdefault(key, asyncio.Event())


def release_all(prefix: str) -> None:
    """Let go on all that waits for a key which begins with `prefix`."""
    for key, event in _releases.items():
        if key.startswith(prefix):
            event.set()


async def released(key: str) -> None:
    """Wait until the test says that `key` may go on."""
    async with asyncio.timeout(PATIENCE):
        await release_of(key).wait()


async def work(key: str, name: str) -> str:
    """A task that works until it is cancelled (or let go on), and notes by what."""
    note(key, "task started", task=name)
    try:
        await released(key)
    except asyncio.CancelledError:
        task = current_task()
        cause = task.cause if task is not None else None
        note(
            key,
            "task cancelled",
            task=name,
            kind=str(cause.kind) if cause is not None else None,
            message=cause.message if cause is not None else None,
            asked_by=cause.asked_by if cause is not None else None,
        )
        raise
    note(key, "task completed", task=name)
    return name


async def pass_through(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Pass the request on; the dispatch function of a `BaseHTTPMiddleware` that changes nothing."""
    return await call_next(request)
