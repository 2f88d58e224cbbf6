"""How a group creates a task: its name, its place under a limit, its context, its span, and the task itself.

``create_task`` contains the fast path, for a plain task in a group that takes plain tasks. ``_create`` is the
slow path, with all options.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import _get_running_loop
from contextvars import Context, copy_context
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from otel_tasks._core.binding import binding_here, current_binding, is_request_over
from otel_tasks._core.checks import check_choice, checked_name, checked_priority
from otel_tasks._core.coroutines import check_coroutine, close_quietly, function_name
from otel_tasks._core.eager import EAGER, EAGERLY, announced_first, is_free
from otel_tasks._core.extras import Extras, made_by, wanted_extras
from otel_tasks._core.loop import run_here
from otel_tasks._core.naming import Named, yield_to
from otel_tasks._core.native import add_done_callback, base_name, init_task, new_task
from otel_tasks._core.options import (
    OnConflict,
    RetriedTaskOptions,
    Trace,
    check_context,
    check_options,
    starts_trace,
    with_options_of,
)
from otel_tasks._core.places import Limiter, Ticket, admit, full_limiter
from otel_tasks._core.retry import retried_in_group
from otel_tasks._core.running import run_when
from otel_tasks._core.state import TaskPriority
from otel_tasks._core.task import ManagedTask, extras_of
from otel_tasks._core.task_spans import report_dequeued, start_task_span
from otel_tasks.exceptions import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Unpack

    from otel_tasks._core.backoff import RetryPolicy
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.names import Key
    from otel_tasks._core.options import TaskOptions
    from otel_tasks._core.telemetry import Span

T = TypeVar("T")

# A global, because reading a member of an enumeration costs as much as a method call before Python 3.12.
_NORMAL = TaskPriority.NORMAL


class Creation(Named):
    """The part of a group that creates tasks."""

    __slots__ = ()

    def _create(
        self,
        coro: Coroutine[Any, Any, T],
        name: str | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        timeout: float | None = None,
        queue_timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        on_conflict: OnConflict = "suffix",
        trace: Trace | None = None,
        context: Context | None = None,
        eager_start: bool | None = None,
        keep_result: bool = False,
        supervises: bool = False,
        takes_place: bool = True,
    ) -> ManagedTask[T]:
        """Create a task, with the options of ``TaskManager.create_task``."""
        extras = None
        try:
            loop = self._loop_for(coro, name)
            if self._ledger.options:
                timeout, trace = self._with_defaults(timeout, trace)
            new_trace = None if trace is None else starts_trace(trace)
            if binding_here() is not None and is_request_over():
                new_trace = True
            if type(priority) is not TaskPriority:
                priority = checked_priority(priority)
            if on_conflict != "suffix":
                check_choice("on_conflict", on_conflict, OnConflict)
            if context is not None:
                check_context(context)
            extras = wanted_extras(
                timeout, queue_timeout, metadata, keep_result=keep_result, supervises=supervises
            )
            taken = None
            if name is not None:
                name = checked_name("task", name)
                taken = self._holder(name)
            if taken is not None and on_conflict in ("return", "error"):
                return yield_to(taken, coro, on_conflict)
            limiters = self._limiters() if takes_place else ()
            if limiters:
                # Before the name is taken, because that may cancel the task which has it.
                self._check_queue(limiters, name, coro)
            base, key, previous = self._chosen_name(coro, name, taken, on_conflict)
            created_at = self._ledger.home.clock()
            if limiters:
                extras = self._claim(limiters, extras, priority, created_at, loop)
            return self._build(
                coro, name, base, key, previous, priority, created_at, extras, context, new_trace, eager_start
            )
        except BaseException:
            self._give_up(extras)
            close_quietly(coro)
            raise

    def _with_defaults(self, timeout: float | None, trace: Trace | None) -> tuple[float | None, Trace | None]:
        options = self._ledger.options
        own = options.get(self)
        if own is not None:
            timeout = own.timeout if timeout is None else timeout
            trace = own.trace if trace is None else trace
        if trace is None and (manager := options.get(self._ledger.root)) is not None:
            trace = manager.trace
        return timeout, trace

    def _give_up(self, extras: Extras | None) -> None:
        if extras is not None and extras.ticket is not None:
            self._ledger.places.give_back(extras.ticket)

    def _build(
        self,
        coro: Coroutine[Any, Any, T],
        name: str | None,
        base: str,
        key: Key,
        previous: tuple[asyncio.Task[Any], ...],
        priority: TaskPriority,
        created_at: float,
        extras: Extras | None,
        context: Context | None,
        new_trace: bool | None,
        eager_start: bool | None,
    ) -> ManagedTask[T]:
        """Make the coroutine, context, and span of a task, and the task; its name and place are decided."""
        ledger = self._ledger
        loop: Any = ledger.home.loop
        supervises = extras is not None and extras.supervises
        work = coro
        try:
            factory = ledger.home.factories._task_factory
            if factory is not None and not supervises:
                work, extras, eager_start = made_by(factory, loop, coro, name, context, extras, eager_start)
            queued = extras is not None and extras.place_granted is not None
            if previous or queued or (extras is not None and extras.seconds is not None):
                extras = extras or Extras()
                work = run_when(work, extras, previous, created_at, ledger.home.other_clock)
            tracer = None if supervises else ledger.telemetry.tracer()
            context = self._own_context(context, traced=tracer is not None)
            span = None
            if queued and extras is not None:
                # The span of a queued task starts when the task gets its place.
                extras.context = None if tracer is None else context
                extras.begin = partial(self._start_late_span, coro, new_trace)
            elif tracer is not None and context is not None:
                span = context.run(start_task_span, self, tracer, base, key, coro, priority, new_trace)
            if (
                EAGER
                and (ledger.eager_start if eager_start is None else eager_start)
                and (context is None or is_free(context))
            ):
                task: ManagedTask[T] = new_task(ManagedTask)
                self._enter(task, key, priority, created_at, span, extras)
                if ledger.listeners.functions:
                    work = announced_first(work, ledger.listeners)
                run_first_step(task, work, loop, base, context)
                return task
            # Built directly: create_task() of the loop would make a task of another class.
            task = ManagedTask(work, loop=loop, name=base, context=context)
        except BaseException:
            if extras is not None:
                extras.close()
            close_quietly(work)
            raise
        self._enter(task, key, priority, created_at, span, extras)
        add_done_callback(task, ledger.on_done, context=ledger.context)
        if ledger.listeners.functions:
            ledger.listeners.notify("created", task, task.info())
        return task

    @overload
    def create_task(
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[TaskOptions],
    ) -> ManagedTask[T]: ...
    @overload
    def create_task(
        self,
        coro: Callable[[], Coroutine[Any, Any, T]],
        *,
        retry: RetryPolicy | None = None,
        name: str | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[TaskOptions],
    ) -> ManagedTask[T]: ...
    @with_options_of(_create)
    def create_task(
        self,
        coro: Any,
        *,
        name: str | None = None,
        priority: TaskPriority | int = TaskPriority.NORMAL,
        **options: Unpack[RetriedTaskOptions],
    ) -> ManagedTask[Any]:
        """Create a task in this group; the parameters are those of ``TaskManager.create_task``.

        Raises:
            GroupClosedError: The group takes no new tasks; ``coro`` is closed.
            QueueFullError: No place is free and no more tasks may wait; ``coro`` is closed.
        """
        return self._create_task(coro, name, priority, options)

    def _create_task(
        self, coro: Any, name: str | None, priority: TaskPriority | int, options: Any
    ) -> ManagedTask[Any]:
        """Create a task, on the fast path if it is a plain one."""
        if options and options != EAGERLY:
            return self._create_with(coro, name, priority, options)
        ledger = self._ledger
        home = ledger.home
        clock = home.clock
        bound = binding_here()
        run, loop = home.fast_path
        if (
            (run != run_here() and (loop is None or not home.joins_fast_path(loop)))
            or home.factories._task_factory is not None
            or type(coro) is not CoroutineType
            or (priority is not _NORMAL and type(priority) is not TaskPriority)
            or not self._takes_plain_tasks
            or (bound is not None and bound is not (self._binding or self))
        ):
            return self._create_with(coro, name, priority, options)
        # Most tasks get here: no options, no listeners, no limits. The rest does what `_create` does, without
        # what cannot matter here, in a third of the time. `_enter` is inlined: the call takes 9 % of a task's
        # instructions.
        if name is None:
            name = coro.__name__
            counts = self._counts
            numbered = counts.get(name)
            if numbered is None:
                key: Key = self._first_key(name)
            else:
                key = numbered
                counts[name] = numbered + 1
        elif self._is_free(name):
            key = name
        else:
            return self._create_with(coro, name, priority, options)
        span = context = None
        # Reading the provider first saves two calls without tracing, 2 % of a task.
        if ledger.telemetry.tracing._TRACER_PROVIDER is not None:
            context, span = self._traced(name, key, coro, priority)
        eager = options or ledger.eager_start
        # Built directly: create_task() of the loop would make a task of another class.
        if eager:
            # Its first step runs below, when the task is in the tables.
            task: ManagedTask[Any] = new_task(ManagedTask)
        elif context is None:
            task = ManagedTask(coro, loop=loop, name=name)
        else:
            task = ManagedTask(coro, loop=loop, name=name, context=context)
        task._group = self  # type: ignore[assignment]  # every Creation is a TaskGroup
        task._key = key
        task._priority = priority
        task._created_at = clock()
        task._span = span
        task._cause = None
        task._extras = None
        task._waiters = 0
        ledger.created += 1
        self._names[key] = task
        if not self._is_one_table:
            # See `_enter`.
            self._live[key] = task
            if not self._linked:
                cast("TaskGroup", self._parent)._link(cast("TaskGroup", self))
        if eager:
            run_first_step(task, coro, loop, name, context)
        else:
            add_done_callback(task, ledger.on_done, context=ledger.context)
        return task

    def _traced(
        self, base: str, key: Key, coro: Coroutine[Any, Any, Any], priority: TaskPriority
    ) -> tuple[Context | None, Span | None]:
        """Return the context and the span of a plain task; both None without an SDK."""
        tracer = self._ledger.telemetry.tracer()
        if tracer is None:
            return None, None
        context = copy_context()
        return context, context.run(start_task_span, self, tracer, base, key, coro, priority, None)

    def _create_with(
        self, coro: Any, name: str | None, priority: TaskPriority | int, options: Any
    ) -> ManagedTask[Any]:
        """Create a task on the slow path, with options that may include an unknown one."""
        if not options.keys() <= RetriedTaskOptions.__annotations__.keys():
            close_quietly(coro)
            check_options("create_task", options)
        if "retry" in options or self._ledger.options:
            coro = self._retried(coro, options.pop("retry", None))
        group = self if self._refusal is None else self._open_group()
        return group._create(coro, name, priority, **options)

    def _retried(self, work: Any, policy: RetryPolicy | None, function: str = "create_task") -> Any:
        """Return ``work``, or the coroutine of all its attempts if the call or this group has a policy."""
        own = self._ledger.options.get(self)
        default = None if own is None else own.retry
        return retried_in_group(work, policy, default, function, self)

    def _enter(
        self,
        task: ManagedTask[Any],
        key: Key,
        priority: TaskPriority,
        created_at: float,
        span: Span | None,
        extras: Extras | None,
    ) -> None:
        """Fill the slots of a task, and enter it in the tables."""
        task._group = self  # type: ignore[assignment]  # every Creation is a TaskGroup
        task._key = key
        task._priority = priority
        task._created_at = created_at
        task._span = span
        task._cause = None
        task._extras = extras
        task._waiters = 0
        self._ledger.created += 1
        self._names[key] = task
        if not self._is_one_table:
            # A label, whose names are the root's, or a group that has left the tree. Both have a parent.
            self._live[key] = task
            if not self._linked:
                cast("TaskGroup", self._parent)._link(cast("TaskGroup", self))

    def _loop_for(self, coro: object, name: str | None) -> asyncio.AbstractEventLoop:
        """Check that the group can create a task of ``coro`` here, and return the loop for it."""
        check_coroutine(coro)
        ledger = self._ledger
        loop = _get_running_loop()
        if loop is None or loop is not ledger.home.loop or ledger.home.closed:
            loop = ledger.home.enter()
        if self._refusal is not None:
            self._raise_closed(name or function_name(coro))
        return loop

    def _own_context(self, context: Context | None, *, traced: bool) -> Context | None:
        """Return a new context for the task if it needs changes, else the given one.

        A context that the user has passed is copied too: it may serve more than this task.
        """
        bound = binding_here() if context is None else context.get(current_binding)
        is_stranger = bound is not None and bound is not (self._binding or self)
        if not is_stranger and not traced:
            return context
        context = copy_context() if context is None else context.copy()
        if is_stranger:
            context.run(current_binding.set, self._binding or cast("TaskGroup", self))
        return context

    def _limiters(self) -> tuple[Limiter, ...]:
        """The limiters that a new task counts against: the group's own, and the manager's."""
        shared = self._ledger.places.limiter
        if self._limiter is None:
            return (shared,) if shared.limit is not None else ()
        return (self._limiter, shared) if shared.limit is not None else (self._limiter,)

    def _check_queue(self, limiters: tuple[Limiter, ...], name: str | None, coro: object = None) -> None:
        full = full_limiter(limiters)
        if full is not None:
            whose = f"group {self.id!r}" if full is self._limiter else f"manager {self._ledger.name!r}"
            raise QueueFullError(
                f"cannot create task {name or function_name(coro)!r}: {full.waiting} tasks already wait for "
                f"a place in {whose} (max_concurrency={full.limit}, max_queue={full.max_queue}); "
                "wait for room with await put_task(...), or do without it"
            )

    def _claim(
        self,
        limiters: tuple[Limiter, ...],
        extras: Extras | None,
        priority: TaskPriority,
        now: float,
        loop: asyncio.AbstractEventLoop,
    ) -> Extras:
        """Claim a place for the task; without a free one it will wait."""
        extras = extras or Extras()
        extras.queue = self
        extras.ticket = ticket = Ticket(limiters, priority, now, self._ledger.places.ageing, extras)
        if not admit(ticket):
            extras.place_granted = loop.create_future()
            self._queued += 1
        return extras

    async def _room(self) -> None:
        """Wait until a new task may join the queue, or never can."""
        self._ledger.home.enter()
        await self._ledger.places.wait_for_room(self)

    def _is_full(self) -> bool:
        """True if a new task would be refused now, but not forever."""
        return (
            self._refusal is None
            and not self._ledger.home.closed
            and full_limiter(self._limiters()) is not None
        )

    def _start_late_span(
        self, coro: Coroutine[Any, Any, Any], new_trace: bool | None, task: ManagedTask[Any], starts: bool
    ) -> None:
        """Start the span of a task that had to wait, in its own context, with the time of its creation.

        Args:
            coro: The user's coroutine.
            new_trace: Whether the span starts a new trace; None leaves that to the manager.
            task: The task; it has got its place, or was cancelled before that.
            starts: The task has got its place.
        """
        ledger = self._ledger
        tracer = ledger.telemetry.tracer()
        extras = task._extras
        now = ledger.home.clock()
        waited = now - task._created_at
        if extras is not None and starts:
            extras.started_at = now
        if tracer is not None:
            created = time.time_ns() - int(waited * 1e9)
            task._span = start_task_span(
                self,
                tracer,
                base_name(task),
                task._key,
                coro,
                task._priority,
                new_trace,
                start_time=created,
            )
        if starts:
            report_dequeued(ledger, task, waited)


def run_first_step(
    task: ManagedTask[Any],
    work: Coroutine[Any, Any, Any],
    loop: asyncio.AbstractEventLoop,
    base: str,
    context: Context | None,
) -> None:
    """Run the first step of a task that is already in the tables."""
    ledger = task._group._ledger
    try:
        init_task(task, work, loop=loop, name=base, context=context, eager_start=True)
    finally:
        # Also if the step raises SystemExit through this frame, which ends the task.
        if not task.done() or task.cancelled() or not ledger.ending.on_done(task, True):
            add_done_callback(task, ledger.on_done, context=ledger.context)
            if task.done():
                # For one turn it is in the group without a coroutine: extras tell `request_cancel_all`.
                extras_of(task)
