"""Fleet on memory://: cancelling and seeing in all processes, start and stop, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Any

import pytest

from otel_tasks import CancelKind, TaskManager, TaskStatus, WrongLoopError, create_task
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.fleet import BusUnavailableError, CancelReport, Fleet, outbox
from otel_tasks.fleet.bus import position_of
from otel_tasks.fleet.cancellations import Sent
from otel_tasks.fleet.entries import AnswerEntry, CancelEntry
from otel_tasks.fleet.memory_bus import memory_server
from otel_tasks.testing import FakeConnection, run
from tests.helpers import cancel_at_each_await, fail, give, ignore_cancels, now, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from otel_tasks.testing import SpanRecorder


@contextlib.asynccontextmanager
async def joined(count: int = 2, **options: Any) -> AsyncGenerator[list[Fleet]]:
    """So many nodes of one fleet, each with a manager of its own, which is shut down at the end."""
    async with contextlib.AsyncExitStack() as stack:
        fleets: list[Fleet] = []
        for number in range(count):
            manager = TaskManager(f"manager-{number}", grace=0.0, **options)
            fleet = Fleet("memory://", namespace="shop", manager=manager)
            await stack.enter_async_context(fleet)
            await stack.enter_async_context(manager)
            fleets.append(fleet)
        await settle()
        yield fleets


# -- cancelling -------------------------------------------------------------------------------------


async def test_a_task_is_cancelled_in_the_process_that_runs_it() -> None:
    """The report counts it, and the cause names the requester and its node."""
    async with joined(3) as (here, there, _):
        task = there.manager.create_task(rest(), name="import-17")
        await settle()

        report = await here.cancel_task("import-17", "stopped by the user", asked_by="ada")

        assert report == CancelReport(asked=1, ended=1, asked_on={there.node: 1})
        assert report.clean
        assert task.cause is not None
        assert (task.cause.kind, task.cause.message) == (CancelKind.EXPLICIT, "stopped by the user")
        assert task.cause.asked_by == f"ada at {here.node}"


async def test_the_own_process_comes_first() -> None:
    """A task of the calling process is cancelled before the bus knows, and counted with the others."""
    async with joined(2) as (here, there):
        mine = here.manager.create_task(rest(), name="import")
        theirs = there.manager.create_task(rest(), name="import")
        await settle()
        asking = asyncio.create_task(here.cancel_task("import", "superseded"))
        await asyncio.sleep(0)
        assert (mine.cause is not None, theirs.cause) == (True, None)
        report = await asking
        assert (report.asked, report.ended, report.asked_on) == (2, 2, {here.node: 1, there.node: 1})
        assert mine.cause is not None
        assert mine.cause.asked_by is not None
        assert here.node not in mine.cause.asked_by


async def test_a_group_is_cancelled_with_the_groups_below_it() -> None:
    """Labels nest by dots in every process; scoped groups are found by name."""
    async with joined(2) as (here, there):
        tasks = [
            manager.create_task(rest(), group=group)
            for manager in (here.manager, there.manager)
            for group in ("tenant.acme", "tenant.acme.mail", "tenant.bolt")
        ]
        await settle()
        report = await here.cancel_group("tenant.acme", "the tenant has left")
        assert (report.asked, report.ended, report.still_running) == (4, 4, 0)
        assert [task.cancelled() for task in tasks] == [True, True, False] * 2

        async def host() -> None:
            async with there.manager.group("pages") as group:
                group.create_task(rest())
                await rest()

        running = asyncio.create_task(host())
        await settle()
        assert (await here.cancel_group("pages")).ended == 1
        await asyncio.wait([running])


@pytest.mark.parametrize("by", ["name", "id"])
async def test_the_tasks_of_a_request_are_cancelled(by: str) -> None:
    """Its group is found by the name of its route, or by its id, as `tree()` shows them."""
    async with joined(2) as (here, there):

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.wait([create_task(rest(), name="fetch")])
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        connection = FakeConnection(path="/report")
        serving = asyncio.create_task(connection.run(TaskGroupMiddleware(app, manager=there.manager)))
        await asyncio.sleep(1)
        tree = await here.tree()
        (group,) = tree.nodes[there.node]["root"]["groups"]
        assert group["name"] == "GET"

        report = await here.cancel_group(group[by])

        assert (report.asked, report.ended) == (1, 1)
        await serving
        assert connection.status == 204


async def test_nothing_matches_and_every_node_answers_at_once() -> None:
    """An unknown name is no error, and takes no time."""
    async with joined(5) as (here, *_):
        began = now()
        assert await here.cancel_task("unknown") == CancelReport()
        assert await here.cancel_group("unknown") == CancelReport()
        assert now() == began


async def test_tasks_that_do_not_end_in_time_are_named() -> None:
    """A node answers shortly before the deadline, with the ids of what still runs."""
    async with joined(2) as (here, there):
        slow = there.manager.create_task(ignore_cancels(60.0), name="slow", group="jobs")
        there.manager.create_task(rest(), group="jobs")
        await settle()
        began = now()

        report = await here.cancel_group("jobs", timeout=4.0)

        assert (report.asked, report.ended, report.still_running) == (2, 1, 1)
        assert report.still_running_on == {there.node: ("slow",)}
        assert report.silent == ()
        assert not report.clean
        assert 3.0 < now() - began < 4.0
        assert report.to_dict()["still_running_on"] == {there.node: ["slow"]}
        await slow


async def test_tasks_of_the_own_process_that_do_not_end_are_named() -> None:
    """The whole timeout passes for them."""
    async with joined(2) as (here, _):
        slow = here.manager.create_task(ignore_cancels(60.0), name="slow")
        await settle()
        began = now()
        report = await here.cancel_task("slow", timeout=4.0)
        assert (report.ended, report.still_running_on) == (0, {here.node: ("slow",)})
        assert now() - began == 4.0
        await slow


async def test_a_task_that_completes_anyway_counts_as_neither() -> None:
    """It was asked, has not ended because of it, and does not run any more."""
    async with joined(2) as (here, there):
        there.manager.create_task(ignore_cancels(1.0), name="slow")
        await settle()
        report = await here.cancel_task("slow")
        assert (report.asked, report.ended, report.still_running) == (1, 0, 0)


def haunt() -> None:
    """Enter a node into the roster that never answers, as one that was killed."""
    memory_server(namespace="shop").announce("ghost/7/abcdef", b'{"host": "ghost", "pid": 7}', 30.0)


async def test_a_node_that_does_not_answer_is_silent() -> None:
    """It is waited for until the deadline, and named; the others are counted."""
    async with joined(2) as (here, there):
        haunt()
        there.manager.create_task(rest(), name="import")
        began = now()
        report = await here.cancel_task("import", timeout=3.0)
        assert (report.ended, report.silent, report.clean) == (1, ("ghost/7/abcdef",), False)
        assert now() - began == 3.0


async def test_without_a_timeout_nobody_is_waited_for() -> None:
    """0 sends the cancellation, and returns at once."""
    async with joined(2) as (here, there):
        haunt()
        mine = here.manager.create_task(rest(), name="import")
        theirs = there.manager.create_task(rest(), name="import")
        await settle()
        report = await here.cancel_task("import", timeout=0)
        assert report == CancelReport(
            asked=1,
            still_running=1,
            asked_on={here.node: 1},
            still_running_on={here.node: ("import",)},
        )
        await asyncio.wait([mine, theirs])


async def test_cancelling_twice_interrupts_no_cleanup() -> None:
    """The second request counts the task again, and leaves its cleanup and its cause alone."""
    async with joined(2) as (here, there):

        async def clean_up() -> None:
            try:
                await rest()
            finally:
                await asyncio.sleep(2)

        task = there.manager.create_task(clean_up(), name="import")
        await settle()
        first, second = await asyncio.gather(
            here.cancel_task("import", "first"), here.cancel_task("import", "second")
        )
        assert (first.ended, second.ended) == (1, 1)
        assert task.cause is not None
        assert task.cause.message == "first"


async def test_a_task_that_is_started_again_runs() -> None:
    """A cancellation is over when its call returns."""
    async with joined(2) as (here, there):
        there.manager.create_task(rest(), name="import")
        await settle()
        await here.cancel_task("import")
        again = there.manager.create_task(rest(), name="import")
        await asyncio.sleep(1)
        assert again.cause is None


async def test_a_task_may_cancel_its_own_group_everywhere() -> None:
    """The caller is spared, in its own process."""
    async with joined(2) as (here, there):
        theirs = there.manager.create_task(rest(), group="jobs")
        await settle()
        asking = here.manager.create_task(here.cancel_group("jobs"), group="jobs")
        assert (await asking).ended == 1
        assert theirs.cancelled()


async def test_the_callers_own_cancellation_ends_the_wait() -> None:
    """The tasks stay cancelled everywhere, and nothing is left of the question."""
    async with joined(2) as (here, there):
        task = there.manager.create_task(ignore_cancels(3.0), name="slow")
        mine = here.manager.create_task(ignore_cancels(3.0), name="slow")
        await settle()
        asking = asyncio.create_task(here.cancel_task("slow"))
        await asyncio.sleep(1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert task.cause is not None
        await asyncio.wait([task, mine])


async def test_the_cancelled_span_links_to_the_requesters_span(spans: SpanRecorder) -> None:
    """The span that is current at the call is named in the other process."""
    async with joined(2, tracer_provider=spans.provider) as (here, there):
        task = there.manager.create_task(rest(), name="import")
        await settle()
        with spans.provider.get_tracer("app").start_as_current_span("DELETE /jobs") as asking:
            await here.cancel_task("import", "stopped by the user")
        await settle()
    span = spans.span("import")
    origin = asking.get_span_context()
    assert [(link.context.trace_id, link.context.span_id) for link in span.links] == [
        (origin.trace_id, origin.span_id)
    ]
    assert dict(span.links[0].attributes or {}) == {"otel_tasks.link": "cancelled_by"}
    attributes = dict(span.attributes or {})
    assert attributes["otel_tasks.task.outcome"] == "cancelled"
    assert attributes["otel_tasks.cancel.reason"] == "explicit"
    assert attributes["otel_tasks.cancel.message"] == "stopped by the user"
    assert task.cancelled()


def test_every_await_may_be_cancelled(spans: SpanRecorder) -> None:
    """Starting, cancelling, seeing, and stopping leave nothing behind, wherever they are interrupted."""

    async def scenario(manager: TaskManager) -> None:
        other = TaskManager("other", grace=0.0)
        first = Fleet("memory://", namespace="shop", manager=other)
        second = Fleet("memory://", namespace="shop", manager=manager)
        async with first, other, second:
            other.create_task(rest(), name="import")
            manager.create_task(rest(), name="import")
            await settle()
            assert len(await second.tasks()) == 2
            assert (await second.cancel_task("import")).ended == 2

    assert cancel_at_each_await(scenario, spans) > 10


async def test_a_cancellation_of_a_message_reaches_its_execution() -> None:
    """In another process, and in that of the caller, which may be the worker."""
    async with joined(2) as (here, there):
        for fleet in (here, there):
            task = fleet.manager.create_task(rest(), name="render")
            fleet.cancellations.track("4711", task, Sent(position_of(here.link.position)))
            await settle()
            entry = CancelEntry(
                node=here.node, target="message", name="4711", at=0.0, cause_kind="client_disconnect"
            )
            await here.link.post(entry)
            await asyncio.wait([task], timeout=1)
            assert task.cause is not None
            assert task.cause.kind is CancelKind.CLIENT_DISCONNECT
            # The same message, sent again.
            again = fleet.manager.create_task(rest(), name="render")
            fleet.cancellations.track("4711", again, Sent(position_of(here.link.position)))
            await settle()
            assert again.cause is None
        assert here.keeper is not there.keeper


async def test_a_node_that_joins_later_knows_what_was_cancelled() -> None:
    """A remote task that waits in a broker's queue meanwhile does not start there."""
    async with joined(1) as (here,):
        sent = Sent(position_of(here.link.position))
        await here.cancel_task("render")
        await here.cancel_group("tenant.acme", "the tenant has left")
        await asyncio.sleep(1800)
        late = Fleet("memory://", namespace="shop", manager=TaskManager())
        async with late:
            entry = late.cancellations.find("4711", "other", "tenant.acme.mail", sent)
            assert entry is not None
            assert (entry.name, entry.message) == ("tenant.acme", "the tenant has left")
            assert late.cancellations.find("4711", "render", None, sent) is not None
            assert (
                late.cancellations.find("4711", "render", None, Sent(position_of(late.link.position))) is None
            )


