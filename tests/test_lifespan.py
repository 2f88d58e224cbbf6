"""Lifespans: the middleware alone, with an application's own, nested, failing, and in several loops."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from otel_tasks import (
    CancelKind,
    ManagedTask,
    ManagerClosedError,
    TaskManager,
    create_task_threadsafe,
    current_cancel_event,
    global_task_manager,
)
from otel_tasks._asgi.lifespan import _runs
from otel_tasks.asgi import TaskGroupMiddleware, request_group
from otel_tasks.fastapi import RequestTasks, lifespan, make_lifespan
from otel_tasks.testing import FakeConnection, run
from tests.helpers import give, ignore_cancels, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from contextlib import AbstractAsyncContextManager

    from otel_tasks._asgi.connection import Message, Receive, Scope, Send
    from otel_tasks._asgi.lifespan import App

COMPLETE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.fixture
def manager() -> TaskManager:
    return TaskManager("test")


@pytest.fixture(autouse=True)
def _every_run_ends() -> Generator[None]:
    yield
    assert not [run for run in _runs if not run.loop.is_closed()]


class Server:
    """Drives an application's lifespan as a server does."""

    def __init__(self, app: App, sent: list[str] | None = None) -> None:
        self._app = app
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self.sent = [] if sent is None else sent
        self.task: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        self.sent.append(message["type"])

    async def start(self) -> None:
        self._messages.put_nowait({"type": "lifespan.startup"})
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self.task = asyncio.create_task(self._run(scope))
        await settle()

    async def _run(self, scope: Scope) -> None:
        await self._app(scope, self._messages.get, self.send)

    async def stop(self) -> None:
        assert self.task is not None
        self._messages.put_nowait({"type": "lifespan.shutdown"})
        await self.task

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


def served(manager: TaskManager | None, app: App | None = None) -> Server:
    return Server(TaskGroupMiddleware(FastAPI() if app is None else app, manager=manager))


def app_with(
    own: Callable[[FastAPI], AbstractAsyncContextManager[Any]], manager: TaskManager, **options: Any
) -> FastAPI:
    app = FastAPI(lifespan=own, **options)
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    return app


class Noted(list[str]):
    """Notes in which order things end."""

    @asynccontextmanager
    async def own(self, app: FastAPI) -> AsyncGenerator[None]:
        yield
        self.append("application closed")

    async def work(self) -> None:
        try:
            await rest()
        finally:
            self.append("task ended")


# -- the middleware alone ------------------------------------------------------------------------


async def test_middleware_shuts_its_manager_down(manager: TaskManager) -> None:
    """After the application's own shutdown, before the server learns of it, with cause `shutdown`."""
    noted = Noted()
    async with Server(app_with(noted.own, manager), noted):
        task = manager.create_task(noted.work(), group="outbox")
        await settle()
    assert kind_of(task) is CancelKind.SHUTDOWN
    assert noted == [COMPLETE[0], "application closed", "task ended", COMPLETE[1]]


async def test_complete_is_sent_after_the_last_task(manager: TaskManager) -> None:
    """The server gets `lifespan.shutdown.complete` after the tasks have ended."""
    server = served(manager)
    await server.start()
    task = manager.create_task(asyncio.sleep(3, "sent"), group="outbox")
    begin = now()
    stop = asyncio.create_task(server.stop())
    await asyncio.sleep(2.9)
    assert server.sent == COMPLETE[:1]
    await stop
    assert server.sent == COMPLETE
    assert now() - begin == pytest.approx(3)
    assert task.result() == "sent"


async def test_middleware_has_the_bounds_of_the_lifespan(manager: TaskManager) -> None:
    """A task that will not stop holds the server for grace and timeout, once."""
    begin = now()
    async with served(manager):
        task = manager.create_task(ignore_cancels(100))
        await settle()
    assert now() - begin == pytest.approx(15.0)
    await asyncio.wait([task])


async def test_tasks_are_refused_after_the_end(manager: TaskManager) -> None:
    """The message names the middleware."""
    async with served(manager):
        pass
    with pytest.raises(
        ManagerClosedError,
        match="'test' was shut down by TaskGroupMiddleware at the end of the application's lifespan and",
    ):
        manager.create_task(give(1))


async def test_the_next_lifespan_opens_the_manager_again(manager: TaskManager) -> None:
    """Two runs of an application in one loop, one after the other, both have their manager."""
    for _ in range(2):
        async with served(manager):
            assert await manager.create_task(give(1)) == 1


