"""Maps the priority of a task to the labels by which a broker orders its messages.

RabbitMQ orders a queue by a number in each message, if the queue was declared with ``max_priority``: classic
queues have up to 255 levels, quorum queues two (up to 4, and above). Redis Streams have no priorities: each
level is a stream of its own, and a worker reads the streams in their order. Other brokers of Taskiq keep the
order of sending.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from otel_tasks import TaskPriority
from otel_tasks._core.checks import check_number

# A priority of AMQP is one byte.
HIGHEST = 255

BrokerPriorities: TypeAlias = "Mapping[TaskPriority, Mapping[str, str | int]]"


def rabbitmq_priorities(max_priority: int = 9, *, label: str = "priority") -> BrokerPriorities:
    """Return the labels for RabbitMQ: LOW is 0, CRITICAL is ``max_priority``, the others are in between.

    Args:
        max_priority: The ``max_priority`` of the queue, from 1 to 255.
        label: The broker's ``label_for_priority``.

    Raises:
        TypeError: ``label`` is not a string.
        ValueError: ``max_priority`` is not a whole number from 1 to 255, or ``label`` is empty.

    Example:
        >>> broker = AioPikaBroker(url, task_queues=[Queue(type=QueueType.CLASSIC, max_priority=9)])
        >>> managed(broker, fleet, priorities=rabbitmq_priorities(9))
    """
    check_number("max_priority", max_priority, 1)
    if max_priority > HIGHEST:
        raise ValueError(f"max_priority must be at most {HIGHEST}, as in RabbitMQ, got {max_priority}")
    _check_label(label)
    highest = int(TaskPriority.CRITICAL)
    return {level: {label: int(level) * max_priority // highest} for level in TaskPriority}


def stream_priorities(streams: Mapping[TaskPriority, str], *, label: str = "queue_name") -> BrokerPriorities:
    """Return the labels for Redis Streams: the stream of each level.

    Args:
        streams: The stream of each priority. A level without a stream uses that of the next lower level that
            has one, or else the lowest stream.
        label: The label that names the stream.

    Raises:
        TypeError: ``streams`` does not map members of ``TaskPriority`` to names, or ``label`` is none.
        ValueError: ``streams``, a name in it, or ``label`` is empty.

    Example:
        >>> broker = RedisStreamBroker(url, queue_name="urgent", additional_streams={"normal": ">"})
        >>> streams = {TaskPriority.HIGH: "urgent", TaskPriority.NORMAL: "normal"}
        >>> managed(broker, fleet, priorities=stream_priorities(streams))
    """
    if not isinstance(streams, Mapping) or not all(
        isinstance(level, TaskPriority) and isinstance(name, str) for level, name in streams.items()
    ):
        raise TypeError(
            "stream_priorities() takes the stream of each priority, as in "
            f'{{TaskPriority.NORMAL: "tasks"}}, got {streams!r}'
        )
    if not streams or not all(streams.values()):
        raise ValueError('stream_priorities() needs a stream: write {TaskPriority.NORMAL: "tasks"}')
    _check_label(label)
    lowest = streams[min(streams)]
    chosen: dict[TaskPriority, Mapping[str, str | int]] = {}
    for level in TaskPriority:
        lowest = streams.get(level, lowest)
        chosen[level] = {label: lowest}
    return chosen


def _check_label(label: object) -> None:
    if not isinstance(label, str):
        raise TypeError(f"label must be the name of a label, as a string, got {label!r}")
    if not label:
        raise ValueError("label must not be empty: leave it out for the broker's own")


def _are_labels(labels: object) -> bool:
    return isinstance(labels, Mapping) and all(
        isinstance(label, str) and isinstance(value, str | int) and not isinstance(value, bool)
        for label, value in labels.items()
    )


def checked_priorities(priorities: object) -> BrokerPriorities:
    """Return the labels of each priority; none for None.

    Raises:
        TypeError: They are not a mapping of priorities to labels.
    """
    if priorities is None:
        return {}
    if not isinstance(priorities, Mapping) or not all(
        isinstance(level, TaskPriority) and _are_labels(each) for level, each in priorities.items()
    ):
        raise TypeError(
            "priorities must be the labels of each priority, as rabbitmq_priorities(9) returns them, got "
            f"{priorities!r}"
        )
    return priorities
