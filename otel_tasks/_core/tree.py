"""The tree of groups: how groups are linked, and how a cancellation propagates down.

Everything is sync. The functions belong to ``TaskGroup``, which has them as methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from otel_tasks._core.cancellation import TREE_LOCK, CancelCause, CancelEvent
from otel_tasks._core.task import ManagedTask
from otel_tasks._core.telemetry import end_group_span

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Collection, Iterable

    from otel_tasks._core.group import TaskGroup


def add(group: TaskGroup, key: str | int, task: ManagedTask[Any]) -> None:
    group._live[key] = task
    if group._names is not group._live:
        group._names[key] = task
    if not group._linked and group._parent is not None:
        link(group._parent, group)


def remove(group: TaskGroup, task: ManagedTask[Any]) -> None:
    key = task._key
    # The entry may belong to another task: a name is free as soon as its task is done.
    if group._live.get(key) is task:
        del group._live[key]
    if group._names is not group._live and group._names.get(key) is task:
        del group._names[key]
    if not group._live:
        emptied(group)


def is_empty(group: TaskGroup) -> bool:
    return not group._live and not group._children


def emptied(group: TaskGroup) -> None:
    if group._children or not group._linked:
        return
    if group._scope is not None and not group._sealed:
        group._scope.tasks_ended()
    elif group._sealed or not group.scoped:
        # A labeled group is linked into the tree only while it has tasks or groups.
        leave_tree(group)


def link(group: TaskGroup, child: TaskGroup) -> None:
    group._children[child] = None
    child._linked = True
    if not group._linked and group._parent is not None:
        link(group._parent, group)


def leave_tree(group: TaskGroup) -> None:
    if not group._linked:
        return
    group._linked = False
    if group._span is not None and group._owns_span:
        try:
            end_group_span(group._span.span, group._cause)
        except Exception:
            group._ledger.log_once("ending the span of group %r raised", group.id)
    if group.scoped:
        group._ledger.scopes.pop(group._number, None)
    parent = group._parent
    if parent is not None:
        parent._children.pop(group, None)
        if group._past_progress is not None:
            keep_progress(parent, *group._past_progress)
        if not parent._live:
            emptied(parent)


def keep_progress(group: TaskGroup, tasks: int, done: float) -> None:
    """Count ended tasks that had reported progress with what they did, until the group is closed."""
    if group.scoped:
        before = group._past_progress or (0, 0)
        group._past_progress = (before[0] + tasks, before[1] + done)


def below(group: TaskGroup) -> list[TaskGroup]:
    """This group and all below it."""
    groups: list[TaskGroup] = [group]
    # The list grows while it is walked.
    for node in groups:
        groups.extend(node._children)
    return groups


def is_used_up(group: TaskGroup, event: CancelEvent) -> bool:
    return event._value and group._cause is None and not group.scoped


def make_event(group: TaskGroup) -> CancelEvent:
    # Two threads that ask at a time must get the same one.
    with TREE_LOCK:
        event = group._event
        if event is None or is_used_up(group, event):
            event = CancelEvent(None if group._parent is None else group._parent.cancel_event)
            event.set_owner(group, group._ledger.now)
            # Before the look at the cause: the loop notes a cause before it looks for an event.
            group._event = event
            if group._cause is not None:
                event.set(group._cause)
        return event


def signal_cancel(group: TaskGroup, cause: CancelCause) -> list[TaskGroup]:
    """Set the cancel event here and below; scoped groups take no new tasks from now on.

    Returns:
        The groups that it reached: to be given to ``renew`` once they have been cancelled.
    """
    groups = below(group)
    for node in groups:
        if node._cause is None:
            node._cause = cause
            if node.scoped:
                node._refusal = node._refusal or f"is closed ({cause.kind})"
    if group._event is not None:
        group._event.set(cause)
    group._ledger.wake_producer()
    return groups


def cancel_tasks(
    group: TaskGroup, cause: CancelCause, *, spared: Collection[asyncio.Future[Any] | None] = ()
) -> int:
    """Cancel every live task here and below in one pass; returns how many were newly asked.

    Args:
        group: The top of what is cancelled.
        cause: Noted with each task.
        spared: Tasks to leave alone, such as the caller that is going to wait.
    """
    groups = below(group)
    asked = group._ledger.ask_all(
        # Newest first: an older task may own what a newer one is using.
        [task for node in groups for task in reversed(node.tasks) if not spared or task not in spared],
        cause,
    )
    cancel_bodies(group, groups, cause, spared)
    return asked


def cancel_bodies(
    group: TaskGroup,
    groups: list[TaskGroup],
    cause: CancelCause,
    spared: Collection[asyncio.Future[Any] | None],
) -> None:
    """Cancel the blocks below whose task nobody else here cancels.

    Left alone: tasks of these groups, they were asked themselves; the caller; the task that
    hosts this group too; and the handlers of requests, about which the middleware decides.
    """
    here = set(groups)
    hosts = {group._host, *spared, *(node._host for node in groups)}
    if group._scope is not None:
        hosts.add(group._scope.host)
    for node in groups:
        scope = node._scope
        if scope is None or scope.host in hosts:
            continue
        if not isinstance(scope.host, ManagedTask) or scope.host._group not in here:
            scope.cancel_body(cause)


def seal(group: TaskGroup, cause: CancelCause | None = None, *, refuse: bool = True) -> None:
    """Take no new tasks (unless ``refuse`` is false); leave the tree as soon as nothing is left in it."""
    group._sealed = True
    if refuse and group._refusal is None:
        group._refusal = "is finished" if cause is None else f"is closed ({cause.kind})"
    if is_empty(group):
        leave_tree(group)
    group._ledger.wake_producer()


def renew(groups: Iterable[TaskGroup], cause: CancelCause) -> None:
    """Remove the cause from labeled groups that were cancelled: they stay usable, with a fresh event."""
    for group in groups:
        if not group.scoped and group._cause is cause:
            group._cause = None
