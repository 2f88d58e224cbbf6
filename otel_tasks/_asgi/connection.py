"""One request's connection: detects that the client has left, at almost no cost.

No request pays for a task that watches it. ``sweeper`` looks at the requests in flight at an interval. A
request that lives through a whole interval gets a watcher: a task that awaits the server's ``receive``.

Rules, each with a test of its own:

1. One reader at a time. While the application waits in ``receive()``, that call is the watcher. While the
   watcher reads, the application waits for what it reads. On most servers, two readers hang or lose messages.
2. A message that the watcher has read is returned without suspending: Starlette polls ``receive`` in a
   cancelled scope. A cancellation while waiting for the watcher loses no message.
3. The watcher keeps at most the buffer limit and one message. Then it stops, and starts again once the
   application has read on.
4. A disconnect is sticky: some servers send it once and then hang, others repeat it.
5. A disconnect after the end of the response does not mean that the client left.
6. An empty ``http.request`` after the end of the body is dropped (uvicorn sends one to a second reader).
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from otel_tasks._core.native import asyncio_cancel, asyncio_uncancel
from otel_tasks._core.suspension import is_suspended

if TYPE_CHECKING:
    from otel_tasks._asgi.sweeper import Sweeper
    from otel_tasks._core.events import CancelCause

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_DISCONNECTS = frozenset({"http.disconnect", "websocket.disconnect"})
_FINAL_UNLESS_MORE = {
    "http.response.trailers": "more_trailers",
    "http.response.pathsend": "more_body",
    "websocket.close": "more_body",
    "websocket.http.response.body": "more_body",
}
# The current task of a loop. Before Python 3.12 the public function is written in Python around this table,
# and takes 0.2 us of the 2 us that a request costs.
task_in: Callable[[asyncio.AbstractEventLoop], asyncio.Task[Any] | None] = (
    asyncio.current_task if sys.version_info >= (3, 12) else vars(asyncio.tasks)["_current_tasks"].get
)
# Added to the length of each body, so that a flood of empty messages reaches the limit too.
_MESSAGE_OVERHEAD = 256


class ClientDisconnected(OSError):
    """The application sent a message after the client had disconnected.

    Raised by ``send()``, as the ASGI specification (2.4) requires of servers. It does not leave the
    middleware.
    """


class Connection:
    """The server's ``receive`` and ``send`` for one request, and what they say about its client.

    Attributes:
        scope: The ASGI scope.
        sweeper: The sweeper of the running loop.
        server_send: The server's ``send``.
        start: The message that started the response; empty before it.
        complete: It has sent all of it. Set before the last message is passed to the server, because granian
            delivers the disconnect inside that call.
        left: The client left before the response was complete, or the request was cut short.
        closed: The application has returned or raised.
        disconnect: The server's disconnect message, or the one made up for a request that was cut short; None
            before it.
        send_error: The error of the server's ``send`` that reported the disconnect.
        notified: The application's tasks that learned of the disconnect themselves: they read the message,
            wait for it, or met the server's error in ``send``. Empty until the client has left.
    """

    __slots__ = (
        "_ahead",
        "_body_ended",
        "_interrupted_at",
        "_is_reading",
        "_is_watched",
        "_reader",
        "_receivers",
        "_server_receive",
        "_watch_pending",
        "_watcher",
        "closed",
        "complete",
        "disconnect",
        "left",
        "notified",
        "scope",
        "send_error",
        "server_send",
        "start",
        "sweeper",
    )

    scope: Scope
    sweeper: Sweeper
    server_send: Send
    start: Message
    complete: bool
    left: bool
    closed: bool
    disconnect: Message | None
    send_error: OSError | None
    notified: set[asyncio.Task[Any]] | frozenset[asyncio.Task[Any]]
    _server_receive: Receive
    _body_ended: bool
    # A task is in the server's receive().
    _is_reading: bool
    # The application's task in its last call, and how often it had been cancelled when `interrupt_reader`
    # ended that call; None if it did not. Unset before the first call.
    _reader: asyncio.Task[Any] | None
    _interrupted_at: int | None
    # It has lived through a whole interval.
    _is_watched: bool
    # Old enough to be watched, but another task reads, or the buffer is full.
    _watch_pending: bool
    _watcher: asyncio.Task[None] | None
    # None while nothing is kept.
    _ahead: ReadAhead | None
    # The application's tasks that wait for the reader, each with what wakes it.
    _receivers: dict[asyncio.Task[Any] | None, asyncio.Future[None]] | None

    # Request.__init__ sets all of this. An __init__ here would cost each request 1 call more than its 17, and
    # 13 bytecode instructions of 285 (`python -m benchmarks.cost`).

    def on_disconnect(self, message: Message, cause: CancelCause | None) -> None:
        """Called once, when the client has left; with a cause if the request was cut short instead."""
        raise NotImplementedError

    def time_limit(self) -> float | None:
        """Return the seconds that the request may take; None for no bound."""
        raise NotImplementedError

    def on_time_limit(self, seconds: float) -> None:
        """Called once the request has taken that long."""
        raise NotImplementedError

    def withholds_disconnect(self) -> bool:
        """Return True while the calling task must not receive the disconnect."""
        raise NotImplementedError

    def was_cut(self) -> bool:
        """Return True if it was cut short: its disconnect is not the server's."""
        raise NotImplementedError

    async def close_streams(self) -> None:
        """Close the generators that the calling task, in ``send``, iterates for the response."""
        raise NotImplementedError

    def has_ended_send(self) -> bool:
        """Return True in the ``send`` that the connection itself has interrupted: nobody is cancelled."""
        raise NotImplementedError

    async def on_dropped_chunk(self) -> None:
        """Called when a part of the body is dropped: the client has left, and more parts will follow."""
        raise NotImplementedError

    # The application's side.

    async def receive(self) -> Message:
        """Return the next message: one that the watcher has read, or the server's next.

        Cancellation: loses no message that the watcher has read.
        """
        while True:
            if self._ahead is not None or (self.disconnect is not None and self._delivers_disconnect()):
                return self._next_kept()
            if self._is_reading or self.disconnect is not None:
                await self._wait_for_reader()
                continue
            self._is_reading = True
            self._reader, self._interrupted_at = task_in(self.sweeper.loop), None
            try:
                message = await self._server_receive()
            except (OSError, asyncio.CancelledError) as error:
                message = self._read_instead(error)
            finally:
                self._is_reading = False
                if self._watch_pending or self._receivers:
                    self._resume_others()
            if message["type"] == "http.request" and not self._body_ended and self.disconnect is None:
                # As below, whose call would be 0.4 us of a POST.
                self._body_ended = not message.get("more_body", False)
                return message
            if self._record(message, asyncio.current_task):
                if self._delivers_disconnect():
                    return message
                continue
            # Let others run: the server may repeat the same message without suspending.
            await asyncio.sleep(0)

    async def send(self, message: Message) -> None:
        """Pass ``message`` to the server, unless the client has left.

        Raises:
            ClientDisconnected: The client has left, and the application would send without end.
            OSError: From the server: this message met the closed connection.

        Cancellation: forwarded to the server's ``send``.
        """
        if self.left:
            await self._send_late(message)
            return
        kind = message["type"]
        if kind == "http.response.body":
            if not message.get("more_body") and ("trailers" not in self.start or not self.start["trailers"]):
                self.complete = True
        elif kind == "http.response.start":
            self.start = message
        elif (more := _FINAL_UNLESS_MORE.get(kind)) is not None and not message.get(more, False):
            self.complete = True
        try:
            await self.server_send(message)
        except (OSError, asyncio.CancelledError) as error:
            if not await self._recover(message, error):
                raise

    # The side of the sweeper and the middleware.

    def watch(self) -> None:
        """Start watching: the request has lived through a whole interval."""
        self._is_watched = True
        if self.disconnect is not None or self.complete or self.closed:
            return
        if self._is_reading or self._is_full():
            self._watch_pending = True
            return
        self._is_reading = True
        self._watcher = self.sweeper.start(self._watch())

    def close(self) -> None:
        """Stop watching: the application has returned or raised."""
        self.closed = True
        if self._is_watched:
            self.sweeper.forget(self)
            if self._watcher is not None:
                self._watcher.cancel()

    def cut(self, message: Message, cause: CancelCause) -> None:
        """Let the application receive ``message``, a disconnect, although the client has not left.

        Args:
            message: The disconnect; the server's own is ignored from here on.
            cause: Passed to ``on_disconnect``.
        """
        self._record_disconnect(message, self._reading_task, cause)
        self.interrupt_reader()

    def interrupt_reader(self) -> None:
        """Let the application's task that is in the server's ``receive()`` receive the disconnect instead."""
        reader = self._reading_task()
        if reader is None or self._interrupted_at is not None or not self._delivers_disconnect():
            return
        # A task that is about to run has its message, or has been cancelled by others.
        if is_suspended(reader):
            self._interrupted_at = reader.cancelling()
            # Not ManagedTask.cancel(): only this call ends, and `receive` withdraws the request.
            asyncio_cancel(reader)

    def wake_receivers(self) -> None:
        """Let the application's tasks that wait in ``receive()`` look again."""
        for waiter in (self._receivers or {}).values():
            if not waiter.done():
                waiter.set_result(None)

    # Below: reading.

    def _resume_others(self) -> None:
        if self._watch_pending:
            self._sweep_again()
        self.wake_receivers()

    async def _watch(self) -> None:
        try:
            while self.disconnect is None and not self._is_full():
                # Only the server's call: an error of this package must not pass for the server's.
                try:
                    message = await self._server_receive()
                except OSError:
                    message = self._disconnect_message()
                except Exception:
                    # Left to the application, which meets it in its own receive().
                    return
                if not self._record(message, _no_task):
                    # Later: a server that repeats this message would keep the loop busy.
                    self._sweep_again()
                    return
                self._keep(message)
            self._watch_pending = self.disconnect is None
        finally:
            self._is_reading = False
            self._watcher = None
            self.wake_receivers()

    def _record(self, message: Message, reader: Callable[[], asyncio.Task[Any] | None]) -> bool:
        """Update the state from a message; return False if the message is to be dropped."""
        kind = message["type"]
        if kind == "http.request":
            if self._body_ended and not message.get("body"):
                return False
            self._body_ended = not message.get("more_body", False)
        elif kind in _DISCONNECTS:
            self._record_disconnect(message, reader)
        return True

    def _reading_task(self) -> asyncio.Task[Any] | None:
        """Return the application's task that is in the server's ``receive()``."""
        is_watched = self._watcher is not None and not self._watcher.done()
        return self._reader if self._is_reading and not is_watched else None

    def _read_instead(self, error: BaseException) -> Message:
        """Return the disconnect that ``error``, of the server's ``receive``, stands for, or raise it."""
        message = self._disconnect_message() if isinstance(error, OSError) else self._withdraw_interrupt()
        if message is None:
            raise error
        return message

    def _withdraw_interrupt(self) -> Message | None:
        """Withdraw the cancel request of ``interrupt_reader``, and return the disconnect that it delivers.

        Returns:
            None if others have cancelled the reader, alone or too.
        """
        before, reader = self._interrupted_at, self._reader
        if before is None or reader is None or asyncio_uncancel(reader) != before:
            return None
        return self.disconnect

    def _record_disconnect(
        self,
        message: Message,
        reader: Callable[[], asyncio.Task[Any] | None],
        cause: CancelCause | None = None,
    ) -> None:
        if self.disconnect is not None:
            return
        self.disconnect = message
        if message["type"] == "http.disconnect":
            # A WebSocket's earlier messages are still delivered; a request's body ends here.
            self._ahead = None
        if not self.complete:
            self.left = True
            notified = {reader(), *(self._receivers or ())}
            self.notified = {task for task in notified if task is not None}
            self.on_disconnect(message, cause)
        self.wake_receivers()

    def _is_full(self) -> bool:
        return self._ahead is not None and self._ahead.size >= self.sweeper.buffer_limit

    def _keep(self, message: Message) -> None:
        if message["type"] in _DISCONNECTS:
            return
        if self._ahead is None:
            self._ahead = ReadAhead()
        self._ahead.add(message)
        self.wake_receivers()

    def _delivers_disconnect(self) -> bool:
        return not (self.left and self.withholds_disconnect())

    def _next_kept(self) -> Message:
        if self._ahead is not None:
            return self._take(self._ahead)
        assert self.disconnect is not None  # noqa: S101  # the caller has checked
        if self.left and (reader := asyncio.current_task()) is not None:
            self.notified = {*self.notified, reader}
        return dict(self.disconnect)

    def _take(self, ahead: ReadAhead) -> Message:
        message = ahead.take()
        if self._watch_pending and not self._is_full():
            self._sweep_again()
        if not ahead:
            self._ahead = None
        return message

    def _sweep_again(self) -> None:
        self._watch_pending = False
        if not self.closed:
            self.sweeper.watch_again(self)

    async def _wait_for_reader(self) -> None:
        """Wait until the reader has read a message, or has stopped."""
        if self._receivers is None:
            self._receivers = {}
        task = asyncio.current_task()
        waiter = self._receivers[task] = self.sweeper.loop.create_future()
        try:
            await waiter
        finally:
            # Not earlier: a task that was woken and has not run yet is still about to receive.
            del self._receivers[task]

    def _disconnect_message(self) -> Message:
        if self.scope["type"] == "websocket":
            return {"type": "websocket.disconnect", "code": 1006, "reason": None}
        return {"type": "http.disconnect"}

    # Below: sending.

    async def _recover(self, message: Message, error: BaseException) -> bool:
        """Handle what the server's ``send`` has raised; return True if the application need not know."""
        kind = message["type"]
        if isinstance(error, OSError):
            # A missing file is not a missing client.
            if kind != "http.response.pathsend":
                self.complete = False
                self.send_error = error
                self._record(self._disconnect_message(), asyncio.current_task)
        elif self.left and self.has_ended_send():
            await self._send_late(message)
            return True
        if self.left and kind == "http.response.body":
            await self.close_streams()
        return False

    async def _send_late(self, message: Message) -> None:
        kind = message["type"]
        if kind.startswith("websocket."):
            if kind in ("websocket.send", "websocket.accept"):
                raise _refusal_of(kind)
            return
        more = bool(message.get("more_body", False))
        # As if it had been sent: from here on, the application cleans up.
        self.complete = kind == "http.response.body" and not more
        if more and self._spec_version() >= (2, 4):
            await self.close_streams()
            raise _refusal_of(kind)
        # The rest is dropped, so that a handler that is not cancelled ends normally.
        if more:
            await self.on_dropped_chunk()

    def _spec_version(self) -> tuple[int, ...]:
        version: str = self.scope.get("asgi", {}).get("spec_version", "2.0")
        return tuple(int(part) for part in version.split("."))


class ReadAhead(deque[Message]):
    """Messages that the watcher has read and the application has not, oldest first.

    Attributes:
        size: Bytes that they take.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def add(self, message: Message) -> None:
        """Keep a message."""
        self.append(message)
        self.size += _size_of(message)

    def take(self) -> Message:
        """Remove the oldest message, and return it."""
        message = self.popleft()
        self.size -= _size_of(message)
        return message


def _refusal_of(kind: str) -> ClientDisconnected:
    return ClientDisconnected(f"cannot send {kind!r}: the client has disconnected")


def _no_task() -> None:
    """The watcher reads: no task of the application is notified."""


def _size_of(message: Message) -> int:
    body = message.get("body") or message.get("bytes") or message.get("text") or b""
    return len(body) + _MESSAGE_OVERHEAD
