"""The live view: what runs now, as a page and as JSON, mounted in a FastAPI application.

The endpoints and the JSON are described in docs/reference/live.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_tasks.live.endpoints import live_view

__all__ = ["live_view"]


def __getattr__(name: str) -> object:
    """Load the endpoints when they are used: a worker of a fleet shows its tasks without FastAPI."""
    if name == "live_view":
        from otel_tasks.live.endpoints import live_view

        return live_view
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
