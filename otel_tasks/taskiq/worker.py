"""Worker: the executions of one process, and the hosts that wait for them.

Rules, each with its own test:

1. An execution whose host is gone is cancelled with cause ``host_lost``. A host is gone if its lease has
   expired while this node could judge it.
2. One call checks the leases of all hosts, once per round, and only while an execution has a host.
3. A host gets the progress of its executions once per round, and only the newest report.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol

from taskiq.utils import maybe_awaitable

from otel_tasks import CancelCause, CancelKind
from otel_tasks._core.telemetry import quiet_context
from otel_tasks.fleet.bus import BusUnavailableError
from otel_tasks.fleet.entries import ProgressEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
    from contextvars import Context

    from otel_tasks import ManagedTask
    from otel_tasks.fleet import Fleet

# Seconds between two rounds, and seconds for which a lease that was valid counts as valid.
_ROUND: Final = 0.5
_TRUSTED: Final = 1.0


class Running(Protocol):
    """What a worker needs of an execution."""

    @property
    def task_id(self) -> str:
        """The id of the broker's message."""
        ...

    @property
    def host(self) -> str | None:
        """The node that waits for the result."""
        ...

    @property
    def task(self) -> ManagedTask[Any] | None:
        """The managed task, once the function runs."""
        ...

    def cancel(self, cause: CancelCause) -> None:
        """Cancel the execution."""
        ...


class Duplicates:
    """The deliveries of a message that end immediately, because another one waits for its claim here.

    They are acknowledged together with it. Otherwise, the broker would redeliver them after the mark of the
    execution has expired.
    """

    def __init__(self) -> None:
        self._acks: list[Callable[[], Awaitable[None] | None]] = []
        self._is_acknowledged = False
        self._is_left = False

    async def add(self, ack: Callable[[], Awaitable[None] | None]) -> None:
        """Acknowledge a duplicate with the delivery that waits; at once if that is acknowledged.

        Cancellation: the duplicate may be delivered again.
        """
        if self._is_acknowledged:
            await maybe_awaitable(ack())
        elif not self._is_left:
            self._acks.append(ack)

    async def acknowledge(self) -> None:
        """Acknowledge the duplicates.

        Cancellation: those that are left may be delivered again.
        """
        self._is_acknowledged = True
        while self._acks:
            await maybe_awaitable(self._acks.pop()())

    def leave(self) -> None:
        """Acknowledge none of them: another worker takes the message."""
        self._is_left = True
        self._acks.clear()


