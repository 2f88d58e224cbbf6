"""The streams of the live view: ticks, reconnects, slow readers, bounds, and how a stream ends."""

from __future__ import annotations

import asyncio
import json
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware

from otel_tasks import TaskManager
from otel_tasks._core.slices import TASKS_PER_SLICE
from otel_tasks.asgi import TaskGroupMiddleware, call_on_server_stop
from otel_tasks.live import hub as hubs
from otel_tasks.live import live_view
from otel_tasks.live.feed import Feed
from tests.helpers import rest, settle
from tests.live_client import Client, client_of, events, leave, of_kind

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response


def ticking() -> bool:
    """Whether a feed of this loop ticks."""
    return any(task.get_name() == "otel_tasks.live" for task in asyncio.all_tasks())


async def until_ticking() -> None:
    """Wait until a feed has its task, which has not run yet."""
    for _ in range(100):
        if ticking():
            return
        await asyncio.sleep(0)


async def test_stream_begins_with_a_snapshot_and_has_a_delta_per_tick() -> None:
    """Each delta names the update before it as its base, and all have ids that a browser sends back."""
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream() as stream:
            await asyncio.sleep(3.1)
            manager.create_task(rest(), name="late")
            await asyncio.sleep(1)
        found = events(stream)
        assert [kind for kind, _, _ in found] == ["snapshot", *["delta"] * 4]
        assert [data["base"] for _, _, data in found[1:]] == [event_id for _, event_id, _ in found[:-1]]
        assert [row["name"] for row in found[-1][2]["set"]["classes"]] == ["late"]
        assert stream.body.startswith(b"retry: 1000\n\n")
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        await manager.cancel_all_tasks()
        await leave()


async def test_without_a_viewer_nothing_runs() -> None:
    """There is no task and no listener before the first viewer, and 5 s after the last one."""
    async with TaskManager() as manager:
        client = client_of(manager)
        assert not ticking()
        async with client.stream():
            await asyncio.sleep(2)
            assert ticking()
            assert manager._ledger.listeners.functions == []
        await asyncio.sleep(3)
        assert ticking()
        await asyncio.sleep(4)
        assert not ticking()
        # And again.
        async with client.stream() as stream:
            await asyncio.sleep(1.1)
        assert [kind for kind, _, _ in events(stream)] == ["snapshot", "delta"]
        await leave()
        assert not ticking()


async def test_polls_keep_the_feed_ticking_too() -> None:
    """A client without EventSource gets the same events in pieces."""
    async with TaskManager() as manager:
        client = client_of(manager)
        first = await client.get("/v1/events?poll=1")
        assert [event["event"] for event in first["events"]] == ["snapshot"]
        await asyncio.sleep(2.5)
        second = await client.get(f"/v1/events?poll=1&after={first['id']}")
        assert [event["event"] for event in second["events"]] == ["delta", "delta"]
        assert second["events"][-1]["data"]["id"] == second["id"]
        assert (await client.get(f"/v1/events?poll=1&after={second['id']}"))["events"] == []
        await leave()
        assert not ticking()


async def test_client_that_comes_back_gets_what_it_missed() -> None:
    """`after` and `Last-Event-ID` continue where the client was; the parameter wins."""
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream() as first:
            await asyncio.sleep(2.1)
        last = events(first)[-1][1]
        await asyncio.sleep(2)
        async with client.stream(f"?after={last}") as second:
            await asyncio.sleep(0.1)
        assert [data["base"] for data in of_kind(second, "delta")][:1] == [last]
        assert of_kind(second, "snapshot") == of_kind(second, "resync") == []
        connection = client.connection("/v1/events?poll=1", headers={"last-event-id": str(last)})
        await connection.run(client.app)
        assert {event["event"] for event in json.loads(connection.body)["events"]} == {"delta"}
        await leave()


