"""The table of transitions, row by row."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from pathlib import Path

import pytest

from otel_tasks import IllegalTransitionError, TaskManager, TaskPriority, TaskStatus, current_task
from otel_tasks._core.state import TRANSITIONS, Signal, next_status, state_diagram

PENDING, RUNNING, CANCELLING = TaskStatus.PENDING, TaskStatus.RUNNING, TaskStatus.CANCELLING
COMPLETED, FAILED, CANCELLED = TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED

# Written out once more on purpose: the table is what is tested.
KNOWN = {
    (PENDING, Signal.START): RUNNING,
    (PENDING, Signal.CANCEL): CANCELLING,
    (RUNNING, Signal.RETURN): COMPLETED,
    (RUNNING, Signal.RAISE): FAILED,
    (RUNNING, Signal.CANCEL): CANCELLING,
    (RUNNING, Signal.FOREIGN_CANCEL): CANCELLED,
    (CANCELLING, Signal.UNWIND): CANCELLED,
    (CANCELLING, Signal.RETURN): COMPLETED,
    (CANCELLING, Signal.RAISE): FAILED,
    (CANCELLING, Signal.CANCEL): CANCELLING,
    (CANCELLING, Signal.UNCANCEL): RUNNING,
}
UNKNOWN = [pair for pair in itertools.product(TaskStatus, Signal) if pair not in KNOWN]
STATES_PAGE = Path(__file__).parent.parent / "docs" / "states.md"


@pytest.mark.parametrize(("status", "signal"), KNOWN)
def test_known_signal_leads_to_its_status(status: TaskStatus, signal: Signal) -> None:
    """Each entry of the table is looked up as it is written."""
    assert next_status(status, signal) is KNOWN[status, signal]


@pytest.mark.parametrize(("status", "signal"), UNKNOWN)
def test_unknown_signal_is_an_error(status: TaskStatus, signal: Signal) -> None:
    """A signal that is not in the table for a status raises."""
    with pytest.raises(IllegalTransitionError):
        next_status(status, signal)


def test_error_names_the_signals_of_the_status() -> None:
    """The message of an illegal transition lists the signals that would be legal."""
    with pytest.raises(
        IllegalTransitionError,
        match=r"^a pending task cannot take the signal <Signal.UNWIND: 'unwind'>; it takes start, cancel$",
    ):
        next_status(PENDING, Signal.UNWIND)


def test_error_says_that_a_status_is_final() -> None:
    """The message of an illegal transition out of a final status says so."""
    with pytest.raises(
        IllegalTransitionError,
        match=r"^a failed task cannot take the signal <Signal.CANCEL: 'cancel'>; it takes none: it is final$",
    ):
        next_status(FAILED, Signal.CANCEL)


def test_final_statuses_are_those_without_a_way_out() -> None:
    """Completed, failed and cancelled are final, the others are not."""
    assert {status for status in TaskStatus if status.is_final} == {COMPLETED, FAILED, CANCELLED}


def test_every_status_can_be_reached() -> None:
    """Following the table from pending leads everywhere."""
    reached = {PENDING}
    for _ in TaskStatus:
        reached |= {target for status in reached for target in TRANSITIONS.get(status, {}).values()}
    assert reached == set(TaskStatus)


async def act(task_signals: list[Signal], seen: list[TaskStatus]) -> None:
    """Do to the current task what the signals say, and note its status after each."""
    task = current_task()
    assert task is not None
    for signal in task_signals:
        if signal is Signal.CANCEL:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        elif signal is Signal.UNCANCEL:
            task.uncancel()
        elif signal is Signal.RAISE:
            raise ValueError
        elif signal in (Signal.UNWIND, Signal.FOREIGN_CANCEL):
            raise asyncio.CancelledError
        elif signal is Signal.RETURN:
            return
        seen.append(task.status)


@pytest.mark.parametrize(
    "signals",
    [
        [Signal.CANCEL, Signal.UNWIND],
        [Signal.START, Signal.RETURN],
        [Signal.START, Signal.RAISE],
        [Signal.START, Signal.FOREIGN_CANCEL],
        [Signal.START, Signal.CANCEL, Signal.UNWIND],
        [Signal.START, Signal.CANCEL, Signal.RETURN],
        [Signal.START, Signal.CANCEL, Signal.RAISE],
        [Signal.START, Signal.CANCEL, Signal.CANCEL, Signal.UNWIND],
        [Signal.START, Signal.CANCEL, Signal.UNCANCEL, Signal.RETURN],
    ],
    ids=lambda signals: " ".join(signals),
)
async def test_statuses_of_a_task_are_those_of_the_table(signals: list[Signal]) -> None:
    """A real task takes, signal by signal, the steps that the table has."""
    async with TaskManager() as manager:
        seen: list[TaskStatus] = []
        task = manager.create_task(act(signals, seen))
        seen.append(task.status)
        if signals[0] is Signal.CANCEL:
            task.cancel()
            seen.append(task.status)
        await asyncio.wait([task])
        seen.append(task.status)
        if not task.cancelled():
            task.exception()

    assert seen == list(itertools.accumulate(signals, next_status, initial=PENDING))


def test_table_cannot_be_changed() -> None:
    """The transitions are read-only."""
    with pytest.raises(TypeError):
        TRANSITIONS[PENDING][Signal.START] = FAILED  # type: ignore[index]  # that it is refused is the test


def test_priorities_are_ordered() -> None:
    """A priority compares by its urgency."""
    assert sorted(TaskPriority) == [
        TaskPriority.LOW,
        TaskPriority.NORMAL,
        TaskPriority.HIGH,
        TaskPriority.CRITICAL,
    ]


def test_documented_diagram_is_that_of_the_table() -> None:
    """docs/states.md shows the diagram that the table draws; regenerate the block when this fails."""
    assert f"```mermaid\n{state_diagram()}```\n" in STATES_PAGE.read_text(encoding="utf-8")


def test_diagram_shows_every_transition_once() -> None:
    """The diagram has one line for each entry, for the start and for each end."""
    lines = state_diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == len(set(lines)) == 1 + 1 + len(KNOWN) + 3
