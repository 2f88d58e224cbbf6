"""Waiting with events: `wait_with_cancellation` and `propagate_cancellation`, for any asyncio task."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import (
    CancelCause,
    CancelEvent,
    CancelKind,
    TaskManager,
    TaskStatus,
    WaitOutcome,
    propagate_cancellation,
    wait_with_cancellation,
)
from otel_tasks._core.shields import shield, unshield
from tests.helpers import cancel_at_each_await, fail, give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from otel_tasks.testing import SpanRecorder

    Create = Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]]

CAUSE = CancelCause(CancelKind.CLIENT_DISCONNECT, "the client left")


@contextlib.asynccontextmanager
async def creating(kind: str) -> AsyncIterator[Create]:
    """A function that creates plain tasks, or one that creates managed ones."""
    if kind == "plain":
        yield asyncio.create_task
        return
    async with TaskManager() as manager:
        yield manager.create_task


both_kinds = pytest.mark.parametrize("kind", ["plain", "managed"])
both_events = pytest.mark.parametrize("make_event", [asyncio.Event, CancelEvent])


# --- outcomes ------------------------------------------------------------------------------------------


def test_only_completed_is_true() -> None:
    """An outcome is true if the task completed, and false in all other cases."""
    assert [outcome for outcome in WaitOutcome if outcome] == [WaitOutcome.COMPLETED]
    assert WaitOutcome.TIMED_OUT == "timed_out"


@both_kinds
async def test_task_that_returns_is_completed(kind: str) -> None:
    """A wait ends with its task, and the task keeps its result."""
    async with creating(kind) as create:
        task = create(give(7))
        assert await wait_with_cancellation(task, asyncio.Event(), timeout=5.0) is WaitOutcome.COMPLETED
        assert task.result() == 7


@both_kinds
async def test_task_that_has_ended_before_is_seen_at_once(kind: str) -> None:
    """A task that is done decides the wait, be its cancel event set and its timeout 0."""
    async with creating(kind) as create:
        task = create(give(7))
        await settle()
        cancel = asyncio.Event()
        cancel.set()
        assert await wait_with_cancellation(task, cancel, timeout=0) is WaitOutcome.COMPLETED


@both_kinds
async def test_task_that_raises_is_failed(kind: str) -> None:
    """A failure is an outcome; the exception stays with the task."""
    async with creating(kind) as create:
        task = create(fail(KeyError("lost")))
        outcome = await wait_with_cancellation(task)
        assert outcome is WaitOutcome.FAILED
        assert not outcome
        with pytest.raises(KeyError, match="lost"):
            task.result()


async def test_failure_that_no_code_retrieves_is_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The outcome alone does not count as having looked at the exception: asyncio logs it."""
    assert await wait_with_cancellation(fail(KeyError("lost"))) is WaitOutcome.FAILED
    gc.collect()
    assert "Task exception was never retrieved" in caplog.text


@both_kinds
async def test_task_cancelled_by_somebody_else_is_cancelled(kind: str) -> None:
    """The outcome of a cancelled task does not depend on its canceller."""
    async with creating(kind) as create:
        task = create(rest())
        asyncio.get_running_loop().call_later(1.0, task.cancel)
        assert await wait_with_cancellation(task, asyncio.Event()) is WaitOutcome.CANCELLED


# --- the cancel event ----------------------------------------------------------------------------------


@both_kinds
@both_events
async def test_cancel_event_cancels_and_waits_for_the_end(
    kind: str, make_event: Callable[[], asyncio.Event]
) -> None:
    """On the cancel event the task is cancelled, and its clean-up is over when the wait returns."""
    cleaned_at = 0.0

    async def work() -> None:
        nonlocal cleaned_at
        try:
            await rest()
        finally:
            await asyncio.sleep(2.0)
            cleaned_at = now()

    async with creating(kind) as create:
        task, cancel, begun = create(work()), make_event(), now()
        asyncio.get_running_loop().call_later(1.0, cancel.set)
        assert await wait_with_cancellation(task, cancel) is WaitOutcome.CANCELLED
        assert task.cancelled()
        assert cleaned_at == now() == begun + 3.0


