from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import otel_tasks

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

LOCK_FILES = re.compile(
    r"(uv|poetry|pdm|Pipfile|package-lock|pylock.*)\.(lock|json|toml)|requirements.*\.txt"
)

# Put together from halves: this file is searched as well.
REGISTRIES = re.compile(
    "|".join([r"files\.python" + "hosted", r"pypi\." + "org", r"registry\." + "npmjs", "index" + "-url"])
)


def test_version_is_the_one_of_the_metadata() -> None:
    """The package, its metadata and pyproject.toml give the same version."""
    assert (
        otel_tasks.__version__ == importlib.metadata.version("otel-tasks") == PYPROJECT["project"]["version"]
    )


def test_changelog_speaks_of_the_version() -> None:
    """The changelog has a section for this version, or one for what is unreleased."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)

    assert headings
    assert headings[0] in {"Unreleased", otel_tasks.__version__}


def test_only_dependency_is_the_opentelemetry_api() -> None:
    """Installing the package without extras installs opentelemetry-api and nothing else."""
    assert [re.split(r"[<>=]", name)[0] for name in PYPROJECT["project"]["dependencies"]] == [
        "opentelemetry-api"
    ]


def test_tools_are_pinned_by_exact_version() -> None:
    """Every tool in a dependency group has an exact version."""
    requirements = [
        r for group in PYPROJECT["dependency-groups"].values() for r in group if isinstance(r, str)
    ]

    assert requirements
    pinned = re.compile(r"[\w.\[\]-]+==[\w.]+( ; .+)?")
    assert [r for r in requirements if not pinned.fullmatch(r)] == []


def test_every_module_is_in_the_contracts() -> None:
    """The import rules of each folder are exhaustive, so that a new module cannot slip past them."""
    layers = [c for c in PYPROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    packages = ("otel_tasks", "otel_tasks_terminal")
    folders = {path.parent for package in packages for path in (ROOT / package).rglob("*.py")}

    assert {c["containers"][0] for c in layers if c["exhaustive"]} == {
        ".".join(folder.relative_to(ROOT).parts) for folder in folders
    }


def test_no_lock_file_is_tracked() -> None:
    """The tools are pinned in pyproject.toml, without a lock file."""
    assert [path for path in tracked_files() if LOCK_FILES.fullmatch(path.name)] == []


def test_no_registry_is_named() -> None:
    """No tracked file names the host of a package registry: where packages come from is the user's choice."""
    assert [str(path) for path in tracked_files() if REGISTRIES.search(text_of(path))] == []


def test_every_suppression_has_its_code_and_reason() -> None:
    """A `type: ignore` or `noqa` names what it suppresses, and says why on its line."""
    suppression = re.compile(r"#\s*(type: ignore|noqa|pyright: ignore)(?!\[[\w, -]+\]|: [A-Z]+\d+)")
    without_reason = re.compile(
        r"#\s*(?:type: ignore\[[\w, -]+\]|pyright: ignore\[\w+\]|noqa: [A-Z]+\d+(?:, ?[A-Z]+\d+)*)\s*$"
    )
    complaints = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked_files()
        if path.suffix == ".py" and path != Path(__file__)
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if suppression.search(line) or without_reason.search(line)
    ]

    assert complaints == []


def test_every_test_has_its_sentence() -> None:
    """Each test says in a docstring which behavior it is about."""
    silent = [
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(text_of(path)))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if not (ast.get_docstring(node) or "").rstrip().endswith(".")
    ]

    assert silent == []


@pytest.mark.parametrize("blocked", ["fastapi", "starlette", "opentelemetry.sdk", "pytest", "rich"])
def test_core_needs_only_the_opentelemetry_api(blocked: str) -> None:
    """Package and middleware import where neither a framework nor an SDK is installed."""
    run_python(f"""
        import importlib.abc, sys

        class Blocker(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == {blocked!r} or name.startswith({blocked!r} + "."):
                    raise ModuleNotFoundError("blocked: " + name)

        sys.meta_path.insert(0, Blocker())
        import otel_tasks, otel_tasks.asgi, otel_tasks.testing
        """)


def test_importing_the_package_brings_no_framework_and_no_sdk() -> None:
    """Importing the core loads nothing that it does not need itself."""
    run_python("""
        import sys
        import otel_tasks, otel_tasks.asgi

        unwanted = {"fastapi", "starlette", "anyio", "opentelemetry.sdk", "otel_tasks.testing"}
        assert not unwanted & sys.modules.keys()
        """)


def test_compose_file_pins_its_images_and_stays_local() -> None:
    """Every image has a version, and every port is published on the loopback address alone."""
    services = compose_file()["services"]

    images = {name: service["image"] for name, service in services.items() if "image" in service}
    assert set(images) == {"jaeger", "prometheus", "rabbitmq", "redis"}
    assert [image for image in images.values() if not re.search(r":v?\d+\.\d+\.\d+(-alpine)?$", image)] == []
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("dockerfile", ["examples/Dockerfile", "examples/worker/Dockerfile"])
def test_example_image_is_pinned(dockerfile: str) -> None:
    """Each stage starts from the same exact version of Python."""
    stages = set(re.findall(r"^FROM (\S+)", (ROOT / dockerfile).read_text("utf-8"), re.MULTILINE))
    (image,) = stages
    assert re.match(r"python:\d+\.\d+\.\d+-", image)


