"""The live view of a fleet on memory://: the tasks of all nodes on one page, silent nodes, and cancelling."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from otel_tasks import CancelKind, TaskManager
from otel_tasks._core.slices import COUNTS_PER_SLICE, TASKS_PER_SLICE
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.entries import InspectEntry
from otel_tasks.live import live_view
from otel_tasks.live.feed import _changes
from otel_tasks.live.marks import is_named, mark_of
from otel_tasks.live.other import Other
from otel_tasks.live.served import Served
from tests.helpers import fail, give, ignore_cancels, now, rest, settle
from tests.live_client import Client, client_of, leave, of_kind
from tests.test_fleet import joined

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from otel_tasks.live.elsewhere import RemoteTask


@contextlib.asynccontextmanager
async def fleet_of(count: int = 2) -> AsyncGenerator[list[Fleet]]:
    """So many nodes; at the end, nobody looks at them any more."""
    async with joined(count) as fleets:
        yield fleets
        await leave()


def view_of(fleet: Fleet, **options: Any) -> Client:
    """A client of the view of one node."""
    return client_of(None, fleet=fleet, **options)


async def seen(client: Client, query: str = "") -> dict[str, Any]:
    """The overview after two ticks, with what else the query wants."""
    await client.get(f"/v1/events?poll=1{query}")
    await asyncio.sleep(2.1)
    answer = await client.get(f"/v1/events?poll=1{query}")
    return {event["event"]: event["data"] for event in answer["events"]}


async def snapshot(client: Client) -> dict[str, Any]:
    """The overview after two ticks."""
    found: dict[str, Any] = (await seen(client))["snapshot"]
    return found


async def remote(client: Client, name: str) -> dict[str, Any]:
    """The row of the only task with this name."""
    (row,) = (await client.get(f"/v1/tasks?q={name}"))["rows"]
    found: dict[str, Any] = row
    return found


def short(fleet: Fleet) -> str:
    """A node as people call it."""
    return fleet.node.rpartition("/")[0]


def silence(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a node answer no view."""
    monkeypatch.setattr(fleet.views, "_answer", lambda entry: asyncio.sleep(0))


# -- what is shown ------------------------------------------------------------------------------------


async def test_tasks_of_all_nodes_are_on_one_screen() -> None:
    """Each node has a root of its own, each row names its node, and the counters are sums."""
    async with fleet_of(3) as fleets:
        for fleet in fleets:
            fleet.manager.create_task(rest(), name="import", group="jobs")
        await settle()
        shown = await snapshot(view_of(fleets[0]))

        nodes = {fleet.node for fleet in fleets}
        assert shown["stats"]["live"] == 3
        assert shown["samples"][-1][1] == 3
        roots = [row for row in shown["groups"] if row["parent"] is None]
        assert {row["node"] for row in roots} == nodes
        assert {row["key"] for row in roots} == {row["key"] for row in shown["nodes"]}
        assert {row["node"]: row["silent_since"] for row in shown["nodes"]} == dict.fromkeys(nodes)
        assert len({row["key"] for row in shown["groups"]}) == 6
        tasks = [row["task"] for row in shown["classes"]]
        assert {(task["node"], task["name"]) for task in tasks} == {(node, "import") for node in nodes}
        keys = {row["key"] for row in shown["groups"]}
        assert all(row["group"] in keys for row in shown["classes"])
        assert {row["parent"] for row in shown["groups"]} <= {None, *keys}


async def test_view_without_a_fleet_names_no_node() -> None:
    """Nothing changes for one process."""
    manager = TaskManager("alone", grace=0.0)
    async with manager:
        manager.create_task(rest(), name="import", group="jobs")
        await settle()
        client = client_of(manager)
        shown = await snapshot(client)
        rows = (await client.get("/v1/tasks"))["rows"]
        assert not {"node", "nodes"} & shown.keys()
        assert not [row for row in (*shown["groups"], *shown["classes"], *rows) if "node" in row]
        assert "nodes" not in shown["more"]
        for path in ("/v1/tasks?node=a", "/v1/tasks/import?node=a"):
            answer = await client.get(path, status=400)
            assert "this view shows one process" in answer["error"]["message"]
        await leave()


