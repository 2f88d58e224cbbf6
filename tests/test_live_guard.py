"""The guard of the live view: which requests it refuses, before anything else looks at them."""

from __future__ import annotations

import pytest

from otel_tasks.live.guard import Caller, Refused, check, host_name

LOCAL = {"host": "localhost:8000"}
PAGE = {"sec-fetch-site": "same-origin"}


def refusal(
    method: str = "GET",
    headers: dict[str, str] | None = None,
    client: str | None = "127.0.0.1",
    *,
    is_page: bool = False,
    insecure: bool = False,
) -> str | None:
    """The code of the refusal; None if the request passes."""
    caller = Caller(method, LOCAL if headers is None else headers, client, is_page)
    try:
        check(caller, insecure=insecure, hosts={"tasks.internal"})
    except Refused as refused:
        return refused.code if refused.status == 403 else f"{refused.status}"
    return None


@pytest.mark.parametrize(
    ("client", "code"),
    [
        ("127.0.0.1", None),
        ("127.8.0.1", None),
        ("::1", None),
        ("::ffff:127.0.0.1", None),
        ("10.0.0.7", "forbidden_client"),
        ("::ffff:10.0.0.7", "forbidden_client"),
        ("testclient", "forbidden_client"),
        (None, "forbidden_client"),
    ],
)
def test_without_authentication_only_this_machine_is_answered(client: str | None, code: str | None) -> None:
    """A client with another address, or with none, is refused."""
    assert refusal(client=client, insecure=True) == code
    assert refusal(client=client) is None


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost", None),
        ("LOCALHOST:8000", None),
        ("127.0.0.1:8000", None),
        ("[::1]:8000", None),
        ("tasks.internal", None),
        ("evil.example", "forbidden_host"),
        ("localhost.evil.example", "forbidden_host"),
        ("127.0.0.1.evil.example:80", "forbidden_host"),
        ("user@evil.example", "forbidden_host"),
        ("evil.example@localhost", "forbidden_host"),
        ("localhost/evil.example", "forbidden_host"),
        ("localhost#evil.example", "forbidden_host"),
        ("localhost:evil.example", "forbidden_host"),
        ("localhost.", "forbidden_host"),
        ("127.0.0.1.nip.io", "forbidden_host"),
        ("0.0.0.0", "forbidden_host"),
        ("[::1", "forbidden_host"),
        ("", "forbidden_host"),
    ],
)
def test_without_authentication_only_local_names_are_answered(host: str, code: str | None) -> None:
    """A name that an attacker has bound to 127.0.0.1 is refused (DNS rebinding)."""
    assert refusal(headers={"host": host}, insecure=True) == code


@pytest.mark.parametrize(
    "header",
    [
        "x-forwarded-for",
        "forwarded",
        "x-real-ip",
        "via",
        "x-forwarded-host",
        "x-forwarded-proto",
        "cf-connecting-ip",
        "x-client-ip",
    ],
)
def test_without_authentication_no_proxy_is_in_between(header: str) -> None:
    """Behind a proxy on this machine, every client looks local."""
    assert refusal(headers={**LOCAL, header: "127.0.0.1"}, insecure=True) == "forbidden_client"
    assert refusal(headers={**LOCAL, header: "10.0.0.7"}) is None


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"sec-fetch-site": "same-origin"}, None),
        ({"sec-fetch-site": "same-site"}, "cross_site"),
        ({"sec-fetch-site": "cross-site"}, "cross_site"),
        ({"sec-fetch-site": "none"}, "cross_site"),
        # The header of a browser counts more than what else is there.
        ({"sec-fetch-site": "cross-site", "authorization": "Bearer x"}, "cross_site"),
        ({"sec-fetch-site": "cross-site", "origin": "http://localhost:8000"}, "cross_site"),
        ({"origin": "http://localhost:8000"}, None),
        ({"origin": "http://localhost:9000"}, "cross_site"),
        ({"origin": "http://evil.example"}, "cross_site"),
        ({"origin": "null"}, "cross_site"),
        ({"origin": "http://evil.example", "authorization": "Bearer x"}, "cross_site"),
        ({"authorization": "Bearer x"}, None),
        ({"authorization": "bearer x"}, None),
        ({"authorization": "Bearer "}, "cross_site"),
        ({"authorization": "Basic eA=="}, "cross_site"),
        ({"cookie": "session=1"}, "cross_site"),
        ({}, "cross_site"),
    ],
)
def test_changes_come_from_the_page_or_with_a_token(headers: dict[str, str], code: str | None) -> None:
    """A form or a script of another site can neither name this origin nor send a token."""
    for method in ("POST", "PUT", "DELETE", "PATCH", "QUERY"):
        assert refusal(method, {**LOCAL, **headers}) == code


def test_missing_host_is_no_origin() -> None:
    """Without a Host, no Origin equals it."""
    assert refusal("POST", {"origin": "http://"}) == "cross_site"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_read_nothing(site: str) -> None:
    """JSON and stream are refused to another site, whatever CORS allows; a link may open the page."""
    headers = {**LOCAL, "sec-fetch-site": site}
    assert refusal(headers=headers) == "cross_site"
    assert refusal(headers={**headers, "sec-fetch-mode": "navigate"}) == "cross_site"
    assert refusal(headers={**headers, "sec-fetch-mode": "navigate"}, is_page=True) is None
    assert refusal(headers={**headers, "sec-fetch-mode": "cors"}, is_page=True) == "cross_site"


def test_without_authentication_http_1_0_is_a_proxy() -> None:
    """nginx's default: a local client, a local Host, and no header that tells of the client."""
    caller = Caller("GET", LOCAL, "127.0.0.1", is_page=True, http_version="1.0")
    with pytest.raises(Refused, match="authentication"):
        check(caller, insecure=True, hosts=())
    check(caller, insecure=False, hosts=())


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:9000", "null", ""])
def test_other_origins_read_nothing_over_plain_http(origin: str) -> None:
    """To a remote name without TLS, browsers send no Sec-Fetch-Site, but an Origin."""
    assert refusal(headers={**LOCAL, "origin": origin}) == "cross_site"
    assert refusal(headers={**LOCAL, "origin": "http://localhost:8000"}) is None


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_the_page_and_a_person_read(site: str) -> None:
    """The page's own requests pass, and an address that a person has typed."""
    assert refusal(headers={**LOCAL, "sec-fetch-site": site}) is None


@pytest.mark.parametrize(("host", "name"), [("A.b:80", "a.b"), ("[::1]:80", "::1"), ("[", ""), ("", "")])
def test_host_name(host: str, name: str) -> None:
    """The name is in lower case, and without the port."""
    assert host_name(host) == name
