from __future__ import annotations

import re
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.blocks import ROOT
from tests.installed import check_tag
from tests.test_project import PYPROJECT, text_of, tracked_files

if TYPE_CHECKING:
    from pathlib import Path

GITHUB = ROOT / ".github"
if not GITHUB.exists():
    pytest.skip("an sdist has no workflows", allow_module_level=True)

WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
REPOSITORY = PYPROJECT["project"]["urls"]["Source"]


def load(name: str) -> dict[str, Any]:
    """A workflow, parsed. YAML 1.1 reads the key `on` as true."""
    workflow: dict[Any, Any] = yaml.safe_load((GITHUB / "workflows" / f"{name}.yml").read_text("utf-8"))
    return {"on" if key is True else str(key): value for key, value in workflow.items()}


def commands(workflow: dict[str, Any]) -> list[str]:
    """The commands of a workflow's steps."""
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def make_targets() -> set[str]:
    """The targets that `make help` shows."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_make_targets_that_exist(path: Path) -> None:
    """Each `make` command of a workflow names a target of the Makefile."""
    called = {target for run in commands(load(path.stem)) for target in re.findall(r"\bmake ([a-z-]+)", run)}
    assert called
    assert called - make_targets() == set()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_has_least_permissions_and_ends(path: Path) -> None:
    """Only the jobs of a release may write, and each job has a time limit."""
    workflow = load(path.stem)
    granted = {"": workflow["permissions"]}
    granted |= {name: job.get("permissions", {}) for name, job in workflow["jobs"].items()}
    writing = {
        (name, scope)
        for name, scopes in granted.items()
        for scope, access in scopes.items()
        if access == "write"
    }
    assert writing == (
        {("publish", "id-token"), ("announce", "contents")} if path.stem == "release" else set()
    )
    assert [name for name, job in workflow["jobs"].items() if "timeout-minutes" not in job] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """A tag can be moved: each action has a commit, and beside it the version which that is."""
    uses = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use)] == []


def test_same_action_has_the_same_commit_everywhere() -> None:
    """No workflow is left behind when an action is updated."""
    uses = {use for path in WORKFLOWS for use in re.findall(r"uses: (.*)", path.read_text("utf-8"))}
    assert len(uses) == len({use.partition("@")[0] for use in uses})


def test_ci_runs_each_python_that_the_metadata_names() -> None:
    """A classifier for a version of Python is a promise that the CI keeps."""
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert set(named) <= set(load("ci")["jobs"]["test"]["strategy"]["matrix"]["python"])
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"


def test_release_publishes_only_checked_files() -> None:
    """One job builds and checks; the job that may publish takes its files and runs no code from here."""
    release = load("release")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    jobs = release["jobs"]
    assert commands({"jobs": {"build": jobs["build"]}}) == ['make dist TAG="$GITHUB_REF_NAME"']
    assert [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact",
        "pypa/gh-action-pypi-publish",
    ]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["environment"] == "release"


@pytest.mark.parametrize(
    ("tag", "heading", "complaint"),
    [
        ("v1.2.3", "[1.2.3] - 2030-01-31", None),
        ("v1.2.4", "[1.2.3] - 2030-01-31", "tag v1.2.3"),
        ("1.2.3", "[1.2.3] - 2030-01-31", "tag v1.2.3"),
        ("v1.2.3", "[Unreleased]", "no section"),
        ("v1.2.3", "[1.2.3]", "no section"),
    ],
)
def test_release_needs_its_version_and_a_dated_section(
    tmp_path: Path, tag: str, heading: str, complaint: str | None
) -> None:
    """A tag that is not the version's, or a version that the changelog does not describe, stops a release."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n")
    with pytest.raises(SystemExit, match=complaint) if complaint else nullcontext():
        check_tag(tag, tmp_path)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_form_is_complete(path: Path) -> None:
    """Each form has a name, a description, and questions with a label and an id of their own."""
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form["name"]
    assert form["description"]
    ids = [question["id"] for question in form["body"]]
    assert len(ids) == len(set(ids))
    for question in form["body"]:
        assert question["type"] in {"textarea", "input", "dropdown"}
        assert question["attributes"]["label"]
        assert isinstance(question["validations"]["required"], bool)


def test_dependabot_looks_where_there_is_something() -> None:
    """Each folder that it updates has a file of that kind."""
    files = {"pip": "pyproject.toml", "github-actions": ".github/workflows/ci.yml", "docker": "Dockerfile"}
    files["docker-compose"] = "docker-compose.yml"
    updates = yaml.safe_load((GITHUB / "dependabot.yml").read_text("utf-8"))["updates"]
    assert {update["package-ecosystem"] for update in updates} == set(files)
    for update in updates:
        assert (ROOT / update["directory"].lstrip("/") / files[update["package-ecosystem"]]).is_file()


def test_project_has_one_address() -> None:
    """Every link to the project leads to the repository that the metadata names."""
    owner_and_name = re.compile(r"https://github\.com/([\w-]*otel[-_]tasks[\w-]*/[\w-]+)")
    named = {
        address
        for path in tracked_files()
        if path.suffix in {".md", ".toml", ".yml", ".txt", ".py"}
        for address in owner_and_name.findall(text_of(path))
    }
    assert named == {REPOSITORY.removeprefix("https://github.com/")}
    assert all(url.startswith(REPOSITORY) for url in PYPROJECT["project"]["urls"].values())
