"""A server of one of the examples as a child process: started on a free port, read, and ended by its id."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
# Seconds for the start of one server.
START_LIMIT = 30.0
LISTENING = re.compile(r"running on (http://[\w.:]+)")
# The OTLP exporter's log line about a batch that the collector refused.
UNDELIVERED = re.compile(r"(while exporting|Failed to export|Failed to encode|Dropping) spans? batch")


@dataclass
class Service:
    """A server's process, and the last of what it says; once `console` is set, that is shown there too."""

    app: str
    process: asyncio.subprocess.Process
    url: str = ""
    log: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    undelivered: str = ""
    console: Console | None = None

    def take(self, line: str) -> None:
        """Keep a line of its log, and show it where somebody looks."""
        self.log.append(line)
        if UNDELIVERED.search(line):
            self.undelivered = line.strip()
        if self.console is not None:
            self.console.print(Text(line.rstrip(), "dim"), soft_wrap=True)


@contextlib.asynccontextmanager
async def service(
    app: str, *, port: int = 0, environment: Mapping[str, str] | None = None, fails: bool = False
) -> AsyncIterator[Service]:
    """An application served by uvicorn; its process has ended when the block is left, by whatever way.

    Args:
        app: Where it is, as uvicorn wants it.
        port: Its port on the loopback interface; 0 is a free one.
        environment: Variables that it gets besides those of this process.
        fails: It logs tracebacks on purpose.

    Raises:
        SystemExit: It did not start, or has logged a traceback; with what it said.
    """
    command = ["-m", "uvicorn", app, "--port", str(port), "--no-access-log"]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        "--timeout-graceful-shutdown",
        "2",
        # uvicorn looks at its stdout to decide whether to color its stderr, which is read here.
        "--no-use-colors",
        cwd=ROOT,
        # Without a collector, the exporter is to give up before the service is made to end.
        env={"OTEL_EXPORTER_OTLP_TIMEOUT": "2"} | os.environ | dict(environment or {}),
        stderr=asyncio.subprocess.PIPE,
    )
    running = Service(app, process)
    try:
        running.url = await read_url(running)
        # Read on to its end, or the service would block once the pipe is full.
        reader = asyncio.create_task(read_log(running))
        try:
            yield running
        finally:
            await end(process)
            await asyncio.wait([reader], timeout=1.0)
            reader.cancel()
    finally:
        await end(process)
    # With a console, the log was printed as it was written.
    if running.console is None and not fails and any("Traceback" in line for line in running.log):
        raise SystemExit(f"the service reported an error ({app}):\n" + "".join(running.log))


async def read_url(running: Service) -> str:
    """Wait until the service says where it listens (port 0 lets the system choose a free one)."""
    assert running.process.stderr is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_LIMIT):
            while line := await running.process.stderr.readline():
                running.take(line.decode(errors="replace"))
                if found := LISTENING.search(running.log[-1]):
                    return found[1]
    raise SystemExit(f"the service did not start ({running.app}):\n" + "".join(running.log))


async def read_log(running: Service) -> None:
    """Take what the service says, until it has ended."""
    assert running.process.stderr is not None
    while line := await running.process.stderr.readline():
        running.take(line.decode(errors="replace"))


async def end(process: asyncio.subprocess.Process) -> None:
    """Ask the service to stop; after five seconds, or when interrupted again, make it."""
    try:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(5.0):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def end_on_sigterm() -> None:
    """Let SIGTERM end the current task as Ctrl-C does: through its `finally` blocks."""
    this_task = asyncio.current_task()
    assert this_task is not None
    with contextlib.suppress(NotImplementedError):  # there are no signal handlers on Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this_task.cancel)


def run_demo(main: Callable[[], Coroutine[Any, Any, bool]]) -> NoReturn:
    """Run a demo, and end this process: with 0 if `main` returns True, and with 130 for Ctrl-C or SIGTERM."""

    async def run() -> bool:
        end_on_sigterm()
        return await main()

    try:
        sys.exit(0 if asyncio.run(run()) else 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
