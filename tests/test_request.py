"""The reach of a disconnect: cleanup, shields, listeners, and the work of other requests."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import time
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from otel_tasks import (
    CancelKind,
    GroupClosedError,
    TaskGroup,
    TaskManager,
    create_task,
    current_group,
    start_task,
)
from otel_tasks._asgi.request import require_request
from otel_tasks._core.binding import stopping
from otel_tasks.asgi import TaskGroupMiddleware, request_group, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.helpers import open_groups

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks import ManagedTask
    from otel_tasks._asgi.connection import Receive, Scope, Send

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"done"}
# Longer than the middleware takes to watch a request.
LONG = 0.1
# Short: where anyio cancels at every turn of the loop, a virtual clock never gets on.
CLEANUP = 0.02


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


def app_of(handler: Callable[[], Awaitable[object]]) -> App:
    """An application that runs ``handler`` and answers."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()
        await send(dict(START))
        await send(dict(BODY))

    return app


async def hang_up_on(
    app: App, manager: TaskManager, connection: FakeConnection | None = None, **options: Any
) -> FakeConnection:
    """Let the client leave while the application works; return when the server is done."""
    connection = connection or FakeConnection()
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager, **options)))
    await asyncio.sleep(LONG)
    connection.disconnect()
    await serving
    assert not serving.cancelling()
    assert not stopping
    return connection


def post() -> FakeConnection:
    """A request whose handler is not cancelled by default."""
    return FakeConnection(method="POST")


# --- cleanup -----------------------------------------------------------------------------------------------


async def _await_it() -> None:
    await asyncio.sleep(CLEANUP)


async def _create_a_task() -> None:
    await create_task(asyncio.sleep(CLEANUP))


async def _create_and_leave_a_task() -> None:
    create_task(asyncio.sleep(CLEANUP))


async def _start_a_task() -> None:
    await (await start_task("cleanup", lambda: asyncio.sleep(CLEANUP)))


async def _open_a_group() -> None:
    async with TaskGroup() as group:
        group.create_task(asyncio.sleep(CLEANUP))


async def _open_a_group_below_the_requests() -> None:
    async with request_group().group("cleanup") as group:
        group.create_task(asyncio.sleep(CLEANUP))


async def _create_a_task_in_the_requests_group() -> None:
    await request_group().create_task(asyncio.sleep(CLEANUP))


async def _open_asyncios_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(CLEANUP))


CLEANUPS = [
    _await_it,
    _create_a_task,
    _create_and_leave_a_task,
    _start_a_task,
    _open_a_group,
    _open_a_group_below_the_requests,
    _create_a_task_in_the_requests_group,
    _open_asyncios_group,
]


@pytest.mark.parametrize("shielded", [False, True], ids=["plain", "uncancellable"])
@pytest.mark.parametrize("clean_up", CLEANUPS, ids=lambda function: function.__name__)
async def test_cleanup_after_the_cancellation_ends_before_the_request(
    manager: TaskManager, clean_up: Callable[[], Awaitable[None]], shielded: bool
) -> None:
    """A `finally` may await and start work; the request waits for it."""
    loop = asyncio.get_running_loop()
    ended = []

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            if shielded:
                async with uncancellable():
                    await clean_up()
            else:
                await clean_up()
            ended.append(loop.time())

    began = loop.time()
    await hang_up_on(app_of(handler), manager)
    assert ended
    assert loop.time() >= began + LONG + CLEANUP
    assert manager.stats().live == 0
    assert not open_groups(manager)


