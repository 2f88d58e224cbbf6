"""A worker: jobs by priority, eight at a time, with retries, beside a feed and work every second."""

import asyncio
import itertools
import logging
import random
from dataclasses import dataclass

from otel_tasks import RestartPolicy, RetryPolicy, TaskManager, TaskPriority, current_cancel_event, run

log = logging.getLogger("worker")
manager = TaskManager("worker", grace=10.0)


@dataclass
class Job:
    """One item of the queue."""

    id: int
    priority: TaskPriority


queue: asyncio.Queue[Job] = asyncio.Queue(maxsize=100)


async def handle(job: Job) -> None:
    await asyncio.sleep(random.uniform(0.1, 0.5))
    if random.random() < 0.3:
        raise ConnectionError("the supplier does not answer")
    log.info("job %d done", job.id)


def bury(job: Job, error: Exception) -> None:
    log.warning("job %d dead: %s", job.id, error)


async def produce() -> None:
    stopping = current_cancel_event()
    for number in itertools.count():
        await queue.put(Job(number, random.choice(list(TaskPriority))))
        await asyncio.sleep(0.03)
        if stopping.is_set():
            return


async def feed() -> None:
    await asyncio.sleep(random.uniform(0.5, 5.0))
    raise OSError("the feed broke")


async def tick() -> None:
    log.info("tick")


async def status() -> None:
    log.info("%d jobs in the queue\n%s", queue.qsize(), manager.tree(limit=12))


async def main() -> None:
    await manager.start_consumer(
        "jobs", queue, handle, concurrency=8, prefetch=16, drain="all",
        retry=RetryPolicy(delay=0.2, on=ConnectionError), timeout=30.0, on_failure=bury,
        priority=lambda job: job.priority, metadata=lambda job: {"job": job.id},
    )  # fmt: skip
    await manager.start_service("produce", produce, drains=True)
    await manager.start_service("feed", feed, restart=RestartPolicy(delay=0.2, max_failures=None))
    await manager.start_periodic("tick", tick, every=1.0)
    await manager.start_periodic("status", status, every=5.0)
    await manager.join()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run(main(), manager=manager)
