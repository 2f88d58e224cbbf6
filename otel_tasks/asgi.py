"""The middleware that gives each request a task group of its own, and stops it when the client leaves.

``TaskGroupMiddleware`` is pure ASGI 3 and knows no framework; ``otel_tasks.fastapi`` adds what FastAPI users
expect. How the disconnect is noticed stands in ``connection``; here is what then happens to the work.

Rules, each with a test of its own:

1. The application stays in the server's task. The handler's task is cancelled only where ``cancel_handler``
   says so, never while ``uncancellable()`` is open, and never when it has learned of the disconnect itself.
2. A cancel of ours never leaves the middleware; somebody else's always does, after the group has ended with
   cause ``shutdown``.
3. No task of the group outlives the request, unless ``on_exit`` hands it over.
4. A response that was not begun when the client left becomes a 499 for the layers outside, and for nobody
   else: what the application sends afterwards is dropped.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from otel_tasks._asgi.connection import ClientDisconnected, Receive, Scope, Send, Sweeper
from otel_tasks._asgi.lifespan import serve_lifespan
from otel_tasks._asgi.request import CancelHandler, OnExit, Request, Rules, current_request, this_request
from otel_tasks._core.binding import current_binding
from otel_tasks._core.checks import check_choice, check_flag, checked_finite_seconds
from otel_tasks._core.log import logger
from otel_tasks._core.manager import TaskManager, global_task_manager
from otel_tasks._core.suspension import anyio_shield

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks._core.group import TaskGroup

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = [
    "ClientDisconnected",
    "TaskGroupMiddleware",
    "request_group",
    "set_cancel_handler",
    "uncancellable",
]

# What a request has once; with the defaults of TaskGroupMiddleware.
_OPTIONS_OF_THE_OUTER: dict[str, object] = {
    "manager": global_task_manager,
    "detect_after": 0.025,
    "buffer_limit": 262_144,
    "span": False,
}
_BOUND_SCOPES = frozenset({"http", "websocket"})
_MARK = "otel_tasks.request"


class TaskGroupMiddleware:
    """Give each HTTP request and WebSocket a task group, and cancel it when the client goes away.

    Add it inside the telemetry layer. A second one in the same request passes straight through, and so does
    a lifespan scope. It needs no change in the application: ``create_task()`` anywhere below a request joins
    the request's group. A request that starts no task has no group, and none is watched in its first moments.

    Args:
        app: The ASGI application.
        manager: The manager below whose root the groups hang. None: ``global_task_manager``.
        cancel_handler: Whether the handler is cancelled too: ``"safe"`` for the methods without effects (GET,
            HEAD, OPTIONS, QUERY) and never for a WebSocket, which is told by a message; True; False; or a
            function of the scope. A handler that awaits a task of its group ends there in any case. One
            request can decide otherwise, see ``set_cancel_handler``.
        detect_after: Seconds between two looks at the requests in flight. A request is watched once it has
            lived through one or two of them.
        buffer_limit: Bytes of an unread body that are read ahead while looking for the disconnect; at least
            1. Behind more than that a disconnect is not seen before the application reads on. (A client that
            waits for ``100 Continue`` gets it from the server by this reading, after one or two looks.)
        grace: Seconds that tasks and handler have to act upon the cancel event before they are cancelled; 0
            cancels in the same turn of the loop.
        on_exit: What happens to the group's tasks when the request ends, background tasks included:
            ``"cancel"``, ``"wait"`` for them, or ``"detach"``: hand them over to the manager.
        span: Give each group a span of its own, between the server's and the tasks'.

    Raises:
        TypeError: An option is of the wrong type.
        ValueError: An option is out of its range.

    **Cancellation**: of the server's task (shutdown) cancels the group with cause ``shutdown``, waits until
    it is empty and passes on; a second one stops the waiting.

    Telemetry: the server span gets ``otel_tasks.request.outcome`` = ``client_disconnect`` and
    ``otel_tasks.cancel.count``. It does *not* turn a failure of an unawaited task into a 500.

    Example:
        >>> from fastapi import FastAPI
        >>> FastAPI().add_middleware(TaskGroupMiddleware)
    """

    def __init__(
        self,
        app: App,
        *,
        manager: TaskManager | None = None,
        cancel_handler: CancelHandler = "safe",
        detect_after: float = 0.025,
        buffer_limit: int = 262_144,
        grace: float = 0.0,
        on_exit: OnExit = "cancel",
        span: bool = False,
    ) -> None:
        self.app = app
        self.manager = checked_manager(manager)
        self.detect_after = checked_finite_seconds("detect_after", detect_after, above_zero=True)
        self.buffer_limit = _checked_buffer_limit(buffer_limit)
        check_choice("on_exit", on_exit, OnExit)
        self.rules = Rules(
            _checked_cancel_handler(cancel_handler), checked_finite_seconds("grace", grace), on_exit
        )
        check_flag("span", span)
        self.span = span
        self.sweeper: Sweeper | None = None
        self._has_warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection.

        **Cancellation**: see the class.
        """
        if scope["type"] not in _BOUND_SCOPES:
            if scope["type"] == "lifespan":
                await serve_lifespan(self.app, self.manager, scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        if _MARK in scope:
            await self._serve_part(scope, receive, send)
            return
        # In the scope itself, not in a copy: routing will write the route there, which names the group.
        scope[_MARK] = True
        request = Request(self, scope, receive, send)
        token = current_binding.set(request)
        try:
            await self.app(scope, request.receive, request.send)
        except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
            if not await request.finish(error):
                raise
        else:
            # Before the look at the group: a thread that makes one just now seals it itself.
            request.closed = True
            if (request.left or request.group is not None) and not await request.finish(None):
                # Tested; but Python 3.11's tracer sees nothing of a coroutine after a throw into sleep(0).
                raise asyncio.CancelledError  # pragma: no cover
        finally:
            # As `request.close()`, without the call.
            request.closed = True
            request._sweep.discard(request)
            if request._watcher is not None:
                request._watcher.cancel()
            if request._stop is not None:
                request.end_stop()
            current_binding.reset(token)

    async def _serve_part(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the part of an application that is behind a second middleware, by this one's rules."""
        request = current_request()
        if request is None:
            # A framework in between has started this part in a context of its own.
            await self.app(scope, receive, send)
            return
        self._warn_of(request.settings)
        with request.ruled_by(self.rules):
            await self.app(scope, receive, send)

    def _warn_of(self, outer: TaskGroupMiddleware) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        ignored = [
            f"{option}={getattr(self, option)!r}"
            for option, default in _OPTIONS_OF_THE_OUTER.items()
            if getattr(self, option) not in (default, getattr(outer, option))
        ]
        if ignored:
            logger.warning(
                "TaskGroupMiddleware stands behind another one, which decides about %s: set it there",
                ", ".join(ignored),
            )

    def new_sweeper(self, loop: asyncio.AbstractEventLoop) -> Sweeper:
        """Make the sweeper of ``loop``; where two loops take turns, each turn costs a new one."""
        self.sweeper = Sweeper(loop, self.detect_after, self.buffer_limit)
        return self.sweeper


def request_group() -> TaskGroup:
    """Give the current request's task group, and make it on first use.

    Returns:
        The group; one that refuses new tasks if the client has left already or the request is over.

    Raises:
        RuntimeError: No request is being served here by a ``TaskGroupMiddleware``.

    Example:
        >>> async def handler():
        ...     return await request_group().create_task(fetch())
    """
    return this_request("request_group()").own_group()


def set_cancel_handler(cancel: bool) -> None:
    """Decide for the current request alone whether a disconnect cancels its handler.

    Args:
        cancel: True to cancel it whatever its method, False to let it finish.

    Raises:
        RuntimeError: No request is being served here by a ``TaskGroupMiddleware``.
        TypeError: It is neither.
    """
    check_flag("cancel", cancel)
    this_request("set_cancel_handler()").cancel_handler = cancel


@asynccontextmanager
async def uncancellable() -> AsyncGenerator[None]:
    """Run the body where neither a client's disconnect nor the end of the request reaches.

    It may be entered before the disconnect, or after it, in a ``finally`` or an ``except``. Neither the
    handler nor the task of the request's group that runs the body is cancelled before the end of the
    outermost such block; then it is, at once. Until then the application's own listeners do not learn of the
    disconnect. anyio's scopes cancel again at every await: where anyio is imported, the body is in a
    ``CancelScope(shield=True)`` too. What the body starts with ``create_task()`` or in ``TaskGroup()`` is not
    cancelled by the disconnect, and is waited for before the request ends. It does *not* hold off a shutdown
    or an explicit ``cancel()``, and outside of a request it does nothing.

    **Cancellation**: a disconnect is delivered when the block is left; any other passes through.

    Example:
        >>> async def pay(order):
        ...     async with uncancellable():
        ...         await charge(order)
        ...         await book(order)
    """
    request = current_request()
    if request is None:
        yield
        return
    task = asyncio.current_task()
    token = current_binding.set(request.cleanup)
    try:
        with request.sheltering(task), anyio_shield():
            yield
    finally:
        # A generator that is finalized elsewhere ends in another task, and so in another context.
        if asyncio.current_task() is task:
            current_binding.reset(token)
        delivered = request.unshield(task)
    if delivered:
        # The cancel is thrown at the next await: here, and not somewhere behind the block.
        await asyncio.sleep(0)


def checked_manager(manager: object) -> TaskManager:
    """Give back a manager, the global one for None.

    Raises:
        TypeError: It is something else.
    """
    if manager is None:
        return global_task_manager
    if not isinstance(manager, TaskManager):
        raise TypeError(f"manager must be a TaskManager, got {manager!r}")
    return manager


def _checked_cancel_handler(rule: CancelHandler) -> CancelHandler:
    if inspect.iscoroutinefunction(rule) or inspect.iscoroutinefunction(type(rule).__call__):
        raise TypeError(
            f"cancel_handler must be a plain function of the scope, got the coroutine function {rule!r}: "
            "it is asked where nothing can be awaited, write it with def"
        )
    if rule == "safe" or isinstance(rule, bool) or callable(rule):
        return rule
    # A word can be wrong, anything else is not even of the kind.
    error = ValueError if isinstance(rule, str) else TypeError
    raise error(f'cancel_handler must be "safe", True, False or a function of the scope, got {rule!r}')


def _checked_buffer_limit(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"buffer_limit must be a number of bytes, got {value!r}")
    if value < 1:
        raise ValueError(
            f"buffer_limit must be at least 1 byte, got {value}: without it no disconnect is seen"
        )
    return value
