"""OpenTelemetry-instrumented tasks for asyncio services.

Where things are:

- ``_manager``: ``TaskManager``, the global one, ``create_task`` and the ``current_*`` functions
- ``_group``, ``_scope``: ``TaskGroup``, the tree of work, and its ``async with`` block
- ``_task``: ``ManagedTask`` and its snapshot, ``TaskInfo``
- ``_admission``: places under a limit, and the queue before them
- ``_ledger``: what a manager keeps about its tasks, and the one place that takes their end
- ``_decorator``: ``managed_task``
- ``cancellation``: ``CancelCause``, ``CancelEvent``
- ``progress``: what a task reports of its own progress
- ``_state``: statuses, priorities, the table of transitions
- ``_telemetry``: spans and metrics, the only module that imports OpenTelemetry
- ``exceptions``: every error of this package
- ``asgi``: the middleware; ``fastapi``: the adapter; ``testing``: for your own tests
"""

from otel_tasks._decorator import ManagedFunction, managed_task
from otel_tasks._group import TaskGroup
from otel_tasks._ledger import TaskStats
from otel_tasks._manager import (
    ShutdownReport,
    TaskManager,
    cancel_all_tasks,
    cancel_group,
    create_task,
    current_cancel_event,
    current_group,
    current_task,
    get_all_task_info,
    global_task_manager,
    start_task,
    wait_for_task,
)
from otel_tasks._state import CancelKind, TaskPriority, TaskStatus
from otel_tasks._task import ManagedTask, TaskInfo
from otel_tasks._telemetry import VERSION as __version__
from otel_tasks.cancellation import CancelCause, CancelEvent
from otel_tasks.exceptions import (
    GroupClosedError,
    IllegalTransitionError,
    ManagerClosedError,
    OtelTasksError,
    QueueFullError,
    TaskExistsError,
    TaskNotFoundError,
    WrongLoopError,
    WrongThreadError,
)
from otel_tasks.progress import GroupProgress, Progress, ProgressWatch, TaskProgress

__all__ = [
    "CancelCause",
    "CancelEvent",
    "CancelKind",
    "GroupClosedError",
    "GroupProgress",
    "IllegalTransitionError",
    "ManagedFunction",
    "ManagedTask",
    "ManagerClosedError",
    "OtelTasksError",
    "QueueFullError",
    "Progress",
    "ProgressWatch",
    "ShutdownReport",
    "TaskExistsError",
    "TaskGroup",
    "TaskInfo",
    "TaskManager",
    "TaskNotFoundError",
    "TaskPriority",
    "TaskProgress",
    "TaskStats",
    "TaskStatus",
    "WrongLoopError",
    "WrongThreadError",
    "__version__",
    "cancel_all_tasks",
    "cancel_group",
    "create_task",
    "current_cancel_event",
    "current_group",
    "current_task",
    "get_all_task_info",
    "global_task_manager",
    "managed_task",
    "start_task",
    "wait_for_task",
]
