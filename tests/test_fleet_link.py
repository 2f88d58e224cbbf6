from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks.fleet import link as link_module
from otel_tasks.fleet import outbox as outbox_module
from otel_tasks.fleet.bus import KEPT, BusRefusedError, BusUnavailableError, Claim, Entry, position_of
from otel_tasks.fleet.entries import AnswerEntry, CancelEntry, EndedEntry, FleetEntry, InspectEntry, encode
from otel_tasks.fleet.link import HOLD_OFF, Link
from otel_tasks.fleet.memory_bus import MemoryBus, memory_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DOWN = (
    "the fleet's bus at memory:// is unavailable: memory:// does not answer: it was taken away; "
    "until it is back, cancellations reach only this process, and the rest wait"
)


def cancel(name: str, node: str = "a") -> CancelEntry:
    return CancelEntry(node=node, target="task", name=name, at=1.0)


class Node:
    """A link, and what its handlers were given."""

    def __init__(self, name: str, bus: MemoryBus | None = None) -> None:
        self.link = Link(bus or MemoryBus("", "shop"), name)
        self.names: list[str] = []
        self.entries: list[Entry] = []
        self.states: list[tuple[bool, bool]] = []
        self.link.subscribe(CancelEntry, self.take)
        self.link.on_state(lambda: self.states.append((self.link.is_up, self.link.judges)))

    def take(self, content: CancelEntry, entry: Entry) -> None:
        self.names.append(content.name)
        self.entries.append(entry)


@contextlib.asynccontextmanager
async def started(*names: str) -> AsyncIterator[list[Node]]:
    """Nodes with these names, whose links are up."""
    nodes = [Node(name) for name in names]
    for node in nodes:
        await node.link.start(timeout=5.0)
    try:
        yield nodes
    finally:
        for node in nodes:
            await node.link.stop()


class LosesAnswers(MemoryBus):
    """A bus whose server executes a publication, and whose answer does not arrive."""

    losing = False

    async def publish(self, payload: bytes) -> str:
        entry_id = await super().publish(payload)
        if self.losing:
            raise BusUnavailableError("no answer")
        return entry_id


async def test_entry_reaches_every_node() -> None:
    """A posted entry arrives at all handlers, its own node's included, with one position."""
    async with started("a", "b") as (a, b):
        position = await a.link.post(cancel("x"))
        await asyncio.sleep(0.1)

    assert a.names == b.names == ["x"]
    assert a.entries[0].id == b.entries[0].id == position
    assert a.link.position == b.link.position == position


async def test_log_is_read_at_the_start() -> None:
    """A node that starts reads the entries of the last hour, with their age, before `start` returns."""
    async with started("a") as (a,):
        for n in range(3):
            await a.link.post(cancel(f"x{n}"))
            await asyncio.sleep(600.0)
        async with started("b") as (b,):
            assert b.names == ["x0", "x1", "x2"]
            assert [entry.age for entry in b.entries] == pytest.approx([1800.0, 1200.0, 600.0], abs=0.01)
            assert b.link.synced


async def test_published_position_counts_before_it_is_read() -> None:
    """The position of a node's own entry is its position as soon as the entry is published."""
    async with started("a") as (a,):
        seen: list[bool] = []
        posted = a.link.post(cancel("x"))
        posted.add_done_callback(lambda future: seen.append(a.link.position == future.result()))
        await posted
        await asyncio.sleep(0)

    assert seen == [True]


async def test_entries_wait_for_the_bus(caplog: pytest.LogCaptureFixture) -> None:
    """Entries posted while the bus is down are sent when it is back, in order; each change logs one line."""
    caplog.set_level(logging.INFO)
    async with started("a", "b") as (a, b):
        memory_server(namespace="shop").fail()
        await asyncio.sleep(60.0)
        futures = [a.link.post(cancel(f"x{n}")) for n in range(1000)]
        await asyncio.sleep(60.0)
        assert not any(future.done() for future in futures)
        memory_server(namespace="shop").restore()
        await asyncio.gather(*futures)
        await asyncio.sleep(3.0)

    assert b.names == a.names == [f"x{n}" for n in range(1000)]
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count(DOWN) == 2
    assert len(lines) == 4
    assert all(" is available again, after 12" in line for line in lines[2:])


