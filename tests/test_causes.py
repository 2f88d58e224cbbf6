"""The cause of every task: each way to nest tasks below a request, for each way to cancel them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import anyio
import pytest

from otel_tasks import (
    CancelCause,
    CancelEvent,
    CancelKind,
    ManagedTask,
    TaskGroup,
    TaskManager,
    create_task,
    managed_task,
    wait_with_cancellation,
)
from otel_tasks.asgi import TaskGroupMiddleware, request_group
from otel_tasks.testing import FakeConnection, SpanRecorder

from .helpers import rest, settle

ROUTE = "DELETE /jobs/{job}"


class Cause(NamedTuple):
    """What a cause says, without its moment."""

    kind: CancelKind
    message: str | None
    asked_by: str | None
    origin: str | None
    """The name of the span from which it came."""


class World:
    """One request, served by a fake server, and the tasks that its handler has started."""

    def __init__(self, spans: SpanRecorder) -> None:
        self.spans = spans
        self.manager = TaskManager("app", tracer_provider=spans.provider)
        self.other = TaskManager("other", tracer_provider=spans.provider)
        self.connection = FakeConnection(method="DELETE", path="/jobs/7")
        self.tasks: list[ManagedTask[Any]] = []
        self.server: asyncio.Task[None]
        self.hosts: list[asyncio.Task[Any]] = []
        # The one task that is cancelled by itself.
        self.top: ManagedTask[Any] | None = None

    def cause_of(self, task: ManagedTask[Any]) -> Cause | None:
        cause = task.cause
        if cause is None:
            return None
        names = {span.context.span_id: span.name for span in self.spans.finished if span.context is not None}
        origin = None if cause.origin is None else names[cause.origin.span_id]
        return Cause(cause.kind, cause.message, cause.asked_by, origin)

    def keep(self, task: ManagedTask[Any]) -> ManagedTask[Any]:
        self.tasks.append(task)
        return task

    def leaf(self, group: TaskGroup | None = None) -> ManagedTask[Any]:
        """Start a task that rests, in the current group or in another one."""
        where = create_task if group is None else group.create_task
        return self.keep(where(rest(), name=f"leaf-{len(self.tasks)}"))

    def task(self, coro: Coroutine[Any, Any, Any], group: TaskGroup | None = None) -> ManagedTask[Any]:
        where = create_task if group is None else group.create_task
        return self.keep(where(coro, name=f"task-{len(self.tasks)}"))

    async def serve(self, handler: Callable[[World], Awaitable[object]]) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            scope["route"] = SimpleNamespace(path="/jobs/{job}")
            host = asyncio.current_task()
            assert host is not None
            self.hosts.append(host)
            await handler(self)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body"})

        middleware = TaskGroupMiddleware(app, manager=self.manager, cancel_handler=True)
        tracer = self.spans.provider.get_tracer("server")
        with suppress(TimeoutError, ValueError, ExceptionGroup), tracer.start_as_current_span(ROUTE):
            await self.connection.run(middleware)


# --- how tasks nest ----------------------------------------------------------------------------------
# Each starts its tasks and waits, for an hour.


async def rests(world: World) -> None:
    world.leaf()
    await rest()


async def awaits(world: World) -> None:
    await world.leaf()


async def gathers(world: World) -> None:
    await asyncio.gather(world.leaf(), world.leaf())


async def gathers_gathered(world: World) -> None:
    await asyncio.gather(asyncio.gather(world.leaf()), world.leaf())


async def waits(world: World) -> None:
    await asyncio.wait([world.leaf()])


async def shields(world: World) -> None:
    await asyncio.shield(world.leaf())


async def awaits_in_timeout(world: World) -> None:
    async with asyncio.timeout(3000):
        await world.leaf()


async def waits_for(world: World) -> None:
    await asyncio.wait_for(world.leaf(), 3000)


async def awaits_in_plain_task(world: World) -> None:
    await asyncio.create_task(awaits(world))


async def awaits_in_asyncio_group(world: World) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(awaits(world))


async def awaits_in_anyio_group(world: World) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(awaits, world)


async def block(world: World) -> None:
    async with TaskGroup("block") as group:
        world.leaf(group)


async def block_that_rests(world: World) -> None:
    async with TaskGroup("block") as group:
        world.leaf(group)
        await rest()


async def block_that_awaits(world: World) -> None:
    async with TaskGroup("block") as group:
        world.leaf(group)
        await world.leaf(group)


async def block_in_block(world: World) -> None:
    async with TaskGroup("outer") as outer:
        world.leaf(outer)
        await block(world)


async def block_in_block_that_rests(world: World) -> None:
    async with TaskGroup("outer") as outer:
        world.leaf(outer)
        await block_that_rests(world)


async def block_in_asyncio_group(world: World) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(block_that_rests(world))
        await block_that_rests(world)


async def block_in_anyio_group(world: World) -> None:
    """As behind Starlette's BaseHTTPMiddleware."""
    async with anyio.create_task_group() as group:
        group.start_soon(block_that_rests, world)


