"""Tasks that run their first step when they are created, from Python 3.12 on.

It may run in an interpreter that has none of the peers: nothing is imported from ``peers``.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Effort, Table, per_piece, tabulate, take_turns
from benchmarks.names import BARE, BARE_EAGER, GROUP, MANAGER
from otel_tasks import TaskManager

if TYPE_CHECKING:
    from benchmarks.measure import Side

COUNT = 5_000


def run(effort: Effort) -> list[Table]:
    """Measure, where Python can do it."""
    return [asyncio.run(_measure(effort))] if sys.version_info >= (3, 12) else []


async def work() -> None:
    """The task: nothing."""


async def _measure(effort: Effort) -> Table:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    table = Table("eager", f"Eager start, Python {version}: create and end a task", "µs per task", BARE, 0)
    return tabulate(table, await take_turns(_sides(TaskManager("bench")), effort))


def _sides(manager: TaskManager) -> dict[str, Side]:
    async def bare(count: int) -> None:
        create = asyncio.get_running_loop().create_task
        for task in [create(work()) for _ in range(count)]:
            await task

    async def bare_eager(count: int) -> None:
        loop = asyncio.get_running_loop()
        # Looked up by name: type checkers read this as Python 3.11.
        factory: Any = vars(asyncio)["eager_task_factory"]
        loop.set_task_factory(factory)
        try:
            await bare(count)
        finally:
            loop.set_task_factory(None)

    async def by_manager(count: int) -> None:
        for task in [manager.create_task(work(), eager_start=True) for _ in range(count)]:
            await task

    async def by_group(count: int) -> None:
        async with manager.group("batch") as group:
            for _ in range(count):
                group.create_task(work(), eager_start=True)

    sides = {BARE: bare, BARE_EAGER: bare_eager, MANAGER: by_manager, GROUP: by_group}
    return {name: per_piece(side, COUNT) for name, side in sides.items()}
