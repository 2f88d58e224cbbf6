"""The bus on a Redis server, version 6.2 or newer, or on Valkey.

A node has three connections: one blocks in XREAD, one is shared by all calls, and one belongs to the thread
that renews. Every key starts with the namespace in braces, so that a cluster keeps all of them on one shard:

    {shop}:cancel           stream: the log
    {shop}:inbox:<node>     stream: the entries for one node
    {shop}:nodes, :seen     hash and sorted set: the roster
    {shop}:lease:<node>     a key that expires
    {shop}:claim:<task>     a key that expires: the owner and the message
    {shop}:done:<task>:<message>    a key that expires
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis
from redis.asyncio.connection import ConnectionPool as AsyncConnectionPool
from redis.asyncio.connection import SSLConnection
from redis.exceptions import NoScriptError, RedisError

from otel_tasks.fleet.bus import (
    CALL_TIMEOUT,
    DONE_KEPT,
    END,
    INBOX_KEPT,
    INBOX_LIMIT,
    KEPT,
    LEASE,
    NONE_FINISHED,
    START,
    BusRefusedError,
    BusUnavailableError,
    Claim,
    Entry,
    position_of,
)
from otel_tasks.fleet.redis_channel import Channel, answered_within, exchange, unavailable
from otel_tasks.fleet.redis_claims import Claims
from otel_tasks.fleet.redis_scripts import (
    ANNOUNCE,
    CATCH_UP,
    FINISH,
    PUBLISH,
    RELEASE,
    RENEW,
    ROSTER,
    SEND,
    SOURCES,
    TRIM,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence

# Entries that are read at once.
_BATCH = 1000
# Seconds for which XREAD blocks, and seconds more until the server counts as unavailable. Together they are
# shorter than LEASE - RENEWED_EVERY: no node overlooks a pause of the server in which a lease expires.
_BLOCK = 1.0
_PATIENCE = 1.5
# The most keys that a search for fleets scans: about 50 ms.
_SCANNED = 200_000
# Bytes of several payloads in one entry of an inbox.
_TOGETHER = 2048
# Claims that one script renews.
_RENEWED = 500


class RedisBus:
    """The connections of one node to a Redis server.

    Args:
        url: ``redis://``, ``rediss://``, or ``unix://``, with user, password, and redis-py's options.
        namespace: The fleet.

    Raises:
        ValueError: The URL is malformed.
    """

    renew_blocks = True

    def __init__(self, url: str, namespace: str) -> None:
        self.server_age = 0.0
        self._prefix = "{" + namespace + "}:"
        self._pool, self._thread_pool = _pools(url)
        self.address = _address(self._pool)
        self._channel = Channel(self._make_connection, self.address)
        self._claims = Claims(self._channel, self.address)
        self._thread_connection: Any = None
        self._closed = False
        # The message of each claim: a claim that has expired is taken again.
        self._deliveries: dict[str, str] = {}
        self._after: dict[str, str] = {}

    def _make_connection(self) -> Any:
        # Any: redis-py types neither this nor the methods of a connection.
        make: Any = self._pool.make_connection
        return make()

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    async def connect(self) -> None:
        """Check that the server is new enough, answers, and can be written to.

        Cancellation: ends the check.
        """
        self._closed = False
        self._channel.open()
        await self._channel.call(
            TRIM(self._key("cancel"), args=(int(KEPT),)),
            ("SET", self._key("check"), "", "PX", 1000),
        )
        self.server_age = 0.0
        try:
            (info,) = await self._channel.call(("INFO", "server"))
        except BusRefusedError:
            # The user may not call INFO. Assume that the server has just started.
            return
        facts = dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)
        self.server_age = float(facts.get("uptime_in_seconds", 0))

    async def close(self) -> None:
        """End all connections.

        Cancellation: may leave one open.
        """
        self._closed = True
        if self._thread_connection is not None:
            self._thread_connection.disconnect()
        await self._channel.close()

    async def time(self) -> float:
        """Return the time of the server's clock.

        Cancellation: ends the wait.
        """
        ((seconds, micros),) = await self._channel.call(("TIME",))
        return int(seconds) + int(micros) / 1e6

    async def publish(self, payload: bytes) -> str:
        """Append an entry to the log.

        Cancellation: ends the wait; the entry is appended anyway.
        """
        (entry_id,) = await self._channel.call(PUBLISH(self._key("cancel"), args=(payload, int(KEPT))))
        return str(entry_id.decode())

    async def lost(self, ids: Sequence[str]) -> set[str]:
        """Return those of these entries that the log no longer has.

        Cancellation: ends the wait.
        """
        log = self._key("cancel")
        found = await self._channel.call(*(("XRANGE", log, entry_id, entry_id) for entry_id in ids))
        return {entry_id for entry_id, entries in zip(ids, found, strict=True) if not entries}

    async def send(
        self,
        inboxes: Mapping[str, Collection[bytes]],
        *,
        owner: str = "",
        finished: Mapping[str, str] = NONE_FINISHED,
    ) -> None:
        """Append entries to inboxes, and turn claims into marks that their messages were executed.

        Cancellation: ends the wait; everything is done anyway.
        """
        commands: list[tuple[str | bytes | int, ...]] = []
        if inboxes:
            keys = []
            counted: list[bytes | int] = []
            for node, payloads in inboxes.items():
                for together in _grouped(payloads):
                    keys.append(self._key("inbox", node))
                    counted += (len(together), *together)
            commands.append(SEND(*keys, args=(INBOX_LIMIT, int(INBOX_KEPT), *counted)))
        if finished:
            keys = []
            for key, delivery in finished.items():
                self._deliveries.pop(key, None)
                keys += self._claim_keys(key, delivery)
            commands.append(FINISH(*keys, args=(f"{owner} ", _ms(DONE_KEPT))))
        await self._channel.call(*commands, patient=True)

    async def read(self, inbox: str, after: str) -> AsyncGenerator[list[Entry]]:
        """Iterate over the log and an inbox, on a connection of its own.

        Cancellation: ends the iteration, and the connection.
        """
        log, own = self._key("cancel"), self._key("inbox", inbox)
        reading = _Reading(self._make_connection(), self.address)
        try:
            if after == END:
                after = await self._newest(log) or START
            async for batch in self._catch_up(log, after):
                yield batch
                after = batch[-1].id
            caught_up = False
            while True:
                streams = {log: after, own: self._after.get(inbox, START)}
                batch = await reading.next(streams, own, block=_BLOCK if caught_up else None)
                if batch or not caught_up:
                    caught_up = caught_up or not batch
                    yield batch
                for entry in batch:
                    if entry.inbox:
                        self._after[inbox] = entry.id
                    else:
                        after = entry.id
        finally:
            await reading.close()

    async def _newest(self, log: str) -> str | None:
        (entries,) = await self._channel.call(("XREVRANGE", log, "+", "-", "COUNT", 1))
        return str(entries[0][0].decode()) if entries else None

    async def _catch_up(self, log: str, after: str) -> AsyncGenerator[list[Entry]]:
        """Iterate over the log after a position, up to now."""
        newest = await self._newest(log)
        if newest is None:
            return
        if position_of(newest) < position_of(after):
            after = START
        batch: list[Entry] = []
        while True:
            call = self._channel.start(CATCH_UP(log, args=(after, _BATCH)))
            # Send it now: the server reads the next batch while this process handles the last one.
            await asyncio.sleep(0)
            if batch:
                yield batch
            (((seconds, micros), heads, contents),) = await self._channel.answers(call)
            if not heads:
                return
            batch = _unpacked(heads, contents, int(seconds) + int(micros) / 1e6)
            after = batch[-1].id

    async def announce(self, node: str, description: bytes, ttl: float) -> None:
        """Enter a node into the roster.

        Cancellation: ends the wait.
        """
        keys = self._key("nodes"), self._key("seen")
        await self._channel.call(ANNOUNCE(*keys, args=(node, description, math.ceil(ttl), int(KEPT))))

    async def roster(self) -> dict[str, tuple[bytes, float]]:
        """Return the nodes of the roster.

        Cancellation: ends the wait.
        """
        (answer,) = await self._channel.call(ROSTER(self._key("nodes"), self._key("seen")))
        now, live, rows = answer
        described = dict(zip(rows[::2], rows[1::2], strict=True))
        found: dict[str, tuple[bytes, float]] = {}
        for node in live:
            since, _, description = described.get(node, b"").partition(b" ")
            if since:
                found[node.decode(errors="replace")] = (description, (int(now) - int(since)) / 1000)
        return found

    async def namespaces(self) -> set[str]:
        """Return the fleets of the server that have nodes, from at most ``_SCANNED`` of its keys.

        Cancellation: ends the search.
        """
        rosters: set[bytes] = set()
        cursor = b"0"
        for _ in range(0, _SCANNED, _BATCH):
            scan = ("SCAN", cursor, "MATCH", "{*}:seen", "COUNT", _BATCH, "TYPE", "zset")
            ((cursor, keys),) = await self._channel.call(scan)
            rosters.update(keys)
            if cursor == b"0":
                break
        names = sorted(rosters)
        after = f"({_ms(await self.time())}"
        counts = await self._channel.call(*(("ZCOUNT", name, after, "+inf") for name in names))
        live = (name for name, count in zip(names, counts, strict=True) if count)
        return {name.decode(errors="replace")[1 : -len("}:seen")] for name in live}

    async def leave(self, node: str) -> None:
        """Remove a node, its lease, and its inbox.

        Cancellation: ends the wait; the node is removed anyway.
        """
        await self._channel.call(
            ("DEL", self._key("lease", node), self._key("inbox", node)),
            ("HDEL", self._key("nodes"), node),
            ("ZREM", self._key("seen"), node),
        )

    async def claim(self, key: str, owner: str, delivery: str) -> Claim:
        """Claim an execution.

        Cancellation: ends the wait; a claim that was taken expires.
        """
        keys = self._claim_keys(key, delivery)
        claim = await self._claims.take(*keys, f"{owner} {delivery}", _ms(LEASE))
        if claim is Claim.TAKEN:
            self._deliveries[key] = delivery
        return claim

    async def release(self, key: str, owner: str) -> None:
        """Drop a claim.

        Cancellation: ends the wait; the claim is dropped anyway.
        """
        self._deliveries.pop(key, None)
        await self._channel.call(RELEASE(self._key("claim", key), args=(f"{owner} ",)))

    async def leases(self, nodes: Collection[str]) -> set[str]:
        """Return the nodes whose lease is valid.

        Cancellation: ends the wait.
        """
        names = list(nodes)
        if not names:
            return set()
        (values,) = await self._channel.call(("MGET", *(self._key("lease", node) for node in names)))
        return {node for node, value in zip(names, values, strict=True) if value is not None}

    def renew(self, node: str, *, lease: bool, claims: Collection[str]) -> list[str]:
        """Renew the lease and claims of a node; blocks for at most some times ``CALL_TIMEOUT``."""
        # The event loop may drop a claim meanwhile.
        known = ((key, self._deliveries.get(key)) for key in claims)
        held = [(key, delivery) for key, delivery in known if delivery is not None]
        lost: list[str] = []
        for start in range(0, max(1, len(held)), _RENEWED):
            part = held[start : start + _RENEWED]
            keys = [key for claim in part for key in self._claim_keys(*claim)]
            deliveries = [delivery for _, delivery in part]
            with_lease = int(lease and start == 0)
            command = RENEW(
                self._key("lease", node), *keys, args=(f"{node} ", _ms(LEASE), with_lease, *deliveries)
            )
            lost += [part[number - 1][0] for number in self._call_in_thread(command)]
        for key in lost:
            self._deliveries.pop(key, None)
        return lost

    def _claim_keys(self, key: str, delivery: str) -> tuple[str, str]:
        return self._key("claim", key), self._key("done", key, delivery)

    def _call_in_thread(self, command: tuple[str | bytes | int, ...]) -> Any:
        if self._closed:
            raise BusUnavailableError(f"the connection to {self.address} was closed")
        if self._thread_connection is None:
            self._thread_connection = self._thread_pool.make_connection()
        connection = self._thread_connection
        try:
            connection.send_command(*command)
            try:
                return connection.read_response()
            except NoScriptError:
                connection.send_command("EVAL", SOURCES[str(command[1])], *command[2:])
                return connection.read_response()
        except (RedisError, OSError) as error:
            connection.disconnect()
            raise unavailable(self.address, error) from error


class _Reading:
    """The connection that blocks."""

    def __init__(self, connection: Any, address: str) -> None:
        self._connection = connection
        self._address = address

    async def next(self, streams: Mapping[str, str], inbox: str, block: float | None) -> list[Entry]:
        """Return the next entries after these positions; with ``block``, wait for them."""
        waits = () if block is None else ("BLOCK", _ms(block))
        timeout = CALL_TIMEOUT if block is None else block + _PATIENCE
        read = ("XREAD", "COUNT", _BATCH, *waits, "STREAMS", *streams.keys(), *streams.values())
        answer, (seconds, micros) = await self._call(timeout, read, ("TIME",))
        now = int(seconds) + int(micros) / 1e6
        return [
            entry
            for key, entries in answer or ()
            for raw in entries
            for entry in _entries(raw, now, inbox=key.decode() == inbox)
        ]

    async def close(self) -> None:
        """End the connection."""
        await self._connection.disconnect(nowait=True)

    async def _call(self, timeout: float, *commands: tuple[str | bytes | int, ...]) -> list[Any]:
        try:
            async with answered_within(timeout):
                if not self._connection.is_connected:
                    await self._connection.connect()
                answers = await exchange(self._connection, commands)
        except (RedisError, OSError) as error:
            raise unavailable(self._address, error) from error
        for answer in answers:
            if isinstance(answer, Exception):
                raise unavailable(self._address, answer) from answer
        return answers


def _pools(url: str) -> tuple[AsyncConnectionPool, redis.ConnectionPool]:
    """Return what makes connections of both kinds; neither is used as a pool."""
    try:
        pool = AsyncConnectionPool.from_url(url, protocol=2)
        thread_pool = redis.ConnectionPool.from_url(url, protocol=2)
        # Whatever the URL says, nothing here retries, and the answers are bytes.
        # The name of another node may be any JSON text, and is part of a key.
        fixed = {
            "decode_responses": False,
            "encoding_errors": "surrogatepass",
            "retry_on_timeout": False,
            "health_check_interval": 0,
        }
        pool.connection_kwargs |= fixed | {"socket_timeout": None, "socket_connect_timeout": CALL_TIMEOUT}
        thread_pool.connection_kwargs |= fixed | {
            "socket_timeout": CALL_TIMEOUT,
            "socket_connect_timeout": CALL_TIMEOUT,
        }
        made: list[Any] = [pool, thread_pool]
        for maker in made:
            maker.make_connection()
        _check_database(url)
    except (ValueError, TypeError, RedisError):
        # Not the error itself: it may quote part of the password.
        raise ValueError(
            "the URL of the fleet is malformed: write redis://[user:password@]host[:port][/database], "
            "percent-encode special characters in the password, and pass only options that redis-py has"
        ) from None
    return pool, thread_pool


def _check_database(url: str) -> None:
    """Raise a ValueError for a database that is no number: redis-py would take database 0 instead."""
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdecimal():
        raise ValueError


def _address(pool: AsyncConnectionPool) -> str:
    """Return the server's URL without user and password."""
    options: dict[str, Any] = pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if issubclass(pool.connection_class, SSLConnection) else "redis"
    host = options.get("host", "localhost")
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{options.get('port', 6379)}/{options.get('db', 0)}"


