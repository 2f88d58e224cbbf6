"""Deliveries: how an execution learns to acknowledge its message, whatever the ``--ack-type`` of the worker.

With ``--ack-type manual``, Taskiq's receiver leaves the acknowledgment to the function. A message that ends
without its function has nobody to acknowledge it: the broker would deliver it again, and once its
cancellation is forgotten, it would run. So its execution acknowledges it.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from taskiq import AckableMessage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    RawAck = Callable[[], Awaitable[None] | None]

_delivered: ContextVar[Ack | None] = ContextVar("otel_tasks_delivered", default=None)


class Ack:
    """The ``ack`` of one delivery.

    Args:
        acknowledge: Acknowledges if the execution allows it: what the receiver and the function call.
        raw: The broker's own.
        data: The message.
    """

    __slots__ = ("_acknowledge", "_data", "_is_taken", "raw")

    def __init__(
        self, acknowledge: Callable[[RawAck, bytes], Awaitable[None]], raw: RawAck, data: bytes
    ) -> None:
        self.raw = raw
        self._acknowledge = acknowledge
        self._data = data
        self._is_taken = False

    def __call__(self) -> Awaitable[None]:
        """Acknowledge the message if its execution allows it."""
        return self._acknowledge(self.raw, self._data)

    def take(self) -> bool:
        """Return True the first time: a message that is handled in this context afterwards is another one."""
        is_first, self._is_taken = not self._is_taken, True
        return is_first


class Delivery(AckableMessage):
    """A message as the receiver gets it.

    The receiver reads ``ack`` in the task that handles the message, before anything else. That is how the
    execution, which the middleware creates in the same task, finds it. Rejected: to look into the frame of
    the receiver, and to parse each message a second time for its id.
    """

    def __getattribute__(self, name: str) -> Any:
        """Return an attribute; note who handles the message."""
        value = super().__getattribute__(name)
        if name == "ack" and isinstance(value, Ack):
            _delivered.set(value)
        return value


def ack_of_delivery() -> Ack | None:
    """Return the ``ack`` of the message that this task handles; None if the broker has none.

    Also None if something between the broker and the receiver reads the messages and makes others of them.
    """
    found = _delivered.get()
    return found if found is not None and found.take() else None
