"""Handlers whose work is in a thread, where nothing can stop it, and which hold what the thread uses."""

from __future__ import annotations

import asyncio
import os
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import FileResponse, StreamingResponse
from starlette.types import ASGIApp

from otel_tasks import create_task
from otel_tasks.asgi import TaskGroupMiddleware
from tests.e2e.journal import PATIENCE, manager, note, noted, pass_through, release_of, work


def block(key: str) -> str:
    """Keep a thread until the test lets it go on."""
    note(key, "thread entered")
    deadline = time.monotonic() + PATIENCE
    while not release_of(f"{key}-thread").is_set():
        if time.monotonic() > deadline:
            raise TimeoutError("the thread was not let go on")
        time.sleep(0.005)
    note(key, "thread ended")
    return key


async def async_resource(key: str) -> AsyncIterator[None]:
    """What the thread uses."""
    create_task(work(key, "first"), name="first")
    try:
        yield
    finally:
        note(key, "released")


def def_resource(key: str) -> Iterator[None]:
    """The same, written with `def`."""
    try:
        yield
    finally:
        note(key, "released")


router = APIRouter()
Resource = Depends(async_resource)


@router.get("/def-handler/{key}", dependencies=[Resource])
def def_handler(key: str) -> str:
    """The handler itself runs in a thread."""
    return block(key)


async def _start(key: str) -> None:
    create_task(work(key, "first"), name="first")


@router.get("/def-dependency/{key}", dependencies=[Depends(_start), Depends(def_resource)])
def def_dependency(key: str) -> str:
    """Its resource comes from a thread, too, and goes back to it there."""
    return block(key)


@router.get("/slow-dependency/{key}", dependencies=[Resource])
async def slow_dependency(key: str, _: Annotated[str, Depends(block)]) -> str:
    """A dependency, written with `def`, takes its time."""
    return key


@router.get("/run-sync/{key}", dependencies=[Resource])
async def run_sync(key: str) -> str:
    """anyio's threads."""
    with noted(key):
        return await anyio.to_thread.run_sync(block, key)


@router.get("/threadpool/{key}", dependencies=[Resource])
async def threadpool(key: str) -> str:
    """Starlette's name for them."""
    with noted(key):
        return await run_in_threadpool(block, key)


@router.get("/to-thread/{key}", dependencies=[Resource])
async def to_thread(key: str) -> str:
    """asyncio's threads."""
    with noted(key):
        return await asyncio.to_thread(block, key)


@router.get("/executor/{key}", dependencies=[Resource])
async def executor(key: str) -> str:
    """An executor's."""
    with noted(key):
        return await asyncio.get_running_loop().run_in_executor(None, block, key)


@router.get("/nested-to-thread/{key}", dependencies=[Resource])
async def nested_to_thread(key: str) -> str:
    """asyncio's threads, below a timeout and a coroutine or two."""

    async def below() -> str:
        async with asyncio.timeout(PATIENCE):
            return await asyncio.to_thread(block, key)

    with noted(key):
        return await below()


class _SlowPath(os.PathLike[str]):
    """A file in a file system that takes its time."""

    def __init__(self, key: str) -> None:
        self._key = key

    def __fspath__(self) -> str:
        block(self._key)
        return __file__


@router.get("/file/{key}", dependencies=[Resource])
async def file(key: str) -> FileResponse:
    """Starlette looks at a file, in a thread."""
    return FileResponse(_SlowPath(key), media_type="text/plain")


@router.get("/stream/{key}", dependencies=[Resource])
async def stream(key: str) -> StreamingResponse:
    """A body's generator is a plain one, which runs in threads."""

    def body() -> Iterator[str]:
        yield "first\n"
        yield block(key)

    return StreamingResponse(body())


connections: queue.Queue[list[str]] = queue.Queue()
for _ in range(3):
    connections.put([])


def connection(key: str) -> Iterator[list[str]]:
    """One of the three connections of a pool; None is free when this fails."""
    taken = connections.get(timeout=2.0)
    try:
        yield taken
    finally:
        if taken:
            note(key, "torn", users=list(taken))
        connections.put(taken)


def use(key: str, taken: list[str]) -> str:
    """Keep a thread and its connection."""
    taken.append(key)
    block(key)
    taken.remove(key)
    return key


Connection = Annotated[list[str], Depends(connection)]


@router.get("/pool-def/{key}")
def pool_def(key: str, taken: Connection) -> str:
    """A `def` handler with a connection."""
    return use(key, taken)


@router.get("/pool-sync/{key}")
async def pool_sync(key: str, taken: Connection) -> str:
    """A handler with a connection in one of anyio's threads."""
    return await anyio.to_thread.run_sync(use, key, taken)


@router.get("/pool-to-thread/{key}")
async def pool_to_thread(key: str, taken: Connection) -> str:
    """The same in one of asyncio's."""
    return await asyncio.to_thread(use, key, taken)


@router.get("/pool-size")
async def pool_size() -> int:
    """How many connections are free."""
    return connections.qsize()


def _layered(*layers: Callable[[FastAPI], None]) -> ASGIApp:
    app = FastAPI()
    app.include_router(router)
    for layer in layers:
        layer(app)
    return app


def _ours(app: FastAPI) -> None:
    app.add_middleware(TaskGroupMiddleware, manager=manager)


def _base(app: FastAPI) -> None:
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_through)


variants: dict[str, Any] = {
    "threads": _layered(_ours),
    "threads-inside": _layered(_base, _ours),
    "threads-outside": _layered(_ours, _base),
}
