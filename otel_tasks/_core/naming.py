"""The names in a group: which name a task gets, which task holds it, and how conflicts are resolved."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NoReturn, cast

from otel_tasks._core.checks import check_choice, is_plain_name
from otel_tasks._core.coroutines import function_name
from otel_tasks._core.current import stand_in
from otel_tasks._core.events import CancelCause
from otel_tasks._core.names import FIRST_NUMBERED, Key, Numbers, find_key, first_key, full_name
from otel_tasks._core.options import OnConflict
from otel_tasks._core.state import CancelKind
from otel_tasks._core.task import ManagedTask, request_cancel, with_predecessors
from otel_tasks._core.tree import Node
from otel_tasks._core.waiting import wait_until_done
from otel_tasks.exceptions import GroupClosedError, TaskExistsError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from otel_tasks._core.group import TaskGroup


class Named(Node):
    """The part of a group that chooses and finds names."""

    __slots__ = ()

    def _find(self, name: str) -> ManagedTask[Any] | None:
        """The task of this group with this name; in the root, the task of any labeled group."""
        return self._named(name, self._live)

    def _holder(self, name: str) -> ManagedTask[Any] | None:
        """The live task that holds this name, so that a new one cannot have it."""
        task = self._named(name, self._names)
        # A task that is done gives up its name, even if its done-callback has not run yet.
        return None if task is None or task.done() else task

    def _named(self, name: str, table: dict[Key, ManagedTask[Any]]) -> ManagedTask[Any] | None:
        task = table.get(name)
        if task is not None or not name[-1:].isdecimal():
            return task
        numbers = self._numbers_in_use()
        key = find_key(name, self._counts) if numbers is None else numbers.find(name)
        return None if key is None else table.get(key)

    def _is_free(self, name: object) -> bool:
        """True for a valid name that no task has."""
        if type(name) is not str or name in self._names or not is_plain_name(name):
            return False
        if not name[-1].isdecimal():
            return True
        self._note_name(name)
        return self._holder(name) is None

    def _note_name(self, name: str) -> None:
        """Note that a task is given this name, so that no counter makes it again."""
        if name[-1].isdecimal() and "-" in name:
            self._made_numbers().note(name)

    def _first_key(self, base: str) -> Key:
        """A key for the first task of its function, or for each one of a function whose numbers need care."""
        if (
            self._is_one_table
            and not self._counts
            and self._numbers is None
            and "-" not in base
            and base not in self._names
        ):
            # What `first_key` does, with the index 0. Most requests get no further: a call takes 1 % of one
            # with a task.
            self._counts[base] = FIRST_NUMBERED
            return base
        if self._numbers_in_use() is None and "-" not in base:
            return first_key(self._counts, base, self._names, self._ledger.next_number)
        return self._made_numbers().next_key(base)

    def _next_key(self, base: str) -> Key:
        key = self._counts.get(base)
        if key is None:
            return self._first_key(base)
        self._counts[base] = key + 1
        return key

    def _numbered(self, base: str) -> str:
        """Make a free name: ``base``, which is taken, and a number."""
        key = self._next_key(base)
        while full_name(base, key) in self._names:
            key = self._next_key(base)
        return full_name(base, key)

    def _numbers_in_use(self) -> Numbers | None:
        # A label's names are in the root's table.
        return self._numbers if self._names is self._live else self._ledger.root._numbers

    def _made_numbers(self) -> Numbers:
        if self._names is not self._live:
            return self._ledger.root._made_numbers()
        if self._numbers is None:
            self._numbers = Numbers(self._names, self._counts, self._ledger.next_number)
        return self._numbers

    def _rename(self, task: ManagedTask[Any], name: str) -> str:
        """Enter a task under another name, with a number if the name is taken; returns that name."""
        old = task._key
        if self._live.get(old) is not task:
            # It has ended and has left the tables, or its name has passed to another task of the group.
            return name
        key = name if self._holder(name) in (None, task) else self._numbered(name)
        self._note_name(key)
        for table in (self._live, self._names):
            # In the manager's table, the name of a task that is done may have passed to another task.
            if table.get(old) is task:
                del table[old]
                table[key] = task
        return key

    def _chosen_name(
        self,
        coro: object,
        name: str | None,
        taken: ManagedTask[Any] | None,
        on_conflict: OnConflict,
    ) -> tuple[str, Key, tuple[asyncio.Task[Any], ...]]:
        """Return asyncio's name for a task, its key, and the tasks that must end before it starts."""
        if name is None:
            base = function_name(coro)
            return base, self._next_key(base), ()
        if taken is None:
            self._note_name(name)
            return name, name, ()
        name, previous = self._make_way(name, taken, on_conflict)
        return name, name, previous

    def _admit(self, name: str, on_conflict: OnConflict) -> None:
        """Raise the errors that creating a task of this name would raise, before its coroutine is made."""
        group = self._open_group()
        group._enter_loop(name)
        check_choice("on_conflict", on_conflict, OnConflict)
        taken = group._holder(name)
        if taken is not None and on_conflict == "error":
            refuse_name(taken)
        if taken is None or on_conflict != "return":
            group._check_queue(group._limiters(), name)

    def _enter_loop(self, name: str) -> None:
        self._ledger.home.enter()
        if self._refusal is not None:
            self._raise_closed(name)

    async def _clear_name(self, name: str, reason: str) -> None:
        """Cancel the live task with this name, if any, and wait until it has ended.

        Raises:
            RuntimeError: That task is the caller.

        Cancellation: cancelling the caller ends the wait; the cancel request stays.
        """
        group = self._open_group()
        group._enter_loop(name)
        while (taken := group._holder(name)) is not None:
            if taken is asyncio.current_task():
                raise RuntimeError(
                    f"task {name!r} cannot wait for its own end to be replaced: "
                    'write create_task(..., on_conflict="replace"), which starts after it'
                )
            request_cancel(taken, CancelCause.make(CancelKind.REPLACED, reason))
            await wait_until_done(with_predecessors(taken))

    def _make_way(
        self, name: str, taken: ManagedTask[Any], on_conflict: OnConflict
    ) -> tuple[str, tuple[asyncio.Task[Any], ...]]:
        """Return the name for a task whose name is taken, and the tasks that must end before it starts."""
        if on_conflict == "suffix":
            return self._numbered(name), ()
        previous = with_predecessors(taken)
        # The old task stays in the tables, under another name, until it has ended.
        taken._rename_to(self._numbered(name))
        request_cancel(taken, CancelCause.make(CancelKind.REPLACED, f"replaced by a new task {name!r}"))
        return name, previous

    def _raise_closed(self, name: str) -> NoReturn:
        if self._scope is not None and not self._scope.entered and self._cause is None:
            hint = "enter it first: async with group"
        elif self._binding is not None:
            hint = "work that outlives the request belongs in manager.create_task(..., group=...)"
        else:
            hint = "work that outlives the block belongs in manager.create_task(...)"
        raise GroupClosedError(f"cannot create task {name!r}: group {self.id!r} {self._refusal}; {hint}")

    def _open_group(self) -> TaskGroup:
        """This group, or, once it takes no tasks, the group that takes them instead; see `stand_in`."""
        group = cast("TaskGroup", self)
        return group if self._refusal is None else stand_in(group)


def refuse_name(taken: ManagedTask[Any]) -> NoReturn:
    raise TaskExistsError(
        f"cannot create task {taken.name!r}: a task with that name is {taken.status} "
        f"in group {taken.group.id!r}; "
        'wait for it, choose another name, or pass on_conflict="suffix", "return" or "replace"'
    )


def yield_to(
    taken: ManagedTask[Any], coro: Coroutine[Any, Any, Any], on_conflict: OnConflict
) -> ManagedTask[Any]:
    """Return the live task that has the name, or raise; closes ``coro``."""
    if on_conflict == "error":
        refuse_name(taken)
    coro.close()
    return taken
