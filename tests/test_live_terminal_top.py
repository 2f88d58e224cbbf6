"""otel-tasks top: rows keep their places, a pause holds what comes, and the dialog cancels by id."""

from __future__ import annotations

import asyncio

import pytest

from otel_tasks_terminal.client import Address, Client
from otel_tasks_terminal.errors import ExitCode
from otel_tasks_terminal.top.app import Top
from otel_tasks_terminal.top.dialogs import Cancel
from tests import live_server
from tests.live_screen import DEADLINE, screen
from tests.live_server import (
    SYNC_MAIL,
    Said,
    View,
    counted,
    delta,
    details,
    prepared,
    rows,
    serving,
    snapshot,
    task,
)

pytestmark = pytest.mark.real_clock


async def test_first_screen() -> None:
    """Counters, warnings, and the stuck task are in sight at once."""
    async with screen() as shown:
        await shown.until(lambda: "▶ 53 running" in shown.text())
        text = shown.text()
    assert "shop · api-7f · pid 812  ● live 1 s  can cancel" in text
    assert "! 1 cancelling for more than 30 s" in text
    assert "◐ sync_mail HIGH  cancelling 44 s · client disconnected" in text
    assert "imports limit 50" in text


async def test_selection_stays_with_its_row() -> None:
    """Rows come and go around it: the selected one stays selected, and where it is on the screen."""
    async with screen() as shown:
        await shown.press("end")
        assert shown.selected() == "c-user"
        new = [counted(f"c-{n}", f"a{n}", 1, group="g2", kind="task", task=None) for n in range(40)]
        shown.view.push("delta", delta(2, set={"groups": [], "classes": new, "cancelling": []}))
        await shown.until(lambda: len(shown.row_keys()) > 40)
        assert shown.selected() == "c-user"
        assert "import_user" in shown.text()


async def test_a_selected_task_that_ends_keeps_its_place() -> None:
    """It says that it has ended, until the selection moves on."""
    async with screen() as shown:
        await shown.press("n")
        assert shown.selected() == "uid-sync_mail"
        gone = {"groups": [], "classes": ["c-sync_mail"], "cancelling": ["uid-sync_mail"]}
        before = shown.row_keys()
        shown.view.push("delta", delta(2, gone=gone))
        await shown.until(lambda: "has ended" in shown.text())
        assert shown.row_keys() == before
        await shown.press("j")
        shown.view.push("delta", delta(3))
        await shown.until(lambda: "uid-sync_mail" not in shown.row_keys())


async def test_the_next_task_in_trouble_is_a_task() -> None:
    """The key does not stop at a class whose cancelling tasks are in the list: Enter shows a panel."""
    async with screen() as shown:
        stuck = {**live_server.SYNC_MAIL, "id": "uid-chart", "name": "chart", "class": "c-chart"}
        chart = counted("c-chart", "chart", 2, group="g2", kind="task", task=None, cancelling=1)
        shown.view.push("delta", delta(2, set={"groups": [], "classes": [chart], "cancelling": [stuck]}))
        await shown.until(lambda: "uid-chart" in shown.row_keys())
        stops: list[str | None] = []
        for _ in range(3):
            await shown.press("n")
            stops.append(shown.selected())
        assert "uid-chart" in stops
        assert "c-chart" not in stops


async def test_rows_do_not_move_while_someone_looks() -> None:
    """Where the order would change after a key, known rows keep it until the next sort."""
    async with screen() as shown:
        await shown.press("s", "s", "s", "j")
        assert shown.row_keys()[1] == "g3"
        larger = counted(
            "g2", "GET /report/{id}", 900, parent="g1", kind="request", instances=1, cancelling=1
        )
        shown.view.push("delta", delta(2, set={"groups": [larger], "classes": [], "cancelling": []}))
        await shown.until(lambda: "900" in shown.text())
        assert shown.row_keys()[1] == "g3"


async def test_a_class_opens_with_its_tasks() -> None:
    """Its tasks come at once, and the next stream keeps them up to date."""
    view = prepared()
    view.answers["GET tasks"] = Said(rows(*live_server.PRICES))
    async with screen(view) as shown:
        await shown.press("n", "j", "l")
        await shown.until(lambda: "uid-fetch_prices-1" in shown.row_keys())
        view.streams = [[("delta", delta(3))]]
        shown.view.push("delta", delta(2))
        await shown.until(lambda: any(asked.query.get("expand") for asked in view.asked))
        assert view.asked[-1].query["expand"] == ["c-prices:200"]
        assert view.asked[-1].query["after"] == ["inst:2"]
        await shown.press("h")
        assert "uid-fetch_prices-1" not in shown.row_keys()
        await shown.press("h")
        assert shown.selected() == "g2"


