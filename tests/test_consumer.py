"""Consumers: taking, limits, acknowledging, failures, restarts, draining at a shutdown, and handing back."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import math
import queue as thread_queues
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace

from otel_tasks import (
    CancelKind,
    ConsumerInfo,
    ManagedTask,
    RestartPolicy,
    RetryPolicy,
    TaskExistsError,
    TaskManager,
    TaskPriority,
    TaskStatus,
    create_task,
    current_group,
    current_task,
    managed_task,
)
from otel_tasks.testing import SpanRecorder, VirtualClockLoop, assert_no_tasks_left, run
from tests.helpers import cancel_at_each_await, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

STEADY = RestartPolicy(delay=1.0, jitter=0)


class Work:
    """A handler: each item takes some seconds and may fail; it notes what it has done, and when."""

    __name__ = "work"

    def __init__(self, seconds: float = 1.0, fails: Iterable[Any] = ()) -> None:
        self.seconds = seconds
        self.fails = set(fails)
        self.started: list[Any] = []
        self.done: list[Any] = []
        self.cancelled: list[Any] = []
        self.running = 0
        self.peak = 0

    async def __call__(self, item: Any) -> None:
        self.started.append(item)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.seconds)
            if item in self.fails:
                raise OSError(f"no {item}")
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        finally:
            self.running -= 1
        self.done.append(item)


def filled(items: Iterable[Any], maxsize: int = 0) -> asyncio.Queue[Any]:
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize)
    for item in items:
        queue.put_nowait(item)
    return queue


def rest_of(queue: asyncio.Queue[Any]) -> list[Any]:
    """What is in the queue, taken out."""
    return [queue.get_nowait() for _ in range(queue.qsize())]


def unfinished(queue: asyncio.Queue[Any]) -> int:
    """For how many items ``queue.join()`` waits."""
    return vars(queue)["_unfinished_tasks"]  # type: ignore[no-any-return]  # asyncio's own counter


def fates(task: ManagedTask[Any]) -> dict[str, int]:
    """What has become of the items of a consumer, without zeros."""
    counts = consumer_of(task).to_dict()
    return {what: count for what, count in counts.items() if count and what != "concurrency"}


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


async def never() -> Any:
    """Wait for an item that does not come."""
    await rest()


def consumer_of(task: ManagedTask[Any]) -> ConsumerInfo:
    info = task.info().consumer
    assert info is not None
    return info


# -- taking ---------------------------------------------------------------------------------


async def test_each_item_is_a_task_in_the_group_of_the_consumers_name() -> None:
    """It is named after the handler, and counts against the concurrency."""
    manager, work, queue = TaskManager(), Work(), filled(range(5))
    seen: list[tuple[str, str]] = []

    async def handle(item: int) -> None:
        task = current_task()
        assert task is not None
        seen.append((task.name, current_group().name))
        await work(item)

    await manager.start_consumer("jobs", queue, handle, concurrency=2)
    await queue.join()
    assert now() == 1003.0
    assert sorted(work.done) == [0, 1, 2, 3, 4]
    assert work.peak == 2
    assert {group for _, group in seen} == {"jobs"}
    assert [name for name, _ in seen[:2]] == ["handle", "handle-2"]
    await manager.shutdown(0)


async def test_item_stays_in_the_queue_until_it_can_run() -> None:
    """Without prefetch, the backlog is in the queue and not in the group."""
    manager, work, queue = TaskManager(), Work(10.0), filled(range(10))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=3)
    await asyncio.sleep(1.0)
    assert queue.qsize() == 7
    assert consumer_of(consumer).in_hand == 3
    assert manager.stats().queued == 0
    await manager.shutdown(0)


async def test_prefetched_items_wait_in_the_group_by_priority() -> None:
    """Of the items in hand, the most urgent one gets the next place."""
    manager, work = TaskManager(ageing=float("inf")), Work(1.0)
    queue = filled([(1, "a"), (0, "low"), (1, "normal"), (3, "urgent")])
    await manager.start_consumer(
        "jobs", queue, work, concurrency=1, prefetch=3, priority=lambda item: item[0]
    )
    await asyncio.sleep(0.5)
    assert queue.qsize() == 0
    assert manager.stats().queued == 3
    await queue.join()
    assert [name for _, name in work.started] == ["a", "urgent", "normal", "low"]
    await manager.shutdown(0)


async def test_no_more_items_are_in_hand_than_run_and_are_prefetched() -> None:
    """An item that backs off gives up its place, and stays in hand."""
    manager, queue = TaskManager(), filled(range(10))
    work = Work(1.0, fails=range(2))
    retry = RetryPolicy(max_attempts=2, delay=10.0, jitter=0)
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=1, retry=retry)
    await asyncio.sleep(1.5)
    # 0 and 1 back off: 2 runs in one of their places.
    assert (queue.qsize(), consumer_of(consumer).in_hand, work.running) == (7, 3, 1)
    await asyncio.sleep(1.0)
    assert (queue.qsize(), consumer_of(consumer).in_hand, work.running) == (6, 3, 1)
    await manager.shutdown(0)


async def test_limit_of_the_manager_keeps_items_in_the_queue_too() -> None:
    """An item is taken only if the manager has a place as well; the consumer itself takes none."""
    manager, work, queue = TaskManager(max_concurrency=2), Work(1.0), filled(range(6))
    other = manager.create_task(asyncio.sleep(10.0))
    await manager.start_consumer("jobs", queue, work, concurrency=4)
    await asyncio.sleep(0.5)
    assert (work.running, queue.qsize(), manager.stats().queued) == (1, 5, 0)
    await queue.join()
    assert work.peak == 1
    assert not other.done()
    await manager.shutdown(0)


async def test_full_queue_of_the_manager_does_not_refuse_an_item() -> None:
    """With no room in the manager's queue, the consumer waits before it takes an item."""
    manager, work, queue = TaskManager(max_concurrency=1, max_queue=0), Work(1.0), filled(range(3))
    await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=5)
    await queue.join()
    assert work.done == [0, 1, 2]
    await manager.shutdown(0)


async def test_waiting_consumer_leaves_the_room_to_other_producers() -> None:
    """A consumer with an empty queue does not hold up a ``put_task`` elsewhere."""
    manager, work = TaskManager(max_concurrency=1, max_queue=0), Work(1.0)
    queue: asyncio.Queue[int] = asyncio.Queue()
    await manager.start_consumer("jobs", queue, work)
    for _ in range(3):
        await manager.put_task(asyncio.sleep(1.0))
    assert now() == 1002.0
    await manager.shutdown(0)


async def test_tasks_that_a_handler_starts_do_not_count() -> None:
    """They join its group, and would otherwise wait for the place of the item that awaits them."""
    manager, queue, work = TaskManager(), filled(range(4)), Work(1.0)

    @managed_task
    async def part(item: int) -> None:
        await work(item)

    async def handle(item: int) -> None:
        assert current_group().name == "jobs"
        await part(item)
        await create_task(asyncio.sleep(1.0))

    await manager.start_consumer("jobs", queue, handle, concurrency=2)
    await queue.join()
    assert now() == 1004.0
    assert work.peak == 2
    await manager.shutdown(0)


async def test_limit_of_the_group_applies_too() -> None:
    """One that is set later limits the items and the tasks that they start."""
    manager, work, queue = TaskManager(max_concurrency=4), Work(1.0), filled(range(9))
    await manager.start_consumer("jobs", queue, work, concurrency=3, prefetch=2)
    await settle()
    manager.get_group("jobs").max_concurrency = 2
    await asyncio.sleep(1.5)
    assert work.running == 2
    await queue.join()
    assert sorted(work.done) == list(range(9))
    await manager.shutdown(0)


async def test_timeout_of_the_group_is_that_of_an_item_without_one() -> None:
    """As for any task in the group."""
    manager, work, queue = TaskManager(on_error=lambda *_: None), Work(10.0), filled(range(2))
    manager.get_group("jobs", timeout=3.0)
    await manager.start_consumer("jobs", queue, work)
    await queue.join()
    assert now() == 1003.0
    await manager.shutdown(0)


async def test_options_of_create_task_apply_to_each_item(caplog: pytest.LogCaptureFixture) -> None:
    """Timeout, priority, and metadata; the last two may depend on the item."""
    manager, queue = TaskManager(), filled([1, 2])
    tasks: list[Any] = []

    async def handle(item: int) -> None:
        tasks.append(current_task())
        await rest()

    await manager.start_consumer(
        "jobs", queue, handle, timeout=5.0, priority=TaskPriority.HIGH, metadata=lambda item: {"job": item}
    )
    await queue.join()
    assert now() == 1005.0
    assert [task.metadata for task in tasks] == [{"job": 1}, {"job": 2}]
    assert {task.priority for task in tasks} == {TaskPriority.HIGH}
    assert {task.info().error_type for task in tasks} == {"TimeoutError"}
    assert caplog.text.count("failed and nobody awaits it") == 2
    await manager.shutdown(0)


