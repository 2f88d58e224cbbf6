"""The tree of what runs in a manager, as data, as JSON-ready data, and as text: ``TaskTree`` and its nodes.

Rules, each with a test of its own:

1. A tree holds no task, no group, and no frame. ``inspection`` takes it.
2. A big tree becomes data and text in slices, each of ``COUNTS_PER_SLICE`` nodes or lines.
3. The text of a node stays on its line and sends nothing to a terminal, whatever the names contain: they may
   come from a client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from otel_tasks._core.clock import rounded
from otel_tasks._core.frames import Place
from otel_tasks._core.slices import COUNTS_PER_SLICE, Budget, at_once
from otel_tasks._core.state import TaskPriority, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.frames import Location
    from otel_tasks._core.info import ConsumerInfo
    from otel_tasks._core.progress import Progress
    from otel_tasks._core.records import TaskStats

TaskKind = Literal["task", "thread", "service"]
GroupKind = Literal["labeled", "block", "request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskNode:
    """A live task in a ``TaskTree``.

    Attributes:
        id: Unique among the manager's live tasks.
        name: Its name.
        kind: ``"task"``; ``"thread"``: a function in a thread; ``"service"``, with its attempt below it, or
            periodic work with its run.
        priority: How urgent it is.
        status: Where it is in its life.
        age: Seconds since it was created.
        where: The innermost line of your code, not of a library, that it has reached; None if unknown.
        calls: The function that this line calls, such as ``sleep`` or ``Queue.get``.
        awaits: The id of the task that it awaits; of a plain asyncio task, the name and, in parentheses, the
            coroutine.
        queued: It waits for a place under ``max_concurrency``.
        queue_position: Its position in that queue, 1 is next; None in no queue and in a very long one.
        cause: Why it is being cancelled; None if it is not.
        cancelling_for: Seconds since the cancel request.
        progress: Its latest progress report; None before the first.
        trace_id: In hex; None without tracing.
        span_id: In hex; None without tracing.
        attempt: A service's running attempt, or the live run of periodic work; None between two of them.
        next_run_in: Seconds until the next run of periodic work; None for any other task.
        attempt_number: With ``retry=``, the number of the current attempt, or of the last one while the task
            backs off.
        retry_in: Seconds until the next attempt; None unless the task backs off.
        consumer: How many items of a consumer are where; None for any other task.
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
    next_run_in: float | None = None
    attempt_number: int | None = None
    retry_in: float | None = None
    consumer: ConsumerInfo | None = None

    def __str__(self) -> str:
        mark = "(S)" if self.kind == "service" else "(T)"
        return f"{mark} {_printable(self.name)}: {', '.join(_facts_of_task(self))}"

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
            "next_run_in": None if self.next_run_in is None else rounded(self.next_run_in),
            "attempt_number": self.attempt_number,
            "retry_in": None if self.retry_in is None else rounded(self.retry_in),
            "consumer": self.consumer and self.consumer.to_dict(),
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
        queued: The number of those that wait for a place.
        host: The task that runs the block or the request's handler; None for a labeled group.
        where: The line that the host has reached; None for a managed task, which has a node of its own.
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
        return at_once(_group_data(self, Budget(COUNTS_PER_SLICE)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTree:
    """The running groups and tasks of a manager; ``str(tree)`` draws them.

    The drawing marks a task with ``(T)``, as Python 3.14's ``python -m asyncio pstree`` does, and a service
    with ``(S)``.

    Attributes:
        manager: The manager's name.
        closed: It is shut down.
        stats: Its counters.
        max_concurrency: How many of its tasks run at once; None means no limit.
        root: Its root group, with everything below it.
        abandoned_threads: The ids of ended tasks whose functions still run in a thread, each with the line
            that the thread has reached.

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
        return at_once(tree_text(self))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return at_once(tree_data(self))


# -- data -----------------------------------------------------------------------------------------


def tree_data(tree: TaskTree) -> Generator[None, None, dict[str, Any]]:
    """Make JSON-ready data of a tree, in slices: ``tree.to_dict()``."""
    root = yield from _group_data(tree.root, Budget(COUNTS_PER_SLICE))
    return {
        "manager": tree.manager,
        "closed": tree.closed,
        "stats": tree.stats.to_dict(),
        "max_concurrency": tree.max_concurrency,
        "root": root,
        "abandoned_threads": [
            {"id": task_id, "where": where and where.to_dict()} for task_id, where in tree.abandoned_threads
        ],
    }


def _group_data(group: GroupNode, budget: Budget) -> Generator[None, None, dict[str, Any]]:
    tasks: list[dict[str, Any]] = []
    for task in group.tasks:
        tasks.append(task.to_dict())
        if budget.spend():
            yield
    groups: list[dict[str, Any]] = []
    for child in group.groups:
        groups.append((yield from _group_data(child, budget)))
        if budget.spend():
            yield
    return {
        "id": group.id,
        "name": group.name,
        "kind": group.kind,
        "refusal": group.refusal,
        "cause": group.cause and group.cause.to_dict(),
        "max_concurrency": group.max_concurrency,
        "live": group.live,
        "queued": group.queued,
        "host": group.host,
        "where": group.where and group.where.to_dict(),
        "tasks": tasks,
        "groups": groups,
        "more_tasks": group.more_tasks,
        "more_groups": group.more_groups,
    }


def duration(seconds: float) -> str:
    """Write a duration in few characters."""
    if seconds < 60:
        return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{seconds:.1f}s"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days}d{hours % 24:02d}h"
    return f"{hours}h{minutes % 60:02d}m" if hours else f"{minutes}m{int(seconds % 60):02d}s"


# -- drawing --------------------------------------------------------------------------------------


def tree_text(tree: TaskTree) -> Generator[None, None, str]:
    """Draw a tree, in slices: ``str(tree)``."""
    lines = [f"manager {_printable(tree.manager)}: {', '.join(_facts_of_manager(tree))}"]
    budget = Budget(COUNTS_PER_SLICE)
    for line in _lines_of(tree.root):
        lines.append(line)
        if budget.spend():
            yield
    lines += [
        f"abandoned thread of {_printable(task_id)}{_at(where)}" for task_id, where in tree.abandoned_threads
    ]
    return "\n".join(lines)


def _lines_of(group: GroupNode) -> Iterator[str]:
    """The lines below the one of a group."""
    entries = _entries_of(group)
    for number, entry in enumerate(entries, 1):
        first, rest = ("└── ", "    ") if number == len(entries) else ("├── ", "│   ")
        yield first + (_head_of(entry) if isinstance(entry, GroupNode) else str(entry))
        if isinstance(entry, GroupNode):
            yield from (rest + line for line in _lines_of(entry))
        elif isinstance(entry, TaskNode) and entry.attempt is not None:
            yield f"{rest}└── {entry.attempt}"


def _entries_of(group: GroupNode) -> list[TaskNode | GroupNode | str]:
    entries: list[TaskNode | GroupNode | str] = [*group.tasks]
    if group.more_tasks:
        entries.append(f"... {_counted(group.more_tasks, 'more task')}")
    entries += group.groups
    if group.more_groups:
        entries.append(f"... {_counted(group.more_groups, 'more group')}")
    return entries


def _head_of(group: GroupNode) -> str:
    facts = [_counted(group.live, "task"), *_limits(group.queued, group.max_concurrency)]
    if group.cause is not None:
        facts.append(f"cancelled ({_printable(str(group.cause))})")
    elif group.refusal is not None:
        facts.append(group.refusal)
    facts += _facts_of_host(group)
    return f"{_printable(group.id)}: {', '.join(facts)}"


def _facts_of_host(group: GroupNode) -> Iterator[str]:
    if group.host is None:
        return
    if group.kind == "request":
        yield "handler" + (_at(group.where) or f" in {_printable(group.host)}")
    else:
        yield f"block in {_printable(group.host)}{_at(group.where)}"


def _facts_of_manager(tree: TaskTree) -> Iterator[str]:
    yield _counted(tree.stats.live, "live task")
    yield from _limits(tree.stats.queued, tree.max_concurrency)
    if tree.closed:
        yield "shut down"


def _limits(queued: int, max_concurrency: int | None) -> Iterator[str]:
    if queued:
        yield f"{queued} queued"
    if max_concurrency is not None:
        yield f"max_concurrency {max_concurrency}"


def _facts_of_task(task: TaskNode) -> Iterator[str]:
    yield "queued" if task.queued else str(task.status)
    yield duration(task.age)
    if task.priority is not TaskPriority.NORMAL:
        yield task.priority.name.lower()
    if task.queue_position is not None:
        yield f"queue position {task.queue_position}"
    if task.cause is not None:
        ago = "" if task.cancelling_for is None else f" {duration(task.cancelling_for)} ago"
        yield f"cancel requested{ago} ({_printable(str(task.cause))})"
    yield from _retries_of(task)
    yield from _activity_of(task)


def _retries_of(task: TaskNode) -> Iterator[str]:
    if task.attempt_number is None:
        return
    if task.retry_in is not None:
        yield f"backing off, attempt {task.attempt_number + 1} in {duration(task.retry_in)}"
    elif task.queued:
        yield f"for attempt {task.attempt_number + 1}"
    elif task.attempt_number > 1:
        yield f"attempt {task.attempt_number}"


def _activity_of(task: TaskNode) -> Iterator[str]:
    if task.kind == "thread":
        yield "in a thread"
    if task.next_run_in is not None:
        yield f"next run in {duration(task.next_run_in)}"
    elif task.kind == "service" and task.attempt is None:
        yield "no running attempt"
    if task.consumer is not None:
        yield from _facts_of_consumer(task.consumer)
    if task.where is not None:
        yield f"at {_printable(str(Place(task.where, task.calls)))}"
    if task.awaits is not None:
        yield f"awaits {_printable(task.awaits)}"
    if task.progress is not None:
        yield _drawn_progress(task.progress)


def _facts_of_consumer(consumer: ConsumerInfo) -> Iterator[str]:
    yield f"{consumer.in_hand} in hand (concurrency {consumer.concurrency})"
    yield f"{consumer.done} done"
    for what in ("failed", "cancelled", "handed_back"):
        if count := getattr(consumer, what):
            yield f"{count} {what.replace('_', ' ')}"


def _drawn_progress(progress: Progress) -> str:
    text = f"{progress.done:g}" if progress.total is None else f"{progress.done:g} of {progress.total:g}"
    fraction = "" if progress.fraction is None else f" ({progress.fraction:.0%})"
    return f"progress {text}{fraction}{': ' + _printable(progress.message) if progress.message else ''}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _at(where: Location | None) -> str:
    return "" if where is None else f" at {_printable(str(where))}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
