"""The event loop, the thread, and the clock that a manager belongs to, and in which loops it is shut down.

A manager belongs to one running loop at a time. It binds to the loop in which it is first used, and can move
to another one when it has no live tasks. A shutdown belongs to the loop in which it happened: in the loop of
a test client, of a test, or of ``asyncio.run()`` the manager is open, even if another loop of the process has
shut it down.
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from asyncio import _get_running_loop
from contextlib import suppress
from contextvars import Context
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from otel_tasks._core.clock import clock_of, epoch_of, monotonic, reads_loop_time
from otel_tasks._core.factory import holder_of
from otel_tasks.exceptions import ManagerClosedError, WrongLoopError, WrongThreadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks._core.events import CancelCause

# Differs from everything that `run_here` returns.
_NO_RUN: object = object()

# On Python 3.11, `_get_running_loop()` calls getpid(), and the system call takes 4 % of a task. While a loop
# runs, its thread has its hooks for asynchronous generators, so they identify it too.
_HOOKS_ARE_FASTER = sys.version_info < (3, 12)
# Returns equal objects where the same loop runs. If it has no hooks of its own, also elsewhere: see
# `Home.joins_fast_path`.
run_here: Callable[[], object] = sys.get_asyncgen_hooks if _HOOKS_ARE_FASTER else _get_running_loop

_homes: weakref.WeakSet[Home] = weakref.WeakSet()


class Occupant(Protocol):
    """What a home needs from its manager."""

    @property
    def live(self) -> int:
        """The number of live tasks."""
        ...

    @property
    def has_special_tasks(self) -> bool:
        """True if a listener or a limit applies to every task."""
        ...

    def lose_tasks(self) -> None:
        """Drop all live tasks: their loop was closed before they ended."""
        ...

    def moved(self, shutdown: Shutdown | None, *, was_closed: bool) -> None:
        """Adapt to the home's new loop, in which the manager may have been shut down before."""
        ...


class Shutdown(NamedTuple):
    """One shutdown.

    Attributes:
        by: The lifespan or the call that shut the manager down, in words.
        cause: The cause with which it cancels tasks.
    """

    by: str
    cause: CancelCause


