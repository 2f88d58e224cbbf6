"""A real RabbitMQ: Debian's, with its data in a folder of its own, for demos and tests."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

# The command in /usr/sbin changes the user, and ignores the environment.
SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
# The names of Erlang's nodes.
EPMD = shutil.which("epmd")
# Erlang starts slowly, and other tests run meanwhile.
STARTS_WITHIN = 120.0
STOPS_WITHIN = 30.0


def is_installed() -> bool:
    """True where it can be started."""
    return Path(SERVER).exists() and EPMD is not None


class RabbitMQ:
    """One server of its own: no other node, user, or Erlang program of the machine is involved.

    Args:
        directory: An empty folder, for its data, logs, and Erlang cookie.
        ports: Three free ports of the loopback interface: for clients, and for Erlang's own traffic.
    """

    def __init__(self, directory: Path, ports: tuple[int, int, int]) -> None:
        self._directory = directory
        self._port, self._names_port, self._distribution_port = ports
        self._names: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None
        (directory / "plugins").write_text("[].\n")

    @property
    def url(self) -> str:
        """The address for clients."""
        return f"amqp://guest:guest@127.0.0.1:{self._port}/"

    def start(self) -> None:
        """Start, and wait until clients can connect."""
        if self._names is None:
            # Else the server starts one as a daemon, which stays.
            command = [EPMD or "epmd", "-port", str(self._names_port)]
            self._names = subprocess.Popen(command, env=self._environment())
        with (self._directory / "output").open("ab") as output:
            self._server = subprocess.Popen(
                [SERVER],
                env=self._environment(),
                stdout=output,
                stderr=output,
                # A shell that starts Erlang, which starts helpers: signals go to all of them.
                start_new_session=True,
            )
        self._wait_for_port(self._server)

    def stop(self) -> None:
        """End the server as an administrator would; messages that are durable stay."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a crash would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop and start it, with its data and at the same address."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Let it answer nothing; its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End everything that was started."""
        if self._server is not None:
            self.kill()
        if self._names is not None:
            self._names.kill()
            self._names.wait()

    def _environment(self) -> dict[str, str]:
        own = {
            "HOME": self._directory,
            "ERL_EPMD_PORT": self._names_port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self._port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": self._port,
            "RABBITMQ_DIST_PORT": self._distribution_port,
            "RABBITMQ_MNESIA_BASE": self._directory / "data",
            "RABBITMQ_LOG_BASE": self._directory / "log",
            "RABBITMQ_CONFIG_FILE": self._directory / "rabbitmq",
            "RABBITMQ_GENERATED_CONFIG_DIR": self._directory / "generated",
            "RABBITMQ_ENABLED_PLUGINS_FILE": self._directory / "plugins",
            "RABBITMQ_PID_FILE": self._directory / "pid",
            # One scheduler that does not spin when idle: tests share the machine.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 1:1 +sbwt none -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }
        return {**os.environ, **{name: str(value) for name, value in own.items()}}

    def _wait_for_port(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            if server.poll() is not None:
                break
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            time.sleep(0.1)
        output = (self._directory / "output").read_text("utf-8", "replace")
        raise RuntimeError(f"RabbitMQ has not started (exit code {server.poll()}):\n{output[-4000:]}")

    def _signal(self, number: int) -> None:
        assert self._server is not None
        os.killpg(self._server.pid, number)

    def _end(self, number: int) -> None:
        server = self._server
        assert server is not None
        self._server = None
        try:
            os.killpg(server.pid, number)
            server.wait(STOPS_WITHIN)
            _wait_for_group(server.pid)
        finally:
            # Its helpers may outlive it, and a shell does not pass a signal on.
            _kill_group(server.pid)


def _wait_for_group(group: int) -> None:
    deadline = time.monotonic() + STOPS_WITHIN
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
