"""Progress as FastAPI's server-sent events: in process on the virtual clock, then over a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import pytest
import uvicorn
from fastapi import FastAPI, Header
from fastapi.sse import EventSourceResponse, ServerSentEvent

from otel_tasks import ManagedTask, TaskInfo, TaskManager, current_task
from otel_tasks.asgi import TaskGroupMiddleware
from otel_tasks.fastapi import RequestTasks, progress_events
from otel_tasks.testing import FakeConnection, SpanRecorder
from tests.helpers import cancel_at_each_await, fail, give, rest, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Event(NamedTuple):
    """One event as a browser would see it."""

    name: str
    id: str
    data: Any


def parse(stream: bytes) -> list[Event]:
    """The events of a stream, comments left out."""
    found = []
    for block in stream.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append(Event(fields["event"], fields["id"], without_stamps(json.loads(fields["data"]))))
    return found


def without_stamps(data: dict[str, Any]) -> dict[str, Any]:
    """The data of an event, as far as it is the same in every run."""
    for snapshot in (data, data.get("progress") or {}):
        snapshot.pop("updated_at", None)
    return data


def comments(stream: bytes) -> list[str]:
    """The comments of a stream."""
    return [line[2:] for line in stream.decode().splitlines() if line.startswith(": ")]


async def count_to(total: int, every: float = 1.0) -> None:
    """Report 0 of ``total``, then one more each ``every`` seconds."""
    task = current_task()
    assert task is not None
    task.progress.update(done=0, total=total)
    for number in range(1, total + 1):
        await asyncio.sleep(every)
        task.progress.update(done=number)


@pytest.fixture
def manager(spans: SpanRecorder) -> TaskManager:
    return TaskManager("test", tracer_provider=spans.provider)


@pytest.fixture
def app(manager: TaskManager) -> FastAPI:
    app = add_routes(FastAPI(), manager)
    app.add_middleware(TaskGroupMiddleware, manager=manager)
    return app


def add_routes(app: FastAPI, manager: TaskManager) -> FastAPI:
    """Two streams: of a task of the manager, and of one that belongs to the request."""

    @app.get("/jobs/{name}", response_class=EventSourceResponse)
    async def job(
        name: str,
        last_event_id: Annotated[str | None, Header()] = None,
        interval: float = 0.0,
        keep_alive: float | None = None,
    ) -> AsyncIterator[ServerSentEvent]:
        info = manager.get_task_info(name)
        assert info is not None
        task = info if info.status.is_final else manager.get_task(name)
        async for event in progress_events(
            task, last_event_id=last_event_id, interval=interval, keep_alive=keep_alive
        ):
            yield event

    @app.get("/own", response_class=EventSourceResponse)
    async def own(tasks: RequestTasks) -> AsyncIterator[ServerSentEvent]:
        async for event in progress_events(tasks.create_task(count_to(5), name="own")):
            yield event

    return app


async def get(app: FastAPI, path: str, query: str = "", **headers: str) -> bytes:
    """The whole body of a stream that ends by itself."""
    connection = FakeConnection(
        path=path, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )
    connection.scope["query_string"] = query.encode()
    await connection.run(app)
    assert connection.status == 200
    assert connection.headers["content-type"].startswith("text/event-stream")
    return connection.body


def info_of(manager: TaskManager, name: str) -> TaskInfo:
    """The state of a task."""
    info = manager.get_task_info(name)
    assert info is not None
    return info


# --- the events ------------------------------------------------------------------------------------------


async def test_each_report_is_an_event_and_the_end_is_the_last(app: FastAPI, manager: TaskManager) -> None:
    """Every event has a name, an id that no other has, and JSON; the last says how the task ended."""
    manager.create_task(count_to(3), name="job")
    *events, last = parse(await get(app, "/jobs/job"))
    assert [event.name for event in events] == ["progress"] * 4
    assert [event.data["done"] for event in events] == [0, 1, 2, 3]
    assert [event.data["fraction"] for event in events] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert events[2].data["seconds_left"] == pytest.approx(1.0)
    assert len({event.id for event in [*events, last]}) == 5
    assert last.name == "ended"
    assert last.data.pop("progress") == events[-1].data
    assert last.data == {"status": "completed", "cancel_reason": None, "duration": pytest.approx(3.0)}


async def test_a_task_that_never_reports_has_one_event(app: FastAPI, manager: TaskManager) -> None:
    """The stream lasts as long as the task, and tells its end."""
    manager.create_task(asyncio.sleep(2), name="job")
    (event,) = parse(await get(app, "/jobs/job"))
    assert (event.name, event.data["status"], event.data["progress"]) == ("ended", "completed", None)


async def test_a_failure_is_sent_without_its_text(app: FastAPI, manager: TaskManager) -> None:
    """An exception's text is not for clients: it may name hosts, paths, and people."""
    task = manager.create_task(fail(ValueError("secret of the house")), name="job")
    stream = await get(app, "/jobs/job")
    assert parse(stream)[-1].data["status"] == "failed"
    assert b"secret" not in stream
    await asyncio.gather(task, return_exceptions=True)


