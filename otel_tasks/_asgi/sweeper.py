"""The sweeper: looks at the requests of one loop at an interval, so that short requests need no watcher.

A request is watched once it has lived through a whole interval. A tick costs nothing for it from then on. No
timer runs while all requests are watched.
"""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

from otel_tasks._core.telemetry.context import quiet_context

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

# How many connections may start to be watched in one turn of the loop, each in 20 us: a disconnect of others
# waits behind them.
_SLICE = 8


class Watched(Protocol):
    """A connection as its sweeper sees it."""

    # It has ended.
    closed: bool

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
        add: Adds a connection, to be watched after one to two ticks unless it is closed before.
        watched: The connections that have lived through an interval, each with a time on the loop's clock at
            which it was open already.
        server_stops: The server has received its signal.
        thread: The thread in which the loop runs.
        timer: The next tick; None while nothing waits for one.
    """

    __slots__ = (
        "__weakref__",
        "_again",
        "_context",
        "_due",
        "_due_since",
        "_older",
        "_ticked_at",
        "_timers",
        "_young",
        "add",
        "buffer_limit",
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
        self.watched: dict[Watched, float] = {}
        self.server_stops = False
        self.thread = get_ident()
        self.timer: asyncio.TimerHandle | None = None
        # The connections that opened since the last tick, and those from the interval before; both oldest
        # first. A connection that ends is not removed: a table would cost each request more than the tick.
        self._young: list[ref[Watched]] = []
        self._older: list[ref[Watched]] = []
        # Those that are about to be watched, and a time at which they were open already.
        self._due: list[Watched] = []
        self._due_since = 0.0
        # The list's own method while a timer runs: a function around it would be one more call per request.
        self.add: Callable[[ref[Watched]], None] = self._add_first
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
        due = [connection for connection in self._due if not connection.closed]
        return [*self.watched, *due, *_open(self._older), *_open(self._young)]

    def watch_again(self, connection: Watched) -> None:
        """Watch a connection again, from the next tick on."""
        self._again.append(connection)
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

    def _add_first(self, connection: ref[Watched]) -> None:
        self._young.append(connection)
        self._arm()

    def _arm(self, sooner: float = 0.0) -> None:
        if self.timer is None:
            self.timer = self.loop.call_later(self.interval - sooner, self._tick, context=self._context)
            self.add = self._young.append

    def _tick(self) -> None:
        has_due = bool(self._due)
        # They were there at the last tick, and have lived through it.
        self._due += _open(self._older)
        self._due_since = self._ticked_at
        self._older, self._young = self._young, []
        again, self._again = self._again, []
        self._ticked_at = self.loop.time()
        late = 0.0 if self.timer is None else self._ticked_at - self.timer.when()
        self.timer = None
        self.add = self._add_first
        for connection in again:
            connection.watch()
        if not has_due:
            self._watch_due()
        if self._older or self._young or self._again:
            # A loop that has stalled must not delay the next tick too. Half an interval is kept, so that one
            # that stalls again and again does not spend its time here.
            self._arm(sooner=min(max(late, 0.0), self.interval / 2))

    def _watch_due(self) -> None:
        """Let the connections that are due be watched, a few in each turn of the loop."""
        due, self._due = self._due[:_SLICE], self._due[_SLICE:]
        if self._due:
            self.loop.call_soon(self._watch_due, context=self._context)
        for connection in due:
            # It may have ended in the turns before.
            if not connection.closed:
                self.watched[connection] = self._due_since
                connection.watch()
                self.apply_time_limit(connection)

    def _stop_timer(self, connection: Watched) -> None:
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()


def _open(connections: list[ref[Watched]]) -> list[Watched]:
    found = [reference() for reference in connections]
    return [connection for connection in found if connection is not None and not connection.closed]


# All sweepers: one for each middleware, and for each loop that it serves. No WeakSet: the thread of another
# loop may add one while this is iterated.
_sweepers: set[ref[Sweeper]] = set()


def sweepers_of(loop: asyncio.AbstractEventLoop) -> list[Sweeper]:
    """Return the sweepers of ``loop``."""
    found = [reference() for reference in list(_sweepers)]
    return [sweeper for sweeper in found if sweeper is not None and sweeper.loop is loop]
