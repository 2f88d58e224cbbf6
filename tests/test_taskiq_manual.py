"""Taskiq with --ack-type manual: functions acknowledge what they complete, and managed() the rest."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from taskiq import Context, InMemoryBroker, TaskiqDepends
from taskiq.acks import AcknowledgeType

from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import labels, managed, remote
from tests.shared_queue import SharedQueue, working
from tests.test_taskiq import Node, forever_of, started

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MANUAL: Any = AcknowledgeType.MANUAL


class CountedQueue(SharedQueue):
    """Counts each acknowledgment, second ones too, which RabbitMQ answers by closing the channel."""

    def __init__(self) -> None:
        super().__init__()
        self.acks: list[int] = []
        self.fails = False

    async def acknowledge(self, number: int) -> None:
        """Acknowledge a message, or fail."""
        if self.fails:
            raise ConnectionError("the channel is closed")
        self.acks.append(number)
        await super().acknowledge(number)


@asynccontextmanager
async def manual_worker(
    queue: SharedQueue, *declare: Callable[[Node], Any], ack_type: Any = MANUAL
) -> AsyncIterator[Node]:
    """A worker whose functions acknowledge."""
    worker = Node(queue)
    for make in declare:
        worker.task(make(worker))
    async with working(worker.broker, ack_type=ack_type):
        yield worker


@asynccontextmanager
async def sender(queue: SharedQueue) -> AsyncIterator[Node]:
    """A node that only sends."""
    node = Node(queue)
    async with started(node):
        yield node


def careful_of(node: Node) -> Callable[..., Any]:
    """A function that acknowledges its message when it has done its work."""

    async def careful(seconds: float = 0.0, context: Context = TaskiqDepends()) -> str:  # noqa: B008 - Taskiq's way
        node.log.append("started")
        await asyncio.sleep(seconds)
        await context.ack()
        return "done"

    return careful


# -- messages that end without their function -------------------------------------------------------


async def test_message_that_is_cancelled_before_it_runs_is_acknowledged() -> None:
    """Its function never runs, and nothing else could acknowledge it: it would run an hour later."""
    queue = CountedQueue()
    async with sender(queue) as api:
        call = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        call.cancel()
        await asyncio.wait([call])
        async with manual_worker(queue, forever_of) as worker:
            await asyncio.sleep(1)
            assert (worker.log, queue.acks, queue.delivered) == ([], [1], {})
    assert not queue.waiting


async def test_message_whose_deadline_has_passed_is_acknowledged() -> None:
    """The same holds for one that no worker took in time."""
    queue = CountedQueue()
    async with sender(queue) as api:
        await api.task(forever_of(api)).kicker().with_labels(**labels(timeout=1)).kiq()
        await asyncio.sleep(2)
        async with manual_worker(queue, forever_of) as worker:
            await asyncio.sleep(1)
            assert (worker.log, queue.acks) == ([], [1])


async def test_message_that_is_cancelled_while_it_runs_is_acknowledged() -> None:
    """The cancellation is final, whether the function has a `finally` or not."""
    queue = CountedQueue()
    async with sender(queue) as api, manual_worker(queue, forever_of) as worker:
        call = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        call.cancel()
        await asyncio.wait([call])
        await asyncio.sleep(1)
        assert (worker.log[0], queue.acks) == ("started", [1])


@pytest.mark.parametrize("ack_type", [AcknowledgeType.WHEN_SAVED, AcknowledgeType.WHEN_EXECUTED, MANUAL])
async def test_duplicates_are_acknowledged_once_with_the_message_that_runs(ack_type: Any) -> None:
    """One that waits for its turn, one that comes while it waits, and one that comes afterwards."""
    queue = CountedQueue()
    worker = partial(manual_worker, queue, careful_of, ack_type=ack_type)
    async with sender(queue) as api, worker() as one:
        call = api.manager.create_task(remote(api.task(careful_of(api)), 20))
        await asyncio.sleep(1)
        async with worker() as two:
            for _ in range(2):
                queue.deliver_twice()
                await asyncio.sleep(1)
            _, message = queue.delivered[1]
            assert await call == "done"
            queue.put(message)
            await asyncio.sleep(5)
            assert (sorted(queue.acks), queue.delivered) == ([1, 2, 3, 4, 5], {})
    assert [*one.log, *two.log] == ["started"]


# -- messages that their function has -----------------------------------------------------------------


async def test_function_acknowledges_its_message_once() -> None:
    """Neither its end nor a cancellation afterwards does it a second time."""

    def lingering_of(node: Node) -> Callable[..., Any]:
        async def lingering(context: Context = TaskiqDepends()) -> None:  # noqa: B008 - Taskiq's way
            await context.ack()
            await asyncio.sleep(3600)

        return lingering

    queue = CountedQueue()
    async with sender(queue) as api, manual_worker(queue, careful_of, lingering_of):
        assert await remote(api.task(careful_of(api))) == "done"
        call = api.manager.create_task(remote(api.task(lingering_of(api))))
        await asyncio.sleep(1)
        assert queue.acks == [1, 2]
        call.cancel()
        await asyncio.wait([call])
        await asyncio.sleep(1)
        assert queue.acks == [1, 2]


async def test_message_that_its_function_does_not_acknowledge_runs_again() -> None:
    """It has ended in whatever way the function wanted, and is not taken for one that was executed."""

    def forgetful_of(node: Node) -> Callable[..., Any]:
        async def forgetful() -> None:
            node.log.append("started")

        return forgetful

    queue = CountedQueue()
    async with sender(queue) as api, manual_worker(queue, forgetful_of) as worker:
        await remote(api.task(forgetful_of(api)))
        await asyncio.sleep(1)
        assert (queue.acks, len(queue.delivered)) == ([], 1)
        queue.deliver_twice()
        await asyncio.sleep(1)
        assert (worker.log, queue.acks) == (["started"] * 2, [])


async def test_message_of_a_worker_that_stops_is_not_acknowledged() -> None:
    """Another worker takes it, as with the other types."""
    queue = CountedQueue()
    async with sender(queue) as api:
        call = api.manager.create_task(remote(api.task(careful_of(api)), 5))
        async with manual_worker(queue, careful_of) as one:
            await asyncio.sleep(1)
            await one.manager.shutdown(grace=0.0)
        assert queue.acks == []
        async with manual_worker(queue, careful_of) as two:
            assert await call == "done"
        assert (one.log, two.log, queue.acks) == (["started"], ["started"], [1])


async def test_acknowledgment_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The broker delivers the message again, and its cancellation still holds."""
    queue = CountedQueue()
    async with sender(queue) as api, manual_worker(queue, forever_of) as worker:
        call = api.manager.create_task(remote(api.task(forever_of(api))))
        await asyncio.sleep(1)
        queue.fails = True
        with caplog.at_level(logging.WARNING, "otel_tasks"):
            call.cancel()
            await asyncio.wait([call])
            await asyncio.sleep(1)
        assert "could not be acknowledged" in caplog.text
        queue.fails = False
        queue.deliver_twice()
        await asyncio.sleep(1)
        assert (worker.log.count("started"), queue.acks) == (1, [2])


async def test_task_of_a_broker_in_memory_does_not_acknowledge_the_message_of_its_caller() -> None:
    """Its message has no acknowledgment: it is handled in a copy of the context of another one's."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager("inner", grace=0.0))
    inner = managed(InMemoryBroker(), fleet)

    @inner.task
    async def endless() -> None:
        await asyncio.sleep(3600)

    def outer_of(node: Node) -> Callable[..., Any]:
        async def outer() -> None:
            node.log.append("started")
            call = fleet.manager.create_task(remote(endless))
            await asyncio.sleep(1)
            call.cancel()
            await asyncio.wait([call])
            await asyncio.sleep(1)

        return outer

    queue = CountedQueue()
    async with sender(queue) as api, manual_worker(queue, outer_of) as worker:
        await inner.startup()
        await remote(api.task(outer_of(api)))
        assert (worker.log, queue.acks) == (["started"], [])
        await inner.shutdown()
