"""The book-keeping that all groups of one manager share: loop, counters, history, listeners.

It takes the end of every task, in one done-callback, from the finished task itself: a task
that is cancelled before its first step runs none of its code, a wrapper's ``finally`` included.
"""

from __future__ import annotations

import asyncio
import itertools
from asyncio import _get_running_loop
from collections import deque
from contextlib import suppress
from contextvars import Context, copy_context
from threading import get_ident
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from weakref import WeakValueDictionary

from otel_tasks._core.causes import passing
from otel_tasks._core.clock import clock_of, epoch_of, monotonic, reads_loop_time
from otel_tasks._core.closing import Shutdown, Shutdowns
from otel_tasks._core.factory import end_like, holder_of
from otel_tasks._core.log import log_fields, logger
from otel_tasks._core.places import Limiter, Ticket, adopt, release, set_limit
from otel_tasks._core.records import Ending, History, without_frames
from otel_tasks._core.state import Outcome, TaskStatus
from otel_tasks._core.task import (
    Extras,
    ManagedTask,
    asyncio_cancel,
    base_name,
    cause_at_end,
    extras_of,
    failure_of,
    final_status,
    has_begun,
    outcome_of,
    queue_time,
    request_cancel,
    snapshot,
)
from otel_tasks._core.telemetry import (
    Telemetry,
    end_span,
    low_cardinality,
    metrics_internal,
    note_cancel_requested,
    note_started,
)
from otel_tasks._core.tree import emptied
from otel_tasks.exceptions import ManagerClosedError, WrongLoopError, WrongThreadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from otel_tasks._core.cancellation import CancelCause
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.progress import TaskProgress
    from otel_tasks._core.task import TaskInfo
    from otel_tasks._core.telemetry import SpanContext
    from otel_tasks._core.threads import Threads

# Stands where no loop may be: get_running_loop() gives None outside of one.
_NO_LOOP: object = object()

# By name: asking an enumeration for a member takes as long as calling a method, before Python 3.12.
_SUCCESS, _CANCELLED = Outcome.SUCCESS, Outcome.CANCELLED

TaskEvent = Literal["created", "dequeued", "cancelling", "ended"]


class TaskStats(NamedTuple):
    """Counters since the manager was made; they outlive the history.

    ``created == live + completed + failed + cancelled`` at any moment.

    Attributes:
        created: Tasks created.
        live: Tasks that have not ended.
        completed: Tasks that returned.
        failed: Tasks that raised, timeouts included.
        cancelled: Tasks that ended cancelled.
        cancel_ignored: Of the completed ones, those that were cancelled and completed all the same.
        queued: Of the live ones, those that wait for a place.
        remembered: Ended tasks that the history holds now.
    """

    created: int
    live: int
    completed: int
    failed: int
    cancelled: int
    cancel_ignored: int
    queued: int
    remembered: int

    def to_dict(self) -> dict[str, int]:
        """Give the counters as JSON-ready data."""
        return self._asdict()


