"""Tasks under limits: places, queues, priority, waiting for room, and how queued tasks end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import warnings
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace

from otel_tasks import (
    CancelEvent,
    CancelKind,
    GroupClosedError,
    ManagedTask,
    ManagerClosedError,
    QueueFullError,
    RetryPolicy,
    TaskExistsError,
    TaskGroup,
    TaskManager,
    TaskPriority,
    TaskStatus,
    WrongLoopError,
    current_cancel_event,
    current_group,
    current_task,
)
from otel_tasks._core.telemetry.providers import Providers, set_default_providers
from otel_tasks.testing import SpanRecorder, VirtualClockLoop, assert_no_tasks_left, run
from tests.helpers import cancel_at_each_await, counters, give, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from otel_tasks._core.info import TaskInfo

LOW, NORMAL, HIGH, CRITICAL = TaskPriority
here = contextvars.ContextVar("here", default="outside")


@dataclass
class Log:
    """Records which tasks started, in which order, and how many ran at a time."""

    begun: list[object] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def work(self, name: object = "work", seconds: float = 1.0) -> object:
        """Take a while, and give one's name."""
        self.begun.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.running -= 1
        return name


@pytest.fixture
def log() -> Log:
    """An empty one."""
    return Log()


async def fail() -> None:
    """Raise after a second."""
    await asyncio.sleep(1)
    raise ValueError("failed")


def is_closed(coro: Coroutine[Any, Any, Any]) -> bool:
    """True if a coroutine can warn of nothing any more."""
    return inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED


def put(
    place: TaskManager | TaskGroup, coro: Coroutine[Any, Any, Any], **options: Any
) -> asyncio.Task[ManagedTask[Any]]:
    """Put a task in a task of its own, one that is not managed."""
    return asyncio.create_task(place.put_task(coro, **options))


def places(manager: TaskManager, *groups: TaskGroup) -> list[tuple[int, int]]:
    """Places taken and tickets waiting, in the manager and in groups."""
    limiters = [manager._ledger.places.limiter, *(group._limiter for group in groups)]
    return [(limiter.used, limiter.waiting) for limiter in limiters if limiter is not None]


# -- places -------------------------------------------------------------------------------------


async def test_a_manager_runs_no_more_than_its_limit(log: Log) -> None:
    """Ten tasks of one second in threes take four seconds, wherever they stand in the manager."""
    manager = TaskManager(max_concurrency=3)
    begin = now()
    async with manager.group("scoped") as group:
        for number in range(5):
            group.create_task(log.work(number))
            manager.create_task(log.work(number), group=["ingest.fetch", None][number % 2])
    await manager.join()

    assert (log.most, len(log.begun), now() - begin) == (3, 10, 4)
    assert places(manager) == [(0, 0)]


async def test_a_group_runs_no_more_than_its_limit(log: Log) -> None:
    """Its tasks wait for each other, others do not wait for them."""
    manager = TaskManager()
    begin = now()
    async with manager.group("pages", max_concurrency=2) as group:
        for number in range(6):
            group.create_task(log.work(number))
        await manager.create_task(give("other"))
        assert now() == begin

    assert (log.most, log.begun, now() - begin) == (2, [0, 1, 2, 3, 4, 5], 3)


async def test_a_task_has_to_pass_both_limits(log: Log) -> None:
    """Two groups of two in a manager of three: never more than two of either, never more than three."""
    manager = TaskManager(max_concurrency=3)
    logs = [Log(), Log()]

    async def both(mine: Log, number: int) -> None:
        await asyncio.gather(mine.work(number), log.work(number))

    async with (
        manager.group("a", max_concurrency=2) as first,
        manager.group("b", max_concurrency=2) as second,
    ):
        for number in range(6):
            first.create_task(both(logs[0], number))
            second.create_task(both(logs[1], number))

    assert [logs[0].most, logs[1].most, log.most] == [2, 2, 3]
    assert places(manager, first, second) == [(0, 0)] * 3


async def test_a_nested_group_does_not_count_for_the_limit_around_it(log: Log) -> None:
    """A limit is for a group's own tasks: else a task that waits for its nested group would block it."""
    manager = TaskManager()

    async def fan_out(outer: TaskGroup) -> None:
        async with outer.group("inner", max_concurrency=2) as inner:
            for number in range(4):
                inner.create_task(log.work(number))

    async with manager.group("outer", max_concurrency=1) as outer:
        outer.create_task(fan_out(outer))
        outer.create_task(log.work("next"))

    assert log.most == 2
    assert log.begun[-1] == "next"


async def test_without_a_limit_a_task_has_no_ticket() -> None:
    """An unused feature costs nothing."""
    manager = TaskManager()
    task = manager.create_task(give(1))

    assert task._extras is None
    assert manager.max_concurrency is None
    assert manager.get_group("mail").max_concurrency is None
    await task


async def test_a_queued_task_is_pending(log: Log) -> None:
    """It has not started, and says so, until it gets its place."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first", 5))
    task = manager.create_task(log.work("second", 5), name="second")
    await settle()

    assert (task.status, task.info().started_at) == (TaskStatus.PENDING, None)
    assert counters(manager) == {"created": 2, "live": 2, "queued": 1}
    assert manager.get_task_info("second") == task.info()
    created = now()
    await asyncio.sleep(5)
    await settle()
    assert (task.status, task.info().started_at, task.info().created_at) == (
        TaskStatus.RUNNING,
        created + 5,
        created,
    )
    assert counters(manager) == {"created": 2, "live": 1, "completed": 1, "remembered": 1}
    await task
    info = manager.get_task_info("second")
    assert info is not None
    assert (info.started_at, info.duration) == (created + 5, 10)


async def test_a_queued_task_keeps_its_options(log: Log) -> None:
    """Metadata, context variables, its group and its group's cancel event are its own when it begins."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work())
    seen: list[object] = []

    async def look() -> None:
        task = current_task()
        assert task is not None
        event: CancelEvent = current_cancel_event()
        seen.extend([task.metadata, here.get(), current_group(), event is group.cancel_event])

    async with manager.group("reading") as group:
        here.set("creator")
        group.create_task(look(), metadata={"book": 7})
        here.set("afterwards")
    context = contextvars.Context()
    context.run(here.set, "given")
    manager.create_task(log.work())
    await manager.create_task(look(), context=context)

    assert seen[:4] == [{"book": 7}, "creator", group, True]
    assert seen[4:6] == [{}, "given"]


async def test_results_and_failures_of_queued_tasks_are_their_own(log: Log) -> None:
    """That a task had to wait changes nothing in how it ends."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work())
    good, bad = manager.create_task(give("good")), manager.create_task(fail())
    started = await manager.start_task("kept", give("kept"))

    assert await good == "good"
    with pytest.raises(ValueError, match="failed"):
        await bad
    await manager.join()
    assert await manager.wait_for_task("kept") == "kept"
    assert started.info().started_at == started.info().created_at + 2


async def test_a_running_task_that_waits_for_a_queued_one_keeps_its_place(log: Log) -> None:
    """It may have what the other needs: only a higher limit, or an end, gets the other its place."""
    manager = TaskManager(max_concurrency=1)

    async def parent() -> object:
        return await manager.create_task(log.work("child"))

    task = manager.create_task(parent())
    await asyncio.sleep(100)
    assert log.begun == []
    manager.max_concurrency = 2
    assert await task == "child"


# -- order --------------------------------------------------------------------------------------


async def test_queued_tasks_start_by_priority_then_first_come(log: Log) -> None:
    """Highest first, and within a level in the order of their creation."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first"))
    for turn in range(2):
        for level in (LOW, HIGH, NORMAL, CRITICAL):
            manager.create_task(log.work((level, turn)), priority=level)
    await manager.join()

    assert log.begun[1:] == [(level, turn) for level in (CRITICAL, HIGH, NORMAL, LOW) for turn in range(2)]


