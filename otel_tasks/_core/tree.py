"""The tree of work: groups as nodes, what the nodes of one manager share, and how a cancellation propagates.

Everything here is sync. Rules, each with a test of its own:

1. A labeled group is linked into the tree only while it has tasks or groups; a scoped one from when it opens
   until it is sealed and empty.
2. A cancellation reaches everything below in one pass: first the causes and refusals, then the events, then
   the tasks.
3. A group that opens below a cancelled group is cancelled from the start.
"""

from __future__ import annotations

import itertools
from contextvars import Context
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from otel_tasks._core.events import TREE_LOCK, CancelCause, CancelEvent
from otel_tasks._core.log import TaskLogger, logger
from otel_tasks._core.loop import Home, Shutdown
from otel_tasks._core.records import Counters, History, Listeners, TaskStats
from otel_tasks._core.task import ManagedTask, extras_of, request_cancel_all
from otel_tasks._core.telemetry import end_group_span, low_cardinality
from otel_tasks._core.telemetry.metrics import Totals
from otel_tasks._core.uids import Uids

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from otel_tasks._core.binding import Binding
    from otel_tasks._core.group import TaskGroup
    from otel_tasks._core.names import Key, Numbers
    from otel_tasks._core.options import GroupOptions
    from otel_tasks._core.parts import Consumer, Ending, LossReport, Threads
    from otel_tasks._core.places import Limiter, Places
    from otel_tasks._core.scope import Scope
    from otel_tasks._core.telemetry import GroupSpan
    from otel_tasks._core.telemetry.providers import Telemetry


