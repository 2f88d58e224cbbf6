"""Retries: attempts and their spans, contexts, places, cancellations, timeouts, and what is refused."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import itertools
import logging
import sys
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace import StatusCode

from otel_tasks import (
    CancelCause,
    CancelKind,
    ManagerClosedError,
    RetryPolicy,
    TaskGroup,
    TaskManager,
    TaskPriority,
    TaskStatus,
    create_task,
    current_group,
    current_task,
    managed_task,
)
from otel_tasks._core.retry import retried
from otel_tasks.asgi import TaskGroupMiddleware, uncancellable
from otel_tasks.testing import FakeConnection, SpanRecorder, assert_no_tasks_left, run
from tests.helpers import cancel_at_each_await, counters, fail, give, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_tasks import ManagedTask

# Without chance, and counted in seconds that are easy to add up.
STEADY = RetryPolicy(delay=1.0, jitter=0)
ENDLESS = RetryPolicy(max_attempts=None, delay=1.0, factor=1.0, max_delay=1.0, jitter=0)
WARNS = logging.WARNING


class Flaky:
    """Fails so many times, then returns "done"; notes when each attempt began, and in which task."""

    def __init__(
        self, failures: float, *, lasts: float = 0.0, error: type[Exception] = ConnectionError
    ) -> None:
        self.failures = failures
        self.lasts = lasts
        self.error = error
        self.began: list[float] = []
        self.tasks: list[ManagedTask[Any] | None] = []

    async def fetch(self) -> str:
        self.began.append(now())
        self.tasks.append(current_task())
        number = len(self.began)
        if self.lasts:
            await asyncio.sleep(self.lasts)
        if number <= self.failures:
            raise self.error(f"failure {number}")
        return "done"


def named(spans: SpanRecorder, name: str) -> list[ReadableSpan]:
    """The spans with this name, in the order of their starts."""
    return sorted((s for s in spans.finished if s.name == name), key=lambda span: span.start_time or 0)


def attribute(span: ReadableSpan, name: str) -> object:
    return (span.attributes or {}).get(name)


def is_below(span: ReadableSpan, parent: ReadableSpan) -> bool:
    above, context = span.parent, parent.get_span_context()
    return above is not None and context is not None and above.span_id == context.span_id


# -- attempts -----------------------------------------------------------------------------------------------


async def test_failed_work_runs_again_in_the_same_task() -> None:
    """The attempts are one task, which returns what the last one returns; the delays grow."""
    manager, work = TaskManager(), Flaky(2)
    task = manager.create_task(work.fetch, retry=STEADY)
    assert await task == "done"
    assert [began - work.began[0] for began in work.began] == [0, 1, 3]
    assert work.tasks == [task] * 3
    assert counters(manager) == {"created": 1, "completed": 1, "remembered": 1}
    assert task.info().attempt == 3


async def test_last_failure_is_the_failure_of_the_task() -> None:
    """After the last attempt, the task fails with its exception, which says how many there were."""
    work = Flaky(99)
    task = TaskManager().create_task(work.fetch, retry=STEADY, name="mail")
    with pytest.raises(ConnectionError) as caught:
        await task
    assert str(caught.value) == "failure 3"
    assert caught.value.__notes__ == ["task 'mail' failed after 3 attempts"]
    assert caught.value.__context__ is None
    assert (task.status, len(work.began)) == (TaskStatus.FAILED, 3)


async def test_failure_that_the_policy_does_not_name_is_final() -> None:
    """Another exception ends the task in its first attempt, without a note."""
    work = Flaky(99, error=ValueError)
    with pytest.raises(ValueError, match=r"^failure 1$") as caught:
        await TaskManager().create_task(work.fetch, retry=STEADY)
    assert not hasattr(caught.value, "__notes__")


async def test_failure_without_a_bound_is_retried_until_it_works() -> None:
    """With max_attempts=None, only the policy's exceptions and a cancellation bound the attempts."""
    work = Flaky(40)
    assert await TaskManager().create_task(work.fetch, retry=ENDLESS) == "done"
    assert len(work.began) == 41


async def test_one_attempt_is_no_retry() -> None:
    """With max_attempts=1, a failure is final."""
    with pytest.raises(ConnectionError, match=r"^failure 1$") as caught:
        await TaskManager().create_task(Flaky(1).fetch, retry=RetryPolicy(max_attempts=1))
    assert not hasattr(caught.value, "__notes__")