@pytest.mark.parametrize(
    ("after", "reason"), [("0badcafe:3", "restart"), ("{}:999", "old"), ("{}:x", "old"), ("x", "restart")]
)
async def test_id_that_leads_nowhere_gets_resync_and_the_snapshot(after: str, reason: str) -> None:
    """Another instance, an id of the future, and nonsense are told apart, and all are served."""
    async with TaskManager() as manager:
        client = client_of(manager)
        instance = (await client.get("/v1/snapshot"))["instance"]
        async with client.stream(f"?after={after.format(instance)}") as stream:
            pass
        assert [(kind, data.get("reason")) for kind, _, data in events(stream)] == [
            ("resync", reason),
            ("snapshot", None),
        ]
        await leave()


async def test_client_that_was_away_too_long_gets_resync() -> None:
    """After a pause of the feed its updates are gone."""
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream() as stream:
            await asyncio.sleep(1.1)
        last = events(stream)[-1][1]
        await leave()
        async with client.stream(f"?after={last}") as stream:
            pass
        assert of_kind(stream, "resync") == [{"v": 1, "reason": "old"}]
        await leave()


async def test_slow_reader_gets_resync_and_no_queue() -> None:
    """A reader that stops reading misses updates; what it gets then is the newest snapshot alone."""
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream() as stream:
            stream.pause()
            await asyncio.sleep(12)
            stream.resume()
            await asyncio.sleep(0.1)
        kinds = [kind for kind, _, _ in events(stream)]
        # A tick may fall into that tenth of a second.
        assert kinds[kinds.index("resync") :] in (["resync", "snapshot"], ["resync", "snapshot", "delta"])
        assert of_kind(stream, "resync") == [{"v": 1, "reason": "slow"}]
        await leave()


async def test_reader_that_never_reads_again_is_dropped() -> None:
    """Its stream ends after half a minute, and the others go on."""
    async with TaskManager() as manager:
        client = client_of(manager)
        stalled = client.connection("/v1/events?viewer=stalled")
        serving = asyncio.create_task(stalled.run(client.app))
        await asyncio.sleep(0.1)
        stalled.pause()
        await asyncio.sleep(40)
        assert serving.done()
        assert not stalled.complete
        await leave()


async def test_stream_ends_by_itself() -> None:
    """After 15 to 25 s it says `bye` and is complete, and the next one continues."""
    async with TaskManager() as manager:
        client = client_of(manager)
        stream = client.connection("/v1/events")
        started = asyncio.get_running_loop().time()
        await stream.run(client.app)
        assert 15 <= asyncio.get_running_loop().time() - started <= 25
        assert stream.complete
        assert events(stream)[-1] == ("bye", None, {"v": 1, "reason": "lifetime"})
        await leave()


async def test_third_stream_of_a_viewer_ends_the_first() -> None:
    """The newest two stay; another viewer's are its own."""
    async with TaskManager() as manager:
        client = client_of(manager)
        async with (
            client.stream("?viewer=a") as first,
            client.stream("?viewer=a") as second,
            client.stream("?viewer=b") as other,
            client.stream("?viewer=a"),
        ):
            await asyncio.sleep(0.1)
            assert first.complete
            assert of_kind(first, "bye") == [{"v": 1, "reason": "replaced"}]
            assert not second.complete
            assert not other.complete
        await leave()


