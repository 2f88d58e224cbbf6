"""Services: attempts and their spans, delays, giving up, cancelling, shutdown, places under a limit."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import logging
import sys
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from otel_tasks import (
    CancelKind,
    ManagerClosedError,
    RestartPolicy,
    TaskExistsError,
    TaskManager,
    TaskPriority,
    TaskStatus,
    current_cancel_event,
    current_group,
    current_task,
    global_task_manager,
    start_service,
)
from otel_tasks._core.service import Failures, Service
from otel_tasks.testing import SpanRecorder, VirtualClockLoop, assert_no_tasks_left, run
from tests.helpers import CancelledAt, counters, give, ignore_cancels, kind_of, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from opentelemetry.sdk.trace import ReadableSpan

    from otel_tasks import ManagedTask, TaskInfo

# Without chance, and counted in seconds that are easy to add up.
STEADY = RestartPolicy(delay=1.0, jitter=0)


class Flaky:
    """Fails so many times, then rests (or returns); notes when each attempt began."""

    def __init__(self, failures: float, *, after: float = 0.0, returns: bool = False) -> None:
        self.failures = failures
        self.after = after
        self.returns = returns
        self.began: list[float] = []
        self.tasks: list[ManagedTask[Any] | None] = []

    async def __call__(self) -> str:
        self.began.append(now())
        self.tasks.append(current_task())
        number = len(self.began)
        if self.after:
            await asyncio.sleep(self.after)
        if number <= self.failures:
            raise ConnectionError(f"failure {number}")
        if not self.returns:
            await rest()
        return "done"

    @property
    def gaps(self) -> list[float]:
        """Seconds between the beginnings."""
        return [after - before for before, after in itertools.pairwise(self.began)]


def context_of(span: ReadableSpan) -> trace.SpanContext:
    """The ids by which links name a span."""
    context = span.get_span_context()
    assert context is not None
    return context


def links_of(span: ReadableSpan) -> list[tuple[trace.SpanContext, object]]:
    """To which spans it is linked, and how."""
    return [(link.context, (link.attributes or {})["otel_tasks.link"]) for link in span.links]


def attribute(span: ReadableSpan, name: str) -> object:
    """The attributes of a span."""
    return (span.attributes or {}).get(name)


# -- the policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"on": "never"}, ValueError, "on must be one of 'failure', 'always', got 'never'"),
        ({"delay": -1}, ValueError, "delay must be at least 0 and finite, got -1"),
        ({"delay": float("nan")}, ValueError, "delay must be at least 0 and finite, got nan"),
        ({"delay": "1"}, TypeError, "delay must be a number, got '1'"),
        ({"delay": True}, TypeError, "delay must be a number, got True"),
        ({"max_delay": float("inf")}, ValueError, "max_delay must be at least 0 and finite, got inf"),
        ({"max_delay": 0.5}, ValueError, r"max_delay must be at least delay=1\.0, got 0\.5"),
        ({"factor": 0.9}, ValueError, r"factor must be at least 1 and finite, got 0\.9"),
        ({"max_failures": 0}, ValueError, "max_failures must be at least 1, or None for no bound, got 0"),
        ({"within": 0}, ValueError, "within must be more than 0 seconds, got 0"),
        ({"within": None}, TypeError, "within must be a number, got None"),
    ],
)
def test_bad_policy_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """A policy that makes no sense says which value, and what it has to be."""
    with pytest.raises(error, match=f"^{message}$"):
        RestartPolicy(**options)


def test_policies_are_compared_by_value() -> None:
    """Two policies with the same numbers are equal, and a policy cannot be changed."""
    assert RestartPolicy(delay=2) == RestartPolicy(delay=2.0, jitter=0.5)
    with pytest.raises(AttributeError):
        STEADY.delay = 3.0  # type: ignore[misc]  # that is the test


def test_delays_grow_up_to_their_bound() -> None:
    """Each delay is a multiple of the one before, and none is longer than the longest."""
    failures = Failures(RestartPolicy(delay=1, factor=3, max_delay=20, max_failures=None, jitter=0))
    assert [failures.add(0.0, 0.0) for _ in range(5)] == [1, 3, 9, 20, 20]


def test_every_failure_since_the_start_may_count() -> None:
    """Without an end to the time in which failures count, none is forgotten and no delay is reset."""
    failures = Failures(RestartPolicy(max_failures=3, within=float("inf"), jitter=0))
    assert [failures.add(0, 0), failures.add(1e6, 1e6), failures.add(2e6, 1e6)] == [1, 2, None]


def test_long_attempt_is_followed_by_the_first_delay() -> None:
    """An attempt that has run for as long as failures are counted is followed by the first delay."""
    failures = Failures(RestartPolicy(delay=1, max_failures=None, within=100, jitter=0))
    assert [failures.add(0, 0), failures.add(1, 0), failures.add(100, 99), failures.add(300, 100)] == [
        1,
        2,
        4,
        1,
    ]


@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 30), max_size=40),
)
def test_given_up_after_so_many_failures_in_a_time(bound: int, pauses: list[int]) -> None:
    """It is given up at the first failure that has so many, itself included, in the time before it."""
    failures = Failures(RestartPolicy(max_failures=bound, within=50))
    times = list(itertools.accumulate(pauses))
    for number, time in enumerate(times):
        recent = [earlier for earlier in times[: number + 1] if time - earlier < 50]
        given_up = failures.add(time, 0.0) is None
        assert given_up == (len(recent) >= bound)
        if given_up:
            break


# -- attempts --------------------------------------------------------------------------------------


async def test_service_is_started_again_after_growing_delays() -> None:
    """Each failure is followed by another attempt, after 1, 2, then 4 seconds."""
    manager = TaskManager()
    work = Flaky(3)
    service = await manager.start_service("prices", work, restart=STEADY)
    await asyncio.sleep(100)
    assert work.gaps == [1, 2, 4]
    assert service.status is TaskStatus.RUNNING
    await manager.shutdown(0)


async def test_delay_counts_from_the_failure() -> None:
    """How long an attempt took before it failed does not count as waiting."""
    manager = TaskManager()
    work = Flaky(2, after=10)
    await manager.start_service("prices", work, restart=STEADY)
    await asyncio.sleep(100)
    assert work.gaps == [11, 12]
    await manager.shutdown(0)


async def test_long_run_resets_the_delay() -> None:
    """A service that ran well for long is restarted soon, however often it had failed before."""
    manager = TaskManager()
    lives = iter([0, 0, 0, 700, 0])
    began = []

    async def work() -> None:
        began.append(now())
        await asyncio.sleep(next(lives, 3600))
        raise ConnectionError

    await manager.start_service("prices", work, restart=STEADY)
    await asyncio.sleep(2000)
    assert [after - before for before, after in itertools.pairwise(began)] == [1, 2, 4, 701, 2]
    await manager.shutdown(0)


async def test_attempts_are_tasks_with_names() -> None:
    """Each attempt can be found by name, is in the service's group, and has its priority and metadata."""
    manager = TaskManager()
    work = Flaky(1)
    service = await manager.start_service("prices", work, group="feeds", metadata={"a": 1}, restart=STEADY)
    await asyncio.sleep(50)
    assert [task and task.name for task in work.tasks] == ["prices#1", "prices#2"]
    attempt = manager.get_task("prices#2")
    assert attempt is work.tasks[1]
    assert manager.get_task("prices") is service
    assert manager.get_group("feeds").tasks == (service, attempt)
    assert attempt.priority is service.priority is TaskPriority.CRITICAL
    assert attempt.metadata == service.metadata == {"a": 1}
    ended = manager.get_task_info("prices#1")
    assert ended is not None
    assert (ended.status, ended.error) == (TaskStatus.FAILED, "failure 1")
    await manager.shutdown(0)


