"""The keys, those of the page: their names, other names, actions, and what they do."""

from __future__ import annotations

from typing import Any

from textual.binding import Binding

KEYS = [
    ("j", "down", "move('1')", "next row"),
    ("k", "up", "move('-1')", "previous row"),
    ("l", "right,enter", "open", "open the row, or the panel of the task"),
    ("h", "left", "close", "close the row, or go to the row above"),
    ("/", "slash", "filter", "filter by name, group, trace, or where it waits"),
    ("n", "", "next", "next task that is being cancelled; in a list the next one"),
    ("s", "", "sort", "sort by status, age, name, count"),
    ("space", "", "pause", "pause, resume"),
    ("w", "", "where", "all tasks that wait at the selected one's line"),
    ("t", "", "turn", "tree, or flat list of the oldest"),
    ("g", "", "timeline", "timeline of the selected row; tree"),
    ("e", "", "ended", "the tasks that have ended"),
    ("m", "", "node", "with a fleet: all nodes, or the next one"),
    ("f", "", "finished", "show finished tasks in the tree"),
    ("x", "", "cancel", "cancel the selected task"),
    ("Tab", "", "", "between the list and the panel, which j and k scroll"),
    ("1-4", "", "", "the tasks behind a warning"),
    ("!", "exclamation_mark", "warnings", "all warnings; silence a kind of them"),
    ("Esc", "escape", "leave", "close the panel, the filter, the view"),
    ("?", "question_mark", "help", "these keys"),
    ("q", "ctrl+q", "leave_all", "quit"),
]


def bindings() -> list[Any]:
    """The keys as Textual wants them."""
    made: list[Any] = [
        Binding("ctrl+c", "interrupt", show=False, priority=True, system=True),
        # The field would end the filter too, but after a key that is pressed right after this one.
        Binding("enter", "end_filter", show=False, priority=True),
    ]
    for key, other, action, says in KEYS:
        names = ",".join(name for name in (key if len(key) == 1 and key.isalpha() else "", other) if name)
        names = "space" if key == "space" else names
        if action:
            # What is typed right after a slash must not reach the list, where each key does something.
            made.append(Binding(names, action, says, show=False, priority=action == "filter"))
    for key, step in (
        ("home", "'-1000000'"),
        ("end", "'1000000'"),
        ("pagedown", "'page'"),
        ("pageup", "'-page'"),
    ):
        made.append(Binding(key, f"move({step})", show=False))
    return made + [Binding(str(number), f"warning({number})", show=False) for number in range(1, 5)]
