"""Everything for a FastAPI application: the middleware, the request's group, lifespans, progress as events.

The middleware and its functions come from ``otel_tasks.asgi``, which imports no framework.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncContextDecorator, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from zlib import crc32

import fastapi
from fastapi import Depends

from otel_tasks._asgi.lifespan import managed
from otel_tasks._asgi.request import require_request
from otel_tasks._asgi.server_stop import cut_requests_on_stop
from otel_tasks._asgi.settings import checked_manager
from otel_tasks._asgi.timeout import checked_timeout
from otel_tasks._core.checks import checked_finite_seconds, checked_seconds
from otel_tasks._core.functions import global_task_manager
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.info import TaskInfo
from otel_tasks._core.options import FROM_MANAGER, FromManager
from otel_tasks._core.task import ManagedTask
from otel_tasks._core.waiting import wait_until_done
from otel_tasks.asgi import (
    ClientDisconnected,
    TaskGroupMiddleware,
    call_on_server_stop,
    request_group,
    set_cancel_handler,
    set_request_timeout,
    uncancellable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from fastapi import FastAPI
    from fastapi.sse import ServerSentEvent

    from otel_tasks._core.manager import TaskManager
    from otel_tasks.fleet import Fleet
    from otel_tasks.progress import Progress, ProgressWatch

__all__ = [
    "ClientDisconnected",
    "RequestTasks",
    "RequestTimeout",
    "TaskGroupMiddleware",
    "call_on_server_stop",
    "cancel_handler_on_disconnect",
    "keep_handler_on_disconnect",
    "lifespan",
    "make_lifespan",
    "progress_events",
    "request_group",
    "set_cancel_handler",
    "set_request_timeout",
    "uncancellable",
]

State = TypeVar("State")

# A dependency runs in a request: if it finds none, only the middleware can be missing.
_NO_MIDDLEWARE = "needs the task group of the request; to have one"


# All three are `async`, although nothing waits: FastAPI runs a plain function in a thread.


async def _request_tasks() -> TaskGroup:
    return require_request("RequestTasks", _NO_MIDDLEWARE).own_group()


RequestTasks = Annotated[TaskGroup, Depends(_request_tasks)]
"""The current request's task group, as a parameter of a route.

It is made before the route is called. A task that still runs when the request ends is cancelled, unless the
middleware's ``on_exit`` says otherwise: the group does *not* wait before the response.

Raises:
    RuntimeError: The application has no ``TaskGroupMiddleware``.

Example:
    >>> @app.get("/report/{id}")
    ... async def report(id: int, tasks: RequestTasks):
    ...     return await tasks.create_task(fetch(id))
"""


async def cancel_handler_on_disconnect() -> None:
    """Cancel this route's handler when the client leaves, whatever its method; use it as a dependency.

    If the client has already left, because a dependency before this one took long, the route is not called.

    Raises:
        RuntimeError: The application has no ``TaskGroupMiddleware``.

    Cancellation: it waits for nothing, and raises the CancelledError if the client has already left.

    Example:
        >>> @app.post("/preview", dependencies=[Depends(cancel_handler_on_disconnect)])
        ... async def preview(): ...
    """
    if require_request("cancel_handler_on_disconnect", _NO_MIDDLEWARE).decide_handler(True):
        # The CancelledError is raised at the next await: here, before the route is called.
        await asyncio.sleep(0)


async def keep_handler_on_disconnect() -> None:
    """Let this route's handler finish when the client leaves, whatever its method; use it as a dependency.

    The tasks of the request's group are cancelled anyway, and with them a handler that awaits one of them.

    Raises:
        RuntimeError: The application has no ``TaskGroupMiddleware``.

    Cancellation: it never waits.

    Example:
        >>> @app.get("/export", dependencies=[Depends(keep_handler_on_disconnect)])
        ... async def export(): ...
    """
    require_request("keep_handler_on_disconnect", _NO_MIDDLEWARE).decide_handler(False)


class RequestTimeout:
    """Cut this route's requests short after some seconds, whatever the middleware's ``request_timeout`` says.

    Use it as a dependency. The time counts from the opening of the request; FastAPI reads the body before it
    calls dependencies. Of several dependencies, the last one decides: the route's after the router's.

    Args:
        seconds: Seconds above 0; None for no bound.

    Raises:
        TypeError: ``seconds`` is not a number.
        ValueError: ``seconds`` is not above 0, or not finite.

    Example:
        >>> @app.get("/search", dependencies=[Depends(RequestTimeout(5.0))])
        ... async def search(): ...
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = checked_timeout("RequestTimeout()", seconds)

    async def __call__(self) -> None:
        """Decide for the current request; FastAPI calls this.

        Raises:
            RuntimeError: The application has no ``TaskGroupMiddleware``.

        Cancellation: it waits for nothing, and raises the CancelledError if the time is up already.
        """
        if require_request("RequestTimeout", _NO_MIDDLEWARE).decide_time_limit(self.seconds):
            # The CancelledError is raised at the next await: here, before the route is called.
            await asyncio.sleep(0)

    def __repr__(self) -> str:
        return f"RequestTimeout({self.seconds!r})"