@pytest.mark.real_clock
@pytest.mark.parametrize("clean_up", CLEANUPS, ids=lambda function: function.__name__)
async def test_shielded_cleanup_is_whole_in_the_scopes_of_anyio(
    manager: TaskManager, clean_up: Callable[[], Awaitable[None]]
) -> None:
    """anyio cancels again at every await of a child task; the body of uncancellable() is spared."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            async with uncancellable():
                await clean_up()
                ended.append("work")

    async def handler() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(work)

    await hang_up_on(app_of(handler), manager)
    assert ended == ["work"]
    assert manager.stats().live == 0


@pytest.mark.real_clock
@pytest.mark.parametrize("how", ["task", "gather", "plain"])
async def test_cleanup_of_an_awaited_task_is_not_interrupted_by_anyio(manager: TaskManager, how: str) -> None:
    """The awaiter is cancelled repeatedly and forwards each cancel; the task is cancelled once."""
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            async with uncancellable():
                await asyncio.sleep(CLEANUP)
                ended.append("work")

    async def endpoint() -> None:
        if how == "task":
            await create_task(work())
        elif how == "gather":
            await asyncio.gather(work(), create_task(work()))
        else:
            await asyncio.create_task(work())

    async def handler() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(endpoint)

    await hang_up_on(app_of(handler), manager)
    assert set(ended) == {"work"}


@pytest.mark.real_clock
async def test_task_started_by_cleanup_continues_where_anyio_cuts_the_cleanup_off(
    manager: TaskManager,
) -> None:
    """Without a shield the await is cancelled again, but not the task that it awaits."""
    ended = []

    async def bill() -> None:
        await asyncio.sleep(CLEANUP)
        ended.append("bill")

    async def endpoint() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await create_task(bill())
            finally:
                ended.append("cleanup")

    async def handler() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(endpoint)

    await hang_up_on(app_of(handler), manager)
    assert ended == ["cleanup", "bill"]


async def test_cleanup_has_a_group_of_its_own(manager: TaskManager) -> None:
    """It is named after the request's, and its tasks may start further ones."""
    names = []

    async def deeper() -> None:
        names.append(create_task(asyncio.sleep(1)).group.name)

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await create_task(deeper())
            names.append(current_group().name)

    connection = FakeConnection(path="/x")
    connection.scope["path_template"] = "/report/{id}"
    await hang_up_on(app_of(handler), manager, connection)
    assert names == ["GET /report/{id} uncancellable"] * 2
    assert manager.stats().cancelled == 0


@pytest.mark.parametrize("how", ["swallowed", "ran on"])
async def test_handler_that_continues_after_the_disconnect_starts_no_work(
    manager: TaskManager, how: str
) -> None:
    """A handler that swallowed its cancellation is not cleaning up, nor is one that was not cancelled."""
    refused = []

    async def handler() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            assert how == "swallowed"
        for create in (create_task, request_group().create_task):
            with pytest.raises(GroupClosedError, match="client_disconnect"):
                create(asyncio.sleep(1))
            refused.append(create)

    await hang_up_on(app_of(handler), manager, FakeConnection() if how == "swallowed" else post())
    assert len(refused) == 2


async def test_work_after_a_dropped_response_is_cleanup(manager: TaskManager) -> None:
    """The response of a handler that kept running was dropped; its background tasks may start work."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        await send(dict(START))
        await send(dict(BODY))
        ended.append(await create_task(asyncio.sleep(1, "background")))

    await hang_up_on(app, manager, post())
    assert ended == ["background"]


async def test_work_inside_a_block_that_was_entered_before_is_cleanup(manager: TaskManager) -> None:
    """In uncancellable() the request's own group takes tasks as well, after the disconnect too."""
    ended = []

    async def handler() -> None:
        tasks = request_group()
        async with uncancellable():
            await asyncio.sleep(1)
            ended.append(await tasks.create_task(asyncio.sleep(1, "task")))

    await hang_up_on(app_of(handler), manager)
    assert ended == ["task"]


async def test_unrelated_exception_is_no_cleanup(manager: TaskManager) -> None:
    """An `except` for an error of the handler's own does not open the closed group."""
    refused = []

    async def handler() -> None:
        await asyncio.sleep(1)
        try:
            raise ValueError("retry")
        except ValueError:
            with pytest.raises(GroupClosedError):
                create_task(asyncio.sleep(1))
            refused.append(True)

    await hang_up_on(app_of(handler), manager, post())
    assert refused


@pytest.mark.parametrize("wrapped", ["context", "group"])
async def test_exception_that_took_the_place_of_the_cancellation_still_ends_the_handler(
    manager: TaskManager, wrapped: str
) -> None:
    """An exception raised while the CancelledError was handled, or a group around it, still propagates."""
    ended = []

    async def handler() -> None:
        try:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError as error:
                if wrapped == "group":
                    raise BaseExceptionGroup("several", [error]) from None
                raise RuntimeError("rolled back") from None
        finally:
            ended.append(await create_task(asyncio.sleep(1, "cleanup")))

    with pytest.raises(RuntimeError, match="rolled back") if wrapped == "context" else nullcontext():
        await hang_up_on(app_of(handler), manager)
    assert ended == ["cleanup"]


