"""Bytes that a live task takes, beyond those of a bare one.

Up to 100,000 tasks by tracemalloc, which counts to the byte what Python allocates; 1,000,000 by the resident
size of a process that does nothing else, since tracemalloc would need more memory than what it measures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import tracemalloc
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import aiojobs
import aiotools
import anyio
import quattro

from benchmarks import names
from benchmarks.measure import Effort, Row, Spread, Table
from otel_tasks import TaskManager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    # Starts so many tasks that wait for the gate, and leaves what holds them on the stack.
    Start = Callable[[int, "asyncio.Future[None]", AsyncExitStack], Awaitable[object]]

TRACED = (10_000, 100_000)
MILLION = 1_000_000
# Of the others, too, a million fits into few machines.
FEW = (names.BARE, names.TASK_GROUP, names.MANAGER, names.GROUP)
NEEDED_FOR_A_MILLION = 3 * 2**30


def run(effort: Effort) -> list[Table]:
    """Measure; each side once, the figures do not vary."""
    tables = [
        _table(size, {name: asyncio.run(_traced(start, size)) for name, start in STARTS.items()})
        for size in TRACED
    ]
    if not effort.quick and available() > NEEDED_FOR_A_MILLION:
        tables.append(_table(MILLION, {name: _in_a_process(name, MILLION) for name in FEW}))
    return tables


def _table(size: int, measured: dict[str, float]) -> Table:
    how = "resident size" if size == MILLION else "tracemalloc"
    table = Table(
        f"memory-{size}",
        f"Memory of a live task: {size:,} that wait ({how})",
        "bytes per task",
        names.BARE,
        1,
    )
    base = measured[names.BARE]
    for name, value in measured.items():
        row = Row(name, _exactly(value))
        if name != names.BARE:
            row.ratio, row.added = _exactly(value / base), _exactly(value - base)
        table.rows.append(row)
    return table


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)


async def wait_for(gate: asyncio.Future[None]) -> None:
    """The task: it waits."""
    await gate


async def _bare(count: int, gate: asyncio.Future[None], stack: AsyncExitStack) -> object:
    # The documented way to keep them from being collected.
    tasks: set[asyncio.Task[None]] = set()
    for _ in range(count):
        task = asyncio.create_task(wait_for(gate))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return tasks


async def _barest(count: int, gate: asyncio.Future[None], stack: AsyncExitStack) -> object:
    # All of them wait at the gate: only the tasks take memory.
    for _ in range(count):
        asyncio.create_task(wait_for(gate))  # noqa: RUF006  # see above
    return None


def _by_group(make: Callable[[], Any]) -> Start:
    async def start(count: int, gate: asyncio.Future[None], stack: AsyncExitStack) -> object:
        group = await stack.enter_async_context(make())
        for _ in range(count):
            group.create_task(wait_for(gate))
        return group

    return start


async def _anyio(count: int, gate: asyncio.Future[None], stack: AsyncExitStack) -> object:
    group = await stack.enter_async_context(anyio.create_task_group())
    for _ in range(count):
        group.start_soon(wait_for, gate)
    return group


async def _aiojobs(count: int, gate: asyncio.Future[None], stack: AsyncExitStack) -> object:
    scheduler = aiojobs.Scheduler(limit=None)
    for _ in range(count):
        await scheduler.spawn(wait_for(gate))
    return scheduler


async def _by_manager(count: int, gate: asyncio.Future[None], stack: AsyncExitStack) -> object:
    manager = TaskManager("bench")
    for _ in range(count):
        manager.create_task(wait_for(gate))
    return manager


STARTS: dict[str, Start] = {
    names.BARE: _barest,
    "asyncio.create_task, kept in a set": _bare,
    names.TASK_GROUP: _by_group(asyncio.TaskGroup),
    "quattro": _by_group(quattro.TaskGroup),
    "aiotools": _by_group(aiotools.TaskScope),
    "aiojobs": _aiojobs,
    "anyio": _anyio,
    names.MANAGER: _by_manager,
    names.GROUP: _by_group(lambda: TaskManager("bench").group("batch")),
}


async def _traced(start: Start, count: int) -> float:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with AsyncExitStack() as stack:
        # The first task also allocates things that later ones share.
        first = await start(1, gate, stack)
        await asyncio.sleep(0)
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        held = await start(count, gate, stack)
        await asyncio.sleep(0)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gate.set_result(None)
        await asyncio.sleep(0)
        del held, first
    return (after - before) / count


async def _resident(start: Start, count: int) -> float:
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    async with AsyncExitStack() as stack:
        first = await start(1, gate, stack)
        await asyncio.sleep(0)
        gc.collect()
        before = _resident_size()
        held = await start(count, gate, stack)
        await asyncio.sleep(0)
        taken = (_resident_size() - before) / count
        print(json.dumps(taken), flush=True)
        # No clean-up: to end a million tasks one by one would only take time.
        os._exit(0)
        del held, first
    return taken


def _in_a_process(name: str, count: int) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", name, str(count)]
    return float(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)


def _resident_size() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available() -> int:
    """Bytes of memory that may be had; 0 where nobody says."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:
        return 0
    return int(lines["MemAvailable"].split()[0]) * 1024


if __name__ == "__main__":
    asyncio.run(_resident(STARTS[sys.argv[1]], int(sys.argv[2])))
