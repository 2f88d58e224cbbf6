"""The cause of every task: each way to nest tasks below a request, for each way to cancel them."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

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
    run_in_thread,
    wait_with_cancellation,
)
from otel_tasks._core import causes, constructs
from otel_tasks._core.causes import covered, unwatch_cancels, watch_cancels
from otel_tasks._core.constructs import known_cause
from otel_tasks.asgi import TaskGroupMiddleware, request_group, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder

from .helpers import kind_of, rest, settle
from .shapes import (
    SHAPES,
    Nest,
    Shape,
    awaits,
    block_that_rests,
    rests,
    shields,
    task_that_awaits_other_managers,
    task_with_block_that_rests,
    waits,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

ROUTE = "DELETE /jobs/{job}"


class Cause(NamedTuple):
    """A cause without its time."""

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


# Where the handler's own cancellation reaches no task: they go on until the request ends.
NOT_FORWARDED = {rests, waits, shields, task_with_block_that_rests}
# Shapes with a task that is not the request's: its client's leaving and its end spare that.
OF_OTHERS = {task_that_awaits_other_managers}

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


async def server_cancels_in_the_grace_of_a_shutdown(world: World, shape: Shape) -> Cause:
    """The event is set by then, and nothing is cancelled before the grace is over."""
    await started(world, shape)
    shutdown = asyncio.create_task(world.manager.shutdown(grace=50), name="lifespan")
    await asyncio.sleep(1)
    world.server.cancel("time is up")
    await asyncio.wait([world.server], timeout=10)
    await asyncio.wait([shutdown])
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
    return own(world, shape, CancelKind.EXPLICIT, "an asyncio.TaskGroup was cancelled", "janitor", "janitor")


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
    server_cancels_in_the_grace_of_a_shutdown,
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
    """Every task below the origin of a cancellation ends with its cause, whatever is in between."""
    world = World(spans)
    expected = await way(world, shape)
    await settle()
    assert world.tasks
    assert {task.name: world.cause_of(task) for task in world.tasks} == {
        task.name: expected for task in world.tasks
    }
    assert all(task.info().started_at is not None for task in world.tasks)
    # The hook that records causes of plain tasks is gone.
    assert all(getattr(host.cancel, "__self__", None) is host for host in world.hosts)


# --- who asks ------------------------------------------------------------------------------------------


async def asked_by(ask: Callable[[Callable[[], None]], Awaitable[object]]) -> str | None:
    """Cancel an event in a request by a way to call a function; who has asked."""
    event = CancelEvent()

    async def handler(world: World) -> None:
        await ask(event.set)

    with SpanRecorder() as spans:
        await World(spans).serve(handler)
    assert event.cause is not None
    return event.cause.asked_by


async def test_handler_is_named_after_its_route() -> None:
    """Not after the server's task, in which it runs."""

    async def here(ask: Callable[[], None]) -> None:
        ask()

    assert await asked_by(here) == ROUTE


async def test_plain_task_of_a_request_is_named_after_the_route() -> None:
    """As a gathered coroutine is, or a handler behind Starlette's BaseHTTPMiddleware."""

    async def here(ask: Callable[[], None]) -> None:
        ask()

    assert await asked_by(lambda ask: asyncio.gather(here(ask))) == ROUTE


async def test_def_handler_is_named_after_its_route() -> None:
    """It runs in a thread, where no task is current."""
    assert await asked_by(asyncio.to_thread) == ROUTE


async def test_managed_task_of_a_request_has_its_own_name() -> None:
    """It says more than the route does; so does the task of a function in a thread."""

    async def here(ask: Callable[[], None]) -> None:
        ask()

    assert await asked_by(lambda ask: create_task(here(ask), name="janitor")) == "janitor"
    assert await asked_by(lambda ask: run_in_thread(ask, name="janitor")) == "janitor"


