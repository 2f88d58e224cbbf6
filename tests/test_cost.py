from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cost import PYTHON, Counts, baseline, grown

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def counts() -> Counts:
    """Counted in an interpreter of its own: nobody else's tracer, no coverage, no test's leftovers."""
    counted: Counts = counted_with("--json")
    return counted


def counted_with(option: str) -> Any:
    """What `python -m benchmarks.cost` prints with an option."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost", option],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tasks_and_requests_cost_no_more_than_before(counts: Counts) -> None:
    """No scenario has more calls, instructions or memory than its committed baseline."""
    if not baseline():
        pytest.skip(f"no baseline for Python {PYTHON}")
    more = grown(counts, baseline())

    assert not more, (
        "these cost more than before:\n  "
        + "\n  ".join(more)
        + "\nIf it is worth that: python -m benchmarks.cost --write, on each Python of the baseline"
    )


def test_fleet_costs_local_tasks_and_requests_nothing() -> None:
    """A task and a request take as many calls and instructions in a fleet as without one."""
    without, in_fleet = counted_with("--fleet")

    assert without
    assert not grown(in_fleet, without)


def test_every_scenario_has_its_baseline(counts: Counts) -> None:
    """A scenario that is new, or renamed, is held from its first commit on."""
    if not baseline():
        pytest.skip(f"no baseline for Python {PYTHON}")

    assert counts.keys() == baseline().keys()


def test_growth_is_reported_with_its_difference() -> None:
    """A count that has grown is named with both figures; one that shrank or grew by less than 1 % is not."""
    before = {"task": {"calls": 20.0, "instructions": 300.0, "bytes": 900.0}}
    now = {"task": {"calls": 23.0, "instructions": 303.0, "bytes": 800.0}}

    assert grown(now, before) == ["task: calls 20 -> 23 (+3)"]
