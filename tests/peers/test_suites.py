from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.nightly import backends
from tests.peers.suites import SUITES, Suite

if TYPE_CHECKING:
    from collections.abc import Generator

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "peers"

RUN_TIMEOUT = 900.0
"""Seconds that one run of one suite may take."""

AGAIN = 3
"""How often a test with another outcome than in the bare run is repeated: a flaky test is no difference."""

OPTIONS = [
    *("-p", "no:otel_tasks", "-p", "no:cacheprovider"),
    *("-q", "--tb=short", "--continue-on-collection-errors"),
    # Of a suite's own settings, only its filters of warnings, its markers, and its modes stay.
    *("-o", "addopts=", "-o", "log_cli=false"),
    # pytest-asyncio is there for one suite, and warns in the others.
    *("-o", "asyncio_default_fixture_loop_scope=function"),
]

DOWNLOAD = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(CACHE)]

Outcomes = dict[str, dict[str, Any]]


URL = "https://github.com/{repository}/archive/{commit}.tar.gz"


@pytest.mark.parametrize(
    ("suite", "place"),
    [(suite, place) for suite in SUITES for place in suite.through],
    ids=[f"{suite.package}-{place}" for suite in SUITES for place in suite.through],
)
def test_suite_passes_with_this_library(suite: Suite, place: str) -> None:
    """Each test of the project ends as it does without this library, but for the intended differences."""
    bare, wrapped = outcomes(suite, "bare"), outcomes(suite, place)
    different = {test for test in bare.keys() | wrapped.keys() if ending(bare, test) != ending(wrapped, test)}
    intended = suite.differences.get(place, {})
    unintended = confirmed(suite, place, bare, different - intended.keys())
    using = sum(test.get("uses", 0) > 0 for test in wrapped.values())
    passed = sum(test.get("outcome") == "passed" for test in wrapped.values())

    print(
        f"{name_and_version(suite.package)} {place}: {len(wrapped)} tests, {passed} passed, "
        f"{using} with this library, {len(different & intended.keys())} intended differences, "
        f"{len(different - intended.keys())} others, {len(unintended)} of them confirmed"
    )
    assert using >= suite.through[place]
    assert unintended == {}
    assert intended.keys() - different == set(), "no longer different"


def confirmed(suite: Suite, place: str, bare: Outcomes, tests: set[str]) -> dict[str, str]:
    """Those that end as in no bare run once more when they run alone: how, by test id."""
    found: dict[str, str] = {}
    bare_endings = {test: {ending(bare, test)} for test in tests}
    for number in range(AGAIN if tests else 0):
        bare_again = run(suite, "bare", f"bare-again-{number}", sorted(tests))
        again = run(suite, place, f"{place}-again-{number}", sorted(tests))
        for test in tests:
            bare_endings[test].add(ending(bare_again, test))
            if ending(again, test) not in bare_endings[test]:
                reason = again.get(test, {}).get("reason", "")
                found[test] = f"{ending(bare, test)} -> {ending(again, test)}\n{reason}"
    return found


def ending(tests: Outcomes, test: str) -> str:
    """The outcome of the test; "absent" when it has not run."""
    return str(tests.get(test, {}).get("outcome", "absent"))


@functools.cache
def outcomes(suite: Suite, place: str) -> Outcomes:
    """Run the whole suite once per place."""
    return run(suite, place, place, list(suite.tests))


def run(suite: Suite, place: str, name: str, tests: list[str]) -> Outcomes:
    """Run tests of the suite in a process of its own; the outcome by test id."""
    folder = unpacked(suite)
    report = CACHE / f"{folder.name}.{name}.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", suite.plugin, "-p", "outcomes", *OPTIONS]
    # A suite without settings would be part of this project, and its tests not be found by their names.
    command.append(f"--rootdir={folder}")
    command += [f"--deselect={test}" for test in suite.left_out]
    command += ["-k", suite.keyword] if suite.keyword else []
    with contextlib.ExitStack() as stack:
        servers = {
            variable: stack.enter_context(running(server)) for variable, server in suite.servers.items()
        }
        result = subprocess.run(
            [*command, *tests],
            cwd=folder,
            env=environment(suite.plugin, place, report) | servers,
            capture_output=True,
            text=True,
            timeout=RUN_TIMEOUT,
            check=False,
        )
    assert report.exists(), result.stdout[-4000:] + result.stderr[-4000:]
    found: Outcomes = json.loads(report.read_text("utf-8"))
    return found


@contextlib.contextmanager
def running(server: str) -> Generator[str]:
    """Run a server with its data in a temporary folder; its address."""
    with (
        tempfile.TemporaryDirectory() as folder,
        getattr(backends, server)(Path(folder)) as address,
    ):
        yield address


def environment(plugin: str, place: str, report: Path) -> dict[str, str]:
    """The plugins' instructions; neither this run's options nor spans that lead elsewhere."""
    kept = {
        name: value for name, value in os.environ.items() if not re.match("OTEL_|PYTEST_|PYTHONPATH", name)
    }
    instructions = {"PEERS_PLUGIN": plugin, "PEERS_PLACE": place, "PEERS_REPORT": str(report)}
    return kept | {"PYTHONPATH": str(HERE)} | instructions


@functools.cache
def unpacked(suite: Suite) -> Path:
    """The folder of the suite, which is fetched on first use."""
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = from_repository(suite) if suite.commit else source_distribution(suite.package)
    folder = CACHE / archive.name.removesuffix(".tar.gz")
    if not folder.is_dir():
        with tarfile.open(archive) as content:
            # Without the package that a repository has beside its tests: the installed one is tested.
            wanted = re.compile("[^/]+/(tests/|pyproject.toml$)" if suite.commit else "")
            members = [member for member in content if wanted.match(member.name)]
            content.extractall(CACHE, members, filter="data")
    return folder


def from_repository(suite: Suite) -> Path:
    """The archive of a commit, from GitHub; skips the test where that cannot be reached."""
    archive = CACHE / f"{suite.package}-{suite.commit}.tar.gz"
    if not archive.exists():
        url = URL.format(repository=suite.repository, commit=suite.commit)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - it is https
                archive.write_bytes(answer.read())
        except OSError as error:
            pytest.skip(f"the tests of {suite.package} cannot be fetched from {url}: {error}")
    return archive


def source_distribution(package: str) -> Path:
    """The archive of the package's source distribution, from pip."""
    stem = name_and_version(package).replace("==", "-").lower()
    if not (archive := find_archive(stem)):
        command = [sys.executable, *DOWNLOAD, name_and_version(package)]
        subprocess.run(command, check=True, timeout=300)
        archive = find_archive(stem)
    assert archive is not None, f"pip has fetched no {stem}.tar.gz"
    return archive


def find_archive(stem: str) -> Path | None:
    """The archive of the source distribution, with underscores or hyphens in its name."""
    wanted = re.sub("[-_.]", "-", stem)
    found = (
        path for path in CACHE.glob("*.tar.gz") if re.sub("[-_.]", "-", path.name[:-7].lower()) == wanted
    )
    return next(found, None)


def name_and_version(package: str) -> str:
    """As pip takes it."""
    return f"{package}=={importlib.metadata.version(package)}"
