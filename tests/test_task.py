"""ManagedTask: the facts of asyncio that it has to get right, its snapshot, its timeout."""

from __future__ import annotations

import asyncio
import collections.abc
import gc
import json
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelCause,
    CancelKind,
    ManagedTask,
    TaskExistsError,
    TaskManager,
    TaskNotFoundError,
    TaskPriority,
    TaskStatus,
    create_task,
)
from otel_tasks._core.shields import shield, unshield
from otel_tasks._core.task import request_cancel
from otel_tasks._core.waiting import wait_until_done
from otel_tasks.testing import SpanRecorder, run
from tests.helpers import counters, fail, give, ignore_cancels, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Generator

DISCONNECT = CancelCause(CancelKind.CLIENT_DISCONNECT, "gone")


# -- the statuses ----------------------------------------------------------------------------------


async def test_task_goes_from_pending_over_running_to_completed() -> None:
    """A task is pending until its first step, running until it returns, completed then."""
    task = TaskManager().create_task(asyncio.sleep(1, "done"))
    assert task.status is TaskStatus.PENDING
    await settle()
    assert task.status is TaskStatus.RUNNING
    assert await task == "done"
    assert task.status is TaskStatus.COMPLETED
    assert task.cause is None


async def test_task_that_looks_at_itself_is_running() -> None:
    """Inside its own code a task is running."""
    manager = TaskManager()

    async def look() -> TaskStatus:
        return manager.get_task("look").status

    assert await manager.create_task(look(), name="look") is TaskStatus.RUNNING


