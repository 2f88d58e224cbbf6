"""managed_task: each call of a coroutine function as a managed task."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import sys
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelKind,
    ManagedFunction,
    ManagedTask,
    TaskManager,
    TaskPriority,
    current_task,
    global_task_manager,
    managed_task,
)
from otel_tasks._core.coroutines import code_name
from tests.helpers import give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


async def test_call_runs_as_a_task_and_gives_its_result() -> None:
    """`await work(1)` is as before, in a task of the global manager."""

    @managed_task
    async def work(number: int, *, plus: int = 0) -> tuple[int, ManagedTask[Any] | None]:
        return number + plus, current_task()

    result, task = await work(1, plus=2)
    assert result == 3
    assert task is not None
    assert task is not asyncio.current_task()
    assert task.group is global_task_manager.get_group("root")
    assert task.name == "work"


async def test_coroutine_of_a_call_has_the_name_of_the_function(recwarn: pytest.WarningsRecorder) -> None:
    """Its task has it too, and so has Python's warning if the call is not awaited."""
    manager = TaskManager()

    @managed_task(manager=manager)
    async def work() -> str:
        return ""

    class Works:
        @managed_task(manager=manager)
        async def work(self) -> str:
            return ""

    calls: tuple[Any, ...] = (work, Works().work)
    for call in calls:
        task = manager.create_task(call())
        await task
        assert task.name.removesuffix("-3") == "work"
        coro = call()
        assert code_name(coro) == f"{call.__module__}.{call.__qualname__}"
        coro.close()
    assert await managed_task(manager=manager)(functools.partial(give, "given"))() == "given"
    calls[0]()
    gc.collect()
    assert str(recwarn.pop(RuntimeWarning).message).endswith("work' was never awaited")


def test_functions_that_cannot_be_tasks_are_refused_with_the_fix() -> None:
    """An async generator, and a method whose decorators are in the wrong order."""

    async def lines() -> AsyncIterator[str]:
        yield ""

    with pytest.raises(TypeError, match=r"an async generator has no single result; iterate over it in"):
        managed_task(lines)  # type: ignore[arg-type]  # the mistake under test
    kinds: tuple[Any, ...] = (staticmethod, classmethod)
    for kind in kinds:
        with pytest.raises(TypeError, match=f": write @{kind.__name__} above @managed_task$"):
            managed_task(kind(rest))


async def test_call_joins_the_current_group() -> None:
    """Without group and manager a call is created in the current group."""
    manager = TaskManager()

    @managed_task()
    async def work() -> str:
        task = current_task()
        return task.group.id if task is not None else ""

    async with manager.group("load") as group:
        assert await group.create_task(work()) == group.id


async def test_options_are_those_of_the_tasks() -> None:
    """Name, group, priority, timeout and manager are every call's."""
    manager = TaskManager()

    @managed_task(name="mail", group="outbox", priority=TaskPriority.HIGH, timeout=2, manager=manager)
    async def work() -> None:
        await rest()

    task = work.start()
    assert (task.name, task.group, task.priority) == ("mail", manager.get_group("outbox"), TaskPriority.HIGH)
    with pytest.raises(TimeoutError, match=r"^the task ran into its timeout of 2 s$"):
        await task


async def test_group_without_a_manager_is_the_global_ones() -> None:
    """group= alone means a labeled group of the global manager."""

    @managed_task(group="outbox")
    async def work() -> None: ...

    task = work.start()
    assert task.group is global_task_manager.get_group("outbox")
    await task


async def test_manager_without_a_group_is_its_root() -> None:
    """manager= alone means that manager's root, whatever the current group."""
    manager = TaskManager()

    @managed_task(manager=manager)
    async def work() -> None: ...

    task = work.start()
    assert task.group is manager.get_group("root")
    await task


async def test_start_does_not_wait() -> None:
    """`work.start(1)` gives the task."""

    @managed_task
    async def work(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    start = now()
    task = work.start(3)
    assert isinstance(task, ManagedTask)
    assert now() == start
    assert await task == 3


async def test_cancelled_caller_cancels_the_task_and_waits_for_it() -> None:
    """A caller that is cancelled takes its task with it, and returns after its end."""
    manager = TaskManager()
    ended: list[float] = []

    @managed_task(name="work", manager=manager)
    async def work() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(2)
            ended.append(now())

    caller = asyncio.create_task(work())
    await settle()
    task = manager.get_task("work")
    caller.cancel("enough")
    await asyncio.wait([caller])
    assert caller.cancelled()
    assert ended == [now()]
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "enough")


