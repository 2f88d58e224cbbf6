"""The time limit of a request: who sets it, when it counts, and what it stops."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from starlette.middleware.base import BaseHTTPMiddleware

from otel_tasks import TaskManager, create_task
from otel_tasks._asgi.request import require_request
from otel_tasks._core.state import CancelKind
from otel_tasks.asgi import TaskGroupMiddleware, set_request_timeout
from otel_tasks.fastapi import RequestTimeout
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.hang_ups import BODY, LONG, START, app_of, post

from .helpers import ignore_cancels, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks._asgi.connection import Message, Receive, Scope, Send

LIMIT = 0.5
# The limit is kept to one or two looks, and never falls short.
SLACK = 2 * 0.025 + 0.001


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


async def serve(
    handler: Callable[[], Any], manager: TaskManager, connection: FakeConnection | None = None, **options: Any
) -> tuple[FakeConnection, float]:
    """Serve one request; return its connection, and how long it took."""
    connection = connection or post()
    begin = now()
    await connection.run(TaskGroupMiddleware(app_of(handler), manager=manager, **options))
    return connection, now() - begin


async def long() -> None:
    await asyncio.sleep(60)


# --- the option --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.01, 0.07, LIMIT, 5])
async def test_request_is_cut_short_after_its_limit(manager: TaskManager, seconds: float) -> None:
    """Not before it, and at most two looks later."""
    connection, took = await serve(long, manager, request_timeout=seconds)
    assert connection.status == 504
    assert seconds <= took <= seconds + SLACK


async def test_younger_request_is_cut_short_in_time_too(manager: TaskManager) -> None:
    """It opens between two looks, while the clock of another one runs."""
    middleware = TaskGroupMiddleware(app_of(long), manager=manager, request_timeout=LIMIT)
    took = []

    async def one(delay: float) -> None:
        await asyncio.sleep(delay)
        begin = now()
        await FakeConnection().run(middleware)
        took.append(now() - begin)

    await asyncio.gather(*(one(0.007 * count) for count in range(20)))
    assert all(LIMIT <= seconds <= LIMIT + SLACK for seconds in took), took


async def test_request_that_ends_in_time_is_left_alone(manager: TaskManager) -> None:
    """Nothing is left of its clock."""
    sweepers = []

    async def handler() -> None:
        sweepers.append(require_request("test").sweeper)
        await asyncio.sleep(LONG)

    connection, _ = await serve(handler, manager, request_timeout=LIMIT)
    assert connection.status == 200
    assert sweepers[0].open_requests() == []


async def test_function_of_the_scope_decides(manager: TaskManager) -> None:
    """It is called once, and only for a request that lives through a look."""
    scopes: list[str] = []

    def limit(scope: Scope) -> float | None:
        scopes.append(scope["path"])
        return None if scope["path"] == "/export" else LIMIT

    for path, status in (("/", 504), ("/export", 200)):
        connection = FakeConnection(path=path)
        await serve(lambda: asyncio.sleep(2), manager, connection, request_timeout=limit)
        assert connection.status == status
    await serve(lambda: asyncio.sleep(0), manager, request_timeout=limit)
    assert scopes == ["/", "/export"]


async def _coroutine() -> float:
    return 1.0


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("soon", "its result must be a number of seconds, got 'soon'"),
        (0, "its result must be greater than 0"),
        (-1, "its result must be greater than 0"),
        (math.nan, "its result must be greater than 0"),
        (math.inf, "None means no bound"),
        (True, "must be a number of seconds, got True"),
        (ZeroDivisionError("bug"), "ZeroDivisionError: bug"),
        (_coroutine, "it returned a coroutine"),
    ],
)
async def test_function_that_returns_no_seconds_is_logged_once(
    manager: TaskManager, caplog: pytest.LogCaptureFixture, result: Any, problem: str
) -> None:
    """The requests have no limit then; those of others keep theirs."""

    def limit(scope: Scope) -> Any:
        if isinstance(result, Exception):
            raise result
        return result() if callable(result) else result

    middleware = TaskGroupMiddleware(app_of(lambda: asyncio.sleep(2)), manager=manager, request_timeout=limit)
    connections = [FakeConnection(), FakeConnection()]
    with caplog.at_level(logging.ERROR, "otel_tasks"):
        for connection in connections:
            await connection.run(middleware)
    assert [connection.status for connection in connections] == [200, 200]
    (record,) = caplog.records
    assert "request_timeout=" in record.message
    assert problem in caplog.text


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (
            0,
            ValueError,
            "request_timeout must be greater than 0 and finite, in seconds, got 0; None means no",
        ),
        (-1.0, ValueError, "request_timeout must be greater than 0"),
        (math.inf, ValueError, "got inf; None means no bound"),
        (math.nan, ValueError, "request_timeout must be greater than 0"),
        ("5s", TypeError, "request_timeout must be a number of seconds, got '5s'; None means no bound"),
        (True, TypeError, "request_timeout must be a number of seconds, got True"),
        (_coroutine, TypeError, "request_timeout must be a plain function of the scope"),
    ],
)
def test_wrong_limits_are_refused(value: Any, error: type[Exception], message: str) -> None:
    """Each message names the option, the value and what it may be."""
    with pytest.raises(error) as caught:
        TaskGroupMiddleware(lambda *_: None, request_timeout=value)  # type: ignore[arg-type]  # never called
    assert message in str(caught.value)


async def test_websocket_has_a_limit_only_from_a_function(manager: TaskManager) -> None:
    """A number is meant for requests; a WebSocket lives as long as its peers like."""
    closed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            async with asyncio.timeout(2):
                closed.append((await receive())["code"])
        except TimeoutError:
            closed.append(None)

    for limit in (LIMIT, lambda scope: LIMIT):
        middleware = TaskGroupMiddleware(app, manager=manager, request_timeout=limit)
        await FakeConnection.websocket().run(middleware)
    assert closed == [None, 1011]


async def test_limit_of_an_inner_middleware_has_no_effect(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """The outer one opens the request and keeps its clock; a warning says so."""
    inner = TaskGroupMiddleware(app_of(lambda: asyncio.sleep(2)), manager=manager, request_timeout=LIMIT)
    connection = FakeConnection()
    await connection.run(TaskGroupMiddleware(inner, manager=manager))
    assert connection.status == 200
    assert "so request_timeout=0.5 has no effect here" in caplog.text


# --- one request decides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "own", "status"), [(None, LIMIT, 504), (LIMIT, None, 200), (60, LIMIT, 504)]
)
@pytest.mark.parametrize("delay", [0, LONG])
async def test_request_decides_for_itself(
    manager: TaskManager, option: float | None, own: float | None, status: int, delay: float
) -> None:
    """Before its first look or after it; the time counts from the opening."""

    async def handler() -> None:
        await asyncio.sleep(delay)
        set_request_timeout(own)
        await asyncio.sleep(2)

    connection, took = await serve(handler, manager, request_timeout=option)
    assert connection.status == status
    assert status == 200 or LIMIT <= took <= LIMIT + SLACK


async def test_limit_that_is_up_already_counts_at_once(manager: TaskManager) -> None:
    """The handler is cancelled at its next await."""
    reached = []

    async def handler() -> None:
        await asyncio.sleep(1)
        set_request_timeout(LIMIT)
        reached.append("runs on")
        await asyncio.sleep(0)
        reached.append("not reached")

    connection, took = await serve(handler, manager)
    assert (connection.status, round(took, 1), reached) == (504, 1.0, ["runs on"])


@pytest.mark.real_clock
async def test_limit_may_be_set_in_a_thread(manager: TaskManager) -> None:
    """In a `def` handler: the client gets its answer while the thread runs on."""

    async def handler() -> None:
        await asyncio.to_thread(set_request_timeout, 0.05)
        await asyncio.sleep(60)

    connection, _ = await serve(handler, manager)
    assert connection.status == 504


def test_set_request_timeout_needs_a_request_and_seconds() -> None:
    """The messages say what is wrong."""
    with pytest.raises(RuntimeError, match=r"set_request_timeout\(\) was called outside of a request"):
        set_request_timeout(1.0)
    with pytest.raises(ValueError, match="request_timeout must be greater than 0"):
        set_request_timeout(0)


# --- as a dependency ---------------------------------------------------------------------------------------


def shop(**options: Any) -> FastAPI:
    app = FastAPI()
    if options:
        app.add_middleware(TaskGroupMiddleware, **options)

    @app.get("/bounded", dependencies=[Depends(RequestTimeout(LIMIT))])
    async def bounded() -> str:
        await asyncio.sleep(2)
        return "done"

    @app.post("/annotated")
    async def annotated(_: Annotated[None, Depends(RequestTimeout(LIMIT))]) -> str:
        await asyncio.sleep(2)
        return "done"

    @app.get("/lifted", dependencies=[Depends(RequestTimeout(None))])
    async def lifted() -> str:
        await asyncio.sleep(2)
        return "done"

    @app.get("/plain")
    async def plain() -> str:
        await asyncio.sleep(2)
        return "done"

    async def slow() -> None:
        await asyncio.sleep(1)

    @app.post("/late", dependencies=[Depends(slow), Depends(RequestTimeout(LIMIT))])
    async def late() -> str:
        raise AssertionError("the route must not be called")

    return app


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/bounded", 504),
        ("POST", "/annotated", 504),
        ("GET", "/lifted", 200),
        ("GET", "/plain", 504),
        ("POST", "/late", 504),
    ],
)
async def test_dependency_decides_for_its_route(
    manager: TaskManager, method: str, path: str, status: int
) -> None:
    """It takes precedence over the middleware's option, and a route whose time is up is not called."""
    connection = FakeConnection(method=method, path=path)
    await connection.run(shop(manager=manager, request_timeout=1.5))
    assert connection.status == status


