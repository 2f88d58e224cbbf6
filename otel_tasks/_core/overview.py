"""Sums up what runs in a manager by name: ``manager.overview()``.

A tree has a node for each task; an overview has a row for each name. It stays small however many tasks there
are, so that it can be taken every second and sent to every viewer.

Rules, each with a test of its own:

1. Every live task is in one class; a service and its attempt, or periodic work and its run, are one. The
   counts of a group are those of its classes and of the groups below it: rows that do not fit are folded into
   one, never dropped.
2. A row's key comes from the names on its path alone: another process, or the next start, has the same.
3. Taking an overview changes nothing, and costs about 0.2 us for each live task.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import compress
from typing import TYPE_CHECKING, Any

from otel_tasks._core.inspection import attempt_of, is_queued, kind_of_group, kind_of_task, supervises
from otel_tasks._core.task import reported
from otel_tasks._core.telemetry import low_cardinality

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.records import TaskStats
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.task_tree import GroupKind, TaskKind
    from otel_tasks._core.tree import Ledger

# The name of a row into which others are folded.
FOLDED = "…"
# Names of tasks for which the class is remembered: a pattern search each takes longer than all the rest.
_MANY_NAMES = 20_000

# asyncio's own: a numbered task has the name of its function there, without the number.
_base_name = asyncio.Task.get_name
_cancelling = asyncio.Task.cancelling


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSum:
    """The sum of the progress that live tasks have reported.

    Attributes:
        done: How much is done.
        total: How much there is; None if a task does not know its total.
        reporting: How many tasks have reported.
    """

    done: float
    total: float | None
    reporting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """How many live tasks a row stands for, and how old they are.

    Times are those of their creation, on the clock of ``TaskInfo``.

    Attributes:
        count: The live tasks.
        queued: Those that wait for a place.
        cancelling: Those whose cancellation was requested.
        oldest: The oldest one's time; None without tasks.
        p50: The median's time; None without tasks, and for the root.
        p90: The time of the one that is older than 90 %; None as ``p50``.
        progress: The sum of their reports; None without any.
    """

    count: int
    queued: int
    cancelling: int
    oldest: float | None
    p50: float | None
    p90: float | None
    progress: ProgressSum | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassRow:
    """The live tasks with one name, numbers and ids cut off, in the groups of one row.

    Attributes:
        key: Made from the names on the path.
        group: The key of the group's row.
        name: The name that the tasks share.
        kind: Of the first one.
        tasks: Their numbers and ages.
        only: The task, if it is the only one.
    """

    key: str
    group: str
    name: str
    kind: TaskKind
    tasks: Counted
    only: ManagedTask[Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """The open groups with the same names on their paths.

    Attributes:
        key: Made from the names on the path.
        parent: The key of the row above; None for the root.
        name: Their name; the manager's for the root.
        kind: Of the first one.
        instances: How many groups they are.
        group_id: The id of the group, if it is one.
        max_concurrency: The limit of the first one.
        tasks: Numbers and ages of the tasks in them and below.
    """

    key: str
    parent: str | None
    name: str
    kind: GroupKind
    instances: int
    group_id: str | None
    max_concurrency: int | None
    tasks: Counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What runs in a manager, by name.

    Attributes:
        manager: The manager's name.
        now: The time at which it was taken, on the clock of ``TaskInfo``.
        epoch: The wall-clock time at which that clock was 0.
        closed: The manager is shut down.
        stats: The manager's counters.
        cancelling: The tasks whose cancellation was requested.
        max_concurrency: The manager's limit.
        open_groups: How many groups are open.
        groups: One row for each path of names, the root first, parents before children.
        classes: One row for each name of tasks in a row of groups.
        members: For each key of ``members``, its oldest live tasks.
        folded_groups: How many rows of groups are part of another one.
        folded_classes: How many classes are part of another one.
        keys_of_names: The key of the first row with each name; the root's name is ``root``.
    """

    manager: str
    now: float
    epoch: float
    closed: bool
    stats: TaskStats
    cancelling: tuple[ManagedTask[Any], ...]
    max_concurrency: int | None
    open_groups: int
    groups: tuple[GroupRow, ...]
    classes: tuple[ClassRow, ...]
    members: Mapping[str, tuple[ManagedTask[Any], ...]]
    folded_groups: int
    folded_classes: int
    keys_of_names: Mapping[str, str]

    def keys_of(self, task: ManagedTask[Any] | TaskInfo) -> tuple[str | None, str | None]:
        """The keys of the rows to which a task belongs: of its group, and of its class.

        Args:
            task: A live task, or the record of one that has ended. Of the latter's groups, only the innermost
                is known: if no such row is there, the keys are None. The row of its class need not be there.
        """
        if isinstance(task, asyncio.Task):
            group = _key_of_group(task._group)
            return group, key_of("c", group, _class_name(_base_name(task)))
        return self._keys_of_record(task)

    def _keys_of_record(self, info: TaskInfo) -> tuple[str | None, str | None]:
        name = low_cardinality(info.group) if info.group != info.group_id else info.group
        group = self.keys_of_names.get(name)
        return group, None if group is None else key_of("c", group, _class_name(info.name))