def _entries(raw: Any, now: float, *, inbox: bool) -> list[Entry]:
    """Return what an entry of a stream has; one of an inbox may have several."""
    entry_id, fields = raw
    name = entry_id.decode()
    age = _age(name, now)
    # A foreign entry has other fields, or none; what is decoded later is then no entry.
    payloads = [value for key, value in zip(fields[::2], fields[1::2], strict=True) if key == b"e"] or [b""]
    return [Entry(name, payload, inbox, age) for payload in (payloads if inbox else payloads[:1])]


def _grouped(payloads: Iterable[bytes]) -> Iterable[list[bytes]]:
    """Return payloads in groups that are no longer than a payload may be."""
    groups: list[list[bytes]] = []
    left = 0
    for payload in payloads:
        left -= len(payload)
        if left < 0:
            groups.append([])
            left = _TOGETHER - len(payload)
        groups[-1].append(payload)
    return groups


def _unpacked(heads: bytes, contents: bytes, now: float) -> list[Entry]:
    """Return the entries of an answer of ``CATCH_UP``."""
    words = heads.decode().split()
    found: list[Entry] = []
    end = 0
    for name, size in zip(words[::2], words[1::2], strict=True):
        begin, end = end, end + int(size)
        found.append(Entry(name, contents[begin:end], False, _age(name, now)))
    return found


def _age(entry_id: str, now: float) -> float:
    return max(0.0, now - int(entry_id.partition("-")[0]) / 1000)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
