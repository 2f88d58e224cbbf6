"""Waits for tasks on behalf of a caller: this cancels no task, and marks no failure as retrieved."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from otel_tasks._core.native import add_done_callback, remove_done_callback

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


async def wait_until_done(tasks: Collection[asyncio.Task[Any]], timeout: float | None = None) -> None:
    """Wait until all ``tasks`` are done, or for ``timeout`` seconds (None: no limit).

    When it returns, the done-callbacks of ended tasks have run, so the records are complete. Unlike
    ``asyncio.wait``, it does not count as a waiter that receives their failures.

    Cancellation: cancelling the caller does not cancel the tasks.
    """
    if not tasks:
        return
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    # A dictionary: popitem() takes the last one, and `in` is fast.
    left = dict.fromkeys(task for task in tasks if not task.done())
    if len(left) > 1:
        pending = PendingWaiter(left, asyncio.current_task())
        _pending_waiters[id(pending)] = pending
    ended_before = not left
    # One after another, the last first: tasks that end in the same turn then cost one wait, not one each.
    while left:
        task, _ = left.popitem()
        ended_before = task.done()
        if not ended_before and not await _is_done_by(task, deadline, loop):
            return
    if ended_before:
        # It may have ended in this turn, and then its done-callbacks run in the next one.
        await asyncio.sleep(0)


async def _is_done_by(
    task: asyncio.Task[Any], deadline: float | None, loop: asyncio.AbstractEventLoop
) -> bool:
    waiter: asyncio.Future[bool] = loop.create_future()

    def finish(is_done: bool) -> None:
        if not waiter.done():
            waiter.set_result(is_done)

    def one_done(_: object) -> None:
        finish(True)

    add_done_callback(task, one_done, context=Context())
    timer = None if deadline is None else loop.call_at(deadline, finish, False)
    try:
        return await waiter
    finally:
        if timer is not None:
            timer.cancel()
        remove_done_callback(task, one_done)


class PendingWaiter:
    """One wait for several tasks, and those it still waits for; only one of them has its done-callback."""

    __slots__ = ("__weakref__", "left", "waiter")

    def __init__(self, left: Mapping[asyncio.Task[Any], None], waiter: asyncio.Task[Any] | None) -> None:
        self.left = left
        self.waiter = waiter


# All such waits of this process, for `waiters_behind`. Weak: a wait whose loop was closed is freed with it.
_pending_waiters: WeakValueDictionary[int, PendingWaiter] = WeakValueDictionary()


def waiters_behind(task: asyncio.Future[Any]) -> list[asyncio.Task[Any]]:
    """The tasks that wait for several tasks, with this one among those that have not ended."""
    # The list is made in one atomic step: other threads add and remove waits meanwhile.
    pending = [wait for link in _pending_waiters.valuerefs() if (wait := link()) is not None]
    return [wait.waiter for wait in pending if wait.waiter is not None and task in wait.left]