class Node:
    """A group as a node of the tree; ``TaskGroup``, the only concrete class, adds the public methods."""

    __slots__ = (
        "__weakref__",
        "_cause",
        "_children",
        "_counts",
        "_event",
        "_id",
        "_is_one_table",
        "_label",
        "_ledger",
        "_limiter",
        "_linked",
        "_live",
        "_name",
        "_names",
        "_number",
        "_numbers",
        "_owns_span",
        "_parent",
        "_past_progress",
        "_queued",
        "_refusal",
        "_scope",
        "_sealed",
        "_span",
        "_takes_plain_tasks",
    )

    _refusal: str | None
    _scope: Scope | None
    _limiter: Limiter | None
    # Set only by RequestGroup, the group of a request.
    _binding: Binding | None = None
    _host: asyncio.Task[Any] | None = None

    def _set_up(self, ledger: Ledger, name: str | Callable[[], str], parent: TaskGroup | None) -> None:
        self._ledger = ledger
        self._name = name
        self._id: str | None = None
        # Name, id, and whether it is scoped, as the history keeps them; None while they may change.
        self._label: tuple[str, str, bool] | None = None
        # Set when a scoped group opens; 0 before that, and in a labeled group.
        self._number = 0
        self._parent = parent
        self._children: dict[TaskGroup, None] = {}
        self._live: dict[Key, ManagedTask[Any]] = {}
        # The table in which names must be unique: its own, or for labeled groups the root's.
        self._names = self._live
        # The next key of each function in that table; and the keys that need care, None until some do.
        self._counts: dict[str, int] = {}
        self._numbers: Numbers | None = None
        self._linked = False
        # Its names are in no other table, and it is linked: creation and ending check this one attribute
        # instead of three.
        self._is_one_table = parent is None
        self._sealed = False
        # Its own, or that of the group around it: the parent of the spans that its block starts.
        self._span: GroupSpan | None = None
        self._owns_span = False
        self._event: CancelEvent | None = None
        # The cause of its cancellation: permanent in a scoped group, temporary in a labeled one.
        self._cause: CancelCause | None = None
        # How many of its ended tasks had reported progress, and the sum of it; in a scoped group only.
        self._past_progress: tuple[int, float] | None = None
        # Why it takes no new tasks; None while it takes them.
        self._refusal = None
        self._scope = None
        self._limiter = None
        # It has no refusal, no limiter, and no options: creation reads this one attribute for each task.
        self._takes_plain_tasks = True
        # How many of the live tasks wait for a place.
        self._queued = 0

    def _become_label(self, name: str) -> None:
        """Make this a labeled group, whose id is its name and whose task names are unique in the manager."""
        self._id = name
        self._label = (name, name, False)
        if self._parent is not None:
            self._names = self._ledger.root._live
            self._counts = self._ledger.root._counts

    def _hang_below(self, parent: TaskGroup) -> None:
        """Set the parent below which the group opens, wherever it is entered."""
        self._ledger = parent._ledger
        self._parent = parent

    @property
    def name(self) -> str:
        """The name; a request's group is named after the route once the route is known."""
        return self._name if isinstance(self._name, str) else self._name()

    @property
    def id(self) -> str:
        """The name; for a scoped group the name, ``#``, and a number."""
        if self._id is None:
            return f"{self.name}#{self._number}" if self._number else self.name
        return self._id

    @property
    def scoped(self) -> bool:
        """True for a group that is entered and closed, False for one that is named by a string."""
        return self._id is None

    @property
    def tasks(self) -> tuple[ManagedTask[Any], ...]:
        """The live tasks of this group, without the groups below it, oldest first."""
        if self._parent is None:
            # The root's table also has the tasks of all labeled groups.
            return tuple(task for task in self._live.values() if task._group is self)
        return tuple(self._live.values())

    @property
    def cancel_event(self) -> CancelEvent:
        """An event that is set when the group or one above it is cancelled; made on first use, in any thread.

        A labeled group stays usable after a cancellation: it then has a new event.
        """
        if self._cause is not None and not self.scoped:
            # The cause may be that of a shutdown in another loop.
            self._ledger.home.meet_running_loop()
        event = self._event
        return self._make_event() if event is None or self._is_used_up(event) else event

    @property
    def manager(self) -> Any:
        """The ``TaskManager`` that owns the tree."""
        # Any: naming the class here would put the whole core into one import cycle.
        return self._ledger.owner

    def _labels(self) -> tuple[str, str, bool]:
        """Name, id, and whether it is scoped, as spans and the history have them."""
        if self._label is not None:
            return self._label
        # Read once: a request has to look up its route.
        label = (name := self.name), f"{name}#{self._number}", True
        if self._cause is not None:
            # Kept: all its tasks are about to end.
            self._label = label
        return label

    def _task_id(self, name: str) -> str:
        return f"{self.id}/{name}" if self._id is None else name

    def _open(self, parent: TaskGroup) -> None:
        self._parent = parent
        self._span = parent._span
        self._number = self._ledger.next_number()
        if isinstance(self._name, str):
            self._label = (self._name, self.id, True)
        if self._cause is None:
            self._refusal = None
            self._takes_plain_tasks = self._limiter is None
        else:
            self._refusal = f"is closed ({self._cause.kind})"
        # By number: a request's name, and so its id, changes when the route becomes known.
        me: Any = self
        self._ledger.scopes[self._number] = me
        parent._link(me)
        above = parent._cause
        if above is not None and self._cause is None:
            self._signal_cancel(above)

    # -- linking ----------------------------------------------------------------------------

    def _remove(self, task: ManagedTask[Any]) -> None:
        key = task._key
        # The entry may be that of another task: a name is free as soon as its task is done.
        if self._live.get(key) is task:
            del self._live[key]
        if self._names is not self._live and self._names.get(key) is task:
            del self._names[key]
        if not self._live:
            self._emptied()

    def _lose(self, task: ManagedTask[Any]) -> None:
        """Remove a task that can never end, and drop all claims to places: the loop is closed."""
        self._queued = 0
        if self._limiter is not None:
            self._limiter.clear()
        self._remove(task)

    def _is_empty(self) -> bool:
        return not self._live and not self._children

    def _emptied(self) -> None:
        if self._children or not self._linked:
            return
        if self._scope is not None and not self._sealed:
            self._scope.tasks_ended()
        elif self._sealed or not self.scoped:
            # A labeled group is linked into the tree only while it has tasks or groups.
            self._leave_tree()

    def _link(self, child: TaskGroup) -> None:
        self._children[child] = None
        child._linked = True
        child._is_one_table = child._names is child._live
        if not self._linked and self._parent is not None:
            me: Any = self
            self._parent._link(me)

    def _leave_tree(self) -> None:
        if not self._linked:
            return
        self._linked = self._is_one_table = False
        if self._owns_span:
            self._end_span()
        if self.scoped:
            self._ledger.scopes.pop(self._number, None)
        me: Any = self
        parent = self._parent
        if parent is not None:
            parent._children.pop(me, None)
            if self._past_progress is not None:
                parent._keep_progress(*self._past_progress)
            if not parent._live:
                parent._emptied()

    def _keep_progress(self, tasks: int, done: float) -> None:
        """Add the progress of ended tasks to the sum that the group keeps until it closes."""
        if self.scoped:
            before = self._past_progress or (0, 0)
            self._past_progress = (before[0] + tasks, before[1] + done)

    # -- what is below it -------------------------------------------------------------------

    def _below(self) -> list[TaskGroup]:
        """This group and all groups below it."""
        groups: list[Any] = [self]
        # The list grows while it is walked.
        for node in groups:
            groups.extend(node._children)
        return groups

    def _every_live(self) -> Iterator[ManagedTask[Any]]:
        """All live tasks of this group and below, each once."""
        for group in self._below():
            yield from group.tasks

    # -- called by its tickets and its block, see `extras.Queue` and `scope.Owner` ----------

    def _join_queue(self) -> None:
        """Count a task as queued: it queues again, for its next attempt."""
        self._queued += 1

    def _leave_queue(self) -> None:
        """Stop counting a task as queued: it has its place, or has ended."""
        self._queued -= 1

    def _now(self) -> float:
        return self._ledger.home.clock()

    def _child_failed(self, task: ManagedTask[Any], error: BaseException) -> bool:
        """True if the block of this group raises the failure, False if it has to be reported."""
        return self._scope is not None and self._scope.child_failed(self, task, error)

    # -- cancelling -------------------------------------------------------------------------

    def _is_used_up(self, event: CancelEvent) -> bool:
        return event._value and self._cause is None and not self.scoped

    def _make_event(self) -> CancelEvent:
        # Two threads that read the property at the same time must get the same event.
        with TREE_LOCK:
            event = self._event
            if event is None or self._is_used_up(event):
                parent = None if self._parent is None else self._parent.cancel_event
                event = CancelEvent(parent)
                event.set_owner(self, self._ledger.home.now)
                # Before the cause is read: the loop sets a cause before it reads the event.
                self._event = event
                if self._cause is not None:
                    event.set(self._cause)
            return event

    def _signal_cancel(self, cause: CancelCause) -> list[TaskGroup]:
        """Set the cancel event of this group and of those below; its scoped groups take no more new tasks.

        Returns:
            The groups that it reached; pass them to ``renew`` after their tasks are cancelled.
        """
        groups = self._below()
        for node in groups:
            node._take_cause(cause)
        if self._event is not None:
            self._event.set(cause)
        self._ledger.places.wake_producer()
        return groups

    def _take_cause(self, cause: CancelCause) -> None:
        if self._cause is None:
            self._cause = cause
            if self.scoped:
                self._refuse(f"is closed ({cause.kind})")

    def _refuse(self, reason: str) -> None:
        """Take no more new tasks; the first reason is kept."""
        self._refusal = self._refusal or reason
        self._takes_plain_tasks = False

    def _limit(self, limiter: Limiter | None) -> None:
        """Count new tasks against this limiter; None removes the group's limit."""
        self._limiter = limiter
        self._takes_plain_tasks = not (self._refusal or limiter or self in self._ledger.options)

    def _set_options(self, options: GroupOptions) -> None:
        """Set the defaults of new tasks; an empty labeled group that has some is not forgotten."""
        self._ledger.options[self] = options
        self._takes_plain_tasks = False

    def _count_for(self, limiter: Limiter, *, before: bool) -> None:
        """Count the live tasks against a limiter that was set after they were created.

        Args:
            limiter: The manager's, for everything below, or the group's own.
            before: The limiter is the group's, which comes before the manager's.
        """
        for task in self.tasks if before else self._every_live():
            extras = extras_of(task)
            if not task.done() and not extras.takes_no_place:
                ageing = self._ledger.places.ageing
                extras.count_for(
                    limiter, task._group, task._created_at, task._priority, ageing, before=before
                )

    def _cancel_tasks(
        self, cause: CancelCause, *, spared: Collection[asyncio.Future[Any] | None] = ()
    ) -> int:
        """Cancel every live task here and below in one pass.

        Args:
            cause: Recorded with each task.
            spared: Tasks not to cancel, such as the caller that is going to wait.

        Returns:
            How many tasks had no cancel request before this call.
        """
        groups = self._below()
        # Newest first: an older task may own resources that a newer one uses.
        tasks = [task for node in groups for task in reversed(node.tasks) if not spared or task not in spared]
        requested = request_cancel_all(tasks, cause)
        self._cancel_bodies(groups, cause, spared)
        return requested

    def _cancel_bodies(
        self, groups: list[TaskGroup], cause: CancelCause, spared: Collection[asyncio.Future[Any] | None]
    ) -> None:
        """Cancel the blocks below whose hosts this cancellation has not reached otherwise.

        Not cancelled here: tasks of these groups, which have their own requests; the caller; the task that
        also hosts this group; and the handlers of requests, which the middleware decides on.
        """
        here = set(groups)
        hosts = {self._host, *spared, *(node._host for node in groups)}
        if self._scope is not None:
            hosts.add(self._scope.host)
        for node in groups:
            scope = node._scope
            if scope is None or scope.host in hosts:
                continue
            if not isinstance(scope.host, ManagedTask) or scope.host._group not in here:
                scope.cancel_body(cause)

    def _seal(self, cause: CancelCause | None = None, *, refuse: bool = True) -> None:
        """Take no new tasks (unless ``refuse`` is false), and leave the tree as soon as nothing is in it."""
        self._sealed = True
        if refuse and self._refusal is None:
            # As `_refuse`, without the call: every request with a task comes here.
            self._refusal = "is finished" if cause is None else f"is closed ({cause.kind})"
            self._takes_plain_tasks = False
        if self._is_empty():
            self._leave_tree()
        self._ledger.places.wake_producer()

    def _forget_cause(self, cause: CancelCause | None = None) -> None:
        """Make a labeled group usable again, with a new event, after a cancellation (None: for any cause)."""
        if not self.scoped and (cause is None or self._cause is cause):
            self._cause = None

    # -- its span ---------------------------------------------------------------------------

    def _end_span(self) -> None:
        if self._span is None:
            return
        try:
            end_group_span(self._span.span, self._cause)
        except Exception:
            self._ledger.log_once("ending the span of group %r raised", self.id)