async def test_function_that_decides_sees_each_failure() -> None:
    """A function as ``on`` is not asked about the last attempt; what it raises ends the task."""
    seen: list[str] = []

    def judge(error: Exception) -> bool:
        seen.append(str(error))
        return True

    with pytest.raises(ConnectionError):
        await TaskManager().create_task(Flaky(9).fetch, retry=RetryPolicy(on=judge, delay=0))
    assert seen == ["failure 1", "failure 2"]

    with pytest.raises(ZeroDivisionError) as caught:
        await TaskManager().create_task(Flaky(9).fetch, retry=RetryPolicy(on=lambda error: 1 // 0 > 0))
    assert isinstance(caught.value.__context__, ConnectionError)


async def test_work_that_raises_before_it_makes_a_coroutine_fails_the_attempt() -> None:
    """The first call belongs to the caller; a later one belongs to its attempt."""
    calls = itertools.count(1)

    def make() -> Coroutine[Any, Any, str]:
        number = next(calls)
        if number == 2:
            raise ConnectionError("cannot even start")
        return Flaky(1 if number == 1 else 0).fetch()

    assert await TaskManager().create_task(make, retry=STEADY) == "done"
    assert next(calls) == 4

    def broken() -> Coroutine[Any, Any, str]:
        raise ConnectionError("the caller's")

    with pytest.raises(ConnectionError, match="the caller's"):
        TaskManager().create_task(broken, retry=STEADY)


async def test_attempt_number_is_visible_while_the_task_lives() -> None:
    """It is in the snapshot and in the tree; before the first attempt and without retries, it is None."""
    manager = TaskManager()
    manager.max_concurrency = 1
    plain = manager.create_task(asyncio.sleep(1))
    task = manager.create_task(Flaky(1, lasts=1).fetch, retry=STEADY)
    await settle()
    assert (plain.info().attempt, task.info().attempt) == (None, None)
    await asyncio.sleep(1.5)
    assert task.info().attempt == task.info().to_dict()["attempt"] == 1
    assert "fetch: running" in str(manager.tree())
    assert "attempt" not in str(manager.tree())
    await asyncio.sleep(0.75)
    [node] = manager.tree().root.tasks
    assert (node.attempt_number, node.retry_in, node.status) == (1, 0.75, TaskStatus.RUNNING)
    assert node.to_dict()["retry_in"] == 0.75
    assert "fetch: running, 2.2s, backing off, attempt 2 in 750ms" in str(manager.tree())
    assert "sleep_unless_set" in task.stack()
    await asyncio.sleep(1)
    assert "fetch: running, 3.2s, attempt 2, at Flaky.fetch" in str(manager.tree())
    assert "await asyncio.sleep(self.lasts)" in task.stack()
    await task


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda: give(1), "give"),
        (functools.partial(give, 1), "give"),
        (functools.partial(functools.partial(give), 1), "give"),
        (Flaky(0).fetch, "fetch"),
        (functools.partial(Flaky(0).fetch), "fetch"),
    ],
)
async def test_task_is_named_after_the_coroutine(
    work: Callable[[], Coroutine[Any, Any, Any]], name: str, spans: SpanRecorder
) -> None:
    """The name and the code of the span are those of the coroutine function, whatever makes the coroutine."""
    manager = TaskManager(tracer_provider=spans.provider)
    first, second = (manager.create_task(work, retry=STEADY) for _ in range(2))
    assert [first.name, second.name] == [name, f"{name}-2"]
    await asyncio.gather(first, second)
    code = {attribute(span, "code.function.name") for span in named(spans, name)} - {None}
    assert code in ({"tests.helpers.give"}, {"tests.test_retry.Flaky.fetch"})


# -- ways to start ------------------------------------------------------------------------------------------


async def test_every_way_to_start_a_task_takes_a_policy() -> None:
    """Functions, managers, groups, the decorator, threads, and put_task retry in the same way."""
    async with TaskManager() as manager, TaskGroup(manager=manager) as group:
        works = [Flaky(1) for _ in range(8)]
        fetches = iter([work.fetch for work in works])
        tasks = [
            create_task(next(fetches), retry=STEADY),
            manager.create_task(next(fetches), retry=STEADY, group="mail"),
            group.create_task(next(fetches), retry=STEADY),
            await group.put_task(next(fetches), retry=STEADY),
            await manager.put_task(next(fetches), retry=STEADY),
            await manager.start_task("named", next(fetches), retry=STEADY),
        ]
        future = manager.create_task_threadsafe(next(fetches), retry=STEADY)
        decorated = managed_task(retry=STEADY)(next(fetches))
        assert await decorated() == await asyncio.wrap_future(future) == "done"
        assert [await task for task in tasks] == ["done"] * 6
    assert [len(work.began) for work in works] == [2] * 8


async def test_tasks_of_a_group_take_its_policy() -> None:
    """However a task enters the group; the group below it has no policy."""
    async with TaskManager() as manager:
        mail = manager.get_group("mail", retry=STEADY)
        works = [Flaky(1) for _ in range(6)]
        fetches = iter([work.fetch for work in works])
        tasks = [
            manager.create_task(next(fetches), group="mail"),
            mail.create_task(next(fetches), timeout=60),
            await manager.put_task(next(fetches), group=mail),
            await manager.start_task("named", next(fetches), group="mail"),
        ]
        future = manager.create_task_threadsafe(next(fetches), group="mail")
        decorated = managed_task(group="mail", manager=manager)(next(fetches))
        assert await decorated() == await asyncio.wrap_future(future) == "done"
        assert [await task for task in tasks] == ["done"] * 4
        assert [len(work.began) for work in works] == [2] * 6
        with pytest.raises(TypeError, match=r"^create_task\(\) takes a coroutine, got the function fetch"):
            manager.create_task(works[0].fetch, group="mail.bulk")


async def test_function_in_a_thread_takes_the_policy_of_its_group() -> None:
    """It is called again."""
    failures = [OSError(), OSError()]

    def upload() -> str:
        if failures:
            raise failures.pop()
        return "done"

    async with TaskManager() as manager:
        manager.get_group("mail", retry=STEADY)
        assert await manager.run_in_thread(upload, group="mail") == "done"


async def test_policy_of_the_call_comes_before_that_of_the_group() -> None:
    """One attempt means none again."""
    manager, work = TaskManager(), Flaky(1)
    manager.get_group("mail", retry=STEADY)
    task = manager.create_task(work.fetch, group="mail", retry=RetryPolicy(max_attempts=1))
    with pytest.raises(ConnectionError):
        await task
    assert len(work.began) == 1


async def test_coroutine_is_refused_by_a_group_that_retries() -> None:
    """The message shows what to write; each way in closes the coroutine."""
    manager = TaskManager()
    mail = manager.get_group("mail", retry=STEADY)
    line = r"^group 'mail' retries its tasks, and the coroutine rest runs only once: write {}rest\(...\), "
    with pytest.raises(TypeError, match=line.format(r"create_task\(lambda: ")):
        mail.create_task(rest())
    with pytest.raises(TypeError, match=line.format(r"put_task\(lambda: ")):
        await manager.put_task(rest(), group="mail")
    with pytest.raises(TypeError, match=line.format(r"start_task\(name, lambda: ")):
        await manager.start_task("rest", rest(), group="mail")
    await manager.create_task(give(1))
    future = manager.create_task_threadsafe(rest(), group="mail")
    with pytest.raises(TypeError, match=line.format(r"create_task_threadsafe\(lambda: ")):
        await asyncio.wrap_future(future)


