"""How a request ends: what the server's span says, and which exceptions leave the middleware."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route

from otel_tasks import CancelKind, GroupClosedError, TaskManager, create_task
from otel_tasks.asgi import TaskGroupMiddleware, request_group, set_cancel_handler
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.hang_ups import LONG, app_of, hang_up_on, post

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks import ManagedTask
    from otel_tasks._asgi.connection import Receive, Scope, Send
    from tests.hang_ups import App


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


# --- what the server's span says ---------------------------------------------------------------------------


async def _annotations(
    app: App, manager: TaskManager, spans: SpanRecorder, connection: FakeConnection
) -> Any:
    with spans.provider.get_tracer("server").start_as_current_span("request"):
        await hang_up_on(app, manager, connection)
    return spans.span("request")


async def test_span_says_that_the_handler_was_cancelled(manager: TaskManager, spans: SpanRecorder) -> None:
    """And when the client left."""
    span = await _annotations(app_of(lambda: asyncio.sleep(60)), manager, spans, FakeConnection())
    assert span.attributes["otel_tasks.request.handler"] == "cancelled"
    assert [event.name for event in span.events] == ["otel_tasks.client_disconnect"]


async def test_span_says_that_the_handler_ran_on(manager: TaskManager, spans: SpanRecorder) -> None:
    """A POST is not cancelled by default, and its span must not look as if it had been."""
    span = await _annotations(app_of(lambda: asyncio.sleep(5)), manager, spans, post())
    assert span.attributes["otel_tasks.request.outcome"] == "client_disconnect"
    assert span.attributes["otel_tasks.request.handler"] == "ran_on"
    assert span.end_time - span.events[0].timestamp > 0


async def test_span_says_that_the_handler_of_a_cancelled_task_was_cancelled(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """A POST that awaits a task of its group ends with it."""

    async def handler() -> None:
        await create_task(asyncio.sleep(60))

    span = await _annotations(app_of(handler), manager, spans, post())
    assert span.attributes["otel_tasks.request.handler"] == "cancelled"


async def test_span_says_that_a_listener_finished(manager: TaskManager, spans: SpanRecorder) -> None:
    """The listener noticed the disconnect itself."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    span = await _annotations(app, manager, spans, FakeConnection())
    assert span.attributes["otel_tasks.request.handler"] == "finished"


@pytest.mark.parametrize(
    ("code", "kind", "outcome"),
    [
        (1000, CancelKind.SCOPE_ENDED, "closed"),
        (1001, CancelKind.SCOPE_ENDED, "closed"),
        (1006, CancelKind.CLIENT_DISCONNECT, "client_disconnect"),
        (1011, CancelKind.CLIENT_DISCONNECT, "client_disconnect"),
        (1012, CancelKind.SHUTDOWN, "shutdown"),
    ],
)
async def test_close_code_of_a_websocket_says_why_its_work_is_cancelled(
    manager: TaskManager, spans: SpanRecorder, code: int, kind: CancelKind, outcome: str
) -> None:
    """It was closed in order, lost, or closed by the server."""
    tasks: list[ManagedTask[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        tasks.append(create_task(asyncio.sleep(60)))
        while (await receive())["type"] != "websocket.disconnect":
            pass

    connection = FakeConnection.websocket("/feed")
    with spans.provider.get_tracer("server").start_as_current_span("request"):
        serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager)))
        await asyncio.sleep(LONG)
        connection.disconnect(code=code)
        await serving
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is kind
    attributes = spans.span("request").attributes or {}
    assert attributes["otel_tasks.request.outcome"] == outcome
    assert attributes["otel_tasks.request.close_code"] == code


