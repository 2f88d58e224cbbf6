"""TaskManager: starting, looking, waiting, cancelling, shutting down; each await cancelled in turn."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import inspect
import pydoc
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelCause,
    CancelKind,
    GroupClosedError,
    ManagedTask,
    ShutdownReport,
    TaskExistsError,
    TaskGroup,
    TaskManager,
    TaskNotFoundError,
    TaskPriority,
    TaskStatus,
    WrongLoopError,
    create_task,
    create_task_threadsafe,
    managed_task,
    run_in_thread,
    start_task,
    wait_for_task,
)
from otel_tasks._core.request_group import RequestGroup
from otel_tasks.testing import VirtualClockLoop, run
from tests.helpers import cancel_at_each_await, fail, give, ignore_cancels, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from otel_tasks.testing import SpanRecorder


# -- start_task ------------------------------------------------------------------------------------


async def test_start_task_returns_before_the_task_has_ended() -> None:
    """start_task() gives the live task; it takes a factory, a coroutine function or a coroutine."""
    manager = TaskManager()
    task = await manager.start_task("a", lambda: asyncio.sleep(1, "factory"))
    assert not task.done()

    async def function() -> str:
        return "function"

    assert await task == "factory"
    assert await (await manager.start_task("b", function)) == "function"
    assert await (await manager.start_task("c", give("coroutine"))) == "coroutine"


async def test_start_task_takes_all_that_create_task_takes() -> None:
    """Group, priority, timeout and metadata are the task's."""
    manager = TaskManager()
    task = await manager.start_task(
        "a", rest, group="g", priority=TaskPriority.LOW, timeout=2, metadata={"user": 7}
    )
    assert (task.group.name, task.priority, task.metadata) == ("g", TaskPriority.LOW, {"user": 7})
    with pytest.raises(TimeoutError):
        await task


async def test_start_task_with_a_taken_name_is_refused() -> None:
    """on_conflict defaults to "error"; the factory is not called, and a coroutine is closed."""
    manager = TaskManager()
    await manager.start_task("a", rest)
    with pytest.raises(TaskExistsError, match=r"^cannot create task 'a': a task with that name is pending"):
        await manager.start_task("a", lambda: pytest.fail("called"))
    with pytest.raises(TaskExistsError):
        await manager.start_task("a", rest())
    await manager.shutdown(0)
    gc.collect()


async def test_start_task_suffix_and_return() -> None:
    """The other forms of on_conflict are create_task's; "return" calls no factory."""
    manager = TaskManager()
    first = await manager.start_task("a", rest)
    assert (await manager.start_task("a", rest, on_conflict="suffix")).name == "a-2"
    assert await manager.start_task("a", lambda: pytest.fail("called"), on_conflict="return") is first
    assert await manager.start_task("a", rest(), on_conflict="return") is first
    third = await manager.start_task("b", lambda: give(3), on_conflict="return")
    assert await third == 3
    await manager.shutdown(0)
    gc.collect()


async def test_start_task_in_a_closed_group_is_refused() -> None:
    """A scoped group that is over refuses before the factory is called."""
    manager = TaskManager()
    async with manager.group("load") as group:
        assert await (await manager.start_task("a", lambda: give(1), group=group)) == 1
    with pytest.raises(GroupClosedError, match=rf"^cannot create task 'a': group '{group.id}' is finished; "):
        await manager.start_task("a", lambda: pytest.fail("called"), group=group)


@pytest.mark.parametrize("options", [{"on_conflict": "replace"}, {"cancel_existing": True}])
async def test_start_task_replaces_after_the_old_ones_end(options: dict[str, Any]) -> None:
    """Replacing returns once the old task has ended; the new one is not marked cancelled."""
    manager = TaskManager()
    start = now()
    old = await manager.start_task("a", lambda: ignore_cancels(5))
    await settle()
    new = await manager.start_task("a", lambda: give(2), **options)
    assert now() - start == 5
    assert old.done()
    assert kind_of(old) is CancelKind.REPLACED
    assert await new == 2
    assert new.cause is None
    assert await manager.wait_for_task("a") == 2


async def test_concurrent_replacing_leaves_one_live() -> None:
    """If several replace at once, each replaces the one before: never two are live, and one is left."""
    manager = TaskManager()
    live: set[int] = set()
    most: list[int] = []

    async def work(number: int) -> None:
        live.add(number)
        most.append(len(live))
        try:
            await rest()
        finally:
            await asyncio.sleep(1)
            live.discard(number)

    async def start(number: int) -> ManagedTask[None]:
        return await manager.start_task("a", lambda: work(number), cancel_existing=True)

    await start(0)
    await settle()
    tasks = await asyncio.gather(*(start(number) for number in range(1, 5)))
    await settle()
    assert sum(not task.done() for task in tasks) == 1
    assert set(most) == {1}
    await manager.shutdown(0)


async def test_start_task_replaces_one_that_is_just_done() -> None:
    """A task that is done, with its callbacks still to run, does not block the start."""
    manager = TaskManager()
    manager.create_task(give(1), name="a")
    await asyncio.sleep(0)
    assert await (await manager.start_task("a", lambda: give(2), cancel_existing=True)) == 2


async def test_start_task_replaces_a_replacement_that_still_waits() -> None:
    """Replacing a task that waits for its predecessor waits for that as well."""
    manager = TaskManager()
    first = manager.create_task(ignore_cancels(50), name="a")
    await settle()
    manager.create_task(rest(), name="a", on_conflict="replace")
    await settle()
    task = await manager.start_task("a", lambda: give(3), cancel_existing=True)
    assert first.done()
    assert await task == 3


async def test_factory_that_raises_starts_nothing() -> None:
    """The factory's exception is raised to the caller."""
    manager = TaskManager()

    def broken() -> Coroutine[Any, Any, None]:
        raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        await manager.start_task("a", broken)
    assert manager.stats().created == 0


# -- looking ---------------------------------------------------------------------------------------


async def test_get_task_gives_live_tasks_only() -> None:
    """get_task() raises TaskNotFoundError, a KeyError, once a task has ended."""
    manager = TaskManager()
    task = manager.create_task(give(1), name="a")
    assert manager.get_task("a") is task
    await task
    with pytest.raises(
        TaskNotFoundError,
        match=r"^task 'a' has ended \(completed\): get_task_info\(\) has its record, "
        r"and wait_for_task\(\) the result of a start_task\(\)$",
    ):
        manager.get_task("a")
    with pytest.raises(
        TaskNotFoundError,
        match=r"^task 'a' has ended \(completed\): only start_task\(\) keeps results; "
        r"of other tasks, keep what create_task\(\) returned$",
    ):
        await manager.wait_for_task("a")
    with pytest.raises(
        KeyError,
        match=r"^no task is called 'b': .* has been forgotten; get_all_task_info\(\) lists the",
    ):
        manager.get_task("b")