async def test_cancelled_waiter_withdraws_nothing() -> None:
    """A task that is cancelled while it waits for its post has posted."""
    async with started("a", "b") as (a, b):
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)

        async def post() -> None:
            await a.link.post(cancel("x"))

        task = asyncio.ensure_future(post())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5.0)

    assert b.names == ["x"]


async def test_entry_that_need_not_arrive_fails() -> None:
    """With `must_arrive=False` a post fails while the bus is down, also one that was on its way."""
    async with started("a", "b") as (a, b):
        memory_server(namespace="shop").fail()
        on_its_way = a.link.post(cancel("x"), must_arrive=False)
        with pytest.raises(BusUnavailableError):
            await on_its_way
        with pytest.raises(BusUnavailableError, match="memory:// is not available"):
            await a.link.post(cancel("y"), must_arrive=False)
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5.0)

    assert b.names == []


async def test_lost_answer_makes_no_copy() -> None:
    """An entry whose publication was not answered arrives once, with the position it has in the log."""
    bus = LosesAnswers("", "shop")
    a = Node("a", bus)
    await a.link.start(5.0)
    async with started("b") as (b,):
        bus.losing = True
        posted = a.link.post(cancel("x"))
        await asyncio.sleep(0.5)
        bus.losing = False
        position = await posted
        await asyncio.sleep(5.0)
        await a.link.stop()

    assert [entry.id for entry in b.entries] == [position]
    assert a.names == b.names == ["x"]


async def test_copy_is_dropped() -> None:
    """A copy of an entry, as of a publication that arrives late, reaches no handler."""
    async with started("a") as (a,):
        bus = MemoryBus("", "shop")
        await bus.connect()
        for number in (1, 2, 1, 3, 2):
            await bus.publish(encode(cancel(f"x{number}", "b"), post=number))
        await bus.publish(encode(cancel("x1", "c"), post=1))
        await asyncio.sleep(0.1)

    assert a.names == ["x1", "x2", "x3", "x1"]


async def test_data_that_the_server_lost_is_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    """After a restart without its data, a node that starts later finds all, where it was and as old."""
    async with started("a", "b") as (a, b):
        positions = [await a.link.post(cancel(f"x{n}")) for n in range(5)]
        await asyncio.sleep(600.0)
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        posted = a.link.post(cancel("meanwhile"))
        memory_server(namespace="shop").restore(lose_data=True)
        await asyncio.sleep(5.0)
        async with started("c") as (c,):
            assert c.names == a.names == b.names == ["x0", "x1", "x2", "x3", "x4", "meanwhile"]
            assert [entry.id for entry in c.entries] == [*positions, await posted]
            assert c.entries[0].age == pytest.approx(605.0, abs=2.0)
        # The link recognizes an entry that was sent again by its new position.
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5.0)

    lines = [record.getMessage() for record in caplog.records if "lost data" in record.getMessage()]
    assert lines == [
        "the fleet's server at memory:// lost data; entries of the last hour that are sent again: 5"
    ]


