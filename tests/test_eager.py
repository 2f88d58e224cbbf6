"""Eager start: the first step runs where the task is created (Python 3.12 and later)."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry import trace

from otel_tasks import (
    CancelKind,
    ManagedTask,
    TaskManager,
    TaskPriority,
    TaskStatus,
    create_task,
    current_cancel_event,
    current_group,
    current_task,
)
from otel_tasks.testing import run
from tests.helpers import cancel_at_each_await, counters, fail, give, kind_of, now, settle

if TYPE_CHECKING:
    from otel_tasks import TaskGroup
    from otel_tasks._core.info import TaskInfo
    from otel_tasks.testing import SpanRecorder

needs_eager = pytest.mark.skipif(sys.version_info < (3, 12), reason="eager start came with Python 3.12")
here = contextvars.ContextVar("here", default="outside")


@pytest.fixture
def manager() -> TaskManager:
    """One whose tasks all start eagerly."""
    return TaskManager("test", eager_start=True)


async def note(steps: list[str]) -> str:
    """Note two steps, with a second between them."""
    steps.append("first")
    await asyncio.sleep(1)
    steps.append("second")
    return "done"


# -- when it is requested ------------------------------------------------------------------------


@needs_eager
@pytest.mark.parametrize(
    ("by_manager", "by_call", "eager"),
    [
        (True, None, True),
        (True, True, True),
        (True, False, False),
        (False, None, False),
        (False, True, True),
        (False, False, False),
    ],
)
async def test_the_call_decides_before_the_manager(
    by_manager: bool, by_call: bool | None, eager: bool
) -> None:
    """`eager_start` of the call counts; without one the manager's."""
    manager = TaskManager(eager_start=by_manager)
    async with manager.group("block") as group:
        for place in (manager, group, manager.get_group("mail")):
            steps: list[str] = []
            task = place.create_task(note(steps), eager_start=by_call)
            assert steps == (["first"] if eager else [])
            assert await task == "done"


@needs_eager
async def test_every_way_to_start_takes_it() -> None:
    """`start_task`, `put_task` and the function `create_task`, too."""
    manager = TaskManager()
    steps: list[str] = []
    await manager.start_task("a", note(steps), eager_start=True)
    await manager.put_task(note(steps), eager_start=True)
    task = create_task(note(steps), eager_start=True)
    assert steps == ["first"] * 3
    await asyncio.gather(manager.join(), task)


async def test_it_is_ignored_where_python_has_none(manager: TaskManager, monkeypatch: Any) -> None:
    """Before 3.12 the option is taken, and the task runs from the next turn on."""
    if sys.version_info >= (3, 12):
        monkeypatch.setattr("otel_tasks._core.creation.EAGER", False)
        monkeypatch.setattr("otel_tasks._core.creation.EAGERLY", None)
    steps: list[str] = []
    tasks = [manager.create_task(note(steps)), manager.create_task(note(steps), eager_start=True)]
    assert steps == []
    assert await asyncio.gather(*tasks) == ["done", "done"]


# -- the first step -----------------------------------------------------------------------------


@needs_eager
async def test_it_is_registered_before_its_first_step(manager: TaskManager) -> None:
    """Inside it the task is the current one, is found by name and group, and counts."""
    seen: list[Any] = []

    async def look() -> None:
        task = current_task()
        assert task is not None
        seen.extend([task, manager.get_task("look"), *group.tasks, task.status, task.priority])
        seen.extend([current_group(), current_cancel_event(), counters(manager), task.metadata])
        seen.append(manager.get_task_info("look") == task.info())

    group = manager.get_group("mail")
    task = manager.create_task(
        look(), name="look", group="mail", priority=TaskPriority.HIGH, metadata={"a": 1}
    )
    assert seen[:5] == [task, task, task, TaskStatus.RUNNING, TaskPriority.HIGH]
    assert seen[5:] == [group, group.cancel_event, {"created": 1, "live": 1}, {"a": 1}, True]
    assert isinstance(task, ManagedTask)
    assert asyncio.current_task() is not task