async def test_startup_may_create_tasks(manager: TaskManager) -> None:
    """The manager is open before the application starts, also after an earlier shutdown."""
    await manager.shutdown()

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        tasks.append(manager.create_task(rest()))
        yield

    tasks: list[ManagedTask[None]] = []
    async with Server(app_with(own, manager)):
        assert not tasks[0].done()
    assert kind_of(tasks[0]) is CancelKind.SHUTDOWN


async def test_manager_that_was_shut_down_is_left_alone(manager: TaskManager) -> None:
    """An application that shuts the manager down itself does not wait for stubborn tasks again."""

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        yield
        await manager.shutdown(grace=1, timeout=1)

    begin = now()
    async with Server(app_with(own, manager)):
        task = manager.create_task(ignore_cancels(10))
        await settle()
    assert now() - begin == pytest.approx(2)
    with pytest.raises(
        ManagerClosedError, match=r"shut down by shutdown\(\) in .*own tests/test_lifespan\.py"
    ):
        manager.create_task(give(1))
    await asyncio.wait([task])


# -- with a lifespan of otel_tasks.fastapi --------------------------------------------------------


async def test_lifespan_acts_before_the_middleware(manager: TaskManager) -> None:
    """Behind the middleware, too, the tasks end while the application's resources are there."""
    noted = Noted()
    server = Server(app_with(make_lifespan(noted.own, manager=manager), manager, title="Shop"))
    async with server:
        manager.create_task(noted.work())
        await settle()
    assert noted == ["task ended", "application closed"]
    assert server.sent == COMPLETE
    with pytest.raises(
        ManagerClosedError, match="was shut down by the lifespan of app 'Shop' and takes no new"
    ):
        manager.create_task(give(1))


async def test_bounds_are_spent_once(manager: TaskManager) -> None:
    """The middleware does not wait for what the lifespan has waited for."""
    begin = now()
    async with Server(app_with(make_lifespan(manager=manager, grace=1, timeout=2), manager)):
        task = manager.create_task(ignore_cancels(100))
        await settle()
    assert now() - begin == pytest.approx(3)
    await asyncio.wait([task])


async def test_lifespan_of_another_manager_leaves_ours_to_the_middleware(manager: TaskManager) -> None:
    """Each manager is shut down once, by whatever uses it."""
    other = TaskManager("other")
    async with Server(app_with(make_lifespan(manager=other), manager)):
        tasks = [manager.create_task(rest()), other.create_task(rest())]
        await settle()
    assert [kind_of(task) for task in tasks] == [CancelKind.SHUTDOWN] * 2


async def test_nested_lifespans_of_one_manager_end_with_the_outer(manager: TaskManager) -> None:
    """A lifespan inside another one does not end what the outer one still uses."""

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        async with make_lifespan(manager=manager)(app), make_lifespan(manager=manager)(app):
            yield
        assert task.done()

    @asynccontextmanager
    async def inner_only(app: FastAPI) -> AsyncGenerator[None]:
        async with make_lifespan(manager=manager)(app):
            async with make_lifespan(manager=manager)(app):
                pass
            yield

    async with Server(app_with(own, manager)):
        task = manager.create_task(rest())
        await settle()
    async with Server(app_with(inner_only, manager)):
        assert await manager.create_task(give(1)) == 1


async def test_application_without_a_title_is_not_named(manager: TaskManager) -> None:
    """A lifespan of an application that is not FastAPI's names no application."""
    app: Any = object()
    async with make_lifespan(manager=manager)(app):
        pass
    with pytest.raises(ManagerClosedError, match="was shut down by the application's lifespan and takes"):
        manager.create_task(give(1))


# -- applications that behave otherwise ------------------------------------------------------------


class Unsupported(Exception):
    pass


async def raises_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    raise Unsupported


async def returns_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    return


