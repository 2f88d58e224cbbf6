"""How a group creates a task: its name, its place under a limit, its span and its context.

The functions belong to ``TaskGroup``, which has those as methods that others call.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from asyncio import _get_running_loop
from contextvars import Context, copy_context
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict, TypeVar

from otel_tasks._core.binding import current_binding
from otel_tasks._core.cancellation import CancelCause
from otel_tasks._core.checks import (
    check_choice,
    checked_name,
    checked_priority,
    checked_seconds,
    is_plain_name,
)
from otel_tasks._core.current import is_request_over, stand_in
from otel_tasks._core.factory import make
from otel_tasks._core.futures import create_in_loop
from otel_tasks._core.places import Limiter, Ticket, admit, would_wait
from otel_tasks._core.state import CancelKind, TaskPriority
from otel_tasks._core.task import (
    Extras,
    ManagedTask,
    add_done_callback,
    base_name,
    by_name,
    extras_of,
    full_name,
    init_task,
    request_cancel,
    run_when,
    snapshot,
    wait_until_done,
    with_predecessors,
)
from otel_tasks._core.telemetry import (
    CODE_FUNCTION,
    GROUP_ID,
    GROUP_NAME,
    MANAGER_NAME,
    TASK_ID,
    TASK_NAME,
    TASK_PRIORITY,
    low_cardinality,
    start_span,
)
from otel_tasks._core.threads import in_thread
from otel_tasks._core.tree import add
from otel_tasks.exceptions import GroupClosedError, QueueFullError, TaskExistsError

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable, Coroutine, Mapping

    from otel_tasks._core.factory import Made
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.ledger import Ledger
    from otel_tasks._core.telemetry import Span, Tracer

T = TypeVar("T")
F = TypeVar("F", bound="Callable[..., Any]")

EAGER = sys.version_info >= (3, 12)
OnConflict = Literal["error", "suffix", "return", "replace"]


class TaskOptions(TypedDict, total=False):
    """What few give to ``create_task``: one dictionary, or none, is passed on, not nine arguments."""

    timeout: float | None
    queue_timeout: float | None
    metadata: Mapping[str, Any] | None
    on_conflict: OnConflict
    detached: bool
    context: Context | None
    eager_start: bool | None


class NamedTaskOptions(TaskOptions, total=False):
    """The options of ``create_task``, for functions that pass them on."""

    name: str | None
    priority: TaskPriority | int


def create_with(
    group: TaskGroup,
    coro: Coroutine[Any, Any, T],
    name: str | None,
    priority: TaskPriority | int,
    options: TaskOptions,
) -> ManagedTask[T]:
    """Create a task with the options of a caller, who may have given one that there is not."""
    if not options.keys() <= TaskOptions.__annotations__.keys():
        close_quietly(coro)
        check_options("create_task", options)
    return create(group, coro, name, priority, **options)


def create(
    group: TaskGroup,
    coro: Coroutine[Any, Any, T],
    name: str | None = None,
    priority: TaskPriority | int = TaskPriority.NORMAL,
    timeout: float | None = None,
    queue_timeout: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    on_conflict: OnConflict = "suffix",
    detached: bool = False,
    context: Context | None = None,
    eager_start: bool | None = None,
    keep_result: bool = False,
    supervises: bool = False,
) -> ManagedTask[T]:
    """Create a task in ``group``; what its options mean stands at ``TaskManager.create_task``."""
    if group._refusal is not None:
        group = stand_in(group)
    if current_binding.get() is not None:
        detached = detached or is_request_over()
    ledger = group._ledger
    extras = None
    work = coro
    try:
        loop = loop_for(group, coro, name)
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
            taken = holder(group, name)
        if taken is not None and on_conflict == "return":
            coro.close()
            return taken
        if taken is not None and on_conflict == "error":
            refuse_name(group, taken)
        limited = not supervises and bool(limiters(group))
        if limited:
            # Before the name is taken: that may cancel the one which has it.
            check_queue(group, name or function_name(coro))
        base, key, previous = chosen_name(group, coro, name, taken, on_conflict)
        created_at = ledger.clock()
        if limited:
            extras = extras or Extras()
            claim(group, extras, priority, created_at, loop)
        factory = ledger.factories._task_factory
        if factory is not None and not supervises:
            made = make(factory, loop, coro, name, context)
            if made is not None:
                work = made.coro
                extras = note_made(made, coro, extras)
                if eager_start is None and made.eager:
                    eager_start = True
        if previous or (
            extras is not None and (extras.seconds is not None or extras.place_granted is not None)
        ):
            extras = extras or Extras()
            work = run_when(work, extras, previous, created_at, ledger.other_clock)
        tracer = None if supervises else ledger.telemetry.tracer()
        context = own_context(group, context, traced=tracer is not None)
        span = None
        if extras is not None and extras.place_granted is not None:
            # The span of a task that queues is begun when it gets its place.
            extras.context = None if tracer is None else context
            extras.begin = partial(begin_late, group, coro, detached)
        elif tracer is not None and context is not None:
            span = context.run(start_task_span, group, tracer, base, key, coro, priority, detached)
        eager = (
            EAGER
            and (ledger.eager_start if eager_start is None else eager_start)
            and (context is None or is_free(context))
        )
        # Built directly: create_task() of the loop would make a task of another class.
        task = (
            ManagedTask.__new__(ManagedTask)
            if eager
            else ManagedTask(work, loop=loop, name=base, context=context)
        )
    except BaseException:
        if extras is not None and extras.ticket is not None:
            ledger.give_back(extras.ticket)
        if extras is not None:
            extras.close()
        close_quietly(work)
        close_quietly(coro)
        raise
    enter(task, group, key, priority, created_at, span, extras)
    if eager:
        if ledger.listeners:
            work = told_first(work, ledger)
        run_first_step(task, work, loop, base, context)
        return task
    add_done_callback(task, ledger.on_done, context=ledger.context)
    if ledger.listeners:
        ledger.notify("created", snapshot(task))
    return task


def with_options_of(source: Callable[..., Any]) -> Callable[[F], F]:
    """Show in the signature of a function the options that it passes on to ``source``, with their defaults.

    ``help()`` and ``inspect`` then show what an editor finds in the ``TypedDict``.

    Rejected: to write them out in each signature. Every task would then have its seven defaults looked at:
    267 instructions instead of 253 for a task in a group (``benchmarks.cost``, Python 3.11).
    """
    known = inspect.signature(source).parameters.values()

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        taken = {each.name for each in own}
        passed_on = [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in known
            if each.name in NamedTaskOptions.__annotations__ and each.name not in taken
        ]
        vars(function)["__signature__"] = signature.replace(parameters=[*own, *passed_on])
        return function

    return show


def create_eagerly(
    group: TaskGroup,
    coro: Coroutine[Any, Any, T],
    base: str,
    key: str | int,
    priority: TaskPriority,
    span: Span | None,
    context: Context | None,
) -> ManagedTask[T]:
    """Create a plain task and run its first step (Python 3.12)."""
    ledger = group._ledger
    task: ManagedTask[T] = ManagedTask.__new__(ManagedTask)
    enter(task, group, key, priority, ledger.clock(), span, None)
    run_first_step(task, coro, ledger.fast_path_loop, base, context)
    return task


def enter(
    task: ManagedTask[Any],
    group: TaskGroup,
    key: str | int,
    priority: TaskPriority,
    created_at: float,
    span: Span | None,
    extras: Extras | None,
) -> None:
    """Fill in a task and enter it in the tables of its group."""
    task._group = group
    task._key = key
    task._priority = priority
    task._created_at = created_at
    task._span = span
    task._cause = None
    task._extras = extras
    task._waiters = 0
    group._ledger.created += 1
    add(group, key, task)


def note_made(made: Made, coro: Coroutine[Any, Any, Any], extras: Extras | None) -> Extras | None:
    """Note what a task factory has made of a coroutine, if it is more than the coroutine itself."""
    if made.coro is coro and made.shadow is None:
        return extras
    extras = extras or Extras()
    extras.inner = coro
    extras.made = made
    return extras


def loop_for(group: TaskGroup, coro: object, name: str | None) -> asyncio.AbstractEventLoop:
    """The loop in which the group creates a task of ``coro``, if it does."""
    check_coroutine(coro)
    ledger = group._ledger
    loop = _get_running_loop()
    if loop is None or loop is not ledger.loop or ledger.closed:
        loop = ledger.enter()
    if group._refusal is not None:
        refuse(group, name or function_name(coro))
    return loop


def check_context(context: object) -> None:
    if not isinstance(context, Context):
        raise TypeError(
            f"context must be a contextvars.Context, got {context!r}: write contextvars.copy_context()"
        )


def wanted_extras(
    timeout: float | None,
    queue_timeout: float | None,
    metadata: Mapping[str, Any] | None,
    *,
    keep_result: bool,
    supervises: bool,
) -> Extras | None:
    """What a task with these options needs beside the slots; None for one that has none of them."""
    if timeout is None and queue_timeout is None and metadata is None and not keep_result:
        return None
    extras = Extras(
        metadata,
        keep_result,
        checked_seconds("timeout", timeout),
        checked_seconds("queue_timeout", queue_timeout),
    )
    # A supervisor always keeps its result: no other task has to be asked.
    extras.supervises = supervises
    return extras


def chosen_name(
    group: TaskGroup,
    coro: object,
    name: str | None,
    taken: ManagedTask[Any] | None,
    on_conflict: OnConflict,
) -> tuple[str, str | int, tuple[asyncio.Task[Any], ...]]:
    """Decide what asyncio calls a task, its key, and after which tasks it may begin."""
    if name is None:
        base = function_name(coro)
        return base, next_free(group, base), ()
    previous: tuple[asyncio.Task[Any], ...] = ()
    if taken is not None:
        name, previous = make_way(group, name, taken, on_conflict)
    # As `note_name()`, without the call.
    if name[-1].isdecimal():
        group._ledger.lookalikes = True
    return name, name, previous


def own_context(group: TaskGroup, context: Context | None, *, traced: bool) -> Context | None:
    """A context for the new task alone, if something has to be put into it; else the one that was given.

    One that the user passed is copied, too: they may use it for more than this task.
    """
    bound = current_binding.get() if context is None else context.get(current_binding)
    is_stranger = bound is not None and bound is not (group._binding or group)
    if not is_stranger and not traced:
        return context
    context = copy_context() if context is None else context.copy()
    if is_stranger:
        context.run(current_binding.set, group._binding or group)
    return context


def run_first_step(
    task: ManagedTask[Any],
    work: Coroutine[Any, Any, Any],
    loop: asyncio.AbstractEventLoop,
    base: str,
    context: Context | None,
) -> None:
    """Run the first step of a task that is in the books already, eagerly (Python 3.12)."""
    ledger = task._group._ledger
    try:
        init_task(task, work, loop=loop, name=base, context=context, eager_start=True)
    finally:
        # Also where the step raises SystemExit through us: the task has ended by that. A
        # failure is booked a turn later, as any: whoever awaits it has it by then.
        if task.done() and not task.cancelled() and task._exception is None:
            ledger.on_done(task)
        else:
            add_done_callback(task, ledger.on_done, context=ledger.context)
            if task.done():
                # It stays here for a turn without a coroutine: not plain, for `ask_all`.
                extras_of(task)


def start_task_span(
    group: TaskGroup,
    tracer: Tracer,
    base: str,
    key: str | int,
    coro: Coroutine[Any, Any, Any],
    priority: TaskPriority,
    detached: bool,
    start_time: int | None = None,
) -> Span | None:
    """Start a task's span, inside the context made for the task."""
    name = low_cardinality(base)
    full = full_name(base, key)
    group_name, group_id, scoped = group._label or group._labels()
    attributes = {
        TASK_NAME: name,
        TASK_ID: f"{group_id}/{full}" if scoped else full,
        TASK_PRIORITY: int(priority),
        GROUP_NAME: group_name,
        GROUP_ID: group_id,
        MANAGER_NAME: group._ledger.name,
        CODE_FUNCTION: code_name(coro),
    }
    try:
        parent = None if group._span is None else group._span.parent()
        return start_span(tracer, name, attributes, parent=parent, detached=detached, start_time=start_time)
    except Exception:
        group._ledger.log_once("starting a span for task %r raised", full)
        return None


