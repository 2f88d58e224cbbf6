"""TaskManager: the root of the tree of work; its parts that need no waiting are in `group` and `ledger`."""

from __future__ import annotations

import asyncio
import functools
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from otel_tasks._core.checks import check_count, checked_name, checked_seconds
from otel_tasks._core.coroutines import check_factory, close_quietly, made_coroutine
from otel_tasks._core.creation import EAGER
from otel_tasks._core.ending import Ending
from otel_tasks._core.frames import Stacks, calling_line
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.info import NO_RESULT, TaskInfo
from otel_tasks._core.inspection import check_limit, tree_of
from otel_tasks._core.lookup import Lookup, group_id, merged
from otel_tasks._core.lost import LostWork
from otel_tasks._core.options import with_options_of
from otel_tasks._core.places import Limiter, Places, checked_limiter
from otel_tasks._core.service import DEFAULT_POLICY, RestartPolicy, start_supervisor
from otel_tasks._core.shutdown import ShutdownReport, cancel_groups, shut_down, wait_for_end
from otel_tasks._core.signals import write_on_signal
from otel_tasks._core.state import TaskPriority, TaskStatus
from otel_tasks._core.telemetry.providers import Telemetry
from otel_tasks._core.threads import Threads
from otel_tasks._core.tree import Ledger
from otel_tasks._core.watch import Watch
from otel_tasks.exceptions import WrongThreadError

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Coroutine, Mapping
    from contextvars import Context
    from types import TracebackType
    from typing import Self, TextIO, Unpack

    from otel_tasks._core.options import NamedTaskOptions, OnConflict, TaskOptions
    from otel_tasks._core.records import TaskEvent, TaskStats
    from otel_tasks._core.scope import OnError
    from otel_tasks._core.task import ManagedTask
    from otel_tasks._core.task_tree import TaskTree
    from otel_tasks._core.telemetry import MeterProvider, TracerProvider

T = TypeVar("T")
Args = TypeVarTuple("Args")