@pytest.mark.parametrize(("ageing", "waits"), [(1.0, 4), (10.0, 31), (float("inf"), 100)])
async def test_nothing_starves_under_a_steady_stream(log: Log, ageing: float, waits: int) -> None:
    """A low task that waits is overtaken by critical ones for three times `ageing` seconds, not forever."""
    manager = TaskManager(max_concurrency=1, ageing=ageing)
    manager.create_task(log.work("first"))
    manager.create_task(log.work("low"), priority=LOW)
    for number in range(100):
        manager.create_task(log.work(number), priority=CRITICAL)
        await asyncio.sleep(1)
    await manager.join()

    # One second each: so many were served before it.
    assert log.begun.index("low") - 1 == pytest.approx(waits, abs=1)


async def test_nothing_starves_beside_a_busy_group(log: Log) -> None:
    """A group's queue has no right to the places that its own tasks give back."""
    manager = TaskManager(max_concurrency=1, ageing=10.0)
    async with manager.group("busy", max_concurrency=1) as group:
        for number in range(30):
            group.create_task(log.work(number), priority=LOW)
        manager.create_task(log.work("critical"), priority=CRITICAL)
        manager.create_task(log.work("low"), priority=LOW)
    await manager.join()

    assert log.begun[:2] == [0, "critical"]
    assert log.begun[-1] == "low"


async def test_a_full_group_does_not_hold_up_the_manager(log: Log) -> None:
    """A place of the manager goes to a task that can use it, even if others are more urgent."""
    manager = TaskManager(max_concurrency=2)
    async with manager.group("slow", max_concurrency=1) as group:
        for number in range(3):
            group.create_task(log.work(number, 10), priority=CRITICAL)
        begin = now()
        await manager.create_task(log.work("other"), priority=LOW)
        assert now() - begin == 1


# -- waiting for a queued task lifts it ---------------------------------------------------------


async def await_it(manager: TaskManager, task: ManagedTask[Any]) -> None:
    """As most do."""
    await task


async def wait_for_it(manager: TaskManager, task: ManagedTask[Any]) -> None:
    """By its name."""
    await manager.wait_for_task(task.name)


async def wait_for_any(manager: TaskManager, task: ManagedTask[Any]) -> None:
    """By asyncio's own means."""
    await asyncio.wait([task])


async def gather_it(manager: TaskManager, task: ManagedTask[Any]) -> None:
    """By asyncio's own means, too."""
    await asyncio.gather(task)


@pytest.mark.parametrize("wait", [await_it, wait_for_it, wait_for_any, gather_it])
@pytest.mark.parametrize(
    ("level", "order"),
    [(CRITICAL, ["waited for", "high"]), (HIGH, ["waited for", "high"]), (LOW, ["high", "waited for"])],
)
async def test_a_waiter_lends_its_priority(
    log: Log, wait: Callable[..., Any], level: TaskPriority, order: list[str]
) -> None:
    """A queued task is as urgent as its waiters; a less urgent waiter changes nothing."""
    manager, other = TaskManager(max_concurrency=1), TaskManager()
    manager.create_task(log.work("first"))
    task = manager.create_task(log.work("waited for"), name="waited for")
    manager.create_task(log.work("high"), priority=HIGH)
    await other.create_task(wait(manager, task), priority=level)
    await manager.join()

    assert log.begun == ["first", *order]
    assert task.priority is NORMAL


async def test_a_waiter_that_is_no_managed_task_lends_nothing(log: Log) -> None:
    """It has no priority to lend."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first"))
    low = manager.create_task(log.work("low"), priority=LOW)
    manager.create_task(log.work("normal"))
    await low

    assert log.begun == ["first", "normal", "low"]


async def test_lifting_out_of_a_full_group(log: Log) -> None:
    """It moves up in the queue it is in: that of its group."""
    manager = TaskManager()
    async with manager.group("pages", max_concurrency=1) as group:
        for name in ("first", "second"):
            group.create_task(log.work(name))
        third = group.create_task(log.work("third"))
        manager.create_task(await_it(manager, third), priority=HIGH)

    assert log.begun == ["first", "third", "second"]


def test_a_queued_task_may_be_waited_for_from_outside_of_the_loop(log: Log) -> None:
    """Nobody lends it anything there, and it is waited for as any task."""
    manager = TaskManager(max_concurrency=1)

    async def create() -> ManagedTask[object]:
        manager.create_task(log.work("first"))
        return manager.create_task(log.work("queued"))

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        task = runner.run(create())
        assert runner.get_loop().run_until_complete(task) == "queued"  # bug A-18


# -- a full queue -------------------------------------------------------------------------------


async def test_a_full_queue_refuses(log: Log) -> None:
    """The error says whose queue, how full and what to do; the coroutine is closed, nothing is booked."""
    manager = TaskManager("shop", max_concurrency=1, max_queue=2)
    for number in range(3):
        manager.create_task(log.work(number))
    before = manager.stats()
    refused = log.work("refused")
    with pytest.raises(QueueFullError) as caught:
        manager.create_task(refused, name="order", timeout=5, metadata={})

    assert str(caught.value) == (
        "cannot create task 'order': 2 tasks already wait for a place in manager 'shop' "
        "(max_concurrency=1, max_queue=2); wait for room with await put_task(...), or do without it"
    )
    assert is_closed(refused)
    assert manager.stats() == before
    await manager.join()
    await manager.create_task(log.work("later"), name="order")
    assert log.begun == [0, 1, 2, "later"]


async def test_a_groups_full_queue_refuses(log: Log) -> None:
    """Its own bound holds where the manager has none; others are not refused."""
    manager = TaskManager()
    async with manager.group("pages", max_concurrency=1, max_queue=0) as group:
        group.create_task(log.work())
        refused = log.work("refused")
        with pytest.raises(QueueFullError, match=f"0 tasks already wait for a place in group '{group.id}'"):
            group.create_task(refused)
        assert is_closed(refused)
        manager.create_task(log.work("other"))
        await asyncio.sleep(2)
        group.create_task(log.work("later"))

    assert log.begun == ["work", "other", "later"]


async def test_the_managers_queue_counts_tasks_that_wait_in_groups(log: Log) -> None:
    """Each task that will need its place counts, in any queue; a task that need not wait is not refused."""
    manager = TaskManager(max_concurrency=2, max_queue=1)
    async with manager.group("pages", max_concurrency=1) as group:
        group.create_task(log.work())
        group.create_task(log.work())
        refused = log.work("refused")
        with pytest.raises(QueueFullError, match="manager 'default'"):
            group.create_task(refused)
        manager.create_task(log.work("at once"))
    await manager.join()

    assert len(log.begun) == 3


async def test_a_cancelled_queued_task_makes_room(log: Log) -> None:
    """As soon as it has ended, another may wait."""
    manager = TaskManager(max_concurrency=1, max_queue=1)
    manager.create_task(log.work("first"))
    waiting = manager.create_task(log.work("cancelled"))
    waiting.cancel()
    await asyncio.wait([waiting])
    manager.create_task(log.work("second"))
    await manager.join()

    assert log.begun == ["first", "second"]


async def test_names_are_looked_at_before_the_queue(log: Log) -> None:
    """`return` needs no room, and `error` says what is wrong first."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    live = manager.create_task(log.work(), name="x")

    assert manager.create_task(log.work("no"), name="x", on_conflict="return") is live
    assert await manager.start_task("x", log.work, on_conflict="return") is live
    refused = log.work("no")
    with pytest.raises(TaskExistsError):
        manager.create_task(refused, name="x", on_conflict="error")
    assert is_closed(refused)
    await manager.join()


