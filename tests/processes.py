"""For tests that start a process which starts others: an environment that marks all, to find those left."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


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
