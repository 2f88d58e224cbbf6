"""The view: which rows are in sight (tree, oldest tasks, list, timeline), and what the feed must bring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import parse_qsl

from otel_tasks_terminal import phrases
from otel_tasks_terminal.model import SORTS, Entry, Model, task_entry, task_order
from otel_tasks_terminal.text import clean, number
from otel_tasks_terminal.top.timeline import Timeline
from otel_tasks_terminal.views import node_name

if TYPE_CHECKING:
    from otel_tasks_terminal.source import Pairs, Source
    from otel_tasks_terminal.top.silence import Silenced

Row = dict[str, Any]

OLDEST = 50
# How many tasks of an opened row are shown: at first, and with each "more".
STEPS = (200, 400, 1000)
# What one stream may bring.
MAX_EXPANDED = 20
MAX_TASKS = 2000
# How many tasks a list has, and how many live and ended ones a timeline.
LISTED = 200
BARS = 100


class Question(NamedTuple):
    """A list that the service makes.

    Attributes:
        pairs: Which tasks.
        label: Their name, for people.
        states: The live tasks, the ended ones, both, or the ended ones if none is live.
        sort: Which of the live tasks come first.
        limit: How many of each.
    """

    pairs: tuple[tuple[str, str], ...]
    label: str
    states: Literal["live", "ended", "both", "live, or ended"] = "live"
    sort: str = "status"
    limit: int = LISTED

    def answer(self, client: Source) -> Row:
        """Fetch the list.

        Raises:
            CommandError: There is no answer.
        """
        live: Row = {"rows": [], "total": 0}
        ended = live
        if self.states != "ended":
            sort = "age" if self.sort == "count" else self.sort
            live = client.listed([*self.pairs, ("sort", sort)], self.limit)
        if self.states in ("ended", "both") or (self.states == "live, or ended" and not live["rows"]):
            ended = client.listed([*self.pairs, ("state", "ended")], self.limit)
        return {"live": live, "ended": ended, "rows": [*live["rows"], *ended["rows"]]}


class View:
    """What the reader looks at.

    Args:
        model: What is known.
        silenced: The warnings that are not shown.
    """

    def __init__(self, model: Model, silenced: Silenced) -> None:
        self._model = model
        self._silenced = silenced
        self.name = "tree"
        self.words = ""
        # The answer to the question.
        self.listing: Row | None = None
        self.finished = False
        # The task of the panel, by its id.
        self.panel: str | None = None
        self.timeline = Timeline(model)
        self._list: Question | None = None
        # Whose timeline: as chosen last, or that of everything.
        self._scope: Question | None = None
        self._sort = SORTS[0]
        # The opened classes, the last one at the end, and how many of their tasks are shown.
        self._limits: dict[str, int] = {}

    # --- choice -----------------------------------------------------------------------------------

    def choose(self, name: str) -> None:
        """Look at the tree, at the oldest tasks, or at a timeline."""
        self.name, self.words, self._list, self.listing = name, "", None, None

    def search(self, words: str) -> None:
        """Look at the tasks with these words; without any, at the tree."""
        self.choose("tree")
        if words:
            self._show(Question((("q", words),), f"filter {clean(words)!r}", "live, or ended"))
            self.words = words

    def show_list(self, pairs: Pairs, label: str) -> None:
        """Look at the live tasks that a query finds."""
        self._show(Question(tuple(pairs), label))

    def show_ended(self) -> None:
        """Look at the tasks that have ended."""
        self._show(Question((), "ended, newest first", "ended"))

    def show_timeline(self, entry: Entry | None) -> None:
        """Look at the timeline of a group, of a class, or of the group that a task belongs to."""
        if entry is not None:
            row = entry.row
            if entry.kind == "group" and row.get("parent") is None:
                self._scope = _of_node(row["node"]) if row.get("node") else None
            elif entry.kind in ("group", "class"):
                self._scope = _bars([("key", entry.key)], row.get("name"))
            elif row.get("group_id"):
                self._scope = _bars([("group_id", str(row["group_id"]))], row["group_id"])
        self.choose("timeline")

    def _show(self, question: Question) -> None:
        self.choose("tree")
        self._list = question

    @property
    def question(self) -> Question | None:
        """The list that is in sight; None for the views that the stream feeds."""
        question = self._list
        if self.name == "timeline":
            question = self._scope or _bars([], self._whole())
        if question is None:
            return None
        only = self._model.only
        if only is not None and "node" not in dict(question.pairs):
            question = question._replace(pairs=(*question.pairs, ("node", only)))
        return question._replace(sort=self._sort)

    def _whole(self) -> object:
        """What everything is called."""
        if self._model.nodes:
            return self._model.only or "all nodes"
        return next(iter(self._model.children(None)), {}).get("name")

    # --- nodes ------------------------------------------------------------------------------------

    @property
    def names_nodes(self) -> bool:
        """Whether each task has its node beside it: in a tree, the rows above say it."""
        return bool(self._model.nodes) and (self._list is not None or self.name == "oldest")

    def next_node(self) -> None:
        """Look at the next node of the fleet; after the last one, at all of them."""
        names: list[str | None] = [None, *sorted(self._model.nodes)]
        # A host that was named may run several nodes.
        shown = self._model.only
        self._model.only = names[(names.index(shown) + 1) % len(names)] if shown in names else None
        self.listing = None

    def open_warning(self, warning: Row) -> bool:
        """Look at the tasks behind a warning; return whether they can be listed."""
        if not warning.get("query"):
            return False
        self.show_list(parse_qsl(warning["query"]), phrases.warning(warning, self._model.now()))
        return True

    @property
    def warnings(self) -> list[Row]:
        """The warnings that are shown."""
        return self._silenced.rest(self._model.warnings)

    @property
    def is_ordered(self) -> bool:
        """Whether the rows can be sorted: the oldest, ended tasks, and a timeline have their own order."""
        return self.name == "tree" and (self._list is None or self._list.states != "ended")

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
        listed: list[Row] = (self.listing or {}).get("rows", [])
        if self.name == "timeline":
            return self._model.marked(self.timeline.entries(listed))
        if self._list is not None:
            return self._flat("list", listed, hold=hold)
        if self.name == "oldest":
            oldest = self._model.members("oldest") or []
            shown = [row for row in oldest if self._model.is_shown(row.get("node"))]
            return self._flat("oldest", shown, hold=hold)
        return self._model.tree(self._sort, finished=self.finished, hold=hold)

    def _flat(self, name: str, tasks: list[Row], *, hold: bool) -> list[Entry]:
        ended = [task for task in tasks if "ended" in task]
        live = [task for task in tasks if "ended" not in task]
        sort = "age" if name == "oldest" else self._sort
        arranged = self._model.arrange(name, live, lambda task: task_order(task, sort), hold=hold)
        return self._model.marked(task_entry(task, 0) for task in (*arranged, *ended))

    def note(self) -> str:
        """What the list is, and what it leaves out."""
        only = self._model.only
        chosen = "" if only is None else f"only {node_name(only)}, m: next · "
        question = self.question
        if question is not None:
            return f"{chosen}{self._listed(question)} · Esc: back"
        if self.name == "oldest":
            return f"{chosen}the {OLDEST} oldest tasks · t: tree"
        if not self._model.about:
            return ""
        more = [
            f"{number(count)} {name}"
            for name, count in self._model.more.items()
            if count and name != "cancelling"
        ]
        rest = f" · not shown: {', '.join(more)}" if more else ""
        if only is not None and not self._model.shown_nodes():
            chosen = f"no node is called {clean(only)!r}, m: all · "
        empty = "nothing runs · " if not self._model.stats.get("live") else ""
        return f"{chosen}{empty}sorted by {self._sort}{rest} · ?: keys"

    def _listed(self, question: Question) -> str:
        """What a list is, how many tasks it has, and how many of them are not shown."""
        timed = self.name == "timeline"
        label = f"timeline of {question.label}" if timed else question.label
        if self.listing is None:
            return f"{label} · …"
        live, ended = self.listing["live"], self.listing["ended"]
        silent = sorted({*live.get("silent", ()), *ended.get("silent", ())})
        missing = f", no answer from {', '.join(map(node_name, silent))}" if silent else ""
        if timed and not self.listing["rows"]:
            if silent:
                return f"{label}{missing}: what is there is not known"
            return f"No task of {question.label} is live, and none is remembered."
        parts = [_of(live, "live")] if question.states != "ended" else []
        if ended["rows"] or question.states in ("ended", "both"):
            parts.append(_of(ended, "ended"))
        searched = ", not all were searched" if live.get("partial") else ""
        return f"{label} · {', '.join(parts)}{searched}{missing}"


def _bars(pairs: Pairs, label: object) -> Question:
    return Question(tuple(pairs), clean(label or ""), "both", limit=BARS)


def _of_node(node: object) -> Question:
    # By its name and not by the key of its root, which is not known before the node has answered.
    return _bars([("node", str(node))], node_name(node))


def _of(answer: Row, state: str) -> str:
    """How many tasks there are, and how many of them are shown: ``140 live``, ``100 of 340 live``."""
    total, shown = answer.get("total") or 0, len(answer["rows"])
    if not answer.get("next"):
        # All of them. Some may have ended between the count and the rows.
        return f"{number(shown)} {state}"
    return f"{number(shown)} of {number(total)} {state}" if total > shown else f"{number(total)} {state}"
