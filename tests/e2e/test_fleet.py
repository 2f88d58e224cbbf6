"""A fleet of real processes on a real Redis: cancel and see across replicas, also through faults."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from examples.otlp_receiver import receiver
from otel_tasks import TaskManager
from otel_tasks.fleet import Fleet
from otel_tasks.fleet.bus import INBOX_KEPT, INBOX_LIMIT
from otel_tasks.fleet.entries import ProgressEntry
from tests.blocks import ROOT
from tests.helpers import rest
from tests.processes import free_port, marked_environment
from tests.redis_server import own_redis, redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from tests.redis_server import Redis

__all__ = ["own_redis", "redis_server"]

pytestmark = [pytest.mark.e2e]

# Seconds, for a busy machine.
PATIENCE = 60.0


class Replica:
    """A process of the service in tests/e2e/fleet_app.py."""

    def __init__(self, url: str, namespace: str, name: str, **environment: str) -> None:
        port = free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "tests.e2e.fleet_app:app", "--port", str(port)],
            cwd=ROOT,
            env=marked_environment()
            | {"FLEET_URL": url, "FLEET_NAMESPACE": namespace, "SERVICE": name}
            | environment,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    @property
    def node(self) -> str:
        """Its name in the fleet, once it serves and has joined."""
        return str(eventually(self._joined)["node"])

    def _joined(self) -> dict[str, Any] | None:
        try:
            answer: dict[str, Any] = self.client.get("/node").json()
        except httpx.TransportError:
            assert self.process.poll() is None
            return None
        return answer if answer["up"] else None

    def cancel(self, name: str, timeout: float = 30.0) -> dict[str, Any]:
        """Stop a job through this replica."""
        answer: dict[str, Any] = self.client.delete(f"/jobs/{name}", params={"timeout": timeout}).json()
        return answer

    def status(self, name: str) -> str:
        """The status of a job of this replica."""
        return str(self.client.get(f"/jobs/{name}").json()["status"])

    def close(self) -> None:
        """End it."""
        self.client.close()
        self.process.kill()
        self.process.wait()


def eventually(look: Callable[[], Any]) -> Any:
    """Poll until the result is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(look)


@contextmanager
def replicas(server: Redis, namespace: str, *names: str, **environment: str) -> Iterator[list[Replica]]:
    """This many replicas, which have joined."""
    with ExitStack() as stack:
        found = [Replica(server.url, namespace, name, **environment) for name in names]
        for each in found:
            stack.callback(each.close)
        for each in found:
            assert each.node
        yield found


def test_a_job_is_cancelled_through_another_replica(redis_server: Redis, key: str) -> None:
    """The report counts it, and the trace has the cause, the requester, and a link across processes."""
    with (
        receiver() as received,
        replicas(redis_server, key, "a", "b", "c", OTEL_EXPORTER_OTLP_ENDPOINT=received.endpoint) as (
            a,
            b,
            _,
        ),
    ):
        a.client.post("/jobs/import-17")
        assert [(row["node"], row["name"]) for row in b.client.get("/jobs").json()] == [(a.node, "import-17")]

        report = b.cancel("import-17")

        assert (report["asked"], report["ended"], report["silent"]) == (1, 1, [])
        assert report["asked_on"] == {a.node: 1}
        assert a.status("import-17") == "cancelled"
        again = b.cancel("import-17")
        assert (again["asked"], again["silent"]) == (0, [])

        (job,) = received.wait_for(lambda it: [span for span in it.spans() if span.name == "import"])
        assert job.attributes["otel_tasks.cancel.reason"] == "explicit"
        assert job.attributes["otel_tasks.cancel.message"] == "stopped by the user"
        assert job.attributes["otel_tasks.task.outcome"] == "cancelled"
        assert job.service == "a"
        ((kind, origin),) = job.links
        (asking,) = received.wait_for(lambda it: [span for span in it.spans() if span.span_id == origin])
        assert (kind, asking.service) == ("cancelled_by", "b")
        assert "DELETE /jobs/{name}" in {span.name for span in received.spans(asking.trace_id)}
        cause = a.client.get("/jobs/import-17").json()["cause"]
        assert cause["asked_by"] == f"DELETE /jobs/{{name}} at {b.node}"


def test_a_replica_that_is_killed_is_silent_and_then_gone(redis_server: Redis, key: str) -> None:
    """The call names it at the deadline; half a minute later, nobody waits for it."""
    with replicas(redis_server, key, "a", "b") as (a, b):
        lost = a.node
        a.process.kill()
        a.process.wait()

        began = time.monotonic()
        report = b.cancel("import-17", timeout=1.0)
        assert (report["asked"], report["silent"]) == (0, [lost])
        assert time.monotonic() - began >= 1.0
        rows = {row["node"]: row for row in b.client.get("/nodes").json()}
        assert (rows[lost]["silent"], rows[lost]["pid"], rows[b.node]["silent"]) == (
            True,
            a.process.pid,
            False,
        )

        eventually(lambda: len(b.client.get("/nodes").json()) == 1)
        assert b.cancel("import-17")["silent"] == []


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "forgetful"])
def test_a_restart_of_redis_in_between_loses_no_cancellation(
    own_redis: Redis, key: str, persistent: bool
) -> None:
    """A call made while the server is away acts here at once, and elsewhere when it is back."""
    if persistent:
        own_redis.stop()
        own_redis.start(persistent=True)
    with replicas(own_redis, key, "a", "b") as (a, b):
        for replica in (a, b):
            replica.client.post("/jobs/import-17")
        own_redis.kill()

        answer = b.cancel("import-17", timeout=1.0)
        assert "reached 1 task of this process, of which 1 ended" in answer["error"]
        assert f"127.0.0.1:{own_redis.port}" in answer["error"]
        assert (b.status("import-17"), a.status("import-17")) == ("cancelled", "running")

        own_redis.start(persistent=persistent)
        eventually(lambda: a.status("import-17") == "cancelled")
        # The roster is complete again.
        eventually(lambda: len(b.client.get("/nodes").json()) == 2)
        a.client.post("/jobs/import-18")
        report = b.cancel("import-18")
        assert (report["ended"], report["silent"]) == (1, [])


