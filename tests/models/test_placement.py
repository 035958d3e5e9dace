"""Models that are compiled, in half precision, or whose weights are kept elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from insitu import ExecutionError, LanguageModel, Model, OptionError
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import tiny_mixtral
from tests.models.kinds import ready
from tests.thinning import sampled

PROMPTS = [torch.tensor([[3, 14, 15, 92, 65, 35, 89]]), torch.tensor([[7, 8, 9]])]
CPU = torch.device("cpu")


def mixtral() -> nn.Module:
    return ready(tiny_mixtral)


def offloaded(build: Callable[[], Any], folder: Path) -> LanguageModel:
    module = build()
    cpu_offload(module, execution_device=CPU)
    return LanguageModel(module)


def on_disk(build: Callable[[], Any], folder: Path) -> LanguageModel:
    module = build()
    disk_offload(module, folder, execution_device=CPU)
    return LanguageModel(module)


def divided(build: Callable[[], Any], folder: Path) -> LanguageModel:
    """Half of the weights in memory and half on disk, as `device_map="auto"` has it."""
    module = build()
    module.save_pretrained(folder / "model")
    size = sum(4 * parameter.numel() for parameter in module.parameters())
    options: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": size // 2}}
    return LanguageModel(str(folder / "model"), **options, offload_folder=str(folder / "rest"))


def compiled(build: Callable[[], Any], folder: Path) -> LanguageModel:
    return LanguageModel(torch.compile(build(), backend="eager"))


def compiled_blocks(build: Callable[[], Any], folder: Path) -> LanguageModel:
    module = build()
    for path, part in module.named_modules():
        if path.endswith((".0", ".1")):
            part.compile(backend="eager")
    return LanguageModel(module)


@pytest.mark.parametrize(
    "make", sampled([offloaded, on_disk, divided, compiled, compiled_blocks], [offloaded, compiled])
)
def test_the_functions_inside_of_a_forward_are_those_of_a_plain_model(
    make: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model, plain = make(tiny_gpt2, tmp_path), LanguageModel(tiny_gpt2())
    model.load()
    found: dict[LanguageModel, str] = {}
    values: list[torch.Tensor] = []
    for one in (model, plain):
        with one.trace(PROMPTS[0]):
            found[one] = repr(one.transformer.h[1].mlp.c_fc.ops)
            product = one.transformer.h[1].mlp.c_fc.ops.addmm[-1].output.save()
        values.append(product.value)
    assert found[model] == found[plain]
    assert "addmm[0]: torch.Size([7, 64])" in found[model]
    assert torch.equal(*values)


# What 4.57 says in `generate` itself, where the model says that it is on the meta device.
@pytest.mark.filterwarnings("ignore:You are calling .generate")
@pytest.mark.parametrize(
    "make", sampled([offloaded, on_disk, divided, compiled, compiled_blocks], [offloaded, compiled])
)
@pytest.mark.parametrize("build", sampled([tiny_gpt2, tiny_llama], [tiny_gpt2]))
def test_a_model_is_used_as_if_it_were_a_plain_one(
    build: Callable[[], Any], make: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    model, plain = make(build, tmp_path), build()
    model.load()
    before = {path: vars(part).get("forward") for path, part in model.module.named_modules()}
    blocks = model.transformer.h if hasattr(plain, "transformer") else model.model.layers
    with model.trace(PROMPTS[0]):
        assert model.lm_head.output.shape == (1, 7, 100)
        logits = model.lm_head.output.save()
    assert torch.equal(logits, plain(PROMPTS[0]).logits)

    with model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            state = blocks[1].output[0]
        for position in range(7):
            with tracer.invoke(PROMPTS[0]):
                blocks[1].output[0][:, position] = state[:, position] * 1
                last = model.lm_head.output[0, -1].save()
        with tracer.invoke(PROMPTS[1]):
            other = model.lm_head.output.save()
    torch.testing.assert_close(last.value, logits[0, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.value, plain(PROMPTS[1]).logits, atol=1e-5, rtol=1e-5)

    expected = plain.generate(
        PROMPTS[0], attention_mask=torch.ones_like(PROMPTS[0]), pad_token_id=0, max_new_tokens=3
    )
    with model.generate(PROMPTS[0], max_new_tokens=3) as generator:
        blocks[0].output[0].save()
    assert torch.equal(generator.output, expected)
    after = {path: vars(part).get("forward") for path, part in model.module.named_modules()}
    assert after == before


def test_a_run_compiles_nothing_and_what_is_compiled_stays_so() -> None:
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    whole = torch.compile(module, backend=backend)
    model, x = Model(whole), torch.randn(2, 3)
    assert model.module is module
    whole(x)
    assert len(seen) == 1
    with model.trace(x):
        model[1].output = model[0].output
        found = model.output.save()
    assert torch.equal(found, module[0](x))
    assert torch.equal(whole(x), module(x))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    plain, model = tiny_gpt2().to(dtype), LanguageModel(tiny_gpt2().to(dtype))
    with model.trace(PROMPTS[0]):
        block = model.transformer.h[1]
        block.output = block.output[0] * 2  # of its own dtype
        logits = model.lm_head.output.save()

    def double(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    plain.transformer.h[1].register_forward_hook(double)
    assert logits.dtype is dtype
    assert torch.equal(logits, plain(PROMPTS[0]).logits)


def test_a_value_is_saved_to_another_device(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPTS[0]):
        output = gpt2.transformer.h[0].output
        pair = output.save(to="meta")
        same = output[0].save(to=CPU)
        kept = (output[0] * 2).save(to="meta", keep_graph=True)
        plain = output[0].save()
    assert pair.value[0].device.type == kept.value.device.type == "meta"
    assert kept.value.requires_grad
    assert pair.value[0].shape == (1, 7, 16)
    assert torch.equal(same, plain)


def test_a_device_that_there_is_not_is_an_error_at_its_line(gpt2: LanguageModel) -> None:
    with pytest.raises(OptionError, match=r"(?s)`to` is a device.*test_placement"):
        with gpt2.trace(PROMPTS[0]):
            gpt2.lm_head.output.save(to="nowhere")


@pytest.mark.parametrize("make", [offloaded, on_disk])
@pytest.mark.parametrize("build", sampled([tiny_gpt2, tiny_llama, mixtral], [tiny_gpt2]))
def test_names_of_an_offloaded_model_are_those_of_its_class(
    build: Callable[[], Any], make: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """Moves that Accelerate makes around a module's forward do not make another kind of block."""
    model, plain = make(build, tmp_path), LanguageModel(build())

    def read(of: LanguageModel) -> list[torch.Tensor]:
        with of.trace(PROMPTS[0]):
            block = of.blocks[1]
            found = [
                *(block.residual_in.save(), block.residual_mid.save(), block.mlp_out.save()),
                *(block.attention.z.save(), of.logits.save()),
            ]
        return [*(one.value for one in found), block.attention.W_O, of.W_E]

    for found, expected in zip(read(model), read(plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_an_offloaded_weight_is_refused(tmp_path: Path) -> None:
    model = offloaded(tiny_gpt2, tmp_path)
    weight = model.module.transformer.h[1].mlp.c_fc.weight
    with pytest.raises(ExecutionError, match="without offloading"), model.trace(PROMPTS[0]):
        model.logits.sum().backward(inputs=[weight])
