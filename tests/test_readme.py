from __future__ import annotations

import re

import pytest

from tests.blocks import ROOT, promised_output, python_blocks, run_block

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = python_blocks("README.md")

# Appended to a block that makes an `app`: asks it as a client would.
ASK_THE_APP = """
async def ask_the_app():
    import httpx

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in {paths!r}:
            response = await client.get(path)
            print(response.status_code, response.text)


import asyncio

asyncio.run(ask_the_app())
"""

# The same, for the block that starts exports and streams their progress.
WATCH_AN_EXPORT = """
async def watch_an_export():
    import httpx

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        print((await client.post("/exports/july")).status_code)
        for name in ("july", "july", "august"):
            response = await client.get(f"/exports/{name}/progress")
            print(response.status_code, response.text)


asyncio.run(watch_an_export())
"""


def block(words: str) -> str:
    """The one Python block that contains these words."""
    (found,) = [code for code in BLOCKS if words in code]
    return found


def test_the_blocks_are_found() -> None:
    """All eight Python blocks of the README are seen by this module."""
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_every_block_runs(code: str) -> None:
    """Each Python block runs by itself, without a warning and without a word on stderr."""
    run_block(code)


def test_the_fastapi_block_answers() -> None:
    """The middleware's example serves the request it shows."""
    printed = run_block(block("async def report") + ASK_THE_APP.format(paths=["/report/7"]))
    assert printed.strip() == '200 {"prices":"prices: 3 offers","stock":"stock: 3 offers"}'


def test_the_block_with_contrib_telemetry_answers() -> None:
    """The order of middleware that the README tells can be served."""
    printed = run_block(block("OpenTelemetryMiddleware)") + ASK_THE_APP.format(paths=["/openapi.json"]))
    assert printed.startswith("200 ")


def test_the_progress_block_streams_its_events() -> None:
    """A started export tells its progress until it has ended; who comes late gets the end, or a 404."""
    printed = run_block(block("progress_events") + WATCH_AN_EXPORT)
    assert printed.startswith("202\n200 event: progress\n")
    assert '"done": 20, "total": 20, "message": "writing"' in printed
    assert printed.count('event: ended\ndata: {"status": "completed"') == 2
    assert printed.endswith('404 {"detail":"Not Found"}\n')


def test_the_debugging_block_shows_its_tasks() -> None:
    """The debug endpoint answers with the tree."""
    printed = run_block(block("/debug/tasks") + ASK_THE_APP.format(paths=["/debug/tasks"]))
    assert printed.startswith('200 {"manager":"default","closed":false,')


def test_the_library_block_prints_what_its_comments_say() -> None:
    """What stands beside each print is what it prints."""
    code = block('TaskManager("crawler")')
    assert run_block(code).splitlines() == promised_output(code)


def test_the_limits_block_prints_in_the_order_it_tells() -> None:
    """Its last comment is what it prints."""
    code = block("put_task")
    assert ", ".join(run_block(code).splitlines()) == code.strip().rpartition("# ")[2]


def test_the_decorator_block_prints_the_tasks_name() -> None:
    """The decorated function runs as a task that is named after it."""
    assert re.fullmatch(r"resize\S* to 640\n", run_block(block("@managed_task")))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_to_files_lead_somewhere(target: str) -> None:
    """Every relative link and picture of the README is in the repository."""
    assert (ROOT / target).exists()
