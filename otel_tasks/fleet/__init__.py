"""A fleet: cancel, see, and trace tasks across processes and hosts; needs ``otel-tasks[fleet]``."""

from otel_tasks.fleet.bus import BusRefusedError, BusUnavailableError
from otel_tasks.fleet.fleet import Fleet
from otel_tasks.fleet.nodes import Node
from otel_tasks.fleet.reports import CancelReport, FleetTree, TaskRows

__all__ = [
    "BusRefusedError",
    "BusUnavailableError",
    "CancelReport",
    "Fleet",
    "FleetTree",
    "Node",
    "TaskRows",
]
