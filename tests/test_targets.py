"""Cancellations on behalf of another process: given causes, tasks and groups by name, and how they end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import CancelCause, CancelKind, GroupClosedError, ManagedTask, TaskManager, TaskStatus
from otel_tasks._core.slices import COUNTS_PER_SLICE, NAMES_PER_SLICE, TASKS_PER_SLICE, at_once
from otel_tasks._core.targets import (
    Found,
    Reached,
    cancel_grouped,
    cancel_named,
    find_tasks,
    wait_for_reached,
)
from otel_tasks._core.telemetry.context import span_from_hex
from tests.helpers import give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Generator

GIVEN = CancelCause(CancelKind.HOST_LOST, "its host is gone", "billing on host-a/12/x1y2z3")


# -- a given cause ----------------------------------------------------------------------------------


async def test_cancel_task_records_a_given_cause() -> None:
    """A cause from elsewhere replaces the manager's own; a missing time is that of the call."""
    manager = TaskManager()
    task = manager.create_task(rest(), name="import")
    await asyncio.sleep(3)

    assert await manager.cancel_task("import", cause=GIVEN)

    cause = task.cause
    assert cause is not None
    assert (cause.kind, cause.message, cause.asked_by) == (GIVEN.kind, GIVEN.message, GIVEN.asked_by)
    assert cause.at == now()


async def test_cancel_task_keeps_the_time_of_a_given_cause() -> None:
    """A cause that has a time keeps it."""
    manager = TaskManager()
    task = manager.create_task(rest(), name="import")
    given = CancelCause(CancelKind.EXPLICIT, at=0.25)
    await manager.cancel_task("import", cause=given)
    assert task.cause is given


async def test_cancel_group_records_a_given_cause() -> None:
    """Every task of the group has the cause."""
    manager = TaskManager()
    tasks = [manager.create_task(rest(), group=name) for name in ("tenant.acme", "tenant.acme.mail")]
    assert await manager.cancel_group("tenant.acme", cause=GIVEN) == 2
    assert [task.cause and task.cause.message for task in tasks] == [GIVEN.message] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cause": "gone"}, "cause must be a CancelCause, got 'gone'"),
        ({"cause": GIVEN, "reason": "gone"}, "either cause, or reason and asked_by"),
        ({"cause": GIVEN, "asked_by": "ada"}, "either cause, or reason and asked_by"),
    ],
)
async def test_a_wrong_cause_is_refused(arguments: dict[str, Any], message: str) -> None:
    """A cause of the wrong type, or one beside a reason, is refused, and the task runs on."""
    manager = TaskManager()
    async with manager:
        task = manager.create_task(rest(), name="import", group="ingest")
        with pytest.raises(TypeError, match=message):
            await manager.cancel_task("import", **arguments)
        if "asked_by" not in arguments:
            with pytest.raises(TypeError, match=message):
                await manager.cancel_group("ingest", **arguments)
        assert task.cause is None
        task.cancel()


# -- by name ----------------------------------------------------------------------------------------


async def test_a_task_is_found_by_name_id_and_uid() -> None:
    """The names are those of cancel_task."""
    manager = TaskManager()
    async with manager.group("block") as group:
        tasks = [group.create_task(rest(), name="a"), manager.create_task(rest(), name="b")]
        named = [cancel_named(manager, tasks[0].id, GIVEN), cancel_named(manager, tasks[1].uid, GIVEN)]
        assert named == [[tasks[0]], [tasks[1]]]
        await settle()
    assert cancel_named(manager, "unknown", GIVEN) == []
    assert cancel_named(manager, "b", GIVEN) == []