async def test_items_are_retried() -> None:
    """An item is acknowledged once, after its last attempt."""
    manager, queue = TaskManager(), filled([1])
    attempts: list[float] = []

    async def handle(item: int) -> None:
        attempts.append(now())
        if len(attempts) < 3:
            raise OSError("away")

    retry = RetryPolicy(max_attempts=3, delay=1.0, jitter=0)
    consumer = await manager.start_consumer("jobs", queue, handle, retry=retry)
    await queue.join()
    assert attempts == [1000.0, 1001.0, 1003.0]
    assert fates(consumer) == {"done": 1}
    await manager.shutdown(0)


async def test_retries_of_the_group_are_those_of_an_item_without_any() -> None:
    """As for any task in the group; those of the consumer come first."""
    manager, work = TaskManager(on_error=lambda *_: None), Work(1.0, fails=[1, 2])
    for name in ("a", "b"):
        manager.get_group(name, retry=RetryPolicy(max_attempts=3, delay=1.0, jitter=0, on=OSError))
    first, second = filled([1]), filled([2])
    await manager.start_consumer("a", first, work)
    await manager.start_consumer("b", second, work, retry=RetryPolicy(max_attempts=1))
    await first.join()
    await second.join()
    assert work.started == [1, 2, 1, 1]
    await manager.shutdown(0)


async def test_source_can_be_a_function() -> None:
    """A coroutine function that returns the next item; there is nothing to acknowledge."""
    manager, work = TaskManager(), Work(0.5)
    items = iter(range(3))

    async def getone() -> int:
        await asyncio.sleep(1.0)
        item = next(items, None)
        return await never() if item is None else item

    await manager.start_consumer("jobs", getone, work)
    await asyncio.sleep(10.0)
    assert work.done == [0, 1, 2]
    await manager.shutdown(0)


async def test_source_can_be_a_lambda_and_its_awaitable_a_future() -> None:
    """Whatever it returns is awaited."""
    manager, work = TaskManager(), Work(0.5)
    queue = filled([1, 2])
    await manager.start_consumer("jobs", lambda: asyncio.ensure_future(queue.get()), work)
    await asyncio.sleep(10.0)
    assert work.done == [1, 2]
    await manager.shutdown(0)


@pytest.mark.parametrize("kind", [asyncio.PriorityQueue, asyncio.LifoQueue])
async def test_queues_of_other_kinds_keep_their_order(kind: type[asyncio.Queue[int]]) -> None:
    """The items come as the queue gives them."""
    manager, work = TaskManager(), Work(0.5)
    queue = kind()
    for item in (2, 3, 1):
        queue.put_nowait(item)
    await manager.start_consumer("jobs", queue, work, concurrency=1)
    await queue.join()
    assert work.done == ([1, 2, 3] if kind is asyncio.PriorityQueue else [1, 3, 2])
    await manager.shutdown(0)


async def test_get_of_a_subclass_is_called() -> None:
    """It may do more than asyncio's, so no other method replaces it."""
    got: list[int] = []

    class Noting(asyncio.Queue[int]):
        async def get(self) -> int:
            item = await super().get()
            got.append(item)
            return item

    manager, work, queue = TaskManager(), Work(0.5), Noting()
    queue.put_nowait(1)
    await manager.start_consumer("jobs", queue, work)
    await queue.join()
    assert got == [1]
    await manager.shutdown(0)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="asyncio.Queue.shutdown() is new in Python 3.13")
@pytest.mark.parametrize("immediate", [False, True])
async def test_queue_that_is_shut_down_ends_the_consumer(immediate: bool) -> None:
    """It takes what is left, and returns when its items have ended."""
    if sys.version_info < (3, 13):
        return
    manager, work, queue = TaskManager(), Work(1.0), filled(range(4))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2)
    await asyncio.sleep(0.5)
    queue.shutdown(immediate)
    await consumer
    assert consumer.status is TaskStatus.COMPLETED
    assert work.done == ([0, 1] if immediate else [0, 1, 2, 3])
    await queue.join()
    assert not manager.failed_services
    await manager.shutdown(0)


async def test_two_consumers_share_a_queue() -> None:
    """Each item is handled once."""
    manager, queue = TaskManager(), filled(range(20))
    first, second = Work(1.0), Work(1.5)
    await manager.start_consumer("first", queue, first, concurrency=2)
    await manager.start_consumer("second", queue, second, concurrency=3)
    await queue.join()
    assert sorted(first.done + second.done) == list(range(20))
    assert first.done
    assert second.done
    await manager.shutdown(0)


async def test_tasks_are_named_after_the_handler() -> None:
    """Whatever its coroutines are called; a retried one too."""
    manager = TaskManager()

    @managed_task(manager=manager)
    async def decorated(item: int) -> None:
        await rest()

    handlers: list[Any] = [decorated, Work(3600.0), functools.partial(asyncio.sleep), lambda _: rest()]
    for number, handler in enumerate(handlers):
        for retry in (None, RetryPolicy()):
            name = f"jobs{number}{'' if retry is None else '-retried'}"
            await manager.start_consumer(name, filled([3600.0]), handler, retry=retry)
    await settle()
    names = {task.name for group in manager.tree().root.groups for task in group.tasks if task.kind == "task"}
    assert {"decorated", "work", "work-2", "sleep", "sleep-2", "rest", "rest-2"} <= names
    assert "__call__" not in names
    await manager.shutdown(0, 1.0)


async def test_handler_may_be_anything_that_returns_a_coroutine() -> None:
    """A decorated function, a partial one, a method, an object with ``__call__``, and a lambda."""
    manager, queue = TaskManager(), filled(range(5))
    seen: list[tuple[str, int]] = []

    @managed_task(manager=manager)
    async def decorated(item: int) -> None:
        seen.append(("decorated", item))

    async def two(what: str, item: int) -> None:
        seen.append((what, item))

    class Handler:
        async def method(self, item: int) -> None:
            seen.append(("method", item))

        async def __call__(self, item: int) -> None:
            seen.append(("call", item))

    handlers: list[Any] = [
        decorated,
        functools.partial(two, "partial"),
        Handler().method,
        Handler(),
        lambda item: two("lambda", item),
    ]
    for number, handler in enumerate(handlers):
        one = filled([number])
        await manager.start_consumer(f"jobs{number}", one, handler)
        await one.join()
    assert seen == [("decorated", 0), ("partial", 1), ("method", 2), ("call", 3), ("lambda", 4)]
    assert queue.qsize() == 5
    await manager.shutdown(0)


# -- failures -------------------------------------------------------------------------------


async def test_failure_is_reported_and_the_item_is_finished() -> None:
    """Like any failure that nobody awaits; the other items go on."""
    failures: list[tuple[str, str]] = []
    manager = TaskManager(on_error=lambda info, error: failures.append((info.name, str(error))))
    queue, work = filled(range(3)), Work(1.0, fails=[1])
    consumer = await manager.start_consumer("jobs", queue, work)
    await queue.join()
    assert failures == [("work-2", "no 1")]
    assert work.done == [0, 2]
    assert fates(consumer) == {"done": 2, "failed": 1}
    await manager.shutdown(0)


async def test_on_failure_gets_the_item_and_the_exception(caplog: pytest.LogCaptureFixture) -> None:
    """The failure is then not reported anywhere else."""
    manager, queue, work = (
        TaskManager(on_error=lambda *_: pytest.fail("reported")),
        filled([1]),
        Work(fails=[1]),
    )
    dead: list[tuple[int, str, int]] = []
    consumer = await manager.start_consumer(
        "jobs", queue, work, on_failure=lambda item, error: dead.append((item, str(error), unfinished(queue)))
    )
    await queue.join()
    # The item is finished after the call.
    assert dead == [(1, "no 1", 1)]
    assert fates(consumer) == {"failed": 1}
    gc.collect()
    assert caplog.text == ""
    await manager.shutdown(0)


async def test_coroutine_function_for_failures_runs_in_a_task(spans: SpanRecorder) -> None:
    """The item is finished when that has ended; its span is linked to that of the item."""
    manager = TaskManager(tracer_provider=spans.provider)
    queue, work = filled([1]), Work(fails=[1])
    times: list[float] = []

    async def bury(item: int, error: Exception) -> None:
        await asyncio.sleep(2.0)
        times.append(now())
        assert unfinished(queue) == 1

    consumer = await manager.start_consumer("jobs", queue, work, on_failure=bury)
    await asyncio.sleep(2.0)
    assert consumer_of(consumer).in_hand == 1
    await queue.join()
    assert times == [1003.0]
    assert fates(consumer) == {"failed": 1}
    buried, failed = spans.span("bury"), spans.span("work")
    assert [(link.context, dict(link.attributes or {})) for link in buried.links] == [
        (context_of(failed), {"otel_tasks.link": "failure_of"})
    ]
    await manager.shutdown(0)


