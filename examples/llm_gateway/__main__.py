"""Sends twenty clients to the gateway, half of which hang up: once without the middleware, and once with it.

    python -m examples.llm_gateway      # or: make demo-llm

Counts what the upstream generates for clients that are gone, and draws the trace of one hang-up. Ends with an
error unless the middleware stopped each call and no usage record is missing.

With OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318, Jaeger gets the spans as well.

Takes about fifteen seconds, needs no network but the loopback interface, and leaves no process behind.
"""

import asyncio
import itertools
import os
import ssl
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import httpx2
import openai
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.client_spans import ClientSpans
from examples.jaeger_ui import trace_link
from examples.otlp_receiver import receiver
from examples.server_process import run_demo, service
from examples.three_services.__main__ import print_delivery, telemetry_environment
from examples.trace_tree import Span, trace_tree

Mode = Literal["plain", "before the first token", "mid-stream"]
Client = Literal["openai", "openai sync", "httpx"]
CLIENTS: tuple[Client, ...] = ("openai", "openai sync", "httpx")
MODES: tuple[Mode, ...] = ("plain", "before the first token", "mid-stream")

PATH = "/v1/chat/completions"
KEYS = ("sk-pro", "sk-free")
# Seconds from the request to its first token; then tokens come at this rate.
FIRST_TOKEN = 1.5
TOKENS_PER_SECOND = 25
MAX_TOKENS = 50
# When a client leaves: seconds after its request, or tokens that it has read.
LEAVE_AFTER: dict[Mode | None, float] = {"plain": 2.0, "before the first token": 0.6}
LEAVE_AFTER_TOKENS = 10
# Seconds in which the upstream is to stop after the hang-up.
PROMISED = 0.5
# Seconds for the start of the clients and their calls.
TIME_LIMIT = 30.0
LOOK_EVERY = 0.05
# Shared, because it takes long to make one: all clients are to start together.
TLS = ssl.create_default_context()


@dataclass
class Visit:
    """One client: what it asks for, when it leaves, and what became of it."""

    user: str
    client: Client
    stream: bool
    leaves: Mode | None
    answered: bool = False
    left_at: float | None = None
    # Of the client's own span, where it records one.
    trace_id: str = ""

    @property
    def key(self) -> str:
        """The key of one of the two tenants."""
        return KEYS[int(self.user) % len(KEYS)]

    @property
    def body(self) -> dict[str, Any]:
        """What it sends, without ``stream``."""
        messages = [{"role": "user", "content": "Tell me a story."}]
        return {"model": "small", "messages": messages, "max_tokens": MAX_TOKENS, "user": self.user}

    @property
    def timeout(self) -> float:
        """Seconds after which it gives up."""
        return LEAVE_AFTER.get(self.leaves, TIME_LIMIT)

    @property
    def most(self) -> float:
        """The number of tokens after which it closes its stream."""
        return LEAVE_AFTER_TOKENS if self.leaves == "mid-stream" else float("inf")


@dataclass
class Run:
    """The clients of one run, the upstream's calls, the gateway's usage records, and all spans."""

    visits: list[Visit]
    calls: list[dict[str, Any]]
    usage: list[dict[str, Any]]
    spans: list[Span]
    # Why the spans could not be passed on to another collector.
    undelivered: str = ""

    def hang_ups(self, *modes: Mode) -> list[tuple[Visit, float, dict[str, Any]]]:
        """The clients that left in one of these modes, each with the time and its call at the upstream."""
        calls = {call["user"]: call for call in self.calls}
        return [
            (visit, visit.left_at, calls[visit.user])
            for visit in self.visits
            if visit.leaves in modes and visit.left_at and visit.user in calls
        ]

    def wasted(self, *modes: Mode) -> int:
        """The number of tokens generated after the hang-up."""
        return sum(token > left_at for _, left_at, call in self.hang_ups(*modes) for token in call["tokens"])

    @property
    def overtime(self) -> dict[str, float]:
        """For how many seconds each call went on after its client's hang-up."""
        return {
            visit.user: max(0.0, (call["ended_at"] or time.time()) - left_at)
            for visit, left_at, call in self.hang_ups(*MODES)
        }

    @property
    def unrecorded(self) -> list[str]:
        """The clients whose calls have no usage record."""
        return sorted({call["user"] for call in self.calls} - {usage["user"] for usage in self.usage})


