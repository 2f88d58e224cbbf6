"""Looking: what a manager says about its tasks to a person, or to a program that shows them."""

from __future__ import annotations

import asyncio
import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

from otel_tasks._core.checks import check_count
from otel_tasks._core.details import TaskDetails, details_of
from otel_tasks._core.frames import Stacks
from otel_tasks._core.inspection import nodes_of, request_of
from otel_tasks._core.slices import TASKS_PER_SLICE, at_once
from otel_tasks._core.survey import survey_of
from otel_tasks._core.task import ManagedTask

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping
    from weakref import ReferenceType

    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.overview import Overview
    from otel_tasks._core.task_tree import TaskNode
    from otel_tasks._core.tree import Ledger


class Looking:
    """The part of a manager that looks at tasks without changing anything."""

    # The manager sets it.
    _ledger: Ledger

    def overview(
        self,
        *,
        members: Mapping[str, int | None] | None = None,
        max_groups: int = 200,
        max_classes: int = 500,
    ) -> Overview:
        """Sum up what runs by name: groups, classes of tasks, how many there are, and how old.

        It takes about 0.2 us for each live task. Call it in the thread of the event loop.

        Args:
            members: The keys of rows whose tasks are wanted, and for each how many, oldest first. None: all,
                in no order.
            max_groups: How many rows of groups to make at most, at least 1; the tasks of further groups are
                counted in one row.
            max_classes: How many classes to make at most, at least 1; the smallest ones of a group are
                counted in one class.

        Raises:
            ValueError: A bound is below 1.

        Example:
            >>> [(row.name, row.tasks.count) for row in manager.overview().classes]
        """
        return at_once(self.overview_slices(members=members, max_groups=max_groups, max_classes=max_classes))

    def overview_slices(
        self,
        *,
        members: Mapping[str, int | None] | None = None,
        max_groups: int = 200,
        max_classes: int = 500,
    ) -> Generator[None, None, Overview]:
        """Take an overview in slices of about 0.3 ms, so that the event loop can run in between.

        The overview shows the moment of the first slice. A task that ends between two slices is still
        counted, and a task that starts is not.

        Args:
            members: As ``overview`` takes it.
            max_groups: As ``overview`` takes it.
            max_classes: As ``overview`` takes it.

        Returns:
            A generator that returns the overview. The first slice runs at the first ``next()``.

        Raises:
            ValueError: A bound is below 1.

        Example:
            >>> overview = yield from manager.overview_slices()
        """
        check_count("max_groups", max_groups, 1)
        check_count("max_classes", max_classes, 1)
        ledger = self._ledger
        return survey_of(ledger, members or {}, max_groups, max_classes, ledger.home.closed_here)

    def now(self) -> float:
        """Return the time on the monotonic clock that ``TaskInfo`` and ``Overview`` use, in seconds.

        Example:
            >>> age = manager.now() - task.created_at
        """
        return self._ledger.home.clock()

    def describe(self, tasks: Iterable[ManagedTask[Any]]) -> list[TaskNode]:
        """Return live tasks as ``tree`` shows them, in this order: what they do, and where they wait.

        Args:
            tasks: Tasks of this manager. One that has ended meanwhile has no place.

        Example:
            >>> manager.describe([task])[0].where
        """
        return nodes_of(self._ledger, tasks, Stacks())

    def details(self, task: ManagedTask[Any]) -> TaskDetails:
        """Return everything about one live task: the chain of awaits, what waits for it, who cancelled it.

        Args:
            task: A task of this manager.

        Example:
            >>> for line, own in manager.details(task).frames:
            ...     print(line)
        """
        return details_of(self._ledger, task)

    def recent(self, limit: int = 50, *, among: int | None = None) -> list[TaskInfo]:
        """Return snapshots of the tasks that ended last and are remembered, newest first.

        Args:
            limit: How many at most, at least 0.
            among: Choose from the last so many, at least 0, and prefer those that failed or were cancelled.
                None: the last ones, however they ended.

        Raises:
            ValueError: A number is negative.

        Example:
            >>> [info.name for info in manager.recent(10)]
        """
        return list(self.iter_recent(limit, among=among))

    def iter_recent(
        self, limit: int | None = None, *, among: int | None = None, group_id: str | None = None
    ) -> Iterator[TaskInfo]:
        """Iterate over the tasks that ended last and are remembered now, newest first.

        It makes each snapshot on demand, in about 4 us: the caller can stop early, or let the event loop
        run in between.

        Args:
            limit: How many at most, at least 0. None: all.
            among: As ``recent`` takes it.
            group_id: The id of the group whose tasks are wanted. None: of all groups.

        Raises:
            ValueError: A number is negative.

        Example:
            >>> next(manager.iter_recent(group_id="mail"), None)
        """
        check_count("limit", limit, 0)
        check_count("among", among, 0)
        return self._ledger.history.newest(limit, among, group_id)

    def outliving_tasks(self) -> list[asyncio.Task[Any]]:
        """Return the plain asyncio tasks that outlive the request that started them (Python 3.12; else none).

        ``create_task()`` would have ended them with the request. It looks at all tasks of the event loop,
        which takes about 0.3 us for each.

        Example:
            >>> [task.get_name() for task in manager.outliving_tasks()]
        """
        return at_once(self.outliving_slices())

    def outliving_slices(self) -> Generator[None, None, list[asyncio.Task[Any]]]:
        """Find what ``outliving_tasks`` returns in slices, so that the event loop can run in between.

        Returns:
            A generator that returns the tasks.

        Example:
            >>> tasks = yield from manager.outliving_slices()
        """
        loop = self._ledger.home.loop
        if loop is None or sys.version_info < (3, 12):
            return []
        found: list[asyncio.Task[Any]] = []
        tasks = _tasks_of(loop)
        while batch := list(islice(tasks, TASKS_PER_SLICE)):
            plain = [task for task in batch if not isinstance(task, ManagedTask) and not task.done()]
            found += [task for task in plain if (request := request_of(task)) is not None and request.closed]
            yield
        return found


def _tasks_of(loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Task[Any]]:
    """Iterate over the tasks of a loop.

    The first step takes 0.25 us for each task with ``asyncio.all_tasks()``, and 5 ns with the references that
    it reads. Python 3.14 keeps its tasks elsewhere.
    """
    kept: Any = getattr(asyncio.tasks, "_scheduled_tasks", None)
    if sys.version_info >= (3, 14) or kept is None:
        yield from asyncio.all_tasks(loop)
        return
    references: list[ReferenceType[asyncio.Task[Any]]] = list(kept.data)
    for reference in references:
        task = reference()
        if task is not None and task.get_loop() is loop:
            yield task
