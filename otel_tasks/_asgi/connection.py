"""Noticing that the client has left, at next to no cost: one sweep per loop, one reader per request.

No request pays for a task that watches it. A ``Sweeper`` looks at the requests in flight from time to
time; only one that it meets a second time gets a watcher, a task that awaits the server's ``receive``.

Rules, each with a test of its own:

1. One reader at a time. While the application waits in ``receive()``, that call is the watcher; while the
   watcher reads, the application waits for what it brings. On most servers two readers hang or lose messages.
2. What the watcher read is handed out without suspending: Starlette polls ``receive`` in a cancelled scope.
   Being cancelled while waiting for the watcher loses nothing.
3. The watcher keeps no more than the buffer limit (and one message); then it stops, and is tried again once
   the application has read on.
4. A disconnect is sticky: servers say it once and hang, or say it again and again.
5. A disconnect after the end of the response is not the client leaving.
6. An empty ``http.request`` after the end of the body is no message (uvicorn sends one to a second reader).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from otel_tasks._core.telemetry import quiet_context

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
# What a message takes beside its body, so that a flood of empty ones meets the limit too.
_MESSAGE_OVERHEAD = 256


class ClientDisconnected(OSError):
    """The application sent something that nobody is there to receive.

    Raised by ``send()`` as the ASGI specification (2.4) asks of servers; it does not leave the middleware.
    """


class Connection:
    """The server's ``receive`` and ``send`` of one request, and what they tell about its client.

    Attributes:
        scope: The ASGI scope.
        sweeper: The sweeper of the running loop.
        started: The application has begun its response.
        complete: It has sent all of it; noted before the last message is handed to the server, for granian
            delivers the disconnect inside that call.
        left: The client has left before that.
        closed: The application has returned or raised.
        send_error: What the server's ``send`` raised because of it.
        told: The application's tasks that have learned of it by themselves: they read the message, wait for
            it, or met the server's error in ``send``. Empty until the client has left.
    """

    __slots__ = (
        "_body_ended",
        "_buffer",
        "_buffered",
        "_last",
        "_reading",
        "_ripe",
        "_server_receive",
        "_server_send",
        "_sweep",
        "_trailers",
        "_waiting",
        "_watcher",
        "closed",
        "complete",
        "left",
        "scope",
        "send_error",
        "started",
        "sweeper",
        "told",
    )

    scope: Scope
    sweeper: Sweeper
    started: bool
    complete: bool
    left: bool
    closed: bool
    send_error: OSError | None
    told: set[asyncio.Task[Any]] | frozenset[asyncio.Task[Any]]
    _server_receive: Receive
    _server_send: Send
    _body_ended: bool
    _trailers: bool
    # Somebody is in the server's receive().
    _reading: bool
    # Old enough to be watched, but somebody else reads, or the buffer is full.
    _ripe: bool
    _watcher: asyncio.Task[None] | None
    _buffer: deque[Message] | None
    _buffered: int
    _last: Message | None
    _waiting: dict[asyncio.Task[Any] | None, asyncio.Future[None]] | None
    # The sweeper's set in which it is, or was last.
    _sweep: set[Connection]

    # No __init__: a subclass sets all of this in its own. A call per request would be 0.15 us of 2.

    def on_disconnect(self, message: Message) -> None:
        """Called once, when the client has left."""
        raise NotImplementedError

    def withholds(self) -> bool:
        """True while the disconnect must not be delivered to the application's task that asks."""
        raise NotImplementedError

    # What the application calls.

    async def receive(self) -> Message:
        """Give the next message: one that the watcher kept, or the server's next.

        **Cancellation**: loses no message that the watcher has read.
        """
        while True:
            if self._buffer or (self._last is not None and not (self.left and self.withholds())):
                return self._at_hand()
            if self._reading or self._last is not None:
                await self._news()
                continue
            self._reading = True
            try:
                message = await self._server_receive()
            except OSError:
                message = self._disconnect_message()
            finally:
                self._reading = False
                if self._ripe:
                    self._back_to_sweep()
                if self._waiting:
                    self._wake()
            if self._note(message, asyncio.current_task):
                if self._last is None or not (self.left and self.withholds()):
                    return message
                continue
            # A turn for the others, should the server say the same again and again without waiting.
            await asyncio.sleep(0)

    async def send(self, message: Message) -> None:
        """Pass ``message`` on to the server, unless the client has left.

        Raises:
            ClientDisconnected: The client has left, and the application would go on and on.
            OSError: The server's, when this very message met the closed connection.

        **Cancellation**: passed on to the server's ``send``.
        """
        if self.left:
            self._send_late(message)
            return
        kind = message["type"]
        if kind == "http.response.body":
            if not (message.get("more_body", False) or self._trailers):
                self.complete = True
        elif kind == "http.response.start":
            self.started = True
            self._trailers = message.get("trailers", False)
        elif (more := _FINAL_UNLESS_MORE.get(kind)) is not None and not message.get(more, False):
            self.complete = True
        try:
            await self._server_send(message)
        except OSError as error:
            # A file that is not there is not a client that is not there.
            if kind != "http.response.pathsend":
                self.complete = False
                self.send_error = error
                self._note(self._disconnect_message(), asyncio.current_task)
            raise

    # What the sweeper and the middleware call.

    def ripen(self) -> None:
        """Begin to watch, now that the request has turned out to be a long one."""
        if self._last is not None or self.complete or self.closed:
            return
        if self._reading or self._buffered >= self.sweeper.buffer_limit:
            self._ripe = True
            return
        self._reading = True
        self._watcher = self.sweeper.start(self._watch())

    def close(self) -> None:
        """Stop watching: the application has returned."""
        self.closed = True
        self._ripe = False
        self._sweep.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()

    # Below: the reading side.

    async def _watch(self) -> None:
        try:
            while self._last is None and self._buffered < self.sweeper.buffer_limit:
                message = await self._read_ahead()
                if message is None:
                    return
                if not self._note(message, _nobody):
                    # Later: of a server that says it again and again the loop would see no end.
                    self._back_to_sweep()
                    return
                self._keep(message)
            self._ripe = self._last is None
        finally:
            self._reading = False
            self._watcher = None
            self._wake()

    async def _read_ahead(self) -> Message | None:
        # Nothing but the server's call in the `try`: an error of our own must not pass for the server's.
        try:
            return await self._server_receive()
        except OSError:
            return self._disconnect_message()
        except Exception:
            # The application's to meet, in its own receive().
            return None

    def _note(self, message: Message, reader: Callable[[], asyncio.Task[Any] | None]) -> bool:
        """Learn from a message; False when it is none."""
        kind = message["type"]
        if kind == "http.request":
            if self._body_ended and not message.get("body"):
                return False
            self._body_ended = not message.get("more_body", False)
        elif kind in _DISCONNECTS:
            self._note_disconnect(message, reader)
        return True

    def _note_disconnect(self, message: Message, reader: Callable[[], asyncio.Task[Any] | None]) -> None:
        if self._last is not None:
            return
        self._last = message
        if message["type"] == "http.disconnect":
            # Of a WebSocket all that came before is still delivered; a request's body ends here.
            self._buffer = None
        if not self.complete:
            self.left = True
            told = {reader(), *(self._waiting or ())}
            self.told = {task for task in told if task is not None}
            self.on_disconnect(message)
        self._wake()

    def _keep(self, message: Message) -> None:
        if message["type"] in _DISCONNECTS:
            return
        if self._buffer is None:
            self._buffer = deque()
        self._buffer.append(message)
        self._buffered += _weight(message)
        self._wake()

    def _at_hand(self) -> Message:
        if self._buffer:
            message = self._buffer.popleft()
            self._buffered -= _weight(message)
            if self._ripe and self._buffered < self.sweeper.buffer_limit:
                self._back_to_sweep()
            return message
        assert self._last is not None  # noqa: S101  # the caller has looked
        if self.left and (reader := asyncio.current_task()) is not None:
            self.told = {*self.told, reader}
        return dict(self._last)

    def _back_to_sweep(self) -> None:
        self._ripe = False
        self._sweep = self.sweeper.add(self)

    async def _news(self) -> None:
        """Wait until the reader has brought something, or has stopped."""
        if self._waiting is None:
            self._waiting = {}
        task = asyncio.current_task()
        waiter = self._waiting[task] = self.sweeper.loop.create_future()
        try:
            await waiter
        finally:
            # Not sooner: who has been woken but has not run yet is still about to receive.
            del self._waiting[task]

    def _wake(self) -> None:
        for waiter in (self._waiting or {}).values():
            if not waiter.done():
                waiter.set_result(None)

    def _disconnect_message(self) -> Message:
        if self.scope["type"] == "websocket":
            return {"type": "websocket.disconnect", "code": 1006, "reason": None}
        return {"type": "http.disconnect"}

    # Below: the sending side.

    def _send_late(self, message: Message) -> None:
        kind = message["type"]
        if kind.startswith("websocket."):
            endless = kind in ("websocket.send", "websocket.accept")
        else:
            # The rest is dropped, so that a handler which runs on ends in its own way.
            more = bool(message.get("more_body", False))
            endless = more and self._spec_version() >= (2, 4)
            # As if it had been sent: what runs from here on is the application's cleanup.
            self.complete = kind == "http.response.body" and not more
        if endless:
            raise ClientDisconnected(f"cannot send {kind!r}: the client has disconnected")

    def _spec_version(self) -> tuple[int, ...]:
        version: str = self.scope.get("asgi", {}).get("spec_version", "2.0")
        return tuple(int(part) for part in version.split("."))


