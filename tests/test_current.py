"""Which manager is current: in requests, managed tasks, threads and blocks, and for the decorator."""

from __future__ import annotations

import asyncio
import inspect
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

import otel_tasks
from otel_tasks import (
    CancelKind,
    ManagedTask,
    TaskGroup,
    TaskManager,
    cancel_all_tasks,
    cancel_group,
    create_task,
    create_task_threadsafe,
    current_group,
    current_manager,
    current_task,
    get_all_task_info,
    global_task_manager,
    managed_task,
    run_in_thread,
    start_service,
    start_task,
    wait_for_task,
)
from otel_tasks.asgi import TaskGroupMiddleware, request_group, uncancellable
from otel_tasks.testing import FakeConnection
from tests.helpers import give, kind_of, rest, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from otel_tasks._asgi.connection import Receive, Scope, Send

BY_NAME = (start_task, start_service, wait_for_task, cancel_group, cancel_all_tasks)
LONG = 0.06


@pytest.fixture
def shop() -> TaskManager:
    return TaskManager("shop")


@pytest.fixture
def other() -> TaskManager:
    return TaskManager("other")


async def look() -> TaskManager:
    return current_manager()


@managed_task
async def decorated() -> TaskManager:
    return current_manager()


@managed_task(group="mail")
async def send_mail() -> TaskManager:
    task = current_task()
    assert task is not None
    assert task.group.name == "mail"
    manager: TaskManager = task.group.manager
    return manager


async def a_group() -> TaskManager:
    async with TaskGroup() as group:
        return await group.create_task(look())


async def a_started_task() -> TaskManager:
    manager: TaskManager = (await start_task("started", look)).group.manager
    return manager


async def a_service() -> TaskManager:
    manager: TaskManager = (await start_service("service", look)).group.manager
    return manager


async def in_thread() -> TaskManager:
    return await run_in_thread(current_manager)


async def in_a_thread_of_asyncio() -> TaskManager:
    return await asyncio.to_thread(current_manager)


async def from_thread() -> TaskManager:
    def hand_over() -> TaskManager:
        return create_task_threadsafe(look()).result(5)

    return await run_in_thread(hand_over)


async def group_of_a_thread() -> TaskManager:
    return await run_in_thread(lambda: TaskGroup().manager)


async def gathered() -> TaskManager:
    return (await asyncio.gather(decorated(), decorated()))[1]


async def gathered_start() -> TaskManager:
    [task] = await asyncio.gather(start_task("gathered", look))
    manager: TaskManager = task.group.manager
    return manager


async def sheltered() -> TaskManager:
    async with uncancellable():
        assert await create_task(look()) is current_manager()
        return await a_group()


async def in_a_block() -> TaskManager:
    async with TaskGroup("outer"), TaskGroup("inner") as inner:
        return await inner.create_task(a_group())


async def started_task_here() -> TaskManager:
    return await create_task(a_group())


async def the_root() -> TaskManager:
    manager: TaskManager = current_group().manager
    return manager


PLACES: list[Callable[[], Awaitable[TaskManager]]] = [
    look,
    the_root,
    a_group,
    in_a_block,
    a_started_task,
    a_service,
    started_task_here,
    decorated,
    send_mail,
    gathered,
    gathered_start,
    in_thread,
    from_thread,
    group_of_a_thread,
    sheltered,
]
# A plain asyncio task, or a thread of asyncio's, has the request by its context, but not the managed task.
WITH_A_CONTEXT: list[Callable[[], Awaitable[TaskManager]]] = [
    in_a_thread_of_asyncio,
    lambda: asyncio.create_task(a_group()),
    lambda: asyncio.create_task(a_started_task()),
    lambda: asyncio.create_task(sheltered()),
]


async def serve(manager: TaskManager, body: Callable[[], Awaitable[object]], method: str = "GET") -> Any:
    """Run ``body`` as the handler of a request, and give what it returned."""
    result: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        result.append(await body())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await FakeConnection(method=method).run(TaskGroupMiddleware(app, manager=manager))
    return result[0]


@pytest.mark.parametrize("place", [*PLACES, *WITH_A_CONTEXT])
async def test_request_has_its_manager(
    place: Callable[[], Awaitable[TaskManager]], shop: TaskManager
) -> None:
    """Everything that takes no manager uses that of the request it runs in."""
    before = global_task_manager.stats().created
    async with shop:
        assert await serve(shop, place) is shop
    assert global_task_manager.stats().created == before


@pytest.mark.parametrize("place", PLACES)
async def test_managed_task_has_its_manager(
    place: Callable[[], Coroutine[Any, Any, TaskManager]], shop: TaskManager
) -> None:
    """Everything that takes no manager uses that of the managed task it runs in."""
    before = global_task_manager.stats().created
    async with shop:
        assert await shop.create_task(place()) is shop
    assert global_task_manager.stats().created == before


@pytest.mark.parametrize("place", PLACES)
async def test_task_of_another_manager_beats_the_request(
    place: Callable[[], Coroutine[Any, Any, TaskManager]], shop: TaskManager, other: TaskManager
) -> None:
    """A task of one manager, started in a request of another, goes by its own."""
    async with shop, other:
        assert await serve(shop, lambda: other.create_task(place(), group="mail")) is other


@pytest.mark.parametrize("place", PLACES)
async def test_request_beats_the_task_that_serves_it(
    place: Callable[[], Awaitable[TaskManager]], shop: TaskManager, other: TaskManager
) -> None:
    """A server that runs in a managed task serves requests with their own manager, and keeps its own."""
    async with shop, other:

        async def server() -> TaskManager:
            assert await serve(shop, place) is shop
            return current_manager()

        assert await other.create_task(server()) is other


