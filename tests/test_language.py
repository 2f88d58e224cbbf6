from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests import language

if TYPE_CHECKING:
    from pathlib import Path

needs_git = pytest.mark.skipif(
    not (language.ROOT / ".git").exists() or shutil.which("git") is None,
    reason="not a git checkout, or no git",
)


@pytest.fixture(scope="module")
def found() -> dict[str, language.Found]:
    """The words in all files, which takes seconds to find."""
    return language.find_in_project()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("It waits for ever.", 1),
        ("one\nIt waits for\never.", 2),
        ("# It waits for\n# ever.", 1),
        ("    # It waits for\n    # ever.", 1),
        ("Whoever waits.", 1),
        ("Who waits is lifted.", 1),
        ("It ends. What waits is cancelled.", 1),
        ("the behaviours", 1),
    ],
)
def test_word_is_found_in_prose_and_comments(text: str, line: int) -> None:
    """A phrase is found in either case and over the end of a line, with its line."""
    ((number, _, instead),) = language.find(text)
    assert number == line
    assert instead


@pytest.mark.parametrize(
    "text",
    [
        "forever",
        "all the same kind",
        "a recommended amendment",
        "What happens then?",
        "What is it?",
        "Who is it?",
    ],
)
def test_plain_english_is_left_alone(text: str) -> None:
    """Words that only look similar, and questions, are no findings."""
    assert language.find(text) == []


@needs_git
def test_no_file_has_words_that_the_project_does_not_use(found: dict[str, language.Found]) -> None:
    """No file has more of these words than tests/language.toml allows for it: none, for most."""
    allowed = language.allowed()
    complaints = [
        f"{name}:{line}: {words!r}: {instead}"
        for name, hits in found.items()
        if len(hits) > allowed.get(name, 0)
        for line, words, instead in hits
    ]
    assert complaints == [], "rewrite them; for a file that has moved: python -m tests.language --write"


@needs_git
def test_list_of_files_is_not_stale(found: dict[str, language.Found]) -> None:
    """A file that is clean or gone is off the list."""
    stale = language.allowed().keys() - found.keys()
    assert stale == set(), "run: python -m tests.language --write"


def test_list_follows_files_but_never_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--write`` takes over a moved file and lower counts, and refuses a higher sum."""
    config = tmp_path / "language.toml"
    config.write_text('[words]\n\'x\' = "y"\n\n[left]\n"a.py" = 3\n"b.py" = 1\n')
    monkeypatch.setattr(language, "CONFIG", config)
    with pytest.raises(SystemExit, match="4 are allowed and 5 are there"):
        language.write({"a.py": 5})
    language.write({"moved/a.py": 3})
    assert language.allowed() == {"moved/a.py": 3}
    assert [instead for _, instead in language.rules()] == ["y"]
