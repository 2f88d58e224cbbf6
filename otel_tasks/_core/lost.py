"""Logs the work that is lost because nothing shut its manager down, in one WARNING.

A loop ends in three ways, and a manager learns of each in a different place:

1. Its runner cancels every task that is left, as ``asyncio.run()`` does. Unlike at any other cancellation, no
   loop runs at that moment.
2. It is closed under live tasks. The manager sees that when it is used in another loop.
3. The process ends. A process that a signal kills logs nothing.
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
from otel_tasks._core.task import has_started, runs_forever

if TYPE_CHECKING:
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.tree import Ledger

# The number of tasks that the warning names.
_MAX_NAMED = 10


class LostWork:
    """Reports what one manager loses, each task once.

    Args:
        ledger: The manager's.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._noted_in: asyncio.AbstractEventLoop | None = None
        self._reported: WeakSet[ManagedTask[Any]] = WeakSet()

    def watch_exit(self) -> None:
        """Report when the process ends."""
        _watch_exit(self)

    def ledger_in(self, loop: asyncio.AbstractEventLoop) -> Ledger | None:
        """Return the ledger if its manager belongs to ``loop``."""
        return self._ledger if self._ledger.home.loop is loop else None

    def note(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note that a task is being cancelled while its loop does not run."""
        if self._noted_in is loop or self._ledger.home.closed or loop.is_closed():
            return
        self._noted_in = loop
        # Read now, before the tasks end. Tasks of a block or a request are left out: it is cancelled with
        # them, and sees that.
        lost = [(task, _described(task)) for task in self._live() if not _is_in_a_block(task)]
        # The loop runs once more after every task has been cancelled.
        loop.call_soon(self._report_if_over, loop, lost, context=Context())

    def has_lost(self, task: ManagedTask[Any]) -> bool:
        """True if the task was reported: its loop ended, and nothing else has cancelled it."""
        return task in self._reported

    def report(self) -> None:
        """Report every live task: none of them can ever end."""
        self._report([(task, _described(task)) for task in self._live()])

    def report_at_exit(self) -> None:
        """Report every live task, unless the manager is shut down."""
        if self._ledger.live and not self._ledger.home.closed:
            self.report()

    def _report_if_over(
        self, loop: asyncio.AbstractEventLoop, lost: list[tuple[ManagedTask[Any], str]]
    ) -> None:
        self._noted_in = None
        if all(task.cancelling() for task in asyncio.all_tasks(loop)):
            self._report(lost)

    def _live(self) -> list[ManagedTask[Any]]:
        live = self._ledger.root._every_live()
        return [
            task
            for task in live
            if not task.done() and task not in self._reported and not _starts_again(task)
        ]

    def _report(self, lost: list[tuple[ManagedTask[Any], str]]) -> None:
        if not lost:
            return
        self._reported.update(task for task, _ in lost)
        logger.warning(
            "manager %r was not shut down before its event loop ended, and lost %s. "
            "In a script, write otel_tasks.run(main(), manager=%s); on a server, write "
            "lifespan=make_lifespan(manager=%s), or add the middleware, and leave the server's lifespan on",
            self._ledger.name,
            _listed(lost),
            self._ledger.in_code,
            self._ledger.in_code,
            extra=log_fields_of_all(task for task, _ in lost),
        )


def _starts_again(task: ManagedTask[Any]) -> bool:
    """True for a service and its attempts, unless it drains: it starts again with the application."""
    return runs_forever(task) or (task._extras is not None and task._extras.takes_no_place)


def _described(task: ManagedTask[Any]) -> str:
    return repr(task.get_name()) + ("" if has_started(task) else " (not started)")


def _listed(lost: list[tuple[ManagedTask[Any], str]]) -> str:
    """Name tasks by their groups: ``group 'outbox': 'mail-1', 'mail-2'``."""
    groups: dict[str, list[str]] = {}
    for task, text in lost[:_MAX_NAMED]:
        groups.setdefault(task.group.id, []).append(text)
    listed = [f"group {group!r}: {', '.join(texts)}" for group, texts in groups.items()]
    more = len(lost) - _MAX_NAMED
    return "; ".join(listed) + (f"; {more} more tasks" if more > 0 else "")


def _is_in_a_block(task: ManagedTask[Any]) -> bool:
    """True if a block or a request that has not ended waits for the task."""
    hosts = (group._host if group._scope is None else group._scope.host for group in task._group._outward())
    return any(host is not None and not host.done() for host in hosts)


# --- the end of the process --------------------------------------------------------------------------------

_watched: WeakSet[LostWork] = WeakSet()
_process = 0


def ledgers_in(loop: asyncio.AbstractEventLoop) -> list[Ledger]:
    """Return the ledgers of the managers that belong to ``loop``."""
    return [ledger for work in list(_watched) if (ledger := work.ledger_in(loop)) is not None]


def _watch_exit(work: LostWork) -> None:
    global _process
    if _process != os.getpid():
        # After a fork too: what was live in the parent is not lost with the child.
        _process = os.getpid()
        _watched.clear()
        _call_at_exit()
    _watched.add(work)


def _call_at_exit() -> None:
    atexit.unregister(_report_all)
    atexit.register(_report_all)
    # A forked worker of multiprocessing does not run the functions registered with atexit.
    processes = sys.modules.get("multiprocessing.util")
    if processes is not None:
        processes.Finalize(None, _report_all, exitpriority=0)


def _report_all() -> None:
    if _process != os.getpid():
        return
    for work in list(_watched):
        work.report_at_exit()
