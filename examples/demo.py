"""Starts the example service, lets five clients use it at once, and draws what happened to each.

    python examples/demo.py              # or: make demo
    python examples/demo.py --serve      # then draw what you send to it, until Ctrl-C; or: make demo SERVE=1
    python examples/demo.py --svg FILE   # save the picture as well

Takes a few seconds, needs no network but the loopback interface, and leaves no process behind.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # `python examples/demo.py` works from anywhere, with nothing installed

from examples.client_spans import ClientSpans  # noqa: E402 - found by the line above
from examples.jaeger_ui import trace_link  # noqa: E402 - as well
from examples.server_process import Service, end_on_sigterm, service  # noqa: E402 - as well
from examples.trace_tree import Span, trace_tree  # noqa: E402 - as well

TIME_LIMIT = 60.0
NOT_FOUND = 404
# Seconds between two looks at what the service does.
LOOK_AGAIN = 0.05
# While serving: seconds between two looks at the service, and trees that are drawn at each.
LOOK_EVERY = 1.0
TREES_PER_LOOK = 5
# The requests of the clients. Their spans are the roots of the traces.
ROUTES = (
    "/search/{city}",
    "/orders",
    "/orders/{reference}",
    "/exports",
    "/exports/{uid}/progress",
)


@dataclass
class Visit:
    """One client's request, and what it did to it."""

    method: str
    path: str
    what: str
    json: dict[str, str] | None = None
    leaves_after: float | None = None
    # Tasks of the request that have to start or end before the client leaves, on however slow a machine.
    once_started: frozenset[str] = frozenset()
    once_ended: frozenset[str] = frozenset()
    # That of the client's own span, sent along as a traced front end does: so its trace is found again.
    trace_id: str = ""
    ended: str = ""
    left_at: float | None = None


def visits() -> list[Visit]:
    """The clients that send one request each; the fifth one watches a long task, see `watch_export`."""
    return [
        Visit(
            "GET", "/search/Lisbon?fail=trains", "waits; one supplier fails, and the answer comes without it"
        ),
        Visit(
            "GET",
            "/search/Oslo",
            "hangs up in the middle",
            leaves_after=0.45,
            once_ended=frozenset({"trains", "harbour"}),
        ),
        Visit("GET", "/search/Rome?slow=events", "waits; one supplier is too slow and runs into its timeout"),
        Visit(
            "POST",
            "/orders",
            "places an order and hangs up during the payment",
            json={"reference": "order-1", "city": "Oslo"},
            leaves_after=0.12,
            once_started=frozenset({"charge", "draw_map"}),
        ),
    ]


async def main(*, serve: bool, svg: Path | None, port: int) -> None:
    """Run the demo. Whatever ends it, the service has ended when this returns."""
    console = Console(record=svg is not None, width=120, highlight=False)
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    calls = ClientSpans("demo-client", ROUTES)
    async with service("examples.fastapi_app:app", port=port, environment={"KEEP_SPANS": "1"}) as running:
        url = running.url
        all_visits = visits()
        try:
            async with asyncio.timeout(TIME_LIMIT):
                with export_bar() as bar:
                    await asyncio.gather(
                        watch_export(url, bar, calls),
                        *(visit_service(url, visit, calls) for visit in all_visits),
                    )
                traces = await fetch_traces(url, [visit.trace_id for visit in all_visits], calls)
                order = await order_status(url, "order-1", calls)
        except TimeoutError:
            raise SystemExit(f"not all requests have left a trace within {TIME_LIMIT:.0f} s") from None
        report(console, all_visits, traces, order)
        console.print("an export that its client watches:", bar)
        if svg is not None:
            save_svg(console, svg)
        print_next_steps(console, endpoint)
        if serve:
            await serve_on(console, running, endpoint)
    if endpoint:
        # Now, for the last spans are sent when the service stops.
        undelivered = running.undelivered
        if not undelivered and not await asyncio.to_thread(calls.send, endpoint):
            undelivered = f"the spans of {calls.service}, which are the roots of the traces"
        print_delivery(console, endpoint, undelivered)
        if not undelivered:
            print_links(console, endpoint, all_visits, traces)


