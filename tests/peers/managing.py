"""A pytest plugin for the suites of Taskiq: applies ``managed`` to every broker that they make.

Each broker gets a fleet of its own, within the process. ``PEERS_PLACE`` is ``managed``, or ``bare`` (none of
this). Most tests of a receiver start no broker, and would run unmanaged: the fleet is started around each
message.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from taskiq.abc.broker import AsyncBroker
from taskiq.brokers.shared_broker import AsyncSharedBroker
from taskiq.receiver import Receiver

from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import managed
from otel_tasks.taskiq.broker import ManagedBroker, managed_broker_of
from otel_tasks.taskiq.execution import Execution

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine

    from taskiq import AckableMessage

TURNS = 10
"""Turns of the loop after each message."""

counted: Counter[str] = Counter()
numbers = itertools.count()


def uses() -> int:
    """How often a broker was started, a message was delivered, or a function was executed."""
    return sum(counted.values())


def pytest_configure() -> None:
    """Patch Taskiq before any test module is imported."""
    if os.environ.get("PEERS_PLACE") == "managed":
        _manage_brokers()
        _start_fleets()
        _count_uses()


def _manage_brokers() -> None:
    original = AsyncBroker.__init__

    @functools.wraps(original)
    def init(self: AsyncBroker, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self, AsyncSharedBroker):
            # It sends through another broker.
            return
        managed(self, Fleet("memory://", namespace=f"peers-{next(numbers)}", manager=TaskManager()))

    AsyncBroker.__init__ = init  # type: ignore[method-assign]  # the patch


def _start_fleets() -> None:
    original = Receiver.callback

    @functools.wraps(original)
    async def callback(self: Receiver, *args: Any, **kwargs: Any) -> None:
        managed_broker = managed_broker_of(self.broker)
        if managed_broker is None:
            await original(self, *args, **kwargs)
            return
        async with managed_broker.fleet:
            await original(self, *args, **kwargs)
            # The end of its claim is a call in the background, which the end of the fleet would cut off.
            for _ in range(TURNS):
                await asyncio.sleep(0)

    Receiver.callback = callback  # type: ignore[method-assign]  # the patch


def _count_uses() -> None:
    """Count more than executions: the suites of brokers have few, or none."""
    start, listen, run = ManagedBroker.start, ManagedBroker.listen, Execution.run

    async def counted_start(self: ManagedBroker) -> None:
        counted["starts"] += 1
        await start(self)

    async def counted_listen(self: ManagedBroker) -> AsyncGenerator[bytes | AckableMessage, None]:
        async with contextlib.aclosing(listen(self)) as messages:
            async for message in messages:
                counted["messages"] += 1
                yield message

    async def counted_run(self: Execution, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        counted["executions"] += 1
        return await run(self, make)

    ManagedBroker.start = counted_start  # type: ignore[method-assign]  # the patch
    ManagedBroker.listen = counted_listen  # type: ignore[method-assign]  # the patch
    Execution.run = counted_run  # type: ignore[method-assign]  # the patch
