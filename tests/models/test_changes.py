"""Models whose modules change after they were wrapped, against plain hooks on the same module."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from insitu import InsituError, LanguageModel, Model, PathError
from tests.conftest import hooked, tiny_gpt2
from tests.thinning import sampled

# PEFT's own, of a name that Transformers has changed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[3, 14, 15, 92, 65]])
LORA = {"r": 2, "init_lora_weights": False}


class Scaled(nn.Module):
    """Another MLP, attention or head: what was there, and a factor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return (output[0] * 3, *output[1:]) if isinstance(output, tuple) else output * 3


class Bypass(nn.Module):
    """In the place of a block: nothing is added."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.returns_tuple = isinstance(like, tuple)

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return (hidden,) if self.returns_tuple else hidden


def bypass(module: Any) -> None:
    module.transformer.h[1] = Bypass(hooked(module, "transformer.h.1", IDS, use_cache=False))


def add_adapter(module: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **LORA)
    module.add_adapter(config)
    module.eval()


def replace_mlp(module: Any) -> None:
    module.transformer.h[1].mlp = Scaled(module.transformer.h[1].mlp)


def replace_block(module: Any) -> None:
    torch.manual_seed(2)
    module.transformer.h[1] = copy.deepcopy(module.transformer.h[1]).apply(renewed)


def reorder(module: Any) -> None:
    module.transformer.h = nn.ModuleList([module.transformer.h[layer] for layer in (2, 0, 3, 1)])


def swap(module: Any) -> None:
    h = module.transformer.h
    h[0], h[1] = h[1], h[0]


def append(module: Any) -> None:
    module.transformer.h.append(copy.deepcopy(module.transformer.h[0]).apply(renewed))
    module.transformer.h[4].attn.layer_idx = 4
    module.config.n_layer = 5


def insert(module: Any) -> None:
    module.transformer.h.insert(0, copy.deepcopy(module.transformer.h[0]).apply(renewed))
    module.transformer.h[0].attn.layer_idx = 4
    module.config.n_layer = 5


def delete(module: Any) -> None:
    del module.transformer.h[0]


def shorten(module: Any) -> None:
    module.transformer.h = module.transformer.h[:2]


def replace_layer(module: Any) -> None:
    module.transformer.h[1].mlp.c_fc = copy.deepcopy(module.transformer.h[1].mlp.c_fc).apply(
        renewed
    )


def replace_head(module: Any) -> None:
    torch.manual_seed(3)
    module.lm_head = nn.Linear(16, 100, bias=False)


def resize(module: Any) -> None:
    module.resize_token_embeddings(120, mean_resizing=False)


def change_forward(module: Any) -> None:
    mlp = module.transformer.h[1].mlp
    before = mlp.forward
    mlp.forward = lambda hidden: before(hidden) * 2


def renewed(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter, std=0.3)


CHANGES = [
    *(add_adapter, replace_mlp, replace_block, reorder, swap, append, insert, delete, shorten),
    *(replace_layer, replace_head, resize, change_forward),
]


def logits_of(module: Any) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def used(model: LanguageModel) -> Any:
    """Uses a model as the tests do, so that all that it remembers is there; returns handles."""
    for _ in range(2):
        with model.trace(IDS):
            last = model.transformer.h[-1]
            last.output[0].save()
            model.transformer.h[1].mlp.c_fc.output.save()
            model.lm_head.output.save()
    with model.trace(IDS):
        assert model.transformer.h[1].mlp.output.shape == (1, 5, 16)
        model.blocks[1].residual_out.save()
        model.blocks[1].attention.z.save()
    assert model.n_layers == 4
    return model.transformer.h, model.transformer.h[1]


@pytest.mark.parametrize(
    "change", sampled(CHANGES, [add_adapter, replace_mlp, replace_head, reorder, delete])
)
@pytest.mark.parametrize("edited", sampled([False, True], [False]))
def test_sites_are_those_of_the_tree_that_is_there(
    change: Callable[[Any], None], edited: bool
) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    if edited:
        with model.edit() as model:
            model.transformer.h[0].mlp.c_fc.output = model.transformer.h[0].mlp.c_fc.output + 0
    h, block = used(model)
    change(module)
    module.eval()

    last = first(hooked(module, f"transformer.h.{len(module.transformer.h) - 1}", IDS))
    replaced = change is replace_mlp  # which has no such layer
    inner = None if replaced else hooked(module, "transformer.h.1.mlp.c_fc", IDS)
    with model.trace(IDS):
        read_last = model.transformer.h[-1].output[0].save()
        read_inner = model.transformer.h[1].mlp.c_fc.output.save() if not replaced else None
        logits = model.lm_head.output.save()
    torch.testing.assert_close(read_last.value, last)
    torch.testing.assert_close(logits.value, logits_of(module))
    if read_inner is not None:
        torch.testing.assert_close(read_inner.value, inner)
    with model.trace(IDS):
        kept = h[-1].output[0].save()  # by a handle of before
        mlp = block.mlp.output.save()
    torch.testing.assert_close(kept.value, last)
    torch.testing.assert_close(mlp.value, hooked(module, "transformer.h.1.mlp", IDS))

    hook = module.transformer.h[1].mlp.register_forward_hook(lambda _, args, out: out * 0)
    zeroed = logits_of(module)
    hook.remove()
    with model.trace(IDS):
        model.transformer.h[1].mlp.output = model.transformer.h[1].mlp.output * 0
        logits = model.lm_head.output.save()
    torch.testing.assert_close(logits.value, zeroed)


@pytest.mark.parametrize("change", sampled(CHANGES, [insert, resize, reorder, change_forward]))
def test_names_and_shapes_are_those_of_the_tree_that_is_there(
    change: Callable[[Any], None],
) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    used(model)
    change(module)
    module.eval()
    count = len(module.transformer.h)
    assert model.n_layers == len(list(model.blocks)) == count
    out = [first(hooked(module, f"transformer.h.{layer}", IDS)) for layer in range(count)]
    with model.trace(IDS):
        shape = model.lm_head.output.shape
        streams = [block.residual_out.save() for block in model.blocks]
        z = model.blocks[1].attention.z.save()
        logits = model.logits.save()
    assert shape == logits_of(module).shape
    for stream, expected in zip(streams, out, strict=True):
        torch.testing.assert_close(stream.value, expected)
    torch.testing.assert_close(logits.value, logits_of(module))
    given: list[torch.Tensor] = []
    hook = module.get_submodule("transformer.h.1.attn.c_proj").register_forward_pre_hook(
        lambda _, args: given.append(args[0])
    )
    logits_of(module)
    hook.remove()
    torch.testing.assert_close(z.value.transpose(1, 2).flatten(2), given[0])
    torch.testing.assert_close(model.W_U, module.lm_head.weight.T)


@pytest.mark.parametrize("change", sampled(CHANGES, [add_adapter, replace_block, delete]))
def test_several_prompts_share_a_pass_of_the_tree_that_is_there(
    change: Callable[[Any], None],
) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)

    def several() -> list[Any]:
        with model.trace() as tracer:
            found = []
            for ids in ([3, 14, 15], [92, 65, 35, 89], [3, 14, 15]):
                with tracer.invoke(ids):
                    found.append(
                        (model.transformer.h[1].output[0].save(), model.lm_head.output.save())
                    )
        return found

    several()
    change(module)
    module.eval()
    for ids, (hidden, logits) in zip(([3, 14, 15], [92, 65, 35, 89]), several(), strict=False):
        inputs = torch.tensor([ids])
        expected = first(hooked(module, "transformer.h.1", inputs))
        torch.testing.assert_close(hidden.value, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            right = module(inputs, use_cache=False).logits
        torch.testing.assert_close(logits.value, right, rtol=1e-4, atol=1e-5)


class AcrossRows(GPT2Block):
    """A block in which each row and position sees all others."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return seen_by_all(super().forward(*args, **kwargs))