def hand_over_to(
    group: TaskGroup,
    work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    where: Callable[[], TaskGroup],
    options: NamedTaskOptions,
) -> concurrent.futures.Future[T]:
    """Have a task created in the loop, by the group that ``where`` gives there."""
    try:
        if not asyncio.iscoroutine(work) and not callable(work):
            raise TypeError(
                "create_task_threadsafe() takes a coroutine, or a function that makes one, "
                f"got {work!r}: write create_task_threadsafe(work(...)) with `async def work(...)`"
            )
        check_options("create_task_threadsafe", options)
        loop = group._ledger.loop_for_others()
        if group._refusal is not None:
            refuse(group, options.get("name") or function_name(work))
    except BaseException:
        close_quietly(work)
        raise
    return create_in_loop(loop, work, lambda coro: where().create_task(coro, **options))


def limiters(group: TaskGroup) -> tuple[Limiter, ...]:
    """What a new task has to pass: the group's own limit, and the manager's."""
    shared = group._ledger.limiter
    if group._limiter is None:
        return (shared,) if shared.limit is not None else ()
    return (group._limiter, shared) if shared.limit is not None else (group._limiter,)


def full_limiter(group: TaskGroup) -> Limiter | None:
    """The limiter in whose queue a new task would have to stand, and may not."""
    passed = limiters(group)
    if not would_wait(passed):
        return None
    return next((limiter for limiter in passed if limiter.queue_full), None)