async def test_group_is_named_after_the_route_on_the_servers_span(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The framework leaves no route in the scope, but an instrumentation has found it."""
    names = []

    async def handler() -> None:
        names.append(request_group().name)

    with spans.provider.get_tracer("server").start_as_current_span("request") as span:
        span.set_attribute("http.route", "/slow/{n}")
        await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    assert names == ["GET /slow/{n}"]


# --- what a WebSocket raises -------------------------------------------------------------------------------


class _Disconnect(Exception):
    """The exception that a framework raises after a disconnect."""


async def _raising(manager: TaskManager, error: Callable[[Send], Awaitable[None]], **options: Any) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass
        await error(send)

    connection = FakeConnection.websocket("/feed")
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager, **options)))
    await asyncio.sleep(LONG)
    connection.disconnect(code=1001)
    await serving


async def test_error_of_a_websocket_application_passes_through(manager: TaskManager) -> None:
    """Outer layers roll back, as without the middleware."""

    async def disconnect(send: Send) -> None:
        raise _Disconnect

    with pytest.raises(_Disconnect):
        await _raising(manager, disconnect)


async def test_error_that_a_framework_makes_of_our_refusal_to_send_stays_inside(manager: TaskManager) -> None:
    """It is recognized by its context, whatever its class."""

    async def send_late(send: Send) -> None:
        try:
            await send({"type": "websocket.send", "text": "tick"})
        except OSError:
            raise _Disconnect from None

    await _raising(manager, send_late)


async def test_refused_task_of_a_websocket_stays_inside(manager: TaskManager) -> None:
    """The group was closed by us; an exception group with nothing else in it stays inside as well."""

    async def start(send: Send) -> None:
        raise ExceptionGroup("several", [GroupClosedError("closed")])

    await _raising(manager, start)


# --- the log line about a handler that runs on -------------------------------------------------------------


async def run_on() -> None:
    await asyncio.sleep(2)


@pytest.mark.parametrize(
    ("rule", "missing", "suggested"),
    [
        ("safe", "method", "safe, POST *"),
        ("safe, POST /v1/*", "path", "safe, POST /v1/*, POST *"),
        ("none", "method", "none, POST *"),
    ],
)
async def test_handler_that_runs_on_is_logged_once(
    manager: TaskManager, caplog: pytest.LogCaptureFixture, rule: str, missing: str, suggested: str
) -> None:
    """The line has the route, how long it took, the reason, and the two ways to change it."""
    caplog.set_level(logging.INFO)
    middleware = TaskGroupMiddleware(app_of(run_on), manager=manager, cancel_handler=rule)
    for _ in range(2):
        connection = post()
        asyncio.get_running_loop().call_later(LONG, connection.disconnect)
        await connection.run(middleware)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "INFO",
            "the handler of POST ran on after its client had left (the request took 1.9 s more), "
            f"because its {missing} is not in cancel_handler={rule!r}; "
            f"to cancel it, add it there, as in cancel_handler={suggested!r}, or call "
            "set_cancel_handler(True) in it (FastAPI: Depends(cancel_handler_on_disconnect))",
        )
    ]


@pytest.mark.parametrize("prefix", ["", "/v1"])
async def test_each_route_that_runs_on_is_logged_with_the_entry_to_add(
    manager: TaskManager, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    """The entry has a star for each parameter, matches in mounted applications, and cancels the handler."""
    caplog.set_level(logging.INFO)

    def application(rule: str) -> TaskGroupMiddleware:
        async def respond(request: object) -> Response:
            await run_on()
            return Response("done")

        routes = [
            Route("/items/{item}", respond, methods=["POST"]),
            Route("/users/{user}/orders", respond, methods=["PUT"]),
        ]
        inner = Starlette(routes=routes)
        app = Starlette(routes=[Mount(prefix, inner)]) if prefix else inner
        return TaskGroupMiddleware(app, manager=manager, cancel_handler=rule)

    async def leave_all(app: TaskGroupMiddleware) -> None:
        for method, path in (("POST", "/items/1"), ("POST", "/items/2"), ("PUT", "/users/3/orders")):
            connection = FakeConnection(method=method, path=prefix + path)
            asyncio.get_running_loop().call_later(LONG, connection.disconnect)
            await connection.run(app)

    await leave_all(application("safe"))
    suggested = [re.findall(r"as in cancel_handler='(.*?)'", message)[0] for message in caplog.messages]
    assert len(suggested) == 2
    caplog.clear()
    await leave_all(application(", ".join(suggested)))
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("rule", "decision"),
    [(False, None), (lambda scope: False, None), ("safe, POST *, !POST /", None), ("safe", False)],
)
async def test_handler_that_runs_on_by_decision_is_not_logged(
    manager: TaskManager, caplog: pytest.LogCaptureFixture, rule: Any, decision: bool | None
) -> None:
    """False, a function, an exception in a rule, and the request's own decision are meant as they are."""
    caplog.set_level(logging.INFO)

    async def handler() -> None:
        if decision is not None:
            set_cancel_handler(decision)
        await run_on()

    await hang_up_on(app_of(handler), manager, post(), cancel_handler=rule)
    assert caplog.messages == []


async def test_handler_that_ends_with_its_tasks_is_not_logged(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """It awaits a task of the group: it does not run on."""
    caplog.set_level(logging.INFO)

    async def handler() -> None:
        await create_task(run_on())

    await hang_up_on(app_of(handler), manager, post())
    assert caplog.messages == []


async def test_log_line_names_the_rule_of_the_part_that_spared_the_handler(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """With two middlewares, it is the rule of the inner one."""
    caplog.set_level(logging.INFO)
    inner = TaskGroupMiddleware(app_of(run_on), manager=manager, cancel_handler="GET *")
    await hang_up_on(inner, manager, post(), cancel_handler=True)
    assert ["cancel_handler='GET *'" in message for message in caplog.messages] == [True]
