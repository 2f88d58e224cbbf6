"""The bus of one process passes the scenarios of every bus, on the virtual clock."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from otel_tasks.fleet import memory_bus
from otel_tasks.fleet.bus import INBOX_LIMIT, KEPT, START, BusUnavailableError
from otel_tasks.fleet.memory_bus import MemoryBus, memory_server
from tests import bus_scenarios

if TYPE_CHECKING:
    from tests.bus_scenarios import Scenario


class MemoryWorld:
    """The servers of one loop."""

    async def bus(self, namespace: str = "shop") -> MemoryBus:
        bus = MemoryBus("", namespace)
        await bus.connect()
        return bus


@pytest.mark.parametrize("scenario", bus_scenarios.SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_memory_bus(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """`memory://` keeps this rule of a bus."""
    monkeypatch.setattr(memory_bus, "LEASE", bus_scenarios.LEASE)
    monkeypatch.setattr(memory_bus, "DONE_KEPT", bus_scenarios.DONE_KEPT)

    await scenario(MemoryWorld())


async def test_log_forgets_old_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log keeps an hour: what is older goes with the next entry."""
    monkeypatch.setattr(memory_bus, "KEPT", 60.0)
    bus = await MemoryWorld().bus()
    old = await bus.publish(b"old")
    await asyncio.sleep(61.0)
    new = await bus.publish(b"new")

    assert await bus.lost([old, new]) == {old}
    assert KEPT == 3600.0


async def test_inbox_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inbox keeps its newest entries, for a minute."""
    monkeypatch.setattr(memory_bus, "INBOX_LIMIT", 3)
    bus = await MemoryWorld().bus()
    await bus.send({"a": [b"1", b"2"], "b": [b"other"]})
    await bus.send({"a": [b"3", b"4"]})
    assert await payloads(bus, "a") == [b"2", b"3", b"4"]
    await asyncio.sleep(61.0)

    assert await payloads(bus, "b") == []
    await bus.send({"a": [b"5"]})
    assert await payloads(bus, "a") == [b"5"]
    assert INBOX_LIMIT == 10_000


async def test_failed_server_ends_reading() -> None:
    """A server that fails ends those who read, and refuses every call until it is restored."""
    bus = await MemoryWorld().bus()
    reader = bus.read("a", START)
    assert await anext(reader) == []
    waiting = asyncio.ensure_future(anext(reader))
    await asyncio.sleep(0)
    memory_server(namespace="shop").fail("no power")
    with pytest.raises(BusUnavailableError, match="memory:// does not answer: no power"):
        await waiting
    for call in (bus.connect(), bus.publish(b""), bus.send({}), bus.roster(), bus.leases([]), bus.lost([])):
        with pytest.raises(BusUnavailableError):
            await call
    with pytest.raises(BusUnavailableError):
        bus.renew("a", lease=True, claims=[])

    memory_server(namespace="shop").restore()
    assert await bus.roster() == {}


async def test_server_may_lose_its_data() -> None:
    """A server that is restored without its data has none."""
    bus = await MemoryWorld().bus()
    position = await bus.publish(b"x")
    await bus.announce("a", b"", 30.0)
    await bus.claim("t", "a", "d")
    memory_server(namespace="shop").fail()
    memory_server(namespace="shop").restore(lose_data=True)

    assert await bus.lost([position]) == {position}
    assert await bus.roster() == {}
    assert bus.renew("b", lease=False, claims=["t"]) == []
    assert await payloads(bus, "a") == []


async def test_names_in_the_url_are_apart() -> None:
    """`memory://x` and `memory://y` are two servers."""
    buses = [MemoryBus(name, "shop") for name in ("x", "y")]
    for bus in buses:
        await bus.connect()
    await buses[0].publish(b"1")

    assert [await payloads(bus, "a") for bus in buses] == [[b"1"], []]
    assert buses[0].address == "memory://x"


async def test_large_log_comes_in_batches() -> None:
    """A reader gets a long log in several batches, and so leaves the loop to others in between."""
    bus = await MemoryWorld().bus()
    for n in range(2500):
        await bus.publish(b"%d" % n)
    reader = bus.read("a", START)
    sizes = [len(await anext(reader)) for _ in range(4)]
    await reader.aclose()

    assert sizes == [1000, 1000, 500, 0]


async def payloads(bus: MemoryBus, inbox: str) -> list[bytes]:
    """What the log and an inbox have, for a process that starts."""
    fresh = MemoryBus(bus.address.removeprefix("memory://"), "shop")
    await fresh.connect()
    reader = fresh.read(inbox, START)
    found: list[bytes] = []
    while batch := await anext(reader):
        found += [entry.payload for entry in batch]
    await reader.aclose()
    return found