async def test_start_task_calls_no_factory_for_a_full_queue(log: Log) -> None:
    """It is refused before its coroutine is made."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(log.work())
    with pytest.raises(QueueFullError, match="'sync'"):
        await manager.start_task("sync", lambda: pytest.fail("called"))
    refused = log.work("no")
    with pytest.raises(QueueFullError, match="'sync'"):
        await manager.start_task("sync", refused)
    assert is_closed(refused)
    await manager.join()


async def test_a_refusal_under_a_limit_leaves_nothing(log: Log) -> None:
    """Neither a place nor an unawaited coroutine is left."""
    manager = TaskManager(max_concurrency=1)
    for _ in range(2):
        refused = log.work("no")
        with pytest.raises(TypeError):
            manager.create_task(refused, timeout=1, context="mine")  # type: ignore[call-overload]  # the mistake under test
        assert is_closed(refused)
        manager.create_task(log.work())
    await manager.join()

    assert places(manager) == [(0, 0)]


async def test_a_fault_after_the_place_was_claimed_gives_it_back(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at that point fails the creation, and leaves neither a claim nor a coroutine behind."""
    manager = TaskManager(max_concurrency=1)

    def no_memory(*args: object, **kwargs: object) -> None:
        raise MemoryError

    for running in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr("otel_tasks._core.creation.ManagedTask", no_memory)
            refused = log.work("no")
            with pytest.raises(MemoryError):
                manager.create_task(refused, timeout=60)
            assert is_closed(refused)
        assert places(manager) == [(running, 0)]
        assert manager.stats().queued == 0
        manager.create_task(log.work())
    await manager.join()


# -- changing a limit ---------------------------------------------------------------------------


async def test_a_higher_limit_starts_the_best_at_once(log: Log) -> None:
    """It does not wait for an end."""
    manager = TaskManager(max_concurrency=1)
    for level in (LOW, NORMAL, HIGH, CRITICAL):
        manager.create_task(log.work(level, 10), priority=level)
    await settle()
    manager.max_concurrency = 3
    assert manager.max_concurrency == 3
    await asyncio.sleep(1)
    assert log.begun == [LOW, CRITICAL, HIGH]
    manager.max_concurrency = None
    await asyncio.sleep(1)
    assert log.begun == [LOW, CRITICAL, HIGH, NORMAL]
    await manager.join()


async def test_a_lower_limit_stops_no_task(log: Log) -> None:
    """Those that run run on; the next starts when fewer run than are allowed now."""
    manager = TaskManager(max_concurrency=3)
    for number in range(5):
        manager.create_task(log.work(number, number + 1))
    await settle()
    manager.max_concurrency = 1
    await asyncio.sleep(2.5)
    assert (log.begun, log.running) == ([0, 1, 2], 1)
    await asyncio.sleep(1)
    assert log.begun == [0, 1, 2, 3]
    await manager.join()


@pytest.mark.parametrize("whose", ["manager", "group"])
async def test_a_limit_set_late_counts_live_tasks(log: Log, whose: str) -> None:
    """From no limit to a limit and back: running tasks take places, and no task is lost."""
    manager = TaskManager()
    async with manager.group("pages") as group:
        place: Any = manager if whose == "manager" else group
        for number in range(3):
            group.create_task(log.work(number, 2))
        await settle()
        place.max_concurrency = 2
        group.create_task(log.work("queued"))
        await asyncio.sleep(1)
        assert (log.running, manager.stats().queued) == (3, 1)
        place.max_concurrency = None
        group.create_task(log.work("free"))
        await settle()
        assert log.running == 5
        place.max_concurrency = 1
        group.create_task(log.work("last"))
        await asyncio.sleep(0.5)
        assert log.running == 5
    assert log.begun == [0, 1, 2, "queued", "free", "last"]
    assert all(used_waiting == (0, 0) for used_waiting in places(manager, group))


async def test_a_limit_set_late_passes_over_tasks_that_have_ended() -> None:
    """A task that is done but not yet recorded holds no place."""
    manager = TaskManager()
    task = manager.create_task(give(1))
    task.add_done_callback(lambda _: None)
    await asyncio.sleep(0)
    assert task.done()
    manager.max_concurrency = 1
    assert places(manager) == [(0, 0)]
    await settle()


async def test_both_limits_set_late(log: Log) -> None:
    """The group's after the manager's: what waits for one has to pass the other too."""
    manager = TaskManager()
    async with manager.group("pages") as group:
        for number in range(2):
            group.create_task(log.work(number))
        manager.max_concurrency = 2
        group.create_task(log.work(2))
        group.max_concurrency = 1
        group.create_task(log.work(3))
        other = manager.create_task(log.work("other"))
        await asyncio.sleep(1.5)
        assert (log.running, places(manager, group)) == (2, [(2, 1), (1, 1)])
        await other
    assert places(manager, group) == [(0, 0)] * 2


async def test_a_labeled_groups_limit_is_kept(log: Log) -> None:
    """A labeled group is forgotten when it is empty, but not while it has a limit."""
    manager = TaskManager()
    manager.get_group("mail").max_concurrency = 1
    gc.collect()
    for number in range(3):
        manager.create_task(log.work(number), group="mail")
    await manager.join()

    assert log.most == 1
    assert manager.get_group("mail").max_concurrency == 1
    kept = weakref.ref(manager.get_group("mail"))
    manager.get_group("mail").max_concurrency = None
    gc.collect()
    assert kept() is None


async def test_a_scoped_group_is_freed_with_its_limit() -> None:
    """Nothing holds a finished block."""
    manager = TaskManager()
    async with manager.group("pages") as group:
        group.max_concurrency = 1
    gone = weakref.ref(group)
    del group
    await settle()
    gc.collect()
    assert gone() is None


# -- waiting too long ---------------------------------------------------------------------------


async def test_span_of_a_task_cancelled_in_the_queue_stays_out_of_the_users_context(
    spans: SpanRecorder,
) -> None:
    """The user's context is used as it is without tracing, even if a tracer is there when the task ends."""
    manager = TaskManager(max_concurrency=1)
    running = manager.create_task(rest())
    context = contextvars.copy_context()
    queued = manager.create_task(rest(), name="queued", context=context)
    await settle()
    set_default_providers(Providers(spans.provider))
    try:
        queued.cancel()
        await asyncio.wait([queued])
    finally:
        set_default_providers(None)
    assert spans.span("queued").end_time is not None
    assert not context.run(trace.get_current_span).get_span_context().is_valid
    running.cancel()
    await asyncio.wait([running])


async def test_queue_timeout(log: Log, spans: SpanRecorder) -> None:
    """A task that gets no place in time fails without having run."""
    manager = TaskManager(max_concurrency=1, tracer_provider=spans.provider)
    manager.create_task(log.work("long", 10))
    coro = log.work("late")
    task = manager.create_task(coro, queue_timeout=3)
    begin = now()
    with pytest.raises(TimeoutError, match="the task ran into its queue timeout of 3 s"):
        await task

    info = task.info()
    assert (now() - begin, task.status, info.started_at) == (3, TaskStatus.FAILED, None)
    assert info.cause is not None
    assert (info.cause.kind, info.cause.message) == (CancelKind.TIMEOUT, "queue timeout of 3 s")
    assert is_closed(coro)
    assert places(manager) == [(1, 0)]
    await manager.join()
    assert log.begun == ["long"]


