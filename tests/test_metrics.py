"""Metrics of tasks: durations, live tasks, cancellations; their attributes, and who is counted where."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.metrics import CallbackOptions, NoOpMeterProvider
from opentelemetry.metrics import _internal as metrics_internal

import otel_tasks
from otel_tasks import CancelCause, CancelKind, TaskManager, TaskPriority, create_task
from otel_tasks._core import telemetry
from otel_tasks._core.request_group import RequestGroup

if TYPE_CHECKING:
    from otel_tasks.testing import SpanRecorder

DURATION = "otel_tasks.task.duration"
ACTIVE = "otel_tasks.task.active"
CANCELLATIONS = "otel_tasks.task.cancellations"
QUEUE_DURATION = "otel_tasks.task.queue.duration"


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    """A manager that reports to the recorder, and to nothing global."""
    return new_manager(spans)


def new_manager(spans: SpanRecorder, name: str = "test") -> TaskManager:
    """One more manager on the recorder's meter provider; without spans, to show that none are needed."""
    return TaskManager(name, meter_provider=spans.meter_provider)


async def work(seconds: float = 1) -> None:
    """Take a while."""
    await asyncio.sleep(seconds)


async def fail(error: BaseException) -> None:
    """Raise at once."""
    raise error


async def ended(*tasks: asyncio.Task[Any]) -> None:
    """Wait for tasks, whatever becomes of them, and fetch their exceptions."""
    await asyncio.gather(*tasks, return_exceptions=True)
    # A task is done one turn before its end is recorded; since 3.12 gather() may not wait for that.
    await asyncio.sleep(0)


def metric(spans: SpanRecorder, name: str) -> Any:
    """One metric with its unit and description."""
    data = spans._reader.get_metrics_data()
    [found] = [
        metric
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
    ]
    return found


def durations(spans: SpanRecorder) -> list[tuple[dict[str, Any], int, float]]:
    """Attributes, count and sum of each point of the duration."""
    points = spans.metrics().get(DURATION, [])
    return [(dict(point.attributes), point.count, point.sum) for point in points]


def active(spans: SpanRecorder) -> dict[str, int]:
    """Live tasks by group, without the groups that have none."""
    points = spans.metrics().get(ACTIVE, [])
    assert {point.attributes["otel_tasks.task.state"] for point in points} <= {"active"}
    return {point.attributes["otel_tasks.group.name"]: point.value for point in points if point.value}


def cancellations(spans: SpanRecorder) -> dict[tuple[str, str], int]:
    """Cancelled tasks by group and reason."""
    return {
        (point.attributes["otel_tasks.group.name"], point.attributes["otel_tasks.cancel.reason"]): point.value
        for point in spans.metrics().get(CANCELLATIONS, [])
    }


# -- duration -----------------------------------------------------------------------------------


async def test_duration_is_from_creation_to_end(manager: TaskManager, spans: SpanRecorder) -> None:
    """Each ended task is one value in seconds of the loop's clock, by name, group and outcome."""
    await asyncio.gather(
        manager.create_task(work(1), name="fetch", group="ingest"),
        manager.create_task(work(2), name="fetch", group="ingest"),
    )

    attributes = {
        "otel_tasks.task.name": "fetch",
        "otel_tasks.group.name": "ingest",
        "otel_tasks.task.outcome": "success",
    }
    assert durations(spans) == [(attributes, 2, pytest.approx(3.0))]


async def test_duration_instrument(manager: TaskManager, spans: SpanRecorder) -> None:
    """Seconds, with buckets from half a millisecond to ten seconds."""
    await manager.create_task(work())

    duration = metric(spans, DURATION)
    [point] = duration.data.data_points
    assert duration.unit == "s"
    assert duration.description
    assert point.explicit_bounds == (
        *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
        *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("bad"), "ValueError"),
        (TimeoutError("database"), "TimeoutError"),
        (otel_tasks.TaskNotFoundError("x"), "otel_tasks.exceptions.TaskNotFoundError"),
    ],
)
async def test_duration_of_a_failed_task_has_the_error_type(
    manager: TaskManager, spans: SpanRecorder, error: Exception, expected: str
) -> None:
    """error.type is the class, as on the span."""
    await ended(manager.create_task(fail(error), name="work"))

    [(attributes, _, _)] = durations(spans)
    assert attributes["otel_tasks.task.outcome"] == "error"
    assert attributes["error.type"] == expected


