"""Periodic work: fixed rate, overlap, failures, triggers, and its end."""

from __future__ import annotations

import asyncio
import contextvars
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelKind,
    ManagerClosedError,
    TaskExistsError,
    TaskInfo,
    TaskManager,
    TaskNotFoundError,
    TaskPriority,
    TaskStatus,
    current_task,
)
from otel_tasks._core.periodic import Times
from otel_tasks.testing import assert_no_tasks_left
from tests import helpers
from tests.helpers import give, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from otel_tasks import ManagedTask
    from otel_tasks.testing import SpanRecorder


def now() -> float:
    """Seconds since the start of the test: the virtual clock starts at 1000."""
    return helpers.now() - 1000.0


class Work:
    """Runs that take some seconds, and the times at which they started and ended."""

    def __init__(self, seconds: float = 0.0, *, fails: bool = False) -> None:
        self.seconds = seconds
        self.fails = fails
        self.started: list[float] = []
        self.ended: list[tuple[float, str]] = []

    async def __call__(self) -> None:
        """Run once."""
        self.started.append(now())
        try:
            await asyncio.sleep(self.seconds)
            if self.fails:
                raise OSError("supplier away")
        except BaseException as error:
            self.ended.append((now(), type(error).__name__))
            raise
        self.ended.append((now(), "returned"))


def periodic_of(task: ManagedTask[Any]) -> Any:
    return task.info().periodic


# -- times ----------------------------------------------------------------------------------


async def test_runs_start_at_a_fixed_rate_whatever_they_take() -> None:
    """The first one at once, and the others at multiples of the interval."""
    manager, work = TaskManager(), Work(3.0)
    await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(35.0)
    assert work.started == [0.0, 10.0, 20.0, 30.0]
    await manager.shutdown(0)


async def test_first_run_starts_later_with_start() -> None:
    """The interval counts from the first run on."""
    manager, work = TaskManager(), Work()
    await manager.start_periodic("refresh", work, every=10.0, start=4.0)
    await asyncio.sleep(25.0)
    assert work.started == [4.0, 14.0, 24.0]
    await manager.shutdown(0)


async def test_jitter_delays_each_run_and_adds_nothing_up() -> None:
    """Each run is late by at most the jitter, and the next one is not later for it."""
    manager, work = TaskManager(), Work()
    await manager.start_periodic("refresh", work, every=10.0, jitter=4.0)
    await asyncio.sleep(1000.0)
    late = [start - 10.0 * number for number, start in enumerate(work.started)]
    assert all(0.0 <= seconds <= 4.0 for seconds in late)
    assert len({round(seconds, 6) for seconds in late}) > 50
    await manager.shutdown(0)


def test_missed_times_are_skipped_and_not_made_up_for() -> None:
    """One run stands for all times that passed while the loop was held up; the rate stays."""
    times = Times(10.0, 0.0, 0.0)
    times.begin(100.0)
    assert times.check(99.9) == (False, 0)
    assert times.check(100.0) == (True, 0)
    assert times.check(109.0) == (False, 0)
    assert times.check(147.0) == (True, 3)
    assert times.due == 150.0
    assert times.check(150.0) == (True, 0)


def test_times_do_not_drift_over_a_million_runs() -> None:
    """The next time is computed from the first one, not from the one before."""
    times = Times(0.1, 0.0, 0.0)
    times.begin(12345.6)
    for _ in range(1_000_000):
        times.check(times.due)
    assert times.due == pytest.approx(12345.6 + 100_000.0, abs=1e-6)


# -- overlap --------------------------------------------------------------------------------


async def test_run_is_skipped_while_the_one_before_it_is_live() -> None:
    """The default: never two at a time, and the skipped ones are counted."""
    manager, work = TaskManager(), Work(25.0)
    task = await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(55.0)
    assert work.started == [0.0, 30.0]
    assert periodic_of(task).skipped == 4
    await manager.shutdown(0)


async def test_one_run_waits_for_the_end_of_the_one_before_it() -> None:
    """``overlap="wait"``: it starts right then, and no more than one waits."""
    manager, work = TaskManager(), Work(25.0)
    task = await manager.start_periodic("refresh", work, every=10.0, overlap="wait")
    await asyncio.sleep(45.0)
    assert work.started == [0.0, 25.0]
    assert periodic_of(task).skipped == 2
    await asyncio.sleep(10.0)
    assert work.started == [0.0, 25.0, 50.0]
    await manager.shutdown(0)