async def test_a_pause_holds_what_comes() -> None:
    """The screen stands still, counts the changes, and then has all of them."""
    async with screen() as shown:
        await shown.press("space")
        gone = {"groups": ["g3"], "classes": ["c-user"], "cancelling": []}
        shown.view.push("delta", delta(2, gone=gone))
        await shown.until(lambda: "paused · 2 changes waiting" in shown.text())
        assert "g3" in shown.row_keys()
        await shown.press("space")
        assert "g3" not in shown.row_keys()


async def test_a_pause_holds_the_panel_too() -> None:
    """It stands still, and is asked for again when the pause ends."""
    view = prepared()
    async with screen(view) as shown:
        await shown.press("n", "enter")
        await shown.until(lambda: "Task id" in shown.text())
        await shown.press("space")
        later = details(task={**SYNC_MAIL, "priority": "LOW"})
        view.streams = [[]]
        shown.view.push("task", later)
        shown.view.push("delta", delta(2))
        await shown.until(lambda: "paused" in shown.text())
        assert "Priority   HIGH" in shown.text()
        view.answers["GET tasks/uid-sync_mail"] = Said(later)
        await shown.press("space")
        await shown.until(lambda: "Priority   LOW" in shown.text())


async def test_the_panel_shows_the_task() -> None:
    """Enter opens it beside the list, which stays where it is; Esc closes it."""
    async with screen() as shown:
        await shown.press("n", "enter")
        await shown.until(lambda: "shop/pool.py:88 in Pool.acquire" in shown.text())
        assert "sync_mail HIGH" in shown.text()
        await shown.press("escape")
        assert "Pool.acquire" not in shown.text()


async def test_the_panel_of_a_task_that_is_forgotten_keeps_what_was_known() -> None:
    """It says so above, whether the stream or a request brings the news."""
    view = prepared()
    async with screen(view) as shown:
        await shown.press("n", "enter")
        await shown.until(lambda: "Task id" in shown.text())
        view.streams = [[]]
        shown.view.push("task", {"v": 1, "state": "forgotten", "task": {"id": "uid-sync_mail"}})
        await shown.until(lambda: "This task has ended and is no longer" in shown.text())
        assert "shop/pool.py:88 in Pool.acquire" in shown.text()
        await shown.press("escape")
        del view.answers["GET tasks/uid-sync_mail"]
        await shown.press("enter")
        await shown.until(lambda: "This task has ended and is no longer" in shown.text())


async def test_a_warning_opens_its_tasks() -> None:
    """Its number lists them."""
    async with screen() as shown:
        await shown.press("1")
        await shown.until(lambda: "uid-sync_mail" in shown.row_keys() and "g1" not in shown.row_keys())
        query = next(asked.query for asked in shown.view.asked if asked.path == "tasks")
        assert query["status"] == ["cancelling"]
        assert query["min_age"] == ["30"]
        await shown.press("escape")
        assert shown.row_keys()[0] == "g1"


async def test_cancel_needs_a_second_key_and_goes_by_id() -> None:
    """The dialog names the task and what else ends; its target does not change with the list."""
    async with screen() as shown:
        await shown.press("n", "x")
        await shown.until(lambda: "also ends  2 tasks in groups that it has opened" in shown.text())
        assert [asked.method for asked in shown.view.asked].count("POST") == 0
        gone = {"groups": [], "classes": ["c-sync_mail"], "cancelling": ["uid-sync_mail"]}
        shown.view.push("delta", delta(2, gone=gone))
        await shown.press("enter")
        await shown.until(lambda: "The task was cancelled and has ended." in shown.text())
        post = next(asked for asked in shown.view.asked if asked.method == "POST")
        assert post.path == "tasks/uid-sync_mail/cancel"
        assert post.body == {}


async def test_an_open_panel_decides_what_is_cancelled() -> None:
    """The selection may have moved on: the task of the panel is meant, even before its details come."""
    view = prepared()
    view.answers["GET tasks"] = Said(rows(*live_server.PRICES))
    view.answers["GET tasks/uid-fetch_prices-0"] = Said(details(task=live_server.PRICES[0]))
    async with screen(view) as shown:
        await shown.press("n", "l", "j", "x")
        await shown.until(lambda: "Cancel sync_mail?" in shown.text())


async def test_cancel_that_is_not_allowed() -> None:
    """The service decides: without its leave, the button stays off."""
    view = prepared()
    view.answers["GET tasks/uid-sync_mail"] = Said(details(can=[]))
    async with screen(view) as shown:
        await shown.press("n", "x")
        await shown.until(lambda: "You may not cancel this task." in shown.text())
        await shown.press("enter", "escape")
        assert not isinstance(shown.app.screen, Cancel)
        assert [asked.method for asked in view.asked].count("POST") == 0


