"""Ways to nest tasks below a handler, for tests of what becomes of them.

Each starts its tasks in a ``Nest`` and waits for them, or for an hour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio

from otel_tasks import ManagedTask, TaskGroup, TaskManager, managed_task

from .helpers import rest


class Nest(Protocol):
    """The object that starts the tasks and keeps them."""

    other: TaskManager
    """Not the manager of the request."""

    def leaf(self, group: TaskGroup | None = None) -> ManagedTask[Any]:
        """Start a task that rests, in the current group or in another one."""
        ...

    def task(self, coro: Coroutine[Any, Any, Any], group: TaskGroup | None = None) -> ManagedTask[Any]:
        """Start a task, in the current group or in another one."""
        ...

    def keep(self, task: ManagedTask[Any]) -> ManagedTask[Any]:
        """Note a task that was started elsewhere."""
        ...


Shape = Callable[[Nest], Coroutine[Any, Any, None]]


async def rests(nest: Nest) -> None:
    nest.leaf()
    await rest()


async def awaits(nest: Nest) -> None:
    await nest.leaf()


async def gathers(nest: Nest) -> None:
    await asyncio.gather(nest.leaf(), nest.leaf())


async def gathers_gathered(nest: Nest) -> None:
    await asyncio.gather(asyncio.gather(nest.leaf()), nest.leaf())


async def waits(nest: Nest) -> None:
    await asyncio.wait([nest.leaf()])


async def shields(nest: Nest) -> None:
    await asyncio.shield(nest.leaf())


async def awaits_in_timeout(nest: Nest) -> None:
    async with asyncio.timeout(3000):
        await nest.leaf()


async def waits_for(nest: Nest) -> None:
    await asyncio.wait_for(nest.leaf(), 3000)


async def awaits_in_plain_task(nest: Nest) -> None:
    await asyncio.create_task(awaits(nest))


async def awaits_in_asyncio_group(nest: Nest) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(awaits(nest))


async def awaits_in_anyio_group(nest: Nest) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(awaits, nest)


async def waits_for_in_asyncio_group(nest: Nest) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(waits_for(nest))


async def waits_for_in_anyio_group(nest: Nest) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(waits_for, nest)


async def waits_for_in_plain_task(nest: Nest) -> None:
    await asyncio.create_task(waits_for(nest))


async def asyncio_group_in_plain_task(nest: Nest) -> None:
    await asyncio.create_task(awaits_in_asyncio_group(nest))


async def block(nest: Nest) -> None:
    async with TaskGroup("block") as group:
        nest.leaf(group)


async def block_that_rests(nest: Nest) -> None:
    async with TaskGroup("block") as group:
        nest.leaf(group)
        await rest()


async def block_that_awaits(nest: Nest) -> None:
    async with TaskGroup("block") as group:
        nest.leaf(group)
        await nest.leaf(group)


async def block_in_block(nest: Nest) -> None:
    async with TaskGroup("outer") as outer:
        nest.leaf(outer)
        await block(nest)


async def block_in_block_that_rests(nest: Nest) -> None:
    async with TaskGroup("outer") as outer:
        nest.leaf(outer)
        await block_that_rests(nest)


async def block_in_asyncio_group(nest: Nest) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(block_that_rests(nest))
        await block_that_rests(nest)


async def block_in_anyio_group(nest: Nest) -> None:
    """As behind Starlette's BaseHTTPMiddleware."""
    async with anyio.create_task_group() as group:
        group.start_soon(block_that_rests, nest)


async def block_in_plain_task(nest: Nest) -> None:
    await asyncio.create_task(block_that_rests(nest))


async def task_with_block(nest: Nest) -> None:
    await nest.task(block(nest))


async def task_with_block_that_rests(nest: Nest) -> None:
    nest.task(block_that_rests(nest))
    await rest()


async def task_that_awaits(nest: Nest) -> None:
    await nest.task(awaits(nest))


async def task_that_gathers(nest: Nest) -> None:
    await nest.task(gathers(nest))


async def task_that_waits_for(nest: Nest) -> None:
    await nest.task(waits_for(nest))


async def task_that_awaits_other_managers(nest: Nest) -> None:
    await nest.task(awaits_other_managers(nest))


async def awaits_other_managers(nest: Nest) -> None:
    await nest.keep(nest.other.create_task(rest()))


async def block_with_task_with_block(nest: Nest) -> None:
    async with TaskGroup("outer") as outer:
        nest.task(block_that_rests(nest), outer)


async def decorated(nest: Nest) -> None:
    @managed_task
    async def work() -> None:
        await nest.leaf()

    await work()


async def block_with_decorated(nest: Nest) -> None:
    async with TaskGroup("block"):
        await decorated(nest)


SHAPES = (
    rests,
    awaits,
    gathers,
    gathers_gathered,
    waits,
    shields,
    awaits_in_timeout,
    waits_for,
    awaits_in_plain_task,
    awaits_in_asyncio_group,
    awaits_in_anyio_group,
    waits_for_in_asyncio_group,
    waits_for_in_anyio_group,
    waits_for_in_plain_task,
    asyncio_group_in_plain_task,
    block,
    block_that_rests,
    block_that_awaits,
    block_in_block,
    block_in_block_that_rests,
    block_in_asyncio_group,
    block_in_anyio_group,
    block_in_plain_task,
    task_with_block,
    task_with_block_that_rests,
    task_that_awaits,
    task_that_gathers,
    task_that_waits_for,
    task_that_awaits_other_managers,
    block_with_task_with_block,
    decorated,
    block_with_decorated,
)
