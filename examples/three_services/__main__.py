"""Starts the three services, sends two requests to the gateway, and draws what happened in all of them.

    python -m examples.three_services      # or: make demo-services

One customer waits for the answer; one closes the page while the suppliers still work. The spans come by OTLP,
as they would to Jaeger. Ends with an error unless every promise of README.md was kept.

Takes a few seconds, needs no network but the loopback interface, and leaves no process behind.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console, Group
from rich.text import Text

from examples.client_spans import ClientSpans
from examples.jaeger_ui import trace_link
from examples.otlp_receiver import receiver
from examples.server_process import Service, run_demo, service
from examples.trace_tree import Span, trace_tree

# From the top of the line to its end: each calls the next.
NAMES = ("gateway", "pricing", "suppliers")
# The client of the first service; its spans are the roots of the traces.
CUSTOMER = "customer"
# Seconds for the two requests, and for the last task of each to end.
TIME_LIMIT = 30.0
LOOK_EVERY = 0.01
# The tasks left once all quick ones have ended: two items, two suppliers each, all waiting for the workshops.
AT_WORK = {
    "gateway": ["price", "price"],
    "pricing": ["acme", "acme", "globex", "globex"],
    "suppliers": ["calculate"] * 4,
}


@dataclass
class Visit:
    """One customer's request, and what became of it."""

    what: str
    items: list[str]
    # That of the client's own span, sent along as a traced front end does: so its trace is found again.
    trace_id: str = ""
    ended: str = ""
    left_at: float | None = None


async def main(console: Console) -> bool:
    """Run the demo; True if every promise was kept. Whatever ends it, the services have ended then."""
    stays = Visit("waits for the answer", ["lamp", "desk"])
    leaves = Visit("closes the page while the suppliers work", ["wardrobe", "sofa"])
    calls = ClientSpans(CUSTOMER, ["/basket"])
    upstream = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    with receiver(forward_to=upstream) as received:
        async with contextlib.AsyncExitStack() as running:
            urls = await start(running, received.endpoint)
            try:
                async with asyncio.timeout(TIME_LIMIT):
                    await ask(urls["gateway"], stays, calls)
                    await hang_up(urls, leaves, calls)
                    left = await wait_for_silence(urls)
            except TimeoutError:
                raise SystemExit(f"the requests were not done within {TIME_LIMIT:.0f} s") from None
        # The services have ended, and have sent their last spans.
        await asyncio.to_thread(calls.send, received.endpoint)
        spans = received.spans()
        for number, visit in enumerate((stays, leaves), start=1):
            draw(console, number, visit, spans)
        console.print(how_long(spans, leaves))
        kept = print_checks(console, checks(spans, stays, leaves, left))
        if upstream:
            print_delivery(console, upstream, received.undelivered)
            if not received.undelivered:
                print_links(console, upstream, [stays, leaves], spans)
    return kept


# --- the services ----------------------------------------------------------------------------------------


async def start(running: contextlib.AsyncExitStack, endpoint: str) -> dict[str, str]:
    """Start the last service first, because each needs the address of the next; return the addresses."""
    environment = telemetry_environment(endpoint)
    urls: dict[str, str] = {}
    for name in reversed(NAMES):
        app = f"examples.three_services.{name}:app"
        started: Service = await running.enter_async_context(service(app, environment=environment))
        urls[name] = started.url
        environment = environment | {f"{name.upper()}_URL": started.url}
    return urls


def telemetry_environment(endpoint: str) -> dict[str, str]:
    """Settings that send all spans to our own receiver, whatever the environment says."""
    return {
        "OTEL_SDK_DISABLED": "false",
        "OTEL_TRACES_SAMPLER": "parentbased_always_on",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{endpoint}/v1/traces",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{endpoint}/v1/metrics",
    }


