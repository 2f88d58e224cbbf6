"""Places and queues without any task: each rule by itself, then all of them against a simple model."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from otel_tasks import TaskPriority
from otel_tasks._core.places import Limiter, Ticket, admit, adopt, lift, release, set_limit, would_wait

LOW, NORMAL, HIGH, CRITICAL = TaskPriority
STRICT = float("inf")


class Claimant(NamedTuple):
    """One that does nothing with its place."""

    name: str

    def leave_queue(self) -> None: ...

    def grant(self) -> None: ...


def name_of(ticket: Ticket) -> str:
    assert isinstance(ticket.claimant, Claimant)
    return ticket.claimant.name


def ticket(
    name: str, *limiters: Limiter, level: TaskPriority = NORMAL, at: float = 0.0, ageing: float = 10.0
) -> Ticket:
    """A ticket of this name."""
    return Ticket(limiters, level, at, ageing, Claimant(name))


def names(tickets: list[Ticket]) -> list[str]:
    """The names of tickets, in order."""
    return [name_of(ticket) for ticket in tickets]


def served(limiter: Limiter, running: Ticket) -> list[str]:
    """The order of starts if one runs at a time and each ends as soon as it has started."""
    order: list[str] = []
    while ready := release(running):
        [running] = ready
        order.append(name_of(running))
    assert (limiter.used, limiter.waiting) == (0, 0)
    return order


# -- one limiter --------------------------------------------------------------------------------


def test_tickets_start_while_there_are_places() -> None:
    """As many as the limit start at once, the next one waits."""
    limiter = Limiter(2, None)
    first, second, third = (ticket(name, limiter) for name in "abc")

    assert not would_wait([limiter])
    assert [admit(first), admit(second)] == [True, True]
    assert would_wait([limiter])
    assert not admit(third)
    assert (limiter.used, limiter.waiting, limiter.room()) == (2, 1, 0)
    assert (first.started, third.started, third.queue) == (True, False, limiter)


def test_without_a_limit_nobody_waits() -> None:
    """None is without bound."""
    limiter = Limiter(None, None)

    assert all(admit(ticket(str(number), limiter)) for number in range(100))
    assert limiter.room() == float("inf")
    assert not limiter.queue_full


def test_without_limiters_nobody_waits() -> None:
    """A ticket that has nothing to pass starts, and gives nothing back."""
    free = ticket("free")

    assert admit(free)
    assert release(free) == []


def test_an_end_makes_room_for_one() -> None:
    """A ticket that ends gives its place to the first waiting one, and to no other."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    for name in "ab":
        admit(ticket(name, limiter))

    assert names(release(running)) == ["a"]
    assert (limiter.used, limiter.waiting) == (1, 1)


def test_first_come_first_served_within_a_level() -> None:
    """Tickets of one level start in the order in which they came, also those of one moment."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    for name in "abcdef":
        admit(ticket(name, limiter, at=5.0))

    assert served(limiter, running) == list("abcdef")


def test_higher_priority_first() -> None:
    """Of those that came at the same moment, the most urgent starts first."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    for level in (LOW, CRITICAL, NORMAL, HIGH):
        admit(ticket(level.name, limiter, level=level))

    assert served(limiter, running) == ["CRITICAL", "HIGH", "NORMAL", "LOW"]


def test_waiting_is_worth_priority() -> None:
    """`ageing` seconds are worth a level: 9 are not enough, with 10 they are equal, first come goes first."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    admit(ticket("low", limiter, level=LOW, at=0.0))
    admit(ticket("normal at 9", limiter, level=NORMAL, at=9.0))
    admit(ticket("normal at 10", limiter, level=NORMAL, at=10.0))
    admit(ticket("critical at 28", limiter, level=CRITICAL, at=28.0))
    admit(ticket("critical at 31", limiter, level=CRITICAL, at=31.0))

    assert served(limiter, running) == [
        "critical at 28",
        "normal at 9",
        "low",
        "normal at 10",
        "critical at 31",
    ]


def test_infinite_ageing_is_strict_priority() -> None:
    """However long a low one has waited, a higher one goes first."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter, ageing=STRICT)
    admit(running)
    for name, level, at in (("low", LOW, 0.0), ("late", NORMAL, 9e9), ("later", NORMAL, 9e10)):
        admit(ticket(name, limiter, level=level, at=at, ageing=STRICT))

    assert served(limiter, running) == ["late", "later", "low"]


