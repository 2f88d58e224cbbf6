"""One request: its connection, its group, and what happens to both when its client leaves.

Its life, in the order of this file: it opens, its client leaves (or it does not), it finishes. How a
disconnect is noticed is in ``connection``; which native cancels have to wait is in ``suspension``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from otel_tasks._asgi.connection import ClientDisconnected, Connection, Message, Receive, Scope, Send
from otel_tasks._core import task as _task
from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.binding import Binding, current_binding, intercepted, stopping
from otel_tasks._core.causes import covered, known_cause, passing, unwatch_cancels, watch_cancels
from otel_tasks._core.clock import now
from otel_tasks._core.current import in_flight
from otel_tasks._core.events import CancelCause
from otel_tasks._core.log import log_fields_of_all, logger
from otel_tasks._core.request_group import REQUEST_ENDED, RequestGroup
from otel_tasks._core.state import CancelKind
from otel_tasks._core.suspension import (
    awaiters,
    call_when_moved,
    context_of,
    find_holder,
    forwarded_to,
    in_anyio_shield,
    interrupt,
    leave_wait_for,
    waits_for,
)
from otel_tasks._core.telemetry import annotate_request, current_span_context, note_disconnect, route_in
from otel_tasks.exceptions import GroupClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from contextvars import Context

    from otel_tasks._core.binding import Callback
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.manager import TaskManager
    from otel_tasks.asgi import TaskGroupMiddleware

CancelHandler: TypeAlias = "Literal['safe'] | bool | Callable[[Scope], bool]"
OnExit = Literal["cancel", "wait", "detach"]

# Methods without effects (RFC 9110, 9.2.1, and the QUERY draft): nothing is torn when their handler stops.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY"})
# What may stand in a group's name. A client may send any word as a method.
_KNOWN_METHODS = _SAFE_METHODS | {"POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"}
_ANSWER_TIMEOUT = 1.0
# Seconds in which cancelled tasks are to end; as long as cancel_group() waits.
_END_TIMEOUT = 10.0
# RFC 6455, 7.4.1: the client has closed the WebSocket in order (1000), or goes away (1001).
_CLOSED_BY_CLIENT = frozenset({1000, 1001})
# The server closes because it restarts (the IANA registry of close codes; uvicorn, hypercorn).
_CLOSED_BY_SERVER = frozenset({1012})
# What a request raises because of its own end: GroupClosedError for work that was to be started for a client
# that is gone; the CancelledError of concurrent.futures in a `def` handler that waited for a cancelled task.
_OUR_DEPARTURES = (
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    ClientDisconnected,
    GroupClosedError,
)
_NOBODY: frozenset[asyncio.Task[Any]] = frozenset()
# A ``def`` handler may ask for its request's group while the loop, or another thread, does.
_making = threading.RLock()


# The current task of a loop: before Python 3.12 the public function was written in Python, around
# just this table, and took 0.2 us of the 2 that a request is to cost.
_task_in: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = (
    asyncio.current_task if sys.version_info >= (3, 12) else vars(asyncio.tasks)["_current_tasks"].get
)


class Rules(NamedTuple):
    """The options that a middleware inside of another one decides for its part of the application."""

    cancel_handler: CancelHandler
    grace: float
    on_exit: OnExit


class Stop:
    """What is known of a request that is being stopped; made when its client leaves, or its tasks outlast it.

    Attributes:
        cause: Why.
        due: The grace is over: tasks and handler are cancelled as soon as nothing holds that off.
        asked: How many tasks were cancelled.
        cancels: How often the handler's task was cancelled, each to be taken back once.
        cancelled: The handler was cancelled.
        counts: ``cancelling()`` of tasks whose last cancellation has been dealt with, or came before. One
            that has more was cancelled since: that tells a cancellation which asyncio forwards from an
            explicit one.
        forwarding: Tasks whose cancellation has been dealt with in this turn of the loop. One that awaits
            several others, in ``gather``, forwards it to each.
        holders: The futures that hold a cancel off, and will call back.
    """

    __slots__ = (
        "asked",
        "cancelled",
        "cancels",
        "cause",
        "counts",
        "due",
        "forwarding",
        "holders",
    )

    def __init__(self, cause: CancelCause) -> None:
        self.cause = cause
        self.due = False
        self.asked = 0
        self.cancels = 0
        self.cancelled = False
        self.counts: dict[asyncio.Task[Any], int] = {}
        self.forwarding: set[asyncio.Task[Any]] = set()
        self.holders: set[asyncio.Future[Any]] = set()

    def note_counts(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Note how often tasks have been cancelled so far."""
        self.counts.update((task, task.cancelling()) for task in tasks)

    def is_forwarded_by(self, task: asyncio.Task[Any], awaited: asyncio.Task[Any]) -> bool:
        """True if a task that awaits another has been cancelled and hands that on to ``awaited`` just now."""
        if task in self.forwarding and waits_for(task) is not awaited:
            return True
        count = task.cancelling()
        if count <= self.counts.get(task, 0):
            return False
        self.counts[task] = count
        if not self.forwarding:
            task.get_loop().call_soon(self.forwarding.clear)
        self.forwarding.add(task)
        return True


