"""Finds the bus that a URL means, and imports its client only then."""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from otel_tasks.fleet.memory_bus import MemoryBus

if TYPE_CHECKING:
    from otel_tasks.fleet.bus import Bus

_REDIS = frozenset({"redis", "rediss", "unix"})
_is_namespace = re.compile(r"[A-Za-z0-9._-]{1,64}").fullmatch


def make_bus(url: str, namespace: str) -> Bus:
    """Make a bus, which does not connect yet.

    Raises:
        TypeError: An argument is not a string.
        ValueError: The URL or the namespace is not valid.
        ImportError: The server is Redis, and its client is not installed.
    """
    _check_text("url", url, "redis://127.0.0.1:6379/0")
    _check_text("namespace", namespace, "shop")
    if not _is_namespace(namespace):
        raise ValueError(
            f"namespace must be 1 to 64 letters, digits, '.', '_' or '-', got {namespace!r}: "
            'write the name of the application, as in namespace="shop"'
        )
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return MemoryBus(parts.netloc, namespace)
    if parts.scheme not in _REDIS:
        # Not the URL itself: it may have a password.
        raise ValueError(
            f"url must begin with redis://, rediss://, unix://, or memory://, got scheme {parts.scheme!r}"
        )
    try:
        module = import_module("otel_tasks.fleet.redis_bus")
    except ImportError as error:
        raise ImportError('a fleet on Redis needs its client: pip install "otel-tasks[fleet]"') from error
    bus: Bus = module.RedisBus(url, namespace)
    return bus


def _check_text(what: str, value: object, example: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, got {value!r}: write {example!r}")
