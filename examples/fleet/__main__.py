"""Starts two replicas of an API, two workers, Redis, and RabbitMQ, and shows how a fleet joins them.

    python -m examples.fleet      # or: make demo-fleet

Four scenes: a client hangs up; a job is cancelled through the other replica; an API process is killed; a
worker is killed. Ends with an error unless it keeps every promise of README.md. Takes about a minute, needs
only the loopback interface, and leaves no process behind. Without the two servers, it shows the first two
scenes in one process.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group
from rich.text import Text

from examples import rabbitmq_server, redis_server
from examples.client_spans import ClientSpans
from examples.otlp_receiver import Received, receiver
from examples.server_process import ROOT, Service, end, run_demo, service
from examples.three_services.__main__ import print_checks, telemetry_environment
from examples.trace_tree import Span, trace_tree

CUSTOMER = "customer"
PAGES = 8
# Seconds for one scene.
TIME_LIMIT = 60.0
LOOK_EVERY = 0.05
INSTALL = "sudo apt-get install --no-install-recommends redis-server rabbitmq-server"


@dataclass
class Worker:
    """A worker's process, which has children; the group is ended as a whole."""

    process: asyncio.subprocess.Process
    log: Path

    @property
    def group(self) -> int:
        """The id of its process group."""
        return self.process.pid

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)


@dataclass
class Running:
    """What was started."""

    apis: list[Service]
    workers: list[Worker]
    received: Received
    calls: ClientSpans


@dataclass
class Scene:
    """One scene: its title, its result, and the promises that were not kept."""

    title: str
    took: str = ""
    trace_id: str = ""
    left_at: float | None = None
    complaints: dict[str, list[str]] = field(default_factory=dict)

    def check(self, promise: str, *complaints: str) -> None:
        """Record a promise, with its violations."""
        self.complaints[promise] = [each for each in complaints if each]


async def main(console: Console) -> bool:
    """Run the demo; True if every promise was kept. Whatever ends it, its processes have ended then."""
    calls = ClientSpans(CUSTOMER, ["/book/{book}", "/jobs/{name}"])
    with receiver() as received:
        if redis_server.is_installed() and rabbitmq_server.is_installed():
            scenes = [client_hangs_up, cancelled_elsewhere, api_is_killed, worker_is_killed]
            running = several_processes(received, calls)
        else:
            console.print(f"Two scenes, in one process. For all four, install the servers:\n{INSTALL}\n")
            scenes = [client_hangs_up, cancelled_elsewhere]
            running = one_process(received, calls)
        async with running as started:
            shown = [await scene(started) for scene in scenes]
        # Their batches are sent when they end; the client's spans are the roots.
        await asyncio.to_thread(calls.send, received.endpoint)
        for number, scene_shown in enumerate(shown, start=1):
            draw(console, number, scene_shown, received.spans())
    return print_checks(console, {name: found for each in shown for name, found in each.complaints.items()})


# --- processes -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def several_processes(received: Received, calls: ClientSpans) -> AsyncIterator[Running]:
    """Two replicas, two workers, and the servers between them."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="otel-tasks-demo-")))
        environment = telemetry_environment(received.endpoint) | await start_servers(stack, folder)
        workers = [
            await stack.enter_async_context(worker(f"worker {number}", environment, folder))
            for number in (1, 2)
        ]
        apis = [await start_api(stack, replica, environment) for replica in "AB"]
        await wait_for_nodes(apis[0].url, 4)
        try:
            yield Running(apis, workers, received, calls)
        except BaseException:
            for each in workers:
                sys.stderr.write(each.log.read_text("utf-8", "replace")[-4000:])
            raise


@contextlib.asynccontextmanager
async def one_process(received: Received, calls: ClientSpans) -> AsyncIterator[Running]:
    """One API, which runs the tasks itself."""
    async with contextlib.AsyncExitStack() as stack:
        api = await start_api(stack, "A", telemetry_environment(received.endpoint))
        yield Running([api, api], [], received, calls)


async def start_servers(stack: contextlib.AsyncExitStack, folder: Path) -> dict[str, str]:
    """Start Redis and RabbitMQ, and return their addresses as the example's variables."""
    (folder / "redis").mkdir()
    (folder / "rabbitmq").mkdir()
    redis = redis_server.Redis(folder / "redis", free_port())
    rabbitmq = rabbitmq_server.RabbitMQ(folder / "rabbitmq", (free_port(), free_port(), free_port()))
    stack.callback(redis.close)
    stack.callback(rabbitmq.close)
    await asyncio.gather(asyncio.to_thread(redis.start), asyncio.to_thread(rabbitmq.start))
    return {"REDIS_URL": redis.url, "AMQP_URL": rabbitmq.url}


