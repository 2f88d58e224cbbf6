"""Reports of tasks, their watchers, and the sums of groups."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_tasks import GroupProgress, ManagedTask, Progress, TaskManager, WrongLoopError, current_task
from otel_tasks._core.extras import Extras
from otel_tasks._core.progress import TaskProgress, add_up
from otel_tasks._core.task import extras_of
from otel_tasks.testing import SpanRecorder, run
from tests.helpers import cancel_at_each_await, fail, give, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)


def mine() -> TaskProgress:
    """The progress of the task that runs here."""
    task = current_task()
    assert task is not None
    return task.progress


async def count_to(total: int, every: float = 1.0) -> str:
    """Report 0 of ``total``, then one more each ``every`` seconds."""
    mine().update(done=0, total=total)
    for number in range(1, total + 1):
        await asyncio.sleep(every)
        mine().update(done=number, message=f"item {number}")
    return "counted"


async def seen(watch: AsyncIterator[Progress], pause: float = 0.0) -> list[float]:
    """The reports that a watcher sees whose loop body takes ``pause`` seconds."""
    found = []
    async for progress in watch:
        found.append(progress.done)
        await asyncio.sleep(pause)
    return found


async def end(task: ManagedTask[Any]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    await asyncio.wait([task])
    await settle()


def newest(task: ManagedTask[Any]) -> Progress:
    """The last report, which is there."""
    progress = task.progress.snapshot()
    assert progress is not None
    return progress


# --- reporting -----------------------------------------------------------------------------------------


async def test_a_task_reports_and_anyone_can_look(manager: TaskManager) -> None:
    """The snapshot has what was reported, the fraction, the rate and the seconds left."""
    task = manager.create_task(count_to(10))
    await asyncio.sleep(4.5)
    progress = newest(task)
    assert (progress.number, progress.done, progress.total, progress.message) == (5, 4, 10, "item 4")
    assert progress.fraction == 0.4
    assert progress.rate == pytest.approx(1.0)
    assert progress.seconds_left == pytest.approx(6.0)
    assert progress.updated_at == pytest.approx(task._created_at + 4.0)
    await task


async def test_report_keeps_values_that_it_leaves_out(manager: TaskManager) -> None:
    """Each of done, total, and message is kept until reported again; a bare report is a sign of life."""
    task = manager.create_task(rest())
    task.progress.update(total=10)
    task.progress.update(message="begun")
    task.progress.advance(3)
    await asyncio.sleep(1)
    task.progress.update()
    progress = newest(task)
    assert (progress.done, progress.total, progress.message, progress.number) == (3, 10, "begun", 4)
    assert progress.updated_at == pytest.approx(task._created_at + 1.0)
    await end(task)


async def test_nothing_but_done_is_known_without_a_total(manager: TaskManager) -> None:
    """With the total unknown there is a rate, and neither a fraction nor seconds left."""
    task = manager.create_task(rest())
    task.progress.advance()
    await asyncio.sleep(2)
    task.progress.advance(4)
    progress = newest(task)
    assert progress.rate == pytest.approx(2.0)
    assert progress.total is progress.fraction is progress.seconds_left is None
    await end(task)


async def test_the_first_report_has_no_rate(manager: TaskManager) -> None:
    """Work before the first report may have been done long ago, so it gives no rate."""
    task = manager.create_task(rest())
    await asyncio.sleep(5)
    task.progress.update(done=500, total=1000)
    task.progress.update(done=501)
    assert newest(task).rate is newest(task).seconds_left is None
    await end(task)


async def test_the_rate_follows_the_last_half_minute(manager: TaskManager) -> None:
    """A task that slows down shows its new rate after 30 s at the latest."""
    task = manager.create_task(rest())
    task.progress.update(total=10_000)
    for _ in range(100):
        await asyncio.sleep(1)
        task.progress.advance(10)
    assert newest(task).rate == pytest.approx(10.0)
    for _ in range(30):
        await asyncio.sleep(1)
        task.progress.advance(1)
    assert newest(task).rate == pytest.approx(1.0)
    await end(task)


async def test_rare_reports_have_a_rate(manager: TaskManager) -> None:
    """Between reports that are minutes apart the rate is measured from one to the next."""
    task = manager.create_task(rest())
    for done in (0, 120, 180):
        task.progress.update(done=done)
        await asyncio.sleep(60)
    assert newest(task).rate == pytest.approx(1.0)
    await end(task)


async def test_going_back_restarts_the_rate(manager: TaskManager) -> None:
    """Work that is done again is no error; its rate is not that of what came before, nor negative."""
    task = manager.create_task(rest())
    task.progress.update(done=0, total=100)
    await asyncio.sleep(10)
    task.progress.update(done=90)
    task.progress.update(done=10)
    assert newest(task).rate is None
    await asyncio.sleep(1)
    task.progress.update(done=12)
    assert newest(task).rate == pytest.approx(2.0)
    await end(task)


async def test_passing_the_total_is_no_error(manager: TaskManager) -> None:
    """A total is an estimate: beyond it the fraction stays 1 and no time is left."""
    task = manager.create_task(rest())
    task.progress.update(done=12, total=10)
    assert newest(task).fraction == 1.0
    assert newest(task).seconds_left == 0.0
    assert newest(task).done == 12
    await end(task)


async def test_nothing_to_do_is_done(manager: TaskManager) -> None:
    """With a total of 0, everything is done."""
    task = manager.create_task(rest())
    task.progress.update(total=0)
    assert newest(task).fraction == 1.0
    await end(task)


async def test_a_standstill_has_no_seconds_left(manager: TaskManager) -> None:
    """At a rate of 0, the end is unknown."""
    task = manager.create_task(rest())
    task.progress.update(done=1, total=10)
    await asyncio.sleep(1)
    task.progress.update(message="still waiting")
    assert newest(task).rate == 0.0
    assert newest(task).seconds_left is None
    await end(task)


@pytest.mark.parametrize("wrong", [-1, -0.5, math.nan, math.inf, -math.inf, 10**400])
def test_a_number_that_counts_nothing_is_refused(wrong: float) -> None:
    """Negative, infinite and NaN are errors that name the argument, and change nothing."""
    progress = TaskProgress(asyncio.new_event_loop())
    with pytest.raises(ValueError, match="done must be a finite number, at least 0"):
        progress.update(done=wrong)
    with pytest.raises(ValueError, match="total must be a finite number, at least 0"):
        progress.update(total=wrong)
    with pytest.raises(ValueError, match="n must be"):
        progress.advance(wrong)
    assert progress.snapshot() is None
    progress._loop.close()


@pytest.mark.parametrize("wrong", ["3", True, [1], 1j])
def test_value_that_is_no_number_is_refused(wrong: Any) -> None:
    """Anything but an int or a float is a TypeError; so is a message that is no string."""
    progress = TaskProgress(asyncio.new_event_loop())
    with pytest.raises(TypeError, match="done must be a number"):
        progress.update(done=wrong)
    with pytest.raises(TypeError, match="n must be a number"):
        progress.advance(wrong)
    with pytest.raises(TypeError, match="message must be a string, got 5"):
        progress.update(message=5)  # type: ignore[arg-type]  # that is what is tested
    progress._loop.close()


async def test_a_report_after_the_end_is_dropped(manager: TaskManager) -> None:
    """A report for a task that has ended is dropped without an error."""
    task = manager.create_task(count_to(2))
    await task
    await settle()
    before = newest(task)
    task.progress.update(done=0, message="late")
    task.progress.advance()
    assert newest(task) == before


async def test_a_snapshot_is_json_ready(manager: TaskManager) -> None:
    """to_dict() has the fraction and the seconds left, and the moment as a wall-clock stamp."""
    task = manager.create_task(count_to(4))
    await asyncio.sleep(1.5)
    data = json.loads(json.dumps(newest(task).to_dict()))
    stamp = data.pop("updated_at")
    assert stamp.endswith("+00:00")
    assert data == {
        "number": 2,
        "done": 1,
        "total": 4,
        "message": "item 1",
        "rate": 1.0,
        "fraction": 0.25,
        "seconds_left": 3.0,
    }
    await task


def test_it_shows_itself() -> None:
    """The repr says how far it is."""
    progress = TaskProgress(asyncio.new_event_loop())
    assert repr(progress) == "<TaskProgress without a report>"
    progress.update(done=3, message="parsing")
    assert repr(progress) == "<TaskProgress 3 of ?, 'parsing'>"
    progress.update(total=10)
    assert repr(progress) == "<TaskProgress 3 of 10, 'parsing'>"
    progress._loop.close()


numbers = st.one_of(st.integers(0, 10**9), st.floats(0, sys.float_info.max))
reports = st.fixed_dictionaries(
    {}, optional={"done": numbers, "total": numbers, "message": st.text(max_size=5)}
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1000), st.one_of(reports, numbers)), max_size=20))
def test_whatever_is_reported_the_snapshot_makes_sense(story: list[tuple[float, Any]]) -> None:
    """A fraction is from 0 to 1, times and rates are finite and not negative, and each report counts."""

    async def tell() -> None:
        progress = TaskProgress(asyncio.get_running_loop())
        for number, (pause, report) in enumerate(story, 1):
            await asyncio.sleep(pause)
            if isinstance(report, dict):
                progress.update(**report)
            else:
                progress.advance(report)
            snapshot = progress.snapshot()
            assert snapshot is not None
            assert snapshot.number == number
            assert snapshot.fraction is None or 0 <= snapshot.fraction <= 1
            assert snapshot.rate is None or snapshot.rate >= 0
            assert snapshot.seconds_left is None or snapshot.seconds_left >= 0
            json.dumps(snapshot.to_dict(), allow_nan=False)

    run(tell(), timeout=math.inf)


# --- costs and records ---------------------------------------------------------------------------------


async def test_a_task_that_never_uses_it_has_none() -> None:
    """Neither the task nor its record holds anything for it."""
    manager = TaskManager("bare")
    task = manager.create_task(give(1), name="plain")
    assert task.info().progress is None
    await task
    await settle()
    assert task._extras is None
    info = manager.get_task_info("plain")
    assert info is not None
    assert info.progress is None
    assert info.to_dict()["progress"] is None


async def test_looking_makes_no_progress(manager: TaskManager) -> None:
    """Reading a task's progress returns the same object each time, and no snapshot before a report."""
    task = manager.create_task(rest())
    assert task.progress is task.progress
    assert task.progress.snapshot() is None
    assert task.info().progress is None
    assert task.progress._waiters is None
    await end(task)


