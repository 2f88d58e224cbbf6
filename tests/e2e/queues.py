"""A sender and a worker in one process, on each of the brokers that users have."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from taskiq import AsyncBroker, InMemoryBroker
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue, QueueType
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from otel_tasks import TaskManager, TaskPriority
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import managed, rabbitmq_priorities, stream_priorities
from tests.shared_queue import working

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from taskiq import AsyncTaskiqDecoratedTask

    from otel_tasks.testing import SpanRecorder


class Side:
    """One process, as far as Taskiq and the fleet know: a manager, a fleet, and a broker."""

    def __init__(self, kind: str, urls: dict[str, str], name: str, spans: SpanRecorder | None) -> None:
        provider = None if spans is None else spans.provider
        self.manager = TaskManager(grace=0.0, tracer_provider=provider)
        self.fleet = Fleet(urls.get("redis", "memory://"), namespace=name, manager=self.manager)
        self.broker = getattr(self, f"_{kind}")(urls, name)

    def _memory(self, urls: dict[str, str], name: str) -> AsyncBroker:
        return managed(InMemoryBroker(), self.fleet)

    def _redis(self, urls: dict[str, str], name: str) -> AsyncBroker:
        levels = {TaskPriority.NORMAL: f"{name}.normal", TaskPriority.HIGH: f"{name}.high"}
        broker = RedisStreamBroker(
            urls["redis"],
            queue_name=f"{name}.high",
            additional_streams={f"{name}.normal": ">"},
            consumer_group_name=name,
            consumer_id="0",
            xread_block=100,
            xread_count=10,
        )
        broker = broker.with_result_backend(_results(urls))
        return managed(broker, self.fleet, priorities=stream_priorities(levels))

    def _rabbitmq(self, urls: dict[str, str], name: str) -> AsyncBroker:
        broker = AioPikaBroker(
            urls["rabbitmq"],
            exchange=Exchange(name=f"{name}.exchange"),
            task_queues=[Queue(name=f"{name}.tasks", type=QueueType.CLASSIC, max_priority=9)],
            dead_letter_queue=Queue(name=f"{name}.dead"),
            # For the label `delay`, which SmartRetryMiddleware sets.
            delay_queue=Queue(name=f"{name}.delay", type=QueueType.CLASSIC),
            # More would be in the worker, where no priority overtakes them.
            qos=2,
        )
        broker = broker.with_result_backend(_results(urls))
        return managed(broker, self.fleet, priorities=rabbitmq_priorities(9))


def _results(urls: dict[str, str]) -> RedisAsyncResultBackend[Any]:
    return RedisAsyncResultBackend(urls["redis"], result_ex_time=60)


class Pair:
    """A sender and a worker; with `InMemoryBroker`, which works itself, one is both."""

    def __init__(self, kind: str, urls: dict[str, str], name: str, spans: SpanRecorder | None = None) -> None:
        self.kind = kind
        self.sender = Side(kind, urls, name, spans)
        self.worker = self.sender if kind == "memory" else Side(kind, urls, name, spans)

    def task(self, function: Callable[..., Any], **labels: Any) -> AsyncTaskiqDecoratedTask[..., Any]:
        """Declare a task on both sides; that of the sender."""
        # Taskiq renames a function that it decorates.
        name = f"tests:{function.__name__.partition('__')[0]}"
        if self.worker is not self.sender:
            self.worker.broker.task(task_name=name, **labels)(function)
        declared: AsyncTaskiqDecoratedTask[..., Any] = self.sender.broker.task(task_name=name, **labels)(
            function
        )
        return declared

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncGenerator[None]:
        """Start both; the options are those of the receiver."""
        await self.sender.broker.startup()
        try:
            if self.kind == "memory":
                yield
            else:
                async with working(self.worker.broker, **options):
                    yield
        finally:
            await self.sender.manager.shutdown()
            await self.sender.broker.shutdown()