class Request(Connection):
    """One request: its connection, its group, and the task in which its handler runs.

    Attributes:
        cancel_handler: What this request decided for itself; None leaves it to the rule.
        cause: Why it is being cancelled; None while it is not.
        group: Its group; None until somebody needs it.
        host: The task in which the server runs the application.
        rules: The options in force, those of the innermost middleware.
        settings: The outermost middleware.
    """

    __slots__ = (
        "_cancels_before",
        "_cleanup",
        "_context",
        "_sheltered",
        "_stop",
        "cancel_handler",
        "cause",
        "group",
        "host",
        "rules",
        "settings",
    )

    group: RequestGroup | None
    cause: CancelCause | None
    cancel_handler: bool | None
    _stop: Stop | None
    _cleanup: Cleanup | None
    # The tasks that are in uncancellable(), and in how many blocks each.
    _sheltered: dict[asyncio.Task[Any] | None, int] | None

    def __init__(self, settings: TaskGroupMiddleware, scope: Scope, receive: Receive, send: Send) -> None:
        # Made for each request: every line here was measured.
        # None on a server that runs coroutines without an asyncio task.
        loop = asyncio.get_running_loop()
        self.host = host = _task_in(loop)
        sweeper = settings.sweeper
        if sweeper is None or sweeper.loop is not loop:
            sweeper = settings.new_sweeper(loop)
        self.scope = scope
        self.sweeper = sweeper
        self._server_receive = receive
        self._server_send = send
        self.started = self.complete = self.left = self.closed = False
        self._reading = self._ripe = self._body_ended = self._trailers = False
        self._buffered = 0
        self._watcher = self._buffer = self._last = self._waiting = self.send_error = None
        # As `sweeper.add(self)`, without the call.
        self._sweep = sweep = sweeper._new
        sweep.add(self)
        if sweeper._timer is None:
            sweeper._arm()
        self.group = self.cause = self.cancel_handler = None
        self._stop = self._cleanup = self._sheltered = None
        self.settings = settings
        self.rules = settings.rules
        # For the server's span, which is current here and not where the disconnect is noticed.
        self._context = copy_context()
        self._cancels_before = 0 if host is None else host.cancelling()
        self.told = _NOBODY

    # It opens: its group.

    @property
    def manager(self) -> TaskManager:
        """The manager below whose root its group hangs."""
        return self.settings.manager

    @property
    def task_group(self) -> TaskGroup:
        """The group that new tasks join: the request's, made on first use; the manager's once it is over."""
        group = self.group
        return group if group is not None and not self.closed else self._late_group()

    def own_group(self) -> RequestGroup:
        """The request's own group, made on first use."""
        return self.group if self.group is not None else self._make_group()

    @property
    def _request(self) -> Request:
        return self

    def _late_group(self) -> TaskGroup:
        return self.manager.get_group("root") if self.over else self.own_group()

    def _make_group(self) -> RequestGroup:
        with _making:
            if self.group is not None:
                return self.group
            group = self._open_group(self._name, self)
            if self.host is not None and not self.closed:
                watch_cancels(self.host, self)
            # Before the looks at what has happened: the loop notes that before it looks for a group.
            self.group = group
            if self.cause is not None:
                group.signal_cancel(self.cause)
            if self.closed:
                over = self.cause or self._make_cause(CancelKind.SCOPE_ENDED)
                group.seal(over, refuse=self.left or self.rules.on_exit != "detach")
            return group

    def _open_group(self, name: Callable[[], str], binding: Binding) -> RequestGroup:
        return RequestGroup.open(
            self.manager, name, binding=binding, host=self.host, span=self.settings.span and binding is self
        )

    @property
    def name(self) -> str:
        """Its route."""
        return self._name()

    def _name(self) -> str:
        method = "WS" if self.scope["type"] == "websocket" else self.scope["method"]
        method = method if method in _KNOWN_METHODS or method == "WS" else "HTTP"
        template = _route_template(self.scope) or route_in(self._context)
        return f"{method} {template}" if template else method

    def _make_cause(self, kind: CancelKind, message: str | None = None) -> CancelCause:
        # Whatever task notices it, the request is what asks.
        origin = current_span_context(self._context)
        return CancelCause(kind, message, self._name(), now(), origin)

    @contextmanager
    def ruled_by(self, rules: Rules) -> Generator[None]:
        """Put the rules of a second middleware in force for the part of the application below it."""
        before, self.rules = self.rules, rules
        try:
            yield
        finally:
            # Both share one group, which ends after both: the inner rule for that stays.
            self.rules = before._replace(on_exit=rules.on_exit)

    # Its client leaves.

    def on_disconnect(self, message: Message) -> None:
        """Set the event, then cancel, at once or after the grace."""
        self.cause = self._make_cause(*_kind_of(message))
        self._begin_stop(self.cause)
        if self.cause.kind is CancelKind.CLIENT_DISCONNECT:
            note_disconnect(self._context)
        if self.group is not None:
            self.group.signal_cancel(self.cause)
        if self.rules.grace:
            self.sweeper.call_later(self.rules.grace, self._stop_work)
        else:
            self._stop_work()

    def _begin_stop(self, cause: CancelCause) -> None:
        self._stop = stop = Stop(cause)
        stop.note_counts(() if self.host is None else [self.host])
        stopping.add(self)

    def end_stop(self) -> None:
        """Let go of the tasks: what outlives the request keeps it, by its context, for as long."""
        stopping.discard(self)
        if self._stop is not None:
            self._stop.counts.clear()

    def _stop_work(self) -> None:
        if self._stop is not None:
            self._stop.due = True
        self._cancel_what_may_be()

    def _cancel_what_may_be(self) -> None:
        # Tasks first: the handler's cancel goes through it into the task that it awaits.
        self._cancel_the_group()
        self._cancel_the_handler()

    def _cancel_the_group(self) -> None:
        """Cancel the tasks of the group, except for those that something holds off for now.

        A task in ``uncancellable()`` takes note and is cancelled at the end of the block. A task in a
        shielded scope of anyio would be torn by a native cancel, so it is asked once it has left the scope.
        A task that has learned of the disconnect ends by itself. A task that awaits one of them would forward
        its own cancellation to it.
        """
        stop, group = self._stop, self.group
        if stop is None or group is None:
            return
        tasks = [task for task in group.live_tasks() if not task.done()]
        shielded = {task for task in tasks if _task.is_shielded(task)}
        scoped = [task for task in tasks if task._cause is None and in_anyio_shield(task)]
        for task in scoped:
            self._wait_for_move_of(task, stop)
        spared = with_awaiters(*shielded, *scoped, *(() if self.closed else self.told)) - shielded
        stop.note_counts(task for task in tasks if task not in stop.counts)
        with self._sparing(forwarded_to(tasks, self._is_spared).stops):
            stop.asked += group.cancel_tasks(stop.cause, spared=spared)
        stop.note_counts(tasks)

    def _wait_for_move_of(self, holder: asyncio.Future[Any], stop: Stop) -> None:
        """Go on once ``holder``, which holds a cancel off, no longer does."""
        # Several cancels may wait for one, and each look finds all of them: without this they would multiply.
        if holder not in stop.holders:
            stop.holders.add(holder)
            call_when_moved(holder, lambda: self._holder_has_moved(holder, stop))

    def _holder_has_moved(self, holder: asyncio.Future[Any], stop: Stop) -> None:
        stop.holders.discard(holder)
        if isinstance(holder, asyncio.Task) and not holder.done() and in_anyio_shield(holder):
            self._wait_for_move_of(holder, stop)
        else:
            self._cancel_what_may_be()

    def _cancel_the_handler(self) -> bool:
        """Cancel the handler's task, unless it is to be left alone; later, if something holds that off now.

        Returns:
            True if the caller is that task.
        """
        stop, host = self._stop, self.host
        if stop is None or host is None or not stop.due or not self._is_cancellable(stop):
            return False
        forwarding = forwarded_to([host], self._is_spared)
        holder = find_holder(host, forwarding.passed)
        if holder is not None:
            self._wait_for_move_of(holder, stop)
            return False
        stop.cancelled = True
        stop.cancels += 1
        with self._sparing(forwarding.stops), passing(stop.cause):
            host.cancel(str(stop.cause))
        stop.note_counts([host])
        return host is asyncio.current_task()

    def _is_cancellable(self, stop: Stop) -> bool:
        # An application that listens ends in its own way, as without the middleware.
        return not (stop.cancelled or self.closed or self._sheltered or self.told) and self._may_cancel()

    def _may_cancel(self) -> bool:
        if self.cancel_handler is not None:
            return self.cancel_handler
        rule = self.rules.cancel_handler
        if isinstance(rule, bool):
            return rule
        return _ask(rule, self.scope) if callable(rule) else self.scope.get("method") in _SAFE_METHODS

    # What of it is not cancelled: work of others, and its own while a shield is open.

    def intercept(self, awaited: asyncio.Task[Any], message: object, callbacks: list[Callback]) -> bool:
        """Keep a cancellation that a task of this request forwards to ``awaited`` from going further.

        Where that is a task of others, the one that awaits it is woken instead. Where it is one of its own
        and has been cancelled already or is in ``uncancellable()``, its cleanup would be torn: the one that
        awaits it goes on waiting.
        """
        stop = self._stop
        if stop is None:
            return False
        spared = self._is_spared(awaited)
        if not spared and not self._is_cleaning_up(awaited):
            return False
        # A list first: interrupting one changes what is walked.
        if spared and self._is_its(copy_context()) and leave_wait_for(awaited):
            return True
        # Each once: a gather may wait for it several times, through others.
        ours = {
            awaiter.task: awaiter
            for awaiter in awaiters(awaited, callbacks)
            if self._is_its(awaiter.context) and stop.is_forwarded_by(awaiter.task, awaited)
        }
        for awaiter in ours.values() if spared else ():
            interrupt(awaiter, message)
        return bool(ours)

    def _is_spared(self, task: asyncio.Task[Any]) -> bool:
        """True for a task that does not belong to this request, or that cleans up for it."""
        if isinstance(task, _task.ManagedTask):
            return not _is_below(self.group, task._group)
        context = context_of(task)
        # A task that was started here and that others await, too, is shared.
        return (context is not None and not self._is_its(context)) or any(
            not self._is_its(awaiter.context) for awaiter in awaiters(task)
        )

    def _is_its(self, context: Context) -> bool:
        bound: Any = context.get(current_binding)
        return bound is not None and bound._request is self

    def _is_cleaning_up(self, task: asyncio.Task[Any]) -> bool:
        """True for a task of this request that has been cancelled once, or that a shield protects from it."""
        if isinstance(task, _task.ManagedTask) and task._cause is not None:
            return True
        return self._sheltered is not None and task in self._sheltered

    @contextmanager
    def _sparing(self, others: Iterable[asyncio.Task[Any]]) -> Generator[None]:
        """Keep tasks of others from being cancelled through tasks of this request that await them.

        ``ManagedTask.cancel`` asks the request itself. A plain task has asyncio's own method, which this
        covers on the instance for as long as the cancellation goes down.
        """
        # After the end of the request, too: a grace or a shield of anyio may outlast it.
        is_late = self not in stopping
        stopping.add(self)
        try:
            with ExitStack() as stack:
                for task in others:
                    if not isinstance(task, _task.ManagedTask):
                        stack.enter_context(covered(task, intercepted))
                yield
        finally:
            if is_late:
                stopping.discard(self)

    @contextmanager
    def sheltering(self, task: asyncio.Task[Any] | None) -> Generator[None]:
        """Hold the end of the request off ``task`` and the handler for the block, but for its delivery."""
        if self._sheltered is None:
            self._sheltered = {}
        self._sheltered[task] = self._sheltered.get(task, 0) + 1
        if isinstance(task, _task.ManagedTask):
            _task.shield(task)
            yield
        elif task is None:
            yield
        else:
            with covered(task, intercepted):
                yield

    def unshield(self, task: asyncio.Task[Any] | None) -> bool:
        """Let go at the end of the block; True when ``task`` was cancelled by it."""
        delivered = False
        if self._sheltered is not None:
            self._sheltered[task] -= 1
            if not self._sheltered[task]:
                del self._sheltered[task]
        if isinstance(task, _task.ManagedTask):
            before = task.cancelling()
            _task.unshield(task)
            delivered = task.cancelling() > before
            if delivered and self._stop is not None:
                self._stop.asked += 1
        # Those who listen may have it now.
        self._wake()
        if self._stop is not None and self._stop.due:
            # Those that were spared because they waited for this one.
            if any(map(self._is_to_be_cancelled, with_awaiters(task))):
                self._cancel_the_group()
            delivered |= self._cancel_the_handler()
        return delivered

    def _is_to_be_cancelled(self, waiting: asyncio.Future[Any]) -> bool:
        return (
            isinstance(waiting, _task.ManagedTask)
            and waiting._cause is None
            and _is_below(self.group, waiting._group)
        )

    def withholds(self) -> bool:
        """True while ``uncancellable()`` is open: a listener would break it by its own cancellation.

        Not from the code inside the block: it would wait for itself.
        """
        return bool(self._sheltered) and not isinstance(current_binding.get(), Cleanup)

    # It cleans up.

    @property
    def cleanup(self) -> Cleanup:
        """What is bound where it cleans up."""
        if self._cleanup is None:
            self._cleanup = Cleanup(self)
        return self._cleanup

    @property
    def over(self) -> bool:
        """It has ended, and the caller is neither its handler nor one of its tasks."""
        if not self.closed:
            return False
        try:
            task = asyncio.current_task()
        except RuntimeError:
            return True
        if isinstance(task, _task.ManagedTask):
            cleanup = None if self._cleanup is None else self._cleanup.group
            return not (_is_below(self.group, task._group) or _is_below(cleanup, task._group))
        return task is not self.host

    def stand_in(self, group: TaskGroup) -> TaskGroup:
        """The group for tasks that are created although ``group``, this request's, is closed.

        The manager's once the request is over. Its group for cleanup, if the caller cleans up: the exception
        that ends it is on its way; or the application has learned of the disconnect by itself, or has sent
        its response: then what it starts, it starts knowingly.
        """
        if self.over:
            return self.manager.get_group("root")
        inside = isinstance(current_binding.get(), Cleanup)
        if self.left and (inside or self.told or self.complete or in_flight(self._ends_code)):
            return self.cleanup.task_group
        return group

    def _ends_code(self, error: BaseException) -> bool:
        # GeneratorExit ends a body generator that is closed before its end.
        return isinstance(error, GeneratorExit) or self._is_departure(error)

    # It finishes: the application has returned or raised.

    async def finish(self, error: BaseException | None) -> bool:
        """End the group, and answer in the application's place if the client has left.

        Returns:
            False when ``error``, or for None somebody else's cancel, is to be raised.
        """
        self.close()
        if await self._take_back_cancels(error):
            await self._shut_down()
            return False
        await self._end_group(error)
        if not self.left or self._stop is None:
            return error is None
        annotate_request(self._context, *self._story(self._stop, error))
        if error is not None and not self._is_departure(error):
            return False
        await self._answer()
        return True

    def _story(self, stop: Stop, error: BaseException | None) -> tuple[str, int, str, int | None]:
        """What the server's span says of a request whose client has left: outcome, count, handler, code."""
        code = None if self._last is None else self._last.get("code")
        outcome = "closed" if stop.cause.kind is CancelKind.SCOPE_ENDED else str(stop.cause.kind)
        ended_by_it = stop.cancelled or (error is not None and _is_cancellation(error))
        handler = "cancelled" if ended_by_it else "finished" if self.told else "ran_on"
        return outcome, stop.asked, handler, code

    async def _take_back_cancels(self, error: BaseException | None) -> bool:
        """Undo the cancels of ours; True if somebody else has cancelled the handler's task as well."""
        if self.host is None:
            return False
        thrown = isinstance(error, asyncio.CancelledError)
        cancels = 0 if self._stop is None else self._stop.cancels
        if cancels and not thrown:
            # Swallowed, or still to be thrown: then here, where it does no harm.
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                thrown = True
        for _ in range(cancels):
            self.host.uncancel()
        return thrown and self.host.cancelling() > self._cancels_before

    async def _end_group(self, error: BaseException | None) -> None:
        group = self.group
        if group is None:
            return
        # A failing handler's 500 is still to be sent, by a layer outside: it does not wait for tasks.
        failed = error is not None and not self.complete
        on_exit = "cancel" if failed or self.left else self.rules.on_exit
        # Most requests: what they started has ended.
        if on_exit != "cancel" or self.left or self._cleanup is not None or not group.close_if_unused():
            await self._end_used_group(group, on_exit)
        if self.host is not None:
            unwatch_cancels(self.host)

    async def _end_used_group(self, group: RequestGroup, on_exit: OnExit) -> None:
        cancels = on_exit == "cancel"
        cause = self.cause or (self._make_cause(CancelKind.SCOPE_ENDED) if cancels else REQUEST_ENDED)
        if cancels and not self.left:
            group.signal_cancel(cause)
            if not group.is_empty:
                self._begin_stop(cause)
                self._stop_work()
        group.seal(cause, refuse=on_exit != "detach")
        if self.left and self._stop is not None and self._stop.due:
            # Those that were told had until now to end by themselves.
            self._cancel_the_group()
        try:
            if on_exit == "wait":
                await group.join()
            elif cancels and not group.is_empty:
                await self._wait_for_end([group])
            if self._cleanup is not None and self._cleanup.group is not None:
                await self._join_cleanup(self._cleanup.group)
        except asyncio.CancelledError:
            await self._shut_down()
            raise

    async def _join_cleanup(self, group: RequestGroup) -> None:
        await self._wait_for_end([group])
        # What is late runs on, and may create further tasks; a shutdown of the manager reaches it.
        group.seal(refuse=False)

    async def _wait_for_end(self, groups: list[RequestGroup]) -> None:
        """Wait for tasks to end, but not forever: a response may depend on it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _END_TIMEOUT
        # In a loop: cleanup may start further tasks.
        while tasks := [task for group in groups for task in group.live_tasks()]:
            # A block of uncancellable() takes as long as it takes.
            timeout = None if self._sheltered else max(0.0, deadline - loop.time())
            await _task.wait_until_done(tasks, timeout)
            live = [task.id for task in tasks if not task.done()]
            if live and loop.time() >= deadline and not self._sheltered:
                logger.warning(
                    "request %r is over, and after %s s its tasks still run: %s",
                    self.own_group().id,
                    _END_TIMEOUT,
                    ", ".join(map(repr, live)),
                    extra=log_fields_of_all(live),
                )
                return

    @property
    def cancelled_from_outside(self) -> bool:
        """Its handler's task has been cancelled, and not by the request itself."""
        host = self.host
        cancels = 0 if self._stop is None else self._stop.cancels
        return host is not None and host.cancelling() > self._cancels_before + cancels

    def cause_of_shutdown(self, message: str | None = None) -> CancelCause:
        """The cause of what ends because the server has cancelled the handler's task."""
        return self._make_cause(CancelKind.SHUTDOWN, message)

    async def _shut_down(self) -> None:
        if self.group is None:
            return
        cause = None if self.host is None else known_cause(self.host)
        if cause is None or cause is self.cause:
            cause = self.cause_of_shutdown()
        cleanup = None if self._cleanup is None else self._cleanup.group
        groups = [self.group] if cleanup is None else [self.group, cleanup]
        for group in groups:
            group.signal_cancel(cause)
            group.cancel_tasks(cause)
            group.seal(cause)
        try:
            await self._wait_for_end(groups)
        finally:
            if self.host is not None:
                unwatch_cancels(self.host)

    def _is_departure(self, error: BaseException) -> bool:
        """True for an exception that says no more than that the client has left."""
        if isinstance(error, BaseExceptionGroup):
            return all(
                self._is_departure(part) for part in cast("tuple[BaseException, ...]", error.exceptions)
            )
        if isinstance(error, _OUR_DEPARTURES):
            return True
        if self.scope["type"] == "websocket":
            # Frameworks make an exception of their own of it. What they raise after they have received the
            # message is the application's, as without the middleware.
            return isinstance(error.__context__, ClientDisconnected)
        return error is self.send_error or _is_starlettes_departure(error)

    async def _answer(self) -> None:
        if self.started or self.scope["type"] != "http":
            return
        # The client is gone: servers drop it (uvicorn), raise (uvloop: RuntimeError), or never return
        # (hypercorn with HTTP/2), but the layers in between have seen the status.
        with suppress(OSError, RuntimeError):
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                for message in _client_closed_request():
                    await self._server_send(message)


