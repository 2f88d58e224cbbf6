"""ManagedTask: an asyncio.Task that knows its group, the cause of its cancellation, and its span.

A process may have many of these, so they are small: slots, and no ``__init__`` beside the one of C. The
status is derived when it is read. State that few tasks need is in an ``Extras`` object, which most tasks
never get.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from asyncio import Future, _get_running_loop
from threading import get_ident
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks._core.awaiters import WAITING, may_retrieve, waits
from otel_tasks._core.binding import intercepted, stopping
from otel_tasks._core.cancellation import cancel_once
from otel_tasks._core.causes import cause_elsewhere, cause_of_cancel, passed_down, passing
from otel_tasks._core.checks import checked_name
from otel_tasks._core.constructs import known_cause, name_of_timeout
from otel_tasks._core.coroutines import OwnCoroutine
from otel_tasks._core.current import set_managed_task
from otel_tasks._core.events import CancelCause, own_name
from otel_tasks._core.extras import Extras, extras_for, timeout_text
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
    from collections.abc import Callable, Sequence
    from contextvars import Context

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.places import Ticket
    from otel_tasks._core.progress import Progress
    from otel_tasks._core.telemetry import Span

T = TypeVar("T")


# The kinds that uncancellable() defers: a disconnect of the client, and the end of the request.
_HELD_BACK = frozenset({CancelKind.CLIENT_DISCONNECT, CancelKind.SCOPE_ENDED})

# Extras, progress, and uid are made on first use, from any thread: two threads must not make two of them.
_making = threading.RLock()


class ManagedTask(asyncio.Task[T]):
    """A task of a manager. Create it with ``create_task`` or ``start_task``, never directly.

    It is an ``asyncio.Task`` in all respects: ``await`` it, pass it to ``asyncio.wait``, or cancel it. As
    with any asyncio task, cancelling a task that awaits it cancels it too; ``manager.wait_for_task`` does not
    forward the cancellation.
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
    # Its key in the group's tables: its name, or an integer for a numbered task, see `names`.
    _key: str | int
    _priority: TaskPriority
    _created_at: float
    # Not set while the task is live.
    _ended_at: float
    _span: Span | None
    _cause: CancelCause | None
    _extras: Extras | None
    # How many done-callbacks belong to code that waits for the task, and so receives its failure. Other
    # callbacks are counted in the extras.
    _waiters: int

    @property
    def id(self) -> str:
        """The name, or ``group id/name`` in a scoped group: unique among the manager's live tasks."""
        return self._group._task_id(self.get_name())

    @property
    def uid(self) -> str:
        """An id that no other task ever has and that cannot be guessed: give this one to a client.

        It is made on first use. From then on, functions that take a task's name also take its uid, while the
        task is live or in the history.
        """
        return self._group._ledger.uids.of(self)

    @property
    def name(self) -> str:
        """The name, as ``get_name()`` returns it."""
        return self.get_name()

    @property
    def group(self) -> TaskGroup:
        """The group that the task was created in."""
        return self._group

    @property
    def priority(self) -> TaskPriority:
        """The priority, which decides its place in a queue."""
        return self._priority

    @property
    def created_at(self) -> float:
        """The time of its creation, on the clock of ``TaskInfo``."""
        return self._created_at

    @property
    def deadline(self) -> float | None:
        """The time at which its own ``timeout`` expires, on the clock of ``loop.time()``; None without one.

        It does not include the timeouts of groups, of a request, and of ``asyncio.timeout()`` blocks.

        Example:
            >>> left = task.deadline - asyncio.get_running_loop().time()
        """
        clock = self._group._ledger.home.other_clock
        return None if self._extras is None else self._extras.deadline(self, clock)

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata given at creation, in a dictionary of the task's own that you may change."""
        extras = extras_of(self)
        if extras.metadata is None:
            extras.metadata = {}
        return extras.metadata

    @property
    def progress(self) -> TaskProgress:
        """The progress: the task reports it with ``update`` or ``advance``, and others ``watch`` it."""
        return progress_of(self)

    @property
    def status(self) -> TaskStatus:
        """The current status, derived from the task itself."""
        if self.done():
            return final_status(self)
        if self.cancelling():
            return TaskStatus.CANCELLING
        return TaskStatus.RUNNING if has_started(self) else TaskStatus.PENDING

    @property
    def cause(self) -> CancelCause | None:
        """The cause of its cancellation; None without a cancel request."""
        return self._cause

    @property
    def cancel_ignored(self) -> bool:
        """True if the task was cancelled and completed anyway."""
        if not self.done() or self.cancelled() or failure_of(self) is not None:
            return False
        return self.cancelling() > 0 or timed_out(self)

    @property
    def trace_id(self) -> str | None:
        """The trace id in hex, as Jaeger shows it; None without tracing."""
        return span_ids(self._span)[0]

    def info(self) -> TaskInfo:
        """Take a snapshot; the task may be live or have ended."""
        group = self._group
        # Read once: the name of a request's group has to be looked up.
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
            _supervision=None if extras is None or extras.supervision is None else extras.supervision.info(),
            metadata=metadata,
            trace_id=trace_id,
            span_id=span_id,
            epoch=group._ledger.home.epoch,
            attempt=None if extras is None else extras.attempt_number,
            _result=result,
        )

    def stack(self) -> str:
        """Return the lines of a traceback that show where the task waits; empty once it is done."""
        worker = None if self._extras is None else self._extras.worker
        # For a function in a thread, the stack of that thread.
        return ("" if worker is None else worker.stack()) or stack_of(self)

    def cancel(self, msg: Any | None = None) -> bool:
        """Request cancellation, exactly as ``asyncio.Task.cancel`` does; from any thread.

        Args:
            msg: The reason; passed to the CancelledError, and recorded with the cause.

        Returns:
            False if the task has already ended. True means that cancellation is requested, not that the task
            has ended. A call from another thread schedules the request for the next turn of the loop.

        Telemetry: an event ``otel_tasks.cancel_requested`` on its span, which names the span that is current
        here, by a link or, if that is its parent, by attributes. None of these if the request comes from a
        bare loop callback, because ``asyncio.timeout`` and ``asyncio.TaskGroup`` inside the task cancel it
        for themselves that way; all of them if the callback is recognized as a construct of another task,
        such as its timeout.
        """
        if get_ident() != self._group._ledger.home.thread and _get_running_loop() is not self.get_loop():
            return _cancel_from_elsewhere(self, msg)
        if self.done():
            return False
        if stopping and intercepted(self, msg):
            # The cancellation is that of a request that awaits this task, and stops there.
            return True
        if _get_running_loop() is None:
            # As asyncio.run() does at its end.
            self._group._ledger.lost.note(self.get_loop())
        if not has_started(self):
            extras_of(self).never_ran = True
        cause, host = cause_of_cancel(self, msg)
        recorded = note_request(self, cause, is_own=host is self, message=msg)
        with passing(cause):
            requested = super().cancel(msg)
        if recorded:
            self._group._ledger.notify_cancelling(self)
        return requested

    def uncancel(self) -> int:
        """Withdraw one cancel request, as ``asyncio.Task.uncancel`` does, and with the last one the cause."""
        remaining = super().uncancel()
        if not remaining and self._cause is not None:
            extras_of(self).dropped = self._cause
            self._cause = None
        extras = self._extras
        if not remaining and extras is not None:
            extras.unrecorded = None
            # From Python 3.13 on, the task then runs; before, a cancel() before the first step stands.
            # asyncio's own attribute, 3.11 to 3.15.
            extras.never_ran = extras.never_ran and getattr(self, "_must_cancel", True)
        return remaining

    def get_name(self) -> str:
        """The name: unique among the live tasks of its scoped group, or of the manager."""
        # A task whose construction failed halfway has no key, and asyncio reads its name to report that.
        return full_name(super().get_name(), getattr(self, "_key", ""))

    def set_name(self, value: object) -> None:
        """Rename the task, in its group too; a name that is taken gets a number appended.

        Raises:
            ValueError: It is empty, longer than 200 characters, or contains ``#`` or a control character.
        """
        # C's __init__ sets the first name without this method.
        name = str(value)
        # Its current name need not pass the check: it may come from the library or from a function.
        if name != self.get_name():
            self._rename_to(checked_name("task", name))

    def _rename_to(self, name: str) -> None:
        self._key = name = self._group._rename(self, name)
        super().set_name(name)

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """As ``asyncio.Task.add_done_callback``; counted, to know whether a task waits for this one."""
        if context is None:
            # Not passed on: C takes an explicit None for a context, and then calls back in an arbitrary one.
            super().add_done_callback(fn)
        else:
            super().add_done_callback(fn, context=context)
        # The first is the wakeup of a task that awaits this one. A call here would cost 2 % of a task.
        if isinstance(getattr(fn, "__self__", None), Future) or getattr(fn, "__module__", 0) in WAITING:
            self._waiters += 1
        else:
            self._count_callback(fn, 1)
        extras = self._extras
        if extras is not None and extras.ticket is not None and extras.ticket.queue is not None:
            lift_for_waiter(self, extras.ticket)

    def remove_done_callback(self, fn: Callable[[Any], object], /) -> int:
        """As ``asyncio.Task.remove_done_callback``."""
        removed = super().remove_done_callback(fn)
        if removed:
            self._count_callback(fn, -removed)
        return removed

    def _count_callback(self, fn: object, count: int) -> None:
        if waits(fn):
            self._waiters += count
        elif may_retrieve(fn):
            extras_of(self).callbacks += count


