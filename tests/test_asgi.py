"""A request's work: its group, its handler, its response. The server is FakeConnection."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from contextvars import copy_context
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import CancelKind, GroupClosedError, ManagedTask, TaskManager, create_task, current_group
from otel_tasks.asgi import (
    ClientDisconnected,
    TaskGroupMiddleware,
    request_group,
    set_cancel_handler,
    uncancellable,
)
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.helpers import open_groups

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_tasks._asgi.connection import Receive, Scope, Send

START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"done"}
LONG = 0.06


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


async def respond(send: Send) -> None:
    await send(dict(START))
    await send(dict(BODY))


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    number: int = span.context.span_id
    return number


class Journal(list[str]):
    """Notes what ran and how it ended."""

    async def work(self, name: str, seconds: float = 60) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.append(f"{name} cancelled")
            raise
        self.append(f"{name} finished")
        return name

    def handler(self, body: Callable[[], Awaitable[object]]) -> Any:
        """An application whose handler is ``body``."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await body()
            except asyncio.CancelledError:
                self.append("handler cancelled")
                raise
            await respond(send)
            self.append("handler finished")

        return app


@pytest.fixture
def journal() -> Journal:
    return Journal()


def serve(app: Any, manager: TaskManager, connection: FakeConnection, **options: Any) -> asyncio.Task[None]:
    middleware = TaskGroupMiddleware(app, manager=manager, **options)
    return asyncio.create_task(connection.run(middleware), name="server")


async def hang_up_on(
    app: Any, manager: TaskManager, connection: FakeConnection | None = None, **options: Any
) -> FakeConnection:
    """Let the client leave while the application is at work; returns when the server is through."""
    connection = connection or FakeConnection()
    task = serve(app, manager, connection, **options)
    await asyncio.sleep(LONG)
    connection.disconnect()
    await task
    assert not task.cancelling()
    assert manager.stats().live == 0
    return connection


# --- the group ---------------------------------------------------------------------------------------


async def test_tasks_join_the_request_without_a_parameter(manager: TaskManager, journal: Journal) -> None:
    """create_task() below a request joins its group, from the handler and from its tasks."""
    groups = []

    async def inner() -> None:
        groups.append(create_task(journal.work("deep", 0)).group)

    async def body() -> None:
        await create_task(inner())
        groups.extend([request_group(), current_group()])

    connection = FakeConnection()
    await connection.run(TaskGroupMiddleware(journal.handler(body), manager=manager))
    assert len({group.id for group in groups}) == 1
    assert len(groups) == 3
    assert groups[0].id.startswith("GET#")


async def test_requests_have_groups_of_their_own(manager: TaskManager) -> None:
    """Two requests at once do not share a group, nor does one see the other's disconnect."""
    ended: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        journal = Journal()
        task = request_group().create_task(journal.work(scope["path"], 1), name="work")
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
        ended.extend(journal)
        await respond(send)

    middleware = TaskGroupMiddleware(app, manager=manager)
    leaves, stays = FakeConnection(method="POST", path="/a"), FakeConnection(method="POST", path="/b")
    async with asyncio.TaskGroup() as server:
        server.create_task(leaves.run(middleware))
        server.create_task(stays.run(middleware))
        await asyncio.sleep(LONG)
        leaves.disconnect()
    assert ended == ["/a cancelled", "/b finished"]


async def test_request_without_tasks_makes_no_group(manager: TaskManager) -> None:
    """The group is made on first use."""
    opened = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        opened.append(open_groups(manager))
        request_group()
        opened.append(open_groups(manager))
        await respond(send)

    await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
    assert [len(scopes) for scopes in opened] == [0, 1]
    assert not open_groups(manager)


@pytest.mark.parametrize(
    ("scope", "name"),
    [
        ({}, "GET"),
        ({"route": SimpleNamespace(path="/report/{id}")}, "GET /report/{id}"),
        ({"route": SimpleNamespace(path="/f/{p:path}", path_format="/f/{p}")}, "GET /f/{p}"),
        ({"method": "BREW"}, "HTTP"),
        ({"method": "BREW", "route": SimpleNamespace(path="/pot")}, "HTTP /pot"),
        ({"route": object()}, "GET"),
        ({"route": SimpleNamespace(path=7)}, "GET"),
    ],
)
async def test_group_is_named_after_the_route(manager: TaskManager, scope: dict[str, Any], name: str) -> None:
    """Method and template, once routing has matched; never the path nor a method that anyone may make up."""
    names = []

    async def app(received: Scope, receive: Receive, send: Send) -> None:
        group = request_group()
        names.append(group.name)
        received.update(scope)
        names.append(group.name)
        await respond(send)

    connection = FakeConnection(path="/secret/4711")
    await connection.run(TaskGroupMiddleware(app, manager=manager))
    assert names == ["GET", name]


async def test_second_middleware_passes_straight_through(manager: TaskManager, journal: Journal) -> None:
    """In a mounted app with a middleware of its own, the outer one's group is the request's."""
    other = TaskManager("inner")
    groups = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        groups.append(request_group())
        await respond(send)

    inner = TaskGroupMiddleware(app, manager=other)
    await FakeConnection().run(TaskGroupMiddleware(inner, manager=manager))
    assert groups[0].manager is manager