async def test_the_last_snapshot_stays_with_the_record(manager: TaskManager) -> None:
    """A snapshot of the task has its progress, and so has what is remembered of it."""
    task = manager.create_task(count_to(3), name="counting")
    await asyncio.sleep(1.5)
    assert task.info().progress == newest(task)
    await task
    await settle()
    info = manager.get_task_info("counting")
    assert info is not None
    assert info.progress is not None
    assert (info.progress.done, info.progress.total) == (3, 3)
    assert json.loads(json.dumps(info.to_dict()))["progress"]["fraction"] == 1.0


async def test_progress_keeps_no_task_in_being(manager: TaskManager) -> None:
    """The progress does not refer to its task: an ended one is freed at once, without the collector."""
    task = manager.create_task(count_to(1))
    watch = task.progress.watch()
    assert await seen(watch) == [0, 1]
    await task
    progress, gone = task.progress, weakref.ref(task)
    await settle()
    gc.disable()
    try:
        del task
        assert gone() is None
    finally:
        gc.enable()
    assert progress.snapshot() is not None


# --- watching ------------------------------------------------------------------------------------------


async def test_a_watcher_sees_the_current_one_then_each_new_one(manager: TaskManager) -> None:
    """A late watcher starts with the newest report, and gets the last one before it ends."""
    task = manager.create_task(count_to(4))
    await asyncio.sleep(2.5)
    assert await seen(task.progress.watch()) == [2, 3, 4]
    assert task.done()