def test_dependency_checks_its_seconds_where_it_is_made() -> None:
    """A wrong value fails when the module is imported."""
    with pytest.raises(ValueError, match=r"RequestTimeout\(\) must be greater than 0"):
        RequestTimeout(0)
    with pytest.raises(TypeError, match=r"RequestTimeout\(\) must be a number of seconds, got '5s'"):
        RequestTimeout("5s")  # type: ignore[arg-type]  # the mistake under test
    assert repr(RequestTimeout(5.0)) == "RequestTimeout(5.0)"


async def test_dependency_without_the_middleware_says_so() -> None:
    """As its siblings do."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(shop()), base_url="http://shop") as client:
        with pytest.raises(RuntimeError, match=r"RequestTimeout needs .* app\.add_middleware\(TaskGroup"):
            await client.get("/bounded")


# --- what else goes on -------------------------------------------------------------------------------------


async def test_span_and_tasks_say_timeout(manager: TaskManager, spans: SpanRecorder) -> None:
    """The cause names the limit and the route, and its origin is the request's span."""
    tasks = []

    async def handler() -> None:
        tasks.append(create_task(asyncio.sleep(60), name="fetch"))
        await asyncio.sleep(60)

    with spans.provider.get_tracer("server").start_as_current_span("server") as server:
        await serve(handler, manager, request_timeout=LIMIT)
    attributes = dict(spans.span("server").attributes or {})
    assert attributes == {
        "otel_tasks.request.outcome": "timeout",
        "otel_tasks.request.handler": "cancelled",
        "otel_tasks.cancel.count": 1,
    }
    cause = tasks[0].info().cause
    assert cause is not None
    assert str(cause) == "timeout: the request took longer than 0.5 s"
    assert (cause.kind, cause.asked_by) == (CancelKind.TIMEOUT, "POST")
    assert cause.origin == server.get_span_context()
    span = spans.span("fetch")
    assert (span.attributes or {})["otel_tasks.cancel.reason"] == "timeout"
    assert (span.attributes or {})["otel_tasks.task.outcome"] == "cancelled"
    server_id = f"{server.get_span_context().span_id:016x}"
    assert (span.attributes or {})["otel_tasks.cancel.origin.span_id"] == server_id


