"""Keeper: the lease of a process and its claims, renewed by a thread or, on memory://, by the loop."""

from __future__ import annotations

import asyncio
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import pytest

from otel_tasks.fleet import keeper as module
from otel_tasks.fleet.bus import LEASE, RENEWED_EVERY, Bus, BusUnavailableError
from otel_tasks.fleet.keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Collection


class Renewals:
    """A bus that records what is renewed, and when."""

    def __init__(self, *, blocks: bool = False) -> None:
        self.renew_blocks = blocks
        self.calls: list[tuple[float, bool, list[str]]] = []
        self.threads: set[str] = set()
        self.is_down = False
        self.lost: list[str] = []
        self.called = threading.Event()

    def renew(self, node: str, *, lease: bool, claims: Collection[str]) -> list[str]:
        """Record a renewal."""
        now = time.monotonic() if self.renew_blocks else asyncio.get_running_loop().time()
        self.calls.append((now, lease, sorted(claims)))
        self.threads.add(threading.current_thread().name)
        self.called.set()
        if self.is_down:
            raise BusUnavailableError("gone")
        return [key for key in self.lost if key in claims]


def keeper_of(bus: Renewals) -> Keeper:
    """Return a keeper of a recording bus."""
    return Keeper(cast("Bus", bus), "node")


async def test_lease_is_valid_before_it_is_used() -> None:
    """hold_lease() returns after the first renewal, and the next holders within it need none."""
    bus = Renewals()
    keeper = keeper_of(bus)
    await keeper.hold_lease()
    await keeper.hold_lease()
    assert [lease for _, lease, _ in bus.calls] == [True]
    await keeper.stop()


async def test_lease_is_renewed_until_the_last_holder_drops_it() -> None:
    """One lease serves all holders; with the last one, the renewals end."""
    bus = Renewals()
    keeper = keeper_of(bus)
    await keeper.hold_lease()
    await keeper.hold_lease()
    await asyncio.sleep(20)
    keeper.drop_lease()
    times = [at for at, _, _ in bus.calls]
    assert max(later - earlier for earlier, later in pairwise(times)) < LEASE / 2
    keeper.drop_lease()
    await asyncio.sleep(RENEWED_EVERY)
    count = len(bus.calls)
    await asyncio.sleep(60)
    assert len(bus.calls) == count
    await keeper.stop()


async def test_a_new_holder_renews_a_lease_that_has_been_left_for_a_while() -> None:
    """The turns of the claims come every 2 s, and the next one may be after the end of the lease."""
    bus = Renewals()
    keeper = keeper_of(bus)
    await keeper.hold_lease()
    keeper.drop_lease()
    await asyncio.sleep(LEASE - RENEWED_EVERY - 0.05)
    keeper.add_claim("task", lambda: None)
    await keeper.hold_lease()
    await asyncio.sleep(LEASE)
    times = [at for at, lease, _ in bus.calls if lease]
    assert max(later - earlier for earlier, later in pairwise(times)) < LEASE - 1.0
    keeper.drop_lease()
    await keeper.stop()


async def test_many_short_holders_cost_one_renewal_per_interval() -> None:
    """Requests that come one after another share the renewals."""
    bus = Renewals()
    keeper = keeper_of(bus)
    for _ in range(1000):
        await keeper.hold_lease()
        await asyncio.sleep(0.01)
        keeper.drop_lease()
    assert len(bus.calls) <= 7
    await keeper.stop()


async def test_young_claim_is_not_renewed() -> None:
    """A claim that is dropped within its first seconds costs no call."""
    bus = Renewals()
    keeper = keeper_of(bus)
    keeper.add_claim("short", lambda: None)
    await asyncio.sleep(1)
    keeper.drop_claim("short")
    await asyncio.sleep(10)
    assert bus.calls == []
    await keeper.stop()


async def test_old_claim_is_renewed_before_it_expires() -> None:
    """The first renewal of a claim comes within its lifetime, whenever it was taken."""
    bus = Renewals()
    keeper = keeper_of(bus)
    keeper.add_claim("first", lambda: None)
    await asyncio.sleep(1.5)
    keeper.add_claim("second", lambda: None)
    await asyncio.sleep(3.9)
    assert any("second" in claims for _, _, claims in bus.calls)
    await keeper.stop()


async def test_lost_claim_is_reported_once() -> None:
    """A claim that another node has taken over is reported, and not renewed any more."""
    bus = Renewals()
    keeper = keeper_of(bus)
    reported: list[str] = []
    bus.lost = ["mine"]
    keeper.add_claim("mine", lambda: reported.append("mine"))
    await asyncio.sleep(30)
    assert reported == ["mine"]
    assert len(bus.calls) == 1
    await keeper.stop()


async def test_bus_that_is_down_is_tried_twice_a_second() -> None:
    """Its return finds the lease renewed within a second, and nothing waits for a bus that is down."""
    bus = Renewals()
    bus.is_down = True
    keeper = keeper_of(bus)
    await asyncio.wait_for(keeper.hold_lease(), 1)
    await asyncio.sleep(30)
    assert 30 < len(bus.calls) < 70
    bus.is_down = False
    await asyncio.sleep(1)
    assert bus.calls[-1][1]
    count = len(bus.calls)
    await asyncio.sleep(10)
    assert len(bus.calls) - count <= 6
    await keeper.stop()


@pytest.mark.real_clock
@pytest.mark.parametrize("blocks", [True, False])
async def test_error_of_the_bus_does_not_end_the_renewals(
    blocks: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that nobody expects is logged, and the lease is renewed the next time."""
    monkeypatch.setattr(module, "RENEWED_EVERY", 0.02)
    bus = Renewals(blocks=blocks)
    keeper = keeper_of(bus)
    monkeypatch.setattr(bus, "lost", None)
    keeper.add_claim("x", lambda: None)
    await keeper.hold_lease()
    monkeypatch.setattr(bus, "lost", [])
    await keeper.hold_lease()
    await keeper.stop()
    assert len(bus.calls) >= 2
    assert "renewing the lease and the claims of this node raised" in caplog.text


@pytest.mark.real_clock
async def test_cancelled_holder_drops_the_lease() -> None:
    """A caller that is cancelled while it waits for the lease does not hold it."""
    bus = Renewals(blocks=True)
    keeper = keeper_of(bus)
    holder = asyncio.create_task(keeper.hold_lease())
    await asyncio.sleep(0)
    holder.cancel()
    await asyncio.wait([holder])
    await keeper.stop()
    assert keeper.renew_due() is None


@pytest.mark.real_clock
async def test_blocked_loop_does_not_keep_the_thread_from_renewing() -> None:
    """The thread renews while the loop is blocked, and ends with the last claim."""
    bus = Renewals(blocks=True)
    keeper = keeper_of(bus)
    await keeper.hold_lease()
    bus.called.clear()
    # The test is about a loop that does not turn.
    assert bus.called.wait(60)
    assert bus.threads == {"otel-tasks keeper"}
    keeper.drop_lease()
    await keeper.stop()
    end = time.monotonic() + 60
    while "otel-tasks keeper" in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_stopped_keeper_renews_nothing() -> None:
    """After stop(), neither a holder nor a claim is renewed, and nobody waits."""
    bus = Renewals()
    keeper = keeper_of(bus)
    await keeper.stop()
    await keeper.hold_lease()
    keeper.add_claim("late", lambda: None)
    await asyncio.sleep(10)
    assert bus.calls == []