@pytest.mark.parametrize("is_async", [False, True])
async def test_on_failure_that_raises_is_logged_once(
    is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With both exceptions; the item counts as failed, and the next failure is passed on too."""
    manager, queue, work = TaskManager(), filled([1, 2]), Work(fails=[1, 2])
    calls: list[int] = []

    def bury(item: int, error: Exception) -> None:
        calls.append(item)
        raise RuntimeError("no grave")

    async def bury_async(item: int, error: Exception) -> None:
        bury(item, error)

    consumer = await manager.start_consumer(
        "jobs", queue, work, concurrency=1, on_failure=bury_async if is_async else bury
    )
    await queue.join()
    assert calls == [1, 2]
    assert fates(consumer) == {"failed": 2}
    gc.collect()
    lines = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in lines] == [
        "on_failure of consumer 'jobs' raised for task 'work', which had failed with OSError('no 1')",
        "on_failure of consumer 'jobs' raised for task 'work-2', which had failed with OSError('no 2')",
    ]
    await manager.shutdown(0)


@pytest.mark.parametrize("option", ["priority", "metadata"])
@pytest.mark.parametrize("value", ["raises", "wrong"])
async def test_item_for_which_an_option_raises_fails(option: str, value: str) -> None:
    """The item alone: it goes to ``on_failure``, and the consumer goes on."""

    def of(item: int) -> Any:
        if item == 1 and value == "raises":
            raise KeyError("priority")
        if item == 1:
            return "urgent"
        return TaskPriority.HIGH if option == "priority" else {"item": item}

    manager, queue, work = TaskManager(), filled([0, 1, 2]), Work()
    dead: list[tuple[int, str]] = []
    consumer = await manager.start_consumer(
        "jobs",
        queue,
        work,
        on_failure=lambda item, error: dead.append((item, type(error).__name__)),
        **{option: of},  # type: ignore[arg-type]  # one of the two
    )
    await queue.join()
    assert work.done == [0, 2]
    expected = (
        "KeyError" if value == "raises" else {"priority": "ValueError", "metadata": "TypeError"}[option]
    )
    assert dead == [(1, expected)]
    assert fates(consumer) == {"done": 2, "failed": 1}
    await manager.shutdown(0)


async def test_lambda_that_returns_no_coroutine_fails_the_item() -> None:
    """It cannot be refused at the call."""
    manager, queue = TaskManager(), filled([1])
    dead: list[str] = []
    wrong: Any = lambda item: item  # noqa: E731 - a lambda is what is tested
    await manager.start_consumer("jobs", queue, wrong, on_failure=lambda item, error: dead.append(str(error)))
    await queue.join()
    assert len(dead) == 1
    assert "the lambda returned 1" in dead[0]
    await manager.shutdown(0)


async def test_handler_that_acknowledges_itself_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """``task_done()`` called too often raises; the consumer goes on."""
    manager, queue = TaskManager(), filled([1, 2])
    done: list[int] = []

    async def handle(item: int) -> None:
        done.append(item)
        queue.task_done()

    await manager.start_consumer("jobs", queue, handle)
    await settle()
    assert done == [1, 2]
    assert "task_done() of the source of consumer 'jobs' raised" in caplog.text
    await manager.shutdown(0)


async def test_cancelled_error_of_an_item_is_a_failure() -> None:
    """One that nothing requested, such as that of a client which cancels its own future."""
    manager, queue = TaskManager(), filled([1])
    dead: list[Any] = []

    async def handle(item: int) -> None:
        raise asyncio.CancelledError("the pool was closed")

    consumer = await manager.start_consumer(
        "jobs", queue, handle, on_failure=lambda item, error: dead.append((item, repr(error.__cause__)))
    )
    await settle()
    assert dead == [(1, "CancelledError('the pool was closed')")]
    assert fates(consumer) == {"failed": 1}
    assert unfinished(queue) == 0
    await manager.shutdown(0)


async def test_cancelled_error_of_an_item_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Without ``on_failure``, like any failure that nobody awaits: the item was not handled."""
    manager, queue = TaskManager(), filled([1])

    async def handle(item: int) -> None:
        raise asyncio.CancelledError

    consumer = await manager.start_consumer("jobs", queue, handle)
    await settle()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "task 'handle' failed and nobody awaits it")
    ]
    assert "ended with a CancelledError that no request caused" in caplog.text
    assert fates(consumer) == {"failed": 1}
    await manager.shutdown(0)


async def test_on_failure_sees_the_span_of_its_item(spans: SpanRecorder) -> None:
    """Its log records carry the trace of the item."""
    manager = TaskManager(tracer_provider=spans.provider)
    queue, work = filled([1]), Work(0.0, fails=[1])
    seen: list[int] = []

    def bury(item: int, error: Exception) -> None:
        seen.append(trace.get_current_span().get_span_context().span_id)

    await manager.start_consumer("jobs", queue, work, on_failure=bury)
    await settle()
    assert seen == [context_of(spans.span("work")).span_id]
    await manager.shutdown(0)


# -- the source -----------------------------------------------------------------------------


async def test_source_that_raises_restarts_the_consumer(caplog: pytest.LogCaptureFixture) -> None:
    """After a delay, like a service; items in hand go on meanwhile."""
    manager, work = TaskManager(), Work(5.0)
    answers: list[Any] = [1, ConnectionError("broker away"), 2]

    async def getone() -> int:
        answer = answers.pop(0) if answers else await never()
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]  # an item

    consumer = await manager.start_consumer("jobs", getone, work, restart=STEADY)
    await asyncio.sleep(0.5)
    assert (work.started, consumer.status) == ([1], TaskStatus.RUNNING)
    assert "service 'jobs' failed in attempt 'jobs#1' and is restarted in 1 s" in caplog.text
    await asyncio.sleep(1.0)
    assert (work.started, work.running) == ([1, 2], 2)
    await asyncio.sleep(10.0)
    assert work.done == [1, 2]
    assert fates(consumer) == {"done": 2}
    await manager.shutdown(0)


async def test_failure_of_the_source_is_logged_without_others(caplog: pytest.LogCaptureFixture) -> None:
    """That the queue was empty before is not its context."""
    manager = TaskManager()

    async def getone() -> int:
        await asyncio.sleep(1.0)
        raise ConnectionError("broker away")

    await manager.start_consumer("jobs", getone, Work(), restart=STEADY)
    await asyncio.sleep(1.5)
    assert "ConnectionError: broker away" in caplog.text
    assert "another exception" not in caplog.text
    await manager.shutdown(0)


async def test_cancelled_error_of_the_source_is_a_failure() -> None:
    """One that nothing requested restarts the consumer."""
    manager, work = TaskManager(), Work(0.0)
    calls = 0

    async def getone() -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise asyncio.CancelledError
        return 7 if calls == 2 else await never()

    await manager.start_consumer("jobs", getone, work, restart=STEADY)
    await asyncio.sleep(2.0)
    assert work.done == [7]
    await manager.shutdown(0)


async def test_consumer_gives_up_and_its_items_go_on() -> None:
    """``on_give_up`` and ``failed_services`` are those of a service."""
    manager, work = TaskManager(on_error=lambda *_: None), Work(5.0)
    answers: list[Any] = [1]
    gave_up: list[str] = []

    async def getone() -> int:
        if answers:
            return answers.pop()  # type: ignore[no-any-return]  # an item
        raise ConnectionError("broker away")

    consumer = await manager.start_consumer(
        "jobs",
        getone,
        work,
        restart=RestartPolicy(max_failures=1),
        on_give_up=lambda info, error: gave_up.append(info.id),
    )
    await asyncio.wait([consumer])
    assert (gave_up, manager.failed_services) == (["jobs"], ("jobs",))
    await asyncio.sleep(10.0)
    assert work.done == [1]
    await manager.shutdown(0)


async def test_critical_consumer_that_gives_up_shuts_the_manager_down() -> None:
    """As a critical service does."""
    manager = TaskManager(on_error=lambda *_: None)

    async def getone() -> int:
        raise ConnectionError("broker away")

    consumer = await manager.start_consumer(
        "jobs", getone, Work(), restart=RestartPolicy(max_failures=1), critical=True
    )
    await asyncio.wait([consumer])
    await settle()
    assert manager.closed


# -- spans and snapshots --------------------------------------------------------------------


async def test_each_item_has_a_trace_of_its_own(spans: SpanRecorder) -> None:
    """Linked to the attempt that has taken it; the supervisor has no span."""
    manager = TaskManager(tracer_provider=spans.provider)
    queue = filled([1, 2])

    async def handle(item: int) -> None:
        await manager.create_task(asyncio.sleep(0.1), name="step")

    await manager.start_consumer("jobs", queue, handle)
    await queue.join()
    await manager.shutdown(1.0)
    (attempt,) = spans.spans("jobs")
    items, steps = spans.spans("handle"), spans.spans("step")
    assert len({context_of(span).trace_id for span in [attempt, *items]}) == 3
    for item in items:
        assert item.parent is None
        assert [(link.context, dict(link.attributes or {})) for link in item.links] == [
            (context_of(attempt), {"otel_tasks.link": "spawned_by"})
        ]
    assert {context_of(step).trace_id for step in steps} == {context_of(item).trace_id for item in items}
    spans.check()


