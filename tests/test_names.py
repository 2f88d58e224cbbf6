"""How tasks without a name of their own are called, and found."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from otel_tasks import TaskGroup, TaskManager
from otel_tasks._core.checks import LONGEST_NAME
from otel_tasks._core.names import _MANY, Numbers, full_name
from otel_tasks.exceptions import TaskNotFoundError
from tests.helpers import rest

if TYPE_CHECKING:
    from otel_tasks._core.names import Key
    from otel_tasks._core.options import OnConflict


def made(numbers: Numbers, base: str, count: int) -> list[str]:
    """The next names of a function's tasks."""
    return [full_name(base, numbers[base]()) for _ in range(count)]


async def other() -> None:
    """Wait as long as `rest` does."""
    await rest()


async def test_tasks_are_numbered_per_function() -> None:
    """Each function has numbers of its own, without jumps, and its first task has none."""
    manager = TaskManager()
    names = [manager.create_task(function()).name for function in (rest, other, rest, rest, other)]
    assert names == ["rest", "other", "rest-2", "rest-3", "other-2"]
    await manager.cancel_all_tasks()


async def test_tasks_are_numbered_per_scoped_group() -> None:
    """A scoped group begins with its own first number; labeled groups share the manager's."""
    manager = TaskManager()
    async with manager.group("first") as first, manager.group("second") as second:
        names = [group.create_task(rest()).name for group in (first, second, first, second)]
        assert names == ["rest", "rest", "rest-2", "rest-2"]
        assert [manager.create_task(rest(), group=label).name for label in ("a", "b")] == ["rest", "rest-2"]
        first.cancel()
        second.cancel()
    await manager.cancel_all_tasks()


async def test_numbers_start_again_when_no_task_is_live() -> None:
    """A service that is idle now and then does not count up forever."""
    manager = TaskManager()
    for _ in range(3):
        assert [manager.create_task(rest()).name for _ in range(2)] == ["rest", "rest-2"]
        await manager.cancel_all_tasks()


async def test_name_that_has_become_free_is_used_again() -> None:
    """The plain name goes to the next task that finds it free, and no live name is given twice."""
    manager = TaskManager()
    first, second = (manager.create_task(rest()) for _ in range(2))
    first.cancel()
    await manager.cancel_task("rest")
    third, fourth = (manager.create_task(rest()) for _ in range(2))
    assert [task.name for task in (second, third, fourth)] == ["rest-2", "rest", "rest-3"]
    assert [manager.get_task(task.name) for task in (second, third, fourth)] == [second, third, fourth]
    await manager.cancel_all_tasks()


@pytest.mark.parametrize("before", [0, 1, 3])
async def test_made_name_never_equals_a_chosen_one(before: int) -> None:
    """Whether the number was chosen before or after the function got its counter."""
    manager = TaskManager()
    names = [manager.create_task(rest()).name for _ in range(before)]
    names.append(manager.create_task(rest(), name="rest-5").name)
    names += [manager.create_task(rest()).name for _ in range(6)]
    assert len(set(names)) == len(names)
    assert set(names) == {"rest"} | {f"rest-{number}" for number in range(2, len(names) + 1)}
    await manager.cancel_all_tasks()


async def test_taken_name_gets_the_next_number() -> None:
    """A conflict is numbered like an unnamed task, whether the two share a function's name or not."""
    manager = TaskManager()
    names = [manager.create_task(rest(), name="job").name for _ in range(3)]
    assert names == ["job", "job-2", "job-3"]
    assert [manager.create_task(rest(), name="rest").name for _ in range(2)] == ["rest", "rest-2"]
    assert manager.create_task(rest()).name == "rest-3"
    await manager.cancel_all_tasks()


async def test_block_of_its_own_finds_its_tasks_by_their_made_names() -> None:
    """The id of a numbered task in a scoped group leads to it, as its uid does."""
    manager = TaskManager()
    async with TaskGroup("load", manager=manager) as group:
        tasks = [group.create_task(rest()) for _ in range(3)]
        for task in tasks:
            assert manager.get_task(task.id) is manager.get_task(task.uid) is task
            assert manager.get_task(task.name, group=group) is task
        group.cancel()


@pytest.mark.parametrize(
    "name", ["work-1", "work-02", "work-\u0662", "work-", "-2", "play-2", "work-" + "9" * 20]
)
def test_what_only_looks_like_a_made_name_is_none(name: str) -> None:
    """Only the text that a key gives leads back to the key."""
    numbers = Numbers({})
    key = numbers["work"]()
    assert numbers.find("work-2") == key
    assert numbers.find(name) in (None, (key - 2) + 1)
    assert full_name("work", numbers.find(name) or 0) != "work-2"


def test_counters_of_functions_without_tasks_are_dropped() -> None:
    """Functions that are created for each task do not fill the memory; numbers in use stay found."""
    table: dict[Key, object] = {}
    numbers = Numbers(table)
    kept = numbers["kept"]()
    table[kept] = table["chosen-7"] = object()
    numbers.note("chosen-7")
    numbers["chosen"]()
    for number in range(3 * _MANY):
        numbers[f"function {number}"]()
    assert len(numbers) <= _MANY + 1
    assert numbers.find("kept-2") == kept
    assert made(numbers, "kept", 1) == ["kept-3"]
    assert made(numbers, "chosen", 6) == [
        "chosen-3",
        "chosen-4",
        "chosen-5",
        "chosen-6",
        "chosen-8",
        "chosen-9",
    ]


