"""The module that the API and the workers share: the fleet, the broker, and the tasks.

    export REDIS_URL=redis://127.0.0.1:6379/0 AMQP_URL=amqp://guest:guest@127.0.0.1/
    taskiq worker examples.fleet.tasks:broker

Without these variables, everything runs in one process: the API runs the tasks itself.
"""

import asyncio
import os
from typing import Any

from taskiq import AsyncBroker, InMemoryBroker
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.queue import Queue, QueueType
from taskiq_redis import RedisAsyncResultBackend

from examples.fleet.telemetry import set_up_telemetry
from otel_tasks import current_task
from otel_tasks.fleet import Fleet
from otel_tasks.taskiq import managed, rabbitmq_priorities

REDIS_URL = os.environ.get("REDIS_URL", "memory://")
AMQP_URL = os.environ.get("AMQP_URL")

set_up_telemetry("library")
fleet = Fleet(REDIS_URL, namespace="library")


def make_broker() -> AsyncBroker:
    """RabbitMQ with a queue that has priorities, and results that Redis keeps for a minute."""
    if AMQP_URL is None:
        return managed(InMemoryBroker(), fleet)
    # A quorum queue, the default, has only two levels.
    queue = Queue(name="library", type=QueueType.CLASSIC, max_priority=9)
    results = RedisAsyncResultBackend[Any](REDIS_URL, result_ex_time=60)
    broker = AioPikaBroker(AMQP_URL, task_queues=[queue]).with_result_backend(results)
    return managed(broker, fleet, priorities=rabbitmq_priorities(9))


broker = make_broker()


@broker.task
async def render(page: int, seconds: float) -> str:
    """Render a page."""
    await asyncio.sleep(seconds)
    return f"page {page}"


@broker.task
async def import_rows(rows: int) -> int:
    """Import rows, ten per second, and report the progress."""
    task = current_task()
    assert task is not None
    for row in range(rows):
        await asyncio.sleep(0.1)
        task.progress.update(done=row + 1, total=rows, message="importing")
    return rows
