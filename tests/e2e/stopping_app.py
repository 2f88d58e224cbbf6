"""An application that gives its requests two seconds once its server stops, and whose requests take longer.

Served by the tests of `test_server_stop`. It prints what happens: the servers' workers share one log.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import BackgroundTasks, FastAPI, WebSocket
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sse_starlette import EventSourceResponse as StarletteEvents
from starlette.responses import StreamingResponse

from otel_tasks import create_task
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan

GRACE = float(os.environ.get("REQUEST_GRACE", "2.0"))

app = FastAPI(lifespan=make_lifespan(grace=0.5, timeout=1.0, request_grace=GRACE))
app.add_middleware(TaskGroupMiddleware)


@contextlib.contextmanager
def printed(name: str) -> Iterator[None]:
    """Print that a block starts, and how it ends."""
    print(f"({name} begins)", flush=True)
    try:
        yield
    except asyncio.CancelledError:
        print(f"({name} cancelled)", flush=True)
        raise
    finally:
        print(f"({name} ends)", flush=True)


async def works(name: str) -> None:
    """Work that takes longer than any test."""
    with printed(name):
        await asyncio.sleep(3600)


@app.get("/state")
async def state() -> dict[str, Any]:
    """Where the tests of this folder ask for the process that serves."""
    return {"pid": os.getpid(), "asyncio": []}


@app.get("/short")
async def short() -> str:
    """A request that ends within the grace."""
    with printed("short"):
        await asyncio.sleep(1.0)
    return "served"


@app.get("/slow")
async def slow() -> None:
    """A handler that awaits a task of its group."""
    await create_task(works("slow"))


@app.post("/post")
async def post() -> None:
    """A handler that a disconnect does not cancel."""
    await works("post")


@app.get("/thread")
def thread() -> str:
    """A handler in a thread: it ends by itself, a second after the grace."""
    with printed("thread"):
        time.sleep(GRACE + 1.0)
    return "too late"


@app.get("/stream")
async def stream() -> StreamingResponse:
    """Starlette's stream, without end."""

    async def body() -> AsyncIterator[bytes]:
        with printed("stream"):
            while True:
                yield b"tick\n"
                await asyncio.sleep(0.05)

    return StreamingResponse(body())


@app.get("/quiet")
async def quiet() -> StreamingResponse:
    """A stream that waits for what never comes."""

    async def body() -> AsyncIterator[bytes]:
        yield b"first\n"
        await works("quiet")

    return StreamingResponse(body())


@app.get("/events", response_class=EventSourceResponse)
async def events() -> AsyncIterator[ServerSentEvent]:
    """FastAPI's event source."""
    with printed("events"):
        while True:
            yield ServerSentEvent(data="tick")
            await asyncio.sleep(0.05)


@app.get("/starlette-events")
async def starlette_events() -> StarletteEvents:
    """sse-starlette's, which looks for uvicorn's exit itself."""

    async def body() -> AsyncIterator[dict[str, str]]:
        with printed("starlette-events"):
            while True:
                yield {"data": "tick"}
                await asyncio.sleep(0.05)

    return StarletteEvents(body())


@app.get("/background")
async def background(tasks: BackgroundTasks) -> str:
    """A response that is sent, and work that is not."""
    tasks.add_task(works, "background")
    return "sent"


@app.websocket("/chat")
async def chat(socket: WebSocket) -> None:
    """A WebSocket, as FastAPI's documentation writes it."""
    await socket.accept()
    with printed("chat"):
        async for text in socket.iter_text():
            await socket.send_text(text)
