"""A real Redis: Debian's, with its data in a folder of its own, for demos and tests."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

STARTS_WITHIN = 60.0
STOPS_WITHIN = 30.0
# The command may be where only root looks.
SERVER = shutil.which("redis-server", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin")))


def is_installed() -> bool:
    """True where it can be started."""
    return SERVER is not None


class Redis:
    """One server of its own, on the loopback interface.

    Args:
        directory: An empty folder, for its data and its log.
        port: A free port of the loopback interface.
        options: Lines of its configuration, as ``["requirepass secret"]``.
    """

    def __init__(self, directory: Path, port: int, options: list[str] | None = None) -> None:
        self._directory = directory
        self._options = options or []
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The address for clients without a password."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The id of the process."""
        assert self._process is not None
        return self._process.pid

    def client(self, **options: object) -> redis.Redis:
        """A client, for what a caller looks at or changes itself."""
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
            # Redis takes the last line of each option.
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