async def test_queue_timeout_does_not_bound_the_run(log: Log) -> None:
    """It is over with the place."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first"))
    assert await manager.create_task(log.work("second", 100), queue_timeout=3) == "second"
    assert await manager.create_task(log.work("third", 100), queue_timeout=0) == "third"
    assert await TaskManager().create_task(log.work("fourth", 100), queue_timeout=0) == "fourth"


async def test_a_queue_timeout_of_nothing_means_a_place_now_or_never(log: Log) -> None:
    """Zero seconds are over at once."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work())
    begin = now()
    with pytest.raises(TimeoutError, match="queue timeout of 0 s"):
        await manager.create_task(log.work("no"), queue_timeout=0)
    assert now() == begin
    await manager.join()


async def test_the_timeout_counts_from_creation(log: Log) -> None:
    """Time in the queue is time of the task: it may run out there, or later."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first", 2))
    coro = log.work("never")
    queued = manager.create_task(coro, timeout=1, queue_timeout=60)
    short = manager.create_task(log.work("short", 10), timeout=3)
    begin = now()
    with pytest.raises(TimeoutError, match="the task ran into its timeout of 1 s"):
        await queued
    assert (now() - begin, queued.info().started_at, kind_of(queued)) == (1, None, CancelKind.TIMEOUT)
    assert is_closed(coro)
    with pytest.raises(TimeoutError, match="the task ran into its timeout of 3 s"):
        await short
    assert (now() - begin, short.info().started_at) == (3, begin + 2)
    assert log.begun == ["first", "short"]


async def test_a_timeout_error_of_the_tasks_own_is_not_ours(log: Log) -> None:
    """The coroutine's own exception is raised unchanged."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work())

    async def ask() -> None:
        raise TimeoutError("database")

    task = manager.create_task(ask(), timeout=10, queue_timeout=10)
    with pytest.raises(TimeoutError, match=r"^database$"):
        await task
    assert task.cause is None


# -- putting ------------------------------------------------------------------------------------


async def test_put_task_is_create_task_where_there_is_room(log: Log) -> None:
    """It waits for nothing then, not for one turn, and not for a place."""
    manager = TaskManager(max_concurrency=1, max_queue=1)
    begun = manager.put_task(log.work("first"), name="first", priority=HIGH, metadata={"a": 1})
    with pytest.raises(StopIteration) as stop:
        begun.send(None)
    task = stop.value.value
    assert (task.name, task.priority, task.metadata) == ("first", HIGH, {"a": 1})
    queued = await manager.put_task(log.work("second"), group="mail")
    assert (queued.group.name, queued.status, log.begun) == ("mail", TaskStatus.PENDING, [])
    await manager.join()


@pytest.mark.parametrize("max_queue", [0, 1, 2])
@pytest.mark.parametrize("whose", ["manager", "group"])
async def test_put_task_waits_for_room(log: Log, max_queue: int, whose: str) -> None:
    """Where `create_task` refuses, it waits in FIFO order, and no producer is left asleep."""
    limits: Any = {"max_concurrency": 1, "max_queue": max_queue}
    manager = TaskManager(**(limits if whose == "manager" else {}))
    async with manager.group("pages", **(limits if whose == "group" else {})) as group:
        begin = now()
        producers = [put(group, log.work(number)) for number in range(8)]
        await settle()
        assert [producer.done() for producer in producers].count(True) == 1 + max_queue
        refused = log.work("refused")
        with pytest.raises(QueueFullError):
            group.create_task(refused)
        await asyncio.gather(*producers)

    assert log.begun == list(range(8))
    assert (log.most, now() - begin) == (1, 8)
    assert not manager._ledger.places._producers


async def test_a_producer_wakes_for_a_place_as_for_room(log: Log) -> None:
    """A queue full of a group's tasks keeps no task from a place that those cannot take."""
    manager = TaskManager(max_concurrency=3, max_queue=2)
    async with manager.group("slow", max_concurrency=1) as group:
        for number in range(3):
            group.create_task(log.work(number, 100))
        manager.create_task(log.work("short", 1))
        manager.create_task(log.work("long", 50))
        begin = now()
        await manager.put_task(log.work("put"))
        assert now() - begin == 1
        group.cancel()
    await manager.join()


async def test_a_producer_wakes_for_whatever_limit_it_waited(log: Log) -> None:
    """The group's queue takes no task, but only the manager's place is missing."""
    manager = TaskManager(max_concurrency=1)
    async with manager.group("pages", max_concurrency=5, max_queue=0) as group:
        manager.create_task(log.work("first", 1))
        begin = now()
        task = await group.put_task(log.work("put"))
        assert now() - begin == 1
        await task


@pytest.mark.parametrize("whose", ["manager", "group"])
async def test_a_higher_limit_wakes_waiting_producers(log: Log, whose: str) -> None:
    """As many as have room now."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    async with manager.group("pages", max_concurrency=1, max_queue=0) as group:
        group.create_task(log.work("first", 100))
        await settle()
        group.max_concurrency = manager.max_concurrency = 1
        producers = [put(group, log.work(number, 100)) for number in range(4)]
        await settle()
        if whose == "manager":
            group.max_concurrency = 10
            manager.max_concurrency = 3
        else:
            manager.max_concurrency = 10
            group.max_concurrency = 3
        await settle()
        assert [producer.done() for producer in producers] == [True, True, False, False]
        assert log.begun == ["first", 0, 1]
        group.max_concurrency = manager.max_concurrency = None
        await settle()
        assert log.begun == ["first", 0, 1, 2, 3]
        group.cancel()


async def test_a_producer_whose_room_was_taken_stands_at_the_head_again(log: Log) -> None:
    """A task outside the line may take the room; the producer keeps its turn and is woken for the next."""
    manager = TaskManager()
    async with (
        manager.group("a", max_concurrency=1, max_queue=0) as first,
        manager.group("b", max_concurrency=1, max_queue=0) as second,
    ):
        task = first.create_task(log.work("first"))
        second.create_task(log.work("second"))
        producers = [
            put(first, log.work("put 1")),
            put(first, log.work("put 2")),
            put(second, log.work("put 3")),
        ]
        await settle()
        task.add_done_callback(lambda _: first.create_task(log.work("faster", 10)))
        await asyncio.sleep(2)
        assert [producer.done() for producer in producers] == [False, False, True]
        await asyncio.gather(*producers)

    assert log.begun == ["first", "second", "faster", "put 3", "put 1", "put 2"]


@pytest.mark.parametrize("turns", range(6))
async def test_a_new_producer_does_not_overtake_the_woken_one(log: Log, turns: int) -> None:
    """Room for a woken producer is not given to one that arrives in the same turn."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(log.work("first"))
    old = put(manager, log.work("old"))
    await settle()

    async def come_late() -> None:
        # Just when the first one ends, and then some turns of the loop.
        await asyncio.sleep(1)
        for _ in range(turns):
            await asyncio.sleep(0)
        await manager.put_task(log.work("new"))

    await asyncio.gather(old, asyncio.create_task(come_late()))
    await manager.join()

    assert log.begun == ["first", "old", "new"]


async def test_a_producer_cancelled_while_it_waits(log: Log) -> None:
    """Its coroutine is closed, no task is created, and the next one's turn does not change."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(log.work("first"))
    coro = log.work("cancelled")
    cancelled, after = put(manager, coro), put(manager, log.work("after"))
    await settle()
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    assert is_closed(coro)
    await (await after)

    assert log.begun == ["first", "after"]
    assert counters(manager) == {"created": 2, "completed": 2, "remembered": 2}


async def test_a_producer_woken_and_cancelled_in_one_turn(log: Log) -> None:
    """The room that it was woken for is the next one's."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    first = manager.create_task(log.work("first"))
    coro = log.work("cancelled")
    cancelled, after = put(manager, coro), put(manager, log.work("after"))
    await settle()
    # Called after the ledger's own callback, which wakes it.
    first.add_done_callback(lambda _: cancelled.cancel())
    begin = now()
    await (await after)

    assert cancelled.cancelled()
    assert is_closed(coro)
    assert (log.begun, now() - begin) == (["first", "after"], 2)


