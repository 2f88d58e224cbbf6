"""Visits: functions in threads of someone else's, which run for a managed task."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from otel_tasks import TaskManager, current_cancel_event, current_task
from otel_tasks._core.visits import Visit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.real_clock


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """A pool of one thread, which must be free at the end."""
    with ThreadPoolExecutor(1, thread_name_prefix="theirs") as executor:
        yield executor


def visit_in(pool: ThreadPoolExecutor, function: Callable[[], object]) -> Visit[object]:
    """Start a visit in a thread of the pool."""
    visit = Visit(function)
    pool.submit(visit.work)
    return visit


async def test_function_runs_in_their_thread_as_the_task(pool: ThreadPoolExecutor) -> None:
    """The thread calls the function once its task runs, and the function finds the task."""
    manager = TaskManager()

    def work() -> tuple[str, str]:
        task = current_task()
        assert task is not None
        return task.name, threading.current_thread().name

    visit = visit_in(pool, work)
    assert await manager.create_task(visit.as_task(), name="page") == ("page", "theirs_0")


async def test_error_is_that_of_the_task(pool: ThreadPoolExecutor) -> None:
    """What the function raises is raised by the task."""

    def work() -> None:
        raise LookupError

    visit = visit_in(pool, work)
    with pytest.raises(LookupError):
        await TaskManager().create_task(visit.as_task())


async def test_cancelled_task_sets_the_event_and_waits_for_the_function(pool: ThreadPoolExecutor) -> None:
    """A function that looks at its event ends early; its task then ends as cancelled."""
    runs = threading.Event()

    def work() -> None:
        event = current_cancel_event()
        runs.set()
        while not event.is_set():
            pass

    visit = visit_in(pool, work)
    task = TaskManager().create_task(visit.as_task())
    await asyncio.get_running_loop().run_in_executor(None, runs.wait, 60)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_dismissed_visit_lets_the_thread_go(pool: ThreadPoolExecutor) -> None:
    """A visit whose task never runs calls nothing, and does not keep the thread."""
    visit = visit_in(pool, lambda: pytest.fail("it was dismissed"))
    task = TaskManager().create_task(visit.as_task())
    task.cancel()
    await asyncio.wait([task])
    visit.dismiss()
    visit.dismiss()


async def test_stack_of_the_task_is_that_of_their_thread(pool: ThreadPoolExecutor) -> None:
    """While the function runs, the task's stack shows where."""
    runs, go_on = threading.Event(), threading.Event()

    def work() -> None:
        runs.set()
        go_on.wait(60)

    visit = visit_in(pool, work)
    task = TaskManager().create_task(visit.as_task())
    await asyncio.get_running_loop().run_in_executor(None, runs.wait, 60)
    assert "go_on.wait(60)" in task.stack()
    go_on.set()
    await task
