"""WebSockets: the app's own exceptions leave the middleware, and a clean close is not a disconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI, WebSocket
from litestar.exceptions import WebSocketDisconnect as LitestarDisconnect
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from websockets.sync.client import ClientConnection, connect

from otel_tasks import TaskManager
from otel_tasks.asgi import TaskGroupMiddleware

from .servers import Case
from .test_telemetry import trace_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Receive, Scope, Send

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


def leave(case: Case, route: str, end: Callable[[ClientConnection], object]) -> None:
    """Open a WebSocket, and end it while its handler works."""
    # Some servers answer the closing frame only once the application has read of it.
    with connect(f"ws://127.0.0.1:{case.server.port}{case.path(route)}", close_timeout=0.5) as socket:
        case.wait_for("handler entered")
        case.wait_for("task started")
        case.let_it_age()
        end(socket)


def close(socket: ClientConnection) -> None:
    """Close it as a client does that is done."""
    socket.close(1000)


def go_away(socket: ClientConnection) -> None:
    """Close it as a browser does that leaves the page."""
    socket.close(1001)


def vanish(socket: ClientConnection) -> None:
    """Lose the connection."""
    socket.socket.shutdown(2)


ENDS: dict[str, Callable[[ClientConnection], object]] = {
    "close": close,
    "go_away": go_away,
    "vanish": vanish,
}


# --- what leaves the middleware -------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("how", "error"), [("receive", "WebSocketDisconnect"), ("fail", "ValueError")])
def test_error_of_the_handler_after_the_message_reaches_the_outer_layers(
    case: Case, how: str, error: str, end: str
) -> None:
    """An outer layer that commits or rolls back sees the same exception as without the middleware."""
    case.complaints_expected = True  # by the server, which logs it without the middleware, too
    for variant in ("bare-sockets", "sockets"):
        each = Case(case.server, f"{case.key}-{variant}")
        leave(each, f"{variant}/socket/{how}", ENDS[end])
        each.wait_for("handler raised", error=error)
        each.wait_for("app raised", error=error)
        if variant == "sockets":
            each.wait_for("task cancelled", task="first")
        each.release()


@pytest.mark.parametrize("end", ["close", "vanish"])
@pytest.mark.parametrize(
    ("route", "ending"),
    [
        ("sockets/socket/start-task", "handler raised"),
        ("sockets/socket/await-task", "handler cancelled"),
        ("sockets-always/socket/wait", "handler cancelled"),
    ],
)
def test_error_caused_by_the_middleware_stays_inside(case: Case, route: str, ending: str, end: str) -> None:
    """A closed group's refusal and our own cancellation are not failures, and the server logs nothing."""
    leave(case, route, ENDS[end])
    case.wait_for("task cancelled", task="first")
    case.release()
    case.wait_for(ending)
    case.wait_for("app returned")


def test_handler_that_sends_to_no_client_ends_quietly(case: Case) -> None:
    """The exception from our `send`, and Starlette's in its place, do not leave the middleware."""
    leave(case, "sockets/socket/send", vanish)
    # The server's own exception, if the handler met the closed connection first, would leave as without us.
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    case.release()
    case.wait_for_any("handler raised", "handler cancelled")
    case.wait_for("app returned")


class _OwnDisconnect(Exception):
    """A framework's exception that the middleware does not know."""


@pytest.mark.parametrize(
    "error",
    [
        WebSocketDisconnect(1000),
        LitestarDisconnect(detail="gone"),
        _OwnDisconnect(),
        ValueError("a failure"),
        ExceptionGroup("several", [WebSocketDisconnect(1000)]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_class_of_exception_is_taken_for_a_disconnect(error: Exception) -> None:
    """An exception that the application raises itself propagates, regardless of its class."""

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        raise error

    client = TestClient(TaskGroupMiddleware(app, manager=TaskManager()))
    with pytest.raises(type(error)), client.websocket_connect("/"):
        pass


@pytest.mark.parametrize("middleware", ["without", "with"])
def test_test_client_sees_the_disconnect_of_the_handler(middleware: str) -> None:
    """`TestClient` raises the handler's `WebSocketDisconnect`, as FastAPI's docs show."""
    app = FastAPI()
    if middleware == "with":
        app.add_middleware(TaskGroupMiddleware, manager=TaskManager())

    @app.websocket("/ws")
    async def handler(socket: WebSocket) -> None:
        await socket.accept()
        while True:
            await socket.send_text(f"echo {await socket.receive_text()}")

    with pytest.raises(WebSocketDisconnect), TestClient(app).websocket_connect("/ws") as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "echo hello"


# --- close codes -----------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "code"), [("close", 1000), ("go_away", 1001)])
def test_clean_close_is_no_disconnect(case: Case, end: str, code: int) -> None:
    """The server span has the close code and no `client_disconnect` outcome."""
    if case.server.kind.hides_close_codes:
        pytest.skip(f"{case.server.kind.name} gives the application 1006 in its place")
    leave(case, "native/ws", ENDS[end])
    server, attributes = request_span(case)
    assert attributes["otel_tasks.request.close_code"] == code
    assert attributes["otel_tasks.request.outcome"] == "closed"
    assert server["status"] == "UNSET"


def test_lost_connection_is_a_disconnect(case: Case) -> None:
    """The server span has the `client_disconnect` outcome and the code for an abnormal closure."""
    leave(case, "native/ws", vanish)
    server, attributes = request_span(case)
    assert attributes["otel_tasks.request.close_code"] in (1005, 1006)
    assert attributes["otel_tasks.request.outcome"] == "client_disconnect"
    assert server["status"] == "UNSET"


@pytest.mark.parametrize("end", ["close", "vanish"])
def test_server_span_of_a_handler_that_raises_is_as_without_the_middleware(case: Case, end: str) -> None:
    """The server span has the same status as without the middleware."""
    case.complaints_expected = True
    statuses: list[str] = []
    for variant in ("native-stock", "native"):
        each = Case(case.server, f"{case.key}-{variant}")
        leave(each, f"{variant}/socket/receive", ENDS[end])
        each.wait_for("app raised", error="WebSocketDisconnect")
        each.release()
        statuses.append(trace_of(each, variant)[0]["status"])
    assert statuses[0] == statuses[1]


def request_span(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """The server's span of this request, and its attributes."""
    case.wait_for("handler returned")
    case.release()
    server, _ = trace_of(case, "native")
    return server, server["attributes"]
