"""Remote tasks on real servers: a fleet on Redis, messages on Redis Streams or RabbitMQ, and real workers."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from examples.otlp_receiver import receiver
from tests.processes import free_port
from tests.redis_server import redis_in, running

from .remote_app import Settings
from .remote_shop import WITHIN, Shop, calling, own_shop, shop, until_up

if TYPE_CHECKING:
    from pathlib import Path

    from examples.otlp_receiver import Received
    from examples.rabbitmq_server import RabbitMQ
    from examples.redis_server import Redis
    from examples.trace_tree import Span

__all__ = ["own_shop", "shop"]

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

# -- calls ----------------------------------------------------------------------------------------


async def test_call_returns_raises_and_is_cancelled(shop: Shop) -> None:
    """A result, an error with its traceback, and a cancellation with its cause cross the processes."""
    shop.worker()
    async with calling(shop) as app:
        assert await app.call("nothing", 7) == 7
        with pytest.raises(LookupError, match="no such page") as caught:
            await app.call("fail")
        assert "in _fail" in caught.value.__notes__[0]
        task = app.manager.create_task(app.call("sleep", "long", 600), name="import-17")
        await shop.until_event("started", "long")
        task.cancel("stopped by the user")
        await asyncio.wait([task])
        await shop.until_event("cancelled", "long")
        cause = shop.events("cancelled", "long")[0]["cause"]
        assert (cause["kind"], cause["message"]) == ("explicit", "stopped by the user")


async def test_cancel_by_name_from_another_process(shop: Shop) -> None:
    """A fleet's cancel_task() ends the call and its execution."""
    shop.worker()
    caller = shop.caller("sleep", "long", "600")
    await shop.until_event("started", "long")
    async with calling(shop) as app:
        report = await app.fleet.cancel_group("taskiq", "maintenance")
        assert (report.asked, report.ended) == (1, 1)
    await shop.until_event("cancelled", "long")
    await shop.until_event("call cancelled", "long")
    assert caller.wait(WITHIN) is not None


async def test_plain_function_sees_its_event(shop: Shop) -> None:
    """A function in a thread of the worker runs until its cancel event is set."""
    shop.worker()
    async with calling(shop) as app:
        task = app.manager.create_task(app.call("spin", "spin"))
        await shop.until_event("started", "spin")
        task.cancel()
        await shop.until_event("saw the event", "spin")


# -- traces ---------------------------------------------------------------------------------------


async def test_one_trace_from_the_request_to_the_last_worker(shop: Shop) -> None:
    """Request, local task, worker, and what that worker calls: one trace, of two services."""
    port = free_port()
    with receiver() as received:
        shop.trace_to(received.endpoint)
        shop.worker()
        shop.service(port)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WITHIN) as client:
            await until_up(client)
            answer = await client.get("/book/page", params={"seconds": 0.1})
            assert answer.json() == ["page.inner"]
            await asyncio.to_thread(received.wait_for, lambda found: len(_tasks(found)) >= 3, timeout=WITHIN)
            await asyncio.to_thread(received.wait_for, _request, timeout=WITHIN)
        request = _request(received)
        assert request is not None
        spans = {span.span_id: span for span in received.spans(request.trace_id)}
        assert _way(spans, _deepest(spans)) == [
            ("api", "GET /book/{key}"),
            # FastAPI's own.
            ("api", "fastapi.endpoint"),
            ("api", "book"),
            ("worker", "book"),
            ("worker", "sleep"),
        ]
        outcomes = [span.attributes["otel_tasks.task.outcome"] for span in _tasks(received)]
        assert outcomes == ["success"] * 3