def request_cancel(task: ManagedTask[Any], cause: CancelCause, text: str | None = None) -> bool:
    """Cancel a task on behalf of its group, its manager, or a shutdown; once, so that its cleanup can finish.

    Args:
        task: The task to cancel.
        cause: Recorded with the request.
        text: ``str(cause)``, from callers that cancel many tasks.

    Returns:
        True if this call has requested the cancellation.
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


def request_cancel_all(tasks: Sequence[ManagedTask[Any]], cause: CancelCause) -> int:
    """Cancel tasks in one pass, each as ``request_cancel`` does.

    Args:
        tasks: The tasks to cancel, all of one manager.
        cause: Recorded with each request.

    Returns:
        How many tasks had no cancel request before this call.
    """
    text = str(cause)
    requested = 0
    has_listeners = bool(tasks) and bool(tasks[0]._group._ledger.listeners.functions)
    coro: Any
    with passing(cause):
        for task in tasks:
            # The coroutine last: a task that ended in an eager first step has none, and reading it crashes
            # CPython 3.12 up to 3.12.4 (gh-122332). Such a task has extras while it is in a group.
            if (
                has_listeners
                or task._extras is not None
                or task._span is not None
                or task._cause is not None
                or type(coro := task.get_coro()) is not CoroutineType
                or not coro.cr_suspended
            ):
                requested += request_cancel(task, cause, text)
            else:
                # The same without what cannot matter to a suspended plain task. Most tasks are that, and this
                # takes a third of the time.
                task._cause = cause
                requested += asyncio_cancel(task, text)
    return requested


def _cancel_from_elsewhere(task: ManagedTask[Any], message: object) -> bool:
    """Schedule the cancellation of a task in its loop, with a cause from this thread."""
    if task.done():
        return False
    loop = task.get_loop()
    cause = cause_elsewhere(loop, None if message is None else str(message))

    def cancel() -> None:
        is_first = task._cause is None and not task.done()
        if is_first:
            record_cause(task, cause)
        with passing(cause):
            asyncio_cancel(task, message)
        if is_first:
            task._group._ledger.notify_cancelling(task)

    try:
        loop.call_soon_threadsafe(cancel)
    except RuntimeError:
        # The loop is closed: the task can neither be cancelled nor end.
        return False
    return True


# The variants for managed tasks of functions in modules that do not know them.
cancel_once.register(ManagedTask, request_cancel)
own_name.register(ManagedTask, ManagedTask.get_name)


@cancel_host.register(ManagedTask)
def _cancel_host(task: ManagedTask[Any], cause: CancelCause) -> None:
    # The block withdraws this request at its exit, so the task does not record it as its own cancellation.
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
    if extras is not None and extras.timeout is timeout:
        return timeout_text(extras)
    is_attempts = extras is not None and extras.attempt_timeout is timeout
    return "the attempt_timeout expired" if is_attempts else "an asyncio timeout expired"


def note_request(task: ManagedTask[Any], cause: CancelCause, *, is_own: bool, message: object) -> bool:
    """Record the cause of a cancel request, unless the task itself makes the request.

    Args:
        task: The task that is cancelled.
        cause: The cause.
        is_own: A construct inside the task makes the request, such as ``asyncio.timeout``, and withdraws it.
        message: The argument of ``cancel()``.

    Returns:
        True if the cause was recorded. Only the first one is, unless it was withdrawn.
    """
    requester = asyncio.current_task(task.get_loop())
    extras = task._extras
    if (
        task._cause is None
        and not is_own
        and (passed_down() is not None or _is_of_others(task, requester, cause))
    ):
        record_cause(task, cause)
        return True
    if requester is task and message is None and extras is not None and task._cause is None:
        # From 3.13 on, an asyncio.TaskGroup that fails in a task which is being cancelled calls uncancel()
        # and then cancel(). The cause is the same as before.
        task._cause, extras.dropped = extras.dropped, None
    if task._cause is None:
        extras = extras_of(task)
        extras.unrecorded = extras.unrecorded or cause
        # Kept here, because asyncio drops it at the end.
        extras.message = extras.message if message is None else str(message)
    return False


def _is_of_others(task: ManagedTask[Any], requester: asyncio.Task[Any] | None, cause: CancelCause) -> bool:
    """True for a request from outside the task; libraries cancel their own task from bare callbacks."""
    if requester is None:
        return cause.kind is not CancelKind.EXPLICIT
    return requester is not task


def record_cause(task: ManagedTask[Any], cause: CancelCause) -> None:
    """Record the cause of a cancel request, and add the request to the span."""
    task._cause = cause
    if not has_started(task):
        extras_of(task).never_ran = True
    if task._span is not None:
        note_cancel_requested(task._span, cause)


def with_predecessors(task: ManagedTask[Any]) -> tuple[asyncio.Task[Any], ...]:
    """A task and the tasks it still waits for: all must end before its successor starts."""
    return (task,) if task._extras is None else (task, *task._extras.previous)


def extras_of(task: ManagedTask[Any]) -> Extras:
    """Return a task's extras, made on first use."""
    if task._extras is None:
        with _making:
            if task._extras is None:
                task._extras = Extras()
    return task._extras