@pytest.mark.parametrize("waiting", [True, False])
def test_ticket_that_leaves_is_passed_over(waiting: bool) -> None:
    """A ticket that leaves the queue never starts, and its room in the queue is free."""
    limiter = Limiter(1, 2)
    running, gone, last = (ticket(name, limiter) for name in ("running", "gone", "last"))
    admit(running)
    admit(gone)
    admit(last)
    assert limiter.queue_full

    assert release(gone if waiting else running) == ([] if waiting else [gone])
    assert not limiter.queue_full
    if waiting:
        assert names(release(running)) == ["last"]


@pytest.mark.parametrize(("max_queue", "waiting"), [(0, 0), (1, 1), (3, 3)])
def test_a_queue_is_full_at_its_bound(max_queue: int, waiting: int) -> None:
    """With as many as may wait it is full, with one less it is not."""
    limiter = Limiter(1, max_queue)
    for number in range(waiting):
        assert not limiter.queue_full
        admit(ticket(str(number), limiter))
    admit(ticket("last", limiter))

    assert limiter.waiting == waiting
    assert limiter.queue_full


def test_releasing_twice_changes_nothing() -> None:
    """A ticket that has left has nothing to give back."""
    limiter = Limiter(1, None)
    running, waiting = ticket("running", limiter), ticket("waiting", limiter)
    admit(running)
    admit(waiting)
    for _ in range(2):
        release(waiting)
    for _ in range(2):
        release(running)

    assert (limiter.used, limiter.waiting) == (0, 0)


def test_clear_forgets_all() -> None:
    """The limiter is as new, and earlier waiters do not come up again."""
    limiter = Limiter(1, None)
    admit(ticket("running", limiter))
    admit(ticket("waiting", limiter))
    limiter.clear()
    fresh = ticket("fresh", limiter)

    assert admit(fresh)
    assert release(fresh) == []


# -- changing the limit -------------------------------------------------------------------------


def test_a_higher_limit_starts_the_best_at_once() -> None:
    """As many as there are new places, best first."""
    limiter = Limiter(1, None)
    admit(ticket("running", limiter))
    for level in (LOW, NORMAL, HIGH):
        admit(ticket(level.name, limiter, level=level))

    assert names(set_limit(limiter, 3)) == ["HIGH", "NORMAL"]
    assert names(set_limit(limiter, None)) == ["LOW"]


def test_a_lower_limit_waits_for_ends() -> None:
    """It stops no task, and none starts until the limit holds again."""
    limiter = Limiter(3, None)
    running = [ticket(name, limiter) for name in "abc"]
    for each in running:
        admit(each)
    admit(ticket("waiting", limiter))

    assert set_limit(limiter, 1) == []
    assert limiter.room() == -2
    assert release(running[0]) == []
    assert release(running[1]) == []
    assert names(release(running[2])) == ["waiting"]


# -- two limiters -------------------------------------------------------------------------------


def test_places_are_taken_in_both_or_in_none() -> None:
    """A ticket that waits for the manager's place holds none of its group's, and vice versa."""
    group, manager = Limiter(1, None), Limiter(1, None)
    outsider, insider = ticket("outsider", manager), ticket("insider", group, manager)
    admit(outsider)

    assert not admit(insider)
    assert (group.used, group.waiting) == (0, 1)
    assert names(release(outsider)) == ["insider"]
    assert (group.used, manager.used) == (1, 1)
    second = ticket("second", group, manager)
    admit(second)
    set_limit(manager, 2)
    assert (second.started, manager.used) == (False, 1)
    assert names(set_limit(group, 2)) == ["second"]