async def test_a_slow_watcher_gets_the_newest_and_no_backlog(manager: TaskManager) -> None:
    """Reports that arrive while its loop body is busy are skipped, except for the last."""
    task = manager.create_task(count_to(100, every=0.01))
    found = await seen(task.progress.watch(), pause=0.305)
    assert found == [0, 30, 61, 91, 100]


async def test_reports_in_one_turn_are_one(manager: TaskManager) -> None:
    """A watcher that is woken once sees only what is newest when it runs."""
    task = manager.create_task(rest())
    watcher = asyncio.create_task(seen(task.progress.watch()))
    await settle()
    for _ in range(1000):
        task.progress.advance()
    await end(task)
    assert await watcher == [1000]


@pytest.mark.parametrize(
    "how", [give(1), fail(ValueError("broken")), rest()], ids=["return", "raise", "cancel"]
)
async def test_watching_ends_with_a_task_that_never_reports(manager: TaskManager, how: Any) -> None:
    """However the task ends, the watcher sees nothing, and the end is recorded after it."""
    task = manager.create_task(how)
    watcher = asyncio.create_task(seen(task.progress.watch()))
    await asyncio.wait([task], timeout=1)
    task.cancel()
    assert await watcher == []
    assert task.info().ended_at is not None
    assert task.info().status.is_final
    await asyncio.gather(task, return_exceptions=True)


