"""Create, run and end tasks that do nothing, without an SDK: what is measured is what management costs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import uvloop

from benchmarks import names, peers
from benchmarks.measure import Effort, Table, per_piece, tabulate, take_turns
from otel_tasks import TaskManager

if TYPE_CHECKING:
    from benchmarks.peers import Work

BATCH: dict[str, Work] = {
    names.BARE: peers.batch_bare,
    names.TASK_GROUP: peers.batch_task_group,
    "quattro": peers.batch_quattro,
    "aiotools": peers.batch_aiotools,
    "aiojobs": peers.batch_aiojobs,
    "anyio": peers.batch_anyio,
}
SERIAL: dict[str, Work] = {
    names.BARE: peers.serial_bare,
    names.TASK_GROUP: peers.serial_task_group,
    "quattro": peers.serial_quattro,
    "aiojobs": peers.serial_aiojobs,
}


def run(effort: Effort) -> list[Table]:
    """Measure on asyncio's loop and on uvloop."""
    sizes = (5_000, 20_000) if effort.quick else (5_000, 100_000)
    on_asyncio = asyncio.run(_all_sizes(effort, "asyncio", sizes))
    on_uvloop = uvloop.run(_all_sizes(effort.less(0.5), "uvloop", (5_000,)))
    return [*on_asyncio, *on_uvloop]


async def _all_sizes(effort: Effort, loop: str, sizes: tuple[int, ...]) -> list[Table]:
    tables = []
    manager = TaskManager("bench")
    for size in sizes:
        sides = {name: per_piece(work, size) for name, work in (BATCH | peers.batch_ours(manager)).items()}
        table = Table(
            f"spawn-{loop}-{size}",
            f"Create, run and end a task: batches of {size:,}, {loop}",
            "µs per task",
            names.TASK_GROUP,
            0,
        )
        share = Effort(effort.rounds, effort.seconds / (len(sizes) + 1))
        tables.append(tabulate(table, await take_turns(sides, share)))
    tables.append(await _one_after_another(effort.less(1 / (len(sizes) + 1)), loop, manager))
    return tables


async def _one_after_another(effort: Effort, loop: str, manager: TaskManager) -> Table:
    sides = {name: per_piece(work, 5_000) for name, work in (SERIAL | peers.serial_ours(manager)).items()}
    table = Table(
        f"spawn-{loop}-serial",
        f"Create a task and await it, one after another, {loop}",
        "µs per task",
        names.TASK_GROUP,
        0,
    )
    return tabulate(table, await take_turns(sides, effort))
