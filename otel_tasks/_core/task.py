"""ManagedTask: an asyncio.Task that knows its group, its cause of cancellation and its span.

There is one of these for each piece of work, so it is kept lean: slots and no ``__init__`` of
its own (C's does the work), the status is derived when somebody asks, and what few tasks need
stands in one ``Extras`` object that most never get.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from asyncio import _get_running_loop
from dataclasses import replace
from secrets import token_urlsafe
from threading import get_ident
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks._core.binding import intercepted, stopping
from otel_tasks._core.cancellation import cancel_once
from otel_tasks._core.causes import cause_of_cancel, passed_down, passing
from otel_tasks._core.checks import checked_name
from otel_tasks._core.clock import clock_of
from otel_tasks._core.constructs import known_cause, name_of_timeout
from otel_tasks._core.current import set_managed_task
from otel_tasks._core.events import CancelCause, own_name
from otel_tasks._core.extras import Extras, timeout_text
from otel_tasks._core.frames import suspended_frames
from otel_tasks._core.info import NO_RESULT, TaskInfo
from otel_tasks._core.log import text_of
from otel_tasks._core.names import full_name
from otel_tasks._core.native import asyncio_cancel, failure_of
from otel_tasks._core.places import lift
from otel_tasks._core.progress import TaskProgress
from otel_tasks._core.scope import cancel_host
from otel_tasks._core.state import CancelKind, Outcome, Signal, TaskPriority, TaskStatus, next_status
from otel_tasks._core.telemetry import note_cancel_requested
from otel_tasks._core.telemetry.context import span_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextvars import Context

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.progress import Progress
    from otel_tasks._core.telemetry import Span

T = TypeVar("T")


# What uncancellable() holds off: a client that leaves, and the end of the request.
_HELD_BACK = frozenset({CancelKind.CLIENT_DISCONNECT, CancelKind.SCOPE_ENDED})

# A task's progress may be used from threads: two that come at once must not make two.
_making = threading.RLock()


class ManagedTask(asyncio.Task[T]):
    """A task of a manager; made by ``create_task`` and ``start_task``, never directly.

    It is an ``asyncio.Task`` in all respects: ``await`` it, pass it to ``asyncio.wait``,
    cancel it. Awaiting it forwards the awaiter's own cancellation to it, as for any asyncio
    task; ``manager.wait_for_task`` does not.
    """

    __slots__ = (
        "_cause",
        "_created_at",
        "_ended_at",
        "_extras",
        "_group",
        "_key",
        "_priority",
        "_span",
        "_waiters",
    )

    _group: TaskGroup
    # Its key in the group's tables: its name, or the number of one that was given none. Such a
    # name is made of the function's and the number when somebody asks for it: most are never
    # asked for theirs, and making it took 4 % of a task's instructions.
    _key: str | int
    _priority: TaskPriority
    _created_at: float
    # Set at the end only.
    _ended_at: float
    _span: Span | None
    _cause: CancelCause | None
    _extras: Extras | None
    # Done-callbacks of others: somebody who waits will be told of a failure.
    _waiters: int

    @property
    def id(self) -> str:
        """The name, or ``group id/name`` in a scoped group: unique among the manager's live tasks."""
        return self._group._task_id(self.get_name())

    @property
    def uid(self) -> str:
        """An id that no other task ever has, and that nobody can guess: hand this one to a client.

        It is made when it is first read. From then on the functions that take a name find the task by it too,
        as long as it is live or remembered.
        """
        return uid_of(self)

    @property
    def name(self) -> str:
        """The name, as ``get_name()``."""
        return self.get_name()

    @property
    def group(self) -> TaskGroup:
        """The group in which it was created."""
        return self._group

    @property
    def priority(self) -> TaskPriority:
        """How urgent it is."""
        return self._priority

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given at its creation, the task's own to add to."""
        extras = extras_of(self)
        if extras.metadata is None:
            extras.metadata = {}
        return extras.metadata

    @property
    def progress(self) -> TaskProgress:
        """Where it reports its progress, by ``update`` or ``advance``, and others ``watch`` it."""
        return progress_of(self)

    @property
    def status(self) -> TaskStatus:
        """Where it is in its life, derived from the task itself."""
        if self.done():
            return final_status(self)
        if self.cancelling():
            return TaskStatus.CANCELLING
        return TaskStatus.RUNNING if has_started(self) else TaskStatus.PENDING

    @property
    def cause(self) -> CancelCause | None:
        """Why it was or is being cancelled; None if nobody asked."""
        return self._cause

    @property
    def cancel_ignored(self) -> bool:
        """True if it was cancelled and completed all the same."""
        if not self.done() or self.cancelled() or failure_of(self) is not None:
            return False
        return self.cancelling() > 0 or timed_out(self)

    @property
    def trace_id(self) -> str | None:
        """Its trace in hex, as Jaeger shows it; None without tracing."""
        return span_ids(self._span)[0]

    def info(self) -> TaskInfo:
        """Take a snapshot, of a live task or one that has ended."""
        group = self._group
        # In one step: what a request's group is called has to be looked up.
        group_name, group_id, is_scoped = group._label or group._labels()
        name = self.get_name()
        status = self.status
        extras = self._extras
        error = failure_of(self) if status is TaskStatus.FAILED else None
        trace_id, span_id = span_ids(self._span)
        metadata: dict[str, Any] = {}
        progress = None
        result: Any = NO_RESULT
        if extras is not None:
            if extras.metadata is not None:
                metadata = dict(extras.metadata)
            if extras.progress is not None:
                progress = extras.progress.snapshot()
            if extras.keep_result and status is TaskStatus.COMPLETED:
                result = self.result()
        return TaskInfo(
            id=f"{group_id}/{name}" if is_scoped else name,
            uid=None if extras is None else extras.uid,
            name=name,
            group=group_name,
            group_id=group_id,
            priority=self._priority,
            status=status,
            created_at=self._created_at,
            started_at=started_at(self, status),
            ended_at=getattr(self, "_ended_at", None),
            error_type=None if error is None else type(error).__name__,
            error=None if error is None else text_of(error),
            cause=self._cause,
            cancel_ignored=self.cancel_ignored,
            progress=progress,
            metadata=metadata,
            trace_id=trace_id,
            span_id=span_id,
            epoch=group._ledger.home.epoch,
            _result=result,
        )

    def stack(self) -> str:
        """Say where it waits, as lines of a traceback; empty once it is done."""
        worker = None if self._extras is None else self._extras.worker
        # Of a function in a thread, where the thread is.
        return ("" if worker is None else worker.stack()) or stack_of(self)

    def cancel(self, msg: Any | None = None) -> bool:
        """Ask for its cancellation, exactly as ``asyncio.Task.cancel`` does; from any thread.

        Args:
            msg: The reason; handed to the CancelledError, and noted with the cause.

        Returns:
            False if it had ended already; True says asked for, not ended. From another thread
            the loop is told, and asks in its next turn.

        Telemetry: an event ``otel_tasks.cancel_requested`` on its span, and a link to the span
        that is current here. Neither if the request comes from a bare loop callback, unless that is
        known to be a timeout or the like of another task: ``asyncio.timeout`` and ``asyncio.TaskGroup``
        inside the task cancel it for themselves that way.
        """
        if get_ident() != self._group._ledger.home.thread and _get_running_loop() is not self.get_loop():
            return _cancel_from_elsewhere(self, msg)
        if stopping and intercepted(self, msg):
            # It came from a request that awaits this task, and stops there.
            return True
        if self.done():
            return False
        if _get_running_loop() is None:
            # As asyncio.run() does at its end.
            self._group._ledger.lost.note(self.get_loop())
        if not has_started(self):
            extras_of(self).never_ran = True
        cause, host = cause_of_cancel(self, msg)
        noted = note_request(self, cause, is_own=host is self, message=msg)
        with passing(cause):
            asked = super().cancel(msg)
        if noted:
            self._group._ledger.notify_cancelling(self)
        return asked

    def uncancel(self) -> int:
        """Take one request back, exactly as ``asyncio.Task.uncancel``; the last takes the cause with it."""
        remaining = super().uncancel()
        if not remaining and self._cause is not None:
            extras_of(self).dropped = self._cause
            self._cause = None
        extras = self._extras
        if not remaining and extras is not None:
            extras.unrecorded = None
            # From Python 3.13 on it then runs; before, a cancel() before the first step holds. asyncio's own
            # attribute, 3.11 to 3.15.
            extras.never_ran = extras.never_ran and getattr(self, "_must_cancel", True)
        return remaining

    def get_name(self) -> str:
        """The name: unique among the live tasks of its scoped group, or of the manager."""
        # Without a key where its making has failed halfway, and asyncio says so.
        return full_name(super().get_name(), getattr(self, "_key", ""))

    def set_name(self, value: object) -> None:
        """Rename it in its group too; a name that is taken gets a number behind it.

        Raises:
            ValueError: It is empty, longer than 200 characters, or contains ``#`` or a control character.
        """
        # C's __init__ sets the first name without coming here.
        name = str(value)
        # Its own may be one of the library's, or a function's.
        if name != self.get_name():
            self._rename_to(checked_name("task", name))

    def _rename_to(self, name: str) -> None:
        self._key = name = self._group._rename(self, name)
        super().set_name(name)

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """As ``asyncio.Task.add_done_callback``; counted, to know whether anybody waits."""
        if context is None:
            # Not handed on: C takes an explicit None for a context, and then calls back in a stranger's.
            super().add_done_callback(fn)
        else:
            super().add_done_callback(fn, context=context)
        self._waiters += waits(fn)
        if self._extras is not None and self._extras.place_granted is not None:
            lift_for_waiter(self, self._extras)

    def remove_done_callback(self, fn: Callable[[Any], object], /) -> int:
        """As ``asyncio.Task.remove_done_callback``."""
        removed = super().remove_done_callback(fn)
        self._waiters -= removed * waits(fn)
        return removed