async def test_times_of_another_node_are_on_the_clock_of_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of two processes have different zeros; ages are the same in all views."""
    async with fleet_of(2) as (here, there):
        there.manager.create_task(rest(), name="import")
        await settle()
        clock = there.manager._ledger.home.clock
        monkeypatch.setattr(here.manager._ledger.home, "clock", lambda: clock() + 5000.0)
        client = view_of(here)
        await asyncio.sleep(7.0)
        shown = await snapshot(client)
        (row,) = [row["task"] for row in shown["classes"]]
        assert shown["now"] - row["created"] == pytest.approx(9.0, abs=1.5)
        found = await remote(client, "import")
        assert found["created"] == pytest.approx(row["created"], abs=0.01)


async def test_changes_of_another_node_come_as_deltas() -> None:
    """A task that starts there appears, and one that ends there moves to the ended ones, once."""
    async with fleet_of(2) as (here, there):
        client = view_of(here)
        async with client.stream() as stream:
            await asyncio.sleep(1.5)
            task = there.manager.create_task(give(1), name="short", group="jobs")
            long = there.manager.create_task(rest(), name="import", group="jobs")
            await asyncio.sleep(3.0)
            long.cancel("enough")
            await asyncio.sleep(3.0)
        deltas = of_kind(stream, "delta")
        ended = [row for delta in deltas for row in delta["ended"]]
        assert sorted(row["name"] for row in ended) == ["import", "short"]
        assert {row["node"] for row in ended} == {there.node}
        assert task.done()
        added = [row for delta in deltas for row in delta["set"]["classes"]]
        gone = [key for delta in deltas for key in delta["gone"]["classes"]]
        assert {row["key"] for row in added} == set(gone)
        assert deltas[-1]["stats"]["live"] == 0
        # Completed, failed, cancelled.
        assert deltas[-1]["sample"][4:] == [1, 0, 1]


async def test_ends_from_before_the_first_look_are_no_burst() -> None:
    """Samples count up from what the view's own process had; a node that joins adds nothing at once."""
    async with fleet_of(2) as (here, there):
        for _ in range(40):
            await there.manager.create_task(give(1))
        shown = await snapshot(view_of(here))
        assert shown["stats"]["completed"] == 40
        assert [sample[4] for sample in shown["samples"]] == [0] * len(shown["samples"])


async def test_expanded_rows_and_panels_of_another_node_come_with_the_stream() -> None:
    """Their keys and ids lead to the node."""
    async with fleet_of(2) as (here, there):
        for number in range(3):
            there.manager.create_task(rest(), name=f"load-{number}", group="jobs")
        await asyncio.sleep(1.0)
        here.manager.create_task(rest(), name="mine")
        await settle()
        client = view_of(here)
        (row,) = [row for row in (await snapshot(client))["classes"] if row["node"] == there.node]
        assert row["key"].startswith(mark_of(there.node))
        uid = (await client.get(f"/v1/tasks?key={row['key']}"))["rows"][0]["id"]

        async with client.stream(f"?expand={row['key']}&task={quote(uid)}&expand=oldest") as stream:
            await asyncio.sleep(2.5)
        rows = {event["key"]: event for event in of_kind(stream, "rows")}
        assert [task["name"] for task in rows[row["key"]]["set"]] == ["load-0", "load-1", "load-2"]
        assert rows[row["key"]]["total"] == 3
        assert [task["name"] for task in rows["oldest"]["set"]] == ["load-0", "load-1", "load-2", "mine"]
        assert rows["oldest"]["total"] == 4
        panel = of_kind(stream, "task")[-1]
        assert (panel["state"], panel["task"]["id"], panel["task"]["node"]) == ("live", uid, there.node)


