"""Uses of the public interface, with the types that a checker must find for them.

Read by mypy and pyright in `tests/test_typing.py`; never run.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, assert_type

from otel_tasks import (
    CancelCause,
    CancelCounts,
    CancelEvent,
    CancelKind,
    CancelReport,
    ManagedTask,
    RestartPolicy,
    RetryPolicy,
    ShutdownReport,
    TaskGroup,
    TaskInfo,
    TaskManager,
    TaskPriority,
    TaskStats,
    TaskStatus,
    TaskTracker,
    WaitOutcome,
    cancel_all_tasks,
    cancel_and_wait,
    cancel_group,
    cleanup_lingering_tasks,
    create_task,
    create_task_threadsafe,
    current_cancel_event,
    current_group,
    current_task,
    get_all_task_info,
    global_task_manager,
    managed_task,
    propagate_cancellation,
    run_in_thread,
    start_service,
    start_task,
    wait_for_task,
    wait_with_cancellation,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


async def count(first: int, *, step: int = 1) -> int:
    """A coroutine function with arguments."""
    return first + step


async def nothing() -> None:
    """A coroutine function without."""


def plain_number() -> int:
    """A plain function."""
    return 1


async def creating(manager: TaskManager) -> None:
    """A task has the type of what its coroutine returns."""
    assert_type(create_task(count(1)), ManagedTask[int])
    assert_type(await create_task(count(1)), int)
    assert_type(create_task(nothing(), name="n", priority=TaskPriority.HIGH), ManagedTask[None])
    assert_type(create_task(count(1), priority=2), ManagedTask[int])
    assert_type(manager.create_task(count(1), priority=2).priority, TaskPriority)
    assert_type(manager.run_in_thread(plain_number, priority=2), ManagedTask[int])
    assert_type(manager.create_task(count(1), group="a.b", timeout=1), ManagedTask[int])
    assert_type(manager.create_task(count(1), group=manager.get_group("a")), ManagedTask[int])
    assert_type(
        manager.create_task(
            count(1),
            name="n",
            timeout=1.5,
            metadata={"order": 1},
            on_conflict="replace",
            trace="new",
            context=copy_context(),
        ).result(),
        int,
    )


async def starting(manager: TaskManager) -> None:
    """start_task takes a factory, a coroutine function or a coroutine."""
    assert_type(await manager.start_task("n", lambda: count(1)), ManagedTask[int])
    assert_type(await start_task("n", nothing, priority=2), ManagedTask[None])
    assert_type(await start_service("n", nothing, priority=2), ManagedTask[None])
    assert_type(await manager.start_task("n", nothing), ManagedTask[None])
    assert_type(await manager.start_task("n", count(1), cancel_existing=True), ManagedTask[int])
    assert_type(await start_task("n", nothing, on_conflict="return"), ManagedTask[None])
    assert_type(await start_service("n", lambda: count(1), restart=RestartPolicy(delay=2)), ManagedTask[int])


async def retrying(manager: TaskManager, group: TaskGroup) -> None:
    """With a policy, a task is created from a function that makes the coroutine."""
    policy = RetryPolicy(max_attempts=None, on=(OSError, ValueError), attempt_timeout=2)
    RetryPolicy(on=KeyError)
    RetryPolicy(on=lambda error: "busy" in str(error))
    assert_type(create_task(lambda: count(1), retry=policy), ManagedTask[int])
    assert_type(create_task(nothing, retry=policy, timeout=9, name="n"), ManagedTask[None])
    assert_type(manager.create_task(lambda: count(1), retry=policy, group="a"), ManagedTask[int])
    assert_type(group.create_task(nothing, retry=policy, priority=2), ManagedTask[None])
    mail = manager.get_group("mail", retry=policy)
    assert_type(mail.create_task(lambda: count(1)), ManagedTask[int])
    assert_type(manager.create_task(nothing, group="mail", timeout=9), ManagedTask[None])
    assert_type(await manager.put_task(lambda: count(1), group=mail), ManagedTask[int])
    assert_type(await group.put_task(lambda: count(1), retry=policy), ManagedTask[int])
    assert_type(await manager.put_task(nothing, retry=policy, group="a"), ManagedTask[None])
    assert_type(await manager.start_task("n", lambda: count(1), retry=policy), ManagedTask[int])
    assert_type(await start_task("n", nothing, retry=None), ManagedTask[None])
    assert_type(manager.create_task_threadsafe(lambda: count(1), retry=policy), Future[int])
    assert_type(group.run_in_thread(plain_number, retry=policy), ManagedTask[int])
    assert_type(await managed_task(retry=policy)(count)(1, step=2), int)
    assert_type(create_task(nothing, retry=policy).info().attempt, int | None)


async def grouping(manager: TaskManager) -> None:
    """A scoped group is its own context manager."""
    async with manager.group("load", on_error="isolate", timeout=5, span=True) as group:
        assert_type(group, TaskGroup)
        assert_type(group.create_task(count(1)), ManagedTask[int])
        async with group.group("nested") as nested:
            assert_type(nested, TaskGroup)
    async with TaskGroup() as plain, TaskGroup("named", manager=manager):
        assert_type(await plain.create_task(count(1)), int)
    assert_type(group.tasks, tuple[ManagedTask[Any], ...])
    assert_type(group.cancel_event, CancelEvent)
    assert_type(group.parent, TaskGroup | None)
    assert_type(await group.join(), None)


async def waiting_with_events(task: asyncio.Task[int]) -> None:
    """Plain tasks, managed ones and coroutines; plain events and CancelEvents."""
    assert_type(await wait_with_cancellation(task, asyncio.Event(), timeout=1), WaitOutcome)
    assert_type(await wait_with_cancellation(create_task(count(1)), CancelEvent()), WaitOutcome)
    assert_type(await wait_with_cancellation(count(1), completion_event=asyncio.Event()), WaitOutcome)
    assert_type(await propagate_cancellation(asyncio.Event(), [CancelEvent(), asyncio.Event()]), None)


async def tracking(task: asyncio.Task[int]) -> None:
    """What is added comes back as what it is."""
    async with TaskTracker() as tracker:
        assert_type(tracker, TaskTracker)
        assert_type(tracker.add(task), asyncio.Task[int])
        assert_type(tracker.add(create_task(count(1))), ManagedTask[int])
        success_count, error_count = await tracker.cancel_all(timeout=1)
        assert_type(success_count, int)
        assert_type(error_count, int)
        assert_type(await tracker.cancel_all(None, reason="why"), CancelCounts)
        assert_type(await tracker.wait(timeout=1), bool)
        assert_type(tracker.last_report, CancelReport | None)
    assert_type(await cancel_and_wait(task, *tracker, timeout=1, reason="why"), CancelReport)
    assert_type(await cleanup_lingering_tasks(1, exclude=[task]), CancelReport)


async def managing() -> None:
    """A manager is its own context manager too."""
    async with TaskManager("shop", history=10) as manager:
        assert_type(manager, TaskManager)
    assert_type(global_task_manager, TaskManager)
    assert_type(await manager.shutdown(grace=1, timeout=None), ShutdownReport)
    assert_type(await manager.cancel_task("n", "why"), bool)
    assert_type(await manager.cancel_group("g", "why", grace=1, timeout=None), int)
    assert_type(await cancel_group("g"), int)
    assert_type(await cancel_all_tasks(), int)
    assert_type(await wait_for_task("n", timeout=1), Any)
    assert_type(manager.get_result("n", default=None), Any)
    group = manager.get_group("g")
    assert_type(await manager.cancel_task("n", "why", group="g"), bool)
    assert_type(await wait_for_task("n", group=group), Any)
    assert_type(manager.get_task("n", group=group), ManagedTask[Any])
    assert_type(manager.get_task_info("n", group="g"), TaskInfo | None)
    assert_type(manager.get_task("n"), ManagedTask[Any])
    assert_type(manager.get_task_info("n"), TaskInfo | None)
    assert_type(get_all_task_info(), dict[str, TaskInfo])
    assert_type(manager.get_group_tasks("g"), dict[str, TaskInfo])
    assert_type(manager.stats(), TaskStats)
    assert_type(manager.stats().live, int)


def looking(task: ManagedTask[int], info: TaskInfo) -> None:
    """What a task and its snapshot say."""
    assert_type(task.id, str)
    assert_type(task.uid, str)
    assert_type(info.uid, str | None)
    assert_type(task.group, TaskGroup)
    assert_type(task.priority, TaskPriority)
    assert_type(task.status, TaskStatus)
    assert_type(task.status.is_final, bool)
    assert_type(task.cause, CancelCause | None)
    assert_type(task.metadata, dict[str, Any])
    assert_type(task.trace_id, str | None)
    assert_type(task.info(), TaskInfo)
    assert_type(task.cancel("why"), bool)
    assert_type(info.status, TaskStatus)
    assert_type(info.duration, float | None)
    assert_type(info.has_result, bool)
    assert_type(info.result, Any)
    assert_type(info.cause, CancelCause | None)
    assert_type(info.to_dict(), dict[str, Any])
    if info.cause is not None:
        assert_type(info.cause.kind, CancelKind)


def current() -> None:
    """What is current may be nothing, the group aside."""
    assert_type(current_task(), ManagedTask[Any] | None)
    assert_type(current_group(), TaskGroup)
    assert_type(current_cancel_event(), CancelEvent)


async def mixing() -> None:
    """A managed task goes wherever an asyncio task goes."""
    task = create_task(count(1))
    plain: asyncio.Task[int] = task
    assert_type(await asyncio.wait_for(task, 1), int)
    assert_type(await asyncio.gather(task, create_task(nothing())), tuple[int, None])
    task.add_done_callback(lambda done: print(done.result() + 1))
    await asyncio.wait([task, plain])


@managed_task(priority=2)
async def leveled() -> None:
    """Decorated with a number for a priority."""


@managed_task
async def bare(first: int, *, step: int = 1) -> str:
    """Decorated without parentheses."""
    return str(first + step)


@managed_task(name="n", group="g", priority=TaskPriority.LOW, timeout=1, manager=global_task_manager)
async def called(first: int, *rest: str) -> bytes:
    """Decorated with options."""
    return first.to_bytes()


class Shop:
    """The decorator on methods."""

    @managed_task
    async def sell(self, item: str, *, price: float) -> int:
        """Decorated without parentheses."""
        return round(price) + len(item)

    @managed_task(group="shop", record=lambda shop, item: {"item": item})
    async def buy(self, item: str) -> list[str]:
        """Decorated with options."""
        return [item]


async def decorated(shop: Shop) -> None:
    """Arguments and results keep their types, ``self`` is bound."""
    assert_type(await bare(1, step=2), str)
    assert_type(bare.start(1), ManagedTask[str])
    assert_type(await called(1, "a", "b"), bytes)
    assert_type(called.start(1, "a"), ManagedTask[bytes])
    assert_type(await shop.sell("tea", price=1.0), int)
    assert_type(shop.sell.start("tea", price=1.0), ManagedTask[int])
    assert_type(await shop.buy("tea"), list[str])
    assert_type(shop.buy.start(item="tea"), ManagedTask[list[str]])
    assert_type(await Shop.buy(shop, "tea"), list[str])


async def consumers(manager: TaskManager, queue: asyncio.Queue[int]) -> None:
    """The handler, and the functions of an item, take what the source returns."""

    async def handle(item: int) -> bool:
        return item > 0

    async def getone() -> int:
        return 1

    async def bury(item: int, error: Exception) -> None:
        print(item, error)

    assert_type(await manager.start_consumer("n", queue, handle), ManagedTask[None])
    await manager.start_consumer("n", getone, lambda item: handle(item + 1), on_failure=bury)
    await manager.start_consumer("n", asyncio.PriorityQueue[int](), handle, priority=2, metadata={"a": 1})
    await manager.start_consumer(
        "n",
        queue,
        handle,
        drain="queued",
        priority=lambda item: item % 4,
        metadata=lambda item: {"job": item},
        on_failure=lambda item, error: print(item + 1, error),
    )
    info = manager.get_task("n").info().consumer
    assert_type(None if info is None else info.in_hand, int | None)


def listening(manager: TaskManager) -> None:
    """Listeners and error handlers."""

    def told(event: Literal["created", "dequeued", "cancelling", "ended"], info: TaskInfo) -> None:
        print(event, info.id)

    def failed(info: TaskInfo, error: BaseException) -> None:
        print(info.id, error)

    manager.add_listener(told)
    TaskManager(on_error=failed)
    recorder: Callable[..., Mapping[str, Any]] = dict
    assert_type(managed_task(record=recorder)(count).start(1, step=2), ManagedTask[int])


def threads(manager: TaskManager, group: TaskGroup) -> None:
    """What threads hand over, and what runs in them, keeps its types."""

    def plain(number: int, text: str) -> bytes:
        return text.encode() * number

    async def work() -> float:
        return 1.0

    assert_type(group.run_in_thread(plain, 1, "a"), ManagedTask[bytes])
    assert_type(
        manager.run_in_thread(plain, 1, "a", group="g", abandon=True, timeout=1.0), ManagedTask[bytes]
    )
    assert_type(run_in_thread(plain, 1, "a", name="n", priority=TaskPriority.LOW), ManagedTask[bytes])
    assert_type(group.create_task_threadsafe(work()), Future[float])
    assert_type(manager.create_task_threadsafe(work, group="g", name="n"), Future[float])
    assert_type(create_task_threadsafe(work, timeout=1.0), Future[float])
    assert_type(manager.abandoned_threads, tuple[str, ...])
    assert_type(manager.max_threads, int | None)