# -- the bus fails ----------------------------------------------------------------------------------


async def test_without_the_bus_the_own_process_is_cancelled_and_the_others_follow() -> None:
    """The call fails at its deadline and says what it did; the others get it when the bus is back."""
    async with joined(2) as (here, there):
        mine = here.manager.create_task(rest(), name="import")
        theirs = there.manager.create_task(rest(), name="import")
        await settle()
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(1)
        began = now()

        with pytest.raises(BusUnavailableError) as caught:
            await here.cancel_task("import", timeout=4.0)

        assert str(caught.value) == (
            "cancelling task 'import' reached 1 task of this process, of which 1 ended: "
            "memory:// is not available; the other processes get it when the bus is back"
        )
        assert now() - began == 4.0
        assert (mine.cancelled(), theirs.cause) == (True, None)

        server.restore()
        await asyncio.wait([theirs], timeout=10)
        assert theirs.cancelled()
        assert theirs.cause is not None
        assert theirs.cause.asked_by is not None
        assert here.node in theirs.cause.asked_by


async def test_a_cancellation_whose_fleet_is_unknown_says_that_it_was_sent() -> None:
    """The bus took it, and failed before it gave the roster."""
    async with joined(2) as (here, there):
        theirs = there.manager.create_task(rest(), name="import")
        await settle()
        server = memory_server(namespace="shop")
        here.link.subscribe(CancelEntry, lambda *_: server.fail())
        with pytest.raises(
            BusUnavailableError, match=r"no task in this process.*; the other processes get it, but have not"
        ):
            await here.cancel_task("import", timeout=1.0)
        server.restore()
        await asyncio.wait([theirs], timeout=10)
        assert theirs.cancelled()


