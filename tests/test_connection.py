"""How the middleware notices that the client has left, against a server played by FakeConnection."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import CancelKind, TaskManager
from otel_tasks.asgi import ClientDisconnected, TaskGroupMiddleware, request_group
from otel_tasks.testing import FakeConnection

if TYPE_CHECKING:
    from otel_tasks._asgi.connection import Receive, Scope, Send

START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"done"}
# Longer than two looks of the sweep, which come every 25 ms: by then a request is watched.
LONG = 0.06


class Server:
    """Runs one connection through the middleware in a task, as servers do."""

    def __init__(self, app: Any, connection: FakeConnection | None = None, **options: Any) -> None:
        self.connection = connection or FakeConnection()
        options.setdefault("manager", TaskManager("test"))
        self.middleware = TaskGroupMiddleware(app, **options)
        self.task = asyncio.create_task(self.connection.run(self.middleware), name="server")

    async def hang_up(self, after: float = LONG) -> None:
        """Let the client leave, and wait until the server is through with the request."""
        await asyncio.sleep(after)
        self.connection.disconnect()
        await self.task


def watchers() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "otel_tasks.watch"]


async def respond(send: Send) -> None:
    await send(dict(START))
    await send(dict(BODY))


async def drain(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        assert message["type"] == "http.request"
        body += message["body"]
        if not message["more_body"]:
            return bytes(body)


async def test_short_request_makes_no_task_and_never_reads() -> None:
    """A request shorter than a look of the sweep costs no task and no call of receive()."""
    tasks: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        tasks.extend(asyncio.all_tasks())
        await respond(send)

    server = Server(app)
    await server.task
    assert len(tasks) == 2
    assert server.connection.received == 0
    assert server.connection.status == 200


async def test_request_is_watched_after_one_to_two_ticks() -> None:
    """One watcher is started once a request has lived through a whole tick, and ends with the request."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        seen.append(len(watchers()))
        await asyncio.sleep(0.04)
        seen.append(len(watchers()))
        await respond(send)

    server = Server(app)
    await server.task
    assert seen == [0, 1]
    await asyncio.sleep(0)
    assert watchers() == []


async def test_no_timer_runs_while_nothing_is_in_flight() -> None:
    """The sweep stops by itself after the last request, and a watched request needs no tick."""
    timers: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        sweeper = server.middleware.settings.sweeper
        timers.append(sweeper is not None and sweeper.timer)
        await respond(send)

    server = Server(app)
    await server.task
    assert timers == [None]


async def test_disconnect_cancels_group_and_safe_handler() -> None:
    """A client that leaves stops the request's tasks and, for GET, the handler."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("task")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = request_group().create_task(work())
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("handler")
            assert task.cause is not None
            assert task.cause.kind is CancelKind.CLIENT_DISCONNECT

    server = Server(app)
    await server.hang_up()
    assert sorted(ended) == ["handler", "task"]
    assert server.connection.status == 499
    assert asyncio.get_running_loop().time() < 1001


@pytest.mark.parametrize(
    "quirk",
    [
        "says_disconnect_once",
        "send_raises_after_disconnect",
        "send_hangs_after_disconnect",
        "receive_is_not_a_coroutine",
        "spurious_empty_request",
        "disconnect_inside_final_send",
    ],
)
async def test_disconnect_is_noticed_on_servers_with_quirks(quirk: str) -> None:
    """On each of these servers, a disconnect cancels the group and the call returns."""
    cancelled = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await request_group().create_task(work())

    connection = FakeConnection(method="POST", **{quirk: True})  # type: ignore[arg-type]  # one of the flags
    await Server(app, connection).hang_up()
    assert cancelled == [True]
    assert connection.max_readers == 1


@pytest.mark.parametrize("quirk", ["", "disconnect_inside_final_send", "says_disconnect_once"])
async def test_disconnect_after_the_response_cancels_nothing(quirk: str) -> None:
    """The message that servers send at the end of a response is not the client leaving."""
    done = []

    async def work() -> None:
        await asyncio.sleep(1)
        done.append("task")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = request_group().create_task(work())
        await asyncio.sleep(LONG)
        await respond(send)
        await task
        done.append("background")

    options: dict[str, Any] = {quirk: True} if quirk else {}
    server = Server(app, FakeConnection(**options))
    await server.task
    assert done == ["task", "background"]


@pytest.mark.parametrize("quirk", ["", "says_disconnect_once"])
async def test_disconnect_is_sticky(quirk: str) -> None:
    """Once seen, the disconnect is returned by each receive(), without suspending."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        for _ in range(3):
            coro = receive()
            try:
                coro.send(None)  # type: ignore[attr-defined]  # it is a coroutine
            except StopIteration as result:
                messages.append(result.value["type"])

    options: dict[str, Any] = {quirk: True} if quirk else {}
    server = Server(app, FakeConnection(method="POST", **options))
    await server.hang_up()
    assert messages == ["http.disconnect"] * 3


