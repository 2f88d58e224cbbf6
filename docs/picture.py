"""The state diagram as an SVG, drawn from the table in ``otel_tasks._core.state``.

``running`` and ``cancelling`` are long boxes with the ends between them, so that every way is a straight line
and no two cross. A status or a way that has no place here is an error, not a gap in the picture.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from otel_tasks import TaskStatus
from otel_tasks._core.state import TRANSITIONS


class Box(NamedTuple):
    """The place of a status."""

    x: int
    y: int
    width: int
    height: int = 44

    @property
    def middle(self) -> int:
        """The x in the middle."""
        return self.x + self.width // 2

    @property
    def bottom(self) -> int:
        """The y of the lower edge."""
        return self.y + self.height


BOXES = {
    TaskStatus.PENDING: Box(70, 168, 110),
    TaskStatus.RUNNING: Box(240, 30, 660),
    TaskStatus.CANCELLING: Box(240, 306, 660),
    TaskStatus.COMPLETED: Box(440, 168, 110),
    TaskStatus.FAILED: Box(590, 168, 110),
    TaskStatus.CANCELLED: Box(740, 168, 110),
}

# The picture has its own background: the page around it may be dark where the system is light, or vice versa.
STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de; }
    .box { fill: #f6f8fa; stroke: #57606a; stroke-width: 1.5; }
    .completed { stroke: #1a7f37; stroke-width: 3; }
    .failed { stroke: #cf222e; stroke-width: 3; }
    .cancelled { stroke: #9a6700; stroke-width: 3; }
    .way { fill: none; stroke: #57606a; stroke-width: 1.5; }
    .dot, .head { fill: #57606a; }
    text { font: 14px ui-sans-serif, system-ui, sans-serif; fill: #1f2328; }
    .status { font-weight: 600; text-anchor: middle; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #30363d; }
      .box { fill: #161b22; stroke: #8b949e; }
      .completed { stroke: #3fb950; }
      .failed { stroke: #f85149; }
      .cancelled { stroke: #d29922; }
      .way { stroke: #8b949e; }
      .dot, .head { fill: #8b949e; }
      text { fill: #e6edf3; }
    }
"""


def state_picture() -> str:
    """Draw ``TRANSITIONS``."""
    ways = [
        (source, target, ", ".join(str(signal) for signal, _ in signals))
        for source, row in TRANSITIONS.items()
        for target, signals in groupby(row.items(), key=lambda entry: entry[1])
    ]
    said = "; ".join(f"{source} to {target}: {signal}" for source, target, signal in ways)
    pending = BOXES[TaskStatus.PENDING]
    start = pending.y + pending.height // 2
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 400" role="img" '
        'aria-labelledby="title desc">',
        '  <title id="title">The states of a task</title>',
        f'  <desc id="desc">{said}.</desc>',
        f"  <style>{STYLE}  </style>",
        '  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
        '  <rect class="card" x="0.5" y="0.5" width="929" height="399" rx="10"/>',
        f'  <circle class="dot" cx="28" cy="{start}" r="7"/>',
        f'  <path class="way" marker-end="url(#head)" d="M35 {start}H{pending.x}"/>',
        *(_box(status) for status in TaskStatus),
        *(_way(*way) for way in ways),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _box(status: TaskStatus) -> str:
    box = BOXES[status]
    return (
        f'  <rect class="box {status}" x="{box.x}" y="{box.y}" '
        f'width="{box.width}" height="{box.height}" rx="8"/>\n'
        f'  <text class="status" x="{box.middle}" y="{box.y + box.height // 2 + 5}">{status}</text>'
    )


def _way(source: TaskStatus, target: TaskStatus, signal: str) -> str:
    path, x, y = _route(BOXES[source], BOXES[target])
    return (
        f'  <path class="way" marker-end="url(#head)" d="{path}"/>\n  <text x="{x}" y="{y}">{signal}</text>'
    )


def _route(source: Box, target: Box) -> tuple[str, int, int]:
    """The path from one box to another, and where its label stands."""
    if source == target:
        x, y = source.middle, source.bottom
        return f"M{x - 30} {y}c-10 40 70 40 60 0", x + 48, y + 24
    if source.x + source.width < target.x:
        level = target.y + target.height // 2
        edge = source.y if level < source.y else source.bottom
        return f"M{source.middle} {edge}V{level}H{target.x}", source.middle + 12, level - 8
    down = source.y < target.y
    x = min(source, target, key=lambda box: box.width).middle
    if source.width == target.width:
        # Between the two long boxes there are two ways, side by side.
        x = source.x + (30 if down else 100)
    begin, end = (source.bottom, target.y) if down else (source.y, target.bottom)
    middle = (begin + end) // 2
    return f"M{x} {begin}V{end}", x + 8, middle + 5
