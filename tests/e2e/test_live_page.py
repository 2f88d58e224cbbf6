"""The page of the live view in a real browser, looking at a real server."""

from __future__ import annotations

import re
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.nginx import nginx_command
from tests.processes import free_port

from .browser import Site, Watched, browsing, watch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, BrowserContext, Locator, Page

pytestmark = pytest.mark.e2e

pytest.importorskip("playwright", reason="the browser tests need playwright")

from playwright.sync_api import expect  # noqa: E402 - only where it is installed

# Milliseconds. The feed ticks once a second, and the machine is busy with other tests.
PATIENCE = 20_000
DEADLINE = 60.0
TIMES = "\N{MULTIPLICATION SIGN}"
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this module."""
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One server for all tests of this module."""
    site = Site("tests.e2e.page_app:outer", tmp_path_factory.mktemp("page"))
    try:
        site.start()
        yield site
    finally:
        site.stop()


@pytest.fixture
def shop(server: Site) -> Site:
    """The server, without a task of another test."""
    server.post("/shop/control/reset")
    end = time.monotonic() + DEADLINE
    while server.get("/shop/tasks/v1/snapshot")["stats"]["live"]:
        assert time.monotonic() < end, server.log()
        time.sleep(0.05)
    return server


class Visits:
    """Opens pages in one new profile, and notes what each of them complains of."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        self._url = url
        self._context: BrowserContext | None = None
        self.watched: dict[Page, Watched] = {}

    def __call__(
        self,
        path: str = "/shop/tasks/",
        *,
        rows: bool = True,
        script: str | None = None,
        complains: tuple[str, ...] = (),
        **options: Any,
    ) -> Page:
        """Open one more page.

        Args:
            path: Its path at the server, or its whole address.
            rows: Wait until it shows a row.
            script: To be run before the page's own, in each page of the profile.
            complains: Parts of the complaints that the test provokes.
            **options: Of the profile.
        """
        if self._context is None:
            self._context = self._browser.new_context(viewport={"width": 1440, "height": 900}, **options)
            self._context.set_default_timeout(PATIENCE)
            if script is not None:
                self._context.add_init_script(script)
        page = self._context.new_page()
        self.watched[page] = watch(page, complains)
        page.goto(path if path.startswith("http") else self._url + path)
        if rows:
            expect(page.locator("#state")).to_contain_text("live")
            page.wait_for_selector("#rows .row")
        return page

    def streams(self, page: Page) -> int:
        """The number of event streams that a page reads."""
        return len(self.watched[page].streams)

    def close(self) -> None:
        """Close all pages."""
        if self._context is not None:
            self._context.close()


@pytest.fixture
def visit(browser: Browser, shop: Site) -> Iterator[Visits]:
    """Opens pages; at the end, none of them has complained."""
    visits = Visits(browser, shop.url)
    try:
        yield visits
        assert [each.unexpected for each in visits.watched.values()] == [[] for _ in visits.watched]
    finally:
        visits.close()


def row(page: Page, name: str) -> Locator:
    """The row of a group, a class, or a task."""
    return page.locator(f'#rows .row:has(.label:text-is("{name}"))')


def labels(page: Page) -> Locator:
    """The names of all rows, from the top."""
    return page.locator("#rows .label")


def top_of(element: Locator) -> float:
    """Where it is on the screen."""
    box = element.bounding_box()
    assert box is not None
    return box["y"]


def focused(page: Page) -> str:
    """The name in the row that has the focus."""
    return str(page.evaluate("document.activeElement.querySelector?.('.label')?.textContent ?? ''"))


# --- the first screen ------------------------------------------------------------------------------------


def test_first_screen_shows_five_tasks_with_their_groups(shop: Site, visit: Visits) -> None:
    """Few rows start open: each task is there with what it does, and the counters say what they count."""
    for name in ("load", "parse"):
        shop.post("/shop/control/tasks", name=name, group="imports")
    shop.post("/shop/control/tasks", name="send", group="mail", count=3)
    page = visit()
    expect(labels(page)).to_have_text(["shop", "imports", "load", "parse", "mail", "send"])
    expect(row(page, "load")).to_contain_text(re.compile(r"at page_app\.py:\d+"))
    expect(row(page, "send")).to_contain_text(f"{TIMES}3")
    expect(page.locator("#counts")).to_contain_text("▶ 5running")
    expect(page.locator("#host")).to_contain_text("pid")
    expect(page.locator("#may")).to_have_text("can cancel")


def test_stuck_task_among_ten_thousand_is_on_the_first_screen(shop: Site, visit: Visits) -> None:
    """Without a click: which task it is, what it waits for, and who asked it to stop."""
    shop.post("/shop/control/tasks", name="deliver", group="mail", count=10_000)
    shop.post("/shop/control/tasks", name="sync_mail", group="mail", kind="ignore")
    page = visit()
    shop.post("/shop/control/cancel", name="sync_mail", reason="stuck since noon")
    expect(page.locator("#counts")).to_contain_text("10,000running")
    expect(page.locator("#counts")).to_contain_text("◐ 1cancelling")
    stuck = row(page, "sync_mail")
    expect(stuck).to_contain_text(
        re.compile(
            r"◐.*cancelling \d+(\.\d)? s · requested by POST .*/control/cancel: stuck since noon"
            r" · at page_app\.py:\d+"
        )
    )
    expect(stuck).to_be_in_viewport()
    assert page.locator("#rows .row").count() < 20
    stuck.click()
    expect(page.locator("#panel .frames")).to_contain_text(re.compile(r"page_app\.py:\d+ in"))


def test_empty_manager_says_what_there_was(shop: Site, visit: Visits) -> None:
    """Without a task, the page counts those that have ended, and leads to them."""
    page = visit(rows=False)
    expect(page.locator("#empty")).to_contain_text("No task is live.")
    shop.post("/shop/control/tasks", name="short", kind="work")
    expect(row(page, "short")).to_be_visible()
    shop.post("/shop/control/end")
    expect(page.locator("#empty")).to_contain_text("have ended, the last one")
    page.click("#empty button")
    expect(row(page, "short")).to_contain_text("completed")


# --- rows ------------------------------------------------------------------------------------------------


def test_class_opens_to_its_oldest_tasks_and_more_on_request(shop: Site, visit: Visits) -> None:
    """The first 200 tasks come, then 400; closing the row removes them."""
    shop.post("/shop/control/tasks", name="deliver", group="mail", count=500)
    page = visit()
    row(page, "deliver").first.click()
    expect(page.locator(".row.task")).to_have_count(200)
    expect(page.locator(".row.task").first).to_contain_text("at page_app.py")
    page.locator(".row.more").click()
    expect(page.locator(".row.task")).to_have_count(400)
    expect(page.locator(".row.more")).to_contain_text("100 more")
    page.locator(".row.class").click()
    expect(page.locator(".row.task")).to_have_count(0)


def test_search_finds_tasks_by_name_and_by_line(shop: Site, visit: Visits) -> None:
    """The server searches all tasks; without a match the page says so; the address has the query."""
    shop.post("/shop/control/tasks", name="load", group="imports", count=3)
    shop.post("/shop/control/tasks", name="send", group="mail", count=2)
    page = visit()
    page.fill("#search", "load")
    expect(page.locator("#note")).to_contain_text("3 of 5 live")
    expect(page.locator(".row.task")).to_have_count(3)
    expect(page.locator(".row.task").first).to_contain_text("imports")
    assert "q=load" in page.url
    page.fill("#search", "page_app.py")
    expect(page.locator(".row.task")).to_have_count(5)
    page.fill("#search", "nothing of this kind")
    expect(page.locator("#empty")).to_contain_text("No task matches “nothing of this kind”. 5 are live.")
    page.click("#empty button")
    expect(row(page, "imports")).to_be_visible()


def test_link_with_a_query_finds_a_task_that_has_ended(shop: Site, visit: Visits) -> None:
    """A link from a trace leads to the live view; if nothing is live there, to what has ended."""
    shop.post("/shop/control/tasks", name="failing", kind="fail")
    shop.post("/shop/control/end")
    page = visit("/shop/tasks/?q=failing")
    expect(row(page, "failing")).to_contain_text("failed · ValueError: no such article")
    assert page.input_value("#search") == "failing"


def test_sort_orders_rows_and_nothing_moves_under_the_pointer(shop: Site, visit: Visits) -> None:
    """Each order is stable; while the pointer is over the rows, a new order waits."""
    for name, count in (("b", 3), ("a", 2), ("c", 4)):
        shop.post("/shop/control/tasks", name=name, count=count)
    page = visit()
    expect(labels(page)).to_have_text(["shop", "a", "b", "c"])
    page.select_option("#sort", "count")
    expect(labels(page)).to_have_text(["shop", "c", "b", "a"])
    row(page, "b").hover()
    shop.post("/shop/control/tasks", name="a", count=10)
    expect(row(page, "a")).to_contain_text(f"{TIMES}12")
    assert labels(page).all_text_contents() == ["shop", "c", "b", "a"]
    page.mouse.move(5, 5)
    expect(labels(page)).to_have_text(["shop", "a", "c", "b"])


def test_changing_row_keeps_focus_and_place(shop: Site, visit: Visits) -> None:
    """Rows that change, come, and go around the focused one move neither the focus nor the list."""
    shop.post("/shop/control/tasks", name="import", group="imports", kind="report", count=60)
    shop.post("/shop/control/tasks", name="send", group="mail", count=20)
    page = visit()
    row(page, "import").first.click()
    expect(page.locator(".row.task")).to_have_count(60)
    task = page.locator(".row.task").nth(40)
    key = task.get_attribute("data-key")
    task.click()
    top = page.evaluate("document.getElementById('list').scrollTop")
    place = top_of(task)
    before = task.text_content()
    shop.post("/shop/control/tasks", name="other", group="files", count=3)
    shop.post("/shop/control/end")
    expect(row(page, "mail")).to_have_count(0)
    expect(row(page, "files")).to_have_count(0)
    expect(task).not_to_have_text(before or "")
    assert page.evaluate("document.activeElement.dataset.key") == key
    assert page.evaluate("document.getElementById('list').scrollTop") == top
    assert top_of(task) == place


def test_selected_task_stays_when_it_ends(shop: Site, visit: Visits) -> None:
    """Its row says that it has ended, and its panel how; both go when the selection moves on."""
    shop.post("/shop/control/tasks", name="first")
    shop.post("/shop/control/tasks", name="second", kind="report")
    page = visit()
    row(page, "first").click()
    expect(page.locator("#panel")).to_contain_text("Waiting at")
    shop.post("/shop/control/end")
    expect(row(page, "first")).to_contain_text("has ended")
    expect(page.locator("#panel")).to_contain_text("completed")
    row(page, "second").click()
    expect(row(page, "first")).to_have_count(0)


def test_finished_tasks_are_shown_on_request(shop: Site, visit: Visits) -> None:
    """They are hidden at first; the view of ended tasks has them with their outcome."""
    page = visit(rows=False)
    shop.post("/shop/control/tasks", name="failing", kind="fail", count=2)
    shop.post("/shop/control/tasks", name="other", kind="report")
    expect(row(page, "failing")).to_be_visible()
    page.click("button[value=ended]")
    shop.post("/shop/control/end")
    expect(page.locator(".row.ended").first).to_contain_text("failed · ValueError: no such article")
    page.click("button[value=tree]")
    expect(row(page, "other")).to_be_visible()
    expect(page.locator(".row.ended")).to_have_count(0)


# --- pause -----------------------------------------------------------------------------------------------


def test_pause_holds_the_page_and_counts_what_waits(shop: Site, visit: Visits) -> None:
    """Nothing changes during a pause except for the number of changes; then they are all there."""
    shop.post("/shop/control/tasks", name="first", count=2)
    page = visit()
    expect(labels(page)).to_have_text(["shop", "first"])
    page.keyboard.press(" ")
    expect(page.locator("#state")).to_contain_text("paused")
    shop.post("/shop/control/tasks", name="later", count=2)
    expect(page.locator("#state")).to_contain_text(re.compile(r"paused · [1-9]\d* changes? waiting"))
    assert labels(page).all_text_contents() == ["shop", "first"]
    page.click("#pause")
    expect(row(page, "later")).to_be_visible()
    expect(page.locator("#state")).to_contain_text("live")


# --- the panel -------------------------------------------------------------------------------------------


def test_panel_shows_why_a_request_does_not_stop(shop: Site, visit: Visits) -> None:
    """For a request whose client has left: path, where its task waits, the cause, and siblings."""
    with pytest.raises(httpx.TimeoutException):
        httpx.get(f"{shop.url}/shop/report/7", timeout=0.5)
    page = visit()
    row(page, "sync_mail").click()
    panel = page.locator("#panel")
    expect(panel.locator("h2")).to_have_text("◐ sync_mail")
    expect(panel.locator(".path")).to_contain_text("shop / GET")
    expect(panel).to_contain_text("HIGH")
    expect(panel.locator(".frames")).to_contain_text("page_app.py")
    expect(panel.locator(".chain li").first).to_contain_text("Client disconnected")
    expect(panel.locator(".chain li").last).to_contain_text("not finished")
    expect(panel).to_contain_text(re.compile(r"Siblings.*ended"))
    assert "task=" in page.url
    top = top_of(page.locator("#list"))
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    assert top_of(page.locator("#list")) == top


def test_panels_of_two_tabs_come_with_their_stream(shop: Site, visit: Visits) -> None:
    """Each follows its task to the end, and asks for it no more than once."""
    tabs = {}
    for name, kind in (("first", "report"), ("second", "fail")):
        shop.post("/shop/control/tasks", name=name, kind=kind)
        tabs[name] = visit()
    asked: list[str] = []
    for name, page in tabs.items():
        page.on("request", lambda request: asked.append(request.url))
        row(page, name).click()
        expect(page.locator("#panel")).to_contain_text("Waiting at")
    progress = tabs["first"].locator("#panel dl")
    expect(progress).to_contain_text("line ")
    before = progress.locator(".mute").first.text_content()
    expect(progress.locator(".mute").first).not_to_have_text(before or "")
    shop.post("/shop/control/end")
    expect(tabs["second"].locator("#panel")).to_contain_text("failed · ValueError: no such article")
    expect(tabs["second"].locator("#panel .danger")).to_be_hidden()
    assert sum(visit.streams(page) for page in tabs.values()) == 1
    assert len([url for url in asked if "/v1/tasks/" in url]) == len(tabs)


def test_panel_stands_still_during_a_pause(shop: Site, visit: Visits) -> None:
    """What its task does meanwhile is there at the end of the pause."""
    shop.post("/shop/control/tasks", name="load")
    page = visit()
    row(page, "load").click()
    expect(page.locator("#panel")).to_contain_text("Waiting at")
    page.keyboard.press(" ")
    shop.post("/shop/control/end")
    expect(page.locator("#state")).to_contain_text(re.compile(r"[1-9]\d* changes? waiting"))
    expect(page.locator("#panel")).to_contain_text("Waiting at")
    with page.expect_request("**/v1/tasks/*"):
        page.keyboard.press(" ")
    expect(page.locator("#panel")).to_contain_text("completed")


def test_panel_leads_to_the_task_that_it_waits_for(shop: Site, visit: Visits) -> None:
    """A task that awaits another one links to it, by its path."""
    with pytest.raises(httpx.TimeoutException):
        httpx.get(f"{shop.url}/shop/report/7", timeout=0.5)
    page = visit()
    row(page, "render_chart").click()
    page.locator("#panel dd button.link", has_text="sync_mail").first.click()
    expect(page.locator("#panel h2")).to_have_text("◐ sync_mail")
    page.keyboard.press("x")
    page.locator("#cancel button[value=go]").click()
    expect(page.locator("#cancel .answer")).to_contain_text("The cancellation is requested")


def test_panel_says_what_a_plain_task_runs(shop: Site, visit: Visits) -> None:
    """Of a task that asyncio has named, the number says nothing: its coroutine and its line do."""
    shop.post("/shop/control/tasks", name="load", kind="await_plainly")
    page = visit()
    expect(row(page, "load")).to_contain_text("waits for Task-18 (work)")
    row(page, "load").click()
    expect(page.locator("#panel dl")).to_contain_text(
        re.compile(r"Waits for\s*Task-18 work · at page_app\.py:\d+ in Pool\.acquire")
    )


def test_panel_leads_to_the_tasks_at_the_same_line(shop: Site, visit: Visits) -> None:
    """`w` lists all tasks that wait where the selected one waits."""
    shop.post("/shop/control/tasks", name="load", count=3)
    shop.post("/shop/control/tasks", name="other", kind="report")
    page = visit()
    page.fill("#search", "load")
    expect(page.locator("#note")).to_contain_text("3 of 4 live")
    page.locator(".row.task").first.click()
    expect(page.locator("#panel .frames")).to_be_visible()
    page.keyboard.press("w")
    expect(page.locator("#scope")).to_contain_text("waiting at page_app.py:")
    expect(page.locator(".row.task")).to_have_count(3)
    page.click("#scope button")
    expect(page.locator("#scope")).to_be_hidden()


def test_warning_opens_its_tasks_and_can_be_silenced(shop: Site, visit: Visits) -> None:
    """Many tasks at one line are one warning; its kind stays silent after a reload, until it is asked for."""
    shop.post("/shop/control/tasks", name="load", count=41)
    page = visit()
    warning = page.locator(".warning", has_text="waiting at page_app.py:")
    expect(warning).to_contain_text("! 41")
    warning.locator(".open").click()
    expect(page.locator(".row.task")).to_have_count(41)
    warning.locator(".hush").click()
    expect(warning).to_have_count(0)
    page.reload()
    expect(page.locator("#warnings")).to_contain_text("silenced: show")
    page.get_by_role("button", name="silenced: show").click()
    expect(warning).to_be_visible()


def test_timeline_shows_a_request_with_its_cause(shop: Site, visit: Visits) -> None:
    """Bars of live tasks, then of ended ones, on one axis; the hang-up is marked on each that it struck."""
    with pytest.raises(httpx.TimeoutException):
        httpx.get(f"{shop.url}/shop/report/7", timeout=0.5)
    page = visit()
    row(page, "sync_mail").click()
    page.keyboard.press("g")
    timeline = page.locator("#timeline")
    expect(timeline.locator(".bar")).to_have_count(5)
    names = timeline.locator(".bar bdi:not(.mute)").all_text_contents()
    assert set(names[:2]) == {"sync_mail", "render_chart"}
    expect(timeline.locator(".bar-group")).to_contain_text("⊘ client disconnect")
    expect(timeline.locator(".bar", has_text="sync_mail").locator(".open")).to_have_count(1)
    expect(timeline.locator(".struck")).to_have_count(5)
    timeline.locator(".bar", has_text="fetch_prices").first.click()
    expect(page.locator("#panel h2")).to_have_text("⊘ fetch_prices")


# --- cancelling ------------------------------------------------------------------------------------------


def test_cancel_names_its_target_and_says_what_came_of_it(shop: Site, visit: Visits) -> None:
    """The dialog has the id, the name, and the number of tasks below; the task's cause has the reason."""
    shop.post("/shop/control/tasks", name="parent", kind="with_children")
    page = visit()
    row(page, "parent").click()
    page.click("#panel .danger")
    dialog = page.locator("#cancel")
    expect(dialog).to_contain_text("Cancel parent?")
    expect(dialog).to_contain_text("3 tasks in groups that it has opened")
    dialog.locator("input").fill("stuck since noon")
    dialog.locator("button[value=go]").click()
    expect(dialog.locator(".answer")).to_have_text("The task was cancelled and has ended.")
    dialog.locator("button[value=keep]").click()
    expect(page.locator("#panel")).to_contain_text("stuck since noon")
    assert shop.get("/shop/control/live") == []


