"""Cancels groups, and shuts a manager down: by priority, within a time limit, with a report."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.checks import checked_seconds
from otel_tasks._core.events import CancelCause
from otel_tasks._core.log import TaskLogger, log_fields_of_all, logger
from otel_tasks._core.native import asyncio_cancel
from otel_tasks._core.options import FromManager
from otel_tasks._core.state import CancelKind, TaskStatus
from otel_tasks._core.task import request_cancel_all, runs_forever
from otel_tasks._core.tree import renew
from otel_tasks._core.waiting import wait_until_done

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from typing import Any

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.tree import Ledger

# The number of tasks that a line names.
_MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """The outcome of the tasks that were live when a manager was shut down.

    Attributes:
        completed: How many tasks returned.
        failed: How many tasks raised.
        cancelled: How many tasks ended cancelled.
        cancel_ignored: The ids of tasks that were cancelled and completed anyway.
        still_running: The ids of tasks that did not stop, each with its current stack.
        abandoned_threads: The ids of tasks that have ended, now or earlier, while their functions still run
            in threads, each with the current stack.

    Example:
        >>> report = await manager.shutdown()
        >>> report.clean
    """

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    cancel_ignored: tuple[str, ...] = ()
    still_running: Mapping[str, str] = field(default_factory=dict)
    abandoned_threads: Mapping[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """True if no task and no thread still runs."""
        return not self.still_running and not self.abandoned_threads


class ShutdownBounds(NamedTuple):
    """The bounds of a shutdown, in seconds; None means no limit."""

    grace: float | None
    timeout: float | None

    @classmethod
    def checked(cls, grace: float, timeout: float | None) -> ShutdownBounds:
        """Check the options of a manager.

        Raises:
            TypeError: A duration is not a number.
            ValueError: A duration is negative.
        """
        return cls(checked_seconds("grace", grace), checked_seconds("shutdown_timeout", timeout))

    def or_own(
        self, grace: float | FromManager | None, timeout: float | FromManager | None
    ) -> ShutdownBounds:
        """Return these bounds, except those that a caller has set."""
        return ShutdownBounds(
            self.grace if isinstance(grace, FromManager) else checked_seconds("grace", grace),
            self.timeout if isinstance(timeout, FromManager) else checked_seconds("timeout", timeout),
        )


async def cancel_groups(
    caller: asyncio.Task[Any] | None,
    groups: list[TaskGroup],
    cause: CancelCause,
    grace: float,
    timeout: float | None,
) -> int:
    """Cancel the tasks of ``groups`` and below them, and wait for them; see ``TaskManager.cancel_group``.

    Args:
        caller: The calling task; it and the tasks that await it are spared.
        groups: The groups to cancel.
        cause: Recorded with each task.
        grace: Seconds between the cancel event and the cancellation.
        timeout: Seconds to wait for the tasks' end after that. None means no limit.

    Returns:
        How many tasks the cancellation ended.

    Cancellation: ends the grace or the wait; the tasks are cancelled.
    """
    patience = checked_seconds("grace", grace)
    seconds = checked_seconds("timeout", timeout)
    # A task that awaits the caller cannot end before it, and would pass the cancellation on to it.
    spared = with_awaiters(caller)
    tasks = _others(groups, spared)
    announced = _signal(groups, cause)
    try:
        if patience != 0.0:
            await wait_until_done(tasks, patience)
        # Include tasks created during the grace: they are cancelled with the others.
        tasks = list(dict.fromkeys([*tasks, *_others(groups, spared)]))
    finally:
        # Also if the caller is cancelled during the grace: the cancel events are already set.
        _cancel_signalled(groups, announced, cause, spared)
    return await wait_for_end(tasks, seconds)


def request_groups(
    groups: list[TaskGroup],
    cause: CancelCause,
    caller: asyncio.Task[Any] | None,
    spares: Callable[[ManagedTask[Any]], bool] | None = None,
) -> list[ManagedTask[Any]]:
    """Request the cancellation of the tasks of ``groups`` and below them, and return them.

    Args:
        groups: The groups to cancel.
        cause: Recorded with each task.
        caller: The calling task; it and the tasks that await it are spared.
        spares: True for a task to leave alone; the groups of spared tasks stay open. None spares no task.
    """
    spared = with_awaiters(caller)
    tasks = _others(groups, spared)
    chosen = tasks if spares is None else [task for task in tasks if not spares(task)]
    if len(chosen) < len(tasks):
        request_cancel_all(chosen, cause)
        return chosen
    _cancel_signalled(groups, _signal(groups, cause), cause, spared)
    return tasks


def _signal(groups: list[TaskGroup], cause: CancelCause) -> list[TaskGroup]:
    return [node for group in groups for node in group._signal_cancel(cause)]


def _cancel_signalled(
    groups: list[TaskGroup],
    announced: list[TaskGroup],
    cause: CancelCause,
    spared: Collection[asyncio.Future[Any]],
) -> None:
    for group in groups:
        group._cancel_tasks(cause, spared=spared)
        if group._scope is not None and group._scope.host not in spared:
            group._scope.cancel_body(cause)
    renew(announced, cause)


async def wait_for_end(tasks: list[ManagedTask[Any]], timeout: float | None) -> int:
    """Wait for tasks whose cancellation was requested; log those that still run after ``timeout``.

    Returns:
        How many tasks the cancellation ended.

    Cancellation: ends the wait.
    """
    await wait_until_done(tasks, timeout)
    live = [task for task in tasks if not task.done()]
    if live:
        names = ", ".join(repr(task.id) for task in live)
        logger.warning(
            "cancelled and still running after %s s: %s", timeout, names, extra=log_fields_of_all(live)
        )
    return sum(task.done() and not task.cancel_ignored for task in tasks)


async def shut_down(
    ledger: Ledger, caller: asyncio.Task[Any] | None, bounds: ShutdownBounds, by: str
) -> ShutdownReport:
    """Shut a manager down; see ``TaskManager.shutdown``.

    Args:
        ledger: The manager's ledger.
        caller: The calling task; it and the tasks that await it are spared.
        bounds: Seconds in which tasks may finish, and seconds for everything after that.
        by: The caller, for the error that later tasks raise.

    Cancellation: ends the wait; the manager stays closed.
    """
    spared = with_awaiters(caller)
    tasks = _others([ledger.root], spared)
    cause = CancelCause.make(CancelKind.SHUTDOWN, f"manager {ledger.name!r} is shutting down")
    consumers = list(ledger.consumers)
    ledger.home.close(by, cause)
    for consumer in consumers:
        consumer.close(spared)
    ledger.root._signal_cancel(cause)
    _drop_queue(ledger, tasks, cause)
    try:
        if bounds.grace != 0.0:
            # Most services do not end on their own: with them, every shutdown would last its whole grace.
            await wait_until_done([task for task in tasks if not runs_forever(task)], bounds.grace)
        for consumer in consumers:
            consumer.cut()
        if consumers:
            # They have created tasks during the grace.
            tasks = list(dict.fromkeys([*tasks, *_others([ledger.root], spared)]))
        await _cancel_by_priority(ledger, tasks, cause, bounds.timeout, spared)
    finally:
        ledger.home.end_shutdown()
        for consumer in consumers:
            consumer.hand_back()
    for consumer in consumers:
        consumer.report()
    return _report(ledger, tasks, cause)


def _drop_queue(ledger: Ledger, tasks: list[ManagedTask[Any]], cause: CancelCause) -> None:
    """Cancel the tasks that wait for a place, and wake a producer that waits for room: neither gets any."""
    waiting = [
        task
        for task in tasks
        if (extras := task._extras) is not None and extras.queued and not extras.is_drained
    ]
    request_cancel_all(waiting, cause)
    ledger.places.wake_producer()


async def _cancel_by_priority(
    ledger: Ledger,
    tasks: list[ManagedTask[Any]],
    cause: CancelCause,
    timeout: float | None,
    spared: Collection[asyncio.Future[Any]],
) -> None:
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    levels = sorted({task.priority for task in tasks if not task.done()})
    for number, level in enumerate(levels):
        chosen = [task for task in tasks if task.priority is level and not task.done()]
        request_cancel_all(chosen[::-1], cause)
        # Each level and the last step get an even share of the remaining time.
        left = None if deadline is None else max(0.0, deadline - loop.time()) / (len(levels) - number + 1)
        await wait_until_done(chosen, left)
    ledger.root._cancel_bodies(ledger.root._below(), cause, spared)
    stubborn = [task for task in tasks if not task.done()]
    for task in stubborn:
        # The only place that cancels twice: a task that is still live has swallowed the first cancellation.
        asyncio_cancel(task, str(cause))
    await wait_until_done(stubborn, None if deadline is None else max(0.0, deadline - loop.time()))


def _report(ledger: Ledger, tasks: Iterable[ManagedTask[Any]], cause: CancelCause) -> ShutdownReport:
    infos = [(task, task.info()) for task in tasks]
    running = {info.id: task.stack() for task, info in infos if not task.done()}
    for task, info in infos:
        if info.id in running:
            TaskLogger(task).error("task %s did not stop at shutdown; it is at\n%s", task, running[info.id])
            ledger.ending.abandon(task)
    _report_cut(ledger, [each for each in infos if each[1].cause is cause and not _restarts(*each)])
    statuses = [info.status for _, info in infos]
    return ShutdownReport(
        completed=statuses.count(TaskStatus.COMPLETED),
        failed=statuses.count(TaskStatus.FAILED),
        cancelled=statuses.count(TaskStatus.CANCELLED),
        cancel_ignored=tuple(info.id for _, info in infos if info.cancel_ignored),
        still_running=running,
        abandoned_threads=_abandoned_threads(ledger),
    )


def _abandoned_threads(ledger: Ledger) -> dict[str, str]:
    stacks = {worker: worker.stack() for worker in ledger.threads.abandoned()}
    for worker, stack in stacks.items():
        TaskLogger(worker.task).error(
            "the thread of task %s has not returned at shutdown; it is at\n%s", worker.task, stack
        )
    return {worker.id: stack for worker, stack in stacks.items()}


def _others(groups: Iterable[TaskGroup], spared: Collection[asyncio.Future[Any]]) -> list[ManagedTask[Any]]:
    """Return the tasks of these groups and below them that are not done, except the spared ones."""
    return [
        task for group in groups for task in group._every_live() if task not in spared and not task.done()
    ]


def _restarts(task: ManagedTask[Any], info: TaskInfo) -> bool:
    """True for a service or a consumer, which starts again with the application."""
    return runs_forever(task) or info.consumer is not None


def _report_cut(ledger: Ledger, infos: Iterable[tuple[ManagedTask[Any], TaskInfo]]) -> None:
    """Log the work that a shutdown has cut short, not services: they start again with the application."""
    cut = [(task, info) for task, info in infos if info.status is TaskStatus.CANCELLED]
    if not cut:
        return
    names = [repr(info.id) + ("" if info.started_at is not None else " (not started)") for _, info in cut]
    logger.warning(
        "the shutdown of manager %r cancelled %d %s: %s",
        ledger.name,
        len(cut),
        "task" if len(cut) == 1 else "tasks",
        ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else ""),
        extra=log_fields_of_all(task for task, _ in cut),
    )
