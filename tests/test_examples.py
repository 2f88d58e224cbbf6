from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import HTTPException
from fastapi.security import HTTPBasicCredentials
from rich.console import Console

from examples import demo, fastapi_app, server_process
from examples.otlp_receiver import receiver
from examples.trace_tree import Span, missing_parents, trace_tree
from otel_tasks.testing import FakeConnection
from tests.processes import marked_environment, marked_processes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_tasks import TaskInfo

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo.py"
LINUX = Path("/proc/self/environ").exists()


# --- the service ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_service() -> Iterator[None]:
    """No spans, orders or remembered tasks from another test."""
    fastapi_app.recent_spans.spans.clear()
    fastapi_app.orders.clear()
    fastapi_app.manager.cleanup_completed_tasks()
    yield
    fastapi_app.manager.cleanup_completed_tasks()


def infos() -> dict[str, TaskInfo]:
    """The end of each task, by the last part of its id: the name."""
    return {info.name: info for info in fastapi_app.manager.get_all_task_info().values()}


def get(path: str, query: str = "") -> FakeConnection:
    """A request without a body."""
    connection = FakeConnection(path=path)
    connection.scope["query_string"] = query.encode()
    return connection


def post(path: str, body: dict[str, str]) -> FakeConnection:
    """A request with a JSON body."""
    return FakeConnection(
        method="POST",
        path=path,
        headers={"content-type": "application/json"},
        body=json.dumps(body).encode(),
    )


async def hang_up_after(seconds: float, connection: FakeConnection) -> None:
    """Run the request, and let its client leave after that time."""
    request = asyncio.create_task(connection.run(fastapi_app.app))
    await asyncio.sleep(seconds)
    connection.disconnect()
    await request


async def test_search_returns_partial_results_when_a_supplier_fails() -> None:
    """A failed supplier is named as missing; the others' offers are there, both hotel chains included."""
    connection = get("/search/Lisbon", "fail=trains")
    await connection.run(fastapi_app.app)
    answer = json.loads(connection.body)
    assert connection.status == 200
    assert set(answer["offers"]) == {"flights", "hotels", "events"}
    assert len(answer["offers"]["hotels"]) == 4
    assert answer["missing"] == {"trains": "SupplierError('trains answered 503')"}


async def test_search_does_not_wait_for_a_supplier_past_its_timeout() -> None:
    """A supplier that is too slow runs into its own timeout and is left out."""
    clock = asyncio.get_running_loop().time
    started = clock()
    connection = get("/search/Rome", "slow=events")
    await connection.run(fastapi_app.app)
    assert set(json.loads(connection.body)["missing"]) == {"events"}
    assert clock() - started == pytest.approx(1.2)


async def test_a_failing_hotel_chain_cancels_the_other_and_counts_as_one_failure() -> None:
    """The nested group is scoped: one failed chain ends it as a whole, and the request continues."""
    connection = get("/search/Rome", "fail=harbour")
    await connection.run(fastapi_app.app)
    assert set(json.loads(connection.body)["missing"]) == {"hotels"}
    cause = infos()["station"].cause
    assert cause is not None
    assert cause.kind == "sibling_failed"


async def test_hanging_up_a_search_stops_everything_below_it() -> None:
    """All tasks that are still running end as cancelled, because the client left."""
    connection = get("/search/Oslo")
    await hang_up_after(0.27, connection)
    assert connection.status == 499
    causes = {name: info.cause.kind for name, info in infos().items() if info.cause}
    assert causes == dict.fromkeys(["flights", "hotels", "harbour", "station", "events"], "client_disconnect")
    assert infos()["trains"].status == "completed"


async def test_an_order_whose_client_hangs_up_is_paid_and_confirmed() -> None:
    """The payment is not interrupted and its message is sent; only work for the response is cancelled."""
    connection = post("/orders", {"reference": "a-1", "city": "Oslo"})
    await hang_up_after(0.12, connection)
    assert fastapi_app.orders == {"a-1": "paid"}
    await fastapi_app.manager.join()
    assert fastapi_app.orders == {"a-1": "confirmed"}
    ended = infos()
    assert ended["charge"].status == "completed"
    assert ended["send_confirmation"].status == "completed"
    assert ended["draw_map"].status == "cancelled"