async def test_watching_a_task_that_has_ended_ends_at_once(manager: TaskManager) -> None:
    """Its last report is given, if it made one; also in the turn between its end and its record."""
    silent = manager.create_task(give(1))
    counting = manager.create_task(count_to(2))

    async def look() -> list[float]:
        # Its first step comes right behind the task's, before any callback of that one's end.
        assert silent.done()
        assert silent._extras is None
        return await seen(silent.progress.watch())

    assert await asyncio.create_task(look()) == []
    await asyncio.wait([counting])
    assert await seen(counting.progress.watch()) == [2]
    assert await seen(silent.progress.watch()) == []


async def test_a_task_that_never_ran_ends_its_watchers(manager: TaskManager) -> None:
    """A task cancelled before its first step reports nothing, and its watchers end."""
    task = manager.create_task(count_to(5))
    watch = task.progress.watch()
    task.cancel()
    assert await seen(watch) == []


async def test_several_watch_at_once(manager: TaskManager) -> None:
    """Each watcher has its own pace; one that leaves does not affect the others."""
    task = manager.create_task(count_to(6))
    fast = asyncio.create_task(seen(task.progress.watch()))
    slow = asyncio.create_task(seen(task.progress.watch(), pause=2.5))
    leaving = asyncio.create_task(seen(task.progress.watch()))
    await asyncio.sleep(3.5)
    leaving.cancel()
    assert await fast == [0, 1, 2, 3, 4, 5, 6]
    assert await slow == [0, 2, 5, 6]
    assert leaving.cancelled()


async def test_a_watcher_can_continue_after_a_known_report(manager: TaskManager) -> None:
    """It waits for a snapshot with a higher number, or for the end; also if that number is never reached."""
    task = manager.create_task(count_to(3))
    await asyncio.sleep(1.5)
    known = newest(task).number
    ahead = asyncio.create_task(seen(task.progress.watch(after=known + 100)))
    assert await seen(task.progress.watch(after=known)) == [2, 3]
    assert await ahead == []


async def test_a_broken_off_loop_leaves_nothing_behind(manager: TaskManager) -> None:
    """After `break` no future waits and nothing holds the iterator; there is nothing to be closed."""
    task = manager.create_task(count_to(5))
    watch = task.progress.watch()
    async for progress in watch:
        if progress.done == 2:
            break
    assert not task.progress._waiters
    # As for one that was never watched: the size depends on the Python version.
    unused = task.progress.watch()
    assert sys.getrefcount(watch) == sys.getrefcount(unused)
    # It may be taken up again where it was left.
    assert (await anext(watch)).done == 3
    await end(task)


