"""One request: its connection, its group, and the rule by which its handler is cancelled."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

from otel_tasks import _task
from otel_tasks._awaiters import with_awaiters
from otel_tasks._create import _bound
from otel_tasks._disconnect import ClientDisconnected, Connection, Message, Receive, Scope, Send
from otel_tasks._group import TaskGroup
from otel_tasks._log import about_all, logger
from otel_tasks._state import CancelKind
from otel_tasks._telemetry import annotate_request
from otel_tasks.cancellation import CancelCause
from otel_tasks.exceptions import GroupClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from otel_tasks._manager import TaskManager
    from otel_tasks.asgi import TaskGroupMiddleware

# Methods without effects (RFC 9110, 9.2.1, and the QUERY draft): nothing is torn when their handler stops.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY"})
# What may stand in a group's name. A client may send any word as a method.
_KNOWN_METHODS = _SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"}
_ANSWER_TIMEOUT = 1.0
# Seconds in which cancelled tasks are to end; as long as cancel_group() waits.
_END_TIMEOUT = 10.0
# GroupClosedError: work that was to be started for a client that is gone. The CancelledError of
# concurrent.futures: a `def` handler has waited for a task that was cancelled.
_OUR_DEPARTURES = (
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    ClientDisconnected,
    GroupClosedError,
)
_NO_TASKS: frozenset[asyncio.Task[Any]] = frozenset()
# A ``def`` handler may ask for its request's group while the loop, or another thread, does.
_making = threading.RLock()


# The current task of a loop: before Python 3.12 the public function was written in Python, around
# just this table, and took 0.2 us of the 2 that a request is to cost.
_task_in: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = (
    asyncio.current_task if sys.version_info >= (3, 12) else vars(asyncio.tasks)["_current_tasks"].get
)


class Request(Connection):
    """One request: its connection, its group, and the task in which its handler runs."""

    __slots__ = (
        "_asked",
        "_cancels",
        "_cancels_before",
        "_context",
        "_grace_over",
        "_owed",
        "_settings",
        "_shields",
        "_told",
        "cancel_handler",
        "cause",
        "group",
        "host",
    )

    def __init__(self, settings: TaskGroupMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        # Made for each request: every line here was measured.
        # None on a server that runs coroutines without an asyncio task.
        loop = asyncio.get_running_loop()
        self.host = host = _task_in(loop)
        sweeper = settings.sweeper
        if sweeper is None or sweeper.loop is not loop:
            sweeper = settings.new_sweeper(loop)
        self.scope = scope
        self.sweeper = sweeper
        self._server_receive = receive
        self._server_send = send
        self.started = self.complete = self.left = self.closed = False
        self._reading = self._ripe = self._body_ended = self._trailers = False
        self._buffered = 0
        self._watcher = self._buffer = self._last = self._waiting = self.send_error = None
        # As `sweeper.add(self)`, without the call.
        self._sweep = sweep = sweeper._new
        sweep.add(self)
        if sweeper._timer is None:
            sweeper._arm()
        self.group: TaskGroup | None = None
        self.cause: CancelCause | None = None
        self.cancel_handler: bool | None = None
        self._settings = settings
        # For the server's span, which is current here and not where the disconnect is noticed.
        self._context = copy_context()
        self._cancels_before = 0 if host is None else host.cancelling()
        self._cancels = self._shields = self._asked = 0
        self._owed = self._grace_over = False
        self._told = _NO_TASKS

    @property
    def manager(self) -> TaskManager:
        """The manager below whose root its group hangs."""
        return self._settings.manager

    @property
    def task_group(self) -> TaskGroup:
        """The request's group, made on first use."""
        return self.group if self.group is not None else self._make_group()

    @property
    def request(self) -> Request:
        """Itself, as of what else may be bound."""
        return self

    def _make_group(self) -> TaskGroup:
        with _making:
            if self.group is not None:
                return self.group
            group = self._settings.manager._open_group(
                self._name, binding=self, host=self.host, span=self._settings.span
            )
            # Before the looks at what has happened: the loop notes that before it looks for a group.
            self.group = group
            if self.cause is not None:
                group._announce(self.cause)
            if self.closed:
                over = self.cause or self._make_cause(CancelKind.SCOPE_ENDED)
                group._seal(over, refuse=self.left or self._settings.on_exit != "detach")
            return group

    def _name(self) -> str:
        method = "WS" if self.scope["type"] == "websocket" else self.scope["method"]
        method = method if method in _KNOWN_METHODS or method == "WS" else "HTTP"
        template = _route_template(self.scope)
        return f"{method} {template}" if template else method

    def _make_cause(self, kind: CancelKind) -> CancelCause:
        return CancelCause.make(kind, context=self._context)

    # The client leaves.

    def on_left(self, told: frozenset[asyncio.Task[Any]]) -> None:
        """Set the event, then cancel, at once or after the grace."""
        self._told = told
        self.cause = self._make_cause(CancelKind.CLIENT_DISCONNECT)
        if self.group is not None:
            self.group._announce(self.cause)
        if self._settings.grace:
            self.sweeper.call_later(self._settings.grace, self._stop)
        else:
            self._stop()

    def _stop(self) -> None:
        # Tasks first: the handler's cancel goes through it into the task that it awaits.
        self._grace_over = True
        self._cancel_the_group(() if self.closed else self._told)
        self._cancel_the_handler()

    def _cancel_the_group(self, told: Collection[asyncio.Future[Any]] = ()) -> None:
        """Cancel the tasks of the group, but not what waits for one that is in ``uncancellable()``.

        Its cancellation would be handed on, past the shield. It is asked when the shield is let go.
        """
        if self.group is None or self.cause is None:
            return
        spared = set(told)
        for task in self.group._every_live():
            if _task.is_shielded(task):
                spared |= with_awaiters(task) - {task}
        self._asked += self.group._cancel_tasks(self.cause, spared=spared)

    def _cancel_the_handler(self) -> bool:
        host = self.host
        if host is None or self.closed or host in self._told or not self._may_cancel():
            return False
        self._owed = self._shields > 0
        if self._owed:
            return False
        self._cancels += 1
        host.cancel(str(self.cause))
        return host is asyncio.current_task()

    def _may_cancel(self) -> bool:
        if self.cancel_handler is not None:
            return self.cancel_handler
        rule = self._settings.cancel_handler
        if isinstance(rule, bool):
            return rule
        return _ask(rule, self.scope) if callable(rule) else self.scope.get("method") in _SAFE_METHODS

    def shield(self) -> None:
        """Hold a disconnect off the current task and the handler."""
        self._shields += 1
        if isinstance(task := asyncio.current_task(), _task.ManagedTask):
            _task.shield(task)

    def unshield(self) -> bool:
        """Let go; True when the current task was cancelled by it."""
        delivered = False
        if isinstance(task := asyncio.current_task(), _task.ManagedTask):
            before = task.cancelling()
            _task.unshield(task)
            delivered = task.cancelling() > before
            self._asked += delivered
        self._shields -= 1
        if self._grace_over:
            # Those that were spared because they waited for this one.
            self._cancel_the_group()
        if self._owed and not self._shields:
            self._owed = False
            delivered |= self._cancel_the_handler()
        return delivered

    # The application has returned or raised.

    async def finish(self, error: BaseException | None) -> bool:
        """End the group, and answer in the application's place if the client has left.

        Returns:
            False when ``error``, or for None somebody else's cancel, is to be raised.
        """
        self.close()
        if await self._take_back_cancels(error):
            await self._shut_down()
            return False
        await self._end_group(error)
        if not self.left:
            return error is None
        annotate_request(self._context, self._asked)
        if error is not None and not self._is_departure(error):
            return False
        await self._answer()
        return True

    async def _take_back_cancels(self, error: BaseException | None) -> bool:
        """Undo the cancels of ours; True if somebody else has cancelled the handler's task as well."""
        if self.host is None:
            return False
        thrown = isinstance(error, asyncio.CancelledError)
        if self._cancels and not thrown:
            # Swallowed, or still to be thrown: then here, where it does no harm.
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                thrown = True
        for _ in range(self._cancels):
            self.host.uncancel()
        self._cancels = 0
        return thrown and self.host.cancelling() > self._cancels_before

    async def _end_group(self, error: BaseException | None) -> None:
        if self.group is None:
            return
        # A failing handler's 500 is still to be sent, by a layer outside: it does not wait for tasks.
        failed = error is not None and not self.complete
        on_exit = "cancel" if failed or self.left else self._settings.on_exit
        cause = self.cause or self._make_cause(CancelKind.SCOPE_ENDED)
        if on_exit == "cancel" and not self.left:
            self.group._announce(cause)
            self.group._cancel_tasks(cause)
        self.group._seal(cause, refuse=on_exit != "detach")
        if self._grace_over:
            # Those that were told had until now to end by themselves.
            self._cancel_the_group()
        try:
            if on_exit == "wait":
                await self.group.join()
            elif on_exit == "cancel":
                await self._wait_for_end(self.group)
        except asyncio.CancelledError:
            await self._shut_down()
            raise

    async def _wait_for_end(self, group: TaskGroup) -> None:
        """Wait for tasks that were cancelled, but not for ever: a response may depend on it."""
        tasks = list(group._every_live())
        await _task.wait_until_done(tasks, None if self._shields else _END_TIMEOUT)
        live = [task.id for task in tasks if not task.done()]
        if live:
            logger.warning(
                "request %r is over, and after %s s its tasks still run: %s",
                group.id,
                _END_TIMEOUT,
                ", ".join(map(repr, live)),
                extra=about_all(live),
            )

    async def _shut_down(self) -> None:
        if self.group is None:
            return
        cause = self._make_cause(CancelKind.SHUTDOWN)
        self.group._announce(cause)
        self.group._cancel_tasks(cause)
        self.group._seal(cause)
        await self._wait_for_end(self.group)

    def _is_departure(self, error: BaseException) -> bool:
        if isinstance(error, BaseExceptionGroup):
            return all(
                self._is_departure(part) for part in cast("tuple[BaseException, ...]", error.exceptions)
            )
        return (
            isinstance(error, _OUR_DEPARTURES) or error is self.send_error or _is_starlettes_departure(error)
        )

    async def _answer(self) -> None:
        if self.started or self.scope["type"] != "http":
            return
        # The client is gone: servers drop it (uvicorn), raise (uvloop: RuntimeError), or never return
        # (hypercorn with HTTP/2), but the layers in between have seen the status.
        with suppress(OSError, RuntimeError):
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                for message in _client_closed_request():
                    await self._server_send(message)


