"""The imports between the modules of the package, read from the source.

``docs.architecture`` draws them, and ``tests/test_structure.py`` checks them.
"""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "otel_tasks"

# A module by its path below the package, without the suffix: "_core/task". The package itself is "__init__".
# Where a module is a folder, its parts are modules too: "_core/telemetry/__init__", "_core/telemetry/spans".
Graph = dict[str, set[str]]


def graph(*, type_only: bool = False) -> Graph:
    """The imports of each module, with or without those under ``TYPE_CHECKING``."""
    return {name: set(imported(name, type_only=type_only)) for name in modules()}


@cache
def modules() -> dict[str, ast.Module]:
    """The syntax tree of each module, without the empty ``__init__.py`` of the folders."""
    trees = {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text("utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    return {
        name: tree for name, tree in trees.items() if not name.endswith("/__init__") or len(tree.body) > 1
    }


@cache
def imported(name: str, *, type_only: bool) -> frozenset[str]:
    """The modules that one module imports, inside its functions too."""
    found: set[str] = set()
    for statement in imports(modules()[name], type_only=type_only):
        if isinstance(statement, ast.ImportFrom) and statement.module:
            base = statement.module
            # A name of a package may be a module of its own.
            found.update(module_of(f"{base}.{alias.name}") or module_of(base) for alias in statement.names)
        elif isinstance(statement, ast.Import):
            found.update(module_of(alias.name) for alias in statement.names)
    return frozenset(found - {"", name})


def imports(node: ast.AST, *, type_only: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING" and not type_only:
            for statement in child.orelse:
                yield from imports(statement, type_only=type_only)
        else:
            yield from imports(child, type_only=type_only)


def module_of(dotted: str) -> str:
    """The module that a dotted name means; empty for one that is not of the package."""
    package, _, path = dotted.partition(".")
    name = path.replace(".", "/")
    choices = (name, f"{name}/__init__") if name else ("__init__",)
    return next((each for each in choices if package == PACKAGE.name and each in modules()), "")


def reduced(imports: Graph) -> Graph:
    """The graph, which has no circles, without the arrows that others imply: a -> c beside a -> b -> c."""
    reach = {name: reachable(imports, name) for name in imports}
    return {
        name: targets - {implied for target in targets for implied in reach[target]}
        for name, targets in imports.items()
    }


def reachable(imports: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """The modules that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports[name]
    return found


def circles(imports: Graph) -> list[list[str]]:
    """The groups of modules that import each other, directly or through others."""
    reach = {name: reachable(imports, name) for name in imports}
    groups = {
        tuple(sorted(other for other in imports if other in reach[name] and name in reach[other]))
        for name in imports
    }
    return sorted(list(group) for group in groups if group)


def collapsed(imports: Graph) -> Graph:
    """The graph with each public folder, and each folder below `_core` and `_asgi`, as one module."""
    found: Graph = {whole(name): set() for name in imports}
    for name, targets in imports.items():
        found[whole(name)] |= {whole(target) for target in targets} - {whole(name)}
    return found


def whole(name: str) -> str:
    """The module that a module is a part of, or itself."""
    return "/".join(name.split("/")[: 2 if name.startswith("_") else 1])


def layers() -> list[list[str]]:
    """The modules from top to bottom, by the layers of the import contracts in pyproject.toml.

    A module that is a folder counts as one.
    """
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    contracts: list[dict[str, Any]] = config["tool"]["importlinter"]["contracts"]
    by_container = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers"}

    def rows(container: str, folder: str) -> Iterator[list[str]]:
        for layer in by_container[container]:
            names = layer.split(" | ")
            inner = f"{container}.{layer}"
            if inner in by_container and not folder and layer.startswith("_"):
                yield from rows(inner, f"{folder}{layer}/")
            else:
                yield [folder + name for name in names]

    return list(rows(PACKAGE.name, ""))
