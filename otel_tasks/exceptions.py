"""Every error that this package raises of its own.

``ValueError`` and ``TypeError`` stay what they are; a cancelled task raises
``asyncio.CancelledError`` and a timeout ``TimeoutError``, as everywhere in asyncio.
"""

from __future__ import annotations


class OtelTasksError(Exception):
    """The base of all errors below: catch it to catch them all."""


class TaskNotFoundError(OtelTasksError, KeyError):
    """No live task has this name, or it has ended and what was asked for was not kept."""

    # KeyError shows repr(message), with quotes and escapes; ours is a sentence.
    __str__ = Exception.__str__


class TaskExistsError(OtelTasksError):
    """A live task already has this name, and ``on_conflict`` is ``"error"``."""


class GroupClosedError(OtelTasksError, RuntimeError):
    """A task was to be created in a scoped group that takes no more.

    A ``RuntimeError`` too, because ``asyncio.TaskGroup`` raises that.
    """


class ManagerClosedError(OtelTasksError, RuntimeError):
    """A task was to be created in a manager that is shut down."""


class QueueFullError(OtelTasksError):
    """No place is free, and as many tasks wait for one as may."""


class WrongLoopError(OtelTasksError, RuntimeError):
    """A manager with live tasks in one event loop was used from another one."""


class WrongThreadError(OtelTasksError, RuntimeError):
    """A task was to be created where no event loop is running."""


class IllegalTransitionError(OtelTasksError):
    """A signal that the table in ``_state`` does not know for this status; nothing was changed."""
