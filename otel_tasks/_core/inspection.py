"""The tasks that run now, as a tree: ``manager.tree()``, as data, as text, and as JSON-ready data.

A span is exported when its task ends; this shows the task before. Rules, each with a test of its own:

1. It is a snapshot: it holds no task, no group, and no frame, and taking it changes nothing.
2. It is bounded, and says how much it leaves out. Each group gets a share, so that a big one does not hide
   the others; within a group, the oldest tasks come first. The cost is that of the nodes it shows, a count
   over the groups, and, if the root has tasks of its own, a pass over the names beside them.
3. You may take it in any thread and in a signal handler, even while a task holds the loop. It never raises,
   whatever a coroutine looks like.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from otel_tasks._core.clock import rounded
from otel_tasks._core.frames import Location, Place, Stacks, place_of
from otel_tasks._core.state import TaskPriority, TaskStatus
from otel_tasks._core.task import ManagedTask, own_coroutine, reported
from otel_tasks._core.telemetry import span_ids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from otel_tasks._core.cancellation import CancelCause
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.ledger import Ledger, TaskStats
    from otel_tasks._core.places import Limiter, Ticket
    from otel_tasks._core.progress import Progress
    from otel_tasks._core.threads import Worker

TaskKind = Literal["task", "thread", "service"]
GroupKind = Literal["labeled", "block", "request"]

# Groups below groups that are shown: what is deeper is counted. It bounds the recursion here and in JSON.
_DEEPEST = 50
# What a group gets at least, if it is shown at all.
_LEAST = 5
# Of a longer queue the places in it are not told: it would have to be sorted.
_LONGEST_QUEUE = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskNode:
    """A live task in a ``TaskTree``; it holds no task and no frame.

    Attributes:
        id: Unique among the manager's live tasks.
        name: Its name.
        kind: ``"task"``; ``"thread"``: a function in a thread; ``"service"``: its attempt is below it.
        priority: How urgent it is.
        status: Where it is in its life.
        age: Seconds since it was created.
        where: The innermost line of your code, not of a library, at which it is; None if that is unknown.
        calls: The function that this line calls, such as ``sleep`` or ``Queue.get``.
        awaits: The task that it awaits, by its id or its asyncio name.
        queued: It waits for a place under ``max_concurrency``.
        queue_position: Its position in that queue, 1 is next; None if it is in none, or in a very long one.
        cause: Why it is being cancelled; None if it is not.
        cancelling_for: Seconds since the cancel request.
        progress: Its newest report of progress.
        trace_id: In hex; None without tracing.
        span_id: In hex; None without tracing.
        attempt: A service's running attempt; None between two.
    """

    id: str
    name: str
    kind: TaskKind
    priority: TaskPriority
    status: TaskStatus
    age: float
    where: Location | None
    calls: str | None
    awaits: str | None
    queued: bool
    queue_position: int | None
    cause: CancelCause | None
    cancelling_for: float | None
    progress: Progress | None
    trace_id: str | None
    span_id: str | None
    attempt: TaskNode | None

    def __str__(self) -> str:
        mark = "(S)" if self.kind == "service" else "(T)"
        return f"{mark} {_plain(self.name)}: {', '.join(_facts_of(self))}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "priority": self.priority.name,
            "status": str(self.status),
            "age": rounded(self.age),
            "where": self.where and self.where.to_dict(),
            "calls": self.calls,
            "awaits": self.awaits,
            "queued": self.queued,
            "queue_position": self.queue_position,
            "cause": self.cause and self.cause.to_dict(),
            "cancelling_for": None if self.cancelling_for is None else rounded(self.cancelling_for),
            "progress": self.progress and self.progress.to_dict(),
            "trace_id": self.trace_id,
            "span_id": self.span_id,
            "attempt": self.attempt and self.attempt.to_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupNode:
    """A group in a ``TaskTree``, with its content.

    Attributes:
        id: The name; for a block or a request, the name with ``#`` and a number.
        name: Its name.
        kind: ``"labeled"``, ``"block"`` (``async with``), or ``"request"``.
        refusal: Why it takes no new tasks; None if it does.
        cause: Why it is being cancelled; None if it is not.
        max_concurrency: How many of its tasks run at once; None means no limit.
        live: The number of its own live tasks.
        queued: How many of them wait for a place.
        host: The task that runs the block or the request's handler; None for a labeled group.
        where: The line at which the host is, if the host is not a managed task, which has its own node.
        tasks: Its tasks, oldest first.
        groups: The groups below it, oldest first.
        more_tasks: The number of its own tasks that are left out.
        more_groups: The number of groups directly below it that are left out with their content.
    """

    id: str
    name: str
    kind: GroupKind
    refusal: str | None
    cause: CancelCause | None
    max_concurrency: int | None
    live: int
    queued: int
    host: str | None
    where: Location | None
    tasks: tuple[TaskNode, ...]
    groups: tuple[GroupNode, ...]
    more_tasks: int
    more_groups: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "refusal": self.refusal,
            "cause": self.cause and self.cause.to_dict(),
            "max_concurrency": self.max_concurrency,
            "live": self.live,
            "queued": self.queued,
            "host": self.host,
            "where": self.where and self.where.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            "groups": [group.to_dict() for group in self.groups],
            "more_tasks": self.more_tasks,
            "more_groups": self.more_groups,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTree:
    """The groups and tasks of a manager that run now; ``str(tree)`` draws them.

    The drawing marks a task with ``(T)``, as Python 3.14's ``python -m asyncio pstree`` does, and a service
    with ``(S)``.

    Attributes:
        manager: The manager's name.
        closed: It is shut down.
        stats: Its counters.
        max_concurrency: How many of its tasks run at once; None means no limit.
        root: Its root group, with everything below it.
        abandoned_threads: The ids of ended tasks whose functions still run in a thread, each with its line.

    Example:
        >>> @app.get("/debug/tasks")
        ... async def tasks():
        ...     return global_task_manager.tree().to_dict()
    """

    manager: str
    closed: bool
    stats: TaskStats
    max_concurrency: int | None
    root: GroupNode
    abandoned_threads: tuple[tuple[str, Location | None], ...]

    def __str__(self) -> str:
        head = f"manager {_plain(self.manager)}: {', '.join(_facts_of_manager(self))}"
        threads = [
            f"the thread of {_plain(task_id)} runs on after it{_at(where)}"
            for task_id, where in self.abandoned_threads
        ]
        return "\n".join([head, *_drawn(self.root), *threads])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {
            "manager": self.manager,
            "closed": self.closed,
            "stats": self.stats.to_dict(),
            "max_concurrency": self.max_concurrency,
            "root": self.root.to_dict(),
            "abandoned_threads": [
                {"id": task_id, "where": where and where.to_dict()}
                for task_id, where in self.abandoned_threads
            ],
        }


# -- looking --------------------------------------------------------------------------------------


def check_limit(limit: object) -> None:
    """Raise a ValueError unless this is how many to show."""
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"limit must be how many tasks and groups to show, at least 1, got {limit!r}")


def tree_of(ledger: Ledger, limit: int, stacks: Stacks) -> TaskTree:
    """Take a snapshot of what runs.

    Args:
        ledger: The manager's records.
        limit: How many tasks and groups to show at most, at least 1.
        stacks: Where to look for the frames of threads.
    """
    survey = Survey(ledger, stacks)
    return TaskTree(
        manager=ledger.name,
        closed=ledger.closed,
        stats=ledger.stats(),
        max_concurrency=ledger.limiter.limit,
        root=survey.group(ledger.root, limit + 1, 0)[0],
        abandoned_threads=tuple(
            (worker.id, place_of(frames_of(worker, stacks)).at)
            for worker in islice(ledger.threads.abandoned(), limit)
        ),
    )


class Survey:
    """One look at a manager: what the nodes have in common."""

    def __init__(self, ledger: Ledger, stacks: Stacks) -> None:
        self._ledger = ledger
        self._stacks = stacks
        self._now = ledger.clock()
        self._positions: dict[Limiter, dict[Ticket, int]] = {}

    def group(self, group: TaskGroup, limit: int, depth: int) -> tuple[GroupNode, int]:
        """A group, and how many tasks and groups were taken for it, itself included."""
        live = self._live(group)
        # Below the half for its own tasks if there are many; what the groups leave over is theirs, too.
        left = limit - 1
        children = list(group._children) if depth < _DEEPEST else []
        groups, taken = self._groups(children, left - min(live, (left + 1) // 2), depth + 1)
        tasks, shown = self._tasks(group, live, left - taken)
        host = self._host(group)
        return GroupNode(
            id=group.id,
            name=group.name,
            kind=_kind_of_group(group),
            refusal=group._refusal,
            cause=group._cause,
            max_concurrency=group.max_concurrency,
            live=live,
            queued=group._queued,
            host=None if host is None else known_as(host),
            where=None if host is None or isinstance(host, ManagedTask) else self.place(host).at,
            tasks=tasks,
            groups=groups,
            more_tasks=max(0, live - shown),
            more_groups=len(group._children) - len(groups),
        ), 1 + taken + shown

    def _groups(self, children: list[TaskGroup], left: int, depth: int) -> tuple[tuple[GroupNode, ...], int]:
        nodes: list[GroupNode] = []
        taken = 0
        all_fit = _fit(children, left)
        for number, child in enumerate(children):
            if taken >= left:
                break
            share = left if all_fit else max(_LEAST, (left - taken) // (len(children) - number))
            node, used = self.group(child, min(share, left - taken), depth)
            nodes.append(node)
            taken += used
        return tuple(nodes), taken

    def _tasks(self, group: TaskGroup, live: int, limit: int) -> tuple[tuple[TaskNode, ...], int]:
        if not live or limit <= 0:
            return (), 0
        chosen = list(islice(_own_tasks(group), limit))
        attempts = {attempt for task in chosen if (attempt := _attempt_of(task)) is not None}
        return tuple(self.task(task) for task in chosen if task not in attempts), len(chosen)

    def _live(self, group: TaskGroup) -> int:
        """How many live tasks a group has itself."""
        if group is not self._ledger.root:
            return len(group._live)
        # The root's table is the namespace of all labeled groups too.
        labels = [link() for link in self._ledger.labels.valuerefs()]
        return max(0, len(group._live) - sum(len(label._live) for label in labels if label is not None))

    def _host(self, group: TaskGroup) -> asyncio.Task[Any] | None:
        return group._host if group._scope is None else group._scope.host

    def task(self, task: ManagedTask[Any]) -> TaskNode:
        """A task, of a service with the attempt that runs."""
        status = task.status
        # A service waits for its attempt, or to begin the next: the code is this package's.
        place = Place() if _kind_of_task(task) == "service" else self.place(task)
        ticket = None if task._extras is None else task._extras.ticket
        queued = task._extras is not None and task._extras.queued
        awaited: object = getattr(task, "_fut_waiter", None)
        cause = task._cause
        attempt = _attempt_of(task)
        trace_id, span_id = span_ids(task._span)
        return TaskNode(
            id=task.id,
            name=task.get_name(),
            kind=_kind_of_task(task),
            priority=task._priority,
            status=status,
            age=max(0.0, self._now - task._created_at),
            where=place.at,
            calls=place.calls,
            awaits=known_as(awaited) if isinstance(awaited, asyncio.Task) else None,
            queued=queued,
            queue_position=self._position(ticket) if queued and ticket is not None else None,
            cause=cause,
            cancelling_for=None if cause is None or cause.at is None else max(0.0, self._now - cause.at),
            progress=reported(task),
            trace_id=trace_id,
            span_id=span_id,
            attempt=None if attempt is None else self.task(attempt),
        )

    def place(self, task: asyncio.Task[Any]) -> Place:
        """Where a task is."""
        return place_of_task(task, self._stacks, self._ledger.thread)

    def _position(self, ticket: Ticket) -> int | None:
        queue = ticket.queue
        if queue is None or len(queue._heap) > _LONGEST_QUEUE:
            return None
        if queue not in self._positions:
            waiting = [
                entry for entry in queue._heap if entry[3].queue is queue and entry[3].version == entry[2]
            ]
            self._positions[queue] = {entry[3]: n for n, entry in enumerate(sorted(waiting), 1)}
        return self._positions[queue].get(ticket)


def place_of_task(task: asyncio.Task[Any], stacks: Stacks, thread: int | None) -> Place:
    """Where a task is; of a function in a thread, where that thread is.

    Args:
        task: Any, managed or not.
        stacks: The frames of all threads.
        thread: That of the task's loop.
    """
    worker = None if not isinstance(task, ManagedTask) or task._extras is None else task._extras.worker
    frames = [] if worker is None else frames_of(worker, stacks)
    return place_of(frames or stacks.of_task(task, thread, own_coroutine), home=isinstance(task, ManagedTask))


def frames_of(worker: Worker[Any], stacks: Stacks) -> list[FrameType]:
    """The frames of a worker's thread; none before it runs."""
    # It is set when it is started.
    thread = getattr(worker, "_thread", None)
    return [] if thread is None else stacks.of_thread(thread.ident)