async def test_next_run_cancels_the_one_before_it_and_waits_for_its_cleanup() -> None:
    """``overlap="cancel_previous"``: the cause says why, and two runs are never live."""
    manager = TaskManager()
    log: list[tuple[float, str]] = []

    async def work() -> None:
        log.append((now(), "start"))
        try:
            await rest()
        finally:
            await asyncio.sleep(2.0)
            log.append((now(), "end"))

    await manager.start_periodic("refresh", work, every=10.0, overlap="cancel_previous")
    await asyncio.sleep(15.0)
    assert log == [(0.0, "start"), (12.0, "end"), (12.0, "start")]
    first = manager.get_task_info("refresh#1")
    assert first is not None
    assert first.cause is not None
    assert (first.cause.kind, first.cause.message) == (CancelKind.EXPLICIT, "the next run is due")
    await manager.shutdown(0, 5)


# -- failures -------------------------------------------------------------------------------


async def test_failed_run_is_reported_and_ends_nothing() -> None:
    """As any failure that nobody awaits; the next run comes at its time."""
    reported: list[tuple[str, str]] = []

    def report(info: TaskInfo, error: BaseException) -> None:
        reported.append((info.name, str(error)))

    manager, work = TaskManager(on_error=report), Work(1.0, fails=True)
    task = await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(25.0)
    assert work.started == [0.0, 10.0, 20.0]
    assert reported == [(f"refresh#{number}", "supplier away") for number in (1, 2, 3)]
    assert (periodic_of(task).failures, periodic_of(task).last_outcome) == (3, TaskStatus.FAILED)
    await manager.shutdown(0)


async def test_factory_that_raises_fails_the_run() -> None:
    """Its error is the run's, and the next run comes at its time."""
    reported: list[str] = []
    manager = TaskManager(on_error=lambda info, error: reported.append(f"{info.name}: {error}"))

    def broken() -> Coroutine[Any, Any, None]:
        raise LookupError("no such table")

    await manager.start_periodic("refresh", broken, every=10.0)
    await asyncio.sleep(15.0)
    assert reported == ["refresh#1: no such table", "refresh#2: no such table"]
    await manager.shutdown(0)


async def test_periodic_task_gives_up_after_failures_in_a_row() -> None:
    """A success in between starts the count over; its own failure has the last one as its cause."""
    errors: list[str] = []
    manager = TaskManager(on_error=lambda info, error: errors.append(f"{info.name}: {error}"))
    outcomes = iter([True, True, False, True, True, True])

    async def work() -> None:
        if next(outcomes):
            raise OSError("away")

    task = await manager.start_periodic("refresh", work, every=10.0, max_failures=3)
    await asyncio.wait([task])
    error = task.exception()
    assert isinstance(error, RuntimeError)
    assert str(error) == "periodic task 'refresh' gave up after 3 failures in a row"
    assert isinstance(error.__cause__, OSError)
    assert now() == 50.0
    assert errors == [f"refresh#{number}: away" for number in (1, 2, 4, 5, 6)]


async def test_timeout_bounds_each_run_and_not_the_whole() -> None:
    """The default of its group is meant for other tasks."""
    manager, work = TaskManager(on_error=lambda *_: None), Work(5.0)
    manager.get_group("jobs", timeout=1.0)
    await manager.start_periodic("refresh", work, every=10.0, timeout=3.0, group="jobs")
    await manager.start_periodic("slow", Work(5.0), every=10.0, group="jobs")
    await asyncio.sleep(17.0)
    assert work.ended == [(3.0, "CancelledError"), (13.0, "CancelledError")]
    first, slow = manager.get_task_info("refresh#1"), manager.get_task_info("slow#1")
    assert first is not None
    assert first.error_type == "TimeoutError"
    assert slow is not None
    assert slow.status is TaskStatus.COMPLETED
    await manager.shutdown(0)


def test_jitter_counts_no_run_as_missed() -> None:
    """A run that starts late by its jitter leaves the next one its own time, which is not in the past."""
    times = Times(1.0, 1.0, 0.0)
    times.begin(100.0)
    for _ in range(500):
        now = times.due + 0.2
        assert times.check(now) == (True, 0)
        assert times.due >= now - 1e-6


