"""Ablations, beside loops over plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import LanguageModel, OptionError, PromptError
from insitu.methods import Result, ablate, kl_divergence, logit_difference
from tests.fidelity.architectures import make
from tests.fidelity.zoo import module_of
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # the sweeps are long, and other tests send what they write

HEADS, SIZE = 4, 4
FIRST = [5, 17, 42, 8, 23]
SECOND = [31, 7, 60]
THIRD = [11, 70, 71, 3, 9]
FOURTH = [44, 45, 46]
METRIC = logit_difference(3, 9)

# By the part: the path in a block of these, and whether it is what is given to that module.
PATHS = {
    "gpt2": {
        "heads": ("attn.c_proj", True),
        "attention": ("attn", False),
        "mlps": ("mlp", False),
        "neurons": ("mlp.c_proj", True),
    },
    "llama": {
        "heads": ("self_attn.o_proj", True),
        "attention": ("self_attn", False),
        "mlps": ("mlp", False),
        "neurons": ("mlp.down_proj", True),
    },
}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


class Hooks:
    """A model whose parts are read and written by plain hooks."""

    def __init__(self, name: str) -> None:
        self.model = make(name)
        self.module = self.model.load()
        self.blocks, self.paths = BLOCKS[name], PATHS[name]
        self.layers = len(self.module.get_submodule(self.blocks))

    def run(
        self, ids: Sequence[int], part: str, edits: dict[int, Callable[[torch.Tensor], None]]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The logits, and the value of a part in each layer, once `edits` have changed it."""
        path, given = self.paths[part]
        seen: dict[int, torch.Tensor] = {}
        handles = []

        def change(layer: int, value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            if layer in edits:
                edits[layer](value)
            seen[layer] = value
            return value

        for layer in range(self.layers):
            part = self.module.get_submodule(f"{self.blocks}.{layer}.{path}")
            if given:
                handle = part.register_forward_pre_hook(
                    lambda module, args, layer=layer: (change(layer, args[0]), *args[1:])
                )
            else:
                handle = part.register_forward_hook(
                    lambda module, args, output, layer=layer: (
                        (change(layer, output[0]), *output[1:])
                        if isinstance(output, tuple)
                        else change(layer, output)
                    )
                )
            handles.append(handle)
        try:
            with torch.no_grad():
                logits = self.module(torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    def score(self, ids: Sequence[int], part: str, edits: dict[int, Any]) -> float:
        logits, _ = self.run(ids, part, edits)
        return float(logits[-1, 3] - logits[-1, 9])


@cache
def hooks_of(name: str) -> Hooks:
    return Hooks(name)


def columns(part: str, unit: int | None) -> slice:
    """Where a head or a neuron is in the last axis."""
    if unit is None:
        return slice(None)
    width = SIZE if part == "heads" else 1
    return slice(unit * width, (unit + 1) * width)


def put(part: slice, value: Any, positions: Any = slice(None)) -> Callable[[torch.Tensor], None]:
    """Writes a part of a value of the form (1, position, width)."""

    def write(there: torch.Tensor) -> None:
        there[:, positions, part] = value if isinstance(value, float) else value[..., part]

    return write


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", sampled(PATHS, ["llama"]))
@pytest.mark.parametrize("part", ["heads", "attention", "mlps", "neurons"])
def test_zeros_are_put_in_the_place_of_each_part_in_turn(name: str, part: Any) -> None:
    hooks = hooks_of(name)
    options: dict[str, Any] = {"neurons": [0, 5, -1]} if part == "neurons" else {}
    result = ablate(hooks.model, [FIRST, SECOND], METRIC, part=part, **options)
    width = hooks.run(FIRST, "neurons", {})[1][0].shape[-1]
    units = {"heads": range(HEADS), "neurons": [0, 5, width - 1]}.get(part, [None])
    expected = torch.tensor(
        [
            [
                [hooks.score(ids, part, {layer: put(columns(part, unit), 0.0)}) for unit in units]
                for layer in range(hooks.layers)
            ]
            for ids in (FIRST, SECOND)
        ]
    )
    if part in ("attention", "mlps"):
        expected = expected[..., 0]
        assert [axis.name for axis in result.axes] == ["prompt", "layer"]
    else:
        assert result.axes[2].name == part[:-1]
        assert result.axes[2].labels == tuple(map(str, units))
    close(result.values, expected)
    clean = torch.tensor([hooks.score(ids, part, {}) for ids in (FIRST, SECOND)])
    close(result.details["clean"], clean)
    assert ((expected[0] - clean[0]).abs() > 1e-4).all()  # each does something


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("part", ["heads", "mlps"])
@pytest.mark.parametrize("by_position", [False, True])
def test_means_are_over_reference_prompts(name: str, part: Any, by_position: bool) -> None:
    hooks = hooks_of(name)
    reference = [FIRST, THIRD, FOURTH]
    result = ablate(
        hooks.model, SECOND, METRIC, part=part, method="mean", reference=reference,
        by_position=by_position, layers=[0, -1],
    )  # fmt: skip
    states = [hooks.run(ids, part, {})[1] for ids in reference]
    for row, layer in enumerate([0, hooks.layers - 1]):
        values = [state[layer][0] for state in states]
        if by_position:
            mean = torch.stack(
                [torch.stack([v[t] for v in values if len(v) > t]).mean(0) for t in range(3)]
            )
        else:
            mean = torch.cat(values).mean(0)
        for unit in range(HEADS) if part == "heads" else [None]:
            expected = hooks.score(SECOND, part, {layer: put(columns(part, unit), mean)})
            close(result.values[row] if unit is None else result.values[row, unit], expected)


def test_means_are_over_the_positions_of_a_decoder_behind_an_encoder() -> None:
    module: Any = module_of("t5")
    mlps = [block.layer[-1] for block in module.decoder.block]
    start = torch.tensor([[module.config.decoder_start_token_id]])

    def run(ids: list[int], layer: int, mean: torch.Tensor | None = None) -> tuple[Any, Any]:
        """A logit, and what the MLP adds to the stream, which may be a mean instead."""
        seen: list[torch.Tensor] = []

        def hook(_: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
            seen.append(output - given[0])
            return output if mean is None else given[0] + mean

        handle = mlps[layer].register_forward_hook(hook)
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits
        handle.remove()
        return float(logits[0, -1, 5]), seen[0]

    model, prompts = LanguageModel(module), [FIRST, SECOND]
    found = ablate(model, prompts, lambda run: run.logits[0, -1, 5], part="mlps", method="mean")
    for layer in range(len(mlps)):
        mean = torch.stack([run(ids, layer)[1] for ids in prompts]).mean(0)
        close(found.values[:, layer], [run(ids, layer, mean)[0] for ids in prompts])
    for options in ({"positions": [-1]}, {"by_position": True, "method": "mean"}):
        with pytest.raises(OptionError, match="positions of the prompt are none"):
            ablate(model, prompts, METRIC, part="mlps", **options)


@pytest.mark.parametrize("name", PATHS)
def test_means_are_over_the_prompts_themselves_without_a_reference(name: str) -> None:
    hooks = hooks_of(name)
    result = ablate(hooks.model, [FIRST, SECOND], METRIC, method="mean", layers=1, heads=2)
    mean = torch.cat([hooks.run(ids, "heads", {})[1][1][0] for ids in (FIRST, SECOND)]).mean(0)
    expected = [
        hooks.score(ids, "heads", {1: put(columns("heads", 2), mean)}) for ids in (FIRST, SECOND)
    ]
    close(result.values[:, 0, 0], torch.tensor(expected))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("given", [True, False])
def test_resampled_values_are_those_of_another_prompt_of_that_length(
    name: str, given: bool
) -> None:
    hooks = hooks_of(name)
    prompts = [FIRST, SECOND] if given else [FIRST, SECOND, THIRD, FOURTH]
    reference = [SECOND, THIRD, FIRST, FOURTH] if given else None
    result = ablate(
        hooks.model, prompts, METRIC, method="resample", reference=reference, heads=[0, 3]
    )
    others = reference or prompts
    drawn = result.details["drawn"].tolist()
    for row, ids in enumerate(prompts):
        other = others[drawn[row]]
        assert other != ids and len(other) == len(ids)
        states = hooks.run(other, "heads", {})[1]
        for layer in range(hooks.layers):
            for column, head in enumerate([0, 3]):
                edit = put(columns("heads", head), states[layer])
                close(result.values[row, layer, column], hooks.score(ids, "heads", {layer: edit}))


def test_what_is_drawn_depends_on_the_seed() -> None:
    reference = [[number] * 3 for number in range(20, 40)]

    def drawn(seed: int) -> list[int]:
        result = ablate(
            hooks_of("gpt2").model, [SECOND] * 4, METRIC, method="resample", reference=reference,
            layers=0, heads=0, seed=seed,
        )  # fmt: skip
        return result.details["drawn"].tolist()

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(3)}) > 1


@pytest.mark.parametrize("part", ["heads", "mlps", "neurons"])
@pytest.mark.parametrize("method", ["zero", "resample"])
def test_only_some_positions_are_ablated(part: Any, method: Any) -> None:
    hooks = hooks_of("llama")
    options: dict[str, Any] = {"neurons": {"neurons": 3}, "heads": {"heads": 1}}.get(part, {})
    unit = next(iter(options.values()), None)
    if method == "resample":
        options["reference"] = [THIRD]
    result = ablate(
        hooks.model, FIRST, METRIC, part=part, method=method, layers=1, positions=[0, -2], **options
    )
    value = hooks.run(THIRD, part, {})[1][1][0, [0, 3]] if method == "resample" else 0.0
    expected = hooks.score(FIRST, part, {1: put(columns(part, unit), value, [0, 3])})
    close(result.values.flatten()[0], expected)
    whole = hooks.score(FIRST, part, {1: put(columns(part, unit), 0.0)})
    assert abs(expected - whole) > 1e-5


@pytest.mark.parametrize("name", PATHS)
def test_several_parts_are_ablated_at_once(name: str) -> None:
    hooks = hooks_of(name)
    result = ablate(hooks.model, FIRST, METRIC, together=[(0, 1), (0, 3), (-1, 2)])
    assert result.axes == ()

    def both(value: torch.Tensor) -> None:
        put(columns("heads", 1), 0.0)(value)
        put(columns("heads", 3), 0.0)(value)

    last = put(columns("heads", 2), 0.0)
    expected = hooks.score(FIRST, "heads", {0: both, hooks.layers - 1: last})
    close(result.values, expected)
    result = ablate(hooks.model, [FIRST, SECOND], METRIC, part="mlps", together=[0, 2])
    edits = {0: put(slice(None), 0.0), 2: put(slice(None), 0.0)}
    close(result.values, torch.tensor([hooks.score(ids, "mlps", edits) for ids in (FIRST, SECOND)]))


def test_a_metric_compares_with_the_clean_run() -> None:
    hooks = hooks_of("llama")
    result = ablate(hooks.model, FIRST, kl_divergence(), layers=1, heads=2)
    clean, ablated = (
        hooks.run(FIRST, "heads", edits)[0][-1].log_softmax(-1)
        for edits in ({}, {1: put(columns("heads", 2), 0.0)})
    )
    close(result.values[0, 0], (clean.exp() * (clean - ablated)).sum())
    assert result.centre == 0


def test_positions_that_can_be_gone_through_once_are_those_of_every_prompt() -> None:
    model, prompts = LanguageModel(module_of("gpt2")), [[5, 17, 3], [7, 9, 30, 2]]
    options: Any = {"part": "mlps", "layers": 0}
    listed = ablate(model, prompts, logit_difference(11, 23), positions=[1, -1], **options)
    once = ablate(model, prompts, logit_difference(11, 23), positions=iter([1, -1]), **options)
    assert torch.equal(once.values, listed.values)
    assert bool((listed.values[:, 0] != listed.details["clean"]).all())


def test_pairs_that_are_ablated_together_may_be_lists() -> None:
    model, metric = LanguageModel(module_of("gpt2")), logit_difference(11, 23)
    pairs = ablate(model, [5, 17, 3], metric, together=[(0, 1), (1, 2)])
    assert torch.equal(
        ablate(model, [5, 17, 3], metric, together=[[0, 1], [1, 2]]).values, pairs.values
    )


@pytest.mark.thorough
def test_layers_without_a_part_are_left_out() -> None:
    module = module_of("jamba")
    model = LanguageModel(module)
    heads = ablate(model, FIRST, METRIC)
    assert heads.axis("layer").labels == ("1",)
    mixers = ablate(model, FIRST, METRIC, part="mixers")
    assert mixers.axis("layer").labels == ("0", "2")
    handle = module.model.layers[2].mamba.register_forward_hook(lambda *seen: seen[-1] * 0)
    with torch.no_grad():
        logits = module(torch.tensor([FIRST]), use_cache=False).logits[0, -1]
    handle.remove()
    close(mixers.values[1], logits[3] - logits[9])
    with pytest.raises(OptionError, match="there is no attention in this block"):
        ablate(model, FIRST, METRIC, layers=0)


@pytest.mark.thorough
def test_results_say_what_they_are_and_are_kept(eiffel: LanguageModel, tmp_path: Path) -> None:
    metric = logit_difference(" Paris", " Rome")
    result = ablate(eiffel, "The Eiffel Tower is in the city of", metric, part="mlps")
    assert result.title == "Zero ablation of mlps"
    assert result.quantity == "logit difference"
    assert result.centre == float(result.details["clean"])
    result.save(tmp_path / "ablation")
    assert torch.equal(Result.load(tmp_path / "ablation").values, result.values)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"part": "head"}, OptionError, "'heads'"),
        ({"method": "random"}, OptionError, "resample"),
        ({"heads": 4}, OptionError, "no head 4"),
        ({"layers": 7}, OptionError, "no layer 7"),
        ({"neurons": 1}, OptionError, "no part of heads"),
        ({"heads": 1, "part": "mlps"}, OptionError, "no part of mlps"),
        ({"positions": 5}, OptionError, "no position 5"),
        ({"reference": [THIRD]}, OptionError, "no part in zeros"),
        ({"by_position": True}, OptionError, "method='mean'"),
        ({"by_position": True, "method": "mean"}, OptionError, "give `reference`"),
        ({"by_position": True, "method": "mean", "reference": [SECOND]}, PromptError, "Position 4"),
        ({"method": "resample", "reference": [SECOND, FIRST]}, PromptError, "5 tokens of prompt 0"),
        ({"together": [(0, 1)], "layers": 0}, OptionError, "says which parts"),
        ({"together": [0]}, OptionError, r"pairs \(layer, head\)"),
        ({"together": [(0, 9)]}, OptionError, "no head 9"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        ablate(hooks_of("gpt2").model, FIRST, METRIC, **options)
    assert Path(__file__).name in str(raised.value)


@pytest.mark.parametrize(
    "dtype", sampled([torch.bfloat16, torch.float16, torch.float64], [torch.bfloat16])
)
@pytest.mark.parametrize("by_position", sampled([False, True], [True]))
def test_means_are_in_the_dtype_of_the_model(dtype: torch.dtype, by_position: bool) -> None:
    model = LanguageModel(module_of("gpt2").to(dtype))
    plain = LanguageModel(module_of("gpt2"))
    given = [FIRST, THIRD], METRIC
    options = {"method": "mean", "positions": -1, "by_position": by_position}
    found, expected = (ablate(one, *given, **options) for one in (model, plain))  # pyright: ignore
    apart = (found.values - expected.values).abs().max()
    assert apart < 0.05 * expected.values.abs().max()
