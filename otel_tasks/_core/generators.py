"""Finds the async generators that a suspended task iterates: the task's end would leave them open.

An ``async for`` keeps its generator on the value stack of its frame, which has no attribute for it. The
garbage collector visits the stack of a suspended frame (CPython 3.11 to 3.15), but not that of a running one.
"""

from __future__ import annotations

import gc
import inspect
from types import AsyncGeneratorType, FrameType
from typing import TYPE_CHECKING, Any, TypeAlias

from otel_tasks._core.frames import suspended_chain
from otel_tasks._core.handlers import ended_loops

if TYPE_CHECKING:
    from collections.abc import Iterable

    AsyncGenerator: TypeAlias = AsyncGeneratorType[Any, Any]
    # A coroutine or a generator, and its frame.
    Link: TypeAlias = tuple[object, FrameType]


def iterated_in(chain: Iterable[Link]) -> list[AsyncGenerator]:
    """Return the generators, suspended at a ``yield``, over which the frames of a chain iterate.

    A generator that is only in a variable or an attribute is not among them: its owner may go on with it.

    Args:
        chain: Suspended coroutines and generators, the outermost first, from ``suspended_chain``.

    Returns:
        Innermost first, the order in which ``contextlib.aclosing`` closes them: the cleanup of an inner
        generator may need what the outer one has opened.
    """
    return _with_inner([], chain)


def ended_in(chain: Iterable[Link]) -> list[AsyncGenerator]:
    """Return those of ``iterated_in(chain)`` whose loops end if the innermost call of the chain raises.

    A frame that may catch the exception may go on with its loops, and so may the frames around it.
    """
    inner: list[Link] = []
    for link in reversed(list(chain)):
        loops = ended_loops(*link)
        if loops is not None:
            ended = _iterated_by(*link)
            return _with_inner(ended[len(ended) - min(loops, len(ended)) :], inner)
        inner.insert(0, link)
    return _with_inner([], inner)


def _with_inner(generators: list[AsyncGenerator], chain: Iterable[Link]) -> list[AsyncGenerator]:
    """Return generators, those over which the frames of a chain iterate, and those that these iterate."""
    found: list[AsyncGenerator] = []
    links = list(chain)

    def add(generator: AsyncGenerator) -> None:
        # One that runs is a link of the chain itself: it ends with the exception that is thrown into it.
        if generator not in found and is_open(generator):
            found.append(generator)
            links.extend(suspended_chain(generator))

    for generator in generators:
        add(generator)
    # The list grows while it is walked: a generator may iterate another one.
    for link in links:
        for generator in _iterated_by(*link):
            add(generator)
    return found[::-1]


def running_in(chain: Iterable[Link]) -> list[AsyncGenerator]:
    """Return the generators that are links of a chain: the task waits inside them."""
    return [link for link, _ in chain if isinstance(link, AsyncGeneratorType)]


def _iterated_by(owner: object, frame: FrameType) -> list[AsyncGenerator]:
    """Return the generators on the value stack of a suspended frame, outermost loop first."""
    referents = gc.get_referents(owner)
    # The answer for most frames, without a step of Python for each of their variables.
    if AsyncGeneratorType not in map(type, referents):
        return []
    generators = [thing for thing in referents if isinstance(thing, AsyncGeneratorType)]
    # The collector visits the variables first, then the stack. A variable that a closure shares is visited
    # as its cell.
    code = frame.f_code
    shared = {*code.co_cellvars, *code.co_freevars}
    variables = [value for name, value in frame.f_locals.items() if name not in shared]
    for value in variables:
        if isinstance(value, AsyncGeneratorType) and value in generators:
            generators.remove(value)
    return generators


def is_open(generator: object) -> bool:
    """Return True for a generator, async or not, that is suspended at a ``yield``."""
    if isinstance(generator, AsyncGeneratorType):
        return generator.ag_frame is not None and not generator.ag_running
    return inspect.isgenerator(generator) and inspect.getgeneratorstate(generator) == inspect.GEN_SUSPENDED