async def start_api(
    stack: contextlib.AsyncExitStack, replica: str, environment: Mapping[str, str]
) -> Service:
    own = {**environment, "OTEL_SERVICE_NAME": f"api {replica}"}
    return await stack.enter_async_context(service("examples.fleet.api:app", environment=own))


@contextlib.asynccontextmanager
async def worker(name: str, environment: Mapping[str, str], folder: Path) -> AsyncIterator[Worker]:
    """A Taskiq worker; all its processes have ended when the block ends."""
    arguments = ["worker", "examples.fleet.tasks:broker", "--workers", "1", "--max-async-tasks", "50"]
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "taskiq",
            *arguments,
            cwd=ROOT,
            env={**os.environ, **environment, "OTEL_SERVICE_NAME": name},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running = Worker(process, log)
    try:
        yield running
    finally:
        await end(process)
        running.kill()


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port: int = holder.getsockname()[1]
        return port


# --- the scenes ------------------------------------------------------------------------------------------


async def client_hangs_up(running: Running) -> Scene:
    scene = Scene(f"GET /book/7: {PAGES} pages, rendered by the workers; the client hangs up")
    url = running.apis[0].url
    async with httpx.AsyncClient(timeout=TIME_LIMIT) as client:
        running.calls.record(client, lambda trace_id: setattr(scene, "trace_id", trace_id))
        answer = asyncio.create_task(
            client.get(f"{url}/book/7", params={"pages": PAGES, "seconds": TIME_LIMIT})
        )
        at_work = await wait_for_tasks(url, lambda rows: len(of_workers(rows, running)) == PAGES)
        scene.left_at = time.time()
        # httpx closes the connection when a request is cancelled: to the API, the client is gone.
        answer.cancel()
        await asyncio.wait([answer])
    await wait_for_tasks(url, lambda rows: not rows)
    # In one process, the calls are there too.
    count = PAGES if running.workers else 2 * PAGES
    spans = await spans_of(running, scene.trace_id, "worker" if running.workers else "api", count)
    ended = [span for span in spans if span.cancel_reason == "client_disconnect"]
    scene.took = f"{(max(span.end for span in ended) - scene.left_at) * 1000:.0f} ms" if ended else "never"
    scene.check(
        "a client that hangs up cancels its tasks on the workers, in the trace of its request",
        "" if len(ended) == count else f"{len(ended)} of {count} spans say client_disconnect",
    )
    if running.workers:
        busy = {group_of(row) for row in of_workers(at_work, running)}
        scene.check("both workers had work", "" if len(busy) == len(running.workers) else f"{len(busy)} had")
    return scene


async def cancelled_elsewhere(running: Running) -> Scene:
    scene = Scene("POST /jobs/import-17 at replica A, DELETE /jobs/import-17 at replica B")
    here, there = (api.url for api in running.apis)
    await start_job(running, scene, "import-17", here)
    async with httpx.AsyncClient(timeout=TIME_LIMIT) as client:
        began = time.perf_counter()
        report = (await client.delete(f"{there}/jobs/import-17")).raise_for_status().json()
        scene.took = f"{(time.perf_counter() - began) * 1000:.0f} ms"
    scene.check(
        "a job is cancelled through any replica",
        "" if report["asked"] and report["asked"] == report["ended"] else f"the report is {report}",
        "" if not report["silent"] else f"silent: {report['silent']}",
    )
    await wait_for_tasks(here, lambda rows: not rows)
    await spans_of(running, scene.trace_id, "api", 1)
    return scene


async def api_is_killed(running: Running) -> Scene:
    scene = Scene("POST /jobs/import-18 at replica A, which is killed")
    killed, other = running.apis
    await start_job(running, scene, "import-18", killed.url)
    # It takes with it what it has not sent.
    await wait_for_span(running, scene.trace_id, lambda span: span.is_request)
    killed_at = time.time()
    killed.process.kill()
    await wait_for_tasks(other.url, lambda rows: not of_workers(rows, running))
    spans = await spans_of(running, scene.trace_id, "worker", 1)
    scene.took = f"{max(span.end for span in spans) - killed_at:.1f} s"
    scene.check(
        "an API process that is killed takes its tasks on the workers with it",
        *(f"{span.name}: {span.cancel_reason}" for span in spans if span.cancel_reason != "host_lost"),
    )
    return scene


