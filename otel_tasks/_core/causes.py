"""Why a task is cancelled, found out inside the call that cancels it.

asyncio keeps a count and a message, and forwards ``cancel()`` from a task to what it awaits. So the cause has
to be found while the call is on the stack. The rules, each with tests in ``tests/test_causes.py``:

1. A cancellation on its way down keeps the cause that it has above.
2. A request's handler that is cancelled neither by a managed task nor in the context of a request is
   cancelled by its server: ``shutdown``.
3. ``asyncio.timeout``, ``asyncio.wait_for`` and anyio's deadlines are a ``timeout``; an ``asyncio.TaskGroup``
   with a failed task is a ``sibling_failed``; Ctrl-C is a ``shutdown``. Their own code is recognized on the
   stack.
4. Everything else is ``explicit``.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from asyncio import tasks as asyncio_tasks
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_tasks._core.binding import awaiting, bound_request, current_binding
from otel_tasks._core.events import CancelCause, own_name
from otel_tasks._core.log import logger, text_of
from otel_tasks._core.state import CancelKind
from otel_tasks._core.suspension import awaiters, cancelled_scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from types import CodeType, FrameType

    from otel_tasks._core.binding import BoundRequest

    Intercept = Callable[[asyncio.Task[Any], object], bool]
    Rule = Callable[[FrameType], "Found"]

# asyncio's and anyio's own frames are next to the call, or behind one or two of gather().
_DEPTH = 10
_EXPIRED = "an asyncio timeout expired"
_GROUP_CANCELLED = "an asyncio.TaskGroup was cancelled"
_release_waiter = vars(asyncio_tasks).get("_release_waiter")
_has_logged = False
_ANYIO = "anyio._backends._asyncio"


class Found(NamedTuple):
    """Why a task is cancelled.

    Attributes:
        cause: Why.
        host: The task in which a construct of asyncio or anyio stands that cancels; None for any other asker.
    """

    cause: CancelCause
    host: asyncio.Task[Any] | None = None


class _Passing(threading.local):
    cause: CancelCause | None = None


# The cause of the cancellation that is on its way down, in this thread. Not a ContextVar: what is scheduled
# meanwhile would take it along.
_passing = _Passing()


@contextmanager
def passing(cause: CancelCause | None) -> Generator[None]:
    """Give ``cause`` to every managed task that the cancellations in this block are forwarded to."""
    before, _passing.cause = _passing.cause, cause
    try:
        yield
    finally:
        _passing.cause = before


def passed_down() -> CancelCause | None:
    """The cause of the cancellation that is on its way down."""
    return _passing.cause


def cause_of_cancel(task: asyncio.Task[Any], message: object, request: BoundRequest | None = None) -> Found:
    """Say why ``task`` is cancelled; to be called inside the call that cancels it.

    Args:
        task: Which.
        message: What ``cancel()`` was called with.
        request: The request whose handler this task is, or runs for; None looks who awaits it.
    """
    if _passing.cause is not None:
        return Found(_passing.cause)
    text = None if message is None else str(message)
    try:
        found = _found_from_server(task, text, request) or _found_on_stack()
    except Exception:
        # Attributes of asyncio's and anyio's that have no public names: a cancellation does not fail by them.
        _log_once()
        found = None
    return found or Found(CancelCause.make(CancelKind.EXPLICIT, text))


def _found_from_server(
    task: asyncio.Task[Any], text: str | None, request: BoundRequest | None
) -> Found | None:
    if _asked_in_app():
        return None
    request = request or _awaiting_request(task)
    if request is None or _is_timeout_of(request.host):
        return None
    return Found(request.cause_of_shutdown(text))


def _log_once() -> None:
    global _has_logged
    if not _has_logged:
        _has_logged = True
        logger.exception("finding the cause of a cancellation raised; further errors are not logged")


@functools.singledispatch
def known_cause(task: asyncio.Task[Any]) -> CancelCause | None:
    """Why a task that is being cancelled was cancelled, if that is known.

    ``task`` registers what this means for a managed task; of any other its witness knows.
    """
    witness = _witness_of(task)
    return None if witness is None else witness.cause


@functools.singledispatch
def name_of_timeout(task: asyncio.Task[Any], timeout: asyncio.Timeout) -> str:
    """Name a timeout; ``task`` registers this for a managed task, which may have one as an option."""
    return _EXPIRED


class Witness:
    """Notes why a plain task is cancelled, which asyncio does not.

    It covers the task's ``cancel`` on the instance: asyncio, anyio and servers look it up there.

    Args:
        task: Which.
        request: The request whose handler it is, or for which it runs.
    """

    # In the class, as there is one of these for each request with tasks.
    users = 0
    # Asked before each cancellation: True leaves the task alone.
    intercepts: tuple[Intercept, ...] = ()
    _cause: CancelCause | None = None
    _message: object = None
    # What `cancelling()` was with the noted one: below that it has been taken back.
    _count = 0

    def __init__(self, task: asyncio.Task[Any], request: BoundRequest | None) -> None:
        self._task = task
        self.request = request

    @property
    def cause(self) -> CancelCause | None:
        """Why the task is being cancelled: the first cause that was not taken back."""
        return self._cause if self._task.cancelling() >= self._count else None

    def cancel(self, msg: object = None) -> bool:
        """As ``asyncio.Task.cancel``, unless it is intercepted."""
        # A list: each request concerned has to take its own.
        if self.intercepts and True in [intercept(self._task, msg) for intercept in self.intercepts]:
            return True
        cause = self.cause
        if cause is None or msg is None or msg is not self._message:
            # anyio says the same in every turn of the loop, until the task leaves the scope.
            cause = cause_of_cancel(self._task, msg, self.request).cause
        if self.cause is None and not self._task.done():
            self._cause, self._message = cause, msg
            self._count = self._task.cancelling() + 1
        with passing(cause):
            # The method of its class: a task factory may make tasks of another one.
            return type(self._task).cancel(self._task, msg)


def watch_cancels(task: asyncio.Task[Any], request: BoundRequest | None) -> None:
    """Note from now on why ``task`` is cancelled; ``unwatch_cancels``, called as often, ends that.

    A managed task notes it by itself. To be called in the task, or in a thread for which it waits.
    """
    # By the type first: this is done for each request with tasks.
    if type(task) is not asyncio.Task and own_name(task) is not None:
        return
    witness = _witness_of(task)
    if witness is None:
        witness = Witness(task, request)
        # A plain task takes attributes, although it has no `__dict__`.
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
            # It was a cycle until now.
            object.__delattr__(task, "cancel")


@contextmanager
def covered(task: asyncio.Task[Any], intercept: Intercept) -> Generator[None]:
    """Ask ``intercept`` first when a plain task is cancelled, which has no method of ours."""
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


def _witness_of(task: asyncio.Task[Any]) -> Witness | None:
    owner = getattr(task.cancel, "__self__", None)
    return owner if type(owner) is Witness else None


# -- who asks -----------------------------------------------------------------------------------


def _asked_in_app() -> bool:
    """True in code of the application: a managed task, or what runs in the context of a request.

    A server's tasks and callbacks are neither.
    """
    if current_binding.get() is not None:
        return True
    try:
        asker = asyncio.current_task()
    except RuntimeError:
        return False
    return asker is not None and own_name(asker) is not None


def _awaiting_request(task: asyncio.Task[Any]) -> BoundRequest | None:
    """The request that awaits ``task``, and whose handler has been cancelled."""
    return next((request for request in awaiting(task) if request.cancelled_from_outside), None)


# -- what is on the stack -----------------------------------------------------------------------


def _found_on_stack() -> Found | None:
    """The cause, if a construct of asyncio or anyio makes this very call."""
    for frame in _callers():
        rule = _RULES.get(frame.f_code)
        if rule is None and _is_anyios(frame):
            rule = _by_anyio
        if rule is not None:
            return rule(frame)
    return None


def _is_timeout_of(host: asyncio.Task[Any] | None) -> bool:
    """True if an ``asyncio.timeout()`` in ``host`` makes this call, as in a layer around the middleware."""
    frames = [frame for frame in _callers() if frame.f_code is _ON_TIMEOUT]
    return any(frame.f_locals["self"]._task is host for frame in frames)


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return
        yield frame
        frame = frame.f_back


def _by_timeout(frame: FrameType) -> Found:
    timeout: asyncio.Timeout = frame.f_locals["self"]
    host: asyncio.Task[Any] = vars(timeout)["_task"]
    return Found(_asked_by_nobody(CancelKind.TIMEOUT, name_of_timeout(host, timeout)), host)


def _by_wait_for(frame: FrameType) -> Found:
    # Python 3.11; later it is an asyncio.timeout(). By the task that waits, in a step of its own.
    host = asyncio.current_task()
    waiter = None if frame.f_back is None else frame.f_back.f_locals.get("waiter")
    if isinstance(waiter, asyncio.Future) and waiter.cancelled():
        return Found(_cause_of_host(host) or CancelCause.make(CancelKind.EXPLICIT), host)
    return Found(_asked_by_nobody(CancelKind.TIMEOUT, _EXPIRED), host)


def _by_task_group(frame: FrameType) -> Found:
    group: asyncio.TaskGroup = frame.f_locals["self"]
    host: asyncio.Task[Any] = vars(group)["_parent_task"]
    if not vars(group)["_errors"] and any(caller.f_code is _ON_GROUP_CANCEL for caller in _callers()):
        return Found(CancelCause.make(CancelKind.EXPLICIT, _GROUP_CANCELLED), host)
    return Found(_cause_of_group(group), host)


def _by_interrupt(_: FrameType) -> Found:
    # In a signal handler, which interrupts just any task.
    return Found(_asked_by_nobody(CancelKind.SHUTDOWN, "interrupted from the keyboard"))


def _is_anyios(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_deliver_cancellation" and frame.f_globals.get("__name__") == _ANYIO


def _by_anyio(frame: FrameType) -> Found:
    return Found(_cause_of_scope(frame.f_locals["origin"]), frame.f_locals["task"])


def _asked_by_nobody(kind: CancelKind, message: str) -> CancelCause:
    return replace(CancelCause.make(kind, message), asked_by=None)


# -- what cancels from further up ---------------------------------------------------------------


def _cause_of_group(group: asyncio.TaskGroup) -> CancelCause:
    host: asyncio.Task[Any] = vars(group)["_parent_task"]
    if _ended_from_above(group):
        return _cause_of_host(host) or CancelCause.make(CancelKind.EXPLICIT)
    return _own_cause_of_group(group)


def _own_cause_of_group(group: asyncio.TaskGroup) -> CancelCause:
    errors: list[BaseException] = vars(group)["_errors"]
    if errors:
        text = f"a task of an asyncio.TaskGroup failed: {text_of(errors[0], repr)}"
        return _asked_by_nobody(CancelKind.SIBLING_FAILED, text)
    if vars(group)["_parent_cancel_requested"]:
        return _asked_by_nobody(CancelKind.EXPLICIT, _GROUP_CANCELLED)
    return CancelCause.make(CancelKind.SCOPE_ENDED, "the block of an asyncio.TaskGroup raised")


def _ended_from_above(group: asyncio.TaskGroup) -> bool:
    """True if a group that is aborting is so because its host was cancelled, and not by the group itself."""
    state = vars(group)
    host: asyncio.Task[Any] = state["_parent_task"]
    return host.cancelling() > 0 and not state["_errors"] and not state["_parent_cancel_requested"]


def _cause_of_scope(scope: Any) -> CancelCause:
    """The cause of what an ``anyio.CancelScope`` cancels; its own message has an address in it."""
    if _is_expired(scope):
        return _asked_by_nobody(CancelKind.TIMEOUT, "an anyio timeout expired")
    text = "an anyio cancel scope was cancelled"
    return _cause_of_host(scope._host_task) or CancelCause.make(CancelKind.EXPLICIT, text)


def _is_expired(scope: Any) -> bool:
    expired: bool = scope.deadline <= asyncio.get_running_loop().time()
    return expired


def _cause_of_host(host: asyncio.Task[Any] | None) -> CancelCause | None:
    """Why the task was cancelled that hosts a block of asyncio's or anyio's.

    A plain task without a witness was cancelled for the cause of what stands around it: from one task up to
    the next, to the first whose cause is known.
    """
    if host is None or not host.cancelling():
        return None
    reached: list[asyncio.Task[Any]] = [host]
    # The list grows while it is walked.
    for task in reached:
        if cause := known_cause(task):
            return cause
        for above in _above(task):
            if isinstance(above, CancelCause):
                return above
            if above.cancelling() and above not in reached:
                reached.append(above)
    return _cause_of_request(host)


def _above(task: asyncio.Task[Any]) -> Iterator[asyncio.Task[Any] | CancelCause]:
    """What may have cancelled a plain task: tasks that await or host it, or a cause that is found there."""
    for callback, _ in task._callbacks or ():
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, asyncio.TaskGroup) and vars(owner)["_aborting"]:
            host: asyncio.Task[Any] = vars(owner)["_parent_task"]
            yield host if _ended_from_above(owner) else _own_cause_of_group(owner)
        elif isinstance(callback, functools.partial) and callback.func is _release_waiter:
            # Python 3.11: of an asyncio.wait_for(), which waits for the end of what it has cancelled.
            waiting = [awaiter for awaiter, *_ in awaiters(callback.args[0]) if awaiter.cancelling()]
            yield waiting[0] if waiting else _asked_by_nobody(CancelKind.TIMEOUT, _EXPIRED)
    yield from (awaiter for awaiter, *_ in awaiters(task))
    for scope in cancelled_scopes(task):
        if _is_expired(scope):
            yield _cause_of_scope(scope)
        elif scope._host_task is not None and scope._host_task is not task:
            yield scope._host_task if scope._host_task.cancelling() else _cause_of_scope(scope)


def _cause_of_request(task: asyncio.Task[Any]) -> CancelCause | None:
    """The cause of the cancellation of the handler, on whose behalf ``task`` runs."""
    request = bound_request()
    if request is None or request.host is None:
        return None
    if request.host is not task and (cause := known_cause(request.host)):
        return cause
    return request.cause_of_shutdown() if request.cancelled_from_outside else None


def _code_of(owner: object, name: str) -> CodeType | None:
    # None in a Python that has it no longer: then the construct is not recognized, and nothing else fails.
    return getattr(vars(owner).get(name), "__code__", None)


_ON_TIMEOUT = _code_of(asyncio.Timeout, "_on_timeout")
# From Python 3.15 on.
_ON_GROUP_CANCEL = _code_of(asyncio.TaskGroup, "cancel")
_RULES: Mapping[CodeType | None, Rule] = {
    _ON_GROUP_CANCEL: _by_task_group,
    _ON_TIMEOUT: _by_timeout,
    _code_of(asyncio_tasks, "_cancel_and_wait"): _by_wait_for,
    _code_of(asyncio.TaskGroup, "_abort"): _by_task_group,
    _code_of(asyncio.TaskGroup, "_on_task_done"): _by_task_group,
    _code_of(asyncio.Runner, "_on_sigint"): _by_interrupt,
}