def overview_of(
    ledger: Ledger, members: Mapping[str, int], max_groups: int, max_classes: int, closed: bool
) -> Overview:
    """Take an overview.

    Args:
        ledger: The manager's records.
        members: How many tasks to return for each key.
        max_groups: How many rows of groups to make at most, at least 1, and one for the rest.
        max_classes: How many classes to make at most, at least 1, and one for the rest of each group.
        closed: The manager is shut down here.
    """
    survey = _Survey(ledger, max_groups)
    folded = survey.fold_classes(max_classes)
    rows = list(survey.rows.values())
    return Overview(
        manager=ledger.name,
        now=ledger.home.clock(),
        epoch=ledger.home.epoch,
        closed=closed,
        stats=ledger.stats(),
        cancelling=tuple(task for row in rows for each in row.classes.values() for task in each.cancelling),
        max_concurrency=ledger.places.limiter.limit,
        open_groups=survey.open_groups,
        groups=tuple(row.summary(ledger.name) for row in rows),
        classes=tuple(each.summary() for row in rows for each in row.classes.values()),
        members={key: survey.members(key, limit) for key, limit in members.items()},
        folded_groups=len(survey.folded),
        folded_classes=folded,
        # The first one last: it wins.
        keys_of_names={row.name: row.key for row in reversed(rows)},
    )


@dataclass(slots=True)
class _Class:
    key: str
    group: str
    name: str
    tasks: list[ManagedTask[Any]] = field(default_factory=list)
    created: list[float] = field(default_factory=list)
    cancelling: list[ManagedTask[Any]] = field(default_factory=list)
    special: list[ManagedTask[Any]] = field(default_factory=list)

    def read(self) -> None:
        """Read what the tasks are like."""
        tasks = self.tasks
        self.created = sorted([task._created_at for task in tasks])
        self.cancelling = list(compress(tasks, map(_cancelling, tasks)))
        # Queued tasks, those with progress, and services have extras.
        self.special = [task for task in tasks if task._extras is not None]

    def leave_out(self, attempts: set[ManagedTask[Any]]) -> None:
        """Forget the attempts of services."""
        if not attempts.isdisjoint(self.special):
            self.tasks = [task for task in self.tasks if task not in attempts]
            self.read()

    def absorb(self, other: _Class) -> None:
        """Take over the tasks of another class."""
        self.tasks += other.tasks
        self.created = sorted(self.created + other.created)
        self.cancelling += other.cancelling
        self.special += other.special

    def summary(self) -> ClassRow:
        """The row of this class."""
        return ClassRow(
            key=self.key,
            group=self.group,
            name=self.name,
            kind=kind_of_task(self.tasks[0]),
            tasks=_counted(self.created, len(self.cancelling), self.special),
            only=self.tasks[0] if len(self.tasks) == 1 else None,
        )


