"""Tasks that a request starts while it cleans up: where they run, and that they end before the request."""

from __future__ import annotations

import asyncio
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING

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
from otel_tasks.asgi import TaskGroupMiddleware, request_group, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.hang_ups import BODY, CLEANUP, LONG, START, app_of, hang_up_on, post
from tests.helpers import open_groups

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks import ManagedTask
    from otel_tasks._asgi.connection import Receive, Scope, Send


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


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
