"""The standard library's own tests of asyncio.TaskGroup, with ours in its place."""

from __future__ import annotations

import asyncio
import importlib
import sys
import unittest
from typing import TYPE_CHECKING

import pytest

from otel_tasks import TaskGroup, global_task_manager

if TYPE_CHECKING:
    from types import ModuleType

try:
    suite: ModuleType = importlib.import_module("test.test_asyncio.test_taskgroups")
except ImportError:
    pytest.skip("this Python comes without its own test suite", allow_module_level=True)


# Before 3.13 the suite awaits a coroutine after a group has refused it; 3.13 closes it, as we do on all.
AWAITS_A_REFUSED_COROUTINE = {
    "test_taskgroup_finished",
    "test_taskgroup_no_create_task_after_failure",
    "test_taskgroup_not_entered",
    "test_taskgroup_without_parent_task",
}


class GroupWithPrivateName(TaskGroup):
    """One of the tests counts ``group._tasks``."""

    __slots__ = ()

    @property
    def _tasks(self) -> tuple[object, ...]:
        return self.tasks


def standard_tests() -> list[unittest.TestCase]:
    loader = unittest.TestLoader()
    cases: list[unittest.TestCase] = []
    for name, case in vars(suite).items():
        if isinstance(case, type) and issubclass(case, unittest.TestCase) and name.startswith("Test"):
            cases += [case(method) for method in loader.getTestCaseNames(case)]
    if sys.version_info < (3, 13):
        cases = [case for case in cases if method_name(case) not in AWAITS_A_REFUSED_COROUTINE]
    return cases


def method_name(case: unittest.TestCase) -> str:
    return case.id().rpartition(".")[2]


@pytest.mark.filterwarnings("default")  # the suite's own use of event loop policies warns on later Pythons
@pytest.mark.parametrize("case", standard_tests(), ids=method_name)
def test_standard_librarys_own_test_passes_with_our_group(
    case: unittest.TestCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TaskGroup is a drop-in for asyncio.TaskGroup, as CPython's tests judge it."""
    monkeypatch.setattr(asyncio, "TaskGroup", GroupWithPrivateName)
    monkeypatch.setattr(asyncio.taskgroups, "TaskGroup", GroupWithPrivateName)
    result = unittest.TestResult()
    case.run(result)
    problems = [text for _, text in [*result.errors, *result.failures]]
    assert not problems, problems[0]
    assert result.testsRun == 1
    assert global_task_manager.stats().live == 0


def test_the_suite_was_found() -> None:
    """A suite that moved would otherwise pass by having no tests."""
    assert len(standard_tests()) >= 20