class Cleanup:
    """What is bound where a request cleans up: new tasks outlast its cancellation, and end before it does.

    Attributes:
        group: Where they run; None until there is one.
    """

    __slots__ = ("_request", "group")

    def __init__(self, request: Request) -> None:
        self._request = request
        self.group: RequestGroup | None = None

    @property
    def manager(self) -> TaskManager:
        """The manager below whose root its group hangs."""
        return self._request.manager

    @property
    def task_group(self) -> TaskGroup:
        """The group for cleanup, made on first use; the manager's for what has outlived the request."""
        with _making:
            group = self.group
            if (group is None or group.is_sealed) and self._request.over:
                return self.manager.get_group("root")
            if group is None:
                # With the request's own, at whose end this one is joined.
                self._request.own_group()
                self.group = group = self._request._open_group(self._name, self)
            return group

    def _name(self) -> str:
        return f"{self._request._name()} uncancellable"


def current_request() -> Request | None:
    bound: Any = current_binding.get()
    # Of code that runs on after its request, this is no request.
    request: Request | None = None if bound is None else bound._request
    return None if request is None or request.over else request


def this_request(
    who: str, problem: str = "was called outside of a request, or without the middleware"
) -> Request:
    request = current_request()
    if request is None:
        raise RuntimeError(f"{who} {problem}: app.add_middleware(TaskGroupMiddleware)")
    return request


