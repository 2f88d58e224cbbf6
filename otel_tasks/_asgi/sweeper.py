"""The sweeper: looks at the requests of one loop at an interval, so that short requests need no watcher.

A request is watched once it has lived through a whole interval. From then on it is not in flight here, so
that a tick costs nothing for it. No timer runs while nothing is in flight.
"""

from __future__ import annotations

from itertools import takewhile
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

from otel_tasks._core.telemetry.context import quiet_context

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable


class Watched(Protocol):
    """A connection as its sweeper sees it."""

    def watch(self) -> None:
        """Start watching: the request has lived through a whole interval."""
        ...

    def time_limit(self) -> float | None:
        """Return the seconds that the request may take; None for no bound."""
        ...

    def on_time_limit(self, seconds: float) -> None:
        """Called once the request has taken that long."""
        ...


class Sweeper:
    """Looks at the requests of one loop, and lets the long ones be watched.

    Args:
        loop: The loop of these requests.
        interval: Seconds between two ticks.
        buffer_limit: Bytes that a watcher may keep for one request.

    Attributes:
        in_flight: The connections that have not lived through an interval, oldest first, each with the number
            of ticks before it was added.
        watched: The older ones, each with a time on the loop's clock at which it was open already.
        server_stops: The server has received its signal.
        thread: The thread in which the loop runs.
        timer: The next tick; None while nothing is in flight.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_context",
        "_ticked_at",
        "_ticks",
        "_timers",
        "buffer_limit",
        "in_flight",
        "interval",
        "loop",
        "server_stops",
        "thread",
        "timer",
        "watched",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float, buffer_limit: int) -> None:
        self.loop = loop
        self.interval = interval
        self.buffer_limit = buffer_limit
        self.in_flight: dict[Watched, int] = {}
        self.watched: dict[Watched, float] = {}
        self.server_stops = False
        self.thread = get_ident()
        self.timer: asyncio.TimerHandle | None = None
        self._ticks = 0
        self._ticked_at = 0.0
        # Watched, but without a watcher: the next tick tries again.
        self._again: list[Watched] = []
        # Those of the watched connections that have a time limit. A heap of deadlines, checked at each tick,
        # would do again what the loop's heap of timers does.
        self._timers: dict[Watched, asyncio.TimerHandle] = {}
        # Otherwise every watcher would carry the trace of the request that came first.
        self._context = quiet_context()
        _sweepers.add(ref(self, _sweepers.discard))

    def open_requests(self) -> list[Watched]:
        """Return the connections of this loop that are not closed, the youngest last."""
        return [*self.watched, *self.in_flight]

    def add(self, connection: Watched) -> None:
        """Watch ``connection`` after one to two ticks, unless it is closed before."""
        self.in_flight[connection] = self._ticks
        if self.timer is None:
            self._arm()

    def watch_again(self, connection: Watched) -> None:
        """Watch a connection again, from the next tick on."""
        self._again.append(connection)
        if self.timer is None:
            self._arm()

    def keep(self, connection: Watched) -> None:
        """Count a closed connection as open: the server waits for what it still does."""
        self.watched[connection] = self.loop.time()

    def forget(self, connection: Watched) -> None:
        """Remove a connection that is not in flight."""
        self.watched.pop(connection, None)
        self._stop_timer(connection)

    def apply_time_limit(self, connection: Watched) -> None:
        """Let the time limit of a watched connection take effect; a younger one gets it when it is watched.

        It counts from the opening, which is known to within an interval: a limit is never cut.
        """
        opened_by = self.watched.get(connection)
        if opened_by is None:
            return
        self._stop_timer(connection)
        seconds = connection.time_limit()
        if seconds is None:
            return
        if opened_by + seconds <= self.loop.time():
            connection.on_time_limit(seconds)
        else:
            self._timers[connection] = self.loop.call_at(
                opened_by + seconds, connection.on_time_limit, seconds, context=self._context
            )

    def start(self, coro: Any) -> asyncio.Task[None]:
        """Run a watcher, outside of every trace."""
        return self.loop.create_task(coro, name="otel_tasks.watch", context=self._context.copy())

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` after ``delay`` seconds, outside of every trace."""
        self.loop.call_later(delay, callback, context=self._context.copy())

    def _arm(self) -> None:
        self.timer = self.loop.call_later(self.interval, self._tick, context=self._context)

    def _tick(self) -> None:
        due = self._take_due()
        again, self._again = self._again, []
        self._ticks += 1
        self._ticked_at = self.loop.time()
        for connection in (*due, *again):
            connection.watch()
        for connection in due:
            self.apply_time_limit(connection)
        if self.in_flight or self._again:
            self._arm()
        else:
            self.timer = None

    def _stop_timer(self, connection: Watched) -> None:
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def _take_due(self) -> list[Watched]:
        # Oldest first: the first one of this interval ends the search.
        due = list(takewhile(lambda connection: self.in_flight[connection] < self._ticks, self.in_flight))
        for connection in due:
            del self.in_flight[connection]
            # It was there at the last tick, which it has lived through.
            self.watched[connection] = self._ticked_at
        return due


# All sweepers: one for each middleware, and for each loop that it serves. No WeakSet: the thread of another
# loop may add one while this is iterated.
_sweepers: set[ref[Sweeper]] = set()


def sweepers_of(loop: asyncio.AbstractEventLoop) -> list[Sweeper]:
    """Return the sweepers of ``loop``."""
    found = [reference() for reference in list(_sweepers)]
    return [sweeper for sweeper in found if sweeper is not None and sweeper.loop is loop]
