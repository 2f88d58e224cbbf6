"""An observer of a fleet on memory://: it sees and cancels, and is no node."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from taskiq import InMemoryBroker

from otel_tasks import TaskManager, global_task_manager
from otel_tasks.fastapi import make_lifespan
from otel_tasks.fleet import BusUnavailableError, Fleet
from otel_tasks.fleet.memory_bus import memory_server
from otel_tasks.taskiq import managed
from tests.helpers import now, rest, settle
from tests.live_client import client_of, leave
from tests.test_fleet import joined
from tests.test_live_fleet import remote, seen, silence, view_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@contextlib.asynccontextmanager
async def observed(count: int = 2) -> AsyncGenerator[tuple[Fleet, list[Fleet]]]:
    """An observer of so many nodes; at the end, nobody looks any more."""
    async with joined(count) as fleets, Fleet("memory://", namespace="shop", observer=True) as observer:
        await settle()
        yield observer, fleets
        await leave()


async def test_an_observer_sees_and_cancels_and_is_no_node() -> None:
    """The others neither list it nor wait for it, while it runs and after it."""
    async with joined(2) as (here, there):
        task = there.manager.create_task(rest(), name="import-17")
        await settle()
        async with Fleet("memory://", namespace="shop", observer=True) as observer:
            nodes = {here.node, there.node}
            assert {node.node for node in await observer.nodes()} == nodes
            assert {node.node for node in await here.nodes()} == nodes
            assert [row["name"] for row in await observer.tasks()] == ["import-17"]
            assert (await observer.tree()).nodes.keys() == nodes
            assert "an observer" in repr(observer)

            report = await observer.cancel_task("import-17", "stuck", asked_by="ada")
            assert (report.asked, report.ended, report.silent) == (1, 1, ())
            assert task.cause is not None
            assert task.cause.asked_by == f"ada at {observer.node}"
            began = now()
            report = await here.cancel_group("root", timeout=5.0)
            assert (report.silent, now()) == ((), began)
        assert {node.node for node in await here.nodes()} == nodes


async def test_the_tasks_of_an_observers_process_are_not_those_of_the_fleet() -> None:
    """What it cancels by name it cancels elsewhere, and it lists none of its own."""
    mine = global_task_manager.create_task(rest(), name="import")
    async with observed(1) as (observer, (there,)):
        assert await observer.tasks() == []
        theirs = there.manager.create_task(rest(), name="import")
        await settle()
        assert (await observer.cancel_task("import")).asked == 1
        assert (mine.cause, theirs.cancelled()) == (None, True)
    mine.cancel()
    await asyncio.wait([mine])


async def test_what_an_observer_cannot_send_is_not_sent_later() -> None:
    """It may be gone when the bus is back: the error says so, at once."""
    async with observed(1) as (observer, (there,)):
        task = there.manager.create_task(rest(), name="import")
        await settle()
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(1)
        began = now()
        with pytest.raises(BusUnavailableError) as caught:
            await observer.cancel_task("import")
        assert str(caught.value) == (
            "cancelling task 'import' failed: memory:// is not available; the other processes do not get it"
        )
        assert now() == began
        server.restore()
        await asyncio.sleep(10)
        assert task.cause is None
        assert (await observer.cancel_task("import")).ended == 1


async def test_an_observer_runs_no_remote_tasks() -> None:
    """What renews leases and claims is not there, and a broker is refused where it is covered."""
    async with observed(1) as (observer, _):
        with pytest.raises(RuntimeError, match="leave observer=True out"):
            _ = observer.keeper
        with pytest.raises(ValueError, match="leave observer=True out"):
            managed(InMemoryBroker(), observer)


@pytest.mark.parametrize("observer", ["no", 1, None])
def test_observer_is_true_or_false(observer: Any) -> None:
    """A word would always be true."""
    with pytest.raises(TypeError, match="observer must be True or False, got"):
        Fleet("memory://", namespace="shop", observer=observer)


def test_an_observer_has_no_manager() -> None:
    """It would show tasks that nobody sees."""
    with pytest.raises(ValueError, match="leave manager out"):
        Fleet("memory://", namespace="shop", manager=TaskManager("own"), observer=True)


async def test_an_application_that_observes_has_its_own_manager() -> None:
    """Its lifespan opens the global one, and joins the fleet as an observer."""
    async with joined(1) as (there,):
        fleet = Fleet("memory://", namespace="shop", observer=True)
        app = FastAPI()
        async with make_lifespan(fleet=fleet)(app):
            task = global_task_manager.create_task(rest(), name="own")
            assert [node.node for node in await fleet.nodes()] == [there.node]
            assert await fleet.tasks() == []
        assert task.cancelled()


# -- its view -----------------------------------------------------------------------------------------


async def test_the_view_of_an_observer_shows_the_nodes_alone() -> None:
    """It has no row, no task, and no warning of its own."""
    async with observed(2) as (observer, fleets):
        for fleet in fleets:
            fleet.manager.create_task(rest(), name="import", group="jobs")
        await settle()
        client = view_of(observer, actions={"cancel"})
        shown = (await seen(client))["snapshot"]
        nodes = {fleet.node for fleet in fleets}
        assert {row["node"] for row in shown["groups"]} == nodes
        assert {row["node"] for row in shown["nodes"]} == nodes
        assert (shown["node"], shown["namespace"]) == (None, "shop")
        assert (shown["stats"]["live"], shown["stats"]["groups"]) == (2, 2)
        oldest = (await seen(client, "&expand=oldest"))["rows"]
        assert (oldest["total"], {row["node"] for row in oldest["set"]}) == (2, nodes)
        there = fleets[1]
        found = await client.get(f"/v1/tasks?node={there.node}")
        assert [row["node"] for row in found["rows"]] == [there.node]
        answer = await client.cancel(found["rows"][0]["id"])
        assert answer["result"] == "cancelled"


async def test_the_view_of_an_observer_is_new_after_a_restart() -> None:
    """A fleet that starts again asks under another name."""
    async with joined(1) as (there,):
        there.manager.create_task(rest(), name="import")
        observer = Fleet("memory://", namespace="shop", observer=True)
        client = view_of(observer)
        for _ in range(2):
            async with observer:
                assert (await remote(client, "import"))["node"] == there.node
                assert (await client.get("/v1/snapshot"))["stats"]["live"] == 1
                await leave()


async def test_one_who_asks_once_waits_for_a_slow_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot has the tasks of a node that takes a second; one that is silent is not waited for longer."""
    async with observed(2) as (observer, (fast, slow)):
        for fleet in (fast, slow):
            fleet.manager.create_task(rest(), name="import")
        await settle()
        answer = slow.views._answer

        async def later(entry: object) -> None:
            await asyncio.sleep(0.6)
            await answer(entry)  # type: ignore[arg-type]  # it is what the original gets

        with monkeypatch.context() as patch:
            patch.setattr(slow.views, "_answer", later)
            began = now()
            shown = await client_of(None, fleet=observer).get("/v1/snapshot")
            assert (shown["stats"]["live"], now() - began < 2) == (2, True)
        await leave()
        silence(slow, monkeypatch)
        began = now()
        shown = await client_of(None, fleet=observer).get("/v1/snapshot")
        assert (shown["stats"]["live"], now() - began) == (1, pytest.approx(2.75, abs=0.3))
        assert {row["node"]: row["key"] is None for row in shown["nodes"]} == {
            fast.node: False,
            slow.node: True,
        }
