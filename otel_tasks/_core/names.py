"""The names of tasks created without one: query, query-2, query-3.

The first task of a function in a table of names gets the function's name, each later one a number too, which
is counted per function and never used again. A scoped group has its own table; all labeled groups of a
manager share one.

Making the text takes 4 % of a task's instructions, and most names are never read. The tables therefore have a
numbered task under a key: an integer that holds the function's index and the number.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Protocol

# A name, or the key of a task whose name has a number.
Key = str | int

# A key has the number in its low bits, and the index of the function above them. At a million tasks a second,
# 48 bits last nine years; with 32 a counter would run into the keys of the next function.
_NUMBER_BITS = 48
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
# The most digits of a number that surely has these bits.
_NUMBER_DIGITS = 14
# The key of the second task of the function with the index 0, the first one of a table: a small number takes
# less memory.
FIRST_NUMBERED = 2
# After so many new functions, those without a live task are forgotten.
_MANY = 1024


class Table(Container[Key], Iterable[Key], Protocol):
    """The names and keys of live tasks."""


def full_name(base: str, key: Key) -> str:
    """Return the name of a task, from asyncio's name for it and its key."""
    return base if isinstance(key, str) else f"{base}-{key & _NUMBER_MASK}"


def first_key(counts: dict[str, int], base: str, table: Table, next_index: Callable[[], int]) -> Key:
    """Start to count the tasks of a function, and return the key of the first one.

    Args:
        counts: The next key of each function.
        base: The function's name.
        table: The names and keys of live tasks.
        next_index: Returns a number above 0 that no other function of the manager has.
    """
    index = next_index()
    if not index % _MANY:
        _forget_unused(counts, table)
    key = (index << _NUMBER_BITS) + FIRST_NUMBERED
    if base not in table:
        counts[base] = key
        return base
    counts[base] = key + 1
    return key


class Numbers:
    """Chooses the numbers of functions whose names may equal names that tasks have been given.

    Args:
        table: The names and keys of live tasks.
        counts: The next key of each function that needs no such care.
        next_index: Returns a number that no other function of the manager has.
    """

    __slots__ = ("_careful", "_counts", "_given", "_next_index", "_table")

    def __init__(self, table: Table, counts: dict[str, int], next_index: Callable[[], int]) -> None:
        self._table = table
        self._counts = counts
        self._next_index = next_index
        # The next key of each function that needs care.
        self._careful: dict[str, int] = {}
        # Of names that end in a number, what stands before it.
        self._given: set[str] = set()

    def note(self, name: str) -> None:
        """Skip this name, which a task is given and which ends in a digit, when its number is reached."""
        base = name.rpartition("-")[0]
        self._given.add(base)
        if base in self._counts:
            self._careful[base] = self._counts.pop(base)
        if len(self._given) > _MANY:
            self._forget()

    def next_key(self, base: str) -> Key:
        """Return the next key of a function, or its name if that is free and was not used before."""
        if "-" in base:
            # A function whose name looks like a numbered one of another function.
            self.note(base)
        elif base not in self._given and base not in self._careful:
            # Counted by itself from now on.
            return first_key(self._counts, base, self._table, self._next_index)
        key = self._careful.get(base) or (self._next_index() << _NUMBER_BITS) + 1
        while self._is_taken(_text(base, key)):
            key += 1
        self._careful[base] = key + 1
        return base if key & _NUMBER_MASK == 1 else key

    def find(self, name: str) -> int | None:
        """Return the key of a task with this name; None if no counter makes the name."""
        return find_key(name, self._counts, self._careful)

    def _is_taken(self, name: str) -> bool:
        key = self.find(name)
        return name in self._table or (key is not None and key in self._table)

    def _forget(self) -> None:
        """Forget given names and functions without a live task: a program may make one for each task."""
        self._given = {key.rpartition("-")[0] for key in self._table if isinstance(key, str)}
        _forget_unused(self._careful, self._table, self._given)


def find_key(name: str, *counters: dict[str, int]) -> int | None:
    """Return the key of a task with this name; None if none of the counters makes the name."""
    base, _, number = name.rpartition("-")
    count = next((counts[base] for counts in counters if base in counts), None)
    # Bounded: int() refuses very long numbers, and the name may come from a client.
    if count is None or not number.isdecimal() or len(number) > _NUMBER_DIGITS:
        return None
    key = (count & ~_NUMBER_MASK) + int(number)
    # Not the same for a number with leading zeros or with digits other than ASCII's.
    return key if full_name(base, key) == name else None


def _text(base: str, key: int) -> str:
    return base if key & _NUMBER_MASK == 1 else full_name(base, key)


def _forget_unused(counts: dict[str, int], table: Table, but: Container[str] = ()) -> None:
    used = {key >> _NUMBER_BITS for key in table if isinstance(key, int)}
    for base, key in list(counts.items()):
        if key >> _NUMBER_BITS not in used and base not in table and base not in but:
            del counts[base]