async def test_trigger_of_periodic_work_that_is_being_cancelled_starts_nothing() -> None:
    """The task still runs its cleanup, and says so."""
    manager = TaskManager()
    task = await manager.start_periodic("refresh", rest, every=60.0, overlap="wait")
    await settle()
    task.cancel()
    assert manager.trigger("refresh") is False
    await asyncio.wait([task])


# -- triggers -------------------------------------------------------------------------------


async def test_trigger_runs_now_and_leaves_the_times_as_they_are() -> None:
    """An extra run, for which no other one is left out."""
    manager, work = TaskManager(), Work()
    await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(13.0)
    assert manager.trigger("refresh") is True
    await asyncio.sleep(10.0)
    assert work.started == [0.0, 10.0, 13.0, 20.0]
    await manager.shutdown(0)


async def test_trigger_before_the_first_run() -> None:
    """Also right after the start, before the supervisor has run."""
    manager, work = TaskManager(), Work()
    await manager.start_periodic("refresh", work, every=10.0, start=5.0)
    assert manager.trigger("refresh") is True
    await asyncio.sleep(7.0)
    assert work.started == [0.0, 5.0]
    await manager.shutdown(0)


@pytest.mark.parametrize(
    ("overlap", "result", "started"),
    [
        ("skip", False, [0.0, 10.0]),
        ("wait", True, [0.0, 4.0, 10.0]),
        ("cancel_previous", True, [0.0, 2.0, 10.0]),
    ],
)
async def test_trigger_during_a_run_follows_overlap(overlap: Any, result: bool, started: list[float]) -> None:
    """A dropped one says so."""
    manager, work = TaskManager(), Work(4.0)
    await manager.start_periodic("refresh", work, every=10.0, overlap=overlap)
    await asyncio.sleep(2.0)
    assert manager.trigger("refresh") is result
    await asyncio.sleep(9.0)
    assert work.started == started
    await manager.shutdown(0)


async def test_trigger_of_something_else_is_refused() -> None:
    """An unknown name, another task, and another thread."""
    manager = TaskManager()
    await manager.start_periodic("refresh", Work(), every=10.0, group="jobs")
    other = manager.create_task(rest(), name="other")
    with pytest.raises(TaskNotFoundError):
        manager.trigger("unknown")
    with pytest.raises(TaskNotFoundError):
        manager.trigger("refresh", group="mail")
    with pytest.raises(
        TypeError, match=r"^trigger\(\) takes the name of periodic work, and 'other' is another"
    ):
        manager.trigger("other")
    assert manager.trigger("refresh", group="jobs") is True
    other.cancel()
    await manager.shutdown(0)


# -- the end --------------------------------------------------------------------------------


async def test_shutdown_gives_a_run_its_grace_and_starts_no_other() -> None:
    """The periodic task ends as cancelled by the shutdown."""
    manager, work = TaskManager(), Work(8.0)
    task = await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(25.0)
    report = await manager.shutdown(grace=20.0)
    assert work.started == [0.0, 10.0, 20.0]
    assert work.ended[-1] == (28.0, "returned")
    assert task.cause is not None
    assert task.cause.kind is CancelKind.SHUTDOWN
    assert now() == 28.0
    assert report.clean
    await assert_no_tasks_left()


async def test_cancelling_the_periodic_task_cancels_its_run_with_the_cause() -> None:
    """It ends when the run has cleaned up; a second cancellation reaches the run too."""
    manager = TaskManager()
    log: list[str] = []

    async def work() -> None:
        try:
            await rest()
        finally:
            try:
                await asyncio.sleep(5.0)
            finally:
                log.append(f"{now()}")

    task = await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(1.0)
    task.cancel("reload")
    await settle()
    assert not task.done()
    await asyncio.wait([task])
    info = manager.get_task_info("refresh#1")
    assert info is not None
    assert info.cause is not None
    assert info.cause.message == "reload"
    assert log == ["6.0"]

    again = await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(1.0)
    again.cancel("first")
    await settle()
    again.cancel("second")
    await asyncio.wait([again])
    assert log == ["6.0", "7.0"]
    await assert_no_tasks_left()


async def test_cancelling_its_group_ends_it() -> None:
    """With its run; the group stays usable."""
    manager, work = TaskManager(), Work(8.0)
    task = await manager.start_periodic("refresh", work, every=10.0, group="jobs")
    await asyncio.sleep(1.0)
    await manager.cancel_group("jobs")
    assert task.cancelled()
    assert work.ended == [(1.0, "CancelledError")]
    assert await manager.create_task(give(1), group="jobs") == 1


