"""Applications whose handlers have something to clean up when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI
from fastapi.sse import EventSourceResponse as FastAPIEvents
from sse_starlette import EventSourceResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from otel_tasks import TaskGroup, create_task
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from tests.e2e.journal import manager, note, noted, pass_through, released

Entered = Literal["before", "after"]


async def clean_up(key: str) -> None:
    """Take a while, wait for the test, then start work in each way that there is, and await it."""
    with noted(key, "cleanup"):
        for _ in range(3):
            # anyio delivers its cancellation again at each of these.
            await asyncio.sleep(0.005)
        await released(f"{key}-cleanup")
        await create_task(step(key, "create_task"))
        async with TaskGroup() as group:
            group.create_task(step(key, "TaskGroup"))
        async with asyncio.TaskGroup() as plain:
            plain.create_task(step(key, "asyncio.TaskGroup"))


async def step(key: str, how: str) -> None:
    """A part of the cleanup that is a task of its own."""
    with noted(key, how):
        await asyncio.sleep(0.01)


async def work_and_clean_up(key: str, entered: Entered) -> None:
    """Clean up in `uncancellable()`, entered before the client leaves or, in a `finally`, after it has."""
    note(key, "work entered")
    if entered == "before":
        async with uncancellable():
            await clean_up(key)
        await released(key)
        return
    try:
        await released(key)
    finally:
        async with uncancellable():
            await clean_up(key)


router = APIRouter()


@router.api_route("/plain/{key}", methods=["GET", "POST"])
async def plain(key: str, entered: Entered) -> None:
    """In the handler itself."""
    await work_and_clean_up(key, entered)


@router.post("/task/{key}")
async def task(key: str, entered: Entered) -> None:
    """In a managed task that the handler awaits."""
    await create_task(work_and_clean_up(key, entered))


@router.post("/unawaited-task/{key}")
async def unawaited_task(key: str, entered: Entered) -> None:
    """In a managed task that nobody awaits."""
    create_task(work_and_clean_up(key, entered))
    await released(key)


@router.post("/gather/{key}")
async def gather(key: str, entered: Entered) -> None:
    """In a plain task that the handler awaits."""
    await asyncio.gather(work_and_clean_up(key, entered), asyncio.sleep(0))


@router.api_route("/stream/{key}", methods=["GET", "POST"])
async def stream(key: str, entered: Entered) -> StreamingResponse:
    """In the generator of a streamed body."""
    return StreamingResponse(_body(key, entered))


@router.api_route("/events/{key}", methods=["GET", "POST"])
async def events(key: str, entered: Entered) -> EventSourceResponse:
    """In the generator of sse-starlette's events."""
    return EventSourceResponse(_body(key, entered))


@router.get("/fastapi-events/{key}", response_class=FastAPIEvents)
@router.post("/fastapi-events/{key}", response_class=FastAPIEvents)
async def fastapi_events(key: str, entered: Entered) -> AsyncIterator[str]:
    """In the generator of FastAPI's own events."""
    yield "first"
    await work_and_clean_up(key, entered)


async def _body(key: str, entered: Entered) -> AsyncIterator[str]:
    yield "first\n"
    await work_and_clean_up(key, entered)
    yield "last\n"


async def _resource(key: str) -> AsyncIterator[None]:
    try:
        yield
    finally:
        async with uncancellable():
            await clean_up(key)


@router.post("/dependency/{key}")
async def dependency(key: str, _: Annotated[None, Depends(_resource)], entered: Entered) -> None:
    """In a dependency with `yield`."""
    note(key, "work entered")
    await released(key)


@router.post("/background/{key}")
async def background(key: str, later: BackgroundTasks, shielded: bool = True) -> None:
    """In a background task, which begins after the client has left."""

    async def afterwards() -> None:
        if shielded:
            async with uncancellable():
                await clean_up(key)
        else:
            await clean_up(key)

    later.add_task(afterwards)
    note(key, "work entered")
    await released(key)


@router.post("/unshielded/{key}")
async def unshielded(key: str, how: Literal["finally", "except"]) -> None:
    """Without `uncancellable()`, where the cancellation comes but once."""
    note(key, "work entered")
    if how == "finally":
        try:
            await released(key)
        finally:
            await clean_up(key)
    try:
        await released(key)
    except asyncio.CancelledError:
        await clean_up(key)
        raise


@router.post("/swallow/{key}")
async def swallow(key: str) -> None:
    """No cleanup at all: a handler that goes on as if nothing had happened."""
    note(key, "work entered")
    try:
        await released(key)
    except asyncio.CancelledError:
        note(key, "swallowed")
    with noted(key, "start"):
        await create_task(step(key, "create_task"))


def _layered(inside: int, outside: int, **options: Any) -> ASGIApp:
    """The routes, with so many `BaseHTTPMiddleware`s on each side of ours."""
    app = FastAPI()
    app.include_router(router)
    for _ in range(inside):
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)
    app.add_middleware(TaskGroupMiddleware, manager=manager, **options)
    for _ in range(outside):
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)
    return app


variants: dict[str, ASGIApp] = {
    "cleanup": _layered(0, 0, cancel_handler=True),
    "cleanup-inside": _layered(1, 0, cancel_handler=True),
    "cleanup-outside": _layered(0, 1, cancel_handler=True),
    "cleanup-stacked": _layered(3, 2, cancel_handler=True),
    "cleanup-safe": _layered(0, 0),
}
