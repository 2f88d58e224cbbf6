"""TaskTracker, cancel_and_wait and cleanup_lingering_tasks, for asyncio tasks of any origin."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from otel_tasks import (
    CancelEvent,
    CancelKind,
    CancelReport,
    TaskGroup,
    TaskManager,
    TaskTracker,
    WrongLoopError,
    cancel_and_wait,
    cleanup_lingering_tasks,
    wait_with_cancellation,
)
from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.request_group import RequestGroup
from tests.helpers import cancel_at_each_await, fail, give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from otel_tasks.testing import SpanRecorder

    Create = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]

T = TypeVar("T")


@contextlib.asynccontextmanager
async def creating(kind: str) -> AsyncIterator[Create]:
    """A function that creates plain tasks, or one that creates managed ones."""
    if kind == "plain":
        yield asyncio.create_task
        return
    async with TaskManager() as manager:
        yield manager.create_task


both_kinds = pytest.mark.parametrize("kind", ["plain", "managed"])


async def clean_up_for(seconds: float) -> None:
    """Rest until cancelled, and take that time to clean up."""
    try:
        await rest()
    finally:
        await asyncio.sleep(seconds)


async def break_down() -> None:
    """Rest until cancelled, and raise something else then."""
    try:
        await rest()
    finally:
        raise KeyError("lost")


# --- what a tracker holds ------------------------------------------------------------------------------


@both_kinds
async def test_tracker_holds_a_task_until_it_is_done(kind: str) -> None:
    """A task is counted, found and listed while it runs, and out of the tracker once it is done."""
    async with creating(kind) as create:
        tracker = TaskTracker()
        task = create(asyncio.sleep(1.0, "done"))
        assert tracker.add(task) is task
        assert tracker.get_count() == len(tracker) == 1
        assert task in tracker
        assert list(tracker) == [task]
        assert await task == "done"
        assert tracker.get_count() == len(tracker) == 0
        assert task not in tracker
        assert not list(tracker)


async def test_tracker_forgets_failed_and_cancelled_tasks_too() -> None:
    """Nothing is kept forever, however a task ends."""
    tracker = TaskTracker()
    failing, resting = (tracker.add(asyncio.create_task(work)) for work in (fail(KeyError()), rest()))
    await settle()
    assert list(tracker) == [resting]
    resting.cancel()
    await settle()
    assert len(tracker) == 0
    assert isinstance(failing.exception(), KeyError)


async def test_ended_task_is_not_held_in_memory() -> None:
    """The tracker keeps no reference to a task that has ended."""
    tracker = TaskTracker()
    task = tracker.add(asyncio.create_task(give(1)))
    await task
    link = weakref.ref(task)
    del task
    # The loop itself holds the task whose end it has just told of.
    await settle()
    gc.collect()
    assert link() is None


async def test_tracker_keeps_a_task_that_nobody_else_holds() -> None:
    """A task that waits for what only it knows is not lost to the garbage collector."""
    ended: list[int] = []
    tracker = TaskTracker()

    async def work() -> None:
        waiting = asyncio.get_running_loop().create_future()
        wake = weakref.ref(waiting)

        def wake_up() -> None:
            if (future := wake()) is not None:
                future.set_result(None)

        asyncio.get_running_loop().call_later(1.0, wake_up)
        await waiting
        ended.append(1)

    tracker.add(asyncio.create_task(work()))
    await settle()
    gc.collect()
    assert await tracker.wait()
    assert ended == [1]


async def test_dropped_tracker_leaves_its_tasks_alone() -> None:
    """A tracker that is dropped takes nothing down, and is not held by its tasks."""
    tracker = TaskTracker()
    link = weakref.ref(tracker)
    task = tracker.add(asyncio.create_task(asyncio.sleep(1.0, "done")))
    del tracker
    assert link() is None
    assert await task == "done"


async def test_done_task_is_not_taken_up() -> None:
    """A task that has ended is returned and not tracked; one that is added twice counts once."""
    tracker = TaskTracker()
    done = asyncio.create_task(give(1))
    await done
    assert tracker.add(done) is done
    assert len(tracker) == 0
    task = asyncio.create_task(asyncio.sleep(1.0))
    tracker.add(tracker.add(task))
    assert len(tracker) == 1
    await tracker.wait()


async def test_closed_tracker_takes_no_more() -> None:
    """After close(), a new task is refused and keeps running; tracked tasks stay."""
    tracker = TaskTracker()
    task = tracker.add(asyncio.create_task(asyncio.sleep(1.0, "done")))
    assert not tracker.closed
    tracker.close()
    assert tracker.closed
    late = asyncio.create_task(give("late"), name="late")
    with pytest.raises(RuntimeError, match="cannot track task 'late': the tracker is closed"):
        tracker.add(late)
    assert await late == "late"
    assert list(tracker) == [task]
    assert repr(tracker) == "<TaskTracker closed, 1 tasks>"
    assert await tracker.wait()


async def test_argument_that_is_no_task_is_refused() -> None:
    """A coroutine in the place of a task is closed and the right line shown; so is any other thing."""
    tracker = TaskTracker()
    wrong: Any = rest()
    with pytest.raises(TypeError, match=r"tracker.add\(\) takes tasks.*asyncio.create_task\(\.\.\.\)"):
        tracker.add(wrong)
    wrong = 7
    with pytest.raises(TypeError, match="got 7: pass tasks"):
        tracker.add(wrong)
    with pytest.raises(TypeError, match=r"cancel_and_wait\(\) takes tasks"):
        await cancel_and_wait(rest(), rest())  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(TypeError, match="exclude"):
        await cleanup_lingering_tasks(exclude=[rest()])  # type: ignore[list-item]  # that is what is tested
    task: Any = asyncio.create_task(give(1))
    with pytest.raises(TypeError, match="put it in a list"):
        await cleanup_lingering_tasks(exclude=task)
    await task


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5"])
async def test_wrong_timeout_cancels_nothing(timeout: Any) -> None:
    """A timeout that is none is an error before anything is done."""
    tracker = TaskTracker()
    task = tracker.add(asyncio.create_task(asyncio.sleep(1.0, "done")))
    for call in (
        tracker.cancel_all(timeout),
        tracker.wait(timeout),
        cancel_and_wait(task, timeout=timeout),
        cleanup_lingering_tasks(timeout),
    ):
        with pytest.raises((TypeError, ValueError), match="timeout must be"):
            await call
    assert await task == "done"


# --- cancelling all ------------------------------------------------------------------------------------


@both_kinds
async def test_cancel_all_counts_cancelled_and_other_tasks(kind: str) -> None:
    """A task that ends cancelled is a success; one that raises, returns, or keeps running is an error."""
    async with creating(kind) as create:
        tracker = TaskTracker()
        works = [rest(), clean_up_for(1.0), break_down(), ignore_cancels(1.0), ignore_cancels(60.0)]
        tasks = [tracker.add(create(work)) for work in works]
        await settle()
        counts = await tracker.cancel_all(2.0)
        success_count, error_count = counts
        assert (success_count, error_count) == (counts.success_count, counts.error_count) == (2, 3)
        report = tracker.last_report
        assert report is not None
        assert (report.cancelled, report.completed, report.failed) == (2, 1, 1)
        assert set(report.still_running) == {tasks[4].get_name()}
        assert list(tracker) == [tasks[4]]
        assert isinstance(tasks[2].exception(), KeyError)
        await asyncio.wait(tasks)


async def test_cancel_all_of_an_empty_tracker_is_nothing() -> None:
    """With nothing tracked, nothing is waited for."""
    tracker, begun = TaskTracker(), now()
    assert tracker.last_report is None
    assert await tracker.cancel_all() == (0, 0)
    assert tracker.last_report == CancelReport()
    assert now() == begun


@both_kinds
async def test_stubborn_tasks_share_one_deadline(kind: str) -> None:
    """Four tasks that will not stop and a deadline of 0.3 s take 0.3 s, not 1.2."""
    async with creating(kind) as create:
        tracker, begun = TaskTracker(), now()
        tasks = [tracker.add(create(ignore_cancels(60.0))) for _ in range(4)]
        await settle()
        assert await tracker.cancel_all(timeout=0.3) == (0, 4)
        assert now() == pytest.approx(begun + 0.3)

        begun = now()
        assert len((await cancel_and_wait(*tasks, timeout=0.3)).still_running) == 4
        assert now() == pytest.approx(begun + 0.3)

        begun = now()
        assert len((await cleanup_lingering_tasks(0.3)).still_running) == 4
        assert now() == pytest.approx(begun + 0.3)
        await asyncio.wait(tasks)


async def test_all_cleanup_at_the_same_time() -> None:
    """Tasks that clean up for a second each take one second together."""
    tracker, begun = TaskTracker(), now()
    for _ in range(10):
        tracker.add(asyncio.create_task(clean_up_for(1.0)))
    await settle()
    assert await tracker.cancel_all(timeout=None) == (10, 0)
    assert now() == begun + 1.0


async def test_task_cancelled_before_its_first_step_counts() -> None:
    """A task that never ran is cancelled like any other, and does not stay pending."""
    tracker = TaskTracker()
    task = tracker.add(asyncio.create_task(rest()))
    assert await tracker.cancel_all() == (1, 0)
    assert task.cancelled()
    assert len(tracker) == 0


@both_kinds
async def test_second_cancel_does_not_interrupt_a_cleanup(kind: str) -> None:
    """A task that is cleaning up is waited for and not cancelled again."""
    async with creating(kind) as create:
        tracker = TaskTracker()
        task = tracker.add(create(clean_up_for(5.0)))
        await settle()
        assert await tracker.cancel_all(1.0) == (0, 1)
        assert await tracker.cancel_all(1.0) == (0, 1)
        assert (await cancel_and_wait(task)).cancelled == 1
        assert task.cancelling() == 1


async def test_managed_task_notes_why(spans: SpanRecorder) -> None:
    """The reason is the cause of a managed task, and the message of any other."""
    told: list[object] = []

    async def listen() -> None:
        try:
            await rest()
        except asyncio.CancelledError as error:
            told.extend(error.args)
            raise

    async with TaskManager(tracer_provider=spans.provider) as manager:
        managed, plain = manager.create_task(rest()), asyncio.create_task(listen())
        await settle()
        report = await cancel_and_wait(managed, plain, reason="moving house")
        assert report == CancelReport(cancelled=2)
        assert managed.cause is not None
        assert (managed.cause.kind, managed.cause.message) == (CancelKind.EXPLICIT, "moving house")
        assert told == ["explicit: moving house"]

        tracker = TaskTracker()
        managed = tracker.add(manager.create_task(rest()))
        await tracker.cancel_all()
        assert managed.cause is not None
        assert managed.cause.message == "cancelled by its tracker"


async def test_failure_of_a_managed_task_is_reported_by_its_manager() -> None:
    """Cancelling does not count as waiting: a task that raises on its way out is reported at once."""
    reported: list[str] = []
    async with TaskManager(on_error=lambda info, error: reported.append(repr(error))) as manager:
        tracker = TaskTracker()
        tracker.add(manager.create_task(break_down()))
        await settle()
        assert await tracker.cancel_all() == (0, 1)
    assert reported == ["KeyError('lost')"]


async def test_calling_task_is_not_cancelled_by_its_own_tracker() -> None:
    """A tracked task may cancel all others; a task that awaits it is spared with it."""
    tracker = TaskTracker()

    async def chief() -> tuple[int, int]:
        await settle()
        return await tracker.cancel_all()

    async def client() -> tuple[int, int]:
        return await tracker.add(asyncio.create_task(chief()))

    tracker.add(asyncio.create_task(rest()))
    assert await tracker.add(asyncio.create_task(client())) == (1, 0)


async def test_report_shows_where_a_task_stands() -> None:
    """A task that does not stop is named with its stack; of two with one name, the second has a number."""
    tasks = [asyncio.create_task(ignore_cancels(9.0), name="stone") for _ in range(3)]
    await settle()
    report = await cancel_and_wait(*tasks, timeout=1.0)
    assert list(report.still_running) == ["stone", "stone#2", "stone#3"]
    assert "ignore_cancels" in report.still_running["stone#2"]
    assert not report.clean
    assert str(report) == ("0 cancelled, 0 completed, 0 failed, still running: 'stone', 'stone#2', 'stone#3'")
    assert str(CancelReport(cancelled=2)) == "2 cancelled, 0 completed, 0 failed, still running: none"
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.cancelled = 1  # type: ignore[misc]  # that is what is tested
    await asyncio.wait(tasks)


async def test_report_holds_no_task() -> None:
    """A report that is kept keeps neither tasks nor frames in memory."""
    task = asyncio.create_task(ignore_cancels(2.0))
    link = weakref.ref(task)
    await settle()
    report = await cancel_and_wait(task, timeout=1.0)
    await task
    del task
    await settle()
    gc.collect()
    assert link() is None
    assert not report.clean


async def test_reports_instead_of_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A caller that gets a report does not get a log line as well."""
    task = asyncio.create_task(ignore_cancels(2.0))
    await settle()
    with caplog.at_level(logging.DEBUG, "otel_tasks"):
        await cancel_and_wait(task, timeout=1.0)
        await cleanup_lingering_tasks(0.5)
    assert caplog.text == ""
    await task


