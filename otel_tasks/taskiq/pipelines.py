"""taskiq-pipelines: what its middleware learns of a step that ends without a result.

Its ``on_error`` fails the whole pipeline with ``result.error``, whatever that is, and looks for the step in
the labels of the message. But a step that another worker executes has not failed, and the caller of the
pipeline wants to know why a step was cancelled, not that Taskiq has no result to save.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskiq import TaskiqResult

# The label by which the middleware knows a step.
_STEP = "_pipe_current_step"


class ShownEnd:
    """Shows the end of an execution to the ``on_error`` of other middlewares, and takes it back afterwards.

    Args:
        result: The result that the receiver has made.
        labels: The labels of the message.
        reported: The error that the caller gets; None if the message has not failed.
    """

    __slots__ = ("_error", "_labels", "_result", "_step")

    def __init__(self, result: TaskiqResult[Any], labels: dict[str, Any], reported: Exception | None) -> None:
        self._result = result
        self._labels = labels
        self._error = result.error
        self._step: Any = None
        if reported is not None:
            result.error = reported
        else:
            self._step = labels.pop(_STEP, None)

    def restore(self) -> None:
        """Let the result be what the receiver has made."""
        self._result.error = self._error
        if self._step is not None:
            self._labels[_STEP] = self._step