async def test_cancelled_run_does_not_end_it() -> None:
    """Nor does it count as a failure."""
    manager, work = TaskManager(), Work(8.0)
    task = await manager.start_periodic("refresh", work, every=10.0, max_failures=1)
    await asyncio.sleep(1.0)
    assert await manager.cancel_task("refresh#1")
    await asyncio.sleep(10.0)
    assert work.started == [0.0, 10.0]
    assert (periodic_of(task).failures, periodic_of(task).last_outcome) == (0, None)
    await manager.shutdown(0)


async def test_run_that_ignores_its_cancellation_is_waited_for() -> None:
    """The next one starts when it has ended."""
    manager = TaskManager()
    started: list[float] = []

    async def stubborn() -> None:
        started.append(now())
        task = current_task()
        assert task is not None
        try:
            await asyncio.sleep(15.0)
        except asyncio.CancelledError:
            await asyncio.sleep(3.0)

    await manager.start_periodic("refresh", stubborn, every=10.0, overlap="cancel_previous")
    await asyncio.sleep(14.0)
    assert started == [0.0, 13.0]
    await manager.shutdown(0, 10)


# -- names, places, snapshots ----------------------------------------------------------------


async def test_runs_are_tasks_of_the_group_and_wait_for_a_place() -> None:
    """The supervisor takes none; times that pass while a run waits are skipped."""
    manager, work = TaskManager(), Work()
    jobs = manager.get_group("jobs", max_concurrency=1, max_queue=0)
    blocker = jobs.create_task(asyncio.sleep(25.0))
    await manager.start_periodic("refresh", work, every=10.0, group="jobs")
    await asyncio.sleep(34.0)
    assert blocker.done()
    assert work.started == [25.0, 30.0]
    await manager.shutdown(0)


async def test_name_is_unique_and_can_be_replaced() -> None:
    """As for ``start_task``."""
    manager, old, new = TaskManager(), Work(), Work()
    first = await manager.start_periodic("refresh", old, every=10.0)
    with pytest.raises(TaskExistsError):
        await manager.start_periodic("refresh", new, every=10.0)
    second = await manager.start_periodic("refresh", new, every=10.0, on_conflict="replace")
    assert first.cancelled()
    assert await manager.start_periodic("refresh", new, every=9.0, on_conflict="return") is second
    await asyncio.sleep(11.0)
    assert (len(old.started), len(new.started)) == (0, 2)
    await manager.shutdown(0)


async def test_snapshot_has_the_last_and_the_next_run() -> None:
    """With wall-clock times as data; after its end, it has no next run."""
    manager, work = TaskManager(), Work(4.0)
    task = await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(12.0)
    live = periodic_of(task)
    assert (live.every, live.runs, live.failures, live.skipped) == (10.0, 2, 0, 0)
    assert (live.last_run_at, live.last_outcome, live.next_run_at) == (1010.0, None, 1020.0)
    await asyncio.sleep(4.0)
    assert periodic_of(task).last_outcome is TaskStatus.COMPLETED
    data = task.info().to_dict()["periodic"]
    assert data["last_outcome"] == "completed"
    last, following = (datetime.fromisoformat(data[key]) for key in ("last_run_at", "next_run_at"))
    assert (following - last).total_seconds() == pytest.approx(10.0)
    await manager.shutdown(0)
    ended = manager.get_task_info("refresh")
    assert ended is not None
    assert ended.periodic is not None
    assert (ended.periodic.runs, ended.periodic.next_run_at) == (2, None)


@pytest.mark.parametrize("call", ["shutdown", "cancel_group", "cancel_all_tasks"])
async def test_run_that_cancels_all_others_is_spared(call: str) -> None:
    """A run may shut its manager down, or cancel its group: its supervisor does not cancel it then."""
    manager = TaskManager()
    other = manager.create_task(rest(), group="jobs", priority=TaskPriority.CRITICAL)
    calls: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "shutdown": lambda: manager.shutdown(grace=1.0),
        "cancel_group": lambda: manager.cancel_group("jobs"),
        "cancel_all_tasks": manager.cancel_all_tasks,
    }
    outcomes: list[str] = []

    async def check() -> None:
        try:
            await calls[call]()
        except asyncio.CancelledError:
            outcomes.append("cancelled")
            raise
        outcomes.append("returned")

    periodic = await manager.start_periodic("check", check, every=100.0, group="jobs")
    await asyncio.sleep(50)
    assert outcomes == ["returned"]
    assert other.cancelled()
    # No run starts once the cancel event is set.
    assert periodic.cancelled()
    await manager.shutdown(grace=0)


