"""The server's stop: its signal, the grace of the open requests, and how they are cut short."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from otel_tasks import CancelKind, TaskManager, create_task
from otel_tasks._asgi.server_stop import _ServerStop, cut_requests_on_stop
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from otel_tasks.fastapi import make_lifespan
from otel_tasks.testing import FakeConnection
from tests.helpers import ignore_cancels, rest, settle
from tests.helpers import now as clock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from otel_tasks._asgi.connection import Receive, Scope, Send

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Server:
    """A server's handlers of signals: the signals that they got."""

    def __init__(self) -> None:
        self.should_exit = False
        self.signals: list[int] = []

    def handle_exit(self, signum: int, _: object) -> None:
        self.should_exit = True
        self.signals.append(signum)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that handles SIGINT and SIGTERM as uvicorn does; its handlers are there again at the end."""
    server = Server()
    before = {signum: signal.signal(signum, server.handle_exit) for signum in SIGNALS}
    yield server
    after = [signal.getsignal(signum) for signum in SIGNALS]
    for signum, handler in before.items():
        signal.signal(signum, handler)
    assert after == [server.handle_exit] * 2


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    yield
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


@pytest.fixture
def manager() -> TaskManager:
    return TaskManager("test")


def now() -> float:
    """Seconds since the test began: its virtual clock starts at 1000."""
    return clock() - 1000.0


async def slow(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that never answers."""
    await rest()