async def test_a_cancellation_that_is_lost_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many wait for the bus already."""
    monkeypatch.setattr(outbox, "OUTBOX_LIMIT", 0)
    async with joined(1) as (here,):
        with pytest.raises(BusUnavailableError, match="the other processes do not get it"):
            await here.cancel_task("import", timeout=1.0)


async def test_a_cancellation_waits_for_the_bus_within_its_timeout() -> None:
    """The bus that is back in time is as good as one that was never away; late nodes are waited for."""
    async with joined(3) as (here, there, _):
        there.manager.create_task(rest(), name="import")
        await settle()
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(5)
        asyncio.get_running_loop().call_later(2, lambda: server.restore(lose_data=True))
        report = await here.cancel_task("import", timeout=20.0)
        assert (report.ended, report.silent) == (1, ())


async def test_a_cancellation_that_was_missed_spares_what_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that was away cancels what is older than the cancellation, and only that."""
    async with joined(2) as (here, there):
        old = there.manager.create_task(rest(), name="old", group="jobs")
        await settle()
        # It reads nothing for ten seconds, as in a loop that is blocked.
        missed: list[Any] = []
        taken = there.link._inlet.take
        monkeypatch.setattr(there.link._inlet, "take", missed.append)
        assert (await here.cancel_group("jobs", timeout=1.0)).silent == (there.node,)
        await asyncio.sleep(9)
        new = there.manager.create_task(rest(), name="new", group="jobs")
        for batch in missed:
            taken([entry._replace(age=10.0) for entry in batch])
        await settle()
        assert (old.cancelled(), new.cause) == (True, None)


