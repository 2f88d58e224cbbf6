"""The task factory of an event loop, and what it adds to a managed task.

Libraries set a factory to wrap the coroutine of every task: Sentry's opens a scope around it. A managed task
is built directly, so the factory is called with a proxy of the loop. The task that it creates on the proxy is
never scheduled; the managed task runs its coroutine. Rules, each with a test of its own:

1. The coroutine that a factory wraps around another one runs in the managed task. No second task runs, and no
   coroutine is left unawaited.
2. A factory whose tasks start eagerly starts managed tasks eagerly.
3. A task that the factory keeps, or adds a callback to, ends as the managed task does.
4. One warning per factory names what is lost. A factory that raises, or creates no task on the loop that it
   is given, is not used again: managed tasks run without it.

Private attributes of an asyncio task are written here, and only of the factory's own task, which never runs:
``_log_destroy_pending`` and ``_log_traceback`` keep asyncio from reporting it.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from otel_tasks._core.log import logger

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from contextvars import Context

# asyncio passes a name on from there.
_TAKES_NAME = sys.version_info >= (3, 13, 3)

# Whether each factory is used. The second table has those that cannot be referenced weakly.
_known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_known_by_id: dict[int, tuple[object, bool]] = {}


class Made(NamedTuple):
    """What a factory has made for a managed task.

    Attributes:
        coro: The coroutine for the managed task to run: the given one, or the one wrapped around it.
        eager: The first step runs when the task is created.
        shadow: The factory's own task, if some code keeps it or has added a callback to it.
        task_class: The class of that task.
    """

    coro: Coroutine[Any, Any, Any]
    eager: bool
    shadow: asyncio.Task[Any] | None
    task_class: type


class Unusable(Exception):
    """The factory has created no task on the proxy; the message says what it did instead."""


def holder_of(loop: asyncio.AbstractEventLoop) -> Any:
    """Return an object whose attribute ``_task_factory`` is the factory of ``loop``.

    Every task reads it, so it is an attribute: that takes 10 ns, four of the 350 bytecodes of a task.
    ``loop.get_task_factory()`` takes 30 ns and one more call. Reading it once is not enough: a library may
    set its factory at any time.
    """
    return loop if hasattr(loop, "_task_factory") else _Holder(loop)


def make(
    factory: Any,
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any],
    name: str | None,
    context: Context | None,
) -> Made | None:
    """Let a factory make the coroutine that a managed task runs.

    Args:
        factory: The loop's.
        loop: Where the managed task will run.
        coro: The managed task's coroutine.
        name: The task's name, if the caller has given one.
        context: The task's context, if the caller has given one.

    Returns:
        None if the factory is not used: the task then runs ``coro``.

    Raises:
        RuntimeError: The factory has passed the coroutine to something else.
        Exception: The factory's own, if it has closed the coroutine.
    """
    if not _is_used(factory, loop):
        return None
    try:
        return _made_by(factory, loop, coro, name, context)
    except Unusable as error:
        raise RuntimeError(f"task factory {factory!r} {error}") from None
    except Exception as error:
        if getattr(coro, "cr_frame", coro) is None:
            # The factory has closed the coroutine: nothing is left to run.
            raise
        _drop(factory, f"raised {error!r}")
        return None


def end_like(shadow: asyncio.Task[Any], task: asyncio.Task[Any]) -> None:
    """End a factory's own task as the managed task has ended."""
    error = task._exception
    if task.cancelled():
        _end(shadow, "cancel")
    elif error is None:
        _end(shadow, "set_result", task.result())
    else:
        _end(shadow, "set_exception", error)
        # The managed task's failure is reported; asyncio need not report it again for this one.
        cast("Any", shadow)._log_traceback = False