async def test_second_call_of_a_named_function_does_not_vanish() -> None:
    """Two calls at the same time both run, the second under another name."""
    manager = TaskManager()

    @managed_task(name="sync", manager=manager)
    async def work(number: int) -> int:
        await asyncio.sleep(1)
        return number

    first, second = work.start(1), work.start(2)
    assert (first.name, second.name) == ("sync", "sync-2")
    assert await asyncio.gather(first, second) == [1, 2]


async def test_method_is_bound() -> None:
    """A decorated method has its self, in a call and with start; on the class it is the function."""

    class Shop:
        name = "shop"

        @managed_task
        async def sell(self, what: str) -> str:
            """Sell something."""
            return f"{self.name} sold {what}"

    shop = Shop()
    assert await shop.sell("tea") == "shop sold tea"
    assert await shop.sell.start("milk") == "shop sold milk"
    assert await Shop.sell(shop, "rice") == "shop sold rice"
    assert isinstance(Shop.sell, ManagedFunction)
    assert Shop.sell.__doc__ == "Sell something."


async def test_record_keeps_the_returned_metadata() -> None:
    """record= is given the arguments of each call; without it they are not kept."""

    def what(user: str, *, secret: str) -> Mapping[str, Any]:
        return {"user": user}

    @managed_task(record=what)
    async def work(user: str, *, secret: str) -> None: ...

    @managed_task
    async def quiet(user: str) -> None: ...

    task = work.start("ann", secret="x")
    assert task.metadata == {"user": "ann"}
    other = quiet.start("ann")
    assert other.info().metadata == {}
    await asyncio.gather(task, other)


async def test_record_of_a_method_is_given_its_self() -> None:
    """A method's record sees the instance first, as the method does."""

    class Shop:
        name = "shop"

        @managed_task(record=lambda self, what: {"shop": self.name, "what": what})
        async def sell(self, what: str) -> None: ...

    task = Shop().sell.start("tea")
    assert task.metadata == {"shop": "shop", "what": "tea"}
    await task


async def test_record_that_raises_starts_nothing() -> None:
    """An error of record= is the caller's; no coroutine is left behind."""

    @managed_task(record=lambda: {"a": 1 / 0})
    async def work() -> None: ...

    with pytest.raises(ZeroDivisionError):
        work.start()
    gc.collect()


def test_decorated_function_still_looks_like_one() -> None:
    """Name, doc, signature and module are kept, and frameworks see that it is to be awaited."""

    @managed_task
    async def work(number: int) -> str:
        """Work."""
        return str(number)

    assert vars(work)["__name__"] == "work"
    assert work.__doc__ == "Work."
    assert work.__module__ == __name__
    assert str(inspect.signature(work)) == "(number: 'int') -> 'str'"
    # asyncio's, which asks for a mark, is deprecated where inspect's can be marked.
    is_async = inspect.iscoroutinefunction if sys.version_info >= (3, 12) else asyncio.iscoroutinefunction
    assert is_async(work)
    assert is_async(work.__call__)


def test_sync_function_is_refused() -> None:
    """Only a coroutine function can be a task; the message says how to declare it."""

    def work() -> None: ...

    with pytest.raises(
        TypeError,
        match=r"^managed_task decorates a coroutine function, "
        r"got <function test_sync_function_is_refused.<locals>.work at .*>: declare it with async def$",
    ):
        managed_task(work)  # type: ignore[arg-type]  # the mistake under test


async def test_error_is_raised_to_the_caller() -> None:
    """The function's exception is raised by the call, with its own traceback."""

    @managed_task
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await work()


async def test_function_that_ignores_its_cancellation_gives_its_result() -> None:
    """As with any awaited task, a caller whose task swallows the cancellation continues."""

    @managed_task
    async def work() -> str:
        return await ignore_cancels(2)

    caller = asyncio.create_task(work())
    await settle()
    caller.cancel()
    assert await caller == "ignored"