def test_cancel_of_a_task_that_has_ended_hits_nothing_else(shop: Site, visit: Visits) -> None:
    """The dialog's target is its id: a new task of the same name is not cancelled."""
    shop.post("/shop/control/tasks", name="load")
    page = visit()
    row(page, "load").click()
    page.keyboard.press("x")
    dialog = page.locator("#cancel")
    expect(dialog.locator("button[value=go]")).to_be_enabled()
    shop.post("/shop/control/end")
    shop.post("/shop/control/tasks", name="load")
    dialog.locator("button[value=go]").click()
    expect(dialog.locator(".answer")).to_contain_text("had already ended")
    assert shop.get("/shop/control/live") == ["load"]


def test_task_that_ignores_its_cancellation_is_reported_so(shop: Site, visit: Visits) -> None:
    """The answer does not claim an end that has not come."""
    shop.post("/shop/control/tasks", name="sync_mail", kind="ignore")
    page = visit()
    row(page, "sync_mail").click()
    page.keyboard.press("x")
    page.locator("#cancel button[value=go]").click()
    expect(page.locator("#cancel .answer")).to_contain_text("still runs")


def test_read_only_view_offers_no_cancel(shop: Site, visit: Visits) -> None:
    """There is no button, and the key says why."""
    shop.post("/shop/control/tasks", name="load")
    page = visit("/shop/read-only/")
    expect(page.locator("#may")).to_have_text("read-only")
    row(page, "load").click()
    expect(page.locator("#panel")).to_contain_text("Waiting at")
    expect(page.locator("#panel .danger")).to_be_hidden()
    page.keyboard.press("x")
    expect(page.locator("#say")).to_have_text("This view is read-only.")
    assert page.locator("#cancel").is_hidden()


def test_viewer_may_cancel_only_what_the_service_allows(shop: Site, visit: Visits) -> None:
    """The service decides for each task; the dialog of another one cannot be confirmed."""
    shop.post("/shop/control/tasks", name="mine")
    shop.post("/shop/control/tasks", name="other", kind="report")
    page = visit("/shop/restricted/")
    row(page, "other").click()
    page.keyboard.press("x")
    expect(page.locator("#cancel .answer")).to_have_text("You may not cancel this task here.")
    expect(page.locator("#cancel button[value=go]")).to_be_disabled()
    page.locator("#cancel button[value=keep]").click()
    row(page, "mine").click()
    page.click("#panel .danger")
    page.locator("#cancel button[value=go]").click()
    expect(page.locator("#cancel .answer")).to_contain_text("has ended")
    assert shop.get("/shop/control/live") == ["other"]


# --- keyboard --------------------------------------------------------------------------------------------


def test_everything_is_reached_with_the_keyboard_alone(shop: Site, visit: Visits) -> None:
    """Find a task, read its panel, cancel it, and come back, without a mouse."""
    shop.post("/shop/control/tasks", name="load", group="imports", count=3)
    shop.post("/shop/control/tasks", name="send", group="mail", kind="report")
    page = visit()
    expect(labels(page)).to_have_text(["shop", "imports", "load", "mail", "send"])
    press = page.keyboard.press
    press("j")
    assert focused(page) == "shop"
    for _ in range(2):
        press("j")
    assert focused(page) == "load"
    press("l")
    expect(page.locator(".row.task")).to_have_count(4)
    press("j")
    press("h")
    press("h")
    expect(page.locator(".row.task")).to_have_count(1)
    press("End")
    assert focused(page) == "send"
    press("Enter")
    expect(page.locator("#panel h2")).to_have_text("▶ send")
    press("x")
    expect(page.locator("#cancel input")).to_be_focused()
    expect(page.locator("#cancel button[value=go]")).to_be_enabled()
    press("Enter")
    expect(page.locator("#cancel .answer")).to_contain_text("has ended")
    press("Escape")
    press("Escape")
    expect(page.locator("#panel")).to_be_hidden()
    press("/")
    page.keyboard.type("load")
    expect(page.locator(".row.task")).to_have_count(3)
    press("Enter")
    press("j")
    assert focused(page).startswith("load")
    press("Escape")
    expect(row(page, "imports")).to_be_visible()
    press("s")
    assert page.input_value("#sort") == "age"
    press("t")
    expect(page.locator("button[value=oldest]")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".row.task")).to_have_count(3)
    press("?")
    expect(page.locator("#help")).to_be_visible()
    press("Escape")
    expect(page.locator("#help")).to_be_hidden()


