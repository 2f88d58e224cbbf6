"""A real Redis: Debian's, with its data in a temporary folder, for tests of a fleet."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import redis

from tests.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

STARTS_WITHIN = 60.0
STOPS_WITHIN = 30.0
# The command may be where only root looks.
SERVER = shutil.which("redis-server", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))


class Redis:
    """One server of its own, on the loopback interface.

    Args:
        directory: An empty folder, for its data and its log.
        options: Lines of its configuration, as ``["requirepass secret"]``.
    """

    def __init__(self, directory: Path, options: list[str] | None = None) -> None:
        self._directory = directory
        self._options = options or []
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address for clients without a password. Tests share the server: use namespaces of their own."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid

    def client(self, **options: object) -> redis.Redis:
        """A client for what a test looks at or changes itself."""
        return redis.Redis.from_url(self.url, **options)

    def start(self, *, persistent: bool = False) -> None:
        """Start, and wait until the server answers.

        Args:
            persistent: Write each change to the disk. A server without it forgets everything when it ends.
        """
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {self._directory}",
            "daemonize no",
            'save ""',
            f"appendonly {'yes' if persistent else 'no'}",
            "appendfsync always",
            # What one test of many needs; Redis takes the last line of each option.
            *self._options,
        ]
        path = self._directory / "redis.conf"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        with (self._directory / "output").open("ab") as output:
            assert SERVER is not None
            self._process = subprocess.Popen([SERVER, str(path)], stdout=output, stderr=output)
        self._wait_until_it_answers(self._process)

    def stop(self) -> None:
        """End the server as an administrator would."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it answer nothing; its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it if it runs."""
        if self._process is not None:
            self.kill()

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as client:
                client.settimeout(1.0)
                if client.connect_ex(("127.0.0.1", self.port)) == 0 and _answers(client):
                    return
            time.sleep(0.02)
        output = (self._directory / "output").read_text("utf-8", "replace")
        raise RuntimeError(f"Redis has not started (exit code {process.poll()}):\n{output[-4000:]}")

    def _end(self, number: int) -> None:
        process = self._process
        assert process is not None
        self._process = None
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOPS_WITHIN)
        finally:
            process.kill()
            process.wait()


def _answers(client: socket.socket) -> bool:
    client.sendall(b"PING\r\n")
    try:
        # An error is an answer too: this client has no password. TLS resets the connection.
        return client.recv(100)[:1] in (b"+", b"-")
    except ConnectionResetError:
        return True


def redis_in(directory: Path, options: list[str] | None = None) -> Redis:
    """Make a server; the test is skipped where Redis is not installed."""
    if SERVER is None:
        pytest.skip("Redis is not installed (Debian: redis-server)")
    directory.mkdir()
    return Redis(directory, options)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Redis]:
    """A running server, the same for all tests of this process; leave it running."""
    yield from running(redis_in(tmp_path_factory.mktemp("redis") / "server"))


@pytest.fixture
def own_redis(tmp_path: Path) -> Generator[Redis]:
    """A running server for one test, which may stop, kill, or pause it."""
    yield from running(redis_in(tmp_path / "redis"))


def running(server: Redis) -> Generator[Redis]:
    """Start a server, and end it afterwards."""
    try:
        server.start()
        yield server
    finally:
        server.close()
