"""Which tasks may start now and which wait: limits, a bounded queue, and priorities with ageing.

Tickets and limiters are sync: the functions change them and return the tickets that may start; the caller
starts the tasks. The property tests check these invariants:

1. Never more tickets hold a place of a limiter than its limit.
2. A ticket takes a place in all its limiters or in none: no ticket holds one place while it waits for
   another.
3. No place stays free while a waiting ticket could take it.
4. Higher priority first, FIFO within a level; ``ageing`` seconds of waiting count as one level, so no ticket
   waits forever. All tickets age at the same rate, so their order does not change: the key is fixed on
   arrival and changes only when `lift` raises the priority. One heap needs no further sorting.
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
    """A number of places, and a bounded queue of tickets that wait for one.

    Args:
        limit: The number of places, at least 1; None means no limit.
        max_queue: The number of tickets that may wait, at least 0; None means no limit.
    """

    __slots__ = ("_heap", "_stale", "limit", "max_queue", "used", "waiting")

    def __init__(self, limit: int | None, max_queue: int | None) -> None:
        self.limit = limit
        self.max_queue = max_queue
        # Places taken, and waiting tickets that will take one (in the queue of any of their limiters).
        self.used = 0
        self.waiting = 0
        self._heap: list[tuple[tuple[float, float], int, int, Ticket]] = []
        # The number of heap entries whose tickets have left or have been pushed again.
        self._stale = 0

    def room(self) -> float:
        """The number of free places; negative after the limit was lowered."""
        return float("inf") if self.limit is None else self.limit - self.used

    @property
    def queue_full(self) -> bool:
        """True if no more tickets may wait."""
        return self.max_queue is not None and self.waiting >= self.max_queue

    def push(self, ticket: Ticket) -> None:
        """Add a ticket to this queue, and take it out of the one it was in."""
        if ticket.queue is not None:
            ticket.queue.drop()
        ticket.queue = self
        ticket.version += 1
        # An entry with an older version is skipped when it comes up.
        heappush(self._heap, (ticket.key(), ticket.number, ticket.version, ticket))

    def drop(self) -> None:
        """Count one more stale entry; the heap drops stale entries before they become the majority."""
        self._stale += 1
        if self._stale > len(self._heap) // 2 + 8:
            self._heap = self._current()
            heapify(self._heap)
            self._stale = 0

    def pump(self, ready: list[Ticket]) -> None:
        """Offer the free places to the waiting tickets, best first; adds those that start to ``ready``."""
        offered = 0
        shared: Limiter | None = None
        while self._heap and self.room() > offered:
            _, _, version, ticket = heappop(self._heap)
            if ticket.queue is not self or ticket.version != version:
                self._stale -= 1
                continue
            # It has left the heap, so `push` must not count its entry as stale.
            ticket.queue = None
            last = ticket.limiters[-1]
            if last is not self:
                # The ticket has to join the manager's queue too, or it would overtake the tickets there. Its
                # place here counts as offered, so that the others of this queue do not all follow it.
                last.push(ticket)
                shared = last
                offered += 1
            elif _place(ticket):
                ready.append(ticket)
        if shared is not None:
            shared.pump(ready)

    def in_order(self, most: int) -> list[Ticket] | None:
        """The tickets in this queue, the next one first; None if the heap has more than ``most`` entries."""
        if len(self._heap) > most:
            return None
        return [entry[3] for entry in sorted(self._current())]

    def _current(self) -> list[tuple[tuple[float, float], int, int, Ticket]]:
        """The entries that are not stale."""
        return [entry for entry in self._heap if entry[3].queue is self and entry[3].version == entry[2]]

    def clear(self) -> None:
        """Drop all places and all tickets."""
        self.used = self.waiting = self._stale = 0
        self._heap.clear()


class Ticket:
    """One task's claim to places.

    Args:
        limiters: The group's (if it has one) before the manager's (if it has one).
        level: The task's priority.
        arrived: The time of its arrival, in seconds on the manager's clock.
        ageing: Seconds of waiting that count as one level; infinity means strict priority.
        claimant: The task's side of the claim.
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
        # The limiter in whose queue it waits; None once it has started or left.
        self.queue: Limiter | None = None
        self.started = False
        self.version = 0

    def key(self) -> tuple[float, float]:
        """The position in the order of a queue: the smallest key is next."""
        if self.ageing == float("inf"):
            return (-float(self.level), self.arrived)
        return (self.arrived - self.level * self.ageing, 0.0)


def would_wait(limiters: Iterable[Limiter]) -> bool:
    """True if a new ticket could not start immediately."""
    for limiter in limiters:  # noqa: SIM110 - every task under a limit comes here, and any() makes a generator
        if limiter.room() < 1:
            return True
    return False


def full_limiter(limiters: Iterable[Limiter]) -> Limiter | None:
    """The limiter whose queue is full, if a new ticket would have to wait; else None."""
    if not would_wait(limiters):
        return None
    return next((limiter for limiter in limiters if limiter.queue_full), None)


def admit(ticket: Ticket) -> bool:
    """Admit a ticket that is new or was released; True if it starts immediately, False if it waits."""
    if _place(ticket):
        return True
    for limiter in ticket.limiters:
        limiter.waiting += 1
    return False


