"""Activation patching, beside the same loops with PyTorch's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from insitu.graph.errors import OptionError, PromptError, ShapeError
from insitu.methods import (
    activation_patching,
    attribution_patching,
    kl_divergence,
    log_probability,
    logit_difference,
)
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out
from tests.thinning import sampled, thinned

CLEAN = [[5, 17, 3, 88, 41], [7, 9, 30, 2, 66, 12, 4], [1, 2, 3]]
CORRUPTED = [[5, 18, 3, 80, 41], [7, 9, 31, 2, 66, 13, 4], [1, 20, 3]]
WIDTH = 4  # of a head
METRIC = logit_difference(11, 23)

Part = tuple[Any, ...]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Models in which each part matters, as it does not at random initialisations."""
    model = LanguageModel({"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]())
    spread_out(model.module)
    return model


def place_of(module: nn.Module, name: str, layer: int) -> tuple[nn.Module, bool]:
    """The module at which a site is, and whether it is what that is given."""
    gpt2 = module.config.model_type == "gpt2"
    block = (module.transformer.h if gpt2 else module.model.layers)[layer]
    attention = block.attn if gpt2 else block.self_attn
    if name == "residual_in":
        return block, True
    if name == "z":
        return (attention.c_proj if gpt2 else attention.o_proj), True
    if name == "post":
        return (block.mlp.c_proj if gpt2 else block.mlp.down_proj), True
    return {"residual_out": block, "attention_out": attention, "mlp_out": block.mlp}[name], False


@contextmanager
def seeing(
    module: nn.Module, name: str, layer: int, change: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    owner, given = place_of(module, name, layer)

    def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        change(args[0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        change(output[0] if isinstance(output, tuple) else output)

    handle = (
        owner.register_forward_pre_hook(before) if given else owner.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def logits(module: nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def difference(found: torch.Tensor) -> torch.Tensor:
    return found[-1, 11] - found[-1, 23]


def patched(
    module: nn.Module,
    run: list[int],
    other: list[int],
    parts: list[tuple[str, int, Part, Part]],
    measure: Callable[[torch.Tensor], torch.Tensor] = difference,
) -> torch.Tensor:
    """One run with parts of another: of each a site, a layer, where it is put, and taken from."""
    donors: list[torch.Tensor] = []
    for name, layer, _, _ in parts:
        with seeing(module, name, layer, lambda value: donors.append(value.clone())):
            logits(module, other)
    with ExitStack() as stack:
        for (name, layer, into, out_of), donor in zip(parts, donors, strict=True):

            def put(value: torch.Tensor, into=into, out_of=out_of, donor=donor) -> None:
                value[into] = donor[out_of]

            stack.enter_context(seeing(module, name, layer, put))
        return measure(logits(module, run))


def head(number: int) -> Part:
    return (..., slice(number * WIDTH, (number + 1) * WIDTH))


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("direction", sampled(["denoising", "noising"], ["denoising"]))
@pytest.mark.parametrize(
    "site",
    thinned(
        ["residual_in", "residual_out", "attention_out", "mlp_out"],
        ["residual_out", "attention_out"],
    ),
)
def test_layers_and_positions_of_pairs_of_any_length(
    language_model: LanguageModel, site: str, direction: Any
) -> None:
    model, module = language_model, language_model.module
    result = activation_patching(
        model, CLEAN, CORRUPTED, METRIC, sites=site, direction=direction, normalised=False
    )
    assert result.sizes == {"prompt": 3, "layer": model.n_layers, "position": 7}
    assert result.quantity == "logit difference"
    for pair, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        run, other = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
        for layer in range(model.n_layers):
            for position in range(len(clean)):
                part = (slice(None), position)
                expected = patched(module, run, other, [(site, layer, part, part)])
                found = result.values[pair, layer, position]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert result.values[pair, :, len(clean) :].isnan().all()
        assert result.select(prompt=pair).sizes["position"] == len(clean)
        for name, ids in (("clean", clean), ("corrupted", corrupted)):
            torch.testing.assert_close(
                result.details[name][pair], difference(logits(module, ids)), rtol=1e-4, atol=1e-5
            )


def test_heads_by_position(language_model: LanguageModel) -> None:
    model, module = language_model, language_model.module
    result = activation_patching(
        model,
        CLEAN[0],
        CORRUPTED[0],
        METRIC,
        sites="z",
        by=("position", "head", "layer"),
        layers=[-1, 0],
        heads=[3, 1],
        normalised=False,
    )
    assert [axis.name for axis in result.axes] == ["position", "head", "layer"]
    assert result.axis("layer").labels == (str(model.n_layers - 1), "0")
    assert result.axis("head").labels == ("3", "1")
    for position in range(5):
        for at, number in enumerate([3, 1]):
            for where, layer in enumerate([model.n_layers - 1, 0]):
                part = (slice(None), position, head(number)[1])
                expected = patched(module, CORRUPTED[0], CLEAN[0], [("z", layer, part, part)])
                found = result.values[position, at, where]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_axis_is_patched_whole_or_where_it_was_chosen(
    language_model: LanguageModel,
) -> None:
    model, module = language_model, language_model.module
    by_head = activation_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, sites="z", by="head", layers=[0, 1], heads=2,
        positions=[0, 1, 3], normalised=False,
    )  # fmt: skip
    part = (slice(None), [0, 1, 3], head(2)[1])
    expected = patched(module, CORRUPTED[0], CLEAN[0], [("z", n, part, part) for n in (0, 1)])
    torch.testing.assert_close(by_head.values, expected[None], rtol=1e-4, atol=1e-5)

    neurons = [0, 3, 9]  # two lists in one index: all pairs of them, not one and one
    at_once = activation_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, sites="post", by="layer", neurons=neurons,
        positions=[0, 2, 3], normalised=False,
    )  # fmt: skip
    for layer in range(model.n_layers):
        parts = [
            (
                "post",
                layer,
                (slice(None), [0, 2, 3], n),
            )
            * 1
            for n in neurons
        ]
        parts = [(site, layer, index, index) for site, layer, index in parts]
        expected = patched(module, CORRUPTED[0], CLEAN[0], parts)
        torch.testing.assert_close(at_once.values[layer], expected, rtol=1e-4, atol=1e-5)


def test_several_sites_are_an_axis(language_model: LanguageModel) -> None:
    model, module = language_model, language_model.module
    sites = ["mlp_out", "attention_out"]
    result = activation_patching(
        model, CLEAN, CORRUPTED, METRIC, sites=sites, by="layer", normalised=False
    )
    assert result.sizes == {"prompt": 3, "site": 2, "layer": model.n_layers}
    assert result.axis("site").labels == ("mlp_out", "attention_out")
    whole = (slice(None),)
    for pair in range(3):
        for at, site in enumerate(sites):
            expected = [
                patched(module, CORRUPTED[pair], CLEAN[pair], [(site, layer, whole, whole)])
                for layer in range(model.n_layers)
            ]
            found = result.values[pair, at]
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", sampled(["denoising", "noising"], ["noising"]))
def test_a_layer_patched_whole_is_the_other_run(
    language_model: LanguageModel, direction: Any
) -> None:
    result = activation_patching(
        language_model, CLEAN, CORRUPTED, METRIC, by="layer", direction=direction
    )
    torch.testing.assert_close(result.values, torch.ones_like(result.values), rtol=0, atol=1e-4)
    last = activation_patching(
        language_model, CLEAN, CORRUPTED, METRIC, sites="residual_out", layers=[-1], positions=[-1]
    )
    assert last.values.flatten().tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert result.centre == 0


def test_a_share_of_nothing_patched_is_zero(language_model: LanguageModel) -> None:
    result = activation_patching(language_model, CLEAN[0], CORRUPTED[0], METRIC)
    assert result.values[:, 0].abs().max() < 1e-4  # the first tokens are the same
    raw = activation_patching(language_model, CLEAN[0], CORRUPTED[0], METRIC, normalised=False)
    clean, corrupted = result.details["clean"], result.details["corrupted"]
    expected = (raw.values - corrupted) / (clean - corrupted)
    torch.testing.assert_close(result.values, expected, rtol=1e-3, atol=1e-4)
    assert raw.centre == pytest.approx(corrupted.item())


def test_other_metrics(language_model: LanguageModel) -> None:
    model, module = language_model, language_model.module
    ends = [logits(module, ids)[-1].log_softmax(-1) for ids in (CLEAN[0], CORRUPTED[0])]
    part = (slice(None), 1)

    def expected(measure: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        parts = [("residual_out", 1, part, part)]
        return patched(module, CORRUPTED[0], CLEAN[0], parts, measure)

    def divergence(found: torch.Tensor) -> torch.Tensor:
        return (ends[0].exp() * (ends[0] - found[-1].log_softmax(-1))).sum()

    cases: list[tuple[Any, Callable[[torch.Tensor], torch.Tensor], str]] = [
        (kl_divergence(), divergence, "KL divergence"),
        (log_probability(7), lambda found: found[-1].log_softmax(-1)[7], "log probability"),
        (spread, spread, "spread"),
    ]
    for metric, oracle, name in cases:
        result = activation_patching(
            model, CLEAN[0], CORRUPTED[0], metric, layers=1, positions=1, normalised=False
        )
        torch.testing.assert_close(result.values[0, 0], expected(oracle), rtol=1e-3, atol=1e-5)
        assert result.quantity == name


def spread(found: Any) -> Any:
    return found[0].max() - found[-1].min()


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.filterwarnings("ignore:.*eager:UserWarning")
def test_rows_of_patterns(language_model: LanguageModel) -> None:
    """What a head gives at a position is its row of the other run's pattern, of its own values."""
    model, module = language_model, language_model.module
    both = activation_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, sites="pattern", by=("layer", "query", "head")
    )
    assert both.sizes == {"layer": model.n_layers, "query": 5, "head": 4}
    assert both.values[:, 0].abs().max() < 1e-4  # the first token looks at itself
    assert len(both.tokens[0]) == 5
    start, end = (difference(logits(module, ids)) for ids in (CORRUPTED[0], CLEAN[0]))
    for layer in range(model.n_layers):
        pattern = patterns_of(module, CLEAN[0])[layer]
        values = values_of(module, CORRUPTED[0], layer)
        for query, number in ((1, 0), (4, 3)):
            row, part = pattern[number, query] @ values[number], head(number)[1]

            def put(z: torch.Tensor, at=query, part=part, row=row) -> None:
                z[0, at, part] = row

            with seeing(module, "z", layer, put):
                expected = difference(logits(module, CORRUPTED[0]))
            found = both.values[layer, query, number]
            torch.testing.assert_close(
                found, (expected - start) / (end - start), rtol=1e-3, atol=1e-5
            )
            assert (found.abs() > 1e-6) == (query == 4 or layer < model.n_layers - 1)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*eager:UserWarning")
def test_columns_of_patterns() -> None:
    model = LanguageModel(tiny_gpt2())
    module = model.module
    spread_out(module)
    columns = activation_patching(
        model, CLEAN[0], CORRUPTED[0], METRIC, sites=["pattern"], by=("head", "key"), layers=[1],
        normalised=False,
    )  # fmt: skip
    assert columns.sizes == {"site": 1, "head": 4, "key": 5}
    clean, own = (patterns_of(module, ids)[1] for ids in (CLEAN[0], CORRUPTED[0]))
    values = values_of(module, CORRUPTED[0], 1)
    for number, key in ((0, 0), (2, 1)):
        pattern = own[number].clone()
        pattern[:, key] = clean[number, :, key]
        part, made = head(number)[1], pattern @ values[number]

        def put(z: torch.Tensor, part=part, made=made) -> None:
            z[0, :, part] = made

        with seeing(module, "z", 1, put):
            expected = difference(logits(module, CORRUPTED[0]))
        torch.testing.assert_close(columns.values[0, number, key], expected, rtol=1e-4, atol=1e-5)


def patterns_of(module: nn.Module, ids: list[int]) -> torch.Tensor:
    """What Hugging Face returns as attentions, `(layer, head, query, key)`."""
    config = vars(module.config)
    before, config["_attn_implementation_internal"] = module.config._attn_implementation, "eager"
    try:
        with torch.no_grad():
            output = module(torch.tensor([ids]), use_cache=False, output_attentions=True)
    finally:
        config["_attn_implementation_internal"] = before
    return torch.cat(output.attentions)


def values_of(module: nn.Module, ids: list[int], layer: int) -> torch.Tensor:
    """The values of a layer's heads, `(head, position, d_head)`, from what projects them."""
    gpt2, seen = module.config.model_type == "gpt2", []
    blocks = module.transformer.h if gpt2 else module.model.layers
    owner = blocks[layer].attn.c_attn if gpt2 else blocks[layer].self_attn.v_proj
    handle = owner.register_forward_hook(lambda part, args, output: seen.append(output[0]))
    logits(module, ids)
    handle.remove()
    value = seen[0][:, 32:] if gpt2 else seen[0]
    heads = value.unflatten(-1, (-1, WIDTH)).transpose(0, 1)
    return heads.repeat_interleave(4 // len(heads), dim=0)


def test_pairs_of_different_length_at_the_positions_that_they_share(
    language_model: LanguageModel,
) -> None:
    model, module = language_model, language_model.module
    clean, corrupted = [5, 17, 3, 88, 41], [9, 5, 18, 3, 88, 41, 7]
    result = activation_patching(
        model, clean, corrupted, METRIC, positions=[-1, -3], sites="residual_out", normalised=False
    )
    for layer in range(model.n_layers):
        for at, (into, out_of) in enumerate(((6, 4), (4, 2))):
            indices = (slice(None), into), (slice(None), out_of)
            expected = patched(module, corrupted, clean, [("residual_out", layer, *indices)])
            torch.testing.assert_close(result.values[layer, at], expected, rtol=1e-4, atol=1e-5)


def test_positions_are_labelled_with_the_clean_tokens(eiffel: LanguageModel) -> None:
    clean, corrupted = "The Louvre is in the city of", "The Kremlin is in the city of"
    metric = logit_difference(" Paris", " Moscow")
    result = activation_patching(eiffel, clean, corrupted, metric, layers=[0], positions=[1, -1])
    assert result.axis("position").labels == (" Louvre", " of")
    assert result.tokens == ((" Louvre", " of"),)
    found = activation_patching(
        eiffel,
        [clean, "To see the Louvre, you must visit"],
        [corrupted, "To see the Kremlin, you must visit"],
        metric,
        layers=[0],
        positions=[-1, 1],
    )
    assert found.axis("position").labels == ("-1", "1")
    assert found.tokens == ((" of", " Louvre"), (" visit", " see"))
    assert found.select(prompt=1).axis("position").labels == (" visit", " see")


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a direction": ({"direction": "denoise"}, OptionError, "'denoising' or 'noising'"),
    "a site": ({"sites": "residual_inn"}, OptionError, "residual_in"),
    "no site": ({"sites": []}, OptionError, "is empty"),
    "an axis": ({"by": ("layer", "head")}, OptionError, "no axis"),
    "an axis twice": ({"by": ("layer", "layer")}, OptionError, "twice"),
    "a layer": ({"layers": [9]}, OptionError, "no layer 9"),
    "a position": ({"positions": [5]}, OptionError, "no position 5"),
    "heads of what has none": ({"heads": [0]}, OptionError, "`heads`"),
    "a metric": ({"metric": 3}, OptionError, "A metric is"),
    "a metric of several": ({"metric": lambda found: found[-1]}, ShapeError, "one number"),
    "a metric of none": ({"metric": lambda found: 3.0}, ShapeError, "a float"),
    "fewer prompts": ({"corrupted": CORRUPTED[:2], "clean": CLEAN}, PromptError, "in pairs"),
    "a longer prompt": ({"corrupted": CORRUPTED[1]}, PromptError, "has 5 tokens, and"),
    "longer patterns": (
        {"corrupted": CORRUPTED[1], "sites": "pattern", "by": ("layer", "head"), "positions": -1},
        PromptError,
        "Scores and patterns",
    ),
    "the same prompt": ({"corrupted": CLEAN[0]}, OptionError, "normalised=False"),
}


@pytest.mark.filterwarnings("ignore:.*eager:UserWarning")
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(gpt2: LanguageModel, name: str) -> None:
    given, error, message = WRONG[name]
    given = {"clean": CLEAN[0], "corrupted": CORRUPTED[0], "metric": METRIC, **given}
    with pytest.raises(error, match=message):
        activation_patching(gpt2, given.pop("clean"), given.pop("corrupted"), **given)
    with gpt2.trace(CLEAN[0]):
        assert gpt2.logits.shape == (1, 5, 100)


@pytest.mark.thorough
def test_queries_and_keys_of_different_numbers_of_heads_are_no_axis(llama: LanguageModel) -> None:
    with pytest.raises(OptionError, match="by themselves"):
        activation_patching(
            llama, CLEAN[0], CORRUPTED[0], METRIC, sites=["q", "k"], by=("layer", "head")
        )
    result = activation_patching(
        llama, CLEAN[0], CORRUPTED[0], METRIC, sites="k", by=("layer", "head")
    )
    assert result.sizes == {"layer": 3, "head": 2}


@pytest.mark.filterwarnings("ignore:.*eager:UserWarning")
@pytest.mark.parametrize("method", [activation_patching, attribution_patching])
def test_keys_keep_their_names_where_queries_are_chosen(gpt2: LanguageModel, method: Any) -> None:
    clean, corrupted = [[5, 6, 7, 8, 9], [3, 4, 11]], [[5, 60, 7, 8, 9], [3, 40, 11]]
    given = {"sites": "pattern", "by": ("layer", "query", "key"), "layers": 0, "positions": -1}
    result = method(gpt2, clean, corrupted, lambda logits: logits[-1, 1], normalised=False, **given)
    assert result.sizes == {"prompt": 2, "layer": 1, "query": 1, "key": 5}
    for number, ids in enumerate(clean):
        part = result.select(prompt=number)
        assert part.axis("key").labels == tuple(map(str, ids))
        assert not part.values.isnan().any()


@pytest.mark.filterwarnings("ignore:.*eager:UserWarning")
@pytest.mark.parametrize("method", [activation_patching, attribution_patching])
def test_patterns_of_prompts_that_differ_in_length_are_refused_as_such(
    gpt2: LanguageModel, method: Any
) -> None:
    with pytest.raises(PromptError, match="between prompts of one length, and the clean prompt"):
        method(
            gpt2, [5, 6, 7], [5, 6], lambda logits: logits[-1, 1], sites="pattern", positions=[-1],
            by=("layer", "query"),
        )  # fmt: skip
