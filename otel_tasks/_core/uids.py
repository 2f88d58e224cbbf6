"""Uids: finds a live task by its uid, and adds a uid that was read late to the record of its task.

Tasks are untyped here: `task` and `tree` refer to each other, and a type would add this file to the circle.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from contextvars import Context
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from otel_tasks._core.extras import extras_for

if TYPE_CHECKING:
    from otel_tasks._core.loop import Home
    from otel_tasks._core.records import History


class Uids:
    """The uids of one manager's tasks that have been read.

    Args:
        home: The manager's loop.
        history: The records of its ended tasks.
    """

    def __init__(self, home: Home, history: History) -> None:
        self._home = home
        self._history = history
        # Threads may read the uid of one task at the same time.
        self._making = threading.RLock()
        # Weak, since an ended task is in the history.
        self._tasks: WeakValueDictionary[str, Any] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._tasks)

    def find(self, uid: str) -> Any:
        """Return the live task with this uid; None if there is none."""
        task = self._tasks.get(uid)
        return task if task is not None and task._group._live.get(task._key) is task else None

    def of(self, task: Any) -> str:
        """Return a task's uid, made on first use."""
        extras = extras_for(task)
        if extras.uid is None:
            with self._making:
                if extras.uid is None:
                    # 128 random bits cannot be guessed. From a counter, a client could guess other clients'
                    # uids.
                    uid = token_urlsafe(16)
                    self._tasks[uid] = task
                    extras.uid = uid
            self._record_late(task)
        return extras.uid

    def _record_late(self, task: Any) -> None:
        """Add the uid to a task's record in the history, if the task has ended before its uid was read."""
        loop = self._home.elsewhere()
        if loop is None:
            self._record(task)
        else:
            with suppress(RuntimeError):  # The loop is closed: no task ends in it any more.
                loop.call_soon_threadsafe(self._record, task, context=Context())

    def _record(self, task: Any) -> None:
        if task.done():
            self._history.note_uid(task.info())
