"""The public interface under type checkers: correct uses get correct types, wrong ones are errors."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKERS = {
    "mypy": ["mypy", "--strict", "--config-file", "pyproject.toml"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.fixture(params=CHECKERS)
def checker(request: pytest.FixtureRequest) -> list[str]:
    """The command of one type checker; its tests are skipped where it is not installed."""
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return [sys.executable, "-m", *CHECKERS[name]]


def check(checker: list[str], *files: str) -> str:
    """The errors of a checker; empty if there are none."""
    done = subprocess.run(
        [*checker, *files], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_public_interface_has_the_types_it_promises(checker: list[str]) -> None:
    """Tasks, groups, snapshots and decorated functions, methods too, have exact types."""
    assert check(checker, "tests/typing/good_use.py") == ""


def test_wrong_uses_are_refused(checker: list[str]) -> None:
    """Each line that is marked as a mistake is one, in the checker's eyes."""
    assert check(checker, "tests/typing/wrong_use.py") == ""


def test_decorated_function_shows_its_parameters(checker: list[str], tmp_path: Path) -> None:
    """An editor shows the parameters and the result of a decorated function."""
    script = tmp_path / "reveal.py"
    script.write_text(
        "from otel_tasks import managed_task\n\n\n"
        "@managed_task\nasync def work(first: int, *, step: float) -> str:\n    return ''\n\n\n"
        "reveal_type(work)\n"
    )
    done = subprocess.run(
        [*checker, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    shown = done.stdout
    assert "ManagedFunction" in shown
    assert "first" in shown
    assert "step" in shown


def test_package_says_that_it_is_typed() -> None:
    """Checkers look into installed packages only where there is a py.typed."""
    assert (ROOT / "otel_tasks" / "py.typed").is_file()