async def test_old_entries_are_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that the log no longer keeps are not among those that a node sends again."""
    monkeypatch.setattr(outbox_module, "_RECENT", 60.0)
    async with started("a") as (a,):
        await a.link.post(cancel("old"))
        await asyncio.sleep(61.0)
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        memory_server(namespace="shop").restore(lose_data=True)
        await asyncio.sleep(5.0)
        async with started("b") as (b,):
            assert b.names == []


async def test_clock_that_went_back_moves_the_position() -> None:
    """If the server loses its data and its clock goes back, positions follow it, and nothing is lost."""
    async with started("a", "b") as (a, b):
        # A server of a later time was here before.
        a.link._inlet.resume_after = b.link._inlet.resume_after = "9999999999-0"
        a.link._inlet.published("9999999999-0")
        b.link._inlet.published("9999999999-0")
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        memory_server(namespace="shop").restore(lose_data=True)
        await asyncio.sleep(5.0)
        position = await a.link.post(cancel("x"))
        await asyncio.sleep(0.1)

    assert b.names == ["x"]
    assert a.link.position == b.link.position == position
    assert position_of(position) < position_of("9999999999-0")


async def test_nobody_judges_without_the_bus() -> None:
    """`judges` is False while the bus is down and for HOLD_OFF after it is back; each change calls back."""
    times: list[float] = []
    async with started("a") as (a,):
        assert a.link.judges
        memory_server(namespace="shop").fail()
        await asyncio.sleep(10.0)
        assert not a.link.is_up
        assert not a.link.judges
        memory_server(namespace="shop").restore()
        loop = asyncio.get_running_loop()
        a.link.on_state(lambda: times.append(loop.time()))
        await asyncio.sleep(10.0)

    assert times[1] - times[0] == pytest.approx(HOLD_OFF)
    assert a.states == [(True, True), (False, False), (True, False), (True, True), (False, False)]


async def test_young_server_is_not_judged_by() -> None:
    """If the server has just started, holders had no time to renew: a node that starts holds off too."""
    bus = MemoryBus("", "shop")
    bus.server_age = 2.0
    a = Node("a", bus)
    await a.link.start(5.0)
    assert (a.link.is_up, a.link.judges) == (True, False)
    await asyncio.sleep(HOLD_OFF)
    assert a.link.judges
    await a.link.stop()


async def test_failed_call_takes_the_link_down() -> None:
    """A call that fails ends the reading too, and while the link is down no call is made."""
    calls: list[float] = []
    loop = asyncio.get_running_loop()

    async def fail() -> None:
        calls.append(loop.time())
        raise BusUnavailableError("no answer")

    async with started("a") as (a,):
        with pytest.raises(BusUnavailableError, match="no answer"):
            await a.link.call(fail)
        assert not a.link.is_up
        with pytest.raises(BusUnavailableError, match="memory:// is not available"):
            await a.link.call(fail)
        await asyncio.sleep(1.0)
        assert a.link.is_up
        assert await a.link.call(a.link.bus.roster) == {}
    assert len(calls) == 1


async def test_time_of_the_bus_is_known_between_two_calls() -> None:
    """The link compares the clocks when it comes up; from then on, the time of the bus costs no call."""

    class AnHourAhead(MemoryBus):
        async def time(self) -> float:
            return await super().time() + 3600.0

    node = Node("a", AnHourAhead("", "shop"))
    assert node.link.bus_time() is None
    await node.link.start(timeout=5.0)
    await asyncio.sleep(10.0)
    assert node.link.bus_time() == asyncio.get_running_loop().time() + 3600.0
    await node.link.stop()


async def test_late_failure_says_nothing_about_now() -> None:
    """The error of a call that began before the last reconnect leaves the link up."""
    failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def late() -> None:
        await failing

    async with started("a") as (a,):
        call = asyncio.ensure_future(a.link.call(late))
        await asyncio.sleep(0)
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5.0)
        failing.set_exception(BusUnavailableError("no answer"))
        with pytest.raises(BusUnavailableError):
            await call
        assert a.link.is_up


async def test_dead_server_is_tried_with_growing_delays() -> None:
    """Attempts are at least 0.05 s apart and at most 2 s, so that nothing is busy and a return is noticed."""
    times: list[float] = []

    class Counting(MemoryBus):
        async def connect(self) -> None:
            times.append(asyncio.get_running_loop().time())
            await super().connect()

    memory_server(namespace="shop").fail()
    a = Node("a", Counting("", "shop"))
    await a.link.start(60.0)
    await a.link.stop(flush=0.0)

    pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert 30 < len(times) < 70
    assert 0.05 <= pauses[0] <= 0.1
    assert all(1.0 <= pause <= 2.0 for pause in pauses[5:])
    assert len({round(pause, 6) for pause in pauses}) == len(pauses)


async def test_start_returns_without_the_bus() -> None:
    """If the bus is down, `start` returns after its timeout, and the link comes up later."""
    loop = asyncio.get_running_loop()
    memory_server(namespace="shop").fail()
    a = Node("a")
    begin = loop.time()
    await a.link.start(timeout=3.0)
    assert loop.time() - begin == pytest.approx(3.0)
    assert not a.link.synced
    posted = a.link.post(cancel("x"))

    memory_server(namespace="shop").restore()
    await posted
    assert a.link.synced
    await a.link.stop()


async def test_refusal_fails_the_start(caplog: pytest.LogCaptureFixture) -> None:
    """A server that refuses this process fails the start at once; later, it is only logged."""

    class Refusing(MemoryBus):
        refuses = True

        async def connect(self) -> None:
            if self.refuses:
                raise BusRefusedError("wrong password")
            await super().connect()

    bus = Refusing("", "shop")
    with pytest.raises(BusRefusedError, match="wrong password"):
        await Link(bus, "a").start(5.0)

    bus.refuses = False
    a = Node("a", bus)
    await a.link.start(5.0)
    caplog.clear()
    memory_server(namespace="shop").fail()
    await asyncio.sleep(5.0)
    bus.refuses = True
    await asyncio.sleep(5.0)
    bus.refuses = False
    memory_server(namespace="shop").restore()
    await asyncio.sleep(5.0)
    assert a.link.is_up
    await a.link.stop()

    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "memory:// does not answer",
        "wrong password; until it is back, cancellations reach only this process, and the rest wait",
    ]


async def test_cancelled_start_leaves_nothing() -> None:
    """A start that is cancelled ends the link."""
    memory_server(namespace="shop").fail()
    link = Link(MemoryBus("", "shop"), "a")
    task = asyncio.ensure_future(link.start(60.0))
    await asyncio.sleep(1.0)
    task.cancel()
    await asyncio.wait([task])

    assert task.cancelled()


async def test_stop_sends_what_waits() -> None:
    """What was posted just before the stop is sent."""
    async with started("b") as (b,):
        async with started("a") as (a,):
            for n in range(500):
                a.link.post(cancel(f"x{n}"))
        await asyncio.sleep(0.1)

    assert b.names == [f"x{n}" for n in range(500)]


async def test_stop_without_the_bus_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """A stop waits for the bus for its `flush`, says what is lost, and fails the posts."""
    loop = asyncio.get_running_loop()
    a = Node("a")
    await a.link.start(5.0)
    memory_server(namespace="shop").fail()
    posted = a.link.post(cancel("x"))
    begin = loop.time()
    await a.link.stop(flush=2.0)

    assert loop.time() - begin == pytest.approx(2.0)
    with pytest.raises(BusUnavailableError, match="the fleet has stopped"):
        await posted
    assert caplog.records[-1].getMessage() == (
        "the fleet stopped; entries that were not sent to the bus at memory://: 1"
    )


async def test_outbox_is_bounded(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full outbox refuses further entries, and says so once."""
    monkeypatch.setattr(outbox_module, "OUTBOX_LIMIT", 3)
    async with started("a") as (a,):
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        posts = [a.link.post(cancel(f"x{n}")) for n in range(5)]
        for post in posts[3:]:
            with pytest.raises(BusUnavailableError, match="3 entries wait for memory://"):
                await post
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5.0)

    assert a.names == ["x0", "x1", "x2"]
    assert [record.getMessage() for record in caplog.records if "full" in record.getMessage()] == [
        "the fleet's outbox is full: it refuses further entries until the bus at memory:// is back"
    ]