extras_for.register(ManagedTask, extras_of)


def progress_of(task: ManagedTask[Any]) -> TaskProgress:
    """Return a task's progress, made on first use."""
    extras = extras_of(task)
    if extras.progress is None:
        with _making:
            if extras.progress is None:
                extras.progress = TaskProgress(task.get_loop())
        if task.done():
            # Also if the task has ended while a thread was in this function: the done-callback saw no
            # progress.
            extras.progress.end()
    return extras.progress


def reported(task: ManagedTask[Any]) -> Progress | None:
    """The last progress report of a task; None before the first."""
    extras = task._extras
    return None if extras is None or extras.progress is None else extras.progress.snapshot()


def has_started(task: ManagedTask[Any]) -> bool:
    """Check whether a task has run any of its code, by its coroutine; True once it is done."""
    if task.done():
        # Before its coroutine is read: a task that ended in an eager first step has none, and reading it
        # crashes CPython 3.12 up to 3.12.4 (https://github.com/python/cpython/issues/122332).
        return True
    extras = task._extras
    return has_begun(task.get_coro() if extras is None or extras.inner is None else extras.inner)


def has_begun(coro: object) -> bool:
    """Check whether a coroutine has run any of its code."""
    if not isinstance(coro, CoroutineType):
        # Cython's coroutines and other Awaitables do not show their state.
        return not isinstance(coro, OwnCoroutine) or coro.has_begun
    return coro.cr_suspended or coro.cr_running or coro.cr_frame is None


