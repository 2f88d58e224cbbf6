"""What the worker does: it ships orders from a spool, follows a feed of rates, and reports every second."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

from opentelemetry import metrics

from examples.worker.spool import Job, Spool
from otel_tasks import ManagedTask, RestartPolicy, RetryPolicy, TaskManager, TaskPriority, current_task

log = logging.getLogger("worker")

# An order is tried three times, each time for ten seconds. Other failures are not worth another attempt.
RETRY = RetryPolicy(max_attempts=3, delay=0.2, on=(ConnectionError, TimeoutError), attempt_timeout=10.0)
# The feed may break ten times in a minute; then the process ends with exit code 1, and starts afresh.
RESTART = RestartPolicy(on="always", delay=0.2, max_failures=10, within=60.0)


class Worker:
    """All work of the process, started by `start`; the manager ends it.

    Args:
        manager: Runs everything.
        spool: Where the orders come from.
    """

    def __init__(self, manager: TaskManager, spool: Spool) -> None:
        self._manager = manager
        self._spool = spool
        self._rate: float | None = None
        self._orders: ManagedTask[None] | None = None
        self._backlog = metrics.get_meter("worker").create_gauge("worker.backlog", "{order}")

    async def start(self) -> None:
        """Start the work, and return."""
        if crashed := self._spool.recover():
            log.warning("%d orders run again: the worker before this one crashed", crashed)
        manager = self._manager
        await manager.start_service("rates", self.follow_rates, restart=RESTART, critical=True)
        await manager.start_periodic("backlog", self.measure_backlog, every=1.0)
        await manager.start_periodic("status", self.show_status, every=10.0, start=10.0)
        self._orders = await manager.start_consumer(
            "orders",
            self._spool,
            self.ship,
            concurrency=8,
            prefetch=16,  # orders that wait for a place: the most urgent one is next
            priority=priority_of,
            metadata=lambda job: {"order": job.id},
            retry=RETRY,
            on_failure=self.bury,
        )

    def not_ready(self) -> str:
        """Return why a readiness probe should fail; an empty string if the worker is ready."""
        if self._manager.closed:
            return "shutting down"
        if self._orders is None or self._rate is None:
            return "starting"
        return "".join(f"{name} gave up\n" for name in self._manager.failed_services)

    # -- orders -----------------------------------------------------------------------------------------

    async def ship(self, job: Job) -> None:
        """Make one attempt at an order.

        The last step marks the order as done, and nothing is awaited after it: a shutdown cancels it before
        that, and hands the order back, or not at all.
        """
        await ask_supplier(job.order)
        self._spool.finish(job)
        log.info("order %s shipped at %.2f", job.id, job.order["price"] * (self._rate or 1.0))

    def bury(self, job: Job, error: Exception) -> None:
        """Keep an order that has failed for good, for a person to look at."""
        self._spool.bury(job)
        log.warning("order %s is dead: %r", job.id, error)

    # -- the feed and the periodic work -----------------------------------------------------------------

    async def follow_rates(self) -> None:
        """Keep the rate up to date, for as long as the feed lasts; then the service restarts."""
        async for rate in rates():
            self._rate = rate

    async def measure_backlog(self) -> None:
        """Record how many orders wait, for an autoscaler."""
        self._backlog.set(self._spool.qsize())

    async def show_status(self) -> None:
        """Log what runs."""
        log.info("%d orders wait\n%s", self._spool.qsize(), self._manager.tree(limit=12))


def priority_of(job: Job) -> TaskPriority:
    """Return the priority that an order asks for."""
    return TaskPriority.HIGH if job.order.get("express") else TaskPriority.NORMAL


async def ask_supplier(order: dict[str, Any]) -> None:
    """Pretend to call a supplier, who takes some time and does not always answer."""
    await asyncio.sleep(order["seconds"])
    task = current_task()
    attempt = None if task is None else task.info().attempt
    if (attempt or 1) <= order.get("failures", 0):
        raise ConnectionError("the supplier does not answer")


async def rates() -> AsyncIterator[float]:
    """Pretend to be a feed of exchange rates that breaks off about every 20 seconds."""
    while random.random() < 0.975:
        yield random.uniform(1.05, 1.15)
        await asyncio.sleep(0.5)
    raise OSError("the feed broke off")