async def test_a_cancellation_is_sent_with_its_kind(app: FastAPI, manager: TaskManager) -> None:
    """The last event says that the task was cancelled and by what kind of cause, not in whose words."""
    task = manager.create_task(rest(), name="job")
    watching = asyncio.create_task(get(app, "/jobs/job"))
    await asyncio.sleep(1)
    await manager.cancel_task("job", "words of the house")
    stream = await watching
    assert task.cancelled()
    assert parse(stream)[-1].data["status"] == "cancelled"
    assert parse(stream)[-1].data["cancel_reason"] == "explicit"
    assert b"words" not in stream


async def test_a_late_client_gets_the_end(app: FastAPI, manager: TaskManager) -> None:
    """A task that has ended has a record: one event, with the last progress."""
    await manager.create_task(count_to(2), name="job")
    await settle()
    (event,) = parse(await get(app, "/jobs/job"))
    assert event.name == "ended"
    assert event.data["progress"]["fraction"] == 1.0


async def test_an_ended_task_tells_its_last_progress_and_its_end(manager: TaskManager) -> None:
    """The object of an ended task will do as well, and so will its record: the end has the same id."""
    task = manager.create_task(count_to(1), name="job")
    await asyncio.wait([task])
    events = [event async for event in progress_events(task)]
    assert [event.event for event in events] == ["progress", "ended"]
    assert [event.id async for event in progress_events(task.info())] == [events[-1].id]
    await settle()
    assert [event.id async for event in progress_events(info_of(manager, "job"))] == [events[-1].id]


async def test_reports_within_the_interval_are_left_out_and_the_end_is_not_late(
    app: FastAPI, manager: TaskManager
) -> None:
    """A task that reports a hundred times a second makes one event per interval."""
    started = asyncio.get_running_loop().time()
    manager.create_task(count_to(100, every=0.01), name="job")
    *events, end = parse(await get(app, "/jobs/job", "interval=0.3001"))
    assert [event.data["done"] for event in events] == [0, 30, 60, 90, 100]
    assert end.data["duration"] == pytest.approx(1.0)
    assert asyncio.get_running_loop().time() - started == pytest.approx(1.0, abs=0.001)


async def test_without_bound_the_interval_leaves_the_first_and_the_last(manager: TaskManager) -> None:
    """An infinite interval gives what is there, then what is there at the end."""
    task = manager.create_task(count_to(5))
    await settle()
    events = [event.data async for event in progress_events(task, interval=math.inf)]
    assert [data["done"] for data in events[:-1]] == [0, 5]


# --- coming back -----------------------------------------------------------------------------------------


async def test_a_client_that_reconnects_gets_newer_events(app: FastAPI, manager: TaskManager) -> None:
    """No event is sent twice, whether it reconnects at once or after the same report was repeated."""
    manager.create_task(count_to(6), name="job")
    first = asyncio.create_task(get(app, "/jobs/job"))
    await asyncio.sleep(3.5)
    again = asyncio.create_task(get(app, "/jobs/job"))
    await asyncio.sleep(0.1)
    everything = parse(await first)
    known = next(event for event in everything if event.data.get("done") == 3)
    missed = parse(await again)
    assert missed == everything[3:]
    manager.create_task(give(1))
    assert parse(await get(app, "/jobs/job", last_event_id=known.id)) == everything[-1:]


async def test_a_client_that_knows_the_newest_waits_for_the_next(app: FastAPI, manager: TaskManager) -> None:
    """With the id of the current snapshot the first event is the one after it."""
    task = manager.create_task(count_to(4), name="job")
    await asyncio.sleep(2.5)
    async for event in progress_events(task):
        assert event.id is not None
        newer = parse(await get(app, "/jobs/job", last_event_id=event.id))
        assert [each.data["done"] for each in newer[:-1]] == [3, 4]
        break


