"""The observer: the live view of a fleet, in this process and without a socket.

Only this module imports ``otel_tasks``, and only ``--fleet`` loads it: ``--url`` starts without it.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from otel_tasks import Overview
from otel_tasks.fleet import BusRefusedError, BusUnavailableError, Fleet
from otel_tasks.fleet.urls import find_namespaces, open_bus
from otel_tasks.live.guard import Refused
from otel_tasks.live.params import WATCHED, BadRequest, Params, reason_of, watched
from otel_tasks.live.rows import Shown
from otel_tasks.live.view import View
from otel_tasks_terminal.errors import CommandError, ExitCode, usage
from otel_tasks_terminal.source import Answer, Event
from otel_tasks_terminal.text import clean

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from otel_tasks.live.stream import Stream
    from otel_tasks_terminal.source import Pairs

# Checks a URL whose fleet is not known yet.
_ANY = "any"
# Fleets of a server that an error lists.
_LISTED = 5
_VIEWER = "terminal"


class Observer:
    """Joins a fleet as an observer at the first question, and answers like its live view.

    Its methods belong to one event loop, and raise ``CommandError``.

    Args:
        url: The server of the fleet.
        namespace: The fleet; None for the only one of the server.

    Raises:
        CommandError: The URL or the namespace is not valid, or the client of Redis is missing.
    """

    def __init__(self, url: str, namespace: str | None) -> None:
        # The command itself reports what the link warns about; only errors, which are bugs, are logged.
        logging.getLogger("otel_tasks").setLevel(logging.ERROR)
        self._url = url
        self._namespace = namespace
        try:
            self._server = open_bus(url, namespace or _ANY).address
        except ValueError as error:
            raise usage(clean(error, 300)) from None
        except ImportError as error:
            if error.name != "redis":
                raise
            raise usage("--fleet needs a Redis client: pip install 'otel-tasks[fleet]'") from None
        self._fleet: Fleet | None = None
        self._view: View | None = None
        self._joining = asyncio.Lock()

    def __str__(self) -> str:
        return self._server if self._namespace is None else f"fleet {self._namespace} at {self._server}"

    async def leave(self) -> None:
        """Leave the fleet.

        Cancellation: leaves without further waiting.
        """
        if self._view is not None:
            self._view.hub.close()
        if self._fleet is not None:
            await self._fleet.stop()

    # --- questions --------------------------------------------------------------------------------

    async def snapshot(self) -> Answer:
        """Return the overview.

        Cancellation: ends the wait.
        """
        return await self._answered(lambda view: view.snapshot(_VIEWER))

    async def tasks(self, pairs: Pairs) -> Answer:
        """Return one page of a list of tasks.

        Cancellation: ends the search.
        """
        return await self._answered(lambda view: view.tasks(pairs))

    async def task(self, task_id: str, node: str | None) -> Answer:
        """Return everything about one task, of these nodes alone if they are named.

        Cancellation: ends the wait.
        """
        return await self._answered(lambda view: view.task(task_id, _may, node))

    async def cancel(self, uid: str, reason: str | None) -> Answer:
        """Cancel a task, and wait a moment for its end.

        Cancellation: ends the wait; the task stays cancelled.
        """
        # As the endpoint reads it: a line break could forge a line of a log.
        said = {} if reason is None else {"reason": reason}
        return await self._answered(lambda view: view.cancel(uid, reason_of(said), _user(), _may))

    async def opened(self, pairs: Pairs) -> tuple[Stream, list[Event]]:
        """Open a stream; return it and its first events.

        Cancellation: opens none.
        """
        view = await self._joined()
        with _Translated(self):
            wanted = watched(Params(pairs, WATCHED), None, Overview.ROOT)
            stream = await view.stream(wanted, _VIEWER)
        stream.hub.add(stream)
        return stream, [_event(kind, data) for kind, _, data in stream.begin()]

    async def news(self, stream: Stream, timeout: float) -> list[Event]:
        """Wait for the next events of a stream; the last one is ``bye``.

        Cancellation: ends the wait.
        """
        is_new = await stream.wait(asyncio.get_running_loop().time() + timeout)
        self._check_bus()
        if stream.ended_by is not None:
            kind, _, data = stream.last("shutdown")
            return [_event(kind, data)]
        if not is_new:
            # A tick comes every second, so the loop is blocked.
            raise CommandError(ExitCode.UNREACHABLE, f"no news of {self} within {timeout:g} s")
        return [_event(kind, data) for kind, _, data in stream.news()]

    async def _answered(self, ask: Callable[[View], Awaitable[str]]) -> Answer:
        view = await self._joined()
        with _Translated(self):
            text = await ask(view)
        # Without the bus, no node is known, and the answer would claim that nothing runs.
        self._check_bus()
        answer: Answer = json.loads(text)
        return answer

    # --- the fleet --------------------------------------------------------------------------------

    async def _joined(self) -> View:
        async with self._joining:
            if self._view is None:
                self._view = await self._join()
            self._check_bus()
            return self._view

    async def _join(self) -> View:
        try:
            if self._namespace is None:
                self._namespace = await self._only_namespace()
            await self._check_nodes(self._namespace)
            if self._fleet is None:
                self._fleet = Fleet(self._url, namespace=self._namespace, observer=True)
            await self._fleet.start()
        except BusRefusedError as error:
            raise CommandError(
                ExitCode.REFUSED,
                f"{clean(error, 300)}; check user, password, database, and certificates in --fleet or "
                "OTEL_TASKS_FLEET",
            ) from None
        except BusUnavailableError as error:
            raise self._unavailable(error) from None
        return View(self._fleet.manager, Shown(), frozenset({"cancel"}), self._fleet)

    async def _only_namespace(self) -> str:
        try:
            found = sorted(await find_namespaces(self._url))
        except BusRefusedError as error:
            # A refusal that is not about the password.
            if "permission" not in str(error).casefold():
                raise
            raise usage(f"this user of {self._server} may not list fleets: use --namespace") from None
        if len(found) == 1:
            return found[0]
        if found:
            raise usage(f"{self._server} has several fleets ({_named(found)}): choose with --namespace")
        raise CommandError(
            ExitCode.UNREACHABLE,
            f"{self._server} has no fleet: are the host and the database number right? Processes join with "
            "make_lifespan(fleet=...)",
        )

    async def _check_nodes(self, namespace: str) -> None:
        """Check that the server answers and knows nodes: a link would keep trying to reach it."""
        bus = open_bus(self._url, namespace)
        try:
            await bus.connect()
            if await bus.roster():
                return
        finally:
            await bus.close()
        others: list[str] = []
        with suppress(BusUnavailableError):
            others = sorted(await find_namespaces(self._url))
        hint = f"; the fleets of this server are: {_named(others)}" if others else ""
        raise CommandError(ExitCode.UNREACHABLE, f"{self} has no nodes{hint}")

    def _check_bus(self) -> None:
        if self._fleet is not None and not self._fleet.link.is_up:
            raise self._unavailable(self._fleet.link.error)

    def _unavailable(self, error: BusUnavailableError | None) -> CommandError:
        why = f"{self._server} is not available" if error is None else clean(error, 300).rstrip(".")
        return CommandError(
            ExitCode.UNREACHABLE,
            f"{why}; is the server running? Name another one with --fleet or OTEL_TASKS_FLEET",
        )


class _Translated:
    """Turns refusals of a view into errors of the command."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, BadRequest):
            raise usage(f"{self._observer} answers: {clean(error, 300)}") from None
        if isinstance(error, Refused):
            raise _refusal(error) from None


def _refusal(refusal: Refused) -> CommandError:
    says = clean(refusal.message, 300)
    if refusal.status == 404:
        return CommandError(ExitCode.NOTHING_DONE, says)
    if refusal.status == 403:
        return CommandError(ExitCode.REFUSED, says)
    seconds = refusal.headers.get("Retry-After")
    when = "" if seconds is None else f": try again in {seconds} s"
    return CommandError(
        ExitCode.UNREACHABLE, says + when, retry_after=None if seconds is None else float(seconds)
    )


def _named(namespaces: list[str]) -> str:
    return ", ".join([*map(clean, namespaces[:_LISTED]), *(["..."] if len(namespaces) > _LISTED else [])])


def _event(kind: str, data: str) -> Event:
    return Event(kind, json.loads(data))


async def _may(_action: str, _task: Any) -> bool:
    # Anyone with the password of the server can write to its log anyway.
    return True


def _user() -> str:
    """The person, for the cause; the link adds the host."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "somebody"
