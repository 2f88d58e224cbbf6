"""The picture of the package as an SVG: its modules in the layers of the import contracts, and their imports.

Each layer is a row, and all arrows point down. Not every import has one, see `arrows`. Where an arrow passes
a row, it gets a point. Modules and points then move toward the mean of their neighbors, sweep by sweep.
Coordinates are whole numbers, so every machine and every Python draws the same picture.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

from docs.imports import Graph, collapsed, graph, layers, reduced

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WIDTH = 1000
PITCH = 58
BOX = 28
GAP = 26
MARGIN = 34
SWEEPS = 24
# No contract has the package's own __init__.py. It imports the public names, and stands beside asgi.
FRONT = "__init__"
BESIDE = "asgi"
BOTTOM = "exceptions"

# The picture has its own background: the page around it may be dark where the system is light, or vice versa.
STYLE = """
    .card { fill: #ffffff; stroke: #d0d7de; }
    .folder { fill: #f6f8fa; stroke: #d0d7de; stroke-dasharray: 4 3; }
    .box { fill: #ffffff; stroke: #57606a; stroke-width: 1.5; }
    .leaf { stroke-dasharray: 3 3; }
    .public { fill: #ddf4ff; stroke: #0969da; }
    .way { fill: none; stroke: #8c959f; stroke-width: 1.3; }
    .head { fill: #57606a; }
    text { font: 13px ui-monospace, SFMono-Regular, Menlo, monospace; fill: #1f2328; text-anchor: middle; }
    .title { font-weight: 600; text-anchor: start; fill: #57606a; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #30363d; }
      .folder { fill: #161b22; stroke: #30363d; }
      .box { fill: #0d1117; stroke: #8b949e; }
      .public { fill: #121d2f; stroke: #4493f8; }
      .way { stroke: #6e7681; }
      .head { fill: #8b949e; }
      text { fill: #e6edf3; }
      .title { fill: #8b949e; }
    }
"""


@dataclass(eq=False)
class Node:
    """A module in its row, or the point where an arrow passes a row."""

    row: int
    name: str = ""
    x: int = 0
    above: list[Node] = field(default_factory=list["Node"])
    below: list[Node] = field(default_factory=list["Node"])

    @property
    def width(self) -> int:
        """The width of the box; a point needs none."""
        return 8 * len(title(self.name)) + 18 if self.name else 0

    @property
    def top(self) -> int:
        """The y of the upper edge."""
        return MARGIN + 14 + self.row * PITCH

    @property
    def bottom(self) -> int:
        """The y of the lower edge."""
        return self.top + BOX


def architecture_picture() -> str:
    """Draw the package."""
    rows = [[*row, FRONT] if BESIDE in row else row for row in layers()]
    return draw(rows, arrows())


def arrows() -> Graph:
    """The imports that the picture shows: not those that others imply, nor those of a leaf."""
    skipped = leaves()
    return {name: targets - skipped for name, targets in reduced(collapsed(graph())).items()}


def leaves() -> set[str]:
    """The modules that import no other one but the exceptions, and that several import."""
    imports = collapsed(graph())
    uses = Counter(target for targets in imports.values() for target in targets)
    return {name for name, targets in imports.items() if targets <= {BOTTOM} and uses[name] > 1}


def draw(rows: Sequence[Sequence[str]], ways: Graph) -> str:
    """Draw modules in rows, from top to bottom, and the arrows between them."""
    placed, chains = layout(rows, ways)
    height = placed[-1][0].bottom + MARGIN
    said = "; ".join(
        f"{title(name)} imports {', '.join(map(title, sorted(ways[name])))}"
        for row in rows
        for name in row
        if ways[name]
    )
    nodes = [node for row in placed for node in row if node.name]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-labelledby="title desc">',
        '  <title id="title">The modules of otel_tasks, and what each imports</title>',
        f'  <desc id="desc">{escape(said)}.</desc>',
        f"  <style>{STYLE}  </style>",
        '  <defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
        f'  <rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        *(frame(folder, nodes) for folder in folders(nodes)),
        *(arrow(chain) for chain in chains),
        *(box(node) for node in nodes),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


# --- places ------------------------------------------------------------------------------------------------


def layout(rows: Sequence[Sequence[str]], ways: Graph) -> tuple[list[list[Node]], list[list[Node]]]:
    """The nodes of each row from left to right, and the nodes that each arrow passes."""
    placed = [[Node(number, name) for name in row] for number, row in enumerate(rows)]
    by_name = {node.name: node for row in placed for node in row}
    chains = [
        passed(by_name[name], by_name[target], placed) for name in by_name for target in sorted(ways[name])
    ]
    for row in placed:
        spread(row)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for row in placed if down else reversed(placed):
            move(row, down=down, reorder=sweep < SWEEPS * 2 // 3)
    return placed, chains


def passed(source: Node, target: Node, placed: list[list[Node]]) -> list[Node]:
    """The nodes of one arrow, with a new point in each row between its ends."""
    assert source.row < target.row, f"{source.name} imports {target.name}, which stands no deeper"
    points = [Node(row) for row in range(source.row + 1, target.row)]
    for point in points:
        placed[point.row].append(point)
    chain = [source, *points, target]
    for upper, lower in pairwise(chain):
        upper.below.append(lower)
        lower.above.append(upper)
    return chain


def spread(row: Sequence[Node]) -> None:
    """Start with the nodes of a row at even distances."""
    for number, node in enumerate(row, 1):
        node.x = WIDTH * number // (len(row) + 1)


def move(row: list[Node], *, down: bool, reorder: bool) -> None:
    """Move the nodes of a row toward their neighbors above or below them."""
    wanted = {node: middle(node, node.above if down else node.below) for node in row}
    if reorder:
        row.sort(key=lambda node: wanted[node])
    # Nodes that would overlap form a block, which is placed at the mean of their wanted places.
    blocks: list[tuple[int, int]] = []
    offsets = [0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) // 2 + GAP)
    for node, offset in zip(row, offsets, strict=True):
        total, count = wanted[node] - offset, 1
        while blocks and blocks[-1][0] * count > total * blocks[-1][1]:
            total, count = total + blocks[-1][0], count + blocks[-1][1]
            blocks.pop()
        blocks.append((total, count))
    places = [total // count for total, count in blocks for _ in range(count)]
    for node, place, offset in zip(row, places, offsets, strict=True):
        node.x = place + offset
    keep_inside(row)


def middle(node: Node, neighbors: Sequence[Node]) -> int:
    """The mean place of the neighbors; without any, the node stays."""
    return sum(other.x for other in neighbors) // len(neighbors) if neighbors else node.x


def keep_inside(row: Sequence[Node]) -> None:
    """Push nodes beyond either edge back onto the card."""
    least = MARGIN
    for node in row:
        node.x = max(node.x, least + node.width // 2)
        least = node.x + node.width // 2 + GAP
    most = WIDTH - MARGIN
    for node in reversed(row):
        node.x = min(node.x, most - node.width // 2)
        most = node.x - node.width // 2 - GAP


# --- shapes ------------------------------------------------------------------------------------------------


def title(name: str) -> str:
    """A module as the picture names it: without its folder, which is a frame."""
    return "otel_tasks" if name == FRONT else name.rpartition("/")[2]


def folders(nodes: Iterable[Node]) -> list[str]:
    """The folders, in the order of their modules."""
    return list(dict.fromkeys(node.name.rpartition("/")[0] for node in nodes if "/" in node.name))


def frame(folder: str, nodes: Iterable[Node]) -> str:
    """The frame around the modules of a folder, over the whole width."""
    inside = [node for node in nodes if node.name.startswith(f"{folder}/")]
    top = min(node.top for node in inside) - 13
    height = max(node.bottom for node in inside) + 13 - top
    return (
        f'  <rect class="folder" x="12" y="{top}" width="{WIDTH - 24}" height="{height}" rx="8"/>\n'
        f'  <text class="title" x="24" y="{top + 20}">{folder}/</text>'
    )


def box(node: Node) -> str:
    """A module's box and name."""
    kind = "box" if "/" in node.name else "box public"
    if node.name in leaves():
        kind += " leaf"
    return (
        f'  <rect class="{kind}" x="{node.x - node.width // 2}" y="{node.top}" width="{node.width}" '
        f'height="{BOX}" rx="6"/>\n'
        f'  <text x="{node.x}" y="{node.top + 19}">{title(node.name)}</text>'
    )


def arrow(chain: Sequence[Node]) -> str:
    """A curve from the lower edge of one box over its points to the upper edge of another."""
    return f'  <path class="way" marker-end="url(#head)" d="{" ".join(steps(chain))}"/>'


def steps(chain: Sequence[Node]) -> Iterator[str]:
    """The parts of the curve; it passes a row straight down."""
    yield f"M{chain[0].x} {chain[0].bottom}"
    for upper, lower in pairwise(chain):
        bend = (lower.top + upper.bottom) // 2
        yield f"C{upper.x} {bend} {lower.x} {bend} {lower.x} {lower.top}"
        if not lower.name:
            yield f"V{lower.bottom}"
