"""The Python blocks of the documentation, and how the tests run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


def python_blocks(path: str) -> list[str]:
    """The Python blocks of a Markdown file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def promised_output(code: str) -> list[str]:
    """What a block says beside each `print` that it prints."""
    return re.findall(r"print\(.*\) +# (.*)", code)


def run_block(code: str) -> str:
    """Run it in an interpreter of its own (a block may set the global tracer provider)."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout
