"""The names of tasks that nobody has named: query, query-2, query-3.

Such a task is called after its function. Where that name is taken it gets a number, which is counted per
function in each table of names: that of a scoped group, or that of a manager for all its labeled groups.

Making the text takes 4 % of a task's instructions, and most tasks are never asked for their name. In the
tables a task with a number therefore stands under a key: an integer that holds its function and its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Protocol

# A name, or the key of one that has a number.
Key = str | int

# A key has the number in its low bits, and the index of the function above them.
_NUMBER_BITS = 32
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
# Counters are dropped once there are so many, if they have no live task.
_MANY = 1000


class Table(Container[Key], Iterable[Key], Protocol):
    """The names and keys of live tasks."""


def full_name(base: str, key: Key) -> str:
    """Give the name of a task, from what asyncio calls it and from its key."""
    return base if isinstance(key, str) else f"{base}-{key & _NUMBER_MASK}"


class Numbers(dict[str, Callable[[], int]]):
    """Makes keys for one table of names: ``numbers["query"]()`` is the next one for that function.

    Args:
        table: A number is left out if its name has been chosen there.
    """

    __slots__ = ("_careful_ones", "_has_lookalikes", "_indexes", "_limit", "_next_index", "_table")

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table
        self._limit = _MANY
        self.restart()

    def __missing__(self, base: str) -> Callable[[], int]:
        if len(self) >= self._limit:
            self._drop_unused()
        index = self._indexes[base] = self._next_index()
        counter: Callable[[], int] = itertools.count((index << _NUMBER_BITS) + 2).__next__
        if self._has_lookalikes:
            counter = self._careful(base, counter)
        self[base] = counter
        return counter

    def restart(self) -> None:
        """Begin with the first numbers again: the table is empty."""
        self.clear()
        self._indexes: dict[str, int] = {}
        self._next_index = itertools.count().__next__
        # The bases some of whose numbers may be taken by a chosen name.
        self._careful_ones: set[str] = set()
        # A name with a number at its end has been chosen before its base had a counter.
        self._has_lookalikes = False

    def note(self, name: str) -> None:
        """Note that a task gets a chosen name with a number at its end: a made name may come to equal it."""
        self._has_lookalikes = True
        if not self:
            return
        base = name.rpartition("-")[0]
        counter = self.get(base)
        if counter is not None and base not in self._careful_ones:
            self[base] = self._careful(base, counter)

    def find(self, name: str) -> int | None:
        """Give the key under which a task of this name stands, if its number is a made one."""
        base, _, number = name.rpartition("-")
        index = self._indexes.get(base)
        # Bounded: int() refuses very long ones, and the name may come from a client.
        if index is None or not number.isdecimal() or len(number) > 9:
            return None
        key = (index << _NUMBER_BITS) + int(number)
        # Not for a name with zeros before its number.
        return key if full_name(base, key) == name else None

    def _careful(self, base: str, counter: Callable[[], int]) -> Callable[[], int]:
        """Leave out the numbers whose names have been chosen."""
        self._careful_ones.add(base)

        def next_free() -> int:
            key = counter()
            while full_name(base, key) in self._table:
                key = counter()
            return key

        return next_free

    def _drop_unused(self) -> None:
        """Forget the functions that have no live task: a name may be made anew for each task."""
        used = {key >> _NUMBER_BITS for key in self._table if isinstance(key, int)}
        chosen = {key.rpartition("-")[0] for key in self._table if isinstance(key, str)}
        for base, index in list(self._indexes.items()):
            if index not in used and base not in chosen:
                del self[base], self._indexes[base]
                self._careful_ones.discard(base)
        self._limit = max(_MANY, 2 * len(self))
