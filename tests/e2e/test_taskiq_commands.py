"""Taskiq's own commands and options, with real workers under managed()."""

from __future__ import annotations

import asyncio

import pytest

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
