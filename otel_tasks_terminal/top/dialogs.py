"""The dialogs: the keys, and the cancel of one task, whose target is fixed by its id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from otel_tasks_terminal import phrases
from otel_tasks_terminal.errors import CommandError, ExitCode
from otel_tasks_terminal.text import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from textual.app import ComposeResult

    from otel_tasks_terminal.client import Client
    from otel_tasks_terminal.top.look import Look

Row = dict[str, Any]

SAYS = {
    "cancelled": "The task was cancelled and has ended.",
    "requested": "The cancellation is requested. The task still runs: it cleans up, or ignores the request.",
    "ended": "The task had already ended. Nothing was cancelled.",
}


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
        with Vertical(classes="dialog"):
            yield Static(
                self._look.lines([[("Keys", "bold")], [], *lines, [], [("Esc closes this", "mute")]])
            )


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

    def __init__(self, client: Client, uid: str, name: str, look: Look, fresh: Callable[[], bool]) -> None:
        super().__init__()
        self._client = client
        self._uid = uid
        self._name_of_task = clean(name)
        self._look = look
        self._fresh = fresh

    def compose(self) -> ComposeResult:
        """Lay the question out; it can be answered once it is known what it is about."""
        with Vertical(classes="dialog"):
            yield Static(self._look.text([(f"Cancel {self._name_of_task}?", "bold")]))
            yield Static("", id="facts")
            yield Input(placeholder="reason, for the log and the trace", max_length=500, id="reason")
            yield Static("", id="answer")
            yield Button("Cancel this task", id="go", disabled=True, variant="error")
            yield Button("Close (Esc)", id="keep")

    def on_mount(self) -> None:
        """Look up what the task is now."""
        self.query_one("#keep").focus()
        self.run_worker(self._look_up, thread=True)

    def _look_up(self) -> None:
        self._call(lambda client: client.task(self._uid), self._describe)

    def _call(self, ask: Callable[[Client], Row], show: Callable[[Row], None]) -> None:
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
