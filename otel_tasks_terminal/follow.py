"""Following: one unbroken sequence of events, over streams that end or break off, and over restarts."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NamedTuple

from otel_tasks_terminal.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from otel_tasks_terminal.source import Event, Pairs, Source

MAX_WAIT = 10.0


class Lost(NamedTuple):
    """The connection is lost: what is shown gets old.

    Attributes:
        message: Why.
        wait: Seconds until the next attempt.
    """

    message: str
    wait: float


class Follower:
    """Follows the events of one live view.

    Args:
        client: The connection.
        wanted: Returns what is wanted besides the overview, ``expand`` and ``task``. A change opens a new
            stream.
        patient: Whether a server that cannot be reached at first is waited for.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        client: Source,
        *,
        wanted: Callable[[], Pairs] = list,
        patient: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._wanted = wanted
        self._patient = patient
        self._sleep = sleep
        self._viewer = f"terminal-{random.getrandbits(64):016x}"  # a name, not a secret
        self._after: str | None = None
        self._failures = 0
        # Set by another thread, and read between two events.
        self._over = False

    def updates(self) -> Generator[Event | Lost, None, None]:
        """Yield the events in their order, and a ``Lost`` for each attempt that fails.

        A delta is only yielded if it continues what was yielded before; otherwise, a snapshot comes.

        Raises:
            CommandError: The first attempt fails, or the view refuses this client.
        """
        while True:
            pause = 0.0
            try:
                pause = yield from self._stream()
            except CommandError as error:
                if not self._may_retry(error):
                    raise
                pause = self._pause(error)
                yield Lost(str(error), pause)
            if pause:
                self._sleep(pause)

    def start_over(self) -> None:
        """Let the next stream begin with a snapshot."""
        self._over = True

    def _may_retry(self, error: CommandError) -> bool:
        if error.code is ExitCode.UNREACHABLE and self._patient:
            return True
        # A proxy may answer anything while the process behind it restarts.
        return self._after is not None and error.code in (ExitCode.UNREACHABLE, ExitCode.PROTOCOL)

    def _pause(self, error: CommandError) -> float:
        self._failures += 1
        if error.retry_after is not None:
            return min(error.retry_after, MAX_WAIT)
        # Not all viewers of a restarted service come back at the same moment.
        return min(MAX_WAIT, 0.5 * 2.0 ** min(self._failures, 8)) * random.uniform(0.75, 1.25)  # noqa: S311  # jitter

    def _stream(self) -> Generator[Event, None, float]:
        """Read one stream; return the seconds to wait for the next one."""
        wanted = self._wanted()
        pairs = [("viewer", self._viewer), *wanted]
        if self._after is not None:
            pairs.append(("after", self._after))
        for event in self._client.events(pairs):
            self._failures = 0
            if self._over:
                self._over, self._after = False, None
                return 0.0
            if event.name == "bye":
                return 0.0 if event.data.get("reason") == "lifetime" else 1.0
            if event.name == "delta" and event.data.get("base") != self._after:
                self._after = None
                return 0.0
            if event.name == "resync":
                # The snapshot that follows replaces everything; until then, what is shown stays.
                continue
            if event.name in ("snapshot", "delta"):
                self._after = event.data.get("id")
            yield event
            if self._wanted() != wanted:
                return 0.0
        raise CommandError(ExitCode.UNREACHABLE, f"{self._client.address} ended the stream")