# How many clients, when they leave, and whether they stream.
PLANS: tuple[tuple[int, Mode | None, bool], ...] = (
    (4, "plain", False),
    (3, "before the first token", True),
    (3, "mid-stream", True),
    (5, None, False),
    (5, None, True),
)


def visits() -> list[Visit]:
    """Ten clients that leave, and ten that stay; all kinds of client are among both."""
    found: list[Visit] = []
    clients = itertools.cycle(CLIENTS)
    for count, mode, stream in PLANS:
        found += [Visit(str(len(found) + n), next(clients), stream, mode) for n in range(count)]
    return found


# --- the clients -----------------------------------------------------------------------------------------


async def visit_gateway(url: str, visit: Visit, calls: ClientSpans) -> None:
    """Send one request, and hang up the way such a client does: after a timeout, or by closing its stream."""
    try:
        match visit.client:
            case "openai":
                await ask_openai(url, visit)
            case "openai sync":
                await asyncio.to_thread(ask_openai_sync, url, visit)
            case "httpx":
                await ask_httpx(url, visit, calls)
    except (openai.APITimeoutError, httpx.TimeoutException):
        visit.left_at = time.time()
    visit.answered = visit.left_at is None


async def ask_openai(url: str, visit: Visit) -> None:
    http = httpx2.AsyncClient(verify=TLS)
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key=visit.key, max_retries=0, http_client=http
    ) as client:
        answer = await client.chat.completions.create(
            **visit.body, stream=visit.stream, timeout=visit.timeout
        )
        if isinstance(answer, openai.AsyncStream):
            read = 0
            async for _ in answer:
                read += 1
                if read == visit.most:
                    await answer.close()
                    visit.left_at = time.time()
                    break


def ask_openai_sync(url: str, visit: Visit) -> None:
    http = httpx2.Client(verify=TLS)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=visit.key, max_retries=0, http_client=http) as client:
        answer = client.chat.completions.create(**visit.body, stream=visit.stream, timeout=visit.timeout)
        if isinstance(answer, openai.Stream):
            for read, _ in enumerate(answer, start=1):
                if read == visit.most:
                    answer.close()
                    visit.left_at = time.time()
                    break


async def ask_httpx(url: str, visit: Visit, calls: ClientSpans) -> None:
    def note(trace_id: str) -> None:
        visit.trace_id = trace_id

    headers = {"authorization": f"Bearer {visit.key}"}
    body = visit.body | {"stream": visit.stream}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=visit.timeout, verify=TLS) as client:
        calls.record(client, note)
        async with client.stream("POST", PATH, json=body) as response:
            response.raise_for_status()
            read = 0
            async for line in response.aiter_lines():
                read += line.startswith("data: ")
                if read == visit.most:
                    break
        if read == visit.most:
            visit.left_at = time.time()


# --- the runs --------------------------------------------------------------------------------------------


async def run_clients(*, middleware: bool) -> Run:
    """Start upstream and gateway, let all clients come, and wait until the last call has ended."""
    all_visits = visits()
    calls = ClientSpans("client", [PATH])
    pace = {"FIRST_TOKEN": str(FIRST_TOKEN), "TOKENS_PER_SECOND": str(TOKENS_PER_SECOND)}
    with receiver(forward_to=collector()) as received:
        environment = telemetry_environment(received.endpoint) | {"OTEL_METRICS_EXPORTER": "none"}
        async with (
            service("examples.llm_gateway.upstream:app", environment=environment | pace) as upstream,
            service(
                "examples.llm_gateway.app:app",
                environment=environment
                | {"UPSTREAM_URL": upstream.url, "MIDDLEWARE": "on" if middleware else "off"},
            ) as gateway,
            asyncio.timeout(TIME_LIMIT),
        ):
            await asyncio.gather(*(visit_gateway(gateway.url, visit, calls) for visit in all_visits))
            made, usage = await wait_for_end(upstream.url, gateway.url)
        # The services have ended, and have sent their last spans.
        await asyncio.to_thread(calls.send, received.endpoint)
        return Run(all_visits, made, usage, received.spans(), received.undelivered)


def collector() -> str:
    """The OTLP endpoint to which all spans are passed on; empty for none."""
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")


