"""The live view of a fleet in a real browser: two replicas on a real Redis, one of which is killed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.e2e.test_fleet import Replica
from tests.redis_server import own_redis, redis_server

pytest.importorskip("playwright", reason="the browser tests need playwright")

from playwright.sync_api import expect

from .browser import browsing, watch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser, Page

    from tests.redis_server import Redis

__all__ = ["own_redis", "redis_server"]

pytestmark = [pytest.mark.e2e]

# Milliseconds: a node that was killed is gone 30 s after its last sign of life.
PATIENCE = 20_000
GONE = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this module."""
    with browsing() as browser:
        yield browser


def _opened(browser: Browser, url: str) -> Page:
    page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    expect(page.locator("#state")).to_contain_text("live", timeout=PATIENCE)
    return page


def _short(node: str) -> str:
    return "/".join(node.split("/")[:2])


def test_page_shows_filters_and_cancels_in_both_replicas(browser: Browser, redis_server: Redis) -> None:
    """One page shows both replicas and cancels a task of the other, which turns silent when it is killed."""
    expect.set_options(timeout=PATIENCE)
    with ExitStack() as stack:
        here, there = (Replica(redis_server.url, "page", name) for name in ("api-1", "api-2"))
        stack.callback(here.close)
        stack.callback(there.close)
        own, other = _short(here.node), _short(there.node)
        here.client.post("/jobs/import-1").raise_for_status()
        there.client.post("/jobs/import-2").raise_for_status()
        there.client.post("/jobs/import-3").raise_for_status()
        page = _opened(browser, f"{here.client.base_url}/tasks/")
        complaints = watch(page, ("503", "504"))
        rows = page.locator("#rows")

        # Both replicas, each with a row of its own.
        expect(rows.locator(".row.root .label", has_text=own)).to_be_visible()
        expect(rows.locator(".row.root .label", has_text=other)).to_be_visible()
        expect(page.locator("#host")).to_contain_text("2 nodes")
        expect(page.locator(".count b").first).to_contain_text("3")

        # The filter, by mouse and by key.
        page.locator("#nodes select").select_option(label=other)
        expect(rows.locator(".row.root")).to_have_count(1)
        expect(rows.locator(".row.root .label")).to_have_text(other)
        page.locator("#search").fill("import")
        expect(rows.locator(".row.task .label")).to_have_text(["import-2", "import-3"])
        expect(rows.locator(".row.task .node").first).to_have_text(other)
        page.locator("#search").press("Escape")
        page.keyboard.press("m")
        expect(rows.locator(".row.root")).to_have_count(2)

        # A task of the other replica is cancelled there.
        page.locator("#search").fill("import-2")
        rows.locator(".row.task", has_text="import-2").click()
        expect(page.locator("#panel")).to_contain_text(other)
        page.locator("#panel .danger").click()
        page.locator("#cancel input").fill("stuck")
        page.locator("#cancel [value=go]").click()
        expect(page.locator("#cancel .answer")).to_contain_text("was cancelled and has ended")
        page.locator("#cancel [value=keep]").click()
        assert there.status("import-2") == "cancelled"
        cause = there.client.get("/jobs/import-2").json()["cause"]
        assert (cause["message"], "a client at 127.0.0.1" in cause["asked_by"]) == ("stuck", True)
        page.keyboard.press("Escape")
        page.locator("#search").fill("")

        # The other replica is killed: silent, then gone.
        there.process.kill()
        silent = rows.locator(".row.root.silent")
        expect(silent.locator(".label")).to_have_text(other)
        expect(silent).to_contain_text("silent for")
        expect(page.locator("#host")).to_contain_text("1 silent")
        # Its timeline claims nothing.
        silent.click()
        page.keyboard.press("g")
        expect(page.locator("#timeline")).to_contain_text(f"what runs in {other} is not known")
        page.keyboard.press("g")
        expect(rows.locator(".row.root .label", has_text=other)).to_have_count(0, timeout=GONE)
        expect(page.locator("#host")).to_contain_text("1 node")
        assert here.status("import-1") == "running"
        assert not complaints.unexpected
