"""The middleware: each request gets a task group of its own, which stops when the client leaves.

``TaskGroupMiddleware`` is pure ASGI 3 and imports no framework; ``otel_tasks.fastapi`` adds what FastAPI
applications need.

Rules, each with a test of its own:

1. The application stays in the server's task. The handler's task is cancelled only where ``cancel_handler``
   says so, never while ``uncancellable()`` is open, and never if it has learned of the disconnect itself.
2. A cancellation by the middleware never leaves it. Any other always does, after the group has ended with
   cause ``shutdown``.
3. No task of the group outlives the request, unless ``on_exit`` hands it over.
4. A response that had not started when the client left becomes a 499, for the layers outside and for nobody
   else. What the application sends afterwards is dropped.
5. A request that takes longer than ``request_timeout`` ends as if its client had left, and its client gets a
   504 at once. A response that has started stays incomplete; one that is complete is left alone.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from otel_tasks._asgi.connection import ClientDisconnected, Receive, Scope, Send
from otel_tasks._asgi.finishing import finish
from otel_tasks._asgi.lifespan import serve_lifespan
from otel_tasks._asgi.request import CONTEXTS_ARE_SHOWN, Request, current_request, require_request
from otel_tasks._asgi.server_stop import StopSign
from otel_tasks._asgi.settings import Settings
from otel_tasks._asgi.timeout import checked_timeout
from otel_tasks._core.binding import current_binding
from otel_tasks._core.checks import check_flag
from otel_tasks._core.suspension import anyio_shield

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks._asgi.rule import CancelHandler, OnExit
    from otel_tasks._asgi.timeout import RequestTimeoutOption
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.manager import TaskManager

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = [
    "ClientDisconnected",
    "TaskGroupMiddleware",
    "call_on_server_stop",
    "request_group",
    "set_cancel_handler",
    "set_request_timeout",
    "uncancellable",
]

_BOUND_SCOPES = frozenset({"http", "websocket"})
_MARK = "otel_tasks.request"


class TaskGroupMiddleware:
    """Give each HTTP request and WebSocket a task group, and cancel it when the client leaves.

    Add it inside the telemetry layer. The application needs no change: ``create_task()`` anywhere below a
    request joins the request's group. A request that starts no task has no group, and no request is watched
    in its first moments. A lifespan scope passes through. Of two middlewares around the same request, the
    outer one serves it; the inner one sets ``cancel_handler``, ``grace`` and ``on_exit`` for its part of the
    application.

    Args:
        app: The ASGI application.
        manager: The manager whose root is above the groups. None: ``global_task_manager``.
        cancel_handler: Whether a disconnect cancels the handler too. ``"safe"``: for methods without side
            effects (GET, HEAD, OPTIONS, QUERY), and never for a WebSocket, which receives a message. True;
            False; a function of the scope; or a rule as text, ``"safe, POST /v1/*, !POST /v1/batches*"``. Its
            entries have commas between them, each is ``safe``, ``all``, ``none``, or ``[METHOD[|METHOD...]]
            PATH``, in any order; ``*`` is any characters, and a leading ``!`` makes an exception. The path is
            the one below the application's ``root_path``, with the prefix of a mounted application. The
            method of a WebSocket is ``WS``. A handler that awaits a task of its group ends there in any case.
            A request can decide for itself, see ``set_cancel_handler``.
        detect_after: Seconds between two checks of the requests in flight, above 0. A request is watched
            after one to two of them.
        buffer_limit: Bytes of an unread body that are read ahead to detect the disconnect; at least 1. Behind
            more than that, a disconnect is detected only once the application reads on. (A client that waits
            for ``100 Continue`` gets it from the server through this reading, after one to two checks.)
        grace: Seconds in which tasks and handler may act on the cancel event before they are cancelled, at
            least 0; 0 cancels in the same turn of the loop.
        on_exit: What happens to the group's tasks when the request ends, including its background tasks.
            ``"cancel"``: they are cancelled. ``"wait"``: they are awaited. ``"detach"``: they are handed over
            to the manager.
        span: Give each group a span of its own, between the server's and those of the tasks.
        request_timeout: Seconds from the opening of a request until it is cut short, above 0 and finite; or a
            function of the scope that returns them, None for no bound. A request that is cut short ends as if
            its client had left, with cause ``timeout``, and its handler is cancelled whatever
            ``cancel_handler`` says. The client gets a 504 at once; a response that has started stays
            incomplete, and one that is complete is left alone. A request may take one to two checks longer,
            and is never cut short before its time. A number applies to HTTP; a function is called for
            WebSockets too, which are closed with 1011. It is called once per request, after one to two
            checks. A request can decide for itself, see ``set_request_timeout``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range, or ``cancel_handler`` has a bad entry.

    Cancellation: of the server's task (shutdown) cancels the group with cause ``shutdown``, waits until
    the group is empty, and propagates. A second one ends the waiting.

    Telemetry: the server span gets ``otel_tasks.request.outcome`` = ``client_disconnect`` or ``timeout``, and
    ``otel_tasks.cancel.count``. A task that fails while nobody awaits it does *not* turn the response into
    a 500.

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
        request_timeout: RequestTimeoutOption = None,
    ) -> None:
        self.app = app
        self.settings = Settings(
            manager, cancel_handler, detect_after, buffer_limit, grace, on_exit, span, request_timeout
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection.

        Cancellation: see the class.
        """
        if scope["type"] not in _BOUND_SCOPES:
            if scope["type"] == "lifespan":
                await serve_lifespan(self.app, self.settings.manager, scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        if _MARK in scope:
            await self._serve_part(scope, receive, send)
            return
        # In the scope itself, not in a copy: routing notes the route there, which names the group.
        scope[_MARK] = True
        request = Request(self.settings, scope, receive, send)
        token = current_binding.set(request.binding)
        try:
            try:
                await self.app(scope, request.receive, request.send)
            finally:
                # Before the group is looked at: a thread that makes one at this moment seals it itself.
                request.close()
        except (Exception, asyncio.CancelledError, BaseExceptionGroup) as error:
            if not await finish(request, error):
                raise
        else:
            if (request.left or request.group is not None) and not await finish(request, None):
                # Tested; but Python 3.11's tracer sees nothing of a coroutine after a throw into sleep(0).
                raise asyncio.CancelledError  # pragma: no cover
        finally:
            # Not for every request: the call takes 0.5 us in a FastAPI application, which has pushed its code
            # out of the processor's cache.
            if request.group is not None or request.stop is not None or CONTEXTS_ARE_SHOWN:
                request.release()
            current_binding.reset(token)

    async def _serve_part(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the part of an application that is behind a second middleware, by the rules of this one."""
        request = current_request()
        if request is None:
            # A framework between the two has started this part in a context of its own.
            await self.app(scope, receive, send)
            return
        self.settings.warn_if_ignored(request.settings)
        with request.ruled_by(self.settings.rules):
            await self.app(scope, receive, send)


def request_group() -> TaskGroup:
    """Return the current request's task group, made on first use.

    Returns:
        The group. It refuses new tasks if the client has left or the request is over.

    Raises:
        RuntimeError: No request is served here by a ``TaskGroupMiddleware``.

    Example:
        >>> async def handler():
        ...     return await request_group().create_task(fetch())
    """
    return require_request("request_group()").own_group()


def set_cancel_handler(cancel: bool) -> None:
    """Decide for the current request alone whether a disconnect cancels its handler.

    If the client has already left, True cancels the handler now: the CancelledError is raised at its next
    await. False has no effect on a handler that has been cancelled.

    Args:
        cancel: True to cancel it whatever the rule says, False to let it finish.

    Raises:
        RuntimeError: No request is served here by a ``TaskGroupMiddleware``.
        TypeError: ``cancel`` is not a bool.

    Example:
        >>> async def handler():
        ...     set_cancel_handler(True)
        ...     return await search()
    """
    check_flag("cancel", cancel)
    require_request("set_cancel_handler()").decide_handler(cancel)


def set_request_timeout(seconds: float | None) -> None:
    """Decide for the current request alone how long it may take, whatever ``request_timeout`` says.

    The time counts from the opening of the request. If it is up already, the request is cut short now: the
    CancelledError is raised at the handler's next await.

    Args:
        seconds: Seconds above 0; None for no bound.

    Raises:
        RuntimeError: No request is served here by a ``TaskGroupMiddleware``.
        TypeError: ``seconds`` is not a number.
        ValueError: ``seconds`` is not above 0, or not finite.

    Example:
        >>> async def handler():
        ...     set_request_timeout(5.0)
        ...     return await search()
    """
    checked = checked_timeout("request_timeout", seconds)
    require_request("set_request_timeout()").decide_time_limit(checked)


def call_on_server_stop(callback: Callable[[], object]) -> ExitStack:
    """Call a function in the running loop as soon as the server gets its signal to stop (SIGTERM, SIGINT).

    Servers wait for open responses before the lifespan ends, so a response without an end of its own, such as
    a stream of events, has to learn of the stop in time. The server's own handler is called too. In another
    thread than the main one, and where the server gets no signal, ``callback`` is never called.

    Args:
        callback: Called once for each signal.

    Returns:
        A context manager that stops listening.

    Raises:
        RuntimeError: No event loop runs here.

    Example:
        >>> with call_on_server_stop(stopping.set):
        ...     await stopping.wait()
    """
    sign = StopSign(asyncio.get_running_loop(), callback)
    end = ExitStack()
    end.callback(sign.leave)
    sign.listen()
    return end


@asynccontextmanager
async def uncancellable() -> AsyncGenerator[None]:
    """Run the body out of reach of the client's disconnect and of the end of the request.

    Enter it before the disconnect, or after it, in a ``finally`` or an ``except``. Neither the handler nor
    the task of the request's group that runs the body is cancelled before the outermost such block ends;
    then it is, at once. Until then, the application's own listeners do not learn of the disconnect. anyio's
    scopes cancel again at every await: where anyio is imported, the body also runs in a
    ``CancelScope(shield=True)``. Tasks that the body starts with ``create_task()`` or in ``TaskGroup()`` are
    not cancelled by the disconnect, and the request waits for them before it ends. A server that stops waits
    for the block too (``make_lifespan(request_grace=...)``). A shutdown of the manager and an explicit
    ``cancel()`` are *not* held off. Outside of a request it does nothing.

    Cancellation: a disconnect is delivered at the end of the block; any other cancellation passes
    through.

    Example:
        >>> async def pay(order):
        ...     async with uncancellable():
        ...         await charge(order)
        ...         await record(order)
    """
    request = current_request()
    if request is None:
        yield
        return
    task = asyncio.current_task()
    token = current_binding.set(request.cleanup)
    try:
        with request.cleanup.sheltering(task), anyio_shield():
            yield
    finally:
        # A generator that is finalized elsewhere ends in another task, and so in another context.
        if asyncio.current_task() is task:
            current_binding.reset(token)
        cancelled = request.end_shelter(task)
    if cancelled:
        # The CancelledError is raised at the next await: here, not somewhere behind the block.
        await asyncio.sleep(0)
