"""The rules of a bus as scenarios, which every bus has to pass.

A scenario gets a ``World``, which makes buses of one fleet. Leases are short in it, because time may be real.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Protocol
from unittest import mock

import pytest

from otel_tasks.fleet.bus import END, START, BusUnavailableError, Claim, Entry, position_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from otel_tasks.fleet.bus import Bus

    Scenario = Callable[["World"], Awaitable[None]]

# Seconds, in place of those of a real fleet.
LEASE = 0.6
DONE_KEPT = 1.2


class World(Protocol):
    """A server, and its clients."""

    async def bus(self, namespace: str = "shop") -> Bus:
        """Return one more connected bus; it is closed after the scenario."""
        ...


async def ids_grow(world: World) -> None:
    """Positions grow with each entry, no matter which node publishes it."""
    buses = [await world.bus(), await world.bus()]
    ids = [await buses[n % 2].publish(b"%d" % n) for n in range(20)]

    positions = [position_of(entry_id) for entry_id in ids]
    assert positions == sorted(set(positions))
    assert positions[0] > position_of(START)


async def concurrent_entries_keep_their_order(world: World) -> None:
    """Entries that are published without waiting are in the log in the order of the calls."""
    bus = await world.bus()
    ids = await asyncio.gather(*(bus.publish(b"%d" % n) for n in range(1200)))

    assert [position_of(entry_id) for entry_id in ids] == sorted(map(position_of, ids))
    entries = await _written(bus, "a")
    assert [entry.payload for entry in entries] == [b"%d" % n for n in range(1200)]
    assert [entry.id for entry in entries] == ids


async def every_reader_gets_the_log(world: World) -> None:
    """All readers get the same entries in the same order; an empty batch comes once, after the old ones."""
    bus = await world.bus()
    for n in range(3):
        await bus.publish(b"old %d" % n)
    async with _reading(await world.bus(), "a") as first, _reading(await world.bus(), "b") as second:
        batches = [await _batches_until_caught_up(reader) for reader in (first, second)]
        await bus.publish(b"new")
        new = [await anext(reader) for reader in (first, second)]

    assert [entry.id for entry in batches[0]] == [entry.id for entry in batches[1]]
    assert [entry.payload for entry in batches[0]] == [b"old 0", b"old 1", b"old 2"]
    assert [entry.payload for batch in new for entry in batch] == [b"new", b"new"]
    assert new[0][0].id == new[1][0].id
    assert not any(entry.inbox for batch in (*batches, *new) for entry in batch)


async def reading_goes_on_after_a_position(world: World) -> None:
    """A reader gets what comes after its position; a position after the end of the log means its start."""
    bus = await world.bus()
    ids = [await bus.publish(b"%d" % n) for n in range(4)]

    assert [entry.payload for entry in await _written(bus, "a", ids[1])] == [b"2", b"3"]
    assert await _written(bus, "a", ids[3]) == []
    time, number = position_of(ids[3])
    beyond = f"{time + 3_600_000}-{number}"
    assert [entry.payload for entry in await _written(bus, "a", beyond)] == [b"0", b"1", b"2", b"3"]


async def reading_starts_at_the_end(world: World) -> None:
    """One that needs nothing of the past reads what comes, also of a log without entries."""
    bus = await world.bus()
    for payload in (b"first", b"second"):
        async with _reading(await world.bus(), "a", END) as reader:
            assert await _batches_until_caught_up(reader) == []
            await bus.publish(payload)
            assert [entry.payload for entry in await anext(reader)] == [payload]


async def an_inbox_is_one_nodes(world: World) -> None:
    """An inbox is read by its node alone, also what came before, and nothing of it twice."""
    bus, reading = await world.bus(), await world.bus()
    await bus.send({"a": [b"1", b"2"], "b": [b"other"]})

    entries = await _written(reading, "a")
    assert [(entry.payload, entry.inbox) for entry in entries] == [(b"1", True), (b"2", True)]
    await bus.send({"a": [b"3"]})
    assert [entry.payload for entry in await _written(reading, "a")] == [b"3"]
    async with _reading(reading, "a") as reader:
        assert await _batches_until_caught_up(reader) == []
        await bus.send({"a": [b"4"]})
        assert [entry.payload for entry in await anext(reader)] == [b"4"]


async def letters_keep_their_order(world: World) -> None:
    """Many letters of one call arrive in their order, each as it was sent, short and long ones."""
    bus = await world.bus()
    sent = [b"%d:" % n + b"x" * (n * 37 % 3000) for n in range(100)]
    await bus.send({"a": sent, "b": [b"other"]})
    await bus.send({"a": [b"last"]})

    entries = await _written(bus, "a")
    assert [entry.payload for entry in entries] == [*sent, b"last"]
    assert all(entry.inbox for entry in entries)


async def ages_are_the_servers(world: World) -> None:
    """An entry's age does not depend on the clock of the process that writes or reads it."""
    bus = await world.bus()
    with mock.patch.object(time, "time", return_value=3_600.0):
        await bus.publish(b"x")
        await bus.send({"a": [b"y"]})
        await asyncio.sleep(0.2)
        entries = await _written(bus, "a")

    assert len(entries) == 2
    assert all(0.15 <= entry.age < 5.0 for entry in entries)


