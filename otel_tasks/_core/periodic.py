"""Periodic work: one run after another at a fixed rate.

Rules, each with a test of its own:

1. A periodic task is a *supervisor*, the handle that ``start_periodic`` returns, and its *runs*, each a
   managed task: ``refresh#1``, ``refresh#2``. The supervisor has no span and takes no place under a limit.
2. The rate is fixed, on the loop's clock: run times are multiples of the interval after the first one,
   however long a run or its jitter takes. Times that have passed are skipped, not made up for.
3. At most one run is live. ``overlap`` says what happens when the next one is due.
4. A failed run is reported like any failure that nobody awaits. It does not end the periodic task, unless it
   is the last of ``max_failures`` in a row.
5. Each run has a trace of its own, linked to the run before it.
6. No run starts once the group is being cancelled or the manager shuts down. Cancelling the periodic task
   cancels its run, for the same cause, and waits for it.
"""

from __future__ import annotations

import asyncio
import math
import random
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from otel_tasks._core.cancellation import call_when_set
from otel_tasks._core.checks import check_choice, check_count, checked_finite_seconds
from otel_tasks._core.events import CancelCause
from otel_tasks._core.info import PeriodicInfo
from otel_tasks._core.native import add_done_callback, failure_of
from otel_tasks._core.service import (
    create_supervised,
    create_supervisor,
    end_cancelled,
    forward_cancel,
    make_attempt,
)
from otel_tasks._core.state import CancelKind, TaskStatus
from otel_tasks._core.task import extras_of, request_cancel
from otel_tasks._core.telemetry.spans import link_next
from otel_tasks._core.waiting import wait_until_done

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.options import OnConflict
    from otel_tasks._core.state import TaskPriority
    from otel_tasks._core.task import ManagedTask

Overlap = Literal["skip", "wait", "cancel_previous"]


async def start_periodic(
    group: TaskGroup, name: str, periodic: Periodic, on_conflict: OnConflict
) -> ManagedTask[None]:
    """Start periodic work in a labeled group; see ``TaskManager.start_periodic``."""
    coro = periodic.run()
    task = await create_supervisor(
        group, "periodic task", name, coro, periodic.priority, periodic.metadata, on_conflict
    )
    # Not with on_conflict="return", which may return a task of another kind.
    if task.get_coro() is coro:
        extras_of(task).supervision = periodic
    return task