def request_cancel(task: ManagedTask[Any], cause: CancelCause, text: str | None = None) -> bool:
    """Cancel a task on behalf of its group, its manager or a shutdown: once, so that clean-up is not torn.

    Args:
        task: Which.
        cause: Noted with it.
        text: ``str(cause)``, from callers that ask many.

    Returns:
        True if this call was the one that asked.
    """
    if task._cause is not None or task.done():
        return False
    extras = task._extras
    if extras is not None and extras.shields and cause.kind in _HELD_BACK:
        extras.deferred = extras.deferred or cause
        return False
    record_cause(task, cause)
    with passing(cause):
        asyncio_cancel(task, text or str(cause))
    task._group._ledger.notify_cancelling(task)
    return True


def request_cancel_all(tasks: Iterable[ManagedTask[Any]], cause: CancelCause, *, heard: bool) -> int:
    """Cancel tasks in one pass, as ``request_cancel`` each.

    Args:
        tasks: Which.
        cause: Noted with each.
        heard: Listeners have to hear of each.

    Returns:
        How many this call was the first to cancel.
    """
    text = str(cause)
    asked = 0
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
                # The same with what cannot matter to a plain task that waits left out: most are that, and
                # it takes a third of the time.
                task._cause = cause
                asked += asyncio_cancel(task, text)
    return asked