class LossReport(Protocol):
    """Reports the tasks that can never end; ``lost`` implements it."""

    def watch_exit(self) -> None:
        """Report when the process ends."""
        ...

    def note(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note that a task is being cancelled while its loop does not run."""
        ...

    def report(self) -> None:
        """Report every live task."""
        ...


class Ledger:
    """The books of one manager."""

    def __init__(
        self,
        name: str,
        telemetry: Telemetry,
        history: int,
        on_error: Callable[[TaskInfo, BaseException], object] | None,
        limiter: Limiter,
        ageing: float,
        eager_start: bool,
        threads: Threads,
    ) -> None:
        self.name = name
        self.telemetry = telemetry
        self.on_error = on_error
        self.root: TaskGroup
        self.manager: TaskManager
        # The manager's own limit; without one it is there all the same, and asked nothing.
        self.limiter = limiter
        self.ageing = ageing
        self.eager_start = eager_start
        self.threads = threads
        # Labelled groups with a limit of their own.
        self.limited: set[TaskGroup] = set()
        # Who waits for room in a queue, first come first; and the one that was woken for it.
        self.waiting_producers: deque[tuple[TaskGroup, asyncio.Future[None]]] = deque()
        self._woken: asyncio.Future[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        # The same while nothing but the global telemetry can make a plain task special; see `settle`.
        self.fast_path_loop: Any = _NO_LOOP
        # What has the loop's task factory as its attribute `_task_factory`.
        self.factories: Any
        # True once somebody has chosen a name that a numbered one may come to have.
        self.lookalikes = False
        # The thread in which that loop runs.
        self.thread: int | None = None
        self.shutdowns = Shutdowns()
        # Whether it is shut down in that loop.
        self.closed = False
        self.lost: LossReport
        # What a line of code calls the manager.
        self.in_code = "manager"
        # That of the loop, for every timestamp and duration of this manager.
        self.clock: Callable[[], float] = monotonic
        # The same where it is not the loop's time(), on which deadlines are; else None.
        self.other_clock: Callable[[], float] | None = None
        # The wall-clock time at which it was 0, in seconds since 1970.
        self.epoch = epoch_of(None)
        # Labelled groups: weak, so that an emptied one costs nothing.
        self.labels: WeakValueDictionary[str, TaskGroup] = WeakValueDictionary()
        # Tasks whose uid somebody has asked for; weak, as one that has ended is in the history.
        self.uids: WeakValueDictionary[str, ManagedTask[Any]] = WeakValueDictionary()
        # Open scoped groups by their number.
        self.scopes: dict[int, TaskGroup] = {}
        # The innermost scoped group that is open in a task: `async with` inside `async with` nests.
        self.hosts: dict[asyncio.Task[Any], TaskGroup] = {}
        self.listeners: list[Callable[[TaskEvent, TaskInfo], object]] = []
        self.created = 0
        self.completed = 0
        self.failed = 0
        self.cancelled = 0
        self.cancel_ignored = 0
        self.cancelled_by: dict[tuple[str, str], int] = {}
        # Group, cause and key of the last one counted there: of many cancelled at a time it is the same.
        self._counted: tuple[str, CancelCause | None, tuple[str, str]] = ("", None, ("", ""))
        self.history = History(history)
        self.remember = self.history.add
        self._logged_once = False
        # A number that no other task or group of this manager has. In one step: threads make groups too.
        self.next_number = itertools.count(1).__next__
        # Bound once: each task's list of callbacks then holds the same object.
        self.on_done = self._take_end
        # Where it runs, for one task after another: nobody's. Not one for all managers: a context
        # that two threads enter at a time refuses the second.
        self.context = Context()

    # -- the loop ---------------------------------------------------------------------------

    def enter(self) -> asyncio.AbstractEventLoop:
        """Check that a task may be created here, and give the loop to create it in.

        Raises:
            WrongThreadError: No loop runs in this thread.
            WrongLoopError: Tasks are live in another loop.
            ManagerClosedError: The manager is shut down.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongThreadError(
                f"manager {self.name!r} creates tasks in a running event loop, and none runs in this thread: "
                "write create_task_threadsafe(...), or call it from a coroutine"
            ) from None
        if loop is not self.loop:
            self.bind(loop)
        self._check_open()
        return loop

    @property
    def closed_here(self) -> bool:
        """Whether it is shut down in the running loop; where none runs, in the loop to which it belongs."""
        loop = _get_running_loop()
        if loop is None or loop is self.loop:
            return self.closed
        return self.shutdowns.of(loop) is not None

    def _check_open(self) -> None:
        if self.closed:
            shutdown = None if self.loop is None else self.shutdowns.of(self.loop)
            by = "shutdown()" if shutdown is None else shutdown.by
            raise ManagerClosedError(
                f"manager {self.name!r} was shut down by {by} and takes no new tasks in this event loop: "
                "create them before that, or open it again with async with"
            )

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to ``loop`` from now on, which runs in this thread.

        Raises:
            WrongLoopError: Tasks are live in another loop that is not closed.
        """
        if self.loop is loop:
            self.thread = get_ident()
            return
        if self.live and self.loop is not None:
            if not self.loop.is_closed():
                raise WrongLoopError(
                    f"manager {self.name!r} has {self.live} live tasks in another event loop: "
                    "use one TaskManager per loop, hand the work over with create_task_threadsafe(...), "
                    "or shut it down there first"
                )
            self._drop_dead()
        self._belong_to(loop)
        self.thread = get_ident()

    def meet(self, loop: asyncio.AbstractEventLoop) -> None:
        """Belong to ``loop``, unless tasks are live in another one; it may run in another thread."""
        if self.loop is loop or (self.live and self.loop is not None and not self.loop.is_closed()):
            return
        if _get_running_loop() is loop:
            self.bind(loop)
            return
        if self.live:
            self._drop_dead()
        self._belong_to(loop)
        self.thread = None
        with suppress(RuntimeError):  # Closed just now: no thread runs it any more.
            loop.call_soon_threadsafe(self.bind, loop, context=Context())

    def is_open_in(self, loop: asyncio.AbstractEventLoop) -> bool:
        """True if ``loop`` has not shut the manager down, and no other loop that is open has it."""
        here = self.loop is None or self.loop is loop or self.loop.is_closed()
        return here and self.shutdowns.of(loop) is None

    def look(self) -> None:
        """Belong to the loop that runs here, if one does, and no live task is in another one."""
        loop = _get_running_loop()
        if loop is not None:
            self.meet(loop)

    def _belong_to(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.factories = holder_of(loop)
        shutdown = self.shutdowns.of(loop)
        was_closed, self.closed = self.closed, shutdown is not None
        if shutdown is not None:
            self.root._signal_cancel(shutdown.cause)
        elif was_closed:
            self._forget_causes()
        self.update_fast_path()
        self.clock = clock_of(loop)
        self.epoch = epoch_of(loop)
        self.history.change_epoch(self.epoch)
        self.other_clock = None if reads_loop_time(loop) else self.clock
        self.threads.bind(loop)
        self.telemetry.observe(self)
        self.lost.watch_exit()

    def now(self) -> float:
        """Read the clock, for those that outlive a change of the loop."""
        return self.clock()

    def update_fast_path(self) -> None:
        """Decide anew whether plain tasks may take the short way: one word to look at, not four for each.

        To be called when what it looks at has changed.
        """
        special = self.closed or self.listeners or self.limiter.limit is not None
        self.fast_path_loop = _NO_LOOP if special or self.loop is None else self.loop

    def close(self, by: str, cause: CancelCause) -> None:
        """Take no new tasks in this loop from now on."""
        self.closed = True
        if self.loop is not None:
            self.shutdowns.add(self.loop, Shutdown(by, cause))
        self.update_fast_path()

    def listen(self, listener: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Tell ``listener`` of what happens to tasks."""
        self.listeners.append(listener)
        self.update_fast_path()

    def unlisten(self, listener: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Tell it no more; raises ValueError if it was not told."""
        self.listeners.remove(listener)
        self.update_fast_path()

    def note_name(self, name: str) -> None:
        """Note that a task is going to have this name."""
        if name[-1].isdecimal():
            self.lookalikes = True

    def note_uid(self, task: ManagedTask[Any], uid: str) -> None:
        """Have a task found by its uid from now on."""
        self.uids[uid] = task

    def record_uid(self, task: ManagedTask[Any]) -> None:
        """Have the record of a task found by its uid, if the task has ended before it got one."""
        loop = self.elsewhere()
        if loop is None:
            self._record_uid(task)
        else:
            with suppress(RuntimeError):  # It is closed: nothing ends in it any more.
                loop.call_soon_threadsafe(self._record_uid, task, context=Context())

    def _record_uid(self, task: ManagedTask[Any]) -> None:
        if task.done():
            self.history.note_uid(snapshot(task))

    def by_uid(self, uid: str) -> ManagedTask[Any] | None:
        """The live task of this uid."""
        task = self.uids.get(uid)
        return task if task is not None and task._group._live.get(task._key) is task else None

    def elsewhere(self) -> asyncio.AbstractEventLoop | None:
        """The loop, if this is another thread than its own; None here, or before there is one."""
        if get_ident() == self.thread or _get_running_loop() is self.loop:
            return None
        return self.loop

    def loop_for_others(self) -> asyncio.AbstractEventLoop:
        """The loop to which a thread may hand over a task.

        Raises:
            ManagerClosedError: The manager is shut down.
            WrongLoopError: There is none, or it is closed.
        """
        self._check_open()
        if self.loop is None or self.loop.is_closed():
            raise WrongLoopError(
                f"manager {self.name!r} runs in no event loop by now: enter it there with async with, "
                "or create a first task there"
            )
        return self.loop

    def _drop_dead(self) -> None:
        """Let go of tasks whose loop was closed under them: they can never end."""
        tasks = list(self.root._every_live())
        if not self.closed:
            self.lost.report()
        for task in tasks:
            if task.done():
                # It had ended in time, and only its done-callback was never called.
                self._take_end(task)
                continue
            self.abandon(task)
            for future in extras_of(task).futures:
                future.refuse(WrongLoopError(f"the event loop of task {task.id!r} was closed under it"))
            self.failed += 1
            if task._extras is not None:
                task._extras.close()
            task._group._queued = 0
            if task._group._limiter is not None:
                task._group._limiter.clear()
            task._group._remove(task)
        self.limiter.clear()
        self.scopes.clear()
        self.hosts.clear()
        self.waiting_producers.clear()
        self._woken = None

    def scope(self, group_id: str) -> TaskGroup | None:
        """The open scoped group with this id; what is before the ``#`` may have changed since."""
        number = group_id.rpartition("#")[2]
        # Bounded: int() refuses very long ones, and the id may come from a client.
        return self.scopes.get(int(number)) if number.isdecimal() and len(number) < 19 else None

    # -- cancelling -------------------------------------------------------------------------

    def ask_all(self, tasks: Iterable[ManagedTask[Any]], cause: CancelCause) -> int:
        """Cancel tasks in one pass, each once; returns how many were newly asked."""
        text = str(cause)
        asked = 0
        heard = bool(self.listeners)
        coro: Any
        with passing(cause):
            for task in tasks:
                # The coroutine last: one that ended in an eager first step has none, and CPython 3.12 up
                # to 3.12.4 crashes (gh-122332). It has extras as long as it is here.
                if (
                    heard
                    or task._extras is not None
                    or task._span is not None
                    or task._cause is not None
                    or type(coro := task.get_coro()) is not CoroutineType
                    or not coro.cr_suspended
                ):
                    asked += request_cancel(task, cause, text)
                else:
                    # The same with what cannot matter to a plain task that waits left out: most
                    # are that, and it is a third of the time.
                    task._cause = cause
                    asked += asyncio_cancel(task, text)
        return asked

    def cancelling(self, task: ManagedTask[Any]) -> None:
        """Tell the listeners that a task's cancellation was asked for."""
        if self.listeners:
            self.notify("cancelling", snapshot(task))

    def reopen(self) -> None:
        """Take new tasks in this loop again after a shutdown."""
        self.closed = False
        if self.loop is not None:
            self.shutdowns.forget(self.loop)
        self._forget_causes()
        self.update_fast_path()

    def _forget_causes(self) -> None:
        for group in [self.root, *self.labels.values()]:
            group._cause = None

    # -- counting ---------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """How many tasks have not ended."""
        return self.created - self.completed - self.failed - self.cancelled

    def stats(self) -> TaskStats:
        """Read all counters."""
        return TaskStats(
            self.created,
            self.live,
            self.completed,
            self.failed,
            self.cancelled,
            self.cancel_ignored,
            sum(group._queued for group in self.root._below()),
            len(self.history),
        )

    def active(self) -> Mapping[tuple[str, str], int]:
        """Live tasks by group and state; read on the metric reader's thread, hence the copies."""
        # Lists made in one step each: groups come and go on the loop's thread meanwhile.
        labels = [group for link in self.labels.valuerefs() if (group := link()) is not None]
        sizes = [(group, len(group._live)) for group in [*labels, *list(self.scopes.values())]]
        # The root's table is the name space of all labelled groups, too.
        labelled = sum(size for group, size in sizes if not group.scoped)
        sizes.append((self.root, max(0, len(self.root._live) - labelled)))
        counts: dict[tuple[str, str], int] = {}
        for group, size in sizes:
            name = low_cardinality(group.name)
            counts[name, "active"] = counts.get((name, "active"), 0) + size - group._queued
            if self.limiter.limit is not None or group._limiter is not None:
                counts[name, "queued"] = counts.get((name, "queued"), 0) + group._queued
        return counts

    # -- places -----------------------------------------------------------------------------

    def give_back(self, ticket: Ticket) -> None:
        """Take back a task's places, or its claim to them, and let others start."""
        if ticket.queue is not None:
            ticket.payload[0]._queued -= 1
        self.open_gates(release(ticket))
        self.wake_producer()

    def open_gates(self, ready: Iterable[Ticket]) -> None:
        """Let the tasks of these tickets begin; one that was cancelled meanwhile ends by itself."""
        for ticket in ready:
            group, extras = ticket.payload
            group._queued -= 1
            if not extras.place_granted.done():
                extras.place_granted.set_result(None)

    def dequeued(self, task: ManagedTask[Any], waited: float) -> None:
        """Note that a task which had to wait for its place has got it and begins."""
        try:
            if task._span is not None:
                note_started(task._span)
            if self.telemetry.metered():
                self.telemetry.record_queue(task._group.name, int(task._priority), waited)
        except Exception:
            self.log_once("telemetry of task %r raised", task.id)
        if self.listeners:
            self.notify("dequeued", snapshot(task))

    def drop_queue(self, tasks: Iterable[ManagedTask[Any]], cause: CancelCause) -> None:
        """Cancel those that wait for a place, and wake who waits for room: nobody gets any more."""
        waiting = [task for task in tasks if task._extras is not None and task._extras.queued]
        self.ask_all(waiting, cause)
        self.wake_producer()

    def change_limit(self, limiter: Limiter, limit: int | None) -> None:
        """Set a limit anew and let those start for whom there is room now."""
        self.open_gates(set_limit(limiter, limit))
        self.update_fast_path()
        self.wake_producer()

    def adopt(self, tasks: Iterable[ManagedTask[Any]], limiter: Limiter, *, before: bool) -> None:
        """Count tasks that are live already for a limiter that was not there when they came."""
        for task in tasks:
            if task.done():
                continue
            extras = extras_of(task)
            if extras.supervises:
                continue
            if extras.ticket is None:
                now = task._created_at
                extras.ticket = Ticket((), task._priority, now, self.ageing, (task._group, extras))
                extras.ticket.started = True
            if limiter not in extras.ticket.limiters:
                adopt(extras.ticket, limiter, before=before)

    @property
    def line_is_busy(self) -> bool:
        """True if somebody waits for room, or was woken for it and has not taken it yet."""
        return bool(self.waiting_producers) or self._woken is not None

    def putter_left(self, waiter: asyncio.Future[None]) -> None:
        """Take one out of the line of those who wait for room: woken, or cancelled."""
        if self._woken is waiter:
            self._woken = None
        else:
            line = [entry for entry in self.waiting_producers if entry[1] is not waiter]
            self.waiting_producers.clear()
            self.waiting_producers.extend(line)

    def wake_producer(self) -> None:
        """Wake the first in line who gets room now, or never will.

        One at a time: what it leaves over is the next one's, whom it wakes when it is done.
        """
        if not self.waiting_producers or self._woken is not None:
            return
        for entry in self.waiting_producers:
            group, waiter = entry
            if not group._stands_in_line() and not waiter.done():
                self.waiting_producers.remove(entry)
                self._woken = waiter
                waiter.set_result(None)
                return

    # -- the end of a task ------------------------------------------------------------------

    def _take_end(self, task: ManagedTask[Any]) -> None:
        task._ended_at = ended_at = self.clock()
        cause = task._cause
        if (
            task._extras is not None
            or self.listeners
            or task._exception is not None
            or (not task.cancelled() if cause is not None else task.cancelling() or task.cancelled())
        ):
            self._take_story(task)
            return
        # A shorter way to the same books for plain tasks that returned, or were cancelled by somebody,
        # in a third of the time.
        group = task._group
        key = task._key
        try:
            label = group._label or group._labels()
            if cause is None:
                self.completed += 1
            else:
                self._count_cancelled(label[0], cause)
            ids = None
            # Looked at before asking, as at the beginning.
            if (
                not self.telemetry.is_global
                or metrics_internal._METER_PROVIDER is not None
                or task._span is not None
            ):
                ids = self._report_end(task, _SUCCESS if cause is None else _CANCELLED)
            self.remember(
                (base_name(task), key, label, task._priority, task._created_at, ended_at, cause, ids)
            )
        finally:
            # As `_remove`. Its entry may be another's by now: a name is free as soon as its task is done.
            names = group._names
            if names.get(key) is task:
                del names[key]
            live = group._live
            if live is not names and live.get(key) is task:
                del live[key]
            if not live:
                emptied(group)

    def _end_progress(self, group: TaskGroup, progress: TaskProgress) -> None:
        progress.end()
        last = progress.snapshot()
        if last is not None:
            group._keep_progress(1, last.done)

    def _take_story(self, task: ManagedTask[Any]) -> None:
        try:
            self._write_story(task)
        finally:
            extras = task._extras
            if extras is not None and extras.progress is not None:
                self._end_progress(task._group, extras.progress)
            if extras is not None and extras.ticket is not None:
                self.give_back(extras.ticket)
            # Out of the group last: whoever waits for that finds the books in order.
            task._group._remove(task)

    def _write_story(self, task: ManagedTask[Any]) -> None:
        status = final_status(task)
        error = failure_of(task) if status is TaskStatus.FAILED else None
        task._cause = cause_at_end(task, status)
        ignored = self._count(task, status)
        if task._extras is not None:
            self._close_unstarted(task, task._extras, status)
        info = snapshot(task)
        self._remember(task, info, error)
        self._report_end(task, outcome_of(task, status), error, ignored=ignored)
        if error is not None and not task._group._child_failed(task, error):
            self._report_failure(task, info, error)
        if self.listeners:
            self.notify("ended", info)

    def _count(self, task: ManagedTask[Any], status: TaskStatus) -> bool:
        if status is TaskStatus.COMPLETED:
            self.completed += 1
            ignored = task.cancel_ignored
            if ignored:
                self.cancel_ignored += 1
                logger.warning(
                    "task %r ignored its cancellation (%s) and completed",
                    task.id,
                    task._cause,
                    extra=log_fields(snapshot(task)),
                )
            return ignored
        if status is TaskStatus.FAILED:
            self.failed += 1
            return False
        self._count_cancelled(task._group.name, task._cause)
        return False

    def _count_cancelled(self, group: str, cause: CancelCause | None) -> None:
        self.cancelled += 1
        if cause is None:
            return
        if self._counted[0] is not group or self._counted[1] is not cause:
            self._counted = (group, cause, (low_cardinality(group), str(cause.kind)))
        key = self._counted[2]
        self.cancelled_by[key] = self.cancelled_by.get(key, 0) + 1

    def _close_unstarted(self, task: ManagedTask[Any], extras: Extras, status: TaskStatus) -> None:
        """End what a task had begun that never got as far as its own code."""
        if extras.begin is not None and extras.started_at is None:
            # Cancelled while it waited for a place: its span is all of its life, in one.
            (extras.context or Context()).run(extras.begin, task)
            if task._span is not None and task._cause is not None:
                note_cancel_requested(task._span, task._cause)
        if extras.made is not None:
            extras.made.coro.close()
            if extras.made.shadow is not None:
                end_like(extras.made.shadow, task)
        if extras.inner is not None:
            if status is not TaskStatus.COMPLETED:
                extras.never_ran = not has_begun(extras.inner)
            # A wrapper that never ran leaves the user's coroutine behind, unawaited.
            extras.inner.close()

    def _report_end(
        self,
        task: ManagedTask[Any],
        outcome: Outcome,
        error: BaseException | None = None,
        *,
        ignored: bool = False,
    ) -> SpanContext | None:
        """End the task's span and record its duration, each for itself; gives the span's identity."""
        span = task._span
        ids = None
        if span is not None:
            try:
                ids = end_span(
                    span,
                    outcome,
                    error,
                    task._cause,
                    ignored=ignored,
                    now=task._ended_at,
                    queued=queue_time(task),
                )
            except Exception:
                self.log_once("telemetry of task %r raised", task.id)
        if self.telemetry.metered():
            seconds = task._ended_at - task._created_at
            try:
                self.telemetry.record(base_name(task), task._group.name, outcome, error, seconds, span)
            except Exception:
                self.log_once("telemetry of task %r raised", task.id)
        return ids

    def _report_failure(self, task: ManagedTask[Any], info: TaskInfo, error: BaseException) -> None:
        awaited = task._extras is not None and any(future.awaited for future in task._extras.futures)
        if task._waiters or awaited or not getattr(task, "_log_traceback", True):
            # Somebody will be told; if they never look, asyncio logs it as for any task.
            return
        # Marks it as retrieved, else asyncio would report it a second time.
        task.exception()
        if isinstance(error, SystemExit | KeyboardInterrupt):
            # It passes through the loop to whoever runs it.
            return
        if self.on_error is not None:
            try:
                copy_context().run(self.on_error, info, error)
            except Exception:
                logger.exception(
                    "on_error of manager %r raised and is dropped", self.name, extra=log_fields(info)
                )
                self.on_error = None
            else:
                return
        trace_id = task.trace_id
        logger.error(
            "task %r failed and nobody awaits it%s",
            task.id,
            f" (trace {trace_id})" if trace_id else "",
            exc_info=error,
            extra=log_fields(info),
        )

    def abandon(self, task: ManagedTask[Any]) -> None:
        """Give up on a task that would not stop: its span ends here, so that it is not lost."""
        if task._span is not None:
            now = self.clock()
            try:
                end_span(
                    task._span, Outcome.ABANDONED, None, task._cause, ignored=task.cancelling() > 0, now=now
                )
            except Exception:
                self.log_once("telemetry of task %r raised", task.id)

    def _remember(self, task: ManagedTask[Any], info: TaskInfo, error: BaseException | None) -> None:
        if task._extras is None or not task._extras.keep_result:
            self.history.add(info)
            return
        self.history.add(Ending(info, None if error is None else without_frames(error)))

    # -- listeners --------------------------------------------------------------------------

    def notify(self, event: TaskEvent, info: TaskInfo) -> None:
        """Call the listeners; one that raises is logged and dropped."""
        for listener in list(self.listeners):
            try:
                # In a copy: what one sets in its context is not to be seen by the next.
                copy_context().run(listener, event, info)
            except Exception:
                logger.exception("listener %r raised and is dropped", listener, extra=log_fields(info))
                if listener in self.listeners:
                    self.unlisten(listener)

    def log_once(self, message: str, *args: object) -> None:
        """Log the exception in hand, the first time only: a broken exporter breaks no task."""
        if not self._logged_once:
            self._logged_once = True
            logger.exception(message + "; further ones are not logged", *args)
