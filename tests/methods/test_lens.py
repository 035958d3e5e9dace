"""The logit lens against its definition: the model's own forward with another last residual."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, PathError
from insitu.graph.errors import OptionError, PromptError
from insitu.methods import (
    Result,
    TunedLens,
    direct_logit_attribution,
    logit_lens,
    train_tuned_lens,
    tuned_lens,
)
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled

DECODERS = [name for name, one in ZOO.items() if one.kind == "decoder"]


def hidden(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def stream(module: nn.Module, blocks: list[nn.Module], ids: torch.Tensor) -> list[torch.Tensor]:
    """What the first block is given and what each returns, by plain hooks."""
    seen: list[torch.Tensor] = []

    def entering(part: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    def leaving(part: nn.Module, args: Any, output: Any) -> None:
        seen.append(hidden(output).clone())

    handles = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    handles += [block.register_forward_hook(leaving) for block in blocks]
    run(module, ids)
    for handle in handles:
        handle.remove()
    return seen


def run(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids[None], use_cache=False).logits[0]


def ended(module: nn.Module, last: nn.Module, ids: torch.Tensor, state: torch.Tensor) -> Any:
    """The model's logits if its last block returned something else."""

    def replace(part: nn.Module, args: Any, output: Any) -> Any:
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = last.register_forward_hook(replace)
    try:
        return run(module, ids)
    finally:
        handle.remove()


def expected(module: nn.Module, blocks: list[nn.Module], ids: torch.Tensor) -> torch.Tensor:
    """Probabilities `(layer, position, vocabulary)`, the embedding first."""
    states = stream(module, blocks, ids)
    return torch.stack([ended(module, blocks[-1], ids, one).softmax(-1) for one in states])


