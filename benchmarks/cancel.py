"""Cancel many tasks that sleep, and set a tree of cancel events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiojobs
import aiotools
import anyio
import quattro

from benchmarks import names
from benchmarks.measure import Effort, Table, cpu_clock, tabulate, take_turns
from otel_tasks import CancelCause, CancelEvent, CancelKind, TaskManager

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Side

DESCENDANTS = 100_000
FEW = 10_000


class Stop(Exception):
    """Ends the block of a group that has no cancel()."""


def run(effort: Effort) -> list[Table]:
    """Measure tasks, fewer and many, and events."""
    many = 20_000 if effort.quick else 100_000
    return [
        asyncio.run(_tasks(effort.less(0.3), FEW)),
        asyncio.run(_tasks(Effort(max(2, effort.rounds // 3), effort.seconds * 0.5), many)),
        asyncio.run(_events(effort.less(0.2))),
    ]


async def sleep() -> None:
    """The task: it would sleep for a day."""
    await asyncio.sleep(86_400)


async def _tasks(effort: Effort, count: int) -> Table:
    table = Table(
        f"cancel-{count}",
        f"Cancel {count:,} sleeping tasks, until the last has ended",
        "µs per task",
        names.LOOP,
        0,
    )
    sides = {
        names.LOOP: _timed(_bare, count),
        names.TASK_GROUP: _timed(lambda n: _by_group(asyncio.TaskGroup(), n), count),
    }
    if count <= FEW:
        # Of very many a round would take half a minute.
        sides |= _peers(count)
    sides |= {
        names.MANAGER: _timed(_by_manager, count),
        names.GROUP: _timed(_by_our_group, count),
    }
    return tabulate(table, await take_turns(sides, effort))


def _peers(count: int) -> dict[str, Side]:
    return {
        "quattro": _timed(lambda n: _by_group(quattro.TaskGroup(), n), count),
        "aiotools": _timed(lambda n: _by_group(aiotools.TaskGroup(), n), count),
        "aiojobs": _timed(_aiojobs, count),
        "anyio": _timed(_anyio, count),
    }


def _timed(cancel: Callable[[int], Any], count: int) -> Side:
    async def side() -> float:
        begun = await cancel(count)
        return float(cpu_clock() - begun) / count

    return side


# Each starts its tasks, lets them fall asleep, and gives back when it began to cancel them.


async def _bare(count: int) -> float:
    tasks = [asyncio.create_task(sleep()) for _ in range(count)]
    await asyncio.sleep(0)
    begin = cpu_clock()
    for task in tasks:
        task.cancel()
    # They end in the order in which they were cancelled: no cheaper way to be sure that all have.
    while not tasks[-1].done():  # noqa: ASYNC110  # a turn or two
        await asyncio.sleep(0)
    return begin


async def _by_group(group: Any, count: int) -> float:
    begin = 0.0
    try:
        async with group:
            for _ in range(count):
                group.create_task(sleep())
            await asyncio.sleep(0)
            begin = cpu_clock()
            raise Stop
    except* Stop:
        pass
    return begin


async def _anyio(count: int) -> float:
    begin = 0.0
    async with anyio.create_task_group() as group:
        for _ in range(count):
            group.start_soon(sleep)
        await asyncio.sleep(0)
        begin = cpu_clock()
        group.cancel_scope.cancel()
    return begin


async def _aiojobs(count: int) -> float:
    scheduler = aiojobs.Scheduler(limit=None, close_timeout=None)
    for _ in range(count):
        await scheduler.spawn(sleep())
    await asyncio.sleep(0)
    begin = cpu_clock()
    await scheduler.close()
    return begin


async def _by_manager(count: int) -> float:
    manager = TaskManager("bench")
    for _ in range(count):
        manager.create_task(sleep())
    await asyncio.sleep(0)
    begin = cpu_clock()
    await manager.cancel_all_tasks(timeout=None)
    return begin


async def _by_our_group(count: int) -> float:
    async with TaskManager("bench").group("batch") as group:
        for _ in range(count):
            group.create_task(sleep())
        await asyncio.sleep(0)
        begin = cpu_clock()
        group.cancel()
    return begin


async def _events(effort: Effort) -> Table:
    table = Table(
        "cancel-events",
        f"One event reaches {DESCENDANTS:,} others",
        "µs per descendant",
        names.EVENTS,
        0,
        note="Wide: all are its children. Deep: each is the child of the one before.",
    )
    sides: dict[str, Side] = {
        names.EVENTS: _plain_events,
        names.LINKS: _links,
        names.WIDE: _wide,
        names.DEEP: _deep,
    }
    return tabulate(table, await take_turns(sides, effort))


async def _plain_events() -> float:
    events = [asyncio.Event() for _ in range(DESCENDANTS)]
    begin = cpu_clock()
    for event in events:
        event.set()
    return (cpu_clock() - begin) / DESCENDANTS


async def _links() -> float:
    parent = asyncio.Event()
    events = [asyncio.Event() for _ in range(DESCENDANTS)]
    tasks = [asyncio.create_task(_hand_on(parent, event)) for event in events]
    await asyncio.sleep(0)
    begin = cpu_clock()
    parent.set()
    for task in tasks:
        await task
    return (cpu_clock() - begin) / DESCENDANTS


async def _hand_on(parent: asyncio.Event, child: asyncio.Event) -> None:
    await parent.wait()
    child.set()


async def _wide() -> float:
    root = CancelEvent()
    events = [CancelEvent(root) for _ in range(DESCENDANTS)]
    return _set(root, events)


async def _deep() -> float:
    root = CancelEvent()
    events = [root]
    for _ in range(DESCENDANTS):
        events.append(CancelEvent(events[-1]))
    return _set(root, events)


def _set(root: CancelEvent, events: list[CancelEvent]) -> float:
    cause = CancelCause(CancelKind.EXPLICIT, "measured")
    begin = cpu_clock()
    root.set(cause)
    took = (cpu_clock() - begin) / DESCENDANTS
    if not events[-1].is_set():
        raise RuntimeError("the event did not reach its last descendant")
    return took