async def test_a_cancelled_watcher_leaves_nothing_behind(manager: TaskManager) -> None:
    """Its future is removed, and the progress can be watched again."""
    task = manager.create_task(rest())
    watch = task.progress.watch()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await anext(watch)
    assert not task.progress._waiters
    task.progress.advance()
    assert (await anext(watch)).done == 1
    await end(task)


async def test_a_watcher_that_is_cancelled_with_the_news_is_harmless(manager: TaskManager) -> None:
    """A report in the same turn as the cancellation wakes no future twice."""
    task = manager.create_task(rest())
    watcher = asyncio.create_task(seen(task.progress.watch()))
    await settle()
    watcher.cancel()
    task.progress.advance()
    await asyncio.wait([watcher])
    assert watcher.cancelled()
    await end(task)


async def test_closing_ends_a_watcher_that_waits_elsewhere(manager: TaskManager) -> None:
    """aclose() is not needed, but it works: at once, and for good."""
    task = manager.create_task(rest())
    watch = task.progress.watch()
    watcher = asyncio.create_task(seen(watch))
    await settle()
    await watch.aclose()
    assert await watcher == []
    task.progress.advance()
    assert await seen(watch) == []
    await watch.aclose()
    await end(task)


async def test_watching_needs_no_task_and_no_timer(manager: TaskManager) -> None:
    """A hundred watchers are a hundred futures, in one table that is gone with them."""
    task = manager.create_task(rest())
    watchers = [asyncio.create_task(seen(task.progress.watch())) for _ in range(100)]
    await settle()
    waiters = task.progress._waiters
    assert waiters is not None
    assert len(waiters) == 100
    assert len(asyncio.all_tasks()) == 102
    assert task._waiters == 0
    await end(task)
    assert await asyncio.gather(*watchers) == [[]] * 100
    assert task.progress._waiters is None


async def test_reports_without_a_pause_do_not_hold_up_the_loop(manager: TaskManager) -> None:
    """A watcher with a steady stream of reports lets other tasks run in between."""
    task = manager.create_task(rest())
    task.progress.update(done=0)

    async def watch() -> None:
        async for _ in task.progress.watch():
            task.progress.advance()

    watcher = asyncio.create_task(watch())
    await settle()
    watcher.cancel()
    await asyncio.wait([watcher])
    assert watcher.cancelled()
    await end(task)


def test_each_wait_of_a_watcher_can_be_cancelled(spans: SpanRecorder) -> None:
    """Cancelled at whatever await, a watcher leaves no future, no task and no span."""

    async def scenario(manager: TaskManager) -> None:
        task = manager.create_task(count_to(2))
        try:
            await seen(task.progress.watch())
        finally:
            assert not task.progress._waiters

    assert cancel_at_each_await(scenario, spans) >= 4


@settings(max_examples=50, deadline=None)
@given(
    reports=st.lists(st.floats(0, 3), max_size=20),
    paces=st.lists(st.tuples(st.floats(0, 20), st.floats(0, 5)), min_size=1, max_size=4),
)
def test_every_watcher_goes_forward_and_sees_the_last(
    reports: list[float], paces: list[tuple[float, float]]
) -> None:
    """Whenever it begins and however slow it is: numbers only grow, and the last report is not missed."""

    async def work() -> None:
        for pause in reports:
            mine().advance()
            await asyncio.sleep(pause)

    async def watch(task: ManagedTask[None], begin: float, pause: float) -> list[int]:
        await asyncio.sleep(begin)
        numbers = []
        async for progress in task.progress.watch():
            numbers.append(progress.number)
            await asyncio.sleep(pause)
        return numbers

    async def story() -> list[list[int]]:
        task = TaskManager("property").create_task(work())
        return await asyncio.gather(*(watch(task, *pace) for pace in paces))

    for numbers in run(story()):
        assert numbers == sorted(set(numbers))
        assert numbers[-1:] == ([len(reports)] if reports else [])


# --- threads and loops -----------------------------------------------------------------------------------


