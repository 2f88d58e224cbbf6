"""The one logger of this package, and what its records say besides their text.

Rules, each with a test of its own:

1. Every line that this package logs stands in the table of ``docs/logs.md``, with its level and its fields.
2. The fields stand in one attribute of the record, ``otel_tasks``. As attributes of their own they would
   collide with those of a record factory that sets ``trace_id`` too: logging raises ``KeyError`` then, and
   these lines are written where nothing may be raised. ``otel_tasks.logs.TaskContextFilter`` lays them out.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_tasks._core.task import TaskInfo

logger = logging.getLogger("otel_tasks")

# What a record says of a task; trace and span as the specification for logs that are not sent by OTLP calls
# them (https://opentelemetry.io/docs/specs/otel/compatibility/logging_trace_context/).
FIELDS = ("task_id", "task_name", "task_group", "trace_id", "span_id")
ATTRIBUTE = "otel_tasks"


def log_fields(info: TaskInfo) -> dict[str, dict[str, str]]:
    """Give the ``extra`` of a record about one task, which need not be the one that runs."""
    values = (info.id, info.name, info.group, info.trace_id or "", info.span_id or "")
    return {ATTRIBUTE: dict(zip(FIELDS, values, strict=True))}


def log_fields_of_all(task_ids: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Give the ``extra`` of a record about several tasks."""
    return {ATTRIBUTE: {"task_ids": list(task_ids)}}
