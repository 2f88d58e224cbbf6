"""The cause of tasks, in every nesting, when their server is told to stop."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import pytest

from tests.shapes import SHAPES, task_that_awaits_other_managers

from .servers import KINDS, Case, Kind, Pool, Server, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.real_clock]

ROUTE = "GET /nest/{shape}/{key}"
BY_MANAGER = "manager 'e2e' is shutting down"
NAMES = [shape.__name__ for shape in SHAPES if shape is not task_that_awaits_other_managers]


@pytest.fixture(scope="module")
def doomed(pool: Pool) -> dict[str, Server]:
    """A server of each kind that may be ended; started at the same time, to save some."""
    return {kind.name: pool.start(kind) for kind in KINDS if not kind.outlives_shutdown}


def test_tasks_of_a_cancelled_request_are_shut_down_at_every_depth(
    kind: Kind, doomed: dict[str, Server], key: str
) -> None:
    """SIGTERM is a `shutdown` for each task of a request, behind a `BaseHTTPMiddleware` too.

    The request is the origin, not the task that hosts a block, and no task that worked is reported as never
    started.
    """
    if kind.outlives_shutdown:
        pytest.skip(kind.outlives_shutdown)
    server = doomed[kind.name]
    server.wait_until_ready()
    log_start = server.log_size()
    cases = {}
    with ExitStack() as connections:
        for variant in ("plain", "inside"):
            for name in NAMES:
                case = cases[variant, name] = Case(server, f"{key}-{variant}-{name}")
                connections.enter_context(server.connect()).get(case.path(f"{variant}/nest/{name}"))
        for case in cases.values():
            case.wait_for_start(tasks=1)
        # The deeper tasks of a request begin a few turns after the first one.
        server.let_loop_turn()
        server.terminate()
        for case in cases.values():
            eventually(partial(all_cancelled, case), case.story)
    for case in cases.values():
        causes = [event for event in server.events(case.key) if event["what"] == "task cancelled"]
        assert {cause["kind"] for cause in causes} == {"shutdown"}, case.story()
        for cause in causes:
            # The manager's own, where the lifespan has ended first: on a server that is slow to cancel.
            assert cause["asked_by"] == ROUTE or cause["message"] == BY_MANAGER, case.story()
    if kind.cancels_before_lifespan_ends:
        late = [name for name, case in cases.items() if not case.has("task cancelled", asked_by=ROUTE)]
        assert len(late) < len(cases) / 2, late
    assert "(not started)" not in server.log(log_start)


def all_cancelled(case: Case) -> bool:
    """Whether each task of a request that has begun was cancelled."""
    return case.count("task cancelled") == case.count("task started")
