"""The loops of a suspended frame that an exception from its innermost call ends."""

from __future__ import annotations

import asyncio
import contextlib
import types
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from otel_tasks._core.handlers import ended_loops

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from types import CoroutineType


@types.coroutine
def send() -> Generator[None]:
    """Suspend."""
    yield


async def source() -> AsyncGenerator[int]:
    while True:
        yield 1


async def plain() -> None:
    async for _ in source():
        await send()


async def in_finally() -> None:
    async for _ in source():
        try:
            await send()
        finally:
            len("")


async def in_with() -> None:
    async for _ in source():
        async with asyncio.timeout(1):
            await send()


async def in_open_scope() -> None:
    async for _ in source():
        with anyio.CancelScope():
            await send()


async def in_handler() -> None:
    async for _ in source():
        try:
            raise OSError
        except OSError:
            await send()


async def in_except() -> None:
    async for _ in source():
        try:
            await send()
        except OSError:
            len("")


async def in_except_of_several() -> None:
    async for _ in source():
        try:
            await send()
        except (OSError, asyncio.CancelledError) as error:
            str(error)


async def in_bare_except() -> None:
    async for _ in source():
        try:
            await send()
        except:  # noqa: E722  # its code differs from that of a class
            break


async def in_except_star() -> None:
    async for _ in source():
        try:
            await send()
        except* OSError:
            len("")


async def in_finally_in_except() -> None:
    async for _ in source():
        try:
            try:
                await send()
            finally:
                len("")
        except OSError:
            len("")


async def in_suppress() -> None:
    async for _ in source():
        with contextlib.suppress(OSError):
            await send()


async def in_cancelled_scope() -> None:
    async for _ in source():
        with anyio.CancelScope() as scope:
            scope.cancel()
            await send()


async def around() -> None:
    try:
        async for _ in source():
            await send()
    except OSError:
        len("")


async def suppressed_around() -> None:
    with contextlib.suppress(OSError):
        async for _ in source():
            await send()


async def between() -> None:
    async for _ in source():
        try:
            async for _ in source():
                await send()
        except OSError:
            len("")


@pytest.mark.parametrize(
    ("function", "loops"),
    [
        *((function, None) for function in (plain, in_finally, in_with, in_open_scope, in_handler)),
        *((function, 0) for function in (in_except, in_except_of_several, in_bare_except, in_except_star)),
        *((function, 0) for function in (in_finally_in_except, in_suppress, in_cancelled_scope)),
        *((function, 1) for function in (around, suppressed_around, between)),
    ],
)
async def test_loop_outside_of_a_handler_may_go_on(
    function: Callable[[], CoroutineType[Any, Any, None]], loops: int | None
) -> None:
    """A handler in the body of the loop may catch the exception; one around the loop cannot save it."""
    coro = function()
    coro.send(None)
    assert coro.cr_frame is not None
    try:
        assert ended_loops(coro, coro.cr_frame) == loops
    finally:
        with contextlib.suppress(BaseException):
            coro.throw(KeyboardInterrupt)