async def test_letters_reach_one_node() -> None:
    """What is posted to a node's inbox reaches that node only; of one turn, in one round trip."""
    sends: list[int] = []

    class Counting(MemoryBus):
        async def send(self, inboxes: Any, **finished: Any) -> None:
            sends.append(sum(map(len, inboxes.values())))
            await super().send(inboxes, **finished)

    b, c = Node("b"), Node("c")
    a = Node("a", Counting("", "shop"))
    for node in (a, b, c):
        await node.link.start(5.0)
    ended: list[tuple[str, str]] = []
    b.link.subscribe(EndedEntry, lambda content, entry: ended.append(("b", content.task_id)))
    c.link.subscribe(EndedEntry, lambda content, entry: ended.append(("c", content.task_id)))
    for n in range(3):
        a.link.post_to("b", EndedEntry(node="a", task_id=f"m{n}", outcome="success"))
    a.link.post_to("c", EndedEntry(node="a", task_id="m3", outcome="success"))
    await asyncio.sleep(0.1)
    for node in (a, b, c):
        await node.link.stop()

    assert sorted(ended) == [("b", "m0"), ("b", "m1"), ("b", "m2"), ("c", "m3")]
    assert sends == [4]


async def test_letters_wait_only_if_they_must_arrive() -> None:
    """While the bus is down, a letter is dropped, unless it must arrive."""
    async with started("a", "b") as (a, b):
        ended: list[str] = []
        b.link.subscribe(EndedEntry, lambda content, entry: ended.append(content.task_id))
        a.link.post_to("b", EndedEntry(node="a", task_id="sent", outcome="success"), must_arrive=True)
        a.link.post_to("b", EndedEntry(node="a", task_id="lost", outcome="success"))
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1.0)
        a.link.post_to("b", EndedEntry(node="a", task_id="kept", outcome="success"), must_arrive=True)
        a.link.post_to("b", EndedEntry(node="a", task_id="dropped", outcome="success"))
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5.0)

    assert ended == ["sent", "kept"]


