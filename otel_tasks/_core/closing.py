"""In which event loops a manager is shut down, and by what.

A shutdown belongs to the loop in which it happened. A test client, a test, and `asyncio.run()` make a loop of
their own. The manager is open there, whatever has happened to it elsewhere in the process.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from otel_tasks._core.cancellation import CancelCause


class Shutdown(NamedTuple):
    """One shutdown.

    Attributes:
        by: The lifespan or the call that shut the manager down, in words.
        cause: The cause with which it cancels tasks.
    """

    by: str
    cause: CancelCause


class Shutdowns:
    """The shutdowns of one manager, each with its loop, which may be forgotten once it is closed."""

    def __init__(self) -> None:
        self._known: list[tuple[Callable[[], asyncio.AbstractEventLoop | None], Shutdown]] = []

    def add(self, loop: asyncio.AbstractEventLoop, shutdown: Shutdown) -> None:
        """Note that the manager is shut down in ``loop``; the first shutdown stays."""
        if self.of(loop) is None:
            self._known.append((_reference(loop), shutdown))

    def of(self, loop: asyncio.AbstractEventLoop) -> Shutdown | None:
        """The shutdown in ``loop``, if there was one."""
        found = None
        for entry in list(self._known):
            known = entry[0]()
            if known is loop:
                found = entry[1]
            elif known is None or known.is_closed():
                self._known.remove(entry)
        return found

    def forget(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the manager for open in ``loop``."""
        self._known = [entry for entry in self._known if entry[0]() is not loop]


def _reference(loop: asyncio.AbstractEventLoop) -> Callable[[], asyncio.AbstractEventLoop | None]:
    try:
        return weakref.ref(loop)
    except TypeError:
        # A loop written in another language need not support weak references.
        return lambda: loop
