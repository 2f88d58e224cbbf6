"""What runs in a manager, by name; and everything about one task."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from otel_tasks import (
    CancelKind,
    Overview,
    TaskGroup,
    TaskManager,
    TaskStatus,
    current_task,
)
from otel_tasks._core.overview import FOLDED
from tests.helpers import fail, give, ignore_cancels, rest, settle


def classes(overview: Overview) -> dict[tuple[str, str], int]:
    """How many tasks each class has, by the names of its group and its own."""
    names = {row.key: row.name for row in overview.groups}
    return {(names[row.group], row.name): row.tasks.count for row in overview.classes}


async def closed(manager: TaskManager) -> None:
    """Cancel what is left."""
    await manager.cancel_all_tasks()


async def test_tasks_of_one_function_are_one_class() -> None:
    """Numbers and ids in names do not matter."""
    async with TaskManager() as manager:
        for number in range(3):
            manager.create_task(rest())
            manager.create_task(rest(), name=f"import-{number}")
        assert classes(manager.overview()) == {("default", "rest"): 3, ("default", "import"): 3}
        await closed(manager)


async def test_groups_with_the_same_names_are_one_row() -> None:
    """Open blocks of one name are one row with one class, and what is below a label counts for it."""
    async with TaskManager() as manager:
        blocks = [TaskGroup("load", manager=manager) for _ in range(3)]
        for block in blocks:
            await block.__aenter__()
        for block in blocks:
            block.create_task(rest())
        manager.create_task(rest(), group="ingest.fetch")
        overview = manager.overview()
        rows = {row.name: row for row in overview.groups}
        # The blocks nest: each was opened in the one before.
        assert sum(row.instances for row in overview.groups if row.name == "load") == 3
        assert rows["ingest"].tasks.count == rows["ingest.fetch"].tasks.count == 1
        assert rows["ingest.fetch"].parent == rows["ingest"].key
        assert rows["default"].tasks.count == 4
        assert (overview.open_groups, rows["ingest"].group_id) == (5, "ingest")
        await closed(manager)
        for block in reversed(blocks):
            await block.__aexit__(None, None, None)


async def test_sibling_groups_of_one_name_are_merged() -> None:
    """Blocks of one name in different tasks have one row and no id."""

    async def block() -> None:
        async with TaskGroup("load") as group:
            group.create_task(rest())

    async with TaskManager() as manager:
        for _ in range(3):
            manager.create_task(block())
        await settle()
        (row,) = [row for row in manager.overview().groups if row.name == "load"]
        assert (row.instances, row.group_id, row.kind, row.tasks.count) == (3, None, "block", 3)
        await closed(manager)


async def test_keys_are_the_same_in_every_manager() -> None:
    """A key depends on names alone, and is a task's own way to its rows."""
    keys = []
    for name in ("one", "two"):
        async with TaskManager(name) as manager:
            task = manager.create_task(rest(), group="mail")
            overview = manager.overview()
            assert overview.keys_of(task) == (overview.groups[1].key, overview.classes[0].key)
            assert overview.keys_of(task.info()) == overview.keys_of(task)
            keys.append([*(row.key for row in overview.groups), *(row.key for row in overview.classes)])
            await closed(manager)
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 3


async def test_group_of_an_ended_task_may_be_unknown() -> None:
    """A record of a group that is closed has no row."""
    async with TaskManager() as manager:
        await manager.create_task(give(1), group="gone")
        assert manager.overview().keys_of(manager.recent()[0]) == (None, None)


async def test_ages_are_creation_times() -> None:
    """The oldest, the median, and the one older than 90 % are times that stay while nothing happens."""
    async with TaskManager() as manager:
        times = []
        for _ in range(10):
            times.append(manager.create_task(rest(), group="mail").created_at)
            await asyncio.sleep(1)
        first = manager.overview()
        counted = first.classes[0].tasks
        assert (counted.oldest, counted.p50, counted.p90) == (times[0], times[5], times[1])
        assert first.groups[1].tasks == counted
        assert (first.groups[0].tasks.oldest, first.groups[0].tasks.p50) == (times[0], None)
        await asyncio.sleep(5)
        assert manager.overview().classes == first.classes
        await closed(manager)