async def test_disconnect_is_sticky_after_the_response() -> None:
    """A server that says it once and hangs does not make a second receive() hang."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await drain(receive)
        await respond(send)
        messages.extend([await receive(), await receive()])

    await Server(app, FakeConnection(says_disconnect_once=True)).task
    assert [message["type"] for message in messages] == ["http.disconnect"] * 2


async def test_disconnect_wakes_all_waiters_in_receive() -> None:
    """Several tasks of the application that wait for a message all learn of the disconnect."""
    told = []

    async def listen(receive: Receive) -> None:
        told.append((await receive())["type"])

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await drain(receive)
        await asyncio.gather(*(listen(receive) for _ in range(3)))

    server = Server(app, FakeConnection(method="POST", says_disconnect_once=True))
    await server.hang_up()
    assert told == ["http.disconnect"] * 3
    assert server.connection.max_readers == 1


async def test_application_reading_is_the_watcher() -> None:
    """While the application is in receive() no second reader is started, and its disconnect counts."""
    causes = []

    async def work() -> None:
        await asyncio.sleep(60)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = request_group().create_task(work())
        await drain(receive)
        message = await receive()
        await asyncio.wait([task])
        causes.append((message["type"], task.cause and task.cause.kind))

    server = Server(app, FakeConnection(method="POST"))
    await server.hang_up(after=1)
    assert causes == [("http.disconnect", CancelKind.CLIENT_DISCONNECT)]
    assert server.connection.max_readers == 1
    assert watchers() == []


async def test_watching_begins_when_the_application_has_stopped_reading() -> None:
    """A long upload that the application reads is watched once the application stops reading."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await drain(receive)
        await asyncio.sleep(60)

    connection = FakeConnection(body=None)
    server = Server(app, connection)
    for _ in range(5):
        await asyncio.sleep(0.1)
        connection.feed(b"chunk")
    connection.feed(b"", more=False)
    await server.hang_up()
    assert connection.status == 499
    assert connection.max_readers == 1


async def test_watching_begins_after_a_cancelled_read() -> None:
    """An application that gave up waiting for a message is watched again."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await drain(receive)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(receive(), 1)
        await asyncio.sleep(60)

    server = Server(app)
    await server.hang_up(after=1 + LONG)
    assert server.connection.status == 499


async def test_second_reader_of_the_application_takes_over_from_a_cancelled_one() -> None:
    """When the reading task is cancelled, another waiting one reads in its place."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await drain(receive)
        first = asyncio.ensure_future(receive())
        second = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        first.cancel()
        messages.append(await second)

    server = Server(app, FakeConnection(method="POST"))
    await server.hang_up(after=0.02)
    assert messages == [{"type": "http.disconnect"}]
    assert server.connection.max_readers == 1


async def test_body_read_ahead_is_delivered_in_order_without_suspending() -> None:
    """Messages that the watcher read come out of receive() in order, without a turn of the loop for each."""
    bodies = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        for _ in range(3):
            try:
                receive().send(None)  # type: ignore[attr-defined]  # it is a coroutine
            except StopIteration as result:
                bodies.append((result.value["body"], result.value["more_body"]))
        await respond(send)

    await Server(app, FakeConnection(method="POST", body=[b"a", b"b", b"c"])).task
    assert bodies == [(b"a", True), (b"b", True), (b"c", False)]


