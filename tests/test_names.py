"""How tasks without a name of their own are called, and found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otel_tasks import TaskGroup, TaskManager
from otel_tasks._core.names import _MANY, Numbers, full_name
from tests.helpers import rest

if TYPE_CHECKING:
    from otel_tasks._core.names import Key


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
    """Functions that are made anew for each task do not fill the memory; numbers in use stay found."""
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
