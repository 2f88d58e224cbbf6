"""The view: which rows are in sight (the tree, the oldest tasks, a list), and what the feed must bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from otel_tasks_terminal import phrases
from otel_tasks_terminal.model import SORTS, Entry, Model, ended_key, task_order
from otel_tasks_terminal.text import clean, counted, number

if TYPE_CHECKING:
    from otel_tasks_terminal.client import Pairs

Row = dict[str, Any]
Question = tuple[tuple[str, str], ...]

OLDEST = 50
# How many tasks of an opened row are shown: at first, and with each "more".
STEPS = (200, 400, 1000)
# What one stream may bring.
MAX_EXPANDED = 20
MAX_TASKS = 2000


class View:
    """What the reader looks at.

    Args:
        model: What is known.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.name = "tree"
        self.words = ""
        self.question: Question | None = None
        self.listing: Row | None = None
        self.finished = False
        # The task of the panel, by its id.
        self.panel: str | None = None
        self._label = ""
        self._sort = SORTS[0]
        # The opened classes, the last one at the end, and how many of their tasks are shown.
        self._limits: dict[str, int] = {}

    # --- choice -----------------------------------------------------------------------------------

    def choose(self, name: str) -> None:
        """Look at the tree, or at the oldest tasks."""
        self.name, self.words, self.question, self.listing = name, "", None, None

    def search(self, words: str) -> None:
        """Look at the tasks with these words; without any, at the tree."""
        self.choose("tree")
        if words:
            self.show_list([("q", words)], f"filter {clean(words)!r}")
            self.words = words

    def show_list(self, pairs: Pairs, label: str) -> None:
        """Look at the tasks that a query finds."""
        self.choose("tree")
        self.question, self._label = tuple(pairs), label

    def open_warning(self, index: int) -> bool:
        """Look at the tasks behind a warning; return whether they can be listed."""
        warnings = self._model.warnings[index : index + 1]
        if not warnings or not warnings[0].get("query"):
            return False
        self.show_list(parse_qsl(warnings[0]["query"]), phrases.warning(warnings[0], self._model.now()))
        return True

    def next_sort(self) -> str:
        """Sort by the next criterion, and return it."""
        self._sort = SORTS[(SORTS.index(self._sort) + 1) % len(SORTS)]
        return self._sort

    # --- opened rows ------------------------------------------------------------------------------

    def open(self, entry: Entry) -> int | None:
        """Open a row; return how many of its tasks to fetch, None if it shows none itself."""
        self._model.opened[entry.key] = True
        if entry.kind != "class":
            return None
        self._limits.pop(entry.key, None)
        self._limits[entry.key] = STEPS[0]
        return STEPS[0]

    def more(self, key: str) -> int | None:
        """Show more tasks of a row; return how many to fetch, None if it cannot be more."""
        before = self._limits.get(key, 0)
        limit = next((step for step in STEPS if step > before), None)
        if limit is not None:
            self._limits[key] = limit
        return limit

    def close(self, entry: Entry) -> None:
        """Close a row."""
        self._model.opened[entry.key] = False
        self._model.forget(entry.key)
        self._limits.pop(entry.key, None)

    def wanted(self) -> Pairs:
        """What the stream must bring: the tasks of the rows that were opened last, and the panel's."""
        pairs: Pairs = []
        room = MAX_TASKS
        if self.name == "oldest":
            pairs.append(("expand", f"oldest:{OLDEST}"))
            room -= OLDEST
        for key in [*reversed(self._limits)][: MAX_EXPANDED - 1]:
            if self._model.find(key) is not None and self._limits[key] <= room:
                room -= self._limits[key]
                pairs.append(("expand", f"{key}:{self._limits[key]}"))
        if self.panel is not None:
            pairs.append(("task", self.panel))
        return pairs

    # --- rows -------------------------------------------------------------------------------------

    def entries(self, *, hold: bool) -> list[Entry]:
        """Return the rows."""
        if self.question is not None:
            return self._flat("list", (self.listing or {}).get("rows", []), hold=hold)
        if self.name == "oldest":
            return self._flat("oldest", self._model.members("oldest") or [], hold=hold)
        return self._model.tree(self._sort, finished=self.finished, hold=hold)

    def _flat(self, name: str, tasks: list[Row], *, hold: bool) -> list[Entry]:
        ended = [task for task in tasks if "ended" in task]
        live = [task for task in tasks if "ended" not in task]
        sort = "age" if name == "oldest" else self._sort
        arranged = self._model.arrange(name, live, lambda task: task_order(task, sort), hold=hold)
        return [
            *(Entry(task["id"], "task", 0, task) for task in arranged),
            *(Entry(ended_key(task), "ended", 0, task) for task in ended),
        ]

    def note(self, entries: list[Entry]) -> str:
        """What the list is, and what it leaves out."""
        if self.question is not None:
            if self.listing is None:
                return f"{self._label} · …"
            total = self.listing.get("total") or 0
            shown = "" if total <= len(entries) else f", {number(len(entries))} shown"
            return f"{self._label} · {counted(total, 'task')}{shown} · Esc: back"
        if self.name == "oldest":
            return f"the {OLDEST} oldest tasks · t: tree"
        if not self._model.about:
            return ""
        more = [
            f"{number(count)} {name}"
            for name, count in self._model.more.items()
            if count and name != "cancelling"
        ]
        rest = f" · not shown: {', '.join(more)}" if more else ""
        empty = "nothing runs · " if not self._model.stats.get("live") else ""
        return f"{empty}sorted by {self._sort}{rest} · ?: keys"