def test_a_full_group_holds_up_no_other_group() -> None:
    """Tickets of another group pass those that wait for a place in their own."""
    full, other, manager = Limiter(1, None), Limiter(1, None), Limiter(2, None)
    admit(ticket("a", full, manager))
    for number in range(5):
        admit(ticket(str(number), full, manager, level=CRITICAL))

    assert admit(ticket("other", other, manager, level=LOW))


def test_one_free_place_of_a_group_is_kept_in_mind_for_one() -> None:
    """When the best of a group waits for the manager, the others stay where they are until it is gone."""
    group, manager = Limiter(1, None), Limiter(2, None)
    running, outsider = ticket("running", group, manager), ticket("outsider", manager)
    admit(running)
    admit(outsider)
    best, second = ticket("best", group, manager, level=HIGH), ticket("second", group, manager)
    admit(second)
    admit(best)
    set_limit(manager, 1)

    # The manager has no place for any of them yet.
    assert release(running) == []
    assert (best.queue, second.queue) == (manager, group)
    release(best)
    assert second.queue is manager
    assert names(release(outsider)) == ["second"]


def test_ticket_that_comes_up_after_its_group_has_filled_waits_in_its_group_again() -> None:
    """The manager's place then goes to the next, and the group's order is kept."""
    group, manager = Limiter(1, None), Limiter(1, None)
    outsider = ticket("outsider", manager)
    admit(outsider)
    first, second = ticket("first", group, manager, level=HIGH), ticket("second", group, manager, level=HIGH)
    third = ticket("third", manager, level=LOW)
    for each in (first, second, third):
        admit(each)

    assert names(release(outsider)) == ["first"]
    assert names(set_limit(manager, 2)) == ["third"]
    assert second.queue is group
    assert names(release(first)) == ["second"]


def test_the_managers_place_goes_to_the_best_of_all_groups() -> None:
    """A ticket in a group does not take the manager's place before a better one from outside."""
    group, manager = Limiter(1, None), Limiter(1, None)
    running = ticket("running", group, manager)
    admit(running)
    low, critical = ticket("low", group, manager, level=LOW), ticket("critical", manager, level=CRITICAL)
    admit(low)
    admit(critical)

    assert names(release(running)) == ["critical"]
    assert names(release(critical)) == ["low"]


# -- priority inheritance -----------------------------------------------------------------------


def test_lifting_moves_a_ticket_up() -> None:
    """It counts as one of the higher level, as of when it came."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    first, second = ticket("first", limiter, at=0.0), ticket("second", limiter, at=1.0)
    admit(first)
    admit(second)
    lift(second, CRITICAL)

    assert served(limiter, running) == ["second", "first"]


@pytest.mark.parametrize("level", [LOW, NORMAL, HIGH])
def test_lifting_never_lowers(level: TaskPriority) -> None:
    """A waiter that is less urgent, or just as urgent, changes nothing."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    high = ticket("high", limiter, level=HIGH)
    admit(ticket("normal", limiter))
    admit(high)
    lift(high, level)

    assert (high.level, high.version) == (HIGH, 1)
    assert served(limiter, running) == ["high", "normal"]


def test_lifting_a_started_ticket_changes_nothing() -> None:
    """There is nothing left to move up in."""
    limiter = Limiter(1, None)
    running = ticket("running", limiter)
    admit(running)
    lift(running, CRITICAL)

    assert running.level is NORMAL
    assert limiter.used == 1
    assert release(running) == []


def test_lifting_overtakes_the_one_kept_in_mind() -> None:
    """The lifted task goes first even if another one of its group already waits for the manager."""
    group, manager = Limiter(1, None), Limiter(2, None)
    running, outsider = ticket("running", group, manager), ticket("outsider", manager)
    admit(running)
    admit(outsider)
    first, second = ticket("first", group, manager), ticket("second", group, manager)
    admit(first)
    admit(second)
    set_limit(manager, 1)
    release(running)
    lift(second, HIGH)

    assert second.queue is manager
    assert names(release(outsider)) == ["second"]
    assert names(release(second)) == ["first"]


