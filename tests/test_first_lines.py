"""What people type first, by habit of other tools: it works, or the error names what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import InsituError, LanguageModel
from insitu.methods import activation_patching, logit_difference, logit_lens, steering_vector

PROMPT, OTHER = "The Eiffel Tower is in the city of", "The Louvre is in the city of"


def test_a_layer_is_read_and_kept_on_disk(eiffel: LanguageModel, tmp_path: Path) -> None:
    with eiffel.trace(PROMPT):
        hidden = eiffel.transformer.h[3].output[0].save()
    torch.save(hidden, tmp_path / "hidden.pt")
    kept = torch.load(tmp_path / "hidden.pt")
    module: Any = eiffel.module
    ids = eiffel.tokenizer(PROMPT, return_tensors="pt")
    expected = module(**ids, output_hidden_states=True).hidden_states[4]
    torch.testing.assert_close(kept, expected)


def test_a_head_is_ablated(eiffel: LanguageModel) -> None:
    with eiffel.trace(PROMPT):
        eiffel.blocks[1].attention.z[:, 2] = 0
        logits = eiffel.logits.save()

    def off(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., 32:48] = 0
        return (z,)

    module: Any = eiffel.module
    hook = module.transformer.h[1].attn.c_proj.register_forward_pre_hook(off)
    expected = module(**eiffel.tokenizer(PROMPT, return_tensors="pt")).logits
    hook.remove()
    torch.testing.assert_close(logits.value, expected)


def test_text_is_generated_and_steered(eiffel: LanguageModel) -> None:
    with eiffel.generate(PROMPT, max_new_tokens=3) as generator:
        with generator.every_step():
            eiffel.blocks[2].residual_out[:] += 0
    module: Any = eiffel.module
    ids = eiffel.tokenizer(PROMPT, return_tensors="pt")
    expected = module.generate(**ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generator.output, expected)
    assert steering_vector(eiffel, [PROMPT], [OTHER]).site == "residual_out"


def test_a_batch_of_prompts_is_answered_at_its_last_position(eiffel: LanguageModel) -> None:
    with eiffel.trace([PROMPT, OTHER]):
        best = eiffel.logits[:, -1].argmax(-1).save()
    assert [eiffel.tokenizer.decode(token) for token in best] == [" Paris", " Paris"]


def test_a_gradient_a_lens_and_a_patch(eiffel: LanguageModel) -> None:
    with eiffel.trace(PROMPT):
        gradient = eiffel.transformer.h[2].output[0].grad.save()
        eiffel.logits[0, -1, 5].backward()
    assert gradient.shape == (1, 8, 128)
    assert logit_lens(eiffel, PROMPT).sizes == {"layer": 7, "position": 8}
    metric = logit_difference(" Paris", " Moscow")
    found = activation_patching(eiffel, OTHER, "The Kremlin is in the city of", metric)
    assert found.sizes == {"layer": 6, "position": 7}


def test_a_cache_by_name_and_inputs_as_a_tokenizer_gives_them(eiffel: LanguageModel) -> None:
    assert eiffel.run_with_cache(PROMPT)["blocks.3.attn.hook_pattern"].shape == (1, 8, 8, 8)
    with eiffel.trace(**eiffel.tokenizer(PROMPT, return_tensors="pt")):
        logits = eiffel.logits.save()
    assert logits.shape == (1, 8, 1336)


HABITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "run_with_hooks": (lambda m: m.run_with_hooks(PROMPT), r"with model\.trace\(prompt\)"),
    "add_hook": (lambda m: m.add_hook("x", print), r"model\.hook\(name\)"),
    "a hook of torch": (lambda m: m.blocks[0].register_forward_hook(print), r"\.module"),
    "to_tokens": (lambda m: m.to_tokens(PROMPT), r"model\.tokenizer\(prompt\)"),
    "cfg": (lambda m: m.cfg, r"model\.config"),
    "a weight": (lambda m: m.transformer.h[0].mlp.c_fc.weight, r"c_fc\.module\.weight"),
    "no block": (lambda m: m.blocks[0].residual_out, r"with model\.trace\(prompt\)"),
    "remote": (lambda m: m.trace(PROMPT, remote=True), "no option `remote`"),
    "a layer too many": (lambda m: m.blocks[99], "6 entries"),
}


@pytest.mark.parametrize("name", HABITS)
def test_a_habit_is_told_what_to_write(eiffel: LanguageModel, name: str) -> None:
    typed, said = HABITS[name]
    with pytest.raises(InsituError, match=said):
        typed(eiffel)
