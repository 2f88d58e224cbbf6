"""A thread that reports what holds the event loop, for ``manager.watch(held=...)``.

Only another thread sees that the loop is held. It keeps asking the loop for an answer; if none comes in time,
it reads the frames of the loop's thread.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from otel_tasks._core.frames import Stacks, place_of
from otel_tasks._core.inspection import request_of
from otel_tasks._core.log import TaskLogger, logger, task_label
from otel_tasks._core.task import ManagedTask, own_coroutine
from otel_tasks._core.task_tree import duration

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from otel_tasks._core.tree import Ledger

# Seconds between two warnings that the loop is held in the same functions.
_QUIET = 60.0
# The number of questions to the loop in the time that it has for an answer.
_PINGS = 4


def _wrapper_code() -> CodeType | None:
    """From Python 3.14 on, a frame between asyncio's loop and a callback from another thread; else None."""
    method = getattr(vars(asyncio.events).get("_ThreadSafeHandle"), "_run", None)
    return getattr(method, "__code__", None)


_WRAPPER = _wrapper_code()


class Watchdog(threading.Thread):
    """Warns when the loop of a manager is held.

    Args:
        ledger: The manager's records.
        loop: The manager's loop.
        held: Seconds for which anything may hold the loop at a stretch.
    """

    def __init__(self, ledger: Ledger, loop: asyncio.AbstractEventLoop, held: float) -> None:
        super().__init__(name=f"otel_tasks watch {ledger.name}", daemon=True)
        self._loop = loop
        self._held = held
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._reported: WeakSet[asyncio.Task[Any]] = WeakSet()
        # The times of the last warnings, by the functions that held the loop.
        self._last: dict[frozenset[CodeType], float] = {}
        # As of the loop's last answer: its thread, the number of frames below a callback, and the code that
        # calls a callback.
        self._thread = ledger.home.thread
        self._depth = 0
        self._caller: CodeType | None = None

    def stop(self) -> None:
        """End the thread, soon."""
        self._stopped.set()
        self._answered.set()

    def run(self) -> None:
        """Ask the loop for answers until it is closed, or until ``stop()``."""
        pause = self._held / _PINGS
        while True:
            self._answered.clear()
            began = time.monotonic()
            if self._stopped.wait(pause):
                return
            # This thread is late itself: code in C has let no other thread run, and has only just returned.
            late = time.monotonic() - began > pause + self._held
            holder = self._report() if late else None
            try:
                self._loop.call_soon_threadsafe(self._answer, context=Context())
            except RuntimeError:
                # The loop is closed.
                return
            if holder is not None or not self._answered.wait(self._held):
                self._wait_for_answer(began, holder)

    def _answer(self) -> None:
        frame, depth = sys._getframe().f_back, 0
        self._caller = None if frame is None else frame.f_code
        while frame is not None:
            depth += frame.f_code is not _WRAPPER
            frame = frame.f_back
        self._thread, self._depth = threading.get_ident(), depth
        self._answered.set()

    def _wait_for_answer(self, began: float, holder: str | None) -> None:
        # Later holders in the same stretch are part of the same trouble: only the first is reported.
        holder = holder or self._report()
        while not (self._stopped.is_set() or self._loop.is_closed() or self._answered.wait(self._held)):
            holder = holder or self._report()
        if holder is not None and not self._stopped.is_set():
            seconds = duration(time.monotonic() - began)
            logger.info("the event loop runs again: it was held for %s by %s", seconds, holder)

    def _report(self) -> str | None:
        """Log what holds the loop, and return it; None if nothing was logged."""
        if not self._loop.is_running() or self._stopped.is_set():
            return None
        task = asyncio.current_task(self._loop)
        frames = self._frames(task)
        place = place_of(frames, home=isinstance(task, ManagedTask))
        if self._answered.is_set() or (task is None and place.at is None):
            # The loop has just gone on; or it waits for events, and the whole process got no CPU time.
            return None
        if self._was_reported(task, frozenset(frame.f_code for frame in frames)):
            return None
        holder = "a callback" if task is None else _described(task)
        (TaskLogger(task) if isinstance(task, ManagedTask) else logger).warning(
            "%s has held the event loop for more than %s%s",
            holder,
            duration(self._held),
            place.clause(),
        )
        return holder

    def _frames(self, task: asyncio.Task[Any] | None) -> list[FrameType]:
        stacks = Stacks()
        if task is not None:
            return stacks.of_task(task, self._thread, own_coroutine)
        # Without the frames that run the loop, which are not the callback's.
        frames = [frame for frame in stacks.of_thread(self._thread) if frame.f_code is not _WRAPPER]
        frames = frames[max(0, self._depth - 1) :]
        return frames[1:] if frames and frames[0].f_code is self._caller else []

    def _was_reported(self, task: asyncio.Task[Any] | None, functions: frozenset[CodeType]) -> bool:
        """True if this task, or a task in the same functions, was reported; otherwise, record it as such."""
        now = time.monotonic()
        self._last = {key: then for key, then in self._last.items() if now - then < _QUIET}
        if functions in self._last or (task is not None and task in self._reported):
            return True
        self._last[functions] = now
        if task is not None:
            self._reported.add(task)
        return False


def _described(task: asyncio.Task[Any]) -> str:
    """Name a task, and the request of a plain task, such as that of a request's handler."""
    if isinstance(task, ManagedTask):
        return f"task {task_label(task)}"
    request = request_of(task)
    return f"task {task.get_name()!r}" + ("" if request is None else f" of request {request.name!r}")
