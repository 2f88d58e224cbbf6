"""The rules of remote tasks that no other file holds, on real servers and workers."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from otel_tasks.taskiq import RemoteResultError, labels
from tests.processes import free_port

from .remote_app import Settings
from .remote_shop import WITHIN, Shop, calling, own_shop, shop, until_up

if TYPE_CHECKING:
    from pathlib import Path

    from examples.redis_server import Redis

__all__ = ["own_shop", "shop"]

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

# The broker makes no difference.
on_redis = pytest.mark.parametrize("shop", ["redis"], indirect=True)

NO_UVLOOP = "import sys; sys.modules['uvloop'] = None\n"
EAGER = """
import asyncio

make = asyncio.BaseEventLoop.__init__


def make_eager(loop):
    make(loop)
    loop.set_task_factory(asyncio.eager_task_factory)


asyncio.BaseEventLoop.__init__ = make_eager
"""


@on_redis
@pytest.mark.parametrize(
    "loop",
    [
        "uvloop",
        "asyncio",
        pytest.param("eager", marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.12")),
    ],
)
async def test_remote_tasks_on_each_loop(shop: Shop, loop: str) -> None:
    """A call, a hang-up, a cancellation from elsewhere, and SIGTERM, in services and workers on one loop."""
    if loop != "uvloop":
        shop.begin_with(NO_UVLOOP + (EAGER if loop == "eager" else ""))
    if loop == "eager":
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]  # 3.12
    worker = shop.worker()
    port = free_port()
    service = shop.service(port)
    async with (
        calling(shop) as app,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=WITHIN) as client,
    ):
        await until_up(client)
        expected = ["asyncio", True] if loop == "eager" else [loop, False]
        assert list(await asyncio.wait_for(app.call("loop"), WITHIN)) == expected
        assert (await client.get("/book/page", params={"seconds": 0.1})).json() == ["page.inner"]

        call = await _started(shop, client, "hang-up")
        call.cancel()
        await asyncio.wait([call])
        assert await _kind(shop, "hang-up") == "client_disconnect"

        call = await _started(shop, client, "cancelled")
        report = await app.fleet.cancel_task("book", timeout=WITHIN)
        assert (report.still_running, report.silent) == (0, ())
        assert await _kind(shop, "cancelled") == "explicit"
        await asyncio.wait([call])

        call = await _started(shop, client, "service stops")
        service.terminate()
        assert await _kind(shop, "service stops") == "shutdown"
        await asyncio.wait([call])

        task = app.manager.create_task(app.call("sleep", "worker stops", 600))
        await shop.until_event("started", "worker stops")
        worker.terminate()
        assert await asyncio.to_thread(worker.wait, WITHIN) == 0
        assert await _kind(shop, "worker stops", "") == "shutdown"
        assert not task.done()


async def _started(shop: Shop, client: httpx2.AsyncClient, key: str) -> asyncio.Task[httpx2.Response]:
    """Open a request whose work is two calls deep, and wait until the last worker works for it."""
    call = asyncio.create_task(client.get(f"/book/{key}", params={"seconds": 600}))
    await shop.until_event("started", f"{key}.inner")
    return call


async def _kind(shop: Shop, key: str, suffix: str = ".inner") -> str:
    """The kind of the cause with which the last worker's task was cancelled."""
    await shop.until_event("cancelled", key + suffix)
    return str(shop.events("cancelled", key + suffix)[0]["cause"]["kind"])


# -- leases, clocks, and claims -------------------------------------------------------------------


@on_redis
async def test_blocked_loop_of_a_caller_keeps_its_lease(shop: Shop) -> None:
    """Remote tasks of a process whose loop is blocked for 8 s go on: a thread renews its lease."""
    shop.worker()
    async with calling(shop) as app:
        task = app.manager.create_task(app.call("sleep", "page", 9))
        await shop.until_event("started", "page")
        time.sleep(8)  # noqa: ASYNC251 - the test is about a blocked loop
        assert not shop.events("cancelled", "page")
        assert await asyncio.wait_for(task, WITHIN) == "page"


@on_redis
@pytest.mark.parametrize("offset", [-3600, 3600])
async def test_deadline_on_a_worker_whose_clock_is_wrong(shop: Shop, offset: int) -> None:
    """With a clock that is an hour off, a late task does not start, and others end by their deadlines."""
    shop.begin_with(f"import time\nright = time.time\ntime.time = lambda: right() + {offset}\n")
    async with calling(shop) as app:

        async def send(key: str, seconds: float, timeout: float) -> None:
            kicker = app.tasks["sleep"].kicker().with_labels(**labels(timeout=timeout))
            await kicker.kiq(key, seconds)

        await send("late", 0.0, 0.5)
        await asyncio.sleep(0.6)
        shop.worker()
        await send("in time", 0.1, 600.0)
        await shop.until_event("finished", "in time")
        await send("too long", 600.0, 2.0)
        await shop.until_event("cancelled", "too long")
        # The clock was wrong.
        assert abs(shop.events("started", "too long")[0]["at"] - time.time()) > 1800
    assert not shop.events("started", "late")