# --- waiting -------------------------------------------------------------------------------------------


async def test_wait_includes_tasks_added_meanwhile() -> None:
    """A wait is over when nothing is left, tasks that tracked tasks have added included."""
    tracker, begun = TaskTracker(), now()

    async def parent() -> None:
        await asyncio.sleep(1.0)
        tracker.add(asyncio.create_task(asyncio.sleep(2.0)))

    tracker.add(asyncio.create_task(parent()))
    assert await tracker.wait(timeout=60)
    assert now() == begun + 3.0


async def test_wait_that_runs_out_leaves_the_tasks_alone() -> None:
    """A wait's timeout says that something still runs, and cancels nothing; 0 is a look."""
    tracker, begun = TaskTracker(), now()
    task = tracker.add(asyncio.create_task(asyncio.sleep(5.0, "done")))
    assert not await tracker.wait(timeout=0)
    assert now() == begun
    assert not await tracker.wait(timeout=1.5)
    assert now() == begun + 1.5
    assert not task.cancelling()
    assert await tracker.wait(timeout=10)
    assert now() == begun + 5.0
    assert await tracker.wait(timeout=0)


async def test_wait_that_ends_with_its_timeout_is_true() -> None:
    """Tasks that end in the very moment of the timeout have ended."""
    tracker = TaskTracker()
    tracker.add(asyncio.create_task(asyncio.sleep(1.0)))
    await settle()
    assert await tracker.wait(timeout=1.0)


