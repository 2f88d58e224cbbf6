from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.llm_gateway.__main__ import CLIENTS, MODES, Run, Visit, broken_promises, visits
from tests.processes import marked_environment, marked_processes

ROOT = Path(__file__).parents[1]


def run(
    *,
    leaver: Visit | None = None,
    tokens: tuple[float, ...] = (),
    ended_at: float | None = 10.0,
    recorded: bool = True,
) -> Run:
    """A run of two clients, one of which leaves at 10.0."""
    stays = Visit("0", "httpx", stream=False, leaves=None, answered=True)
    leaver = leaver or Visit("1", "openai", stream=True, leaves="mid-stream", left_at=10.0)
    calls: list[dict[str, Any]] = [
        {"user": "0", "tokens": [9.0, 11.0], "ended_at": 12.0},
        {"user": "1", "tokens": [9.0, *tokens], "ended_at": ended_at},
    ]
    usage = [{"user": call["user"]} for call in calls[: 2 if recorded else 1]]
    return Run([stays, leaver], calls, usage, [])


WASTEFUL = run(tokens=(11.0, 12.0), ended_at=12.0)


def test_half_of_twenty_clients_leave_in_three_modes() -> None:
    """Each kind of client is among those that stay and, in each mode, among those that leave."""
    assert len(visits()) == 20
    assert sum(visit.leaves is None for visit in visits()) == 10
    for mode in (None, *MODES):
        assert {visit.client for visit in visits() if visit.leaves == mode} == set(CLIENTS)
    assert all(visit.stream for visit in visits() if visit.leaves in ("before the first token", "mid-stream"))


def test_tokens_and_time_after_the_hang_up_are_those_of_the_clients_that_left() -> None:
    """What is generated for a client that stays is never wasted."""
    assert WASTEFUL.wasted(*MODES) == WASTEFUL.wasted("mid-stream") == 2
    assert WASTEFUL.wasted("plain") == 0
    assert WASTEFUL.overtime == {"1": 2.0}


def test_call_that_never_reached_the_upstream_wastes_nothing() -> None:
    """A client may leave before its call is made; no usage record is missing then."""
    gone = run()
    del gone.calls[1], gone.usage[1]
    assert gone.overtime == {}
    assert broken_promises(WASTEFUL, gone) == []


@pytest.mark.parametrize(
    ("with_it", "broken"),
    [
        (run(), []),
        (run(recorded=False), ["with: no usage record of client 1"]),
        (run(ended_at=10.75), ["with: the call of client 1 ended 0.75 s after the hang-up"]),
        (run(tokens=(10.1, 10.2)), ["the middleware has saved no tokens"]),
    ],
)
def test_each_broken_promise_is_named(with_it: Run, broken: list[str]) -> None:
    """A missing record, a call that went on, and tokens for nobody fail the demo."""
    assert broken_promises(WASTEFUL, with_it) == broken


def test_connection_that_stays_open_and_missing_answer_are_named() -> None:
    """A call without an end has gone on until now; in both runs, each client that stays gets an answer."""
    (left,) = broken_promises(WASTEFUL, run(ended_at=None))
    assert left.startswith("with: the call of client 1 ended ")
    unanswered = run(tokens=(11.0, 12.0))
    unanswered.visits[0].answered = False
    assert broken_promises(unanswered, run()) == ["without: no answer for client 0"]


@pytest.mark.e2e
def test_demo_shows_what_the_middleware_saves() -> None:
    """The demo ends well, prints both runs side by side and the trace of a hang-up, and leaves no process."""
    environment = marked_environment()
    done = subprocess.run(
        [sys.executable, "-m", "examples.llm_gateway"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    figures = {
        label.strip(): (without, with_it)
        for label, without, with_it in re.findall(
            r"^(.*?\S) {2,}(\S.*?) {2,}(\S.*)$", done.stdout, re.MULTILINE
        )
    }
    assert [each.strip() for each in figures["clients that hung up"]] == ["10", "10"]
    assert int(figures["of these after the hang-up"][0]) > 50
    assert int(figures["upstream connections left 0.5 s after the hang-up"][0]) > 3
    assert int(figures["upstream connections left 0.5 s after the hang-up"][1]) == 0
    assert "client leaves ▼" in done.stdout
    assert "499 client_disconnect (tasks cancelled: 1)" in done.stdout
    assert re.search(r"merge .* cancelled: client_disconnect <- POST /v1/chat/completions", done.stdout)
    assert "no root span" not in done.stdout
    assert marked_processes(environment) == set()