class _Row:
    """The groups with the same names on their paths, while they are counted."""

    def __init__(self, key: str, parent: _Row | None, group: TaskGroup, name: str) -> None:
        self.key = key
        self.name = name
        self.classes: dict[str, _Class] = {}
        self._parent = parent
        self._first = group
        self._instances = 0
        # This row and those below it.
        self._below: list[_Row] = [self]
        above = parent
        while above is not None:
            above._below.append(self)
            above = above._parent

    def add(self, tasks: list[ManagedTask[Any]]) -> None:
        """Add one group, with its own tasks."""
        self._instances += 1
        # By the name as asyncio has it: most tasks of a class share it.
        by_name: defaultdict[str, list[ManagedTask[Any]]] = defaultdict(list)
        for name, task in zip(map(_base_name, tasks), tasks, strict=True):
            by_name[name].append(task)
        for name, found in by_name.items():
            self._class(_class_name(name)).tasks += found

    def every_class(self) -> Iterator[_Class]:
        """The classes of this row and of those below it."""
        return (each for row in self._below for each in row.classes.values())

    def summary(self, root_name: str) -> GroupRow:
        """The row of these groups."""
        classes = list(self.every_class())
        created = [time for each in classes for time in each.created]
        # The percentiles of the root say little, and sorting takes as long as everything else.
        is_root = self._parent is None
        oldest = min((each.created[0] for each in classes), default=None)
        group = self._first
        is_folded = self.name == FOLDED
        return GroupRow(
            key=self.key,
            parent=None if self._parent is None else self._parent.key,
            name=root_name if is_root else self.name,
            kind=kind_of_group(group),
            instances=self._instances,
            group_id=group.id if self._instances == 1 and not is_folded else None,
            max_concurrency=None if is_folded else group.max_concurrency,
            tasks=_counted(
                [] if is_root else sorted(created),
                sum(len(each.cancelling) for each in classes),
                [task for each in classes for task in each.special],
                count=len(created),
                oldest=oldest,
            ),
        )

    def _class(self, name: str) -> _Class:
        found = self.classes.get(name)
        if found is None:
            found = self.classes[name] = _Class(key_of("c", self.key, name), self.key, name)
        return found


