"""Which positions lines look at and change: never fewer than PyTorch says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from insitu import LanguageModel
from insitu.batching.touched_positions import Extents, positions
from insitu.graph.encoding import add_node
from insitu.graph.location import here
from insitu.graph.node import NO_KWARGS
from insitu.graph.operations import READ
from insitu.graph.proxy import Proxy
from insitu.graph.recording import Recording

LENGTH = 6
BOUNDS = st.one_of(st.none(), st.integers(-8, 8))
STEPS = st.one_of(st.none(), st.integers(1, 3))
ENTRIES = st.one_of(
    st.integers(-LENGTH, LENGTH - 1),
    st.builds(slice, BOUNDS, BOUNDS, STEPS),
    st.just(...),
    st.none(),
    st.booleans(),
    st.lists(st.integers(0, 1), min_size=1, max_size=2),
)
KEYS = st.one_of(ENTRIES, st.lists(ENTRIES, max_size=4).map(tuple))


@given(KEYS)
@example((..., 0, ...))
@example((..., slice(-1), 5, None))
def test_positions_of_an_index_are_all_that_pytorch_takes(key: Any) -> None:
    values = torch.arange(LENGTH)[None, :, None].expand(LENGTH, LENGTH, LENGTH)
    try:
        taken = set(values[key].flatten().tolist())
    except (IndexError, ValueError, TypeError):
        return
    found = positions(key, LENGTH)
    assert found is None or taken <= set(found)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ((0, -1), [5]),
        ((slice(None), 2), [2]),
        ((slice(None), slice(-2, None)), [4, 5]),
        ((..., -1, slice(None)), [5]),
        ((0, slice(1, 4, 2)), [1, 3]),
        ((0, 6), None),
        (0, None),
        (-1, None),
        ((0, True), None),
        ((..., -1), None),
        ((0, [1, 2]), None),
        ((0, torch.tensor(1)), None),
    ],
    ids=str,
)
def test_positions_are_told_where_an_index_says_them(key: Any, expected: Any) -> None:
    found = positions(key, LENGTH)
    assert (None if found is None else list(found)) == expected


def read(recording: Recording) -> Proxy:
    return Proxy(recording, add_node(recording, READ, (0, "a", "output", 0, 0), NO_KWARGS, here()))


LOOKS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "nowhere": (lambda x: None, None, set()),
    "the last": (lambda x: x[0, -1] * 2, None, {5}),
    "two places": (lambda x: (x[:, 1], x[:, 3:5]), None, {1, 3, 4}),
    "everywhere": (lambda x: x + 1, None, None),
    "a row, and then a position": (lambda x: x[0][2], None, {2}),
    "a row, and then two places": (lambda x: (x[0][-1, 3], x[0][1]), None, {1, 5}),
    "rows, and then a position": (lambda x: x[:1][:, 2], None, {2}),
    "a row, and then a feature": (lambda x: x[0][:, 2], None, set(range(LENGTH))),
    "a row, and then all": (lambda x: x[0] + 1, None, None),
    "a row, and then who knows what": (lambda x: x[0][[2]], None, None),
    "the last row of a position": (lambda x: x[:, 2][0], None, {2}),
    "what is saved": (lambda x: x.save(), None, None),
    "a position of a part": (lambda x: x[0][:, 2], 0, {2}),
    "another part": (lambda x: x[1].sum(), 0, set()),
    "the last part, which it may be": (lambda x: x[-1][:, 2], 0, None),
    "all parts": (lambda x: x[:1], 0, None),
    "the logits": (lambda x: x["logits"][:, -2], "logits", {4}),
    "the logits by name": (lambda x: x.logits[:, -2], "logits", {4}),
    "the logits by number": (lambda x: x[0][:, -2], "logits", None),
}


@pytest.mark.parametrize("name", LOOKS)
def test_positions_that_are_looked_at(name: str) -> None:
    look, part, expected = LOOKS[name]
    recording = Recording()
    look(read(recording))
    assert Extents(recording.graph).read(0, LENGTH, part) == expected


def in_a_copy(x: Any) -> Any:
    hidden = x[0].clone()
    hidden[:, 3:] = 0
    return hidden


def in_a_copy_of_another_form(x: Any) -> Any:
    hidden = x[0].clone()
    hidden.transpose(0, 1)[2] = 0
    return hidden


# What is assigned to the site, if anything, after what is written into what arrived.
CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "nothing": (lambda x: None, LENGTH),
    "in place": (lambda x: x[0][:, 4].zero_(), 4),
    "in place, twice": (lambda x: (x[0][:, 4].zero_(), x[0][:, 2:].add_(1)), 2),
    "in place, at the end": (lambda x: x[0][:, -1].zero_(), 5),
    "in place, who knows where": (lambda x: x[0].mT[..., 4].zero_(), 0),
    "in place, in all rows": (lambda x: x[0][0].zero_(), 0),
    "a copy, written": (in_a_copy, 3),
    "a copy, written through a view": (in_a_copy_of_another_form, 0),
    "itself": (lambda x: x[0], LENGTH),
    "something else": (lambda x: x[0] * 2, 0),
    "a copy of its own part in a tuple": (lambda x: (x[0].clone(),), LENGTH),
}


ASSIGNED = [*CHANGES][list(CHANGES).index("a copy, written") :]


@pytest.mark.parametrize("name", CHANGES)
def test_positions_from_which_on_something_may_be_changed(gpt2: LanguageModel, name: str) -> None:
    change, expected = CHANGES[name]
    block = gpt2.transformer.h[1]
    with gpt2.scan([[1, 2, 3, 4, 5, 6]]) as tracer:
        assigned = change(block.output)
        if name in ASSIGNED:
            block.output = assigned
    assert Extents(tracer.graph).changed_from(0, LENGTH, 0) == expected