async def test_tree_and_info_count_the_items() -> None:
    """In hand, done, failed, and cancelled."""
    manager, queue = TaskManager(), filled(range(4))
    work = Work(1.0, fails=[1])
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=3, on_failure=lambda *_: None)
    await asyncio.sleep(1.5)
    assert "(S) jobs: running, 1.5s, critical, 1 in hand (concurrency 3), 2 done, 1 failed" in str(
        manager.tree()
    )
    counts = {"concurrency": 3, "in_hand": 1, "done": 2, "failed": 1, "cancelled": 0, "handed_back": 0}
    assert consumer.info().to_dict()["consumer"] == counts
    node = manager.tree().to_dict()["root"]["groups"][0]["tasks"][0]
    assert (node["id"], node["consumer"]) == ("jobs", counts)
    assert manager.get_task("jobs#1").info().consumer == consumer_of(consumer)
    other = manager.create_task(rest())
    assert other.info().consumer is None
    assert other.info().to_dict()["consumer"] is None
    await manager.shutdown(0)


async def test_ended_consumer_is_freed() -> None:
    """With its queue, once its items have ended."""
    manager, queue = TaskManager(), filled([1])
    consumer = await manager.start_consumer("jobs", queue, Work())
    await queue.join()
    consumer.cancel()
    await asyncio.wait([consumer])
    await settle()
    gone = weakref.ref(queue)
    del queue, consumer
    gc.collect()
    assert gone() is None
    assert not manager._ledger.consumers
    await manager.shutdown(0)


async def test_handled_item_is_freed() -> None:
    """While the consumer waits for the next one, nothing holds the last one."""

    class Item:
        """An object that can be watched."""

    manager, items = TaskManager(), [Item(), Item()]
    gone = [weakref.ref(item) for item in items]
    queue = filled(items)
    items.clear()
    await manager.start_consumer("jobs", queue, lambda item: asyncio.sleep(0), retry=RetryPolicy())
    await queue.join()
    await settle()
    queue.put_nowait(Item())
    await queue.join()
    await settle()
    gc.collect()
    assert [link() for link in gone] == [None, None]
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Item)]
    await manager.shutdown(0)


# -- a shutdown -----------------------------------------------------------------------------


async def test_idle_consumer_does_not_hold_a_shutdown_up() -> None:
    """It ends in the first turns, and nothing is logged."""
    manager = TaskManager()
    queue: asyncio.Queue[int] = asyncio.Queue()
    consumers = [
        await manager.start_consumer("jobs", queue, Work()),
        await manager.start_consumer("all", queue, Work(), drain="all"),
        await manager.start_consumer("function", rest, Work()),
    ]
    await asyncio.sleep(1.0)
    report = await manager.shutdown(100.0)
    assert now() == 1001.0
    assert report.clean
    assert [consumer.status for consumer in consumers] == [TaskStatus.COMPLETED] * 3


async def test_running_items_get_the_grace_and_the_rest_stays(caplog: pytest.LogCaptureFixture) -> None:
    """By default: what runs is finished, what is prefetched is handed back at once."""
    manager, work, queue = TaskManager(), Work(3.0), filled(range(6))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=2)
    await asyncio.sleep(1.0)
    shutdown = asyncio.create_task(manager.shutdown(10.0))
    await settle()
    assert queue.qsize() == 4
    report = await shutdown
    assert now() == 1003.0
    assert report.clean
    assert work.done == [0, 1]
    assert fates(consumer) == {"done": 2, "handed_back": 2}
    assert unfinished(queue) == 4
    assert rest_of(queue) == [4, 5, 2, 3]
    lines = [record for record in caplog.records if "consumer" in record.getMessage()]
    assert [(record.levelname, record.getMessage()) for record in lines] == [
        (
            "WARNING",
            "consumer 'jobs' has stopped; handed back: 2 ('work-3', 'work-4'); left in the queue: 4",
        )
    ]
    assert lines[0].__dict__["otel_tasks"] == {"task_ids": ["work-3", "work-4"], "task_uids": []}


async def test_draining_the_queued_items() -> None:
    """What was in the queue when the shutdown began, and what was in hand; not what comes later."""
    manager, work, queue = TaskManager(), Work(1.0), filled(range(6))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=1, drain="queued")
    await asyncio.sleep(0.5)
    shutdown = asyncio.create_task(manager.shutdown(100.0))
    await settle()
    queue.put_nowait("late")
    await shutdown
    assert now() == 1003.0
    assert work.done == list(range(6))
    assert work.peak == 2
    assert rest_of(queue) == ["late"]
    assert consumer.status is TaskStatus.COMPLETED
    assert fates(consumer) == {"done": 6}


async def test_draining_everything() -> None:
    """Until the queue is empty, what comes during the shutdown included."""
    manager, work, queue = TaskManager(), Work(1.0), filled(range(4))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2, drain="all")
    await asyncio.sleep(0.5)
    shutdown = asyncio.create_task(manager.shutdown(100.0))
    await asyncio.sleep(1.0)
    queue.put_nowait("late")
    await shutdown
    assert sorted(map(str, work.done)) == ["0", "1", "2", "3", "late"]
    assert consumer.status is TaskStatus.COMPLETED
    assert unfinished(queue) == 0


async def test_drain_ends_with_the_grace(caplog: pytest.LogCaptureFixture) -> None:
    """What is running then is handed back in the order in which it was taken; the rest stays."""
    manager, work, queue = TaskManager(), Work(1.0), filled(range(20))
    consumer = await manager.start_consumer(
        "jobs", queue, work, concurrency=3, prefetch=2, drain="all", priority=lambda item: item % 3
    )
    await asyncio.sleep(0.5)
    report = await manager.shutdown(2.0)
    assert now() == 1002.5
    assert report.clean
    counts = consumer_of(consumer)
    left = rest_of(queue)
    handed_back = left[-counts.handed_back :]
    assert counts.handed_back == 5
    assert handed_back == sorted(handed_back)
    assert sorted(work.done + left) == list(range(20))
    assert "ignored its cancellation" not in caplog.text
    # The items that the shutdown has created are in its report, and the consumer is not.
    cut = next(record for record in caplog.records if "cancelled 5 tasks" in record.getMessage())
    assert "'jobs'" not in cut.getMessage()
    assert not work.running


async def test_shutdown_without_grace_hands_everything_back() -> None:
    """As at the end of a block that raises."""
    work, queue = Work(1.0), filled(range(6))
    manager = TaskManager()

    async def block() -> None:
        async with manager:
            await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=1, drain="all")
            await asyncio.sleep(0.5)
            raise LookupError

    with pytest.raises(LookupError):
        await block()
    assert now() == 1000.5
    assert rest_of(queue) == [3, 4, 5, 0, 1, 2]
    assert unfinished(queue) == 6


async def test_handed_back_item_is_counted_by_join() -> None:
    """``join()`` goes on waiting for it, and returns when another consumer has finished it."""
    queue = filled([1])
    joined = asyncio.create_task(queue.join())
    first = TaskManager()
    await first.start_consumer("jobs", queue, Work(10.0))
    await asyncio.sleep(1.0)
    await first.shutdown(1.0)
    await settle()
    assert not joined.done()
    assert unfinished(queue) == 1
    second, work = TaskManager(), Work(1.0)
    await second.start_consumer("jobs", queue, work)
    await joined
    assert work.done == [1]
    await second.shutdown(0)


