"""The source of ``--fleet``: asks the nodes themselves, from an event loop in a thread of this process.

Rules, each with its own test:

1. A call ends within its timeout, even if the server is paused.
2. Closing ends the thread, and leaves nothing behind: no task, no node, no line on stderr.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from otel_tasks_terminal.errors import CommandError, ExitCode, usage
from otel_tasks_terminal.source import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from otel_tasks_terminal.observer import Observer
    from otel_tasks_terminal.source import Answer, Event, Pairs

T = TypeVar("T")

EXAMPLE = "redis://127.0.0.1:6379/0"
# Seconds for leaving the fleet, and for the end of the thread.
LEAVE = 0.5
END = 3.0


def fleet_source(url: str, namespace: str | None, *, timeout: float) -> FleetSource:
    """Create the source for a server and a fleet.

    Raises:
        CommandError: An argument is not valid, or a package that the fleet needs is not installed.
    """
    scheme, separator, _ = url.partition("://")
    if separator and scheme == "memory":
        raise usage("memory:// joins the fleets of one process: --fleet needs the URL of a Redis server")
    if scheme not in ("redis", "rediss", "unix") or not separator:
        # Not the URL itself: it may hold a password.
        raise usage(f"--fleet takes the URL of a Redis server, such as {EXAMPLE}")
    from otel_tasks_terminal.observer import Observer

    return FleetSource(_LoopThread(Observer(url, namespace)), timeout=timeout)


class FleetSource(Source):
    """The nodes of a fleet as a source.

    Args:
        thread: The thread of the observer.
        timeout: Seconds to wait for each answer.
        owner: True if closing this source ends the thread.
    """

    def __init__(self, thread: _LoopThread, *, timeout: float, owner: bool = True) -> None:
        self._thread = thread
        self._timeout = timeout
        self._is_owner = owner
        self._waiting: Future[Any] | None = None

    @property
    def address(self) -> object:
        """The fleet and its server, without a password."""
        return self._thread.observer

    def snapshot(self) -> Answer:
        """Fetch the overview."""
        return self._call(lambda observer: observer.snapshot())

    def tasks(self, pairs: Pairs) -> Answer:
        """Fetch one page of a list of tasks."""
        return self._call(lambda observer: observer.tasks(pairs))

    def task(self, task_id: str, node: str | None = None) -> Answer:
        """Fetch everything about one task, of these nodes alone if they are named."""
        return self._call(lambda observer: observer.task(task_id, node))

    def cancel(self, uid: str, reason: str | None) -> Answer:
        """Request the cancellation of the task with this uid."""
        return self._call(lambda observer: observer.cancel(uid, reason))

    def events(self, pairs: Pairs) -> Iterator[Event]:
        """Follow a stream until it ends."""
        stream, events = self._call(lambda observer: observer.opened(pairs))
        try:
            while True:
                yield from events
                if events and events[-1].name == "bye":
                    return
                events = self._call(lambda observer: observer.news(stream, self._timeout))
        finally:
            self._thread.post(stream.hub.remove, stream)

    def fresh(self, *, timeout: float | None = None) -> FleetSource:
        """Create another source of the same fleet, for another thread; this one must stay open."""
        return FleetSource(self._thread, timeout=timeout or self._timeout, owner=False)

    def interrupt(self) -> None:
        """End the wait of another thread."""
        if self._waiting is not None:
            self._waiting.cancel()

    def close(self) -> None:
        """Leave the fleet."""
        if self._is_owner:
            self._thread.close()

    def _call(self, ask: Callable[[Observer], Coroutine[Any, Any, T]]) -> T:
        waiting = self._thread.submit(ask)
        self._waiting = waiting
        try:
            return waiting.result(self._timeout)
        except TimeoutError:
            raise CommandError(
                ExitCode.UNREACHABLE, f"cannot reach {self.address}: no answer within {self._timeout:g} s"
            ) from None
        except CancelledError:
            raise _closed() from None
        finally:
            # Also on Ctrl-C. Has no effect on a call that is done.
            waiting.cancel()


class _LoopThread:
    """An event loop in a thread, with the observer that belongs to it.

    Args:
        observer: The observer.
    """

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._lock = threading.Lock()
        self._is_closed = False
        self._closing = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        # A daemon: the resolver may still look up a name when the command ends.
        self._thread = threading.Thread(target=self._run, name="otel-tasks fleet", daemon=True)

    def submit(self, ask: Callable[[Observer], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start a coroutine in the loop."""
        with self._lock:
            # Under the lock: a coroutine that comes after the end would never run.
            if self._is_closed:
                raise _closed()
            if self._loop is None:
                self._thread.start()
                self._begun.wait()
            assert self._loop is not None  # noqa: S101  # the thread has set it
            loop = self._loop
            begun: Future[Future[T]] = Future()
            # In the loop: here, Ctrl-C could come after its creation, and it would never be awaited.
            loop.call_soon_threadsafe(
                lambda: begun.set_result(asyncio.run_coroutine_threadsafe(ask(self.observer), loop))
            )
            return begun.result()

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Call a function in the loop, if that runs."""
        with self._lock:
            if self._loop is not None and not self._is_closed:
                self._loop.call_soon_threadsafe(call, *args)

    def close(self) -> None:
        """Leave the fleet, and end the thread; a second call does nothing."""
        with self._lock:
            if self._is_closed or self._loop is None:
                self._is_closed = True
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(END)

    def _run(self) -> None:
        # It cancels the tasks that are left, and waits for them.
        with asyncio.Runner() as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        await self._closing.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE):
                await self.observer.leave()


def _closed() -> CommandError:
    return CommandError(ExitCode.UNREACHABLE, "the command ends")