class Sweeper:
    """Looks at the requests of one loop that are in flight, and lets the long ones be watched.

    A request that has seen one whole tick is ripe. One that is watched is in neither set, so that a tick
    costs nothing for requests which last. No timer is set once nothing is in flight.

    Args:
        loop: The loop whose requests these are.
        interval: Seconds between two looks.
        buffer_limit: Bytes that a watcher may keep for one request.
    """

    __slots__ = ("_context", "_new", "_old", "_timer", "buffer_limit", "interval", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float, buffer_limit: int) -> None:
        self.loop = loop
        self.interval = interval
        self.buffer_limit = buffer_limit
        self._new: set[Connection] = set()
        self._old: set[Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        # In the context of the request that happened to come first, all would carry its trace.
        self._context = quiet_context()

    def add(self, connection: Connection) -> set[Connection]:
        """Look at ``connection`` from now on; returns the set from which it is to be taken at its end."""
        # It stays in this very set, whose role changes with the ticks.
        self._new.add(connection)
        if self._timer is None:
            self._arm()
        return self._new

    def start(self, coro: Any) -> asyncio.Task[None]:
        """Run a watcher, on behalf of nobody."""
        return self.loop.create_task(coro, name="otel_tasks.watch", context=self._context.copy())

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        """Call back on behalf of nobody."""
        self.loop.call_later(delay, callback, context=self._context.copy())

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.interval, self._tick, context=self._context)

    def _tick(self) -> None:
        ripe, self._old, self._new = self._old, self._new, set()
        for connection in ripe:
            connection.ripen()
        if self._old or self._new:
            self._arm()
        else:
            self._timer = None


def _nobody() -> None:
    """The reader is the watcher: no task of the application's has been told."""


def _weight(message: Message) -> int:
    body = message.get("body") or message.get("bytes") or message.get("text") or b""
    return len(body) + _MESSAGE_OVERHEAD
