"""Functions that run in threads, and what code in a thread may read, cancel, and set."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import itertools
import logging
import queue
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from fastapi import FastAPI

import otel_tasks
from otel_tasks import (
    CancelEvent,
    CancelKind,
    GroupClosedError,
    ManagedTask,
    TaskGroup,
    TaskInfo,
    TaskManager,
    TaskPriority,
    TaskStatus,
    WrongThreadError,
    create_task,
    create_task_threadsafe,
    current_cancel_event,
    current_group,
    current_task,
    run_in_thread,
)
from otel_tasks._core.threads import Worker
from otel_tasks.asgi import TaskGroupMiddleware, request_group
from otel_tasks.fastapi import RequestTasks  # noqa: TC001 - FastAPI reads the annotations
from otel_tasks.testing import FakeConnection, SpanRecorder, VirtualClockLoop, run
from tests.helpers import (
    PATIENCE,
    cancel_at_each_await,
    forget,
    give,
    ignore_cancels,
    in_a_thread,
    rest,
    settle,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator


color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


class Gate:
    """A place where the function of a thread waits until the test releases it."""

    def __init__(self) -> None:
        self._entered = threading.Event()
        self._open = threading.Event()

    def __call__(self, result: Any = None) -> Any:
        self._entered.set()
        assert self._open.wait(PATIENCE), "nobody has opened the gate"
        if isinstance(result, BaseException):
            raise result
        return result

    def open(self) -> None:
        self._open.set()

    async def entered(self) -> None:
        """Wait until the function has come here."""
        assert await in_a_thread(self._entered.wait, PATIENCE)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    # Leftovers of a failed test.
    gate.open()


class Beaten:
    """A lock that somebody else has had in the meantime, who called ``call`` under it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lock: str, call: Callable[[], Any]) -> None:
        self._results: list[Any] = []
        self._monkeypatch = monkeypatch
        self._lock = lock
        self._call = call

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        self._monkeypatch.undo()
        self._results.append(self._call())
        yield

    def __enter__(self) -> list[Any]:
        self._monkeypatch.setattr(self._lock, self._held())
        return self._results

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()


def stop_when_told() -> str:
    """A function for a thread that checks its cancel event."""
    event = current_cancel_event()
    end = time.monotonic() + PATIENCE
    while not event.is_set():
        assert time.monotonic() < end, "nobody has told it to stop"
        time.sleep(0.001)
    return "stopped early"


def raise_when_told(error: BaseException) -> None:
    stop_when_told()
    raise error


# -- cancelling from a thread ----------------------------------------------------------------------


async def test_task_is_cancelled_from_a_thread(manager: TaskManager, spans: SpanRecorder) -> None:
    """The cause has reason, origin, and the loop's time, and listeners are called in the loop."""
    tracer = spans.provider.get_tracer("test")
    told_in: list[threading.Thread] = []

    def note(event: str, _: TaskInfo) -> None:
        if event == "cancelling":
            told_in.append(threading.current_thread())

    manager.add_listener(note)
    task = manager.create_task(rest())
    await settle()

    def work() -> bool:
        with tracer.start_as_current_span("asker"):
            return task.cancel("no longer wanted")

    assert await in_a_thread(work)
    with pytest.raises(asyncio.CancelledError, match="no longer wanted"):
        await task
    cause = task.cause
    assert cause is not None
    assert (cause.kind, cause.message) == (CancelKind.EXPLICIT, "no longer wanted")
    assert cause.origin == spans.span("asker").context
    assert cause.at is not None
    assert 1000 <= cause.at <= asyncio.get_running_loop().time()
    assert told_in == [threading.current_thread()]


async def test_queued_task_cancelled_from_a_thread_never_runs() -> None:
    """As for a cancel() in the loop; without a reason the cause has none."""
    async with TaskManager(max_concurrency=1) as manager:
        first = manager.create_task(rest())
        task = manager.create_task(rest())
        await settle()
        await in_a_thread(task.cancel)
        await asyncio.wait([task])
        assert task.info().started_at is None
        assert task.cause is not None
        assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, None)
        first.cancel()


async def test_each_cancel_from_a_thread_counts(manager: TaskManager) -> None:
    """The second has no cause to note, and is delivered as asyncio's would be."""
    task = manager.create_task(ignore_cancels(5.0))
    await settle()
    for reason in ("first", "second"):
        assert await in_a_thread(task.cancel, reason)
        await settle()
    assert task.cancelling() == 2
    assert task.cause is not None
    assert task.cause.message == "first"
    await task


async def test_cancel_from_a_thread_returns_false_for_a_task_that_has_ended(manager: TaskManager) -> None:
    """Also if it ends between the check and the loop's turn: then nothing happens."""
    task = manager.create_task(give(1))
    thread = threading.Thread(target=task.cancel)
    await task
    thread.start()
    thread.join()
    assert not await in_a_thread(task.cancel)
    late = manager.create_task(asyncio.sleep(0, "done"))
    asyncio.get_running_loop().call_soon(thread_cancels, late)
    assert await late == "done"
    await settle()
    assert late.cause is None


def thread_cancels(task: ManagedTask[Any]) -> None:
    """Cancel from a thread in this turn, so that it takes effect in the next."""
    thread = threading.Thread(target=task.cancel)
    thread.start()
    thread.join()