async def wait_for_end(upstream: str, gateway: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Wait until no call is open; gives all calls, and their usage records as far as they came."""
    async with httpx.AsyncClient() as client:

        async def look(url: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = (await client.get(url)).raise_for_status().json()
            return found

        end = time.monotonic() + TIME_LIMIT / 2
        while True:
            made, usage = await look(f"{upstream}/debug/calls"), await look(f"{gateway}/debug/usage")
            is_over = all(call["ended_at"] for call in made) and len(usage) >= len(made)
            if is_over or time.monotonic() > end:
                return made, usage
            await asyncio.sleep(LOOK_EVERY)


# --- the report ------------------------------------------------------------------------------------------


def report(without: Run, with_it: Run) -> Table:
    """The figures of both runs side by side."""
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("without", justify="right", style="red")
    table.add_column("with the middleware", justify="right", style="green")

    def row(label: str, figure: Callable[[Run], object]) -> None:
        table.add_row(label, str(figure(without)), str(figure(with_it)))

    row("clients that got their answer", lambda run: sum(visit.answered for visit in run.visits))
    row("clients that hung up", lambda run: sum(visit.left_at is not None for visit in run.visits))
    row("tokens generated", lambda run: sum(len(call["tokens"]) for call in run.calls))
    row("  of these after the hang-up", lambda run: run.wasted(*MODES))
    row("    from a plain call", lambda run: run.wasted("plain"))
    row("    before the first token of a stream", lambda run: run.wasted("before the first token"))
    row("    in the middle of a stream", lambda run: run.wasted("mid-stream"))
    row("upstream time after the hang-up, seconds", lambda run: f"{sum(run.overtime.values()):.1f}")
    row(
        f"upstream connections left {PROMISED} s after the hang-up",
        lambda run: sum(seconds > PROMISED for seconds in run.overtime.values()),
    )
    row("usage records", lambda run: f"{len(run.usage)} of {len(run.calls)}")
    return table


def broken_promises(without: Run, with_it: Run) -> list[str]:
    """The figures that are not as promised."""
    broken: list[str] = []
    for name, run in (("without", without), ("with", with_it)):
        broken += [f"{name}: no usage record of client {user}" for user in run.unrecorded]
        unanswered = [visit.user for visit in run.visits if not visit.leaves and not visit.answered]
        broken += [f"{name}: no answer for client {user}" for user in unanswered]
    broken += [
        f"with: the call of client {user} ended {seconds:.2f} s after the hang-up"
        for user, seconds in with_it.overtime.items()
        if seconds > PROMISED
    ]
    if with_it.wasted(*MODES) >= without.wasted(*MODES):
        broken.append("the middleware has saved no tokens")
    return broken


def draw_trace(console: Console, run: Run) -> None:
    """Draw a plain call whose client hung up: from the client through the gateway to the upstream."""
    visit = next(visit for visit in run.visits if visit.leaves == "plain" and visit.trace_id)
    console.print("\nOne of the hang-ups with the middleware, a plain call:")
    trace = [span for span in run.spans if span.trace_id == visit.trace_id]
    console.print(trace_tree(trace, hung_up_at=visit.left_at) if trace else Text("no span has come", "red"))
    if collector():
        print_delivery(console, collector(), run.undelivered)
        if not run.undelivered:
            link = trace_link(collector(), visit.trace_id, trace)
            console.print(
                f"In Jaeger; the link opens and marks what was cancelled:\n  {link}", soft_wrap=True
            )


async def main(console: Console) -> bool:
    """Run the demo; True if every promise was kept. Whatever ends it, the services have ended then."""
    # Now, because the SDK imports most of itself on first use.
    openai.OpenAI(api_key="none").chat.completions  # noqa: B018 - what it is does not matter
    # Each synchronous client takes a thread.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(len(visits())))
    console.print("Twenty clients ask for a completion, half of them hang up.\n")
    try:
        without = await run_clients(middleware=False)
        with_it = await run_clients(middleware=True)
    except TimeoutError:
        raise SystemExit(f"the clients were not done within {TIME_LIMIT:.0f} s") from None
    console.print(report(without, with_it))
    draw_trace(console, with_it)
    broken = broken_promises(without, with_it)
    for each in broken:
        console.print(Text.assemble(("FAILED ", "bold red"), each))
    return not broken


if __name__ == "__main__":
    run_demo(lambda: main(Console(width=146, highlight=False)))
