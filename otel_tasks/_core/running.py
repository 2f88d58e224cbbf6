"""The wrapper of a task that has a timeout, or that waits for a place or for other tasks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks._core.extras import Extras, timeout_text
from otel_tasks._core.waiting import wait_until_done

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")


def run_when(
    coro: Coroutine[Any, Any, T],
    extras: Extras,
    previous: tuple[asyncio.Task[Any], ...],
    created_at: float,
    clock: Callable[[], float] | None = None,
) -> Coroutine[Any, Any, T]:
    """Make a coroutine that runs ``coro`` when all ``previous`` tasks have ended, within its timeout.

    Args:
        coro: The coroutine to run.
        extras: The task's extras, with its timeout.
        previous: The tasks to wait for.
        created_at: The start of the timeout.
        clock: The clock of ``created_at``; None means the loop's ``time()``.
    """
    # If the task is cancelled before its first step, the wrapper never runs, and `ending` closes this
    # coroutine.
    if extras.made is None:
        extras.inner = coro
    extras.previous = previous
    deadline = None if extras.seconds is None else created_at + extras.seconds
    return _run_when(coro, extras, deadline, clock)


async def _run_when(
    coro: Coroutine[Any, Any, T],
    extras: Extras,
    deadline: float | None,
    clock: Callable[[], float] | None,
) -> T:
    if clock is not None and deadline is not None:
        # Convert the deadline to the loop's time: the two clocks may differ.
        deadline += asyncio.get_running_loop().time() - clock()
    try:
        async with asyncio.timeout_at(deadline) as extras.timeout:
            if extras.place_granted is not None:
                await _wait_for_place(extras.place_granted, extras)
            await wait_until_done(extras.previous)
            extras.previous = ()
            return await coro
    except TimeoutError:
        if extras.timeout is not None and (extras.queue_timed_out or extras.timeout.expired()):
            error = TimeoutError(f"the task ran into its {timeout_text(extras)}")
            if extras.last_failure is not None:
                error.add_note(extras.last_failure)
            raise error from None
        raise


async def _wait_for_place(place_granted: asyncio.Future[None], extras: Extras) -> None:
    try:
        async with asyncio.timeout(extras.queue_seconds):
            await place_granted
    except TimeoutError:
        extras.queue_timed_out = True
        raise
    if extras.begin is not None:
        begin, extras.begin, extras.context = extras.begin, None, None
        begin(asyncio.current_task(), True)