def test_cancel_from_a_thread_returns_false_if_the_loop_is_closed() -> None:
    """Neither a task nor a group of it can be cancelled any more."""
    manager = TaskManager()
    loop = VirtualClockLoop()

    async def leave() -> None:
        manager.create_task(rest(), name="left")
        await settle()

    loop.run_until_complete(leave())
    loop.close()
    task = manager.get_task("left")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert not pool.submit(task.cancel).result()
        pool.submit(manager.get_group("root").cancel).result()
    assert not task.cancelling()
    forget(task)


def test_cancel_works_where_the_loop_has_moved_to_another_thread() -> None:
    """The loop counts, not the thread in which it ran first."""
    manager = TaskManager()
    loop = VirtualClockLoop()

    async def begin() -> ManagedTask[None]:
        return manager.create_task(rest())

    async def end(task: ManagedTask[None]) -> bool:
        asked = task.cancel("here")
        group_before = task.cancelling()
        await asyncio.wait([task])
        return asked and group_before == 1

    async def note() -> None:
        await manager.join()

    task = loop.run_until_complete(begin())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(loop.run_until_complete, end(task)).result()
        pool.submit(loop.run_until_complete, note()).result()
        assert manager._ledger.home.thread == pool.submit(threading.get_ident).result()
    loop.close()


async def test_group_is_cancelled_from_a_thread(manager: TaskManager) -> None:
    """Its block is left, its tasks end, with the reason given in the thread."""
    async with manager.group("scope") as group:
        task = group.create_task(rest())
        await in_a_thread(group.cancel, "enough")
        await rest()
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "enough")


async def test_thread_cancels_its_own_group(manager: TaskManager) -> None:
    """current_group() in the function is the task's, and it may cancel it."""

    def work() -> None:
        current_group().cancel("from inside")
        stop_when_told()

    task = manager.run_in_thread(work, group="pack")
    other = manager.create_task(rest(), group="pack")
    await asyncio.wait([task, other])
    assert {task.status, other.status} == {TaskStatus.CANCELLED}


def test_group_without_a_loop_is_cancelled_from_any_thread() -> None:
    """There is no loop to tell yet."""
    group = TaskManager().group("scope")
    thread = threading.Thread(target=group.cancel)
    thread.start()
    thread.join()
    assert group.cancel_event.is_set()


# -- cancel events in threads ----------------------------------------------------------------------


async def test_event_set_in_a_thread_is_set_for_all_before_set_returns() -> None:
    """The whole tree is set, and waiters are woken in the loop."""
    root = CancelEvent()
    leaves = [CancelEvent(CancelEvent(root)) for _ in range(3)]
    waiters = [asyncio.ensure_future(leaf.wait()) for leaf in leaves]
    await settle()

    def work() -> list[bool]:
        root.set()
        return [leaf.is_set() for leaf in leaves]

    assert await in_a_thread(work) == [True, True, True]
    assert await asyncio.gather(*waiters) == [True, True, True]
    assert leaves[0].cause is root.cause


async def test_event_made_in_a_thread_works_in_the_loop() -> None:
    """It belongs to the loop of its waiters."""
    parent = CancelEvent()
    child = await in_a_thread(CancelEvent, parent)
    waiter = asyncio.ensure_future(child.wait())
    await settle()
    parent.set()
    assert await waiter
    assert await CancelEvent(parent).wait()


def test_one_set_wakes_waiters_in_two_loops() -> None:
    """Each waiter wakes in its own loop; a closed loop has none left."""
    root = CancelEvent()
    ready = threading.Barrier(3)

    async def wait() -> bool:
        event = CancelEvent(root)
        waiter = asyncio.ensure_future(event.wait())
        await asyncio.sleep(0)
        ready.wait(PATIENCE)
        return await waiter

    closed = asyncio.new_event_loop()
    forgotten = CancelEvent(root)
    with contextlib.suppress(TimeoutError):
        closed.run_until_complete(asyncio.wait_for(forgotten.wait(), 0.01))
    closed.close()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = [pool.submit(asyncio.run, wait()) for _ in range(2)]
        ready.wait(PATIENCE)
        root.set()
        assert [result.result(PATIENCE) for result in results] == [True, True]
    assert forgotten.is_set()


@pytest.mark.real_clock
async def test_no_wait_misses_a_set_of_another_thread() -> None:
    """Whenever the set comes: before the wait, in the middle of its beginning, after it."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for _ in range(500):
            event = CancelEvent()
            pool.submit(event.set)
            async with asyncio.timeout(PATIENCE):
                await event.wait()


async def test_event_made_while_another_waits_to_make_it_is_the_one(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second thread finds the event of the first."""
    group = manager.get_group("a")
    with Beaten(monkeypatch, "otel_tasks._core.tree.TREE_LOCK", lambda: group.cancel_event) as first:
        assert group.cancel_event is first[0]


def make_event(group: TaskGroup, ready: threading.Barrier) -> tuple[CancelEvent, CancelEvent]:
    """At the same moment as others, take the group's event and make one below it."""
    ready.wait(PATIENCE)
    event = group.cancel_event
    return event, CancelEvent(event)


