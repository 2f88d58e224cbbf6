"""Protocols of the parts of a manager whose modules import those of the groups.

``Any`` stands for a managed task: importing its class here would make an import cycle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures
    from collections.abc import Callable, Collection, Coroutine, Iterable, Set

T = TypeVar("T")


class LossReport(Protocol):
    """Reports the tasks that can never end; ``lost`` implements it."""

    def watch_exit(self) -> None:
        """Report lost tasks when the process ends."""
        ...

    def note(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note that a task is being cancelled while its loop does not run."""
        ...

    def has_lost(self, task: Any) -> bool:
        """True if the task was reported."""
        ...

    def report(self) -> None:
        """Report every live task."""
        ...


class Threads(Protocol):
    """The threads of a manager; ``threads`` implements it."""

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to another loop."""
        ...

    def coroutine(
        self, function: Callable[..., T], args: tuple[Any, ...], *, abandon: bool
    ) -> Coroutine[Any, Any, T]:
        """Create the coroutine of a task that calls a function in a thread."""
        ...

    def create_in_loop(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
        create: Callable[[Coroutine[Any, Any, T]], Any],
    ) -> concurrent.futures.Future[T]:
        """Create a task in ``loop`` from another thread."""
        ...

    def abandoned(self) -> Collection[Any]:
        """The workers whose functions still run after their tasks have ended."""
        ...


class Consumer(Protocol):
    """Takes items from a queue; ``consumer`` implements it. A shutdown calls its methods in this order."""

    def close(self, spared: Set[Any]) -> None:
        """Take no more items than its ``drain`` says; the tasks ``spared`` wait for the shutdown."""
        ...

    def cut(self) -> None:
        """Take nothing more: the grace is over."""
        ...

    def hand_back(self) -> None:
        """Hand back the items whose tasks were cancelled."""
        ...

    def report(self) -> None:
        """Log what is left behind."""
        ...


class Ending(Protocol):
    """Records the ends of tasks; ``ending`` implements it."""

    # The ids of services that gave up.
    failed_services: dict[str, None]

    def on_done(self, task: Any, early: bool = False) -> bool:
        """Record the end of a task; False if it failed in its eager first step (``early``) and must wait."""
        ...

    def service_started(self, service_id: str) -> None:
        """Note that a service runs."""
        ...

    def service_failed(self, service_id: str) -> None:
        """Note that a service gave up."""
        ...

    def use_clock(self, clock: Callable[[], float]) -> None:
        """Read the time at which a task ends from this clock."""
        ...

    def report_failure(self, task: Any, error: BaseException) -> None:
        """Report a failure that no code waits for."""
        ...

    def abandon(self, task: Any) -> None:
        """End the span of a task that does not stop."""
        ...

    def lose(self, tasks: Iterable[Any]) -> None:
        """Drop tasks that can never end."""
        ...
