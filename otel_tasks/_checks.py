"""What the arguments of more than one layer have to be, and what to say where they are not."""

from __future__ import annotations


def checked_seconds(what: str, seconds: float | None) -> float | None:
    """Give back a duration; infinity becomes None, without bound.

    Raises:
        TypeError: It is not a number.
        ValueError: It is negative or not a number at all (NaN).
    """
    if seconds is None or seconds == float("inf"):
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise TypeError(f"{what} must be seconds as a number, or None for no bound, got {seconds!r}")
    if not seconds >= 0:
        raise ValueError(f"{what} must be at least 0 seconds, got {seconds!r}")
    return float(seconds)