async def test_a_client_that_knows_the_end_gets_nothing(app: FastAPI, manager: TaskManager) -> None:
    """A browser that did not close its source comes back with the last id; the stream is empty."""
    task = manager.create_task(count_to(1), name="job")
    end = parse(await get(app, "/jobs/job"))[-1]
    assert await get(app, "/jobs/job", last_event_id=end.id) == b""
    assert [event async for event in progress_events(task, last_event_id=end.id)] == []


@pytest.mark.parametrize(
    "wrong", ["", "-", "7", "end", "{key}-", "{key}-x", "{key}--1", "{key}-" + "9" * 5000]
)
async def test_an_id_that_is_none_counts_as_none(manager: TaskManager, wrong: str) -> None:
    """The header is the client's, and may say anything: then it gets the current snapshot."""
    task = manager.create_task(count_to(3))
    await asyncio.sleep(1.5)
    async for event in progress_events(task):
        assert event.id is not None
        key = event.id.rpartition("-")[0]
        break
    found = [each.data async for each in progress_events(task, last_event_id=wrong.format(key=key))]
    assert [data["done"] for data in found[:-1]] == [1, 2, 3]


async def test_an_id_of_an_earlier_task_of_the_same_name_counts_as_none(manager: TaskManager) -> None:
    """An event id of the earlier job says nothing about this one, however far that one got."""
    before = manager.create_task(count_to(9), name="job")
    *_, end = [event.id async for event in progress_events(before)]
    task = manager.create_task(count_to(1), name="job")
    found = [event.data async for event in progress_events(task, last_event_id=end)]
    assert [data["done"] for data in found[:-1]] == [0, 1]


# --- silence and leaving ---------------------------------------------------------------------------------


async def test_a_silent_task_is_kept_alive_by_comments(app: FastAPI, manager: TaskManager) -> None:
    """One each `keep_alive` seconds since the last word; they are no events and have no id."""
    task = manager.create_task(rest(), name="job")
    watching = asyncio.create_task(get(app, "/jobs/job", "keep_alive=2"))
    await asyncio.sleep(5)
    task.progress.update(message="a word")
    await asyncio.sleep(3)
    task.cancel()
    stream = await watching
    assert comments(stream) == ["keep-alive"] * 3
    assert [event.name for event in parse(stream)] == ["progress", "ended"]


async def test_without_a_time_fastapi_keeps_it_alive(app: FastAPI, manager: TaskManager) -> None:
    """FastAPI sends a comment each 15 s of its own accord."""
    manager.create_task(asyncio.sleep(50), name="job")
    assert comments(await get(app, "/jobs/job")) == ["ping"] * 3


@pytest.mark.parametrize("bound", [True, False], ids=["middleware", "no middleware"])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_a_client_that_leaves_ends_the_watching_and_not_the_task(
    manager: TaskManager, bound: bool, spec_version: str
) -> None:
    """A task of the application continues; nothing waits for its progress any more."""
    app = add_routes(FastAPI(), manager)
    if bound:
        app.add_middleware(TaskGroupMiddleware, manager=manager)
    task = manager.create_task(count_to(10), name="job")
    connection = FakeConnection(
        path="/jobs/job", spec_version=spec_version, send_raises_after_disconnect=not bound
    )
    request = asyncio.create_task(connection.run(app))
    await asyncio.sleep(3.5)
    assert task.progress._waiters
    connection.disconnect()
    # Without the middleware, a server of the newer kind tells by an error at the next event.
    (result,) = await asyncio.gather(request, return_exceptions=True)
    assert bound is (result is None) or spec_version == "2.3"
    assert len(parse(connection.body)) in (4, 5)
    assert not task.progress._waiters
    assert not task.done()
    await task
    assert info_of(manager, "job").status == "completed"


async def test_a_client_that_leaves_takes_its_own_task_along(app: FastAPI, manager: TaskManager) -> None:
    """A task of the request's group is cancelled with the request, watched or not."""
    connection = FakeConnection(path="/own")
    request = asyncio.create_task(connection.run(app))
    await asyncio.sleep(2.5)
    connection.disconnect()
    await request
    assert len(parse(connection.body)) == 3
    (info,) = manager.get_all_task_info().values()
    assert info.status == "cancelled"
    assert info.cause is not None
    assert info.cause.kind == "client_disconnect"
    assert info.progress is not None
    assert info.progress.done == 2


async def test_a_request_may_watch_its_own_task_to_the_end(app: FastAPI) -> None:
    """The stream of a task of the request's group ends with it, and the request with the stream."""
    assert [event.name for event in parse(await get(app, "/own"))] == ["progress"] * 6 + ["ended"]


