"""A logging filter that says in each record which task it comes from."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from otel_tasks._log import ATTRIBUTE, FIELDS
from otel_tasks._manager import current_task
from otel_tasks._telemetry import current_span_context, ids_in_hex

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TaskContextFilter"]


class TaskContextFilter(logging.Filter):
    """Put the task and the span in which a record was made onto it; it keeps every record.

    The fields are ``task_id``, ``task_name``, ``task_group``, ``trace_id`` and ``span_id``. They are on
    every record, so that a format may name them: where no task runs, or no span is current, they hold
    ``default_value``. What a record has already is left alone. A function in the thread of
    ``run_in_thread`` runs in its task; one in ``asyncio.to_thread`` has the trace and the span alone. The
    lines that this package logs itself are about the task that they name.

    Put it onto handlers: that of a logger is not asked for the records of the loggers below it. With a
    queue, put it onto the ``QueueHandler``, for the listener runs in a thread of its own.

    Args:
        name: As for ``logging.Filter``: only the records of this logger and of those below it pass. Empty
            lets all pass.
        default_value: What a field holds where there is nothing to say.

    It does *not* set ``otelTraceID`` and the like, which belong to OpenTelemetry's ``LoggingInstrumentor``.

    Example:
        >>> handler = logging.StreamHandler()
        >>> handler.addFilter(TaskContextFilter())
        >>> handler.setFormatter(logging.Formatter("%(levelname)s [%(task_id)s %(trace_id)s] %(message)s"))
    """

    def __init__(self, name: str = "", default_value: str | None = "") -> None:
        super().__init__(name)
        self.default_value = default_value

    def filter(self, record: logging.LogRecord) -> bool:
        """Fill the fields in; it never raises."""
        try:
            facts = _facts(record)
        except Exception:
            # A group's name may come from foreign code. A line without its task is better than none.
            facts = {}
        present = record.__dict__
        for field in FIELDS:
            if field not in present:
                present[field] = facts.get(field) or self.default_value
        return super().filter(record)


def _facts(record: logging.LogRecord) -> Mapping[str, Any]:
    own: object = record.__dict__.get(ATTRIBUTE)
    if isinstance(own, dict):
        # Of this package: about a task that is seldom the one that runs here.
        return own
    facts: dict[str, str | None] = {}
    facts["trace_id"], facts["span_id"] = ids_in_hex(current_span_context())
    task = current_task()
    if task is not None:
        facts["task_id"], facts["task_name"], facts["task_group"] = task.id, task.name, task.group.name
    return facts
