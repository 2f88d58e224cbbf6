"""The generators that make a response's body end in the request when its client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from starlette.responses import StreamingResponse

from otel_tasks import TaskManager, create_task
from otel_tasks._asgi import streams
from otel_tasks.asgi import ClientDisconnected, TaskGroupMiddleware, uncancellable
from otel_tasks.testing import FakeConnection
from tests.hang_ups import CLEANUP, LONG, START, hang_up_on
from tests.helpers import open_groups

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator

    from otel_tasks._asgi.connection import Receive, Scope, Send

METHODS = ["GET", "POST"]
VERSIONS = ["2.3", "2.4"]


class SlowClient(FakeConnection):
    """Its server never returns from sending the first part of a body, even once the client has left."""

    async def send(self, message: Any) -> None:
        """As gunicorn's."""
        await super().send(message)
        if message.get("more_body"):
            await asyncio.get_running_loop().create_future()


@pytest.fixture
def manager() -> TaskManager:
    return TaskManager("test")


class Body:
    """A generator's life: what ended it, in which task, and whether its cleanup came to its end."""

    def __init__(self, log: list[str], name: str = "body") -> None:
        self.log = log
        self.name = name
        self.task: asyncio.Task[Any] | None = None

    @contextlib.asynccontextmanager
    async def cleaned_up(self) -> AsyncIterator[None]:
        """Clean up at the end of the block, with awaits and a task."""
        self.task = asyncio.current_task()
        try:
            yield
        except BaseException as error:
            self.log.append(f"{self.name}: {type(error).__name__}")
            raise
        finally:
            assert asyncio.current_task() is self.task or self.name == "elsewhere"
            for _ in range(3):
                await asyncio.sleep(CLEANUP / 3)
            await create_task(self._step())
            self.log.append(f"{self.name} closed")

    async def _step(self) -> None:
        await asyncio.sleep(CLEANUP)
        self.log.append(f"{self.name} step")

    async def yields(self) -> AsyncGenerator[str]:
        """Suspended at its yield while the server sends."""
        async with self.cleaned_up():
            yield "first"
            yield "second"

    async def waits(self, seconds: float = 60) -> AsyncGenerator[str]:
        """Waits for the second part."""
        async with self.cleaned_up():
            yield "first"
            await asyncio.sleep(seconds)
            yield "second"


def starlette(content: Any) -> Any:
    """Starlette's response, which listens below ASGI 2.4."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await StreamingResponse(content)(scope, receive, send)

    return app


def raw(content: AsyncGenerator[str]) -> Any:
    """Without a framework and a listener."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(dict(START))
        async for part in content:
            await send({"type": "http.response.body", "body": part.encode(), "more_body": True})
        await send({"type": "http.response.body"})

    return app