async def test_a_task_that_is_being_cancelled_is_not_interrupted() -> None:
    """A second request leaves the cleanup and the first cause alone, and reports the task anyway."""
    manager = TaskManager()

    async def clean_up() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(2)

    task = manager.create_task(clean_up(), name="import")
    await settle()
    assert cancel_named(manager, "import", CancelCause(CancelKind.EXPLICIT, "first")) == [task]
    await asyncio.sleep(1)
    assert cancel_named(manager, "import", GIVEN) == [task]
    assert await wait_for_reached([task], 5.0) == Reached(1, 1, ())
    assert task.cause is not None
    assert task.cause.message == "first"


async def test_tasks_created_later_are_spared() -> None:
    """A cancellation that took its time to come does not reach what was started after it."""
    manager = TaskManager()
    async with manager:
        old = manager.create_task(rest(), name="old", group="ingest")
        await asyncio.sleep(10)
        new = manager.create_task(rest(), name="new", group="ingest")
        since = now() - 5

        def spares(task: ManagedTask[Any]) -> bool:
            return task.created_at > since

        assert cancel_named(manager, "new", GIVEN, spares) == []
        assert cancel_grouped(manager, "ingest", GIVEN, spares) == [old]
        await settle()

        assert (old.status, new.cause) == (TaskStatus.CANCELLED, None)
        assert cancel_named(manager, "new", GIVEN) == [new]


async def test_a_block_is_closed_as_by_cancel_group() -> None:
    """A scoped group is found by name, takes no more tasks, and its body is cancelled."""
    manager = TaskManager()
    group = manager.group("pages")
    body_ended: list[bool] = []

    async def host() -> None:
        async with group:
            group.create_task(rest())
            try:
                await rest()
            finally:
                body_ended.append(True)

    running = asyncio.create_task(host())
    await settle()
    tasks = cancel_grouped(manager, "pages", GIVEN)
    assert await wait_for_reached(tasks, 1.0) == Reached(1, 1, ())
    await asyncio.wait([running])
    assert body_ended == [True]
    with pytest.raises(GroupClosedError):
        group.create_task(give(1))


async def test_the_caller_and_what_awaits_it_are_spared() -> None:
    """A task that cancels its own group goes on, and is not waited for."""
    manager = TaskManager()

    async def ask() -> Reached:
        tasks = cancel_grouped(manager, "jobs", GIVEN)
        return await wait_for_reached(tasks, 1.0, asyncio.current_task())

    other = manager.create_task(rest(), group="jobs")
    assert await manager.create_task(ask(), group="jobs") == Reached(1, 1, ())
    assert other.cancelled()


async def test_a_task_may_ask_for_its_own_end() -> None:
    """It is cancelled at its next await, which is the wait for the others; it does not wait for itself."""
    manager = TaskManager()

    async def ask() -> None:
        await wait_for_reached(cancel_named(manager, "me", GIVEN), 60.0, asyncio.current_task())
        await asyncio.sleep(0)

    began = now()
    task = manager.create_task(ask(), name="me")
    await asyncio.wait([task])
    assert task.cancelled()
    assert now() == began


async def test_tasks_that_do_not_end_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """What ignores its cancellation is not counted as ended; what still runs is named, and logged."""
    manager = TaskManager()
    slow = manager.create_task(ignore_cancels(3.0), name="slow", group="jobs")
    manager.create_task(ignore_cancels(1.0), group="jobs")
    manager.create_task(rest(), group="jobs")
    await settle()

    assert await wait_for_reached(cancel_grouped(manager, "jobs", GIVEN), 2.0) == Reached(3, 1, ("slow",))

    assert "cancelled and still running after 2.0 s: 'slow'" in caplog.messages
    await slow


def test_without_a_loop_only_the_names_decide() -> None:
    """Between two loops, a manager has no tasks to cancel."""
    assert cancel_grouped(TaskManager(), "root", GIVEN) == []


# -- lists ------------------------------------------------------------------------------------------


