"""TaskGroup: a node in the tree of work.

A *labeled* group is named by a string, created on first use, and open until shutdown; the dots in labels
nest them. A failure in it stays with its task. A *scoped* group is entered with ``async with``; at the end
of the block, it waits for its tasks and closes. A failing task cancels its siblings, and the block raises,
as in ``asyncio.TaskGroup``. A request's group is scoped, but has no block: the middleware opens, cancels,
and seals it.
"""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, TypeVarTuple, overload

from otel_tasks._core.awaiters import hosts_of, with_awaiters
from otel_tasks._core.causes import cause_elsewhere
from otel_tasks._core.checks import check_choice, check_count, check_flag, checked_name, checked_seconds
from otel_tasks._core.coroutines import check_coroutine, close_quietly, function_name, made_coroutine
from otel_tasks._core.creation import Creation
from otel_tasks._core.current import current_group_or_none, current_root, nearest_open, stand_in
from otel_tasks._core.events import CancelCause
from otel_tasks._core.options import (
    GroupOptions,
    NamedTaskOptions,
    Trace,
    check_option_names,
    check_options,
    named_as_one,
    with_options_of,
)
from otel_tasks._core.places import Limiter, checked_limiter
from otel_tasks._core.progress import add_up
from otel_tasks._core.retry import check_retried
from otel_tasks._core.scope import OnError, Scope
from otel_tasks._core.state import CancelKind, TaskPriority
from otel_tasks._core.task import ManagedTask, reported, request_cancel
from otel_tasks._core.telemetry import group_attributes, low_cardinality, start_group_span
from otel_tasks._core.tree import renew
from otel_tasks._core.waiting import wait_until_done
from otel_tasks.exceptions import GroupClosedError

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Collection, Coroutine, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    from otel_tasks._core.backoff import RetryPolicy
    from otel_tasks._core.binding import BoundRequest
    from otel_tasks._core.progress import GroupProgress
    from otel_tasks._core.tree import Ledger

T = TypeVar("T")

# By name: asking an enumeration for a member takes as long as calling a method, before Python 3.12.
_NORMAL = TaskPriority.NORMAL
Args = TypeVarTuple("Args")

_NAME_IT = 'name it after its work, such as "load"'


class Manager(Protocol):
    """The part of a ``TaskManager``, which stands above this module, that a group needs."""

    @property
    def _root(self) -> TaskGroup: ...


