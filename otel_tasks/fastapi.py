"""A thin adapter for FastAPI: the request's group as a dependency, and a lifespan for the manager.

The middleware itself knows no framework: ``app.add_middleware(TaskGroupMiddleware)`` comes from
``otel_tasks.asgi``.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends

from otel_tasks._group import TaskGroup, checked_seconds
from otel_tasks._manager import global_task_manager
from otel_tasks.asgi import (
    TaskGroupMiddleware,
    checked_manager,
    request_group,
    set_cancel_handler,
    uncancellable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from fastapi import FastAPI

    from otel_tasks._manager import TaskManager

__all__ = [
    "RequestTasks",
    "TaskGroupMiddleware",
    "cancel_handler_on_disconnect",
    "keep_handler_on_disconnect",
    "lifespan",
    "make_lifespan",
    "request_group",
    "uncancellable",
]

State = TypeVar("State")


# `async`, all three, though nothing here waits: FastAPI runs a plain function in a thread.


async def _request_tasks() -> TaskGroup:
    return request_group()


RequestTasks = Annotated[TaskGroup, Depends(_request_tasks)]
"""The current request's task group, as a parameter of a route.

It is made as soon as the route is called. It does *not* close over the response: what still runs when the
request ends is cancelled, unless the middleware's ``on_exit`` says otherwise.

Example:
    >>> @app.get("/report/{id}")
    ... async def report(id: int, tasks: RequestTasks):
    ...     return await tasks.create_task(fetch(id))
"""


async def cancel_handler_on_disconnect() -> None:
    """As a dependency: cancel this route's handler when the client leaves, whatever its method.

    Raises:
        RuntimeError: The application has no ``TaskGroupMiddleware``.

    **Cancellation**: passed on; it never waits.

    Example:
        >>> @app.post("/preview", dependencies=[Depends(cancel_handler_on_disconnect)])
        ... async def preview(): ...
    """
    set_cancel_handler(True)


async def keep_handler_on_disconnect() -> None:
    """As a dependency: let this route's handler finish when the client leaves, whatever its method.

    The tasks of the request's group are cancelled all the same, and the handler with the one that it awaits.

    Raises:
        RuntimeError: The application has no ``TaskGroupMiddleware``.

    **Cancellation**: passed on; it never waits.
    """
    set_cancel_handler(False)


def lifespan(app: FastAPI) -> AbstractAsyncContextManager[None]:
    """Open the global manager when the server starts, and shut it down with the server.

    The same as ``make_lifespan()``. Tasks that the shutdown cancels have the cause ``shutdown``.

    Args:
        app: The application; FastAPI passes it.

    Example:
        >>> app = FastAPI(lifespan=lifespan)
    """
    return _run(None, global_task_manager, 5.0, 10.0, app)


def make_lifespan(
    inner: Callable[[FastAPI], AbstractAsyncContextManager[State]] | None = None,
    *,
    manager: TaskManager | None = None,
    grace: float = 5.0,
    timeout: float | None = 10.0,
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """Make a lifespan that shuts a manager down with the server, around one of your own.

    ``inner`` starts first and ends last: its resources are there for as long as a task may use them.

    Args:
        inner: The application's own lifespan; what it yields is passed on as the state.
        manager: The manager to open and to shut down. None: ``global_task_manager``.
        grace: Seconds that tasks have to finish in before they are cancelled.
        timeout: Seconds for all that comes after, None for no bound. Stay below the server's own limit
            (uvicorn: ``--timeout-graceful-shutdown``), or it ends the process first.

    Returns:
        What ``FastAPI(lifespan=...)`` takes.

    Raises:
        TypeError: ``manager`` is no TaskManager, or a duration no number.
        ValueError: A duration is negative.

    Example:
        >>> app = FastAPI(lifespan=make_lifespan(open_database, grace=2.0))
    """
    chosen = checked_manager(manager)
    checked_seconds("grace", grace)
    checked_seconds("timeout", timeout)

    def run(app: FastAPI) -> AbstractAsyncContextManager[State]:
        return _run(inner, chosen, grace, timeout, app)

    return run


@asynccontextmanager
async def _run(
    inner: Callable[[FastAPI], AbstractAsyncContextManager[Any]] | None,
    manager: TaskManager,
    grace: float,
    timeout: float | None,
    app: FastAPI,
) -> AsyncGenerator[Any]:
    if inner is None:
        async with _opened(manager, grace, timeout):
            yield None
        return
    async with inner(app) as state, _opened(manager, grace, timeout):
        yield state


@asynccontextmanager
async def _opened(manager: TaskManager, grace: float, timeout: float | None) -> AsyncGenerator[None]:
    # Not `async with`: its exit knows no grace and no timeout, and would wait for stubborn tasks again.
    await manager.__aenter__()
    try:
        yield
    finally:
        await manager.shutdown(grace, timeout)