async def worker_is_killed(running: Running) -> Scene:
    scene = Scene("POST /jobs/import-19 at replica B; the worker that runs it is killed")
    url = running.apis[1].url
    rows = await start_job(running, scene, "import-19", url, rows=50)
    group = group_of(rows[0])
    began = time.perf_counter()
    for each in running.workers:
        if each.group == group:
            each.kill()
    await wait_for_tasks(url, lambda rows: not rows)
    scene.took = f"{time.perf_counter() - began:.1f} s"
    spans = await spans_of(running, scene.trace_id, "worker", 1)
    scene.check(
        "the task of a worker that is killed is finished by another one",
        *(f"{span.name}: {span.outcome}" for span in spans if span.outcome != "success"),
    )
    return scene


async def start_job(
    running: Running, scene: Scene, name: str, url: str, rows: int = 1000
) -> list[dict[str, Any]]:
    """Start a job; return its rows on the workers, once it runs there."""
    async with httpx.AsyncClient(timeout=TIME_LIMIT) as client:
        running.calls.record(client, lambda trace_id: setattr(scene, "trace_id", trace_id))
        (await client.post(f"{url}/jobs/{name}", params={"rows": rows})).raise_for_status()
    found = await wait_for_tasks(url, lambda rows: bool(of_workers(rows, running)))
    return of_workers(found, running)


# --- looking ---------------------------------------------------------------------------------------------


async def wait_for_nodes(url: str, count: int) -> None:
    """Wait until so many processes have joined the fleet."""
    async with httpx.AsyncClient(timeout=TIME_LIMIT) as client, asyncio.timeout(TIME_LIMIT):
        nodes: list[str] = []
        while len(nodes) < count:
            await asyncio.sleep(LOOK_EVERY)
            nodes = (await client.get(f"{url}/nodes")).raise_for_status().json()


async def wait_for_tasks(url: str, arrived: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Look at the live tasks of all processes until they are as expected."""
    async with httpx.AsyncClient(timeout=TIME_LIMIT) as client, asyncio.timeout(TIME_LIMIT):
        while True:
            rows: list[dict[str, Any]] = (await client.get(f"{url}/tasks")).raise_for_status().json()
            if arrived(rows):
                return rows
            await asyncio.sleep(LOOK_EVERY)


def of_workers(rows: Iterable[dict[str, Any]], running: Running) -> list[dict[str, Any]]:
    """The rows of tasks that workers run."""
    if not running.workers:
        # In one process, each task is there twice: as the call, and as what is called.
        calls = list(rows)
        return calls[len(calls) // 2 :] if len(calls) > 1 else []
    groups = {each.group for each in running.workers}
    return [row for row in rows if group_of(row) in groups]


def group_of(row: dict[str, Any]) -> int:
    """The process group of a row's process, 0 if that is gone."""
    try:
        return os.getpgid(int(row["node"].split("/")[1]))
    except ProcessLookupError:
        return 0


async def spans_of(running: Running, trace_id: str, process: str, count: int) -> list[Span]:
    """Wait until at least so many spans of tasks in these processes have come, and return them."""
    async with asyncio.timeout(TIME_LIMIT):
        while True:
            spans = [
                span
                for span in running.received.spans(trace_id)
                if span.is_task and span.service.startswith(process)
            ]
            if len(spans) >= count:
                return spans
            await asyncio.sleep(LOOK_EVERY)


async def wait_for_span(running: Running, trace_id: str, is_wanted: Callable[[Span], bool]) -> None:
    async with asyncio.timeout(TIME_LIMIT):
        while not any(map(is_wanted, running.received.spans(trace_id))):  # noqa: ASYNC110 - a thread receives
            await asyncio.sleep(LOOK_EVERY)


# --- what is shown ---------------------------------------------------------------------------------------


def draw(console: Console, number: int, scene: Scene, spans: list[Span]) -> None:
    heading = Text.assemble((f"{number}. {scene.title}  ", "bold cyan"), scene.took)
    trace = [span for span in spans if span.trace_id == scene.trace_id]
    tree = trace_tree(trace, hung_up_at=scene.left_at) if trace else Text("no span has come", "red")
    console.print(Group(heading, tree, Text(f"trace {scene.trace_id}", "dim")), "")


if __name__ == "__main__":
    # As for the services: the demo is about their traces.
    os.environ["OTEL_SDK_DISABLED"] = "false"
    run_demo(lambda: main(Console(width=134, highlight=False)))