async def test_viewers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused until one of the others is gone, and a known one is not."""
    monkeypatch.setattr(hubs, "MAX_VIEWERS", 2)
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream("?viewer=a"), client.stream("?viewer=b"):
            refused = await client.send("/v1/events?viewer=c")
            assert (refused.status, refused.headers["retry-after"]) == (429, "5")
            assert json.loads(refused.body)["error"]["code"] == "too_many_viewers"
            async with client.stream("?viewer=a") as again:
                assert again.status == 200
        await leave()
        assert (await client.send("/v1/events?viewer=c&poll=1")).status == 200
        await leave()


# -- a tick in slices ---------------------------------------------------------------------------------------


async def test_tick_pauses_after_each_slice() -> None:
    """It takes one pause per slice, and more slices for more tasks; on this clock, slices take no time."""
    durations: dict[int, float] = {}
    for size in (0, 3000):
        async with TaskManager() as manager:
            for number in range(size):
                manager.create_task(rest(), name=f"work_{'abc'[number % 3]}")
            client = client_of(manager)
            async with client.stream() as stream:
                await asyncio.sleep(0.98)
                for _ in range(300):
                    await asyncio.sleep(hubs.PAUSE)
                    if len(events(stream)) == 2:
                        durations[size] = asyncio.get_running_loop().time() % 1
                        break
            await manager.cancel_all_tasks()
            await leave()
        # Virtual time goes on.
        await asyncio.sleep(1 - asyncio.get_running_loop().time() % 1)
    counted = 3000 / TASKS_PER_SLICE
    assert durations[0] < 20 * hubs.PAUSE
    assert counted * hubs.PAUSE < durations[3000] - durations[0] < 10 * counted * hubs.PAUSE


@pytest.mark.parametrize("size", [0, 2000])
async def test_server_that_stops_between_two_slices_ends_the_tick(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, without publishing it, and the streams say why."""
    monkeypatch.setattr(hubs, "PAUSE", 0.1)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        async with TaskManager() as manager:
            for _ in range(size):
                manager.create_task(rest())
            client = client_of(manager)
            stream = client.connection("/v1/events")
            serving = asyncio.create_task(stream.run(client.app))
            await asyncio.sleep(1.15)
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0.01)
            assert serving.done()
            assert not ticking()
            assert [kind for kind, _, _ in events(stream)] == ["snapshot", "bye"]
            await manager.cancel_all_tasks()
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_last_viewer_that_leaves_between_two_slices_ends_the_feed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tick is finished, and the feed ends with its linger."""
    monkeypatch.setattr(hubs, "PAUSE", 0.1)
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream():
            await asyncio.sleep(1.15)
        await asyncio.sleep(hubs.LINGER - 0.5)
        assert ticking()
        await asyncio.sleep(3)
        assert not ticking()


async def test_ticks_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes longer than the interval delays the next, and the deltas still build on one another."""
    monkeypatch.setattr(hubs, "PAUSE", 0.3)
    open_ticks: list[int] = []
    slices = Feed.slices

    def counted(feed: Feed, *args: Any, **options: Any) -> Any:
        open_ticks.append(open_ticks[-1] + 1 if open_ticks else 1)
        result = yield from slices(feed, *args, **options)
        open_ticks.append(open_ticks[-1] - 1)
        return result

    monkeypatch.setattr(Feed, "slices", counted)
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream() as stream:
            await asyncio.sleep(10)
        found = events(stream)
        assert 2 <= len(found) < 10
        assert [data["base"] for _, _, data in found[1:]] == [event_id for _, event_id, _ in found[:-1]]
        assert max(open_ticks) == 1
        await leave()


async def test_viewers_that_come_together_share_the_first_tick() -> None:
    """All of them wait for it, and none gets an empty snapshot."""
    async with TaskManager() as manager:
        for _ in range(1500):
            manager.create_task(rest())
        client = client_of(manager)
        answers = await asyncio.gather(*(client.get("/v1/snapshot") for _ in range(5)))
        assert [answer["stats"]["live"] for answer in answers] == [1500] * 5
        assert len({answer["id"] for answer in answers}) == 1
        await manager.cancel_all_tasks()
        await leave()


