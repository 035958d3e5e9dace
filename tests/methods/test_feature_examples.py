"""The contexts in which features are largest: in closed form, and by looking at every row."""

from __future__ import annotations

import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from insitu import LanguageModel, OptionError, ShapeError
from insitu.harvest import Activations
from insitu.methods import FeatureExamples, SparseAutoencoder, feature_examples
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder
from tests.methods.test_sae import written

pytestmark = pytest.mark.no_wire

LENGTHS = [[4, 3], [5], [2, 6]]


def identity(width: int, bias: float = 0.0) -> SparseAutoencoder:
    """Its features are the activations themselves, where they are above 0."""
    eye = torch.eye(width)
    weights = {
        "W_enc": eye,
        "W_dec": eye,
        "b_dec": torch.zeros(width),
        "b_enc": torch.full((width,), bias),
    }
    return SparseAutoencoder(
        "standard", weights, "blocks.1.hook_resid_post", False, "none", 0, False, {}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five sequences of 4, 3, 5, 2 and 6 tokens, and three features."""
    rows = torch.zeros(20, 3)
    rows[[1, 3, 5, 9, 12, 14], 0] = torch.tensor([2.0, 5.0, 1.0, 7.0, 5.0, 4.0])
    rows[:, 1] = -1.0
    rows[[0, 19], 2] = torch.tensor([0.5, float("nan")])
    values = {LABEL: rows}
    ids = torch.arange(100, 120)
    write_folder(tmp_path / "a", LENGTHS, [dense(shape=(3,))], values=values, token_ids=ids)
    return tmp_path / "a"


def test_examples_are_the_largest_of_each_sequence(folder: Path) -> None:
    found = feature_examples(Activations.open(folder), identity(3), [0, 2, 1], top=3, context=2)
    assert found.features == (0, 2, 1) and found.rows == 20 and len(found) == 3
    first, second, third = found[0]
    # 7 in the third sequence; 5 in the first, whose 2 is another place in it; 5 in the fourth,
    # which comes later; the 1 of the second is left out.
    assert [one.value for one in found[0]] == [7.0, 5.0, 5.0]
    assert [one.row for one in found[0]] == [9, 3, 12]
    assert [one.sequence for one in found[0]] == [2, 0, 3]
    assert [one.position for one in found[0]] == [2, 3, 0]
    assert [one.document for one in found[0]] == [4, 0, 6]
    assert first.tokens == ("107", "108", "109", "110", "111") and first.peak == 2
    assert first.values.tolist() == [0, 0, 7, 0, 0] and first.token == "109"
    assert second.tokens == ("101", "102", "103") and second.peak == 2
    assert second.values.tolist() == [2, 0, 5]
    assert third.tokens == ("112", "113") and third.peak == 0 and third.text == "112113"
    assert [one.row for one in found[2]] == [0]
    assert found[1] == ()  # nowhere above 0
    assert found.counts == (6, 1, 0) and found.density(0) == 6 / 20


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 100])
def test_it_does_not_depend_on_how_much_is_read_at_once(
    folder: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = feature_examples(Activations.open(folder), identity(3), [0, 1, 2], top=9)
    module = sys.modules["insitu.methods.feature_examples"]  # the function has its name
    monkeypatch.setattr(module, "_NUMBERS", at_once * 6)
    parts = feature_examples(Activations.open(folder), identity(3), [0, 1, 2], top=9)
    assert places(parts) == places(whole) and parts.counts == whole.counts


def places(found: FeatureExamples) -> list[list[tuple[int, float]]]:
    return [[(one.row, one.value) for one in own] for own in found]


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_as_a_look_at_every_row_finds_them(kind: str, tmp_path: Path) -> None:
    """Of every architecture, with all features computed at once and sorted by Python."""
    sae = SparseAutoencoder.load(written(tmp_path / "sae", kind, width=4))
    lengths = [[5, 9, 3], [8, 8], [1, 7]]
    whole = write_folder(tmp_path / "a", lengths, [dense(dtype="bfloat16")])
    features = sae.encode(whole[LABEL])
    chosen = [0, 17, 3, 39]
    found = feature_examples(Activations.open(tmp_path / "a"), sae, chosen, top=4, context=0)
    some = 0
    for feature in chosen:
        best: dict[int, tuple[float, int]] = {}
        for row, value in enumerate(features[:, feature].tolist()):
            sequence = int(whole["sequence"][row])
            if value > 0 and value > best.get(sequence, (0.0, 0))[0]:
                best[sequence] = value, row
        expected = sorted(best.values(), key=lambda pair: (-pair[0], pair[1]))[:4]
        assert [one.row for one in found[feature]] == [row for _, row in expected]
        for one, (value, _) in zip(found[feature], expected, strict=True):
            assert abs(one.value - value) < 1e-5 and len(one.tokens) == 1
        some += len(expected)
        assert found.density(feature) == float((features[:, feature] > 0).double().mean())
    assert some > 3


def test_of_a_site_that_keeps_the_largest_features(tmp_path: Path) -> None:
    sites = [dense(), sparse("sae:1", 3, 20)]
    whole = write_folder(tmp_path / "a", LENGTHS, sites)
    activations = Activations.open(tmp_path / "a")
    every = activations["sae:1"][:].to_dense(20).clamp(min=0)
    found = feature_examples(activations, None, [4, 11], site="sae:1", top=5)
    for feature in (4, 11):
        expected = []
        for sequence in range(5):
            rows = (whole["sequence"] == sequence).nonzero().flatten()
            at = int(every[rows, feature].argmax())
            expected.append((float(every[rows[at], feature]), int(rows[at])))
        expected = sorted((pair for pair in expected if pair[0] > 0), key=lambda p: -p[0])
        assert [(one.value, one.row) for one in found[feature]] == expected


def test_tokens_are_of_the_same_document(tmp_path: Path) -> None:
    """A packed sequence holds several: their tokens are no context of each other."""
    rows = torch.zeros(8, 2)
    rows[4, 0] = 1.0
    document = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    write_folder(
        tmp_path / "a",
        [[8]],
        [dense(shape=(2,))],
        values={LABEL: rows, "document": document},
        token_ids=torch.arange(8),
        pack=True,
    )
    (one,) = feature_examples(Activations.open(tmp_path / "a"), identity(2), 0)[0]
    assert one.tokens == ("3", "4", "5") and one.document == 1 and one.position == 4


def test_of_heads_side_by_side(tmp_path: Path) -> None:
    rows = torch.zeros(3, 2, 2)
    rows[1, 1, 0] = 3.0
    write_folder(tmp_path / "a", [[3]], [dense("z:0", (2, 2))], values={"z:0": rows})
    (one,) = feature_examples(Activations.open(tmp_path / "a"), identity(4), 2)[2]
    assert one.row == 1 and one.value == 3.0


def test_words_are_of_the_models_tokenizer(tmp_path: Path, eiffel: LanguageModel) -> None:
    ids = torch.tensor(eiffel.tokenizer("The Eiffel Tower is in the city of")["input_ids"])
    rows = torch.zeros(len(ids), 2)
    rows[3, 1] = 2.0
    write_folder(
        tmp_path / "a", [[len(ids)]], [dense(shape=(2,))], values={LABEL: rows}, token_ids=ids
    )
    activations = Activations.open(tmp_path / "a")
    (one,) = feature_examples(activations, identity(2), 1, model=eiffel)[1]
    assert one.text == "The Eiffel Tower is in the city of"
    assert one.token == eiffel.tokenizer.decode(ids[3:4])


@pytest.mark.parametrize("token", [-1, 10**9])
def test_a_model_without_these_tokens_is_refused(
    tmp_path: Path, eiffel: LanguageModel, token: int
) -> None:
    values = {LABEL: torch.ones(2, 2)}
    ids = torch.tensor([3, token])
    write_folder(tmp_path / "a", [[2]], [dense(shape=(2,))], values=values, token_ids=ids)
    with pytest.raises(OptionError, match="give the model that they were taken from"):
        feature_examples(Activations.open(tmp_path / "a"), identity(2), 1, model=eiffel)


@pytest.fixture
def found(folder: Path) -> FeatureExamples:
    return feature_examples(Activations.open(folder), identity(3), [0, 1], top=3, context=2)


def test_they_are_printed_with_coloured_tokens(found: FeatureExamples) -> None:
    out = StringIO()
    Console(file=out, width=80, force_terminal=True, color_system="truecolor").print(found)
    page = found._repr_html_()
    for shown in (out.getvalue(), page):
        assert "Feature 0 of residual_out:1" in shown and "above 0 at 30% of rows" in shown
        assert "no examples" in shown and "109" in shown
    assert out.getvalue().count("48;2;") == 4  # a background for each number above 0
    assert page.count("background:#") == 4
    assert repr(found) == "<Examples of 2 features of residual_out:1: 3 in 20 rows>"


def test_hostile_tokens_stay_text() -> None:
    from insitu.display.token_lines import TokenLine, TokenLines, lines_html, printed_lines

    tokens = ("<script>", "\x1b[31m", "\n", " a", "&amp;")
    group = TokenLines("<b>", [TokenLine("<i>", tokens, (1.0, 2.0, 3.0, 0.0, 1.0))])
    page = lines_html([group])
    assert "<script>" not in page and "<i>" not in page and "\x1b" not in page
    assert "&lt;script&gt;" in page and "&amp;amp;" in page
    out = StringIO()
    Console(file=out, width=80).print(printed_lines([group]))
    assert "\x1b" not in out.getvalue() and " a" in out.getvalue()


def test_they_are_drawn(found: FeatureExamples) -> None:
    figure = found.plot(0)
    assert [[*trace.text[0]] for trace in figure.data] == [[*one.tokens] for one in found[0]]
    assert [list(trace.z[0]) for trace in figure.data] == [one.values.tolist() for one in found[0]]
    assert figure.layout.coloraxis.cmin == 0 and figure.layout.coloraxis.cmax == 7
    assert len(found.select(1).plot(title="none").data) == 0
    with pytest.raises(OptionError, match="Which feature"):
        found.plot()


def test_they_are_tables_and_results(found: FeatureExamples) -> None:
    table = found.to_dataframe()
    assert [*table.columns] == [
        *("feature", "rank", "value", "token", "text", "document", "sequence", "position")
    ]
    assert table["value"].tolist() == [7.0, 5.0, 5.0] and table["rank"].tolist() == [0, 1, 2]
    result = found.result(0)
    assert result.sizes == {"prompt": 3, "position": 5}
    assert result.select(prompt=1).values.tolist() == [2, 0, 5]
    assert result.tokens[1] == ("101", "102", "103")
    with pytest.raises(OptionError, match="nowhere above 0"):
        found.result(1)
    with pytest.raises(OptionError, match="was not looked for"):
        found[2]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"features": 3}, OptionError, "no feature 3"),
        ({"features": []}, OptionError, "No feature was chosen"),
        ({"features": "x"}, OptionError, "A feature is given as a number"),
        ({"sae": None}, OptionError, "give the sparse autoencoder"),
        ({"sae": identity(4)}, ShapeError, "is 3 wide, and the sparse autoencoder 4"),
        ({"top": 0}, OptionError, "`top` is a whole number from 1"),
        ({"context": -1}, OptionError, "`context` is a whole number from 0"),
        ({"activations": "folder"}, OptionError, r"Activations\.open\(folder\)"),
        ({"site": "none"}, KeyError, "No site 'none'"),
    ],
    ids=str,
)
def test_what_cannot_be_looked_for_is_named(
    folder: Path, options: Any, error: type[Exception], said: str
) -> None:
    given = {"activations": Activations.open(folder), "sae": identity(3), "features": 0}
    with pytest.raises(error, match=said):
        feature_examples(**{**given, **options})


def test_sites_that_have_no_examples_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[3]], [dense(), sparse("sae:1", 3, 20)])
    activations = Activations.open(tmp_path / "a")
    with pytest.raises(OptionError, match="several sites"):
        feature_examples(activations, identity(4), 0)
    with pytest.raises(OptionError, match="holds features already"):
        feature_examples(activations, identity(4), 0, site="sae:1")
    write_folder(tmp_path / "b", [[3]], reduce="last")
    with pytest.raises(OptionError, match="without `reduce`"):
        feature_examples(Activations.open(tmp_path / "b"), identity(4), 0)
