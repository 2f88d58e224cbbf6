"""Health probes over HTTP on plain asyncio: each connection gets one response."""

import asyncio
import re
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import urlsplit

# Returns why the probe has to fail; an empty string if all is well.
Check = Callable[[], str]

_MAX_HEAD = 8192
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 -- the "token" of RFC 9110: a method or a field's name
_REQUEST_LINE = re.compile(rf"({_TOKEN}) (\S+) HTTP/(\d)\.(\d)")
_FIELD_LINE = re.compile(rf"({_TOKEN}):.*")


async def serve_health(
    checks: Mapping[str, Check], host: str, port: int, *, time_limit: float = 5.0
) -> asyncio.Server:
    """Answer GET and HEAD requests for the paths of some checks.

    Connections are plain asyncio tasks, which have no spans: a probe comes every few seconds.

    Args:
        checks: The check of each path, such as "/livez".
        host: The address to listen on.
        port: The port; 0 is a free one.
        time_limit: Seconds for a request, and for its response: a slow or silent client holds nothing open.

    Returns:
        The server, which is listening.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(await _answer(reader, checks, time_limit))
            async with asyncio.timeout(time_limit):
                await writer.drain()
                # Closing a connection with unread data resets it, and the response may be lost.
                writer.write_eof()
                while await reader.read(_MAX_HEAD):
                    pass
        except (TimeoutError, EOFError, OSError, asyncio.CancelledError):
            # The client is slow or has left, or the worker ends: early releases of Python 3.11 and 3.12 log
            # an error for a connection whose task ends cancelled.
            pass
        finally:
            writer.close()

    return await asyncio.start_server(serve, host, port, limit=_MAX_HEAD)


async def _answer(reader: asyncio.StreamReader, checks: Mapping[str, Check], time_limit: float) -> bytes:
    try:
        async with asyncio.timeout(time_limit):
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        return _response(HTTPStatus.REQUEST_TIMEOUT)
    except asyncio.LimitOverrunError:
        return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    return respond(head, checks)


def respond(head: bytes, checks: Mapping[str, Check]) -> bytes:
    """Return the response to a request.

    Args:
        head: Its request line and header, up to and including the empty line.
        checks: The check of each path.
    """
    request_line, *field_lines = head.decode("latin-1").strip("\r\n").split("\r\n")
    request = _REQUEST_LINE.fullmatch(request_line)
    fields = [field and field[1].lower() for field in map(_FIELD_LINE.fullmatch, field_lines)]
    if request is None or None in fields:
        return _response(HTTPStatus.BAD_REQUEST)
    method, target, major, minor = request.groups()
    if major != "1":
        return _response(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    # HTTP/1.0 has no Host; later versions demand exactly one.
    if fields.count("host") != 1 and (minor != "0" or "host" in fields):
        return _response(HTTPStatus.BAD_REQUEST)
    check = checks.get(_path_of(target))
    if check is None:
        return _response(HTTPStatus.NOT_FOUND)
    if method not in ("GET", "HEAD"):
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD\r\n")
    problem = check()
    status = HTTPStatus.SERVICE_UNAVAILABLE if problem else HTTPStatus.OK
    return _response(status, body=problem or "ok", with_body=method == "GET")


def _path_of(target: str) -> str:
    try:
        return urlsplit(target).path
    except ValueError:
        return ""


def _response(status: HTTPStatus, fields: str = "", *, body: str = "", with_body: bool = True) -> bytes:
    content = f"{body or status.phrase}\n".encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Date: {formatdate(usegmt=True)}\r\n"
        "Content-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(content)}\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n"
        f"{fields}\r\n"
    )
    return head.encode() + (content if with_body else b"")
