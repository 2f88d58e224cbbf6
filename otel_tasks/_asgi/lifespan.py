"""Lifespans: which runs of which applications use a manager, and who shuts it down with the server.

Rules, each with a test of its own:

1. A manager is shut down when the last lifespan that uses it in this event loop ends.
2. The lifespan of an application and the middleware around it are one run. The lifespan ends first and shuts
   the manager down, while the tasks can still use its resources.
3. The middleware acts after the application's own shutdown, before the server learns that it is complete. It
   leaves a manager alone that something else has shut down.
4. Of several nested middlewares, the outermost acts, for the managers of all of them at the same time.
5. An application that does not support lifespans behaves as without the middleware.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from otel_tasks._core.lifetime import is_open_in, open_in, shut_down
from otel_tasks._core.options import FROM_MANAGER

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks._asgi.connection import Message, Receive, Scope, Send
    from otel_tasks._core.manager import TaskManager
    from otel_tasks._core.options import FromManager

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BY_MIDDLEWARE = "TaskGroupMiddleware at the end of the application's lifespan"
_ENDS = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})


async def serve_lifespan(app: App, manager: TaskManager, scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a lifespan scope to ``app``, and shut ``manager`` down at its end if nothing else has.

    Cancellation: of the server's task propagates after the shutdown. A second one stops the shutdown.
    """
    run = _current_run()
    if run is not None:
        run.join(manager)
        await app(scope, receive, send)
        return
    run = _begin_run()
    run.join(manager)
    # Never reset: the garbage collector may end this in another context. A run that is over counts as none.
    _current.set(run)
    try:
        await _serve(app, run, scope, receive, send)
    finally:
        run.is_over = True
        _runs.discard(run)


@asynccontextmanager
async def managed(
    manager: TaskManager, grace: float | FromManager, timeout: float | FromManager | None, by: str
) -> AsyncGenerator[None]:
    """Open ``manager`` for the block, and shut it down at its end if no other lifespan uses it here.

    Cancellation: of the block propagates after the shutdown; during the shutdown, it stops that.
    """
    # Not `async with`: its exit has no grace and no timeout, and would wait for stubborn tasks again.
    await manager.__aenter__()
    around = _current_run()
    run = around or _begin_run()
    run.claim(manager)
    try:
        yield
    finally:
        is_last = run.release(manager)
        if around is None:
            _runs.discard(run)
        if is_last and _get_running_loop() is run.loop:
            await shut_down(manager, grace, timeout, by)


class Run:
    """One run of an application in a server: the managers that it uses, until it ends.

    Attributes:
        has_started: The application has said that its startup is complete.
        is_over: The run has ended.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        # How many lifespans of the application have opened each manager; 0: only a middleware uses it.
        self.managers: dict[TaskManager, int] = {}
        self.has_started = self.is_over = False
        # The server has told the application to start.
        self._is_starting = False

    def join(self, manager: TaskManager) -> None:
        """Note that a middleware of this run uses ``manager``."""
        self.managers.setdefault(manager, 0)
        if self._is_starting:
            open_in(manager, self.loop)

    def start(self) -> None:
        """Open the managers: the application is about to start."""
        self._is_starting = True
        for manager in self.managers:
            open_in(manager, self.loop)

    def claim(self, manager: TaskManager) -> None:
        """Note that a lifespan of this run has opened ``manager``."""
        self.managers[manager] = self.managers.get(manager, 0) + 1

    def release(self, manager: TaskManager) -> bool:
        """Note that this lifespan has ended; return True if it was the last one to use ``manager``."""
        count = self.managers.get(manager, 1) - 1
        if count:
            self.managers[manager] = count
        else:
            self.managers.pop(manager, None)
        return not _is_used(manager, self.loop)

    async def end(self) -> None:
        """Shut down the managers that nothing has shut down yet."""
        self.is_over = True
        if _get_running_loop() is not self.loop:
            # The loop is gone, and the garbage collector closes the server's coroutines: nothing can wait.
            return
        managers = list(self.managers)
        self.managers.clear()
        open_ones = [
            manager
            for manager in managers
            if not _is_used(manager, self.loop) and is_open_in(manager, self.loop)
        ]
        shutdowns = [shut_down(manager, FROM_MANAGER, FROM_MANAGER, _BY_MIDDLEWARE) for manager in open_ones]
        if len(shutdowns) == 1:
            await shutdowns[0]
        elif shutdowns:
            # At the same time: all of them together get the bounds of one.
            await asyncio.gather(*shutdowns)


# The runs that have not ended, of all loops.
_runs: set[Run] = set()
_current: ContextVar[Run | None] = ContextVar("otel_tasks_run", default=None)


def _begin_run() -> Run:
    for run in list(_runs):
        if run.loop.is_closed():
            # The loop was closed before the run could end.
            _runs.discard(run)
    run = Run()
    _runs.add(run)
    return run


def _current_run() -> Run | None:
    run = _current.get()
    # A context may be passed on: to a task that outlives the run, or to another loop.
    return None if run is None or run.is_over or run.loop is not asyncio.get_running_loop() else run


def _is_used(manager: TaskManager, loop: asyncio.AbstractEventLoop) -> bool:
    return any(manager in run.managers and run.loop is loop for run in list(_runs))


async def _serve(app: App, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
    async def receive_start() -> Message:
        message = await receive()
        if message["type"] == "lifespan.startup":
            run.start()
        return message

    async def send_after_shutdown(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            run.has_started = True
        elif message["type"] in _ENDS:
            await run.end()
        await send(message)

    try:
        await app(scope, receive_start, send_after_shutdown)
    except (Exception, asyncio.CancelledError):
        if run.has_started:
            await run.end()
        raise
    if run.has_started:
        # An application may return without confirming its shutdown.
        await run.end()