@both_kinds
@both_events
async def test_cancel_event_is_acted_upon_within_one_turn(
    kind: str, make_event: Callable[[], asyncio.Event]
) -> None:
    """One turn of the loop after the event is set, the task is cancelled, and no time has passed."""
    async with creating(kind) as create:
        task, cancel, begun = create(rest()), make_event(), now()
        wait = asyncio.create_task(wait_with_cancellation(task, cancel))
        await settle()
        cancel.set()
        assert not task.cancelling()
        await asyncio.sleep(0)
        assert task.cancelling() == 1
        assert await wait is WaitOutcome.CANCELLED
        assert now() == begun


@both_kinds
async def test_cancel_event_that_is_set_already_lets_nothing_run(kind: str) -> None:
    """A task that has not started when its cancel event is set never runs any of its code."""
    ran: list[int] = []

    async def work() -> None:
        ran.append(1)

    async with creating(kind) as create:
        cancel = asyncio.Event()
        cancel.set()
        assert await wait_with_cancellation(create(work()), cancel) is WaitOutcome.CANCELLED
        assert await wait_with_cancellation(work(), cancel) is WaitOutcome.CANCELLED
    assert not ran


async def test_event_that_is_set_and_cleared_at_once_counts() -> None:
    """As for any waiter of an asyncio.Event, a set() is not undone by a clear() in the same turn."""
    task, cancel = asyncio.create_task(rest()), asyncio.Event()
    wait = asyncio.create_task(wait_with_cancellation(task, cancel))
    await settle()
    cancel.set()
    cancel.clear()
    assert await wait is WaitOutcome.CANCELLED


async def test_event_set_by_a_thread_while_the_wait_starts_counts() -> None:
    """An event that is set after it was looked at, before it is waited for, is not missed."""

    class SetMeanwhile(asyncio.Event):
        def is_set(self) -> bool:
            self.set()
            return False

    begun = now()
    assert await wait_with_cancellation(rest(), SetMeanwhile(), timeout=5.0) is WaitOutcome.CANCELLED
    task = asyncio.create_task(asyncio.sleep(1.0))
    assert await wait_with_cancellation(task, completion_event=SetMeanwhile())
    assert now() == begun
    await task


async def test_cause_of_the_event_is_that_of_the_managed_task(spans: SpanRecorder) -> None:
    """A CancelEvent hands its cause, and the span it came from, on to the task that it cancels."""
    with spans.provider.get_tracer("test").start_as_current_span("request") as request:
        cause = CancelCause.make(CancelKind.CLIENT_DISCONNECT, "the client left")
    async with TaskManager(tracer_provider=spans.provider) as manager:
        task, cancel = manager.create_task(rest(), name="work"), CancelEvent()
        asyncio.get_running_loop().call_later(1.0, cancel.set, cause)
        assert await wait_with_cancellation(task, cancel) is WaitOutcome.CANCELLED
        assert task.cause is cause
    assert spans.span("work").links[0].context == request.get_span_context()


async def test_plain_event_has_a_cause_made_for_it(spans: SpanRecorder) -> None:
    """For an event without a cause, the cause names the wait, and the span that was current there."""
    async with TaskManager(tracer_provider=spans.provider) as manager:
        task, cancel = manager.create_task(rest(), name="work"), asyncio.Event()
        asyncio.get_running_loop().call_later(1.0, cancel.set)
        with spans.provider.get_tracer("test").start_as_current_span("waiting") as waiting:
            await wait_with_cancellation(task, cancel)
        caller = asyncio.current_task()
        assert caller is not None
        assert task.cause == CancelCause(
            CancelKind.EXPLICIT,
            "its cancel event was set",
            caller.get_name(),
            now(),
            waiting.get_span_context(),
        )


async def test_plain_task_reads_the_cause_as_the_message() -> None:
    """A task that is not managed finds the cause in the text of its CancelledError."""
    told: list[object] = []

    async def work() -> None:
        try:
            await rest()
        except asyncio.CancelledError as error:
            told.extend(error.args)
            raise

    cancel = CancelEvent()
    asyncio.get_running_loop().call_later(1.0, cancel.set, CAUSE)
    await wait_with_cancellation(work(), cancel)
    assert told == ["client_disconnect: the client left"]


