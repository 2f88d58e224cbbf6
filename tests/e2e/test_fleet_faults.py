"""A link and the faults of a real Redis: restarts, pauses, a full server, foreign entries, permissions."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from otel_tasks.fleet.bus import BusRefusedError, BusUnavailableError, Claim, Entry, position_of
from otel_tasks.fleet.entries import CancelEntry, ProgressEntry
from otel_tasks.fleet.link import HOLD_OFF, Link
from otel_tasks.fleet.urls import open_bus
from tests.redis_server import own_redis, redis_in, redis_server, running

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tests.redis_server import Redis

__all__ = ["own_redis", "redis_server"]

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

# Seconds in which a state is reached on a machine that does other things too.
PATIENCE = 60.0
ROOT = Path(__file__).parents[2]


class Node:
    """A link, and the entries that its handler got."""

    def __init__(self, url: str, name: str, namespace: str = "shop") -> None:
        self.link = Link(open_bus(url, namespace), name)
        self.names: list[str] = []
        self.entries: list[Entry] = []
        # When the state changed, and to what.
        self.states: list[tuple[float, bool, bool]] = []
        self.link.subscribe(CancelEntry, self._take)
        self.link.on_state(self._changed)

    def _take(self, content: CancelEntry, entry: Entry) -> None:
        self.names.append(content.name)
        self.entries.append(entry)

    def _changed(self) -> None:
        self.states.append((time.monotonic(), self.link.is_up, self.link.judges))

    def post(self, name: str) -> asyncio.Future[str]:
        entry = CancelEntry(node=self.link.node, target="task", name=name, at=time.time())
        return self.link.post(entry)


@contextlib.asynccontextmanager
async def started(url: str, *names: str) -> AsyncGenerator[list[Node]]:
    """Nodes with these names, whose links are up."""
    nodes = [Node(url, name) for name in names]
    try:
        for node in nodes:
            await node.link.start(timeout=PATIENCE)
        yield nodes
    finally:
        for node in nodes:
            await node.link.stop()


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - it is not an event: a test asks for many things
            await asyncio.sleep(0.02)


def state_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged about the state of the bus, without times."""
    lines = [record.getMessage() for record in caplog.records if record.name == "otel_tasks"]
    return [line.split(",")[0] if " available again" in line else line for line in lines]


