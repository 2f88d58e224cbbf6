"""Consumers: items from a queue, each run as a task, acknowledged when it is finished, and drained.

Rules, each with a test of its own:

1. A consumer is a service whose attempts take items; it is restarted when its source raises. Each item is a
   task in the labeled group of the consumer's name, and goes on whatever becomes of the attempt.
2. An item is taken only if it can run at once, or as one of ``prefetch`` that wait for a place. At most
   ``concurrency + prefetch`` items are in hand; one that backs off between attempts still is. The limit is
   not that of the group: tasks that an item starts there and awaits would wait for its place.
3. Each item that was taken is either finished and acknowledged, once, or handed back to its source. If it can
   be neither, the log names it.
4. An item is finished if its task has returned or failed, or was cancelled by anything but a shutdown or the
   end of a loop whose manager was not shut down. A failure is finished when ``on_failure`` is. A
   CancelledError that nothing requested is a failure.
5. From a shutdown on, only what ``drain`` asks for is taken. What the grace is too short for is handed back.
   With ``"all"``, the consumer ends when the queue is empty and no task runs that may fill it.
6. Stopping interrupts ``get()`` and loses no item: one that arrives in the same turn is handed back, or runs.
7. Cancelling the consumer stops the taking; items in hand run to their end. A second cancellation ends that
   wait too. Cancelling the group also cancels the items.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from otel_tasks._core.awaiters import with_awaiters
from otel_tasks._core.cancellation import call_when_set
from otel_tasks._core.checks import check_choice, check_number, checked_name
from otel_tasks._core.coroutines import close_quietly
from otel_tasks._core.extras import wanted_extras
from otel_tasks._core.frames import exc_info_of
from otel_tasks._core.info import ConsumerInfo
from otel_tasks._core.log import TaskLogger, log_fields_of_all, logger, text_of
from otel_tasks._core.native import add_done_callback, cancel_message, failure_of
from otel_tasks._core.places import Limiter, full_limiter, would_wait
from otel_tasks._core.service import failure_of_cancelled
from otel_tasks._core.source import QUEUE_ENDED, Source, check_source
from otel_tasks._core.state import CancelKind, TaskPriority
from otel_tasks._core.task import extras_of, runs_forever, started_at
from otel_tasks._core.telemetry.spans import link_next, make_current
from otel_tasks._core.waiting import wait_until_done

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Set

    from otel_tasks._core.events import CancelEvent
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.handling import Handling
    from otel_tasks._core.task import ManagedTask

Item = TypeVar("Item")
Drain = Literal["running", "queued", "all"]

# The number of tasks that the log line names for each fate.
_MAX_NAMED = 10


def make_consumer(
    label: Callable[[str], TaskGroup],
    name: str,
    source: object,
    handling: Handling[Item],
    concurrency: int,
    prefetch: int,
    drain: Drain,
) -> Consumer[Item]:
    """Check the arguments of ``start_consumer``, and create the consumer.

    Args:
        label: Returns the labeled group of a name, created on first use.
        name: The consumer's name.
        source: A queue, or a function that returns the next item.
        handling: How to handle an item.
        concurrency: How many items run at a time, at least 1.
        prefetch: How many more may wait for a place, at least 0.
        drain: What happens at a shutdown.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """
    check_choice("drain", drain, Drain)
    check_source(source, drain)
    check_number("concurrency", concurrency, 1)
    check_number("prefetch", prefetch, 0)
    checked_name("consumer", name, 'name it after its work, as in start_consumer("jobs", queue, handle)')
    if name == "root":
        raise ValueError("consumer name must not be 'root', which is the group of the manager itself")
    group = label(name)
    if group.max_concurrency not in (None, concurrency):
        raise ValueError(
            f"group {name!r} has another limit than its consumer: get_group({name!r}, "
            f"max_concurrency={group.max_concurrency}), and now start_consumer({name!r}, "
            f"concurrency={concurrency}); leave max_concurrency out"
        )
    return Consumer(group, name, Source(source, name), handling, concurrency, prefetch, drain)


class Consumer(Generic[Item]):
    """One consumer: it takes items, starts their tasks, and settles what becomes of each.

    Args:
        group: The labeled group of the items.
        name: The consumer's name.
        source: Where the items come from.
        handling: How to handle an item.
        concurrency: How many items run at a time.
        prefetch: How many more may wait for a place.
        drain: What happens at a shutdown.
    """

    _supervisor: ManagedTask[Any]
    # The attempt that takes items, and the event that stops it; set while one runs.
    _attempt: ManagedTask[Any]
    _event: CancelEvent

    def __init__(
        self,
        group: TaskGroup,
        name: str,
        source: Source,
        handling: Handling[Item],
        concurrency: int,
        prefetch: int,
        drain: Drain,
    ) -> None:
        self._name = name
        self.group = group
        self._source = source
        self._handling = handling
        self._limiter = Limiter(concurrency, None)
        self._most_in_hand = concurrency + prefetch
        self._most_waiting = prefetch
        self._drain: Drain = drain
        # By the task that has it: the item's own, or the one that runs ``on_failure`` for it.
        self._in_hand: dict[ManagedTask[Any], _Taken[Item]] = {}
        self._taken = 0
        self._counts = {"done": 0, "failed": 0, "cancelled": 0, "handed_back": 0}
        # From a shutdown on, how many more items may be taken, and which tasks wait for the shutdown.
        self._left: float | None = None
        self._spared: Set[asyncio.Future[Any]] = frozenset()
        # The grace of the shutdown is over.
        self._is_cut = False
        # What the shutdown has cancelled, by its number; handed back all at once, in its order.
        self._unfinished: dict[int, _Taken[Item]] = {}
        self._hands_back_at_once = False
        # What the next report names; it is due while a shutdown lasts.
        self._owes_report = False
        self._handed_back: list[str] = []
        self._lost: list[str] = []

    def info(self) -> ConsumerInfo:
        """Return a snapshot."""
        return ConsumerInfo(concurrency=self._limiter.limit or 0, in_hand=len(self._in_hand), **self._counts)

    def started(self, supervisor: ManagedTask[Any]) -> None:
        """Take part in shutdowns until the supervisor and the items in hand have ended."""
        self._supervisor = supervisor
        self.group._ledger.consumers.add(self)
        add_done_callback(supervisor, self._forget_if_over, context=Context())

    def _forget_if_over(self, _: object = None) -> None:
        if self._supervisor.done() and not (self._in_hand or self._unfinished or self._owes_report):
            self.group._ledger.consumers.discard(self)

    # -- an attempt of the service ------------------------------------------------------------

    async def run(self) -> None:
        """Take items until the consumer stops, and wait for those in hand.

        Cancellation: stops the taking; it ends cancelled when the items in hand have ended, or at the next
        cancellation.
        """
        self._attempt = attempt = cast("ManagedTask[Any]", asyncio.current_task())
        self._event = self.group.cancel_event
        extras_of(attempt).supervision = self
        for task in self._in_hand:
            extras_of(task).supervisor = attempt
        try:
            with suppress(*QUEUE_ENDED):
                await self._take_items()
        except asyncio.CancelledError:
            if not attempt.cancelling():
                # The source's own: a failure, after which the service restarts.
                raise
        while self._in_hand:
            await wait_until_done(list(self._in_hand))
        if attempt.cancelling():
            raise asyncio.CancelledError(cancel_message(attempt))

    async def _take_items(self) -> None:
        places = self.group._ledger.places
        while True:
            try:
                await places.wait_for_room(self)
            finally:
                # This consumer may wait long for an item, or ends: the room is for other producers too.
                places.wake_producer()
            if self._is_over():
                return
            if self._take_at_once():
                continue
            if self._left is not None and not (self._drain == "all" and self._producers()):
                return
            await self._wait_for_item()

    def _take_at_once(self) -> bool:
        """Take an item and start it; return False if that needs a wait.

        A method, so that nothing of the last item is held while the consumer waits for the next one: neither
        the item, nor the exception about an empty queue, which would be the context of an error of ``get()``.
        """
        try:
            item = self._source.take_at_once(draining=self._left is not None)
        except asyncio.QueueEmpty:
            return False
        if self._left is not None:
            self._left -= 1
        self._start(item)
        return True

    def _producers(self) -> list[ManagedTask[Any]]:
        """The tasks that may still put items into a queue that is drained, and end.

        Neither services that run forever, nor consumers: their items are tasks. Nor what waits for the
        shutdown, or for this consumer.
        """
        spared = self._spared | with_awaiters(self._attempt)
        return [
            task
            for task in self.group._ledger.root._every_live()
            if not (task.done() or task in spared or runs_forever(task) or extras_of(task).takes_no_place)
        ]

    async def _wait_for_item(self) -> None:
        """Wait for the next item and start it; return without one if none may come."""
        getter = self._source.start_get()

        def interrupt(_: object) -> None:
            getter.cancel()

        if self._left is None:
            stop_watching: Callable[[], object] = call_when_set(self._event, interrupt)
        else:
            last = asyncio.ensure_future(wait_until_done(self._producers()))
            last.add_done_callback(interrupt)
            stop_watching = last.cancel
        try:
            while not getter.done():
                try:
                    await asyncio.wait([getter])
                except asyncio.CancelledError:
                    # Only when the getter has ended is it known whether it has an item.
                    getter.cancel()
        finally:
            stop_watching()
        if not self._is_stopping():
            self._start(getter.result())
        elif not getter.cancelled():
            self._start_or_hand_back(getter.result())

    def _start_or_hand_back(self, item: Item) -> None:
        """Decide about an item that has arrived while the consumer stops."""
        is_drained = self._left is not None and self._drain != "running" and not self._is_cut
        if not is_drained:
            entry = self._entry(item)
            if self._source.hand_back(item):
                self._count_handed_back(entry)
                return
            if self._is_cut:
                self._lost.append(entry.name)
                return
        self._start(item)

    def _is_stopping(self) -> bool:
        return self._event.cause is not None or self._attempt.cancelling() > 0

    def _is_over(self) -> bool:
        """True once it takes no more items."""
        if self._left is None or self._attempt.cancelling():
            return self._is_stopping()
        return self._left <= 0

    def _is_full(self) -> bool:
        """True if it must not take an item now, but may later; see `places.Producer`."""
        if self._is_over():
            return False
        if len(self._in_hand) >= self._most_in_hand:
            return True
        limiters = self._limiters()
        if not would_wait(limiters):
            return False
        return self._limiter.waiting >= self._most_waiting or full_limiter(limiters) is not None

    def _limiters(self) -> tuple[Limiter, ...]:
        return (self._limiter, *self.group._limiters())

    # -- an item ------------------------------------------------------------------------------

    def _start(self, item: Item) -> None:
        """Create the task of an item; an item for which that is not possible fails."""
        entry = self._entry(item)
        options = self.group._ledger.options.get(self.group)
        try:
            coro, priority, metadata = self._handling.of(item, None if options is None else options.retry)
            task = self._create(coro, priority, self._handling.timeout, metadata)
        except Exception as error:
            task = self._create(self._handling.failing(error), TaskPriority.NORMAL)
        except BaseException:
            # The process ends with it.
            self._unfinished[entry.number] = entry
            raise
        entry.name = task.id
        self._watch(task, entry)

    def _create(
        self,
        coro: Coroutine[Any, Any, Any],
        priority: TaskPriority,
        timeout: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        context: Context | None = None,
    ) -> ManagedTask[Any]:
        """Create a task for an item that was taken, in a trace of its own.

        The only way into a manager that shuts down, for a consumer that drains: neither the shutdown nor a
        full queue refuses the task, because the item has left its source. ``Creation._create`` refuses it for
        both.

        Args:
            coro: The coroutine; closed if the task cannot be created.
            priority: The priority.
            timeout: As for ``create_task``.
            metadata: As for ``create_task``.
            context: The context to run in; None means a copy of the current one.

        Raises:
            TypeError: ``metadata`` is not a mapping.
        """
        group = self.group
        extras = None
        try:
            timeout, _ = group._with_defaults(timeout, "new")
            extras = wanted_extras(timeout, None, metadata, keep_result=False, supervises=False)
            base, key, previous = group._chosen_name(coro, None, None, "suffix")
            now = group._ledger.home.clock()
            extras = group._claim(self._limiters(), extras, priority, now, asyncio.get_running_loop())
            # Not eager: the first step would run before the consumer knows the task.
            return group._build(coro, None, base, key, previous, priority, now, extras, context, True, False)
        except BaseException:
            group._give_up(extras)
            close_quietly(coro)
            raise

    def _entry(self, item: Item) -> _Taken[Item]:
        self._taken += 1
        return _Taken(self._taken, item, f"{self._handling.name or 'item'} (not started)")

    def _watch(self, task: ManagedTask[Any], entry: _Taken[Item]) -> None:
        self._in_hand[task] = entry
        extras = extras_of(task)
        # A task that shuts its manager down is not waited for by its consumer then.
        extras.supervisor = self._attempt
        # The item of a task for on_failure has run already.
        extras.is_drained = self._drain != "running" or entry.failure is not None
        if self._handling.on_failure is not None:
            # As a waiter, which receives the failure: it is not reported then.
            task.add_done_callback(self._ended)
        else:
            add_done_callback(task, self._ended, context=copy_context())

    def _ended(self, task: ManagedTask[Any]) -> None:
        entry = self._in_hand.pop(task)
        try:
            self._settle(task, entry)
        finally:
            self._forget_if_over()
            self.group._ledger.places.wake_producer()

    def _settle(self, task: ManagedTask[Any], entry: _Taken[Item]) -> None:
        """Decide what becomes of an item whose task has ended."""
        error = self._failure_of(task)
        if self._is_unfinished(task, error):
            self._keep_unfinished(task, entry)
        elif error is None and self.group._ledger.lost.has_lost(task):
            # No shutdown follows.
            self._return(entry)
        elif error is None and task.cancelled():
            self._finish("cancelled")
        elif isinstance(error, Exception) and self._handling.on_failure is not None:
            self._settle_failure(task, entry, error)
        else:
            if error is not None and task.cancelled():
                self.group._ledger.ending.report_failure(task, error)
            self._finish("done" if error is None and entry.failure is None else "failed")

    def _failure_of(self, task: ManagedTask[Any]) -> BaseException | None:
        """Return what a task has raised; a CancelledError that nothing requested is a failure, too.

        Otherwise an item would vanish without a trace when a client that it uses cancels a future.
        """
        if not task.cancelled():
            return failure_of(task)
        is_foreign = task.cause is not None and task.cause.kind is CancelKind.FOREIGN
        return failure_of_cancelled("task", task) if is_foreign and self._event.cause is None else None

    def _is_unfinished(self, task: ManagedTask[Any], error: BaseException | None) -> bool:
        """True if a shutdown has cancelled the task, or if the process ends with what the task raised."""
        if not task.cancelled():
            return error is not None and not isinstance(error, Exception)
        kind = None if task.cause is None else task.cause.kind
        # While everything is being cancelled, a CancelledError of what it awaits may reach the task first.
        is_foreign = kind is CancelKind.FOREIGN and self._left is not None
        return kind is CancelKind.SHUTDOWN or is_foreign

    def _finish(self, fate: Literal["done", "failed", "cancelled"]) -> None:
        self._counts[fate] += 1
        self._source.acknowledge()

    # -- a failure ----------------------------------------------------------------------------

    def _settle_failure(self, task: ManagedTask[Any], entry: _Taken[Item], error: Exception) -> None:
        """Pass a failure to ``on_failure``, or log that of ``on_failure`` itself."""
        _mark_retrieved(task)
        if entry.failure is not None:
            self._report_on_failure(task, entry, error)
            self._finish("failed")
            return
        entry.failure = error
        made = self._call_on_failure(task, entry, error)
        if made is None:
            self._finish("failed")
        elif not self._is_cut:
            self._run_on_failure(task, entry, made)
        else:
            # The shutdown would not end a task that is created now.
            close_quietly(made)
            TaskLogger(task).error(
                "task %s failed while the shutdown cancelled it: no on_failure runs, the item is handed back",
                task,
                exc_info=exc_info_of(error),
            )
            self._keep_unfinished(task, entry)

    def _call_on_failure(
        self, task: ManagedTask[Any], entry: _Taken[Item], error: Exception
    ) -> Coroutine[Any, Any, object] | None:
        """Call ``on_failure``; return the coroutine of a coroutine function."""
        on_failure: Any = self._handling.on_failure
        context = copy_context()
        if task._span is not None:
            # Its log records belong to the trace of the item, not to that of the consumer.
            make_current(context, task._span)
        try:
            made = context.run(on_failure, entry.item, error)
        except Exception as broken:
            self._report_on_failure(task, entry, broken)
            return None
        except BaseException:
            # The process ends with it.
            self._keep_unfinished(task, entry)
            raise
        return made if asyncio.iscoroutine(made) else None

    def _run_on_failure(
        self, task: ManagedTask[Any], entry: _Taken[Item], coro: Coroutine[Any, Any, object]
    ) -> None:
        context = copy_context()
        if task._span is not None:
            link_next(context, task._span, "failure_of")
        letter = self._create(coro, task.priority, context=context)
        self._watch(letter, entry)

    def _report_on_failure(self, task: ManagedTask[Any], entry: _Taken[Item], broken: Exception) -> None:
        TaskLogger(task).error(
            "on_failure of consumer %r raised for task %s, which had failed with %s",
            self._name,
            task if task.id == entry.name else repr(entry.name),
            text_of(entry.failure or broken, repr),
            exc_info=exc_info_of(broken),
        )

    # -- a shutdown ---------------------------------------------------------------------------

    def close(self, spared: Set[asyncio.Future[Any]]) -> None:
        """Take no more items than ``drain`` says: the manager shuts down, and ``spared`` wait for that."""
        self._owes_report = True
        self._hands_back_at_once = False
        self._spared = spared
        if self._left is None:
            size = self._source.size or 0
            self._left = {"running": 0, "queued": size, "all": math.inf}[self._drain]

    def cut(self) -> None:
        """Take nothing more: the grace of the shutdown is over."""
        self._left = 0
        self._is_cut = True

    def hand_back(self) -> None:
        """Hand back what the shutdown has cancelled, in the order it was taken; the rest when it ends."""
        self._hands_back_at_once = True
        for number in sorted(self._unfinished):
            self._return(self._unfinished.pop(number))

    def report(self) -> None:
        """Log what the shutdown leaves behind, once."""
        running = [entry.name for entry in self._in_hand.values()]
        fates = {"handed back": self._handed_back, "not acknowledged": self._lost, "still running": running}
        facts = [_listed(fate, names) for fate, names in fates.items() if names]
        if left := self._source.size:
            facts.append(f"left in the queue: {left}")
        if facts:
            logger.warning(
                "consumer %r has stopped; %s",
                self._name,
                "; ".join(facts),
                extra=log_fields_of_all(self._in_hand, [*self._handed_back, *self._lost]),
            )
        self._handed_back, self._lost, self._owes_report = [], [], False
        self._forget_if_over()

    def _keep_unfinished(self, task: ManagedTask[Any], entry: _Taken[Item]) -> None:
        _mark_retrieved(task)
        has_started = started_at(task, task.status) is not None
        if self._hands_back_at_once or not (self._is_cut or has_started):
            # A prefetched item need not wait for the others: another consumer may take it now.
            self._return(entry)
        else:
            self._unfinished[entry.number] = entry

    def _return(self, entry: _Taken[Item]) -> None:
        if self._source.hand_back(entry.item):
            self._count_handed_back(entry)
        else:
            self._lost.append(entry.name)

    def _count_handed_back(self, entry: _Taken[Item]) -> None:
        self._handed_back.append(entry.name)
        self._counts["handed_back"] += 1


class _Taken(Generic[Item]):
    """An item that was taken.

    Args:
        number: Counts the items of the consumer.
        item: The item.
        name: The id of its task, for the log.
    """

    __slots__ = ("failure", "item", "name", "number")

    def __init__(self, number: int, item: Item, name: str) -> None:
        self.number = number
        self.item = item
        self.name = name
        # The exception of its task, once ``on_failure`` was called.
        self.failure: Exception | None = None


def _mark_retrieved(task: ManagedTask[Any]) -> None:
    """Keep asyncio from reporting the failure of a task."""
    if not task.cancelled():
        task.exception()


def _listed(fate: str, names: list[str]) -> str:
    more = f", and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{fate}: {len(names)} ({', '.join(map(repr, names[:_MAX_NAMED]))}{more})"