async def visit_service(url: str, visit: Visit, calls: ClientSpans) -> None:
    """Send one request over a connection of its own, and close that early if the client is to leave."""
    sent = asyncio.Event()

    async def trace(event: str, _: object) -> None:
        if event == "http11.send_request_body.complete":
            sent.set()

    def note(trace_id: str) -> None:
        visit.trace_id = trace_id

    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        calls.record(client, note)
        request = asyncio.create_task(
            client.request(visit.method, visit.path, json=visit.json, extensions={"trace": trace})
        )
        # A client that leaves waits from its request on, however slow this machine is.
        await asyncio.wait([request, asyncio.ensure_future(sent.wait())], return_when="FIRST_COMPLETED")
        await asyncio.wait([request], timeout=visit.leaves_after)
        while not request.done() and not await has_come_so_far(url, visit):  # noqa: ASYNC110 - another process works
            await asyncio.sleep(LOOK_AGAIN)
        if request.done():
            visit.ended = f"got {request.result().status_code}"
            return
        visit.left_at = time.time()
        # httpx closes the connection when a request is cancelled: to the service, the client is gone.
        request.cancel()
        await asyncio.wait([request])
        visit.ended = f"left after {visit.leaves_after} s"


async def has_come_so_far(url: str, visit: Visit) -> bool:
    """Whether the tasks of the visit's request have started or ended that its client waits for."""
    async with httpx.AsyncClient(base_url=url) as client:
        tasks = (await client.get("/debug/tasks")).json().values()
    own = [task for task in tasks if task["trace_id"] == visit.trace_id]
    started = {task["name"] for task in own if task["started_at"] is not None}
    ended = {task["name"] for task in own if task["ended_at"] is not None}
    return visit.once_started <= started and visit.once_ended <= ended


def export_bar() -> Progress:
    """A bar that moves while the demo runs in a terminal; what it shows in the end is printed once more."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(30),
        TextColumn("{task.completed:.0f} of {task.total:.0f} pages, {task.fields[state]}"),
        transient=True,
    )


async def watch_export(url: str, bar: Progress, calls: ClientSpans) -> None:
    """Start a long task, and draw the snapshots of its progress that the service sends until it has ended."""
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        calls.record(client)
        started = (await client.post("/exports", json={"city": "Lisbon", "pages": 24})).json()
        line = bar.add_task("write_export", total=24, state="begins")
        async with client.stream("GET", started["progress"]) as response:
            async for event, data in server_sent_events(response):
                if event == "ended":
                    bar.update(line, state=data["status"])
                else:
                    left = "" if data["seconds_left"] is None else f"{data['seconds_left']:.1f} s left"
                    bar.update(line, completed=data["done"], total=data["total"], state=left)


async def server_sent_events(response: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Name and data of each event; a browser's `EventSource` does the same, and comes back by itself."""
    event = "message"
    async for line in response.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "event":
            event = value
        elif field == "data":
            yield event, json.loads(value)


async def fetch_traces(url: str, trace_ids: list[str], calls: ClientSpans) -> dict[str, list[Span]]:
    """Wait until no task of the service is alive and every request's own span has arrived."""
    async with httpx.AsyncClient(base_url=url) as client:
        while True:
            tasks = (await client.get("/debug/tasks")).json().values()
            spans = [Span.from_json(raw) for raw in (await client.get("/debug/spans")).json()]
            spans += calls.ended()
            traces = {id: [span for span in spans if span.trace_id == id] for id in trace_ids}
            all_ended = all(task["ended_at"] is not None for task in tasks)
            if all_ended and all(any(span.is_request for span in trace) for trace in traces.values()):
                return traces
            await asyncio.sleep(LOOK_AGAIN)


async def order_status(url: str, reference: str, calls: ClientSpans) -> str:
    """The request of a client whose connection broke."""
    async with httpx.AsyncClient(base_url=url) as client:
        calls.record(client)
        response = await client.get(f"/orders/{reference}")
        return "unknown" if response.status_code == NOT_FOUND else str(response.json()["status"])


async def serve_on(console: Console, running: Service, endpoint: str) -> None:
    """Keep the service, and draw each new request, until Ctrl-C or SIGTERM: the end that was announced."""
    this_task = asyncio.current_task()
    assert this_task is not None
    async with httpx.AsyncClient(base_url=running.url, timeout=5.0) as client:
        seen = set(await ended_traces(client))
        running.console = console
        print_serving(console, running.url)
        try:
            while running.process.returncode is None:
                seen = await draw_new_traces(console, client, seen, endpoint)
                await asyncio.sleep(LOOK_EVERY)
        except asyncio.CancelledError:
            # It ends well then, and `make` has nothing to complain of; a second one interrupts the end.
            this_task.uncancel()
            return
    raise SystemExit("the service has ended by itself")


async def draw_new_traces(
    console: Console, client: httpx.AsyncClient, seen: set[str], endpoint: str = ""
) -> set[str]:
    """Draw the requests that have ended since the last look; returns what is known now.

    With an endpoint, to which the service sends its spans, there is a link to Jaeger below each.
    """
    try:
        traces = await ended_traces(client)
    except httpx.TransportError:  # busy, or about to end: try again later
        return seen
    new = [trace for trace_id, trace in traces.items() if trace_id not in seen]
    for trace in new[:TREES_PER_LOOK]:
        path = next(span.attributes.get("url.path", span.name) for span in trace if span.is_request)
        console.print(Group("", Text(str(path), "bold cyan"), trace_tree(trace)))
        if endpoint:
            console.print(Text(trace_link(endpoint, trace[0].trace_id, trace), "dim"), soft_wrap=True)
    if more := new[TREES_PER_LOOK:]:
        console.print(f"\nand {len(more)} more requests, see {client.base_url}/debug/spans")
    # Forget what the service has forgotten.
    return set(traces)


