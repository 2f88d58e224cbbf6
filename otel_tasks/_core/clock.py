"""The clock of an event loop, which timestamps and durations are measured with.

Rules, each with a test of its own:

1. A loop has one clock. It is chosen when this module first sees the loop and never changes, so that any two
   timestamps of that loop can be subtracted, including those that a thread takes for it.
2. The clock is the system's monotonic clock in nanoseconds, unless the loop's ``time()`` is virtual.
3. It is not for deadlines: ``call_at`` and ``timeout_at`` take the loop's own ``time()``.
4. A moment has one wall-clock timestamp: the offset between the two clocks is kept, not measured each time.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from asyncio import _get_running_loop
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

# Before 3.13, monotonic() on Windows ticks 64 times a second, and perf_counter() is as precise as monotonic()
# is elsewhere (https://github.com/python/cpython/issues/88494).
monotonic: Callable[[], float] = (
    time.monotonic if time.get_clock_info("monotonic").resolution < 1e-5 else time.perf_counter
)

# Read at import: a test may replace the method of the class, too.
ASYNCIO_TIME = asyncio.BaseEventLoop.time

# Descriptors that may wrap a function in a class.
_WRITTEN_IN_PYTHON = (staticmethod, classmethod, functools.partialmethod)

# A difference of more seconds than this means that the wall clock was set, or that the machine slept.
_STEP = 1.0

# The epoch of each loop with a virtual clock; None for a real one.
_epochs: WeakKeyDictionary[asyncio.AbstractEventLoop, float | None] = WeakKeyDictionary()
_real_epoch = time.time() - monotonic()


def clock_of(loop: asyncio.AbstractEventLoop | None) -> Callable[[], float]:
    """Return the clock of a loop; None stands for a thread without a loop."""
    if loop is None:
        return monotonic
    try:
        virtual = _epochs[loop]
    except KeyError:
        virtual = _virtual_epoch(loop)
    if virtual is None:
        return monotonic
    # Not the bound method: a test may replace it again and again.
    return lambda: loop.time()


def now() -> float:
    """Read the clock of the loop that runs in this thread."""
    return clock_of(_get_running_loop())()


def reads_loop_time(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether the clock of a loop and the loop's ``time()`` are the same."""
    if _virtual_epoch(loop) is not None:
        return True
    return monotonic is time.monotonic and type(loop).time is ASYNCIO_TIME


def epoch_of(loop: asyncio.AbstractEventLoop | None) -> float:
    """Return the wall-clock time, in seconds since 1970, at which the clock of a loop was 0."""
    # One for the process: threads that race here set the same value.
    global _real_epoch
    virtual = None if loop is None else _virtual_epoch(loop)
    if virtual is not None:
        return virtual
    measured = time.time() - monotonic()
    if abs(measured - _real_epoch) > _STEP:
        _real_epoch = measured
    return _real_epoch


def wall_clock(moment: float, epoch: float) -> str:
    """Format a moment as a wall-clock timestamp in UTC, to the microsecond.

    Args:
        moment: Seconds on a clock of this module.
        epoch: The result of ``epoch_of`` for that clock.
    """
    return datetime.fromtimestamp(epoch + moment, UTC).isoformat(timespec="microseconds")


def rounded(seconds: float) -> float:
    """Round a duration to the microsecond, for people and for JSON: smaller digits are noise of the float."""
    return round(seconds, 6)


def _virtual_epoch(loop: asyncio.AbstractEventLoop) -> float | None:
    try:
        return _epochs[loop]
    except KeyError:
        # setdefault() is atomic: two threads that see the loop for the first time get the same value.
        return _epochs.setdefault(loop, _measured_epoch(loop))


def _measured_epoch(loop: asyncio.AbstractEventLoop) -> float | None:
    return time.time() - loop.time() if _is_virtual(loop) else None


def _is_virtual(loop: asyncio.AbstractEventLoop) -> bool:
    """Distinguish a test's virtual clock from a real one by the definition of its ``time()``.

    asyncio's own reads ``time.monotonic``; a compiled loop's (uvloop, winloop, rloop) reads the system's. A
    virtual clock is written in Python, in a subclass or on the object. So is the clock of a few real loops
    (trio-asyncio, qasync): those are precise, so using them loses nothing.

    Rejected: comparing ``loop.time()`` with ``time.monotonic()``. Some virtual clocks start there and diverge
    later (asynctest's, or any that adds an offset), and some real clocks differ: libuv counts the time that a
    Mac sleeps, and an older uvloop's clock stops while a callback runs.
    """
    if getattr(loop.time, "__func__", None) is ASYNCIO_TIME:
        # Most loops. In this order, because before Python 3.12 a look at a loop's `__dict__` makes each later
        # read of its attributes slower.
        return False
    if "time" in getattr(loop, "__dict__", ()):
        return True
    method = inspect.getattr_static(type(loop), "time", None)
    return isinstance(method, _WRITTEN_IN_PYTHON) or not inspect.ismethoddescriptor(method)
