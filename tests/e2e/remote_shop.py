"""A shop for the tests of remote tasks: servers, names of its own, worker processes, and their journal."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from otel_tasks import TaskManager

from .remote_app import App, Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from examples.rabbitmq_server import RabbitMQ
    from examples.redis_server import Redis

ROOT = Path(__file__).parent.parent.parent
# Generous: other tests run at the same time.
WITHIN = 60.0


class Shop:
    """One test's servers, names, worker processes, and journal."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.processes: list[subprocess.Popen[bytes]] = []
        self._variables: dict[str, str] = {}
        Path(settings.journal).touch()

    def worker(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a worker process."""
        command = ["taskiq", "worker", "tests.e2e.remote_app:broker", "--workers", "1"]
        return self._start([*command, "--log-level", "WARNING", *arguments])

    def scheduler(self) -> subprocess.Popen[bytes]:
        """Start a process that sends by schedule."""
        return self._start(["taskiq", "scheduler", "tests.e2e.remote_app:scheduler"], "scheduler")

    def caller(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process that calls a task."""
        return self._start(["tests.e2e.remote_app", *arguments])

    def service(self, port: int) -> subprocess.Popen[bytes]:
        """Start an application on uvicorn."""
        return self._start(["uvicorn", "--factory", "tests.e2e.remote_app:api", "--port", str(port)], "api")

    def trace_to(self, endpoint: str) -> None:
        """Export the spans of processes that are started from now on."""
        self._variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint

    def begin_with(self, code: str) -> None:
        """Run this code at the start of each interpreter that is started from now on."""
        directory = Path(f"{self.settings.journal}.begin")
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(code, "utf-8")
        self._variables["PYTHONPATH"] = os.pathsep.join((str(directory), str(ROOT)))

    def _start(self, module: list[str], name: str = "worker") -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OTEL_SERVICE_NAME": name}
        environment |= self.settings.environment() | self._variables
        with open(f"{self.settings.journal}.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *module],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                # A worker has a child: signals of the tests go to both.
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a process and its children with SIGKILL."""
        with_children(process, signal.SIGKILL)
        process.wait()

    def events(self, event: str, key: str | None = None) -> list[dict[str, Any]]:
        """The lines of the journal."""
        lines = Path(self.settings.journal).read_text("utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [line for line in found if line["event"] == event and key in (None, line["key"])]

    async def until(self, look: Callable[[], Any], within: float = WITHIN) -> None:
        """Wait for a state."""
        end = time.monotonic() + within
        while not look():
            if time.monotonic() > end:
                journal = Path(self.settings.journal).read_text("utf-8")[-2000:]
                log = Path(f"{self.settings.journal}.log").read_text("utf-8", "replace")[-4000:]
                raise AssertionError(f"it did not come:\n{journal}\n{log}")
            await asyncio.sleep(0.02)

    async def until_event(self, event: str, key: str, count: int = 1, within: float = WITHIN) -> None:
        """Wait for lines of the journal."""
        await self.until(lambda: len(self.events(event, key)) >= count, within)

    def overlaps(self, key: str) -> bool:
        """Return whether two executions of a key ran at the same time."""
        running = 0
        names = ("started", "finished", "cancelled", "killed")
        lines = [line for name in names for line in self.events(name, key)]
        for line in sorted(lines, key=lambda line: float(line["at"])):
            running += 1 if line["event"] == "started" else -1
            if running > 1:
                return True
        return False

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                self.kill(process)


def with_children(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and its children."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


@asynccontextmanager
async def calling(shop: Shop) -> AsyncIterator[App]:
    """The tests' own process as a caller."""
    app = App(shop.settings, TaskManager())
    await app.broker.startup()
    try:
        yield app
    finally:
        await app.manager.shutdown(grace=0.0)
        await app.broker.shutdown()


async def until_up(client: httpx2.AsyncClient) -> None:
    """Wait until an application serves."""
    end = time.monotonic() + WITHIN
    while time.monotonic() < end:
        try:
            await client.get("/openapi.json")
        except httpx2.TransportError:
            await asyncio.sleep(0.1)
        else:
            return
    raise AssertionError("the application does not serve")


@pytest.fixture(params=["redis", "rabbitmq"])
def shop(request: pytest.FixtureRequest, tmp_path: Path, key: str, redis_server: Redis) -> Iterator[Shop]:
    """Servers that the tests share, with names of its own for each."""
    broker = "redis"
    if request.param == "rabbitmq":
        server: RabbitMQ = request.getfixturevalue("rabbitmq")
        broker = server.url
    found = Shop(Settings(redis_server.url, broker, f"{key}-{os.getpid()}", str(tmp_path / "journal")))
    yield found
    found.close()


@pytest.fixture
def own_shop(tmp_path: Path, key: str, rabbitmq: RabbitMQ, own_redis: Redis) -> Iterator[Shop]:
    """RabbitMQ, and a Redis that the test may stop."""
    found = Shop(Settings(own_redis.url, rabbitmq.url, f"{key}-{os.getpid()}", str(tmp_path / "journal")))
    yield found
    found.close()
