"""Cancels and lists by name on behalf of another process: sync, and with the tasks that it reaches."""

from __future__ import annotations

import asyncio
import contextlib
from fnmatch import fnmatchcase
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.shutdown import request_groups, wait_for_end
from otel_tasks._core.task import request_cancel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.task import ManagedTask

    Spares = Callable[[ManagedTask[Any]], bool]


class Reached(NamedTuple):
    """How many tasks a cancellation reached and ended, and the ids of those that still run."""

    asked: int = 0
    ended: int = 0
    still_running: tuple[str, ...] = ()


class Found(NamedTuple):
    """The first tasks that match, and how many more do."""

    infos: list[TaskInfo]
    more: int


def knows(manager: TaskManager, target: Literal["task", "group"], name: str) -> bool:
    """Return whether the manager has such a task or group: a quick look before its cancellation."""
    if target == "group":
        return bool(manager._lookup.groups(name))
    # A process that has just started has no task, and thousands of cancellations to look at.
    return manager._ledger.live > 0 and manager._lookup.task(name) is not None


def cancel_named(
    manager: TaskManager, name: str, cause: CancelCause, spares: Spares | None = None
) -> list[ManagedTask[Any]]:
    """Request the cancellation of the live task of this name, id, or uid, and return it.

    Args:
        manager: The manager.
        name: The name, id, or uid, as for ``cancel_task``.
        cause: Recorded with the task.
        spares: True for a task to leave alone. None spares no task.

    Returns:
        The task, even if its cancellation was already requested; none if there is no such task.
    """
    task = manager._lookup.task(name)
    if task is None or task.done() or (spares is not None and spares(task)):
        return []
    request_cancel(task, cause)
    return [task]


def cancel_grouped(
    manager: TaskManager, group: str, cause: CancelCause, spares: Spares | None = None
) -> list[ManagedTask[Any]]:
    """Request the cancellation of the tasks of a group and below it, and return them.

    The calling task and the tasks that await it are spared.

    Args:
        manager: The manager.
        group: The name of a labeled group, or the name or id of a scoped one, as for ``cancel_group``.
        cause: Recorded with each task.
        spares: True for a task to leave alone. None spares no task.
    """
    caller = None
    with contextlib.suppress(RuntimeError):  # No loop runs here.
        caller = asyncio.current_task()
    return request_groups(manager._lookup.groups(group), cause, caller, spares)


async def wait_for_reached(
    tasks: list[ManagedTask[Any]], timeout: float, caller: asyncio.Task[Any] | None = None
) -> Reached:
    """Wait for tasks whose cancellation was requested, and say how they ended.

    Args:
        tasks: The tasks.
        timeout: Seconds to wait for their end.
        caller: The task for which the cancellation was requested. It and the tasks that await it are not
            waited for, because they cannot end before it.

    Cancellation: cancelling the caller ends the wait; the tasks stay cancelled.
    """
    spared = with_awaiters(caller)
    await wait_for_end([task for task in tasks if task not in spared], timeout)
    return reached(tasks)


def reached(tasks: list[ManagedTask[Any]]) -> Reached:
    """Say how tasks whose cancellation was requested have ended so far."""
    return Reached(
        len(tasks),
        sum(task.done() and not task.cancel_ignored for task in tasks),
        tuple(task.id for task in tasks if not task.done()),
    )


def find_tasks(
    manager: TaskManager, pattern: str | None, group: str | None, status: str | None, limit: int
) -> Found:
    """Return the tasks that match: live ones, oldest first, then remembered ones, newest first.

    Args:
        manager: The manager.
        pattern: A shell pattern for names and ids, such as ``"import-*"``. None matches all.
        group: The name or id of a group; it matches the tasks of that group and below it. None matches all.
        status: A status. None matches all.
        limit: How many snapshots to take; the others are only counted.
    """
    live = [task for task in _live(manager, group) if _matches(task, pattern, status)]
    live.sort(key=_created_at)
    found = [task.info() for task in live[:limit]]
    ended = _ended(manager, pattern, group, status)
    found += islice(ended, limit - len(found))
    return Found(found, max(0, len(live) - limit) + sum(1 for _ in ended))


def _created_at(task: ManagedTask[Any]) -> float:
    return task.created_at


def _live(manager: TaskManager, group: str | None) -> Iterable[ManagedTask[Any]]:
    nodes = [manager._root] if group is None else manager._lookup.groups(group)
    return dict.fromkeys(task for node in nodes for task in node._every_live())


def _matches(task: ManagedTask[Any], pattern: str | None, status: str | None) -> bool:
    if status is not None and task.status != status:
        return False
    return pattern is None or fnmatchcase(task.get_name(), pattern) or fnmatchcase(task.id, pattern)


def _ended(
    manager: TaskManager, pattern: str | None, group: str | None, status: str | None
) -> Iterator[TaskInfo]:
    return (
        info
        for info in reversed(list(manager._ledger.history))
        if (status is None or info.status == status)
        and (pattern is None or fnmatchcase(info.name, pattern) or fnmatchcase(info.id, pattern))
        and (
            group is None
            or group in ("root", info.group, info.group_id)
            or info.group_id.startswith(f"{group}.")
        )
    )
