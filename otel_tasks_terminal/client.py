"""The client: one connection to a live view, and what its answers mean for a command."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import ssl
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from otel_tasks_terminal.errors import CommandError, ExitCode, usage
from otel_tasks_terminal.source import Event, Source
from otel_tasks_terminal.text import clean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from otel_tasks_terminal.source import Answer, Pairs

# The version of the feed that this client speaks.
VERSION = 1
DEFAULT_URL = "http://127.0.0.1:8000/tasks"
# A page of 1,000 tasks has less than 1 MB. Another server than a live view may send without end.
MAX_ANSWER = 64 * 1024 * 1024
MAX_LINE = 4 * 1024 * 1024


class Address(NamedTuple):
    """Where a live view is: the parts of ``--url``."""

    scheme: str
    host: str
    port: int | None
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL; ``127.0.0.1:8000/tasks`` is one, too.

        Raises:
            CommandError: It is none, or it has a user, a query, or a fragment.
        """
        if "://" not in url:
            url = f"http://{url}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"[\x00-\x20\x7f]", url):
            raise usage(f"{clean(url)!r} is not an address: write --url {DEFAULT_URL}")
        if parts.username is not None or parts.password is not None:
            raise usage("an address must not have a user and a password: use OTEL_TASKS_USER=name:password")
        if parts.query or parts.fragment:
            raise usage(f"an address must not have a query or a fragment, such as {DEFAULT_URL}")
        prefix = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~-._")
        return cls(parts.scheme, parts.hostname, port, prefix.removesuffix("/v1"))

    @property
    def origin(self) -> str:
        """The address without its path, as http.client has it in ``Host``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        default = {"http": 80, "https": 443}[self.scheme]
        return f"{self.scheme}://{host}{'' if self.port in (None, default) else f':{self.port}'}"

    def __str__(self) -> str:
        return clean(f"{self.origin}{self.prefix}")


class Client(Source):
    """A connection to one live view.

    Args:
        address: Where it is.
        token: Sent as a bearer token with each request; never shown.
        user: A name and a password, ``ann:secret``, for a view that wants these instead.
        timeout: Seconds to wait for a connection, and for each part of an answer.
    """

    def __init__(
        self, address: Address, token: str | None = None, *, user: str | None = None, timeout: float = 10.0
    ) -> None:
        self._address = address
        self._token = token
        self._user = user
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        # Kept apart: http.client lets go of it when a response says that it is the last one.
        self._socket: socket.socket | None = None

    @property
    def address(self) -> Address:
        """Where it is."""
        return self._address

    def fresh(self, *, timeout: float | None = None) -> Client:
        """Make another client of the same view, for another thread."""
        return Client(self._address, self._token, user=self._user, timeout=timeout or self._timeout)

    def get(self, path: str, pairs: Iterable[tuple[str, str]] = ()) -> Answer:
        """Fetch JSON below ``v1/``.

        Raises:
            CommandError: There is no answer, or none that this client understands.
        """
        query = urlencode(list(pairs))
        return self._answered(self._sent("GET", f"{path}?{query}" if query else path))

    def snapshot(self) -> Answer:
        """Fetch the overview."""
        return self.get("snapshot")

    def tasks(self, pairs: Pairs) -> Answer:
        """Fetch one page of a list of tasks."""
        return self.get("tasks", pairs)

    def task(self, task_id: str, node: str | None = None) -> Answer:
        """Fetch everything about one task, of these nodes alone if they are named."""
        return self.get(_task_path(task_id), [("node", node)] if node else ())

    def cancel(self, uid: str, reason: str | None) -> Answer:
        """Request the cancellation of the task with this uid."""
        body = json.dumps({} if reason is None else {"reason": reason})
        return self._answered(self._sent("POST", f"{_task_path(uid)}/cancel", body))

    def events(self, pairs: Pairs) -> Iterator[Event]:
        """Follow a stream until it ends.

        Raises:
            CommandError: There is no stream, or it broke off.
        """
        response = self._sent("GET", f"events?{urlencode(pairs)}", accept="text/event-stream")
        if response.status != 200 or response.headers.get_content_type() != "text/event-stream":
            self._answered(response)
            raise self._not_a_live_view(response.status)
        try:
            with contextlib.closing(response):
                for event in _events(response):
                    self._check_version(event.data)
                    yield event
        except _FAILURES as error:
            raise self._unreachable(error) from None
        finally:
            self.close()

    def interrupt(self) -> None:
        """End what another thread reads: its call fails at once."""
        if self._socket is not None:
            # Not connected any more: then nothing is read either.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- request ----------------------------------------------------------------------------------

    def _sent(
        self, method: str, path: str, body: str | None = None, *, accept: str = "application/json"
    ) -> http.client.HTTPResponse:
        headers = self._headers(accept, writes=body is not None)
        reused = self._connection is not None
        try:
            return self._exchange(method, path, body, headers)
        except _CLOSED as error:
            # The server has closed the idle connection. A POST may have arrived: it is not sent twice.
            if not reused or method != "GET":
                raise self._unreachable(error) from None
        except _FAILURES as error:
            raise self._unreachable(error) from None
        try:
            return self._exchange(method, path, body, headers)
        except _FAILURES as error:
            raise self._unreachable(error) from None

    def _headers(self, accept: str, *, writes: bool) -> dict[str, str]:
        headers = {"Accept": accept, "User-Agent": "otel-tasks"}
        if writes:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        elif self._user is not None:
            encoded = base64.b64encode(self._user.encode()).decode("ascii")
            headers["Authorization"] = f"Basic {encoded}"
            if writes:
                # A browser sends a password to other sites' requests, too, so that the view wants to know the
                # origin: here it is the address that the person has named.
                headers["Origin"] = self._address.origin
        elif writes:
            # A view without authentication wants a token here, too: no page of another site can send one.
            headers["Authorization"] = "Bearer none"
        return headers

    def _exchange(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        if self._connection is None:
            self._connection = self._connect()
        try:
            self._connection.request(method, f"{self._address.prefix}/v1/{path}", body, headers)
            self._socket = self._connection.sock
            return self._connection.getresponse()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        if self._address.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout)
        return http.client.HTTPSConnection(host, port, timeout=self._timeout)

    # --- answer -----------------------------------------------------------------------------------

    def _answered(self, response: http.client.HTTPResponse) -> Answer:
        data = _parsed(self._body(response))
        self._check_version(data)
        if response.status == 200 and data.get("v") == VERSION:
            return data
        error = data.get("error") if data.get("v") == VERSION else None
        raise self._refusal(response, error if isinstance(error, dict) else {})

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        try:
            body = response.read(MAX_ANSWER)
            # Without a length, only another read shows that this was all.
            more = b"" if response.isclosed() else response.read(1)
            if response.length:
                raise http.client.IncompleteRead(body)
        except _FAILURES as error:
            self.close()
            raise self._unreachable(error) from None
        if more:
            self.close()
            raise CommandError(ExitCode.PROTOCOL, f"{self._address} sends more than a live view would")
        return body

    def _check_version(self, data: Answer) -> None:
        version = data.get("v")
        if isinstance(version, int) and version > VERSION:
            raise CommandError(
                ExitCode.PROTOCOL,
                f"{self._address} speaks version {version} of the feed, and this otel-tasks version "
                f"{VERSION}: pip install --upgrade otel-tasks",
            )

    def _refusal(self, response: http.client.HTTPResponse, error: Answer) -> CommandError:
        """The error that a status other than 200 means."""
        status, code = response.status, str(error.get("code"))
        says = clean(error.get("message", ""), 300)
        if status == 401:
            return self._unauthorized(response.headers.get("WWW-Authenticate", ""), says)
        if status == 403:
            reason = says or "not allowed (403)"
            return CommandError(ExitCode.REFUSED, f"{self._address} refused: {reason}{_HINTS.get(code, '')}")
        if status == 404 and code == "not_found":
            return CommandError(ExitCode.NOTHING_DONE, says)
        if status in (429, 502, 503, 504):
            return self._busy(response, says)
        if 300 <= status < 400:
            return self._redirected(response)
        return self._failed(status, says)

    def _failed(self, status: int, says: str) -> CommandError:
        if says:
            code = ExitCode.USAGE if status == 400 else ExitCode.PROTOCOL
            return CommandError(code, f"{self._address} answers: {says}")
        if status >= 500:
            return CommandError(
                ExitCode.PROTOCOL,
                f"{self._address} answers with an error ({status}): look into the service's log",
            )
        return self._not_a_live_view(status)

    def _busy(self, response: http.client.HTTPResponse, says: str) -> CommandError:
        given = response.headers.get("Retry-After", "")
        seconds = int(given) if re.fullmatch(r"[0-9]{1,5}", given) else None
        when = "later" if seconds is None else f"in {seconds} s"
        answer = f"{response.status}: {says}" if says else str(response.status)
        return CommandError(
            ExitCode.UNREACHABLE,
            f"{self._address} is not available now ({answer}): try again {when}",
            retry_after=seconds,
        )

    def _unauthorized(self, scheme: str, says: str) -> CommandError:
        answer = f" ({says})" if says else ""
        name = "OTEL_TASKS_TOKEN"
        if scheme.lower().startswith("basic"):
            name = "OTEL_TASKS_USER=name:password" if self._user is None else "OTEL_TASKS_USER"
        given = self._user if name == "OTEL_TASKS_USER" else self._token
        if given is None:
            return CommandError(
                ExitCode.REFUSED, f"{self._address} wants to know who you are{answer}: set {name}"
            )
        what = "password" if given is self._user else "token"
        return CommandError(
            ExitCode.REFUSED, f"{self._address} does not accept the {what}{answer}: check {name}"
        )

    def _redirected(self, response: http.client.HTTPResponse) -> CommandError:
        # Never followed: the token would go to another place than the one that was named.
        target = clean(response.headers.get("Location", "elsewhere"), 300)
        if "/v1/" in target:
            return CommandError(
                ExitCode.PROTOCOL, f"{self._address} has moved: use --url {target.partition('/v1/')[0]}"
            )
        return CommandError(
            ExitCode.REFUSED,
            f"{self._address} redirects to {target}, probably a login page: set OTEL_TASKS_TOKEN if it "
            "accepts one",
        )

    def _not_a_live_view(self, status: int) -> CommandError:
        return CommandError(
            ExitCode.PROTOCOL,
            f"{self._address} is not a live view ({status}): name the prefix that live_view() is mounted at, "
            f"--url {DEFAULT_URL}",
        )

    def _unreachable(self, error: Exception) -> CommandError:
        return CommandError(ExitCode.UNREACHABLE, f"cannot reach {self._address}: {self._reason(error)}")

    def _reason(self, error: Exception) -> str:
        fix = "does the service run? Name another address with --url or OTEL_TASKS_URL"
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted ({clean(error.verify_message)}): "
                "set SSL_CERT_FILE to the file of its authority"
            )
        if isinstance(error, ssl.SSLError):
            return f"TLS failed ({clean(error.reason or error)}): is it http:// instead of https://?"
        if isinstance(error, TimeoutError):
            return f"no answer within {self._timeout:g} s; {fix}"
        if isinstance(error, ConnectionRefusedError):
            return f"connection refused; {fix}"
        if isinstance(error, socket.gaierror):
            return f"unknown host; {fix}"
        if isinstance(error, http.client.BadStatusLine | ConnectionResetError | http.client.IncompleteRead):
            tls = " (does it want https://?)" if self._address.scheme == "http" else ""
            return f"it closed the connection{tls}"
        if isinstance(error, OSError):
            return f"{clean(error.strerror or error)}; {fix}"
        return f"it does not speak HTTP ({type(error).__name__})"


# A server that closed an idle connection.
_CLOSED = (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)
# ssl.SSLError and TimeoutError are OSErrors. ValueError: a header or a chunk that is none.
_FAILURES = (OSError, http.client.HTTPException, ValueError)

_HINTS = {
    "cross_site": "; set OTEL_TASKS_TOKEN",
    "forbidden_host": "; use the address of the loopback interface",
}


def _task_path(task_id: str) -> str:
    """The path of a task, whose id may have slashes and spaces."""
    return f"tasks/{quote(task_id, safe='')}"


def _events(response: http.client.HTTPResponse) -> Iterator[Event]:
    """Read server-sent events; what is not of the feed is skipped."""
    name, data = "message", []
    while line := response.readline(MAX_LINE):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not line.endswith(b"\n"):
            raise http.client.IncompleteRead(line)
        field, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif not text and data:
            yield Event(name, _parsed("\n".join(data)))
            name, data = "message", []


def _parsed(text: str | bytes) -> Answer:
    """Read a JSON object; anything else is an empty one, without a version."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
