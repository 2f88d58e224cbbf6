"""The output: what the options say about it, and how answers and lines are printed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from otel_tasks_terminal.errors import usage
from otel_tasks_terminal.pen import Pen, pen_for
from otel_tasks_terminal.text import clean
from otel_tasks_terminal.views import node_name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from otel_tasks_terminal.model import Model


def is_json(options: argparse.Namespace) -> bool:
    """Whether the answer is printed as it came."""
    return getattr(options, "json", False)


def pen_of(options: argparse.Namespace) -> Pen:
    """The pen for standard output."""
    return pen_for(sys.stdout, ascii_only=getattr(options, "ascii", False))


def print_json(answer: dict[str, Any]) -> None:
    """Print an answer; characters that a terminal acts on are escaped."""
    print(json.dumps(answer, indent=2 if sys.stdout.isatty() else None))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines."""
    for line in lines:
        print(line)


def check_node_option(options: argparse.Namespace) -> None:
    """Refuse ``--node`` where nothing is chosen."""
    if is_json(options) and options.node:
        raise usage("--json prints the whole answer: choose nodes by the field node")


def check_nodes(model: Model) -> None:
    """Say which nodes there are, if none has the name that was given."""
    if model.only is None or model.shown_nodes():
        return
    if not model.nodes:
        raise usage("this view shows one process: --node chooses those of a fleet")
    names = ", ".join(map(node_name, model.nodes))
    print(f"no node is called {clean(model.only)!r}: the nodes are {names}", file=sys.stderr)