async def test_cleanup_in_a_scoped_group_outside_of_requests_joins_the_group_above() -> None:
    """A task that is being cancelled with its scoped group may start tasks; the group itself takes none."""
    manager = TaskManager()
    groups: list[str | None] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            groups.append(create_task(asyncio.sleep(0)).group.name)
            async with TaskGroup() as inner:
                groups.append(None if inner.parent is None else inner.parent.name)
            with pytest.raises(GroupClosedError):
                outer.create_task(asyncio.sleep(0))

    async with manager.group("outer") as outer:
        outer.create_task(work())
        await asyncio.sleep(1)
        outer.cancel()
    assert groups == ["root", "root"]
    await manager.join()


async def test_late_cleanup_is_named_and_runs_on(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """The request waits ten seconds for it, and a shutdown of the manager still reaches it."""
    tasks: list[ManagedTask[None]] = []

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            tasks.append(create_task(asyncio.sleep(60), name="bill"))

    with caplog.at_level(logging.WARNING, logger="otel_tasks"):
        await hang_up_on(app_of(handler), manager)
    assert "bill" in caplog.text
    assert not tasks[0].done()
    await manager.shutdown(grace=0)
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.SHUTDOWN


async def test_server_that_cancels_the_request_ends_its_cleanup(manager: TaskManager) -> None:
    """A shutdown goes through, and is the cause of the tasks it cancels."""
    tasks: list[ManagedTask[None]] = []

    async def handler() -> None:
        async with uncancellable():
            tasks.append(create_task(asyncio.sleep(60)))
            await asyncio.sleep(60)

    serving = asyncio.create_task(FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager)))
    await asyncio.sleep(LONG)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert tasks[0].cancelled()
    assert tasks[0].cause is not None
    assert tasks[0].cause.kind is CancelKind.SHUTDOWN


async def test_generator_that_is_finalized_in_another_task_releases_its_shield(
    manager: TaskManager,
) -> None:
    """Its block ends there; the next disconnect of the request is delivered as usual."""
    ended = []

    async def body() -> AsyncGenerator[int]:
        async with uncancellable():
            try:
                yield 1
            finally:
                ended.append("body")

    async def handler() -> None:
        generator = body()
        await anext(generator)
        await asyncio.create_task(generator.aclose())
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("handler")

    await hang_up_on(app_of(handler), manager)
    assert ended == ["body", "handler"]


# --- listeners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancel_handler", ["safe", True])
async def test_application_that_listens_ends_in_its_own_way(
    manager: TaskManager, cancel_handler: Any
) -> None:
    """A child task received the message: the handler is left alone, and the group's tasks are cancelled."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = create_task(asyncio.sleep(60))

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        await asyncio.create_task(listen())
        seen.append("told")
        await asyncio.sleep(1)
        seen.append(await create_task(asyncio.sleep(1, "background")))
        seen.append(str(task.cause))

    await hang_up_on(app, manager, cancel_handler=cancel_handler)
    assert seen == ["told", "background", "client_disconnect"]


async def test_application_that_meets_the_servers_error_in_send_is_left_alone(manager: TaskManager) -> None:
    """It has learned of the disconnect by that."""
    seen = []
    connection = FakeConnection(send_raises_after_disconnect=True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(dict(START))
        connection.disconnect()
        try:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except OSError:
            await asyncio.sleep(1)
            seen.append("ended")

    await connection.run(TaskGroupMiddleware(app, manager=manager))
    assert seen == ["ended"]


async def test_application_that_reads_the_message_during_the_grace_is_left_alone(
    manager: TaskManager,
) -> None:
    """Whether it has read the message is checked when it would be cancelled."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        while (await receive())["type"] != "http.disconnect":
            pass
        await asyncio.sleep(5)
        seen.append("ended")

    await hang_up_on(app, manager, grace=2)
    assert seen == ["ended"]


async def test_listener_learns_of_the_disconnect_when_the_shield_closes(manager: TaskManager) -> None:
    """Its own cancellation would break uncancellable(); code inside the block learns of it at once."""
    loop = asyncio.get_running_loop()
    told: dict[str, float] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

        async def listen(who: str) -> None:
            await receive()
            told[who] = round(loop.time() - began, 2)

        listeners = [asyncio.create_task(listen("reader")), asyncio.create_task(listen("waiter"))]
        async with uncancellable():
            await asyncio.sleep(1)
            await listen("inside")
            await asyncio.sleep(1)
        await asyncio.gather(*listeners)

    began = loop.time()
    await hang_up_on(app, manager)
    assert told["inside"] == 1
    assert told["reader"] == told["waiter"] == 2


# --- shields of anyio, and threads -------------------------------------------------------------------------


