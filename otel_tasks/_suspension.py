"""Where a suspended task waits: what its cancellation would reach, what holds it off, and how to wake it.

asyncio keeps most of this in attributes without public names. They are read here and nowhere else
(``_awaiters`` reads the callbacks of futures, too). They have been the same from Python 3.11 to 3.15, in C
and in Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from asyncio import tasks as asyncio_tasks
from concurrent.futures import Future as ThreadFuture
from contextvars import Context
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

# What gather() returns: it forwards its cancellation to each of its children.
_GatheringFuture: Any = vars(asyncio_tasks)["_GatheringFuture"]
# What wait_for() cancels with up to Python 3.11; from 3.12 on it is an asyncio.timeout().
_CANCEL_AND_WAIT = vars(asyncio_tasks)["_cancel_and_wait"].__code__ if sys.version_info < (3, 12) else None
# asyncio's own, past the override of ManagedTask, which counts those who wait.
_add_done_callback = asyncio.Future.add_done_callback


def waits_for(task: asyncio.Task[Any]) -> asyncio.Future[Any] | None:
    """The future at which a task is suspended; None if it runs, is about to run, or is done."""
    waiter = getattr(task, "_fut_waiter", None)
    return waiter if isinstance(waiter, asyncio.Future) and not waiter.done() else None


def forwarded_to(
    task: asyncio.Task[Any], stops_at: Callable[[asyncio.Task[Any]], bool]
) -> list[asyncio.Future[Any]]:
    """Every future that a ``cancel()`` of ``task`` would be forwarded to, the nearest first.

    Args:
        task: Where the cancellation starts.
        stops_at: Tells of a task on the way whether the cancellation goes no further there.
    """
    reached: dict[asyncio.Future[Any], None] = {}
    pending = [waits_for(task)]
    # The list grows while it is walked.
    for future in pending:
        if future is None or future in reached:
            continue
        reached[future] = None
        if isinstance(future, asyncio.Task):
            if not stops_at(future):
                pending.append(waits_for(future))
        elif isinstance(future, _GatheringFuture):
            pending.extend(child for child in _gathered_by(future) if not child.done())
    return list(reached)


def _gathered_by(gathering: Any) -> list[asyncio.Future[Any]]:
    """The futures that a ``gather`` waits for."""
    return list(gathering._children)


def awaiters(
    future: asyncio.Future[Any],
) -> Iterator[tuple[asyncio.Task[Any], asyncio.Future[Any], Callable[..., object], Context]]:
    """The tasks that forward their cancellation to ``future``.

    Yields:
        The task, the future at which it is suspended (``future`` itself, or the one of a ``gather``), its
        callback there, and its context.
    """
    for callback, context in future._callbacks or ():
        owner = getattr(callback, "__self__", None)
        if isinstance(owner, asyncio.Task) and getattr(callback, "__name__", "").endswith("wakeup"):
            yield owner, future, callback, context
            continue
        for cell in getattr(callback, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # the cell is empty
                if isinstance(cell.cell_contents, _GatheringFuture):
                    yield from awaiters(cell.cell_contents)


def interrupt(
    task: asyncio.Task[Any],
    future: asyncio.Future[Any],
    callback: Callable[..., object],
    context: Context,
    message: object,
) -> None:
    """Raise CancelledError in ``task`` at its await of ``future``, and leave ``future`` alone.

    What ``asyncio.shield`` does beforehand, done afterwards. The arguments are what ``awaiters`` yields: the
    task's own callback is called, a turn later, with a future that is cancelled.
    """
    future.remove_done_callback(callback)
    if isinstance(future, _GatheringFuture):
        # Nobody is left to retrieve what its children raise; asyncio would log that.
        future.add_done_callback(_retrieve)
    loop = task.get_loop()
    cancelled: asyncio.Future[Any] = loop.create_future()
    cancelled.cancel(message)
    loop.call_soon(callback, cancelled, context=context)


def leave_wait_for(future: asyncio.Future[Any]) -> bool:
    """Let an ``asyncio.wait_for`` that was cancelled go without ``future``, which it is just cancelling.

    Up to Python 3.11 it cancels what it waited for in a step of its own, and then waits for the end of that.

    Returns:
        False if the call does not come from there.
    """
    if not _is_called_from_wait_for():
        return False
    # The last one is its own: it has added it just before.
    callbacks = future._callbacks or []
    callback = callbacks[-1][0] if callbacks else None
    if not isinstance(callback, functools.partial):
        return False
    future.remove_done_callback(callback)
    future.get_loop().call_soon(callback, future)
    return True


def _is_called_from_wait_for() -> bool:
    frame: FrameType | None = sys._getframe(1)
    # From here out through the package to whatever called `cancel()`.
    while frame is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
    return frame is not None and frame.f_code is _CANCEL_AND_WAIT


def _retrieve(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def context_of(task: asyncio.Task[Any]) -> Context | None:
    """The context in which a task runs; None if that cannot be told (Python 3.11, unless it is suspended)."""
    get_context = getattr(task, "get_context", None)
    if get_context is not None:
        context: Context = get_context()
        return context
    waiter = waits_for(task)
    if waiter is None:
        return None
    return next((context for owner, _, _, context in awaiters(waiter) if owner is task), None)


def holds_off(task: asyncio.Task[Any], forwarded: list[asyncio.Future[Any]]) -> bool:
    """True while a native cancel of ``task`` would tear what must stay whole.

    That is a shielded scope of anyio, through which a native cancel passes, and the wait for a function in
    a worker thread: the thread runs on, and uses what the task would release.

    Args:
        task: Which.
        forwarded: Where its cancellation would go, as ``forwarded_to`` says.
    """
    tasks = [task, *(future for future in forwarded if isinstance(future, asyncio.Task))]
    return any(map(in_anyio_shield, tasks)) or any(map(_is_in_thread, forwarded))


def in_anyio_shield(task: asyncio.Task[Any]) -> bool:
    """True if the task is inside a shielded ``anyio.CancelScope``; ``anyio.to_thread.run_sync`` opens one."""
    # Up to the scopes of the tasks around it: a shield there shields this one too.
    return any(scope.shield for scope in _anyio_scopes(task))


def cancelled_scope(task: asyncio.Task[Any]) -> Any:
    """The innermost ``anyio.CancelScope`` around the task that is cancelled; None if none is."""
    return next((scope for scope in _anyio_scopes(task) if scope.cancel_called), None)


def _anyio_scopes(task: asyncio.Task[Any]) -> Iterator[Any]:
    backend = sys.modules.get("anyio._backends._asyncio")
    state = None if backend is None else backend._task_states.get(task)
    scope = None if state is None else state.cancel_scope
    while scope is not None:
        yield scope
        scope = scope._parent_scope


def _is_in_thread(future: asyncio.Future[Any]) -> bool:
    """True for what ``run_in_executor`` gives while its function runs."""
    for callback, _ in future._callbacks or ():
        if getattr(callback, "__qualname__", "") != "_chain_future.<locals>._call_check_cancel":
            continue
        for cell in getattr(callback, "__closure__", None) or ():
            source = cell.cell_contents
            # One that waits in the queue of its executor can still be cancelled, and is.
            if isinstance(source, ThreadFuture) and source.running():
                return True
    return False


def call_when_moved(task: asyncio.Task[Any], callback: Callable[[], object]) -> None:
    """Call back once after ``task`` has run its next step."""
    waiter = waits_for(task)
    if waiter is None:
        task.get_loop().call_soon(callback, context=Context())
        return
    # After the task's own: callbacks are called in the order in which they were added.

    def call(_: object) -> None:
        callback()

    _add_done_callback(waiter, call, context=Context())


@contextlib.contextmanager
def anyio_shield() -> Generator[None]:
    """Open a shielded ``anyio.CancelScope`` where anyio is imported; do nothing where it is not."""
    anyio = sys.modules.get("anyio")
    # None in a module that is being imported just now.
    make_scope = getattr(anyio, "CancelScope", None)
    if make_scope is None:
        yield
        return
    task = asyncio.current_task()
    scope = make_scope(shield=True)
    scope.__enter__()
    try:
        yield
    finally:
        # A generator that is finalized elsewhere ends in another task, where anyio refuses the exit.
        if asyncio.current_task() is task:
            scope.__exit__(*sys.exc_info())
