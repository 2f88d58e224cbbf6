"""Request: it opens, and its client may leave. ``finishing`` has the rest of its life: it finishes.

``connection`` detects the disconnect, ``stop`` cancels the work, and ``cleanup`` shelters what must finish.
"""

from __future__ import annotations

import asyncio
import math
import sys
from asyncio import _get_running_loop
from contextlib import contextmanager
from contextvars import copy_context
from threading import get_ident
from typing import TYPE_CHECKING, Any

from otel_tasks._asgi.answer import disconnect_for, send_answer
from otel_tasks._asgi.cleanup import GROUP_LOCK, Cleanup, is_in_cleanup
from otel_tasks._asgi.connection import Connection, Message, Receive, Scope, Send, task_in
from otel_tasks._asgi.departure import is_cancellation, is_departure, kind_of
from otel_tasks._asgi.naming import name_facts, name_from
from otel_tasks._asgi.stop import Stop
from otel_tasks._asgi.streams import close_iterated
from otel_tasks._core.binding import RequestBinding, bound_request
from otel_tasks._core.causes import watch_cancels
from otel_tasks._core.clock import now
from otel_tasks._core.current import in_flight
from otel_tasks._core.events import CancelCause
from otel_tasks._core.request_group import RequestGroup
from otel_tasks._core.state import CancelKind
from otel_tasks._core.task import ManagedTask
from otel_tasks._core.telemetry.context import current_span_context
from otel_tasks._core.telemetry.request import annotate_request, note_disconnect

if TYPE_CHECKING:
    from collections.abc import Generator

    from otel_tasks._asgi.rule import Rules
    from otel_tasks._asgi.settings import Settings
    from otel_tasks._core.binding import Callback
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.manager import TaskManager

# Tasks that outlive their request show its name: from Python 3.12 on, a task has its context.
CONTEXTS_ARE_SHOWN = sys.version_info >= (3, 12)

_NO_TASKS: frozenset[asyncio.Task[Any]] = frozenset()
_NO_MESSAGE: Message = {}


class _Binding(RequestBinding):
    __slots__ = ()
    name_from = staticmethod(name_from)