async def test_handler_in_a_shield_of_anyio_is_cancelled_after_it(manager: TaskManager) -> None:
    """A native cancel passes through the shield, so it waits; each step of the handler is looked at."""
    seen = []

    async def handler() -> None:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(1)
            await asyncio.sleep(0)
            await asyncio.sleep(1)
            seen.append("whole")
        await asyncio.sleep(60)
        seen.append("not here")

    await hang_up_on(app_of(handler), manager)
    assert seen == ["whole"]


async def test_task_in_a_shield_of_anyio_is_cancelled_after_it(manager: TaskManager) -> None:
    """And so is the handler that awaits it."""
    seen = []

    async def work() -> None:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(1)
            seen.append("whole")
        await asyncio.sleep(60)

    async def handler() -> None:
        await create_task(work())

    await hang_up_on(app_of(handler), manager)
    assert seen == ["whole"]
    assert manager.stats().cancelled == 1


@pytest.mark.real_clock
@pytest.mark.parametrize("how", ["anyio", "to_thread", "executor", "gather", "task"])
async def test_handler_that_waits_for_a_thread_is_cancelled_after_it(manager: TaskManager, how: str) -> None:
    """The thread may use what the handler would release; tasks of the group are cancelled at once."""
    import threading

    release, ended, order = threading.Event(), asyncio.Event(), list[str]()
    entered = threading.Event()

    def use() -> None:
        entered.set()
        release.wait(60)
        order.append("thread ended")

    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "anyio": lambda: anyio.to_thread.run_sync(use),
        "to_thread": lambda: asyncio.to_thread(use),
        "executor": lambda: asyncio.get_running_loop().run_in_executor(None, use),
        "gather": lambda: asyncio.gather(asyncio.to_thread(use)),
        "task": lambda: asyncio.create_task(asyncio.to_thread(use)),
    }

    async def handler() -> None:
        def note(_: object) -> None:
            order.append("task ended")
            ended.set()

        create_task(asyncio.sleep(60)).add_done_callback(note)
        try:
            await ways[how]()
            await asyncio.sleep(60)
        finally:
            order.append("released")

    connection = FakeConnection()
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app_of(handler), manager=manager)))
    await asyncio.sleep(LONG)
    # A function that has not begun is cancelled instead.
    assert await asyncio.to_thread(entered.wait, 60)
    connection.disconnect()
    async with asyncio.timeout(60):
        await ended.wait()
    assert order == ["task ended"]
    release.set()
    async with asyncio.timeout(60):
        await serving
    assert order == ["task ended", "thread ended", "released"]


@pytest.mark.real_clock
async def test_tasks_in_shields_of_anyio_are_looked_at_once_each(manager: TaskManager) -> None:
    """Every move of one of them is a look at all; what waits for their moves must not multiply by that."""
    loop = asyncio.get_running_loop()
    waits = [[loop.create_future() for _ in range(6)] for _ in range(4)]
    left = []

    async def work(futures: list[asyncio.Future[None]]) -> None:
        with anyio.CancelScope(shield=True):
            for future in futures:
                await future
        left.append(loop.time())
        await asyncio.sleep(60)

    async def handler() -> None:
        for futures in waits:
            create_task(work(futures))
        await asyncio.sleep(60)

    serving = asyncio.create_task(hang_up_on(app_of(handler), manager))
    await asyncio.sleep(2 * LONG)
    for step in range(6):
        for futures in waits:
            # The task's own callback, and one that waits for its move.
            async with asyncio.timeout(30):
                while len(futures[step]._callbacks or ()) < 2:  # noqa: ASYNC110  # no event tells of it
                    await asyncio.sleep(0.01)
            assert len(futures[step]._callbacks or ()) == 2
            futures[step].set_result(None)
            await asyncio.sleep(0.01)
    await serving
    assert len(left) == 4
    # Long before any of the sleeps is over.
    assert loop.time() < left[-1] + 50


async def _sleep_in_a_shield() -> None:
    with anyio.CancelScope(shield=True):
        await asyncio.sleep(2 * LONG)