def test_keys_of_different_functions_differ() -> None:
    """One table holds the keys of all of them."""
    numbers = Numbers({})
    keys = [numbers[base]() for base in ("a", "b", "a", "c", "b") for _ in range(10)]
    assert len(set(keys)) == len(keys)


async def test_number_may_make_a_name_longer_than_a_chosen_one_may_be() -> None:
    """A taken name of 200 characters gets its number too, and the longer name leads to its task."""
    manager = TaskManager()
    longest = "n" * LONGEST_NAME
    tasks = [manager.create_task(rest(), name=longest) for _ in range(3)]
    names = [task.name for task in tasks]
    assert names == [longest, f"{longest}-2", f"{longest}-3"]
    assert [manager.get_task(name) for name in names] == tasks
    tasks[1].set_name(names[1])
    await manager.cancel_all_tasks()
    assert {info.name for info in manager.get_all_task_info().values()} == set(names)


@pytest.mark.parametrize("name", ["a#1", "a\nb", "n" * (LONGEST_NAME + 1), "a/b", "a-2", "-", "3", "\u0662"])
async def test_function_may_have_any_name(name: str) -> None:
    """The name of a function is not checked; its tasks are numbered, found, and remembered like others."""

    async def work() -> None:
        await rest()

    work.__name__ = name
    manager = TaskManager()
    async with manager.group("scoped") as scoped:
        for group in (manager.get_group("root"), manager.get_group("mail"), scoped):
            tasks = [
                group.create_task(work()),
                group.create_task(work()),
                group.create_task(work(), timeout=60),
            ]
            assert [task.name for task in tasks] == [name, f"{name}-2", f"{name}-3"]
            assert [manager.get_task(task.id) for task in tasks] == tasks
            assert [manager.get_task(task.name, group=group) for task in tasks] == tasks
            group.cancel()
            await group.join()
            assert [manager.get_task_info(task.id) for task in tasks] == [task.info() for task in tasks]
            assert [manager.get_task_info(task.name, group=group) for task in tasks] == [
                task.info() for task in tasks
            ]


@pytest.mark.parametrize("scoped", [False, True])
async def test_renamed_task_gives_up_its_number(scoped: bool) -> None:
    """It is found and remembered by its new name alone; its old one may be chosen."""
    manager = TaskManager()
    async with manager.group("load") as block:
        group = block if scoped else manager.get_group("mail")
        first, second = (group.create_task(rest()) for _ in range(2))
        second.set_name("renamed")
        with pytest.raises(TaskNotFoundError):
            manager.get_task("rest-2", group=group)
        assert manager.get_task("renamed", group=group) is manager.get_task(second.id) is second
        assert group.create_task(rest()).name == "rest-3"
        second.set_name("rest-3")
        assert second.name == "rest-3-2"
        second.set_name("rest-2")
        assert [group.create_task(rest(), name="rest-2").name, group.create_task(rest()).name] == [
            "rest-2-2",
            "rest-4",
        ]
        assert manager.get_task("rest", group=group) is first
        group.cancel()
        await group.join()
        assert manager.get_task_info("rest-2", group=group) == second.info()


async def test_ended_task_that_is_renamed_leaves_its_name_to_its_successor() -> None:
    """A name is free as soon as its task is done; the task may be renamed before its end is recorded."""
    manager = TaskManager()
    done = asyncio.get_running_loop().create_future()

    async def work() -> None:
        await done

    ended = manager.create_task(work(), name="job", group="mail")
    await asyncio.sleep(0)
    done.set_result(None)
    await asyncio.sleep(0)
    assert ended.done()
    assert manager.stats().live == 1
    successor = manager.create_task(rest(), name="job", group="shop")
    ended.set_name("renamed")
    assert manager.get_task("job") is successor
    await asyncio.sleep(0)
    assert manager.get_task("job") is successor
    with pytest.raises(TaskNotFoundError):
        manager.get_task("renamed")
    assert manager.stats().live == 1
    await manager.cancel_all_tasks()


@pytest.mark.parametrize("on_conflict", ["suffix", "replace"])
async def test_conflict_is_numbered_in_its_own_table(on_conflict: OnConflict) -> None:
    """Labeled groups share their names with the whole manager, a scoped group shares them with none."""
    manager = TaskManager()
    async with manager.group("load") as block:
        mail, shop = manager.get_group("mail"), manager.get_group("shop")
        old = [group.create_task(rest(), name="job") for group in (mail, block)]
        new = [group.create_task(rest(), name="job", on_conflict=on_conflict) for group in (shop, block)]
        renamed, named = (new, old) if on_conflict == "suffix" else (old, new)
        assert [task.name for task in (*renamed, *named)] == ["job-2", "job-2", "job", "job"]
        assert [manager.get_task(task.id) for task in (*old, *new)] == [*old, *new]
        with pytest.raises(TaskNotFoundError):
            manager.get_task(old[0].name, group=shop)
        block.cancel()
    await manager.cancel_all_tasks()


def test_numbers_do_not_run_out() -> None:
    """A function whose tasks never all end at a time keeps counting: 14 digits are found and kept apart."""
    numbers = Numbers({})
    first, other_first = numbers["first"](), numbers["other"]()
    key = numbers.find("first-99999999999999")
    assert key is not None
    assert first < key < other_first
    assert full_name("first", key) == "first-99999999999999"