async def test_task_of_a_group_that_retries_creates_tasks_from_coroutines() -> None:
    """They are part of its attempt: they run once, and again with its next one."""
    manager, work = TaskManager(), Flaky(1)
    manager.get_group("mail", retry=STEADY)

    async def send() -> str:
        return await create_task(work.fetch())

    with pytest.raises(ConnectionError):
        # Nobody awaits the first part but its task, whose attempt fails with it.
        await manager.create_task(send, group="mail", retry=RetryPolicy(max_attempts=1))
    assert await manager.create_task(send, group="mail") == "done"


async def test_decorated_function_gets_its_arguments_again() -> None:
    """Each attempt of a decorated function gets the arguments of the call, as a method too."""
    calls: list[tuple[int, int]] = []

    class Client:
        @managed_task(group="mail", retry=STEADY, record=lambda self, first, *, second: {"first": first})
        async def send(self, first: int, *, second: int) -> int:
            calls.append((first, second))
            if len(calls) < 3:
                raise ConnectionError
            return first

    task = Client().send.start(1, second=2)
    assert task.metadata == {"first": 1}
    assert await task == 1
    assert calls == [(1, 2)] * 3


@pytest.mark.real_clock
async def test_function_in_a_thread_is_called_again() -> None:
    """run_in_thread calls the function once for each attempt."""
    calls: list[int] = []

    def work(number: int) -> str:
        calls.append(number)
        if len(calls) < 3:
            raise ConnectionError
        return "done"

    manager = TaskManager()
    task = manager.run_in_thread(work, 7, retry=RetryPolicy(delay=0))
    assert (task.name, await task, calls) == ("work", "done", [7, 7, 7])


async def test_result_of_a_retried_task_is_kept() -> None:
    """start_task keeps the result of the last attempt with the record."""
    manager = TaskManager()
    await manager.start_task("import", Flaky(1).fetch, retry=STEADY, metadata={"job": 1})
    await manager.join()
    assert await manager.wait_for_task("import") == "done"
    info = manager.get_task_info("import")
    assert info is not None
    assert (info.attempt, info.metadata) == (2, {"job": 1})


async def test_options_for_a_taken_name_apply() -> None:
    """on_conflict replaces a task that backs off, or returns it; work that is not needed is closed."""
    manager = TaskManager()
    old = manager.create_task(Flaky(99).fetch, name="x", retry=STEADY)
    await asyncio.sleep(0.5)
    assert manager.create_task(Flaky(0).fetch, name="x", retry=STEADY, on_conflict="return") is old
    new = manager.create_task(Flaky(0).fetch, name="x", retry=STEADY, on_conflict="replace")
    assert await new == "done"
    assert (old.status, kind_of(old)) == (TaskStatus.CANCELLED, CancelKind.REPLACED)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager start")
async def test_eager_task_is_retried() -> None:
    """The first attempt runs its first step at the call."""
    work = Flaky(1)
    task = TaskManager(eager_start=True).create_task(work.fetch, retry=STEADY)
    assert len(work.began) == 1
    assert await task == "done"


# -- what is refused ----------------------------------------------------------------------------------------


async def plain() -> None:
    """A coroutine function."""


@pytest.mark.parametrize(
    ("work", "policy", "message"),
    [
        (
            plain,
            3,
            r"retry must be a RetryPolicy, got 3: write retry=RetryPolicy\(\)",
        ),
        (
            17,
            STEADY,
            r"retry= takes a function .*, got 17: write create_task\(lambda: work\(...\), retry=...\)",
        ),
        (
            lambda: 17,
            STEADY,
            r"create_task\(\) takes a function that returns a coroutine, and the lambda returned 17: .*",
        ),
        (lambda number: plain(), STEADY, r".*missing 1 required positional argument: 'number'"),
    ],
)
async def test_work_that_cannot_be_repeated_is_refused(work: Any, policy: Any, message: str) -> None:
    """The message shows the line to write; no task is created."""
    manager = TaskManager()
    with pytest.raises(TypeError, match=f"^{message}$"):
        manager.create_task(work, retry=policy)
    assert manager.stats().created == 0


@pytest.mark.parametrize("way", ["create_task", "put_task", "start_task", "create_task_threadsafe"])
async def test_coroutine_is_refused_because_it_runs_once(way: str) -> None:
    """A bare coroutine is closed, and the message shows the function to pass instead."""
    manager = TaskManager()
    first = "name, " if way == "start_task" else ""
    message = (
        f"retry= runs the work again, and the coroutine plain runs only once: "
        f"write {way}({first}lambda: plain(...), retry=...)"
    )
    create: Any = getattr(manager, way)
    arguments = ("n",) if way == "start_task" else ()
    with pytest.raises(TypeError) as caught:
        made = create(*arguments, plain(), retry=STEADY)
        if asyncio.iscoroutine(made):
            await made
    assert str(caught.value) == message
    assert manager.stats().created == 0


async def test_function_without_retries_stays_an_error() -> None:
    """create_task takes a function only with retry=; None is the same as no retries."""
    create: Any = TaskManager().create_task
    for options in ({}, {"retry": None}):
        with pytest.raises(TypeError, match=r"^create_task\(\) takes a coroutine, got the function plain"):
            create(plain, **options)
    assert await create(give(1), retry=None) == 1


