"""``otel-tasks top``: the live view as a screen of the terminal, with the keys of the page, on Textual."""

from otel_tasks_terminal.top.app import run

__all__ = ["run"]
