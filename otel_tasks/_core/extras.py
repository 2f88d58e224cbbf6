"""The state that only some tasks need: a timeout, metadata, a result to keep, a claim to a place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks._core.checks import checked_seconds
from otel_tasks._core.factory import make
from otel_tasks._core.places import Limiter, Ticket, admit, adopt

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from contextvars import Context

    from otel_tasks._core.binding import ThreadWorker
    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.factory import Made
    from otel_tasks._core.info import ConsumerInfo, PeriodicInfo
    from otel_tasks._core.progress import TaskProgress
    from otel_tasks._core.state import TaskPriority
    from otel_tasks._core.telemetry import Span


class ThreadFuture(Protocol):
    """A task as another thread sees it, see `futures`."""

    @property
    def awaited(self) -> bool:
        """True if code in that thread will receive a failure."""
        ...

    def refuse(self, error: BaseException) -> None:
        """Fail with ``error``: the task can never end."""
        ...


class Supervision(Protocol):
    """Periodic work, or a consumer: what its supervising task knows of the tasks below it."""

    def info(self) -> PeriodicInfo | ConsumerInfo:
        """Return a snapshot."""
        ...


class Timed(Protocol):
    """A task, as far as its deadline depends on it."""

    @property
    def created_at(self) -> float: ...

    def get_loop(self) -> asyncio.AbstractEventLoop: ...


class Queue(Protocol):
    """The group that counts a task as queued."""

    def _join_queue(self) -> None: ...

    def _leave_queue(self) -> None: ...


class Extras:
    """The state that only some tasks need: a timeout, metadata, a result to keep, a shield.

    No slots, so that the class has the defaults: most tasks with extras set two or three attributes.
    """

    metadata: dict[str, Any] | None = None
    keep_result = False
    # Made on first use.
    uid: str | None = None
    # The task's own timeout in seconds, and asyncio's while it runs.
    seconds: float | None = None
    timeout: asyncio.Timeout | None = None
    # Its claim to a place, if places are limited; the group that counts it as queued; the future that is done
    # when it gets its place, None if it got one immediately.
    ticket: Ticket | None = None
    queue: Queue | None = None
    place_granted: asyncio.Future[None] | None = None
    queue_seconds: float | None = None
    queue_timed_out = False
    # For a task that has to wait: the time at which it got its place, the function that starts its span then,
    # and the context for that.
    started_at: float | None = None
    begin: Callable[[Any, bool], None] | None = None
    context: Context | None = None
    # The user's coroutine, if the task runs a wrapper around it.
    inner: Coroutine[Any, Any, Any] | None = None
    # What the loop's task factory has made of it.
    made: Made | None = None
    # The tasks that have to end before this one starts.
    previous: tuple[asyncio.Task[Any], ...] = ()
    progress: TaskProgress | None = None
    # The cause that the last uncancel() removed.
    dropped: CancelCause | None = None
    # Why the task cancels itself, or a timeout inside it does; this is not the task's cause.
    unrecorded: CancelCause | None = None
    # Its futures in other threads; the worker, if its function runs in a thread.
    futures: tuple[ThreadFuture, ...] = ()
    worker: ThreadWorker | None = None
    # How many done-callbacks may or may not retrieve its failure.
    callbacks = 0
    # The message of a cancel() that recorded no cause.
    message: str | None = None
    # It has run none of its code; set at its end, or earlier when it is cancelled.
    never_ran = False
    # Its function should have run in a thread, and got none.
    never_called = False
    # It only supervises other tasks, which have the spans and take the places.
    supervises = False
    # It counts against no limit: a supervisor, or an attempt of a consumer.
    takes_no_place = False
    # For a service, the current attempt.
    attempt: asyncio.Task[Any] | None = None
    # For a run of periodic work and the task of an item, the task that waits for its end.
    supervisor: asyncio.Task[Any] | None = None
    # What it knows of its runs, if it is periodic work; for a consumer and its attempts, of the items.
    supervision: Supervision | None = None
    # It is the task of an item that a shutdown does not drop from the queue.
    is_drained = False
    # It is a service that does not end by itself, or an attempt of one.
    runs_forever = False
    # With retries: the current attempt's number, span, and timeout; what the last failure was. While the task
    # backs off, the time of the next attempt, on the manager's clock. While it queues for that, the future
    # that is done when it gets its place.
    attempt_number: int | None = None
    attempt_span: Span | None = None
    attempt_timeout: asyncio.Timeout | None = None
    attempt_timed_out = False
    retry_at: float | None = None
    place_again: asyncio.Future[None] | None = None
    last_failure: str | None = None
    # How many shields defer a cancellation by its request, and the cause of a deferred one.
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
        """True while it waits for a place."""
        if self.place_again is not None:
            return not self.place_again.done()
        return self.place_granted is not None and not self.place_granted.done()

    def deadline(self, task: Timed, clock: Callable[[], float] | None) -> float | None:
        """Return the time of the loop at which the task's own timeout expires; None without one.

        Args:
            task: The task.
            clock: The manager's clock; None means the loop's ``time()``.
        """
        if self.timeout is not None:
            return self.timeout.when()
        if self.seconds is None:
            return None
        # The wrapper that starts the timeout has not run yet.
        drift = 0.0 if clock is None else task.get_loop().time() - clock()
        return task.created_at + self.seconds + drift

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
        """Count the task, which is already live, against a limiter that was set after its creation.

        Args:
            limiter: The manager's or the group's.
            queue: The task's group.
            arrived: The time at which the task was created.
            priority: The task's.
            ageing: Seconds of waiting that count as one level of priority.
            before: The limiter is the group's, which comes before the manager's.
        """
        if self.ticket is None:
            self.queue = queue
            self.ticket = Ticket((), priority, arrived, ageing, self)
            # A task that backs off holds no place.
            self.ticket.started = self.retry_at is None
        if limiter not in self.ticket.limiters:
            adopt(self.ticket, limiter, before=before)

    def claim_again(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None] | None:
        """Claim a place for the next attempt, for which the bound of the queue does not matter.

        Returns:
            A future that is done when the task gets its place; None if it got one immediately, or needs none.
        """
        if self.ticket is None or admit(self.ticket):
            return None
        if self.queue is not None:
            self.queue._join_queue()
        self.place_again = loop.create_future()
        return self.place_again

    def leave_queue(self) -> None:
        """Stop counting the task as queued: it has ended."""
        if self.queue is not None:
            self.queue._leave_queue()

    def grant(self) -> None:
        """Stop counting the task as queued, and start it, unless it has been cancelled meanwhile."""
        if self.queue is not None:
            self.queue._leave_queue()
        place = self.place_granted if self.place_again is None else self.place_again
        if place is not None and not place.done():
            place.set_result(None)

    def close(self) -> None:
        """Close coroutines that were never awaited: a task cancelled before its first step runs none."""
        if self.made is not None:
            self.made.coro.close()
        if self.inner is not None:
            self.inner.close()


@functools.singledispatch
def extras_for(task: Any) -> Extras:
    """Return a managed task's extras, made on first use; ``task`` registers the variant that does it."""
    raise NotImplementedError