async def test_search_asks_all_nodes_or_those_that_are_named() -> None:
    """Rows are merged in their order, and a host or a process chooses nodes."""
    async with fleet_of(2) as (here, there):
        for number, fleet in enumerate((here, there) * 3):
            fleet.manager.create_task(rest(), name=f"load-{number}")
            await asyncio.sleep(0.01)
        there.manager.create_task(rest(), name="other")
        await there.manager.create_task(give(1), name="load-ended")
        await settle()
        client = view_of(here)

        found = await client.get("/v1/tasks?q=load")
        assert [row["name"] for row in found["rows"]] == [f"load-{number}" for number in range(6)]
        assert (found["total"], found["silent"], found["partial"]) == (6, [], False)
        page = await client.get("/v1/tasks?q=load&limit=4&sort=-age")
        rest_of_it = await client.get(f"/v1/tasks?q=load&limit=4&sort=-age&after={page['next']}")
        assert [row["name"] for row in (*page["rows"], *rest_of_it["rows"])] == [
            f"load-{number}" for number in (5, 4, 3, 2, 1, 0)
        ]
        mine = await client.get(f"/v1/tasks?q=load&node={quote(here.node)}")
        assert {row["node"] for row in mine["rows"]} == {here.node}
        theirs = await client.get(f"/v1/tasks?q=load&node={quote(there.node)}&sort=name")
        assert [row["name"] for row in theirs["rows"]] == ["load-1", "load-3", "load-5"]
        assert (await client.get(f"/v1/tasks?node={quote(here.node.split('/')[0])}"))["total"] == 7
        assert (await client.get("/v1/tasks?node=unknown"))["rows"] == []
        assert (await client.get("/v1/tasks?state=ended&q=load"))["rows"][0]["node"] == there.node
        await leave()


async def test_a_task_of_another_node_is_found_by_its_name_and_its_id() -> None:
    """As in one process: a person types what the page shows, while it lives and afterwards."""
    async with fleet_of(3) as (here, there, _):
        there.manager.create_task(rest(), name="import", group="jobs")
        async with there.manager.group("pages") as pages:
            page = pages.create_task(rest(), name="render")
            await settle()
            client = view_of(here, actions={"cancel"})
            found = await client.get("/v1/tasks/import")
            assert (found["task"]["node"], found["can"]) == (there.node, ["cancel"])
            assert found["task"]["id"] == (await remote(client, "import"))["id"]
            for name in ("render", page.id):
                assert (await client.get(f"/v1/tasks/{quote(name)}"))["task"]["name"] == "render"
            page.cancel()
        ended = await client.get(f"/v1/tasks/{quote(page.id)}")
        assert (ended["state"], ended["task"]["status"], ended["can"]) == ("ended", "cancelled", [])
        await client.get("/v1/tasks/unknown", status=404)


async def test_a_name_that_several_nodes_have_is_refused() -> None:
    """The view chooses none of them: it names the id of one."""
    async with fleet_of(3) as (here, there, other):
        for fleet in (there, other):
            fleet.manager.create_task(rest(), name="import")
        await settle()
        client = view_of(here)
        message = (await client.get("/v1/tasks/import", status=404))["error"]["message"]
        nodes = ", ".join(sorted((short(there), short(other)), key=message.index))
        assert message.startswith(
            f"2 live tasks have the name 'import', on {nodes}: choose a node, or use the id of one, such as '"
        )
        uid = message.rpartition(" ")[2].strip("'")
        assert (await client.get(f"/v1/tasks/{uid}"))["task"]["name"] == "import"

        mine = here.manager.create_task(rest(), name="import")
        await settle()
        message = (await client.get("/v1/tasks/import", status=404))["error"]["message"]
        assert message.startswith("3 live tasks")
        assert (await client.get(f"/v1/tasks/{mine.uid}"))["task"]["node"] == here.node