# -- limits that come later ---------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_adopted_tickets_count_for_the_new_limiter(before: bool) -> None:
    """Started tickets take places in it, and waiting ones count as waiting; they then have to pass it."""
    old, new = Limiter(1, None), Limiter(None, None)
    running, waiting = ticket("running", old), ticket("waiting", old)
    admit(running)
    admit(waiting)
    for each in (running, waiting):
        adopt(each, new, before=before)

    assert (new.used, new.waiting) == (1, 1)
    assert running.limiters == waiting.limiters == ((new, old) if before else (old, new))
    assert set_limit(new, 1) == []
    assert names(release(running)) == ["waiting"]
    assert (new.used, new.waiting) == (1, 0)


def test_adopted_while_it_waits_for_the_other() -> None:
    """When its turn at the manager comes, such a ticket needs its group's new place, too."""
    group, manager = Limiter(None, None), Limiter(1, None)
    outsider, waiting = ticket("outsider", manager), ticket("waiting", manager)
    holder = ticket("holder")
    for each in (holder, outsider, waiting):
        admit(each)
    for each in (holder, waiting):
        adopt(each, group, before=True)
    set_limit(group, 1)

    assert release(outsider) == []
    assert waiting.queue is group
    assert names(release(holder)) == ["waiting"]


# -- all of it against a model ------------------------------------------------------------------


class Model:
    """One ticket as the rules describe it."""

    def __init__(self, real: Ticket, group: str | None, level: TaskPriority, arrived: float) -> None:
        self.real = real
        self.group = group
        self.level = level
        self.arrived = arrived
        self.started = False
        self.backs_off = False


