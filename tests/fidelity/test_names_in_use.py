"""Standard names in gradients, steps, batches and writes in place, against plain PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from insitu import (
    CausalityError,
    Job,
    LanguageModel,
    OperationError,
    PathError,
    ShapeError,
)
from tests.fidelity.zoo import ZOO, module_of
from tests.thinning import sampled

DECODERS = ["gpt2", "llama", "gemma2", "bloom", "opt", "mixtral", "gpt-neox", "falcon"]
PROJECTIONS = {
    "gpt2": "attn.c_proj", "llama": "self_attn.o_proj", "gemma2": "self_attn.o_proj",
    "bloom": "self_attention.dense", "opt": "self_attn.out_proj", "mixtral": "self_attn.o_proj",
    "gpt-neox": "attention.dense", "falcon": "self_attention.dense",
}  # fmt: skip


@cache
def kept(name: str) -> LanguageModel:
    return LanguageModel(module_of(name))


def ids(name: str, length: int = 7, seed: int = 0) -> torch.Tensor:
    return ZOO[name].inputs(1, length, seed)["input_ids"]


def block_of(name: str) -> Any:
    return kept(name).blocks[1]


def projection(name: str) -> nn.Module:
    """The output projection of that block's attention, by its own path."""
    return block_of(name).module.get_submodule(PROJECTIONS[name])


def close(found: Any, expected: torch.Tensor, limit: float = 2e-5) -> None:
    value = getattr(found, "value", found)
    assert value.shape == expected.shape, (value.shape, expected.shape)
    scale = max(float(expected.abs().max()), 0.1)
    assert float((value - expected).abs().max()) <= limit * scale


@pytest.fixture(autouse=True)
def _eager_is_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores and patterns")
        yield


