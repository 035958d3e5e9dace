"""Lines that errors say to write, run as they stand, against weights and plain PyTorch hooks."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from insitu import InsituError, LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.architectures import spread_out

IDS = torch.tensor([[5, 17, 42, 8, 23, 61]])


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    module = {"gpt2": tiny_gpt2, "llama": tiny_llama}[request.param]()
    spread_out(module)
    module.set_attn_implementation("eager")
    return LanguageModel(module)


def message(use: Callable[[], object]) -> str:
    """The message of the error that something raises, in one line."""
    with pytest.raises(InsituError) as caught:
        use()
    return str(caught.value).splitlines()[0]


def lines(use: Callable[[], object]) -> list[str]:
    """The lines that the error says to write."""
    _, written, instead = message(use).partition(": write `")
    assert written, instead
    return re.findall(r"`([^`]+)`", "`" + instead)


def run(model: LanguageModel, line: str) -> Any:
    """What a line gives in a block."""
    with model.trace(IDS):
        value = eval(line, {"model": model, "torch": torch})
        if hasattr(value, "save"):
            value = value.save()
    return getattr(value, "value", value)


def seen(model: LanguageModel, path: str) -> torch.Tensor:
    """What a module gives, as a plain hook sees it."""
    found: list[Any] = []
    part = model.module.get_submodule(path)
    handle = part.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model.module(input_ids=IDS, use_cache=False)
    handle.remove()
    return found[0]


def projected(model: LanguageModel, letter: str, layer: int) -> torch.Tensor:
    """Queries, keys or values as their layer makes them, `(batch, position, head, d_head)`."""
    if model.module.config.model_type == "gpt2":
        three = seen(model, f"transformer.h.{layer}.attn.c_attn").chunk(3, -1)
        return three["qkv".index(letter)].unflatten(-1, (4, 4))
    made = seen(model, f"model.layers.{layer}.self_attn.{letter}_proj")
    return made.unflatten(-1, (-1, 4))


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_the_line_for_a_hook_of_projections_reads_them_unrotated(
    model: LanguageModel, letter: str
) -> None:
    named = lines(lambda: getattr(model.blocks[1].attention, f"hook_{letter}"))
    expected = projected(model, letter, 1)
    for line in named:
        value = run(model, line)
        value = value if "hook(" in line else value.transpose(1, 2)
        assert torch.equal(value, expected), line
    rotates = model.module.config.model_type == "llama" and letter != "v"
    assert len(named) == (1 if rotates else 2)


def test_the_lines_for_a_hook_of_rotated_queries_can_be_run(model: LanguageModel) -> None:
    with_hooks = model.module.config.model_type == "llama"
    first, *others = lines(lambda: model.blocks[1].attention.hook_rot_q)
    assert len(others) == with_hooks
    value = run(model, first).transpose(1, 2)
    assert torch.equal(value, projected(model, "q", 1)) is not with_hooks
    for other in others:
        assert torch.equal(run(model, other), value)
