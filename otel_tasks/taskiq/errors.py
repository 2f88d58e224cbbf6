"""The exceptions of remote tasks, and those with which an execution ends toward Taskiq's receiver."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from taskiq.exceptions import NoResultError

from otel_tasks.exceptions import OtelTasksError

if TYPE_CHECKING:
    from logging import LogRecord


class RemoteCancelledError(OtelTasksError):
    """A remote task was cancelled, and not by the code that awaits it.

    It is also the error in the result of an execution that was cancelled. A managed task that consists of
    the remote call alone ends cancelled instead, with the same cause.
    """


class RemoteResultError(OtelTasksError):
    """A remote task has ended, and its result is not available: it was not saved, or cannot be read."""


class ExecutionEndedError(NoResultError):
    """Ends an execution whose result, if it has one, is saved already: no retry, and nothing to save."""

    __template__ = "the execution has ended, and has no result to save"


class ExecutionLeftError(ExecutionEndedError):
    """Ends an execution that another worker takes over: its message is not acknowledged."""

    __template__ = "another worker executes this message"


def is_not_about_an_end(record: LogRecord) -> bool:
    """Filter Taskiq's warning that a task has skipped setting its result: the execution has saved it.

    Otherwise, a client that hangs up would leave a warning for each of its tasks.
    """
    return not isinstance(sys.exc_info()[1], ExecutionEndedError)