async def test_message_is_not_lost_by_a_waiter_that_is_cancelled() -> None:
    """Being cancelled while the watcher reads, even with a message on its way, loses nothing."""
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(LONG)
        assert watchers()
        waiter = asyncio.ensure_future(receive())
        await asyncio.sleep(0.01)
        connection.feed(b"precious", more=False)
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        bodies.append(await drain(receive))
        await respond(send)

    connection = FakeConnection(method="POST", body=None)
    await Server(app, connection).task
    assert bodies == [b"precious"]


async def test_waiter_wakes_when_the_watcher_reads() -> None:
    """An application that begins to read while it is watched gets the rest of the body from the watcher."""
    bodies = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(LONG)
        bodies.append(await drain(receive))
        await respond(send)

    connection = FakeConnection(method="POST", body=None)
    server = Server(app, connection)
    await asyncio.sleep(0.1)
    connection.feed(b"one ")
    await asyncio.sleep(0.1)
    connection.feed(b"two", more=False)
    await server.task
    assert bodies == [b"one two"]
    assert connection.max_readers == 1


async def test_unread_body_is_not_taken_into_memory() -> None:
    """The watcher stops at the buffer limit, and continues once the application has read."""
    taken = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(10)
        taken.append(server.connection.received)
        total = len(await drain(receive))
        taken.append(total)
        await asyncio.sleep(60)

    chunk = bytes(65_536)
    server = Server(app, FakeConnection(body=(chunk for _ in range(50))))
    await server.hang_up(after=10 + LONG)
    assert taken == [4, 3_276_800]
    assert server.connection.status == 499


async def test_flood_of_empty_messages_meets_the_limit_too() -> None:
    """Messages without content count, or a client could fill the memory with them."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(10)
        await respond(send)

    server = Server(app, FakeConnection(body=(b"" for _ in range(10**9))))
    await server.task
    assert server.connection.received <= 1024


async def test_disconnect_behind_the_buffer_limit_is_seen_after_reading_on() -> None:
    """A full buffer hides the disconnect until the application reads."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(10)
        seen.append(len(watchers()))
        await receive()
        await asyncio.sleep(60)

    server = Server(app, FakeConnection(body=[b"x"] * 3), buffer_limit=1)
    await server.hang_up(after=1)
    assert seen == [0]
    assert asyncio.get_running_loop().time() < 1000 + 10.1
    assert server.connection.status == 499


async def test_watching_resumes_only_below_the_limit() -> None:
    """Taking a small message from in front of a big one does not start the watcher yet."""
    taken = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(3):
            await asyncio.sleep(1)
            taken.append(server.connection.received)
            await receive()
        await respond(send)

    server = Server(app, FakeConnection(method="POST", body=[b"a", bytes(10_000), b"c"]), buffer_limit=300)
    await server.task
    assert taken == [2, 2, 3]


@pytest.mark.parametrize("wait", [0.0, LONG])
async def test_spurious_empty_request_after_the_body_is_dropped(wait: float) -> None:
    """An empty message after the body's end reaches the application neither directly nor by the watcher."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(wait)
        await drain(receive)
        messages.append(await receive())

    server = Server(app, FakeConnection(method="POST", spurious_empty_request=True))
    await server.hang_up(after=1)
    assert messages == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("reads", [True, False])
async def test_server_that_repeats_an_empty_request_does_not_stop_the_loop(reads: bool) -> None:
    """A receive() that returns the same message at once, as in handwritten tests, starves no task."""
    calls = []

    async def receive() -> Any:
        calls.append(True)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if reads:
            await receive()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(receive(), 0)
        await asyncio.sleep(1)
        await respond(send)

    connection = FakeConnection()
    connection.receive = receive
    await Server(app, connection).task
    assert connection.status == 200
    # Tried again now and then, no more.
    assert len(calls) < 100


async def test_request_that_ended_while_it_was_to_be_watched_is_forgotten() -> None:
    """A stray task that reads after the end of its request does not bring the request back."""
    strays: list[asyncio.Task[Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await drain(receive)
        strays.append(asyncio.create_task(receive()))  # type: ignore[arg-type]  # it is a coroutine
        await asyncio.sleep(LONG)
        await respond(send)

    server = Server(app)
    await server.task
    await asyncio.gather(*strays)
    await asyncio.sleep(LONG)
    assert watchers() == []


async def test_empty_chunk_inside_the_body_is_kept() -> None:
    """Only what comes after the end of the body is dropped."""
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.extend([(await receive())["body"] for _ in range(3)])
        await respond(send)

    await Server(app, FakeConnection(method="POST", body=[b"a", b"", b"b"])).task
    assert bodies == [b"a", b"", b"b"]


async def test_disconnect_replaces_an_unread_body() -> None:
    """After the client has left receive() says so at once, as servers do, whatever had been read ahead."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        messages.append(await receive())

    await Server(app, FakeConnection(method="POST", body=[b"a", b"b"])).hang_up()
    assert messages == [{"type": "http.disconnect"}]


