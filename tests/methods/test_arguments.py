"""The arguments of methods are those of the tables in `docs/methods/index.md`, and of no other."""

import ast
import inspect
import re
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import insitu.methods
from insitu import InsituError, LanguageModel, OptionError
from insitu.deprecation import renames_of
from insitu.methods import (
    Circuit,
    Metric,
    Probe,
    Result,
    SparseAutoencoder,
    SteeringVector,
    TunedLens,
    ablate,
    direct_logit_attribution,
    integrated_gradients,
    logit_difference,
    probe,
    steer,
)
from insitu.methods.metrics import Tokens
from tests.thinning import sampled

METHODS = {
    name: getattr(insitu.methods, name)
    for name in insitu.methods.__all__
    if inspect.isfunction(getattr(insitu.methods, name))
}
PAGE = (Path(__file__).parents[2] / "docs" / "methods" / "index.md").read_text()

AMetric = Metric | Callable[[Any], Any]
TAKES: Mapping[str, Any] = {
    "a model": LanguageModel,
    "a model, or None": LanguageModel | None,
    "one prompt or several": Any,
    "a metric": AMetric,
    "a metric, or None": AMetric | None,
    "a token, or one for each prompt": Tokens,
    "a token, or one for each prompt, or None": Tokens | None,
    "names of axes": str | Sequence[str],
    "names, or None": str | Sequence[str] | None,
    "a name, or None": str | None,
    "one, several, or None": int | Iterable[int] | None,
    'one, several, "mean", or None': int | Iterable[int] | Literal["mean"] | None,
    'one, several, "last", "generated", or None': (
        int | Iterable[int] | Literal["last", "generated"] | None
    ),
    "one": int,
    'one, or "mean"': int | Literal["mean"],
    '`"denoising"` or `"noising"`': Literal["denoising", "noising"],
    "True or False": bool,
    "True, False, or None": bool | None,
    "a count": int,
    "a count, or None": int | None,
    "several counts, or None": Iterable[int] | None,
    "a whole number": int,
    "a whole number, or None": int | None,
    "a share": float,
    "a circuit": Circuit,
    "a sparse autoencoder": SparseAutoencoder,
    "a sparse autoencoder, or None": SparseAutoencoder | None,
    "a tuned lens": TunedLens,
    "a tuned lens, or None": TunedLens | None,
}
"""The annotation that the words of a table stand for."""

OWN = {
    "ablate": ("reference", "by_position", "together"),
    "causal_tracing": ("subject", "samples", "noise", "window"),
    "discover_circuit": ("edges", "threshold"),
    "distributed_alignment_search": (
        *("bases", "sources", "answers", "layer", "dimensions", "source_position", "lr"),
    ),
    "feature_examples": ("activations", "features", "context"),
    "head_scores": ("kinds", "length", "count"),
    "integrated_gradients": ("baseline",),
    "path_patching": ("senders", "receivers", "through_mlps"),
    "probe": ("labels", "penalty"),
    "steer": ("vector", "strengths", "max_new_tokens", "kwargs"),
    "steering_vector": ("positive", "negative"),
    "train_tuned_lens": ("optimiser",),
    "use_sae": ("error_term",),
}
"""Arguments for what no other method has. Before one is added, look for its word in the tables."""


def rows(head: str) -> list[list[str]]:
    """The cells of the table that begins with some columns."""
    table = PAGE.split(head)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip().strip("|").split(" | ")] for row in table]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


SHARED = {
    name: (takes, default)
    for names, takes, default, _ in rows("| argument | takes | unless given | meaning |")
    for name in names_in(names)
}
DIFFERENT = {
    (names_in(method)[0], names_in(name)[0]): (takes, default)
    for name, method, takes, default, _ in rows(
        "| argument | of | takes | unless given | because |"
    )
}
GIVEN = [
    pytest.param(method, parameter, id=f"{name}-{parameter.name}")
    for name, method in METHODS.items()
    for parameter in inspect.signature(method).parameters.values()
    if parameter.name not in OWN.get(name, ())
]


def annotation(method: Any, parameter: inspect.Parameter) -> Any:
    return eval(parameter.annotation, inspect.unwrap(method).__globals__)