async def test_span_is_written_before_a_layer_ends_it_with_the_answer(
    manager: TaskManager, spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """As FastAPI does, and OpenTelemetry for ASGI; the SDK warns of attributes that come late."""

    async def handler() -> None:
        create_task(asyncio.sleep(60))
        await asyncio.sleep(60)

    connection = post()
    with spans.provider.get_tracer("server").start_as_current_span("server", end_on_exit=False) as server:

        async def send(message: Message) -> None:
            await connection.send(message)
            if message["type"] == "http.response.body":
                server.end()

        middleware = TaskGroupMiddleware(app_of(handler), manager=manager, request_timeout=LIMIT)
        await middleware(connection.scope, connection.receive, send)
    attributes = spans.span("server").attributes or {}
    assert attributes["otel_tasks.request.outcome"] == "timeout"
    assert attributes["otel_tasks.request.handler"] == "cancelled"
    assert attributes["otel_tasks.cancel.count"] == 1
    assert caplog.text == ""


async def test_timeouts_inside_the_handler_are_its_own(manager: TaskManager) -> None:
    """asyncio.timeout() expires as ever, and does not take the cancellation of the request for its own."""
    seen = []

    async def handler() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.sleep(60)
        try:
            async with asyncio.timeout(10):
                await asyncio.sleep(60)
        except BaseException as error:
            seen.append(type(error))
            raise

    connection, _ = await serve(handler, manager, request_timeout=LIMIT)
    assert (connection.status, seen) == (504, [asyncio.CancelledError])


async def test_handler_that_ignores_its_cancellation_answers_nobody(manager: TaskManager) -> None:
    """The client has its 504 at the limit; the request ends with the handler."""
    connection, took = await serve(lambda: ignore_cancels(3), manager, request_timeout=LIMIT)
    assert [message.get("status") for message in connection.sent] == [504, None]
    assert took >= 3


async def test_background_tasks_have_no_limit(manager: TaskManager) -> None:
    """The response is complete."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        await send(dict(BODY))
        await asyncio.sleep(2)
        ended.append("finished")

    connection = FakeConnection()
    await connection.run(TaskGroupMiddleware(app, manager=manager, request_timeout=LIMIT))
    assert (connection.status, ended) == (200, ["finished"])


async def test_server_that_shuts_down_after_the_limit_gets_its_cancellation(manager: TaskManager) -> None:
    """The request's own cancel request is withdrawn, the server's is not."""

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(3)

    connection = FakeConnection()
    middleware = TaskGroupMiddleware(app_of(handler), manager=manager, request_timeout=LIMIT)
    serving = asyncio.create_task(connection.run(middleware))
    await asyncio.sleep(1)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert connection.status == 504


class _PassOn(BaseHTTPMiddleware):
    statuses: list[int]

    async def dispatch(self, request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        self.statuses.append(response.status_code)
        return response


@pytest.mark.parametrize("place", ["in front", "behind"])
async def test_base_http_middleware_is_no_obstacle(manager: TaskManager, place: str) -> None:
    """In front it sees the 504; behind it is cancelled with the handler."""
    statuses: list[int] = []
    app: Any = app_of(long)
    if place == "behind":
        app = _PassOn(app)
        app.statuses = statuses
    app = TaskGroupMiddleware(app, manager=manager, request_timeout=LIMIT)
    if place == "in front":
        app = _PassOn(app)
        app.statuses = statuses
    connection = post()
    begin = now()
    await connection.run(app)
    assert (connection.status, connection.complete) == (504, True)
    assert LIMIT <= now() - begin <= LIMIT + SLACK
    assert statuses == ([504] if place == "in front" else [])


async def test_many_open_requests_cost_no_tick(manager: TaskManager) -> None:
    """A look at a thousand requests with a limit finds none in flight, and no timer of it runs."""
    middleware = TaskGroupMiddleware(app_of(long), manager=manager, request_timeout=5)
    serving = [asyncio.create_task(FakeConnection().run(middleware)) for _ in range(1000)]
    await asyncio.sleep(LONG)
    sweeper = middleware.settings.sweeper
    assert sweeper is not None
    assert (len(sweeper.watched), sweeper.timer) == (1000, None)
    await asyncio.gather(*serving)
    assert sweeper.open_requests() == []