async def test_managed_task_is_cancelled_once() -> None:
    """The event does not cancel a task that its group has cancelled: its cleanup is not interrupted."""
    async with TaskManager() as manager:
        task = manager.create_task(clean_up_for(2.0), group="work")
        wait = asyncio.create_task(wait_with_cancellation(task, manager.get_group("work").cancel_event))
        await settle()
        assert await manager.cancel_group("work", "no longer wanted") == 1
        assert await wait is WaitOutcome.CANCELLED
        assert task.cancelling() == 1
        assert task.cause is not None
        assert task.cause.message == "no longer wanted"


async def test_plain_task_is_cancelled_once() -> None:
    """Two waits with one event cancel their task once: its cleanup is not interrupted."""
    task, cancel = asyncio.create_task(clean_up_for(2.0)), asyncio.Event()
    waits = [asyncio.create_task(wait_with_cancellation(task, cancel)) for _ in range(2)]
    await settle()
    cancel.set()
    assert await asyncio.gather(*waits) == [WaitOutcome.CANCELLED] * 2
    assert task.cancelling() == 1


async def test_task_in_a_timeout_of_its_own_is_cancelled_too() -> None:
    """A count of cancellations that stems from asyncio.timeout is no request that was made before."""
    cancel = asyncio.Event()

    async def work() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await rest()
        await rest()

    asyncio.get_running_loop().call_later(1.0, cancel.set)
    assert await wait_with_cancellation(work(), cancel) is WaitOutcome.CANCELLED
    assert now() == 1001.0


async def test_disconnect_waits_for_the_end_of_an_uncancellable_stretch() -> None:
    """A shield holds off a disconnect that comes by an event like one that comes by the group."""
    booked: list[float] = []

    async def work() -> None:
        # As `uncancellable()` does in a task of a request's group.
        shield(task)
        await asyncio.sleep(5.0)
        booked.append(now())
        unshield(task)
        await rest()

    async with TaskManager() as manager:
        task, cancel, begun = manager.create_task(work()), CancelEvent(), now()
        asyncio.get_running_loop().call_later(1.0, cancel.set, CAUSE)
        assert await wait_with_cancellation(task, cancel) is WaitOutcome.CANCELLED
        assert booked == [begun + 5.0]
        assert task.cause == CAUSE


@both_kinds
async def test_task_that_completes_anyway_is_completed(kind: str) -> None:
    """A task that swallows its cancellation and returns is never counted as cancelled."""
    async with creating(kind) as create:
        cancel = asyncio.Event()
        asyncio.get_running_loop().call_later(1.0, cancel.set)
        task = create(ignore_cancels(3.0))
        assert await wait_with_cancellation(task, cancel) is WaitOutcome.COMPLETED
        assert task.result() == "ignored"


async def test_task_that_raises_in_its_cleanup_is_failed() -> None:
    """An error on the way out is not hidden behind the cancellation."""

    async def work() -> None:
        try:
            await rest()
        finally:
            raise KeyError("lost")

    cancel = asyncio.Event()
    asyncio.get_running_loop().call_later(1.0, cancel.set)
    task = asyncio.create_task(work())
    assert await wait_with_cancellation(task, cancel) is WaitOutcome.FAILED
    assert isinstance(task.exception(), KeyError)


# --- the timeout ---------------------------------------------------------------------------------------


@both_kinds
async def test_timeout_cancels_and_waits_for_the_end(kind: str) -> None:
    """When the fallback timeout is over the task is cancelled, and has ended on return."""
    async with creating(kind) as create:
        task, begun = create(clean_up_for(1.0)), now()
        outcome = await wait_with_cancellation(task, asyncio.Event(), timeout=0.25)
        assert outcome is WaitOutcome.TIMED_OUT
        assert not outcome
        assert task.cancelled()
        assert now() == begun + 1.25


async def test_timeout_is_the_cause_of_a_managed_task() -> None:
    """A managed task that ran out of time says so, with the seconds."""
    async with TaskManager() as manager:
        task = manager.create_task(rest())
        await wait_with_cancellation(task, timeout=0.25)
        assert task.cause is not None
        assert (task.cause.kind, task.cause.message) == (CancelKind.TIMEOUT, "waited for 0.25 s")