def test_next_cancelling_task_is_one_key_away(shop: Site, visit: Visits) -> None:
    """`n` goes to the tasks that do not stop, one after another."""
    shop.post("/shop/control/tasks", name="fine", count=5, group="a")
    for name in ("stuck", "stuck too"):
        shop.post("/shop/control/tasks", name=name, group="b", kind="ignore")
        shop.post("/shop/control/cancel", name=name)
    page = visit()
    expect(page.locator(".row.task", has_text="cancelling")).to_have_count(2)
    page.keyboard.press("n")
    assert focused(page) == "stuck"
    page.keyboard.press("n")
    assert focused(page) == "stuck too"
    page.keyboard.press("n")
    assert focused(page) == "stuck"


def test_rows_are_a_treegrid_for_a_screen_reader(shop: Site, visit: Visits) -> None:
    """Levels, open and closed rows, the selection, and a name for each column are there."""
    shop.post("/shop/control/tasks", name="load", group="imports", count=2)
    page = visit()
    assert page.get_by_role("treegrid", name="Tasks").count() == 1
    assert page.get_by_role("columnheader").count() == 7
    expect(labels(page)).to_have_text(["shop", "imports", "load"])
    levels = [each.get_attribute("aria-level") for each in page.locator("#rows .row").all()]
    assert levels == ["1", "2", "3"]
    expect(row(page, "imports")).to_have_attribute("aria-expanded", "true")
    expect(row(page, "load")).to_have_attribute("aria-expanded", "false")
    page.keyboard.press("j")
    expect(row(page, "shop")).to_have_attribute("aria-selected", "true")
    assert page.locator("#rows .row[tabindex='0']").count() == 1


# --- the connection --------------------------------------------------------------------------------------


def test_page_continues_after_a_restart_of_the_server(shop: Site, visit: Visits) -> None:
    """It looks stale while the server is gone, and shows the new process as soon as that answers."""
    shop.post("/shop/control/tasks", name="before")
    page = visit(complains=("Failed to load resource", "ERR_"))
    host = page.text_content("#host")
    shop.stop()
    expect(page.locator("#state")).to_contain_text("stale", timeout=PATIENCE)
    expect(page.locator("#rows")).to_have_css("opacity", "0.45")
    shop.start()
    shop.post("/shop/control/tasks", name="after")
    expect(row(page, "after")).to_be_visible()
    expect(row(page, "before")).to_have_count(0)
    expect(page.locator("#state")).to_contain_text("live")
    expect(page.locator("#host")).not_to_have_text(host or "")


def test_thirty_seconds_of_silence_look_stale_and_end(shop: Site, visit: Visits) -> None:
    """A server that says nothing on an open connection cannot be cancelled at, and is asked on a new one."""
    shop.post("/shop/control/tasks", name="load")
    page = visit(complains=("Failed to load resource", "ERR_"))
    page.clock.install()
    with page.expect_request("**/v1/events?*task=*"):
        row(page, "load").click()
    expect(page.locator("#panel .danger")).to_be_enabled()
    shop.suspend()
    with page.expect_request(lambda request: request.resource_type == "eventsource"):
        page.clock.fast_forward(30_000)
    expect(page.locator("#state")).to_contain_text("stale for 3")
    expect(page.locator("#panel .danger")).to_be_disabled()
    page.keyboard.press("x")
    expect(page.locator("#say")).to_have_text("The data is stale: nothing can be cancelled.")
    shop.resume()
    expect(page.locator("#state")).to_contain_text("live")
    expect(page.locator("#panel .danger")).to_be_enabled()


