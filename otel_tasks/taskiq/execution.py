"""Execution: one delivery of a message to a worker, from the check that it may run to the end of its claim.

Rules, each with its own test:

1. An execution starts only while this node can judge leases, and with the claim of its task: at most one node
   executes a task at a time, whatever the broker delivers. A delivery whose claim is held waits, and ends
   without running if the holder finishes. In one process, one delivery of a message waits; further ones end,
   and are acknowledged with it.
2. A message does not run if it was cancelled, its deadline has passed, or its host is gone. It gets a managed
   task that is cancelled before its first step, so that the trace shows the reason.
3. The cancellation of a managed task is final: its result is saved here, no middleware retries it, and the
   message is acknowledged, even if Taskiq leaves that to the function. The exceptions are a shutdown of this
   process and a lost claim: another worker takes the message. The shutdown of the process that waits for the
   result is a cancellation like any other.
4. The claim ends after the result is saved and before the message is acknowledged. If the process dies in
   between, the message runs again, as does one that its function should have acknowledged and did not.
"""

from __future__ import annotations

import asyncio
import json
import random
import traceback
from contextvars import ContextVar, copy_context
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, Final, Protocol

from taskiq.exceptions import NoResultError
from taskiq.result import TaskiqResult
from taskiq.utils import maybe_awaitable

from otel_tasks import CancelCause, CancelKind, ManagerClosedError
from otel_tasks._core.binding import current_binding
from otel_tasks._core.log import logger
from otel_tasks._core.state import Outcome
from otel_tasks._core.task import request_cancel, timed_out
from otel_tasks._core.telemetry import current_span_context
from otel_tasks._core.telemetry.propagation import extract
from otel_tasks.fleet.bus import BusUnavailableError, Claim
from otel_tasks.fleet.cancellations import targets_of
from otel_tasks.fleet.entries import EndedEntry, cause_fields
from otel_tasks.taskiq.errors import (
    ExecutionEndedError,
    ExecutionLeftError,
    RemoteCancelledError,
    RemoteResultError,
)
from otel_tasks.taskiq.labels import (
    CAUSE,
    TRACEBACK,
    delivery_of,
)
from otel_tasks.taskiq.options import Options
from otel_tasks.taskiq.pipelines import ShownEnd
from otel_tasks.taskiq.worker import host_lost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextvars import Context
    from types import TracebackType

    from taskiq.abc.result_backend import AsyncResultBackend
    from taskiq.message import TaskiqMessage

    from otel_tasks import ManagedTask
    from otel_tasks.fleet.entries import CancelEntry
    from otel_tasks.taskiq.deliveries import Ack, RawAck
    from otel_tasks.taskiq.worker import Duplicates, Worker

# Seconds between two attempts to get a claim that is held; they grow from the first to the last.
_FIRST_PAUSE: Final = 0.05
_LAST_PAUSE: Final = 1.0
# Characters of a traceback that a result carries.
_LONGEST_TRACEBACK: Final = 16_384
# Seconds between two attempts to save a result, and seconds after which they stop.
_SAVE_PAUSE: Final = 0.5
_SAVE_FOR: Final = 20.0
# With these errors, a result backend refuses a value, whatever the state of its server. Pickle raises four.
_OF_THE_VALUE: Final = (TypeError, ValueError, AttributeError, PicklingError, RecursionError, OverflowError)

# A traceback leaves out the frames of these modules at its beginning.
_NOT_SHOWN: Final = ("taskiq.", "otel_tasks.")

# The execution whose message the receiver's task handles here.
current_execution: ContextVar[Execution | None] = ContextVar("otel_tasks_execution", default=None)


class Owner(Protocol):
    """What an execution needs of its broker."""

    @property
    def worker(self) -> Worker:
        """The executions of this process."""
        ...

    @property
    def acknowledges(self) -> bool:
        """True if the broker redelivers a message that is not acknowledged."""
        ...

    @property
    def result_backend(self) -> AsyncResultBackend[Any]:
        """Where results are saved."""
        ...


