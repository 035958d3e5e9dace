"""Direct logit attribution against plain PyTorch: hooks, and the norms written out."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, PathError
from insitu.graph.errors import OptionError
from insitu.methods import Result, direct_logit_attribution, edge_attribution
from tests.fidelity.every.models import small_model
from tests.fidelity.zoo import ZOO, module_of
from tests.fidelity.zoo.absent import lacking
from tests.thinning import sampled

DECODERS = [name for name, one in ZOO.items() if one.kind == "decoder"]
# What heads or neurons add goes through something else in these: a state-space layer, or a gate.
PARTS: dict[str, Any] = {"head": "heads", "neuron": "neurons"}
WITHOUT = {"head": {*lacking("heads"), "zamba2"}, "neuron": {*lacking("MLP"), "rwkv"}}
IDS = [5, 60, 7, 80, 9]
ANSWER, INSTEAD = 20, 30
Tensor = torch.Tensor


def run(module: Any, ids: list[int] = IDS) -> Tensor:
    with torch.no_grad():
        return module(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def difference(logits: Tensor) -> Tensor:
    return logits[..., ANSWER] - logits[..., INSTEAD]


def bare(module: Any, ids: list[int] = IDS) -> Tensor:
    """What the unembedding returns, before it is capped or scaled."""
    seen: list[Tensor] = []
    handle = module.get_output_embeddings().register_forward_hook(
        lambda part, args, out: seen.append(out[0].detach())
    )
    run(module, ids)
    handle.remove()
    return seen[0]


class Seen(dict[str, Tensor]):
    """What modules are given and give at the last position, by hooks: "path" and "path<"."""

    def __init__(self, module: Any, ids: list[int] = IDS) -> None:
        handles = [
            part.register_forward_hook(self._hook(path), with_kwargs=True)
            for path, part in module.named_modules()
        ]
        run(module, ids)
        for handle in handles:
            handle.remove()

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            output = output[0] if isinstance(output, tuple) else output
            for name, value in ((f"{path}<", given), (path, output)):
                if isinstance(value, Tensor) and value.ndim == 3:
                    self[name] = value[0, -1].detach().clone()

        return hook


def layer_norm(norm: Any, at: Tensor) -> Callable[[Tensor], Tensor]:
    divisor = (at.var(unbiased=False) + norm.eps).sqrt()
    return lambda part: (part - part.mean()) / divisor * norm.weight


def rms_norm(norm: Any, at: Tensor) -> Callable[[Tensor], Tensor]:
    divisor = (at.pow(2).mean() + norm.variance_epsilon).sqrt()
    return lambda part: part / divisor * norm.weight


def gemma_norm(norm: Any, at: Tensor) -> Callable[[Tensor], Tensor]:
    divisor = (at.pow(2).mean() + norm.eps).sqrt()
    return lambda part: part / divisor * (1 + norm.weight)


# The path of the blocks, of the final norm, of what adds to the stream in a block, how it norms,
# the output projection, and the last layer of the MLP.
LAYOUTS: dict[str, Any] = {
    "gpt2": ("transformer.h", "transformer.ln_f", ("attn", "mlp"), layer_norm,
             "attn.c_proj", "mlp.c_proj"),
    "llama": ("model.layers", "model.norm", ("self_attn", "mlp"), rms_norm,
              "self_attn.o_proj", "mlp.down_proj"),
    "gemma": ("model.layers", "model.norm", ("self_attn", "mlp"), gemma_norm,
              "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("model.layers", "model.norm",
               ("post_attention_layernorm", "post_feedforward_layernorm"), gemma_norm,
               "self_attn.o_proj", "mlp.down_proj"),
}  # fmt: skip


class Expected:
    """What each component adds to the difference, written out."""

    def __init__(self, name: str, module: Any, ids: list[int] = IDS) -> None:
        self.blocks, final, self.added, self.norm, self.out, self.down = LAYOUTS[name]
        self.module, self.seen = module, Seen(module, ids)
        self.count = len(module.get_submodule(self.blocks))
        norm = module.get_submodule(final)
        self.through = self.norm(norm, self.seen[f"{final}<"])
        self.toward = difference(module.get_output_embeddings().weight.T).detach()
        self.bias = getattr(norm, "bias", torch.zeros(16)) @ self.toward

    def share(self, part: Tensor) -> Tensor:
        return (self.through(part) @ self.toward).detach()

    def components(self) -> Tensor:
        names = [f"{self.blocks}.{n}.{part}" for n in range(self.count) for part in self.added]
        parts = [self.seen[f"{self.blocks}.0<"], *(self.seen[name] for name in names)]
        return torch.stack([*map(self.share, parts), self.bias]).detach()

    def inside(self, layer: int, path: str, size: int) -> tuple[Tensor, Tensor]:
        """The shares of what a layer is given, `size` numbers at a time, and that of its bias."""
        block = f"{self.blocks}.{layer}"
        linear = self.module.get_submodule(f"{block}.{path}")
        weight = linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T
        given = self.seen[f"{block}.{path}<"].unflatten(0, (-1, size))
        parts = torch.einsum("hd,hdm->hm", given, weight.unflatten(0, (-1, size))).detach()
        bias = torch.zeros(16) if linear.bias is None else linear.bias.detach()
        behind = self.added[0 if path == self.out else 1]
        if "norm" in behind:  # one that comes behind the layer, and before the stream
            norm = self.module.get_submodule(f"{block}.{behind}")
            through = self.norm(norm, self.seen[f"{block}.{behind}<"])
            parts, bias = through(parts).detach(), through(bias).detach()
        return torch.stack([self.share(part) for part in parts]), self.share(bias)


@pytest.mark.parametrize("name", sampled(LAYOUTS, ["gpt2", "llama"]))
def test_components_add_what_their_values_say(name: str) -> None:
    module = module_of(name)
    expected = Expected(name, module).components()
    found = direct_logit_attribution(LanguageModel(module), IDS, ANSWER, INSTEAD)
    labels = found.axis("component").labels
    assert labels[:3] == ("embedding", "attention 0", "mlp 0") and labels[-1] == "bias"
    assert torch.allclose(found.values, expected, atol=1e-5)
    assert found.quantity == "logit difference" and found.centre == 0


@pytest.mark.parametrize("name", sampled(LAYOUTS, ["gpt2", "llama"]))
@pytest.mark.parametrize("by", ["head", "neuron"])
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_heads_and_neurons_add_what_their_weights_say(name: str, by: Any, mode: Any) -> None:
    module = module_of(name)
    expected = Expected(name, module)
    with mode():
        found = direct_logit_attribution(
            LanguageModel(module), IDS, ANSWER, INSTEAD, part=PARTS[by]
        )
    count = 4 if by == "head" else 40
    assert found.sizes == {"layer": 3, by: count}
    path = expected.out if by == "head" else expected.down
    for layer in range(3):
        width = expected.seen[f"{expected.blocks}.{layer}.{path}<"].shape[0]
        parts, bias = expected.inside(layer, path, width // count)
        assert torch.allclose(found.values[layer], parts, atol=1e-5)
        assert torch.allclose(found.details["bias"][layer], bias, atol=1e-5)
    theirs = expected.components()[1:-1].view(3, 2)[:, 0 if by == "head" else 1]
    others = expected.components().sum() - theirs.sum()
    assert torch.allclose(found.details["others"], others, atol=1e-5)


def summed(found: Result) -> Tensor:
    """All that the parts of one prompt add."""
    rest = (found.details[name].nansum() for name in ("bias", "others") if name in found.details)
    return sum(rest, found.values.nansum())


@pytest.mark.parametrize("name", sampled(DECODERS, ["gpt2", "llama", "mamba"]))
def test_the_parts_add_up_to_the_logits_of_the_model(name: str) -> None:
    module = module_of(name)
    model = LanguageModel(module)
    ids = ZOO[name].inputs()["input_ids"][0].tolist()
    logits = bare(module, ids) if name == "gemma2" else run(module, ids)
    whole = direct_logit_attribution(model, ids, ANSWER, INSTEAD)
    for found in (whole, whole.details["total"]):
        total = summed(found) if isinstance(found, Result) else found
        assert torch.allclose(total, difference(logits[-1]), atol=1e-5)
    for by in ("head", "neuron"):
        if name in WITHOUT[by]:
            with pytest.raises(OptionError, match=f"No {by} of this model"):
                direct_logit_attribution(model, ids, ANSWER, part=PARTS[by], position=2)
            continue
        found = direct_logit_attribution(model, ids, ANSWER, part=PARTS[by], position=2)
        assert torch.allclose(summed(found), logits[2, ANSWER], atol=1e-5)


def test_capped_logits_are_attributed_before_the_cap() -> None:
    module = module_of("gemma2")
    with torch.no_grad():
        module.get_output_embeddings().weight.mul_(40)  # pyright: ignore[reportCallIssue]
    before, after = bare(module)[-1].max(-1), run(module)[-1].max()
    found = direct_logit_attribution(LanguageModel(module), IDS, int(before.indices))
    assert torch.allclose(summed(found), before.values, rtol=1e-4)
    assert after < 30 < before.values


def test_prompts_of_any_length_have_answers_of_their_own() -> None:
    module = module_of("llama")
    prompts = [IDS, [10, 11], [5, 60, 7]]
    found = direct_logit_attribution(
        LanguageModel(module), prompts, [1, 2, 3], [4, 5, 6], part="heads"
    )
    assert found.sizes == {"prompt": 3, "layer": 3, "head": 4}
    for number, ids in enumerate(prompts):
        logits = run(module, ids)[-1]
        wanted = logits[1 + number] - logits[4 + number]
        own = found.values[number].sum() + found.details["bias"][number].sum()
        assert torch.allclose(own + found.details["others"][number], wanted, atol=1e-5)
        assert torch.allclose(found.details["total"][number], wanted, atol=1e-5)


def test_half_precision_adds_up_as_far_as_it_goes() -> None:
    module = module_of("gpt2").bfloat16()
    found = direct_logit_attribution(LanguageModel(module), IDS, ANSWER, INSTEAD)
    assert torch.allclose(summed(found), difference(run(module)[-1].float()), atol=0.05)


@pytest.mark.parametrize("name", sampled(["gpt2", "gemma2"], ["gpt2"]))
def test_half_precision_is_no_matter_where_the_residual_stream_is_large(name: str) -> None:
    """As it is at some positions of all large models: 300 times as much is no number of float16."""
    module = module_of(name)
    with torch.no_grad():
        if name == "gpt2":
            module.transformer.h[-1].mlp.c_proj.bias[3] = 2000
        else:
            module.get_input_embeddings().weight.mul_(300)
    found = []
    for model in (LanguageModel(copy.deepcopy(module).half()), LanguageModel(module)):
        with model.trace(IDS):
            end = model.blocks[-1].residual_out.save()
        assert end.value.abs().max() > 300
        found.append(direct_logit_attribution(model, IDS, ANSWER, INSTEAD).values)
    torch.testing.assert_close(*found, rtol=0, atol=0.01 * float(found[1].abs().max()))


def test_the_model_is_left_as_it_was(gpt2: LanguageModel) -> None:
    module = gpt2.load()
    before = run(module)
    direct_logit_attribution(gpt2, IDS, ANSWER, part="neurons")
    assert torch.equal(run(module), before)
    assert all(part.grad is None and part.requires_grad for part in module.parameters())
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.thorough
def test_a_stream_with_factors_is_no_plain_sum() -> None:
    """Where the factors are 1, it is one."""
    module: Any = small_model("causal", "doge")
    ids = [5, 60, 7, 80]
    with pytest.raises(OptionError, match="is not the sum of what its blocks add"):
        direct_logit_attribution(LanguageModel(module), ids, ANSWER)
    with pytest.raises(OptionError, match="does not make up the stream behind it"):
        edge_attribution(LanguageModel(module), ids, ids[::-1], lambda run: run.logits[0, -1, 7])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_residual"):
                parameter.fill_(1)
    found = direct_logit_attribution(LanguageModel(module), ids, ANSWER)
    assert torch.allclose(found.values.sum(), run(module, ids)[-1, ANSWER], atol=1e-4)


def test_heads_of_an_edited_sum_are_not_taken_for_it(gpt2: LanguageModel) -> None:
    with gpt2.edit() as edited:
        edited.transformer.h[1].attn.c_proj.output[:, -1, 0] += 5.0
    blocks = direct_logit_attribution(edited, [5, 6, 7], 5)
    module: Any = gpt2.module
    handle = module.transformer.h[1].attn.c_proj.register_forward_hook(
        lambda m, a, output: output + 5.0 * (torch.arange(16) == 0) * torch.eye(3)[2][:, None]
    )
    with torch.no_grad():
        wanted = module(torch.tensor([[5, 6, 7]])).logits[0, -1, 5]
    handle.remove()
    torch.testing.assert_close(blocks.values.sum(), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(OptionError, match="each head of block 1 adds is not known"):
        direct_logit_attribution(edited, [5, 6, 7], 5, part="heads")


def test_what_cannot_be_attributed_says_why(gpt2: LanguageModel) -> None:
    with pytest.raises(OptionError, match="'layer'"):
        direct_logit_attribution(gpt2, IDS, ANSWER, part="layer")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="no position 5"):
        direct_logit_attribution(gpt2, IDS, ANSWER, position=5)
    with pytest.raises(OptionError, match="No head of this model"):
        direct_logit_attribution(LanguageModel(module_of("mamba")), IDS, ANSWER, part="heads")
    with pytest.raises(PathError, match="residual"):
        direct_logit_attribution(LanguageModel(module_of("bert")), IDS, ANSWER)
    with pytest.raises(OptionError, match="no affine map"):  # a GELU stands before its unembedding
        direct_logit_attribution(LanguageModel(module_of("modernbert")), IDS, ANSWER)


@pytest.mark.parametrize("name", sampled(["gpt2", "llama"], ["gpt2"]))
def test_models_in_double_precision_can_be_taken_apart(name: str) -> None:
    module = module_of(name).double()
    result = direct_logit_attribution(LanguageModel(module), [5, 17, 42], 3, part="blocks")
    with torch.no_grad():
        logit = module(torch.tensor([[5, 17, 42]])).logits[0, -1, 3]
    torch.testing.assert_close(result.values.sum().double(), logit, rtol=1e-5, atol=1e-5)
