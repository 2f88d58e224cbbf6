"""Takes the tree of what runs in a manager: ``manager.tree()``.

A span is exported when its task ends; the tree shows the task before that.

Rules, each with a test of its own:

1. Taking a tree changes nothing.
2. A tree is bounded, and counts what it leaves out. Each group gets a share, so that a big one does not hide
   the others; within a group, the oldest tasks come first. The cost is that of the nodes it shows, a count
   over the groups, and, if the root has tasks of its own, a pass over the names beside them.
3. In slices, each node shows the moment at which its turn comes; a slice makes ``ROWS_PER_SLICE`` nodes. Some
   steps are not cut: copying the table of a group's tasks (5 ns for each), the count and the pass of rule 2
   (50 ns for each task), and sorting a queue.
4. Any thread may take it, and so may a signal handler, even while a task holds the loop. It never raises,
   whatever a coroutine looks like.
"""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, Any

from otel_tasks._core.binding import RequestBinding, ThreadWorker, current_binding
from otel_tasks._core.coroutines import qualified_name
from otel_tasks._core.frames import Place, Stacks, place_of
from otel_tasks._core.info import ConsumerInfo, PeriodicInfo
from otel_tasks._core.slices import ROWS_PER_SLICE, Budget
from otel_tasks._core.task import ManagedTask, own_coroutine, reported
from otel_tasks._core.task_tree import GroupNode, TaskNode, TaskTree
from otel_tasks._core.telemetry.context import span_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from types import FrameType

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.places import Limiter, Ticket
    from otel_tasks._core.task_tree import GroupKind, TaskKind
    from otel_tasks._core.tree import Ledger

# Levels of groups that are shown; deeper ones are counted. It bounds the recursion here and in JSON.
_MAX_DEPTH = 50
# The smallest share of a group that is shown at all.
_MIN_SHARE = 5
# Positions in a longer queue are left out: finding them takes sorting it.
_MAX_QUEUE = 10_000


def check_limit(limit: object) -> None:
    """Raise a ValueError unless ``limit`` is a number of nodes to show."""
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"limit must be the number of tasks and groups to show, at least 1, got {limit!r}")


def tree_of(ledger: Ledger, limit: int, stacks: Callable[[], Stacks]) -> Generator[None, None, TaskTree]:
    """Take a snapshot of what runs, in slices.

    Args:
        ledger: The manager's records.
        limit: How many tasks and groups to show at most, at least 1.
        stacks: Reads the frames of all threads, for each slice.
    """
    walk = _Walk(ledger, stacks)
    closed, stats = ledger.home.closed, ledger.stats()
    root, _ = yield from walk.group(ledger.root, limit + 1, 0)
    return TaskTree(
        manager=ledger.name,
        closed=closed,
        stats=stats,
        max_concurrency=ledger.places.limiter.limit,
        root=root,
        abandoned_threads=tuple(
            (worker.id, place_of(_frames_of(worker, walk.survey.stacks)).at)
            for worker in islice(ledger.threads.abandoned(), limit)
        ),
    )


def nodes_of(ledger: Ledger, tasks: Iterable[ManagedTask[Any]], stacks: Stacks) -> list[TaskNode]:
    """The nodes of live tasks, in this order."""
    survey = _Survey(ledger, stacks)
    return [survey.task(task) for task in tasks]


def place_of_task(task: asyncio.Task[Any], stacks: Stacks, thread: int | None) -> Place:
    """Where a task is; for a function in a thread, where that thread is.

    Args:
        task: Any, managed or not.
        stacks: The frames of all threads.
        thread: That of the task's loop.
    """
    worker = None if not isinstance(task, ManagedTask) or task._extras is None else task._extras.worker
    frames = [] if worker is None else _frames_of(worker, stacks)
    return place_of(frames or stacks.of_task(task, thread, own_coroutine), home=isinstance(task, ManagedTask))


def known_as(task: asyncio.Task[Any]) -> str:
    """The id of a managed task, or the asyncio name of any other."""
    return task.id if isinstance(task, ManagedTask) else task.get_name()


def request_of(task: asyncio.Task[Any]) -> RequestBinding | None:
    """The request in which a plain task was started; None for no request, and in Python 3.11."""
    get_context = getattr(task, "get_context", None)
    bound = None if get_context is None else get_context().get(current_binding)
    # A group that is bound, or what an ``uncancellable()`` binds, takes work out of its request.
    return bound if isinstance(bound, RequestBinding) else None


def is_queued(task: ManagedTask[Any]) -> bool:
    """True if a task waits for a place."""
    return task._extras is not None and task._extras.queued


