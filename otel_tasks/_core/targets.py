"""Cancels and lists by name on behalf of another process: sync, and with the tasks that it reaches."""

from __future__ import annotations

import asyncio
import contextlib
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.frames import Stacks
from otel_tasks._core.inspection import tree_of
from otel_tasks._core.shutdown import request_groups, wait_for_end
from otel_tasks._core.slices import COUNTS_PER_SLICE, NAMES_PER_SLICE, Budget, smallest
from otel_tasks._core.task import request_cancel

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.task_tree import TaskTree

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
) -> Generator[None, None, Found]:
    """Find the tasks that match, in slices: live ones, oldest first, then remembered ones, newest first.

    The first slice copies the tables of live and remembered tasks, so a task that ends between two slices is
    found once. Whether a task matches, and what its snapshot shows, is read when its turn comes.

    Args:
        manager: The manager.
        pattern: A shell pattern for names and ids, such as ``"import-*"``. None matches all.
        group: The name or id of a group; it matches the tasks of that group and below it. None matches all.
        status: A status. None matches all.
        limit: How many snapshots to take; the others are only counted.
    """
    tasks = _live(manager, group)
    remembered = manager.iter_recent()
    yield
    live: list[ManagedTask[Any]] = []
    for start in range(0, len(tasks), NAMES_PER_SLICE):
        batch = tasks[start : start + NAMES_PER_SLICE]
        live += [task for task in batch if _matches(task, pattern, status)]
        yield
    infos: list[TaskInfo] = []
    budget = Budget(COUNTS_PER_SLICE)
    chosen = yield from smallest(live, limit, _created_at)
    for task in chosen:
        info = task.info()
        # It may have ended since it matched.
        if status is None or info.status == status:
            infos.append(info)
        if budget.spend():
            yield
    more = len(live) - len(chosen)
    for info in remembered:
        if _matches_ended(info, pattern, group, status):
            if len(infos) < limit:
                infos.append(info)
            else:
                more += 1
        if budget.spend():
            yield
    return Found(infos, more)


def take_tree(manager: TaskManager, limit: int) -> Generator[None, None, TaskTree]:
    """Take ``manager.tree(limit=limit)`` in slices."""
    return tree_of(manager._ledger, limit, Stacks)


_created_at = attrgetter("_created_at")


def _live(manager: TaskManager, group: str | None) -> list[ManagedTask[Any]]:
    """The live tasks of a group and below it, each once."""
    nodes = [manager._root] if group is None else manager._lookup.groups(group)
    tasks: list[ManagedTask[Any]] = []
    for each in dict.fromkeys(each for node in nodes for each in node._below()):
        tasks += each.tasks
    return tasks


def _matches(task: ManagedTask[Any], pattern: str | None, status: str | None) -> bool:
    if status is not None and task.status != status:
        return False
    return pattern is None or fnmatchcase(task.get_name(), pattern) or fnmatchcase(task.id, pattern)


def _matches_ended(info: TaskInfo, pattern: str | None, group: str | None, status: str | None) -> bool:
    return (
        (status is None or info.status == status)
        and (pattern is None or fnmatchcase(info.name, pattern) or fnmatchcase(info.id, pattern))
        and (
            group is None
            or group in ("root", info.group, info.group_id)
            or info.group_id.startswith(f"{group}.")
        )
    )
