"""The example of a fleet: run as `make demo-fleet` runs it, with and without its servers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from examples import rabbitmq_server, redis_server
from tests.blocks import ROOT
from tests.processes import marked_environment, marked_processes

pytestmark = pytest.mark.e2e

PATIENCE = 240.0


def run_demo(**variables: str) -> list[str]:
    """Run it to its end; return its output."""
    environment = marked_environment() | variables
    done = subprocess.run(
        [sys.executable, "-m", "examples.fleet"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert marked_processes(environment) == set()
    return done.stdout.splitlines()


def test_demo_shows_four_scenes_with_the_servers() -> None:
    """A hang-up, a cancellation, and two killed processes: every promise is kept, and no process is left."""
    if not redis_server.is_installed() or not rabbitmq_server.is_installed():
        pytest.skip("Redis or RabbitMQ is not installed (Debian: redis-server, rabbitmq-server)")
    lines = run_demo()
    assert [line[:3] for line in lines if line[:2] in ("1.", "2.", "3.", "4.")] == [
        "1. ",
        "2. ",
        "3. ",
        "4. ",
    ]
    assert sum(line.startswith("ok ") for line in lines) == 5


def test_demo_runs_in_one_process_without_them() -> None:
    """Where they are not installed, it says how to get them, and shows the scenes of one process."""
    lines = run_demo(PATH="/nonexistent")
    assert "apt-get install" in lines[1]
    assert sum(line.startswith("ok ") for line in lines) == 2