async def test_refused_task_leaves_no_coroutine_unawaited() -> None:
    """A closed manager refuses the task and closes what the function had made."""
    manager = TaskManager()
    await manager.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ManagerClosedError):
            manager.create_task(plain, retry=STEADY)
        gc.collect()


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("timeout", [None, 9])
async def test_task_cancelled_before_its_start_leaves_no_coroutine_unawaited(
    queued: bool, timeout: float | None
) -> None:
    """The coroutine of the first attempt, which exists from the creation on, is closed with the task."""
    manager, work = TaskManager(), Flaky(0)
    manager.max_concurrency = 1 if queued else None
    blocker = manager.create_task(asyncio.sleep(1))
    task = manager.create_task(work.fetch, retry=STEADY, timeout=timeout)
    if queued:
        await settle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.cancel()
        await asyncio.wait([task])
        assert (task.status, task.info().started_at) == (TaskStatus.CANCELLED, None)
        del task
        gc.collect()
    await blocker
    assert not work.began


# -- cancellation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0.5, 1.5], ids=["in the attempt", "in the backoff"])
async def test_cancel_ends_the_attempt_or_the_backoff(after: float) -> None:
    """A cancelled task does not try again, and ends at once."""
    manager, work = TaskManager(), Flaky(99, lasts=1)
    task = manager.create_task(work.fetch, retry=STEADY)
    await asyncio.sleep(after)
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (now() - work.began[0], len(work.began)) == (after, 1)
    assert (kind_of(task), counters(manager)["cancelled"]) == (CancelKind.EXPLICIT, 1)


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_only_exceptions_are_retried(error: type[BaseException]) -> None:
    """A foreign CancelledError, SystemExit, and KeyboardInterrupt end the task in their first attempt."""
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        raise error

    async def main() -> None:
        manager = TaskManager()
        task = manager.create_task(work, retry=RetryPolicy(on=Exception))
        await asyncio.wait([task])
        assert kind_of(task) is CancelKind.FOREIGN

    if error is asyncio.CancelledError:
        run(main())
    else:
        with pytest.raises(error):
            run(main())
    assert calls == [1]


async def test_group_with_a_cancellation_is_not_retried() -> None:
    """A BaseExceptionGroup is no failure to retry; an ExceptionGroup of named exceptions is."""
    calls: list[int] = []

    async def work(error: BaseException) -> None:
        calls.append(1)
        raise error

    manager = TaskManager()
    stopping = BaseExceptionGroup("stopping", [OSError(), asyncio.CancelledError()])
    with pytest.raises(BaseExceptionGroup):
        await manager.create_task(lambda: work(stopping), retry=STEADY)
    assert len(calls) == 1
    with pytest.raises(ExceptionGroup):
        await manager.create_task(lambda: work(ExceptionGroup("both", [OSError()])), retry=STEADY)
    assert len(calls) == 4


async def test_failure_in_the_cleanup_of_a_cancelled_task_is_not_retried() -> None:
    """Once the task is cancelled, a failure that the policy names ends it as failed."""
    calls: list[int] = []

    async def work() -> None:
        calls.append(1)
        try:
            await rest()
        finally:
            raise ConnectionError("while closing")

    task = TaskManager().create_task(work, retry=STEADY)
    await settle()
    task.cancel()
    with pytest.raises(ConnectionError):
        await task
    assert (task.status, len(calls)) == (TaskStatus.FAILED, 1)