async def test_restart_with_its_data(own_redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Entries posted during a restart arrive once, and each change of state logs one line."""
    caplog.set_level(logging.INFO, "otel_tasks")
    own_redis.stop()
    own_redis.start(persistent=True)
    async with started(own_redis.url, "a", "b") as (a, b):
        before = [a.post(f"before {n}") for n in range(10)]
        await asyncio.gather(*before)
        own_redis.kill()
        await until(lambda: not a.link.is_up and not b.link.is_up)
        meanwhile = [a.post(f"meanwhile {n}") for n in range(1000)]
        await asyncio.sleep(2.0)
        assert not any(future.done() for future in meanwhile)
        own_redis.start(persistent=True)
        await asyncio.gather(*meanwhile)
        await until(lambda: len(b.names) >= 1010)
        async with started(own_redis.url, "c") as (c,):
            assert c.names == b.names

    assert b.names == [f"before {n}" for n in range(10)] + [f"meanwhile {n}" for n in range(1000)]
    lines = state_lines(caplog)
    down = [line for line in lines if "is unavailable" in line]
    assert len(down) == 2
    assert all(f"redis://127.0.0.1:{own_redis.port}/0" in line for line in down)
    assert len(lines) == 4, lines


async def test_restart_without_its_data(own_redis: Redis) -> None:
    """A node that starts after a crash without persistence finds all cancellations, at their positions."""
    async with started(own_redis.url, "a", "b") as (a, b):
        positions = [await node.post(f"{node.link.node}{n}") for n in range(5) for node in (a, b)]
        own_redis.kill()
        own_redis.start()
        await until(lambda: a.states[-1][1:] == (True, True) and b.states[-1][1:] == (True, True))
        async with started(own_redis.url, "c") as (c,):
            assert sorted(c.names) == sorted(f"{name}{n}" for n in range(5) for name in "ab")
            assert sorted(entry.id for entry in c.entries) == sorted(positions)
            assert all(entry.age < PATIENCE for entry in c.entries)
        assert position_of(await a.post("new")) > max(map(position_of, positions))
        await until(lambda: "new" in b.names)

    assert len(a.names) == len(b.names) == 11


async def test_pause_of_ten_seconds(own_redis: Redis) -> None:
    """A server that does not answer for 10 s counts as down, and no node judges until leases are renewed."""
    async with started(own_redis.url, "a", "b") as (a, b):
        bus = a.link.bus
        assert await a.link.call(lambda: bus.claim("t", "a", "d")) is Claim.TAKEN
        a.link.bus.renew("a", lease=True, claims=[])
        paused = time.monotonic()
        own_redis.pause()
        try:
            posted = [a.post(f"x{n}") for n in range(100)]
            await until(lambda: not a.link.is_up and not b.link.is_up)
            noticed = time.monotonic() - paused
            with pytest.raises(BusUnavailableError, match="does not answer"):
                await asyncio.to_thread(bus.renew, "a", lease=True, claims=["t"])
            await asyncio.sleep(10.0 - (time.monotonic() - paused))
        finally:
            own_redis.resume()
        resumed = time.monotonic()
        # The lease has expired meanwhile, and its holder renews before anyone judges.
        await until(lambda: a.link.is_up and b.link.is_up)
        assert not b.link.judges
        assert await asyncio.to_thread(bus.renew, "a", lease=True, claims=["t"]) == []
        await until(lambda: b.link.judges)
        assert time.monotonic() - resumed >= HOLD_OFF
        assert await b.link.call(lambda: b.link.bus.leases(["a"])) == {"a"}
        await asyncio.gather(*posted)
        await until(lambda: len(b.names) >= 100)
        await asyncio.sleep(0.5)

    assert b.names == a.names == [f"x{n}" for n in range(100)]
    assert noticed < 8.0


async def test_held_loop(redis_server: Redis, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """If the loop is blocked for longer than the timeout, the log does not blame only the server."""
    a = Node(redis_server.url, "a", key)
    await a.link.start(PATIENCE)
    time.sleep(4.5)  # noqa: ASYNC251 - it has to hold the loop
    await until(lambda: state_lines(caplog))
    await a.post("x")
    await until(lambda: a.names == ["x"] and a.link.is_up)
    await a.link.stop()

    (line,) = state_lines(caplog)
    assert "does not answer: the event loop of this process was held for" in line


async def test_full_server(own_redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A server that refuses writes counts as down; valid leases are renewed anyway; later, all arrives."""
    admin = own_redis.client()
    async with started(own_redis.url, "a", "b") as (a, b):
        a.link.bus.renew("a", lease=True, claims=[])
        admin.config_set("maxmemory", 1)
        posted = a.post("x")
        await until(lambda: not a.link.is_up)
        await asyncio.sleep(1.0)
        assert not posted.done()
        a.link.bus.renew("a", lease=True, claims=[])
        with pytest.raises(BusUnavailableError, match="is full, and refuses to write"):
            b.link.bus.renew("b", lease=True, claims=[])
        admin.config_set("maxmemory", 0)
        await posted
        await until(lambda: b.names == ["x"])
    admin.close()

    assert [line.split("; ")[0] for line in state_lines(caplog)] == [
        f"the fleet's bus at {a.link.bus.address} is unavailable: "
        f"{a.link.bus.address} is full, and refuses to write (maxmemory)"
    ]


async def test_replica_refuses_to_write(own_redis: Redis) -> None:
    """A replica is not a bus: the error says so."""
    own_redis.stop()
    own_redis.start()
    with own_redis.client() as admin:
        admin.replicaof("127.0.0.1", "1")
        bus = open_bus(own_redis.url, "shop")
        with pytest.raises(BusUnavailableError, match="is a replica, and refuses to write"):
            await bus.connect()
        await bus.close()


async def test_cancellations_across_reconnects(own_redis: Redis) -> None:
    """None of 1,000 cancellations is lost or arrives twice while the connections break again and again."""
    async with started(own_redis.url, "a", "b") as (a, b):
        breaking = asyncio.create_task(_break_connections(own_redis))
        posted: list[asyncio.Future[str]] = []
        for n in range(1000):
            posted.append(a.post(f"x{n}"))
            if n % 10 == 0:
                await asyncio.sleep(random.uniform(0.0, 0.05))
        await asyncio.wait_for(asyncio.gather(*posted), PATIENCE)
        broken = breaking.cancel() and await _count(breaking)
        await until(lambda: len(b.names) >= 1000 and len(a.names) >= 1000)
        await asyncio.sleep(0.5)

    assert sorted(b.names) == sorted(a.names) == sorted(f"x{n}" for n in range(1000))
    assert broken > 3


async def test_foreign_entries(redis_server: Redis, key: str, caplog: pytest.LogCaptureFixture) -> None:
    """Entries that are malformed, too large, of a later version, or of another program are skipped."""
    a = Node(redis_server.url, "a", key)
    await a.link.start(PATIENCE)
    log = f"{{{key}}}:cancel"
    with redis_server.client() as client:
        for _ in range(2):
            client.xadd(log, {"other": "field"})
            client.xadd(log, {"e": b"\x80\x04\xff"})
            client.xadd(log, {"e": b"x" * 100_000})
            client.xadd(log, {"e": b'{"v": 9, "kind": "cancel", "node": "next"}'})
            client.xadd(f"{{{key}}}:inbox:a", {"e": b"[]"})
        # A name that is no UTF-8, to which this node answers.
        client.xadd(
            log, {"e": b'{"v": 1, "kind": "inspect", "node": "\\ud800", "request": "1", "what": "x"}'}
        )
    a.link.post_to("\ud800", ProgressEntry(node="a", task_id="x", done=1.0))
    await a.post("x")
    await until(lambda: a.names)
    await a.link.stop()

    assert a.names == ["x"]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped a fleet entry of kind '' from '': it is not JSON; further ones are not logged",
        "skipped a fleet entry of kind 'cancel' from 'next': its version is 9, and this process "
        "reads version 1; further ones are not logged",
    ]


