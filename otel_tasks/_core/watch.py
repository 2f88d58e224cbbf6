"""Warnings about tasks in trouble while they run: ``manager.watch()``.

Rules, each with a test of its own:

1. A timer of the loop looks at tasks from outside: a task pays nothing, watched or not. A look is taken in
   short parts, however many tasks there are.
2. Only another thread can see that the loop is held. It keeps asking the loop for an answer; if none comes in
   time, it looks where the loop's thread is.
3. Each warning is given once per task; that the loop is held in the same functions, once a minute. Of many
   tasks at a time, some are logged one by one and the rest are counted.
4. Nothing here keeps a task longer than a look takes, and everything ends with the ``with`` block or the
   loop.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextvars import Context
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from otel_tasks._core.binding import current_binding
from otel_tasks._core.frames import Stacks, place_of
from otel_tasks._core.inspection import duration, in_words, known_as, place_of_task
from otel_tasks._core.log import log_fields, log_fields_of_all, logger
from otel_tasks._core.task import ManagedTask, has_started, own_coroutine, snapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType

    from otel_tasks._core.ledger import Ledger

# Tasks that are looked at in one go: about a tenth of a millisecond.
_PART = 500
# Warnings of one kind that one look writes one by one.
_ONE_BY_ONE = 10
# Looking for plain tasks takes asyncio one go through all there are.
_TOO_MANY = 10_000
# Seconds between two warnings that the loop is held in the same functions.
_QUIET = 60.0
# How often the loop is asked for an answer in the time that it may take for it.
_PINGS = 4


def _code_between() -> CodeType | None:
    """What stands between asyncio's loop and a callback from another thread alone: from Python 3.14 on."""
    method = getattr(vars(asyncio.events).get("_ThreadSafeHandle"), "_run", None)
    return getattr(method, "__code__", None)


_BETWEEN = _code_between()


