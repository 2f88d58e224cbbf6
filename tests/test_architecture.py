"""docs/architecture.md: its picture is drawn from the imports, and everything it names exists."""

from __future__ import annotations

import ast
import builtins
import importlib
import keyword
import re
import xml.etree.ElementTree as ET
from functools import cache

from docs import architecture, imports
from tests.blocks import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
SVG = "{http://www.w3.org/2000/svg}"
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def names_of(file: str) -> frozenset[str]:
    """The names that a file defines: `create`, `TaskGroup`, `TaskGroup.cancel`, and `TaskGroup._event`."""
    tree = imports.modules().get(file.removesuffix(".py")) or ast.parse((ROOT / file).read_text("utf-8"))
    return frozenset(found_in(tree.body))


def found_in(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """The names that statements define, with the class they are in."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            found.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found |= found_in(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, Function):
            found |= {prefix + name for name in set_on_self(node)}
        elif isinstance(node, ast.If):
            found |= found_in([*node.body, *node.orelse], prefix)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {prefix + name for name in assigned(node)}
    return found


def assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    """The names that an assignment defines; those that `__slots__` lists, too."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    found = {target.id for target in targets if isinstance(target, ast.Name)}
    if "__slots__" in found and node.value is not None:
        found |= {
            c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)
        }
    return found


def set_on_self(function: Function) -> set[str]:
    """The attributes that a method sets."""
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def quoted(text: str) -> list[str]:
    """The words in backticks, without the parentheses of a call."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\(.*\)$", "", name) for name in re.findall(r"`([^`]+)`", prose)]


def files_in(text: str) -> list[str]:
    """The Python files in backticks that exist, in the package or in the repository."""
    names = [name for name in quoted(text) if name.endswith(".py")]
    return [name for name in names if name.removesuffix(".py") in imports.modules() or (ROOT / name).exists()]


def is_known(name: str, files: list[str]) -> bool:
    """Whether one of the files defines a name, at its top or in a class."""
    known = {defined for file in files for defined in names_of(file)}
    return name in files or name in known or any(defined.endswith(f".{name}") for defined in known)


def is_outside(name: str) -> bool:
    """Whether a name is a path of the repository, Python's own, or that of an imported library."""
    if (
        (ROOT / name).exists()
        or (imports.PACKAGE / name).exists()
        or all(keyword.iskeyword(word) for word in name.split())
    ):
        return True
    if hasattr(builtins, name):
        return True
    library, _, attribute = name.partition(".")
    if library not in {"asyncio", "contextvars", "anyio", "opentelemetry"}:
        return False
    thing: object = importlib.import_module(library)
    for part in attribute.split(".") if attribute else []:
        thing = getattr(thing, part)
    return True


ROWS = [line for line in PAGE.splitlines() if re.match(r"\| .*`\w[\w/]*\.py`", line)]


def test_picture_shows_every_module() -> None:
    """Each module has a box, and each arrow that no others imply is drawn."""
    root = ET.fromstring(architecture.architecture_picture())  # noqa: S314 - our own picture, made here
    texts = [element.text for element in root.iter(f"{SVG}text") if element.get("class") is None]
    names = {imports.whole(module) for module in imports.modules()}
    assert sorted(map(str, texts)) == sorted(map(architecture.title, names))
    ways = [element for element in root.iter(f"{SVG}path") if element.get("class") == "way"]
    assert len(ways) == sum(map(len, architecture.arrows().values()))


def test_picture_is_drawn_from_the_imports() -> None:
    """The picture beside the page is the one that `python -m docs.generate` draws."""
    drawn = (ROOT / "docs" / "images" / "architecture.svg").read_text("utf-8")
    assert drawn == architecture.architecture_picture(), "run: python -m docs.generate"
    assert "](images/architecture.svg)" in PAGE


def test_boxes_do_not_overlap() -> None:
    """The boxes of a row stand beside each other, within the card."""
    arrows: imports.Graph = {"a": {"e", "f"}, "b": set(), "c": set(), "d": {"e"}, "e": set(), "f": set()}
    placed, _ = architecture.layout([["a", "b", "c", "d"], ["e", "f"]], arrows)
    for row in placed:
        edges = [edge for node in row for edge in (node.x - node.width // 2, node.x + node.width // 2)]
        assert edges == sorted(edges)
        assert 0 <= edges[0] <= edges[-1] <= architecture.WIDTH


def test_arrows_that_others_imply_are_left_out() -> None:
    """An arrow is drawn only where no longer way leads to the same module."""
    assert imports.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}


def test_circles_are_found() -> None:
    """Modules that import each other, directly or through others, are one circle."""
    assert imports.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == [["a", "b", "c"]]


def test_every_name_of_the_page_exists() -> None:
    """Each word in backticks is a file, a name of the package, or a name of Python's own."""
    files = [f"{module}.py" for module in imports.modules()]
    assert [
        name for name in quoted(PAGE) if not is_known(name, files + files_in(PAGE)) and not is_outside(name)
    ] == []


def test_every_module_has_its_line() -> None:
    """The tables of owners list each module once."""
    section = PAGE.partition("## State and its owners")[2]
    listed = re.findall(r"^\| `([\w/]+)\.py` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(imports.modules())


def test_names_of_a_row_are_in_its_files() -> None:
    """What the last column of a row names is in the row's files; a line about an owner may name options."""
    elsewhere = [
        (name, files)
        for row in ROWS
        if (files := files_in(row))
        for name in quoted(row.rstrip("| ").rpartition(" | ")[2])
        if not is_known(name, files) and not is_outside(name)
        if row.count(" | ") > 1 or name[0].isupper()
    ]
    assert elsewhere == []