def wanted_extras(
    timeout: float | None,
    queue_timeout: float | None,
    metadata: Mapping[str, Any] | None,
    *,
    keep_result: bool,
    supervises: bool,
) -> Extras | None:
    """Make the extras for these options; None if all have their defaults."""
    if timeout is None and queue_timeout is None and metadata is None and not keep_result:
        return None
    extras = Extras(
        metadata,
        keep_result,
        checked_seconds("timeout", timeout),
        checked_seconds("queue_timeout", queue_timeout),
    )
    # A supervisor always keeps its result, so a task without extras needs no check for this.
    extras.supervises = supervises
    return extras


def made_by(
    factory: Any,
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any],
    name: str | None,
    context: Context | None,
    extras: Extras | None,
    eager_start: bool | None,
) -> tuple[Coroutine[Any, Any, Any], Extras | None, bool | None]:
    """Return what the loop's task factory makes of a coroutine, with the options that follow from it."""
    made = make(factory, loop, coro, name, context)
    if made is None:
        return coro, extras, eager_start
    if made.coro is not coro or made.shadow is not None:
        extras = extras or Extras()
        extras.inner = coro
        extras.made = made
    return made.coro, extras, True if eager_start is None and made.eager else eager_start


def checked_metadata(metadata: object) -> dict[str, Any]:
    """Copy a task's metadata.

    Raises:
        TypeError: It is not a mapping.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of names to values, got {metadata!r}")
    return dict(metadata)


def timeout_text(extras: Extras) -> str:
    """Describe the timeout that has expired for a task."""
    if extras.queue_timed_out:
        return f"queue timeout of {extras.queue_seconds:g} s"
    return f"timeout of {extras.seconds:g} s"
