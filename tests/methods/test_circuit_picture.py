"""A circuit is drawn with heads as one, whatever of them an edge goes into."""

import math
from pathlib import Path
from typing import Any

import pytest

from insitu import LanguageModel
from insitu.graph.errors import OptionError
from insitu.methods import Circuit, Edge, edge_attribution, logit_difference
from tests.conftest import tiny_gpt2, tiny_llama
from tests.methods.edges_by_hand import CLEAN, CORRUPTED
from tests.thinning import sampled

EDGES = (
    Edge("input", "a1.q1", 2.0),
    Edge("input", "a1.k0", -3.0),
    Edge("input", "a1.v0", 0.5),
    Edge("a1.h1", "m1", 4.0),
    Edge("a1.h0", "logits", 1.0),
    Edge("m1", "logits", -2.0),
)


def boxes(figure: Any) -> dict[str, float]:
    """The boxes of a figure, and in which row each stands."""
    return {box.text: box.y for box in figure.layout.annotations if box.bordercolor}


def lines(figure: Any) -> set[tuple[float, float, bool]]:
    """The lines of a figure: from and to which row each goes, and whether it is negative."""
    found = set()
    for trace in figure.data:
        if trace.mode != "lines":
            continue
        line: list[float] = []
        for y in trace.y:
            if y is not None and not math.isnan(y):
                line.append(y)
            else:
                found.add((line[0], line[-1], trace.name == "negative"))
                line = []
    return found


def test_an_edge_into_a_head_is_the_sum_of_those_into_what_it_reads() -> None:
    figure = Circuit("a", "b", (Edge("input", "a0.q1", 2.0), Edge("input", "a0.v1", -3.0))).plot()
    assert boxes(figure) == {"input": 0, "a0.h1": 1}
    assert lines(figure) == {(0, 1, True)}


def test_shared_keys_and_values_lead_to_each_head_that_is_there() -> None:
    figure = Circuit("a", "b", EDGES, sharing=2).plot(title="Mine")
    assert "Mine" in [text.text for text in figure.layout.annotations]
    assert boxes(figure) == {"input": 0, "a1.h0": 1, "a1.h1": 1, "m1": 2, "logits": 3}
    # Into both heads -2.5, and of head 1 two more for its queries.
    assert lines(figure) == {(0, 1, True), (1, 2, False), (1, 3, False), (2, 3, True)}
    assert [*figure.layout.yaxis.ticktext] == ["layer 1"]


def test_attention_that_adds_as_one_is_drawn_as_one() -> None:
    edges = (Edge("input", "a0.q1", 1.0), Edge("a0", "m0", 1.0), Edge("m0", "logits", 1.0))
    assert boxes(Circuit("a", "b", edges).plot()) == {"input": 0, "a0": 1, "m0": 2, "logits": 3}


@pytest.mark.parametrize("module", sampled([tiny_gpt2, tiny_llama], [tiny_llama]))
def test_how_many_heads_share_keys_is_known(module: Any) -> None:
    model = LanguageModel(module())
    heads = model.config.num_attention_heads
    keys = getattr(model.config, "num_key_value_heads", heads)
    result = edge_attribution(model, CLEAN, CORRUPTED, logit_difference(3, 50))
    found = Circuit.of(result)
    assert found.sharing == found.top(3).sharing == heads // keys


def test_it_is_kept_in_files(tmp_path: Path) -> None:
    found = Circuit("a", "b", EDGES, sharing=2)
    found.save(tmp_path / "circuit.safetensors")
    assert Circuit.load(tmp_path / "circuit.safetensors").sharing == 2
    found.to_html(tmp_path / "circuit.html", most=3)
    assert "a1.h1" in (tmp_path / "circuit.html").read_text()


def test_without_edges_there_is_nothing_to_draw() -> None:
    with pytest.raises(OptionError, match="no edges to draw"):
        Circuit("a", "b", ()).plot()
