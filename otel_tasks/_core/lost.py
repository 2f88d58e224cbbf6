"""Work that is lost because nothing shut its manager down, and the one WARNING that says so.

A loop ends in three ways, and a manager learns of each in another place:

1. Its runner cancels every task that is left, as ``asyncio.run()`` does. Unlike at any other cancellation, no
   loop runs at that moment.
2. It is closed under live tasks. The manager sees that when it is used in another loop.
3. The process ends. A process that is killed by a signal says nothing.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from otel_tasks._core.log import log_fields_of_all, logger
from otel_tasks._core.task import has_started

if TYPE_CHECKING:
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.ledger import Ledger
    from otel_tasks._core.task import ManagedTask

_MOST = 10


class LostWork:
    """What one manager loses; each task is reported once.

    Args:
        ledger: The manager's.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._noted_in: asyncio.AbstractEventLoop | None = None
        self._reported: WeakSet[ManagedTask[Any]] = WeakSet()

    def note(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note that a task is being cancelled while its loop does not run."""
        if self._noted_in is loop or self._ledger.closed or loop.is_closed():
            return
        self._noted_in = loop
        # Now, before they end. Not those of a block or a request that is cancelled with them, and sees that.
        lost = [(task, _described(task)) for task in self._live() if not _is_in_a_block(task)]
        # When the loop runs once more, every task has been cancelled.
        loop.call_soon(self._report_if_over, loop, lost, context=Context())

    def _report_if_over(
        self, loop: asyncio.AbstractEventLoop, lost: list[tuple[ManagedTask[Any], str]]
    ) -> None:
        self._noted_in = None
        if all(task.cancelling() for task in asyncio.all_tasks(loop)):
            self._report(lost)

    def report(self) -> None:
        """Log that what is live can never end."""
        self._report([(task, _described(task)) for task in self._live()])

    def _live(self) -> list[ManagedTask[Any]]:
        return [
            task for task in self._ledger.root._every_live() if not task.done() and task not in self._reported
        ]

    def _report(self, lost: list[tuple[ManagedTask[Any], str]]) -> None:
        if not lost:
            return
        self._reported.update(task for task, _ in lost)
        logger.warning(
            "manager %r was not shut down before its event loop ended, and lost %s. "
            "Write 'async with %s:' in the main coroutine, or run the server with its lifespan",
            self._ledger.name,
            _listed(lost),
            self._ledger.in_code,
            extra=log_fields_of_all(task.id for task, _ in lost),
        )


def _described(task: ManagedTask[Any]) -> str:
    return repr(task.get_name()) + ("" if has_started(task) else " (not started)")


def _listed(lost: list[tuple[ManagedTask[Any], str]]) -> str:
    """Name tasks by their groups: ``group 'outbox': 'mail-1', 'mail-2'``."""
    groups: dict[str, list[str]] = {}
    for task, text in lost[:_MOST]:
        groups.setdefault(task._group.id, []).append(text)
    listed = [f"group {group!r}: {', '.join(texts)}" for group, texts in groups.items()]
    more = len(lost) - _MOST
    return "; ".join(listed) + (f"; {more} more tasks" if more > 0 else "")


def _is_in_a_block(task: ManagedTask[Any]) -> bool:
    """True if a block or a request that has not ended itself waits for the task."""
    group: TaskGroup | None = task._group
    while group is not None:
        host = group._host if group._scope is None else group._scope.host
        if host is not None and not host.done():
            return True
        group = group.parent
    return False


# --- the end of the process --------------------------------------------------------------------------------

_used: WeakSet[Ledger] = WeakSet()
_process = 0


def report_at_exit(ledger: Ledger) -> None:
    """Report what ``ledger`` has lost when this process ends."""
    global _process
    if _process != os.getpid():
        # Also after a fork: what was live in the parent is not lost with the child.
        _process = os.getpid()
        _used.clear()
        _call_at_exit()
    _used.add(ledger)


def _call_at_exit() -> None:
    atexit.unregister(_report_all)
    atexit.register(_report_all)
    # A forked worker of multiprocessing does not run what atexit knows.
    processes = sys.modules.get("multiprocessing.util")
    if processes is not None:
        processes.Finalize(None, _report_all, exitpriority=0)


def _report_all() -> None:
    if _process != os.getpid():
        return
    for ledger in list(_used):
        if ledger.live and not ledger.closed:
            ledger.lost.report()