def _cancel_from_elsewhere(task: ManagedTask[Any], message: object) -> bool:
    """Have the loop of a task cancel it, for a cause of this thread."""
    if task.done():
        return False
    loop = task.get_loop()
    cause = cause_elsewhere(loop, None if message is None else str(message))

    def cancel() -> None:
        noted = task._cause is None and not task.done()
        if noted:
            record_cause(task, cause)
        with passing(cause):
            asyncio_cancel(task, message)
        if noted:
            task._group._ledger.notify_cancelling(task)

    try:
        loop.call_soon_threadsafe(cancel)
    except RuntimeError:
        # It is closed: the task can neither be cancelled nor end.
        return False
    return True


def cause_elsewhere(loop: asyncio.AbstractEventLoop, message: str | None) -> CancelCause:
    """Note a cause in a thread, on the clock of the loop that it is for."""
    return replace(CancelCause.make(CancelKind.EXPLICIT, message), at=clock_of(loop)())


# What modules that know nothing of managed tasks do with one.
cancel_once.register(ManagedTask, request_cancel)
own_name.register(ManagedTask, ManagedTask.get_name)


@cancel_host.register(ManagedTask)
def _cancel_host(task: ManagedTask[Any], cause: CancelCause) -> None:
    # The block takes it back at its exit: the task does not record it as a cancellation of its own.
    extras_of(task).unrecorded = cause
    asyncio_cancel(task, str(cause))


set_managed_task(ManagedTask)


@known_cause.register(ManagedTask)
def _known_cause(task: ManagedTask[Any]) -> CancelCause | None:
    if task._cause is not None or task._extras is None:
        return task._cause
    return task._extras.unrecorded


@name_of_timeout.register(ManagedTask)
def _name_of_timeout(task: ManagedTask[Any], timeout: asyncio.Timeout) -> str:
    extras = task._extras
    if extras is None or extras.timeout is not timeout:
        return "an asyncio timeout expired"
    return timeout_text(extras)