async def test_attempts_run_in_copies_of_the_callers_context() -> None:
    """Each attempt sees the variables set at the start; its own changes reach no other attempt."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen = []

    def factory() -> Coroutine[Any, Any, None]:
        seen.append(variable.get())
        return work()

    async def work() -> None:
        seen.append(variable.get())
        variable.set("by the attempt")
        assert current_group().name == "feeds"
        raise ConnectionError

    manager = TaskManager()
    variable.set("by the caller")
    service = await manager.start_service(
        "prices", factory, group="feeds", restart=RestartPolicy(max_failures=3)
    )
    variable.set("later")
    with pytest.raises(ConnectionError):
        await service
    assert seen == ["by the caller"] * 6


async def test_service_started_in_a_task_joins_its_own_group() -> None:
    """The group of the task that starts a service is not the service's."""
    manager = TaskManager()
    seen = []

    async def work() -> None:
        seen.append(current_group().name)

    async def starter() -> None:
        await (await manager.start_service("prices", work))

    async with manager.group("block") as group:
        group.create_task(starter())
    assert seen == ["root"]


async def test_renamed_service_has_attempts_of_its_new_name() -> None:
    """Attempts are named after what the service is called when they begin."""
    manager = TaskManager()
    work = Flaky(1)
    service = await manager.start_service("prices", work, restart=STEADY)
    await settle()
    service.set_name("rates")
    await asyncio.sleep(5)
    assert [task and task.name for task in work.tasks] == ["prices#1", "rates#2"]
    await manager.shutdown(0)


async def test_name_of_an_attempt_may_be_taken() -> None:
    """If a task already has an attempt's name, the attempt gets another one."""
    manager = TaskManager()
    renamed = await manager.start_service("prices", rest)
    await settle()
    renamed.set_name("rates")
    work = Flaky(0)
    await manager.start_service("prices", work)
    await settle()
    assert [task and task.name for task in work.tasks] == ["prices#1-2"]
    await manager.shutdown(0)


async def test_global_manager_starts_services() -> None:
    """The function of the package starts a service of the global manager."""
    service = await start_service("prices", lambda: give(1))
    assert await service == 1
    assert service.group.id == "root"
    assert await global_task_manager.wait_for_task("prices") == 1


# -- returning -------------------------------------------------------------------------------------


async def test_return_ends_the_service() -> None:
    """A service whose attempt returns is completed with that result, for later waiters too."""
    manager = TaskManager()
    work = Flaky(2, returns=True)
    service = await manager.start_service("prices", work, restart=STEADY)
    assert await service == "done"
    assert len(work.began) == 3
    assert await manager.wait_for_task("prices") == "done"


async def test_return_may_count_as_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """With ``on="always"`` a service that returns is restarted, and gives up, as one that fails."""
    manager = TaskManager()
    work = Flaky(0, returns=True)
    policy = RestartPolicy(on="always", max_failures=3, delay=0)
    service = await manager.start_service("prices", work, restart=policy)
    with pytest.raises(RuntimeError, match=r"^attempt 'prices#3' returned, but the service must not end"):
        await service
    assert len(work.began) == 3
    assert counters(manager) == {"created": 4, "completed": 3, "failed": 1, "remembered": 4}
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


