"""The goals of the design, and what was measured of each: none is left out, measured or not, met or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.names import DEEP, GROUP, MANAGER, OURS, RULE, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.measure import Row, Table


@dataclass(frozen=True)
class Goal:
    """One line of the design's table.

    Attributes:
        what: Is measured.
        yardstick: Against what.
        tables: In which tables it stands; of several the worst figure counts.
        rows: In which of their rows; none means the last one, which is the largest.
        figure: What to take of a row.
        limit: What it has to keep.
        show: How a figure is written.
        least: The limit is the least that is allowed, not the most.
    """

    what: str
    yardstick: str
    tables: tuple[str, ...]
    rows: tuple[str, ...]
    figure: Callable[[Row], float]
    limit: float
    show: str
    least: bool = False

    @property
    def text(self) -> str:
        """The goal in words."""
        return f"{'≥' if self.least else '≤'} {self.show.format(self.limit)}"

    def decisive(self, tables: Iterable[Table]) -> Row | None:
        """The row with the worst figure, None if none was measured."""
        rows = [row for table in tables if table.id in self.tables for row in self._rows(table)]
        return (min if self.least else max)(rows, key=self.figure, default=None)

    def measured(self, tables: Iterable[Table]) -> float | None:
        """The worst figure, None if it was not measured."""
        row = self.decisive(tables)
        return None if row is None else self.figure(row)

    def is_met(self, figure: float) -> bool:
        """Judge a figure as it is shown, so that a reader comes to the same end."""
        shown = round(figure, 2)
        return shown >= self.limit if self.least else shown <= self.limit

    def _rows(self, table: Table) -> list[Row]:
        return [row for row in table.rows if row.name in self.rows] if self.rows else table.rows[-1:]


def ratio(row: Row) -> float:
    """To the yardstick."""
    return 1.0 if row.ratio is None else row.ratio.median


def throughput(row: Row) -> float:
    """The remaining share of the throughput of a server at its limit."""
    return 1 / ratio(row)


def added(row: Row) -> float:
    """More than the yardstick."""
    return 0.0 if row.added is None else row.added.median


def value(row: Row) -> float:
    """As it stands."""
    return row.value.median


def worst(row: Row) -> float:
    """99 of 100, where the table says so."""
    return row.value.high


def least(row: Row) -> float:
    """The best round, where the table says so: a busy machine only adds to it."""
    return row.value.low


TASK = (MANAGER, GROUP)
RATIO, BYTES, MICROSECONDS, MILLISECONDS = "{:.2f}", "{:+.0f} B", "{:+.2f} µs", "{:.2f} ms"

SPAWN = Goal(
    "managed task, no SDK, batches of 5k and 100k",
    "`asyncio.TaskGroup`",
    ("spawn-asyncio-5000", "spawn-asyncio-100000"),
    TASK,
    ratio,
    1.0,
    RATIO,
)
EAGER = Goal(
    "the same, eager start, Python 3.13",
    "bare `create_task`",
    ("eager",),
    TASK,
    ratio,
    0.75,
    RATIO,
)
SPAN = Goal(
    "managed task with span, SDK with batch export",
    "hand-written `start_as_current_span`",
    ("span-batch",),
    TASK,
    ratio,
    0.90,
    RATIO,
)
MEMORY = Goal(
    "memory for a live task, no SDK",
    "bare live task",
    ("memory-10000", "memory-100000", "memory-1000000"),
    TASK,
    added,
    180,
    BYTES,
)
CANCEL = Goal(
    "cancel 100k sleeping tasks",
    "bare loop of `cancel()` and join",
    ("cancel-100000",),
    TASK,
    ratio,
    2.0,
    RATIO,
)
SCALE = Goal(
    "1k -> 1M live tasks: create to end, find, cancel by name, cancel a group",
    "the same with 1k live",
    ("scale-finish", "scale-look-up", "scale-cancel-name", "scale-cancel-group"),
    (),
    ratio,
    # O(1), as far as the caches of a processor let it be seen.
    1.5,
    RATIO,
)
FASTAPI = Goal(
    "middleware, FastAPI GET on uvicorn: throughput",
    "no middleware",
    ("middleware-fastapi-get",),
    (OURS,),
    throughput,
    0.97,
    RATIO,
    least=True,
)
RAW = Goal(
    "middleware, raw ASGI",
    "no middleware",
    ("middleware-raw", "middleware-raw-suspending"),
    (OURS,),
    added,
    2.0,
    MICROSECONDS,
)
DISCONNECT = Goal(
    "disconnect to last task's end, 60 ms and older, under load, p99",
    "-",
    ("disconnect-ours-busy",),
    ("60 ms old", "500 ms old"),
    worst,
    1.5,
    MILLISECONDS,
)
DISCONNECT_TUNED = replace(
    DISCONNECT, what="the same, garbage collector tuned", tables=("disconnect-ours-tuned",)
)
STREAMS = Goal(
    "200 streams whose clients leave within 100 ms: hang-up to closed upstream, p99, best round",
    "-",
    ("streams-post", "streams-get"),
    (f"{RULE}: p99",),
    least,
    50,
    MILLISECONDS,
)
EVENT = Goal(
    "event reaches 100k descendants, each", "-", ("cancel-events",), (WIDE, DEEP), value, 0.2, "{:.2f} µs"
)

LIVE_LATENCY = Goal(
    "live view of 10,000 tasks, 5 viewers: the service's own p99",
    "no viewer",
    ("live-latency",),
    ("5 viewers: p99",),
    ratio,
    1.05,
    RATIO,
)
LIVE_CPU = Goal(
    "the same, first viewer: CPU, of a core",
    "no viewer",
    ("live-cpu",),
    ("1 viewer",),
    added,
    2.0,
    "{:+.2f} %",
)
LIVE_START = Goal(
    "`otel-tasks ls`: to its first line",
    "-",
    ("live-ls",),
    ("otel-tasks ls",),
    least,
    150,
    "{:.0f} ms",
)
FLEET_CANCEL = Goal(
    "cancel to `CancelledError` in another process, p50",
    "-",
    ("fleet-cancel", "fleet-remote-cancel"),
    ("p50",),
    value,
    2.0,
    MILLISECONDS,
)
FLEET_CANCEL_SLOW = replace(FLEET_CANCEL, what="the same, p95", rows=("p95",), limit=6.0)
FLEET_REMOTE = Goal(
    "remote call, CPU time of caller and worker, plain Taskiq = 1",
    "plain Taskiq",
    ("fleet-remote",),
    ("otel_tasks: CPU time of both",),
    ratio,
    1.1,
    RATIO,
)
FLEET_THROUGHPUT = Goal(
    "remote tasks per second of a worker's CPU",
    "-",
    ("fleet-throughput",),
    ("otel_tasks: per second of the worker's CPU",),
    value,
    1000,
    "{:.0f}",
    least=True,
)
FLEET_REPLAY = Goal(
    "start of a node that finds 10,000 cancellations",
    "-",
    ("fleet-replay",),
    ("wall time",),
    value,
    100,
    "{:.0f} ms",
)
FLEET_IDLE = Goal(
    "idle node of a fleet: CPU, of a core",
    "-",
    ("fleet-idle",),
    ("idle node",),
    value,
    0.1,
    "{:.2f} %",
)
FLEET_INSPECT = Goal(
    "50 nodes inspected",
    "-",
    ("fleet-inspect",),
    ("tasks()", "tree()", "nodes()"),
    value,
    300,
    "{:.0f} ms",
)

TASK_GOALS = (SPAWN, EAGER, SPAN, MEMORY, CANCEL, SCALE)
REQUEST_GOALS = (FASTAPI, RAW, DISCONNECT, DISCONNECT_TUNED, STREAMS, EVENT)
LIVE_GOALS = (LIVE_LATENCY, LIVE_CPU, LIVE_START)
FLEET_GOALS = (
    FLEET_CANCEL,
    FLEET_CANCEL_SLOW,
    FLEET_REMOTE,
    FLEET_THROUGHPUT,
    FLEET_REPLAY,
    FLEET_IDLE,
    FLEET_INSPECT,
)
GOALS = (*TASK_GOALS, *REQUEST_GOALS, *LIVE_GOALS)
