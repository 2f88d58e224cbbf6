"""Keeper: renews the lease and the claims of this process, as long as it has any.

Rules, each with its own test:

1. A thread with its own connection renews them: a task that blocks the event loop for seconds must not cost
   the lease or a claim. The thread ends when nothing is left to renew.
2. A bus whose calls do not block needs no thread: its clock is the event loop's, which stops with the loop.
3. While the bus is down, the keeper retries about twice a second, so that every lease is renewed before any
   node judges it (``link.HOLD_OFF``).
4. A claim younger than ``RENEWED_EVERY`` is not renewed: short tasks need no call for it.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from otel_tasks._core.log import logger
from otel_tasks.fleet.bus import LEASE, RENEWED_EVERY, BusUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_tasks.fleet.bus import Bus

# Seconds between two attempts while the bus is down; jitter adds up to half of that.
_RETRY_EVERY: Final = 0.5


class _Claim(NamedTuple):
    since: float
    on_lost: Callable[[], object]


class Keeper:
    """Renews the lease and the claims of one node. All methods are for the event loop's thread.

    Args:
        bus: The bus that holds the lease and the claims.
        node: The node that holds them.
    """

    def __init__(self, bus: Bus, node: str) -> None:
        self._bus = bus
        self._node = node
        # Guards what the thread reads: the claims, the number of holders, and whether it runs.
        self._lock = threading.Lock()
        self._claims: dict[str, _Claim] = {}
        self._holders = 0
        self._renewed_at = float("-inf")
        self._stopped = False
        self._beat: _Thread | _Timer | None = None
        self._waiting: set[asyncio.Future[None]] = set()

    async def hold_lease(self) -> None:
        """Keep the node's lease valid until ``drop_lease()``; wait until it is valid or the bus is down.

        Cancellation: drops the lease again.
        """
        with self._lock:
            self._holders += 1
        try:
            self._ensure_beat()
            age = self._now() - self._renewed_at
            if age > LEASE - RENEWED_EVERY:
                await self._next_renewal()
            elif age > RENEWED_EVERY and self._beat is not None:
                # Claims may have started the beat a moment ago: its next turn would come as the lease ends.
                self._beat.hurry()
        except BaseException:
            self.drop_lease()
            raise

    def drop_lease(self) -> None:
        """Undo one ``hold_lease()``; the lease of a node without holders expires."""
        with self._lock:
            self._holders -= 1

    def add_claim(self, key: str, on_lost: Callable[[], object]) -> None:
        """Renew a claim that was just taken, until ``drop_claim()``.

        Args:
            key: The claim.
            on_lost: Called in the event loop, once, if another node has taken the claim over.
        """
        with self._lock:
            self._claims[key] = _Claim(self._now(), on_lost)
        self._ensure_beat()

    def drop_claim(self, key: str) -> None:
        """Stop renewing a claim; does nothing if it is not kept."""
        with self._lock:
            self._claims.pop(key, None)

    async def stop(self) -> None:
        """Renew nothing from now on, and wait for the thread to end.

        Cancellation: ends the wait; the thread ends by itself.
        """
        with self._lock:
            self._stopped = True
            beat, self._beat = self._beat, None
        self._wake_waiting()
        if beat is not None:
            await beat.end()

    def renew_due(self) -> float | None:
        """Renew what is due, and return the seconds until the next renewal; None if nothing is left."""
        began = self._now()
        with self._lock:
            if self._stopped or not (self._holders or self._claims):
                self._beat = None
                return None
            lease = self._holders > 0 and began - self._renewed_at >= RENEWED_EVERY / 2
            due = [key for key, claim in self._claims.items() if began - claim.since >= RENEWED_EVERY]
        if not lease and not due:
            return RENEWED_EVERY
        try:
            lost = self._bus.renew(self._node, lease=lease, claims=due)
        except BusUnavailableError:
            self._report(self._wake_waiting)
            return _RETRY_EVERY * random.uniform(1.0, 1.5)  # noqa: S311 - jitter, no secret
        except Exception:
            # A bug: without this, the thread would end, and the lease and every claim would expire.
            logger.exception("renewing the lease and the claims of this node raised; retrying")
            self._report(self._wake_waiting)
            return RENEWED_EVERY
        if lease:
            self._renewed_at = began
        self._report(self._wake_waiting)
        if lost:
            self._report(self._drop_lost, lost)
        return RENEWED_EVERY

    def _now(self) -> float:
        return time.monotonic() if self._bus.renew_blocks else asyncio.get_running_loop().time()

    def _ensure_beat(self) -> None:
        """Start the thread unless it runs; it renews immediately."""
        with self._lock:
            if self._stopped or self._beat is not None:
                return
            self._beat = (_Thread if self._bus.renew_blocks else _Timer)(self)
            beat = self._beat
        beat.start()

    async def _next_renewal(self) -> None:
        with self._lock:
            beat = self._beat
        if beat is None:
            # Stopped.
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            beat.hurry()
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _report(self, callback: Callable[..., object], *args: object) -> None:
        beat = self._beat
        if beat is not None:
            beat.report(callback, *args)

    def _wake_waiting(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def _drop_lost(self, keys: list[str]) -> None:
        for key in keys:
            with self._lock:
                claim = self._claims.pop(key, None)
            if claim is not None:
                claim.on_lost()


class _Thread:
    """Calls ``renew_due`` in a thread, until that returns None."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._hurry = threading.Event()
        self._ended = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="otel-tasks keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hurry(self) -> None:
        self._hurry.set()

    async def end(self) -> None:
        self._hurry.set()
        await asyncio.wait([self._ended])

    def report(self, callback: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(callback, *args)

    def _run(self) -> None:
        try:
            while (pause := self._keeper.renew_due()) is not None:
                self._hurry.wait(pause)
                self._hurry.clear()
        finally:
            self.report(self._ended.set_result, None)


class _Timer:
    """Calls ``renew_due`` in the event loop, until that returns None."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._turn()

    def hurry(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(0, self._turn)

    async def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def report(self, callback: Callable[..., object], *args: object) -> None:
        self._loop.call_soon(callback, *args)

    def _turn(self) -> None:
        pause = self._keeper.renew_due()
        self._timer = None if pause is None else self._loop.call_later(pause, self._turn)
