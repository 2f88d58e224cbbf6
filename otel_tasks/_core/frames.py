"""Where a task is: the line of the user's code, found in suspended coroutines or a thread's frames.

Rules, each with a test of its own:

1. The *place* is the innermost line of the user's own code: not of the standard library, not of this package,
   and not of an installed library, unless the task's function is from that library (an application may be
   installed too). The function that this line calls is reported with it.
2. Without such a line, the place is the innermost line of a library, then of the standard library.
3. An awaitable without frames (such as Cython's coroutines) ends the search. Nothing here raises or changes
   anything, so a thread and a signal handler may call it.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import re
import sys
import threading
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_STANDARD_LIBRARY = os.path.join(os.path.dirname(os.path.dirname(asyncio.__file__)), "")
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\]([^/\\]+)")
# Python's own limit on the depth of its stack, unless it was raised; then the rest is not seen.
_MAX_FRAMES: Final = 1000
# Types that stand between an awaiting coroutine and what it awaits, without an attribute for the next object.
_WRAPPERS = frozenset(
    {"coroutine_wrapper", "async_generator_asend", "async_generator_athrow", "anext_awaitable"}
)


@dataclass(frozen=True, slots=True)
class Location:
    """A line of code.

    Attributes:
        file: The path, as Python knows it.
        line: The line number.
        function: The function that contains it, with its class.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} {_shortened(self.file)}:{self.line}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready data."""
        return {"file": self.file, "line": self.line, "function": self.function}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task is; both are None if that is unknown.

    Attributes:
        at: The innermost line of the user's code.
        calls: The function that this line has called.
    """

    at: Location | None = None
    calls: str | None = None

    def __str__(self) -> str:
        return f"{self.at} > {self.calls}" if self.calls else str(self.at or "")

    def clause(self) -> str:
        """The end of a sentence about the task; empty if the place is unknown."""
        return "" if self.at is None else f"; it is at {self}"


class Stacks:
    """The frames of all threads, read once when they are first needed.

    Args:
        interrupted: In a signal handler, the frame that it has interrupted: those above are the handler's.
    """

    def __init__(self, interrupted: FrameType | None = None) -> None:
        self._interrupted = interrupted
        self._frames: dict[int, FrameType | None] | None = None

    def of_thread(self, number: int | None) -> list[FrameType]:
        """The frames of a thread, outermost first; none if there is no such thread."""
        if self._frames is None:
            own = self._interrupted or _outside(sys._getframe())
            # Without the frames of this package, which would hold themselves and those around them until the
            # next garbage collection.
            self._frames = {**sys._current_frames(), threading.get_ident(): own}
        frame = None if number is None else self._frames.get(number)
        frames: list[FrameType] = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames[::-1]

    def of_task(
        self,
        task: asyncio.Task[Any],
        thread: int | None,
        coroutine_of: Callable[[asyncio.Task[Any]], Any] = lambda task: task.get_coro(),
    ) -> list[FrameType]:
        """The frames of a task, outermost first.

        Args:
            task: Any, managed or not.
            thread: That of its loop.
            coroutine_of: Returns the outermost coroutine to consider of a live task.
        """
        try:
            if task.done():
                return []
            coro = coroutine_of(task)
            if task is not asyncio.current_task(task.get_loop()):
                return suspended_frames(coro)
            frames = self.of_thread(thread)
            outermost = _first_of(coro, "cr_frame", "gi_frame")
            return frames[frames.index(outermost) :] if outermost in frames else frames
        except Exception:
            # Not every task in a loop is one of asyncio's.
            return []


def suspended_frames(awaitable: object) -> list[FrameType]:
    """The frames of a suspended coroutine and of what it awaits, outermost first."""
    return [frame for _, frame in suspended_chain(awaitable)]


def suspended_chain(awaitable: object) -> Iterator[tuple[object, FrameType]]:
    """A suspended coroutine and what it awaits, each with its frame, outermost first."""
    for _ in range(_MAX_FRAMES):
        if type(awaitable) is CoroutineType and awaitable.cr_frame is not None:
            # Most of a chain: the general case below takes several times as long.
            yield awaitable, awaitable.cr_frame
            awaitable = awaitable.cr_await
            continue
        if type(awaitable) is AsyncGeneratorType and awaitable.ag_frame is not None:
            yield awaitable, awaitable.ag_frame
            awaitable = awaitable.ag_await
            continue
        if awaitable is None:
            return
        frame = _first_of(awaitable, "cr_frame", "gi_frame", "ag_frame")
        if isinstance(frame, FrameType):
            yield awaitable, frame
        elif frame is not None:
            # An object that has every attribute, such as a mock: the search would not end.
            return
        awaitable = _awaited_by(awaitable)


