"""Warnings about tasks in trouble while they run: ``manager.watch()``.

Rules, each with a test of its own:

1. A timer of the loop looks at tasks from outside: a task costs the same, watched or not. A scan runs in
   short batches, however many tasks there are.
2. Only another thread can see that the loop is held: ``watchdog``.
3. Each warning is logged once per task; that the loop is held in the same functions, once a minute. Of many
   tasks at a time, some are logged one by one and the rest are counted.
4. Nothing here holds a task for longer than a scan takes, and everything ends with the ``with`` block or the
   loop.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from contextvars import Context
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from otel_tasks._core.checks import checked_seconds
from otel_tasks._core.frames import Stacks
from otel_tasks._core.inspection import is_queued, place_of_task, request_of
from otel_tasks._core.log import TaskLogger, log_fields_of_all, logger
from otel_tasks._core.task import ManagedTask, has_started
from otel_tasks._core.task_tree import duration
from otel_tasks._core.watchdog import Watchdog
from otel_tasks.exceptions import WrongThreadError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_tasks._core.binding import RequestBinding
    from otel_tasks._core.tree import Ledger

# Tasks per batch, which takes about a tenth of a millisecond.
_BATCH = 500
# Tasks with the same trouble that one scan names; the others are counted.
_MAX_NAMED = 10
# With more live tasks, plain tasks are not scanned: asyncio lists all tasks in one go.
_MAX_LIVE = 10_000


class Watch:
    """Watches one manager, from the loop and from a thread.

    Args:
        ledger: The manager's records, bound to the loop that runs here.
        held: Seconds for which anything may hold the loop at a stretch.
        ignored: Seconds that a task may take to end after a cancel request.
        unstarted: Seconds in which a task must start if it does not wait for a place.
        outlived: Seconds for which a plain asyncio task may outlive the request that started it.

    None turns a warning off.
    """

    def __init__(
        self,
        ledger: Ledger,
        held: float | None,
        ignored: float | None,
        unstarted: float | None,
        outlived: float | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        scans = (ignored, unstarted, outlived) != (None, None, None)
        self._scan = HealthScan(ledger, loop, ignored, unstarted, outlived) if scans else None
        self._watchdog = None if held is None else Watchdog(ledger, loop, held)

    def start(self) -> None:
        """Start watching."""
        if self._watchdog is not None:
            self._watchdog.start()
        if self._scan is not None:
            self._scan.arm()

    def stop(self) -> None:
        """Stop watching."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._scan is not None:
            self._scan.stop()


def start_watch(
    ledger: Ledger,
    held: float | None,
    ignored: float | None,
    unstarted: float | None,
    outlived: float | None,
) -> ExitStack:
    """Watch a manager until the returned context manager is closed; see ``TaskManager.watch``."""
    bound = checked_seconds("held", held)
    if bound is not None and bound < 0.01:
        raise ValueError(f"held must be at least 0.01 seconds, got {held!r}: each check costs time")
    bounds = [
        checked_seconds(what, seconds)
        for what, seconds in (("ignored", ignored), ("unstarted", unstarted), ("outlived", outlived))
    ]
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise WrongThreadError(
            f"watch() of manager {ledger.name!r} was called where no event loop runs: "
            "call it in a coroutine, such as the application's lifespan"
        ) from None
    ledger.home.bind(loop)
    watch = Watch(ledger, bound, *bounds)
    end = ExitStack()
    end.callback(watch.stop)
    watch.start()
    return end


class HealthScan:
    """Looks at all live tasks from time to time, in the loop.

    Args:
        ledger: The manager's records.
        loop: The manager's loop.
        ignored: As for ``Watch``; at least one of the three is a number.
        unstarted: As for ``Watch``.
        outlived: As for ``Watch``.
    """

    def __init__(
        self,
        ledger: Ledger,
        loop: asyncio.AbstractEventLoop,
        ignored: float | None,
        unstarted: float | None,
        outlived: float | None,
    ) -> None:
        self._ledger = ledger
        self._loop = loop
        self._checks: list[_Check] = []
        if ignored is not None:
            self._checks.append(_IgnoredCancels(ledger, ignored))
        if unstarted is not None:
            self._checks.append(_Unstarted(ledger, unstarted))
        self._strays = None if outlived is None else _Strays(ledger, loop, outlived)
        # A warning comes at most half of its bound late, and there is a pause between any two scans.
        shortest = min(bound for bound in (ignored, unstarted, outlived) if bound is not None)
        self._pause = min(5.0, max(0.05, shortest / 2))
        # The next scan, or the next batch.
        self._handle: asyncio.Handle
        self._stopped = False

    def arm(self) -> None:
        """Scan after the pause."""
        # An empty context: the current one may be that of a request.
        self._handle = self._loop.call_later(self._pause, self._begin, context=Context())

    def stop(self) -> None:
        """Stop scanning."""
        self._stopped = True
        self._handle.cancel()

    def _begin(self) -> None:
        # In the next turn: tasks that were created while the loop was held run their first step in this one.
        self._schedule(self._every_live(), [[] for _ in self._checks])

    def _schedule(self, *state: Any) -> None:
        self._handle = self._loop.call_soon(self._scan_batch, *state, context=Context())

    def _scan_batch(self, tasks: Iterator[ManagedTask[Any]], found: list[list[ManagedTask[Any]]]) -> None:
        """Look at some tasks, and at the next ones in the next turn."""
        if self._stopped or self._ledger.home.loop is not self._loop:
            return
        now = self._ledger.home.clock()
        batch = list(islice(tasks, _BATCH))
        for check, troubled in zip(self._checks, found, strict=True):
            troubled += [task for task in batch if check.finds(task, now)]
        if len(batch) == _BATCH:
            self._schedule(tasks, found)
            return
        for check, troubled in zip(self._checks, found, strict=True):
            check.report(troubled, now)
        if self._strays is not None:
            self._strays.search(now)
        self.arm()

    def _every_live(self) -> Iterator[ManagedTask[Any]]:
        root = self._ledger.root
        # The root's table has the tasks of all labeled groups.
        yield from list(root._live.values())
        for group in root._below():
            if group.scoped:
                yield from list(group._live.values())


