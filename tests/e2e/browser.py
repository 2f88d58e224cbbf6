"""A real browser that looks at a real server: both start once per module, each test gets its own profile."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.blocks import ROOT
from tests.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page, Request

START_DEADLINE = 60.0
# The user `root` needs it; a browser of one's own has a sandbox in the container.
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


def chromium() -> str:
    """The path of Debian's Chromium; skips the test where there is none. None is ever downloaded."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser: install Debian's chromium, or name one with CHROMIUM=path")
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser, for one module: Playwright's loop must not be there when another test runs its own."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Site:
    """An application behind uvicorn that a test can stop, suspend, and start again at the same address."""

    app: str
    directory: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, *arguments: str) -> None:
        """Start it, and wait until it answers."""
        command = [
            "-m",
            "uvicorn",
            self.app,
            "--port",
            str(self.port),
            "--no-access-log",
            "--timeout-graceful-shutdown",
            "1",
        ]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command, *arguments], cwd=ROOT, stdout=log, stderr=log
            )
        end = time.monotonic() + START_DEADLINE
        while True:
            assert self.process.poll() is None, self.log()
            try:
                httpx.get(f"{self.url}/", timeout=5.0)
            except httpx.TransportError:
                assert time.monotonic() < end, self.log()
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """End it in order."""
        if self.process is not None:
            self.resume()
            self.process.terminate()
            self.process.wait(timeout=START_DEADLINE)
            self.process = None

    def suspend(self) -> None:
        """Let it say nothing more, with all its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it continue."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        """What it has said."""
        return (self.directory / "log").read_text()

    def post(self, path: str, **parameters: Any) -> None:
        """Tell it to do something."""
        httpx.post(f"{self.url}{path}", params=parameters, timeout=30.0).raise_for_status()

    def get(self, path: str) -> Any:
        """Ask it for something."""
        response = httpx.get(f"{self.url}{path}", timeout=30.0)
        response.raise_for_status()
        return response.json()


@dataclass
class Watched:
    """All that a page's console complains of, and the event streams that it reads."""

    expected: tuple[str, ...] = ()
    """Parts of the complaints that a test provokes."""
    complaints: list[str] = field(default_factory=list)
    streams: set[Request] = field(default_factory=set)

    @property
    def unexpected(self) -> list[str]:
        """The complaints that no test provokes."""
        return [each for each in self.complaints if not any(part in each for part in self.expected)]


def watch(page: Page, expected: tuple[str, ...] = ()) -> Watched:
    """Note every error of a page."""
    watched = Watched(expected)

    def opened(request: Request) -> None:
        if request.resource_type == "eventsource":
            watched.streams.add(request)

    page.on("console", lambda message: watched.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: watched.complaints.append(f"error: {error}"))
    page.on("request", opened)
    # A method of a builtin cannot be a handler.
    page.on("requestfinished", lambda request: watched.streams.discard(request))
    page.on("requestfailed", lambda request: watched.streams.discard(request))
    return watched
