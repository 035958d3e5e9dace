"""Steering, against forward hooks and Hugging Face's `generate`."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from insitu import BlockError, LanguageModel, LoadError, OptionError, PromptError, ShapeError
from insitu.methods import SteeringVector, steer, steering_vector
from insitu.methods.continuations import Continuation, Steered
from tests.conftest import hooked_hidden, tiny_gpt2
from tests.fidelity.zoo import module_of
from tests.thinning import sampled

Edit = Callable[[torch.Tensor], torch.Tensor]

PROMPTS = [[5, 6, 7, 8], [9, 3], [11, 12, 13, 14], [4, 4, 4]]
POSITIVE = [[5, 6, 7, 8], [9, 3, 2], [50, 51]]
NEGATIVE = [[15, 16], [19, 13, 12, 11], [60, 61, 62]]


def blocks(model: LanguageModel) -> list[str]:
    return [model.blocks[layer].path for layer in range(model.n_layers)]


def hidden(model: LanguageModel, layer: int, ids: list[int]) -> torch.Tensor:
    """`(position, d_model)` as a hook on the block sees it."""
    return hooked_hidden(model.module, blocks(model)[layer], torch.tensor([ids]))[0]


def generated(model: LanguageModel, ids: list[int], edits: dict[int, Edit], **kwargs: object):
    """The oracle: what `generate` continues with, with hooks on some blocks."""

    def hook(edit: Edit) -> Callable[..., object]:
        def change(module: nn.Module, args: object, output: object) -> object:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            assert isinstance(output, torch.Tensor)
            return edit(output)

        return change

    paths = blocks(model)
    handles = [
        model.module.get_submodule(paths[layer]).register_forward_hook(hook(edit))
        for layer, edit in edits.items()
    ]
    kwargs = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, **kwargs}
    try:
        prompt = torch.tensor([ids])
        whole = model.module.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return whole[0, len(ids) :]


def adding(vector: torch.Tensor, where: str | list[int] | None) -> Edit:
    """An edit for one generation, which counts its forwards."""
    step = -1

    def edit(value: torch.Tensor) -> torch.Tensor:
        nonlocal step
        step += 1
        value = value.clone()
        if where is None or (where == "generated" and step > 0):
            value += vector
        elif where == "last":
            value[:, -1] += vector
        elif isinstance(where, list) and step == 0:
            value[:, where] += vector
        return value

    return edit


def some_vector(model: LanguageModel, layers: tuple[int, ...] = ()) -> SteeringVector:
    layers = layers or (0, min(2, model.n_layers - 1))
    draw = torch.Generator().manual_seed(1)
    width = model.d_model
    return SteeringVector("residual_out", layers, torch.randn(len(layers), width, generator=draw))


@pytest.fixture(params=["gpt2", "llama", "neox"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    if request.param == "neox":  # attention and MLP side by side
        return LanguageModel(module_of("gpt-neox"))
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama", "neox"], ["gpt2"]), indirect=True)
def test_the_difference_of_means(model: LanguageModel) -> None:
    vector = steering_vector(model, POSITIVE, NEGATIVE, layers=[0, -1], position=-1)
    assert vector.layers == (0, model.n_layers - 1) and vector.count == 6
    for layer in vector.layers:
        high = torch.stack([hidden(model, layer, ids)[-1] for ids in POSITIVE]).mean(0)
        low = torch.stack([hidden(model, layer, ids)[-1] for ids in NEGATIVE]).mean(0)
        torch.testing.assert_close(vector[layer], high - low)


def test_the_mean_over_positions_and_another_site(gpt2: LanguageModel) -> None:
    vector = steering_vector(gpt2, POSITIVE, NEGATIVE[:2], layers=1, position="mean")
    high = torch.stack([hidden(gpt2, 1, ids).mean(0) for ids in POSITIVE]).mean(0)
    low = torch.stack([hidden(gpt2, 1, ids).mean(0) for ids in NEGATIVE[:2]]).mean(0)
    torch.testing.assert_close(vector[1], high - low)
    neurons = steering_vector(gpt2, [1, 2, 3], [4, 5], site="post", layers=1)
    assert neurons.vectors.shape == (1, 64) and neurons.site == "post"


def test_the_principal_component(language_model: LanguageModel) -> None:
    vector = steering_vector(language_model, POSITIVE, NEGATIVE, method="principal component")
    for layer in vector.layers:
        differences = torch.stack(
            [
                hidden(language_model, layer, a)[-1] - hidden(language_model, layer, b)[-1]
                for a, b in zip(POSITIVE, NEGATIVE, strict=True)
            ]
        ).double()
        values, directions = torch.linalg.eigh(differences.T @ differences)
        expected = directions[:, values.argmax()]
        expected = expected * (expected @ differences.mean(0)).sign()
        torch.testing.assert_close(vector[layer].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model", sampled(["gpt2", "llama", "neox"], ["neox"]), indirect=True)
@pytest.mark.parametrize("where", sampled([None, "last", "generated", [0, -1]], ["last"]))
def test_generations_are_those_with_hooks(
    model: LanguageModel, where: str | list[int] | None
) -> None:
    vector, strengths = some_vector(model), [0.0, -3.0, 6.0]
    steered = steer(model, PROMPTS, vector, strengths=strengths, positions=where, max_new_tokens=5)
    expected = []
    for ids in PROMPTS:
        for factor in strengths:
            edits = {n: adding(vector[n] * factor, where) for n in vector.layers}
            expected.append(generated(model, ids, edits))
    assert [(one.prompt, one.strength) for one in steered] == [
        (p, s) for p in range(4) for s in strengths
    ]
    for found, ids in zip(steered, expected, strict=True):
        assert found.ids.tolist() == ids.tolist()
    plain = steered.of(strength=0.0)
    assert any(
        not torch.equal(a.ids, b.ids) for a, b in zip(plain, steered.of(strength=6.0), strict=True)
    )


def test_one_prompt_one_layer_and_an_end_token(gpt2: LanguageModel) -> None:
    vector = some_vector(gpt2)
    free = generated(gpt2, PROMPTS[0], {2: adding(vector[2] * 4, None)}, eos_token_id=None)
    end = int(free[1])
    steered = steer(
        gpt2,
        PROMPTS[0],
        vector,
        strengths=[4.0, 0.0],
        layers=2,
        max_new_tokens=5,
        eos_token_id=end,
    )
    assert steered[0].ids.tolist() == free[: free.tolist().index(end) + 1].tolist()
    alone = generated(gpt2, PROMPTS[0], {}, eos_token_id=end)
    assert steered[1].ids.tolist() == alone.tolist()


def test_sampling_takes_a_seed_for_each_continuation(gpt2: LanguageModel) -> None:
    options = {"max_new_tokens": 5, "do_sample": True, "seed": 3}
    vector = some_vector(gpt2)
    both = steer(gpt2, PROMPTS[:2], vector, strengths=[0.0, 2.0], **options)
    torch.manual_seed(3)
    edits = {n: adding(vector[n] * 2, None) for n in vector.layers}
    assert both[3].ids.tolist() == generated(gpt2, PROMPTS[1], edits, do_sample=True).tolist()
    assert (
        both[0].ids.tolist()
        == steer(gpt2, PROMPTS[0], vector, strengths=0, **options)[0].ids.tolist()
    )


def test_beams(llama: LanguageModel) -> None:
    vector = some_vector(llama)
    found = steer(llama, PROMPTS, vector, strengths=3.0, max_new_tokens=4, num_beams=2)
    for one, ids in zip(found, PROMPTS, strict=True):
        edits = {n: adding(vector[n] * 3, None) for n in vector.layers}
        expected = generated(llama, ids, edits, num_beams=2, max_new_tokens=4)
        assert one.ids.tolist() == expected.tolist()


def test_applied_in_a_trace_and_in_an_edit(model: LanguageModel) -> None:
    vector = some_vector(model, (1,))

    def logits(edit: Edit) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def hook(module: nn.Module, args: object, output: object) -> object:
            parts = output if isinstance(output, tuple) else (output,)
            changed = edit(parts[0])
            return (changed, *parts[1:]) if isinstance(output, tuple) else changed

        handle = model.module.get_submodule(blocks(model)[1]).register_forward_hook(hook)
        with torch.no_grad():
            kept.append(model.module(torch.tensor([PROMPTS[0]]), use_cache=False).logits)
        handle.remove()
        return kept[0]

    with model.edit() as edited:
        vector.apply(edited, -2.0, positions="last")
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            vector.apply(model, 2.0)
            everywhere = model.logits.save()
        with tracer.invoke(PROMPTS[0]):
            vector.apply(model, positions=1)
            one = model.logits.save()
    with edited.trace(PROMPTS[0]):
        last = edited.logits.save()

    torch.testing.assert_close(everywhere.value, logits(adding(vector[1] * 2, None)))
    torch.testing.assert_close(one.value, logits(adding(vector[1], [1])))
    torch.testing.assert_close(last.value, logits(adding(vector[1] * -2, "last")))


def test_a_vector_is_of_the_models_dtype_when_it_is_added() -> None:
    half = LanguageModel(tiny_gpt2().to(torch.bfloat16))
    vector = some_vector(half)
    with half.trace(PROMPTS[0]):
        before = half.blocks[2].residual_in.save()
        vector.select(2).apply(half, 2.0)
    with half.trace(PROMPTS[0]):
        plain = half.blocks[2].residual_out.save()
    with half.trace(PROMPTS[0]):
        vector.select(2).apply(half, 2.0)
        after = half.blocks[2].residual_out.save()
    assert before.value.dtype == torch.bfloat16
    assert torch.equal(after.value, plain.value + (vector[2] * 2).to(torch.bfloat16))
    found = steering_vector(half, PROMPTS[0], PROMPTS[1])
    assert found.vectors.dtype == torch.float32


def test_a_layer_that_is_named_twice_is_steered_once(gpt2: LanguageModel) -> None:
    last = gpt2.n_layers - 1
    vector = steering_vector(gpt2, POSITIVE, NEGATIVE, layers=[last, -1])
    path, own = gpt2.blocks[last].path, vector.vectors[0]
    plain = hooked_hidden(gpt2.module, path, torch.tensor([PROMPTS[0]]))
    for one in (vector, vector.select([last, last])):
        with gpt2.trace(PROMPTS[0]):
            one.apply(gpt2)
            steered = gpt2.blocks[last].block_out.save()
        torch.testing.assert_close(steered.value, plain + own)


def test_arithmetic(gpt2: LanguageModel) -> None:
    vector = some_vector(gpt2)
    other = SteeringVector("residual_out", (0, 2), torch.ones(2, 16))
    assert torch.equal((2 * vector).vectors, vector.vectors * 2)
    assert torch.equal((vector / 2).vectors, vector.vectors / 2)
    assert torch.equal((-vector).vectors, -vector.vectors)
    assert torch.equal((vector + other).vectors, vector.vectors + 1)
    assert torch.equal((vector - other).vectors, vector.vectors - 1)
    torch.testing.assert_close(vector.normalised().vectors.norm(dim=-1), torch.ones(2))
    assert torch.equal(vector.select([2]).vectors[0], vector[2])
    with pytest.raises(OptionError, match="do not add up"):
        vector + vector.select(0)
    with pytest.raises(TypeError):
        vector + 1


def test_saved_and_loaded(gpt2: LanguageModel, tmp_path: Path) -> None:
    vector = steering_vector(gpt2, POSITIVE, NEGATIVE, position="mean", layers=[1, 3])
    vector.save(tmp_path / "vector.safetensors")
    loaded = SteeringVector.load(tmp_path / "vector.safetensors")
    assert torch.equal(loaded.vectors, vector.vectors)
    for name in ("site", "layers", "method", "position", "count"):
        assert getattr(loaded, name) == getattr(vector, name)
    with pytest.raises(LoadError):
        SteeringVector.load(tmp_path / "nothing.safetensors")


def test_mistakes(gpt2: LanguageModel) -> None:
    vector = some_vector(gpt2)
    with pytest.raises(OptionError, match="axes head, position, d_head") as caught:
        steering_vector(gpt2, POSITIVE, NEGATIVE, site="z")
    assert "test_steering.py" in str(caught.value)
    with pytest.raises(OptionError, match="not 'mean difference'"):
        steering_vector(gpt2, POSITIVE, NEGATIVE, method="mean difference")
    with pytest.raises(OptionError, match="3 positive prompts and 2"):
        steering_vector(gpt2, POSITIVE, NEGATIVE[:2], method="principal component")
    with pytest.raises(PromptError, match="no position 3 in the shortest prompt, of 2"):
        steering_vector(gpt2, POSITIVE, NEGATIVE, position=3)
    with pytest.raises(OptionError, match="no layer 1, but layers 0, 2"):
        steer(gpt2, PROMPTS, vector, layers=1)
    with pytest.raises(OptionError, match="not 'first'"):
        steer(gpt2, PROMPTS, vector, positions="first")
    with pytest.raises(OptionError, match="Without a key-value cache"):
        steer(gpt2, PROMPTS, vector, positions="last", use_cache=False)
    with pytest.raises(PromptError, match="one token"):
        steer(gpt2, [5], vector, positions="generated")
    with pytest.raises(OptionError, match="no strength"):
        steer(gpt2, PROMPTS, vector, strengths=[])
    with pytest.raises(BlockError):
        vector.apply(gpt2)
    with pytest.raises(OptionError, match="of `steer`"), gpt2.trace(PROMPTS[0]):
        vector.apply(gpt2, positions="generated")
    with pytest.raises(ShapeError, match="2 layers"):
        SteeringVector("residual_out", (0, 1), torch.zeros(16))
    with pytest.raises(OptionError, match="no layer 9"), gpt2.trace(PROMPTS[0]):
        some_vector(gpt2, (9,)).apply(gpt2)
    assert steer(gpt2, PROMPTS[0], vector, use_cache=False, max_new_tokens=2)[0].ids.shape == (2,)


def test_positions_of_a_prompt_are_none_of_a_decoder_behind_an_encoder() -> None:
    """Its first step processes the token that it starts with, which plain hooks see alone."""
    module: Any = module_of("t5")
    added = torch.linspace(-5, 5, 16) ** 3
    model, vector = LanguageModel(module), SteeringVector("residual_out", (1,), added[None])
    for where in ([0], [-1], "generated"):
        with pytest.raises(OptionError, match="first token|positions of the prompt are none"):
            steer(model, PROMPTS[0], vector, positions=where)
    (found,) = steer(model, PROMPTS[0], vector, max_new_tokens=4)

    def hook(_: Any, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        return (value + added, *output[1:]) if isinstance(output, tuple) else value + added

    handle = module.decoder.block[1].register_forward_hook(hook)
    whole = module.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4)[0, 1:]
    handle.remove()
    plain = module.generate(torch.tensor([PROMPTS[0]]), max_new_tokens=4)[0, 1:]
    assert found.ids.tolist() == whole.tolist() != plain.tolist()


def test_continuations_are_printed_as_a_table() -> None:
    ids = torch.tensor([1])
    parts = [Continuation(0, 0.0, ids, " [red]Paris"), Continuation(0, 1.5, ids, "\n")]
    console = Console(width=40, file=StringIO())
    with console.capture() as captured:
        console.print(Steered(tuple(parts), (0.0, 1.5)))
        console.print(Steered((parts[0], Continuation(1, 0.0, ids, "x")), (0.0,)))
    assert [line.rstrip().split(maxsplit=2) for line in captured.get().splitlines()] == [
        ["strength", "text"],
        ["0", "'", "[red]Paris'"],
        ["1.5", r"'\n'"],
        ["prompt", "strength", "text"],
        ["0", "0", "' [red]Paris'"],
        ["1", "0", "'x'"],
    ]


def test_continuations_are_a_table_a_page_and_json(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    ids = torch.tensor([1, 2])
    both = tuple(Continuation(p, s, ids, f"{p} <{s}>") for p in (0, 1) for s in (0.0, 2.5))
    steered = Steered(both, (0.0, 2.5), "Steering along mlp_out, layer 1")
    assert repr(steered) == "<Steering along mlp_out, layer 1: 4 continuations, strengths 0, 2.5>"

    table = steered.of(prompt=1).to_dataframe()
    assert [*table.columns] == ["prompt", "strength", "text"]
    assert table.values.tolist() == [[1, 0.0, "1 <0.0>"], [1, 2.5, "1 <2.5>"]]

    told = json.loads(json.dumps(steered.to_dict()))
    assert told["title"] == steered.title and told["strengths"] == [0.0, 2.5]
    last = {"prompt": 1, "strength": 2.5, "ids": [1, 2], "text": "1 <2.5>"}
    assert len(told["continuations"]) == 4 and told["continuations"][-1] == last

    steered.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 &lt;2.5&gt;" in page and "2.5" in page


def test_positions_are_numbers_also_of_numpy(gpt2: LanguageModel) -> None:
    given = [[5, 6, 7], [9, 3, 4]], [[15, 16, 17], [19, 13, 12]]
    expected = steering_vector(gpt2, *given, position=1)
    for number in (np.int64(1), np.array(1), torch.tensor(1)):
        found = steering_vector(gpt2, *given, position=number)  # pyright: ignore
        assert torch.equal(found.vectors, expected.vectors) and found.position == 1
    for wrong in (np.array([1, 2]), [1, 2], None, "last", 1.5, True, torch.tensor(True)):
        with pytest.raises(OptionError, match=r'position is a number or "mean", not .*one vector'):
            steering_vector(gpt2, *given, position=wrong)  # pyright: ignore


def test_generations_are_steered_at_positions_of_other_libraries(gpt2: LanguageModel) -> None:
    vector = some_vector(gpt2)
    edits = {n: adding(vector[n], [0, 2]) for n in vector.layers}
    expected = generated(gpt2, PROMPTS[0], edits)
    for given in (np.array([0, 2]), torch.tensor([0, 2])):
        found = steer(gpt2, PROMPTS[0], vector, positions=given, max_new_tokens=5)  # pyright: ignore
        assert found[0].ids.tolist() == expected.tolist()
    for wrong in (torch.tensor([True, False, True, False]), [True, False], True, 1.5):
        with pytest.raises(OptionError, match="A position is given as a number"):
            steer(gpt2, PROMPTS[0], vector, positions=wrong)  # pyright: ignore
    with pytest.raises(OptionError, match="Positions are numbers"):
        steer(gpt2, PROMPTS[0], vector, positions="first")  # pyright: ignore
    for wrong in (torch.tensor([True, False, True, False]), "first"):
        with pytest.raises(OptionError, match="osition"), gpt2.trace(PROMPTS[0]):
            vector.apply(gpt2, positions=wrong)  # pyright: ignore


def test_a_strength_that_comes_again_is_drawn_again(gpt2: LanguageModel) -> None:
    torch.manual_seed(0)
    options = {"max_new_tokens": 5, "do_sample": True}
    found = steer(gpt2, PROMPTS[0], some_vector(gpt2), strengths=[0, 0, 0, 0], **options)
    assert (
        len({tuple(one.ids.tolist()) for one in found}) > 1
    )  # of 100 tokens, all nearly as likely


def test_strengths_are_numbers_of_any_kind(gpt2: LanguageModel) -> None:
    vector = steering_vector(gpt2, POSITIVE, NEGATIVE, layers=[1])
    expected = steer(gpt2, PROMPTS[0], vector, strengths=[2.0], max_new_tokens=3)
    for one in (torch.tensor(2.0), np.float32(2), [torch.tensor(2.0)], np.array([2.0])):
        found = steer(gpt2, PROMPTS[0], vector, strengths=one, max_new_tokens=3)
        assert torch.equal(found[0].ids, expected[0].ids)
    assert vector.select(np.int64(1)).layers == (1,)
    for wrong in ("2", ["2"]):
        with pytest.raises(OptionError, match="A strength is a number"):
            steer(gpt2, PROMPTS[0], vector, strengths=wrong)  # pyright: ignore
    with pytest.raises(OptionError, match="num_return_sequences"):
        steer(gpt2, PROMPTS[0], vector, do_sample=True, num_return_sequences=2)
    with gpt2.trace(PROMPTS[:1] * 2):
        vector.apply(gpt2, [2.0, 0.0])
        logits = gpt2.logits.save()
    with gpt2.trace(PROMPTS[0]):
        vector.apply(gpt2, 2)
        alone = gpt2.logits.save()
    torch.testing.assert_close(logits[:1], alone)
    with pytest.raises(OptionError, match="A strength is a number"), gpt2.trace(PROMPTS[0]):
        vector.apply(gpt2, "1")


@pytest.mark.parametrize("layers", [4, [4], torch.tensor([4])])
def test_a_direction_of_one_s_own_is_told_how_to_be_one(layers: Any) -> None:
    direction = torch.ones(16)
    line = r"`SteeringVector\('residual_out', \(4,\), direction\[None\]\)`"
    with pytest.raises(OptionError, match=line):
        SteeringVector("residual_out", layers, direction)
    assert SteeringVector("residual_out", (4,), direction[None])[4].equal(direction)
