"""The package's one logger, and what its records say besides their text.

Rules, each with a test of its own:

1. Every line that this package logs stands in the table of ``docs/logs.md``, with its level and its fields.
2. The fields stand in one attribute of the record, ``otel_tasks``. As attributes of their own, they would
   collide with those of a record factory that also sets ``trace_id``: logging then raises ``KeyError``, and
   these lines are written where nothing may raise. ``otel_tasks.logs.TaskContextFilter`` lays them out.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


logger = logging.getLogger("otel_tasks")

# A record's fields for a task. The names of trace and span are those of the specification for logs outside
# OTLP (https://opentelemetry.io/docs/specs/otel/compatibility/logging_trace_context/).
FIELDS = ("task_id", "task_name", "task_group", "trace_id", "span_id")
ATTRIBUTE = "otel_tasks"


class LoggedTask(Protocol):
    """What a record says of a ``TaskInfo``."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def group(self) -> str:
        """Its group's name."""
        ...

    @property
    def trace_id(self) -> str | None:
        """In hex; None without tracing."""
        ...

    @property
    def span_id(self) -> str | None:
        """In hex; None without tracing."""
        ...


def log_fields(task: LoggedTask) -> dict[str, dict[str, str]]:
    """Return the ``extra`` of a record about one task, which is often not the running one."""
    values = (task.id, task.name, task.group, task.trace_id or "", task.span_id or "")
    return {ATTRIBUTE: dict(zip(FIELDS, values, strict=True))}


def log_fields_of_all(task_ids: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return the ``extra`` of a record about several tasks."""
    return {ATTRIBUTE: {"task_ids": list(task_ids)}}


def text_of(error: BaseException, text: Callable[[object], str] = str) -> str:
    """Return ``str(error)``, or its ``repr``, even if the exception's own method raises."""
    try:
        return text(error)
    except Exception as broken:
        return f"<{type(error).__name__} without text: {type(broken).__name__}>"