def twin(
    name: str, tokens: torch.Tensor, before: Any = None, after: Any = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A forward with plain hooks on the output projection, and the model's logits."""
    seen: dict[str, torch.Tensor] = {}

    def taking(module: nn.Module, args: Any) -> Any:
        seen["input"] = args[0]
        return None if before is None else (before(args[0]), *args[1:])

    def giving(module: nn.Module, args: Any, output: torch.Tensor) -> Any:
        seen["output"] = output
        return None if after is None else after(output)

    part = projection(name)
    handles = [part.register_forward_pre_hook(taking), part.register_forward_hook(giving)]
    try:
        logits = kept(name).module(input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits


@pytest.mark.parametrize("name", sampled(DECODERS, ["gpt2", "llama", "falcon"]))
def test_z_is_the_input_of_the_output_projection_by_heads(name: str) -> None:
    model, attention = kept(name), block_of(name).attention
    with torch.no_grad():
        seen, logits = twin(name, ids(name))
    heads = model.n_heads
    with model.trace(ids(name)):
        z, out = attention.z.save(), model.logits.save()
    rows, positions, width = seen["input"].shape
    expected = seen["input"].view(rows, positions, heads, width // heads).transpose(1, 2)
    assert torch.equal(z.value, expected)
    assert torch.equal(out.value, logits)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("form", ["assigned", "in place", "augmented"])
def test_one_head_is_ablated(name: str, form: str) -> None:
    model, attention = kept(name), block_of(name).attention
    heads = model.n_heads

    def without(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone().unflatten(-1, (heads, -1))
        changed[:, :, 2] = 0
        return changed.flatten(-2)

    with torch.no_grad():
        _, logits = twin(name, ids(name), before=without)
    with model.trace(ids(name)):
        if form == "assigned":
            z = attention.z.clone()
            z[:, 2] = 0
            attention.z = z
        elif form == "in place":
            attention.z[:, 2] = 0
        else:
            attention.z[:, 2] *= 0
        out = model.logits.save()
    assert torch.equal(out.value, logits)


@pytest.mark.parametrize("name", sampled(DECODERS, ["gpt2", "llama", "falcon"]))
def test_what_each_head_adds_is_written(name: str) -> None:
    model, attention = kept(name), block_of(name).attention
    w_o = attention.W_O
    with torch.no_grad():
        seen, _ = twin(name, ids(name))
        z = seen["input"].unflatten(-1, (model.n_heads, -1)).transpose(1, 2)
        of_head = z[:, 2] @ w_o[2]
        _, logits = twin(name, ids(name), after=lambda output: output - of_head)
    for form in ("in place", "augmented"):
        with model.trace(ids(name)):
            if form == "in place":
                attention.result[:, 2] = 0
            else:
                attention.result[:, 2] *= 0
            result = attention.result.save()
            out = model.logits.save()
        close(out, logits)
        assert float(result.value[:, 2].abs().max()) < 1e-6
    with model.trace(ids(name)), pytest.raises(OperationError, match="computed and no part"):
        attention.result[:, 2].zero_()


def middle_and_pattern(name: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the second norm of the block is given, and the pattern that Hugging Face returns."""
    module, seen = kept(name).module, []
    handle = block_of(name).norm_2.module if "norm_2" in list(block_of(name).role) else None
    if handle is not None:
        handle = handle.register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    settings, implementation = vars(module.config), "_attn_implementation_internal"
    before = settings[implementation]
    settings[implementation] = "eager"
    try:
        output = module(input_ids=tokens, use_cache=False, output_attentions=True)
    finally:
        settings[implementation] = before
        if handle is not None:
            handle.remove()
    middle = seen[0].reshape(*tokens.shape, -1) if seen else torch.empty(0)
    return middle, output.attentions[1]


@pytest.mark.parametrize("name", sampled(DECODERS, ["gpt2"]))
def test_one_head_s_queries_are_written_for_prompts_of_other_lengths(name: str) -> None:
    """Without queries every visible position is attended to alike."""
    model, attention = kept(name), block_of(name).attention
    prompts = [ids(name, length) for length in (3, 7, 12)]
    with model.trace() as tracer:
        saved = []
        for tokens in prompts:
            with tracer.invoke(tokens):
                attention.q[:, 1] = 0
                saved.append((attention.pattern[:, 1].save(), attention.pattern[:, 0].save()))
    assert len(tracer.plan.passes) == 1
    for tokens, (changed, other) in zip(prompts, saved, strict=True):
        count = tokens.shape[1]
        with torch.no_grad():
            _, pattern = middle_and_pattern(name, tokens)
        close(other, pattern[:, 0])
        if name not in ("bloom",):  # whose alibi prefers what is near
            even = torch.ones(count, count).tril() / torch.arange(1, count + 1)[:, None]
            close(changed, even[None].expand_as(changed.value))


def test_the_order_of_lines_does_not_matter() -> None:
    model = kept("gpt2")
    first, last = model.blocks[0], model.blocks[2]
    with model.trace(ids("gpt2")):
        late = last.attention.pattern.save()
        early = first.attention.pattern.save()
    with model.trace(ids("gpt2")):
        early_again = first.attention.pattern.save()
        late_again = last.attention.pattern.save()
    assert torch.equal(late.value, late_again.value)
    assert torch.equal(early.value, early_again.value)
    with pytest.raises(CausalityError, match=r"residual|transformer\.h\[2\]"):
        with model.trace(ids("gpt2")):
            first.attention.z = last.attention.z


def test_names_hold_in_edits_and_survive_bytes() -> None:
    model = kept("gpt2")
    with torch.no_grad():
        heads = model.n_heads
        _, logits = twin(
            "gpt2",
            ids("gpt2"),
            before=lambda value: _without_head(value, heads, 1),
        )
    with model.edit() as edited:
        model.blocks[1].attention.z[:, 1] = 0
    with edited.trace(ids("gpt2")):
        out = edited.logits.save()
    assert torch.equal(out.value, logits)
    with model.edit() as uniform:
        model.blocks[1].attention.scores[:] = 0
    with uniform.trace(ids("gpt2")):
        pattern = uniform.blocks[1].attention.pattern.save()
    close(pattern, torch.full((1, heads, 7, 7), 1 / 7))
    with uniform.trace(ids("gpt2")):  # nothing in this block says that attention is to be eager
        z, v = uniform.blocks[1].attention.z.save(), uniform.blocks[1].attention.v.save()
    close(z, v.value.mean(2, keepdim=True).expand_as(z.value))
    with model.trace(ids("gpt2")) as tracer:
        model.blocks[1].attention.result[:, 1] = 0
        model.logits.save()
    again = Job.from_bytes(tracer.job.to_bytes()).blocks[0].graph
    assert [node.operation.name for node in again] == [node.operation.name for node in tracer.graph]


def _without_head(value: torch.Tensor, heads: int, head: int) -> torch.Tensor:
    changed = value.clone().unflatten(-1, (heads, -1))
    changed[:, :, head] = 0
    return changed.flatten(-2)


def test_roles_are_there_whatever_else_is_called_so() -> None:
    t5 = kept("t5")
    block = t5.encoder.block[1]
    own = block.layer[0].SelfAttention
    assert own.q.path.endswith("SelfAttention.q")  # a layer of its own wins
    with t5.trace(ids("t5")):
        assert block.attention.q.shape == own.role["q"].shape == (1, 4, 7, 6)
    with pytest.raises(PathError, match="cross_attention"):
        block.cross_attention  # noqa: B018
    assert list(block.attention.role)[:3] == ["q", "k", "v"]


def test_errors_name_what_is_missing_and_why() -> None:
    with pytest.raises(PathError, match="side by side|nothing is added"):
        with kept("gpt-j").trace(ids("gpt-j")):
            kept("gpt-j").blocks[0].residual_mid  # noqa: B018
    with pytest.raises(PathError, match="no attention"):
        kept("mamba").blocks[0].attention  # noqa: B018
    with pytest.raises(PathError, match="consists of experts"):
        with kept("mixtral").trace(ids("mixtral")):
            kept("mixtral").blocks[0].mlp.pre  # noqa: B018
    with pytest.raises(PathError, match="is no sum of"):
        with kept("bert").trace(ids("bert")):
            kept("bert").blocks[0].residual_mid  # noqa: B018
    with pytest.raises(PathError, match="cannot be assigned"):
        with kept("gpt2").trace(ids("gpt2")):
            kept("gpt2").blocks[0].attention = 1


def test_that_attention_will_be_eager_is_said_once() -> None:
    model = LanguageModel(module_of("gpt2"))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.warns(UserWarning, match="eager attention") as said:
            for _ in range(2):
                with model.trace(ids("gpt2")):
                    model.blocks[0].attention.pattern.save()
    assert len(said) == 1
    assert model.module.config._attn_implementation == "sdpa"
    with model.trace(ids("gpt2")):
        plain = model.logits.save()
    with torch.no_grad():
        assert torch.equal(plain.value, model.module(ids("gpt2"), use_cache=False).logits)


@pytest.mark.thorough
def test_patterns_of_a_model_whose_eager_attention_computes_something_else_are_refused() -> None:
    """Transformers scales the alibi of Falcon in one of its implementations only."""
    tokens = ids("falcon-alibi")
    module = module_of("falcon-alibi")
    model = LanguageModel(module)
    with pytest.raises(PathError, match="attn_implementation='eager'"):
        with model.trace(tokens):
            model.blocks[1].attention.pattern.save()
    vars(module.config)["_attn_implementation_internal"] = "eager"
    with torch.no_grad():
        expected = module(tokens, use_cache=False, output_attentions=True)
    model = LanguageModel(module)
    with model.trace(tokens):
        pattern, logits = model.blocks[1].attention.pattern.save(), model.logits.save()
    assert torch.equal(logits.value, expected.logits)
    assert torch.equal(pattern.value, expected.attentions[1])


def test_keys_of_an_encoder_are_refused_where_they_are_only_kept() -> None:
    model = kept("t5")
    with pytest.raises(PathError, match="step 0"):
        with model.generate(ids("t5"), max_new_tokens=2) as generator:
            for step in generator.steps:
                if step == 1:
                    model.blocks[0].cross_attention.k.save()


def test_an_edit_runs_as_it_was_recorded_also_from_bytes(tmp_path: Path) -> None:
    """Where keys are seen in eager attention only, a run of the edited model has that."""
    model, tokens = kept("deepseek-v3"), ids("deepseek-v3")
    with model.trace(tokens):
        model.blocks[0].attention.k[:] = 0
        expected = model.logits.save()
    with model.edit() as edited:
        model.blocks[0].attention.k[:] = 0
    edited.save_edits(tmp_path / "edit")
    for again in (edited, model.load_edits(tmp_path / "edit")):
        with again.trace(tokens):
            logits = again.logits.save()
        assert torch.equal(logits.value, expected.value)
    with model.trace(tokens):
        plain = model.logits.save()
    assert not torch.allclose(plain.value, expected.value)


@pytest.mark.thorough
def test_a_pattern_that_eager_attention_would_change_is_refused_before_weights_are_there(
    tmp_path: Path,
) -> None:
    module_of("falcon-alibi").save_pretrained(tmp_path)
    model = LanguageModel(str(tmp_path))
    with pytest.raises(PathError, match="attn_implementation='eager'"):
        with model.trace(ids("falcon-alibi")):
            model.blocks[1].attention.pattern.save()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float16], [torch.bfloat16]))
def test_half_precision_is_no_reason_to_refuse_patterns_or_not_to(dtype: torch.dtype) -> None:
    for name in DECODERS:
        model = LanguageModel(module_of(name).to(dtype))
        with model.trace(ids(name)):
            pattern = model.blocks[1].attention.pattern.save()
        assert pattern.value.shape == (1, model.n_heads, 7, 7)
    model = LanguageModel(module_of("falcon-alibi").to(dtype))
    with pytest.raises(PathError, match="attn_implementation='eager'"):
        with model.trace(ids("falcon-alibi")):
            model.blocks[1].attention.pattern.save()


def test_what_each_head_adds_is_read_anew_after_a_write_to_the_heads() -> None:
    model, attention = kept("gpt2"), block_of("gpt2").attention
    with model.trace(ids("gpt2")):
        before = attention.result.save()
        attention.z[:, 2] = 0
        after = attention.result.save()
    assert float(before.value[:, 2].abs().max()) > 1e-3
    assert float(after.value[:, 2].abs().max()) < 1e-6
    assert torch.equal(after.value[:, 1], before.value[:, 1])


@pytest.mark.parametrize("value", [5, torch.zeros(3), torch.zeros(1, 1, 7, 16)])
def test_what_is_written_by_a_name_has_its_shape(value: Any) -> None:
    model, attention = kept("gpt2"), block_of("gpt2").attention
    kinds = OperationError if isinstance(value, int) else ShapeError
    for key in ("result", "z"):
        with pytest.raises(kinds, match="test_names_in_use"):
            with model.trace(ids("gpt2")):
                setattr(attention, key, value)
    with pytest.raises(ShapeError, match="test_names_in_use"):
        with model.trace(ids("gpt2")):
            attention.result = attention.result[:, :2]


def test_a_part_of_a_computed_value_is_written_in_the_step_that_it_is_of() -> None:
    model, attention = kept("gpt2"), block_of("gpt2").attention
    tokens = ids("gpt2")
    found = {}
    for at in (None, 1, 2):  # in which step it is written, of what was read in step 1
        with model.generate(tokens, max_new_tokens=3, eos_token_id=None) as generator:
            for step in generator.steps:
                if step == 1:
                    result = attention.result
                if step == at:
                    result[:, 2] = 0
                if step == 2:
                    logits = generator.logits(1).save()
        found[at] = logits.value
    assert torch.equal(found[1], found[2]) and not torch.allclose(found[1], found[None])


def test_norms_of_blocks_that_normalise_sums_are_in_their_order() -> None:
    for name, first, last in (
        ("bert", "attention.output.LayerNorm", "output.LayerNorm"),
        ("distilbert", "sa_layer_norm", "output_layer_norm"),
        ("bart", "self_attn_layer_norm", "final_layer_norm"),
    ):
        block = kept(name).blocks[0]
        assert block.norm_1.path == f"{block.path}.{first}"
        assert block.norm_2.path == f"{block.path}.{last}"


@pytest.mark.slow
def test_half_precision_and_its_clamps_do_not_hide_the_stream() -> None:
    model = LanguageModel(module_of("t5").half())
    names = list(model.blocks[0].role)
    assert {"residual_mid", "attention_out", "cross_attention_out", "mlp_out"} <= set(names)


@pytest.mark.thorough
def test_another_implementation_of_attention_hides_nothing_but_its_softmax() -> None:
    from transformers import AttentionInterface

    def by_hand(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * kwargs["scaling"]
        above = torch.ones(scores.shape[-2:]).triu(1).bool()
        weights = scores.masked_fill(above, -1e9).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2), None

    AttentionInterface.register("by_hand", by_hand)
    module = module_of("llama")
    vars(module.config)["_attn_implementation_internal"] = "by_hand"
    model = LanguageModel(module)
    names = list(model.blocks[0].role)
    assert "attention_out" in names and "mixer_out" not in names
    with model.trace(ids("llama")):
        pattern = model.blocks[0].attention.pattern.save()
    eager = module_of("llama")
    vars(eager.config)["_attn_implementation_internal"] = "eager"
    with torch.no_grad():
        expected = eager(ids("llama"), output_attentions=True).attentions[0]
    torch.testing.assert_close(pattern.value, expected)