@pytest.mark.parametrize("after", [0.5, 1.5], ids=["in the attempt", "in the backoff"])
async def test_shutdown_ends_the_wait_for_the_next_attempt(
    after: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A shutdown does not wait for a backoff: it cancels the task, and the last failure is chained."""
    manager, work = TaskManager(), Flaky(99, lasts=1)
    task = manager.create_task(work.fetch, retry=RetryPolicy(delay=20))
    await asyncio.sleep(after)
    report = await manager.shutdown(grace=5)
    assert (report.cancelled, now() - work.began[0]) == (1, max(after, 1.0))
    assert kind_of(task) is CancelKind.SHUTDOWN
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert str(caught.value.__cause__) == "failure 1"
    assert "task 'fetch' failed in attempt 1 and is not retried (shutdown" in caplog.text
    assert len(work.began) == 1


@pytest.mark.parametrize("grace", [0.0, 3.0])
async def test_cancelled_group_ends_the_backoff(grace: float) -> None:
    """The cancel event of its group ends the wait, so the grace of the cancellation is not waited out."""
    manager = TaskManager()
    task = manager.create_task(Flaky(99).fetch, retry=RetryPolicy(delay=20), group="mail")
    await asyncio.sleep(1)
    start = now()
    assert await manager.cancel_group("mail", "no longer wanted", grace=grace) == 1
    assert now() == start
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "no longer wanted")


async def test_disconnect_ends_the_backoff() -> None:
    """A client that leaves cancels the task of its request that backs off, and the handler that awaits it."""
    manager, work = TaskManager(), Flaky(99)
    tasks: list[ManagedTask[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tasks.append(create_task(work.fetch, retry=RetryPolicy(delay=20)))
        await tasks[0]

    connection = FakeConnection()
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager)))
    await asyncio.sleep(1)
    connection.disconnect()
    await serving
    assert (connection.status, kind_of(tasks[0])) == (499, CancelKind.CLIENT_DISCONNECT)
    assert (now(), len(work.began)) == (1001.0, 1)


async def test_attempt_may_hold_off_a_disconnect() -> None:
    """Inside ``uncancellable()``, an attempt finishes what it does; the task then ends without another."""
    manager, work = TaskManager(), Flaky(99)
    done: list[str] = []

    async def pay() -> None:
        async with uncancellable():
            await asyncio.sleep(5)
            done.append("paid")
        await work.fetch()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await create_task(pay, retry=STEADY)

    connection = FakeConnection()
    serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=manager)))
    await asyncio.sleep(1)
    connection.disconnect()
    await serving
    assert (done, work.began, counters(manager)["cancelled"]) == (["paid"], [], 1)


async def test_constructs_of_anyio_work_in_an_attempt() -> None:
    """Cancel scopes, task groups, and timeouts of anyio belong to the task, whose attempts may use them."""
    calls: list[int] = []

    async def work() -> str:
        calls.append(1)
        with anyio.move_on_after(1):
            await rest()
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 1)
        with anyio.fail_after(1 if len(calls) == 1 else None):
            await anyio.sleep(2)
        return "done"

    assert await TaskManager().create_task(work, retry=STEADY) == "done"
    assert len(calls) == 2


async def test_cancel_while_it_queues_again() -> None:
    """A task that has backed off and waits for its place is dropped by a shutdown, and holds nothing."""
    manager, work = TaskManager(max_concurrency=1), Flaky(99)
    task = manager.create_task(work.fetch, retry=STEADY)
    blocker = manager.create_task(asyncio.sleep(10))
    await asyncio.sleep(2)
    assert (manager.stats().queued, task.status) == (1, TaskStatus.RUNNING)
    report = await manager.shutdown(grace=20)
    assert (report.completed, report.cancelled, kind_of(task)) == (1, 1, CancelKind.SHUTDOWN)
    assert blocker.status is TaskStatus.COMPLETED
    limiter = manager._ledger.places.limiter
    assert (limiter.used, limiter.waiting, manager.stats().queued) == (0, 0, 0)


async def test_shutdown_is_noticed_when_the_place_comes() -> None:
    """A place that comes together with the cancel event starts no attempt."""
    manager, work = TaskManager(), Flaky(99)
    group = manager.get_group("mail")
    group.max_concurrency = 1
    task = group.create_task(work.fetch, retry=STEADY)
    blocker = group.create_task(asyncio.sleep(10))
    await asyncio.sleep(2)
    cause = CancelCause(CancelKind.SHUTDOWN)
    blocker.add_done_callback(lambda _: group.cancel_event.set(cause))
    blocker.cancel()
    await asyncio.wait([task])
    assert (len(work.began), task.status) == (1, TaskStatus.CANCELLED)


async def test_closed_loop_ends_the_attempt(spans: SpanRecorder) -> None:
    """A retried coroutine that is closed closes the coroutine of its attempt, and raises nothing."""
    closed: list[str] = []

    async def work() -> None:
        try:
            await rest()
        finally:
            closed.append("work")

    manager = TaskManager(tracer_provider=spans.provider)
    task = manager.create_task(work, retry=STEADY)
    await settle()
    coro: Any = task.get_coro()
    coro.close()
    assert closed == ["work"]
    assert attribute(named(spans, "work")[0], "otel_tasks.task.outcome") == "abandoned"
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own
    task.cancel()
    with pytest.raises(RuntimeError):
        await task


def test_retries_leak_nothing_wherever_they_are_cancelled(spans: SpanRecorder) -> None:
    """A caller that is cancelled at any of its awaits leaves no task, no place, and no open span."""

    async def scenario(manager: TaskManager) -> None:
        manager.max_concurrency = 1
        task = manager.create_task(Flaky(1, lasts=1).fetch, retry=STEADY)
        await asyncio.sleep(0.5)
        await asyncio.sleep(1)
        await task

    assert cancel_at_each_await(scenario, spans) >= 3


# -- timeouts -----------------------------------------------------------------------------------------------


async def test_timeout_covers_all_attempts_and_the_waits() -> None:
    """The task's timeout does not start over; its note names the last failure."""
    work = Flaky(99)
    task = TaskManager().create_task(work.fetch, retry=ENDLESS, timeout=2.5)
    with pytest.raises(TimeoutError) as caught:
        await task
    assert str(caught.value) == "the task ran into its timeout of 2.5 s"
    assert caught.value.__notes__ == ["attempt 3 failed with ConnectionError('failure 3')"]
    assert (len(work.began), kind_of(task)) == (3, CancelKind.TIMEOUT)


async def test_attempt_timeout_covers_one_attempt() -> None:
    """An attempt that takes too long fails with a TimeoutError, which the policy may name."""
    lasts = iter([9.0, 0.5])
    policy = RetryPolicy(attempt_timeout=1, delay=1, jitter=0)
    start = now()
    task = TaskManager().create_task(lambda: asyncio.sleep(next(lasts), "done"), retry=policy)
    assert await task == "done"
    assert now() - start == 2.5
    assert not task.cancelling()


async def test_last_attempt_that_times_out(spans: SpanRecorder) -> None:
    """The failure says which attempt ran into its timeout; the outcome of the task is timeout."""
    manager = TaskManager(tracer_provider=spans.provider)
    policy = RetryPolicy(max_attempts=2, attempt_timeout=1, delay=0)
    with pytest.raises(TimeoutError, match=r"^attempt 2 ran into its attempt_timeout of 1 s\n"):
        await manager.create_task(rest, retry=policy)
    assert [attribute(span, "otel_tasks.task.outcome") for span in named(spans, "rest")] == ["timeout"] * 3
    with pytest.raises(TimeoutError, match=r"^attempt 1 ran into"):
        await manager.create_task(rest, retry=RetryPolicy(on=ValueError, attempt_timeout=1))


async def test_timeout_of_the_work_itself_is_an_error() -> None:
    """A TimeoutError that the work raises on its own is not the attempt's timeout."""
    task = TaskManager().create_task(
        Flaky(9, error=TimeoutError).fetch, retry=RetryPolicy(max_attempts=1, attempt_timeout=float("inf"))
    )
    with pytest.raises(TimeoutError, match=r"^failure 1$"):
        await task


async def test_task_that_an_attempt_awaits_is_cancelled_by_its_timeout() -> None:
    """The cause of a task that the expired attempt was waiting for names the attempt's timeout."""
    manager = TaskManager()
    inner = manager.create_task(rest())

    async def work() -> None:
        await inner

    with pytest.raises(TimeoutError):
        await manager.create_task(work, retry=RetryPolicy(max_attempts=1, attempt_timeout=1))
    assert inner.cause is not None
    assert inner.cause.message == "the attempt_timeout expired"


# -- contexts, spans, metrics, logs -------------------------------------------------------------------------


async def test_attempt_does_not_see_what_another_has_set() -> None:
    """Each attempt starts with the context of the task's creation, and keeps it between its steps."""
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def work() -> None:
        seen.append(variable.get())
        variable.set(f"set {len(seen)}")
        await asyncio.sleep(1)
        seen.append(variable.get())
        await asyncio.create_task(asyncio.sleep(1))
        raise ConnectionError

    variable.set("outer")
    task = TaskManager().create_task(work, retry=RetryPolicy(max_attempts=2, delay=0))
    await asyncio.wait([task])
    task.exception()
    assert seen == ["outer", "set 1", "outer", "set 3"]
    assert variable.get() == "outer"


async def test_work_of_an_attempt_knows_its_group_and_task() -> None:
    """current_group(), timeouts, and progress in an attempt are those of the task."""
    manager = TaskManager()

    async def work() -> str:
        task = current_task()
        assert task is not None
        task.progress.advance(1)
        try:
            async with asyncio.timeout(1):
                await rest()
        except TimeoutError:
            assert not task.cancelling()
        return current_group().name

    task = manager.create_task(work, retry=STEADY, group="mail")
    assert await task == "mail"
    progress = task.info().progress
    assert progress is not None
    assert progress.done == 1


async def test_each_attempt_is_a_span_below_the_task(spans: SpanRecorder) -> None:
    """Attempts are children of the task's span; what an attempt starts is below the attempt."""
    manager = TaskManager(tracer_provider=spans.provider)
    calls = itertools.count(1)

    async def child() -> None:
        await asyncio.sleep(0.1)

    async def work() -> None:
        number = next(calls)
        with spans.provider.get_tracer("app").start_as_current_span(f"query {number}"):
            await asyncio.sleep(0.1)
        await create_task(child())
        if number == 1:
            raise ConnectionError("refused")

    task = manager.create_task(work, retry=STEADY, name="mail-7", group="mail")
    await task
    whole, first, second = named(spans, "mail")
    assert [attribute(span, "otel_tasks.task.attempt") for span in (whole, first, second)] == [None, 1, 2]
    assert all(is_below(span, whole) for span in (first, second))
    assert [span.status.status_code for span in (whole, first, second)] == [
        StatusCode.UNSET,
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    assert [event.name for event in first.events] == ["exception"]
    assert attribute(first, "error.type") == "ConnectionError"
    assert attribute(first, "otel_tasks.task.id") == attribute(whole, "otel_tasks.task.id") == "mail-7"
    [event] = whole.events
    assert (event.name, dict(event.attributes or {})) == (
        "otel_tasks.retry",
        {"otel_tasks.task.attempt": 1, "otel_tasks.retry.delay": 1.0, "error.type": "ConnectionError"},
    )
    assert [is_below(span, first) for span in named(spans, "child")] == [True, False]
    assert is_below(named(spans, "query 2")[0], second)


async def test_span_of_a_cancelled_attempt_has_its_cause(spans: SpanRecorder) -> None:
    """An attempt that is cancelled is not an error; its span has the cause of the task."""
    manager = TaskManager(tracer_provider=spans.provider)
    task = manager.create_task(rest, retry=STEADY)
    foreign = manager.create_task(lambda: fail(asyncio.CancelledError()), retry=STEADY)
    await settle()
    task.cancel("enough")
    await asyncio.wait([task, foreign])
    for name, kind in (("rest", "explicit"), ("fail", "foreign")):
        for span in named(spans, name):
            assert span.status.status_code is StatusCode.UNSET
            assert attribute(span, "otel_tasks.task.outcome") == "cancelled"
            assert attribute(span, "otel_tasks.cancel.reason") == kind


async def test_queued_task_has_its_attempts_below_its_late_span(spans: SpanRecorder) -> None:
    """The span of a task that had to queue starts when it runs, and its attempts are below that one."""
    manager = TaskManager(tracer_provider=spans.provider, max_concurrency=1)
    blocker = manager.create_task(asyncio.sleep(2))
    task = manager.create_task(Flaky(1).fetch, retry=STEADY)
    await asyncio.gather(blocker, task)
    whole, first, second = named(spans, "fetch")
    assert is_below(first, whole)
    assert is_below(second, whole)
    assert [event.name for event in whole.events] == ["otel_tasks.started", "otel_tasks.retry"]
    assert attribute(whole, "otel_tasks.task.queue.duration") == 2.0


async def test_no_span_without_tracing() -> None:
    """Without an SDK, an attempt runs under whatever span is current at the creation."""
    current: list[trace.Span] = []

    async def work() -> None:
        current.append(trace.get_current_span())

    await TaskManager().create_task(work, retry=STEADY)
    assert current == [trace.INVALID_SPAN]


async def test_abandoned_task_loses_no_span(spans: SpanRecorder) -> None:
    """The span of an attempt that does not stop at shutdown ends as abandoned, as that of its task does."""
    manager = TaskManager(tracer_provider=spans.provider)
    released = asyncio.Event()

    async def stubborn() -> None:
        while not released.is_set():
            try:
                await released.wait()
            except asyncio.CancelledError:
                continue

    task = manager.create_task(stubborn, retry=STEADY)
    await settle()
    await manager.shutdown(grace=0, timeout=1)
    assert [attribute(span, "otel_tasks.task.outcome") for span in named(spans, "stubborn")] == [
        "abandoned",
        "abandoned",
    ]
    released.set()
    await asyncio.wait([task])


async def test_retries_are_counted(spans: SpanRecorder) -> None:
    """The counter has the group and the type of the error, and no count for the last failure."""
    manager = TaskManager(meter_provider=spans.meter_provider)
    task = manager.create_task(Flaky(9).fetch, retry=STEADY, group="mail-7")
    slow = manager.create_task(rest, retry=RetryPolicy(max_attempts=2, attempt_timeout=1, delay=0))
    await asyncio.gather(task, slow, return_exceptions=True)
    counts = {tuple(sorted(point.attributes.items())): point.value for point in points(spans)}
    assert counts == {
        (("error.type", "ConnectionError"), ("otel_tasks.group.name", "mail")): 2,
        (("error.type", "timeout"), ("otel_tasks.group.name", "root")): 1,
    }


def points(spans: SpanRecorder) -> list[Any]:
    return spans.metrics()["otel_tasks.task.retries"]


async def test_failure_is_logged_once_as_a_warning_without_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A warning announces each retry; only the last failure is an error, with its traceback."""
    manager = TaskManager()
    manager.create_task(Flaky(9).fetch, retry=STEADY, name="mail")
    caplog.set_level(logging.INFO, logger="otel_tasks")
    await manager.join()
    *warned, failed = caplog.records
    assert [(record.levelname, record.getMessage(), record.exc_info) for record in warned] == [
        (
            "WARNING",
            f"task 'mail' failed in attempt {number} and is retried in {number} s: "
            f"ConnectionError('failure {number}')",
            None,
        )
        for number in (1, 2)
    ]
    assert (failed.levelname, failed.getMessage()) == ("ERROR", "task 'mail' failed and nobody awaits it")
    assert failed.exc_info is not None
    fields: Any = vars(warned[0])["otel_tasks"]
    assert fields["task_name"] == "mail"


async def test_traceback_of_a_retried_failure_is_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    """Where the logger lets DEBUG records pass, the warning has the traceback."""
    caplog.set_level(logging.DEBUG, logger="otel_tasks")
    await TaskManager().create_task(Flaky(1).fetch, retry=STEADY)
    [record] = caplog.records
    assert record.exc_info is not None


# -- groups -------------------------------------------------------------------------------------------------


async def test_retried_failure_does_not_cancel_siblings() -> None:
    """A block learns of the last failure alone."""
    async with TaskGroup() as group:
        slept = group.create_task(asyncio.sleep(10, "slept"))
        group.create_task(Flaky(2).fetch, retry=STEADY)
    assert slept.result() == "slept"
    with pytest.raises(ExceptionGroup) as caught:
        async with TaskGroup() as group:
            sibling = group.create_task(asyncio.sleep(10))
            group.create_task(Flaky(9).fetch, retry=STEADY)
    assert [str(error) for error in caught.value.exceptions] == ["failure 3"]
    assert kind_of(sibling) is CancelKind.SIBLING_FAILED


async def test_waiter_receives_the_last_failure_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Neither on_error nor a waiter sees a failure that is retried."""
    reported: list[str] = []
    manager = TaskManager(on_error=lambda info, error: reported.append(str(error)))
    awaited = manager.create_task(Flaky(9).fetch, retry=STEADY)
    manager.create_task(Flaky(9).fetch, retry=STEADY, name="unawaited")
    with pytest.raises(ConnectionError, match="failure 3"):
        await awaited
    await manager.join()
    assert reported == ["failure 3"]


# -- places -------------------------------------------------------------------------------------------------


async def test_task_that_backs_off_holds_no_place() -> None:
    """While it waits for its next attempt, other tasks run in its place."""
    manager = TaskManager(max_concurrency=1)
    work = Flaky(1)
    task = manager.create_task(work.fetch, retry=RetryPolicy(delay=10, jitter=0))
    order: list[str] = []
    others = [manager.create_task(note(order, f"other {number}", 2)) for number in range(3)]
    await asyncio.sleep(7)
    assert order == ["other 0", "other 1", "other 2"]
    assert manager._ledger.places.limiter.used == 0
    assert await task == "done"
    await asyncio.gather(*others)
    assert work.began == [1000.0, 1010.0]


async def note(order: list[str], what: str, seconds: float = 0.0) -> None:
    order.append(what)
    await asyncio.sleep(seconds)


@pytest.mark.parametrize("where", ["manager", "group", "both"])
async def test_retry_queues_with_the_age_of_its_task(where: str) -> None:
    """The next attempt is before tasks that arrived later, and the bound of the queue does not refuse it."""
    manager = TaskManager(
        max_concurrency=1 if where != "group" else None, max_queue=3 if where != "group" else None
    )
    group = manager.get_group("mail")
    if where != "manager":
        group.max_concurrency = 1
    order: list[str] = []
    calls = itertools.count(1)

    async def work() -> None:
        order.append(f"attempt {next(calls)}")
        if len(order) == 1:
            raise ConnectionError

    task = group.create_task(work, retry=STEADY)
    later = [group.create_task(note(order, f"later {number}", 2)) for number in range(3)]
    await asyncio.sleep(1.5)
    assert (task.status, task.info().started_at) == (TaskStatus.RUNNING, 1000.0)
    assert manager.stats().queued == 3
    tree = str(manager.tree())
    assert "work: queued, 1.5s, queue position 1, for attempt 2" in tree
    await asyncio.gather(task, *later)
    assert order == ["attempt 1", "later 0", "attempt 2", "later 1", "later 2"]
    assert manager.stats().queued == 0


async def test_queue_duration_is_that_of_the_first_place(spans: SpanRecorder) -> None:
    """The wait for the place of a later attempt is part of the task's duration alone."""
    manager = TaskManager(max_concurrency=1, tracer_provider=spans.provider)
    task = manager.create_task(Flaky(1).fetch, retry=STEADY)
    blocker = manager.create_task(asyncio.sleep(5))
    await asyncio.gather(task, blocker)
    whole = named(spans, "fetch")[0]
    assert attribute(whole, "otel_tasks.task.queue.duration") is None
    assert (task.info().duration, task.info().started_at) == (5.0, task.info().created_at)


@pytest.mark.parametrize("after", [0.0, 0.5, 1.5], ids=["at once", "in the backoff", "in the queue"])
async def test_waiter_lends_its_priority_to_the_next_attempt(after: float) -> None:
    """A retried task that a critical one awaits queues with that priority, whenever the wait began."""
    manager = TaskManager(max_concurrency=1)
    order: list[str] = []

    async def work() -> None:
        order.append("low")
        if len(order) == 1:
            raise ConnectionError

    async def wait() -> None:
        await asyncio.sleep(after)
        await low

    low = manager.create_task(work, retry=STEADY, priority=TaskPriority.LOW)
    for number in range(3):
        manager.create_task(note(order, f"normal {number}", 2))
    await TaskManager().create_task(wait(), priority=TaskPriority.CRITICAL)
    assert order == ["low", "normal 0", "low", "normal 1"]
    await manager.join()


async def test_limit_that_is_set_during_a_backoff_counts_from_the_next_attempt() -> None:
    """A task that backs off takes no place of a new limit; its next attempt does."""
    manager = TaskManager()
    work = Flaky(1, lasts=1)
    task = manager.create_task(work.fetch, retry=RetryPolicy(delay=4, jitter=0))
    await asyncio.sleep(2)
    manager.max_concurrency = 1
    group = manager.get_group("root2")
    limiter = manager._ledger.places.limiter
    assert (limiter.used, limiter.waiting) == (0, 0)
    blocker = manager.create_task(asyncio.sleep(6))
    await asyncio.sleep(4)
    assert (limiter.used, limiter.waiting, manager.stats().queued) == (1, 1, 1)
    await asyncio.gather(task, blocker)
    assert (limiter.used, limiter.waiting) == (0, 0)
    assert work.began == [1000.0, 1008.0]
    del group


PLANS = st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.none() | st.integers(0, 9), st.booleans()
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    plans=st.lists(PLANS, min_size=1, max_size=6),
    limit=st.integers(1, 3),
    group_limit=st.none() | st.integers(1, 2),
    stop=st.none() | st.integers(0, 12),
)
def test_places_and_counters_stay_exact(
    plans: list[tuple[int, int, int, int | None, bool]], limit: int, group_limit: int | None, stop: int | None
) -> None:
    """Random failures, cancels, and a shutdown: never more attempts than places, and none is lost."""

    async def main() -> None:
        manager = TaskManager(max_concurrency=limit, on_error=lambda info, error: None)
        group = manager.get_group("mail")
        group.max_concurrency = group_limit
        running = {"all": 0, "group": 0}

        async def attempt(state: list[int], lasts: int, grouped: bool) -> None:
            names = ["all", "group"] if grouped else ["all"]
            for name in names:
                running[name] += 1
            try:
                assert running["all"] <= limit
                assert group_limit is None or running["group"] <= group_limit
                await asyncio.sleep(lasts)
                state[0] -= 1
                if state[0] >= 0:
                    raise ConnectionError
            finally:
                for name in names:
                    running[name] -= 1

        tasks: list[ManagedTask[None]] = []
        for failures, lasts, priority, cancel_after, grouped in plans:
            work = functools.partial(attempt, [failures], lasts, grouped)
            where = group if grouped else manager._root
            task = where.create_task(work, retry=STEADY, priority=priority)
            tasks.append(task)
            if cancel_after is not None:
                asyncio.get_running_loop().call_later(cancel_after, task.cancel)
        if stop is None:
            await manager.join()
            for (failures, *_, cancel_after, _grouped), task in zip(plans, tasks, strict=True):
                if cancel_after is None:
                    assert task.status is (TaskStatus.COMPLETED if failures < 3 else TaskStatus.FAILED)
        else:
            await asyncio.sleep(stop)
            assert (await manager.shutdown(grace=2, timeout=100)).clean
            await settle()
        limiters = [manager._ledger.places.limiter, *([group._limiter] if group._limiter else [])]
        assert [(each.used, each.waiting) for each in limiters] == [(0, 0)] * len(limiters)
        assert (manager.stats().live, manager.stats().queued, running["all"]) == (0, 0, 0)
        await assert_no_tasks_left()

    logging.getLogger("otel_tasks").disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(main())
            gc.collect(1)
    finally:
        logging.getLogger("otel_tasks").disabled = False


async def test_ended_task_is_freed_without_the_collector() -> None:
    """Neither the attempts nor the last failure form a cycle with the task."""
    manager = TaskManager(on_error=lambda info, error: None)
    policy = RetryPolicy(delay=0, attempt_timeout=1)
    task = manager.create_task(lambda: fail(ConnectionError()), retry=policy)
    await manager.join()
    link = weakref.ref(task)
    gc.disable()
    try:
        del task
        assert link() is None
    finally:
        gc.enable()


async def test_coroutine_of_a_retry_has_the_name_of_its_work() -> None:
    """The coroutine that runs the attempts is called as the one of the first attempt."""
    coro = retried(plain, STEADY)
    assert (coro.__name__, coro.__qualname__) == ("plain", "tests.test_retry.plain")
    assert (coro.cr_frame, coro.cr_await, coro.cr_running, coro.cr_suspended) == (None, None, False, False)
    coro.close()


async def test_failed_attempt_is_freed_while_the_next_one_runs() -> None:
    """Its exception, whose frames hold what it has used, does not stay with the task."""
    used: list[weakref.ref[Flaky]] = []

    async def work() -> None:
        connection = Flaky(0)
        used.append(weakref.ref(connection))
        if len(used) == 1:
            raise ConnectionError
        await rest()

    async with TaskManager() as manager:
        manager.create_task(work, retry=STEADY)
        await asyncio.sleep(10)
        gc.collect()
        assert [connection() is None for connection in used] == [True, False]