@pytest.mark.parametrize(("method", "parameter"), GIVEN)
def test_an_argument_is_that_of_the_table(method: Any, parameter: inspect.Parameter) -> None:
    name = parameter.name
    assert name in SHARED, f"{name!r} of {method.__name__} is in no table: is there a word for it?"
    takes, default = DIFFERENT.get((method.__name__, name), SHARED[name])
    kind = annotation(method, parameter)
    if takes == "a word of the method":
        assert get_origin(kind) is Literal and all(isinstance(w, str) for w in get_args(kind))
    else:
        assert kind == TAKES[takes]
    if default == "its first word":
        assert parameter.default == get_args(kind)[0]
    elif default == "its own number":
        assert type(parameter.default) is int
    elif default == "needed":
        assert parameter.default is parameter.empty
    else:
        assert (parameter.default,) == (ast.literal_eval(default.strip("`")),)


def test_what_the_tables_say_differs_does() -> None:
    for (method, name), row in DIFFERENT.items():
        assert name in inspect.signature(METHODS[method]).parameters
        assert row != SHARED[name], f"{name!r} of {method} is as in other methods"


def test_an_argument_of_one_method_is_in_one_method() -> None:
    used = [name for method in METHODS.values() for name in inspect.signature(method).parameters]
    for method, names in OWN.items():
        for name in names:
            assert name in inspect.signature(METHODS[method]).parameters
            assert used.count(name) == 1 and name not in SHARED, name


def test_the_table_has_no_argument_that_one_method_has() -> None:
    used = [name for method in METHODS.values() for name in inspect.signature(method).parameters]
    assert [name for name in SHARED if used.count(name) < 2] == []


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("use_sae",)])
def test_what_runs_a_model_shows_progress_and_bounds_memory(name: str) -> None:
    parameters = inspect.signature(METHODS[name]).parameters
    if "model" in parameters and parameters["model"].default is inspect.Parameter.empty:
        assert {"progress", "max_tokens_per_pass"} <= parameters.keys()


RENAMED = [
    pytest.param(method, old, new, id=f"{name}-{old}")
    for name, method in METHODS.items()
    if (renames := renames_of(method)) is not None
    for old, new in renames.names.items()
]


def test_new_names_are_those_of_the_tables() -> None:
    """The old ones are not, but for three that mean something else in other methods."""
    pairs = [(one.values[1], one.values[2]) for one in RENAMED]
    assert len(pairs) == 12
    assert {old for old, _ in pairs if old in SHARED} == {"by", "site", "position"}
    assert all(new in SHARED or new in ("error_term", "strengths") for _, new in pairs)


@pytest.mark.parametrize(("method", "old", "new"), RENAMED)
def test_an_old_name_warns_and_goes_on_as_the_new_one(method: Any, old: str, new: str) -> None:
    warns = pytest.warns(DeprecationWarning, match=f"`{old}=` .* write `{new}=` instead")
    with warns as caught, pytest.raises(InsituError) as error:
        method(**{old: "x"})  # without what it needs: the error comes after the warning
    assert [one.filename for one in caught] == [__file__]
    assert f"{old}:" not in str(error.value), "the signature has the old name"


@pytest.mark.parametrize(("method", "old", "new"), RENAMED)
def test_both_names_of_an_argument_are_refused(method: Any, old: str, new: str) -> None:
    with pytest.raises(OptionError, match=f"is given `{new}` and `{old}`") as error:
        method(**{old: "x", new: "x"})
    assert "test_arguments.py" in str(error.value)
    files = [frame.filename for frame in traceback.extract_tb(error.value.__traceback__)]
    assert sum("insitu/methods" in file or "deprecation" in file for file in files) <= 1


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=2, n_head=2)
    torch.manual_seed(0)
    return LanguageModel(transformers.GPT2LMHeadModel(config).eval())


PROMPT = [3, 1, 4, 1, 5]
METRIC = logit_difference(3, 4)
CALLS: Mapping[str, tuple[Callable[[LanguageModel], Any], Callable[[LanguageModel], Any]]] = {
    "ablate": (
        lambda model: ablate(model, [PROMPT, [2, 7]], METRIC, what="mlps", mode="mean"),  # pyright: ignore
        lambda model: ablate(model, [PROMPT, [2, 7]], METRIC, part="mlps", method="mean"),
    ),
    "direct_logit_attribution": (
        lambda model: direct_logit_attribution(model, PROMPT, 3, by="head"),  # pyright: ignore
        lambda model: direct_logit_attribution(model, PROMPT, 3, part="heads"),
    ),
    "integrated_gradients": (
        lambda model: integrated_gradients(model, PROMPT, METRIC, steps=4, rule="trapezoid"),  # pyright: ignore
        lambda model: integrated_gradients(model, PROMPT, METRIC, steps=4, method="trapezoid"),
    ),
    "probe": (
        lambda model: (
            probe(
                model,
                EVEN,
                LABELS,
                site=["mlp_out"],
                kind="linear",
                position="all",  # pyright: ignore
            ).scores
        ),
        lambda model: (
            probe(model, EVEN, LABELS, sites=["mlp_out"], method="linear", positions=None).scores
        ),
    ),
}
EVEN = [[number, number + 1] for number in range(20)]
LABELS = [number % 5 for number in range(20)]