async def test_item_without_a_way_back_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A full queue, and a function, take nothing back: the item is not acknowledged."""
    manager = TaskManager()
    queue = filled([1], maxsize=1)
    items = [2]

    async def getone() -> int:
        return items.pop() if items else await never()

    await manager.start_consumer("jobs", queue, Work(10.0))
    await manager.start_consumer("kafka", getone, Work(10.0))
    await settle()
    queue.put_nowait(3)
    await manager.shutdown(0)
    assert "consumer 'kafka' has stopped; not acknowledged: 1 ('work-2')" in caplog.text
    lost = [record.getMessage() for record in caplog.records if "consumer 'jobs'" in record.getMessage()]
    assert len(lost) == 1
    assert unfinished(queue) == 2


async def test_full_queue_takes_nothing_back(caplog: pytest.LogCaptureFixture) -> None:
    """Its producer has filled it meanwhile: the item is lost, and the log names it."""
    manager, queue = TaskManager(), filled([1], maxsize=1)
    await manager.start_consumer("jobs", queue, Work(10.0), concurrency=1)
    await settle()
    queue.put_nowait(2)
    await manager.shutdown(0)
    assert "consumer 'jobs' has stopped; not acknowledged: 1 ('work'); left in the queue: 1" in caplog.text
    assert unfinished(queue) == 2


async def test_source_whose_put_nowait_raises_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """With traceback; the item counts as lost."""

    class Broken(asyncio.Queue[int]):
        closed = False

        def put_nowait(self, item: int) -> None:
            if self.closed:
                raise OSError("closed")
            super().put_nowait(item)

    manager, queue = TaskManager(), Broken()
    queue.put_nowait(1)
    queue.closed = True
    await manager.start_consumer("jobs", queue, Work(10.0))
    await settle()
    await manager.shutdown(0)
    assert "put_nowait() of the source of consumer 'jobs' raised" in caplog.text
    assert "not acknowledged: 1 ('work')" in caplog.text


async def test_qsize_that_raises_does_not_break_a_shutdown(caplog: pytest.LogCaptureFixture) -> None:
    """The queue counts as empty."""

    class Broken(asyncio.Queue[int]):
        def qsize(self) -> int:
            raise OSError("no size")

        def empty(self) -> bool:
            return not vars(self)["_queue"]

    manager, queue = TaskManager(), Broken()
    await manager.start_consumer("jobs", queue, Work(), drain="queued")
    await settle()
    assert (await manager.shutdown(10.0)).clean
    assert "qsize() of the source of consumer 'jobs' raised" in caplog.text


@pytest.mark.parametrize("turns", range(5))
async def test_cancelled_consumer_leaves_the_room_to_the_next_producer(turns: int) -> None:
    """Also if it is cancelled in the turn in which it gets the room."""
    manager, queue = TaskManager(max_concurrency=1, max_queue=0), filled([1])
    first = manager.create_task(rest())
    consumer = await manager.start_consumer("jobs", queue, Work())
    await settle()
    producer = asyncio.create_task(manager.put_task(asyncio.sleep(1.0)))
    await settle()
    first.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    consumer.cancel()
    await asyncio.wait([consumer, producer], timeout=10.0)
    assert producer.done()
    assert consumer_of(consumer).done + queue.qsize() == 1
    await manager.shutdown(10.0)


async def test_item_that_swallows_its_cancellation_is_done() -> None:
    """It has returned, so it is acknowledged and not handed back."""
    manager, queue = TaskManager(), filled([1])
    consumer = await manager.start_consumer("jobs", queue, lambda item: ignore_cancels(2.0))
    await asyncio.sleep(1.0)
    await manager.shutdown(0)
    assert fates(consumer) == {"done": 1}
    assert unfinished(queue) == 0


async def test_item_that_does_not_stop_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """It is neither finished nor handed back while it runs; afterwards, it is settled."""
    manager, queue = TaskManager(), filled([1])

    async def handle(item: int) -> None:
        await ignore_cancels(100.0)

    consumer = await manager.start_consumer("jobs", queue, handle)
    await asyncio.sleep(1.0)
    report = await manager.shutdown(0, 10.0)
    assert "handle" in report.still_running
    assert "consumer 'jobs' has stopped; still running: 1 ('handle')" in caplog.text
    assert (queue.qsize(), unfinished(queue)) == (0, 1)
    await asyncio.sleep(100.0)
    assert unfinished(queue) == 0
    assert fates(consumer) == {"done": 1}


async def test_shutdown_without_any_time_hands_back_what_it_has_cancelled() -> None:
    """What has not ended when it returns is handed back at its end."""
    manager, queue = TaskManager(), filled([1, 2])

    async def handle(item: int) -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(float(item))

    await manager.start_consumer("jobs", queue, handle)
    await asyncio.sleep(1.0)
    await manager.shutdown(0, 0)
    assert now() == 1001.0
    await asyncio.sleep(5.0)
    assert rest_of(queue) == [1, 2]
    assert unfinished(queue) == 2


async def test_shutdown_ends_a_backoff() -> None:
    """The item, which has no attempt running, is handed back."""
    manager, queue, work = TaskManager(), filled([1]), Work(1.0, fails=[1])
    retry = RetryPolicy(delay=30.0, max_delay=30.0, jitter=0)
    consumer = await manager.start_consumer("jobs", queue, work, retry=retry)
    await asyncio.sleep(5.0)
    await manager.shutdown(60.0)
    assert now() == 1005.0
    assert fates(consumer) == {"handed_back": 1}
    assert rest_of(queue) == [1]


async def test_shutdown_while_the_consumer_waits_for_its_restart() -> None:
    """The consumer ends at once; its items get their grace."""
    manager, work = TaskManager(), Work(5.0)
    answers: list[Any] = [1]

    async def getone() -> int:
        if answers:
            return answers.pop()  # type: ignore[no-any-return]  # an item
        raise ConnectionError("broker away")

    restart = RestartPolicy(delay=60.0, jitter=0)
    consumer = await manager.start_consumer("jobs", getone, work, restart=restart)
    await asyncio.sleep(1.0)
    await manager.shutdown(60.0)
    assert now() == 1005.0
    assert work.done == [1]
    assert consumer.cancelled()


async def test_source_that_raises_when_it_is_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    """The consumer ends with the shutdown; its failure is logged, and is not an ERROR."""
    manager = TaskManager()

    async def getone() -> int:
        try:
            await rest()
        except asyncio.CancelledError:
            raise ConnectionError("closed") from None
        return 1

    consumer = await manager.start_consumer("jobs", getone, Work())
    await asyncio.sleep(1.0)
    await manager.shutdown(10.0)
    assert now() == 1001.0
    assert consumer.cancelled()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is not restarted (shutdown" in caplog.text


@pytest.mark.parametrize("drain", ["running", "queued", "all"])
async def test_item_that_arrives_with_the_shutdown_is_not_lost(drain: Any) -> None:
    """``get()`` has an item in the turn in which it is cancelled: it is handed back, or drained."""

    class Slow(asyncio.Queue[int]):
        async def get(self) -> int:
            item = await super().get()
            try:
                await asyncio.sleep(10.0)
            except asyncio.CancelledError:
                # As wait_for() of Python 3.11 does when its future is done.
                return item
            return item

    manager, queue, work = TaskManager(), Slow(), Work(1.0)
    queue.put_nowait(1)
    consumer = await manager.start_consumer("jobs", queue, work, drain=drain)
    await asyncio.sleep(1.0)
    await manager.shutdown(5.0)
    counts = fates(consumer)
    if drain == "running":
        assert counts == {"handed_back": 1}
        assert rest_of(queue) == [1]
    else:
        assert counts == {"done": 1}
        assert work.done == [1]
    assert unfinished(queue) == (drain == "running")


async def test_item_of_a_function_that_arrives_with_the_shutdown_runs() -> None:
    """There is no way back, and it has the grace."""
    manager, work = TaskManager(), Work(1.0)

    async def getone() -> int:
        try:
            await rest()
        except asyncio.CancelledError:
            return 7
        return 8

    await manager.start_consumer("jobs", getone, work)
    await asyncio.sleep(1.0)
    await manager.shutdown(5.0)
    assert work.done == [7]


async def test_item_that_arrives_after_the_grace_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """No task is created for it then."""
    manager, work = TaskManager(), Work(1.0)

    async def getone() -> int:
        try:
            await rest()
        except asyncio.CancelledError:
            await ignore_cancels(3.0)
            return 7
        return 8

    await manager.start_consumer("jobs", getone, work)
    await asyncio.sleep(1.0)
    await manager.shutdown(1.0)
    assert work.started == []
    assert "consumer 'jobs' has stopped; not acknowledged: 1 ('work (not started)')" in caplog.text
    await assert_no_tasks_left()


async def test_failure_during_a_shutdown_still_reaches_on_failure() -> None:
    """In the grace, a coroutine function too."""
    manager, queue, work = TaskManager(), filled([1]), Work(2.0, fails=[1])
    dead: list[int] = []

    async def bury(item: int, error: Exception) -> None:
        await asyncio.sleep(1.0)
        dead.append(item)

    await manager.start_consumer("jobs", queue, work, on_failure=bury)
    await asyncio.sleep(1.0)
    await manager.shutdown(10.0)
    assert now() == 1003.0
    assert dead == [1]
    assert unfinished(queue) == 0


async def test_on_failure_that_waits_for_a_place_is_not_dropped_by_a_shutdown() -> None:
    """Its item has run already; a prefetched item is handed back."""
    manager, queue, work = TaskManager(), filled([1, 2, 3]), Work(1.0, fails=[1])
    dead: list[int] = []

    async def bury(item: int, error: Exception) -> None:
        dead.append(item)

    consumer = await manager.start_consumer("jobs", queue, work, concurrency=1, prefetch=2, on_failure=bury)
    await asyncio.sleep(1.5)
    await manager.shutdown(10.0)
    assert now() == 1002.0
    assert (dead, work.done) == ([1], [2])
    assert fates(consumer) == {"done": 1, "failed": 1, "handed_back": 1}


async def test_on_failure_that_the_shutdown_cancels_hands_the_item_back() -> None:
    """Its failure is not dealt with yet."""
    manager, queue, work = TaskManager(), filled([1]), Work(1.0, fails=[1])

    async def bury(item: int, error: Exception) -> None:
        await rest()

    consumer = await manager.start_consumer("jobs", queue, work, on_failure=bury)
    await asyncio.sleep(2.0)
    await manager.shutdown(1.0)
    assert fates(consumer) == {"handed_back": 1}
    assert rest_of(queue) == [1]


@pytest.mark.parametrize("is_async", [False, True])
async def test_failure_while_the_shutdown_cancels(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A plain ``on_failure`` gets the item; for a coroutine function, it is too late."""
    manager, queue = TaskManager(), filled([1])
    dead: list[int] = []

    async def handle(item: int) -> None:
        try:
            await rest()
        except asyncio.CancelledError:
            raise OSError("connection lost") from None

    async def bury(item: int, error: Exception) -> None:
        dead.append(item)

    consumer = await manager.start_consumer(
        "jobs", queue, handle, on_failure=bury if is_async else lambda item, error: dead.append(item)
    )
    await asyncio.sleep(1.0)
    await manager.shutdown(1.0)
    assert dead == ([] if is_async else [1])
    assert fates(consumer) == ({"handed_back": 1} if is_async else {"failed": 1})
    assert unfinished(queue) == is_async
    line = "task 'handle' failed while the shutdown cancelled it: no on_failure runs, the item is handed back"
    assert (line in caplog.text) is is_async