def note_request(task: ManagedTask[Any], cause: CancelCause, *, is_own: bool, message: object) -> bool:
    """Record why a task is being cancelled, if it is not the task itself that asks.

    Args:
        task: Which.
        cause: Why.
        is_own: A construct inside of the task asks, such as ``asyncio.timeout``, which takes it back.
        message: What ``cancel()`` was called with.

    Returns:
        True if the cause was recorded: the first one is, unless it was taken back.
    """
    asker = asyncio.current_task(task.get_loop())
    extras = task._extras
    if (
        task._cause is None
        and not is_own
        and (passed_down() is not None or _is_of_others(task, asker, cause))
    ):
        record_cause(task, cause)
        return True
    if asker is task and message is None and extras is not None and task._cause is None:
        # What asyncio.TaskGroup does from 3.13 on, when it fails in a task that is being
        # cancelled: uncancel() and cancel() again. The cause is the same as before.
        task._cause, extras.dropped = extras.dropped, None
    if task._cause is None:
        extras = extras_of(task)
        extras.unrecorded = extras.unrecorded or cause
        # asyncio forgets it at the end.
        extras.message = extras.message if message is None else str(message)
    return False


def _is_of_others(task: ManagedTask[Any], asker: asyncio.Task[Any] | None, cause: CancelCause) -> bool:
    """True for a request of others; libraries cancel the task in which they run from bare callbacks."""
    if asker is None:
        return cause.kind is not CancelKind.EXPLICIT
    return asker is not task


def record_cause(task: ManagedTask[Any], cause: CancelCause) -> None:
    """Write a cause beside the request, and the moment of it onto the span."""
    task._cause = cause
    if not has_started(task):
        extras_of(task).never_ran = True
    if task._span is not None:
        note_cancel_requested(task._span, cause)


def with_predecessors(task: ManagedTask[Any]) -> tuple[asyncio.Task[Any], ...]:
    """A task and those for which it still waits itself: what has to end before its successor begins."""
    return (task,) if task._extras is None else (task, *task._extras.previous)


def extras_of(task: ManagedTask[Any]) -> Extras:
    """Give a task's extras, made on first use."""
    if task._extras is None:
        with _making:
            if task._extras is None:
                task._extras = Extras()
    return task._extras


def progress_of(task: ManagedTask[Any]) -> TaskProgress:
    """Give a task's progress, made on first use."""
    extras = extras_of(task)
    if extras.progress is None:
        with _making:
            if extras.progress is None:
                extras.progress = TaskProgress(task.get_loop())
        if task.done():
            # Also where it ended while a thread was here: whoever takes the end has seen no progress.
            extras.progress.end()
    return extras.progress


def uid_of(task: ManagedTask[Any]) -> str:
    """Give a task's uid, made on first use."""
    extras = extras_of(task)
    if extras.uid is None:
        with _making:
            if extras.uid is None:
                # 128 bits: more than anybody can try. With a counter a client would know its neighbors'.
                uid = token_urlsafe(16)
                task._group._ledger.note_uid(task, uid)
                extras.uid = uid
        task._group._ledger.record_uid(task)
    return extras.uid


def reported(task: ManagedTask[Any]) -> Progress | None:
    """What a task has reported last, if it has."""
    extras = task._extras
    return None if extras is None or extras.progress is None else extras.progress.snapshot()


def has_started(task: ManagedTask[Any]) -> bool:
    """Tell by its coroutine whether a live task has run any of its code."""
    if task.done():
        # Before its coroutine is asked for: one that ended in an eager first step has none, and CPython
        # 3.12 up to 3.12.4 crashes (https://github.com/python/cpython/issues/122332).
        return True
    extras = task._extras
    return has_begun(task.get_coro() if extras is None or extras.inner is None else extras.inner)


def has_begun(coro: object) -> bool:
    """Tell whether a coroutine has run any of its code."""
    if not isinstance(coro, CoroutineType):
        # Cython's coroutines and other Awaitables do not show their state.
        return True
    return coro.cr_suspended or coro.cr_running or coro.cr_frame is None


def timed_out(task: ManagedTask[Any]) -> bool:
    """True if the task's own timeout has expired."""
    extras = task._extras
    if extras is None:
        return False
    return extras.queue_timed_out or (extras.timeout is not None and extras.timeout.expired())


def final_signal(task: ManagedTask[Any]) -> Signal:
    """Say by which signal a finished task ended."""
    if task.cancelled():
        return Signal.UNWIND if task.cancelling() else Signal.FOREIGN_CANCEL
    return Signal.RETURN if failure_of(task) is None else Signal.RAISE