@named_as_one
class TaskGroup(Creation):
    """A group of tasks and of groups below it; with ``async with``, a drop-in for ``asyncio.TaskGroup``.

    Args:
        name: The group's name in traces; its id is the name and a number. None means ``"group"``.
        on_error: ``"cancel"``: a failing task cancels its siblings, and the block raises an
            ``ExceptionGroup``. ``"isolate"``: the failure is reported, and the other tasks continue.
        timeout: Seconds that the block may take, at least 0; then everything in it is cancelled, and it
            raises ``TimeoutError``. None means no limit.
        max_concurrency: How many of the group's tasks run at a time, at least 1; the others wait for a
            place, highest priority first. The manager's limit applies too. None means no limit.
        max_queue: How many tasks may wait for a place, at least 0; the next one is refused. None means no
            limit.
        span: Give the block a span of its own.
        trace: Whether its tasks start new traces, as for ``create_task``.
        manager: The manager of the tasks. None means the manager of the request or managed task that creates
            the group, or else the global manager.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``name`` is not valid, or an argument is out of its range.

    Cancellation: cancelling the task that runs the block cancels all tasks of the group; the cancellation
    propagates when they have ended.

    Telemetry: with ``span``, a span for the block; the spans of its tasks are below it.

    Example:
        >>> async with TaskGroup("load") as group:
        ...     first = group.create_task(fetch(1))
        ...     second = group.create_task(fetch(2))
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        on_error: OnError = "cancel",
        timeout: float | None = None,
        max_concurrency: int | None = None,
        max_queue: int | None = None,
        span: bool = False,
        trace: Trace | None = None,
        manager: Manager | None = None,
    ) -> None:
        root: TaskGroup = current_root() if manager is None else _root_of(manager)
        check_choice("on_error", on_error, OnError)
        label = "group" if name is None else checked_name("group", name, _NAME_IT)
        self._set_up(root._ledger, label, None)
        check_flag("span", span)
        self._scope = Scope(on_error, checked_seconds("timeout", timeout), span=span)
        self._scope.options = None if trace is None else GroupOptions(trace=trace)
        self._limit(checked_limiter(max_concurrency, max_queue))
        self._refuse("has not been entered")

    @classmethod
    def _labeled(cls, ledger: Ledger, name: str, parent: TaskGroup | None) -> TaskGroup:
        group = cls.__new__(cls)
        group._set_up(ledger, name, parent)
        group._become_label(name)
        return group

    # -- what it is -------------------------------------------------------------------------

    @property
    def parent(self) -> TaskGroup | None:
        """The group above; None for a manager's root."""
        return self._parent

    @property
    def progress(self) -> GroupProgress:
        """The progress that the tasks of this group and below it have reported, added up at each read."""
        past = [group._past_progress for group in self._below() if group._past_progress is not None]
        return add_up(map(reported, self._every_live()), past)

    @property
    def task_group(self) -> TaskGroup:
        """The group itself: a group can stand for the current group."""
        return self

    def _outward(self) -> Iterator[TaskGroup]:
        """This group and the groups around it, from the inside out."""
        group: TaskGroup | None = self
        while group is not None:
            yield group
            group = group._parent

    @property
    def _request(self) -> BoundRequest | None:
        group: TaskGroup | None = self
        while group is not None:
            if group._binding is not None:
                return group._binding._request
            group = group._parent
        return None

    def __repr__(self) -> str:
        state = self._refusal or ("is being cancelled" if self._cause is not None else "is open")
        return f"<TaskGroup {self.id!r} {state}, {len(self._live)} live tasks>"

    # -- tasks ------------------------------------------------------------------------------

    @with_options_of(Creation._create)
    def create_task_threadsafe(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        *,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> concurrent.futures.Future[T]:
        """Create a task in this group from another thread, as ``asyncio.run_coroutine_threadsafe`` does.

        Args:
            work: A coroutine, or a function that returns one; the function is called in the event loop.
            retry: As for ``create_task``; ``work`` must then be a function.
            **options: As for ``create_task``. The task runs in a copy of the context of the calling thread,
                and so belongs to its trace.

        Returns:
            A future that ends with the task. Its ``cancel()`` cancels the task. Do not wait for it in the
            loop's own
            thread: the task would never start.

        Raises:
            GroupClosedError: The group takes no new tasks.
            ManagerClosedError: The manager is shut down.
            WrongLoopError: The manager has not been used in an event loop yet, or that loop is closed.
            TypeError: ``work`` is neither a coroutine nor a function, or an option has the wrong type.
            ValueError: An option is out of its range.

        The future raises errors that only the loop can detect, such as a name that is taken. Every refusal
        closes the coroutine.

        Telemetry: as for ``create_task``; the span belongs to the trace of the calling thread.

        Example:
            >>> price = group.create_task_threadsafe(fetch_price(7)).result(timeout=5.0)
        """
        return self._hand_over(work, lambda _: self, retry, options)

    def _hand_over(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        where: Callable[[object], TaskGroup],
        retry: RetryPolicy | None,
        options: NamedTaskOptions,
    ) -> concurrent.futures.Future[T]:
        """Schedule the creation of a task in the loop, by the group that ``where`` returns there.

        Args:
            work: The coroutine, or a function that makes it in the loop.
            where: Called with the coroutine, which it closes if it raises.
            retry: As for ``create_task``.
            options: As for ``create_task``.
        """
        try:
            if not asyncio.iscoroutine(work) and not callable(work):
                raise TypeError(
                    "create_task_threadsafe() takes a coroutine, or a function that makes one, "
                    f"got {work!r}: write create_task_threadsafe(work(...)) with `async def work(...)`"
                )
            check_options("create_task_threadsafe", options)
            name = options.get("name") or function_name(work)
            if retry is not None:
                check_retried(work, retry, "create_task_threadsafe")
            loop = self._ledger.home.loop_for_others()
            if self._refusal is not None:
                self._raise_closed(name)
        except BaseException:
            close_quietly(work)
            raise

        def create(work: Any) -> ManagedTask[Any]:
            group, function = where(work), "create_task_threadsafe"
            coro = made_coroutine(group._retried(work, retry, function), function)
            return group.create_task(coro, **options)

        return self._ledger.threads.create_in_loop(loop, work, create)

    @with_options_of(Creation._create)
    def run_in_thread(
        self,
        function: Callable[[*Args], T],
        /,
        *args: *Args,
        abandon: bool = False,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task that calls a plain function in a thread of its own.

        The function runs in the task's context: ``current_task()``, ``current_group()``, and
        ``current_cancel_event()`` work in it, and its spans are below the task's span. At most
        ``max_threads`` functions of the manager work at a time; the others wait, highest priority first.

        Args:
            function: The function to call; ``functools.partial`` adds keyword arguments.
            *args: Its arguments.
            abandon: How the task ends when it is cancelled or its timeout expires. A thread cannot be
                stopped; in both cases, its cancel event is set. False: the task ends when the function has
                returned. True: the task ends immediately, and the thread runs on, listed in the log and in
                ``manager.abandoned_threads`` until it returns.
            retry: Which failures lead to another call of the function, and when. None means none.
            **options: As for ``create_task``.

        Returns:
            The task. After a cancellation, it ends as cancelled, even if the function then returns a value.
            If the function raises anything but CancelledError, the task fails.

        Raises:
            TypeError: ``function`` is not a plain function, or an option has the wrong type.
            GroupClosedError: The group takes no new tasks.
            ManagerClosedError: The manager is shut down.
            QueueFullError: No place is free, and no more tasks may wait.
            ValueError: An option is out of its range.

        Telemetry: as for ``create_task``.

        Example:
            >>> def resize(paths):
            ...     for path in paths:
            ...         if current_cancel_event().is_set():
            ...             return
            ...         shrink(path)
            >>> await group.run_in_thread(resize, paths, timeout=60.0)
        """
        check_option_names("run_in_thread", options)
        make = functools.partial(self._ledger.threads.coroutine, function, args, abandon=abandon)
        coro: Any = made_coroutine(self._retried(make, retry, "run_in_thread"), "run_in_thread")
        try:
            return self.create_task(coro, **options)
        except BaseException:
            close_quietly(coro)
            raise

    @overload
    async def put_task(
        self, coro: Coroutine[Any, Any, T], **options: Unpack[NamedTaskOptions]
    ) -> ManagedTask[T]: ...
    @overload
    async def put_task(
        self,
        coro: Callable[[], Coroutine[Any, Any, T]],
        *,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]: ...
    @with_options_of(Creation._create)
    async def put_task(
        self,
        coro: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        *,
        retry: RetryPolicy | None = None,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task; if the queue is full, wait for room first.

        ``put_task`` is to ``create_task`` what ``asyncio.Queue.put`` is to ``put_nowait``: it waits where
        ``create_task`` raises ``QueueFullError``. The parameters are the same.

        Args:
            coro: The coroutine to run; closed if the task is refused.
            retry: As for ``create_task``; ``coro`` is then a function that makes the coroutine.
            **options: As for ``create_task``.

        Returns:
            The task, which may still wait for a place.

        Raises:
            GroupClosedError: The group takes no new tasks, or stopped taking them during the wait.
            ManagerClosedError: The manager is shut down, or was shut down during the wait, and the caller is
                not one of its tasks.
            WrongLoopError: The manager has live tasks in another loop.
            TypeError: ``coro`` is not a coroutine, or an option has the wrong type.
            ValueError: An option is out of its range.

        Cancellation: cancelling the caller during the wait closes ``coro``; no task is created. A shutdown
        cancels a managed task that calls this, without waiting for its grace: it will never have room.

        Telemetry: as for ``create_task``.

        Example:
            >>> for url in urls:
            ...     await group.put_task(fetch(url))
        """
        try:
            check_option_names("put_task", options)
            coro = self._retried(coro, retry, "put_task")
            check_coroutine(coro, "put_task")
            self._end_producer()
            await self._room()
            self._end_producer()
            return self.create_task(coro, **options)
        except BaseException:
            close_quietly(coro)
            raise
        finally:
            # Room that this call did not use is for the next producer in line.
            self._ledger.places.wake_producer()

    def _end_producer(self) -> None:
        """Cancel the calling task if it is one of this manager's, and the manager is shutting down.

        It would fail with ``ManagerClosedError``, which says nothing that the cancellation does not. Other
        tasks get that error: nothing cancels them.
        """
        home = self._ledger.home
        if not home.is_closing:
            return
        task = asyncio.current_task()
        if isinstance(task, ManagedTask) and task._group._ledger is self._ledger:
            cause = self._ledger.root.cancel_event.cause or CancelCause.make(CancelKind.SHUTDOWN)
            request_cancel(task, cause)
            raise asyncio.CancelledError(str(cause))

    @property
    def max_concurrency(self) -> int | None:
        """How many of the group's tasks run at a time; can be changed while they run. None means no limit.

        A lower limit stops no running task: it takes effect as tasks end.

        Raises:
            ValueError: The new limit is neither None nor a whole number of at least 1.
        """
        return None if self._limiter is None else self._limiter.limit

    @max_concurrency.setter
    def max_concurrency(self, limit: int | None) -> None:
        check_count("max_concurrency", limit, 1)
        self._set_limit(limit, None if self._limiter is None else self._limiter.max_queue)

    def _configure(self, options: GroupOptions) -> None:
        """Set the options of a labeled group."""
        self._set_options(options)
        if options.max_concurrency is not None:
            self._set_limit(options.max_concurrency, options.max_queue)

    def _set_limit(self, limit: int | None, max_queue: int | None) -> None:
        limiter = self._limiter or Limiter(None, None)
        if self._limiter is None:
            self._limit(limiter)
            self._count_for(limiter, before=True)
        # An empty labeled group is forgotten, unless it has a limit.
        self._ledger.places.limited.discard(self)
        if limit is not None and not self.scoped:
            self._ledger.places.limited.add(self)
        self._ledger.places.change_limit(limiter, limit, max_queue)

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
        """Create a scoped group below this one, to be entered with ``async with``.

        Args:
            name: The group's name in traces.
            on_error: What a failing task does to its siblings, as for ``TaskGroup``.
            timeout: Seconds that the block may take, at least 0. None means no limit.
            max_concurrency: How many of its tasks run at a time, at least 1. A limit of this group does not
                apply to them. None means no limit.
            max_queue: How many tasks may wait for a place, at least 0. None means no limit.
            span: Give the block a span of its own.
            trace: Whether its tasks start new traces, as for ``create_task``.

        Returns:
            The group, to be entered once.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: ``name`` is not valid, or an argument is out of its range.

        Example:
            >>> async with group.group("pages") as pages:
            ...     pages.create_task(fetch(1))
        """
        group = TaskGroup(
            name,
            on_error=on_error,
            timeout=timeout,
            max_concurrency=max_concurrency,
            max_queue=max_queue,
            span=span,
            trace=trace,
        )
        group._hang_below(self)
        return group

    def cancel(self, reason: str | None = None) -> None:
        """Cancel everything that is live in this group and below it, without waiting.

        The block of a scoped group is left without an exception, and the group takes no new tasks from now
        on. A labeled group stays usable. If the calling task is one of the group's, it is cancelled too;
        ``manager.cancel_group`` spares it, and waits. In another thread, the call is passed to the loop,
        which cancels in its next iteration.

        Args:
            reason: Recorded with the cause of each task.

        Telemetry: the span of each task records the cause and names the current span.

        Example:
            >>> group.cancel("not needed anymore")
        """
        loop = self._ledger.home.elsewhere()
        if loop is None:
            self._cancel_all(CancelCause.make(CancelKind.EXPLICIT, reason))
            return
        with suppress(RuntimeError):  # The loop is closed: nothing in it can be cancelled.
            loop.call_soon_threadsafe(self._cancel_all, cause_elsewhere(loop, reason))

    def _cancel_all(self, cause: CancelCause) -> None:
        announced = self._signal_cancel(cause)
        self._cancel_tasks(cause)
        if self._scope is not None:
            self._scope.cancel_body(cause)
        renew(announced, cause)

    async def join(self) -> None:
        """Wait until no task is live in this group and below it.

        It ignores the calling task and the tasks that await it. It does not raise the exceptions of the
        tasks; each is reported as usual.

        Cancellation: cancelling the caller ends the wait; the tasks continue.

        Example:
            >>> await group.join()
        """
        # Find the awaiters again in each round: two tasks that join each other would wait forever if the
        # second joined later.
        while live := self._live_without(with_awaiters(asyncio.current_task())):
            await wait_until_done(live)

    def _live_without(self, spared: Collection[asyncio.Future[Any]]) -> list[ManagedTask[Any]]:
        return [task for task in self._every_live() if task not in spared]

    # -- async with -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Enter the block: the group opens below its parent, or in the group around it.

        Raises:
            RuntimeError: The group is open, was entered before, or is not entered in a task.
            GroupClosedError: The group that it was created below is not open.
            ManagerClosedError: The manager is shut down.
            WrongLoopError: The manager has live tasks in another loop.

        Cancellation: it never waits.
        """
        scope = self._scope
        if scope is None:
            raise RuntimeError(
                f"group {self.id!r} is already open and cannot be entered: "
                'write async with manager.group("name")'
            )
        if scope.entered:
            raise RuntimeError(f"group {self.id!r} has already been entered: make a new one for each block")
        host = asyncio.current_task()
        if host is None:
            raise RuntimeError(f"group {self.name!r} cannot determine the parent task: enter it in a task")
        ledger = self._ledger
        loop = ledger.home.enter()
        parent = None if self._parent is None else stand_in(self._parent)
        if parent is not None and parent.scoped and not parent._linked:
            state = "is finished" if parent._number else "has not been entered"
            raise GroupClosedError(
                f"group {self.name!r} cannot be entered: the group above it, {parent.id!r}, {state}; "
                "enter it inside the block of that group"
            )
        scope.outer = outer = ledger.hosts.get(host)
        ledger.hosts[host] = self
        # A cause inherited from above does not cancel the body: the host of the group above decides.
        cancelled_before = self._cause
        self._open(self._place(outer))
        if scope.options is not None:
            self._set_options(scope.options)
        if scope.wants_span:
            self._start_span()
        scope.enter(self, host, loop)
        if cancelled_before is not None:
            scope.cancel_body(cancelled_before)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        # Not `bool`: type checkers would then assume that every block may swallow an exception.
        """Wait for the tasks and the groups below, and close the group.

        Raises:
            RuntimeError: The group has not been entered.
            BaseExceptionGroup: Tasks failed, or the body raised.
            TimeoutError: The block's ``timeout`` expired.

        Cancellation: cancels all tasks of the group; it propagates when they have ended.
        """
        scope = self._scope
        if scope is None or scope.host is None:
            raise RuntimeError(f"group {self.id!r} has not been entered: use it with async with")
        try:
            return await scope.leave(self, exc)
        finally:
            self._close(scope, scope.host)
            # See `leave`.
            del exc, traceback

    def _close(self, scope: Scope, host: asyncio.Task[Any]) -> None:
        ledger = self._ledger
        if ledger.hosts.get(host) is self:
            del ledger.hosts[host]
            if scope.outer is not None and scope.outer._linked:
                ledger.hosts[host] = scope.outer
        scope.close()
        ledger.options.pop(self, None)
        self._refuse("is finished")
        self._sealed = True
        self._leave_tree()
        ledger.places.wake_producer()

    def _place(self, outer: TaskGroup | None) -> TaskGroup:
        """Return the group below which the block runs: the one it was created for, or the one around it."""
        if self._parent is not None:
            return stand_in(self._parent)
        return self._surroundings() if outer is None else nearest_open(outer)

    def _surroundings(self) -> TaskGroup:
        """Return the current group if it is this manager's and not over, or else the manager's root."""
        group: TaskGroup | None = current_group_or_none()
        if group is None or group._ledger is not self._ledger or (group.scoped and not group._linked):
            return self._ledger.root
        return group

    def _start_span(self) -> None:
        tracer = self._ledger.telemetry.tracer()
        if tracer is None:
            return
        attributes = group_attributes(self._labels(), self._ledger.name)
        try:
            self._span = start_group_span(tracer, low_cardinality(self.name), attributes, self._span)
            self._owns_span = True
        except Exception:
            self._ledger.log_once("starting a span for group %r raised", self.id)


@hosts_of.register(ManagedTask)
def _hosts_of(task: ManagedTask[Any]) -> Iterator[asyncio.Future[Any]]:
    if task._extras is not None and task._extras.supervisor is not None:
        yield task._extras.supervisor
    for group in task._group._outward():
        if group._host is not None:
            yield group._host
        if group._scope is not None and group._scope.host is not None:
            yield group._scope.host


def _root_of(manager: Manager) -> TaskGroup:
    root = getattr(manager, "_root", None)
    if not isinstance(root, TaskGroup):
        raise TypeError(f"manager must be a TaskManager, got {manager!r}: leave it out for the current one")
    return root
