"""Shields: a task whose cancellation by its request is deferred, as ``uncancellable()`` promises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks._core.task import ManagedTask, extras_of, request_cancel

if TYPE_CHECKING:
    from otel_tasks._core.events import CancelCause


def shield(task: ManagedTask[Any]) -> None:
    """Defer the cancellation of a task by its request, until as many calls of ``unshield``."""
    extras_of(task).shields += 1


def is_shielded(task: ManagedTask[Any]) -> bool:
    """True while cancellations of a task by its request are deferred."""
    return task._extras is not None and task._extras.shields > 0


def defer_cancel(task: ManagedTask[Any], cause: CancelCause) -> None:
    """Cancel a shielded task at the end of its last shield; the first cause stays."""
    extras = extras_of(task)
    extras.deferred = extras.deferred or cause


def unshield(task: ManagedTask[Any]) -> None:
    """Remove one shield; removing the last one delivers a deferred cancellation."""
    extras = extras_of(task)
    extras.shields -= 1
    if not extras.shields and extras.deferred is not None:
        cause, extras.deferred = extras.deferred, None
        request_cancel(task, cause)
