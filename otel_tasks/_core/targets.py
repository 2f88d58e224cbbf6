"""Cancels by name on behalf of another process: sync, and with the tasks that it reaches."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.shutdown import request_groups, wait_for_end
from otel_tasks._core.task import request_cancel

if TYPE_CHECKING:
    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.task import ManagedTask


class Reached(NamedTuple):
    """How many tasks a cancellation reached and ended, and the ids of those that still run."""

    asked: int
    ended: int
    still_running: tuple[str, ...]


def cancel_named(
    manager: TaskManager, name: str, cause: CancelCause, *, before: float = math.inf
) -> list[ManagedTask[Any]]:
    """Request the cancellation of the live task of this name, id, or uid, and return it.

    Args:
        manager: The manager.
        name: The name, id, or uid, as for ``cancel_task``.
        cause: Recorded with the task.
        before: Spare a task that was created after this time, on the manager's clock.

    Returns:
        The task, even if its cancellation was already requested; none if there is no such task.
    """
    task = manager._lookup.task(name)
    if task is None or task.done() or task.created_at > before:
        return []
    request_cancel(task, cause)
    return [task]


def cancel_grouped(
    manager: TaskManager, group: str, cause: CancelCause, *, before: float = math.inf
) -> list[ManagedTask[Any]]:
    """Request the cancellation of the tasks of a group and below it, and return them.

    The calling task and the tasks that await it are spared.

    Args:
        manager: The manager.
        group: The name of a labeled group, or the name or id of a scoped one, as for ``cancel_group``.
        cause: Recorded with each task.
        before: Spare tasks that were created after this time, on the manager's clock.
    """
    caller = _current_task()
    return request_groups(manager._lookup.groups(group), cause, caller, before)


async def wait_for_reached(
    tasks: list[ManagedTask[Any]], timeout: float, caller: asyncio.Task[Any] | None = None
) -> Reached:
    """Wait for tasks whose cancellation was requested, and say how they ended.

    Tasks that await ``caller`` cannot end before it; they count as still running without a wait.

    Args:
        tasks: The tasks.
        timeout: Seconds to wait for their end.
        caller: The task for which the cancellation was requested.

    Cancellation: cancelling the caller ends the wait; the tasks stay cancelled.
    """
    spared = with_awaiters(caller)
    await wait_for_end([task for task in tasks if task not in spared], timeout)
    return Reached(
        len(tasks),
        sum(task.done() and not task.cancel_ignored for task in tasks),
        tuple(task.id for task in tasks if not task.done()),
    )


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