async def the_clock_is_the_servers(world: World) -> None:
    """The time is the one that positions are made of, and the same for all."""
    a, b = await world.bus(), await world.bus()
    before = await a.time()
    position = await b.publish(b"x")
    await asyncio.sleep(0.1)
    after = await b.time()

    assert before - 0.001 <= position_of(position)[0] / 1000 <= after
    assert 0.09 <= after - before < 5.0


async def lost_entries_are_found_out(world: World) -> None:
    """A bus says which entries the log does not have."""
    bus = await world.bus()
    ids = [await bus.publish(b"x") for _ in range(3)]

    assert await bus.lost(ids) == set()
    assert await bus.lost([ids[0], "1-1", "9999999999999-0"]) == {"1-1", "9999999999999-0"}


async def the_roster_forgets(world: World) -> None:
    """A node is in the roster until its time is over, or until it leaves."""
    bus, other = await world.bus(), await world.bus()
    await bus.announce("a", b'{"pid": 1}', 30.0)
    await bus.announce("b", b"\x00\xff two words", 30.0)
    await bus.announce("short", b"", 1.0)
    await asyncio.sleep(0.2)
    roster = await other.roster()

    assert {node: description for node, (description, _) in roster.items()} == {
        "a": b'{"pid": 1}',
        "b": b"\x00\xff two words",
        "short": b"",
    }
    assert all(0.1 <= seconds < 5.0 for _, seconds in roster.values())
    await bus.announce("a", b"new", 30.0)
    await other.leave("b")
    await asyncio.sleep(1.0)
    ((node, (description, seconds)),) = (await other.roster()).items()
    assert (node, description) == ("a", b"new")
    assert seconds < 5.0


async def one_node_executes(world: World) -> None:
    """A claim is held until it is finished or released; a message that was executed is done for a while."""
    a, b = await world.bus(), await world.bus()

    assert await a.claim("t", "a", "d1") is Claim.TAKEN
    assert await b.claim("t", "b", "d1") is Claim.HELD
    assert await a.claim("t", "a", "d1") is Claim.HELD
    assert await b.claim("other", "b", "d1") is Claim.TAKEN
    await b.release("t", "b")
    assert await b.claim("t", "b", "d1") is Claim.HELD
    await a.release("t", "a")
    assert await b.claim("t", "b", "d1") is Claim.TAKEN
    await b.send({}, owner="b", finished={"t": "d1"})
    assert await a.claim("t", "a", "d1") is Claim.DONE
    # A retry is a new message with the same id; the old one stays done.
    assert await a.claim("t", "a", "d2") is Claim.TAKEN
    assert await b.claim("t", "b", "d1") is Claim.DONE
    assert await b.claim("t", "b", "d2") is Claim.HELD
    await a.send({}, owner="a", finished={"t": "d2"})
    assert await b.claim("t", "b", "d2") is Claim.DONE
    await asyncio.sleep(DONE_KEPT + 0.2)
    assert await b.claim("t", "b", "d1") is Claim.TAKEN


