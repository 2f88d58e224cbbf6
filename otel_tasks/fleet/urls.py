"""Maps URLs to buses, and checks namespaces."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from otel_tasks.fleet.memory_bus import MemoryBus

if TYPE_CHECKING:
    from otel_tasks.fleet.bus import Bus

_SCHEMES = ("redis", "rediss", "unix", "memory")
# A namespace is part of keys, between braces and colons.
_is_namespace = re.compile(r"[A-Za-z0-9._-]{1,100}").fullmatch


def open_bus(url: str, namespace: str) -> Bus:
    """Create the bus that a URL names, without connecting.

    Args:
        url: ``redis://host:6379/0``, ``rediss://`` for TLS, ``unix:///path``, or ``memory://`` for the fleets
            of one process. User and password are part of it.
        namespace: The name of the fleet: 1 to 100 letters, digits, dots, hyphens, and underscores.

    Raises:
        ValueError: The URL or the namespace is malformed.
        ImportError: The ``redis`` package is missing.
    """
    if not isinstance(namespace, str) or not _is_namespace(namespace):
        raise ValueError(
            "namespace must be 1 to 100 letters, digits, dots, hyphens, or underscores, as in "
            f"namespace='shop', got {namespace!r}"
        )
    scheme, separator, name = url.partition("://") if isinstance(url, str) else ("", "", "")
    if not separator or scheme not in _SCHEMES:
        # Not the URL itself: it may hold a password.
        found = "this one does not" if isinstance(url, str) else f"got {url!r}"
        raise ValueError(
            "the URL of a fleet must start with redis://, rediss://, unix://, or memory://, as in "
            f"redis://127.0.0.1:6379/0; {found}"
        )
    if scheme == "unix" and not name.strip("/"):
        raise ValueError("the URL of a fleet on a socket needs its path, as in unix:///run/redis/redis.sock")
    if scheme == "memory":
        return MemoryBus(name, namespace)
    return _open_redis(url, namespace)


async def find_namespaces(url: str) -> set[str]:
    """Find the fleets of a server that have nodes; only some of them if it has very many keys.

    Args:
        url: As for ``open_bus``.

    Raises:
        BusUnavailableError: The server is not available, or refuses this process.

    Cancellation: ends the search.
    """
    bus = open_bus(url, "any")
    try:
        return set(filter(_is_namespace, await bus.namespaces()))
    finally:
        await bus.close()


def _open_redis(url: str, namespace: str) -> Bus:
    try:
        from otel_tasks.fleet.redis_bus import RedisBus
    except ModuleNotFoundError as error:
        if error.name == "redis":
            raise ImportError(
                "a fleet on Redis needs the package redis: pip install 'otel-tasks[fleet]'", name="redis"
            ) from None
        raise
    return RedisBus(url, namespace)
