"""Progress: a task reports it, and any number of watchers iterate over the newest snapshots.

``task.progress`` is created on first use; a task that never reports has none. Rules, each with a test:

1. A report replaces the previous one: there is one newest snapshot and never a backlog, however slow a
   watcher is.
2. A watcher gets the current snapshot first, if there is one, and the last one before the end. It ends with
   the task, even if the task never reports.
3. A watcher is a future while it waits and nothing otherwise: no task, no timer, no entry in a list. A
   watcher that is cancelled, or dropped in the middle of its loop, leaves nothing behind.
4. Reports may come from any thread; watching belongs to the event loop of the task.
5. A report after the end of the task is dropped: nothing watches a thread that outlives its task.
6. A wrong estimate is not an error: ``done`` may exceed ``total`` (the fraction stops at 1) and may decrease
   (the rate is measured from there). A value that is not a number, or is negative, is an error.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from asyncio import _get_running_loop
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_tasks._core.clock import clock_of, epoch_of, rounded, wall_clock
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    Waiters = dict[asyncio.Future[None], None]

# Seconds. The rate is that of the last one to two spans: long enough to be steady, short enough to follow.
_RATE_SPAN = 15.0


class Progress(NamedTuple):
    """A snapshot of a task's progress, as of its newest report.

    The rate and the seconds left are as of that report, too; they do not advance between reports.

    Attributes:
        number: Counts the task's reports, from 1.
        done: How much is done, in the task's own unit; 0 until the task reports it.
        total: How much there is to do; None while it is unknown.
        message: The task's last message; None if it has sent none.
        rate: Units per second over the last 15 to 30 seconds; None until there are two reports at two times.
        updated_at: The time of the report, in seconds on the clock of ``TaskInfo``'s times.
        epoch: The wall-clock time at which that clock was 0, in seconds since 1970.
    """

    number: int
    done: float
    total: float | None
    message: str | None
    rate: float | None
    updated_at: float
    epoch: float

    @property
    def fraction(self) -> float | None:
        """The part that is done, from 0 to 1; None while the total is unknown."""
        return _fraction(self.done, self.total)

    @property
    def seconds_left(self) -> float | None:
        """Seconds from the report to the end at this rate; None while they are unknown."""
        if self.total is None:
            return None
        left = self.total - self.done
        if left <= 0:
            return 0.0
        return _finite(left / self.rate) if self.rate else None

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as JSON-ready data; its time is a wall-clock timestamp."""
        data = self._asdict()
        data["updated_at"] = wall_clock(self.updated_at, data.pop("epoch"))
        data["fraction"] = self.fraction
        data["seconds_left"] = None if self.seconds_left is None else rounded(self.seconds_left)
        return data