async def each_claim_has_its_own_answer(world: World) -> None:
    """Claims that are made at once are answered one by one, in their order; so are ends."""
    a, b = await world.bus(), await world.bus()
    assert await a.claim("done", "a", "d") is Claim.TAKEN
    await a.send({"b": [b"ended"]}, owner="a", finished={"done": "d"})

    answers = await asyncio.gather(*(a.claim(key, "a", "d") for key in ("t", "t", "done", "u")))
    assert answers == [Claim.TAKEN, Claim.HELD, Claim.DONE, Claim.TAKEN]
    await a.send({}, owner="a", finished={"t": "d", "u": "d"})
    answers = await asyncio.gather(*(b.claim(key, "b", d) for key in ("t", "u") for d in ("d", "e")))
    assert answers == [Claim.DONE, Claim.TAKEN] * 2


async def similar_names_are_apart(world: World) -> None:
    """A node whose name begins like another's has other claims."""
    bus = await world.bus()
    assert await bus.claim("t", "host/1/ab", "d") is Claim.TAKEN
    await bus.release("t", "host/1/a")
    await bus.send({}, owner="host/1/a", finished={"u": "d"})

    assert await bus.claim("t", "host/1/c", "d") is Claim.HELD
    assert await bus.claim("u", "host/1/c", "d") is Claim.DONE


async def claims_expire_unless_renewed(world: World) -> None:
    """A claim that nobody renews is free after LEASE; one that is renewed stays."""
    a, b = await world.bus(), await world.bus()
    await a.claim("kept", "a", "d")
    await a.claim("left", "a", "d")
    for _ in range(4):
        await asyncio.sleep(LEASE / 3)
        assert _renewed(a, "a", claims=["kept"]) == []

    assert await b.claim("kept", "b", "d") is Claim.HELD
    assert await b.claim("left", "b", "d") is Claim.TAKEN
    assert _renewed(a, "a", claims=["kept", "left"]) == ["left"]


async def an_expired_claim_is_taken_again(world: World) -> None:
    """Renewing takes an expired claim again, unless its message was executed or it was given back."""
    a, b = await world.bus(), await world.bus()
    for key in ("expired", "finished", "released"):
        await a.claim(key, "a", "d")
    await a.send({}, owner="a", finished={"finished": "d"})
    await a.release("released", "a")
    await asyncio.sleep(LEASE + 0.2)
    assert _renewed(a, "a", claims=["expired", "finished", "released"]) == []

    assert await b.claim("expired", "b", "d") is Claim.HELD
    assert await b.claim("finished", "b", "d") is Claim.DONE
    assert await b.claim("released", "b", "d") is Claim.TAKEN


async def leases_expire_unless_renewed(world: World) -> None:
    """A node's lease is valid while it renews, and gone at once when it leaves."""
    a, b = await world.bus(), await world.bus()
    assert await a.leases(["a", "b"]) == set()
    assert await a.leases([]) == set()
    _renewed(a, "a", lease=True)
    _renewed(b, "b", lease=True)
    assert await a.leases(["a", "b", "c"]) == {"a", "b"}
    for _ in range(4):
        await asyncio.sleep(LEASE / 3)
        _renewed(a, "a", lease=True)
    assert await b.leases(["a", "b"]) == {"a"}
    _renewed(a, "a", lease=False)
    await a.leave("a")
    assert await b.leases(["a", "b"]) == set()