async def test_task_that_raises_is_failed() -> None:
    """A task that raised is failed, and awaiting it raises the same."""
    task = TaskManager().create_task(fail(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        await task
    assert task.status is TaskStatus.FAILED


async def test_cancelled_task_is_cancelling_until_it_has_unwound() -> None:
    """Between the request and the end a task is cancelling."""
    task = TaskManager().create_task(rest())
    await settle()
    task.cancel("enough")
    assert task.status is TaskStatus.CANCELLING
    await asyncio.wait([task])
    assert task.status is TaskStatus.CANCELLED


async def test_pending_task_that_is_cancelled_is_cancelling() -> None:
    """A cancel request to a task that has not started leads from pending to cancelling."""
    task = TaskManager().create_task(rest())
    task.cancel()
    assert task.status is TaskStatus.CANCELLING
    await asyncio.wait([task])
    assert task.status is TaskStatus.CANCELLED


async def test_second_cancel_leaves_the_task_cancelling_with_its_first_cause() -> None:
    """Asked twice, a task is cancelling still, and the first cause stays."""
    task = TaskManager().create_task(ignore_cancels(5))
    await settle()
    task.cancel("first")
    await settle()
    task.cancel("second")
    assert task.status is TaskStatus.CANCELLING
    assert task.cause is not None
    assert task.cause.message == "first"
    await task


async def test_task_that_raises_while_cancelling_is_failed() -> None:
    """An error during the clean-up makes the task failed; the cause of its cancellation is kept."""

    async def break_on_cancel() -> None:
        try:
            await rest()
        finally:
            raise ValueError("clean-up failed")

    task = TaskManager().create_task(break_on_cancel())
    await settle()
    task.cancel("enough")
    with pytest.raises(ValueError, match="clean-up failed"):
        await task
    assert task.status is TaskStatus.FAILED
    assert task.cause is not None
    assert task.cause.message == "enough"
    assert not task.cancel_ignored


# -- the facts of asyncio --------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 5.0])
async def test_task_cancelled_before_its_first_step_runs_none_of_its_code(timeout: float | None) -> None:
    """Such a task ends cancelled, its coroutine is closed, and its record says that it never started."""
    ran: list[str] = []

    async def work() -> None:
        try:
            ran.append("body")
        finally:
            ran.append("finally")

    task = TaskManager().create_task(work(), timeout=timeout)
    task.cancel()
    await asyncio.wait([task])
    await settle()
    assert task.status is TaskStatus.CANCELLED
    assert task.info().started_at is None
    assert not ran
    gc.collect()


async def test_cancel_from_a_callback_before_the_first_step_is_recorded_too() -> None:
    """The record of a task that never ran has the cause too."""
    tasks: list[ManagedTask[None]] = []
    asyncio.get_running_loop().call_soon(lambda: tasks[0].cancel())
    tasks.append(TaskManager().create_task(rest()))
    await asyncio.wait(tasks)
    assert tasks[0].info().started_at is None


@pytest.mark.parametrize("stop", ["cancel", "cancel and uncancel", "group", "manager", "callback"])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"timeout": 9.0},
        {"timeout": 0.5},
        {"metadata": {}},
        {"queue_timeout": 0.5},
        {"on_conflict": "replace"},
        {"on_conflict": "replace", "timeout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [None, 1])
async def test_task_has_not_started_if_and_only_if_none_of_its_code_ran(
    limit: int | None, options: dict[str, Any], turns: int, stop: str, caplog: pytest.LogCaptureFixture
) -> None:
    """This holds for every wrapper around its coroutine and every way it ends; a shutdown's log agrees."""
    manager = TaskManager(max_concurrency=limit)
    before = manager.create_task(reluctant(), name="work", group="before")
    await asyncio.sleep(0)
    ran: list[str] = []
    wanted: dict[str, Any] = {"name": "work", "group": "g", **options}
    task = manager.create_task(note_and_rest(ran), **wanted)
    for _ in range(turns):
        await asyncio.sleep(0)
    await stop_by(stop, task, manager)
    report = await manager.shutdown(0.1)
    before.cancel()
    await asyncio.wait([before, task])
    assert (task.info().started_at is not None) is bool(ran)
    (line,) = [each.getMessage() for each in caplog.records if "the shutdown of" in each.msg] or [""]
    assert (f"'{task.id}' (not started)" in line) <= (not ran)
    assert report.clean


async def stop_by(stop: str, task: ManagedTask[Any], manager: TaskManager) -> None:
    match stop:
        case "cancel":
            task.cancel()
        case "cancel and uncancel":
            task.cancel()
            task.uncancel()
        case "group":
            await manager.cancel_group("g")
        case "callback":
            asyncio.get_running_loop().call_soon(task.cancel)
        case _:
            # By the shutdown that follows.
            pass


async def note_and_rest(ran: list[str]) -> None:
    ran.append("ran")
    await rest()


async def reluctant() -> None:
    """End a while after the cancellation."""
    try:
        await rest()
    except asyncio.CancelledError:
        await asyncio.sleep(1)
        raise


async def test_task_that_is_being_cancelled_before_its_first_step_has_not_started() -> None:
    """Its snapshot says so while it lives, too."""
    task = TaskManager().create_task(rest())
    task.cancel()
    assert (task.status, task.info().started_at) == (TaskStatus.CANCELLING, None)
    await asyncio.wait([task])


async def test_swallowed_cancellation_is_completed_and_visible(caplog: pytest.LogCaptureFixture) -> None:
    """Such a task is completed, flagged, warned of, and not counted as cancelled."""
    manager = TaskManager()
    task = manager.create_task(ignore_cancels(5), name="stubborn")
    await settle()
    task.cancel("enough")
    assert await task == "ignored"
    await settle()
    assert task.status is TaskStatus.COMPLETED
    assert task.cancel_ignored
    assert task.info().cancel_ignored
    assert counters(manager) == {"created": 1, "completed": 1, "cancel_ignored": 1, "remembered": 1}
    assert caplog.messages == ["task 'stubborn' ignored its cancellation (explicit: enough) and completed"]


async def test_cancel_ignored_is_false_while_the_task_lives() -> None:
    """Whether a cancellation was ignored is known at the end only."""
    task = TaskManager().create_task(ignore_cancels(5))
    await settle()
    task.cancel()
    assert not task.cancel_ignored
    await task


async def test_cancelled_error_without_a_request_is_foreign() -> None:
    """A task that raises CancelledError of its own ends as cancelled, with cause foreign."""
    task = TaskManager().create_task(fail(asyncio.CancelledError()))
    await asyncio.wait([task])
    assert task.status is TaskStatus.CANCELLED
    assert kind_of(task) is CancelKind.FOREIGN


async def test_awaiting_a_cancelled_future_is_foreign() -> None:
    """A CancelledError that comes out of something awaited is foreign."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = TaskManager().create_task(asyncio.wait_for(future, None))
    await settle()
    future.cancel()
    await asyncio.wait([task])
    assert kind_of(task) is CancelKind.FOREIGN


async def test_asyncio_timeout_inside_a_task_is_no_cancellation_of_it() -> None:
    """asyncio.timeout cancels and takes back: the task completes, without a cause."""
    seen: list[TaskStatus] = []

    async def impatient() -> str:
        try:
            async with asyncio.timeout(1):
                await rest()
        except TimeoutError:
            seen.append(task.status)
        return "went on"

    task = TaskManager().create_task(impatient())
    assert await task == "went on"
    assert seen == [TaskStatus.RUNNING]
    assert task.cause is None
    assert not task.cancel_ignored


async def test_asyncio_timeout_during_cleanup_keeps_the_first_cause() -> None:
    """A timeout that fires while the task cleans up changes neither its end nor its cause."""

    async def tidy() -> None:
        try:
            await rest()
        finally:
            try:
                async with asyncio.timeout(1):
                    await rest()
            except TimeoutError:
                pass

    task = TaskManager().create_task(tidy())
    await settle()
    task.cancel("enough")
    await asyncio.wait([task])
    assert task.status is TaskStatus.CANCELLED
    assert task.cause is not None
    assert task.cause.message == "enough"


async def test_asyncio_task_group_inside_a_task_is_no_cancellation_of_it() -> None:
    """A failing child of asyncio's own TaskGroup cancels its host and takes it back."""

    async def host() -> str:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail(ValueError("child")))
                await rest()
        except* ValueError:
            pass
        return "went on"

    task = TaskManager().create_task(host())
    assert await task == "went on"
    assert task.cause is None
    assert not task.cancel_ignored


async def test_asyncio_task_group_during_cleanup_keeps_the_first_cause() -> None:
    """A TaskGroup that fails while its host cleans up does not take the host's cause."""

    async def host() -> None:
        try:
            await rest()
        finally:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(fail(ValueError("child")))
                    await rest()
            except* ValueError:
                pass

    task = TaskManager().create_task(host())
    await settle()
    task.cancel("enough")
    await asyncio.wait([task])
    assert task.cause is not None
    assert task.cause.message == "enough"


async def test_uncancel_to_zero_drops_the_cause() -> None:
    """A request that is taken back leaves no cause, and the next one notes its own."""
    task = TaskManager().create_task(rest())
    await settle()
    task.cancel("first")
    task.cancel("second")
    assert task.uncancel() == 1
    assert task.cause is not None
    assert task.uncancel() == 0
    assert task.cause is None
    task.cancel("third")
    await asyncio.wait([task])
    assert task.cause is not None
    assert task.cause.message == "third"


async def test_task_that_cancels_itself_is_explicit() -> None:
    """A request that was not noted shows at the end by its count and its message."""

    async def suicidal() -> None:
        task.cancel("I quit")
        await rest()

    task = TaskManager().create_task(suicidal())
    await asyncio.wait([task])
    assert task.cause == CancelCause(CancelKind.EXPLICIT, "I quit")


async def test_cancel_from_a_callback_is_explicit_at_the_end() -> None:
    """A request from a bare callback is not noted, and still ends as explicit, here without a message."""
    task = TaskManager().create_task(rest())
    await settle()
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.wait([task])
    assert task.cause == CancelCause(CancelKind.EXPLICIT)


async def test_cancel_notes_the_asker_and_the_time() -> None:
    """A request from another task has its name, its message as text, and the loop's time."""
    task = TaskManager().create_task(rest())
    me = asyncio.current_task()
    assert me is not None
    await asyncio.sleep(3)
    assert task.cancel(404) is True
    assert task.cause == CancelCause(CancelKind.EXPLICIT, "404", me.get_name(), now())
    await asyncio.wait([task])


async def test_cancel_of_an_ended_task_is_false_and_notes_nothing() -> None:
    """cancel() says False once a task has ended."""
    task = TaskManager().create_task(give(1))
    await task
    assert task.cancel("late") is False
    assert task.cause is None
    assert task.status is TaskStatus.COMPLETED


async def test_await_forwards_the_awaiters_cancellation() -> None:
    """Plain `await task` is the standard library's: cancelling the awaiter cancels the task."""
    task = TaskManager().create_task(rest())

    async def wait() -> None:
        await task

    awaiter = asyncio.create_task(wait())
    await settle()
    awaiter.cancel("no longer wanted")
    await asyncio.wait([awaiter])
    assert task.cancelled()
    assert task.cause is not None
    assert task.cause.message == "no longer wanted"


async def test_live_task_is_held() -> None:
    """A task without other references is not collected before it has ended."""
    done = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(1)
        done.set()

    TaskManager().create_task(work())
    await settle()
    gc.collect()
    await asyncio.wait_for(done.wait(), 10)
    await settle()


async def test_nothing_of_an_ended_task_is_held() -> None:
    """Task, result, exception and frames are freed; only the slim record stays."""

    class Thing:
        pass

    class Error(Exception):
        pass

    things: list[weakref.ref[object]] = []

    async def work(*, failing: bool) -> Thing:
        local, result = Thing(), Thing()
        things.extend([weakref.ref(local), weakref.ref(result)])
        if failing:
            error = Error()
            things.append(weakref.ref(error))
            try:
                raise error
            finally:
                del error
        return result

    manager = TaskManager(on_error=lambda info, error: None)
    for task in [manager.create_task(work(failing=False)), manager.create_task(work(failing=True))]:
        things.append(weakref.ref(task))
    del task
    await settle()
    gc.collect()
    assert [thing() for thing in things] == [None] * len(things)
    assert len(manager.get_all_task_info()) == 2


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_system_exit_is_recorded_and_passes_through(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """SystemExit and KeyboardInterrupt reach the caller that runs the loop; they are recorded, not logged."""
    manager = TaskManager()

    async def main() -> None:
        manager.create_task(fail(error), name="leave")
        await asyncio.sleep(1)

    with pytest.raises(type(error)):
        run(main())
    info = manager.get_task_info("leave")
    assert info is not None
    assert info.status is TaskStatus.FAILED
    assert info.error_type == type(error).__name__
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# -- its own timeout -------------------------------------------------------------------------------


async def test_timeout_fails_the_task_with_timeout_error() -> None:
    """A task that runs into its timeout raises TimeoutError, with cause timeout."""
    start = now()
    task = TaskManager().create_task(rest(), timeout=2.5)
    with pytest.raises(TimeoutError, match=r"^the task ran into its timeout of 2.5 s$"):
        await task
    assert now() - start == 2.5
    assert task.status is TaskStatus.FAILED
    assert task.cause == CancelCause(CancelKind.TIMEOUT, "timeout of 2.5 s")


async def test_timeout_that_is_not_reached_changes_nothing() -> None:
    """A task that ends in time is as one without a timeout."""
    task = TaskManager().create_task(asyncio.sleep(1, "done"), timeout=2)
    assert task.status is TaskStatus.PENDING
    await settle()
    assert task.status is TaskStatus.RUNNING
    assert await task == "done"
    assert task.cause is None


async def test_infinite_timeout_is_none() -> None:
    """A timeout of infinity is without bound."""
    assert await TaskManager().create_task(asyncio.sleep(3000, "done"), timeout=float("inf")) == "done"


async def test_timeout_of_zero_stops_at_the_first_await() -> None:
    """A timeout of zero is over at once."""
    start = now()
    with pytest.raises(TimeoutError):
        await TaskManager().create_task(rest(), timeout=0)
    assert now() == start


async def test_ignored_timeout_is_completed_and_flagged() -> None:
    """A task that swallows its own timeout is completed with cancel_ignored."""
    task = TaskManager().create_task(ignore_cancels(5), timeout=1)
    assert await task == "ignored"
    assert task.cancel_ignored
    assert kind_of(task) is CancelKind.TIMEOUT


async def test_error_after_the_timeout_is_that_error() -> None:
    """An error of the cleanup after the timeout is the error of the task."""

    async def break_on_cancel() -> None:
        try:
            await rest()
        except asyncio.CancelledError:
            raise ValueError("clean-up failed") from None

    task = TaskManager().create_task(break_on_cancel(), timeout=1)
    with pytest.raises(ValueError, match="clean-up failed"):
        await task
    assert kind_of(task) is CancelKind.TIMEOUT


async def test_timeout_error_of_the_work_itself_is_forwarded() -> None:
    """A TimeoutError that the work raises before its time is up is the work's."""
    task = TaskManager().create_task(fail(TimeoutError("the socket's")), timeout=5)
    with pytest.raises(TimeoutError, match=r"^the socket's$"):
        await task
    assert task.cause is None


async def test_cancel_before_the_timeout_keeps_its_cause() -> None:
    """A task that was cancelled and then runs into its timeout keeps the first cause."""
    task = TaskManager().create_task(ignore_cancels(5), timeout=2)
    await settle()
    task.cancel("enough")
    await task
    assert task.cause is not None
    assert task.cause.message == "enough"


# -- what it shows ---------------------------------------------------------------------------------


async def test_task_shows_its_options() -> None:
    """Name, id, group, priority and metadata can be read from the task."""
    manager = TaskManager()
    given = {"user": 7}
    task = manager.create_task(
        rest(), name="mail", group="outbox", priority=TaskPriority.HIGH, metadata=given
    )
    assert (task.name, task.id, task.get_name()) == ("mail", "mail", "mail")
    assert task.group is manager.get_group("outbox")
    assert task.priority is TaskPriority.HIGH
    assert task.metadata == given
    task.metadata["user"] = 8
    assert given == {"user": 7}
    assert task.trace_id is None
    await manager.shutdown(0)


async def test_metadata_can_be_added_to_a_task_without_any() -> None:
    """Metadata is made on first use, and is in the record."""
    manager = TaskManager()

    async def work() -> None:
        manager.get_task("work").metadata["seen"] = True

    await manager.create_task(work(), name="work")
    info = manager.get_task_info("work")
    assert info is not None
    assert info.metadata == {"seen": True}


async def test_trace_id_is_that_of_the_span(spans: SpanRecorder) -> None:
    """With tracing the task says its trace in hex."""
    task = TaskManager(tracer_provider=spans.provider).create_task(give(1), name="one")
    await task
    context = spans.span("one").context
    assert context is not None
    assert task.trace_id == f"{context.trace_id:032x}"
    assert task.info().span_id == f"{context.span_id:016x}"


async def test_stack_says_where_a_live_task_waits() -> None:
    """stack() shows the line of a live task, and is empty for an ended one."""
    task = TaskManager().create_task(rest())
    await settle()
    assert "in rest" in task.stack()
    task.cancel()
    await asyncio.wait([task])
    assert task.stack() == ""


async def test_stack_goes_down_to_the_innermost_wait() -> None:
    """For a coroutine that awaits another, both lines are shown, the innermost last."""

    async def outer() -> None:
        await rest()

    task = TaskManager().create_task(outer())
    await settle()
    assert 0 < task.stack().index("in outer") < task.stack().index("in rest")
    task.cancel()
    await asyncio.wait([task])


async def test_name_of_an_unnamed_task_is_found_and_renamed() -> None:
    """It consists of the function's name and a number, and works like a given name."""
    manager = TaskManager()
    manager.create_task(rest())
    task = manager.create_task(rest())
    name = task.get_name()
    assert name == "rest-2"
    assert f"name={name!r}" in repr(task)
    assert manager.get_task(name) is task
    with pytest.raises(TaskExistsError, match=name):
        manager.create_task(rest(), name=name, on_conflict="error")
    task.set_name("other")
    assert (task.get_name(), task.id, manager.get_task("other")) == ("other", "other", task)
    with pytest.raises(TaskNotFoundError):
        manager.get_task(name)
    await manager.cancel_all_tasks()
    ended = manager.get_task_info("other")
    assert ended is not None
    assert (ended.name, ended.status) == ("other", TaskStatus.CANCELLED)


@pytest.mark.parametrize(
    "name", ["rest-", "rest-02", "rest-\u0662", "other-2", "rest-1", "rest-" + "9" * 195]
)
async def test_name_that_looks_like_that_of_an_unnamed_task_is_free(name: str) -> None:
    """A number at the end of a name is not taken for that of a task with another name."""
    manager = TaskManager()
    manager.create_task(rest(), name="other")
    unnamed = [manager.create_task(rest()) for _ in range(2)]
    assert [task.get_name() for task in unnamed] == ["rest", "rest-2"]
    for wanted in (name, "rest-" + "9" * 5000):
        with pytest.raises(TaskNotFoundError):
            manager.get_task(wanted)
    assert manager.create_task(rest(), name=name, on_conflict="error").get_name() == name
    await manager.cancel_all_tasks()


async def test_unnamed_task_passes_over_a_name_that_was_given() -> None:
    """Its number is the next one that gives a free name."""
    manager = TaskManager()
    chosen = manager.create_task(rest(), name="rest-2")
    assert [manager.create_task(rest()).get_name() for _ in range(2)] == ["rest", "rest-3"]
    assert chosen.get_name() == "rest-2"
    await manager.cancel_all_tasks()


async def test_unknown_option_is_refused_and_its_coroutine_closed() -> None:
    """The message names the misspelled option; no warning about an unawaited coroutine follows."""
    manager = TaskManager()
    options: dict[str, Any] = {"tiemout": 1}
    for create in (manager.create_task, create_task):
        coro: Any = rest()
        with pytest.raises(
            TypeError, match=r"create_task\(\) got an .* argument 'tiemout'\. Did you mean 'timeout'\?$"
        ):
            create(coro, **options)
        assert coro.cr_frame is None


async def test_info_of_a_live_task() -> None:
    """The snapshot of a live task has no end and no duration."""
    task = TaskManager().create_task(rest())
    pending = task.info()
    assert (pending.status, pending.started_at, pending.ended_at) == (TaskStatus.PENDING, None, None)
    assert pending.duration is None
    await settle()
    assert task.info().started_at == task.info().created_at == now()
    task.cancel()
    await asyncio.wait([task])


async def test_info_of_a_failed_task() -> None:
    """The snapshot of an ended task has its times and its error as text."""
    created = now()

    async def work() -> None:
        await asyncio.sleep(2)
        raise ValueError("no")

    task = TaskManager().create_task(work())
    await asyncio.wait([task])
    info = task.info()
    assert (info.created_at, info.ended_at, info.duration) == (created, created + 2, 2.0)
    assert (info.error_type, info.error) == ("ValueError", "no")
    assert isinstance(task.exception(), ValueError)


async def test_info_is_json_ready() -> None:
    """to_dict() gives what json can write, with wall-clock stamps."""
    task = TaskManager().create_task(rest(), name="mail", group="outbox", metadata={"user": 7})
    await settle()
    task.cancel("enough")
    await asyncio.wait([task])
    data = json.loads(json.dumps(task.info().to_dict()))
    assert data["status"] == "cancelled"
    assert data["priority"] == "NORMAL"
    assert data["cause"]["message"] == "enough"
    assert data["metadata"] == {"user": 7}
    assert data["duration"] == 0.0
    assert data["created_at"].endswith("+00:00")
    assert data["error"] is None


async def test_info_of_a_pending_task_is_json_ready_too() -> None:
    """Values that are not known yet are null."""
    task = TaskManager().create_task(give(1))
    data = json.loads(json.dumps(task.info().to_dict()))
    assert data["started_at"] is data["ended_at"] is data["cause"] is None
    await task


async def test_coroutine_that_hides_its_state_counts_as_running() -> None:
    """Nothing tells whether a coroutine object that is not Python's own has started."""

    class Foreign(collections.abc.Coroutine[Any, Any, str]):
        def __init__(self) -> None:
            self._steps = iter([None])

        def send(self, value: Any) -> Any:
            if next(self._steps, self) is self:
                raise StopIteration("done")

        def throw(self, *error: Any) -> Any:
            raise error[0]

        def close(self) -> None:
            pass

        def __await__(self) -> Generator[Any, Any, str]:
            raise NotImplementedError

    task = TaskManager().create_task(Foreign())
    assert task.status is TaskStatus.RUNNING
    assert task.name == "Foreign"
    assert await task == "done"


# -- its name --------------------------------------------------------------------------------------


async def test_renamed_task_is_found_under_its_new_name() -> None:
    """set_name() renames the task in its manager too."""
    manager = TaskManager()
    task = manager.create_task(rest(), name="old", group="g")
    task.set_name("new")
    assert manager.get_task("new") is task
    assert manager.get_task_info("old") is None
    assert list(manager.get_group_tasks("g")) == ["new"]
    await manager.shutdown(0)


async def test_rename_to_a_taken_name_gets_a_number() -> None:
    """Names stay unique, and renaming to the own name changes nothing."""
    manager = TaskManager()
    first, second = manager.create_task(rest(), name="a"), manager.create_task(rest(), name="b")
    second.set_name("a")
    first.set_name("a")
    assert first.name == "a"
    assert second.name == "a-2"
    assert manager.get_task("a-2") is second
    await manager.shutdown(0)


async def test_ended_task_can_be_renamed() -> None:
    """Renaming a task that has ended touches no table, at whatever moment."""
    manager = TaskManager()
    task = manager.create_task(give(1), name="old")
    await asyncio.sleep(0)
    assert task.done()
    task.set_name("new")
    await settle()
    task.set_name("newer")
    assert task.name == "newer"
    assert manager.stats().live == 0
    assert not manager._root.tasks


# -- what only this package uses -------------------------------------------------------------------


async def test_shielded_task_is_not_stopped_by_a_disconnect_until_released() -> None:
    """A disconnect is held back while a shield is up and delivered with the last one's end."""
    task = TaskManager().create_task(rest())
    shield(task)
    shield(task)
    assert request_cancel(task, DISCONNECT) is False
    assert request_cancel(task, CancelCause(CancelKind.CLIENT_DISCONNECT, "again")) is False
    unshield(task)
    assert task.cause is None
    unshield(task)
    assert task.cause is DISCONNECT
    await asyncio.wait([task])


async def test_shield_holds_back_nothing_but_a_disconnect() -> None:
    """A shutdown is not held back by a shield."""
    task = TaskManager().create_task(rest())
    shield(task)
    assert request_cancel(task, CancelCause(CancelKind.SHUTDOWN)) is True
    unshield(task)
    await asyncio.wait([task])
    assert kind_of(task) is CancelKind.SHUTDOWN


async def test_each_is_cancelled_once() -> None:
    """A group cancels each task once, and an ended one never."""
    task = TaskManager().create_task(rest())
    assert request_cancel(task, DISCONNECT) is True
    assert request_cancel(task, CancelCause(CancelKind.SHUTDOWN)) is False
    assert task.cancelling() == 1
    await asyncio.wait([task])
    assert request_cancel(task, DISCONNECT) is False


async def test_wait_until_done_gives_up_after_its_timeout() -> None:
    """Waiting on someone's behalf is bounded, and leaves the tasks alone."""
    start = now()
    task = TaskManager().create_task(rest())
    await wait_until_done([task], 5)
    assert now() - start == 5
    assert task.cancelling() == 0
    task.cancel()
    await wait_until_done([task])
    await wait_until_done([task])


async def test_wait_until_done_passes_the_waiters_cancellation_on() -> None:
    """A cancelled waiter leaves the task alone, and no callback behind."""
    task = TaskManager().create_task(asyncio.sleep(5, "done"))
    waiter = asyncio.create_task(wait_until_done([task], 100))
    await settle()
    waiter.cancel()
    await asyncio.wait([waiter])
    assert waiter.cancelled()
    assert await task == "done"


async def test_wait_until_done_wakes_once_when_time_and_tasks_meet() -> None:
    """A task that ends at the very moment of the timeout is no error."""
    task = TaskManager().create_task(asyncio.sleep(5, "done"))
    await settle()
    await wait_until_done([task], 5)
    assert await task == "done"


async def test_removed_done_callback_is_no_waiter(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that was taken back does not keep a failure from being reported."""
    task = TaskManager().create_task(fail(ValueError("no")), name="lonely")
    task.add_done_callback(print)
    assert task.remove_done_callback(print) == 1
    await settle()
    assert caplog.messages == ["task 'lonely' failed and nobody awaits it"]


@pytest.mark.parametrize("turns", range(6))
async def test_wait_until_done_returns_after_the_end_is_recorded(turns: int) -> None:
    """However many turns lie between the ends of two tasks, both have been booked when the wait is over."""
    manager = TaskManager()
    gates = [asyncio.Event(), asyncio.Event()]
    tasks = [manager.create_task(gate.wait()) for gate in gates]
    live = []

    async def wait() -> None:
        await wait_until_done(tasks)
        live.append(manager.stats().live)

    waiter = asyncio.create_task(wait())
    await settle()
    gates[1].set()
    for _ in range(turns):
        await asyncio.sleep(0)
    gates[0].set()
    await waiter
    assert live == [0]


async def test_wait_until_done_of_none_does_not_wait() -> None:
    """Without tasks it returns at once."""
    with pytest.raises(StopIteration):
        wait_until_done([]).send(None)


# -- the deadline -----------------------------------------------------------------------------------


async def test_a_task_knows_its_deadline_before_it_starts_and_while_it_runs() -> None:
    """It is the loop's time at its creation plus its timeout, also for a task that waits for its place."""
    manager = TaskManager(max_concurrency=1)
    began = now()
    running = manager.create_task(asyncio.sleep(2), timeout=30)
    queued = manager.create_task(asyncio.sleep(1), timeout=10)
    plain = manager.create_task(asyncio.sleep(1))
    endless = manager.create_task(asyncio.sleep(1), timeout=float("inf"))
    assert [task.deadline for task in (running, queued, plain, endless)] == [
        began + 30,
        began + 10,
        None,
        None,
    ]
    await asyncio.sleep(2.5)
    assert [task.deadline for task in (running, queued)] == [began + 30, began + 10]
    await manager.join()
    assert queued.deadline == began + 10


async def test_the_deadline_is_on_the_clock_of_the_loop() -> None:
    """A task that has not started converts it, where the manager's clock is another one."""
    manager = TaskManager()
    task = manager.create_task(give(1), timeout=10)
    home = manager._ledger.home
    home.other_clock = lambda: now() + 5000
    assert task.deadline == now() + 10 - 5000
    home.other_clock = None
    await task
