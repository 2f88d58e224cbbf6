"""docs/testing.md: its blocks print what they say, and the one for pytest passes there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.blocks import ROOT, promised_output, python_blocks, run_block, run_pytest

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
BLOCKS = python_blocks("docs/testing.md")
SCRIPTS = [code for code in BLOCKS if promised_output(code)]


def test_each_section_is_shown_in_code() -> None:
    """Every section has a block; all but the one for pytest say what they print."""
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections if "```python\n" not in section] == []
    assert [code for code in BLOCKS if code not in SCRIPTS] == [BLOCKS[-1]]


@pytest.mark.parametrize("code", SCRIPTS, ids=range(len(SCRIPTS)))
def test_every_script_prints_its_comments(code: str) -> None:
    """Each block runs by itself, without a warning or a word on stderr."""
    assert run_block(code).splitlines() == promised_output(code)


def test_the_block_for_pytest_passes(tmp_path: Path) -> None:
    """With the plugin alone it is a test module that passes."""
    assert "1 passed" in run_pytest(tmp_path, BLOCKS[-1])