def timed_out(task: ManagedTask[Any]) -> bool:
    """True if the task's own timeout has expired."""
    extras = task._extras
    if extras is None:
        return False
    return extras.queue_timed_out or (extras.timeout is not None and extras.timeout.expired())


def final_signal(task: ManagedTask[Any]) -> Signal:
    """Return the signal that a finished task ended with."""
    if task.cancelled():
        return Signal.UNWIND if task.cancelling() else Signal.FOREIGN_CANCEL
    return Signal.RETURN if failure_of(task) is None else Signal.RAISE


def final_status(task: ManagedTask[Any]) -> TaskStatus:
    """Look up the status of a finished task in the table."""
    before = TaskStatus.CANCELLING if task.cancelling() else TaskStatus.RUNNING
    return next_status(before, final_signal(task))


def outcome_of(task: ManagedTask[Any], status: TaskStatus) -> Outcome:
    """Return the outcome that the span of a finished task shows."""
    if status is TaskStatus.COMPLETED:
        return Outcome.SUCCESS
    if status is TaskStatus.CANCELLED:
        return Outcome.CANCELLED
    expired = timed_out(task) or (task._extras is not None and task._extras.attempt_timed_out)
    ran_out = expired and isinstance(failure_of(task), TimeoutError)
    return Outcome.TIMEOUT if ran_out else Outcome.ERROR


