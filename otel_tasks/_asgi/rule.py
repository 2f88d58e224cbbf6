"""Rules: which handlers a disconnect cancels, and what happens to a request's tasks at its end."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from otel_tasks._core.checks import check_choice, checked_finite_seconds
from otel_tasks._core.log import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from otel_tasks._asgi.connection import Scope

CancelHandler: TypeAlias = "str | bool | Callable[[Scope], bool]"
OnExit = Literal["cancel", "wait", "detach"]

# Methods without side effects (RFC 9110, 9.2.1, and the QUERY draft): a cancelled handler leaves nothing half
# done.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY"})
# WS stands for a WebSocket. Others exist, such as PURGE and PROPFIND.
KNOWN_METHODS = SAFE_METHODS | {"WS", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "TRACE"}
# None stands for any method.
_METHODS_OF: dict[str, frozenset[str] | None] = {"safe": SAFE_METHODS, "all": None, "none": frozenset()}

GRAMMAR = (
    'a rule is entries with commas between them, each "safe", "all", "none", or "[METHOD[|METHOD...]] PATH"; '
    "a path starts with / or *, * is any characters, and ! before an entry makes it an exception, as in "
    '"safe, POST /v1/*, !POST /v1/batches*"'
)
# In a route's template.
_PARAMETER = re.compile(r"{[^}]*}")
_METHOD = r"[A-Za-z-]+"
_match_entry = re.compile(
    rf"(?P<exception>!?)\s*"
    rf"(?:(?P<word>{'|'.join(_METHODS_OF)})"
    rf"|(?:(?P<methods>{_METHOD}(?:\|{_METHOD})*)\s+)?(?P<path>[/*]\S*))"
).fullmatch


class Rules(NamedTuple):
    """The options that a middleware inside of another one decides for its part of the application."""

    cancel_handler: bool | TextRule | Callable[[Scope], bool]
    grace: float
    on_exit: OnExit

    def cancels_handler(self, scope: Scope, decision: bool | None) -> bool:
        """Return True if a disconnect cancels the handler of a request.

        Args:
            scope: The request's, as its outermost middleware got it; routing may have added to it since.
            decision: The request's own, which takes precedence; None if it has made none.
        """
        rule = self.cancel_handler if decision is None else decision
        return rule if isinstance(rule, bool) else _apply(rule, scope)


def checked_rules(cancel_handler: CancelHandler, grace: float, on_exit: OnExit) -> Rules:
    """Check the options of a ``TaskGroupMiddleware`` that make up its rules.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range, or the text of ``cancel_handler`` has a bad entry.
    """
    check_choice("on_exit", on_exit, OnExit)
    return Rules(checked_cancel_handler(cancel_handler), checked_finite_seconds("grace", grace), on_exit)


def checked_cancel_handler(rule: CancelHandler) -> bool | TextRule | Callable[[Scope], bool]:
    """Return a rule, a text as a ``TextRule``.

    Raises:
        TypeError: It has the wrong type, or is a coroutine function.
        ValueError: It is a text with a bad entry.
    """
    check_plain_function("cancel_handler", rule)
    if isinstance(rule, str):
        return TextRule(rule)
    if isinstance(rule, bool) or callable(rule):
        return rule
    raise TypeError(
        f'cancel_handler must be True, False, a rule such as "safe", or a function of the scope, got {rule!r}'
    )


def check_plain_function(option: str, value: object) -> None:
    """Raise a TypeError if the value of an option is a coroutine function."""
    if inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(type(value).__call__):
        raise TypeError(
            f"{option} must be a plain function of the scope, got the coroutine function {value!r}: "
            "it is called where nothing can be awaited, write it with def"
        )


class TextRule:
    """A rule as text: a handler is cancelled if an entry matches its request, and no exception does.

    The order of the entries does not matter.

    Raises:
        ValueError: An entry is bad, or there are only exceptions.
    """

    __slots__ = ("_entries", "_exceptions", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._entries: list[Entry] = []
        self._exceptions: list[Entry] = []
        for part in text.split(","):
            is_exception, entry = _parsed(part.strip())
            (self._exceptions if is_exception else self._entries).append(entry)
        if not self._entries:
            raise ValueError(f"cancel_handler={text!r} has only exceptions: {GRAMMAR}")

    def __call__(self, scope: Scope) -> bool:
        """Return True if the handler of the request is cancelled."""
        request = (method_of(scope), _path_below_root(scope))
        return any(entry.matches(*request) for entry in self._entries) and not any(
            entry.matches(*request) for entry in self._exceptions
        )

    def missing(self, scope: Scope) -> str | None:
        """Say what of a request that is not cancelled no entry names; None if an exception names it."""
        method, path = method_of(scope), _path_below_root(scope)
        if any(entry.matches(method, path) for entry in self._exceptions):
            return None
        return "path" if any(entry.has_method(method) for entry in self._entries) else "method"

    def with_route(self, route: str, scope: Scope) -> str:
        """Return the text of a rule that names a route as well.

        Args:
            route: ``METHOD /route/{template}``, or the method alone.
            scope: That of a request of the route.
        """
        method, _, template = route.partition(" ")
        path = _PARAMETER.sub("*", template) or "*"
        if _path_matcher(path)(_path_below_root(scope)) is None:
            # The template of a route in a mounted application is without the prefix.
            path = f"*{path}"
        return f"{self._text}, {method} {path}"

    def __repr__(self) -> str:
        return repr(self._text)


class Entry(NamedTuple):
    """One entry of a rule; None stands for any method, or any path."""

    methods: frozenset[str] | None
    match_path: Callable[[str], Any] | None

    def matches(self, method: str, path: str) -> bool:
        """Return True if a request is one of those that the entry is about."""
        return self.has_method(method) and (self.match_path is None or self.match_path(path) is not None)

    def has_method(self, method: str) -> bool:
        """Return True if requests with this method may be among them."""
        return self.methods is None or method in self.methods


def method_of(scope: Scope) -> str:
    """Return the method of a request; ``WS`` for a WebSocket."""
    method: str = "WS" if scope["type"] == "websocket" else scope["method"]
    return method


def _parsed(text: str) -> tuple[bool, Entry]:
    """Return whether an entry is an exception, and the entry."""
    found = _match_entry(text)
    if found is None or (found["exception"] and found["word"] in ("all", "none")):
        raise ValueError(f"cancel_handler has a bad entry, {text!r}: {GRAMMAR}")
    if found["word"]:
        entry = Entry(_METHODS_OF[found["word"]], None)
    else:
        methods = frozenset(found["methods"].upper().split("|")) if found["methods"] else None
        _check_spelling(text, methods or ())
        entry = Entry(methods, _path_matcher(found["path"]))
    return bool(found["exception"]), entry


def _check_spelling(text: str, methods: Iterable[str]) -> None:
    # A method that is not known may exist, so only a name close to a known one is an error.
    for method in methods:
        meant = ["WS"] if method == "WEBSOCKET" else _likely_methods(method)
        if method not in meant:
            raise ValueError(f"cancel_handler has a bad entry, {text!r}: did you mean {meant[0]}?")


def _likely_methods(method: str) -> list[str]:
    return difflib.get_close_matches(method, sorted(KNOWN_METHODS), n=1, cutoff=0.75) or [method]


def _path_matcher(pattern: str) -> Callable[[str], Any]:
    """Compile a path in which ``*`` is any characters."""
    first, *rest = map(re.escape, pattern.split("*"))
    if not rest:
        return re.compile(first).fullmatch
    *middle, last = rest
    # Atomic, as in fnmatch.translate(): the client chooses the path, and backtracking over several stars
    # would take time that grows with a power of its length.
    parts = "".join(f"(?>.*?{part})" for part in middle)
    return re.compile(f"{first}{parts}.*{last}", re.DOTALL).fullmatch


def _path_below_root(scope: Scope) -> str:
    # Starlette's routing changes `root_path` in this scope when it reaches a mounted application, and keeps
    # the first one as `app_root_path`. Older servers leave the root out of the path.
    path: str = scope["path"]
    root: str = scope.get("app_root_path", scope.get("root_path", "")).rstrip("/")
    is_below = path == root or path.startswith(f"{root}/")
    return (path[len(root) :] if is_below else path) or "/"


def _apply(rule: Callable[[Scope], bool], scope: Scope) -> bool:
    try:
        cancel = rule(scope)
        if not isinstance(cancel, bool) and asyncio.iscoroutine(cancel):
            cancel.close()
            raise TypeError("it returned a coroutine, and nothing can be awaited here")
        return bool(cancel)
    except Exception:
        logger.exception("cancel_handler=%r raised; the handler is not cancelled", rule)
        return False
