"""One request among others: what outlives it, and two middlewares around it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import TaskGroup, TaskManager, create_task, current_group
from otel_tasks._asgi.naming import name_facts, name_from
from otel_tasks._asgi.request import require_request
from otel_tasks._core.binding import current_binding
from otel_tasks.asgi import TaskGroupMiddleware, request_group, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.hang_ups import LONG, app_of, hang_up_on, post

if TYPE_CHECKING:
    from otel_tasks import ManagedTask
    from otel_tasks._asgi.connection import Receive, Scope, Send


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


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


async def test_detached_task_starts_tasks_in_the_group_of_its_request(manager: TaskManager) -> None:
    """It belongs to the request, which is kept for it once the server has let it go."""
    detached = []

    async def outlive() -> TaskGroup:
        await asyncio.sleep(1)
        task = create_task(asyncio.sleep(0))
        await task
        return task.group

    async def handler() -> None:
        detached.append(create_task(outlive()))

    await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager, on_exit="detach"))
    gc.collect()
    assert await detached[0] is detached[0].group


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


async def test_context_that_outlives_a_request_does_not_keep_it_in_memory(manager: TaskManager) -> None:
    """uvicorn's keep-alive timer has the context of a request for seconds, but not its connection."""
    contexts: list[contextvars.Context] = []

    async def handler() -> None:
        contexts.append(contextvars.copy_context())

    connection = FakeConnection()
    reference = weakref.ref(connection)
    await connection.run(TaskGroupMiddleware(app_of(handler), manager=manager))
    del connection
    gc.collect()
    assert reference() is None
    assert contexts[0].run(current_group) is manager.get_group("root")


async def test_context_names_a_request_that_is_over(manager: TaskManager) -> None:
    """Its route is known, although its scope is not kept."""
    bindings: list[Any] = []

    async def handler() -> None:
        bindings.append(current_binding.get())

    connection = FakeConnection(path="/report/3")
    connection.scope["path_template"] = "/report/{id}"
    await connection.run(TaskGroupMiddleware(app_of(handler), manager=manager))
    bound = bindings[0]
    assert (bound.closed, bound(), bound.manager) == (True, None, manager)
    assert name_from(name_facts(connection.scope)) == "GET /report/{id}"
    if sys.version_info >= (3, 12):
        assert bound.name == "GET /report/{id}"


async def test_request_whose_tasks_have_ended_is_freed_at_once(manager: TaskManager) -> None:
    """Nothing is left to the garbage collector; a group that was kept has its name, and takes late tasks."""
    kept: list[Any] = []

    async def work() -> int:
        return 1

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        group = request_group()
        kept.extend([group, weakref.ref(require_request("test")), contextvars.copy_context()])
        assert await group.create_task(work()) == 1
        await app_of(work)(scope, receive, send)

    connection = FakeConnection(path="/report/3")
    connection.scope["path_template"] = "/report/{id}"
    gc.collect()
    gc.disable()
    try:
        await connection.run(TaskGroupMiddleware(app, manager=manager))
        group, reference, _ = kept
        assert reference() is None
    finally:
        gc.enable()
    assert group.name == "GET /report/{id}"
    late = group.create_task(work())
    assert (late.group, await late) == (manager.get_group("root"), 1)


@pytest.mark.parametrize(
    "ends_by", ["hang-up with tasks", "hang-up without tasks", "hang-up and grace", "return"]
)
async def test_request_that_was_stopped_is_freed_at_once(manager: TaskManager, ends_by: str) -> None:
    """A request whose client leaves, or whose tasks outlive its handler, leaves no cycle behind either."""
    kept: list[Any] = []

    async def handler() -> None:
        kept.append(weakref.ref(require_request("test")))
        if ends_by == "hang-up without tasks":
            await asyncio.sleep(60)
            return
        task = create_task(asyncio.sleep(60))
        kept.append(request_group())
        if ends_by != "return":
            await task

    gc.collect()
    gc.disable()
    try:
        if ends_by == "return":
            await FakeConnection().run(TaskGroupMiddleware(app_of(handler), manager=manager))
        else:
            grace = 1.0 if ends_by == "hang-up and grace" else 0.0
            await hang_up_on(app_of(handler), manager, grace=grace)
        # The callbacks of the last tasks.
        await asyncio.sleep(0)
        assert kept[0]() is None
    finally:
        gc.enable()
    for group in kept[1:]:
        late = group.create_task(asyncio.sleep(0, 1))
        assert (late.group, await late) == (manager.get_group("root"), 1)


async def test_request_whose_grace_is_not_over_is_kept_for_its_end(manager: TaskManager) -> None:
    """The cancellation that is still due finds the request, even if its handler has returned."""
    kept: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        kept.append(weakref.ref(require_request("test")))
        await asyncio.sleep(2 * LONG)

    await hang_up_on(app, manager, grace=5 * LONG)
    gc.collect()
    assert kept[0]() is not None
    await asyncio.sleep(5 * LONG)
    gc.collect()
    assert kept[0]() is None


async def test_two_loops_in_two_threads_share_a_middleware(manager: TaskManager) -> None:
    """Each request is watched in its own loop, also while a task of the other loop is current."""
    found: list[bool] = []

    async def handler() -> None:
        found.append(require_request("test").sweeper.loop is asyncio.get_running_loop())
        if threading.current_thread() is main:
            thread = threading.Thread(target=lambda: asyncio.run(FakeConnection().run(middleware)))
            thread.start()
            thread.join()

    main = threading.current_thread()
    middleware = TaskGroupMiddleware(app_of(handler), manager=manager)
    for _ in range(2):
        await FakeConnection().run(middleware)
    assert found == [True] * 4


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


@pytest.mark.parametrize(("outer", "inner", "cancelled"), [(False, True, True), (False, False, False)])
async def test_inner_middleware_decides_though_the_client_left_before_its_part(
    manager: TaskManager, outer: bool, inner: bool, cancelled: bool
) -> None:
    """What comes before the part takes long; its rule holds from where the part begins."""
    ended = []

    async def part() -> None:
        try:
            await asyncio.sleep(1)
            ended.append("finished")
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    below = TaskGroupMiddleware(app_of(part), manager=manager, cancel_handler=inner)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        await below(scope, receive, send)

    await hang_up_on(app, manager, post(), cancel_handler=outer)
    assert ended == ["cancelled" if cancelled else "finished"]


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
        "TaskGroupMiddleware is inside another one, so detect_after=1, span=True has no effect here: "
        "set it on the outer one"
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