async def block_in_plain_task(world: World) -> None:
    await asyncio.create_task(block_that_rests(world))


async def task_with_block(world: World) -> None:
    await world.task(block(world))


async def task_with_block_that_rests(world: World) -> None:
    world.task(block_that_rests(world))
    await rest()


async def task_that_awaits(world: World) -> None:
    await world.task(awaits(world))


async def task_that_gathers(world: World) -> None:
    await world.task(gathers(world))


async def task_that_waits_for(world: World) -> None:
    await world.task(waits_for(world))


async def task_that_awaits_other_managers(world: World) -> None:
    await world.task(awaits_other_managers(world))


async def awaits_other_managers(world: World) -> None:
    await world.keep(world.other.create_task(rest()))


async def block_with_task_with_block(world: World) -> None:
    async with TaskGroup("outer") as outer:
        world.task(block_that_rests(world), outer)


async def decorated(world: World) -> None:
    @managed_task
    async def work() -> None:
        await world.leaf()

    await work()


async def block_with_decorated(world: World) -> None:
    async with TaskGroup("block"):
        await decorated(world)


SHAPES = (
    rests,
    awaits,
    gathers,
    gathers_gathered,
    waits,
    shields,
    awaits_in_timeout,
    waits_for,
    awaits_in_plain_task,
    awaits_in_asyncio_group,
    awaits_in_anyio_group,
    block,
    block_that_rests,
    block_that_awaits,
    block_in_block,
    block_in_block_that_rests,
    block_in_asyncio_group,
    block_in_anyio_group,
    block_in_plain_task,
    task_with_block,
    task_with_block_that_rests,
    task_that_awaits,
    task_that_gathers,
    task_that_waits_for,
    task_that_awaits_other_managers,
    block_with_task_with_block,
    decorated,
    block_with_decorated,
)

# Where the handler's own cancellation reaches no task: they go on until the request ends.
NOT_FORWARDED = {rests, waits, shields, task_with_block_that_rests}
# Shapes with a task that is not the request's: its client's leaving and its end spare that.
OF_OTHERS = {task_that_awaits_other_managers}

IN_ALIEN_GROUP = {
    awaits_in_asyncio_group,
    awaits_in_anyio_group,
    block_in_asyncio_group,
    block_in_anyio_group,
}

Shape = Callable[[World], Coroutine[Any, Any, None]]
END = Cause(CancelKind.SCOPE_ENDED, None, ROUTE, ROUTE)


# --- how they are cancelled --------------------------------------------------------------------------
# Each serves a request whose handler runs a shape, and returns when all is over.


async def started(world: World, handler: Callable[[World], Awaitable[object]]) -> None:
    """Serve the request until its tasks have made their first steps."""
    world.server = asyncio.create_task(world.serve(handler), name="server")
    await asyncio.sleep(1)


async def ended(world: World) -> None:
    world.server.cancel("the test is over")
    await asyncio.wait([world.server])


async def client_leaves(world: World, shape: Shape) -> Cause:
    if shape in OF_OTHERS:
        pytest.skip("the work of others goes on")
    await started(world, shape)
    world.connection.disconnect()
    await asyncio.wait([world.server])
    return Cause(CancelKind.CLIENT_DISCONNECT, None, ROUTE, ROUTE)


async def server_cancels(world: World, shape: Shape) -> Cause:
    """As uvicorn does."""
    await started(world, shape)
    world.server.cancel("time is up")
    await asyncio.wait([world.server])
    return Cause(CancelKind.SHUTDOWN, "time is up", ROUTE, ROUTE)


async def server_cancels_in_a_callback(world: World, shape: Shape) -> Cause:
    await started(world, shape)
    asyncio.get_running_loop().call_soon(world.server.cancel)
    await asyncio.wait([world.server])
    return Cause(CancelKind.SHUTDOWN, None, ROUTE, ROUTE)


