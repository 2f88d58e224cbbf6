"""Beyond one process: cancel, see, and trace across hosts and workers; needs ``otel-tasks[fleet]``."""

from otel_tasks.fleet.bus import BusUnavailableError

__all__ = ["BusUnavailableError"]