async def many_claims_are_renewed(world: World) -> None:
    """A node may hold thousands of claims, and learns which ones it has lost."""
    a, b = await world.bus(), await world.bus()
    keys = [f"t{n}" for n in range(1100)]
    await asyncio.gather(*(a.claim(key, "a", f"d{key}") for key in keys))
    assert _renewed(a, "a", lease=True, claims=keys) == []
    await asyncio.sleep(LEASE + 0.2)
    for key in ("t7", "t1007"):
        assert await b.claim(key, "b", "d") is Claim.TAKEN

    assert _renewed(a, "a", lease=True, claims=keys) == ["t7", "t1007"]
    assert await b.claim("t1099", "b", "d") is Claim.HELD


async def fleets_are_apart(world: World) -> None:
    """Another namespace is another fleet: its log, inboxes, roster, leases, and claims."""
    shop, bank = await world.bus(), await world.bus("bank")
    await shop.publish(b"x")
    await shop.send({"a": [b"y"]})
    await shop.announce("a", b"", 30.0)
    await shop.claim("t", "a", "d")
    _renewed(shop, "a", lease=True)

    assert await _written(bank, "a") == []
    assert await bank.roster() == {}
    assert await bank.leases(["a"]) == set()
    assert await bank.claim("t", "b", "d") is Claim.TAKEN


async def fleets_with_nodes_are_found(world: World) -> None:
    """A server names its fleets, but not those whose nodes have left, or were killed."""
    shop, bank, mill, farm = [await world.bus(name) for name in ("shop", "bank", "mill", "farm")]
    before = await shop.namespaces()
    for bus in (shop, bank):
        await bus.announce("a", b"", 30.0)
    await mill.announce("killed", b"", 1.0)
    await farm.announce("left", b"", 30.0)
    await farm.leave("left")
    assert _first_words(await bank.namespaces() - before) == {"shop", "bank", "mill"}
    await asyncio.sleep(1.1)
    assert _first_words(await bank.namespaces() - before) == {"shop", "bank"}


def _first_words(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


async def a_closed_bus_refuses(world: World) -> None:
    """A bus that was closed, once or twice, refuses calls until it is connected again."""
    bus = await world.bus()
    await bus.publish(b"x")
    await bus.close()
    await bus.close()

    with pytest.raises(BusUnavailableError):
        await bus.publish(b"y")
    with pytest.raises(BusUnavailableError):
        _renewed(bus, "a", lease=True)
    await bus.connect()
    await bus.publish(b"z")
    assert [entry.payload for entry in await _written(bus, "a")] == [b"x", b"z"]


SCENARIOS: list[Scenario] = [
    ids_grow,
    concurrent_entries_keep_their_order,
    every_reader_gets_the_log,
    reading_goes_on_after_a_position,
    reading_starts_at_the_end,
    an_inbox_is_one_nodes,
    letters_keep_their_order,
    ages_are_the_servers,
    the_clock_is_the_servers,
    lost_entries_are_found_out,
    the_roster_forgets,
    one_node_executes,
    each_claim_has_its_own_answer,
    similar_names_are_apart,
    claims_expire_unless_renewed,
    an_expired_claim_is_taken_again,
    leases_expire_unless_renewed,
    many_claims_are_renewed,
    fleets_are_apart,
    fleets_with_nodes_are_found,
    a_closed_bus_refuses,
]


@contextlib.asynccontextmanager
async def _reading(bus: Bus, inbox: str, after: str = START) -> AsyncGenerator[AsyncGenerator[list[Entry]]]:
    reader = bus.read(inbox, after)
    try:
        yield reader
    finally:
        await reader.aclose()


async def _batches_until_caught_up(reader: AsyncGenerator[list[Entry]]) -> list[Entry]:
    entries: list[Entry] = []
    while batch := await anext(reader):
        entries += batch
    return entries


async def _written(bus: Bus, inbox: str, after: str = START) -> list[Entry]:
    async with _reading(bus, inbox, after) as reader:
        return await _batches_until_caught_up(reader)


def _renewed(bus: Bus, node: str, *, lease: bool = False, claims: list[str] | None = None) -> list[str]:
    """Renew as the thread of a node does; the loop stands still meanwhile, which a bus has to bear."""
    return bus.renew(node, lease=lease, claims=claims or [])