async def live_tasks(client: httpx.AsyncClient, url: str) -> list[str]:
    """The names of a service's live tasks, without the numbers that tell two of a kind apart."""
    tasks: list[dict[str, Any]] = (await client.get(f"{url}/debug/tasks")).raise_for_status().json()
    return sorted(task["name"].partition("-")[0] for task in tasks)


async def all_live_tasks(client: httpx.AsyncClient, urls: Mapping[str, str]) -> dict[str, list[str]]:
    found = await asyncio.gather(*(live_tasks(client, urls[name]) for name in NAMES))
    return dict(zip(NAMES, found, strict=True))


async def wait_for_silence(urls: Mapping[str, str]) -> dict[str, list[str]]:
    """Look until no service has a live task; gives those that are left after a few seconds."""
    async with httpx.AsyncClient() as client:
        left = await all_live_tasks(client, urls)
        end = time.monotonic() + TIME_LIMIT / 3
        while any(left.values()) and time.monotonic() < end:
            await asyncio.sleep(LOOK_EVERY)
            left = await all_live_tasks(client, urls)
        return left


# --- the customers ---------------------------------------------------------------------------------------


def request(
    client: httpx.AsyncClient, url: str, visit: Visit, calls: ClientSpans
) -> "asyncio.Task[httpx.Response]":
    def note(trace_id: str) -> None:
        visit.trace_id = trace_id

    calls.record(client, note)
    return asyncio.create_task(client.get(f"{url}/basket", params={"item": visit.items}))


async def ask(url: str, visit: Visit, calls: ClientSpans) -> None:
    """Wait for the answer."""
    async with httpx.AsyncClient(timeout=TIME_LIMIT) as client:
        answer = await request(client, url, visit, calls)
        visit.ended = f"got {answer.status_code}"


async def hang_up(urls: Mapping[str, str], visit: Visit, calls: ClientSpans) -> None:
    """Wait until all three services are at work for this customer, then close its connection."""
    async with (
        httpx.AsyncClient(timeout=TIME_LIMIT) as looking,
        httpx.AsyncClient(timeout=TIME_LIMIT) as client,
    ):
        answer = request(client, urls["gateway"], visit, calls)
        try:
            while await all_live_tasks(looking, urls) != AT_WORK:
                if answer.done():
                    raise SystemExit(f"the gateway has answered before the hang-up: {answer.result().text}")
                await asyncio.sleep(LOOK_EVERY)
            visit.left_at = time.time()
        finally:
            # httpx closes the connection when a request is cancelled: to the gateway, the client is gone.
            answer.cancel()
            await asyncio.wait([answer])
        visit.ended = "left"


# --- what is promised ------------------------------------------------------------------------------------


def checks(
    spans: list[Span], stays: Visit, leaves: Visit, left: Mapping[str, list[str]]
) -> dict[str, Iterable[str]]:
    """The promises, each with its violations."""
    stayed = [span for span in spans if span.trace_id == stays.trace_id]
    hung_up = [span for span in spans if span.trace_id == leaves.trace_id]
    return {
        "each request is one trace, across all three services": [
            *missing_services(stayed, stays),
            *missing_services(hung_up, leaves),
            *strays(spans, {stays.trace_id, leaves.trace_id}),
        ],
        "no span has an error status": [
            f"{where(span)}: {span.description or span.status}" for span in spans if span.status == "ERROR"
        ],
        "the first request is answered, and all its tasks have succeeded": [
            *([] if stays.ended == "got 200" else [f"the customer {stays.ended}"]),
            *(f"{where(span)}: {span.outcome}" for span in stayed if span.outcome != "success"),
        ],
        "the hang-up cancelled tasks in each service": [
            f"none in {name}"
            for name in NAMES
            if not any(span.service == name and span.cancel_reason for span in hung_up)
        ],
        "every cancelled task says why, and names what cancelled it": unexplained(hung_up),
        "no task is left in any of the three services": [
            f"{name} still runs {', '.join(tasks)}" for name, tasks in left.items() if tasks
        ],
    }