@pytest.mark.real_clock
async def test_no_child_is_lost_when_threads_make_events_at_a_time(manager: TaskManager) -> None:
    """Groups and events that several threads ask for at a time are made once, and hang in one tree."""
    for number in range(100):
        async with manager.group(f"g{number}") as group:
            ready = threading.Barrier(4)

            async with asyncio.TaskGroup() as askers:
                asked = [askers.create_task(in_a_thread(make_event, group, ready)) for _ in range(4)]
            events = [task.result() for task in asked]
            assert len({event for event, _ in events}) == 1
            group.cancel()
        assert all(child.is_set() for _, child in events)


# -- run_in_thread ---------------------------------------------------------------------------------


async def test_function_runs_in_a_thread_and_gives_the_task_its_result(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The task is named after the function, and its span has the function's name."""

    def add(one: int, other: int) -> tuple[int, str, bool]:
        thread = threading.current_thread()
        return one + other, thread.name, thread.daemon

    task = manager.run_in_thread(add, 3, 4, group="sums", metadata={"kind": "sum"})
    assert await task == (7, f"otel_tasks {task.id}", True)
    assert task.name == "add"
    assert (task.group.name, task.metadata) == ("sums", {"kind": "sum"})
    attributes = spans.span("add").attributes
    assert attributes is not None
    assert attributes["code.function.name"] == f"{__name__}.{add.__qualname__}"


async def test_partial_and_callable_object_are_named_after_their_function(manager: TaskManager) -> None:
    """A partial after its function, an object after its class."""

    class Adder:
        def __call__(self, number: int) -> int:
            return number + 1

    task = manager.run_in_thread(functools.partial(functools.partial(give_plain, 1), other=2))
    assert task.name.startswith("give_plain")
    assert await task == (1, 2)
    task_of_object = manager.run_in_thread(Adder(), 1)
    assert task_of_object.name.startswith("Adder")
    assert await task_of_object == 2


def give_plain(value: int, other: int = 0) -> tuple[int, int]:
    """Return at once."""
    return value, other


async def test_function_sees_task_group_event_and_context(manager: TaskManager, spans: SpanRecorder) -> None:
    """As a coroutine would; what it traces belongs to the task's span, what it sets is its own."""
    tracer = spans.provider.get_tracer("test")
    color.set("green")

    def look() -> tuple[Any, ...]:
        with tracer.start_as_current_span("inside"):
            before = color.get()
            color.set("of the thread")
            return current_task(), current_group(), current_cancel_event(), before

    async with manager.group("scope") as group:
        task = group.run_in_thread(look)
        seen, where, event, before = await task
        assert seen is task
        assert where is group
        assert event.parent is group.cancel_event
        assert before == color.get() == "green"
    assert spans.span("inside").parent == spans.span("look").context


async def test_module_function_uses_the_current_group(manager: TaskManager) -> None:
    """As create_task() does."""

    async def work() -> str:
        return (await run_in_thread(current_group)).name

    assert await manager.create_task(work(), group="here") == "here"
    assert await manager.run_in_thread(current_group, group=manager.get_group("there")) is not None


async def test_nothing_is_current_in_the_threads_of_tasks_that_a_thread_has_started(
    manager: TaskManager,
) -> None:
    """Other threads that such a task uses do not inherit from the function that started the task."""

    async def ask_a_thread() -> ManagedTask[Any] | None:
        return await in_a_thread(current_task)

    def work() -> Any:
        return create_task_threadsafe(ask_a_thread).result(PATIENCE)

    assert await manager.run_in_thread(work) is None


async def test_loop_that_the_function_runs_itself_has_its_own_current_task(manager: TaskManager) -> None:
    """Its plain tasks still see the function's cancel event, its managed ones that of their group."""

    async def inner() -> tuple[Any, ...]:
        async with TaskManager("inner") as own:

            async def managed() -> tuple[Any, ...]:
                return current_task(), current_cancel_event()

            task = own.create_task(managed(), group="inner")
            assert await task == (task, own.get_group("inner").cancel_event)
        return current_task(), current_cancel_event()

    def work() -> tuple[Any, ...]:
        assert asyncio.run(inner()) == (None, current_cancel_event())
        return (current_task(),)

    task = manager.run_in_thread(work)
    assert await task == (task,)


async def test_failure_of_the_function_is_the_tasks(manager: TaskManager) -> None:
    """It is raised with the lines of the function."""

    def work() -> None:
        raise LookupError("none")

    task = manager.run_in_thread(work)
    with pytest.raises(LookupError, match="none") as caught:
        await task
    assert caught.traceback[-1].name == "work"
    assert task.status is TaskStatus.FAILED


async def test_nothing_of_a_function_is_kept_after_its_end(manager: TaskManager) -> None:
    """Neither its error nor its result stays in a cycle that only the collector would find."""

    class Thing:
        pass

    class Mistake(LookupError):
        pass

    def work(wrong: bool, thing: Thing) -> Thing:
        if wrong:
            raise Mistake
        return thing

    gc.collect()
    gc.disable()
    try:
        thing = Thing()
        task = manager.run_in_thread(work, False, thing)
        await task
        failed = manager.run_in_thread(work, True, thing)
        await asyncio.wait([failed])
        ended: list[object] = [thing, task, failed, failed.exception()]
        links = [weakref.ref(each) for each in ended]
        ended.clear()
        del thing, task, failed
        await settle()
        await until(lambda: not any(thread.name.startswith("otel_tasks") for thread in threading.enumerate()))
        assert [link() for link in links] == [None] * 4
    finally:
        gc.enable()


async def test_stop_iteration_of_a_function_is_a_runtime_error(manager: TaskManager) -> None:
    """As for a coroutine: it would end the awaiting one."""

    def work() -> None:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        await manager.run_in_thread(work)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (give, r"takes a plain function, got the coroutine give: write create_task\(give\(\.\.\.\)\)"),
        (7, r"takes a function and its arguments, got 7: write run_in_thread\(work, 1\), not"),
    ],
)
async def test_only_plain_functions_are_accepted(function: Any, message: str, manager: TaskManager) -> None:
    """The message shows the right line."""
    with pytest.raises(TypeError, match=message):
        manager.run_in_thread(function)
    assert manager.stats().created == 0


