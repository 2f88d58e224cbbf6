"""Tasks that another thread creates in the loop, and the futures that represent them there."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import gc
import inspect
import time
from typing import Any

import pytest

from otel_tasks import (
    CancelKind,
    GroupClosedError,
    ManagedTask,
    ManagerClosedError,
    TaskExistsError,
    TaskGroup,
    TaskInfo,
    TaskManager,
    TaskStatus,
    WrongLoopError,
    WrongThreadError,
    create_task_threadsafe,
    current_group,
    current_task,
)
from otel_tasks._core.futures import TaskFuture, create_in_loop
from otel_tasks.testing import SpanRecorder, VirtualClockLoop, run
from tests.helpers import (
    PATIENCE,
    fail,
    forget,
    give,
    ignore_cancels,
    in_a_thread,
    rest,
    settle,
    until,
)

color: contextvars.ContextVar[str] = contextvars.ContextVar("color", default="none")


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


def is_closed(coro: Any) -> bool:
    """It has been closed, and Python will not complain that nobody awaited it."""
    return inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


async def test_thread_gets_the_result_of_its_task(manager: TaskManager) -> None:
    """The future ends with the result of the task, which is a managed task like any other."""

    def work() -> int:
        future = manager.create_task_threadsafe(give(7), name="seven", group="mail", metadata={"for": "you"})
        assert isinstance(future, concurrent.futures.Future)
        return future.result(PATIENCE)

    manager.create_task(give(None))
    assert await in_a_thread(work) == 7
    info = manager.get_task_info("seven")
    assert info is not None
    assert (info.group, info.status, info.metadata) == ("mail", TaskStatus.COMPLETED, {"for": "you"})


async def test_end_is_recorded_when_the_future_ends(manager: TaskManager) -> None:
    """When the future ends, the task has ended and is counted."""
    manager.create_task(give(None))

    def work() -> tuple[int, int]:
        manager.create_task_threadsafe(give(7)).result(PATIENCE)
        stats = manager.stats()
        return stats.live, stats.completed

    assert await in_a_thread(work) == (0, 2)


async def test_function_that_makes_a_coroutine_is_called_in_the_loop(manager: TaskManager) -> None:
    """So it may use what belongs to the loop."""
    manager.create_task(give(None))
    called_in = []

    def factory() -> Any:
        called_in.append(asyncio.get_running_loop())
        return give("made")

    assert await in_a_thread(lambda: manager.create_task_threadsafe(factory).result(PATIENCE)) == "made"
    assert called_in == [asyncio.get_running_loop()]


async def test_task_of_a_thread_belongs_to_the_threads_trace(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The span that is current at the call is the parent of the task's span."""
    tracer = spans.provider.get_tracer("test")
    manager.create_task(give(None))

    def work() -> None:
        with tracer.start_as_current_span("work"):
            color.set("red")
            assert manager.create_task_threadsafe(look).result(PATIENCE) == "red"

    async def look() -> str:
        return color.get()

    await in_a_thread(work)
    assert spans.span("look").parent == spans.span("work").context


async def test_given_context_is_where_the_task_runs() -> None:
    """As for create_task."""
    manager = TaskManager()
    context = contextvars.Context()
    context.run(color.set, "blue")

    async def look() -> str:
        return color.get()

    async with manager:
        future = manager.create_task_threadsafe(look(), context=context)
        assert await asyncio.wrap_future(future) == "blue"


async def test_current_group_of_a_thread_gets_the_task(manager: TaskManager) -> None:
    """The function without a group or a manager uses the group in which the thread works."""

    async def where() -> tuple[TaskGroup, ManagedTask[Any] | None]:
        return current_group(), current_task()

    def work() -> Any:
        return create_task_threadsafe(where, name="inner").result(PATIENCE)

    async with manager.group("scope") as group:
        task = group.run_in_thread(work)
        found, inner = await task
    assert found is group
    assert inner is not None
    assert (inner.name, inner.status) == ("inner", TaskStatus.COMPLETED)


async def test_group_object_and_its_own_method_lead_to_the_group(manager: TaskManager) -> None:
    """Both ways the task is the group's."""
    async with manager.group("scope") as group:
        first = manager.create_task_threadsafe(rest(), group=group)
        second = group.create_task_threadsafe(rest())
        await settle()
        assert [task.group for task in group.tasks] == [group, group]
        group.cancel()
    await settle()
    assert first.cancelled()
    assert second.cancelled()


async def test_loop_may_hand_over_to_itself(manager: TaskManager) -> None:
    """It works from the loop's own thread too, as long as that thread does not block."""
    async with manager:
        assert await asyncio.wrap_future(manager.create_task_threadsafe(give(1))) == 1


