"""docs/tutorial.md, followed to the letter: its files, a real server, a client that hangs up, the tree."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

import httpx
import pytest

from tests.blocks import ENVIRONMENT, ROOT
from tests.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

pytestmark = pytest.mark.e2e

TEXT = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
FILES = re.findall(r'^```python title="([\w.]+)"\n(.*?)^```', TEXT, re.MULTILINE | re.DOTALL)
PLAIN, BOUND = [code for name, code in FILES if name == "app.py"]
(WORKER,) = [code for name, code in FILES if name == "worker.py"]
OTHERS = {name: code for name, code in FILES if name not in ("app.py", "worker.py")}
# The trees that it shows: those of the two requests, and that of a mail.
REQUESTS, MAIL = re.findall(r"^```text\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# The lines that the reader adds to app.py for the trace.
(ADDED,) = re.findall(r"^```python\n(import tracing\n.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# The suppliers take seconds; the test has not the reader's patience.
HURRY = 4
DEADLINE = 60.0


def traced(code: str) -> str:
    """The app with the import and the line that step 4 adds."""
    imported, _, made = ADDED.partition("\n\n")
    code = code.replace(
        "\nfrom fastapi import FastAPI\n", f"\nfrom fastapi import FastAPI\n\n{imported}\n", 1
    )
    found, count = re.subn(r"^app = FastAPI\(.*$", made.strip(), code, flags=re.MULTILINE)
    assert count == 1
    return found


class Reader:
    """Somebody with a terminal in a clone; here in an empty directory beside it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def save(self, name: str, code: str) -> None:
        """Save a file, in which all waits for suppliers are shorter."""
        hurried = code.replace("asyncio.sleep(seconds)", f"asyncio.sleep(seconds / {HURRY})")
        (self.directory / name).write_text(hurried)

    def serve_two_clients(self) -> str:
        """Start the app, let one client wait and one hang up; give what the service has printed."""
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--lifespan", "on"]
        output = self.directory / "output.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.directory, env=self.environment, stdout=file, stderr=file
            )
        try:
            url = f"http://127.0.0.1:{port}/offers"
            assert self.first_answer(f"{url}/Lisbon").json() == [
                "3 offers from trains",
                "3 offers from hotels",
            ]
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET /offers/Oslo HTTP/1.1\r\nHost: here\r\n\r\n")
                # Hang up between the two suppliers' answers.
                self.wait_until(lambda: output.read_text().count("trains has answered") == 2)
            # For as long as the second supplier would have taken, and more.
            time.sleep(1.5 / HURRY)
        finally:
            process.terminate()
            process.wait(timeout=DEADLINE)
        return output.read_text()

    def wait_until(self, holds: Callable[[], T]) -> T:
        """Return the first true result; fail with what the server has printed when it does not come."""
        end = time.monotonic() + DEADLINE
        while not (found := holds()):
            assert time.monotonic() < end, (self.directory / "output.txt").read_text()
            time.sleep(0.01)
        return found

    def first_answer(self, url: str) -> httpx.Response:
        """Ask until the server is up."""

        def answer() -> httpx.Response | None:
            with suppress(httpx.ConnectError):
                return httpx.get(url, timeout=DEADLINE, trust_env=False)
            return None

        found = self.wait_until(answer)
        assert found is not None
        return found

    def run(self, name: str) -> str:
        """Run a script."""
        done = subprocess.run(
            [sys.executable, name],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    """A reader with an empty directory."""
    return Reader(tmp_path)


def test_the_plain_service_does_not_notice(reader: Reader) -> None:
    """Step 2: the second supplier answers though its client has left."""
    reader.save("app.py", PLAIN)
    printed = reader.serve_two_clients()
    assert (printed.count("trains has answered"), printed.count("hotels has answered")) == (2, 2)


def test_the_service_stops_and_the_tree_says_so(reader: Reader) -> None:
    """Steps 3 and 4: the second supplier is not waited for; the trees are the page's but for the times."""
    for name, code in OTHERS.items():
        reader.save(name, code)
    reader.save("app.py", traced(BOUND))
    printed = reader.serve_two_clients()
    assert (printed.count("trains has answered"), printed.count("hotels has answered")) == (2, 1)
    assert "Traceback" not in printed

    assert trees(reader.run("show.py")) == trees(REQUESTS)


def test_the_worker_stops_in_order(reader: Reader) -> None:
    """Step 6: the third mail is retried; Ctrl-C lets the running mails finish, and each has a trace."""
    code = WORKER.replace("import random\n", "").replace("sleep(1.0)", "sleep(0.3)")
    failing = "(next(tries, 1.0) if number == 2 else 1.0)"
    for name, text in OTHERS.items():
        reader.save(name, text)
    reader.save("worker.py", "tries = iter([0.0])\n" + code.replace("random.random()", failing))
    output = reader.directory / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "worker.py"],
            cwd=reader.directory,
            env=reader.environment,
            stdout=file,
            stderr=file,
            # A shell that runs the tests in the background ignores SIGINT, and the worker would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        reader.wait_until(lambda: "mail 2 sent" in output.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=DEADLINE) == 130
    finally:
        process.kill()
        process.wait()
    printed = output.read_text()
    sent = [int(number) for number in re.findall(r"^INFO mail (\d+) sent$", printed, re.MULTILINE)]
    assert sorted(sent) == list(range(len(sent)))
    assert printed.count("WARNING task 'send_mail-3' failed in attempt 1 and is retried in") == 1
    assert "INFO received SIGINT, shutting down\n" in printed
    *_, last = printed.splitlines()
    assert last == f"WARNING consumer 'mail' has stopped; left in the queue: {100 - len(sent)}"
    drawn = trees(reader.run("show.py"))
    (mail,) = trees(MAIL)
    assert mail in drawn
    assert sum(tree[1][0] == "send_mail" for tree in drawn) == len(sent)


def trees(text: str) -> list[list[list[str]]]:
    """The words of each line, tree by tree, without bars and times."""
    blocks = re.split(r"\n\s*\n", text.strip())
    return [[re.split(r"\s+█*\s*\d*\s+", line.strip()) for line in block.splitlines()] for block in blocks]


def test_the_other_blocks_are_python() -> None:
    """The blocks that are not run above compile, and the exporter that step 5 names exists."""
    (jaeger,) = re.findall(r"^```python\n(from opentelemetry.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", jaeger],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
