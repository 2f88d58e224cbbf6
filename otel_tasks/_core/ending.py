"""How a task ends: its status, counters, history, and span, and the one that learns of a failure.

One done-callback takes the end of every task, from the finished task itself: a task that is cancelled before
its first step runs none of its code, a wrapper's ``finally`` included.
"""

from __future__ import annotations

from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from otel_tasks._core.factory import end_like
from otel_tasks._core.log import log_fields, logger
from otel_tasks._core.native import base_name, failure_of
from otel_tasks._core.records import Counters, KeptResult, without_frames
from otel_tasks._core.state import Outcome, TaskStatus
from otel_tasks._core.task import (
    ManagedTask,
    extras_of,
    final_status,
    has_begun,
    outcome_of,
    queue_time,
    settle_cause,
)
from otel_tasks._core.telemetry import end_span, metrics_internal, note_cancel_requested
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_tasks._core.extras import Extras
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.progress import TaskProgress
    from otel_tasks._core.telemetry import SpanContext
    from otel_tasks._core.tree import Ledger

# By name: asking an enumeration for a member takes as long as calling a method, before Python 3.12.
_SUCCESS, _CANCELLED = Outcome.SUCCESS, Outcome.CANCELLED


class Ending(Counters):
    """Takes the end of each task of one manager.

    Args:
        ledger: The manager's.
        on_error: Called with a failure that nobody waits for; None logs it.
    """

    def __init__(self, ledger: Ledger, on_error: Callable[[TaskInfo, BaseException], object] | None) -> None:
        super().__init__()
        self._ledger = ledger
        self._on_error = on_error
        # Read for every task, hence not looked up in the ledger each time; `moved` renews the clock.
        self._clock = ledger.home.clock
        self._telemetry = ledger.telemetry
        self._remember = ledger.history.add
        self._listeners = ledger.listeners.functions

    def on_done(self, task: ManagedTask[Any]) -> None:
        task._ended_at = ended_at = self._clock()
        cause = task._cause
        if (
            task._extras is not None
            or self._listeners
            or task._exception is not None
            # One whose cancel() has left no cause has extras, see `note_request`.
            or task.cancelled() is (cause is None)
        ):
            self._on_special_end(task)
            return
        # The fast path to the same records, for plain tasks that returned or were cancelled, in a third of
        # the time. `_ended_at` above is the task's own, written here for the same reason.
        group = task._group
        key = task._key
        try:
            label = group._label or group._labels()
            if cause is None:
                self.completed += 1
            else:
                self.count_cancelled(label[0], cause)
            ids = None
            # Looked at before asking, as at the beginning.
            if (
                not self._telemetry.is_global
                or metrics_internal._METER_PROVIDER is not None
                or task._span is not None
            ):
                ids = self._report_end(task, _SUCCESS if cause is None else _CANCELLED)
            self._remember(
                (base_name(task), key, label, task._priority, task._created_at, ended_at, cause, ids)
            )
        finally:
            # As `Node._remove`, without the call, which takes 5 % of a task's instructions. The entry may be
            # another's: a name is free as soon as its task is done.
            names = group._names
            if names.get(key) is task:
                del names[key]
            if group._is_one_table:
                if not names:
                    group._emptied()
            else:
                group._remove(task)

    def use_clock(self, clock: Callable[[], float]) -> None:
        """Take the times of the tasks that end from now on from this clock."""
        self._clock = clock

    def abandon(self, task: ManagedTask[Any]) -> None:
        """Give up on a task that would not stop: its span ends here, so that it is not lost."""
        if task._span is not None:
            now = self._clock()
            try:
                end_span(
                    task._span, Outcome.ABANDONED, None, task._cause, ignored=task.cancelling() > 0, now=now
                )
            except Exception:
                self._ledger.log_once("telemetry of task %r raised", task.id)

    def lose(self, tasks: Iterable[ManagedTask[Any]]) -> None:
        """Let go of tasks whose loop was closed under them: they can never end."""
        for task in tasks:
            if task.done():
                # It had ended in time, and only its done-callback was never called.
                self.on_done(task)
                continue
            self.abandon(task)
            for future in extras_of(task).futures:
                future.refuse(WrongLoopError(f"the event loop of task {task.id!r} was closed under it"))
            self.count_lost()
            if task._extras is not None:
                task._extras.close()
            task._group._lose(task)

    def _on_special_end(self, task: ManagedTask[Any]) -> None:
        try:
            self._record(task)
        finally:
            extras = task._extras
            if extras is not None and extras.progress is not None:
                _end_progress(task, extras.progress)
            if extras is not None and extras.ticket is not None:
                self._ledger.places.give_back(extras.ticket)
            # Out of the group last: whoever waits for that finds the records complete.
            task._group._remove(task)

    def _record(self, task: ManagedTask[Any]) -> None:
        status = final_status(task)
        error = failure_of(task) if status is TaskStatus.FAILED else None
        settle_cause(task, status)
        ignored = self._count(task, status)
        if task._extras is not None:
            _close_unstarted(task, task._extras, status)
        info = task.info()
        self._remember_ended(task, info, error)
        self._report_end(task, outcome_of(task, status), error, ignored=ignored)
        if error is not None and not task._group._child_failed(task, error):
            self._report_failure(task, info, error)
        if self._listeners:
            self._ledger.listeners.notify("ended", info)

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
                    extra=log_fields(task.info()),
                )
            return ignored
        if status is TaskStatus.FAILED:
            self.failed += 1
            return False
        self.count_cancelled(task._group.name, task._cause)
        return False

    def _remember_ended(self, task: ManagedTask[Any], info: TaskInfo, error: BaseException | None) -> None:
        if task._extras is None or not task._extras.keep_result:
            self._remember(info)
            return
        self._remember(KeptResult(info, None if error is None else without_frames(error)))

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
                self._ledger.log_once("telemetry of task %r raised", task.id)
        if self._telemetry.metered():
            seconds = task._ended_at - task._created_at
            try:
                self._telemetry.record(base_name(task), task._group.name, outcome, error, seconds, span)
            except Exception:
                self._ledger.log_once("telemetry of task %r raised", task.id)
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
        if self._on_error is not None:
            try:
                copy_context().run(self._on_error, info, error)
            except Exception:
                logger.exception(
                    "on_error of manager %r raised and is dropped", self._ledger.name, extra=log_fields(info)
                )
                self._on_error = None
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


def _end_progress(task: ManagedTask[Any], progress: TaskProgress) -> None:
    progress.end()
    last = progress.snapshot()
    if last is not None:
        task._group._keep_progress(1, last.done)


def _close_unstarted(task: ManagedTask[Any], extras: Extras, status: TaskStatus) -> None:
    """End what a task had begun that never got as far as its own code."""
    if extras.begin is not None and extras.started_at is None:
        # Cancelled while it waited for a place: its span is all of its life, in one.
        (extras.context or Context()).run(extras.begin, task, False)
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
