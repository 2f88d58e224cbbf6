"""Real servers for the clients: on free loopback ports, with their data in temporary folders."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

REPOSITORY = Path(__file__).resolve().parent.parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0


@contextlib.contextmanager
def redis(folder: Path) -> Generator[str]:
    """Debian: redis-server."""
    server, port = found("redis-server"), free_port()
    command = [server, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    with running(command, folder, listens(port)):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def postgresql(folder: Path) -> Generator[str]:
    """Debian: postgresql. It refuses to run as root, so root runs it as the user ``postgres``."""
    places = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    initdb, server = found("initdb", *places), found("postgres", *places)
    user = "postgres" if os.getuid() == 0 else None
    # Not in pytest's folder, which other users cannot enter.
    with tempfile.TemporaryDirectory() as name:
        place, port = Path(name), free_port()
        if user is not None:
            shutil.chown(place, user)
        subprocess.run(
            [initdb, "-D", "data", "-A", "trust", "-U", "postgres", "--no-sync", "-E", "UTF8"],
            **as_user(user, place),
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=START_TIMEOUT,
        )
        command = [server, "-D", "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
        command += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        with running(
            command,
            folder,
            listens(port),
            place=as_user(user, place),
            stop=signal.SIGINT,
            log="postgresql.log",
        ):
            url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
            wait_until(lambda: create_table(url), "PostgreSQL accepts connections")
            yield url


def create_table(url: str) -> bool:
    """Whether the server has taken the table of the test."""
    import psycopg

    try:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS answers (token text)")
            connection.execute("CREATE INDEX IF NOT EXISTS answers_by_token ON answers (token)")
    except psycopg.OperationalError:  # "the database system is starting up"
        return False
    return True


@contextlib.contextmanager
def rabbitmq(folder: Path) -> Generator[str]:
    """Debian: rabbitmq-server. The script behind the one in PATH, which switches users and writes to /var."""
    server = found("rabbitmq-server", "/usr/lib/rabbitmq/bin")
    if Path("/usr/lib/rabbitmq/bin/rabbitmq-server").exists():
        server = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    port, distribution, mapper = free_port(), free_port(), free_port()
    environment = os.environ | {
        "HOME": str(folder),
        "ERL_EPMD_PORT": str(mapper),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODENAME": f"clients-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
    }
    # A child of ours: the server would start a daemon that outlives it.
    epmd = [found("epmd"), "-port", str(mapper), "-address", "127.0.0.1"]
    with (
        running(epmd, folder, listens(mapper), environment=environment, log="epmd.log"),
        running([server], folder, listens(port), environment=environment),
    ):
        yield f"amqp://guest:guest@127.0.0.1:{port}/"


@contextlib.contextmanager
def mongodb(folder: Path) -> Generator[str]:
    """MongoDB's own mongod, or FerretDB, which speaks its protocol. Neither Debian nor PyPI has one."""
    port = free_port()
    if server := shutil.which("mongod"):
        command = [server, "--dbpath", str(folder), "--port", str(port), "--bind_ip", "127.0.0.1"]
    elif server := shutil.which("ferretdb"):
        command = [server, f"--listen-addr=127.0.0.1:{port}", "--handler=sqlite", "--telemetry=disable"]
        command += [f"--sqlite-url=file:{folder}/", f"--state-dir={folder}", "--debug-addr=-"]
    else:
        pytest.skip(
            "there is no mongod and no ferretdb in PATH, and neither Debian nor PyPI has a MongoDB server"
        )
    with running(command, folder, listens(port)):
        yield f"mongodb://127.0.0.1:{port}/"


@contextlib.contextmanager
def http(folder: Path) -> Generator[str]:
    """An HTTP server that takes its time."""
    port = free_port()
    with running(uvicorn("tests.nightly.upstream:app", port), folder, listens(port)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def service(client: str, backend: str, folder: Path, *, protected: bool) -> Generator[int]:
    """The app whose requests share the client, in `uncancellable()` if protected; its port."""
    port = free_port()
    command = [*uvicorn("tests.nightly.shared_clients:make_app", port), "--factory"]
    environment = os.environ | {"CLIENT": client, "BACKEND": backend, "PROTECTED": "1" if protected else ""}
    with running(command, folder, listens(port), environment=environment, log="service.log"):
        yield port


def uvicorn(app: str, port: int) -> list[str]:
    """The command line of a server that logs only what went wrong."""
    return [sys.executable, "-m", "uvicorn", app, "--port", str(port), "--log-level", "warning"]


def found(name: str, *places: str) -> str:
    """The path of a server's program; skips the test where there is none."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *places, "/usr/sbin"])
    program = shutil.which(name, path=path)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


def free_port() -> int:
    """A free loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def listens(port: int) -> Callable[[], bool]:
    """A look at whether something listens there."""

    def look() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    return look


def wait_until(look: Callable[[], bool], what: str, *, within: float = START_TIMEOUT) -> None:
    """Wait for it; fail when it takes too long."""
    end = time.monotonic() + within
    while not look():
        assert time.monotonic() < end, f"in {within:g} s it is not so that {what}"
        time.sleep(0.05)


def as_user(user: str | None, folder: Path) -> dict[str, Any]:
    """Arguments of subprocess that run a program as the user in the folder."""
    if user is None:
        return {"cwd": folder}
    account = pwd.getpwnam(user)
    return {"cwd": folder, "user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


@contextlib.contextmanager
def running(
    command: list[str],
    folder: Path,
    ready: Callable[[], bool],
    *,
    environment: dict[str, str] | None = None,
    place: dict[str, Any] | None = None,
    stop: signal.Signals = signal.SIGTERM,
    log: str = "server.log",
) -> Generator[None]:
    """Run a server as a process group of its own; end the group, and every process in it."""
    with (folder / log).open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **(place or {"cwd": REPOSITORY}),
        )
    try:
        wait_until(lambda: ready() or process.poll() is not None, f"{command[0]} is ready")
        assert process.poll() is None, (folder / log).read_text("utf-8", errors="replace")[-2000:]
        yield
    finally:
        process.send_signal(stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_TIMEOUT)
