"""The server of the parts of a fleet: a Redis of the benchmark's own, on a port of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmarks.middleware import wait_for_port

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT = 18_463
URL = f"redis://127.0.0.1:{PORT}/0"


def missing() -> str:
    """Why a fleet cannot be measured on this machine; empty if it can."""
    if shutil.which("redis-server") is None:
        return "redis-server is not installed (Debian: redis-server)"
    # The CPU time of another process, and the children of one.
    return "" if sys.platform == "linux" else "needs Linux"


def circumstances() -> str:
    """What else the machine does, for the note of a table."""
    return f"Load average at the start: {os.getloadavg()[0]:.1f}, on {os.cpu_count()} processors."


@contextmanager
def redis() -> Iterator[None]:
    """Run the server, with data in a folder that is removed."""
    with tempfile.TemporaryDirectory() as directory:
        options = ["--port", str(PORT), "--bind", "127.0.0.1", "--dir", directory, "--save", ""]
        server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        try:
            wait_for_port(PORT)
            yield
        finally:
            server.kill()
            server.wait()
