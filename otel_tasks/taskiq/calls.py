"""Calls: the remote tasks that this process waits for.

A worker notifies this node when the result of a call is saved. In case it cannot, because the bus is down or
the worker dies at that moment, this node also asks the result backend every few seconds. The backend may have
the result of an older call: users may choose the ids of messages, and reuse them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.telemetry import quiet_context
from otel_tasks.exceptions import WrongLoopError
from otel_tasks.fleet.entries import NAME_LIMIT, EndedEntry, ProgressEntry
from otel_tasks.taskiq.errors import BrokerStoppedError
from otel_tasks.taskiq.labels import STAMP, new_delivery

if TYPE_CHECKING:
    from collections.abc import Callable

    from taskiq import TaskiqResult
    from taskiq.abc.result_backend import AsyncResultBackend

    from otel_tasks import ManagedTask
    from otel_tasks.fleet import Fleet
    from otel_tasks.fleet.bus import Entry
    from otel_tasks.fleet.link import Link

# Seconds between two questions to the result backend, normally and while the bus is down.
_ASK_EVERY: Final = 5.0
_ASK_EVERY_ALONE: Final = 1.0
# Questions at a time.
_AT_ONCE: Final = 20


class Call:
    """One remote task that this process waits for.

    Args:
        task_id: The id of the message.
        host: This node.
        shows: The local task that shows its progress.

    Attributes:
        delivery: The name of the call, which its copies keep.
        ended: Done once its result is saved.
        result: Its result, if that has been read.
    """

    __slots__ = ("asked_at", "delivery", "ended", "host", "result", "shows", "task_id")

    def __init__(self, task_id: str, host: str, shows: ManagedTask[Any] | None) -> None:
        loop = asyncio.get_running_loop()
        self.task_id = task_id
        self.delivery = new_delivery()
        self.host = host
        self.shows = shows
        self.ended: asyncio.Future[None] = loop.create_future()
        self.result: TaskiqResult[Any] | None = None
        self.asked_at = loop.time()

    def end(self) -> None:
        """Record that its result is saved."""
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: Exception) -> None:
        """Make the call raise ``error``."""
        if not self.ended.done():
            self.ended.set_exception(error)
            # asyncio would log it for a call that is still being sent.
            self.ended.exception()

    def owns(self, result: TaskiqResult[Any]) -> bool:
        """Return whether a result is that of this call, and not of an older one with the same id."""
        stamp = result.labels.get(STAMP)
        # Parsing the stamp takes longer, and nothing else contains this random name.
        return not isinstance(stamp, str) or self.delivery in stamp

    @property
    def has_ended(self) -> bool:
        """True once its result is saved."""
        return self.ended.done() and not self.ended.cancelled() and self.ended.exception() is None


class Calls:
    """The open calls of one broker in this process.

    Args:
        fleet: The fleet.
        backend: Returns the result backend.
    """

    def __init__(self, fleet: Fleet, backend: Callable[[], AsyncResultBackend[Any]]) -> None:
        self._fleet = fleet
        self._backend = backend
        self._open: dict[str, Call] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Allow calls in this event loop."""
        self._loop = asyncio.get_running_loop()

    def subscribe(self, link: Link) -> None:
        """Listen to a link that is about to start, or has started."""
        link.subscribe(EndedEntry, self._on_ended)
        link.subscribe(ProgressEntry, self._on_progress)

    def open(self, task_id: str, shows: ManagedTask[Any] | None) -> Call:
        """Wait for a remote task from now on.

        Raises:
            WrongLoopError: The broker is started in another event loop.
            ValueError: Another call waits for a task with this id, or the id is too long.
        """
        if self._loop is not asyncio.get_running_loop():
            hint = "call it there, for example with asyncio.run_coroutine_threadsafe(remote(...), loop)"
            if self._loop is not None and self._loop.is_closed():
                hint = "that is closed: write `await broker.startup()` in this one"
            raise WrongLoopError(f"the broker of this remote task is started in another event loop: {hint}")
        if len(task_id) > NAME_LIMIT:
            raise ValueError(
                f"the id of a remote task has {len(task_id)} characters, at most {NAME_LIMIT} are allowed"
            )
        if task_id in self._open:
            raise ValueError(
                f"another call waits for the remote task {task_id!r}: give each call its own id, or leave "
                "the id to the broker"
            )
        call = self._open[task_id] = Call(task_id, self._fleet.link.node, shows)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_ASK_EVERY_ALONE, self._turn)
        return call

    def close(self, call: Call) -> None:
        """Wait no longer."""
        del self._open[call.task_id]

    async def stop(self) -> None:
        """Stop asking, and fail the open calls.

        Cancellation: ends the wait for the last question.
        """
        for call in self._open.values():
            call.fail(BrokerStoppedError("the broker was shut down while the call waited for its result"))
        # They publish their cancellation now.
        await asyncio.sleep(0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def _on_ended(self, entry: EndedEntry, _: Entry) -> None:
        call = self._open.get(entry.task_id)
        if call is not None and entry.call in (None, call.delivery):
            call.end()

    def _on_progress(self, entry: ProgressEntry, _: Entry) -> None:
        call = self._open.get(entry.task_id)
        if call is not None and call.shows is not None and not call.shows.done():
            call.shows.progress.update(done=entry.done, total=entry.total, message=entry.message)

    # -- asking the result backend --------------------------------------------------------------

    def _turn(self) -> None:
        self._timer = None
        if not self._open:
            return
        loop = asyncio.get_running_loop()
        every = _ASK_EVERY if self._fleet.link.is_up else _ASK_EVERY_ALONE
        due = [call for call in self._open.values() if loop.time() - call.asked_at >= every]
        if due and (self._asking is None or self._asking.done()):
            self._asking = loop.create_task(self._ask(due), context=quiet_context())
        self._timer = loop.call_later(_ASK_EVERY_ALONE, self._turn)

    async def _ask(self, calls: list[Call]) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._ask_for(call, limit) for call in calls))

    async def _ask_for(self, call: Call, limit: asyncio.Semaphore) -> None:
        async with limit:
            call.asked_at = asyncio.get_running_loop().time()
            try:
                if not await self._backend().is_result_ready(call.task_id):
                    return
            except Exception:
                # It is asked again in a few seconds.
                return
            try:
                result = await self._backend().get_result(call.task_id)
            except Exception:
                # The call tries to read it, and raises the reason.
                call.end()
                return
            if call.owns(result):
                call.result = result
                call.end()
