"""OpenTelemetry-instrumented tasks for asyncio services.

Services import everything from here. The middleware is in ``asgi`` and ``fastapi``, help for an application's
tests in ``testing`` and ``pytest_plugin``, the logging filter in ``logs``, and zero-code setup in
``instrumentation``. ``_core`` and ``_asgi`` hold the implementation; ``docs/architecture.md`` maps it.

Where a task goes, and what ends it, for each way to start one::

    =================  =========================================  ===============  ==========================
    way                you write                                  group            also ended by
    =================  =========================================  ===============  ==========================
    module function    create_task(work())                        current group    disconnect, request end
    request group      request_group().create_task(work())        request's group  disconnect, request end
    decorator          await work()                               current group    disconnect, request end
    scoped group       group.create_task(work())                  block            disconnect, failed sibling
    labeled group      manager.create_task(work(), group="mail")  label            cancel_group("mail")
    labeled decorator  work.start()                               label            cancel_group("mail")
    manager            manager.create_task(work())                manager's root
    named task         await start_task("import", work)           manager's root
    asyncio task       asyncio.create_task(work())                none             end of the loop
    =================  =========================================  ===============  ==========================

Every task ends when its work is done, and with ``task.cancel()``. All but the last also end with the
cancellation of their group, their own ``timeout``, and the shutdown of their manager.

- The current group is that of the request or the managed task that calls; elsewhere, it is the root of
  ``global_task_manager``. The body of an ``async with`` block does not change it.
- "disconnect": the request's client leaves. "request end": ``on_exit`` of the middleware can instead wait
  for the tasks, or hand them over to the manager.
- A block (``async with TaskGroup("load") as group``) waits for its tasks at its end; its ``timeout`` also
  ends them.
- ``@managed_task`` decorates ``work``; with ``group="mail"``, its tasks join that label. A cancelled caller
  of ``await work()`` also ends its task.
"""

from otel_tasks._core.backoff import RestartPolicy, RetryPolicy
from otel_tasks._core.decorator import ManagedFunction, managed_task
from otel_tasks._core.details import TaskDetails, TaskPlace
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
from otel_tasks._core.info import ConsumerInfo, PeriodicInfo, TaskInfo
from otel_tasks._core.manager import TaskManager
from otel_tasks._core.overview import ClassRow, Counted, GroupRow, Overview, ProgressSum
from otel_tasks._core.records import TaskStats
from otel_tasks._core.run import run
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
    "ClassRow",
    "ConsumerInfo",
    "Counted",
    "GroupClosedError",
    "GroupNode",
    "GroupProgress",
    "GroupRow",
    "IllegalTransitionError",
    "Location",
    "ManagedFunction",
    "ManagedTask",
    "ManagerClosedError",
    "OtelTasksError",
    "Overview",
    "PeriodicInfo",
    "Progress",
    "ProgressSum",
    "ProgressWatch",
    "QueueFullError",
    "RestartPolicy",
    "RetryPolicy",
    "ShutdownReport",
    "TaskDetails",
    "TaskExistsError",
    "TaskGroup",
    "TaskInfo",
    "TaskManager",
    "TaskNode",
    "TaskNotFoundError",
    "TaskPlace",
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
    "run",
    "run_in_thread",
    "start_service",
    "start_task",
    "wait_for_task",
    "wait_with_cancellation",
]