class GroupProgress(NamedTuple):
    """The sum of the reports of all tasks of a group and of the groups below it.

    Numbers are added as they are, so the tasks of one group should use one unit. A task that has not reported
    counts only in ``tasks``. Until a scoped group closes, its ended tasks count as complete: the total of
    each becomes what it has done. So the fraction of a block reaches 1 as its tasks end, including failed and
    cancelled ones. A labeled group has no end, and its ended tasks do not count.

    Attributes:
        tasks: Live tasks.
        reporting: Live tasks that have reported.
        unknown: Live tasks that have reported, but no total.
        ended: Ended tasks that count; see above.
        done: The sum of what is done.
        total: The sum of the known totals; None if no task knows its total.
    """

    tasks: int
    reporting: int
    unknown: int
    ended: int
    done: float
    total: float | None

    @property
    def fraction(self) -> float | None:
        """The part that is done, from 0 to 1; None while a reporting task does not know its total."""
        return None if self.unknown else _fraction(self.done, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Return the sum as JSON-ready data."""
        return self._asdict() | {"fraction": self.fraction}


class TaskProgress:
    """``task.progress``: the task reports its progress here, and other code watches it.

    Example:
        >>> async def load(pages):
        ...     progress = current_task().progress
        ...     progress.update(total=len(pages))
        ...     for page in pages:
        ...         await fetch(page)
        ...         progress.advance()
    """

    __slots__ = (
        "_clock",
        "_done",
        "_ended",
        "_lock",
        "_loop",
        "_mark",
        "_message",
        "_number",
        "_since",
        "_snapshot",
        "_total",
        "_updated_at",
        "_waiters",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._clock = clock_of(loop)
        # Re-entrant: a signal handler or a finalizer may report while its own thread is in a report.
        self._lock = threading.RLock()
        self._number = 0
        self._done: float = 0
        self._total: float | None = None
        self._message: str | None = None
        self._updated_at = 0.0
        # The time and the amount at the start of the rate's window, and those at the start of the next one.
        self._since = self._mark = (0.0, 0.0)
        self._snapshot: Progress | None = None
        self._waiters: Waiters | None = None
        self._ended = False

    def update(
        self, *, done: float | None = None, total: float | None = None, message: str | None = None
    ) -> None:
        """Report progress; values that you leave out stay as they are.

        Call it from any thread, inside or outside the task, as often as you like: it takes about a
        microsecond. After the end of the task, it does nothing.

        Args:
            done: How much is done so far, at least 0 (to add to it, see ``advance``). It may exceed the
                total, and may decrease if work is repeated.
            total: How much there is to do, at least 0; leave it out while it is unknown.
            message: What the task is doing now.

        Raises:
            TypeError: A value is not a number, or the message is not a string.
            ValueError: A number is negative, infinite, or NaN.

        Example:
            >>> current_task().progress.update(done=3, total=10, message="parsing")
        """
        if done is not None:
            _check_number("done", done)
        if total is not None:
            _check_number("total", total)
        if message is not None and not isinstance(message, str):
            raise TypeError(f"message must be a string, got {message!r}")
        with self._lock:
            waiters = self._record(self._done if done is None else done, total, message)
        self._wake(waiters)

    def advance(self, n: float = 1) -> None:
        """Report that ``n`` more is done; otherwise like ``update``.

        Args:
            n: How much more, at least 0.

        Raises:
            TypeError: ``n`` is not a number.
            ValueError: ``n`` is negative, infinite, or NaN.
        """
        _check_number("n", n)
        with self._lock:
            # Read under the lock: of two threads that advance at the same time, neither is lost.
            waiters = self._record(min(self._done + n, sys.float_info.max), None, None)
        self._wake(waiters)

    def snapshot(self) -> Progress | None:
        """Return the newest report; None if the task has not reported."""
        with self._lock:
            if self._snapshot is None and self._number:
                self._snapshot = Progress(
                    self._number,
                    self._done,
                    self._total,
                    self._message,
                    self._rate(),
                    self._updated_at,
                    epoch_of(self._loop),
                )
            return self._snapshot

    def watch(self, *, after: int = 0) -> ProgressWatch:
        """Iterate over the newest snapshots: ``async for progress in task.progress.watch()``.

        It yields the current snapshot immediately, if there is one, then always the newest, and ends when the
        task has ended. Reports that arrive while the body of the loop is busy are not queued: to get at most
        ten per second, sleep 0.1 s in the body. There may be any number of watchers, and you may leave one at
        any moment, by ``break`` or by cancellation, without closing it. A task that watches itself waits
        forever.

        Args:
            after: The ``number`` of a snapshot you already have: it starts with the next one.

        Raises:
            WrongLoopError: The iteration runs in another event loop than the task.
        """
        return ProgressWatch(self, after)

    def end(self) -> None:
        """End all watchers; the library calls it when the task has ended."""
        with self._lock:
            self._ended = True
            waiters = self._take_waiters()
        self._wake(waiters)

    def __repr__(self) -> str:
        newest = self.snapshot()
        if newest is None:
            return "<TaskProgress without a report>"
        total = "?" if newest.total is None else newest.total
        return f"<TaskProgress {newest.done} of {total}, {newest.message!r}>"

    def _record(self, done: float, total: float | None, message: str | None) -> Waiters | None:
        """Store a report, under the lock; return the watchers to wake."""
        if self._ended:
            return None
        now = self._clock()
        if not self._number or done < self._done:
            self._since = self._mark = (now, done)
        elif now - self._mark[0] >= _RATE_SPAN:
            self._since, self._mark = self._mark, (now, done)
        self._done = done
        if total is not None:
            self._total = total
        if message is not None:
            self._message = message
        self._updated_at = now
        self._number += 1
        self._snapshot = None
        return self._take_waiters()

    def _rate(self) -> float | None:
        started_at, done = self._since
        seconds = self._updated_at - started_at
        return _finite((self._done - done) / seconds) if seconds > 0 else None

    def _take_waiters(self) -> Waiters | None:
        # Removed, so that they are woken once: of a thread's thousand reports, only the first calls the loop.
        waiters, self._waiters = self._waiters, None
        return waiters

    def _wake(self, waiters: Waiters | None) -> None:
        if not waiters:
            return
        if _get_running_loop() is self._loop:
            _release(waiters)
            return
        with suppress(RuntimeError):  # The loop is closed, and so are its waiters.
            self._loop.call_soon_threadsafe(_release, waiters)

    def _waiter_for_news(self, seen: int) -> asyncio.Future[None] | None:
        """Return a future that the next report after ``seen`` sets; None if that is there, or never comes."""
        with self._lock:
            if self._ended or self._number > seen:
                return None
            waiter: asyncio.Future[None] = self._loop.create_future()
            if self._waiters is None:
                self._waiters = {}
            self._waiters[waiter] = None
            return waiter

    def _forget(self, waiter: asyncio.Future[None]) -> None:
        with self._lock:
            if self._waiters is not None:
                self._waiters.pop(waiter, None)


class ProgressWatch(AsyncIterator[Progress]):
    """The result of ``watch()``: unlike an async generator, it needs no closing when its loop is left."""

    __slots__ = ("_closed", "_progress", "_seen", "_waiter")

    def __init__(self, progress: TaskProgress, after: int) -> None:
        self._progress = progress
        self._seen = after
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Progress:
        """Wait for a snapshot that is newer than the last one.

        Raises:
            WrongLoopError: It runs in another event loop than the task.

        Cancellation: ends the wait and leaves nothing behind; it can be called again.
        """
        progress = self._progress
        _check_loop(progress._loop)
        if self._seen:
            # Otherwise a thread that reports without pause would keep the loop in this one iteration.
            await asyncio.sleep(0)
        while not self._closed and (waiter := progress._waiter_for_news(self._seen)) is not None:
            self._waiter = waiter
            try:
                await waiter
            finally:
                self._waiter = None
                progress._forget(waiter)
        newest = progress.snapshot()
        if self._closed or newest is None or newest.number <= self._seen:
            self._closed = True
            raise StopAsyncIteration
        self._seen = newest.number
        return newest

    async def aclose(self) -> None:
        """End the iteration; a wait in another task ends immediately. Calling it is optional.

        Cancellation: it never waits.
        """
        self._closed = True
        if self._waiter is not None:
            _release({self._waiter: None})


def add_up(live: Iterable[Progress | None], ended: Iterable[tuple[int, float]]) -> GroupProgress:
    """Add up the reports of live tasks (None: no report), and the counts and amounts of ended ones."""
    tasks = reporting = unknown = count = 0
    done: float = 0
    totals: list[float] = []
    for progress in live:
        tasks += 1
        if progress is None:
            continue
        reporting += 1
        done += progress.done
        if progress.total is None:
            unknown += 1
        else:
            totals.append(progress.total)
    for number, amount in ended:
        count += number
        done += amount
        totals.append(amount)
    return GroupProgress(tasks, reporting, unknown, count, done, sum(totals) if totals else None)


def _release(waiters: Waiters) -> None:
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)


def _fraction(done: float, total: float | None) -> float | None:
    if total is None:
        return None
    return 1.0 if done >= total else done / total


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} must be a number, got {value!r}")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{what} must be a finite number, at least 0, got {value!r}")


def _check_loop(loop: asyncio.AbstractEventLoop) -> None:
    if _get_running_loop() is not loop:
        raise WrongLoopError(
            "a task's progress can only be watched in the task's own event loop: "
            "elsewhere, read task.progress.snapshot() or pass the snapshots on"
        )