async def test_clock_of_a_node_is_wrong(redis_server: Redis, key: str) -> None:
    """A node whose clock is an hour off sends and reads positions and ages of the server's clock."""
    a = Node(redis_server.url, "a", key)
    await a.link.start(PATIENCE)
    for offset in (-3600.0, 3600.0):
        with mock.patch.object(time, "time", return_value=time.time() + offset):
            position = await a.post("x")
            wrong = Node(redis_server.url, f"wrong {offset}", key)
            await wrong.link.start(PATIENCE)
            await wrong.link.stop()
        assert abs(position_of(position)[0] / 1000 - time.time()) < PATIENCE
        assert all(entry.age < PATIENCE for entry in wrong.entries)
    await a.link.stop()


async def test_scripts_that_the_server_forgets(redis_server: Redis, key: str) -> None:
    """A server that has lost its scripts gets them again, from the loop and from the thread."""
    a = Node(redis_server.url, "a", key)
    await a.link.start(PATIENCE)
    with redis_server.client() as client:
        for n in range(2):
            client.script_flush()
            await asyncio.gather(*(a.post(f"x{n}{m}") for m in range(3)))
            client.script_flush()
            assert a.link.bus.renew("a", lease=True, claims=[]) == []
    await until(lambda: len(a.names) == 6)
    assert [state[1:] for state in a.states if not state[1]] == []
    await a.link.stop()

    assert a.names == ["x00", "x01", "x02", "x10", "x11", "x12"]


@pytest.mark.parametrize("credentials", ["", ":wrong@", "nobody:wrong@"])
async def test_wrong_password_fails_the_start(tmp_path: Path, credentials: str) -> None:
    """A start without the password, or with a wrong one, raises at once, and quotes none."""
    for server in running(redis_in(tmp_path / "redis", ["requirepass s3cret"])):
        node = Node(f"redis://{credentials}127.0.0.1:{server.port}/0", "a")
        begin = time.monotonic()
        with pytest.raises(BusRefusedError, match="refuses this process") as caught:
            await node.link.start(PATIENCE)

        assert "wrong" not in str(caught.value).removesuffix("wrong number of arguments")
        assert time.monotonic() - begin < PATIENCE / 2


async def test_wrong_database_fails_the_start(redis_server: Redis) -> None:
    """A database that the server does not have is a wrong setting, and no outage."""
    node = Node(f"redis://127.0.0.1:{redis_server.port}/4711", "a")
    with pytest.raises(BusRefusedError, match="has no database of this number"):
        await node.link.start(PATIENCE)


async def test_password_of_the_url(tmp_path: Path) -> None:
    """All connections use the user and the password of the URL; a missing permission is a refusal."""
    options = [
        "requirepass s3cret#1",
        "user app on >s3cret#1 ~* +@all",
        "user reader on >s3cret#1 ~* +@read",
    ]
    for server in running(redis_in(tmp_path / "redis", options)):
        for user in ("", "app"):
            async with started(f"redis://{user}:s3cret%231@127.0.0.1:{server.port}/0", f"a{user}") as (a,):
                await a.post("x")
                assert a.link.bus.renew("a", lease=True, claims=[]) == []
                assert "s3cret" not in a.link.bus.address
        node = Node(f"redis://reader:s3cret%231@127.0.0.1:{server.port}/0", "b")
        with pytest.raises(BusRefusedError, match="no permissions"):
            await node.link.start(PATIENCE)