async def test_large_letters_take_turns() -> None:
    """The answers of many nodes come together: each is opened in a turn of its own, small ones at once."""
    async with started("a", "b") as (a, b):
        taken: list[int] = []
        turns: list[int] = []
        b.link.subscribe(AnswerEntry, lambda content, _: taken.append(content.part))
        for part in range(6):
            data = {"text": "x" * (30_000 if part < 5 else 10)}
            a.link.post_to("b", AnswerEntry(node="a", request="q", part=part, last=part == 5, data=data))
        while len(taken) < 6:
            turns.append(len(taken))
            await asyncio.sleep(0)
        # The last one is small.
        assert taken == [5, 0, 1, 2, 3, 4]
        assert max(after - before for before, after in itertools.pairwise(turns)) <= 2


async def test_bad_entries_are_skipped_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Malformed, oversized, and later entries are logged once per sender and kind, and reading goes on."""
    async with started("a") as (a,):
        bus = MemoryBus("", "shop")
        await bus.connect()
        later = {"v": 2, "kind": "cancel", "node": "new"}
        for _ in range(3):
            await bus.publish(b"\x80\x04not json")
            await bus.publish(b"x" * 70_000)
            await bus.publish(json.dumps(later).encode())
            await bus.publish(json.dumps(later | {"node": "newer"}).encode())
            await bus.publish(json.dumps({"v": 1, "kind": "dance", "node": "new"}).encode())
        await a.link.post(cancel("x"))
        await asyncio.sleep(0.1)

    assert a.names == ["x"]
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped a fleet entry of kind {which}; further ones are not logged"
        for which in (
            "'' from '': it is not JSON",
            "'cancel' from 'new': its version is 2, and this process reads version 1",
            "'cancel' from 'newer': its version is 2, and this process reads version 1",
            "'dance' from 'new': its kind is unknown",
        )
    ]


async def test_handler_that_raises_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """The error of a handler is logged, the other handlers run, and reading goes on."""

    def broken(content: FleetEntry, entry: Entry) -> None:
        raise ValueError("boom")

    def broken_callback() -> None:
        raise ValueError("boom")

    a = Node("a")
    a.link.subscribe(InspectEntry, broken)
    a.link._inlet._handlers[CancelEntry].insert(0, broken)
    a.link.on_state(broken_callback)
    await a.link.start(5.0)
    await a.link.post(cancel("x"))
    await a.link.post(cancel("y"))
    await asyncio.sleep(0.1)
    assert a.link.is_up
    await a.link.stop()

    assert a.names == ["x", "y"]
    assert [record.getMessage().partition("raised")[2] for record in caplog.records] == [
        " after the state of the fleet's bus changed",
        " for a 'cancel' entry from a",
        " for a 'cancel' entry from a",
        " after the state of the fleet's bus changed",
    ]


async def test_bug_in_the_bus_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected error of a bus is logged with its traceback, and the link comes back."""

    class Broken(MemoryBus):
        broken = 0

        async def publish(self, payload: bytes) -> str:
            if self.broken:
                self.broken -= 1
                raise KeyError("publish")
            return await super().publish(payload)

        async def connect(self) -> None:
            if self.broken:
                self.broken -= 1
                raise KeyError("connect")
            await super().connect()

    bus = Broken("", "shop")
    bus.broken = 1
    a = Node("a", bus)
    await a.link.start(5.0)
    assert a.link.is_up
    bus.broken = 1
    with pytest.raises(BusUnavailableError, match="sending to memory:// raised"):
        await a.link.post(cancel("x"))
    await a.link.post(cancel("y"))
    await asyncio.sleep(0.1)
    await a.link.stop()

    assert a.names == ["y"]
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        "reading the fleet's bus raised; retrying",
        "sending to the fleet's bus raised; the waiting entries are dropped",
    ]


