"""What a task runs that has to wait for a place, for other tasks, or that has a timeout."""

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
    """Make what runs ``coro`` after all ``previous`` have ended, and up to its timeout.

    Args:
        coro: What to run.
        extras: Where its timeout is.
        previous: The tasks to wait for.
        created_at: The timeout counts from here.
        clock: That of ``created_at``; None is the loop's ``time()``.
    """
    # Cancelled before its first step it never runs: whoever takes the end closes the inner one.
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
        # What is left, in the loop's own time: the two clocks need not agree.
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
            raise TimeoutError(f"the task ran into its {timeout_text(extras)}") from None
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
