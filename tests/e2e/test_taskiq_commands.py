"""Taskiq's own commands and options, with real workers under managed()."""

from __future__ import annotations

import asyncio

import aio_pika
import pytest
import redis.asyncio as redis

from .remote_shop import WITHIN, Shop, calling, shop

__all__ = ["shop"]

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


async def test_scheduler_sends_managed_tasks(shop: Shop) -> None:
    """`taskiq scheduler` is a node of the fleet; what it sends runs managed, in the group of the schedule."""
    shop.worker()
    shop.scheduler()
    await shop.until_event("described", "tick", 2)
    assert [line["task"] for line in shop.events("described", "tick")][:2] == [["describe", "reports"]] * 2
    async with calling(shop) as app:
        assert len(await app.fleet.nodes()) == 3


async def test_process_pool_runs_plain_functions_unmanaged(shop: Shop) -> None:
    """With --use-process-pool, a plain function runs in a process of its own; coroutines stay managed."""
    worker = shop.worker("--use-process-pool", "--max-process-pool-processes", "1")
    async with calling(shop) as app:
        await app.call("describe", "page")
        assert await app.call("sleep", "other", 0.1) == "other"
    (described,), (started,) = shop.events("described", "page"), shop.events("started", "other")
    assert described["task"] is None
    assert described["pid"] not in (started["pid"], worker.pid)


@pytest.mark.parametrize("ack_type", ["when_received", "when_executed", "when_saved"])
async def test_stopped_worker_with_options_of_its_receiver(shop: Shop, ack_type: str) -> None:
    """Only a message that was acknowledged when it was received is lost with a worker that stops."""
    options = ["--max-async-tasks", "2", "--max-prefetch", "1", "--wait-tasks-timeout", "5"]
    one = shop.worker(*options, "--ack-type", ack_type)
    async with calling(shop) as app:
        task = app.manager.create_task(app.call("sleep", "page", 5))
        await shop.until_event("started", "page")
        one.terminate()
        assert one.wait(WITHIN) == 0
        shop.worker(*options)
        if ack_type == "when_received":
            await asyncio.wait([task], timeout=WITHIN)
            assert task.cancelled()
        else:
            assert await asyncio.wait_for(task, WITHIN) == "page"


async def test_worker_with_manual_acknowledgment_leaves_no_cancelled_message(shop: Shop) -> None:
    """Neither one that was cancelled in the queue, nor one whose function has not acknowledged it."""
    async with calling(shop) as app:
        early = app.manager.create_task(app.call("sleep", "early", 600))
        await _until_left(shop, 1)
        early.cancel("not needed")
        await asyncio.wait([early])
        worker = shop.worker("--ack-type", "manual")
        late = app.manager.create_task(app.call("sleep", "late", 600))
        await shop.until_event("started", "late")
        late.cancel("not needed")
        await asyncio.wait([late])
        await shop.until_event("cancelled", "late")
        # The worker saves the result first.
        await asyncio.sleep(1.0)
        shop.kill(worker)
        await _until_left(shop, 0)
    assert not shop.events("started", "early")


async def _until_left(shop: Shop, count: int) -> None:
    """Wait until so many messages are left."""
    async with asyncio.timeout(WITHIN):
        while await _left(shop) != count:  # noqa: ASYNC110 - the broker sends no event
            await asyncio.sleep(0.1)


async def _left(shop: Shop) -> int:
    """How many messages wait, or were delivered to a worker that is gone."""
    name = shop.settings.namespace
    if shop.settings.broker == "redis":
        async with redis.Redis.from_url(shop.settings.redis) as client:
            groups = await client.xinfo_groups(f"{name}.normal")
            return sum(int(group["pending"] + (group["lag"] or 0)) for group in groups)
    connection = await aio_pika.connect(shop.settings.broker)
    async with connection:
        queue = await (await connection.channel()).declare_queue(f"{name}.tasks", passive=True)
        return queue.declaration_result.message_count or 0