async def test_a_node_chooses_among_tasks_of_one_name() -> None:
    """Only that node is searched, whether it is another one or the one that answers."""
    async with fleet_of(3) as (here, there, other):
        tasks = {fleet.node: fleet.manager.create_task(rest(), name="import") for fleet in (here, there)}
        await settle()
        client = view_of(here)
        for node in tasks:
            assert (await client.get(f"/v1/tasks/import?node={quote(node)}"))["task"]["node"] == node
        # All nodes of this test are processes of one host.
        answer = await client.get(f"/v1/tasks/import?node={quote(short(here))}", status=404)
        assert answer["error"]["message"].startswith("2 live tasks")
        await client.get(f"/v1/tasks/import?node={quote(other.node)}", status=404)

        uid = (await client.get(f"/v1/tasks/import?node={quote(there.node)}"))["task"]["id"]
        assert (await client.get(f"/v1/tasks/{uid}?node={quote(there.node)}"))["state"] == "live"
        answer = await client.get(f"/v1/tasks/{uid}?node={quote(other.node)}", status=404)
        assert f"is on node {there.node}, not on {other.node!r}" in answer["error"]["message"]
        mine = tasks[here.node].uid
        await client.get(f"/v1/tasks/{mine}?node={quote(there.node)}", status=404)
        answer = await client.get("/v1/tasks/import?node=api", status=404)
        assert answer["error"]["message"].startswith(
            f"no node is called 'api': the nodes are {short(here)}, "
        )


async def test_an_ended_task_of_this_node_is_not_that_of_another() -> None:
    """The records of a node that was not chosen are not searched."""
    async with fleet_of(2) as (here, there):
        for fleet in (here, there):
            await fleet.manager.create_task(give(1), name="import")
        client = view_of(here)
        assert (await client.get("/v1/tasks/import"))["task"]["node"] == here.node
        found = await client.get(f"/v1/tasks/import?node={quote(there.node)}")
        assert (found["state"], found["task"]["node"]) == ("ended", there.node)


async def test_an_answer_names_the_nodes_that_may_have_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent one, and those beyond the number of nodes that are asked; an id is certain without them."""
    async with fleet_of(3) as (here, there, _):
        here.manager.create_task(rest(), name="import")
        await here.manager.create_task(give(1), name="report")
        await settle()
        client = view_of(here)
        found = await client.get("/v1/tasks/import")
        assert not {"silent", "not_asked"} & found.keys()
        silence(there, monkeypatch)
        for name in ("import", "report"):
            assert (await client.get(f"/v1/tasks/{name}"))["silent"] == [there.node]
        for question in (f"import?node={quote(here.node)}", found["task"]["id"]):
            assert "silent" not in await client.get(f"/v1/tasks/{question}")
        monkeypatch.setattr("otel_tasks.live.others.MAX_NODES", 1)
        await asyncio.sleep(1.1)
        assert (await client.get("/v1/tasks/import"))["not_asked"] == 1


async def test_several_tasks_of_one_other_node_with_one_name_are_refused() -> None:
    """In scoped groups, names need not be unique."""
    async with (
        fleet_of(2) as (here, there),
        there.manager.group("a") as one,
        there.manager.group("b") as two,
    ):
        tasks = [group.create_task(rest(), name="render") for group in (one, two)]
        await settle()
        answer = await view_of(here).get("/v1/tasks/render", status=404)
        assert answer["error"]["message"].startswith(
            f"2 live tasks have the name 'render' on {short(there)}: use the id of one, such as '"
        )
        for task in tasks:
            task.cancel()


async def test_a_task_that_a_silent_node_may_have_is_not_called_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody knows: the answer names the node, and is to be tried again."""
    async with fleet_of(3) as (here, there, _):
        silence(there, monkeypatch)
        client = view_of(here)
        answer = await client.get("/v1/tasks/import", status=503)
        assert (answer["error"]["code"], there.node in answer["error"]["message"]) == ("silent", True)

        # Nobody is asked for a task of this process that is named by its uid.
        mine = here.manager.create_task(rest(), name="import")
        uid, began = mine.uid, now()
        assert (await client.get(f"/v1/tasks/{uid}"))["state"] == "live"
        mine.cancel()
        await settle()
        assert (await client.get(f"/v1/tasks/{uid}"))["state"] == "ended"
        assert now() - began < 0.5


