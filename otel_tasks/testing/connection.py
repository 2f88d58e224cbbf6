"""A fake ASGI server for one request or WebSocket, with the quirks of real servers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping
    from typing import Self

    Message = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[Message]]
    Send = Callable[[Message], Awaitable[None]]
    App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class FakeConnection:
    """One request (or WebSocket) of an ASGI 3 server that behaves like uvicorn by default.

    Pass ``scope``, ``receive``, and ``send`` to an application, or let ``run()`` do it, and play the client
    with ``feed()`` and ``disconnect()``. ``sent`` has every message that the application sends; ``sent_late``
    has those that it sends after the client has left.

    Args:
        method: The HTTP method.
        path: The raw path.
        headers: Name and value of each header.
        body: The request's body: one chunk, several (one message each), or ``None`` if ``feed()`` will send
            it.
        spec_version: ``scope["asgi"]["spec_version"]``.
        type: ``"http"`` or ``"websocket"``.
        says_disconnect_once: After the one ``http.disconnect``, ``receive()`` never returns (hypercorn,
            daphne).
        send_raises_after_disconnect: ``send()`` raises OSError once the client has left (uvloop).
        send_hangs_after_disconnect: ``send()`` never returns once the client has left (hypercorn, HTTP/2).
        receive_is_not_a_coroutine: ``receive()`` is a plain function returning a future (granian).
        spurious_empty_request: An empty ``http.request`` comes after the body's end (uvicorn, two
            readers).
        disconnect_inside_final_send: The pending ``receive()`` is answered before the final ``send()``
            returns (granian).

    Example:
        >>> async def app(scope, receive, send):
        ...     await send({"type": "http.response.start", "status": 204})
        ...     await send({"type": "http.response.body"})
        >>> connection = FakeConnection(method="GET", path="/")
        >>> run(connection.run(app))
        >>> connection.status
        204
    """

    def __init__(
        self,
        *,
        method: str = "GET",
        path: str = "/",
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = b"",
        spec_version: str = "2.4",
        type: str = "http",
        says_disconnect_once: bool = False,
        send_raises_after_disconnect: bool = False,
        send_hangs_after_disconnect: bool = False,
        receive_is_not_a_coroutine: bool = False,
        spurious_empty_request: bool = False,
        disconnect_inside_final_send: bool = False,
    ) -> None:
        self.scope = _scope(type, method, path, headers or {}, spec_version)
        self.sent: list[Message] = []
        self.sent_late: list[Message] = []
        self.received = 0
        """The number of messages that the application has received."""
        self.readers = 0
        self.max_readers = 0
        """The highest number of ``receive()`` calls that waited at the same time."""
        self.disconnected = False
        self.says_disconnect_once = says_disconnect_once
        self.send_raises_after_disconnect = send_raises_after_disconnect
        self.send_hangs_after_disconnect = send_hangs_after_disconnect
        self.spurious_empty_request = spurious_empty_request
        self.disconnect_inside_final_send = disconnect_inside_final_send
        self.receive: Receive = self._receive_as_future if receive_is_not_a_coroutine else self._receive
        self._incoming: Iterator[Message] = iter(())
        self._fed: list[Message] = []
        self._wake = asyncio.Event()
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._close_code = 1005
        self._said_disconnect = False
        self._completed = False
        if type == "websocket":
            self._fed.append({"type": "websocket.connect"})
        elif body is not None:
            self._incoming = _body_messages([body] if isinstance(body, bytes) else body)

    @classmethod
    def websocket(cls, path: str = "/", **options: Any) -> Self:
        """A WebSocket's connection; its first message is ``websocket.connect``."""
        return cls(path=path, type="websocket", **options)

    async def run(self, app: App) -> None:
        """Call ``app`` in the caller's task; most servers have a task per request.

        **Cancellation**: passed on to ``app``, as by a server that shuts down.
        """
        await app(self.scope, self.receive, self.send)

    # The client's side.

    def feed(self, data: bytes | str = b"", *, more: bool = True) -> None:
        """Send a piece of the body (``more=False``: the last), or a WebSocket message."""
        if self.scope["type"] == "websocket":
            kind = "text" if isinstance(data, str) else "bytes"
            self._fed.append({"type": "websocket.receive", kind: data})
        else:
            self._fed.append({"type": "http.request", "body": data, "more_body": more})
        self._wake.set()

    def disconnect(self, code: int = 1001) -> None:
        """Hang up. A WebSocket's application gets ``code``."""
        self.disconnected = True
        self._close_code = code
        self._wake.set()
        self._resumed.set()

    def pause(self) -> None:
        """Stop reading: the application's ``send()`` waits until ``resume()`` or ``disconnect()``."""
        self._resumed.clear()

    def resume(self) -> None:
        """Continue reading after ``pause()``."""
        self._resumed.set()

    # The response.

    @property
    def complete(self) -> bool:
        """Whether the whole response was sent (or the WebSocket closed) before the client left."""
        return self._completed

    @property
    def status(self) -> int | None:
        """The status sent, or None."""
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers, lower case."""
        start = next((m for m in self.sent if m["type"] == "http.response.start"), {"headers": ()})
        return {name.decode().lower(): value.decode() for name, value in start.get("headers", ())}

    @property
    def body(self) -> bytes:
        """The response's body so far."""
        return b"".join(m.get("body", b"") for m in self.sent if m["type"] == "http.response.body")

    # The application's side.

    async def send(self, message: Message) -> None:
        """The server's ``send``: waits while paused; after a disconnect, it drops, raises, or hangs.

        **Cancellation**: propagates; a message that was waiting is not sent.
        """
        if not self.disconnected:
            await self._resumed.wait()
        self.sent.append(message)
        if self.disconnected:
            await self._send_late(message)
            return
        if _is_final(message, self.sent):
            self._completed = True
            self._wake.set()
            if self.disconnect_inside_final_send:
                await _turns(3)

    async def _send_late(self, message: Message) -> None:
        self.sent_late.append(message)
        if self.send_raises_after_disconnect:
            raise OSError("the client has closed the connection")
        if self.send_hangs_after_disconnect:
            await asyncio.get_running_loop().create_future()

    async def _receive(self) -> Message:
        self.readers += 1
        self.max_readers = max(self.max_readers, self.readers)
        try:
            message = await self._next_message()
        finally:
            self.readers -= 1
        self.received += 1
        return message

    def _receive_as_future(self) -> Awaitable[Message]:
        return asyncio.ensure_future(self._receive())

    async def _next_message(self) -> Message:
        while (message := self._ready_message()) is None:
            self._wake.clear()
            await self._wake.wait()
        return message

    def _ready_message(self) -> Message | None:
        if self.disconnected or self._completed:
            return self._disconnect_message()
        if self._fed:
            return self._fed.pop(0)
        if (message := next(self._incoming, None)) is not None:
            return message
        if self.spurious_empty_request and self.scope["type"] == "http":
            self.spurious_empty_request = False
            return {"type": "http.request", "body": b"", "more_body": False}
        return None

    def _disconnect_message(self) -> Message | None:
        if self._said_disconnect and self.says_disconnect_once:
            return None
        self._said_disconnect = True
        if self.scope["type"] == "websocket":
            return {"type": "websocket.disconnect", "code": self._close_code, "reason": None}
        return {"type": "http.disconnect"}


def _scope(
    type: str, method: str, path: str, headers: Mapping[str, str], spec_version: str
) -> dict[str, Any]:
    scope: dict[str, Any] = {
        "type": type,
        "asgi": {"version": "3.0", "spec_version": spec_version},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    if type == "websocket":
        return scope | {"scheme": "ws", "subprotocols": []}
    return scope | {"method": method}


def _body_messages(chunks: Iterable[bytes]) -> Iterator[Message]:
    """One message per chunk, created on demand, so that a body of any size costs nothing in advance."""
    rest = iter(chunks)
    chunk = next(rest, b"")
    for following in rest:
        yield {"type": "http.request", "body": chunk, "more_body": True}
        chunk = following
    yield {"type": "http.request", "body": chunk, "more_body": False}


def _is_final(message: Message, sent: list[Message]) -> bool:
    match message["type"]:
        case "http.response.body":
            return not message.get("more_body", False) and not sent[0].get("trailers", False)
        case "http.response.trailers":
            return not message.get("more_trailers", False)
        case "http.response.pathsend" | "websocket.close":
            return True
        case _:
            return False


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)
