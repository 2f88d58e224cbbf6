"""The labels of a message: the options that users set, and the stamp that travels with it.

A stamp is one label with a JSON object. It is read leniently: a message from a process without a fleet has
none, and one that cannot be read counts as none.
"""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.checks import checked_name, checked_priority, checked_seconds
from otel_tasks.fleet.bus import START, position_of
from otel_tasks.fleet.cancellations import Sent
from otel_tasks.fleet.entries import LARGEST

if TYPE_CHECKING:
    from collections.abc import Mapping

    from otel_tasks import TaskPriority

NAME: Final = "otel_tasks.name"
GROUP: Final = "otel_tasks.group"
PRIORITY: Final = "otel_tasks.priority"
TIMEOUT: Final = "otel_tasks.timeout"
STAMP: Final = "otel_tasks.stamp"
# In the labels of a result: the cause of a cancellation, and the traceback of an error.
CAUSE: Final = "otel_tasks.cause"
TRACEBACK: Final = "otel_tasks.traceback"

# A longer stamp is ignored. In characters.
_LONGEST_STAMP = 16_384
# Labels of Taskiq that count the copies of a message: a retry and a requeued message are new deliveries.
_COPIES = ("_retries", "X-Taskiq-requeue")
# json.dumps() would make an encoder for each call.
_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def labels(
    *,
    name: str | None = None,
    group: str | None = None,
    priority: TaskPriority | int | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Return labels with the options of a task on the worker, for messages that ``remote`` does not send.

    Args:
        name: The task's name there, by which ``fleet.cancel_task`` finds it.
        group: The labeled group that it joins there.
        priority: Its priority there, and in the broker's queue if the queue has priorities.
        timeout: Seconds from the time the message is sent until the task must end, at least 0. None means
            no limit.

    Returns:
        Labels for ``@broker.task(...)`` or ``task.kicker().with_labels(...)``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: A name is not valid, or an option is out of its range.

    Example:
        >>> @broker.task(**labels(group="reports", timeout=600))
        ... async def report(month: int) -> None: ...
    """
    seconds = checked_seconds("timeout", timeout)
    options = {
        NAME: None if name is None else checked_name("task", name),
        GROUP: None if group is None else checked_name("group", group),
        PRIORITY: None if priority is None else int(checked_priority(priority)),
        TIMEOUT: None if seconds is None or math.isinf(seconds) else float(seconds),
    }
    return {label: value for label, value in options.items() if value is not None}


@dataclass(slots=True)
class Stamp:
    """What a sender writes into a message. Nothing changes one; a frozen class would take longer to make it.

    Attributes:
        delivery: Names this sending of the message; a redelivery by the broker has the same.
        sent_after: The newest position of the fleet's log that the sender knew; cancellations up to it are
            older than the message. None if it knew none.
        sent_at: The time of the sending, in seconds of the bus's clock; None if the sender did not know it.
        host: The node that waits for the result; None if nobody does.
        name: The name of the task; None leaves it to the function.
        group: The label of its group; None leaves it to the worker.
        priority: Its priority.
        timeout: Seconds from the sending to its deadline.
        carrier: The sender's span, as the propagators write it.
        sender: The node that sends it, if it has posted entries that the log did not have yet.
        posted: The number of the last of these.
        first: In a copy that was sent again, the delivery of the message that was sent first.
    """

    delivery: str
    sent_after: str | None = None
    sent_at: float | None = None
    host: str | None = None
    name: str | None = None
    group: str | None = None
    priority: int | None = None
    timeout: float | None = None
    carrier: Mapping[str, str] = field(default_factory=dict)
    sender: str | None = None
    posted: int | None = None
    first: str | None = None

    @property
    def sent(self) -> Sent | None:
        """Its place in the order of the log; None if the sender did not know it."""
        if self.sent_after is None:
            return None
        return Sent(position_of(self.sent_after), self.sender, self.posted or 0)

    @property
    def call(self) -> str:
        """The name of the call in all its copies; the id of a message may be that of an older call."""
        return self.first or self.delivery

    def dump(self) -> str:
        """Return the text of the label."""
        content = {key: value for key in _FIELDS if (value := getattr(self, key)) is not None}
        if not self.carrier:
            del content["carrier"]
        return _encode_json(content)

    def resent(self) -> Stamp:
        """Return the stamp of a copy that is sent again, such as a retry.

        Everything else stays: a cancellation of the first sending is one of the copy too.
        """
        return replace(self, delivery=new_delivery(), first=self.call)


def new_delivery() -> str:
    """Return a new name for one sending of a message."""
    return secrets.token_hex(6)


def read_stamp(message_labels: Mapping[str, Any]) -> Stamp | None:
    """Return the stamp of a message; None without one that can be read."""
    text = message_labels.get(STAMP)
    if not isinstance(text, str) or len(text) > _LONGEST_STAMP:
        return None
    try:
        values = {key: value for key, value in json.loads(text).items() if key in _FIELDS}
        # What is no position raises here.
        position_of(values.get("sent_after") or START)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not values.get("delivery"):
        return None
    for key, value in values.items():
        if not _fits(value, _FIELDS[key]):
            return None
    return Stamp(**values)


def delivery_of(message_labels: Mapping[str, Any], stamp: Stamp | None) -> str:
    """Return the name of this delivery of a message."""
    delivery = stamp.delivery if stamp else ""
    if message_labels.keys() & _COPIES:
        delivery = ".".join((delivery, *(str(message_labels.get(label, "")) for label in _COPIES))).rstrip(
            "."
        )
    return delivery or "0"


_FIELDS: Final[dict[str, type | tuple[type, ...]]] = {
    "delivery": str,
    "sent_after": str,
    "sent_at": (int, float),
    "host": str,
    "name": str,
    "group": str,
    "priority": int,
    "timeout": (int, float),
    "carrier": dict,
    "sender": str,
    "posted": int,
    "first": str,
}


def _fits(value: object, kind: type | tuple[type, ...]) -> bool:
    if isinstance(value, str):
        return kind is str
    if isinstance(value, dict):
        return kind is dict and all(isinstance(part, str) for pair in value.items() for part in pair)
    if isinstance(value, (int, float)):
        # A larger number is neither a time nor a duration. The comparison is False for NaN too. JSON has
        # numbers that no float can hold.
        return isinstance(value, kind) and not isinstance(value, bool) and abs(value) <= LARGEST
    return isinstance(value, kind)
