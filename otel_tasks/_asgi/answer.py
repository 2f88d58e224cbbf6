"""Answer: what the middleware sends for an application that is stopped before it has answered.

A client that is still there gets its answer at once, from a task of the request: a thread or a block of
``uncancellable()`` may hold the handler for long. What the application sends is dropped by then, so that
nothing else uses the server's ``send``. Servers accept a message from any task.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from otel_tasks._core.state import CancelKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_tasks._asgi.connection import Connection, Message, Scope
    from otel_tasks._core.events import CancelCause

# Seconds for the server to take an answer.
_TIMEOUT = 1.0
_STATUS = {
    CancelKind.TIMEOUT: (504, b"Gateway Timeout"),
    CancelKind.SHUTDOWN: (503, b"Service Unavailable"),
}
# The IANA registry of WebSocket close codes: 1012, the service restarts. RFC 6455, 7.4.1: 1011, something
# kept the server from fulfilling the request; libraries use it for a keepalive that times out.
_CLOSE = {CancelKind.TIMEOUT: (1011, "request timeout"), CancelKind.SHUTDOWN: (1012, "server shutdown")}


def disconnect_for(cause: CancelCause, scope: Scope) -> Message:
    """Return the message from which the application learns that its request is cut short."""
    if scope["type"] != "websocket":
        return {"type": "http.disconnect"}
    code, reason = _CLOSE[cause.kind]
    return {"type": "websocket.disconnect", "code": code, "reason": reason}


async def send_answer(connection: Connection, cause: CancelCause) -> None:
    """Answer a client that is still there: 504 or 503, or the close of a WebSocket."""
    scope = connection.scope
    if scope["type"] == "websocket":
        code, reason = _CLOSE[cause.kind]
        await _send(connection, [{"type": "websocket.close", "code": code, "reason": reason}])
        return
    status, text = _STATUS[cause.kind]
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    # Not behind an unread body too: a server that closes while the client sends loses the answer (uvicorn).
    if cause.kind is CancelKind.SHUTDOWN and scope.get("http_version", "1.1").startswith("1"):
        # HTTP/2 has no such header (RFC 9113, 8.2.2).
        headers.append((b"connection", b"close"))
    # To a HEAD without a body: gunicorn logs a warning otherwise.
    await _send(connection, _response(status, b"" if scope["method"] == "HEAD" else text, headers))


async def send_client_closed_request(connection: Connection) -> None:
    """Answer a client that has left, for the layers outside, unless the response has started."""
    if not connection.start and connection.scope["type"] == "http":
        # 499: nginx's, and what dashboards know.
        await _send(connection, _response(499, b"", []))


async def end_response(connection: Connection) -> None:
    """End a started response that does not declare its length, so that the server reports no error.

    The caller knows that the server does not have the end. ``connection.complete`` does not tell: the end
    that an application sends too late is dropped.
    """
    names = {bytes(name).lower() for name, _ in connection.start.get("headers", ())}
    if connection.scope["type"] == "http" and b"content-length" not in names:
        await _send(connection, [{"type": "http.response.body", "body": b"", "more_body": False}])


def _response(status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> tuple[Message, Message]:
    length = (b"content-length", str(len(body)).encode())
    return (
        {"type": "http.response.start", "status": status, "headers": [*headers, length]},
        {"type": "http.response.body", "body": body, "more_body": False},
    )


async def _send(connection: Connection, messages: Iterable[Message]) -> None:
    # The client may have left: servers drop the response (uvicorn), raise (uvloop: RuntimeError), or never
    # return (hypercorn with HTTP/2). The layers in between have seen the status by then.
    with suppress(OSError, RuntimeError):
        async with asyncio.timeout(_TIMEOUT):
            for message in messages:
                await connection.server_send(message)