def test_a_cancellation_waits_for_a_redis_that_does_not_answer(own_redis: Redis, key: str) -> None:
    """A pause within the timeout is only a delay."""
    with replicas(own_redis, key, "a", "b") as (a, b):
        a.client.post("/jobs/import-17")
        own_redis.pause()
        try:
            assert "error" in b.cancel("import-17", timeout=0.5)
        finally:
            own_redis.resume()
        eventually(lambda: a.status("import-17") == "cancelled")


def test_requests_and_local_tasks_cost_the_bus_nothing(own_redis: Redis, key: str) -> None:
    """A node without remote tasks renews no lease, and sends nothing for its requests and tasks."""
    with replicas(own_redis, key, "a") as (a,), own_redis.client() as client:
        # The start of the node is over.
        eventually(lambda: client.exists(f"{{{key}}}:nodes"))
        before = calls(client)
        for number in range(100):
            a.client.post(f"/jobs/import-{number}")
            assert a.status(f"import-{number}") in ("pending", "running")
        after = calls(client)

        assert not client.keys(f"{{{key}}}:lease:*")
        done = {name: count - before.get(name, 0) for name, count in after.items()}
        # It waits for entries, and announces itself every 10 s.
        assert sum(done.get(name, 0) for name in ("xadd", "set", "pexpire", "get", "exists", "mget")) == 0
        assert done.get("evalsha", 0) < 20
        assert done.get("xread", 0) < 100


def calls(client: Any) -> dict[str, int]:
    """The number of calls of each command."""
    statistics = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): int(found["calls"]) for name, found in statistics.items()}


@pytest.mark.real_clock
async def test_a_flood_stays_within_bounds(own_redis: Redis, key: str) -> None:
    """Three connections per node, whatever it does; unread inboxes and open questions are bounded."""
    async with AsyncExitStack() as stack:
        fleets = [
            Fleet(own_redis.url, namespace=key, manager=TaskManager(f"m{number}", grace=0.0))
            for number in range(3)
        ]
        for fleet in fleets:
            await stack.enter_async_context(fleet)
            await stack.enter_async_context(fleet.manager)
            # Its thread renews.
            await fleet.keeper.hold_lease()
            stack.callback(fleet.keeper.drop_lease)
        client = stack.enter_context(own_redis.client())
        asking = fleets[0]
        questions: list[Coroutine[Any, Any, Any]] = []
        for number in range(300):
            questions += [
                asking.cancel_task(f"import-{number}", timeout=PATIENCE),
                asking.tasks(timeout=PATIENCE),
            ]
        flood = asyncio.gather(*questions)
        most = 0
        while not flood.done():
            most = max(most, len(await asyncio.to_thread(client.client_list)))
            await asyncio.sleep(0.01)
        assert all(not found.silent for found in await flood)
        assert most <= 3 * len(fleets) + 1

        # So long that each is an entry of its own.
        entry = ProgressEntry(node=asking.node, task_id="4711", done=1.0, message=2000 * "x")
        for number in range(INBOX_LIMIT + 2_000):
            asking.link.post_to("nobody", entry, must_arrive=True)
            if number % 1000 == 0:
                await asking.link.flush()
        await asking.link.flush()
        inbox = f"{{{key}}}:inbox:nobody"
        assert INBOX_LIMIT <= client.xlen(inbox) < INBOX_LIMIT + 500
        assert 0 < client.ttl(inbox) <= INBOX_KEPT
        membership = asking._membership
        assert membership is not None
        assert membership._gathering._open == {}


@pytest.mark.real_clock
async def test_fifty_nodes_are_inspected_at_once(redis_server: Redis, key: str) -> None:
    """Each answers, and the rows of all of them arrive."""
    async with AsyncExitStack() as stack:
        fleets = [
            Fleet(redis_server.url, namespace=key, manager=TaskManager(f"m{number}", grace=0.0))
            for number in range(50)
        ]
        for fleet in fleets:
            await stack.enter_async_context(fleet)
            await stack.enter_async_context(fleet.manager)
            fleet.manager.create_task(rest(), name="import")
        await asyncio.sleep(0)
        asking = fleets[0]

        rows = await asking.tasks("import", timeout=30.0)
        assert ({row["node"] for row in rows}, rows.silent) == ({fleet.node for fleet in fleets}, ())
        assert len(await asking.nodes(timeout=30.0)) == 50
        report = await asking.cancel_task("import", timeout=30.0)
        assert (report.asked, report.ended, report.silent) == (50, 50, ())
