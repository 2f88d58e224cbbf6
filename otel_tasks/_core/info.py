"""TaskInfo: a snapshot of a task."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.clock import rounded, wall_clock

if TYPE_CHECKING:
    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.progress import Progress
    from otel_tasks._core.state import TaskPriority, TaskStatus


class _Absent(Enum):
    """A marker for a snapshot without a result; it keeps its identity when it is pickled or copied."""

    RESULT = "no result"


NO_RESULT: Final = _Absent.RESULT


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicInfo:
    """A snapshot of periodic work.

    Times are seconds on a monotonic clock, as in ``TaskInfo``, whose ``to_dict()`` returns wall-clock
    timestamps.

    Attributes:
        every: Seconds from one run to the next.
        runs: How many runs have started.
        failures: How many runs have failed.
        skipped: How many runs did not start: an earlier one was still live, or the loop was held up.
        last_run_at: The time at which the last run was created; None before the first.
        last_outcome: How the last run ended; None while it is live, and before the first.
        next_run_at: The time of the next run; None once the periodic task has ended.
    """

    every: float
    runs: int = 0
    failures: int = 0
    skipped: int = 0
    last_run_at: float | None = None
    last_outcome: TaskStatus | None = None
    next_run_at: float | None = None

    def to_dict(self, epoch: float) -> dict[str, Any]:
        """Return the snapshot as JSON-ready data.

        Args:
            epoch: The wall-clock time at which the clock of these times was 0.
        """
        data = {key.name: getattr(self, key.name) for key in fields(self)}
        for key in ("last_run_at", "next_run_at"):
            data[key] = None if data[key] is None else wall_clock(data[key], epoch)
        data["last_outcome"] = self.last_outcome and str(self.last_outcome)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerInfo:
    """A snapshot of a consumer: the fates of the items that it has taken.

    Attributes:
        concurrency: How many items run at a time.
        in_hand: How many are running, wait for a place, back off, or are with ``on_failure``.
        done: How many were handled.
        failed: How many failed for good.
        cancelled: How many were cancelled, but not by a shutdown.
        handed_back: How many were handed back to the source.
    """

    concurrency: int
    in_hand: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    handed_back: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the snapshot as JSON-ready data."""
        return {key.name: getattr(self, key.name) for key in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """A snapshot of a task; it holds no task, no frame, and no exception.

    Times are seconds on a monotonic clock; ``to_dict()`` returns wall-clock timestamps, the same ones on
    every call.

    Attributes:
        id: Unique among the live tasks of a manager.
        uid: ``task.uid``, if that has been read; None otherwise. A snapshot makes none.
        name: Unique among the live tasks of its scoped group, or of the manager.
        group: The group's name.
        group_id: The group's id.
        priority: The priority.
        status: The status.
        created_at: The time of creation.
        started_at: The time at which it was scheduled or got its place; None if it has run none of its code.
        ended_at: The time of its end; None while it is live.
        error_type: The class of the exception that it raised, if it failed.
        error: The text of that exception.
        cause: The cause of its cancellation; None without a cancel request.
        cancel_ignored: True for a task that was cancelled and completed anyway.
        progress: Its last progress report; None before the first.
        metadata: A copy of its metadata.
        trace_id: The trace id in hex; None without tracing.
        span_id: The span id in hex; None without tracing.
        attempt: The number of the current or last attempt, from 1 on; None without ``retry=``, and before the
            first attempt.
        epoch: The wall-clock time at which the clock of these times was 0, in seconds since 1970.
    """

    id: str
    uid: str | None
    name: str
    group: str
    group_id: str
    priority: TaskPriority
    status: TaskStatus
    created_at: float
    started_at: float | None
    ended_at: float | None
    error_type: str | None
    error: str | None
    cause: CancelCause | None
    cancel_ignored: bool
    progress: Progress | None
    metadata: dict[str, Any]
    trace_id: str | None
    span_id: str | None
    epoch: float
    attempt: int | None = None
    # One attribute for both: each one costs every snapshot seven instructions.
    _supervision: PeriodicInfo | ConsumerInfo | None = field(default=None, repr=False)
    # Not compared: the == of a result may not return a bool, as with arrays.
    _result: Any = field(default=NO_RESULT, repr=False, compare=False)

    @property
    def periodic(self) -> PeriodicInfo | None:
        """The last and the next run of periodic work; None for any other task."""
        return self._supervision if isinstance(self._supervision, PeriodicInfo) else None

    @property
    def consumer(self) -> ConsumerInfo | None:
        """How many items of a consumer are where; None for any other task."""
        return self._supervision if isinstance(self._supervision, ConsumerInfo) else None

    @property
    def duration(self) -> float | None:
        """Seconds from its creation to its end; None while it is live."""
        return None if self.ended_at is None else self.ended_at - self.created_at

    @property
    def has_result(self) -> bool:
        """True for a completed task that keeps its result, as ``start_task`` creates it."""
        return self._result is not NO_RESULT

    @property
    def result(self) -> Any:
        """The result, if it is kept; ``to_dict()`` omits it.

        Raises:
            AttributeError: There is no result, see ``has_result``; ``getattr(info, "result", None)`` works.
        """
        if self._result is NO_RESULT:
            raise AttributeError(
                f"the snapshot of task {self.name!r} ({self.status}) has no result: "
                "only that of a completed start_task() has; check has_result first"
            )
        return self._result

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as JSON-ready data, without the result; metadata is included unchanged."""
        data = {key: getattr(self, key) for key in _PLAIN}
        for key in ("created_at", "started_at", "ended_at"):
            data[key] = None if data[key] is None else wall_clock(data[key], self.epoch)
        data["priority"] = self.priority.name
        data["status"] = str(self.status)
        data["cause"] = self.cause and self.cause.to_dict()
        data["progress"] = self.progress and self.progress.to_dict()
        data["periodic"] = self.periodic and self.periodic.to_dict(self.epoch)
        data["consumer"] = self.consumer and self.consumer.to_dict()
        data["duration"] = None if self.duration is None else rounded(self.duration)
        return data


_PLAIN = tuple(each.name for each in fields(TaskInfo) if each.name[0] != "_" and each.name != "epoch")