async def test_many_clients_watch_one_task(app: FastAPI, manager: TaskManager) -> None:
    """All see the same events, and none is left behind."""
    task = manager.create_task(count_to(3), name="job")
    streams = await asyncio.gather(*(get(app, "/jobs/job") for _ in range(20)))
    assert all(parse(stream) == parse(streams[0]) for stream in streams)
    assert task.progress._waiters is None


def test_each_wait_of_the_events_can_be_cancelled(spans: SpanRecorder) -> None:
    """Cancelled at whatever await, the stream leaves no future, no task and no span."""

    async def scenario(manager: TaskManager) -> None:
        task = manager.create_task(count_to(2, every=0.3))
        try:
            async for _ in progress_events(task, keep_alive=0.2):
                pass
        finally:
            assert not task.progress._waiters

    assert cancel_at_each_await(scenario, spans) >= 8


# --- refusals --------------------------------------------------------------------------------------------


async def test_a_snapshot_of_a_live_task_is_refused(manager: TaskManager) -> None:
    """It cannot be followed; the error says what can."""
    task = manager.create_task(rest(), name="job")
    with pytest.raises(
        ValueError, match=r"which is pending: pass the task itself, manager\.get_task\('job'\)"
    ):
        progress_events(task.info())
    task.cancel()
    await asyncio.wait([task])


async def test_argument_that_is_no_task_is_refused() -> None:
    """At the call, not at the first event: then the response has begun."""
    plain: Any = asyncio.create_task(give(1))
    with pytest.raises(TypeError, match="takes a ManagedTask, or the TaskInfo of a task that has ended"):
        progress_events(plain)
    await plain


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interval": -1}, "interval must be at least 0"),
        ({"keep_alive": -1}, "keep_alive must be at least 0"),
        ({"keep_alive": 0.1}, r"keep_alive must be greater than interval \(0.1 s\), got 0.1"),
        ({"interval": 0, "keep_alive": 0}, "keep_alive must be greater"),
        ({"interval": math.inf, "keep_alive": 5}, "keep_alive must be greater"),
    ],
)
async def test_durations_out_of_range_are_refused(
    manager: TaskManager, options: dict[str, Any], words: str
) -> None:
    """A silence can only be broken when nothing else is waited for."""
    task = manager.create_task(give(1))
    with pytest.raises(ValueError, match=words):
        progress_events(task, **options)
    await task


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interval": None}, "got None: leave it out for 0.1, or pass 0 for every report"),
        ({"interval": "1s"}, "interval must be seconds as a number, got '1s': leave"),
        ({"keep_alive": "1s"}, "keep_alive must be seconds as a number"),
    ],
)
async def test_durations_that_are_no_numbers_are_refused(
    manager: TaskManager, options: dict[str, Any], words: str
) -> None:
    """They are refused at once, in the route, and not as a stream without events."""
    task = manager.create_task(give(1))
    with pytest.raises(TypeError, match=words):
        progress_events(task, **options)
    await task


async def test_the_stamps_of_a_virtual_clock_are_of_today(manager: TaskManager) -> None:
    """The stamps of a virtual clock start today and count its seconds."""
    task = manager.create_task(count_to(2))
    await asyncio.sleep(1000.0)
    report = task.progress.snapshot()
    assert report is not None
    stamp = datetime.fromisoformat(report.to_dict()["updated_at"]).timestamp()
    assert stamp == pytest.approx(time.time() + 2.0, abs=60.0)
    assert datetime.fromisoformat(task.info().to_dict()["ended_at"]).timestamp() == pytest.approx(stamp)


async def test_an_older_fastapi_raises_an_error_that_names_the_version(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the adapter works there; this function names the version that it needs."""
    monkeypatch.setitem(sys.modules, "fastapi.sse", None)
    task = manager.create_task(give(1))
    with pytest.raises(RuntimeError, match=r"FastAPI 0\.135 or newer, and this is \d"):
        progress_events(task)
    await task


# --- over a real server ----------------------------------------------------------------------------------


class RawClient:
    """A GET over a socket of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def asking(cls, port: int, path: str, **headers: str) -> AsyncIterator[RawClient]:
        """Ask, and hang up at the end of the block."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = [f"GET {path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert head.startswith("http/1.1 200")
            assert "content-type: text/event-stream" in head
            assert "transfer-encoding: chunked" in head
            yield cls(reader, writer)
        finally:
            writer.close()
            await writer.wait_closed()

    async def chunk(self) -> bytes:
        """The next piece of the body; empty at its end."""
        size = int(await self._reader.readuntil(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def events(self) -> AsyncIterator[Event]:
        """The events up to the end of the body."""
        while block := await self.chunk():
            for event in parse(block):
                yield event


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[int]:
    """The port of a uvicorn that serves ``app`` in this loop, and has ended when the block is left."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=5)
    )
    running = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(60):
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.01)
        port: int = server.servers[0].sockets[0].getsockname()[1]
        yield port
    finally:
        server.should_exit = True
        await running