async def test_fleets_are_apart() -> None:
    """Another namespace, or another name in the URL, is another fleet."""
    nodes = [Node(str(n), MemoryBus(*names)) for n, names in enumerate([("", "a"), ("", "b"), ("x", "a")])]
    for node in nodes:
        await node.link.start(5.0)
    await nodes[0].link.post(cancel("x"))
    await asyncio.sleep(0.1)
    for node in nodes:
        await node.link.stop()

    assert [node.names for node in nodes] == [["x"], [], []]


async def test_idle_link_has_no_timer() -> None:
    """A link that is up and has nothing to do waits without a timer: an hour costs nothing."""
    async with started("a"):
        loop: Any = asyncio.get_running_loop()
        await asyncio.sleep(10.0)
        assert [handle for handle in loop._scheduled if not handle.cancelled()] == []
    assert math.isinf(MemoryBus.server_age)
    assert link_module.HOLD_OFF < KEPT


async def test_end_of_a_claim_goes_with_the_letters() -> None:
    """Ends of executions and letters share a call, and who waits for an end is woken after it."""
    calls: list[tuple[int, int]] = []

    class Slow(MemoryBus):
        async def send(self, inboxes: Any, **options: Any) -> None:
            calls.append((len(inboxes), len(options["finished"])))
            await asyncio.sleep(1.0)
            await super().send(inboxes, **options)

    node = Node("a", Slow("", "shop"))
    await node.link.start(timeout=5.0)
    await node.link.bus.claim("t", "a", "d")
    node.link.post_to("b", EndedEntry(node="a", task_id="t", outcome="success"))
    finishing = node.link.finish("t", "d")
    assert finishing is not None
    await asyncio.sleep(0.5)
    assert not finishing.done()
    await node.link.flush()
    assert finishing.done()
    assert calls == [(1, 1)]
    assert await node.link.bus.claim("t", "a", "d") is Claim.DONE
    await node.link.stop()


async def test_end_of_a_claim_waits_for_the_bus_and_nobody_for_it() -> None:
    """Nobody waits for a server that is gone; when it is back, the messages are marked as executed."""
    async with started("a") as (a,):
        server = memory_server(namespace="shop")
        server.fail()
        finishing = a.link.finish("t", "d")
        assert finishing is not None
        await asyncio.wait_for(finishing, 5.0)
        assert not a.link.is_up
        assert a.link.finish("u", "d") is None
        server.restore()
        await asyncio.sleep(HOLD_OFF)
        assert [server.claim(key, "b", "d") for key in ("t", "u")] == [Claim.DONE, Claim.DONE]


async def test_end_of_a_claim_whose_sending_fails_is_sent_again() -> None:
    """Without its mark, a copy of the message would run again."""

    class FailsOnce(MemoryBus):
        failures = 1

        async def send(self, inboxes: Any, **options: Any) -> None:
            if self.failures:
                self.failures = 0
                raise BusUnavailableError("gone")
            await super().send(inboxes, **options)

    node = Node("a", FailsOnce("", "shop"))
    await node.link.start(timeout=5.0)
    finishing = node.link.finish("t", "d")
    assert finishing is not None
    await asyncio.wait_for(finishing, 5.0)
    await asyncio.sleep(HOLD_OFF)
    assert await node.link.bus.claim("t", "b", "d") is Claim.DONE
    await node.link.stop()