@needs_eager
async def test_it_may_complete_at_once(manager: TaskManager) -> None:
    """A task that waits for nothing has ended and is recorded when it is returned."""
    begin = now()
    task = manager.create_task(give("at once"), name="quick", metadata={"a": 1})

    assert (task.done(), task.status, task.result()) == (True, TaskStatus.COMPLETED, "at once")
    assert counters(manager) == {"created": 1, "completed": 1, "remembered": 1}
    info = manager.get_task_info("quick")
    assert info is not None
    assert (info.status, info.started_at, info.ended_at, info.metadata) == (
        TaskStatus.COMPLETED,
        begin,
        begin,
        {"a": 1},
    )
    assert manager.get_group("root").tasks == ()
    assert await task == "at once"


@needs_eager
async def test_failure_in_the_first_step_has_one_time(manager: TaskManager) -> None:
    """It is recorded a turn later, and no snapshot before that has another time for the end."""

    async def fail() -> None:
        raise ValueError("at once")

    task = manager.create_task(fail(), eager_start=True)
    assert task.done()
    assert (task.info().ended_at, counters(manager)) == (None, {"created": 1, "live": 1})
    with pytest.raises(ValueError, match="at once"):
        await task
    await settle()
    info = manager.get_task_info("fail")
    assert info is not None
    assert info.ended_at == task.info().ended_at is not None
    assert counters(manager) == {"created": 1, "failed": 1, "remembered": 1}


@needs_eager
async def test_it_continues_as_any_task(manager: TaskManager) -> None:
    """After its first await the loop runs it; awaiting and cancelling are the same."""
    steps: list[str] = []
    task = manager.create_task(note(steps))
    assert (task.done(), task.status) == (False, TaskStatus.RUNNING)
    assert await task == "done"
    cancelled = manager.create_task(note([]))
    cancelled.cancel("enough")
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert cancelled.cause is not None
    assert (cancelled.cause.kind, cancelled.cause.message) == (CancelKind.EXPLICIT, "enough")
    await settle()
    assert counters(manager) == {"created": 2, "completed": 1, "cancelled": 1, "remembered": 2}


@needs_eager
async def test_result_of_an_eager_task_is_kept(manager: TaskManager) -> None:
    """One that was started by name and is done already is found by its name."""
    await manager.start_task("quick", give("kept"))
    assert await manager.wait_for_task("quick") == "kept"


@needs_eager
async def test_names_of_eager_tasks(manager: TaskManager) -> None:
    """One that has ended gives its name up at once; a live one keeps it."""
    manager.create_task(give(1), name="sync")
    second = manager.create_task(note([]), name="sync", on_conflict="error")
    assert manager.create_task(give(1), name="sync", on_conflict="return") is second
    assert manager.create_task(note([]), name="sync").name == "sync-2"
    await manager.join()


@needs_eager
async def test_one_that_replaces_another_begins_after_it(manager: TaskManager) -> None:
    """Eagerness does not overtake the old one's clean-up."""
    steps: list[str] = []

    async def old() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(1)
            steps.append("old has ended")

    manager.create_task(old(), name="sync")
    task = manager.create_task(note(steps), name="sync", on_conflict="replace")
    assert steps == []
    await task
    assert steps == ["old has ended", "first", "second"]


@needs_eager
@pytest.mark.parametrize("timeout", [5.0, 0.0])
async def test_timeout_of_an_eager_task(manager: TaskManager, timeout: float) -> None:
    """It counts from the creation, and leaves a task that is done at once alone."""
    assert await manager.create_task(give(1), timeout=timeout) == 1
    begin = now()
    with pytest.raises(TimeoutError, match=f"timeout of {timeout:g} s"):
        await manager.create_task(asyncio.sleep(60), timeout=timeout)
    assert now() - begin == timeout


@needs_eager
async def test_eager_tasks_inside_of_eager_tasks(manager: TaskManager) -> None:
    """The current task and group are right again after each of them."""
    seen: list[str] = []

    async def child() -> None:
        seen.append(current_task().name)  # type: ignore[union-attr]  # it is one

    async def parent() -> None:
        create_task(child(), name="one")
        seen.append(current_task().name)  # type: ignore[union-attr]  # in a managed task
        await create_task(child(), name="two")
        seen.append(current_task().name)  # type: ignore[union-attr]  # in a managed task

    task = manager.create_task(parent(), name="parent", group="family")
    assert seen == ["one", "parent", "two", "parent"]
    assert task.done()
    assert manager.get_group_tasks("family").keys() == {"parent", "one", "two"}
    assert current_task() is None


