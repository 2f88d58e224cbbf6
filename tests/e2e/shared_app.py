"""Requests that wait for tasks of the application, and tasks that outlive their request."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from otel_tasks import ManagedTask, TaskGroup, create_task
from otel_tasks.asgi import TaskGroupMiddleware
from tests.e2e.journal import PATIENCE, manager, note, noted, released, work


async def load(of: str) -> str:
    """What the requests of a scenario wait for, together."""
    with noted(of, "load"):
        await released(f"{of}-load")
    return f"price of {of}"


def shared(of: str) -> ManagedTask[str]:
    """The one task of the application that loads it."""
    return manager.create_task(load(of), name=f"load-{of}", group="cache", on_conflict="return")


plain_tasks: dict[str, asyncio.Task[str]] = {}


def plain(of: str) -> asyncio.Task[str]:
    """The same as a plain task, which no request has started."""
    if of not in plain_tasks:
        plain_tasks[of] = asyncio.get_running_loop().create_task(load(of), context=contextvars.Context())
    return plain_tasks[of]


async def _pass(waited: Awaitable[str]) -> str:
    return await waited


async def _await(of: str) -> str:
    return await shared(of)


async def _plain(of: str) -> str:
    return await plain(of)


async def _wait(of: str) -> str:
    task = shared(of)
    await asyncio.wait([task])
    return task.result()


async def _shield(of: str) -> str:
    return await asyncio.shield(shared(of))


async def _timeout(of: str) -> str:
    async with asyncio.timeout(PATIENCE):
        return await shared(of)


async def _wait_for(of: str) -> str:
    return await asyncio.wait_for(shared(of), PATIENCE)


async def _wait_for_task(of: str) -> str:
    shared(of)
    result: str = await manager.wait_for_task(f"load-{of}")
    return result


async def _gather(of: str) -> str:
    return (await asyncio.gather(shared(of), asyncio.sleep(0)))[0]


async def _as_completed(of: str) -> str:
    for each in asyncio.as_completed([shared(of)]):
        return await each
    raise AssertionError


async def _asyncio_group(of: str) -> str:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_pass(shared(of)))
    return task.result()


async def _scoped_group(of: str) -> str:
    async with TaskGroup() as group:
        task = group.create_task(_pass(shared(of)))
    return task.result()


async def _nested_task(of: str) -> str:
    return await asyncio.create_task(_pass(shared(of)))


async def _request_task(of: str) -> str:
    return await create_task(_pass(shared(of)))


async def _timeout_that_expires(of: str) -> str:
    async with asyncio.timeout(0.05):
        return await shared(of)


async def _cancelled_waiter(of: str) -> str:
    waiter = asyncio.create_task(_pass(shared(of)))
    await asyncio.sleep(0.05)
    waiter.cancel()
    await asyncio.wait([waiter])
    return f"cancelled: {waiter.cancelled()}"


WAYS: dict[str, Callable[[str], Awaitable[str]]] = {
    "await": _await,
    "plain": _plain,
    "wait": _wait,
    "shield": _shield,
    "timeout": _timeout,
    "wait-for": _wait_for,
    "wait-for-task": _wait_for_task,
    "gather": _gather,
    "as-completed": _as_completed,
    "asyncio-group": _asyncio_group,
    "scoped-group": _scoped_group,
    "nested-task": _nested_task,
    "request-task": _request_task,
    "timeout-that-expires": _timeout_that_expires,
    "cancelled-waiter": _cancelled_waiter,
}

router = APIRouter()


@router.get("/{way}/{key}")
@router.post("/{way}/{key}")
async def wait(way: str, key: str, of: str) -> str:
    """Wait for the application's task in one of the ways."""
    with noted(key):
        return await WAYS[way](of)


sessions = APIRouter()
_kept: set[asyncio.Task[None]] = set()


@sessions.get("/session/{key}")
async def open_session(key: str, how: str = "task") -> str:
    """Start what goes on after the request, and starts tasks then."""

    async def session() -> None:
        with noted(key, "session"):
            await released(f"{key}-session")
            if how == "group":
                async with TaskGroup() as group:
                    group.create_task(_note_group(key), name="late")
            else:
                await create_task(_note_group(key), name="late")

    def call_back() -> None:
        task = create_task(_note_group(key), name="late")
        task.add_done_callback(lambda _: note(key, "session returned"))

    async def later() -> None:
        await released(f"{key}-session")
        asyncio.get_running_loop().call_soon(call_back)

    task = asyncio.create_task(later() if how == "callback" else session())
    _kept.add(task)
    task.add_done_callback(_kept.discard)
    create_task(work(key, "first"), name="first")
    return key


async def _note_group(key: str) -> None:
    task = asyncio.current_task()
    assert isinstance(task, ManagedTask)
    note(key, "late task", group=task.group.name)


def _app() -> ASGIApp:
    app = FastAPI()
    app.include_router(sessions)
    app.include_router(router)
    # A POST also ends where it waits for nothing of its own.
    app.add_middleware(TaskGroupMiddleware, manager=manager, cancel_handler=True)
    return app


variants: dict[str, ASGIApp] = {"shared": _app()}