class Worker:
    """The executions of one broker in this process.

    Args:
        fleet: The fleet.
        group: The labeled group of executions whose message names none.
    """

    def __init__(self, fleet: Fleet, group: str) -> None:
        self.fleet = fleet
        self.group = group
        # Set once this process stops: it starts no further execution.
        self.stopping: CancelCause | None = None
        self._running: dict[Running, int] = {}
        # The executions that wait for their claims, by each target of a cancellation that reaches them.
        self._changes: dict[str, dict[asyncio.Future[None], None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._alive_until: dict[str, float] = {}
        self._waiting: dict[tuple[str, str], Duplicates] = {}
        self._background: set[asyncio.Task[None]] = set()
        # One context for all calls in the background: to make one costs as much as the call.
        self._quiet: Context | None = None

    def add(self, execution: Running) -> None:
        """Watch an execution that has started."""
        # The number of the last report of progress that its host has.
        self._running[execution] = 0
        if execution.host is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_ROUND, self._start_round)

    def discard(self, execution: Running) -> None:
        """Stop watching an execution."""
        self._running.pop(execution, None)

    def begin_to_wait(self, message: tuple[str, str]) -> tuple[Duplicates, bool]:
        """Record that a delivery of a message waits for its claim.

        Returns:
            The duplicates of the message, and False if another delivery waits already.
        """
        is_first = message not in self._waiting
        return self._waiting.setdefault(message, Duplicates()), is_first

    def end_to_wait(self, message: tuple[str, str]) -> None:
        """Undo ``begin_to_wait``."""
        del self._waiting[message]

    def wake(self) -> None:
        """Let the executions that wait in ``changes`` look again."""
        for futures in self._changes.values():
            _set(futures)

    def wake_reached(self, target: str) -> None:
        """Let the executions look again that a cancellation of a target reaches, and no others."""
        _set(self._changes.get(target, ()))

    async def changes(self, targets: Iterable[str], timeout: float) -> None:
        """Wait for ``wake()``, or a cancellation of one of these targets, at most ``timeout`` seconds.

        Cancellation: ends the wait.
        """
        changed = asyncio.get_running_loop().create_future()
        targets = list(targets)
        for target in targets:
            self._changes.setdefault(target, {})[changed] = None
        try:
            await asyncio.wait([changed], timeout=timeout)
        finally:
            for target in targets:
                del self._changes[target][changed]
                if not self._changes[target]:
                    del self._changes[target]

    async def is_alive(self, host: str) -> bool:
        """Return whether the lease of a node is valid, as of a moment ago.

        Raises:
            BusUnavailableError: The bus fails.

        Cancellation: ends the call.
        """
        if asyncio.get_running_loop().time() < self._alive_until.get(host, 0.0):
            return True
        return host in await self._valid_leases({host})

    def in_background(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a call of the bus that nobody waits for, and ignore a failure of the bus."""
        if self._quiet is None:
            self._quiet = quiet_context()
        task = asyncio.get_running_loop().create_task(_forgiven(work), context=self._quiet)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def stop(self, cause: CancelCause) -> None:
        """Start no further execution."""
        self.stopping = cause
        self.wake()

    async def end(self, cause: CancelCause, timeout: float) -> None:
        """Cancel the executions, and wait for them and for the calls of the bus, at most ``timeout`` seconds.

        Cancellation: ends the wait; the executions are cancelled.
        """
        self.stop(cause)
        for execution in list(self._running):
            execution.cancel(cause)
        tasks = [execution.task for execution in self._running if execution.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
            # The end of an execution starts a call of the bus.
            await asyncio.sleep(0)
        if self._background:
            await asyncio.wait(self._background, timeout=timeout)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- rounds -----------------------------------------------------------------------------

    def _start_round(self) -> None:
        self._timer = None
        hosts = {execution.host for execution in self._running if execution.host is not None}
        if hosts:
            self._report_progress()
            self.in_background(self._judge(hosts))
            self._timer = asyncio.get_running_loop().call_later(_ROUND, self._start_round)

    def _report_progress(self) -> None:
        for execution, sent in self._running.items():
            progress = None if execution.task is None else execution.task.info().progress
            if progress is None or progress.number == sent or execution.host is None:
                continue
            self._running[execution] = progress.number
            link = self.fleet.link
            entry = ProgressEntry(
                node=link.node,
                task_id=execution.task_id,
                done=progress.done,
                total=progress.total,
                message=progress.message,
            )
            link.post_to(execution.host, entry)

    async def _judge(self, hosts: Collection[str]) -> None:
        now = asyncio.get_running_loop().time()
        unsure = {host for host in hosts if self._alive_until.get(host, 0.0) <= now}
        if not unsure or not self.fleet.link.judges:
            return
        valid = await self._valid_leases(unsure)
        if not self.fleet.link.judges:
            return
        for execution in list(self._running):
            if execution.host is not None and execution.host in unsure - valid:
                execution.cancel(host_lost(execution.host))

    async def _valid_leases(self, hosts: set[str]) -> set[str]:
        link = self.fleet.link
        valid = await link.call(lambda: link.bus.leases(hosts))
        now = asyncio.get_running_loop().time()
        self._alive_until = {host: until for host, until in self._alive_until.items() if until > now}
        self._alive_until.update(dict.fromkeys(valid, now + _TRUSTED))
        return valid


def _set(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def host_lost(host: str) -> CancelCause:
    """Return the cause for work of a process that is gone."""
    return CancelCause.make(CancelKind.HOST_LOST, f"the process {host}, which asked for this work, is gone")


async def _forgiven(work: Coroutine[Any, Any, object]) -> None:
    # A claim that is not finished or released expires, and the next round judges the leases.
    with suppress(BusUnavailableError):
        await work