async def test_a_cancellation_that_waited_for_the_bus_spares_what_started_later() -> None:
    """It counts from its request: a task that another process started meanwhile under the same name runs."""
    async with joined(2) as (here, there):
        server = memory_server(namespace="shop")
        old = there.manager.create_task(rest(), name="old", group="jobs")
        await settle()
        for lose_data in (False, True):
            server.fail()
            await asyncio.sleep(5)
            with pytest.raises(BusUnavailableError):
                await here.cancel_group("jobs", timeout=1.0)
            await asyncio.sleep(9)
            new = there.manager.create_task(rest(), name="new", group="jobs")
            await asyncio.sleep(9)
            server.restore(lose_data=lose_data)
            await asyncio.sleep(5)
            assert (old.cancelled(), new.cause) == (True, None)
            old = new


async def test_a_node_that_starts_answers_no_old_question() -> None:
    """It reads the log of the last hour, whose questions nobody waits for any more."""
    here, there = (Fleet("memory://", namespace="shop", manager=TaskManager()) for _ in range(2))
    answers: list[str] = []
    async with here:
        here.link.subscribe(AnswerEntry, lambda answer, _: answers.append(answer.node))
        for _ in range(3):
            await here.tasks(timeout=1.0)
        await asyncio.sleep(60.0)
        async with there:
            await asyncio.sleep(1.0)
            assert answers == []
            await here.tasks()
            assert answers == [there.node]