async def test_oserror_from_receive_is_a_disconnect() -> None:
    """A server whose receive() raises on a broken connection tells the same by it."""
    messages = []

    async def broken() -> Any:
        await asyncio.sleep(0.2)
        raise ConnectionResetError

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        messages.append(await receive())
        raise ClientDisconnected

    for begin in (0.0, LONG):

        async def late(scope: Scope, receive: Receive, send: Send, begin: float = begin) -> None:
            await asyncio.sleep(begin)
            await app(scope, receive, send)

        connection = FakeConnection(method="POST")
        connection.receive = broken
        await Server(late, connection).task
    assert messages == [{"type": "http.disconnect"}] * 2


async def test_broken_websocket_gets_its_close_code() -> None:
    """Where the server raises instead of sending the message, the application gets 1006 (no close frame)."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        messages.append(await receive())

    async def broken() -> Any:
        raise ConnectionResetError

    connection = FakeConnection.websocket()
    connection.receive = broken
    await Server(app, connection).task
    assert messages == [{"type": "websocket.disconnect", "code": 1006, "reason": None}]


async def test_send_that_fails_after_the_disconnect_was_noticed_changes_nothing() -> None:
    """A send() under way when the client leaves may fail too: one disconnect, one cancellation."""
    lefts = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request_group().cancel_event  # noqa: B018  # made, so that it is set
        await drain(receive)
        sending = asyncio.ensure_future(send(dict(START)))
        lefts.append((await receive())["type"])
        lefts.extend(await asyncio.gather(sending, return_exceptions=True))

    connection = FakeConnection(method="POST")

    async def failing(message: Any) -> None:
        await asyncio.sleep(1)
        raise BrokenPipeError

    connection.send = failing  # type: ignore[method-assign]  # a server with its own send()
    await Server(app, connection).hang_up()
    assert lefts[0] == "http.disconnect"
    assert isinstance(lefts[1], BrokenPipeError)


async def test_other_errors_of_receive_are_met_by_the_application() -> None:
    """The watcher ignores an error that is no disconnect; the application's read raises it."""
    raised = []

    async def broken() -> Any:
        raise RuntimeError("the server is confused")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        assert watchers() == []
        with pytest.raises(RuntimeError, match="confused") as caught:
            await receive()
        raised.append(caught.value)
        await respond(send)

    connection = FakeConnection()
    connection.receive = broken
    await Server(app, connection).task
    assert len(raised) == 1
    assert connection.status == 200


