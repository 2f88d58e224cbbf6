"""The server's stop: after its signal, open requests get a grace, and then they are cut short.

Rules, each with a test of its own:

1. At each signal, the server's own handler is called too: it stops the server, and a second signal forces the
   exit as without this module.
2. A signal that the server does not handle keeps its default action, and ends the process.
3. Every request of the loop is cut short, whichever middleware serves it: the server waits for all of them.
   So is a request that arrives later.
4. Outside of the main thread, no signal arrives, and nothing is cut short.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from otel_tasks._asgi.request import Request
from otel_tasks._asgi.sweeper import sweepers_of
from otel_tasks._core.log import logger
from otel_tasks._core.signals import ChainedHandler, in_main_thread
from otel_tasks._core.state import CancelKind
from otel_tasks._core.telemetry.context import quiet_context

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from types import FrameType

# Seconds between two looks for requests that arrived after the grace.
_LOOK = 1.0
# Seconds that a request may take to end before it is reported.
_PATIENCE = 5.0
# Seconds between two looks at hypercorn's event; hypercorn itself takes as long.
_POLL = 0.1
_NAMES_LOGGED = 10


@asynccontextmanager
async def cut_requests_on_stop(grace: float | None) -> AsyncGenerator[None]:
    """Cut the open requests of the running loop short, ``grace`` seconds after the server's signal.

    Args:
        grace: Seconds that they get; None leaves their end to the server.

    Cancellation: it waits for nothing.
    """
    if grace is None:
        yield
        return
    stop = _ServerStop(asyncio.get_running_loop(), grace)
    stop.listen()
    try:
        yield
    finally:
        stop.end()


class StopSign:
    """The sign that the server of one loop stops: its signal, or for a worker of hypercorn, its event.

    Args:
        loop: The running loop.
        callback: Called in the loop at the sign, and again at each further signal.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
        self._loop = loop
        self._callback = callback
        self._handlers: list[ChainedHandler] = []
        # The next look at hypercorn's event.
        self._timer: asyncio.TimerHandle | None = None
        # A signal interrupts any code: its callbacks must not carry the trace of a request.
        self._context = quiet_context()

    def listen(self) -> None:
        """Wait for the sign."""
        event = _hypercorns_event()
        if event is not None:
            self._poll(event)
        elif in_main_thread():
            for signum in _stop_signals():
                self._chain(signum)

    def leave(self) -> None:
        """Wait no longer."""
        for handler in self._handlers:
            handler.leave()
        if self._timer is not None:
            self._timer.cancel()

    def _chain(self, signum: int) -> None:
        # Not on top of a default action: the signal would not end the process any more. Servers install
        # their handlers before the lifespan (uvicorn 0.54, hypercorn 0.18, granian 2.8, gunicorn 27).
        # asyncio's and uvloop's add_signal_handler() works through a wakeup file descriptor, which another
        # handler on top of theirs leaves as it is.
        if not callable(signal.getsignal(signum)):
            return
        # ValueError: this is not the main interpreter.
        with suppress(ValueError):
            self._handlers.append(ChainedHandler(signum, self._on_signal))

    def _on_signal(self, _: FrameType | None) -> None:
        # RuntimeError: the loop is closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._callback, context=self._context)

    def _poll(self, event: Any) -> None:
        if event.is_set():
            self._callback()
        else:
            self._timer = self._loop.call_later(_POLL, self._poll, event, context=self._context)


class _ServerStop:
    """The stop of the server that runs one loop, from its signal to the end of the lifespan."""

    def __init__(self, loop: asyncio.AbstractEventLoop, grace: float) -> None:
        self._loop = loop
        self._grace = grace
        self._reason = f"the server stops, and request_grace={grace:g} s are over"
        self._sign = StopSign(loop, self._begin)
        # The next step: the end of the grace, a look for new requests.
        self._timer: asyncio.TimerHandle | None = None
        self._has_begun = self._has_ended = False
        # When each request was cut short.
        self._cut_at: dict[Request, float] = {}
        self._context = quiet_context()

    def listen(self) -> None:
        """Wait for the sign that the server stops."""
        self._sign.listen()

    def end(self) -> None:
        """Wait no longer: the lifespan is over."""
        self._has_ended = True
        self._sign.leave()
        if self._timer is not None:
            self._timer.cancel()
        for sweeper in sweepers_of(self._loop):
            sweeper.server_stops = False

    # The stop.

    def _begin(self) -> None:
        if not self._has_begun and not self._has_ended:
            self._has_begun = True
            for request in _open_requests(self._loop):
                request.note_server_stop()
            self._call_later(self._grace, self._cut)

    def _cut(self) -> None:
        """Cut the requests short that have not been, and report those that have not ended since."""
        now = self._loop.time()
        requests = _open_requests(self._loop)
        new = [request for request in requests if request not in self._cut_at]
        # The oldest last: its work may be what a newer one waits for.
        self._cut_at = {request: self._cut_at.get(request, now) for request in requests}
        for request in reversed(new):
            request.cut_short(request.make_cause(CancelKind.SHUTDOWN, self._reason))
        if new:
            logger.info(
                "the server stops: cancelled what was open after request_grace=%g s: %s",
                self._grace,
                _names(new),
            )
        self._report(requests, now)
        self._call_later(_LOOK, self._cut)

    def _report(self, requests: list[Request], now: float) -> None:
        late = [request for request in requests if 0.0 <= now - self._cut_at[request] - _PATIENCE < _LOOK]
        if late:
            logger.warning(
                "the server cannot stop: %g s after their cancellation, requests still run: %s",
                _PATIENCE,
                _names(late),
            )

    def _call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self._timer = self._loop.call_later(delay, callback, context=self._context)


def _open_requests(loop: asyncio.AbstractEventLoop) -> list[Request]:
    connections = [connection for sweeper in sweepers_of(loop) for connection in sweeper.open_requests()]
    return [connection for connection in connections if isinstance(connection, Request)]


def _stop_signals() -> list[int]:
    # SIGBREAK is Ctrl+Break on Windows, and what uvicorn sends to its workers there.
    names = ("SIGINT", "SIGTERM", "SIGBREAK")
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _hypercorns_event() -> Any | None:
    # hypercorn's worker processes, which it starts unless `-w 0` is set, handle no signal. Their parent does,
    # and sets an event that it has passed to them (hypercorn 0.18, run.py).
    module = sys.modules.get("multiprocessing")
    if module is None:
        return None
    process = vars(module.current_process())
    if not getattr(process.get("_target"), "__module__", "").startswith("hypercorn."):
        return None
    return process.get("_kwargs", {}).get("shutdown_event")


def _names(requests: list[Request]) -> str:
    counts = sorted(Counter(request.name for request in requests).items())
    names = [f"{name!r}" + (f" ({count})" if count > 1 else "") for name, count in counts]
    more = len(names) - _NAMES_LOGGED
    return ", ".join(names[:_NAMES_LOGGED]) + (f" and {more} more routes" if more > 0 else "")
