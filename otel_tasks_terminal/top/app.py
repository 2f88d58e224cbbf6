"""The screen: what is in view, the keys, and where the messages of the feed go."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import App
from textual.containers import Horizontal
from textual.message import Message
from textual.scrollbar import ScrollBar, ScrollBarRender
from textual.widgets import Input, Static

from otel_tasks_terminal import views
from otel_tasks_terminal.errors import CommandError, ExitCode
from otel_tasks_terminal.model import Entry, Model
from otel_tasks_terminal.pen import Cell, Pen
from otel_tasks_terminal.text import clean, counted, duration
from otel_tasks_terminal.top.dialogs import Cancel, Help, Warnings
from otel_tasks_terminal.top.keys import KEYS, bindings
from otel_tasks_terminal.top.look import Look
from otel_tasks_terminal.top.panel import Panel
from otel_tasks_terminal.top.reader import Arrived, Away, Reader, Refused
from otel_tasks_terminal.top.rows import Painter, RowList
from otel_tasks_terminal.top.silence import Silenced, state_file
from otel_tasks_terminal.top.summary import Summary
from otel_tasks_terminal.top.timeline import Bars
from otel_tasks_terminal.top.view import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult
    from textual.events import Resize

    from otel_tasks_terminal.source import Event, Source
    from otel_tasks_terminal.top.view import Question

Row = dict[str, Any]

# Seconds without an event after which what is shown looks stale.
STALE = 5.0
# Seconds after a key in which rows keep their places.
HOLD = 10.0
# Seconds between two fetches of a list that no stream brings.
REFRESH = 2.0
# Events that a pause keeps; after more, everything is read again.
MAX_HELD = 300
# Columns from which the panel fits beside the list.
WIDE = 110


class Found(Message):
    """The answer to a request, or the error that it met.

    Args:
        what: What was asked for: ``list``, ``task``, or the key of a row.
        asked: The question, to tell its answer from that to an older one.
        answer: What came.
    """

    def __init__(self, what: str, asked: object, answer: Row | CommandError) -> None:
        super().__init__()
        self.what = what
        self.asked = asked
        self.answer = answer


class WholeCells(ScrollBarRender):
    """A scroll bar without characters: its ends are not drawn in parts of a cell."""

    VERTICAL_BARS: ClassVar[list[str]] = [" "]


class Top(App[int]):
    """The live view in a terminal.

    Args:
        client: The connection to the live view.
        ascii_only: Whether only ASCII may be written.
        silenced: The warnings that are not shown.
        node: The nodes of a fleet that are shown at first; None for all.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[Any]] = bindings()
    CSS = """
    Summary { height: auto; padding: 0 1; }
    #filter { height: 1; border: none; padding: 0 1; display: none; }
    #filter.shown { display: block; }
    #note { height: auto; padding: 0 1; color: $text-muted; }
    #main { height: 1fr; }
    RowList { width: 1fr; height: 1fr; scrollbar-size-vertical: 1; overflow-x: hidden; overflow-y: auto; }
    RowList > .rows--selected { background: $primary 30%; }
    Top:nocolor RowList > .rows--selected { text-style: reverse; }
    #panel { width: 40%; min-width: 46; max-width: 70; height: 1fr; display: none; }
    #panel { scrollbar-size-vertical: 1; padding: 0 1; border-left: solid $primary 40%; }
    #panel.shown { display: block; }
    .narrow #main { layout: vertical; }
    .narrow RowList { height: 2fr; }
    .narrow #panel { height: 3fr; width: 1fr; max-width: 100%; }
    .narrow #panel { border-left: none; border-top: solid $primary 40%; }
    .stale RowList, .stale #panel { text-opacity: 50%; }
    ModalScreen { align: center middle; }
    .dialog { width: 76; max-width: 100%; height: auto; max-height: 100%; padding: 1 2; }
    .dialog { background: $surface; border: round $primary; scrollbar-size-vertical: 1; }
    .dialog Input { margin: 1 0 0 0; }
    .dialog Button { margin: 1 0 0 0; }
    .dialog OptionList { height: auto; max-height: 20; border: none; padding: 0; margin: 0 0 1 0; }
    #panel:focus { background: $primary 10%; }
    .ascii #panel { border-left: ascii $primary; }
    .ascii .narrow #panel { border-left: none; border-top: ascii $primary; }
    .ascii .dialog { border: ascii $primary; }
    .ascii .dialog Button, .ascii .dialog Input { border: none; height: 1; }
    .ascii Toast { border: none; }
    """

    def __init__(
        self,
        client: Source,
        *,
        ascii_only: bool = False,
        silenced: Silenced | None = None,
        node: str | None = None,
    ) -> None:
        super().__init__()
        self._client = client
        self._pen = Pen(ascii=ascii_only)
        self.set_class(ascii_only, "ascii")
        ScrollBar.renderer = WholeCells if ascii_only else ScrollBarRender
        self._reader = Reader(client, self.post_message)
        self.model = Model(only=node)
        self._silenced = silenced or Silenced()
        self._view = View(self.model, self._silenced)
        self._held: list[Event] | None = None
        self._changes = 0
        # When the last event and the last key came, and the last list was asked for.
        self._heard = self._touched = self._asked = 0.0
        # The list that was asked for and has not come.
        self._unanswered: Question | None = None
        self._trouble = ""

    # --- start and end ----------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """Lay the screen out."""
        yield Summary("", id="summary")
        yield Input(
            placeholder="filter by name, group, trace, or where it waits", max_length=200, id="filter"
        )
        yield Static("", id="note")
        with Horizontal(id="main"):
            yield RowList(lambda: self.painter, self.model.now, id="rows")
            yield Panel(lambda: self.look, self.model.now, id="panel")

    def on_mount(self) -> None:
        """Begin to read."""
        self.query_one(RowList).focus()
        self._heard = time.monotonic()
        self._reader.start()
        self.set_interval(1.0, self._tick)
        # Textual would leave the terminal as it is.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit, ExitCode.TERMINATED)
        self.render_all()

    def on_unmount(self) -> None:
        """Read no further."""
        self._reader.stop()

    def on_resize(self, event: Resize) -> None:
        """Put the panel beside the list, or below it."""
        self.screen_stack[0].set_class(event.size.width < WIDE, "narrow")

    @property
    def look(self) -> Look:
        """How text is drawn, on the background of the moment."""
        return Look(self._pen, dark=self.current_theme.dark, nodes=self._view.names_nodes)

    @property
    def painter(self) -> Painter:
        """What draws the rows."""
        return Bars(self.look, self._view.timeline.span) if self._view.name == "timeline" else self.look

    # --- events -----------------------------------------------------------------------------------

    def on_arrived(self, message: Arrived) -> None:
        """Take an event of the feed; a pause keeps it for later."""
        self._heard, self._trouble = time.monotonic(), ""
        event = message.event
        if event.name == "task":
            # A pause asks for the panel's task when it ends: an old state of it is of no use.
            if self._held is None:
                self.panel.take(event.data)
        elif self._held is not None and self.model.about:
            self._hold_event(event, self._held)
        else:
            self.model.apply(event.name, event.data)
        self.render_all()

    def _hold_event(self, event: Event, held: list[Event]) -> None:
        if event.name == "snapshot" or len(held) >= MAX_HELD:
            held.clear()
        if not held and event.name != "snapshot" and self._changes:
            # Too much has come: only a snapshot can continue.
            self._reader.start_over()
        held.append(event)
        self._changes += _changes_in(event)

    def on_away(self, message: Away) -> None:
        """Say that the connection is lost."""
        self._trouble = message.lost.message
        self.render_all()

    def on_refused(self, message: Refused) -> None:
        """End: the view does not want this client."""
        self.exit(return_code=message.error.code, message=f"otel-tasks: {message.error}")

    @property
    def fresh(self) -> bool:
        """Whether what is shown is not old."""
        return not self._trouble and time.monotonic() - self._heard < STALE

    def _tick(self) -> None:
        if self._held is None:
            self.render_all()

    # --- requests ---------------------------------------------------------------------------------

    def _ask(self, what: str, asked: object, ask: Callable[[Source], Row]) -> None:
        """Ask in a thread; the answer comes as a message."""

        def work() -> None:
            client = self._client.fresh()
            try:
                answer: Row | CommandError = ask(client)
            except CommandError as error:
                answer = error
            finally:
                client.close()
            self.post_message(Found(what, asked, answer))

        self.run_worker(work, thread=True, group=what, exclusive=True)

    def on_found(self, message: Found) -> None:
        """Take an answer, if its question is still open."""
        answer = message.answer
        if message.what == "list" and message.asked == self._unanswered:
            self._unanswered = None
        if isinstance(answer, CommandError):
            if message.what == "task" and message.asked == self._view.panel:
                self.panel.fail(answer)
            elif message.what == "list":
                self.notify(clean(answer, 200), severity="warning", markup=False)
        elif message.what == "list":
            if message.asked == self._view.question:
                self._view.listing = answer
        elif message.what == "task":
            if message.asked == self._view.panel:
                self.panel.take(answer)
        elif self.model.is_open(message.what):
            total = answer.get("total") or 0
            self.model.take(message.what, answer.get("rows", ()), (), total, full=True)
        self.render_all()

    def _refresh_list(self) -> None:
        question = self._view.question
        if question is None or (self._held is not None and self._view.listing is not None):
            return
        if question == self._unanswered:
            # A silent node takes longer than it is asked again.
            return
        if time.monotonic() - self._asked >= REFRESH or self._view.listing is None:
            self._asked, self._unanswered = time.monotonic(), question
            self._ask("list", question, question.answer)

    # --- drawing ----------------------------------------------------------------------------------

    def render_all(self) -> None:
        """Bring the screen up to date."""
        if not self.is_running or not self.screen_stack:
            return
        self._refresh_list()
        base = self.screen_stack[0]
        base.set_class(not self.fresh, "stale")
        base.query_one(Summary).show(self.model, self._view.warnings, self.look, self._state())
        entries = self._view.entries(hold=time.monotonic() - self._touched < HOLD)
        base.query_one(RowList).show(entries)
        base.query_one("#note", Static).update(self.look.text([(self._view.note(), "mute")]))
        self.panel.draw()
        self._reader.wanted = self._view.wanted()

    def _state(self) -> list[Cell]:
        silent = time.monotonic() - self._heard
        if not self.fresh:
            why = f" · {clean(self._trouble, 200)}" if self._trouble else ""
            known = f"stale for {duration(silent)}, reconnecting" if self.model.about else "no connection"
            return [(f"! {known}{why}", "fail")]
        if not self.model.about:
            return [("… connecting", "mute")]
        if self._held is not None:
            return [(f"paused · {counted(self._changes, 'change')} waiting", "cancel")]
        return [("● live 1 s", "ok")]

    def _show_panel(self, task: Row | None) -> None:
        self._view.panel = None if task is None else str(task.get("id") or task.get("task_id"))
        if task is None or self._view.panel is None:
            self.panel.close()
        else:
            self.panel.open(task)
            self._ask_task()
        self.render_all()

    def _ask_task(self) -> None:
        if self._view.panel is not None:
            uid = self._view.panel
            self._ask("task", uid, lambda client: client.task(uid))

    # --- keys -------------------------------------------------------------------------------------

    @property
    def rows(self) -> RowList:
        """The list."""
        return self.query_one(RowList)

    @property
    def panel(self) -> Panel:
        """The panel."""
        return self.screen_stack[0].query_one(Panel)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave keys to a dialog while it is open; each key keeps the rows in their places."""
        self._touched = time.monotonic()
        is_typing = self.focused is not None and self.focused.id == "filter"
        if action == "end_filter":
            return is_typing
        # The first character that is typed may be a slash.
        if action == "filter" and is_typing:
            return False
        return action in ("interrupt", "focus_next", "focus_previous") or len(self.screen_stack) == 1

    def action_move(self, step: str) -> None:
        """Select another row."""
        page = self.rows.page
        self.rows.move({"page": page, "-page": -page}.get(step) or int(step))

    def action_open(self) -> None:
        """Open the selected row, or the panel of a task."""
        entry = self.rows.current
        if entry is not None:
            self._open(entry)

    def _open(self, entry: Entry) -> None:
        if entry.kind == "band":
            return
        if entry.kind == "more":
            self._expand(entry.row["key"], self._view.more(entry.row["key"]))
        elif entry.open is None:
            self._show_panel(entry.row)
        elif entry.open:
            self.rows.move(1)
        else:
            self._expand(entry.key, self._view.open(entry))
        self.render_all()

    def _expand(self, key: str, limit: int | None) -> None:
        if limit is not None:
            # At once, and not with the next stream.
            self._ask(key, key, lambda client: client.listed([("key", key)], limit))

    def on_row_list_chosen(self, message: RowList.Chosen) -> None:
        """A click on the selected row turns it."""
        if message.entry.open:
            self._view.close(message.entry)
            self.render_all()
        else:
            self._open(message.entry)

    def action_close(self) -> None:
        """Close the selected row, or go to the one above it."""
        entry = self.rows.current
        if entry is not None and entry.open:
            self._view.close(entry)
            self.render_all()
        else:
            self.rows.above()

    def action_next(self) -> None:
        """Go to the next task in trouble."""
        listed = self._view.question is not None and self._view.name != "timeline"
        if not (
            self.rows.next(lambda entry: listed or _in_trouble(entry)) or self.rows.next(_has_cancelling)
        ):
            self.notify("no task is being cancelled")

    def action_filter(self) -> None:
        """Type a filter."""
        box = self.query_one("#filter", Input)
        box.set_class(True, "shown")
        # At once, here and below: `focus()` takes effect after the next key.
        self.screen.set_focus(box)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Search while the filter is typed."""
        if event.input.id == "filter" and event.value.strip() != self._view.words:
            self._view.search(event.value.strip())
            self._look_at_another()

    def action_end_filter(self) -> None:
        """Go back to the list, with the filter."""
        self.screen.set_focus(self.rows)

    def action_sort(self) -> None:
        """Sort by something else."""
        if not self._view.is_ordered:
            self.notify("This view has an order of its own.", timeout=2)
            return
        self._touched = self._asked = 0.0
        self.notify(f"sorted by {self._view.next_sort()}", timeout=2)
        self.render_all()

    def action_pause(self) -> None:
        """Stop the screen, or let it go on with all that has come."""
        if self._held is None:
            self._held, self._changes = [], 0
            self.model.freeze()
        else:
            held, self._held = self._held, None
            self.model.thaw()
            for event in held:
                self.model.apply(event.name, event.data)
            self._ask_task()
        self.render_all()

    def action_where(self) -> None:
        """List all tasks that wait at the line of the selected one."""
        entry = self.rows.current
        task = self.panel.row or (entry.row if entry is not None else {})
        where = views.where(task)
        if where is None:
            self.notify("It is not known where this waits: open a task first.")
        else:
            self._view.show_list([("where", where)], f"waiting at {clean(views.short_where(task))}")
            self._look_at_another()

    def action_turn(self) -> None:
        """Show the tree, or the oldest tasks."""
        self._view.choose("tree" if self._view.name != "tree" or self._view.question else "oldest")
        self._look_at_another()

    def action_timeline(self) -> None:
        """Show the timeline of the selected row, or the tree."""
        if self._view.name == "timeline":
            self._view.choose("tree")
        else:
            self._view.show_timeline(self.rows.current)
        self._look_at_another()

    def action_node(self) -> None:
        """Show another node of the fleet, or all of them."""
        if not self.model.nodes:
            self.notify("This view shows one process.", timeout=2)
            return
        self._view.next_node()
        self._look_at_another()

    def action_ended(self) -> None:
        """Show the tasks that have ended."""
        self._view.show_ended()
        self._look_at_another()

    def action_finished(self) -> None:
        """Show finished tasks in the tree, or hide them."""
        self._view.finished = not self._view.finished
        self.render_all()

    def action_warning(self, number: int) -> None:
        """List the tasks behind a warning."""
        for warning in self._view.warnings[number - 1 : number]:
            self._list_warned(warning)

    def action_warnings(self) -> None:
        """Show all warnings, and silence kinds of them."""
        self.push_screen(Warnings(self.model, self._silenced, self.look), self._list_warned)

    def _list_warned(self, warning: Row | None) -> None:
        if warning is not None and self._view.open_warning(warning):
            self._look_at_another()
        self.render_all()

    def _look_at_another(self) -> None:
        self._asked = 0.0
        self.rows.reset()
        self.render_all()

    def action_cancel(self) -> None:
        """Ask whether the selected task is to be cancelled."""
        task = self._target()
        if not self.model.may_cancel:
            self.notify("This view is read-only: live_view(actions={'cancel'}) lets it cancel.", markup=False)
        elif not self.fresh:
            self.notify("The server does not answer: nothing can be cancelled now.")
        elif self.model.is_silent(task):
            self.notify("The task's node does not answer: nothing can be cancelled there now.")
        elif task.get("id") and "ended" not in task:
            name = str(task.get("name"))
            self.push_screen(Cancel(self._client, task["id"], name, self.look, lambda: self.fresh))
        else:
            self.notify("Select a task to cancel it; rows of several tasks cannot be cancelled.")

    def _target(self) -> Row:
        """The task of an open panel, even if the selection has moved on; otherwise the selected one."""
        if self._view.panel is not None:
            return self.panel.row
        entry = self.rows.current
        return entry.row if entry is not None and entry.kind == "task" else {}

    def action_leave(self) -> None:
        """Close what was opened last: the panel, the filter, the view."""
        box = self.query_one("#filter", Input)
        if self._view.panel is not None and not box.has_focus:
            self._show_panel(None)
            self.rows.focus()
            return
        box.set_class(False, "shown")
        box.value = ""
        self._view.choose("tree")
        self.rows.focus()
        self._look_at_another()

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help([(key, says) for key, _, _, says in KEYS], self.look))

    def action_leave_all(self) -> None:
        """Quit."""
        self.exit(ExitCode.OK)

    def action_interrupt(self) -> None:
        """Quit as a program that Ctrl-C ends."""
        self.exit(ExitCode.INTERRUPTED)


def _changes_in(event: Event) -> int:
    data = event.data
    if event.name == "snapshot":
        return 1
    lists = [*data.get("set", {}).values(), *data.get("gone", {}).values()] if event.name == "delta" else []
    return sum(map(len, lists)) + len(data.get("ended", ())) + (data.get("ended_more") or 0)


def _in_trouble(entry: Entry) -> bool:
    if entry.kind == "task":
        return entry.row.get("status") == "cancelling"
    # The cancelling tasks of a closed class are in the list; a closed group hides its own.
    return entry.kind == "group" and bool(entry.row.get("cancelling")) and not entry.open


def _has_cancelling(entry: Entry) -> bool:
    # Only the oldest of the cancelling tasks are in the list; behind them, their class has the others.
    return entry.kind == "class" and bool(entry.row.get("cancelling")) and not entry.open


def run(client: Source, *, ascii_only: bool = False, node: str | None = None) -> int:
    """Run the screen until the reader leaves it; return the exit code."""
    app = Top(client, ascii_only=ascii_only, silenced=Silenced(state_file()), node=node)
    result = app.run()
    return app.return_code or 0 if result is None else result
