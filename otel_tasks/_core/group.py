"""TaskGroup: a node in the tree of work.

*Labelled* groups are named by a string, made on first use, nest by the dots in their names and
stay open until shutdown; a failure in one is its task's own. *Scoped* groups are entered with
``async with``, joined and then closed; they cancel their siblings and raise, as asyncio's do.
A request's group is scoped too, but no block: the middleware opens, cancels and seals it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, TypeVarTuple

from otel_tasks._core.awaiters import hosts_of, with_awaiters
from otel_tasks._core.checks import check_choice, check_count, check_flag, checked_name, checked_seconds
from otel_tasks._core.coroutines import check_coroutine, close_quietly
from otel_tasks._core.creation import Creation
from otel_tasks._core.current import current_group_or_none, current_root, nearest_open, stand_in
from otel_tasks._core.events import CancelCause
from otel_tasks._core.options import NamedTaskOptions, with_options_of
from otel_tasks._core.places import Limiter, checked_limiter
from otel_tasks._core.progress import add_up
from otel_tasks._core.scope import OnError, Scope
from otel_tasks._core.state import CancelKind, TaskPriority
from otel_tasks._core.task import ManagedTask, cause_elsewhere, reported
from otel_tasks._core.telemetry import GROUP_ID, GROUP_NAME, MANAGER_NAME, low_cardinality, start_group_span
from otel_tasks._core.tree import renew
from otel_tasks._core.waiting import wait_until_done
from otel_tasks.exceptions import GroupClosedError

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Collection, Coroutine, Iterator
    from types import TracebackType
    from typing import Self, Unpack

    from otel_tasks._core.binding import BoundRequest
    from otel_tasks._core.progress import GroupProgress
    from otel_tasks._core.tree import Ledger

T = TypeVar("T")

# By name: asking an enumeration for a member takes as long as calling a method, before Python 3.12.
_NORMAL = TaskPriority.NORMAL
Args = TypeVarTuple("Args")

_NAME_IT = 'call it by its work, as in TaskGroup("load")'


class Manager(Protocol):
    """A ``TaskManager``, which stands above this module."""

    @property
    def _root(self) -> TaskGroup: ...


class TaskGroup(Creation):
    """A group of tasks, and of groups below it; with ``async with`` a drop-in for ``asyncio.TaskGroup``.

    Args:
        name: What it is called in traces; its id gets a number behind it. None is ``"group"``.
        on_error: ``"cancel"``: a failing task cancels its siblings and the block raises an
            ``ExceptionGroup``; ``"isolate"``: it is reported and the others go on.
        timeout: Seconds that the block may take, at least 0; then everything in it is cancelled
            and it raises ``TimeoutError``. None is without bound.
        max_concurrency: How many of its tasks run at a time, at least 1; the others wait for a
            place, highest priority first. None is without bound. The manager's limit holds too.
        max_queue: How many may wait, at least 0; one more is refused. None is without bound.
        span: Give the block a span of its own.
        manager: Whose tasks they are; None is the manager of the request or the managed task that makes the
            group, elsewhere the global manager.

    Cancellation: of the task in the block cancels all tasks of the group, waits for them, and
    goes on its way.

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
        manager: Manager | None = None,
    ) -> None:
        root: TaskGroup = current_root() if manager is None else manager._root
        check_choice("on_error", on_error, OnError)
        label = "group" if name is None else checked_name("group", name, _NAME_IT)
        self._set_up(root._ledger, label, None)
        check_flag("span", span)
        self._scope = Scope(on_error, checked_seconds("timeout", timeout), span=span)
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
        """What the tasks here and below have reported of their progress, added up now."""
        past = [group._past_progress for group in self._below() if group._past_progress is not None]
        return add_up(map(reported, self._every_live()), past)

    @property
    def task_group(self) -> TaskGroup:
        """Itself: a group may stand for the current group."""
        return self

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
        **options: Unpack[NamedTaskOptions],
    ) -> concurrent.futures.Future[T]:
        """Create a task in this group from another thread, as ``asyncio.run_coroutine_threadsafe`` would.

        Args:
            work: A coroutine, or a function that makes one; it is called in the event loop.
            **options: As for ``create_task``. The task runs in a copy of the context that is current
                here, and so belongs to its trace.

        Returns:
            What ends when the task has ended. Its ``cancel()`` cancels the task. Do not wait for it in
            the loop's own thread: the task would never begin.

        Raises:
            GroupClosedError: The group takes no new tasks.
            ManagerClosedError: The manager is shut down.
            WrongLoopError: The manager has not been used in an event loop yet, or that one is closed.
            TypeError: ``work`` is neither, or an option is of the wrong type.
            ValueError: An option is out of its range.

        What only the loop can tell is raised by the future, as a name that is taken. A coroutine is
        closed on every refusal.

        Example:
            >>> price = group.create_task_threadsafe(fetch_price(7)).result(timeout=5.0)
        """
        return self._hand_over(work, lambda: self, options)

    @with_options_of(Creation._create)
    def run_in_thread(
        self,
        function: Callable[[*Args], T],
        /,
        *args: *Args,
        abandon: bool = False,
        **options: Unpack[NamedTaskOptions],
    ) -> ManagedTask[T]:
        """Create a task that calls a plain function in a thread of its own.

        The function runs in the task's context: ``current_task()``, ``current_group()`` and
        ``current_cancel_event()`` work in it, and what it traces belongs to the task's span. No
        more than the manager's ``max_threads`` work at a time; the others wait, highest priority first.

        Args:
            function: What to call; ``functools.partial`` gives it keyword arguments.
            *args: What to call it with.
            abandon: What becomes of the thread when the task is cancelled or runs into its timeout. A
                thread cannot be stopped; both ways its cancel event is set. False: the task ends when
                the function has returned. True: it ends at once, and the thread runs on, named in the
                log and in ``manager.abandoned_threads`` until it returns.
            **options: As for ``create_task``.

        Returns:
            The task. Once cancelled it ends as cancelled, also if the function returns a value after
            that; if it raises, other than CancelledError, the task has failed.

        Raises:
            TypeError: ``function`` is no plain function.
            GroupClosedError: The group takes no new tasks.

        Example:
            >>> def resize(paths):
            ...     for path in paths:
            ...         if current_cancel_event().is_set():
            ...             return
            ...         shrink(path)
            >>> await group.run_in_thread(resize, paths, timeout=60.0)
        """
        coro = self._ledger.threads.coroutine(function, args, abandon=abandon)
        try:
            return self.create_task(coro, **options)
        except BaseException:
            close_quietly(coro)
            raise

    @with_options_of(Creation._create)
    async def put_task(
        self, coro: Coroutine[Any, Any, T], **options: Unpack[NamedTaskOptions]
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
        try:
            check_coroutine(coro)
            await self._room()
            return self.create_task(coro, **options)
        except BaseException:
            close_quietly(coro)
            raise
        finally:
            # What this one did not need, or leaves over, is for the next in line.
            self._ledger.places.wake_producer()

    @property
    def max_concurrency(self) -> int | None:
        """How many of its tasks run at a time; may be changed while they do. None is without bound.

        Raises:
            ValueError: It is set to what is no whole number of at least 1.
        """
        return None if self._limiter is None else self._limiter.limit

    @max_concurrency.setter
    def max_concurrency(self, limit: int | None) -> None:
        # A lower one waits for running tasks to end, it stops none.
        check_count("max_concurrency", limit, 1)
        limiter = self._limiter or Limiter(None, None)
        if self._limiter is None:
            self._limit(limiter)
            self._count_for(limiter, before=True)
        # A labelled group is forgotten when it is empty; not one with a limit.
        self._ledger.places.limited.discard(self)
        if limit is not None and not self.scoped:
            self._ledger.places.limited.add(self)
        self._ledger.places.change_limit(limiter, limit)

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
        """Make a scoped group below this one; enter it with ``async with``.

        Args:
            name: What it is called.
            on_error: What a failing task does to its siblings, as for ``TaskGroup``.
            timeout: Seconds that the block may take; None is without bound.
            max_concurrency: How many of its tasks run at a time; this group's limit, if it has
                one, does not count for it.
            max_queue: How many may wait for a place.
            span: Give the block a span of its own.
        """
        group = TaskGroup(
            name,
            on_error=on_error,
            timeout=timeout,
            max_concurrency=max_concurrency,
            max_queue=max_queue,
            span=span,
        )
        group._hang_below(self)
        return group

    def cancel(self, reason: str | None = None) -> None:
        """Cancel all that is live in this group and below it, at once and without waiting.

        The block of a scoped group is left without an exception; it takes no new tasks from
        now on. A labelled group stays usable. The calling task is cancelled too if it is one of
        the group's; ``manager.cancel_group`` spares it, and waits. From another thread the loop is
        told, and does it in its next turn.

        Args:
            reason: Noted with the cause of each task.
        """
        loop = self._ledger.home.elsewhere()
        if loop is None:
            self._cancel_all(CancelCause.make(CancelKind.EXPLICIT, reason))
            return
        with suppress(RuntimeError):  # It is closed: nothing in it can be cancelled any more.
            loop.call_soon_threadsafe(self._cancel_all, cause_elsewhere(loop, reason))

    def _cancel_all(self, cause: CancelCause) -> None:
        announced = self._signal_cancel(cause)
        self._cancel_tasks(cause)
        if self._scope is not None:
            self._scope.cancel_body(cause)
        renew(announced, cause)

    async def join(self) -> None:
        """Wait until nothing is live in this group and below it, the calling task and what awaits it aside.

        It raises nothing of what the tasks raise: that is reported where it belongs.

        Cancellation: of the caller leaves the tasks alone.
        """
        # Anew each time: two that join each other would wait for ever, if the second came later.
        while live := self._live_without(with_awaiters(asyncio.current_task())):
            await wait_until_done(live)

    def _live_without(self, spared: Collection[asyncio.Future[Any]]) -> list[ManagedTask[Any]]:
        return [task for task in self._every_live() if task not in spared]

    # -- async with -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        scope = self._scope
        if scope is None:
            raise RuntimeError(
                f"group {self.id!r} is open already and cannot be entered: "
                'async with manager.group("name") makes one that can'
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
                "enter it inside of that one's block"
            )
        scope.outer = outer = ledger.hosts.get(host)
        ledger.hosts[host] = self
        # What it inherits from above is no reason to cancel the body: whoever hosts it decides.
        cancelled_before = self._cause
        self._open(self._place(outer))
        if scope.wants_span:
            self._start_span()
        scope.enter(self, host, loop)
        if cancelled_before is not None:
            scope.cancel_body(cancelled_before)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        # Not `bool`: type checkers would then hold that every block may swallow an exception.
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
        self._refuse("is finished")
        self._sealed = True
        self._leave_tree()
        ledger.places.wake_producer()

    def _place(self, outer: TaskGroup | None) -> TaskGroup:
        """The group below which the block runs: the one it was made for, or the one around it."""
        if self._parent is not None:
            return stand_in(self._parent)
        return self._surroundings() if outer is None else nearest_open(outer)

    def _surroundings(self) -> TaskGroup:
        """The current group, if it is one of this manager's and not over; else the manager's root."""
        group: TaskGroup | None = current_group_or_none()
        if group is None or group._ledger is not self._ledger or (group.scoped and not group._linked):
            return self._ledger.root
        return group

    def _start_span(self) -> None:
        tracer = self._ledger.telemetry.tracer()
        if tracer is None:
            return
        attributes = {GROUP_NAME: self.name, GROUP_ID: self.id, MANAGER_NAME: self._ledger.name}
        try:
            self._span = start_group_span(tracer, low_cardinality(self.name), attributes, self._span)
            self._owns_span = True
        except Exception:
            self._ledger.log_once("starting a span for group %r raised", self.id)


@hosts_of.register(ManagedTask)
def _hosts_of(task: ManagedTask[Any]) -> Iterator[asyncio.Future[Any]]:
    group: TaskGroup | None = task._group
    while group is not None:
        if group._host is not None:
            yield group._host
        if group._scope is not None and group._scope.host is not None:
            yield group._scope.host
        group = group._parent
