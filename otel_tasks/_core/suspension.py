"""Where a suspended task waits: what its cancellation would reach, what holds it off, and how to wake it.

asyncio keeps most of this in private attributes. They are read here and nowhere else (``awaiters`` also reads
the callbacks of futures). They are the same from Python 3.11 to 3.15, in C and in Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import sys
from asyncio import tasks as asyncio_tasks
from concurrent.futures import Future as ThreadFuture
from contextvars import Context
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from types import CodeType, FrameType

# The future that gather() returns: it forwards its cancellation to each of its children.
_GatheringFuture: Any = vars(asyncio_tasks)["_GatheringFuture"]
# The function in which wait_for() of Python 3.11 cancels; from 3.12 on, wait_for() uses asyncio.timeout().
_CANCEL_AND_WAIT: CodeType | None = (
    vars(asyncio_tasks)["_cancel_and_wait"].__code__ if sys.version_info < (3, 12) else None
)
_WAIT_FOR: CodeType | None = asyncio.wait_for.__code__ if sys.version_info < (3, 12) else None
# asyncio's own methods: ManagedTask overrides them to count its waiters.
_add_done_callback = asyncio.Future.add_done_callback
_remove_done_callback = asyncio.Future.remove_done_callback


def waits_for(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """Return the future at which a task is suspended; None if it runs, is about to run, or is done."""
    waiter = getattr(task, "_fut_waiter", None)
    return waiter if isinstance(waiter, asyncio.Future) and not waiter.done() else None


def is_suspended(task: asyncio.Task[Any]) -> bool:
    """Return True for a task that waits, even for an awaitable that is no future of asyncio (granian)."""
    waiter = getattr(task, "_fut_waiter", None)
    return waiter is not None and not (isinstance(waiter, asyncio.Future) and waiter.done())


class Forwarding(NamedTuple):
    """Where a cancellation goes.

    Attributes:
        passed: The futures that it would cancel, the nearest first.
        stops: The tasks at which it stops, and which it would not cancel.
    """

    passed: list[asyncio.Future[Any]]
    stops: list[asyncio.Task[Any]]


def forwarded_to(
    tasks: Iterable[asyncio.Task[Any]], stops_at: Callable[[asyncio.Task[Any]], bool]
) -> Forwarding:
    """Follow a ``cancel()`` of each of ``tasks`` to every future that asyncio would forward it to.

    Args:
        tasks: Where the cancellation starts. One walk for all, because they may wait for one another, in long
            chains.
        stops_at: Returns True for a task on the way at which the cancellation stops.
    """
    reached: set[asyncio.Future[Any]] = set()
    found = Forwarding([], [])
    pending = list(map(_awaited_by, tasks))
    # The list grows while it is walked.
    for future in pending:
        if future is None or future in reached:
            continue
        reached.add(future)
        if isinstance(future, asyncio.Task):
            if stops_at(future):
                found.stops.append(future)
                continue
            pending.append(_awaited_by(future))
        elif isinstance(future, _GatheringFuture):
            pending.extend(child for child in _gathered_by(future) if not child.done())
        found.passed.append(future)
    return found


def _awaited_by(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """Return the future that a task waits for; in ``asyncio.wait_for``, its argument."""
    waiter = waits_for(task)
    if waiter is None or _WAIT_FOR is None or isinstance(waiter, asyncio.Task):
        return waiter
    coro: Any = task.get_coro()
    frame: FrameType | None = None
    # To the innermost coroutine: it awaits a future's iterator, which has no frame.
    while (inner := getattr(coro, "cr_frame", None)) is not None:
        frame, coro = inner, coro.cr_await
    if frame is None or frame.f_code is not _WAIT_FOR:
        return waiter
    waited = frame.f_locals.get("fut")
    return waited if isinstance(waited, asyncio.Future) and not waited.done() else waiter


def _gathered_by(gathering: Any) -> list[asyncio.Future[Any]]:
    """Return the futures that a ``gather`` waits for."""
    return list(gathering._children)


class Awaiter(NamedTuple):
    """A task that forwards its cancellation to a future.

    Attributes:
        task: The task.
        future: Where it is suspended: the future itself, or that of a ``gather``.
        callback: The callback that wakes it there.
        context: The context in which it runs.
    """

    task: asyncio.Task[Any]
    future: asyncio.Future[Any]
    callback: Callable[..., object]
    context: Context


class StandIn:
    """Replaces a task's callback from its interruption until it wakes, a turn of the loop later.

    A second cancellation of the task in that turn is forwarded to the same future.
    """

    __slots__ = ("cancels", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.cancels = task.cancelling()

    def __call__(self, _: object) -> None:
        """Wake nothing."""


def awaiters(
    future: asyncio.Future[Any],
    callbacks: Iterable[tuple[Callable[..., object], Context | None]] | None = None,
) -> Iterator[Awaiter]:
    """Find the tasks that forward their cancellation to ``future``.

    Args:
        future: The future.
        callbacks: Those of its callbacks to look at; None for all.
    """
    for callback, context in future._callbacks or () if callbacks is None else callbacks:
        if context is None:
            continue
        owner = callback.task if isinstance(callback, StandIn) else _woken_by(callback)
        if owner is not None:
            yield Awaiter(owner, future, callback, context)
            continue
        for cell in getattr(callback, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # the cell is empty
                if isinstance(cell.cell_contents, _GatheringFuture):
                    yield from awaiters(cell.cell_contents)


def _woken_by(callback: Callable[..., object]) -> asyncio.Task[Any] | None:
    owner = getattr(callback, "__self__", None)
    is_its = isinstance(owner, asyncio.Task) and getattr(callback, "__name__", "").endswith("wakeup")
    return owner if is_its else None


def may_forward(callback: Callable[..., object]) -> bool:
    """Return False for the callback of a task that is not being cancelled: of thousands, most are not."""
    if isinstance(callback, StandIn):
        return callback.task.cancelling() > callback.cancels
    owner = getattr(callback, "__self__", None)
    return not isinstance(owner, asyncio.Task) or owner.cancelling() > 0


def interrupt(awaiter: Awaiter, message: object) -> None:
    """Raise CancelledError in a task at its await of a future, and leave the future alone.

    The effect of ``asyncio.shield``, after the fact: a turn of the loop later, the task's own callback is
    called with a cancelled future.
    """
    task, future, callback, context = awaiter
    if isinstance(callback, StandIn):
        # It has been interrupted already.
        callback.cancels = task.cancelling()
        return
    future.remove_done_callback(callback)
    if isinstance(future, _GatheringFuture):
        # No task retrieves the exceptions of its children any more; asyncio would log them.
        future.add_done_callback(_retrieve)
    loop = task.get_loop()
    cancelled: asyncio.Future[Any] = loop.create_future()
    cancelled.cancel(message)
    stand_in = StandIn(task)

    def wake() -> None:
        _remove_done_callback(future, stand_in)
        callback(cancelled)

    _add_done_callback(future, stand_in, context=context)
    loop.call_soon(wake, context=context)


def leave_wait_for(future: asyncio.Future[Any]) -> bool:
    """Let a cancelled ``asyncio.wait_for`` end without ``future``, which it is cancelling in this call.

    In Python 3.11 it cancels its argument in a step of its own, and then waits for the end of that.

    Returns:
        False if the call does not come from there.
    """
    if not _is_called_from_cancelled_wait_for():
        return False
    # The last one belongs to wait_for(), which has just added it.
    callbacks = future._callbacks or []
    callback = callbacks[-1][0] if callbacks else None
    if not isinstance(callback, functools.partial):
        return False
    future.remove_done_callback(callback)
    future.get_loop().call_soon(callback, future)
    return True


def _is_called_from_cancelled_wait_for() -> bool:
    frame: FrameType | None = sys._getframe(1)
    # Outward through this package, to the caller of `cancel()`.
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    if frame is None or frame.f_code is not _CANCEL_AND_WAIT:
        return False
    # When its time is up, it is in none of its `except` clauses, and takes the result of that future.
    error = sys.exception()
    traceback = None if error is None else error.__traceback__
    return traceback is not None and traceback.tb_frame is frame.f_back


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__package__")).partition(".")[0] == "otel_tasks"


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def context_of(task: asyncio.Task[Any]) -> Context | None:
    """Return the context in which a task runs; None if it is unknown (Python 3.11, unless suspended)."""
    get_context = getattr(task, "get_context", None)
    if get_context is not None:
        context: Context = get_context()
        return context
    waiter = waits_for(task)
    if waiter is None:
        return None
    return next((awaiter.context for awaiter in awaiters(waiter) if awaiter.task is task), None)


def find_holder(task: asyncio.Task[Any], forwarded: list[asyncio.Future[Any]]) -> asyncio.Future[Any] | None:
    """Find a future that a native cancellation of ``task`` must not reach yet; None if there is none.

    Two kinds hold it off: a task in a shielded scope of anyio, because a native cancellation passes through
    the shield; and the wait for a function in a worker thread, because the thread runs on and uses resources
    that the task would release.

    Args:
        task: The task.
        forwarded: The futures that its cancellation would reach, from ``forwarded_to``.
    """
    for future in (task, *forwarded):
        if in_anyio_shield(future) if isinstance(future, asyncio.Task) else _is_in_thread(future):
            return future
    return None


def in_anyio_shield(task: asyncio.Task[Any]) -> bool:
    """Return True if the task is in a shielded ``anyio.CancelScope``; ``to_thread.run_sync`` opens one."""
    # Including the scopes of the tasks around it: their shields shield this one too. Most tasks that are
    # cancelled have none, and a generator takes most of the time.
    return _innermost_scope(task) is not None and any(scope.shield for scope in _anyio_scopes(task))


def cancelled_scopes(task: asyncio.Task[Any]) -> list[Any]:
    """Return the cancelled ``anyio.CancelScope``s around the task, the innermost first."""
    return [scope for scope in _anyio_scopes(task) if scope.cancel_called]


def _anyio_scopes(task: asyncio.Task[Any]) -> Iterator[Any]:
    scope = _innermost_scope(task)
    while scope is not None:
        yield scope
        scope = scope._parent_scope


def _innermost_scope(task: asyncio.Task[Any]) -> Any:
    backend = sys.modules.get("anyio._backends._asyncio")
    state = None if backend is None else backend._task_states.get(task)
    return None if state is None else state.cancel_scope


def tasks_in_scopes_of(task: asyncio.Task[Any]) -> list[asyncio.Task[Any]]:
    """Return the other tasks in the ``anyio.CancelScope``s that a task has opened, and in scopes of theirs.

    They are the children of its task groups: anyio cancels them again at each ``await``.
    """
    pending = _scopes_opened_by(task)[-1:]
    found: list[asyncio.Task[Any]] = []
    # The list grows while it is walked.
    for scope in pending:
        found.extend(child for child in scope._tasks if child is not task)
        pending.extend(scope._child_scopes)
    return found


def shield_from_anyio(task: asyncio.Task[Any]) -> Callable[[], None] | None:
    """Shield a task from anyio's scopes around it, by its own outermost scope; its own still cancel it.

    Returns:
        Undoes it. None if the task has no scope of its own (anyio opens one for each task of a group from
        version 4.14 on), or if that is shielded already.
    """
    scopes = _scopes_opened_by(task)
    if not scopes or scopes[-1].shield:
        return None
    outermost = scopes[-1]
    outermost.shield = True

    def unshield() -> None:
        # anyio delivers what the shield has held off.
        outermost.shield = False

    return unshield


def is_cancelled_by_own_scope(task: asyncio.Task[Any]) -> bool:
    """Return True if a scope of anyio that a task has opened itself is cancelled: it goes on after that."""
    return any(scope.cancel_called for scope in _scopes_opened_by(task))


@contextlib.contextmanager
def anyio_held_off(task: asyncio.Task[Any]) -> Generator[None]:
    """Hold off anyio's repeated cancellation of the calling task.

    Without a new scope where possible: a generator that is closed in the block leaves scopes that it entered
    before, and anyio refuses that while a newer one is open.
    """
    own = _scopes_opened_by(task)
    if not own or is_cancelled_by_own_scope(task):
        with anyio_shield() if any(_anyio_scopes(task)) else contextlib.nullcontext():
            yield
        return
    unshield = shield_from_anyio(task)
    try:
        yield
    finally:
        if unshield is not None:
            unshield()


def _scopes_opened_by(task: asyncio.Task[Any]) -> list[Any]:
    """Return anyio's open scopes of a task itself, the innermost first."""
    return list(itertools.takewhile(lambda scope: scope._host_task is task, _anyio_scopes(task)))


