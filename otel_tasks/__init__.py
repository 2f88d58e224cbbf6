"""OpenTelemetry-instrumented tasks for asyncio services.

Services import everything from here. The middleware is in ``asgi`` and ``fastapi``, help for an application's
tests in ``testing`` and ``pytest_plugin``, the logging filter in ``logs``, and zero-code setup in
``instrumentation``. ``_core`` and ``_asgi`` hold the implementation; ``docs/architecture.md`` maps it.
"""

from otel_tasks._core.decorator import ManagedFunction, managed_task
from otel_tasks._core.frames import Location
from otel_tasks._core.functions import (
    cancel_all_tasks,
    cancel_group,
    create_task,
    create_task_threadsafe,
    current_cancel_event,
    current_group,
    current_manager,
    current_task,
    get_all_task_info,
    global_task_manager,
    run_in_thread,
    start_service,
    start_task,
    wait_for_task,
)
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.info import TaskInfo
from otel_tasks._core.manager import TaskManager
from otel_tasks._core.records import TaskStats
from otel_tasks._core.service import RestartPolicy
from otel_tasks._core.shutdown import ShutdownReport
from otel_tasks._core.state import CancelKind, TaskPriority, TaskStatus
from otel_tasks._core.task import ManagedTask
from otel_tasks._core.task_tree import GroupNode, TaskNode, TaskTree
from otel_tasks._core.telemetry.conventions import VERSION as __version__
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