class _Survey:
    """Assigns the groups of one manager to rows, and their tasks to classes."""

    def __init__(self, ledger: Ledger, max_groups: int) -> None:
        self.rows: dict[str, _Row] = {}
        self.folded: set[str] = set()
        self._max_groups = max_groups
        root = ledger.root
        groups = root._below()
        self.open_groups = len(groups) - 1
        self._root = self._row(ROOT_KEY, None, root, "root")
        row_of = {root: self._root}
        self._root.add(self._tasks_of_root(root, groups))
        for group in groups[1:]:
            parent = group._parent
            above = self._root if parent is None else row_of.get(parent, self._root)
            row = row_of[group] = self._row_of_group(group, above)
            row.add(list(group._live.values()))
        every = list(self._root.every_class())
        for each in every:
            each.read()
        attempts = {attempt_of(task) for each in every for task in each.special if supervises(task)}
        if attempts:
            self._leave_out({task for task in attempts if task is not None})

    def _tasks_of_root(self, root: TaskGroup, groups: list[TaskGroup]) -> list[ManagedTask[Any]]:
        # The root's table also has the tasks of all labeled groups; most managers have no others in it.
        tasks = list(root._live.values())
        if len(tasks) == sum(len(group._live) for group in groups[1:] if not group.scoped):
            return []
        return [task for task in tasks if task._group is root]

    def _leave_out(self, attempts: set[ManagedTask[Any]]) -> None:
        for row in self.rows.values():
            for each in list(row.classes.values()):
                each.leave_out(attempts)
                if not each.tasks:
                    del row.classes[each.name]

    def fold_classes(self, limit: int) -> int:
        """Fold the smallest classes of each group into one, until ``limit`` are left; return how many."""
        every = list(self._root.every_class())
        if len(every) <= limit:
            return 0
        every.sort(key=lambda each: (-len(each.cancelling), -len(each.tasks), each.created[0]))
        for each in every[limit:]:
            row = self.rows[each.group]
            del row.classes[each.name]
            rest = row.classes.get(FOLDED)
            if rest is None:
                rest = row.classes[FOLDED] = _Class(key_of("c", row.key, FOLDED), row.key, FOLDED)
            rest.absorb(each)
        return len(every) - limit

    def members(self, key: str, limit: int) -> tuple[ManagedTask[Any], ...]:
        """The oldest tasks of a row of groups, or of a class; none if there is no such row."""
        row = self.rows.get(key)
        if row is not None:
            found = [task for each in row.every_class() for task in each.tasks]
        else:
            found = next((each.tasks for each in self._root.every_class() if each.key == key), [])
        # A stable sort: among equals, the order in which the tables have them.
        return tuple(sorted(found, key=lambda task: task._created_at)[:limit])

    def _row_of_group(self, group: TaskGroup, above: _Row) -> _Row:
        name = _row_name(group)
        key = key_of("g", above.key, name)
        row = self.rows.get(key)
        if row is not None:
            return row
        if len(self.rows) < self._max_groups:
            return self._row(key, above, group, name)
        self.folded.add(key)
        key = key_of("g", ROOT_KEY, FOLDED)
        return self.rows.get(key) or self._row(key, self._root, group, FOLDED)

    def _row(self, key: str, parent: _Row | None, group: TaskGroup, name: str) -> _Row:
        row = self.rows[key] = _Row(key, parent, group, name)
        return row


def _counted(
    created: Sequence[float],
    cancelling: int,
    special: Iterable[ManagedTask[Any]],
    *,
    count: int | None = None,
    oldest: float | None = None,
) -> Counted:
    """Count the tasks of a row.

    Args:
        created: The times of their creation, ascending; empty if their percentiles do not matter.
        cancelling: How many are being cancelled.
        special: The tasks that may queue, or may have progress.
        count: How many there are; None is the length of ``created``.
        oldest: The first time; None is the first of ``created``.
    """
    special = list(special)
    size = len(created)
    return Counted(
        count=size if count is None else count,
        queued=sum(1 for task in special if is_queued(task) and not task.cancelling()),
        cancelling=cancelling,
        oldest=created[0] if created else oldest,
        p50=created[size // 2] if created else None,
        p90=created[size // 10] if created else None,
        progress=_progress(special),
    )


def _progress(tasks: Iterable[ManagedTask[Any]]) -> ProgressSum | None:
    reports = [report for report in map(reported, tasks) if report is not None]
    if not reports:
        return None
    totals = [report.total for report in reports if report.total is not None]
    return ProgressSum(
        done=sum(report.done for report in reports),
        total=sum(totals) if len(totals) == len(reports) else None,
        reporting=len(reports),
    )


def _row_name(group: TaskGroup) -> str:
    # A label is chosen by the service. A block or a request may have a number in its name.
    return low_cardinality(group.name) if group.scoped else group.name


def _key_of_group(group: TaskGroup) -> str:
    key = ROOT_KEY
    # The root has its own key.
    for around in reversed(list(group._outward())[:-1]):
        key = key_of("g", key, _row_name(around))
    return key


@lru_cache(maxsize=8192)
def key_of(kind: str, parent: str, name: str) -> str:
    """The key of a row: ``g`` or ``c``, and a hash of the names on its path."""
    return kind + blake2b(f"{parent}\0{name}".encode(errors="surrogatepass"), digest_size=5).hexdigest()


@lru_cache(maxsize=_MANY_NAMES)
def _class_name(name: str) -> str:
    return low_cardinality(name)


ROOT_KEY = key_of("g", "", "root")
