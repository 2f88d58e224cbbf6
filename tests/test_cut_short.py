"""Requests that are cut short although their client is there: what ends, and what the client gets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from starlette.websockets import WebSocket, WebSocketDisconnect

from otel_tasks import TaskManager, create_task, current_cancel_event
from otel_tasks._asgi.request import Request, require_request
from otel_tasks._core.state import CancelKind
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.hang_ups import BODY, LONG, START, app_of, post

if TYPE_CHECKING:
    from otel_tasks._asgi.connection import Receive, Scope, Send
    from tests.hang_ups import App

KINDS = [(CancelKind.TIMEOUT, 504), (CancelKind.SHUTDOWN, 503)]


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


async def cut(
    app: App,
    manager: TaskManager,
    connection: FakeConnection,
    kind: CancelKind = CancelKind.TIMEOUT,
    **options: Any,
) -> asyncio.Task[None]:
    """Cut a request short while the application works; return the server's task."""
    requests: list[Request] = []

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        requests.append(require_request("test"))
        await app(scope, receive, send)

    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(noting, manager=manager, **options)))
    await asyncio.sleep(LONG)
    requests[0].cut_short(requests[0].make_cause(kind))
    return serving


@pytest.mark.parametrize(("kind", "status"), KINDS)
async def test_request_that_is_cut_short_is_answered_and_its_work_cancelled(
    manager: TaskManager, kind: CancelKind, status: int
) -> None:
    """The handler of a POST too, which a disconnect does not cancel."""
    tasks = []
    ended = []

    async def handler() -> None:
        tasks.append(create_task(asyncio.sleep(60)))
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    connection = post()
    await (await cut(app_of(handler), manager, connection, kind))
    assert (connection.status, connection.complete) == (status, True)
    assert connection.headers["content-length"] == str(len(connection.body))
    assert connection.headers.get("connection") == ("close" if status == 503 else None)
    assert ended == ["cancelled"]
    assert [task.info().cause.kind for task in tasks] == [kind]  # type: ignore[union-attr]  # it has one


async def test_answer_does_not_wait_for_the_handler(manager: TaskManager) -> None:
    """The client gets its answer at once; the block of uncancellable() ends, and with it the request."""
    ended = []

    async def handler() -> None:
        async with uncancellable():
            await asyncio.sleep(5)
            ended.append("finished")
        await asyncio.sleep(60)

    connection = post()
    serving = await cut(app_of(handler), manager, connection)
    await asyncio.sleep(0.01)
    assert connection.status == 504
    assert connection.complete
    assert not serving.done()
    await serving
    assert ended == ["finished"]


async def test_answer_of_a_handler_that_swallows_its_cancellation_is_dropped(manager: TaskManager) -> None:
    """The client has its answer already."""

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(1)

    connection = FakeConnection()
    await (await cut(app_of(handler), manager, connection))
    assert [message.get("status") for message in connection.sent] == [504, None]


async def test_task_in_uncancellable_finishes_first(manager: TaskManager) -> None:
    """It is cancelled at the end of its block."""
    ended = []

    async def work() -> None:
        async with uncancellable():
            await asyncio.sleep(5)
            ended.append("finished")
        ended.append("not reached")

    async def handler() -> None:
        await create_task(work())

    await (await cut(app_of(handler), manager, FakeConnection()))
    assert ended == ["finished"]


async def test_application_that_reads_learns_of_it_as_of_a_disconnect(manager: TaskManager) -> None:
    """It waits in the server's receive(), for an upload that does not come."""
    received = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())
        received.append(await receive())
        task = asyncio.current_task()
        received.append({"cancelling": task and task.cancelling()})

    connection = FakeConnection(method="POST", body=None)
    await (await cut(app, manager, connection))
    assert received == [{"type": "http.disconnect"}] * 2 + [{"cancelling": 0}]
    assert connection.status == 504


