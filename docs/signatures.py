"""Signatures and first lines of the public names, for ``docs/reference/api.md`` as a code host shows it.

They are read from the source, so that every Python version writes the same. The site shows docstrings in full
instead: see ``docs/hooks.py``.
"""

from __future__ import annotations

import ast
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
INDENT = "    "

Function = ast.FunctionDef | ast.AsyncFunctionDef
Variable = ast.Assign | ast.AnnAssign


def section(path: str) -> str:
    """The part of the page that is about one public name: a heading, and a stub of its definition."""
    module, _, name = path.rpartition(".")
    nodes, place = definition(module, name)
    code = re.sub(r"\n{3,}", "\n\n", stub(nodes, place)).rstrip()
    return f"### {name}\n\n```py\n{code}\n```\n"


@cache
def tree(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    path = ROOT.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))


def source(node: ast.expr | ast.stmt) -> str:
    """The code of a node, with this project's quotes."""
    code = ast.unparse(node)
    return code if '"' in code else code.replace("'", '"')


def definition(module: str, name: str) -> tuple[list[ast.stmt], str]:
    """The statements that define a name, its docstring or overloads included, and the module they are in."""
    found: list[ast.stmt] = []
    for body in bodies(tree(module)):
        for index, node in enumerate(body):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return definition(node.module, alias.name)
            elif isinstance(node, Function | ast.ClassDef) and node.name == name:
                found.append(node)
            elif isinstance(node, Variable) and name in targets(node):
                found += body[index : index + 2] if is_text(body[index + 1 : index + 2]) else [node]
    assert found, f"{module} defines no {name}"
    return found, module


def bodies(module: ast.Module) -> Iterator[list[ast.stmt]]:
    """The statements of a module, and those that only a type checker reads."""
    yield module.body
    yield from (node.body for node in module.body if isinstance(node, ast.If))


def targets(node: Variable) -> list[str]:
    """The names that an assignment defines."""
    places = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [place.id for place in places if isinstance(place, ast.Name)]


def stub(nodes: list[ast.stmt], module: str) -> str:
    """The code of a page for one definition."""
    first = nodes[0]
    if isinstance(first, ast.ClassDef):
        return "\n".join(class_stub(first, module))
    functions = shown_functions([node for node in nodes if isinstance(node, Function)])
    if functions:
        return "\n".join(line for function in functions for line in function_stub(function, module))
    assert isinstance(first, Variable)
    return "\n".join([variable_stub(first), *text_of(nodes[1:], "")])


def class_stub(node: ast.ClassDef, module: str) -> Iterator[str]:
    """A class with its fields, its constructor, its properties and methods."""
    bases = ", ".join(source(base) for base in node.bases if hidden_base(base, module) is None)
    yield f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    yield from text_of(node.body, INDENT)
    yield ""
    yield from members_stub(node, module)


def members_stub(node: ast.ClassDef, module: str, shown: tuple[str, ...] = ()) -> Iterator[str]:
    """The members of a class, and after them those of the bases that users cannot import."""
    members: dict[str, list[Function]] = {}
    for index, item in enumerate(node.body):
        if isinstance(item, Variable) and not targets(item)[0].startswith("_"):
            yield INDENT + variable_stub(item)
            yield from text_of(node.body[index + 1 : index + 2], INDENT)
        elif isinstance(item, Function) and is_public(item, node) and item.name not in shown:
            members.setdefault(item.name, []).append(item)
    for overloads in members.values():
        for function in shown_functions(overloads):
            yield ""
            yield from ((INDENT + line).rstrip() for line in function_stub(function, module))
    for base in node.bases:
        hidden = hidden_base(base, module)
        if hidden is not None:
            yield ""
            yield from members_stub(*hidden, (*shown, *members))


def hidden_base(base: ast.expr, module: str) -> tuple[ast.ClassDef, str] | None:
    """A base that is a part of its class in another file, and the module it is in; None for other bases."""
    if not isinstance(base, ast.Name) or base.id in names_in("otel_tasks"):
        return None
    imports = [node.module for node in tree(module).body if isinstance(node, ast.ImportFrom) and node.module]
    if not any(base.id in names_in(module, source) for source in imports if source.startswith("otel_tasks.")):
        return None
    (first, *_), place = definition(module, base.id)
    assert isinstance(first, ast.ClassDef)
    return first, place


def names_in(module: str, source: str | None = None) -> set[str]:
    """The names that a module imports, all of them or those from one other module."""
    return {
        alias.asname or alias.name
        for node in tree(module).body
        if isinstance(node, ast.ImportFrom) and source in (None, node.module)
        for alias in node.names
    }


def is_public(function: Function, owner: ast.ClassDef) -> bool:
    """Whether the page shows a method: not a setter, nor the constructor of what something else makes."""
    decorators = [source(decorator) for decorator in function.decorator_list]
    if any(decorator.endswith(".setter") for decorator in decorators):
        return False
    if function.name == "__init__":
        return "made by" not in (ast.get_docstring(owner) or "") and len(ast.unparse(function.args)) > len(
            "self"
        )
    return not function.name.startswith("_")


def shown_functions(functions: list[Function]) -> list[Function]:
    """The overloads of a function, without what implements them; the docstring is that of the last."""
    if len(functions) < 2:
        return functions
    *overloads, implementation = functions
    overloads[-1].body = implementation.body
    return overloads


def function_stub(function: Function, module: str) -> Iterator[str]:
    """A function's signature and the first line of its docstring."""
    decorators = [source(decorator) for decorator in function.decorator_list]
    if "property" in decorators:
        assert function.returns is not None
        yield f"{function.name}: {source(function.returns)}"
        yield from text_of(function.body, "")
        return
    yield from (f"@{name}" for name in decorators if name in ("classmethod", "staticmethod"))
    keyword = "async def" if is_async(function) else "def"
    parameters = list(shown_parameters(function.args, module))
    result = f" -> {source(function.returns)}" if function.returns is not None else ""
    line = f"{keyword} {function.name}({', '.join(parameters)}){result}:"
    text = text_of(function.body, INDENT)
    line = line if text else f"{line} ..."
    if len(line) <= WIDTH - 2 * len(INDENT):
        yield line
    else:
        yield f"{keyword} {function.name}("
        yield from wrapped(parameters)
        yield f"){result}:" + ("" if text else " ...")
    yield from text


def is_async(function: Function) -> bool:
    """Whether a call is awaited; some plain functions return a coroutine."""
    return isinstance(function, ast.AsyncFunctionDef)


def wrapped(parameters: list[str]) -> Iterator[str]:
    """Lay parameters out over several lines, none of them torn."""
    line = INDENT
    for parameter in parameters:
        piece = f"{parameter}, "
        if line.strip() and len(line + piece) > WIDTH:
            yield line.rstrip()
            line = INDENT
        line += piece
    yield line.rstrip()


def shown_parameters(arguments: ast.arguments, module: str) -> Iterator[str]:
    """Each parameter as it is written; options that are passed on are laid out."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for index, (argument, default) in enumerate(zip(plain, defaults, strict=True)):
        if index or argument.arg not in ("self", "cls"):
            yield shown(argument, default)
        if index + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg is not None:
        yield f"*{shown(arguments.vararg, None)}"
    elif arguments.kwonlyargs or is_unpacked(arguments.kwarg):
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield shown(argument, default)
    if arguments.kwarg is not None and is_unpacked(arguments.kwarg):
        names = {argument.arg for argument in (*plain, *arguments.kwonlyargs)}
        assert isinstance(arguments.kwarg.annotation, ast.Subscript)
        for field in fields(module, source(arguments.kwarg.annotation.slice)):
            if targets(field)[0] not in names:
                yield f"{source(field)} = ..."
    elif arguments.kwarg is not None:
        yield f"**{shown(arguments.kwarg, None)}"


def shown(argument: ast.arg, default: ast.expr | None) -> str:
    """One parameter."""
    annotation = "" if argument.annotation is None else f": {source(argument.annotation)}"
    return f"{argument.arg}{annotation}" + ("" if default is None else f" = {source(default)}")


def is_unpacked(argument: ast.arg | None) -> bool:
    """Whether it is `**options: Unpack[Options]`."""
    annotation = None if argument is None else argument.annotation
    return isinstance(annotation, ast.Subscript) and source(annotation.value) == "Unpack"


def fields(module: str, name: str) -> Iterator[ast.AnnAssign]:
    """The fields of a TypedDict, those of its bases first."""
    (node,), place = definition(module, name)
    assert isinstance(node, ast.ClassDef)
    for base in node.bases:
        if source(base) != "TypedDict":
            yield from fields(place, source(base))
    yield from (item for item in node.body if isinstance(item, ast.AnnAssign))


def variable_stub(node: Variable) -> str:
    """A field, a constant, or a member of an enumeration."""
    if isinstance(node, ast.AnnAssign) and node.value is None:
        return source(node)
    line = source(node)
    return line if len(line) <= WIDTH else f"{targets(node)[0]} = ..."


def is_text(nodes: list[ast.stmt]) -> bool:
    """Whether the first statement is a docstring."""
    first = nodes[0] if nodes else None
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def text_of(nodes: list[ast.stmt], indent: str) -> list[str]:
    """The first paragraph of the docstring with which the statements begin, if they do."""
    if not is_text(nodes):
        return []
    first = nodes[0]
    assert isinstance(first, ast.Expr)
    assert isinstance(first.value, ast.Constant)
    paragraph = textwrap.dedent(str(first.value.value)).strip().partition("\n\n")[0]
    words = " ".join(paragraph.split()).replace("``", "`")
    return textwrap.wrap(f'"""{words}"""', WIDTH, initial_indent=indent, subsequent_indent=indent)