async def test_lifespan_is_forwarded(manager: TaskManager) -> None:
    """A scope that is no request reaches the application unchanged, and is no request in there."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        with pytest.raises(RuntimeError) as error:
            request_group()
        assert str(error.value) == (
            "request_group() was called outside of a request; in a request, add the middleware: "
            "app.add_middleware(TaskGroupMiddleware)"
        )

    async def receive() -> Any: ...

    async def send(message: Any) -> None: ...

    scope = {"type": "lifespan"}
    await TaskGroupMiddleware(app, manager=manager)(scope, receive, send)
    assert seen == [scope]
    assert seen[0] is scope
    assert scope == {"type": "lifespan"}


async def test_request_in_a_request_has_its_own_group(manager: TaskManager) -> None:
    """An application called in-process from a handler is its own request, and the outer one continues."""
    groups = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        groups.append(request_group().id)
        await respond(send)

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        groups.append(request_group().id)
        await FakeConnection().run(TaskGroupMiddleware(inner, manager=manager))
        groups.append(request_group().id)
        await respond(send)

    await FakeConnection().run(TaskGroupMiddleware(outer, manager=manager))
    assert groups[0] == groups[2] != groups[1]


async def test_failure_that_no_code_awaits_is_reported_and_no_500(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A failing task of the request's group leaves its siblings and the response alone."""
    journal = Journal()

    async def bad() -> None:
        raise ValueError("supplier")

    async def body() -> None:
        create_task(bad())
        await create_task(journal.work("sibling", 1))

    connection = FakeConnection()
    await connection.run(TaskGroupMiddleware(journal.handler(body), manager=manager))
    assert connection.status == 200
    assert journal == ["sibling finished", "handler finished"]
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_failing_handler_raises_its_plain_exception(manager: TaskManager, journal: Journal) -> None:
    """The application's exception leaves the middleware unchanged, after the group has ended."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(journal.work("task"))
        await asyncio.sleep(0)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
    assert journal == ["task cancelled"]


# --- the client leaves ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "option", "cancelled"),
    [
        ("GET", "safe", True),
        ("HEAD", "safe", True),
        ("OPTIONS", "safe", True),
        ("QUERY", "safe", True),
        ("POST", "safe", False),
        ("DELETE", "safe", False),
        ("POST", True, True),
        ("GET", False, False),
        ("POST", lambda scope: scope["path"] == "/", True),
        ("GET", lambda scope: scope["path"] != "/", False),
        ("POST", "safe, POST /", True),
        ("GET", "all, !GET /", False),
    ],
)
async def test_cancel_handler_decides_about_the_handler(
    manager: TaskManager, journal: Journal, method: str, option: Any, cancelled: bool
) -> None:
    """Tasks are cancelled whatever the method; the handler as the option says."""

    async def body() -> None:
        create_task(journal.work("task"))
        await asyncio.sleep(1)

    await hang_up_on(journal.handler(body), manager, FakeConnection(method=method), cancel_handler=option)
    assert sorted(journal) == [f"handler {'cancelled' if cancelled else 'finished'}", "task cancelled"]


async def test_raising_cancel_handler_is_logged_and_means_no(
    manager: TaskManager, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """A function of the scope that raises breaks nothing."""

    def rule(scope: Scope) -> bool:
        raise KeyError("tenant")

    await hang_up_on(journal.handler(lambda: asyncio.sleep(1)), manager, cancel_handler=rule)
    assert journal == ["handler finished"]
    assert "cancel_handler" in caplog.text


@pytest.mark.parametrize(("method", "decision"), [("POST", True), ("GET", False)])
async def test_route_overrides_cancel_handler(
    manager: TaskManager, journal: Journal, method: str, decision: bool
) -> None:
    """set_cancel_handler() decides for the one request."""

    async def body() -> None:
        set_cancel_handler(decision)
        await asyncio.sleep(1)

    await hang_up_on(journal.handler(body), manager, FakeConnection(method=method))
    assert journal == [f"handler {'cancelled' if decision else 'finished'}"]


@pytest.mark.parametrize(
    ("decision", "grace", "cancelled_at"), [(True, 0.0, 1.0), (True, 2.0, 2.0 + LONG), (False, 0.0, None)]
)
async def test_decision_after_the_disconnect_counts(
    manager: TaskManager, decision: bool, grace: float, cancelled_at: float | None
) -> None:
    """True cancels the handler then, or when the grace is over; False lets it finish."""
    ended: list[tuple[str, float]] = []

    async def body() -> None:
        await asyncio.sleep(1)
        set_cancel_handler(decision)
        try:
            await asyncio.sleep(5)
            ended.append(("finished", clock()))
        except asyncio.CancelledError:
            ended.append(("cancelled", clock()))
            raise

    clock = asyncio.get_running_loop().time
    began = clock()
    connection = await hang_up_on(
        Journal().handler(body), manager, FakeConnection(method="POST"), grace=grace
    )
    outcome = ("finished", 6.0) if cancelled_at is None else ("cancelled", cancelled_at)
    assert [(how, round(at - began, 3)) for how, at in ended] == [outcome]
    assert connection.status == 499


async def test_decision_of_a_handler_that_was_cancelled_changes_nothing(
    manager: TaskManager, journal: Journal
) -> None:
    """In the cleanup of a cancelled handler, neither decision cancels it again."""

    async def body() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            for decision in (False, True):
                set_cancel_handler(decision)
                await journal.work(f"cleanup {decision}", 1)

    await hang_up_on(journal.handler(body), manager)
    assert journal == ["cleanup False finished", "cleanup True finished", "handler cancelled"]


async def test_decision_in_a_thread_after_the_disconnect_counts(
    manager: TaskManager, journal: Journal
) -> None:
    """The handler is cancelled in its own loop, once the thread that it waits for has returned."""

    async def body() -> None:
        await asyncio.sleep(1)
        await asyncio.to_thread(set_cancel_handler, True)
        await asyncio.sleep(1)

    await hang_up_on(journal.handler(body), manager, FakeConnection(method="POST"))
    assert journal == ["handler cancelled"]


async def test_decision_in_uncancellable_after_the_disconnect_counts_at_its_end(
    manager: TaskManager, journal: Journal
) -> None:
    """The block is not interrupted, and what follows it does not run."""

    async def body() -> None:
        await asyncio.sleep(1)
        async with uncancellable():
            set_cancel_handler(True)
            await journal.work("protected", 1)
        journal.append("not reached")

    await hang_up_on(journal.handler(body), manager, FakeConnection(method="POST"))
    assert journal == ["protected finished", "handler cancelled"]


async def test_decision_after_a_websocket_disconnect_counts(manager: TaskManager, journal: Journal) -> None:
    """A handler that does not listen is cancelled then."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await journal.work("before", 1)
        set_cancel_handler(True)
        await journal.work("after")

    await hang_up_on(app, manager, FakeConnection(type="websocket"))
    assert journal == ["before finished", "after cancelled"]


