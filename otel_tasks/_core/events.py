"""Cancellation as data and as an event: the requester, the reason, and the tree that carries it down.

Rules of the tree of events, each with a test of its own:

1. ``set()`` has reached every descendant before it returns.
2. A child's ``set()`` reaches neither its parent nor its siblings.
3. A child of a set parent is created set, with the parent's cause.
4. An event is set once; the first cause stays.
5. Either end may be dropped first: a parent holds its children weakly, a child holds its parent, so that a
   dropped event in the middle does not cut off the events below it.
6. An event may be created, set, and read in any thread: a waiter is woken in the loop where it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import weakref
from asyncio import _get_running_loop
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from otel_tasks._core.binding import bound_request, worker_here
from otel_tasks._core.clock import now
from otel_tasks._core.state import CancelKind
from otel_tasks._core.telemetry.context import current_span_context

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextvars import Context

    from otel_tasks._core.telemetry import SpanContext

# Held while a tree of events changes, because threads change it too. Re-entrant: a finalizer or a signal
# handler may run in between and set an event.
TREE_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class CancelCause:
    """The requester, the reason, the time, and the span of a cancellation.

    Attributes:
        kind: Why.
        message: The requester's message; None if it gave none.
        asked_by: The requester: the name of the managed task; for other code of a request its route
            (``DELETE /jobs/{job}``); elsewhere the name of the asyncio task. None if it was none of them.
        at: The time of the request, on the clock of ``TaskInfo``'s times; None if unknown.
        origin: The span that was current at the request; a cancelled task's span names it.
    """

    kind: CancelKind
    message: str | None = None
    asked_by: str | None = None
    at: float | None = None
    origin: SpanContext | None = None

    @classmethod
    def make(
        cls, kind: CancelKind, message: str | None = None, *, context: Context | None = None
    ) -> CancelCause:
        """Create a cause here and now.

        Args:
            kind: Why.
            message: The reason as text.
            context: The context with the span that caused it; None is the current one.
        """
        return cls(kind, message, requester_name(), now(), current_span_context(context))

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else str(self.kind)

    def to_dict(self) -> dict[str, Any]:
        """Return the cause as JSON-ready data, with ids in hex as tracing backends show them."""
        origin = self.origin
        return {
            "kind": str(self.kind),
            "message": self.message,
            "asked_by": self.asked_by,
            "trace_id": origin and f"{origin.trace_id:032x}",
            "span_id": origin and f"{origin.span_id:016x}",
        }


def requester_name() -> str | None:
    """The name that a cause gives to the code that runs here."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return _requester_in_thread()
    if task is None:
        return None
    # A handler runs in a task of the server or a framework, whose name means nothing to the reader.
    return own_name(task) or _name_of_request() or task.get_name()


@functools.singledispatch
def own_name(task: asyncio.Task[Any]) -> str | None:
    """The name of a managed task, for which ``task`` registers it; None for any other."""
    return None


def _requester_in_thread() -> str | None:
    worker = worker_here.get()
    return _name_of_request() if worker is None else worker.requester_name()


def _name_of_request() -> str | None:
    request = bound_request()
    return None if request is None else request.name


class CancelEvent(asyncio.Event):
    """A one-way ``asyncio.Event`` with a parent, children, and a cause.

    It is a signal and cancels nothing itself. You may create, set, and read it in any thread; ``wait()``
    belongs to one event loop.

    Args:
        parent: The event whose ``set()`` sets this one too.

    Example:
        >>> shutdown = CancelEvent()
        >>> request = CancelEvent(parent=shutdown)
    """

    # asyncio's own, 3.11 to 3.15: whether it is set; the loop of its waiters, None before the first one.
    _value: bool
    _loop: asyncio.AbstractEventLoop | None
    _get_loop: Callable[[], asyncio.AbstractEventLoop]

    # The clock of the manager, for a group's event: a thread may set the event, or one below it.
    _clock: Callable[[], float] | None = None

    def __init__(self, parent: CancelEvent | None = None) -> None:
        super().__init__()
        self._parent = parent
        self._cause: CancelCause | None = None
        self._children: set[weakref.ref[CancelEvent]] | None = None
        # A group's event keeps its labeled group alive as long as something waits here.
        self._owner: object = None
        if parent is not None:
            parent._adopt(self)

    @property
    def parent(self) -> CancelEvent | None:
        """The event above this one."""
        return self._parent

    @property
    def cause(self) -> CancelCause | None:
        """What set it; None until then."""
        return self._cause

    def set(self, cause: CancelCause | None = None) -> None:
        """Set this event and all events below it, and wake their waiters.

        Args:
            cause: Why; None creates an ``explicit`` one. It has no effect on an event that is already set.
        """
        if self._value:
            with TREE_LOCK:
                # Another thread may still be on its way down: rule 1 is this call's promise too.
                return
        elsewhere = self._set_tree(self._cause_here() if cause is None else cause)
        if elsewhere:
            _wake_elsewhere(elsewhere)

    def _set_tree(self, cause: CancelCause) -> list[CancelEvent]:
        """Set this event and those below it, and wake the waiters of this loop; return the others' events."""
        here = _get_running_loop()
        elsewhere: list[CancelEvent] = []
        reached: list[CancelEvent] = [self]
        with TREE_LOCK:
            # The list grows while it is iterated over: one loop for the tree, without recursion. A call for
            # each event took half as long again.
            for event in reached:
                if event._value:
                    continue
                # The cause first: a thread that sees the flag may read it.
                event._cause = cause
                event._value = True
                # Without a loop, nothing has ever waited.
                if event._loop is here and here is not None:
                    event._wake()
                elif event._loop is not None:
                    elsewhere.append(event)
                links = event._children
                if links is None:
                    continue
                event._children = None
                # A list first: a collected child removes itself from the set at any moment.
                for link in list(links):
                    child = link()
                    if child is not None:
                        reached.append(child)
        return elsewhere

    async def wait(self) -> Literal[True]:
        """Wait until it is set.

        Cancellation: of the caller ends the waiting.
        """
        if not self._value:
            if self._loop is not None and self._loop.is_closed():
                # Its waiters are gone, and the event of a group moves to the next loop with its manager.
                self._loop = None
                self._waiters.clear()
            # Bind it to the loop before the flag is read again: a thread that sets the event in between
            # then knows which loop to wake.
            self._get_loop()
        return await super().wait()

    def clear(self) -> NoReturn:
        """Refuse: work may already have stopped because of it.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError("a CancelEvent is one-way: create a new one instead of clearing it")

    def set_owner(self, owner: object, clock: Callable[[], float]) -> None:
        """Keep a group alive with this event, and stamp causes on its manager's clock."""
        self._owner = owner
        self._clock = clock

    def _adopt(self, child: CancelEvent) -> None:
        with TREE_LOCK:
            if self._value:
                child.set(self._cause)
                return
            if self._children is None:
                self._children = set()
            # The callback is the set's own method: it keeps neither parent nor child alive.
            self._children.add(weakref.ref(child, self._children.discard))

    def _cause_here(self) -> CancelCause:
        """Create the cause of a ``set()`` without one, on the clock of the nearest owner above."""
        cause = CancelCause.make(CancelKind.EXPLICIT)
        event: CancelEvent | None = self
        while event is not None and event._clock is None:
            event = event._parent
        return cause if event is None or event._clock is None else replace(cause, at=event._clock())

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(True)


def _wake_elsewhere(events: list[CancelEvent]) -> None:
    """Wake waiters in other loops than the running one, each in its own."""
    for loop in {event._loop for event in events if event._loop is not None}:
        with contextlib.suppress(RuntimeError):  # The loop is closed, and so are its waiters.
            loop.call_soon_threadsafe(_wake_all, [event for event in events if event._loop is loop])


def _wake_all(events: list[CancelEvent]) -> None:
    for event in events:
        event._wake()
