"""JSON in slices: the same as Python's, whatever a node sends, and no step decodes many rows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_tasks._core.slices import COUNTS_PER_SLICE, NAMES_PER_SLICE, at_once, smallest
from otel_tasks.fleet.json_slices import decoded, encoded

if TYPE_CHECKING:
    from collections.abc import Generator

T = TypeVar("T")

texts = st.text() | st.sampled_from(["[{", '"', "]}", "\\", '{"a":[{'])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(scalars, lambda each: st.lists(each) | st.dictionaries(texts, each), max_leaves=40)


def dumped(value: object) -> str:
    """The JSON of a node."""
    return json.dumps(value, separators=(",", ":"))


def steps_of(slices: Generator[None, None, T]) -> tuple[T, int]:
    """What a generator returns, and after how many steps."""
    steps = 1
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value, steps
        steps += 1


@given(values)
def test_text_in_slices_is_that_of_python(value: Any) -> None:
    """In both directions, with spaces too."""
    assert at_once(encoded(value)) == dumped(value)
    assert at_once(decoded(dumped(value))) == value
    assert at_once(decoded(json.dumps(value, indent=1))) == value


@given(values, st.integers(0, 200), st.sampled_from('[]{},:"1 x'))
def test_broken_text_is_an_error_where_it_is_one_for_python(value: Any, at: int, char: str) -> None:
    """A node may send anything."""
    text = dumped(value)
    text = text[:at] + char + text[at + 1 :]
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            at_once(decoded(text))
    else:
        # NaN is not equal to itself.
        assert dumped(at_once(decoded(text))) == dumped(expected)


@pytest.mark.parametrize("text", ["", "[", "[[", "[{", '{"a', '{"a"', '{"a":[{', '[{"a":[{}]},', "[{}] ]"])
def test_cut_text_is_an_error(text: str) -> None:
    """At whatever place it ends."""
    with pytest.raises(ValueError, match=r"."):
        at_once(decoded(text))


def test_deeply_nested_text_is_read_or_refused() -> None:
    """Lists within lists are followed to a depth, and left to Python below it."""
    assert at_once(decoded("[" * 150 + "1" + "]" * 150)) == json.loads("[" * 150 + "1" + "]" * 150)
    with pytest.raises(RecursionError):
        at_once(decoded("[" * 100_000))


ROWS = [
    {"id": number, "name": f"import-{number}", "where": {"line": 7}, "words": []} for number in range(1000)
]


@pytest.mark.parametrize(
    "answer",
    [
        {"rows": ROWS, "more": 0},
        {"v": 1, "now": 1.5, "rows": ROWS, "total": 1000},
        {"events": [{"event": "snapshot", "data": {"v": 1, "groups": ROWS, "ended": []}}], "now": 1.5},
        {"tree": {"name": "root", "tasks": [], "groups": [{"name": "jobs", "tasks": ROWS}]}, "drawing": ""},
    ],
)
def test_answers_of_nodes_are_decoded_in_slices(answer: dict[str, Any]) -> None:
    """Lists, those of a live view, and trees: wherever the rows are."""
    found, steps = steps_of(decoded(dumped(answer)))
    assert found == answer
    assert steps >= len(ROWS) / COUNTS_PER_SLICE
    text, steps = steps_of(encoded(answer))
    assert text == dumped(answer)
    assert steps >= len(ROWS) / COUNTS_PER_SLICE


@given(st.lists(st.integers(0, 9), max_size=700), st.integers(0, 800), st.booleans())
def test_smallest_items_are_sorted_stably(keys: list[int], limit: int, reverse: bool) -> None:
    """Among equals, the first ones come first, in both directions."""
    items = list(enumerate(keys))
    found = at_once(smallest(items, limit, lambda item: item[1], reverse=reverse))
    assert found == sorted(items, key=lambda item: item[1], reverse=reverse)[:limit]


def test_many_items_are_sorted_in_slices() -> None:
    """Also if most of them are wanted: no step sorts all that were found."""
    keys: list[int] = []

    def key(item: int) -> int:
        keys.append(item)
        return -item

    slices = smallest(range(5000), 4000, key)
    most, before = 0, 0
    for _ in slices:
        most, before = max(most, len(keys) - before), len(keys)
    assert (most, len(keys)) == (NAMES_PER_SLICE, 5000)
