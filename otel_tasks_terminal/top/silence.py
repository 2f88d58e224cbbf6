"""The silenced warnings: the kinds that the reader does not want to see, kept in a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Row = dict[str, Any]

MAX_FILE = 64 * 1024


class Silenced:
    """The silenced kinds.

    Args:
        file: Where they are kept; None keeps them for as long as the screen is open.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self.kinds = _read(file)

    def rest(self, warnings: Iterable[Row]) -> list[Row]:
        """Return the warnings that are shown."""
        return [warning for warning in warnings if warning.get("kind") not in self.kinds]

    def toggle(self, kind: str) -> None:
        """Silence a kind of warning, or show it again.

        Raises:
            OSError: The choice lasts only as long as the screen: its file cannot be written.
        """
        self.kinds ^= {kind}
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(sorted(self.kinds)), "utf-8")


def _read(file: Path | None) -> set[str]:
    """Read the kinds; a file that holds something else silences nothing."""
    try:
        if file is None or file.stat().st_size > MAX_FILE:
            return set()
        kinds = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        # There is none yet, it may not be read, or it is no JSON.
        return set()
    return {kind for kind in kinds if isinstance(kind, str)} if isinstance(kinds, list) else set()


def state_file(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return where the choice of this user is kept; None without a home directory."""
    base = environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_STATE_HOME", "")
    if not os.path.isabs(base):
        # A relative path is ignored: https://specifications.freedesktop.org/basedir-spec/
        home = environ.get("HOME")
        base = os.path.join(home, ".local", "state") if home else ""
    return Path(base) / "otel-tasks" / "silenced.json" if base else None