@both_kinds
async def test_timeout_of_zero_is_now(kind: str) -> None:
    """0 is a timeout like any other, not the lack of one: a task that has not ended is cancelled."""
    async with creating(kind) as create:
        begun = now()
        assert await wait_with_cancellation(create(rest()), timeout=0) is WaitOutcome.TIMED_OUT
        assert now() == begun


async def test_timeout_that_finds_a_task_cancelled_leaves_it_its_reason() -> None:
    """A task that was cancelled before is cancelled, not timed out, however long its cleanup takes."""
    async with TaskManager() as manager:
        task = manager.create_task(clean_up_for(2.0))
        await settle()
        task.cancel("enough")
        assert await wait_with_cancellation(task, timeout=1.0) is WaitOutcome.CANCELLED
        assert task.cause is not None
        assert task.cause.message == "enough"


async def test_first_reason_stays() -> None:
    """A cancel event that is set while a timed-out task cleans up changes nothing, and vice versa."""
    for event_at, timeout, outcome in [
        (2.0, 1.0, WaitOutcome.TIMED_OUT),
        (1.0, 2.0, WaitOutcome.CANCELLED),
    ]:
        task, cancel = asyncio.create_task(clean_up_for(3.0)), asyncio.Event()
        asyncio.get_running_loop().call_later(event_at, cancel.set)
        assert await wait_with_cancellation(task, cancel, timeout=timeout) is outcome
        assert task.cancelling() == 1


async def test_cleanup_without_end_is_bounded_from_outside() -> None:
    """asyncio.timeout() around bounds the wait for a task that does not end; the task stays cancelled."""
    task, begun = asyncio.create_task(ignore_cancels(60.0)), now()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await wait_with_cancellation(task, timeout=1.0)
    assert now() == begun + 5.0
    assert task.cancelling() == 1
    await task


# --- the completion event ------------------------------------------------------------------------------


@both_kinds
@both_events
async def test_completion_event_ends_the_wait_and_leaves_the_task_alone(
    kind: str, make_event: Callable[[], asyncio.Event]
) -> None:
    """Once the completion event is set the wait is over, and the task runs on."""
    async with creating(kind) as create:
        task, completion, begun = create(asyncio.sleep(9.0, "late")), make_event(), now()
        asyncio.get_running_loop().call_later(1.0, completion.set)
        outcome = await wait_with_cancellation(
            task, asyncio.Event(), completion_event=completion, timeout=5.0
        )
        assert outcome is WaitOutcome.COMPLETED
        assert now() == begun + 1.0
        assert not task.cancelling()
        assert await task == "late"


async def test_completion_event_that_is_set_already_wins() -> None:
    """Completed work is not cancelled by an event that is set too."""
    task, cancel, completion = asyncio.create_task(give(1)), asyncio.Event(), asyncio.Event()
    cancel.set()
    completion.set()
    outcome = await wait_with_cancellation(task, cancel, completion_event=completion, timeout=0)
    assert outcome is WaitOutcome.COMPLETED
    assert not task.done()
    assert await task == 1


async def test_completion_event_set_in_a_finally_does_not_hide_a_failure() -> None:
    """A task that sets its completion event and raises in the same step has failed."""
    completion = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(1.0)
            raise KeyError("lost")
        finally:
            completion.set()

    task = asyncio.create_task(work())
    assert await wait_with_cancellation(task, completion_event=completion) is WaitOutcome.FAILED
    assert isinstance(task.exception(), KeyError)


@pytest.mark.parametrize("timeout", [None, 1.0])
async def test_completion_event_set_while_cleaning_up_does_not_hide_the_cancellation(
    timeout: float | None,
) -> None:
    """Events are set in `finally`, so one that is set after the cancel request decides nothing."""
    completion, cancel = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            await rest()
        finally:
            completion.set()
            await asyncio.sleep(1.0)

    if timeout is None:
        asyncio.get_running_loop().call_later(1.0, cancel.set)
    task = asyncio.create_task(work())
    outcome = await wait_with_cancellation(task, cancel, completion_event=completion, timeout=timeout)
    assert outcome is (WaitOutcome.CANCELLED if timeout is None else WaitOutcome.TIMED_OUT)
    assert task.cancelled()