async def test_reader_in_uncancellable_learns_of_it_at_the_end_of_the_block(manager: TaskManager) -> None:
    """A listener would cancel the block's body."""
    received = []

    async def listen(receive: Receive) -> None:
        received.append((await receive(), asyncio.get_running_loop().time()))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        listening = asyncio.create_task(listen(receive))
        await asyncio.sleep(0)
        async with uncancellable():
            await asyncio.sleep(5)
        await listening

    begin = asyncio.get_running_loop().time()
    await (await cut(app, manager, FakeConnection(method="POST", body=None)))
    assert [(message["type"], round(at - begin, 1)) for message, at in received] == [("http.disconnect", 5.0)]


async def test_reader_that_others_cancel_too_is_cancelled(manager: TaskManager) -> None:
    """Only the request's own cancel request is withdrawn."""
    ended = []
    readers = []

    async def read(receive: Receive) -> None:
        try:
            await receive()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        readers.append(asyncio.create_task(read(receive)))
        await asyncio.wait(readers)

    serving = await cut(app, manager, FakeConnection(method="POST", body=None))
    readers[0].cancel()
    await serving
    assert ended == ["cancelled"]


@pytest.mark.parametrize("length", [None, b"100"])
@pytest.mark.parametrize("kind", [CancelKind.TIMEOUT, CancelKind.SHUTDOWN])
async def test_started_response_is_ended_only_by_a_shutdown(
    manager: TaskManager, kind: CancelKind, length: bytes | None
) -> None:
    """After a timeout the client must not take it for whole, nor where its length is declared."""
    headers = [] if length is None else [(b"Content-Length", length)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "headers": headers})
        while True:
            await send({**BODY, "more_body": True})
            await asyncio.sleep(1)

    connection = post()
    await (await cut(app, manager, connection, kind))
    assert connection.status == 200
    assert connection.complete == (kind is CancelKind.SHUTDOWN and length is None)


@pytest.mark.parametrize("kind", [CancelKind.TIMEOUT, CancelKind.SHUTDOWN])
async def test_end_that_the_application_sends_too_late_is_sent_for_a_shutdown(
    manager: TaskManager, kind: CancelKind
) -> None:
    """A layer inside (`BaseHTTPMiddleware` is one) ends the response that it has been cut off from."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        await send({**BODY, "more_body": True})
        try:
            await asyncio.sleep(60)
        finally:
            await send({**BODY, "body": b"late"})

    connection = post()
    await (await cut(app, manager, connection, kind))
    assert (connection.status, connection.body) == (200, b"done")
    assert connection.complete == (kind is CancelKind.SHUTDOWN)


async def test_complete_response_is_left_alone(manager: TaskManager) -> None:
    """Background tasks run on."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        await send(dict(BODY))
        await asyncio.sleep(60)
        ended.append("finished")

    connection = FakeConnection()
    await (await cut(app, manager, connection))
    assert (connection.status, ended) == (200, ["finished"])