async def test_a_producer_of_a_group_that_is_finished(log: Log) -> None:
    """When the block of its group ends, it gets the error at once, wherever it waits for room."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(log.work("long", 100))
    begin = now()
    coro = log.work("no")
    async with manager.group("pages") as group:
        producer = put(group, coro)
        await asyncio.sleep(1)
    with pytest.raises(GroupClosedError, match="is finished"):
        await producer
    assert now() - begin == 1
    assert is_closed(coro)
    await manager.join()


async def test_a_producer_of_a_group_that_is_cancelled(log: Log) -> None:
    """The same for a cancelled one, also if it is cancelled with a group above it."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(log.work("long", 100))
    begin = now()
    async with manager.group("outer") as outer, outer.group("inner") as inner:
        producers = [put(outer, log.work("no")), put(inner, log.work("no"))]
        await settle()
        outer.cancel("enough")
        for producer in producers:
            with pytest.raises(GroupClosedError, match="is closed \\(explicit\\)"):
                await asyncio.shield(producer)
            assert now() == begin
    await manager.join()


async def test_waiting_producers_of_a_manager_that_is_shut_down(log: Log) -> None:
    """All of them get the error at once, while running tasks have their grace."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(log.work("first", 3))
    coros = [log.work(number) for number in range(3)]
    producers = [put(manager, coro) for coro in coros]
    await settle()
    begin = now()
    stopping = asyncio.create_task(manager.shutdown(grace=10))
    for producer in producers:
        with pytest.raises(ManagerClosedError, match="was shut down by shutdown"):
            await producer
    assert now() == begin
    assert all(map(is_closed, coros))
    assert (await stopping).completed == 1
    assert now() - begin == 3


PRODUCERS = ["task", "nested", "service", "periodic", "block", "service with a block"]


@pytest.mark.parametrize("kind", PRODUCERS)
@pytest.mark.parametrize("policy", [None, RetryPolicy()])
async def test_managed_producer_that_waits_for_room_is_cancelled_by_a_shutdown(
    kind: str, policy: RetryPolicy | None, log: Log, spans: SpanRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends at once, as cancelled, without an error; what it holds is closed."""
    manager = TaskManager(max_concurrency=2, max_queue=0, tracer_provider=spans.provider)
    held: list[Coroutine[Any, Any, Any]] = []

    def make() -> Coroutine[Any, Any, Any]:
        held.append(log.work("job", 3.0))
        return held[-1]

    async def produce(where: TaskManager | TaskGroup = manager) -> None:
        while True:
            # A function with retry=, of which put_task has the first coroutine.
            await where.put_task(make if policy else make(), name="job", retry=policy)  # type: ignore[arg-type]  # either

    async def produce_in_a_block() -> None:
        async with manager.group("jobs", max_concurrency=1, max_queue=0, on_error="isolate") as group:
            await produce(group)

    async def outer() -> None:
        await manager.create_task(produce(), name="inner")

    begin = now()
    if kind == "task":
        await manager.start_task("producer", produce)
    elif kind == "nested":
        manager.max_concurrency = 3
        await manager.start_task("producer", outer)
    elif kind == "service":
        await manager.start_service("producer", produce)
    elif kind == "periodic":
        await manager.start_periodic("producer", produce, every=60.0)
    elif kind == "block":
        await manager.start_task("producer", produce_in_a_block)
    else:
        await manager.start_service("producer", produce_in_a_block)
    await asyncio.sleep(1.0)
    producer = manager.get_task("producer")
    report = await manager.shutdown(grace=10.0)
    assert report.clean
    assert now() - begin == 3.0
    assert producer.cancelled()
    # A task that awaits the producer sees its CancelledError.
    assert kind_of(producer) is (CancelKind.FOREIGN if kind == "nested" else CancelKind.SHUTDOWN)
    assert held
    assert all(map(is_closed, held))
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []
    assert not any(record.exc_info for record in caplog.records)
    outcomes = {str((span.attributes or {})["otel_tasks.task.outcome"]) for span in spans.spans("producer")}
    assert outcomes == {"cancelled"}


async def test_put_task_during_a_shutdown_cancels_a_managed_producer(log: Log) -> None:
    """Also if it comes with its item after the shutdown has begun; a plain task gets the error."""
    manager = TaskManager()
    manager.create_task(log.work("first", 3.0))

    async def produce() -> None:
        await asyncio.sleep(1.0)
        await manager.put_task(log.work())

    managed = manager.create_task(produce())
    plain = asyncio.create_task(produce())
    await asyncio.sleep(0.5)
    await manager.shutdown(grace=10.0)
    assert managed.cancelled()
    assert kind_of(managed) is CancelKind.SHUTDOWN
    with pytest.raises(ManagerClosedError):
        await plain
    assert log.begun == ["first"]


async def test_put_task_after_a_shutdown_raises_in_a_managed_task_too(log: Log) -> None:
    """A task that has shut the manager down itself is not cancelled by that."""
    manager = TaskManager()

    async def stop() -> str:
        await manager.shutdown(0)
        with pytest.raises(ManagerClosedError):
            await manager.put_task(log.work())
        return "stopped"

    assert await manager.create_task(stop()) == "stopped"


@pytest.mark.parametrize("start", ["start_task", "start_service", "start_periodic"])
async def test_task_that_waits_to_replace_another_is_cancelled_by_a_shutdown(
    start: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait is over with the shutdown, and nothing new starts."""
    manager = TaskManager()

    async def slow() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(2.0)

    async def replace() -> None:
        options = {"every": 60.0} if start == "start_periodic" else {}
        await getattr(manager, start)("work", rest, on_conflict="replace", **options)

    await manager.start_task("work", slow)
    await settle()
    task = manager.create_task(replace())
    await settle()
    await manager.shutdown(grace=10.0)
    assert task.cancelled()
    assert kind_of(task) is CancelKind.SHUTDOWN
    assert "ERROR" not in caplog.text


async def test_put_task_with_bad_options() -> None:
    """Its coroutine is closed as that of `create_task` is."""
    manager = TaskManager()
    bad: list[Any] = [{"timeout": -1}, {"name": ""}, {"group": ".."}, {"group": 7}, {"nonsense": 1}]
    for options in bad:
        coro = rest()
        with pytest.raises((ValueError, TypeError)):
            await manager.put_task(coro, **options)
        assert is_closed(coro)


# -- how queued tasks end -----------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 5])
async def test_a_cancelled_queued_task_never_starts(log: Log, turns: int) -> None:
    """Cancelled before or after its first turn in the queue, it runs none of its code, and nothing warns."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first"))
    coro = log.work("cancelled")
    task = manager.create_task(coro, name="cancelled")
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel("not needed")
    assert task.status is TaskStatus.CANCELLING
    with pytest.raises(asyncio.CancelledError):
        await task
    await settle()

    info = manager.get_task_info("cancelled")
    assert info is not None
    assert (info.status, info.started_at) == (TaskStatus.CANCELLED, None)
    assert info.cause is not None
    assert (info.cause.kind, info.cause.message) == (CancelKind.EXPLICIT, "not needed")
    assert is_closed(coro)
    assert places(manager) == [(1, 0)]
    assert manager.stats().queued == 0
    await manager.join()
    assert log.begun == ["first"]


