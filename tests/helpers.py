"""Small coroutines for tests to run as tasks, and a driver that cancels a scenario at each of its awaits."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks import TaskManager
from otel_tasks.testing import assert_no_tasks_left, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

    from otel_tasks import CancelKind, ManagedTask
    from otel_tasks.testing import SpanRecorder

T = TypeVar("T")

PATIENCE = 60.0
"""Real seconds after which a test that waits for a thread gives up."""

in_a_thread = asyncio.to_thread


async def give(value: T) -> T:
    """Return at once."""
    return value


async def fail(error: BaseException) -> None:
    """Raise at once."""
    raise error


async def rest() -> None:
    """Sleep until cancelled; an hour is beyond what any test waits for."""
    await asyncio.sleep(3600)


async def ignore_cancels(seconds: float) -> str:
    """Swallow each cancellation, and return after ``seconds`` anyway."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        try:
            await asyncio.sleep(end - loop.time())
        except asyncio.CancelledError:
            continue
    return "ignored"


async def settle() -> None:
    """Let everything that is ready run, callbacks of ended tasks included."""
    for _ in range(5):
        await asyncio.sleep(0)


def kind_of(task: ManagedTask[Any]) -> CancelKind | None:
    """The kind of a task's cause."""
    return None if task.cause is None else task.cause.kind


def open_groups(manager: TaskManager) -> list[str]:
    """The names of the groups directly below a manager's root: requests, blocks, and labels in use."""
    return [group.name for group in manager.tree().root.groups]


def counters(manager: TaskManager) -> dict[str, int]:
    """A manager's counters, those that are not zero."""
    return {name: count for name, count in manager.stats()._asdict().items() if count}


def now() -> float:
    """The loop's time."""
    return asyncio.get_running_loop().time()


class CancelledAt:
    """Awaits a coroutine, and has the awaiting task cancelled at its ``number``-th suspension."""

    def __init__(self, number: int, coro: Coroutine[Any, Any, object]) -> None:
        self.number = number
        self.suspensions = 0
        self._coro = coro

    @property
    def reached(self) -> bool:
        return self.suspensions >= self.number

    def __await__(self) -> Generator[Any, Any, object]:
        error: BaseException | None = None
        while True:
            try:
                future = self._coro.send(None) if error is None else self._coro.throw(error)
            except StopIteration as stop:
                return stop.value
            self.suspensions += 1
            task = asyncio.current_task()
            if self.suspensions == self.number and task is not None:
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                error = None
                yield future
            except BaseException as thrown:
                error = thrown


def cancel_at_each_await(
    scenario: Callable[[TaskManager], Coroutine[Any, Any, object]], spans: SpanRecorder
) -> int:
    """Run a scenario cancelled at its first await, then at its second, ... and look for leaks each time.

    Returns:
        How many awaits it has.
    """
    for number in itertools.count(1):
        if not run(_cancelled_at(number, scenario, spans)):
            return number - 1
    raise AssertionError("unreachable")


async def _cancelled_at(
    number: int, scenario: Callable[[TaskManager], Coroutine[Any, Any, object]], spans: SpanRecorder
) -> bool:
    manager = TaskManager(tracer_provider=spans.provider, meter_provider=spans.meter_provider)
    driver = CancelledAt(number, scenario(manager))

    async def drive() -> None:
        await driver

    task = asyncio.create_task(drive())
    await asyncio.wait([task])
    if driver.reached:
        assert task.cancelled() or task.exception() is not None, "the cancellation was swallowed"
    else:
        task.result()
    report = await manager.shutdown(grace=0.0, timeout=100.0)
    await settle()
    assert report.clean
    assert manager.stats().live == 0
    assert not manager._ledger.scopes
    assert not manager._ledger.hosts
    await assert_no_tasks_left()
    spans.check()
    gc.collect()
    return driver.reached


async def until(holds: Callable[[], object]) -> None:
    """Wait, in real time, until it holds."""

    def look() -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, "it has never come to hold"
            time.sleep(0.001)

    await in_a_thread(look)


def forget(task: Any) -> None:
    """Let go of a task whose loop was closed under it, without asyncio's complaints."""
    task._log_destroy_pending = False
    task.get_coro().close()