def _route_template(scope: Scope) -> str | None:
    """The route's path with its parameters as written in the code; never the path that was asked for."""
    # Litestar's.
    template: object = scope.get("path_template")
    if isinstance(template, str):
        return template
    route = scope.get("route")
    # FastAPI (0.16x) names an included router's original route; the prefix is known to its context alone.
    facts: dict[str, Any] = scope.get("fastapi") or {}
    effective = facts.get("effective_route_context")
    if route is not None and getattr(effective, "original_route", None) is route:
        route = effective
    template = getattr(route, "path_format", None) or getattr(route, "path", None)
    return template if isinstance(template, str) else None


def _is_below(top: TaskGroup | None, group: TaskGroup | None) -> bool:
    """True if ``group`` is ``top``, or hangs below it."""
    while group is not None and group is not top:
        group = group._parent
    return group is not None


def _kind_of(message: Message) -> tuple[CancelKind, str | None]:
    """Say why a client is gone, by the message that says it."""
    code = message.get("code") if message["type"] == "websocket.disconnect" else None
    if code in _CLOSED_BY_CLIENT:
        return CancelKind.SCOPE_ENDED, f"the client closed the WebSocket ({code})"
    if code in _CLOSED_BY_SERVER:
        return CancelKind.SHUTDOWN, f"the server closed the WebSocket ({code})"
    return CancelKind.CLIENT_DISCONNECT, None


