"""For tests that start processes: a port to listen at, and an environment by which all of them are found."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path


def free_port() -> int:
    """Return a port of the loopback interface that no other process gets while the tests run.

    Other workers of pytest look for ports too, in the seconds until the server listens. On Linux, the port
    therefore stays bound until this process ends: the system gives it to nobody else, and a server that sets
    `SO_REUSEADDR`, as each of them does, may bind it and listen. Other systems refuse the second bind.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        if sys.platform == "linux":
            holder.detach()
        return port


def marked_environment() -> dict[str, str]:
    """An environment that no other process has, and that leads no spans elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return kept | {"TEST_EXAMPLES_MARK": os.urandom(8).hex()}


def marked_processes(environment: dict[str, str]) -> set[int]:
    """The ids of the live processes that have it; none are found where there is no /proc."""
    mark = environment["TEST_EXAMPLES_MARK"].encode()
    found: set[int] = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes():
                found.add(int(path.parent.name))
    return found
