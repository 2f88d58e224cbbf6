"""The survey behind an overview: its slices, and what happens between two of them."""

from __future__ import annotations

import asyncio
from math import ceil
from typing import TYPE_CHECKING, Any

from otel_tasks import TaskGroup, TaskManager
from otel_tasks._core.slices import TASKS_PER_SLICE
from tests.helpers import give, ignore_cancels, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from otel_tasks import Overview


def started(
    manager: TaskManager, members: Mapping[str, int] | None = None
) -> Generator[None, None, Overview]:
    """An overview whose first slice is over."""
    slices = manager.overview_slices(members=members)
    next(slices)
    return slices


def finished(slices: Generator[None, None, Overview]) -> tuple[Overview, int]:
    """The overview, and how many more slices it took."""
    count = 1
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value, count
        count += 1


def as_data(overview: Overview) -> dict[str, Any]:
    """The rows and the counters of an overview, without the time."""
    return {
        "stats": overview.stats,
        "groups": overview.groups,
        "classes": overview.classes,
        "cancelling": overview.cancelling,
    }


async def test_slices_grow_with_the_tasks() -> None:
    """Each slice counts 500 tasks; a few more slices sort and make rows."""
    counts: dict[int, int] = {}
    for size in (0, 2000, 4000, 8000):
        async with TaskManager() as manager:
            for number in range(size):
                manager.create_task(rest(), group=f"group {'abcd'[number % 4]}")
            overview, counts[size] = finished(started(manager))
            assert overview.groups[0].tasks.count == size
            await manager.cancel_all_tasks()
    assert counts[0] == 1
    for size in (2000, 4000, 8000):
        counted = ceil(size / TASKS_PER_SLICE)
        assert counted <= counts[size] <= 2 * counted + 2


async def test_every_shape_is_cut_into_slices() -> None:
    """Many names, many small groups, and many tasks with progress make more slices, not longer ones."""

    async def block(number: int) -> None:
        async with TaskGroup("load"):
            await rest()

    def many_names(manager: TaskManager) -> None:
        for number in range(1000):
            manager.create_task(rest(), name="".join("abcdefghij"[int(digit)] for digit in f"{number:03}"))

    def many_groups(manager: TaskManager) -> None:
        for number in range(1000):
            manager.create_task(block(number), name="block")

    def much_progress(manager: TaskManager) -> None:
        for _ in range(1000):
            manager.create_task(rest()).progress.update(done=1, total=2)

    shapes: list[Callable[[TaskManager], None]] = [many_names, many_groups, much_progress]
    for shape in shapes:
        async with TaskManager() as manager:
            shape(manager)
            await settle()
            overview, count = finished(started(manager))
            assert overview.groups[0].tasks.count == 1000
            assert count >= 2 * 1000 / TASKS_PER_SLICE
            await manager.cancel_all_tasks()


async def test_slices_and_one_step_say_the_same() -> None:
    """When nothing happens in between, an overview in slices is the overview."""
    async with TaskManager(max_concurrency=1500) as manager:
        for number in range(2000):
            manager.create_task(rest(), group=f"g{number % 3}").progress.update(done=1)
        stubborn = manager.create_task(ignore_cancels(5), group="apart", priority=3)
        await settle()
        stubborn.cancel()
        root = manager.overview().ROOT
        slices = started(manager, {root: 700})
        overview, _ = finished(slices)
        same = manager.overview(members={root: 700})
        assert as_data(overview) == as_data(same)
        assert overview.members == same.members
        assert len(overview.members[root]) == 700
        await manager.cancel_all_tasks()


async def test_overview_shows_the_moment_of_its_first_slice() -> None:
    """A task that ends between two slices is counted, one that starts is not, and the counters agree."""
    async with TaskManager() as manager:
        gates = [asyncio.Event() for _ in range(3)]
        for _ in range(600):
            for gate in gates:
                manager.create_task(gate.wait(), name="wait", group=f"g{'abc'[gates.index(gate)]}")
        await settle()
        before = manager.stats()
        moment = manager.now()
        slices = started(manager)
        await asyncio.sleep(1)
        gates[2].set()
        manager.create_task(rest(), name="late", group="ga")
        await settle()
        next(slices)
        gates[0].set()
        manager.create_task(rest(), name="late", group="new")
        await settle()
        overview, _ = finished(slices)
        assert (overview.now, overview.stats) == (moment, before)
        assert {row.name: row.tasks.count for row in overview.groups[1:]} == {"ga": 600, "gb": 600, "gc": 600}
        assert overview.groups[0].tasks.count == overview.stats.live == 1800
        assert {row.name for row in overview.classes} == {"wait"}
        # The next one has it all.
        after = manager.overview()
        assert {row.name: row.tasks.count for row in after.groups[1:]} == {"ga": 1, "gb": 600, "new": 1}
        await manager.cancel_all_tasks()


async def test_group_that_ends_between_two_slices_keeps_its_row() -> None:
    """Its tasks are counted where they were."""

    async def block(gate: asyncio.Event) -> None:
        async with TaskGroup("load") as group:
            group.create_task(rest(), name="inside")
            await gate.wait()
            group.cancel()

    async with TaskManager() as manager:
        gate = asyncio.Event()
        host = manager.create_task(block(gate))
        await settle()
        slices = started(manager)
        gate.set()
        await asyncio.wait([host])
        overview, _ = finished(slices)
        assert [(row.name, row.tasks.count) for row in overview.groups] == [("default", 2), ("load", 1)]
        assert [(row.name, row.tasks.count) for row in manager.overview().groups] == [("default", 0)]


async def test_service_that_comes_to_its_next_run_is_counted_once() -> None:
    """A service and the run that it had in the first slice are one, even if that run ends in between."""
    async with TaskManager() as manager:
        for _ in range(TASKS_PER_SLICE):
            manager.create_task(rest(), name="first", group="a")
        await manager.start_periodic("poll", lambda: asyncio.sleep(0.5), every=1.0, group="z")
        await asyncio.sleep(1.2)
        slices = started(manager)
        await asyncio.sleep(1)
        overview, _ = finished(slices)
        assert {row.name: row.tasks.count for row in overview.classes} == {
            "first": TASKS_PER_SLICE,
            "poll": 1,
        }
        await manager.shutdown(grace=0.0)


async def test_broken_off_survey_leaves_nothing() -> None:
    """Closing the generator between two slices changes nothing in the manager."""
    async with TaskManager() as manager:
        await manager.create_task(give(1))
        before = manager.stats()
        slices = started(manager)
        slices.close()
        assert manager.stats() == before