async def test_viewers_are_told_when_the_first_tick_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They get a 503 each, the exception is logged once, and the next viewer is served."""
    async with TaskManager() as manager:
        client = client_of(manager)
        with monkeypatch.context() as patch:
            patch.setattr("otel_tasks.live.feed.group_row", None)
            answers = await asyncio.gather(*(client.send("/v1/snapshot") for _ in range(3)))
        assert [answer.status for answer in answers] == [503] * 3
        assert json.loads(answers[0].body)["error"]["code"] == "failed"
        assert len(caplog.records) == 1
        assert (await client.send("/v1/snapshot")).status == 200
        await leave()


async def test_feed_that_is_cancelled_before_it_starts_holds_nobody_up() -> None:
    """A clean-up of the loop's tasks may cancel it at any time."""
    async with TaskManager() as manager:
        client = client_of(manager)
        waiting = asyncio.create_task(client.send("/v1/snapshot"))
        await until_ticking()
        for task in asyncio.all_tasks():
            if task.get_name() == "otel_tasks.live":
                task.cancel()
        assert (await waiting).status == 503
        assert (await client.send("/v1/snapshot")).status == 200
        await leave()


async def test_server_that_stops_in_the_first_tick_refuses_its_viewers() -> None:
    """With the reason, like those who come later."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        async with TaskManager() as manager:
            for _ in range(2000):
                manager.create_task(rest())
            client = client_of(manager)
            waiting = asyncio.create_task(client.send("/v1/snapshot"))
            await until_ticking()
            await asyncio.sleep(0)
            signal.raise_signal(signal.SIGTERM)
            answer = await waiting
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "shutting_down")
            await manager.cancel_all_tasks()
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_only_the_rows_that_are_shown_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warnings look at 500 tasks, and a viewer who shows two of them pays for two rows."""
    read: list[int] = []
    encoded_rows = Feed.encoded_rows

    def counted(feed: Feed, tasks: Any) -> Any:
        read.append(len(tasks))
        return encoded_rows(feed, tasks)

    monkeypatch.setattr(Feed, "encoded_rows", counted)
    async with TaskManager() as manager:
        for _ in range(800):
            manager.create_task(rest())
        client = client_of(manager)
        async with client.stream("?expand=oldest:2"):
            await asyncio.sleep(4.5)
        # Also once per tick for the tasks that are being cancelled: none.
        assert set(read) == {0, 2}
        await manager.cancel_all_tasks()
        await leave()


# -- what a viewer has expanded -----------------------------------------------------------------------------


async def test_expanded_rows_come_whole_and_then_as_changes() -> None:
    """The first event of a key is full; later ones have what changed and what is gone."""
    async with TaskManager() as manager:
        tasks = [manager.create_task(rest(), group="mail") for _ in range(3)]
        client = client_of(manager)
        (key,) = [row["key"] for row in (await client.get("/v1/snapshot"))["classes"]]
        async with client.stream(f"?expand={key}:2") as stream:
            await asyncio.sleep(2.1)
            tasks[0].cancel()
            await asyncio.sleep(1)
        first, second = of_kind(stream, "rows")
        assert (first["key"], first["full"], first["total"]) == (key, True, 3)
        assert [row["id"] for row in first["set"]] == [task.uid for task in tasks[:2]]
        assert first["set"][0]["where"]["function"] == "rest"
        assert (second["full"], second["total"], second["gone"]) == (False, 2, [tasks[0].uid])
        assert [row["id"] for row in second["set"]] == [tasks[2].uid]
        await manager.cancel_all_tasks()
        await leave()


async def test_oldest_tasks_of_the_manager_can_be_expanded() -> None:
    """`oldest` has tasks of all groups, by the name that the client has used."""
    async with TaskManager() as manager:
        for group in ("a", "b", None):
            manager.create_task(rest(), group=group)
            await asyncio.sleep(0.1)
        client = client_of(manager)
        async with client.stream("?expand=oldest:2") as stream:
            pass
        (rows,) = of_kind(stream, "rows")
        assert (rows["key"], rows["total"], [row["group_id"] for row in rows["set"]]) == (
            "oldest",
            3,
            ["a", "b"],
        )
        await manager.cancel_all_tasks()
        await leave()


