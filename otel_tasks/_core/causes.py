"""Finds the cause of a cancellation, inside the call that cancels.

asyncio keeps a count and a message, and forwards ``cancel()`` from a task to the task that it awaits. So the
cause must be found while the call is on the stack. The rules, each with tests in ``tests/test_causes.py``:

1. A cancellation on its way down keeps the cause that it has above.
2. A request's handler that is cancelled neither by a managed task nor in the context of a request is
   cancelled by its server: ``shutdown``.
3. ``asyncio.timeout``, ``asyncio.wait_for``, and anyio's deadlines are a ``timeout``; an
   ``asyncio.TaskGroup`` with a failed task is a ``sibling_failed``; Ctrl-C is a ``shutdown``. ``constructs``
   recognizes their code on the stack.
4. Everything else is ``explicit``.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from otel_tasks._core.binding import awaiting, bound_request, current_binding
from otel_tasks._core.clock import clock_of, now
from otel_tasks._core.constructs import Found, found_on_stack, is_timeout_of, known_cause
from otel_tasks._core.events import CancelCause, own_name
from otel_tasks._core.log import logger
from otel_tasks._core.state import CancelKind

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from otel_tasks._core.binding import BoundRequest

    Intercept = Callable[[asyncio.Task[Any], object], bool]

_has_logged = False


class _Passing(threading.local):
    cause: CancelCause | None = None


# The cause of the cancellation that is on its way down, in this thread. Not a ContextVar: callbacks scheduled
# meanwhile would inherit it.
_passing = _Passing()


@contextmanager
def passing(cause: CancelCause | None) -> Generator[None]:
    """Give ``cause`` to every managed task to which the cancellations in this block are forwarded."""
    before, _passing.cause = _passing.cause, cause
    try:
        yield
    finally:
        _passing.cause = before


def passed_down() -> CancelCause | None:
    """The cause of the cancellation that is on its way down."""
    return _passing.cause


def chosen_cause(given: object, reason: str | None, asked_by: str | None = None) -> CancelCause:
    """Return the cause that a caller has given, with a time, or make one of its reason here and now.

    Raises:
        TypeError: ``given`` is not a cause, or comes with a reason or a requester.
    """
    if given is None:
        made = CancelCause.make(CancelKind.EXPLICIT, reason)
        return made if asked_by is None else replace(made, asked_by=asked_by)
    if not isinstance(given, CancelCause):
        raise TypeError(
            f"cause must be a CancelCause, got {given!r}: "
            'pass the reason, as in cancel_task(name, "superseded"), to have one made'
        )
    if reason is not None or asked_by is not None:
        raise TypeError("pass either cause, or reason and asked_by: a cause has a message and a requester")
    return given if given.at is not None else replace(given, at=now())


def cause_elsewhere(loop: asyncio.AbstractEventLoop, message: str | None) -> CancelCause:
    """Make a cause in a thread, with the time of the clock of the loop that it is for."""
    return replace(CancelCause.make(CancelKind.EXPLICIT, message), at=clock_of(loop)())


def cause_of_cancel(task: asyncio.Task[Any], message: object, request: BoundRequest | None = None) -> Found:
    """Find the cause of the cancellation of ``task``; call it inside the call that cancels the task.

    Args:
        task: The task.
        message: The argument of ``cancel()``.
        request: The request whose handler this task is, or for which it runs; None looks for a request that
            awaits the task.
    """
    if _passing.cause is not None:
        return Found(_passing.cause)
    text = None if message is None else str(message)
    try:
        found = _found_from_server(task, text, request) or found_on_stack()
    except Exception:
        # These are attributes of asyncio and anyio without public names: no cancellation may fail because of
        # them.
        _log_once()
        found = None
    return found or Found(CancelCause.make(CancelKind.EXPLICIT, text))


def _found_from_server(
    task: asyncio.Task[Any], text: str | None, request: BoundRequest | None
) -> Found | None:
    if _runs_application():
        return None
    request = request or _awaiting_request(task)
    if request is None or is_timeout_of(request.host):
        return None
    return Found(request.cause_of_shutdown(text))


def _runs_application() -> bool:
    """True in code of the application: a managed task, or anything in the context of a request.

    A server's tasks and callbacks are neither.
    """
    if current_binding.get() is not None:
        return True
    try:
        caller = asyncio.current_task()
    except RuntimeError:
        return False
    return caller is not None and own_name(caller) is not None


def _awaiting_request(task: asyncio.Task[Any]) -> BoundRequest | None:
    """The request that awaits ``task``, and whose handler has been cancelled."""
    return next((request for request in awaiting(task) if request.cancelled_from_outside), None)


def _log_once() -> None:
    global _has_logged
    if not _has_logged:
        _has_logged = True
        logger.exception("finding the cause of a cancellation raised; further errors are not logged")


# -- plain tasks --------------------------------------------------------------------------------


class Witness:
    """Records the cause of a plain task's cancellation, which asyncio does not.

    It covers the task's ``cancel`` on the instance, where asyncio, anyio, and servers look it up.

    Args:
        task: The task.
        request: The request whose handler it is, or for which it runs.
    """

    # Defaults in the class: each request with tasks has a witness.
    users = 0
    # Called before each cancellation; True leaves the task alone.
    intercepts: tuple[Intercept, ...] = ()
    _cause: CancelCause | None = None
    _message: object = None
    # The value of `cancelling()` that includes the recorded request: below it, the request was taken back.
    _count = 0

    def __init__(self, task: asyncio.Task[Any], request: BoundRequest | None) -> None:
        self._task = task
        self.request = request

    @property
    def cause(self) -> CancelCause | None:
        """The first cause that was not taken back."""
        return self._cause if self._task.cancelling() >= self._count else None

    def cancel(self, msg: object = None) -> bool:
        """As ``asyncio.Task.cancel``, unless it is intercepted."""
        # A list, because each request concerned has to take its own cancellation.
        if self.intercepts and True in [intercept(self._task, msg) for intercept in self.intercepts]:
            return True
        cause = self.cause
        if cause is None or msg is None or msg is not self._message:
            # anyio repeats its message in every turn of the loop, until the task leaves the scope.
            cause = cause_of_cancel(self._task, msg, self.request).cause
        if self.cause is None and not self._task.done():
            self._cause, self._message = cause, msg
            self._count = self._task.cancelling() + 1
        with passing(cause):
            # The method of the task's own class: a task factory may make tasks of a subclass.
            return type(self._task).cancel(self._task, msg)


def watch_cancels(task: asyncio.Task[Any], request: BoundRequest | None) -> None:
    """Record from now on why ``task`` is cancelled, until ``unwatch_cancels`` has been called as often.

    A managed task records it itself. Call it in the task, or in a thread for which the task waits.
    """
    # The cheap check of the type first: each request with tasks comes here.
    if type(task) is not asyncio.Task and own_name(task) is not None:
        return
    witness = _witness_of(task)
    if witness is None:
        witness = Witness(task, request)
        # A plain task accepts attributes, although it has no `__dict__`.
        object.__setattr__(task, "cancel", witness.cancel)
    elif witness.request is None:
        witness.request = request
    witness.users += 1


def unwatch_cancels(task: asyncio.Task[Any]) -> None:
    """Undo one ``watch_cancels``."""
    witness = _witness_of(task)
    if witness is not None:
        witness.users -= 1
        if not witness.users:
            # Breaks the reference cycle between the task and its witness.
            object.__delattr__(task, "cancel")


@contextmanager
def covered(task: asyncio.Task[Any], intercept: Intercept) -> Generator[None]:
    """Call ``intercept`` before each cancellation of a plain task, which has no method of this package."""
    watch_cancels(task, bound_request())
    witness = _witness_of(task)
    if witness is None:
        yield
        return
    witness.intercepts = (*witness.intercepts, intercept)
    try:
        yield
    finally:
        kept = list(witness.intercepts)
        kept.remove(intercept)
        witness.intercepts = tuple(kept)
        unwatch_cancels(task)


# For every object: a loop may have tasks of other classes than asyncio's.
@known_cause.register(object)
def _known_to_witness(task: Any) -> CancelCause | None:
    witness = _witness_of(task)
    return None if witness is None else witness.cause


def _witness_of(task: asyncio.Task[Any]) -> Witness | None:
    owner = getattr(task.cancel, "__self__", None)
    return owner if type(owner) is Witness else None