async def test_cancelled_shutdown_and_a_second_one(caplog: pytest.LogCaptureFixture) -> None:
    """As ``run()`` does after a second signal: the items are handed back, and one line says so."""
    manager, work, queue = TaskManager(), Work(60.0), filled(range(5))
    await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=1, drain="all")
    await asyncio.sleep(1.0)
    first = asyncio.create_task(manager.shutdown(100.0))
    await asyncio.sleep(1.0)
    first.cancel()
    await asyncio.wait([first])
    await manager.shutdown(0.0, 1.0)
    assert rest_of(queue) == [3, 4, 0, 1, 2]
    assert unfinished(queue) == 5
    assert caplog.text.count("has stopped") == 1


async def test_what_is_left_behind_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not again by a second shutdown, and not by a consumer that ended before the shutdown."""
    manager, queue = TaskManager(), filled(range(3))
    ended = await manager.start_consumer("ended", queue, Work(100.0))
    await settle()
    ended.cancel()
    await manager.cancel_group("ended")
    queue.put_nowait(1)
    consumer = await manager.start_consumer("jobs", queue, Work(100.0))
    await settle()
    await manager.shutdown(0)
    await manager.shutdown(0)
    assert ended.done()
    assert consumer.done()
    assert [record.getMessage() for record in caplog.records if "has stopped" in record.getMessage()] == [
        "consumer 'jobs' has stopped; handed back: 1 ('work-4'); left in the queue: 1"
    ]


async def test_draining_everything_includes_what_the_items_add() -> None:
    """A crawler: the queue may be empty while a page is fetched whose links come next."""
    manager, queue = TaskManager(), filled([3])
    done: list[int] = []

    async def crawl(depth: int) -> None:
        await asyncio.sleep(1.0)
        done.append(depth)
        for _ in range(2 if depth else 0):
            queue.put_nowait(depth - 1)

    await manager.start_consumer("pages", queue, crawl, drain="all")
    await asyncio.sleep(0.5)
    await manager.shutdown(100.0)
    assert now() == 1004.0
    assert sorted(done) == [0] * 8 + [1] * 4 + [2, 2, 3]
    assert unfinished(queue) == 0


async def test_draining_a_chain_of_consumers() -> None:
    """The second one waits for what the first one still adds, and both end when nothing is left."""
    manager, second = TaskManager(), asyncio.Queue[int]()
    work = Work(0.1)

    async def handle(item: int) -> None:
        await asyncio.sleep(1.0)
        second.put_nowait(item)

    await manager.start_consumer("first", filled(range(3)), handle, concurrency=1, drain="all")
    await manager.start_consumer("second", second, work, drain="all")
    await asyncio.sleep(0.5)
    report = await manager.shutdown(100.0)
    assert now() == 1003.1
    assert report.clean
    assert work.done == [0, 1, 2]


async def test_draining_waits_for_a_producer_that_drains(caplog: pytest.LogCaptureFixture) -> None:
    """A service with ``drains=True``, not one that runs forever; what comes after the grace is left."""
    manager, queue, work = TaskManager(), asyncio.Queue[int](), Work(0.1)

    async def produce() -> None:
        for number in range(100):
            await asyncio.sleep(1.0)
            queue.put_nowait(number)

    await manager.start_service("clock", rest)
    await manager.start_service("producer", produce, drains=True)
    consumer = await manager.start_consumer("jobs", queue, work, drain="all")
    await asyncio.sleep(0.5)
    await manager.shutdown(5.0)
    assert now() == 1005.5
    assert work.done == [0, 1, 2, 3, 4]
    assert fates(consumer) == {"done": 5}
    assert "has stopped" not in caplog.text


async def test_draining_waits_for_nothing_that_waits_for_it() -> None:
    """A task that awaits the consumer, and an item that awaits the shutdown."""
    manager, queue = TaskManager(), filled([1])
    reports: list[Any] = []

    async def handle(item: int) -> None:
        await asyncio.sleep(1.0)
        reports.append(await manager.shutdown(math.inf))

    consumer = await manager.start_consumer("jobs", queue, handle, drain="all")

    async def watch() -> None:
        await asyncio.wait([consumer])

    watcher = manager.create_task(watch())
    await asyncio.wait([watcher])
    assert now() == 1001.0
    assert reports[0].clean


async def test_handler_may_shut_the_manager_down() -> None:
    """The consumer does not wait for the item that waits for the shutdown."""
    manager, queue = TaskManager(), filled([1, 2])
    done: list[Any] = []

    async def handle(item: int) -> None:
        if item == 1:
            done.append(await manager.shutdown(10.0))
        else:
            await asyncio.sleep(3.0)
        done.append(item)

    consumer = await manager.start_consumer("jobs", queue, handle)
    await asyncio.wait([consumer])
    assert now() == 1003.0
    assert done[0] == 2
    assert done[1].clean
    assert done[2] == 1
    assert consumer.status is TaskStatus.COMPLETED


async def test_handler_that_does_not_await_the_shutdown_lets_the_consumer_drain() -> None:
    """A plain task shuts the manager down: it holds none of the consumer's places."""
    queue: asyncio.Queue[int] = asyncio.Queue()
    for item in range(6):
        queue.put_nowait(item)
    manager, done, shutdowns = TaskManager("worker", grace=60.0), list[int](), list[asyncio.Task[Any]]()

    async def work(item: int) -> None:
        if item == 2:
            shutdowns.append(asyncio.create_task(manager.shutdown()))
        await asyncio.sleep(1)
        done.append(item)

    await manager.start_consumer("jobs", queue, work, concurrency=1, drain="queued")
    await asyncio.sleep(4)
    report = await shutdowns[0]
    assert (done, report.cancelled, queue.empty()) == (list(range(6)), 0, True)


async def test_two_managers_share_a_queue_at_a_shutdown() -> None:
    """What the one hands back, the other takes."""
    queue = filled(range(10))
    first, second, slow, fast = TaskManager("first"), TaskManager("second"), Work(100.0), Work(1.0)
    await first.start_consumer("jobs", queue, slow, concurrency=3)
    await second.start_consumer("jobs", queue, fast, concurrency=1)
    await asyncio.sleep(0.5)
    await first.shutdown(0)
    await queue.join()
    assert sorted(fast.done) == list(range(10))
    await second.shutdown(0)


async def test_two_consumers_drain_one_queue() -> None:
    """Neither waits for an item that the other one has taken."""
    manager, work, queue = TaskManager(), Work(1.0), filled(range(7))
    for name in ("first", "second"):
        await manager.start_consumer(name, queue, work, concurrency=2, drain="all")
    await asyncio.sleep(0.5)
    await manager.shutdown(100.0)
    assert sorted(work.done) == list(range(7))
    assert now() == 1002.0


def test_end_of_a_loop_without_a_shutdown_hands_items_back(caplog: pytest.LogCaptureFixture) -> None:
    """``asyncio.run()`` cancels them; they are not acknowledged, and the manager goes on in another loop."""
    manager, queue, work = TaskManager(), filled(range(3)), Work(1.0)

    async def end_early() -> None:
        await manager.start_consumer("jobs", queue, Work(100.0), concurrency=1, prefetch=1)
        await asyncio.sleep(1.0)

    async def shut_down() -> None:
        async with manager:
            await manager.start_consumer("jobs", queue, work)
            await asyncio.sleep(2.0)

    run(end_early())
    assert unfinished(queue) == queue.qsize() == 3
    assert "was not shut down before its event loop ended, and lost group 'jobs': 'work'" in caplog.text
    caplog.clear()
    run(shut_down())
    assert sorted(work.done) == [0, 1, 2]
    assert unfinished(queue) == 0
    assert caplog.text == ""


def test_system_exit_in_a_handler_leaves_the_item_unfinished() -> None:
    """The process ends with it, so the item is handed back."""
    manager = TaskManager()

    async def leave(item: int) -> None:
        raise SystemExit(3)

    async def start() -> tuple[ManagedTask[None], asyncio.Queue[Any]]:
        queue = filled([1])
        return await manager.start_consumer("jobs", queue, leave), queue

    loop = VirtualClockLoop()
    consumer, queue = loop.run_until_complete(start())
    with pytest.raises(SystemExit):
        loop.run_until_complete(rest())
    loop.run_until_complete(manager.shutdown(0))
    assert fates(consumer) == {"handed_back": 1}
    assert queue.qsize() == unfinished(queue) == 1
    loop.close()