class Periodic:
    """One supervisor: it knows when the next run is due, and starts it.

    Args:
        group: The labeled group of the runs.
        factory: Makes the coroutine of each run.
        every: Seconds from one run to the next, above 0.
        jitter: The most seconds by which a run starts late, at least 0 and at most ``every``.
        start: Seconds until the first run, at least 0.
        overlap: What happens if a run is live when the next one is due.
        max_failures: How many runs in a row may fail before the periodic task does; None for any number.
        timeout: Seconds for each run; None for no limit.
        priority: That of the runs.
        metadata: Kept with each run.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        group: TaskGroup,
        factory: Callable[[], Coroutine[Any, Any, object]],
        *,
        every: float,
        jitter: float,
        start: float,
        overlap: Overlap,
        max_failures: int | None,
        timeout: float | None,
        priority: TaskPriority | int,
        metadata: Mapping[str, Any] | None,
    ) -> None:
        check_choice("overlap", overlap, Overlap)
        check_count("max_failures", max_failures, 1)
        self.priority = priority
        self.metadata = metadata
        self._times = Times(every, jitter, start)
        self._overlap = overlap
        self._max_failures = max_failures
        # A default of its group is meant for other tasks.
        self._timeout = math.inf if timeout is None else checked_finite_seconds("timeout", timeout)
        self._group = group
        self._factory = factory
        # Each run gets a copy, so that it does not see what another one has set.
        self._context = copy_context()
        self._run: ManagedTask[object] | None = None
        # A run is due, and has not started yet.
        self._is_pending = False
        self._is_triggered = False
        # What happened while the supervisor was not asleep, and the future in which it sleeps.
        self._is_awake = False
        self._sleeper: asyncio.Future[None] | None = None
        self._record = PeriodicInfo(every=self._times.every)
        self._failures_in_a_row = 0
        self._is_over = False
        # The failure with which it gives up.
        self._last_failure: BaseException | None = None

    async def run(self) -> None:
        """Start one run after another, until ``max_failures`` of them fail in a row.

        Cancellation: is forwarded to the live run; the periodic task ends when the run has ended.
        """
        periodic = cast("ManagedTask[None]", asyncio.current_task())
        extras = extras_of(periodic)
        extras.runs_forever = True
        event = self._group.cancel_event
        stop_watching = call_when_set(event, self._wake)
        self._times.begin(asyncio.get_running_loop().time())
        try:
            while True:
                if event.cause is not None:
                    # A shutdown gives the live run its grace, before it cancels both.
                    if self._run is not None:
                        await wait_until_done([self._run])
                    end_cancelled(periodic, event.cause)
                if self._last_failure is not None:
                    raise RuntimeError(
                        f"periodic task {periodic.id!r} gave up after {self._max_failures} failures in a row"
                    ) from self._last_failure
                self._look_at_the_clock()
                if self._is_pending and self._run is None:
                    await self._start_run(periodic)
                await self._sleep()
        except asyncio.CancelledError:
            await self._end_run(periodic)
            raise
        finally:
            stop_watching()
            extras.attempt = None
            self._is_over = True
            del periodic, extras

    def trigger(self) -> bool:
        """Run now, out of turn; return False if ``overlap`` skips that, or no run can start any more."""
        if self._is_over or self._group.cancel_event.cause is not None:
            return False
        if self._run is not None and self._overlap == "skip":
            self._count(skipped=1)
            return False
        self._is_triggered = True
        self._wake()
        return True

    def info(self) -> PeriodicInfo:
        """Return a snapshot."""
        return replace(self._record, next_run_at=None if self._is_over else self._times.due)

    def _look_at_the_clock(self) -> None:
        """Decide what to do if a run is due."""
        is_due, missed = self._times.check(asyncio.get_running_loop().time())
        self._count(skipped=missed)
        if is_due or self._is_triggered:
            self._is_triggered = False
            self._request_run()

    def _request_run(self) -> None:
        if self._run is not None and self._overlap == "skip":
            self._count(skipped=1)
            return
        self._count(skipped=int(self._is_pending))
        self._is_pending = True
        if self._run is not None and self._overlap == "cancel_previous":
            request_cancel(self._run, CancelCause.make(CancelKind.EXPLICIT, "the next run is due"))

    async def _start_run(self, periodic: ManagedTask[None]) -> None:
        """Create the next run, as soon as the queue has room for it."""
        number = self._record.runs + 1
        run = await create_supervised(
            periodic,
            self._group,
            self._context.run(make_attempt, self._factory, "start_periodic"),
            self._context,
            number,
            self.priority,
            self.metadata,
            self._timeout,
        )
        self._is_pending = False
        self._run = run
        # A run that cancels its group or shuts the manager down is not cancelled by its supervisor then.
        extras_of(run).supervisor = periodic
        self._record = replace(self._record, runs=number, last_run_at=run._created_at, last_outcome=None)
        # Not a waiter: a failure is reported like any that nobody awaits.
        add_done_callback(run, self._run_ended)

    def _run_ended(self, run: ManagedTask[object]) -> None:
        self._run = None
        has_failed = run.status is TaskStatus.FAILED
        self._failures_in_a_row = self._failures_in_a_row + 1 if has_failed else 0
        self._record = replace(
            self._record, failures=self._record.failures + has_failed, last_outcome=run.status
        )
        if run._span is not None:
            link_next(self._context, run._span, "previous_run")
        if self._failures_in_a_row == self._max_failures:
            self._last_failure = failure_of(run)
        self._wake()

    async def _sleep(self) -> None:
        """Wait until a run is due or triggered, the live run has ended, or the group is being cancelled."""
        if not self._is_awake:
            loop = asyncio.get_running_loop()
            self._sleeper = loop.create_future()
            timer = loop.call_at(self._times.due, self._wake)
            try:
                await self._sleeper
            finally:
                timer.cancel()
                self._sleeper = None
        self._is_awake = False

    def _wake(self, _: object = None) -> None:
        self._is_awake = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    async def _end_run(self, periodic: ManagedTask[None]) -> None:
        """Forward a cancellation of the periodic task to its run, and wait for it."""
        while self._run is not None and not self._run.done():
            forward_cancel(periodic, self._run)
            # Each further cancellation is forwarded too.
            with suppress(asyncio.CancelledError):
                await wait_until_done([self._run])

    def _count(self, skipped: int) -> None:
        if skipped:
            self._record = replace(self._record, skipped=self._record.skipped + skipped)


class Times:
    """When the runs of a periodic task are due. It reads no clock.

    Args:
        every: Seconds from one run to the next, above 0.
        jitter: The most seconds by which a run starts late, at least 0 and at most ``every``.
        start: Seconds until the first run, at least 0.

    Attributes:
        due: The time of the next run.
    """

    def __init__(self, every: float, jitter: float, start: float) -> None:
        self.every = checked_finite_seconds("every", every, above_zero=True)
        self._jitter = checked_finite_seconds("jitter", jitter)
        if self._jitter > self.every:
            raise ValueError(f"jitter must be at most every={every!r} seconds, got {jitter!r}")
        self._start = checked_finite_seconds("start", start)
        self._first = self.due = 0.0
        self._number = 0

    def begin(self, now: float) -> None:
        """Set the time of the first run."""
        self._first = now + self._start
        self._plan(0, now)

    def check(self, now: float) -> tuple[bool, int]:
        """Return True if a run is due, and how many others have been missed: one run stands for all of them.

        The next one is planned then.
        """
        if now < self.due:
            return False, 0
        number = self._number + 1
        # Computed from the first one, so that no delay adds up.
        # A run is not missed while it may still start within its jitter.
        missed = max(0, math.floor((now - self._first - self._jitter) / self.every) + 1 - number)
        self._plan(number + missed, now)
        return True, missed

    def _plan(self, number: int, now: float) -> None:
        self._number = number
        regular = self._first + number * self.every
        # Not in the past: the run before it has only just become due.
        least = min(max(0.0, now - regular), self._jitter)
        late = least + (self._jitter - least) * random.random()  # noqa: S311 - it spreads load, and keeps no secret
        self.due = regular + late
