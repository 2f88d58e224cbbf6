"""A queue that survives a crash and needs no broker: a folder in which each job is a file.

The worker's tests count these files. For a real queue, see "Use a broker's client" in docs/howto/worker.md.
"""

import asyncio
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One file: its name, and what it contains."""

    id: str
    order: dict[str, Any]


class Spool:
    """Jobs in four folders: `new`, `active`, `done`, and `dead`. It has many producers, and one worker.

    A job moves by renaming its file, which is atomic: it is always in exactly one folder, whatever ends the
    process. The calls block the event loop, for microseconds on a local disk.

    Args:
        folder: Where the folders are, or will be.
        poll: Seconds between two looks at an empty spool.
    """

    def __init__(self, folder: Path, poll: float = 0.1) -> None:
        self._poll = poll
        self._folders = {name: folder / name for name in ("new", "active", "done", "dead", "tmp")}
        for path in self._folders.values():
            path.mkdir(parents=True, exist_ok=True)
        # The names in `new` that the last look has found, newest first.
        self._seen: list[str] = []

    def submit(self, order: dict[str, Any]) -> str:
        """Add a job; return its id. Ids sort by age."""
        number = uuid.uuid4().hex[:8]
        made = self._folders["tmp"] / number
        with made.open("w", encoding="utf-8") as file:
            json.dump(order, file)
            file.flush()
            os.fsync(file.fileno())
        id = f"{made.stat().st_mtime_ns}-{number}"
        # A worker never sees half a file.
        made.rename(self._folders["new"] / id)
        return id

    def recover(self) -> int:
        """Return jobs to `new` that a worker had taken when it crashed; return how many.

        Such a job runs again, perhaps for the second time: a job must tolerate that, with any queue.
        """
        crashed = list(self._folders["active"].iterdir())
        for path in crashed:
            path.rename(self._folders["new"] / path.name)
        return len(crashed)

    # What a consumer calls: get() for the next job, and put_nowait() for one that it hands back.

    async def get(self) -> Job:
        """Wait for the oldest job and take it. No await follows the taking: a cancellation loses no job."""
        while (job := self._take()) is None:  # noqa: ASYNC110 -- other processes add the files
            await asyncio.sleep(self._poll)
        return job

    def put_nowait(self, job: Job) -> None:
        """Put a job back that was taken."""
        self._move(job, "new")

    def qsize(self) -> int:
        """How many jobs wait."""
        return len(list(self._folders["new"].iterdir()))

    # The handler finishes a job itself, as its last step: that is how a queue learns which one it was.

    def finish(self, job: Job) -> None:
        """Move a job that was handled to `done`."""
        self._move(job, "done")

    def bury(self, job: Job) -> None:
        """Move a job that has failed for good to `dead`."""
        self._move(job, "dead")

    def _take(self) -> Job | None:
        if not self._seen:
            self._seen = sorted((path.name for path in self._folders["new"].iterdir()), reverse=True)
        while self._seen:
            id = self._seen.pop()
            active = self._folders["active"] / id
            try:
                (self._folders["new"] / id).rename(active)
            except FileNotFoundError:
                # Someone has removed it since the last look.
                continue
            return Job(id, read(active))
        return None

    def _move(self, job: Job, folder: str) -> None:
        (self._folders["active"] / job.id).rename(self._folders[folder] / job.id)


def read(path: Path) -> dict[str, Any]:
    """Return the order in a file. A file that holds none gives an order without fields, which fails."""
    try:
        order = json.loads(path.read_text("utf-8"))
    except ValueError:
        return {}
    return order if isinstance(order, dict) else {}