def missing_services(trace: list[Span], visit: Visit) -> list[str]:
    missing = set(NAMES) - {span.service for span in trace}
    return [f"the customer who {visit.what}: nothing from {name}" for name in NAMES if name in missing]


def strays(spans: list[Span], known: set[str]) -> Iterable[str]:
    """Spans of other traces, and spans that have no parent or whose parent has not come."""
    ids = {span.span_id for span in spans}
    for span in spans:
        if span.trace_id not in known:
            yield f"{where(span)} is of another trace, {span.trace_id}"
        elif span.parent_id not in ids and not (span.service == CUSTOMER and span.parent_id is None):
            yield f"{where(span)} hangs below nothing"


def unexplained(trace: list[Span]) -> Iterable[str]:
    """Cancelled tasks without a reason, or that do not name the request of their own service."""
    by_id = {span.span_id: span for span in trace}
    for span in trace:
        if not span.is_task or span.outcome != "cancelled":
            continue
        origin = by_id.get(span.cancelled_by or "")
        if span.cancel_reason != "client_disconnect":
            yield f"{where(span)}: {span.cancel_reason}"
        elif origin is None or origin.service != span.service or not origin.is_request:
            yield f"{where(span)} does not name its service's request"


def where(span: Span) -> str:
    return f"{span.service}, {span.name}"


def how_long(spans: list[Span], leaves: Visit) -> str:
    """The way of the hang-up: read from the spans' own end times."""
    ends = [
        span.end
        for span in spans
        if span.trace_id == leaves.trace_id and span.service == NAMES[-1] and span.cancel_reason
    ]
    if not ends or leaves.left_at is None:
        return f"no task in {NAMES[-1]} was cancelled"
    took = (max(ends) - leaves.left_at) * 1000
    return f"from the hang-up at the {NAMES[0]} to the end of the last task in {NAMES[-1]}: {took:.1f} ms"


# --- what is shown ---------------------------------------------------------------------------------------


def draw(console: Console, number: int, visit: Visit, spans: list[Span]) -> None:
    query = "&".join(f"item={item}" for item in visit.items)
    heading = Text.assemble(
        (f"{number}. GET /basket?{query}  ", "bold cyan"), f"the customer {visit.what} ({visit.ended})"
    )
    trace = [span for span in spans if span.trace_id == visit.trace_id]
    tree = trace_tree(trace, hung_up_at=visit.left_at) if trace else Text("no span has come", "red")
    console.print(Group(heading, tree, Text(f"trace {visit.trace_id}", "dim")), "")


def print_checks(console: Console, all_checks: Mapping[str, Iterable[str]]) -> bool:
    """Each with its verdict; True if all hold."""
    kept = True
    for promise, complaints in all_checks.items():
        found = list(complaints)
        kept = kept and not found
        verdict = ("FAILED", "bold red") if found else ("ok    ", "green")
        console.print(Text.assemble(verdict, " ", promise), *(f"         {each}" for each in found), sep="\n")
    return kept


def print_delivery(console: Console, upstream: str, undelivered: str) -> None:
    if undelivered:
        console.print(f"The traces could not be delivered to {upstream}:")
        console.print(Text(undelivered), soft_wrap=True)
    else:
        console.print(f"These traces were sent to {upstream}")


def print_links(console: Console, upstream: str, visits: Iterable[Visit], spans: list[Span]) -> None:
    console.print("In Jaeger; the links open and mark what was cancelled:")
    for number, visit in enumerate(visits, start=1):
        console.print(f"  {number}. {trace_link(upstream, visit.trace_id, spans)}", soft_wrap=True)


if __name__ == "__main__":
    # As for the services: the demo is about their traces.
    os.environ["OTEL_SDK_DISABLED"] = "false"
    run_demo(lambda: main(Console(width=134, highlight=False)))
