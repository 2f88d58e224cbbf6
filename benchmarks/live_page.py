"""The page of the live view: script and layout time per update; 10,000 live tasks, of which a tenth changes.

It needs chromium. Two classes of 1,000 tasks are opened, as many as a viewer may open; the other tasks are in
closed rows.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from playwright.sync_api import sync_playwright

from benchmarks.measure import Effort, Row, Spread, Table
from benchmarks.middleware import wait_for_port
from otel_tasks import ManagedTask, TaskManager, global_task_manager
from otel_tasks.fastapi import make_lifespan
from otel_tasks.live import live_view

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from playwright.sync_api import CDPSession, Page

PORT = 18_462
GROUPS, TASKS_PER_GROUP = 10, 1_000
# The part of the tasks that reports progress each second.
CHANGES = 0.1
# Updates.
COUNT = 15
METRICS = ("ScriptDuration", "LayoutDuration", "RecalcStyleDuration")


async def _rest(forever: asyncio.Event) -> None:
    await forever.wait()


async def _report(tasks: list[ManagedTask[None]], manager: TaskManager) -> None:
    count = int(len(tasks) * CHANGES / 10)
    for number in itertools.count():
        for task in tasks[number * count % len(tasks) :][:count]:
            task.progress.update(done=number % 100, total=100)
        await asyncio.sleep(0.1)


@asynccontextmanager
async def _work(app: FastAPI) -> AsyncIterator[None]:
    forever = asyncio.Event()
    manager = global_task_manager
    tasks = [
        manager.create_task(_rest(forever), name=f"work_{chr(97 + group)}", group=f"group {chr(97 + group)}")
        for _ in range(TASKS_PER_GROUP)
        for group in range(GROUPS)
    ]
    await manager.start_service("reports", lambda: _report(tasks, manager))
    yield


app = FastAPI(lifespan=make_lifespan(_work, grace=0.0))
app.include_router(live_view(insecure=True), prefix="/tasks")


def run(effort: Effort) -> list[Table]:
    """Measure closed rows, and 2,000 open ones."""
    chromium = shutil.which("chromium")
    if chromium is None:
        print("\nlive_page: needs chromium: not measured.")
        return []
    count = 3 if effort.quick else COUNT
    command = [sys.executable, "-m", "uvicorn", "benchmarks.live_page:app", "--port", str(PORT)]
    quiet = ["--no-access-log", "--log-level", "warning"]
    server = subprocess.Popen([*command, *quiet], cwd=Path(__file__).parents[1])
    title = "The page, per update: 10,000 tasks, of which a tenth changes"
    table = Table("live-page", title, "ms", "", count, high="quartiles")
    try:
        wait_for_port(PORT)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto(f"http://127.0.0.1:{PORT}/tasks/")
            page.wait_for_selector("#rows .row")
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable")
            table.rows += _per_update(page, session, "closed rows", count)
            for name in ("work_a", "work_b"):
                _open_all(page, name)
            table.rows += _per_update(page, session, "2,000 tasks shown", count)
            browser.close()
    finally:
        server.terminate()
        server.wait(30)
    return [table]


def _open_all(page: Page, name: str) -> None:
    """Open a class, and ask for more until 1,000 of its tasks are there."""
    row = page.locator(f'.row.class:has(.label:text-is("{name}"))')
    if not row.count():
        group = name.replace("work_", "group ")
        page.click(f'.row.group:has(.label:text-is("{group}"))')
    row.click()
    for shown in (200, 400):
        more = page.locator(".row.more", has_text=f"{TASKS_PER_GROUP - shown} more")
        more.wait_for(state="attached")
        more.scroll_into_view_if_needed()
        more.click()
    page.evaluate("document.getElementById('list').scrollTop = 0")
    page.wait_for_timeout(1500)


def _per_update(page: Page, session: CDPSession, what: str, count: int) -> list[Row]:
    """The milliseconds of script and of layout in some seconds, each with one update."""
    page.wait_for_timeout(1000)
    script: list[float] = []
    layout: list[float] = []
    before = _metrics(session)
    for _ in range(count):
        page.wait_for_timeout(1000)
        after = _metrics(session)
        used = {name: (after[name] - before[name]) * 1000 for name in METRICS}
        script.append(used["ScriptDuration"])
        layout.append(used["LayoutDuration"] + used["RecalcStyleDuration"])
        before = after
    return [
        Row(f"{what}: script", Spread.of(script)),
        Row(f"{what}: style and layout", Spread.of(layout)),
    ]


def _metrics(session: CDPSession) -> dict[str, float]:
    found = session.send("Performance.getMetrics")["metrics"]
    return {each["name"]: each["value"] for each in found}