async def eventually(holds: Any) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110 - what is waited for happens in the server
            await asyncio.sleep(0.005)


@pytest.mark.e2e
@pytest.mark.real_clock
async def test_over_a_socket_the_events_arrive_as_they_are_made(app: FastAPI, manager: TaskManager) -> None:
    """Each event comes when it is reported, not when the stream ends."""
    task = manager.create_task(rest(), name="job")
    async with serving(app) as port, asyncio.timeout(60), RawClient.asking(port, "/jobs/job") as client:
        for number in range(3):
            task.progress.update(done=number, total=3)
            (event,) = parse(await client.chunk())
            assert (event.name, event.data["done"]) == ("progress", number)
        task.cancel()
        assert [event.name async for event in client.events()] == ["ended"]


@pytest.mark.e2e
@pytest.mark.real_clock
async def test_over_a_socket_a_client_hangs_up_and_resumes(app: FastAPI, manager: TaskManager) -> None:
    """The hang-up ends the watching and not the task; with the last id, the client resumes where it was."""
    task = manager.create_task(rest(), name="job")
    async with serving(app) as port, asyncio.timeout(60):
        async with RawClient.asking(port, "/jobs/job") as client:
            task.progress.update(done=1, total=10)
            (known,) = parse(await client.chunk())
            await eventually(lambda: task.progress._waiters)
        await eventually(lambda: not task.progress._waiters)
        assert not task.done()
        assert manager.stats().live == 1
        async with RawClient.asking(port, "/jobs/job", last_event_id=known.id) as client:
            await eventually(lambda: task.progress._waiters)
            task.progress.update(done=2)
            (event,) = parse(await client.chunk())
            assert event.data["done"] == 2
        task.progress.update(done=3)
        async with RawClient.asking(port, "/jobs/job", last_event_id=event.id) as client:
            assert parse(await client.chunk())[0].data["done"] == 3
            task.cancel()
            (end,) = [event async for event in client.events()]
        async with RawClient.asking(port, "/jobs/job", last_event_id=end.id) as client:
            assert await client.chunk() == b""


@pytest.mark.e2e
@pytest.mark.real_clock
async def test_over_a_socket_silence_is_kept_alive(app: FastAPI, manager: TaskManager) -> None:
    """Comments arrive while the task reports nothing, and the stream still works afterwards."""
    task = manager.create_task(rest(), name="job")
    async with (
        serving(app) as port,
        asyncio.timeout(60),
        RawClient.asking(port, "/jobs/job?keep_alive=0.02") as client,
    ):
        for _ in range(3):
            assert await client.chunk() == b": keep-alive\n\n"
        task.progress.update(message="awake")
        while not (found := parse(await client.chunk())):
            pass
        assert found[0].data["message"] == "awake"
        task.cancel()
        assert [event.name async for event in client.events()] == ["ended"]


@pytest.mark.e2e
@pytest.mark.real_clock
async def test_over_a_socket_a_hang_up_cancels_the_requests_own_task(
    app: FastAPI, manager: TaskManager
) -> None:
    """The request's own task ends with it: cancelled, with the disconnect as its cause."""
    ended: list[TaskInfo] = []
    manager.add_listener(lambda event, info: ended.append(info) if event == "ended" else None)
    async with serving(app) as port, asyncio.timeout(60):
        async with RawClient.asking(port, "/own") as client:
            assert parse(await client.chunk())[0].data["done"] == 0
        await eventually(lambda: ended)
    assert ended[0].cause is not None
    assert ended[0].cause.kind == "client_disconnect"
    assert manager.stats().live == 0


async def test_the_tasks_type_is_kept(manager: TaskManager) -> None:
    """A task stays what it is when its progress is shown."""
    task: ManagedTask[int] = manager.create_task(give(1))
    _ = [event async for event in progress_events(task)]
    assert task.result() == 1
