"""The clock of a loop: precise unless virtual, the same for all timestamps, with stable wall-clock stamps."""

from __future__ import annotations

import asyncio
import functools
import gc
import itertools
import json
import threading
import time
import weakref
from datetime import datetime
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from otel_tasks import (
    CancelCause,
    CancelEvent,
    CancelKind,
    ManagedTask,
    TaskInfo,
    TaskManager,
    current_cancel_event,
    current_task,
)
from otel_tasks._core import clock
from otel_tasks._core.extras import Extras
from otel_tasks._core.running import run_when
from otel_tasks.testing import SpanRecorder, VirtualClockLoop, run
from tests.helpers import fail, give, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_tasks.progress import Progress

# The resolution of uvloop's time() is a millisecond; this is shorter, and no multiple of it.
SHORT = 0.0004


def uvloops() -> asyncio.AbstractEventLoop:
    """Make a loop of uvloop, where it is installed."""
    loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    return loop


real_loops = pytest.mark.parametrize("make_loop", [asyncio.SelectorEventLoop, uvloops])


@pytest.fixture
def loops() -> Iterator[list[asyncio.AbstractEventLoop]]:
    """Loops to close after the test."""
    made: list[asyncio.AbstractEventLoop] = []
    yield made
    for loop in made:
        loop.close()


async def spin(seconds: float = SHORT) -> None:
    """Hold the loop for a moment, by the system's clock."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# -- which clock a loop has ------------------------------------------------------------------------


class Offset(asyncio.SelectorEventLoop):
    """A test clock that starts where the real one is."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


class Static(asyncio.SelectorEventLoop):
    """A test clock that is no method."""

    time: Any = staticmethod(lambda: 5.0)


class Partial(asyncio.SelectorEventLoop):
    """A test clock with an argument of its own."""

    time: Any = functools.partialmethod(lambda self, at: at, 5.0)


@real_loops
def test_real_loop_has_the_clock_with_nanoseconds(
    make_loop: Callable[[], asyncio.AbstractEventLoop], loops: list[asyncio.AbstractEventLoop]
) -> None:
    """asyncio's loop and a compiled one are measured with the system's monotonic clock."""
    loops.append(make_loop())
    assert clock.clock_of(loops[0]) is clock.monotonic


def test_thread_without_a_loop_has_the_clock_with_nanoseconds() -> None:
    """Without a running loop, the system's clock is used."""
    assert clock.clock_of(None) is clock.monotonic
    assert clock.now() == pytest.approx(clock.monotonic(), abs=60.0)


@pytest.mark.parametrize("loop_class", [VirtualClockLoop, Offset, Static, Partial])
def test_clock_written_in_python_is_the_loops_own(
    loop_class: type[asyncio.AbstractEventLoop], loops: list[asyncio.AbstractEventLoop]
) -> None:
    """A loop class with a time() in Python may be driven by a test, wherever its clock starts."""
    loops.append(loop_class())
    loop: Any = loops[0]
    loop.ahead = 0.0
    loop.ahead = 60.0
    assert clock.clock_of(loop)() == pytest.approx(loop.time(), abs=1.0)
    assert clock.reads_loop_time(loop)


@pytest.mark.parametrize("patch", [lambda: 5.0, mock.Mock(return_value=5.0), functools.partial(float, 5.0)])
@real_loops
def test_clock_put_onto_a_loop_is_the_loops_own(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
    patch: Callable[[], float],
    loops: list[asyncio.AbstractEventLoop],
) -> None:
    """A time() that a test sets on the loop object counts, and so does a later one."""
    loops.append(make_loop())
    loop: Any = loops[0]
    loop.time = patch
    read = clock.clock_of(loop)
    assert read() == 5.0
    loop.time = lambda: 7.0
    assert read() == 7.0
    del loop.time


def test_clock_put_onto_the_class_is_the_loops_own(
    monkeypatch: pytest.MonkeyPatch, loops: list[asyncio.AbstractEventLoop]
) -> None:
    """A test may replace asyncio's method for all loops."""
    loops.append(asyncio.SelectorEventLoop())
    with monkeypatch.context() as patched:
        patched.setattr(asyncio.BaseEventLoop, "time", lambda self: 5.0)
        assert clock.clock_of(loops[0])() == 5.0