# -- how it may end at once ---------------------------------------------------------------------


@needs_eager
async def test_it_may_raise_at_once() -> None:
    """A failure that no code awaits is reported once; the creator gets the failed task."""
    reported: list[tuple[str, str]] = []
    manager = TaskManager(
        eager_start=True, on_error=lambda info, error: reported.append((info.name, str(error)))
    )
    task = manager.create_task(fail(ValueError("bad")), name="quick")
    assert (task.done(), task.status) == (True, TaskStatus.FAILED)
    await settle()

    assert reported == [("quick", "bad")]
    assert counters(manager) == {"created": 1, "failed": 1, "remembered": 1}
    with pytest.raises(ValueError, match="bad"):
        task.result()


@needs_eager
async def test_a_failure_at_once_that_is_awaited_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    """An immediate await raises the error, so it is not reported."""
    manager = TaskManager(eager_start=True)
    with pytest.raises(ValueError, match="bad"):
        await manager.create_task(fail(ValueError("bad")))
    await settle()
    assert caplog.text == ""
    assert manager.stats().failed == 1


@needs_eager
async def test_a_failure_at_once_is_logged_where_nobody_handles_it(
    manager: TaskManager, caplog: pytest.LogCaptureFixture
) -> None:
    """As for any task, and not a second time when it is collected."""
    manager.create_task(fail(ValueError("bad")), name="quick")
    await settle()
    [record] = caplog.records
    assert "task 'quick' failed and nobody awaits it" in record.message


@needs_eager
async def test_a_failure_at_once_in_a_block_raises_the_group(manager: TaskManager) -> None:
    """The siblings are cancelled because of it, the block's body at its next await."""
    reached = []
    with pytest.raises(ExceptionGroup) as caught:
        async with manager.group("block") as group:
            sibling = group.create_task(note([]))
            task = group.create_task(fail(ValueError("bad")))
            reached.append(task.done())
            await asyncio.sleep(60)
            reached.append(False)
    assert [str(error) for error in caught.value.exceptions] == ["bad"]
    assert (reached, kind_of(sibling)) == ([True], CancelKind.SIBLING_FAILED)


@needs_eager
@pytest.mark.parametrize("error", [ValueError("bad"), asyncio.CancelledError()])
async def test_one_that_ended_at_once_can_be_found_and_cancelled(
    manager: TaskManager, error: BaseException
) -> None:
    """Until its end is recorded, it has no coroutine, over which CPython 3.12.1 crashes."""
    tasks = [manager.create_task(fail(error), group="g") for _ in range(3)]
    manager.get_group("g").cancel()
    assert tasks[0].cancel("why") is False
    assert tasks[0].stack() == ""
    assert "g" in str(manager.tree())
    assert [task.info().status.is_final for task in tasks] == [True] * 3
    await asyncio.wait(tasks)
    await manager.cancel_all_tasks()
    assert manager.stats().live == 0
    assert [task.cause and task.cause.kind for task in tasks] == [
        CancelKind.FOREIGN if task.cancelled() else None for task in tasks
    ]


@needs_eager
async def test_a_failure_at_once_at_the_end_of_a_block(manager: TaskManager) -> None:
    """A block without another await is left with it, too."""
    with pytest.raises(ExceptionGroup) as caught:
        async with manager.group("block") as group:
            group.create_task(fail(ValueError("bad")))
    assert [str(error) for error in caught.value.exceptions] == ["bad"]


@needs_eager
async def test_it_may_cancel_itself_in_its_first_step(manager: TaskManager) -> None:
    """It ends at its first await, as a task that cancels itself later does."""

    async def give_up() -> None:
        task = current_task()
        assert task is not None
        task.cancel("not today")
        await asyncio.sleep(60)

    task = manager.create_task(give_up())
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()
    assert task.cause is not None
    assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "not today")
    assert manager.stats().cancelled == 1


