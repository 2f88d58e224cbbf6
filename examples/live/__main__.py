"""Starts the shop, sends it the load of a busy day, and prints the address of its live view.

    python -m examples.live               # until Ctrl-C; or: make demo-live
    python -m examples.live --for 20      # ends by itself after 20 s; or: make demo-live ARGS="--for 20"

Needs no network but the loopback interface, and leaves no process behind.
"""

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import Awaitable, Callable

import httpx

from examples.server_process import end_on_sigterm, service

# Seconds between two reports, and those after which a client hangs up.
REPORT_EVERY = 1.2
PATIENCE = (1.0, 9.0)
# The report whose client hangs up and whose mail is stuck: the first one, and then each hundredth.
STUCK = 7
STREAMS = 12


async def main(*, port: int, seconds: float | None) -> None:
    """Serve, and send the load. Whatever ends it, the service has ended when this returns."""
    async with service(
        "examples.live.app:app", port=port, environment={"OTEL_SERVICE_NAME": "shop"}, fails=True
    ) as running:
        print(f"The live view: {running.url}/tasks/")
        print("In a terminal: otel-tasks --url", f"{running.url}/tasks", "tree")
        print("Ctrl-C ends it." if seconds is None else f"It ends after {seconds:g} s.", flush=True)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=running.url, timeout=30.0, limits=limits) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds), asyncio.TaskGroup() as load:
                    for work in (
                        ask_for_reports,
                        import_files,
                        book_payments,
                        send_mail,
                        *[watch_prices] * STREAMS,
                    ):
                        load.create_task(keep_on(work, client))
        failures = await count_failures(running.url)
        if failures:
            raise SystemExit(f"the live view did not answer: {failures}")


async def keep_on(work: Callable[[httpx.AsyncClient], Awaitable[None]], client: httpx.AsyncClient) -> None:
    """Do it again and again. A service that is being stopped or restarted is no reason to end."""
    while True:
        with contextlib.suppress(httpx.TransportError):
            await work(client)
        await asyncio.sleep(0.1)


async def ask_for_reports(client: httpx.AsyncClient) -> None:
    """Open a report every now and then. Most clients wait; some hang up."""
    async with asyncio.TaskGroup() as clients:
        for number in range(STUCK, STUCK + 100):
            hangs_up = number == STUCK or random.random() < 0.3
            patience = random.uniform(*PATIENCE) if hangs_up else 30.0
            clients.create_task(ask_for_report(client, number, 2.0 if number == STUCK else patience))
            await asyncio.sleep(REPORT_EVERY)


async def ask_for_report(client: httpx.AsyncClient, number: int, patience: float) -> None:
    """Wait for the report, but not longer than this: then the connection is closed."""
    with contextlib.suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(patience):
            await client.get(f"/report/{number}")


async def import_files(client: httpx.AsyncClient) -> None:
    """Keep the queue full."""
    response = await client.post("/imports", params={"count": 40})
    await asyncio.sleep(8.0 if response.is_error else 0.5)


async def book_payments(client: httpx.AsyncClient) -> None:
    """Book many payments at the start of the day; the ledger never gets to the end of them."""
    await client.post("/payments", params={"count": 42})
    while True:
        await asyncio.sleep(45.0)
        await client.post("/payments")


async def send_mail(client: httpx.AsyncClient) -> None:
    """Send a burst of mail."""
    await client.post("/mail", params={"count": random.randint(5, 60)})
    await asyncio.sleep(0.7)


async def watch_prices(client: httpx.AsyncClient) -> None:
    """Read a stream for some seconds, and hang up."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(random.uniform(*PATIENCE)):
            async with client.stream("GET", "/prices/stream") as response:
                async for _ in response.aiter_lines():
                    pass


async def count_failures(url: str) -> str:
    """Look at the live view once more, as the last thing."""
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        for path in ("/tasks/", "/tasks/v1/snapshot"):
            response = await client.get(path)
            if response.is_error:
                return f"{path} {response.status_code}"
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.live", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port on the loopback interface (default: a free one)"
    )
    parser.add_argument("--for", dest="seconds", type=float, help="end after so many seconds")
    arguments = parser.parse_args()

    async def run() -> None:
        """End in order, whichever signal comes."""
        end_on_sigterm()
        await main(port=arguments.port, seconds=arguments.seconds)

    try:
        asyncio.run(run())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
