"""The names of tasks created without one: query, query-2, query-3.

A task without a name gets the name of its function. If that name is taken, the task also gets a number. Each
table of names counts the numbers of each function: a scoped group has its own table, and all labeled groups
of a manager share one.

Making the text takes 4 % of a task's instructions, and most names are never read. The tables therefore have a
numbered task under a key: an integer that holds the function's index and the number.

Not covered: a function whose assigned ``__name__`` looks like a numbered name of another one, such as
``query-2``. Two live tasks may then have the same name; their keys differ, and a lookup finds one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Protocol

# A name, or the key of one that has a number.
Key = str | int

# A key has the number in its low bits, and the index of the function above them. At a million tasks a second,
# 48 bits last nine years; with 32 a counter would run into the keys of the next function.
_NUMBER_BITS = 48
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
# The most digits of a number that surely has these bits.
_NUMBER_DIGITS = 14
# With this many counters, those without a live task are dropped.
_MANY = 1000


class Table(Container[Key], Iterable[Key], Protocol):
    """The names and keys of live tasks."""


def full_name(base: str, key: Key) -> str:
    """Return the name of a task, from asyncio's name for it and its key."""
    return base if isinstance(key, str) else f"{base}-{key & _NUMBER_MASK}"


class Numbers(dict[str, Callable[[], int]]):
    """Makes keys for one table of names: ``numbers["query"]()`` returns the next key of that function.

    Args:
        table: A number is skipped if a task of this table has been given the name that it makes.
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
        """Start with the first numbers again: the table is empty."""
        self.clear()
        self._indexes: dict[str, int] = {}
        self._next_index = itertools.count().__next__
        # The bases some of whose numbers may be taken by a given name.
        self._careful_ones: set[str] = set()
        # A given name ends in a digit. It may look like a name that a later counter makes.
        self._has_lookalikes = False

    def note(self, name: str) -> None:
        """Skip this name, which a task is given and which ends in a digit, when its number is reached."""
        self._has_lookalikes = True
        if not self:
            return
        base = name.rpartition("-")[0]
        counter = self.get(base)
        if counter is not None and base not in self._careful_ones:
            self[base] = self._careful(base, counter)

    def find(self, name: str) -> int | None:
        """Return the key of a task with this name; None if no counter makes the name."""
        base, _, number = name.rpartition("-")
        index = self._indexes.get(base)
        # Bounded: int() refuses very long numbers, and the name may come from a client.
        if index is None or not number.isdecimal() or len(number) > _NUMBER_DIGITS:
            return None
        key = (index << _NUMBER_BITS) + int(number)
        # Not the same for a number with leading zeros or with digits other than ASCII's.
        return key if full_name(base, key) == name else None

    def _careful(self, base: str, counter: Callable[[], int]) -> Callable[[], int]:
        """Skip the numbers whose names have been given to tasks."""
        self._careful_ones.add(base)

        def next_free() -> int:
            key = counter()
            while full_name(base, key) in self._table:
                key = counter()
            return key

        return next_free

    def _drop_unused(self) -> None:
        """Forget the functions without a live task: a program may make a function for each task."""
        used = {key >> _NUMBER_BITS for key in self._table if isinstance(key, int)}
        given = {key.rpartition("-")[0] for key in self._table if isinstance(key, str)}
        for base, index in list(self._indexes.items()):
            if index not in used and base not in given:
                del self[base], self._indexes[base]
                self._careful_ones.discard(base)
        self._limit = max(_MANY, 2 * len(self))