async def test_post_handler_ends_where_it_awaits_a_task_of_its_group(
    manager: TaskManager, journal: Journal
) -> None:
    """The cancellation comes through the awaited task and is ours: it does not leave the middleware."""

    async def body() -> None:
        await create_task(journal.work("task"))

    connection = await hang_up_on(journal.handler(body), manager, FakeConnection(method="POST"))
    assert journal == ["task cancelled", "handler cancelled"]
    assert connection.status == 499


async def test_awaited_task_is_cancelled_once(manager: TaskManager) -> None:
    """The cleanup of a task that the cancelled handler awaits is not interrupted by a second cancellation."""
    log = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            log.append("cleaned up")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await create_task(work())

    await hang_up_on(app, manager)
    assert log == ["cleaned up"]


async def test_event_is_set_before_the_cancellation(manager: TaskManager, journal: Journal) -> None:
    """With grace, the event gives tasks and handler time to end by themselves."""

    async def polite() -> None:
        await request_group().cancel_event.wait()
        await asyncio.sleep(1)
        journal.append("polite finished")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(polite())
        create_task(journal.work("stubborn"))
        try:
            await asyncio.sleep(60)
        finally:
            journal.append(f"handler {asyncio.get_running_loop().time() - begin:.0f}")

    begin = asyncio.get_running_loop().time()
    await hang_up_on(app, manager, grace=2.0)
    assert journal[0] == "polite finished"
    assert sorted(journal[1:]) == ["handler 2", "stubborn cancelled"]


async def test_grace_is_kept_when_the_handler_ends_before_it(manager: TaskManager, journal: Journal) -> None:
    """A handler that ends within the grace does not shorten it for the tasks."""

    async def body() -> None:
        create_task(journal.work("task", 1))
        create_task(journal.work("slow task"))
        await asyncio.sleep(0.5)

    connection = await hang_up_on(journal.handler(body), manager, FakeConnection(method="POST"), grace=2.0)
    assert journal == ["handler finished", "task finished", "slow task cancelled"]
    assert connection.status == 499


async def test_group_made_after_the_disconnect_refuses_tasks(manager: TaskManager) -> None:
    """A handler that keeps running cannot start work for a client that has left; the message says why."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        with pytest.raises(GroupClosedError) as caught:
            create_task(Journal().work("task"))
        messages.append(str(caught.value))
        assert request_group().cancel_event.is_set()

    await hang_up_on(app, manager, FakeConnection(method="POST"))
    assert messages == [
        "cannot create task 'work': group 'POST#1' is closed (client_disconnect); "
        "work that outlives the request belongs in manager.create_task(..., group=...)"
    ]


async def test_refused_task_after_the_disconnect_is_no_error(manager: TaskManager) -> None:
    """A handler that ends by that refusal has ended because the client left, and nothing is reported."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        create_task(Journal().work("task"))

    connection = await hang_up_on(app, manager, FakeConnection(method="POST"))
    assert connection.status == 499


async def test_task_that_received_the_message_is_not_cancelled(
    manager: TaskManager, journal: Journal
) -> None:
    """The disconnect reaches a task of the group as a message; the others are cancelled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            await asyncio.sleep(0.1)
            journal.append("listener finished")

        create_task(journal.work("task"))
        await create_task(listen())
        journal.append("handler finished")

    await hang_up_on(app, manager, FakeConnection(method="POST"))
    assert journal == ["task cancelled", "listener finished", "handler finished"]


async def test_task_that_read_the_message_does_not_outlive_the_request(
    manager: TaskManager, journal: Journal
) -> None:
    """A task that ignores the message it received is cancelled when the request ends."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen() -> None:
            await receive()
            await receive()
            await journal.work("listener")

        create_task(listen())
        await asyncio.sleep(1)

    await hang_up_on(app, manager, FakeConnection(method="POST"))
    assert journal == ["listener cancelled"]
    assert asyncio.get_running_loop().time() < 1002


async def test_handler_that_received_the_message_is_not_cancelled(
    manager: TaskManager, journal: Journal
) -> None:
    """A GET handler in receive() gets the message, not a CancelledError, also from the watcher's hands."""
    for delay in (0.0, LONG):

        async def app(scope: Scope, receive: Receive, send: Send, delay: float = delay) -> None:
            await asyncio.sleep(delay)
            while (await receive())["type"] != "http.disconnect":
                pass
            await asyncio.sleep(0.1)
            journal.append("handler finished")

        connection = FakeConnection()
        task = serve(app, manager, connection)
        await asyncio.sleep(1)
        connection.disconnect()
        await task
    assert journal == ["handler finished"] * 2


