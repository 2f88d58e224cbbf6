"""How a task ends: its status, counters, history, and span, and who is notified of a failure.

One done-callback records the end of every task, from the finished task. A wrapper's ``finally`` would miss
some: a task that is cancelled before its first step runs no code at all.
"""

from __future__ import annotations

from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any

from otel_tasks._core.factory import end_like
from otel_tasks._core.frames import exc_info_of
from otel_tasks._core.log import TaskLogger
from otel_tasks._core.native import base_name, failure_of, is_cancelled
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
from otel_tasks._core.telemetry import end_span, note_cancel_requested
from otel_tasks.exceptions import WrongLoopError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_tasks._core.extras import Extras
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.progress import TaskProgress
    from otel_tasks._core.telemetry import Span, SpanContext
    from otel_tasks._core.tree import Ledger

# The outcomes of a plain task with and without a cause. A global, because reading a member of an enumeration
# costs as much as a method call before Python 3.12.
_PLAIN_OUTCOMES = (Outcome.CANCELLED, Outcome.SUCCESS)


class Ending(Counters):
    """Records the end of each task of one manager.

    Args:
        ledger: The manager's.
        on_error: Called with a failure that no code waits for; None logs it.
    """

    def __init__(self, ledger: Ledger, on_error: Callable[[TaskInfo, BaseException], object] | None) -> None:
        super().__init__()
        self._ledger = ledger
        self._on_error = on_error
        # Kept here, because every task reads them. `Ledger.moved` replaces the clock.
        self._clock = ledger.home.clock
        self._telemetry = ledger.telemetry
        self._remember = ledger.history.add
        self._listeners = ledger.listeners.functions
        # The ids of services that gave up and were not started again, in this order.
        self.failed_services: dict[str, None] = {}

    def on_done(self, task: ManagedTask[Any], early: bool = False) -> bool:
        """Record the end of a task; its done-callback.

        Args:
            task: The task, which is done.
            early: It ended in its eager first step.

        Returns:
            False if it failed there. Its end is to be recorded one turn later, as for any task: by then, code
            that awaits it is registered as a waiter.
        """
        # Read first: Python 3.11 is slow at calling an attribute that is not a method.
        clock, remember = self._clock, self._remember
        task._ended_at = ended_at = clock()
        cause = task._cause
        if (
            task._extras is not None
            or self._listeners
            or task._exception is not None
            # Cancelled without a cause, or returned in spite of one. A task whose cancel() has
            # recorded no cause has extras, see `note_request`.
            or is_cancelled(task) is (cause is None)
        ):
            return self._on_special_end(task, early)
        # The fast path to the same records, for plain tasks that returned or were cancelled, in a third of
        # the time. For the same reason, this file writes `_ended_at` above, which `task` defines.
        group = task._group
        key = task._key
        try:
            label = group._label or group._labels()
            if cause is None:
                self.completed += 1
            else:
                self.count_cancelled(label[0], cause)
            ids = None
            if task._span is not None:
                ids = self._end_span(task, task._span, _PLAIN_OUTCOMES[cause is None])
            # Reading the provider first saves a call, as in `create_task`.
            if self._telemetry.metering._METER_PROVIDER is not None:
                self._record_duration(task, _PLAIN_OUTCOMES[cause is None])
            remember((base_name(task), key, label, task._priority, task._created_at, ended_at, cause, ids))
        finally:
            # `Node._remove`, inlined: the call takes 5 % of a task's instructions.
            # The entry may be that of another task: a name is free as soon as its task is done.
            live = group._live
            if live.get(key) is task:
                del live[key]
            if not group._is_one_table and group._names.get(key) is task:
                del group._names[key]
            if not live and group._linked:
                group._emptied()
        return True

    def use_clock(self, clock: Callable[[], float]) -> None:
        """Read the time at which a task ends from this clock, from now on."""
        self._clock = clock

    def abandon(self, task: ManagedTask[Any]) -> None:
        """End the spans of a task that does not stop, so that they are not lost."""
        attempt = None if task._extras is None else task._extras.attempt_span
        for span in (attempt, task._span):
            if span is None:
                continue
            ignored = task.cancelling() > 0
            try:
                end_span(span, Outcome.ABANDONED, None, task._cause, ignored=ignored, now=self._clock())
            except Exception:
                self._ledger.log_once("telemetry of task %s raised", task, task=task)

    def service_started(self, service_id: str) -> None:
        """Note that a service runs, so that it no longer counts as failed."""
        self.failed_services.pop(service_id, None)

    def service_failed(self, service_id: str) -> None:
        """Note that a service gave up."""
        self.failed_services[service_id] = None

    def lose(self, tasks: Iterable[ManagedTask[Any]]) -> None:
        """Drop tasks whose loop was closed before they ended: they can never end."""
        for task in tasks:
            if task.done():
                # It ended before that; only its done-callback was never called.
                self.on_done(task)
                continue
            self.abandon(task)
            for future in extras_of(task).futures:
                future.refuse(WrongLoopError(f"the event loop of task {task.id!r} was closed before its end"))
            self.count_lost()
            if task._extras is not None:
                task._extras.close()
            task._group._lose(task)

    def report_failure(self, task: ManagedTask[Any], error: BaseException) -> None:
        """Report a failure that no code waits for, as that of ``task``, which has ended cancelled."""
        self._report_unhandled(task, task.info(), error)

    def _on_special_end(self, task: ManagedTask[Any], early: bool) -> bool:
        """Record the end of a task that is not a plain one; parameter and result are those of ``on_done``."""
        if early and task._exception is not None:
            # A task has one time for its end: that of the record.
            del task._ended_at
            return False
        try:
            self._record(task)
        finally:
            extras = task._extras
            if extras is not None and extras.progress is not None:
                _end_progress(task, extras.progress)
            if extras is not None and extras.ticket is not None:
                self._ledger.places.give_back(extras.ticket)
            # It leaves the group last, so that code which waits for that finds the records complete.
            task._group._remove(task)
        return True

    def _record(self, task: ManagedTask[Any]) -> None:
        status = final_status(task)
        error = failure_of(task) if status is TaskStatus.FAILED else None
        settle_cause(task, status)
        ignored = self._count(task, status)
        if task._extras is not None:
            _close_unstarted(task, task._extras, status)
        info = task.info()
        self._remember_ended(task, info, error)
        if ignored:
            # After its record is made, which is to have the uid.
            TaskLogger(task).warning("task %s ignored its cancellation (%s) and completed", task, task._cause)
        outcome = outcome_of(task, status)
        if task._span is not None:
            self._end_span(task, task._span, outcome, error, ignored=ignored)
        self._record_duration(task, outcome, error)
        if error is not None and not task._group._child_failed(task, error):
            self._report_failure(task, info, error)
        if self._listeners:
            self._ledger.listeners.notify("ended", task, info)

    def _count(self, task: ManagedTask[Any], status: TaskStatus) -> bool:
        if status is TaskStatus.COMPLETED:
            self.completed += 1
            ignored = task.cancel_ignored
            if ignored:
                self.cancel_ignored += 1
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

    def _end_span(
        self,
        task: ManagedTask[Any],
        span: Span,
        outcome: Outcome,
        error: BaseException | None = None,
        *,
        ignored: bool = False,
    ) -> SpanContext | None:
        """End the task's span; returns its identity. A failure is logged and affects nothing else."""
        queued = None if task._extras is None else queue_time(task)
        try:
            return end_span(
                span, outcome, error, task._cause, ignored=ignored, now=task._ended_at, queued=queued
            )
        except Exception:
            self._ledger.log_once("telemetry of task %s raised", task, task=task)
            return None

    def _record_duration(
        self, task: ManagedTask[Any], outcome: Outcome, error: BaseException | None = None
    ) -> None:
        """Record the task's duration, if there is a meter provider; a failure is logged, too."""
        if not self._telemetry.metered():
            return
        seconds = task._ended_at - task._created_at
        try:
            self._telemetry.record(base_name(task), task._group.name, outcome, error, seconds, task._span)
        except Exception:
            self._ledger.log_once("telemetry of task %s raised", task, task=task)

    def _report_failure(self, task: ManagedTask[Any], info: TaskInfo, error: BaseException) -> None:
        awaited = task._extras is not None and any(future.awaited for future in task._extras.futures)
        if task._waiters or awaited or not getattr(task, "_log_traceback", True):
            # The waiter receives it. If it never retrieves it, asyncio logs it as for any task.
            return
        if task._extras is None or task._extras.callbacks <= 0:
            self._report_unhandled(task, info, error)
            return
        # Its callbacks run in this turn and may retrieve the failure, or schedule code that does so in the
        # next turn.
        loop = task.get_loop()
        loop.call_soon(loop.call_soon, self._report_unretrieved, task, info, error)

    def _report_unretrieved(self, task: ManagedTask[Any], info: TaskInfo, error: BaseException) -> None:
        if getattr(task, "_log_traceback", True):
            self._report_unhandled(task, info, error)

    def _report_unhandled(self, task: ManagedTask[Any], info: TaskInfo, error: BaseException) -> None:
        if not task.cancelled():
            # Marks the failure as retrieved; otherwise asyncio would report it a second time.
            task.exception()
        if isinstance(error, SystemExit | KeyboardInterrupt):
            # It propagates through the loop to the caller of run_forever() or asyncio.run().
            return
        if self._on_error is not None:
            try:
                copy_context().run(self._on_error, info, error)
            except Exception:
                TaskLogger(task).exception("on_error of manager %r raised and is dropped", self._ledger.name)
                self._on_error = None
            else:
                return
        trace_id = task.trace_id
        TaskLogger(task).error(
            "task %s failed and nobody awaits it%s",
            task,
            f" (trace {trace_id})" if trace_id else "",
            exc_info=exc_info_of(error),
        )


def _end_progress(task: ManagedTask[Any], progress: TaskProgress) -> None:
    progress.end()
    last = progress.snapshot()
    if last is not None:
        task._group._keep_progress(1, last.done)


def _close_unstarted(task: ManagedTask[Any], extras: Extras, status: TaskStatus) -> None:
    """Clean up after a task that may have ended before its own code ran."""
    if extras.begin is not None and extras.started_at is None:
        # Cancelled while it waited for a place: its span starts and ends here.
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
        # A wrapper that never ran leaves the user's coroutine unawaited.
        extras.inner.close()