def final_status(task: ManagedTask[Any]) -> TaskStatus:
    """Look the status of a finished task up in the table."""
    before = TaskStatus.CANCELLING if task.cancelling() else TaskStatus.RUNNING
    return next_status(before, final_signal(task))


def outcome_of(task: ManagedTask[Any], status: TaskStatus) -> Outcome:
    """Say how a finished task ended, in the words of its span."""
    if status is TaskStatus.COMPLETED:
        return Outcome.SUCCESS
    if status is TaskStatus.CANCELLED:
        return Outcome.CANCELLED
    ran_out = timed_out(task) and isinstance(failure_of(task), TimeoutError)
    return Outcome.TIMEOUT if ran_out else Outcome.ERROR


def cause_at_end(task: ManagedTask[Any], status: TaskStatus) -> CancelCause | None:
    """Give the noted cause, or the one that a finished task shows.

    A request that was not noted left its count and its message; without a count nobody asked.
    """
    if timed_out(task) and task._extras is not None:
        return task._cause or CancelCause(CancelKind.TIMEOUT, timeout_text(task._extras))
    if task._cause is not None or status is not TaskStatus.CANCELLED:
        return task._cause
    if not task.cancelling():
        return CancelCause(CancelKind.FOREIGN, "a CancelledError that nobody asked for")
    return CancelCause(CancelKind.EXPLICIT, None if task._extras is None else task._extras.message)


def settle_cause(task: ManagedTask[Any], status: TaskStatus) -> CancelCause | None:
    """Write the cause that a finished task keeps."""
    task._cause = cause = cause_at_end(task, status)
    return cause


def started_at(task: ManagedTask[Any], status: TaskStatus) -> float | None:
    """When it was handed to the loop, or got its place; None for one that has run none of its code."""
    extras = task._extras
    if status is TaskStatus.PENDING:
        return None
    if extras is None:
        return task._created_at
    if (extras.never_ran and status is not TaskStatus.COMPLETED) or extras.never_called:
        return None
    return task._created_at if extras.place_granted is None else extras.started_at


def runs_forever(task: ManagedTask[Any]) -> bool:
    """True for a service that does not end by itself, and its attempts."""
    return task._extras is not None and task._extras.runs_forever


def queue_time(task: ManagedTask[Any]) -> float | None:
    """Seconds for which an ended task waited for its place; None if it never had to."""
    extras = task._extras
    if extras is None or extras.place_granted is None:
        return None
    return (task._ended_at if extras.started_at is None else extras.started_at) - task._created_at


def waits(callback: object) -> bool:
    """Tell somebody who will be told of a failure from ``tasks.discard``, which keeps a set in order."""
    return not isinstance(getattr(callback, "__self__", None), set | list | dict)


def lift_for_waiter(task: ManagedTask[Any], extras: Extras) -> None:
    """Let a queued task count as urgent as the task that is about to wait for it."""
    waiter = asyncio.current_task(task.get_loop())
    if extras.ticket is not None and isinstance(waiter, ManagedTask):
        lift(extras.ticket, waiter._priority)


def stack_of(task: asyncio.Task[Any]) -> str:
    """Say where a task waits, managed or not, as lines of a traceback; empty once it is done.

    asyncio's own ``print_stack`` shows of a waiting task the outermost line alone.
    """
    frames = () if task.done() else suspended_frames(own_coroutine(task))
    return "".join(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames).format())


def own_coroutine(task: asyncio.Task[Any]) -> Any:
    """Give the user's coroutine once it runs, not what this package or a task factory wraps around it."""
    extras = task._extras if isinstance(task, ManagedTask) else None
    inner = None if extras is None else extras.inner
    runs = getattr(inner, "cr_suspended", False) or getattr(inner, "cr_running", False)
    return inner if runs else task.get_coro()


def shield(task: ManagedTask[Any]) -> None:
    """Hold back the end of its request from a task until ``unshield`` has been called as often."""
    extras_of(task).shields += 1


def is_shielded(task: ManagedTask[Any]) -> bool:
    """True while the end of its request is held back from a task."""
    return task._extras is not None and task._extras.shields > 0


def unshield(task: ManagedTask[Any]) -> None:
    """Let go of one shield; with the last one a cancellation that was held back is delivered."""
    extras = extras_of(task)
    extras.shields -= 1
    if not extras.shields and extras.deferred is not None:
        cause, extras.deferred = extras.deferred, None
        request_cancel(task, cause)