async def test_tracked_task_may_wait_for_the_others() -> None:
    """A tracked task that waits for its tracker waits for all but itself."""
    tracker = TaskTracker()

    async def last() -> bool:
        return await tracker.wait()

    tracker.add(asyncio.create_task(asyncio.sleep(1.0)))
    assert await tracker.add(asyncio.create_task(last()))


async def test_wait_raises_nothing_of_the_tasks() -> None:
    """A failed task ends the wait as any other does."""
    tracker = TaskTracker()
    task = tracker.add(asyncio.create_task(fail(KeyError("lost"))))
    assert await tracker.wait()
    assert isinstance(task.exception(), KeyError)


# --- as a block ----------------------------------------------------------------------------------------


async def test_block_leaves_nothing_behind() -> None:
    """At the end of the block what still runs is cancelled, and its clean-up over."""
    begun = now()
    async with TaskTracker() as tracker:
        task = tracker.add(asyncio.create_task(clean_up_for(1.0)))
        await settle()
    assert task.cancelled()
    assert now() == begun + 1.0
    assert tracker.closed
    assert tracker.last_report == CancelReport(cancelled=1)


async def test_block_that_waits_lets_its_tasks_finish() -> None:
    """With wait() as its last line a block ends when its tasks do."""
    async with TaskTracker() as tracker:
        task = tracker.add(asyncio.create_task(asyncio.sleep(1.0, "done")))
        await tracker.wait()
    assert task.result() == "done"


