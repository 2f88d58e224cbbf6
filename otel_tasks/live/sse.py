"""The response that carries a stream: an ASGI application that sends until the stream ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.responses import Response

from otel_tasks.live.stream import RETRY_MS, Event, Stream, framed, lifetime

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Message, Receive, Scope, Send

# Seconds that one send may take: a client that reads nothing for so long is gone.
STALLED = 30.0


class EventStream(Response):
    """Sends the events of a stream.

    Args:
        stream: The stream, admitted and not yet added to its hub.
    """

    def __init__(self, stream: Stream) -> None:
        self.status_code = 200
        self.background = None
        self._stream = stream
        # Without a body: a response with one has a length.
        self.init_headers({"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the stream ends; for HEAD, the headers alone.

        Cancellation: ends the stream.
        """
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        if scope["method"] == "HEAD":
            await send(start)
            await _sent(send, b"", more=False)
            return
        stream = self._stream
        until = asyncio.get_running_loop().time() + lifetime()
        listener = asyncio.create_task(_until_disconnect(receive))
        listener.add_done_callback(lambda _: stream.end("gone"))
        stream.hub.add(stream)
        try:
            await send(start)
            first = f"retry: {RETRY_MS}\n\n".encode() + _joined(stream.begin())
            if await self._send_all(send, first, until):
                await _sent(send, framed(stream.last("lifetime")), more=False)
        finally:
            stream.hub.remove(stream)
            listener.cancel()
            await asyncio.wait([listener])

    async def _send_all(self, send: Send, first: bytes, until: float) -> bool:
        """Send everything but the last event; False if the client is not there to get that."""
        stream = self._stream
        if not await _sent(send, first):
            return False
        while stream.ended_by is None and await stream.wait(until):
            if stream.ended_by is None and not await _sent(send, _joined(stream.news())):
                return False
        return stream.ended_by != "gone"


async def _sent(send: Send, body: bytes, *, more: bool = True) -> bool:
    """Send a piece; False if the client is gone, or has read nothing for a long time."""
    try:
        async with asyncio.timeout(STALLED):
            await send({"type": "http.response.body", "body": body, "more_body": more})
    except (OSError, TimeoutError):
        return False
    return True


def _joined(events: Iterable[Event]) -> bytes:
    return b"".join(map(framed, events))


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
