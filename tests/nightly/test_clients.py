from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.nightly import backends

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

SEED = 20_260
USERS = 24
REQUESTS = 60
"""Requests of each user. In most of them the user has little patience."""

SLOWEST = 0.03
"""Seconds that a server takes at most. 24 users share five connections: most of a request waits for one."""

LATEST = 0.1
"""Seconds after which a user hangs up at the latest."""

RUN_TIMEOUT = 120.0
ANSWER_TIMEOUT = 40.0

ENOUGH_ERRORS = 100
"""Then the users stop: with every place of a pool lost, each further request only takes its time to fail."""

BACKENDS: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "redis": backends.redis,
    "asyncpg": backends.postgresql,
    "psycopg": backends.postgresql,
    "sqlalchemy-asyncpg": backends.postgresql,
    "sqlalchemy-psycopg": backends.postgresql,
    "httpx": backends.http,
    "httpx2": backends.http,
    "aiohttp": backends.http,
    "pymongo": backends.mongodb,
    "aio-pika": backends.rabbitmq,
}


UNSAFE = {
    # A request that is cancelled just when it gets a place in the pool keeps it. Not in every run.
    "httpx",
    # A cancelled call closes its channel, which the pool gives to the next request.
    "aio-pika",
}
"""Clients that a cancellation harms, as docs/howto/clients.md describes."""

LOGGED = {
    # psycopg could not roll back the transaction of a cancelled COPY, and its pool replaces the connection.
    "psycopg": r"(error ignored in rollback on|closing returned connection:|discarding closed connection:)"
    r" <psycopg\.AsyncConnection \[(ACTIVE|BAD)\].*",
}
"""What a client logs about a cancellation it copes with."""


@dataclass
class Tally:
    """What became of all requests."""

    hung_up: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    cancelled: dict[str, int] = field(default_factory=dict)
    pool: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


@pytest.mark.parametrize("client", [client for client in BACKENDS if client not in UNSAFE])
def test_hang_ups_corrupt_no_shared_connection(client: str, tmp_path: Path) -> None:
    """Every answer belongs to its asker, no request that stays fails, and the pool is whole afterwards."""
    tally = everyone_hangs_up(client, tmp_path)

    assert (tally.wrong, tally.errors, tally.pool, tally.log) == ([], [], [], [])


@pytest.mark.parametrize("client", sorted(UNSAFE))
def test_hang_ups_mix_up_no_answers_of_an_unsafe_client(client: str, tmp_path: Path) -> None:
    """What the client loses is a connection or a channel, as the docs say, and never an answer."""
    tally = everyone_hangs_up(client, tmp_path)

    assert tally.wrong == []


@pytest.mark.parametrize("client", sorted(UNSAFE))
def test_uncancellable_protects_an_unsafe_client(client: str, tmp_path: Path) -> None:
    """In `uncancellable()`, no hang-up reaches the client, and nothing fails."""
    tally = everyone_hangs_up(client, tmp_path, protected=True)

    assert (tally.wrong, tally.errors, tally.pool, tally.log) == ([], [], [], [])


def test_mixed_up_answers_are_noticed(tmp_path: Path) -> None:
    """A pool that takes back connections with an answer on its way mixes answers up, and that is seen."""
    with (
        backends.redis(tmp_path) as backend,
        backends.service("naive", backend, tmp_path, protected=False) as port,
    ):
        tally = asyncio.run(everyone_asks(port, operations=look(port, "/operations")))

    assert tally.wrong


def everyone_hangs_up(client: str, folder: Path, *, protected: bool = False) -> Tally:
    """Run the whole scenario against a server of its own, and print what came of it."""
    with (
        BACKENDS[client](folder) as backend,
        backends.service(client, backend, folder, protected=protected) as port,
    ):
        tally = asyncio.run(everyone_asks(port, operations=look(port, "/operations")))
        tally.cancelled = state_at_rest(port)["cancelled"]
        tally.pool = look(port, "/pool")
    log = (folder / "service.log").read_text("utf-8", errors="replace").splitlines()
    log = [line for line in log if line]
    tally.log = [line for line in log if not re.fullmatch(LOGGED.get(client, ""), line)]

    cancelled = sum(tally.cancelled.values())
    print(
        f"{client}{' in uncancellable()' if protected else ''}: {tally.answered} answered, "
        f"{tally.hung_up} hung up, {cancelled} cancelled ({tally.cancelled}), {len(tally.wrong)} wrong, "
        f"{len(tally.errors)} errors, pool {tally.pool or 'whole'}, "
        f"{len(tally.log)} lines logged, and {len(log) - len(tally.log)} expected ones"
    )
    # Otherwise the hang-ups missed what they are to hit. The slower the machine, the more come too early.
    assert all(tally.cancelled.values())
    assert cancelled >= tally.hung_up / 4
    return tally


async def everyone_asks(port: int, *, operations: list[str]) -> Tally:
    """Let all users ask at the same time."""
    tally = Tally()
    async with asyncio.timeout(RUN_TIMEOUT), asyncio.TaskGroup() as users:
        for number in range(USERS):
            users.create_task(one_user_asks(port, number, operations, tally))
    return tally


async def one_user_asks(port: int, number: int, operations: list[str], tally: Tally) -> None:
    """Ask one thing after the other, and lose patience with most of them."""
    chance = random.Random(SEED + number)
    for count in range(REQUESTS):
        token = f"{number}-{count}"
        patience = chance.uniform(0, LATEST) if chance.random() < 0.6 else None
        path = (
            f"/ask/{operations[count % len(operations)]}/{token}?seconds={chance.uniform(0.001, SLOWEST):.4f}"
        )
        try:
            status, answer = await request(port, path, patience, reset=chance.random() < 0.5)
        except TimeoutError:
            if patience is not None:
                tally.hung_up += 1
            else:
                tally.errors.append(f"{path}: no answer")
            continue
        if len(tally.errors) >= ENOUGH_ERRORS:
            return
        tally.answered += 1
        if status != 200:
            tally.errors.append(f"{path}: {status} {answer}")
        elif answer != token:
            tally.wrong.append(f"{path}: {answer}")


async def request(port: int, path: str, patience: float | None, *, reset: bool) -> tuple[int, Any]:
    """Ask and read the answer; raise TimeoutError and hang up when the patience is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT if patience is None else patience):
            writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    except TimeoutError:
        if reset:
            writer.transport.abort()
        raise
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    status = int(head.split()[1]) if head else 0
    return status, json.loads(body) if status == 200 else body.decode(errors="replace")


def state_at_rest(port: int) -> dict[str, Any]:
    """The service's counts when no request is left in it."""
    end = time.monotonic() + ANSWER_TIMEOUT
    while (state := look(port, "/state"))["active"]:
        assert time.monotonic() < end, f"{state['active']} requests do not end"
        time.sleep(0.05)
    found: dict[str, Any] = state
    return found


def look(port: int, path: str) -> Any:
    """Ask the service something about itself."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return json.loads(body)
    finally:
        connection.close()
