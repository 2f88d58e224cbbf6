"""TaskGroup: a node in the tree of work.

*Labelled* groups are named by a string, made on first use, nest by the dots in their names and
stay open until shutdown; a failure in one is its task's own. *Scoped* groups are entered with
``async with``, joined and then closed; they cancel their siblings and raise, as asyncio's do.
A request's group is scoped too, but no block: the middleware opens, cancels and seals it.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from asyncio import _get_running_loop
from contextlib import suppress
from contextvars import Context, ContextVar, copy_context
from functools import partial
from types import CoroutineType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Protocol,
    TypedDict,
    TypeVar,
    TypeVarTuple,
    get_args,
)

from otel_tasks._admission import Limiter, Ticket, admit, would_wait
from otel_tasks._checks import checked_seconds as checked_seconds
from otel_tasks._scope import OnError, Scope
from otel_tasks._state import CancelKind, TaskPriority
from otel_tasks._task import (
    Extras,
    ManagedTask,
    add_done_callback,
    ask,
    cause_elsewhere,
    failure_of,
    init_task,
    reported,
    run_when,
    snapshot,
    wait_until_done,
    with_predecessors,
)
from otel_tasks._telemetry import (
    CODE_FUNCTION,
    GROUP_ID,
    GROUP_NAME,
    MANAGER_NAME,
    TASK_ID,
    TASK_NAME,
    TASK_PRIORITY,
    end_group_span,
    low_cardinality,
    start_group_span,
    start_span,
)
from otel_tasks._threads import current_worker, hand_over, in_thread
from otel_tasks.cancellation import TREE_LOCK, CancelCause, CancelEvent
from otel_tasks.exceptions import GroupClosedError, QueueFullError, TaskExistsError
from otel_tasks.progress import add_up

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from otel_tasks._ledger import Ledger
    from otel_tasks._manager import TaskManager
    from otel_tasks._telemetry import GroupSpan, Span, Tracer
    from otel_tasks.progress import GroupProgress

T = TypeVar("T")
Args = TypeVarTuple("Args")

EAGER = sys.version_info >= (3, 12)
OnConflict = Literal["error", "suffix", "return", "replace"]


class Binding(Protocol):
    """What stands for the current group in a context: a group, or what makes one when it is needed."""

    @property
    def task_group(self) -> TaskGroup:
        """The group that new tasks join."""
        ...


# Set where the current task alone does not tell the group: in a request's handler, and in
# tasks that were started from one into another group.
_bound: ContextVar[Binding | None] = ContextVar("otel_tasks_group", default=None)


class TaskOptions(TypedDict, total=False):
    """The options of ``create_task``, for functions that pass them on."""

    name: str | None
    priority: TaskPriority
    timeout: float | None
    queue_timeout: float | None
    metadata: Mapping[str, Any] | None
    on_conflict: OnConflict
    detached: bool
    context: Context | None
    eager_start: bool | None


class TaskGroup:
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
        manager: Whose tasks they are; None is the global manager.

    Cancellation: of the task in the block cancels all tasks of the group, waits for them, and
    goes on its way.

    Example:
        >>> async with TaskGroup("load") as group:
        ...     first = group.create_task(fetch(1))
        ...     second = group.create_task(fetch(2))
    """

    # The global manager's root; `_manager` sets it, which this module may not import.
    _default_root: ClassVar[TaskGroup]

    __slots__ = (
        "__weakref__",
        "_binding",
        "_cause",
        "_children",
        "_event",
        "_host",
        "_id",
        "_ledger",
        "_limiter",
        "_linked",
        "_live",
        "_name",
        "_names",
        "_number",
        "_owns_span",
        "_parent",
        "_past_progress",
        "_queued",
        "_refusal",
        "_scope",
        "_sealed",
        "_span",
    )

    _refusal: str | None
    _scope: Scope | None
    _limiter: Limiter | None

    def __init__(
        self,
        name: str | None = None,
        *,
        on_error: OnError = "cancel",
        timeout: float | None = None,
        max_concurrency: int | None = None,
        max_queue: int | None = None,
        span: bool = False,
        manager: TaskManager | None = None,
    ) -> None:
        root = self._default_root if manager is None else manager._root
        check_choice("on_error", on_error, OnError)
        label = "group" if name is None else checked_name("group", name)
        self._set_up(root._ledger, label, None)
        self._scope = Scope(on_error, checked_seconds("timeout", timeout), span=span)
        self._refusal = "has not been entered"
        self._limiter = checked_limiter(max_concurrency, max_queue)

    def _set_up(self, ledger: Ledger, name: str | Callable[[], str], parent: TaskGroup | None) -> None:
        self._ledger = ledger
        self._name = name
        self._id: str | None = None
        # Given when a scoped group opens; 0 before.
        self._number = 0
        self._parent = parent
        self._children: dict[TaskGroup, None] = {}
        self._live: dict[str, ManagedTask[Any]] = {}
        # The table in which names must be unique: its own, or for labelled groups the root's.
        self._names = self._live
        self._linked = False
        self._sealed = False
        # Its own, or that of the group around it: the parent of what its block starts.
        self._span: GroupSpan | None = None
        self._owns_span = False
        self._event: CancelEvent | None = None
        # Why it is being cancelled; for good in a scoped group, for the moment in a labelled one.
        self._cause: CancelCause | None = None
        # How many of its ended tasks had reported progress, and how much they did; of a scoped group only.
        self._past_progress: tuple[int, float] | None = None
        # Why it takes no new tasks; None while it does.
        self._refusal = None
        self._scope = None
        self._limiter = None
        # Of the live tasks, those that wait for a place.
        self._queued = 0
        self._binding: Binding | None = None
        # The task in which a request's handler runs.
        self._host: asyncio.Task[Any] | None = None

    @classmethod
    def _labelled(cls, ledger: Ledger, name: str, parent: TaskGroup | None) -> TaskGroup:
        group = cls.__new__(cls)
        group._set_up(ledger, name, parent)
        group._id = name
        if parent is not None:
            group._names = ledger.root._live
        return group

    @classmethod
    def _opened(
        cls,
        root: TaskGroup,
        name: str | Callable[[], str],
        binding: Binding | None,
        host: asyncio.Task[Any] | None,
        span: bool,
    ) -> TaskGroup:
        """Open an isolating scoped group below ``root`` without a block, as a request's is."""
        group = cls.__new__(cls)
        group._set_up(root._ledger, name, root)
        group._binding = binding
        group._host = host
        group._open(root)
        if span:
            group._start_span()
        return group

    # -- what it is -------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What it is called; a request's is named after its route once that is known."""
        return self._name if isinstance(self._name, str) else self._name()

    @property
    def id(self) -> str:
        """The name, for a scoped group with ``#`` and a number behind it."""
        if self._id is None:
            return f"{self.name}#{self._number}" if self._number else self.name
        return self._id

    @property
    def scoped(self) -> bool:
        """True for one that is entered and closed, False for one that is named by a string."""
        return self._id is None

    @property
    def parent(self) -> TaskGroup | None:
        """The group above; None for a manager's root."""
        return self._parent

    @property
    def tasks(self) -> tuple[ManagedTask[Any], ...]:
        """The live tasks of this very group, oldest first."""
        return tuple(task for task in self._live.values() if task._group is self)

    @property
    def cancel_event(self) -> CancelEvent:
        """Set when the group or one above it is cancelled; made on first use, for a labelled group anew.

        It may be asked for in any thread.
        """
        event = self._event
        return self._make_event() if event is None or self._is_used_up(event) else event

    @property
    def progress(self) -> GroupProgress:
        """What the tasks here and below have reported of their progress, added up now."""
        past = [group._past_progress for group in self._below() if group._past_progress is not None]
        return add_up(map(reported, self._every_live()), past)

    @property
    def task_group(self) -> TaskGroup:
        """Itself: a group may stand for the current group."""
        return self

    def __repr__(self) -> str:
        state = self._refusal or ("is being cancelled" if self._cause is not None else "is open")
        return f"<TaskGroup {self.id!r} {state}, {len(self._live)} live tasks>"

    # -- tasks ------------------------------------------------------------------------------

    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        priority: TaskPriority = TaskPriority.NORMAL,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "suffix",
        detached: bool = False,
        context: Context | None = None,
        eager_start: bool | None = None,
    ) -> ManagedTask[T]:
        """Create a task in this group; the parameters are those of ``TaskManager.create_task``.

        Raises:
            GroupClosedError: The group takes no new tasks; ``coro`` is closed.
            QueueFullError: No place is free and no more tasks may wait; ``coro`` is closed.
        """
        return self._create(
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
            False,
        )

    def create_task_threadsafe(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        **options: Unpack[TaskOptions],
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

    def run_in_thread(
        self,
        function: Callable[[*Args], T],
        /,
        *args: *Args,
        abandon: bool = False,
        **options: Unpack[TaskOptions],
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
        coro = in_thread(self._ledger.threads, function, args, abandon=abandon)
        try:
            return self.create_task(coro, **options)
        except BaseException:
            close_quietly(coro)
            raise

    async def put_task(self, coro: Coroutine[Any, Any, T], **options: Unpack[TaskOptions]) -> ManagedTask[T]:
        """Create a task as soon as it may wait for its place: ``create_task`` with patience.

        As ``asyncio.Queue.put`` is to ``put_nowait``: where ``create_task`` would raise
        ``QueueFullError`` this waits for room in the queue. The parameters are the same.

        Cancellation: of the caller, while it waits for room: ``coro`` is closed, no task is created.
        """
        try:
            await self._room()
            return self.create_task(coro, **options)
        except BaseException:
            close_quietly(coro)
            raise
        finally:
            # What this one did not need, or leaves over, is for the next in line.
            self._ledger.wake_putter()

    @property
    def max_concurrency(self) -> int | None:
        """How many of its tasks run at a time; may be changed while they do. None is without bound."""
        return None if self._limiter is None else self._limiter.limit

    @max_concurrency.setter
    def max_concurrency(self, limit: int | None) -> None:
        # A lower one waits for running tasks to end, it stops none.
        checked_limiter(limit, None)
        if self._limiter is None:
            self._limiter = Limiter(None, None)
            self._ledger.adopt(self.tasks, self._limiter, before=True)
        # A labelled group is forgotten when it is empty; not one with a limit.
        self._ledger.limited.discard(self)
        if limit is not None and not self.scoped:
            self._ledger.limited.add(self)
        self._ledger.change_limit(self._limiter, limit)

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
        group._ledger = self._ledger
        group._parent = self
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
        loop = self._ledger.elsewhere()
        if loop is None:
            self._cancel_all(CancelCause.make(CancelKind.EXPLICIT, reason))
            return
        with suppress(RuntimeError):  # It is closed: nothing in it can be cancelled any more.
            loop.call_soon_threadsafe(self._cancel_all, cause_elsewhere(loop, reason))

    def _cancel_all(self, cause: CancelCause) -> None:
        announced = self._announce(cause)
        self._cancel_tasks(cause)
        if self._scope is not None:
            self._scope.cancel_body(cause)
        renew(announced, cause)

    async def join(self) -> None:
        """Wait until nothing is live in this group and below it, the calling task aside.

        It raises nothing of what the tasks raise: that is reported where it belongs.

        Cancellation: of the caller leaves the tasks alone.
        """
        caller = asyncio.current_task()
        while live := [task for task in self._every_live() if task is not caller]:
            await wait_until_done(live)

    # -- async with -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        scope = self._scope
        if scope is None:
            raise RuntimeError(
                f"group {self.id!r} is open already and cannot be entered: "
                'async with manager.group("name") makes one that can'
            )
        if scope.host is not None:
            raise RuntimeError(f"group {self.id!r} has already been entered: make a new one for each block")
        host = asyncio.current_task()
        if host is None:
            raise RuntimeError(f"group {self.name!r} cannot determine the parent task: enter it in a task")
        ledger = self._ledger
        loop = ledger.enter()
        scope.outer = outer = ledger.hosts.get(host)
        ledger.hosts[host] = self
        # What it inherits from above is no reason to cancel the body: whoever hosts it decides.
        cancelled_before = self._cause
        self._open(self._parent or outer or self._surroundings())
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
            return await scope.leave(self, scope.host, exc)
        finally:
            self._close(scope, scope.host)

    def _open(self, parent: TaskGroup) -> None:
        self._parent = parent
        self._span = parent._span
        self._number = self._ledger.next_number()
        self._refusal = None if self._cause is None else f"is closed ({self._cause.kind})"
        # By number: a request's name, and so its id, changes once its route is known.
        self._ledger.scopes[self._number] = self
        parent._link(self)
        above = parent._cause
        if above is not None and self._cause is None:
            # What hangs below a cancelled group is born cancelled.
            self._announce(above)

    def _close(self, scope: Scope, host: asyncio.Task[Any]) -> None:
        ledger = self._ledger
        if ledger.hosts.get(host) is self:
            del ledger.hosts[host]
            if scope.outer is not None and scope.outer._linked:
                ledger.hosts[host] = scope.outer
        self._refusal = self._refusal or "is finished"
        self._leave_tree()
        ledger.wake_putter()

    def _surroundings(self) -> TaskGroup:
        """The current group, if it is one of this manager's; else the manager's root."""
        group = current_group_or_none()
        return group if group is not None and group._ledger is self._ledger else self._ledger.root

    def _start_span(self) -> None:
        tracer = self._ledger.telemetry.tracer()
        if tracer is None:
            return
        attributes = {GROUP_NAME: self.name, GROUP_ID: self.id, MANAGER_NAME: self._ledger.name}
        try:
            self._span = start_group_span(tracer, low_cardinality(self.name), attributes, self._span)
            self._owns_span = True
        except Exception:
            self._ledger.complain("starting a span for group %r raised", self.id)

    # -- creating ---------------------------------------------------------------------------

    def _create(
        self,
        coro: Coroutine[Any, Any, T],
        name: str | None,
        priority: TaskPriority,
        timeout: float | None,
        queue_timeout: float | None,
        metadata: Mapping[str, Any] | None,
        on_conflict: OnConflict,
        detached: bool,
        context: Context | None,
        eager_start: bool | None,
        keep_result: bool,
        supervises: bool = False,
    ) -> ManagedTask[T]:
        ticket = None
        work = coro
        try:
            if type(coro) is not CoroutineType:
                check_coroutine(coro)
            ledger = self._ledger
            loop = _get_running_loop()
            if loop is None or loop is not ledger.loop or ledger.closed:
                loop = ledger.enter()
            if self._refusal is not None:
                self._refuse(name or function_name(coro))
            if type(priority) is not TaskPriority:
                priority = checked_priority(priority)
            extras = None
            if timeout is not None or metadata is not None or keep_result or queue_timeout is not None:
                extras = Extras(
                    metadata,
                    keep_result,
                    checked_seconds("timeout", timeout),
                    checked_seconds("queue_timeout", queue_timeout),
                )
                # A supervisor always keeps its result: no other task has to be asked.
                extras.supervises = supervises
            if on_conflict != "suffix":
                check_choice("on_conflict", on_conflict, OnConflict)
            taken = None if name is None else self._holder(name)
            if taken is not None and on_conflict == "return":
                coro.close()
                return taken
            if taken is not None and on_conflict == "error":
                self._refuse_name(taken)
            limited = (self._limiter is not None or ledger.limiter.limit is not None) and not supervises
            if limited:
                self._check_queue(name or function_name(coro))
            previous: tuple[asyncio.Task[Any], ...] = ()
            if name is None:
                key = self._numbered(function_name(coro))
            elif taken is None:
                key = name
            else:
                key, previous = self._make_way(name, taken, on_conflict)
            if context is not None and not isinstance(context, Context):
                raise TypeError(f"context must be a contextvars.Context, got {context!r}")
            created_at = loop.time()
            if limited:
                extras = extras or Extras()
                ticket = self._claim(extras, priority, created_at, loop)
            if previous or (extras is not None and (extras.seconds is not None or extras.gate is not None)):
                extras = extras or Extras()
                work = run_when(coro, extras, previous, created_at)
            tracer = ledger.telemetry.tracer()
            bound = _bound.get() if context is None else context.get(_bound)
            stranger = bound is not None and bound is not (self._binding or self)
            span = None
            if tracer is not None or stranger:
                # A context that the user passed is copied as soon as something is put into it.
                context = copy_context() if context is None else context.copy()
                if stranger:
                    context.run(_bound.set, self._binding or self)
                if tracer is not None and not supervises:
                    if extras is None or extras.gate is None:
                        span = context.run(self._start_task_span, tracer, key, coro, priority, detached)
                    else:
                        # The span of a task that queues is begun when it gets its place.
                        extras.context = context
            if extras is not None and extras.gate is not None:
                extras.begin = partial(self._begin, coro, detached)
            eager = EAGER and (ledger.eager_start if eager_start is None else eager_start)
            if eager and context is not None:
                eager = is_free(context)
            # Built directly: create_task() of the loop would ask for a factory and set the name again.
            task = (
                ManagedTask.__new__(ManagedTask)
                if eager
                else ManagedTask(work, loop=loop, name=key, context=context)
            )
        except BaseException:
            if ticket is not None:
                self._ledger.give_back(ticket)
            close_quietly(work)
            close_quietly(coro)
            raise
        task._group = self
        task._priority = priority
        task._created_at = created_at
        task._span = span
        task._cause = None
        task._extras = extras
        task._waiters = 0
        ledger.created += 1
        self._add(key, task)
        if eager:
            self._run_first_step(task, work, loop, key, context)
            return task
        add_done_callback(task, ledger.on_done, context=ledger.context)
        if ledger.listeners:
            ledger.tell("created", snapshot(task))
        return task

    def _run_first_step(
        self,
        task: ManagedTask[Any],
        work: Coroutine[Any, Any, Any],
        loop: asyncio.AbstractEventLoop,
        key: str,
        context: Context | None,
    ) -> None:
        """Run the first step of a task that is in the books already, eagerly (Python 3.12)."""
        ledger = self._ledger
        if ledger.listeners:
            work = told_first(work, ledger)
        try:
            init_task(task, work, loop=loop, name=key, context=context, eager_start=True)
        finally:
            # Also where the step raises SystemExit through us: the task has ended by that. A
            # failure is booked a turn later, as any: whoever awaits it has it by then.
            if task.done() and not task.cancelled() and failure_of(task) is None:
                ledger.on_done(task)
            else:
                add_done_callback(task, ledger.on_done, context=ledger.context)

    def _start_task_span(
        self,
        tracer: Tracer,
        key: str,
        coro: Coroutine[Any, Any, Any],
        priority: TaskPriority,
        detached: bool,
        start_time: int | None = None,
    ) -> Span | None:
        """Start a task's span, inside the context made for the task."""
        name = low_cardinality(key)
        attributes = {
            TASK_NAME: name,
            TASK_ID: self._task_id(key),
            TASK_PRIORITY: int(priority),
            GROUP_NAME: self.name,
            GROUP_ID: self.id,
            MANAGER_NAME: self._ledger.name,
            CODE_FUNCTION: code_name(coro),
        }
        try:
            parent = None if self._span is None else self._span.parent()
            return start_span(
                tracer, name, attributes, parent=parent, detached=detached, start_time=start_time
            )
        except Exception:
            self._ledger.complain("starting a span for task %r raised", key)
            return None

    def _hand_over(
        self,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        where: Callable[[], TaskGroup],
        options: TaskOptions,
    ) -> concurrent.futures.Future[T]:
        """Have a task created in the loop, by the group that ``where`` gives there."""
        try:
            if not asyncio.iscoroutine(work) and not callable(work):
                raise TypeError(
                    "create_task_threadsafe() takes a coroutine, or a function that makes one, "
                    f"got {work!r}: write create_task_threadsafe(work(...)) with `async def work(...)`"
                )
            check_options("create_task_threadsafe", options)
            loop = self._ledger.loop_for_others()
            if self._refusal is not None:
                self._refuse(options.get("name") or function_name(work))
        except BaseException:
            close_quietly(work)
            raise
        return hand_over(loop, work, lambda coro: where().create_task(coro, **options))

    # -- places -----------------------------------------------------------------------------

    def _limiters(self) -> tuple[Limiter, ...]:
        """What a new task has to pass: the group's own limit, and the manager's."""
        shared = self._ledger.limiter
        if self._limiter is None:
            return (shared,) if shared.limit is not None else ()
        return (self._limiter, shared) if shared.limit is not None else (self._limiter,)

    def _full(self) -> Limiter | None:
        """The limiter in whose queue a new task would have to stand, and may not."""
        limiters = self._limiters()
        if not would_wait(limiters):
            return None
        return next((limiter for limiter in limiters if limiter.queue_full), None)

    def _check_queue(self, name: str) -> None:
        full = self._full()
        if full is not None:
            whose = f"group {self.id!r}" if full is self._limiter else f"manager {self._ledger.name!r}"
            raise QueueFullError(
                f"cannot create task {name!r}: {full.waiting} tasks wait for a place in {whose} already "
                f"(max_concurrency={full.limit}, max_queue={full.max_queue}); "
                "wait for room with await put_task(...), or do without it"
            )

    def _claim(
        self, extras: Extras, priority: TaskPriority, now: float, loop: asyncio.AbstractEventLoop
    ) -> Ticket:
        """Claim a place, and make the gate at which the task waits if there is none."""
        payload = (self, extras)
        extras.ticket = ticket = Ticket(self._limiters(), priority, now, self._ledger.ageing, payload)
        if not admit(ticket):
            extras.gate = loop.create_future()
            self._queued += 1
        return ticket

    async def _room(self) -> None:
        """Wait until a new task may stand in the queue, or none will ever."""
        ledger = self._ledger
        if not ledger.line_is_busy and not self._stands_in_line():
            return
        stand = ledger.putters.append
        while True:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            stand((self, waiter))
            # Those before it may all wait for room elsewhere.
            ledger.wake_putter()
            try:
                await waiter
            finally:
                ledger.putter_left(waiter)
            if not self._stands_in_line():
                return
            # Somebody who did not stand in line was faster: again, and at its head.
            stand = ledger.putters.appendleft

    def _stands_in_line(self) -> bool:
        """True if a new task would be refused now, but not for ever."""
        return self._refusal is None and not self._ledger.closed and self._full() is not None

    def _begin(self, coro: Coroutine[Any, Any, Any], detached: bool, task: ManagedTask[Any]) -> None:
        """Begin the span of a task that had to wait, inside its own context, as of its creation."""
        ledger = self._ledger
        tracer = ledger.telemetry.tracer()
        extras = task._extras
        waited = task.get_loop().time() - task._created_at
        if tracer is not None:
            created = time.time_ns() - int(waited * 1e9)
            task._span = self._start_task_span(
                tracer, task.get_name(), coro, task._priority, detached, start_time=created
            )
        if extras is not None and extras.started_at is not None:
            ledger.dequeued(task, waited)

    def _numbered(self, base: str) -> str:
        key = f"{base}-{self._ledger.next_number()}"
        # Only where somebody has called a task just that.
        return key if key not in self._names else self._numbered(base)

    def _holder(self, name: str) -> ManagedTask[Any] | None:
        """The live task that has this name."""
        task = self._names.get(checked_name("task", name))
        # One that is done gives its name up, even if its done-callback is still to come.
        return None if task is None or task.done() else task

    def _admit(self, name: str, on_conflict: OnConflict) -> None:
        """Raise what ``_create`` would raise for a task of this name, before its coroutine is made."""
        self._ledger.enter()
        if self._refusal is not None:
            self._refuse(name)
        check_choice("on_conflict", on_conflict, OnConflict)
        taken = self._holder(name)
        if taken is not None and on_conflict == "error":
            self._refuse_name(taken)
        if taken is None or on_conflict != "return":
            self._check_queue(name)

    def _refuse_name(self, taken: ManagedTask[Any]) -> NoReturn:
        raise TaskExistsError(
            f"cannot create task {taken.name!r}: one of that name is {taken.status} "
            f"in group {taken.group.id!r}; "
            'wait for it, choose another name, or pass on_conflict="suffix", "return" or "replace"'
        )

    def _make_way(
        self, name: str, taken: ManagedTask[Any], on_conflict: OnConflict
    ) -> tuple[str, tuple[asyncio.Task[Any], ...]]:
        """Decide the name of a task whose name is taken, and after which tasks it may begin."""
        if on_conflict == "suffix":
            second = f"{name}-2"
            return (second if self._holder(second) is None else self._numbered(name)), ()
        previous = with_predecessors(taken)
        # The old one keeps its place in the books under another name until it has ended.
        taken.set_name(self._numbered(name))
        ask(taken, CancelCause.make(CancelKind.REPLACED, f"replaced by a new task {name!r}"))
        return name, previous

    def _refuse(self, name: str) -> NoReturn:
        if self._scope is not None and self._scope.host is None and self._cause is None:
            mend = "enter it first: async with group"
        elif self._binding is not None:
            mend = "work that outlives the request belongs in manager.create_task(..., group=...)"
        else:
            mend = "work that outlives the block belongs in manager.create_task(...)"
        raise GroupClosedError(f"cannot create task {name!r}: group {self.id!r} {self._refusal}; {mend}")

    # -- the tree ---------------------------------------------------------------------------

    def _task_id(self, name: str) -> str:
        return f"{self.id}/{name}" if self._id is None else name

    def _add(self, key: str, task: ManagedTask[Any]) -> None:
        self._live[key] = task
        if self._names is not self._live:
            self._names[key] = task
        if not self._linked and self._parent is not None:
            self._parent._link(self)

    def _remove(self, task: ManagedTask[Any]) -> None:
        key = task.get_name()
        # Its entry may be another's by now: a name is free as soon as its task is done.
        if self._live.get(key) is task:
            del self._live[key]
        if self._names is not self._live and self._names.get(key) is task:
            del self._names[key]
        if not self._live:
            self._emptied()

    def _rename(self, task: ManagedTask[Any], name: str) -> str:
        old = task.get_name()
        if self._live.get(old) is not task:
            # It has ended, and is in no table any more.
            return name
        key = name if self._holder(name) in (None, task) else self._numbered(name)
        for table in (self._live, self._names):
            table.pop(old, None)
            table[key] = task
        return key

    def _is_empty(self) -> bool:
        return not self._live and not self._children

    def _emptied(self) -> None:
        if self._children or not self._linked:
            return
        if self._scope is not None:
            self._scope.tasks_ended()
        elif self._sealed or not self.scoped:
            # A labelled group hangs in the tree only while there is something in it.
            self._leave_tree()

    def _link(self, child: TaskGroup) -> None:
        self._children[child] = None
        child._linked = True
        if not self._linked and self._parent is not None:
            self._parent._link(self)

    def _leave_tree(self) -> None:
        if not self._linked:
            return
        self._linked = False
        if self._span is not None and self._owns_span:
            try:
                end_group_span(self._span.span, self._cause)
            except Exception:
                self._ledger.complain("ending the span of group %r raised", self.id)
        if self.scoped:
            self._ledger.scopes.pop(self._number, None)
        parent = self._parent
        if parent is not None:
            parent._children.pop(self, None)
            if self._past_progress is not None:
                parent._keep_progress(*self._past_progress)
            if not parent._live:
                parent._emptied()

    def _keep_progress(self, tasks: int, done: float) -> None:
        """Count ended tasks that had reported progress with what they did, until the group is closed."""
        if self.scoped:
            before = self._past_progress or (0, 0)
            self._past_progress = (before[0] + tasks, before[1] + done)

    def _below(self) -> list[TaskGroup]:
        """This group and all below it."""
        groups: list[TaskGroup] = [self]
        # The list grows while it is walked.
        for group in groups:
            groups.extend(group._children)
        return groups

    def _every_live(self) -> Iterator[ManagedTask[Any]]:
        """All live tasks of this group and below, each once."""
        for group in self._below():
            yield from group.tasks

    # -- cancelling: the deciding steps, without waiting ------------------------------------

    def _is_used_up(self, event: CancelEvent) -> bool:
        return event._value and self._cause is None and not self.scoped

    def _make_event(self) -> CancelEvent:
        # Two threads that ask at a time must get the same one.
        with TREE_LOCK:
            event = self._event
            if event is None or self._is_used_up(event):
                event = CancelEvent(None if self._parent is None else self._parent.cancel_event)
                event._owner = self
                # Before the look at the cause: the loop notes a cause before it looks for an event.
                self._event = event
                if self._cause is not None:
                    event.set(self._cause)
            return event

    def _announce(self, cause: CancelCause) -> list[TaskGroup]:
        """Set the cancel event here and below; scoped groups take no new tasks from now on.

        Returns:
            The groups that it reached: to be given to ``renew`` once they have been cancelled.
        """
        groups = self._below()
        for group in groups:
            if group._cause is None:
                group._cause = cause
                if group.scoped:
                    group._refusal = group._refusal or f"is closed ({cause.kind})"
        if self._event is not None:
            self._event.set(cause)
        self._ledger.wake_putter()
        return groups

    def _cancel_tasks(self, cause: CancelCause, *, spared: Collection[asyncio.Task[Any] | None] = ()) -> int:
        """Cancel every live task here and below in one pass; returns how many were newly asked.

        Args:
            cause: Noted with each task.
            spared: Tasks to leave alone, such as the caller that is going to wait.
        """
        groups = self._below()
        asked = self._ledger.ask_all(
            # Newest first: an older task may own what a newer one is using.
            [task for group in groups for task in reversed(group.tasks) if task not in spared],
            cause,
        )
        self._cancel_bodies(groups, cause, spared)
        return asked

    def _cancel_bodies(
        self, groups: list[TaskGroup], cause: CancelCause, spared: Collection[asyncio.Task[Any] | None]
    ) -> None:
        """Cancel the blocks below whose task nobody else here cancels.

        Left alone: tasks of these groups, they were asked themselves; the caller; the task that
        hosts this group too; and the handlers of requests, about which the middleware decides.
        """
        here = set(groups)
        hosts = {self._host, *spared, *(group._host for group in groups)}
        if self._scope is not None:
            hosts.add(self._scope.host)
        for group in groups:
            scope = group._scope
            if scope is None or scope.host in hosts:
                continue
            if not isinstance(scope.host, ManagedTask) or scope.host._group not in here:
                scope.cancel_body(cause)

    def _seal(self, cause: CancelCause | None = None) -> None:
        """Take no new tasks; leave the tree as soon as nothing is left in it."""
        self._sealed = True
        if self._refusal is None:
            self._refusal = "is finished" if cause is None else f"is closed ({cause.kind})"
        if self._is_empty():
            self._leave_tree()
        self._ledger.wake_putter()

    def _child_failed(self, task: ManagedTask[Any], error: BaseException) -> bool:
        """True if the failure is raised here, False if it has to be reported."""
        return self._scope is not None and self._scope.child_failed(self, task, error)


def renew(groups: Iterable[TaskGroup], cause: CancelCause) -> None:
    """Take the cause back from labelled groups that were cancelled: they stay usable, with a fresh event."""
    for group in groups:
        if not group.scoped and group._cause is cause:
            group._cause = None


def current_group_or_none() -> TaskGroup | None:
    """The group that new tasks join here; None where there is none but a manager's root."""
    bound = _bound.get()
    if bound is not None:
        return bound.task_group
    try:
        task = asyncio.current_task()
    except RuntimeError:
        worker = current_worker()
        return None if worker is None else worker.task._group
    return task._group if isinstance(task, ManagedTask) else None


def is_free(context: Context) -> bool:
    """True if no code runs in this context just now: a first step cannot, eagerly, where some does."""
    try:
        context.run(int)
    except RuntimeError:
        return False
    return True


async def told_first(work: Coroutine[Any, Any, T], ledger: Ledger) -> T:
    """Run ``work`` after the listeners have been told of its task, which is not made before it runs."""
    task = asyncio.current_task()
    if isinstance(task, ManagedTask):
        ledger.tell("created", snapshot(task))
    return await work


def function_name(coro: Any) -> str:
    """The name of the function that made a coroutine."""
    try:
        name: str = coro.__name__
    except AttributeError:
        # Cython's and other objects that are coroutines by their methods alone.
        name = type(coro).__name__
    return name


def code_name(coro: Coroutine[Any, Any, Any]) -> str:
    """Module and qualified name, as the semantic conventions want it in ``code.function.name``."""
    qualified = getattr(coro, "__qualname__", None) or type(coro).__qualname__
    frame = getattr(coro, "cr_frame", None)
    module = None if frame is None else frame.f_globals.get("__name__")
    if module == in_thread.__module__:
        # Named, with its module, after the function that it is going to call in a thread.
        return qualified
    return f"{module}.{qualified}" if module else qualified


def check_options(who: str, options: TaskOptions) -> None:
    """Raise what ``create_task`` would raise for its options, as far as it can be told without a loop.

    Raises:
        TypeError: There is no such option, or it is of the wrong type.
        ValueError: One is out of its range.
    """
    unknown = options.keys() - TaskOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"{who}() got an unexpected keyword argument {min(unknown)!r}")
    if options.get("name") is not None:
        checked_name("task", options.get("name"))
    checked_priority(options.get("priority", TaskPriority.NORMAL))
    checked_seconds("timeout", options.get("timeout"))
    checked_seconds("queue_timeout", options.get("queue_timeout"))
    check_choice("on_conflict", options.get("on_conflict", "suffix"), OnConflict)


def check_coroutine(coro: object) -> None:
    """Raise a TypeError that shows the right line, unless ``coro`` is a coroutine."""
    if type(coro) is CoroutineType or asyncio.iscoroutine(coro):
        return
    if callable(coro):
        name = getattr(coro, "__name__", type(coro).__name__)
        what = f"the function {name}: write create_task({name}(...))"
    elif inspect.isawaitable(coro):
        what = f"a {type(coro).__name__}: await it inside a coroutine function, and pass that one's coroutine"
    else:
        what = f"{coro!r}: write create_task(work(...)) with `async def work(...)`"
    raise TypeError(f"create_task() takes a coroutine, got {what}")


def close_quietly(coro: object) -> None:
    """Close a refused coroutine, so that Python does not warn that nobody awaited it."""
    if asyncio.iscoroutine(coro):
        coro.close()


def checked_name(what: str, name: object) -> str:
    """Give back a usable name.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} name must be a string, got {name!r}")
    if not name:
        raise ValueError(f"{what} name must not be empty: leave it out to have one made")
    return name


def checked_priority(priority: object) -> TaskPriority:
    """Give back a TaskPriority for one or its number.

    Raises:
        ValueError: There is no such priority.
    """
    try:
        return TaskPriority(priority)  # type: ignore[arg-type]  # anything may come in: that is what is checked
    except ValueError:
        names = ", ".join(f"TaskPriority.{level.name}" for level in TaskPriority)
        raise ValueError(f"priority must be one of {names}, got {priority!r}") from None


def checked_limiter(limit: int | None, max_queue: int | None) -> Limiter | None:
    """Make the limiter for these options; None where there is nothing to limit.

    Raises:
        ValueError: The limit is below 1, the queue's below 0, or there is a queue without a limit.
    """
    check_count("max_concurrency", limit, 1)
    check_count("max_queue", max_queue, 0)
    if limit is None:
        if max_queue is not None:
            raise ValueError(f"max_queue={max_queue} needs max_concurrency: without it no task ever waits")
        return None
    return Limiter(limit, max_queue)


def check_count(what: str, count: object, least: int) -> None:
    """Raise a ValueError unless ``count`` is None or a whole number of at least ``least``."""
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < least):
        raise ValueError(f"{what} must be at least {least}, or None for no bound, got {count!r}")


def check_choice(what: str, value: object, choices: Any) -> None:
    """Raise a ValueError unless ``value`` is one of a ``Literal``'s."""
    if value not in get_args(choices):
        listed = ", ".join(repr(choice) for choice in get_args(choices))
        raise ValueError(f"{what} must be one of {listed}, got {value!r}")