def lifespan(app: FastAPI) -> AbstractAsyncContextManager[None]:
    """Open the global manager when the server starts, and shut it down with the server.

    The same as ``make_lifespan()``. Tasks that the shutdown cancels have the cause ``shutdown``.

    Args:
        app: The application; FastAPI passes it.

    Returns:
        The context manager that FastAPI enters.

    Example:
        >>> app = FastAPI(lifespan=lifespan)
    """
    return _run(None, global_task_manager, FROM_MANAGER, FROM_MANAGER, None, app)


def make_lifespan(
    inner: Callable[[FastAPI], AbstractAsyncContextManager[State]] | None = None,
    *,
    manager: TaskManager | None = None,
    grace: float | FromManager = FROM_MANAGER,
    timeout: float | FromManager | None = FROM_MANAGER,
    request_grace: float | None = None,
    fleet: Fleet | None = None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """Make a lifespan that shuts a manager down with the server, inside a lifespan of your own.

    ``inner`` starts first and ends last: its resources are available as long as a task may use them. Tasks
    that the shutdown cancels have the cause ``shutdown``.

    Args:
        inner: The application's own lifespan; the value that it yields becomes the state.
        manager: The manager to open and to shut down. None: that of ``fleet``, or ``global_task_manager``.
        grace: Seconds in which tasks may finish before they are cancelled, at least 0 and finite: no server
            waits forever. By default, the manager's ``grace``.
        timeout: Seconds for everything after that, at least 0; None for no bound. By default, the manager's
            ``shutdown_timeout``. The sum of both, and of the time that open requests get before, must stay
            below the time that the process has to end (Kubernetes: ``terminationGracePeriodSeconds``).
        request_grace: Seconds that open requests, streams, and WebSockets get from the server's signal
            (SIGTERM or SIGINT) on, at least 0 and finite. Those that are left are then cancelled with cause
            ``shutdown``: the client gets a 503 if no response has started, a WebSocket closes with 1012, and
            a stream ends. None leaves open requests to the server: uvicorn waits for them forever, or cancels
            them after ``--timeout-graceful-shutdown`` and logs an error. A shorter bound of the server's own
            wins: uvicorn and granian close WebSockets at the signal. It has no effect where the server gets
            no signal, as in a thread or a ``TestClient``.
        fleet: A fleet to join while the application runs: before the manager is opened, until it is shut
            down. None: the process is on its own.

    Returns:
        A lifespan for ``FastAPI(lifespan=...)``.

    Raises:
        TypeError: ``inner`` is not a lifespan, ``manager`` not a TaskManager, ``fleet`` not a Fleet, or a
            duration not a number.
        ValueError: A duration is negative, ``grace`` or ``request_grace`` is infinite, or ``fleet`` has
            another manager.

    Telemetry: the server span of a request that is cut short gets ``otel_tasks.request.outcome`` =
    ``shutdown``.

    Example:
        >>> app = FastAPI(lifespan=make_lifespan(open_database, grace=2.0, request_grace=5.0))
    """
    _check_inner(inner)
    chosen = _manager_of(manager, fleet)
    if not isinstance(grace, FromManager):
        _check_grace(grace)
    if not isinstance(timeout, FromManager):
        checked_seconds("timeout", timeout)
    if request_grace is not None:
        checked_finite_seconds("request_grace", request_grace)

    def run(app: FastAPI) -> AbstractAsyncContextManager[State]:
        return _run(inner, chosen, grace, timeout, request_grace, app, fleet)

    return run


def _manager_of(manager: TaskManager | None, fleet: object) -> TaskManager:
    """Return the manager to shut down, after checking that the fleet has the same one."""
    if fleet is None:
        return checked_manager(manager)
    # An application without a fleet does not load it.
    from otel_tasks.fleet import Fleet

    if not isinstance(fleet, Fleet):
        raise TypeError(
            f'fleet must be a Fleet, got {fleet!r}: write fleet=Fleet("redis://...", namespace="shop")'
        )
    if fleet.is_observer:
        # The tasks of this process do not belong to the fleet.
        return checked_manager(manager)
    if manager is not None and checked_manager(manager) is not fleet.manager:
        raise ValueError(
            f"the fleet has manager {fleet.manager.name!r}, and the lifespan {manager.name!r}: "
            "leave manager out here, and write Fleet(..., manager=manager)"
        )
    return fleet.manager


def _check_inner(inner: object) -> None:
    if isinstance(inner, AsyncContextDecorator):
        # The result of an `@asynccontextmanager` function is callable, as a decorator: it would fail late.
        raise TypeError(
            f"make_lifespan() takes the lifespan itself, got the result of calling it, {inner!r}: "
            "write make_lifespan(open_database), without a call"
        )
    if inner is not None and not callable(inner):
        raise TypeError(
            f"make_lifespan() takes a lifespan, a function of the application, got {inner!r}; "
            "options are named: write make_lifespan(manager=manager, grace=5.0)"
        )


def _check_grace(grace: float) -> None:
    _check_number("grace", grace, "leave it out for that of the manager, or pass 0 for none")
    if checked_seconds("grace", grace) is None:
        raise ValueError(
            f"grace must be a finite number of seconds, got {grace!r}: "
            "the server ends the process at its own limit; stay below that"
        )


def _check_number(what: str, seconds: object, hint: str) -> None:
    # For options that must not be None: for `checked_seconds`, that is "no bound".
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be seconds as a number, got {seconds!r}: {hint}")


@asynccontextmanager
async def _run(
    inner: Callable[[FastAPI], AbstractAsyncContextManager[Any]] | None,
    manager: TaskManager,
    grace: float | FromManager,
    timeout: float | FromManager | None,
    request_grace: float | None,
    app: FastAPI,
    fleet: Fleet | None = None,
) -> AsyncGenerator[Any]:
    opened = managed(manager, grace, timeout, _described(app))
    stoppable = cut_requests_on_stop(request_grace)
    # Until the manager is shut down: its tasks may wait for other processes, and report to them.
    member = nullcontext() if fleet is None else fleet
    if inner is None:
        async with stoppable, member, opened:
            yield None
        return
    # After `inner` has started: on top of the handlers of signals that it installs.
    async with inner(app) as state, stoppable, member, opened:
        yield state


def _described(app: object) -> str:
    # Starlette's applications have no title.
    title = getattr(app, "title", None)
    return "the application's lifespan" if title is None else f"the lifespan of app {title!r}"


def progress_events(
    task: ManagedTask[Any] | TaskInfo,
    *,
    last_event_id: str | None = None,
    interval: float = 0.1,
    keep_alive: float | None = None,
) -> AsyncGenerator[ServerSentEvent]:
    """Stream a task's progress as the events of a route with ``response_class=EventSourceResponse``.

    A ``progress`` event carries the newest snapshot (``Progress.to_dict()``). The last event, ``ended``, says
    how the task ended: ``status``, ``cancel_reason``, ``duration`` and the last ``progress``. It does *not*
    contain the text of an exception, which may be confidential. Each event has an id. A client that comes
    back with the last id gets only newer events; with the id of ``ended``, none. A browser reconnects until
    its ``EventSource`` is closed: close it on ``ended``.

    Args:
        task: The task, or the snapshot of a task that has ended, for clients that come late.
        last_event_id: The request's ``Last-Event-ID`` header. A value that is not an id of this task's events
            counts as none.
        interval: Seconds between two ``progress`` events, at least 0. Reports in between are skipped; the end
            of the task is sent at once. Infinity: only the first event and the last are sent.
        keep_alive: Seconds of silence after which a comment is sent, greater than ``interval``. None leaves
            that to FastAPI, which sends one every 15 s.

    Returns:
        The events.

    Raises:
        RuntimeError: This version of FastAPI has no server-sent events; 0.135 and later do.
        TypeError: ``task`` is neither a task nor a snapshot, or a duration is not a number.
        ValueError: ``task`` is the snapshot of a live task, or a duration is out of its range.

    Cancellation: of the request, because the client has left, ends the stream. The task goes on, unless
    it belongs to the group of that request.

    Example:
        >>> @app.get("/exports/{name}/progress", response_class=EventSourceResponse)
        ... async def export_progress(
        ...     # Looked up in a dependency, which can answer 404: here, the response has started.
        ...     task: Annotated[ManagedTask[Any] | TaskInfo, Depends(find_export)],
        ...     last_event_id: Annotated[str | None, Header()] = None,
        ... ) -> AsyncIterator[ServerSentEvent]:
        ...     async for event in progress_events(task, last_event_id=last_event_id):
        ...         yield event
    """
    try:
        from fastapi.sse import ServerSentEvent
    except ImportError:
        raise RuntimeError(
            "progress_events() needs the server-sent events of FastAPI 0.135 or newer, "
            f"and this is {fastapi.__version__}"
        ) from None
    _check_watchable(task)
    _check_number("interval", interval, "leave it out for 0.1, or pass 0 for every report")
    pause = checked_seconds("interval", interval)
    patience = checked_seconds("keep_alive", keep_alive)
    if patience is not None and (pause is None or patience <= pause):
        raise ValueError(f"keep_alive must be greater than interval ({interval!r} s), got {keep_alive!r}")
    return _events(task, last_event_id, pause, patience, ServerSentEvent)


async def _events(
    task: ManagedTask[Any] | TaskInfo,
    last_event_id: str | None,
    interval: float | None,
    keep_alive: float | None,
    event: type[ServerSentEvent],
) -> AsyncGenerator[ServerSentEvent]:
    info = task if isinstance(task, TaskInfo) else task.info()
    # A later task, or a restart, may use the same name: then the client's id says nothing about this task.
    key = f"{crc32(f'{info.name} {info.created_at!r}'.encode()):08x}"
    seen = _seen(key, last_event_id)
    if seen is None:
        return
    if isinstance(task, ManagedTask):
        watch = task.progress.watch(after=seen)
        while True:
            try:
                progress = await _next(watch, keep_alive)
            except StopAsyncIteration:
                break
            yield (
                event(comment="keep-alive")
                if progress is None
                else event(event="progress", id=f"{key}-{progress.number}", data=progress.to_dict())
            )
            await wait_until_done([task], 0.0 if progress is None else interval)
        # The stream of snapshots ends with the task, whose record may be written a turn later.
        await wait_until_done([task])
        info = task.info()
    yield event(event="ended", id=f"{key}-end", data=_ending(info))


async def _next(watch: ProgressWatch, timeout: float | None) -> Progress | None:
    try:
        async with asyncio.timeout(timeout):
            return await anext(watch)
    except TimeoutError:
        return None


def _check_watchable(task: ManagedTask[Any] | TaskInfo) -> None:
    if not isinstance(task, ManagedTask | TaskInfo):
        raise TypeError(
            f"progress_events() takes a ManagedTask, or the TaskInfo of a task that has ended, got {task!r}"
        )
    if isinstance(task, TaskInfo) and not task.status.is_final:
        raise ValueError(
            f"progress_events() got a snapshot of task {task.name!r}, which is {task.status}: "
            f"pass the task itself, manager.get_task({task.id!r})"
        )


def _seen(key: str, last_event_id: str | None) -> int | None:
    """Return the number of the last snapshot that the client knows, 0 for none; None if it knows the end."""
    prefix, _, number = (last_event_id or "").rpartition("-")
    if prefix != key:
        return 0
    if number == "end":
        return None
    # The client chooses the header, and int() is slow with thousands of digits.
    return int(number) if number.isdecimal() and len(number) < 20 else 0


def _ending(info: TaskInfo) -> dict[str, Any]:
    return {
        "status": str(info.status),
        "cancel_reason": info.cause and str(info.cause.kind),
        "duration": info.duration,
        "progress": info.progress and info.progress.to_dict(),
    }
