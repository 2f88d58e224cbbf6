"""The live view: what runs now, as a page and as JSON, mounted in a FastAPI application.

The endpoints and the JSON are described in docs/reference/live.md.
"""

from otel_tasks.live.endpoints import live_view

__all__ = ["live_view"]