def _is_in_thread(future: asyncio.Future[Any]) -> bool:
    """Return True for the future of ``run_in_executor`` while its function runs."""
    for callback, _ in future._callbacks or ():
        if getattr(callback, "__qualname__", "") != "_chain_future.<locals>._call_check_cancel":
            continue
        for cell in getattr(callback, "__closure__", None) or ():
            source = cell.cell_contents
            # A function that waits in the queue of its executor can still be cancelled, and is.
            if isinstance(source, ThreadFuture) and source.running():
                return True
    return False


def call_when_moved(future: asyncio.Future[Any], callback: Callable[[], object]) -> None:
    """Call ``callback`` once, after a task has run its next step or any other future is done."""
    waiter = waits_for(future) if isinstance(future, asyncio.Task) else future
    if waiter is None:
        future.get_loop().call_soon(callback, context=Context())
        return
    # It runs after the task's own callback: callbacks run in the order in which they were added.

    def call(_: object) -> None:
        callback()

    _add_done_callback(waiter, call, context=Context())


@contextlib.contextmanager
def anyio_shield() -> Generator[None]:
    """Open a shielded ``anyio.CancelScope`` where anyio is imported; do nothing where it is not."""
    anyio = sys.modules.get("anyio")
    # None while the module is being imported.
    make_scope = getattr(anyio, "CancelScope", None)
    task = asyncio.current_task()
    # anyio does not work without a task (granian can run coroutines without one).
    if make_scope is None or task is None:
        yield
        return
    scope = make_scope(shield=True)
    scope.__enter__()
    try:
        yield
    finally:
        # A generator that is finalized elsewhere ends in another task, where anyio refuses the exit.
        if asyncio.current_task() is task:
            scope.__exit__(*sys.exc_info())
