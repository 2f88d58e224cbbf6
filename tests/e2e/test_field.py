"""Faults found in the field: one small application each."""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import Depends, FastAPI, Request, Response
from sse_starlette import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.responses import StreamingResponse

from otel_tasks import TaskGroup, TaskManager, create_task
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable

from .serving import AGE, DEADLINE, Site, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


# --- cleanup ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["inside", "outside"])
@pytest.mark.parametrize("how", ["await", "task", "group"])
@pytest.mark.parametrize("path", ["plain", "stream"])
async def test_uncancellable_cleanup_in_a_finally_runs_to_its_end(order: str, how: str, path: str) -> None:
    """A bill is written after the client has left: in handlers and streams, with other layers around."""
    bills: list[str] = []
    async with served(_gateway(order, how, bills)) as site:
        await site.hang_up(f"POST /{path}")
    assert bills == ["billed"]


def _gateway(order: str, how: str, bills: list[str]) -> FastAPI:
    app = FastAPI()
    if order == "inside":
        app.add_middleware(TaskGroupMiddleware, manager=TaskManager(), cancel_handler=True)
        app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_through)
    else:
        app.add_middleware(BaseHTTPMiddleware, dispatch=_pass_through)
        app.add_middleware(TaskGroupMiddleware, manager=TaskManager(), cancel_handler=True)

    async def bill() -> None:
        await asyncio.sleep(0.02)
        if how == "task":
            await create_task(asyncio.sleep(0.02))
        if how == "group":
            async with TaskGroup() as group:
                group.create_task(asyncio.sleep(0.02))
        await asyncio.sleep(0.02)
        bills.append("billed")

    @app.post("/plain")
    async def plain() -> None:
        try:
            await asyncio.sleep(DEADLINE)
        finally:
            async with uncancellable():
                await bill()

    async def body() -> AsyncIterator[bytes]:
        try:
            for _ in range(500):
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            async with uncancellable():
                await bill()

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(body())

    return app


async def _pass_through(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


@pytest.mark.parametrize("request_line", ["GET /plain", "GET /", "POST /"])
async def test_listener_of_a_stream_does_not_break_an_uncancellable_block(request_line: str) -> None:
    """Starlette's own listener, which cancels a stream, sees the disconnect only after the block."""
    log: list[str] = []
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=TaskManager())

    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        async with uncancellable():
            try:
                await asyncio.sleep(0.4)
                log.append("whole")
            except asyncio.CancelledError as error:
                log.append(f"torn: {error}")
                raise
        yield b"2"

    @app.api_route("/", methods=["GET", "POST"])
    async def stream() -> StreamingResponse:
        return StreamingResponse(body())

    @app.get("/plain")
    async def plain() -> int:
        return len([chunk async for chunk in body()])

    async with served(app) as site:
        await site.hang_up(request_line)
    assert log == ["whole"]


# --- threads --------------------------------------------------------------------------------------------


async def test_dependency_of_a_def_handler_is_released_after_its_thread_has_ended() -> None:
    """A dependency of a `def` handler is torn down after the handler's thread has ended."""
    log: list[str] = []
    entered, go_on = threading.Event(), threading.Event()
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=TaskManager())

    def resource() -> Iterator[None]:
        try:
            yield
        finally:
            log.append("released")

    @app.get("/", dependencies=[Depends(resource)])
    def handler() -> None:
        entered.set()
        go_on.wait(DEADLINE)
        log.append("thread ends")

    async with served(app) as site:
        writer = await site.open("GET /")
        assert await asyncio.to_thread(entered.wait, DEADLINE)
        writer.transport.abort()
        await asyncio.sleep(0.2)
        assert log == []
        go_on.set()
        await site.wait_until_idle()
    assert log == ["thread ends", "released"]


# --- applications that listen ------------------------------------------------------------------


async def test_close_handler_of_an_event_source_runs_to_its_end() -> None:
    """sse-starlette's listener has seen the disconnect: its close handler can await."""
    log: list[str] = []
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=TaskManager())

    async def ticks() -> AsyncIterator[dict[str, str]]:
        for _ in itertools.count():
            yield {"data": "."}
            await asyncio.sleep(0.02)

    async def gone(_: Any) -> None:
        log.append("begin")
        await asyncio.sleep(0.01)
        log.append("end")

    @app.get("/")
    async def events() -> EventSourceResponse:
        return EventSourceResponse(ticks(), client_close_handler_callable=gone)

    async with served(app) as site:
        await site.hang_up("GET /")
        await _stop_sse_starlette()
    assert log == ["begin", "end"]


async def _stop_sse_starlette() -> None:
    """End the task that sse-starlette keeps per loop."""
    watchers = [
        task
        for task in asyncio.all_tasks()
        if getattr(task.get_coro(), "__qualname__", "") == "_shutdown_watcher"
    ]
    for watcher in watchers:
        watcher.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)


# --- tasks that outlive their request ------------------------------------------------


async def test_task_started_by_one_request_serves_the_later_ones() -> None:
    """A plain task that outlives its request can still create tasks."""
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=TaskManager())
    inbox: asyncio.Queue[tuple[int, asyncio.Future[int]]] = asyncio.Queue()
    sessions: list[asyncio.Task[None]] = []

    async def session() -> None:
        while True:
            number, answer = await inbox.get()
            try:
                answer.set_result(await create_task(asyncio.sleep(0.01, number)))
            except Exception as error:
                answer.set_exception(error)

    @app.get("/open")
    async def open_session() -> None:
        sessions.append(asyncio.create_task(session()))

    @app.get("/{number}")
    async def ask(number: int) -> int:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        inbox.put_nowait((number, answer))
        return await answer

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        answers = [await client.get(path) for path in ("/open", "/1", "/2")]
    for task in sessions:
        task.cancel()
    await asyncio.gather(*sessions, return_exceptions=True)
    assert [(answer.status_code, answer.text) for answer in answers] == [
        (200, "null"),
        (200, "1"),
        (200, "2"),
    ]


async def test_two_requests_share_a_task_and_one_of_their_clients_leaves() -> None:
    """The first client hangs up; the second still gets its answer."""
    manager = TaskManager()
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    go_on = asyncio.Event()
    loads: list[int] = []

    async def load(number: int) -> str:
        loads.append(number)
        await go_on.wait()
        return f"price of {number}"

    @app.get("/{number}")
    async def price(number: int) -> str:
        return await manager.create_task(
            load(number), name=f"load-{number}", group="cache", on_conflict="return"
        )

    async with served(app) as site:
        status, text = await _second_of_two(site, go_on)
    assert (status, text) == (200, '"price of 7"')
    assert loads == [7]


async def _second_of_two(site: Site, go_on: asyncio.Event) -> tuple[int, str]:
    first = await site.open("GET /7")
    async with httpx.AsyncClient(trust_env=False) as client:
        second = asyncio.create_task(client.get(f"http://127.0.0.1:{site.port}/7", timeout=DEADLINE))
        await site.wait_for_calls(2)
        await asyncio.sleep(AGE)
        first.transport.abort()
        # Its call ends without the task: only the second one is left.
        await site.wait_for_calls(1)
        go_on.set()
        answer = await second
    return answer.status_code, answer.text