async def test_a_read_only_view_has_no_dialog() -> None:
    """It says how it could cancel."""
    view = prepared()
    view.streams = [[("snapshot", snapshot(actions=[]))]]
    async with screen(view) as shown:
        assert "read-only" in shown.text()
        await shown.press("n", "x")
        await shown.until(lambda: "This view is read-only" in shown.text())


async def test_a_lost_connection_is_seen() -> None:
    """The rows stay, and the head says since when and why they are old."""
    view = prepared()
    async with screen(view) as shown:
        view.answers["GET events"] = Said(b"", 502)
        view.closing.set()
        await shown.until(lambda: "! stale for" in shown.text())
        assert "reconnecting" in shown.text()
        assert "c-user" in shown.row_keys()
        assert shown.app.screen.has_class("stale")
        await shown.press("n", "x")
        await shown.until(lambda: "The server does not answer" in shown.text())


async def test_a_view_that_refuses_ends_the_screen() -> None:
    """Nothing comes of waiting: the exit code is that of the other commands."""
    view = View({"GET events": Said({"v": 1, "error": {"code": "unauthorized", "message": "no"}}, 401)})
    with serving(view):
        app = Top(Client(Address.parse(view.url)))
        async with app.run_test() as pilot:
            async with asyncio.timeout(DEADLINE):
                while app.is_running:
                    await pilot.pause(0.01)
    assert app.return_code == ExitCode.REFUSED


async def test_hostile_text_is_inert() -> None:
    """Markup, escape sequences, and marks are neither read nor shown."""
    evil = "[red]\x1b[2J\u202ex[/]"
    view = prepared()
    view.streams = [[("snapshot", snapshot(service=evil, cancelling=[{**SYNC_MAIL, "name": evil}]))]]
    view.answers["GET tasks/uid-sync_mail"] = Said(details(task=task(evil), path=[evil]))
    async with screen(view) as shown:
        await shown.press("n", "l")
        await shown.until(lambda: "default" in shown.text() and "Task id" in shown.text())
        text = shown.text()
    assert "[red]x[/]" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


async def test_tasks_of_requests_that_share_a_row_are_told_apart() -> None:
    """Each has the number of its request after its name, as on the page; others do not."""
    view = prepared()
    shared = counted("g2", "GET /report/{id}", 4, parent="g1", kind="request", instances=2, cancelling=1)
    first = snapshot()
    view.streams = [[("snapshot", {**first, "groups": [first["groups"][0], shared, first["groups"][2]]})]]
    async with screen(view) as shown:
        assert "◐ sync_mail #4711 HIGH  cancelling" in shown.text()
        gone = {"groups": [], "classes": ["c-sync_mail"], "cancelling": ["uid-sync_mail"]}
        ended = {**SYNC_MAIL, "status": "cancelled", "ended": live_server.NOW}
        alone = {"groups": [first["groups"][1]], "classes": [], "cancelling": []}
        await shown.press("f", "n", "k")
        shown.view.push("delta", delta(2, gone=gone, set=alone, ended=[ended]))
        await shown.until(lambda: "#4711" not in shown.text())


async def test_a_panel_that_does_not_fit_is_scrolled_with_the_keyboard() -> None:
    """Tab goes to it, where j and k scroll; the selected row stays."""
    async with screen(size=(80, 24)) as shown:
        await shown.press("n", "enter")
        await shown.until(lambda: "Task id" in shown.text())
        assert "Siblings" not in shown.text()
        await shown.press("tab", *["j"] * 17)
        await shown.until(lambda: "Siblings" in shown.text())
        assert shown.selected() == "uid-sync_mail"
        await shown.press("escape", "j")
        assert shown.selected() == "c-prices"


async def test_counters_are_whole_in_a_narrow_terminal() -> None:
    """No word is cut at 80 columns."""
    async with screen(size=(80, 24)) as shown:
        await shown.until(lambda: "▶ 53 running" in shown.text())
        for word in ("waiting", "cancelling", "completed", "failed", "cancelled"):
            assert f" {word} " in shown.text(), word


async def test_only_ascii_reaches_a_terminal_without_more() -> None:
    """With --ascii, neither rows nor frames, buttons, bars, or messages have other characters."""
    async with screen(size=(80, 24), ascii_only=True) as shown:
        for keys in (
            ["n", "l"],
            ["exclamation_mark"],
            ["escape", "question_mark"],
            ["escape", "x"],
            ["escape", "s"],
        ):
            await shown.press(*keys)
            await shown.pilot.pause(0.1)
            assert shown.text().isascii(), shown.text()


@pytest.mark.parametrize("size", [(40, 12), (20, 6), (300, 80)])
async def test_any_size(size: tuple[int, int]) -> None:
    """Small and large terminals show the list."""
    async with screen(size=size) as shown:
        await shown.press("n", "l", "question_mark", "escape", "x", "escape")
        assert "default" in shown.text() or size[1] < 10