async def test_cancelled_in_the_turn_in_which_it_gets_its_place(log: Log) -> None:
    """The place goes to the next task."""
    manager = TaskManager(max_concurrency=1)
    first = manager.create_task(log.work("first"))
    coro = log.work("cancelled")
    task = manager.create_task(coro)
    manager.create_task(log.work("next"))
    await settle()
    first.add_done_callback(lambda _: task.cancel())
    await manager.join()

    assert (log.begun, task.status, task.info().started_at) == (["first", "next"], TaskStatus.CANCELLED, None)
    assert is_closed(coro)
    assert places(manager) == [(0, 0)]


async def test_a_place_for_a_task_that_is_cancelled_already(log: Log) -> None:
    """The queue may reach a task that is about to be cancelled: it ends, and its place goes to the next."""
    manager = TaskManager(max_concurrency=1)
    first = manager.create_task(log.work("first"))
    task = manager.create_task(log.work("cancelled"))
    manager.create_task(log.work("next"))
    await settle()
    first.cancel()
    task.cancel()
    await manager.join()

    assert log.begun == ["first", "next"]
    assert (manager.stats().cancelled, places(manager)) == (2, [(0, 0)])


async def test_cancel_task_of_a_queued_one(log: Log) -> None:
    """It has ended on return, and counts as cancelled."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first"))
    task = manager.create_task(log.work("queued"), name="queued")

    assert await manager.cancel_task("queued", "no")
    assert task.cancelled()
    await manager.join()
    assert log.begun == ["first"]


async def test_a_cancelled_group_takes_its_queued_tasks_with_it(log: Log) -> None:
    """Running and queued tasks have the same cause, and tasks that wait elsewhere get their places."""
    manager = TaskManager(max_concurrency=2)
    running = [manager.create_task(log.work(number, 60), group="mail") for number in range(2)]
    queued = [manager.create_task(log.work("never"), group="mail.out") for _ in range(2)]
    other = manager.create_task(log.work("other"), priority=LOW)
    await settle()

    assert await manager.cancel_group("mail", "no longer wanted") == 4
    assert {kind_of(task) for task in running + queued} == {CancelKind.EXPLICIT}
    assert await other == "other"
    assert log.begun == [0, 1, "other"]


async def test_leaving_a_block_waits_for_its_queued_tasks(log: Log) -> None:
    """They are the block's as any: it ends after them."""
    begin = now()
    async with TaskManager().group("pages", max_concurrency=1) as group:
        for number in range(3):
            group.create_task(log.work(number))
    assert (log.begun, now() - begin) == ([0, 1, 2], 3)


async def test_a_cancelled_block_drops_its_queued_tasks(log: Log) -> None:
    """`group.cancel()` leaves the block in silence."""
    async with TaskManager().group("pages", max_concurrency=1) as group:
        tasks = [group.create_task(log.work(number)) for number in range(3)]
        await settle()
        group.cancel("enough")
    assert log.begun == [0]
    assert all(task.cancelled() for task in tasks)


async def test_a_failing_sibling_drops_queued_tasks(log: Log) -> None:
    """They never start, with the failure as their cause."""
    with pytest.raises(ExceptionGroup) as caught:
        async with TaskManager().group("pages", max_concurrency=1) as group:
            group.create_task(fail())
            queued = [group.create_task(log.work()) for _ in range(3)]
    assert [str(error) for error in caught.value.exceptions] == ["failed"]
    assert log.begun == []
    assert {kind_of(task) for task in queued} == {CancelKind.SIBLING_FAILED}


async def test_a_queued_sibling_that_runs_out_fails_the_group(log: Log) -> None:
    """Not getting a place in time is a failure as any."""
    with pytest.raises(ExceptionGroup) as caught:
        async with TaskManager().group("pages", max_concurrency=1) as group:
            long = group.create_task(log.work("long", 60))
            group.create_task(log.work("late"), queue_timeout=1)
    assert [type(error) for error in caught.value.exceptions] == [TimeoutError]
    assert kind_of(long) is CancelKind.SIBLING_FAILED


async def test_a_blocks_timeout_drops_queued_tasks(log: Log) -> None:
    """The block's time is over for tasks that have not started, too."""
    with pytest.raises(TimeoutError, match="group 'pages#"):
        async with TaskManager().group("pages", max_concurrency=1, timeout=5) as group:
            tasks = [group.create_task(log.work(number, 4)) for number in range(3)]
    assert log.begun == [0, 1]
    assert [kind_of(task) for task in tasks] == [None, CancelKind.TIMEOUT, CancelKind.TIMEOUT]


async def test_shutdown_drops_queued_tasks_at_once(log: Log) -> None:
    """Running tasks have their grace; queued tasks do not wait for its end."""
    manager = TaskManager(max_concurrency=1)
    running = manager.create_task(log.work("running", 3), priority=LOW)
    queued = [manager.create_task(log.work("queued"), priority=level) for level in TaskPriority]
    await settle()
    begin = now()
    stopping = asyncio.create_task(manager.shutdown(grace=10))
    await asyncio.wait(queued)
    assert now() == begin
    assert {kind_of(task) for task in queued} == {CancelKind.SHUTDOWN}
    report = await stopping

    assert (report.completed, report.cancelled, report.clean, now() - begin) == (1, 4, True, 3)
    assert (running.status, log.begun) == (TaskStatus.COMPLETED, ["running"])
    assert places(manager) == [(0, 0)]


@pytest.mark.parametrize("queued", [False, True])
async def test_replacing_under_a_limit(log: Log, queued: bool) -> None:
    """The new task starts after the old one's end, in its turn; an old task that was queued never starts."""
    manager = TaskManager(max_concurrency=1)
    if queued:
        manager.create_task(log.work("first"))
    old = manager.create_task(log.work("old", 60), name="sync")
    manager.create_task(log.work("other"))
    await settle()
    new = manager.create_task(log.work("new"), name="sync", on_conflict="replace")
    assert await new == "new"

    assert (old.status, kind_of(old)) == (TaskStatus.CANCELLED, CancelKind.REPLACED)
    assert log.begun == ["first" if queued else "old", "other", "new"]
    assert new.name == "sync"


async def test_replacing_with_places_to_spare(log: Log) -> None:
    """The new one has its place, and still begins after the old one's end."""
    manager = TaskManager(max_concurrency=2)

    async def slow_to_end() -> None:
        try:
            await log.work("old", 60)
        finally:
            await asyncio.sleep(2)
            log.begun.append("old has ended")

    manager.create_task(slow_to_end(), name="sync")
    await settle()
    task = await manager.start_task("other", log.work("other", 1))
    await (await manager.start_task("sync", log.work("new"), cancel_existing=True))

    assert log.begun == ["old", "other", "old has ended", "new"]
    assert task.done()


async def test_chain_of_replaced_queued_tasks(log: Log) -> None:
    """If many tasks replace each other in the queue, the last one runs."""
    manager = TaskManager(max_concurrency=1, max_queue=10)
    manager.create_task(log.work("first"))
    tasks = [manager.create_task(log.work(number), name="sync", on_conflict="replace") for number in range(5)]
    await manager.join()

    assert log.begun == ["first", 4]
    assert [task.cancelled() for task in tasks] == [True] * 4 + [False]