async def test_return_in_a_shutdown_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A service that heeds the cancel event ends well, also where returning counts as a failure."""
    manager = TaskManager()

    async def work() -> str:
        await current_cancel_event().wait()
        return "drained"

    policy = RestartPolicy(on="always")
    service = await manager.start_service("prices", work, restart=policy, drains=True)
    await settle()
    start = now()
    report = await manager.shutdown(grace=5)
    assert now() == start
    assert report.completed == 2
    assert service.result() == "drained"
    assert not caplog.records


# -- giving up -------------------------------------------------------------------------------------


async def test_given_up_with_the_last_error(caplog: pytest.LogCaptureFixture) -> None:
    """After so many failures the service fails with the last: logged once, with the number of them."""
    manager = TaskManager()
    work = Flaky(99)
    policy = RestartPolicy(max_failures=3, delay=2, within=60, jitter=0)
    service = await manager.start_service("prices", work, restart=policy)
    await asyncio.sleep(100)
    assert work.gaps == [2, 4]
    assert service.status is TaskStatus.FAILED
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "service 'prices' failed in attempt 'prices#1' and is restarted in 2 s"),
        ("WARNING", "service 'prices' failed in attempt 'prices#2' and is restarted in 4 s"),
        ("ERROR", "task 'prices' failed and nobody awaits it"),
    ]
    errors = [str(record.exc_info[1]) for record in caplog.records if record.exc_info]
    assert errors == ["failure 1", "failure 2", "failure 3"]
    text = caplog.text
    assert (
        "service 'prices' gave up after 3 failures within 60 s; the last one was that of attempt 'prices#3'"
    ) in text
    with pytest.raises(ConnectionError, match=r"^failure 3"):
        await manager.wait_for_task("prices")


async def test_only_giving_up_is_an_error_for_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    """``on_error`` is called for the service that is given up, not for its attempts."""
    errors: list[tuple[str, str]] = []

    def note(info: TaskInfo, error: BaseException) -> None:
        errors.append((info.name, str(error)))

    manager = TaskManager(on_error=note)
    await manager.start_service("prices", Flaky(99), restart=RestartPolicy(max_failures=2))
    await asyncio.sleep(100)
    assert errors == [("prices", "failure 2")]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_waiter_of_the_service_gets_its_error(caplog: pytest.LogCaptureFixture) -> None:
    """If code waits for a service, the error is raised there and not logged."""
    manager = TaskManager()
    service = await manager.start_service("prices", Flaky(99), restart=RestartPolicy(max_failures=1))
    with pytest.raises(ConnectionError, match="failure 1") as caught:
        await service
    note = "service 'prices' gave up after one failure, that of attempt 'prices#1'"
    assert caught.value.__notes__ == [note]
    assert not caplog.records


async def test_failures_long_ago_do_not_count() -> None:
    """A service that fails now and then is never given up."""
    manager = TaskManager()
    work = Flaky(99, after=40)
    policy = RestartPolicy(max_failures=3, within=100, delay=1, factor=1, max_delay=1, jitter=0)
    service = await manager.start_service("prices", work, restart=policy)
    await asyncio.sleep(30)
    work.after = 60
    await asyncio.sleep(3000)
    assert not service.done()
    assert len(work.began) > 40
    await manager.shutdown(0)


async def test_failing_factory_is_a_failed_attempt(caplog: pytest.LogCaptureFixture) -> None:
    """A factory that raises makes an attempt that fails, and is called again."""
    manager = TaskManager()
    calls = itertools.count(1)

    def factory() -> Coroutine[Any, Any, int]:
        if next(calls) < 3:
            raise OSError("no connection")
        return give(1)

    service = await manager.start_service("prices", factory, restart=STEADY)
    assert await service == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


async def test_factory_that_makes_no_coroutine_is_given_up_at_once() -> None:
    """Another attempt cannot fix an error in the code."""
    manager = TaskManager()

    def factory() -> int:
        return 1

    wrong: Any = factory
    service = await manager.start_service("prices", wrong)
    with pytest.raises(TypeError, match="declare it as `async def factory") as caught:
        await service
    assert "factory() returned 1" in str(caught.value)


async def test_exception_that_is_no_failure_ends_the_service() -> None:
    """A BaseException of the user's own is not followed by another attempt."""

    class Stop(BaseException):
        pass

    async def work() -> None:
        raise Stop

    manager = TaskManager()
    service = await manager.start_service("prices", work)
    with pytest.raises(Stop):
        await service
    assert counters(manager) == {"created": 2, "failed": 2, "remembered": 2}


@pytest.mark.parametrize("cancelled", [False, True], ids=["alone", "cancelled"])
def test_exit_passes_through_the_loop_once(cancelled: bool, caplog: pytest.LogCaptureFixture) -> None:
    """``SystemExit`` ends the loop's run, and the service with it: cancelled, and not raised again."""
    manager = TaskManager()
    kept: list[ManagedTask[Any]] = []

    async def work() -> None:
        try:
            await asyncio.sleep(1)
        finally:
            sys.exit(3)

    async def main() -> None:
        kept.append(await manager.start_service("prices", work))
        await settle()
        if cancelled:
            kept[0].cancel("enough")
        await rest()

    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        with pytest.raises(SystemExit):
            runner.run(main())
        runner.run(settle())
        (service,) = kept
        assert service.cancelled()
        assert service.cause is not None
        kind, message = (service.cause.kind, service.cause.message)
    if cancelled:
        assert (kind, message) == (CancelKind.EXPLICIT, "enough")
    else:
        assert (kind, message) == (CancelKind.SIBLING_FAILED, "prices#1 raised SystemExit(3)")
    assert not caplog.records


# -- cancelling ------------------------------------------------------------------------------------