def test_choice_leaves_the_attributes_of_a_loop_fast(loops: list[asyncio.AbstractEventLoop]) -> None:
    """The choice does not look at a loop's dictionary: Python 3.11 then reads all its attributes slowly."""
    looked_up = []

    class Watched(asyncio.SelectorEventLoop):
        def __getattribute__(self, name: str) -> Any:
            looked_up.append(name)
            return super().__getattribute__(name)

    loops.append(loop := Watched())
    looked_up.clear()

    clock.clock_of(loop)
    clock.reads_loop_time(loop)

    assert "time" in looked_up
    assert "__dict__" not in looked_up


def test_clock_is_chosen_once_for_a_loop(loops: list[asyncio.AbstractEventLoop]) -> None:
    """A time() replaced after the first timestamp changes nothing: two clocks would not agree."""
    loops.append(asyncio.SelectorEventLoop())
    loop: Any = loops[0]
    assert clock.clock_of(loop) is clock.monotonic
    loop.time = lambda: 5.0
    assert clock.clock_of(loop) is clock.monotonic


def test_choice_keeps_no_loop_alive() -> None:
    """What is cached for a loop is dropped with it."""
    loop = VirtualClockLoop()
    clock.clock_of(loop)
    loop.close()
    gone = weakref.ref(loop)
    del loop
    gc.collect()
    assert gone() is None


# -- durations on a real loop ----------------------------------------------------------------------