async def test_coroutine_for_a_thread_is_closed(manager: TaskManager) -> None:
    """Given by mistake for the function that makes it, or made by it: both are refused and closed."""
    coro: Any = rest()
    with pytest.raises(TypeError, match="got the coroutine rest"):
        manager.run_in_thread(coro)
    with pytest.raises(TypeError, match="the function of task 'rest_by_mistake' returned a coroutine"):
        await manager.run_in_thread(rest_by_mistake)
    with pytest.raises(TypeError, match="group must be a name"):
        manager.run_in_thread(rest(), group=7)  # type: ignore[arg-type]  # the mistake in question


def rest_by_mistake() -> object:
    """Make a coroutine, and not await it."""
    return rest()


async def test_refused_function_is_not_called(manager: TaskManager) -> None:
    """No coroutine is left behind either."""
    async with manager.group("scope") as group:
        pass
    with pytest.raises(GroupClosedError):
        group.run_in_thread(pytest.fail, "called")
    with pytest.raises(TypeError, match="nam"):
        manager.run_in_thread(pytest.fail, "called", nam="a")  # type: ignore[call-arg]  # the mistake in question


# -- cancelling a function in a thread -------------------------------------------------------------


async def test_cancelled_task_ends_when_its_function_has_returned(manager: TaskManager) -> None:
    """The function's own event is set, with the cause; the task ends as cancelled."""
    seen = []

    def work() -> str:
        result = stop_when_told()
        seen.append(current_cancel_event().cause)
        return result

    task = manager.run_in_thread(work)
    other = manager.run_in_thread(stop_when_told)
    await settle()
    task.cancel("enough")
    await asyncio.wait([task])
    assert task.cancelled()
    assert seen == [task.cause]
    assert not other.done()
    other.cancel()
    await asyncio.wait([other])


async def test_result_that_comes_after_the_cancellation_does_not_undo_it(
    manager: TaskManager, gate: Gate
) -> None:
    """A timeout around the await holds, though the function cannot be stopped."""
    task = manager.run_in_thread(gate, "late")
    await gate.entered()
    awaiter = asyncio.ensure_future(await_it(task))
    await settle()
    awaiter.cancel()
    await settle()
    assert (task.status, task.done()) == (TaskStatus.CANCELLING, False)
    gate.open()
    await asyncio.wait([awaiter])
    assert awaiter.cancelled()
    assert task.cancelled()


async def await_it(task: ManagedTask[Any]) -> Any:
    """Be a task that awaits another."""
    return await task


async def test_every_cancellation_is_waited_through(manager: TaskManager, gate: Gate) -> None:
    """A second one, as of a shutdown, does not tear the task from its thread; the first message stays."""
    task = manager.run_in_thread(gate)
    await gate.entered()
    for reason in ("first", "second"):
        task.cancel(reason)
        await settle()
    gate.open()
    with pytest.raises(asyncio.CancelledError, match="first"):
        await task


async def test_function_that_stops_in_the_grace_has_completed(manager: TaskManager) -> None:
    """The group's event reaches it before the task is cancelled."""
    task = manager.run_in_thread(stop_when_told, group="pack")
    await settle()
    assert await manager.cancel_group("pack", grace=PATIENCE) == 1
    assert task.status is TaskStatus.COMPLETED
    assert task.result() == "stopped early"


@pytest.mark.parametrize("error", [asyncio.CancelledError, concurrent.futures.CancelledError])
async def test_function_that_raises_cancelled_in_the_grace_is_cancelled(
    error: type[BaseException], manager: TaskManager
) -> None:
    """Its cause is that of the event which it obeys."""
    task = manager.run_in_thread(raise_when_told, error(), group="pack")
    await settle()
    await manager.cancel_group("pack", "enough", grace=PATIENCE)
    assert task.cancelled()
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "enough")


async def test_function_that_cancels_its_own_task_in_the_grace_keeps_that_cause(manager: TaskManager) -> None:
    """A cause that was noted is not written over."""
    task = manager.create_task(rest())
    worker = Worker(manager._threads, task, lambda: None)
    worker.event.set()
    first = otel_tasks.CancelCause(CancelKind.SHUTDOWN)
    task._cause = first
    assert isinstance(worker._stopped_by(asyncio.CancelledError()), asyncio.CancelledError)
    assert task.cause is first
    task.cancel()
    await asyncio.wait([task])