async def test_hang_up_reaches_the_last_worker(shop: Shop) -> None:
    """When the request's client hangs up, everything below it ends with client_disconnect on its span."""
    port = free_port()
    with receiver() as received:
        shop.trace_to(received.endpoint)
        shop.worker()
        shop.service(port)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WITHIN) as client:
            await until_up(client)
            call = asyncio.create_task(client.get("/book/page", params={"seconds": 600}))
            await shop.until_event("started", "page.inner")
            call.cancel()
            await asyncio.wait([call])
        await shop.until_event("cancelled", "page.inner")
        assert shop.events("cancelled", "page.inner")[0]["cause"]["kind"] == "client_disconnect"
        await asyncio.to_thread(received.wait_for, lambda found: len(_tasks(found)) >= 3, timeout=WITHIN)
        for span in _tasks(received):
            assert span.attributes["otel_tasks.task.outcome"] == "cancelled", span.name
            assert span.attributes["otel_tasks.cancel.reason"] == "client_disconnect", span.name


def _tasks(received: Received) -> list[Span]:
    return [span for span in received.spans() if "otel_tasks.task.outcome" in span.attributes]


def _request(received: Received) -> Span | None:
    return next((span for span in received.spans() if span.name == "GET /book/{key}"), None)


def _deepest(spans: dict[str, Span]) -> Span:
    return max(spans.values(), key=lambda span: len(_way(spans, span)))


def _way(spans: dict[str, Span], span: Span | None) -> list[tuple[str, str]]:
    """The services and names from the root to a span."""
    way: list[tuple[str, str]] = []
    while span is not None:
        way.insert(0, (span.service, span.name))
        span = spans.get(span.parent_id or "")
    return way


# -- processes end --------------------------------------------------------------------------------


async def test_killed_worker_is_replaced(shop: Shop) -> None:
    """A task whose worker is killed in the middle is finished by another one, once at a time."""
    one = shop.worker()
    async with calling(shop) as app:
        task = app.manager.create_task(app.call("sleep", "page", 3))
        await shop.until_event("started", "page")
        shop.kill(one)
        app.note("killed", "page")
        shop.worker()
        assert await asyncio.wait_for(task, WITHIN) == "page"
    assert len({line["pid"] for line in shop.events("started", "page")}) == 2
    assert not shop.overlaps("page")


async def test_remote_tasks_of_a_killed_caller_end(shop: Shop) -> None:
    """When the calling process is killed, its remote tasks are cancelled within seconds: host_lost."""
    shop.worker()
    caller = shop.caller("sleep", "page", "600")
    await shop.until_event("started", "page")
    await asyncio.sleep(3)
    assert not shop.events("cancelled", "page")
    shop.kill(caller)
    killed = time.monotonic()
    await shop.until_event("cancelled", "page")
    assert time.monotonic() - killed < 15
    assert shop.events("cancelled", "page")[0]["cause"]["kind"] == "host_lost"


async def test_stopped_worker_leaves_its_tasks_to_another(shop: Shop) -> None:
    """A worker that gets SIGTERM cancels its tasks after the grace, and another one runs them."""
    one = shop.worker()
    async with calling(shop) as app:
        task = app.manager.create_task(app.call("sleep", "page", 5))
        await shop.until_event("started", "page")
        one.terminate()
        assert one.wait(WITHIN) == 0
        (line,) = shop.events("cancelled", "page")
        assert line["cause"]["kind"] == "shutdown"
        assert not task.done()
        shop.worker()
        assert await asyncio.wait_for(task, WITHIN) == "page"


async def test_stopped_caller_cancels_its_calls(shop: Shop) -> None:
    """A caller that gets SIGTERM takes its remote tasks with it, with the cause shutdown."""
    shop.worker()
    caller = shop.caller("sleep", "page", "600")
    await shop.until_event("started", "page")
    caller.terminate()
    await shop.until_event("cancelled", "page")
    assert shop.events("cancelled", "page")[0]["cause"]["kind"] == "shutdown"


# -- duplicates -----------------------------------------------------------------------------------


