"""No cancellation of a remote task is lost: a thousand in each situation, on real servers and workers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks.taskiq import labels

from .remote_shop import WITHIN, Shop, calling, own_shop, shop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from examples.redis_server import Redis

    from .remote_app import App

__all__ = ["own_shop", "shop"]

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

MANY = 1000


def sent_by(app: App, then: Callable[[], object] = lambda: None) -> list[str]:
    """Return a list that gets each message that the broker has taken.

    Args:
        app: The sender.
        then: Called in the task that has sent it.
    """
    sent: list[str] = []
    kick = app.broker.kick

    async def recorded(message: Any) -> None:
        await kick(message)
        sent.append(message.task_id)
        then()

    vars(app.broker)["kick"] = recorded
    return sent


def cancel_sender() -> None:
    """Cancel the task that sends."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel calls, and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)


async def nothing_is_left(shop: Shop, app: App) -> None:
    """Wait until the queue is empty, and no cancelled task runs."""
    # Behind everything in the queue.
    await asyncio.wait_for(app.call("nothing", 1), 4 * WITHIN)
    await shop.until(lambda: len(shop.events("started", "many")) == len(shop.events("cancelled", "many")))
    assert not shop.events("finished", "many")


async def test_thousand_cancels_right_after_the_sending(shop: Shop) -> None:
    """Of 1,000 calls that are cancelled as soon as the broker has taken them, none keeps running."""
    shop.worker()
    async with calling(shop) as app:
        await app.call("nothing", 1)
        sent = sent_by(app, cancel_sender)
        tasks = [app.manager.create_task(app.call("sleep", "many", 600)) for _ in range(MANY)]
        await asyncio.wait(tasks)
        assert len(sent) == MANY
        assert all(task.cancelled() for task in tasks)
        del vars(app.broker)["kick"]
        await nothing_is_left(shop, app)


async def test_thousand_cancels_before_any_worker_is_up(shop: Shop) -> None:
    """Of 1,000 calls that are cancelled before a worker starts, none starts on that worker."""
    async with calling(shop) as app:
        sent = sent_by(app)
        tasks = [app.manager.create_task(app.call("sleep", "many", 600)) for _ in range(MANY)]
        await shop.until(lambda: len(sent) == MANY)
        await cancel_all(tasks)
        await app.fleet.link.flush()
        shop.worker()
        await nothing_is_left(shop, app)
    assert not shop.events("started", "many")


async def test_thousand_cancels_behind_a_thousand_others(shop: Shop) -> None:
    """Of 1,000 calls that are cancelled behind 1,000 other messages, none starts, and all others run."""
    shop.worker("--max-async-tasks", "2")
    async with calling(shop) as app:
        # They hold the worker.
        first = [app.manager.create_task(app.call("sleep", f"first{n}", 600)) for n in range(2)]
        for n in range(2):
            await shop.until_event("started", f"first{n}")
        await asyncio.gather(*(app.tasks["ordered"].kiq(f"front {n}") for n in range(MANY)))
        front = {f"front {n}" for n in range(MANY)}
        sent = sent_by(app)
        tasks = [app.manager.create_task(app.call("sleep", "many", 600)) for _ in range(MANY)]
        await shop.until(lambda: len(sent) == MANY)
        await cancel_all(tasks)
        assert len(shop.events("started")) == 2
        await cancel_all(first)
        await nothing_is_left(shop, app)
        # Redis Streams deliver what waits for seconds again, at the end of the queue.
        await shop.until(lambda: {line["key"] for line in shop.events("started")} >= front)
    assert not shop.events("started", "many")


async def test_thousand_messages_of_a_group_that_is_cancelled(shop: Shop) -> None:
    """One cancellation of a group reaches 1,000 messages that wait, and spares what is sent afterwards."""
    async with calling(shop) as app:
        kicker = app.tasks["ordered"].kicker().with_labels(**labels(group="tenant.acme.mail"))
        await asyncio.gather(*(kicker.kiq("many") for _ in range(MANY)))
        await app.fleet.cancel_group("tenant.acme", timeout=WITHIN)
        await kicker.kiq("again")
        shop.worker()
        await shop.until_event("started", "again")
        await nothing_is_left(shop, app)
    assert not shop.events("started", "many")


async def test_thousand_cancels_while_redis_restarts(own_shop: Shop, own_redis: Redis) -> None:
    """Of 1,000 calls that are cancelled while Redis restarts and loses its data, none keeps running."""
    own_shop.worker("--max-async-tasks", "50")
    async with calling(own_shop) as app:
        sent = sent_by(app)
        tasks = [app.manager.create_task(app.call("sleep", "many", 600)) for _ in range(MANY)]
        await own_shop.until(lambda: len(sent) == MANY)
        await own_shop.until_event("started", "many", 50)
        own_redis.kill()
        await cancel_all(tasks)
        # While a worker cannot reach Redis, no cancellation reaches its tasks.
        assert not own_shop.events("cancelled", "many")
        own_redis.start()
        await nothing_is_left(own_shop, app)
