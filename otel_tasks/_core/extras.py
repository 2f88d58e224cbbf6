"""What only some tasks need beside their slots: a timeout, metadata, a result to keep, a claim to a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks._core.checks import checked_seconds
from otel_tasks._core.places import Limiter, Ticket, adopt

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from otel_tasks._core.binding import ThreadWorker
    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.factory import Made
    from otel_tasks._core.progress import TaskProgress
    from otel_tasks._core.state import TaskPriority


class ThreadFuture(Protocol):
    """What stands for a task in another thread, see `futures`."""

    @property
    def awaited(self) -> bool:
        """Somebody there will receive a failure."""
        ...

    def refuse(self, error: BaseException) -> None:
        """Fail: the task can never end."""
        ...


class Queue(Protocol):
    """The group in whose queue a task is counted."""

    def _leave_queue(self) -> None: ...


class Extras:
    """What only some tasks need: a timeout, metadata, a result to keep, a shield.

    Without slots, so that the defaults are the class's: most tasks with extras need two or three of them.
    """

    metadata: dict[str, Any] | None = None
    keep_result = False
    # Made when it is first read.
    uid: str | None = None
    # The task's own timeout in seconds, and asyncio's while it runs.
    seconds: float | None = None
    timeout: asyncio.Timeout | None = None
    # Its claim to a place, if places are limited, and the queue in which it is counted; None if it got one at
    # once.
    ticket: Ticket | None = None
    queue: Queue | None = None
    place_granted: asyncio.Future[None] | None = None
    queue_seconds: float | None = None
    queue_timed_out = False
    # Of a task that had to wait: when it first ran, what starts its span then, and where.
    started_at: float | None = None
    begin: Callable[[Any, bool], None] | None = None
    context: Context | None = None
    # The user's coroutine inside of the one that the task runs.
    inner: Coroutine[Any, Any, Any] | None = None
    # What the loop's task factory has made of that.
    made: Made | None = None
    # The tasks that have to end before this one starts.
    previous: tuple[asyncio.Task[Any], ...] = ()
    progress: TaskProgress | None = None
    # The cause that the last uncancel() took away.
    dropped: CancelCause | None = None
    # Why it cancels itself, or has a timeout of its own that does: no cause of the task's.
    unrecorded: CancelCause | None = None
    # What stands for it in other threads; the thread in which its function runs.
    futures: tuple[ThreadFuture, ...] = ()
    worker: ThreadWorker | None = None
    # Of a cancel() that left no cause.
    message: str | None = None
    # It has run none of its code: known at its end, before that of one that was cancelled.
    never_ran = False
    # Its function was to run in a thread, and did not get one.
    never_called = False
    # It only looks after other tasks, which have the spans and take the places.
    supervises = False
    # Of a service, the attempt that it looks after.
    attempt: asyncio.Task[Any] | None = None
    # It is a service that does not end by itself, or an attempt of such a service.
    runs_forever = False
    shields = 0
    deferred: CancelCause | None = None

    def __init__(
        self,
        metadata: Mapping[str, Any] | None = None,
        keep_result: bool = False,
        seconds: float | None = None,
        queue_seconds: float | None = None,
    ) -> None:
        if metadata is not None:
            self.metadata = checked_metadata(metadata)
        if keep_result:
            self.keep_result = True
        if seconds is not None:
            self.seconds = seconds
        if queue_seconds is not None:
            self.queue_seconds = queue_seconds

    @property
    def queued(self) -> bool:
        """It waits for a place."""
        return self.place_granted is not None and not self.place_granted.done()

    def count_for(
        self,
        limiter: Limiter,
        queue: Queue,
        arrived: float,
        priority: TaskPriority,
        ageing: float,
        *,
        before: bool,
    ) -> None:
        """Count the task, which is live already, for a limiter that was not there when it was created.

        Args:
            limiter: The manager's or the group's.
            queue: The task's group.
            arrived: When the task was created.
            priority: The task's.
            ageing: Seconds of waiting that are worth one level of priority.
            before: The limiter is the group's, to be asked before the manager's.
        """
        if self.ticket is None:
            self.queue = queue
            self.ticket = Ticket((), priority, arrived, ageing, self)
            self.ticket.started = True
        if limiter not in self.ticket.limiters:
            adopt(self.ticket, limiter, before=before)

    def leave_queue(self) -> None:
        """Count the task no more among those that wait: it has ended."""
        if self.queue is not None:
            self.queue._leave_queue()

    def grant(self) -> None:
        """Let the task begin, unless it has been cancelled meanwhile; it no longer waits."""
        if self.queue is not None:
            self.queue._leave_queue()
        if self.place_granted is not None and not self.place_granted.done():
            self.place_granted.set_result(None)

    def close(self) -> None:
        """Close what the task has not awaited: one that is cancelled before its first step runs nothing."""
        if self.made is not None:
            self.made.coro.close()
        if self.inner is not None:
            self.inner.close()


def wanted_extras(
    timeout: float | None,
    queue_timeout: float | None,
    metadata: Mapping[str, Any] | None,
    *,
    keep_result: bool,
    supervises: bool,
) -> Extras | None:
    """What a task with these options needs beside the slots; None for one that has none of them."""
    if timeout is None and queue_timeout is None and metadata is None and not keep_result:
        return None
    extras = Extras(
        metadata,
        keep_result,
        checked_seconds("timeout", timeout),
        checked_seconds("queue_timeout", queue_timeout),
    )
    # A supervisor always keeps its result: no other task has to be asked.
    extras.supervises = supervises
    return extras


def checked_metadata(metadata: object) -> dict[str, Any]:
    """Copy a task's metadata.

    Raises:
        TypeError: It is not a mapping.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of names to values, got {metadata!r}")
    return dict(metadata)


def timeout_text(extras: Extras) -> str:
    """Say which timeout a task ran into."""
    if extras.queue_timed_out:
        return f"queue timeout of {extras.queue_seconds:g} s"
    return f"timeout of {extras.seconds:g} s"