async def server_cancels_through_its_group(world: World, shape: Shape) -> Cause:
    """As hypercorn does: its task of a connection hosts an asyncio.TaskGroup."""

    async def connection() -> None:
        async with asyncio.TaskGroup() as group:
            world.server = group.create_task(world.serve(shape))

    task = asyncio.create_task(connection())
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait([task])
    return Cause(CancelKind.SHUTDOWN, None, ROUTE, ROUTE)


async def task_cancels_the_handler(world: World, shape: Shape) -> Cause:
    await started(world, shape)
    await by_janitor(world, lambda: world.hosts[0].cancel("no more"))
    await asyncio.wait([world.server])
    return Cause(CancelKind.EXPLICIT, "no more", "janitor", "janitor")


async def other_request_cancels_the_handler(world: World, shape: Shape) -> Cause:
    await started(world, shape)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        world.hosts[0].cancel("no more")

    await FakeConnection(method="POST").run(TaskGroupMiddleware(app, manager=world.manager))
    await asyncio.wait([world.server])
    return Cause(CancelKind.EXPLICIT, "no more", "POST", None)


async def task_cancels_the_group(world: World, shape: Shape) -> Cause:
    groups = []

    async def handler(world: World) -> None:
        groups.append(request_group())
        await shape(world)

    await started(world, handler)
    await by_janitor(world, lambda: groups[0].cancel("enough"))
    await ended(world)
    return Cause(CancelKind.EXPLICIT, "enough", "janitor", "janitor")


async def manager_shuts_down(world: World, shape: Shape) -> Cause:
    await started(world, shape)
    await asyncio.create_task(shut_down(world), name="lifespan")
    await ended(world)
    return Cause(CancelKind.SHUTDOWN, "manager 'app' is shutting down", "lifespan", None)


async def shut_down(world: World) -> None:
    await world.manager.shutdown(grace=0)


async def timeout_around(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        async with asyncio.timeout(5):
            await shape(world)

    await started(world, handler)
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.TIMEOUT, "an asyncio timeout expired", None, ROUTE)


async def wait_for_around(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        await asyncio.wait_for(shape(world), 5)

    await started(world, handler)
    await asyncio.wait([world.server])
    if sys.version_info < (3, 12) and shape in IN_ALIEN_GROUP:
        # There wait_for() runs its coroutine in a plain task of asyncio's, in which the group then stands.
        pytest.skip("nothing tells why a plain task was cancelled in which no block of this library stands")
    return own(world, shape, CancelKind.TIMEOUT, "an asyncio timeout expired", None, ROUTE)


async def anyio_timeout_around(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        with anyio.fail_after(5):
            await shape(world)

    await started(world, handler)
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.TIMEOUT, "an anyio timeout expired", None, ROUTE)


async def anyio_scope_around(world: World, shape: Shape) -> Cause:
    scopes = []

    async def handler(world: World) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await shape(world)

    await started(world, handler)
    await by_janitor(world, lambda: scopes[0].cancel())
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.EXPLICIT, "an anyio cancel scope was cancelled", "janitor", "janitor")


async def sibling_fails_in_asyncio_group(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail_later())
            await shape(world)

    await started(world, handler)
    await asyncio.wait([world.server])
    text = "a task of an asyncio.TaskGroup failed: ValueError('bad')"
    return own(world, shape, CancelKind.SIBLING_FAILED, text, None, ROUTE)


async def asyncio_group_is_cancelled(world: World, shape: Shape) -> Cause:
    if sys.version_info < (3, 15):
        pytest.skip("asyncio.TaskGroup.cancel() came with Python 3.15")
    groups = []

    async def handler(world: World) -> None:
        async with asyncio.TaskGroup() as group:
            groups.append(group)
            await shape(world)

    await started(world, handler)
    await by_janitor(world, lambda: groups[0].cancel())
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.EXPLICIT, "an asyncio.TaskGroup was cancelled", "janitor")


async def sibling_fails(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        async with TaskGroup("top") as group:
            group.create_task(fail_later(), name="bad")
            await shape(world)

    await started(world, handler)
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.SIBLING_FAILED, "bad failed: ValueError('bad')", "bad", "bad")


async def group_times_out(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        async with TaskGroup("top", timeout=5):
            await shape(world)

    await started(world, handler)
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.TIMEOUT, "group timeout of 5 s", None, ROUTE)


async def group_is_cancelled(world: World, shape: Shape) -> Cause:
    groups = []

    async def handler(world: World) -> None:
        async with TaskGroup("top") as group:
            groups.append(group)
            await shape(world)

    await started(world, handler)
    await by_janitor(world, lambda: groups[0].cancel("enough"))
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.EXPLICIT, "enough", "janitor", "janitor")