async def test_block_that_raises_cancels_its_tasks_and_raises() -> None:
    """An error leaves the block as it is, after the tasks have ended."""
    with pytest.raises(KeyError, match="lost"):
        async with TaskTracker() as tracker:
            task = tracker.add(asyncio.create_task(rest()))
            raise KeyError("lost")
    assert task.cancelled()


async def test_block_logs_tasks_that_do_not_stop(caplog: pytest.LogCaptureFixture) -> None:
    """The end of a block returns no report: what still runs is logged by name."""
    async with TaskTracker() as tracker:
        task = tracker.add(asyncio.create_task(ignore_cancels(60.0), name="stone"))
        await settle()
    assert "still running: 'stone'" in caplog.text
    await task


async def test_tracker_is_opened_again_by_its_block() -> None:
    """A closed tracker takes tasks again in the next block."""
    tracker = TaskTracker()
    tracker.close()
    async with tracker:
        tracker.add(asyncio.create_task(rest()))
    assert tracker.closed
    assert len(tracker) == 0


# --- the whole loop ------------------------------------------------------------------------------------


async def test_cleanup_ends_everything_but_the_caller() -> None:
    """Every task of the loop is cancelled, managed or not, in groups and outside."""
    async with TaskManager() as manager:
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(rest()) for _ in range(3)]
        tasks += [manager.create_task(rest(), group="a.b") for _ in range(3)]
        await settle()
        assert await cleanup_lingering_tasks() == CancelReport(cancelled=6)
        assert all(task.cancelled() for task in tasks)
    assert await cleanup_lingering_tasks() == CancelReport()


