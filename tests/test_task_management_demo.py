"""The demo of task management: each part runs to its end, shows what it says, and leaves no task."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples import task_management_demo as demo

SCRIPT = Path(demo.__file__)


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as its users do, on the real clock, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        cwd=SCRIPT.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_all_parts_run_to_their_end() -> None:
    """Without arguments all five parts run, one after the other, and each finds no task left."""
    done = run_demo()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"== (\w+) ==", done.stdout) == list(demo.PARTS)
    assert done.stdout.count("no task is left") == len(demo.PARTS) == 5


@pytest.mark.parametrize("part", demo.PARTS)
def test_one_part_runs_alone(part: str) -> None:
    """With --only a single part runs, and finds no task left."""
    done = run_demo("--only", part)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"== (\w+) ==", done.stdout) == [part]
    assert done.stdout.endswith("no task is left\n\n")


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--only"], ["event"]])
def test_wrong_arguments_get_the_parsers_error(arguments: list[str]) -> None:
    """An unknown part is argparse's error, which lists the known ones."""
    done = run_demo(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "{event,propagation,tracking,progress,priority}" in done.stderr
    assert "Traceback" not in done.stderr


async def output_of(part: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The output of a part between its title and its last line."""
    await demo.run_part(part)
    title, *lines, last, _ = capsys.readouterr().out.split("\n")[:-1]
    assert (title, last) == (f"== {part} ==", "no task is left")
    return [line.strip() for line in lines]


async def test_event_shows_the_four_ways_a_wait_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """Completed, cancelled with its cause, timed out, and completed by the event with the task running on."""
    lines = await output_of("event", capsys)
    assert "completed, with 2 pages" in lines
    assert "cancelled, because of client_disconnect: the user has left" in lines
    assert "timed_out" in lines
    assert "completed, and the task runs on" in lines
    # Every connection is closed, however the wait ends.
    assert sum(line.startswith("download: closing the connection") for line in lines) == 4


async def test_propagation_goes_through_three_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """A level stops those below it and not those above; a cancelled link sets nothing."""
    lines = await output_of("propagation", capsys)
    assert "after one request: [True, False], service: False" in lines
    assert "after the service: [True, True]" in lines
    assert "the queries know why: ['client_disconnect', 'shutdown: new version']" in lines
    assert [line.removesuffix(" has stopped") for line in lines if line.endswith(" has stopped")] == [
        "service",
        "request",
        "query",
    ]
    assert lines[-1] == "parent: False, child: False"


async def test_tracking_finds_the_stubborn_and_the_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """Ended tasks leave the tracker; tasks that do not stop, and tasks that were not tracked, are named."""
    lines = await output_of("tracking", capsys)
    assert "4 tracked, then 3" in lines
    assert "3 cancelled, 1 not" in lines
    assert "stubborn is still at: await asyncio.sleep(0.2)" in lines
    assert lines[-1] == "forgotten: 1 cancelled, 0 completed, 0 failed, still running: none"


async def test_progress_gives_the_newest_to_each_watcher(capsys: pytest.CaptureFixture[str]) -> None:
    """A quick watcher sees every report, a slow one fewer, and both the last."""
    lines = await output_of("progress", capsys)
    assert [line for line in lines if line.startswith("loading")] == [f"loading: {n} of 4" for n in range(5)]
    given = re.fullmatch(r"(\d+) of 11 reports, from 0 to 10", lines[-1])
    assert given is not None
    assert 2 <= int(given[1]) < 11


async def test_priority_calls_the_most_urgent_first(capsys: pytest.CaptureFixture[str]) -> None:
    """Two tasks find a place at once; the others are called by priority."""
    lines = await output_of("priority", capsys)
    assert lines[-1] == "report, thumbnail, alarm, login, invoice, newsletter"


async def test_leak_makes_a_part_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part that leaves a task behind ends the demo with the task's name."""
    leaked: list[asyncio.Task[None]] = []

    async def leak() -> None:
        leaked.append(asyncio.create_task(asyncio.sleep(60), name="forgotten"))

    monkeypatch.setitem(demo.PARTS, "leak", leak)
    with pytest.raises(SystemExit, match="leaked: forgotten"):
        await demo.run_part("leak")
    assert "no task is left" not in capsys.readouterr().out
    leaked[0].cancel()