async def test_handler_that_swallows_the_cancel_is_not_left_cancelled(
    manager: TaskManager, journal: Journal
) -> None:
    """Its response is dropped, and the server's task has nothing of our cancel left."""
    served: list[int | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await respond(send)
        journal.append("handler finished")

    async def server() -> None:
        await connection.run(TaskGroupMiddleware(app, manager=manager))
        await asyncio.sleep(1)
        task = asyncio.current_task()
        served.append(None if task is None else task.cancelling())

    connection = FakeConnection()
    task = asyncio.create_task(server())
    await asyncio.sleep(LONG)
    connection.disconnect()
    await task
    assert served == [0]
    assert journal == ["handler finished"]
    assert connection.status == 499


async def test_disconnect_that_cancels_everything_leaves_a_499(
    manager: TaskManager, journal: Journal
) -> None:
    """The layers outside see status 499 and an empty body, once."""
    connection = await hang_up_on(journal.handler(lambda: asyncio.sleep(60)), manager)
    assert [message["type"] for message in connection.sent] == ["http.response.start", "http.response.body"]
    assert connection.status == 499


async def test_started_response_just_ends(manager: TaskManager) -> None:
    """After the start was sent nothing is added to it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        await asyncio.sleep(60)

    connection = await hang_up_on(app, manager)
    assert [message["type"] for message in connection.sent] == ["http.response.start"]


@pytest.mark.parametrize("error", [OSError, RuntimeError])
async def test_connection_that_refuses_the_499_is_no_error(
    manager: TaskManager, journal: Journal, error: type[Exception]
) -> None:
    """uvloop raises RuntimeError, others OSError, when something is sent to a client that is gone."""
    connection = FakeConnection()

    async def send(message: Any) -> None:
        raise error("the handler is closed")

    connection.send = send  # type: ignore[method-assign]  # a server with its own send()
    await hang_up_on(journal.handler(lambda: asyncio.sleep(60)), manager, connection)


@pytest.mark.parametrize(
    "error",
    [
        ClientDisconnected("ours"),
        ExceptionGroup("several", [ClientDisconnected("ours"), ClientDisconnected("too")]),
    ],
)
async def test_errors_that_mean_the_client_left_stay_inside(manager: TaskManager, error: Exception) -> None:
    """An error that only means that the client has left is not reported to the server."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        raise error

    connection = await hang_up_on(app, manager, FakeConnection(method="POST"))
    assert connection.status == 499


async def test_starlettes_client_disconnect_stays_inside(manager: TaskManager) -> None:
    """Reading the body of a client that has left is no error of the application."""
    requests = pytest.importorskip("starlette.requests")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        await requests.Request(scope, receive).body()

    await hang_up_on(app, manager, FakeConnection(method="POST"))


@pytest.mark.parametrize(
    "error", [ValueError("bug"), ConnectionRefusedError("database"), TimeoutError("mine")]
)
async def test_real_failure_after_the_disconnect_is_raised(manager: TaskManager, error: Exception) -> None:
    """A handler that fails for a reason of its own after the client left is reported, without a 499."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        raise error

    connection = FakeConnection(method="POST")
    with pytest.raises(type(error)):
        await hang_up_on(app, manager, connection)
    assert connection.sent == []


async def test_disconnect_error_without_a_disconnect_is_raised(manager: TaskManager) -> None:
    """Only a real disconnect makes an OSError harmless."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnected("made up")

    with pytest.raises(ClientDisconnected):
        await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))


async def test_cause_is_the_requests_span(manager: TaskManager, spans: SpanRecorder) -> None:
    """The cancelled task names the server's span, which says how many tasks were cancelled."""
    tracer = spans.provider.get_tracer("server")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(Journal().work("one"), name="one")
        create_task(Journal().work("two"), name="two")
        await asyncio.sleep(60)

    async def server() -> None:
        with tracer.start_as_current_span("GET /"):
            await connection.run(TaskGroupMiddleware(app, manager=manager))

    connection = FakeConnection()
    task = asyncio.create_task(server())
    await asyncio.sleep(LONG)
    connection.disconnect()
    await task
    request, one = spans.span("GET /"), spans.span("one")
    assert request.attributes is not None
    assert request.attributes["otel_tasks.request.outcome"] == "client_disconnect"
    assert request.attributes["otel_tasks.cancel.count"] == 2
    assert (one.attributes or {})["otel_tasks.cancel.origin.span_id"] == f"{span_id(request):016x}"
    assert one.links == ()
    assert one.parent is not None
    assert one.parent.span_id == span_id(request)
    assert spans.names == ["two", "one", "GET /"]
    assert request.status.status_code.name == "UNSET"


async def test_ordinary_request_is_not_annotated(manager: TaskManager, spans: SpanRecorder) -> None:
    """Nothing is written on the span of a client that waited for its response."""
    tracer = spans.provider.get_tracer("server")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(Journal().work("task"))
        await respond(send)

    with tracer.start_as_current_span("GET /"):
        await FakeConnection().run(TaskGroupMiddleware(app, manager=manager))
    assert spans.span("GET /").attributes == {}


# --- cancelled by other code -----------------------------------------------------------------------------


async def test_shutdown_cancels_the_group_and_passes_on(manager: TaskManager) -> None:
    """A cancel of the server's own reaches the server again, after the tasks ended with cause shutdown."""
    causes = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            causes.append("cleaned up")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = create_task(work())
        task.add_done_callback(lambda ended: causes.append(str(task.cause)))
        await asyncio.sleep(60)

    task = serve(app, manager, FakeConnection())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert causes == ["cleaned up", "shutdown"]
    assert manager.stats().live == 0


async def test_shutdown_is_the_cause_of_the_task_that_the_handler_awaits(manager: TaskManager) -> None:
    """asyncio forwards the server's cancel to that task before the middleware sees it."""
    tasks = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(create_task(asyncio.sleep(60)))
        await tasks[0]

    task = serve(app, manager, FakeConnection())
    await asyncio.sleep(1)
    task.cancel("time is up")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tasks[0].cause is not None
    assert str(tasks[0].cause) == "shutdown: time is up"


