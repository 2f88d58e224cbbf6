"""The rules for names, wherever one is given."""

from __future__ import annotations

import asyncio
import gc
import re
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskGroup, TaskManager, managed_task
from tests.helpers import rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    Use = Callable[[TaskManager, str], object]

LONG = "x" * 201

REFUSED = {
    "load#3/send": (
        "must not contain '#', got 'load#3/send': ids have it, as in 'group#3/name'; write 'load-3/send'"
    ),
    "a\nb": r"must not contain control characters, got 'a\nb': write 'a b'",
    "\x1b[2J": r"must not contain control characters, got '\x1b[2J': write ' [2J'",
    "x\udcff": r"must not contain control characters, got 'x\udcff': write 'x '",
    "c1\x9b": r"must not contain control characters, got 'c1\x9b': write 'c1 '",
    LONG: f"must have at most 200 characters, got 201, '{LONG[:60]}...': shorten it",
    # The value is cut, however long.
    f"{'x' * 100}#": f"must not contain '#', got '{LONG[:60]}...': "
    f"ids have it, as in 'group#3/name'; write '{LONG[:60]}...'",
}

GIVEN: dict[str, tuple[str, Use]] = {
    "create_task": ("task", lambda manager, name: manager.create_task(rest(), name=name)),
    "with options": ("task", lambda manager, name: manager.create_task(rest(), name=name, timeout=1.0)),
    "replace": (
        "task",
        lambda manager, name: manager.create_task(rest(), name=name, on_conflict="replace"),
    ),
    "threadsafe": ("task", lambda manager, name: manager.create_task_threadsafe(rest(), name=name)),
    "in a thread": ("task", lambda manager, name: manager.run_in_thread(gc.collect, name=name)),
    "put_task": ("task", lambda manager, name: manager.put_task(rest(), name=name)),
    "start_task": ("task", lambda manager, name: manager.start_task(name, rest)),
    "start_service": ("service", lambda manager, name: manager.start_service(name, rest)),
    "decorator": ("task", lambda manager, name: managed_task(name=name)),
    "label": ("group", lambda manager, name: manager.create_task(rest(), group=name)),
    "label below": ("group", lambda manager, name: manager.create_task(rest(), group=f"a.{name}")),
    "get_group": ("group", lambda manager, name: manager.get_group(name)),
    "block": ("group", lambda manager, name: manager.group(name)),
    "TaskGroup": ("group", lambda manager, name: TaskGroup(name)),
    "manager": ("manager", lambda manager, name: TaskManager(name)),
}


@pytest.mark.parametrize("where", GIVEN)
@pytest.mark.parametrize("name", REFUSED, ids=lambda name: repr(name[:12]))
async def test_name_that_an_id_or_a_log_could_not_carry_is_refused(where: str, name: str) -> None:
    """A '#', a control character, and more than 200 characters are refused with the value and the fix."""
    what, use = GIVEN[where]
    manager = TaskManager()
    # "a." in front of a label shifts what is cut.
    start = f"{what} name {REFUSED[name].partition(',')[0] if where == 'label below' else REFUSED[name]}"
    async with manager:
        # So that threads know the loop.
        await manager.create_task(asyncio.sleep(0))
        with pytest.raises(ValueError, match=f"^{re.escape(start)}") as error:
            given: Any = use(manager, name)
            await given
        assert len(str(error.value)) < 250
        assert manager.stats().created == 1
    # No coroutine is left behind unawaited.
    gc.collect()


async def test_rename_to_such_a_name_is_refused() -> None:
    """set_name() leaves the task as it is called; its own name is none too many."""
    async with TaskManager() as manager:
        task = manager.create_task(rest(), name="work")
        for name, message in REFUSED.items():
            with pytest.raises(ValueError, match=f"^task name {re.escape(message)}$"):
                task.set_name(name)
        assert manager.get_task("work") is task
        service = await manager.start_service("prices", rest)
        await settle()
        attempt = manager.get_task("prices#1")
        attempt.set_name(attempt.get_name())
        assert manager.get_task("prices#1") is attempt
        for live in (task, service):
            live.cancel()


@pytest.mark.parametrize("name", ["x" * 200, "GET /a/{b}", "caf\u00e9 \U0001f469\u200d\U0001f680", " "])
async def test_other_names_are_taken(name: str) -> None:
    """Every other character is fine, in a task's name and a group's."""
    async with TaskManager() as manager:
        assert manager.create_task(asyncio.sleep(0), name=name).name == name
        assert TaskGroup(name).name == name


async def test_name_of_a_function_is_taken_as_it_is() -> None:
    """Python lets functions be called anything: a task of one starts, and is found."""
    async with TaskManager() as manager:
        for name in (rest.__name__, "<lambda>", "a#1", "a\nb", LONG):
            coro: Any = rest()
            coro.__name__ = name
            task = manager.create_task(coro)
            assert task.name == name
            assert manager.get_task(task.name) is task
        await manager.cancel_all_tasks()


async def test_replaced_task_may_have_any_name_in_the_meantime() -> None:
    """The number behind a name of full length, or of an attempt, is the library's."""
    async with TaskManager() as manager:
        first = manager.create_task(rest(), name="x" * 200)
        second = manager.create_task(rest(), name="x" * 200, on_conflict="replace")
        assert second.name == "x" * 200
        assert first.name.startswith("x" * 200 + "-")
        await manager.cancel_all_tasks()
