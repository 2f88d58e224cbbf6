"""Lookup: finds the groups and tasks of a manager by name, id, or uid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks._core.checks import checked_name
from otel_tasks._core.coroutines import close_quietly
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.options import GroupOptions
from otel_tasks._core.places import checked_limiter
from otel_tasks.exceptions import TaskNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from weakref import ref

    from otel_tasks._core.info import TaskInfo
    from otel_tasks._core.records import KeptResult
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.tree import Ledger


class Lookup:
    """Finds the groups and tasks of one manager.

    Args:
        ledger: The manager's ledger.
        root: The manager's root group.
    """

    def __init__(self, ledger: Ledger, root: TaskGroup) -> None:
        self._ledger = ledger
        self._root = root
        # The references inside of it: `get` of a WeakValueDictionary is Python code, 2 % of a task.
        self._labels: dict[str, ref[TaskGroup]] = vars(ledger.labels)["data"]

    def group(self, group: str | TaskGroup, coro: object = None) -> TaskGroup:
        """Return the group to create a task in.

        Args:
            group: A label, which is created on first use, or a group object.
            coro: Closed if the group is refused.

        Raises:
            TypeError: ``group`` is neither a name nor a group.
            ValueError: It belongs to another manager, or the label is not valid.
        """
        try:
            if isinstance(group, str):
                # Most labels exist: a call of `label` takes 2 % of a task.
                reference = self._labels.get(group)
                if reference is None or (known := reference()) is None:
                    return self.label(group)
                return known
            if not isinstance(group, TaskGroup):
                raise _no_group(group)
            if group._ledger is not self._ledger:
                raise ValueError(
                    f"group {group.id!r} belongs to manager {group._ledger.name!r}, not to this one, "
                    f"{self._ledger.name!r}: "
                    "call the group itself, as in group.create_task(...), or its manager"
                )
        except BaseException:
            close_quietly(coro)
            raise
        return group

    def label(self, name: str) -> TaskGroup:
        """Return the labeled group of this name, created on first use."""
        if name == "root":
            return self._root
        group = self._ledger.labels.get(name)
        return self._make_label(name) if group is None else group

    def label_with(self, name: str, options: GroupOptions) -> TaskGroup:
        """Return the labeled group of this name; the first call with options sets them.

        Raises:
            ValueError: The group has other options, or it is the root.
        """
        # Checked before the group exists.
        checked_limiter(options.max_concurrency, options.max_queue)
        group = self.label(name)
        if options == GroupOptions():
            return group
        known = self._ledger.options.get(group)
        if known is None:
            self._configure(group, options)
        elif known != options:
            raise ValueError(
                f"group {name!r} has been given other options before: get_group({name!r}, {known}), and now "
                f"get_group({name!r}, {options}); set them once, and call get_group({name!r}) elsewhere"
            )
        return group

    def _configure(self, group: TaskGroup, options: GroupOptions) -> None:
        if group is self._root:
            raise ValueError(
                f"the root group has the options of its manager, got get_group('root', {options}): "
                f"write TaskManager({options})"
            )
        group._configure(options)

    def groups(self, group: str | TaskGroup) -> list[TaskGroup]:
        """Return the groups that a name, an id, or a group object refers to; none if the name is unknown."""
        if isinstance(group, TaskGroup):
            return [self.group(group)]
        if not isinstance(group, str):
            raise _no_group(group)
        scoped = [node for node in list(self._ledger.scopes.values()) if group in (node.id, node.name)]
        if group in self._ledger.labels or group == "root":
            return [self.label(group), *scoped]
        return scoped

    def task(self, name: str, group: str | TaskGroup | None = None) -> ManagedTask[Any] | None:
        """Return the live task of this name, id, or uid; None if there is none.

        Args:
            name: The name, id, or uid.
            group: Look in this group alone; None searches the whole manager.
        """
        if not isinstance(name, str):
            raise TypeError(f"a task is looked up by its name, id, or uid, got {name!r}: pass task.id")
        if group is None:
            return self._task_anywhere(name)
        node = self._known_group(group)
        if node is None:
            return None
        task = self._ledger.uids.find(name) or node._find(name) or self._task_anywhere(name)
        # The root's table has the tasks of all labels, and an id may belong to any group's task.
        return task if task is not None and task._group is node else None

    def kept_result(self, name: str, group: str | TaskGroup | None) -> KeptResult:
        """Return the kept end of a remembered task.

        Raises:
            TaskNotFoundError: The task is unknown, or its result was not kept.
        """
        ending = self._ledger.history.ending(name, group_id(group))
        if ending is None:
            raise self.not_found(
                name,
                group,
                "only start_task() keeps results; of other tasks, keep what create_task() returned",
            )
        return ending

    def not_found(self, name: str, group: str | TaskGroup | None, hint: str) -> TaskNotFoundError:
        """Create the error for a task that is not live.

        Args:
            name: The name that was looked up.
            group: The group that was searched.
            hint: What to do instead, if the task is remembered.
        """
        where = group_id(group)
        known = self._ledger.history.find(name, where)
        if known is not None:
            return TaskNotFoundError(f"task {name!r} has ended ({known.status}): {hint}")
        if where is None:
            return TaskNotFoundError(
                f"no task is called {name!r}: it was never started, or has been forgotten; "
                "get_all_task_info() lists the known ones"
            )
        # Does not reveal whether another group has it: a client may supply the name and see the message.
        return TaskNotFoundError(
            f"no task of group {where!r} is called {name!r}: it was never started there, or has been "
            "forgotten; group= does not search other groups"
        )

    def _make_label(self, name: str) -> TaskGroup:
        hint = 'leave it out for the manager\'s root, which get_group("root") returns'
        name = checked_name("group", name, hint)
        parts = name.split(".")
        if not all(parts):
            raise ValueError(f"group name must not have empty parts between its dots, got {name!r}")
        parent = self._root if len(parts) == 1 else self.label(name.rpartition(".")[0])
        group = TaskGroup._labeled(self._ledger, name, parent)
        self._ledger.labels[name] = group
        return group

    def _known_group(self, group: str | TaskGroup) -> TaskGroup | None:
        """Return the one group that is meant; None if it is unknown, and so has no live task."""
        if not isinstance(group, str) or group == "root":
            return self.group(group)
        return self._ledger.labels.get(group) or self._ledger.scope(group)

    def _task_anywhere(self, name: str) -> ManagedTask[Any] | None:
        # The uid first, so that no chosen name can shadow it.
        task = self._ledger.uids.find(name) or self._root._find(name)
        if task is not None:
            return task
        # An id is a group id, a slash, and a name; both may contain slashes.
        cut = name.find("/")
        while cut != -1:
            group = self._ledger.scope(name[:cut])
            if group is not None:
                return group._find(name[cut + 1 :])
            cut = name.find("/", cut + 1)
        return None


def group_id(group: str | TaskGroup | None) -> str | None:
    """Return the id under which the history knows a group."""
    return group.id if isinstance(group, TaskGroup) else group


def _no_group(group: object) -> TypeError:
    return TypeError(
        f"group must be a name or a TaskGroup, got {group!r}: "
        'write group="mail", or pass a group object, such as manager.get_group("mail")'
    )


def merged(live: Iterable[ManagedTask[Any]], remembered: Iterable[TaskInfo]) -> dict[str, TaskInfo]:
    """Merge snapshots by id; the live task wins over remembered ones, and of those the first wins."""
    infos = {info.id: info for info in (task.info() for task in live)}
    for info in remembered:
        infos.setdefault(info.id, info)
    return infos
