"""A pytest plugin for the suites of other projects: reports the outcome of each test.

It runs inside the suite's own process. The environment tells it what to do:

- ``PEERS_PLUGIN``: the plugin that applies this library, whose ``uses()`` counts how often the suite uses it.
- ``PEERS_REPORT``: the file for the outcomes, by test id.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def pytest_configure(config: pytest.Config) -> None:
    """Report on the tests of this run."""
    uses = sys.modules[os.environ["PEERS_PLUGIN"]].uses
    config.pluginmanager.register(Outcomes(uses), "peers-outcomes")


class Outcomes:
    """Writes the outcome of each test, the reason, and how often it used this library.

    Args:
        uses: Returns the number of uses so far.
    """

    def __init__(self, uses: Callable[[], int]) -> None:
        self.uses = uses
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Drop the tests that run on trio: this library is for asyncio."""
        kept = [item for item in items if not _runs_on_trio(item)]
        config.hook.pytest_deselected(items=[item for item in items if _runs_on_trio(item)])
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note how often the test uses this library."""
        before = self.uses()
        try:
            return (yield)
        finally:
            self.tests.setdefault(item.nodeid, {})["uses"] = self.uses() - before

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a module that cannot be imported."""
        if report.failed:
            self.tests[report.nodeid] = {"outcome": "error", "reason": report.longreprtext[-4000:]}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the worst outcome of the test's three phases; a subtest counts for its test."""
        test = self.tests.setdefault(report.nodeid, {})
        outcome = _outcome(report)
        if outcome is not None and test.get("outcome") not in {"failed", "error"}:
            test["outcome"] = outcome
            if outcome in {"failed", "error"}:
                test["reason"] = report.longreprtext[-4000:]

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        if path := os.environ.get("PEERS_REPORT"):
            Path(path).write_text(json.dumps(self.tests, indent=1), "utf-8")


def _outcome(report: pytest.TestReport) -> str | None:
    if report.when == "call":
        return "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
    if report.failed:
        return "error"
    return "skipped" if report.skipped else None


def _runs_on_trio(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    return parameters is not None and "trio" in parameters.id.split("-")