def renew(groups: Iterable[TaskGroup], cause: CancelCause) -> None:
    """Make labeled groups usable again after a cancellation with ``cause``, with new events."""
    for group in groups:
        group._forget_cause(cause)


class Ledger:
    """What the groups of one manager share: its parts, and the tables of its groups and tasks.

    Args:
        name: The manager's name.
        telemetry: Its tracer and its instruments.
        history: How many ended tasks the history keeps.
        places: Its places.
        eager_start: Run the first step of each task when it is created.
        threads: The threads for ``run_in_thread``.
    """

    # The manager sets these; its module imports this one.
    root: TaskGroup
    # The TaskManager.
    owner: Any
    lost: LossReport
    ending: Ending
    counters: Counters
    # Bound once, so that the callbacks of all tasks share one object.
    on_done: Callable[[ManagedTask[Any]], object]

    def __init__(
        self,
        name: str,
        telemetry: Telemetry,
        history: int,
        places: Places,
        eager_start: bool,
        threads: Threads,
    ) -> None:
        self.name = name
        self.telemetry = telemetry
        self.history = History(history)
        self.places = places
        self.eager_start = eager_start
        # The keys of metadata that log lines carry.
        self.log_metadata: tuple[str, ...] = ()
        self.threads = threads
        self.home = Home(name, self)
        self.listeners = Listeners(self.home.update_fast_path)
        # How code refers to the manager, for hints in messages.
        self.in_code = "manager"
        # Labeled groups: weak, so that an empty one costs nothing.
        self.labels: WeakValueDictionary[str, TaskGroup] = WeakValueDictionary()
        # The options of the groups that have some; those of the root are the manager's.
        self.options: dict[Node, GroupOptions] = {}
        # Open scoped groups by their number.
        self.scopes: dict[int, TaskGroup] = {}
        # The innermost open scoped group of each host task: `async with` inside `async with` nests.
        self.hosts: dict[asyncio.Task[Any], TaskGroup] = {}
        # Those that have tasks, or whose shutdown lasts.
        self.consumers: set[Consumer] = set()
        # Services, and periodic work: each supervises other tasks.
        self.supervisors: WeakSet[ManagedTask[Any]] = WeakSet()
        self.uids = Uids(self.home, self.history)
        # The next number of a scoped group. Atomic, because threads make groups too.
        self.next_number = itertools.count(1).__next__
        self.created = 0
        # An empty context for done-callbacks. One for each manager: two threads cannot enter the same context
        # at the same time.
        self.context = Context()
        self._has_logged = False

    # -- counting ---------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """The number of live tasks."""
        return self.created - self.counters.ended

    @property
    def totals(self) -> Totals:
        """The counters that the metrics report."""
        return Totals(self.counters.cancelled_by, self.counters.retried_by)

    def stats(self) -> TaskStats:
        """Read all counters."""
        return TaskStats(
            self.created,
            self.live,
            self.counters.completed,
            self.counters.failed,
            self.counters.cancelled,
            self.counters.cancel_ignored,
            sum(group._queued for group in self.root._below()),
            len(self.history),
        )

    def active(self) -> Mapping[tuple[str, str], int]:
        """The number of live tasks by group and state, read in the thread of the metric reader."""
        # Each list is made in one atomic step: the loop's thread adds and removes groups meanwhile.
        labels = [group for link in self.labels.valuerefs() if (group := link()) is not None]
        sizes = [(group, len(group._live)) for group in [*labels, *list(self.scopes.values())]]
        # The root's table also has the tasks of all labeled groups.
        labeled = sum(size for group, size in sizes if not group.scoped)
        sizes.append((self.root, max(0, len(self.root._live) - labeled)))
        counts: dict[tuple[str, str], int] = {}
        for group, size in sizes:
            name = low_cardinality(group.name)
            counts[name, "active"] = counts.get((name, "active"), 0) + size - group._queued
            if self.places.limiter.limit is not None or group._limiter is not None or group._queued:
                counts[name, "queued"] = counts.get((name, "queued"), 0) + group._queued
        return counts

    # -- finding ----------------------------------------------------------------------------

    def scope(self, group_id: str) -> TaskGroup | None:
        """Find an open scoped group by the number in its id; the name before the ``#`` may have changed."""
        number = group_id.rpartition("#")[2]
        # Bounded: int() refuses very long numbers, and the id may come from a client.
        return self.scopes.get(int(number)) if number.isdecimal() and len(number) < 19 else None

    # -- called by the loop, see `loop.Occupant` --------------------------------------------

    @property
    def has_special_tasks(self) -> bool:
        """True if a listener, or the manager's limit or options, apply to every task."""
        return bool(self.listeners.functions or self.places.limiter.limit) or self.root in self.options

    def lose_tasks(self) -> None:
        """Drop all live tasks: their loop was closed before they ended."""
        tasks = list(self.root._every_live())
        if not self.home.closed:
            self.lost.report()
        self.ending.lose(tasks)
        self.places.clear()
        self.scopes.clear()
        self.hosts.clear()
        self.consumers.clear()

    def moved(self, shutdown: Shutdown | None, *, was_closed: bool) -> None:
        """Adapt to the manager's new loop, in which it may have been shut down before."""
        if shutdown is not None:
            self.root._signal_cancel(shutdown.cause)
        elif was_closed:
            self.forget_causes()
        loop = self.home.loop
        if loop is not None:
            self.history.change_epoch(self.home.epoch)
            self.ending.use_clock(self.home.clock)
            self.threads.bind(loop)
            self.telemetry.observe(self)
            self.lost.watch_exit()

    def reopen(self) -> None:
        """Accept new tasks in this loop again after a shutdown."""
        self.home.reopen()
        self.forget_causes()

    def forget_causes(self) -> None:
        """Make the root and all labeled groups usable again after a shutdown."""
        for group in [self.root, *self.labels.values()]:
            group._forget_cause()

    def notify_cancelling(self, task: ManagedTask[Any]) -> None:
        """Notify the listeners of a cancel request."""
        if self.listeners.functions:
            self.listeners.notify("cancelling", task, task.info())

    def log_once(self, message: str, *args: object, task: ManagedTask[Any] | None = None) -> None:
        """Log the current exception, the first time only: a broken exporter must not fail tasks."""
        if not self._has_logged:
            self._has_logged = True
            log = logger if task is None else TaskLogger(task)
            log.exception(message + "; further ones are not logged", *args)
