"""How tasks without a name of their own are called, and found."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from otel_tasks import TaskGroup, TaskManager
from otel_tasks._core.checks import LONGEST_NAME
from otel_tasks._core.names import _MANY, Numbers, find_key, first_key, full_name
from otel_tasks.exceptions import TaskExistsError, TaskNotFoundError
from tests.helpers import rest

if TYPE_CHECKING:
    from otel_tasks._core.names import Key
    from otel_tasks._core.options import OnConflict


class Names:
    """One table of names, with nothing but its numbers."""

    def __init__(self) -> None:
        self.table: dict[Key, object] = {}
        self.counts: dict[str, int] = {}
        self.next_index = itertools.count(1).__next__
        self.numbers: Numbers | None = None

    def careful(self) -> Numbers:
        """As after the first name that ends in a number."""
        if self.numbers is None:
            self.numbers = Numbers(self.table, self.counts, self.next_index)
        return self.numbers

    def key(self, base: str) -> Key:
        """The key of the next task of a function."""
        if base in self.counts:
            self.counts[base] += 1
            return self.counts[base] - 1
        if self.numbers is not None:
            return self.numbers.next_key(base)
        return first_key(self.counts, base, self.table, self.next_index)

    def made(self, base: str, count: int) -> list[str]:
        """The next names of a function's tasks."""
        return [full_name(base, self.key(base)) for _ in range(count)]

    def find(self, name: str) -> int | None:
        """The key of the task with this name."""
        return find_key(name, self.counts) if self.numbers is None else self.numbers.find(name)


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


async def test_number_is_never_used_again() -> None:
    """Each task has an id of its own in the history, also where the one before it has ended."""
    manager = TaskManager()
    async with manager.group("load") as block:
        for group in (manager.get_group("root"), manager.get_group("mail"), block):
            before = len(manager.get_all_task_info())
            names = []
            for _ in range(3):
                task = group.create_task(rest())
                names.append(task.name)
                task.cancel()
                await asyncio.wait([task])
            assert len(set(names)) == 3
            assert len(manager.get_all_task_info()) == before + 3


async def test_label_sees_numbered_names_of_the_others() -> None:
    """All labels of a manager share one table, whether they have numbered a task themselves or not."""
    manager = TaskManager()
    names = [manager.create_task(rest()).name for _ in range(3)]
    assert names == ["rest", "rest-2", "rest-3"]
    for name in names:
        with pytest.raises(TaskExistsError):
            await manager.start_task(name, rest, group="mail")
        renamed = manager.create_task(rest(), name=name, group="shop", timeout=60)
        assert renamed.name not in names
    assert len({task.name for task in manager.get_group("root").tasks}) == 3
    await manager.cancel_all_tasks()
    assert len(manager.get_all_task_info()) == 6


async def test_function_with_a_numbered_name_does_not_share_it() -> None:
    """Whichever of the two functions is first."""

    async def job() -> None:
        await rest()

    async def other_job() -> None:
        await rest()

    job.__name__, other_job.__name__ = "job", "job-2"
    for order in ([job, job, other_job, job, other_job], [other_job, job, job, other_job]):
        manager = TaskManager()
        names = [manager.create_task(function()).name for function in order]
        assert len(set(names)) == len(names)
        assert [manager.get_task(name).name for name in names] == names
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


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("name", ["work-02", "work-\u0662", "work-", "-2", "play-2", "work-" + "9" * 20])
def test_what_only_looks_like_a_made_name_is_none(name: str, careful: bool) -> None:
    """Only the text that a key gives leads back to the key."""
    names = Names()
    if careful:
        names.careful().note("work-7")
    assert names.made("work", 2) == ["work", "work-2"]
    key = names.find("work-2")
    assert key is not None
    assert full_name("work", key) == "work-2"
    assert names.find(name) is None


@pytest.mark.parametrize("careful", [False, True])
def test_counters_of_functions_without_tasks_are_dropped(careful: bool) -> None:
    """Functions that are created for each task do not fill the memory; numbers in use stay found."""
    names = Names()
    if careful:
        names.careful()
        names.table["chosen-7"] = object()
        names.careful().note("chosen-7")
    assert names.made("kept", 1) == ["kept"]
    kept = names.key("kept")
    names.table[kept] = object()
    for number in range(3 * _MANY):
        names.key(f"function {number}")
        if careful:
            names.careful().note(f"given {number}-2")
    assert len(names.counts) <= _MANY + 2
    assert names.find("kept-2") == kept
    assert names.made("kept", 1) == ["kept-3"]
    if careful:
        assert names.made("chosen", 7) == [
            "chosen",
            *(f"chosen-{number}" for number in (2, 3, 4, 5, 6, 8)),
        ]


@pytest.mark.parametrize("careful", [False, True])
def test_keys_of_different_functions_differ(careful: bool) -> None:
    """One table holds the keys of all of them."""
    names = Names()
    if careful:
        names.careful().note("a-3")
    keys = [names.key(base) for base in ("a", "b", "a", "c", "b") for _ in range(10)]
    assert len(set(keys)) == len(keys)


def test_function_whose_counter_was_dropped_gets_another_index() -> None:
    """Also where the first function of all, whose index is 0, has lost its counter to a given name."""
    names = Names()
    names.table[names.key("first")] = names.table[names.key("first")] = object()
    names.careful().note("first-9")
    assert not names.counts
    keys = [names.key("second") for _ in range(3)]
    assert not set(keys) & set(names.table)


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
    names = Names()
    names.made("other", 2)
    names.made("first", 2)
    names.made("last", 2)
    first, last = names.find("first-2"), names.find("last-2")
    key = names.find("first-99999999999999")
    assert first is not None
    assert last is not None
    assert key is not None
    assert first < key < last
    assert full_name("first", key) == "first-99999999999999"
