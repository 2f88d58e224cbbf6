"""Text for a terminal: what a service sends moves no cursor, changes no color, and fills no screen."""

from __future__ import annotations

import re
import time
import unicodedata
from typing import Any

# No name is longer in the feed; another server's could be.
MAX_TEXT = 120

_ESCAPES = re.compile(
    # An escape sequence is removed as a whole: its end ("[2J", a title) would stay as text otherwise.
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    # Operating system commands and other strings, up to their end.
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|$)"
    r"|\x1b[ -/]*[0-~]?"
)
# Line breaks and tabs are gaps between words.
_GAPS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
# Categories without a place on the screen: controls, format characters (those that turn the direction of the
# text among them), surrogates, private use, unassigned.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
_COMBINING = frozenset({"Mn", "Me"})
# More marks than this on one letter grow over the lines above and below.
_MAX_MARKS = 2

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def clean(value: object, limit: int = MAX_TEXT) -> str:
    """Return a text without anything that a terminal would act on, cut to ``limit`` characters."""
    text = str(value)
    # A long text is cut first: only the characters that can be shown are worth a look.
    if len(text) > 8 * limit:
        text = text[: 8 * limit]
    if not (text.isascii() and text.isprintable()):
        text = _GAPS.sub(" ", _ESCAPES.sub("", text))
        text = "".join(_seen(text))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _seen(text: str) -> list[str]:
    kept: list[str] = []
    marks = 0
    for char in text:
        category = unicodedata.category(char)
        if category in _UNSEEN:
            continue
        marks = marks + 1 if category in _COMBINING else 0
        if marks <= _MAX_MARKS:
            kept.append(char)
    return kept


def width(text: str) -> int:
    """Return how many cells a cleaned text takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _cells(char: str) -> int:
    if unicodedata.category(char) in _COMBINING:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def fit(text: str, cells: int, *, right: bool = False) -> str:
    """Cut a cleaned text to this many cells, or fill it up to them."""
    text = cut(text, cells)
    gap = " " * (cells - width(text))
    return gap + text if right else text + gap


def cut(text: str, cells: int) -> str:
    """Cut a cleaned text to this many cells; ``…`` marks what is missing."""
    if width(text) <= cells:
        return text
    if cells <= 0:
        return ""
    kept, used = "", 0
    for char in text:
        used += _cells(char)
        if used > cells - 1:
            break
        kept += char
    return kept + "…"


def number(value: float) -> str:
    """Return ``9,812``; a fraction keeps one digit below 10."""
    return f"{value:,.1f}" if value < 10 and value != int(value) else f"{value:,.0f}"


def counted(count: int, noun: str) -> str:
    """Return ``1 task``, ``3 tasks``."""
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def percent(fraction: float) -> str:
    """Return ``61 %``, rounded down: 100 % means done."""
    return f"{int(100 * min(1.0, max(0.0, fraction)))} %"


def duration(seconds: float) -> str:
    """Return a duration in few characters: ``0.4 s``, ``40 s``, ``12 m``, ``5 h``, ``3 d 4 h``."""
    seconds = max(0.0, seconds)
    if seconds < 0.95:
        return "0 s" if seconds < 0.05 else f"{seconds:.1f} s"
    if seconds < 100:
        return f"{max(1, int(seconds))} s"
    if seconds < 100 * _MINUTE:
        return f"{int(seconds // _MINUTE)} m"
    if seconds < 2 * _DAY:
        return f"{int(seconds // _HOUR)} h"
    return f"{int(seconds // _DAY)} d {int(seconds % _DAY // _HOUR)} h"


def fine(seconds: float) -> str:
    """Return a short duration with its milliseconds, such as that of a step of a cancellation."""
    if seconds < 0.95:
        return f"{seconds * 1000:.{1 if seconds < 0.01 else 0}f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)


def clock(epoch_seconds: float, *, milliseconds: bool = False) -> str:
    """Return the local time of day; with the date, if that is not today's."""
    try:
        moment, today = time.localtime(epoch_seconds), time.localtime()
    except (OverflowError, OSError, ValueError):
        # No time that this machine knows.
        return "?"
    text = time.strftime("%H:%M:%S" if moment[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", moment)
    return f"{text}.{int(epoch_seconds * 1000) % 1000:03d}" if milliseconds else text


def place(where: dict[str, Any]) -> str:
    """Return ``shop/pool.py:88``."""
    return f"{where.get('file')}:{where.get('line')}"


def short_place(where: dict[str, Any] | str) -> str:
    """Return ``pool.py:88``: the folder seldom tells more, and takes the room."""
    full = where if isinstance(where, str) else place(where)
    return re.split(r"[/\\]", full)[-1]
