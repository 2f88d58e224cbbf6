"""The sweeper: when its ticks come, and how many connections start to be watched in one turn of the loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import pytest

from otel_tasks._asgi.sweeper import Sweeper

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 0.025


class FakeLoop:
    """A loop whose callbacks the test calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.soon: list[Callable[[], object]] = []
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], object], *, context: object) -> None:
        self.soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], object], *, context: object) -> Any:
        when = self.now + delay
        self.timers.append((when, callback))
        return SimpleNamespace(when=lambda: when)

    def tick(self, late: float = 0.0) -> None:
        """Run the only timer, ``late`` seconds after its time."""
        ((when, callback),) = self.timers
        self.timers.clear()
        self.now = when + late
        callback()

    def turn(self) -> None:
        """Run a turn."""
        callbacks, self.soon = self.soon, []
        for callback in callbacks:
            callback()


class FakeConnection:
    """A connection that has no time limit."""

    def __init__(self) -> None:
        self.closed = False
        self.watches = 0

    def watch(self) -> None:
        self.watches += 1

    def time_limit(self) -> float | None:
        return None

    def on_time_limit(self, seconds: float) -> None:
        raise AssertionError("it has none")


def make(count: int) -> tuple[FakeLoop, Sweeper, list[FakeConnection]]:
    """A loop, its sweeper, and connections that have lived through an interval."""
    loop = FakeLoop()
    sweeper = Sweeper(cast("Any", loop), INTERVAL, 1)
    connections = [FakeConnection() for _ in range(count)]
    for connection in connections:
        sweeper.add(ref(connection))
    loop.tick()
    return loop, sweeper, connections


def test_few_connections_start_to_be_watched_in_one_turn() -> None:
    """A client that leaves waits behind a few new watchers, not behind all that one tick starts."""
    loop, sweeper, connections = make(20)
    loop.tick()
    watched = [len(sweeper.watched)]
    while loop.soon:
        loop.turn()
        watched.append(len(sweeper.watched))
    assert watched == [8, 16, 20]
    assert {connection.watches for connection in connections} == {1}


def test_connections_that_are_about_to_be_watched_are_open() -> None:
    """A server that stops between two turns cuts them short, too; those that end are not watched any more."""
    loop, sweeper, connections = make(20)
    loop.tick()
    assert len(sweeper.open_requests()) == 20
    connections[-1].closed = True
    assert len(sweeper.open_requests()) == 19
    while loop.soon:
        loop.turn()
    assert connections[-1].watches == 0
    assert set(sweeper.watched) == set(connections[:-1])
    assert len(sweeper.open_requests()) == 19


def test_next_tick_waits_for_its_turns() -> None:
    """Connections that are due while others start to be watched follow them, in turns of their own."""
    loop, sweeper, connections = make(20)
    more = [FakeConnection() for _ in range(2)]
    for connection in more:
        sweeper.add(ref(connection))
    loop.tick()
    assert len(loop.soon) == 1
    loop.tick()
    assert len(loop.soon) == 1
    while loop.soon:
        loop.turn()
    assert {connection.watches for connection in connections + more} == {1}


@pytest.mark.parametrize(("late", "wait"), [(0.0, 0.025), (0.010, 0.015), (0.040, 0.0125)])
def test_late_tick_does_not_delay_the_next_one(late: float, wait: float) -> None:
    """After a stall of the loop, the next tick comes sooner, by at most half an interval."""
    loop, connection = FakeLoop(), FakeConnection()
    Sweeper(cast("Any", loop), INTERVAL, 1).add(ref(connection))
    loop.tick(late)
    assert loop.timers[0][0] == pytest.approx(loop.now + wait)