def test_a_loop_closed_under_queued_tasks(log: Log, caplog: pytest.LogCaptureFixture) -> None:
    """They never start and never warn; in the next loop all places are free."""
    manager = TaskManager(max_concurrency=2)
    group = manager.get_group("mail")
    group.max_concurrency = 1
    coros = [log.work(number, 60) for number in range(4)]
    dead: list[asyncio.Task[Any]] = []

    async def leave_behind() -> None:
        dead.extend(group.create_task(coro) for coro in coros[:2])
        dead.extend(manager.create_task(coro) for coro in coros[2:])
        dead.append(put(group, log.work("put")))
        await asyncio.sleep(1)

    loop = VirtualClockLoop()
    loop.run_until_complete(leave_behind())
    loop.close()

    async def go_on() -> None:
        assert await group.create_task(log.work("next")) == "next"
        assert await manager.create_task(log.work("after")) == "after"
        assert places(manager, group) == [(0, 0)] * 2

    run(go_on())
    assert log.begun == [0, 2, "next", "after"]
    assert [is_closed(coro) for coro in coros] == [False, True, False, True]
    assert manager.stats().queued == 0
    # asyncio's own report of a destroyed task is not ours to prevent.
    for task in dead:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # of the C task, too
    [warning] = caplog.messages
    assert "and lost group 'root': 'work-3', 'work-4' (not started); group 'mail': 'work', " in warning


async def test_listeners_see_the_queue(log: Log) -> None:
    """They see created, dequeued, and ended; `dequeued` only for tasks that waited and got their place."""
    manager = TaskManager(max_concurrency=1)
    heard: dict[str, list[str]] = {}
    infos: list[TaskInfo] = []

    def listen(event: str, info: TaskInfo) -> None:
        heard.setdefault(info.name, []).append(event)
        infos.append(info)

    manager.add_listener(listen)
    manager.create_task(log.work(), name="first")
    manager.create_task(log.work(), name="queued")
    cancelled = manager.create_task(log.work(), name="cancelled")
    late = manager.create_task(log.work(), name="late", queue_timeout=0.5)
    await settle()
    created = now()
    cancelled.cancel()
    await asyncio.wait([late])
    await manager.join()

    assert heard == {
        "first": ["created", "ended"],
        "queued": ["created", "dequeued", "ended"],
        "cancelled": ["created", "cancelling", "ended"],
        "late": ["created", "ended"],
    }
    [ended] = [info for info in infos if info.status is TaskStatus.COMPLETED and info.name == "queued"]
    assert (ended.created_at, ended.started_at, ended.ended_at) == (created, created + 1, created + 2)


async def test_listeners_see_tasks_that_nothing_limits() -> None:
    """They see the same two events for each task, be it the first of its manager or a later one."""
    manager = TaskManager()
    heard: list[tuple[str, str]] = []
    await manager.create_task(give(1), name="before")
    manager.add_listener(lambda event, info: heard.append((event, info.name)))
    for name in ("a", "b"):
        await manager.create_task(give(1), name=name)

    assert heard == [("created", "a"), ("ended", "a"), ("created", "b"), ("ended", "b")]


def test_each_await_may_be_cancelled(spans: SpanRecorder) -> None:
    """Putting, queueing, awaiting a queued task: cancelled anywhere, no place is left taken."""
    seen: list[tuple[TaskManager, TaskGroup]] = []

    async def scenario(manager: TaskManager) -> None:
        log = Log()
        manager.max_concurrency = 2
        async with manager.group("pages", max_concurrency=1, max_queue=1) as group:
            seen.append((manager, group))
            for number in range(2):
                await group.put_task(log.work(number))
            third = await group.put_task(log.work(3), queue_timeout=60, timeout=60)
            await third
            manager.create_task(log.work("other"))
            await manager.start_task("queued", log.work("queued"), group="mail")
            await manager.wait_for_task("queued")
            await (await group.put_task(log.work("last")))
        await manager.join()

    assert cancel_at_each_await(scenario, spans) >= 4
    for manager, group in seen:
        assert places(manager, group) == [(0, 0)] * 2
        assert not manager._ledger.places._producers
        assert manager._ledger.places._woken is None