@pytest.mark.parametrize("place", PLACES)
async def test_global_manager_is_current_elsewhere(place: Callable[[], Awaitable[TaskManager]]) -> None:
    """Outside of requests and managed tasks everything uses the global manager."""
    assert await place() is global_task_manager
    await global_task_manager.join()
    global_task_manager.cleanup_completed_tasks()


def test_current_manager_needs_no_loop() -> None:
    """Without an event loop the global manager is current."""
    assert current_manager() is global_task_manager


async def test_explicit_manager_wins(shop: TaskManager, other: TaskManager) -> None:
    """manager= is used whatever is current."""

    @managed_task(manager=other)
    async def work() -> TaskManager:
        return current_manager()

    @managed_task(manager=other, group="mail")
    async def mail() -> TaskManager:
        return current_manager()

    async def handler() -> list[TaskManager]:
        async with TaskGroup(manager=other) as group:
            inner = await group.create_task(a_group())
        return [group.manager, inner, await work(), await mail(), await other.create_task(look())]

    async with shop, other:
        assert await serve(shop, handler) == [other] * 5
        assert await shop.create_task(handler()) == [other] * 5


async def test_group_object_says_its_manager(shop: TaskManager, other: TaskManager) -> None:
    """A group that is passed as an object is its own manager's, whichever is current."""

    async def handler() -> None:
        mail = other.get_group("mail")
        task = await start_task("one", rest, group=mail)
        service = await start_service("two", rest, group=mail)
        assert task.group.manager is service.group.manager is other
        assert await cancel_group(mail) >= 2

    async with shop, other:
        await serve(shop, handler)


async def test_names_are_looked_up_in_the_current_manager(shop: TaskManager) -> None:
    """Waiting, cancelling and listing by name see the current manager's tasks alone."""

    async def handler() -> None:
        await start_task("import", lambda: asyncio.sleep(1, "imported"))
        assert await wait_for_task("import") == "imported"
        await start_task("mail", rest, group="outbox")
        assert {"import", "mail"} <= set(get_all_task_info())
        assert "bystander" not in get_all_task_info()
        assert await cancel_group("outbox") == 1
        assert await cancel_all_tasks() == 0

    bystander = await start_task("bystander", rest, group="outbox")
    async with shop:
        await serve(shop, handler)
        await shop.create_task(handler())
    assert not bystander.done()
    assert await cancel_group("outbox") == 1


async def test_group_of_a_post_ends_with_the_request(shop: TaskManager) -> None:
    """`async with TaskGroup()` in a POST hangs below the request's group: a disconnect cancels it."""
    tasks: list[ManagedTask[None]] = []

    async def handler() -> None:
        async with TaskGroup("load") as group:
            assert group.parent is request_group()
            tasks.append(group.create_task(rest()))

    connection = FakeConnection(method="POST")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await handler()

    async with shop:
        server = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=shop)))
        await asyncio.sleep(LONG)
        assert shop.stats().live == 1
        connection.disconnect()
        await server
        assert kind_of(tasks[0]) is CancelKind.CLIENT_DISCONNECT
        assert shop.stats().live == 0


async def test_shutdown_sees_the_group_of_a_request(shop: TaskManager) -> None:
    """The manager's shutdown cancels what runs in a `TaskGroup()` of its requests."""

    async def handler() -> None:
        async with TaskGroup("load") as group:
            group.create_task(rest())

    request = asyncio.create_task(serve(shop, handler, "POST"))
    await settle()
    report = await shop.shutdown(grace=0)
    assert report.cancelled == 1
    await request


async def test_looking_for_the_manager_makes_no_group(shop: TaskManager) -> None:
    """Asking for the current manager does not open the request's group."""

    async def handler() -> int:
        current_manager()
        get_all_task_info()
        TaskGroup("unused")
        return len(shop._ledger.scopes)

    async with shop:
        assert await serve(shop, handler) == 0


async def test_group_that_is_made_later_asks_then(shop: TaskManager) -> None:
    """A group takes the manager that is current where it is made, wherever its block is entered."""
    async with shop, AsyncExitStack() as stack:
        group = await serve(shop, lambda: asyncio.sleep(0, TaskGroup("later")))
        await stack.enter_async_context(group)
        assert await group.create_task(look()) is shop


def test_functions_by_name_look_like_coroutine_functions() -> None:
    """Frameworks await what start_task() and the others return, and do not call them in a thread."""
    # asyncio's, which asks for a mark, is deprecated where inspect's can be marked.
    is_async = inspect.iscoroutinefunction if sys.version_info >= (3, 12) else asyncio.iscoroutinefunction
    for function in BY_NAME:
        assert is_async(function), function


@pytest.mark.parametrize("name", [function.__name__ for function in BY_NAME] + ["get_all_task_info"])
def test_functions_by_name_take_the_options_of_the_method(name: str) -> None:
    """Each parameter of the function is one of the manager's method, with the same default."""
    method = inspect.signature(getattr(TaskManager, name)).parameters
    for parameter in inspect.signature(getattr(otel_tasks, name)).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert method[parameter.name].default == parameter.default, parameter


async def test_decorator_decides_at_each_call(shop: TaskManager) -> None:
    """A decorator without manager=, applied at import, decides at each call which manager it uses."""
    async with shop:
        assert await decorated() is global_task_manager
        assert await serve(shop, decorated) is shop
        assert await serve(shop, lambda: give_later(decorated())) is shop
        assert await decorated() is global_task_manager


async def give_later(coro: Coroutine[Any, Any, TaskManager]) -> TaskManager:
    await give(None)
    return await coro
