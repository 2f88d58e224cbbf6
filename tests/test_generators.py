"""Which generators a suspended task iterates."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks._core.frames import suspended_chain
from otel_tasks._core.generators import is_open, iterated_in, running_in

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def numbers() -> AsyncGenerator[int]:
    yield 1
    yield 2


async def passing_on() -> AsyncGenerator[int]:
    async for number in numbers():
        yield number


async def waiting() -> AsyncGenerator[int]:
    async for number in numbers():
        await asyncio.sleep(60)
        yield number


async def consume(generator: AsyncGenerator[int]) -> None:
    async for _ in generator:
        await asyncio.sleep(60)


async def consume_unnamed() -> None:
    async for _ in numbers():
        await asyncio.sleep(60)


async def consume_nested() -> None:
    async for _ in passing_on():
        await asyncio.sleep(60)


async def consume_waiting() -> None:
    async for _ in waiting():
        pass


async def consume_from_a_closure() -> None:
    generator = numbers()

    async def consume_it() -> None:
        async for _ in generator:
            await asyncio.sleep(60)

    await consume_it()


async def hold() -> None:
    generator = numbers()
    await anext(generator)
    await asyncio.sleep(60)
    await generator.aclose()


async def hold_in_an_attribute() -> None:
    holder = [numbers()]
    await anext(holder[0])
    await asyncio.sleep(60)
    await holder[0].aclose()


async def finish() -> None:
    async for _ in numbers():
        pass
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("consumer", "iterated", "running"),
    [
        pytest.param(lambda: consume(numbers()), ["numbers"], [], id="variable"),
        pytest.param(consume_unnamed, ["numbers"], [], id="only on the stack"),
        pytest.param(consume_nested, ["numbers", "passing_on"], [], id="nested, innermost first"),
        pytest.param(consume_waiting, ["numbers"], ["waiting"], id="the outer one waits"),
        pytest.param(consume_from_a_closure, ["numbers"], [], id="closure"),
        pytest.param(hold, [], [], id="not iterated"),
        pytest.param(hold_in_an_attribute, [], [], id="not even a variable"),
        pytest.param(finish, [], [], id="finished"),
    ],
)
async def test_generators_on_the_stack_of_a_suspended_task_are_found(
    consumer: Any, iterated: list[str], running: list[str]
) -> None:
    """An `async for` is found by its frame's stack; a generator in a variable alone is not iterated."""
    task = asyncio.create_task(consumer())
    await asyncio.sleep(1)
    chain = list(suspended_chain(task.get_coro()))
    at_yield, inside = iterated_in(chain), running_in(chain)

    assert [generator.__name__ for generator in at_yield] == iterated
    assert [generator.__name__ for generator in inside] == running
    assert all(map(is_open, at_yield))
    assert not any(map(is_open, inside))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for generator in at_yield:
        await generator.aclose()


def test_sync_generator_is_open_at_its_yield_alone() -> None:
    """A generator that has not started, or has ended, needs no closing."""
    generator = (number for number in (1,))
    assert not is_open(generator)
    next(generator)
    assert is_open(generator)
    generator.close()
    assert not is_open(generator)
