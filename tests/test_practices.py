"""The practices in docs/practices.md: their code runs, and prints what stands beside it."""

from __future__ import annotations

import re

import pytest

from tests.blocks import ROOT, promised_output, python_blocks, run_block

PRACTICES = (ROOT / "docs" / "practices.md").read_text(encoding="utf-8")
BLOCKS = python_blocks("docs/practices.md")
SECTIONS = re.findall(r"^### ([^\n]*)\n(.*?)(?=^##|\Z)", PRACTICES, flags=re.MULTILINE | re.DOTALL)


def test_each_practice_is_shown_in_code() -> None:
    """Every section has one Python block that says what it prints, and there are three tiers."""
    assert len(SECTIONS) == len(BLOCKS) >= 14
    assert [title for title, text in SECTIONS if text.count("```python\n") != 1] == []
    assert [code for code in BLOCKS if not promised_output(code)] == []
    tiers = re.findall(r"^## (\w+)", PRACTICES, flags=re.MULTILINE)
    assert tiers == ["Must", "Should", "Nice"]


@pytest.mark.parametrize("code", BLOCKS, ids=[title.replace(" ", "-") for title, _ in SECTIONS])
def test_every_block_prints_its_comments(code: str) -> None:
    """Each block runs by itself, without a warning or a word on stderr, and prints its comments."""
    assert run_block(code).splitlines() == promised_output(code)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", PRACTICES))))
def test_links_to_files_lead_somewhere(target: str) -> None:
    """Every relative link is in the repository."""
    assert (ROOT / "docs" / target).exists()
