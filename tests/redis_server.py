"""A real Redis for tests of a fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from examples.redis_server import Redis, is_installed
from tests.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

__all__ = ["Redis", "own_redis", "redis_in", "redis_server", "running"]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Redis]:
    """A running server, the same for all tests of this process; leave it running, and use namespaces."""
    yield from running(redis_in(tmp_path_factory.mktemp("redis") / "server"))


@pytest.fixture
def own_redis(tmp_path: Path) -> Generator[Redis]:
    """A running server for one test, which may stop, kill, or pause it."""
    yield from running(redis_in(tmp_path / "redis"))


def redis_in(directory: Path, options: list[str] | None = None) -> Redis:
    """Make a server; the test is skipped where Redis is not installed."""
    if not is_installed():
        pytest.skip("Redis is not installed (Debian: redis-server)")
    directory.mkdir()
    return Redis(directory, free_port(), options)


def running(server: Redis) -> Generator[Redis]:
    """Start a server, and end it afterwards."""
    try:
        server.start()
        yield server
    finally:
        server.close()
