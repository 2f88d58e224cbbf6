"""The exceptions of remote tasks, and those that end an execution in Taskiq's receiver."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from taskiq.exceptions import NoResultError

from otel_tasks.exceptions import OtelTasksError

if TYPE_CHECKING:
    from logging import LogRecord


class RemoteCancelledError(OtelTasksError):
    """A remote task was cancelled, but not by the code that awaits it.

    The result of a cancelled execution also has this error. A managed task that consists only of the remote
    call ends cancelled instead, with the same cause.
    """


class RemoteResultError(OtelTasksError):
    """A remote task has ended, but its result is not available: it was not saved, or cannot be read."""


class BrokerStoppedError(RemoteResultError):
    """The broker was shut down while the call waited for its result."""


class ExecutionEndedError(NoResultError):
    """Ends an execution whose result, if it has one, is saved already: no retry, and nothing to save."""

    __template__ = "the execution has ended, and has no result to save"


class ExecutionLeftError(ExecutionEndedError):
    """Ends an execution that another worker takes over: its message is not acknowledged."""

    __template__ = "another worker executes this message"


def is_not_about_an_end(record: LogRecord) -> bool:
    """Filter Taskiq's warning about a skipped result: the execution has saved it already.

    Without the filter, each hang-up would log a warning for each of the request's tasks.
    """
    return not isinstance(sys.exc_info()[1], ExecutionEndedError)