async def test_oserror_from_send_is_a_disconnect() -> None:
    """A send() that meets the closed connection cancels the group; the error itself stays inside."""
    causes = []

    async def work() -> None:
        await asyncio.sleep(60)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = request_group().create_task(work())
        await send(dict(START))
        try:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        finally:
            await asyncio.wait([task])
            causes.append(task.cause and task.cause.kind)

    connection = FakeConnection()
    sent: list[Any] = []

    async def failing(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            raise BrokenPipeError

    connection.send = failing  # type: ignore[method-assign]  # a server with its own send()
    await Server(app, connection).task
    assert causes == [CancelKind.CLIENT_DISCONNECT]
    assert sent == ["http.response.start", "http.response.body"]


async def test_missing_file_of_pathsend_is_no_disconnect() -> None:
    """An OSError that is about a file is the application's to handle."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        await send({"type": "http.response.pathsend", "path": "/nowhere"})

    connection = FakeConnection()

    async def failing(message: Any) -> None:
        if message["type"] == "http.response.pathsend":
            raise FileNotFoundError(message["path"])

    connection.send = failing  # type: ignore[method-assign]  # a server with its own send()
    with pytest.raises(FileNotFoundError):
        await Server(app, connection).task


@pytest.mark.parametrize(
    ("trailers", "last"),
    [
        (True, {"type": "http.response.trailers", "headers": []}),
        (False, {"type": "http.response.pathsend", "path": "/file"}),
    ],
)
async def test_response_is_complete_with_its_very_last_message(trailers: bool, last: dict[str, Any]) -> None:
    """Announced trailers end a response, not the body before them; a sent file ends it too."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START | {"trailers": trailers})
        if trailers:
            await send(dict(BODY))
            if scope["path"] == "/leaves":
                await asyncio.sleep(60)
        await send(last)
        await asyncio.sleep(1)
        ended.append(scope["path"])

    await Server(app).hang_up()
    assert ended == ["/"]
    if trailers:
        await Server(app, FakeConnection(path="/leaves")).hang_up()
        assert ended == ["/"]


async def test_sends_after_the_disconnect_are_not_forwarded() -> None:
    """A handler that keeps running may send its response; nothing receives it, and nothing hangs."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        await respond(send)

    connection = FakeConnection(method="POST", send_hangs_after_disconnect=True)
    await Server(app, connection).hang_up()
    assert [message.get("status") for message in connection.sent_late] == [499]


@pytest.mark.parametrize(("version", "raises"), [("2.4", True), ("2.5", True), ("2.3", False), ("3.0", True)])
async def test_endless_stream_is_ended_by_an_error(version: str, raises: bool) -> None:
    """A stream that continues after the disconnect gets an OSError, in the ASGI versions that have it."""
    errors = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        await asyncio.sleep(1)
        try:
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except OSError as error:
            errors.append(error)
            raise

    connection = FakeConnection(method="POST", spec_version=version)
    await Server(app, connection).hang_up()
    assert [type(error) for error in errors] == ([ClientDisconnected] if raises else [])
    assert len(connection.sent) == 1


async def test_watcher_and_timer_carry_no_context_of_a_request() -> None:
    """The watcher runs in an empty context, below a span that is not recorded."""
    from opentelemetry import trace

    spans = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(LONG)
        await respond(send)

    connection = FakeConnection()

    async def receive() -> Any:
        spans.append(trace.get_current_span())
        return await FakeConnection._receive(connection)

    connection.receive = receive
    tracer_span = trace.NonRecordingSpan(trace.SpanContext(7, 7, False, trace.TraceFlags(1)))
    with trace.use_span(tracer_span):
        server = Server(app, connection)
    await server.task
    assert len(spans) >= 1
    assert not spans[0].get_span_context().trace_flags.sampled
    assert spans[0].get_span_context().trace_id != 7


async def test_watched_requests_cost_no_tick() -> None:
    """A thousand long requests leave the sweep with nothing to look at."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(10)
        await respond(send)

    middleware = TaskGroupMiddleware(app, manager=TaskManager("test"))
    requests = [asyncio.create_task(FakeConnection().run(middleware)) for _ in range(1000)]
    await asyncio.sleep(1)
    sweeper = middleware.settings.sweeper
    assert sweeper is not None
    assert len(sweeper.watched) == 1000
    assert sweeper.timer is None
    await asyncio.gather(*requests)


def test_middleware_serves_one_loop_after_another() -> None:
    """An application object that outlives its loop, as in tests, is watched in the next loop too."""
    from otel_tasks.testing import run

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    middleware = TaskGroupMiddleware(app, manager=TaskManager("test"))

    async def once() -> int | None:
        connection = FakeConnection()
        task = asyncio.create_task(connection.run(middleware))
        await asyncio.sleep(LONG)
        connection.disconnect()
        await task
        return connection.status

    assert [run(once()), run(once())] == [499, 499]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager task factories came with Python 3.12")
async def test_eager_task_factory_is_no_obstacle() -> None:
    """A loop that starts its tasks eagerly can watch as any other."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    factory: Any = asyncio.eager_task_factory  # type: ignore[attr-defined,unused-ignore]  # from 3.12
    asyncio.get_running_loop().set_task_factory(factory)
    server = Server(app)
    await server.hang_up()
    assert server.connection.status == 499