async def test_cleanup_spares_excluded_tasks() -> None:
    """Excluded tasks run on and are in no report."""
    kept, other = asyncio.create_task(asyncio.sleep(1.0, "done")), asyncio.create_task(rest())
    assert await cleanup_lingering_tasks(exclude=[kept]) == CancelReport(cancelled=1)
    assert other.cancelled()
    assert await kept == "done"


async def test_cleanup_reports_tasks_started_meanwhile() -> None:
    """A task that a clean-up starts is not hunted down in rounds, but shown as still running."""

    async def hydra() -> None:
        try:
            await rest()
        finally:
            heads.append(asyncio.create_task(rest(), name="head"))

    heads: list[asyncio.Task[None]] = []
    asyncio.create_task(hydra())  # noqa: RUF006 - it is the cleaning that has to find it
    await settle()
    report = await cleanup_lingering_tasks()
    assert report.cancelled == 1
    assert list(report.still_running) == ["head"]
    assert (await cleanup_lingering_tasks()).clean


async def test_tasks_of_another_loop_are_refused_and_of_a_closed_one_dropped() -> None:
    """A task that lives in another loop cannot be waited for here; one whose loop is closed never ends."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(rest(), name="stranger")
    tracker = TaskTracker()
    tracker.add(task)
    for call in (tracker.cancel_all, tracker.wait, lambda: cancel_and_wait(task)):
        with pytest.raises(WrongLoopError, match="task 'stranger' runs in another event loop"):
            await call()
    # The task must never take its first step.
    vars(loop)["_ready"].clear()
    coro: Any = task.get_coro()
    coro.close()
    loop.close()
    assert await cancel_and_wait(task) == CancelReport()
    assert len(tracker) == 1
    assert await tracker.cancel_all() == (0, 0)
    assert len(tracker) == 0
    # Else asyncio would complain of it, and rightly.
    vars(asyncio.Task)["_log_destroy_pending"].__set__(task, False)


# --- never the caller, nor who waits for it ------------------------------------------------------------


async def by_await(task: asyncio.Task[T]) -> T:
    return await task


async def by_gather(task: asyncio.Task[T]) -> T:
    return (await asyncio.gather(task, asyncio.sleep(0)))[0]


async def by_shield(task: asyncio.Task[T]) -> T:
    return await asyncio.shield(task)


async def by_wait(task: asyncio.Task[T]) -> T:
    await asyncio.wait([task])
    return task.result()


async def by_wait_for(task: asyncio.Task[T]) -> T:
    return await asyncio.wait_for(task, 60)


async def by_as_completed(task: asyncio.Task[T]) -> T:
    for next_one in asyncio.as_completed([task]):
        return await next_one
    raise AssertionError("unreachable")


async def by_timeout(task: asyncio.Task[T]) -> T:
    async with asyncio.timeout(60):
        return await task


async def by_shielded_gather(task: asyncio.Task[T]) -> T:
    return (await asyncio.shield(asyncio.gather(task)))[0]


async def by_wait_with_cancellation(task: asyncio.Task[T]) -> T:
    assert await wait_with_cancellation(task, CancelEvent(), timeout=60)
    return task.result()


async def by_chain(task: asyncio.Task[T]) -> T:
    return await asyncio.create_task(by_gather(asyncio.create_task(by_wait(task))))


WAYS = [
    by_await,
    by_gather,
    by_shield,
    by_wait,
    by_wait_for,
    by_as_completed,
    by_timeout,
    by_shielded_gather,
    by_wait_with_cancellation,
    by_chain,
]


@both_kinds
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
async def test_task_that_waits_for_the_caller_is_spared(
    kind: str, way: Callable[[asyncio.Task[CancelReport]], Awaitable[CancelReport]]
) -> None:
    """However a task waits for the caller: it is not cancelled, and gets the caller's result."""
    async with creating(kind) as create:

        async def clean() -> CancelReport:
            await settle()
            return await cleanup_lingering_tasks()

        async def client() -> CancelReport:
            return await way(create(clean()))

        other = asyncio.create_task(rest())
        assert await create(client()) == CancelReport(cancelled=1)
        assert other.cancelled()