def blocks_of(name: str, module: nn.Module) -> list[nn.Module]:
    return list(module.get_submodule(ZOO[name].stacks_in(module)[-1]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", sampled(DECODERS, ["gpt2", "llama", "mamba"]))
def test_each_layer_is_what_the_model_makes_of_it(name: str) -> None:
    module = module_of(name)
    ids = ZOO[name].inputs()["input_ids"][0]
    blocks = blocks_of(name, module)
    wanted = expected(module, blocks, ids)
    if name == "rwkv":  # the first of its blocks normalises the embedding before it adds to it
        normed = blocks[0].pre_ln(stream(module, blocks, ids)[0])  # pyright: ignore[reportCallIssue]
        wanted[0] = ended(module, blocks[-1], ids, normed).softmax(-1)
    lens = logit_lens(LanguageModel(module), ids.tolist(), top=100)
    found = torch.zeros_like(wanted).scatter(2, lens.details["ids"], lens.details["probabilities"])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(found[-1], run(module, ids).softmax(-1), atol=1e-6)
    assert lens.sizes == {"layer": len(wanted), "position": len(ids)}
    assert torch.equal(lens.values, lens.details["probabilities"][..., 0])


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_what_is_done_to_logits_behind_the_unembedding_is_done(name: str) -> None:
    module = module_of(name)
    with torch.no_grad():
        module.get_output_embeddings().weight.mul_(40)  # pyright: ignore[reportCallIssue]
    ids = ZOO[name].inputs()["input_ids"][0]
    lens = logit_lens(LanguageModel(module), ids.tolist())
    best = run(module, ids).softmax(-1).max(-1)
    bare: list[torch.Tensor] = []
    head = module.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    handle = head.register_forward_hook(lambda part, args, out: bare.append(out[0]))
    run(module, ids)
    handle.remove()
    assert torch.allclose(lens.values[-1], best.values, atol=1e-5)
    assert not torch.allclose(bare[0].softmax(-1).max(-1).values, best.values, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_of_any_length_are_each_as_they_are_alone(kind: str) -> None:
    module = module_of(kind)
    blocks = blocks_of(kind, module)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [5, 60, 7, 8]]
    lens = logit_lens(LanguageModel(module), prompts, layers=[0, -1], top=3)
    assert lens.sizes == {"prompt": 3, "layer": 2, "position": 5}
    for number, ids in enumerate(prompts):
        wanted = expected(module, blocks, torch.tensor(ids))[[1, -1]]
        best = wanted.topk(3)
        assert torch.allclose(lens.values[number, :, : len(ids)], wanted.amax(-1), atol=1e-5)
        assert torch.equal(lens.details["ids"][number, :, : len(ids)], best.indices)
        assert lens.values[number, :, len(ids) :].isnan().all()
        assert (lens.details["ids"][number, :, len(ids) :] == -1).all()
    own = lens.select(prompt=1)
    assert own.sizes == {"layer": 2, "position": 2} and "" not in own.texts


def test_the_probability_of_a_token_at_chosen_positions() -> None:
    module = module_of("gpt2")
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    lens = logit_lens(LanguageModel(module), prompts, token=[20, 30], positions=[-1, 0])
    assert lens.axis("position").labels == ("-1", "0")
    for number, (ids, token) in enumerate(zip(prompts, (20, 30), strict=True)):
        wanted = expected(module, blocks_of("gpt2", module), torch.tensor(ids))
        assert torch.allclose(lens.values[number], wanted[:, [-1, 0], token], atol=1e-6)
        assert lens.tokens[number] == (str(ids[-1]), str(ids[0]))


@pytest.mark.parametrize("site", ["residual_in", "residual_mid", "mlp_out"])
def test_other_values_of_a_block_are_read_out_likewise(site: str) -> None:
    module = module_of("llama")
    ids = torch.tensor([5, 6, 7, 8])
    blocks = blocks_of("llama", module)
    parts = {"residual_in": "input_layernorm", "residual_mid": "post_attention_layernorm"}
    seen: list[torch.Tensor] = []

    def see(part: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if site == "mlp_out" else args[0])

    for block in blocks:
        block.get_submodule(parts.get(site, "mlp")).register_forward_hook(see)
    run(module, ids)
    states = list(seen)
    wanted = torch.stack([ended(module, blocks[-1], ids, one).softmax(-1) for one in states])
    lens = logit_lens(LanguageModel(module), ids.tolist(), site=site)
    assert lens.axis("layer").labels == ("0", "1", "2")
    assert torch.allclose(lens.values, wanted.amax(-1), atol=1e-5)


def test_texts_are_the_most_likely_tokens(eiffel: LanguageModel) -> None:
    prompt = "The Eiffel Tower is in the city of"
    lens = logit_lens(eiffel, prompt)
    last = run(eiffel.load(), eiffel.tokenizer(prompt, return_tensors="pt").input_ids[0])
    words = [eiffel.tokenizer.decode([token]) for token in last.argmax(-1).tolist()]
    assert list(lens.select(layer="5").texts) == words and words[-1] == " Paris"
    by_token = logit_lens(eiffel, prompt, token=" Paris", positions=-1)
    assert by_token.texts[-1] == " Paris" and by_token.values[-1] > 0.99 > by_token.values[0]


@pytest.mark.no_wire  # which runs it a second time
def test_all_prompts_run_in_one_forward(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    kind = type(gpt2.load())
    forward = kind.forward

    @wraps(forward)
    def count(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(kwargs["input_ids"]) is torch.Tensor:  # and not one without data
            rows.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    logit_lens(gpt2, [[5, 6, 7], [8, 9]])  # what is found out about a model is so once
    monkeypatch.setattr(kind, "forward", count)  # hooks would see each prompt alone
    logit_lens(gpt2, [[5, 6, 7], [8, 9], [10, 11, 12]])
    assert rows == [3]


def test_it_is_saved_and_loaded(gpt2: LanguageModel, tmp_path: Any) -> None:
    lens = logit_lens(gpt2, [[5, 6, 7], [8, 9]])
    lens.save(tmp_path / "lens.safetensors")
    loaded = Result.load(tmp_path / "lens.safetensors")
    assert torch.equal(loaded.values.nan_to_num(), lens.values.nan_to_num())
    assert torch.equal(loaded.details["ids"], lens.details["ids"]) and loaded.texts == lens.texts


def test_a_model_in_half_precision_is_read_out_in_it() -> None:
    module = module_of("llama").bfloat16()
    ids = torch.tensor([5, 6, 7, 8])
    lens = logit_lens(LanguageModel(module), ids.tolist())
    assert torch.allclose(lens.values[-1], run(module, ids).float().softmax(-1).amax(-1), atol=1e-3)


ERRORS: list[tuple[Callable[[LanguageModel], Any], type[Exception], str]] = [
    (lambda model: logit_lens(model, [5, 6], site="z"), OptionError, "as wide as the residual"),
    (lambda model: logit_lens(model, [5, 6], site="residul_out"), OptionError, "residual_out"),
    (lambda model: logit_lens(model, [5, 6], layers=9), OptionError, "There is no layer 9"),
    (lambda model: logit_lens(model, [5, 6], positions=[2]), OptionError, "no position 2"),
    (lambda model: logit_lens(model, [5, 6], token=1000), PromptError, "no token 1000"),
    (lambda model: logit_lens(model, [5, 6], token=[1, 2]), OptionError, "2 answers for 1"),
    (lambda model: logit_lens(model, [5, 6], top=0), OptionError, "at least 1"),
]


@pytest.mark.parametrize(("ask", "kind", "said"), ERRORS)
def test_errors_say_what_is_wrong_and_leave_the_model_usable(
    gpt2: LanguageModel, ask: Callable[[LanguageModel], Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as raised:
        ask(gpt2)
    assert "test_lens.py" in str(raised.value)
    assert logit_lens(gpt2, [5, 6]).sizes == {"layer": 5, "position": 2}


@pytest.mark.parametrize("place", ["norm", "unembedding", "block"])
def test_an_edit_behind_the_blocks_is_not_left_out(llama: LanguageModel, place: str) -> None:
    """A lens computes what stands there by itself, where an edit does not hold."""
    module: Any = llama.load()
    part = {
        "norm": module.model.norm,
        "unembedding": module.lm_head,
        "block": module.model.layers[1],
    }
    with llama.edit() as edited:
        if place == "block":
            edited.model.layers[1].output[0][:, -1, 0] += 3.0
        elif place == "norm":
            edited.model.norm.output[:, -1, 5] += 3.0
        else:
            edited.lm_head.output[:, -1, 5] += 3.0

    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[:, -1, 0 if place == "block" else 5] += 3.0
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = part[place].register_forward_hook(hook)
    logits = run(module, torch.tensor([5, 6, 7]))
    handle.remove()
    plain = run(module, torch.tensor([5, 6, 7]))
    assert not torch.allclose(logits, plain, atol=1e-2)
    if place == "block":
        lens = logit_lens(edited, [5, 6, 7], token=5)
        torch.testing.assert_close(lens.values[-1], logits.softmax(-1)[:, 5])
        return
    lenses = (
        lambda: logit_lens(edited, [5, 6, 7]),
        lambda: tuned_lens(edited, [5, 6, 7], TunedLens.untrained(edited)),
        lambda: train_tuned_lens(edited, [[5, 6, 7]]),
        lambda: direct_logit_attribution(edited, [5, 6, 7], 5),
    )
    for lens in lenses:
        with pytest.raises(OptionError, match="An edit of this model changes"):
            lens()


def test_models_without_a_residual_stream_or_a_decoder_say_so() -> None:
    with pytest.raises(PathError, match="residual"):
        logit_lens(LanguageModel(module_of("bert")), [5, 6], site="residual_out")
    with pytest.raises(OptionError, match="encoder"):
        logit_lens(LanguageModel(module_of("t5")), [5, 6])
