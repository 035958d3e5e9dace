"""Random experiments on longer prompts, however they are divided into passes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from insitu import LanguageModel
from tests.fidelity.alone import (
    END,
    Change,
    Place,
    alone,
    assert_close,
    at,
    blocks_of,
    kept,
    logits_of,
    patched,
    prompts,
)
from tests.fidelity.forms import FORMS, in_torch
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # it counts passes, and the values are many


class Write(NamedTuple):
    """What one invocation writes: a form, or a position of what another has at a block."""

    layer: int
    position: int
    form: int | None
    source: int
    source_layer: int


class Experiment(NamedTuple):
    """Which prompt each invocation has, what it writes, and which positions are read where."""

    prompts: list[int]
    writes: list[list[Write]]
    reads: list[list[tuple[str, int]]]


POOL = prompts(5, (1, 12), (1, 12), (1, 9), (2, 12), (1, 1))
PICKS: list[Callable[[Any], Any]] = [
    lambda x: x[:, -1],
    lambda x: x[0, -1, 3],
    lambda x: x[:, -2:],
    lambda x: x[..., 0],
    lambda x: x * 2,
    lambda x: x[-1:, 0],
]


@st.composite
def experiments(draw: Callable[..., Any], depth: int) -> Experiment:
    count = draw(st.integers(2, 6))
    chosen = draw(st.lists(st.integers(0, len(POOL) - 1), min_size=count, max_size=count))
    writes, reads = [], []
    for number in range(count):
        layers = draw(st.lists(st.integers(0, depth - 1), max_size=2, unique=True))
        forms = st.one_of(st.none(), st.integers(0, len(FORMS) - 1)) if number else st.just(0)
        length = POOL[chosen[number]].shape[1]
        own = []
        for layer in sorted(layers):
            position = draw(st.integers(-length, length - 1))
            form = draw(forms if length > 2 else st.just(None if number else 0))
            own.append(
                Write(
                    layer,
                    position,
                    form,
                    draw(st.integers(0, max(number - 1, 0))),
                    draw(st.integers(0, depth - 1)),
                )
            )
        writes.append(own)
        places = st.tuples(
            st.sampled_from(["head", "model", *map(str, range(depth))]),
            st.integers(0, len(PICKS) - 1),
        )
        reads.append(draw(st.lists(places, min_size=1, max_size=3)))
    return Experiment(chosen, writes, reads)


def run_experiment(model: LanguageModel, experiment: Experiment, **options: Any) -> list[list[Any]]:
    blocks, head = blocks_of(model), model.traits.unembedding_paths[0]
    saved = []
    with model.trace(**options) as tracer:
        invocations = [tracer.invoke(POOL[prompt]) for prompt in experiment.prompts]
        for invocation, writes, reads in zip(invocations, *experiment[1:], strict=True):
            for layer, position, form, source, source_layer in writes:
                if form is None:
                    with invocations[source]:
                        donor = at(model, blocks[source_layer]).output[0][0, -1]
                    with invocation:
                        at(model, blocks[layer]).output[0][:, position] = donor
                else:
                    with invocation:
                        FORMS[form](at(model, blocks[layer]), position)
            with invocation:
                own = []
                for place, pick in reads:
                    if place == "head":
                        value = at(model, head).output
                    elif place == "model":
                        value = logits_of(model)
                    else:
                        value = at(model, blocks[int(place)]).output[0]
                    own.append(PICKS[pick](value).save())
                saved.append(own)
    return saved


def expected_of(model: LanguageModel, experiment: Experiment) -> list[list[torch.Tensor]]:
    blocks, head = blocks_of(model), model.traits.unembedding_paths[0]
    places = [(path, "output") for path in blocks] + [(head, "output"), END]
    seen: list[dict[Place, torch.Tensor]] = []
    found = []
    for prompt, writes, reads in zip(*experiment, strict=True):
        change: dict[Place, Change] = {}
        for layer, position, form, source, source_layer in writes:
            if form is None:
                vector = seen[source][blocks[source_layer], "output"][0, -1]
                change[blocks[layer], "output"] = patched(position, vector)
            else:
                change[blocks[layer], "output"] = in_torch(FORMS[form], position)
        seen.append(alone(model, POOL[prompt], places, change))
        own = []
        for place, pick in reads:
            at_place = (head, "output") if place == "head" else END
            if place not in ("head", "model"):
                at_place = (blocks[int(place)], "output")
            own.append(PICKS[pick](seen[-1][at_place]))
        found.append(own)
    return found


@pytest.mark.parametrize("name", sampled(["gpt2", "llama", "mistral"], ["mistral"]))
def test_random_experiments(name: str) -> None:
    model = kept(name)

    @seed(int(os.environ.get("INSITU_SEED", "0")))
    @settings(
        max_examples=int(os.environ.get("INSITU_EXPERIMENTS", "40")), deadline=None, database=None
    )
    @given(
        experiments(len(blocks_of(model))), st.integers(1, 80), st.sampled_from([True, True, None])
    )
    def agree(experiment: Experiment, budget: int, share: bool | None) -> None:
        saved = run_experiment(model, experiment, max_tokens_per_pass=budget, share_prefixes=share)
        for own, right in zip(saved, expected_of(model, experiment), strict=True):
            for found, value in zip(own, right, strict=True):
                assert_close(found, value)

    agree()
