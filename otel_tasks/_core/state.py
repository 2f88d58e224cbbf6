"""The life of a task as data: statuses, signals, and the one table that joins them.

``TRANSITIONS`` decides the final status of a task: ``task.final_status`` looks up the signal that ended it,
and a signal without an entry raises. The status of a live task is not stored: ``ManagedTask.status`` derives
it from the asyncio task, and a test compares the two, signal by signal. ``docs/states.md`` is generated from
the table.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING

from otel_tasks.exceptions import IllegalTransitionError

if TYPE_CHECKING:
    from collections.abc import Mapping


class TaskPriority(IntEnum):
    """How urgent a task is: under a limit, higher ones start first; a shutdown cancels them last.

    Running tasks are never preempted.
    """

    LOW = 0
    NORMAL = 1
    HIGH = 2
    CRITICAL = 3


class TaskStatus(StrEnum):
    """Where a task is in its life; the last three are final."""

    PENDING = "pending"
    RUNNING = "running"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """True once the task has ended, however it ended."""
        return self not in TRANSITIONS


class Signal(StrEnum):
    """An event in the life of a task."""

    START = "start"
    RETURN = "return"
    RAISE = "raise"
    CANCEL = "cancel"
    UNCANCEL = "uncancel"
    UNWIND = "unwind"
    FOREIGN_CANCEL = "foreign cancel"


# A timeout that expires inside a task requests its cancellation and withdraws it with uncancel(): hence the
# way from cancelling to running.
TRANSITIONS: Mapping[TaskStatus, Mapping[Signal, TaskStatus]] = MappingProxyType(
    {
        TaskStatus.PENDING: MappingProxyType(
            {
                Signal.START: TaskStatus.RUNNING,
                Signal.CANCEL: TaskStatus.CANCELLING,
            }
        ),
        TaskStatus.RUNNING: MappingProxyType(
            {
                Signal.RETURN: TaskStatus.COMPLETED,
                Signal.RAISE: TaskStatus.FAILED,
                Signal.CANCEL: TaskStatus.CANCELLING,
                Signal.FOREIGN_CANCEL: TaskStatus.CANCELLED,
            }
        ),
        TaskStatus.CANCELLING: MappingProxyType(
            {
                Signal.UNWIND: TaskStatus.CANCELLED,
                Signal.RETURN: TaskStatus.COMPLETED,
                Signal.RAISE: TaskStatus.FAILED,
                Signal.CANCEL: TaskStatus.CANCELLING,
                Signal.UNCANCEL: TaskStatus.RUNNING,
            }
        ),
    }
)


def next_status(status: TaskStatus, signal: Signal) -> TaskStatus:
    """Return the status that follows ``status`` after ``signal``.

    Raises:
        IllegalTransitionError: The table has no entry for the two; a final status has no entries at all.
    """
    try:
        return TRANSITIONS[status][signal]
    except KeyError:
        known = ", ".join(TRANSITIONS.get(status, ())) or "none: it is final"
        raise IllegalTransitionError(
            f"a {status} task cannot take the signal {signal!r}; it takes {known}"
        ) from None


class CancelKind(StrEnum):
    """Why a cancellation was requested."""

    EXPLICIT = "explicit"
    CLIENT_DISCONNECT = "client_disconnect"
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    SIBLING_FAILED = "sibling_failed"
    SCOPE_ENDED = "scope_ended"
    REPLACED = "replaced"
    HOST_LOST = "host_lost"
    FOREIGN = "foreign"


class Outcome(StrEnum):
    """How a task ended, in the words of its span and its metrics."""

    SUCCESS = "success"
    ERROR = "error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"


def state_diagram() -> str:
    """Draw ``TRANSITIONS`` as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {TaskStatus.PENDING}"]
    for status, row in TRANSITIONS.items():
        lines += [f"    {status} --> {target}: {signal}" for signal, target in row.items()]
    lines += [f"    {status} --> [*]" for status in TaskStatus if status.is_final]
    return "\n".join(lines) + "\n"
