"""A service whose tasks a test creates and ends, with a live view for each kind of viewer."""

from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import suppress
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from otel_tasks import ManagedTask, TaskGroup, TaskManager, TaskPriority, current_task
from otel_tasks.fastapi import RequestTasks, TaskGroupMiddleware, make_lifespan
from otel_tasks.live import live_view

manager = TaskManager("shop", history=500)
_numbers = itertools.count()


class Pool:
    """A line where many tasks wait."""

    def __init__(self) -> None:
        self.free = asyncio.Event()

    async def acquire(self) -> None:
        """Wait until the test says so."""
        await self.free.wait()


pool = Pool()


class Login:
    """A login that the tests end."""

    def __init__(self) -> None:
        self.ended = False

    def __call__(self, user: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> str:
        """Let Ann in, until the test says otherwise."""
        if user.username != "ann" or self.ended:
            raise HTTPException(401, "log in again", {"WWW-Authenticate": "Basic"})
        return user.username


login = Login()


def refuse(request: Request, action: str, task: ManagedTask[Any]) -> bool:
    """A viewer who may cancel only what is named so."""
    return task.name.startswith("mine")


app = FastAPI(lifespan=make_lifespan(manager=manager, grace=0.0, timeout=1.0))
app.add_middleware(TaskGroupMiddleware, manager=manager)
app.include_router(
    live_view(insecure=True, manager=manager, actions={"cancel"}, errors=True, metadata={"text"}),
    prefix="/tasks",
)
app.include_router(live_view(insecure=True, manager=manager), prefix="/read-only")
app.include_router(live_view(auth=Depends(login), manager=manager, actions={"cancel"}), prefix="/with-login")
app.include_router(
    live_view(insecure=True, manager=manager, actions={"cancel"}, can=refuse), prefix="/restricted"
)


# --- what the tests ask for ------------------------------------------------------------------------------


async def work() -> None:
    """Wait at the line of the pool."""
    await pool.acquire()


async def fail() -> None:
    """Wait, and fail."""
    await pool.acquire()
    raise ValueError("no such article")


async def ignore() -> None:
    """Ignore every cancellation until the test ends it."""
    while not pool.free.is_set():
        with suppress(asyncio.CancelledError):
            await pool.acquire()


async def report() -> None:
    """Report progress again and again, so that its row changes with each update."""
    task = current_task()
    assert task is not None
    for number in itertools.count():
        task.progress.update(done=number % 100, total=100, message=f"line {number}")
        await asyncio.sleep(0.1)


async def with_children() -> None:
    """Open a group with three tasks."""
    async with TaskGroup("parts") as group:
        for _ in range(3):
            group.create_task(work(), name="part")


async def await_plainly() -> None:
    """Wait for a task that the manager does not know."""
    await asyncio.create_task(work(), name="Task-18")


KINDS = {
    "work": work,
    "fail": fail,
    "ignore": ignore,
    "report": report,
    "with_children": with_children,
    "await_plainly": await_plainly,
}


@app.post("/control/tasks")
async def create(
    name: str, group: str | None = None, count: int = 1, kind: str = "work", limit: int = 0
) -> None:
    """Create tasks."""
    if limit:
        manager.get_group(group or "").max_concurrency = limit
    for _ in range(count):
        manager.create_task(KINDS[kind](), name=name, group=group, priority=TaskPriority.NORMAL)


@app.post("/control/texts")
async def create_with_texts(text: str) -> None:
    """Create a task that shows a text wherever one of the service may be."""

    async def show() -> None:
        task = current_task()
        assert task is not None
        task.progress.update(done=1, total=2, message=text)
        await asyncio.create_task(work(), name=text)
        raise ValueError(text)

    manager.create_task(show(), name="show", metadata={"text": text})


@app.post("/control/cancel")
async def cancel(name: str, reason: str | None = None) -> None:
    """Cancel a task, and do not wait for its end."""
    manager.get_task(name).cancel(reason)


@app.post("/control/end")
async def end() -> None:
    """End all tasks that wait at the pool: they complete or fail."""
    pool.free.set()
    await asyncio.sleep(0.05)
    pool.free.clear()


@app.post("/control/log-out")
async def log_out() -> None:
    """End the login of all viewers."""
    login.ended = True


@app.post("/control/reset")
async def reset() -> None:
    """Leave no task."""
    login.ended = False
    pool.free.set()
    await manager.cancel_all_tasks(timeout=5.0)
    manager.cleanup_completed_tasks()
    pool.free.clear()


@app.get("/control/live")
async def live() -> list[str]:
    """The names of the live tasks."""
    return [info.name for info in manager.get_all_task_info().values() if not info.status.is_final]


@app.get("/report/{number}")
async def get_report(number: int, tasks: RequestTasks) -> str:
    """Fan out, and wait for a task that does not stop."""
    stuck = tasks.create_task(ignore(), name="sync_mail", priority=TaskPriority.HIGH)
    for _ in range(3):
        tasks.create_task(work(), name="fetch_prices")
    chart = tasks.create_task(wait_for(stuck), name="render_chart")
    await chart
    return str(number)


async def wait_for(task: ManagedTask[Any]) -> None:
    """Wait for another task."""
    await task


@app.get("/control/pid")
async def pid() -> int:
    """The process that serves."""
    return os.getpid()


# The same below a prefix that the application does not know of.
outer = FastAPI(lifespan=app.router.lifespan_context)
outer.mount("/shop", app)


@outer.get("/{path:path}")
async def nothing(path: str) -> None:
    """Let a wrong address fail loudly."""
    raise HTTPException(404, f"no page {path!r}")