@pytest.mark.parametrize("wait", [_sleep_in_a_shield, lambda: asyncio.to_thread(time.sleep, 2 * LONG)])
async def test_handler_ends_with_the_block_that_deferred_its_cancellation(
    manager: TaskManager, wait: Callable[[], Awaitable[object]]
) -> None:
    """It ends there even if it also awaits something that takes much longer."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await hang_up_on(app_of(lambda: asyncio.gather(wait(), asyncio.sleep(60))), manager)
    # The clock follows a thread in real time; the other sleep would take 60 s.
    assert began + LONG < loop.time() < began + 50


async def test_handler_that_gives_a_thread_some_time_is_cancelled_after_it(manager: TaskManager) -> None:
    """`asyncio.wait_for` is between the two; on Python 3.11 it waits in a future of its own."""
    order: list[str] = []

    def function() -> None:
        time.sleep(2 * LONG)
        order.append("thread")

    async def handler() -> None:
        try:
            await asyncio.wait_for(asyncio.to_thread(function), 30)
        finally:
            order.append("released")

    await hang_up_on(app_of(handler), manager)
    assert order == ["thread", "released"]


async def test_shield_of_the_application_holds_no_request_off(manager: TaskManager) -> None:
    """The shielded task continues in any case, so the handler that awaits it need not wait."""
    loop = asyncio.get_running_loop()

    async def fill() -> str:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(2)
        return "price"

    shared = manager.create_task(fill(), group="cache")
    began = loop.time()
    await hang_up_on(app_of(lambda: _by_await(shared)), manager)
    assert loop.time() == pytest.approx(began + LONG, abs=0.01)
    assert await shared == "price"


async def test_reader_is_left_alone_where_a_task_of_the_request_awaits_it(manager: TaskManager) -> None:
    """That task would forward its own cancellation to it."""
    log = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def read() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            await asyncio.sleep(CLEANUP)
            log.append("closed")

        async def supervise() -> None:
            await create_task(read())
            log.append("over")

        await create_task(supervise())

    await hang_up_on(app, manager)
    assert log == ["closed", "over"]


async def test_function_that_waits_for_a_thread_of_its_executor_is_cancelled(manager: TaskManager) -> None:
    """It has not started, so the cancellation keeps it from starting."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    release, seen = threading.Event(), list[str]()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(release.wait, 60)

        async def handler() -> None:
            await asyncio.get_running_loop().run_in_executor(executor, seen.append, "ran")

        async with asyncio.timeout(30):
            await hang_up_on(app_of(handler), manager)
        release.set()
    assert seen == []


# --- tasks of others ---------------------------------------------------------------------------------------


async def _by_await(task: asyncio.Task[str]) -> object:
    return await task


async def _by_wait(task: asyncio.Task[str]) -> object:
    return await asyncio.wait({task})


async def _by_wait_for(task: asyncio.Task[str]) -> object:
    return await asyncio.wait_for(task, 30)


async def _by_shield(task: asyncio.Task[str]) -> object:
    return await asyncio.shield(task)


async def _inside_timeout(task: asyncio.Task[str]) -> object:
    async with asyncio.timeout(30):
        return await task


async def _by_gather(task: asyncio.Task[str]) -> object:
    return await asyncio.gather(task, asyncio.sleep(60), create_task(asyncio.sleep(60)))


async def _in_a_plain_task(task: asyncio.Task[str]) -> object:
    return await asyncio.create_task(_by_await(task))


async def _in_a_task_of_the_request(task: asyncio.Task[str]) -> object:
    return await create_task(_by_await(task))


async def _in_asyncios_group(task: asyncio.Task[str]) -> object:
    async with asyncio.TaskGroup() as group:
        group.create_task(_by_await(task))
    return None


async def _in_a_group(task: asyncio.Task[str]) -> object:
    async with TaskGroup() as group:
        group.create_task(_by_await(task))
    return None


async def _in_anyios_group(task: asyncio.Task[str]) -> object:
    async with anyio.create_task_group() as group:
        group.start_soon(_by_await, task)
    return None


WAYS = [
    _by_await,
    _by_wait,
    _by_wait_for,
    _by_shield,
    _inside_timeout,
    _by_gather,
    _in_a_plain_task,
    _in_a_task_of_the_request,
    _in_asyncios_group,
    _in_a_group,
    _in_anyios_group,
]
# Code that cancels the awaited task in a separate step also reaches a plain task.
WAYS_WITH_A_PLAIN_TASK = [
    way for way in WAYS if way not in (_by_wait_for, _in_asyncios_group, _in_anyios_group)
]


@pytest.mark.parametrize("way", WAYS, ids=lambda function: function.__name__)
async def test_task_of_the_application_continues_and_the_handler_ends_at_once(
    manager: TaskManager, way: Callable[[asyncio.Task[str]], Awaitable[object]]
) -> None:
    """The disconnect stops where the request ends, however the handler awaits what is not its own."""
    loop = asyncio.get_running_loop()
    shared = manager.create_task(asyncio.sleep(2, "price"), group="cache")
    began = loop.time()
    await hang_up_on(app_of(lambda: way(shared)), manager)
    assert loop.time() == pytest.approx(began + LONG, abs=0.01)
    assert await shared == "price"
    assert shared.cause is None
    assert not shared.cancelling()