def seen_by_all(output: Any) -> Any:
    hidden = first(output)
    hidden = hidden + hidden.mean((0, 1), keepdim=True)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def change_class(module: Any, patch: pytest.MonkeyPatch) -> None:
    module.transformer.h[0].__class__ = AcrossRows


def change_forward_of_class(module: Any, patch: pytest.MonkeyPatch) -> None:
    before = GPT2Block.forward
    patch.setattr(
        GPT2Block, "forward", lambda *args, **kwargs: seen_by_all(before(*args, **kwargs))
    )


def look_ahead(module: Any, patch: pytest.MonkeyPatch) -> None:
    for block in module.transformer.h:
        block.attn.is_causal = False


@pytest.mark.parametrize("change", [change_class, change_forward_of_class, look_ahead])
def test_prompts_share_no_pass_in_which_they_would_see_each_other_now(
    change: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    prompts = ([3, 14, 15], [92, 65, 35, 89, 7])

    def last() -> list[Any]:
        with model.trace() as tracer:
            found = []
            for ids in prompts:
                with tracer.invoke(ids):
                    found.append(model.transformer.h[-1].output[0].save())
        return found

    for _ in range(2):  # the plan is kept
        last()
    change(module, monkeypatch)
    for ids, hidden in zip(prompts, last(), strict=True):
        expected = first(hooked(module, "transformer.h.3", torch.tensor([ids])))
        torch.testing.assert_close(hidden.value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
def test_weights_by_name_are_those_of_an_adapter_that_came_later() -> None:
    base = tiny_gpt2()
    model = LanguageModel(base)
    before = model.blocks[1].attention.W_Q.clone()
    add_adapter(base)
    layer = base.transformer.h[1].attn.c_attn
    expected = (layer.weight + layer.get_delta_weight("default"))[:, :16].detach()
    found = model.blocks[1].attention.W_Q
    torch.testing.assert_close(found, expected.view(16, 4, 4).permute(1, 0, 2))
    assert not torch.allclose(found, before)
    base.disable_adapters()
    torch.testing.assert_close(model.blocks[1].attention.W_Q, before)


def test_an_adapter_that_is_merged_leaves_its_weights() -> None:
    torch.manual_seed(1)
    config = LoraConfig(
        target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **LORA
    )
    peft: Any = get_peft_model(tiny_gpt2(), config).eval()
    model = LanguageModel(peft)
    with model.trace(IDS):
        before = model.base_model.model.lm_head.output.save()
    merged = peft.merge_and_unload()
    with model.trace(IDS):
        layer = model.base_model.model.transformer.h[1].attn.c_attn.output.save()
        after = model.base_model.model.lm_head.output.save()
    torch.testing.assert_close(after.value, before.value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.value, hooked(merged, "transformer.h.1.attn.c_attn", IDS))


def test_blocks_of_a_session_run_on_the_tree_that_is_there() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    used(model)
    with model.session():
        with model.trace(IDS):
            model.transformer.h[1].mlp.c_fc.output.save()
        add_adapter(module)
        with model.trace(IDS):
            read = model.transformer.h[1].mlp.c_fc.output.save()
    torch.testing.assert_close(read.value, hooked(module, "transformer.h.1.mlp.c_fc", IDS))


def test_a_module_that_was_taken_out_is_named() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    used(model)
    last = model.transformer.h[3]
    del module.transformer.h[3]
    assert "transformer.h.3" not in model.modules
    with pytest.raises(PathError, match=r"no module 'transformer.h\[3\]' now"), model.trace(IDS):
        last.output[0].save()
    with pytest.raises(PathError, match=r"no module 'transformer.h\[3\]' now"):
        _ = last.module


def test_keys_and_values_of_blocks_that_were_moved_are_their_own() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    used(model)
    reorder(module)
    with model.generate(IDS, max_new_tokens=1, eos_token_id=None):
        pairs = [block.output[1].save() for block in model.transformer.h]
        made = [block.attn.c_attn.output.save() for block in model.transformer.h]
    for pair, each in zip(pairs, made, strict=True):
        keys = each.value[..., 16:32].view(1, 5, 4, 4).transpose(1, 2)
        torch.testing.assert_close(pair.value[0], keys)


def test_any_module_is_read_as_it_is_now() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, x = Model(module), torch.rand(2, 4)

    def read() -> Any:
        with model.trace(x):
            assert model[1][-1].output.shape[-1] == module(x).shape[-1]
            return model[1][-1].output.save(), model[-1].output.save()

    read()
    for change in (
        lambda: module[1].append(nn.Linear(4, 3)),
        lambda: module[1].__setitem__(0, nn.Linear(4, 4, bias=False)),
        lambda: module.append(nn.Sequential(nn.Linear(3, 2))),
        lambda: module.__delitem__(2),
        lambda: module.__setitem__(1, nn.Sequential(nn.Tanh())),
    ):
        change()
        last, whole = read() if len(module) == 2 else (None, None)
        if last is not None:
            torch.testing.assert_close(last.value, module(x))
            torch.testing.assert_close(whole.value, module(x))


@pytest.mark.parametrize(
    "convert", sampled(["bfloat16", "half", "double", "autocast"], ["half", "autocast"])
)
def test_a_dtype_is_that_of_the_run(convert: str) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)

    def agree() -> torch.dtype:
        with model.trace(IDS):
            value = model.transformer.h[2].mlp.c_fc.output
            said = value.dtype
            kept = value.save()
            model.transformer.h[2].mlp.c_fc.output = torch.zeros(value.shape, dtype=said)
        with model.trace(IDS):  # known by now, and skipped
            block = model.transformer.h[1]
            block.skip(torch.zeros(1, 5, 16, dtype=block.input.dtype))
            model.transformer.h[2].mlp.c_fc.output.save()
        assert said == kept.value.dtype
        return said

    assert agree() == torch.float32
    if convert == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert agree() == torch.bfloat16
    else:
        getattr(module, convert)()
        assert agree() == next(module.parameters()).dtype
        module.float()
    assert agree() == torch.float32


class Mixed(nn.Module):
    """A layer that computes in a dtype of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).to(self.second.weight.dtype)).to(x.dtype)


def test_a_dtype_is_that_of_a_part_which_was_converted() -> None:
    model = Model(Mixed())
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.module.second.to(dtype)
        with model.trace(torch.ones(1, 2)):
            assert model.second.output.dtype == dtype
            assert model.first.output.dtype == torch.float32
            value = model.second.output.save()
        assert value.value.dtype == dtype


class Fresh(nn.Module):
    """Makes a tensor of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.zeros(x.shape))