@pytest.mark.parametrize(
    ("name", "result"),
    [("api-1", True), ("api-1/7", True), ("api-1/7/ab", True), ("api", False), ("7", False)],
)
def test_nodes_are_named_by_host_or_process(name: str, result: bool) -> None:
    """Whole parts count: ``api`` is not the host ``api-1``."""
    assert is_named("api-1/7/ab", name) is result


async def test_secrets_stay_in_their_process() -> None:
    """Neither metadata nor the texts of exceptions come from another node, whatever this view shows."""
    async with fleet_of(2) as (here, there):
        there.manager.create_task(rest(), name="import", metadata={"order": "4711"})
        there.manager.create_task(fail(ValueError("secret")), name="broken")
        await settle()
        client = view_of(here, errors=True, metadata={"order"}, trace_url="http://traces/{trace_id}")
        shown = await snapshot(client)
        assert "secret" not in str(shown)
        uid = (await remote(client, "import"))["id"]
        details = await client.get(f"/v1/tasks/{quote(uid)}")
        assert details["metadata"] == {}
        assert "4711" not in str(details)


async def test_answers_of_many_rows_are_read_in_slices() -> None:
    """Each step reads some rows, and all take effect together: a tick never shows half of them."""
    tasks = 300
    async with fleet_of(2) as (here, there):
        for number in range(tasks):
            there.manager.create_task(rest(), name=f"job-{number}", group=f"g{number}")
        await settle()
        answer = json.loads(
            await Served(there.manager).answer(
                {"what": "events", "params": [["expand", f"oldest:{tasks}"]]}, here.node
            )
        )
        other = Other(next(iter((await here.views.others() or {}).values())), "5d1c90aa", now())
        slices, steps = other.reading(answer, now()), 0
        while True:
            try:
                next(slices)
            except StopIteration as end:
                reading = end.value
                break
            steps += 1
            assert (other.after, other.rows, other.lists["groups"]) == (None, {}, {})
        # Groups, classes, and the tasks of the expanded row.
        assert steps >= (200 + tasks) / COUNTS_PER_SLICE
        other.apply(reading, ())
        (rows,) = other.rows.values()
        # With the row of the other groups.
        assert (len(other.lists["groups"]), len(rows)) == (201, tasks)
        assert other.after is not None


async def test_changes_of_many_rows_are_found_in_slices() -> None:
    """The rows of a hundred nodes are compared some at a time."""
    many = {f"g{number}": "{}" for number in range(2000)}
    lists = {"groups": many, "classes": {}, "cancelling": {}}
    empty: Any = {"groups": {"gone": "{}"}, "classes": {}, "cancelling": {}}
    steps, slices = 0, _changes(empty, lists)
    with pytest.raises(StopIteration) as end:
        while True:
            next(slices)
            steps += 1
    assert steps == 2000 / TASKS_PER_SLICE
    assert (len(end.value.value.rows["groups"]), end.value.value.gone["groups"]) == (2000, ["gone"])


# -- silent nodes -------------------------------------------------------------------------------------


