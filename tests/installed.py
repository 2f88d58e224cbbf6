"""Installs the wheel and the sdist into empty environments and uses them there: ``make dist``.

    python -m tests.installed dist               # both files of a folder
    python -m tests.installed dist --tag v0.1.0  # and check that the tag is that of this version

README and examples come from the unpacked sdist, in a folder without the package, so that only the installed
one can be imported.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The modules that need a test tool or the extra `instrument`, and the one that runs when it is imported.
NEVER = ("instrumentation", "pytest_plugin", "__main__")
# The adapters for frameworks and tools, which a bare `pip install otel-tasks` cannot import.
ADAPTERS = ("fastapi", "live", "redis_bus", "redis_channel", "redis_claims", "taskiq", "top")

# Its arguments are the modules to leave out.
IMPORT_ALL = """
import importlib, importlib.metadata, importlib.resources, pkgutil, sys
import otel_tasks, otel_tasks_terminal

LEFT_OUT = set(sys.argv[1:])
for package in (otel_tasks, otel_tasks_terminal):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not LEFT_OUT.intersection(module.name.split(".")):
            importlib.import_module(module.name)
for name in ("py.typed", "SKILL.md", "llms.txt", "live/assets/page.html"):
    assert importlib.resources.files(otel_tasks).joinpath(name).is_file(), name
assert otel_tasks.__version__ == importlib.metadata.version("otel-tasks")
print(otel_tasks.__version__)
"""

# Appended to a block that makes an `app`: asks each GET route for an answer.
ASK_EVERY_ROUTE = """
import re as _re
from otel_tasks.testing import FakeConnection as _FakeConnection, run as _run


async def _ask():
    for route in app.routes:
        if "GET" in (getattr(route, "methods", None) or ()):
            path = _re.sub(r"{[^}]*}", "1", route.path)
            connection = _FakeConnection(method="GET", path=path)
            await connection.run(app)
            assert connection.status < 500, (path, connection.status)


_run(_ask())
"""

# The README's other blocks and the demo need these beside the extra `all`, in the versions of the tests.
ALSO = ("rich", "opentelemetry-instrumentation-asgi")


def main() -> None:
    """Check the two distributions of a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tag", help="the tag of the release: v and the version")
    options = parser.parse_args()
    (wheel,) = options.folder.resolve().glob("*.whl")
    (sdist,) = options.folder.resolve().glob("*.tar.gz")
    with tempfile.TemporaryDirectory(prefix="otel-tasks-") as scratch:
        project = unpack(sdist, Path(scratch))
        if options.tag:
            check_tag(options.tag, project)
        with ThreadPoolExecutor() as pool:
            uses = [
                pool.submit(check, distribution, project, Path(scratch, f"venv-{distribution.name}"))
                for distribution in (wheel, sdist)
            ]
        for use in uses:
            print(use.result())


def unpack(sdist: Path, scratch: Path) -> Path:
    """Unpack the sdist and take the packages out of it."""
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
    (project,) = scratch.iterdir()
    for package in ("otel_tasks", "otel_tasks_terminal"):
        (project / package).rename(scratch / f"{package}-not-to-be-imported")
    return project


def check_tag(tag: str, project: Path) -> None:
    """A release has its version in pyproject.toml and its section, with a date, in the changelog."""
    version = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag is {tag}, and the version in pyproject.toml is {version}: tag v{version}")
    changelog = (project / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        sys.exit(f"CHANGELOG.md has no section '## [{version}] - YYYY-MM-DD'")


def check(distribution: Path, project: Path, environment: Path) -> str:
    """Install one file, import all of it, and run the README's examples and the demo."""
    python = make_environment(environment)
    install(python, str(distribution))
    run(python, "-m", "pip", "check")
    version = run(python, "-I", "-W", "error", "-c", IMPORT_ALL, *NEVER, *ADAPTERS).strip()
    run(python, "-I", "-W", "error", "-m", "otel_tasks_terminal", "--help")
    blocks = [*python_blocks(project / "README.md"), *python_blocks(skill_of(python))]
    plain = [block for block in blocks if not needs_extras(block)]
    for block in plain:
        run(python, "-W", "error", "-c", block, cwd=environment)

    pins = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    also = [pin for pin in pins["dev"] if isinstance(pin, str) and pin.partition("==")[0] in ALSO]
    install(python, f"otel-tasks[all] @ {distribution.as_uri()}", *pins["example"], *also)
    run(python, "-I", "-W", "error", "-c", IMPORT_ALL, *NEVER)
    for block in blocks:
        if block not in plain:
            asked = ASK_EVERY_ROUTE if "app = " in block else ""
            run(python, "-W", "error", "-c", block + asked, cwd=environment)
    run(python, "-I", "-W", "error", "-c", "import otel_tasks.live; otel_tasks.live.live_view(insecure=True)")
    demo = run(python, str(project / "examples" / "demo.py"), cwd=environment)
    assert "cancelled" in demo, demo
    return f"{distribution.name}: {version} imports alone; {len(blocks)} examples and the demo run"


def make_environment(folder: Path) -> str:
    """Make a virtual environment, and give its interpreter."""
    run(sys.executable, "-m", "venv", str(folder))
    (python,) = [path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists()]
    return str(python)


def install(python: str, *requirements: str) -> None:
    """Install into that interpreter's environment."""
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *requirements)


def skill_of(python: str) -> Path:
    """The page for coding assistants, as installed."""
    return Path(
        run(python, "-I", "-c", "import otel_tasks; print(otel_tasks.__path__[0])").strip(), "SKILL.md"
    )


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a Markdown file."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def needs_extras(block: str) -> bool:
    """Whether a block imports a framework, an SDK or a test tool."""
    return (
        re.search(r"^\s*(from|import) (fastapi|pytest|opentelemetry|otel_tasks\.fastapi)", block, re.M)
        is not None
    )


def run(python: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run it without the caller's OpenTelemetry settings and Python path; if it fails, show its output."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OTEL_") and name != "PYTHONPATH"
    }
    done = subprocess.run(
        [python, *arguments], env=kept, capture_output=True, text=True, timeout=600, check=False, cwd=cwd
    )
    if done.returncode:
        sys.exit(f"{arguments} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
