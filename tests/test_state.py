"""The table of transitions, row by row."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from otel_tasks import IllegalTransitionError, TaskPriority, TaskStatus
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