async def fast(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers after a second."""
    await asyncio.sleep(1.0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def begin(app: Any, manager: TaskManager, **options: Any) -> tuple[FakeConnection, asyncio.Task[None]]:
    """Start a request to ``app`` behind a middleware of its own."""
    connection = FakeConnection(**options)
    return connection, asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager)))


@pytest.mark.parametrize("signum", SIGNALS)
async def test_signal_reaches_the_server_and_then_ends_the_requests(
    server: Server, manager: TaskManager, signum: int
) -> None:
    """The server's handler runs at the signal; requests have their grace from then on, and get a 503."""
    async with make_lifespan(manager=manager, request_grace=2.0)(FastAPI()):
        connection, call = begin(slow, manager)
        await asyncio.sleep(1.0)
        signal.raise_signal(signum)
        assert server.signals == [signum]
        await asyncio.sleep(1.9)
        assert connection.sent == []
        await call
        assert now() == pytest.approx(3.0)
        assert connection.status == 503
        assert connection.headers["connection"] == "close"


async def test_request_that_ends_within_the_grace_is_served(server: Server, manager: TaskManager) -> None:
    """So is one that only arrives after the signal."""
    async with make_lifespan(manager=manager, request_grace=2.0)(FastAPI()):
        early, first = begin(fast, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        late, second = begin(fast, manager)
        await asyncio.gather(first, second)
        await asyncio.sleep(5.0)
    assert (early.status, late.status) == (200, 200)
    assert (early.body, late.body) == (b"done", b"done")


async def test_second_signal_reaches_the_server_and_gives_no_new_grace(
    server: Server, manager: TaskManager
) -> None:
    """The server forces its exit as it does by itself."""
    async with make_lifespan(manager=manager, request_grace=2.0)(FastAPI()):
        _, call = begin(slow, manager)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(1.5)
        signal.raise_signal(signal.SIGINT)
        await call
        assert now() == pytest.approx(2.0)
    assert server.signals == [signal.SIGTERM, signal.SIGINT]


async def test_no_grace_cuts_at_once(server: Server, manager: TaskManager) -> None:
    """With 0, the signal itself ends the requests."""
    async with make_lifespan(manager=manager, request_grace=0)(FastAPI()):
        connection, call = begin(slow, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
        assert (now(), connection.status) == (0.0, 503)


async def test_default_leaves_the_signals_alone(server: Server, manager: TaskManager) -> None:
    """Without `request_grace`, no handler is installed, and the server decides."""
    async with make_lifespan(manager=manager)(FastAPI()):
        assert signal.getsignal(signal.SIGTERM) == server.handle_exit


async def test_tasks_are_cancelled_with_cause_shutdown(server: Server, manager: TaskManager) -> None:
    """The work ends by the shutdown, whatever `cancel_handler` says, and not by a disconnect."""
    tasks = []
    ends = []

    async def works(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(create_task(rest()))
        try:
            await rest()
        finally:
            ends.append(now())

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection, call = begin(works, manager, method="POST")
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
    assert ends == [1.0]
    assert connection.status == 503
    cause = tasks[0].cause
    assert cause is not None
    assert cause.kind is CancelKind.SHUTDOWN
    assert cause.message == "the server stops, and request_grace=1 s are over"


async def test_stream_is_ended_properly(server: Server, manager: TaskManager) -> None:
    """A response without a declared length gets its last message, so that the server reports no error."""

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.4)

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection, call = begin(stream, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
    assert (connection.status, connection.body, connection.complete) == (200, b"xxx", True)


async def test_websocket_is_closed_with_1012(server: Server, manager: TaskManager) -> None:
    """Its application receives the disconnect, and the client the code for a restart."""
    received = []

    async def chat(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        received.append(await receive())

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection = FakeConnection.websocket()
        call = asyncio.create_task(connection.run(TaskGroupMiddleware(chat, manager=manager)))
        await asyncio.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)
        await call
    assert [(message["type"], message["code"]) for message in received] == [("websocket.disconnect", 1012)]
    assert (connection.sent[-1]["type"], connection.sent[-1]["code"]) == ("websocket.close", 1012)


async def test_background_task_of_a_sent_response_is_cut_too(
    server: Server, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """It belongs to the request, and the server waits for it; nothing more is sent."""
    tasks = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})
        tasks.append(create_task(rest()))
        await rest()

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection, call = begin(app, manager)
        await asyncio.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)
        await call
        assert now() == 1.5
    assert len(connection.sent) == 2
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.SHUTDOWN


async def test_handler_that_ran_on_without_its_client_is_cut_too(
    server: Server, manager: TaskManager
) -> None:
    """A POST that its client has left would hold the server up as well."""
    connection, call = begin(slow, manager, method="POST")
    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        await asyncio.sleep(0.5)
        connection.disconnect()
        await asyncio.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)
        await call
        assert now() == 2.0


async def test_grace_of_the_middleware_is_cut_too(server: Server, manager: TaskManager) -> None:
    """What a disconnect lets run on for a minute does not hold the server up for as long."""
    tasks = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(create_task(rest()))
        await rest()

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection = FakeConnection()
        call = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager, grace=60.0)))
        await asyncio.sleep(0.5)
        connection.disconnect()
        await asyncio.sleep(0.5)
        signal.raise_signal(signal.SIGTERM)
        await call
        assert now() == 2.0
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.CLIENT_DISCONNECT


async def test_shelter_of_a_task_is_waited_for(server: Server, manager: TaskManager) -> None:
    """A task in `uncancellable()` ends its block, also where the request waits for it."""
    ends = []

    async def pays() -> None:
        async with uncancellable():
            await asyncio.sleep(5.0)
            ends.append("paid")
        await rest()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(pays())
        await fast(scope, receive, send)

    async with make_lifespan(manager=manager, request_grace=2.0)(FastAPI()):
        connection = FakeConnection()
        call = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager, on_exit="wait")))
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
        assert now() == 5.0
    assert ends == ["paid"]


async def test_request_that_waits_for_its_tasks_is_cut_too(server: Server, manager: TaskManager) -> None:
    """With `on_exit="wait"`, a request that has returned still holds the server up."""
    tasks = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await fast(scope, receive, send)
        tasks.append(create_task(rest()))

    async with make_lifespan(manager=manager, request_grace=2.0)(FastAPI()):
        middleware = TaskGroupMiddleware(app, manager=manager, on_exit="wait")
        connection = FakeConnection()
        call = asyncio.create_task(connection.run(middleware))
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
        assert now() == 2.0
    assert connection.status == 200
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.SHUTDOWN


