"""The files of the page: its markup, scripts, style, and icon, as they are sent.

They are compressed once, when a browser first wants them so: they hold nothing of a client, so their sizes
tell nothing. They are not cached by browsers, although they would be harmless there: a page of one version
never runs scripts of another one, and each look asks ``auth``.
"""

from __future__ import annotations

import gzip
import re
from functools import cache
from importlib.resources import files
from typing import Final

from starlette.responses import Response

PAGE: Final = "page.html"
_MEDIA_TYPES: Final = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "svg": "image/svg+xml",
}
_NEVER = re.compile(r"q=0(\.0{0,3})?")


@cache
def parts() -> tuple[str, ...]:
    """The names of the files that the page loads."""
    names = sorted(each.name for each in (files("otel_tasks.live") / "assets").iterdir())
    return tuple(name for name in names if name.rpartition(".")[2] in _MEDIA_TYPES and name != PAGE)


def answer(name: str, accepted: str) -> Response:
    """Answer with a file.

    Args:
        name: Its name.
        accepted: The value of Accept-Encoding.
    """
    headers = {"Vary": "Accept-Encoding"}
    compress = accepts_gzip(accepted)
    if compress:
        headers["Content-Encoding"] = "gzip"
    body = _compressed(name) if compress else _read(name)
    return Response(body, headers=headers, media_type=_MEDIA_TYPES[name.rpartition(".")[2]])


def accepts_gzip(accepted: str) -> bool:
    """True if this Accept-Encoding allows gzip (RFC 9110, section 12.5.3)."""
    weights: dict[str, str] = {}
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        weights[coding.strip()] = weight.replace(" ", "")
    weight = weights.get("gzip", weights.get("*", "q=0"))
    return _NEVER.fullmatch(weight) is None


@cache
def _read(name: str) -> bytes:
    return (files("otel_tasks.live") / "assets" / name).read_bytes()


@cache
def _compressed(name: str) -> bytes:
    # Without a time of its own, so that each process sends the same bytes.
    return gzip.compress(_read(name), mtime=0)