def check_queue(group: TaskGroup, name: str) -> None:
    full = full_limiter(group)
    if full is not None:
        whose = f"group {group.id!r}" if full is group._limiter else f"manager {group._ledger.name!r}"
        raise QueueFullError(
            f"cannot create task {name!r}: {full.waiting} tasks wait for a place in {whose} already "
            f"(max_concurrency={full.limit}, max_queue={full.max_queue}); "
            "wait for room with await put_task(...), or do without it"
        )


def claim(
    group: TaskGroup, extras: Extras, priority: TaskPriority, now: float, loop: asyncio.AbstractEventLoop
) -> Ticket:
    """Claim a place, and make the gate at which the task waits if there is none."""
    payload = (group, extras)
    extras.ticket = ticket = Ticket(limiters(group), priority, now, group._ledger.ageing, payload)
    if not admit(ticket):
        extras.place_granted = loop.create_future()
        group._queued += 1
    return ticket


async def wait_for_room(group: TaskGroup) -> None:
    """Wait until a new task may stand in the queue, or none will ever."""
    ledger = group._ledger
    ledger.enter()
    if not ledger.line_is_busy and not stands_in_line(group):
        return
    stand = ledger.waiting_producers.append
    while True:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stand((group, waiter))
        # Those before it may all wait for room elsewhere.
        ledger.wake_producer()
        try:
            await waiter
        finally:
            ledger.putter_left(waiter)
        if not stands_in_line(group):
            return
        # Somebody who did not stand in line was faster: again, and at its head.
        stand = ledger.waiting_producers.appendleft


