"""Which task may start now and which waits: limits, a bounded queue, priority with ageing.

Everything is sync and pure: the functions change the records and return the tickets that may start; the
caller starts them. The property tests check each of these invariants:

1. Never more tickets hold a place of a limiter than its limit.
2. A place is taken in all limiters of a ticket or in none: no ticket holds one place while it waits for
   another.
3. No place stays free while a ticket waits that could take it.
4. Higher priority first, FIFO within a level; ``ageing`` seconds of waiting count as one level, so nothing
   waits forever. All tickets age at the same rate, so their order never changes: the key is fixed on arrival,
   and one heap needs no further sorting.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Protocol

from otel_tasks._core.checks import check_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_tasks._core.state import TaskPriority

_numbers = itertools.count()


class Limiter:
    """At most ``limit`` places, and at most ``max_queue`` tickets that wait for one.

    Args:
        limit: Places, at least 1; None means no limit.
        max_queue: Waiting tickets, at least 0; None means no limit.
    """

    __slots__ = ("_heap", "_stale", "limit", "max_queue", "used", "waiting")

    def __init__(self, limit: int | None, max_queue: int | None) -> None:
        self.limit = limit
        self.max_queue = max_queue
        # Places taken, and tickets that wait and will take one (in whatever queue they stand).
        self.used = 0
        self.waiting = 0
        self._heap: list[tuple[tuple[float, float], int, int, Ticket]] = []
        # The number of its entries whose tickets have left or have been pushed again.
        self._stale = 0

    def room(self) -> float:
        """Free places; negative after the limit was lowered."""
        return float("inf") if self.limit is None else self.limit - self.used

    @property
    def queue_full(self) -> bool:
        """True if no more tickets may wait."""
        return self.max_queue is not None and self.waiting >= self.max_queue

    def push(self, ticket: Ticket) -> None:
        """Let a ticket wait here."""
        if ticket.queue is not None:
            ticket.queue.drop()
        ticket.queue = self
        ticket.version += 1
        # An entry with an older version is skipped when it comes up.
        heappush(self._heap, (ticket.key(), ticket.number, ticket.version, ticket))

    def drop(self) -> None:
        """Note that an entry is stale; the heap drops stale entries before they are the majority."""
        self._stale += 1
        if self._stale > len(self._heap) // 2 + 8:
            self._heap = self._current()
            heapify(self._heap)
            self._stale = 0

    def pump(self, ready: list[Ticket]) -> None:
        """Offer the free places to those who wait, best first; those that start are added to ``ready``."""
        offered = 0
        shared: Limiter | None = None
        while self._heap and self.room() > offered:
            _, _, version, ticket = heappop(self._heap)
            if ticket.queue is not self or ticket.version != version:
                self._stale -= 1
                continue
            # It is out of the heap; `push` is not to count it once more.
            ticket.queue = None
            last = ticket.limiters[-1]
            if last is not self:
                # It has to stand in the manager's queue too, or it would overtake those who wait
                # there. The place here is kept in mind for it, so that not all move after it.
                last.push(ticket)
                shared = last
                offered += 1
            elif _place(ticket):
                ready.append(ticket)
        if shared is not None:
            shared.pump(ready)

    def in_order(self, most: int) -> list[Ticket] | None:
        """The tickets that wait here, the next one first; None for more than ``most`` entries."""
        if len(self._heap) > most:
            return None
        return [entry[3] for entry in sorted(self._current())]

    def _current(self) -> list[tuple[tuple[float, float], int, int, Ticket]]:
        """The entries whose tickets still wait here."""
        return [entry for entry in self._heap if entry[3].queue is self and entry[3].version == entry[2]]

    def clear(self) -> None:
        """Forget everybody."""
        self.used = self.waiting = self._stale = 0
        self._heap.clear()


class Ticket:
    """One task's claim to places.

    Args:
        limiters: The group's (if it has one) before the manager's (if it has one); at least one.
        level: The task's priority.
        arrived: When it came, in seconds on the manager's clock.
        ageing: Seconds of waiting that are worth one level; infinity is strict priority.
        claimant: Whose it is.
    """

    __slots__ = (
        "ageing",
        "arrived",
        "claimant",
        "level",
        "limiters",
        "number",
        "queue",
        "started",
        "version",
    )

    def __init__(
        self,
        limiters: tuple[Limiter, ...],
        level: TaskPriority,
        arrived: float,
        ageing: float,
        claimant: Claimant,
    ) -> None:
        self.limiters = limiters
        self.level = level
        self.arrived = arrived
        self.ageing = ageing
        self.claimant = claimant
        self.number = next(_numbers)
        # Where it waits; None once it has started or is gone.
        self.queue: Limiter | None = None
        self.started = False
        self.version = 0

    def key(self) -> tuple[float, float]:
        """The place in the order: smaller is sooner."""
        if self.ageing == float("inf"):
            return (-float(self.level), self.arrived)
        return (self.arrived - self.level * self.ageing, 0.0)


def would_wait(limiters: Iterable[Limiter]) -> bool:
    """True if a ticket that comes now could not start at once."""
    for limiter in limiters:  # noqa: SIM110 - every task under a limit comes here, and any() makes a generator
        if limiter.room() < 1:
            return True
    return False


def full_limiter(limiters: Iterable[Limiter]) -> Limiter | None:
    """The limiter in whose queue a ticket that comes now would have to wait, and may not."""
    if not would_wait(limiters):
        return None
    return next((limiter for limiter in limiters if limiter.queue_full), None)


def admit(ticket: Ticket) -> bool:
    """Take a new ticket in; True if it may start at once, False if it waits."""
    if _place(ticket):
        return True
    for limiter in ticket.limiters:
        limiter.waiting += 1
    return False


def release(ticket: Ticket) -> list[Ticket]:
    """Take a ticket out, started or waiting; returns those that may start now."""
    ready: list[Ticket] = []
    for limiter in ticket.limiters:
        if ticket.started:
            limiter.used -= 1
        elif ticket.queue is not None:
            limiter.waiting -= 1
    ticket.started = False
    if ticket.queue is not None:
        queue, ticket.queue = ticket.queue, None
        queue.drop()
    for limiter in ticket.limiters:
        # Of one that waited too: a place that was kept in mind for it is free for others.
        limiter.pump(ready)
    return _no_longer_waiting(ready)


def lift(ticket: Ticket, level: TaskPriority) -> None:
    """Let a waiting ticket count as one of a higher priority, because such a task waits for it."""
    if ticket.queue is not None and level > ticket.level:
        ticket.level = level
        # Again in all limiters: it may now rank above the ticket that is remembered for a free place of its
        # group. This cannot start it: every ticket that could start has started.
        _place(ticket)


def set_limit(limiter: Limiter, limit: int | None) -> list[Ticket]:
    """Change a limit; returns the tickets that may start now. A lower one waits for tasks to end."""
    limiter.limit = limit
    ready: list[Ticket] = []
    limiter.pump(ready)
    return _no_longer_waiting(ready)


def _place(ticket: Ticket) -> bool:
    for limiter in ticket.limiters:
        if limiter.room() < 1:
            limiter.push(ticket)
            return False
    for limiter in ticket.limiters:
        limiter.used += 1
    ticket.queue = None
    ticket.started = True
    return True


def adopt(ticket: Ticket, limiter: Limiter, *, before: bool) -> None:
    """Let a ticket count for one more limiter, one that was set while the task was live.

    Args:
        ticket: Started or waiting.
        limiter: Not one of its own yet.
        before: It is a group's, to be asked before the manager's.
    """
    ticket.limiters = (limiter, *ticket.limiters) if before else (*ticket.limiters, limiter)
    if ticket.started:
        limiter.used += 1
    else:
        limiter.waiting += 1


def _no_longer_waiting(ready: list[Ticket]) -> list[Ticket]:
    for ticket in ready:
        for limiter in ticket.limiters:
            limiter.waiting -= 1
    return ready


def checked_limiter(limit: int | None, max_queue: int | None) -> Limiter | None:
    """Make the limiter for these options; None where there is nothing to limit.

    Raises:
        ValueError: The limit is below 1, the queue's below 0, or there is a queue without a limit.
    """
    check_count("max_concurrency", limit, 1)
    check_count("max_queue", max_queue, 0)
    if limit is None:
        if max_queue is not None:
            raise ValueError(f"max_queue={max_queue} needs max_concurrency: without it no task ever waits")
        return None
    return Limiter(limit, max_queue)


class Claimant(Protocol):
    """What stands behind a ticket: a task, and the group in whose queue it is counted."""

    def leave_queue(self) -> None:
        """Count the task no more among those that wait: it has ended."""
        ...

    def grant(self) -> None:
        """Count it no more, and let it begin; one that was cancelled meanwhile ends by itself."""
        ...


class Producer(Protocol):
    """A group in which somebody wants to create a task as soon as it may wait for its place."""

    def _is_full(self) -> bool:
        """True if a new task would be refused now, but not forever."""
        ...


class Places:
    """The places of one manager: its own limit, and the line of those who wait for room in a queue.

    Args:
        limiter: The manager's; without a limit it is asked nothing.
        ageing: Seconds of waiting that are worth one level of priority.
    """

    def __init__(self, limiter: Limiter, ageing: float) -> None:
        self.limiter = limiter
        self.ageing = ageing
        # Labeled groups with a limit of their own: they are kept while they are empty, too.
        self.limited: set[object] = set()
        # First come, first served; and the one that has been woken and has not taken its room yet.
        self._producers: deque[tuple[Producer, asyncio.Future[None]]] = deque()
        self._woken: asyncio.Future[None] | None = None

    def give_back(self, ticket: Ticket) -> None:
        """Take back a task's places, or its claim to them, and let others start."""
        if ticket.queue is not None:
            ticket.claimant.leave_queue()
        self._grant(release(ticket))
        self.wake_producer()

    def change_limit(self, limiter: Limiter, limit: int | None) -> None:
        """Set a limit and let those start for whom there is room now."""
        self._grant(set_limit(limiter, limit))
        self.wake_producer()

    def clear(self) -> None:
        """Forget all: the loop of these tasks was closed under them."""
        self.limiter.clear()
        self._producers.clear()
        self._woken = None

    async def wait_for_room(self, producer: Producer) -> None:
        """Wait until a new task may stand in the queue, or none ever will.

        Cancellation: of the caller takes it out of the line.
        """
        if not self._producers and self._woken is None and not producer._is_full():
            return
        stand = self._producers.append
        while True:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            stand((producer, waiter))
            # Those before it may all wait for room elsewhere.
            self.wake_producer()
            try:
                await waiter
            finally:
                self._producer_left(waiter)
            if not producer._is_full():
                return
            # Somebody who did not stand in line was faster: again, and at its head.
            stand = self._producers.appendleft

    def wake_producer(self) -> None:
        """Wake the first in line who gets room now, or never will.

        One at a time: what it leaves over is the next one's, whom it wakes when it is done.
        """
        if not self._producers or self._woken is not None:
            return
        for entry in self._producers:
            producer, waiter = entry
            if not producer._is_full() and not waiter.done():
                self._producers.remove(entry)
                self._woken = waiter
                waiter.set_result(None)
                return

    def _producer_left(self, waiter: asyncio.Future[None]) -> None:
        """Take one out of the line: woken, or cancelled."""
        if self._woken is waiter:
            self._woken = None
        else:
            line = [entry for entry in self._producers if entry[1] is not waiter]
            self._producers.clear()
            self._producers.extend(line)

    def _grant(self, ready: Iterable[Ticket]) -> None:
        for ticket in ready:
            ticket.claimant.grant()