@pytest.mark.parametrize("way", WAYS_WITH_A_PLAIN_TASK, ids=lambda function: function.__name__)
async def test_plain_task_of_the_application_continues(
    manager: TaskManager, way: Callable[[asyncio.Task[str]], Awaitable[object]]
) -> None:
    """One that the application has created outside of requests."""
    shared = asyncio.create_task(asyncio.sleep(2, "price"), context=contextvars.Context())
    await hang_up_on(app_of(lambda: way(shared)), manager)
    assert await shared == "price"
    assert not shared.cancelling()


async def test_plain_task_that_another_request_awaits_continues(manager: TaskManager) -> None:
    """The cache that one request fills for all is shared, although that request has created the task."""
    cache: list[asyncio.Task[str]] = []
    answers = []

    async def handler() -> None:
        if not cache:
            cache.append(asyncio.create_task(asyncio.sleep(2, "price")))
        answers.append(await cache[0])

    middleware = TaskGroupMiddleware(app_of(handler), manager=manager)
    first, second = FakeConnection(), FakeConnection()
    serving = [asyncio.create_task(connection.run(middleware)) for connection in (first, second)]
    await asyncio.sleep(LONG)
    first.disconnect()
    await asyncio.gather(*serving)
    assert answers == ["price"]
    assert second.status == 200


async def test_plain_task_of_the_request_alone_is_cancelled(manager: TaskManager) -> None:
    """A task that it created and no other code awaits is its own."""
    tasks = []

    async def handler() -> None:
        tasks.append(asyncio.create_task(asyncio.sleep(60)))
        await tasks[0]

    await hang_up_on(app_of(handler), manager)
    assert tasks[0].cancelled()


async def test_explicit_cancel_of_the_awaited_task_keeps_asyncios_meaning(manager: TaskManager) -> None:
    """While the client is there, and from a handler that cleans up."""
    shared = manager.create_task(asyncio.sleep(60), group="cache")

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            shared.cancel("no longer needed")

    await hang_up_on(app_of(handler), manager)
    assert shared.cancelled()
    assert shared.cause is not None
    assert shared.cause.kind is CancelKind.EXPLICIT


async def test_task_that_is_awaited_in_cleanup_can_be_cancelled_by_others(manager: TaskManager) -> None:
    """The handler's cancellation has been dealt with before: this one is not forwarded by it."""
    shared = manager.create_task(asyncio.sleep(60), group="cache")
    seen = []

    async def handler() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await shared
            except asyncio.CancelledError:
                seen.append(shared.done())
                raise

    asyncio.get_running_loop().call_later(1, shared.cancel)
    await hang_up_on(app_of(handler), manager)
    assert seen == [True]
    assert shared.cancelled()


async def test_timeout_in_the_handler_keeps_asyncios_meaning(manager: TaskManager) -> None:
    """A timeout that runs out while the client is there is forwarded."""
    shared = manager.create_task(asyncio.sleep(60), group="cache")

    async def handler() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await shared

    connection = FakeConnection()
    await connection.run(TaskGroupMiddleware(app_of(handler), manager=manager))
    assert connection.status == 200
    assert shared.cancelled()


async def test_wait_for_that_expires_after_the_disconnect_raises_its_timeout(manager: TaskManager) -> None:
    """It is no cancellation of the request, from which the task of the application would be kept."""
    shared = manager.create_task(asyncio.sleep(60), group="cache")
    seen = []

    async def handler() -> None:
        try:
            await asyncio.wait_for(shared, 1)
        except Exception as error:
            seen.append(type(error))

    await hang_up_on(app_of(handler), manager, post())
    assert seen == [TimeoutError]
    shared.cancel()


@pytest.mark.parametrize("way", [_by_await, _by_gather], ids=lambda function: function.__name__)
async def test_second_cancel_before_the_handler_wakes_reaches_no_task_of_others(
    manager: TaskManager, way: Callable[[asyncio.Task[str]], Awaitable[object]]
) -> None:
    """A server shuts down in the same turn of the loop in which the client leaves."""
    shared = manager.create_task(asyncio.sleep(2, "price"), group="cache")
    host: list[asyncio.Task[object]] = []

    async def handler() -> None:
        host.append(asyncio.current_task())  # type: ignore[arg-type]  # it runs in one
        await way(shared)

    def rule(_: Scope) -> bool:
        # This runs before the cancellation, whose delivery is behind it in the loop.
        asyncio.get_running_loop().call_soon(host[0].cancel)
        return True

    connection = FakeConnection()
    middleware = TaskGroupMiddleware(app_of(handler), manager=manager, cancel_handler=rule)
    serving = asyncio.create_task(connection.run(middleware))
    await asyncio.sleep(LONG)
    connection.disconnect()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert await shared == "price"


