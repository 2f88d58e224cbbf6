"""Writes the tree of running tasks on a signal, even while a task holds the event loop.

Rules, each with a test of its own:

1. The handler is installed with ``signal.signal``: Python calls it in the main thread between two bytecode
   instructions of the code that runs there, where ``loop.add_signal_handler`` would wait for the loop's next
   turn. Code in C that does not return to Python delays it too; ``faulthandler.register(..., chain=True)``
   shows the threads even then.
2. The previous handler is called after this one, and restored at the end.
3. The handler raises nothing into the code that it interrupts, and bypasses the buffers of the file: it may
   interrupt a ``print``, which is changing them.
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
    """Write the text that ``describe`` returns at each signal; see ``TaskManager.dump_on_signal``.

    Args:
        describe: Called with the interrupted frame.
        signum: None is ``SIGUSR1``.
        file: None is the ``sys.stderr`` of that moment.

    Returns:
        What restores the previous handler when it is closed.
    """
    number = _checked_signal(signum)
    if file is not None and not hasattr(file, "write"):
        # Checked here, because nothing may be raised at the signal.
        raise TypeError(f"dump_on_signal() writes to an open text file, got {file!r}: pass file=open(...)")
    handler = _Handler(describe, number, file)
    undo = ExitStack()
    undo.callback(handler.leave)
    return undo


class _Handler:
    """Writes on one signal, and then calls the handler that was installed before."""

    def __init__(
        self, describe: Callable[[FrameType | None], str], signum: signal.Signals, file: TextIO | None
    ) -> None:
        self._describe: Callable[[FrameType | None], str] | None = describe
        self._signum = signum
        self._file = file
        # A signal that arrives while this handler writes adds nothing: handlers nested without a bound would
        # reach the recursion limit, and raise.
        self._writing = False
        try:
            self._previous: Any = signal.signal(signum, self)
        except (OSError, ValueError) as error:
            # Windows raises ValueError, for example for CTRL_C_EVENT, which can only be sent.
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
        """Restore the previous handler; if a later one calls this one, only stop writing."""
        self._describe = self._file = None
        current: object = signal.getsignal(self._signum)
        if current is self and _in_main_thread():
            # None if the previous handler was not installed from Python.
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
            # A file in memory.
            file.write(text)
            return
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(number, data) :]
    except Exception:
        # The file is closed, or the disk full; there is no other place to report it.
        return


def _usable_signals() -> list[str]:
    """The signals of this platform that are free for applications."""
    return [f"signal.{name}" for name in ("SIGUSR1", "SIGUSR2", "SIGBREAK") if hasattr(signal, name)]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _checked_signal(signum: int | None) -> signal.Signals:
    if signum is None:
        signum = getattr(signal, "SIGUSR1", None)
    if signum is None:
        raise RuntimeError(
            "dump_on_signal() uses SIGUSR1, which this platform does not have: "
            "on Windows, write dump_on_signal(signal.SIGBREAK) and press Ctrl+Break"
        )
    try:
        number = signal.Signals(signum)
    except ValueError:
        usable = " or ".join(_usable_signals())
        raise ValueError(f"dump_on_signal() takes a signal, such as {usable}, got {signum!r}") from None
    if not _in_main_thread():
        raise RuntimeError(
            f"dump_on_signal() was called in thread {threading.current_thread().name!r}: "
            "Python handles signals only in the main thread; call it there, before the loop starts"
        )
    return number