@real_loops
def test_durations_do_not_step_by_milliseconds(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """A task of 0.4 ms lasts that long in its history, and its reports of progress are that far apart."""
    manager = TaskManager()
    reports: list[Progress | None] = []

    async def work() -> None:
        task = current_task()
        assert task is not None
        for number in range(3):
            task.progress.update(done=number)
            reports.append(task.progress.snapshot())
            await spin()

    async def main() -> list[TaskInfo]:
        plain = [manager.create_task(spin()) for _ in range(5)]
        await asyncio.gather(manager.create_task(work(), name="work"), *plain)
        await settle()
        return list(manager.get_all_task_info().values())

    with asyncio.Runner(loop_factory=make_loop) as runner:
        infos = runner.run(main())
    assert len(infos) == 6
    for info in infos:
        assert info.duration is not None
        assert info.duration >= SHORT
    # Near a whole millisecond is one of fifty by chance, and never all six.
    assert any(0.01 < (info.duration or 0) * 1000 % 1 < 0.99 for info in infos)
    moments = [report.updated_at for report in reports if report is not None]
    assert all(later - earlier >= SHORT for earlier, later in itertools.pairwise(moments))


@real_loops
def test_moments_of_one_task_are_in_order(
    make_loop: Callable[[], asyncio.AbstractEventLoop], spans: SpanRecorder
) -> None:
    """Creation, start, request and end of a task that is cancelled are on one clock, from a thread too."""
    manager = TaskManager(max_concurrency=1, tracer_provider=spans.provider)

    def ask_in_thread(task: ManagedTask[Any]) -> None:
        thread = threading.Thread(target=task.cancel)
        thread.start()
        thread.join()

    async def end(ask: Callable[[ManagedTask[Any]], object]) -> TaskInfo:
        first = manager.create_task(spin())
        task = manager.create_task(rest(), group="late")
        await first
        await settle()
        await spin()
        ask(task)
        await asyncio.wait([task])
        return task.info()

    async def main() -> list[TaskInfo]:
        return [
            await end(lambda task: task.cancel()),
            await end(lambda task: task.group.cancel()),
            await end(ask_in_thread),
        ]

    with asyncio.Runner(loop_factory=make_loop) as runner:
        infos = runner.run(main())
    for info in infos:
        assert info.cause is not None
        assert info.started_at is not None
        assert info.cause.at is not None
        assert info.ended_at is not None
        assert info.created_at + SHORT <= info.started_at
        assert info.started_at + SHORT <= info.cause.at <= info.ended_at
    for span in spans.spans("rest"):
        attributes = span.attributes or {}
        for name in ("otel_tasks.cancel.duration", "otel_tasks.task.queue.duration"):
            value = attributes[name]
            assert isinstance(value, float)
            assert value == round(value, 6)
            assert 0 < value < 60


@real_loops
def test_timeout_of_a_task_counts_from_its_creation(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """A deadline is the loop's own: a loop that was held before the task began leaves it what is left."""

    async def main() -> float:
        manager = TaskManager()
        began = time.perf_counter()
        task = manager.create_task(rest(), timeout=0.05)
        await spin(0.02)
        await asyncio.wait([task])
        assert isinstance(task.exception(), TimeoutError)
        return time.perf_counter() - began

    with asyncio.Runner(loop_factory=make_loop) as runner:
        assert 0.045 < runner.run(main()) < 5.0


async def test_timeout_on_another_clock_is_moved_to_the_loops_own() -> None:
    """If timestamps are not the loop's time(), a deadline is the rest of the timeout."""
    loop = asyncio.get_running_loop()

    def other() -> float:
        return loop.time() + 5000.0

    extras = Extras(seconds=10.0)
    work = run_when(rest(), extras, (), other(), other)
    await asyncio.sleep(4.0)
    began = loop.time()
    with pytest.raises(TimeoutError, match="timeout of 10 s"):
        await work
    assert loop.time() - began == pytest.approx(6.0)


async def test_virtual_clock_measures_virtual_seconds(spans: SpanRecorder) -> None:
    """An hour that passes at once is an hour in each duration."""
    manager = TaskManager(tracer_provider=spans.provider)
    task = manager.create_task(asyncio.sleep(7200))
    await asyncio.sleep(3600)
    assert manager.tree().root.tasks[0].age == 3600
    task.cancel()
    await asyncio.wait([task])
    assert (task.info().duration, task.cause and task.cause.at) == (3600.0, 4600.0)


@pytest.mark.parametrize("way", ["task", "group", "event", "own event"])
async def test_request_from_a_thread_is_on_the_clock_of_the_loop(way: str) -> None:
    """A thread notes the moment on the clock of what it cancels, a virtual one too."""
    manager = TaskManager()
    task = manager.create_task(rest(), group="a")
    event = task.group.cancel_event
    own = CancelEvent(event)
    await asyncio.sleep(5)
    ways: dict[str, Callable[[], object]] = {
        "task": task.cancel,
        "group": task.group.cancel,
        "event": event.set,
        "own event": own.set,
    }
    await asyncio.to_thread(ways[way])
    await settle()
    cause = {"event": event.cause, "own event": own.cause}.get(way, task.cause)
    assert cause is not None
    assert cause.at is not None
    # While the thread works, the virtual clock runs at its real pace.
    assert 1005.0 <= cause.at < 1065.0
    task.cancel()
    await asyncio.wait([task])


async def test_event_set_by_a_function_in_a_thread_is_on_the_clock_of_the_loop() -> None:
    """run_in_thread has the current event, and what it notes can be compared with the task."""
    manager = TaskManager()

    def work() -> CancelCause | None:
        event = current_cancel_event()
        event.set()
        return event.cause

    cause = await manager.run_in_thread(work)
    assert cause is not None
    assert cause.at is not None
    assert 1000.0 <= cause.at < 1060.0


def test_cause_without_a_loop_is_on_the_systems_clock() -> None:
    """A cause that belongs to no known loop has the clock of real loops."""
    cause = CancelCause.make(CancelKind.EXPLICIT)
    assert cause.at == pytest.approx(clock.monotonic(), abs=60.0)
    assert cause.asked_by is None


async def test_ended_tasks_are_forgotten_by_the_clock_of_the_manager() -> None:
    """max_age counts on the clock on which the tasks ended."""
    manager = TaskManager()
    await manager.create_task(give(1))
    await asyncio.sleep(10)
    await manager.create_task(give(1))
    await settle()
    assert manager.cleanup_completed_tasks(max_age=5) == 1
    assert manager.stats().remembered == 1


# -- wall-clock stamps -----------------------------------------------------------------------------


def stamps(info: TaskInfo | None) -> list[str]:
    """The wall-clock stamps of a snapshot that has them all."""
    assert info is not None
    data = info.to_dict()
    return [data["created_at"], data["started_at"], data["ended_at"]]


@pytest.mark.parametrize("on", [asyncio.run, run])
def test_stamps_are_the_same_on_every_call(on: Callable[[Any], TaskInfo]) -> None:
    """In the loop, after it, in a thread and in another loop: a moment has one stamp."""
    manager = TaskManager()
    seen: list[list[str]] = []

    async def main() -> TaskInfo:
        task = manager.create_task(give(1), name="once")
        await task
        await settle()
        seen.append(stamps(task.info()))
        await asyncio.to_thread(lambda: seen.append(stamps(task.info())))
        await asyncio.sleep(0)
        seen.append(stamps(task.info()))
        return task.info()

    async def elsewhere() -> None:
        await manager.create_task(give(2), name="again")
        seen.append(stamps(manager.get_task_info("once")))

    info = on(main())
    seen.append(stamps(info))
    seen.append(stamps(manager.get_task_info("once")))
    run(elsewhere())
    asyncio.run(elsewhere())
    seen.append(stamps(manager.get_task_info("once")))
    assert seen == [seen[0]] * len(seen)


def test_stamps_are_of_today_to_the_microsecond() -> None:
    """The stamp of a moment is that of the wall clock, in UTC."""
    before = time.time()

    async def main() -> TaskInfo:
        task = TaskManager().create_task(give(1))
        await task
        await settle()
        return task.info()

    info = asyncio.run(main())
    data = info.to_dict()
    assert "epoch" not in data
    assert json.dumps(data)
    created = datetime.fromisoformat(data["created_at"])
    assert before - 1.0 <= created.timestamp() <= time.time() + 1.0
    assert len(data["created_at"]) == len("2026-01-01T00:00:00.000000+00:00")
    assert created.timestamp() == pytest.approx(info.epoch + info.created_at, abs=1e-5)


async def test_durations_in_dictionaries_are_rounded_to_the_microsecond() -> None:
    """Digits beyond the microsecond are noise."""
    manager = TaskManager()
    task = manager.create_task(asyncio.sleep(0.1 + 0.2))
    await asyncio.sleep(0.1 + 0.2 - 0.1)
    node = manager.tree().to_dict()["root"]["tasks"][0]
    assert node["age"] == 0.2
    await task
    assert task.info().to_dict()["duration"] == 0.3


async def test_progress_is_rounded_to_the_microsecond() -> None:
    """Seconds left are an estimate: more digits would promise too much."""
    manager = TaskManager()

    async def work() -> None:
        task = current_task()
        assert task is not None
        task.progress.update(done=0, total=3)
        await asyncio.sleep(1 / 3)
        task.progress.update(done=1)

    task = manager.create_task(work())
    await task
    report = task.progress.snapshot()
    assert report is not None
    assert report.to_dict()["seconds_left"] == 0.666667


def test_stamps_follow_a_wall_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept, or whose clock was set, has a new offset; a small correction changes none."""
    before = clock.epoch_of(None)
    real = time.time
    monkeypatch.setattr(clock, "_real_epoch", before)
    monkeypatch.setattr(time, "time", lambda: real() + 0.5)
    assert clock.epoch_of(None) == before
    monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
    assert clock.epoch_of(None) == pytest.approx(before + 3600.0, abs=1.0)


async def test_stamps_of_a_failure_are_stable_too() -> None:
    """They are stable for records kept in full and for compact ones."""
    manager = TaskManager()
    task = await manager.start_task("bad", lambda: fail(ValueError("no")))
    await asyncio.wait([task])
    await settle()
    assert stamps(manager.get_task_info("bad")) == stamps(task.info())