@pytest.fixture(autouse=True)
def reports(manager: TaskManager, caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """No task is left, and asyncio has logged nothing but what a test puts here."""
    expected: list[str] = []
    yield expected
    logged = [record.getMessage() for record in caplog.get_records("call") if record.name == "asyncio"]
    assert [line for line in logged if not line.startswith(tuple(expected) or "-")] == []
    assert len(logged) == len(expected)
    assert manager.stats().live == 0
    assert not open_groups(manager)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
async def test_generator_at_its_yield_is_closed_by_the_task_that_sends(
    manager: TaskManager, method: str, version: str
) -> None:
    """Its cleanup awaits and starts a task, in the task that ran it, before the request ends."""
    log: list[str] = []
    connection = SlowClient(method=method, spec_version=version)

    await hang_up_on(starlette(Body(log).yields()), manager, connection)

    assert log == ["body: GeneratorExit", "body step", "body closed"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_generator_that_waits_is_cancelled_once(manager: TaskManager, version: str) -> None:
    """Its cleanup may await, though anyio cancels the task around it again and again."""
    log: list[str] = []

    await hang_up_on(starlette(Body(log).waits()), manager, FakeConnection(spec_version=version))

    assert log == ["body: CancelledError", "body step", "body closed"]


async def test_generator_of_a_post_runs_to_its_next_part_and_is_closed(manager: TaskManager) -> None:
    """From ASGI 2.4 on nobody cancels a POST's generator; its next part is refused, and it is closed."""
    log: list[str] = []
    loop = asyncio.get_running_loop()
    connection = FakeConnection(method="POST")
    began = loop.time()

    await hang_up_on(starlette(Body(log).waits(5)), manager, connection)

    assert log == ["body: GeneratorExit", "body step", "body closed"]
    assert 5 <= loop.time() - began < 6


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
async def test_nested_generators_are_closed_from_the_inside(
    manager: TaskManager, method: str, version: str
) -> None:
    """The cleanup of an inner generator finds what the outer one has opened."""
    log: list[str] = []

    async def outer() -> AsyncGenerator[str]:
        async with Body(log, "outer").cleaned_up():
            async for part in Body(log, "inner").yields():
                yield part

    await hang_up_on(starlette(outer()), manager, SlowClient(method=method, spec_version=version))

    assert log == [
        *("inner: GeneratorExit", "inner step", "inner closed"),
        *("outer: GeneratorExit", "outer step", "outer closed"),
    ]


@pytest.mark.parametrize("version", VERSIONS)
async def test_inner_generator_of_one_that_waits_is_closed_before_the_request_ends(
    manager: TaskManager, version: str
) -> None:
    """The cancelled outer generator cannot close it any more: a task of the request does."""
    log: list[str] = []

    async def outer() -> AsyncGenerator[str]:
        async for part in Body(log, "elsewhere").yields():
            yield part
            async with Body(log, "outer").cleaned_up():
                await asyncio.sleep(60)

    await hang_up_on(starlette(outer()), manager, FakeConnection(spec_version=version))

    assert log == [
        *("outer: CancelledError", "outer step", "outer closed"),
        *("elsewhere: GeneratorExit", "elsewhere step", "elsewhere closed"),
    ]


@pytest.mark.parametrize("version", VERSIONS)
async def test_scopes_across_a_yield_end_where_they_began(manager: TaskManager, version: str) -> None:
    """asyncio's timeouts, anyio's scopes and context variables survive, because the task is the same."""
    variable: ContextVar[str] = ContextVar("variable")
    ended = []

    async def body() -> AsyncGenerator[str]:
        token = variable.set("set")
        try:
            async with asyncio.timeout(60), anyio.create_task_group():
                yield "first"
        finally:
            await asyncio.sleep(CLEANUP)
            variable.reset(token)
            ended.append(True)

    await hang_up_on(starlette(body()), manager, SlowClient(spec_version=version))
    assert ended


@pytest.mark.parametrize("method", METHODS)
async def test_end_of_the_grace_does_not_interrupt_the_cleanup(manager: TaskManager, method: str) -> None:
    """A part that is sent in the grace ends the stream; its cleanup may take longer than the grace."""
    log: list[str] = []

    async def body() -> AsyncGenerator[str]:
        async with Body(log).cleaned_up():
            while True:
                yield "part"
                await asyncio.sleep(LONG)

    await hang_up_on(starlette(body()), manager, FakeConnection(method=method), grace=LONG + CLEANUP)

    assert log == ["body: GeneratorExit", "body step", "body closed"]


@pytest.mark.parametrize("method", METHODS)
async def test_application_without_a_framework_is_covered(manager: TaskManager, method: str) -> None:
    """The generator is found by the frame that iterates it, whatever the framework."""
    log: list[str] = []

    await hang_up_on(raw(Body(log).yields()), manager, SlowClient(method=method))

    assert log == ["body: GeneratorExit", "body step", "body closed"]


async def test_task_of_the_request_that_sends_closes_its_generator(manager: TaskManager) -> None:
    """A managed task that streams is treated as the handler's."""
    log: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await create_task(raw(Body(log).yields())(scope, receive, send))

    await hang_up_on(app, manager, SlowClient(method="POST"))

    assert log == ["body: GeneratorExit", "body step", "body closed"]


@pytest.mark.parametrize("grace", [0, CLEANUP / 2])
async def test_error_of_the_server_in_send_closes_the_generator(manager: TaskManager, grace: float) -> None:
    """The server's OSError is one way to learn of the disconnect."""
    log: list[str] = []

    class Refusing(FakeConnection):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if message.get("more_body"):
                raise OSError("gone")

    app = starlette(Body(log).yields())
    await Refusing().run(TaskGroupMiddleware(app, manager=manager, grace=grace))

    assert log == ["body: GeneratorExit", "body step", "body closed"]


async def test_slow_client_closes_nothing(manager: TaskManager) -> None:
    """A client that reads slowly has not left: its response is complete in the end."""
    log: list[str] = []
    connection = FakeConnection()
    connection.pause()
    app = starlette(Body(log).yields())
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager)))
    await asyncio.sleep(600)
    assert not log

    connection.resume()
    await serving
    assert connection.body == b"firstsecond"
    assert log == ["body step", "body closed"]