def supervises(task: ManagedTask[Any]) -> bool:
    """True for a service, and for periodic work: other tasks do the work."""
    return task._extras is not None and task._extras.supervises


class _Survey:
    """Builds the nodes of tasks; it has what they share.

    Args:
        ledger: The manager's records.
        stacks: The frames of all threads.

    Attributes:
        stacks: The same.
    """

    def __init__(self, ledger: Ledger, stacks: Stacks) -> None:
        self.stacks = stacks
        self._ledger = ledger
        self._now = ledger.home.clock()
        self._positions: dict[Limiter, dict[Ticket, int]] = {}

    def task(self, task: ManagedTask[Any]) -> TaskNode:
        """The node of a task, with a service's running attempt."""
        status = task.status
        kind = kind_of_task(task)
        # A service waits for its attempt, or for its next start: the code is this package's.
        place = Place() if kind == "service" else self.place(task)
        cause = task.cause
        attempt = attempt_of(task)
        trace_id, span_id = span_ids(task._span)
        return TaskNode(
            id=task.id,
            name=task.get_name(),
            kind=kind,
            priority=task.priority,
            status=status,
            age=max(0.0, self._now - task._created_at),
            where=place.at,
            calls=place.calls,
            awaits=_name_of_awaited(task),
            queued=is_queued(task),
            queue_position=self._queue_position(task),
            cause=cause,
            cancelling_for=None if cause is None or cause.at is None else max(0.0, self._now - cause.at),
            progress=reported(task),
            trace_id=trace_id,
            span_id=span_id,
            attempt=None if attempt is None else self.task(attempt),
            next_run_in=self._next_run_in(task),
            attempt_number=None if task._extras is None else task._extras.attempt_number,
            retry_in=self._retry_in(task),
            consumer=_consumer_of(task) if kind == "service" else None,
        )

    def _next_run_in(self, task: ManagedTask[Any]) -> float | None:
        info = _supervision_of(task)
        due = info.next_run_at if isinstance(info, PeriodicInfo) else None
        return None if due is None else max(0.0, due - self._now)

    def place(self, task: asyncio.Task[Any]) -> Place:
        """Where a task is."""
        return place_of_task(task, self.stacks, self._ledger.home.thread)

    def _retry_in(self, task: ManagedTask[Any]) -> float | None:
        at = None if task._extras is None else task._extras.retry_at
        return None if at is None else max(0.0, at - self._now)

    def _queue_position(self, task: ManagedTask[Any]) -> int | None:
        ticket = task._extras.ticket if task._extras is not None and task._extras.queued else None
        queue = None if ticket is None else ticket.queue
        if ticket is None or queue is None:
            return None
        if queue not in self._positions:
            tickets = queue.in_order(_MAX_QUEUE) or ()
            self._positions[queue] = {waiting: number for number, waiting in enumerate(tickets, 1)}
        return self._positions[queue].get(ticket)


