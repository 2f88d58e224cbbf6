"""The task factory of an event loop, and what it adds to a managed task.

Libraries set a factory to wrap what every task runs: Sentry's opens a scope around it. A managed task is
built directly, so the factory is called with a stage in place of the loop. The task that it makes there is
never scheduled; the managed task runs its coroutine. Rules, each with a test of its own:

1. What a factory wraps around a coroutine runs in the managed task. No second task runs, and no coroutine is
   left unawaited.
2. A factory whose tasks start eagerly starts managed tasks eagerly.
3. A task that the factory keeps, or adds a callback to, ends as the managed task does.
4. What is lost is named in one warning per factory. A factory that raises, or makes no task on the loop that
   it is given, is not used again: managed tasks run without it.
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

# Of each factory, whether it is used. The second table has those that cannot be referenced weakly.
_known: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_known_by_id: dict[int, tuple[object, bool]] = {}


class Made(NamedTuple):
    """What a factory has made for a managed task.

    Attributes:
        coro: What the managed task runs: the coroutine itself, or what is wrapped around it.
        eager: The first step runs when the task is created.
        shadow: The factory's own task, if somebody keeps it or added a callback to it.
        task_class: The class of that task.
    """

    coro: Coroutine[Any, Any, Any]
    eager: bool
    shadow: asyncio.Task[Any] | None
    task_class: type


class Unusable(Exception):
    """The factory has made no task on the stage; the message says what it did instead."""


def holder_of(loop: asyncio.AbstractEventLoop) -> Any:
    """Give the object that has the factory of ``loop`` as its attribute ``_task_factory``.

    An attribute, since every task reads it: that takes 10 ns, four of the 350 bytecodes of a task.
    ``loop.get_task_factory()`` takes 30 ns and is one call more. Reading it once would not do: a library may
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
    """Let a factory make what a managed task runs.

    Args:
        factory: The loop's.
        loop: Where the managed task will run.
        coro: What the managed task is for.
        name: The task's name, if the caller has given one.
        context: The task's context, if the caller has given one.

    Returns:
        None if the factory is not used: the task then runs ``coro``.

    Raises:
        RuntimeError: The factory has handed the coroutine to something else.
    """
    if not _is_used(factory, loop):
        return None
    try:
        return _made_by(factory, loop, coro, name, context)
    except Unusable as error:
        raise RuntimeError(f"task factory {factory!r} {error}") from None
    except Exception as error:
        if getattr(coro, "cr_frame", coro) is None:
            # It has closed the coroutine: nothing is left to run.
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


class _Stage:
    """Stands for a loop while its factory makes a task; everything else is passed on to the loop.

    Args:
        loop: The loop.
    """

    __slots__ = ("__weakref__", "asked_for_eager", "is_open", "loop")

    loop: asyncio.AbstractEventLoop
    is_open: bool
    asked_for_eager: bool

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._set("loop", loop)
        self._set("is_open", True)
        self._set("asked_for_eager", False)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Any:
        """Schedule a callback, unless it is the first step of the task that is being made."""
        if self.is_open and _is_step_on(self, callback):
            return None
        return self.loop.call_soon(callback, *args, context=context)

    def is_running(self) -> bool:
        """Say no while a task is being made: one that starts eagerly asks, and would run its first step."""
        if self.is_open:
            self._set("asked_for_eager", True)
            return False
        return self.loop.is_running()

    def close_stage(self) -> None:
        """Pass everything on from now on."""
        self._set("is_open", False)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    # A factory may look at the loop, keep a state on it, or look its own state up by the loop.

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.loop, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other or self.loop == other

    def __hash__(self) -> int:
        return hash(self.loop)

    @property  # type: ignore[misc]  # isinstance() asks for it, and object's own cannot be typed
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody sets it
        return type(self.loop)


def _is_step_on(stage: _Stage, callback: object) -> bool:
    task: Any = getattr(callback, "__self__", None)
    return hasattr(task, "get_coro") and task.get_loop() is stage


def _is_used(factory: Any, loop: asyncio.AbstractEventLoop) -> bool:
    try:
        known = _known.get(factory)
    except TypeError:
        known = _known_by_id.get(id(factory), (None, None))[1]
    return _try_out(factory, loop) if known is None else known


def _note(factory: Any, is_used: bool) -> None:
    try:
        _known[factory] = is_used
    except TypeError:
        # With the factory: its id must not become another's.
        _known_by_id[id(factory)] = (factory, is_used)


def _drop(factory: Any, reason: object) -> None:
    _note(factory, False)
    logger.warning("managed tasks run without what task factory %r adds to tasks: it %s", factory, reason)


def _try_out(factory: Any, loop: asyncio.AbstractEventLoop) -> bool:
    """Let a factory make a task of a coroutine that does nothing, and see what managed tasks lose."""
    coro = _nothing()
    try:
        made = _made_by(factory, loop, coro, None, None)
    except Unusable as error:
        # A task on another loop, if it is that, is about to run the coroutine.
        _drop(factory, error)
        return False
    except Exception as error:
        coro.close()
        _drop(factory, f"raised {error!r}")
        return False
    made.coro.close()
    coro.close()
    _note(factory, True)
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
    return True


async def _nothing() -> None:
    """Do nothing."""


def _made_by(
    factory: Any,
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, Any],
    name: str | None,
    context: Context | None,
) -> Made:
    stage = _Stage(loop)
    options: dict[str, Any] = {} if context is None else {"context": context}
    if name is not None and _TAKES_NAME:
        options["name"] = name
    try:
        task: Any = factory(stage, coro, **options)
    finally:
        stage.close_stage()
    if not hasattr(task, "get_coro") or not hasattr(task, "get_loop"):
        coro.close()
        raise Unusable(f"returned {task!r}, which is no task")
    if task.get_loop() is not stage:
        raise Unusable("makes its tasks on another loop than the one that it is given")
    task._log_destroy_pending = False
    made, task_class = task.get_coro(), type(task)
    shadow = task if task._callbacks else None
    link = weakref.ref(task)
    del task
    return Made(made, stage.asked_for_eager, link() if shadow is None else shadow, task_class)


def _end(shadow: asyncio.Task[Any], how: str, *result: object) -> None:
    # The method of Future: Task refuses results, and leaves its cancellation to its next step.
    future = next(base for base in type(shadow).__mro__ if base.__name__ == "Future")
    getattr(future, how)(shadow, *result)