async def test_taken_name_gives_the_future_of_the_live_task(manager: TaskManager) -> None:
    """With on_conflict="return" several futures stand for one task."""
    task = manager.create_task(asyncio.sleep(5, "slept"), name="one")
    first, second = (
        manager.create_task_threadsafe(rest(), name="one", on_conflict="return") for _ in range(2)
    )
    assert await task == "slept"
    await settle()
    assert (first.result(), second.result()) == ("slept", "slept")


async def test_failure_is_raised_in_the_thread_that_waits(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is raised in the waiter and reported nowhere else."""
    manager.create_task(give(None))

    futures: list[Any] = []

    def work() -> None:
        futures.append(future := manager.create_task_threadsafe(fail_late))
        future.result(PATIENCE)

    async def fail_late() -> None:
        await until(lambda: futures and futures[0].awaited)
        raise LookupError("none")

    with pytest.raises(LookupError, match="none"):
        await in_a_thread(work)
    futures.clear()
    gc.collect()
    assert not caplog.records


@pytest.mark.parametrize("way", ["callback", "wait"])
async def test_failure_is_not_logged_if_the_future_has_a_waiter(
    way: str, manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback counts as a waiter, and so does concurrent.futures.wait()."""
    manager.create_task(give(None))
    told: list[BaseException | None] = []
    futures: list[Any] = []

    async def fail_late() -> None:
        await until(lambda: futures and futures[0].awaited)
        raise LookupError("none")

    def work() -> None:
        futures.append(future := manager.create_task_threadsafe(fail_late))
        if way == "callback":
            future.add_done_callback(lambda ended: told.append(ended.exception()))
        else:
            told.extend(ended.exception() for ended in concurrent.futures.wait([future], PATIENCE).done)

    await in_a_thread(work)
    await until(lambda: told)
    assert isinstance(told[0], LookupError)
    assert not caplog.records


async def test_failure_without_a_waiter_is_reported(spans: SpanRecorder) -> None:
    """A future that is left alone does not make a failure silent."""
    failures: list[tuple[str, str]] = []

    def note(info: TaskInfo, error: BaseException) -> None:
        failures.append((info.name, str(error)))

    async with TaskManager(on_error=note, tracer_provider=spans.provider) as manager:
        future = manager.create_task_threadsafe(fail(LookupError("none")), name="lost")
        await manager.join()
        await settle()
    assert failures == [("lost", "none")]
    assert isinstance(future.exception(), LookupError)


async def test_failure_after_the_future_was_cancelled_is_reported(spans: SpanRecorder) -> None:
    """A cancelled future passes nothing on, not even to its callbacks."""
    failures: list[str] = []

    async def stumble() -> None:
        try:
            await rest()
        finally:
            raise LookupError("while cleaning up")

    async with TaskManager(on_error=lambda _, error: failures.append(str(error))) as manager:
        future = manager.create_task_threadsafe(stumble)
        future.add_done_callback(lambda _: None)
        await settle()
        assert future.cancel()
        await manager.join()
    assert failures == ["while cleaning up"]
    assert future.cancelled()


async def test_cancelling_the_future_cancels_the_task(manager: TaskManager, spans: SpanRecorder) -> None:
    """The cause has the span of the cancelling thread, and the loop's time."""
    tracer = spans.provider.get_tracer("test")
    task = manager.create_task(rest(), name="victim")

    def work() -> None:
        future = manager.create_task_threadsafe(rest(), name="victim", on_conflict="return")
        while not task._extras or not task._extras.futures:
            time.sleep(0.001)
        with tracer.start_as_current_span("asker"):
            assert future.cancel()
        assert future.cancel()
        assert future.cancelled()
        done, _ = concurrent.futures.wait([future], PATIENCE)
        # It gets the result only when the task has ended.
        assert done == {future}
        assert task.done()

    await in_a_thread(work)
    assert task.cancelled()
    cause = task.cause
    assert cause is not None
    assert (cause.kind, cause.message) == (CancelKind.EXPLICIT, "its future was cancelled")
    assert cause.origin == spans.span("asker").context
    assert cause.at is not None
    assert 1000 <= cause.at <= asyncio.get_running_loop().time()


async def test_future_cancelled_before_its_task_is_created_creates_none(manager: TaskManager) -> None:
    """The coroutine is closed, and a wait for the future ends."""
    async with manager:
        coro = rest()
        future = manager.create_task_threadsafe(coro)
        assert future.cancel()
        await in_a_thread(concurrent.futures.wait, [future], PATIENCE)
        assert is_closed(coro)
        assert manager.stats().created == 0


async def test_end_of_a_cancelled_task_cancels_its_future(manager: TaskManager) -> None:
    """As asyncio's run_coroutine_threadsafe() does."""
    async with manager:
        future = manager.create_task_threadsafe(rest(), name="a")
        await settle()
        manager.get_task("a").cancel()
        await settle()
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


async def test_task_that_ignores_its_cancellation_leaves_its_future_cancelled(manager: TaskManager) -> None:
    """The future stays cancelled; the record says what the task did."""
    async with manager:
        future = manager.create_task_threadsafe(ignore_cancels(1.0), name="a")
        await settle()
        future.cancel()
        await manager.join()
        info = manager.get_task_info("a")
        assert info is not None
        assert info.cancel_ignored
        assert future.cancelled()


REFUSALS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "name of another type": (TypeError, "task name must be a string, got 7", {"name": 7}),
    "empty name": (ValueError, "task name must not be empty", {"name": ""}),
    "negative timeout": (ValueError, "timeout must be at least 0 seconds, got -1", {"timeout": -1}),
    "timeout in the queue": (ValueError, "queue_timeout must be at least 0", {"queue_timeout": -1}),
    "priority": (ValueError, "priority must be one of", {"priority": 17}),
    "conflict": (ValueError, "on_conflict must be one of", {"on_conflict": "ask"}),
    "unknown option": (
        TypeError,
        r"^create_task_threadsafe\(\) got an unexpected .* 'nam'\. Did you mean 'name'\?$",
        {"nam": "a"},
    ),
    "group of another type": (TypeError, "group must be a name or a TaskGroup, got 7", {"group": 7}),
    "strange group": (ValueError, "belongs to manager", {"group": TaskManager("other").get_group("a")}),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_wrong_option_is_refused_at_once(case: str, manager: TaskManager) -> None:
    """The error is raised where the mistake is, and the coroutine closed."""
    error, message, options = REFUSALS[case]
    coro = rest()
    async with manager:
        with pytest.raises(error, match=message):
            manager.create_task_threadsafe(coro, **options)
    assert is_closed(coro)


async def test_factory_that_makes_no_coroutine_is_refused_at_once(manager: TaskManager) -> None:
    """The message shows the right line."""
    async with manager:
        with pytest.raises(TypeError, match=r"takes a coroutine, or a function that makes one, got 7: "):
            manager.create_task_threadsafe(7)  # type: ignore[arg-type]  # the mistake in question


async def test_function_that_makes_no_coroutine_is_refused_by_the_future(manager: TaskManager) -> None:
    """The result of the function is checked in the loop."""
    async with manager:
        seven: Any = lambda: 7  # noqa: E731 - typed so that it may be the mistake in question
        future = manager.create_task_threadsafe(seven)
        await settle()
        assert isinstance(future.exception(), TypeError)


async def test_manager_that_is_shut_down_refuses_a_thread(manager: TaskManager) -> None:
    """At once, and the coroutine is closed."""
    async with manager:
        pass
    coro = rest()
    with pytest.raises(ManagerClosedError, match=r"was shut down by .* and takes no new tasks"):
        manager.create_task_threadsafe(coro)
    assert is_closed(coro)


async def test_group_that_is_closed_refuses_a_thread(manager: TaskManager) -> None:
    """At once, by the name that the task would have had."""
    async with manager.group("scope") as group:
        pass
    coro = rest()
    with pytest.raises(GroupClosedError, match=r"cannot create task 'rest': group 'scope#1' is finished"):
        group.create_task_threadsafe(coro)
    assert is_closed(coro)
    with pytest.raises(GroupClosedError, match="cannot create task 'mine'"):
        group.create_task_threadsafe(rest, name="mine")


async def test_group_that_closes_meanwhile_refuses_by_the_future(manager: TaskManager) -> None:
    """The handed-over task comes too late; its coroutine is closed."""
    coro = rest()
    async with manager.group("scope") as group:
        future = group.create_task_threadsafe(coro)
        group.cancel()
    await settle()
    assert isinstance(future.exception(), GroupClosedError)
    assert is_closed(coro)


async def test_taken_name_is_refused_by_the_future(manager: TaskManager) -> None:
    """Only the loop knows which names are taken."""
    async with manager:
        manager.create_task(rest(), name="a")
        coro = rest()
        future = manager.create_task_threadsafe(coro, name="a", on_conflict="error")
        await settle()
        assert isinstance(future.exception(), TaskExistsError)
        assert is_closed(coro)
        await manager.cancel_all_tasks()


async def test_failing_factory_fails_the_future(manager: TaskManager) -> None:
    """Its exception is raised in the thread, and no task is created."""

    def factory() -> Any:
        raise LookupError("no such work")

    async with manager:
        future = manager.create_task_threadsafe(factory)
        await settle()
        assert str(future.exception()) == "no such work"


def test_system_exit_of_a_factory_passes_through_the_loop() -> None:
    """SystemExit ends the loop's run, and the future tells of it too."""
    futures = []

    def factory() -> Any:
        raise SystemExit(3)

    async def main() -> None:
        manager = TaskManager()
        async with manager:
            futures.append(manager.create_task_threadsafe(factory))
            await rest()

    with pytest.raises(SystemExit):
        run(main())
    assert isinstance(futures[0].exception(), SystemExit)


def test_manager_without_a_loop_refuses_a_thread() -> None:
    """It says how the manager gets one."""
    coro = rest()
    with pytest.raises(WrongLoopError, match=r"^manager 'm' runs in no event loop: enter it there"):
        TaskManager("m").create_task_threadsafe(coro)
    assert is_closed(coro)


def test_manager_of_a_closed_loop_refuses_a_thread() -> None:
    """Nothing could ever run there."""
    manager = TaskManager("m")

    async def use() -> None:
        await manager.create_task(give(None))

    run(use())
    with pytest.raises(WrongLoopError, match="runs in no event loop"):
        manager.create_task_threadsafe(rest())


@pytest.mark.parametrize("module", ["asyncio", "uvloop"])
def test_loop_that_is_closed_before_the_task_is_created_refuses_it(module: str) -> None:
    """The coroutine is closed, and a waiting thread gets the error."""
    manager = TaskManager("m")
    loop: asyncio.AbstractEventLoop = pytest.importorskip(module).new_event_loop()

    async def use() -> None:
        await manager.create_task(give(None))

    loop.run_until_complete(use())
    coro = rest()
    future = manager.create_task_threadsafe(coro)
    function = manager.create_task_threadsafe(rest)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(future.exception, PATIENCE)
        loop.close()
        gc.collect()
        error = waiting.result()
    assert isinstance(error, WrongLoopError)
    assert "the event loop was closed before the task was created" in str(error)
    assert isinstance(function.exception(), WrongLoopError)
    assert is_closed(coro)


def test_loop_that_is_closed_in_the_very_moment_refuses_by_the_future() -> None:
    """Between the look at the loop and the handing over it may go."""
    loop = asyncio.new_event_loop()
    loop.close()
    coro = rest()
    future = create_in_loop(loop, coro, lambda _: pytest.fail("created"))
    assert isinstance(future.exception(), WrongLoopError)
    assert is_closed(coro)


def test_loop_that_is_closed_under_a_task_ends_its_future() -> None:
    """As soon as the manager is used in another loop, that is: a future that waits on gets its error."""
    manager = TaskManager("m")
    loop = VirtualClockLoop()
    futures: list[concurrent.futures.Future[Any]] = []

    async def leave() -> None:
        manager.create_task(give(None))
        futures.append(manager.create_task_threadsafe(rest(), name="left"))
        await settle()

    loop.run_until_complete(leave())
    task = manager.get_task("left")
    loop.close()
    assert not futures[0].done()

    async def use() -> None:
        await manager.create_task(give(None))

    run(use())
    assert isinstance(futures[0].exception(), WrongLoopError)
    forget(task)


def test_cancelling_the_future_of_a_closed_loop_changes_nothing_there() -> None:
    """The task is gone with its loop; the future is cancelled anyway."""
    loop = asyncio.new_event_loop()
    future: TaskFuture[Any] = TaskFuture(loop)
    loop.close()
    assert future.cancel()


async def test_create_task_in_a_thread_names_the_right_call(manager: TaskManager) -> None:
    """The message names the call to use instead."""
    manager.create_task(give(None))

    def work() -> None:
        manager.create_task(rest())

    with pytest.raises(WrongThreadError, match=r": write create_task_threadsafe\(\.\.\.\)"):
        await in_a_thread(work)


async def test_module_function_closes_the_coroutine_where_no_group_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A binding that fails is a refusal as any."""

    def broken() -> TaskGroup:
        raise LookupError("no group")

    monkeypatch.setattr("otel_tasks._core.functions.current_group", broken)
    coro = rest()
    with pytest.raises(LookupError):
        create_task_threadsafe(coro)
    assert is_closed(coro)


async def test_coroutine_for_a_bad_label_is_closed() -> None:
    """The label is looked up in the loop, and a coroutine whose label is refused there is closed."""
    async with TaskManager() as manager:
        coro = give(1)
        future = await asyncio.to_thread(manager.create_task_threadsafe, coro, group="")
        with pytest.raises(ValueError, match="group"):
            await asyncio.wrap_future(future)
        assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