async def test_events_of_one_turn_are_taken_in_their_order() -> None:
    """Of two events set in the same turn, the first decides."""
    for first, outcome in [("cancel", WaitOutcome.CANCELLED), ("completion", WaitOutcome.COMPLETED)]:
        task, cancel, completion = asyncio.create_task(rest()), asyncio.Event(), asyncio.Event()
        wait = asyncio.create_task(wait_with_cancellation(task, cancel, completion_event=completion))
        await settle()
        for event in (cancel, completion) if first == "cancel" else (completion, cancel):
            event.set()
        assert await wait is outcome
        assert task.cancelling() == (first == "cancel")
        task.cancel()
        await asyncio.wait([task])


async def test_task_that_ends_in_the_turn_of_its_event_is_completed() -> None:
    """A task that has returned by the time the event is acted upon is not cancelled any more."""
    cancel = asyncio.Event()

    async def work() -> str:
        await asyncio.sleep(1.0)
        cancel.set()
        return "done"

    task = asyncio.create_task(work())
    assert await wait_with_cancellation(task, cancel) is WaitOutcome.COMPLETED
    assert task.result() == "done"


# --- coroutines and futures ----------------------------------------------------------------------------


async def test_coroutine_is_run_to_its_end() -> None:
    """A coroutine is run as a task of the wait's own."""
    ran: list[int] = []

    async def work() -> None:
        await asyncio.sleep(1.0)
        ran.append(1)

    assert await wait_with_cancellation(work())
    assert ran == [1]


async def test_coroutine_continues_after_its_completion_event() -> None:
    """A coroutine whose completion event is set runs on, and is not lost to the garbage collector."""
    completion, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        completion.set()
        # Held by nothing but its own task: a cycle that a collection would take.
        waiting = asyncio.get_running_loop().create_future()
        wake = weakref.ref(waiting)

        def wake_up() -> None:
            if (future := wake()) is not None:
                future.set_result(None)

        asyncio.get_running_loop().call_later(5.0, wake_up)
        await waiting
        ended.set()

    assert await wait_with_cancellation(work(), completion_event=completion)
    gc.collect()
    async with asyncio.timeout(6.0):
        await ended.wait()


async def test_bare_future_can_be_waited_for() -> None:
    """A future that is no task, such as that of gather(), is waited for and cancelled like a task."""
    task, cancel = asyncio.create_task(rest()), asyncio.Event()
    asyncio.get_running_loop().call_later(1.0, cancel.set)
    assert await wait_with_cancellation(asyncio.gather(task), cancel) is WaitOutcome.CANCELLED
    assert task.cancelled()


# --- the waiter's own cancellation ---------------------------------------------------------------------


@both_kinds
async def test_cancelled_waiter_leaves_the_task_alone(kind: str) -> None:
    """The waiter's own cancellation is raised at once, and is none of the task."""
    async with creating(kind) as create:
        task, cancel, begun = create(asyncio.sleep(5.0, "done")), asyncio.Event(), now()
        wait = asyncio.create_task(
            wait_with_cancellation(task, cancel, completion_event=CancelEvent(), timeout=60)
        )
        await settle()
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
        assert now() == begun
        assert not task.cancelling()
        cancel.set()
        assert await task == "done"


async def test_cancelled_waiter_takes_its_coroutine_along() -> None:
    """A coroutine belongs to the wait: it is cancelled with it, and has ended when the waiter has."""
    cleaned: list[float] = []

    async def work() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(1.0)
            cleaned.append(now())

    wait = asyncio.create_task(wait_with_cancellation(work(), asyncio.Event()))
    await settle()
    wait.cancel()
    with pytest.raises(asyncio.CancelledError):
        await wait
    assert cleaned == [now()]


async def test_waiter_cancelled_twice_does_not_wait_for_its_coroutine() -> None:
    """A second cancellation ends the wait for the cleanup, which continues undisturbed."""
    cleaned: list[float] = []

    async def work() -> None:
        try:
            await rest()
        finally:
            await asyncio.sleep(5.0)
            cleaned.append(now())

    begun = now()
    wait = asyncio.create_task(wait_with_cancellation(work()))
    for seconds in (1.0, 2.0):
        asyncio.get_running_loop().call_later(seconds, wait.cancel)
    with pytest.raises(asyncio.CancelledError):
        await wait
    assert now() == begun + 2.0
    await asyncio.sleep(5.0)
    assert cleaned == [begun + 6.0]