class Request(Connection):
    """One request: its connection, its group, and the task in which its handler runs.

    Attributes:
        binding: Stands for it in its contexts.
        cancel_handler: What this request decided for itself; None leaves it to the rules.
        cancels_before: How often the handler's task had been cancelled when the request opened.
        context: The context in which it opened. The server's span is current there, and not where the
            disconnect is detected.
        group: Its group; None until one is needed.
        host: The task in which the server runs the application; None on a server that runs coroutines without
            an asyncio task.
        own_time_limit: The seconds that it lets itself take, infinity for no bound; None leaves that to the
            option.
        rules: The rules in force: those of the innermost middleware.
        settings: The options of the outermost middleware.
        stop: Its cancellation; None until its client leaves, it is cut short, or its tasks outlive it.
    """

    __slots__ = (
        "__weakref__",
        "_cleanup",
        "binding",
        "cancel_handler",
        "cancels_before",
        "context",
        "group",
        "host",
        "own_time_limit",
        "rules",
        "settings",
        "stop",
    )

    group: RequestGroup | None
    cancel_handler: bool | None
    own_time_limit: float | None
    stop: Stop | None
    _cleanup: Cleanup | None

    def __init__(self, settings: Settings, scope: Scope, receive: Receive, send: Send) -> None:
        sweeper = settings.sweeper
        # A loop runs in the thread where it ran before if it has a current task. On Python 3.11, this takes a
        # quarter of the time of get_running_loop(), which calls getpid().
        if sweeper is None or sweeper.thread != get_ident() or (host := task_in(sweeper.loop)) is None:
            sweeper = settings.find_sweeper(asyncio.get_running_loop())
            host = task_in(sweeper.loop)
        self.host = host
        self.scope = scope
        self.sweeper = sweeper
        self._server_receive = receive
        self.server_send = send
        self.start = _NO_MESSAGE
        self.complete = self.left = self.closed = False
        self._is_watched = self._is_reading = self._watch_pending = self._body_ended = False
        self._watcher = self._ahead = self.disconnect = self._receivers = self.send_error = None
        self.notified = _NO_TASKS
        self.group = self.stop = self.cancel_handler = self.own_time_limit = self._cleanup = None
        self.settings = settings
        self.rules = settings.rules
        self.binding = binding = _Binding(self)
        binding.manager = settings.manager
        sweeper.add(binding)  # type: ignore[arg-type]  # the binding of a Request, and so of a Watched
        self.context = copy_context()
        self.cancels_before = 0 if host is None else host.cancelling()

    # It opens: its group.

    @property
    def manager(self) -> TaskManager:
        """The manager whose root is above its group."""
        return self.settings.manager

    def task_group(self) -> TaskGroup:
        """Return the group that new tasks join: its own, made on first use; later, the manager's root."""
        group = self.group
        return group if group is not None and not self.closed else self._late_group()

    def own_group(self) -> RequestGroup:
        """Return the request's own group, made on first use."""
        return self.group if self.group is not None else self._make_group()

    @property
    def name(self) -> str:
        """Its method and its route."""
        return name_from(name_facts(self.scope, self.context))

    def _late_group(self) -> TaskGroup:
        return self.manager.get_group("root") if self.over else self.own_group()

    def _make_group(self) -> RequestGroup:
        with GROUP_LOCK:
            if self.group is not None:
                return self.group
            binding = self.binding
            # Not its own name: through the function, the group would keep it, and be a cycle.
            group = RequestGroup.open(
                self.manager, lambda: binding.name, binding=binding, host=self.host, span=self.settings.span
            )
            if self.host is not None and not self.closed:
                watch_cancels(self.host, self)
            # Before `cause` and `closed` are read: the loop sets them before it reads the group.
            self.group = group
            cause = self.cause
            if cause is not None:
                group.signal_cancel(cause)
            if self.closed:
                group.seal(
                    cause or self.make_cause(CancelKind.SCOPE_ENDED),
                    refuse=self.left or self.rules.on_exit != "detach",
                )
            return group

    @contextmanager
    def ruled_by(self, rules: Rules) -> Generator[None]:
        """Put the rules of a second middleware in force for the part of the application below it."""
        before, self.rules = self.rules, rules
        # The client may have left before this part began, and the rules so far may have spared the handler.
        self._rule_changed()
        try:
            yield
        finally:
            # Both parts share one group, which ends after both: for its end, the inner rule stays in force.
            self.rules = before._replace(on_exit=rules.on_exit)

    def release(self) -> None:
        """Leave its contexts and its group without it, unless work that it leaves behind needs it.

        Needed for a request with a group or a stop, and for any where contexts name their request.
        """
        group, stop = self.group, self.stop
        if group is None and stop is None:
            # Contexts that outlive the request show its name, and need no more of it.
            self.binding.facts = name_facts(self.scope)
            return
        if stop is not None:
            stop.end()
        is_busy = self._cleanup is not None or (group is not None and not group.is_empty)
        if is_busy or (stop is not None and stop.is_pending):
            self.binding.kept = self
        else:
            # The two refer to each other: as garbage, they would keep the connection until a collection.
            self.stop = None
        # The group may be kept, and its name is not worth making now.
        self.binding.facts = name_facts(self.scope, self.context)

    # Its client leaves.

    @property
    def cause(self) -> CancelCause | None:
        """Why it is cancelled before its end: its client has left, or it was cut short; None until then."""
        stop = self.stop
        return stop.cause if stop is not None and self.left else None

    def on_disconnect(self, message: Message, cause: CancelCause | None) -> None:
        """Set the cancel event, then cancel the work, at once or after the grace."""
        is_forced = cause is not None
        cause = cause or self.make_cause(*kind_of(message))
        stop = self.begin_stop(cause, is_forced=is_forced)
        if cause.kind is CancelKind.CLIENT_DISCONNECT:
            note_disconnect(self.context)
        if self.group is not None:
            self.group.signal_cancel(cause)
        # A shutdown has given its own grace before.
        if self.rules.grace and not (is_forced and cause.kind is CancelKind.SHUTDOWN):
            self.sweeper.call_later(self.rules.grace, stop.cancel_work)
        else:
            stop.cancel_work()

    def begin_stop(self, cause: CancelCause, *, is_forced: bool = False) -> Stop:
        """Start to cancel its work."""
        self.stop = stop = Stop(self, cause, is_forced=is_forced)
        return stop

    # Its time is up, or its server shuts down: it is cut short.

    def time_limit(self) -> float | None:
        """Return the seconds that it may take, by its own decision or by the option; None for no bound."""
        own = self.own_time_limit
        if own is None:
            return self.settings.timeout_rule.seconds(self.scope)
        return None if own == math.inf else own

    def decide_time_limit(self, seconds: float | None) -> bool:
        """Decide how many seconds it may take, whatever the option says; None for no bound.

        Returns:
            True if its time is up, and it has been cut short.
        """
        self.own_time_limit = math.inf if seconds is None else seconds
        loop = self.sweeper.loop
        if _get_running_loop() is loop:
            self.sweeper.apply_time_limit(self)
        else:
            # In the thread of a `def` handler or dependency.
            loop.call_soon_threadsafe(self.sweeper.apply_time_limit, self)
        return self.was_cut()

    def on_time_limit(self, seconds: float) -> None:
        """Cut it short."""
        self.cut_short(self.make_cause(CancelKind.TIMEOUT, f"the request took longer than {seconds:g} s"))

    def cut_short(self, cause: CancelCause) -> None:
        """End it although its client is there: cancel its work, and answer for the application.

        The handler is cancelled whatever ``cancel_handler`` says, the application learns of it as of a
        disconnect, and what it sends from here on is dropped. A timeout leaves a request as it is that has
        sent its response, or whose client has left; a shutdown cancels what still runs there.

        Args:
            cause: Why: ``timeout``, after the middleware's grace, or ``shutdown``, at once. It decides the
                answer too.
        """
        if self.closed or self.complete or self.disconnect is not None:
            if cause.kind is CancelKind.SHUTDOWN:
                self._cut_rest(cause)
            return
        self.cut(disconnect_for(cause, self.scope), cause)
        if self.stop is not None and not self.start:
            # Before the answer: the layers of telemetry end the server's span with the last message.
            self.annotate_span(self.stop)
            # In the context of the request, because layers outside may start a span in their `send`.
            self.stop.answer = self.sweeper.loop.create_task(
                send_answer(self, cause), name="otel_tasks.answer", context=self.context.copy()
            )
        elif self.stop is not None:
            # Noted now: `complete` will be true after an end that the application sends too late.
            self.stop.owes_end = cause.kind is CancelKind.SHUTDOWN

    def was_cut(self) -> bool:
        """Return True if it was cut short: its disconnect is not the server's."""
        return self.stop is not None and self.stop.is_forced

    def _cut_rest(self, cause: CancelCause) -> None:
        """Cancel what runs although nobody waits for an answer any more."""
        if self.closed:
            # It waits for the tasks of its group, which the middleware's `on_exit` lets finish.
            if self.group is not None:
                self.group.signal_cancel(cause)
                self.begin_stop(cause).cancel_work()
        elif self.left:
            # The rules have let the handler run on, or the grace of the middleware is not over.
            self.cancel_handler = True
            if self.stop is not None:
                self.stop.cancel_work()
        else:
            # Background tasks of a response that has been sent.
            self.left = True
            self.on_disconnect({}, cause)

    def note_server_stop(self) -> None:
        """Note that the server stops: the application may end its response early by itself."""
        self.sweeper.server_stops = True
        # `finish` looks at requests with a group.
        self.own_group()

    def make_cause(self, kind: CancelKind, message: str | None = None) -> CancelCause:
        """Make a cause with this request as its origin, whichever task detects it."""
        return CancelCause(kind, message, self.name, now(), current_span_context(self.context))

    def decide_handler(self, cancel: bool) -> bool:
        """Decide whether a disconnect cancels its handler, whatever the rules say; it may have happened.

        Returns:
            True if the calling task is the handler's, and has been cancelled.
        """
        self.cancel_handler = cancel
        if not cancel or self.closed:
            return False
        loop = self.sweeper.loop
        if _get_running_loop() is not loop:
            # In the thread of a `def` handler or dependency. The loop reads the decision if the client leaves
            # from here on; `stop` is read there, because the client may leave at this moment.
            loop.call_soon_threadsafe(self._rule_changed)
            return False
        return self._rule_changed()

    def _rule_changed(self) -> bool:
        return self.stop is not None and self.stop.rule_changed()

    def cancels_handler(self) -> bool:
        """Return True if a disconnect cancels its handler."""
        return self.rules.cancels_handler(self.scope, self.cancel_handler)

    def intercept(self, awaited: asyncio.Task[Any], message: object, callbacks: list[Callback]) -> bool:
        """Keep a cancellation of this request from ``awaited``, see ``Stop.intercept``."""
        return self.stop is not None and self.stop.intercept(awaited, message, callbacks)

    def annotate_span(self, stop: Stop, error: BaseException | None = None) -> None:
        """Note on the server's span why it ended early, and what became of the work.

        Args:
            stop: Its cancellation.
            error: What the application raised.
        """
        outcome = "closed" if stop.cause.kind is CancelKind.SCOPE_ENDED else str(stop.cause.kind)
        code = None if self.disconnect is None else self.disconnect.get("code")
        annotate_request(self.context, outcome, stop.cancelled_tasks, self.end_of_handler(stop, error), code)

    def end_of_handler(self, stop: Stop, error: BaseException | None) -> str:
        """Say what its handler has done: it was ``cancelled``, ``ran_on``, or ``finished`` by itself."""
        if stop.handler_cancelled or (error is not None and is_cancellation(error)):
            return "cancelled"
        return "finished" if self.notified else "ran_on"

    # It cleans up.

    @property
    def cleanup(self) -> Cleanup:
        """The binding of code that cleans up for it."""
        if self._cleanup is None:
            self._cleanup = Cleanup(self)
        return self._cleanup

    @property
    def cleanup_group(self) -> RequestGroup | None:
        """The group of the tasks that clean up for it; None if there are none."""
        return None if self._cleanup is None else self._cleanup.group

    @property
    def is_sheltering(self) -> bool:
        """A block of ``uncancellable()`` is open."""
        return self._cleanup is not None and self._cleanup.is_sheltering

    def shelters(self, task: asyncio.Task[Any] | None) -> bool:
        """Return True if ``task`` is in ``uncancellable()``."""
        return self._cleanup is not None and self._cleanup.shelters(task)

    def end_shelter(self, task: asyncio.Task[Any] | None) -> bool:
        """End one block of ``uncancellable()``; return True if that has cancelled the calling task."""
        cancelled = self.cleanup.release(task)
        # The application's listeners may learn of the disconnect from here on.
        self.wake_receivers()
        if self.stop is not None and self.stop.is_forced:
            self.interrupt_reader()
        return cancelled if self.stop is None else self.stop.shelter_ended(task, cancelled=cancelled)

    def withholds_disconnect(self) -> bool:
        """Return True while ``uncancellable()`` is open: a listener would cancel its body.

        The body itself may receive the disconnect. Otherwise it would wait for its own end.
        """
        return self.is_sheltering and not is_in_cleanup()

    async def close_streams(self) -> None:
        """Close the generators that the calling task, in ``send``, iterates for the response."""
        task = asyncio.current_task()
        if self.shelters(task):
            return
        try:
            # Sheltered: the end of the grace would interrupt the cleanup of a generator.
            with self.cleanup.sheltering(task):
                await close_iterated(self)
        finally:
            self.end_shelter(task)

    def has_ended_send(self) -> bool:
        """Return True in the ``send`` that the stop has interrupted: nobody has cancelled its task."""
        return self.stop is not None and self.stop.streams.has_ended_send()

    async def on_dropped_chunk(self) -> None:
        """Let the application's listener cancel the task that sends on, and close what it iterates."""
        task = asyncio.current_task()
        if self.stop is not None:
            self.stop.streams.unshield(task)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            await self.close_streams()
            raise

    @property
    def over(self) -> bool:
        """It has ended, and the caller is neither its handler nor one of its tasks."""
        if not self.closed:
            return False
        try:
            task = asyncio.current_task()
        except RuntimeError:
            return True
        if not isinstance(task, ManagedTask):
            return task is not self.host
        groups = (self.group, self.cleanup_group)
        return not any(group is not None and group.contains(task) for group in groups)

    def stand_in(self, group: TaskGroup) -> TaskGroup:
        """Return the group for tasks that are created although ``group``, this request's, is closed.

        It is the manager's root once the request is over, and the group for cleanup if the caller cleans up:
        the exception that ends it is in flight, the application has learned of the disconnect by itself, or
        it has sent its response. In the last two cases it knows what it starts.
        """
        if self.over:
            return self.manager.get_group("root")
        if self.left and (is_in_cleanup() or self.notified or self.complete or in_flight(self.ends_code)):
            return self.cleanup.task_group
        return group

    def ends_code(self, error: BaseException) -> bool:
        """Return True for an exception that says no more than that the request ends."""
        # GeneratorExit ends a body generator that is closed early.
        return isinstance(error, GeneratorExit) or is_departure(error, self)

    # Its server shuts down.

    @property
    def cancelled_from_outside(self) -> bool:
        """Its handler's task has been cancelled, and not by this request."""
        host = self.host
        own = self.stop is not None and self.stop.handler_cancelled
        return host is not None and host.cancelling() > self.cancels_before + int(own)

    def cause_of_shutdown(self, message: str | None = None) -> CancelCause:
        """Make the cause of what ends because the server has cancelled the handler's task."""
        return self.make_cause(CancelKind.SHUTDOWN, message)


def current_request() -> Request | None:
    """Return the request that is served here; None outside of one, and in code that has outlived its own."""
    request = bound_request()
    return request if isinstance(request, Request) else None


def require_request(caller: str, problem: str = "was called outside of a request; in a request") -> Request:
    """Return the request that is served here.

    Args:
        caller: What the user called or declared, for the message.
        problem: What is wrong if there is no request.

    Raises:
        RuntimeError: No request is served here by a ``TaskGroupMiddleware``.
    """
    request = current_request()
    if request is None:
        raise RuntimeError(f"{caller} {problem}, add the middleware: app.add_middleware(TaskGroupMiddleware)")
    return request
