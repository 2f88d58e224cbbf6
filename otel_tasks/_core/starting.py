"""Starting: how a manager starts work, in its root or in a group of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, overload

from otel_tasks._core.checks import checked_name
from otel_tasks._core.consumer import Drain, make_consumer
from otel_tasks._core.coroutines import check_factory, close_quietly, made_coroutine
from otel_tasks._core.group import TaskGroup
from otel_tasks._core.handling import Handling
from otel_tasks._core.options import with_options_of
from otel_tasks._core.periodic import Overlap, Periodic, start_periodic
from otel_tasks._core.retry import check_retried
from otel_tasks._core.service import DEFAULT_POLICY, check_repeatable, start_supervisor
from otel_tasks._core.state import TaskPriority
from otel_tasks._core.task import extras_of

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from contextvars import Context
    from typing import Unpack

    from otel_tasks._core.backoff import RestartPolicy, RetryPolicy
    from otel_tasks._core.critical import OnGiveUp
    from otel_tasks._core.lookup import Lookup
    from otel_tasks._core.options import NamedTaskOptions, OnConflict, RetriedTaskOptions, TaskOptions, Trace
    from otel_tasks._core.source import Queue
    from otel_tasks._core.task import ManagedTask

T = TypeVar("T")
Item = TypeVar("Item")
Args = TypeVarTuple("Args")


class Starting:
    """The part of a manager that starts work."""

    # The manager sets both.
    _root: TaskGroup
    _lookup: Lookup

    @overload
    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[TaskOptions],
    ) -> ManagedTask[T]: ...
    @overload
    def create_task(
        self,
        coro: Callable[[], Coroutine[Any, Any, T]],
        *,
        retry: RetryPolicy,
        name: str | None = None,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[TaskOptions],
    ) -> ManagedTask[T]: ...
    @overload
    def create_task(
        self,
        coro: Callable[[], Coroutine[Any, Any, T]],
        *,
        group: str | TaskGroup,
        retry: RetryPolicy | None = None,
        name: str | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[TaskOptions],
    ) -> ManagedTask[T]: ...
    @with_options_of(TaskGroup._create)
    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        *,
        name: str | None = None,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[RetriedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task; like ``asyncio.create_task``, it runs from the next iteration of the event loop.

        ``help(otel_tasks)`` shows where a task goes, and what ends it, for each way to start one.

        Args:
            coro: The coroutine to run; closed if the task is refused. With ``retry``, a function that makes
                the coroutine of each attempt; it is called for the first one now.
            name: Unique among the live tasks, at most 200 characters, without ``#`` and control characters.
                None means the function's name, with a number if that name is taken.
            group: A labeled group, created on first use (dots nest: ``"ingest.fetch"``), or a group object.
                None means the manager's root, never the current group; the function ``create_task`` uses
                that one.
            priority: How urgent the task is.
            timeout: Seconds from now, at least 0, after which the task is cancelled and fails with
                ``TimeoutError``. None means no limit.
            queue_timeout: Seconds, at least 0, that the task may wait for a place under ``max_concurrency``;
                after that, it fails with ``TimeoutError`` and never runs. None means no limit.
            metadata: Kept with the task and its record, never put on spans.
            on_conflict: What happens if a live task has the name: ``"suffix"`` adds a number, ``"error"``
                raises, ``"return"`` returns the live task, ``"replace"`` cancels it and starts the new one
                when it has ended.
            trace: ``"new"`` starts a new trace, linked to the current span; ``"child"`` makes the task's span
                its child. None means what the group or the manager sets, or else ``"child"``, and in a
                service ``"new"``, because the trace of a service may have no end.
            context: The context to run in; None means a copy of the current one. With tracing, the task runs
                in a copy of ``context``.
            eager_start: Run the first step now (Python 3.12; ignored before). None means the manager's
                setting, or True if the loop's task factory starts tasks eagerly.
            retry: Which failures lead to another attempt, and when. The task holds no place while it backs
                off. ``timeout`` covers all attempts, and ``queue_timeout`` the wait for the first place. None
                means one attempt.

        Returns:
            The task; with ``on_conflict="return"``, possibly a live one.

        Raises:
            TaskExistsError: The name is taken and ``on_conflict`` is ``"error"``.
            ManagerClosedError: The manager is shut down.
            GroupClosedError: ``group`` takes no new tasks.
            QueueFullError: No place is free, and no more tasks may wait.
            WrongThreadError: No event loop runs in this thread.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``coro`` is not a coroutine, or an option has the wrong type.
            ValueError: A name is not valid, an option is out of its range, or ``group`` belongs to another
                manager.

        Telemetry: a span named after the task, from now to the task's end.

        Example:
            >>> task = manager.create_task(send_mail(user), group="mail")
        """
        where = self._root if group is None else self._lookup.group(group, coro)
        return where._create_task(coro, name, priority, options)

    def _create_made(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        retry: RetryPolicy | None,
        group: str | TaskGroup | None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task of a function that makes its coroutine, with the policy of the call or the group."""
        where = self._root if group is None else self._lookup.group(group)
        return where.create_task(made_coroutine(where._retried(work, retry)), **options)

    @with_options_of(TaskGroup._create)
    def create_task_threadsafe(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        *,
        group: str | TaskGroup | None = None,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> concurrent.futures.Future[T]:
        """Create a task from another thread; see ``TaskGroup.create_task_threadsafe``.

        Args:
            work: A coroutine, or a function that returns one; the function is called in the event loop.
            group: As for ``create_task``.
            retry: As for ``create_task``.
            **options: As for ``create_task``.

        Returns:
            A future that ends with the task; its ``cancel()`` cancels the task.

        Raises:
            GroupClosedError: ``group`` takes no new tasks.
            ManagerClosedError: The manager is shut down.
            WrongLoopError: The manager has not been used in an event loop yet, or that loop is closed.
            TypeError: ``work`` is neither a coroutine nor a function, or an option has the wrong type.
            ValueError: An option is out of its range, or ``group`` belongs to another manager.

        Telemetry: as for ``create_task``; the span belongs to the trace of the calling thread.

        Example:
            >>> manager.create_task_threadsafe(send_mail(user), group="mail").result(timeout=5.0)
        """
        if isinstance(group, str):
            # The label is looked up, or created, in the loop.
            return self._root._hand_over(work, lambda coro: self._lookup.group(group, coro), retry, options)
        where = self._root if group is None else self._lookup.group(group, work)
        return where.create_task_threadsafe(work, retry=retry, **options)

    @with_options_of(TaskGroup._create)
    def run_in_thread(
        self,
        function: Callable[[*Args], T],
        /,
        *args: *Args,
        group: str | TaskGroup | None = None,
        abandon: bool = False,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task that calls a plain function in a thread; see ``TaskGroup.run_in_thread``.

        Args:
            function: The function to call.
            *args: Its arguments.
            group: As for ``create_task``.
            abandon: True ends a cancelled task at once, and its thread runs on; False waits for the
                function.
            retry: Which failures lead to another call of the function, and when. None means none.
            **options: As for ``create_task``.

        Returns:
            The task; its result is what the function returns.

        Raises:
            GroupClosedError: ``group`` takes no new tasks.
            ManagerClosedError: The manager is shut down.
            QueueFullError: No place is free, and no more tasks may wait.
            TypeError: ``function`` is not a plain function, or an option has the wrong type.
            ValueError: An option is out of its range, or ``group`` belongs to another manager.

        Telemetry: as for ``create_task``; spans of the function are below the task's span.

        Example:
            >>> task = manager.run_in_thread(render, page, group="render", timeout=30.0)
        """
        where = self._root if group is None else self._lookup.group(group, function)
        return where.run_in_thread(function, *args, abandon=abandon, retry=retry, **options)

    @overload
    async def put_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        group: str | TaskGroup | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]: ...
    @overload
    async def put_task(
        self,
        coro: Callable[[], Coroutine[Any, Any, T]],
        *,
        retry: RetryPolicy,
        group: str | TaskGroup | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]: ...
    @overload
    async def put_task(
        self,
        coro: Callable[[], Coroutine[Any, Any, T]],
        *,
        group: str | TaskGroup,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]: ...
    @with_options_of(TaskGroup._create)
    async def put_task(
        self,
        coro: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        *,
        group: str | TaskGroup | None = None,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task; if the queue is full, wait for room first.

        ``put_task`` is to ``create_task`` what ``asyncio.Queue.put`` is to ``put_nowait``: it waits where
        ``create_task`` raises ``QueueFullError``. The parameters are the same.

        Args:
            coro: The coroutine to run; closed if the task is refused.
            group: As for ``create_task``.
            retry: As for ``create_task``.
            **options: As for ``create_task``.

        Returns:
            The task, which may still wait for a place.

        Raises:
            GroupClosedError: The group takes no new tasks, or stopped taking them during the wait.
            ManagerClosedError: The manager is shut down, or was shut down during the wait, and the caller is
                not one of its tasks.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``coro`` is not a coroutine, or an option has the wrong type.
            ValueError: An option is out of its range, or ``group`` belongs to another manager.

        Cancellation: cancelling the caller during the wait closes ``coro``; no task is created. A shutdown
        cancels a managed task that calls this, without waiting for its grace: it will never have room.

        Telemetry: as for ``create_task``.

        Example:
            >>> for url in urls:
            ...     await manager.put_task(fetch(url), group="crawl")
        """
        where = self._root if group is None else self._lookup.group(group, coro)
        return await where.put_task(coro, retry=retry, **options)  # type: ignore[arg-type]  # a function is refused

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
        trace: Trace | None = None,
        context: Context | None = None,
        eager_start: bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> ManagedTask[T]:
        """Start a task by name and keep its result with its record, for ``wait_for_task``.

        Args:
            name: Unique among the live tasks.
            factory: Returns the coroutine: ``lambda: work(1)``, or the coroutine function itself. It can
                also be a coroutine. A factory is not called if the task is refused.
            group: As for ``create_task``.
            priority: How urgent the task is.
            timeout: Seconds from the task's creation after which it is cancelled. None means no limit.
            queue_timeout: Seconds that the task may wait for a place. None means no limit.
            metadata: Kept with the task and its record.
            on_conflict: As for ``create_task``, except that the default is ``"error"``.
            cancel_existing: The same as ``on_conflict="replace"``.
            trace: As for ``create_task``.
            context: The context to run in.
            eager_start: As for ``create_task``.
            retry: As for ``create_task``; ``factory`` must then be a function.

        Returns:
            The live task. ``start_task`` does not wait for its end.

        Raises:
            TaskExistsError: A live task has the name, and ``on_conflict`` is ``"error"``.
            GroupClosedError: ``group`` takes no new tasks.
            ManagerClosedError: The manager is shut down.
            QueueFullError: No place is free, and no more tasks may wait.
            WrongLoopError: The manager has live tasks in another loop.
            RuntimeError: The calling task is the one to replace.
            TypeError: ``factory`` does not return a coroutine, or an option has the wrong type.
            ValueError: ``name`` is not valid, an option is out of its range, or ``group`` belongs to another
                manager.

        It also raises what ``factory`` raises.

        Cancellation: cancelling the caller while it waits for the end of the task to replace starts no new
        task; the old task stays cancelled. A shutdown during that wait cancels a caller that is one of the
        manager's tasks.

        Telemetry: as for ``create_task``.

        Example:
            >>> await manager.start_task("import", lambda: run_import(file))
            >>> await manager.wait_for_task("import")
        """
        if cancel_existing:
            on_conflict = "replace"
        try:
            checked_name("task", name, 'name it after its work, as in start_task("import", work)')
            if retry is not None:
                check_retried(factory, retry, "start_task")
            where = self._root if group is None else self._lookup.group(group)
            if on_conflict == "replace":
                check_factory(factory)
                await where._clear_name(name, f"replaced by a new task {name!r}")
                # The manager may have been shut down during the wait.
                where._end_producer()
            where._admit(name, on_conflict)
            if on_conflict == "return" and (taken := where._holder(name)) is not None:
                close_quietly(factory)
                return taken
            coro = made_coroutine(where._retried(factory, retry, "start_task"))
            return where._open_group()._create(
                coro,
                name,
                priority,
                timeout,
                queue_timeout,
                metadata,
                on_conflict,
                trace,
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
        on_give_up: OnGiveUp | None = None,
        critical: bool = False,
    ) -> ManagedTask[T]:
        """Start long-running work, and restart it with exponential backoff and jitter when it fails.

        The returned task supervises the attempts. Each attempt is a task of its own: ``prices#1``,
        ``prices#2``. The supervising task has no span and takes no place under ``max_concurrency``; the
        attempts do both.

        Args:
            name: Unique among the live tasks.
            factory: Returns the coroutine of each attempt: ``lambda: work(1)``, or the coroutine function
                itself. It runs in a copy of the context that is current now.
            restart: Which ends count as failures, how long to wait after one, and when to give up.
            group: A labeled group, by its name or as an object. None means the manager's root.
            priority: How urgent the service and its attempts are. By default, a shutdown cancels them last.
            metadata: Kept with the service and with each attempt.
            on_conflict: As for ``start_task``; ``"replace"`` starts the new service when the old one has
                ended.
            drains: True for a service that ends on its own when ``current_cancel_event()`` is set; the grace
                of a shutdown then waits for it. A service that does not drain is not awaited: it would make
                every shutdown last its whole grace.
            on_give_up: Called with the snapshot and the exception of the service when it gives up.
            critical: True for a service that the application cannot do without: when it gives up, the manager
                shuts down, and ``run()`` ends with exit code 1. ``failed_services`` lists services that gave
                up.

        Returns:
            The service. It returns what its last attempt returned. It ends cancelled if something cancels an
            attempt. After giving up, it fails with the last failure.

        Raises:
            TaskExistsError: A live task has the name.
            ManagerClosedError: The manager is shut down.
            ValueError: ``group`` is a scoped group, which ends before a service does, or an argument is not
                valid.
            TypeError: ``factory`` cannot be called repeatedly, or ``restart`` is not a policy.

        Each failure is logged as a warning that announces the next attempt. The last failure is the
        service's own, and is reported like that of any task. During a shutdown nothing is restarted, and
        unless ``drains`` is set, the service is cancelled after all other tasks have ended.

        Cancellation: cancelling the caller while it waits for the end of the service to replace starts no
        new service; the old one stays cancelled. Cancelling the service cancels its attempt, for the same
        cause.

        Telemetry: a span for each attempt, in a trace of its own, linked to the attempt before it
        (``restart_of``); the first one is linked to the current span. A task that an attempt starts has a
        trace of its own too, linked to the attempt, unless its ``trace`` is ``"child"``.

        Example:
            >>> await manager.start_service("prices", refresh_prices, restart=RestartPolicy(max_delay=30))
        """
        where = self._root if group is None else self._lookup.group(group, factory)
        return await start_supervisor(
            where,
            name,
            factory,
            restart,
            priority,
            metadata,
            on_conflict,
            drains=drains,
            on_give_up=on_give_up,
            critical=critical,
        )

    async def start_periodic(
        self,
        name: str,
        factory: Callable[[], Coroutine[Any, Any, object]],
        *,
        every: float,
        jitter: float = 0.0,
        start: float = 0.0,
        overlap: Overlap = "skip",
        max_failures: int | None = None,
        timeout: float | None = None,
        group: str | TaskGroup | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "error",
    ) -> ManagedTask[None]:
        """Run a function at a fixed rate; each run is a task of its own: ``refresh#1``, ``refresh#2``.

        The times do not drift: they are multiples of ``every`` after the first run, on the loop's clock.
        Times that pass while the loop is held up are skipped. For calendar times ("each weekday at 6"), let a
        cron library compute the time of the next run.

        Args:
            name: Unique among the live tasks.
            factory: Returns the coroutine of each run: ``lambda: refresh(1)``, or the coroutine function
                itself. It runs in a copy of the context that is current now.
            every: Seconds from one run to the next, above 0.
            jitter: The most seconds by which each run starts late, chosen at random; at least 0 and at most
                ``every``. It spreads the runs of many processes.
            start: Seconds until the first run, at least 0.
            overlap: What happens if a run is live when the next one is due. ``"skip"``: that one does not
                run. ``"wait"``: it starts when the live one has ended; only one waits.
                ``"cancel_previous"``: the live one is cancelled first.
            max_failures: How many runs in a row may fail, at least 1; then the periodic task fails. None
                means that it goes on whatever its runs do.
            timeout: Seconds for each run, at least 0. None means no limit.
            group: A labeled group, by its name or as an object. None means the manager's root.
            priority: How urgent the periodic task and its runs are.
            metadata: Kept with the periodic task and with each run.
            on_conflict: As for ``start_task``; ``"replace"`` starts the new periodic task when the old one
                has ended.

        Returns:
            The periodic task, whose ``info().periodic`` has the last and the next run. It goes on until it is
            cancelled, the manager shuts down, or ``max_failures`` runs in a row have failed.

        Raises:
            TaskExistsError: A live task has the name.
            ManagerClosedError: The manager is shut down.
            ValueError: ``group`` is a scoped group, or an argument is out of its range.
            TypeError: ``factory`` cannot be called repeatedly, or an argument has the wrong type.

        A failed run is reported like any failure that nobody awaits. At a shutdown, no further run starts,
        and the live one has its grace.

        Cancellation: cancelling the caller while it waits for the end of the task to replace starts no new
        one. Cancelling the periodic task cancels its run, for the same cause.

        Telemetry: a span for each run, in a trace of its own, linked to the run before it (``previous_run``).

        Example:
            >>> await manager.start_periodic("refresh", refresh_prices, every=60.0, jitter=5.0)
        """
        where = self._root if group is None else self._lookup.group(group, factory)
        check_repeatable(factory, "start_periodic", "periodic work runs many times")
        checked_name("periodic task", name, 'name it after its work, as in start_periodic("refresh", work)')
        periodic = Periodic(
            where,
            factory,
            every=every,
            jitter=jitter,
            start=start,
            overlap=overlap,
            max_failures=max_failures,
            timeout=timeout,
            priority=priority,
            metadata=metadata,
        )
        return await start_periodic(where, name, periodic, on_conflict)

    async def start_consumer(
        self,
        name: str,
        source: Queue[Item] | Callable[[], Awaitable[Item]],
        handle: Callable[[Item], Coroutine[Any, Any, object]],
        *,
        concurrency: int = 8,
        prefetch: int = 0,
        drain: Drain = "running",
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        priority: TaskPriority | int | Callable[[Item], TaskPriority | int] = TaskPriority.NORMAL,
        metadata: Mapping[str, Any] | Callable[[Item], Mapping[str, Any]] | None = None,
        on_failure: Callable[[Item, Exception], object] | None = None,
        restart: RestartPolicy = DEFAULT_POLICY,
        critical: bool = False,
        on_give_up: OnGiveUp | None = None,
        on_conflict: OnConflict = "error",
    ) -> ManagedTask[None]:
        """Take items from a queue and run each as a task; at a shutdown, drain or hand back what is in hand.

        Each item is a task in the labeled group of the consumer's name, called after ``handle``. An item is
        taken only when it can run at once, so the backlog stays in the queue. With ``prefetch``, that many
        more wait in the group, where ``priority`` decides which one is next.

        The consumer calls ``task_done()`` once for each item that is finished: handled, failed for good, or
        cancelled by anything but a shutdown. ``handle`` must not call it. An item that a shutdown cancels is
        handed back instead, with ``put_nowait()``, to the end of the queue. This counts it as unfinished
        again before the first take is marked as done, so ``queue.join()`` goes on waiting for it.

        Args:
            name: The name of the consumer, unique among the live tasks, and of the group of its items.
            source: An ``asyncio.Queue``, another object with a coroutine function ``get()``, or a coroutine
                function that returns the next item, such as ``kafka.getone``. ``task_done()`` and
                ``put_nowait()`` are called if the object has them. ``queue.shutdown()`` (Python 3.13) ends
                the consumer: it returns when its items have ended.
            handle: A coroutine function that takes an item.
            concurrency: How many items run at a time, at least 1. The manager's limit applies too. Tasks that
                a handler starts are in the same group, and do not count.
            prefetch: How many more items may wait for a place, at least 0. An item that backs off between
                attempts gives up its place and stays in hand: at most ``concurrency + prefetch`` items are.
            drain: What the grace of a shutdown is for. ``"running"``: for the running items; those that wait
                are handed back at once. ``"queued"``: also for the waiting ones, and for as many more as were
                in the queue when the shutdown began. ``"all"``: for everything, until the queue is empty and
                no task of the manager runs that may fill it; services that run forever do not count.
            retry: As for ``create_task``, for each item. A shutdown ends the wait between two attempts.
            timeout: Seconds for each item, as for ``create_task``, at least 0. None means no limit.
            priority: That of each item, or a function that returns it for an item.
            metadata: That of each item, or a function that returns it for an item.
            on_failure: Called with the item and the exception when an item has failed for good. A coroutine
                function runs in a task in the same group, and the item is finished when that has ended. If it
                raises, that is logged. None: the failure is reported like any that nobody awaits. A
                ``CancelledError`` that no request caused is a failure, too.
            restart: What happens when ``source`` raises, as for ``start_service``. Items in hand go on.
            critical: As for ``start_service``.
            on_give_up: As for ``start_service``.
            on_conflict: As for ``start_service``.

        Returns:
            The consumer, a service, whose ``info().consumer`` counts the items.

        Raises:
            TaskExistsError: A live task has the name.
            ManagerClosedError: The manager is shut down.
            ValueError: An argument is not valid, the group has another ``max_concurrency``, or ``source`` is
                not a queue that can be drained.
            TypeError: ``source`` or ``handle`` has the wrong type, or another argument has.

        At the end of a shutdown, one warning lists what is left behind: items that were handed back, the
        number of those in the queue, and items that are not acknowledged, because their source does not take
        them back.

        Cancelling the consumer stops it from taking items, and it ends when the items in hand have ended;
        a second cancellation ends it immediately. ``cancel_group(name)`` cancels the items too.

        Cancellation: cancelling the caller while it waits for the end of the consumer to replace starts no
        new one; the old one stays cancelled.

        Telemetry: a span for each item, in a trace of its own, linked to the attempt of the consumer that has
        taken it (``spawned_by``). The span of ``on_failure`` is linked to that of the item (``failure_of``).

        Example:
            >>> await manager.start_consumer("jobs", queue, handle, concurrency=8, drain="all")
        """
        handling = Handling(handle, retry, timeout, priority, metadata, on_failure)
        consumer = make_consumer(self._lookup.label, name, source, handling, concurrency, prefetch, drain)
        task = await start_supervisor(
            consumer.group,
            name,
            consumer.run,
            restart,
            TaskPriority.CRITICAL,
            None,
            on_conflict,
            drains=True,
            on_give_up=on_give_up,
            critical=critical,
            consumer=consumer,
        )
        if extras_of(task).supervision is consumer:
            consumer.started(task)
        return task

    def trigger(self, name: str, *, group: str | TaskGroup | None = None) -> bool:
        """Run periodic work now, out of turn; the times of its other runs stay as they are.

        Args:
            name: The name of the periodic task.
            group: Look in this group alone. None searches the whole manager.

        Returns:
            True if a run starts, at once or as ``overlap`` says; False if ``"skip"`` drops it, because a run
            is live, or if the periodic task is being cancelled.

        Raises:
            TaskNotFoundError: No live task has the name.
            TypeError: The task is not a periodic one.
            WrongThreadError: Called in another thread than that of the loop.

        Example:
            >>> manager.trigger("refresh")
        """
        task = self._lookup.task(name, group)
        if task is None:
            raise self._lookup.not_found(name, group, "start it again with start_periodic()")
        periodic = None if task._extras is None else task._extras.supervision
        if not isinstance(periodic, Periodic):
            raise TypeError(f"trigger() takes the name of periodic work, and {task.id!r} is another task")
        self._root._ledger.home.enter()
        return not task.cancelling() and periodic.trigger()