# -- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_concurrency": 0}, "max_concurrency must be at least 1, or None for no bound, got 0"),
        ({"max_concurrency": -3}, "max_concurrency must be at least 1, or None for no bound, got -3"),
        ({"max_concurrency": 1.5}, "max_concurrency must be at least 1, or None for no bound, got 1.5"),
        ({"max_concurrency": True}, "max_concurrency must be at least 1, or None for no bound, got True"),
        ({"max_concurrency": "4"}, "max_concurrency must be at least 1, or None for no bound, got '4'"),
        (
            {"max_concurrency": 1, "max_queue": -1},
            "max_queue must be at least 0, or None for no bound, got -1",
        ),
        (
            {"max_concurrency": 1, "max_queue": False},
            "max_queue must be at least 0, or None for no bound, got False",
        ),
        ({"max_queue": 5}, "max_queue=5 needs max_concurrency: without it no task ever waits"),
    ],
)
@pytest.mark.parametrize("what", ["manager", "block", "group", "nested"])
def test_bad_limits(what: str, options: dict[str, Any], message: str) -> None:
    """The message names the option, its bounds and the value, wherever it was given."""
    with pytest.raises(ValueError, match="max_") as caught:
        if what == "manager":
            TaskManager(**options)
        elif what == "block":
            TaskGroup(**options)
        elif what == "group":
            TaskManager().group("g", **options)
        else:
            TaskManager().get_group("g").group("g", **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("limit", [0, -1, True, 2.0, "2"])
async def test_a_bad_new_limit_changes_nothing(log: Log, limit: Any) -> None:
    """It is refused before anything is counted."""
    manager = TaskManager(max_concurrency=1)
    group = manager.get_group("mail")
    for place in (manager, group):
        with pytest.raises(ValueError, match="max_concurrency must be at least 1"):
            place.max_concurrency = limit
    assert (manager.max_concurrency, group.max_concurrency) == (1, None)


@pytest.mark.parametrize("ageing", [0, -1.0, float("nan"), True, "10", None])
def test_bad_ageing(ageing: Any) -> None:
    """It has to be a number of seconds above zero."""
    with pytest.raises(ValueError, match=r"^ageing must be more than 0 seconds, got "):
        TaskManager(ageing=ageing)


@pytest.mark.parametrize(
    ("seconds", "error", "message"),
    [
        (-1, ValueError, "queue_timeout must be at least 0 seconds, got -1"),
        (float("nan"), ValueError, "queue_timeout must be at least 0 seconds, got nan"),
        ("1", TypeError, "queue_timeout must be seconds as a number, or None for no bound, got '1'"),
        (True, TypeError, "queue_timeout must be seconds as a number, or None for no bound, got True"),
    ],
)
async def test_bad_queue_timeout(seconds: Any, error: type[Exception], message: str) -> None:
    """Refused with the coroutine closed, limited or not."""
    for manager in (TaskManager(), TaskManager(max_concurrency=1)):
        coro = rest()
        with pytest.raises(error) as caught:
            manager.create_task(coro, queue_timeout=seconds)
        assert str(caught.value) == message
        assert is_closed(coro)
        assert places(manager) == [(0, 0)]


async def test_an_infinite_queue_timeout_is_none(log: Log) -> None:
    """As for any duration."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(log.work("first", 1000))
    await manager.create_task(log.work("second"), queue_timeout=float("inf"))
    assert log.begun == ["first", "second"]


# -- whatever happens ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """The next step of the driver; the numbers pick one of the existing tasks and groups."""

    what: str
    number: int
    level: TaskPriority
    seconds: float
    limit: int | None


STEP = st.builds(
    Step,
    what=st.sampled_from(
        ["create", "create", "create", "put", "cancel", "wait for", "limit", "drop producer", "pass"]
    ),
    number=st.integers(0, 30),
    level=st.sampled_from(TaskPriority),
    seconds=st.sampled_from([0.0, 1.0, 2.0, 5.0]),
    limit=st.none() | st.integers(1, 3),
)


@dataclass
class World:
    """Two limited groups and the rest of a limited manager, driven at random."""

    manager: TaskManager
    groups: list[TaskGroup | None]
    tasks: list[ManagedTask[Any]] = field(default_factory=list)
    producers: list[asyncio.Task[ManagedTask[Any]]] = field(default_factory=list)
    waiters: list[asyncio.Task[Any]] = field(default_factory=list)
    coros: list[Coroutine[Any, Any, Any]] = field(default_factory=list)
    running: dict[object, int] = field(default_factory=dict)
    # The highest limit of each at this very moment: it may just have been lowered.
    allowed: dict[object, float] = field(default_factory=dict)
    refused: int = 0

    def limited(self) -> list[TaskManager | TaskGroup]:
        return [self.manager, *(group for group in self.groups if group is not None)]

    def limit(self, place: TaskManager | TaskGroup) -> float:
        return float("inf") if place.max_concurrency is None else place.max_concurrency

    async def work(self, group: TaskGroup | None, seconds: float) -> None:
        holds: list[TaskManager | TaskGroup] = [self.manager] if group is None else [self.manager, group]
        for place in holds:
            self.running[place] = self.running.get(place, 0) + 1
            assert self.running[place] <= max(self.limit(place), self.allowed[place])
        try:
            await asyncio.sleep(seconds)
        finally:
            for place in holds:
                self.running[place] -= 1

    async def step(self, step: Step) -> None:
        group = self.groups[step.number % len(self.groups)]
        place = self.manager if group is None else group
        for each in self.limited():
            self.allowed[each] = self.limit(each)
        if step.what == "create":
            self.create(step, place, group)
        elif step.what == "put":
            self.coros.append(self.work(group, step.seconds))
            self.producers.append(put(place, self.coros[-1], priority=step.level))
        elif step.what == "limit":
            place.max_concurrency = step.limit
        elif step.what == "cancel" and self.tasks:
            self.tasks[step.number % len(self.tasks)].cancel()
        elif step.what == "drop producer" and self.producers:
            self.producers[step.number % len(self.producers)].cancel()
        elif step.what == "wait for" and self.tasks:
            chosen = self.tasks[step.number % len(self.tasks)]
            # Of another manager, so that it takes no place here.
            waiting = asyncio.wait([chosen])
            self.waiters.append(TaskManager().create_task(waiting, priority=step.level))
        else:
            await asyncio.sleep(step.seconds)
        await settle()
        self.check()

    def create(self, step: Step, place: TaskManager | TaskGroup, group: TaskGroup | None) -> None:
        coro = self.work(group, step.seconds)
        self.coros.append(coro)
        limits: dict[str, Any] = {"timeout": 7.0} if step.number % 5 == 0 else {}
        limits |= {"queue_timeout": 1.5} if step.number % 3 == 0 else {}
        try:
            self.tasks.append(place.create_task(coro, priority=step.level, **limits))
        except QueueFullError:
            self.refused += 1
            assert is_closed(coro)

    def check(self) -> None:
        """With nothing in flight, the records match the tasks, and no task waits for a free place."""
        live = list(self.manager._root._every_live())
        queued = [task for task in live if task._extras is not None and task._extras.queued]
        assert self.manager.stats().queued == len(queued)
        for place in self.limited():
            limiter = place._ledger.places.limiter if isinstance(place, TaskManager) else place._limiter
            assert limiter is not None
            tickets = [task._extras.ticket for task in live if task._extras and task._extras.ticket]
            mine = [ticket for ticket in tickets if limiter in ticket.limiters]
            assert limiter.used == sum(ticket.started for ticket in mine)
            assert limiter.waiting == len(mine) - limiter.used
        for task in queued:
            assert task._extras is not None
            assert task._extras.ticket is not None
            assert any(limiter.room() < 1 for limiter in task._extras.ticket.limiters)
        for group, waiter in self.manager._ledger.places._producers:
            assert group._is_full()
            assert not waiter.done()

    async def end(self) -> None:
        # Each runs for at most five seconds: none may still wait after this.
        await asyncio.sleep(5 * len(self.coros) + 5)
        self.check()
        assert all(producer.done() for producer in self.producers)
        assert all(task.done() for task in self.tasks)
        assert all(map(is_closed, self.coros))
        put_by = [producer.result() for producer in self.producers if not producer.cancelled()]
        assert self.manager.stats().created == len(self.tasks) + len(put_by)
        for place in self.limited():
            assert self.running.get(place, 0) == 0
        assert (await self.manager.shutdown(grace=0)).clean
        await asyncio.gather(*self.producers, *self.waiters, return_exceptions=True)
        await assert_no_tasks_left()


async def drive(manager: TaskManager, steps: list[Step], queues: list[int | None]) -> World:
    async with (
        manager.group("a", on_error="isolate", max_concurrency=1, max_queue=queues[0]) as first,
        manager.group("b", on_error="isolate", max_concurrency=2, max_queue=queues[1]) as second,
    ):
        world = World(manager, [None, first, second])
        for step in steps:
            await world.step(step)
        await world.end()
    return world


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    steps=st.lists(STEP, min_size=1, max_size=30),
    limit=st.integers(1, 3),
    queues=st.tuples(*[st.none() | st.integers(0, 3)] * 3).map(list),
    ageing=st.sampled_from([1.0, float("inf")]),
)
def test_random_limits_keep_the_rules(
    steps: list[Step], limit: int, queues: list[int | None], ageing: float
) -> None:
    """Never do too many run, no place stays free, no task is lost; each has one span and one end."""
    heard: list[tuple[str, str]] = []
    with SpanRecorder() as spans, warnings.catch_warnings():
        warnings.simplefilter("error")
        manager = TaskManager(
            max_concurrency=limit,
            max_queue=queues[2],
            ageing=ageing,
            on_error=lambda info, error: None,
            tracer_provider=spans.provider,
            meter_provider=spans.meter_provider,
        )
        manager.add_listener(lambda event, info: heard.append((event, info.id)))
        run(drive(manager, steps, queues), timeout=100_000)
        spans.check()
        created = manager.stats().created
        assert len(spans.finished) == created
        for event in ("created", "ended"):
            assert sum(name == event for name, _ in heard) == created
        dequeued = [task for event, task in heard if event == "dequeued"]
        assert len(set(dequeued)) == len(dequeued)
    # The young ones only: a full collection per example would take most of the time.
    gc.collect(1)


async def test_tickets_that_left_the_queue_are_let_go() -> None:
    """While all places are held, tasks that give up waiting do not pile up behind them."""
    manager = TaskManager(max_concurrency=1)
    manager.create_task(rest())
    for _ in range(50):
        for _ in range(10):
            manager.create_task(rest()).cancel()
        await settle()
    assert len(manager._ledger.places.limiter._heap) < 40
    assert manager.stats().queued == 0
    await manager.shutdown(0)


def test_putting_a_task_in_the_wrong_loop_is_refused() -> None:
    """put_task() says so at once, instead of standing in the line of another loop."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    first = VirtualClockLoop()

    async def use() -> None:
        manager.create_task(rest())
        await settle()

    async def misuse() -> None:
        with pytest.raises(WrongLoopError):
            await manager.put_task(rest())
        with pytest.raises(TypeError, match="takes a coroutine"):
            await manager.put_task(rest)  # type: ignore[call-overload]  # the mistake under test

    first.run_until_complete(use())
    run(misuse())
    first.run_until_complete(manager.shutdown(0))
    first.close()
