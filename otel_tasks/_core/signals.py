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
    try:
        handler = ChainedHandler(number, _Dump(describe, file).write)
    except (OSError, ValueError) as error:
        # Windows raises ValueError, for example for CTRL_C_EVENT, which can only be sent.
        usable = " or ".join(_usable_signals())
        raise ValueError(f"dump_on_signal() cannot handle {number.name}: use {usable}") from error
    undo = ExitStack()
    undo.callback(handler.leave)
    return undo


class ChainedHandler:
    """A handler of one signal: acts first, and then calls the handler that was installed before.

    Args:
        signum: The signal.
        action: Called with the interrupted frame, in the main thread. It must not raise.

    Raises:
        OSError: The signal cannot be handled.
        ValueError: The same, or this is not the main thread of the main interpreter.
    """

    def __init__(self, signum: int, action: Callable[[FrameType | None], None]) -> None:
        self._signum = signum
        self._action: Callable[[FrameType | None], None] | None = action
        self._previous: Any = signal.signal(signum, self)

    @property
    def __self__(self) -> Any:
        """The object of the previous handler, a bound method: sse-starlette finds uvicorn's server by it."""
        return self._previous.__self__

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self._action is not None:
            self._action(frame)
        if callable(self._previous):
            self._previous(signum, frame)

    def leave(self) -> None:
        """Restore the previous handler; if a later one calls this one, only stop acting."""
        self._action = None
        current: object = signal.getsignal(self._signum)
        if current is self and in_main_thread():
            # None if the previous handler was not installed from Python.
            signal.signal(self._signum, self._previous or signal.SIG_DFL)


class _Dump:
    """Writes a text at each signal."""

    def __init__(self, describe: Callable[[FrameType | None], str], file: TextIO | None) -> None:
        self._describe = describe
        self._file = file
        # A signal that arrives while this one writes adds nothing: handlers nested without a bound would
        # reach the recursion limit, and raise.
        self._writing = False

    def write(self, frame: FrameType | None) -> None:
        if not self._writing:
            self._writing = True
            try:
                _write(_text_of(self._describe, frame), self._file or sys.stderr)
            finally:
                self._writing = False


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


def in_main_thread() -> bool:
    """Return True in the thread in which Python handles signals."""
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
    if not in_main_thread():
        raise RuntimeError(
            f"dump_on_signal() was called in thread {threading.current_thread().name!r}: "
            "Python handles signals only in the main thread; call it there, before the loop starts"
        )
    return number