async def test_callback_has_no_name() -> None:
    """No task makes the request."""

    async def in_callback(ask: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(ask)
        await asyncio.sleep(0)

    assert await asked_by(in_callback) is None


async def test_plain_task_that_outlives_its_request_has_its_own_name(spans: SpanRecorder) -> None:
    """It does not ask for the request, which is over."""
    event, tasks = CancelEvent(), []

    async def late() -> None:
        await asyncio.sleep(1)
        event.set()

    async def handler(world: World) -> None:
        tasks.append(asyncio.create_task(late(), name="session"))

    await World(spans).serve(handler)
    await tasks[0]
    assert event.cause is not None
    assert event.cause.asked_by == "session"


# --- what a cause survives -----------------------------------------------------------------------------


async def test_timeout_that_was_caught_causes_no_later_cancellation(spans: SpanRecorder) -> None:
    """asyncio.timeout() takes its cancellation back; the server's cancels the block after it."""
    world = World(spans)

    async def handler(nest: Nest) -> None:
        async with TaskGroup("outer"):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await rest()
            await block_that_rests(nest)

    assert await server_cancels(world, handler) == world.cause_of(world.tasks[0])


async def test_first_cause_of_a_block_stays(spans: SpanRecorder) -> None:
    """A server that cancels while a timeout's cleanup runs changes nothing."""
    world = World(spans)

    async def handler(nest: Nest) -> None:
        async with asyncio.timeout(0.5), TaskGroup("block") as group:
            nest.task(reluctant(), group)
            await rest()

    await server_cancels(world, handler)
    assert [world.cause_of(task) for task in world.tasks] == [
        Cause(CancelKind.TIMEOUT, "an asyncio timeout expired", None, ROUTE)
    ]


async def reluctant() -> None:
    try:
        await rest()
    finally:
        await asyncio.sleep(2)


async def test_shutdown_reaches_into_an_uncancellable_block(spans: SpanRecorder) -> None:
    """With the same cause, and the task that hosts it is left as it was."""
    world = World(spans)

    async def handler(nest: Nest) -> None:
        async with uncancellable():
            await block_that_rests(nest)

    assert await server_cancels(world, handler) == world.cause_of(world.tasks[0])
    (host,) = world.hosts
    assert getattr(host.cancel, "__self__", None) is host


async def test_server_cancels_a_request_that_has_no_group(spans: SpanRecorder) -> None:
    """It has started no task of its own, and awaits one of the application behind a framework's task."""
    world = World(spans)

    async def wait(nest: Nest) -> None:
        await asyncio.wait_for(nest.keep(nest.other.create_task(rest())), 3000)

    async def handler(nest: Nest) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(wait, nest)

    await server_cancels(world, handler)
    assert [world.cause_of(task) for task in world.tasks] == [Cause(CancelKind.SHUTDOWN, None, ROUTE, ROUTE)]


async def test_asyncio_group_whose_block_raises_ends_the_awaited_tasks(spans: SpanRecorder) -> None:
    """As a block of this library does."""
    world = World(spans)

    async def handler(world: World) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(awaits(world))
            await settle()
            raise ValueError("over")

    await started(world, handler)
    assert [world.cause_of(task) for task in world.tasks] == [
        Cause(CancelKind.SCOPE_ENDED, "the block of an asyncio.TaskGroup raised", ROUTE, ROUTE)
    ]


@pytest.mark.skipif(sys.version_info < (3, 15), reason="asyncio.TaskGroup.cancel() came with Python 3.15")
async def test_asyncio_group_that_is_cancelled_ends_tasks_awaited_in_nested_groups(
    spans: SpanRecorder,
) -> None:
    """Between unwatched plain tasks, the cancelled group is found from below."""
    world = World(spans)
    groups: list[Any] = []

    async def inner() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(awaits(world))

    async def outer() -> None:
        async with asyncio.TaskGroup() as group:
            groups.append(group)
            group.create_task(inner())

    async def handler(world: World) -> None:
        plain = asyncio.create_task(outer())
        await asyncio.sleep(1)
        groups[0].cancel()
        await plain

    await world.serve(handler)
    (task,) = world.tasks
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (
        CancelKind.EXPLICIT,
        "an asyncio.TaskGroup was cancelled",
    )


async def test_asyncio_that_keeps_its_state_elsewhere_breaks_no_cancellation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The cause is then explicit, and the log says so once."""

    def fail(frame: object) -> None:
        raise AttributeError("_task")

    rules = dict.fromkeys(constructs._RULES, fail)
    monkeypatch.setattr(constructs, "_RULES", rules)
    monkeypatch.setattr(causes, "_has_logged", False)
    manager = TaskManager()
    tasks = [manager.create_task(rest()) for _ in range(2)]
    for task in tasks:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await task
    assert [kind_of(task) for task in tasks] == [CancelKind.EXPLICIT] * 2
    (record,) = caplog.records
    assert record.getMessage().startswith("finding the cause of a cancellation raised")


async def test_timeout_of_a_managed_task_itself_is_no_cause_of_its_own() -> None:
    """A task's timeout cancels its blocks; the task itself continues and has no cause."""
    manager = TaskManager()
    inner: list[ManagedTask[None]] = []

    async def work() -> CancelCause | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(1), manager.group("block") as group:
                inner.append(group.create_task(rest()))
                await rest()
        return task.cause

    task = manager.create_task(work())
    assert await task is None
    assert kind_of(inner[0]) is CancelKind.TIMEOUT


async def test_cause_of_a_block_outside_of_a_request_names_the_canceller() -> None:
    """The canceller is a plain task, which the cause names."""
    leaves: list[ManagedTask[None]] = []

    async def host() -> None:
        async with TaskGroup() as group:
            leaves.append(group.create_task(rest()))

    async def stop() -> None:
        task.cancel("no more")

    task = asyncio.create_task(host())
    await settle()
    await asyncio.create_task(stop(), name="stopper")
    await asyncio.wait([task])
    cause = leaves[0].cause
    assert cause is not None
    assert (cause.kind, cause.message, cause.asked_by) == (CancelKind.EXPLICIT, "no more", "stopper")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are delivered otherwise there")
def test_control_c_is_a_shutdown() -> None:
    """It cancels the main task from a signal handler, in whatever task that comes."""
    leaves: list[ManagedTask[None]] = []

    async def main() -> None:
        async with TaskGroup() as group:
            leaves.append(group.create_task(rest()))
            await asyncio.sleep(0.01)
            await asyncio.create_task(interrupt())

    async def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    with asyncio.Runner() as runner, pytest.raises(KeyboardInterrupt):
        runner.run(main())
    cause = leaves[0].cause
    assert cause is not None
    assert (cause.kind, cause.message, cause.asked_by) == (
        CancelKind.SHUTDOWN,
        "interrupted from the keyboard",
        None,
    )


async def test_several_have_the_same_task_watched() -> None:
    """The last one that stops watching restores the task."""
    task = asyncio.create_task(rest())
    watch_cancels(task, None)
    with covered(task, lambda task, message: message == "not you"):
        unwatch_cancels(task)
        await settle()
        assert task.cancel("not you")
        assert not task.cancelling()
        watch_cancels(task, None)
    task.cancel("you")
    assert str(known_cause(task)) == "explicit: you"
    unwatch_cancels(task)
    assert getattr(task.cancel, "__self__", None) is task
    await asyncio.wait([task])