def test_a_dtype_depends_on_the_default() -> None:
    model = Model(Fresh())

    def said() -> torch.dtype:
        with model.trace(torch.ones(2)):
            dtype = model.last.output.dtype
            value = model.last.output.save()
        assert value.value.dtype == dtype
        return dtype

    assert said() == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert said() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert said() == torch.float32


@pytest.mark.parametrize("used_before", sampled([False, True], [False]))
def test_other_blocks_than_the_one_that_was_replaced_stay_blocks(used_before: bool) -> None:
    module = tiny_gpt2()
    if not used_before:
        bypass(module)
    model = LanguageModel(module)
    if used_before:
        used(model)
        bypass(module)
    with model.trace(IDS):
        found = [block.output[0].save() for block in model.transformer.h]
        mid = model.blocks[2].residual_mid.save()
    for layer, hidden in enumerate(found):
        torch.testing.assert_close(
            hidden.value, first(hooked(module, f"transformer.h.{layer}", IDS))
        )
    attention = first(hooked(module, "transformer.h.2.attn", IDS))
    torch.testing.assert_close(mid.value, found[1].value + attention)
    with pytest.raises(PathError, match="no attention in this block"), model.trace(IDS):
        model.blocks[1].attention.z.save()


def test_what_a_config_says_of_outputs_may_change() -> None:
    """Several prompts share a pass by what the output is made of."""
    module = tiny_gpt2()
    model = LanguageModel(module)
    prompts = [[5, 6, 7], [5, 6, 7, 8]]
    for setting in (False, True, False):
        module.config.output_hidden_states = setting
        found: list[Any] = []
        with model.trace() as tracer:
            for ids in prompts:
                with tracer.invoke(ids):
                    found.append(model.output.save())
        for saved, ids in zip(found, prompts, strict=True):
            with torch.no_grad():
                expected = module(torch.tensor([ids]), use_cache=False)
            assert saved.value.keys() == expected.keys()
            torch.testing.assert_close(saved.value.logits, expected.logits)
            if setting:
                torch.testing.assert_close(saved.value.hidden_states, expected.hidden_states)


@pytest.mark.no_wire  # a run from bytes looks at the model too
def test_what_a_config_says_of_outputs_may_change_for_one_prompt() -> None:
    """What an output is made of is known before the run."""
    module = tiny_gpt2()
    model = LanguageModel(module)
    ids = torch.tensor([[5, 6, 7]])
    for setting in (False, True, False, True):
        module.config.output_hidden_states = setting
        if not setting:
            with pytest.raises(InsituError, match="no 'hidden_states'"), model.trace(ids):
                _ = model.output.hidden_states[1].shape
            continue
        with torch.no_grad():
            expected = module(ids, use_cache=False).hidden_states[1]
        with model.trace(ids):
            assert model.output.hidden_states[1].shape == expected.shape
            saved = model.output.hidden_states[1].save()
        torch.testing.assert_close(saved.value, expected)
