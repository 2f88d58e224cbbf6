"""The service that the terminal looks at: imports that queue, tasks that wait, and one that does not stop."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI, HTTPException, Request

from otel_tasks import TaskPriority, create_task, global_task_manager
from otel_tasks.fastapi import TaskGroupMiddleware, make_lifespan
from otel_tasks.live import live_view

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

TOKEN = "s3cret"
HOSTILE = "<img onerror=x>[red]"


def user(request: Request) -> str:
    """Who looks."""
    if request.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise HTTPException(401, "who are you?")
    return "ada"


async def import_user() -> None:
    """Wait for long."""
    await asyncio.sleep(3600)


async def sync_mail() -> None:
    """Ignore being cancelled."""
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue


@asynccontextmanager
async def work(app: FastAPI) -> AsyncIterator[None]:
    """Start what there is to see."""
    manager = global_task_manager
    manager.get_group("imports", max_concurrency=2)
    for number in range(30):
        manager.create_task(import_user(), name=f"import_user-{number}", group="imports")
    stuck = manager.create_task(sync_mail(), name="sync_mail", group="mail", priority=TaskPriority.HIGH)
    manager.create_task(import_user(), name=HOSTILE, group="mail")
    manager.create_task(import_user(), name="render", group="mail")
    await asyncio.sleep(0.05)
    stuck.cancel("deploy")
    yield


app = FastAPI(lifespan=make_lifespan(work, grace=0, timeout=0.2))
app.add_middleware(TaskGroupMiddleware)


@app.get("/report")
async def report() -> None:
    """Wait for prices until the client leaves."""
    await create_task(import_user(), name="fetch_prices")


def not_render(_request: Request, _action: str, task: object) -> bool:
    """Allow everything but one task."""
    return getattr(task, "name", "") != "render"


auth = Depends(user)
app.include_router(live_view(auth=auth, actions={"cancel"}, can=not_render), prefix="/tasks")
app.include_router(live_view(auth=auth), prefix="/read-only")
app.include_router(live_view(insecure=True, actions={"cancel"}), prefix="/open")