async def test_cancelling_the_service_cancels_its_attempt() -> None:
    """The attempt is cancelled for the same cause, nothing restarts, and the service ends after it."""
    manager = TaskManager()
    order: list[str] = []

    async def work() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(3)
            order.append("cleaned up")

    service = await manager.start_service("prices", work)
    await settle()
    attempt = manager.get_task("prices#1")
    assert await manager.cancel_task("prices", "no longer wanted")
    order.append("service ended")
    assert order == ["cleaned up", "service ended"]
    assert (service.status, attempt.status) == (TaskStatus.CANCELLED, TaskStatus.CANCELLED)
    assert service.cause is attempt.cause
    assert service.cause is not None
    assert service.cause.message == "no longer wanted"
    assert counters(manager) == {"created": 2, "cancelled": 2, "remembered": 2}


async def test_cancel_reaches_the_attempt_in_one_turn() -> None:
    """The attempt is cancelled one turn of the loop after the service."""
    manager = TaskManager()
    service = await manager.start_service("prices", rest)
    await settle()
    attempt = manager.get_task("prices#1")
    service.cancel()
    await asyncio.sleep(0)
    assert attempt.status is TaskStatus.CANCELLING
    await manager.join()


async def test_cancel_that_no_task_asks_for_is_forwarded() -> None:
    """A request from a bare callback, whose cause is not noted, reaches the attempt with its message."""
    manager = TaskManager()
    service = await manager.start_service("prices", rest)
    await settle()
    attempt = manager.get_task("prices#1")
    asyncio.get_running_loop().call_soon(service.cancel, "from a callback")
    await manager.join()
    assert [(task.cause.kind, task.cause.message) for task in (service, attempt) if task.cause] == [
        (CancelKind.EXPLICIT, "from a callback")
    ] * 2


async def test_service_cancelled_before_its_first_step_makes_no_attempt() -> None:
    """Cancelled at once, a service does not even call its factory."""
    manager = TaskManager()
    work = Flaky(0)
    service = await manager.start_service("prices", work)
    service.cancel()
    await manager.join()
    assert service.cancelled()
    assert not work.began
    assert manager.stats().created == 1


async def test_service_cancelled_in_its_delay_ends_at_once() -> None:
    """While it waits for the next attempt there is nothing to wait for."""
    manager = TaskManager()
    work = Flaky(99)
    service = await manager.start_service("prices", work, restart=RestartPolicy(delay=50))
    await asyncio.sleep(1)
    start = now()
    assert await manager.cancel_task("prices")
    assert now() == start
    assert service.cancelled()
    assert len(work.began) == 1


async def test_attempt_is_cancelled_as_often_as_its_service() -> None:
    """One request interrupts the attempt once, a second one its clean-up, as ``await attempt`` would."""
    manager = TaskManager()
    interrupted: list[int] = []

    async def work() -> None:
        for number in range(3):
            try:
                await rest()
            except asyncio.CancelledError:
                interrupted.append(number)
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1)
                if number == 1:
                    raise

    service = await manager.start_service("prices", work)
    await settle()
    service.cancel()
    await asyncio.sleep(5)
    assert interrupted == [0]
    service.cancel()
    await manager.join()
    assert interrupted == [0, 1]
    assert service.cancelled()


@pytest.mark.parametrize("shut", [False, True], ids=["group", "shutdown"])
async def test_cleanup_is_not_interrupted_by_a_cancelled_group(shut: bool) -> None:
    """If service and attempt are cancelled together, the attempt is cancelled once."""
    manager = TaskManager()
    clean = []

    async def work() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(1)
            clean.append(True)

    service = await manager.start_service("prices", work, group="feeds")
    await settle()
    attempt = manager.get_task("prices#1")
    if shut:
        assert (await manager.shutdown(grace=0)).cancelled == 2
    else:
        assert await manager.cancel_group("feeds", "why") == 2
    assert clean == [True]
    kind = CancelKind.SHUTDOWN if shut else CancelKind.EXPLICIT
    assert kind_of(service) is kind_of(attempt) is kind


async def test_stubborn_attempt_is_reported_as_for_any_task(caplog: pytest.LogCaptureFixture) -> None:
    """A service whose attempt ignores its cancellation and returns has ignored it too."""
    manager = TaskManager()
    service = await manager.start_service("prices", lambda: ignore_cancels(2))
    await settle()
    assert not await manager.cancel_task("prices")
    assert service.result() == "ignored"
    assert service.cancel_ignored
    assert len(caplog.messages) == 2


async def test_failure_over_a_cancellation_is_the_services() -> None:
    """An error that a cancelled attempt raises is raised by the service, which does not restart."""
    manager = TaskManager()

    async def work() -> None:
        try:
            await rest()
        except asyncio.CancelledError:
            raise OSError("could not close") from None

    service = await manager.start_service("prices", work)
    await settle()
    service.cancel()
    with pytest.raises(OSError, match="could not close"):
        await service
    assert manager.stats().created == 2


async def test_failure_in_the_turn_of_the_cancellation_is_not_lost() -> None:
    """An attempt that fails just as its service is cancelled is not restarted, and is reported."""
    manager = TaskManager()
    go = asyncio.Event()

    async def work() -> None:
        await go.wait()
        raise OSError("just now")

    service = await manager.start_service("prices", work)
    await settle()
    go.set()
    await asyncio.sleep(0)
    service.cancel()
    with pytest.raises(OSError, match="just now"):
        await service
    assert manager.stats().created == 2


