"""The places where tasks wait: how far their cancellation reaches, what defers it, and how to wake them."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from typing import Any

import pytest

from otel_tasks._core.suspension import (
    anyio_shield,
    awaiters,
    call_when_moved,
    context_of,
    find_holder,
    forwarded_to,
    in_anyio_shield,
    interrupt,
    leave_wait_for,
    may_forward,
    waits_for,
)


def never(_: object) -> bool:
    return False


async def waiting(future: Any) -> Any:
    return await future


async def started(coro: Any) -> asyncio.Task[Any]:
    task = asyncio.create_task(coro)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_task_waits_for_the_future_at_which_it_is_suspended() -> None:
    """Not before it runs, nor once the future is done."""
    future = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(waiting(future))
    assert waits_for(task) is None
    await asyncio.sleep(0)
    assert waits_for(task) is future
    future.set_result(1)
    assert waits_for(task) is None
    assert await task == 1


async def test_cancellation_reaches_what_a_task_awaits_and_the_children_of_a_gather() -> None:
    """It goes through tasks and gather(), but not past a task where it must stop."""
    future = asyncio.get_running_loop().create_future()
    inner = await started(waiting(future))
    done = asyncio.create_task(asyncio.sleep(0))
    await done
    outer = await started(waiting(asyncio.gather(inner, done)))
    passed, stops = forwarded_to([outer], never)
    assert (passed[1:], stops) == ([inner, future], [])
    passed, stops = forwarded_to([outer], lambda task: task is inner)
    assert (passed[1:], stops) == ([], [inner])
    future.set_result(None)
    await outer


async def test_interrupted_task_gets_the_cancellation_and_what_it_awaits_continues() -> None:
    """As if it had awaited asyncio.shield(); other waiters of the same task are not woken."""
    future = asyncio.get_running_loop().create_future()
    first, second = await started(waiting(future)), await started(waiting(future))
    (awaiter,) = [found for found in awaiters(future) if found.task is first]
    interrupt(awaiter, "gone")
    with pytest.raises(asyncio.CancelledError, match="gone"):
        await first
    future.set_result("answer")
    assert await second == "answer"


async def test_interrupted_task_that_is_cancelled_again_is_found_where_it_waited() -> None:
    """Until it wakes: asyncio forwards the second cancel there, too."""

    class Spared(asyncio.Future[None]):
        def cancel(self, msg: Any = None) -> bool:
            return True

    future = Spared()
    task = await started(waiting(future))
    interrupt(next(awaiters(future)), None)
    ((callback, _),) = future._callbacks or []
    assert not may_forward(callback)
    task.cancel()
    assert may_forward(callback)
    (awaiter,) = awaiters(future)
    assert awaiter.task is task
    interrupt(awaiter, None)
    assert not may_forward(callback)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not future._callbacks


async def test_other_callbacks_are_no_awaiters() -> None:
    """A user's callback, and those of wait() and shield(), forward nothing."""
    future = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda _: None)
    tasks = [await started(waiting(asyncio.shield(future))), await started(asyncio.wait({future}))]
    assert list(awaiters(future)) == []
    future.set_result(None)
    await asyncio.gather(*tasks)


async def test_callback_comes_after_the_next_step() -> None:
    """After the task's own, whether it is suspended or about to run."""
    order = []

    async def work() -> None:
        order.append("first")
        await asyncio.sleep(1)
        order.append("second")

    task = asyncio.create_task(work())
    call_when_moved(task, lambda: order.append("moved"))
    await asyncio.sleep(0)
    call_when_moved(task, lambda: order.append("moved again"))
    await task
    assert order[:2] == ["first", "moved"]
    await asyncio.sleep(0)
    assert order[2:] == ["second", "moved again"]


async def test_callback_comes_when_a_future_is_done() -> None:
    """Such as the one of a thread's function, which has no steps."""
    future = asyncio.get_running_loop().create_future()
    seen: list[bool] = []
    call_when_moved(future, lambda: seen.append(future.done()))
    await asyncio.sleep(0)
    assert seen == []
    future.set_result(None)
    await asyncio.sleep(0)
    assert seen == [True]


async def test_context_of_a_suspended_task_is_its_own() -> None:
    """On Python 3.11 it is read from its callback, and unknown while the task is about to run."""
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    context = contextvars.copy_context()
    context.run(variable.set, 5)
    future = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(waiting(future), context=context)
    assert context_of(task) is (context if sys.version_info >= (3, 12) else None)
    await asyncio.sleep(0)
    found = context_of(task)
    assert found is not None
    assert found[variable] == 5
    future.set_result(None)
    await task


async def test_without_anyio_there_are_no_shields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing imports it; a module that is being imported has no scopes yet."""
    monkeypatch.delitem(sys.modules, "anyio._backends._asyncio", raising=False)
    monkeypatch.setitem(sys.modules, "anyio", type(sys)("anyio"))
    with anyio_shield():
        task = asyncio.current_task()
        assert task is not None
        assert not in_anyio_shield(task)


async def test_without_a_task_no_shield_is_opened() -> None:
    """As on a server that runs coroutines without one, where anyio refuses."""
    ended = asyncio.get_running_loop().create_future()

    def callback() -> None:
        with anyio_shield():
            ended.set_result(asyncio.current_task())

    asyncio.get_running_loop().call_soon(callback)
    assert await ended is None


async def test_shield_around_the_task_group_of_a_task_shields_it() -> None:
    """anyio looks up to the scopes of the parent task, too."""
    import anyio

    found = []

    async def child() -> None:
        task = asyncio.current_task()
        assert task is not None
        found.append(in_anyio_shield(task))
        found.append(find_holder(task, []) is task)

    for shield in (True, False):
        with anyio.CancelScope(shield=shield):
            async with anyio.create_task_group() as group:
                group.start_soon(child)
    assert found == [True, True, False, False]


async def test_explicit_cancel_does_not_come_from_wait_for() -> None:
    """Only the step in which wait_for() gives up on what it waits for is one."""
    future = asyncio.get_running_loop().create_future()
    assert not leave_wait_for(future)
