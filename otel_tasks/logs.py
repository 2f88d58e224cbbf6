"""A logging filter that adds the current task to each record."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from otel_tasks._core.functions import current_task
from otel_tasks._core.log import ATTRIBUTE, FIELDS, task_fields
from otel_tasks._core.telemetry.context import current_span_context, ids_in_hex

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TaskContextFilter"]


class TaskContextFilter(logging.Filter):
    """Add the current task and span to each record.

    The fields are ``task_id``, ``task_name``, ``task_group``, ``task_uid``, ``task_metadata``, ``trace_id``,
    and ``span_id``. Every record has them, so that a format string can use them: without a task, a span, or
    metadata that the manager's ``log_metadata`` names, they hold ``default_value``. Fields that a record
    already has are not changed. A function that ``run_in_thread`` runs has its task's fields;
    one in ``asyncio.to_thread`` has only the trace and the span. On lines that this package logs itself, the
    fields are those of the task that the line names.

    Add it to handlers: a logger's filter does not see records of the loggers below it. With a queue, add it
    to the ``QueueHandler``, because the listener runs in its own thread.

    Args:
        name: As for ``logging.Filter``: only records of this logger and of those below it pass. With an empty
            name, all records pass.
        default_value: The value of a field without a task or a span.
        uid: False leaves ``task_uid`` at the default. A uid is made when it is first read, which costs each
            task that logs about 14 us.

    It does *not* set ``otelTraceID`` and similar fields of OpenTelemetry's ``LoggingInstrumentor``.

    Example:
        >>> handler = logging.StreamHandler()
        >>> handler.addFilter(TaskContextFilter())
        >>> handler.setFormatter(logging.Formatter("%(levelname)s [%(task_id)s %(trace_id)s] %(message)s"))
    """

    def __init__(self, name: str = "", default_value: str | None = "", *, uid: bool = True) -> None:
        super().__init__(name)
        self.default_value = default_value
        self.uid = uid

    def filter(self, record: logging.LogRecord) -> bool:
        """Set the fields; it never raises."""
        try:
            values = _values_for(record, uid=self.uid)
        except Exception:
            # A group's name may come from foreign code. A line without its task is better than no line.
            values = {}
        present = record.__dict__
        for field in FIELDS:
            if field not in present:
                present[field] = values.get(field) or self.default_value
        return super().filter(record)


def _values_for(record: logging.LogRecord, *, uid: bool) -> Mapping[str, Any]:
    own: object = record.__dict__.get(ATTRIBUTE)
    if isinstance(own, dict):
        # This package's own record, about a task that is rarely the current one.
        return own
    task = current_task()
    values: dict[str, Any] = {} if task is None else task_fields(task, uid=uid)
    values["trace_id"], values["span_id"] = ids_in_hex(current_span_context())
    return values
