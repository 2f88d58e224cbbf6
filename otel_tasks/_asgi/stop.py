"""Stop: how the end of a request reaches its tasks and its handler, and nothing else.

Rules, each with a test of its own:

1. Tasks of the request's group are cancelled once, the newest first.
2. A task in ``uncancellable()`` is cancelled when its block ends. A task in a shielded scope of anyio is
   cancelled once it has left the scope, because a native cancel would pass through the shield.
3. Tasks that have learned of the disconnect end by themselves, and so do the tasks that await them.
4. asyncio forwards a cancellation to the awaited task. Where that task belongs to another request or to the
   application, only the wait for it ends.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol

from otel_tasks._asgi.streams import StreamedRequest, Streams
from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.binding import BoundRequest, intercepted, request_in, stopping
from otel_tasks._core.causes import covered, passing
from otel_tasks._core.shields import defer_cancel, is_shielded
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
from otel_tasks._core.task import ManagedTask

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable

    from otel_tasks._asgi.rule import Rules
    from otel_tasks._core.binding import Callback
    from otel_tasks._core.events import CancelCause
    from otel_tasks._core.request_group import RequestGroup

_NOTHING = nullcontext()


class StoppedRequest(StreamedRequest, Protocol):
    """The request as its stop sees it."""

    @property
    def group(self) -> RequestGroup | None:
        """Its group; None if it has none yet."""
        ...

    @property
    def left(self) -> bool:
        """Its client has left."""
        ...

    @property
    def notified(self) -> Collection[asyncio.Task[Any]]:
        """The tasks that have learned of the disconnect."""
        ...

    @property
    def is_sheltering(self) -> bool:
        """A block of ``uncancellable()`` is open."""
        ...

    def shelters(self, task: asyncio.Task[Any]) -> bool:
        """Return True if ``task`` is in ``uncancellable()``."""
        ...

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        ...

    def cancels_handler(self) -> bool:
        """Return True if the rule in force cancels the handler."""
        ...


class Stop:
    """The cancellation of one request, made when its client leaves, its time is up, or its tasks outlive it.

    Attributes:
        answer: The task that answers a client that is still there; None if there is no such task.
        cause: Why.
        is_forced: The request was cut short: the handler is cancelled whatever the rules say.
        owes_end: The response has started, and its end is sent for the application.
        is_due: The grace is over: tasks and handler are cancelled as soon as nothing holds that off.
        cancelled_tasks: How many tasks it has cancelled.
        handler_cancelled: It has cancelled the handler's task, once.
        spared_by: The rules that last spared the handler; None if none have.
        streams: The tasks that may iterate generators for the response.
    """

    __slots__ = (
        "_counts",
        "_forwarding",
        "_holders",
        "_request",
        "answer",
        "cancelled_tasks",
        "cause",
        "handler_cancelled",
        "is_due",
        "is_forced",
        "owes_end",
        "spared_by",
        "streams",
    )

    def __init__(self, request: StoppedRequest, cause: CancelCause, *, is_forced: bool = False) -> None:
        self.cause = cause
        self.is_forced = is_forced
        self.owes_end = False
        self.answer: asyncio.Task[None] | None = None
        self.is_due = False
        self.cancelled_tasks = 0
        self.handler_cancelled = False
        self.spared_by: Rules | None = None
        self._request = request
        # `cancelling()` of tasks whose last cancellation has been handled, or came before. A task with a
        # higher count has been cancelled since: asyncio is forwarding a cancellation.
        self._counts: dict[asyncio.Task[Any], int] = {}
        # Tasks whose cancellation has been handled in this turn of the loop. A task that awaits several
        # others, in `gather`, forwards it to each of them.
        self._forwarding: set[asyncio.Task[Any]] = set()
        # Futures that hold a cancellation off. Each has a callback of this stop.
        self._holders: set[asyncio.Future[Any]] = set()
        self._note_counts(() if request.host is None else [request.host])
        stopping.add(request)
        self.streams = Streams(request)
        if request.left:
            self.streams.follow()

    @property
    def is_pending(self) -> bool:
        """The grace is not over, or something holds a cancellation off."""
        return not self.is_due or bool(self._holders) or self.streams.is_pending

    def cancel_work(self) -> None:
        """Cancel the tasks and the handler, each as soon as nothing holds that off."""
        self.is_due = True
        # Tasks first: the handler's cancellation is forwarded to the task that it awaits.
        self.cancel_tasks()
        self._cancel_handler()
        if self._request.left and not self.handler_cancelled:
            self.streams.end_send()

    def cancel_tasks(self) -> None:
        """Cancel the tasks of the group, except for those that something holds off for now."""
        group = self._request.group
        if group is None:
            return
        tasks = [task for task in group.live_tasks() if not task.done()]
        if not tasks and not group.has_groups:
            # All have ended, and their done-callbacks are about to run.
            return
        spared = self._hold_off(tasks)
        self._note_counts(task for task in tasks if task not in self._counts)
        with self._sparing(forwarded_to(tasks, self._is_spared).stops):
            self.cancelled_tasks += group.cancel_tasks(self.cause, spared=spared)
        self._note_counts(tasks)

    def rule_changed(self) -> bool:
        """Catch up on the handler: what decides about it has changed since the client left.

        Returns:
            True if the calling task is the handler's, and has been cancelled.
        """
        return self.is_due and self._cancel_handler()

    def shelter_ended(self, task: asyncio.Task[Any] | None, *, cancelled: bool) -> bool:
        """Catch up on what ``uncancellable()`` has held off.

        Args:
            task: The task whose block has ended.
            cancelled: The end of the block has cancelled it.

        Returns:
            True if the calling task has been cancelled.
        """
        self.cancelled_tasks += cancelled
        if not self.is_due:
            return cancelled
        # Tasks that were spared because they wait for this one.
        if any(map(self._is_left_over, with_awaiters(task))):
            self.cancel_tasks()
        return self._cancel_handler() or cancelled

    def end(self) -> None:
        """Drop the references to tasks: code that outlives the request keeps this, through its context."""
        stopping.discard(self._request)
        self._counts.clear()
        if self.answer is not None:
            # Only a shutdown of the server does not wait for it.
            self.answer.cancel()
        self.streams.end()

    def intercept(self, awaited: asyncio.Task[Any], message: object, callbacks: list[Callback]) -> bool:
        """Keep a cancellation that a task of this request forwards to ``awaited`` from going further.

        A task of another owner is left alone, and the task that awaits it is woken instead. A task of this
        request that has been cancelled already, or is in ``uncancellable()``, cleans up: a second
        cancellation would interrupt that, so the task that awaits it goes on waiting.
        """
        self.streams.note_cancel(awaited, message)
        spared = self._is_spared(awaited)
        if not spared and not self._is_cleaning_up(awaited):
            return False
        if spared and self._is_its(request_in(copy_context())) and leave_wait_for(awaited):
            return True
        # Each once: a gather may wait for it several times, through others. Collected before the first one is
        # interrupted, because that changes the callbacks.
        ours = {
            awaiter.task: awaiter
            for awaiter in awaiters(awaited, callbacks)
            if self._is_its(request_in(awaiter.context)) and self._is_forwarded_by(awaiter.task, awaited)
        }
        for awaiter in ours.values() if spared else ():
            interrupt(awaiter, message)
        return bool(ours)

    def _hold_off(self, tasks: list[ManagedTask[Any]]) -> Collection[asyncio.Future[Any]]:
        """Return those of ``tasks`` not to cancel now, and what awaits them and would forward its own."""
        shielded = {task for task in tasks if is_shielded(task)}
        scoped = [task for task in tasks if task.cause is None and in_anyio_shield(task)]
        for task in scoped:
            self._wait_for(task)
        notified = () if self._request.closed else self._request.notified
        for task in shielded:
            # Whatever the kind of the cause.
            defer_cancel(task, self.cause)
        held = (*shielded, *scoped, *notified)
        return with_awaiters(*held) if held else ()

    # The handler.

    def _cancel_handler(self) -> bool:
        """Cancel the handler's task; later, if something holds that off now.

        Returns:
            True if the caller is that task.
        """
        host = self._request.host
        if host is None or not self._may_cancel_handler():
            return False
        forwarding = forwarded_to([host], self._is_spared)
        holder = find_holder(host, forwarding.passed)
        if holder is not None:
            self._wait_for(holder)
            return False
        self.handler_cancelled = True
        self.streams.note_host_cancel()
        with self._sparing(forwarding.stops), passing(self.cause):
            host.cancel(str(self.cause))
        self._note_counts([host])
        return host is asyncio.current_task()

    def _may_cancel_handler(self) -> bool:
        request = self._request
        # An application that listens ends in its own way, as without the middleware.
        is_left_alone = request.closed or request.is_sheltering or bool(request.notified)
        if self.handler_cancelled or is_left_alone:
            return False
        cancels = self.is_forced or request.cancels_handler()
        self.spared_by = None if cancels else request.rules
        return cancels

    # Holders: tasks and threads that hold a cancellation off.

    def _wait_for(self, holder: asyncio.Future[Any]) -> None:
        """Continue once ``holder`` no longer holds a cancellation off."""
        # Several cancellations may wait for one holder, and each continuation finds all of them: without this
        # check they would multiply.
        if holder not in self._holders:
            self._holders.add(holder)
            call_when_moved(holder, lambda: self._holder_has_moved(holder))

    def _holder_has_moved(self, holder: asyncio.Future[Any]) -> None:
        self._holders.discard(holder)
        if isinstance(holder, asyncio.Task) and not holder.done() and in_anyio_shield(holder):
            self._wait_for(holder)
        else:
            self.cancel_work()

    # Whose task is whose.

    def _is_spared(self, task: asyncio.Task[Any]) -> bool:
        """Return True for a task that does not belong to this request, or that cleans up for it."""
        if isinstance(task, ManagedTask):
            return not self._is_in_group(task)
        context = context_of(task)
        # A task that this request has started is shared if others await it too.
        return (context is not None and not self._is_its(request_in(context))) or any(
            not self._is_its(request_in(awaiter.context)) for awaiter in awaiters(task)
        )

    def _is_its(self, request: BoundRequest | None) -> bool:
        return request is self._request

    def _is_in_group(self, task: asyncio.Future[Any]) -> bool:
        group = self._request.group
        return group is not None and group.contains(task)

    def _is_left_over(self, task: asyncio.Future[Any]) -> bool:
        return isinstance(task, ManagedTask) and task.cause is None and self._is_in_group(task)

    def _is_cleaning_up(self, task: asyncio.Task[Any]) -> bool:
        """Return True for a task of this request that has been cancelled, or that is in a shelter."""
        if isinstance(task, ManagedTask) and task.cause is not None:
            return True
        return self._request.shelters(task)

    # Forwarded cancellations.

    def _note_counts(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        self._counts.update((task, task.cancelling()) for task in tasks)

    def _is_forwarded_by(self, task: asyncio.Task[Any], awaited: asyncio.Task[Any]) -> bool:
        """Return True if ``task`` has been cancelled, and forwards that to ``awaited`` in this very call."""
        if task in self._forwarding and waits_for(task) is not awaited:
            return True
        count = task.cancelling()
        if count <= self._counts.get(task, 0):
            return False
        self._counts[task] = count
        if not self._forwarding:
            task.get_loop().call_soon(self._forwarding.clear)
        self._forwarding.add(task)
        return True

    def _sparing(self, others: Iterable[asyncio.Task[Any]]) -> AbstractContextManager[None]:
        """Keep the tasks of others from being cancelled through tasks of this request that await them.

        ``ManagedTask.cancel`` consults the request itself. A plain task has asyncio's own method, which is
        covered on the instance while the cancellation propagates.
        """
        plain = [task for task in others if not isinstance(task, ManagedTask)]
        # Nothing to do for most requests.
        return self._covering(plain) if plain or self._request not in stopping else _NOTHING

    @contextmanager
    def _covering(self, others: list[asyncio.Task[Any]]) -> Generator[None]:
        # A grace or a shield of anyio may outlast the request: then it is not in `stopping` any more.
        is_late = self._request not in stopping
        stopping.add(self._request)
        try:
            with ExitStack() as stack:
                for task in others:
                    stack.enter_context(covered(task, intercepted))
                yield
        finally:
            if is_late:
                stopping.discard(self._request)