def stands_in_line(group: TaskGroup) -> bool:
    """True if a new task would be refused now, but not for ever."""
    return group._refusal is None and not group._ledger.closed and full_limiter(group) is not None


def begin_late(
    group: TaskGroup, coro: Coroutine[Any, Any, Any], detached: bool, task: ManagedTask[Any]
) -> None:
    """Begin the span of a task that had to wait, inside its own context, as of its creation."""
    ledger = group._ledger
    tracer = ledger.telemetry.tracer()
    extras = task._extras
    waited = ledger.clock() - task._created_at
    if tracer is not None:
        created = time.time_ns() - int(waited * 1e9)
        task._span = start_task_span(
            group,
            tracer,
            base_name(task),
            task._key,
            coro,
            task._priority,
            detached,
            start_time=created,
        )
    if extras is not None and extras.started_at is not None:
        ledger.dequeued(task, waited)


def next_free(group: TaskGroup, base: str) -> int:
    """The next number that makes a free name of ``base``."""
    number = group._ledger.next_number()
    # Taken only where somebody has called a task just that; who numbers tasks of their own takes many.
    while f"{base}-{number}" in group._names:
        number = group._ledger.next_number()
    return number


def numbered(group: TaskGroup, base: str) -> str:
    """A free name that begins with ``base``."""
    return f"{base}-{next_free(group, base)}"


