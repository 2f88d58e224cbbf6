"""The words and phrases this project does not use, and the files that still have some.

    python -m tests.language            # list them
    python -m tests.language --write    # update the list of files in tests/language.toml

``tests/language.toml`` has both lists. The second only shrinks: ``--write`` lowers the counts, follows files
that have moved, and refuses to allow more than before.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "tests" / "language.toml"
# These quote the words.
EXEMPT = {"tests/language.toml", "tests/test_language.py"}
MARK = "[left]\n"
# Not the pictures and figures, which are generated.
SUFFIXES = {".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
NAMES = {"Makefile", "Dockerfile", "run"}

Found = list[tuple[int, str, str]]


def rules() -> list[tuple[re.Pattern[str], str]]:
    """Each expression, and what to write instead."""
    words: dict[str, str] = tomllib.loads(CONFIG.read_text("utf-8"))["words"]
    # A phrase may run over the end of a line, in a comment too.
    return [
        (re.compile(pattern.replace(" ", r"[\s#]+"), re.MULTILINE | re.IGNORECASE), instead)
        for pattern, instead in words.items()
    ]


def allowed() -> dict[str, int]:
    """How many each file may still have."""
    left: dict[str, int] = tomllib.loads(CONFIG.read_text("utf-8"))["left"]
    return left


def find(text: str) -> Found:
    """The lines with one of the words, what it is, and what to write instead."""
    hits = [
        (text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead)
        for pattern, instead in rules()
        for match in pattern.finditer(text)
    ]
    return sorted(hits)


def find_in_project() -> dict[str, Found]:
    """The same for every file of the project that has any."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    paths = {name: ROOT / name for name in names.split("\0") if name and name not in EXEMPT}
    found = {
        name: find(path.read_text("utf-8"))
        for name, path in paths.items()
        if path.is_file() and (path.suffix in SUFFIXES or path.name in NAMES)
    }
    return {name: hits for name, hits in sorted(found.items()) if hits}


def write(counts: dict[str, int]) -> None:
    """Replace the list of what is left, unless it would grow."""
    before, now = sum(allowed().values()), sum(counts.values())
    if now > before:
        sys.exit(f"{before} are allowed and {now} are there: rewrite the new ones (python -m tests.language)")
    head = CONFIG.read_text("utf-8").partition(MARK)[0]
    CONFIG.write_text(head + MARK + "".join(f'"{name}" = {n}\n' for name, n in counts.items()), "utf-8")
    print(f"{now} left in {len(counts)} files, {before} before")


if __name__ == "__main__":
    everything = find_in_project()
    if "--write" in sys.argv:
        write({name: len(hits) for name, hits in everything.items()})
    else:
        for name, hits in everything.items():
            for number, words, instead in hits:
                print(f"{name}:{number}: {words!r}: {instead}")