async def test_silent_node_is_marked_and_keeps_its_rows_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is marked after 3 seconds; after 30, only its name is left, and it is back when it answers."""
    async with fleet_of(2) as (here, there):
        there.manager.create_task(rest(), name="import")
        await settle()
        client = view_of(here)
        uid = (await remote(client, "import"))["id"]
        async with client.stream() as stream:
            await asyncio.sleep(2.0)
            with monkeypatch.context() as patch:
                silence(there, patch)
                await asyncio.sleep(6.0)
                shown = await client.get("/v1/snapshot")
                node = {row["node"]: row for row in shown["nodes"]}[there.node]
                assert shown["now"] - node["silent_since"] == pytest.approx(6.0, abs=1.5)
                assert len(shown["classes"]) == 1
                answer = await client.get(f"/v1/tasks/{quote(uid)}", status=503)
                assert answer["error"]["code"] == "silent"
                assert (await client.get("/v1/tasks"))["silent"] == [there.node]
                await asyncio.sleep(10.0)
            assert of_kind(stream, "delta")[-1]["stats"]["live"] == 1
        async with client.stream() as stream:
            with monkeypatch.context() as patch:
                silence(there, patch)
                await asyncio.sleep(14.0)
        async with client.stream() as stream:
            with monkeypatch.context() as patch:
                silence(there, patch)
                await asyncio.sleep(14.0)
                async with client.stream() as again:
                    await asyncio.sleep(14.0)
                shown = await client.get("/v1/snapshot")
                assert shown["classes"] == []
                assert there.node in {row["node"] for row in shown["nodes"]}
                assert of_kind(again, "delta")[-1]["stats"]["live"] == 0
            await asyncio.sleep(3.0)
            shown = await client.get("/v1/snapshot")
            assert [row["silent_since"] for row in shown["nodes"]] == [None, None]
            assert len(shown["classes"]) == 1


async def test_node_that_has_left_is_gone() -> None:
    """It takes its rows along, and a new one appears."""
    async with fleet_of(2) as (here, there):
        there.manager.create_task(rest(), name="import")
        await settle()
        client = view_of(here)
        gone = there.node
        assert len((await snapshot(client))["nodes"]) == 2
        await there.stop()
        shown = await snapshot(client)
        assert [row["node"] for row in shown["nodes"]] == [here.node]
        assert shown["classes"] == []
        await client.get(f"/v1/tasks/{mark_of(gone)}~abc", status=404)
        await there.start()
        assert len((await snapshot(client))["nodes"]) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 7},
        {"stats": {"live": "many"}},
        {"stats": {"live": float("inf")}},
        {"stats": {"live": None}},
        {"warnings": [7]},
        {"ended": [{"n": 1, "name": "import"}]},
        {"classes": [{"name": "import"}]},
        {"more": None},
    ],
)
async def test_answers_without_the_form_are_dropped_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    """A node of another version may send anything."""
    async with fleet_of(2) as (here, there):
        here.manager.create_task(rest(), name="mine")
        await settle()
        client = view_of(here)
        ask = here.views.ask

        async def garble(node: str, data: dict[str, Any], timeout: float) -> dict[str, Any] | None:
            answer = await ask(node, {**data, "params": []}, timeout)
            if answer is not None:
                answer["events"][0]["data"] |= wrong
            return answer

        monkeypatch.setattr(here.views, "ask", garble)
        with caplog.at_level(logging.WARNING):
            shown = await snapshot(client)
        assert shown["stats"]["live"] == 1
        assert [there.node in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"task": None, "rows": None},
        {"task": {"name": "import"}, "rows": [7, {"name": "import"}]},
        {"state": "several", "task": {}, "count": "many", "total": "many", "partial": None, "rows": {}},
        {"state": "ended", "rows": [dict.fromkeys(("created", "name", "status", "task_id"), "x")]},
        {"count": 10**400, "total": 10**400},
    ],
)
async def test_answers_about_tasks_without_the_form_count_as_none(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    """A node of another version hides no task of the others, in lists of live and of ended tasks."""
    async with fleet_of(3) as (here, there, third):
        third.manager.create_task(rest(), name="import")
        ended = third.manager.create_task(rest(), name="ended")
        await settle()
        ended.cancel()
        await settle()
        client = view_of(here)
        await snapshot(client)
        ask = here.views.ask

        async def garble(node: str, data: dict[str, Any], timeout: float) -> dict[str, Any] | None:
            answer = await ask(node, data, timeout)
            if answer is not None and node == there.node:
                answer |= {"state": "live"} | wrong
            return answer

        monkeypatch.setattr(here.views, "ask", garble)
        assert (await client.get("/v1/tasks/import"))["task"]["node"] == third.node
        for query, name in (("", "import"), ("?state=ended", "ended")):
            rows = (await client.get(f"/v1/tasks{query}"))["rows"]
            assert [(row["node"], row["name"]) for row in rows] == [(third.node, name)]
        await client.get(f"/v1/tasks/{mark_of(there.node)}~abc", status=503)


# -- cancelling ---------------------------------------------------------------------------------------


async def test_task_of_another_node_is_cancelled_through_the_bus(caplog: pytest.LogCaptureFixture) -> None:
    """The cause names the user, the log the task and its node; a second request finds it ended."""
    async with fleet_of(3) as (here, there, third):
        tasks = [fleet.manager.create_task(rest(), name="import-17") for fleet in (here, there, third)]
        await settle()
        client = view_of(here, actions={"cancel"})
        rows = {row["node"]: row for row in (await client.get("/v1/tasks?q=import"))["rows"]}
        uid = rows[there.node]["id"]
        assert (await client.get(f"/v1/tasks/{quote(uid)}"))["can"] == ["cancel"]

        with caplog.at_level(logging.WARNING, "otel_tasks"):
            done = await client.cancel(uid, {"reason": "stuck"})

        assert (done["result"], done["state"], done["task"]["id"]) == ("cancelled", "ended", uid)
        assert [task.cancelled() for task in tasks] == [False, True, False]
        cause = tasks[1].cause
        assert cause is not None
        assert (cause.kind, cause.message) == (CancelKind.EXPLICIT, "stuck")
        assert cause.asked_by == f"a client at 127.0.0.1 at {here.node}"
        assert f"cancels task import-17 of node {there.node}" in caplog.text
        assert (await client.cancel(uid))["result"] == "ended"
        await leave()


async def test_task_of_another_node_that_does_not_stop_is_reported() -> None:
    """The answer comes within two seconds."""
    async with fleet_of(2) as (here, there):
        there.manager.create_task(ignore_cancels(20.0), name="import")
        await settle()
        client = view_of(here, actions={"cancel"})
        done = await client.cancel((await remote(client, "import"))["id"])
        assert (done["result"], done["task"]["status"]) == ("requested", "cancelling")
        await asyncio.sleep(20.0)


async def test_cancel_hits_only_the_task_that_was_seen() -> None:
    """A task elsewhere that is called like the uid is not meant."""
    async with fleet_of(3) as (here, there, third):
        target = there.manager.create_task(rest(), name="import")
        namesake = third.manager.create_task(rest(), name=target.uid)
        own = here.manager.create_task(rest(), name=target.uid)
        await settle()
        client = view_of(here, actions={"cancel"})
        rows = (await client.get(f"/v1/tasks?node={quote(there.node)}"))["rows"]
        await client.cancel(rows[0]["id"])
        assert (target.cancelled(), namesake.cancelled(), own.cancelled()) == (True, False, False)


async def test_one_node_is_named_for_a_cancellation() -> None:
    """The own node needs no bus, and one that is not there does not answer."""
    async with fleet_of(2) as (here, there):
        tasks = [fleet.manager.create_task(rest(), name="import") for fleet in (here, there)]
        await settle()
        report = await here.cancel_task("import", node=here.node)
        assert (report.asked, report.ended, report.silent) == (1, 1, ())
        assert [task.cancelled() for task in tasks] == [True, False]
        report = await here.cancel_task("import", node="gone/1/abc", timeout=1.0)
        assert (report.asked, report.silent) == (0, ("gone/1/abc",))
        assert (await here.cancel_task("import", node=there.node)).asked_on == {there.node: 1}


async def test_can_decides_about_tasks_of_other_nodes() -> None:
    """It gets what is known of the task here; a view that is read-only cancels nothing."""
    asked: list[RemoteTask] = []

    def can(request: Any, action: str, task: Any) -> bool:
        asked.append(task)
        return bool(task.name.startswith("mine"))

    async with fleet_of(2) as (here, there):
        mine = there.manager.create_task(rest(), name="mine", group="jobs")
        theirs = there.manager.create_task(rest(), name="theirs")
        await settle()
        client = view_of(here, actions={"cancel"}, can=can)
        uid = (await remote(client, "theirs"))["id"]
        assert (await client.get(f"/v1/tasks/{quote(uid)}"))["can"] == []
        assert (await client.cancel(uid, status=403))["error"]["code"] == "not_allowed"
        assert (await client.cancel((await remote(client, "mine"))["id"]))["result"] == "cancelled"
        assert (mine.cancelled(), theirs.cancelled()) == (True, False)
        task = asked[-1]
        assert (task.node, task.uid, task.id, task.group_id) == (there.node, mine.uid, mine.id, "jobs")
        read_only = view_of(here)
        assert (await read_only.cancel(uid, status=403))["error"]["code"] == "read_only"


async def test_cancel_of_a_silent_node_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that owns the task does not answer: nothing is claimed about the task."""
    async with fleet_of(2) as (here, there):
        there.manager.create_task(rest(), name="import")
        await settle()
        client = view_of(here, actions={"cancel"})
        uid = (await remote(client, "import"))["id"]
        silence(there, monkeypatch)
        answer = await client.cancel(uid, status=503)
        assert (answer["error"]["code"], there.node in answer["error"]["message"]) == ("silent", True)