async def test_cancelled_attempt_ends_the_service() -> None:
    """A cancelled attempt is not restarted: the service ends with it, for the same cause."""
    manager = TaskManager()
    service = await manager.start_service("prices", rest)
    await settle()
    attempt = manager.get_task("prices#1")
    assert await manager.cancel_task("prices#1", "stop this")
    await settle()
    assert service.cancelled()
    assert service.cause is attempt.cause
    assert service.cause is not None
    assert service.cause.message == "stop this"


async def test_stray_cancellation_is_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A CancelledError out of something that the attempt awaited is followed by another attempt."""
    manager = TaskManager()
    futures: list[asyncio.Future[int]] = []

    async def work() -> int:
        futures.append(asyncio.get_running_loop().create_future())
        return await futures[-1]

    service = await manager.start_service("prices", work, restart=STEADY)
    await settle()
    futures[0].cancel("by its other end")
    await asyncio.sleep(10)
    assert len(futures) == 2
    (record,) = caplog.records
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert str(error) == "attempt 'prices#1' ended with a CancelledError that no request caused"
    assert error is not None
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert "await futures[-1]" in caplog.text
    futures[1].set_result(1)
    assert await service == 1


async def test_group_stays_usable_after_its_service_was_cancelled() -> None:
    """Cancelling a labeled group ends its service for good; another may be started there."""
    manager = TaskManager()
    first = await manager.start_service("prices", Flaky(99), group="feeds")
    await settle()
    assert await manager.cancel_group("feeds") == 1
    assert first.cancelled()
    work = Flaky(1)
    await manager.start_service("prices", work, group="feeds", restart=STEADY)
    await asyncio.sleep(10)
    assert len(work.began) == 2
    await manager.shutdown(0)


# -- names and refusals ----------------------------------------------------------------------------


async def test_name_that_is_taken_is_refused() -> None:
    """A second service of the same name is refused, and its factory is not called."""
    manager = TaskManager()
    await manager.start_service("prices", rest)
    work = Flaky(0)
    with pytest.raises(TaskExistsError):
        await manager.start_service("prices", work)
    assert not work.began
    await manager.shutdown(0)


async def test_service_may_replace_another() -> None:
    """The new service begins when the old one, its attempt included, has ended."""
    manager = TaskManager()
    order: list[str] = []

    async def old() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(2)
            order.append("old ended")

    async def new() -> None:
        order.append("new began")
        await rest()

    first = await manager.start_service("prices", old)
    await settle()
    second = await manager.start_service("prices", new, on_conflict="replace")
    await settle()
    assert order == ["old ended", "new began"]
    assert kind_of(first) is CancelKind.REPLACED
    assert manager.get_task("prices") is second
    await manager.shutdown(0)


async def test_caller_cancelled_while_it_replaces_starts_nothing() -> None:
    """The old service stays cancelled, and no new one is made."""
    manager = TaskManager()

    async def old() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(2)

    work = Flaky(0)
    first = await manager.start_service("prices", old)
    await settle()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await manager.start_service("prices", work, on_conflict="replace")
    await manager.join()
    assert first.cancelled()
    assert not work.began


async def test_live_service_may_be_had_instead() -> None:
    """With ``on_conflict="return"`` starting a service twice gives the same one."""
    manager = TaskManager()
    first = await manager.start_service("prices", rest)
    assert await manager.start_service("prices", rest, on_conflict="return") is first
    await manager.shutdown(0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            ("prices", 1),
            {},
            TypeError,
            "takes a function that returns a coroutine, got 1: write start_service",
        ),
        (("", rest), {}, ValueError, "service name must not be empty"),
        (("prices", rest), {"restart": 3}, TypeError, "restart must be a RestartPolicy, got 3"),
        (("prices", rest), {"priority": 9}, ValueError, "priority must be one of"),
        (("prices", rest), {"metadata": 9}, TypeError, "metadata must be a mapping"),
        (("prices", rest), {"on_conflict": "no"}, ValueError, "on_conflict must be one of"),
        (("prices", rest), {"group": 3}, TypeError, "group must be a name or a TaskGroup"),
    ],
)
async def test_wrong_use_is_refused(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A wrong argument is refused at once, with what it has to be, and leaves nothing behind."""
    manager = TaskManager()
    with pytest.raises(error, match=message):
        await manager.start_service(*arguments, **options)
    assert manager.stats().created == 0


@pytest.mark.parametrize("options", [{}, {"group": 3}], ids=["alone", "with another mistake"])
async def test_coroutine_instead_of_a_factory_is_refused_and_closed(options: Any) -> None:
    """A coroutine can run only once: it is closed, and the message shows what to write."""
    manager = TaskManager()
    coro: Any = give(1)
    with pytest.raises(TypeError, match=r"runs only once|group must be"):
        await manager.start_service("prices", coro, **options)
    assert coro.cr_frame is None


async def test_scoped_group_is_refused() -> None:
    """A service would keep a block from ending, and what fails in it would cancel the block."""
    manager = TaskManager()
    async with manager.group("block") as group:
        with pytest.raises(ValueError, match="ends with its block or its request, and a service runs on"):
            await manager.start_service("prices", rest, group=group)


async def test_closed_manager_is_refused() -> None:
    """After a shutdown no service is started."""
    manager = TaskManager()
    await manager.shutdown()
    with pytest.raises(ManagerClosedError):
        await manager.start_service("prices", rest)


# -- shutdown --------------------------------------------------------------------------------------


async def test_services_are_cancelled_last() -> None:
    """In a shutdown other work, also of high priority, has ended before a service is cancelled."""
    manager = TaskManager()
    order: list[str] = []

    async def work(name: str) -> None:
        try:
            await rest()
        finally:
            order.append(name)

    await manager.start_service("service", lambda: work("service"))
    for name, priority in [("high", TaskPriority.HIGH), ("low", TaskPriority.LOW)]:
        manager.create_task(work(name), priority=priority)
    await settle()
    await manager.shutdown(grace=1)
    assert order == ["low", "high", "service"]