def test_six_tabs_share_one_stream(shop: Site, visit: Visits) -> None:
    """Each of them is live with the rows that it has opened; another one reads on when the reader closes."""
    shop.post("/shop/control/tasks", name="load", count=5)
    tabs = [visit() for _ in range(6)]
    for tab in tabs:
        expect(tab.locator("#state")).to_contain_text("live")
    assert sum(visit.streams(tab) for tab in tabs) == 1
    row(tabs[5], "load").first.click()
    expect(tabs[5].locator(".row.task")).to_have_count(5)
    shop.post("/shop/control/tasks", name="load", count=5)
    for tab in tabs:
        expect(row(tab, "load").first).to_contain_text(f"{TIMES}10")
    expect(tabs[5].locator(".row.task")).to_have_count(10)
    reader = next(tab for tab in tabs if visit.streams(tab))
    tabs.remove(reader)
    reader.close()
    shop.post("/shop/control/tasks", name="load", count=5)
    for tab in tabs:
        expect(row(tab, "load").first).to_contain_text(f"{TIMES}15")


HIDE = """
let hidden = false;
Object.defineProperty(document, "visibilityState", { get: () => hidden ? "hidden" : "visible" });
globalThis.hide = (on) => { hidden = on; document.dispatchEvent(new Event("visibilitychange")); };
"""


