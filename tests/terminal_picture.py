"""Takes the pictures of `otel-tasks top` for the docs, from the live example.

python -m tests.terminal_picture    # writes docs/images/live-top.svg and live-top-timeline.svg, in a minute
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import urllib.request

from otel_tasks_terminal.client import Address, Client
from otel_tasks_terminal.top.app import Top
from tests.blocks import ROOT
from tests.processes import free_port

IMAGES = ROOT / "docs" / "images"
# Seconds until a task has been cancelling long enough for a warning, and the counters have a history.
LOAD = 45.0
SIZE = (140, 36)


async def take(url: str) -> dict[str, str]:
    """Look around for a while, open the task that does not stop, then its timeline; return the pictures."""
    app = Top(Client(Address.parse(url)))
    async with app.run_test(size=SIZE) as pilot:
        end = time.monotonic() + LOAD
        while time.monotonic() < end:
            await pilot.pause(0.5)
        await pilot.press("n", "l")
        await pilot.pause(3.0)
        panel = app.export_screenshot(title="otel-tasks top")
        # The timeline of its group, which has the tasks of several requests.
        await pilot.press("escape", "home", "j", "g")
        await pilot.pause(3.0)
        timeline = app.export_screenshot(title="otel-tasks top: timeline")
        app.exit(0)
    return {"live-top.svg": without_fonts(panel), "live-top-timeline.svg": without_fonts(timeline)}


def without_fonts(picture: str) -> str:
    """The picture with the reader's own fonts: the docs load nothing from other hosts."""
    fonts = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
    picture = re.sub(r"\s*@font-face \{.*?\n\s*\}", "", picture, flags=re.DOTALL)
    # The name of a terminal differs in each picture.
    picture = re.sub(r"terminal-\d+", "terminal", picture)
    return re.sub(r"font-family: Fira Code, monospace", f"font-family: {fonts}", picture)


def main() -> None:
    """Serve the example, take the pictures, and end the example."""
    port = free_port()
    command = [sys.executable, "-m", "examples.live", "--port", str(port)]
    example = subprocess.Popen(command, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}/tasks"
        for _ in range(300):
            time.sleep(0.2)
            try:
                with urllib.request.urlopen(f"{url}/v1/snapshot", timeout=5):  # noqa: S310  # an address of this machine
                    break
            except OSError:
                continue
        for name, picture in asyncio.run(take(url)).items():
            (IMAGES / name).write_text(picture, "utf-8")
    finally:
        example.terminate()
        example.wait(30)


if __name__ == "__main__":
    main()