async def test_function_that_raises_cancelled_of_its_own_accord(manager: TaskManager) -> None:
    """asyncio's CancelledError is a foreign cancellation; that of concurrent.futures is an error."""
    task = manager.run_in_thread(raise_plain, asyncio.CancelledError())
    failed = manager.run_in_thread(raise_plain, concurrent.futures.CancelledError())
    await asyncio.wait([task, failed])
    assert task.cause is not None
    assert task.cause.kind is CancelKind.FOREIGN
    assert isinstance(failed.exception(), concurrent.futures.CancelledError)


def raise_plain(error: BaseException) -> None:
    """Raise at once."""
    raise error


async def test_function_that_waits_for_a_cancelled_future_is_cancelled(manager: TaskManager) -> None:
    """The group's cancellation reaches it through what it waits for, and is no failure."""

    def work() -> None:
        create_task_threadsafe(rest()).result(PATIENCE)

    task = manager.run_in_thread(work, group="pack")
    await until(lambda: len(manager.get_group("pack").tasks) == 2)
    await manager.cancel_group("pack")
    assert task.cancelled()


async def test_failure_after_the_cancellation_is_a_failure(manager: TaskManager) -> None:
    """As for a coroutine whose clean-up fails."""
    task = manager.run_in_thread(raise_when_told, LookupError("torn"))
    await settle()
    task.cancel()
    with pytest.raises(LookupError, match="torn"):
        await task
    assert task.status is TaskStatus.FAILED


async def test_timeout_tells_the_function_and_waits_for_it(manager: TaskManager) -> None:
    """The task fails with TimeoutError once the function has returned, and the event says why."""
    causes = []

    def work() -> None:
        stop_when_told()
        causes.append(current_cancel_event().cause)

    task = manager.run_in_thread(work, timeout=0.05)
    with pytest.raises(TimeoutError, match=r"timeout of 0\.05 s"):
        await task
    assert causes[0] is not None
    assert causes[0].kind is CancelKind.TIMEOUT


async def test_task_cancelled_before_its_first_step_starts_no_thread(manager: TaskManager) -> None:
    """No thread starts for a function whose result nobody could get."""
    task = manager.run_in_thread(pytest.fail, "called")
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert task.info().started_at is None


async def test_function_in_a_thread_survives_no_shutdown_unreported(manager: TaskManager, gate: Gate) -> None:
    """The report says where the thread is, in the function's own lines."""
    task = manager.run_in_thread(gate, name="stuck")
    await gate.entered()
    assert task.stack().splitlines()[0].endswith("in __call__")
    report = await manager.shutdown(0.0, 0.05)
    assert list(report.still_running) == ["stuck"]
    assert "in __call__" in report.still_running["stuck"]
    assert not report.clean
    gate.open()
    await asyncio.wait([task])
    assert task.stack() == ""


# -- abandoned threads -----------------------------------------------------------------------------