@needs_eager
async def test_it_may_raise_cancelled_error_at_once(manager: TaskManager) -> None:
    """No code requested it, so its cause is foreign."""

    async def leave() -> None:
        raise asyncio.CancelledError

    task = manager.create_task(leave())
    assert task.cancelled()
    await settle()
    assert (task.status, kind_of(task)) == (TaskStatus.CANCELLED, CancelKind.FOREIGN)


@needs_eager
async def test_it_may_cancel_its_own_group_at_once(manager: TaskManager) -> None:
    """It is one of the group's, and is cancelled with it."""

    async def stop_all(group: TaskGroup) -> None:
        group.cancel("all of us")
        await asyncio.sleep(60)

    async with manager.group("block") as group:
        task = group.create_task(stop_all(group))
        assert task.status is TaskStatus.CANCELLING
    assert task.cancelled()


@needs_eager
@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_system_exit_passes_through(manager: TaskManager, error: BaseException) -> None:
    """It reaches the creator of the task, and it is recorded."""

    async def main() -> None:
        with pytest.raises(type(error)) as caught:
            manager.create_task(fail(error))
        assert caught.value is error
        await settle()
        assert counters(manager) == {"created": 1, "failed": 1, "remembered": 1}
        assert manager.get_group("root").tasks == ()

    run(main())


# -- contexts, spans, listeners -----------------------------------------------------------------


@needs_eager
async def test_context_variables_of_an_eager_task(manager: TaskManager) -> None:
    """Its first step runs in a copy of the creator's context, or in the given context."""

    async def change(to: str) -> str:
        before = here.get()
        here.set(to)
        return before

    here.set("creator")
    assert await manager.create_task(change("task")) == "creator"
    assert here.get() == "creator"
    context = contextvars.Context()
    context.run(here.set, "given")
    assert await manager.create_task(change("kept"), context=context) == "given"
    assert context[here] == "kept"


@needs_eager
async def test_a_context_that_is_in_use_is_waited_for(manager: TaskManager) -> None:
    """Code runs in it already, so that no other can: the task starts in the next turn, as without."""
    steps: list[str] = []

    def create() -> ManagedTask[str]:
        return manager.create_task(note(steps), context=context)

    context = contextvars.copy_context()
    task = context.run(create)
    assert steps == []
    assert await task == "done"
    assert asyncio.current_task() is not task


@needs_eager
async def test_spans_of_eager_tasks(spans: SpanRecorder) -> None:
    """The span is there in the first step, is below the creator's, and has ended with the task."""
    manager = TaskManager(
        eager_start=True, tracer_provider=spans.provider, meter_provider=spans.meter_provider
    )
    tracer = spans.provider.get_tracer("application")

    async def look() -> int:
        with tracer.start_as_current_span("inside"):
            return trace.get_current_span().get_span_context().trace_id

    with tracer.start_as_current_span("outside") as outside:
        task = manager.create_task(look(), name="quick")
        assert spans.span("quick").parent == outside.get_span_context()
        assert trace.get_current_span() is outside
    assert spans.span("inside").parent == spans.span("quick").context
    assert (spans.span("quick").attributes or {})["otel_tasks.task.outcome"] == "success"
    assert await task == outside.get_span_context().trace_id

    with pytest.raises(ValueError, match="bad"):
        await manager.create_task(fail(ValueError("bad")), name="bad")
    await settle()
    assert spans.span("bad").status.description == "bad"
    assert [event.name for event in spans.span("bad").events] == ["exception"]
    points = spans.metrics()["otel_tasks.task.duration"]
    assert {point.attributes["otel_tasks.task.outcome"]: point.count for point in points} == {
        "success": 1,
        "error": 1,
    }


@needs_eager
async def test_a_block_with_a_span_is_parent_of_eager_tasks(spans: SpanRecorder) -> None:
    """As for tasks that start later."""
    manager = TaskManager(eager_start=True, tracer_provider=spans.provider)
    async with manager.group("block", span=True) as group:
        group.create_task(give(1), name="quick")
    assert [span.name for span in spans.children(spans.span("block"))] == ["quick"]


