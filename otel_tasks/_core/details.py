"""Everything about one live task: ``manager.details()``.

It looks at the frames of the task and at the callbacks of what waits for it, which takes some 50 us: too long
for a list of tasks, and nothing for the one that a person looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from otel_tasks._core.awaiters import tasks_awaiting
from otel_tasks._core.coroutines import qualified_name
from otel_tasks._core.frames import Location, Stacks, lines_of
from otel_tasks._core.inspection import attempt_of, frames_of_task, nodes_of, place_of_task, task_awaited_by
from otel_tasks._core.task import own_coroutine

if TYPE_CHECKING:
    import asyncio

    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.task_tree import TaskNode
    from otel_tasks._core.tree import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskPlace:
    """A task, managed or not, with what it runs and where it waits.

    Attributes:
        task: The task.
        function: The qualified name of its coroutine: ``Task-18`` alone says little.
        where: The innermost line of your code that it has reached; None if unknown.
    """

    task: asyncio.Task[Any]
    function: str
    where: Location | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDetails:
    """A live task, what it waits for, what waits for it, and how its cancellation came about.

    Attributes:
        node: The task as a tree shows it.
        path: The manager's name, the ids of the groups around the task from the outside in, and its name.
        frames: The lines where it waits, innermost first, each with True if it is in your own code. For a
            service, those of its attempt.
        awaited: The task, managed or not, that it awaits; None if it awaits something else.
        waiters: The tasks, managed or not, that wait for it.
        cancelled_groups: The groups around it that have been cancelled, from the outside in, with the cause.
        children: How many live tasks are in blocks that it has opened: its cancellation cancels them.
    """

    node: TaskNode
    path: tuple[str, ...]
    frames: tuple[tuple[Location, bool], ...]
    awaited: TaskPlace | None
    waiters: tuple[TaskPlace, ...]
    cancelled_groups: tuple[tuple[str, CancelCause], ...]
    children: int


def details_of(ledger: Ledger, task: ManagedTask[Any]) -> TaskDetails:
    """Look at one live task."""
    stacks = Stacks()
    works = attempt_of(task) or task
    groups = list(task._group._outward())[::-1]
    thread = ledger.home.thread
    awaited = task_awaited_by(works)
    return TaskDetails(
        node=nodes_of(ledger, [task], stacks)[0],
        # The root is the manager.
        path=(ledger.name, *(group.id for group in groups[1:]), task.get_name()),
        frames=tuple(lines_of(frames_of_task(works, stacks, thread))),
        awaited=None if awaited is None else _place(awaited, stacks, thread),
        waiters=tuple(_place(waiter, stacks, thread) for waiter in tasks_awaiting(task)),
        cancelled_groups=tuple((group.id, group._cause) for group in groups if group._cause is not None),
        children=_children(ledger, task),
    )


def _place(task: asyncio.Task[Any], stacks: Stacks, thread: int | None) -> TaskPlace:
    function = qualified_name(own_coroutine(task))
    return TaskPlace(task=task, function=function, where=place_of_task(task, stacks, thread).at)


def _children(ledger: Ledger, task: ManagedTask[Any]) -> int:
    opened = [
        group for group in ledger.scopes.values() if group._scope is not None and group._scope.host is task
    ]
    # A block inside another one of the same task is below it.
    below = {inner for group in opened for inner in group._below()}
    return sum(len(group._live) for group in below)
