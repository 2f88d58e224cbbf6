"""Recognizes the constructs of asyncio and anyio that cancel a task, and finds the cause behind them.

A construct is recognized by the code of its own frames on the stack, inside the call that cancels. The rules
of ``causes`` say which cause each construct has.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from asyncio import tasks as asyncio_tasks
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_tasks._core.binding import bound_request
from otel_tasks._core.events import CancelCause
from otel_tasks._core.log import text_of
from otel_tasks._core.state import CancelKind
from otel_tasks._core.suspension import awaiters, cancelled_scopes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import CodeType, FrameType

    Rule = Callable[[FrameType], "Found"]

# The frames of asyncio and anyio are next to the call, or behind one or two frames of gather().
_DEPTH = 10
_EXPIRED = "an asyncio timeout expired"
_GROUP_CANCELLED = "an asyncio.TaskGroup was cancelled"
_ANYIO = "anyio._backends._asyncio"
_release_waiter = vars(asyncio_tasks).get("_release_waiter")


class Found(NamedTuple):
    """The reason why a task is cancelled.

    Attributes:
        cause: The cause.
        host: The task that contains the cancelling construct of asyncio or anyio; None if it is none of them.
    """

    cause: CancelCause
    host: asyncio.Task[Any] | None = None


def found_on_stack() -> Found | None:
    """The cause, if a construct of asyncio or anyio makes this very call."""
    for frame in _callers():
        rule = _RULES.get(frame.f_code)
        if rule is None and _is_anyios(frame):
            rule = _by_anyio
        if rule is not None:
            return rule(frame)
    return None


def is_timeout_of(host: asyncio.Task[Any] | None) -> bool:
    """True if an ``asyncio.timeout()`` in ``host`` makes this call, as in a layer around the middleware."""
    frames = [frame for frame in _callers() if frame.f_code is _ON_TIMEOUT]
    return any(frame.f_locals["self"]._task is host for frame in frames)


@functools.singledispatch
def known_cause(task: Any) -> CancelCause | None:
    """The recorded cause of a task that is being cancelled; None if there is no record.

    ``task`` registers the variant for managed tasks, and ``causes`` the one for all others.
    """
    raise NotImplementedError


@functools.singledispatch
def name_of_timeout(task: asyncio.Task[Any], timeout: asyncio.Timeout) -> str:
    """Name a timeout; ``task`` registers the variant for managed tasks, which may have one as an option."""
    return _EXPIRED


# -- the rule of each construct -----------------------------------------------------------------


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
    return Found(_anonymous(CancelKind.TIMEOUT, name_of_timeout(host, timeout)), host)


def _by_wait_for(frame: FrameType) -> Found:
    # Python 3.11; later it is an asyncio.timeout(). The waiting task makes the call itself.
    host = asyncio.current_task()
    waiter = None if frame.f_back is None else frame.f_back.f_locals.get("waiter")
    if isinstance(waiter, asyncio.Future) and waiter.cancelled():
        return Found(_cause_of_host(host) or CancelCause.make(CancelKind.EXPLICIT), host)
    return Found(_anonymous(CancelKind.TIMEOUT, _EXPIRED), host)


def _by_task_group(frame: FrameType) -> Found:
    group: asyncio.TaskGroup = frame.f_locals["self"]
    host: asyncio.Task[Any] = vars(group)["_parent_task"]
    if not vars(group)["_errors"] and any(caller.f_code is _ON_GROUP_CANCEL for caller in _callers()):
        return Found(CancelCause.make(CancelKind.EXPLICIT, _GROUP_CANCELLED), host)
    return Found(_cause_of_group(group), host)


def _by_interrupt(_: FrameType) -> Found:
    # A signal handler interrupts any task.
    return Found(_anonymous(CancelKind.SHUTDOWN, "interrupted from the keyboard"))


def _is_anyios(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_deliver_cancellation" and frame.f_globals.get("__name__") == _ANYIO


def _by_anyio(frame: FrameType) -> Found:
    return Found(_cause_of_scope(frame.f_locals["origin"]), frame.f_locals["task"])


def _anonymous(kind: CancelKind, message: str) -> CancelCause:
    """A cause of a construct: the task that happens to run now did not request it."""
    return replace(CancelCause.make(kind, message), asked_by=None)


# -- causes from further up ---------------------------------------------------------------------


def _cause_of_group(group: asyncio.TaskGroup) -> CancelCause:
    host: asyncio.Task[Any] = vars(group)["_parent_task"]
    if _is_cancelled_from_above(group):
        return _cause_of_host(host) or CancelCause.make(CancelKind.EXPLICIT)
    return _own_cause_of_group(group)


def _own_cause_of_group(group: asyncio.TaskGroup) -> CancelCause:
    errors: list[BaseException] = vars(group)["_errors"]
    if errors:
        text = f"a task of an asyncio.TaskGroup failed: {text_of(errors[0], repr)}"
        return _anonymous(CancelKind.SIBLING_FAILED, text)
    if vars(group)["_parent_cancel_requested"]:
        return _anonymous(CancelKind.EXPLICIT, _GROUP_CANCELLED)
    return CancelCause.make(CancelKind.SCOPE_ENDED, "the block of an asyncio.TaskGroup raised")


def _is_cancelled_from_above(group: asyncio.TaskGroup) -> bool:
    """True if an aborting group aborts because its host was cancelled, and not by the group itself."""
    state = vars(group)
    host: asyncio.Task[Any] = state["_parent_task"]
    return host.cancelling() > 0 and not state["_errors"] and not state["_parent_cancel_requested"]


def _cause_of_scope(scope: Any) -> CancelCause:
    """The cause of an ``anyio.CancelScope``, whose own message contains an address."""
    if _is_expired(scope):
        return _anonymous(CancelKind.TIMEOUT, "an anyio timeout expired")
    text = "an anyio cancel scope was cancelled"
    return _cause_of_host(scope._host_task) or CancelCause.make(CancelKind.EXPLICIT, text)


def _is_expired(scope: Any) -> bool:
    expired: bool = scope.deadline <= asyncio.get_running_loop().time()
    return expired


def _cause_of_host(host: asyncio.Task[Any] | None) -> CancelCause | None:
    """The cause of the cancellation of a task that hosts a block of asyncio or anyio.

    A plain task without a record was cancelled for the cause of the tasks around it: the search goes from one
    task up to the next, to the first whose cause is known.
    """
    if host is None or not host.cancelling():
        return None
    reached: list[asyncio.Task[Any]] = [host]
    # The list grows while the loop walks it.
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
    """The tasks that await or host a plain task and may have cancelled it, or a cause that is found there."""
    for callback, _ in task._callbacks or ():
        yield from _behind_callback(callback)
    yield from (awaiter for awaiter, *_ in awaiters(task))
    for scope in cancelled_scopes(task):
        if _is_expired(scope):
            yield _cause_of_scope(scope)
        elif scope._host_task is not None and scope._host_task is not task:
            yield scope._host_task if scope._host_task.cancelling() else _cause_of_scope(scope)


def _behind_callback(callback: object) -> Iterator[asyncio.Task[Any] | CancelCause]:
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.TaskGroup) and vars(owner)["_aborting"]:
        host: asyncio.Task[Any] = vars(owner)["_parent_task"]
        yield host if _is_cancelled_from_above(owner) else _own_cause_of_group(owner)
    elif isinstance(callback, functools.partial) and callback.func is _release_waiter:
        # Python 3.11: an asyncio.wait_for(), which waits for the end of the task that it has cancelled.
        waiting = [awaiter for awaiter, *_ in awaiters(callback.args[0]) if awaiter.cancelling()]
        yield waiting[0] if waiting else _anonymous(CancelKind.TIMEOUT, _EXPIRED)


def _cause_of_request(task: asyncio.Task[Any]) -> CancelCause | None:
    """The cause of the cancellation of the handler on whose behalf ``task`` runs."""
    request = bound_request()
    if request is None or request.host is None:
        return None
    if request.host is not task and (cause := known_cause(request.host)):
        return cause
    return request.cause_of_shutdown() if request.cancelled_from_outside else None


def _code_of(owner: object, name: str) -> CodeType | None:
    # None in a Python that no longer has it: the construct is then not recognized, and nothing else fails.
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
