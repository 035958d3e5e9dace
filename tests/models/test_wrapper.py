"""What a wrapper has of its module, and copies of it, against the module itself."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from insitu import InsituError, LanguageModel, Model, PathError
from insitu.methods import direct_logit_attribution
from tests.conftest import tiny_gpt2, tiny_llama

IDS = torch.tensor([[3, 14, 15, 92, 65]])


def logits(model: LanguageModel) -> torch.Tensor:
    with model.trace(IDS):
        found = model.lm_head.output.save()
    return found.value


def test_methods_of_the_module_are_the_wrappers(gpt2: LanguageModel) -> None:
    assert gpt2.double() is gpt2
    assert gpt2.dtype == next(gpt2.module.parameters()).dtype == torch.float64
    assert next(gpt2.parameters()) is next(gpt2.module.parameters())
    assert gpt2.train().module.training and not gpt2.eval().module.training
    gpt2.requires_grad_(False)
    assert not gpt2.module.lm_head.weight.requires_grad
    with pytest.raises(PathError, match=r"model\.module\.resize_token_embeddings"):
        gpt2.resize_token_embeddings(120)


def test_a_model_that_is_not_loaded_is_as_it_was_asked_to_be(eiffel: LanguageModel) -> None:
    eiffel.eval()
    assert not eiffel.loaded
    assert not eiffel.load().training
    other = LanguageModel("insitu/eiffel").half()
    assert other.load().lm_head.weight.dtype == torch.float16


@pytest.mark.parametrize("edited", [False, True])
def test_a_copy_wraps_a_copied_module(gpt2: LanguageModel, edited: bool) -> None:
    if edited:
        with gpt2.edit() as gpt2:
            gpt2.transformer.h[1].mlp.output = gpt2.transformer.h[1].mlp.output * 0
    before = logits(gpt2)
    other = copy.deepcopy(gpt2)
    torch.testing.assert_close(logits(other), before)
    nn.init.zeros_(other.module.transformer.wte.weight)
    torch.testing.assert_close(logits(gpt2), before)
    assert not torch.allclose(logits(other), before)
    assert copy.copy(gpt2).module is gpt2.module
    with pytest.raises(InsituError, match="pickle the module"):
        pickle.dumps(gpt2)


def test_a_copy_of_a_model_that_is_not_loaded_loads_for_itself(eiffel: LanguageModel) -> None:
    other = copy.deepcopy(eiffel)
    assert not other.loaded
    assert other.load() is not eiffel.load()


def test_weights_that_are_offloaded_are_fetched() -> None:
    module = tiny_gpt2()
    right = module.transformer.h[1].attn.c_attn.weight[:, :16].detach().clone()
    head = module.lm_head.weight.detach().clone()
    cpu_offload(module, execution_device=torch.device("cpu"))
    model = LanguageModel(module)
    found = model.blocks[1].attention.W_Q
    torch.testing.assert_close(found, right.view(16, 4, 4).permute(1, 0, 2))
    torch.testing.assert_close(model.W_U, head.T)
    torch.testing.assert_close(model.W_E, head)


def test_dropout_is_said_once_and_the_mode_is_left() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = LanguageModel(tiny_gpt2().train())
        for _ in range(2):
            logits(model)
    assert sum("eval()" in str(one.message) for one in caught) == 1
    assert model.module.training


def test_hooks_of_the_user_see_real_runs_once_each(gpt2: LanguageModel) -> None:
    seen: list[str] = []

    def count(module: nn.Module, args: object, output: object) -> None:
        if module is gpt2.module.lm_head:
            seen.append(type(output).__name__)

    everywhere = torch.nn.modules.module.register_module_forward_hook(count)
    own = gpt2.module.lm_head.register_forward_hook(count)
    try:
        with gpt2.trace(IDS):
            assert gpt2.lm_head.output.shape == (1, 5, 100)
            gpt2.lm_head.output.save()
    finally:
        everywhere.remove()
        own.remove()
    assert set(seen) == {"Tensor"}


def test_a_part_whose_forward_is_compiled_runs_as_written(gpt2: LanguageModel) -> None:
    before = logits(gpt2)
    mlp = gpt2.module.transformer.h[1].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")
    model = Model(gpt2.module)
    with model.trace(input_ids=IDS, use_cache=False):
        inner = model.transformer.h[1].mlp.c_fc.output.save()
        after = model.lm_head.output.save()
    assert inner.value.shape == (1, 5, 64)
    torch.testing.assert_close(after.value, before)


def compile_block(module: nn.Module) -> None:
    module.get_submodule("transformer.h.1").compile(backend="eager")


def compile_forward(module: nn.Module) -> None:
    block = module.get_submodule("transformer.h.1")
    block.forward = torch.compile(block.forward, backend="eager")


def compile_own_forward(module: nn.Module) -> None:
    mlp = module.get_submodule("transformer.h.1.mlp")
    mlp.forward = torch.compile(mlp.forward, backend="eager")


def compile_hooked(module: nn.Module) -> None:
    module.get_submodule("transformer.h.1.mlp.c_fc").compile(backend="eager")


@pytest.mark.parametrize(
    "change", [compile_block, compile_forward, compile_own_forward, compile_hooked]
)
def test_a_part_that_is_compiled_after_a_block_was_planned_runs_as_written(
    change: Callable[[nn.Module], None],
) -> None:
    """A block that is planned already must not have its hooks traced by `torch.compile`."""
    torch._dynamo.reset()
    module = tiny_gpt2()
    mlp = module.transformer.h[1].mlp
    if change is compile_own_forward:  # which the part has before it is compiled
        written = mlp.forward
        mlp.forward = lambda hidden: written(hidden)
    hook = mlp.c_fc.register_forward_hook(lambda _, args, out: out * 0.5)
    with torch.no_grad():
        halved = module(IDS, use_cache=False).logits
    hook.remove()
    model = LanguageModel(module)

    def written_logits() -> torch.Tensor:
        with model.trace(IDS):
            fc = model.transformer.h[1].mlp.c_fc
            fc.output = fc.output * 0.5
            return model.lm_head.output.save()

    torch.testing.assert_close(written_logits().value, halved)
    change(module)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for _ in range(2):
        torch.testing.assert_close(written_logits().value, halved)
    assert not counters["frames"]  # nothing was compiled


@pytest.mark.filterwarnings("ignore:The model is in training mode:UserWarning")
@pytest.mark.filterwarnings("ignore:Attention scores and patterns exist:UserWarning")
def test_what_is_found_out_in_training_mode_holds_after_it_and_leaves_no_hooks() -> None:
    module = tiny_gpt2()
    expected: dict[int, torch.Tensor] = {}
    model = LanguageModel(module.train())
    with model.trace(IDS):
        model.blocks[0].attention.pattern.save()
    assert not any(part._forward_hooks for part in module.modules())
    pickle.dumps(module)
    module.eval()
    other = LanguageModel(copy.deepcopy(module))
    for number, one in enumerate((model, other)):
        with one.trace(IDS):
            pattern = one.blocks[0].attention.pattern.save()
        expected[number] = pattern.value
        direct_logit_attribution(one, IDS, 3, part="heads")
    torch.testing.assert_close(expected[0], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_have_their_names_in_16_bits(dtype: torch.dtype) -> None:
    module = tiny_llama().to(dtype)
    model = LanguageModel(module)
    with model.trace(IDS):
        query = model.blocks[1].attention.q.save()
    assert query.shape[:3] == (1, module.config.num_attention_heads, IDS.shape[1])
    assert model.blocks[1].attention.W_K.dtype == dtype
