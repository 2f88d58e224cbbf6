"""FastAPI and Starlette behind the middleware: dependencies, lifespan, BaseHTTPMiddleware."""

from __future__ import annotations

import asyncio
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, get_args

import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Depends,
    FastAPI,
    Request,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.responses import StreamingResponse
from starlette.middleware.base import BaseHTTPMiddleware

from otel_tasks import CancelKind, TaskManager, asgi, create_task, global_task_manager
from otel_tasks import fastapi as fastapi_module
from otel_tasks.fastapi import (
    RequestTasks,
    TaskGroupMiddleware,
    cancel_handler_on_disconnect,
    keep_handler_on_disconnect,
    lifespan,
    make_lifespan,
    request_group,
)
from otel_tasks.testing import FakeConnection, SpanRecorder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

LONG = 0.06


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider)


@pytest.fixture
def app(manager: TaskManager) -> FastAPI:
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    return app


async def hang_up_on(app: FastAPI, connection: FakeConnection, after: float = LONG) -> None:
    task = asyncio.create_task(connection.run(app), name="server")
    await asyncio.sleep(after)
    connection.disconnect()
    await task


async def test_request_tasks_is_the_requests_group(app: FastAPI, manager: TaskManager) -> None:
    """The dependency gives the group, named after the route with its router's prefix."""
    router = APIRouter(prefix="/v1")
    names = []

    @router.get("/report/{id}")
    async def report(id: int, tasks: RequestTasks) -> dict[str, Any]:
        assert tasks is request_group()
        names.append(tasks.name)
        return {"id": await tasks.create_task(asyncio.sleep(0.1, result=id))}

    app.include_router(router, prefix="/api")
    connection = FakeConnection(path="/api/v1/report/7")
    await connection.run(app)
    assert connection.body == b'{"id":7}'
    assert names == ["GET /api/v1/report/{id}"]


async def test_plain_route_names_the_group(app: FastAPI) -> None:
    """A route of the application itself is named by its path."""
    names = []

    @app.get("/items/{id:path}")
    async def item(id: str) -> None:
        names.append(request_group().name)

    await FakeConnection(path="/items/a/b").run(app)
    assert names == ["GET /items/{id}"]


@pytest.mark.parametrize(
    ("name", "dependency"),
    [
        ("RequestTasks", get_args(RequestTasks)[1]),
        ("cancel_handler_on_disconnect", Depends(cancel_handler_on_disconnect)),
        ("keep_handler_on_disconnect", Depends(keep_handler_on_disconnect)),
    ],
)
async def test_without_middleware_a_dependency_says_what_is_missing(name: str, dependency: Any) -> None:
    """The error names the dependency that the route has, and shows the line to add."""
    app = FastAPI()

    @app.get("/", dependencies=[dependency])
    async def route() -> None: ...

    with pytest.raises(RuntimeError) as error:
        await FakeConnection().run(app)
    assert str(error.value) == (
        f"{name} needs the task group of the request; to have one, add the middleware: "
        "app.add_middleware(TaskGroupMiddleware)"
    )


def test_one_import_line_is_enough_for_an_application() -> None:
    """otel_tasks.fastapi also exports everything that otel_tasks.asgi exports, as the same objects."""
    assert set(asgi.__all__) < set(fastapi_module.__all__)
    assert all(getattr(fastapi_module, name) is getattr(asgi, name) for name in asgi.__all__)


async def test_disconnect_stops_handler_and_tasks(app: FastAPI, manager: TaskManager) -> None:
    """With nothing but the middleware added, a GET stops with its tasks."""
    tasks = []

    @app.get("/")
    async def route() -> None:
        tasks.append(create_task(asyncio.sleep(60)))
        await asyncio.sleep(60)

    connection = FakeConnection()
    await hang_up_on(app, connection)
    assert connection.status == 499
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.CLIENT_DISCONNECT
    assert manager.stats().live == 0


