"""Servers as child processes: started on a free loopback port, watched, and ended by their id."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.processes import free_port

from .clients import Client

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent

_ENDS = ("returned", "raised", "cancelled")

DEADLINE = 30.0
"""Seconds after which an event that did not come fails the test. No test asserts on how long it took."""

START_DEADLINE = 90.0
"""The same for the start of a server, of which several import everything at the same time."""

COMPLAINT = re.compile(
    r"error|critical|traceback|exception|never awaited|never retrieved|destroyed but|warning|failed",
    re.IGNORECASE,
)
"""Lines that no server may log in a scenario without errors."""


def eventually(look: Callable[[], T], describe: Callable[[], str], *, within: float = DEADLINE) -> T:
    """Return the first true result of `look`; fail with `describe()` when the deadline has passed."""
    end = time.monotonic() + within
    while True:
        if found := look():
            return found
        if time.monotonic() > end:
            raise AssertionError(describe())
        time.sleep(0.005)


@dataclass(frozen=True)
class Kind:
    """A server, and the command line that starts it."""

    name: str
    arguments: Callable[[int], list[str]]
    asgi: tuple[int, int] = (2, 3)
    """The version of the ASGI specification that it names in an HTTP scope."""
    hides_close_codes: bool = False
    """Whether it tells the application 1006 for every WebSocket that the client closes."""
    http2: bool = False
    logs_failures: bool = True
    """Whether it logs what an application raises after it has answered 500, as Starlette's does."""
    cancels_before_lifespan_ends: bool = True
    """Whether it cancels the requests that are left before it ends the lifespan, which ends the manager."""
    outlives_shutdown: str | None = None
    """Why no request sees this server's shutdown, if that is so."""
    hangs_with_large_uploads: bool = False
    """Whether, with us and without, a call never ends that answered without having read a large upload."""