async def test_tasks_are_listed_by_name_group_and_status() -> None:
    """Live tasks come first, then remembered ones, newest first; what is past the limit is counted."""
    manager = TaskManager()
    async with manager:
        for number in range(3):
            await manager.create_task(give(number), name=f"old-{number}", group="tenant.acme")
        manager.create_task(rest(), name="import-1", group="tenant.acme.mail")
        await asyncio.sleep(1)
        manager.create_task(rest(), name="import-2", group="tenant.bolt")
        await settle()

        def listed(
            name: str | None = None, group: str | None = None, status: str | None = None, limit: int = 10
        ) -> tuple[list[str], int]:
            found = at_once(find_tasks(manager, name, group, status, limit))
            return [info.name for info in found.infos], found.more

        assert listed() == (["import-1", "import-2", "old-2", "old-1", "old-0"], 0)
        assert listed("import-*") == (["import-1", "import-2"], 0)
        assert listed(group="tenant.acme") == (["import-1", "old-2", "old-1", "old-0"], 0)
        assert listed(group="root", status="completed") == (["old-2", "old-1", "old-0"], 0)
        assert listed(limit=1) == (["import-1"], 4)
        assert listed(limit=3) == (["import-1", "import-2", "old-2"], 2)
        assert listed(group="unknown") == ([], 0)
        await manager.cancel_all_tasks()


def listing(manager: TaskManager, **filters: Any) -> Generator[None, None, Found]:
    """A list of tasks whose first slice is over."""
    options: dict[str, Any] = {"pattern": None, "group": None, "status": None, "limit": 1000} | filters
    slices = find_tasks(manager, **options)
    next(slices)
    return slices


async def test_a_list_is_made_in_slices() -> None:
    """Each compares so many names, or makes so many snapshots."""
    async with TaskManager() as manager:
        for number in range(1000):
            manager.create_task(rest(), name=f"import-{number}")
        slices = listing(manager, limit=100)
        count = 0
        while True:
            try:
                next(slices)
            except StopIteration as end:
                found = end.value
                break
            count += 1
        assert (len(found.infos), found.more) == (100, 900)
        assert [info.name for info in found.infos] == [f"import-{number}" for number in range(100)]
        assert count >= 1000 / NAMES_PER_SLICE + 1000 / TASKS_PER_SLICE + 100 / COUNTS_PER_SLICE
        await manager.cancel_all_tasks()


async def test_what_changes_between_two_slices_is_listed_once() -> None:
    """A task that ends is in the list as it is then, one that starts is not."""
    async with TaskManager() as manager:
        await manager.create_task(give(0), name="old")
        manager.create_task(rest(), name="staying")
        ending = manager.create_task(rest(), name="ending", group="jobs")
        await settle()
        everything, running = listing(manager), listing(manager, status="running")
        ending.cancel()
        manager.create_task(rest(), name="late")
        await settle()
        found = at_once(everything)
        assert [(info.name, str(info.status)) for info in found.infos] == [
            ("staying", "running"),
            ("ending", "cancelled"),
            ("old", "completed"),
        ]
        assert [info.name for info in at_once(running).infos] == ["staying"]
        await manager.cancel_all_tasks()


async def test_task_that_ends_after_it_has_matched_does_not_match() -> None:
    """Its snapshot has another status than the wanted one."""
    async with TaskManager() as manager:
        task = manager.create_task(rest(), name="import")
        await settle()
        slices = listing(manager, status="running")
        next(slices)
        task.cancel()
        await settle()
        assert at_once(slices) == Found([], 0)


# -- ids --------------------------------------------------------------------------------------------


def test_a_span_of_another_process_is_made_of_its_ids() -> None:
    """Both ids in hex make a remote span context; anything else makes none."""
    span = span_from_hex("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert span is not None
    assert (span.trace_id, span.span_id) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
    assert span.is_remote
    assert span_from_hex(None, "b7ad6b7169203331") is None
    assert span_from_hex("zz", "b7ad6b7169203331") is None
    assert span_from_hex("0" * 32, "b7ad6b7169203331") is None
    assert span_from_hex("f" * 33, "b7ad6b7169203331") is None
