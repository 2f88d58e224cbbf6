"""Prepares messages for sending: the stamp, and the labels of their priority."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taskiq.labels import prepare_label

from otel_tasks import TaskPriority, current_task
from otel_tasks._core.checks import checked_name, checked_seconds
from otel_tasks._core.telemetry.propagation import inject
from otel_tasks.fleet.entries import LARGEST
from otel_tasks.taskiq.labels import (
    GROUP,
    NAME,
    PRIORITY,
    STAMP,
    TIMEOUT,
    Stamp,
    new_delivery,
    read_stamp,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from taskiq import TaskiqMessage

    from otel_tasks import ManagedTask
    from otel_tasks.fleet import Fleet
    from otel_tasks.taskiq.priorities import BrokerPriorities


@dataclass(slots=True)
class Sending:
    """A remote call that is being sent, and what its local task passes on.

    Attributes:
        task_id: The id of the message.
        delivery: The name of the call, which its copies keep.
        host: This node.
        name: The name of the local task; None leaves it to the function.
        group: The label of its group; None leaves it to the worker.
        priority: Its priority.
        timeout: Seconds to its deadline; None without one.
    """

    task_id: str
    delivery: str
    host: str
    name: str | None
    group: str | None
    priority: TaskPriority | None
    timeout: float | None


# The remote call whose message is being sent here. The id identifies it: tasks that the broker starts
# meanwhile may inherit the context.
current_sending: ContextVar[Sending | None] = ContextVar("otel_tasks_sending", default=None)


def stamp_message(message: TaskiqMessage, fleet: Fleet, priorities: BrokerPriorities) -> None:
    """Write the stamp and the labels of its priority into a message that is about to be sent."""
    copied = read_stamp(message.labels)
    stamp = _new_stamp(message, fleet) if copied is None else copied.resent()
    _set(message, STAMP, stamp.dump())
    for label, value in priorities.get(TaskPriority(stamp.priority or 0), {}).items():
        if label not in message.labels:
            _set(message, label, value)


def _new_stamp(message: TaskiqMessage, fleet: Fleet) -> Stamp:
    sending = current_sending.get()
    if sending is not None and sending.task_id != message.task_id:
        sending = None
    carrier: dict[str, str] = {}
    inject(carrier)
    link = fleet.link if fleet.is_started else None
    unpublished = 0 if link is None else link.unpublished
    options = _options(message.labels, sending)
    return Stamp(
        delivery=new_delivery() if sending is None else sending.delivery,
        sent_after=None if link is None else link.position,
        sent_at=None if link is None else link.bus_time(),
        host=None if sending is None else sending.host,
        carrier=carrier,
        sender=link.node if link is not None and unpublished else None,
        posted=unpublished or None,
        **options,
    )


def _options(labels: Mapping[str, Any], sending: Sending | None) -> dict[str, Any]:
    """Return the options of a message: the labels that the user has set win over those of the local task."""
    name, group = labels.get(NAME), labels.get(GROUP)
    priority, timeout = labels.get(PRIORITY), labels.get(TIMEOUT)
    options = {
        # A worker could not read a stamp with anything else.
        "name": None if name is None else checked_name("task", name),
        "group": None if group is None else checked_name("group", group),
        "priority": None if priority is None else int(priority),
        "timeout": None if timeout is None else checked_seconds("timeout", float(timeout)),
    }
    for key, value in options.items():
        if value is None and sending is not None:
            options[key] = getattr(sending, key)
    if options["timeout"] is not None and float(options["timeout"]) > LARGEST:
        options["timeout"] = None
    if options["priority"] is None:
        options["priority"] = int(TaskPriority.NORMAL)
    if options["group"] is None and sending is None:
        options["group"] = label_of(current_task())
    return options


def label_of(task: ManagedTask[Any] | None) -> str | None:
    """Return the label of the group of a task; None if it is in no labeled group but the root."""
    if task is None:
        return None
    group = task.group
    return None if group.scoped or group.name == "root" else group.name


def _set(message: TaskiqMessage, label: str, value: str | int) -> None:
    text, kind = prepare_label(value)
    message.labels[label] = text
    if message.labels_types is not None:
        message.labels_types[label] = kind