async def test_queued_and_cancelling_tasks_are_counted() -> None:
    """A task that waits for a place is queued, and one whose cancellation was requested is cancelling."""
    async with TaskManager(max_concurrency=2) as manager:
        running = [manager.create_task(ignore_cancels(60), name=f"busy-{n}") for n in range(2)]
        for _ in range(3):
            manager.create_task(rest())
        await settle()
        running[0].cancel()
        await settle()
        overview = manager.overview()
        root = overview.groups[0].tasks
        assert (root.count, root.queued, root.cancelling) == (5, 3, 1)
        assert overview.cancelling == (running[0],)
        await manager.shutdown(grace=0.0, timeout=100)


async def test_progress_is_added_up() -> None:
    """The reports of live tasks are summed, and an unknown total makes the sum unknown."""

    async def report(total: float | None) -> None:
        task = current_task()
        assert task is not None
        task.progress.update(done=2, total=total)
        await rest()

    async with TaskManager() as manager:
        for total in (10, 20, None):
            manager.create_task(report(total), group="known" if total else "unknown")
        manager.create_task(rest(), group="known")
        await settle()
        sums = {row.name: row.tasks.progress for row in manager.overview().groups}
        assert sums["known"] is not None
        assert (sums["known"].done, sums["known"].total, sums["known"].reporting) == (4, 30, 2)
        assert sums["unknown"] is not None
        assert sums["unknown"].total is None
        await closed(manager)


async def test_service_and_its_attempt_are_one() -> None:
    """What a service does is not counted twice."""
    async with TaskManager() as manager:
        await manager.start_service("feed", rest)
        await manager.start_periodic("sweep", lambda: asyncio.sleep(1), every=60)
        await settle()
        overview = manager.overview()
        assert classes(overview) == {("default", "feed"): 1, ("default", "sweep"): 1}
        assert [row.kind for row in overview.classes] == ["service", "service"]
        feed = manager.get_task("feed")
        assert overview.classes[0].only is feed
        feed.set_name("renamed")
        manager.create_task(rest())
        assert classes(manager.overview()) == {
            ("default", "renamed"): 1,
            ("default", "sweep"): 1,
            ("default", "rest"): 1,
        }
        await closed(manager)


async def test_rows_that_do_not_fit_are_folded() -> None:
    """Nothing is dropped: further groups are one row, and the smallest classes of a group are one class."""
    async with TaskManager() as manager:
        for number in range(6):
            for _ in range(number + 1):
                manager.create_task(rest(), group=f"g{chr(97 + number)}")
                manager.create_task(
                    rest(), group="names", name=f"name{chr(97 + number)}", on_conflict="suffix"
                )
        overview = manager.overview(max_groups=4, max_classes=3)
        assert [row.name for row in overview.groups][-1] == FOLDED
        assert len(overview.groups) == 5
        assert overview.groups[0].tasks.count == sum(row.tasks.count for row in overview.classes) == 42
        assert overview.folded_groups == 4
        assert overview.folded_classes > 0
        assert FOLDED in {row.name for row in overview.classes}
        await closed(manager)


async def test_members_are_the_oldest_tasks_of_a_row() -> None:
    """A key of a class, a group, or the root names the tasks in and below it; an unknown one names none."""
    async with TaskManager() as manager:
        tasks = []
        for number in range(4):
            tasks.append(manager.create_task(rest(), group="a" if number % 2 else "a.b"))
            await asyncio.sleep(1)
        overview = manager.overview()
        root, a, b = (row.key for row in overview.groups)
        cls = overview.keys_of(tasks[1])[1]
        assert cls is not None
        members = manager.overview(members={root: 3, a: 9, b: 9, cls: 1, "g0": 5}).members
        assert members[root] == tuple(tasks[:3])
        assert members[a] == tuple(tasks)
        assert members[b] == (tasks[0], tasks[2])
        assert members[cls] == (tasks[1],)
        assert members["g0"] == ()
        await closed(manager)


async def test_overview_changes_nothing() -> None:
    """Looking makes no group, no uid, and no task."""
    async with TaskManager() as manager:
        task = manager.create_task(rest())
        before = (task.info(), manager.stats())
        manager.overview()
        assert (task.info(), manager.stats()) == before
        assert task.info().uid is None
        await closed(manager)


def test_overview_of_a_new_manager() -> None:
    """Without a loop and without tasks there is a root and nothing else."""
    overview = TaskManager("new").overview()
    assert TaskManager("new").outliving_tasks() == []
    assert [(row.name, row.tasks.count) for row in overview.groups] == [("new", 0)]
    assert overview.classes == ()


