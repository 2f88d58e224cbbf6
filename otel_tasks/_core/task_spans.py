"""The start of a task's span, with the attributes of the task and its group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks._core.coroutines import code_name
from otel_tasks._core.names import full_name
from otel_tasks._core.native import base_name
from otel_tasks._core.telemetry import (
    CODE_FUNCTION,
    TASK_ATTEMPT,
    TASK_ID,
    TASK_PRIORITY,
    group_attributes,
    low_cardinality,
    note_started,
    start_span,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from otel_tasks._core.names import Key
    from otel_tasks._core.state import TaskPriority
    from otel_tasks._core.telemetry import GroupSpan, Span, Tracer


class Spanned(Protocol):
    """The attributes of a group that go into the spans of its tasks."""

    @property
    def _label(self) -> tuple[str, str, bool] | None: ...

    @property
    def _span(self) -> GroupSpan | None: ...

    @property
    def _ledger(self) -> Any: ...

    def _labels(self) -> tuple[str, str, bool]: ...


def start_task_span(
    group: Spanned,
    tracer: Tracer,
    base: str,
    key: Key,
    coro: Coroutine[Any, Any, Any],
    priority: TaskPriority,
    new_trace: bool | None,
    start_time: int | None = None,
) -> Span | None:
    """Start a task's span; call it in the context of the task.

    ``new_trace`` is None where neither the task nor its group decides.
    """
    name = low_cardinality(base)
    full = full_name(base, key)
    label = group._label or group._labels()
    attributes = group_attributes(label, group._ledger.name)
    attributes[TASK_ID] = f"{label[1]}/{full}" if label[2] else full
    attributes[TASK_PRIORITY] = int(priority)
    attributes[CODE_FUNCTION] = code_name(coro)
    try:
        parent = None if group._span is None else group._span.parent()
        return start_span(tracer, name, attributes, parent=parent, new_trace=new_trace, start_time=start_time)
    except Exception:
        group._ledger.log_once("starting a span for task %r raised", full)
        return None


def start_attempt_span(task: Any, number: int) -> Span | None:
    """Start the span of one attempt, below the task's span; call it in the context of the attempt."""
    ledger = task._group._ledger
    tracer = ledger.telemetry.tracer()
    if tracer is None:
        return None
    name = low_cardinality(base_name(task))
    attributes = group_attributes(task._group._labels(), ledger.name)
    attributes[TASK_ID] = task.id
    attributes[TASK_ATTEMPT] = number
    try:
        return start_span(tracer, name, attributes, parent=None, new_trace=False)
    except Exception:
        ledger.log_once("starting a span for an attempt of task %s raised", task, task=task)
        return None


def report_dequeued(ledger: Any, task: Any, waited: float) -> None:
    """Report that a queued task has got its place and starts."""
    try:
        if task._span is not None:
            note_started(task._span)
        if ledger.telemetry.metered():
            ledger.telemetry.record_queue(task._group.name, int(task._priority), waited)
    except Exception:
        ledger.log_once("telemetry of task %s raised", task, task=task)
    if ledger.listeners.functions:
        ledger.listeners.notify("dequeued", task, task.info())
