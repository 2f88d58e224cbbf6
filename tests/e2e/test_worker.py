"""The workers of `examples/`, each in a process of its own, which a hundred signals end at random moments."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from examples.otlp_receiver import receiver
from examples.worker.spool import Spool
from examples.worker.submit import submit
from tests.blocks import ROOT
from tests.processes import marked_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

pytestmark = [pytest.mark.e2e]

# Most of a round is waiting, so that the lanes share a core well.
LANES = 8
# A hundred signals, and four.
MEMORY_ROUNDS = 13
# Each worker goes on with the folder of the one before.
SPOOL_ROUNDS = 5
# A round that lasts longer is a worker that hangs.
LIMIT = 60.0

# The short worker with its jobs counted where they enter the queue, and those that it leaves there.
SHORT = """
import logging
from examples import worker_short as worker
from otel_tasks import run

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
put = worker.queue.put

async def counted_put(job):
    await put(job)
    logging.info("job %d queued", job.id)

worker.queue.put = counted_put
try:
    run(worker.main(), manager=worker.manager)
finally:
    while not worker.queue.empty():
        logging.info("job %d left", worker.queue.get_nowait().id)
"""


class Worker:
    """A worker that runs, and what it logs."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=marked_environment() | environment,
            stderr=subprocess.PIPE,
            # Unbuffered: communicate() does not return what readline() has read ahead.
            bufsize=0,
        )
        self.log = ""

    def until(self, words: str) -> str:
        """Read its log up to a line with these words, and return that."""
        assert self.process.stderr is not None
        while line := self.process.stderr.readline().decode():
            self.log += line
            if words in line:
                return line
        raise AssertionError(self.log)

    def stop(self, *delays: float) -> None:
        """Send a SIGTERM after each delay; it must end with the code for that, without an error."""
        for delay in delays:
            time.sleep(delay)
            self.process.send_signal(signal.SIGTERM)
        _, rest = self.process.communicate(timeout=LIMIT)
        self.log += rest.decode()
        # A second signal can meet a process whose run() has returned, and end it by its default action.
        expected = {143} if len(delays) == 1 else {143, -signal.SIGTERM}
        assert self.process.returncode in expected, self.log
        assert not re.search(r"\b(ERROR|CRITICAL)\b|never awaited", self.log), self.log


