"""Finds the loops of a suspended frame that an exception from its innermost call ends.

A frame that may catch the exception may go on with its loop. Its exception table shows that: it leads from an
instruction to the ``except``, ``finally``, and ``with`` around it (CPython 3.11 to 3.15,
``InternalDocs/exception_handling.md``).
"""

from __future__ import annotations

import dis
import gc
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from types import CodeType, FrameType

# Between the start of an `except` clause and its check: they load the classes that it names.
_LOADS = ("LOAD_", "BUILD_", "LIST_", "CALL_INTRINSIC_", "COPY", "SWAP")
_CHECKS = frozenset({"CHECK_EXC_MATCH", "CHECK_EG_MATCH"})


def ended_loops(owner: object, frame: FrameType) -> int | None:
    """Return how many ``async for`` loops an exception ends before its frame may catch it.

    A statement that may catch counts as one that does: ``except``, whatever class it names, because a
    ``with`` may convert the exception before; ``suppress``; and a cancelled scope of anyio.

    Args:
        owner: A suspended coroutine or generator.
        frame: Its frame.

    Returns:
        None if the exception leaves the frame, and ends all of its loops.
    """
    table = _table_of(frame.f_code)
    handler = table.handler_of(frame.f_lasti)
    seen: set[int] = set()
    while handler is not None and handler not in seen:
        seen.add(handler)
        if handler in table.excepts or (handler in table.managed and _has_catching_manager(owner)):
            start = table.starts[handler]
            return sum(start <= loop <= frame.f_lasti for loop in table.loops)
        # The code of a handler is in turn covered by the statements around it.
        handler = table.handler_of(handler)
    return None


def _has_catching_manager(owner: object) -> bool:
    # On the stack of the frame: the manager's exit, a bound method up to Python 3.13, and the manager after.
    managers = [getattr(thing, "__self__", thing) for thing in gc.get_referents(owner)]
    return any(
        isinstance(manager, suppress) or getattr(manager, "cancel_called", None) is True
        for manager in managers
    )


class _Table(NamedTuple):
    """The handlers of one function, each known by the offset of its first instruction.

    Attributes:
        entries: The start, end, and handler of each range of instructions.
        starts: Where the statement of each handler starts.
        excepts: The handlers that are ``except`` clauses.
        managed: The handlers that belong to a ``with``, and to its manager.
        loops: The offsets at which ``async for`` loops start.
    """

    entries: list[tuple[int, int, int]]
    starts: dict[int, int]
    excepts: set[int]
    managed: set[int]
    loops: list[int]

    def handler_of(self, offset: int) -> int | None:
        """Return the innermost handler of an instruction; None if there is none."""
        return next((handler for start, end, handler in self.entries if start <= offset < end), None)


# At the server's stop, thousands of requests may end in the same few functions.
@lru_cache(maxsize=256)
def _table_of(code: CodeType) -> _Table:
    # Not in typeshed; an attribute since Python 3.11.
    bytecode: Any = dis.Bytecode(code)
    table = _Table([], {}, set(), set(), [])
    for entry in bytecode.exception_entries:
        table.entries.append((entry.start, entry.end, entry.target))
        table.starts[entry.target] = min(entry.start, table.starts.get(entry.target, entry.start))
    # The instruction that opens the handler, while those that follow still belong to its head.
    head: int | None = None
    for instruction in bytecode:
        name: str = instruction.opname
        if name == "GET_AITER":
            table.loops.append(instruction.offset)
        if name == "PUSH_EXC_INFO":
            head = instruction.offset
        elif head is not None and not name.startswith(_LOADS):
            # A bare `except` drops the exception at once.
            if name in _CHECKS or name == "POP_TOP":
                table.excepts.add(head)
            elif name == "WITH_EXCEPT_START":
                table.managed.add(head)
            head = None
    return table