class Admission(RuleBasedStateMachine):
    """A manager and two groups as the ledger runs them, beside a model that looks at everybody each time."""

    @initialize(
        ageing=st.sampled_from([1.0, 3.0, STRICT]),
        limits=st.fixed_dictionaries({name: st.none() | st.integers(1, 3) for name in ("m", "a", "b")}),
    )
    def set_up(self, ageing: float, limits: dict[str, int | None]) -> None:
        self.now = 0.0
        self.ageing = ageing
        self.limiters = {name: Limiter(limit, None) for name, limit in limits.items()}
        # Oldest first.
        self.tickets: list[Model] = []
        self.most = 0

    # The expectations of the model.

    def passes(self, model: Model) -> list[str]:
        """The limits that a ticket has to pass."""
        return [name for name, limiter in self.limiters.items() if limiter in model.real.limiters]

    def holders(self, name: str) -> list[Model]:
        return [model for model in self.tickets if model.started and name in self.passes(model)]

    def waits(self, model: Model) -> bool:
        return not (model.started or model.backs_off)

    def may_start(self, model: Model) -> bool:
        limits = [(name, self.limiters[name].limit) for name in self.passes(model)]
        return all(limit is None or len(self.holders(name)) < limit for name, limit in limits)

    def rank(self, model: Model) -> Any:
        place = self.tickets.index(model)
        if self.ageing == STRICT:
            return (-model.level, model.arrived, place)
        # One level less for each `ageing` seconds of waiting less; exact, since equal ranks have to be equal.
        return (Fraction(model.arrived) / Fraction(self.ageing) - model.level, place)

    def start_all_that_may(self) -> list[str]:
        """Again and again the best of those that may: what no implementation could afford."""
        started = []
        while able := [model for model in self.tickets if self.waits(model) and self.may_start(model)]:
            best = min(able, key=self.rank)
            best.started = True
            started.append(name_of(best.real))
        return started

    # The steps.

    @rule(seconds=st.integers(1, 4))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(group=st.sampled_from([None, "a", "b"]), level=st.sampled_from(TaskPriority))
    def come(self, group: str | None, level: TaskPriority) -> None:
        chosen = [] if group is None else [self.limiters[group]]
        if self.limiters["m"].limit is not None:
            chosen.append(self.limiters["m"])
        real = Ticket(
            tuple(chosen), level, self.now, self.ageing, Claimant(f"{len(self.tickets)} at {self.now}")
        )
        model = Model(real, group, level, self.now)
        self.tickets.append(model)
        expected = would_wait(chosen)
        assert admit(real) is not expected
        assert self.start_all_that_may() == ([] if expected else [name_of(real)])

    @precondition(lambda self: self.tickets)
    @rule(number=st.integers(0, 20))
    def go(self, number: int) -> None:
        """One that runs ends, or one that waits is cancelled."""
        model = self.tickets.pop(number % len(self.tickets))
        ready = names(release(model.real))
        assert sorted(ready) == sorted(self.start_all_that_may())

    @precondition(lambda self: any(model.started for model in self.tickets))
    @rule(number=st.integers(0, 20))
    def back_off(self, number: int) -> None:
        """One that runs gives its places back, and keeps its arrival."""
        running = [model for model in self.tickets if model.started]
        model = running[number % len(running)]
        model.started, model.backs_off = False, True
        ready = names(release(model.real))
        assert sorted(ready) == sorted(self.start_all_that_may())

    @precondition(lambda self: any(model.backs_off for model in self.tickets))
    @rule(number=st.integers(0, 20))
    def try_again(self, number: int) -> None:
        """One that has backed off claims its places again."""
        idle = [model for model in self.tickets if model.backs_off]
        model = idle[number % len(idle)]
        model.backs_off = False
        expected = would_wait(model.real.limiters)
        assert admit(model.real) is not expected
        assert self.start_all_that_may() == ([] if expected else [name_of(model.real)])

    @precondition(lambda self: self.tickets)
    @rule(number=st.integers(0, 20), level=st.sampled_from(TaskPriority))
    def be_waited_for(self, number: int, level: TaskPriority) -> None:
        model = self.tickets[number % len(self.tickets)]
        if self.waits(model):
            model.level = max(model.level, level)
        lift(model.real, level)
        assert not self.start_all_that_may()

    @rule(name=st.sampled_from(["m", "a", "b"]), limit=st.none() | st.integers(1, 4))
    def change(self, name: str, limit: int | None) -> None:
        limiter = self.limiters[name]
        if name == "m" and limit is not None:
            for model in self.tickets:
                if limiter not in model.real.limiters:
                    adopt(model.real, limiter, before=False)
        ready = names(set_limit(limiter, limit))
        assert sorted(ready) == sorted(self.start_all_that_may())

    # The invariants.

    @invariant()
    def the_books_are_right(self) -> None:
        for model in self.tickets:
            assert model.real.started == model.started
            assert (model.real.queue is not None) == self.waits(model)
        for name, limiter in self.limiters.items():
            mine = [model for model in self.tickets if name in self.passes(model)]
            assert limiter.used == len(self.holders(name))
            assert limiter.waiting == len(list(filter(self.waits, mine)))

    @invariant()
    def no_place_stays_free_for_nothing(self) -> None:
        for model in self.tickets:
            assert not self.waits(model) or any(limiter.room() < 1 for limiter in model.real.limiters)

    def teardown(self) -> None:
        """All end, each as soon as it may: then every place is free, and nobody waits."""
        for _ in itertools.repeat(None, 2 * len(getattr(self, "tickets", ()))):
            able = [number for number, model in enumerate(self.tickets) if not self.waits(model)]
            if able:
                self.go(able[0])
        if hasattr(self, "tickets"):
            assert not self.tickets
            assert all(limiter.used == limiter.waiting == 0 for limiter in self.limiters.values())


def test_random_tickets_keep_the_rules() -> None:
    """Tasks come, back off, leave, and are lifted, and limits change: the same start as in the model."""
    bounds = settings(max_examples=200, stateful_step_count=40, deadline=None, derandomize=True)
    run_state_machine_as_test(Admission, settings=bounds)