class Home:
    """The loop that one manager belongs to.

    Args:
        name: The manager's name, for messages.
        occupant: The manager, which adapts to a change of the loop.
    """

    def __init__(self, name: str, occupant: Occupant) -> None:
        self._name = name
        self._occupant = occupant
        self.loop: asyncio.AbstractEventLoop | None = None
        # The thread and the process in which that loop runs: the child of a fork has a copy of this home.
        self.thread: int | None = None
        self._process = 0
        # True while the manager is shut down in that loop; and while the shutdown lasts.
        self.closed = False
        self.is_closing = False
        self.shutdowns = Shutdowns()
        # The loop, while plain tasks may take the fast path, else None; and what `run_here` returned in it.
        # Creation compares this instead of four attributes. Telemetry is checked separately. In one tuple,
        # because another thread may move the home.
        self.fast_path: tuple[object, Any] = (_NO_RUN, None)
        # The object that has the loop's task factory as its attribute `_task_factory`.
        self.factories: Any = None
        # The clock of the loop, for every timestamp and duration of this manager.
        self.clock: Callable[[], float] = monotonic
        # The same clock if it differs from the loop's time(), which deadlines use; else None.
        self.other_clock: Callable[[], float] | None = None
        # The wall-clock time at which the clock was 0, in seconds since 1970.
        self.epoch = epoch_of(None)
        _homes.add(self)

    def enter(self) -> asyncio.AbstractEventLoop:
        """Check that a task may be created here, and return the loop to create it in.

        Raises:
            WrongThreadError: No loop runs in this thread.
            WrongLoopError: Tasks are live in another loop.
            ManagerClosedError: The manager is shut down.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongThreadError(
                f"manager {self._name!r} creates tasks in a running event loop, and none runs in this "
                "thread: write create_task_threadsafe(...), or call it from a coroutine"
            ) from None
        if loop is not self.loop:
            self.bind(loop)
        self._check_open()
        return loop

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to ``loop``, which runs in this thread.

        Raises:
            WrongLoopError: Tasks are live in another loop that is not closed.
        """
        if self.loop is not loop:
            self._leave()
            self._belong_to(loop)
        self.thread = get_ident()

    def meet(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to ``loop``, which may run in another thread, unless tasks are live in another open loop."""
        if self.loop is loop or (self._occupant.live and self.loop is not None and not self.loop.is_closed()):
            return
        if _get_running_loop() is loop:
            self.bind(loop)
            return
        self._leave()
        self._belong_to(loop)
        self.thread = None
        with suppress(RuntimeError):  # The loop is closed: no thread runs it.
            loop.call_soon_threadsafe(self.bind, loop, context=Context())

    def meet_running_loop(self) -> None:
        """Bind to the running loop, if there is one and no task is live in another open loop."""
        loop = _get_running_loop()
        if loop is not None:
            self.meet(loop)

    def now(self) -> float:
        """Read the clock. Callers may keep this method across a change of the loop, but not the clock."""
        return self.clock()

    def elsewhere(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop if the caller is in another thread; None in its own, or before there is a loop."""
        if get_ident() == self.thread or _get_running_loop() is self.loop:
            return None
        return self.loop

    def loop_for_others(self) -> asyncio.AbstractEventLoop:
        """Return the loop in which another thread may create a task.

        Raises:
            ManagerClosedError: The manager is shut down.
            WrongLoopError: There is no loop yet, or it is closed.
        """
        self._check_open()
        if self.loop is None or self.loop.is_closed():
            raise WrongLoopError(
                f"manager {self._name!r} runs in no event loop: enter it there with async with, "
                "or create a first task there"
            )
        return self.loop

    def update_fast_path(self) -> None:
        """Decide whether plain tasks may take the fast path; call it when one of the conditions changes."""
        is_slow = self.closed or self._occupant.has_special_tasks
        self.fast_path = (_NO_RUN, None if is_slow else self.loop)

    def joins_fast_path(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Check that ``loop``, that of the fast path, runs here, and remember its run for the next task."""
        if _get_running_loop() is not loop:
            return False
        run: Any = run_here()
        if not _HOOKS_ARE_FASTER or getattr(run.firstiter, "__self__", None) is loop:
            self.fast_path = (run, loop)
        return True

    # -- shut down --------------------------------------------------------------------------

    def close(self, by: str, cause: CancelCause) -> None:
        """Accept no new tasks in this loop from now on."""
        self.closed = self.is_closing = True
        if self.loop is not None:
            self.shutdowns.add(self.loop, Shutdown(by, cause))
        self.update_fast_path()

    def end_shutdown(self) -> None:
        """Note that a shutdown is over; the manager stays closed."""
        self.is_closing = False

    def reopen(self) -> None:
        """Accept new tasks in this loop again after a shutdown."""
        self.closed = False
        if self.loop is not None:
            self.shutdowns.forget(self.loop)
        self.update_fast_path()

    @property
    def closed_here(self) -> bool:
        """True if the manager is shut down in the running loop, or, if none runs, in its own."""
        loop = _get_running_loop()
        if loop is None or loop is self.loop:
            return self.closed
        return self.shutdowns.of(loop) is not None

    def is_open_in(self, loop: asyncio.AbstractEventLoop) -> bool:
        """True if the manager is not shut down in ``loop`` and does not belong to another open loop."""
        here = self.loop is None or self.loop is loop or self.loop.is_closed()
        return here and self.shutdowns.of(loop) is None

    def _check_open(self) -> None:
        if self.closed:
            shutdown = None if self.loop is None else self.shutdowns.of(self.loop)
            by = "shutdown()" if shutdown is None else shutdown.by
            raise ManagerClosedError(
                f"manager {self._name!r} was shut down by {by} and takes no new tasks in this event loop: "
                "create them before that, or open it again with async with"
            )

    # -- moving -----------------------------------------------------------------------------

    def _leave(self) -> None:
        live = self._occupant.live
        if not live or self.loop is None:
            return
        if not self.loop.is_closed():
            tasks = f"manager {self._name!r} has {live} live task{'s' * (live != 1)}"
            if self._process != os.getpid():
                raise WrongLoopError(
                    f"{tasks} in the process that forked this one: use a TaskManager of its own here, "
                    "or start the process with multiprocessing's spawn"
                )
            raise WrongLoopError(
                f"{tasks} in another event loop: use one TaskManager per loop, "
                "hand the work over with create_task_threadsafe(...), or shut it down there first"
            )
        self._occupant.lose_tasks()

    def _belong_to(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._process = os.getpid()
        self.factories = holder_of(loop)
        shutdown = self.shutdowns.of(loop)
        was_closed, self.closed = self.closed, shutdown is not None
        self.clock = clock_of(loop)
        self.epoch = epoch_of(loop)
        self.other_clock = None if reads_loop_time(loop) else self.clock
        self.update_fast_path()
        self._occupant.moved(shutdown, was_closed=was_closed)


class Shutdowns:
    """The shutdowns of one manager, each with its loop; those of closed loops are dropped."""

    def __init__(self) -> None:
        self._known: list[tuple[Callable[[], asyncio.AbstractEventLoop | None], Shutdown]] = []

    def add(self, loop: asyncio.AbstractEventLoop, shutdown: Shutdown) -> None:
        """Record a shutdown of the manager in ``loop``; the first one is kept."""
        if self.of(loop) is None:
            self._known.append((_reference(loop), shutdown))

    def of(self, loop: asyncio.AbstractEventLoop) -> Shutdown | None:
        """Return the shutdown in ``loop``; None if there was none."""
        found = None
        for entry in list(self._known):
            known = entry[0]()
            if known is loop:
                found = entry[1]
            elif known is None or known.is_closed():
                self._known.remove(entry)
        return found

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Treat the manager as open in ``loop``."""
        self._known = [entry for entry in self._known if entry[0]() is not loop]


def _reference(loop: asyncio.AbstractEventLoop) -> Callable[[], asyncio.AbstractEventLoop | None]:
    try:
        return weakref.ref(loop)
    except TypeError:
        # A loop that is not written in Python need not support weak references.
        return lambda: loop


def _forget_runs() -> None:
    for home in list(_homes):
        home.update_fast_path()


if _HOOKS_ARE_FASTER and hasattr(os, "register_at_fork"):
    # The child of a fork has the hooks of its parent, but no running loop.
    os.register_at_fork(after_in_child=_forget_runs)
