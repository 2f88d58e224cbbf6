"""Marks: what the ids and keys of other nodes of a fleet begin with in a view."""

from __future__ import annotations

import re
from hashlib import sha256

_MARKED = re.compile(r"([0-9a-f]{8})~(.+)", re.DOTALL)


def mark_of(node: str) -> str:
    """The mark of a node."""
    return sha256(node.encode()).hexdigest()[:8]


def marked(mark: str, name: str) -> str:
    """An id or a key of a node, as the view has it."""
    return f"{mark}~{name}"


def is_marked(name: str) -> bool:
    """True if this has the form of an id or a key of another node."""
    return _MARKED.fullmatch(name) is not None


def unmarked(name: str) -> tuple[str, str] | None:
    """The mark, and what its node calls it; None without a mark."""
    found = _MARKED.fullmatch(name)
    return None if found is None else (found[1], found[2])


def is_named(node: str, name: str) -> bool:
    """True if this is the name of a node, its host, or its host and process."""
    return node == name or node.startswith(f"{name}/")
