"""OpenTelemetry-instrumented tasks for asyncio services.

Where things are:

- ``_manager``: ``TaskManager``, the global one, ``create_task`` and what else works in the current manager
- ``_current``: what is current: group and manager, and the rule that finds them
- ``_group``, ``_scope``: ``TaskGroup``, and its ``async with`` block
- ``_create``, ``_tree``: how a group creates a task, and how groups hang together
- ``_service``: tasks that are begun again when they fail, and ``RestartPolicy``
- ``_task``: ``ManagedTask`` and its snapshot, ``TaskInfo``
- ``_threads``: what threads hand over to the loop, and tasks whose function runs in one
- ``_inspect``, ``_frames``, ``_signals``: ``manager.tree()``, what runs just now and where it waits
- ``_watch``: warnings about tasks in trouble, ``manager.watch()``
- ``_admission``: places under a limit, and the queue before them
- ``_ledger``: what a manager keeps about its tasks, and the one place that takes their end
- ``_decorator``: ``managed_task``
- ``cancellation``, ``_events``: ``CancelCause``, ``CancelEvent``, waiting with events
- ``tracking``, ``_awaiters``: ``TaskTracker`` and clean-up, for tasks of any origin
- ``progress``: what a task reports of its own progress
- ``_state``: statuses, priorities, the table of transitions
- ``_telemetry``: spans and metrics, the only module that imports OpenTelemetry
- ``exceptions``: every error of this package
- ``asgi``, ``_request``, ``_disconnect``: the middleware, a request, and how it learns of a disconnect
- ``fastapi``: the adapter; ``testing``, ``pytest_plugin``: for your own tests
- ``logs``, ``_log``: a filter that names the task in each log record, and the logger of this package
- ``instrumentation``: what ``opentelemetry-instrument`` calls, for a start without code
"""

from otel_tasks._current import current_manager
from otel_tasks._decorator import ManagedFunction, managed_task
from otel_tasks._frames import Location
from otel_tasks._group import TaskGroup
from otel_tasks._inspect import GroupNode, TaskNode, TaskTree
from otel_tasks._ledger import TaskStats
from otel_tasks._manager import (
    ShutdownReport,
    TaskManager,
    cancel_all_tasks,
    cancel_group,
    create_task,
    create_task_threadsafe,
    current_cancel_event,
    current_group,
    current_task,
    get_all_task_info,
    global_task_manager,
    run_in_thread,
    start_service,
    start_task,
    wait_for_task,
)
from otel_tasks._service import RestartPolicy
from otel_tasks._state import CancelKind, TaskPriority, TaskStatus
from otel_tasks._task import ManagedTask, TaskInfo
from otel_tasks._telemetry import VERSION as __version__
from otel_tasks.cancellation import (
    CancelCause,
    CancelEvent,
    WaitOutcome,
    propagate_cancellation,
    wait_with_cancellation,
)
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
from otel_tasks.tracking import (
    CancelCounts,
    CancelReport,
    TaskTracker,
    cancel_and_wait,
    cleanup_lingering_tasks,
)

__all__ = [
    "CancelCause",
    "CancelCounts",
    "CancelEvent",
    "CancelKind",
    "CancelReport",
    "GroupClosedError",
    "GroupNode",
    "GroupProgress",
    "IllegalTransitionError",
    "Location",
    "ManagedFunction",
    "ManagedTask",
    "ManagerClosedError",
    "OtelTasksError",
    "Progress",
    "ProgressWatch",
    "QueueFullError",
    "RestartPolicy",
    "ShutdownReport",
    "TaskExistsError",
    "TaskGroup",
    "TaskInfo",
    "TaskManager",
    "TaskNode",
    "TaskNotFoundError",
    "TaskPriority",
    "TaskProgress",
    "TaskStats",
    "TaskStatus",
    "TaskTracker",
    "TaskTree",
    "WaitOutcome",
    "WrongLoopError",
    "WrongThreadError",
    "__version__",
    "cancel_all_tasks",
    "cancel_and_wait",
    "cancel_group",
    "cleanup_lingering_tasks",
    "create_task",
    "create_task_threadsafe",
    "current_cancel_event",
    "current_group",
    "current_manager",
    "current_task",
    "get_all_task_info",
    "global_task_manager",
    "managed_task",
    "propagate_cancellation",
    "run_in_thread",
    "start_service",
    "start_task",
    "wait_for_task",
    "wait_with_cancellation",
]
