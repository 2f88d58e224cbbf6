"""The reach of a disconnect: listeners, shields, and the work of other requests."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from otel_tasks import CancelKind, TaskGroup, TaskManager, create_task
from otel_tasks._core.binding import stopping
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.hang_ups import CLEANUP, LONG, START, app_of, hang_up_on, post

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks import ManagedTask
    from otel_tasks._asgi.connection import Receive, Scope, Send


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


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
