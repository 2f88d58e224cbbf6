"""Fleet: the processes of an application that share a bus, seen from one of them."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from otel_tasks._core.causes import chosen_cause
from otel_tasks._core.checks import check_flag, check_number, checked_finite_seconds
from otel_tasks._core.functions import global_task_manager
from otel_tasks._core.lifetime import belongs_to
from otel_tasks._core.manager import TaskManager
from otel_tasks._core.state import TaskStatus
from otel_tasks.exceptions import WrongLoopError
from otel_tasks.fleet.entries import LARGEST, NAME_LIMIT
from otel_tasks.fleet.inspection import MAX_ROWS
from otel_tasks.fleet.membership import Membership
from otel_tasks.fleet.urls import open_bus

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from otel_tasks import CancelCause
    from otel_tasks.fleet.bus import Bus
    from otel_tasks.fleet.cancellations import Cancellations
    from otel_tasks.fleet.keeper import Keeper
    from otel_tasks.fleet.link import Link
    from otel_tasks.fleet.nodes import Node
    from otel_tasks.fleet.reports import CancelReport, FleetTree, TaskRows
    from otel_tasks.fleet.views import Views

# The fleets of each manager.
_fleets: WeakKeyDictionary[TaskManager, WeakSet[Fleet]] = WeakKeyDictionary()
# Copies of the parent's objects after a fork: collecting them would close the parent's connections.
_inherited: list[Membership] = []

_NOT_STARTED = (
    "the fleet {namespace!r} is not started in this process: write `async with fleet:` around the code, or "
    "FastAPI(lifespan=make_lifespan(fleet=fleet))"
)


class Fleet:
    """The processes of an application: cancels and sees tasks in all of them.

    Create one next to the application, and start it in each process: with ``async with``, with
    ``make_lifespan(fleet=fleet)``, or with ``start()`` and ``stop()``. All processes with the same server and
    the same namespace form one fleet. A process that cannot reach the server keeps working by itself.

    Args:
        url: The server: ``redis://``, ``rediss://``, or ``unix://``, as redis-py takes it, or ``memory://``
            for the fleets of one event loop, in tests and in development.
        namespace: The name of the application, which keeps it apart from others on the same server: letters,
            digits, dots, hyphens, and underscores.
        manager: The manager whose tasks the fleet sees. None: ``global_task_manager``.
        observer: True for a process that sees and cancels the tasks of the others without being a node: a
            script, or a dashboard. It shows no tasks of its own, and neither runs nor starts remote tasks.
            While the server is down, its cancellations fail, and are not sent later.

    Raises:
        TypeError: ``manager`` is not a TaskManager, or ``observer`` is not True or False.
        ValueError: The URL or the namespace is not valid, or an observer has a manager.
        ImportError: The server is Redis, and its client is not installed.

    Example:
        >>> fleet = Fleet("redis://127.0.0.1:6379/0", namespace="shop")
        >>> app = FastAPI(lifespan=make_lifespan(fleet=fleet))
    """

    def __init__(
        self, url: str, *, namespace: str, manager: TaskManager | None = None, observer: bool = False
    ) -> None:
        if manager is not None and not isinstance(manager, TaskManager):
            raise TypeError(f"manager must be a TaskManager, got {manager!r}")
        check_flag("observer", observer)
        if manager is not None and observer:
            raise ValueError("an observer shows no tasks of its own: leave manager out")
        self._url = url
        self._namespace = namespace
        # Checks the arguments now, where they were written.
        self._bus: Bus | None = open_bus(url, namespace)
        self._is_observer = observer
        if observer:
            # Without tasks: those of this process do not belong to the fleet.
            manager = TaskManager(namespace)
        self._manager = global_task_manager if manager is None else manager
        self._address = self._bus.address
        self._membership: Membership | None = None
        self._users = 0
        self._changing: asyncio.Lock | None = None
        _fleets.setdefault(self._manager, WeakSet()).add(self)

    @property
    def namespace(self) -> str:
        """The name of the application."""
        return self._namespace

    @property
    def manager(self) -> TaskManager:
        """The manager whose tasks the fleet sees."""
        return self._manager

    @property
    def is_started(self) -> bool:
        """True between ``start()`` and ``stop()``, in this process."""
        membership = self._membership
        return membership is not None and membership.pid == os.getpid() and not membership.loop.is_closed()

    @property
    def is_observer(self) -> bool:
        """True if this process only observes the fleet, without being a node."""
        return self._is_observer

    @property
    def node(self) -> str:
        """The name of this process in the fleet, ``host/pid/random``; each start makes a new one.

        Raises:
            RuntimeError: The fleet is not started.
        """
        return self._started().node

    @property
    def link(self) -> Link:
        """The link to the bus.

        Raises:
            RuntimeError: The fleet is not started.
        """
        return self._started().link

    @property
    def keeper(self) -> Keeper:
        """The object that renews the lease and the claims of this process.

        Raises:
            RuntimeError: The fleet is not started, or this process is an observer, which has neither.
        """
        if self._is_observer:
            raise RuntimeError(
                f"this process observes the fleet {self._namespace!r} and is not a node of it: for remote "
                "tasks, leave observer=True out"
            )
        return self._started().keeper

    @property
    def views(self) -> Views:
        """The data of live views of the processes.

        Raises:
            RuntimeError: The fleet is not started.
        """
        return self._started().views

    @property
    def cancellations(self) -> Cancellations:
        """The cancellations of the last hour.

        Raises:
            RuntimeError: The fleet is not started.
        """
        return self._started().cancellations

    def __repr__(self) -> str:
        state = f"started as {self.node}" if self.is_started else "not started"
        state += ", an observer" if self._is_observer else ""
        return f"<Fleet {self._namespace!r} at {self._address}, {state}>"

    # -- start and stop -------------------------------------------------------------------------

    async def start(self) -> None:
        """Join the fleet; each ``start()`` needs its own ``stop()``, and only the first one joins.

        Returns when the process has read the cancellations of the last hour, or after 5 seconds. In the
        second case, the process works by itself, and joins when the server is available.

        Raises:
            BusRefusedError: The server refuses this process, for example its password.
            WrongLoopError: The fleet is started in another event loop, or its manager has live tasks there.

        Cancellation: the fleet is not started.

        Example:
            >>> await fleet.start()
        """
        loop = asyncio.get_running_loop()
        self._forget_others(loop)
        if not belongs_to(self._manager, loop):
            raise WrongLoopError(
                f"manager {self._manager.name!r} of fleet {self._namespace!r} has live tasks in another "
                "event loop: use one fleet and one manager per loop"
            )
        self._users += 1
        try:
            async with self._lock():
                if self._membership is None:
                    self._check_others(loop)
                    bus, self._bus = self._bus or open_bus(self._url, self._namespace), None
                    membership = Membership(bus, self._manager, is_node=not self._is_observer)
                    await membership.start()
                    self._membership = membership
        except BaseException:
            self._users -= 1
            raise

    async def stop(self) -> None:
        """Leave the fleet at the last ``stop()``; sends the entries that wait, for at most 2 seconds.

        A call that waits for other processes fails with ``BusUnavailableError``. The tasks of this process
        keep running: shut their manager down first. Does nothing if the fleet is not started.

        Raises:
            WrongLoopError: The fleet is started in another event loop.

        Cancellation: the fleet is left without further waiting.

        Example:
            >>> await fleet.stop()
        """
        self._forget_others(asyncio.get_running_loop())
        if not self._users or not self.is_started:
            return
        self._users -= 1
        if not self._users and self._membership is not None:
            # Immediately: a start that comes meanwhile creates a new node.
            membership, self._membership = self._membership, None
            await membership.stop()

    async def __aenter__(self) -> Self:
        """Join the fleet.

        Cancellation: the fleet is not started.
        """
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the fleet.

        Cancellation: the fleet is left without further waiting.
        """
        await self.stop()

    def _forget_others(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget a start in the parent of this process, or in a loop that is closed."""
        membership = self._membership
        if membership is None:
            # The lock may belong to an earlier loop in which a start failed.
            if not self._users:
                self._changing = None
        elif membership.pid != os.getpid() or membership.loop.is_closed():
            if membership.pid != os.getpid():
                _inherited.append(membership)
            self._membership = self._changing = None
            self._users = 0
        elif membership.loop is not loop:
            raise WrongLoopError(
                f"fleet {self._namespace!r} is started in another event loop: use one fleet per loop, and "
                "stop it where it was started"
            )

    def _check_others(self, loop: asyncio.AbstractEventLoop) -> None:
        for other in _fleets.get(self._manager, ()):
            membership = other._membership
            if (
                other is not self
                and membership is not None
                and other.is_started
                and membership.loop is loop
                and (other._address, other._namespace) == (self._address, self._namespace)
            ):
                raise RuntimeError(
                    f"manager {self._manager.name!r} is already in fleet {self._namespace!r}, as "
                    f"{other.node}: its tasks would count twice; share one Fleet, and start it twice"
                )

    def _lock(self) -> asyncio.Lock:
        if self._changing is None:
            self._changing = asyncio.Lock()
        return self._changing

    def _started(self) -> Membership:
        membership = self._membership
        if membership is None or membership.pid != os.getpid():
            raise RuntimeError(_NOT_STARTED.format(namespace=self._namespace))
        return membership

    def _here(self) -> Membership:
        membership = self._started()
        if membership.loop is not asyncio.get_running_loop():
            raise WrongLoopError(
                f"fleet {self._namespace!r} is started in another event loop: call it there, for example "
                "with asyncio.run_coroutine_threadsafe(...)"
            )
        return membership

    # -- cancelling -----------------------------------------------------------------------------

    async def cancel_task(
        self,
        name: str,
        reason: str | None = None,
        *,
        timeout: float = 5.0,
        asked_by: str | None = None,
        cause: CancelCause | None = None,
        node: str | None = None,
    ) -> CancelReport:
        """Cancel the task of this name in whichever process it runs, and wait until it has ended.

        This process comes first. The other processes get the cancellation within milliseconds; a process that
        cannot reach the server reads it when it can, for an hour. A remote task that still waits in a
        broker's queue does not start. Tasks started afterwards are not affected.

        Args:
            name: The task's name, id, or uid. If several processes have such a task, all are cancelled.
            reason: Recorded with the cause.
            timeout: Seconds to wait, at least 0 and finite. 0 returns immediately, without the other
                processes' answers.
            asked_by: The person who wants it, for the cause. None names the code that calls.
            cause: A cause that was made elsewhere, instead of ``reason`` and ``asked_by``.
            node: The only process to cancel in, by its name in the fleet. None: all processes.

        Returns:
            How many tasks were asked to stop, how many ended, and which processes did not answer. If no
            process has such a task, all counts are 0.

        Raises:
            BusUnavailableError: The server was not available for ``timeout``. The tasks of this process are
                cancelled, and the others are when the server is back.
            RuntimeError: The fleet is not started.
            WrongLoopError: The fleet is started in another event loop.
            TypeError: An argument has the wrong type.
            ValueError: ``name`` or ``node`` is empty or too long, or ``timeout`` is negative or not finite.

        Cancellation: cancelling the caller ends the wait; the tasks are cancelled in all processes.

        Telemetry: the span of each task records the cause, with the requester and its node, and links to the
        span that is current here.

        Example:
            >>> report = await fleet.cancel_task("import-17", "stopped by the user")
            >>> report.ended
        """
        chosen = _checked_cause(cause, reason, asked_by)
        seconds = _checked_timeout(timeout)
        to = None if node is None else _checked_name("node", node)
        here = self._here()
        return await here.canceller.cancel("task", _checked_name("task", name), chosen, seconds, to)

    async def cancel_group(
        self,
        group: str,
        reason: str | None = None,
        *,
        timeout: float = 5.0,
        asked_by: str | None = None,
        cause: CancelCause | None = None,
    ) -> CancelReport:
        """Cancel all tasks of a group and of the groups below it in all processes, and wait until they end.

        The calling task and the tasks that await it are spared. Otherwise like ``cancel_task``.

        Args:
            group: The name of a labeled group, or the name or id of a scoped one. ``"root"`` means all tasks.
            reason: Recorded with the cause.
            timeout: Seconds to wait, at least 0 and finite. 0 returns immediately, without the other
                processes' answers.
            asked_by: The person who wants it, for the cause. None names the code that calls.
            cause: A cause that was made elsewhere, instead of ``reason`` and ``asked_by``.

        Returns:
            How many tasks were asked to stop, how many ended, and which processes did not answer.

        Raises:
            BusUnavailableError: The server was not available for ``timeout``. The tasks of this process are
                cancelled, and the others are when the server is back.
            RuntimeError: The fleet is not started.
            WrongLoopError: The fleet is started in another event loop.
            TypeError: An argument has the wrong type.
            ValueError: ``group`` is empty or too long, or ``timeout`` is negative or not finite.

        Cancellation: cancelling the caller ends the wait; the tasks are cancelled in all processes.

        Telemetry: as for ``cancel_task``.

        Example:
            >>> report = await fleet.cancel_group("tenant.acme", "the tenant has left")
            >>> report.asked, report.ended, report.still_running, report.silent
        """
        chosen = _checked_cause(cause, reason, asked_by)
        seconds = _checked_timeout(timeout)
        here = self._here()
        return await here.canceller.cancel("group", _checked_name("group", group), chosen, seconds)

    # -- seeing ---------------------------------------------------------------------------------

    async def tasks(
        self,
        name: str | None = None,
        *,
        group: str | None = None,
        status: TaskStatus | str | None = None,
        limit: int = 1000,
        timeout: float = 2.0,
    ) -> TaskRows:
        """List the tasks of all processes: live tasks, oldest first, then remembered ones.

        Args:
            name: A shell pattern for names and ids, such as ``"import-*"``. None lists all.
            group: The name or id of a group, for its tasks and those of the groups below it. None lists all.
            status: One of ``TaskStatus``. None lists all.
            limit: The most rows to return, from 1 to 2000; the rest are counted.
            timeout: Seconds to wait for the answers, above 0 and finite.

        Returns:
            A list of dictionaries, each like ``TaskInfo.to_dict()`` with a ``"node"``. Metadata and error
            messages do not leave their process: they are empty. ``more`` counts the rest, and ``silent``
            names the nodes that did not answer.

        Raises:
            BusUnavailableError: The server is not available.
            RuntimeError: The fleet is not started.
            WrongLoopError: The fleet is started in another event loop.
            TypeError: An argument has the wrong type.
            ValueError: An argument is out of its range.

        Cancellation: cancelling the caller ends the wait.

        Example:
            >>> for row in await fleet.tasks(name="import-*"):
            ...     print(row["node"], row["name"], row["status"])
        """
        seconds = _checked_timeout(timeout, above_zero=True)
        _check_rows(limit)
        wanted = None if status is None else str(_checked_status(status))
        pattern = None if name is None else _checked_name("task", name)
        group_id = None if group is None else _checked_name("group", group)
        return await self._here().inspector.tasks(pattern, group_id, wanted, limit, seconds)

    async def tree(self, *, limit: int = 100, timeout: float = 2.0) -> FleetTree:
        """Return the trees of all processes: groups, their tasks, and where each one waits.

        Args:
            limit: The most tasks and groups to show per process, from 1 to 2000.
            timeout: Seconds to wait for the answers, above 0 and finite.

        Raises:
            BusUnavailableError: The server is not available.
            RuntimeError: The fleet is not started.
            WrongLoopError: The fleet is started in another event loop.
            TypeError: ``timeout`` is not a number.
            ValueError: An argument is out of its range.

        Cancellation: cancelling the caller ends the wait.

        Example:
            >>> print(await fleet.tree())
        """
        seconds = _checked_timeout(timeout, above_zero=True)
        _check_rows(limit)
        return await self._here().inspector.tree(limit, seconds)

    async def nodes(self, *, timeout: float = 2.0) -> list[Node]:
        """List the processes of the fleet, including those that do not answer.

        A process that was killed is silent for up to 30 seconds, and then disappears.

        Args:
            timeout: Seconds to wait for the answers, above 0 and finite.

        Raises:
            BusUnavailableError: The server is not available.
            RuntimeError: The fleet is not started.
            WrongLoopError: The fleet is started in another event loop.
            TypeError: ``timeout`` is not a number.
            ValueError: ``timeout`` is not above 0, or not finite.

        Cancellation: cancelling the caller ends the wait.

        Example:
            >>> [(node.host, node.pid, node.live_tasks) for node in await fleet.nodes()]
        """
        seconds = _checked_timeout(timeout, above_zero=True)
        return await self._here().inspector.nodes(seconds)


def _checked_cause(cause: CancelCause | None, reason: str | None, asked_by: str | None) -> CancelCause:
    chosen = chosen_cause(cause, reason, asked_by)
    for what, text in (("reason", chosen.message), ("asked_by", chosen.asked_by)):
        # The other processes would refuse it.
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{what} must be text, got {text!r}")
    return chosen


def _checked_timeout(timeout: object, *, above_zero: bool = False) -> float:
    # The other processes would skip an entry with a larger number.
    return min(checked_finite_seconds("timeout", timeout, above_zero=above_zero), LARGEST)


def _checked_name(what: str, name: object) -> str:
    if not isinstance(name, str):
        names = (
            "its name, got {!r}: pass node.node"
            if what == "node"
            else f"its name or id, got {{!r}}: pass {what}.id"
        )
        raise TypeError(f"a fleet finds a {what} by {names.format(name)}")
    if not 0 < len(name) <= NAME_LIMIT:
        raise ValueError(f"the name of a {what} has 1 to {NAME_LIMIT} characters, got {len(name)}")
    return name


def _checked_status(status: object) -> TaskStatus:
    try:
        return TaskStatus(status)  # type: ignore[arg-type]  # it is the argument under check
    except ValueError:
        names = ", ".join(repr(str(each)) for each in TaskStatus)
        raise ValueError(f"status must be one of {names}, got {status!r}") from None


def _check_rows(limit: object) -> None:
    check_number("limit", limit, 1)
    if isinstance(limit, int) and limit > MAX_ROWS:
        raise ValueError(f"limit must be at most {MAX_ROWS}, got {limit}: filter by name, group, or status")
