"""Waiting for tasks on behalf of a caller: it cancels none of them, and marks no failure as seen."""

from __future__ import annotations

import asyncio
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from otel_tasks._core.native import add_done_callback, remove_done_callback

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


async def wait_until_done(tasks: Collection[asyncio.Task[Any]], timeout: float | None = None) -> None:
    """Wait until all ``tasks`` are done, or for ``timeout`` seconds (None: without bound).

    Their own done-callbacks have been called by then: the books are in order. Unlike
    ``asyncio.wait`` it does not count as somebody who will be told of their failures.

    Cancellation: of the caller leaves the tasks alone.
    """
    if not tasks:
        return
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else loop.time() + timeout
    # A dictionary, to take the last one out of it, and to be asked whether one is in it.
    left = dict.fromkeys(tasks)
    if len(left) > 1:
        line = PendingWaiter(left, asyncio.current_task())
        _pending_waiters[id(line)] = line
    ended_before = False
    # One after another, the last first: tasks that end in the same turn cost one wait, not one each.
    while left:
        task, _ = left.popitem()
        ended_before = task.done()
        if not ended_before and not await _is_done_by(task, deadline, loop):
            return
    if ended_before:
        # Perhaps in this very turn: then its done-callbacks are to be called in the next.
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
    """The tasks for which somebody who waits for many has still to wait: a done-callback is at one alone."""

    __slots__ = ("__weakref__", "left", "waiter")

    def __init__(self, left: Mapping[asyncio.Task[Any], None], waiter: asyncio.Task[Any] | None) -> None:
        self.left = left
        self.waiter = waiter


# All of this process, for those who ask who awaits a task. Weak: one that stands in a loop that was
# closed under it goes with it.
_pending_waiters: WeakValueDictionary[int, PendingWaiter] = WeakValueDictionary()


def waiters_behind(task: asyncio.Future[Any]) -> list[asyncio.Task[Any]]:
    """Say who waits for many tasks, with this one among those that are still to come."""
    # A list made in one step: lines come and go in other threads meanwhile.
    lines = [line for link in _pending_waiters.valuerefs() if (line := link()) is not None]
    return [line.waiter for line in lines if line.waiter is not None and task in line.left]