def _fit(groups: list[TaskGroup], limit: int) -> bool:
    """True if these groups, with all below and in them, are no more than ``limit``."""
    found = list(groups)
    size = 0
    # The list grows while it is walked, until it is too long.
    for group in found:
        size += 1 + len(group._live)
        if size > limit:
            return False
        found.extend(group._children)
    return True


def _own_tasks(group: TaskGroup) -> Iterator[ManagedTask[Any]]:
    # A copy made in one step: another thread may be creating tasks meanwhile.
    return (task for task in list(group._live.values()) if task._group is group)


def _attempt_of(task: ManagedTask[Any]) -> ManagedTask[Any] | None:
    extras = task._extras
    attempt = None if extras is None else extras.attempt
    return None if attempt is None or attempt.done() else attempt


def _kind_of_task(task: ManagedTask[Any]) -> TaskKind:
    extras = task._extras
    if extras is not None and extras.supervises:
        return "service"
    return "task" if extras is None or extras.worker is None else "thread"


def _kind_of_group(group: TaskGroup) -> GroupKind:
    if not group.scoped:
        return "labeled"
    return "block" if group._scope is not None else "request"


def known_as(task: asyncio.Task[Any]) -> str:
    """A task's id, or the name that asyncio knows."""
    return task.id if isinstance(task, ManagedTask) else task.get_name()