async def test_shutdown_is_the_cause_of_all_tasks_that_the_handler_gathers(manager: TaskManager) -> None:
    """The tasks to which ``asyncio.gather`` forwards the server's cancel have that cause too."""
    tasks: list[ManagedTask[None]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.extend(create_task(asyncio.sleep(60)) for _ in range(2))
        await asyncio.gather(*tasks)

    task = serve(app, manager, FakeConnection())
    await asyncio.sleep(1)
    task.cancel("time is up")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [str(task.cause) for task in tasks] == ["shutdown: time is up"] * 2


async def test_timeout_in_the_handler_is_no_shutdown(manager: TaskManager) -> None:
    """A cancel by ``asyncio.timeout`` around the await is not attributed to the server."""
    causes = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = create_task(asyncio.sleep(60))
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await task
        causes.append(task.cause and task.cause.kind)

    await serve(app, manager, FakeConnection())
    assert causes == [CancelKind.TIMEOUT]


async def test_second_cancel_stops_the_waiting(manager: TaskManager) -> None:
    """A server that insists is not kept waiting by a task that does not end."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(10)
            ended.append(True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(work())
        await asyncio.sleep(60)

    task = serve(app, manager, FakeConnection())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not ended
    await manager.join()
    assert ended == [True]
    assert not open_groups(manager)


async def test_disconnect_and_shutdown_together_pass_on(manager: TaskManager) -> None:
    """When the server cancels too, before our cancel was taken back, its cancel wins."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(10)

    connection = FakeConnection()
    task = serve(app, manager, connection)
    await asyncio.sleep(LONG)
    connection.disconnect()
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connection.sent == []


async def test_swallowed_disconnect_and_shutdown_in_one_turn_pass_on(manager: TaskManager) -> None:
    """A handler that returns just when the server cancels it does not hide that cancel."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_soon(task.cancel)

    connection = FakeConnection()
    task = serve(app, manager, connection)
    await asyncio.sleep(LONG)
    connection.disconnect()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connection.sent == []


async def test_shutdown_while_the_exit_waits_for_tasks(manager: TaskManager, journal: Journal) -> None:
    """With on_exit="wait", a server that shuts down cancels what the request still waits for."""

    async def body() -> None:
        create_task(journal.work("task"))

    task = serve(journal.handler(body), manager, FakeConnection(), on_exit="wait")
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert journal == ["handler finished", "task cancelled"]


async def test_cancel_swallowed_by_the_application_stays_swallowed(manager: TaskManager) -> None:
    """An application that survives the server's cancel answers as it would without the middleware."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request_group()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await respond(send)

    connection = FakeConnection()
    task = serve(app, manager, connection)
    await asyncio.sleep(1)
    task.cancel()
    await task
    assert connection.status == 200


async def test_cancelled_error_of_an_awaited_task_is_raised(manager: TaskManager) -> None:
    """A task that was cancelled explicitly, and is awaited, raises in the handler and out of it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = create_task(Journal().work("task"))
        task.cancel("changed my mind")
        await task

    task = serve(app, manager, FakeConnection())
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not task.cancelling()


# --- the end of the request -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_exit", "expected"),
    [
        ("cancel", ["handler finished", "task cancelled", "request over"]),
        ("wait", ["handler finished", "task finished", "request over"]),
        ("detach", ["handler finished", "request over", "task finished"]),
    ],
)
async def test_on_exit_decides_about_remaining_tasks(
    manager: TaskManager, journal: Journal, on_exit: str, expected: list[str]
) -> None:
    """Tasks that still run at the end are cancelled, awaited, or handed to the application."""
    tasks = []

    async def body() -> None:
        tasks.append(create_task(journal.work("task", 1)))
        await asyncio.sleep(0)

    await serve(journal.handler(body), manager, FakeConnection(), on_exit=on_exit)
    journal.append("request over")
    await manager.join()
    assert journal == expected
    cause = tasks[0].cause
    assert (cause and cause.kind) == (CancelKind.SCOPE_ENDED if on_exit == "cancel" else None)
    assert not open_groups(manager)


async def test_task_that_is_handed_over_is_reached_by_the_managers_shutdown(
    manager: TaskManager, journal: Journal
) -> None:
    """A task that a request hands over ends with the application."""

    async def body() -> None:
        create_task(journal.work("task"))
        await asyncio.sleep(0)

    await serve(journal.handler(body), manager, FakeConnection(), on_exit="detach")
    await manager.shutdown(grace=0)
    assert journal == ["handler finished", "task cancelled"]


async def test_client_that_leaves_while_the_exit_waits_cancels_nothing(
    manager: TaskManager, journal: Journal
) -> None:
    """After the response is out a disconnect matters no more."""

    async def body() -> None:
        create_task(journal.work("task", 1))

    connection = await hang_up_on(journal.handler(body), manager, on_exit="wait")
    assert journal == ["handler finished", "task finished"]
    assert connection.status == 200


async def test_disconnect_ends_tasks_that_would_be_handed_over_or_waited_for(
    manager: TaskManager, journal: Journal
) -> None:
    """on_exit is about requests that end well: a client that leaves stops its tasks in each case."""

    async def body() -> None:
        create_task(journal.work("task"))
        await asyncio.sleep(1)

    for on_exit in ("wait", "detach"):
        await hang_up_on(journal.handler(body), manager, FakeConnection(method="POST"), on_exit=on_exit)
    assert journal == ["task cancelled", "handler finished"] * 2


async def test_plain_task_that_outlives_its_request_starts_tasks_with_the_manager(
    manager: TaskManager,
) -> None:
    """Its context still names the request, but what it starts belongs to the manager from then on."""
    started = []

    async def late() -> None:
        await asyncio.sleep(1)
        task = create_task(Journal().work("task", 1))
        started.append((task.group.name, current_group().name))
        assert await task == "task"

    stray = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/with-group":
            create_task(Journal().work("task", 0))
        stray.append(asyncio.create_task(late()))
        await respond(send)

    for path in ("/", "/with-group"):
        await FakeConnection(path=path).run(TaskGroupMiddleware(app, manager=manager))
    await asyncio.gather(*stray)
    assert started == [("root", "root")] * 2
    assert not open_groups(manager)


async def test_span_option_gives_the_group_a_span(manager: TaskManager, spans: SpanRecorder) -> None:
    """With span=True the tasks hang below a span of the group's."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/x/{id}")
        await create_task(Journal().work("task", 0), name="task")
        await respond(send)

    await FakeConnection().run(TaskGroupMiddleware(app, manager=manager, span=True))
    group, task = spans.span("GET /x/{id}"), spans.span("task")
    assert task.parent is not None
    assert task.parent.span_id == span_id(group)


# --- uncancellable() --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_uncancellable_keeps_the_handler_until_its_end(
    manager: TaskManager, journal: Journal, method: str
) -> None:
    """The disconnect is delivered when the block is left: nothing behind it runs in a cancelled handler."""

    async def body() -> None:
        async with uncancellable():
            await asyncio.sleep(1)
            journal.append("paid")
        journal.append("behind")
        await asyncio.sleep(0)

    connection = await hang_up_on(journal.handler(body), manager, FakeConnection(method=method))
    ending = ["handler cancelled"] if method == "GET" else ["behind", "handler finished"]
    assert journal == ["paid", *ending]
    assert connection.status == 499