@pytest.mark.parametrize(
    ("method", "dependency", "finishes"),
    [
        ("POST", cancel_handler_on_disconnect, False),
        ("GET", keep_handler_on_disconnect, True),
        ("POST", keep_handler_on_disconnect, True),
    ],
)
async def test_route_decides_about_its_handler(
    app: FastAPI, method: str, dependency: Any, finishes: bool
) -> None:
    """A dependency of the route overrides the middleware's option, for this route."""
    finished = []

    async def route() -> None:
        await asyncio.sleep(1)
        finished.append(True)

    app.add_api_route("/", route, methods=[method], dependencies=[Depends(dependency)])
    await hang_up_on(app, FakeConnection(method=method))
    assert bool(finished) == finishes


@pytest.mark.parametrize(
    ("dependency", "expected"),
    [(cancel_handler_on_disconnect, []), (keep_handler_on_disconnect, ["called", "finished"])],
)
async def test_dependency_counts_though_the_client_left_before_it_ran(
    app: FastAPI, dependency: Any, expected: list[str]
) -> None:
    """Behind a slow dependency, the handler of a client that has left is not called, or runs to its end."""
    ran: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(1)

    @app.post("/", dependencies=[Depends(slow), Depends(dependency)])
    async def route() -> None:
        ran.append("called")
        await asyncio.sleep(1)
        ran.append("finished")

    await hang_up_on(app, FakeConnection(method="POST"))
    assert ran == expected


async def test_background_task_of_a_complete_response_runs_on(app: FastAPI) -> None:
    """BackgroundTasks are not touched by the disconnect that follows the response."""
    ran = []

    async def mail() -> None:
        await asyncio.sleep(1)
        ran.append("mail")

    @app.get("/")
    async def route(background: BackgroundTasks) -> None:
        await asyncio.sleep(LONG)
        background.add_task(mail)

    connection = FakeConnection()
    task = asyncio.create_task(connection.run(app))
    await asyncio.sleep(0.2)
    connection.disconnect()
    await task
    assert ran == ["mail"]
    assert connection.status == 200


@pytest.mark.parametrize("version", ["2.3", "2.4"])
async def test_streaming_response_ends_with_its_client(app: FastAPI, version: str) -> None:
    """The generator is closed, on servers with and without an error from send()."""
    closed = []

    async def numbers() -> AsyncGenerator[str]:
        try:
            while True:
                yield "x"
                await asyncio.sleep(0.1)
        finally:
            closed.append(True)

    @app.post("/")
    async def route() -> StreamingResponse:
        return StreamingResponse(numbers())

    connection = FakeConnection(method="POST", spec_version=version)
    await hang_up_on(app, connection, after=1)
    assert connection.body
    # A generator that is dropped is closed by the loop, in a task.
    await asyncio.sleep(1)
    assert closed == [True]