def test_hidden_tab_closes_its_stream(shop: Site, visit: Visits) -> None:
    """It asks nothing while nobody can see it, and is up to date when it is seen again."""
    shop.post("/shop/control/tasks", name="first")
    page = visit(script=HIDE)
    asked: list[str] = []
    page.evaluate("hide(true)")
    page.on("request", lambda request: asked.append(request.url))
    shop.post("/shop/control/tasks", name="second")
    page.wait_for_timeout(2500)
    assert asked == []
    page.evaluate("hide(false)")
    expect(row(page, "second")).to_be_visible()


def test_browser_without_event_streams_polls(shop: Site, visit: Visits) -> None:
    """The same page, by questions."""
    page = visit(script="delete globalThis.EventSource", rows=False)
    shop.post("/shop/control/tasks", name="load", count=3)
    expect(row(page, "load")).to_contain_text(f"{TIMES}3")
    row(page, "load").click()
    expect(page.locator(".row.task")).to_have_count(3)
    expect(page.locator("#state")).to_contain_text("live")


# --- safety ----------------------------------------------------------------------------------------------


def test_policy_allows_no_inline_code_and_the_page_has_none(shop: Site, visit: Visits) -> None:
    """The page works under its own policy; the browser refuses markup from a string."""
    shop.post("/shop/control/tasks", name="load")
    page = visit(complains=("requires 'TrustedHTML'",))
    response = page.reload()
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    text = response.text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=|javascript:", text)
    page.wait_for_selector("#rows .row")
    assert page.locator("[style]:not(.row)").count() == 0
    refused = page.evaluate("try { document.body.innerHTML = '<b>x</b>'; false } catch (e) { e.name }")
    assert refused == "TypeError"


HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "\u202egnirts desrever",
    "${7*7}{{7*7}}",
    "javascript:alert(1)",
    "x" * 200,
]


def test_hostile_names_are_only_text(shop: Site, visit: Visits) -> None:
    """Markup, marks that reverse the text, and very long names stay in their row and do nothing."""
    for name in HOSTILE:
        shop.post("/shop/control/tasks", name=name, group=f"g {name}"[:190])
    page = visit()
    expect(page.locator(".row.task")).to_have_count(len(HOSTILE))
    text = page.text_content("#rows") or ""
    assert "<img src=x onerror" in text
    assert "\u202e" not in text
    assert page.locator("#rows img").count() == 0
    heights = {each.evaluate("row => row.offsetHeight") for each in page.locator("#rows .row").all()}
    assert heights == {28}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for each in page.locator(".row.task").all():
        each.click()
        expect(page.locator("#panel .path")).not_to_be_empty()
        page.keyboard.press("x")
        expect(page.locator("#cancel button[value=go]")).to_be_enabled()
        page.keyboard.press("Escape")
        page.keyboard.press("g")
        expect(page.locator("#timeline .bar")).to_have_count(1)
        page.keyboard.press("t")
    assert page.locator("img").count() == 0
    assert "owned" not in page.title()
    page.fill("#search", HOSTILE[0])
    expect(page.locator(".row.task")).to_have_count(1)


@pytest.mark.parametrize("text", [*HOSTILE[:4], "\x1b[2J\x1b[31mred\x07", "x" * 10_000])
def test_hostile_texts_are_only_text(shop: Site, visit: Visits, text: str) -> None:
    """Names of plain tasks, progress, reasons, metadata, and errors have no rules, and are as inert."""
    shop.post("/shop/control/texts", text=text)
    page = visit()
    row(page, "show").click()
    panel = page.locator("#panel")
    expect(panel).to_contain_text(f"{text[:8]}".replace("\x1b", "\ufffd").replace("\u202e", "\ufffd"))
    page.keyboard.press("x")
    page.locator("#cancel input").fill(text)
    page.locator("#cancel button[value=keep]").click()
    shop.post("/shop/control/end")
    expect(panel).to_contain_text("failed · ValueError")
    page.click("button[value=ended]")
    expect(row(page, "show").first).to_contain_text("ValueError")
    shown = page.text_content("body") or ""
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert len(shown) < 20_000
    assert page.locator("img").count() == 0
    assert "owned" not in page.title()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert {each.evaluate("row => row.offsetHeight") for each in page.locator("#rows .row").all()} == {28}


def test_viewer_whose_login_ends_is_told_so(shop: Site, visit: Visits) -> None:
    """Page, scripts, and stream use one login, whose name is in the cause; without it, the page says why."""
    shop.post("/shop/control/tasks", name="load")
    shop.post("/shop/control/tasks", name="sync_mail", kind="ignore")
    login = {"username": "ann", "password": "replace me"}
    page = visit("/shop/with-login/", http_credentials=login, complains=("status of 401",))
    row(page, "load").click()
    page.keyboard.press("x")
    page.locator("#cancel button[value=go]").click()
    page.locator("#cancel button[value=keep]").click()
    expect(page.locator("#panel .chain")).to_contain_text("ann")
    shop.post("/shop/control/log-out")
    expect(page.locator("#state")).to_contain_text("log in again", timeout=60_000)
    expect(page.locator("body")).to_have_class("stale")


# --- addresses -------------------------------------------------------------------------------------------