def test_plain_up_starts_jaeger_and_the_service_alone() -> None:
    """The profile `spm` adds Prometheus; each other one adds an example with the same name."""
    profiles = {name: service.get("profiles", []) for name, service in compose_file()["services"].items()}

    assert profiles == {
        "jaeger": [],
        "service": [],
        "gateway": ["services"],
        "pricing": ["services"],
        "suppliers": ["services"],
        "worker": ["worker"],
        "prometheus": ["spm"],
        "api-a": ["fleet"],
        "api-b": ["fleet"],
        "fleet-worker": ["fleet"],
        "redis": ["fleet"],
        "rabbitmq": ["fleet"],
    }


def test_files_mounted_by_compose_exist() -> None:
    """A volume's file is there: Docker would make a directory in its place, and say nothing."""
    volumes = [
        volume for service in compose_file()["services"].values() for volume in service.get("volumes", [])
    ]

    assert volumes
    assert [volume for volume in volumes if not (ROOT / volume.split(":")[0]).is_file()] == []


def test_jaeger_pipelines_use_defined_components() -> None:
    """Jaeger's configuration names no component, storage or Prometheus port that is not defined."""
    config = yaml.safe_load((ROOT / "examples/jaeger/config.yaml").read_text("utf-8"))
    defined = {
        name for kind in ("receivers", "processors", "exporters", "connectors") for name in config[kind]
    }
    used = {
        name
        for pipeline in config["service"]["pipelines"].values()
        for names in pipeline.values()
        for name in names
    }
    storage = config["extensions"]["jaeger_storage"]
    query = config["extensions"]["jaeger_query"]["storage"]
    prometheus = yaml.safe_load((ROOT / "examples/jaeger/prometheus.yml").read_text("utf-8"))

    assert used == defined
    assert set(config["service"]["extensions"]) == set(config["extensions"])
    assert query["traces"] == config["exporters"]["jaeger_storage_exporter"]["trace_storage"]
    assert query["traces"] in storage["backends"]
    assert query["metrics"] in storage["metric_backends"]
    port = config["exporters"]["prometheus"]["endpoint"].rpartition(":")[2]
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == [f"jaeger:{port}"]


def test_jaeger_links_traces_to_the_live_view() -> None:
    """Jaeger's configuration names the mounted file, whose links have only parameters that a trace has."""
    config = yaml.safe_load((ROOT / "examples/jaeger/config.yaml").read_text("utf-8"))
    links = json.loads((ROOT / "examples/jaeger/ui-config.json").read_text("utf-8"))["linkPatterns"]

    mounted = config["extensions"]["jaeger_query"]["ui"]["config_file"]
    assert f"./examples/jaeger/ui-config.json:{mounted}:ro" in compose_file()["services"]["jaeger"]["volumes"]
    service = compose_file()["services"]["service"]
    # Without a password, the live view would answer only clients inside of the container.
    assert service["environment"]["LIVE_VIEW_PASSWORD"]
    assert all(link["url"].startswith("http://localhost:8000/tasks/?q=") for link in links)
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    # The UI shows no link that has a parameter it does not know (computeTraceLink in jaeger-ui).
    known = {"traceID", "traceName", "duration", "startTime", "endTime"}
    for link in links:
        assert link["type"] == "traces"
        assert set(re.findall(r"#\{([^}]*)\}", link["url"])) == {"traceID"}
        assert set(re.findall(r"#\{([^}]*)\}", link["text"])) <= known


@pytest.mark.parametrize(
    "profile",
    [[], ["--profile", "spm"], ["--profile", "services"], ["--profile", "worker"]],
    ids=["default", "spm", "services", "worker"],
)
def test_compose_accepts_the_file(profile: list[str]) -> None:
    """docker-compose reads the compose file, with each of the profiles and without."""
    command = compose_command()
    if command is None:
        pytest.skip("neither docker-compose nor the compose plugin of docker is installed")
    result = subprocess.run(
        [*command, *profile, "config", "--quiet"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr


def tracked_files() -> list[Path]:
    """The files in git, or in its next commit; skips the test outside of a checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or no git")
    # safe.directory: in a container the checkout often belongs to another user.
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
    paths = [ROOT / name for name in names.split("\0") if name]
    # A file deleted in the working tree is listed until the deletion is committed.
    return [path for path in paths if path.is_file()]


def text_of(path: Path) -> str:
    """The file's text; a file that is not text is searched anyway."""
    return path.read_text("utf-8", errors="replace")


def compose_file() -> dict[str, Any]:
    """The compose file, parsed."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
    return content


def compose_command() -> list[str] | None:
    """Debian's docker-compose, or the plugin of newer Docker installations."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if shutil.which("docker"):
        plugin = subprocess.run(
            ["docker", "compose", "version"], capture_output=True, timeout=60, check=False
        )
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return None


def run_python(code: str) -> None:
    """Run the code in an interpreter of its own, with warnings as errors."""
    lines = [line.removeprefix(" " * 8) for line in code.splitlines()]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 0, result.stderr