async def test_uncancellable_nests(manager: TaskManager, journal: Journal) -> None:
    """Only the end of the outermost block delivers."""

    async def body() -> None:
        async with uncancellable():
            async with uncancellable():
                await asyncio.sleep(1)
            journal.append("inner done")
            await asyncio.sleep(1)
            journal.append("outer done")

    await hang_up_on(journal.handler(body), manager)
    assert journal == ["inner done", "outer done", "handler cancelled"]


async def test_uncancellable_keeps_a_task_of_the_group(manager: TaskManager, journal: Journal) -> None:
    """A task inside the block finishes it; its siblings are cancelled, and the handler waits for it."""

    async def pay() -> None:
        async with uncancellable():
            await asyncio.sleep(1)
            journal.append("paid")
        journal.append("behind")

    async def body() -> None:
        await asyncio.gather(create_task(pay()), create_task(journal.work("sibling")))

    for method in ("GET", "POST"):
        connection = await hang_up_on(journal.handler(body), manager, FakeConnection(method=method))
        assert sorted(journal) == ["handler cancelled", "paid", "sibling cancelled"]
        assert connection.status == 499
        journal.clear()


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_uncancellable_is_not_cancelled_through_its_waiter(
    manager: TaskManager, journal: Journal, method: str
) -> None:
    """A task that awaits one in uncancellable() would forward its cancel, so it is cancelled afterwards."""

    async def pay() -> None:
        async with uncancellable():
            await journal.work("charge", 1)
            await journal.work("book", 1)

    async def checkout() -> None:
        try:
            await create_task(pay())
            await journal.work("thanks")
        except asyncio.CancelledError:
            journal.append("checkout cancelled")
            raise

    async def body() -> None:
        create_task(journal.work("map"))
        await create_task(checkout())

    connection = FakeConnection(method=method)
    await hang_up_on(journal.handler(body), manager, connection)
    assert journal[:3] == ["map cancelled", "charge finished", "book finished"]
    assert "checkout cancelled" in journal
    assert "thanks finished" not in journal


async def test_work_started_inside_uncancellable_ends_before_the_request(
    manager: TaskManager, journal: Journal
) -> None:
    """The disconnect does not reach tasks that the block starts, and the request waits for them."""
    groups = []

    async def body() -> None:
        async with uncancellable():
            task = create_task(journal.work("booking", 1))
            groups.append(task.group.name)
            await asyncio.sleep(0.5)

    connection = FakeConnection()
    task = serve(journal.handler(body), manager, connection)
    await asyncio.sleep(LONG)
    connection.disconnect()
    await task
    assert journal == ["handler cancelled", "booking finished"]
    assert groups == ["GET uncancellable"]


async def test_uncancellable_does_not_hold_off_others(manager: TaskManager, journal: Journal) -> None:
    """A shutdown and an explicit cancel() reach into the block."""

    async def guarded() -> None:
        async with uncancellable():
            await journal.work("guarded")

    async def body() -> None:
        task = create_task(guarded())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await guarded()

    task = serve(journal.handler(body), manager, FakeConnection())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert journal == ["guarded cancelled", "guarded cancelled", "handler cancelled"]


