"""The output: what the options say about it, and how answers and lines are printed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from otel_tasks_terminal.pen import Pen, pen_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


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