async def test_cancellation_from_before_the_disconnect_is_not_taken_for_its_own(manager: TaskManager) -> None:
    """A handler that has swallowed one awaits a task of the application, which others then cancel."""
    shared = manager.create_task(asyncio.sleep(60), group="cache")

    async def handler() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)
        with pytest.raises(asyncio.CancelledError):
            await shared
        assert shared.cancelled()
        task.uncancel()

    asyncio.get_running_loop().call_later(1, shared.cancel)
    await hang_up_on(app_of(handler), manager, post())
    assert shared.cancelled()


async def test_grace_that_outlasts_the_request_spares_tasks_of_others(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Late tasks are cancelled after the request, but not the application's tasks that they await."""
    shared = manager.create_task(asyncio.sleep(60, "price"), group="cache")
    left: list[ManagedTask[object]] = []

    async def handler() -> None:
        left.append(create_task(_by_await(shared)))
        await asyncio.sleep(2 * LONG)

    with caplog.at_level(logging.ERROR, "otel_tasks"):
        await hang_up_on(app_of(handler), manager, post(), grace=20)
    assert not left[0].done()
    assert await shared == "price"
    assert left[0].cancelled()
    assert not stopping


async def test_handler_that_awaits_a_task_of_the_application_several_times_is_woken_once(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Each gather() around it forwards the cancellation; asyncio would log a second wake-up."""
    shared = manager.create_task(asyncio.sleep(2, "price"), group="cache")
    await hang_up_on(app_of(lambda: asyncio.gather(asyncio.gather(shared), shared, shared)), manager)
    assert await shared == "price"
    assert caplog.messages == []


async def test_end_of_a_request_cancels_no_task_of_others(manager: TaskManager) -> None:
    """A task that is left over is cancelled; what it awaits of the application is not."""
    shared = manager.create_task(asyncio.sleep(2, "price"), group="cache")
    left: list[ManagedTask[object]] = []

    async def handler() -> None:
        left.append(create_task(_by_await(shared)))
        await asyncio.sleep(0.1)

    await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    assert left[0].cancelled()
    assert left[0].cause is not None
    assert left[0].cause.kind is CancelKind.SCOPE_ENDED
    assert await shared == "price"


async def test_gather_that_loses_its_handler_logs_nothing(manager: TaskManager) -> None:
    """Later exceptions of its children are retrieved (asyncio would log them, and fail this test)."""

    async def fail() -> None:
        await asyncio.sleep(1)
        raise ValueError("unheard")

    async def observe() -> None:
        await asyncio.wait([shared])
        shared.exception()

    shared = manager.create_task(fail(), group="cache")
    observer = asyncio.create_task(observe())
    await hang_up_on(app_of(lambda: asyncio.gather(shared)), manager)
    await observer


# --- work that outlives the request ------------------------------------------------------------------------


async def test_late_task_has_a_trace_of_its_own(manager: TaskManager, spans: SpanRecorder) -> None:
    """The request's span has ended: the task links to it instead of being its child."""
    stray = []

    async def late() -> None:
        await asyncio.sleep(1)
        await create_task(asyncio.sleep(0), name="in the root")
        await manager.create_task(asyncio.sleep(0), name="in a group", group="outbox")

    async def handler() -> None:
        stray.append(asyncio.create_task(late()))

    tracer = spans.provider.get_tracer("server")
    with tracer.start_as_current_span("request") as server:
        await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    await stray[0]
    for name in ("in the root", "in a group"):
        span = spans.span(name)
        assert span.parent is None
        assert [link.context.span_id for link in span.links] == [server.get_span_context().span_id]


async def test_task_that_was_started_in_a_shield_and_outlives_its_request_belongs_to_the_manager(
    manager: TaskManager,
) -> None:
    """Its context names the request's cleanup, which is over."""
    sessions = []
    groups = []

    async def session() -> None:
        await asyncio.sleep(1)
        task = create_task(asyncio.sleep(1))
        groups.append(task.group)
        await task

    async def handler() -> None:
        async with uncancellable():
            sessions.append(asyncio.create_task(session()))

    await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    await sessions[0]
    assert [group.parent for group in groups] == [None]
    assert groups[0].manager is manager


async def test_task_that_outlives_its_request_keeps_no_task_of_it(manager: TaskManager) -> None:
    """Its context refers to the request, but not to the tasks that were cancelled with it."""
    sessions = []
    ended: list[weakref.ref[ManagedTask[None]]] = []

    async def handler() -> None:
        sessions.append(asyncio.create_task(asyncio.sleep(5)))
        ended.append(weakref.ref(create_task(asyncio.sleep(60))))
        await asyncio.sleep(60)

    await hang_up_on(app_of(handler), manager)
    gc.collect()
    assert [reference() for reference in ended] == [None]
    await sessions[0]


async def test_uncancellable_after_the_request_does_nothing(manager: TaskManager) -> None:
    """A plain task that outlives its request is outside of it."""
    stray: list[asyncio.Task[str]] = []

    async def late() -> str:
        await asyncio.sleep(1)
        async with uncancellable():
            return create_task(asyncio.sleep(0)).group.name

    async def handler() -> None:
        stray.append(asyncio.create_task(late()))

    await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    assert await stray[0] == "root"


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


# --- two middlewares in one stack --------------------------------------------------------------------------


async def test_inner_middleware_decides_for_its_part(manager: TaskManager) -> None:
    """Its cancel_handler and grace hold below it, and its on_exit for the group of both."""
    seen = []

    async def inner_app() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(round(asyncio.get_running_loop().time() - began, 2))

    began = asyncio.get_running_loop().time()
    inner = TaskGroupMiddleware(app_of(inner_app), manager=manager, cancel_handler=True, grace=2)
    await hang_up_on(inner, manager, post(), cancel_handler=False)
    assert seen == [LONG + 2]


async def test_outer_middleware_decides_behind_the_inner_part(manager: TaskManager) -> None:
    """The rest of the application is not the inner one's; the group ends as the inner one says."""
    finished = []

    async def part() -> None:
        create_task(asyncio.sleep(1)).add_done_callback(lambda task: finished.append(task.cancelled()))

    inner = TaskGroupMiddleware(app_of(part), manager=manager, cancel_handler=True, on_exit="wait")
    rules = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await inner(scope, receive, send)
        rules.append(require_request("test").rules)

    await FakeConnection().run(TaskGroupMiddleware(app, manager=manager, cancel_handler=False))
    assert rules[0].cancel_handler is False
    assert finished == [False]


async def test_options_that_an_inner_middleware_cannot_decide_are_named_once(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A request has one of each; the warning says where to set them."""
    inner = TaskGroupMiddleware(app_of(lambda: asyncio.sleep(0)), manager=manager, detect_after=1, span=True)
    with caplog.at_level(logging.WARNING, logger="otel_tasks"):
        for _ in range(2):
            await FakeConnection().run(TaskGroupMiddleware(inner, manager=manager))
    assert [record.message for record in caplog.records] == [
        "TaskGroupMiddleware stands behind another one, which decides about detect_after=1, span=True: "
        "set it there"
    ]


async def test_inner_middleware_in_a_context_of_its_own_passes_through(manager: TaskManager) -> None:
    """A framework may start a part of an application without the request's context."""
    inner = TaskGroupMiddleware(app_of(lambda: asyncio.sleep(0)), manager=manager)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.create_task(inner(scope, receive, send), context=contextvars.Context())

    connection = FakeConnection()
    await connection.run(TaskGroupMiddleware(app, manager=manager))
    assert connection.status == 200


async def test_group_that_is_used_after_its_request_moves_tasks_to_the_manager(
    manager: TaskManager,
) -> None:
    """A plain task that has kept the group object starts its tasks with the manager as well."""
    stray: list[asyncio.Task[tuple[str, str]]] = []

    async def late(tasks: TaskGroup) -> tuple[str, str]:
        await asyncio.sleep(1)
        async with tasks.group("block") as block:
            return tasks.create_task(asyncio.sleep(0)).group.name, str(block.parent and block.parent.name)

    async def handler() -> None:
        stray.append(asyncio.create_task(late(request_group())))

    await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    assert await stray[0] == ("root", "root")


async def test_context_of_a_request_that_is_over_names_the_manager_outside_of_loops_too(
    manager: TaskManager,
) -> None:
    """A thread that has kept the context finds the manager's root."""
    contexts = []

    async def handler() -> None:
        contexts.append(contextvars.copy_context())

    await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
    found = await asyncio.to_thread(contexts[0].run, current_group)
    assert found.name == "root"