@pytest.mark.parametrize("name", sampled(CALLS, ["probe", "direct_logit_attribution"]))
def test_old_names_give_what_new_ones_do(tiny: LanguageModel, name: str) -> None:
    old, new = CALLS[name]
    with pytest.warns(DeprecationWarning):
        found: Result = old(tiny)
    expected: Result = new(tiny)
    assert found.title == expected.title and found.axes == expected.axes
    assert torch.equal(found.values, expected.values)


def test_old_names_of_steering_give_what_new_ones_do(tiny: LanguageModel) -> None:
    vector = SteeringVector("residual_out", (1,), torch.ones(1, 8))
    with pytest.warns(DeprecationWarning) as caught:
        old = steer(tiny, PROMPT, vector, strength=[0, 9], positions="all", max_new_tokens=3)  # pyright: ignore
    assert [str(one.message).split("`")[1] for one in caught] == ["strength=", "positions='all'"]
    new = steer(tiny, PROMPT, vector, strengths=[0, 9], max_new_tokens=3)
    assert [one.ids.tolist() for one in old] == [one.ids.tolist() for one in new]
    with tiny.trace(PROMPT):
        with pytest.warns(DeprecationWarning, match="positions=None"):
            vector.apply(tiny, 9.0, positions="all")  # pyright: ignore
        old_logits = tiny.logits.save()
    with tiny.trace(PROMPT):
        vector.apply(tiny, 9.0)
        new_logits = tiny.logits.save()
    assert torch.equal(old_logits.value, new_logits.value)


def test_old_attributes_of_probes_are_the_new_ones(tiny: LanguageModel, tmp_path: Path) -> None:
    """And files keep the old names, in which older versions look for them."""
    learned = probe(tiny, EVEN, LABELS, method="linear", positions=None)
    learned.save(tmp_path / "probe.safetensors")
    for one in (learned, Probe.load(tmp_path / "probe.safetensors")):
        assert one.method == "linear" and one.positions is None
        with pytest.warns(DeprecationWarning, match=r"`\.method`"):
            assert one.kind == "linear"
        with pytest.warns(DeprecationWarning, match=r"`\.positions`"):
            assert one.position is None
    written = (tmp_path / "probe.safetensors").read_bytes()
    assert b'kind\\":\\"linear' in written and b'position\\":\\"all' in written


@pytest.mark.parametrize(
    ("method", "wrong", "right"),
    [
        ("ablate", "kind", "method"),
        ("ablate", "what_", None),
        ("head_scores", "top", None),  # it has a count of other things
        ("probe", "mode", "method"),
        ("logit_lens", "layer", "layers"),
        ("logit_lens", "sites", "site"),
        ("logit_lens", "k", "top"),
        ("activation_patching", "batch_size", "max_tokens_per_pass"),
        ("activation_patching", "part", "sites"),
        ("ablate", "component", "part"),
        ("attribution_patching", "hook_name", "sites"),
        ("integrated_gradients", "internal_batch_size", "max_tokens_per_pass"),
        ("integrated_gradients", "mode", "method"),
        ("gradient_times_input", "verbose", "progress"),
    ],
)
def test_a_word_of_another_method_is_told_with_that_of_this_one(
    method: str, wrong: str, right: str | None
) -> None:
    parameters = inspect.signature(METHODS[method]).parameters.values()
    needed = [None for one in parameters if one.default is one.empty]
    with pytest.raises(OptionError, match=f"unexpected keyword argument '{wrong}'") as error:
        METHODS[method](*needed, **{wrong: 1})
    hint = "nearest" if right is None else f"nearest: '{right}'"
    assert (hint in str(error.value)) is (right is not None)
    for one in inspect.signature(METHODS[method]).parameters:
        assert re.search(rf"It takes `.*\b{one}\b", str(error.value))
