from __future__ import annotations

import re

import pytest

from tests.blocks import ROOT, promised_output, python_blocks, run_block

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = python_blocks("README.md")

# Appended to the block that makes an `app`: a client that stays, and one that hangs up.
CLIENTS = """
from otel_tasks import global_task_manager
from otel_tasks.testing import FakeConnection, run


async def clients():
    patient = FakeConnection(path="/offers/Lisbon")
    await patient.run(app)
    print(patient.status, patient.body.decode())

    hasty = FakeConnection(path="/offers/Oslo")
    serving = asyncio.create_task(hasty.run(app))
    await asyncio.sleep(0.1)
    hasty.disconnect()
    await serving
    causes = [info.cause for info in global_task_manager.get_all_task_info().values()]
    print(hasty.status, [str(cause.kind) for cause in causes if cause])


run(clients())
"""


def block(words: str) -> str:
    """The one Python block that contains these words."""
    (found,) = [code for code in BLOCKS if words in code]
    return found


def test_the_blocks_are_found() -> None:
    """Both Python blocks of the README are seen by this module."""
    assert len(BLOCKS) == 2


def test_a_visitor_decides_in_one_screen() -> None:
    """The README has at most 800 words, code and tables included, and the first example comes at once."""
    assert len(README.split()) <= 800
    assert len(README.partition("```python")[0].split()) <= 60


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.strip().splitlines()[-1][:40])
def test_every_block_runs(code: str) -> None:
    """Each Python block runs by itself, without a warning and without a word on stderr."""
    run_block(code)


def test_the_fastapi_block_answers_and_stops() -> None:
    """The example serves a patient client; a client that hangs up stops the handler and both tasks."""
    patient, hasty = run_block(block("async def offers") + CLIENTS).splitlines()
    assert patient == '200 ["3 offers from trains","3 offers from hotels"]'
    assert hasty == "499 ['client_disconnect', 'client_disconnect']"


def test_the_library_block_prints_its_comments() -> None:
    """Each comment beside a print shows what it prints."""
    code = block("start_consumer")
    assert run_block(code).splitlines() == promised_output(code)


def test_the_line_that_stops_a_post_stands_beside_the_promise() -> None:
    """The row that says that a POST keeps running names what changes it."""
    (row,) = [line for line in README.splitlines() if "handlers of POST" in line]
    assert "**keep running**" in row
    assert "cancel_handler=True" in row
    assert "Depends(cancel_handler_on_disconnect)" in row


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_to_files_lead_somewhere(target: str) -> None:
    """Every relative link and picture of the README is in the repository, and so is the heading it names."""
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists()
    headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text("utf-8"), re.MULTILINE) if anchor else []
    assert not anchor or anchor in [
        re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings
    ]