async def ended_traces(client: httpx.AsyncClient) -> dict[str, list[Span]]:
    """The traces of requests of which nothing runs any more, among the newest spans."""
    # In this order: what ends between the two is left for the next look.
    tasks = (await client.get("/debug/tasks")).json().values()
    raw_spans = (await client.get("/debug/spans", params={"newest": 300})).json()
    alive = {task["trace_id"] for task in tasks if task["ended_at"] is None}
    traces: dict[str, list[Span]] = {}
    for span in map(Span.from_json, raw_spans):
        if span.trace_id not in alive:
            traces.setdefault(span.trace_id, []).append(span)
    return {id: trace for id, trace in traces.items() if any(span.is_request for span in trace)}


def report(console: Console, all_visits: list[Visit], traces: dict[str, list[Span]], order: str) -> None:
    """Print a tree for each visit, then the counts."""
    for number, visit in enumerate(all_visits, start=1):
        heading = Text.assemble(
            (f"{number}. {visit.method} {visit.path}  ", "bold cyan"),
            f"the client {visit.what} ({visit.ended})",
        )
        console.print(Group(heading, trace_tree(traces[visit.trace_id], hung_up_at=visit.left_at)), "")

    spans = [span for trace in traces.values() for span in trace if span.is_task]
    cancelled = [span for span in spans if span.outcome == "cancelled"]
    console.print(f"tasks: {len(spans)}, of these cancelled: {len(cancelled)}")
    for visit in all_visits:
        stopped = [span.end for span in traces[visit.trace_id] if span.cancel_reason == "client_disconnect"]
        if visit.left_at is not None and stopped:
            took = (max(stopped) - visit.left_at) * 1000
            console.print(f"{visit.method} {visit.path}: last task ended {took:.1f} ms after the hang-up")
    console.print(f"the order whose client hung up: {order}")


def print_next_steps(console: Console, endpoint: str) -> None:
    """How to see the same in Jaeger."""
    console.print(
        "\nThe same in Jaeger: docker compose up, then http://localhost:16686; the service is on port 8000."
    )
    if not endpoint:
        console.print(
            "To send these traces to Jaeger:  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 make demo"
        )


def print_serving(console: Console, url: str) -> None:
    """Print the address of the running service, and requests to try."""
    console.print(
        f"\nThe service stays at {url} until Ctrl-C. Try it, and hang up with Ctrl-C or -m:\n"
        f"  curl '{url}/search/Lisbon'\n"
        f"  curl -m 0.3 '{url}/search/Lisbon'\n"
        f"  curl '{url}/debug/tasks'    what is alive, and what became of the last ones\n"
        f"  curl '{url}/debug/spans'    the newest spans\n"
        "Each request is drawn here once it and its tasks have ended, between the lines of the service's log."
    )


def print_delivery(console: Console, endpoint: str, undelivered: str) -> None:
    """Whether the collector has the traces, by what the exporter has said."""
    if undelivered:
        console.print(f"The traces, sent to {endpoint}, could not be delivered:")
        console.print(Text(undelivered), soft_wrap=True)
    else:
        console.print(f"These traces were sent to {endpoint}")


def print_links(
    console: Console, endpoint: str, all_visits: list[Visit], traces: dict[str, list[Span]]
) -> None:
    """Where Jaeger shows each of the traces."""
    console.print("In Jaeger; the links open and mark what was cancelled:")
    for number, visit in enumerate(all_visits, start=1):
        link = trace_link(endpoint, visit.trace_id, traces[visit.trace_id])
        console.print(f"  {number}. {link}", soft_wrap=True)


def save_svg(console: Console, path: Path) -> None:
    """Write the picture, without the web font that rich refers to: a README's pictures load nothing."""
    svg = console.export_svg(title="make demo", unique_id="demo")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


async def run(options: argparse.Namespace) -> None:
    """Run the demo with the options of the command line."""
    end_on_sigterm()
    await main(serve=options.serve, svg=options.svg, port=options.port)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="keep the service running until Ctrl-C")
    parser.add_argument("--svg", type=Path, help="save the picture to this file")
    parser.add_argument("--port", type=int, default=0, help="the service's port (default: a free one)")
    try:
        asyncio.run(run(parser.parse_args()))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