@pytest.mark.real_clock
async def test_a_thread_reports_to_the_loops_watchers() -> None:
    """Reports from threads wake the watcher, none is lost in the sum, and the thread never waits."""
    manager = TaskManager("threads")

    async def work() -> None:
        progress = mine()
        progress.update(total=8000)
        barrier = threading.Barrier(8)

        def advance() -> None:
            barrier.wait()
            for _ in range(1000):
                progress.advance()

        threads = [threading.Thread(target=advance) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)

    task = manager.create_task(work())
    found = await seen(task.progress.watch())
    assert found == sorted(set(found))
    assert found[-1] == 8000
    assert newest(task).number == 8001
    await task


@pytest.mark.real_clock
async def test_a_function_in_a_thread_reports_as_a_coroutine_does() -> None:
    """A function of `run_in_thread` has a task, and reports to that task's progress."""
    manager = TaskManager("threads")
    gate = threading.Event()

    def work() -> int:
        for _ in range(3):
            assert gate.wait(60)
            gate.clear()
            mine().advance()
        return 3

    task = manager.run_in_thread(work)
    watcher = asyncio.create_task(seen(task.progress.watch()))
    for number in range(3):
        gate.set()
        async with asyncio.timeout(60):
            async for progress in task.progress.watch(after=number):
                assert progress.done == number + 1
                break
    assert await task == 3
    assert (await watcher)[-1] == 3


@pytest.mark.real_clock
async def test_a_single_report_from_a_thread_wakes_the_watcher() -> None:
    """A loop that has nothing else to do is woken by it."""
    manager = TaskManager("threads")
    task = manager.create_task(rest())
    watch = task.progress.watch()
    timer = threading.Timer(0.02, task.progress.update, kwargs={"message": "from the thread"})
    timer.start()
    async with asyncio.timeout(60):
        assert (await anext(watch)).message == "from the thread"
    timer.join()
    await end(task)