class TaskManager:
    """Starts tasks, knows them by name and group, cancels them, and shuts them down.

    It belongs to one running event loop at a time: it binds at its first task, and anew once
    it has no live task. With ``async with`` it is shut down at the end of the block.

    Args:
        name: What it is called in traces.
        max_concurrency: How many tasks run at a time, at least 1; the others wait for a place,
            highest priority first. A running task that waits for a queued one keeps its place. None
            is without bound.
        max_queue: How many may wait, at least 0; one more is refused. None is without bound.
        ageing: Seconds of waiting that are worth one level of priority, above 0, so that nothing
            waits for ever; infinity is strict priority.
        max_threads: How many threads of ``run_in_thread`` may work at a time, at least 1, those included
            that were abandoned. None is without bound.
        eager_start: Run the first step of each task when it is created (Python 3.12; ignored before).
        history: How many ended tasks to remember, at least 0; counters do not depend on it.
        on_error: Called with the snapshot and the exception of each task that fails while
            nobody waits for it; without one the failure is logged at ERROR.
        tracer_provider: Where spans go; None is the global provider, also one that is set up later.
        meter_provider: Where metrics go; None is the global provider, also one that is set up later.

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
        history: int = 1000,
        on_error: Callable[[TaskInfo, BaseException], object] | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        checked_name("manager", name, 'leave it out for "default"')
        if not isinstance(history, int) or isinstance(history, bool) or history < 0:
            raise ValueError(f"history must be a whole number of tasks, at least 0, got {history!r}")
        check_count("max_threads", max_threads, 1)
        if not isinstance(ageing, int | float) or isinstance(ageing, bool) or not ageing > 0:
            raise ValueError(f"ageing must be more than 0 seconds, got {ageing!r}")
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
        ending = Ending(ledger, on_error)
        ledger.ending = ledger.counters = ending
        ledger.on_done = ending.on_done
        ledger.lost = LostWork(ledger)
        ledger.root = self._root = TaskGroup._labeled(ledger, "root", None)
        ledger.owner = self
        self._lookup = Lookup(ledger, self._root)

    @property
    def name(self) -> str:
        """What it is called in traces."""
        return self._ledger.name

    @property
    def max_concurrency(self) -> int | None:
        """How many tasks run at a time; may be changed while they do. None is without bound.

        Raises:
            ValueError: It is set to what is no whole number of at least 1.
        """
        return self._ledger.places.limiter.limit

    @max_concurrency.setter
    def max_concurrency(self, limit: int | None) -> None:
        # A lower one waits for running tasks to end, it stops none.
        check_count("max_concurrency", limit, 1)
        ledger = self._ledger
        limiter = ledger.places.limiter
        if limit is not None:
            self._root._count_for(limiter, before=False)
        ledger.places.change_limit(limiter, limit)
        ledger.home.update_fast_path()

    @property
    def max_threads(self) -> int | None:
        """How many threads of ``run_in_thread`` work at a time; may be changed while they do.

        Raises:
            ValueError: It is set to what is no whole number of at least 1.
        """
        return self._threads.limit

    @max_threads.setter
    def max_threads(self, limit: int | None) -> None:
        # A lower one waits for threads to return.
        check_count("max_threads", limit, 1)
        self._threads.limit = limit

    @property
    def abandoned_threads(self) -> tuple[str, ...]:
        """The ids of the tasks that have ended while their function runs on in its thread."""
        return tuple(worker.id for worker in self._threads.abandoned())

    @property
    def closed(self) -> bool:
        """True from the moment it is shut down: it refuses new tasks, in the event loop of the shutdown.

        In another loop, and after ``async with`` has opened it again, it is False.
        """
        return self._ledger.home.closed_here

    def __repr__(self) -> str:
        state = "shut down" if self.closed else "open"
        return f"<TaskManager {self.name!r} {state}, {self._ledger.live} live tasks>"

    # -- starting ---------------------------------------------------------------------------

    @with_options_of(TaskGroup._create)
    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[TaskOptions],
    ) -> ManagedTask[T]:
        """Create a task; it runs from the loop's next turn on, as after ``asyncio.create_task``.

        Args:
            coro: What to run; closed if the task is refused.
            name: Unique among the live tasks, at most 200 characters, without ``#`` and control characters;
                None makes one from the function's name.
            group: A labeled group, made on first use (dots nest: ``"ingest.fetch"``), or a group
                object; None is the manager's root. The current group is not looked at: the
                function ``create_task`` does that.
            priority: How urgent.
            timeout: Seconds from now, at least 0, until it is cancelled and raises ``TimeoutError``;
                None is without bound.
            queue_timeout: Seconds that it may wait for a place under ``max_concurrency``; then it
                fails with ``TimeoutError`` without having run.
            metadata: Kept with the task and its record, never put on spans.
            on_conflict: What to do where a live task has the name: ``"suffix"`` makes another name,
                ``"error"`` raises, ``"return"`` returns the live one, ``"replace"`` cancels it and
                begins once it has ended.
            detached: Begin a new trace, linked to this one, instead of being a child of the current span.
            context: Where it runs; None is a copy of the current context. With tracing a copy of it.
            eager_start: Run its first step now (Python 3.12; ignored before). None is the manager's, or True
                where the task factory of the loop starts tasks eagerly.

        Raises:
            TaskExistsError: The name is taken and ``on_conflict`` is ``"error"``.
            ManagerClosedError: The manager is shut down.
            GroupClosedError: ``group`` takes no new tasks.
            QueueFullError: No place is free, and no more tasks may wait.
            WrongThreadError: No event loop runs in this thread.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``coro`` is no coroutine.
            ValueError: A name is empty or has what names may not have, or a timeout is negative.

        Telemetry: a span named after the task, from now to its end.

        Example:
            >>> task = manager.create_task(send_mail(user), group="mail")
        """
        where = self._root if group is None else self._lookup.group(group, coro)
        if options:
            return where._create_with(coro, name, priority, options)
        return where.create_task(coro, name=name, priority=priority)

    @with_options_of(TaskGroup._create)
    def create_task_threadsafe(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        *,
        group: str | TaskGroup | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> concurrent.futures.Future[T]:
        """Create a task from another thread; the rest is as for ``TaskGroup.create_task_threadsafe``.

        Args:
            work: A coroutine, or a function that makes one; it is called in the event loop.
            group: As for ``create_task``.
            **options: As for ``create_task``.

        Example:
            >>> manager.create_task_threadsafe(send_mail(user), group="mail").result(timeout=5.0)
        """
        if isinstance(group, str):
            # Made, or found, in the loop.
            return self._root._hand_over(work, functools.partial(self.get_group, group), options)
        where = self._root if group is None else self._lookup.group(group, work)
        return where.create_task_threadsafe(work, **options)

    @with_options_of(TaskGroup._create)
    def run_in_thread(
        self,
        function: Callable[[*Args], T],
        /,
        *args: *Args,
        group: str | TaskGroup | None = None,
        abandon: bool = False,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task that calls a plain function in a thread; see ``TaskGroup.run_in_thread``.

        Args:
            function: What to call.
            *args: What to call it with.
            group: As for ``create_task``.
            abandon: Whether the task, when it is cancelled, ends before the function has returned.
            **options: As for ``create_task``.

        Example:
            >>> task = manager.run_in_thread(render, page, group="render", timeout=30.0)
        """
        where = self._root if group is None else self._lookup.group(group, function)
        return where.run_in_thread(function, *args, abandon=abandon, **options)

    @with_options_of(TaskGroup._create)
    async def put_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        group: str | TaskGroup | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task as soon as it may wait for its place: ``create_task`` with patience.

        As ``asyncio.Queue.put`` is to ``put_nowait``: where ``create_task`` would raise
        ``QueueFullError`` this waits for room in the queue. The parameters are the same.

        Raises:
            GroupClosedError: The group takes no new tasks, or none any more.
            ManagerClosedError: The manager is shut down, or was while this waited.
            WrongLoopError: The manager has live tasks in another loop.

        Cancellation: of the caller, while it waits for room: ``coro`` is closed, no task is created.
        """
        where = self._root if group is None else self._lookup.group(group, coro)
        return await where.put_task(coro, **options)

    async def start_task(
        self,
        name: str,
        factory: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
        *,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "error",
        cancel_existing: bool = False,
        detached: bool = False,
        context: Context | None = None,
        eager_start: bool | None = None,
    ) -> ManagedTask[T]:
        """Start a task by name; its result is kept with its record for ``wait_for_task``.

        Args:
            name: Unique among the live tasks.
            factory: What makes the coroutine (``lambda: work(1)`` or the coroutine function
                itself); a coroutine is taken too. It is not called if the task is refused.
            group: As for ``create_task``.
            priority: How urgent.
            timeout: Seconds from its creation until it is cancelled; None is without bound.
            queue_timeout: Seconds that it may wait for a place.
            metadata: Kept with the task and its record.
            on_conflict: As for ``create_task``, but ``"error"`` unless told otherwise.
            cancel_existing: The same as ``on_conflict="replace"``.
            detached: Begin a new trace, as for ``create_task``.
            context: Where it runs.
            eager_start: As for ``create_task``.

        Returns:
            The running task; it returns before the task has ended.

        Raises:
            TaskExistsError: A live task has the name, and ``on_conflict`` is ``"error"``.
            GroupClosedError: ``group`` takes no new tasks.
            ManagerClosedError: The manager is shut down.
            QueueFullError: No place is free, and no more tasks may wait.
            WrongLoopError: The manager has live tasks in another loop.
            RuntimeError: The calling task is the one that is to be replaced.
            TypeError: ``factory`` makes no coroutine, or an option is of the wrong type.
            ValueError: An option is out of its range, the name empty, or the group another manager's.

        What ``factory`` raises is raised here.

        Cancellation: of the caller, while it waits for the task that is to be replaced: no new
        task is started; the old one stays cancelled.
        """
        if cancel_existing:
            on_conflict = "replace"
        try:
            checked_name("task", name, 'call it by its work, as in start_task("import", work)')
            where = self._root if group is None else self._lookup.group(group)
            if on_conflict == "replace":
                check_factory(factory)
                await where._clear_name(name, f"replaced by a new task {name!r}")
            where._admit(name, on_conflict)
            if on_conflict == "return" and (taken := where._holder(name)) is not None:
                close_quietly(factory)
                return taken
            coro = made_coroutine(factory)
            return where._open_group()._create(
                coro,
                name,
                priority,
                timeout,
                queue_timeout,
                metadata,
                on_conflict,
                detached,
                context,
                eager_start,
                True,
            )
        except BaseException:
            close_quietly(factory)
            raise

    async def start_service(
        self,
        name: str,
        factory: Callable[[], Coroutine[Any, Any, T]],
        *,
        restart: RestartPolicy = DEFAULT_POLICY,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.CRITICAL,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "error",
        drains: bool = False,
    ) -> ManagedTask[T]:
        """Start what is meant to go on for the life of the application, and is begun again when it fails.

        The task that this gives looks after the attempts, of which each is a task of its own: ``prices#1``,
        ``prices#2``. It has no span and takes no place under ``max_concurrency``, the attempts do.

        Args:
            name: Unique among the live tasks.
            factory: What makes the coroutine of each attempt: ``lambda: work(1)``, or the coroutine
                function itself. It runs where ``start_service`` was called: in a copy of that context.
            restart: What counts as a failure, how long to wait after one, when to give up.
            group: A labeled group, by its name or itself; None is the manager's root.
            priority: How urgent, its attempts too: unless told otherwise they are the last to be cancelled
                in a shutdown.
            metadata: Kept with it and with each attempt.
            on_conflict: As for ``start_task``; ``"replace"`` starts it once the old one has ended.
            drains: It ends by itself when ``current_cancel_event()`` is set, and the grace of a shutdown is
                to wait for it. A service that does not would make every shutdown last its whole grace.

        Returns:
            The service. It returns what an attempt returned; it is cancelled with an attempt that somebody
            cancelled; given up, it fails with the last failure.

        Raises:
            TaskExistsError: A live task has the name.
            ManagerClosedError: The manager is shut down.
            ValueError: ``group`` is a scoped one, which ends before a service does.
            TypeError: ``factory`` cannot be called again and again, or ``restart`` is no policy.

        A failure is logged as a warning, with the time until the next attempt; the last one is the service's,
        and reported as that of any task. In a shutdown nothing is begun again, and unless ``drains`` it is
        cancelled when all other tasks have ended.

        Cancellation: of the caller, while it waits for the service that is to be replaced: no new one is
        started; the old one stays cancelled. Of the service: its attempt is cancelled, for the same cause.

        Telemetry: a span for each attempt, in a trace of its own, linked to the attempt before it
        (``restart_of``), the first one to the span that is current here.

        Example:
            >>> await manager.start_service("prices", refresh_prices, restart=RestartPolicy(max_delay=30))
        """
        where = self._root if group is None else self._lookup.group(group, factory)
        return await start_supervisor(
            where, name, factory, restart, priority, metadata, on_conflict, drains=drains
        )

    def group(
        self,
        name: str,
        *,
        on_error: OnError = "cancel",
        timeout: float | None = None,
        max_concurrency: int | None = None,
        max_queue: int | None = None,
        span: bool = False,
    ) -> TaskGroup:
        """Make a block: a new scoped group for ``async with``; ``group="x"`` is a label, see ``get_group``.

        It nests in the group around it: that of the enclosing ``async with`` block, or the
        current group.

        Args:
            name: What it is called in traces.
            on_error: What a failing task does to its siblings, as for ``TaskGroup``.
            timeout: Seconds that the block may take; None is without bound.
            max_concurrency: How many of its tasks run at a time, as for ``TaskGroup``.
            max_queue: How many may wait for a place.
            span: Give the block a span of its own.
        """
        return TaskGroup(
            name,
            on_error=on_error,
            timeout=timeout,
            max_concurrency=max_concurrency,
            max_queue=max_queue,
            span=span,
            manager=self,
        )

    def get_group(self, name: str) -> TaskGroup:
        """Give the label that ``group="x"`` means, made on first use; ``group("x")`` makes a block.

        Args:
            name: Dots nest: ``"ingest.fetch"`` is below ``"ingest"``. ``"root"`` is the manager's own group.

        Returns:
            The labeled group, which all who say its name share, never a block of the same name.

        Raises:
            ValueError: The name is empty, has an empty part, or has what names may not have: ``#``, control
                characters, more than 200 characters.
        """
        return self._lookup.label(name)

    # -- looking ----------------------------------------------------------------------------

    def get_task(self, name: str, *, group: str | TaskGroup | None = None) -> ManagedTask[Any]:
        """Give a live task by its name, by its id for one of a scoped group, or by its uid.

        Args:
            name: Its name, id or uid.
            group: Look in this very group alone: a label, the id of a scoped group, or the group; there the
                name is enough. A task of another group is not found, whatever the name or the id: use this
                where it comes from a client. None looks in the whole manager.

        Raises:
            TaskNotFoundError: No live task is called that; it may have ended.
            TypeError: ``name`` is no string, or ``group`` neither a name nor a group.
            ValueError: The group is another manager's.

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
        """Give a snapshot of a live or remembered task by name, id or uid; None if there is none.

        Args:
            name: Its name, id or uid.
            group: Look in this very group alone, as for ``get_task``.
        """
        task = self._lookup.task(name, group)
        return self._ledger.history.find(name, group_id(group)) if task is None else task.info()

    def get_all_task_info(self) -> dict[str, TaskInfo]:
        """Give snapshots of all tasks by id: the live ones, then the remembered ones."""
        return merged(self._root._every_live(), reversed(list(self._ledger.history)))

    def get_group_tasks(self, group: str | TaskGroup) -> dict[str, TaskInfo]:
        """Give snapshots of the tasks of a group and of all below it: live, then remembered.

        Ended tasks are found by the name of their own group, and by its dots: below what a
        scoped group hung is not remembered.

        Args:
            group: The name of a labelled group, the name or id of a scoped one, or the group.
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
        """Read the counters."""
        return self._ledger.stats()

    def tree(self, *, limit: int = 100) -> TaskTree:
        """Take a snapshot of what runs: groups, their tasks, how old each is and where it waits.

        It may be called in any thread.

        Args:
            limit: How many tasks and groups to show at most, at least 1; the others are counted.

        Raises:
            ValueError: ``limit`` is below 1.

        Example:
            >>> print(manager.tree())
            manager default: 1 live task
            └── mail: 1 task
                └── (T) send-3: running, 12.3s, at send app.py:31 > sleep
        """
        check_limit(limit)
        return tree_of(self._ledger, limit, Stacks())

    def dump_on_signal(
        self, signum: int | None = None, *, file: TextIO | None = None, limit: int = 100
    ) -> ExitStack:
        """Write ``tree()`` whenever the process gets a signal, also while a task holds the event loop.

        It is in effect from now on, until the ``with`` block ends or ``close()`` is called. To be called in
        the main thread. A handler that was there before is called as well. Of a task that holds the loop with
        code in C, which comes back to Python late or never, it shows nothing until then.

        Args:
            signum: Which; None is ``SIGUSR1``.
            file: Where to, an open text file; None is ``sys.stderr`` as it is then.
            limit: As for ``tree``.

        Raises:
            RuntimeError: This is not the main thread, or the platform has no ``SIGUSR1``.
            TypeError: ``file`` is no file.
            ValueError: There is no such signal, it cannot be handled, or ``limit`` is below 1.

        Example:
            >>> with manager.dump_on_signal():  # kill -USR1 <pid>
            ...     uvicorn.run(app)
        """
        check_limit(limit)
        ledger = self._ledger
        return write_on_signal(lambda frame: str(tree_of(ledger, limit, Stacks(frame))), signum, file)

    def watch(
        self,
        *,
        held: float | None = 0.1,
        ignored: float | None = 5.0,
        unstarted: float | None = 10.0,
        outlived: float | None = 10.0,
    ) -> ExitStack:
        """Warn in the log of tasks that are in trouble, while they live.

        It is in effect from now on, until the ``with`` block ends, ``close()`` is called, or the loop is
        closed. To be called where the event loop runs. Tasks are looked at from outside, by a timer, and for
        ``held`` by a thread that asks the loop for an answer 40 times a second (at 0.1). None leaves a
        kind out; infinity too.

        Args:
            held: Seconds for which anything may hold the loop at a stretch, at least 0.01: a task of whatever
                kind, or a callback. The warning names it, and the line. It is about the loop: watch it with
                one manager.
            ignored: Seconds that a task may take to end after it was asked to.
            unstarted: Seconds in which a task is to begin, unless it waits for a place under a limit.
            outlived: Seconds for which a plain asyncio task may go on after the request has ended in which it
                was started (Python 3.12; not seen before).

        Raises:
            WrongThreadError: No event loop runs here.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: A duration is no number.
            ValueError: One is negative, or ``held`` below 0.01.

        Example:
            >>> @asynccontextmanager
            ... async def watched(app):
            ...     with global_task_manager.watch():
            ...         yield
            >>> app = FastAPI(lifespan=make_lifespan(watched))
        """
        bound = checked_seconds("held", held)
        if bound is not None and bound < 0.01:
            raise ValueError(f"held must be at least 0.01 seconds, got {held!r}: looking costs time, too")
        bounds = [
            checked_seconds(what, seconds)
            for what, seconds in (("ignored", ignored), ("unstarted", unstarted), ("outlived", outlived))
        ]
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise WrongThreadError(
                f"watch() of manager {self.name!r} was called where no event loop runs: "
                "call it in a coroutine, such as the application's lifespan"
            ) from None
        self._ledger.home.bind(loop)
        watch = Watch(self._ledger, bound, *bounds)
        end = ExitStack()
        end.callback(watch.stop)
        watch.start()
        return end

    def cleanup_completed_tasks(self, max_age: float | None = None) -> int:
        """Forget ended tasks.

        Args:
            max_age: Seconds; younger ones are kept. None forgets all.

        Returns:
            How many were forgotten.
        """
        seconds = checked_seconds("max_age", max_age)
        if max_age is not None and seconds is None:
            return 0
        before = float("inf") if seconds is None else self._ledger.home.clock() - seconds
        return self._ledger.history.forget(before)

    def add_listener(self, callback: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Call ``callback(event, info)`` when a task is created, dequeued, cancelling or ended.

        The event is one of these four words; ``"dequeued"`` is for tasks that had to wait for a place.

        It is called on the spot and must not block; one that raises is logged and dropped.
        """
        self._ledger.listeners.add(callback)

    def remove_listener(self, callback: Callable[[TaskEvent, TaskInfo], object]) -> None:
        """Stop calling ``callback``.

        Raises:
            ValueError: It is no listener.
        """
        self._ledger.listeners.remove(callback)

    # -- waiting ----------------------------------------------------------------------------

    async def wait_for_task(
        self, name: str, timeout: float | None = None, *, group: str | TaskGroup | None = None
    ) -> Any:
        """Wait for a task by name, and give its result or raise what it raised.

        Args:
            name: Its name, id or uid. Of a task that has ended, as long as it is remembered, if it
                was started by ``start_task``.
            timeout: Seconds, at least 0; None is without bound.
            group: Look in this very group alone, as for ``get_task``.

        Raises:
            TaskNotFoundError: No such task, or it has ended and its result was not kept.
            TimeoutError: It still runs after ``timeout``; it goes on running.
            asyncio.CancelledError: The task was cancelled.
            RuntimeError: It is the calling task, which would wait for itself.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``name`` is no string, or ``timeout`` no number.
            ValueError: ``timeout`` is negative.

        What else the task raised is raised here.

        Cancellation: of the caller leaves the task alone.
        """
        seconds = checked_seconds("timeout", timeout)
        caller = self._caller()
        task = self._lookup.task(name, group)
        if task is not None and task is caller:
            raise RuntimeError(
                f"task {name!r} cannot wait for itself: it would wait for ever; let another task do it"
            )
        if task is None:
            return self._lookup.kept_result(name, group).take()
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            raise TimeoutError(f"task {name!r} is still {task.status} after {timeout:g} s, and goes on")
        return task.result()

    def get_result(self, name: str, *, default: Any = NO_RESULT, group: str | TaskGroup | None = None) -> Any:
        """Give the result of a task that has completed, without waiting for it.

        Args:
            name: Its name, id or uid. Results are kept, as long as the task is remembered, of those that were
                started by ``start_task``.
            default: What to give where there is no result: the task is live, was cancelled, is not known,
                or its result was not kept. Left out, each of these raises.
            group: Look in this very group alone, as for ``get_task``.

        Raises:
            TaskNotFoundError: No such task, or it has ended and its result was not kept.
            asyncio.InvalidStateError: It has not ended yet.
            asyncio.CancelledError: It was cancelled.
            TypeError: ``name`` is no string.

        What the task raised is raised here, with a ``default`` too.

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
        """Wait until nothing is live in ``group`` (None: in the whole manager), the calling task aside.

        Args:
            group: The name of a labelled group, the name or id of a scoped one, or the group. In one that
                is not known nothing is live: no error, it returns at once.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``group`` is neither a name nor a group.
            ValueError: The group is another manager's.

        Cancellation: of the caller leaves the tasks alone.
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
    ) -> bool:
        """Cancel a task and wait until it has ended.

        Args:
            name: Its name, id or uid.
            reason: Noted with its cause.
            group: Look in this very group alone, as for ``get_task``.
            timeout: Seconds to wait for its end; None is without bound.

        Returns:
            True if it was asked and has ended by it. False if there is no live task of that
            name, if it completed all the same, or still runs when ``timeout`` is over.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``name`` is no string, or ``timeout`` no number.
            ValueError: ``timeout`` is negative.

        Cancellation: of the caller ends the waiting; the task stays cancelled.
        """
        seconds = checked_seconds("timeout", timeout)
        caller = self._caller()
        task = self._lookup.task(name, group)
        if task is None or task.done():
            return False
        task.cancel(reason)
        # A task that cancels itself ends at its next await, which is not to be here.
        return task is not caller and await wait_for_end([task], seconds) == 1

    async def cancel_group(
        self,
        group: str | TaskGroup,
        reason: str | None = None,
        *,
        grace: float = 0.0,
        timeout: float | None = 10.0,
    ) -> int:
        """Cancel all tasks of a group and of all below it, and wait for them together.

        Args:
            group: The name of a labelled group, the name or id of a scoped one, or the group. In one that
                is not known nothing is live: no error, nothing is cancelled.
            reason: Noted with each task's cause.
            grace: Seconds between the cancel event and the cancelling, at least 0.
            timeout: Seconds to wait for their end after that; None is without bound.

        Returns:
            How many have ended by it. What still runs after ``timeout`` is logged and stays listed.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``group`` is neither a name nor a group, or a duration no number.
            ValueError: The group is another manager's, or a duration negative.

        A task that somebody has cancelled before is not asked again, so that its clean-up is
        not torn; ``shutdown`` alone asks twice.

        Cancellation: of the caller ends the waiting, or the grace; the tasks are cancelled. The
        calling task is spared, and so is what awaits it.
        """
        return await cancel_groups(
            self._ledger, self._caller(), self._lookup.groups(group), reason, grace, timeout
        )

    async def cancel_all_tasks(
        self, reason: str | None = None, *, grace: float = 0.0, timeout: float | None = 10.0
    ) -> int:
        """Cancel every task of the manager; the parameters are those of ``cancel_group``.

        The manager stays usable.

        Raises:
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: A duration is no number.
            ValueError: A duration is negative.

        Cancellation: of the caller ends the waiting; the tasks stay cancelled.
        """
        return await cancel_groups(self._ledger, self._caller(), [self._root], reason, grace, timeout)

    async def shutdown(self, grace: float = 5.0, timeout: float | None = 10.0) -> ShutdownReport:
        """Refuse new tasks, let the live ones finish, cancel the rest, and report.

        It belongs to the running event loop: in another loop the manager is open.

        The cancel events are set first; what is still live after ``grace`` is cancelled by
        rising priority, the critical tasks last; what ignored that is cancelled once more.

        Args:
            grace: Seconds to finish in, at least 0. It waits for services only if they drain.
            timeout: Seconds for all that comes after, at least 0; None is without bound.

        Returns:
            What became of the tasks; also logged, if one would not stop.

        Raises:
            WrongLoopError: The manager has live tasks in another loop; it stays open.
            TypeError: A duration is no number.
            ValueError: A duration is negative.

        Cancellation: of the caller ends the waiting; the manager stays closed. The calling
        task is spared, and so is what awaits it.

        Telemetry: the spans of tasks that would not stop are ended as ``abandoned``.
        """
        return await self._shut_down(grace, timeout, f"shutdown(){_called_at()}")

    async def __aenter__(self) -> Self:
        """Open it, again if it was shut down."""
        # First: an entry that is refused leaves a closed manager closed.
        self._ledger.home.bind(asyncio.get_running_loop())
        if self._ledger.home.closed:
            self._ledger.reopen()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._shut_down(5.0, 10.0, f"the end of its async with block{_called_at()}")

    async def _shut_down(self, grace: float, timeout: float | None, by: str) -> ShutdownReport:
        return await shut_down(self._ledger, self._caller(), grace, timeout, by)

    def _caller(self) -> asyncio.Task[Any] | None:
        """The calling task, after a look whether this is the right loop to call from."""
        self._ledger.home.bind(asyncio.get_running_loop())
        return asyncio.current_task()


def _called_at() -> str:
    """Say which line of the user's code is calling, as in ``" in stop app.py:31"``; empty if none is."""
    at = calling_line()
    return "" if at is None else f" in {at}"
