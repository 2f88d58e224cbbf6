"""Measures of the package: how entangled its modules are, and how large they and their functions are.

    python -m tests.measures    # print what tests/test_structure.py bounds

An attribute with one leading underscore is private to the file that defines it: that assigns it on ``self``,
annotates it in a class, lists it in ``__slots__``, or defines it as a function.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from docs.imports import PACKAGE, circles, graph, modules

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_private(name: str) -> bool:
    """Whether a name has exactly one leading underscore."""
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def on_self(node: ast.Attribute) -> bool:
    """Whether an attribute is accessed on ``self`` or ``cls``."""
    return isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}


@cache
def defined(module: str) -> frozenset[str]:
    """The names that a module defines, attributes of its classes included."""
    found: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and on_self(node):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            found |= names
            if "__slots__" in names:
                found.update(
                    constant.value
                    for constant in ast.walk(node.value)
                    if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
                )
    return frozenset(found)


def foreign_attributes(module: str) -> Iterator[ast.Attribute]:
    """The uses of private attributes that the module itself does not define."""
    for node in ast.walk(modules()[module]):
        if (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and not on_self(node)
            and node.attr not in defined(module)
        ):
            yield node


def definers(name: str) -> set[str]:
    """The modules that define a name."""
    return {module for module in modules() if name in defined(module)}


def crossings() -> Counter[str]:
    """The uses of a private name of one folder in another, by module: attributes, and imported names."""
    found: Counter[str] = Counter()
    for module, tree in modules().items():
        names = [node.attr for node in foreign_attributes(module)]
        names += [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name)
            for alias in node.names
            if is_private(alias.name) and node.module != PACKAGE.name
        ]
        found[module] = sum(1 for name in names if is_from_elsewhere(name, module))
    return +found


def is_from_elsewhere(name: str, module: str) -> bool:
    """Whether other folders define a name and this one does not."""
    folders = {folder(other) for other in definers(name)}
    return bool(folders) and folder(module) not in folders


def folder(module: str) -> str:
    """The folder of a module; empty for the public ones."""
    return module.rpartition("/")[0]


def writes() -> Counter[tuple[str, str]]:
    """The writes to private attributes of other files, by the writing module and the name."""
    return Counter(
        (module, node.attr)
        for module in modules()
        for node in foreign_attributes(module)
        if isinstance(node.ctx, ast.Store | ast.Del) and definers(node.attr)
    )


def in_circles() -> set[str]:
    """The modules that import each other in a circle, counting imports under ``TYPE_CHECKING``."""
    return {name for circle in circles(graph(type_only=True)) for name in circle}


def lines_of_code() -> dict[str, int]:
    """The lines of each module without comments, docstrings, and empty lines."""
    return {module: len(set(code_lines(module))) for module in modules()}


def code_lines(module: str) -> Iterator[int]:
    """The numbers of the lines that have code."""
    text = PACKAGE.joinpath(f"{module}.py").read_text("utf-8")
    layout = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    prose = {
        line
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout and token.start[0] not in prose:
            yield from range(token.start[0], token.end[0] + 1)


def complexities() -> dict[str, int]:
    """The cyclomatic complexity of each function and method, by "module:name"."""
    return {
        f"{module}:{name}": complexity(function)
        for module, tree in modules().items()
        for name, function in functions(tree.body)
    }


def functions(body: Iterable[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """The functions and methods of a module. A nested function counts as a part of the outer one."""
    for node in body:
        if isinstance(node, Function):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If):
            yield from functions([*node.body, *node.orelse], prefix)


def complexity(function: Function) -> int:
    """The ways through a function: one, and one more for each branch."""
    return 1 + sum(map(branches, ast.walk(function)))


def branches(node: ast.AST) -> int:
    """The ways that a node adds."""
    match node:
        case ast.If() | ast.IfExp() | ast.ExceptHandler() | ast.Assert():
            return 1
        case ast.For() | ast.AsyncFor() | ast.While() | ast.Try():
            return (not isinstance(node, ast.Try)) + bool(node.orelse)
        case ast.BoolOp(values=values):
            return len(values) - 1
        case ast.comprehension(ifs=ifs):
            return 1 + len(ifs)
        case ast.match_case(pattern=pattern):
            return not (isinstance(pattern, ast.MatchAs) and pattern.pattern is None)
        case _:
            return 0


def main() -> None:
    """Print each measure."""
    by_size = Counter(lines_of_code())
    by_branches = Counter(complexities())
    print("private names of another folder:", dict(crossings()))
    print("writes to other files' attributes:")
    for (module, name), count in sorted(writes().items()):
        print(f"    {module}: {name} ({count})")
    print("in circles:", len(in_circles()), sorted(in_circles()))
    print("largest modules:", by_size.most_common(8))
    print("most branches:", by_branches.most_common(8))
    print(f"mean complexity: {by_branches.total() / len(by_branches):.2f}")


if __name__ == "__main__":
    main()