@needs_eager
async def test_listeners_see_eager_tasks_in_order(manager: TaskManager) -> None:
    """Created before its first step, and so before its children and before its end."""
    heard: list[tuple[str, str]] = []
    infos: list[TaskInfo] = []

    def listen(event: str, info: TaskInfo) -> None:
        heard.append((event, info.name))
        infos.append(info)

    manager.add_listener(listen)

    async def parent() -> None:
        manager.create_task(give(1), name="child")

    task = manager.create_task(parent(), name="parent", metadata={"a": 1}, timeout=5)
    assert heard == [("created", "parent"), ("created", "child"), ("ended", "child"), ("ended", "parent")]
    assert (infos[0].metadata, infos[0].status.is_final, infos[-1].status) == (
        {"a": 1},
        False,
        TaskStatus.COMPLETED,
    )
    failed = manager.create_task(fail(ValueError("bad")), name="bad")
    with pytest.raises(ValueError, match="bad"):
        await failed
    await settle()
    assert heard[4:] == [("created", "bad"), ("ended", "bad")]
    cancelled = manager.create_task(note([]), name="cancelled")
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert heard[6:] == [("created", "cancelled"), ("cancelling", "cancelled"), ("ended", "cancelled")]
    assert task.done()


# -- under a limit ------------------------------------------------------------------------------


@needs_eager
async def test_a_queued_task_is_not_eager() -> None:
    """It starts when it gets its place; if a place is free, it starts immediately."""
    manager = TaskManager(max_concurrency=1, eager_start=True)
    heard: list[tuple[str, str]] = []
    manager.add_listener(lambda event, info: heard.append((event, info.name)))
    first: list[str] = []
    second: list[str] = []
    third: list[str] = []
    task = manager.create_task(note(first), name="first")
    queued = manager.create_task(note(second), name="queued")
    cancelled = manager.create_task(note(third), name="cancelled")
    assert (first, second) == (["first"], [])
    assert (queued.status, queued.info().started_at) == (TaskStatus.PENDING, None)
    cancelled.cancel()
    await asyncio.gather(task, queued)
    await settle()

    assert (first, second, third) == (["first", "second"], ["first", "second"], [])
    assert queued.info().started_at == queued.info().created_at + 1
    assert [event for event, name in heard if name == "queued"] == ["created", "dequeued", "ended"]
    assert [event for event, name in heard if name == "cancelled"] == ["created", "cancelling", "ended"]


@needs_eager
async def test_one_that_ends_at_once_gives_its_place_back() -> None:
    """The next waiter gets it one turn later; a thousand tasks need one place."""
    manager = TaskManager(max_concurrency=1, max_queue=0, eager_start=True)
    for number in range(1000):
        assert manager.create_task(give(number)).result() == number
    assert (manager._ledger.places.limiter.used, manager.stats().completed) == (0, 1000)


@needs_eager
async def test_one_that_fails_at_once_gives_its_place_back() -> None:
    """When its end is booked, a turn later."""
    manager = TaskManager(max_concurrency=1, eager_start=True)
    failed = manager.create_task(fail(ValueError("bad")))
    steps: list[str] = []
    queued = manager.create_task(note(steps))
    with pytest.raises(ValueError, match="bad"):
        await failed
    assert await queued == "done"


@needs_eager
async def test_a_refused_eager_task_is_closed() -> None:
    """Nothing of it has run."""
    manager = TaskManager(eager_start=True)
    await manager.shutdown()
    coro = note([])
    with pytest.raises(RuntimeError, match="shut down"):
        manager.create_task(coro)
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


@needs_eager
def test_each_await_of_eager_tasks_may_be_cancelled(spans: SpanRecorder) -> None:
    """Nothing is left behind, wherever it happens."""

    async def scenario(manager: TaskManager) -> None:
        async with manager.group("block", max_concurrency=2) as group:
            for _ in range(3):
                group.create_task(note([]), eager_start=True)
            await manager.create_task(give(1), eager_start=True)
            await manager.create_task(note([]), eager_start=True, timeout=5)

    assert cancel_at_each_await(scenario, spans) == 2