@contextmanager
def worker(*command: str, **environment: str) -> Iterator[Worker]:
    """A worker, killed at the end if it still runs."""
    running = Worker(*command, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


def spool_worker(folder: Path, **environment: str) -> AbstractContextManager[Worker]:
    """The worker with the spool in a folder."""
    return worker("-m", "examples.worker", WORKER_SPOOL=str(folder), WORKER_PORT="0", **environment)


def delays(chance: random.Random, longest: float) -> list[float]:
    """When to send the signals of a round: the first at any time; often a second one, soon after."""
    first = chance.uniform(0.0, longest)
    return [first, chance.uniform(0.0, 0.05)] if chance.random() < 0.3 else [first]


def test_random_signals_lose_no_job_of_a_spool(tmp_path: Path) -> None:
    """Each order that was submitted is shipped or dead, once, however often its worker was ended."""
    seeds = [random.randrange(10**9) for _ in range(LANES)]
    with ThreadPoolExecutor(LANES) as lanes:
        endings = list(lanes.map(spool_rounds, [tmp_path / str(seed) for seed in seeds], seeds))
    print(sum(endings, Counter()))


def spool_rounds(folder: Path, seed: int) -> Counter[str]:
    chance = random.Random(seed)
    spool = Spool(folder)
    submitted: set[str] = set()
    log = ""
    for _ in range(SPOOL_ROUNDS):
        submitted.update(submit(spool, 15))
        with spool_worker(folder) as running:
            running.until("probes on")
            submitted.update(submit(spool, 5))
            running.stop(*delays(chance, 0.8))
        log += running.log
        assert names(folder, "active") == []
        assert sorted([*names(folder, "new"), *names(folder, "done"), *names(folder, "dead")]) == sorted(
            submitted
        )
    with spool_worker(folder) as running:
        running.until("probes on")
        while names(folder, "new") or names(folder, "active"):
            time.sleep(0.05)
        running.stop(0.0)
    log += running.log
    assert sorted([*names(folder, "done"), *names(folder, "dead")]) == sorted(submitted)
    # What the worker says agrees with what the producer finds.
    said = {how: Counter(re.findall(rf"order (\S+) {how}", log)) for how in ("shipped", "is dead")}
    assert said["shipped"] == Counter(names(folder, "done"))
    assert said["is dead"] == Counter(names(folder, "dead"))
    return Counter({how: len(orders) for how, orders in said.items()})


def names(folder: Path, state: str) -> list[str]:
    return [path.name for path in (folder / state).iterdir()]


def test_hundred_signals_lose_no_job_in_memory() -> None:
    """Each job that was put into the queue is done, dead, or left in the queue, and is so once."""
    seeds = [random.randrange(10**9) for _ in range(LANES)]
    with ThreadPoolExecutor(LANES) as lanes:
        endings = list(lanes.map(memory_rounds, seeds))
    total = sum(endings, Counter())
    print(total)
    assert min(total["done"], total["left"]) > 0


def memory_rounds(seed: int) -> Counter[str]:
    chance = random.Random(seed)
    total: Counter[str] = Counter()
    for _ in range(MEMORY_ROUNDS):
        with worker("-c", SHORT) as running:
            running.until("tick")
            running.stop(*delays(chance, 2.0))
        jobs: dict[str, Counter[str]] = {
            "queued": Counter(),
            "done": Counter(),
            "dead": Counter(),
            "left": Counter(),
        }
        for number, what in re.findall(r"job (\d+) (queued|done|dead|left)", running.log):
            jobs[what][number] += 1
        assert jobs["done"] + jobs["dead"] + jobs["left"] == jobs["queued"], running.log
        total += Counter({what: count.total() for what, count in jobs.items()})
    return total


# -- the worker in a container ---------------------------------------------------------------------------


def probes_of(running: Worker) -> tuple[str, int]:
    """Where it listens."""
    (found,) = re.findall(r"probes on http://([\d.]+):(\d+)", running.until("probes on"))
    return found[0], int(found[1])


def exchange(address: tuple[str, int], request: bytes) -> bytes:
    """Send something, keep the connection open, and return all that comes back until the worker closes it."""
    with socket.create_connection(address, timeout=LIMIT) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def status(address: tuple[str, int], path: str) -> tuple[int, str]:
    head, _, body = exchange(address, f"GET {path} HTTP/1.1\r\nHost: pod\r\n\r\n".encode()).partition(
        b"\r\n\r\n"
    )
    return int(head.split()[1]), body.decode()


def test_probes_follow_the_life_of_the_worker(tmp_path: Path) -> None:
    """It is ready once it follows the rates, and not while it finishes its orders after a signal."""
    order = Spool(tmp_path).submit({"price": 1.0, "seconds": 2.0})
    with spool_worker(tmp_path) as running:
        address = probes_of(running)
        while (found := status(address, "/readyz")) != (200, "ok\n"):
            assert found == (503, "starting\n")
        while names(tmp_path, "new"):
            time.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        running.until("received SIGTERM")
        assert status(address, "/readyz") == (503, "shutting down\n")
        assert status(address, "/livez") == (200, "ok\n")
        running.stop()
    assert names(tmp_path, "done") == [order]


def test_bad_clients_get_an_answer_and_hold_nothing_up(tmp_path: Path) -> None:
    """Noise, a head without end, and silence are answered; a client that stays connected delays no end."""
    with spool_worker(tmp_path) as running:
        address = probes_of(running)
        with ThreadPoolExecutor() as clients, socket.create_connection(address, timeout=LIMIT) as staying:
            silent = clients.submit(exchange, address, b"")
            slow = clients.submit(exchange, address, b"GET /livez HTTP/1.1\r\nHo")
            assert exchange(address, b"\x16\x03\x01\x00\xee\r\n\r\n").startswith(b"HTTP/1.1 400 ")
            endless = b"GET /livez HTTP/1.1\r\nHost: pod\r\nX: " + b"x" * 100_000
            assert exchange(address, endless).startswith(b"HTTP/1.1 431 ")
            body = b"POST /livez HTTP/1.1\r\nHost: pod\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
            assert exchange(address, body).startswith(b"HTTP/1.1 405 ")
            socket.create_connection(address, timeout=LIMIT).close()
            assert silent.result(LIMIT).startswith(b"HTTP/1.1 408 ")
            assert slow.result(LIMIT).startswith(b"HTTP/1.1 408 ")
            staying.sendall(b"GET /livez HTTP/1.1\r\n")
            running.stop(0.0)


def test_each_order_is_a_trace_with_its_attempts(tmp_path: Path) -> None:
    """The spans arrive although the worker ends; an attempt is below its order, and each order is a root."""
    spool = Spool(tmp_path)
    orders = [spool.submit({"price": 1.0, "seconds": 0.01, "failures": n}) for n in range(4)]
    with (
        receiver() as received,
        spool_worker(tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=received.endpoint) as running,
    ):
        while len(names(tmp_path, "done")) + len(names(tmp_path, "dead")) < len(orders):
            time.sleep(0.01)
        running.stop(0.0)
        spans = received.spans()
        metrics = {point.name for point in received.points()}
    roots = [span for span in spans if span.name == "ship" and span.parent_id is None]
    assert len({span.trace_id for span in roots}) == len(roots) == len(orders)
    attempts = Counter(span.trace_id for span in spans if "otel_tasks.task.attempt" in span.attributes)
    assert sorted(attempts.values()) == [1, 2, 3, 3]
    assert Counter(span.attributes["otel_tasks.task.outcome"] for span in roots) == {"success": 3, "error": 1}
    assert {"worker.backlog", "otel_tasks.task.duration"} <= metrics


def test_order_of_a_crashed_worker_runs_again(tmp_path: Path) -> None:
    """SIGKILL leaves it in `active`, where the next worker finds it. A file that is no order is dead."""
    order = Spool(tmp_path).submit({"price": 1.0, "seconds": 0.5})
    with spool_worker(tmp_path) as running:
        probes_of(running)
        while not names(tmp_path, "active"):
            time.sleep(0.01)
        running.process.kill()
        running.process.wait(LIMIT)
    assert names(tmp_path, "active") == [order]
    (tmp_path / "new" / "broken").write_text("{")
    with spool_worker(tmp_path) as running:
        running.until(f"{order} shipped")
        running.stop(0.0)
    assert "1 orders run again" in running.log
    assert (names(tmp_path, "done"), names(tmp_path, "dead")) == ([order], ["broken"])
