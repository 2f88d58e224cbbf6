"""Stops a worker process after SIGTERM or SIGINT: its tasks get a grace, and are then cancelled.

``taskiq worker`` sends SIGINT to its processes. Their handler stops the receiver from reading, and then waits
for the running tasks, without a bound. This module acts on the same signal: no further execution starts, the
tasks get their grace, and those that are left are cancelled with cause ``shutdown``. Their messages are not
acknowledged, so another worker takes them.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

from otel_tasks import CancelCause, CancelKind
from otel_tasks._core.lifetime import shut_down
from otel_tasks._core.options import FROM_MANAGER
from otel_tasks._core.signals import ChainedHandler, in_main_thread
from otel_tasks._core.telemetry import quiet_context

if TYPE_CHECKING:
    from otel_tasks._core.options import FromManager
    from otel_tasks.fleet import Fleet
    from otel_tasks.taskiq.worker import Worker

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """Stops the executions of a worker process at its signal.

    Args:
        fleet: The fleet, whose manager is shut down.
        worker: The executions.
        grace: Seconds that tasks have to finish.
    """

    def __init__(self, fleet: Fleet, worker: Worker, grace: float | FromManager) -> None:
        self._fleet = fleet
        self._worker = worker
        self._grace = grace
        self._handlers: list[ChainedHandler] = []
        self._stopping: asyncio.Task[None] | None = None

    def install(self) -> None:
        """Watch the signals from now on; does nothing outside the main thread, where no signal arrives."""
        if self._handlers or not in_main_thread():
            return
        loop = asyncio.get_running_loop()

        def on_signal(_: Any) -> None:
            # A signal may arrive while the loop waits, which it would go on to do.
            loop.call_soon_threadsafe(self._begin)

        self._handlers = [ChainedHandler(number, on_signal) for number in _SIGNALS]

    async def finish(self) -> None:
        """Restore the handlers, and wait until the tasks have been stopped, if they are being stopped.

        Cancellation: ends the wait.
        """
        handlers, self._handlers = self._handlers, []
        for handler in reversed(handlers):
            handler.leave()
        if self._stopping is not None:
            await asyncio.wait([self._stopping])

    def _begin(self) -> None:
        if self._stopping is not None:
            return
        self._worker.stop(CancelCause.make(CancelKind.SHUTDOWN, "the worker is stopping"))
        self._stopping = asyncio.get_running_loop().create_task(self._stop(), context=quiet_context())

    async def _stop(self) -> None:
        await shut_down(self._fleet.manager, self._grace, FROM_MANAGER, "the signal that stops this worker")
