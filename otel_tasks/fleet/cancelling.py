"""Cancelling: carries out the cancellations of other nodes, and sends those of this node to the others.

Rules, each with its own test:

1. This process comes first: its own tasks are cancelled before anything is sent, even without the bus.
2. A node answers immediately if it has nothing to cancel. Otherwise, it answers when its tasks have ended, or
   shortly before the requester stops waiting.
3. A cancellation that arrives late, or had to wait for the bus, spares the tasks that started after it was
   requested. Only durations are compared: the clocks of two hosts may differ.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

from otel_tasks._core.clock import now
from otel_tasks._core.targets import (
    Reached,
    cancel_grouped,
    cancel_named,
    knows,
    reached,
    wait_for_reached,
)
from otel_tasks._core.task import request_cancel
from otel_tasks._core.telemetry import quiet_context
from otel_tasks.fleet.bus import BusUnavailableError, position_of
from otel_tasks.fleet.entries import LIST_LIMIT, CancelAnswer, CancelEntry
from otel_tasks.fleet.reports import CancelReport

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from otel_tasks import CancelCause, ManagedTask, TaskManager
    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.cancellations import Cancellations
    from otel_tasks.fleet.gathering import Gathering
    from otel_tasks.fleet.link import Link

    Target = Literal["task", "group"]

# Seconds by which an age that the bus measures may be off.
_SLACK: Final = 0.1
# A node answers at most so many seconds before the requester stops waiting.
_EARLIER: Final = 0.5


class Canceller:
    """The cancellations of one node, in both directions.

    Args:
        manager: The manager whose tasks are cancelled.
        link: The link of this node.
        cancellations: Where those that are read are kept.
        gathering: The questions of this node.
    """

    def __init__(
        self, manager: TaskManager, link: Link, cancellations: Cancellations, gathering: Gathering
    ) -> None:
        self._manager = manager
        self._link = link
        self._cancellations = cancellations
        self._gathering = gathering
        self._answering: set[asyncio.Task[None]] = set()
        self._listens = False

    def listen(self) -> None:
        """Carry out the cancellations of other nodes: this process is a node, not an observer."""
        self._listens = True
        self._link.subscribe(CancelEntry, self._on_entry)

    async def cancel(
        self, target: Target, name: str, cause: CancelCause, timeout: float, to: str | None = None
    ) -> CancelReport:
        """Cancel a task or a group in all processes, or in one, and wait until the tasks have ended.

        Args:
            target: What ``name`` names.
            name: The name.
            cause: Why.
            timeout: Seconds to wait; 0 requests no answers.
            to: The only node to cancel in; None for all.

        Raises:
            BusUnavailableError: The cancellation reached only this process in this time.

        Cancellation: ends the wait; the tasks stay cancelled, and the request stays sent.
        """
        is_here = to in (None, self._link.node)
        tasks = self._reach(target, name, cause) if is_here else []
        if to is not None and is_here:
            return _report(
                self._link.node, await wait_for_reached(tasks, timeout, asyncio.current_task()), {}, ()
            )
        with self._gathering.question(to) as question:
            entry = CancelEntry.from_cause(
                replace(cause, asked_by=requester_at(cause.asked_by, self._link.node)),
                node=self._link.node,
                target=target,
                name=name,
                request=question.request if timeout else None,
                timeout=timeout,
                to=to,
            )
            # An observer may be gone when the bus is back.
            posted = self._link.post(entry, must_arrive=self._listens)
            if not timeout:
                return _report(self._link.node, reached(tasks), {}, ())
            answers = self._gathering.answers(question, posted, timeout)
            local, error = await self._both(tasks, answers, timeout)
            if error is not None:
                what = f"cancelling {target} {name!r} {_reach(local) if self._listens else 'failed'}"
                raise BusUnavailableError(f"{what}: {error}; {_rest(posted)}") from error
            return _report(self._link.node, local, question.cancelled, question.silent)

    async def stop(self) -> None:
        """Send the answers that still wait for tasks.

        Cancellation: ends the wait for that.
        """
        for task in self._answering:
            task.cancel()
        if self._answering:
            await asyncio.wait(self._answering)

    async def _both(
        self, tasks: list[ManagedTask[Any]], answers: Coroutine[Any, Any, None], timeout: float
    ) -> tuple[Reached, BusUnavailableError | None]:
        """Wait for the tasks of this process and for the other nodes at the same time."""
        if not tasks:
            try:
                await answers
            except BusUnavailableError as unavailable:
                return Reached(), unavailable
            return Reached(), None
        ending = wait_for_reached(tasks, timeout, asyncio.current_task())
        local, error = await asyncio.gather(ending, answers, return_exceptions=True)
        if isinstance(local, BaseException):
            raise local
        if error is None or isinstance(error, BusUnavailableError):
            return local, error
        raise error

    # -- here -----------------------------------------------------------------------------------

    def _on_entry(self, entry: CancelEntry, at: Entry) -> None:
        if entry.to not in (None, self._link.node):
            return
        self._cancellations.record(entry, at)
        tasks: list[ManagedTask[Any]] = []
        if entry.target == "message":
            # An entry of this node applies too: it may be the worker.
            self._cancel_execution(entry, at)
        elif entry.node != self._link.node and knows(self._manager, entry.target, entry.name):
            spares = self._later_than(entry, at)
            tasks = self._reach(entry.target, entry.name, entry.to_cause(), spares)
        left = (entry.timeout or 0.0) - at.age - max(0.0, entry.late)
        if entry.request is None or entry.node == self._link.node or left <= 0:
            return
        if not tasks:
            self._answer(entry, Reached())
            return
        answering = asyncio.get_running_loop().create_task(
            self._answer_later(entry, tasks, left),
            name="otel_tasks.fleet.answer",
            # No request and no span of this process caused it.
            context=quiet_context(),
        )
        self._answering.add(answering)
        answering.add_done_callback(self._answering.discard)

    def _reach(
        self,
        target: Target,
        name: str,
        cause: CancelCause,
        spares: Callable[[ManagedTask[Any]], bool] | None = None,
    ) -> list[ManagedTask[Any]]:
        if target == "task":
            return cancel_named(self._manager, name, cause, spares)
        return cancel_grouped(self._manager, name, cause, spares)

    def _later_than(self, entry: CancelEntry, at: Entry) -> Callable[[ManagedTask[Any]], bool]:
        """Return a function that tells whether a task was started after a cancellation was requested."""
        position = position_of(at.id)
        since = now() - at.age - max(0.0, entry.late) + _SLACK

        def is_later(task: ManagedTask[Any]) -> bool:
            sent = self._cancellations.sent(task)
            return task.created_at > since if sent is None else sent.is_later_than(entry, position)

        return is_later

    def _cancel_execution(self, entry: CancelEntry, at: Entry) -> None:
        task = self._cancellations.execution_of(entry.name)
        if task is not None and not self._later_than(entry, at)(task):
            request_cancel(task, entry.to_cause())

    # -- answers --------------------------------------------------------------------------------

    async def _answer_later(self, entry: CancelEntry, tasks: list[ManagedTask[Any]], left: float) -> None:
        try:
            await wait_for_reached(tasks, left - min(_EARLIER, left / 4))
        finally:
            # Also when the fleet stops: otherwise, the other node would wait in silence.
            self._answer(entry, reached(tasks))

    def _answer(self, entry: CancelEntry, done: Reached) -> None:
        if entry.request is None:
            return
        answer = CancelAnswer(
            node=self._link.node,
            request=entry.request,
            asked=done.asked,
            ended=done.ended,
            running=len(done.still_running),
            still_running=done.still_running[:LIST_LIMIT],
        )
        self._link.post_to(entry.node, answer)


def requester_at(asked_by: str | None, node: str) -> str:
    """Name the requester and its node, for the causes of other processes."""
    return f"{asked_by or 'code'} at {node}"


def _report(
    node: str, local: Reached, answers: Mapping[str, CancelAnswer], silent: tuple[str, ...]
) -> CancelReport:
    asked = {node: local.asked} | {other: answer.asked for other, answer in answers.items()}
    running = {node: local.still_running[:LIST_LIMIT]}
    running |= {other: answer.still_running for other, answer in answers.items()}
    return CancelReport(
        asked=sum(asked.values()),
        ended=local.ended + sum(answer.ended for answer in answers.values()),
        still_running=len(local.still_running) + sum(answer.running for answer in answers.values()),
        silent=silent,
        asked_on={node: count for node, count in asked.items() if count},
        still_running_on={node: ids for node, ids in running.items() if ids},
    )


def _reach(local: Reached) -> str:
    if not local.asked:
        return "found no task in this process"
    tasks = "1 task" if local.asked == 1 else f"{local.asked} tasks"
    return f"reached {tasks} of this process, of which {local.ended} ended"


def _rest(posted: asyncio.Future[str]) -> str:
    if not posted.done():
        return "the other processes get it when the bus is back"
    if posted.cancelled() or posted.exception() is not None:
        return "the other processes do not get it"
    return "the other processes get it, but have not answered"