# -- what it looks for ----------------------------------------------------------------------------


class _Check:
    """Finds one kind of trouble, and reports each task once.

    Args:
        ledger: The manager's records.
        bound: Seconds after which it is trouble.
    """

    def __init__(self, ledger: Ledger, bound: float) -> None:
        self._ledger = ledger
        self._bound = bound
        self._reported: WeakSet[ManagedTask[Any]] = WeakSet()

    def finds(self, task: ManagedTask[Any], now: float) -> bool:
        """True if a task is in trouble that was not reported."""
        return self._is_overdue(task, now) and self._is_in_trouble(task) and task not in self._reported

    def report(self, tasks: list[ManagedTask[Any]], now: float) -> None:
        """Log some of these tasks one by one, and the number of the others."""
        for task in tasks[:_MAX_NAMED]:
            self._report_one(task, now)
        self._reported.update(tasks)
        rest = tasks[_MAX_NAMED:]
        if rest:
            self._report_rest(rest)

    def _is_overdue(self, task: ManagedTask[Any], now: float) -> bool:
        raise NotImplementedError

    def _is_in_trouble(self, task: ManagedTask[Any]) -> bool:
        raise NotImplementedError

    def _report_one(self, task: ManagedTask[Any], now: float) -> None:
        raise NotImplementedError

    def _report_rest(self, tasks: list[ManagedTask[Any]]) -> None:
        raise NotImplementedError


class _IgnoredCancels(_Check):
    """Finds tasks that still run long after a cancel request."""

    def _is_overdue(self, task: ManagedTask[Any], now: float) -> bool:
        cause = task._cause
        return cause is not None and cause.at is not None and now - cause.at >= self._bound

    def _is_in_trouble(self, task: ManagedTask[Any]) -> bool:
        return not task.done() and task.cancelling() > 0

    def _report_one(self, task: ManagedTask[Any], now: float) -> None:
        cause = task.cause
        TaskLogger(task).warning(
            "task %s still runs %s after its cancellation was requested (%s)%s",
            task,
            "some time" if cause is None or cause.at is None else duration(now - cause.at),
            cause,
            _clause(task, self._ledger),
        )

    def _report_rest(self, tasks: list[ManagedTask[Any]]) -> None:
        logger.warning(
            "%d more tasks still run after their cancellation was requested",
            len(tasks),
            extra=log_fields_of_all(tasks),
        )


class _Unstarted(_Check):
    """Finds tasks that have not started long after their creation."""

    def _is_overdue(self, task: ManagedTask[Any], now: float) -> bool:
        return now - task._created_at >= self._bound

    def _is_in_trouble(self, task: ManagedTask[Any]) -> bool:
        # A queued task waits for its turn, and a cancelled one for its CancelledError.
        return not (has_started(task) or is_queued(task) or task.cancelling())

    def _report_one(self, task: ManagedTask[Any], now: float) -> None:
        previous = () if task._extras is None else task._extras.previous
        names = ", ".join(repr(other.get_name()) for other in previous if not other.done())
        TaskLogger(task).warning(
            "task %s was created %s ago and has not started%s",
            task,
            duration(now - task._created_at),
            f": it waits until {names} has ended" if names else "",
        )

    def _report_rest(self, tasks: list[ManagedTask[Any]]) -> None:
        logger.warning("%d more tasks have not started", len(tasks), extra=log_fields_of_all(tasks))


class _Strays:
    """Finds plain tasks that outlive the request that started them (Python 3.12).

    Args:
        ledger: The manager's records.
        loop: The manager's loop.
        bound: Seconds for which they may.
    """

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop, bound: float) -> None:
        self._ledger = ledger
        self._loop = loop
        self._bound = bound
        self._reported: set[str] = set()
        # The times at which they were first seen to outlive their requests.
        self._since: WeakKeyDictionary[asyncio.Task[Any], float] = WeakKeyDictionary()

    def search(self, now: float) -> None:
        """Look at all tasks of the loop, unless there are very many."""
        if self._ledger.live > _MAX_LIVE:
            return
        for task in asyncio.all_tasks(self._loop):
            request = None if isinstance(task, ManagedTask) else request_of(task)
            if request is not None and request.closed:
                self._check(task, request, now)

    def _check(self, task: asyncio.Task[Any], request: RequestBinding, now: float) -> None:
        seconds = now - self._since.setdefault(task, now)
        function = getattr(task.get_coro(), "__qualname__", "?")
        if seconds < self._bound or function in self._reported:
            return
        self._reported.add(function)
        logger.warning(
            "asyncio task %r (%s) was started in request %r and still runs %s after the request ended%s; "
            "create_task() would have ended it with the request",
            task.get_name(),
            function,
            request.name,
            duration(seconds),
            _clause(task, self._ledger),
        )


def _clause(task: asyncio.Task[Any], ledger: Ledger) -> str:
    return place_of_task(task, Stacks(), ledger.home.thread).clause()
