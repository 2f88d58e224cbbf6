"""A Taskiq broker whose queue the workers of one event loop share, with acknowledgments and redelivery."""

from __future__ import annotations

import asyncio
import functools
import json
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from taskiq import AckableMessage, AsyncBroker, AsyncResultBackend, BrokerMessage, TaskiqResult
from taskiq.receiver import Receiver

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator


class Results(AsyncResultBackend[Any]):
    """Keeps results as JSON, as a server would get them."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.failures = 0
        self.questions = 0

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        """Save a result, or fail as often as the test wants."""
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the result backend is away")
        self.texts[task_id] = json.dumps(result.model_dump(mode="json"))

    async def is_result_ready(self, task_id: str) -> bool:
        """Return whether there is a result."""
        self.questions += 1
        return task_id in self.texts

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
        """Return a result."""
        return TaskiqResult[Any].model_validate(json.loads(self.texts[task_id]))


class SharedQueue:
    """The server: messages that wait, and those that were delivered and not acknowledged."""

    def __init__(self) -> None:
        self.results = Results()
        self.waiting: deque[tuple[int, bytes]] = deque()
        self.delivered: dict[int, tuple[object, bytes]] = {}
        self.acknowledged = 0
        self._number = 0
        self._arrived = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Add a message."""
        self._number += 1
        self.waiting.append((self._number, data))
        self._arrived.set()

    async def take(self, consumer: object) -> tuple[int, bytes]:
        """Wait for a message, and deliver it."""
        while not self.waiting:
            self._arrived.clear()
            await self._arrived.wait()
        number, data = self.waiting.popleft()
        self.delivered[number] = (consumer, data)
        return number, data

    async def acknowledge(self, number: int) -> None:
        """Forget a message."""
        if self.delivered.pop(number, None) is not None:
            self.acknowledged += 1

    def disconnect(self, consumer: object) -> None:
        """Let what was delivered to a consumer wait again."""
        for number, (owner, data) in list(self.delivered.items()):
            if owner is consumer:
                del self.delivered[number]
                self.waiting.appendleft((number, data))
        self._arrived.set()

    def deliver_twice(self) -> None:
        """Let all that was delivered wait again, while its consumers still work."""
        for _, data in self.delivered.values():
            self.put(data)


class QueueBroker(AsyncBroker):
    """A broker on a shared queue."""

    def __init__(self, queue: SharedQueue) -> None:
        super().__init__()
        self.queue = queue
        self.with_result_backend(queue.results)

    async def kick(self, message: BrokerMessage) -> None:
        """Send a message."""
        self.queue.put(message.message)

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Deliver messages."""
        while True:
            number, data = await self.queue.take(self)
            yield AckableMessage(data=data, ack=functools.partial(self.queue.acknowledge, number))

    async def shutdown(self) -> None:
        """Give back what was not acknowledged."""
        await super().shutdown()
        self.queue.disconnect(self)


@asynccontextmanager
async def working(broker: AsyncBroker, *, at_once: int = 100, **options: Any) -> AsyncIterator[asyncio.Event]:
    """Run a worker for the block, as `taskiq worker` does; yields the event that stops it."""
    broker.is_worker_process = True
    stop = asyncio.Event()
    receiver = Receiver(broker, max_async_tasks=at_once, **options)
    listening = asyncio.create_task(receiver.listen(stop))
    try:
        yield stop
    finally:
        stop.set()
        await listening
        await broker.shutdown()
