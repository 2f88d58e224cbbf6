"""Remote calls against plain Taskiq: one caller, one worker process for each side, Redis Streams between.

The sides take turns. Times of the CPU are those of the caller and of the side's worker together, because the
machine may be busy with other things. Plain Taskiq polls for its results, every 10 ms here.
"""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC240 - nothing else runs in these loops

from __future__ import annotations

import asyncio
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.measure import Row, Spread, Table
from benchmarks.redis_server import URL
from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import managed, remote

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask

PLAIN, MANAGED = "plain Taskiq", "otel_tasks"
# Calls of one round, and how many of them at once.
CALLS, AT_ONCE = 400, 50
# Calls of one round that follow one another; cancelled ones.
LATENCIES, CANCELED = 40, 25
POLL = 0.01

# What is measured of a round: {figure: value}.
_Figures = dict[str, float]


def measure(rounds: int, note: str) -> list[Table]:
    """Measure on the Redis that runs.

    Args:
        rounds: How many.
        note: For the tables.
    """
    sides, canceled = asyncio.run(_measure(rounds))
    return [_cost_table(sides, note), _rate_table(sides, note), _cancel_table(canceled, note)]


class Side:
    """Plain Taskiq, or the same broker managed.

    Args:
        kind: Which of them.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        name = f"remote-{kind.split()[0]}"
        results: Any = RedisAsyncResultBackend(URL, result_ex_time=600)
        stream = RedisStreamBroker(URL, queue_name=name, consumer_group_name=name, consumer_id="0")
        self.broker: AsyncBroker = stream.with_result_backend(results)
        self.manager = TaskManager()
        if kind == MANAGED:
            managed(self.broker, Fleet(URL, namespace=name, manager=self.manager))
        self.nothing: AsyncTaskiqDecoratedTask[..., Any] = self.broker.task(task_name="nothing")(_nothing())
        self.forever: AsyncTaskiqDecoratedTask[..., Any] = self.broker.task(task_name="sleep")(_sleep())
        self.pid = 0

    async def call(self, number: int) -> None:
        """Call a task, and wait for its result."""
        if self.kind == MANAGED:
            await self.manager.create_task(remote(self.nothing, number))
            return
        sent = await self.nothing.kiq(number)
        await sent.wait_result(check_interval=POLL)


def _nothing() -> Callable[[int], Awaitable[int]]:
    # A function for each side: Taskiq renames what it decorates.
    async def nothing(number: int) -> int:
        return number

    return nothing


def _sleep() -> Callable[[str], Awaitable[None]]:
    async def sleep(path: str) -> None:
        Path(path).touch()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            ended = time.monotonic()
            Path(path).write_text(repr(ended), "utf-8")
            raise

    return sleep


def __getattr__(name: str) -> AsyncBroker:
    """Make the broker that the worker process asks for."""
    if name != "broker" or "BENCHMARK_SIDE" not in os.environ:
        raise AttributeError(name)
    side = globals()["side"] = Side(os.environ["BENCHMARK_SIDE"])
    globals()["broker"] = side.broker
    return side.broker


@asynccontextmanager
async def _running(kind: str) -> AsyncIterator[Side]:
    side = Side(kind)
    await side.broker.startup()
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.remote:broker", "--workers", "1"]
    environment = {**os.environ, "BENCHMARK_SIDE": kind}
    worker = subprocess.Popen([*command, "--log-level", "ERROR"], env=environment)
    try:
        await asyncio.wait_for(side.call(0), 60)
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text("utf-8")
        side.pid = int(children.split()[0])
        yield side
    finally:
        worker.terminate()
        await asyncio.to_thread(worker.wait, 30)
        await side.broker.shutdown()


async def _measure(rounds: int) -> tuple[dict[str, list[_Figures]], list[list[float]]]:
    """For each side, the figures of each round; for each round, the seconds until calls were cancelled."""
    figures: dict[str, list[_Figures]] = {PLAIN: [], MANAGED: []}
    canceled: list[list[float]] = []
    async with AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(_running(kind)) for kind in figures]
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # The first round warms up.
        for number in range(rounds + 1):
            random.shuffle(sides)
            for side in sides:
                gc.collect()
                found = await _calls(side)
                if number:
                    figures[side.kind].append(found)
            ours = next(side for side in sides if side.kind == MANAGED)
            taken = [await _cancel(ours, Path(folder, f"{number}-{each}")) for each in range(CANCELED)]
            if number:
                canceled.append(sorted(taken))
    return figures, canceled


async def _calls(side: Side) -> _Figures:
    """Measure calls of one side: many at once, and one after another."""
    limit = asyncio.Semaphore(AT_ONCE)

    async def call(number: int) -> None:
        async with limit:
            await side.call(number)

    worker, caller, began = _cpu_time(side.pid), time.process_time(), time.perf_counter()
    await asyncio.gather(*(call(number) for number in range(CALLS)))
    seconds = time.perf_counter() - began
    of_worker, of_caller = _cpu_time(side.pid) - worker, time.process_time() - caller
    taken: list[float] = []
    for number in range(LATENCIES):
        began = time.perf_counter()
        await side.call(number)
        taken.append(time.perf_counter() - began)
    return {
        "CPU time of both": (of_worker + of_caller) / CALLS * 1e6,
        "CPU time of the worker": of_worker / CALLS * 1e6,
        "CPU time of the caller": of_caller / CALLS * 1e6,
        f"wall time, {AT_ONCE} at once": seconds / CALLS * 1e6,
        "wall time, one at a time": statistics.median(taken) * 1e6,
    }


async def _cancel(side: Side, path: Path) -> float:
    """Cancel a running call, and return the seconds until its function on the worker gets the error."""
    task = side.manager.create_task(remote(side.forever, str(path)))
    while not path.exists():
        await asyncio.sleep(0.005)
    began = time.monotonic()
    task.cancel()
    while not (text := path.read_text("utf-8")):
        await asyncio.sleep(0.002)
    return float(text) - began


def _cpu_time(pid: int) -> float:
    # What clock_getcpuclockid(3) computes on Linux: the clock of all threads of a process.
    return time.clock_gettime((~pid) << 3 | 2)


def _cost_table(sides: dict[str, list[_Figures]], note: str) -> Table:
    table = Table(
        "fleet-remote",
        "A remote call that does nothing, and its result",
        "µs per call",
        f"{PLAIN}: CPU time of both",
        len(sides[PLAIN]),
        note=f"Each row of this library compares with the same of Taskiq, which polls for results. {note}",
    )
    for figure in sides[PLAIN][0]:
        plain, ours = ([found[figure] for found in sides[kind]] for kind in (PLAIN, MANAGED))
        ratio = Spread.of([mine / theirs for mine, theirs in zip(ours, plain, strict=True)])
        table.rows += [
            Row(f"{PLAIN}: {figure}", Spread.of(plain)),
            Row(f"{MANAGED}: {figure}", Spread.of(ours), ratio),
        ]
    return table


def _rate_table(sides: dict[str, list[_Figures]], note: str) -> Table:
    """The same figures, as calls per second."""
    figures: dict[str, list[float]] = defaultdict(list)
    for kind, found in sides.items():
        for each in found:
            figures[f"{kind}: one caller, one worker"].append(1e6 / each[f"wall time, {AT_ONCE} at once"])
            figures[f"{kind}: per second of the worker's CPU"].append(1e6 / each["CPU time of the worker"])
    table = Table(
        "fleet-throughput",
        f"Remote calls per second, {AT_ONCE} at once",
        "per second",
        "",
        len(sides[PLAIN]),
        note=note,
        high="quartiles",
    )
    table.rows = [Row(name, Spread.of(values)) for name, values in figures.items()]
    return table


def _cancel_table(canceled: list[list[float]], note: str) -> Table:
    table = Table(
        "fleet-remote-cancel",
        "`cancel()` of a remote call to `CancelledError` on the worker",
        "ms",
        "",
        len(canceled),
        note=note,
        high="quartiles",
    )
    for name, share in {"p50": 0.5, "p95": 0.95}.items():
        values = [taken[int(len(taken) * share)] * 1e3 for taken in canceled]
        table.rows.append(Row(name, Spread.of(values)))
    return table