@pytest.mark.real_clock
async def test_threads_that_come_first_make_one_progress() -> None:
    """However many threads use a task's progress for the first time together, they get the same one."""
    manager = TaskManager("threads")
    barrier = threading.Barrier(8)
    found: list[TaskProgress] = []

    def look(task: ManagedTask[Any]) -> None:
        barrier.wait()
        found.append(task.progress)

    for _ in range(20):
        task = manager.create_task(rest())
        threads = [threading.Thread(target=look, args=[task]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert set(map(id, found)) == {id(task.progress)}
        found.clear()
        await end(task)


async def test_second_thread_at_the_lock_uses_the_first_ones_object(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads may both find nothing; the second one looks again inside the lock."""
    task = manager.create_task(rest())
    extras, progress = Extras(), TaskProgress(asyncio.get_running_loop())

    class AnotherThreadWasFaster:
        def __enter__(self) -> None:
            task._extras = extras
            extras.progress = progress

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("otel_tasks._core.task._making", AnotherThreadWasFaster())
    assert extras_of(task) is extras
    extras.progress = None
    assert task.progress is progress
    await end(task)


def test_a_report_to_a_closed_loop_is_no_error() -> None:
    """A thread that outlives the loop and its watchers may keep reporting."""
    loop = asyncio.new_event_loop()
    progress = TaskProgress(loop)
    waiter = progress._waiter_for_news(0)
    loop.close()
    progress.advance()
    assert waiter is not None
    assert not waiter.done()
    assert progress._waiters is None


async def test_watching_from_another_loop_says_so(manager: TaskManager) -> None:
    """A watcher belongs to the task's loop; elsewhere the error tells what to read instead."""
    task = manager.create_task(rest())

    def elsewhere() -> None:
        with pytest.raises(WrongLoopError, match=r"read task\.progress\.snapshot\(\)"):
            asyncio.run(seen(task.progress.watch()))

    await asyncio.to_thread(elsewhere)
    await end(task)


# --- groups ----------------------------------------------------------------------------------------------


async def test_a_groups_progress_is_that_of_its_live_tasks_and_of_those_below(manager: TaskManager) -> None:
    """Their reports are added up when the property is read, with those of labeled groups below."""
    ingest, fetch = manager.get_group("ingest"), manager.get_group("ingest.fetch")
    assert ingest.progress == GroupProgress(0, 0, 0, 0, 0, None)
    first = ingest.create_task(rest())
    second = fetch.create_task(rest())
    fetch.create_task(rest())
    first.progress.update(done=10, total=40)
    second.progress.update(done=5, total=20)
    assert ingest.progress == GroupProgress(tasks=3, reporting=2, unknown=0, ended=0, done=15, total=60)
    assert ingest.progress.fraction == 0.25
    assert fetch.progress.total == 20
    assert manager.get_group("root").progress.done == 15
    await manager.cancel_all_tasks()


async def test_an_unknown_total_makes_the_groups_fraction_unknown(manager: TaskManager) -> None:
    """The known parts are still added up."""
    group = manager.get_group("mixed")
    known, unknown = group.create_task(rest()), group.create_task(rest())
    unknown.progress.update(done=3)
    assert group.progress.total is group.progress.fraction is None
    known.progress.update(done=1, total=2)
    assert group.progress == GroupProgress(2, 2, 1, 0, 4, 2)
    assert group.progress.fraction is None
    assert group.progress.to_dict()["fraction"] is None
    await manager.cancel_all_tasks()


async def test_ended_tasks_of_a_block_count_in_its_fraction(manager: TaskManager) -> None:
    """The fraction of a scoped group reaches 1 as its tasks end, whatever they last reported."""
    async with manager.group("load", on_error="isolate") as group:
        done = group.create_task(count_to(10, every=0.1))
        group.create_task(rest())
        stopped = group.create_task(count_to(30))
        going = group.create_task(count_to(10))
        await done
        await settle()
        assert group.progress == GroupProgress(tasks=3, reporting=2, unknown=0, ended=1, done=12, total=50)
        stopped.cancel()
        await settle()
        # One of its thirty was done, and no more will be.
        assert group.progress == GroupProgress(tasks=2, reporting=1, unknown=0, ended=2, done=12, total=21)
        await going
        await settle()
        assert group.progress.fraction == 1.0
        group.cancel()
    assert group.progress == GroupProgress(tasks=0, reporting=0, unknown=0, ended=3, done=21, total=21)


async def test_a_closed_block_hands_its_sum_to_the_block_around_it(manager: TaskManager) -> None:
    """A scoped group counts what was done in the blocks that have ended below it."""
    async with manager.group("all") as outer:
        for _ in range(2):
            async with outer.group("part") as inner:
                inner.create_task(count_to(3))
            assert inner.progress.ended == 1
        assert outer.progress == GroupProgress(tasks=0, reporting=0, unknown=0, ended=2, done=6, total=6)


async def test_ended_tasks_of_a_labeled_group_do_not_count(manager: TaskManager) -> None:
    """The group has no end, so tasks that ended in it, or in a block below it, are history."""
    jobs = manager.get_group("jobs")
    jobs.create_task(rest())
    await jobs.create_task(count_to(3))
    async with jobs.group("block") as block:
        block.create_task(count_to(2))
    assert jobs.progress == GroupProgress(tasks=1, reporting=0, unknown=0, ended=0, done=0, total=None)
    await manager.cancel_all_tasks()


def test_adding_up_nothing_gives_nothing() -> None:
    """Without a task there is no total, and no fraction."""
    assert add_up([], []) == GroupProgress(0, 0, 0, 0, 0, None)
    assert add_up([], []).fraction is None


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager start came with Python 3.12")
async def test_a_task_that_ends_in_its_eager_first_step_has_its_progress(manager: TaskManager) -> None:
    """Its record has the reports of that step, and its watchers end."""

    async def quick() -> None:
        mine().update(done=1, total=1)

    task = manager.create_task(quick(), name="quick", eager_start=True)
    assert await seen(task.progress.watch()) == [1]
    await settle()
    info = manager.get_task_info("quick")
    assert info is not None
    assert info.progress is not None
    assert info.progress.fraction == 1.0