async def test_inspection_needs_the_bus() -> None:
    """Without it, the call fails at once."""
    async with joined(2) as (here, _):
        memory_server(namespace="shop").fail()
        await asyncio.sleep(1)
        began = now()
        with pytest.raises(BusUnavailableError, match="memory:// is not available"):
            await here.tasks()
        assert now() == began


# -- seeing -----------------------------------------------------------------------------------------


async def test_tasks_lists_all_processes() -> None:
    """Rows are those of TaskInfo with the node; metadata and texts of errors stay where they are."""
    async with joined(2) as (here, there):
        here.manager.create_task(rest(), name="import-1", group="ingest", metadata={"secret": 1})
        await asyncio.sleep(1)
        there.manager.create_task(rest(), name="import-2", group="ingest.fetch")
        await there.manager.create_task(give(1), name="export-1")
        await asyncio.sleep(1)
        with pytest.raises(ValueError, match="the secret"):
            await there.manager.create_task(fail(ValueError("the secret")), name="leak")

        rows = await here.tasks()
        assert [(row["node"], row["name"], row["status"]) for row in rows] == [
            (here.node, "import-1", "running"),
            (there.node, "import-2", "running"),
            (there.node, "leak", "failed"),
            (there.node, "export-1", "completed"),
        ]
        assert (rows.more, rows.silent) == (0, ())
        info = here.manager.get_task("import-1").info()
        assert rows[0] == {"node": here.node, **info.to_dict(), "metadata": {}}
        assert (rows[2]["error_type"], rows[2]["error"]) == ("ValueError", None)
        assert "secret" not in repr(rows)

        assert [row["name"] for row in await here.tasks("import-*")] == ["import-1", "import-2"]
        assert [row["name"] for row in await here.tasks(group="ingest.fetch")] == ["import-2"]
        failed = await here.tasks(status=TaskStatus.FAILED)
        assert [row["name"] for row in failed] == ["leak"]
        few = await here.tasks(limit=1)
        assert ([row["name"] for row in few], few.more) == (["import-1"], 3)


async def test_many_rows_come_in_parts() -> None:
    """An answer that is larger than an entry is put together again."""
    async with joined(2) as (here, there):
        for number in range(1500):
            there.manager.create_task(rest(), name=f"import-{number:04}-{'x' * 100}")
        await settle()
        rows = await here.tasks()
        assert (len(rows), rows.more) == (1000, 500)
        assert len({row["name"] for row in rows}) == 1000


