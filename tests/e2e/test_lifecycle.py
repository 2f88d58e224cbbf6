"""An application's own tasks when the server ends: with the middleware alone, and without a lifespan."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from .servers import DEADLINE, KINDS, Kind, Server, eventually

if TYPE_CHECKING:
    from .servers import Pool

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

# The manager's grace is 5 s, and it has 10 more.
PATIENCE = 60.0


def serving(kind: Kind, app: str, *options: str) -> Kind:
    """A kind of server that serves an application of `outbox.py`, and gives it the time it needs to end."""

    def arguments(port: int) -> list[str]:
        found = [app if argument == "app:app" else argument for argument in kind.arguments(port)]
        for flag in ("--graceful-timeout", "--workers-kill-timeout"):
            if flag in found:
                found[found.index(flag) + 1] = "15"
        return [*found, *options]

    return replace(kind, name=f"{kind.name}-{app.partition(':')[2]}{''.join(options)}", arguments=arguments)


def named(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


WITH_LIFESPAN = {kind.name: serving(kind, "outbox:app") for kind in KINDS}
WITHOUT_SUPPORT = {kind.name: serving(kind, "outbox:raw") for kind in KINDS}
# The option of each server that turns the lifespan off, and the signal after which it still ends its loop.
WITHOUT_LIFESPAN = {
    "uvicorn-httptools": (
        serving(named("uvicorn-httptools"), "outbox:app", "--lifespan", "off"),
        signal.SIGINT,
    ),
    "uvicorn-h11": (serving(named("uvicorn-h11"), "outbox:app", "--lifespan", "off"), signal.SIGINT),
    # The last one of two counts.
    "granian": (serving(named("granian"), "outbox:app", "--interface", "asginl"), signal.SIGTERM),
    "gunicorn": (serving(named("gunicorn"), "outbox:app", "--asgi-lifespan", "off"), signal.SIGTERM),
}


@pytest.fixture(scope="module")
def ended(pool: Pool) -> dict[str, Server]:
    """Servers of all kinds, filled with work and told to end: at the same time, for each takes its grace."""
    servers = {name: pool.start(kind) for name, kind in WITH_LIFESPAN.items()}
    for server in servers.values():
        server.wait_until_ready()
        server.control("POST", "/fill")
    for server in servers.values():
        server.process.send_signal(signal.SIGTERM)
    return servers


def wait_for_end(server: Server) -> None:
    eventually(lambda: server.process.poll() is not None, server.log, within=PATIENCE)


@pytest.mark.parametrize("name", WITH_LIFESPAN)
def test_outbox_ends_with_the_server(name: str, ended: dict[str, Server]) -> None:
    """SIGTERM lets a task finish that follows its cancel event; of a task that it cancels, `finally` runs."""
    server = ended[name]
    wait_for_end(server)
    events = {event["what"]: event for event in server.events("outbox")}
    assert {"filled", "polite finished", "sleeper cleaned up"} <= events.keys(), server.log()
    assert events["sleeper cleaned up"]["cause"] == "shutdown"
    assert "lost" not in server.log()


@pytest.mark.parametrize("name", WITHOUT_LIFESPAN)
def test_server_without_lifespan_names_the_lost_work(name: str, pool: Pool) -> None:
    """A server that runs no lifespan logs one WARNING with the work that ends with its loop."""
    kind, number = WITHOUT_LIFESPAN[name]
    server = pool.start(kind)
    server.wait_until_ready()
    server.control("POST", "/fill")
    server.process.send_signal(number)
    wait_for_end(server)
    lines = [line for line in server.log().splitlines() if "otel_tasks" in line and "WARNING" in line]
    assert lines == [
        "WARNING otel_tasks: manager 'default' was not shut down before its event loop ended, and lost "
        "group 'outbox': 'polite', 'sleeper'. In a script, write otel_tasks.run(main(), "
        "manager=global_task_manager); on a server, write "
        "lifespan=make_lifespan(manager=global_task_manager), or add the middleware, "
        "and leave the server's lifespan on"
    ], server.log()


@pytest.mark.parametrize("name", WITHOUT_SUPPORT)
def test_application_without_lifespan_support_is_served(name: str, pool: Pool) -> None:
    """An application that raises on a lifespan scope is served as without the middleware."""
    server = pool.start(WITHOUT_SUPPORT[name])
    server.wait_until_ready()
    server.control("POST", "/fill")
    assert eventually(lambda: server.events("outbox"), server.log, within=DEADLINE)[0]["what"] == "filled"