# -- drawing --------------------------------------------------------------------------------------


def _drawn(group: GroupNode) -> Iterator[str]:
    """The lines of what is in a group."""
    entries: list[TaskNode | GroupNode | str] = [*group.tasks]
    if group.more_tasks:
        entries.append(f"... {group.more_tasks} more task{'s'[: group.more_tasks > 1]}")
    entries += group.groups
    if group.more_groups:
        entries.append(f"... {group.more_groups} more group{'s'[: group.more_groups > 1]}")
    for number, entry in enumerate(entries, 1):
        first, rest = ("└── ", "    ") if number == len(entries) else ("├── ", "│   ")
        yield first + (_head_of(entry) if isinstance(entry, GroupNode) else str(entry))
        if isinstance(entry, GroupNode):
            yield from (rest + line for line in _drawn(entry))
        elif isinstance(entry, TaskNode) and entry.attempt is not None:
            yield f"{rest}└── {entry.attempt}"


def _head_of(group: GroupNode) -> str:
    facts = [f"{group.live} task{'s'[: group.live != 1]}"]
    if group.queued:
        facts.append(f"{group.queued} queued")
    if group.max_concurrency is not None:
        facts.append(f"max_concurrency {group.max_concurrency}")
    if group.cause is not None:
        facts.append(f"cancelled ({_plain(str(group.cause))})")
    elif group.refusal is not None:
        facts.append(group.refusal)
    if group.where is not None:
        who = "handler" if group.kind == "request" else f"block in {_plain(group.host or '')}"
        facts.append(f"{who}{_at(group.where)}")
    elif group.host is not None:
        facts.append(f"block in {_plain(group.host)}")
    return f"{_plain(group.id)}: {', '.join(facts)}"


