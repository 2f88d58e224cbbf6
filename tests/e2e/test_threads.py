"""A thread cannot be stopped: the resources it uses are released after it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .servers import KINDS, Case, eventually

if TYPE_CHECKING:
    from .clients import Client

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

WAYS = (
    "def-handler",
    "def-dependency",
    "slow-dependency",
    "run-sync",
    "threadpool",
    "to-thread",
    "executor",
    "nested-to-thread",
    "file",
    "stream",
)
"""Ways for a handler to wait for a thread: the routes of `threads_app`."""

SHIELDED = ("def-handler", "def-dependency", "slow-dependency", "run-sync", "threadpool", "file", "stream")
"""Those in which anyio waits for the thread, inside a shield."""


def expect_release_after_the_thread(case: Case) -> None:
    """Check that the tasks end immediately, and the handler and its resource after the thread."""
    case.wait_for("task cancelled", task="first", kind="client_disconnect")
    case.let_it_age()
    assert not case.has("released"), case.story()
    assert not case.has("app returned"), case.story()
    case.release("-thread")
    case.wait_for("app returned")
    case.expect_order("thread entered", "thread ended", "released", "app returned")


@pytest.mark.parametrize("way", WAYS)
def test_resource_is_released_after_the_thread_that_uses_it(case: Case, way: str) -> None:
    """The request's tasks are cancelled immediately, its handler only once it waits for no thread."""
    with case.server.connect() as client:
        client.get(case.path(f"threads/{way}"))
        case.wait_for("thread entered")
        case.let_it_age()
    expect_release_after_the_thread(case)


@pytest.mark.parametrize("way", SHIELDED)
@pytest.mark.parametrize("layers", ["threads-inside", "threads-outside"])
def test_other_layers_do_not_release_it_earlier(case: Case, layers: str, way: str) -> None:
    """With a `BaseHTTPMiddleware` on either side of ours, anyio's shields hold too."""
    with case.server.connect() as client:
        client.get(case.path(f"{layers}/{way}"))
        case.wait_for("thread entered")
        case.let_it_age()
    expect_release_after_the_thread(case)


@pytest.mark.parametrize("way", ["run-sync", "threadpool", "to-thread", "executor", "nested-to-thread"])
def test_handler_is_cancelled_when_its_thread_has_ended(case: Case, way: str) -> None:
    """The delayed cancellation is delivered when the thread has ended."""
    with case.server.connect() as client:
        client.get(case.path(f"threads/{way}"))
        case.wait_for("thread entered")
        case.let_it_age()
    case.wait_for("task cancelled", task="first")
    assert not case.has("handler cancelled")
    case.release("-thread")
    case.wait_for("app returned")
    case.wait_for("status", status=499)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=lambda kind: kind.name, indirect=True)
@pytest.mark.parametrize("how", ["pool-def", "pool-sync", "pool-to-thread"])
def test_pool_of_three_is_whole_after_ten_hang_ups(case: Case, how: str) -> None:
    """No connection is lost, and none returns to the pool while a thread uses it."""
    # Three at a time, which is all that there are.
    for wave in range(4):
        cases = [Case(case.server, f"{case.key}-{wave}-{number}") for number in range(3 if wave < 3 else 1)]
        clients: list[Client] = []
        for each in cases:
            clients.append(client := each.server.connect())
            client.get(each.path(f"threads/{how}"))
        for each in cases:
            each.wait_for("thread entered")
        case.let_it_age()
        for client in clients:
            client.close()
        case.let_it_age()
        for each in cases:
            each.release("-thread")
        for each in cases:
            each.wait_for("app returned")
            assert not each.has("torn"), each.story()
    eventually(
        lambda: case.server.control("GET", "/threads/pool-size") == 3,
        lambda: f"free: {case.server.control('GET', '/threads/pool-size')}",
    )
