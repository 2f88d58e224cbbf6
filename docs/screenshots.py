"""Takes the pictures of the live view in docs/images/ from the running example.

    python -m docs.screenshots        # needs Debian's chromium; takes two minutes

Look at them before you commit them.
"""

from __future__ import annotations

import asyncio
import io
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from playwright.async_api import async_playwright

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
# Seconds until the sparklines and the warnings have something to show.
WARM_UP = 75.0
SIZE = {"width": 1440, "height": 780}
# Two pixels per point: the text stays sharp on a good screen.
SCALE = 2
COLORS = 96


async def main() -> None:
    """Run the example, look at it, and write the pictures."""
    example = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "examples.live", cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert example.stdout is not None
        line = (await example.stdout.readline()).decode()
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        async with async_playwright() as playwright:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            await take_all(browser, found[0])
            await browser.close()
    finally:
        example.terminate()
        await example.wait()


async def take_all(browser: Browser, url: str) -> None:
    """Open the page in both color schemes, wait, and take the pictures."""
    light, dark = [await open_page(browser, url, scheme) for scheme in ("light", "dark")]
    await asyncio.sleep(WARM_UP)
    await take(light, "live-light")
    stuck = '.row.task:has(.label:text-is("sync_mail")):has-text("cancelling")'
    await light.click(stuck)
    await light.wait_for_selector("#panel .chain")
    await light.mouse.move(700, 20)
    await take(light, "live-panel")
    await dark.click(stuck)
    await dark.wait_for_selector("#panel .chain")
    await dark.mouse.move(700, 20)
    await take(dark, "live-dark")
    await light.keyboard.press("Escape")
    await light.click('.row.class:has(.label:text-is("sync_mail"))')
    await light.keyboard.press("g")
    await light.wait_for_selector(".bar")
    await light.mouse.move(700, 20)
    await asyncio.sleep(1.0)
    await take(light, "live-timeline")


async def open_page(browser: Browser, url: str, scheme: str) -> Page:
    """Open the page in a profile of its own."""
    context = await browser.new_context(
        viewport=SIZE,  # type: ignore[arg-type]  # a plain dict is what Playwright takes
        color_scheme=scheme,  # type: ignore[arg-type]  # one of its literals
        device_scale_factor=SCALE,
    )
    page = await context.new_page()
    await page.goto(url)
    await page.wait_for_selector("#rows .row")
    return page


async def take(page: Page, name: str) -> None:
    """Write one picture, with few colors: as small as it can be without a visible difference."""
    image = Image.open(io.BytesIO(await page.screenshot()))
    small = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    target = IMAGES / f"{name}.png"
    small.save(target, optimize=True)
    print(f"{target.name}: {target.stat().st_size // 1024} KB")


if __name__ == "__main__":
    asyncio.run(main())