async def test_an_order_can_be_read_afterwards() -> None:
    """A client that waits gets the order and its map, and can ask again by its reference."""
    placed = post("/orders", {"reference": "a-2", "city": "Oslo"})
    await placed.run(fastapi_app.app)
    assert json.loads(placed.body) == {"reference": "a-2", "status": "paid", "map": "map of Oslo"}
    read = get("/orders/a-2")
    await read.run(fastapi_app.app)
    assert json.loads(read.body)["status"] == "confirmed"
    unknown = get("/orders/a-3")
    await unknown.run(fastapi_app.app)
    assert unknown.status == 404


async def test_a_stream_ends_with_its_client() -> None:
    """Lines come until the client leaves; then the task that waits for the next one is cancelled."""
    connection = get("/departures/Oslo")
    await hang_up_after(0.35, connection)
    assert len(connection.body.splitlines()) == 3
    ends = [span.attributes for span in fastapi_app.recent_spans.spans if span.name == "next_departure"]
    outcomes = [end["otel_tasks.task.outcome"] for end in ends if end is not None]
    assert outcomes == ["success", "success", "success", "cancelled"]


async def test_a_websockets_tasks_end_with_it() -> None:
    """Each city that the client names is watched by a task, until the client closes."""
    connection = FakeConnection.websocket("/alerts")
    connection.feed("Oslo")
    connection.feed("Rome")
    await hang_up_after(0.5, connection)  # It closes in order, as a browser does.
    texts = [message["text"] for message in connection.sent if message["type"] == "websocket.send"]
    assert {text.split(":")[0] for text in texts} == {"Oslo", "Rome"}
    ended = fastapi_app.manager.get_all_task_info().values()
    assert [(info.status, info.cause.kind) for info in ended if info.cause] == [
        ("cancelled", "scope_ended")
    ] * 2


async def test_an_export_outlives_its_request_and_reports_progress() -> None:
    """The job belongs to the application; its stream ends with it, and a late client gets the end."""
    started = post("/exports", {"city": "Oslo"})
    await started.run(fastapi_app.app)
    assert started.status == 202
    uid, path = json.loads(started.body).values()
    assert fastapi_app.manager.get_task(uid).group.name == "exports"
    await asyncio.sleep(0.51)
    running = get("/exports")
    await running.run(fastapi_app.app)
    assert json.loads(running.body)["fraction"] == 0.5
    watching, late = get(path), get(path)
    await watching.run(fastapi_app.app)
    lines = watching.body.decode().splitlines()
    assert [line for line in lines if line.startswith("event")][-2:] == ["event: progress", "event: ended"]
    assert '"message": "page 20 of 20"' in lines[-3]
    info = fastapi_app.manager.get_task_info(uid)
    assert info is not None
    assert info.status == "completed"
    await late.run(fastapi_app.app)
    assert late.body.decode().splitlines()[0] == "event: ended"


async def test_an_export_continues_when_its_watcher_leaves() -> None:
    """A client that hangs up ends its own stream alone."""
    started = post("/exports", {"city": "Oslo"})
    await started.run(fastapi_app.app)
    uid, path = json.loads(started.body).values()
    watching = get(path)
    await hang_up_after(0.3, watching)
    assert b"ended" not in watching.body
    await fastapi_app.manager.join()
    info = fastapi_app.manager.get_task_info(uid)
    assert info is not None
    assert info.status == "completed"


@pytest.mark.parametrize("name", ["nobody", "send_confirmation"])
async def test_only_exports_can_be_watched(name: str) -> None:
    """Other tasks are not found, even a task of that name in another group."""
    task = fastapi_app.manager.create_task(asyncio.sleep(1), name="send_confirmation", group="outbox")
    unknown = get(f"/exports/{name}/progress")
    await unknown.run(fastapi_app.app)
    assert unknown.status == 404
    await task


@pytest.mark.real_clock
async def test_a_thread_sees_that_the_client_has_left() -> None:
    """A `def` endpoint cannot be cancelled, but stops at once because it reads the group's event."""
    connection = get("/brochure/Oslo", "pages=100000")
    async with asyncio.timeout(60.0):
        await hang_up_after(0.2, connection)
    assert connection.status in (499, None)


async def test_the_services_spans_form_one_trace() -> None:
    """A request's tasks are below its span, the nested group's below the group's."""
    await hang_up_after(0.27, get("/search/Oslo"))
    spans = {span.name: span for span in fastapi_app.recent_spans.spans}
    assert (
        set(spans)
        == {
            "GET /search/{city}",
            "flights",
            "hotels",
            "trains",
            "events",
            "harbour",
            "station",
        }
        or len(fastapi_app.recent_spans.spans) == 8
    )
    request = next(span for span in fastapi_app.recent_spans.spans if span.name == "GET /search/{city}")
    assert len({span.context.trace_id for span in fastapi_app.recent_spans.spans if span.context}) == 1
    assert request.attributes is not None
    assert request.attributes["http.response.status_code"] == 499
    assert request.attributes["otel_tasks.request.outcome"] == "client_disconnect"


# --- the picture ---------------------------------------------------------------------------------------


def span(name: str, start: float, end: float, parent: str | None = None, **attributes: Any) -> Span:
    """A span whose id is its name."""
    return Span("t", name, parent, name, start, end, {"otel_tasks.task.id": name} | attributes)


def drawn(*spans: Span, **options: Any) -> list[str]:
    """The lines of the picture."""
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(trace_tree(spans, **options))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_tree_is_drawn_with_children_below_parents() -> None:
    """Children stand below their parent in the order of their start, and so do their bars."""
    lines = drawn(span("late", 0.5, 1.0, "root"), span("root", 0.0, 1.0), span("early", 0.0, 0.5, "root"))
    assert [line.split("  ")[0].strip() for line in lines[1:]] == ["root", "├─ early", "└─ late"]
    assert [line.count("█") for line in lines[1:]] == [30, 15, 15]
    assert lines[3].index("█") == lines[2].rindex("█") + 1


def test_the_moment_of_the_hang_up_is_marked() -> None:
    """The mark is above the bars, where the client left, on either side of its label."""
    late = drawn(span("root", 0.0, 1.0), hung_up_at=0.5)[0]
    early = drawn(span("root", 0.0, 1.0), hung_up_at=0.0)[0]
    assert "client leaves ▼" in late
    assert "▼ client leaves" in early
    bar = drawn(span("root", 0.0, 1.0))[1].index("█")
    assert late.index("▼") == bar + 15
    assert early.index("▼") == bar


def test_a_span_whose_parent_did_not_come_hangs_below_a_line_that_says_so() -> None:
    """An incomplete trace, as Jaeger calls it, is drawn below the trees that have a root."""
    lines = drawn(
        span("first", 0.0, 1.0, "lost"),
        span("below", 0.0, 1.0, "first"),
        span("second", 0.5, 1.0, "lost"),
        span("root", 0.9, 1.0),
    )
    assert [line.partition("█")[0].strip() for line in lines[1:]] == [
        "root",
        "no root span",
        "├─ first",
        "│  └─ below",
        "└─ second",
    ]


def test_a_call_without_its_caller_has_no_root_either() -> None:
    """The client's span is left out of the picture for the server's, and what is missing above it is not."""
    server = {"http.request.method": "GET", "http.response.status_code": 200}
    call = span("call", 0.0, 1.0, "lost")
    tree = [replace(call, kind="CLIENT"), span("request", 0.0, 1.0, "call", **server)]
    assert [line.partition("█")[0].strip() for line in drawn(*tree)[1:]] == ["no root span", "└─ request"]
    tree[0] = replace(tree[0], parent_id=None)
    assert [line.partition("█")[0].strip() for line in drawn(*tree)[1:]] == ["request"]


# --- the live view ---------------------------------------------------------------------------------------


async def look_at_tasks(client: str) -> httpx.Response:
    """Open the live view from an address."""
    transport = httpx.ASGITransport(fastapi_app.app, client=(client, 50_000))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
        return await http.get("/tasks/")


async def test_live_view_without_a_password_answers_this_machine_alone() -> None:
    """`make demo` needs none; in a container, no client is local."""
    assert (await look_at_tasks("127.0.0.1")).status_code == 200
    assert (await look_at_tasks("172.18.0.1")).status_code == 403


def test_password_of_the_live_view_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's name goes into the log; a wrong password makes the browser ask again."""
    monkeypatch.setattr(fastapi_app, "password", "travel")
    assert fastapi_app.viewer(HTTPBasicCredentials(username="ann", password="travel")) == "ann"
    with pytest.raises(HTTPException) as refused:
        fastapi_app.viewer(HTTPBasicCredentials(username="ann", password="trável"))
    assert refused.value.status_code == 401
    assert refused.value.headers == {"WWW-Authenticate": "Basic"}


# --- the demo ------------------------------------------------------------------------------------------


@pytest.fixture
def environment() -> dict[str, str]:
    """An environment that marks all processes of one test, and leads no spans elsewhere."""
    return marked_environment()


@pytest.mark.e2e
def test_the_demo_shows_each_request_as_a_tree(tmp_path: Path, environment: dict[str, str]) -> None:
    """The demo ends well, draws four trees with outcomes and causes, a bar, counts, and leaves no process."""
    picture = tmp_path / "images" / "demo.svg"
    done = subprocess.run(
        [sys.executable, DEMO, "--svg", picture],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second, third, fourth = re.split(r"^\d\. ", done.stdout, flags=re.MULTILINE)[1:]
    assert re.search(r"trains .*error: trains answered 503", first)
    assert re.search(r"GET /search/\{city\} .* 200", first)
    assert re.search(r"GET /search/\{city\} .* 499 client_disconnect \(tasks cancelled: \d\)", second)
    for name in ("flights", "hotels", "station", "events"):
        assert re.search(rf"─ {name} .* cancelled: client_disconnect <- GET /search", second), name
    assert "client leaves ▼" in second
    assert re.search(r"events .* timeout", third)
    assert re.search(r"draw_map .* cancelled: client_disconnect", fourth)
    assert re.search(r"charge .* success", fourth)
    assert re.search(r"send_confirmation .* success", fourth)
    assert "the order whose client hung up: confirmed" in done.stdout
    assert re.search(r"its client watches:\nwrite_export ━+ 24 of 24 pages, completed", done.stdout)
    took = re.findall(r"last task ended ([\d.]+) ms after the hang-up", done.stdout)
    assert len(took) == 2
    assert "http://localhost:16686" in done.stdout
    assert picture.read_text().startswith("<svg")
    assert marked_processes(environment) == set()


@pytest.mark.e2e
@pytest.mark.skipif(not LINUX, reason="needs a pseudo-terminal")
def test_the_demo_draws_a_moving_bar_in_a_terminal(environment: dict[str, str]) -> None:
    """There the export's bar is drawn again and again while it grows, and the demo ends well."""
    shown: list[bytes] = []
    screen, terminal = os.openpty()
    with open(screen, "rb", buffering=0) as screen_file:
        process = subprocess.Popen(
            [sys.executable, DEMO], env=environment | {"TERM": "xterm"}, stdout=terminal
        )
        os.close(terminal)
        with contextlib.suppress(OSError):  # how Linux tells the end of a terminal
            while data := screen_file.read(65536):
                shown.append(data)
        assert process.wait(timeout=60) == 0
    pages = {int(done) for done in re.findall(rb"(\d+) of 24 pages, [\d.]+ s left", b"".join(shown))}
    assert len(pages) > 2
    assert b"24 of 24 pages, completed" in b"".join(shown)
    assert marked_processes(environment) == set()


@pytest.mark.e2e
@pytest.mark.skipif(not LINUX, reason="looks for the service's process in /proc")
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_a_serving_demo_ends_its_service_when_interrupted(
    ended_by: signal.Signals, environment: dict[str, str]
) -> None:
    """With --serve the service stays and answers, until Ctrl-C or SIGTERM ends both, which is no failure."""
    process = subprocess.Popen(
        [sys.executable, DEMO, "--serve"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while line := process.stdout.readline():
            if "The service stays at http://127.0.0.1:" in line:
                break
        assert len(marked_processes(environment)) == 2
        process.send_signal(ended_by)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()
    assert marked_processes(environment) == set()


@pytest.mark.e2e
def test_a_serving_demo_draws_each_request_and_shows_the_log(environment: dict[str, str]) -> None:
    """The terminal shows each request's tree, once, and the lines of the service's log."""
    process = subprocess.Popen(
        [sys.executable, DEMO, "--serve"],
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killer = threading.Timer(120.0, process.kill)
    killer.start()
    try:
        assert process.stdout is not None
        url = ""
        for line in process.stdout:
            if found := re.search(r"curl '(http://[\w.:]+)/debug/tasks'", line):
                url = found[1]
            if line.startswith("Each request is drawn here"):
                break
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{url}/search/Lisbon", timeout=0.3)
        assert httpx.get(f"{url}/nowhere").status_code == 404
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if re.search(r" 404$", line.rstrip()):
                break
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    finally:
        killer.cancel()
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert errors == ""
    drawn = "\n".join(lines)
    assert "/search/Lisbon\n request and its tasks" in drawn
    assert drawn.count("499 client_disconnect (tasks cancelled: ") == 1
    assert re.search(r"─ events .* cancelled: client_disconnect <- GET /search", drawn)
    assert "POST /exports" not in drawn  # the demo's own
    assert "INFO:     Application shutdown complete." in rest


def test_of_very_many_requests_a_few_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load test does not flood the terminal; what has been drawn is not drawn again."""
    traces = {f"t{n}": [request_span(f"t{n}")] for n in range(9)}

    async def ended_traces(client: httpx.AsyncClient) -> dict[str, list[Span]]:
        return traces

    async def looks() -> set[str]:
        async with httpx.AsyncClient(base_url="http://service") as client:
            seen = await demo.draw_new_traces(console, client, {"t0"})
            return await demo.draw_new_traces(console, client, seen)

    monkeypatch.setattr(demo, "ended_traces", ended_traces)
    console = Console(width=120, record=True, file=io.StringIO())
    assert asyncio.run(looks()) == set(traces)
    shown = console.export_text()
    assert [int(n) for n in re.findall(r"^/path/t(\d)", shown, re.MULTILINE)] == [1, 2, 3, 4, 5]
    assert "and 3 more requests, see http://service/debug/spans" in shown


def test_with_a_collector_each_drawn_request_has_a_link_to_jaeger(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for what cancelled the request's tasks; without a collector, there is no link."""
    left = replace(request_span("t1"), attributes={"otel_tasks.request.outcome": "client_disconnect"})
    left.attributes.update(request_span("t1").attributes)

    async def ended_traces(client: httpx.AsyncClient) -> dict[str, list[Span]]:
        return {"t1": [left]}

    async def look(*endpoint: str) -> str:
        console = Console(width=120, record=True, file=io.StringIO())
        async with httpx.AsyncClient(base_url="http://service") as client:
            await demo.draw_new_traces(console, client, set(), *endpoint)
        return console.export_text()

    monkeypatch.setattr(demo, "ended_traces", ended_traces)
    monkeypatch.delenv("JAEGER_UI_URL", raising=False)
    link = "http://localhost:16686/trace/t?uiFind=client_disconnect"
    assert link in asyncio.run(look("http://localhost:4318"))
    assert "16686" not in asyncio.run(look())


def test_a_service_that_does_not_answer_is_retried() -> None:
    """A look that fails draws nothing and forgets nothing."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async def look() -> set[str]:
        async with httpx.AsyncClient(base_url="http://s", transport=httpx.MockTransport(refuse)) as client:
            return await demo.draw_new_traces(Console(file=io.StringIO()), client, {"known"})

    assert asyncio.run(look()) == {"known"}


def request_span(name: str) -> Span:
    """The span of a request."""
    return span(name, 0.0, 1.0, **{"http.request.method": "GET", "url.path": f"/path/{name}"})


@pytest.mark.e2e
def test_a_demo_whose_service_does_not_start_says_why(environment: dict[str, str]) -> None:
    """The service's own words are shown and the demo fails; it does not wait forever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [sys.executable, DEMO, "--port", str(taken.getsockname()[1])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert "the service did not start" in done.stderr
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert marked_processes(environment) == set()


@pytest.mark.e2e
def test_the_demos_spans_reach_a_collector(environment: dict[str, str]) -> None:
    """With an OTLP endpoint all spans are sent, the last ones when the service stops."""
    with receiver() as received:
        endpoint = received.endpoint
        done = subprocess.run(
            [sys.executable, DEMO],
            env=environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert f"These traces were sent to {endpoint}\n" in done.stdout
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" not in done.stdout
    assert "could not be delivered" not in done.stdout
    names = Counter(span.name for span in received.spans())
    assert names["GET /search/{city}"] == 6
    assert names["hotels"] == 6
    # The client's own span, and the service's.
    assert (names["POST /orders"], names["send_confirmation"]) == (2, 1)
    assert missing_parents(received.spans()) == []


@pytest.mark.e2e
def test_a_demo_without_its_collector_says_that_nothing_was_delivered(environment: dict[str, str]) -> None:
    """The exporter's own words are shown; the demo itself has not failed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, DEMO],
        env=environment | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *_, words, line = done.stdout.splitlines()
    assert words == f"The traces, sent to {endpoint}, could not be delivered:"
    assert re.search(server_process.UNDELIVERED, line)
    assert marked_processes(environment) == set()


def test_short_worker_is_as_short_as_the_docs_say() -> None:
    """It has at most two thirds of the 77 lines of a worker that does the same by hand."""
    code = (ROOT / "examples" / "worker_short.py").read_text("utf-8")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 50
    assert "in 50 lines" in (ROOT / "docs" / "howto" / "worker.md").read_text("utf-8")