async def test_many_expanded_rows_are_read_in_turn() -> None:
    """One tick reads some 500 rows; the others come with the next ticks."""
    async with TaskManager() as manager:
        for name in "abc":
            for _ in range(400):
                manager.create_task(rest(), group=name)
        client = client_of(manager)
        keys = [row["key"] for row in (await client.get("/v1/snapshot"))["classes"]]
        query = "&".join(f"expand={key}:400" for key in keys)
        async with client.stream(f"?{query}") as stream:
            assert [len(rows["set"]) for rows in of_kind(stream, "rows")] == [400, 400, 400]
            await asyncio.sleep(0.5)
            for task in manager.overview(members={keys[0]: 1, keys[1]: 1, keys[2]: 1}).members.values():
                task[0].cancel()
            await asyncio.sleep(4)
        assert sorted(len(rows["gone"]) for rows in of_kind(stream, "rows")) == [0, 0, 0, 1, 1, 1]
        await manager.cancel_all_tasks()
        await leave()


async def test_panel_is_sent_when_it_changes() -> None:
    """The details of one task come at once, and again when something is different."""
    async with TaskManager() as manager:
        task = manager.create_task(rest())
        await settle()
        client = client_of(manager)
        async with client.stream(f"?task={task.uid}") as stream:
            await asyncio.sleep(2.1)
            manager.create_task(rest())
            await asyncio.sleep(1.1)
        first, second = of_kind(stream, "task")
        assert (first["task"]["id"], first["siblings"]["live"]) == (task.uid, 0)
        assert second["siblings"]["live"] == 1
        await manager.cancel_all_tasks()
        await leave()


async def test_panels_of_several_tabs_share_a_stream() -> None:
    """Each task is followed to its end, and beyond: one that nobody remembers is said to be forgotten."""
    async with TaskManager(history=1) as manager:
        tasks = [manager.create_task(rest(), name=f"task-{number}") for number in range(2)]
        await settle()
        client = client_of(manager)
        first, second = (task.uid for task in tasks)
        async with client.stream(f"?task={first}&task={second}&task=unknown&task={first}") as stream:
            await asyncio.sleep(1.1)
            tasks[0].cancel()
            await asyncio.sleep(1.1)
            tasks[1].cancel()
            await asyncio.sleep(1.1)
        said = [(panel["task"]["id"], panel["state"]) for panel in of_kind(stream, "task")]
        assert said[:3] == [(first, "live"), (second, "live"), ("unknown", "forgotten")]
        assert [state for uid, state in said if uid == first] == ["live", "ended", "forgotten"]
        assert said[-1] == (second, "ended")
        await leave()


async def test_many_panels_are_read_in_turn() -> None:
    """A tick reads a bounded number of them, and comes to each in the end."""
    async with TaskManager() as manager:
        tasks = [manager.create_task(rest(), group=f"group {number}") for number in range(25)]
        await settle()
        client = client_of(manager)
        uids = [task.uid for task in tasks]
        queries = ["&".join(f"task={uid}" for uid in uids[start : start + 10]) for start in (0, 10, 20)]
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(client.stream(f"?viewer=v{number}&{query}"))
                for number, query in enumerate(queries)
            ]
            for task in tasks:
                task.cancel()
            await asyncio.sleep(3.2)
        ended = [p["task"]["id"] for s in streams for p in of_kind(s, "task") if p["state"] == "ended"]
        assert sorted(ended) == sorted(uids)
        await leave()


# -- how a stream ends --------------------------------------------------------------------------------------


