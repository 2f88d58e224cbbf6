"""The feed: what the live view says about one manager, as JSON-ready data.

It uses the manager's public functions alone, and no framework.
"""

from __future__ import annotations

import os
import socket
import time
from importlib.metadata import version
from secrets import token_urlsafe
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from otel_tasks import TaskManager

# The version of the JSON.
VERSION = 1


class Feed:
    """The state of one process as its viewers see it.

    Args:
        manager: The manager to show.
    """

    def __init__(self, manager: TaskManager) -> None:
        self._manager = manager
        self.instance = token_urlsafe(6)
        self._started = time.monotonic()
        self._number = 0

    def snapshot(self) -> dict[str, Any]:
        """Return the whole overview."""
        now = time.monotonic()
        stats = self._manager.stats()
        return {
            "v": VERSION,
            "kind": "snapshot",
            "id": f"{self.instance}:{self._number}",
            "instance": self.instance,
            "now": now,
            "epoch": time.time() - now,
            "interval": 1.0,
            "service": os.environ.get("OTEL_SERVICE_NAME"),
            "manager": self._manager.name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": self._started,
            "version": version("otel-tasks"),
            "actions": [],
            "trace_url": None,
            "stats": {
                **stats.to_dict(),
                "limit": self._manager.max_concurrency,
                "closed": self._manager.closed,
            },
        }