class Watch:
    """Watches one manager, in the loop and from a thread.

    Args:
        ledger: The manager's records, bound to the loop that runs here.
        held: Seconds for which the loop may be held in one go.
        ignored: Seconds that a task may take to end after a cancel request.
        unstarted: Seconds in which a task must start if it does not wait for a place.
        outlived: Seconds for which a plain asyncio task may outlive the request that started it.

    None is not to look for that.
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
        bounds = [bound for bound in (ignored, unstarted, outlived) if bound is not None]
        self._look = HealthScan(ledger, loop, bounds, ignored, unstarted, outlived) if bounds else None
        self._watchdog = None if held is None else Watchdog(ledger, loop, held)

    def start(self) -> None:
        """Begin to look."""
        if self._watchdog is not None:
            self._watchdog.start()
        if self._look is not None:
            self._look.arm()

    def stop(self) -> None:
        """Look no more."""
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._look is not None:
            self._look.stop()


class HealthScan:
    """A look at all live tasks from time to time, by the loop."""

    def __init__(
        self,
        ledger: Ledger,
        loop: asyncio.AbstractEventLoop,
        bounds: list[float],
        ignored: float | None,
        unstarted: float | None,
        outlived: float | None,
    ) -> None:
        self._ledger = ledger
        self._loop = loop
        self._ignored = ignored
        self._unstarted = unstarted
        self._outlived = outlived
        # Nothing is told later than half of its bound after it, nor is it looked for without a pause.
        self._pause = min(5.0, max(0.05, min(bounds) / 2))
        # The next look, or the next part of one.
        self._handle: asyncio.Handle
        self._stopped = False
        self._told_ignored: WeakSet[ManagedTask[Any]] = WeakSet()
        self._told_unstarted: WeakSet[ManagedTask[Any]] = WeakSet()
        self._told_outlived: set[str] = set()
        # Since when each is known to outlive its request.
        self._strays: WeakKeyDictionary[asyncio.Task[Any], float] = WeakKeyDictionary()

    def arm(self) -> None:
        """Take a look after the pause."""
        # An empty context: otherwise it would be that of the request that started the watch.
        self._handle = self._loop.call_later(self._pause, self._begin, context=Context())

    def stop(self) -> None:
        """Look no more."""
        self._stopped = True
        self._handle.cancel()

    def _begin(self) -> None:
        # In the next turn: tasks that were created while the loop was held are still to run in this one.
        self._soon(self._every_live(), [], [])

    def _soon(self, *state: Any) -> None:
        self._handle = self._loop.call_soon(self._part, *state, context=Context())

    def _part(
        self,
        tasks: Iterator[ManagedTask[Any]],
        ignoring: list[ManagedTask[Any]],
        unstarted: list[ManagedTask[Any]],
    ) -> None:
        """Look at some tasks, and at the next ones in the next turn."""
        if self._stopped or self._ledger.loop is not self._loop:
            return
        now = self._ledger.clock()
        part = list(islice(tasks, _PART))
        for task in part:
            if self._ignores(task, now):
                ignoring.append(task)
            elif self._has_not_begun(task, now):
                unstarted.append(task)
        if len(part) == _PART:
            self._soon(tasks, ignoring, unstarted)
            return
        self._tell_of_ignoring(ignoring, now)
        self._tell_of_unstarted(unstarted, now)
        if self._outlived is not None and self._ledger.live <= _TOO_MANY:
            self._look_for_strays(self._outlived, now)
        self.arm()

    def _every_live(self) -> Iterator[ManagedTask[Any]]:
        root = self._ledger.root
        # The root's table has the tasks of all labeled groups.
        yield from list(root._live.values())
        for group in root._below():
            if group.scoped:
                yield from list(group._live.values())

    # -- what is wrong ----------------------------------------------------------------------

    def _ignores(self, task: ManagedTask[Any], now: float) -> bool:
        cause = task._cause
        if self._ignored is None or cause is None or cause.at is None or now - cause.at < self._ignored:
            return False
        return not task.done() and task.cancelling() > 0 and task not in self._told_ignored

    def _has_not_begun(self, task: ManagedTask[Any], now: float) -> bool:
        if self._unstarted is None or now - task._created_at < self._unstarted or has_started(task):
            return False
        # One in a queue waits for its turn, and a request for its end is on its way to one that is cancelled.
        waits = task._extras is not None and task._extras.queued
        return not (waits or task.done() or task.cancelling() or task in self._told_unstarted)

    def _look_for_strays(self, patience: float, now: float) -> None:
        """Look for plain tasks that were started in a request which is over (Python 3.12 on)."""
        for task in asyncio.all_tasks(self._loop):
            request = None if isinstance(task, ManagedTask) else request_of(task)
            if request is None or not request.closed:
                continue
            since = self._strays.setdefault(task, now)
            function = getattr(task.get_coro(), "__qualname__", "?")
            if now - since >= patience and function not in self._told_outlived:
                self._told_outlived.add(function)
                logger.warning(
                    "asyncio task %r (%s) was started in request %r and still runs %s after its end%s; "
                    "create_task() would have ended it with the request",
                    task.get_name(),
                    function,
                    request._name(),
                    duration(now - since),
                    self._at(task),
                )

    # -- telling ----------------------------------------------------------------------------

    def _tell_of_ignoring(self, tasks: list[ManagedTask[Any]], now: float) -> None:
        for task in tasks[:_ONE_BY_ONE]:
            cause = task._cause
            logger.warning(
                "task %r was asked to end %s ago (%s) and still runs%s",
                task.id,
                "some time" if cause is None or cause.at is None else duration(now - cause.at),
                cause,
                self._at(task),
                extra=log_fields(snapshot(task)),
            )
        self._told_ignored.update(tasks)
        rest = [task.id for task in tasks[_ONE_BY_ONE:]]
        if rest:
            logger.warning(
                "%d more tasks were asked to end and still run", len(rest), extra=log_fields_of_all(rest)
            )

    def _tell_of_unstarted(self, tasks: list[ManagedTask[Any]], now: float) -> None:
        for task in tasks[:_ONE_BY_ONE]:
            previous = () if task._extras is None else task._extras.previous
            names = ", ".join(repr(other.get_name()) for other in previous if not other.done())
            logger.warning(
                "task %r was created %s ago and has run none of its code%s",
                task.id,
                duration(now - task._created_at),
                f": it waits for the end of {names}" if names else "",
                extra=log_fields(snapshot(task)),
            )
        self._told_unstarted.update(tasks)
        rest = [task.id for task in tasks[_ONE_BY_ONE:]]
        if rest:
            logger.warning(
                "%d more tasks have run none of their code", len(rest), extra=log_fields_of_all(rest)
            )

    def _at(self, task: asyncio.Task[Any]) -> str:
        return in_words(place_of_task(task, Stacks(), self._ledger.thread))


class Watchdog(threading.Thread):
    """A thread that sees when the loop is held."""

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop, held: float) -> None:
        super().__init__(name=f"otel_tasks watch {ledger.name}", daemon=True)
        self._ledger = ledger
        self._loop = loop
        self._held = held
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._told: WeakSet[asyncio.Task[Any]] = WeakSet()
        # When the same functions were told of last.
        self._last: dict[frozenset[CodeType], float] = {}
        # Of the loop's thread, as of its last answer: which it is, how many frames are below a callback, and
        # the code of the one that has called it.
        self._thread = ledger.thread
        self._depth = 0
        self._caller: CodeType | None = None

    def stop(self) -> None:
        """End it, soon."""
        self._stopped.set()
        self._answered.set()

    def run(self) -> None:
        """Ask the loop for an answer until it is closed, or the watch is over."""
        pause = self._held / _PINGS
        while True:
            self._answered.clear()
            began = time.monotonic()
            if self._stopped.wait(pause):
                return
            # Late itself: code in C has let no other thread run, and is where it was called just now.
            late = time.monotonic() - began > pause + self._held
            told = self._tell() if late else None
            try:
                self._loop.call_soon_threadsafe(self._answer, context=Context())
            except RuntimeError:
                # It is closed.
                return
            if told is not None or not self._answered.wait(self._held):
                self._wait_for_answer(began, told)

    def _answer(self) -> None:
        frame, depth = sys._getframe().f_back, 0
        self._caller = None if frame is None else frame.f_code
        while frame is not None:
            depth += frame.f_code is not _BETWEEN
            frame = frame.f_back
        self._thread, self._depth = threading.get_ident(), depth
        self._answered.set()

    def _wait_for_answer(self, began: float, told: str | None) -> None:
        # What comes next in the same stretch is the same trouble.
        told = told or self._tell()
        while not (self._stopped.is_set() or self._loop.is_closed() or self._answered.wait(self._held)):
            told = told or self._tell()
        if told is not None and not self._stopped.is_set():
            seconds = duration(time.monotonic() - began)
            logger.info("the event loop goes on: it was held for %s by %s", seconds, told)

    def _tell(self) -> str | None:
        """Say in the log what holds the loop; returns who it is, None if nothing was said."""
        if not self._loop.is_running() or self._stopped.is_set():
            return None
        task = asyncio.current_task(self._loop)
        frames = self._frames(task)
        place = place_of(frames, home=isinstance(task, ManagedTask))
        if self._answered.is_set() or (task is None and place.at is None):
            # It went on just now; or it waits, and the whole process had no time for it.
            return None
        who = "a callback" if task is None else described(task)
        if self._is_known(task, frozenset(frame.f_code for frame in frames)):
            return None
        logger.warning(
            "%s has held the event loop for more than %s%s",
            who,
            duration(self._held),
            in_words(place),
            extra=log_fields(snapshot(task)) if isinstance(task, ManagedTask) else None,
        )
        return who

    def _frames(self, task: asyncio.Task[Any] | None) -> list[FrameType]:
        stacks = Stacks()
        if task is not None:
            return stacks.of_task(task, self._thread, own_coroutine)
        # What runs the loop is no part of the callback.
        frames = [frame for frame in stacks.of_thread(self._thread) if frame.f_code is not _BETWEEN]
        frames = frames[max(0, self._depth - 1) :]
        return frames[1:] if frames and frames[0].f_code is self._caller else []

    def _is_known(self, task: asyncio.Task[Any] | None, functions: frozenset[CodeType]) -> bool:
        """True if this task, or another in the same functions, was told of; else it is noted."""
        now = time.monotonic()
        self._last = {key: then for key, then in self._last.items() if now - then < _QUIET}
        if functions in self._last or (task is not None and task in self._told):
            return True
        self._last[functions] = now
        if task is not None:
            self._told.add(task)
        return False


def described(task: asyncio.Task[Any]) -> str:
    """Say which task it is; of a plain one, as that of a request's handler, in which request."""
    request = None if isinstance(task, ManagedTask) else request_of(task)
    return f"task {known_as(task)!r}" + ("" if request is None else f" of request {request._name()!r}")


def request_of(task: asyncio.Task[Any]) -> Any:
    """The request in which a plain task was started; None for none, and in Python 3.11."""
    get_context = getattr(task, "get_context", None)
    bound = None if get_context is None else get_context().get(current_binding)
    # The middleware is above this module. What it binds is a request, or a group where work has left one.
    return bound if hasattr(bound, "closed") else None