async def raises_when_told(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    raise Unsupported


@pytest.mark.parametrize("app", [raises_at_once, returns_at_once, raises_when_told])
async def test_application_without_lifespan_support(app: App, manager: TaskManager) -> None:
    """It raises or returns as without the middleware, and nothing is shut down."""
    task = manager.create_task(rest())
    server = served(manager, app)
    await server.start()
    assert server.task is not None
    assert server.sent == []
    await asyncio.wait([server.task])
    error = server.task.exception()
    assert error is None if app is returns_at_once else isinstance(error, Unsupported)
    assert await manager.create_task(give(1)) == 1
    assert not task.done()
    await manager.shutdown(0)


async def test_failed_shutdown_shuts_the_manager_down(manager: TaskManager) -> None:
    """`lifespan.shutdown.failed` is forwarded after the shutdown of the manager, and the error is raised."""

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        yield
        raise Unsupported

    server = Server(app_with(own, manager))
    with pytest.raises(Unsupported):
        async with server:
            task = manager.create_task(rest())
    assert server.sent == ["lifespan.startup.complete", "lifespan.shutdown.failed"]
    assert kind_of(task) is CancelKind.SHUTDOWN


async def test_failed_startup_shuts_the_manager_down(manager: TaskManager) -> None:
    """Tasks that the startup created end before `lifespan.startup.failed` ends the server."""
    tasks: list[ManagedTask[None]] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        tasks.append(manager.create_task(rest()))
        raise Unsupported
        yield

    server = Server(app_with(own, manager))
    await server.start()
    assert server.task is not None
    await asyncio.wait([server.task])
    assert isinstance(server.task.exception(), Unsupported)
    assert server.sent == ["lifespan.startup.failed"]
    assert kind_of(tasks[0]) is CancelKind.SHUTDOWN


async def started(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()


async def ends_without_a_word(scope: Scope, receive: Receive, send: Send) -> None:
    await started(receive, send)


async def raises_at_the_end(scope: Scope, receive: Receive, send: Send) -> None:
    await started(receive, send)
    raise Unsupported


@pytest.mark.parametrize("app", [ends_without_a_word, raises_at_the_end])
async def test_application_that_ends_without_a_message(app: App, manager: TaskManager) -> None:
    """The manager is shut down even if the application never confirms its shutdown."""
    server = served(manager, app)
    await server.start()
    task = manager.create_task(rest())
    if app is raises_at_the_end:
        with pytest.raises(Unsupported):
            await server.stop()
    else:
        await server.stop()
    assert kind_of(task) is CancelKind.SHUTDOWN


async def test_cancelled_lifespan_shuts_the_manager_down(manager: TaskManager) -> None:
    """A server that cancels the lifespan's task instead of ending it gets its cancellation back."""
    server = served(manager)
    await server.start()
    assert server.task is not None
    task = manager.create_task(rest())
    server.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server.task
    assert kind_of(task) is CancelKind.SHUTDOWN


async def test_receive_that_is_no_coroutine_is_awaited(manager: TaskManager) -> None:
    """A server may give a future instead of a coroutine."""
    loop = asyncio.get_running_loop()
    told: list[str] = []

    def receive() -> asyncio.Future[Message]:
        future: asyncio.Future[Message] = loop.create_future()
        future.set_result({"type": ("lifespan.shutdown" if told else "lifespan.startup")})
        return future

    async def send(message: Message) -> None:
        told.append(message["type"])

    app: Any = TaskGroupMiddleware(FastAPI(), manager=manager)
    await app({"type": "lifespan", "state": {}}, receive, send)
    assert told == COMPLETE


# -- several middlewares, several applications -------------------------------------------------------


async def test_outermost_of_two_middlewares_acts_for_both(manager: TaskManager) -> None:
    """Two middlewares with different managers end both at the same time, within the bounds of one."""
    other = TaskManager("other")
    app = TaskGroupMiddleware(TaskGroupMiddleware(FastAPI(), manager=other), manager=manager)
    begin = now()
    async with Server(app):
        tasks = [manager.create_task(ignore_cancels(100)), other.create_task(ignore_cancels(100))]
        await settle()
    assert now() - begin == pytest.approx(15.0)
    assert [kind_of(task) for task in tasks] == [CancelKind.SHUTDOWN] * 2
    await asyncio.wait(tasks)


async def test_two_middlewares_of_one_manager_shut_it_down_once(manager: TaskManager) -> None:
    """The inner one of two with the same manager has nothing to do."""
    app = TaskGroupMiddleware(TaskGroupMiddleware(FastAPI(), manager=manager), manager=manager)
    begin = now()
    async with Server(app):
        task = manager.create_task(ignore_cancels(100))
        await settle()
    assert now() - begin == pytest.approx(15.0)
    await asyncio.wait([task])


async def test_application_inside_another_belongs_to_its_run(manager: TaskManager) -> None:
    """A mounted application whose lifespan runs in that of the outer one ends with the outer one."""
    other = TaskManager("other")

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncGenerator[None]:
        async with served(manager), served(other):
            inner.append(other.create_task(rest()))
            yield
        # The inner servers have stopped, and the outer one has not.
        assert not inner[0].done()
        assert not task.done()

    inner: list[ManagedTask[None]] = []
    async with Server(app_with(own, manager)):
        task = manager.create_task(rest())
        await settle()
    assert kind_of(task) is kind_of(inner[0]) is CancelKind.SHUTDOWN


RUNS: list[Callable[[TaskManager], Any]] = [
    served,
    lambda manager: Server(FastAPI(lifespan=make_lifespan(manager=manager))),
    lambda manager: Server(app_with(make_lifespan(manager=manager), manager)),
]


@pytest.mark.parametrize("first", RUNS)
@pytest.mark.parametrize("second", RUNS)
async def test_last_of_two_applications_shuts_their_manager_down(
    first: Callable[[TaskManager], Server], second: Callable[[TaskManager], Server], manager: TaskManager
) -> None:
    """Two applications in one loop share a manager; the first one to end leaves it to the other."""
    one, two = first(manager), second(manager)
    await one.start()
    await two.start()
    task = manager.create_task(rest())
    await one.stop()
    assert not task.done()
    assert await manager.create_task(give(1)) == 1
    await two.stop()
    assert kind_of(task) is CancelKind.SHUTDOWN


# -- several loops -----------------------------------------------------------------------------------


def test_shutdown_belongs_to_its_loop(manager: TaskManager) -> None:
    """A manager that was shut down in one loop is open in the next, with a fresh cancel event."""

    async def shut_down() -> None:
        await manager.create_task(give(1), group="mail")
        mail = manager.get_group("mail")
        assert not mail.cancel_event.is_set()
        await manager.shutdown()
        assert manager.get_group("root").cancel_event.is_set()
        with pytest.raises(ManagerClosedError):
            manager.create_task(give(1))

    async def use() -> None:
        assert not manager.get_group("root").cancel_event.is_set()
        assert not manager.get_group("mail").cancel_event.is_set()
        assert await manager.create_task(give(1), group="mail") == 1
        async with manager.group("load") as group:
            assert await group.create_task(give(2)) == 2

    run(shut_down())
    run(use())
    run(shut_down())
    run(use())


def test_loop_that_has_shut_down_stays_so(manager: TaskManager) -> None:
    """A manager that another loop has used meanwhile is still shut down where it was."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(manager.shutdown())
    assert asyncio.run(created(manager)) == 1
    with pytest.raises(ManagerClosedError, match="was shut down by shutdown"):
        loop.run_until_complete(created(manager))
    assert manager.get_group("root").cancel_event.is_set()
    loop.run_until_complete(manager.__aenter__())
    assert loop.run_until_complete(created(manager)) == 1
    assert not manager.get_group("root").cancel_event.is_set()
    loop.close()


async def created(manager: TaskManager) -> int:
    return await manager.create_task(give(1))


def test_global_cancel_event_of_a_new_loop_is_not_set() -> None:
    """Outside of tasks, `current_cancel_event()` is that of the loop that runs."""
    run(global_task_manager.shutdown(0))

    async def look() -> bool:
        return current_cancel_event().is_set()

    assert not run(look())


def test_group_of_a_request_in_a_new_loop_is_open(manager: TaskManager) -> None:
    """A request may make its group before any task has bound the manager to the new loop."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        group = request_group()
        assert not group.cancel_event.is_set()
        assert await group.create_task(give(1)) == 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def request() -> int | None:
        connection = FakeConnection()
        await connection.run(TaskGroupMiddleware(app, manager=manager))
        return connection.status

    for _ in range(2):
        assert run(request()) == 200
        run(manager.shutdown())


@pytest.mark.real_clock
@pytest.mark.parametrize("shut_down_before", [False, True])
def test_thread_of_a_request_makes_the_first_task(shut_down_before: bool, manager: TaskManager) -> None:
    """A `def` handler may hand over the first task that a manager has in a loop."""
    if shut_down_before:
        run(manager.shutdown())

    def handler() -> int:
        return create_task_threadsafe(give(7)).result(10)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert await asyncio.to_thread(handler) == 7
        task = manager.create_task(rest())
        await manager.cancel_task(task.name)
        assert kind_of(task) is CancelKind.EXPLICIT
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def request() -> int | None:
        connection = FakeConnection()
        await connection.run(TaskGroupMiddleware(app, manager=manager))
        return connection.status

    assert asyncio.run(request()) == 200
    assert manager._ledger.home.thread == threading.get_ident()


@pytest.mark.real_clock
async def test_lifespan_of_another_loop_does_not_touch_the_manager(manager: TaskManager) -> None:
    """A server in a thread, whose middleware names a manager that is at work here, starts and ends."""
    task = manager.create_task(rest())

    async def serve() -> list[str]:
        async with served(manager) as server:
            pass
        return server.sent

    assert await asyncio.to_thread(asyncio.run, serve()) == COMPLETE
    assert not task.done()
    assert await manager.create_task(give(1)) == 1
    await manager.shutdown(0)


def test_abandoned_lifespan_holds_nothing(manager: TaskManager) -> None:
    """A lifespan whose loop was closed under it does not keep later ones from shutting down."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await asyncio.Event().wait()

    async def start() -> None:
        await served(manager, app).start()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(start())
    loop.close()
    gc.collect()

    async def use() -> ManagedTask[None]:
        async with served(manager):
            task = manager.create_task(rest())
            await settle()
        return task

    assert kind_of(run(use())) is CancelKind.SHUTDOWN


# -- Starlette's TestClient ----------------------------------------------------------------------------


def client_of(app: FastAPI) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fastapi.testclient import TestClient

        return TestClient(app, raise_server_exceptions=False)


def an_app(*, own: bool) -> FastAPI:
    app = FastAPI(lifespan=lifespan) if own else FastAPI()
    app.add_middleware(TaskGroupMiddleware)

    @app.get("/")
    async def handler(tasks: RequestTasks) -> int:
        return await tasks.create_task(give(1))

    @app.get("/thread")
    def in_thread() -> int:
        return create_task_threadsafe(give(1)).result(10)

    return app


def without_lifespan(app: FastAPI) -> list[int]:
    client = client_of(app)
    return [client.get(path).status_code for path in ("/", "/thread")]


def with_lifespan(app: FastAPI) -> list[int]:
    with client_of(app) as client:
        return [client.get(path).status_code for path in ("/", "/thread")]


def in_asyncio_run(app: FastAPI) -> list[int]:
    async def request(path: str) -> int | None:
        connection = FakeConnection(path=path)
        await connection.run(app)
        return connection.status

    return [asyncio.run(request(path)) or 0 for path in ("/", "/thread")]


def in_one_loop_after_the_other(app: FastAPI) -> list[int]:
    """As a test runner does that gives each test a loop, and runs fixtures in it before and after."""
    found = []
    for _ in range(2):
        with asyncio.Runner() as runner:
            server = Server(app)
            runner.run(server.start())
            connection = FakeConnection()
            runner.run(connection.run(app))
            runner.run(server.stop())
        found.append(connection.status or 0)
    return found


WAYS = [without_lifespan, with_lifespan, in_asyncio_run, in_one_loop_after_the_other]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("second", WAYS)
def test_applications_are_tested_in_any_order(
    first: Callable[[FastAPI], list[int]], second: Callable[[FastAPI], list[int]], own: bool
) -> None:
    """Two applications share the global manager, with and without a lifespan; no test shuts out the next."""
    app, other = an_app(own=own), an_app(own=True)
    for way in (first, second, first):
        assert way(app) == [200, 200]
        assert way(other) == [200, 200]


def test_two_clients_at_a_time() -> None:
    """Two clients that are open at the same time, each with its loop, take turns with the global manager."""
    with client_of(an_app(own=True)) as one, client_of(an_app(own=False)) as two:
        for client in (one, two, one):
            assert client.get("/").status_code == 200
    assert without_lifespan(an_app(own=False)) == [200, 200]


def test_request_after_its_lifespan_says_why(manager: TaskManager) -> None:
    """In the loop of a lifespan that has ended, the error names it."""

    async def use() -> None:
        app = FastAPI(title="Shop", lifespan=lifespan)
        async with Server(app):
            pass
        with pytest.raises(
            ManagerClosedError,
            match=r"^manager 'default' was shut down by the lifespan of app 'Shop' and takes no new tasks "
            r"in this event loop: create them before that, or open it again with async with$",
        ):
            global_task_manager.create_task(give(1))

    run(use())


async def test_error_names_the_call_that_shut_the_manager_down(manager: TaskManager) -> None:
    """The message names `shutdown()` with the line of the call, or the block with its line."""

    async def stop() -> None:
        await manager.shutdown()

    await asyncio.create_task(stop())
    with pytest.raises(
        ManagerClosedError, match=r"by shutdown\(\) in .*\.stop tests/test_lifespan\.py:\d+ and takes"
    ):
        manager.create_task(give(1))
    async with manager:
        pass
    with pytest.raises(
        ManagerClosedError, match=r"by the end of its async with block in test_error_\S+ tests/"
    ):
        manager.create_task(give(1))
    async with manager:
        await asyncio.create_task(manager.shutdown())
    with pytest.raises(ManagerClosedError, match=r"was shut down by shutdown\(\) and takes"):
        manager.create_task(give(1))