async def test_duration_of_a_timed_out_task(manager: TaskManager, spans: SpanRecorder) -> None:
    """Its own timeout is the outcome timeout with the error type timeout."""
    await ended(manager.create_task(work(60), name="work", timeout=5))

    [(attributes, _, seconds)] = durations(spans)
    assert attributes["otel_tasks.task.outcome"] == "timeout"
    assert attributes["error.type"] == "timeout"
    assert seconds == pytest.approx(5.0)


@pytest.mark.parametrize("steps", [0, 2])
async def test_duration_of_a_cancelled_task(manager: TaskManager, spans: SpanRecorder, steps: int) -> None:
    """A cancelled task, started or not, is no error: it has no error.type."""
    task = manager.create_task(work(60), name="work")
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await ended(task)

    [(attributes, count, _)] = durations(spans)
    assert attributes["otel_tasks.task.outcome"] == "cancelled"
    assert "error.type" not in attributes
    assert count == 1


async def test_duration_of_a_replaced_task_keeps_its_name(manager: TaskManager, spans: SpanRecorder) -> None:
    """The name that the records give it while it unwinds does not show."""
    old = manager.create_task(work(60), name="sync")
    new = manager.create_task(work(), name="sync", on_conflict="replace")
    await ended(old, new)

    assert {attributes["otel_tasks.task.name"] for attributes, _, _ in durations(spans)} == {"sync"}


async def test_duration_leads_to_a_trace(spans: SpanRecorder) -> None:
    """With tracing each value may be an exemplar: it has the ids of the task's span."""
    manager = TaskManager("test", tracer_provider=spans.provider, meter_provider=spans.meter_provider)
    await manager.create_task(work(), name="work")

    [exemplar] = spans.metrics()[DURATION][0].exemplars
    context = spans.span("work").context
    assert context is not None
    assert (exemplar.trace_id, exemplar.span_id) == (context.trace_id, context.span_id)


# -- active -------------------------------------------------------------------------------------


async def test_active_counts_live_tasks_by_group(manager: TaskManager, spans: SpanRecorder) -> None:
    """Root, labeled, nested labeled, and scoped groups each count their own tasks, once."""
    manager.create_task(work())
    manager.create_task(work(), group="ingest")
    manager.create_task(work(), group="ingest.fetch")
    manager.create_task(work(), group="ingest.fetch")
    async with manager.group("load") as group:
        group.create_task(work())
        assert active(spans) == {"root": 1, "ingest": 1, "ingest.fetch": 2, "load": 1}

    await manager.join()
    assert active(spans) == {}