async def test_stream_ends_when_the_server_gets_its_signal() -> None:
    """At once, with `bye`; new viewers are refused while the server stops; its own handler is called."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        async with TaskManager() as manager:
            client = client_of(manager)
            stream = client.connection("/v1/events")
            serving = asyncio.create_task(stream.run(client.app))
            await asyncio.sleep(1.5)
            signal.raise_signal(signal.SIGTERM)
            await asyncio.sleep(0.1)
            assert serving.done()
            assert stream.complete
            assert events(stream)[-1] == ("bye", None, {"v": 1, "reason": "shutdown"})
            assert (await client.send("/v1/events")).status == 503
            await leave()
            # A process that goes on is served again.
            await asyncio.sleep(30)
            assert (await client.send("/v1/snapshot")).status == 200
            await leave()
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_signal_handler_is_there_only_with_viewers() -> None:
    """Afterwards the server's own handler is back."""
    before = signal.getsignal(signal.SIGINT)
    async with TaskManager() as manager:
        client = client_of(manager)
        async with client.stream():
            await asyncio.sleep(0.1)
            assert signal.getsignal(signal.SIGINT) is not before
        await leave()
        assert signal.getsignal(signal.SIGINT) is before


async def test_server_stop_calls_back_until_it_is_left() -> None:
    """The function is called in the loop, once for each signal, and not after the block."""
    calls: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with call_on_server_stop(lambda: calls.append(1)):
            signal.raise_signal(signal.SIGTERM)
            assert calls == []
            await settle()
            assert calls == [1]
        signal.raise_signal(signal.SIGTERM)
        await settle()
        assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "options", [{}, {"send_raises_after_disconnect": True}, {"receive_is_not_a_coroutine": True}]
)
async def test_stream_ends_when_the_client_leaves(options: dict[str, Any]) -> None:
    """Without waiting for the next tick, on each kind of server."""
    async with TaskManager() as manager:
        client = client_of(manager)
        stream = client.connection("/v1/events", **options)
        serving = asyncio.create_task(stream.run(client.app))
        await asyncio.sleep(1.2)
        stream.disconnect()
        await asyncio.sleep(0.01)
        assert serving.done()
        await serving
        await leave()


async def test_cancelled_stream_leaves_nothing() -> None:
    """A server that cancels the request ends the stream and its reader."""
    async with TaskManager() as manager:
        client = client_of(manager)
        stream = client.connection("/v1/events")
        serving = asyncio.create_task(stream.run(client.app))
        await asyncio.sleep(1.2)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
        assert stream.readers == 0
        await leave()


async def _pass(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    return await call_next(request)


@pytest.mark.parametrize("inside", ["middleware", "base"])
async def test_stream_under_the_middleware(inside: str) -> None:
    """`request_timeout` does not cut it short, its group is in no row, and a disconnect ends it quietly."""
    async with TaskManager() as manager:
        app = FastAPI()
        app.include_router(live_view(manager=manager, insecure=True), prefix="/tasks")
        if inside == "base":
            app.add_middleware(BaseHTTPMiddleware, dispatch=_pass)
        app.add_middleware(TaskGroupMiddleware, manager=manager, request_timeout=2.0)
        client = Client(app)
        async with client.stream() as stream:
            await asyncio.sleep(6.1)
            assert not stream.complete
        assert len(of_kind(stream, "delta")) == 6
        assert {len(data["set"]["groups"]) for data in of_kind(stream, "delta")} == {0}
        await leave()


async def test_feed_that_raises_is_logged_and_starts_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its streams end, and the next viewer is served."""
    async with TaskManager() as manager:
        client = client_of(manager)
        with monkeypatch.context() as patch:
            async with client.stream() as stream:
                patch.setattr("otel_tasks.live.feed.group_row", None)
                await asyncio.sleep(1.1)
                assert of_kind(stream, "bye") == [{"v": 1, "reason": "failed"}]
                assert stream.complete
        assert [record.getMessage() for record in caplog.records] == [
            "the feed of the live view raised, and its streams end"
        ]
        async with client.stream() as stream:
            await asyncio.sleep(1.1)
        assert len(of_kind(stream, "delta")) == 1
        await leave()
