"""make_lifespan(fleet=): the application joins a fleet while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from fastapi import FastAPI

from otel_tasks import TaskManager
from otel_tasks.fastapi import make_lifespan
from otel_tasks.fleet import BusUnavailableError, Fleet
from tests.helpers import settle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def test_an_application_is_in_the_fleet_until_its_manager_is_shut_down() -> None:
    """The fleet starts after the application's own resources, and its tasks may use it until they end."""
    seen: list[object] = []

    @contextlib.asynccontextmanager
    async def database(_: FastAPI) -> AsyncGenerator[dict[str, str]]:
        seen.append(("database", fleet.is_started))
        yield {"database": "open"}
        seen.append(("database", fleet.is_started))

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            seen.append(("task", len(await fleet.nodes())))

    fleet = Fleet("memory://", namespace="shop", manager=TaskManager("shop", grace=0.0))
    async with make_lifespan(database, fleet=fleet)(FastAPI()) as state:
        assert state == {"database": "open"}
        assert fleet.is_started
        fleet.manager.create_task(work())
        await settle()

    assert fleet.manager.closed
    assert seen == [("database", False), ("task", 1), ("database", False)]


async def test_an_application_without_resources_of_its_own_joins_too() -> None:
    """Without an inner lifespan, the fleet is all there is."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    async with make_lifespan(fleet=fleet, grace=0.0)(FastAPI()):
        assert fleet.is_started
    assert not fleet.is_started


async def test_two_applications_of_one_process_share_the_fleet() -> None:
    """The second lifespan that ends leaves it."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    async with make_lifespan(fleet=fleet)(FastAPI()):
        async with make_lifespan(fleet=fleet)(FastAPI()):
            node = fleet.node
        assert fleet.node == node
    assert not fleet.is_started


def options_with(fleet: Fleet, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a fleet unless they have one."""
    return {"fleet": fleet, **options}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fleet": "redis://127.0.0.1"}, TypeError, "fleet must be a Fleet, got 'redis://127.0.0.1': write"),
        ({"manager": TaskManager("b")}, ValueError, "the fleet has manager 'a', and the lifespan 'b'"),
        ({"manager": 7}, TypeError, "manager"),
    ],
)
def test_a_wrong_fleet_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """A lifespan shuts down the manager of its fleet, and no other one."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager("a"))
    with pytest.raises(error, match=message):
        make_lifespan(**options_with(fleet, options))


def test_the_manager_may_be_named_twice() -> None:
    """The same one is fine."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    assert callable(make_lifespan(fleet=fleet, manager=fleet.manager))


async def test_a_call_after_the_end_names_the_fix() -> None:
    """A handler that outlives the lifespan gets the error of a fleet that is not started."""
    fleet = Fleet("memory://", namespace="shop", manager=TaskManager())
    async with make_lifespan(fleet=fleet)(FastAPI()):
        pass
    with pytest.raises(RuntimeError, match=r"make_lifespan\(fleet=fleet\)"):
        await fleet.cancel_task("import")
    assert issubclass(BusUnavailableError, Exception)


def test_an_application_without_a_fleet_does_not_load_it() -> None:
    """Neither this package's part nor the client of Redis."""
    code = (
        "import sys, otel_tasks.fastapi as f; f.make_lifespan(); "
        "print([name for name in sys.modules if name.startswith(('otel_tasks.fleet', 'redis', 'taskiq'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