async def test_generator_that_is_only_referred_to_stays_open(manager: TaskManager) -> None:
    """The owner of a generator in a variable or an attribute may go on with it."""

    async def shared() -> AsyncGenerator[str]:
        while True:
            yield "part"

    source = shared()

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(dict(START))
        mine = source
        part = await anext(mine)
        await send({"type": "http.response.body", "body": part.encode(), "more_body": True})

    await hang_up_on(app, manager, SlowClient())

    assert await anext(source) == "part"
    await source.aclose()


async def test_generator_of_the_server_stays_open(manager: TaskManager) -> None:
    """Frames outside of the middleware are not the request's: a server may iterate its requests."""
    log: list[str] = []

    async def requests() -> AsyncGenerator[FakeConnection]:
        while True:
            yield SlowClient(spec_version="2.4")

    served = []
    async for connection in (source := requests()):
        await hang_up_in_this_task(starlette(Body(log).yields()), manager, connection)
        served.append(connection)
        if len(served) == 2:
            break
    await source.aclose()

    assert log == ["body: GeneratorExit", "body step", "body closed"] * 2


async def hang_up_in_this_task(app: Any, manager: TaskManager, connection: FakeConnection) -> None:
    asyncio.get_running_loop().call_later(LONG, connection.disconnect)
    await connection.run(TaskGroupMiddleware(app, manager=manager))


async def test_generator_that_goes_on_after_its_cancellation_is_cancelled_again(manager: TaskManager) -> None:
    """The shield against anyio ends with the next part that is sent."""
    log: list[str] = []

    async def body() -> AsyncGenerator[str]:
        yield "first"
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        log.append("goes on")
        async with Body(log).cleaned_up():
            while True:
                yield "part"

    await hang_up_on(starlette(body()), manager, FakeConnection(spec_version="2.3"))

    assert log == ["goes on", "body: GeneratorExit", "body step", "body closed"]


async def test_cleanup_of_a_cancelled_generator_is_bounded(manager: TaskManager) -> None:
    """anyio's own cancellation returns after the bound, and ends a cleanup that does not."""
    log: list[str] = []

    async def body() -> AsyncGenerator[str]:
        yield "first"
        try:
            await asyncio.sleep(600)
        finally:
            try:
                await asyncio.sleep(3000)
            finally:
                log.append("cleanup ended")

    began = asyncio.get_running_loop().time()
    await hang_up_on(starlette(body()), manager, FakeConnection(spec_version="2.3"))

    assert log == ["cleanup ended"]
    assert asyncio.get_running_loop().time() - began == pytest.approx(LONG + streams.CLOSE_TIMEOUT, abs=0.1)