class Execution:
    """One delivery of a message.

    Args:
        owner: The broker.
        message: The message.
        ack: Acknowledges it; None if the broker has no acknowledgments.

    Attributes:
        task_id: The id of the message.
        loop: The event loop of the receiver.
        host: The node that waits for the result; None if nobody does.
        task: The managed task, once there is one.
    """

    def __init__(self, owner: Owner, message: TaskiqMessage, ack: Ack | None = None) -> None:
        self._owner = owner
        self._worker = owner.worker
        # Kept, because an execution that ignores its cancellation outlives the stop of the fleet.
        self._link = owner.worker.fleet.link
        self._keeper = owner.worker.fleet.keeper
        self._cancellations = owner.worker.fleet.cancellations
        self._message = message
        self._options = Options.of(message)
        self._delivery = delivery_of(message.labels, self._options.stamp)
        self.loop = asyncio.get_running_loop()
        self._received_at = self.loop.time()
        self.task_id = message.task_id
        self.host = self._options.host
        self._sent = None if self._options.stamp is None else self._options.stamp.sent
        self.task: ManagedTask[Any] | None = None
        self._deadline = self._options.deadline(self._worker)
        self._is_claimed = False
        self._is_lost = False
        # The end of its claim, once it is being sent.
        self._finishing: asyncio.Future[None] | None = None
        # True for the delivery that waits for the claim; its duplicates end with it.
        self._waits = False
        self._duplicates: Duplicates | None = None
        # Another worker takes the message.
        self._is_left = False
        self._has_ended = False
        # True from the decision on.
        self._is_acknowledged = False
        # True once the broker has answered, or the delivery that waits will acknowledge this one.
        self._is_taken_care_of = False
        self._ack = ack
        # True if the message is to be acknowledged although its function has not done so.
        self._is_final = False
        # The result that the receiver saves; None if it has none, or once it is saved.
        self._unsaved: TaskiqResult[Any] | None = None
        # The error that the caller of a cancelled execution gets.
        self._reported: Exception | None = None
        self._shown_end: ShownEnd | None = None

    async def run(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run the function of the message as a managed task, and return its result.

        Args:
            make: Calls the function; the task is named after its coroutine.

        Raises:
            ExecutionEndedError: There is no result for the receiver to save.
            BaseException: The function's own exception.

        Cancellation: cancels the managed task.
        """
        try:
            cause = await self._admit()
            task = self._start(make())
            if cause is not None:
                request_cancel(task, cause)
            return await self._result_of(task)
        except ExecutionLeftError:
            self._is_left = True
            self._is_final = self._is_duplicate
            self._settle(executed=False)
            raise
        except ExecutionEndedError:
            self._is_final = True
            raise
        finally:
            self._has_ended = True
            self._worker.discard(self)
            if self._waits:
                self._worker.end_to_wait((self.task_id, self._delivery))
                if self._is_left and self._duplicates is not None:
                    self._duplicates.leave()

    def cancel(self, cause: CancelCause) -> None:
        """Cancel the managed task, if it runs."""
        if self.task is not None:
            request_cancel(self.task, cause)

    async def refuse(self, error: Exception) -> None:
        """Save an error as the result of a message that cannot be executed, if somebody waits for it.

        Cancellation: ends the attempts to save it.
        """
        if self.host is not None:
            await self._save_again(self._failed(error, {}))
            self._tell_host(Outcome.ERROR)

    # -- what the receiver does around it -----------------------------------------------------

    def failed(self, result: TaskiqResult[Any]) -> None:
        """Prepare the result of an execution without one for the middlewares that handle errors."""
        if isinstance(result.error, ExecutionEndedError):
            self._shown_end = ShownEnd(result, self._message.labels, self._reported)

    def executed(self, result: TaskiqResult[Any]) -> None:
        """Note the result that the receiver is about to save, with the traceback of its error."""
        if self._shown_end is not None:
            self._shown_end.restore()
        error = result.error
        if isinstance(error, NoResultError):
            return
        self._unsaved = result
        if error is not None and self.host is not None:
            text = "".join(traceback.format_exception(type(error), error, _traceback_of(error)))
            result.labels[TRACEBACK] = text[-_LONGEST_TRACEBACK:]

    def saved(self) -> None:
        """Record that the receiver has saved the result: tell the host, and end the claim.

        If the message is not acknowledged yet, its claim ends when it is.
        """
        result, self._unsaved = self._unsaved, None
        is_error = result is not None and result.is_err
        self._tell_host(Outcome.ERROR if is_error else Outcome.SUCCESS)
        if not self._redelivers:
            self._settle(executed=True)

    async def acknowledge(self, ack: Callable[[], Awaitable[None] | None]) -> None:
        """Acknowledge the message if it is executed; called when the receiver or the function would.

        Cancellation: ends the attempts to save the result; the message is not acknowledged.
        """
        if self._is_taken_care_of:
            # RabbitMQ closes the channel on a second one.
            return
        if await self._may_acknowledge():
            if self._finishing is not None:
                # First: after an acknowledgment, a claim that is left would let a duplicate run.
                await self._finishing
            await maybe_awaitable(ack())
            self._is_taken_care_of = True
            if self._duplicates is not None:
                await self._duplicates.acknowledge()
        elif self._is_duplicate and self._duplicates is not None:
            self._is_taken_care_of = True
            await self._duplicates.add(ack)

    @property
    def _is_duplicate(self) -> bool:
        """True if another delivery of the message waits for the claim in this process."""
        return self._duplicates is not None and not self._waits

    async def _may_acknowledge(self) -> bool:
        if not self._has_ended:
            # Before the function, or by the function itself.
            self._is_acknowledged = True
            return True
        if self._is_left:
            return False
        if self._unsaved is not None:
            await self._save_again(self._unsaved)
        self._settle(executed=True)
        self._is_acknowledged = True
        return True

    def handled(self, _: object) -> None:
        """End everything that is still open: the receiver is done with the message."""
        if self._is_final and not self._is_acknowledged and self._ack is not None:
            # Manual acknowledgment, or the receiver failed before its own.
            self._worker.in_background(self._acknowledge_itself(self._ack.raw))
        elif self._redelivers:
            # The receiver failed before it acknowledged.
            self._settle(executed=False)
        elif self._unsaved is not None:
            # The receiver could not save the result, and the broker does not redeliver the message.
            self._worker.in_background(self._save_again(self._unsaved))
        else:
            self._settle(executed=True)

    async def _acknowledge_itself(self, ack: RawAck) -> None:
        try:
            await self.acknowledge(ack)
        except Exception:
            # Its connection is gone, and the broker delivers the message again.
            logger.warning("message %s could not be acknowledged", self.task_id, exc_info=True)

    # -- may it run? --------------------------------------------------------------------------

    async def _admit(self) -> CancelCause | None:
        """Wait until the execution has its claim; return the cause if it must not run."""
        pause = _FIRST_PAUSE
        while (cause := self._refusal()) is None and not self._is_claimed:
            cause = await self._claim()
            if cause is None and not self._is_claimed:
                jitter = random.uniform(0.75, 1.25)  # noqa: S311 - no secret
                await self._rest(self._until_deadline(pause * jitter))
                pause = min(pause * 2, _LAST_PAUSE)
            elif cause is not None:
                break
        return cause

    async def _rest(self, pause: float) -> None:
        """Wait until the next attempt to get the claim, or until something forbids the execution."""
        targets = list(targets_of(self.task_id, self._options.name, self._options.group))
        judged = self._link.judges
        until = self.loop.time() + pause
        while self._link.judges == judged and self._refusal() is None:
            left = until - self.loop.time()
            if left <= 0:
                return
            await self._worker.changes(targets, left)

    def _refusal(self) -> CancelCause | None:
        stopping = self._worker.stopping
        if stopping is not None:
            return self._left_for(stopping)
        entry = self._cancellation()
        if entry is not None:
            return entry.to_cause()
        if self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
            return CancelCause.make(CancelKind.TIMEOUT, "the deadline passed before the task started")
        return None

    def _cancellation(self) -> CancelEntry | None:
        """Return the cancellation of this message that the fleet has; None if there is none."""
        options, sent = self._options, self._sent
        if sent is not None:
            return self._cancellations.find(self.task_id, options.name, options.group, sent)
        entry = self._cancellations.find(self.task_id)
        # Without a stamp, only a cancellation of exactly this message is certain to be meant for it.
        return entry if entry is not None and entry.target == "message" else None

    def _left_for(self, cause: CancelCause) -> CancelCause:
        """Leave the message to another worker; return the cause if the broker will not deliver it again."""
        if self._redelivers:
            raise ExecutionLeftError
        return cause

    @property
    def _redelivers(self) -> bool:
        return self._owner.acknowledges and not self._is_acknowledged

    async def _claim(self) -> CancelCause | None:
        """Try to get the claim; return the cause if the host is gone.

        Raises:
            ExecutionEndedError: The message was executed.
        """
        link = self._link
        if not link.judges:
            return None
        try:
            if self.host is not None and not await self._worker.is_alive(self.host):
                return host_lost(self.host) if link.judges else None
            claim = await link.call(lambda: link.bus.claim(self.task_id, link.node, self._delivery))
        except BusUnavailableError:
            return None
        if claim is Claim.DONE:
            raise ExecutionEndedError
        if claim is Claim.HELD:
            self._wait_for_claim()
        if claim is Claim.TAKEN:
            self._is_claimed = True
            self._keeper.add_claim(self.task_id, self._on_lost)
        return None

    def _wait_for_claim(self) -> None:
        """Keep waiting, unless another delivery of the message already waits in this process.

        Redis Streams redeliver a message repeatedly while it runs, and each delivery takes a receiver slot.
        """
        if not self._waits:
            self._duplicates, self._waits = self._worker.begin_to_wait((self.task_id, self._delivery))
            if not self._waits:
                raise ExecutionLeftError

    def _until_deadline(self, pause: float) -> float:
        if self._deadline is None:
            return pause
        return max(0.0, min(pause, self._deadline - asyncio.get_running_loop().time()))

    # -- the managed task ---------------------------------------------------------------------

    def _start(self, coro: Coroutine[Any, Any, Any]) -> ManagedTask[Any]:
        options = self._options
        context, is_child = self._context()
        timeout = self._deadline
        if timeout is not None:
            timeout = max(0.0, timeout - asyncio.get_running_loop().time())
        try:
            task = self._worker.fleet.manager.create_task(
                coro,
                name=options.name,
                group=options.group or self._worker.group,
                priority=options.priority,
                timeout=timeout,
                trace=None if is_child else "new",
                context=context,
            )
        except ManagerClosedError:
            # The shutdown has not reached this worker yet, or was not caused by it.
            cause = CancelCause.make(CancelKind.SHUTDOWN, "the manager of the worker is shut down")
            self._left_for(cause)
            raise
        self.task = task
        self._cancellations.track(self.task_id, task, self._sent)
        self._worker.add(self)
        return task

    def _context(self) -> tuple[Context, bool]:
        """Return the context of the task, and whether its span is a child of the current one there."""
        stamp = self._options.stamp
        carrier = stamp.carrier if stamp is not None else {}
        here = current_span_context()
        context = extract(carrier)
        sender = current_span_context(context)
        if here is not None and sender is not None and here.trace_id == sender.trace_id:
            # An instrumentation of Taskiq has started a span below the sender's, or this is the sender.
            context = copy_context()
            is_child = True
        else:
            is_child = self.host is not None
        # In one process, the message is handled in a context that was copied from the sender's.
        context.run(current_binding.set, None)
        return context, is_child

    async def _result_of(self, task: ManagedTask[Any]) -> Any:
        try:
            return await task
        except asyncio.CancelledError:
            if not task.done() or _is_being_cancelled():
                raise
        except TimeoutError:
            if not timed_out(task):
                raise
        await self._end_cancelled(task)

    async def _end_cancelled(self, task: ManagedTask[Any]) -> None:
        cause = task.cause or CancelCause.make(CancelKind.EXPLICIT)
        if self._is_lost:
            raise ExecutionLeftError
        if cause.kind is CancelKind.SHUTDOWN and self._cancellation() is None:
            self._left_for(cause)
        is_timeout = cause.kind is CancelKind.TIMEOUT
        error: Exception = (
            TimeoutError(cause.message or "") if is_timeout else RemoteCancelledError(str(cause))
        )
        self._reported = error
        await self._save_again(self._failed(error, {CAUSE: json.dumps(cause.to_dict())}))
        self._tell_host(Outcome.TIMEOUT if is_timeout else Outcome.CANCELLED, cause)
        raise ExecutionEndedError

    # -- the end ------------------------------------------------------------------------------

    def _failed(self, error: Exception, labels: dict[str, str]) -> TaskiqResult[Any]:
        return TaskiqResult(
            is_err=True,
            return_value=None,
            execution_time=round(self.loop.time() - self._received_at, 2),
            error=error,
            labels={**self._message.labels, **labels},
        )

    async def _save_again(self, result: TaskiqResult[Any]) -> None:
        """Save a result that the receiver does not save, or could not save.

        If the value cannot be saved, an error replaces it: further attempts would fail for the same reason,
        while the caller and this slot of the worker wait.
        """
        is_receivers = result is self._unsaved
        until = self.loop.time() + _SAVE_FOR
        is_replaced = False
        while True:
            try:
                await self._owner.result_backend.set_result(self.task_id, result)
            except Exception as error:
                if isinstance(error, _OF_THE_VALUE) and not is_replaced:
                    is_replaced = True
                    reason = f"its result cannot be saved: {type(error).__name__}: {error}"
                    error = RemoteResultError(f"the remote task {self.task_id} has ended, and {reason}")
                    result = self._failed(error, {})
                elif self.loop.time() >= until or self._worker.stopping is not None:
                    logger.exception("the result of message %s could not be saved", self.task_id)
                    self._tell_host(Outcome.ABANDONED)
                    if is_receivers:
                        self._unsaved = None
                    return
                else:
                    await asyncio.sleep(_SAVE_PAUSE)
            else:
                if is_receivers:
                    self._unsaved = result
                    self.saved()
                return

    def _tell_host(self, outcome: Outcome, cause: CancelCause | None = None) -> None:
        if self.host is None:
            return
        link = self._link
        fields: dict[str, Any] = {} if cause is None else cause_fields(cause)
        entry = EndedEntry(
            node=link.node,
            task_id=self.task_id,
            outcome=outcome.value,
            cancelled=cause is not None,
            call=None if self._options.stamp is None else self._options.stamp.call,
            **fields,
        )
        link.post_to(self.host, entry)

    def _on_lost(self) -> None:
        self._is_lost = True
        self._is_claimed = False
        self.cancel(CancelCause.make(CancelKind.HOST_LOST, "another worker executes this task now"))

    def _settle(self, *, executed: bool) -> None:
        """End the claim: mark the message as executed, or release it for another worker."""
        if not self._is_claimed:
            return
        self._is_claimed = False
        self._keeper.drop_claim(self.task_id)
        link = self._link
        if executed:
            self._finishing = link.finish(self.task_id, self._delivery)
        else:
            self._worker.in_background(link.call(lambda: link.bus.release(self.task_id, link.node)))


def _traceback_of(error: BaseException) -> TracebackType | None:
    """Return the traceback of an error without the frames of the receiver and of this package."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_globals.get("__name__", "").startswith(_NOT_SHOWN):
        found = found.tb_next
    return found or error.__traceback__


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
