"""Applications whose streams end in generators of every kind, each with cleanup that awaits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
from fastapi import APIRouter, FastAPI, Request
from fastapi.sse import EventSourceResponse as FastAPIEvents
from openai import AsyncOpenAI
from sse_starlette import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from otel_tasks import create_task
from otel_tasks.asgi import TaskGroupMiddleware
from tests.e2e.journal import manager, note, noted, pass_through, release_of, released

# More than the buffers of a server and of two sockets take, so that `send` waits for the client.
_LARGE = "x" * 1_000_000 + "\n"


@contextlib.asynccontextmanager
async def _closing(key: str, name: str) -> AsyncIterator[None]:
    """Note what ends a generator; then clean up for a while, with a task."""
    try:
        yield
    finally:
        error, task = sys.exception(), asyncio.current_task()
        closer = None if task is None else type(task.get_coro()).__name__
        note(key, f"{name} closing", error=type(error).__name__, finalizer="async_generator" in str(closer))
        for _ in range(3):
            # anyio would cancel again at each of these.
            await asyncio.sleep(0.005)
        await create_task(_step(key, name))
        note(key, f"{name} closed")


async def _step(key: str, name: str) -> None:
    with noted(key, f"{name} step"):
        await asyncio.sleep(0.01)


async def _waits(key: str, name: str = "body") -> AsyncIterator[str]:
    """Wait inside the generator."""
    async with _closing(key, name):
        yield "first\n"
        note(key, f"{name} waits")
        await released(key)
        yield "second\n"
        await released(f"{key}-end")


async def _yields(key: str, name: str = "body") -> AsyncIterator[str]:
    """Produce more than a client takes that does not read."""
    async with _closing(key, name):
        yield "first\n"
        while not release_of(f"{key}-end").is_set():
            note(key, f"{name} yields")
            yield _LARGE
            await asyncio.sleep(0)


async def _outer_yields(key: str) -> AsyncIterator[str]:
    async with _closing(key, "outer"):
        async for part in _yields(key):
            yield part


async def _outer_waits(key: str) -> AsyncIterator[str]:
    async with _closing(key, "outer"):
        async for part in _yields(key):
            yield part
            note(key, "outer waits")
            await released(key)


async def _proxied(key: str, url: str) -> AsyncIterator[str]:
    async with _closing(key, "body"), httpx.AsyncClient() as client, client.stream("GET", url) as response:
        async for part in response.aiter_text():
            yield part


async def _completed(key: str, url: str) -> AsyncIterator[str]:
    async with _closing(key, "body"), AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
        answer = await client.chat.completions.create(model="any", messages=[], stream=True)
        async for chunk in answer:
            yield chunk.choices[0].delta.content or ""


async def _as_chunks(parts: AsyncIterator[str]) -> AsyncIterator[str]:
    async for part in parts:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "any"}
        yield f"data: {json.dumps(chunk | {'choices': [{'index': 0, 'delta': {'content': part}}]})}\n\n"


def _waits_in_a_thread(key: str) -> Iterator[str]:
    try:
        yield "first\n"
        note(key, "body waits")
        while not release_of(key).is_set():
            time.sleep(0.005)
        while True:
            yield "more\n"
    finally:
        _note_end_in_a_thread(key)


def _yields_in_a_thread(key: str) -> Iterator[str]:
    try:
        yield "first\n"
        while not release_of(f"{key}-end").is_set():
            note(key, "body yields")
            yield _LARGE
    finally:
        _note_end_in_a_thread(key)


def _note_end_in_a_thread(key: str) -> None:
    note(key, "body closing", error=type(sys.exception()).__name__, finalizer=_in_a_loop())
    # Cleanup that blocks, such as closing a connection.
    time.sleep(0.02)
    note(key, "body closed")


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


BODIES: dict[str, Callable[[str], Any]] = {
    "waits": _waits,
    "yields": _yields,
    "outer-yields": _outer_yields,
    "outer-waits": _outer_waits,
    "thread-waits": _waits_in_a_thread,
    "thread-yields": _yields_in_a_thread,
}

_CHUNK = bytes(65_536)


async def _floods(key: str) -> AsyncIterator[bytes]:
    """Produce a large body as fast as it is taken."""
    try:
        for _ in range(1_600):
            note(key, "chunk offered")
            yield _CHUNK
            note(key, "chunk taken")
            # As a source does that has the next chunk ready.
            await asyncio.sleep(0)
    finally:
        note(key, "flood closed")


router = APIRouter()


@router.get("/flood/{key}")
async def flood(key: str) -> StreamingResponse:
    """A body of 100 MB."""
    return StreamingResponse(_floods(key))


@router.api_route("/stream/{how}/{key}", methods=["GET", "POST"])
async def stream(how: str, key: str) -> StreamingResponse:
    """In Starlette's response."""
    return StreamingResponse(BODIES[how](key))


@router.api_route("/events/{how}/{key}", methods=["GET", "POST"])
async def events(how: str, key: str) -> EventSourceResponse:
    """In sse-starlette's."""
    return EventSourceResponse(BODIES[how](key))


@router.api_route("/proxy/{how}/{key}", methods=["GET", "POST"])
async def proxy(how: str, key: str, request: Request) -> StreamingResponse:
    """Around a request to an upstream."""
    return StreamingResponse(_proxied(key, f"{request.base_url}streams/stream/{how}/{key}-upstream"))


@router.api_route("/openai/{how}/{key}", methods=["GET", "POST"])
async def openai(how: str, key: str, request: Request) -> StreamingResponse:
    """Around the stream of a language model's client."""
    return StreamingResponse(_completed(key, f"{request.base_url}streams/model/{how}/{key}-upstream"))


@router.post("/model/{how}/{key}/chat/completions")
async def model(how: str, key: str) -> StreamingResponse:
    """The language model of that client."""
    return StreamingResponse(_as_chunks(BODIES[how](key)), media_type="text/event-stream")


@router.get("/fastapi/waits/{key}", response_class=FastAPIEvents)
@router.post("/fastapi/waits/{key}", response_class=FastAPIEvents)
async def fastapi_waits(key: str) -> AsyncIterator[str]:
    """In FastAPI's events."""
    async for part in _waits(key):
        yield part


@router.get("/fastapi/yields/{key}", response_class=FastAPIEvents)
@router.post("/fastapi/yields/{key}", response_class=FastAPIEvents)
async def fastapi_yields(key: str) -> AsyncIterator[str]:
    """In FastAPI's events."""
    async for part in _yields(key):
        yield part


async def raw(scope: Scope, _: Receive, send: Send) -> None:
    """Without a framework, and without a listener."""
    _, how, key = scope["path"].rsplit("/", 2)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    async for part in BODIES[how](key):
        await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
    await send({"type": "http.response.body"})


def _app(*, bound: bool = True, layers: int = 0) -> ASGIApp:
    app = FastAPI()
    app.include_router(router)
    for _ in range(layers):
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)
    if bound:
        app.add_middleware(TaskGroupMiddleware, manager=manager)
    return app


variants: dict[str, ASGIApp] = {
    "streams": _app(),
    "streams-bare": _app(bound=False),
    "streams-inside": _app(layers=1),
    "streams-raw": TaskGroupMiddleware(raw, manager=manager),
}
