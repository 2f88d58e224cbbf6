"""A client that reads slowly holds its stream's generator in `send`: nothing is produced ahead of it."""

from __future__ import annotations

import socket
import time
from contextlib import ExitStack

import pytest

from .servers import Case, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

CLIENTS = 100
CHUNKS = 1_600
"""Of each stream, 64 KiB each."""
PER_CLIENT = 4_000_000
"""Bytes that a server may take for each, of the 100 MB; granian takes 1,000,000, and uvicorn 180,000."""


@pytest.mark.parametrize("variant", ["streams", "streams-bare"])
def test_memory_for_slow_readers_is_bounded(case: Case, variant: str) -> None:
    """100 clients read 100 MB slowly or not at all: the generators wait in `send`, and no memory fills."""
    keys = [f"{case.key}-{number}" for number in range(CLIENTS)]
    before = most = case.server.state()["rss"]
    with ExitStack() as stack:
        clients = [stack.enter_context(case.server.connect()) for _ in keys]
        for key, client in zip(keys, clients, strict=True):
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.get(f"/{variant}/flood/{key}")
        for _ in range(20):
            time.sleep(0.05)
            for client in clients[::2]:
                client.socket.recv(1024)
            most = max(most, case.server.state()["rss"])
        eventually(lambda: all(_waits_in_send(case, key) for key in keys), case.story)
        most = max(most, case.server.state()["rss"])
    # They log what they could not send.
    case.complaints_expected = case.server.kind.name in {"granian", "hypercorn"}
    for key in keys:
        Case(case.server, key).wait_for("flood closed")
    assert most - before < CLIENTS * PER_CLIENT


def _waits_in_send(case: Case, key: str) -> bool:
    """Whether the generator has produced a chunk that `send` has not taken yet, and is not at its end."""
    whats = [event["what"] for event in case.server.events(key)]
    return whats[-1:] == ["chunk offered"] and whats.count("chunk offered") < CHUNKS
