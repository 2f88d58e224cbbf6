from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from otel_tasks.fleet.memory_bus import MemoryBus
from otel_tasks.fleet.redis_bus import RedisBus
from otel_tasks.fleet.urls import open_bus


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("redis://cache", "redis://cache:6379/0"),
        ("redis://user:s3cret@cache:6380/2", "redis://cache:6380/2"),
        ("redis://:s3cret@[::1]:6380", "redis://[::1]:6380/0"),
        ("rediss://user:s3cret@cache/1?ssl_cert_reqs=none", "rediss://cache:6379/1"),
        ("unix://user:s3cret@/run/redis.sock?db=3", "unix:///run/redis.sock"),
    ],
)
def test_address_has_no_password(url: str, address: str) -> None:
    """What is logged of a URL is the server, without user and password."""
    bus = open_bus(url, "shop")

    assert isinstance(bus, RedisBus)
    assert bus.address == address


def test_memory() -> None:
    """`memory://` is a bus of this process."""
    assert isinstance(open_bus("memory://", "shop"), MemoryBus)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "s3cret@127.0.0.1:6379",
        "http://s3cret@127.0.0.1",
        "redis:s3cret@127.0.0.1",
        "redis:/s3cret",
        7,
        None,
    ],
)
def test_url_of_no_server_names_what_is_allowed(url: Any) -> None:
    """A URL with another scheme is a ValueError that shows what is allowed, and not the URL."""
    with pytest.raises(
        ValueError, match="must start with redis://, rediss://, unix://, or memory://"
    ) as caught:
        open_bus(url, "shop")

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret#1@127.0.0.1:6379/0",
        "redis://127.0.0.1:s3cret",
        "redis://127.0.0.1:70000",
        "redis://:s3cret@127.0.0.1/0?sokcet_timeout=1",
        "redis://:s3cret@127.0.0.1/0?socket_timeout=long",
        "redis://:s3cret@[::1",
        "redis://:s3cret@127.0.0.1/shop",
        "rediss://127.0.0.1/-1",
    ],
)
def test_malformed_url_names_the_fix(url: str) -> None:
    """A malformed URL is a ValueError that names the fix, and does not quote the URL."""
    with pytest.raises(ValueError, match="the URL of the fleet is malformed: write redis://") as caught:
        open_bus(url, "shop")

    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_missing_url_and_missing_path_are_named() -> None:
    """An environment variable that is not set, and a socket without a path: redis-py would take localhost."""
    missing: Any = None
    with pytest.raises(ValueError, match=r"as in redis://127.0.0.1:6379/0; got None"):
        open_bus(missing, "shop")
    with pytest.raises(ValueError, match=r"needs its path, as in unix:///run/redis/redis.sock"):
        open_bus("unix://", "shop")


@pytest.mark.parametrize("namespace", ["", "a b", "a:b", "{a}", "ä", "a" * 101, "a\n", None, 7])
def test_namespace_is_checked(namespace: Any) -> None:
    """A namespace that would break keys is a ValueError that names what is allowed."""
    with pytest.raises(ValueError, match="namespace must be 1 to 100 letters, digits, dots, hyphens"):
        open_bus("memory://", namespace)


@pytest.mark.parametrize("namespace", ["shop", "a", "Shop-2.prod_eu", "a" * 100])
def test_namespace_is_accepted(namespace: str) -> None:
    """Names of applications are namespaces."""
    open_bus("memory://", namespace)


def test_missing_package_names_the_extra() -> None:
    """Without the package redis, the error names the extra that brings it; `memory://` needs none."""
    code = """
import sys
sys.modules["redis"] = None
from otel_tasks.fleet.urls import open_bus
open_bus("memory://", "shop")
open_bus("redis://127.0.0.1", "shop")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert result.stderr.splitlines()[-1] == (
        "ImportError: a fleet on Redis needs the package redis: pip install 'otel-tasks[fleet]'"
    )


def test_package_that_is_too_old_is_not_missing() -> None:
    """A redis that lacks what the bus imports is named by Python's own error."""
    code = """
import sys, types
sys.modules["redis"] = types.ModuleType("redis")
from otel_tasks.fleet.urls import open_bus
open_bus("redis://127.0.0.1", "shop")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )

    assert "from redis" in result.stderr
    assert "pip install" not in result.stderr
