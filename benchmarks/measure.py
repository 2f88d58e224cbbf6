"""How the benchmarks measure: sides take turns in one process, and CPU time counts.

Rules:

1. A figure is a ratio to a yardstick that ran in the same round: a slower or busier machine moves both.
2. Many short rounds; the order is random in each; the median counts, and the quartiles are shown.
3. The garbage collector runs as it does in production. Garbage that one side leaves is collected before
   the next one starts, outside the measured time.
4. CPU time of the process, all threads: an exporter's thread counts toward the side that keeps it busy.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

cpu_clock = time.process_time

# Runs one round and returns the seconds per piece of work.
Side: TypeAlias = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """Summarize figures; a single figure has no spread."""
        if len(figures) < 2:
            return cls(figures[0], figures[0], figures[0])
        low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Row:
    """One side of a table.

    Attributes:
        name: What was measured.
        value: In the unit of the table.
        ratio: To the yardstick of the table, taken round by round.
        added: The difference from the yardstick, in the unit of the table.
    """

    name: str
    value: Spread
    ratio: Spread | None = None
    added: Spread | None = None


@dataclass
class Table:
    """The result of one measurement.

    Attributes:
        id: The goals and the chart find it by this.
        title: Its heading.
        unit: Of the values.
        yardstick: The name of the row to which all are compared; empty if there is none.
        rounds: How many went in.
        rows: One for each side.
        note: Explains how to read it.
        high: The heading of what stands beside the median where there is no yardstick.
    """

    id: str
    title: str
    unit: str
    yardstick: str
    rounds: int
    rows: list[Row] = field(default_factory=list)
    note: str = ""
    high: str = "p99"

    def row(self, name: str) -> Row | None:
        """The row of this name, if it was measured."""
        return next((row for row in self.rows if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Table:
        """The way back from ``to_dict``."""
        rows: Any = [
            Row(
                row["name"],
                Spread(**row["value"]),
                row["ratio"] and Spread(**row["ratio"]),
                row["added"] and Spread(**row["added"]),
            )
            for row in data["rows"]
        ]
        return cls(**{**data, "rows": rows})


@dataclass(frozen=True)
class Effort:
    """The bounds of one table: it ends at the first one that is reached, but not before two rounds."""

    rounds: int
    seconds: float

    @property
    def quick(self) -> bool:
        """Whether this run only checks that everything works: a few rounds, nothing slow or large."""
        return self.rounds <= 3

    def less(self, share: float) -> Effort:
        """A part of it."""
        return Effort(max(2, int(self.rounds * share)), self.seconds * share)


async def take_turns(
    sides: dict[str, Side], effort: Effort, *, collect: bool = True
) -> dict[str, list[float]]:
    """Let the sides take turns, in a new random order in each round.

    Args:
        sides: By name.
        effort: When to stop.
        collect: Collect garbage before each turn. False if collecting would take seconds.

    Returns:
        For each side, the seconds of each round, without the first one, which warms up.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    until = 0.0
    for number in range(effort.rounds + 1):
        random.shuffle(order)
        for name in order:
            if collect:
                gc.collect()
            figures[name].append(await sides[name]())
        until = until or time.monotonic() + effort.seconds
        if number >= 2 and time.monotonic() > until:
            break
    return {name: values[1:] for name, values in figures.items()}


def tabulate(table: Table, figures: dict[str, list[float]], scale: float = 1e6) -> Table:
    """Fill a table with figures; ratios are taken within each round."""
    base = figures.get(table.yardstick)
    table.rounds = min(map(len, figures.values()))
    for name, values in figures.items():
        row = Row(name, Spread.of([value * scale for value in values]))
        if base is not None and name != table.yardstick:
            pairs = list(zip(values, base, strict=True))
            row.ratio = Spread.of([value / other for value, other in pairs])
            row.added = Spread.of([(value - other) * scale for value, other in pairs])
        table.rows.append(row)
    return table


def per_piece(work: Callable[[int], Awaitable[object]], pieces: int) -> Side:
    """A side that does ``pieces`` pieces of work in each round."""

    async def side() -> float:
        begin = cpu_clock()
        await work(pieces)
        return (cpu_clock() - begin) / pieces

    return side