def cause_at_end(task: ManagedTask[Any], status: TaskStatus) -> CancelCause | None:
    """Return the recorded cause, or one derived from a finished task.

    A request that was not recorded has left its count and its message. Without a count, no request was made.
    """
    if timed_out(task) and task._extras is not None:
        return task._cause or CancelCause(CancelKind.TIMEOUT, timeout_text(task._extras))
    if task._cause is not None or status is not TaskStatus.CANCELLED:
        return task._cause
    if not task.cancelling():
        return CancelCause(CancelKind.FOREIGN, "a CancelledError without a cancel request")
    return CancelCause(CancelKind.EXPLICIT, None if task._extras is None else task._extras.message)


def settle_cause(task: ManagedTask[Any], status: TaskStatus) -> CancelCause | None:
    """Set the cause that a finished task keeps."""
    task._cause = cause = cause_at_end(task, status)
    return cause


def started_at(task: ManagedTask[Any], status: TaskStatus) -> float | None:
    """The time at which a task was scheduled or got its place; None if it has run none of its code."""
    extras = task._extras
    if status is TaskStatus.PENDING:
        return None
    if extras is None:
        return task._created_at
    if (extras.never_ran and status is not TaskStatus.COMPLETED) or extras.never_called:
        return None
    return task._created_at if extras.place_granted is None else extras.started_at


def runs_forever(task: ManagedTask[Any]) -> bool:
    """True for a service that does not end by itself, and for its attempts."""
    return task._extras is not None and task._extras.runs_forever


def queue_time(task: ManagedTask[Any]) -> float | None:
    """Seconds that an ended task waited for its place; None if it did not have to wait."""
    extras = task._extras
    if extras is None or extras.place_granted is None:
        return None
    return (task._ended_at if extras.started_at is None else extras.started_at) - task._created_at


def lift_for_waiter(task: ManagedTask[Any], ticket: Ticket) -> None:
    """Raise the priority of a queued task to that of the task that is about to wait for it."""
    waiter = asyncio.current_task(task.get_loop())
    if isinstance(waiter, ManagedTask):
        lift(ticket, waiter._priority)


def stack_of(task: asyncio.Task[Any]) -> str:
    """Return the lines of a traceback that show where a task, managed or not, waits; empty once it is done.

    asyncio's own ``print_stack`` shows only the outermost line of a waiting task.
    """
    frames = () if task.done() else suspended_frames(own_coroutine(task))
    return "".join(traceback.StackSummary.extract((frame, frame.f_lineno) for frame in frames).format())


def own_coroutine(task: asyncio.Task[Any]) -> Any:
    """Return the user's coroutine once it runs, without the wrapper of this package or of a task factory."""
    extras = task._extras if isinstance(task, ManagedTask) else None
    inner = None if extras is None else extras.inner
    runs = getattr(inner, "cr_suspended", False) or getattr(inner, "cr_running", False)
    return inner if runs else task.get_coro()
