"""The package's one logger, and what its records say besides their text.

Rules, each with a test of its own:

1. Every line that this package logs stands in the table of ``docs/logs.md``, with its level and its fields.
2. The fields stand in one attribute of the record, ``otel_tasks``. As attributes of their own, they would
   collide with those of a record factory that also sets ``trace_id``: logging then raises ``KeyError``, and
   these lines are written where nothing may raise. ``otel_tasks.logs.TaskContextFilter`` lays them out.
3. Nothing is read of a task for a record that is not made: its uid is made on first use, and the ``str()`` of
   its metadata is the user's code.
4. A record holds text and plain data, never a task: handlers may keep records, or pickle them.
"""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


logger = logging.getLogger("otel_tasks")

# A record's fields for a task. The names of trace and span are those of the specification for logs outside
# OTLP (https://opentelemetry.io/docs/specs/otel/compatibility/logging_trace_context/). The metadata are one
# field: keys of their own could be those of `logging.LogRecord`.
FIELDS = ("task_id", "task_name", "task_group", "task_uid", "task_metadata", "trace_id", "span_id")
ATTRIBUTE = "otel_tasks"

# Characters of a value of metadata.
_LONGEST_VALUE = 200
# A line about more tasks lists the uids of the first ones: to make a uid for each would hold the loop.
_MAX_UIDS = 100
# The logs' databases hold whole numbers in 64 bits, and Python refuses to write very long ones.
_MAX_BITS = 63
# Text that cannot be mistaken for more than one value, nor forge a line.
_is_word = re.compile(r"[\w.:/@+-]+").fullmatch
_ABSENT = object()


class LoggedLedger(Protocol):
    """What a record needs of a manager."""

    @property
    def log_metadata(self) -> tuple[str, ...]:
        """The keys of metadata that records carry."""
        ...


class LoggedGroup(Protocol):
    """What a record says of a ``TaskGroup``."""

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def _ledger(self) -> LoggedLedger: ...


class LoggedInfo(Protocol):
    """What a record says of a ``TaskInfo``."""

    @property
    def trace_id(self) -> str | None:
        """In hex; None without tracing."""
        ...

    @property
    def span_id(self) -> str | None:
        """In hex; None without tracing."""
        ...


class LoggedTask(Protocol):
    """What a record says of a ``ManagedTask``."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def uid(self) -> str:
        """Its uid, made on first use."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def group(self) -> LoggedGroup:
        """Its group."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """Its metadata."""
        ...

    def info(self) -> LoggedInfo:
        """Take a snapshot."""
        ...


class TaskLogger(logging.LoggerAdapter[logging.Logger]):
    """Logs lines about one task, which is often not the running one.

    Among the arguments of a line, the task stands for its id and the metadata that its manager marks for
    logging: ``'send-3' (job=4711)``.

    Args:
        task: The task.
    """

    def __init__(self, task: LoggedTask) -> None:
        super().__init__(logger)
        self._task = task

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log a line with the fields of the task."""
        if not self.isEnabledFor(level):
            return
        task = self._task
        fields, name = _fields_and_label(task)
        texts = [name if arg is task else arg for arg in args]
        # The line of the record is that of the caller.
        self.logger.log(level, msg, *texts, extra={ATTRIBUTE: fields}, stacklevel=2, **kwargs)


def task_fields(task: LoggedTask, *, uid: bool = True) -> dict[str, Any]:
    """Return the fields that name a task; those of its span are not among them.

    Args:
        task: The task.
        uid: Read the uid, which makes it.
    """
    return {
        "task_id": task.id,
        "task_name": task.name,
        "task_group": task.group.name,
        "task_uid": task.uid if uid else "",
        "task_metadata": _marked(task),
    }


def task_label(task: LoggedTask) -> str:
    """Return a task's id and marked metadata, as lines write them."""
    return _label(task.id, _marked(task))


def log_fields_of_all(
    tasks: Iterable[LoggedTask], more_ids: Iterable[str] = ()
) -> dict[str, dict[str, list[str]]]:
    """Return the ``extra`` of a warning about several tasks.

    Args:
        tasks: The tasks.
        more_ids: The ids of further tasks, which are not at hand any more.
    """
    if not logger.isEnabledFor(logging.WARNING):
        return {}
    tasks = list(tasks)
    ids, uids = [*(task.id for task in tasks), *more_ids], [task.uid for task in tasks[:_MAX_UIDS]]
    return {ATTRIBUTE: {"task_ids": ids, "task_uids": uids}}


def text_of(value: object, text: Callable[[object], str] = str) -> str:
    """Return ``str(value)``, or its ``repr``, even if the value's own method raises."""
    try:
        return text(value)
    except Exception as broken:
        return f"<{type(value).__name__} without text: {type(broken).__name__}>"


def _fields_and_label(task: LoggedTask) -> tuple[dict[str, Any], str]:
    try:
        fields = task_fields(task)
        info = task.info()
        fields["trace_id"], fields["span_id"] = info.trace_id or "", info.span_id or ""
        return fields, _label(task.id, fields["task_metadata"])
    except Exception:
        # A span is foreign code, and so may be a group's name. A line with less is better than none.
        return {"task_name": task.name}, repr(task.name)


def _marked(task: LoggedTask) -> dict[str, Any]:
    """Return the metadata that the task's manager marks for logging, as JSON-ready data."""
    keys = task.group._ledger.log_metadata
    if not keys:
        return {}
    metadata = task.metadata
    found = ((key, metadata.get(key, _ABSENT)) for key in keys)
    return {key: _plain(value) for key, value in found if value is not _ABSENT}


def _plain(value: Any) -> str | int | float | None:
    """Return a value as JSON-ready data of bounded length."""
    kind = type(value)
    if (
        value is None
        or kind is bool
        or (kind is int and value.bit_length() <= _MAX_BITS)
        or (kind is float and math.isfinite(value))
    ):
        plain: int | float | None = value
        return plain
    # The characters of a string's subclass: the `str()` of an Enum member differs.
    text = str.__str__(value) if issubclass(kind, str) else text_of(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"


def _label(task_id: str, metadata: Mapping[str, Any]) -> str:
    values = ", ".join(f"{key}={_shown(value)}" for key, value in metadata.items())
    return f"{task_id!r} ({values})" if values else repr(task_id)


def _shown(value: object) -> str:
    return value if isinstance(value, str) and _is_word(value) else repr(value)