@pytest.mark.parametrize("version", VERSIONS)
async def test_cleanup_of_a_closed_generator_is_bounded(
    manager: TaskManager, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A cleanup that does not end is cancelled after the bound, and the log says so."""
    log: list[str] = []

    async def body() -> AsyncGenerator[str]:
        try:
            yield "first"
        finally:
            try:
                await asyncio.sleep(3600)
            finally:
                log.append("cleanup ended")

    began = asyncio.get_running_loop().time()
    with caplog.at_level(logging.WARNING):
        await hang_up_on(starlette(body()), manager, SlowClient(spec_version=version))

    assert log == ["cleanup ended"]
    assert asyncio.get_running_loop().time() - began == pytest.approx(LONG + streams.CLOSE_TIMEOUT, abs=0.1)
    assert "because it still ran 10.0 s after the client had left" in caplog.text


async def test_error_in_the_cleanup_is_reported_as_asyncio_does(
    manager: TaskManager, reports: list[str]
) -> None:
    """It is the application's error, but no response is left for it."""

    async def body() -> AsyncGenerator[str]:
        try:
            yield "first"
        finally:
            raise ValueError("in the cleanup")

    await hang_up_on(starlette(body()), manager, SlowClient())

    reports.append("an error occurred during closing of generator <async_generator object")


async def test_cleanup_that_awaits_a_cancelled_task_is_no_error(manager: TaskManager) -> None:
    """The disconnect has cancelled the task, and the cleanup learns of it."""

    async def body() -> AsyncGenerator[str]:
        task = create_task(asyncio.sleep(3600))
        try:
            yield "first"
        finally:
            await task

    connection = await hang_up_on(starlette(body()), manager, SlowClient())
    assert connection.status == 200


async def test_generator_is_not_closed_in_uncancellable(manager: TaskManager) -> None:
    """A handler that protects its stream goes on with it; what it sends is refused."""
    log: list[str] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(dict(START))
        async with uncancellable():
            async for part in Body(log).yields():
                log.append(part)
                with contextlib.suppress(ClientDisconnected):
                    await send({"type": "http.response.body", "body": part.encode(), "more_body": True})

    await hang_up_on(app, manager, SlowClient())

    assert log == ["first", "second", "body step", "body closed"]


PART = {"type": "http.response.body", "body": b"part", "more_body": True}


@pytest.mark.parametrize("is_refused_by_server", [False, True])
async def test_application_that_catches_the_error_of_send_drains_its_source(
    manager: TaskManager, is_refused_by_server: bool
) -> None:
    """It finishes its work without the client, as without the middleware."""
    parts = []

    async def source() -> AsyncGenerator[int]:
        for number in range(10):
            await asyncio.sleep(LONG / 2)
            yield number

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send(dict(START))
        async for number in source():
            parts.append(number)
            with contextlib.suppress(OSError):
                await send(dict(PART))

    class Refusing(FakeConnection):
        async def send(self, message: Any) -> None:
            await super().send(message)
            if is_refused_by_server and message.get("more_body"):
                raise OSError("gone")

    await hang_up_on(app, manager, Refusing(method="POST"))

    assert parts == list(range(10))


@pytest.mark.parametrize("seconds", [None, 1])
async def test_task_that_sends_to_many_clients_goes_on_without_one(
    manager: TaskManager, seconds: float | None
) -> None:
    """It belongs to the application: the client that leaves ends neither the task nor its source."""
    clients: list[Send] = []

    async def ticks() -> AsyncGenerator[int]:
        for number in range(100):
            await asyncio.sleep(LONG / 2)
            yield number

    async def broadcast() -> int:
        last = 0
        async for number in ticks():
            last = number
            for send in list(clients):
                try:
                    async with asyncio.timeout(seconds):
                        await send(dict(PART))
                except OSError:
                    clients.remove(send)
        return last

    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        clients.append(send)
        while (await receive())["type"] != "http.disconnect":
            pass
        await asyncio.sleep(2)

    sending = asyncio.create_task(broadcast())
    await hang_up_on(app, manager, FakeConnection() if seconds is None else SlowClient())

    assert await sending == 99
    assert not clients


async def test_shutdown_reaches_the_cleanup(manager: TaskManager) -> None:
    """A cancellation that is not the request's is not held off, and propagates."""
    log: list[str] = []

    async def body() -> AsyncGenerator[str]:
        try:
            yield "first"
        finally:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                log.append("shut down")
                raise

    connection, app = SlowClient(spec_version="2.4"), starlette(body())
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager)))
    await asyncio.sleep(LONG)
    connection.disconnect()
    await asyncio.sleep(LONG)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving

    assert log == ["shut down"]


@pytest.mark.real_clock
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("method", METHODS)
async def test_sync_generator_is_closed_in_a_thread(manager: TaskManager, method: str, version: str) -> None:
    """Its cleanup may block: it does not run in the thread of the loop."""
    threads: list[threading.Thread] = []

    def body() -> Iterator[str]:
        try:
            yield "first"
            yield "second"
        finally:
            threads.append(threading.current_thread())

    await hang_up_on(starlette(body()), manager, SlowClient(method=method, spec_version=version))

    [thread] = threads
    assert thread is not threading.main_thread()


@pytest.mark.real_clock
@pytest.mark.parametrize("version", VERSIONS)
async def test_sync_generator_that_works_in_its_thread_is_closed_after_it(
    manager: TaskManager, version: str
) -> None:
    """A thread cannot be stopped: the generator runs to its next yield, and is closed before the end."""
    log: list[str] = []
    goes_on = threading.Event()

    def body() -> Iterator[str]:
        try:
            yield "first"
            goes_on.wait(60)
            yield "second"
        finally:
            log.append(threading.current_thread().name)

    asyncio.get_running_loop().call_later(2 * LONG, goes_on.set)
    await hang_up_on(starlette(body()), manager, FakeConnection(spec_version=version))

    assert len(log) == 1
    assert log != [threading.main_thread().name]