async def test_shutdown_does_not_wait_its_grace_for_services() -> None:
    """A service does not end on its own: it is cancelled as soon as all other tasks have ended."""
    manager = TaskManager()
    service = await manager.start_service("prices", rest)
    manager.create_task(asyncio.sleep(2))
    await settle()
    start = now()
    report = await manager.shutdown(grace=10)
    assert now() - start == 2
    assert report.completed == 1
    assert kind_of(service) == CancelKind.SHUTDOWN


async def test_service_may_be_less_urgent() -> None:
    """The priority that a service is given is its attempts' too."""
    manager = TaskManager()
    service = await manager.start_service("prices", rest, priority=TaskPriority.LOW)
    await settle()
    assert service.priority is manager.get_task("prices#1").priority is TaskPriority.LOW
    await manager.shutdown(0)


async def test_failure_in_a_shutdown_is_not_started_again(caplog: pytest.LogCaptureFixture) -> None:
    """An attempt that fails in the grace is the last; the service ends as cancelled by the shutdown."""
    manager = TaskManager("app")
    work = Flaky(1, after=3)
    service = await manager.start_service("prices", work)
    # The grace lasts as long as other work.
    manager.create_task(asyncio.sleep(4))
    await settle()
    await manager.shutdown(grace=10)
    assert (service.status, kind_of(service)) == (TaskStatus.CANCELLED, CancelKind.SHUTDOWN)
    assert len(work.began) == 1
    assert caplog.messages == [
        "service 'prices' failed in attempt 'prices#1' and is not restarted "
        "(shutdown: manager 'app' is shutting down)"
    ]


async def test_service_in_its_delay_does_not_hold_up_a_shutdown() -> None:
    """A service that waits for its next attempt ends as soon as the shutdown begins."""
    manager = TaskManager()
    service = await manager.start_service("prices", Flaky(99), restart=RestartPolicy(delay=50))
    await asyncio.sleep(1)
    start = now()
    await manager.shutdown(grace=10)
    assert now() == start
    assert (service.status, kind_of(service)) == (TaskStatus.CANCELLED, CancelKind.SHUTDOWN)


async def test_group_cancelled_in_the_delay_starts_nothing_in_its_grace() -> None:
    """A service that waits for its next attempt ends when its group's cancel event is set, for that cause."""
    manager = TaskManager()
    work = Flaky(99)
    service = await manager.start_service("prices", work, group="feeds", restart=RestartPolicy(delay=2))
    manager.create_task(asyncio.sleep(5), group="feeds")
    await settle()
    start = now()
    await manager.cancel_group("feeds", "enough", grace=10)
    assert service.info().ended_at == start
    assert service.cause is not None
    assert service.cause.message == "enough"
    assert len(work.began) == 1


async def test_service_started_in_the_turn_of_a_shutdown_ends_with_it() -> None:
    """A service that has not made its first attempt yet makes none, and fails at nothing."""
    manager = TaskManager()
    work = Flaky(0)
    service = await manager.start_service("prices", work)
    await manager.shutdown(grace=10)
    assert (service.status, kind_of(service)) == (TaskStatus.CANCELLED, CancelKind.SHUTDOWN)
    assert not work.began


async def test_attempt_that_will_not_stop_is_listed_with_its_service(
    caplog: pytest.LogCaptureFixture, spans: SpanRecorder
) -> None:
    """The report names both, and the attempt's span is ended as abandoned."""
    manager = TaskManager(tracer_provider=spans.provider)
    await manager.start_service("prices", lambda: ignore_cancels(50))
    await settle()
    report = await manager.shutdown(grace=0, timeout=4)
    assert set(report.still_running) == {"prices", "prices#1"}
    await manager.join()
    assert attribute(spans.span("prices"), "otel_tasks.task.outcome") == "abandoned"
    assert "did not stop" in caplog.text


# -- places ----------------------------------------------------------------------------------------


async def test_only_the_attempt_takes_a_place() -> None:
    """Under a limit of one a service and its attempt run, and the place is free while it waits to restart."""
    manager = TaskManager(max_concurrency=1)
    work = Flaky(1, after=1)
    await manager.start_service("prices", work, restart=RestartPolicy(delay=10, jitter=0))
    await settle()
    order: list[float] = []

    async def other() -> None:
        order.append(now())

    task = manager.create_task(other())
    assert task.status is TaskStatus.PENDING
    await task
    assert order == [work.began[0] + 1]
    await asyncio.sleep(20)
    assert len(work.began) == 2
    await manager.shutdown(0)


async def test_limit_that_comes_later_does_not_count_the_supervisor() -> None:
    """A limit that is set while a service runs counts its attempt alone."""
    manager = TaskManager()
    await manager.start_service("prices", rest)
    await settle()
    manager.max_concurrency = 2
    manager.get_group("root").max_concurrency = 2
    assert await manager.create_task(give(1)) == 1
    manager.max_concurrency = 1
    task = manager.create_task(give(1))
    await settle()
    assert task.status is TaskStatus.PENDING
    await manager.shutdown(0)


async def test_attempt_waits_for_its_place_ahead_of_others() -> None:
    """An attempt queues as any task, by its priority; what it waited is no part of how long it ran."""
    manager = TaskManager(max_concurrency=1)
    busy = manager.create_task(asyncio.sleep(5))
    order: list[str] = []

    async def note(name: str) -> None:
        order.append(name)

    tasks = [manager.create_task(note("other"))]
    tasks.append(await manager.start_service("prices", lambda: note("service")))
    await asyncio.wait([busy, *tasks])
    assert order == ["service", "other"]