def _uvicorn(http: str, loop: str) -> Callable[[int], list[str]]:
    return lambda port: [
        *("uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(port), "--no-access-log"),
        *("--http", http, "--loop", loop, "--timeout-graceful-shutdown", "1", "--no-use-colors"),
    ]


def _hypercorn(port: int) -> list[str]:
    # Without a worker process, so that the signal reaches the process that serves.
    return ["hypercorn", "app:app", "-b", f"127.0.0.1:{port}", "-w", "0", "--graceful-timeout", "1"]


def _granian(port: int) -> list[str]:
    address = ("--host", "127.0.0.1", "--port", str(port))
    return ["granian", "app:app", "--interface", "asgi", *address, "--workers-kill-timeout", "5"]


def _gunicorn(port: int) -> list[str]:
    address = ("-b", f"127.0.0.1:{port}")
    return [
        "gunicorn",
        "app:app",
        "-k",
        "asgi",
        *address,
        "-w",
        "1",
        "--graceful-timeout",
        "1",
        "--no-control-socket",
    ]


KINDS = (
    Kind("uvicorn-httptools", _uvicorn("httptools", "uvloop")),
    Kind("uvicorn-h11", _uvicorn("h11", "asyncio")),
    Kind(
        "hypercorn",
        _hypercorn,
        asgi=(2, 1),
        hides_close_codes=True,
        http2=True,
        # asyncio's Server.wait_closed(), which it calls first, waits for connections from Python 3.12 on.
        outlives_shutdown="hypercorn waits for its requests" if sys.version_info >= (3, 12) else None,
        hangs_with_large_uploads=True,
    ),
    Kind(
        "granian",
        _granian,
        http2=True,
        outlives_shutdown="granian waits for its requests, then kills its worker",
    ),
    Kind("gunicorn", _gunicorn, asgi=(2, 4), logs_failures=False, cancels_before_lifespan_ends=False),
)


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


class Server:
    """A running server: its journal, its log, and its end."""

    def __init__(self, kind: Kind, directory: Path) -> None:
        self.kind = kind
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        self._journal = directory / "journal"
        self._journal.touch()
        self._journal_read = 0
        self._events: dict[str, list[dict[str, Any]]] = {}
        self._tasks_at_start = 0
        self.was_used = False
        self.tasks_lost = 0
        """How many tasks hang for a reason of the server's own."""
        self._log = directory / "log"
        environment = {
            **os.environ,
            "E2E_JOURNAL": str(self._journal),
            "PYTHONPATH": os.pathsep.join([*_python_path(), str(HERE), str(REPOSITORY)]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "default::RuntimeWarning,default::ResourceWarning",
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *kind.arguments(self.port)],
                cwd=directory,
                env=environment,
                # Never written to: its end tells the server that this process is gone (see `app`).
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A separate process group, so that a server ends with all its workers.
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers; fail with its log when it ends instead."""
        eventually(
            self._answers, lambda: f"{self.kind.name} did not start:\n{self.log()}", within=START_DEADLINE
        )
        if not self.was_used:
            self.was_used = True
            self._tasks_at_start = len(self.state()["asyncio"])

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"{self.kind.name} ended at its start:\n{self.log()}"
        try:
            self.control("GET", "/state")
        except (OSError, http.client.HTTPException):
            return False
        return True

    def terminate(self) -> None:
        """Send SIGTERM to the process that serves."""
        # To the worker and not to its master: gunicorn's master kills its workers at the very end of the
        # graceful timeout, before they have come to the end of theirs.
        os.kill(self.state()["pid"], signal.SIGTERM)

    def kill(self) -> None:
        """End the server and its workers, whatever state they are in."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(3.0)
        # Its group is gone when all went well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE)
        if self.process.stdin is not None:
            self.process.stdin.close()

    def control(self, method: str, path: str) -> Any:
        """Ask the application something on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        try:
            connection.request(method, path, headers={"connection": "close"})
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, (path, response.status, body)
            return json.loads(body)
        finally:
            connection.close()

    def state(self) -> dict[str, Any]:
        """What lives in the server's process: see `app.state`."""
        found: dict[str, Any] = self.control("GET", "/state")
        return found

    def let_loop_turn(self) -> None:
        """Return when the server's loop has turned at least ten times, on however slow a machine."""
        for _ in range(10):
            self.state()

    def connect(self) -> Client:
        """A new connection to the server."""
        return Client(self.port)

    def log(self, start: int = 0) -> str:
        """What the server wrote to stdout and stderr from byte `start` on."""
        return self._log.read_bytes()[start:].decode(errors="replace")

    def log_size(self) -> int:
        """Where the log ends now."""
        return self._log.stat().st_size

    def complaints(self, start: int = 0) -> list[str]:
        """The lines of the log that tell of something wrong."""
        return [line for line in self.log(start).splitlines() if COMPLAINT.search(line)]

    def events(self, key: str) -> list[dict[str, Any]]:
        """The journal's events of one request."""
        with self._journal.open("rb") as journal:
            journal.seek(self._journal_read)
            news = journal.read()
        whole = news[: news.rfind(b"\n") + 1]
        self._journal_read += len(whole)
        for event in map(json.loads, whole.splitlines()):
            self._events.setdefault(event["key"], []).append(event)
        return self._events.get(key, [])

    def calls_are_over(self, prefix: str) -> bool:
        """Whether the application was left as often as it was entered, in the requests of one scenario."""
        self.events(prefix)
        keys = [key for key in self._events if key == prefix or key.startswith(f"{prefix}-")]
        whats = [event["what"] for key in keys for event in self._events[key]]
        return whats.count("app entered") == sum(whats.count(f"app {end}") for end in _ENDS)

    def wait_until_quiet(self) -> None:
        """Wait until the process runs no more asyncio tasks than when it had just started."""
        eventually(
            lambda: len(self.state()["asyncio"]) <= self._tasks_at_start + self.tasks_lost,
            lambda: f"{self.kind.name} had {self._tasks_at_start} tasks, and now {self.state()}",
        )


class Case:
    """One scenario: a request, known by its key, to one variant of the application on one server."""

    def __init__(self, server: Server, key: str) -> None:
        self.server = server
        self.key = key
        self.log_start = server.log_size()
        self.complaints_expected = False
        """Set by a test in which the server has reason to log an error, and which looks at the log itself."""
        self.calls_may_hang = False

    def path(self, route: str, query: str = "") -> str:
        """The path of `route` (`plain/wait`) for this scenario's key."""
        return f"/{route}/{self.key}" + (f"?{query}" if query else "")

    def release(self, what: str = "") -> None:
        """Let the handler and the tasks of this scenario go on, or only `what` of them."""
        self.server.control("POST", f"/release/{self.key}{what}")

    def release_all(self) -> None:
        """Let go on whatever of this scenario still waits."""
        self.server.control("POST", f"/release-all/{self.key}")

    def expect_order(self, *whats: str) -> None:
        """Check that each of these events has come, once and in this order."""
        happened = [event["what"] for event in self.server.events(self.key)]
        found = [what for what in happened if what in whats]
        assert found == list(whats), f"{found} and not {list(whats)}\n{self.story()}"

    def has(self, what: str, **details: object) -> dict[str, Any] | None:
        """The first such event, if it has happened."""
        for event in self.server.events(self.key):
            if event["what"] == what and details.items() <= event.items():
                return event
        return None

    def wait_for(self, what: str, **details: object) -> dict[str, Any]:
        """The first such event; fail, telling all events and the log, when it does not come."""
        wanted = what + "".join(f" {name}={value!r}" for name, value in details.items())
        found = eventually(lambda: self.has(what, **details), lambda: f"no '{wanted}'\n{self.story()}")
        assert found is not None
        return found

    def wait_for_any(self, *whats: str) -> str:
        """Wait for the first of several events; which one came."""

        def look() -> str | None:
            return next((what for what in whats if self.has(what)), None)

        found = eventually(look, lambda: f"none of {whats}\n{self.story()}")
        assert found is not None
        return found

    def wait_for_log(self, text: str, *, times: int = 1) -> str:
        """Wait until the server has logged `text` so often; all that it logged since the scenario began."""
        eventually(
            lambda: self.server.log(self.log_start).count(text) >= times,
            lambda: f"not logged {times} times: {text!r}\n{self.story()}",
        )
        return self.server.log(self.log_start)

    def wait_for_start(self, *, tasks: int = 3) -> None:
        """Wait until the handler is in its work and its tasks have made their first step."""
        eventually(
            lambda: self.count("task started") >= tasks,
            lambda: f"fewer than {tasks} tasks started\n{self.story()}",
        )

    def count(self, what: str, **details: object) -> int:
        """How often something has happened."""
        return sum(
            event["what"] == what and details.items() <= event.items()
            for event in self.server.events(self.key)
        )

    def let_it_age(self) -> None:
        """Wait until the request is older than the sweep takes to notice a disconnect (60 ms)."""
        time.sleep(0.08)

    def nothing_is_cancelled(self) -> None:
        """Check, after the time in which the middleware would have noticed, that no task was cancelled."""
        time.sleep(0.15)
        assert not self.has("task cancelled"), self.story()

    def wait_until_settled(self) -> None:
        """Wait until each call of the application has ended, and no managed task and no watcher is left."""

        def settled() -> bool:
            state = self.server.state()
            over = self.calls_may_hang or self.server.calls_are_over(self.key)
            return over and not state["live"] and not state["ours"]

        eventually(settled, lambda: f"not settled: {self.server.state()}\n{self.story()}")

    def story(self) -> str:
        """All that is known, for a failure's message."""
        events = "\n".join(f"  {event}" for event in self.server.events(self.key))
        return f"{self.server.kind.name}, {self.key}:\n{events}\nlog:\n{self.server.log()[-3000:]}"


class Pool:
    """The servers of a test session, each started when first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._started: list[Server] = []
        self._shared: dict[str, Server] = {}

    def shared(self, kind: Kind) -> Server:
        """The server of this kind that all tests share."""
        if kind.name not in self._shared:
            # All at once: their imports are most of the time that a start takes.
            for each in KINDS:
                self._shared[each.name] = self.start(each)
        server = self._shared[kind.name]
        server.wait_until_ready()
        return server

    def start(self, kind: Kind) -> Server:
        """A server for one test alone."""
        server = Server(kind, self._directory / f"{kind.name}-{len(self._started)}")
        self._started.append(server)
        return server

    def wait_until_quiet(self) -> None:
        """Wait until each shared server is at rest."""
        for server in self._shared.values():
            if server.was_used:
                server.wait_until_quiet()

    def close(self) -> None:
        """End every server."""
        for server in self._started:
            server.kill()
