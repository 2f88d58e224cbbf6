"""The client's departure, in messages and exceptions: why it left, and which exceptions say only that."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import TYPE_CHECKING, cast

from otel_tasks._asgi.connection import ClientDisconnected
from otel_tasks._core.state import CancelKind
from otel_tasks.exceptions import GroupClosedError

if TYPE_CHECKING:
    from otel_tasks._asgi.connection import Connection, Message

# RFC 6455, 7.4.1: the client has closed the WebSocket normally (1000), or goes away (1001).
_CLOSED_BY_CLIENT = frozenset({1000, 1001})
# The server closes because it restarts (the IANA registry of close codes; uvicorn, hypercorn).
_CLOSED_BY_SERVER = frozenset({1012})
# concurrent.futures has a CancelledError of its own: a `def` handler gets it when it waits for a task that is
# cancelled.
_CANCELLATIONS = (asyncio.CancelledError, concurrent.futures.CancelledError)
# What the end of a request makes its code raise. GroupClosedError: it tried to start work for a client that
# has left.
_DEPARTURES = (*_CANCELLATIONS, ClientDisconnected, GroupClosedError)


def kind_of(message: Message) -> tuple[CancelKind, str | None]:
    """Say why a client has left, from the server's disconnect message: a kind and a text for the cause."""
    code = message.get("code") if message["type"] == "websocket.disconnect" else None
    if code in _CLOSED_BY_CLIENT:
        return CancelKind.SCOPE_ENDED, f"the client closed the WebSocket ({code})"
    if code in _CLOSED_BY_SERVER:
        return CancelKind.SHUTDOWN, f"the server closed the WebSocket ({code})"
    return CancelKind.CLIENT_DISCONNECT, None


def is_departure(error: BaseException, connection: Connection) -> bool:
    """Return True for an exception that says no more than that the client has left."""
    if isinstance(error, BaseExceptionGroup):
        parts = cast("tuple[BaseException, ...]", error.exceptions)
        return all(is_departure(part, connection) for part in parts)
    if isinstance(error, _DEPARTURES):
        return True
    if connection.scope["type"] == "websocket":
        # Frameworks raise an exception of their own from it. What they raise after they have received the
        # message is the application's, as without the middleware.
        return isinstance(error.__context__, ClientDisconnected) or _is_of_cut(error, connection)
    return error is connection.send_error or _is_starlettes(error) or _is_without_response(error)


def is_cancellation(error: BaseException) -> bool:
    """Return True for the exception of a handler that was cancelled, or that awaited a cancelled task."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_cancellation, cast("tuple[BaseException, ...]", error.exceptions)))
    return isinstance(error, _CANCELLATIONS) or _is_without_response(error)


def _is_starlettes(error: BaseException) -> bool:
    return any(
        cls.__module__.startswith("starlette.") and cls.__name__ == "ClientDisconnect"
        for cls in type(error).__mro__
    )


def _is_of_cut(error: BaseException, connection: Connection) -> bool:
    """Return True for a framework's exception from the disconnect of a WebSocket that was cut short.

    That message is not the server's: without the middleware, the application had raised nothing.
    """
    if not connection.was_cut() or connection.disconnect is None:
        return False
    code: object = getattr(error, "code", None)
    return type(error).__name__ == "WebSocketDisconnect" and code == connection.disconnect["code"]


def _is_without_response(error: BaseException) -> bool:
    # From BaseHTTPMiddleware, when the handler behind it was cancelled through a task that it awaited.
    return isinstance(error, RuntimeError) and error.args == ("No response returned.",)