# -- without viewers, and without what is needed ------------------------------------------------------


async def test_nobody_is_asked_without_a_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last viewer, no node is asked, and no node ticks."""
    async with fleet_of(2) as (here, there):
        client = view_of(here)
        await snapshot(client)
        await leave()
        asked: list[InspectEntry] = []
        there.link.subscribe(InspectEntry, lambda entry, at: asked.append(entry))
        await asyncio.sleep(30.0)
        assert asked == []
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("otel_tasks.live")]


async def test_fleet_that_is_not_started_is_refused() -> None:
    """The page says why it shows nothing."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager("alone"))
    client = client_of(None, fleet=fleet)
    assert (await client.get("/v1/snapshot", status=503))["error"]["code"] == "not_started"


def test_wrong_fleets_are_refused() -> None:
    """Where the view is made."""
    manager = TaskManager("alone")
    fleet = Fleet("memory://", namespace="shop", manager=manager)
    with pytest.raises(TypeError, match="fleet must be a Fleet"):
        live_view(insecure=True, fleet=manager)  # type: ignore[arg-type]  # it is the test
    with pytest.raises(ValueError, match="that of the fleet"):
        live_view(insecure=True, fleet=fleet, manager=TaskManager("other"))
    live_view(insecure=True, fleet=fleet, manager=manager)


async def test_questions_that_no_view_asks_are_answered_with_an_error() -> None:
    """A node reads what comes from the bus as it reads a client's parameters."""
    async with fleet_of(2) as (here, there):
        for data in (
            {},
            {"what": "events", "params": "x"},
            {"what": "events", "params": [["expand", "nothing"]]},
            {"what": "tasks", "params": [["limit", 7]]},
            {"what": "secrets", "params": []},
        ):
            answer = await here.views.ask(there.node, data, 2.0)
            assert answer is not None
            assert list(answer) == ["error"]


def test_worker_shows_its_tasks_without_fastapi() -> None:
    """What answers views imports no framework."""
    code = (
        "import sys, otel_tasks.live.served, otel_tasks.fleet.fleet;"
        "print([name for name in ('fastapi', 'starlette') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
