"""Lifespans: which runs of which applications use a manager, and who shuts it down with the server.

Rules, each with a test of its own:

1. A manager is shut down when the last lifespan that uses it in this event loop ends.
2. The lifespan of an application and the middleware around it are one run. The lifespan ends first and shuts
   the manager down, while the tasks can still use its resources.
3. The middleware acts after the application's own shutdown, before the server learns that it is complete. It
   leaves a manager alone that something else has shut down.
4. Of several nested middlewares the outermost acts, for the managers of all of them at the same time.
5. An application that does not support lifespans behaves as without the middleware.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks._asgi.connection import Message, Receive, Scope, Send
    from otel_tasks._core.manager import TaskManager

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

GRACE = 5.0
TIMEOUT = 10.0

_BY_MIDDLEWARE = "TaskGroupMiddleware at the end of the application's lifespan"
_ENDS = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})


class Run:
    """One run of an application in a server: the managers that it uses, until it ends."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        # How many lifespans of the application have opened each manager; 0: only a middleware uses it.
        self.managers: dict[TaskManager, int] = {}
        # The server has asked the application to start; the application has said that it did; all is over.
        self.begun = self.started = self.over = False

    def join(self, manager: TaskManager) -> None:
        """Note that a middleware of this run uses ``manager``."""
        self.managers.setdefault(manager, 0)
        if self.begun:
            _open(manager, self.loop)

    def begin(self) -> None:
        """Open the managers: the application is about to start."""
        self.begun = True
        for manager in self.managers:
            _open(manager, self.loop)

    def claim(self, manager: TaskManager) -> None:
        """Note that a lifespan of this run has opened ``manager``."""
        self.managers[manager] = self.managers.get(manager, 0) + 1

    def release(self, manager: TaskManager) -> bool:
        """Note that this lifespan has ended; True if it was the last one to use ``manager``."""
        count = self.managers.get(manager, 1) - 1
        if count:
            self.managers[manager] = count
        else:
            self.managers.pop(manager, None)
        return not _is_used(manager, self.loop)

    async def end(self) -> None:
        """Shut down the managers that nothing has shut down so far."""
        self.over = True
        if _get_running_loop() is not self.loop:
            # The loop is gone, and the garbage collector closes the server's coroutines: no time to wait.
            return
        managers = list(self.managers)
        self.managers.clear()
        left = [
            manager._shut_down(GRACE, TIMEOUT, _BY_MIDDLEWARE)
            for manager in managers
            if not _is_used(manager, self.loop) and manager._ledger.is_open_in(self.loop)
        ]
        if len(left) == 1:
            await left[0]
        elif left:
            # At the same time: the bounds are those of one.
            await asyncio.gather(*left)


# The runs that have not ended, of all loops.
_runs: set[Run] = set()
_current: ContextVar[Run | None] = ContextVar("otel_tasks_run", default=None)


def _begin_run() -> Run:
    for run in list(_runs):
        if run.loop.is_closed():
            # It was never told of its end.
            _runs.discard(run)
    run = Run()
    _runs.add(run)
    return run


def _current_run() -> Run | None:
    run = _current.get()
    # Its context may have been handed on: to a task that outlives the run, or to another loop.
    return None if run is None or run.over or run.loop is not asyncio.get_running_loop() else run


def _is_used(manager: TaskManager, loop: asyncio.AbstractEventLoop) -> bool:
    return any(manager in run.managers and run.loop is loop for run in list(_runs))


def _open(manager: TaskManager, loop: asyncio.AbstractEventLoop) -> None:
    ledger = manager._ledger
    ledger.meet(loop)
    if ledger.loop is loop and ledger.closed:
        ledger.reopen()


async def serve_lifespan(app: App, manager: TaskManager, scope: Scope, receive: Receive, send: Send) -> None:
    """Pass a lifespan scope on, and shut ``manager`` down at its end if nothing else has.

    **Cancellation**: of the server's task is passed on after the shutdown; a second one stops the shutdown.
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
        run.over = True
        _runs.discard(run)


async def _serve(app: App, run: Run, scope: Scope, receive: Receive, send: Send) -> None:
    async def receive_start() -> Message:
        message = await receive()
        if message["type"] == "lifespan.startup":
            run.begin()
        return message

    async def send_after_shutdown(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            run.started = True
        elif message["type"] in _ENDS:
            await run.end()
        await send(message)

    try:
        await app(scope, receive_start, send_after_shutdown)
    except (Exception, asyncio.CancelledError):
        if run.started:
            await run.end()
        raise
    if run.started:
        # An application may return without a word about its shutdown.
        await run.end()


@asynccontextmanager
async def managed(manager: TaskManager, grace: float, timeout: float | None, by: str) -> AsyncGenerator[None]:
    """Open ``manager`` for the block, and shut it down at its end if no other lifespan uses it here."""
    # Not `async with`: its exit knows no grace and no timeout, and would wait for stubborn tasks again.
    await manager.__aenter__()
    around = _current_run()
    run = around or _begin_run()
    run.claim(manager)
    try:
        yield
    finally:
        last = run.release(manager)
        if around is None:
            _runs.discard(run)
        if last and _get_running_loop() is run.loop:
            await manager._shut_down(grace, timeout, by)
