"""The guard: which requests the live view answers, before anything else looks at them.

Flower, Ray, Prefect, Sidekiq, and rq-dashboard each had a security advisory for lack of one of these rules:

1. Without authentication, only loopback clients whose Host is a local name (DNS rebinding), and nothing that
   has come through a proxy.
2. A request that changes something comes from the page itself, or has a bearer token: a form or a script of
   another site can do neither.
3. No other site reads anything, whatever an application allows with CORS. Only the page itself may be opened
   by a link.
4. Every answer has the headers below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}

# Headers that proxies add. Behind a proxy on the same machine, every client looks local.
_FORWARDED = frozenset(
    {
        "forwarded",
        "via",
        "x-real-ip",
        "x-client-ip",
        "x-original-host",
        "true-client-ip",
        "cf-connecting-ip",
        "cdn-loop",
    }
)
_FORWARDED_PREFIX = "x-forwarded-"

# A name or an address, and perhaps a port: nothing that another parser could read in another way.
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)


class Refused(Exception):
    """A request is refused.

    Attributes:
        status: The status of the answer.
        code: For programs.
        message: For people.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


@dataclass(frozen=True, slots=True)
class Caller:
    """What the guard knows of a request.

    Attributes:
        method: Its method.
        headers: Its headers; names in lower case.
        client: The address of the client; None if it has none (a Unix socket).
        is_page: It asks for the page, which a link may open.
        http_version: The version of HTTP.
    """

    method: str
    headers: Mapping[str, str]
    client: str | None
    is_page: bool
    http_version: str = "1.1"


def check(caller: Caller, *, insecure: bool, hosts: Collection[str]) -> None:
    """Check a request before its authentication.

    Args:
        caller: The request.
        insecure: The view has no authentication.
        hosts: Names beside the local ones that Host may have, if it is insecure.

    Raises:
        Refused: It is refused.
    """
    if insecure:
        _check_local(caller, hosts)
    if caller.method in ("GET", "HEAD"):
        _check_reader(caller)
    else:
        _check_writer(caller)


def _check_local(caller: Caller, hosts: Collection[str]) -> None:
    if not _is_loopback(caller.client) or _is_forwarded(caller):
        raise Refused(
            403,
            "forbidden_client",
            "this view has no authentication, and answers clients on this machine alone: "
            "write live_view(auth=Depends(...)) to reach it from elsewhere",
        )
    host = host_name(caller.headers.get("host", ""))
    if host not in LOCAL_HOSTS and host not in hosts:
        raise Refused(
            403,
            "forbidden_host",
            f"host {host[:80]!r} is not allowed: open http://localhost, or list it in live_view(hosts=...)",
        )


def _check_reader(caller: Caller) -> None:
    site = caller.headers.get("sec-fetch-site")
    if site is None:
        # Over plain HTTP, browsers send it to local names alone; a script of another site has an Origin then.
        allowed = "origin" not in caller.headers or _is_own_origin(caller)
    else:
        allowed = site in ("same-origin", "none")
    if allowed:
        return
    if not (caller.is_page and caller.headers.get("sec-fetch-mode") == "navigate"):
        raise Refused(403, "cross_site", "another site must not read this")


def _check_writer(caller: Caller) -> None:
    site = caller.headers.get("sec-fetch-site")
    if site is not None:
        allowed = site == "same-origin"
    elif "origin" in caller.headers:
        allowed = _is_own_origin(caller)
    else:
        # Not a browser. A token shows that the request was meant: `auth` decides what it is worth.
        scheme, _, token = caller.headers.get("authorization", "").partition(" ")
        allowed = scheme.lower() == "bearer" and bool(token.strip())
    if not allowed:
        raise Refused(
            403,
            "cross_site",
            "only the page itself may do this; a program sends 'Authorization: Bearer ...'",
        )


def host_name(host: str) -> str:
    """The name in a Host header, without the port; empty if it is none."""
    match = _HOST.fullmatch(host)
    return "" if match is None else match[1].strip("[]").lower()


def _is_own_origin(caller: Caller) -> bool:
    _, _, origin = caller.headers["origin"].partition("://")
    return origin.lower() == caller.headers.get("host", "").lower() != ""


def _is_forwarded(caller: Caller) -> bool:
    """True for a request that has come through a proxy, as far as it shows.

    Before 1.29.7, nginx passes requests on with HTTP/1.0 and a local Host, and adds no header
    (https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_http_version). No browser speaks it.
    """
    return caller.http_version == "1.0" or any(
        name in _FORWARDED or name.startswith(_FORWARDED_PREFIX) for name in caller.headers
    )


def _is_loopback(client: str | None) -> bool:
    if client is None:
        return False
    try:
        address = ip_address(client)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (address if mapped is None else mapped).is_loopback