def test_page_works_below_a_prefix_and_without_its_slash(shop: Site, visit: Visits) -> None:
    """The application is mounted below a prefix, and the link lacks the last slash."""
    shop.post("/shop/control/tasks", name="load")
    page = visit("/shop/tasks?q=load")
    assert page.url.startswith(f"{shop.url}/shop/tasks/")
    expect(page.locator(".row.task")).to_have_count(1)


SERVER = """
    server {{
        listen 127.0.0.1:{port};
        location /inner/ {{
            proxy_pass {upstream}/shop/;
            proxy_http_version 1.1;
        }}
    }}
"""


@contextmanager
def nginx(directory: Path, upstream: str) -> Iterator[str]:
    """A proxy in front of the shop that changes the path; its address."""
    port = free_port()
    command = nginx_command(directory, SERVER.format(port=port, upstream=upstream))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
            client.get(f"http://127.0.0.1:{port}/")
        yield f"http://127.0.0.1:{port}/inner"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_page_works_behind_a_proxy_that_changes_its_path(shop: Site, visit: Visits, tmp_path: Path) -> None:
    """nginx as it comes passes the stream on without holding it back, and the page cancels through it."""
    shop.post("/shop/control/tasks", name="load")
    with nginx(tmp_path, shop.url) as url:
        page = visit(f"{url}/tasks")
        expect(row(page, "load")).to_be_visible()
        shop.post("/shop/control/tasks", name="later")
        expect(row(page, "later")).to_be_visible()
        row(page, "load").click()
        page.keyboard.press("x")
        page.locator("#cancel button[value=go]").click()
        expect(page.locator("#cancel .answer")).to_contain_text("has ended")
        page.close()


def test_page_works_below_a_root_path(visit: Visits, tmp_path: Path) -> None:
    """The proxy takes the prefix away, and the server knows of it."""
    site = Site("tests.e2e.page_app:outer", tmp_path)
    site.start("--root-path", "/inner")
    try:
        site.post("/shop/control/tasks", name="load")
        with nginx(tmp_path, site.url) as url:
            page = visit(f"{url}/tasks?q=load")
            assert page.url == f"{url}/tasks/?q=load"
            row(page, "load").click()
            expect(page.locator("#panel")).to_contain_text("Waiting at")
            page.close()
    finally:
        site.stop()


# --- colors ----------------------------------------------------------------------------------------------

CONTRAST = """
() => {
  const parse = (color) => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.createElement("i");
  document.body.append(probe);
  const color = (name) => {
    probe.style.color = `var(--${name})`;
    return light(parse(getComputedStyle(probe).color));
  };
  const found = {};
  for (const back of ["bg", "panel", "sel", "soft"]) {
    for (const name of ["text", "mute", "run", "wait", "cancel", "ok", "fail", "gone"]) {
      const [a, b] = [color(name), color(back)].sort((x, y) => y - x);
      found[`${name} on ${back}`] = (a + 0.05) / (b + 0.05);
    }
  }
  probe.remove();
  return found;
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_system_and_is_readable(shop: Site, visit: Visits, scheme: str) -> None:
    """Each color of a text has enough contrast on each background."""
    shop.post("/shop/control/tasks", name="load")
    page = visit(color_scheme=scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) > 128) == (scheme == "light")
    found: dict[str, float] = page.evaluate(CONTRAST)
    assert {pair: ratio for pair, ratio in found.items() if ratio < 4.5} == {}


def test_narrow_window_keeps_the_names(shop: Site, visit: Visits) -> None:
    """On a telephone, nothing is wider than the screen, and the panel opens below."""
    shop.post("/shop/control/tasks", name="load", group="imports", count=3)
    page = visit()
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(row(page, "load")).to_be_visible()
    shop.post("/shop/control/tasks", name="alone")
    row(page, "alone").click()
    expect(page.locator("#panel h2")).to_be_in_viewport()
    expect(page.locator("#panel .actions")).to_be_in_viewport()


def test_answer_of_another_process_is_not_taken_for_the_end_of_a_task(shop: Site, visit: Visits) -> None:
    """With several workers, a request about a task may reach a process that does not know it."""
    shop.post("/shop/control/tasks", name="alone")
    page = visit(complains=("Failed to load resource",))
    error = {"v": 1, "error": {"code": "not_found", "message": "no task has the id"}}
    headers = {"Otel-Tasks-Instance": "another"}
    page.route("**/v1/tasks/*", lambda route: route.fulfill(status=404, headers=headers, json=error))
    page.route("**/v1/events*task=*", lambda route: route.abort())
    row(page, "alone").click()
    expect(page.locator("#panel")).to_contain_text("Another process of the service answered")
    page.keyboard.press("x")
    expect(page.locator("#cancel .answer")).to_contain_text("Another process of the service answered")
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).not_to_contain_text("has ended")
    page.unroute("**/v1/events*task=*")
    expect(page.locator("#panel")).to_contain_text("Waiting at")