async def test_waiter_cancelled_in_the_turn_of_the_outcome_is_cancelled() -> None:
    """A cancellation that meets an outcome is not swallowed for its sake."""
    task = asyncio.create_task(asyncio.sleep(1.0))
    wait = asyncio.create_task(wait_with_cancellation(task))
    task.add_done_callback(lambda _: wait.cancel())
    with pytest.raises(asyncio.CancelledError):
        await wait


@pytest.mark.parametrize("how", ["plain", "managed", "coroutine"])
def test_nothing_is_leaked_wherever_a_wait_is_cancelled(how: str, spans: SpanRecorder) -> None:
    """Cancelled at any of its awaits, a wait leaves no task, and no waiter in its events."""

    async def scenario(manager: TaskManager) -> None:
        cancel, completion = asyncio.Event(), CancelEvent()
        work: Any = clean_up_for(1.0)
        if how != "coroutine":
            work = asyncio.create_task(work) if how == "plain" else manager.create_task(work)
        asyncio.get_running_loop().call_later(1.0, cancel.set)
        try:
            await wait_with_cancellation(work, cancel, completion_event=completion, timeout=5.0)
        finally:
            assert not cancel._waiters
            assert not completion._waiters
            if how == "plain" and not work.done():
                work.cancel()
                await asyncio.wait([work])

    assert cancel_at_each_await(scenario, spans) == 1


# --- refusals ------------------------------------------------------------------------------------------


async def test_task_cannot_wait_for_itself() -> None:
    """A task that would wait for itself gets an error."""
    caller = asyncio.current_task()
    assert caller is not None
    with pytest.raises(RuntimeError, match="wait for itself: it would wait forever; pass another task"):
        await wait_with_cancellation(caller)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timeout": -1}, "timeout must be at least 0 seconds"),
        ({"timeout": float("nan")}, "timeout must be at least 0 seconds"),
        ({"timeout": "5"}, "timeout must be seconds as a number"),
        ({"cancel_event": threading.Event()}, "cancel_event must be an asyncio.Event"),
        ({"completion_event": True}, "completion_event must be an asyncio.Event"),
    ],
)
async def test_wrong_arguments_are_refused_and_the_coroutine_closed(
    arguments: dict[str, Any], message: str
) -> None:
    """The message names the argument, and a coroutine beside it is closed; a task keeps running."""
    with pytest.raises((TypeError, ValueError), match=message):
        await wait_with_cancellation(rest(), **arguments)
    task = asyncio.create_task(give(1))
    with pytest.raises((TypeError, ValueError), match=message):
        await wait_with_cancellation(task, **arguments)
    assert await task == 1


async def test_argument_that_is_no_task_is_refused() -> None:
    """The coroutine function instead of its coroutine gets an error with the right line."""
    with pytest.raises(
        TypeError, match=r"got <function rest.*: write wait_with_cancellation\(work\(\.\.\.\)"
    ):
        await wait_with_cancellation(rest)  # type: ignore[arg-type]  # that is what is tested


async def test_future_of_another_loop_is_refused() -> None:
    """A future of a loop that does not run here cannot be waited for."""
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(ValueError, match="different loop"):
            await wait_with_cancellation(loop.create_future())
    finally:
        loop.close()


async def test_event_of_another_loop_is_refused_and_the_coroutine_ended() -> None:
    """An event that waits in another loop is an error, and the coroutine is closed."""
    event = asyncio.Event()

    def use_elsewhere() -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run(asyncio.wait_for(event.wait(), 0.001))

    await asyncio.to_thread(use_elsewhere)
    with pytest.raises(RuntimeError, match="different event loop"):
        await wait_with_cancellation(rest(), event)


# --- propagation ---------------------------------------------------------------------------------------


