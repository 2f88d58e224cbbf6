"""The reader: the feed in a thread of its own, whose events become messages of the screen."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from textual.message import Message

from otel_tasks_terminal.errors import CommandError
from otel_tasks_terminal.follow import Follower, Lost

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks_terminal.source import Event, Pairs, Source

# Seconds without a tick, one each second, after which the server counts as gone.
SILENCE = 5.0


class Arrived(Message):
    """An event of the feed."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.event = event


class Away(Message):
    """The connection is lost, and will be tried again."""

    def __init__(self, lost: Lost) -> None:
        super().__init__()
        self.lost = lost


class Refused(Message):
    """The view refuses this client: there is nothing to wait for."""

    def __init__(self, error: CommandError) -> None:
        super().__init__()
        self.error = error


class Reader:
    """Reads the feed until it is stopped.

    Args:
        client: Makes the connection.
        post: Takes the messages, from another thread.
    """

    def __init__(self, client: Source, post: Callable[[Message], object]) -> None:
        self._post = post
        self._stopped = threading.Event()
        # Replaced as a whole by the screen, and read by the thread.
        self.wanted: Pairs = []
        self._client = client.fresh(timeout=SILENCE)
        self._follower = Follower(self._client, wanted=lambda: self.wanted, patient=True, sleep=self._sleep)
        # A daemon: it may be waiting for a connection when the screen closes.
        self._thread = threading.Thread(target=self._run, name="otel-tasks feed", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Post no further message, and end."""
        self._stopped.set()
        self._client.interrupt()
        self._thread.join(timeout=1.0)

    def start_over(self) -> None:
        """Let the next stream begin with everything."""
        self._follower.start_over()

    def _sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def _run(self) -> None:
        try:
            for update in self._follower.updates():
                if self._stopped.is_set():
                    return
                self._post(Away(update) if isinstance(update, Lost) else Arrived(update))
        except CommandError as error:
            if not self._stopped.is_set():
                self._post(Refused(error))
        finally:
            self._client.close()