async def test_response_without_an_end_is_ended(server: Server, manager: TaskManager) -> None:
    """sse-starlette stops its streams by itself when uvicorn stops, and leaves them without an end."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not server.should_exit:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.4)

    async with make_lifespan(manager=manager, request_grace=5.0)(FastAPI()):
        connection, call = begin(app, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
        assert now() == pytest.approx(0.4)
    assert (connection.body, connection.complete) == (b"x", True)


async def test_uncancellable_block_is_waited_for(server: Server, manager: TaskManager) -> None:
    """The client has its answer at once, and the block its end."""
    ends = []

    async def pays(scope: Scope, receive: Receive, send: Send) -> None:
        async with uncancellable():
            await asyncio.sleep(3.0)
            ends.append("paid")
        ends.append("not reached")

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection, call = begin(pays, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(1.5)
        assert connection.status == 503
        await call
    assert ends == ["paid"]


async def test_every_middleware_of_the_loop_is_cut(server: Server, manager: TaskManager) -> None:
    """The server waits for requests of any manager, and so does a second lifespan with a longer grace."""
    other = TaskManager("other")
    async with (
        make_lifespan(manager=manager, request_grace=1.0)(FastAPI()),
        make_lifespan(manager=other, request_grace=9.0)(FastAPI()),
    ):
        calls = [begin(slow, each)[1] for each in (manager, other)]
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.gather(*calls)
        assert now() == 1.0
    assert server.signals == [signal.SIGTERM]


async def test_request_after_the_grace_is_cut_soon(server: Server, manager: TaskManager) -> None:
    """A connection that the server has kept alive may bring one; it does not hold the server up either."""
    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(1.5)
        connection, call = begin(slow, manager)
        await call
        assert now() == 2.0
    assert connection.status == 503


async def test_log_says_what_was_cut(
    server: Server, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names the routes; without an open request there is none."""
    caplog.set_level(logging.INFO, "otel_tasks")
    async with make_lifespan(manager=manager, request_grace=1.5)(FastAPI()):
        calls = [begin(slow, manager, method=method)[1] for method in ("GET", "POST", "GET")]
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.gather(*calls)
        await asyncio.sleep(30.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the server stops: cancelled what was open after request_grace=1.5 s: 'GET' (2), 'POST'"
    ]