async def test_message_that_is_sent_twice_runs_once(shop: Shop) -> None:
    """Copies of a message, to two workers, run once."""
    shop.worker()
    shop.worker()
    async with calling(shop) as app:
        kick = app.broker.kick

        async def kick_three_times(message: Any) -> None:
            for _ in range(3):
                await kick(message)

        await app.call("nothing", 1)
        vars(app.broker)["kick"] = kick_three_times
        assert await app.call("sleep", "page", 3) == "page"
        vars(app.broker)["kick"] = kick
        # After the copies.
        await asyncio.sleep(3)
    assert len(shop.events("started", "page")) == 1


async def test_blocked_loop_keeps_its_claim(shop: Shop) -> None:
    """A worker whose loop is blocked for 8 s keeps its claim: no other one runs the task."""
    shop.worker()
    async with calling(shop) as app:
        task = app.manager.create_task(app.call("block", "page", 8))
        await shop.until_event("started", "page")
        shop.worker()
        assert await asyncio.wait_for(task, WITHIN) == "page"
    assert len(shop.events("started", "page")) == 1


# -- servers --------------------------------------------------------------------------------------


async def test_task_goes_on_while_redis_is_paused(own_shop: Shop, own_redis: Redis) -> None:
    """When the fleet's Redis pauses for 10 s, no task ends, and none starts twice."""
    own_shop.worker()
    async with calling(own_shop) as app:
        task = app.manager.create_task(app.call("sleep", "page", 14))
        await own_shop.until_event("started", "page")
        own_redis.pause()
        await asyncio.sleep(10)
        own_redis.resume()
        assert await asyncio.wait_for(task, WITHIN) == "page"
    assert len(own_shop.events("started", "page")) == 1


async def test_cancel_arrives_after_a_restart_of_redis(own_shop: Shop, own_redis: Redis) -> None:
    """A cancellation during a restart in which Redis loses its data arrives when Redis is back."""
    own_shop.worker()
    async with calling(own_shop) as app:
        task = app.manager.create_task(app.call("sleep", "page", 600))
        await own_shop.until_event("started", "page")
        own_redis.stop()
        await asyncio.sleep(1)
        task.cancel("while it is away")
        await asyncio.wait([task])
        own_redis.start()
        await own_shop.until_event("cancelled", "page")
    assert own_shop.events("cancelled", "page")[0]["cause"]["message"] == "while it is away"


async def test_full_redis_ends_no_task(tmp_path: Path, key: str, rabbitmq: RabbitMQ) -> None:
    """A Redis that refuses writes ends no task; when it has room again, calls continue."""
    for server in running(redis_in(tmp_path / "redis", ["maxmemory-policy noeviction"])):
        shop = Shop(Settings(server.url, rabbitmq.url, f"{key}-{os.getpid()}", str(tmp_path / "journal")))
        try:
            shop.worker()
            async with calling(shop) as app:
                task = app.manager.create_task(app.call("sleep", "page", 8))
                await shop.until_event("started", "page")
                with server.client() as client:
                    client.config_set("maxmemory", "1")
                    await asyncio.sleep(4)
                    client.config_set("maxmemory", "0")
                assert await asyncio.wait_for(task, WITHIN) == "page"
                assert await asyncio.wait_for(app.call("nothing", 3), WITHIN) == 3
            assert len(shop.events("started", "page")) == 1
        finally:
            shop.close()


async def test_restart_of_rabbitmq_runs_nothing_twice_at_a_time(
    tmp_path: Path, key: str, redis_server: Redis, own_rabbitmq: RabbitMQ
) -> None:
    """RabbitMQ delivers an unacknowledged message again after its restart: it never runs twice at a time."""
    name = f"{key}-{os.getpid()}"
    shop = Shop(Settings(redis_server.url, own_rabbitmq.url, name, str(tmp_path / "journal")))
    try:
        shop.worker()
        shop.worker()
        async with calling(shop) as app:
            task = app.manager.create_task(app.call("sleep", "page", 20))
            await shop.until_event("started", "page")
            await asyncio.to_thread(own_rabbitmq.restart)
            assert await asyncio.wait_for(task, 2 * WITHIN) == "page"
        assert len(shop.events("started", "page")) == 1
        assert not shop.overlaps("page")
    finally:
        shop.close()