@both_kinds
async def test_hosts_of_an_asyncio_task_group_are_left_alone(kind: str) -> None:
    """The task whose asyncio.TaskGroup the caller is in is spared, in its body too; siblings are not."""

    async def clean() -> CancelReport:
        await settle()
        return await cleanup_lingering_tasks()

    async def host() -> CancelReport:
        async with asyncio.TaskGroup() as group:
            cleaning = group.create_task(clean())
            sibling = group.create_task(rest())
            await asyncio.sleep(1.0)
        assert sibling.cancelled()
        return cleaning.result()

    async with creating(kind) as create:
        assert await create(host()) == CancelReport(cancelled=1)


async def test_hosts_of_managed_groups_are_left_alone() -> None:
    """The tasks that have a block open around the caller's group are spared, over all levels."""

    async def clean() -> CancelReport:
        await settle()
        return await cleanup_lingering_tasks()

    async def inner(outside: TaskGroup) -> CancelReport:
        async with outside.group("inner") as group:
            cleaning = group.create_task(clean())
        return cleaning.result()

    async def outer(manager: TaskManager) -> CancelReport:
        async with manager.group("outer") as group:
            task = group.create_task(inner(group))
            await asyncio.sleep(1.0)
        return task.result()

    async with TaskManager() as manager:
        other = manager.create_task(rest())
        assert await asyncio.create_task(outer(manager)) == CancelReport(cancelled=1)
        assert other.cancelled()


async def test_handler_of_the_request_is_left_alone() -> None:
    """A task of a request's group that cleans up does not cancel the request's handler."""
    async with TaskManager() as manager:
        handler = asyncio.create_task(asyncio.sleep(1.0, "answered"))
        group = RequestGroup.open(manager, "GET /", binding=None, host=handler)
        cleaning = group.create_task(cleanup_lingering_tasks())
        group._seal()
        # This test itself waits for the caller, too.
        assert await cleaning == CancelReport()
        assert await handler == "answered"


async def test_task_that_follows_the_caller_is_spared() -> None:
    """A task that replaces the caller waits for its end, and begins then."""

    async def clean() -> CancelReport:
        try:
            await rest()
        except asyncio.CancelledError:
            # The other one waits already.
            await settle()
            return await cleanup_lingering_tasks()
        raise AssertionError("unreachable")

    async with TaskManager() as manager:
        first = manager.create_task(clean(), name="work")
        await settle()
        second = manager.create_task(give("second"), name="work", on_conflict="replace")
        assert await first == CancelReport()
        assert await second == "second"


async def test_task_in_a_users_callback_is_no_awaiter() -> None:
    """A task that a done-callback is about does not wait for the caller, and is cancelled."""
    others = [asyncio.create_task(rest()) for _ in range(3)]
    caller = asyncio.current_task()
    assert caller is not None
    target = others[1]
    later: list[int] = []

    def about(_: object) -> None:
        assert others[0].cancelled()

    def recursive(_: object) -> None:
        recursive(_)

    def unfinished(_: object) -> None:
        assert never_set

    if later:
        never_set = 1

    callbacks: list[Any] = [about, recursive, unfinished, lambda _: target.done(), others[2].cancel]
    for callback in callbacks:
        caller.add_done_callback(callback)
    try:
        assert await cleanup_lingering_tasks() == CancelReport(cancelled=3)
    finally:
        for callback in callbacks:
            caller.remove_done_callback(callback)


def test_outside_of_a_task_none_is_spared() -> None:
    """A caller that is no task has no waiters to spare."""
    assert with_awaiters(None) == set()


# --- cancelled themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel_all", "wait", "block", "cancel_and_wait", "cleanup"])
def test_nothing_is_leaked_wherever_they_are_cancelled(how: str, spans: SpanRecorder) -> None:
    """Cancelled at any await, each of them propagates the cancellation, and the cancelled tasks end."""

    async def scenario(manager: TaskManager) -> None:
        tracker = TaskTracker()
        tasks = [tracker.add(asyncio.create_task(clean_up_for(1.0))) for _ in range(2)]
        tasks += [tracker.add(manager.create_task(clean_up_for(1.0))) for _ in range(2)]
        try:
            await asyncio.sleep(0)
            if how == "cancel_all":
                await tracker.cancel_all()
            elif how == "wait":
                assert not await tracker.wait(timeout=1.0)
            elif how == "block":
                async with tracker:
                    pass
            elif how == "cancel_and_wait":
                await cancel_and_wait(*tasks)
            else:
                await cleanup_lingering_tasks()
        finally:
            for task in tasks:
                if not task.cancelling():
                    task.cancel()

    assert cancel_at_each_await(scenario, spans) >= 2
