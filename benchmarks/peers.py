"""The same work with each library: create tasks, let them run, and wait until all have ended.

Each library is used in the cheapest way that it documents. If that way collects the tasks to wait for them,
the cost of collecting counts.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiojobs
import aiotools
import anyio
import quattro

from benchmarks.names import GROUP, MANAGER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks import TaskManager

    Work = Callable[[int], Awaitable[object]]


async def work() -> None:
    """The task: nothing, so that what is measured is the cost around it."""


async def batch_bare(count: int) -> None:
    """Create them all, then wait for each."""
    create = asyncio.get_running_loop().create_task
    for task in [create(work()) for _ in range(count)]:
        await task


async def batch_task_group(count: int) -> None:
    """asyncio's own group."""
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(work())


async def batch_anyio(count: int) -> None:
    """anyio's group."""
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(work)


async def batch_quattro(count: int) -> None:
    """quattro's group."""
    async with quattro.TaskGroup() as group:
        for _ in range(count):
            group.create_task(work())


async def batch_aiotools(count: int) -> None:
    """The scope that aiotools recommends since its 2.0."""
    async with aiotools.TaskScope() as scope:
        for _ in range(count):
            scope.create_task(work())


async def batch_aiojobs(count: int) -> None:
    """A scheduler without limit; it has no cheap way to wait for all, hence turns until none is left."""
    scheduler = aiojobs.Scheduler(limit=None)
    for _ in range(count):
        await scheduler.spawn(work())
    while len(scheduler):  # noqa: ASYNC110  # what would tell us costs more than one turn
        await asyncio.sleep(0)
    await scheduler.close()


async def serial_bare(count: int) -> None:
    """One after another."""
    create = asyncio.get_running_loop().create_task
    for _ in range(count):
        await create(work())


async def serial_task_group(count: int) -> None:
    """One after another, in asyncio's own group."""
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            await group.create_task(work())


async def serial_quattro(count: int) -> None:
    """One after another, in quattro's group."""
    async with quattro.TaskGroup() as group:
        for _ in range(count):
            await group.create_task(work())


async def serial_aiojobs(count: int) -> None:
    """One after another."""
    scheduler = aiojobs.Scheduler(limit=None)
    for _ in range(count):
        job = await scheduler.spawn(work())
        await job.wait()
    await scheduler.close()


def batch_ours(manager: TaskManager) -> dict[str, Work]:
    """The manager's tasks, waited for as the bare ones are; and a group's, as asyncio's group does."""

    async def by_manager(count: int) -> None:
        for task in [manager.create_task(work()) for _ in range(count)]:
            await task
        # asyncio hands the last ends to the manager in the turn after the first.
        while manager.stats().live:  # noqa: ASYNC110  # one turn
            await asyncio.sleep(0)

    async def by_group(count: int) -> None:
        async with manager.group("batch") as group:
            for _ in range(count):
                group.create_task(work())

    return {MANAGER: by_manager, GROUP: by_group}


def serial_ours(manager: TaskManager) -> dict[str, Work]:
    """One after another."""

    async def by_manager(count: int) -> None:
        for _ in range(count):
            await manager.create_task(work())

    async def by_group(count: int) -> None:
        async with manager.group("batch") as group:
            for _ in range(count):
                await group.create_task(work())

    return {MANAGER: by_manager, GROUP: by_group}
