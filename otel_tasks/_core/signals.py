"""A tree of the running tasks on a signal, also while a task holds the event loop.

Rules, each with a test of its own:

1. It is a handler of ``signal.signal``: Python calls it in the main thread between two steps of whatever
   runs there, where ``loop.add_signal_handler`` would wait for the loop to turn. Code in C that never comes
   back to Python holds it up too; ``faulthandler.register(..., chain=True)`` shows the threads even then.
2. The handler that was there before is called after it, and is put back at the end.
3. It raises nothing into the code that it interrupts, and writes past the buffers of the file: in the middle
   of a ``print`` these are not to be touched.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import TextIO


def write_on_signal(
    describe: Callable[[FrameType | None], str], signum: int | None, file: TextIO | None
) -> ExitStack:
    """Write what ``describe`` says at each signal; see ``TaskManager.dump_on_signal``."""
    number = _checked_signal(signum)
    if file is not None and not hasattr(file, "write"):
        # Found out at the signal, it would be too late: nothing is raised there.
        raise TypeError(f"dump_on_signal() writes to an open text file, got {file!r}: pass file=open(...)")
    handler = _Handler(describe, number, file)
    undo = ExitStack()
    undo.callback(handler.leave)
    return undo


class _Handler:
    """What is called at a signal."""

    def __init__(
        self, describe: Callable[[FrameType | None], str], signum: signal.Signals, file: TextIO | None
    ) -> None:
        self._describe: Callable[[FrameType | None], str] | None = describe
        self._signum = signum
        self._file = file
        # Signals that come meanwhile are answered by what is being written: one handler inside of another
        # and so on would come to the end of the stack, and then raise.
        self._writing = False
        try:
            self._previous: Any = signal.signal(signum, self)
        except (OSError, ValueError) as error:
            # On Windows it is a ValueError, as of CTRL_C_EVENT, which can only be sent.
            usable = " or ".join(_usable_signals())
            raise ValueError(f"dump_on_signal() cannot handle {signum.name}: use {usable}") from error

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._describe is not None and not self._writing:
            self._writing = True
            try:
                _write(_text_of(self._describe, frame), self._file or sys.stderr)
            finally:
                self._writing = False
        if callable(self._previous):
            self._previous(signum, frame)

    def leave(self) -> None:
        """Put the handler before it back; where another has come since, which calls this one, say nothing."""
        self._describe = self._file = None
        current: object = signal.getsignal(self._signum)
        if current is self and _in_main_thread():
            # None: it was not Python that had put it there.
            signal.signal(self._signum, self._previous or signal.SIG_DFL)


def _text_of(describe: Callable[[FrameType | None], str], frame: FrameType | None) -> str:
    try:
        return describe(frame) + "\n"
    except Exception:
        return traceback.format_exc()


def _write(text: str, file: Any) -> None:
    try:
        try:
            number = file.fileno()
        except (OSError, AttributeError):
            # It is in memory.
            file.write(text)
            return
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(number, data) :]
    except Exception:
        # Closed, or full: there is nobody to tell.
        return


def _usable_signals() -> list[str]:
    """Those that nobody else needs, and that this platform has."""
    return [f"signal.{name}" for name in ("SIGUSR1", "SIGUSR2", "SIGBREAK") if hasattr(signal, name)]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _checked_signal(signum: int | None) -> signal.Signals:
    if signum is None:
        signum = getattr(signal, "SIGUSR1", None)
    if signum is None:
        raise RuntimeError(
            "dump_on_signal() uses SIGUSR1, which this platform does not have: "
            "on Windows write dump_on_signal(signal.SIGBREAK) and press Ctrl+Break"
        )
    try:
        number = signal.Signals(signum)
    except ValueError:
        usable = " or ".join(_usable_signals())
        raise ValueError(f"dump_on_signal() takes a signal, as {usable}, got {signum!r}") from None
    if not _in_main_thread():
        raise RuntimeError(
            f"dump_on_signal() was called in thread {threading.current_thread().name!r}: "
            "Python lets only the main thread handle signals; call it there, before the loop is started"
        )
    return number