async def test_waiting_for_a_place_is_not_running_well() -> None:
    """An attempt that waited long and failed at once does not reset the delay."""
    manager = TaskManager(max_concurrency=1)
    work = Flaky(3)
    policy = RestartPolicy(delay=1, within=20, jitter=0)
    await manager.start_service("prices", work, restart=policy)
    await asyncio.sleep(0.5)
    manager.create_task(asyncio.sleep(30))
    await asyncio.sleep(100)
    # It failed at 0, waited 1 s, then for a place until 30.5; then after 2 s and 4 s.
    assert [time - work.began[0] for time in work.began] == [0, 30.5, 32.5, 36.5]
    await manager.shutdown(0)


async def test_full_queue_is_waited_for() -> None:
    """If the queue is full, the next attempt waits for room instead of failing."""
    manager = TaskManager(max_concurrency=1, max_queue=0)
    manager.create_task(asyncio.sleep(5))
    service = await manager.start_service("prices", lambda: give(1))
    start = now()
    assert await service == 1
    assert now() - start == 5


@pytest.mark.parametrize("max_queue", [0, 5], ids=["for room", "for a place"])
async def test_shutdown_ends_a_service_that_waits_in_line(
    max_queue: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A service whose attempt waits ends as cancelled by the shutdown, at its beginning and silently."""
    manager = TaskManager(max_concurrency=1, max_queue=max_queue)
    manager.create_task(asyncio.sleep(5))
    service = await manager.start_service("prices", rest)
    await settle()
    start = now()
    await manager.shutdown(grace=10)
    assert now() - start == 5
    assert (service.status, kind_of(service)) == (TaskStatus.CANCELLED, CancelKind.SHUTDOWN)
    assert service.info().ended_at == start
    assert not caplog.records


async def test_eager_manager_reports_a_failure_once(caplog: pytest.LogCaptureFixture) -> None:
    """An attempt that fails in its first step is the service's to report, also where tasks start eagerly."""
    manager = TaskManager(eager_start=True)
    service = await manager.start_service("prices", Flaky(1, returns=True), restart=STEADY)
    assert await service == "done"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# -- traces ----------------------------------------------------------------------------------------


async def test_each_attempt_is_a_trace_linked_to_the_one_before(spans: SpanRecorder) -> None:
    """One span per attempt, named after the service, each the root of its own trace; none for the service."""
    manager = TaskManager(tracer_provider=spans.provider)
    with spans.provider.get_tracer("test").start_as_current_span("startup") as startup:
        service = await manager.start_service("prices", Flaky(2, returns=True), restart=STEADY)
    await service
    attempts = spans.spans("prices")
    first, second, third = map(context_of, attempts)
    assert len(spans.finished) == 4
    assert [span.parent for span in attempts] == [None, None, None]
    assert len({first.trace_id, second.trace_id, third.trace_id}) == 3
    assert [links_of(span) for span in attempts] == [
        [(startup.get_span_context(), "spawned_by")],
        [(first, "restart_of")],
        [(second, "restart_of")],
    ]
    ids = [attribute(span, "otel_tasks.task.id") for span in attempts]
    assert ids == ["prices#1", "prices#2", "prices#3"]
    outcomes = [attribute(span, "otel_tasks.task.outcome") for span in attempts]
    assert outcomes == ["error", "error", "success"]
    assert service.trace_id is None


async def test_no_span_is_open_between_two_attempts(spans: SpanRecorder) -> None:
    """While a service waits to restart, nothing of it is left to be exported."""
    manager = TaskManager(tracer_provider=spans.provider)
    await manager.start_service("prices", Flaky(99), restart=RestartPolicy(delay=50))
    await asyncio.sleep(1)
    assert spans.open == ()
    assert spans.names == ["prices"]
    await manager.shutdown(0)


async def test_link_to_the_predecessor_is_the_attempts_own(spans: SpanRecorder) -> None:
    """A task that an attempt starts is linked to that attempt, as spawned by it."""
    manager = TaskManager(tracer_provider=spans.provider)
    calls = itertools.count()

    async def work() -> None:
        manager.create_task(give(1), name="child", trace="new")
        if next(calls) == 0:
            raise ConnectionError

    await (await manager.start_service("prices", work))
    await manager.join()
    for child, attempt in zip(spans.spans("child"), spans.spans("prices"), strict=True):
        assert links_of(child) == [(context_of(attempt), "spawned_by")]


async def test_attempt_that_queued_is_linked_too(spans: SpanRecorder) -> None:
    """A span that starts when its task gets a place has the link to the attempt before."""
    manager = TaskManager(tracer_provider=spans.provider, max_concurrency=1)
    service = await manager.start_service("prices", Flaky(1, returns=True), restart=STEADY)
    await asyncio.sleep(0.5)
    manager.create_task(asyncio.sleep(5), name="busy")
    await service
    first, second = spans.spans("prices")
    assert second.parent is None
    assert links_of(second) == [(context_of(first), "restart_of")]
    await manager.join()


async def test_cancelled_attempt_is_linked_to_the_cause_of_the_service(spans: SpanRecorder) -> None:
    """The span in which a service is cancelled is the cause on its attempt's span."""
    manager = TaskManager(tracer_provider=spans.provider)
    service = await manager.start_service("prices", rest)
    await settle()
    with spans.provider.get_tracer("test").start_as_current_span("admin") as admin:
        service.cancel("enough")
    await manager.join()
    span = spans.span("prices")
    assert links_of(span) == [(admin.get_span_context(), "cancelled_by")]
    assert attribute(span, "otel_tasks.cancel.message") == "enough"


async def test_log_names_the_trace_and_is_not_the_callers(
    spans: SpanRecorder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning has the attempt's trace id in it, and is not logged inside the span of the starter."""
    current: list[trace.Span] = []

    def note(_: logging.LogRecord) -> bool:
        current.append(trace.get_current_span())
        return True

    # Not with addFilter(): the handler is that of all tests.
    monkeypatch.setattr(caplog.handler, "filters", [note])
    manager = TaskManager(tracer_provider=spans.provider)
    with spans.provider.get_tracer("test").start_as_current_span("request"):
        await manager.start_service("prices", Flaky(9), restart=RestartPolicy(max_failures=2))
    await asyncio.sleep(100)
    first, second = (f"{context_of(span).trace_id:032x}" for span in spans.spans("prices"))
    assert f"attempt 'prices#1' (trace {first}) and is restarted" in caplog.messages[0]
    assert f"attempt 'prices#2' (trace {second})" in caplog.text
    assert [span.get_span_context().is_valid for span in current] == [False, False]


# -- nothing is left -------------------------------------------------------------------------------


Scenario = tuple[dict[str, Any], "Callable[[], Coroutine[Any, Any, object]]"]


async def _slow_to_stop() -> None:
    try:
        await rest()
    finally:
        await asyncio.sleep(1)


SCENARIOS: dict[str, Scenario] = {
    "fails": ({}, Flaky(99, after=1)),
    "slow to stop": ({}, _slow_to_stop),
    "waits for a place": ({"max_concurrency": 1}, Flaky(99)),
    "waits for room": ({"max_concurrency": 1, "max_queue": 0}, Flaky(99)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_cancelled_at_each_await_it_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, spans: SpanRecorder
) -> None:
    """A supervisor that is cancelled at its first await, at its second, ... ends with its attempt."""
    options, factory = SCENARIOS[name]
    supervise = Service.run
    for number in itertools.count(1):
        reached: list[CancelledAt] = []

        async def interrupted(self: Service[Any], number: int = number, reached: Any = reached) -> object:
            driver = CancelledAt(number, supervise(self))
            reached.append(driver)
            return await driver

        monkeypatch.setattr(Service, "run", interrupted)
        manager = TaskManager(tracer_provider=spans.provider, **options)
        run(_cancelled_service(manager, factory))
        spans.check()
        if not reached[0].reached:
            break
    assert number >= 2


async def _cancelled_service(
    manager: TaskManager, factory: Callable[[], Coroutine[Any, Any, object]]
) -> None:
    if manager.max_concurrency:
        manager.create_task(asyncio.sleep(20))
    policy = RestartPolicy(delay=2, max_failures=3)
    service = await manager.start_service("prices", factory, restart=policy)
    await asyncio.wait([service], timeout=60)
    if service.done():
        assert service.cancelled() or isinstance(service.exception(), ConnectionError)
    report = await manager.shutdown(grace=0.0, timeout=100.0)
    assert report.clean
    assert manager.stats().live == 0
    assert manager.stats().queued == 0
    assert not manager._ledger.places.limiter.used
    await settle()
    await assert_no_tasks_left()
    gc.collect()


async def test_given_up_service_holds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The tasks of a service that was given up are freed without the garbage collector."""
    caplog.set_level(logging.CRITICAL, logger="otel_tasks")
    manager = TaskManager()
    work = Flaky(99)
    service = await manager.start_service("prices", work, restart=RestartPolicy(max_failures=2))
    await asyncio.sleep(100)
    tasks = [weakref.ref(service), *(weakref.ref(task) for task in work.tasks if task is not None)]
    gc.disable()
    try:
        del service
        work.tasks.clear()
        assert [task() for task in tasks] == [None] * 3
    finally:
        gc.enable()


async def test_cancel_reaches_an_attempt_that_is_inside_its_own_timeout() -> None:
    """The request that a timeout makes inside of the attempt is not taken for the service's."""
    manager = TaskManager()

    async def work() -> str:
        try:
            async with asyncio.timeout(1):
                try:
                    await rest()
                finally:
                    # The timeout has requested the cancel, and withdraws it after this.
                    await asyncio.sleep(2)
        except TimeoutError:
            await rest()
        return "went on"

    service = await manager.start_service("prices", work)
    await asyncio.sleep(2)
    assert await manager.cancel_task("prices", "enough", timeout=20)
    assert service.cancelled()


async def test_service_returned_for_its_name_is_left_as_it_is() -> None:
    """on_conflict="return" gives the live task; that a shutdown waits for it does not change."""
    manager = TaskManager()
    task = manager.create_task(asyncio.sleep(1, "done"), name="x")
    assert await manager.start_service("x", rest, on_conflict="return") is task
    assert (await manager.shutdown(grace=2)).completed == 1


async def test_failed_attempt_is_freed_while_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Its exception, whose frames hold what it has used, does not stay with the service for days."""
    # The record of the warning would hold it too.
    caplog.set_level(logging.CRITICAL, logger="otel_tasks")
    used: list[weakref.ref[Flaky]] = []

    async def work() -> None:
        connection = Flaky(0)
        used.append(weakref.ref(connection))
        if len(used) == 1:
            raise ConnectionError
        await rest()

    async with TaskManager() as manager:
        await manager.start_service("prices", work, restart=STEADY)
        await asyncio.sleep(10)
        gc.collect()
        assert [connection() is None for connection in used] == [True, False]
