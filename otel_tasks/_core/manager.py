"""TaskManager: the root of a tree of groups and tasks, with its limits, its history, and its shutdown."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks._core.causes import chosen_cause, passing
from otel_tasks._core.checks import (
    check_count,
    check_manager_numbers,
    checked_keys,
    checked_name,
    checked_seconds,
)
from otel_tasks._core.eager import EAGER
from otel_tasks._core.ending import Ending
from otel_tasks._core.frames import Stacks, calling_line
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.info import NO_RESULT, TaskInfo
from otel_tasks._core.inspection import check_limit, tree_of
from otel_tasks._core.looking import Looking
from otel_tasks._core.lookup import Lookup, group_id, merged
from otel_tasks._core.lost import LostWork
from otel_tasks._core.options import FROM_MANAGER, GroupOptions, named_as_one
from otel_tasks._core.places import Limiter, Places, checked_limiter
from otel_tasks._core.shutdown import ShutdownBounds, ShutdownReport, cancel_groups, shut_down, wait_for_end
from otel_tasks._core.signals import write_on_signal
from otel_tasks._core.slices import at_once
from otel_tasks._core.starting import Starting
from otel_tasks._core.state import TaskStatus
from otel_tasks._core.telemetry.providers import Telemetry
from otel_tasks._core.threads import Threads
from otel_tasks._core.tree import Ledger
from otel_tasks._core.watch import start_watch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from contextlib import ExitStack
    from types import TracebackType
    from typing import Self, TextIO

    from otel_tasks._core.backoff import RetryPolicy
    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.options import FromManager, Trace
    from otel_tasks._core.records import TaskEvent, TaskStats
    from otel_tasks._core.scope import OnError
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.task_tree import TaskTree
    from otel_tasks._core.telemetry import MeterProvider, TracerProvider

T = TypeVar("T")


@named_as_one
class TaskManager(Starting, Looking):
    """Starts tasks, finds them by name and group, cancels them, and shuts them down.

    A manager belongs to one running event loop at a time. Its first task binds it to the loop; it can move
    to another loop once it has no live task. ``async with`` shuts it down at the end of the block; if the
    block raises, without a grace.

    Args:
        name: The manager's name in traces and messages.
        max_concurrency: How many tasks run at a time, at least 1; the others wait for a place, highest
            priority first. A running task that waits for a queued one keeps its place. None means no limit.
        max_queue: How many tasks may wait for a place, at least 0; the next one is refused. None means no
            limit.
        ageing: Seconds of waiting that raise a task's priority by one level, above 0, so that no task waits
            forever. Infinity means strict priority.
        max_threads: How many threads of ``run_in_thread`` may work at a time, at least 1, including
            abandoned ones. None means no limit.
        eager_start: Run the first step of each task when it is created (Python 3.12; ignored before).
        trace: Whether tasks start new traces, as for ``create_task``; a task or a group can set it too.
        history: How many ended tasks to remember, at least 0. The counters do not depend on it.
        grace: Seconds in which tasks may finish at a shutdown before they are cancelled, at least 0; for
            every shutdown that has no value of its own. Infinity means no limit; a server needs a limit.
        shutdown_timeout: Seconds for everything after that, at least 0. None means no limit.
        on_error: Called with the snapshot and the exception of each task that fails while nothing waits for
            it. Without it, the failure is logged at ERROR.
        log_metadata: The keys of tasks' ``metadata`` that log lines about a task carry, as in
            ``("job", "tenant")``. Values are shortened to 200 characters.
        tracer_provider: Creates the spans; None means the global provider, even if it is set up later.
        meter_provider: Receives the metrics; None means the global provider, even if it is set up later.

    Raises:
        TypeError: ``name`` is not a string, or ``log_metadata`` not a collection of strings.
        ValueError: ``name`` is not valid, or a number is out of its range.

    Example:
        >>> async with TaskManager() as manager:
        ...     manager.create_task(refresh(), group="cache", priority=TaskPriority.LOW)
    """

    def __init__(
        self,
        name: str = "default",
        *,
        max_concurrency: int | None = None,
        max_queue: int | None = None,
        ageing: float = 10.0,
        max_threads: int | None = 40,
        eager_start: bool = False,
        trace: Trace | None = None,
        history: int = 1000,
        grace: float = 5.0,
        shutdown_timeout: float | None = 10.0,
        on_error: Callable[[TaskInfo, BaseException], object] | None = None,
        log_metadata: Collection[str] = (),
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        checked_name("manager", name, 'leave it out for "default"')
        check_manager_numbers(history, max_threads, ageing)
        self._bounds = ShutdownBounds.checked(grace, shutdown_timeout)
        limiter = checked_limiter(max_concurrency, max_queue) or Limiter(None, None)
        self._threads = threads = Threads(max_threads, float(ageing))
        self._ledger = ledger = Ledger(
            name,
            Telemetry(name, tracer_provider, meter_provider),
            history,
            Places(limiter, float(ageing)),
            eager_start and EAGER,
            threads,
        )
        self.log_metadata = log_metadata
        ending = Ending(ledger, on_error)
        ledger.ending = ledger.counters = ending
        ledger.on_done = ending.on_done
        ledger.lost = LostWork(ledger)
        ledger.root = self._root = TaskGroup._labeled(ledger, "root", None)
        if trace is not None:
            self._root._configure(GroupOptions(trace=trace))
        ledger.owner = self
        self._lookup = Lookup(ledger, self._root)

    @property
    def name(self) -> str:
        """The manager's name in traces and messages."""
        return self._ledger.name

    @property
    def max_concurrency(self) -> int | None:
        """How many tasks run at a time; can be changed while tasks run. None means no limit.

        A lower limit stops no running task: it takes effect as tasks end.

        Raises:
            ValueError: The new limit is neither None nor a whole number of at least 1.
        """
        return self._ledger.places.limiter.limit

    @max_concurrency.setter
    def max_concurrency(self, limit: int | None) -> None:
        check_count("max_concurrency", limit, 1)
        ledger = self._ledger
        limiter = ledger.places.limiter
        if limit is not None:
            self._root._count_for(limiter, before=False)
        ledger.places.change_limit(limiter, limit, limiter.max_queue)
        ledger.home.update_fast_path()

    @property
    def max_threads(self) -> int | None:
        """How many threads of ``run_in_thread`` work at a time; can be changed while they work.

        None means no limit. A lower limit takes effect as threads return.

        Raises:
            ValueError: The new limit is neither None nor a whole number of at least 1.
        """
        return self._threads.limit

    @max_threads.setter
    def max_threads(self, limit: int | None) -> None:
        check_count("max_threads", limit, 1)
        self._threads.limit = limit

    @property
    def log_metadata(self) -> tuple[str, ...]:
        """The keys of tasks' ``metadata`` that log lines about a task carry; can be changed at any time.

        Raises:
            TypeError: The new value is not a collection of strings.

        Example:
            >>> global_task_manager.log_metadata = ("job", "tenant")
        """
        return self._ledger.log_metadata

    @log_metadata.setter
    def log_metadata(self, keys: Collection[str]) -> None:
        self._ledger.log_metadata = checked_keys("log_metadata", keys)

    @property
    def abandoned_threads(self) -> tuple[str, ...]:
        """The ids of ended tasks whose functions still run in their threads."""
        return tuple(worker.id for worker in self._threads.abandoned())

    @property
    def failed_services(self) -> tuple[str, ...]:
        """The ids of services that gave up and were not started again, for a readiness check."""
        return tuple(self._ledger.ending.failed_services)

    @property
    def closed(self) -> bool:
        """True once the manager is shut down: it refuses new tasks in the event loop of the shutdown.

        It is False in any other loop, and after ``async with`` has opened the manager again.
        """
        return self._ledger.home.closed_here

    def __repr__(self) -> str:
        state = "shut down" if self.closed else "open"
        return f"<TaskManager {self.name!r} {state}, {self._ledger.live} live tasks>"

    def group(
        self,
        name: str,
        *,
        on_error: OnError = "cancel",
        timeout: float | None = None,
        max_concurrency: int | None = None,
        max_queue: int | None = None,
        span: bool = False,
        trace: Trace | None = None,
    ) -> TaskGroup:
        """Create a block, a scoped group for ``async with``; for the label ``group="x"``, see ``get_group``.

        The block nests in the group around it: that of the enclosing ``async with`` block, or the current
        group.

        Args:
            name: The group's name in traces.
            on_error: What a failing task does to its siblings, as for ``TaskGroup``.
            timeout: Seconds that the block may take, at least 0. None means no limit.
            max_concurrency: How many of its tasks run at a time, as for ``TaskGroup``.
            max_queue: How many tasks may wait for a place, as for ``TaskGroup``.
            span: Give the block a span of its own.
            trace: Whether its tasks start new traces, as for ``create_task``.

        Returns:
            The group, to be entered once.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: ``name`` is not valid, or an argument is out of its range.

        Example:
            >>> async with manager.group("pages", timeout=5.0) as group:
            ...     group.create_task(fetch(1))
        """
        return TaskGroup(
            name,
            on_error=on_error,
            timeout=timeout,
            max_concurrency=max_concurrency,
            max_queue=max_queue,
            span=span,
            trace=trace,
            manager=self,
        )

    def get_group(
        self,
        name: str,
        *,
        max_concurrency: int | None = None,
        max_queue: int | None = None,
        timeout: float | None = None,
        trace: Trace | None = None,
        retry: RetryPolicy | None = None,
    ) -> TaskGroup:
        """Return the label that ``group="x"`` names, created on first use; ``group("x")`` creates a block.

        The options are those of the group itself, not of the groups below it. Set them once, where the group
        is first named: calls without options return it as it is.

        Args:
            name: Dots nest: ``"ingest.fetch"`` is below ``"ingest"``. ``"root"`` is the manager's own group.
            max_concurrency: How many of its tasks run at a time, at least 1; the others wait for a place,
                highest priority first. The manager's limit applies too. None means no limit.
            max_queue: How many tasks may wait for a place, at least 0; the next one is refused. None means no
                limit.
            timeout: Seconds, at least 0, for each task that sets no ``timeout`` itself; infinity there means
                no limit. Services have no timeout.
            trace: Whether its tasks start new traces, as for ``create_task``.
            retry: For each task that sets no ``retry`` itself; ``RetryPolicy(max_attempts=1)`` there means
                none. Pass a function, as in ``create_task(lambda: send(mail), group="mail")``. A coroutine
                runs only once, and is refused unless a task of the group creates it, as part of its own
                attempt. Services, periodic work, and consumers do not use it.

        Returns:
            The labeled group, shared by all callers that use its name; never a block of the same name.

        Raises:
            TypeError: The name is not a string, or an option has the wrong type.
            ValueError: The name is empty, has an empty part, contains ``#`` or a control character, or has
                more than 200 characters; an option is out of its range; or the group has other options.

        Example:
            >>> mail = manager.get_group("mail", max_concurrency=4, max_queue=100)
            >>> mail.create_task(send_mail(user))
        """
        options = GroupOptions(
            max_concurrency=max_concurrency, max_queue=max_queue, timeout=timeout, trace=trace, retry=retry
        )
        return self._lookup.label_with(name, options)

    # -- looking ----------------------------------------------------------------------------

    def get_task(self, name: str, *, group: str | TaskGroup | None = None) -> ManagedTask[Any]:
        """Return a live task by its name, by its id if it is in a scoped group, or by its uid.

        Args:
            name: The task's name, id, or uid.
            group: Look in this group alone: a label, the id of a scoped group, or the group itself. The
                task's name is then enough, and no name or id finds a task of another group: pass ``group``
                if a client supplies the name. None searches the whole manager.

        Raises:
            TaskNotFoundError: No live task has this name; it may have ended.
            TypeError: ``name`` is not a string, or ``group`` is neither a name nor a group.
            ValueError: ``group`` belongs to another manager.

        Example:
            >>> manager.get_task(name, group="exports")
        """
        task = self._lookup.task(name, group)
        if task is None:
            raise self._lookup.not_found(
                name,
                group,
                "get_task_info() has its record, and wait_for_task() the result of a start_task()",
            )
        return task

    def get_task_info(self, name: str, *, group: str | TaskGroup | None = None) -> TaskInfo | None:
        """Return a snapshot of a live or remembered task by name, id, or uid; None if there is no such task.

        Args:
            name: The task's name, id, or uid.
            group: Look in this group alone, as for ``get_task``.

        Raises:
            TypeError: ``name`` is not a string, or ``group`` is neither a name nor a group.
            ValueError: ``group`` belongs to another manager.

        Example:
            >>> manager.get_task_info("import").status
        """
        task = self._lookup.task(name, group)
        return self._ledger.history.find(name, group_id(group)) if task is None else task.info()

    def get_all_task_info(self) -> dict[str, TaskInfo]:
        """Return snapshots of all tasks by id: live tasks first, then remembered ones.

        Example:
            >>> [info.id for info in manager.get_all_task_info().values() if info.status == "failed"]
        """
        return merged(self._root._every_live(), reversed(list(self._ledger.history)))

    def get_group_tasks(self, group: str | TaskGroup) -> dict[str, TaskInfo]:
        """Return snapshots of the tasks of a group and below it: live tasks, then remembered ones.

        Ended tasks are found by the name of their own group, and by the dots in it: groups that were nested
        in a scoped group are not remembered as its children.

        Args:
            group: The name of a labeled group, the name or id of a scoped one, or the group itself. An
                unknown group has no tasks.

        Raises:
            TypeError: ``group`` is neither a name nor a group.
            ValueError: ``group`` belongs to another manager.

        Example:
            >>> len(manager.get_group_tasks("ingest"))
        """
        live = (task for node in self._lookup.groups(group) for task in node._every_live())
        name = group if isinstance(group, str) else group.id
        remembered = (
            info
            for info in reversed(list(self._ledger.history))
            if name in ("root", info.group, info.group_id) or info.group_id.startswith(f"{name}.")
        )
        return merged(live, remembered)

    def stats(self) -> TaskStats:
        """Return the counters of the manager's tasks.

        Example:
            >>> manager.stats().live
        """
        return self._ledger.stats()

    def tree(self, *, limit: int = 100) -> TaskTree:
        """Return a snapshot of what runs: groups, their tasks, how old each task is, and where it waits.

        It can be called from any thread.

        Args:
            limit: How many tasks and groups to show, at least 1; the others are only counted.

        Raises:
            ValueError: ``limit`` is below 1.

        Example:
            >>> print(manager.tree())
            manager default: 1 live task
            └── mail: 1 task
                └── (T) send-3: running, 12.3s, at send app.py:31 > sleep
        """
        check_limit(limit)
        return at_once(tree_of(self._ledger, limit, Stacks))

    def dump_on_signal(
        self, signum: int | None = None, *, file: TextIO | None = None, limit: int = 100
    ) -> ExitStack:
        """Write ``tree()`` whenever the process receives a signal, even while a task holds the event loop.

        It takes effect now and lasts until the ``with`` block ends or ``close()`` is called. Call it in the
        main thread. An existing handler of the signal is called as well. If a task holds the loop in C code
        that rarely or never returns to Python, nothing is written until it does.

        Args:
            signum: The signal; None means ``SIGUSR1``.
            file: An open text file to write to; None means ``sys.stderr``, looked up at each signal.
            limit: As for ``tree``.

        Returns:
            A context manager that removes the handler.

        Raises:
            RuntimeError: This is not the main thread, or the platform has no ``SIGUSR1``.
            TypeError: ``file`` is not a file.
            ValueError: There is no such signal, it cannot be handled, or ``limit`` is below 1.

        Example:
            >>> with manager.dump_on_signal():  # kill -USR1 <pid>
            ...     uvicorn.run(app)
        """
        check_limit(limit)
        ledger = self._ledger
        return write_on_signal(
            lambda frame: str(at_once(tree_of(ledger, limit, lambda: Stacks(frame)))), signum, file
        )

    def watch(
        self,
        *,
        held: float | None = 0.1,
        ignored: float | None = 5.0,
        unstarted: float | None = 10.0,
        outlived: float | None = 10.0,
    ) -> ExitStack:
        """Log warnings about live tasks that are in trouble.

        It takes effect now and lasts until the ``with`` block ends, ``close()`` is called, or the loop is
        closed. Call it where the event loop runs. A timer checks the tasks from outside. For ``held``, a
        thread pings the loop 40 times a second (with ``held=0.1``). None turns a check off, and so does
        infinity.

        Args:
            held: Seconds for which one step may hold the loop, at least 0.01: a step of any kind of task, or
                a callback. The warning names it and its line. This check concerns the loop: enable it in one
                manager per loop.
            ignored: Seconds that a task may take to end after its cancellation was requested.
            unstarted: Seconds within which a task must start, unless it waits for a place under a limit.
            outlived: Seconds for which a plain asyncio task may outlive the request that started it (Python
                3.12; not detected before).

        Returns:
            A context manager that ends the watch.

        Raises:
            WrongThreadError: No event loop runs here.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: A duration is not a number.
            ValueError: A duration is negative, or ``held`` is below 0.01.

        Example:
            >>> @asynccontextmanager
            ... async def watched(app):
            ...     with global_task_manager.watch():
            ...         yield
            >>> app = FastAPI(lifespan=make_lifespan(watched))
        """
        return start_watch(self._ledger, held, ignored, unstarted, outlived)

    def cleanup_completed_tasks(self, max_age: float | None = None) -> int:
        """Forget ended tasks.

        Args:
            max_age: Seconds, at least 0; tasks that ended more recently are kept. None and 0 forget all,
                infinity none.

        Returns:
            How many tasks were forgotten.

        Raises:
            TypeError: ``max_age`` is not a number.
            ValueError: ``max_age`` is negative.

        Example:
            >>> manager.cleanup_completed_tasks(max_age=3600)
        """
        seconds = checked_seconds("max_age", max_age)
        if max_age is not None and seconds is None:
            return 0
        before = float("inf") if seconds is None else self._ledger.home.clock() - seconds
        return self._ledger.history.forget(before)

    def add_listener(self, callback: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Call ``callback(event, info)`` when a task is created, dequeued, cancelling, or ended.

        The event is one of these four words; ``"dequeued"`` is only for tasks that had to wait for a place.

        Args:
            callback: Called synchronously, so it must not block. If it raises, it is logged and removed.

        Example:
            >>> manager.add_listener(lambda event, info: print(event, info.id))
        """
        self._ledger.listeners.add(callback)

    def remove_listener(self, callback: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Stop calling ``callback``.

        Raises:
            ValueError: ``callback`` is not a listener.
        """
        if callback not in self._ledger.listeners.functions:
            raise ValueError(f"{callback!r} is not a listener of manager {self.name!r}")
        self._ledger.listeners.remove(callback)

    # -- waiting ----------------------------------------------------------------------------

    async def wait_for_task(
        self, name: str, timeout: float | None = None, *, group: str | TaskGroup | None = None
    ) -> Any:
        """Wait for a task by name, and return its result or raise its exception.

        Args:
            name: The task's name, id, or uid. An ended task is found while it is remembered, if
                ``start_task`` started it.
            timeout: Seconds, at least 0. None means no limit.
            group: Look in this group alone, as for ``get_task``.

        Raises:
            TaskNotFoundError: There is no such task, or it has ended and its result was not kept.
            TimeoutError: The task has not ended after ``timeout``; it continues to run.
            asyncio.CancelledError: The task was cancelled.
            RuntimeError: The calling task would wait for itself.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``name`` is not a string, or ``timeout`` is not a number.
            ValueError: ``timeout`` is negative.

        It also raises what the task raised.

        Cancellation: cancelling the caller ends the wait; the task continues.

        Example:
            >>> rows = await manager.wait_for_task("import", timeout=30.0)
        """
        seconds = checked_seconds("timeout", timeout)
        caller = self._caller()
        task = self._lookup.task(name, group)
        if task is not None and task is caller:
            raise RuntimeError(
                f"task {name!r} cannot wait for itself: it would wait forever; wait in another task"
            )
        if task is None:
            return self._lookup.kept_result(name, group).take()
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise TimeoutError(f"task {name!r} is still {task.status} after {timeout:g} s, and continues")
        return task.result()

    def get_result(self, name: str, *, default: Any = NO_RESULT, group: str | TaskGroup | None = None) -> Any:
        """Return the result of a completed task without waiting for it.

        Args:
            name: The task's name, id, or uid. Results are kept only for tasks that ``start_task`` started,
                while they are remembered.
            default: Returned if there is no result: the task is live, cancelled, or unknown, or its result
                was not kept. Without a default, each of these raises.
            group: Look in this group alone, as for ``get_task``.

        Raises:
            TaskNotFoundError: There is no such task, or it has ended and its result was not kept.
            asyncio.InvalidStateError: The task has not ended.
            asyncio.CancelledError: The task was cancelled.
            TypeError: ``name`` is not a string.

        It also raises what the task raised, even with a ``default``.

        Example:
            >>> manager.get_result("import", default=None)
        """
        task = self._lookup.task(name, group)
        if task is None:
            if default is NO_RESULT:
                return self._lookup.kept_result(name, group).take()
            ending = self._ledger.history.ending(name, group_id(group))
            if ending is None or ending.info.status is TaskStatus.CANCELLED:
                return default
            return ending.take()
        if default is not NO_RESULT and (not task.done() or task.cancelled()):
            return default
        if not task.done():
            raise asyncio.InvalidStateError(
                f"task {name!r} is {task.status} and has no result yet: wait for it with wait_for_task()"
            )
        return task.result()

    async def join(self, group: str | TaskGroup | None = None) -> None:
        """Wait until no task is live in ``group`` (None: in the whole manager), except for the calling task.

        Args:
            group: The name of a labeled group, the name or id of a scoped one, or the group itself. For an
                unknown group, ``join`` returns immediately.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``group`` is neither a name nor a group.
            ValueError: ``group`` belongs to another manager.

        Cancellation: cancelling the caller ends the wait; the tasks continue.

        Example:
            >>> await manager.join("mail")
        """
        self._caller()
        for node in [self._root] if group is None else self._lookup.groups(group):
            await node.join()

    # -- cancelling -------------------------------------------------------------------------

    async def cancel_task(
        self,
        name: str,
        reason: str | None = None,
        *,
        group: str | TaskGroup | None = None,
        timeout: float | None = 10.0,
        asked_by: str | None = None,
        cause: CancelCause | None = None,
    ) -> bool:
        """Cancel a task and wait until it has ended.

        Args:
            name: The task's name, id, or uid.
            reason: Recorded with the cause.
            group: Look in this group alone, as for ``get_task``.
            timeout: Seconds to wait for the task's end, at least 0. None means no limit.
            asked_by: The person who wants it, for the cause. None names the code that calls.
            cause: A cause that was made elsewhere, such as in another process, instead of ``reason`` and
                ``asked_by``. Without a time, it gets that of this call.

        Returns:
            True if the cancellation was requested and ended the task. False if no live task has this name,
            if the task completed anyway, or if it still runs after ``timeout``.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``name`` is not a string, ``timeout`` is not a number, or ``cause`` is not a cause or
                comes with a reason.
            ValueError: ``timeout`` is negative.

        Cancellation: cancelling the caller ends the wait; the task stays cancelled.

        Telemetry: the task's span records the cause and names the current span.

        Example:
            >>> await manager.cancel_task("import", reason="superseded")
        """
        seconds = checked_seconds("timeout", timeout)
        chosen = chosen_cause(cause, reason, asked_by)
        caller = self._caller()
        task = self._lookup.task(name, group)
        if task is None or task.done():
            return False
        with passing(chosen):
            task.cancel(chosen.message)
        # A task that cancels itself ends at its next await. It must not be this one.
        return task is not caller and await wait_for_end([task], seconds) == 1

    async def cancel_group(
        self,
        group: str | TaskGroup,
        reason: str | None = None,
        *,
        grace: float = 0.0,
        timeout: float | None = 10.0,
        cause: CancelCause | None = None,
    ) -> int:
        """Cancel all tasks of a group and of the groups below it, and wait for them together.

        A task whose cancellation was already requested is not cancelled again, so that its cleanup is not
        interrupted; only ``shutdown`` cancels twice. The calling task and the tasks that await it are
        spared.

        Args:
            group: The name of a labeled group, the name or id of a scoped one, or the group itself. An
                unknown group has no tasks: nothing is cancelled, and nothing is raised.
            reason: Recorded with the cause of each task.
            grace: Seconds between the cancel event and the cancellation, at least 0; 0 cancels immediately.
            timeout: Seconds to wait for the tasks' end after that, at least 0. None means no limit.
            cause: A cause that was made elsewhere, instead of ``reason``, as for ``cancel_task``.

        Returns:
            How many tasks the cancellation ended. Tasks that still run after ``timeout`` are logged and stay
            listed.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``group`` is neither a name nor a group, a duration is not a number, or ``cause`` is
                not a cause or comes with a reason.
            ValueError: ``group`` belongs to another manager, or a duration is negative.

        Cancellation: cancelling the caller ends the grace or the wait; the tasks are cancelled.

        Telemetry: the span of each task records the cause and names the current span.

        Example:
            >>> await manager.cancel_group("ingest", reason="no longer wanted")
        """
        chosen = chosen_cause(cause, reason)
        return await cancel_groups(self._caller(), self._lookup.groups(group), chosen, grace, timeout)

    async def cancel_all_tasks(
        self, reason: str | None = None, *, grace: float = 0.0, timeout: float | None = 10.0
    ) -> int:
        """Cancel every task of the manager and wait for them together; the manager stays usable.

        The parameters and the tasks that are spared are those of ``cancel_group``.

        Returns:
            How many tasks the cancellation ended.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: A duration is not a number.
            ValueError: A duration is negative.

        Cancellation: cancelling the caller ends the grace or the wait; the tasks are cancelled.

        Telemetry: the span of each task records the cause and names the current span.

        Example:
            >>> await manager.cancel_all_tasks(reason="reload")
        """
        chosen = chosen_cause(None, reason)
        return await cancel_groups(self._caller(), [self._root], chosen, grace, timeout)

    async def shutdown(
        self,
        grace: float | FromManager = FROM_MANAGER,
        timeout: float | FromManager | None = FROM_MANAGER,
    ) -> ShutdownReport:
        """Refuse new tasks, let live ones finish, cancel the rest, and report.

        The shutdown applies to the running event loop: in another loop, the manager is open.

        It sets the cancel events first. After ``grace``, it cancels the live tasks by rising priority,
        critical tasks last. It then cancels once more the tasks that ignored the first cancellation. The
        calling task and the tasks that await it are spared.

        Args:
            grace: Seconds in which tasks may finish, at least 0. Services are awaited only if they drain. By
                default, the manager's ``grace``.
            timeout: Seconds for everything after that, at least 0. None means no limit. By default, the
                manager's ``shutdown_timeout``.

        Returns:
            How the tasks ended. Tasks that it cancelled, and those that did not stop, are also logged.

        Raises:
            WrongLoopError: The manager has live tasks in another loop; it stays open.
            TypeError: A duration is not a number.
            ValueError: A duration is negative.

        Cancellation: cancelling the caller ends the wait; the manager stays closed.

        Telemetry: the spans of tasks that did not stop end as ``abandoned``.

        Example:
            >>> report = await manager.shutdown(grace=5.0)
            >>> report.clean
        """
        return await self._shut_down(grace, timeout, f"shutdown(){_called_at()}")

    async def __aenter__(self) -> Self:
        """Open the manager, even if it was shut down.

        Cancellation: it never waits.
        """
        # Bind first: if that is refused, a closed manager stays closed.
        self._ledger.home.bind(asyncio.get_running_loop())
        if self._ledger.home.closed:
            self._ledger.reopen()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Shut the manager down, as ``shutdown()`` does; if the block raised, cancel its tasks immediately.

        Cancellation: cancelling the caller ends the wait; the manager stays closed.
        """
        grace = FROM_MANAGER if exc is None else 0.0
        await self._shut_down(grace, FROM_MANAGER, f"the end of its async with block{_called_at()}")

    async def _shut_down(
        self, grace: float | FromManager, timeout: float | FromManager | None, by: str
    ) -> ShutdownReport:
        return await shut_down(self._ledger, self._caller(), self._bounds.or_own(grace, timeout), by)

    def _caller(self) -> asyncio.Task[Any] | None:
        """Return the calling task, after checking that the manager belongs to this loop."""
        self._ledger.home.bind(asyncio.get_running_loop())
        return asyncio.current_task()


def _called_at() -> str:
    """Name the line of user code that calls, as in ``" in stop app.py:31"``; empty if there is none."""
    at = calling_line()
    return "" if at is None else f" in {at}"
