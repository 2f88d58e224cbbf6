"""The exceptions of this package.

``ValueError`` and ``TypeError`` stay as they are; a cancelled task raises ``asyncio.CancelledError`` and a
timeout ``TimeoutError``, as everywhere in asyncio.
"""

from __future__ import annotations


class OtelTasksError(Exception):
    """The base of all errors below: catch it to catch them all."""


class TaskNotFoundError(OtelTasksError, KeyError):
    """No live task has this name, or the task has ended and its result was not kept."""

    # KeyError shows repr(message), with quotes and escapes; ours is a sentence.
    __str__ = Exception.__str__


class TaskExistsError(OtelTasksError):
    """A live task already has this name, and ``on_conflict`` is ``"error"``."""


class GroupClosedError(OtelTasksError, RuntimeError):
    """A task cannot be created because its group takes no new tasks.

    It is also a ``RuntimeError``, because ``asyncio.TaskGroup`` raises that.
    """


class ManagerClosedError(OtelTasksError, RuntimeError):
    """A task cannot be created because its manager is shut down."""


class QueueFullError(OtelTasksError):
    """A task cannot be created because no place is free and the queue is full."""


class WrongLoopError(OtelTasksError, RuntimeError):
    """A manager with live tasks in one event loop was used in another one."""


class WrongThreadError(OtelTasksError, RuntimeError):
    """A task cannot be created because no event loop runs in this thread."""


class IllegalTransitionError(OtelTasksError):
    """The table in ``state`` does not have this signal for this status; nothing has changed."""
