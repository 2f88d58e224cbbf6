"""An application with a live view, and work to look at; served by the tests of `test_live`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from otel_tasks import TaskPriority, global_task_manager
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan
from otel_tasks.live import live_view


async def wait(seconds: float) -> None:
    """Wait."""
    await asyncio.sleep(seconds)


async def sync_mail() -> None:
    """Ignore the cancellation for long."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)
            return


@asynccontextmanager
async def work(app: FastAPI) -> AsyncIterator[None]:
    """Start work that lasts."""
    for _ in range(30):
        global_task_manager.create_task(wait(3600), group="mail")
    global_task_manager.create_task(sync_mail(), priority=TaskPriority.HIGH)
    yield


app = FastAPI(lifespan=make_lifespan(work, grace=0.0, timeout=2.0))
app.add_middleware(TaskGroupMiddleware, request_timeout=5.0)


@app.get("/state")
async def state() -> dict[str, object]:
    """The process, and the names of its asyncio tasks."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return {"pid": os.getpid(), "asyncio": names}


app.include_router(live_view(insecure=True, actions={"cancel"}), prefix="/tasks")


@app.get("/report/{number}")
async def report(number: int, tasks: RequestTasks) -> str:
    """Wait for a task of the request."""
    await tasks.create_task(wait(30), name="fetch_prices")
    return "done"
