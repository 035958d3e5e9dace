"""Trees with shapes, numbers of parameters and names."""

import pytest
from rich.console import Console
from torch import nn

from insitu import LanguageModel, Model, OptionError


def rows(text: str) -> dict[str, str]:
    """What stands behind each module, by its name."""
    return {
        line.partition(":")[0].lstrip("│├└─ "): " ".join(line.partition(":")[2].split())
        for line in text.splitlines()[1:]
    }


def test_shapes_numbers_and_names_stand_beside_modules(gpt2: LanguageModel) -> None:
    module = gpt2.load()
    found = rows(str(gpt2.tree()))
    total = sum(one.numel() for one in module.parameters())
    assert found["model"] == f"GPT2LMHeadModel {total:,}"
    block = sum(one.numel() for one in module.transformer.h.parameters())
    assert found["[0-3]"].startswith(f"GPT2Block {block:,} residual_in (input)")
    assert found["c_attn"].startswith("Conv1D weight (16, 48), bias (48)")
    assert found["lm_head"] == "Linear weight (100, 16) 1,600 unembedding, logits"
    assert found["h"].endswith("blocks")


def test_names_are_found_on_other_architectures(llama: LanguageModel) -> None:
    found = rows(str(llama.tree()))
    assert found["embed_tokens"].endswith("embedding")
    assert found["layers"].endswith("blocks")
    assert "attention.z (input)" in found["o_proj"]
    assert found["norm"].endswith("final_norm")


def test_what_is_deeper_is_counted(gpt2: LanguageModel) -> None:
    found = rows(str(gpt2.tree(depth=1)))
    assert set(found) == {"model", "transformer", "lm_head"}
    hidden = sum(1 for _ in gpt2.load().transformer.modules()) - 1
    assert f"… {hidden} modules" in found["transformer"]
    with pytest.raises(OptionError, match="at least 1 deep, and not 0"):
        gpt2.tree(depth=0)


def test_a_plain_module_has_a_tree_too() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3), nn.ReLU()))
    found = rows(str(model.tree()))
    assert found["[0-1]"] == "Linear weight (3, 2), bias (3) 18"
    assert found["[2]"] == "ReLU"


def test_nothing_is_loaded_or_said_of_runs(eiffel: LanguageModel) -> None:
    shown = str(eiffel.tree())
    assert not eiffel.loaded
    assert "attention.pattern (inside)" in shown
    with pytest.warns(UserWarning, match="eager"), eiffel.trace("The Louvre"):
        eiffel.blocks[0].attention.pattern.save()


@pytest.mark.parametrize("room", [60, 80, 120])
def test_narrow_terminals_show_less_and_say_so(gpt2: LanguageModel, room: int) -> None:
    console = Console(width=room, color_system=None)
    with console.capture() as captured:
        console.print(gpt2.tree())
    shown = captured.get()
    assert ("bias (48)" in shown) is (room >= 100)
    assert ("A wider terminal shows" in shown) is (room < 100)
    assert "GPT2Attention" in shown