async def test_failure_inside_uncancellable_is_raised(manager: TaskManager, journal: Journal) -> None:
    """A block that raises after the client left shows its error, not the disconnect that waited."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with uncancellable():
            await asyncio.sleep(1)
            raise ValueError("card declined")

    connection = FakeConnection()
    with pytest.raises(ValueError, match="card declined"):
        await hang_up_on(app, manager, connection)


async def test_uncancellable_outside_of_a_request_does_nothing(
    manager: TaskManager, journal: Journal
) -> None:
    """Code that is shared with a worker may use it there too."""
    async with uncancellable():
        journal.append("ran")

    async def work() -> None:
        async with uncancellable():
            await journal.work("worker")

    task = manager.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert journal == ["ran", "worker cancelled"]


async def test_application_task_is_not_part_of_the_request(manager: TaskManager, journal: Journal) -> None:
    """A task in a group of the application survives the disconnect, and holds nothing of the request off."""

    async def deliver() -> None:
        with pytest.raises(RuntimeError, match="outside of a request"):
            request_group()
        async with uncancellable():
            await journal.work("delivery", 2)

    async def body() -> None:
        manager.create_task(deliver(), group="outbox")
        await asyncio.sleep(60)

    connection = FakeConnection()
    task = serve(journal.handler(body), manager, connection)
    await asyncio.sleep(LONG)
    connection.disconnect()
    await task
    assert journal == ["handler cancelled"]
    await manager.join()
    assert journal == ["handler cancelled", "delivery finished"]


async def test_nested_group_of_a_handler_belongs_to_the_request(
    manager: TaskManager, journal: Journal
) -> None:
    """A block with a group of its own is cancelled with the request, and knows the request's group."""

    async def inside() -> None:
        journal.append(str(request_group() is outer[0]))
        await journal.work("nested")

    outer = []

    async def body() -> None:
        outer.append(request_group())
        async with manager.group("fan-out") as group:
            group.create_task(inside())

    connection = await hang_up_on(journal.handler(body), manager)
    assert journal == ["True", "nested cancelled", "handler cancelled"]
    assert connection.status == 499


# --- WebSockets --------------------------------------------------------------------------------------------


async def test_websocket_disconnect_cancels_the_group_and_is_delivered(
    manager: TaskManager, journal: Journal
) -> None:
    """The application gets what the client had sent, then the message; its tasks are cancelled."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        messages.append((await receive())["type"])
        await send({"type": "websocket.accept"})
        task = create_task(journal.work("feed"))
        await asyncio.sleep(1)
        for _ in range(4):
            message = await receive()
            messages.append(message.get("text", message["type"]))
        journal.append(str(task.cause))

    connection = FakeConnection.websocket("/feed")
    task = serve(app, manager, connection)
    await asyncio.sleep(0.5)
    connection.feed("one")
    connection.feed("two")
    await asyncio.sleep(0.1)
    connection.disconnect(code=1006)
    await task
    assert messages == ["websocket.connect", "one", "two", "websocket.disconnect", "websocket.disconnect"]
    assert journal == ["feed cancelled", "client_disconnect"]
    assert [message["type"] for message in connection.sent] == ["websocket.accept"]


@pytest.mark.parametrize(("option", "cancelled"), [("safe", False), (True, True), (False, False)])
async def test_websocket_handler_is_cancelled_only_with_the_option(
    manager: TaskManager, journal: Journal, option: Any, cancelled: bool
) -> None:
    """A WebSocket's handler gets the message; cancel_handler=True cancels one that does not listen."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await journal.work("handler", 1)

    connection = FakeConnection.websocket()
    task = serve(app, manager, connection, cancel_handler=option)
    await asyncio.sleep(0.2)
    connection.disconnect()
    await task
    assert journal == [f"handler {'cancelled' if cancelled else 'finished'}"]


async def test_websocket_handler_in_receive_is_never_cancelled(manager: TaskManager) -> None:
    """Not even with cancel_handler=True: it has just received the message."""
    messages = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        messages.append(await receive())
        await asyncio.sleep(1)
        messages.append(await receive())

    connection = FakeConnection.websocket()
    task = serve(app, manager, connection, cancel_handler=True)
    await asyncio.sleep(0.2)
    connection.disconnect(code=1001)
    await task
    assert [message["code"] for message in messages] == [1001, 1001]


async def test_sending_to_a_websocket_that_is_gone_raises(manager: TaskManager) -> None:
    """A feed that only sends is ended by an error, which stays inside; closing is no error."""
    sent = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "text": "tick"})
                sent.append("tick")
                await asyncio.sleep(0.1)
        finally:
            await send({"type": "websocket.close"})

    connection = FakeConnection.websocket()
    task = serve(app, manager, connection)
    await asyncio.sleep(0.25)
    connection.disconnect()
    await task
    assert sent == ["tick"] * 3
    assert connection.sent_late == []


async def test_websocket_closed_by_the_application_is_complete(
    manager: TaskManager, journal: Journal
) -> None:
    """A close by the application is not a client that leaves."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await asyncio.sleep(LONG)
        await send({"type": "websocket.close"})
        await create_task(journal.work("after", 1))

    await serve(app, manager, FakeConnection.websocket())
    assert journal == ["after finished"]


async def test_websocket_group_is_named(manager: TaskManager) -> None:
    """Its group says that it is a WebSocket's."""
    names = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = SimpleNamespace(path="/ws/{room}")
        names.append(request_group().name)

    await serve(app, manager, FakeConnection.websocket("/ws/7"))
    assert names == ["WS /ws/{room}"]


# --- every await, cancelled ----------------------------------------------------------------------------


@pytest.mark.parametrize("disconnect", [False, True])
async def test_every_await_of_a_request_may_be_cancelled(
    manager: TaskManager, spans: SpanRecorder, disconnect: bool
) -> None:
    """The server's cancel at any moment leaves no task, no group, no open span, and always comes out."""

    async def work() -> None:
        try:
            await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(work())
        await asyncio.sleep(LONG)
        await receive()
        await create_task(work())
        await respond(send)

    # Turns of the loop first, then times: each look of the sweep, and the second that the 499 may take.
    moments = [
        *range(20),
        *(0.001 * step for step in range(1, 90)),
        *(0.1 + 0.1 * step for step in range(20)),
    ]
    outcomes = set()
    for moment in moments:
        connection = FakeConnection(method="POST", send_hangs_after_disconnect=True)
        task = serve(app, manager, connection)
        if disconnect:
            connection.disconnect()
        if isinstance(moment, int):
            for _ in range(moment):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(moment)
        if not task.cancel():
            await task
            outcomes.add("ended")
            continue
        with pytest.raises(asyncio.CancelledError):
            await task
        outcomes.add("cancelled")
        await manager.join()
        assert manager.stats().live == 0
        assert not open_groups(manager)
        assert not spans.open
    assert outcomes == {"ended", "cancelled"}