async def test_active_counts_scoped_groups_of_one_name_together(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """Two blocks named "load" are one series."""
    async with manager.group("load") as outer:
        outer.create_task(work())
        async with outer.group("load") as inner:
            inner.create_task(work())
            assert active(spans) == {"load": 2}


async def test_active_does_not_lose_a_group_named_root(manager: TaskManager, spans: SpanRecorder) -> None:
    """A block that is called as the manager's root is counted with it."""
    manager.create_task(work())
    async with manager.group("root") as group:
        group.create_task(work())
        assert active(spans) == {"root": 2}
    await manager.join()


async def test_active_adds_up_to_the_live_tasks(manager: TaskManager, spans: SpanRecorder) -> None:
    """The series of a manager sum up to its statistics, nested tasks included."""

    async def nest(depth: int) -> None:
        if depth:
            create_task(nest(depth - 1))
        await asyncio.sleep(1)

    for name in ("a", "a.b", "a.b.c"):
        manager.create_task(nest(2), group=name)
    async with manager.group("load") as group:
        group.create_task(nest(3))
        await asyncio.sleep(0.5)
        assert sum(active(spans).values()) == manager.stats().live == 13
    await manager.join()


async def test_active_counts_requests_by_route(manager: TaskManager, spans: SpanRecorder) -> None:
    """A request's group is counted under the name that it has when it is read."""
    route = "GET"
    group = RequestGroup.open(manager, lambda: route, binding=None, host=None)
    group.create_task(work())
    assert active(spans) == {"GET": 1}
    route = "GET /report/{id}"
    assert active(spans) == {"GET /report/{id}": 1}

    group._seal()
    await group.join()
    assert active(spans) == {}


async def test_active_instrument(manager: TaskManager, spans: SpanRecorder) -> None:
    """An up-down counter of tasks."""
    await manager.create_task(work())

    counter = metric(spans, ACTIVE)
    assert counter.unit == "{task}"
    assert counter.description
    assert not counter.data.is_monotonic


async def test_metrics_may_be_read_while_groups_and_managers_come_and_go(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """The reader's thread sees no table change under it, however the threads interleave."""
    faults: list[BaseException] = []
    stop = threading.Event()
    await manager.create_task(asyncio.sleep(0))
    instruments = manager._ledger.telemetry._metrics
    assert instruments is not None

    def read() -> None:
        try:
            while not stop.is_set():
                instruments._observe_active(CallbackOptions())
                instruments._observe_cancellations(CallbackOptions())
        except BaseException as error:
            faults.append(error)

    pace, held = sys.getswitchinterval(), list[object]()
    sys.setswitchinterval(1e-6)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(5_000):
            held.append(manager.get_group(f"g{number}"))
            if number % 10 == 9:
                held.append(other := new_manager(spans))
                other._ledger.home.enter()
            if number % 100 == 99:
                held.clear()
    finally:
        stop.set()
        reader.join()
        sys.setswitchinterval(pace)
    assert faults == []


# -- tasks that wait for a place ----------------------------------------------------------------


def states(spans: SpanRecorder) -> dict[tuple[str, str], int]:
    """Live tasks by group and state, zeros included."""
    return {
        (point.attributes["otel_tasks.group.name"], point.attributes["otel_tasks.task.state"]): point.value
        for point in spans.metrics().get(ACTIVE, [])
    }


def queue_durations(spans: SpanRecorder) -> dict[tuple[str, int], tuple[int, float]]:
    """Count and sum by group and priority; there are no other attributes."""
    points = spans.metrics().get(QUEUE_DURATION, [])
    assert all(len(point.attributes) == 2 for point in points)
    return {
        (point.attributes["otel_tasks.group.name"], point.attributes["otel_tasks.task.priority"]): (
            point.count,
            point.sum,
        )
        for point in points
    }


async def test_active_distinguishes_queued_and_running_tasks(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """Each live task is counted once, in the state in which it is."""
    manager.max_concurrency = 2
    async with manager.group("load", max_concurrency=1) as group:
        for _ in range(3):
            group.create_task(work())
        for _ in range(2):
            manager.create_task(work(), group="jobs")
        manager.create_task(work(60))
        assert states(spans) == {
            ("load", "active"): 1,
            ("load", "queued"): 2,
            ("jobs", "active"): 1,
            ("jobs", "queued"): 1,
            ("root", "active"): 0,
            ("root", "queued"): 1,
        }
        assert manager.stats().queued == 4
        await manager.cancel_group("root")
        assert {key: count for key, count in states(spans).items() if count} == {}


async def test_active_has_no_queued_state_without_a_limit(manager: TaskManager, spans: SpanRecorder) -> None:
    """A series that can only be zero is not there; with a group's limit it is that group's alone."""
    async with manager.group("load", max_concurrency=1) as group:
        group.create_task(work())
        manager.create_task(work())
        assert states(spans) == {("load", "active"): 1, ("load", "queued"): 0, ("root", "active"): 1}
    await manager.join()


async def test_queue_duration_by_group_and_priority(manager: TaskManager, spans: SpanRecorder) -> None:
    """Seconds from creation to the place, for tasks that had to wait for it and got it."""
    manager.max_concurrency = 1
    manager.create_task(work(2), group="jobs-1")
    for _ in range(2):
        manager.create_task(work(1), group="jobs-1", priority=TaskPriority.LOW)
    manager.create_task(work(4), priority=TaskPriority.HIGH)
    victim = manager.create_task(work(), priority=TaskPriority.LOW)
    late = manager.create_task(work(), priority=TaskPriority.LOW, queue_timeout=1)
    await asyncio.sleep(0)
    victim.cancel()
    await ended(late, victim)
    await manager.join()

    assert queue_durations(spans) == {("root", 2): (1, 2.0), ("jobs", 0): (2, 6.0 + 7.0)}


async def test_queue_duration_instrument(manager: TaskManager, spans: SpanRecorder) -> None:
    """Seconds, with the buckets of the duration."""
    manager.max_concurrency = 1
    await asyncio.gather(manager.create_task(work()), manager.create_task(work()))

    duration = metric(spans, QUEUE_DURATION)
    [point] = duration.data.data_points
    assert duration.unit == "s"
    assert duration.description
    assert point.explicit_bounds == metric(spans, DURATION).data.data_points[0].explicit_bounds


async def test_duration_includes_the_time_in_the_queue(manager: TaskManager, spans: SpanRecorder) -> None:
    """It is from creation to end, as the span."""
    manager.max_concurrency = 1
    await asyncio.gather(
        manager.create_task(work(1), name="a"),
        manager.create_task(work(2), name="b"),
    )
    assert {attributes["otel_tasks.task.name"]: seconds for attributes, _, seconds in durations(spans)} == {
        "a": pytest.approx(1.0),
        "b": pytest.approx(3.0),
    }


async def test_raising_queue_instrument_breaks_no_task(
    manager: TaskManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is logged once, and the tasks get their places as usual."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken meter")

    manager.max_concurrency = 1
    monkeypatch.setattr(manager._ledger.telemetry, "record_queue", broken)
    await asyncio.gather(*[manager.create_task(work()) for _ in range(3)])

    assert manager.stats().completed == 3
    assert len([record for record in caplog.records if record.exc_info]) == 1


# -- cancellations ------------------------------------------------------------------------------


async def test_cancellations_are_counted_by_group_and_reason(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """Each task that ended cancelled counts once, by why."""
    for _ in range(2):
        manager.create_task(work(60), group="jobs")
    await manager.cancel_group("jobs", "enough")
    await ended(manager.create_task(fail(asyncio.CancelledError()), group="jobs"))
    with pytest.raises(TimeoutError):
        async with manager.group("load", timeout=1) as group:
            group.create_task(work(60))
    with pytest.raises(BaseExceptionGroup):
        async with manager.group("load") as group:
            group.create_task(work(60))
            group.create_task(fail(ValueError("bad")))
    manager.create_task(work(60))
    await manager.shutdown(grace=0)

    assert cancellations(spans) == {
        ("jobs", "explicit"): 2,
        ("jobs", "foreign"): 1,
        ("load", "timeout"): 1,
        ("load", "sibling_failed"): 1,
        ("root", "shutdown"): 1,
    }


async def test_task_that_did_not_end_cancelled_is_not_counted(
    manager: TaskManager, spans: SpanRecorder
) -> None:
    """An ignored cancellation, one that ended in an error, and a timeout do not count."""

    async def ignore() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return

    async def break_down() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise OSError("disk full")

    tasks = [manager.create_task(ignore()), manager.create_task(break_down())]
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await ended(*tasks, manager.create_task(work(60), timeout=1))

    assert cancellations(spans) == {}


async def test_cancellations_instrument(manager: TaskManager, spans: SpanRecorder) -> None:
    """A counter that only rises."""
    manager.create_task(work(60))
    await manager.cancel_all_tasks()

    counter = metric(spans, CANCELLATIONS)
    assert counter.unit == "{cancellation}"
    assert counter.description
    assert counter.data.is_monotonic


# -- managers and providers ---------------------------------------------------------------------


async def test_two_managers_of_one_provider_are_added_up(spans: SpanRecorder) -> None:
    """They share the instruments: one series for each group, and no complaint of a duplicate."""
    one, two = new_manager(spans, "one"), new_manager(spans, "two")
    for manager in (one, two, two):
        manager.create_task(work(60), group="jobs")
    assert active(spans) == {"jobs": 3}

    await one.cancel_all_tasks()
    await two.cancel_all_tasks()
    assert active(spans) == {}
    assert cancellations(spans) == {("jobs", "explicit"): 3}


async def test_managers_of_two_providers_are_kept_apart(manager: TaskManager, spans: SpanRecorder) -> None:
    """A manager without a meter provider in its hands does not report to another one's."""
    other = TaskManager("other", meter_provider=NoOpMeterProvider())
    await other.create_task(work())

    assert not other._ledger.telemetry.metered()
    assert durations(spans) == []


async def test_dropped_manager_takes_nothing_back(spans: SpanRecorder) -> None:
    """A counter must not fall: what a manager that is gone has counted stays counted."""
    lasting, passing = new_manager(spans), new_manager(spans)
    for manager in (lasting, passing):
        manager.create_task(work(60), group="jobs")
        await manager.cancel_all_tasks()
    assert cancellations(spans) == {("jobs", "explicit"): 2}

    del manager, passing
    gc.collect()
    assert cancellations(spans) == {("jobs", "explicit"): 2}


async def test_dropped_manager_is_not_kept_by_its_metrics(spans: SpanRecorder) -> None:
    """The meter provider, which lives as long as the process, holds no manager."""
    manager = new_manager(spans)
    await manager.create_task(work())
    gone = weakref.ref(manager), weakref.ref(manager._ledger)
    # The callback that this very step of the loop runs in holds the task that it woke us for.
    await asyncio.sleep(0)
    del manager
    gc.collect()

    assert [ref() for ref in gone] == [None, None]
    assert active(spans) == {}


async def test_manager_is_watched_once_for_all_its_loops(manager: TaskManager, spans: SpanRecorder) -> None:
    """A manager that is used in one loop after another does not count double."""
    await manager.create_task(work(), group="jobs")
    await asyncio.to_thread(asyncio.run, use_once(manager))
    manager.create_task(work(), group="jobs")

    assert active(spans) == {"jobs": 1}
    assert [count for _, count, _ in durations(spans)] == [2]
    await manager.join()


async def use_once(manager: TaskManager) -> None:
    """Run a task in another loop."""
    await manager.create_task(work(0), group="jobs")


async def test_raising_instrument_breaks_no_task(
    manager: TaskManager, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A meter that raises is logged once, and the tasks end as usual."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken meter")

    monkeypatch.setattr(manager._ledger.telemetry, "record", broken)
    tasks = [manager.create_task(work()) for _ in range(3)]
    await asyncio.gather(*tasks)

    assert manager.stats().completed == 3
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_no_id_stands_on_any_metric(manager: TaskManager, spans: SpanRecorder) -> None:
    """Names with numbers, ids of groups and requests, and counted names all stay off the metrics."""
    request = RequestGroup.open(manager, "GET /order/{id}", binding=None, host=None)
    request.create_task(work(60), name="pay-4711")
    async with manager.group("load-7") as group:
        group.create_task(work(), name="fetch-1")
        group.create_task(work(), name="fetch-1")
        group.create_task(work(), metadata={"order": "4711"}, priority=TaskPriority.HIGH)
        manager.create_task(work(), name="order:4711", group="shop-12", trace="new")
        seen = all_attributes(spans)
    request._cancel_tasks(CancelCause.make(CancelKind.CLIENT_DISCONNECT, "request 4711"))
    request._seal()
    await manager.join()

    seen |= all_attributes(spans)
    assert {key for key, _ in seen} == {
        "otel_tasks.task.name",
        "otel_tasks.task.outcome",
        "otel_tasks.group.name",
        "otel_tasks.task.state",
        "otel_tasks.cancel.reason",
    }
    assert [value for _, value in seen if any(letter.isdigit() or letter == "#" for letter in value)] == []


def all_attributes(spans: SpanRecorder) -> set[tuple[str, str]]:
    """All attributes of all points of all metrics."""
    return {
        (key, str(value))
        for points in spans.metrics().values()
        for point in points
        for key, value in point.attributes.items()
    }


# -- the global provider, each in a separate process -----------------------------------------------


PREAMBLE = """
import asyncio, logging
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from otel_tasks import TaskManager
logging.basicConfig(level="WARNING")
reader = InMemoryMetricReader()
def points(name):
    data = reader.get_metrics_data()
    return [
        [getattr(point, "count", None) or point.value for point in metric.data.data_points]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "otel_tasks.task." + name
    ]
async def cancelled(manager):
    manager.create_task(asyncio.sleep(60), group="jobs")
    await manager.cancel_all_tasks()
"""


def run_script(script: str, **environ: str) -> str:
    """Run Python code in a fresh process; anything on stderr is a failure."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    root = os.path.dirname(os.path.dirname(os.path.abspath(otel_tasks.__file__)))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + script],
        env={**clean, "PYTHONPATH": root, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout.strip()


def test_global_provider_may_be_set_after_first_use() -> None:
    """A manager that ran tasks without an SDK reports as soon as one is set up."""
    script = """
async def main():
    manager = TaskManager()
    await cancelled(manager)
    metrics.set_meter_provider(MeterProvider([reader]))
    await cancelled(manager)
    print(points("duration"), points("cancellations"))
asyncio.run(main())
"""
    # The counter is read from the manager's own records, which are older than the SDK.
    assert run_script(script) == "[[1]] [[2]]"


def test_managers_from_before_and_after_the_global_provider_share_it() -> None:
    """One series for all, and OpenTelemetry warns of no duplicate instrument."""
    script = """
async def main():
    early = TaskManager("early")
    await cancelled(early)
    metrics.set_meter_provider(MeterProvider([reader]))
    late = TaskManager("late")
    await cancelled(late)
    await cancelled(TaskManager("told", meter_provider=metrics.get_meter_provider()))
    await cancelled(early)
    print(points("duration"), points("cancellations"))
asyncio.run(main())
"""
    assert run_script(script) == "[[3]] [[4]]"


def test_global_provider_may_come_from_the_environment() -> None:
    """The provider named in the environment is used even if nothing else reads the global one."""
    script = """
async def main():
    await cancelled(TaskManager())
    from opentelemetry.metrics import _internal
    print(type(_internal._METER_PROVIDER).__module__)
asyncio.run(main())
"""
    environ = {"OTEL_PYTHON_METER_PROVIDER": "sdk_meter_provider"}
    assert run_script(script, **environ).startswith("opentelemetry.sdk.")


def test_last_export_counts_nothing_twice() -> None:
    """The export at the interpreter's exit matches the counts, whatever is torn down first."""
    script = """
import atexit
atexit.register(lambda: print(points("cancellations")))
manager = TaskManager(meter_provider=MeterProvider([reader]))
asyncio.run(cancelled(manager))
"""
    assert run_script(script) == "[[1]]"


def test_provider_may_be_injected_first_and_set_globally_later() -> None:
    """Both roads lead to one set of instruments."""
    script = """
async def main():
    provider = MeterProvider([reader])
    await cancelled(TaskManager("told", meter_provider=provider))
    metrics.set_meter_provider(provider)
    await cancelled(TaskManager("untold"))
    print(points("duration"), points("cancellations"))
asyncio.run(main())
"""
    assert run_script(script) == "[[2]] [[2]]"


# -- without an SDK -----------------------------------------------------------------------------


@pytest.fixture
def no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No global provider, whatever other tests or the environment may have set up."""
    monkeypatch.delenv("OTEL_PYTHON_METER_PROVIDER", raising=False)
    monkeypatch.setattr(metrics_internal, "_METER_PROVIDER", None)


@pytest.mark.usefixtures("no_sdk")
async def test_without_an_sdk_no_duration_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a task does not reach for an instrument."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a metric without an SDK")

    monkeypatch.setattr(telemetry.Telemetry, "record", never)
    manager = TaskManager()
    await ended(manager.create_task(work()), manager.create_task(fail(ValueError("bad"))))

    assert manager.stats().failed == 1
