"""One stream of server-sent events: what a viewer gets, and when its stream ends.

Rules, each with a test of its own:

1. A stream holds a position, not a queue: what a slow reader has missed is read from the feed's ring, and
   where that is too much, it gets ``resync`` and the snapshot.
2. A stream ends by itself after 20 s (give or take 5), because servers wait for open responses when they
   stop; at once when the server stops, when the client leaves, or when the viewer has opened others.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from otel_tasks.live.feed import VERSION, array, assembled, encoded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_tasks.live.feed import Encoded
    from otel_tasks.live.hub import Hub
    from otel_tasks.live.rows import Row

LIFETIME = 20.0
JITTER = 5.0
# Ticks that a stream may fall behind.
BEHIND = 8
RETRY_MS = 1000

# The kind of an event, its id, its data as JSON.
Event = tuple[str, str | None, str]


@dataclass(eq=False)
class Stream:
    """What one viewer gets.

    Attributes:
        hub: The hub.
        viewer: The viewer's name.
        expand: How many tasks of which rows it wants.
        names: What the viewer calls some of these rows.
        panels: The tasks that its panels show.
        after: The id of the last update that it has; None for the first time.
    """

    hub: Hub
    viewer: str
    expand: dict[str, int]
    names: dict[str, str]
    panels: tuple[str, ...]
    after: str | None
    ended_by: str | None = None
    _position: int = 0
    _sent: dict[str, Encoded] = field(default_factory=dict)
    _sent_panels: dict[str, Row] = field(default_factory=dict)
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """There is something new."""
        self._woken.set()

    def end(self, reason: str) -> None:
        """End the stream; its viewer is told the reason."""
        self.ended_by = self.ended_by or reason
        self._woken.set()

    def begin(self) -> Iterator[Event]:
        """The first events: the snapshot, or what has changed since the client's last update."""
        feed = self.hub.feed
        position = None if self.after is None else feed.parsed(self.after)
        if isinstance(position, int):
            updates = feed.since(position)
            if updates is None:
                position = "old"
            else:
                for update in updates:
                    yield "delta", feed.id_of(update.number), update.delta
        self._position = feed.number
        if not isinstance(position, int):
            if position is not None:
                yield "resync", None, encoded({"v": VERSION, "reason": position})
            yield "snapshot", feed.id, feed.snapshot()
        yield from self._details()

    async def wait(self, until: float) -> bool:
        """Wait for something new; False when the time is up.

        Cancellation: ends the wait.
        """
        try:
            async with asyncio.timeout_at(until):
                await self._woken.wait()
        except TimeoutError:
            return False
        self._woken.clear()
        return True

    def news(self) -> Iterator[Event]:
        """The events since the last ones."""
        feed = self.hub.feed
        updates = feed.since(self._position)
        if updates is None or len(updates) > BEHIND:
            yield "resync", None, encoded({"v": VERSION, "reason": "slow"})
            yield "snapshot", feed.id, feed.snapshot()
        else:
            for update in updates:
                yield "delta", feed.id_of(update.number), update.delta
        self._position = feed.number
        yield from self._details()

    def last(self, reason: str) -> Event:
        """The event that ends the stream."""
        return "bye", None, encoded({"v": VERSION, "reason": self.ended_by or reason})

    def _details(self) -> Iterator[Event]:
        """The tasks of expanded rows that have changed, and the panels that have."""
        for key, limit in self.expand.items():
            rows = self.hub.rows.get(key)
            if rows is not None:
                yield from self._rows(key, dict(islice(rows.items(), limit)))
        for uid in self.panels:
            panel = self.hub.panels.get(uid)
            if panel is not None and panel != self._sent_panels.get(uid):
                self._sent_panels[uid] = panel
                yield "task", None, encoded({**self.hub.feed.stamp(), **panel})

    def _rows(self, key: str, now: Encoded) -> Iterator[Event]:
        before = self._sent.get(key)
        self._sent[key] = now
        changed = [row for uid, row in now.items() if before is None or before.get(uid) != row]
        gone = [uid for uid in before or () if uid not in now]
        if before is None or changed or gone:
            data = {
                "v": encoded(VERSION),
                "key": encoded(self.names.get(key, key)),
                "full": encoded(before is None),
                "total": encoded(self.hub.feed.total_of(key)),
                "set": array(changed),
                "gone": encoded(gone),
            }
            yield "rows", None, assembled(data)


def polled(stream: Stream) -> str:
    """The first events of a stream as JSON, for a client that polls."""
    events = [f'{{"event":{encoded(kind)},"data":{data}}}' for kind, _, data in stream.begin()]
    head = encoded({"v": VERSION, "id": stream.hub.feed.id, "retry": RETRY_MS})
    return f'{head[:-1]},"events":[{",".join(events)}]}}'


def framed(event: Event) -> bytes:
    """An event as the protocol has it."""
    kind, event_id, data = event
    lines = [f"event: {kind}", *([] if event_id is None else [f"id: {event_id}"]), f"data: {data}"]
    return ("\n".join(lines) + "\n\n").encode("ascii")


def lifetime() -> float:
    """Seconds that a stream lives: not the same for all, so that they do not all come back at once."""
    return random.uniform(LIFETIME - JITTER, LIFETIME + JITTER)  # noqa: S311 - it protects nothing