def is_free_name(ledger: Ledger, names: Mapping[str | int, ManagedTask[Any]], name: object) -> bool:
    """True if no task stands under this name, and it is one."""
    if type(name) is not str or by_name(names, name) is not None or not is_plain_name(name):
        return False
    # As `ledger.note_name(name)`, without the call.
    if name[-1].isdecimal():
        ledger.lookalikes = True
    return True


def holder(group: TaskGroup, name: str) -> ManagedTask[Any] | None:
    """The live task that has this name."""
    task = by_name(group._names, name)
    # One that is done gives its name up, even if its done-callback is still to come.
    return None if task is None or task.done() else task


def admit_name(group: TaskGroup, name: str, on_conflict: OnConflict) -> None:
    """Raise what ``creation`` would raise for a task of this name, before its coroutine is made."""
    group = stand_in(group)
    group._ledger.enter()
    if group._refusal is not None:
        refuse(group, name)
    check_choice("on_conflict", on_conflict, OnConflict)
    taken = holder(group, name)
    if taken is not None and on_conflict == "error":
        refuse_name(group, taken)
    if taken is None or on_conflict != "return":
        check_queue(group, name)


def refuse_name(group: TaskGroup, taken: ManagedTask[Any]) -> NoReturn:
    raise TaskExistsError(
        f"cannot create task {taken.name!r}: one of that name is {taken.status} "
        f"in group {taken.group.id!r}; "
        'wait for it, choose another name, or pass on_conflict="suffix", "return" or "replace"'
    )


async def clear_name(group: TaskGroup, name: str, reason: str) -> None:
    """Cancel the live task of this name, if there is one, and wait until it has ended.

    Raises:
        RuntimeError: It is the calling task.

    Cancellation: of the caller ends the waiting; the task stays cancelled.
    """
    group = stand_in(group)
    group._ledger.enter()
    if group._refusal is not None:
        refuse(group, name)
    while (taken := holder(group, name)) is not None:
        if taken is asyncio.current_task():
            raise RuntimeError(
                f"task {name!r} cannot wait for its own end to be replaced: "
                'write create_task(..., on_conflict="replace"), which begins after it'
            )
        request_cancel(taken, CancelCause.make(CancelKind.REPLACED, reason))
        await wait_until_done(with_predecessors(taken))


def make_way(
    group: TaskGroup, name: str, taken: ManagedTask[Any], on_conflict: OnConflict
) -> tuple[str, tuple[asyncio.Task[Any], ...]]:
    """Decide the name of a task whose name is taken, and after which tasks it may begin."""
    if on_conflict == "suffix":
        second = f"{name}-2"
        return (second if holder(group, second) is None else numbered(group, name)), ()
    previous = with_predecessors(taken)
    # The old one keeps its place in the books under another name until it has ended.
    taken._rename_to(numbered(group, name))
    request_cancel(taken, CancelCause.make(CancelKind.REPLACED, f"replaced by a new task {name!r}"))
    return name, previous


def refuse(group: TaskGroup, name: str) -> NoReturn:
    if group._scope is not None and not group._scope.entered and group._cause is None:
        hint = "enter it first: async with group"
    elif group._binding is not None:
        hint = "work that outlives the request belongs in manager.create_task(..., group=...)"
    else:
        hint = "work that outlives the block belongs in manager.create_task(...)"
    raise GroupClosedError(f"cannot create task {name!r}: group {group.id!r} {group._refusal}; {hint}")


def rename(group: TaskGroup, task: ManagedTask[Any], name: str) -> str:
    old = task._key
    if group._live.get(old) is not task:
        # It has ended, and is in no table any more.
        return name
    key = name if holder(group, name) in (None, task) else numbered(group, name)
    group._ledger.note_name(key)
    for table in (group._live, group._names):
        table.pop(old, None)
        table[key] = task
    return key


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
        ledger.notify("created", snapshot(task))
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


def check_options(who: str, options: Mapping[str, Any]) -> None:
    """Raise what ``create_task`` would raise for its options, as far as it can be told without a loop.

    Raises:
        TypeError: There is no such option, or it is of the wrong type.
        ValueError: One is out of its range.
    """
    unknown = options.keys() - NamedTaskOptions.__annotations__.keys()
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
