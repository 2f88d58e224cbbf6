"""Nodes: what a process says of itself, and what others make of it, whatever it is."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import pytest

from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet, Node
from otel_tasks.fleet.inspection import Inspector
from otel_tasks.fleet.memory_bus import memory_server
from otel_tasks.fleet.nodes import new_name, read_description


def test_a_name_has_host_process_and_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of one process differ; a long host name is cut."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 100)
    first, second = new_name(), new_name()
    assert first != second
    host, pid, chance = first.split("/")
    assert (host, pid, len(chance)) == ("h" * 40, str(os.getpid()), 6)


@pytest.mark.parametrize(
    "description",
    [
        None,
        [],
        {"host": 7, "pid": "x", "version": None, "started": "now", "live_tasks": -1},
        {"pid": float("inf"), "started": 1e300, "live_tasks": True},
    ],
)
def test_a_node_may_say_anything_of_itself(description: Any) -> None:
    """What is missing or malformed has a neutral value."""
    node = Node.read("api-7f/812/9c01ab", description, 1.23456, silent=True)
    assert node.to_dict() == {
        "node": "api-7f/812/9c01ab",
        "host": "api-7f",
        "pid": 0,
        "version": "",
        "manager": "",
        "started": "1970-01-01T00:00:00+00:00",
        "live_tasks": 0,
        "last_seen": 1.235,
        "silent": True,
    }


@pytest.mark.parametrize("description", [b"", b"{", b"[" * 100_000, b'"' + b"x" * 5000 + b'"'])
def test_a_description_may_be_anything(description: bytes) -> None:
    """What is not JSON, or too long, is none."""
    assert read_description(description) is None
    assert read_description(b'{"pid": 7}') == {"pid": 7}


async def test_the_description_is_small() -> None:
    """It is written into the roster every ten seconds."""
    async with Fleet("memory://", namespace="shop", manager=TaskManager("m" * 200)) as fleet:
        roster = memory_server(namespace="shop").roster()
        ((description, age),) = roster.values()
        assert (len(description) < 600, age) == (True, 0.0)
        assert json.loads(description)["pid"] == os.getpid()
        assert list(roster) == [fleet.node]


async def test_rows_of_other_nodes_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no row, no tree, and no number is left out."""
    here = Fleet("memory://", namespace="shop", manager=TaskManager("here"))
    there = Fleet("memory://", namespace="shop", manager=TaskManager("there"))
    async with here, there:
        shown = Inspector._shown

        def answer(self: Inspector, entry: Any) -> Any:
            if self is there._started().inspector:
                return {"rows": [7, {"name": "x"}, None], "more": "many", "tree": [], "drawing": 7}
            return (yield from shown(self, entry))

        monkeypatch.setattr(Inspector, "_shown", answer)
        rows = await here.tasks()
        assert (rows, rows.more) == ([{"node": there.node, "name": "x"}], 0)
        assert list((await here.tree()).nodes) == [here.node]
        assert [node.pid for node in await here.nodes()].count(0) == 1


async def test_a_bus_that_does_not_answer_delays_a_stop_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry in the roster expires then."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    async with fleet:
        loop = asyncio.get_running_loop()

        async def hang(_: str) -> None:
            await asyncio.sleep(3600)

        monkeypatch.setattr(fleet.link.bus, "leave", hang)
        began = loop.time()
    assert loop.time() - began == 2.0
