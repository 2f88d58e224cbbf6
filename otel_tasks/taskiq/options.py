"""Options: those of one message, from its stamp, or else from the labels that users set."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from otel_tasks import TaskPriority
from otel_tasks.taskiq.labels import GROUP, NAME, PRIORITY, TIMEOUT, Stamp, read_stamp

if TYPE_CHECKING:
    from taskiq.message import TaskiqMessage

    from otel_tasks.taskiq.worker import Worker


class Options:
    """The options of one message: from its stamp, or else from the labels that users set.

    Args:
        stamp: Its stamp; None without one.
        message: The message.
    """

    def __init__(self, stamp: Stamp | None, message: TaskiqMessage) -> None:
        labels = message.labels
        self.stamp = stamp
        self.host = None if stamp is None else stamp.host
        self.name: str | None = _text(labels.get(NAME)) if stamp is None else stamp.name
        self.group: str | None = _text(labels.get(GROUP)) if stamp is None else stamp.group
        self.priority = _priority(labels.get(PRIORITY) if stamp is None else stamp.priority)
        self._timeout = _seconds(labels.get(TIMEOUT)) if stamp is None else stamp.timeout

    @classmethod
    def of(cls, message: TaskiqMessage) -> Options:
        """Read the options of a message."""
        return cls(read_stamp(message.labels), message)

    def deadline(self, worker: Worker) -> float | None:
        """Return the deadline on the loop's clock; None if the message has none."""
        if self._timeout is None:
            return None
        now = asyncio.get_running_loop().time()
        sent_at = None if self.stamp is None else self.stamp.sent_at
        bus_time = worker.fleet.link.bus_time()
        waited = 0.0 if sent_at is None or bus_time is None else max(0.0, bus_time - sent_at)
        return now + self._timeout - waited


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _priority(value: object) -> TaskPriority:
    if value == TaskPriority.NORMAL:
        return TaskPriority.NORMAL
    try:
        return TaskPriority(int(str(value)))
    except ValueError:
        return TaskPriority.NORMAL


def _seconds(value: object) -> float | None:
    try:
        return max(0.0, float(str(value)))
    except ValueError:
        return None