@pytest.mark.parametrize("bound", [{"max_groups": 0}, {"max_classes": 0}])
def test_bounds_are_at_least_one(bound: dict[str, Any]) -> None:
    """A bound of no rows is refused."""
    with pytest.raises(ValueError, match="must be at least 1"):
        TaskManager().overview(**bound)


# -- one task, and the ended ones ---------------------------------------------------------------------------


async def test_details_show_the_chain_of_awaits_and_the_waiters() -> None:
    """The innermost line comes first, the user's lines are marked, and gather() is no waiter itself."""

    async def inner() -> None:
        await asyncio.sleep(60)

    async def outer() -> None:
        await inner()

    async def waiting(task: Any) -> None:
        await asyncio.gather(task, asyncio.gather(task, asyncio.sleep(1)))

    async with TaskManager() as manager:
        task = manager.create_task(outer(), group="mail")
        waiter = manager.create_task(waiting(task))
        await settle()
        details = manager.details(task)
        assert [(line.function.rpartition(".")[2], own) for line, own in details.frames] == [
            ("sleep", False),
            ("inner", True),
            ("outer", True),
        ]
        assert [each.task for each in details.waiters] == [waiter]
        assert details.awaited is None
        assert details.path == ("default", "mail", "outer")
        assert details.children == 0
        await closed(manager)


async def test_details_show_how_a_cancellation_came_about() -> None:
    """The cancelled groups around the task are listed from the outside in, and children are counted."""

    async def parent() -> None:
        async with TaskGroup("block") as group:
            for _ in range(2):
                group.create_task(ignore_cancels(60))
            await asyncio.sleep(60)

    async with TaskManager() as manager:
        task = manager.create_task(parent())
        await settle()
        assert manager.details(task).children == 2
        task.cancel("enough")
        await settle()
        (child,) = [each for each in manager.overview().cancelling if each.name == "ignore_cancels"]
        details = manager.details(child)
        assert [cause.kind for _, cause in details.cancelled_groups] == [CancelKind.EXPLICIT]
        assert details.path[:1] == ("default",)
        assert details.path[1].startswith("block#")
        await manager.shutdown(grace=0.0, timeout=200)


async def test_describe_keeps_the_order() -> None:
    """Each task has its node, and one that has ended has no place."""
    async with TaskManager() as manager:
        tasks = [manager.create_task(rest(), name=name) for name in "ba"]
        ended = manager.create_task(give(1))
        await ended
        nodes = manager.describe([*tasks, ended])
        assert [node.name for node in nodes] == ["b", "a", "give"]
        assert nodes[0].where is None or nodes[0].where.function == "rest"
        assert nodes[2].where is None
        await closed(manager)


async def test_recent_tasks_are_the_newest_first() -> None:
    """The last ended tasks come first; with a choice, those that did not complete win, in their order."""
    async with TaskManager(on_error=lambda info, error: None) as manager:
        for number in range(6):
            await manager.create_task(give(number), name=f"good-{number}")
            if number == 1:
                await asyncio.wait([manager.create_task(fail(ValueError("x")), name="bad")])
        assert [info.name for info in manager.recent(3)] == ["good-5", "good-4", "good-3"]
        assert [info.name for info in manager.recent(2, among=7)] == ["good-5", "bad"]
        assert manager.recent(0) == []
        assert manager.recent(2, among=7)[1].status is TaskStatus.FAILED
        with pytest.raises(ValueError, match="limit"):
            manager.recent(-1)


async def test_cancellation_names_the_person() -> None:
    """The cause has the given name instead of that of the calling code."""
    async with TaskManager() as manager:
        task = manager.create_task(rest())
        await settle()
        assert await manager.cancel_task(task.uid, "stuck", asked_by="ada")
        assert task.cause is not None
        assert (task.cause.asked_by, task.cause.message, task.cause.kind) == (
            "ada",
            "stuck",
            CancelKind.EXPLICIT,
        )


async def test_tasks_outside_of_requests_outlive_none() -> None:
    """Neither managed tasks nor plain ones without a request are listed."""
    async with TaskManager() as manager:
        manager.create_task(rest())
        plain = asyncio.create_task(asyncio.sleep(1))
        assert manager.outliving_tasks() == []
        await plain
        await closed(manager)