def release(ticket: Ticket) -> list[Ticket]:
    """Remove a ticket, started or waiting; returns the tickets that may start now.

    Its task has ended, or backs off until `admit` admits the ticket again, with the time of its arrival.
    """
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
        # For a ticket that waited too: the place that was offered to it is free for others.
        limiter.pump(ready)
    return _no_longer_waiting(ready)


def lift(ticket: Ticket, level: TaskPriority) -> None:
    """Raise the priority of a waiting ticket to that of a task that waits for its task."""
    if ticket.queue is not None and level > ticket.level:
        ticket.level = level
        # Place it again from the first limiter on: it may now rank above the ticket that was offered a free
        # place of its group. This cannot start it: every ticket that could start has started.
        _place(ticket)


def set_limit(limiter: Limiter, limit: int | None) -> list[Ticket]:
    """Change a limit; returns the tickets that may start now. A lower limit takes effect as tasks end."""
    limiter.limit = limit
    ready: list[Ticket] = []
    limiter.pump(ready)
    return _no_longer_waiting(ready)


def adopt(ticket: Ticket, limiter: Limiter, *, before: bool) -> None:
    """Count a ticket against one more limiter, which was set while the task was live.

    Args:
        ticket: The ticket; one that was released and has neither started nor queued since takes no place.
        limiter: A limiter that the ticket does not have yet.
        before: The limiter is a group's, which comes before the manager's.
    """
    ticket.limiters = (limiter, *ticket.limiters) if before else (*ticket.limiters, limiter)
    if ticket.started:
        limiter.used += 1
    elif ticket.queue is not None:
        limiter.waiting += 1


def checked_limiter(limit: int | None, max_queue: int | None) -> Limiter | None:
    """Make the limiter for these options; None if they set no limit.

    Raises:
        ValueError: The limit is below 1, that of the queue is below 0, or only the queue has a limit.
    """
    check_count("max_concurrency", limit, 1)
    check_count("max_queue", max_queue, 0)
    if limit is None:
        if max_queue is not None:
            raise ValueError(f"max_queue={max_queue} needs max_concurrency: without it no task ever waits")
        return None
    return Limiter(limit, max_queue)


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


def _no_longer_waiting(ready: list[Ticket]) -> list[Ticket]:
    for ticket in ready:
        for limiter in ticket.limiters:
            limiter.waiting -= 1
    return ready


class Claimant(Protocol):
    """The task of a ticket, and the group that counts it as queued."""

    def leave_queue(self) -> None:
        """Stop counting the task as queued: it has ended."""
        ...

    def grant(self) -> None:
        """Stop counting the task as queued, and start it, unless it has been cancelled meanwhile."""
        ...


class Producer(Protocol):
    """A group in which a caller wants to create a task as soon as the queue has room."""

    def _is_full(self) -> bool:
        """True if a new task would be refused now, but not forever."""
        ...


class Places:
    """The places of one manager: its own limit, and the producers that wait for room in a queue.

    Args:
        limiter: The manager's; tasks skip it while it has no limit.
        ageing: Seconds of waiting that count as one level of priority.
    """

    def __init__(self, limiter: Limiter, ageing: float) -> None:
        self.limiter = limiter
        self.ageing = ageing
        # Labeled groups with a limit of their own, so that they exist while they are empty too.
        self.limited: set[object] = set()
        # The waiting producers, the oldest first; and the one that was woken but has not taken its room yet.
        self._producers: deque[tuple[Producer, asyncio.Future[None]]] = deque()
        self._woken: asyncio.Future[None] | None = None

    def give_back(self, ticket: Ticket) -> None:
        """Release a task's places, or its claim to them, and start others."""
        if ticket.queue is not None:
            ticket.claimant.leave_queue()
        self._grant(release(ticket))
        self.wake_producer()

    def change_limit(self, limiter: Limiter, limit: int | None, max_queue: int | None) -> None:
        """Set a limit, and start the tasks that have room now."""
        limiter.max_queue = max_queue
        self._grant(set_limit(limiter, limit))
        self.wake_producer()

    def clear(self) -> None:
        """Drop all places and claims: the loop of these tasks was closed before they ended."""
        self.limiter.clear()
        self._producers.clear()
        self._woken = None

    async def wait_for_room(self, producer: Producer) -> None:
        """Wait until a new task may join the queue, or never can.

        Cancellation: cancelling the caller removes it from the waiting producers.
        """
        if not self._producers and self._woken is None and not producer._is_full():
            return
        stand = self._producers.append
        while True:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            stand((producer, waiter))
            # All producers before it may wait for room in other groups.
            self.wake_producer()
            try:
                await waiter
            finally:
                self._producer_left(waiter)
            if not producer._is_full():
                return
            # A caller that did not wait has taken the room: wait again, as the first.
            stand = self._producers.appendleft

    def wake_producer(self) -> None:
        """Wake the first producer that has room now, or never will have.

        One at a time: when it is done, it wakes the next one, for the room that is left.
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
        """Remove a producer that was woken or cancelled."""
        if self._woken is waiter:
            self._woken = None
        else:
            others = [entry for entry in self._producers if entry[1] is not waiter]
            self._producers.clear()
            self._producers.extend(others)

    def _grant(self, ready: Iterable[Ticket]) -> None:
        for ticket in ready:
            ticket.claimant.grant()