async def test_tree_shows_all_processes() -> None:
    """Each node has its tree; a silent one is named in the drawing."""
    async with joined(2) as (here, there):
        there.manager.create_task(rest(), name="import-1", group="ingest")
        haunt()
        await settle()
        tree = await here.tree()
        assert list(tree.nodes) == [here.node, there.node]
        assert tree.nodes[there.node]["root"]["groups"][0]["tasks"][0]["name"] == "import-1"
        assert f"{there.node}\nmanager manager-1: 1 live task\n└── ingest" in str(tree)
        assert str(tree).endswith("ghost/7/abcdef\nno answer")
        assert tree.to_dict() == {"nodes": dict(tree.nodes), "silent": ["ghost/7/abcdef"]}


async def test_nodes_lists_all_processes() -> None:
    """With what each one says of itself; a killed one is silent, and then gone."""
    async with joined(2) as (here, there):
        there.manager.create_task(rest())
        haunt()
        await settle()
        began = now()
        nodes = {node.node: node for node in await here.nodes()}
        assert now() - began == 2.0
        assert nodes.keys() == {here.node, there.node, "ghost/7/abcdef"}
        other, ghost = nodes[there.node], nodes["ghost/7/abcdef"]
        assert (other.pid, other.manager) == (os.getpid(), "manager-1")
        assert (other.live_tasks, other.silent) == (1, False)
        assert other.host
        assert other.started.startswith("20")
        assert (ghost.host, ghost.pid, ghost.silent, ghost.last_seen) == ("ghost", 7, True, 2.0)
        assert ghost.to_dict()["silent"] is True
        await asyncio.sleep(30)
        began = now()
        assert [node.silent for node in await here.nodes()] == [False, False]
        assert now() == began


async def test_a_node_stays_in_the_roster_while_it_runs() -> None:
    """It announces itself again and again, and at once when the bus has lost its roster."""
    async with joined(2) as (here, there):
        await asyncio.sleep(120)
        assert len(await here.nodes()) == 2
        server = memory_server(namespace="shop")
        server.fail()
        await asyncio.sleep(60)
        server.restore(lose_data=True)
        await asyncio.sleep(4)
        assert {node.node for node in await here.nodes()} == {here.node, there.node}


async def test_a_node_that_stops_is_not_waited_for() -> None:
    """It leaves the roster."""
    async with joined(2) as (here, there):
        await there.stop()
        began = now()
        assert [node.node for node in await here.nodes()] == [here.node]
        assert now() == began


