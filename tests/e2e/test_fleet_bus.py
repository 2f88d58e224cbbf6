"""The bus on a real Redis: the scenarios of every bus, and the faults of a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from otel_tasks.fleet import redis_bus
from otel_tasks.fleet.redis_bus import RedisBus
from tests import bus_scenarios
from tests.redis_server import own_redis, redis_server

if TYPE_CHECKING:
    from tests.bus_scenarios import Scenario
    from tests.redis_server import Redis

__all__ = ["own_redis", "redis_server"]

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]


class RedisWorld:
    """Buses on one server."""

    def __init__(self, server: Redis, key: str) -> None:
        self._server = server
        self._key = key
        self._buses: list[RedisBus] = []

    async def bus(self, namespace: str = "shop") -> RedisBus:
        bus = RedisBus(self._server.url, f"{namespace}.{self._key}")
        self._buses.append(bus)
        await bus.connect()
        return bus

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()


@pytest.mark.parametrize("scenario", bus_scenarios.SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_redis_bus(
    scenario: Scenario, redis_server: Redis, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`redis://` keeps this rule of a bus."""
    monkeypatch.setattr(redis_bus, "LEASE", bus_scenarios.LEASE)
    monkeypatch.setattr(redis_bus, "DONE_KEPT", bus_scenarios.DONE_KEPT)
    world = RedisWorld(redis_server, key)
    try:
        await scenario(world)
    finally:
        await world.close()