@pytest.mark.parametrize("behind", [False, True])
async def test_is_disconnected_still_works(manager: TaskManager, behind: bool) -> None:
    """Polling sees the disconnect at the first call after it, behind BaseHTTPMiddleware too.

    With BaseHTTPMiddleware between the two it never does, with or without us: Starlette's receive() there
    suspends inside the cancelled scope in which is_disconnected() polls.
    """
    polls = []
    app = FastAPI()

    async def dispatch(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    app.add_middleware(TaskGroupMiddleware, manager=manager, cancel_handler=False)
    if behind:
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)

    @app.get("/")
    async def route(request: Request) -> None:
        polls.append(await request.is_disconnected())
        await asyncio.sleep(1)
        polls.append(await request.is_disconnected())

    await hang_up_on(app, FakeConnection())
    assert polls == [False, True]


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_disconnect_behind_base_http_middleware(
    manager: TaskManager, where: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks and handler end without an error on either side of that middleware."""
    ended = []
    app = FastAPI()

    async def dispatch(request: Request, call_next: Any) -> Any:
        return await call_next(request)

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("task")

    if where == "inside":
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    if where == "outside":
        app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)

    async def route() -> None:
        try:
            await create_task(work())
        finally:
            ended.append("handler")

    app.add_api_route("/", route, methods=[method])
    connection = FakeConnection(method=method)
    await hang_up_on(app, connection)
    assert sorted(ended) == ["handler", "task"]
    assert connection.status == 499
    assert not caplog.records


async def test_body_that_comes_late_is_read_whole(app: FastAPI) -> None:
    """The endpoint gets a body that was read ahead, in part or in whole."""

    @app.post("/")
    async def route(request: Request) -> int:
        await asyncio.sleep(1)
        return len(await request.body())

    connection = FakeConnection(method="POST", body=[bytes(65_536)] * 4)
    await connection.run(app)
    assert connection.body == b"262144"


async def test_upload_that_breaks_off_is_no_error(app: FastAPI, caplog: pytest.LogCaptureFixture) -> None:
    """A client that leaves in the middle of its body ends the request, and nothing is logged."""

    @app.post("/")
    async def route(text: Annotated[str, Body()]) -> None: ...

    connection = FakeConnection(method="POST", body=None, headers={"content-type": "application/json"})
    connection.feed(b'"half')
    await hang_up_on(app, connection)
    assert connection.status == 499
    assert not caplog.records


async def test_failing_handler_gives_its_500_and_plain_exception(app: FastAPI) -> None:
    """No ExceptionGroup, and Starlette's own error response."""

    @app.get("/")
    async def route() -> None:
        create_task(asyncio.sleep(60))
        raise ValueError("mine")

    connection = FakeConnection()
    with pytest.raises(ValueError, match="mine"):
        await connection.run(app)
    assert connection.status == 500


async def test_def_endpoint_reads_the_event_from_its_thread(app: FastAPI) -> None:
    """A thread cannot be stopped, but it can look at the request's cancel event."""
    import time

    looked = []

    @app.post("/")
    def route(tasks: RequestTasks) -> None:
        deadline = time.monotonic() + 20
        while not tasks.cancel_event.is_set() and time.monotonic() < deadline:
            time.sleep(0.005)
        looked.append(tasks.cancel_event.is_set())

    connection = FakeConnection(method="POST")
    await hang_up_on(app, connection, after=0.2)
    assert looked == [True]


async def test_websocket_disconnect_cancels_the_group(app: FastAPI) -> None:
    """The endpoint raises Starlette's exception, which passes on; the tasks get their cause."""
    tasks = []

    @app.websocket("/ws/{room}")
    async def room(websocket: WebSocket) -> None:
        await websocket.accept()
        tasks.append(create_task(asyncio.sleep(60)))
        while True:
            await websocket.receive_text()

    connection = FakeConnection.websocket("/ws/7")
    task = asyncio.create_task(connection.run(app))
    await asyncio.sleep(0.1)
    connection.feed("hello")
    await asyncio.sleep(0.1)
    connection.disconnect(code=1006)
    # As without the middleware: FastAPI's documentation tells users to expect it.
    with pytest.raises(WebSocketDisconnect):
        await task
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.CLIENT_DISCONNECT
    assert tasks[0].group.name == "WS /ws/{room}"


async def test_mounted_app_with_its_own_middleware(app: FastAPI, manager: TaskManager) -> None:
    """The inner of two middlewares passes through, and the request has one group."""
    groups = []
    inner = FastAPI()
    inner.add_middleware(TaskGroupMiddleware, manager=TaskManager("inner"))

    @inner.get("/x/{id}")
    async def route(id: int) -> None:
        groups.append(request_group())

    app.mount("/sub", inner)
    connection = FakeConnection(path="/sub/x/3")
    await connection.run(app)
    assert connection.status == 200
    assert groups[0].manager is manager
    assert groups[0].name == "GET /x/{id}"


async def test_misspelt_middleware_option_is_refused_by_name(manager: TaskManager) -> None:
    """A request, and the lifespan of a server's start, fail with a TypeError that names the option."""
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=manager, detect_afer=1)  # type: ignore[call-arg]  # misspelt
    with pytest.raises(TypeError, match="detect_afer"):
        await FakeConnection().run(app)
    messages: asyncio.Queue[Any] = asyncio.Queue()
    with pytest.raises(TypeError, match="detect_afer"):
        await app({"type": "lifespan", "state": {}}, messages.get, messages.put)


# --- lifespan ------------------------------------------------------------------------------------------


