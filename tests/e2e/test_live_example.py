"""The example with a live view: run as `make demo-live` runs it, and looked at while it runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.blocks import ROOT
from tests.processes import marked_environment, marked_processes

pytestmark = pytest.mark.e2e

PATIENCE = 90.0


def started(*arguments: str) -> tuple[subprocess.Popen[str], str, dict[str, str]]:
    """The demo, the address that it has printed, and what marks its processes."""
    environment = marked_environment() | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.live", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    # A line that never comes must not block the test.
    killer = threading.Timer(PATIENCE, process.kill)
    killer.daemon = True
    killer.start()
    for line in process.stdout:
        if found := re.match(r"The live view: (http://[\w.:]+/tasks/)$", line):
            return process, found[1], environment
    raise AssertionError(process.communicate())


def test_demo_ends_by_itself_and_shows_a_stuck_task() -> None:
    """While it runs, its live view has trouble to show; then no process is left."""
    process, url, environment = started("--for", "15")
    seen: set[str] = set()
    with httpx.Client(base_url=url) as client:
        end = time.monotonic() + PATIENCE
        wanted = {"sync_mail", "payments", "imports", "services", "next_price"}
        while not wanted <= seen and time.monotonic() < end:
            overview = client.get("v1/snapshot").json()
            seen |= {row["name"] for row in overview["groups"]} | {row["name"] for row in overview["classes"]}
            time.sleep(0.2)
        assert wanted <= seen
        assert "text/html" in client.get("").headers["content-type"]
    with process:
        # Not communicate(): it misses what the search for the address has read ahead.
        assert process.stdout is not None
        assert process.stderr is not None
        assert "It ends after 15 s." in process.stdout.read()
        assert (process.stderr.read(), process.wait(PATIENCE)) == ("", 0)
    assert marked_processes(environment) == set()


def test_interrupted_demo_leaves_no_process() -> None:
    """Ctrl-C is the way to end it."""
    process, _, environment = started()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert marked_processes(environment) == set()