def _facts_of_manager(tree: TaskTree) -> list[str]:
    facts = [f"{tree.stats.live} live task{'s'[: tree.stats.live != 1]}"]
    if tree.stats.queued:
        facts.append(f"{tree.stats.queued} queued")
    if tree.max_concurrency is not None:
        facts.append(f"max_concurrency {tree.max_concurrency}")
    if tree.closed:
        facts.append("shut down")
    return facts


def _facts_of(task: TaskNode) -> Iterator[str]:
    yield "queued" if task.queued else str(task.status)
    yield duration(task.age)
    if task.priority is not TaskPriority.NORMAL:
        yield task.priority.name.lower()
    if task.queue_position is not None:
        yield f"place {task.queue_position}"
    if task.cause is not None:
        ago = "" if task.cancelling_for is None else f" {duration(task.cancelling_for)} ago"
        yield f"asked to end{ago} ({_plain(str(task.cause))})"
    if task.kind == "thread":
        yield "in a thread"
    if task.kind == "service" and task.attempt is None:
        yield "no attempt runs"
    if task.where is not None:
        yield _at(task.where).strip() + _calls(task.calls)
    if task.awaits is not None:
        yield f"awaits {_plain(task.awaits)}"
    if task.progress is not None:
        yield _drawn_progress(task.progress)


def _drawn_progress(progress: Progress) -> str:
    text = f"{progress.done:g}" if progress.total is None else f"{progress.done:g} of {progress.total:g}"
    fraction = "" if progress.fraction is None else f" ({progress.fraction:.0%})"
    return f"done {text}{fraction}{': ' + _plain(progress.message) if progress.message else ''}"


def in_words(place: Place) -> str:
    """Say where a task is, behind what is said about it; nothing where that is not known."""
    return "" if place.at is None else f"; it is at {place.at}{_calls(place.calls)}"


def _calls(function: str | None) -> str:
    return f" > {function}" if function else ""


def _at(where: Location | None) -> str:
    return "" if where is None else f" at {_plain(str(where))}"


def _plain(text: str) -> str:
    """A text that stays on its line, and says nothing to a terminal: names may come from a client."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def duration(seconds: float) -> str:
    """Write a duration in few characters."""
    if seconds < 60:
        return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{seconds:.1f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days}d{hours % 24:02d}h"
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"