async def test_lifespan_shuts_the_global_manager_down() -> None:
    """Application tasks end with the server, with cause shutdown; the next start opens the manager again."""
    for _ in range(2):
        async with lifespan(FastAPI()):
            task = global_task_manager.create_task(asyncio.sleep(600))
            await asyncio.sleep(1)
        assert task.cancelled()
        assert task.cause is not None
        assert task.cause.kind is CancelKind.SHUTDOWN
    # As the other tests expect it.
    await global_task_manager.__aenter__()


async def test_lifespan_runs_in_an_application(manager: TaskManager) -> None:
    """FastAPI(lifespan=...) takes both forms, through the middleware."""
    app = FastAPI(lifespan=make_lifespan(manager=manager, grace=0))
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    sent = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    messages.put_nowait({"type": "lifespan.startup"})
    server = asyncio.create_task(app({"type": "lifespan", "state": {}}, messages.get, send))
    await asyncio.sleep(0.1)
    task = manager.create_task(asyncio.sleep(600))
    messages.put_nowait({"type": "lifespan.shutdown"})
    await server
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert task.cancelled()


async def test_inner_lifespan_outlives_the_tasks(manager: TaskManager) -> None:
    """The application's own resources last until the last task has ended; its state is passed through."""
    log = []

    @asynccontextmanager
    async def database(app: FastAPI) -> AsyncGenerator[dict[str, str]]:
        log.append("open")
        yield {"database": "here"}
        log.append("close")

    async def work() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            log.append("task ended")

    async with make_lifespan(database, manager=manager, grace=0.5)(FastAPI()) as state:
        manager.create_task(work())
        await asyncio.sleep(0)
    assert state == {"database": "here"}
    assert log == ["open", "task ended", "close"]


async def test_lifespan_keeps_its_bounds(manager: TaskManager) -> None:
    """Grace and timeout are spent once, also with a task that will not stop."""
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    begin = asyncio.get_running_loop().time()
    async with make_lifespan(manager=manager, grace=1, timeout=2)(FastAPI()):
        task = manager.create_task(stubborn())
        await asyncio.sleep(0)
    assert asyncio.get_running_loop().time() - begin == pytest.approx(3)
    release.set()
    await asyncio.wait([task])


async def test_cancelled_lifespan_leaves_the_manager_closed(manager: TaskManager) -> None:
    """A server that is cancelled in its shutdown does not wait; the tasks stay the manager's."""

    async def serve() -> None:
        async with make_lifespan(manager=manager, grace=60)(FastAPI()):
            manager.create_task(asyncio.sleep(600))

    task = asyncio.create_task(serve())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await manager.shutdown(grace=0)
    assert manager.stats().live == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"manager": "default"}, TypeError, "'default'"),
        ({"grace": -1}, ValueError, "grace must be at least 0 seconds, got -1"),
        ({"grace": None}, TypeError, "grace must be seconds as a number, got None: leave it out"),
        ({"grace": True}, TypeError, "grace must be seconds as a number, got True: leave it out"),
        ({"grace": math.inf}, ValueError, "grace must be a finite number of seconds, got inf: the server"),
        ({"timeout": "10s"}, TypeError, "timeout must be seconds as a number"),
        (
            {"request_grace": -1},
            ValueError,
            "request_grace must be at least 0 and finite, in seconds, got -1",
        ),
        ({"request_grace": math.inf}, ValueError, "request_grace must be at least 0 and finite"),
        ({"request_grace": "5"}, TypeError, "request_grace must be a number of seconds, got '5'"),
        ({"request_grace": True}, TypeError, "request_grace must be a number of seconds, got True"),
        (
            {"inner": 5},
            TypeError,
            r"got 5; options are named: write make_lifespan\(manager=manager, grace=5.0\)",
        ),
    ],
)
def test_wrong_lifespan_options_are_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """At once, and not when the server ends."""
    with pytest.raises(error, match=words):
        make_lifespan(**options)


async def test_a_lifespan_that_was_called_is_refused() -> None:
    """The function itself is taken; what its call gives would fail when the server starts."""

    @asynccontextmanager
    async def database(app: FastAPI) -> AsyncGenerator[None]:
        yield

    async with database(FastAPI()):
        pass
    with pytest.raises(TypeError, match="write make_lifespan\\(open_database\\), without a call"):
        make_lifespan(database(FastAPI()))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # refused
