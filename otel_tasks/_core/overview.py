"""Sums up what runs in a manager by name: ``manager.overview()``.

A tree has a node for each task; an overview has a row for each name. It stays small however many tasks there
are, so that it can be taken every second and sent to every viewer.

Rules, each with a test of its own:

1. Every live task is in one class; a service and its attempt, or periodic work and its run, are one. The
   counts of a group are those of its classes and of the groups below it: rows that do not fit are folded into
   one, never dropped.
2. A row's key comes from the names on its path alone: another process, or the next start, has the same.
3. Taking an overview changes nothing, and costs about 0.2 us for each live task. ``survey`` does that.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

from otel_tasks._core.telemetry import low_cardinality

if TYPE_CHECKING:
    from collections.abc import Mapping

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.records import TaskStats
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.task_tree import GroupKind, TaskKind

# The name of a row into which others are folded.
FOLDED = "…"
# Names of tasks for which the class is remembered: a pattern search each takes longer than all the rest.
_MANY_NAMES = 20_000

# asyncio's own: a numbered task has the name of its function there, without the number.
base_name = asyncio.Task.get_name


@lru_cache(maxsize=8192)
def key_of(kind: str, parent: str, name: str) -> str:
    """The key of a row: ``g`` or ``c``, and a hash of the names on its path."""
    return kind + blake2b(f"{parent}\0{name}".encode(errors="surrogatepass"), digest_size=5).hexdigest()


ROOT_KEY = key_of("g", "", "root")


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
        ROOT: The key of the root's row, the first one.
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

    # The key of the root's row.
    ROOT: ClassVar[str] = ROOT_KEY

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
            return group, key_of("c", group, class_name(base_name(task)))
        return self._keys_of_record(task)

    def _keys_of_record(self, info: TaskInfo) -> tuple[str | None, str | None]:
        name = low_cardinality(info.group) if info.group != info.group_id else info.group
        group = self.keys_of_names.get(name)
        return group, None if group is None else key_of("c", group, class_name(info.name))


def row_name(group: TaskGroup) -> str:
    """The name of a group's row."""
    # A label is chosen by the service. A block or a request may have a number in its name.
    return class_name(group.name) if group.scoped else group.name


def _key_of_group(group: TaskGroup) -> str:
    key = ROOT_KEY
    # The root has its own key.
    for around in reversed(list(group._outward())[:-1]):
        key = key_of("g", key, row_name(around))
    return key


@lru_cache(maxsize=_MANY_NAMES)
def class_name(name: str) -> str:
    """The name of a class: a task's, without numbers and ids."""
    return low_cardinality(name)
