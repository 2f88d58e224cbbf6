"""Errors of OpenTelemetry implementations: each is logged once, and none reaches the application."""

from __future__ import annotations

from otel_tasks._core.log import logger

# The operations whose error is logged already.
_logged: set[str] = set()


def log_otel_error(operation: str) -> None:
    """Log the exception that is being handled, once per process for each operation.

    Args:
        operation: What the library was doing, as a gerund: ``"reading a span's identity"``.
    """
    if operation not in _logged:
        _logged.add(operation)
        logger.exception(
            "OpenTelemetry raised while %s; further errors of this kind are not logged", operation
        )