async def test_task_that_abandons_its_thread_ends_at_once(
    manager: TaskManager, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread is named in the log, listed, and reported by a shutdown, until it returns."""
    caplog.set_level(logging.INFO)
    task = manager.run_in_thread(gate, name="stuck", abandon=True)
    await gate.entered()
    task.cancel("enough")
    await asyncio.wait([task])
    assert task.cancelled()
    assert manager.abandoned_threads == ("stuck",)
    assert caplog.messages == [
        "the thread of task 'stuck' runs on after the task (explicit: enough); its cancel event is set"
    ]
    caplog.clear()
    report = await manager.shutdown(0.0, 1.0)
    assert not report.clean
    assert list(report.abandoned_threads) == ["stuck"]
    assert "in __call__" in report.abandoned_threads["stuck"]
    assert caplog.messages[0].startswith("the thread of task 'stuck' has not returned at shutdown; ")
    caplog.clear()
    gate.open()
    await until(lambda: caplog.messages)
    assert manager.abandoned_threads == ()
    assert caplog.messages == ["the thread of task 'stuck' has returned"]
    assert (await manager.shutdown(0.0, 1.0)).clean


async def test_timeout_abandons_the_thread_where_it_may(manager: TaskManager, gate: Gate) -> None:
    """TimeoutError comes on time, whatever the function does."""
    with pytest.raises(TimeoutError):
        await manager.run_in_thread(gate, name="stuck", abandon=True, timeout=0.05)
    assert manager.abandoned_threads == ("stuck",)
    gate.open()
    await until(lambda: not manager.abandoned_threads)


async def test_failure_of_an_abandoned_function_is_logged(
    manager: TaskManager, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise it would never be reported."""
    task = manager.run_in_thread(gate, LookupError("too late"), name="stuck", abandon=True)
    await gate.entered()
    task.cancel()
    await asyncio.wait([task])
    caplog.clear()
    gate.open()
    await until(lambda: caplog.messages)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message == "the thread of task 'stuck' failed after the task"
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "too late"


async def test_thread_that_has_returned_already_is_not_called_abandoned(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancellation that comes between its return and the loop's next turn finds no thread any more."""
    loop = asyncio.get_running_loop()
    task = manager.run_in_thread(give_plain, 1, abandon=True)
    loop.call_soon(lambda: loop.call_soon(cancel_when_idle, manager, task))
    await asyncio.wait([task])
    await settle()
    assert task.cancelled()
    assert not caplog.records


def cancel_when_idle(manager: TaskManager, task: ManagedTask[Any]) -> None:
    """Block the loop until the thread has returned, then cancel the task before the loop hears of it."""
    end = time.monotonic() + PATIENCE
    while manager._threads.workers:
        assert time.monotonic() < end
        time.sleep(0.001)
    task.cancel()


def test_thread_whose_loop_is_closed_is_not_forgotten(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """It stays listed until it returns, and a later exception of it is logged."""
    manager = TaskManager()
    loop = VirtualClockLoop()

    async def leave() -> None:
        manager.run_in_thread(gate, LookupError("too late"), name="left")
        await gate.entered()

    loop.run_until_complete(leave())
    task = manager.get_task("left")
    loop.close()
    forget(task)
    assert manager.abandoned_threads == ("left",)
    caplog.clear()
    gate.open()
    end = time.monotonic() + PATIENCE
    while not caplog.messages and time.monotonic() < end:
        time.sleep(0.001)
    assert caplog.messages == ["the thread of task 'left' failed after the task"]
    assert manager.abandoned_threads == ()


# -- places ----------------------------------------------------------------------------------------


async def test_no_more_threads_work_than_there_are_places(spans: SpanRecorder) -> None:
    """The others wait, and all come to their turn."""
    working = itertools.count()
    lock = threading.Lock()
    all_three = threading.Barrier(3)
    now = most = 0

    def work() -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        all_three.wait(PATIENCE)
        # Time for a fourth to come, if there were a place for it.
        time.sleep(0.002)
        with lock:
            now -= 1
        return next(working)

    async with TaskManager(max_threads=3) as manager:
        tasks = [manager.run_in_thread(work) for _ in range(21)]
        assert sorted([await task for task in tasks]) == list(range(21))
    assert most == 3
    assert not manager._threads.workers


@pytest.mark.parametrize("ageing", [10.0, float("inf")])
async def test_places_go_by_priority_then_first_come(ageing: float, gate: Gate) -> None:
    """As under any limit."""
    order: list[str] = []
    async with TaskManager(max_threads=1, ageing=ageing) as manager:
        first = manager.run_in_thread(gate)
        await gate.entered()
        tasks = [
            manager.run_in_thread(order.append, name, priority=priority)
            for name, priority in [
                ("low", TaskPriority.LOW),
                ("one", TaskPriority.NORMAL),
                ("two", TaskPriority.NORMAL),
                ("high", TaskPriority.HIGH),
            ]
        ]
        await settle()
        gate.open()
        await asyncio.wait([first, *tasks])
    assert order == ["high", "one", "two", "low"]


async def test_abandoned_thread_keeps_its_place(gate: Gate) -> None:
    """Else threads that hang would grow without bound."""
    async with TaskManager(max_threads=1) as manager:
        stuck = manager.run_in_thread(gate, abandon=True)
        await gate.entered()
        stuck.cancel()
        next_one = manager.run_in_thread(give_plain, 1)
        await asyncio.wait([stuck])
        await settle()
        assert not next_one.done()
        gate.open()
        assert await next_one == (1, 0)


async def test_shutdown_names_the_functions_that_got_no_thread(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """Their tasks had started, but none of the work had."""
    manager = TaskManager(max_threads=1)
    working = manager.run_in_thread(gate, name="works")
    await gate.entered()
    tasks = [
        manager.run_in_thread(pytest.fail, "called", name="waits", timeout=seconds) for seconds in (None, 60)
    ]
    await settle()
    asyncio.get_running_loop().call_later(0.01, gate.open)
    await manager.shutdown(0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "the shutdown of manager 'default' cancelled 3 tasks: "
        "'works', 'waits' (not started), 'waits-2' (not started)"
    )
    assert [task.info().started_at for task in tasks] == [None, None]
    assert working.info().started_at is not None


async def test_cancelled_in_the_queue_no_thread_is_started(gate: Gate) -> None:
    """Its turn goes to the next one; so it does when it is cancelled just as it comes."""
    async with TaskManager(max_threads=1) as manager:
        first = manager.run_in_thread(gate)
        await gate.entered()
        waiting = manager.run_in_thread(pytest.fail, "called")
        woken = manager.run_in_thread(pytest.fail, "called")
        last = manager.run_in_thread(give_plain, 1)
        await settle()
        waiting.cancel()
        await asyncio.wait([waiting])
        gate.open()
        while not any(worker.task is woken for worker in list(manager._threads.workers)):  # noqa: ASYNC110 - as below
            # There is no event for the moment between the giving of a place and the taking of it.
            await asyncio.sleep(0)
        woken.cancel()
        assert await last == (1, 0)
        await asyncio.wait([first])
    assert woken.cancelled()


async def test_more_places_start_waiting_functions(gate: Gate) -> None:
    """The limit may be changed at any time; None is without bound."""
    async with TaskManager(max_threads=1) as manager:
        first = manager.run_in_thread(gate)
        second = manager.run_in_thread(give_plain, 1)
        await gate.entered()
        manager.max_threads = 2
        assert await second == (1, 0)
        manager.max_threads = None
        assert await manager.run_in_thread(give_plain, 2) == (2, 0)
        assert manager.max_threads is None
        gate.open()
        await first


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "4"])
def test_number_of_threads_is_checked(number: Any) -> None:
    """In the constructor and later."""
    with pytest.raises(ValueError, match="max_threads must be at least 1, or None for no bound, got "):
        TaskManager(max_threads=number)
    manager = TaskManager()
    with pytest.raises(ValueError, match="max_threads must be at least 1"):
        manager.max_threads = number


async def test_thread_that_cannot_be_started_fails_its_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves its place to the next."""

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with TaskManager(max_threads=1) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            task = manager.run_in_thread(give_plain, 1)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await task
        assert await manager.run_in_thread(give_plain, 2) == (2, 0)


def test_places_survive_a_change_of_the_loop(gate: Gate) -> None:
    """Functions that waited in the old loop are gone; a running thread keeps its place and returns it."""
    manager = TaskManager(max_threads=1)

    async def begin() -> None:
        task = manager.run_in_thread(gate, abandon=True)
        await gate.entered()
        waiting = manager.run_in_thread(pytest.fail, "called")
        await settle()
        for each in (task, waiting):
            each.cancel()
        await asyncio.wait([task, waiting])

    async def go_on() -> tuple[int, int]:
        task = manager.run_in_thread(give_plain, 1)
        await settle()
        assert not task.done()
        gate.open()
        return await task

    run(begin())
    assert run(go_on()) == (1, 0)


# -- every await, cancelled in turn ----------------------------------------------------------------


async def running_a_function(manager: TaskManager) -> None:
    await manager.run_in_thread(give_plain, 1)


async def waiting_for_a_place(manager: TaskManager) -> None:
    manager.max_threads = 1
    first = manager.run_in_thread(stop_when_told)
    second = manager.run_in_thread(give_plain, 1)
    try:
        await asyncio.sleep(0.01)
        first.cancel()
        await second
    finally:
        first.cancel()


@pytest.mark.parametrize("scenario", [running_a_function, waiting_for_a_place])
def test_cancelled_at_any_await_nothing_is_left(scenario: Any, spans: SpanRecorder) -> None:
    """Wherever the cancellation strikes, the thread has returned and every end is recorded."""
    assert cancel_at_each_await(scenario, spans) >= 1


# -- def endpoints ---------------------------------------------------------------------------------


@pytest.fixture
def app(manager: TaskManager) -> FastAPI:
    app = FastAPI()
    app.add_middleware(TaskGroupMiddleware, manager=manager)

    @app.get("/fan-out")
    def fan_out() -> dict[str, Any]:
        futures = [create_task_threadsafe(where_am_i) for _ in range(3)]
        names = {future.result(PATIENCE) for future in futures}
        return {"groups": sorted(names), "cancelled": current_cancel_event().is_set()}

    @app.get("/wrong")
    def wrong() -> str:
        try:
            create_task(rest())
        except WrongThreadError as error:
            return str(error)
        return "created"

    @app.post("/stuck")
    def stuck(tasks: RequestTasks) -> None:
        tasks.create_task_threadsafe(rest(), name="slow").result(PATIENCE)

    @app.post("/watch")
    def watch() -> None:
        app.state.watched = stop_when_told()

    return app


async def where_am_i() -> str:
    """Say in which group this runs."""
    return current_group().name


async def test_def_endpoint_creates_tasks_in_its_requests_group(app: FastAPI) -> None:
    """By itself it finds the group; the event is there too."""
    async with app.user_middleware[0].kwargs["manager"]:  # type: ignore[attr-defined]  # a TaskManager
        connection = FakeConnection(path="/fan-out")
        await connection.run(app)
    assert connection.body == b'{"groups":["GET /fan-out"],"cancelled":false}'


async def test_def_endpoint_that_creates_a_task_gets_the_right_call_in_the_error(
    app: FastAPI, manager: TaskManager
) -> None:
    """The coroutine is closed, and the request's group is in order."""
    connection = FakeConnection(path="/wrong")
    await connection.run(app)
    assert b"write create_task_threadsafe(...)" in connection.body
    assert not manager._ledger.scopes


async def test_def_endpoint_that_waits_ends_when_the_client_leaves(
    app: FastAPI, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """Its task is cancelled, and what it raises for that is a departure, no error."""
    async with manager:
        connection = FakeConnection(path="/stuck", method="POST")
        server = asyncio.create_task(connection.run(app))
        await until(lambda: any("slow" in name for name in manager.get_all_task_info()))
        connection.disconnect()
        await server
        (info,) = manager.get_all_task_info().values()
    assert info.cause is not None
    assert info.cause.kind is CancelKind.CLIENT_DISCONNECT
    assert not caplog.records


async def test_def_endpoint_sees_that_the_client_has_left(app: FastAPI) -> None:
    """current_cancel_event() in its thread is the request's."""
    connection = FakeConnection(path="/watch", method="POST")
    server = asyncio.create_task(connection.run(app))
    await asyncio.sleep(0.1)
    connection.disconnect()
    await server
    assert app.state.watched == "stopped early"


async def test_request_has_one_group_for_all_threads(manager: TaskManager) -> None:
    """Threads that ask for it at a time get the same one."""
    ready = threading.Barrier(4)
    groups: list[TaskGroup] = []

    def ask() -> TaskGroup:
        ready.wait(PATIENCE)
        return request_group()

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        groups.extend(await asyncio.gather(*(in_a_thread(ask) for _ in range(4))))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    for _ in range(50):
        groups.clear()
        await FakeConnection().run(TaskGroupMiddleware(endpoint, manager=manager))
        assert len(set(groups)) == 1
    assert not manager._ledger.scopes


async def test_group_made_while_another_waits_to_make_it_is_the_one(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second thread finds the group of the first."""
    found: list[TaskGroup] = []

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        with Beaten(monkeypatch, "otel_tasks._asgi.request.GROUP_LOCK", request_group) as first:
            found.extend([request_group(), first[0]])
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await FakeConnection().run(TaskGroupMiddleware(endpoint, manager=manager))
    assert found[0] is found[1]


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """The port of a uvicorn that serves ``app`` in this loop, and has ended when the block is left."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=5)
    )
    running = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(PATIENCE):
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        port: int = server.servers[0].sockets[0].getsockname()[1]
        yield port
    finally:
        server.should_exit = True
        await running


@contextlib.asynccontextmanager
async def asking(port: int, method: str, path: str) -> AsyncIterator[asyncio.StreamReader]:
    """Send a request; the client hangs up at the end of the block."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.e2e
@pytest.mark.real_clock
async def test_def_endpoints_over_a_socket(app: FastAPI, manager: TaskManager) -> None:
    """On a real server, with anyio's threads: tasks in the request's group, and the end by disconnect."""
    async with asyncio.timeout(PATIENCE), manager, serving(app) as port:
        async with asking(port, "GET", "/fan-out") as answer:
            assert (await answer.read()).endswith(b'{"groups":["GET /fan-out"],"cancelled":false}')
        async with asking(port, "GET", "/wrong") as answer:
            assert b"write create_task_threadsafe(...)" in await answer.read()
        async with asking(port, "POST", "/stuck"), asking(port, "POST", "/watch"):
            await until(lambda: any("slow" in name for name in manager.get_all_task_info()))
            # Past the moment from which a request is watched.
            await asyncio.sleep(0.1)
        await until(lambda: getattr(app.state, "watched", None))
        await until(lambda: not manager.stats().live)
        (slow,) = (info for info in manager.get_all_task_info().values() if info.name == "slow")
        assert slow.cause is not None
        assert slow.cause.kind is CancelKind.CLIENT_DISCONNECT


# -- under load ------------------------------------------------------------------------------------


@pytest.mark.real_clock
async def test_two_loops_in_two_threads_lose_no_end_of_a_task() -> None:
    """The end of a task is recorded per manager, even if two threads are there at the same time."""
    ends: list[int] = []

    async def work() -> None:
        async with TaskManager() as manager:
            for _ in range(20):
                await asyncio.wait([manager.create_task(asyncio.sleep(0)) for _ in range(200)])
            await settle()
            ends.append(manager.stats().completed)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        await asyncio.gather(*(in_a_thread(asyncio.run, work()) for _ in range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert ends == [4000, 4000]


THREADS, EACH = 8, 2_500


async def give_none() -> None:
    """Return at once."""


def create_and_cancel(manager: TaskManager) -> list[concurrent.futures.Future[None]]:
    """Create tasks: of three one returns, one is cancelled by its future, and one itself, all from here."""
    futures: list[concurrent.futures.Future[None]] = []
    resting: queue.SimpleQueue[ManagedTask[Any]] = queue.SimpleQueue()

    async def show_and_rest() -> None:
        task = current_task()
        assert task is not None
        resting.put(task)
        await rest()

    for number in range(EACH):
        work = (give_none, rest, show_and_rest)[number % 100 % 3]
        futures.append(manager.create_task_threadsafe(work))
        if number % 100 == 98:
            # When the last visible thread is seen, all threads have started, the invisible ones too.
            for _ in range(33):
                assert resting.get(timeout=PATIENCE).cancel("load")
            for future in futures[-98::3]:
                assert future.cancel()
    return futures


@pytest.mark.real_clock
async def test_none_of_20_000_tasks_of_8_threads_is_lost() -> None:
    """Created and cancelled from threads, they all end, and are all counted."""
    async with asyncio.timeout(200), TaskManager(history=0) as manager:
        done = await asyncio.gather(*(in_a_thread(create_and_cancel, manager) for _ in range(THREADS)))
        await manager.join()
        await settle()
        futures = list(itertools.chain.from_iterable(done))
        assert len(futures) == THREADS * EACH
        assert all(future.done() for future in futures)
        returned = sum(not future.cancelled() for future in futures)
        stats = manager.stats()
        assert (stats.created, stats.live, stats.failed) == (THREADS * EACH, 0, 0)
        assert (stats.completed, stats.cancelled) == (returned, THREADS * EACH - returned)
        assert returned == THREADS * EACH * 34 / 100
        assert not manager._root._live