def _client_closed_request() -> tuple[Message, Message]:
    # 499: nginx's, and what dashboards know.
    return (
        {"type": "http.response.start", "status": 499, "headers": [(b"content-length", b"0")]},
        {"type": "http.response.body", "body": b"", "more_body": False},
    )


def _is_starlettes_departure(error: BaseException) -> bool:
    if any(
        cls.__module__.startswith("starlette.") and cls.__name__ == "ClientDisconnect"
        for cls in type(error).__mro__
    ):
        return True
    return _is_without_response(error)


def _is_without_response(error: BaseException) -> bool:
    # BaseHTTPMiddleware's, when the handler behind it was cancelled through a task that it awaited.
    return isinstance(error, RuntimeError) and error.args == ("No response returned.",)


def _is_cancellation(error: BaseException) -> bool:
    """True for an exception by which a handler ends that was cancelled, or that a cancelled task ended."""
    if isinstance(error, BaseExceptionGroup):
        return any(map(_is_cancellation, cast("tuple[BaseException, ...]", error.exceptions)))
    return isinstance(error, _OUR_DEPARTURES[:2]) or _is_without_response(error)


def _ask(rule: Callable[[Scope], bool], scope: Scope) -> bool:
    try:
        cancel = rule(scope)
        if asyncio.iscoroutine(cancel):
            cancel.close()
            raise TypeError("it gave a coroutine, and nothing can be awaited here")
        return bool(cancel)
    except Exception:
        logger.exception("cancel_handler=%r raised; the handler is not cancelled", rule)
        return False