class _Holder:
    """Reads the factory of a loop that keeps it to itself, as uvloop does."""

    __slots__ = ("_read",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._read = loop.get_task_factory

    @property
    def _task_factory(self) -> Any:
        return self._read()


class _LoopProxy:
    """Stands for a loop while its factory creates a task; otherwise, it forwards everything to the loop.

    Args:
        loop: The loop.
    """

    __slots__ = ("__weakref__", "is_creating", "is_eager", "loop")

    loop: asyncio.AbstractEventLoop
    # The factory has not returned yet.
    is_creating: bool
    # The task that it creates would have run its first step.
    is_eager: bool

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._set("loop", loop)
        self._set("is_creating", True)
        self._set("is_eager", False)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        """Schedule a callback, unless it is the first step of the task that is being created."""
        if self.is_creating and _is_step_on(self, callback):
            return None
        return self.loop.call_soon(callback, *args, context=context)

    def is_running(self) -> bool:
        """Return False while a task is being created: an eager one calls this before its first step."""
        if self.is_creating:
            self._set("is_eager", True)
            return False
        return self.loop.is_running()

    def end_creation(self) -> None:
        """Forward everything from now on."""
        self._set("is_creating", False)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    # A factory may read the loop, keep state on it, or look up its own state by the loop.

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.loop, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other or self.loop == other

    def __hash__(self) -> int:
        return hash(self.loop)

    @property  # type: ignore[misc]  # isinstance() reads it, and object's own cannot be typed
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]  # it is never set
        return type(self.loop)


def _is_step_on(proxy: _LoopProxy, callback: object) -> bool:
    task: Any = getattr(callback, "__self__", None)
    return hasattr(task, "get_coro") and task.get_loop() is proxy


def _is_used(factory: Any, loop: asyncio.AbstractEventLoop) -> bool:
    try:
        known = _known.get(factory)
    except TypeError:
        known = _known_by_id.get(id(factory), (None, None))[1]
    return _probe(factory, loop) if known is None else known


def _remember(factory: Any, is_used: bool) -> None:
    try:
        _known[factory] = is_used
    except TypeError:
        # Together with the factory, so that no other object can get its id.
        _known_by_id[id(factory)] = (factory, is_used)


def _drop(factory: Any, reason: object) -> None:
    _remember(factory, False)
    logger.warning("managed tasks run without what task factory %r adds to tasks: it %s", factory, reason)


def _probe(factory: Any, loop: asyncio.AbstractEventLoop) -> bool:
    """Let a factory create a task of a coroutine that does nothing; return whether it can be used."""
    coro = _nothing()
    try:
        made = _made_by(factory, loop, coro, None, None)
    except Unusable as error:
        # If the factory has created a task on another loop, that task is about to run the coroutine.
        _drop(factory, error)
        return False
    except Exception as error:
        coro.close()
        _drop(factory, f"raised {error!r}")
        return False
    made.coro.close()
    coro.close()
    _remember(factory, True)
    _warn_of_losses(factory, made)
    return True


def _warn_of_losses(factory: Any, made: Made) -> None:
    """Name once what managed tasks lose of a factory that is used."""
    losses = []
    if made.task_class.__module__ not in ("_asyncio", "asyncio.tasks"):
        losses.append(f"they are not of its class {made.task_class.__qualname__}")
    if made.shadow is not None:
        _end(made.shadow, "set_result", None)
        losses.append("the tasks that it sees only end with them, and cannot be awaited or cancelled")
    if losses:
        logger.warning(
            "managed tasks run what task factory %r wraps around a coroutine, but %s",
            factory,
            "; ".join(losses),
        )


async def _nothing() -> None:
    """Do nothing."""


def _made_by(
    factory: Any,
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any],
    name: str | None,
    context: Context | None,
) -> Made:
    proxy = _LoopProxy(loop)
    options: dict[str, Any] = {} if context is None else {"context": context}
    if name is not None and _TAKES_NAME:
        options["name"] = name
    try:
        task: Any = factory(proxy, coro, **options)
    finally:
        proxy.end_creation()
    _check_created(task, proxy, coro)
    task._log_destroy_pending = False
    made, task_class = task.get_coro(), type(task)
    shadow = task if task._callbacks else None
    link = weakref.ref(task)
    # If the factory keeps its task, the reference is still alive after this.
    del task
    return Made(made, proxy.is_eager, link() if shadow is None else shadow, task_class)


def _check_created(task: Any, proxy: _LoopProxy, coro: Coroutine[Any, Any, Any]) -> None:
    if not hasattr(task, "get_coro") or not hasattr(task, "get_loop"):
        coro.close()
        raise Unusable(f"returned {task!r}, which is no task")
    if task.get_loop() is not proxy:
        raise Unusable("makes its tasks on another loop than the one that it is given")


def _end(shadow: asyncio.Task[Any], how: str, *result: object) -> None:
    # Future's method: Task's refuses a result, and its cancel() waits for the task's next step.
    future = next(base for base in type(shadow).__mro__ if base.__name__ == "Future")
    getattr(future, how)(shadow, *result)