async def test_user_of_the_documentation(tmp_path: Path) -> None:
    """The permissions on the reference page are enough for everything that a bus does."""
    page = (ROOT / "docs/reference/fleet.md").read_text("utf-8")
    (user,) = [line for line in page.splitlines() if line.startswith("user fleet on")]
    for server in running(redis_in(tmp_path / "redis", ["user default off", user])):
        bus = open_bus(f"redis://fleet:password@127.0.0.1:{server.port}/0", "shop")
        await bus.connect()
        assert bus.server_age > 0 or await bus.time() > 0
        ids = [await bus.publish(b"x")]
        await bus.send({"a": [b"y"]})
        reader = bus.read("a", "0-0")
        assert [entry.payload for entry in await anext(reader)] == [b"x"]
        assert [entry.payload for entry in await anext(reader)] == [b"y"]
        await reader.aclose()
        assert await bus.lost(ids) == set()
        await bus.announce("a", b"", 30.0)
        assert list(await bus.roster()) == ["a"]
        assert await bus.claim("t", "a", "d") is Claim.TAKEN
        assert await bus.claim("u", "a", "d") is Claim.TAKEN
        assert bus.renew("a", lease=True, claims=["t", "u"]) == []
        assert await bus.leases(["a"]) == {"a"}
        await bus.send({}, owner="a", finished={"t": "d"})
        await bus.release("u", "a")
        await bus.leave("a")
        await bus.close()


async def test_cancellation_of_another_program(own_redis: Redis) -> None:
    """The command of the reference page cancels a group."""
    page = (ROOT / "docs/reference/fleet.md").read_text("utf-8")
    (command,) = [line for line in page.splitlines() if line.startswith("redis-cli XADD")]
    taken: list[CancelEntry] = []
    async with started(own_redis.url, "a") as (a,):
        a.link.subscribe(CancelEntry, lambda cancel, entry: taken.append(cancel))
        with own_redis.client() as client:
            execute: Any = client.execute_command
            execute(*shlex.split(command)[1:])
        await until(lambda: taken)

    assert [(cancel.target, cancel.name, cancel.node) for cancel in taken] == [
        ("group", "tenant.acme", "cron")
    ]


async def test_password_that_changes(own_redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A password that changes while the process runs is logged; when it is restored, the link recovers."""
    async with started(own_redis.url, "a") as (a,):
        with own_redis.client() as admin:
            admin.config_set("requirepass", "new")
            admin.client_kill_filter(_type="normal", skipme=True)
            await until(lambda: any("refuses this process" in line for line in state_lines(caplog)))
            admin.config_set("requirepass", "")
        await a.post("x")
    assert len(state_lines(caplog)) <= 2


async def test_tls(tmp_path: Path) -> None:
    """`rediss://` checks the server's certificate, in the loop and in the thread."""
    certificate = self_signed(tmp_path)
    options = [
        "port 0",
        f"tls-cert-file {certificate}",
        f"tls-key-file {tmp_path / 'key.pem'}",
        f"tls-ca-cert-file {certificate}",
        "tls-auth-clients no",
    ]
    server = redis_in(tmp_path / "redis", options)
    options.append(f"tls-port {server.port}")
    for _ in running(server):
        url = f"rediss://localhost:{server.port}/0"
        async with started(f"{url}?ssl_ca_certs={certificate}", "a") as (a,):
            await a.post("x")
            assert a.link.bus.renew("a", lease=True, claims=[]) == []
            assert a.link.bus.address == url
        node = Node(url, "b")
        with pytest.raises(BusRefusedError, match=r"refuses this process.*certificate"):
            await node.link.start(PATIENCE)


async def test_waiting_for_a_server_is_cheap() -> None:
    """Without a server, a link uses hardly any CPU time, and tries to connect about once a second."""
    node = Node("redis://127.0.0.1:1/0", "a")
    attempts = mock.AsyncMock(side_effect=node.link.bus.connect)
    with mock.patch.object(node.link.bus, "connect", attempts):
        begin = time.process_time()
        await node.link.start(timeout=8.0)
        used = time.process_time() - begin
        await node.link.stop(flush=0.0)

    assert 5 <= attempts.await_count <= 20
    assert used < 2.0


async def _break_connections(server: Redis) -> int:
    with contextlib.closing(server.client()) as admin:
        for count in itertools.count():
            try:
                await asyncio.sleep(random.uniform(0.1, 0.6))
            except asyncio.CancelledError:
                return count
            admin.client_kill_filter(_type="normal", skipme=True)
    raise AssertionError


async def _count(task: asyncio.Task[int]) -> int:
    return await task


def self_signed(directory: Path) -> Path:
    """Make a certificate for localhost, and its key beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certificate = directory / "certificate.pem"
    command: list[Any] = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
        *("-keyout", directory / "key.pem", "-out", certificate),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return certificate