async def test_client_that_leaves_afterwards_changes_nothing(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The cause stays, and nothing is cancelled twice."""
    cancels = []

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancels.append("handler")
            await asyncio.sleep(1)

    connection = FakeConnection()
    with spans.provider.get_tracer("server").start_as_current_span("server") as server:
        serving = await cut(app_of(handler), manager, connection)
        await asyncio.sleep(0.5)
        connection.disconnect()
        await serving
    assert cancels == ["handler"]
    attributes = spans.span("server").attributes or {}
    assert server.is_recording() is False
    assert attributes["otel_tasks.request.outcome"] == "timeout"
    assert attributes["otel_tasks.request.handler"] == "cancelled"


async def test_client_that_left_before_is_not_answered_twice(manager: TaskManager) -> None:
    """The disconnect is the cause, and the status stays 499."""
    requests = []

    async def handler() -> None:
        requests.append(require_request("test"))
        await asyncio.sleep(5)

    connection = post()
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app_of(handler), manager=manager)))
    await asyncio.sleep(LONG)
    connection.disconnect()
    await asyncio.sleep(LONG)
    requests[0].cut_short(requests[0].make_cause(CancelKind.TIMEOUT))
    await serving
    assert connection.status == 499


@pytest.mark.parametrize(("kind", "seconds"), [(CancelKind.TIMEOUT, 2.0), (CancelKind.SHUTDOWN, 0.0)])
async def test_timeout_keeps_the_grace_and_a_shutdown_does_not(
    manager: TaskManager, kind: CancelKind, seconds: float
) -> None:
    """The answer goes out at once and the cancel event is set; the handler has its grace."""
    ended = []
    events = []

    async def handler() -> None:
        events.append(current_cancel_event())
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(asyncio.get_running_loop().time())

    connection = FakeConnection()
    serving = await cut(app_of(handler), manager, connection, kind, grace=2.0)
    begin = asyncio.get_running_loop().time()
    await asyncio.sleep(0.01)
    assert connection.complete
    assert events[0].is_set()
    await serving
    assert round(ended[0] - begin, 1) == seconds


@pytest.mark.parametrize(
    ("kind", "code"), [(CancelKind.TIMEOUT, 1011), (CancelKind.SHUTDOWN, 1012)], ids=["timeout", "shutdown"]
)
async def test_websocket_is_closed_and_its_application_receives_the_code(
    manager: TaskManager, kind: CancelKind, code: int
) -> None:
    """It may wait in receive(), as most do."""
    received = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        received.append(await receive())

    connection = FakeConnection.websocket()
    await (await cut(app, manager, connection, kind))
    assert [message.get("code") for message in (*connection.sent[1:], *received)] == [code, code]


@pytest.mark.parametrize("kind", [CancelKind.TIMEOUT, CancelKind.SHUTDOWN])
async def test_websocket_that_is_cut_short_raises_nothing_into_the_server(
    manager: TaskManager, kind: CancelKind
) -> None:
    """Starlette raises WebSocketDisconnect from the message, which most applications do not catch."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        socket = WebSocket(scope, receive, send)
        await socket.accept()
        while True:
            await socket.receive_text()

    await (await cut(app, manager, FakeConnection.websocket(), kind))


async def test_websocket_error_after_its_cut_is_raised(manager: TaskManager) -> None:
    """It is the application's own."""

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await receive()
        raise WebSocketDisconnect(1006)

    with pytest.raises(WebSocketDisconnect):
        await (await cut(app, manager, FakeConnection.websocket()))


async def test_shutdown_of_the_server_does_not_wait_for_the_answer(manager: TaskManager) -> None:
    """The client reads nothing: the answer is given up with the request."""

    async def handler() -> None:
        await asyncio.sleep(60)

    connection = FakeConnection()
    connection.pause()
    serving = await cut(app_of(handler), manager, connection)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert connection.sent == []


async def test_failure_after_the_answer_is_raised(manager: TaskManager) -> None:
    """A bug in the cleanup is not hidden."""

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("bug")

    connection = FakeConnection()
    serving = await cut(app_of(handler), manager, connection)
    with pytest.raises(ValueError, match="bug"):
        await serving
    assert connection.status == 504
    assert connection.complete


async def test_open_requests_of_a_loop_are_known(manager: TaskManager) -> None:
    """Those that have just opened, and those that are watched; none that has ended."""
    sweepers = []

    async def handler() -> None:
        sweepers.append(require_request("test").sweeper)
        await asyncio.sleep(1)

    middleware = TaskGroupMiddleware(app_of(handler), manager=manager)
    long = asyncio.create_task(FakeConnection().run(middleware))
    await asyncio.sleep(LONG)
    short = asyncio.create_task(FakeConnection().run(middleware))
    await asyncio.sleep(0)
    sweeper = sweepers[0]
    assert [len(sweeper.watched), len(sweeper.open_requests())] == [1, 2]
    await asyncio.gather(long, short)
    assert sweeper.open_requests() == []