async def test_new_tasks_wait_while_redis_is_down(own_shop: Shop, own_redis: Redis) -> None:
    """Without claims, nothing starts; when Redis is back, each message that arrived meanwhile runs once."""
    own_shop.worker()
    async with calling(own_shop) as app:
        assert await app.call("nothing", 1) == 1
        own_redis.kill()
        call = app.manager.create_task(app.call("sleep", "called", 0.1))
        await asyncio.wait_for(app.tasks["sleep"].kiq("sent", 0.1), WITHIN)
        await asyncio.sleep(3)
        assert not own_shop.events("started")
        own_redis.start()
        assert await asyncio.wait_for(call, WITHIN) == "called"
        await own_shop.until_event("finished", "sent")
        await asyncio.sleep(1)
    assert len(own_shop.events("started")) == 2


async def test_redis_that_is_the_broker_too_restarts(tmp_path: Path, key: str, own_redis: Redis) -> None:
    """Taskiq's worker ends with its connection and starts again: tasks run again, cancelled ones do not."""
    own_redis.stop()
    own_redis.start(persistent=True)
    name = f"{key}-{os.getpid()}"
    shop = Shop(Settings(own_redis.url, "redis", name, str(tmp_path / "journal")))
    try:
        shop.worker()
        async with calling(shop) as app:
            task = app.manager.create_task(app.call("sleep", "page", 3))
            cancelled = app.manager.create_task(app.call("sleep", "cancelled", 600))
            for each in ("page", "cancelled"):
                await shop.until_event("started", each)
            own_redis.kill()
            cancelled.cancel()
            await asyncio.wait([cancelled])
            own_redis.start(persistent=True)
            assert await asyncio.wait_for(task, WITHIN) == "page"
            assert await asyncio.wait_for(app.call("nothing", 1), WITHIN) == 1
            await shop.until(
                lambda: len(shop.events("started", "cancelled")) == len(shop.events("cancelled", "cancelled"))
            )
        assert not shop.events("finished", "cancelled")
        assert not shop.overlaps("page")
    finally:
        shop.close()


async def test_retries_have_one_id_and_never_overlap(shop: Shop) -> None:
    """Taskiq sends a failed task again under its id: one attempt runs at a time, and the last one counts."""
    shop.worker()
    shop.worker()
    async with calling(shop) as app:
        kicker = app.tasks["flaky"].kicker().with_labels(retry_on_error=True, max_retries=5)
        assert await asyncio.wait_for(app.call_with(kicker, "page", 2), WITHIN) == 3
    assert len(shop.events("started", "page")) == 3
    assert not shop.overlaps("page")


@on_redis
async def test_id_that_is_used_again_gives_the_new_result(shop: Shop) -> None:
    """The result of an older call with the same id is in the backend, and is not returned."""
    shop.worker()
    async with calling(shop) as app:
        kicker = app.tasks["sleep"].kicker().with_task_id(f"{shop.settings.namespace}-report")
        for key, seconds in [("old", 0.1), ("new", 6.0)]:
            assert await asyncio.wait_for(app.call_with(kicker, key, seconds), WITHIN) == key


@on_redis
async def test_result_that_cannot_be_pickled_fails_the_call(shop: Shop) -> None:
    """The error names the reason, and comes at once."""
    shop.worker()
    async with calling(shop) as app:
        await app.call("nothing", 1)
        began = time.monotonic()
        with pytest.raises(RemoteResultError, match="has ended, and its result cannot be saved"):
            await app.call("unsaved")
        assert time.monotonic() - began < 8


# -- what is on the bus ---------------------------------------------------------------------------


async def test_arguments_and_results_are_not_on_the_bus(own_shop: Shop, own_redis: Redis) -> None:
    """The keys of a fleet hold names and reasons, and nothing that tasks take, return, or raise."""
    own_shop.worker()
    async with calling(own_shop) as app:
        assert await app.call("sleep", "s3cret", 0.01) == "s3cret"
        task = app.manager.create_task(
            app.call("sleep", "s3cret", 600), name="import-17", metadata={"a": "s3cret"}
        )
        await own_shop.until_event("started", "s3cret", 2)
        task.cancel("stopped by the user")
        await own_shop.until_event("cancelled", "s3cret")
        with own_redis.client() as client:
            prefix = "{" + own_shop.settings.namespace + "}:"
            found = {key.decode(): _content(client, key) for key in client.scan_iter(prefix + "*")}
    text = str(found)
    assert "stopped by the user" in text
    assert {key.removeprefix(prefix).partition(":")[0] for key in found} >= {"cancel", "inbox", "nodes"}
    assert "s3cret" not in text


def _content(client: Any, key: bytes) -> object:
    match client.type(key):
        case b"stream":
            return client.xrange(key)
        case b"hash":
            return client.hgetall(key)
        case b"zset":
            return client.zrange(key, 0, -1)
        case _:
            return client.get(key)