@pytest.mark.parametrize("where", ["on_failure", "priority"])
def test_system_exit_in_an_option_leaves_the_item_unfinished(where: str) -> None:
    """As in a handler."""
    queue, work = filled([1]), Work(0.0, fails=[1])

    def end(*_: Any) -> Any:
        raise SystemExit(3)

    async def main() -> None:
        manager = TaskManager()
        options: dict[str, Any] = {where: end}
        await manager.start_consumer("jobs", queue, work, **options)
        try:
            await rest()
        finally:
            await manager.shutdown(0)

    with pytest.raises(SystemExit):
        run(main())
    assert unfinished(queue) == 1
    assert rest_of(queue) == [1]


# -- cancelling -----------------------------------------------------------------------------


async def test_cancelled_consumer_finishes_what_is_in_hand() -> None:
    """It takes nothing more, and ends cancelled."""
    manager, work, queue = TaskManager(), Work(3.0), filled(range(6))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=1)
    await asyncio.sleep(1.0)
    consumer.cancel("maintenance")
    await asyncio.wait([consumer])
    assert now() == 1006.0
    assert (work.done, work.cancelled) == ([0, 1, 2], [])
    assert rest_of(queue) == [3, 4, 5]
    assert consumer.cancelled()
    assert consumer.cause is not None
    assert (consumer.cause.kind, consumer.cause.message) == (CancelKind.EXPLICIT, "maintenance")
    await manager.shutdown(0)


async def test_cancelled_idle_consumer_ends_at_once() -> None:
    """It waits for nothing."""
    manager = TaskManager()
    queue: asyncio.Queue[int] = asyncio.Queue()
    consumer = await manager.start_consumer("jobs", queue, Work())
    await asyncio.sleep(1.0)
    assert await manager.cancel_task("jobs")
    assert now() == 1001.0
    assert consumer.cancelled()


async def test_consumer_cancelled_twice_does_not_wait_for_its_items() -> None:
    """They go on, and are acknowledged."""
    manager, work, queue = TaskManager(), Work(3.0), filled(range(2))
    consumer = await manager.start_consumer("jobs", queue, work)
    await asyncio.sleep(1.0)
    consumer.cancel()
    await asyncio.sleep(1.0)
    consumer.cancel()
    await asyncio.wait([consumer])
    assert now() == 1002.0
    await queue.join()
    assert sorted(work.done) == [0, 1]
    await manager.shutdown(0)


async def test_cancelled_group_stops_the_consumer_and_its_items() -> None:
    """The items are acknowledged and not handed back: something other than a shutdown has ended them."""
    manager, work, queue = TaskManager(), Work(3.0), filled(range(6))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=2, prefetch=1)
    await asyncio.sleep(1.0)
    await manager.cancel_group("jobs")
    assert consumer.cancelled()
    assert sorted(work.cancelled) == [0, 1]
    assert fates(consumer) == {"cancelled": 3}
    assert unfinished(queue) == 3
    assert rest_of(queue) == [3, 4, 5]
    assert now() == 1001.0
    await manager.shutdown(0)


async def test_item_that_is_cancelled_is_acknowledged() -> None:
    """The consumer goes on with the others."""
    manager, work, queue = TaskManager(), Work(3.0), filled(range(2))
    consumer = await manager.start_consumer("jobs", queue, work, concurrency=1)
    await asyncio.sleep(1.0)
    await manager.cancel_task("work")
    await queue.join()
    assert fates(consumer) == {"done": 1, "cancelled": 1}
    await manager.shutdown(0)


async def test_item_that_arrives_with_the_cancellation_is_handed_back() -> None:
    """As with a shutdown; that of a function runs, because there is no way back."""

    async def late() -> int:
        try:
            await rest()
        except asyncio.CancelledError:
            return 7
        return 8

    class Late(asyncio.Queue[int]):
        async def get(self) -> int:
            return await late()

    manager, work = TaskManager(), Work(1.0)
    queue = Late()
    first = await manager.start_consumer("queue", queue, work)
    second = await manager.start_consumer("function", late, work)
    await asyncio.sleep(1.0)
    for consumer in (first, second):
        consumer.cancel()
    await asyncio.wait([first, second])
    assert queue.qsize() == 1
    assert work.done == [7]
    await manager.shutdown(0)


async def test_replaced_consumer_ends_before_the_new_one_starts() -> None:
    """With ``on_conflict="replace"``: its items end first."""
    manager, queue = TaskManager(), filled(range(4))
    old, new = Work(3.0), Work(1.0)
    await manager.start_consumer("jobs", queue, old, concurrency=2)
    await asyncio.sleep(1.0)
    await manager.start_consumer("jobs", queue, new, concurrency=2, on_conflict="replace")
    assert now() == 1003.0
    await queue.join()
    assert (old.done, new.done) == ([0, 1], [2, 3])
    await manager.shutdown(0)


async def test_consumer_that_is_returned_on_conflict_is_the_live_one() -> None:
    """The second call leaves it as it is, and takes nothing."""
    manager, queue = TaskManager(), filled(range(3))
    first, second = Work(1.0), Work(1.0)
    consumer = await manager.start_consumer("jobs", queue, first)
    assert await manager.start_consumer("jobs", queue, second, on_conflict="return") is consumer
    await queue.join()
    assert (first.done, second.done) == ([0, 1, 2], [])
    assert consumer_of(consumer).done == 3
    with pytest.raises(TaskExistsError):
        await manager.start_consumer("jobs", queue, second)
    await manager.shutdown(0)


# -- refused --------------------------------------------------------------------------------


async def handle(item: Any) -> None:
    """Do nothing."""


def plain(*items: Any) -> None:
    """No coroutine function."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"source": plain},
            "source must be an asyncio.Queue, or a coroutine function .* declare it with async def",
        ),
        ({"source": 7}, "source must be .* got 7: write source=asyncio.Queue()"),
        ({"source": asyncio.Queue}, r"create one, as in Queue\(\)"),
        ({"source": thread_queues.Queue()}, r"its get\(\) would block the event loop; use an asyncio.Queue"),
        ({"handle": plain}, r"write async def plain\(item\)"),
        ({"handle": None}, "the handler must be a coroutine function that takes an item, got None"),
        ({"retry": 3}, "retry must be a RetryPolicy"),
        ({"timeout": "1"}, "timeout must be seconds"),
        ({"metadata": 7}, "metadata must be a mapping"),
        ({"on_failure": 7}, "on_failure must be a function of an item and an exception, got 7"),
        ({"restart": 1}, "restart must be a RestartPolicy"),
        ({"critical": "no"}, "critical must be True or False"),
        ({"on_give_up": 7}, "on_give_up must be a plain function"),
        ({"name": 7}, "consumer name must be a string"),
    ],
)
async def test_wrong_type_is_refused(change: dict[str, Any], message: str) -> None:
    """At the call, with what to write instead."""
    given: dict[str, Any] = {"name": "jobs", "source": asyncio.Queue(), "handle": handle, **change}
    manager = TaskManager()
    with pytest.raises(TypeError, match=message):
        await manager.start_consumer(given.pop("name"), given.pop("source"), given.pop("handle"), **given)
    assert manager.stats().live == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1, got 0"),
        ({"concurrency": None}, "concurrency must be a whole number of at least 1, got None"),
        ({"concurrency": True}, "concurrency must be a whole number of at least 1, got True"),
        ({"prefetch": -1}, "prefetch must be a whole number of at least 0, got -1"),
        ({"prefetch": 1.5}, "prefetch must be a whole number of at least 0, got 1.5"),
        ({"drain": "none"}, "drain must be one of 'running', 'queued', 'all', got 'none'"),
        (
            {"drain": "all", "source": rest},
            r"drain='all' needs a queue that has qsize\(\) and get_nowait\(\)",
        ),
        ({"timeout": -1}, "timeout must be at least 0 seconds"),
        ({"priority": 9}, "priority must be one of"),
        ({"on_conflict": "maybe"}, "on_conflict must be one of"),
        ({"name": ""}, "consumer name must not be empty"),
        ({"name": "a#1"}, "consumer name must not contain '#'"),
        ({"name": "a..b"}, "group name must not have empty parts"),
        ({"name": "root"}, "consumer name must not be 'root'"),
    ],
)
async def test_wrong_value_is_refused(change: dict[str, Any], message: str) -> None:
    """At the call, with the value."""
    given: dict[str, Any] = {"name": "jobs", "source": asyncio.Queue(), "handle": handle, **change}
    manager = TaskManager()
    with pytest.raises(ValueError, match=message):
        await manager.start_consumer(given.pop("name"), given.pop("source"), given.pop("handle"), **given)
    assert manager.stats().live == 0


async def test_coroutines_are_refused_and_closed() -> None:
    """In place of a source, a handler, and ``on_failure``; no warning says that they were never awaited."""
    manager = TaskManager()
    queue: asyncio.Queue[int] = asyncio.Queue()
    wrong: Any = [rest() for _ in range(3)]
    with pytest.raises(TypeError, match=r"write start_consumer\(name, rest, handle\)"):
        await manager.start_consumer("jobs", wrong[0], handle)
    with pytest.raises(TypeError, match=r"write start_consumer\(name, source, rest\)"):
        await manager.start_consumer("jobs", queue, wrong[1])
    with pytest.raises(TypeError, match="write on_failure=lambda item, error"):
        await manager.start_consumer("jobs", queue, handle, on_failure=wrong[2])
    assert all(coro.cr_frame is None for coro in wrong)


async def test_group_with_other_options_is_refused() -> None:
    """The message shows both calls."""
    manager = TaskManager()
    queue: asyncio.Queue[int] = asyncio.Queue()
    manager.get_group("jobs", max_concurrency=3)
    with pytest.raises(
        ValueError,
        match=r"get_group\('jobs', max_concurrency=3\), and now start_consumer\('jobs', concurrency=8\)",
    ):
        await manager.start_consumer("jobs", queue, handle)
    await manager.start_consumer("jobs", queue, handle, concurrency=3)
    await manager.shutdown(0)


async def test_source_that_returns_nothing_to_await_fails_the_consumer() -> None:
    """A lambda cannot be refused at the call."""
    manager = TaskManager(on_error=lambda *_: None)
    wrong: Any = lambda: 7  # noqa: E731 - a lambda is what is tested
    consumer = await manager.start_consumer("jobs", wrong, handle, restart=RestartPolicy(max_failures=1))
    with pytest.raises(TypeError, match="the source of consumer 'jobs' returned 7, which cannot be awaited"):
        await consumer


# -- in each turn of the loop ---------------------------------------------------------------


class Wrapped(asyncio.Queue[int]):
    """A queue whose ``get()`` goes through a task of its own, as a client's may."""

    async def get(self) -> int:
        return await asyncio.wait_for(super().get(), 5.0)


