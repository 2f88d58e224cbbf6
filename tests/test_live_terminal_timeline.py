"""otel-tasks top: the timeline, with the bars of the page, and warnings that are silenced by kind."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from textual.events import Key
from textual.widgets import Input

from otel_tasks_terminal.model import Model
from otel_tasks_terminal.pen import Pen
from otel_tasks_terminal.text import width
from otel_tasks_terminal.top.look import Look
from otel_tasks_terminal.top.silence import Silenced, state_file
from otel_tasks_terminal.top.timeline import Bars, Timeline
from tests import live_server
from tests.live_screen import screen
from tests.live_server import NOW, SYNC_MAIL, Said, View, prepared, rows, snapshot, task

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.real_clock

ENDED = {
    **task("chart", 30.0, group="g2", group_id="GET /report/{id}#4711"),
    "status": "completed",
    "started": NOW - 20.0,
    "ended": NOW - 10.0,
}


def bars(*tasks: dict[str, Any], cells: int = 105) -> list[str]:
    """The lines of a timeline: 35 cells of names, a gap, 61 of bars, 8 of durations."""
    model = Model(lambda: NOW)
    model.apply("snapshot", snapshot())
    timeline = Timeline(model)
    entries = timeline.entries(list(tasks))
    painter = Bars(Look(Pen(), dark=True), timeline.span)
    return [painter.heading(cells).plain, *(painter.row(entry, NOW, cells).plain for entry in entries)]


# --- bars ------------------------------------------------------------------------------------------


def test_a_bar_shows_when_a_task_waited_and_ran() -> None:
    """Its length is the time, and what follows its name is the number of its request."""
    heading, bar = bars(ENDED)
    assert re.findall(r"\d+ s ago|now", heading) == ["60 s ago", "45 s ago", "30 s ago", "15 s ago", "now"]
    assert bar[:35].split() == ["✓", "chart", "#4711"]
    assert bar[36:97].rstrip() == " " * 30 + "┄" * 11 + "━" * 10
    assert bar[97:].strip() == "20 s"


def test_a_live_bar_has_an_open_end_and_its_cause_a_mark() -> None:
    """What began before the axis says so, and what is marked is when the cause struck."""
    stuck = {**SYNC_MAIL, "created": NOW - 720.0, "cancel_requested": NOW - 30.0}
    (_, bar) = bars(stuck)
    assert bar.split()[-3:] == ["━" * 35 + "◆▸", "12", "m"]
    (_, band, first, *_) = bars(stuck, *live_server.PRICES, *[task(f"b{n}", 5.0) for n in range(20)])
    assert band.startswith(" GET /report/{id}#4711  ⊘ client disconnected, ")
    assert "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}━" in first
    assert "◆╍" in first


def test_a_request_has_its_tasks_together_in_the_order_of_their_start() -> None:
    """The oldest request comes first, and names with numbers sort by them."""
    same = [task(f"load-{n}", 5.0, group_id="GET /b#2") for n in (10, 9)]
    names = [line.split()[1] for line in bars(*same, task("old", 50.0), task("new", 1.0))[2:]]
    assert names == ["old", "new", "/b#2", "load-9", "load-10"]


def test_live_tasks_come_before_ended_ones() -> None:
    """What still runs is what people look for."""
    ended = [
        {**ENDED, "name": f"e{n}", "created": NOW - 50.0 - n, "group_id": f"GET /a#{n}"} for n in range(2)
    ]
    names = [line.split()[1] for line in bars(*ended, task("b", 5.0))[1:]]
    assert names == ["b", "e1", "e0"]


def test_a_bar_shorter_than_a_cell_is_still_seen() -> None:
    """It takes one."""
    short = {**ENDED, "created": NOW - 10.001, "started": NOW - 10.001, "ended": NOW - 10.0}
    assert bars(short)[1].count("━") == 1


def test_a_bar_that_ended_before_the_axis_is_empty() -> None:
    """Its row stays."""
    young = [task(f"b{n}", 5.0) for n in range(20)]
    gone = {**ENDED, "created": NOW - 900.0, "started": NOW - 900.0, "ended": NOW - 800.0}
    assert set(bars(gone, *young)[-1][36:97]) == {" "}


def test_the_axis_keeps_its_length_for_a_while() -> None:
    """It grows at once, and shrinks only where the bars would be tiny."""
    model = Model(lambda: NOW)
    model.apply("snapshot", snapshot())
    timeline = Timeline(model)
    spans: list[float] = []
    for age in (100.0, 30.0, 19.0, 1.0, 10_000_000.0):
        timeline.entries([task("a", age)])
        spans.append(timeline.span)
    assert spans == [120, 120, 20, 20, 10_000_000.0]


@pytest.mark.parametrize("cells", [20, 40, 80, 300])
def test_each_row_has_the_width_of_the_screen(cells: int) -> None:
    """At any width, with any name."""
    lines = bars({**ENDED, "name": "\N{CJK UNIFIED IDEOGRAPH-6F22}" * 60, "group_id": ""}, cells=cells)
    # A screen that is narrower than a name and a bar cuts them.
    assert width(lines[1]) == max(cells, 29)
    assert width(lines[0]) == max(cells, 29) - 8


# --- the view --------------------------------------------------------------------------------------


async def test_g_shows_the_timeline_of_the_selected_row_and_g_the_tree() -> None:
    """A class asks for its tasks, a task for those of its request; the row is selected again afterwards."""
    async with screen() as shown:
        await shown.press("n", "j", "g")
        await shown.until(lambda: "timeline of fetch_prices · 4 live, 4 ended" in shown.text())
        asked = [each.query for each in shown.view.asked if each.path == "tasks"]
        assert [each["key"] for each in asked] == [["c-prices"]] * 2
        assert [each.get("state") for each in asked] == [None, ["ended"]]
        assert [each["limit"] for each in asked] == [["100"]] * 2
        await shown.press("g")
        await shown.until(lambda: shown.selected() == "c-prices")
        await shown.press("k", "g")
        await shown.until(lambda: "timeline of GET /report/{id}#4711" in shown.text())
        assert shown.view.asked[-1].query["group_id"] == ["GET /report/{id}#4711"]
        await shown.press("escape")
        await shown.until(lambda: shown.selected() == "uid-sync_mail")


async def test_s_leaves_a_view_with_an_order_of_its_own() -> None:
    """It says so; the tree is sorted as before."""
    async with screen() as shown:
        await shown.press("g", "s")
        await shown.until(lambda: "This view has an order of its own." in shown.text())
        await shown.press("escape")
        await shown.until(lambda: "sorted by status" in shown.text())


async def test_the_timeline_of_the_root_has_everything() -> None:
    """The ended tasks of all groups, too."""
    async with screen() as shown:
        await shown.press("g")
        await shown.until(lambda: "timeline of default · 4 live" in shown.text())
        assert not {"key", "group_id"} & set(shown.view.asked[-1].query)


async def test_a_bar_opens_the_panel_and_can_be_cancelled() -> None:
    """A bar is a row like others; the heading of a request is none."""
    async with screen() as shown:
        await shown.press("g")
        await shown.until(lambda: shown.row_keys()[:2] == ["band GET /report/{id}#4711", "uid-sync_mail"])
        await shown.press("l", "x")
        await shown.until(lambda: "Select a task to cancel it" in shown.text())
        await shown.press("n", "l")
        await shown.until(lambda: "shop/pool.py:88 in Pool.acquire" in shown.text())
        await shown.press("x")
        await shown.until(lambda: "Cancel sync_mail?" in shown.text())


async def test_a_timeline_without_tasks_says_so() -> None:
    """An empty screen has a reason."""
    view = prepared()
    view.answers["GET tasks"] = Said(rows())
    async with screen(view) as shown:
        await shown.press("n", "j", "g")
        await shown.until(lambda: "No task of fetch_prices is live, and none is remembered." in shown.text())


async def test_a_filter_finds_ended_tasks_where_none_is_live() -> None:
    """As on the page."""
    view = prepared()
    view.on_request = lambda asked: view.answers.update(
        {"GET tasks": Said(rows(ENDED) if asked.query.get("state") == ["ended"] else rows())}
    )
    async with screen(view) as shown:
        await shown.press("slash", "c", "h", "enter")
        await shown.until(lambda: "filter 'ch' · 0 live, 1 ended" in shown.text())
        assert "✓ chart" in shown.text()


async def test_keys_around_a_filter_reach_what_they_are_for() -> None:
    """However fast they are typed: none after the slash reaches the list, and none after Enter the filter."""
    view = prepared()
    view.on_request = lambda asked: view.answers.update({"GET tasks": Said(rows(ENDED))})
    async with screen(view) as shown:
        slash, end, keys = Key("slash", "/"), Key("enter", None), Key("question_mark", "?")
        for key in (slash, Key("x", "x"), slash, Key("q", "q"), end, keys):
            shown.app.post_message(key)
        await shown.until(lambda: "next row" in shown.text())
        assert shown.app.query_one("#filter", Input).value == "x/q"


# --- silence ---------------------------------------------------------------------------------------


def warned() -> View:
    """A view with six warnings; five kinds of them."""
    view = prepared()
    first = snapshot()["warnings"]
    more = [{"key": kind, "kind": kind, "count": 2} for kind in ("outlived", "ignored", "new_kind", "other")]
    same = {"key": "waiting b", "kind": "waiting", "count": 12, "where": "b.py:1", "query": "where=b.py%3A1"}
    view.streams = [[("snapshot", snapshot(warnings=[*first, same, *more]))]]
    return view


async def test_a_kind_of_warning_is_silenced_and_shown_again(tmp_path: Path) -> None:
    """The others move up, their numbers too; how many are silenced stays in sight, and in a file."""
    file = tmp_path / "state" / "silenced.json"
    async with screen(warned(), silenced=Silenced(file)) as shown:
        await shown.until(lambda: "! 12 waiting at b.py:1  [2]" in shown.text())
        assert "! 2 more warnings  [!]" in shown.text()
        await shown.press("exclamation_mark", "space", "escape")
        await shown.until(lambda: "1 warning silenced  [!]" in shown.text())
        assert "cancelling for more than" not in shown.text()
        assert json.loads(file.read_text()) == ["cancelling"]
        await shown.press("1")
        await shown.until(lambda: "waiting at b.py:1 · " in shown.text())
        assert shown.view.asked[-1].query["where"] == ["b.py:1"]
    async with screen(warned(), silenced=Silenced(file)) as shown:
        assert "cancelling for more than" not in shown.text()
        await shown.press("exclamation_mark", "space", "escape")
        await shown.until(lambda: "! 1 cancelling for more than" in shown.text())
        assert "silenced" not in shown.text()


async def test_the_dialog_lists_the_tasks_of_a_warning() -> None:
    """Enter goes to those behind any warning, and not only the first four."""
    async with screen(warned()) as shown:
        await shown.press("exclamation_mark", "j", "enter")
        await shown.until(lambda: "waiting at b.py:1 · " in shown.text())


async def test_a_silenced_kind_without_a_warning_can_be_shown_again() -> None:
    """It is in the dialog, too."""
    silenced = Silenced()
    silenced.toggle("outlived")
    async with screen(silenced=silenced) as shown:
        await shown.press("exclamation_mark", "j")
        await shown.until(lambda: "silenced  outlived · none now" in shown.text())
        await shown.press("space")
        assert silenced.kinds == set()


async def test_a_choice_that_cannot_be_kept_lasts_as_long_as_the_screen(tmp_path: Path) -> None:
    """The reader learns why."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    async with screen(silenced=Silenced(blocked / "silenced.json")) as shown:
        await shown.press("exclamation_mark", "space")
        await shown.until(lambda: "kept until this screen closes" in shown.text())
        await shown.press("escape")
        await shown.until(lambda: "1 warning silenced" in shown.text())


@pytest.mark.parametrize("text", ["{", "{}", "[1, null]", "\xff", "[" * 50_000])
def test_a_file_with_something_else_silences_nothing(tmp_path: Path, text: str) -> None:
    """It is replaced with the next choice."""
    file = tmp_path / "silenced.json"
    file.write_bytes(text.encode("latin-1"))
    silenced = Silenced(file)
    assert silenced.kinds == set()
    silenced.toggle("waiting")
    assert Silenced(file).kinds == {"waiting"}


@pytest.mark.skipif(os.name == "nt", reason="LOCALAPPDATA")
@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_STATE_HOME": "/s", "HOME": "/h"}, "/s/otel-tasks/silenced.json"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, "/h/.local/state/otel-tasks/silenced.json"),
        ({"HOME": "/h"}, "/h/.local/state/otel-tasks/silenced.json"),
        ({}, "None"),
    ],
)
def test_the_file_is_where_the_state_of_programs_is(environ: dict[str, str], expected: str) -> None:
    """As the freedesktop specification has it."""
    assert str(state_file(environ)) == expected
