"""Slices: long work as a generator that yields whenever the service may run in between.

Slices are bounded by a number of tasks or rows, not by time, so that they are the same in each run. Each of
the limits below takes about 0.2 ms on a quiet machine, and twice that in a busy service, whose caches hold
other data.
"""

from __future__ import annotations

import asyncio
import heapq
from contextlib import closing
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence

T = TypeVar("T")

_first = itemgetter(0)

# Tasks of which a slice reads one attribute or two.
TASKS_PER_SLICE = 500
# Tasks that a slice describes, each in some 20 us: where they wait, and what their row says.
ROWS_PER_SLICE = 10
# Rows of groups, classes, and ended tasks that a slice makes, each in some 8 us.
COUNTS_PER_SLICE = 25
# Tasks whose names a slice compares with a pattern, each in some 1 us.
NAMES_PER_SLICE = 200


class Budget:
    """Counts the work since the last slice.

    Args:
        size: How much of it one slice does.
    """

    def __init__(self, size: int) -> None:
        self._size = self._left = size

    def spend(self, cost: int = 1) -> bool:
        """Count so much; return True at the end of a slice."""
        self._left -= cost
        if self._left > 0:
            return False
        self._left = self._size
        return True


async def one_turn() -> None:
    """Let the event loop run once: it calls what is ready, and looks at its sockets.

    Cancellation: has no other effect.
    """
    await asyncio.sleep(0)


async def in_slices(slices: Generator[None, None, T], rest: Callable[[], Awaitable[object]] = one_turn) -> T:
    """Run a generator to its end, and let the event loop run after each slice; return its result.

    Args:
        slices: The generator; closed if it is not run to its end.
        rest: Awaited after each slice.

    Cancellation: closes the generator between two slices.
    """
    with closing(slices):
        while True:
            try:
                next(slices)
            except StopIteration as end:
                result: T = end.value
                return result
            await rest()


def at_once(slices: Generator[None, None, T]) -> T:
    """Run a generator to its end in one step; return its result."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: T = end.value
            return result


def smallest(
    items: Sequence[T], limit: int, key: Callable[[T], Any], *, reverse: bool = False
) -> Generator[None, None, list[T]]:
    """Sort the ``limit`` smallest items, or the largest; among equals, the first ones."""
    batches: list[list[tuple[Any, T]]] = []
    for start in range(0, len(items), NAMES_PER_SLICE):
        batch = [(key(item), item) for item in items[start : start + NAMES_PER_SLICE]]
        batches.append(sorted(batch, key=_first, reverse=reverse)[:limit])
        yield
    if len(batches) == 1:
        return [item for _, item in batches[0]]
    # Both are stable.
    merged = islice(heapq.merge(*batches, key=_first, reverse=reverse), max(0, limit))
    found: list[T] = []
    while some := list(islice(merged, NAMES_PER_SLICE)):
        found += [item for _, item in some]
        yield
    return found