class Sheltered:
    """What is bound inside ``uncancellable()``: new tasks belong to the manager."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request

    @property
    def manager(self) -> TaskManager:
        return self.request.manager

    @property
    def task_group(self) -> TaskGroup:
        return self.manager._root


def current_request() -> Request | None:
    bound: Any = _bound.get()
    while isinstance(bound, TaskGroup):
        bound = bound._binding or bound.parent
    return None if bound is None else bound.request


def this_request(who: str) -> Request:
    request = current_request()
    if request is None:
        raise RuntimeError(
            f"{who} was called outside of a request: "
            "app.add_middleware(TaskGroupMiddleware) gives each request a group"
        )
    return request


def _route_template(scope: Scope) -> str | None:
    """The route's path with its parameters as written in the code; never the path that was asked for."""
    route = scope.get("route")
    # FastAPI (0.16x) names an included router's original route; the prefix is known to its context alone.
    facts: dict[str, Any] = scope.get("fastapi") or {}
    effective = facts.get("effective_route_context")
    if route is not None and getattr(effective, "original_route", None) is route:
        route = effective
    template: object = getattr(route, "path_format", None) or getattr(route, "path", None)
    return template if isinstance(template, str) else None


def _client_closed_request() -> tuple[Message, Message]:
    # 499: nginx's, and what dashboards know.
    return (
        {"type": "http.response.start", "status": 499, "headers": [(b"content-length", b"0")]},
        {"type": "http.response.body", "body": b"", "more_body": False},
    )


def _is_starlettes_departure(error: BaseException) -> bool:
    for cls in type(error).__mro__:
        if cls.__module__.startswith("starlette.") and cls.__name__ in (
            "ClientDisconnect",
            "WebSocketDisconnect",
        ):
            return True
    # BaseHTTPMiddleware's, when the handler behind it was cancelled through a task that it awaited.
    return isinstance(error, RuntimeError) and error.args == ("No response returned.",)


def _ask(rule: Callable[[Scope], bool], scope: Scope) -> bool:
    try:
        cancel = rule(scope)
        if asyncio.iscoroutine(cancel):
            cancel.close()
            raise TypeError("it gave a coroutine, and nothing can be awaited here")
        return bool(cancel)
    except Exception:
        logger.exception("cancel_handler=%r raised; the handler is not cancelled", rule)
        return False
