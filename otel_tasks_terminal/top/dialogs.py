"""The dialogs: the keys, the warnings, and the cancel of one task, whose target is fixed by its id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Static

from otel_tasks_terminal import phrases
from otel_tasks_terminal.errors import CommandError, ExitCode
from otel_tasks_terminal.text import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.text import Text
    from textual.app import ComposeResult

    from otel_tasks_terminal.model import Model
    from otel_tasks_terminal.source import Source
    from otel_tasks_terminal.top.look import Look
    from otel_tasks_terminal.top.silence import Silenced

Row = dict[str, Any]

SAYS = {
    "cancelled": "The task was cancelled and has ended.",
    "requested": "The cancellation is requested. The task still runs: it cleans up, or ignores the request.",
    "ended": "The task had already ended. Nothing was cancelled.",
}


class Dialog(VerticalScroll, can_focus=False):
    """A frame with a title. It scrolls where the terminal is lower than its content.

    Args:
        title: What it is.
        hint: How to close it.
    """

    def __init__(self, title: str, hint: str) -> None:
        super().__init__(classes="dialog")
        self.border_title = title
        self.border_subtitle = hint


class Help(ModalScreen[None]):
    """Shows the keys."""

    BINDINGS: ClassVar[list[Any]] = [("escape,question_mark,q,enter", "dismiss", "Close")]

    def __init__(self, keys: list[tuple[str, str]], look: Look) -> None:
        super().__init__()
        self._keys = keys
        self._look = look

    def compose(self) -> ComposeResult:
        """Lay the keys out."""
        lines = [[(f"{key:<8}", "bold"), (says, None)] for key, says in self._keys]
        with Dialog("Keys", "Esc closes this"):
            yield Static(self._look.lines(lines))


class Warnings(ModalScreen[Row | None]):
    """Shows all warnings, and silences kinds of them; its result is the one whose tasks are to be listed.

    Args:
        model: What is known.
        silenced: The silenced kinds.
        look: How text is drawn.
    """

    BINDINGS: ClassVar[list[Any]] = [
        ("escape,exclamation_mark,q", "dismiss", "Close"),
        ("j", "move('down')", "Next"),
        ("k", "move('up')", "Previous"),
        ("space", "turn", "Silence"),
    ]

    def __init__(self, model: Model, silenced: Silenced, look: Look) -> None:
        super().__init__()
        self._model = model
        self._silenced = silenced
        self._look = look
        # A kind without a warning now is there too: it can be shown again.
        now = {str(warning.get("kind")) for warning in model.warnings}
        self._rows = [*model.warnings, *({"kind": kind} for kind in sorted(silenced.kinds - now))]

    def compose(self) -> ComposeResult:
        """Lay the warnings out."""
        keys = "space silences a kind, or shows it again; Enter lists its tasks" if self._rows else "none now"
        with Dialog("Warnings", "Esc closes this"):
            yield OptionList(*map(self._line, self._rows))
            yield Static(self._look.text([(keys, "mute")]))

    def _line(self, warning: Row) -> Text:
        kind = str(warning.get("kind"))
        hidden = kind in self._silenced.kinds
        words = clean(kind).replace("_", " ")
        text = phrases.warning(warning, self._model.now()) if "count" in warning else f"{words} · none now"
        return self._look.text(
            [(f"{'silenced' if hidden else '!':<9} ", "mute" if hidden else "cancel"), (text, None)]
        )

    def action_move(self, step: str) -> None:
        """Go to another warning."""
        rows = self.query_one(OptionList)
        rows.action_cursor_down() if step == "down" else rows.action_cursor_up()

    def action_turn(self) -> None:
        """Silence the kind of the selected warning, or show it again."""
        rows = self.query_one(OptionList)
        if rows.highlighted is None:
            return
        try:
            self._silenced.toggle(str(self._rows[rows.highlighted].get("kind")))
        except OSError as error:
            self.notify(f"kept until this screen closes: {clean(error)}", severity="warning", markup=False)
        for index, row in enumerate(self._rows):
            rows.replace_option_prompt_at_index(index, self._line(row))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """List the tasks behind a warning."""
        self.dismiss(self._rows[event.option_index])


class Cancel(ModalScreen[None]):
    """Asks whether one task is to be cancelled, and shows the answer.

    Args:
        client: The connection.
        uid: The task.
        name: Its name, for the title.
        look: How text is drawn.
        fresh: Whether what is known is not old.
    """

    BINDINGS: ClassVar[list[Any]] = [("escape", "dismiss", "Close")]

    def __init__(self, client: Source, uid: str, name: str, look: Look, fresh: Callable[[], bool]) -> None:
        super().__init__()
        self._client = client
        self._uid = uid
        self._name_of_task = clean(name)
        self._look = look
        self._fresh = fresh

    def compose(self) -> ComposeResult:
        """Lay the question out; it can be answered once it is known what it is about."""
        with Dialog("Cancel a task", "Esc closes this"):
            yield Static(self._look.text([(f"Cancel {self._name_of_task}?", "bold")]))
            yield Static("", id="facts")
            yield Input(placeholder="reason, for the log and the trace", max_length=500, id="reason")
            yield Static("", id="answer")
            yield Button("Cancel this task", id="go", disabled=True, variant="error")
            yield Button("Close", id="keep")

    def on_mount(self) -> None:
        """Look up what the task is now."""
        self.query_one("#keep").focus()
        self.run_worker(self._look_up, thread=True)

    def _look_up(self) -> None:
        self._call(lambda client: client.task(self._uid), self._describe)

    def _call(self, ask: Callable[[Source], Row], show: Callable[[Row], None]) -> None:
        """Ask in this thread, and show the answer in that of the screen."""
        client = self._client.fresh()
        try:
            answer = ask(client)
        except CommandError as error:
            gone = error.code is ExitCode.NOTHING_DONE
            self.app.call_from_thread(self._say, SAYS["ended"] if gone else str(error))
        else:
            self.app.call_from_thread(show, answer)
        finally:
            client.close()

    def _describe(self, answer: Row) -> None:
        task = answer.get("task", {})
        facts = [
            ("id", clean(task.get("task_id", "?"), 200)),
            ("group", " / ".join(clean(name) for name in answer.get("path", ())[:-1])),
            ("now", phrases.doing(task, answer.get("now", 0.0)) or clean(task.get("status"))),
            ("also ends", phrases.also_ended(answer.get("children") or 0)),
        ]
        lines = [[(f"{term:<11}", "mute"), (value, None)] for term, value in facts]
        if not self.is_mounted:
            return
        self.query_one("#facts", Static).update(self._look.lines(lines))
        if answer.get("state") == "ended":
            self._say(SAYS["ended"])
        elif "cancel" not in answer.get("can", ()):
            self._say("You may not cancel this task.")
        else:
            go = self.query_one("#go", Button)
            go.disabled = False
            go.focus()

    def _say(self, text: str) -> None:
        if self.is_mounted:
            self.query_one("#answer", Static).update(self._look.text([(text, "cancel")]))

    def on_input_submitted(self) -> None:
        """Go on to the button: Enter in a text must not cancel anything."""
        self.query_one("#go").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Send the request, or close."""
        if event.button.id == "keep":
            self.dismiss()
            return
        if not self._fresh():
            self._say("The server does not answer: the task may have changed. Nothing was sent.")
            return
        event.button.disabled = True
        self._say("...")
        reason = self.query_one("#reason", Input).value.strip() or None
        self.query_one("#keep").focus()

        def send() -> None:
            self._call(lambda client: client.cancel(self._uid, reason), self._report)

        self.run_worker(send, thread=True)

    def _report(self, answer: Row) -> None:
        self._say(SAYS.get(str(answer.get("result")), clean(answer.get("result"))))
