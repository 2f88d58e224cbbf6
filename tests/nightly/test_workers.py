"""The blocks of the pages on workers that need other packages or a broker, with real servers."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.blocks import ENVIRONMENT, ROOT, python_blocks, run_block
from tests.nightly import backends

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

JOBS = 200
# Enough on a machine of any speed: each second worker does at least one job.
ROUNDS = 2 * JOBS

STRANDED = re.compile(r"Connection attempt to \S+ cancelled\. Reconnecting after")
"""aio-pika takes a cancellation for a failed attempt to connect: docs/howto/brokers.md."""


def block(page: str, words: str) -> str:
    """The one block of a page that contains these words."""
    (found,) = [code for code in python_blocks(page) if words in code]
    return found


def worked_off(code: str, left: Callable[[], int], folder: Path) -> Counter[str]:
    """Run workers and end each at a random moment, until no job is left; count how often each was done."""
    done: Counter[str] = Counter()
    for number in range(ROUNDS):
        if not left():
            return done
        done.update(one_worker(code, folder, after_a_job=bool(number % 2)))
    raise AssertionError(f"{left()} jobs are left after {ROUNDS} rounds, {len(done)} were done")


def one_worker(code: str, folder: Path, *, after_a_job: bool) -> list[str]:
    """Run a worker, end it at a random moment, after its first job or at any time; the jobs it has done."""
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("wb") as output, err.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=output,
            stderr=errors,
        )
    try:
        if after_a_job:
            backends.wait_until(
                lambda: b"done" in out.read_bytes() or process.poll() is not None, "a job is done"
            )
        time.sleep(random.uniform(0.5, 1.5))
        process.terminate()
        exit_code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    log = err.read_text("utf-8")
    # A signal before run() ends the process by its default action.
    assert exit_code in (143, -15), log
    assert "Traceback" not in log or STRANDED.search(log), log
    return re.findall(r"done (\d+)", out.read_text("utf-8"))


def test_redis_loses_no_job(tmp_path: Path) -> None:
    """Each job is done exactly once, and neither list holds one at the end."""
    redis = pytest.importorskip("redis")
    code = block("docs/howto/brokers.md", "from redis")
    with backends.redis(tmp_path) as url, redis.Redis.from_url(url) as client:
        client.lpush("jobs", *range(JOBS))
        done = worked_off(
            code.replace("Redis()", f"Redis.from_url({url!r})"),
            lambda: client.llen("jobs") + client.llen("jobs-in-work"),
            tmp_path,
        )
        assert client.llen("dead-jobs") == 0
    assert done == Counter(map(str, range(JOBS)))


def test_rabbitmq_loses_no_job(tmp_path: Path) -> None:
    """Each message is done exactly once: those that wait in a worker's memory are delivered again."""
    aio_pika = pytest.importorskip("aio_pika")
    code = block("docs/howto/brokers.md", "from aio_pika")

    async def declared(url: str, bodies: range = range(0)) -> int:
        async with await aio_pika.connect(url) as connection:
            channel: Any = await connection.channel()
            queue = await channel.declare_queue("jobs", durable=True)
            for number in bodies:
                await channel.default_exchange.publish(aio_pika.Message(str(number).encode()), "jobs")
            count: int = queue.declaration_result.message_count
            return count

    with backends.rabbitmq(tmp_path) as url:
        asyncio.run(declared(url, range(JOBS)))
        done = worked_off(
            code.replace("amqp://guest:guest@localhost/", url), lambda: asyncio.run(declared(url)), tmp_path
        )
    assert done == Counter(map(str, range(JOBS)))


def test_cron_library_decides_when_work_runs() -> None:
    """With a time for each second, the work runs each second."""
    pytest.importorskip("cronsim")
    code = block("docs/howto/worker.md", "from cronsim")
    hurried = code.replace("0 6 * * 1-5", "* * * * * *").replace("sleep(0.05)", "sleep(2.5)")
    assert hurried.count("2.5") == hurried.count("* * * * * *") == 1
    assert run_block(hurried).splitlines() in (["invoices sent"] * 2, ["invoices sent"] * 3)
    assert run_block(code) == ""
