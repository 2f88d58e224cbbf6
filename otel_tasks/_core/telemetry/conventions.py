"""The names of this library's attributes, events, and instruments, and what their values look like.

``docs/reference/`` lists them from what reaches an SDK; a new name needs its meaning in ``docs/generate.py``.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import version

VERSION = version("otel-tasks")
SCOPE = "otel_tasks"

TASK_NAME = "otel_tasks.task.name"
TASK_ID = "otel_tasks.task.id"
TASK_PRIORITY = "otel_tasks.task.priority"
TASK_STATE = "otel_tasks.task.state"
TASK_OUTCOME = "otel_tasks.task.outcome"
TASK_ATTEMPT = "otel_tasks.task.attempt"
GROUP_NAME = "otel_tasks.group.name"
GROUP_ID = "otel_tasks.group.id"
MANAGER_NAME = "otel_tasks.manager.name"
CODE_FUNCTION = "code.function.name"
RETRY_DELAY = "otel_tasks.retry.delay"
CANCEL_REASON = "otel_tasks.cancel.reason"
CANCEL_MESSAGE = "otel_tasks.cancel.message"
CANCEL_DURATION = "otel_tasks.cancel.duration"
ORIGIN_TRACE_ID = "otel_tasks.cancel.origin.trace_id"
ORIGIN_SPAN_ID = "otel_tasks.cancel.origin.span_id"
CANCEL_IGNORED = "otel_tasks.cancel.ignored"
CANCEL_COUNT = "otel_tasks.cancel.count"
REQUEST_OUTCOME = "otel_tasks.request.outcome"
REQUEST_HANDLER = "otel_tasks.request.handler"
REQUEST_CLOSE_CODE = "otel_tasks.request.close_code"
ERROR_TYPE = "error.type"
LINK = "otel_tasks.link"
# An attribute of spans and the name of a histogram.
QUEUE_DURATION = "otel_tasks.task.queue.duration"

# Events.
CLIENT_DISCONNECT = "otel_tasks.client_disconnect"
STARTED = "otel_tasks.started"
CANCEL_REQUESTED = "otel_tasks.cancel_requested"
RETRY = "otel_tasks.retry"

# Instruments.
TASK_DURATION = "otel_tasks.task.duration"
ACTIVE_TASKS = "otel_tasks.task.active"
CANCELLATIONS = "otel_tasks.task.cancellations"
RETRIES = "otel_tasks.task.retries"

# The name of a manager without a name of its own, and of ``global_task_manager``.
DEFAULT_MANAGER = "default"

# A number or an id as a part of its own: "fetch-17", "order_4711_pay", "job:9f8b7c6d".
_ID = r"(?:[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}|\d+|(?=[a-fA-F]*\d)[0-9a-fA-F]{8,})"
# A slash only at the end: routes have numbers of their own ("/v/2/users").
_ID_PART = re.compile(rf"[-_:#. ]{_ID}(?=[-_:#. ]|$)|(?:/{_ID})+$")


@lru_cache(maxsize=1024)
def low_cardinality(name: str) -> str:
    """Cut numbers and ids out of a name: span names and metrics must not contain any.

    Back ends make one operation of each span name (https://opentelemetry.io/docs/specs/otel/trace/api/#span).
    """
    return _ID_PART.sub("", name) or name


def group_attributes(label: tuple[str, str, bool], manager: str) -> dict[str, str | int]:
    """Return the attributes of a span that name its group and its manager.

    None of them repeats another: the SDK needs 100 bytecode instructions for each attribute.

    Args:
        label: The group's name, its id, and whether it is scoped; otherwise its id is its name.
        manager: The manager's name.
    """
    name, group_id, scoped = label
    attributes: dict[str, str | int] = {GROUP_NAME: name}
    if scoped:
        attributes[GROUP_ID] = group_id
    if manager != DEFAULT_MANAGER:
        attributes[MANAGER_NAME] = manager
    return attributes


def error_type(error: BaseException) -> str:
    """Name an exception's class as the semantic conventions define ``error.type``."""
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
