"""Clients that do what a well-behaved one does not: hang up, reset, stop reading, stop half-way."""

from __future__ import annotations

import select
import socket
import struct
import time
from typing import Self

import h2.config
import h2.connection
import h2.events

TIMEOUT = 30.0
"""Seconds that a client waits for the server before the test fails."""


class Client:
    """A raw HTTP/1.1 connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def head(self, method: str, path: str, **headers: str | int) -> None:
        """Send a request's line and headers (`content_length=3` is `Content-Length: 3`)."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode())

    def get(self, path: str) -> None:
        """Send a GET."""
        self.head("GET", path)

    def post(self, path: str, body: bytes = b"{}") -> None:
        """Send a POST with its whole body."""
        self.head("POST", path, content_length=len(body))
        self.socket.sendall(body)

    def send(self, data: bytes) -> None:
        """Send a part of a body."""
        self.socket.sendall(data)

    def writable(self, seconds: float) -> bool:
        """Whether the connection takes more bytes within `seconds`."""
        return bool(select.select([], [self.socket], [], seconds)[1])

    def send_what_fits(self, data: bytes | memoryview, *, quiet: float = 0.3) -> int:
        """Send `data` until nothing was taken for `quiet` seconds; how many bytes were taken."""
        sent = 0
        self.socket.setblocking(False)
        try:
            while sent < len(data) and self.writable(quiet):
                sent += self.socket.send(data[sent : sent + 65_536])
        finally:
            self.socket.settimeout(TIMEOUT)
        return sent

    def read_until(self, marker: bytes) -> bytes:
        """Read up to and with `marker`; fail when the connection ends before it."""
        while marker not in self._received:
            data = self.socket.recv(65_536)
            assert data, f"the connection ended before {marker!r}: {self._received!r}"
            self._received += data
        end = self._received.index(marker) + len(marker)
        found, self._received = self._received[:end], self._received[end:]
        return found

    def response(self) -> tuple[int, bytes]:
        """Read one response, with a length or in chunks; its status and body."""
        head = self.read_until(b"\r\n\r\n").decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        if "transfer-encoding: chunked" in head:
            return status, self._chunks()
        length = next(
            int(line.partition(":")[2]) for line in head.split("\r\n") if line.startswith("content-length:")
        )
        while len(self._received) < length:
            data = self.socket.recv(65_536)
            assert data, "the connection ended within the body"
            self._received += data
        body, self._received = self._received[:length], self._received[length:]
        return status, body

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.read_until(b"\r\n"), 16):
            body += self._exactly(size)
            self.read_until(b"\r\n")
        self.read_until(b"\r\n")
        return body

    def _exactly(self, size: int) -> bytes:
        while len(self._received) < size:
            data = self.socket.recv(65_536)
            assert data, "the connection ended within a chunk"
            self._received += data
        body, self._received = self._received[:size], self._received[size:]
        return body

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def reset(self) -> None:
        """Hang up with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def half_close(self) -> None:
        """Say that nothing more will be sent, but go on reading."""
        self.socket.shutdown(socket.SHUT_WR)


class Http2Client:
    """An HTTP/2 connection with prior knowledge, on which streams can be reset."""

    def __init__(self, port: int) -> None:
        self._authority = f"127.0.0.1:{port}"
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self._connection.initiate_connection()
        self._statuses: dict[int, int] = {}
        self._ended: set[int] = set()
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def get(self, path: str) -> int:
        """Begin a GET; its stream."""
        stream = self._connection.get_next_available_stream_id()
        headers = [(":method", "GET"), (":path", path), (":scheme", "http"), (":authority", self._authority)]
        self._connection.send_headers(stream, headers, end_stream=True)
        self._flush()
        return stream

    def reset(self, stream: int) -> None:
        """Reset one stream, as a browser does when a page is left."""
        self._connection.reset_stream(stream, error_code=8)  # CANCEL
        self._flush()

    def status(self, stream: int) -> int:
        """Wait for the whole response on a stream; its status."""
        end = time.monotonic() + TIMEOUT
        while stream not in self._ended:
            assert time.monotonic() < end, f"no answer on stream {stream}"
            self._receive()
        return self._statuses[stream]

    def _receive(self) -> None:
        data = self._socket.recv(65_536)
        assert data, "the server ended the connection"
        for event in self._connection.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                headers = dict(event.headers)
                self._statuses[event.stream_id] = int(headers[b":status"])
            elif isinstance(event, h2.events.DataReceived):
                self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self._ended.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                raise AssertionError(f"the server reset stream {event.stream_id}")
        self._flush()

    def _flush(self) -> None:
        self._socket.sendall(self._connection.data_to_send())