# -- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "namespace", "message"),
    [
        (7, "shop", "the URL of a fleet must start with redis://"),
        ("http://127.0.0.1", "shop", "the URL of a fleet must start with redis://"),
        ("memory://", None, "namespace must be 1 to 100 letters"),
        ("memory://", "{shop}", "namespace must be 1 to 100 letters"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_written(url: Any, namespace: Any, message: str) -> None:
    """A Fleet checks its URL and its namespace when it is made."""
    with pytest.raises(ValueError, match=message):
        Fleet(url, namespace=namespace)


def test_the_manager_is_checked() -> None:
    """It has to be one; without one, the global manager is used."""
    with pytest.raises(TypeError, match="manager must be a TaskManager, got 'shop'"):
        Fleet("memory://", namespace="shop", manager="shop")  # type: ignore[arg-type]  # that is the test
    assert Fleet("memory://", namespace="shop").manager.name == "default"


async def test_wrong_arguments_are_refused() -> None:
    """Names, durations, limits, and statuses are checked before anything is sent."""
    async with joined(1) as (fleet,):
        group: Any = fleet.manager.get_group("jobs")
        with pytest.raises(TypeError, match=r"finds a group by its name or id, .*: pass group.id"):
            await fleet.cancel_group(group)
        with pytest.raises(TypeError, match=r"finds a node by its name, got Node.*: pass node.node"):
            await fleet.cancel_task("import", node=(await fleet.nodes())[0])  # type: ignore[arg-type]  # that is the test
        with pytest.raises(ValueError, match="1 to 1024 characters, got 0"):
            await fleet.cancel_task("")
        with pytest.raises(ValueError, match="timeout must be at least 0 and finite"):
            await fleet.cancel_task("import", timeout=10**400)
        with pytest.raises(ValueError, match="timeout must be at least 0 and finite"):
            await fleet.cancel_task("import", timeout=float("inf"))
        with pytest.raises(TypeError, match="timeout must be a number of seconds, got None"):
            await fleet.tree(timeout=None)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(ValueError, match="timeout must be greater than 0 and finite"):
            await fleet.nodes(timeout=0)
        with pytest.raises(ValueError, match=r"status must be one of 'pending', .*, got 'done'"):
            await fleet.tasks(status="done")
        with pytest.raises(ValueError, match="limit must be a whole number of at least 1, got 0"):
            await fleet.tree(limit=0)
        with pytest.raises(ValueError, match="limit must be at most 2000, got 2001"):
            await fleet.tasks(limit=2001)
        with pytest.raises(TypeError, match="reason must be text, got 7"):
            await fleet.cancel_task("import", 7)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(TypeError, match="asked_by must be text, got 7"):
            await fleet.cancel_group("import", asked_by=7)  # type: ignore[arg-type]  # that is the test
        with pytest.raises(TypeError, match="cause must be a CancelCause"):
            await fleet.cancel_task("import", cause="x")  # type: ignore[arg-type]  # that is the test


async def test_a_long_timeout_is_one_that_the_other_nodes_accept() -> None:
    """They would skip an entry with a number beyond those of JSON."""
    async with joined(2) as (here, there):
        task = there.manager.create_task(rest(), name="import")
        await settle()
        report = await here.cancel_task("import", timeout=1e300)
        assert (report.ended, task.cancelled()) == (1, True)
        assert await here.tasks("import", timeout=1e300)


# -- start and stop ---------------------------------------------------------------------------------


async def test_a_fleet_that_is_not_started_names_the_fix() -> None:
    """Every call does, before the start and after the stop."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    assert repr(fleet) == "<Fleet 'shop' at memory://, not started>"
    with pytest.raises(RuntimeError, match=r"fleet 'shop' is not started .*: write `async with fleet:`"):
        await fleet.cancel_task("import")
    async with fleet:
        assert repr(fleet) == f"<Fleet 'shop' at memory://, started as {fleet.node}>"
        assert fleet.namespace == "shop"
    with pytest.raises(RuntimeError, match="is not started"):
        await fleet.nodes()
    with pytest.raises(RuntimeError, match="is not started"):
        assert fleet.node
    await fleet.stop()


async def test_starts_and_stops_are_counted() -> None:
    """A lifespan and a broker may both start it; each start after a stop is a new node."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    await asyncio.gather(fleet.start(), fleet.start())
    node = fleet.node
    assert node.split("/")[1] == str(os.getpid())
    await fleet.stop()
    assert fleet.node == node
    await fleet.stop()
    assert not fleet.is_started
    async with fleet:
        assert fleet.node != node


async def test_a_fleet_starts_without_its_server() -> None:
    """The start waits 5 seconds for it; the process joins when it is there."""
    memory_server(namespace="shop").fail()
    began = now()
    async with joined(1) as (fleet,):
        assert now() - began == 5.0
        memory_server(namespace="shop").restore()
        await asyncio.sleep(5)
        assert fleet.link.is_up
        assert [node.silent for node in await fleet.nodes()] == [False]


async def test_a_start_that_is_cancelled_can_be_repeated() -> None:
    """It leaves nothing behind."""
    memory_server(namespace="shop").fail()
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await fleet.start()
    assert not fleet.is_started
    memory_server(namespace="shop").restore()
    async with fleet:
        assert fleet.link.is_up


def test_a_fleet_belongs_to_one_loop() -> None:
    """Another loop is refused while it is started, and taken when the first one is closed."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())

    async def elsewhere() -> None:
        with pytest.raises(WrongLoopError, match="fleet 'shop' is started in another event loop"):
            await fleet.start()
        with pytest.raises(WrongLoopError, match="call it there"):
            await fleet.cancel_task("import")
        with pytest.raises(WrongLoopError, match="stop it where it was started"):
            await fleet.stop()

    async def first() -> None:
        async with fleet:
            await asyncio.to_thread(asyncio.run, elsewhere())
            assert fleet.is_started

    asyncio.run(first())

    async def leave_it_started() -> None:
        await fleet.start()

    asyncio.run(leave_it_started())
    asyncio.run(first())
    asyncio.run(leave_it_started())
    # Nothing is left to stop: its connections are gone with their loop.
    asyncio.run(fleet.stop())
    assert not fleet.is_started


async def test_a_manager_of_another_loop_is_refused() -> None:
    """Its tasks could not be cancelled from here."""
    manager = TaskManager("elsewhere")
    async with manager:
        manager.create_task(rest(), name="busy")
        fleet = Fleet("memory://", namespace="shop", manager=manager)
        with pytest.raises(WrongLoopError, match="manager 'elsewhere' of fleet 'shop' has live tasks"):
            await asyncio.to_thread(asyncio.run, fleet.start())
        assert not fleet.is_started
        manager.get_task("busy").cancel()


async def test_one_manager_joins_a_fleet_once() -> None:
    """Its tasks would count twice; another namespace is another fleet."""
    manager = TaskManager()
    first, second = (Fleet("memory://", namespace="shop", manager=manager) for _ in range(2))
    other = Fleet("memory://", namespace="bank", manager=manager)
    async with first, other:
        with pytest.raises(RuntimeError, match=r"already in fleet 'shop', as .*: its tasks"):
            await second.start()
        assert not second.is_started
        assert len(await first.nodes()) == len(await other.nodes()) == 1
    async with second:
        assert second.is_started


async def test_a_stop_lets_waiting_calls_fail_and_answers_others() -> None:
    """A caller in this process fails; the other node learns what has not ended."""
    async with joined(2) as (here, there):
        slow = there.manager.create_task(ignore_cancels(3.0), name="slow")
        haunt()
        await settle()
        asking = asyncio.create_task(here.cancel_task("slow", timeout=60.0))
        failing = asyncio.create_task(there.cancel_task("unknown", timeout=60.0))
        await asyncio.sleep(1)
        await there.stop()
        with pytest.raises(BusUnavailableError, match="the fleet has stopped"):
            await failing
        memory_server(namespace="shop").leave("ghost/7/abcdef")
        report = await here.cancel_task("x", timeout=1.0)
        assert report.silent == ()
        asking.cancel()
        await asyncio.wait([asking, slow])


async def test_a_stop_sends_what_waits_before_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation is in the log before the lease is gone: other nodes do not take the node for lost."""
    order: list[str] = []
    async with joined(1) as (fleet,):
        bus = fleet.link.bus
        publish, leave = bus.publish, bus.leave

        async def publish_slowly(payload: bytes) -> str:
            await asyncio.sleep(1)
            order.append("published")
            return await publish(payload)

        async def note_leaving(node: str) -> None:
            order.append("left")
            await leave(node)

        monkeypatch.setattr(bus, "publish", publish_slowly)
        monkeypatch.setattr(bus, "leave", note_leaving)
        fleet.link.post(CancelEntry(node=fleet.node, target="task", name="import-17", at=0.0))
    assert order == ["published", "left"]


async def test_the_manager_may_be_shut_down_while_the_fleet_runs() -> None:
    """The node goes on answering, and has no tasks."""
    async with joined(2) as (here, there):
        task = there.manager.create_task(rest(), name="import")
        await there.manager.shutdown(grace=0)
        assert task.cancelled()
        assert await here.cancel_task("import") == CancelReport()
        assert [row["status"] for row in await here.tasks()] == ["cancelled"]


def test_a_forked_process_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a start of its own, and gets a name of its own; the parent's connections are left alone."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())

    async def parent() -> None:
        await fleet.start()
        node, pid = fleet.node, os.getpid()
        inherited = fleet._membership
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        assert not fleet.is_started
        with pytest.raises(RuntimeError, match="is not started in this process"):
            await fleet.tasks()
        async with fleet:
            assert fleet.node.split("/")[1] == str(pid + 1)
            assert fleet.node != node
        assert inherited is not None
        await inherited.stop()

    run(parent())