class _Walk:
    """Builds the nodes of groups, and of the tasks in them, in slices.

    Args:
        ledger: The manager's records.
        stacks: Reads the frames of all threads, for each slice.

    Attributes:
        survey: It builds the nodes of the tasks.
    """

    def __init__(self, ledger: Ledger, stacks: Callable[[], Stacks]) -> None:
        self.survey = _Survey(ledger, stacks())
        self._ledger = ledger
        self._stacks = stacks
        self._budget = Budget(ROWS_PER_SLICE)

    def group(self, group: TaskGroup, limit: int, depth: int) -> Generator[None, None, tuple[GroupNode, int]]:
        """The node of a group, and how many tasks and groups it contains, itself included."""
        yield from self._pause()
        live = self._live(group)
        # Groups leave up to half of it for the group's own tasks; its tasks also get what groups leave over.
        left = limit - 1
        below = list(group._children)
        children = below if depth < _MAX_DEPTH else []
        groups, taken = yield from self._groups(children, left - min(live, (left + 1) // 2), depth + 1)
        tasks, shown = yield from self._tasks(group, live, left - taken)
        host = self._host(group)
        node = GroupNode(
            id=group.id,
            name=group.name,
            kind=kind_of_group(group),
            refusal=group._refusal,
            cause=group._cause,
            max_concurrency=group.max_concurrency,
            live=live,
            queued=group._queued,
            host=None if host is None else known_as(host),
            where=None if host is None or isinstance(host, ManagedTask) else self.survey.place(host).at,
            tasks=tasks,
            groups=groups,
            more_tasks=max(0, live - shown),
            more_groups=len(below) - len(groups),
        )
        return node, 1 + taken + shown

    def _pause(self) -> Generator[None, None, None]:
        """Count a node, and end the slice if that was its last."""
        if self._budget.spend():
            # Frames keep alive what they hold, and the threads go on.
            self.survey.stacks = self._stacks()
            yield

    def _groups(
        self, children: list[TaskGroup], left: int, depth: int
    ) -> Generator[None, None, tuple[tuple[GroupNode, ...], int]]:
        nodes: list[GroupNode] = []
        taken = 0
        all_fit = _fit(children, left)
        for number, child in enumerate(children):
            if taken >= left:
                break
            share = left if all_fit else max(_MIN_SHARE, (left - taken) // (len(children) - number))
            node, used = yield from self.group(child, min(share, left - taken), depth)
            nodes.append(node)
            taken += used
        return tuple(nodes), taken

    def _tasks(
        self, group: TaskGroup, live: int, limit: int
    ) -> Generator[None, None, tuple[tuple[TaskNode, ...], int]]:
        if not live or limit <= 0:
            return (), 0
        chosen = list(islice(_own_tasks(group), limit))
        attempts = {attempt_of(task) for task in chosen}
        nodes: list[TaskNode] = []
        for task in chosen:
            if task not in attempts:
                nodes.append(self.survey.task(task))
                yield from self._pause()
        return tuple(nodes), len(chosen)

    def _live(self, group: TaskGroup) -> int:
        """How many live tasks a group has itself."""
        if group is not self._ledger.root:
            return len(group._live)
        # The root's table is the namespace of all labeled groups too.
        labels = [link() for link in self._ledger.labels.valuerefs()]
        return max(0, len(group._live) - sum(len(label._live) for label in labels if label is not None))

    def _host(self, group: TaskGroup) -> asyncio.Task[Any] | None:
        return group._host if group._scope is None else group._scope.host


def frames_of_task(task: ManagedTask[Any], stacks: Stacks, thread: int | None) -> list[FrameType]:
    """The frames of a task, outermost first; for a function in a thread, those of that thread.

    Args:
        task: A live task.
        stacks: The frames of all threads.
        thread: That of the task's loop.
    """
    worker = None if task._extras is None else task._extras.worker
    frames = [] if worker is None else _frames_of(worker, stacks)
    return frames or stacks.of_task(task, thread, own_coroutine)


def _frames_of(worker: ThreadWorker, stacks: Stacks) -> list[FrameType]:
    """The frames of a worker's thread; none before it runs."""
    return stacks.of_thread(worker.thread_id)


def _fit(groups: list[TaskGroup], limit: int) -> bool:
    """True if these groups, with everything in and below them, are no more than ``limit``."""
    found = list(groups)
    size = 0
    # The list grows while the loop walks it, until the size is past the limit.
    for group in found:
        size += 1 + len(group._live)
        if size > limit:
            return False
        found.extend(group._children)
    return True


def _own_tasks(group: TaskGroup) -> Iterator[ManagedTask[Any]]:
    # A copy made in one step: another thread may create tasks meanwhile.
    return (task for task in list(group._live.values()) if task.group is group)


def attempt_of(task: ManagedTask[Any]) -> ManagedTask[Any] | None:
    """A service's running attempt, or the live run of periodic work; None for any other task."""
    attempt = None if task._extras is None else task._extras.attempt
    return attempt if isinstance(attempt, ManagedTask) and not attempt.done() else None


def _consumer_of(task: ManagedTask[Any]) -> ConsumerInfo | None:
    info = _supervision_of(task)
    return info if isinstance(info, ConsumerInfo) else None


def _supervision_of(task: ManagedTask[Any]) -> PeriodicInfo | ConsumerInfo | None:
    supervision = None if task._extras is None else task._extras.supervision
    return None if supervision is None else supervision.info()


def task_awaited_by(task: ManagedTask[Any]) -> asyncio.Task[Any] | None:
    """The task, managed or not, that a task awaits."""
    # asyncio's own attribute, 3.11 to 3.15.
    awaited: object = getattr(task, "_fut_waiter", None)
    return awaited if isinstance(awaited, asyncio.Task) else None


def _name_of_awaited(task: ManagedTask[Any]) -> str | None:
    awaited = task_awaited_by(task)
    if awaited is None or isinstance(awaited, ManagedTask):
        return None if awaited is None else awaited.id
    # `Task-18` alone says little.
    return f"{awaited.get_name()} ({qualified_name(awaited.get_coro())})"


def kind_of_task(task: ManagedTask[Any]) -> TaskKind:
    """What kind of work a task does."""
    extras = task._extras
    if supervises(task):
        return "service"
    return "task" if extras is None or extras.worker is None else "thread"


def kind_of_group(group: TaskGroup) -> GroupKind:
    """How a group was opened."""
    if not group.scoped:
        return "labeled"
    return "block" if group._scope is not None else "request"