# --- wrong use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"cancel_handler": "unsafe"},
            ValueError,
            "cancel_handler has a bad entry, 'unsafe': a rule is entries",
        ),
        ({"detect_after": 0}, ValueError, "detect_after must be greater than 0"),
        ({"detect_after": float("nan")}, ValueError, "detect_after"),
        ({"detect_after": "25ms"}, TypeError, "detect_after must be a number of seconds, got '25ms'"),
        ({"grace": -1}, ValueError, "grace must be at least 0"),
        ({"grace": True}, TypeError, "grace must be a number of seconds, got True"),
        ({"grace": float("inf")}, ValueError, "finite"),
        ({"buffer_limit": 0}, ValueError, "buffer_limit must be at least 1 byte, got 0"),
        ({"buffer_limit": 1.5}, TypeError, "buffer_limit must be a number of bytes, got 1.5"),
        ({"on_exit": "kill"}, ValueError, "on_exit must be one of 'cancel', 'wait', 'detach', got 'kill'"),
        ({"cancel_handler": 5}, TypeError, "a function of the scope, got 5"),
        ({"cancel_handler": None}, TypeError, "a function of the scope, got None"),
        ({"span": "no"}, TypeError, "span must be True or False, got 'no'"),
        ({"manager": "default"}, TypeError, "manager must be a TaskManager, got 'default'"),
        ({"detect_afer": 1}, TypeError, "detect_afer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each message names the option, the value and what it may be."""
    with pytest.raises(error) as caught:
        TaskGroupMiddleware(lambda *_: None, **options)  # type: ignore[arg-type]  # never called
    assert message in str(caught.value)


@pytest.mark.parametrize("function", [request_group, lambda: set_cancel_handler(True)])
async def test_request_functions_need_a_request(function: Callable[[], object]) -> None:
    """Outside of a request the error shows the line that is missing."""
    with pytest.raises(RuntimeError, match=r"app\.add_middleware\(TaskGroupMiddleware\)"):
        function()


async def test_server_without_asyncio_task_is_served(
    manager: TaskManager, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that steps coroutines itself has no task to cancel: only the group is cancelled."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    async def body() -> None:
        await asyncio.wait([create_task(journal.work("task"))])

    connection = FakeConnection()
    coro = connection.run(TaskGroupMiddleware(journal.handler(body), manager=manager))
    context = copy_context()

    def step(waited: asyncio.Future[Any] | None = None) -> None:
        try:
            awaited = coro.send(None)
        except StopIteration:
            over.set_result(None)
            return
        if awaited is None:
            loop.call_soon(step, context=context)
        else:
            awaited._asyncio_future_blocking = False
            awaited.add_done_callback(step, context=context)

    loop.call_soon(step, context=context)
    await asyncio.sleep(LONG)
    connection.disconnect()
    await over
    assert journal == ["task cancelled", "handler finished"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# --- the end of a request that cannot wait ---------------------------------------------------------


async def test_failing_handler_does_not_wait_for_tasks(manager: TaskManager, journal: Journal) -> None:
    """With on_exit="wait", a failed handler's 500 is still to be sent, so its tasks are cancelled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(journal.work("slow", 300))
        await asyncio.sleep(0)
        raise ValueError("broken")

    start = asyncio.get_running_loop().time()
    with pytest.raises(ValueError, match="broken"):
        await serve(app, manager, FakeConnection(), on_exit="wait")
    assert asyncio.get_running_loop().time() == start
    assert journal == ["slow cancelled"]


async def test_task_that_ignores_its_cancellation_does_not_hold_a_request_forever(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """After a bound, the request ends; tasks that still run are logged by name and stay with the manager."""

    async def deaf() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(20)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(deaf(), name="deaf")
        await asyncio.sleep(0)
        await respond(send)

    start = asyncio.get_running_loop().time()
    await serve(app, manager, FakeConnection())
    assert asyncio.get_running_loop().time() - start == 10
    assert caplog.messages == ["request 'GET#1' is over, and after 10.0 s its tasks still run: 'GET#1/deaf'"]
    assert manager.stats().live == 1
    await manager.join()


async def test_task_that_is_handed_over_can_still_create_tasks(
    manager: TaskManager, journal: Journal
) -> None:
    """A task handed to the application keeps working and may create tasks."""

    async def job() -> None:
        await asyncio.sleep(1)
        journal.append(await create_task(journal.work("step", 1)))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        create_task(job())
        await respond(send)

    await serve(app, manager, FakeConnection(), on_exit="detach")
    await manager.join()
    assert journal == ["step finished", "step"]
    assert not open_groups(manager)


async def test_rule_for_handlers_is_a_plain_function(manager: TaskManager) -> None:
    """A coroutine function would always be true: it is refused with a hint."""

    async def rule(scope: Scope) -> bool:
        return False

    with pytest.raises(TypeError, match=r"got the coroutine function .*rule.* write it with def"):
        TaskGroupMiddleware(FakeConnection, manager=manager, cancel_handler=rule)  # type: ignore[arg-type]  # the mistake under test


async def test_rule_that_gives_a_coroutine_keeps_the_handler(
    manager: TaskManager, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """A rule that returns an awaitable has not decided: the handler keeps running; the error is logged."""

    async def decide() -> bool:
        return True

    async def body() -> None:
        await journal.work("payment", 1)

    await hang_up_on(journal.handler(body), manager, cancel_handler=lambda scope: decide())
    assert journal == ["payment finished", "handler finished"]
    assert "the handler is not cancelled" in caplog.text