@pytest.mark.parametrize("kind", [asyncio.Queue, Wrapped])
@pytest.mark.parametrize("how", ["cancel", "twice", "group", "shutdown", "drain"])
def test_stopping_in_any_turn_loses_no_item(kind: type[asyncio.Queue[int]], how: str) -> None:
    """Before, while, and after an item arrives, is started, fails, and is acknowledged."""
    for turns in range(25):
        run(_stopped_after(turns, kind(), how))


async def _stopped_after(turns: int, queue: asyncio.Queue[int], how: str) -> None:
    manager, dead = TaskManager(on_error=lambda *_: None), list[int]()
    done: list[int] = []

    async def handle(item: int) -> None:
        await asyncio.sleep(0)
        if item == 1:
            raise OSError
        done.append(item)

    async def bury(item: int, error: Exception) -> None:
        await asyncio.sleep(0)
        dead.append(item)

    consumer = await manager.start_consumer(
        "jobs", queue, handle, concurrency=1, prefetch=1, on_failure=bury, drain="all"
    )
    for number in range(turns):
        if number % 4 == 0:
            queue.put_nowait(number // 4)
        await asyncio.sleep(0)
    if how == "group":
        await manager.cancel_group("jobs")
    elif how in ("cancel", "twice"):
        consumer.cancel()
        await asyncio.sleep(0)
        if how == "twice":
            consumer.cancel()
    await manager.shutdown(0.0 if how == "shutdown" else 10.0)
    await settle()
    counts, left = consumer_of(consumer), rest_of(queue)
    assert (counts.in_hand, counts.done, counts.failed) == (0, len(done), len(dead))
    assert len(done) + len(dead) + counts.cancelled + len(left) == (turns + 3) // 4
    assert len({*done, *dead, *left}) == len(done) + len(dead) + len(left)
    assert unfinished(queue) == len(left)
    assert manager.stats().live == 0


async def test_shutdown_in_the_turn_of_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """The consumer has taken nothing, and says what is left in the queue."""
    manager, queue = TaskManager(), filled(range(3))
    consumer = await manager.start_consumer("jobs", queue, Work(), drain="all")
    await manager.shutdown(10.0)
    assert consumer.cancelled()
    assert queue.qsize() == unfinished(queue) == 3
    assert "consumer 'jobs' has stopped; left in the queue: 3" in caplog.text


@pytest.mark.parametrize("on_conflict", ["error", "replace"])
def test_cancelled_start_leaves_nothing_behind(on_conflict: Any) -> None:
    """Wherever its caller is cancelled."""

    async def scenario(manager: TaskManager) -> None:
        queue = filled(range(3))
        first = await manager.start_consumer("jobs", queue, Work())
        await asyncio.sleep(0.5)
        if on_conflict == "error":
            first.cancel()
            await asyncio.wait([first])
        await manager.start_consumer("jobs", queue, Work(), on_conflict=on_conflict)
        await queue.join()

    with SpanRecorder() as spans:
        assert cancel_at_each_await(scenario, spans) >= 2


# -- whatever happens -----------------------------------------------------------------------


class Plan:
    """A random run: how long each item takes, which fail, and when the shutdown comes."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.items = draw(st.integers(0, 25))
        self.concurrency = draw(st.integers(1, 4))
        self.prefetch = draw(st.integers(0, 3))
        self.drain = draw(st.sampled_from(["running", "queued", "all"]))
        self.limit = draw(st.sampled_from([None, 2]))
        self.retry = draw(st.sampled_from([None, RetryPolicy(max_attempts=2, delay=1.0, jitter=0)]))
        self.timeout = draw(st.sampled_from([None, 3.0]))
        self.buries = draw(st.sampled_from([None, "sync", "async"]))
        self.seconds = draw(st.lists(st.integers(0, 4), min_size=1, max_size=7))
        self.fails = draw(
            st.lists(st.sampled_from(["", "", "fail", "once", "stubborn"]), min_size=1, max_size=5)
        )
        self.moment = draw(st.integers(0, 20)) / 2
        self.grace = draw(st.integers(0, 12)) / 2
        self.late = draw(st.integers(0, 4))
        self.cancels = draw(st.sampled_from(["", "", "item", "consumer", "twice"]))
        self.consumers = draw(st.integers(1, 2))
        self.cut_after = draw(st.sampled_from([None, None, 1.25]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_item_has_one_fate(data: st.DataObject) -> None:
    """Done, failed, cancelled, handed back, or still queued: nothing is lost, and nothing is done twice."""
    run(_one_fate(Plan(data.draw)))


async def _one_fate(plan: Plan) -> None:
    manager = TaskManager(max_concurrency=plan.limit, on_error=lambda *_: None)
    queue = filled(range(plan.items))
    done: list[int] = []
    dead: list[int] = []
    tries: dict[int, int] = {}
    put = plan.items

    async def handle(item: int) -> None:
        tries[item] = tries.get(item, 0) + 1
        kind = plan.fails[item % len(plan.fails)]
        seconds = plan.seconds[item % len(plan.seconds)]
        if kind == "stubborn":
            await ignore_cancels(seconds)
        else:
            await asyncio.sleep(seconds)
        if kind == "fail" or (kind == "once" and tries[item] == 1):
            raise OSError(item)
        done.append(item)

    async def bury(item: int, error: Exception) -> None:
        await asyncio.sleep(0.5)
        dead.append(item)

    on_failure: Any = {None: None, "sync": lambda item, error: dead.append(item), "async": bury}[plan.buries]
    consumers = [
        await manager.start_consumer(
            f"jobs{number}",
            queue,
            handle,
            concurrency=plan.concurrency,
            prefetch=plan.prefetch,
            drain=plan.drain,
            retry=plan.retry,
            timeout=plan.timeout,
            priority=lambda item: item % 4,
            on_failure=on_failure,
        )
        for number in range(plan.consumers)
    ]
    await asyncio.sleep(plan.moment)
    if plan.cancels == "item":
        for task in manager.get_group("jobs0").tasks[2:3]:
            task.cancel()
    elif plan.cancels:
        consumers[0].cancel()
        await asyncio.sleep(0.5)
        if plan.cancels == "twice":
            consumers[0].cancel()
    shutdown = asyncio.create_task(manager.shutdown(plan.grace, 20.0))
    for _ in range(plan.late):
        await asyncio.sleep(0.25)
        queue.put_nowait(put)
        put += 1
    if plan.cut_after is not None and not shutdown.done():
        await asyncio.sleep(plan.cut_after)
        shutdown.cancel()
        await asyncio.wait([shutdown])
        shutdown = asyncio.create_task(manager.shutdown(0.0, 20.0))
    assert (await shutdown).clean
    await settle()
    counts = [consumer_of(consumer) for consumer in consumers]
    left = rest_of(queue)
    assert [count.in_hand for count in counts] == [0] * len(counts)
    assert sum(count.done for count in counts) == len(done) == len(set(done))
    cancelled, failed = (sum(getattr(count, what) for count in counts) for what in ("cancelled", "failed"))
    assert len(left) == len(set(left))
    assert set(left).isdisjoint(done)
    assert len(done) + failed + cancelled + len(left) == put
    if plan.buries is not None:
        assert len(dead) == failed
        assert set(dead).isdisjoint(done)
    # What is not finished is what the queue counts.
    assert unfinished(queue) == len(left)
    assert manager.stats().live == 0
    await assert_no_tasks_left()