async def test_task_of_a_scoped_group_is_found_by_its_id() -> None:
    """The id has slashes where names have them, too; what looks like one and is not finds nothing."""
    manager = TaskManager()
    async with manager.group("GET /orders") as group:
        task = group.create_task(rest(), name="a/b")
        assert manager.get_task(task.id) is task
        assert task.id == f"{group.id}/a/b"
        for stranger in (f"{group.id}/a", "x#y/a/b", "x#99/a/b", "a/b"):
            assert manager.get_task_info(stranger) is None
        group.cancel()
    info = manager.get_task_info(task.id)
    assert info is not None
    assert info.status is TaskStatus.CANCELLED


async def test_all_task_info_is_live_then_remembered() -> None:
    """All tasks by id: the live ones first, then the newest of the ended ones."""
    manager = TaskManager()
    await manager.create_task(give(1), name="old")
    await manager.create_task(give(1), name="again")
    manager.create_task(rest(), name="live")
    manager.create_task(rest(), name="again")
    infos = manager.get_all_task_info()
    assert list(infos)[:2] == ["live", "again"]
    assert infos["again"].status is TaskStatus.PENDING
    assert infos["old"].status is TaskStatus.COMPLETED
    await manager.shutdown(0)


async def test_group_tasks_are_those_below() -> None:
    """get_group_tasks() takes a name, an id or the group, and finds live and remembered ones below it."""
    manager = TaskManager()
    await manager.create_task(give(1), name="ended", group="a.b")
    manager.create_task(rest(), name="live", group="a")
    manager.create_task(rest(), name="other", group="ab")
    assert list(manager.get_group_tasks("a")) == ["live", "ended"]
    assert list(manager.get_group_tasks(manager.get_group("a"))) == ["live", "ended"]
    assert list(manager.get_group_tasks("root")) == ["live", "other", "ended"]
    assert manager.get_group_tasks("nobody") == {}
    async with manager.group("load") as group:
        group.create_task(give(1), name="x")
        assert list(manager.get_group_tasks("load")) == [f"{group.id}/x"]
    assert list(manager.get_group_tasks(group)) == list(manager.get_group_tasks(group.id))
    assert list(manager.get_group_tasks(group.id)) == [f"{group.id}/x"]
    await manager.shutdown(0)


async def test_manager_is_closed_while_it_refuses_new_tasks() -> None:
    """closed is True from the call of shutdown() on, until the manager is opened again."""
    manager = TaskManager()
    assert not manager.closed
    seen = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(manager.closed)

    manager.create_task(work())
    await settle()
    await manager.shutdown(0)
    assert seen == [True]
    assert manager.closed
    async with manager:
        assert not manager.closed
    assert manager.closed


def test_manager_is_closed_in_the_loop_of_its_shutdown_only() -> None:
    """Another loop finds it open, even before its first task; outside of loops the last shutdown counts."""
    manager = TaskManager()

    async def end() -> bool:
        before = manager.closed
        await manager.create_task(give(1))
        await manager.shutdown(0)
        assert manager.closed
        return before

    assert [run(end()), manager.closed] == [False, True]

    async def look() -> bool:
        return manager.closed

    assert not run(look())
    assert not run(end())


async def test_manager_says_its_name_and_state() -> None:
    """The repr has name, state and number of live tasks."""
    manager = TaskManager("mine")
    manager.create_task(rest())
    assert manager.name == "mine"
    assert repr(manager) == "<TaskManager 'mine' open, 1 live tasks>"
    await manager.shutdown(0)
    assert repr(manager) == "<TaskManager 'mine' shut down, 0 live tasks>"


# -- waiting ---------------------------------------------------------------------------------------


async def test_wait_for_a_live_task() -> None:
    """wait_for_task() gives the result of a live task, however it was started."""
    manager = TaskManager()
    manager.create_task(asyncio.sleep(1, "created"), name="a")
    await manager.start_task("b", lambda: asyncio.sleep(1, "started"))
    assert await manager.wait_for_task("a") == "created"
    assert await manager.wait_for_task("b", timeout=float("inf")) == "started"


async def test_wait_for_a_finished_task() -> None:
    """The result of a task started by name is there as long as it is remembered."""
    manager = TaskManager()
    await manager.start_task("a", lambda: give([1, 2]))
    await asyncio.sleep(5)
    assert await manager.wait_for_task("a") == [1, 2]
    assert await manager.wait_for_task("a") == [1, 2]
    manager.cleanup_completed_tasks()
    with pytest.raises(TaskNotFoundError, match="no task is called 'a'"):
        await manager.wait_for_task("a")


async def test_wait_for_a_finished_task_whose_result_was_not_kept() -> None:
    """Results of create_task() are not kept; the error says so."""
    manager = TaskManager()
    await manager.create_task(give(1), name="a")
    with pytest.raises(TaskNotFoundError, match=r"^task 'a' has ended \(completed\): only start_task\(\)"):
        await manager.wait_for_task("a")


async def test_result_of_a_former_task_is_not_given_for_a_later_one() -> None:
    """A later task of the same name hides the kept result of the former."""
    manager = TaskManager()
    await (await manager.start_task("a", lambda: give(1)))
    await manager.create_task(give(2), name="a")
    with pytest.raises(TaskNotFoundError):
        await manager.wait_for_task("a")