async def test_propagation_sets_the_children_within_one_turn() -> None:
    """One turn of the loop after the parent is set, so are all children."""
    parent, children, begun = asyncio.Event(), [asyncio.Event() for _ in range(3)], now()
    link = asyncio.create_task(propagate_cancellation(parent, children))
    await settle()
    assert not any(child.is_set() for child in children)
    parent.set()
    await asyncio.sleep(0)
    assert all(child.is_set() for child in children)
    assert link.done()
    assert now() == begun


async def test_propagation_from_an_event_that_is_set_needs_no_waiting() -> None:
    """A parent that is set already sets its children on the spot."""
    parent, child = asyncio.Event(), asyncio.Event()
    parent.set()
    await propagate_cancellation(parent, [child])
    assert child.is_set()


async def test_cancelled_propagation_sets_nothing() -> None:
    """Cancelling the link sets no child, not even in the turn in which the parent is set."""
    for parent_is_set in (False, True):
        parent, child = asyncio.Event(), asyncio.Event()
        link = asyncio.create_task(propagate_cancellation(parent, [child]))
        await settle()
        if parent_is_set:
            parent.set()
        link.cancel()
        with pytest.raises(asyncio.CancelledError):
            await link
        assert not child.is_set()
        assert not parent._waiters


async def test_propagation_passes_the_cause_on() -> None:
    """Between CancelEvents the cause goes along; a plain event on either side has none to give or take."""
    parent, child, plain = CancelEvent(), CancelEvent(), asyncio.Event()
    parent.set(CAUSE)
    await propagate_cancellation(parent, [child, plain])
    assert child.cause is CAUSE
    assert plain.is_set()

    orphan = CancelEvent()
    await propagate_cancellation(plain, [orphan])
    assert orphan.cause is not None
    assert orphan.cause.kind is CancelKind.EXPLICIT


async def test_child_added_later_is_reached() -> None:
    """The children are looked up when the parent is set, so a list may grow until then."""
    parent, children = asyncio.Event(), [asyncio.Event()]
    link = asyncio.create_task(propagate_cancellation(parent, children))
    await settle()
    children.append(asyncio.Event())
    parent.set()
    await link
    assert all(child.is_set() for child in children)


async def test_child_does_not_reach_its_parent() -> None:
    """Setting a child changes nothing for its parent and siblings."""
    parent, child, sibling = asyncio.Event(), asyncio.Event(), asyncio.Event()
    link = asyncio.create_task(propagate_cancellation(parent, [child, sibling]))
    await settle()
    child.set()
    await settle()
    assert not parent.is_set()
    assert not sibling.is_set()
    parent.set()
    await link
    assert sibling.is_set()


async def test_three_levels_stop_the_work_at_the_bottom() -> None:
    """Events linked over three levels end the waits at the bottom, with no time passing."""
    top, middle, bottom = asyncio.Event(), asyncio.Event(), asyncio.Event()
    links = [
        asyncio.create_task(propagate_cancellation(top, [middle])),
        asyncio.create_task(propagate_cancellation(middle, [bottom])),
    ]
    asyncio.get_running_loop().call_later(2.0, top.set)
    begun = now()
    assert await wait_with_cancellation(rest(), bottom, timeout=60) is WaitOutcome.CANCELLED
    assert now() == begun + 2.0
    await asyncio.gather(*links)


@pytest.mark.parametrize(
    ("parent", "children", "message"),
    [
        (None, [], "parent_event must be an asyncio.Event"),
        (asyncio.Event(), asyncio.Event(), "put it in a list"),
    ],
)
async def test_wrong_events_are_refused(parent: Any, children: Any, message: str) -> None:
    """One event in the place of several, or none at all, gets an error before anything is waited for."""
    with pytest.raises(TypeError, match=message):
        await propagate_cancellation(parent, children)


# --- how it tells --------------------------------------------------------------------------------------


async def test_works_beside_a_manager_that_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A wait that cancels says so by its outcome, not in the log."""
    with caplog.at_level(logging.DEBUG, "otel_tasks"):
        async with TaskManager() as manager:
            task = manager.create_task(rest())
            assert not await wait_with_cancellation(task, timeout=1.0)
            assert task.status is TaskStatus.CANCELLED
    assert caplog.text == ""


async def clean_up_for(seconds: float) -> None:
    """Rest until cancelled, and take that time to clean up."""
    try:
        await rest()
    finally:
        await asyncio.sleep(seconds)
