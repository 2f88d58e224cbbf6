"""The cost of one more task while many are live, which must not depend on their number.

Managers with 1,000 to 1,000,000 live tasks stand side by side in one process; each is asked the same in turn.
"""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING

from benchmarks.measure import Effort, Row, Spread, Table, cpu_clock, tabulate, take_turns
from benchmarks.memory import NEEDED_FOR_A_MILLION, available
from benchmarks.peers import work
from otel_tasks import TaskManager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.measure import Side

    Operation = Callable[[TaskManager], Awaitable[float]]

SIZES = (1_000, 10_000, 100_000, 1_000_000)
HISTORIES = (0, 1_000, 100_000)
COUNT = 200


def run(effort: Effort) -> list[Table]:
    """Measure what is asked of a manager, and what its history costs."""
    most = 1_000_000 if not effort.quick and available() > NEEDED_FOR_A_MILLION else 100_000
    sizes = [size for size in SIZES if size <= most]
    tables = asyncio.run(_by_size(effort.less(0.8), sizes))
    return [*tables, asyncio.run(_by_history(effort.less(0.2)))]


async def _by_size(effort: Effort, sizes: list[int]) -> list[Table]:
    managers = {f"{size:,} live": await _filled(size) for size in sizes}
    # These objects live for the whole run; otherwise, the collector would visit them again and again.
    gc.freeze()
    share = effort.less(1 / (len(OPERATIONS) + 1))
    tables = []
    for table_id, (title, operation) in OPERATIONS.items():
        sides = {name: _asking(operation, manager) for name, manager in managers.items()}
        table = Table(f"scale-{table_id}", title, "µs each", next(iter(sides)), 0)
        tables.append(tabulate(table, await take_turns(sides, share, collect=False)))
    tables.append(await _cancel_all(managers, sizes))
    return tables


async def _filled(size: int) -> TaskManager:
    manager = TaskManager(f"bench-{size}")
    for number in range(size):
        manager.create_task(_hold(), name=f"held-{number}")
    await asyncio.sleep(0)
    return manager


async def _hold() -> None:
    # One future per task: cancelling the task cancels it too.
    await asyncio.get_running_loop().create_future()


def _asking(operation: Operation, manager: TaskManager) -> Side:
    async def side() -> float:
        return await operation(manager)

    return side


async def _finish(manager: TaskManager) -> float:
    begin = cpu_clock()
    for task in [manager.create_task(work()) for _ in range(COUNT)]:
        await task
    await asyncio.sleep(0)
    return (cpu_clock() - begin) / COUNT


async def _look_up(manager: TaskManager) -> float:
    names = [f"held-{number}" for number in range(COUNT)]
    begin = cpu_clock()
    for name in names:
        manager.get_task(name)
    return (cpu_clock() - begin) / COUNT


async def _cancel_by_name(manager: TaskManager) -> float:
    names = [f"extra-{number}" for number in range(COUNT)]
    for name in names:
        manager.create_task(_hold(), name=name)
    await asyncio.sleep(0)
    begin = cpu_clock()
    for name in names:
        await manager.cancel_task(name)
    return (cpu_clock() - begin) / COUNT


async def _cancel_group(manager: TaskManager) -> float:
    for _ in range(COUNT):
        manager.create_task(_hold(), group="extra")
    await asyncio.sleep(0)
    begin = cpu_clock()
    await manager.cancel_group("extra")
    return (cpu_clock() - begin) / COUNT


OPERATIONS: dict[str, tuple[str, Operation]] = {
    "finish": ("Create, run and end a task", _finish),
    "look-up": ("Find a task by name", _look_up),
    "cancel-name": ("Cancel a task by name and wait for it", _cancel_by_name),
    "cancel-group": (f"Cancel a group of {COUNT} tasks, for each of them", _cancel_group),
}


async def _cancel_all(managers: dict[str, TaskManager], sizes: list[int]) -> Table:
    table = Table(
        "scale-cancel-all", "Cancel all, for each task", "µs each", next(iter(managers)), 1, note="One round."
    )
    first = 0.0
    for (name, manager), size in zip(managers.items(), sizes, strict=True):
        begin = cpu_clock()
        await manager.cancel_all_tasks(timeout=None)
        value = (cpu_clock() - begin) / size * 1e6
        first = first or value
        ratio = None if name == table.yardstick else Spread(value / first, value / first, value / first)
        table.rows.append(Row(name, Spread(value, value, value), ratio))
    return table


async def _by_history(effort: Effort) -> Table:
    sides = {}
    for limit in HISTORIES:
        manager = TaskManager("bench", history=limit)
        for task in [manager.create_task(work()) for _ in range(limit)]:
            await task
        sides[f"history of {limit:,}, full" if limit else "no history"] = _asking(_finish, manager)
    table = Table("scale-history", "Create, run and end a task, history full", "µs each", "no history", 0)
    return tabulate(table, await take_turns(sides, effort))