async def block_raises(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        async with TaskGroup("top") as group:
            world.task(shape(world), group)
            await asyncio.sleep(2)
            raise ValueError("over")

    await started(world, handler)
    await asyncio.wait([world.server])
    return Cause(CancelKind.SCOPE_ENDED, "the block raised ValueError('over')", ROUTE, ROUTE)


async def task_times_out(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        top = create_task(shape(world), timeout=5, name="top")
        tops.append(top)
        await top

    tops: list[ManagedTask[None]] = []
    await started(world, handler)
    await asyncio.wait([world.server])
    # It has no other origin than itself.
    assert world.cause_of(tops[0]) == Cause(CancelKind.TIMEOUT, "timeout of 5 s", None, None)
    return own(world, shape, CancelKind.TIMEOUT, "timeout of 5 s", None, "top")


async def task_is_cancelled(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        world.top = world.task(shape(world))
        await world.top

    await started(world, handler)
    await by_janitor(world, lambda: world.tasks[0].cancel("no more"))
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.EXPLICIT, "no more", "janitor", "janitor")


async def task_is_replaced(world: World, shape: Shape) -> Cause:
    async def handler(world: World) -> None:
        top = create_task(shape(world), name="top")
        await asyncio.sleep(2)
        create_task(asyncio.sleep(0), name="top", on_conflict="replace")
        await asyncio.wait([top])

    await started(world, handler)
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.REPLACED, "replaced by a new task 'top'", ROUTE, ROUTE)


async def event_is_set(world: World, shape: Shape) -> Cause:
    event = CancelEvent()

    async def handler(world: World) -> None:
        await wait_with_cancellation(shape(world), event)

    await started(world, handler)
    event.set(CancelCause(CancelKind.SHUTDOWN, "new version", "deploy"))
    await asyncio.wait([world.server])
    return own(world, shape, CancelKind.SHUTDOWN, "new version", "deploy", None)


async def request_ends(world: World, shape: Shape) -> Cause:
    if shape in OF_OTHERS:
        pytest.skip("the work of others goes on")

    async def handler(world: World) -> None:
        world.task(shape(world))
        await asyncio.sleep(2)

    await started(world, handler)
    await asyncio.wait([world.server])
    return END


WAYS = (
    client_leaves,
    server_cancels,
    server_cancels_in_a_callback,
    server_cancels_through_its_group,
    task_cancels_the_handler,
    other_request_cancels_the_handler,
    task_cancels_the_group,
    manager_shuts_down,
    timeout_around,
    wait_for_around,
    anyio_timeout_around,
    anyio_scope_around,
    sibling_fails_in_asyncio_group,
    asyncio_group_is_cancelled,
    sibling_fails,
    group_times_out,
    group_is_cancelled,
    block_raises,
    task_times_out,
    task_is_cancelled,
    task_is_replaced,
    event_is_set,
    request_ends,
)


async def by_janitor(world: World, action: Callable[[], object]) -> None:
    """Do it in a managed task of the application."""

    async def act() -> None:
        action()

    await asyncio.wait([world.manager.create_task(act(), name="janitor", group="office")])


async def fail_later() -> None:
    await asyncio.sleep(5)
    raise ValueError("bad")


def own(
    world: World, shape: Shape, kind: CancelKind, message: str, asked_by: str | None, origin: str | None
) -> Cause:
    """The cause of what the handler, or its one task, was cancelled for; of the request's end otherwise."""
    cause = Cause(kind, message, asked_by, origin)
    if shape not in NOT_FORWARDED:
        return cause
    if world.top is not None:
        assert world.cause_of(world.top) == cause
        world.tasks.remove(world.top)
    return END


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_cause_is_the_same_at_every_depth(
    way: Callable[[World, Shape], Awaitable[Cause]], shape: Shape, spans: SpanRecorder
) -> None:
    """Every task below the place where a cancellation begins ends with its cause, whatever stands between."""
    world = World(spans)
    expected = await way(world, shape)
    await settle()
    assert world.tasks
    assert {task.name: world.cause_of(task) for task in world.tasks} == {
        task.name: expected for task in world.tasks
    }
    assert all(task.info().started_at is not None for task in world.tasks)
    # What notes the causes of plain tasks is gone.
    assert all(getattr(host.cancel, "__self__", None) is host for host in world.hosts)