def place_of(frames: Sequence[FrameType], *, home: bool = False) -> Place:
    """Find the user's line among frames.

    Args:
        frames: Outermost first.
        home: The outermost one is the user's, in whatever library it is.
    """
    files = [frame.f_code.co_filename for frame in frames]
    users = {""}
    if home:
        users.update([origin for origin in map(_origin, files) if origin is not None][:1])
    rank, number = max(((_rank(file, users), number) for number, file in enumerate(files)), default=(0, 0))
    if not rank:
        return Place()
    calls = frames[number + 1].f_code.co_qualname if number + 1 < len(frames) else None
    return Place(_location(frames[number]), calls)


def lines_of(frames: Sequence[FrameType]) -> list[tuple[Location, bool]]:
    """The lines of a task's frames, innermost first, and whether each is in the user's code.

    Args:
        frames: Outermost first; the outermost one is the user's, in whatever library it is.
    """
    users = {"", *[_origin(frame.f_code.co_filename) for frame in frames[:1]]} - {None}
    return [
        (_location(frame), _origin(frame.f_code.co_filename) in users)
        for frame in reversed(frames)
        if not _is_ours(frame.f_code.co_filename)
    ]


def _rank(file: str, users: set[str]) -> int:
    """The user's files before a library's, those before the standard library's; 0 for this package's."""
    origin = _origin(file)
    if origin is not None:
        return 3 if origin in users else 2
    return 0 if _is_ours(file) else 1


def calling_line() -> Location | None:
    """The line of the current task's own code that has called this package; None if there is none."""
    task = asyncio.current_task()
    outermost = None if task is None else _first_of(task.get_coro(), "cr_frame", "gi_frame")
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        # The frames outside of it have started the loop.
        frame = None if frame is outermost else frame.f_back
    return place_of(frames[::-1]).at


def exc_info_of(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Return the ``exc_info`` of a log line: the traceback from the first line on that is not this package's.

    With a timeout or retries, up to six frames of this package stand above the task's function. An error of
    this package alone keeps its whole traceback.
    """
    first = error.__traceback__
    while first is not None and _is_ours(first.tb_frame.f_code.co_filename):
        first = first.tb_next
    return type(error), error, first or error.__traceback__


def _location(frame: FrameType) -> Location:
    code = frame.f_code
    # The line of a frame is None between two instructions that have one.
    line: int | None = frame.f_lineno
    return Location(code.co_filename, code.co_firstlineno if line is None else line, code.co_qualname)


def _awaited_by(awaitable: object) -> object:
    if type(awaitable).__name__ in _WRAPPERS:
        return next((thing for thing in gc.get_referents(awaitable) if _leads_on(thing)), None)
    return _first_of(awaitable, "cr_await", "gi_yieldfrom", "ag_await")


def _leads_on(thing: object) -> bool:
    return (
        type(thing) is AsyncGeneratorType
        or type(thing).__name__ in _WRAPPERS
        or _first_of(thing, "cr_frame", "gi_frame", "ag_frame") is not None
    )


def _first_of(thing: object, *names: str) -> Any:
    """The first of these attributes that exists and is not None."""
    for name in names:
        try:
            value = getattr(thing, name, None)
        except Exception:  # noqa: S112  # foreign code: an attribute that raises counts as missing
            continue
        if value is not None:
            return value
    return None


def _outside(frame: FrameType | None) -> FrameType | None:
    """The frame that has called this package."""
    while frame is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE)


@functools.lru_cache(maxsize=4096)
def _origin(file: str) -> str | None:
    """The owner of a file: "" is the user, else the name of an installed library; None is neither."""
    if _is_ours(file):
        return None
    installed = _INSTALLED.search(file)
    if installed is not None:
        return installed[1]
    return None if file.startswith((_STANDARD_LIBRARY, "<frozen ")) else ""


def _shortened(file: str) -> str:
    """A path relative to the working directory, or to the folder of the library."""
    installed = _INSTALLED.search(file)
    if installed is not None:
        return file[installed.start(1) :]
    try:
        here = os.path.join(os.getcwd(), "")
    except OSError:
        # The directory is gone.
        here = _STANDARD_LIBRARY
    return file.removeprefix(here).removeprefix(_STANDARD_LIBRARY)
