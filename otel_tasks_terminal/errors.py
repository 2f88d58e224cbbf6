"""The exit codes, and the error that ends a command with one of them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended, for scripts. docs/howto/terminal.md lists them."""

    OK = 0
    NOTHING_DONE = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    PROTOCOL = 5
    STILL_RUNS = 6
    OUTPUT = 74
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


class CommandError(Exception):
    """Ends a command with one line on stderr.

    Args:
        code: The exit code.
        message: What went wrong, and what to do about it.
        retry_after: Seconds after which the server wants to be asked again.
    """

    def __init__(self, code: ExitCode, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


def usage(message: str) -> CommandError:
    """Make the error of a person who typed a command that cannot work."""
    return CommandError(ExitCode.USAGE, message)