async def test_tree_shows_the_run_below_the_periodic_task() -> None:
    """Between two runs, it says when the next one is due."""
    manager = TaskManager()
    await manager.start_periodic("refresh", Work(4.0), every=10.0)
    await asyncio.sleep(2.0)
    assert "refresh#1" in str(manager.tree())
    await asyncio.sleep(4.0)
    assert "next run in 4" in str(manager.tree())
    await manager.shutdown(0)


async def test_each_run_has_a_trace_of_its_own_linked_to_the_one_before(spans: SpanRecorder) -> None:
    """The first one is linked to its creator; what a run starts is in its trace."""
    manager = TaskManager(tracer_provider=spans.provider)

    async def refresh() -> None:
        await manager.create_task(give(1), name="part")

    with spans.provider.get_tracer("test").start_as_current_span("creator"):
        await manager.start_periodic("refresh", refresh, every=10.0)
    await asyncio.sleep(25.0)
    await manager.shutdown(0)
    first, second, third = spans.spans("refresh")
    assert first.parent is second.parent is third.parent is None
    relations = [
        [(link.context, (link.attributes or {})["otel_tasks.link"]) for link in span.links]
        for span in (first, second, third)
    ]
    assert relations == [
        [(spans.span("creator").context, "spawned_by")],
        [(first.context, "previous_run")],
        [(second.context, "previous_run")],
    ]
    for run in (first, second, third):
        assert [span.name for span in spans.children(run)] == ["part"]


async def test_context_of_its_creator_is_seen_by_each_run() -> None:
    """Each gets a copy, and sees nothing that another run has set."""
    variable = contextvars.ContextVar("variable", default="outside")
    seen: list[str] = []

    async def work() -> None:
        seen.append(variable.get())
        variable.set("changed")

    variable.set("creator")
    manager = TaskManager()
    await manager.start_periodic("refresh", work, every=10.0)
    await asyncio.sleep(15.0)
    assert seen == ["creator", "creator"]
    await manager.shutdown(0)


# -- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be"),
        ({"every": -1}, ValueError, "every must be"),
        ({"every": float("inf")}, ValueError, "every must be"),
        ({"every": "60"}, TypeError, "every must be"),
        ({"every": 10, "jitter": -1}, ValueError, "jitter must be"),
        ({"every": 10, "jitter": 11}, ValueError, r"^jitter must be at most every=10 seconds, got 11$"),
        ({"every": 10, "start": -1}, ValueError, "start must be"),
        ({"every": 10, "start": float("inf")}, ValueError, "start must be"),
        (
            {"every": 10, "overlap": "both"},
            ValueError,
            "overlap must be one of 'skip', 'wait', 'cancel_previous'",
        ),
        ({"every": 10, "max_failures": 0}, ValueError, "max_failures must be"),
        ({"every": 10, "timeout": -1}, ValueError, "timeout must be"),
    ],
)
async def test_bad_option_is_refused_at_the_call(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Nothing is started."""
    manager = TaskManager()
    with pytest.raises(error, match=message):
        await manager.start_periodic("refresh", Work(), **options)
    assert manager.stats().created == 0


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: rest(), r"^periodic work runs many times, and the coroutine .* runs only once: "),
        (
            lambda: 3,
            r"^start_periodic\(\) takes a function that returns a coroutine, got 3: write start_periodic",
        ),
    ],
)
async def test_work_that_cannot_be_repeated_is_refused(factory: Callable[[], Any], message: str) -> None:
    """With the line to write; a coroutine is closed."""
    with pytest.raises(TypeError, match=message):
        await TaskManager().start_periodic("refresh", factory(), every=10.0)


async def test_closed_manager_and_scoped_group_are_refused() -> None:
    """A block ends before periodic work does."""
    manager = TaskManager()
    async with manager.group("block") as block:
        with pytest.raises(ValueError, match=r"^cannot start periodic task 'refresh': group 'block#1' ends"):
            await manager.start_periodic("refresh", Work(), every=10.0, group=block)
    await manager.shutdown(0)
    with pytest.raises(ManagerClosedError):
        await manager.start_periodic("refresh", Work(), every=10.0)
