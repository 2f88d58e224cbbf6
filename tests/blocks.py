"""The Python blocks of the documentation, and how the tests run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


def python_blocks(path: str) -> list[str]:
    """The Python blocks of a Markdown file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def promised_output(code: str) -> list[str]:
    """The output that a block promises in comments beside each `print` and each `shutdown`, which logs."""
    return re.findall(r"(?:print|shutdown)\(.*\) +# (.*)", code)


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


def run_pytest(directory: Path, code: str, *options: str) -> str:
    """Run a test module in an empty directory, where the library is installed, and give the report."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    # As an installer would write it: an editable install may be older than pyproject.toml.
    metadata = directory / "otel_tasks-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: otel-tasks\nVersion: 0\n")
    lines = [f"{name} = {module}\n" for name, module in project["entry-points"]["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("[pytest11]\n" + "".join(lines))
    (directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (directory / "test_it.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *options],
        cwd=directory,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout
