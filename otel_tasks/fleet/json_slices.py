"""JSON in slices: encodes and decodes the answers of nodes, which may have thousands of rows.

Python's encoder and decoder are fast, and hold the event loop until they are done. So lists, and the objects
on the way to them, are handled here one element after another, and everything else is left to Python.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from otel_tasks._core.slices import COUNTS_PER_SLICE, Budget

if TYPE_CHECKING:
    from collections.abc import Generator

    Steps = Generator[None, None, tuple[Any, int]]

_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode
# The start of a list of objects or lists, and the number of characters in which an object on the way to one
# has it. An object in which it comes later is decoded in one step.
_finds_list = re.compile(r"\[[{\[]").search
_WITHIN: Final = 2000
# Lists within lists; what is deeper is decoded in one step.
_DEEPEST: Final = 100


def encoded(value: Any) -> Generator[None, None, str]:
    """Encode a value, in slices."""
    pieces: list[str] = []
    yield from _encoding(value, pieces, Budget(COUNTS_PER_SLICE))
    # Once: new memory for a megabyte takes longer than writing it.
    return "".join(pieces)


def decoded(text: str) -> Generator[None, None, Any]:
    """Decode a text, in slices; one with spaces between its parts, which no node sends, in one step.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    try:
        value, end = yield from _decoded(text, 0, Budget(COUNTS_PER_SLICE), 0)
    except (ValueError, IndexError):
        return json.loads(text)
    return value if end == len(text) else json.loads(text)


def _encoding(value: Any, pieces: list[str], budget: Budget) -> Generator[None, None, None]:
    if isinstance(value, list):
        pieces.append("[")
        for number, each in enumerate(value):
            if number:
                pieces.append(",")
            yield from _encoding(each, pieces, budget)
        pieces.append("]")
    elif _has_list(value):
        for number, (key, each) in enumerate(value.items()):
            pieces.append(f"{',' if number else '{'}{_encode(key)}:")
            yield from _encoding(each, pieces, budget)
        pieces.append("}")
    else:
        if budget.spend():
            yield
        pieces.append(_encode(value))


def _has_list(value: object) -> bool:
    return isinstance(value, dict) and any(
        isinstance(each, list) or _has_list(each) for each in value.values()
    )


def _decoded(text: str, at: int, budget: Budget, depth: int) -> Steps:
    if depth < _DEEPEST:
        if text.startswith(("[{", "[["), at):
            return (yield from _list(text, at + 1, budget, depth + 1))
        if text.startswith('{"', at) and _finds_list(text, at, at + _WITHIN):
            return (yield from _object(text, at + 1, budget, depth + 1))
    if budget.spend():
        yield
    return _decode(text, at)


def _list(text: str, at: int, budget: Budget, depth: int) -> Steps:
    found: list[Any] = []
    while True:
        value, at = yield from _decoded(text, at, budget, depth)
        found.append(value)
        if text[at] == "]":
            return found, at + 1
        _expect(",", text, at)
        at += 1


def _object(text: str, at: int, budget: Budget, depth: int) -> Steps:
    found: dict[str, Any] = {}
    while True:
        _expect('"', text, at)
        key, at = _decode(text, at)
        _expect(":", text, at)
        found[key], at = yield from _decoded(text, at + 1, budget, depth)
        if text[at] == "}":
            return found, at + 1
        _expect(",", text, at)
        at += 1


def _expect(char: str, text: str, at: int) -> None:
    if text[at] != char:
        raise ValueError(f"not {char!r} at {at}")