async def test_wait_for_a_task_that_fails() -> None:
    """wait_for_task() raises what the task raised, live or ended, a fresh copy each time."""
    manager = TaskManager()
    await manager.start_task("a", lambda: fail(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        await manager.wait_for_task("a")
    with pytest.raises(ValueError, match="no") as first:
        await manager.wait_for_task("a")
    with pytest.raises(ValueError, match="no") as second:
        await manager.wait_for_task("a")
    assert first.value is not second.value
    frames = [frame.name for frame in traceback.extract_tb(second.value.__traceback__)]
    assert "fail" not in frames


# -- signatures ------------------------------------------------------------------------------------

CREATING = [
    *(create_task, create_task_threadsafe, run_in_thread, start_task, TaskManager.start_task),
    *(TaskGroup.create_task, TaskGroup.create_task_threadsafe, TaskGroup.put_task, TaskGroup.run_in_thread),
    *(TaskManager.create_task, TaskManager.create_task_threadsafe, TaskManager.put_task),
    TaskManager.run_in_thread,
]


@pytest.mark.parametrize("function", CREATING, ids=lambda function: function.__qualname__)
def test_signature_shows_every_option(function: Callable[..., object]) -> None:
    """help() and inspect show each option as a keyword of its own, with its default."""
    parameters = inspect.signature(function).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    by_name = "start" in function.__qualname__
    defaults = {
        "name": inspect.Parameter.empty if by_name else None,
        "priority": TaskPriority.NORMAL,
        "timeout": None,
        "queue_timeout": None,
        "metadata": None,
        "on_conflict": "error" if by_name else "suffix",
        "trace": None,
        "context": None,
        "eager_start": None,
    }
    assert {name: parameters[name].default for name in defaults} == defaults
    text = pydoc.plain(pydoc.render_doc(function))
    assert all(f"{name}: " in text for name in defaults)


async def test_default_of_every_option_may_be_passed() -> None:
    """Passing the default in the signature has the effect of leaving the option out."""
    manager = TaskManager()
    for function in (manager.create_task, manager.get_group("g").create_task, create_task):
        parameters = inspect.signature(function).parameters.values()
        shown = {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}
        task = function(give(1), **shown)
        assert (task.get_name()[:4], task.priority) == ("give", TaskPriority.NORMAL)
        assert await task == 1


async def test_priority_may_be_a_number() -> None:
    """The number of a priority is taken wherever a priority is, and a task has the priority itself."""
    manager = TaskManager()
    tasks: list[ManagedTask[Any]] = [
        manager.create_task(give(1), priority=2),
        manager.get_group("g").create_task(give(1), priority=2),
        await manager.start_task("a", give(1), priority=2),
        await manager.start_service("s", rest, priority=2),
        managed_task(priority=2, manager=manager)(rest).start(),
    ]
    for task in tasks:
        assert task.priority is TaskPriority(2)
    await manager.shutdown(0)


# -- lookup in a group -----------------------------------------------------------------------------


async def test_lookup_in_a_group_finds_its_own_tasks() -> None:
    """In a label, a scoped group, and the root, a task is found by its name and by its id, live and ended."""
    manager = TaskManager()
    async with manager.group("block") as block:
        for group in (block, manager.get_group("a.b"), manager.get_group("root")):
            task = await manager.start_task("work", asyncio.Event().wait, group=group, on_conflict="replace")
            for where in (group, group.id):
                for name in ids(task):
                    assert manager.get_task(name, group=where) is task
                    assert manager.get_task_info(name, group=where) == task.info()
            assert await manager.cancel_task("work", group=group)
            for name in ids(task):
                assert manager.get_task_info(name, group=group.id) == task.info()
                with pytest.raises(asyncio.CancelledError):
                    manager.get_result(name, group=group)


async def test_lookup_in_a_group_finds_no_task_of_another_group() -> None:
    """Neither the name nor the id of a task outside of the group is found, and nothing is cancelled."""
    manager = TaskManager()
    async with manager.group("block") as block, manager.group("block") as twin:
        groups = (block, twin, *map(manager.get_group, ("a", "a.b", "root")))
        tasks = [
            await manager.start_task(f"work {number}", asyncio.Event().wait, group=group)
            for number, group in enumerate(groups)
        ]
        foreign = [
            (name, group)
            for task in tasks
            for group in groups
            if group is not task.group
            for name in ids(task)
        ]
        for name, group in foreign:
            assert not await manager.cancel_task(name, group=group)
        assert not any(task.cancelling() for task in tasks)
        await manager.cancel_all_tasks()
        for name, group in foreign:
            await assert_unknown(manager, name, group)


def ids(task: ManagedTask[Any]) -> set[str]:
    """All by which a task may be looked up."""
    return {task.name, task.id, task.uid}


async def assert_unknown(manager: TaskManager, name: str, group: TaskGroup) -> None:
    """No lookup in this group knows the name, and the error does not say whether another group has it."""
    for where in (group, group.id):
        assert manager.get_task_info(name, group=where) is None
        assert manager.get_result(name, default=7, group=where) == 7
        with pytest.raises(TaskNotFoundError, match=r"group= does not search other groups$"):
            manager.get_task(name, group=where)
        with pytest.raises(TaskNotFoundError, match=r"^no task of group .* it was never started there"):
            await manager.wait_for_task(name, group=where)


async def test_uid_finds_its_task_live_and_ended() -> None:
    """Every lookup takes the uid of a task in whatever group, and knows its record by it."""
    manager = TaskManager()
    async with manager.group("block") as block:
        tasks = [await manager.start_task("work", rest, group=group) for group in (None, block)]
        for task in tasks:
            assert manager.get_task(task.uid) is task
            assert manager.get_task_info(task.uid) == task.info()
            assert task.info().uid == task.info().to_dict()["uid"] == task.uid
            assert await manager.cancel_task(task.uid)
            assert manager.get_task_info(task.uid) == task.info()
            assert manager.get_result(task.uid, default=7) == 7
            with pytest.raises(TaskNotFoundError, match="has ended"):
                manager.get_task(task.uid)
            with pytest.raises(asyncio.CancelledError):
                await manager.wait_for_task(task.uid)


async def test_uid_is_never_used_again() -> None:
    """A later task of the same name has another uid, and that of the first one still means the first one."""
    manager = TaskManager()
    first = await manager.start_task("work", give(1))
    uid = first.uid
    await first
    second = await manager.start_task("work", give(2))
    assert second.uid != uid == first.uid
    assert (await manager.wait_for_task(uid), await manager.wait_for_task(second.uid)) == (1, 2)
    assert manager.get_result(uid) == 1
    manager.cleanup_completed_tasks()
    assert manager.get_task_info(uid) is None


@pytest.mark.parametrize("how", ["named", "numbered", "started"])
async def test_uid_read_after_the_end_finds_the_record(how: str) -> None:
    """A task may have ended before its uid could be read, as an eager one has."""
    manager = TaskManager()
    for _ in range(2):
        task = (
            await manager.start_task("work", give(1))
            if how == "started"
            else manager.create_task(give(1), name="work" if how == "named" else None)
        )
        await task
        await settle()
        assert task.info().uid is None
        await asyncio.sleep(1)
    assert manager.get_task_info(task.uid) == task.info()
    assert [info.uid for info in manager._ledger.history] == [None, task.uid]


async def test_uid_read_in_a_thread_finds_the_record() -> None:
    """A thread may ask for the uid of a task that is ending."""
    manager = TaskManager()
    task = manager.create_task(give(1))
    uid = await asyncio.to_thread(lambda: task.uid)
    await settle()
    assert manager.get_task_info(uid) == task.info()
    late = manager.create_task(give(1))
    await settle()
    uid = await asyncio.to_thread(lambda: late.uid)
    await settle()
    assert manager.get_task_info(uid) == late.info()


async def test_uid_is_made_on_first_use() -> None:
    """A snapshot makes no uid, and a task whose uid is never read gets nothing for it."""
    manager = TaskManager()
    task = manager.create_task(give(1))
    assert task.info().uid is None
    assert task._extras is None
    assert not manager._ledger.uids
    await task


async def test_uid_keeps_no_task_that_has_ended() -> None:
    """A task is freed as any other once it has ended, and its record still answers to the uid."""
    manager = TaskManager()
    task = manager.create_task(give(1))
    uid = task.uid
    await task
    await settle()
    freed = weakref.ref(task)
    del task
    gc.collect()
    assert freed() is None
    assert not manager._ledger.uids
    assert manager.get_task_info(uid) is not None


async def test_name_cannot_take_the_place_of_a_uid() -> None:
    """A uid leads to its own task, even where another task is called just that."""
    manager = TaskManager()
    task = manager.create_task(rest())
    manager.create_task(rest(), name=task.uid)
    assert manager.get_task(task.uid) is task
    await manager.shutdown(0)


async def test_lookup_in_a_group_that_is_not_known_finds_nothing() -> None:
    """An unused label, and the id of a finished block, are no error and create no group."""
    manager = TaskManager()
    async with manager.group("block") as block:
        await manager.start_task("work", give(1), group=block)
    manager.create_task(rest(), name="work")
    assert manager.get_task_info("work", group="nobody") is None
    assert await manager.wait_for_task("work", group=block.id) == 1
    assert manager.get_result("work", group=block) == 1
    with pytest.raises(TaskNotFoundError, match="task 'work' has ended"):
        manager.get_task("work", group=block)
    await manager.shutdown(0)


async def test_lookup_in_a_group_whose_name_changes() -> None:
    """A request's group is renamed once its route is known; the ids that it had still lead to its tasks."""
    manager = TaskManager()
    route = ["GET"]
    group = RequestGroup.open(manager, lambda: route[0], binding=None, host=None)
    first = group.id
    await manager.start_task("early", give(1), group=group)
    await settle()
    route[0] = "GET /orders"
    late = await manager.start_task("late", rest, group=group)
    for where in (group, first, group.id):
        assert manager.get_result("early", group=where) == 1
        assert manager.get_task("late", group=where) is late
    await manager.cancel_group(group)


async def test_tasks_that_end_with_their_request_look_up_its_route_once() -> None:
    """A client that leaves ends all tasks of its request: their records share one look at its route."""
    manager = TaskManager()
    looks: list[str] = []

    def route() -> str:
        looks.append("GET /orders")
        return looks[-1]

    group = RequestGroup.open(manager, route, binding=None, host=None)
    for _ in range(3):
        group.create_task(rest())
    await settle()
    group.cancel_tasks(CancelCause.make(CancelKind.CLIENT_DISCONNECT))
    group.signal_cancel(CancelCause.make(CancelKind.CLIENT_DISCONNECT))
    looks.clear()
    await settle()
    assert looks == ["GET /orders"]
    assert {info.group for info in manager.get_all_task_info().values()} == {"GET /orders"}


async def test_module_function_waits_in_a_group() -> None:
    """wait_for_task() of the package takes group=; a group object brings its manager."""
    manager = TaskManager()
    group = manager.get_group("g")
    await manager.start_task("a", give(1), group=group)
    assert await wait_for_task("a", group=group) == 1
    with pytest.raises(TaskNotFoundError, match="no task of group 'g' is called 'a'"):
        await wait_for_task("a", group="g")


async def test_lookup_refuses_anything_but_groups_of_the_manager() -> None:
    """A group of another manager, or any other object, is an error."""
    manager = TaskManager()
    with pytest.raises(ValueError, match="belongs to manager 'other'"):
        manager.get_task("a", group=TaskManager("other").get_group("g"))
    with pytest.raises(TypeError, match="group must be a name or a TaskGroup, got 7"):
        manager.get_task_info("a", group=7)  # type: ignore[arg-type]  # that is the test


async def test_id_with_a_very_long_number_is_not_found() -> None:
    """An id from a client may be anything: int() would refuse thousands of digits."""
    manager = TaskManager()
    assert manager.get_task_info(f"block#{'9' * 5000}/work") is None
    assert manager.get_task_info("work", group=f"block#{'9' * 5000}") is None


async def test_get_result_gives_a_kept_result_again_and_again() -> None:
    """get_result() finds what a completed start_task() returned, None included."""
    manager = TaskManager()
    for name, value in (("a", [1, 2]), ("b", None)):
        await manager.start_task(name, give(value))
    await settle()
    assert manager.get_result("a") == [1, 2]
    assert manager.get_result("a", default=0) == [1, 2]
    assert manager.get_result("b", default=0) is None


async def test_get_result_finds_a_task_that_ended_in_this_very_turn() -> None:
    """A result is there as soon as the task is done, before its done-callbacks were called."""
    manager = TaskManager()
    task = await manager.start_task("a", give(1))

    async def look() -> tuple[object, ...]:
        return task.done(), manager.get_task("a"), manager.get_result("a"), manager.get_result("a", default=0)

    assert await asyncio.create_task(look()) == (True, task, 1, 1)


async def test_get_result_does_not_wait() -> None:
    """A live task has no result yet: InvalidStateError, as a future's result() raises, or the default."""
    manager = TaskManager()
    await manager.start_task("a", rest)
    with pytest.raises(asyncio.InvalidStateError, match="task 'a' is pending and has no result yet"):
        manager.get_result("a")
    assert manager.get_result("a", default=None) is None
    await manager.shutdown(0)


async def test_get_result_of_a_cancelled_task_is_the_default() -> None:
    """Without a default get_result() raises CancelledError, just as a future's result() does."""
    manager = TaskManager()
    task = await manager.start_task("a", rest)
    task.cancel()
    await asyncio.wait([task])
    for _ in range(2):
        assert manager.get_result("a", default=1) == 1
        with pytest.raises(asyncio.CancelledError):
            manager.get_result("a")
        await settle()


async def test_get_result_raises_the_error_of_the_task() -> None:
    """A failure is no missing result: it is raised with a default too, whatever its class."""
    manager = TaskManager(on_error=lambda info, error: None)
    for name, error in (("a", ValueError("no")), ("b", TaskNotFoundError("its own"))):
        await manager.start_task(name, fail(error))
        await settle()
        with pytest.raises(type(error), match=str(error)):
            manager.get_result(name, default=1)


async def test_get_result_without_a_kept_result_is_the_default() -> None:
    """Neither an unknown name nor a task of create_task() has a result to look up."""
    manager = TaskManager()
    await manager.create_task(give(1), name="a")
    await settle()
    for name in ("a", "b"):
        assert manager.get_result(name, default=2) == 2
        with pytest.raises(TaskNotFoundError):
            manager.get_result(name)


async def test_wait_for_a_task_that_is_cancelled() -> None:
    """wait_for_task() raises CancelledError for a cancelled task, live or ended."""
    manager = TaskManager()
    task = await manager.start_task("a", rest)
    asyncio.get_running_loop().call_later(1, task.cancel)
    with pytest.raises(asyncio.CancelledError):
        await manager.wait_for_task("a")
    with pytest.raises(asyncio.CancelledError, match="task 'a' was cancelled"):
        await manager.wait_for_task("a")
    me = asyncio.current_task()
    assert me is not None
    assert me.cancelling() == 0


@pytest.mark.parametrize("timeout", [0, 2.5])
async def test_waiters_timeout_leaves_the_task_alone(timeout: float) -> None:
    """A waiter's timeout raises TimeoutError; the task continues."""
    manager = TaskManager()
    task = manager.create_task(asyncio.sleep(5, "done"), name="a")
    await settle()
    start = now()
    with pytest.raises(TimeoutError, match=rf"^task 'a' is still running after {timeout:g} s, and continues"):
        await manager.wait_for_task("a", timeout=timeout)
    assert now() - start == timeout
    assert task.cancelling() == 0
    assert await task == "done"


async def test_waiters_cancellation_leaves_the_task_alone() -> None:
    """A cancelled waiter is cancelled, and the task continues."""
    manager = TaskManager()
    task = manager.create_task(asyncio.sleep(5, "done"), name="a")
    waiter = asyncio.create_task(manager.wait_for_task("a"))
    await settle()
    waiter.cancel()
    await asyncio.wait([waiter])
    assert waiter.cancelled()
    assert await task == "done"


async def test_task_cannot_wait_for_itself() -> None:
    """A task that would wait for itself gets an error."""
    manager = TaskManager()
    task = manager.create_task(manager.wait_for_task("a"), name="a")
    with pytest.raises(
        RuntimeError, match=r"^task 'a' cannot wait for itself: it would wait forever; wait in"
    ):
        await task


async def test_join_of_an_unknown_group_returns() -> None:
    """An unused group has nothing to wait for."""
    manager = TaskManager()
    manager.create_task(asyncio.sleep(3), group="a")
    start = now()
    await manager.join("b")
    assert now() == start
    await manager.join("a")
    assert now() == start + 3


# -- cancelling ------------------------------------------------------------------------------------


async def test_cancel_task_waits_for_the_end() -> None:
    """cancel_task() is true once the task has ended by it."""
    manager = TaskManager()
    task = manager.create_task(rest(), name="a")
    await settle()
    assert await manager.cancel_task("a", "enough") is True
    assert task.cancelled()
    assert task.cause is not None
    assert task.cause.message == "enough"


async def test_cancel_task_that_is_not_there_is_false() -> None:
    """Unknown, ended or just done: there is nothing to cancel."""
    manager = TaskManager()
    assert await manager.cancel_task("a") is False
    manager.create_task(give(1), name="a")
    await asyncio.sleep(0)
    assert await manager.cancel_task("a") is False


async def test_cancel_task_that_completes_anyway_is_false() -> None:
    """A task that ignored its cancellation did not end by it."""
    manager = TaskManager()
    manager.create_task(ignore_cancels(3), name="a")
    await settle()
    assert await manager.cancel_task("a") is False


async def test_cancel_task_gives_up_after_its_timeout(caplog: pytest.LogCaptureFixture) -> None:
    """Past its timeout cancel_task() returns false, and logs what still runs."""
    manager = TaskManager()
    manager.create_task(ignore_cancels(30), name="a")
    await settle()
    start = now()
    assert await manager.cancel_task("a", timeout=2) is False
    assert now() - start == 2
    assert caplog.messages == ["cancelled and still running after 2.0 s: 'a'"]
    assert manager.get_task("a").status is TaskStatus.CANCELLING
    await manager.join()


async def test_task_may_cancel_itself_by_name(caplog: pytest.LogCaptureFixture) -> None:
    """A task that cancels itself by name is not waited for, and ends at its next await."""
    manager = TaskManager()
    seen: list[bool] = []

    async def work() -> None:
        seen.append(await manager.cancel_task("a", "I quit"))
        await rest()

    task = manager.create_task(work(), name="a")
    await asyncio.wait([task])
    assert seen == [False]
    assert task.status is TaskStatus.CANCELLED
    assert not caplog.messages


async def test_cancel_group_counts_the_tasks_that_it_ended() -> None:
    """The count leaves out tasks that ignored it, had ended before, or keep running."""
    manager = TaskManager()
    manager.create_task(rest(), group="g")
    manager.create_task(rest(), group="g.sub")
    manager.create_task(ignore_cancels(3), group="g")
    manager.create_task(ignore_cancels(30), group="g")
    manager.create_task(give(1), group="g")
    await asyncio.sleep(0)
    assert await manager.cancel_group("g", "enough", timeout=5) == 2
    assert manager.stats().live == 1
    await manager.join()


async def test_cancel_group_sets_the_event_and_waits_out_the_grace() -> None:
    """With grace, the event comes first; a task that acts on it is never cancelled, and counts."""
    manager = TaskManager()
    group = manager.get_group("g")

    async def cooperative() -> str:
        await group.cancel_event.wait()
        await asyncio.sleep(1)
        return "tidy"

    polite, deaf = group.create_task(cooperative()), group.create_task(rest())
    await settle()
    start = now()
    assert await manager.cancel_group("g", grace=3) == 2
    assert now() - start == 3
    assert polite.result() == "tidy"
    assert not polite.cancel_ignored
    assert deaf.cancelled()


async def test_grace_ends_early_when_all_have_stopped() -> None:
    """Nobody waits for a grace that is not needed."""
    manager = TaskManager()
    group = manager.get_group("g")

    async def cooperative() -> None:
        await group.cancel_event.wait()

    group.create_task(cooperative())
    await settle()
    start = now()
    assert await manager.cancel_group(group, grace=100) == 1
    assert now() == start


async def test_cancel_group_without_bound_waits() -> None:
    """timeout=None waits for the last one, however long."""
    manager = TaskManager()
    manager.create_task(ignore_cancels(300), group="g")
    await settle()
    start = now()
    assert await manager.cancel_group("g", timeout=None) == 0
    assert now() - start == 300


async def test_cancelled_caller_in_the_grace_still_cancels_the_group() -> None:
    """A caller that is cancelled during the grace leaves no half-cancelled group."""
    manager = TaskManager()
    task = manager.create_task(rest(), group="g")
    group = manager.get_group("g")
    caller = asyncio.create_task(manager.cancel_group("g", grace=10))
    await asyncio.sleep(1)
    caller.cancel()
    await asyncio.wait([caller, task])
    assert caller.cancelled()
    assert task.cancelled()
    assert not group.cancel_event.is_set()


async def test_cancel_group_spares_the_calling_task() -> None:
    """A task may cancel its own group and continue; the count leaves it out."""
    manager = TaskManager()
    sibling = manager.create_task(rest(), group="g")
    caller = manager.create_task(manager.cancel_group("g"), group="g")
    assert await caller == 1
    assert sibling.cancelled()


async def test_cancel_unknown_group_is_zero() -> None:
    """An unused group has nothing to cancel."""
    assert await TaskManager().cancel_group("nobody") == 0


async def test_cancel_all_tasks_leaves_the_manager_usable() -> None:
    """All tasks of all groups are cancelled; new ones can be created in the same groups."""
    manager = TaskManager()
    group = manager.get_group("g")
    event = group.cancel_event
    manager.create_task(rest())
    manager.create_task(rest(), group="g.sub")
    assert await manager.cancel_all_tasks("enough") == 2
    assert event.is_set()
    assert not group.cancel_event.is_set()
    assert await manager.create_task(give(1), group="g") == 1


async def test_two_cancellations_of_one_group_share_it() -> None:
    """A second cancellation during the first one's grace cancels no task twice."""
    manager = TaskManager()
    task = manager.create_task(ignore_cancels(3), group="g")
    await settle()
    first = asyncio.create_task(manager.cancel_group("g", "first", grace=1))
    await settle()
    assert await manager.cancel_group("g", "second") == 0
    assert await first == 0
    assert task.cancelling() == 1
    assert not manager.get_group("g").cancel_event.is_set()


# -- shutdown --------------------------------------------------------------------------------------


async def test_shutdown_lets_tasks_finish_in_the_grace() -> None:
    """Tasks that end within the grace are not cancelled; shutdown returns as soon as nothing is live."""
    manager = TaskManager()
    task = manager.create_task(asyncio.sleep(2, "done"))
    start = now()
    assert await manager.shutdown() == ShutdownReport(completed=1)
    assert now() - start == 2
    assert task.result() == "done"


async def test_shutdown_sets_the_events_first() -> None:
    """Tasks that wait for their cancel event wake immediately."""
    manager = TaskManager()
    heard: list[CancelCause | None] = []
    event = manager.get_group("a.b").cancel_event

    async def cooperative() -> None:
        await event.wait()
        heard.append(event.cause)

    manager.create_task(cooperative(), group="a.b")
    await settle()
    start = now()
    await manager.shutdown(grace=50)
    assert now() == start
    assert [cause and cause.kind for cause in heard] == [CancelKind.SHUTDOWN]


async def test_shutdown_cancels_by_rising_priority() -> None:
    """The low ones end before the critical ones are cancelled."""
    manager = TaskManager()
    order: list[str] = []

    async def work(priority: TaskPriority) -> None:
        try:
            await rest()
        finally:
            order.append(f"{priority.name} asked")
            await asyncio.sleep(0.5)
            order.append(f"{priority.name} ended")

    for priority in (TaskPriority.CRITICAL, TaskPriority.LOW, TaskPriority.HIGH):
        manager.create_task(work(priority), priority=priority)
    await settle()
    report = await manager.shutdown(grace=0)
    assert order == [f"{name} {what}" for name in ("LOW", "HIGH", "CRITICAL") for what in ("asked", "ended")]
    assert report == ShutdownReport(cancelled=3)


async def test_shutdown_reports_the_end_of_each_task() -> None:
    """The report counts the tasks that were live, and names those that ignored it."""
    manager = TaskManager(on_error=lambda info, error: None)

    async def break_on_cancel() -> None:
        try:
            await rest()
        finally:
            raise ValueError("clean-up")

    manager.create_task(give(0))
    await manager.join()
    manager.create_task(asyncio.sleep(1))
    manager.create_task(rest())
    manager.create_task(break_on_cancel())
    manager.create_task(ignore_cancels(3), name="deaf")
    await settle()
    report = await manager.shutdown(grace=2)
    assert report == ShutdownReport(completed=2, failed=1, cancelled=1, cancel_ignored=("deaf",))
    assert report.clean


async def test_stubborn_task_is_cancelled_twice_and_reported_with_its_stack(
    spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that does not stop is cancelled once more, then named with its line; its span ends."""
    manager = TaskManager(tracer_provider=spans.provider)
    task = manager.create_task(ignore_cancels(100), name="stubborn")
    await settle()
    start = now()
    report = await manager.shutdown(grace=1, timeout=4)
    assert now() - start == 5
    assert task.cancelling() == 2
    assert list(report.still_running) == ["stubborn"]
    assert "in ignore_cancels" in report.still_running["stubborn"]
    assert not report.clean
    assert caplog.messages[0].startswith("task 'stubborn' did not stop at shutdown; it is at\n")
    attributes = spans.span("stubborn").attributes
    assert attributes is not None
    assert attributes["otel_tasks.task.outcome"] == "abandoned"
    await task


async def test_every_level_has_its_share_of_the_time() -> None:
    """A stubborn low task does not use up the time of the critical ones."""
    manager = TaskManager()

    async def slow() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(2)

    manager.create_task(ignore_cancels(100), priority=TaskPriority.LOW)
    critical = manager.create_task(slow(), priority=TaskPriority.CRITICAL)
    await settle()
    start = now()
    report = await manager.shutdown(grace=0, timeout=9)
    assert now() - start == 9
    assert critical.cancelled()
    assert len(report.still_running) == 1
    await manager.join()


async def test_shutdown_without_bound_waits_for_the_last() -> None:
    """timeout=None waits however long it takes."""
    manager = TaskManager()
    manager.create_task(ignore_cancels(1000))
    await settle()
    assert (await manager.shutdown(grace=0, timeout=None)).completed == 1


async def test_second_shutdown_has_nothing_to_do() -> None:
    """shutdown() can be called again."""
    manager = TaskManager()
    manager.create_task(rest())
    assert await manager.shutdown(0) == ShutdownReport(cancelled=1)
    start = now()
    assert await manager.shutdown() == ShutdownReport()
    assert now() == start


async def test_concurrent_shutdowns_cancel_once() -> None:
    """Two shutdowns at the same time do not interrupt the cleanup."""
    manager = TaskManager()
    task = manager.create_task(ignore_cancels(1))
    await settle()
    reports = await asyncio.gather(manager.shutdown(0), manager.shutdown(0))
    assert task.cancelling() == 1
    assert [report.completed for report in reports] == [1, 1]


async def test_shutdown_from_inside_spares_the_caller() -> None:
    """A managed task may shut its manager down."""
    manager = TaskManager()
    other = manager.create_task(rest())
    task = manager.create_task(manager.shutdown(0))
    assert (await task).cancelled == 1
    assert other.cancelled()
    assert task.cause is None


async def test_cancelled_shutdown_leaves_the_manager_closed() -> None:
    """A caller that is cancelled while it shuts down stops waiting; a second call finishes."""
    manager = TaskManager()
    manager.create_task(rest())
    caller = asyncio.create_task(manager.shutdown(grace=10))
    await asyncio.sleep(1)
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert repr(manager) == "<TaskManager 'default' shut down, 1 live tasks>"
    assert (await manager.shutdown(0)).cancelled == 1


async def test_shutdown_ends_blocks_in_plain_tasks() -> None:
    """A block that runs in a plain task is left, with its group closed by cause shutdown."""
    manager = TaskManager()
    groups: list[TaskGroup] = []

    async def host() -> str:
        async with manager.group("load") as group:
            groups.append(group)
            await rest()
        return "went on"

    task = asyncio.create_task(host())
    await settle()
    await manager.shutdown(0)
    assert await task == "went on"
    assert groups[0].cancel_event.cause is not None
    assert groups[0].cancel_event.cause.kind is CancelKind.SHUTDOWN


async def test_manager_is_shut_down_at_the_end_of_its_block() -> None:
    """async with opens a manager, and shuts it down."""
    async with TaskManager() as manager:
        task = manager.create_task(rest())
    assert task.cancelled()
    assert kind_of(task) is CancelKind.SHUTDOWN


async def test_manager_opens_again_with_its_block() -> None:
    """A manager that was shut down takes tasks again inside `async with`, in all its groups."""
    manager = TaskManager()
    group = manager.get_group("g")
    stubborn = group.create_task(ignore_cancels(50))
    event = group.cancel_event
    await settle()
    await manager.shutdown(0, 1)
    assert event.is_set()
    async with manager:
        assert not group.cancel_event.is_set()
        assert not manager.get_group("root").cancel_event.is_set()
        async with group.group("block") as block:
            assert await block.create_task(give(1)) == 1
    await asyncio.wait([stubborn])
    await settle()


def test_report_is_frozen_and_clean_by_default() -> None:
    """A report is plain data."""
    report = ShutdownReport()
    assert report.clean
    assert dataclasses.asdict(report) == {
        "completed": 0,
        "failed": 0,
        "cancelled": 0,
        "cancel_ignored": (),
        "still_running": {},
        "abandoned_threads": {},
    }


# -- every await, cancelled in turn ----------------------------------------------------------------


async def waiting_for_a_task(manager: TaskManager) -> None:
    await manager.start_task("a", lambda: asyncio.sleep(5, "done"))
    await manager.wait_for_task("a")
    await manager.start_task("b", lambda: asyncio.sleep(5))
    with pytest.raises(TimeoutError):
        await manager.wait_for_task("b", timeout=1)


async def joining(manager: TaskManager) -> None:
    manager.create_task(asyncio.sleep(5))
    manager.create_task(give(1), group="g")
    await manager.join("g")
    await manager.join()


async def cancelling_a_task(manager: TaskManager) -> None:
    manager.create_task(ignore_cancels(5), name="a")
    await asyncio.sleep(0)
    await manager.cancel_task("a", timeout=1)
    manager.create_task(rest(), name="b")
    await manager.cancel_task("b")


async def cancelling_a_group(manager: TaskManager) -> None:
    manager.create_task(ignore_cancels(5), group="g")
    manager.create_task(rest(), group="g.sub")
    async with manager.get_group("g").group("block") as block:
        block.create_task(rest())
        await asyncio.sleep(0)
        await manager.cancel_group("g", grace=1, timeout=2)


async def shutting_down(manager: TaskManager) -> None:
    manager.create_task(ignore_cancels(5), priority=TaskPriority.LOW)
    manager.create_task(rest())
    manager.create_task(asyncio.sleep(1), priority=TaskPriority.HIGH)
    await asyncio.sleep(0)
    await manager.shutdown(grace=0.5, timeout=2)


async def managing(manager: TaskManager) -> None:
    async with manager:
        manager.create_task(ignore_cancels(8))
        await asyncio.sleep(1)


async def replacing(manager: TaskManager) -> None:
    await manager.start_task("a", lambda: ignore_cancels(5))
    await asyncio.sleep(0)
    await manager.start_task("a", rest, cancel_existing=True)
    new = manager.create_task(asyncio.sleep(1), name="a", on_conflict="replace")
    await new


async def grouping(manager: TaskManager) -> None:
    async with manager.group("load", span=True) as group:
        group.create_task(asyncio.sleep(2))
        group.create_task(ignore_cancels(3))
        async with manager.group("inner") as inner:
            inner.create_task(asyncio.sleep(1))
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.5)


async def grouping_with_a_cancel(manager: TaskManager) -> None:
    async with manager.group("load") as group:
        group.create_task(ignore_cancels(3))
        await asyncio.sleep(1)
        group.cancel()
    await asyncio.sleep(1)


async def grouping_with_a_failure(manager: TaskManager) -> None:
    with pytest.raises(ExceptionGroup):
        async with manager.group("load", span=True) as group:
            group.create_task(rest())
            group.create_task(ignore_cancels(3))
            group.create_task(fail(ValueError("no")))
            await asyncio.sleep(1)
    await asyncio.sleep(1)


async def grouping_with_a_timeout(manager: TaskManager) -> None:
    with pytest.raises(TimeoutError):
        async with manager.group("load", timeout=1) as group:
            group.create_task(rest())
            group.create_task(ignore_cancels(3))
    await asyncio.sleep(1)


async def grouping_in_a_task(manager: TaskManager) -> None:
    await manager.create_task(grouping(manager), name="host")


async def calling_a_decorated_function(manager: TaskManager) -> None:
    @managed_task(manager=manager, timeout=5)
    async def work() -> None:
        await asyncio.sleep(1)
        await asyncio.sleep(1)

    await work()


@pytest.mark.parametrize(
    ("scenario", "awaits"),
    [
        (waiting_for_a_task, 2),
        (joining, 2),
        (cancelling_a_task, 3),
        (cancelling_a_group, 3),
        (shutting_down, 4),
        (managing, 3),
        (replacing, 3),
        (grouping, 4),
        (grouping_with_a_cancel, 3),
        (grouping_with_a_failure, 3),
        (grouping_with_a_timeout, 2),
        (grouping_in_a_task, 1),
        (calling_a_decorated_function, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_nothing_leaks_whichever_await_is_cancelled(scenario: Any, awaits: int, spans: SpanRecorder) -> None:
    """Cancelled at any of its awaits, a scenario leaves no task, no open span, and no warning."""
    assert cancel_at_each_await(scenario, spans) >= awaits


async def test_task_that_joins_the_callers_group_is_spared() -> None:
    """A join awaits all of its tasks, also while it is the turn of another than the caller."""
    manager = TaskManager()

    async def cancel_all() -> None:
        await asyncio.sleep(1)
        await manager.cancel_all_tasks()

    manager.create_task(cancel_all(), group="work")
    manager.create_task(rest(), group="work")
    joining = manager.create_task(manager.join("work"))
    await asyncio.wait([joining])
    assert joining.status is TaskStatus.COMPLETED


async def test_shutdown_spares_tasks_that_await_its_caller() -> None:
    """A task that shuts its manager down is awaited by others: they would hand the cancellation on to it."""
    manager = TaskManager()
    reports: list[ShutdownReport] = []

    async def helper() -> None:
        reports.append(await manager.shutdown(grace=2, timeout=1))

    async def outer() -> None:
        await manager.create_task(helper(), name="helper")

    task = manager.create_task(outer())
    other = manager.create_task(rest())
    await asyncio.wait([task])
    assert task.status is TaskStatus.COMPLETED
    assert (reports[0].cancelled, other.status) == (1, TaskStatus.CANCELLED)


async def test_refused_replacement_leaves_the_old_task_alone() -> None:
    """An error in the new task is raised before the old one is cancelled."""
    manager = TaskManager()
    old = manager.create_task(rest(), name="x")
    await settle()
    with pytest.raises(TypeError, match="context must be"):
        manager.create_task(rest(), name="x", on_conflict="replace", context="bad")  # type: ignore[call-overload]  # the mistake under test
    with pytest.raises(TypeError, match="takes a function that returns a coroutine"):
        await manager.start_task("x", 42, cancel_existing=True)  # type: ignore[arg-type]  # the mistake under test
    assert (old.name, old.cancelling()) == ("x", 0)
    await manager.shutdown(0)


async def test_task_cannot_wait_for_its_own_end_to_be_replaced() -> None:
    """start_task() waits for the old task, which cannot be the caller; the message names what can."""
    manager = TaskManager()

    async def restart() -> None:
        await manager.start_task("x", rest, cancel_existing=True)

    task = await manager.start_task("x", restart)
    with pytest.raises(RuntimeError, match=r"cannot wait for its own end to be replaced: write create_task"):
        await task


async def test_callback_that_keeps_a_set_in_order_waits_for_nothing() -> None:
    """tasks.add_done_callback(background.discard), asyncio's own idiom, does not hide a failure."""
    told: list[str] = []
    manager = TaskManager(on_error=lambda info, error: told.append(info.name))
    background: set[asyncio.Task[None]] = set()
    task = manager.create_task(fail(ValueError("lost")), name="fire and forget")
    background.add(task)
    task.add_done_callback(background.discard)
    await settle()
    assert told == ["fire and forget"]
    assert not background


def test_refused_entry_leaves_a_closed_manager_closed() -> None:
    """async with in the wrong loop does not open a manager that is shut down."""
    manager = TaskManager()
    first = VirtualClockLoop()

    async def use() -> None:
        manager.create_task(ignore_cancels(50))
        await settle()
        await manager.shutdown(0, 0)

    async def misuse() -> None:
        with pytest.raises(WrongLoopError):
            await manager.__aenter__()

    first.run_until_complete(use())
    run(misuse())
    assert "shut down" in repr(manager)
    for task in asyncio.all_tasks(first):
        first.run_until_complete(asyncio.wait([task]))
    first.close()


@pytest.mark.parametrize("how", ["ignores", "retrieves", "next turn", "partial", "removed"])
async def test_done_callback_handles_a_failure_only_if_it_retrieves_it(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that only looks at the task leaves the error to the report, which comes once."""
    manager = TaskManager()
    seen: list[Any] = []

    def callback(task: asyncio.Task[Any], retrieve: bool = False) -> None:
        seen.append(task.done())
        if how == "next turn":
            asyncio.get_running_loop().call_soon(task.exception)
        elif how == "retrieves" or retrieve:
            task.exception()

    task = manager.create_task(fail(ValueError("lost")), name="work")
    added: Any = functools.partial(callback, retrieve=True) if how == "partial" else callback
    task.add_done_callback(added)
    if how == "removed":
        assert task.remove_done_callback(added) == 1
    for _ in range(5):
        await asyncio.sleep(0)
    wanted = ["task 'work' failed and nobody awaits it"] if how in ("ignores", "removed") else []
    assert caplog.messages == wanted
    assert seen == ([] if how == "removed" else [True])
    del task
    gc.collect()
    assert caplog.messages == wanted


@pytest.mark.parametrize("how", ["gather", "wait", "shield", "TaskGroup", "as_completed", "await"])
async def test_waiter_that_takes_a_failure_late_is_a_waiter(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio's own ways to wait count, even if another task keeps them waiting."""
    manager = TaskManager()
    task = manager.create_task(fail(ValueError("taken")), name="work")
    other = manager.create_task(asyncio.sleep(1))
    task.add_done_callback(lambda _: None)

    async def wait() -> None:
        match how:
            case "gather":
                await asyncio.gather(task, other, return_exceptions=True)
            case "wait":
                await asyncio.wait([task, other])
                task.exception()
            case "shield":
                await asyncio.shield(task)
            case "TaskGroup":
                async with asyncio.TaskGroup() as group:
                    group.create_task(give(1))
                    await task
            case "as_completed":
                for future in asyncio.as_completed([other, task]):
                    with contextlib.suppress(ValueError):
                        await future
            case _:
                await task

    with contextlib.suppress(ValueError, ExceptionGroup):
        await wait()
    await asyncio.sleep(2)
    assert caplog.messages == []


async def test_shutdown_names_what_it_cancels(caplog: pytest.LogCaptureFixture) -> None:
    """Running and queued tasks are named in one line, the first ten of many; services are no lost work."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(rest(), name="runs")
    for number in range(12):
        manager.create_task(give(1), name=f"queued-{number}")
    await manager.start_service("prices", rest, group="services")

    await manager.shutdown()

    (record,) = caplog.records
    assert record.getMessage() == (
        "the shutdown of manager 'default' cancelled 13 tasks: 'runs', "
        + ", ".join(f"'queued-{number}' (not started)" for number in range(9))
        + ", ..."
    )
    assert len(record.__dict__["otel_tasks"]["task_ids"]) == 13


async def test_manager_decides_the_bounds_of_its_shutdowns(caplog: pytest.LogCaptureFixture) -> None:
    """`grace` and `shutdown_timeout` apply at the end of a block and to shutdown(); an argument wins."""
    manager = TaskManager("mail", grace=8.0, shutdown_timeout=2.0)
    begin = now()
    async with manager:
        finishes = manager.create_task(asyncio.sleep(7.0, "sent"), name="send-1")
    assert finishes.result() == "sent"
    assert now() - begin == pytest.approx(7.0)
    assert caplog.messages == []

    async with manager:
        manager.create_task(ignore_cancels(10), name="stubborn")
        await settle()
    assert now() - begin == pytest.approx(7.0 + 8.0 + 2.0)

    async with manager:
        manager.create_task(rest(), name="send-2")
        await settle()
        await manager.shutdown(1.0)
    assert now() - begin == pytest.approx(17.0 + 1.0)
    assert caplog.messages[-1] == "the shutdown of manager 'mail' cancelled 1 task: 'send-2'"


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
async def test_block_that_raises_waits_out_no_grace(error: type[BaseException]) -> None:
    """The tasks of a block that raised, or is cancelled, are cancelled immediately."""
    begin = now()
    with pytest.raises(error):
        async with TaskManager() as manager:
            task = manager.create_task(rest())
            await settle()
            raise error
    assert task.cancelled()
    assert now() == begin


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"grace": -1}, ValueError, "grace must be at least 0 seconds, got -1"),
        ({"shutdown_timeout": "10"}, TypeError, "shutdown_timeout must be seconds as a number"),
    ],
)
def test_bounds_of_shutdowns_are_checked(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A negative duration or one that is no number is refused with the manager."""
    with pytest.raises(error, match=message):
        TaskManager(**options)
