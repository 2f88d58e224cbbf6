"""The hub: ticks the feed while there are viewers, and wakes their streams.

Rules, each with a test of its own:

1. Without a viewer there is no timer, no task, and no listener. The ticking stops ``LINGER`` seconds after
   the last stream or poll.
2. The number of viewers, and of streams per viewer, is bounded; a viewer's newest streams win.
3. One tick serves all viewers. The rows that they have expanded are read once for all of them, some per tick.
4. A tick never holds the loop for long: it pauses after each slice, and wakes one stream at a time. So its
   share of the loop is bounded too, however many tasks there are. It ends before the next one starts, and
   between two slices when the server stops.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks import Overview, TaskNotFoundError
from otel_tasks._core.log import logger
from otel_tasks._core.slices import in_slices, one_turn
from otel_tasks.asgi import call_on_server_stop
from otel_tasks.live.detail import ended_or_forgotten, live_detail
from otel_tasks.live.feed import INTERVAL, Encoded, Feed
from otel_tasks.live.marks import is_marked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence

    from otel_tasks import ManagedTask
    from otel_tasks.live.rows import Row

MAX_VIEWERS = 32
STREAMS_PER_VIEWER = 2
LINGER = 5.0
# Seconds after the server's signal in which no viewer is admitted.
STOPS_WITHIN = 30.0
# Seconds that one who asks once waits for the nodes of a fleet.
COMPLETE = 2.5
# Looks at the clock per tick: a step that holds the loop delays them.
BEATS = 10
# Seconds between two slices of a tick, which holds the loop for about a tenth of that.
PAUSE = 0.003
# Rows of expanded classes that are read per tick, each in some 20 us.
ROWS_PER_TICK = 500
# Panels that are read per tick.
PANELS_PER_TICK = 10


class Viewer(Protocol):
    """A stream, as the hub sees it."""

    viewer: str
    expand: dict[str, int]
    panels: tuple[str, ...]

    def wake(self) -> None:
        """There is something new."""
        ...

    def end(self, reason: str) -> None:
        """End it."""


class Others(Protocol):
    """The other nodes of a fleet, as the hub sees them."""

    async def look(self, expand: Mapping[str, int], panels: Iterable[str]) -> None:
        """Find the nodes, and ask them."""
        ...

    async def ask(self, expand: Mapping[str, int], panels: Iterable[str]) -> None:
        """Ask the known ones for what has changed, and wait a moment for their answers."""
        ...

    def rows(self, key: str) -> Encoded:
        """The tasks of an expanded row of another node."""
        ...

    def oldest(
        self, tasks: Sequence[ManagedTask[Any]], own: Encoded, limit: int
    ) -> Generator[None, None, Encoded]:
        """The oldest tasks of all nodes, in slices; ``own`` has the rows of those of this node."""
        ...

    def panel(self, uid: str) -> Row:
        """A task of another node."""
        ...


class TooManyViewers(Exception):
    """No further viewer is admitted now."""


class NotTicking(Exception):
    """The feed has raised, or the server stops: there is nothing to show."""


class Hub:
    """The viewers of one feed.

    Args:
        feed: The feed.
        others: The other nodes of a fleet, which the feed shows too; None without one.
    """

    def __init__(self, feed: Feed, others: Others | None = None) -> None:
        self.feed = feed
        self._others = others
        # The tasks of expanded rows, and the panels, as of their last look.
        self.rows: dict[str, Encoded] = {}
        self.panels: dict[str, Row] = {}
        self._streams: list[Viewer] = []
        self._polls: dict[str, float] = {}
        self._ticking: asyncio.Task[None] | None = None
        # Set once the first tick is over.
        self._has_ticked = asyncio.Event()
        # Set by the next tick, which makes another one.
        self._published = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_seen = 0.0
        # The longest time for which something held the loop since the last tick.
        self._held = 0.0
        # When the server got its signal; a process that goes on serves viewers again.
        self._stopped_at: float | None = None
        # The row that is read first in the next tick.
        self._turn = 0
        # The panel that is read first in the next tick.
        self._next_panel = 0

    # -- viewers ----------------------------------------------------------------------------

    async def admit(self, viewer: str) -> None:
        """Record that a viewer is there, start ticking, and wait for the first tick.

        Raises:
            TooManyViewers: There are too many others.
            NotTicking: The first tick has failed, or the server stops.

        Cancellation: ends the wait; the ticking goes on for a while.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._enter(loop)
        self._polls = {name: at for name, at in self._polls.items() if now - at < LINGER}
        known = {stream.viewer for stream in self._streams} | self._polls.keys()
        if viewer not in known and len(known) >= MAX_VIEWERS:
            raise TooManyViewers
        self._polls[viewer] = self._last_seen = now
        if self._ticking is None or self._ticking.done():
            has_ticked = self._has_ticked = asyncio.Event()
            # Not in the context of the request: its trace and its group are not those of the ticks.
            self._ticking = loop.create_task(self._tick(), name="otel_tasks.live", context=Context())
            # Even if it is cancelled before its first step.
            self._ticking.add_done_callback(lambda _: has_ticked.set(), context=Context())
        ticking = self._ticking
        await self._has_ticked.wait()
        if self._ticking is not ticking or ticking.done():
            raise NotTicking

    def add(self, stream: Viewer) -> None:
        """Add a stream of an admitted viewer; the oldest of too many is replaced."""
        own = [other for other in self._streams if other.viewer == stream.viewer]
        for other in own[: len(own) + 1 - STREAMS_PER_VIEWER]:
            other.end("replaced")
            self._streams.remove(other)
        self._streams.append(stream)

    def remove(self, stream: Viewer) -> None:
        """Remove a stream that has ended."""
        if stream in self._streams:
            self._streams.remove(stream)
        self._last_seen = asyncio.get_running_loop().time()

    @property
    def closing(self) -> bool:
        """True while the server stops."""
        now = asyncio.get_running_loop().time()
        return self._stopped_at is not None and now - self._stopped_at < STOPS_WITHIN

    def close(self) -> None:
        """End all streams: the server stops."""
        self._stopped_at = asyncio.get_running_loop().time()
        for stream in self._streams:
            stream.end("shutdown")
        if self._ticking is not None:
            self._ticking.cancel()

    async def complete(self) -> None:
        """Wait until a tick has an answer of each node of the fleet, for at most ``COMPLETE`` seconds.

        Cancellation: ends the wait.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(COMPLETE):
                while self.feed.waits_for_nodes:
                    await self._published.wait()

    async def read_now(self, expand: Mapping[str, int], panels: Iterable[str]) -> None:
        """Read what a viewer has just expanded, without waiting for the next tick.

        Cancellation: ends the reading.
        """
        missing = {key: limit for key, limit in expand.items() if key not in self.rows}
        panels = tuple(panels)
        if self._others is not None and (missing or any(map(is_marked, panels))):
            await self._others.ask(missing, panels)
        if missing:
            overview = await in_slices(self.feed.look(_own(missing)))
            await self._read_rows(overview.members, missing, one_turn)
        for uid in panels:
            await self._read_panel(uid, one_turn)

    # -- ticking ----------------------------------------------------------------------------

    def _enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget the ticking of another loop: it is over."""
        if self._loop is not loop:
            self._loop = loop
            self._ticking = None
            self._streams.clear()
            self._polls.clear()
            self._stopped_at = None

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        sign = call_on_server_stop(self.close)
        try:
            started = loop.time()
            if self._others is not None:
                await self._others.look({}, ())
            # Viewers wait for it: it takes no pauses.
            await in_slices(self.feed.slices())
            self._has_ticked.set()
            self._notify_published()
            while self._streams or loop.time() - self._last_seen < LINGER:
                while (left := started + INTERVAL - loop.time()) > 0:
                    await self._sleep(min(left, INTERVAL / BEATS))
                started = loop.time()
                await self._move_on()
        except Exception:
            logger.exception("the feed of the live view raised, and its streams end")
            for stream in self._streams:
                stream.end("failed")
        finally:
            sign.close()
            if self._ticking is asyncio.current_task():
                self._ticking = None
                self.rows.clear()
                self.panels.clear()
                self.feed.pause()

    async def _move_on(self) -> None:
        """Tick once, and wake the streams one after another."""
        wanted = self._wanted()
        held, self._held = self._held, 0.0
        if self._others is not None:
            await self._others.look(wanted, {uid for stream in self._streams for uid in stream.panels})
        members = await in_slices(self.feed.slices(_own(wanted), held=held), self._rest)
        self._notify_published()
        await self._read_rows(members, wanted, self._rest)
        await self._read_panels()
        for stream in list(self._streams):
            stream.wake()
            await self._rest()

    def _notify_published(self) -> None:
        published, self._published = self._published, asyncio.Event()
        published.set()

    async def _rest(self) -> None:
        await self._sleep(PAUSE)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, and note for how long something holds the loop beyond that."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        await asyncio.sleep(seconds)
        self._held = max(self._held, loop.time() - due)

    def _wanted(self) -> dict[str, int]:
        """The rows that viewers have expanded, as many as one tick reads, each in its turn."""
        union: dict[str, int] = {}
        for stream in self._streams:
            for key, limit in stream.expand.items():
                union[key] = max(limit, union.get(key, 0))
        self.rows = {key: rows for key, rows in self.rows.items() if key in union}
        keys = sorted(union)
        start = self._turn % max(1, len(keys))
        wanted: dict[str, int] = {}
        size = 0
        for key in keys[start:] + keys[:start]:
            if wanted and size + union[key] > ROWS_PER_TICK:
                break
            wanted[key] = union[key]
            size += union[key]
        self._turn = start + len(wanted)
        return wanted

    async def _read_rows(
        self,
        members: Mapping[str, Sequence[ManagedTask[Any]]],
        wanted: Mapping[str, int],
        rest: Callable[[], Awaitable[object]],
    ) -> None:
        for key, limit in wanted.items():
            if self._others is not None and is_marked(key):
                self.rows[key] = self._others.rows(key)
                continue
            tasks = members[key][:limit]
            rows = await in_slices(self.feed.encoded_rows(tasks), rest)
            if self._others is not None and key == Overview.ROOT:
                rows = await in_slices(self._others.oldest(tasks, rows, limit), rest)
            self.rows[key] = rows

    async def _read_panels(self) -> None:
        wanted = list(dict.fromkeys(uid for stream in self._streams for uid in stream.panels))
        self.panels = {uid: self.panels[uid] for uid in wanted if uid in self.panels}
        start = self._next_panel % max(1, len(wanted))
        for uid in (wanted[start:] + wanted[:start])[:PANELS_PER_TICK]:
            await self._read_panel(uid, self._rest)
        self._next_panel = start + PANELS_PER_TICK

    async def _read_panel(self, uid: str, rest: Callable[[], Awaitable[object]]) -> None:
        if self._others is not None and is_marked(uid):
            self.panels[uid] = self._others.panel(uid)
            return
        try:
            task = self.feed.manager.get_task(uid)
        except TaskNotFoundError:
            self.panels[uid] = await in_slices(ended_or_forgotten(self.feed, uid), rest)
        else:
            self.panels[uid] = await in_slices(live_detail(self.feed, task), rest)


def _own(wanted: Mapping[str, int]) -> dict[str, int]:
    """The rows of this process."""
    return {key: limit for key, limit in wanted.items() if not is_marked(key)}