async def test_log_names_at_most_ten_routes(
    server: Server, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A line stays readable, however many routes are open."""
    caplog.set_level(logging.INFO, "otel_tasks")
    async with make_lifespan(manager=manager, request_grace=0)(FastAPI()):
        calls = []
        for number in range(12):
            connection, call = begin(slow, manager)
            connection.scope["route"] = SimpleNamespace(path=f"/{number}")
            calls.append(call)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.gather(*calls)
    assert caplog.records[0].getMessage().endswith("'GET /6', 'GET /7' and 2 more routes")


async def test_log_names_what_does_not_end(
    server: Server, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that swallows its cancellation holds the server up: its route is named, once."""

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        await ignore_cancels(30.0)

    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        _, call = begin(stubborn, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await call
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the server cannot stop: 5 s after their cancellation, requests still run: 'GET'"
    ]


async def test_signal_after_the_lifespan_cuts_nothing(server: Server, manager: TaskManager) -> None:
    """The handlers are the server's again."""
    async with make_lifespan(manager=manager, request_grace=0)(FastAPI()):
        pass
    connection, call = begin(fast, TaskManager())
    signal.raise_signal(signal.SIGTERM)
    await call
    assert connection.status == 200


async def test_lifespan_that_ends_within_the_grace_cuts_nothing(server: Server, manager: TaskManager) -> None:
    """The server's own bound was shorter: it has ended the requests its own way."""
    async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
        connection, call = begin(slow, manager)
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
    await asyncio.sleep(5.0)
    assert connection.sent == []
    call.cancel()
    await asyncio.wait([call])


async def test_signal_without_a_handler_of_the_server_keeps_its_default(manager: TaskManager) -> None:
    """SIGTERM still ends a process whose server does not handle it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        async with make_lifespan(manager=manager, request_grace=1.0)(FastAPI()):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_lifespan_outside_of_the_main_thread_installs_nothing(
    server: Server, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A TestClient's lifespan runs in a thread, where no handler can be set; nothing is logged."""
    handlers = []

    async def serve() -> None:
        async with make_lifespan(manager=TaskManager(), request_grace=1.0)(FastAPI()):
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    thread.join()
    assert handlers == [server.handle_exit]
    assert caplog.records == []


async def test_other_interpreter_installs_nothing(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    """In the main thread of another interpreter, Python refuses handlers."""

    def refuse(*_: object) -> None:
        raise ValueError("signal only works in main thread of the main interpreter")

    monkeypatch.setattr(signal, "signal", refuse)
    async with cut_requests_on_stop(1.0):
        assert signal.getsignal(signal.SIGTERM) == server.handle_exit
    monkeypatch.undo()


async def test_later_handler_stays(server: Server) -> None:
    """A handler on top of ours is not removed, and through it, the server still gets its signal."""
    called = []
    async with cut_requests_on_stop(1.0):
        below: Any = signal.getsignal(signal.SIGTERM)

        def on_top(signum: int, frame: Any) -> None:
            called.append(signum)
            below(signum, frame)

        signal.signal(signal.SIGTERM, on_top)
    signal.raise_signal(signal.SIGTERM)
    assert called == server.signals == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is on_top
    signal.signal(signal.SIGTERM, server.handle_exit)


async def test_signal_on_a_closed_loop_reaches_the_server(server: Server) -> None:
    """A lifespan that never ended leaves a handler that only passes the signal on."""
    loop = asyncio.new_event_loop()
    stop = _ServerStop(loop, 1.0)
    stop.listen()
    loop.close()
    signal.raise_signal(signal.SIGTERM)
    assert server.signals == [signal.SIGTERM]
    stop.end()


async def test_server_is_found_through_its_handler(server: Server) -> None:
    """sse-starlette looks for uvicorn's server there, to end its streams."""
    async with cut_requests_on_stop(1.0):
        handler: Any = signal.getsignal(signal.SIGTERM)
        assert handler.__self__ is server


@pytest.mark.real_clock
async def test_handlers_of_a_loop_still_run() -> None:
    """asyncio's `add_signal_handler`, which granian, gunicorn, and hypercorn use, works below ours."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    try:
        async with cut_requests_on_stop(0.0):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(stopped.wait(), 60.0)
            stopped.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stopped.wait(), 60.0)
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@asynccontextmanager
async def _worker_of_hypercorn(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[threading.Event]:
    event = threading.Event()

    def worker() -> None: ...

    worker.__module__ = "hypercorn.asyncio.run"
    process = SimpleNamespace(_target=worker, _kwargs={"shutdown_event": event})
    monkeypatch.setattr(multiprocessing, "current_process", lambda: process)
    yield event


async def test_event_of_hypercorns_parent_is_the_sign(
    monkeypatch: pytest.MonkeyPatch, server: Server, manager: TaskManager
) -> None:
    """A worker process of hypercorn gets no signal: its parent sets an event, which is looked at."""
    async with (
        _worker_of_hypercorn(monkeypatch) as event,
        make_lifespan(manager=manager, request_grace=1.0)(FastAPI()),
    ):
        assert signal.getsignal(signal.SIGTERM) == server.handle_exit
        connection, call = begin(slow, manager)
        await asyncio.sleep(3.0)
        assert connection.sent == []
        event.set()
        await call
        assert now() == pytest.approx(4.0, abs=0.11)
    assert connection.status == 503
